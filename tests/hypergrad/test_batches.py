"""Batches: alone, or accumulated with weights."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from hypergrad import Accumulated, MicroBatch, rng
from hypergrad.batches import as_micro_batches


@pytest.mark.parametrize(
    "batch", [None, torch.ones(2), {"x": 1}, (1, 2), [1, 2], "text", (), 0]
)
def test_anything_is_a_batch(batch: Any) -> None:
    (micro,) = as_micro_batches(batch)
    assert micro.batch is batch
    assert (micro.weight, micro.rng_state, micro.attention) == (1.0, None, "default")
    assert as_micro_batches(batch, "math")[0].attention == "math"


def test_micro_batches_pass_as_they_are() -> None:
    one = MicroBatch("a", 0.25, rng.capture(), "math")
    assert as_micro_batches(one) == (one,)
    assert as_micro_batches((one, one)) == (one, one)
    both = Accumulated([one, "b"])
    assert as_micro_batches(both) == tuple(both)
    # A tuple of something else is a batch.
    assert len(as_micro_batches((one, "b"))) == 1


def test_weights_default_to_the_mean() -> None:
    assert [m.weight for m in Accumulated(["a", "b", "c", "d"])] == [0.25] * 4
    weights: Any = [3, torch.tensor(0.5)]
    assert [m.weight for m in Accumulated(["a", "b"], weights)] == [3.0, 0.5]
    drawn: Any = (str(i) for i in range(3))
    assert [m.batch for m in Accumulated(drawn)] == ["0", "1", "2"]


def test_a_micro_batch_keeps_its_state_and_multiplies_its_weight() -> None:
    state = rng.capture()
    (first, second) = Accumulated([MicroBatch("a", 0.5, state), "b"], [0.5, 2.0])
    assert first.weight == 0.25
    assert first.rng_state is state
    assert first.batch == "a"
    assert second.weight == 2.0


@pytest.mark.parametrize(
    "again", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_equal(again: Any) -> None:
    batches = Accumulated(["a", "b"], [0.25, 0.75])
    twin = again(batches)
    assert type(twin) is Accumulated
    assert twin == batches


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        (([],), ValueError, "batches is empty"),
        ((["a"], [0.5, 0.5]), ValueError, "1 batches and 2 weights"),
        ((["a"], [math.nan]), ValueError, r"weights=\[nan\] must be finite"),
        ((["a"], [math.inf]), ValueError, r"weights=\[inf\] must be finite"),
        (({"input_ids": 1},), TypeError, "a dict, which looks like a single batch"),
        ((torch.ones(3),), TypeError, "a Tensor, which looks like a single batch"),
        (("text",), TypeError, "a str"),
        ((MicroBatch("a"),), TypeError, "a MicroBatch"),
    ],
)
def test_what_is_refused(args: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        Accumulated(*args)
