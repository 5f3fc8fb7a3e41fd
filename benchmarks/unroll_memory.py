"""Does the memory of `unrolled` grow with the number of steps it looks back at?

    python -m benchmarks.unroll_memory

from the root of the repository; about three minutes on one core and 3 GiB of memory.
Writes benchmarks/results/unroll_memory.json and docs/images/benchmarks/unroll_memory.png.
Needs a system that tells the peak memory of a process (Linux, macOS).

A new process for each method and each K: peak memory never goes down again in one. Each
takes one plain training step, notes its peak, takes K inner steps and one hypergradient
through them, and reports how far the peak went beyond that of the plain step.

- *ours*: `BiDoRAOptimizer` with `unrolled`, which walks back one step at a time.
- *plain*: the usual way, K functional AdamW steps under `create_graph`, and one backward
  pass through all of them.

Both go through the same exact-DoRA model with eager attention, from the same weights and
optimizer state and with the same batches: that their hypergradients agree is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator
from tqdm import tqdm

from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
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
METHODS = {"ours": "unrolled (ours)", "plain": "plain autograd through all steps"}
# glibc's malloc gives large blocks back at once: the peak is then what is in use, and not
# what malloc keeps for later, which depends on the order of events.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


# -- in the measured process -----------------------------------------------------------
# torch, transformers and peft are imported here alone: a process starts with the peak of
# the one that started it, which must therefore stay small.


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take one plain step and one hypergradient; return the peaks of memory."""
    import torch

    from benchmarks import _model
    from bidora import magnitudes, use_exact_dora

    torch.set_num_threads(arguments.threads)
    base = _model.roberta(arguments.layers, arguments.tokens, "eager")
    model = _model.with_adapter(base, arguments.rank, dora=True)
    use_exact_dora(model)
    batches = [
        _model.draw_batch(arguments.batch, arguments.tokens, seed)
        for seed in range(arguments.steps + 2)
    ]
    first, *inner_batches, outer_batch = batches
    lam = magnitudes(model)
    w = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in lam}
    adamw = torch.optim.AdamW(
        w.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    model(**first).loss.backward()
    adamw.step()
    for p in model.parameters():
        p.grad = None
    before = peak_bytes()
    hypergradient = {"ours": ours, "plain": plain}[arguments.method]
    start = time.perf_counter()
    found, recorded = hypergradient(model, w, lam, adamw, inner_batches, outer_batch)
    return {
        "seconds": time.perf_counter() - start,
        "inner_parameter_bytes": bytes_of(w),
        "recorded_bytes": recorded,
        "peak_bytes_of_a_plain_step": before,
        "peak_bytes": peak_bytes(),
        "hypergradient": torch.cat([found[n].flatten() for n in sorted(lam)]).tolist(),
    }


def ours(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], int]:
    from bidora import BiDoRAOptimizer
    from hypergrad import make_estimator

    del w, lam
    estimator = make_estimator("unrolled", num_steps=len(inner_batches))
    opt = BiDoRAOptimizer(model, estimator, inner_optimizer=lambda _: adamw)
    for batch in inner_batches:
        opt.inner_step(batch)
    steps = opt.recorded_steps
    recorded = sum(
        bytes_of(step.inner_params)
        + bytes_of(step.grads)
        + sum(bytes_of(slots) for slots in step.state.values())
        for step in steps
    )
    result = estimator.estimate(
        opt.problem, inner_batch=None, outer_batch=outer_batch, steps=steps
    )
    return result.outer_grads, recorded


def plain(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], None]:
    import torch
    from torch.func import functional_call

    def loss(params: dict[str, Any], batch: Any) -> Any:
        return functional_call(model, {**params, **lam}, (), batch).loss

    state = {n: adamw.state[p] for n, p in w.items()}
    m = {n: slots["exp_avg"] for n, slots in state.items()}
    v = {n: slots["exp_avg_sq"] for n, slots in state.items()}
    now = dict(w)
    for t, batch in enumerate(inner_batches, start=2):  # step 1 was the plain one
        grads = torch.autograd.grad(
            loss(now, batch), list(now.values()), create_graph=True
        )
        for (n, p), g in zip(list(now.items()), grads, strict=True):
            m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * g
            v[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * g.square()
            d = (v[n] / (1 - BETAS[1] ** t)).sqrt() + EPS
            now[n] = p - LR * (DECAY * p + m[n] / (1 - BETAS[0] ** t) / d)
    grads = torch.autograd.grad(loss(now, outer_batch), list(lam.values()))
    return dict(zip(lam, grads, strict=True)), None


def bytes_of(tensors: dict[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


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
    runs = [(method, k) for k in arguments.window for method in METHODS]
    results, found = [], {}
    with tqdm(runs, unit="process") as bar:
        for method, k in bar:
            bar.set_postfix_str(f"{method}, K = {k}")
            one = in_new_process(arguments, method, k)
            found[method, k] = one.pop("hypergradient")
            beyond = one["peak_bytes"] - one["peak_bytes_of_a_plain_step"]
            results.append({"method": method, "steps": k, "beyond": beyond, **one})
    agreement = {
        str(k): distance(found["ours", k], found["plain", k]) for k in arguments.window
    }
    report(results, agreement)
    shown = {n: x for n, x in vars(arguments).items() if n not in ("method", "steps")}
    written = write_result(
        "unroll_memory",
        QUESTION,
        shown,
        arguments.threads,
        results,
        unit="bytes of peak memory beyond the peak of one plain training step",
        relative_difference_of_the_hypergradients=agreement,
    )
    done(written, picture(results, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.add_argument(
        "--window", type=int, nargs="+", default=[1, 5, 20], help="the K to try"
    )
    # What a measured process is told.
    parser.add_argument("--method", choices=tuple(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_new_process(arguments: argparse.Namespace, method: str, k: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.unroll_memory"]
    for name in ("layers", "batch", "tokens", "rank", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--method", method, "--steps", str(k)]
    environment = {**os.environ, **MALLOC}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def distance(value: list[float], truth: list[float]) -> float:
    """Return the relative L2 distance."""
    off = sum((a - b) ** 2 for a, b in zip(value, truth, strict=True))
    return (off / sum(b**2 for b in truth)) ** 0.5


def report(results: list[dict[str, Any]], agreement: dict[str, float]) -> None:
    print(f"{'K':>3} {'':34} MiB beyond a plain step  seconds")
    for one in results:
        print(
            f"{one['steps']:3d} {METHODS[one['method']]:34}"
            f"{one['beyond'] / 2**20:24.0f} {one['seconds']:8.1f}"
        )
    for k, off in agreement.items():
        print(f"{k:>3} the two hypergradients differ by {off:.1e} (float32)")


def picture(results: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    mib: dict[str, list[tuple[int, float]]] = {
        method: sorted(
            (one["steps"], one["beyond"] / 2**20)
            for one in results
            if one["method"] == method
        )
        for method in METHODS
    }
    top = max(size for sizes in mib.values() for _, size in sizes)
    colours = {"plain": ORANGE, "ours": BLUE}
    for method, colour in colours.items():
        label = METHODS[method]
        axes.plot(
            *zip(*mib[method], strict=True), "o-", color=colour, lw=2, label=label
        )
        other = dict(mib["ours" if method == "plain" else "plain"])
        for k, size in mib[method]:
            crowded = 0 < other[k] - size < 0.08 * top
            axes.annotate(
                f"{size:,.0f}",
                (k, size),
                (0, -17 if crowded else 8),
                textcoords="offset points",
                ha="center",
                color=colour,
            )
    copies = sorted(
        (one["steps"], one["recorded_bytes"] / 2**20)
        for one in results
        if one["method"] == "ours"
    )
    text = "of ours, the copies of w, its gradient and AdamW's state"
    axes.plot(*zip(*copies, strict=True), ":", color=GREY, lw=1.5, label=text)
    axes.set_ylim(-0.09 * top, 1.1 * top)
    axes.xaxis.set_major_locator(FixedLocator(arguments.window))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 0 else "")
    axes.set_xlabel("K, inner steps that are differentiated through")
    axes.set_ylabel("MiB of peak memory beyond one plain step", color=INK)
    axes.legend(loc="upper left", frameon=False)
    plain_axes(axes, "y")
    axes.set_title(f"Memory of a hypergradient: {model_title(arguments)}", pad=14)
    return save_picture(figure, "unroll_memory")


if __name__ == "__main__":
    main()
