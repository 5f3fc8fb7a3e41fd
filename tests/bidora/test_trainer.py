"""The two phases, step by step: against loops by hand, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments, set_seed

from bidora import BiDoRAOptimizer
from bidora.dora.orthogonality import orthogonality
from bidora.trainer import BiDoRATrainer
from bidora.trainer.levels import SteppedElsewhere
from hypergrad import Accumulated, make_estimator
from hypergrad.optimizer import StepReport
from tests.bidora.tiny_trainer import (
    adapter,
    bert,
    collate,
    is_magnitude,
    labelled,
    language_model,
    largest_difference,
    next_word_loss,
    texts,
    trainer,
    watched,
)

# Two orders of the same sums differ by a few eps (2e-16) a step. AdamW's first steps
# divide a gradient by its own size, so a relative error stays a relative error of a move
# of `lr`; only entries below `adam_epsilon` (1e-8) turn it into an absolute one, of
# eps / 1e-8 times lr = 1e-2 a step. Ten steps: 10 · 1e-2 · 2e-8 = 2e-9. A forgotten
# factor or batch moves a weight by a good part of lr.
ROUNDING = 2e-9


@pytest.fixture(scope="module")
def reports() -> Iterator[list[StepReport]]:
    """Collect the report of every step that a search takes, in this module."""
    kept: list[StepReport] = []
    take_step = SteppedElsewhere.take_step

    def keep(self: Any, *given: Any) -> StepReport:
        report = take_step(self, *given)
        kept.append(report)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteppedElsewhere, "take_step", keep)
        yield kept


SETTINGS: dict[str, Any] = {
    "estimator": "unrolled",
    "estimator_settings": {"num_steps": 2},
    "max_steps": 6,
    "retrain_max_steps": 5,
    "retrain_learning_rate": 2e-2,
    "outer_learning_rate": 3e-2,
    "weight_decay": 0.1,
    "outer_weight_decay": 0.2,
    "max_grad_norm": 0.05,
    "orthogonality": 1e-2,
    "warmup_steps": 2,
    "lr_scheduler_type": "linear",
    "outer_lr_scheduler_type": "constant",
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


@pytest.fixture(scope="module")
def fresh(
    tmp_path_factory: pytest.TempPathFactory, reports: list[StepReport]
) -> SimpleNamespace:
    """Run both phases once, with as many settings away from their defaults as fit."""
    out = tmp_path_factory.mktemp("fresh")
    t = trainer(out, **SETTINGS, parts={"eval_dataset": labelled(8, seed=1)})
    start = adapter(t.model)
    watch = watched(t)
    reports.clear()
    output = t.train()
    return SimpleNamespace(
        out=out,
        trainer=t,
        start=start,
        watch=watch,
        output=output,
        reports=list(reports),
        end=adapter(t.model),
    )


def plain_batches(dataset: Any, out: Path, **settings: Any) -> Iterator[Any]:
    """Batches as transformers' own Trainer draws them, epoch by epoch."""
    args = TrainingArguments(
        str(out), per_device_train_batch_size=4, use_cpu=True, seed=3, report_to=[]
    )
    set_seed(3)
    own = Trainer(bert(), args, train_dataset=dataset, data_collator=collate)
    set_seed(3)
    loader: Any = own.get_train_dataloader()
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def outer_batches(dataset: Any, size: int, seed: int) -> Iterator[Any]:
    """Batches off one endless shuffled row of indices."""
    row: list[int] = []
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        row += torch.randperm(len(dataset), generator=generator).tolist()
        epoch += 1
        while len(row) >= size:
            taken, row = row[:size], row[size:]
            yield collate([dataset[i] for i in taken])


def groups(names: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """No decay on biases, as everywhere in transformers."""
    return [
        {
            "params": [p for n, p in names.items() if n.endswith("bias") == bias],
            "weight_decay": 0.0 if bias else decay,
        }
        for bias in (False, True)
    ]


def by_hand(model: Any, dataset: Any, out: Path) -> None:
    """Search with the bare optimizer, as `SETTINGS` says and nothing of the Trainer."""
    split = json.loads((out / "bidora_split.json").read_text())
    inner = plain_batches(dataset.select(split["inner_indices"]), out / "plain")
    outer = outer_batches(dataset.select(split["outer_indices"]), 3, seed=4)
    names = {id(p): n for n, p in model.named_parameters()}

    def level(decay: float, lr: float) -> Any:
        def make(params: list[Any]) -> AdamW:
            own = groups({names[id(p)]: p for p in params}, decay)
            return AdamW([g for g in own if g["params"]], lr=lr)

        return make

    optimizer = BiDoRAOptimizer(
        model,
        make_estimator("unrolled", num_steps=2),
        inner_optimizer=level(0.1, 1e-2),
        outer_optimizer=level(0.2, 3e-2),
        outer_every=2,
        outer_warmup=0,
        max_grad_norm=0.05,
        orthogonality=1e-2,
    )
    model.train()
    for step in range(6):
        for group in optimizer.param_groups:
            if group["level"] == "inner":
                group["lr"] = 1e-2 * linear(step, 6)
        optimizer.step(next(inner), lambda: next(outer))


def linear(step: int, steps: int, warmup: int = 2) -> float:
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


def test_the_search_takes_the_steps_of_the_bare_optimizer(
    fresh: SimpleNamespace,
) -> None:
    model = bert()
    by_hand(model, labelled(), fresh.out)
    bare = adapter(model)

    assert largest_difference(fresh.watch.last["search"], bare) < ROUNDING
    moved = {n: bare[n] - fresh.start[n] for n in bare if is_magnitude(n)}
    assert min(d.abs().max() for d in moved.values()) > 1e-2  # three steps of 3e-2


def test_the_retraining_takes_the_steps_of_plain_adamw(fresh: SimpleNamespace) -> None:
    model = fresh.trainer.model
    found = fresh.watch.first["retrain"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.copy_(found[name])
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(groups(names, 0.1), lr=2e-2)
    batches = plain_batches(labelled(), fresh.out / "plain")
    model.train()
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * linear(step, 5)
        loss = model(**next(batches)).loss + 1e-2 * orthogonality(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(names.values(), 0.05)
        optimizer.step()

    assert largest_difference(fresh.end, adapter(model)) < ROUNDING


def test_a_fresh_retraining_starts_from_the_very_first_directions(
    fresh: SimpleNamespace,
) -> None:
    first, searched = fresh.watch.first["retrain"], fresh.watch.last["search"]
    for name, value in first.items():
        expected = searched if is_magnitude(name) else fresh.start
        assert torch.equal(value, expected[name]), name
        # The search moved every one of them, so the two sources can be told apart.
        assert not torch.equal(searched[name], fresh.start[name]), name
        assert torch.equal(fresh.end[name], value) == is_magnitude(name), name


def test_magnitudes_are_trained_in_the_search_alone(fresh: SimpleNamespace) -> None:
    search, retrain = fresh.watch.trained["search"], fresh.watch.trained["retrain"]
    assert {n for n in search if is_magnitude(n)} == search - retrain
    assert retrain == {n for n in search if not is_magnitude(n)}


def test_a_warm_retraining_goes_on_from_the_search(tmp_path: Path) -> None:
    t = trainer(tmp_path, retrain="warm")
    watch = watched(t)
    t.train()
    for name, value in watch.first["retrain"].items():
        assert torch.equal(value, watch.last["search"][name]), name


# -- what is told ----------------------------------------------------------------------


def test_the_log_holds_the_means_of_the_reports(fresh: SimpleNamespace) -> None:
    lines = [e for e in fresh.trainer.search_state.log_history if "loss" in e]
    assert [e["step"] for e in lines] == [3, 6]
    outer_steps = 0
    for line, start in zip(lines, (0, 3), strict=True):
        reports = fresh.reports[start : start + 3]
        outer = [r for r in reports if r.outer_step]
        outer_steps += len(outer)

        def mean(name: str, of: list[Any]) -> float:
            return sum(getattr(r, name) for r in of) / len(of)

        # The Trainer adds losses up in float32 (eps 1.2e-7) and rounds what it tells.
        assert line["loss"] == pytest.approx(mean("inner_loss", reports), rel=1e-6)
        for name in ("outer_loss", "hypergrad_norm", "direct_norm", "indirect_norm"):
            assert line[name] == pytest.approx(mean(name, outer), rel=1e-12), name
        assert line["grad_norm"] == pytest.approx(mean("grad_norm", reports), rel=1e-12)
        share = line["indirect_norm"] / (line["direct_norm"] + line["indirect_norm"])
        assert line["indirect_share"] == pytest.approx(share, rel=1e-12)
        assert line["outer_steps"] == outer_steps
        assert line["skipped_outer_steps"] == 0
    assert outer_steps == 3  # every second of six
    assert min(e["grad_norm"] for e in lines) > 0.05  # before they were clipped to that


def test_rates_follow_the_schedule_of_each_level(fresh: SimpleNamespace) -> None:
    inner = [1e-2 * linear(step, 6) for step in range(6)]
    seen = fresh.watch.rates["search"]
    assert [rate for rate, _ in seen] == pytest.approx(inner, rel=1e-12)
    assert [rate for _, rate in seen] == [3e-2] * 6
    retrain = [2e-2 * linear(step, 5) for step in range(5)]
    assert [r for r, _ in fresh.watch.rates["retrain"]] == pytest.approx(retrain)


def test_callbacks_see_both_phases(fresh: SimpleNamespace) -> None:
    assert fresh.watch.events == [
        ("train_begin", "search"),
        ("evaluate", "search"),
        ("evaluate", "search"),
        ("train_end", "search"),
        ("train_begin", "retrain"),
        ("evaluate", "retrain"),
        ("evaluate", "retrain"),  # the last step is always evaluated
        ("train_end", "retrain"),
    ]
    assert fresh.trainer.phase is None


def test_the_output_tells_of_both_phases(fresh: SimpleNamespace) -> None:
    t, output = fresh.trainer, fresh.output
    assert (t.search_state.global_step, output.global_step) == (6, 5)
    assert t.state.global_step == 5
    inner_losses = [r.inner_loss for r in fresh.reports]
    mean = sum(inner_losses) / len(inner_losses)
    assert output.metrics["search_train_loss"] == pytest.approx(mean, rel=1e-6)
    assert output.metrics["train_loss"] == pytest.approx(output.training_loss)
    assert "outer_loss" not in {k for e in t.state.log_history for k in e}


def test_both_levels_can_share_a_schedule(tmp_path: Path) -> None:
    t = trainer(tmp_path, warmup_steps=1, outer_learning_rate=4e-2)
    watch = watched(t)
    t.train()
    factors = [linear(step, 4, warmup=1) for step in range(4)]
    inner = [rate for rate, _ in watch.rates["search"]]
    assert inner == pytest.approx([1e-2 * f for f in factors], rel=1e-12)
    outer = [rate for _, rate in watch.rates["search"]]
    assert outer == pytest.approx([4e-2 * f for f in factors], rel=1e-12)
    assert t.search_state is not None
    lines = [e for e in t.search_state.log_history if "loss" in e]
    told = [(e["learning_rate"], e["outer_learning_rate"]) for e in lines]
    # Both are those that the step of the line was taken at.
    assert [o / i for i, o in told[1:]] == pytest.approx([4.0] * 3, rel=1e-12)


def test_schedules_that_cannot_be_put_together_are_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path, outer_lr_scheduler_type="reduce_lr_on_plateau")
    with pytest.raises(ValueError, match=r"linear and .*reduce_lr_on_plateau"):
        t.train()


# -- accumulation ----------------------------------------------------------------------


class Batches:
    """A collator that keeps the number of labels of each batch that it makes."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, features: list[Any]) -> Any:
        batch = collate(features)
        self.counts.append(int((batch["labels"][..., 1:] != -100).sum()))
        return batch


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * next_word_loss(outputs.logits, labels, num_items_in_batch)


@pytest.mark.parametrize("loss", [None, own_loss])
def test_two_batches_of_four_make_the_steps_of_one_of_eight(
    tmp_path: Path, loss: Any, reports: list[StepReport]
) -> None:
    """With unequal numbers of labels, a mean of means would be another loss."""
    ends = []
    for accumulated in (2, 1):
        counting = Batches()
        parts: dict[str, Any] = {
            "train_dataset": texts(),
            "data_collator": counting,
            "compute_loss_func": loss,
        }
        reports.clear()
        t = trainer(
            tmp_path / str(accumulated),
            model=language_model(),
            parts=parts,
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=8 // accumulated,
            validation_fraction=1 / 3,
            outer_every=2,
        )
        watch = watched(t)
        t.train()
        ends.append((watch.last["search"], adapter(t.model), list(reports)))
        assert len(set(counting.counts)) > 3
    (search, end, one), (other_search, other_end, other) = ends
    assert largest_difference(search, other_search) < ROUNDING
    assert largest_difference(end, other_end) < ROUNDING
    for a, b in zip(one, other, strict=True):
        assert a.inner_loss == pytest.approx(b.inner_loss, rel=1e-12)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-10)
    assert [r.outer_step for r in one] == [False, True, False, True]


def test_a_mean_loss_of_ones_own_is_averaged_over_the_step(tmp_path: Path) -> None:
    """`loss_is_scaled_for_ga=False`: the Trainer divides by the number of batches."""

    class Mean(BiDoRATrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(
            self, model: Any, inputs: Any, *args: Any, **kwargs: Any
        ) -> Any:
            return model(**inputs).loss

    counts = Batches()
    t = trainer(
        tmp_path,
        cls=Mean,
        model=language_model(),
        parts={"train_dataset": texts(), "data_collator": counts},
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
    )
    kept: list[Any] = []
    take_step = SteppedElsewhere.take_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SteppedElsewhere,
            "take_step",
            lambda self, inner, *other: (
                kept.append(inner) or take_step(self, inner, *other)
            ),
        )
        t.train()
    (step,) = kept
    assert isinstance(step, Accumulated)
    assert [m.weight for m in step] == [0.5, 0.5]


def test_part_of_each_micro_batch_serves_the_mixed_product(tmp_path: Path) -> None:
    """Batches whose second half repeats the first have the products of that half."""

    def twice(features: list[Any]) -> Any:
        half = features[: (len(features) + 1) // 2]
        return collate(half + half)

    ends = []
    for fraction in (1.0, 0.5):
        t = trainer(
            tmp_path / str(fraction),
            model=language_model(),
            parts={"train_dataset": texts(), "data_collator": twice},
            estimator_settings={"product_fraction": fraction},
            dataloader_drop_last=True,  # as the search does for a fraction anyway
            gradient_accumulation_steps=2,
            learning_rate=0.3,  # the indirect term has this factor
            max_grad_norm=0.0,
        )
        t.train()
        assert t.search_state is not None
        ends.append((adapter(t.model), t.search_state.log_history))
    assert largest_difference(ends[0][0], ends[1][0]) < 30 * ROUNDING  # lr is 30 times
    assert max(e.get("indirect_share", 0.0) for e in ends[0][1]) > 1e-3
