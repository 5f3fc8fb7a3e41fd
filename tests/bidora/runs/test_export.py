"""Exported models: equal outputs without PEFT, for every method, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
)

from bidora.cli import main
from bidora.errors import UserError
from bidora.models import ModelSource
from bidora.runs.export import _made_up, _refuse_quantised, export
from bidora.runs.job import train
from bidora.runs.predict import load_run
from bidora.runs.settings import TrainSettings
from tests.bidora.image_models import write_pets
from tests.bidora.language_models import save_language_model

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0]])
MASK = (IDS != 0).long()


def run_of(method: str, encoder: Path, data: Path, folder: Path, **given: Any) -> Path:
    settings: dict[str, Any] = {
        "model": str(encoder),
        "task": str(data),
        "method": method,
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "learning_rate": 0.05,  # far from the base, so that merging matters
    }
    train(TrainSettings.from_dict({**settings, **given}))
    return folder / "run"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("method", ["bidora", "lora", "rslora", "bitfit", "full"])
def test_outputs_are_those_of_the_run(
    method: str, tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of(method, tiny_encoder, labelled_csv, tmp_path)
    done = export(run, tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    expected = logits(load_run(run)[0])
    # Merging adds up each weight once more: some roundings of float32.
    bound = 100 * torch.finfo(torch.float32).eps
    assert done.difference < bound
    assert (logits(plain) - expected).abs().max() < bound * expected.abs().max()
    base = AutoModel.from_pretrained(tiny_encoder).state_dict()
    after = plain.base_model.state_dict()
    assert any((after[n] - base[n]).abs().max() > 0.01 for n in after)


@pytest.fixture
def pubs_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a csv of inputs and the texts to write for them."""
    # METEOR is left out, whose program takes long to start.
    monkeypatch.setattr(shutil, "which", lambda name: None)
    path, names = tmp_path / "pubs.csv", ("Aromi", "Wrestlers", "Cotto")
    rows = [f"name [ {n} ] {f},{n} serves {f}" for n in names for f in ("Thai", "food")]
    path.write_text("\n".join(["mr,ref", *rows, ""]), "utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2", ["c_attn", "wte"]),
        ("llama", ["q_proj", "embed_tokens"]),
        ("t5", ["q", "embed_tokens"]),  # four places have one weight
    ],
)
@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tied_embeddings_are_merged_where_they_were_adapted(
    kind: str, targets: list[str], pubs_csv: Path, tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "base", kind)
    given: dict[str, Any] = {"target_modules": targets, "max_length": 40}
    given |= {"max_new_tokens": 4, "num_beams": 1}
    run = run_of("lora", base, pubs_csv, tmp_path, **given)
    done = export(run, tmp_path / "whole")
    assert done.difference < 1e-5
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    plain: Any = auto.from_pretrained(tmp_path / "whole").eval()
    entrance, exit_ = plain.get_input_embeddings(), plain.get_output_embeddings()
    if kind == "t5":
        entrance = plain.encoder.embed_tokens
    assert (entrance.weight - exit_.weight).abs().max() > 0.01
    words: dict[str, Any] = {"input_ids": IDS}
    if kind == "t5":
        words["decoder_input_ids"] = IDS
    with torch.no_grad():
        expected = load_run(run)[0](**words).logits
        got = plain(**words).logits
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_classifier_that_reads_the_end_of_a_text_is_merged(
    labelled_csv: Path, tmp_path: Path
) -> None:
    base = save_language_model(tmp_path / "base", "t5")
    run = run_of("lora", base, labelled_csv, tmp_path)
    assert export(run, tmp_path / "whole").difference < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    ends = torch.tensor([[7, 8, 9, 1], [9, 10, 1, 0]])  # 1 is the end
    with torch.no_grad():
        expected = load_run(run)[0](input_ids=ends).logits
        got = plain.eval()(input_ids=ends).logits
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions_in_groups_are_refused_by_name(tmp_path: Path) -> None:
    config = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8] * 4, image_size=32)
    ConvNextModel(config).save_pretrained(tmp_path / "base")
    size = {"shortest_edge": 32}
    ConvNextImageProcessor(size=size).save_pretrained(tmp_path / "base")
    pets = write_pets(tmp_path / "pets")
    given = {"target_modules": ["dwconv"], "max_steps": 1}
    run = run_of("lora", tmp_path / "base", pets, tmp_path, **given)
    with pytest.raises(UserError, match=r"4 adapted convolution.* as \S*\.dwconv \("):
        export(run, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_merged_model_with_other_outputs_is_refused(
    factor: float,
    tiny_encoder: Path,
    labelled_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path)
    merge = BaseTuner.merge_and_unload

    def wrong(self: Any) -> Any:
        merged = merge(self)
        # Finite weights whose outputs are not, or are a hundredth larger.
        merged.register_forward_hook(
            lambda module, given, out: setattr(out, "logits", out.logits * factor)
        )
        return merged

    monkeypatch.setattr(BaseTuner, "merge_and_unload", wrong)
    with pytest.raises(
        UserError, match=r"differ from .* by (1\.0e-02|nan) of the"
    ) as e:
        export(run, tmp_path / "whole")
    assert "load it with PEFT" in str(e.value)
    assert not (tmp_path / "whole").exists()


@pytest.mark.filterwarnings("ignore:Base weights have rows of zeros")
def test_rows_of_zeros_stay_zeros(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    base = AutoModel.from_pretrained(tiny_encoder)
    weight = base.encoder.layer[0].attention.self.query.weight
    weight.data[3] = 0.0
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "base")
    run = run_of("bidora", tmp_path / "base", labelled_csv, tmp_path, max_steps=2)
    done = export(run, tmp_path / "whole")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert logits(plain).isfinite().all()
    assert done.difference < 1e-4


def test_a_pooled_model_is_loaded_by_the_lines_that_are_told(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("dora", tiny_encoder, labelled_csv, tmp_path, pooling="mean")
    done = export(run, tmp_path / "whole")
    names: dict[str, Any] = {}
    exec(done.loading_code, names)  # what a user would paste
    expected = logits(load_run(run)[0])
    assert torch.allclose(logits(names["model"]), expected, rtol=0, atol=1e-4)
    words = names["tokenizer"]("good film")
    assert words["input_ids"]


def test_the_scale_of_a_regression_goes_with_the_model(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "scores.csv"
    lines = [f"a small {w},{i}.5" for i in range(15) for w in ("apple", "iron")]
    data.write_text("\n".join(["text,score", *lines, ""]), "utf-8")
    kind = {"task_type": "regression", "label_column": "score", "max_steps": 1}
    run = run_of("lora", tiny_encoder, data, tmp_path, **kind)
    export(run, tmp_path / "whole")
    task = (tmp_path / "whole" / "task.json").read_text("utf-8")
    assert task == (run / "task.json").read_text("utf-8")
    details = json.loads(task)["details"]
    scale = f"{details['mean']:.6g} + {details['deviation']:.6g} times the logit."
    for folder in (run, tmp_path / "whole"):
        card = (folder / "README.md").read_text("utf-8")
        assert f"Outputs: a number, {scale}" in card


def test_weights_are_written_in_the_dtype_asked_for(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path)
    export(run, tmp_path / "whole", dtype="bfloat16")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole", dtype="auto"
    )
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    with pytest.raises(
        UserError, match="--dtype int8: choose one of float32, bfloat16"
    ):
        export(run, tmp_path / "other", dtype="int8")


def test_the_difference_told_is_that_of_the_rounded_weights(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path)
    done = export(run, tmp_path / "whole", dtype="bfloat16")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole", dtype=torch.float32
    )
    model, tokenizer = load_run(run)
    inputs = _made_up(tokenizer, model.config)
    with torch.no_grad():
        before, after = model(**inputs).logits, plain.eval()(**inputs).logits
    apart = ((after - before).abs().max() / before.abs().max()).item()
    assert apart > 1e-4  # of float32 it would be 1e-6
    assert done.difference == pytest.approx(apart, rel=1e-3)
    marker = json.loads((tmp_path / "whole" / "export.json").read_text("utf-8"))
    assert marker["difference"] == done.difference


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_float16_cannot_hold_are_refused(
    method: str, tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of(method, tiny_encoder, labelled_csv, tmp_path, max_steps=1)
    file = run / ("model" if method == "full" else "adapter_model")
    weights = load_file(file.with_suffix(".safetensors"))
    (name,) = (n for n in weights if n.endswith("classifier.weight"))
    weights[name] *= 7e4 / weights[name].abs().max()  # the largest of float16 is 65504
    save_file(weights, file.with_suffix(".safetensors"), {"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"^1 weight\(s\) hold values beyond what float16 holds, such as "
        r"7e\+04 in classifier\.weight.*; take --dtype bfloat16\. Nothing was",
    ):
        export(run, tmp_path / "whole", dtype="float16")
    assert not list(tmp_path.glob("*whole*"))
    export(run, tmp_path / "whole", dtype="bfloat16")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert plain.classifier.weight.abs().max().item() == pytest.approx(7e4, rel=0.01)


def test_a_whole_model_that_diverged_is_refused(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("full", tiny_encoder, labelled_csv, tmp_path, max_steps=1)
    weights = load_file(run / "model.safetensors")
    weights["bert.embeddings.position_embeddings.weight"][-1] = float("nan")
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    # No output of the made-up inputs, which are shorter, shows it.
    with pytest.raises(UserError, match=r"not finite, such as .*position_embeddings"):
        export(run, tmp_path / "whole")
    assert not list(tmp_path.glob("*whole*"))


def test_what_stands_there_is_kept(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    with pytest.raises(UserError, match="is the run itself"):
        export(run, run, overwrite=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            UserError, match=r"holds mine\.txt, which is of no export, a"
        ):
            export(run, notes, overwrite=overwrite)
    with pytest.raises(UserError, match=r"is there already; name another folder\.$"):
        export(run, notes / "mine.txt", overwrite=True)
    assert (notes / "mine.txt").read_text() == "mine"
    export(run, tmp_path / "whole")
    with pytest.raises(UserError, match=r"is there already; .* or add --overwrite"):
        export(run, tmp_path / "whole")
    export(run, tmp_path / "whole", overwrite=True)
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_only_exports_are_replaced(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path, max_steps=1)
    whole = tmp_path / "whole"
    export(run, whole)
    names = {p.name for p in whole.iterdir()}
    marker = json.loads((whole / "export.json").read_text("utf-8"))
    assert set(marker.pop("files")) == names
    assert marker.pop("difference") < 1e-5
    assert marker == {"model": str(tiny_encoder), "method": "lora", "dtype": "float32"}

    adapter, model = tmp_path / "adapter", tmp_path / "model"
    other, spoilt, added = tmp_path / "other", tmp_path / "spoilt", tmp_path / "added"
    shutil.copytree(run, other)
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "config.json"):
        shutil.copyfile(run / name, adapter / name)
    shutil.copytree(tiny_encoder, model)
    shutil.copytree(whole, spoilt)
    (spoilt / "export.json").write_text("[]")
    shutil.copytree(whole, added)
    (added / "whole.gguf").write_text("mine")
    for folder, message in (
        (
            other,
            r"holds a run \(settings\.json\), and only an earlier export is ever re",
        ),
        (
            adapter,
            r"holds an adapter \(adapter_config\.json\), .*; name another folder",
        ),
        (
            model,
            r"holds a model that is no export \(it has no export\.json\), .* delete",
        ),
        (spoilt, r"holds a model that is no export"),
        (
            added,
            r"holds whole\.gguf, which the export there did not write, .*; move it",
        ),
    ):
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(UserError, match=message):
            export(run, folder, overwrite=True)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_runs_own_base_model_is_kept_though_it_is_an_export(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    first = run_of("lora", tiny_encoder, labelled_csv, tmp_path, max_steps=1)
    export(first, tmp_path / "whole")
    run = run_of("lora", tmp_path / "whole", labelled_csv, tmp_path / "b", max_steps=1)
    # What a run saves of an export must not look like one.
    assert not (run / "export.json").exists()
    before = (tmp_path / "whole" / "model.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"is the base model of .*run, which would be l"
    ):
        export(run, tmp_path / "whole", overwrite=True)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == before


def test_an_earlier_export_is_lost_only_to_one_that_is_in_place(
    tiny_encoder: Path,
    labelled_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path, max_steps=1)
    whole = tmp_path / "whole"
    export(run, whole)
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    move = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == ".whole.partial":
            raise OSError(5, "Input/output error")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("bidora.runs.export.os.replace", fail)
        with pytest.raises(
            UserError, match=r"cannot be written \(Input/output error\)"
        ):
            export(run, whole, dtype="bfloat16", overwrite=True)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    # A link stays one; what it leads to is replaced.
    (tmp_path / "link").symlink_to(whole)
    export(run, tmp_path / "link", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((whole / "export.json").read_text())["dtype"] == "bfloat16"


def test_where_nothing_can_be_written_is_told_before_the_merge(
    tiny_encoder: Path,
    labelled_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path, max_steps=1)
    monkeypatch.setattr("bidora.runs.export.load_run", None)
    places = {Path("/proc/foo"): "No such file", labelled_csv / "x": "Not a directory"}
    for place, why in places.items():
        if place.parent.exists():
            with pytest.raises(
                UserError, match=rf"cannot be written \({why}.* of your"
            ):
                export(run, place)
    # A merge that fails leaves none of the folders that were made for it.
    with pytest.raises(TypeError):
        export(run, tmp_path / "a" / "b" / "whole")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_lost_adapter_is_named(
    name: str, tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("bidora", tiny_encoder, labelled_csv, tmp_path, max_steps=2)
    (run / name).unlink()
    with pytest.raises(UserError, match=rf"run has no {name}, .* Copy it from where"):
        export(run, tmp_path / "whole")
    assert not list(tmp_path.glob("*whole*"))


def test_a_failure_leaves_the_earlier_export(
    tiny_encoder: Path,
    labelled_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path)
    export(run, tmp_path / "whole")
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()

    def fail(*args: Any) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr("bidora.runs.export._card", fail)
    with pytest.raises(
        UserError, match=r"cannot be written \(no space .* with room for"
    ):
        export(run, tmp_path / "whole", overwrite=True)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == weights
    assert not list(tmp_path.glob(".*partial"))


def test_houlsbys_bottlenecks_are_refused(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    run = run_of("houlsby", tiny_encoder, labelled_csv, tmp_path, lora_r=2)
    with pytest.raises(UserError, match="layers of their own, which no weight"):
        export(run, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_quantised_base_is_refused_before_it_is_loaded(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_encoder, base)
    run = run_of("lora", base, labelled_csv, tmp_path, max_steps=1)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
    }
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="is quantised, and a merged weight would be"):
        export(run, tmp_path / "whole")
    # A packaged file of few bits is unpacked as it is loaded.
    packed = ModelSource("smollm2", str(base), is_local=True, gguf_file="w.gguf")
    _refuse_quantised(packed)


def test_the_command_says_where_it_is_and_how_to_load_it(
    tiny_encoder: Path,
    labelled_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of("lora", tiny_encoder, labelled_csv, tmp_path)
    words = ["export", str(run), "--output", str(tmp_path / "whole")]
    assert main(words) == 2
    assert "say what to write: --merge" in capsys.readouterr().err
    assert main([*words, "--merge"]) == 0
    told = capsys.readouterr().out
    assert f"Saved in {tmp_path / 'whole'} (float32)" in told
    assert f"from_pretrained('{tmp_path / 'whole'}')" in told
    assert main(["export", str(tmp_path), "--merge", "--output", "x"]) == 2
    assert "holds no run of bidora" in capsys.readouterr().err
