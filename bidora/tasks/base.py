"""What a task is: labelled texts, their split, their scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bidora.errors import UserError

__all__ = ["Examples", "Task", "classification_scores", "holdout_split"]


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of texts, with the index of each one's label.

    Args:
        texts: One text an example.
        labels: One index into the task's `label_names` an example.
        pairs: The second text of each example, for sentence-pair tasks.

    Raises:
        ValueError: If the lengths differ.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    pairs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check that every example has a text and a label."""
        sizes = {len(self.texts), len(self.labels)}
        if self.pairs is not None:
            sizes.add(len(self.pairs))
        if len(sizes) != 1:
            raise ValueError(
                f"texts, labels and pairs differ in length: {sorted(sizes)}; "
                "give one of each for every example"
            )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> Examples:
        """Return the examples at `indices`, in that order.

        Example:
            >>> Examples(("a", "b", "c"), (0, 1, 0)).select([2, 0]).texts
            ('c', 'a')
        """
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in indices)
        return Examples(
            tuple(self.texts[i] for i in indices),
            tuple(self.labels[i] for i in indices),
            pairs,
        )


@dataclass(frozen=True)
class Task:
    """A text classification task with its training and its test examples.

    Args:
        name: What the user called it.
        train: Everything that may be trained on; a search splits it further.
        test: Examples that nothing is ever trained or chosen on.
        label_names: The classes, in the order of the label indices.
        source: One sentence that says where the examples come from.
        columns: Names of the text column or columns, for the record.

    Raises:
        UserError: If there are fewer than two classes or an empty part.
    """

    name: str
    train: Examples
    test: Examples
    label_names: tuple[str, ...]
    source: str = ""
    columns: tuple[str, ...] = field(default=("text",))

    def __post_init__(self) -> None:
        """Check that there is something to learn and something to test on."""
        present = {self.label_names[i] for i in set(self.train.labels)}
        if len(present) < 2:
            raise UserError(
                f"task {self.name!r}: the training examples have "
                f"{len(present)} class(es) ({', '.join(sorted(present)) or 'none'}); "
                "classification needs two or more. Check which column holds the "
                "labels (--label-column)."
            )
        if len(self.test) == 0:
            raise UserError(
                f"task {self.name!r} has no labelled test examples; give some with "
                "--test-file."
            )

    def describe(self) -> str:
        """Return one line with the task's name and sizes."""
        return (
            f"{self.name}: {len(self.label_names)} classes, {len(self.train)} "
            f"training and {len(self.test)} test examples"
        )


def holdout_split(
    labels: Sequence[int],
    fraction: float,
    seed: int,
    label_names: Sequence[str] | None = None,
) -> tuple[list[int], list[int]]:
    """Split indices in two parts that keep the shares of the labels.

    Args:
        labels: The label of each example.
        fraction: Share of the examples in the second part, in (0, 1). At least as
            many examples as there are classes go there.
        seed: Equal seeds give equal splits.
        label_names: Names of the labels, for the error message.

    Returns:
        Sorted indices of the first and of the second part.

    Raises:
        UserError: If `fraction` is out of range, a class has a single example, or
            there are too few examples for one of every class in each part.

    Example:
        >>> holdout_split([0, 0, 1, 1], 0.5, seed=0)[1].__len__()
        2
    """
    from sklearn.model_selection import train_test_split

    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"a validation fraction of {fraction} leaves one part empty; choose a "
            "number between 0 and 1, such as 0.2."
        )
    counts = Counter(labels)
    names = {i: label_names[i] if label_names else str(i) for i in counts}
    lonely = sorted(names[i] for i, n in counts.items() if n < 2)
    if lonely:
        raise UserError(
            f"class(es) with a single example: {', '.join(lonely[:8])}. A stratified "
            "split needs one for each part; add examples of them, or drop them."
        )
    held = max(math.ceil(fraction * len(labels)), len(counts))
    if len(labels) - held < len(counts):
        raise UserError(
            f"{len(labels)} examples of {len(counts)} classes are too few to hold "
            f"{held} of them back; add examples, or choose a smaller fraction than "
            f"{fraction}."
        )
    first, second = train_test_split(
        list(range(len(labels))),
        test_size=held,
        stratify=list(labels),
        random_state=seed,
    )
    return sorted(first), sorted(second)


def classification_scores(
    labels: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
    """Return accuracy and macro-F1.

    Macro-F1 is the plain mean over classes of `2 TP / (2 TP + FP + FN)`; a class that
    is never predicted counts 0.

    Args:
        labels: True label indices.
        predictions: Predicted label indices.

    Returns:
        `{"accuracy": ..., "macro_f1": ...}`, each in [0, 1].

    Example:
        >>> classification_scores([0, 0, 1, 1], [0, 0, 1, 0])
        {'accuracy': 0.75, 'macro_f1': 0.7333333333333334}
    """
    from sklearn.metrics import accuracy_score, f1_score

    zero: Any = 0  # the stubs know words alone
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(
            f1_score(labels, predictions, average="macro", zero_division=zero)
        ),
    }
