"""Pooling: against loops by hand, over every kind of body, and as models ask for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
)

from bidora.errors import UserError
from bidora.models import find_model
from bidora.pooling import PooledModel, own_pooling, pool
from bidora.tasks.base import Schema
from tests.tolerances import error, tol

pytestmark = [
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

POOLINGS = ("mean", "first", "last", "max")
CLASSES = Schema("classification", {"text_column": "text"}, ("a", "b"), "accuracy")
WIDTH = 16

# -- one vector a sequence ------------------------------------------------------------


def by_hand(rows: list[list[float]], how: str) -> list[float]:
    """Pool the tokens of one sequence, coordinate by coordinate."""
    if how in ("first", "last"):
        return rows[0 if how == "first" else -1]
    coordinates = [[row[i] for row in rows] for i in range(len(rows[0]))]
    return [max(c) if how == "max" else sum(c) / len(c) for c in coordinates]


def masked(lengths: list[int], tokens: int, side: str) -> Tensor:
    rows = [[1] * n + [0] * (tokens - n) for n in lengths]
    return torch.tensor([row if side == "right" else row[::-1] for row in rows])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", POOLINGS)
def test_pool_is_that_of_a_loop(how: str, side: str) -> None:
    # Below zero: padding must not count as a maximum of 0.
    states = torch.randn(3, 5, 4, dtype=torch.float64) - 3
    mask = masked([5, 3, 1], 5, side)
    truth = [
        by_hand([r for r, kept in zip(row, keeps, strict=True) if kept], how)
        for row, keeps in zip(states.tolist(), mask.tolist(), strict=True)
    ]
    wanted = torch.tensor(truth, dtype=torch.float64)
    for given in (mask, mask.bool(), mask.double()):
        assert error(pool(states, given, how), wanted) <= tol(torch.float64)
    poisoned = states.masked_fill(mask.unsqueeze(-1) == 0, 1e6)
    assert error(pool(poisoned, mask, how), wanted) <= tol(torch.float64)


@pytest.mark.parametrize("how", POOLINGS)
def test_without_a_mask_all_tokens_count(how: str) -> None:
    states = torch.randn(2, 3, 4)
    assert torch.equal(pool(states, None, how), pool(states, torch.ones(2, 3), how))


@pytest.mark.parametrize("how", POOLINGS)
def test_padding_alone_is_finite(how: str) -> None:
    found = pool(torch.randn(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 0]]), how)
    assert found.isfinite().all()
    if how in ("mean", "max"):
        assert not found[0].any()


@pytest.mark.parametrize("how", POOLINGS)
def test_bfloat16_is_kept_and_finds_places_above_256(how: str) -> None:
    """Of the whole numbers above 256, bfloat16 has every second one alone."""
    states = torch.full((1, 700, 1), -2.0, dtype=torch.bfloat16)
    mask = torch.zeros(1, 700, dtype=torch.long)
    mask[0, 301:452] = 1
    states[0, 301], states[0, 451] = 3.0, 5.0
    found = pool(states, mask, how)
    assert found.dtype is torch.bfloat16
    truth = {"mean": (3 + 5 - 2 * 149) / 151, "first": 3.0, "last": 5.0, "max": 5.0}
    wanted = torch.tensor([[truth[how]]], dtype=torch.float64)
    assert error(found, wanted) <= (tol(torch.bfloat16) if how == "mean" else 0)


def test_another_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sum'; choose mean, first, last, max"):
        pool(torch.zeros(1, 1, 1), None, "sum")


# -- the model ------------------------------------------------------------------------

BODIES: dict[str, dict[str, Any]] = {
    "bert": {"num_attention_heads": 2, "intermediate_size": 32},
    "roberta": {"num_attention_heads": 2, "intermediate_size": 32},
    "distilbert": {"dim": WIDTH, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "modernbert": {"num_attention_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "llama": {"num_attention_heads": 2, "intermediate_size": 32},
}


def config_of(kind: str, **given: Any) -> Any:
    sizes = dict(BODIES[kind])
    if "dim" not in sizes and "n_embd" not in sizes:
        sizes |= {"hidden_size": WIDTH, "num_hidden_layers": 1}
        sizes |= {"max_position_embeddings": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "modernbert":
        tokens |= {"cls_token_id": 1, "sep_token_id": 2}
    pooled = {"num_labels": 3, "pooling": "mean", **given}
    return AutoConfig.for_model(kind, vocab_size=40, **sizes, **tokens, **pooled)


def batch_of(side: str = "right", rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (rows, 8))
    mask = masked([8, 5, 3, 1][:rows], 8, side)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", BODIES)
def test_outputs_are_those_of_a_linear_layer_on_the_mean(kind: str) -> None:
    config = config_of(kind)
    body = AutoModel.from_config(config).eval()
    kept = {name: value.clone() for name, value in body.state_dict().items()}
    model = PooledModel(config, body).eval()
    for name, value in body.state_dict().items():
        assert torch.equal(value, kept[name]), name  # it was loaded, not made anew
    batch = batch_of()
    with torch.no_grad():
        states = body(**batch).last_hidden_state.double()
        found = model(**batch).logits
    weights = batch["attention_mask"].double()
    mean = torch.einsum("bt,btw->bw", weights, states) / weights.sum(1, keepdim=True)
    truth = mean @ model.head.weight.double().T + model.head.bias.double()
    # The mean of eight states may cancel; its terms are no larger than the largest.
    sizes = states.norm(dim=-1).max() * model.head.weight.norm().double()
    cond = (sizes / truth.norm(dim=-1).min()).item()
    assert error(found, truth) <= tol(torch.float32, cond=max(1.0, cond))


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_learn_with_the_usual_adapter(kind: str) -> None:
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL,
    )

    torch.manual_seed(0)
    adapter = LoraConfig(
        r=4,
        task_type="SEQ_CLS",
        modules_to_save=["head"],
        target_modules=None if kind in USUAL else "all-linear",
    )
    model = get_peft_model(PooledModel(config_of(kind)), adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    batch, losses = {**batch_of(), "labels": torch.tensor([0, 1, 2, 1])}, []
    model.eval()  # the same loss in every step
    for _ in range(12):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("kind", "labels", "outputs"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 1]), 3),
        ("regression", torch.tensor([0.5, -1.0, 2.0, 0.0]), 1),
        ("multi_label_classification", torch.eye(4, 3), 3),
    ],
)
def test_loss_is_that_of_torch(kind: str, labels: Tensor, outputs: int) -> None:
    config = config_of("bert", num_labels=outputs, problem_type=kind)
    found = PooledModel(config).eval()(**batch_of(), labels=labels)
    losses: dict[str, Any] = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "regression": torch.nn.functional.mse_loss,
        "multi_label_classification": (
            torch.nn.functional.binary_cross_entropy_with_logits
        ),
    }
    logits = found.logits.squeeze(-1) if outputs == 1 else found.logits
    assert torch.equal(found.loss, losses[kind](logits, labels))


def test_a_trainer_averages_the_loss_of_accumulated_batches() -> None:
    """It counts examples, and passes the count on, where a model asks for it."""
    assert PooledModel(config_of("bert")).accepts_loss_kwargs is False


def test_the_head_has_dropout_in_training_alone() -> None:
    model = PooledModel(config_of("bert", classifier_dropout=0.5))
    assert model.dropout.p == 0.5
    batch = batch_of()
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.body.eval()
    model.dropout.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    model = PooledModel(config_of(kind, pooling="last")).eval()
    model.save_pretrained(tmp_path)
    loaded = PooledModel.from_pretrained(tmp_path)
    assert loaded.config.pooling == "last"
    assert type(loaded.body) is type(model.body)
    batch = batch_of()
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


def test_gradients_do_not_change_under_checkpointing() -> None:
    model = PooledModel(config_of("bert", hidden_dropout_prob=0.0)).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    batch = {**batch_of(), "labels": torch.tensor([0, 1, 2, 1])}
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        named = model.named_parameters()
        grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    assert error(grads[1], grads[0]) <= tol(torch.float64)


# -- what a model says of itself ----------------------------------------------------


def says(folder: Path, config: Any, modules: Any = None) -> Path:
    """Write what sentence-transformers writes beside a model."""
    folder.mkdir(exist_ok=True, parents=True)
    kind = "sentence_transformers.models"
    usual = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
    ]
    chosen = usual if modules is None else modules
    (folder / "modules.json").write_text(
        chosen if isinstance(chosen, str) else json.dumps(chosen)
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return folder


def flags(*on: str) -> dict[str, Any]:
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    known = {f"pooling_mode_{n}": n in on for n in (*names, "mean_sqrt_len_tokens")}
    return {"word_embedding_dimension": 16, **known}


@pytest.mark.parametrize(
    ("config", "how"),
    [
        (flags("mean_tokens"), "mean"),
        (flags("cls_token"), "first"),
        (flags("max_tokens"), "max"),
        (flags("lasttoken"), "last"),
        (flags("mean_sqrt_len_tokens"), None),
        (flags("mean_tokens", "max_tokens"), None),  # concatenated
        (flags(), None),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "weightedmean"}, None),
        ({}, None),
    ],
)
def test_what_a_sentence_encoder_says(
    tmp_path: Path, config: dict[str, Any], how: str | None
) -> None:
    assert own_pooling(str(says(tmp_path, config)), is_local=True) == how


def test_the_bundled_encoder_is_pooled_by_the_mean() -> None:
    source = find_model()
    assert own_pooling(source.location, is_local=True) == "mean"


def test_others_say_nothing(tmp_path: Path) -> None:
    assert own_pooling(str(tmp_path), is_local=True) is None
    transformer = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    says(tmp_path, flags("mean_tokens"), transformer)
    assert own_pooling(str(tmp_path), is_local=True) is None


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ('{"pooling_mode_mean', None),
        ([1], None),
        ({}, "[{"),
        ({}, {"path": "1_Pooling"}),
        ({}, [{"idx": 1}]),
    ],
)
def test_torn_settings_name_the_option(
    tmp_path: Path, config: Any, modules: Any
) -> None:
    says(tmp_path, config, modules)
    with pytest.raises(UserError, match=r"cannot be read .*--pooling: head, mean"):
        own_pooling(str(tmp_path), is_local=True)
