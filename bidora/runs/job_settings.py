"""What every job on a model and data can be told, with its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from bidora import defaults
from bidora.defaults import BUNDLED_MODEL
from bidora.errors import UserError
from bidora.runs.declared import Declared, option

__all__ = ["JobSettings", "default_folder"]

OTHER_LENGTH = 128
"""Tokens kept of an example where its data does not suggest another number."""


WHAT = "what to train, and on what"
DATA = "your own data"
ADAPTER = "head and adapter"
TRAINING = "training"
SEARCH = "search and retraining (method bidora)"
OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class JobSettings(Declared):
    """What every job on a model and data is told.

    Raises:
        UserError: If a setting is out of range.
    """

    model: str = option(
        BUNDLED_MODEL,
        "the pretrained model: a folder, a name on the Hugging Face Hub, or smollm2, the "
        "language model of the extra llm",
        WHAT,
        shown=f"{BUNDLED_MODEL}, which comes with the extra demo",
        metavar="NAME",
    )
    task: str = option(
        "docstrings",
        "the examples: docstrings, digits, a csv, tsv, jsonl, FASTA or column file, a "
        "folder with a train file or a folder of images for each class, glue/cola and its "
        "kin, reuters/modapte, conll2003, e2e, bbp, thermophilicity, or a data set of the "
        "Hub such as OWNER/NAME",
        WHAT,
        metavar="NAME",
    )
    task_type: str | None = option(
        None,
        "classification, regression, multilabel, images, tagging, generation or "
        "instruction",
        WHAT,
        shown="from the data",
        metavar="NAME",
    )
    seed: int = option(0, "seed of splits, new weights and order", WHAT)

    data_dir: str | None = option(
        None,
        "folder with the official files of a data set named by --task; nothing is "
        "fetched then",
        DATA,
        metavar="FOLDER",
    )
    text_column: str | None = option(
        None, "column of the text", DATA, shown="by name", metavar="NAME"
    )
    text_pair_column: str | None = option(
        None,
        "column of a second text, for pairs",
        DATA,
        shown="by name",
        metavar="NAME",
    )
    image_column: str | None = option(
        None, "column of the image's path", DATA, shown="by name", metavar="NAME"
    )
    label_column: str | None = option(
        None, "column of the label", DATA, shown="by name", metavar="NAME"
    )
    proteins: bool | None = option(
        None,
        "whether texts are proteins, a letter a residue",
        DATA,
        shown="if a column called sequence holds such",
    )
    label_separator: str | None = option(
        None, "what stands between the labels of one example", DATA, shown="guessed"
    )
    label_columns: tuple[str, ...] | None = option(
        None, "columns of 0 and 1, one for each label, in place of a label column", DATA
    )
    allow_empty: bool | None = option(
        None, "whether an example may have no label (multilabel)", DATA, shown="by data"
    )
    scheme: str | None = option(
        None, "IOB1 or IOB2, how tags mark entities (tagging)", DATA, shown="by data"
    )
    max_new_tokens: int | None = option(
        None,
        "the most tokens of a text (generation, instruction)",
        DATA,
        shown="by task",
    )
    num_beams: int | None = option(
        None,
        "width of the beam search (generation, instruction)",
        DATA,
        shown="by task",
    )
    length_penalty: float | None = option(
        None,
        "above 0, beams are divided by that power of their length (generation, "
        "instruction)",
        DATA,
        shown="1",
    )
    no_repeat_ngram_size: int | None = option(
        None,
        "so many tokens never come twice in a row in a text (generation, instruction)",
        DATA,
        shown="no such rule",
    )
    validation_file: str | None = option(
        None, "examples that choices may be made by", DATA, metavar="FILE"
    )
    test_file: str | None = option(
        None,
        "test examples, scored once at the end",
        DATA,
        shown="a fifth of the training file",
        metavar="FILE",
    )
    column_names: tuple[str, ...] | None = option(
        None, "names of the columns of a csv or tsv without a header line", DATA
    )
    quoting: str = option(
        "auto", 'csv where "..." quotes a field, none where it is text, or auto', DATA
    )
    encoding: str = option(
        "auto", "encoding of the files, such as utf-8, utf-16 or cp1252", DATA
    )
    on_bad_row: str = option(
        "error", "what a row that can't be used is for: error, or skip", DATA
    )
    min_examples_per_class: int | None = option(
        None, "leave out classes with fewer training examples", DATA
    )
    metric: str | None = option(
        None,
        "the main metric: first in tables, drawn in the curves",
        DATA,
        shown="that of the data set or task type",
    )
    max_length: int | None = option(
        None,
        "tokens kept of an example",
        DATA,
        shown=f"32 for docstrings, 1024 for instruction, else {OTHER_LENGTH}; or what the "
        "model takes",
    )

    max_train_samples: int | None = option(
        None,
        "train on at most that many examples, drawn by --seed with the classes in "
        "proportion",
        DATA,
    )
    max_validation_samples: int | None = option(
        None,
        "at most that many validation examples; where the data has none, taken from the "
        "training examples that --max-train-samples leaves out",
        DATA,
    )
    max_test_samples: int | None = option(
        None, "score at most that many test examples, the same for every seed", DATA
    )

    pooling: str = option(
        "auto",
        "what the head reads of a text: mean, first, last or max of the tokens, through "
        "one linear layer; or head, the stock class of transformers",
        ADAPTER,
        shown="as the model was trained, where it says so, else head, for proteins mean",
        metavar="{" + ",".join(defaults.POOLINGS) + "}",
    )
    pairs: str = option(
        "auto",
        "how two texts are read: together, as one input; or apart, each by itself, and "
        "the head reads how their vectors differ",
        ADAPTER,
        shown="apart for a sentence encoder, else together",
        metavar="{" + ",".join(defaults.PAIRINGS) + "}",
    )
    lora_r: int = option(32, "rank of the change of a weight", ADAPTER)
    lora_alpha: float | None = option(
        None,
        "the change is scaled by lora_alpha / lora_r",
        ADAPTER,
        shown="twice lora_r",
    )
    lora_dropout: float = option(0.0, "dropout in front of the change", ADAPTER)
    target_modules: tuple[str, ...] | None = option(
        None,
        "layers to adapt, by the end of their names, or all-linear",
        ADAPTER,
        shown="all-linear",
    )

    per_device_train_batch_size: int = option(16, "examples of a step", TRAINING)
    learning_rate: float | None = option(
        None,
        "rate of directions and head, or of all that is trained",
        TRAINING,
        shown=f"{defaults.LEARNING_RATE:g} for the bundled model, else "
        f"{defaults.OTHER_LEARNING_RATE:g}",
    )
    weight_decay: float = option(defaults.WEIGHT_DECAY, "AdamW's decay", TRAINING)
    max_grad_norm: float = option(1.0, "clip gradients at this norm", TRAINING)

    per_device_outer_batch_size: int | None = option(
        None,
        "held-back examples of a step of the magnitudes",
        SEARCH,
        shown="by budget",
    )
    validation_fraction: float = option(
        defaults.VALIDATION_FRACTION,
        "part of the training examples held back for the magnitudes, or for early stopping",
        SEARCH,
    )
    orthogonality: float | None = option(
        None,
        "weight of the term that keeps directions apart",
        SEARCH,
        shown=f"0, and {defaults.ORTHOGONALITY:g} by the full budget",
    )

    output_dir: str | None = option(
        None, "where it all goes", OUTPUT, shown="runs/METHOD-TASK-seedSEED"
    )
    overwrite: bool = option(False, "replace an earlier run in that folder", OUTPUT)
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one", OUTPUT)

    def __post_init__(self) -> None:
        """Check every setting, naming its option."""
        self.check_kinds()
        self.check_counts(
            (1, "per_device_train_batch_size", "per_device_outer_batch_size", "lora_r"),
            (1, "min_examples_per_class"),
            (1, "max_train_samples", "max_validation_samples", "max_test_samples"),
            (4, "max_length"),
            (1, "max_new_tokens", "num_beams"),
            (0, "no_repeat_ngram_size"),
        )
        for name in ("learning_rate", "lora_alpha", "max_grad_norm"):
            self.check_number(name, lambda x: x > 0, "a finite number above 0")
        self.check_number("length_penalty", lambda x: True, "a finite number")
        for name in ("weight_decay", "orthogonality"):
            self.check_number(name, lambda x: x >= 0, "a finite number of 0 or more")
        self.check_number(
            "lora_dropout", lambda x: 0 <= x < 1, "a number from 0 to below 1"
        )
        self.check_number(
            "seed",
            lambda x: isinstance(x, int) and 0 <= x < 2**32,
            "a whole number from 0 to 2**32",
        )
        self.check_number(
            "validation_fraction", lambda x: 0 < x < 1, "a number between 0 and 1"
        )
        self.check_choice("quoting", ("auto", "csv", "none"))
        self.check_choice("on_bad_row", ("error", "skip"))
        self.check_choice("pooling", defaults.POOLINGS)
        self.check_choice("pairs", defaults.PAIRINGS)

    @property
    def what(self) -> str:
        """What the run's folder is named after."""
        return "job"

    @property
    def folder(self) -> str:
        """The folder of the run: `output_dir`, or one made of method, task and seed."""
        return self.output_dir or default_folder(self.what, self.task, self.seed)

    @property
    def rate(self) -> float:
        """The learning rate; models that ours was not tried on get a lower one."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.usual_rates[0 if self.is_bundled else 1]

    @property
    def alpha(self) -> float:
        """What the rank divides into the scale: `lora_alpha`, or twice the rank."""
        return 2.0 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    @property
    def is_bundled(self) -> bool:
        """Whether the model is the one that the defaults were chosen on."""
        return self.model == BUNDLED_MODEL

    @property
    def usual_rates(self) -> tuple[float, float]:
        """The learning rates where none is given, for the bundled encoder and others."""
        return defaults.LEARNING_RATE, defaults.OTHER_LEARNING_RATE

    def tokens_kept(self, longest: int | None, usual: int | None = None) -> int:
        """Return how many tokens of an example are kept.

        Args:
            longest: What the model takes; None where it sets no bound.
            usual: What suits the data; None where nothing is known.

        Returns:
            `max_length`, or where it is None, what suits the data and the model.

        Raises:
            UserError: If `max_length` is more than the model takes.

        Example:
            >>> JobSettings(task="reviews.csv").tokens_kept(64)
            64
        """
        if self.max_length is None:
            wanted = usual or OTHER_LENGTH
            return wanted if longest is None else min(wanted, longest)
        if longest is not None and self.max_length > longest:
            raise UserError(
                f"--max-length {self.max_length} is more than the {longest} tokens "
                f"that {self.model!r} takes; choose {longest} or fewer."
            )
        return self.max_length


def default_folder(what: str, task: str, seed: int) -> str:
    """Return the folder that a run goes to where none is named.

    Args:
        what: The method or command.
        task: The task, as the user named it.
        seed: The seed.

    Returns:
        A path under `runs`.

    Example:
        >>> default_folder("lora", "data/reviews.csv", 1)
        'runs/lora-data-reviews.csv-seed1'
    """
    name = "".join(c if c.isalnum() or c in "_." else "-" for c in task).strip("-.")
    return f"runs/{what}-{name[-40:]}-seed{seed}"
