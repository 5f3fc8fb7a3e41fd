"""The results of `step_cost`: ratios, a table, and the targets at its own setting."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks._common import paired_ratios
from benchmarks._step_rows import ECONOMICAL, EXACT, LORA, RECOMPUTED, Row

SETTING = {"layers": 2, "batch": 16, "tokens": 128, "rank": 4, "dtype": "float32"}
# At this setting on a CPU: what, divided by what, at most.
TIME_TARGETS = (
    (EXACT, LORA, 1.05),
    (ECONOMICAL, LORA, 1.3),
    ("darts, forward", EXACT, 3.1),
    ("darts, exact product", EXACT, 3.5),
    (RECOMPUTED, EXACT, 4.3),
    ("darts", EXACT, 4.0),
)
MEMORY_TARGETS = (("darts", EXACT, 1.15), ("darts, exact product", EXACT, 2.2))


def summarise(rows: list[Row], tokens: int) -> list[dict[str, Any]]:
    """Return the results, the fastest first and what failed last."""
    by_name = {row.name: row for row in rows}
    results = []
    for row in rows:
        found: dict[str, Any] = {"name": row.name, "kind": row.kind, **row.facts}
        results.append(found)
        if row.failure:
            found["failure"] = row.failure
            continue
        seconds = list(row.seconds.values())
        found["seconds"] = {
            "median": statistics.median(seconds),
            "by_round": row.seconds,
        }
        found["tokens_per_second"] = tokens / statistics.median(seconds)
        found["peak_bytes"] = row.peak_bytes
        found["repeats_in_a_round"] = row.repeats
        for key, other in (("lora", by_name[LORA]), ("exact_dora", by_name[EXACT])):
            turns = [turn for turn in row.seconds if turn in other.seconds]
            if other.failure or not turns:
                continue
            found[f"ratio_to_{key}"] = paired_ratios(
                [row.seconds[t] for t in turns], [other.seconds[t] for t in turns]
            )
            if row.peak_bytes and other.peak_bytes:
                found[f"peak_bytes_over_{key}"] = row.peak_bytes / other.peak_bytes
        found.update(row.note)
    return sorted(
        results,
        key=lambda found: found["seconds"]["median"] if "seconds" in found else 1e9,
    )


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets with what was found, and print them."""
    by_name = {found["name"]: found for found in results}
    keys = {LORA: "lora", EXACT: "exact_dora"}
    judged = []
    for quantity, targets in (("seconds", TIME_TARGETS), ("bytes", MEMORY_TARGETS)):
        for name, over, at_most in targets:
            row = by_name.get(name, {})
            if quantity == "seconds":
                found = row.get(f"ratio_to_{keys[over]}", {}).get("median")
            else:
                found = row.get(f"peak_bytes_over_{keys[over]}")
            if found is None:
                continue
            judged.append(
                {
                    "what": name,
                    "over": over,
                    "quantity": quantity,
                    "at_most": at_most,
                    "found": found,
                    "met": found <= at_most,
                }
            )
            print(
                f"{quantity:8}{name:34} over {over:16} {found:5.2f}, target {at_most}: "
                + ("met" if found <= at_most else "MISSED")
            )
    return judged


def report(results: list[dict[str, Any]]) -> None:
    print(
        f"{'':34} over LoRA [min, max]   over exact DoRA     seconds  tokens/s    MiB "
        " over exact DoRA   F  B  HVP"
    )
    for found in results:
        if "failure" in found:
            print(f"{found['name']:34} {found['failure']}")
            continue
        ratios = [found.get(f"ratio_to_{key}") for key in ("lora", "exact_dora")]
        cells = [
            f"{r['median']:6.3f} [{r['min']:.2f}, {r['max']:.2f}]" if r else "–"
            for r in ratios
        ]
        peak, over = found["peak_bytes"], found.get("peak_bytes_over_exact_dora")
        print(
            f"{found['name']:34}",
            *(f"{cell:21}" for cell in cells),
            f"{found['seconds']['median']:8.3f} {found['tokens_per_second']:9.0f}",
            "      –" if peak is None else f"{peak / 2**20:7.0f}",
            "        –" if over is None else f"{over:9.2f}",
            "   ",
            *(f"{n:3d}" for n in found.get("per_outer_step", {}).values()),
        )
