"""Two texts, each read by itself: what a head sees of them, and jobs that do it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig

from bidora.errors import UserError
from bidora.models import Base, find_model, load_base, load_tokenizer
from bidora.pooling import CONTRASTS, PooledModel, contrast, pool
from bidora.runs.encoding import encode, unknown
from bidora.runs.export import export
from bidora.runs.predict import load_run, predict
from bidora.tasks.base import Rows, Schema
from bidora.tasks.registry import make_task
from tests.bidora.conftest import WORDS, Finished, finish
from tests.bidora.test_pooled_models import encoder
from tests.tolerances import error, tol

pytestmark = [
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),
]

COLUMNS = {"text_column": "sentence1", "text_pair_column": "sentence2"}
PAIRED = Schema("classification", COLUMNS, ("different", "same"), "accuracy")
SINGLE = Schema("classification", {"text_column": "text"}, ("a", "b"), "accuracy")

# -- what the head reads -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contrast_is_that_of_numpy(dtype: torch.dtype) -> None:
    u, v = torch.randn(2, 5, 7, dtype=torch.float64).to(dtype)
    found = contrast(u, v)
    assert found.dtype == dtype
    assert found.shape == (5, CONTRASTS * 7)
    a, b = (
        x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(7)
        for x in (u.double().numpy(), v.double().numpy())
    )
    truth = np.concatenate([a * b, (a - b) ** 2, a - b], axis=1)
    # Two roundings of each vector, one of each sum and product; differences cancel.
    assert error(found, torch.as_tensor(truth)) <= tol(dtype, cond=10)
    cosines = (a * b).mean(axis=1)
    assert error(found[:, :7].mean(1), torch.as_tensor(cosines)) <= tol(dtype, cond=10)


def test_the_last_third_alone_tells_which_text_came_first() -> None:
    u, v = torch.randn(2, 3, 4, dtype=torch.float64)
    one, other = contrast(u, v), contrast(v, u)
    assert torch.equal(one[:, :8], other[:, :8])
    assert torch.equal(one[:, 8:], -other[:, 8:])


def test_contrast_has_both_derivatives_also_of_equal_texts() -> None:
    u = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    v = u.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(contrast, (u, v))
    assert torch.autograd.gradgradcheck(contrast, (u, v))


def test_a_vector_of_zeros_is_finite() -> None:
    u = torch.zeros(1, 4, requires_grad=True)
    found = contrast(u, torch.ones(1, 4))
    assert torch.equal(found[:, :4], torch.zeros(1, 4))
    found.sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()


def model_of(**given: Any) -> PooledModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = BertConfig(**sizes, **{"pooling": "mean", "num_labels": 3, **given})
    return PooledModel(config).double().eval()


def batch_of(lengths: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    width, batch = max(map(max, lengths)), {}
    for prefix, those in zip(("", "pair_"), lengths, strict=True):
        mask = (torch.arange(width) < torch.tensor(those).unsqueeze(1)).long()
        ids = torch.randint(3, 40, mask.shape) * mask
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    return batch


def test_each_text_is_read_without_the_other() -> None:
    model, batch = model_of(pairs="apart"), batch_of(([5, 2, 4], [3, 6, 1]))
    with torch.no_grad():
        vectors = []
        for prefix in ("", "pair_"):
            one = []
            for ids, mask in zip(
                batch[f"{prefix}input_ids"],
                batch[f"{prefix}attention_mask"],
                strict=True,
            ):
                kept = ids[mask == 1].unsqueeze(0)  # alone, without padding
                states = model.body(kept).last_hidden_state
                one.append(pool(states, None, "mean"))
            vectors.append(torch.cat(one))
        truth = model.head(contrast(*vectors))
        found = model(**batch).logits
    assert error(found, truth) <= tol(torch.float64, cond=10)


def test_a_batch_without_its_second_texts_is_refused() -> None:
    batch = batch_of(([3], [2]))
    first = {n: v for n, v in batch.items() if not n.startswith("pair_")}
    with pytest.raises(ValueError, match=r"give it input_ids and pair_input_ids"):
        model_of(pairs="apart")(**first)
    with pytest.raises(ValueError, match=r"reads no second text by itself"):
        model_of()(**batch)


# -- from --pairs to a model ---------------------------------------------------------------


def base_of(folder: Path, schema: Schema = PAIRED, **given: Any) -> Base:
    source, task = find_model(str(folder)), make_task(schema.task)
    return load_base(source, load_tokenizer(source), task, schema, **given)


def test_a_sentence_encoder_reads_them_apart(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = encoder(tiny_encoder, tmp_path)
    base = base_of(folder)
    assert (base.pairs, base.model.config.pairs) == ("apart", "apart")
    assert base.model.head.in_features == CONTRASTS * 16
    for other in (
        base_of(folder, pairs="together"),
        base_of(folder, SINGLE),
        base_of(folder, pooling="head"),
        base_of(tiny_encoder),  # which does not say what it was trained for
        base_of(tiny_encoder, pooling="mean"),
    ):
        assert other.pairs == "together"
    assert base_of(tiny_encoder, pooling="mean", pairs="apart").pairs == "apart"


def test_the_bundled_encoder_reads_them_apart() -> None:
    try:
        source = find_model()
    except UserError as missing:
        pytest.skip(f"needs the bundled model, of the extra demo: {missing}")
    tokenizer, task = load_tokenizer(source), make_task("classification")
    assert load_base(source, tokenizer, task, PAIRED).pairs == "apart"


def test_what_cannot_be_read_apart_is_refused(tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"an example has one; .* --text-pair-column"):
        base_of(tiny_encoder, SINGLE, pooling="mean", pairs="apart")
    with pytest.raises(UserError, match=r"needs one vector .* add --pooling mean"):
        base_of(tiny_encoder, pairs="apart")
    tags = Schema("tagging", {}, ("O", "B-X"), "f1")
    with pytest.raises(UserError, match=r"--pairs apart is about two texts"):
        base_of(tiny_encoder, tags, pairs="apart")


def test_a_model_that_was_saved_whole_reads_as_it_did(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    first = base_of(encoder(tiny_encoder, tmp_path / "first"))
    second = tmp_path / "second"
    first.model.save_pretrained(second)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(second)
    again = base_of(second)
    assert again.pairs == "apart"
    for name, value in first.model.body.state_dict().items():
        assert torch.equal(again.model.body.state_dict()[name], value), name
    assert base_of(second, SINGLE).model.head.in_features == 16
    assert base_of(second, pairs="together").pairs == "together"


# -- features and batches ------------------------------------------------------------

TEXTS: dict[str, list[Any]] = {
    "text": ["apple pear plum", "crow"],
    "text_pair": ["the iron", "zinc copper tin iron of"],
    "labels": [0, 1],
}


def apart_task() -> Any:
    given: dict[str, Any] = {"pairs": "apart"}
    return make_task("classification").for_model(BertConfig(**given))


def test_batches_are_padded_to_one_length(tiny_encoder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_encoder)))
    task = apart_task()
    features = task.features(TEXTS, tokenizer, PAIRED, 5)
    assert [len(ids) for ids in features["input_ids"]] == [5, 3]
    seconds = [len(ids) for ids in features["pair_input_ids"]]
    assert seconds == [4, 5]  # the longer is cut
    examples = [{n: v[i] for n, v in features.items()} for i in range(2)]
    batch = task.collator(tokenizer)(examples)
    names = {"input_ids", "attention_mask", "pair_input_ids", "pair_attention_mask"}
    assert set(batch) == {*names, "labels"}
    assert batch["labels"].tolist() == [0, 1]
    for name in names:
        assert batch[name].shape == (2, 5)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]
    assert batch["pair_attention_mask"].sum(1).tolist() == [4, 5]
    words = tokenizer.decode(batch["pair_input_ids"][0], skip_special_tokens=True)
    assert words == "the iron"
    rows = Rows(TEXTS, ["row 1", "row 2"])
    assert task.count_over_long(rows, tokenizer, 5) == 1
    assert task.count_over_long(rows, tokenizer, 7) == 0
    together = make_task("classification")
    assert together.count_over_long(rows, tokenizer, 7) == 2


def test_unknown_words_of_the_second_text_count(tiny_encoder: Path) -> None:
    tokenizer = load_tokenizer(find_model(str(tiny_encoder)))
    task = apart_task()
    columns = {**TEXTS, "text_pair": ["the quokka", "iron"]}
    rows = Rows(columns, ["row 1", "row 2"])
    found = encode(rows, task, PAIRED, tokenizer, 8)
    # [CLS] a b c [SEP], [CLS] the ? [SEP]; [CLS] a [SEP], [CLS] b [SEP]
    assert unknown(found, tokenizer) == (1, 1 / 15)


# -- jobs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a csv file of 60 pairs of words, which are of one kind or not."""
    kinds, rows = list(WORDS), []
    for i in range(60):
        same = i % 2
        first = WORDS[kinds[i % 3]]
        second = WORDS[kinds[(i + 1 - same) % 3]]
        label = ("different", "same")[same]
        rows.append((f"the {first[i % 4]}", f"a {second[i // 4 % 4]}", label))
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "label"])
        writer.writerows(rows)
    return path


def run_of(
    method: str, small_job: dict[str, Any], pairs_csv: Path, place: Path
) -> Finished:
    own: dict[str, Any] = {"task": str(pairs_csv), "max_steps": 4, "method": method}
    if method == "bidora":
        own |= {"estimator": "neumann", "outer_every": 2, "outer_warmup_steps": 0}
    model = encoder(Path(small_job["model"]), place / "base")
    return finish(
        **{**small_job, **own, "model": str(model)}, output_dir=str(place / "run")
    )


@pytest.mark.parametrize("method", ["lora", "full", "bidora"])
def test_a_job_on_pairs_is_loaded_scored_and_exported(
    method: str,
    small_job: dict[str, Any],
    pairs_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of(method, small_job, pairs_csv, tmp_path)
    assert run.read("settings.json")["pairs"] == "apart"
    assert any("read apart" in line for line in run.told)
    assert not run.result.phases[0].skipped
    truth, allowed = (
        run.logits(),
        tol(torch.float32, cond=run.condition_of_the_head()),
    )
    loaded, _ = load_run(run.folder)
    assert error(run.logits(loaded), truth) <= allowed

    rows = run.job.examples.rows["test"].columns
    file, output = tmp_path / "new.csv", tmp_path / "out.jsonl"
    with file.open("w", newline="", encoding="utf-8") as new:
        writer = csv.writer(new)
        writer.writerow(["sentence1", "sentence2"])
        writer.writerows(zip(rows["text"], rows["text_pair"], strict=True))
    predict(run.folder, file, output)
    said = [json.loads(line) for line in output.read_text().splitlines()]
    found = torch.tensor([[s["p(different)"], s["p(same)"]] for s in said])
    assert error(found, truth.double().softmax(-1)) <= allowed

    done = export(run.folder, tmp_path / "whole")
    lines: dict[str, Any] = {}
    exec(done.loading_code, lines)
    assert error(run.logits(lines["model"]), truth) <= allowed
    if method != "bidora":  # whose magnitudes plain PEFT's forward takes for its own
        code = re.search(r"```python\n(.*?)```", run.read("README.md"), re.DOTALL)
        assert code
        monkeypatch.chdir(run.folder)
        lines = {}
        exec(code[1], lines)
        assert error(run.logits(lines["model"]), truth) <= allowed
