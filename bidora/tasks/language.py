"""What tasks share that are answered with a text, by a language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.labels import BadValueError
from bidora.tasks.text import TextTask

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IGNORED", "LANGUAGE_METRICS", "Encoded", "LanguageTask"]

IGNORED = -100
"""Label of what is not learnt: the prompt, and padding."""

LANGUAGE_METRICS = ("perplexity", "token_accuracy")
"""What a pass over known answers gives."""

OF_WRITING = (
    "max_new_tokens",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
)
"""Settings of how texts are written."""

BATCH = 1000
"""Examples that are tokenised at once to be counted."""

SHOWN = 3
"""Prompts that are too long whose places are told."""

LINES = 10
"""Prompts that are refused of which a message shows a line each; it counts the others."""

Encoded = tuple[list[list[int]], list[list[int]]]
"""Tokens of each example, and the labels of each."""


@dataclass(frozen=True, kw_only=True)
class LanguageTask(TextTask):
    """A prompt, and a text that the model is to write after it.

    The loss is that of the answer's tokens alone; those of the prompt are labelled
    `IGNORED`. A prompt is never cut: one of `max_length` tokens or more is refused. An
    answer is cut at the end, without the token that ends it, and how many are is told.

    Args:
        max_new_tokens: The most tokens that are written; None for the task's number.
        num_beams: Width of the beam search; None for the task's number, 1 for the likeliest
            token each time.
        length_penalty: Above 0, beams are divided by that power of their length.
        no_repeat_ngram_size: So many tokens never come twice in a row; 0 for no rule.
    """

    peft_type: ClassVar[str] = "CAUSAL_LM"
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    main_metric: ClassVar[str] = "token_accuracy"
    judged_by: ClassVar[str] = "perplexity"
    has_probe: ClassVar[bool] = False
    evaluation_batch: ClassVar[int] = 8
    usual_beams: ClassVar[int] = 1
    usual_new_tokens: ClassVar[int] = 64
    two_parts: ClassVar[bool] = False
    """Whether the model reads the prompt in an encoder, and writes in a decoder."""
    often_refused: ClassVar[str] = ""
    """Why prompts are refused for the most part, as a sentence of the message."""

    max_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None

    @abstractmethod
    def encoded(
        self, batch: Mapping[str, list[Any]], processor: Any, schema: Schema
    ) -> Encoded:
        """Return each example's tokens, uncut, and its labels: `IGNORED` for the prompt.

        Without an answer, all labels are `IGNORED`.

        Args:
            batch: Columns of `rows`.
            processor: The model's tokenizer.
            schema: Of the data.
        """

    def for_model(self, config: Any) -> LanguageTask:
        """Return this task; an encoder that was trained to fill gaps can't have it.

        Args:
            config: Of the model.

        Raises:
            UserError: If the model does not write texts.
        """
        kinds = [k for k in config.architectures or () if k.endswith("ForMaskedLM")]
        if kinds and not getattr(config, "is_decoder", False):
            raise UserError(
                f"--model is a {kinds[0]}, which fills gaps and cannot write; {self.name} "
                "needs a decoder, such as a GPT-2 or Llama."
            )
        return self

    def refuse_other_texts(self) -> None:
        """Refuse settings of texts that other tasks have.

        Raises:
            UserError: If one is given.
        """
        if self.text_pair_column is not None:
            raise UserError(
                f"--text-pair-column has no meaning for {self.name}; put both texts into "
                "one column."
            )
        if self.proteins:
            raise UserError(f"--proteins has no meaning for {self.name}; leave it out.")

    def model_kwargs(self, schema: Schema) -> dict[str, Any]:
        """Return nothing: the model's own head is kept."""
        del schema
        return {}

    def features(
        self,
        batch: Mapping[str, list[Any]],
        processor: Any,
        schema: Schema,
        length: int,
    ) -> dict[str, list[Any]]:
        """Tokenise prompts and answers; without labels, the prompts alone.

        Args:
            batch: Columns of `rows`.
            processor: The model's tokenizer.
            schema: Of the data.
            length: Tokens kept of an example.

        Returns:
            `input_ids`, `attention_mask`, and `labels` where answers are known.
        """
        ids, labels = self.encoded(batch, processor, schema)
        ids = [tokens[:length] for tokens in ids]
        made = {"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]}
        if any(label != IGNORED for row in labels for label in row):
            made["labels"] = [row[:length] for row in labels]
        return made

    def prompt_lengths(
        self, batch: Mapping[str, list[Any]], processor: Any, schema: Schema
    ) -> Sequence[int | BadValueError]:
        """Return how many tokens each prompt has, or why it can't be written.

        Args:
            batch: Columns of `rows`.
            processor: The model's tokenizer.
            schema: Of the data.
        """
        _, labels = self.encoded(batch, processor, schema)
        return [
            next((i for i, x in enumerate(row) if x != IGNORED), len(row))
            for row in labels
        ]

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
        """Find prompts that leave no room for an answer, or that can't be written.

        All are counted. Equal prompts go together, and so do all references of an input.

        Args:
            rows: The examples.
            processor: The model's tokenizer.
            schema: Of the data.
            length: Tokens kept of an example.
            longest: Tokens that the model takes; None where it sets no bound.
            skip: Whether they may be left out.

        Returns:
            What is wrong with each, by its index, beginning with its place.

        Raises:
            UserError: If there is one that may not be left out.
        """
        counts: list[int | BadValueError] = []
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            batch = {name: values[part] for name, values in rows.columns.items()}
            counts += self.prompt_lengths(batch, processor, schema)
        refused: dict[int, str] = {}
        long: dict[int, int] = {}
        for i, count in enumerate(counts):
            if isinstance(count, BadValueError):
                refused[i] = f"{rows.places[i]}: {count}."
            elif count >= length:
                long[i] = count
        if skip:
            cut = {
                i: f"{rows.places[i]}: its prompt has {n} tokens, and --max-length "
                f"{length} keeps no token of an answer."
                for i, n in long.items()
            }
            return dict(sorted({**refused, **cut}.items()))
        told: list[str] = []
        if refused:
            told.append(_refused([*refused.values()], len(rows), self.often_refused))
        if long:
            places = [rows.places[i] for i in long]
            told.append(_over_long([*long.values()], places, length, longest))
        if told:
            raise UserError("\n".join(told))
        return {}

    def count_over_long(self, rows: Rows, processor: Any, length: int) -> int:
        """Return how many examples have more than `length` tokens, so that answers are cut.

        Args:
            rows: The examples.
            processor: The model's tokenizer.
            length: Tokens kept of an example.
        """
        ids, _ = self.encoded(rows.columns, processor, Schema(self.name))
        return sum(len(tokens) > length for tokens in ids)

    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that pads tokens, and labels with `IGNORED`."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def kept(self, logits: Any, labels: Any) -> Any:
        """Return of each example the loss of its answer, tokens told right, and tokens."""
        import torch

        scores = logits[0] if isinstance(logits, tuple) else logits
        if not self.two_parts:  # what stands at a place foretells the next
            scores, labels = scores[:, :-1], labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            scores.float().transpose(1, 2),
            labels,
            reduction="none",
            ignore_index=IGNORED,
        )
        counts = labels != IGNORED
        right = (scores.argmax(-1) == labels) & counts
        return torch.stack([losses.sum(1), right.sum(1), counts.sum(1)], dim=1)

    def metrics(
        self, predictions: np.ndarray, labels: np.ndarray, schema: Schema
    ) -> dict[str, float]:
        r"""Return perplexity and accuracy over all tokens of all answers.

        $\exp\left(-\frac{1}{n}\sum_i \log p(t_i)\right)$ over the $n$ tokens: unlike the
        mean of batches that a Trainer calls its loss, each token counts alike.

        Args:
            predictions: What `kept` returned.
            labels: Not used.
            schema: Not used.
        """
        import numpy as np

        del labels, schema
        loss, right, count = np.asarray(predictions, dtype=np.float64).sum(axis=0)
        with np.errstate(over="ignore"):
            return {
                "perplexity": float(np.exp(loss / count)),
                "token_accuracy": float(right / count),
            }

    def generation(self) -> dict[str, Any]:
        """Return the settings of the beam search; nothing is drawn at random."""
        found: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens or self.usual_new_tokens,
            "num_beams": self.num_beams or self.usual_beams,
            "do_sample": False,
        }
        for name in ("length_penalty", "no_repeat_ngram_size"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found

    def settings_of_generation(self) -> dict[str, Any]:
        """Return the fields that say how texts are written, for a schema."""
        return {name: getattr(self, name) for name in OF_WRITING}

    def answers(
        self,
        predictions: Any,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Return the texts."""
        del rows, schema, labels
        return [{"generated": text} for text in predictions]


def _refused(lines: Sequence[str], count: int, often: str) -> str:
    """Return what is wrong with prompts that can't be written, and a remedy."""
    shown = "".join(f"  {line}\n" for line in lines[:LINES])
    more = f"  and {len(lines) - LINES} more\n" if len(lines) > LINES else ""
    why = f"{often} " if often else ""
    return (
        f"{len(lines)} of {count} row(s) can't be used with this model:\n{shown}{more}"
        f"{why}Put them right, or leave them out with --on-bad-row skip."
    )


def _over_long(
    counts: Sequence[int], places: Sequence[str], length: int, longest: int | None
) -> str:
    """Return what is wrong with prompts of so many tokens, where they are, and a remedy."""
    least, most = min(counts), max(counts)
    tokens = f"{most}" if least == most else f"{least} to {most}"
    more = len(places) - SHOWN
    where = "; ".join(places[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
    if longest is None or most < longest:
        remedy = f"train with --max-length above {most}, or shorten them"
    elif length < longest:
        remedy = (
            f"train with --max-length {longest}, which is all that the model takes, and "
            "shorten prompts of as many tokens or leave them out"
        )
    else:
        remedy = f"the model takes {longest} tokens, so shorten them or leave them out"
    return (
        f"{len(counts)} prompt(s) have {tokens} tokens, and --max-length {length} keeps no "
        f"token of their answers ({where}). A prompt is not cut, for it may lose what the "
        f"answer says: {remedy}."
    )
