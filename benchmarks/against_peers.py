"""How accurate and how costly are other libraries' hypergradients? Where do they fail?

    python -m benchmarks.against_peers

from the root of the repository; about two minutes on one core. Writes
benchmarks/results/against_peers.json and docs/images/benchmarks/against_peers.png.

Betty, TorchOpt and higher, at their defaults and at well-chosen settings, beside this
library, in float64, on two kinds of problem:

- *at a minimum*: ridge regression and quadratics with closed forms, a small network whose
  truth comes from a dense Hessian; one of them has no minimum but a saddle point.
- *through steps*: a small network through real optimizer steps from a fresh state; the
  truth is plain autograd through optimizers written out in `_truth.py`.

Each kind then with what goes wrong in practice: an outer loss whose gradient is 0, tiny or
NaN, a λ that the inner loss does not use, weights that are not contiguous, LoRA's B = 0
under Adam. Each is called three times, to see whether w and λ are left where they belong.
Failures are counted, ours among them:

- *raises* an exception, *NaN*, or *zeros* where the answer is not 0;
- *wrong* by more than 1e-2; said in a warning (marked !), or in silence;
- *moves w*: more than 1e-4 off after the calls.

An error or a warning is right where the outer loss is NaN, and at the saddle point as
good as the derivative of the stationary point; NaN is right where the outer loss is NaN.

A peer that is not installed is left out, and reported. `_peer_calls.py` shows how each is
called. Times are those of one call, over our counterpart's of the same round: on the first
problem of the kind, where bookkeeping is most of it, and on a network of 33,000 weights.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.patches import Patch, Rectangle
from tqdm import tqdm

from benchmarks import _peer_cases
from benchmarks._common import (
    GREY,
    INK,
    Contender,
    add_threads_argument,
    done,
    new_figure,
    paired_ratios,
    save_picture,
    time_in_rotation,
    write_result,
)
from benchmarks._peer_cases import Case
from benchmarks._peers import ENTRIES, OURS, PIP, Entry, installed
from benchmarks._truth import Params
from hypergrad.testing import relative_error

QUESTION = (
    "How accurate and how costly are other libraries' hypergradients, and where do they "
    "fail?"
)
CALLS = 3
WRONG, MOVED = 1e-2, 1e-4
KINDS = {
    "minimum": "At a minimum: implicit differentiation",
    "steps": "Through inner steps: unrolling and its approximations",
}
FAILURES = ("raises", "nan", "zeros", "wrong", "warned", "moves w")
RIGHT, FAILED, WARNED, NONE = "#d6e4f3", "#f3b48a", "#fbe3cf", "#f4f4f4"


# -- measuring ---------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    peers = {name: installed(name) for name in PIP}
    for name, found in peers.items():
        if found is None:
            print(f"{name} is not installed, and left out: {PIP[name]}")
    results = []
    for kind, title in KINDS.items():
        cases = [_peer_cases.MAKERS[kind](seed) for seed in range(arguments.seeds)]
        entries = [e for e in ENTRIES[kind] if peers.get(e.library, OURS) is not None]
        for entry in tqdm(entries, desc=title, unit="entry"):
            results.append({"kind": kind, **outcomes(entry, cases)})
        times = seconds(kind, entries, cases[0][0], arguments.rounds)
        for entry, row in zip(entries, results[-len(entries) :], strict=True):
            row["time_over_ours"] = times[entry]
    report(results)
    libraries = {
        name: {"version": found or "not installed", "pip": PIP[name]}
        for name, found in peers.items()
    }
    written = write_result(
        "against_peers",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        results,
        unit="relative L2 distance of the indirect term from the truth, worst of seeds",
        peers=libraries,
    )
    done(written, picture(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seeds", type=int, default=5, help="problems of each kind")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    add_threads_argument(parser)
    return parser.parse_args()


def outcomes(entry: Entry, cases: list[list[Case]]) -> dict[str, Any]:
    """Return what an entry makes of each case, the worst seed counting."""
    by_case = {}
    for same in zip(*cases, strict=True):
        if entry.takes(same[0]):
            by_case[same[0].name] = max((outcome(entry, c) for c in same), key=severity)
    failed = Counter(what for found in by_case.values() for what in found["failures"])
    return {
        "library": entry.library,
        "label": entry.label,
        "cases": by_case,
        "cases_failed": sum(bool(found["failures"]) for found in by_case.values()),
        "failures": {what: failed[what] for what in FAILURES},
    }


def outcome(entry: Entry, case: Case) -> dict[str, Any]:
    """Return the error of the first call, how far w is off after the last, failures."""
    found: dict[str, Any] = {"error": None, "moved": None, "said": None}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            call = entry.prepare(case)
            answers = [call() for _ in range(CALLS)]
        except Exception as error:  # whatever a library raises is its answer
            found["said"] = f"{type(error).__name__}: {error}"
            found["shown"] = "raises"
            return found | {"failures": [] if refusable(case) else ["raises"]}
    said = [str(w.message) for w in heard if not issubclass(w.category, FutureWarning)]
    found["said"] = said[0] if said else None
    first = answers[0].indirect
    moved = max(answer.moved for answer in answers)
    found["moved"] = finite(moved)
    failures = []
    found["shown"] = kind = kind_of(first, case.truth)
    if kind == "number" and case.truth is not None:
        found["error"] = relative_error(first, case.truth)
        if found["error"] > WRONG and not (said and refusable(case)):
            failures = ["warned" if said else "wrong"]
    elif not (refusable(case) and (said or (kind == "nan" and case.truth is None))):
        failures = ["wrong" if kind == "number" else kind]
    return found | {"failures": failures + ["moves w"] * (not moved <= MOVED)}


def refusable(case: Case) -> bool:
    return case.may_refuse or case.truth is None


def kind_of(value: Params, truth: Params | None) -> str:
    if not all(t.isfinite().all() for t in value.values()):
        return "nan"
    if any(t.any() for t in value.values()):
        return "number"
    expected = truth is not None and not any(t.any() for t in truth.values())
    return "number" if expected else "zeros"


def finite(number: float) -> float | str:
    return number if number < float("inf") else "not finite"


def severity(found: dict[str, Any]) -> tuple[int, float]:
    return len(found["failures"]), found["error"] or 0.0


def seconds(
    kind: str, entries: list[Entry], small: Case, rounds: int
) -> dict[Entry, dict[str, Any]]:
    """Return the time of each entry over ours, on a small problem and on a wide one."""
    times: dict[Entry, dict[str, Any]] = {entry: {} for entry in entries}
    for size in ("small", "wide"):
        contenders = {}
        for entry in entries:
            long = "one step" if entry.one_step else "steps"
            case = small
            if size == "wide" and not entry.dense:
                case = _peer_cases.wide("minimum" if kind == "minimum" else long)
            if (size == "small" or not entry.dense) and entry.takes(case):
                runs = 10 if size == "small" else 1
                contenders[entry] = Contender(
                    entry.label, repeated(entry.prepare(case), runs), runs
                )
        ours = {e.label: c for e, c in contenders.items() if e.library == OURS}
        total = (rounds + 1) * len(contenders)
        with warnings.catch_warnings(), tqdm(total=total, unit="run") as bar:
            warnings.simplefilter("ignore")
            time_in_rotation(list(contenders.values()), rounds, bar)
        for entry, contender in contenders.items():
            ratio = paired_ratios(contender.seconds, ours[entry.like].seconds)
            times[entry][size] = {
                "over": entry.like,
                "seconds": min(contender.seconds),
                **ratio,
            }
    return times


def repeated(call: Callable[[], Any], runs: int) -> Callable[[int], dict[str, Any]]:
    def run(turn: int) -> dict[str, Any]:
        del turn
        for _ in range(runs):
            call()
        return {}

    return run


# -- showing -----------------------------------------------------------------------------


def report(results: list[dict[str, Any]]) -> None:
    print(f"{'':48} failed  time over ours (small, wide)")
    for row in results:
        failed = f"{row['cases_failed']:2d} of {len(row['cases']):2d}"
        ratios = "  ".join(
            f"{one['median']:5.2f}" for one in row["time_over_ours"].values()
        )
        print(f"{row['library']:10}{row['label']:38} {failed}  {ratios}")


def picture(results: list[dict[str, Any]]) -> Any:
    rows = {k: [row for row in results if row["kind"] == k] for k in KINDS}
    heights = [len(rows[kind]) + 2.6 for kind in KINDS]
    figure = new_figure(13, 0.34 * sum(heights) + 0.7)
    panels = figure.subplots(len(KINDS), 1, height_ratios=heights)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        panel(axes, rows[kind], title)
    figure.legend(
        handles=[
            Patch(color=RIGHT, label="right, or says that it cannot be (!)"),
            Patch(color=WARNED, label="wrong by more than 1e-2, with a warning (!)"),
            Patch(color=FAILED, label="fails"),
            Patch(color=NONE, label="cannot be asked"),
        ],
        loc="outside lower center",
        title="error of the indirect term, worst of the seeds; time over ours",
        ncols=4,
        frameon=False,
        labelcolor=INK,
    )
    return save_picture(figure, "against_peers")


def panel(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    names = list(max((row["cases"] for row in rows), key=len))
    for y, row in enumerate(rows):
        for x, name in enumerate(names):
            text, colour = cell(row["cases"].get(name))
            corner = (x - 0.47, y - 0.43)
            axes.add_patch(Rectangle(corner, 0.94, 0.86, color=colour, lw=0))
            small = 7.5 if "\n" in text else 9
            axes.text(x, y, text, ha="center", va="center", fontsize=small, color=INK)
        tail = [f"{row['cases_failed']} of {len(row['cases'])}"]
        for size in ("small", "wide"):
            ratio = row["time_over_ours"].get(size)
            tail.append(f"{ratio['median']:.2g}" if ratio else "–")
        own = tail[1] == "1"
        for k, text in enumerate(tail):
            colour = GREY if own and k else INK
            axes.text(
                len(names) + 0.1 + 0.85 * k, y, text, ha="center", va="center",
                fontsize=9, color=colour,
            )  # fmt: skip
    heads = [*names, "failed", "time,\nsmall", "time,\nwide"]
    places = [*range(len(names)), *(len(names) + 0.1 + 0.85 * k for k in range(3))]
    for x, head in zip(places, heads, strict=True):
        axes.text(x, -0.75, head, ha="center", va="bottom", fontsize=9, color=GREY)
    labels = [f"{row['library']}  {row['label']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["library"] == OURS else "normal")
    axes.set_xticks([])
    axes.set_xlim(-0.55, len(names) + 2.3)
    axes.set_ylim(len(rows) - 0.4, -1.7)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def cell(found: dict[str, Any] | None) -> tuple[str, str]:
    """Return text and colour."""
    if found is None:
        return "", NONE
    text = found["shown"]
    if text == "number":
        error = found["error"]
        text = "a number" if error is None else f"{error:.0e}" if error else "0"
        text = f"{error:.2g}" if error and WRONG < error < 100 else text
    text = "NaN" if text == "nan" else text
    if found["said"] and found["shown"] != "raises":
        text += " !"
    failures = found["failures"]
    if "moves w" in failures:
        text += "\nmoves w"
    colour = WARNED if failures == ["warned"] else FAILED if failures else RIGHT
    return text, colour


if __name__ == "__main__":
    main()
