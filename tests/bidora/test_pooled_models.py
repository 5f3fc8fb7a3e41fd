"""From `--pooling` to a model, and from the files of a run to the model again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    EsmConfig,
    EsmModel,
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
from bidora.pooling import PooledModel
from bidora.runs.predict import load_run, predict
from bidora.runs.settings import TrainSettings
from bidora.tasks.base import Schema
from bidora.tasks.registry import make_task
from tests.bidora.conftest import finish
from tests.bidora.test_pooling import flags, masked, says
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


def protein_model(tiny_encoder: Path, folder: Path) -> Path:
    """Return the folder of an ESM-2, which has a head for contacts of residues."""
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=17,
        mask_token_id=1,  # none of the ids that rows are drawn from
        pad_token_id=0,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=26,
        position_embedding_type="rotary",
        token_dropout=True,
        initializer_range=0.3,
    )
    EsmModel(config).save_pretrained(folder)
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


def test_proteins_are_pooled_by_their_mean(tiny_encoder: Path, tmp_path: Path) -> None:
    proteins = dataclasses.replace(
        CLASSES, settings={"text_column": "sequence", "proteins": True}
    )
    source, task = find_model(str(tiny_encoder)), make_task("classification")
    base = load_base(source, load_tokenizer(source), task, proteins)
    assert base.pooling == "mean"
    folder = encoder(tiny_encoder, tmp_path, {"pooling_mode": "max"})
    source = find_model(str(folder))
    assert load_base(source, load_tokenizer(source), task, proteins).pooling == "max"


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


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_pooled_protein_model_is_loaded_by_the_card(
    tiny_encoder: Path, tmp_path: Path, method: str
) -> None:
    folder = protein_model(tiny_encoder, tmp_path / "base")
    targets = base_of(folder, pooling="mean").linear_layers()
    assert targets
    assert not any("contact_head" in name for name in targets)
    compare_outputs(*saved_and_loaded(method, tmp_path / "run", folder, "mean"))


def test_a_layer_that_the_model_does_not_have_is_named(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    base = base_of(tiny_encoder)
    for targets in (("query", "valu"), ("all-linear", "valu")):
        settings = TrainSettings(method="lora", target_modules=targets)
        with pytest.raises(UserError, match=r"no layer .* ends in 'valu'.*mean value"):
            make_method("lora").adapt(base, settings)
    settings = TrainSettings(
        method="lora", target_modules=("all-linear", "word_embeddings")
    )
    model: Any = make_method("lora").adapt(base, settings)
    adapted = {
        n.split(".lora_A")[0] for n, _ in model.named_modules() if "lora_A." in n
    }
    linear = base_of(tiny_encoder).linear_layers()
    assert adapted == {f"base_model.model.{name}" for name in linear}
    assert any("lora_embedding_A" in name for name, _ in model.named_parameters())


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
