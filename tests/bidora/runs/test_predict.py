"""New rows scored by a finished run, of every kind of task."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.runs.export import export
from bidora.runs.predict import load_run, predict
from tests.bidora.conftest import Finished, finish

Run = Callable[[str], Finished]

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

TEXTS = ["apple pear the", "iron tin", "crow wren small", "a plum"]


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    sign = "\t" if path.suffix == ".tsv" else ","
    return list(csv.DictReader(text.splitlines(), delimiter=sign))


@pytest.fixture(scope="module")
def of_task(
    small_job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Finished]:
    """Return a function that gives a finished run of a type of task, made once."""
    runs: dict[str, Finished] = {}
    place = tmp_path_factory.mktemp("of-task")
    groups = [
        ("apple pear", 1.5, "a"),
        ("iron tin", 2.5, "b"),
        ("crow wren", 4.0, "a;b"),
    ]
    rows = [(f"{t} {f}", n, s) for t, n, s in groups for f in ("the", "of", "a", "and")]
    column_file = "".join(
        f"apple B-X\nof I-X\niron O\n{word} O\n\n" for word in ("the", "a") * 6
    )

    def run(task: str) -> Finished:
        if task not in runs:
            given = {**small_job, "method": "lora", "task_type": task, "max_steps": 2}
            given |= {"start": "random"}  # a fitted head is sure to all digits
            if task == "tagging":
                file = place / "tags.conll"
                file.write_text(column_file)
            else:
                labels = [r[2 if task == "multilabel" else 1] for r in rows] * 2
                texts = [r[0] for r in rows] * 2
                header = ["text", "labels" if task == "multilabel" else "score"]
                file = write_csv(
                    place / f"{task}.csv",
                    header,
                    [list(r) for r in zip(texts, labels, strict=True)],
                )
            given |= {"task": str(file), "output_dir": str(place / task)}
            if task == "multilabel":
                given["label_separator"] = ";"
            runs[task] = finish(**given)
        return runs[task]

    return run


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_classes_and_their_probabilities(
    finished: Run, tmp_path: Path, suffix: str
) -> None:
    run = finished("lora")
    given = write_csv(tmp_path / "new.csv", ["id", "text"], [[i, t] for i, t in
                      enumerate(TEXTS)])  # fmt: skip
    done = predict(run.folder, given, tmp_path / f"out{suffix}", device="cpu")
    assert (done.rows, done.skipped) == (4, ())
    scored = read(tmp_path / f"out{suffix}")
    assert [row["text"] for row in scored] == TEXTS
    assert [str(row["id"]) for row in scored] == ["0", "1", "2", "3"]
    for row in scored:
        shares = {name: float(row[f"p({name})"]) for name in ("bird", "fruit", "metal")}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-4)
        assert max(shares, key=lambda n: shares[n]) in row.values()
        assert float(row["probability"]) == max(shares.values())


def test_predictions_are_those_of_the_training(finished: Run, tmp_path: Path) -> None:
    run = finished("bidora")
    rows = run.job.examples.rows["test"]
    texts = rows.columns["text"] if "text" in rows.columns else rows.columns["texts"]
    given = write_csv(tmp_path / "new.csv", ["text"], [[t] for t in texts])
    predict(run.folder, given, tmp_path / "out.jsonl", device="cpu")
    truth = run.logits().softmax(-1)[:, 0].tolist()
    found = [row["p(bird)"] for row in read(tmp_path / "out.jsonl")]
    assert found == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("task", ["regression", "multilabel", "tagging"])
def test_other_tasks_answer_in_their_words(
    of_task: Run, tmp_path: Path, task: str, suffix: str
) -> None:
    run = of_task(task)
    given = tmp_path / "new.jsonl"
    column = "tokens" if task == "tagging" else "text"
    texts = [t.split() if task == "tagging" else t for t in TEXTS]
    given.write_text("".join(json.dumps({column: t}) + "\n" for t in texts))
    done = predict(run.folder, given, tmp_path / f"out{suffix}", device="cpu")
    assert done.rows == 4
    scored = read(tmp_path / f"out{suffix}")
    own = [{k: v for k, v in row.items() if k != column} for row in scored]
    assert len({tuple(row) for row in own}) == 1
    values = [list(row.values()) for row in own]
    if task == "regression":
        assert all(-20 < float(row[0]) < 20 for row in values)
    if task == "multilabel":
        for row in own:
            shares = [float(v) for k, v in row.items() if k.startswith("p(")]
            assert len(shares) == 2
            assert all(0 < share < 1 for share in shares)
    if task == "tagging":
        for words, row in zip(texts, values, strict=True):
            tags = row[0] if suffix == ".jsonl" else json.loads(row[0])
            assert len(tags) == len(words)
            assert set(tags) <= {"B-X", "I-X", "O"}


def test_labels_of_the_input_are_ignored(finished: Run, tmp_path: Path) -> None:
    run = finished("lora")
    rows = [[text, "no such class"] for text in TEXTS]
    with_labels = write_csv(tmp_path / "a.csv", ["text", "label"], rows)
    without = write_csv(tmp_path / "b.csv", ["text"], [[t] for t in TEXTS])
    found = []
    for given in (with_labels, without):
        output = given.with_suffix(".jsonl")
        predict(run.folder, given, output, device="cpu")
        found.append([row["p(bird)"] for row in read(output)])
        if given is with_labels:
            assert [row["label"] for row in read(output)] == ["no such class"] * 4
    assert found[0] == found[1]


def test_bad_rows_are_told_together_or_left_out(finished: Run, tmp_path: Path) -> None:
    run, output = finished("lora"), tmp_path / "out.csv"
    texts = ["apple", "", "iron", "  "]
    given = write_csv(tmp_path / "new.csv", ["text", "id"], [[t, 1] for t in texts])
    with pytest.raises(UserError) as refused:
        predict(run.folder, given, output, device="cpu")
    for part in ("2 row(s)", "line 3", "line 5", "--on-bad-row skip"):
        assert part in str(refused.value)
    assert not output.exists()
    done = predict(run.folder, given, output, on_bad_row="skip", device="cpu")
    assert (done.rows, len(done.skipped)) == (2, 2)
    assert [row["text"] for row in read(output)] == ["apple", "iron"]
    empty = write_csv(tmp_path / "empty.csv", ["text", "id"], [["", 1]])
    with pytest.raises(UserError, match="no row that can be scored"):
        predict(run.folder, empty, tmp_path / "x.csv", on_bad_row="skip")


def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = finished("lora").folder, tmp_path / "out.csv"
    monkeypatch.setattr("bidora.runs.predict._load", None)
    given = write_csv(tmp_path / "new.csv", ["words"], [["apple"]])
    with pytest.raises(UserError, match=r"'text'.*'words'|'words'.*'text'"):
        predict(run, given, output)
    with pytest.raises(UserError, match=r"must end in \.csv, \.tsv or \.jsonl"):
        predict(run, given, tmp_path / "out.parquet")
    output.write_text("mine")
    with pytest.raises(UserError, match="is there already; add --overwrite"):
        predict(run, given, output)
    with pytest.raises(UserError, match="no file"):
        predict(run, tmp_path / "missing.csv", tmp_path / "y.csv")
    assert output.read_text() == "mine"


@pytest.mark.parametrize("task", ["regression", "tagging"])
def test_a_column_of_another_name_is_to_be_renamed(
    of_task: Run, tmp_path: Path, task: str
) -> None:
    given = write_csv(tmp_path / "new.csv", ["words"], [["apple"]])
    name = "tokens" if task == "tagging" else "text"
    with pytest.raises(UserError, match=f"Rename the column to '{name}'") as error:
        predict(of_task(task).folder, given, tmp_path / "out.csv")
    assert "-column " not in str(error.value)  # predict has no such option


def test_an_output_is_replaced_when_asked(finished: Run, tmp_path: Path) -> None:
    given = write_csv(tmp_path / "new.csv", ["text"], [["apple"]])
    output = tmp_path / "out.csv"
    output.write_text("old")
    predict(finished("lora").folder, given, output, overwrite=True, device="cpu")
    assert len(read(output)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"new.csv", "out.csv"}


def test_a_run_that_is_not_finished_or_none_is_refused(
    finished: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no run of bidora"):
        load_run(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(finished("lora").folder, folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"is not finished; .*--resume --output-dir"):
        load_run(folder)
    (folder / "task.json").write_text("{}")
    with pytest.raises(UserError, match="its settings cannot be read"):
        load_run(folder)


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_a_run_may_be_moved(finished: Run, tmp_path: Path, method: str) -> None:
    run = finished(method)
    shutil.copytree(run.folder, tmp_path / "moved")
    model, _ = load_run(tmp_path / "moved")
    assert (run.logits(model) - run.logits()).abs().max() < 1e-5


def test_a_base_that_was_named_from_elsewhere_is_found(
    finished: Run,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("lora").folder, folder)
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    settings |= {"model": tiny_encoder.name, "started_in": str(tiny_encoder.parent)}
    (folder / "settings.json").write_text(json.dumps(settings), "utf-8")
    monkeypatch.chdir(tmp_path)
    model, _ = load_run("run")
    assert not model.training


@pytest.mark.parametrize("name", ["here/there/gone", "some-model"])
def test_a_base_that_is_gone_is_to_be_put_into_the_settings(
    name: str, finished: Run, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished("lora").folder, folder)
    file = folder / "settings.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, "model": name}), "utf-8")
    remedy = f"set `model` in {re.escape(str(file))} to where it is now"
    with pytest.raises(UserError, match=f"{name}.*{remedy}") as error:
        load_run(folder)
    assert "leave --model out" not in str(error.value)
    with pytest.raises(UserError, match=remedy):
        export(folder, tmp_path / "whole")
    file.write_text(json.dumps({**settings, "model": str(tiny_encoder)}), "utf-8")
    load_run(folder)


def test_a_full_model_needs_no_base(finished: Run, tmp_path: Path) -> None:
    run, folder = finished("full"), tmp_path / "run"
    shutil.copytree(run.folder, folder)
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    settings["model"] = str(tmp_path / "gone")
    (folder / "settings.json").write_text(json.dumps(settings), "utf-8")
    model, _ = load_run(folder)
    assert (run.logits(model) - run.logits()).abs().max() < 1e-5
