"""What users of a Trainer rely on, in both phases: evaluation, options, logs, the hub."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
)

from bidora.trainer import BiDoRATrainer, BiDoRATrainingArguments
from bidora.trainer.levels import SteppedElsewhere
from hypergrad.batches import part_of
from hypergrad.optimizer import StepReport
from tests.bidora.tiny_trainer import (
    adapter,
    arguments,
    bert,
    collate,
    is_magnitude,
    labelled,
    largest_difference,
    trainer,
    watched,
)

ROUNDING = 2e-9
"""As derived in `test_trainer.py`: a few eps of float64, divided by `adam_epsilon`."""


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[StepReport]:
    """Collect the report of every step that a search takes."""
    kept: list[StepReport] = []
    take_step = SteppedElsewhere.take_step

    def keep(self: Any, *given: Any) -> StepReport:
        report = take_step(self, *given)
        kept.append(report)
        return report

    monkeypatch.setattr(SteppedElsewhere, "take_step", keep)
    return kept


class OnStep(TrainerCallback):
    """Call a function after every step."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.call(kw)


# -- evaluation ------------------------------------------------------------------------

EVERY_STEP: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def scores(*values: float) -> Any:
    """A `compute_metrics` that gives these scores, one evaluation after the other."""
    left = list(values)

    def compute(predictions: Any) -> dict[str, float]:
        assert predictions.predictions.shape == (8, 2)
        return {"score": left.pop(0)}

    return compute


def test_each_phase_ends_with_its_best_model(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "eval_dataset": labelled(8, seed=1),
        "compute_metrics": scores(0, 2, 1, 0, 3, 1),
    }
    t = trainer(tmp_path, parts=parts, max_steps=3, **EVERY_STEP)
    watch = watched(t)
    t.train()

    assert t.search_state is not None
    assert t.search_state.best_metric == 2
    searched = Path(t.search_state.best_model_checkpoint or "")
    assert searched == tmp_path / "_search" / "checkpoint-2"
    assert Path(t.state.best_model_checkpoint or "") == tmp_path / "checkpoint-2"
    best = watch.after["search", 2]
    for name, value in watch.first["retrain"].items():
        if is_magnitude(name):
            assert torch.equal(value, best[name])
            assert not torch.equal(value, watch.after["search", 3][name])
    end = adapter(t.model)
    for name, value in watch.after["retrain", 2].items():
        assert torch.equal(end[name], value), name
    trained = {n for n, p in t.model.named_parameters() if p.requires_grad}
    assert trained == watch.trained["retrain"]
    told = [e["eval_score"] for e in t.state.log_history if "eval_score" in e]
    assert told == [0, 3, 1]


def test_a_head_that_peft_does_not_save_is_the_best_models_too(tmp_path: Path) -> None:
    """`requires_grad_(True)` on a head trains it, and leaves it out of PEFT's file."""
    config = LoraConfig(r=2, use_dora=True, target_modules=["query"])
    model: Any = get_peft_model(bert().unload(), config).to(torch.float64)
    head = model.base_model.model.classifier.requires_grad_(True)
    parts: dict[str, Any] = {
        "eval_dataset": labelled(8, seed=1),
        "compute_metrics": scores(1, 0, 1, 0),
    }
    t = trainer(
        tmp_path,
        model=model,
        parts=parts,
        max_steps=2,
        retrain_max_steps=2,
        **EVERY_STEP,
    )
    seen: list[Tensor] = []
    t.add_callback(OnStep(lambda kw: seen.append(head.weight.detach().clone())))
    t.train()
    assert not torch.equal(seen[2], seen[3])
    assert torch.equal(head.weight, seen[2])


def test_early_stopping_ends_the_phase_that_stops_improving(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "eval_dataset": labelled(8, seed=1),
        "compute_metrics": scores(1, 2, 3, 2, 4, 3),  # no more are asked for
        "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)],
    }
    t = trainer(tmp_path, parts=parts, retrain_max_steps=9, **EVERY_STEP)
    output = t.train()
    assert t.search_state is not None
    assert t.search_state.global_step == 4
    assert output.global_step == 2


def test_the_search_stops_where_the_held_back_loss_does_not_fall(
    tmp_path: Path,
) -> None:
    """No rate, no gain: the first of three evaluations is the best."""
    sets = {"a": labelled(8, seed=1), "b": labelled(8, seed=2)}
    t = trainer(
        tmp_path,
        parts={"eval_dataset": sets},
        search_patience=2,
        max_steps=9,
        learning_rate=0.0,
        outer_learning_rate=0.0,
        retrain_learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=100,
    )
    start = adapter(t.model)
    output = t.train()
    assert t.search_state is not None
    assert t.search_state.global_step == 3  # twice without gain, two sets or not
    assert output.global_step == 3
    assert largest_difference(start, adapter(t.model)) > 1e-3

    split = t.train_dataset.select(_split(tmp_path)["outer_indices"])
    with torch.no_grad():
        model = bert().eval()
        loss = model(**collate(list(split))).loss.item()
    lines = t.search_state.log_history
    told = [e["held_back_loss"] for e in lines if "held_back_loss" in e]
    # A mean over examples, of losses that are gathered in float32 or better.
    assert told == pytest.approx([loss] * 3, rel=1e-6)
    assert {"eval_a_loss", "eval_b_loss"} <= {key for line in lines for key in line}
    retraining = {key for line in t.state.log_history for key in line}
    assert "eval_a_loss" in retraining
    assert "held_back_loss" not in retraining


def _split(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bidora_split.json").read_text())


# -- the loss --------------------------------------------------------------------------


class _Doubled(BiDoRATrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


def _tripled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return 3 * total / num_items_in_batch


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """0.8 of the usual loss and 0.2 of the mean over classes."""
    p = logits.log_softmax(-1)
    return -(0.8 * p.gather(1, labels[:, None]).mean() + 0.2 * p.mean())


@pytest.mark.parametrize(
    ("cls", "parts", "changed", "expected"),
    [
        (
            _Doubled,
            {},
            {},
            lambda logits, labels: 2 * nn.functional.cross_entropy(logits, labels),
        ),
        (
            BiDoRATrainer,
            {"compute_loss_func": _tripled},
            {},
            lambda logits, labels: 3 * nn.functional.cross_entropy(logits, labels),
        ),
        (BiDoRATrainer, {}, {"label_smoothing_factor": 0.2}, _smoothed),
    ],
    ids=["overridden", "function", "smoothed"],
)
def test_both_levels_have_the_trainers_loss(
    tmp_path: Path,
    reports: list[StepReport],
    cls: Any,
    parts: dict[str, Any],
    changed: dict[str, Any],
    expected: Any,
) -> None:
    batches: list[Any] = []

    def keep(features: list[Any]) -> Any:
        batches.append(collate(features))
        return dict(batches[-1])

    t = trainer(
        tmp_path,
        cls=cls,
        parts={**parts, "data_collator": keep},
        max_steps=1,
        retrain_max_steps=1,
        learning_rate=0.0,
        outer_learning_rate=0.0,
        **changed,
    )
    t.train()
    assert reports[0].outer_step
    by_size = {len(b["labels"]): b for b in batches if len(b["labels"]) == 3}
    by_size[4] = next(b for b in batches if len(b["labels"]) == 4)
    model = bert()
    for size, told in ((4, reports[0].inner_loss), (3, reports[0].outer_loss)):
        batch = by_size[size]
        logits = model(**{**batch, "labels": None}).logits
        wanted = expected(logits, batch["labels"]).item()
        # transformers adds the smoothing up in float32, whose eps is 1.2e-7.
        rel = 1e-6 if "label_smoothing_factor" in changed else 1e-12
        assert told == pytest.approx(wanted, rel=rel)


# -- options of the Trainer ------------------------------------------------------------


def test_groups_by_length_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    orders = []
    for i in range(2):
        lengths: list[list[int]] = []

        def keep(features: list[Any], lengths: list[list[int]] = lengths) -> Any:
            lengths.append([len(f["input_ids"]) for f in features])
            return collate(features)

        t = trainer(
            tmp_path / str(i),
            parts={"data_collator": keep, "train_dataset": labelled(96)},
            train_sampling_strategy="group_by_length",
            validation_fraction=1 / 3,
            max_steps=8,
            retrain_max_steps=6,
        )
        t.train()
        orders.append(lengths)
        inner = [batch for batch in lengths if len(batch) == 4]
        # A quarter of 64 and of 96 examples at a time, from its longest to its shortest;
        # only the first of all is exchanged with the longest of all.
        for start, stop in ((0, 4), (4, 8), (8, 14)):
            group = [n for batch in inner[start:stop] for n in batch]
            assert group[1:] == sorted(group[1:], reverse=True)
            assert group[1] > group[-1]
    assert orders[0] == orders[1]


def test_bf16_rounds_the_losses_and_not_the_weights(
    tmp_path: Path, reports: list[StepReport]
) -> None:
    for name, bf16 in (("rounded", True), ("full", False)):
        t = trainer(tmp_path / name, model=bert(torch.float32), bf16=bf16, max_steps=2)
        t.train()
        assert {p.dtype for p in t.model.parameters()} == {torch.float32}
    (a, _, b, _) = reports
    # bfloat16 has 8 bits: a logit of size 1 is off by up to 2^-9, a loss by about that.
    assert 0 < abs((a.inner_loss or 0) - (b.inner_loss or 0)) < 2e-2
    assert a.hypergrad_norm == pytest.approx(b.hypergrad_norm, rel=0.1)


CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in dataclasses.fields(TrainingArguments)}
)


@pytest.mark.parametrize("estimator", ["darts", "cg"])  # of first and second order
def test_activation_checkpointing_changes_no_weight(
    tmp_path: Path, estimator: str
) -> None:
    ends = []
    for on in (False, True):
        switch: dict[str, Any] = {CHECKPOINTING: on}
        t = trainer(
            tmp_path / str(on),
            estimator=estimator,
            max_steps=2,
            retrain_max_steps=2,
            **switch,
        )
        t.train()
        modules = t.model.base_model.model.bert.encoder.layer
        assert all(layer.gradient_checkpointing == on for layer in modules)
        ends.append(adapter(t.model))
    assert largest_difference(*ends) < ROUNDING


def test_a_model_that_is_made_by_a_function_is_the_same(tmp_path: Path) -> None:
    def make() -> Any:
        return bert()

    made = trainer(tmp_path / "a", parts={"model": None, "model_init": make})
    given = trainer(tmp_path / "b")
    made.train()
    given.train()
    assert largest_difference(adapter(made.model), adapter(given.model)) == 0.0
    assert made.model_init is make


@pytest.mark.parametrize(
    ("optim", "cls"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ((torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5}), torch.optim.SGD),
    ],
)
def test_both_levels_have_the_optimizer_of_the_arguments(
    tmp_path: Path, optim: Any, cls: type
) -> None:
    given: dict[str, Any] = {"optim": optim} if isinstance(optim, str) else {}
    parts = {} if given else {"optimizer_cls_and_kwargs": optim}
    t = trainer(tmp_path, parts=parts, max_steps=2, outer_learning_rate=5e-2, **given)
    made: list[Any] = []
    t.add_callback(OnStep(lambda kw: made.append(kw["optimizer"].optimizer)))
    t.train()
    search = made[0]
    assert type(search.inner) is type(search.outer) is cls
    assert search.outer.param_groups[0]["initial_lr"] == 5e-2
    assert type(made[-1]) is cls
    if not given:
        assert search.outer.param_groups[0]["momentum"] == 0.5
    if optim == "adamw_torch_fused":
        assert search.inner.param_groups[0]["fused"]


def test_an_optimizer_of_the_whole_model_is_refused(tmp_path: Path) -> None:
    parts = {"optimizer_cls_and_kwargs": (dict, {})}
    with pytest.raises(ValueError, match="from the whole model"):
        trainer(tmp_path, parts=parts).train()


# -- settings --------------------------------------------------------------------------


def test_the_economical_budget_shares_out_the_steps(tmp_path: Path) -> None:
    t = trainer(
        tmp_path,
        budget="economical",
        estimator=None,
        max_steps=6,
        retrain_max_steps=None,
    )
    watch = watched(t)
    output = t.train()
    assert t.search_state is not None
    assert (t.search_state.global_step, output.global_step) == (3, 4)
    for name, value in watch.first["retrain"].items():
        assert torch.equal(value, watch.last["search"][name])  # warm


@pytest.mark.parametrize(
    ("size", "fraction"), [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (64, 0.25)]
)
def test_the_economical_budget_divides_what_can_be_divided(
    tmp_path: Path, size: int, fraction: float
) -> None:
    args = arguments(
        tmp_path,
        budget="economical",
        estimator=None,
        per_device_train_batch_size=size,
    )
    settings = args.bidora_settings()["estimator_settings"]
    assert settings == {"product_fraction": fraction}
    part = part_of(torch.arange(size), settings["product_fraction"])
    assert len(part) >= 1


def test_a_last_batch_too_small_to_divide_is_left_out(tmp_path: Path) -> None:
    # 21 rows without 4 held back: four batches of 4, and one row.
    t = trainer(
        tmp_path,
        estimator_settings={"product_fraction": 0.25},
        parts={"train_dataset": labelled(21)},
        max_steps=6,
    )
    sizes: list[int] = []
    step, kept = t.training_step, t.args.dataloader_drop_last

    def note(model: Any, inputs: Any, *args: Any) -> Any:
        sizes.append(len(inputs["labels"]))
        return step(model, inputs, *args)

    t.training_step = note  # pyright: ignore[reportAttributeAccessIssue]
    t.train()
    assert sizes[:6] == [4] * 6
    assert t.args.dataloader_drop_last is kept is False


def test_a_loader_of_other_data_is_refused(tmp_path: Path) -> None:
    class Own(BiDoRATrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)

    rows: Any = labelled(24)
    with pytest.raises(ValueError, match=r"24 examples where .* the 5 held back"):
        trainer(tmp_path, cls=Own).train()


def test_the_economical_budget_shares_out_the_epochs(tmp_path: Path) -> None:
    t = trainer(
        tmp_path,
        budget="economical",
        estimator=None,
        max_steps=-1,
        num_train_epochs=3,
        retrain_max_steps=None,
        validation_fraction=1 / 3,
        logging_strategy="no",
    )
    output = t.train()
    assert t.search_state is not None
    # 4 steps an epoch of 16 examples, 6 of all 24.
    assert (t.search_state.global_step, output.global_step) == (6, 12)


@pytest.mark.parametrize(
    ("budget", "given", "weight"),
    [("economical", None, 0.0), ("full", None, 1e-5), ("economical", 1e-3, 1e-3)],
)
def test_the_orthogonality_term_is_the_budgets(
    tmp_path: Path, budget: str, given: float | None, weight: float
) -> None:
    t = trainer(tmp_path, budget=budget, orthogonality=given, max_steps=4)
    t.train()
    assert t._plan is not None
    assert t._plan.orthogonality == weight


def test_what_is_given_goes_before_the_budget(tmp_path: Path) -> None:
    economical = partial(
        arguments,
        tmp_path,
        budget="economical",
        estimator=None,
        per_device_outer_batch_size=None,
        per_device_train_batch_size=16,
    )
    settings = economical().bidora_settings()
    assert settings["estimator"] == "darts"
    assert settings["estimator_settings"] == {"product_fraction": 0.25}
    assert (settings["outer_every"], settings["retrain"]) == (4, "warm")
    assert settings["per_device_outer_batch_size"] == 4  # 16 / 4, as the parts are

    given = economical(
        estimator_settings={}, outer_every=2, retrain="fresh"
    ).bidora_settings()
    assert given["estimator_settings"] == {}
    assert (given["outer_every"], given["retrain"]) == (2, "fresh")
    # Settings of the budget's estimator are not those of another one.
    other = economical(estimator="cg")
    assert other.bidora_settings()["estimator_settings"] == {}
    assert other.make_estimator().name == "cg"


def test_arguments_are_parsed_from_words() -> None:
    words = """
        --output_dir here --budget economical --estimator unrolled
        --estimator_settings {"num_steps":3} --outer_lr_scheduler_type cosine
        --validation_fraction 0.25 --search_patience 2 --eval_strategy steps
        --retrain warm --overwrite_earlier_run --use_cpu
    """.split()  # noqa: SIM905
    kind: Any = BiDoRATrainingArguments
    (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(words)
    assert args.make_estimator().num_steps == 3
    assert args.bidora_settings()["outer_lr_scheduler_type"] == "cosine"
    assert (args.validation_fraction, args.search_patience) == (0.25, 2)
    assert (args.budget, args.retrain) == ("economical", "warm")
    assert args.overwrite_earlier_run


@pytest.mark.parametrize("text", ["{num_steps:3}", "[3]"])
def test_settings_that_are_no_json_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no JSON of names and values"):
        arguments(tmp_path, estimator_settings=text)


def test_without_a_held_back_part_there_is_no_search(tmp_path: Path) -> None:
    t = trainer(tmp_path, validation_fraction=0.0)
    start = adapter(t.model)
    watch = watched(t)
    output = t.train()
    assert {phase for _, phase in watch.events} == {"retrain"}
    assert t.search_state is None
    assert output.global_step == 3
    for name, value in adapter(t.model).items():
        assert torch.equal(value, start[name]) == is_magnitude(name), name


def test_outer_examples_of_ones_own_leave_the_training_set_whole(
    tmp_path: Path,
) -> None:
    seen: dict[int, set[tuple[int, ...]]] = {3: set(), 4: set()}

    def keep(features: list[Any]) -> Any:
        seen[len(features)] |= {tuple(f["input_ids"]) for f in features}
        return collate(features)

    own, others = labelled(24), labelled(6, seed=5)
    parts = {"outer_dataset": others, "data_collator": keep}
    # Six steps of four are all of 24 examples; two of three are all six.
    t = trainer(tmp_path, parts=parts, max_steps=6, retrain_max_steps=6)
    t.train()
    assert seen[4] == {tuple(row) for row in own["input_ids"]}
    assert seen[3] == {tuple(row) for row in others["input_ids"]}


def test_a_short_search_is_scaled_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The usual warm-up of 10 steps would leave no outer step in 8."""
    t = trainer(tmp_path, outer_warmup_steps=None, max_steps=8)
    start = adapter(t.model)
    with caplog.at_level("WARNING", "bidora"):
        t.train()
    said = "outer_warmup_steps=10 leaves no outer step in the 8 steps of the search"
    assert said in caplog.text
    assert "they are scaled to 1 and 2, for 7 outer step(s)" in caplog.text
    assert t.search_state is not None
    lines = [e for e in t.search_state.log_history if "outer_steps" in e]
    assert lines[-1]["outer_steps"] == 7
    moved = adapter(t.model)
    assert not any(torch.equal(moved[n], start[n]) for n in moved if is_magnitude(n))


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("epochs", [1, 2.5])
def test_the_steps_of_epochs_are_those_that_the_trainer_takes(
    tmp_path: Path, accumulated: int, epochs: float
) -> None:
    t = trainer(
        tmp_path,
        max_steps=-1,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulated,
        outer_warmup_steps=None,
        retrain="none",
    )
    t.train()
    assert t._plan is not None
    assert t.state.max_steps == t._plan.steps == t.state.global_step


def flattened(features: list[Any]) -> Any:
    """One row of all examples, as for packed sequences."""
    batch = collate(features)
    kept = batch["attention_mask"].bool()
    row = batch["input_ids"][kept][None][:, :16]
    return {"input_ids": row, "labels": batch["labels"][:1]}


def test_a_batch_that_is_no_row_of_examples_is_taken_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reports: list[StepReport]
) -> None:
    ends = []
    for name, fraction in (("part", 0.25), ("whole", 1.0)):
        t = trainer(
            tmp_path / name,
            estimator_settings={"product_fraction": fraction},
            parts={"data_collator": flattened},
        )
        with caplog.at_level("WARNING", "bidora"):
            t.train()
        ends.append(adapter(t.model))
    assert largest_difference(*ends) == 0.0
    told = [r.getMessage() for r in caplog.records if "product_frac" in r.getMessage()]
    assert len(told) == 1
    assert "product_fraction=0.25 asks for a part" in told[0]
    assert "a batch of 4 examples holds tensors whose first axes are [1]" in told[0]


def test_without_a_retraining_the_search_is_the_result(tmp_path: Path) -> None:
    t = trainer(tmp_path, retrain="none", save_strategy="steps", save_steps=2)
    watch = watched(t)
    output = t.train()
    assert {phase for _, phase in watch.events} == {"search"}
    assert largest_difference(watch.last["search"], adapter(t.model)) == 0.0
    assert output.global_step == 4
    assert output.metrics["search_train_loss"] == output.metrics["train_loss"]
    again = trainer(tmp_path, retrain="none", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert largest_difference(adapter(t.model), adapter(again.model)) == 0.0


# -- what is logged --------------------------------------------------------------------


def test_every_line_names_its_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"eval_dataset": labelled(8, seed=1)}
    t = trainer(tmp_path, parts=parts, eval_strategy="steps", eval_steps=2)
    t.train()
    assert t.search_state is not None
    assert {e["phase"] for e in t.search_state.log_history} == {"search"}
    assert {e["phase"] for e in t.state.log_history} == {"retrain"}
    printed = [e for e in capsys.readouterr().out.splitlines() if e.startswith("{")]
    both = len(t.search_state.log_history) + len(t.state.log_history)
    assert len(printed) == both
    assert all(e.startswith("{'phase': '") for e in printed)
    metrics = t.evaluate()
    assert "phase" not in metrics
    assert "phase" not in t.state.log_history[-1]


class HearsStepsBack(TrainerCallback):
    """Note how far outer steps were."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int, int]] = []

    def on_steps_back(self, state: Any, done: int, of: int) -> None:
        self.heard.append((state.global_step, done, of))


@pytest.mark.parametrize(("steps", "walk"), [(4, []), (20, list(range(1, 21)))])
def test_callbacks_hear_of_a_long_walk_back(
    tmp_path: Path, steps: int, walk: list[int]
) -> None:
    t = trainer(
        tmp_path,
        estimator="unrolled",
        estimator_settings={"num_steps": steps},
        outer_every=steps,
        outer_warmup_steps=0,
        max_steps=steps,
    )
    callback = HearsStepsBack()
    t.add_callback(callback)
    t.train()
    # The outer step belongs to the last step of the search, which is not counted yet.
    assert callback.heard == [(steps - 1, done, steps) for done in walk]


# -- TensorBoard and the hub -----------------------------------------------------------


@pytest.mark.parametrize("chosen", [False, True])
def test_tensorboard_gets_a_folder_for_each_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard, of the extra test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    if chosen:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    out = tmp_path / "out"
    t = trainer(out, report_to=["tensorboard"], max_steps=2, retrain_max_steps=1)
    t.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    folders = {
        tuple(file.parent.relative_to(tmp_path).parts[:2]): file.parent
        for file in files
    }
    expected = (
        {("logs", "search"), ("logs", "retrain")}
        if chosen
        else {("out", "_search"), ("out", "runs")}
    )
    assert (folders.keys(), len(files)) == (expected, 2)
    tags = {}
    for place, folder in folders.items():
        events = EventAccumulator(str(folder))
        events.Reload()
        tags[place] = set(events.Tags()["scalars"])
    searched = min(expected, key=lambda place: "search" not in place[1])
    (retrained,) = expected - {searched}
    assert {"search/loss", "search/outer_loss"} <= tags[searched]
    assert "retrain/loss" in tags[retrained]
    assert {tag.split("/")[0] for tag in tags[searched]} == {"search"}
    assert {tag.split("/")[0] for tag in tags[retrained]} == {"retrain"}


def test_the_end_pushes_a_plain_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    calls: list[dict[str, Any]] = []

    def create_repo(self: Any, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self: Any, **kwargs: Any) -> Any:
        folder = Path(kwargs["folder_path"])
        files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        patterns = kwargs.get("ignore_patterns")
        sent = filter_repo_objects(files, ignore_patterns=patterns)
        calls.append({**kwargs, "sent": set(sent)})

        def is_done(self: Any) -> bool:
            return True

        return SimpleNamespace(done=lambda: True, is_done=is_done, result=lambda: None)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **kw: None)
    monkeypatch.chdir(tmp_path)
    t = trainer(
        "mine",
        push_to_hub=True,
        hub_strategy="end",
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
        retrain_max_steps=2,
    )
    phases: list[Any] = []
    t.add_callback(OnStep(lambda kw: phases.append((t.phase, len(calls)))))
    t.train()
    assert phases == [("search", 0)] * 2 + [("retrain", 0)] * 2
    t.push_to_hub()

    (call,) = calls
    assert call["repo_id"] == "me/mine"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= call["sent"]
    assert Path("mine/_search/checkpoint-2").is_dir()
    assert not {f for f in call["sent"] if "checkpoint-" in f}
    card = Path("mine/README.md").read_text("utf-8")
    header = card.split("---")[1]
    assert "- bidora" in header
    assert "- dora" in header
    assert "phase" not in card.lower()

    # What was pushed is loaded by PEFT alone, as it was trained, merged or not.
    base = bert().unload()
    assert isinstance(base, BertForSequenceClassification)
    loaded = PeftModel.from_pretrained(base, "mine").to(torch.float64).eval()
    rows: Any = labelled(8, seed=1)
    batch = collate(list(rows))
    with torch.no_grad():
        logits = t.model.eval()(**batch).logits
        assert (loaded(**batch).logits - logits).abs().max() < 1e-12
        merged: Any = loaded.merge_and_unload()
        # Merging rounds V = W + s B A once and the product m V / |V| again: some eps.
        assert (merged(**batch).logits - logits).abs().max() < 1e-12
    assert not os.path.exists("mine/_search/README.md")
