"""The contract of a task: what a kind of data means, and nothing of how it is trained.

A task holds settings only. What it finds out about the data is a `Schema`, which is
saved with the run, so that new rows can be scored years later.
"""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.tasks.splits import (
    draw_groups,
    draw_in_proportion,
    grouped_split,
    stratified_split,
)

if TYPE_CHECKING:
    import numpy as np

    from bidora.runs.job_settings import JobSettings

__all__ = [
    "Rows",
    "Schema",
    "Task",
    "TextScores",
]


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


@dataclass(frozen=True)
class TextScores:
    """Scores of generated texts.

    Args:
        scores: By metric.
        missing: Why a metric could not be computed, by its name; it is told as `n/a`.
    """

    scores: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)


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
        judged_by: What is measured at every evaluation, drawn, and stops a run early,
            where the main metric is too dear for that; less of it is better. Empty where
            it is the main metric.
        has_probe: Whether a linear head on the frozen model answers such a task, so that
            a job begins with one. Without, a job begins with its first phase, and the
            method `probe` is refused.
        usual_length: Tokens kept of an example where neither the user nor the data says;
            None for the job's own number.
        evaluation_batch: Examples of a batch in evaluations.
        scores_texts: Whether a run ends with texts that the model writes for its test and
            validation examples, and `text_scores` of them.
        takes_two_parts: Whether an encoder-decoder can have it, where texts are written.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str | None]
    auto_model: ClassVar[str]
    auto_processor: ClassVar[str] = "AutoTokenizer"
    lazy: ClassVar[bool] = False
    main_metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    judged_by: ClassVar[str] = ""
    has_probe: ClassVar[bool] = True
    usual_length: ClassVar[int | None] = None
    evaluation_batch: ClassVar[int] = 32
    scores_texts: ClassVar[bool] = False
    takes_two_parts: ClassVar[bool] = False

    def for_model(self, config: Any) -> Task:
        """Return the task as a model of that configuration does it; this one for most.

        Args:
            config: Of transformers: an encoder-decoder may need another class than a
                decoder alone.
        """
        del config
        return self

    def check(self, settings: JobSettings) -> None:
        """Refuse settings of a job that do not go with the task.

        Args:
            settings: Of the job.

        Raises:
            UserError: If there is one.
        """
        del settings

    def check_metric(self, schema: Schema) -> None:
        """Refuse a main metric that can't be computed here, before a job has trained.

        Args:
            schema: Of the data.

        Raises:
            UserError: If it needs what is not installed.
        """
        del schema

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

    def groups(self, rows: Rows, schema: Schema) -> Sequence[Hashable] | None:
        """Return what no split may divide: examples of one group stay on one side.

        Args:
            rows: The examples.
            schema: Of the data.

        Returns:
            The group of each example; None where each stands for itself. A task has
            groups or strata, not both.
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
        groups = self.groups(rows, schema)
        if groups is not None:
            return grouped_split(groups, fraction, seed)
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
            Sorted indices. Whole groups are drawn, so there may be fewer than `count`.

        Raises:
            UserError: If that is fewer than one of each stratum, or no group is as small.
        """
        if count >= len(rows):
            return list(range(len(rows)))
        groups = self.groups(rows, schema)
        if groups is not None:
            return draw_groups(groups, count, seed)
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

    def try_model(self, model: Any, processor: Any, rows: Mapping[str, Rows]) -> None:
        """Refuse a model that can't read what its processor makes; most tasks look at none.

        Args:
            model: As it was loaded, in eval mode; left as it is.
            processor: The model's tokenizer or image processor.
            rows: Examples by part.

        Raises:
            UserError: If the two do not fit, or the processor does not fit the examples.
        """
        del model, processor, rows

    def check_lengths(
        self,
        rows: Rows,
        processor: Any,
        schema: Schema,
        length: int,
        longest: int | None,
        *,
        skip: bool = False,
    ) -> dict[int, str]:
        """Find examples that the model can't be given, nor cut; most tasks cut them.

        Args:
            rows: The examples.
            processor: The model's tokenizer or image processor.
            schema: Of the data.
            length: Tokens kept of an example.
            longest: Tokens that the model takes; None where it sets no bound.
            skip: Whether they may be left out.

        Returns:
            What is wrong with each, by its index, beginning with its place.

        Raises:
            UserError: If there is one that may not be left out.
        """
        del rows, processor, schema, length, longest, skip
        return {}

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

    def kept(self, logits: Any, labels: Any) -> Any:
        """Return what of a batch's outputs `metrics` needs; all of them for most tasks.

        Called on the device, before the outputs of all batches are gathered: a language
        model's logits are a number for each token of the vocabulary.

        Args:
            logits: The model's outputs, a tensor or a tuple that begins with one.
            labels: What they should have been.
        """
        del labels
        return logits

    def generation(self) -> dict[str, Any] | None:
        """Return what `GenerationConfig` is told, for tasks that answer with texts.

        None for those that answer with the model's outputs. Where it is a dict, `features`
        without labels make the prompt, and `answers` is given the texts.
        """
        return None

    def text_scores(
        self, texts: Sequence[str], rows: Rows, schema: Schema
    ) -> TextScores:
        """Score generated texts, at the end of a run.

        Args:
            texts: What was generated, one for each example; equal prompts have equal
                texts.
            rows: What they were generated for.
            schema: Of the data.

        Returns:
            Scores, and why others are missing.
        """
        del texts, rows, schema
        return TextScores({})

    def text_records(
        self, texts: Sequence[str], rows: Rows, schema: Schema
    ) -> list[dict[str, Any]]:
        """Return what a run keeps of the texts that `text_scores` scores.

        Args:
            texts: What was generated, one for each example.
            rows: What they were generated for.
            schema: Of the data.

        Returns:
            One dict a line of `generated.jsonl`, as JSON holds it; none to keep nothing.
        """
        del texts, rows, schema
        return []

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
        predictions: Any,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Turn outputs into what a user reads: labels, probabilities, numbers, spans.

        Args:
            predictions: The model's outputs, one row an example of `rows`; for tasks
                with a `generation`, the texts.
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


def _are_indices(strata: Sequence[Hashable], schema: Schema) -> bool:
    return all(isinstance(s, int) and 0 <= s < len(schema.label_names) for s in strata)
