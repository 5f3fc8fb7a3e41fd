"""Pooling: against loops by hand, over every kind of body, and as models ask for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)

from bidora.errors import UserError
from bidora.methods import make_method
from bidora.models import Base, find_model, load_base, load_tokenizer
from bidora.pooling import PooledModel, own_pooling, pool
from bidora.runs.predict import load_run, predict
from bidora.runs.settings import TrainSettings
from bidora.tasks.base import Schema
from bidora.tasks.registry import make_task
from tests.bidora.conftest import finish
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


# -- from --pooling to a model -------------------------------------------------------


def encoder(tiny_encoder: Path, folder: Path, config: Any = None) -> Path:
    """Return a copy of the tiny encoder that says how it is pooled."""
    shutil.copytree(tiny_encoder, folder, dirs_exist_ok=True)
    return says(folder, flags("mean_tokens") if config is None else config)


def decoder(tiny_encoder: Path, folder: Path, kind: str) -> Path:
    """Return the folder of a decoder with the tiny encoder's words."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2Model(
            GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=24)
        )
    else:
        model = LlamaModel(
            LlamaConfig(
                vocab_size=17,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=24,
                initializer_range=0.3,
            )
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


def base_of(folder: Path, **given: Any) -> Base:
    source = find_model(str(folder))
    return load_base(
        source, load_tokenizer(source), make_task("classification"), CLASSES, **given
    )


def test_auto_is_what_the_model_says(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = encoder(tiny_encoder, tmp_path, {"pooling_mode": "max"})
    base = base_of(folder)
    assert isinstance(base.model, PooledModel)
    assert (base.pooling, base.model.config.pooling) == ("max", "max")
    assert base.head == ["head"]
    assert base.model.body.pooler is None  # nothing would train or read it
    assert "head" not in base.adaptable()
    loaded: Any = AutoModel.from_pretrained(folder)
    for name, value in base.model.body.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert base_of(folder, pooling="first").model.config.pooling == "first"
    assert base_of(tiny_encoder).pooling == "head"  # which says nothing


def test_head_is_the_stock_class(tiny_encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder(tiny_encoder, tmp_path), pooling="head")
    assert type(base.model) is BertForSequenceClassification
    assert base.head == ["classifier"]


def test_the_bundled_encoder_with_its_stock_head() -> None:
    source = find_model()
    tokenizer, task = load_tokenizer(source), make_task("classification")
    stock = load_base(source, tokenizer, task, CLASSES, pooling="head")
    assert type(stock.model) is BertForSequenceClassification


def test_the_head_depends_on_the_seed_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = encoder(tiny_encoder, tmp_path)
    heads = []
    for seed, how in ((0, "mean"), (0, "max"), (1, "mean")):
        torch.rand(3)
        heads.append(base_of(folder, seed=seed, pooling=how).model.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_what_cannot_be_pooled_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
    }
    T5Model(T5Config(vocab_size=17, **sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--pooling mean: .* an encoder and a decoder"):
        base_of(tmp_path, pooling="mean")
    # A sentence encoder made of a T5 says that it is pooled; its stock head still fits.
    says(tmp_path, flags("mean_tokens"))
    assert base_of(tmp_path).pooling == "head"
    source = find_model(str(tiny_encoder))
    tags = Schema("tagging", {}, ("O", "B-X"), "f1")
    with pytest.raises(UserError, match=r"--pooling mean makes one vector .* tagging"):
        load_base(
            source, load_tokenizer(source), make_task("tagging"), tags, pooling="mean"
        )


def test_a_model_that_was_saved_whole_is_a_base_again(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """Its body counts, whose names in the file are not those of the body alone."""
    first = base_of(encoder(tiny_encoder, tmp_path / "first", {"pooling_mode": "max"}))
    torch.nn.init.normal_(first.model.body.embeddings.word_embeddings.weight)
    second = tmp_path / "second"
    first.model.save_pretrained(second)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(second)
    for how, found in (("auto", "max"), ("mean", "mean")):
        again = base_of(second, pooling=how)
        assert again.pooling == found
        assert again.head == ["head"]
        for name, value in first.model.body.state_dict().items():
            assert torch.equal(again.model.body.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"--pooling head .* does not read"):
        base_of(second, pooling="head")


# -- saved, and loaded by the lines on the card ----------------------------------------


def saved_and_loaded(
    method_name: str, folder: Path, base_folder: Path, how: str
) -> Any:
    """Return a changed model, and what the card's lines and `load_run` load of it."""
    given: dict[str, Any] = {"model": str(base_folder), "method": method_name}
    settings = TrainSettings(**given, pooling=how, output_dir=str(folder))
    base, method = base_of(base_folder, pooling=how), make_method(method_name)
    model: Any = method.adapt(base, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    method.save(model, folder)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    names = {"folder": str(folder), "base": str(base_folder), "pooling": how}
    code = method.loading_code({**names, "auto_model": "AutoModel"})
    lines: dict[str, Any] = {}
    (folder / "settings.json").write_text(json.dumps(settings.as_dict()))
    (folder / "task.json").write_text(json.dumps(CLASSES.to_dict()))
    (folder / "metrics.json").write_text("{}")
    exec(code, lines)
    assert not lines["model"].training
    return model.eval(), lines["model"], load_run(folder)[0]


def compare_outputs(model: Any, by_the_card: Any, by_us: Any) -> None:
    for side in ("right", "left"):
        ids = torch.randint(3, 17, (4, 8))
        mask = masked([8, 5, 3, 1], 8, side)
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        for loaded in (by_the_card, by_us):
            with torch.no_grad():
                truth, found = model(**batch).logits, loaded(**batch).logits
            # Heads are drawn small here: what they read does not cancel by much.
            assert error(found, truth) <= tol(torch.float32, cond=10)


@pytest.mark.parametrize("method", ["lora", "dora", "full", "probe", "houlsby"])
def test_every_method_is_loaded_by_the_card(
    tiny_encoder: Path, tmp_path: Path, method: str
) -> None:
    folder = encoder(tiny_encoder, tmp_path / "base")
    compare_outputs(*saved_and_loaded(method, tmp_path / "run", folder, "mean"))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("how", ["first", "last", "max"])
def test_every_pooling_is_loaded_by_the_card(
    tiny_encoder: Path, tmp_path: Path, how: str, method: str
) -> None:
    folder = encoder(tiny_encoder, tmp_path / "base")
    compare_outputs(*saved_and_loaded(method, tmp_path / "run", folder, how))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["mean", "last"])
def test_pooled_decoders_are_loaded_by_the_card(
    tiny_encoder: Path, tmp_path: Path, kind: str, how: str
) -> None:
    folder = decoder(tiny_encoder, tmp_path / "base", kind)
    compare_outputs(*saved_and_loaded("lora", tmp_path / "run", folder, how))


def test_new_rows_are_scored_as_by_the_model(
    tiny_encoder: Path, tmp_path: Path, small_job: dict[str, Any]
) -> None:
    folder = encoder(tiny_encoder, tmp_path / "base")
    given = {**small_job, "model": str(folder), "method": "lora", "max_steps": 4}
    run = finish(**given, output_dir=str(tmp_path / "run"))
    assert run.read("settings.json")["pooling"] == "mean"
    assert isinstance(run.job.model.get_base_model(), PooledModel)
    rows = run.job.examples.rows["test"].columns["text"]
    file, output = tmp_path / "new.csv", tmp_path / "out.jsonl"
    file.write_text("text\n" + "\n".join(rows) + "\n")
    predict(run.folder, file, output)
    said = [json.loads(line) for line in output.read_text().splitlines()]
    truth = run.logits().double().softmax(-1)
    found = torch.tensor(
        [[line[f"p({name})"] for name in ("bird", "fruit", "metal")] for line in said]
    )
    assert error(found, truth) <= tol(torch.float32, cond=10)
    loaded, _ = load_run(run.folder)
    assert torch.equal(run.logits(loaded), run.logits())


def test_estimators_see_through_a_pooled_model(
    tiny_encoder: Path, tmp_path: Path, small_job: dict[str, Any]
) -> None:
    """Second derivatives pass the pooling; a fresh retraining is probed again."""
    folder = encoder(tiny_encoder, tmp_path / "base")
    given = {**small_job, "model": str(folder), "max_steps": 4, "outer_every": 2}
    given |= {"estimator": "neumann", "budget": "full", "outer_warmup_steps": 0}
    run = finish(**given, output_dir=str(tmp_path / "run"))
    assert run.result.phases[0].outer_steps == 2
    assert not run.result.phases[0].skipped
    loaded, _ = load_run(run.folder)
    allowed = tol(torch.float32, cond=run.condition_of_the_head())
    assert error(run.logits(loaded), run.logits()) <= allowed
