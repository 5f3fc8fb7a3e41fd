"""The model card that a run leaves: what was trained, on what, how well, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from bidora.models import ModelSource
    from bidora.runs.examples import Examples
    from bidora.runs.results import RunResult
    from bidora.runs.settings import TrainSettings
    from bidora.tasks.base import Schema, Task

__all__ = ["outputs_of", "write_card"]

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "AutoModelForImageClassification": "image-classification",
}
"""What the Hub calls them, by PEFT's kind of task, or the class where PEFT has none."""


def write_card(
    folder: Path,
    settings: TrainSettings,
    examples: Examples,
    source: ModelSource,
    result: RunResult,
    pooling: str,
    pairs: str = "together",
) -> None:
    """Write `README.md`, as the Hub shows it.

    Args:
        folder: Where to.
        settings: Of the run.
        examples: What it learnt from.
        source: The base model.
        result: What it came to.
        pooling: How tokens are pooled; `head` for the stock class.
        pairs: How two texts are read: `together` or `apart`.
    """
    from bidora.methods import make_method

    method = make_method(settings.method)
    task, schema = examples.task, examples.schema
    data: dict[str, Any] = {
        "library_name": "transformers"
        if settings.method in ("full", "probe")
        else "peft",
        "tags": sorted({settings.method, "hypergrad-bidora", "bidora"}),
    }
    kind = task.peft_type or task.auto_model
    if kind in PIPELINES:
        data["pipeline_tag"] = PIPELINES[kind]
    if not source.is_local or source.hub_name != source.location:
        data["base_model"] = source.hub_name
    code = method.loading_code(
        {
            "folder": ".",
            "base": source.hub_name,
            "auto_model": task.auto_model,
            "auto_processor": task.auto_processor,
            "pooling": pooling,
            "pairs": pairs,
            "gguf_file": source.gguf_file or "",
        }
    )
    card = ModelCard(
        f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n"
        + _text(settings, examples, source, result, method.summary, code, schema)
    )
    card.save(folder / "README.md")


def _text(
    settings: TrainSettings,
    examples: Examples,
    source: ModelSource,
    result: RunResult,
    summary: str,
    code: str,
    schema: Any,
) -> str:
    last = result.phases[-1]
    chosen_by = {"held_back"}
    if settings.early_stopping_patience is not None:
        chosen_by.add("validation")
    parts = [p for p in last.scores if p not in chosen_by]
    names = [n for n in last.test if n != "loss"]
    table = ["| examples | " + " | ".join([*names, "loss"]) + " |"]
    table.append("|---" * (len(names) + 2) + "|")
    for part in parts:
        values = [f"{last.scores[part][n]:.4f}" for n in [*names, "loss"]]
        table.append(f"| {_plain(part)} | " + " | ".join(values) + " |")
    sizes = ", ".join(f"{len(r)} {_plain(p)}" for p, r in examples.rows.items())
    changed = settings.as_dict()
    rows = [
        f"| {name} | `{_plain(changed[name])}` |"
        for name in sorted(settings.differs() - {"output_dir", "overwrite", "trainer"})
    ]
    phases = "; ".join(
        f"{p.name} {p.steps} steps, {p.seconds:.0f} s"
        + (f", weights of step {p.best_global_step}" if p.best_global_step else "")
        for p in result.phases
    )
    return f"""\
# {_plain(source.name)}, fine-tuned on {_plain(examples.source.name)}

- **Method**: {summary} (`{settings.method}` of hypergrad-bidora).
- **Task**: {examples.task.name}. Outputs: {outputs_of(examples.task, schema)}.
- **Data**: {_plain(examples.source.note)} ({sizes} examples)
- **Training**: {phases}; seed {settings.seed}.

## Scores

Measured after the last phase, on examples that nothing was learnt from or chosen by.

{chr(10).join(table)}

{_missing(last.missing)}![Curves](curves.png)

## Use

With this folder as the working folder:

```python
{code}```

`bidora predict FOLDER --input new.csv --output scored.csv` does all of it. An adapter's
folder is no whole model: `AutoModel….from_pretrained` and `pipeline(model=FOLDER)` fail on
it, or leave DoRA's magnitudes out.

## Settings that were changed

{chr(10).join(["| setting | value |", "|---|---|", *rows])}
"""


def outputs_of(task: Task, schema: Schema) -> str:
    """Return what a model's outputs mean: labels, or a number and its scale, or texts.

    Args:
        task: That it learnt.
        schema: What the task found out about the data.
    """
    if schema.label_names:
        return ", ".join(f"`{_plain(n)}`" for n in schema.label_names[:50])
    if {"mean", "deviation"} <= set(schema.details):
        return "a number, {mean:.6g} + {deviation:.6g} times the logit".format(
            **schema.details
        )
    return "numbers" if task.generation() is None else "texts"


def _missing(reasons: dict[str, str]) -> str:
    """Return why metrics are in no table, a line each."""
    lines = [f"- `{name}`: n/a ({_plain(why)})" for name, why in reasons.items()]
    return "\n".join([*lines, "", ""]) if lines else ""


def _plain(value: Any) -> str:
    """Return text that no table or code span is broken by."""
    return str(value).replace("|", "/").replace("`", "'").replace("\n", " ")
