"""Jobs that end with texts: three layouts of models, from the data to scored new rows."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from bidora.cli import main
from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.models import find_model, load_base, load_tokenizer
from bidora.runs.examples import read_examples
from bidora.runs.job import train
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.runs.writing import write_texts
from bidora.tasks import Schema, make_task
from bidora.tasks.text_scores import text_scores
from tests.bidora.conftest import Heard, finish
from tests.bidora.language_models import CHAT_TEMPLATE, save_language_model

NAMES, FOODS, PLACES = ("Aromi", "Wrestlers", "Cotto"), ("Indian", "Thai"), ("river",)


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave METEOR out, whose program takes long to start."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny model."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            place = tmp_path_factory.mktemp("language") / kind
            template = CHAT_TEMPLATE if kind == "llama" else None
            made[kind] = save_language_model(place, kind, template)
        return made[kind]

    return find


@pytest.fixture(scope="module")
def pubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a csv of twelve inputs with two references each."""
    path = tmp_path_factory.mktemp("pubs") / "pubs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        for name in NAMES:
            for food in FOODS:
                for kind in ("pub", "cafe"):
                    mr = f"name [ {name} ] , food [ {food} ] , a [ {kind} ]"
                    writer.writerow([mr, f"{name} is a {kind} ."])
                    writer.writerow([mr, f"The {kind} {name} serves {food} food ."])
    return path


def settings(model: Path, task: Path, place: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "task": str(task),
        "output_dir": str(place),
        "max_steps": 4,
        "eval_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 40,
        "max_new_tokens": 6,
        "num_beams": 2,
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "method"), [("gpt2", "bidora"), ("llama", "lora"), ("t5", "dora")]
)
def test_a_job_writes_and_is_scored(
    model: Callable[[str], Path], pubs: Path, tmp_path: Path, kind: str, method: str
) -> None:
    place = tmp_path / "run"
    own = {"outer_every": 1, "outer_warmup_steps": 0} if method == "bidora" else {}
    run = finish(**settings(model(kind), pubs, place, method=method, **own))
    last = run.result.phases[-1]
    assert {"loss", "perplexity", "token_accuracy"} <= set(last.test)
    assert {*last.test, *last.missing} >= {"bleu", "nist", "meteor", "rouge_l", "cider"}
    assert "meteor" in last.missing
    assert run.result.probe is None
    assert not run.result.baseline
    if method == "bidora":
        assert "bleu" not in run.result.phases[0].test  # the search writes nothing
        assert run.result.phases[0].outer_steps > 0
    # The output layer is the embedding in two of them, and stays as it is.
    adapted = json.loads((place / "adapter_config.json").read_text("utf-8"))
    assert not any("lm_head" in name for name in adapted["target_modules"])
    assert adapted["modules_to_save"] is None
    assert "- `meteor`: n/a (" in run.read("README.md")

    # References of one input are all in one part.
    rows = run.job.examples.rows
    tested = rows["test"].columns
    assert not set(rows["train"].columns["text"]) & set(tested["text"])

    kept = run.read("generated.jsonl")
    assert {record["part"] for record in kept} == {"test"}
    assert [record["input"] for record in kept] == [*dict.fromkeys(tested["text"])]
    assert sorted(r for record in kept for r in record["references"]) == sorted(
        tested["labels"]
    )

    output = tmp_path / "o.jsonl"
    words = ["predict", str(place), "--input", str(pubs), "--output", str(output)]
    assert main(words) == 0
    scored = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len(scored) == 24
    assert set(scored[0]) == {"mr", "ref", "generated"}
    by_input = {row["mr"]: row["generated"] for row in scored}
    assert all(row["generated"] == by_input[row["mr"]] for row in scored)
    # What was scored is what the saved model writes.
    for record in kept:
        assert record["generated"] == by_input[record["input"]]
    texts = [record["generated"] for record in kept]
    again = text_scores(texts, [record["references"] for record in kept]).scores
    assert again == {name: last.test[name] for name in again}


def test_learning_brings_the_text_out(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    # One text for every input: the model learns it word by word, its end too.
    path = tmp_path / "same.jsonl"
    rows = [{"mr": f"name [ {n} ]", "ref": "yes no ."} for n in (*NAMES, *FOODS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run = finish(
        **settings(
            model("llama"),
            path,
            tmp_path / "run",
            method="full",
            max_steps=30,
            learning_rate=3e-2,
        )
    )
    test = run.result.phases[-1].test
    assert test["token_accuracy"] == 1.0
    assert test["perplexity"] < 2
    asked = "name [ French ]\n"  # which no row had
    texts = write_texts(
        run.job.model,
        run.job.tokenizer,
        Dataset.from_dict({"input_ids": [run.job.tokenizer(asked)["input_ids"]]}),
        {"max_new_tokens": 9, "num_beams": 2, "do_sample": False},
        None,
    )
    assert texts == ["yes no ."]


def test_texts_of_test_and_validation_are_kept_though_a_scorer_fails(
    model: Callable[[str], Path],
    pubs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    few = tmp_path / "few.csv"  # five inputs of two references
    few.write_text("".join(pubs.read_text("utf-8").splitlines(True)[:11]), "utf-8")
    given = settings(model("gpt2"), pubs, tmp_path / "run", method="lora", max_steps=1)
    idle = METHODS.get("lora").ignores
    job = TrainSettings(
        **{n: x for n, x in given.items() if n not in idle}, validation_file=str(few)
    )
    monkeypatch.setattr("bidora.tasks.generation.text_scores", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(job)
    path = tmp_path / "run" / "generated.jsonl"
    first = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len({record["part"] for record in first}) == 1
    # The run goes on to its end, and has each text once.
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    train(job, resume=True)
    kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    parts = Counter(record["part"] for record in kept)
    assert parts.keys() == {"test", "validation"}
    assert parts["validation"] == 5
    assert kept[: len(first)] == first


def test_a_main_metric_that_cannot_be_computed_is_refused_before_a_model_is_loaded(
    pubs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path / "none", pubs, tmp_path / "run", method="lora")
    idle = METHODS.get("lora").ignores
    given = {n: x for n, x in given.items() if n not in idle}
    job = TrainSettings(**given, metric="bleu")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    heard = Heard()
    with pytest.raises(UserError, match="--model"):  # it goes on, to a missing model
        train(TrainSettings(**given), heard)
    (note,) = (
        line for line in heard.lines if line.startswith("Note   the metric bleu")
    )
    assert note.endswith("The run goes on, and tells it as n/a.")
    said = r"the metric bleu, .*pip install \"hypergrad-bidora\[generation\]"
    for dry_run in (False, True):
        with pytest.raises(UserError, match=said):
            train(job, dry_run=dry_run)
    assert not (tmp_path / "run").exists()
    # What scores no texts, such as `bidora estimators`, needs no scorer.
    read_examples(job, Listener(), searches=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--model"):
        train(job)


def test_left_padding_changes_no_text_and_nothing_else_changes(
    model: Callable[[str], Path],
) -> None:
    source = find_model(str(model("gpt2")))
    tokenizer = load_tokenizer(source)
    base: Any = load_base(
        source, tokenizer, make_task("generation"), Schema("generation")
    )
    assert base.head == []
    base.model.train()
    random.seed(0)
    prompts = [[random.randrange(7, 30) for _ in range(n)] for n in (3, 9, 20)]
    how = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    alone: list[str] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            one = base.model.eval().generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **how
            )
        new = one[:, len(prompt) :]
        alone += tokenizer.batch_decode(new, skip_special_tokens=True)
    base.model.train()
    side, state = tokenizer.padding_side, torch.get_rng_state()
    done: list[int] = []
    both = Dataset.from_dict({"input_ids": [*prompts, prompts[0]]})
    texts = write_texts(base.model, tokenizer, both, how, 48, done.append)
    assert texts == [*(text.strip() for text in alone), texts[0]]
    assert done == [3]  # equal prompts are worked on once
    assert base.model.training
    assert tokenizer.padding_side == side
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_end_where_the_model_does(model: Callable[[str], Path]) -> None:
    source = find_model(str(model("gpt2")))  # takes 48 tokens
    tokenizer = load_tokenizer(source)
    base: Any = load_base(
        source, tokenizer, make_task("generation"), Schema("generation")
    )
    prompt = Dataset.from_dict({"input_ids": [[9] * 46]})
    how = {"max_new_tokens": 20, "num_beams": 1, "do_sample": False}
    (text,) = write_texts(base.model, tokenizer, prompt, how, 48)
    assert len(text.split()) <= 2


def test_conversations_are_learnt_and_answered(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    chats = [
        [
            {"role": "user", "content": f"What {food} {n}"},
            {"role": "assistant", "content": f"{n} serves {food} food"},
        ]
        for n in NAMES
        for food in (*FOODS, "French")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats), "utf-8"
    )
    place = tmp_path / "run"
    run = finish(**settings(model("llama"), path, place, method="lora"))
    assert run.told[0].startswith("Type   instruction: the columns are called messages")
    test = run.result.phases[-1].test
    assert set(test) == {"loss", "perplexity", "token_accuracy"}
    assert run.result.metric == "token_accuracy"
    output = tmp_path / "answers.jsonl"
    words = ["predict", str(place), "--input", str(path), "--output", str(output)]
    assert main(words) == 0
    assert "generated" in json.loads(output.read_text().splitlines()[0])
    # A tokenizer without a template can't have it, and says what can be done.
    given = settings(model("gpt2"), path, tmp_path / "no", method="lora")
    with pytest.raises(UserError, match="no chat template"):
        train(TrainSettings(**given))


def test_early_stopping_asks_perplexity(
    model: Callable[[str], Path], pubs: Path, tmp_path: Path
) -> None:
    run = finish(
        **settings(
            model("gpt2"),
            pubs,
            tmp_path / "run",
            method="lora",
            eval_steps=2,
            early_stopping_patience=1,
            learning_rate=5.0,
        )
    )
    assert run.trainer.args.metric_for_best_model == "held_back_perplexity"
    assert run.trainer.args.greater_is_better is False
    assert run.result.phases[-1].best_global_step is not None


def test_what_does_not_fit_is_refused(
    model: Callable[[str], Path],
    pubs: Path,
    tmp_path: Path,
    tiny_encoder: Path,
    labelled_csv: Path,
) -> None:
    def refused(said: str, model: Path, **more: Any) -> None:
        idle = METHODS.get(more["method"]).ignores
        given = settings(model, pubs, tmp_path / "no", **more)
        with pytest.raises(UserError, match=said):
            train(TrainSettings(**{n: x for n, x in given.items() if n not in idle}))
        assert not (tmp_path / "no").exists()

    gpt2, llama = model("gpt2"), model("llama")
    refused("needs no new head: the model's own outputs", gpt2, method="probe")
    refused(r"no weights of a language model.*smollm2", tiny_encoder, method="lora")
    long = "tokens, and --max-length 5 keeps no token"
    refused(long, gpt2, method="lora", max_length=5)
    long = "--max-length 99 is more than the 48 tokens"
    refused(long, gpt2, method="lora", max_length=99)
    refused("bitfit trains biases", llama, method="bitfit")
    lengthy = tmp_path / "long.csv"
    rows = [f"{name} {'a ' * (60 * (name == 'Cotto'))},{name} is" for name in NAMES * 4]
    lengthy.write_text("\n".join(["mr,ref", *rows]) + "\n")
    said = (
        r"long.csv, line \d+.*the model takes 48 tokens, so shorten them or leave them"
    )
    given = {
        **settings(gpt2, lengthy, tmp_path / "no", method="lora"),
        "max_length": None,
    }
    idle = METHODS.get("lora").ignores
    with pytest.raises(UserError, match=said):
        train(TrainSettings(**{n: x for n, x in given.items() if n not in idle}))
    given = {"task": str(labelled_csv), "model": str(tiny_encoder), "num_beams": 2}
    with pytest.raises(UserError, match="--num-beams has no meaning for classificat"):
        train(TrainSettings(**given))
    for name in ("num_beams", "max_new_tokens"):
        with pytest.raises(UserError, match="a whole number of 1 or more"):
            TrainSettings.from_dict({name: 0})
