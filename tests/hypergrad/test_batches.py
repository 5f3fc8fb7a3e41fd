"""Batches: alone, or accumulated with weights."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hypergrad import Accumulated, MicroBatch, rng
from hypergrad.batches import as_micro_batches, check_fraction, part_of


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


class Pair(NamedTuple):
    """A batch with names, as collate functions make them."""

    x: Tensor
    y: Tensor


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 2), (0.3, 2), (0.5, 4), (1, 8)])
def test_a_part_is_the_first_examples_in_the_same_form(
    fraction: float, count: int
) -> None:
    x, y = torch.arange(16).reshape(8, 2), torch.arange(8)
    assert torch.equal(part_of(x, fraction), x[:count])
    batch = {"x": x, "deep": [y, (y, "name")], "scale": 3.0, "zero": torch.tensor(1.0)}
    part = part_of(batch, fraction)
    assert torch.equal(part["x"], x[:count])
    assert torch.equal(part["deep"][0], y[:count])
    assert torch.equal(part["deep"][1][0], y[:count])
    assert (part["deep"][1][1], part["scale"], part["zero"]) == ("name", 3.0, 1.0)
    named = part_of(Pair(x, y), fraction)
    assert isinstance(named, Pair)
    assert torch.equal(named.y, y[:count])


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (None, "a part of a NoneType was asked for, and it holds no tensor"),
        (["one", "two"], "holds no tensor"),
        (torch.tensor(1.0), "holds no tensor"),
        ({"x": torch.zeros(4), "y": torch.zeros(5)}, r"tensors of \[4, 5\] examples"),
        (
            torch.zeros(1, 7),
            r"0\.25 of a batch of 1 examples is less than one.*least 1",
        ),
    ],
)
def test_batches_that_cannot_be_divided(batch: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        part_of(batch, 0.25)


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), float("inf")])
def test_fractions_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"product_fraction=.* must be in \(0, 1\]"):
        check_fraction("product_fraction", value)
    with pytest.raises(TypeError, match="product_fraction=True must be a number"):
        check_fraction("product_fraction", True)
