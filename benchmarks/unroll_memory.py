"""Does the memory of `unrolled` grow with the number of steps it looks back at?

    python -m benchmarks.unroll_memory

from the root of the repository; about eight minutes on one core and 3 GiB of memory.
Writes benchmarks/results/unroll_memory.json and docs/images/benchmarks/unroll_memory.png.
Needs a system that tells the peak memory of a process (Linux, macOS).

A new process for each method and each K: peak memory never goes down again in one. Each
takes one plain training step, notes its peak, takes K inner steps and one hypergradient
through them, and reports how far the peak went beyond that of the plain step.

- *ours*: `BiDoRAOptimizer` with `unrolled`, which walks back one step at a time. Once with
  the classification head trained, which has nine tenths of the trained weights, once with
  it frozen, and once on larger batches: the graph grows with them, the records do not.
- *plain*: the usual way, K functional AdamW steps under `create_graph`, and one backward
  pass through all of them.
- *TorchOpt*, *higher*: the same with the steps of their differentiable optimizers, each on
  the tensors that are trained. What their own examples do, which is to step the whole
  module, is tried first; that it fails is counted.

All go through the same exact-DoRA model with eager attention, from the same weights and
optimizer state and with the same batches: that their hypergradients agree is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator
from tqdm import tqdm

from benchmarks._common import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    ROOT,
    add_model_arguments,
    done,
    model_title,
    new_figure,
    plain_axes,
    save_picture,
    write_result,
)

QUESTION = "Does the memory of `unrolled` grow with the number of steps?"
METHODS = {
    "ours": "unrolled (ours)",
    "ours-frozen": "unrolled (ours), head frozen",
    "plain": "plain autograd through all steps",
    "torchopt": "TorchOpt's adamw through all steps",
    "higher": "higher's Adam through all steps",
}
WHOLE = {
    "whole-torchopt": "TorchOpt's MetaAdamW on the whole model",
    "whole-higher": "higher's innerloop_ctx on the whole model",
}
LARGE = {"ours-large": "unrolled (ours), 16 × 128 tokens"}
LARGE_BATCH = {"batch": 16, "tokens": 128}
PEERS = {"torchopt": "torchopt", "higher": "higher"}
LIGHT_BLUE = "#6fa8dc"
# glibc's malloc gives large blocks back at once: the peak is then what is in use, and not
# what malloc keeps for later, which depends on the order of events.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


# -- in the measured process -----------------------------------------------------------
# torch, transformers and peft are imported here alone: a process starts with the peak of
# the one that started it, which must therefore stay small.


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take one plain step and one hypergradient; return the peaks of memory."""
    import torch

    from benchmarks import _model, _unrolling
    from bidora import magnitudes, use_exact_dora

    torch.set_num_threads(arguments.threads)
    base = _model.roberta(arguments.layers, arguments.tokens, "eager")
    model = _model.with_adapter(base, arguments.rank, dora=True)
    use_exact_dora(model)
    if arguments.method == "ours-frozen":
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and "lora_" in name)
    batches = [
        _model.draw_batch(arguments.batch, arguments.tokens, seed)
        for seed in range(arguments.steps + 2)
    ]
    first, *inner_batches, outer_batch = batches
    lam = magnitudes(model)
    w = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in lam}
    adamw = torch.optim.AdamW(
        w.values(),
        lr=_unrolling.LR,
        betas=_unrolling.BETAS,
        eps=_unrolling.EPS,
        weight_decay=_unrolling.DECAY,
    )
    model(**first).loss.backward()
    adamw.step()
    for p in model.parameters():
        p.grad = None
    before = peak_bytes()
    hypergradient = _unrolling.METHODS[arguments.method]
    start = time.perf_counter()
    found, recorded = hypergradient(model, w, lam, adamw, inner_batches, outer_batch)
    return {
        "seconds": time.perf_counter() - start,
        "inner_parameter_bytes": _unrolling.bytes_of(w),
        "recorded_bytes": recorded,
        "peak_bytes_of_a_plain_step": before,
        "peak_bytes": peak_bytes(),
        "hypergradient": torch.cat([found[n].flatten() for n in sorted(lam)]).tolist(),
    }


def peak_bytes() -> int:
    """Return the largest resident size that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -- in the process that starts the others -----------------------------------------------


def main() -> None:
    arguments = parse()
    if arguments.method:
        print(json.dumps(measured(arguments)))
        return
    versions = {name: version_of(name) for name in PEERS}
    for name in (n for n, found in versions.items() if found is None):
        print(f"{name} is not installed, and left out: pip install {name}")
    methods = [m for m in METHODS if versions.get(m, "ours") is not None]
    least = min(arguments.window)
    whole = [
        (m, least) for m in WHOLE if versions[m.removeprefix("whole-")] is not None
    ]
    runs = [*whole, *((method, k) for k in arguments.window for method in methods)]
    runs += [(method, k) for k in (least, max(arguments.window)) for method in LARGE]
    results, failures, found = [], [], {}
    with tqdm(runs, unit="process") as bar:
        for method, k in bar:
            bar.set_postfix_str(f"{method}, K = {k}")
            try:
                one = in_new_process(arguments, method, k)
            except RuntimeError as error:
                if method.startswith("ours") or method == "plain":
                    raise
                failures.append(
                    {"method": method, "steps": k, "error": last_error(str(error))}
                )
                continue
            found[method, k] = one.pop("hypergradient")
            beyond = one["peak_bytes"] - one["peak_bytes_of_a_plain_step"]
            results.append({"method": method, "steps": k, "beyond": beyond, **one})
    agreement = {
        f"{method}, {k}": distance(value, found["plain", k])
        for (method, k), value in found.items()
        if method in ("ours", *PEERS)
    }
    growth = growth_of(results)
    report(results, failures, agreement, growth)
    shown = {n: x for n, x in vars(arguments).items() if n not in ("method", "steps")}
    written = write_result(
        "unroll_memory",
        QUESTION,
        shown,
        arguments.threads,
        results,
        unit="bytes of peak memory beyond the peak of one plain training step",
        peers={name: found or "not installed" for name, found in versions.items()},
        failures=failures,
        relative_difference_to_plain_autograd=agreement,
        over_the_fewest_steps=growth,
    )
    done(written, picture(results, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.add_argument(
        "--window", type=int, nargs="+", default=[1, 5, 20], help="the K to try"
    )
    # What a measured process is told.
    names = (*METHODS, *WHOLE, *LARGE)
    parser.add_argument("--method", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def in_new_process(arguments: argparse.Namespace, method: str, k: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.unroll_memory"]
    settings = vars(arguments) | (LARGE_BATCH if method in LARGE else {})
    for name in ("layers", "batch", "tokens", "rank", "threads"):
        command += [f"--{name}", str(settings[name])]
    command += ["--method", method, "--steps", str(k)]
    environment = {**os.environ, **MALLOC}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def last_error(stderr: str) -> str:
    """Return the exception that a traceback ends with, on one line."""
    lines = stderr.strip().splitlines()
    starts = [
        n for n, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exit)", line)
    ]
    return " ".join(line.strip() for line in lines[max(starts, default=0) :])


def distance(value: list[float], truth: list[float]) -> float:
    """Return the relative L2 distance."""
    off = sum((a - b) ** 2 for a, b in zip(value, truth, strict=True))
    return (off / sum(b**2 for b in truth)) ** 0.5


def growth_of(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the peaks over those of the same method with the fewest steps."""
    growth = {}
    least = {one["method"]: one for one in reversed(results)}
    for one in results:
        base = least[one["method"]]
        if one is not base:
            growth[f"{one['method']}, {one['steps']}"] = {
                kind: one[kind] / base[kind] for kind in ("peak_bytes", "beyond")
            }
    return growth


def report(
    results: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    agreement: dict[str, float],
    growth: dict[str, dict[str, float]],
) -> None:
    print(f"{'K':>3} {'':34} MiB beyond a plain step  seconds  from plain autograd")
    for one in results:
        off = agreement.get(f"{one['method']}, {one['steps']}")
        print(
            f"{one['steps']:3d} {(METHODS | LARGE).get(one['method'], one['method']):34}"
            f"{one['beyond'] / 2**20:24.0f} {one['seconds']:8.1f}  "
            + ("" if off is None else f"{off:.1e} (float32)")
        )
    for name, ratios in growth.items():
        print(
            f"{name} steps over the fewest: peak of the process "
            f"{ratios['peak_bytes']:.2f}, beyond a plain step {ratios['beyond']:.2f}"
        )
    for one in failures:
        print(f"{one['steps']:3d} {one['method']}: {one['error']}")


def picture(results: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    figure = new_figure(9, 5.4)
    axes = figure.subplots()
    mib: dict[str, list[tuple[int, float]]] = {
        method: sorted(
            (one["steps"], one["beyond"] / 2**20)
            for one in results
            if one["method"] == method
        )
        for method in METHODS
    }
    mib = {method: points for method, points in mib.items() if points}
    top = max(size for sizes in mib.values() for _, size in sizes)
    colours = {"torchopt": PURPLE, "higher": GREEN, "plain": ORANGE, "ours": BLUE}
    colours["ours-frozen"] = LIGHT_BLUE
    last, low = max(arguments.window), 0.0
    for method in sorted(mib, key=lambda method: mib[method][-1][1]):
        (*_, (k, size)), colour = mib[method], colours[method]
        if k == last:
            low = max(size, low)  # lines that end at one height have labels on top
            axes.annotate(
                f"{size:,.0f}",
                (k, low),
                (10, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
            low += 0.05 * top
    for method in (m for m in colours if m in mib):
        below = method == "torchopt"  # the same line as that of plain autograd
        axes.plot(
            *zip(*mib[method], strict=True),
            "o-",
            color=colours[method],
            lw=6 if below else 2,
            alpha=0.5 if below else 1,
            label=METHODS[method],
        )
    copies = sorted(
        (one["steps"], one["recorded_bytes"] / 2**20)
        for one in results
        if one["method"] == "ours"
    )
    text = "of ours, the copies of w and AdamW's state"
    axes.plot(*zip(*copies, strict=True), ":", color=GREY, lw=1.5, label=text)
    axes.set_ylim(0, 1.14 * top)
    axes.set_xlim(0, 1.08 * last)
    axes.xaxis.set_major_locator(FixedLocator(arguments.window))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_xlabel("K, inner steps that are differentiated through")
    axes.set_ylabel("MiB of peak memory beyond one plain step", color=INK)
    axes.legend(loc="upper left", frameon=False)
    plain_axes(axes, "y")
    axes.set_title(f"Memory of a hypergradient: {model_title(arguments)}", pad=14)
    return save_picture(figure, "unroll_memory")


if __name__ == "__main__":
    main()
