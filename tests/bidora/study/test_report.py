"""The report's files: whole, alone, escaped, the same twice, and honest about gaps."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bidora.study._figures import COLOURS, MARKERS, draw_dots, mean_curve, styles
from bidora.study._latex import escape
from bidora.study.plan import Plan
from bidora.study.reading import grid_from_dict
from bidora.study.records import Record
from bidora.study.report import compare_settings, write_report
from bidora.study.summary import summarise
from tests.bidora.study.made_up import full_study, record, study

NASTY = r"""<script>alert("x")</script>|a&b_%#${~}^\[*'"""
VOID = {"meta", "br", "link", "img", "input", "hr"}


Whole = tuple[Path, "Page", dict[str, Any], str]


class Page(HTMLParser):
    """Elements with their attributes, the text outside styles; wrong nesting fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def written(of: Any, folder: Path) -> tuple[Page, dict[str, Any], str]:
    paths = write_report(of, folder)
    names = ["report.html", "results.json", "tables.tex", "tables.md"]
    assert [Path(path).name for path in paths] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    html, content, tex, _ = (Path(path).read_text("utf-8") for path in paths)
    page = Page(html)
    # Never a number that is none, never Python's words for nothing.
    assert re.findall(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", page.text) == []
    check_latex(tex)
    return page, json.loads(content), tex


def check_latex(text: str) -> None:
    """Check what a compiler would: braces, environments, columns."""
    body = "\n".join(line for line in text.split("\n") if not line.startswith("%"))
    bare = re.sub(r"\\[\\{}%&#$_,]", "", body)  # without escaped signs and row ends
    depth = 0
    for sign in bare:
        depth += (sign == "{") - (sign == "}")
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    assert not set("%#~") & set(bare)
    assert "_" not in re.sub(r"\\label\{[^}]*\}", "", bare)
    assert Counter(re.findall(r"\\begin\{(\w+)\}", body)) == Counter(
        re.findall(r"\\end\{(\w+)\}", body)
    )
    for columns, rows in re.findall(
        r"(?s)\\begin\{tabular\}\{(l[c]+)\}\n(.*?)\\end\{tabular\}", body
    ):
        for row in rows.split("\n"):
            if row.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a report with all that one can show, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "new" / "folder"
    return folder, *written(full_study(), folder)


# --- the page -----------------------------------------------------------------------


def test_a_whole_page(whole: Whole) -> None:
    _, page, _, _ = whole
    assert "Comparison of 4 methods on 2 tasks" in page.text
    # Six pairs and three methods: the least adjusted p is 3 / 32.
    assert "6 pairs of runs cannot show a difference" in page.text
    assert "too few pairs to tell" in page.text
    # Three kinds of figures, two tasks, two tables.
    assert page.count("figure") == 3 * 2 * 2
    assert page.count("caption") == page.count("table")
    heads = [attributes for tag, attributes in page.elements if tag == "th"]
    assert all("scope" in attributes for attributes in heads)
    assert "† 1 collapsed" in page.text
    assert "‡ 1 failed" in page.text
    tex = (whole[0] / "tables.tex").read_text("utf-8")
    assert r"\textsuperscript{\dag{}1}" in tex
    assert r"\dag{}: runs that score what a constant answer scores." in tex
    assert r"\textsuperscript{\ddag{}1}" in tex
    assert "ValueError: loss is nan".replace("nan", "n") in page.text.replace(
        "nan", "n"
    )
    assert "Equal time means" in page.text


def test_the_page_loads_nothing(whole: Whole) -> None:
    folder, page, _, _ = whole
    html = (folder / "report.html").read_text("utf-8")
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(
        tag for tag, _ in page.elements
    )
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert attributes.get("href", "#") is not None
        assert str(attributes.get("href", "#")).startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert page.count("style") == 1  # a figure's own would reach the page


def test_names_within_the_page_are_unique_and_there(whole: Whole) -> None:
    folder, page, _, _ = whole
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert [name for name, n in Counter(names).items() if n > 1] == []
    links = [str(a["href"])[1:] for _, a in page.elements if "href" in a]
    html = (folder / "report.html").read_text("utf-8")
    assert set(links) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(names)


def test_figures_say_what_they_are(whole: Whole) -> None:
    _, page, _, _ = whole
    drawings = [a for tag, a in page.elements if tag == "svg"]
    shown = [a for a in drawings if a.get("role") == "img"]
    assert all(a["aria-label"] for a in shown)
    assert all(a.get("aria-hidden") == "true" for a in drawings if a not in shown)
    assert len(shown) == page.count("figure")
    titles = [str(a["aria-label"]) for a in shown]
    assert len(set(titles)) == len(titles)
    assert page.count("symbol") == 4  # one a method


def test_the_same_records_give_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    folder = whole[0]
    again = full_study()
    again.records.reverse()
    write_report(again, tmp_path)
    for file in ("report.html", "results.json", "tables.tex", "tables.md"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    written(study([record("dora", error="ValueError: no")]), tmp_path)
    page, _, _ = written(study([record("lora", 0.5)]), tmp_path)
    assert "dora" not in page.text
    assert "Comparison of 1 method on 1 task" in page.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    settings = {"method": NASTY, "model": NASTY, NASTY: NASTY}
    records = [
        record(
            m, 0.5 + i / 10, task=NASTY, seed=i, settings=settings, curve=[(1.0, 0.5)]
        )
        for m in (NASTY, "lora")
        for i in range(2)
    ]
    records += [
        record(NASTY, task=NASTY, seed=2, error=f"{NASTY}\nsecond line"),
        record(
            NASTY, task=NASTY, purpose="sweep", trial=((NASTY, NASTY),), validation=0.5
        ),
    ]
    records = [
        Record(**{**vars(r), "metric": NASTY, "environment": {NASTY: NASTY}})
        for r in records
    ]
    records = [
        Record(**{**vars(r), **{part: {NASTY: 0.5} for part in ("test", "probe")}})
        if not r.failed and r.cell.purpose != "sweep"
        else r
        for r in records
    ]
    page, content, tex = written(
        study(
            records,
            reference=NASTY,
            notes=[NASTY],
            chosen={(NASTY, NASTY, 100): ((NASTY, NASTY),)},
        ),
        tmp_path,
    )
    assert page.count("script") == 0
    assert page.text.count(NASTY) > 10
    assert content["records"][0]["cell"]["task"] == NASTY
    assert "alert" in tex


def test_signs_that_no_file_can_hold_do_not_stop_a_report(tmp_path: Path) -> None:
    odd = "a\x00b\ud800c"
    records = [
        record(odd, 0.5, task=odd, curve=[(1.0, 0.5)]),
        record("lora", task=odd, error=odd),
    ]
    page, content, _ = written(study(records), tmp_path)
    assert "a�b?c" in page.text
    assert {r["cell"]["task"] for r in content["records"]} == {odd}


def test_a_study_as_the_command_has_it(tmp_path: Path) -> None:
    grid = grid_from_dict(
        {"tasks": {"docstrings": {}}, "methods": {"lora": {}, "bidora": {}}}
        | {"reference": "lora", "seeds": [0, 1]}
    )
    records = [
        record(m, 0.6, task="docstrings", size=0, seed=i)
        for m in ("lora", "bidora")
        for i in (0, 1)
    ]
    page, _, _ = written(Plan(grid, tuple(records[:-1])).study(), tmp_path)
    assert "Comparison of 2 methods on 1 task" in page.text
    assert "1 not done yet" in page.text


# --- what is missing ----------------------------------------------------------------

FEW: dict[str, tuple[Any, str]] = {
    "nothing": (study([]), "There are no runs yet"),
    "one run": (study([record("lora", 0.5)]), "one seed"),
    "one method": (
        study([record("lora", 0.5, seed=i, probe=None) for i in range(3)]),
        "lora alone was run",
    ),
    "no reference": (
        study([record("dora", 0.5, seed=i) for i in range(3)], reference=""),
        "No reference method was named",
    ),
    "a reference without a run": (
        study([record("dora", 0.5, seed=i) for i in range(3)]),
        "Nothing is compared with the reference lora: it has no run.",
    ),
    "all failed": (
        study([record(m, error="ValueError: no") for m in ("lora", "dora")]),
        "No run has a test score",
    ),
    "a sweep alone": (
        study([record("lora", purpose="sweep", validation=0.5)]),
        "Only runs of the sweep are here",
    ),
    "no curve": (study([record("lora", 0.5)]), "there are no curves"),
    "no probe": (
        study([record("lora", 0.5, probe=None, constant=None)]),
        "No run recorded a probe.",
    ),
    "no number": (
        study([record("lora", math.nan, seconds=math.inf, curve=[(1.0, math.nan)])]),
        "the test score is missing or not finite",
    ),
    "no environment": (
        study([record("lora", 0.5, environment={})]),
        "No run recorded its environment",
    ),
    "no steps done": (study([record("lora", 0.5, seconds=0.0, steps=0)]), "0.0 s"),
    "no pair": (
        study([record("lora", 0.5, seed=0), record("dora", 0.5, seed=1)]),
        "no other method has a score with the same task and seed",
    ),
    "unfinished": (study([record("lora", 0.5)], seeds=range(5)), "4 not done yet"),
}


@pytest.mark.parametrize("what", FEW)
def test_a_page_of_little_says_what_is_missing(what: str, tmp_path: Path) -> None:
    of, sentence = FEW[what]
    page, _, _ = written(of, tmp_path)
    assert sentence in " ".join(page.text.split())


def test_equal_scores_are_no_difference(tmp_path: Path) -> None:
    records = [record(m, 0.5, seed=i) for m in ("lora", "dora") for i in range(3)]
    page, _, _ = written(study(records), tmp_path)
    assert "0–3–0" in page.text
    assert "▲" not in page.text


def test_failed_pairs_and_trials_are_on_the_page(tmp_path: Path) -> None:
    records = [record(m, 0.5, seed=i) for m in ("lora", "dora") for i in range(2)]
    records += [
        record("lora", 0.5, seed=2),
        record("dora", seed=2, error="ValueError: no"),
        record(
            "dora",
            purpose="sweep",
            trial=(("learning_rate", 0.1),),
            error="OverflowError: far",
        ),
    ]
    page, _, tex = written(study(records), tmp_path)
    text = " ".join(page.text.split())
    assert "0–2–0 of 2 pairs, 1 failed" in text
    assert "2 pairs, 1 failed}" in tex
    assert "| 0.0 [0.0, 0.0], 2 pairs, 1 failed |" in (
        tmp_path / "tables.md"
    ).read_text("utf-8")
    assert (
        "dora on sst2, 100 examples, seed 0, sweep with learning_rate 0.1: "
        "OverflowError: far"
    ) in text


def test_no_failure_is_claimed_only_of_runs_that_were_done(tmp_path: Path) -> None:
    page, _, _ = written(study([record("lora", 0.5)]), tmp_path)
    assert "No run failed." in page.text
    page, _, _ = written(study([]), tmp_path)
    assert "No run has been done." in page.text


def test_sizes_are_compared_together_in_every_file(tmp_path: Path) -> None:
    records = [
        record(m, s + i / 100, seed=i, size=size)
        for m, s in (("lora", 0.6), ("a_b", 0.7))
        for size in (100, 500)
        for i in range(4)
    ]
    page, content, tex = written(study(records), tmp_path)
    text = " ".join(page.text.split())
    assert "Over all sizes, equal steps" in text
    assert "are not independent of each other" in text
    # Eight pairs, one method: 2 of 256 patterns.
    assert "a_b +10.0 [+10.0, +10.0]0.0080.008▲ better8–0–0 of 8 pairs" in text
    assert page.text.count("Against the probe") == 1
    (overall,) = content["summary"]["overall"]
    assert overall["cells"] == [["sst2", 100], ["sst2", 500]]
    assert r"\label{tab:over-sizes-steps}" in tex
    assert r"a\_b & lora & $+10.0$" in tex
    markdown = (tmp_path / "tables.md").read_text("utf-8")
    assert (
        "| a\\_b | lora | +10.0 [+10.0, +10.0] | 8 pairs | 0.008 | 0.008 | better |"
    ) in markdown


def test_the_probe_stands_once(tmp_path: Path) -> None:
    records = [
        record(m, s, seed=i, settings={"method": m})
        for m, s in (("probe", 0.5), ("lora", 0.6))
        for i in range(2)
    ]
    page, _, tex = written(study(records), tmp_path)
    rows = [
        tag for tag, a in page.elements if tag == "tr" and a.get("class") == "anchor"
    ]
    assert len(rows) == 1  # the constant answer
    assert tex.count("\nprobe & ") == 2  # its score, and its difference to lora
    assert "Probe &" not in tex
    table = summarise(records, reference="lora").tables[0]
    drawing = draw_dots(table, "sst2", styles(["probe", "lora"]), "title")
    assert drawing.count(">probe<") == 1


# --- JSON ---------------------------------------------------------------------------


def test_records_and_summary_come_back_from_json(whole: Whole) -> None:
    of, content = full_study(), whole[2]
    found = [Record.from_dict(values) for values in content["records"]]
    assert sorted(found, key=repr) == sorted(of.records, key=repr)
    again = summarise(
        found,
        reference="lora",
        notes=of.notes,
        chosen=of.chosen,
        tasks=[task.name for task in of.grid.tasks],
        methods=[method.name for method in of.grid.methods],
        missing=of.missing,
    )
    assert json.loads(json.dumps(again.to_dict())) == content["summary"]


def test_copies_are_kept_apart_from_runs(tmp_path: Path) -> None:
    run = record("lora", 0.5, seed=0)
    copy = record("lora", 0.5, seed=0, purpose="time")
    of = study([run, copy], seeds=[0])
    of.stand_ins = frozenset([copy.cell])
    page, content, _ = written(of, tmp_path)
    assert [Record.from_dict(r) for r in content["records"]] == [run]
    assert [Record.from_dict(r) for r in content["stand_ins"]] == [copy]
    text = " ".join(page.text.split())
    assert "1 run, all of them in results.json beside this page. 1 record more" in text


def test_json_is_strict_where_numbers_are_none(tmp_path: Path) -> None:
    write_report(study([record("lora", math.nan, seconds=math.inf)]), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "results.json").read_text("utf-8")
    content = json.loads(text, parse_constant=refuse)
    assert content["records"][0]["test"] == {"accuracy": None}


# --- LaTeX --------------------------------------------------------------------------


def test_latex_specials() -> None:
    assert escape("_%&#${}") == r"\_\%\&\#\$\{\}"
    assert escape("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert escape("<a|b>") == r"\textless{}a\textbar{}b\textgreater{}"
    assert escape("a\nb") == "a b"  # a new line would end a comment, or a paragraph
    assert escape("[x]*") == "{[}x]{*}"  # at the start of a row they are \\'s


def test_verdicts_are_seen_on_page_and_paper(tmp_path: Path) -> None:
    base = (0.60, 0.61, 0.62, 0.63, 0.64, 0.65)
    records = [record("lora", s, seed=i, probe=None) for i, s in enumerate(base)]
    records += [
        record("bi_dora", s + 0.1 + 0.01 * i, seed=i, probe=None)
        for i, s in enumerate(base)
    ]
    page, _, tex = written(study(records), tmp_path)
    assert "▲ better" in page.text
    assert "p 0.031, 6–0–0 of 6 pairs" in " ".join(page.text.split())
    assert tex.count(r"\begin{table}") == 2
    # t of 5 degrees of freedom is 2.571, the deviation √(17.5 / 5) = 1.871 and √6 2.449.
    assert r"lora & $62.5 \pm 2.0$ \\" in tex
    assert (
        r"bi\_dora & $+12.5$\textsuperscript{*} {\scriptsize $[+10.5, +14.5]$, 6 pairs}"
        in tex
    )
    assert r"\label{tab:over-reference-steps-100}" in tex


# --- parts --------------------------------------------------------------------------


def test_a_mean_curve_has_the_points_of_all_seeds() -> None:
    runs = [
        record("lora", 0.5, seed=0, curve=[(1.0, 0.2), (2.0, 0.4), (9.0, 0.9)]),
        record("lora", 0.5, seed=1, curve=[(3.0, 0.4), (6.0, 0.6)]),
        record("lora", 0.5, seed=2),
    ]
    assert mean_curve(runs) == [
        (2.0, pytest.approx(30)),
        (4.0, pytest.approx(50)),
    ]
    assert mean_curve([]) == []


def test_settings_are_shared_or_differ() -> None:
    def with_settings(method: str, seed: int, **settings: Any) -> Record:
        return record(method, 0.5, seed=seed, settings={"seed": seed, **settings})

    shared, differing = compare_settings(
        [
            with_settings("lora", 0, model="m", rate=0.1, bf16=False),
            with_settings("lora", 1, model="m", rate=0.2, bf16=False),
            with_settings("bidora", 0, model="m", rate=0.1, outer_every=2, bf16=False),
        ]
    )
    assert shared == {"bf16": "false", "model": "m"}
    assert differing == {
        "outer_every": {"lora": "–", "bidora": "2"},
        "rate": {"lora": "0.1, 0.2", "bidora": "0.1"},
    }


def test_each_of_many_methods_has_a_mark_of_its_own() -> None:
    looks = styles([str(i) for i in range(2 * len(MARKERS))])
    marks = {(look["marker"], look["fillstyle"]) for look in looks.values()}
    assert len(marks) == 2 * len(MARKERS)
    assert {looks[str(i)]["fillstyle"] for i in range(len(MARKERS))} == {"full"}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("ground", ["#ffffff", "#14171a"])
def test_colours_are_seen_on_light_and_on_dark(ground: str) -> None:
    for colour in COLOURS:
        dark, light = sorted((luminance(colour), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_markdown_has_every_score_and_trial_and_nothing_that_breaks_it(
    tmp_path: Path,
) -> None:
    whole = full_study()
    whole.records.append(record("a|b <i>", 0.5, task="x_y"))
    write_report(whole, tmp_path)
    text = (tmp_path / "tables.md").read_text("utf-8")
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3  # 100 examples at equal steps, all at equal time, the sweep
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, rows
    # 60, 61 and 63 of LoRA: mean 61.3; t of two degrees is 4.303, s / sqrt(3) is 0.88.
    assert "| sst2 (accuracy) | lora | 61.3 ± 3.8 |" in text
    assert "| learning\\_rate=0.01 | 70.0 ← |" in text
    assert "a\\|b &lt;i&gt;" in text
    assert "<i>" not in text
    assert "x\\_y (accuracy)" in text
