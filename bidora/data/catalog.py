"""Data sets that are known by name: what they are, and how their files are laid out.

One table serves both ways in, the Hub and a folder with the official files: the same
columns, the same order of classes, the same metric.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from bidora.errors import UserError

__all__ = ["CATALOG", "Entry", "Layout", "find_entry"]


@dataclass(frozen=True)
class Layout:
    """How the files of a data set are named and what their columns are.

    Args:
        files: File name by part, in the order in which parts are looked for. Parts are
            `train`, `dev`, `test`; `dev_mismatched` and `test_mismatched` go with them.
        optional: Parts whose file need not be there.
        renamed: Our name of each column that is read, by the file's own. Files that
            lack the label are those whose labels are hidden.
        headerless: Columns of files whose first line holds no names.
        open_ended: Whether rows may have more fields than that, which are not read.
        fallback: Another file of a part, taken where the first has no labels.
        torn: Whether the official files hold rows of another width, which everybody
            leaves out.
        read_as_is: Whether the files say by themselves what they hold: a word a line, or
            a csv with quotes and a header line that names the columns of `renamed`.
    """

    files: dict[str, str]
    optional: frozenset[str] = frozenset({"test", "test_mismatched"})
    renamed: dict[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    open_ended: bool = False
    fallback: dict[str, str] = field(default_factory=dict)
    torn: bool = False
    read_as_is: bool = False


@dataclass(frozen=True)
class Entry:
    """A data set that is known by name.

    Args:
        name: Its name, as `--task` takes it.
        task_type: Family of the task.
        homepage: Where its files come from.
        made: What has to be done with them before they are read, if anything, as a
            sentence.
        hints: Columns and metric, by the names of a task's settings.
        class_names: Classes in the data set's own order.
        folders: Names that its folder usually has.
        layouts: How its files may be laid out; none for a train and a test file.
        class_files: FASTA file of each class, for data sets that come so.
        hub: Repository and configuration on the Hub; None where it is not there.
        hub_renamed: Our name of a column, by the Hub's.
    """

    name: str
    task_type: str
    homepage: str
    made: str = ""
    hints: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = ()
    class_files: dict[str, str] = field(default_factory=dict)
    hub: tuple[str, str | None] | None = None
    hub_renamed: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What a `Source` of it hints at."""
        return {"task_type": self.task_type, **self.hints}

    @property
    def fetching(self) -> str:
        """Where its files come from and what becomes of them, in sentences."""
        come = f"The files come from {self.homepage}."
        return f"{come} {self.made}" if self.made else come


def find_entry(name: str) -> Entry | None:
    """Return the data set of that name, if it is known.

    Args:
        name: As `--task` takes it; capitals and hyphens do not count.

    Returns:
        The entry, or None for a name of another family.

    Raises:
        UserError: If the name begins like a known family and is none of it.

    Example:
        >>> find_entry("glue/SST-2").class_names
        ('negative', 'positive')
        >>> find_entry("owner/data") is None
        True
    """
    plain = name.lower().replace("-", "")
    if plain in CATALOG:
        return CATALOG[plain]
    family = plain.split("/")[0]
    known = [entry for entry in CATALOG if entry.split("/")[0] == family]
    if not known:
        return None
    near = get_close_matches(plain, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown task {name!r}; choose one of {', '.join(known)}.{hint}")


_GLUE_PAGE = "https://gluebenchmark.com/tasks"
_PARTS = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}


def _glue(
    name: str,
    folders: tuple[str, ...],
    texts: dict[str, str],
    label: str,
    *layouts: Layout,
    metric: str = "accuracy",
    task_type: str = "classification",
    class_names: tuple[str, ...] = (),
    **layout: Any,
) -> Entry:
    columns = list(texts.values())
    hints = {"text_column": columns[0], "label_column": "label", "metric": metric}
    if len(columns) > 1:
        hints["text_pair_column"] = columns[1]
    renamed = {**texts, label: "label"}
    official = Layout(**{"files": _PARTS, "renamed": renamed, **layout})
    return Entry(
        name=f"glue/{name}",
        task_type=task_type,
        homepage=_GLUE_PAGE,
        hints=hints,
        class_names=class_names,
        folders=folders,
        layouts=(official, *layouts),
        hub=("nyu-mll/glue", name),
    )


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_ENTAILMENT = ("entailment", "not_entailment")
_STS_COLUMNS = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")

_ENTRIES = (
    _glue(
        "cola",
        ("cola",),
        _same("sentence"),
        "label",
        metric="matthews_correlation",
        class_names=("unacceptable", "acceptable"),
        headerless=("source", "label", "mark", "sentence"),
    ),
    _glue(
        "sst2",
        ("sst2",),
        _same("sentence"),
        "label",
        class_names=("negative", "positive"),
    ),
    _glue(
        "mrpc",
        ("mrpc",),
        {"#1 String": "sentence1", "#2 String": "sentence2"},
        "Quality",
        metric="f1",
        class_names=("not_equivalent", "equivalent"),
        # The corpus' own test file has the labels that GLUE's hides, as the Hub has.
        fallback={"test": "msr_paraphrase_test.txt"},
    ),
    _glue(
        "stsb",
        ("stsb",),
        _same("sentence1", "sentence2"),
        "score",
        Layout(
            files={p: f"sts-{p}.csv" for p in ("train", "dev", "test")},
            optional=frozenset(),
            renamed={**_same("sentence1", "sentence2"), "score": "label"},
            headerless=_STS_COLUMNS,
            open_ended=True,
        ),
        metric="pearson",
        task_type="regression",
    ),
    _glue(
        "qqp",
        ("qqp",),
        _same("question1", "question2"),
        "is_duplicate",
        metric="f1",
        class_names=("not_duplicate", "duplicate"),
        torn=True,
    ),
    _glue(
        "mnli",
        ("mnli",),
        {"sentence1": "premise", "sentence2": "hypothesis"},
        "gold_label",
        class_names=("entailment", "neutral", "contradiction"),
        files={
            "train": "train.tsv",
            "dev": "dev_matched.tsv",
            "dev_mismatched": "dev_mismatched.tsv",
            "test": "test_matched.tsv",
            "test_mismatched": "test_mismatched.tsv",
        },
    ),
    _glue(
        "qnli",
        ("qnli",),
        _same("question", "sentence"),
        "label",
        class_names=_ENTAILMENT,
    ),
    _glue(
        "rte",
        ("rte",),
        _same("sentence1", "sentence2"),
        "label",
        class_names=_ENTAILMENT,
    ),
    _glue(
        "wnli",
        ("wnli",),
        _same("sentence1", "sentence2"),
        "label",
        class_names=_ENTAILMENT[::-1],
    ),
    *(
        Entry(
            name=f"reuters/{split}",
            task_type="multilabel",
            homepage="https://archive.ics.uci.edu/dataset/137",
        )
        for split in ("modapte", "modhayes", "modlewis")
    ),
    Entry(
        name="conll2003",
        task_type="tagging",
        homepage="https://www.clips.uantwerpen.be/conll2003/ner/",
        hints={"text_column": "tokens", "label_column": "tags"},
        folders=("conll2003", "conll03"),
        layouts=(
            Layout(
                files={"train": "eng.train", "dev": "eng.testa", "test": "eng.testb"},
                optional=frozenset(),
                read_as_is=True,
            ),
            Layout(
                files={"train": "train.txt", "dev": "valid.txt", "test": "test.txt"},
                optional=frozenset(),
                read_as_is=True,
            ),
        ),
        hub=("eriktks/conll2003", None),
        hub_renamed={"ner_tags": "tags"},
    ),
    Entry(
        name="e2e",
        task_type="generation",
        homepage="https://github.com/tuetschek/e2e-dataset",
        hints={"text_column": "mr", "label_column": "ref", "metric": "bleu"},
        folders=("e2e", "e2edataset", "e2enlg"),
        layouts=(
            Layout(
                files={
                    "train": "trainset.csv",
                    "dev": "devset.csv",
                    "test": "testset_w_refs.csv",
                },
                renamed=_same("mr", "ref"),
                read_as_is=True,
            ),
        ),
        hub=("tuetschek/e2e_nlg", None),
        hub_renamed={"meaning_representation": "mr", "human_reference": "ref"},
    ),
    Entry(
        name="bbp",
        task_type="classification",
        homepage="https://github.com/dzjxzyd/UniDL4BioPep",
        made=(
            "They are sheets there, BBP_train.xlsx and BBP_test.xlsx: save them as "
            "train.csv and test.csv, with columns sequence and label."
        ),
        hints={
            "text_column": "sequence",
            "label_column": "label",
            "proteins": True,
            "max_length": 64,  # the longest has 53 residues
        },
        folders=("bbp",),
    ),
    Entry(
        name="thermophilicity",
        task_type="classification",
        homepage="https://github.com/grimmlab/ProLaTherm",
        hints={"max_length": 256},
        folders=("thermophilicity",),
        class_files={
            "non-thermophilic": "ProtThermoPred_non_thermo_preprocessed.fasta",
            "thermophilic": "ProtThermoPred_thermo_preprocessed.fasta",
        },
    ),
)

CATALOG: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""Known data sets by name."""
