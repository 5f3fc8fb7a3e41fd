"""The probe: what it reads, what it leaves as it was, and where training starts."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bidora
from bidora.errors import UserError
from bidora.pooling import PooledModel
from bidora.probing import (
    LinearFit,
    extract,
    features,
    fit_linear,
    probe,
    set_head,
)
from tests.bidora.stopped_runs import (
    Kill,
    Killed,
    Sentences,
    collate,
    differences,
    make_model,
    make_trainer,
    outcome,
)
from tests.bidora.test_probe_fit import enlarged, logits_of
from tests.tolerances import error, tol

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings(
        # transformers' own, raised when PEFT reads its model
        "ignore:`is_gradient_checkpointing`:FutureWarning",
        "ignore::hypergrad.errors.NumericalWarning",
        "ignore::FutureWarning:sklearn",
    ),
]

# -- what the last layer reads -------------------------------------------------------


def bert(cls: Any = BertForSequenceClassification, labels: int = 2) -> Any:
    torch.manual_seed(7)
    head: dict[str, Any] = {"num_labels": labels}
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        initializer_range=0.5,
        **head,
    )
    return cls(config).eval()


def gpt2() -> Any:
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).eval()


def on_the_left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    for row in range(len(rows)):
        shift = int((batch["attention_mask"][row] == 0).sum())
        for name in ("input_ids", "attention_mask"):
            batch[name][row] = batch[name][row].roll(shift)
    return batch


def alone(data: Any, index: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([data[index]["input_ids"]])}


def close(found: np.ndarray, truth: Tensor) -> bool:
    """Rows in a padded batch and rows alone: the same but for float32's rounding."""
    return error(torch.tensor(found), truth.double()) <= tol(torch.float32, cond=10)


@torch.no_grad()
def test_of_bert_it_is_what_the_pooler_gives() -> None:
    model, data = bert(), Sentences(40)  # more than a batch
    found, layer = extract(model, data, collate)
    assert layer is model.classifier
    truth = [model.bert(**alone(data, i)).pooler_output[0] for i in range(40)]
    assert found.values.dtype == np.float64
    assert close(found.values, torch.stack(truth))
    assert found.targets.tolist() == data.labels  # in the order of the examples
    assert found.groups.tolist() == list(range(40))
    assert (found.kind, found.outputs, found.has_bias) == ("classes", 2, True)


@torch.no_grad()
def test_of_a_pooled_model_it_is_the_mean() -> None:
    model, data = PooledModel(bert().config), Sentences(40)
    model.config.pooling = "mean"
    model.eval()
    found, layer = extract(model, data, collate)
    assert layer is model.head
    truth = [model.body(**alone(data, i))[0][0].mean(0) for i in range(40)]
    assert close(found.values, torch.stack(truth))


@torch.no_grad()
def test_of_a_peft_model_it_is_what_the_trained_copy_reads() -> None:
    model = make_model()
    found, layer = extract(model, Sentences(10), collate)
    assert layer is model.base_model.model.classifier.modules_to_save["default"]
    assert layer.weight.requires_grad
    assert found.values.shape == (10, 8)


@torch.no_grad()
@pytest.mark.parametrize("head", ["usual", "zero"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_decoder_it_is_the_last_token(side: str, head: str) -> None:
    """Where the head is 0, all tokens have the same logits, and one was chosen."""
    model, data = gpt2(), Sentences(40)
    if head == "zero":
        model.score.weight.zero_()
    collator = collate if side == "right" else on_the_left
    found, layer = extract(model, data, collator)
    assert layer is model.score
    assert not found.has_bias
    batch = collator([data[i] for i in range(40)])
    del batch["labels"]
    states = model.transformer(**batch).last_hidden_state
    lengths = [len(row) for row in data.rows]
    places = [n - 1 if side == "right" else states.shape[1] - 1 for n in lengths]
    truth = torch.stack([states[i, place] for i, place in enumerate(places)])
    assert close(found.values, truth)


@torch.no_grad()
def test_a_layer_without_a_bias_gives_what_was_fitted() -> None:
    model, data = gpt2(), Sentences(40)
    found = probe(model, data, collator=collate)
    batch = collate([data[i] for i in range(40)])
    del batch["labels"]
    truth = torch.tensor(logits_of(found.fit, found.features.values))
    cond = enlarged(found.fit, found.features.values)
    # Batches of 32 here and of 40 there, in float32; the layer itself rounds once more.
    assert error(model(**batch).logits, truth) <= tol(torch.float32, 2 * cond)


class Tagged(Sentences):
    """A tag for each second token; the others have none."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        tags = [-100 if i % 2 else int(t > 10) for i, t in enumerate(row)]
        return {"input_ids": row, "labels": tags}


def collate_tags(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = collate([{**row, "labels": 0} for row in rows])
    tags = torch.full_like(batch["input_ids"], -100)
    for row, given in zip(tags, rows, strict=True):
        row[: len(given["labels"])] = torch.tensor(given["labels"])
    return {**batch, "labels": tags}


@torch.no_grad()
def test_of_tags_it_is_the_tokens_that_have_one() -> None:
    model, data = bert(BertForTokenClassification), Tagged(40)
    found, layer = extract(model, data, collate_tags)
    assert layer is model.classifier
    truth = [model.bert(**alone(data, i))[0][0][::2] for i in range(40)]
    assert close(found.values, torch.cat(truth))
    assert found.targets.tolist() == [int(t > 10) for r in data.rows for t in r[::2]]
    assert found.groups.tolist() == [i for i, r in enumerate(data.rows) for _ in r[::2]]
    assert found.kind == "classes"


def test_of_too_many_tags_some_sentences_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "MOST_TOKENS", 100)
    model, data = bert(BertForTokenClassification), Tagged(100)
    found, _ = extract(model, data, collate_tags)
    sentences = sorted(set(found.groups.tolist()))
    assert 32 <= len(sentences) < 100
    assert sentences != list(range(len(sentences)))
    assert 100 < len(found.targets) < sum(len(r[::2]) for r in data.rows)


@pytest.mark.parametrize(
    ("labels", "outputs", "kind"),
    [
        ([0.5, -1.0], 1, "numbers"),
        ([[0.5, 1.0], [0.0, 1.0]], 2, "numbers"),
        ([[0.0, 1.0], [1.0, 1.0]], 2, "labels"),
        ([[0, 1], [1, 1]], 2, "labels"),
        ([1, 0], 2, "classes"),
    ],
)
def test_the_kind_follows_the_labels(labels: Any, outputs: int, kind: str) -> None:
    rows = [{"input_ids": [3, 4], "labels": x} for x in labels]
    found, _ = extract(bert(labels=outputs), rows, collate)
    assert found.kind == kind
    assert found.targets.shape == np.array(labels).shape


class Scaled(BertForSequenceClassification):
    """A model whose outputs are not those of its last layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = super().forward(*args, **kwargs)
        found.logits = found.logits / 3
        return found


def test_what_has_no_linear_head_is_refused() -> None:
    with pytest.raises(UserError, match=r"outputs of Scaled .* --start random"):
        probe(bert(Scaled), Sentences(4), collator=collate)


def test_examples_without_labels_are_refused() -> None:
    rows = [{"input_ids": [3, 4]}] * 3

    def unlabelled(rows: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([r["input_ids"] for r in rows])}

    with pytest.raises(UserError, match="no labels"):
        probe(bert(), rows, collator=unlabelled)
    with pytest.raises(UserError, match="no examples"):
        probe(bert(), [], collator=collate)
    with pytest.raises(UserError, match="needs dataset= and collator="):
        probe(bert(), Sentences(3))


# -- nothing else changes -------------------------------------------------------------


def state_of(model: Any) -> dict[str, Any]:
    return {
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) for n, m in model.named_modules()},
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "trained": {n: p.requires_grad for n, p in model.named_parameters()},
        "torch": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
    }


def half_trained() -> Any:
    """Return a model with dropout and a BatchNorm in front of its head, in mixed modes."""
    model = make_model(norm=True, adapter="none").train()
    model.bert.encoder.eval()
    model.bert.embeddings.requires_grad_(False)
    for parameter in model.bert.encoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_all_but_the_head_is_as_before() -> None:
    model = half_trained()
    before = state_of(model)
    probe(model, Sentences(40), collator=collate)
    changed = differences(before, state_of(model))
    assert len(changed) == 2
    for line, name in zip(changed, ("weight", "bias"), strict=True):
        assert line.startswith(f"/values/classifier.1.{name}:")


@pytest.mark.parametrize("batch", [0, 1])
def test_all_is_as_before_where_the_collator_raises(batch: int) -> None:
    calls: list[int] = []

    def raises(rows: list[Any]) -> dict[str, Tensor]:
        calls.append(len(rows))
        if len(calls) > batch:
            raise RuntimeError("torn row")
        return collate(rows)

    model = half_trained()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="torn row"):
        probe(model, Sentences(40), collator=raises)
    assert not differences(before, state_of(model))


def test_a_head_in_low_precision_is_rounded_to_it() -> None:
    layer = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    set_head(layer, LinearFit(np.array([[0.1, 3.0]]), np.array([7.0]), 1.0))
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer.weight, torch.tensor([[0.1, 3.0]]).bfloat16())


# -- a head that is not the model's alone, or is not saved ----------------------------


def adapted(**config: Any) -> Any:
    """Return a BERT with an adapter, of which PEFT knows no task."""
    return get_peft_model(bert(), LoraConfig(target_modules=["query"], **config))


def test_a_head_that_is_not_saved_with_the_adapter_is_warned_of(
    recwarn: pytest.WarningsRecorder,
) -> None:
    said = (
        r"the head classifier, which is frozen.* Add modules_to_save=\['classifier'\]"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        probe(adapted(), Sentences(10), collator=collate)
    assert [w.filename for w in caught if "frozen" in str(w.message)] == [__file__]
    native = make_model(adapter="transformers")
    native.classifier.requires_grad_(False)
    with pytest.warns(UserWarning, match=said):
        probe(native, Sentences(10), collator=collate)
    recwarn.clear()
    native.classifier.requires_grad_(True)  # which a Trainer of ours saves
    loaded = adapted(modules_to_save=["classifier"], inference_mode=True)
    for model in (
        adapted(modules_to_save=["classifier"]),
        adapted(task_type="SEQ_CLS"),
        loaded,
        native,
        bert().requires_grad_(False),
    ):
        probe(model, Sentences(10), collator=collate)
    assert not [w for w in recwarn if "frozen" in str(w.message)]


class Tied(BertForTokenClassification):
    """A model whose head has the weight of its input embeddings."""

    def __init__(self, config: Any) -> None:
        config.num_labels = config.vocab_size
        super().__init__(config)
        self.classifier.weight = self.bert.embeddings.word_embeddings.weight


def test_a_head_that_shares_its_weight_is_refused() -> None:
    model = bert(Tied)
    before = state_of(model)
    said = (
        "head classifier shares its weight with bert.embeddings.word_embeddings, which "
        "would change too.* a head of its own"
    )
    with pytest.raises(UserError, match=said):
        probe(model, Tagged(10), collator=collate_tags)
    assert not differences(before, state_of(model))


# -- with a Trainer ---------------------------------------------------------------------


def head_of(model: Any) -> Tensor:
    """Return weight and bias of the head that is trained."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    copies: Any = getattr(inner.classifier, "modules_to_save", None)
    layer = inner.classifier if copies is None else copies["default"]
    return torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().clone()


def fitted(model: Any, data: Any, collator: Callable[..., Any] = collate) -> Tensor:
    """Return the head that a fit on these examples gives."""
    fit = fit_linear(extract(model, data, collator)[0])
    both = np.concatenate([fit.weight, fit.bias[:, None]], axis=1)
    return torch.tensor(both, dtype=torch.float32)


class Begins(TrainerCallback):
    """Keep the model as it is before the first step of each phase, and at its end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.first: dict[str, Any] = {}
        self.last: dict[str, Tensor] = {}
        trainer.add_callback(self)

    @property
    def phase(self) -> str:
        return getattr(self.trainer, "phase", "train")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.first[self.phase] = copy.deepcopy(self.trainer.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last[self.phase] = head_of(self.trainer.model)


def test_a_plain_trainer_starts_from_the_probe(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = Sentences(30)
    trainer = Trainer(bert(), args, train_dataset=data, data_collator=collate)
    found = bidora.probe(trainer)
    assert found.features.values.shape == (30, 8)
    seen = Begins(trainer)
    trainer.train()
    assert torch.equal(head_of(seen.first["train"]), fitted(bert(), data))
    assert not torch.equal(seen.last["train"], head_of(seen.first["train"]))


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    """As the Trainer leaves them out; a script keeps its texts beside their tokens."""

    class Wide(Sentences):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "text": "some words", "idx": index}

    def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(row) == {"input_ids", "labels"} for row in rows)
        return collate(rows)

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(bert(), args, train_dataset=Wide(9), data_collator=pad)
    truth = fitted(bert(), Sentences(9))
    bidora.probe(trainer)
    assert torch.equal(head_of(trainer.model), truth)


def test_a_stream_is_refused(tmp_path: Path) -> None:
    stream = Dataset.from_dict(
        {"input_ids": [[3]], "labels": [0]}
    ).to_iterable_dataset()
    given: tuple[Any, ...] = (stream, None)
    for data in given:
        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
        trainer = Trainer(bert(), args, train_dataset=data, data_collator=collate)
        with pytest.raises(UserError, match=r"counted and looked up, .* dataset="):
            bidora.probe(trainer)


INNER, OUTER = list(range(24)), list(range(24, 30))
NO_FILES = {"save_strategy": "no", "max_steps": 2, "retrain_max_steps": 2}


def trained(folder: Path, data: Any, **given: Any) -> Begins:
    parts = {"split": (INNER, OUTER)}
    trainer = make_trainer(folder, data=data, parts=parts, **NO_FILES, **given)
    probe(trainer)
    probe(trainer)  # once more does no harm
    seen = Begins(trainer)
    trainer.train()
    return seen


def test_a_search_has_not_seen_what_is_held_back(tmp_path: Path) -> None:
    data, other = Sentences(30), Sentences(30)
    for row in OUTER:
        other.labels[row] = 1 - other.labels[row]
    one, two = (trained(tmp_path / n, d) for n, d in (("1", data), ("2", other)))
    inner = torch.utils.data.Subset(data, INNER)
    truth = fitted(make_model(), inner)
    assert torch.equal(head_of(one.first["search"]), truth)
    assert torch.equal(head_of(two.first["search"]), truth)
    assert not torch.equal(truth, fitted(make_model(), data))
    # A fresh retraining learns on all examples, with the magnitudes of the search.
    for seen, examples in ((one, data), (two, other)):
        first = head_of(seen.first["retrain"])
        assert torch.equal(first, fitted(seen.first["retrain"], examples))
    assert not torch.equal(head_of(one.first["retrain"]), head_of(two.first["retrain"]))


def test_a_warm_retraining_keeps_the_head_of_the_search(tmp_path: Path) -> None:
    seen = trained(tmp_path, Sentences(30), retrain="warm")
    assert torch.equal(head_of(seen.first["retrain"]), seen.last["search"])


@pytest.mark.parametrize(("phase", "step"), [("search", 3), ("retrain", 2)])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(
    tmp_path: Path, phase: str, step: int
) -> None:
    whole = make_trainer(tmp_path / "whole")
    probe(whole)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped")
    probe(stopped)
    Kill(stopped, phase, step)
    with pytest.raises(Killed):
        stopped.train()
    again = make_trainer(tmp_path / "stopped")
    probe(again)
    again.train(resume_from_checkpoint=True)
    assert not differences(outcome(whole), outcome(again))
