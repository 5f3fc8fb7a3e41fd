"""The report of a comparison: a page that stands alone, its numbers, tables for a paper."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from bidora._files import write_whole
from bidora.study import _words as words
from bidora.study._cautions import cautions
from bidora.study._latex import latex_tables
from bidora.study._markdown import markdown_tables
from bidora.study.records import Cell, Record
from bidora.study.results import Summary, Table
from bidora.study.summary import summarise

__all__ = ["Reported", "write_report"]

OWN = frozenset({"seed", "output_dir", "overwrite", "reference"})
"""Settings that every run has for itself, so that nothing is learnt from them."""

MANY = 4
"""Values of a setting that are listed; more are counted."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Grid(Protocol):
    @property
    def tasks(self) -> Sequence[_Named]: ...
    @property
    def methods(self) -> Sequence[_Named]: ...
    @property
    def reference(self) -> str: ...


class Reported(Protocol):
    """What a report is made from: what was planned, and what came of it."""

    @property
    def grid(self) -> _Grid:
        """What was planned: tasks, methods, the reference."""
        ...

    @property
    def records(self) -> Sequence[Record]:
        """What came of it."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader must know besides."""
        ...

    @property
    def chosen(self) -> Mapping[tuple[str, str, int], Any]:
        """The settings that a sweep chose, by task, method and size."""
        ...

    @property
    def stand_ins(self) -> Collection[Cell]:
        """The cells of records that stand for a run that was not needed, or impossible."""
        ...

    @property
    def missing(self) -> Iterable[Cell]:
        """The planned runs that are not done yet."""
        ...


def write_report(study: Reported, folder: str | Path) -> list[str]:
    """Write `report.html`, `results.json`, `tables.tex` and `tables.md`, whole or not.

    The same records give the same bytes.

    Args:
        study: A comparison, finished or not.
        folder: Where to; it is made if it is not there.

    Returns:
        The paths of the files.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    records = sorted(study.records, key=_key)
    summary = summarise(
        records,
        reference=study.grid.reference,
        notes=study.notes,
        chosen=study.chosen,
        tasks=[task.name for task in study.grid.tasks],
        methods=[method.name for method in study.grid.methods],
        missing=study.missing,
    )
    done = [record for record in records if record.cell not in study.stand_ins]
    stand_ins = [record for record in records if record.cell in study.stand_ins]
    texts = {
        "report.html": _page(summary, done, stand_ins, study.grid.reference),
        "results.json": _json(summary, done, stand_ins),
        "tables.tex": latex_tables(summary),
        "tables.md": markdown_tables(summary),
    }
    for name, text in texts.items():
        write_whole(target / name, text)
    return [str(target / name) for name in texts]


def _key(record: Record) -> Any:
    c = record.cell
    return (c.task, c.method, c.size, c.seed, c.purpose, repr(c.trial))


def _json(
    summary: Summary, records: Sequence[Record], stand_ins: Sequence[Record]
) -> str:
    content = {
        "summary": summary.to_dict(),
        "records": [record.to_dict() for record in records],
        "stand_ins": [record.to_dict() for record in stand_ins],
    }
    # JSON knows no NaN; escaped, the text holds whatever a file or a name held.
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value if isinstance(value, str | int | None) else str(value)


# --- the page -----------------------------------------------------------------------


def _page(
    summary: Summary,
    records: Sequence[Record],
    stand_ins: Sequence[Record],
    reference: str,
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from bidora.study._figures import draw_swatches, styles

    def plain(value: Any) -> Any:
        own = isinstance(value, str) and not isinstance(value, Markup)
        return words.printable(value) if own else value

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = resources.files("bidora.study").joinpath("report.html.j2")
    template = environment.from_string(source.read_text("utf-8"))
    looks = styles(summary.methods)
    final = [r for r in (*records, *stand_ins) if r.cell.purpose != "sweep"]
    shared, differing = compare_settings(
        [r for r in records if r.cell.purpose != "sweep"] or records
    )
    machine, machines = _common([r.environment for r in records])
    page: str = template.render(
        summary=summary,
        title=_title(summary),
        advice=words.advice(summary),
        statements=words.statements(summary),
        reservations=cautions(summary),
        swatches=Markup(draw_swatches(looks)),
        sections=[_section(summary, table, final, looks) for table in summary.tables],
        unknown_reference="" if summary.reference else reference,
        shared=shared,
        differing=differing,
        machine=machine,
        machines={name: ", ".join(values) for name, values in machines.items()},
        records=records,
        stand_ins=stand_ins,
        said=_said,
        words=words,
    )
    return page.lstrip()


def _title(summary: Summary) -> str:
    methods = words.plural(len(summary.methods), "method")
    return f"Comparison of {methods} on {words.plural(len(summary.tasks), 'task')}"


def _section(
    summary: Summary,
    table: Table,
    records: Sequence[Record],
    looks: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a table with its figures."""
    from markupsafe import Markup

    from bidora.study._figures import draw_cost, draw_curves, draw_dots, mean_curve

    at = f"{words.size_name(table.size)}, {words.PURPOSES[table.purpose]}"
    dots, costs, curves = {}, {}, {}
    for task in table.tasks:
        if any(r.score for r in table.results if r.task == task):
            dots[task] = draw_dots(
                table, task, looks, f"{task}, {at}: test scores and intervals"
            )
            costs[task] = draw_cost(
                table, task, looks, f"{task}, {at}: test scores over seconds"
            )
        here = [
            r
            for r in records
            if (r.cell.task, r.cell.size, r.cell.purpose)
            == (task, table.size, table.purpose)
        ]
        means = {m: mean_curve(r for r in here if r.cell.method == m) for m in looks}
        drawn = {method: points for method, points in means.items() if points}
        if drawn:
            curves[task] = draw_curves(
                drawn, looks, f"{task}, {at}: validation scores over seconds"
            )
    return {
        "table": table,
        "at": at,
        "id": f"{table.purpose}-{table.size or 'all'}",
        "figures": [
            (caption, {task: Markup(svg) for task, svg in drawings.items()})
            for caption, drawings in (
                ("Test scores: mean and interval over seeds", dots),
                ("Test scores against the training time they cost", costs),
                ("Validation scores while training: mean over seeds", curves),
            )
        ],
        "most": max((r.score.n for r in table.results if r.score), default=0),
    }


def compare_settings(
    records: Sequence[Record],
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the settings that all runs share, and the others by method.

    Args:
        records: Of runs.

    Returns:
        Values as text by setting; and by setting and method.
    """
    shared, _ = _common([r.settings for r in records])
    by_method: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record.cell.method, []).append(record.settings)
    values = {method: _values(settings) for method, settings in by_method.items()}
    names = sorted({name for one in values.values() for name in one} - shared.keys())
    differing = {
        name: {method: _listed(one.get(name, [])) for method, one in values.items()}
        for name in names
    }
    return shared, differing


def _common(
    settings: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split what all mappings agree on from what they do not."""
    values = _values(settings)
    everywhere = {n for n in values if all(n in one for one in settings)}
    shared = {n: v[0] for n, v in values.items() if len(v) == 1 and n in everywhere}
    return shared, {n: v for n, v in values.items() if n not in shared}


def _values(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the distinct values of each setting, as text, by name."""
    found: dict[str, dict[str, None]] = {}
    for one in settings:
        for name, value in one.items():
            if name not in OWN:
                found.setdefault(str(name), {})[_said(value)] = None
    return {name: list(found[name]) for name in sorted(found)}


def _listed(values: Sequence[str]) -> str:
    if len(values) > MANY:
        return f"{len(values)} values"
    return ", ".join(values) or words.NOTHING


def _said(value: Any) -> str:
    """Return a setting's value as a YAML file has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return words.NOTHING
    return json.dumps(_finite(value), ensure_ascii=False)
