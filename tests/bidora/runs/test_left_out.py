"""Rows that only the model can't be given: told with their places, or left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.runs.examples import Examples
from bidora.runs.job import train
from bidora.runs.predict import predict
from bidora.runs.settings import TrainSettings
from bidora.tasks import Rows, Schema, make_task
from tests.bidora.conftest import finish
from tests.bidora.language_models import CHAT_TEMPLATE, save_language_model

STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
) + CHAT_TEMPLATE
ASKED = {"role": "user", "content": "Hello"}
ANSWERED = {"role": "assistant", "content": "Bye"}


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave METEOR out, whose program takes long to start."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def settings(model: Path, task: Path, place: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "task": str(task),
        "output_dir": str(place),
        "method": "lora",
        "max_steps": 2,
        "eval_steps": 2,
        "per_device_train_batch_size": 4,
        "max_length": 12,
        "max_new_tokens": 4,
        "num_beams": 1,
        **more,
    }


def examples(inner: list[int], outer: list[int]) -> Examples:
    def rows(part: str, count: int) -> Rows:
        texts = [f"{part} {i}" for i in range(count)]
        return Rows({"text": texts}, [f"t, line {text}" for text in texts])

    table = Table("t", ("text",), (("a",),), ("line 1",))
    return Examples(
        Source("t", {"train": table}),
        make_task("generation"),
        Schema("generation"),
        {"train": rows("train", 5), "test": rows("test", 2)},
        ["an empty one"],
        inner,
        outer,
    )


def test_what_is_left_out_goes_from_every_part_and_the_split_stays() -> None:
    found = examples([0, 2, 4], [1, 3])
    texts = found.joined().columns["text"]
    assert texts[5:] == ["test 0", "test 1"]
    found.leave_out({1: "one", 2: "two", 6: "six"})
    kept = found.rows["train"].columns["text"]
    assert kept == ["train 0", "train 3", "train 4"]
    assert found.rows["test"].columns["text"] == ["test 0"]
    assert [kept[i] for i in found.inner] == ["train 0", "train 4"]
    assert [kept[i] for i in found.outer] == ["train 3"]
    assert found.record()["skipped"] == ["an empty one", "one", "two", "six"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([5, 6], "none of the 2 test examples can be used with this model"),
        ([1, 3], "none of the 2 held-back examples"),
        ([0, 2, 4], "none of the 3 training examples"),
    ],
)
def test_nothing_left_is_refused(bad: list[int], said: str) -> None:
    with pytest.raises(UserError, match=f"{said}.*: why"):
        examples([0, 2, 4], [1, 3]).leave_out(dict.fromkeys(bad, "why"))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_prompts_that_are_too_long_are_left_out(tmp_path: Path, kind: str) -> None:
    model = save_language_model(tmp_path / "model", kind)
    long = "name " * 30
    lines = [f"{p} {q},a {r}" for p in ("Aromi", "Cotto", "Thai", "French", "Indian")
             for q in ("pub", "cafe") for r in ("pub", "city")]  # fmt: skip
    lines[4:4], lines[9:9] = [f"{long},a pub"], [f"{long},a cafe"]
    task = tmp_path / "pubs.csv"
    task.write_text("\n".join(["mr,ref", *lines]) + "\n", "utf-8")
    given = settings(model, task, tmp_path / "run", task_type="generation")
    with pytest.raises(UserError, match=r"^2 prompt.*pubs\.csv, line 6.*line 11"):
        train(TrainSettings(**given))
    run = finish(**given, on_bad_row="skip")
    said = [line for line in run.told if "bad row(s) left out" in line]
    assert len(said) == 1
    assert "2 bad row(s) left out, such as: " in said[0]
    rows = run.job.examples.rows
    assert sum(map(len, rows.values())) == 20
    assert not any(long.strip() in part.columns["text"] for part in rows.values())
    skipped = run.read("split.json")["skipped"]
    assert {line.split(": ")[0] for line in skipped} == {
        f"{task}, line 6",
        f"{task}, line 11",
    }
    with pytest.raises(UserError, match=r"^2 prompt.*--max-length 12"):
        predict(run.folder, task, tmp_path / "o.jsonl", device="cpu")
    done = predict(
        run.folder, task, tmp_path / "o.jsonl", on_bad_row="skip", device="cpu"
    )
    assert (done.rows, len(done.skipped)) == (20, 2)
    task.write_text(f"mr,ref\n{long},a pub\n", "utf-8")
    with pytest.raises(
        UserError, match=r"no row that can be scored, such as: .*line 2"
    ):
        predict(run.folder, task, tmp_path / "p.jsonl", on_bad_row="skip", device="cpu")


def test_conversations_that_a_template_refuses_are_left_out(tmp_path: Path) -> None:
    model = save_language_model(tmp_path / "model", "llama", STRICT)
    task = tmp_path / "chats.jsonl"
    places = ("Aromi", "Cotto", "Thai", "French", "pub", "cafe", "river", "city")
    chats = [[{**ASKED, "content": f"Hello {place}"}, ANSWERED] for place in places * 2]
    for place in (3, 8, 14):  # so that both parts have some, whatever the split
        chats.insert(place, [ASKED, ASKED, ANSWERED])

    def write() -> None:
        task.write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))

    write()
    given = settings(model, task, tmp_path / "run")
    said = (
        r"(?s)^3 of 19 row\(s\) can't be used with this model:\n  .*chats\.jsonl, line "
        r"\d+: .*\(Roles must alternate\).*or leave them out with --on-bad-row skip\.$"
    )
    with pytest.raises(UserError, match=said):
        train(TrainSettings(**given))
    run = finish(**given, on_bad_row="skip")
    assert any("3 bad row(s) left out, such as: " in line for line in run.told)
    assert sum(map(len, run.job.examples.rows.values())) == 16
    chats[0] = [ASKED, ASKED]
    write()
    with pytest.raises(UserError, match=r"^4 of 19 row\(s\) can't be used"):
        predict(run.folder, task, tmp_path / "o.jsonl", device="cpu")
    done = predict(
        run.folder, task, tmp_path / "o.jsonl", on_bad_row="skip", device="cpu"
    )
    assert (done.rows, len(done.skipped)) == (15, 4)
