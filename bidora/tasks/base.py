"""The contract of a task: what a kind of data means, and nothing of how it is trained.

A task holds settings only. What it finds out about the data is a `Schema`, which is
saved with the run, so that new rows can be scored years later.
"""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from bidora.runs.job_settings import JobSettings

__all__ = ["Rows", "Schema", "Task", "draw_in_proportion", "stratified_split"]


@dataclass(frozen=True)
class Schema:
    """What a task found out about its data: all that predicting needs, as JSON holds it.

    Args:
        task: The task's name in the registry.
        settings: The task's settings, resolved: the columns by name, and so on.
        label_names: Classes, labels or tags, in the order of the model's outputs; empty
            for a regression.
        metric: The main metric, a key of what `Task.metrics` returns.
        details: What else a task keeps: ranges, tag schemes.
    """

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    metric: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schema:
        """Return the schema that `to_dict` was called on.

        Example:
            >>> one = Schema("regression", label_names=(), metric="pearson")
            >>> Schema.from_dict(one.to_dict()) == one
            True
        """
        return cls(**{**values, "label_names": tuple(values["label_names"])})


@dataclass(frozen=True)
class Rows:
    """Examples as a task reads them: clean columns, and what was wrong with the others.

    Args:
        columns: One value an example, by name. What the model is to give is in
            `labels`, where it is known.
        places: Where each example stands in its source.
        bad: One sentence for each row that can't be used, beginning with its place.
            Such rows are in no column.
    """

    columns: dict[str, list[Any]]
    places: list[str]
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of usable examples."""
        return len(self.places)

    def select(self, indices: Sequence[int]) -> Rows:
        """Return the examples at `indices`, in that order.

        Example:
            >>> Rows({"text": ["a", "b"]}, ["line 1", "line 2"]).select([1]).places
            ['line 2']
        """
        return Rows(
            {
                name: [values[i] for i in indices]
                for name, values in self.columns.items()
            },
            [self.places[i] for i in indices],
        )


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What a kind of data means: its columns, features, model head and scores.

    A subclass is a frozen dataclass whose fields are settings. The fields' names are
    those of the job's settings (`text_column`, `label_column`, ...), and every field has
    a default. Nothing here imports torch until features are made.

    Attributes:
        name: Name in the registry, and on the command line.
        peft_type: PEFT's name for the kind of task, such as `SEQ_CLS`; None for kinds
            that PEFT has no name for, such as images.
        auto_model: The class of transformers that loads such a model.
        auto_processor: The class of transformers that loads what makes the model's
            inputs.
        lazy: Whether features are made when a batch needs them: those of images would
            fill the memory.
        main_metric: The metric that choices are made by, a key of what `metrics`
            returns; a schema may name another.
        greater_is_better: Whether more of it is better.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str | None]
    auto_model: ClassVar[str]
    auto_processor: ClassVar[str] = "AutoTokenizer"
    lazy: ClassVar[bool] = False
    main_metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True

    def check(self, settings: JobSettings) -> None:
        """Refuse settings of a job that do not go with the task.

        Args:
            settings: Of the job.

        Raises:
            UserError: If there is one.
        """
        del settings

    @abstractmethod
    def schema(self, source: Source) -> Schema:
        """Find out what the data is, from its training part.

        Args:
            source: The examples.

        Returns:
            Columns and classes, by name.

        Raises:
            UserError: If the data is not of this kind.
        """

    @abstractmethod
    def rows(self, table: Table, schema: Schema, *, labelled: bool = True) -> Rows:
        """Read a table: every bad row is told, and none of them stops it.

        Args:
            table: Rows of the source, or new ones.
            schema: Of the training data.
            labelled: Whether labels are read; new rows to score need none.

        Returns:
            Clean examples.

        Raises:
            UserError: If a column is missing.
        """

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Return lines that tell a user what was understood, and what looks odd.

        Args:
            rows: Examples by part.
            schema: Of the data.
        """
        del rows, schema
        return []

    def strata(self, rows: Rows, schema: Schema) -> Sequence[Hashable] | None:
        """Return what a split has to keep the shares of; None for a split at random.

        Args:
            rows: The examples.
            schema: Of the data.
        """
        del rows, schema
        return None

    def split(
        self, rows: Rows, schema: Schema, fraction: float, seed: int
    ) -> tuple[list[int], list[int]]:
        """Split examples in two parts that are alike.

        Args:
            rows: The examples.
            schema: Of the data.
            fraction: Share of the second part, in (0, 1).
            seed: Equal seeds give equal splits.

        Returns:
            Sorted indices of the first and of the second part.

        Raises:
            UserError: If there are too few examples.
        """
        strata = self.strata(rows, schema)
        names = None
        if strata is not None and schema.label_names and _are_indices(strata, schema):
            names = dict(enumerate(schema.label_names))
        return stratified_split(strata or [0] * len(rows), fraction, seed, names)

    def draw(self, rows: Rows, schema: Schema, count: int, seed: int) -> list[int]:
        """Draw some of the examples, with the strata in proportion.

        Args:
            rows: The examples.
            schema: Of the data.
            count: How many; all where there are no more.
            seed: Equal seeds give equal draws.

        Returns:
            Sorted indices.

        Raises:
            UserError: If that is fewer than one of each stratum.
        """
        if count >= len(rows):
            return list(range(len(rows)))
        strata = self.strata(rows, schema)
        if strata is not None:
            return draw_in_proportion(strata, count, seed)
        # Splits round up: half an example less gives this very number.
        rest, found = self.split(rows, schema, (count - 0.5) / len(rows), seed)
        dealer = random.Random(seed)
        if len(found) < count:  # several labels: shares come first there
            found = [*found, *dealer.sample(rest, count - len(found))]
        return sorted(dealer.sample(found, count))

    @abstractmethod
    def model_kwargs(self, schema: Schema) -> dict[str, Any]:
        """Return what `from_pretrained` is told: outputs, their names, the kind of loss.

        Args:
            schema: Of the data.
        """

    @abstractmethod
    def features(
        self,
        batch: Mapping[str, list[Any]],
        processor: Any,
        schema: Schema,
        length: int,
    ) -> dict[str, list[Any]]:
        """Turn columns of `rows` into model inputs, for `Dataset.map(batched=True)`.

        Args:
            batch: Columns, with `labels` where they are known.
            processor: The model's tokenizer or image processor.
            schema: Of the data.
            length: Tokens kept of an example.

        Returns:
            One list an input, `labels` among them where they are known.
        """

    def usual_pooling(self, schema: Schema) -> str:
        """Return how tokens are pooled where the model does not say how it was trained.

        Args:
            schema: Of the data.
        """
        del schema
        return "head"

    def fit_processor(self, processor: Any, schema: Schema) -> Any:
        """Return the processor as the task needs it; it is saved with the run.

        Args:
            processor: The model's tokenizer or image processor.
            schema: Of the data.

        Raises:
            UserError: If it does not suit the task.
        """
        del schema
        return processor

    def count_over_long(self, rows: Rows, processor: Any, length: int) -> int:
        """Return how many examples are cut; 0 for tasks that cut none.

        Args:
            rows: The examples.
            processor: The model's tokenizer or image processor.
            length: Tokens kept of an example.
        """
        del rows, processor, length
        return 0

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return what makes a batch of a list of features.

        Args:
            processor: The model's tokenizer or image processor.
        """

    @abstractmethod
    def metrics(
        self, predictions: np.ndarray, labels: np.ndarray, schema: Schema
    ) -> dict[str, float]:
        """Score predictions, the main metric among others.

        Args:
            predictions: The model's outputs, one row an example.
            labels: What they should have been, as the collator made them.
            schema: Of the data.
        """

    @abstractmethod
    def answers(
        self,
        predictions: np.ndarray,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Turn outputs into what a user reads: labels, probabilities, numbers, spans.

        Args:
            predictions: The model's outputs, one row an example of `rows`.
            rows: What they are predictions of.
            schema: Of the training data.
            labels: What the collator made of the rows, for tasks that need it to tell
                which outputs belong to what; `Trainer.predict` returns it.

        Returns:
            One dict an example, with the same keys for all.
        """

    def settings(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)


def stratified_split(
    strata: Sequence[Any],
    fraction: float,
    seed: int,
    names: Mapping[Any, str] | None = None,
) -> tuple[list[int], list[int]]:
    """Split indices in two parts that keep the shares of the strata.

    Args:
        strata: The stratum of each example.
        fraction: Share of the examples in the second part, in (0, 1). At least as
            many examples as there are strata go there.
        seed: Equal seeds give equal splits.
        names: Names of the strata, for the error message.

    Returns:
        Sorted indices of the first and of the second part.

    Raises:
        UserError: If `fraction` is out of range, a stratum has a single example, or
            there are too few examples for one of every stratum in each part.

    Example:
        >>> stratified_split([0, 0, 1, 1], 0.5, seed=0)[1].__len__()
        2
    """
    from sklearn.model_selection import train_test_split

    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"a validation fraction of {fraction} leaves one part empty; choose a "
            "number between 0 and 1, such as 0.2."
        )
    counts = Counter(strata)
    names = {s: str(names[s]) if names else str(s) for s in counts}
    lonely = sorted(names[s] for s, n in counts.items() if n < 2)
    if lonely:
        raise UserError(
            f"class(es) with a single example: {', '.join(lonely[:8])}. A stratified "
            "split needs one for each part; add examples of them, or drop them with "
            "--min-examples-per-class."
        )
    held = max(math.ceil(fraction * len(strata)), len(counts))
    if len(strata) - held < len(counts):
        raise UserError(
            f"{len(strata)} examples of {len(counts)} classes are too few to hold "
            f"{held} of them back; add examples, or choose a smaller fraction than "
            f"{fraction}."
        )
    first, second = train_test_split(
        list(range(len(strata))),
        test_size=held,
        stratify=list(strata),
        random_state=seed,
    )
    return sorted(first), sorted(second)


def draw_in_proportion(strata: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Draw indices, each stratum by its share and at least once.

    Shares are rounded down, and what is left goes to those that lost most by it.

    Args:
        strata: The stratum of each example.
        count: How many to draw, fewer than there are.
        seed: Equal seeds give equal draws.

    Returns:
        Sorted indices.

    Raises:
        UserError: If that is fewer than one of each stratum.

    Example:
        >>> drawn = draw_in_proportion(["a"] * 6 + ["b"] * 3 + ["c"], 5, seed=0)
        >>> [sum(i in part for i in drawn) for part in (range(6), range(6, 9), [9])]
        [3, 1, 1]
    """
    places: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        places.setdefault(stratum, []).append(place)
    if len(places) > count:
        raise UserError(
            f"{count} of {len(strata)} examples are too few for one of each of the "
            f"{len(places)} classes. Ask for more."
        )
    shares = {s: len(found) * count / len(strata) for s, found in places.items()}
    taken = {s: max(1, int(share)) for s, share in shares.items()}
    while (left := count - sum(taken.values())) != 0:
        lost = {s: shares[s] - taken[s] for s in shares}
        if left > 0:
            taken[max(lost, key=lost.__getitem__)] += 1
        else:  # to have one of each, the strata with most above their share give
            taken[min((s for s in lost if taken[s] > 1), key=lost.__getitem__)] -= 1
    dealer = random.Random(seed)
    return sorted(i for s, n in taken.items() for i in dealer.sample(places[s], n))


def _are_indices(strata: Sequence[Hashable], schema: Schema) -> bool:
    return all(isinstance(s, int) and 0 <= s < len(schema.label_names) for s in strata)
