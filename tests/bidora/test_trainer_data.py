"""Which examples each level of a trainer learns on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Value
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from bidora.trainer.data import OuterStream, select, split_indices

# -- the split -------------------------------------------------------------------------

# 30 of class 0 and 10 of class 1: with a quarter held back, 7 or 8 and 2 or 3 of them.
LABELS = [0] * 30 + [1] * 10


class Columns(TorchDataset[Any]):
    """A dataset whose labels are an attribute."""

    def __init__(self, labels: Any) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def named(column: str, kind: Any = None) -> Any:
    """Return a dataset of the datasets library with a column of labels."""
    features = kind and Features({column: kind, "x": Value("int64")})
    return Dataset.from_dict({column: LABELS, "x": range(40)}, features=features)


def renamed(batch: Any) -> Any:
    """A transform as of transformers' scripts: the model's inputs, and nothing else."""
    raise AssertionError("the transform was run for a look at the labels")


STRATIFIED = {
    "a transform that renames": named("label").with_transform(renamed),
    "rows of a part": Subset(named("label"), range(40)),
    "parts": ConcatDataset(
        [
            Columns(LABELS[:10]),
            named("label").select(range(10, 40)).with_format("numpy"),
        ]
    ),
    "label": named("label"),
    "labels": named("labels"),
    "ClassLabel": named("label", ClassLabel(names=["no", "yes"])),
    "torch format": named("labels").with_format("torch"),
    "numpy format": named("labels").with_format("numpy"),
    "attribute": Columns(LABELS),
    "array attribute": Columns(np.array(LABELS)),
    "tensor attribute": Columns(torch.tensor(LABELS)),
}


@pytest.mark.parametrize("kind", STRATIFIED)
def test_whole_number_labels_keep_their_shares(kind: str) -> None:
    inner, outer = split_indices(STRATIFIED[kind], 0.25, seed=1)
    assert sorted(inner + outer) == list(range(40))
    assert inner == sorted(inner)
    assert outer == sorted(outer)
    assert len(outer) == 10
    held = Counter(LABELS[i] for i in outer)
    assert set(held) == {0, 1}
    assert held[0] in (7, 8)
    assert split_indices(STRATIFIED[kind], 0.25, seed=1) == (inner, outer)
    assert split_indices(STRATIFIED[kind], 0.25, seed=2) != (inner, outer)


# One example of each label: a stratified split of them would be refused.
MULTI_HOT = [[float(i == j) for j in range(20)] for i in range(20)]

UNSTRATIFIED = {
    "a transform and no column": Dataset.from_dict({"x": range(20)}).with_transform(
        renamed
    ),
    "a transform over tokens": Dataset.from_dict(
        {"labels": [[i] for i in range(20)]}
    ).with_transform(renamed),
    "several labels": Dataset.from_dict({"labels": MULTI_HOT}),
    "several labels as an array": Dataset.from_dict(
        {"labels": [[row] for row in np.eye(20, dtype=int).tolist()]},
        features=Features({"labels": Array2D((1, 20), "int64")}),
    ),
    "some unknown": Dataset.from_dict({"labels": [None, *range(19)]}),
    "parts of which one is not known": ConcatDataset(
        [TensorDataset(torch.arange(10)), Columns(list(range(10)))]
    ),
    "floats": Dataset.from_dict({"labels": [float(i) for i in range(20)]}),
    "float tensors": Columns(torch.arange(20.0)),
    "booleans": Dataset.from_dict({"labels": [True] + [False] * 19}),
    "tokens": Dataset.from_dict({"labels": [[i, i + 1] for i in range(20)]}),
    "token tensors": Columns(torch.arange(40).reshape(20, 2)),
    "text": Dataset.from_dict({"label": [f"class {i}" for i in range(20)]}),
    "other columns": Dataset.from_dict({"x": list(range(20))}),
    "no columns": TensorDataset(torch.arange(20)),
    "a list": [{"labels": i} for i in range(20)],
}


@pytest.mark.parametrize("kind", UNSTRATIFIED)
def test_other_labels_are_split_at_random(kind: str) -> None:
    inner, outer = split_indices(UNSTRATIFIED[kind], 0.2, seed=0)
    assert sorted(inner + outer) == list(range(20))
    assert len(outer) == 4


def test_a_fraction_of_0_holds_nothing_back() -> None:
    assert split_indices([7, 8, 9], 0.0, seed=0) == ([0, 1, 2], [])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_split(count: int) -> None:
    with pytest.raises(
        ValueError, match=f"has {count} example.*too few.*outer_dataset"
    ):
        split_indices([{}] * count, 0.2, seed=0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 0, 0, 1], r"single example: 1\. .*add examples.*floats.*outer_dataset"),
        ([0, 0, 1, 1, 2, 2], "6 examples of 3 classes are too few to hold 5 of"),
    ],
)
def test_classes_too_small_to_split(labels: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split_indices(Columns(labels), 0.7, seed=0)


def test_a_part_is_of_the_same_kind_where_it_can_be() -> None:
    part = select(named("label"), [3, 5])
    assert isinstance(part, Dataset)
    assert part["x"][:] == [3, 5]
    part = select(["a", "b", "c"], [2, 0])
    assert isinstance(part, Subset)
    assert [*part] == ["c", "a"]


# -- the outer batches -----------------------------------------------------------------


def stream(rank: int = 0, world_size: int = 1, **settings: Any) -> OuterStream:
    own = {"batch_size": 4, "seed": 5, **settings}
    return OuterStream(range(10), list, rank=rank, world_size=world_size, **own)


def test_every_example_comes_once_an_epoch() -> None:
    """10 examples in batches of 4: five batches are two epochs."""
    draw = stream()
    drawn = [i for _ in range(5) for i in draw()]
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_ranks_share_out_the_same_row() -> None:
    """Two ranks with batches of 4 take what one with batches of 8 takes."""
    both = [stream(rank, 2) for rank in (0, 1)]
    one = stream(batch_size=8)
    for _ in range(4):
        parts = [draw() for draw in both]
        assert parts[0] + parts[1] == one()


def test_ranks_draw_other_examples() -> None:
    parts = [stream(rank, 2)() for rank in (0, 1)]
    assert len({*parts[0], *parts[1]}) == 8


def test_the_number_drawn_is_the_whole_state() -> None:
    whole = stream()
    batches = [whole() for _ in range(7)]
    for drawn in range(7):
        late = stream()
        late.drawn = drawn
        torch.manual_seed(drawn)
        assert late() == batches[drawn]


def test_drawing_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    draw = stream()
    for _ in range(4):
        draw()
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_is_another_order() -> None:
    assert stream()() == stream()() != stream(seed=6)()


def test_a_batch_of_more_examples_than_there_are() -> None:
    said = "outer batch of 6 examples for each of 2 .* more than the 10 .* Lower"
    with pytest.raises(ValueError, match=said):
        stream(world_size=2, batch_size=6)
