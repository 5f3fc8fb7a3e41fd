"""How much memory does a product take, and what makes it less?

    python -m benchmarks.product_memory

from the root of the repository; about four minutes on one core and 2 GiB of memory. Writes
benchmarks/results/product_memory.json and docs/images/benchmarks/product_memory.png.
Needs a system that tells the peak memory of a process (Linux, macOS).

A process of its own for each way, since the peak of one never goes down again. It is
forked from one that holds the model, and reports by how much its peak of resident memory
rose. It then counts the most bytes of tensors held at once by torch's profiler, as
`step_cost` does, and takes time by turns with a training step. All is divided by what a
training step of exact DoRA takes: forward and backward pass, without the optimizer.

A product is u^T of the second derivatives of the inner loss in (w, w) and (w, magnitudes),
at the same random u for all; that they agree with the plain exact product is checked.

- *exact*: double backward, which builds the graph of the gradient anew.
- *exact, graph kept*: an inner gradient that keeps its graph, the outer gradient, then the
  product, as in an iteration of `darts`: compare its time with three gradients more.
- *exact, two micro-batches*: the batch in two halves, each with its own graph.
- *exact, checkpointed*: torch's non-reentrant activation checkpointing by layer. The graph
  of the gradient keeps what was computed again.
- *exact, blocks again*: a trial of ours, `_blocks.py`. What a layer keeps is its input.
- *forward-over-reverse*, and *as it was*, by `torch.func.grad`, which builds the graph of
  the backward pass too.
- *central difference*: two gradients.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import _model
from benchmarks._common import (
    BLUE,
    GREY,
    add_model_arguments,
    done,
    model_title,
    new_figure,
    plain_axes,
    save_picture,
    write_result,
)
from benchmarks._product_ways import Batch, Ways
from benchmarks.unroll_memory import MALLOC
from hypergrad.compare._measure import peak_bytes

QUESTION = "How much memory does a product take, and what makes it less?"
STEP, EXACT = "exact-DoRA step", "exact"
WAYS = (
    STEP,
    "central difference",
    EXACT,
    "exact, graph kept",
    "exact, two micro-batches",
    "exact, checkpointed",
    "exact, blocks again",
    "forward-over-reverse",
    "forward-over-reverse as it was",
)


def main() -> None:
    if not MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.product_memory", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    base = _model.roberta(arguments.layers, arguments.tokens, "eager")
    ways = Ways(_model.with_adapter(base, arguments.rank, dora=True))
    batch = _model.draw_batch(arguments.batch, arguments.tokens, 0)
    results: list[dict[str, Any]] = []
    products: dict[str, list[float]] = {}
    with tqdm(WAYS, unit="process") as bar:
        for way in bar:
            bar.set_postfix_str(way)
            one = in_a_fork(lambda w=way: measured(ways, w, batch, arguments.rounds))
            product = one.pop("product")
            if product is not None:
                products[way] = product
            results.append(one)
    step = results[0]
    for one in results:
        for kind in ("resident", "tensor"):
            one[f"{kind}_over_step"] = one[f"{kind}_bytes"] / step[f"{kind}_bytes"]
        one["median_time_over_step"] = statistics.median(one["time_over_step"])
        if one["way"] in products:
            one["from_exact"] = distance(products[one["way"]], products[EXACT])
    report(results)
    written = write_result(
        "product_memory",
        QUESTION,
        vars(arguments),
        arguments.threads,
        results,
        unit="bytes beyond the model: by which the peak of the process rose, and most "
        "bytes of tensors at once; seconds of the processor, and their ratios to a "
        "training step of the same round; relative difference to the exact product",
    )
    done(written, picture(results, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.set_defaults(layers=12, batch=2, tokens=128)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each")
    return parser.parse_args()


def in_a_fork(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run in a process forked from this one, which must have run no backward pass yet."""
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(run()))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        msg = "the measured process failed; its error is above."
        raise RuntimeError(msg) from None
    finally:
        child.join()


def measured(ways: Ways, way: str, batch: Batch, rounds: int) -> dict[str, Any]:
    """Take one way in a process of its own; return its bytes, seconds and product."""
    before = resident_peak()
    found = ways.take(way, batch)
    resident = resident_peak() - before
    held = peak_bytes(lambda: ways.take(way, batch), [torch.device("cpu")])
    seconds, ratios = [], []
    for _ in range(rounds):
        taken = []
        for timed in (STEP, way):
            start = time.process_time()
            ways.take(timed, batch)
            taken.append(time.process_time() - start)
        seconds.append(taken[1])
        ratios.append(taken[1] / taken[0])
    return {
        "way": way,
        "resident_bytes": resident,
        "tensor_bytes": held,
        "seconds": seconds,
        "time_over_step": ratios,
        "product": None if found is None else found.tolist(),
    }


def resident_peak() -> int:
    """Return the largest resident size that this process ever had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def distance(value: list[float], truth: list[float]) -> float:
    """Return the relative L2 distance."""
    off = sum((a - b) ** 2 for a, b in zip(value, truth, strict=True))
    return (off / sum(b**2 for b in truth)) ** 0.5


def report(results: list[dict[str, Any]]) -> None:
    print(f"{'over a training step':32} process  tensors  time  from exact")
    for one in results:
        off = one.get("from_exact")
        print(
            f"{one['way']:32}{one['resident_over_step']:8.2f}"
            f"{one['tensor_over_step']:9.2f}{one['median_time_over_step']:6.2f}"
            + ("" if off is None else f"  {off:.1e}")
        )


def picture(results: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    figure = new_figure(9, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [one["way"] for one in reversed(results)]
    for axes, kind, colour, label in (
        (left, "tensor_over_step", BLUE, "peak memory over a training step"),
        (right, "median_time_over_step", GREY, "time over a training step"),
    ):
        values = [one[kind] for one in reversed(results)]
        bars = axes.barh(names, values, color=colour, height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=4)
        axes.set_xlim(0, 1.18 * max(values))
        axes.set_xlabel(label)
        plain_axes(axes, "x")
    figure.suptitle(f"One product: {model_title(arguments)}")
    return save_picture(figure, "product_memory")


if __name__ == "__main__":
    main()
