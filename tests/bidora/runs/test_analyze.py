"""`bidora analyze`: numbers of real runs, what recording leaves alone, and refusals."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from bidora.analysis import weight_change
from bidora.cli import main
from bidora.errors import UserError
from bidora.methods import make_method
from bidora.runs import analyze as job
from bidora.runs.analyze import analyze, kinds_of, table
from bidora.runs.job import train
from bidora.runs.predict import load_run
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.runs.weights import trained_weights
from tests.bidora.conftest import spare

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

STEPS = {"bidora": 8, "lora": 4, "full": 4}
POINTS = {
    "bidora": [("search", s) for s in (2, 4)]
    + [("retrain", s) for s in (2, 4, 5)],  # half for the search, two thirds after it
    "lora": [("train", 2), ("train", 4)],
    "full": [("train", 2), ("train", 4)],
}

Run = Callable[..., Path]
Weights = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def settings_of(tiny_encoder: Path, labelled_csv: Path) -> Callable[..., TrainSettings]:
    """Return a function that gives the settings of a run of a second."""

    def settings(method: str, folder: Path, **given: Any) -> TrainSettings:
        own: dict[str, Any] = {
            "model": str(tiny_encoder),
            "task": str(labelled_csv),
            "method": method,
            "output_dir": str(folder),
            "max_steps": STEPS[method],
            "eval_steps": 2,
            "learning_rate": 0.02,  # far from the base
            "record_weights": True,
        }
        if method != "full":
            own["lora_dropout"] = 0.1  # so that random numbers matter
        return TrainSettings.from_dict({**own, **given})

    return settings


@pytest.fixture(scope="module")
def run(
    settings_of: Callable[..., TrainSettings], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Return a function that trains once for each method and settings."""
    done: dict[str, Path] = {}

    def trained(method: str, **given: Any) -> Path:
        key = repr((method, given))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("runs") / method
            with pytest.MonkeyPatch.context() as patch:
                spare(patch)
                train(settings_of(method, done[key], **given))
        return done[key]

    return trained


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "history.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def recorded(folder: Path) -> dict[tuple[str, int], Weights]:
    found = [r for r in records(folder) if "weights" in r]
    points = {(r["phase"], r["step"]): r["weights"] for r in found}
    assert len(points) == len(found)  # none twice
    return points


def tampered(run: Path, folder: Path, **settings: Any) -> Path:
    """Return a copy of a run with other settings, as if it had been trained so."""
    shutil.copytree(run, folder)
    file = folder / "settings.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def with_weights(run: Path, folder: Path, *points: Weights) -> Path:
    """Return a copy of a run of one phase that recorded these weights, after each step."""
    shutil.copytree(run, folder)
    kept = [r for r in records(run) if "weights" not in r]
    kept += [
        {"phase": "train", "step": i + 1, "weights": weights}
        for i, weights in enumerate(points)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    return folder


@pytest.mark.parametrize("method", ["bidora", "lora", "full"])
def test_numbers_are_those_of_the_saved_model(
    run: Run, tiny_encoder: Path, method: str
) -> None:
    folder = run(method)
    points = recorded(folder)
    assert list(points) == POINTS[method]
    model: Any = load_run(folder)[0]
    if method != "full":
        model = model.merge_and_unload()
    base = dict(AutoModel.from_pretrained(tiny_encoder).named_modules())
    last = points[POINTS[method][-1]]
    assert len(last) == 13  # six in each of two blocks, and the pooler; not the head
    for name, found in last.items():
        now = model.get_submodule(name).weight.detach().double().numpy()
        first: Any = base[name.removeprefix("bert.")]
        before = first.weight.detach().double().numpy()
        new, old = np.linalg.norm(now, axis=1), np.linalg.norm(before, axis=1)
        cosines = (now * before).sum(1) / (new * old)
        # PEFT merges in float32: each entry is rounded some times.
        bound = 10 * float(np.finfo(np.float32).eps)
        apart = abs(new - old).mean()
        assert found["delta_m"] == pytest.approx(apart, abs=bound * old.max()), name
        assert found["delta_d"] == pytest.approx((1 - cosines).mean(), abs=bound), name
        assert found["delta_d"] > 1e-4  # far enough to tell
        assert set(found) == {"delta_m", "delta_d"}


@pytest.mark.parametrize("method", ["bidora", "full"])
def test_recording_changes_nothing_of_the_training(run: Run, method: str) -> None:
    noted, plain = run(method), run(method, record_weights=False)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (noted / name).read_bytes() == (plain / name).read_bytes()
    rest = [r for r in records(noted) if "weights" not in r]
    for ours, theirs in zip(rest, records(plain), strict=True):
        for record in (ours, theirs):
            record.pop("seconds", None)
            for key in ("seconds", "evaluation_seconds"):
                record.get("result", {}).pop(key, None)
        assert ours == theirs


class Stop(Listener):
    """Stops a run in a step."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, step: int, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("method", "stop"), [("bidora", 7), ("full", 3)])
def test_a_resumed_run_records_the_same(
    run: Run,
    settings_of: Callable[..., TrainSettings],
    tmp_path: Path,
    method: str,
    stop: int,
) -> None:
    settings = settings_of(method, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(settings, Stop(stop))
    assert 0 < len(recorded(tmp_path / "run")) < len(POINTS[method])
    train(settings, resume=True)
    assert recorded(tmp_path / "run") == recorded(run(method))


@pytest.mark.parametrize("method", ["bitfit", "houlsby", "probe"])
def test_methods_that_leave_weights_alone_refuse(method: str) -> None:
    settings = TrainSettings(task="x.csv", method=method, record_weights=True)
    with pytest.raises(UserError, match="--record-weights has no meaning with"):
        make_method(method).check(settings)


def test_a_model_without_trained_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(UserError, match="method mine changes no weight"):
        trained_weights(model, ["0"], "mine")


def test_rows_of_a_conv1d_are_its_outputs() -> None:
    own = nn.Sequential(Conv1D(3, 2))  # two in, three out
    (pair,) = trained_weights(own, ["0"], "full").values()
    layer: Any = own[0]
    with torch.no_grad():
        layer.weight[:, 1] *= 2
    found = weight_change(*pair())
    norm = layer.weight[:, 1].norm().item() / 2
    assert found.magnitude == pytest.approx(norm / 3)
    assert found.rows == 3

    adapted: Any = get_peft_model(
        nn.Sequential(Conv1D(3, 2)),
        LoraConfig(r=1, use_dora=True, target_modules=["0"], fan_in_fan_out=True),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    (pair,) = trained_weights(adapted, ["0"], "dora").values()
    weight, base = pair()
    assert base.shape == (3, 2)
    merged = adapted.merge_and_unload()[0].weight.T
    assert torch.allclose(weight, merged, atol=1e-6)


def test_the_base_of_a_trained_weight_is_kept_apart() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    (pair,) = trained_weights(model, ["0"], "full").values()
    weight, base = pair()
    assert torch.equal(weight, base)
    assert weight.data_ptr() != base.data_ptr()


def test_files_hold_the_slopes_and_the_points(run: Run, tmp_path: Path) -> None:
    folders = [run("bidora"), run("lora")]
    found = analyze(folders, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "analysis.json").read_text("utf-8"))
    assert [r["run"] for r in content["runs"]] == [str(f) for f in folders]
    assert {"torch", "python"} <= set(content["environment"])
    with (tmp_path / "out" / "analysis.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 * (len(POINTS["bidora"]) + len(POINTS["lora"]))
    picture = (tmp_path / "out" / "analysis.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    kinds = {
        "query", "key", "value", "attention.output.dense", "intermediate.dense",
        "output.dense", "bert.pooler.dense",
    }  # fmt: skip
    for r in content["runs"]:
        phases = dict.fromkeys(p for p, _ in POINTS[r["method"]])
        assert {(f["phase"], f["kind"]) for f in r["fits"]} == {
            (p, k) for p in phases for k in kinds
        }
        for fit in r["fits"]:
            own = [
                row
                for row in rows
                if (row["run"], row["phase"], row["kind"])
                == (r["run"], fit["phase"], fit["kind"])
            ]
            x = np.array([float(row["delta_d"]) for row in own])
            y = np.array([float(row["delta_m"]) for row in own])
            slope, intercept = np.polyfit(x, y, 1)
            assert fit["points"] == len(own)
            assert fit["slope"] == pytest.approx(slope, rel=1e-6)
            assert fit["intercept"] == pytest.approx(intercept, rel=1e-6, abs=1e-9)
            assert fit["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
            steps = [s for p, s in POINTS[r["method"]] if p == fit["phase"]]
            assert fit["steps"] == steps
    shown = table(found)
    assert shown.splitlines()[0].split()[-2:] == ["slope", "correlation"]
    assert len(shown.splitlines()) == 1 + 3 * len(kinds)
    assert not list((tmp_path / "out").glob(".*partial"))


def test_kinds_are_the_same_for_all_runs_and_as_short_as_can_be() -> None:
    names = ["h.0.attn.q", "h.1.attn.q", "h.0.attn.out", "h.0.mlp.out", "0", "a.1"]
    found = kinds_of(names)
    assert [found[n] for n in names] == ["q", "q", "attn.out", "mlp.out", "0", "1"]


def test_what_has_no_slope_says_why(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bidora.runs.analysis_plot.Figure.savefig", _touch)
    still = {"delta_m": 0.0, "delta_d": 0.0}
    first = {
        "h.0.key": {"delta_m": 1.0, "delta_d": 0.5, "zero_rows": 2},
        "h.0.query": {"delta_m": 1.0, "delta_d": 0.5},
        "h.0.up": still,
        "h.0.value": {"delta_m": float("nan"), "delta_d": 0.5},
    }
    second = {"h.0.query": {"delta_m": 2.0, "delta_d": 0.5}, "h.0.up": still}
    folder = with_weights(run("lora"), tmp_path / "run", first, second)
    (found,) = analyze([folder], tmp_path / "out")
    assert [(f.kind, f.line.points, f.line.slope) for f in found.fits] == [
        ("key", 1, None),
        ("query", 2, None),
    ]
    text = " ".join(found.notes)
    assert "1 point(s) are not finite and left out, the first is h.0.value" in text
    assert "2 point(s) of weights that are still the base model's are left out" in text
    assert "such as 2 row(s) of h.0.key" in text
    assert "key (train): n/a, for 1 point(s); a line needs two." in text
    assert "query (train): n/a, for every point has the same ΔD." in text
    assert table((found,)).count("n/a") == 4
    json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=_refuse)


def test_kinds_and_steps_show_without_colour(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def keep(self: Any, path: Path, **rest: Any) -> None:
        figures.append(self)
        path.touch()

    monkeypatch.setattr("bidora.runs.analysis_plot.Figure.savefig", keep)
    kinds = ("query", "key", "value")
    points = [
        {kind: {"delta_m": 2.0 - 0.1 * step, "delta_d": float(step)} for kind in kinds}
        for step in range(1, 5)
    ]
    found = with_weights(run("lora"), tmp_path / "run", *points)
    analyze([found], tmp_path / "out")
    (figure,) = figures
    change, loss, score = figure.axes
    lines = change.get_lines()
    assert len({line.get_linestyle() for line in lines}) == 3
    clouds = change.collections
    assert len({c.get_paths()[0].vertices.tobytes() for c in clouds}) == 3
    for cloud in clouds:
        assert cloud.get_facecolors()[:, 3] == pytest.approx([0.2, 7 / 15, 11 / 15, 1])
    (slope,) = {t.get_text().split(": ")[1] for t in change.get_legend().get_texts()}
    assert slope == "slope -0.1, r = -1.00"
    assert (loss.get_ylabel(), score.get_xlabel()) == ("loss", "step")
    assert len(loss.get_lines()) > 1


def _touch(self: Any, path: Path, **rest: Any) -> None:
    path.touch()


def _refuse(word: str) -> None:
    raise ValueError(word)  # NaN is no JSON


def test_runs_that_cannot_be_analysed_are_named(run: Run, tmp_path: Path) -> None:
    lora, plain = run("lora"), run("full", record_weights=False)
    other = tampered(lora, tmp_path / "other", model="owner/other")
    bitfit = tampered(plain, tmp_path / "bitfit", method="bitfit", learning_rate=None)
    unfinished = tampered(lora, tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    for runs, message in (
        ([plain], "trained without --record-weights: train it again with the same"),
        ([bitfit], "Method bitfit changes none of the base model's; leave the run out"),
        ([lora, other], r"from owner/other: .* Analyse them one at a time"),
        ([lora, lora.parent / "." / lora.name], "is given twice; leave one out"),
        ([unfinished], "is not finished; go on with it"),
        ([tmp_path], "holds no run of bidora"),
    ):
        with pytest.raises(UserError, match=message):
            analyze(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda r: next(iter(r["weights"].values())).pop("delta_d"),
            "delta_d of .*: None",
        ),
        (
            lambda r: r["weights"].update({"layer.0": {"delta_m": "1"}}),
            "delta_m of layer.0",
        ),
        (lambda r: r["weights"].update({"layer.0": 3}), "delta_m of layer.0: None"),
        (lambda r: r.update(weights=[1]), r"weights: \[1\]"),
        (lambda r: r.update(step="two"), "step: 'two'"),
        (lambda r: r.pop("step"), "step: None"),
    ],
)
def test_a_changed_record_is_named_by_its_line(
    run: Run, tmp_path: Path, change: Callable[[Any], Any], why: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run("lora"), folder)
    history = records(folder)
    place = next(i for i, r in enumerate(history) if "weights" in r)
    change(history[place])
    lines = "".join(json.dumps(r) + "\n" for r in history)
    (folder / "history.jsonl").write_text(lines, "utf-8")
    where = rf"^line {place + 1} of .*history\.jsonl is not what a run writes"
    with pytest.raises(UserError, match=rf"{where} \({why}"):
        analyze([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_lost_or_broken_are_named(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run("lora"), folder)
    history, metrics = folder / "history.jsonl", folder / "metrics.json"
    lines, numbers = history.read_text("utf-8"), metrics.read_text("utf-8")
    count = len(lines.splitlines())

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            analyze([folder], tmp_path / "out")
        assert "copy it from where the run was made, or train again" in str(error.value)
        history.write_text(lines, "utf-8")
        metrics.write_text(numbers, "utf-8")

    history.unlink()
    refused(
        r"history\.jsonl cannot be read \(No such file .* left behind when the folder"
    )
    for torn, why in (('{"step": 3, "we', "Unterminated string"), ("3", "no phase")):
        history.write_text(lines + torn, "utf-8")
        refused(
            rf"line {count + 1} of .*history\.jsonl is not what a run writes \({why}"
        )
    for broken, why in (
        ("", "Expecting value"),
        ("{}", "no metric"),
        ("[]", "no metric"),
    ):
        metrics.write_text(broken, "utf-8")
        refused(rf"metrics\.json is not what a run writes \({why}.* cut off or changed")
    assert not (tmp_path / "out").exists()


def test_runs_that_moved_no_weight_are_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bidora.runs.analysis_plot.Figure.savefig", _touch)
    still = {f"h.{i}.query": {"delta_m": 0.0, "delta_d": 0.0} for i in range(3)}
    folder = with_weights(run("lora"), tmp_path / "still", still, still)
    told = (
        "no weight moved: 6 point(s) of 3 layer(s), up to step 2, are the base model's; "
        "train for more steps, or at a higher --learning-rate."
    )
    with pytest.raises(UserError) as error:
        analyze([folder], tmp_path / "out")
    assert str(error.value) == f"{folder} has nothing to draw: {told}"
    assert not (tmp_path / "out").exists()
    # Beside another, it is left out, and said.
    found = analyze([folder, run("lora")], tmp_path / "out")
    assert found[0].notes == (told,)
    assert str(folder) not in table(found)


def test_an_earlier_analysis_is_kept_unless_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bidora.runs.analysis_plot.Figure.savefig", _touch)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    analyze([run("lora")], out)
    before = (out / "analysis.json").read_bytes()
    with pytest.raises(UserError, match=r"holds analysis\.png already; .* --overwrite"):
        analyze([run("full")], out)
    assert (out / "analysis.json").read_bytes() == before
    analyze([run("full")], out, overwrite=True)
    assert (out / "analysis.json").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file; name a folder"):
        analyze([run("lora")], out / "notes.txt")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_whole", fail)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        analyze([run("lora")], tmp_path / "new")
    assert not list((tmp_path / "new").glob(".*partial"))


def test_the_command_prints_the_table(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bidora.runs.analysis_plot.Figure.savefig", _touch)
    words = ["analyze", str(run("lora")), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "query" in told
    assert f"Saved in {tmp_path / 'out'}: analysis.json, .csv and .png" in told
    assert main(words) == 2
    assert "already; name another folder, or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
