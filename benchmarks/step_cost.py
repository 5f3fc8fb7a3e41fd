"""What does one BiDoRA iteration cost over one LoRA or DoRA step?

    python -m benchmarks.step_cost

from the root of the repository; about eight minutes on one core. Writes
benchmarks/results/step_cost.json and docs/images/benchmarks/step_cost.png. It leaves out
the dear estimators (cg, neumann, nystrom), K = 5 of unrolled and auto, which
`--estimators all` measures too, in every third round: a quarter of an hour.

    python -m benchmarks.step_cost --shape llama-2-7b --device cuda

takes a model of published shape with random weights in bfloat16 (adapters in float32, as
PEFT makes them) in place of two layers of RoBERTa-base's width, and writes
step_cost_llama-2-7b.json and .png. A contender that runs out of memory is recorded as
such, and the others go on.

An iteration is an inner and an outer step on batches of equal size, with an outer step
after every inner one (`outer_every=1`, which is the dearest setting: k divides all but
the inner step by k). `unrolled` with K steps looks back at K of them and so takes an
outer step after every K: what is reported is a K-th of K inner steps and one outer step.
The economical budget likewise: a quarter of four inner steps and one outer step, which
has the budget's smaller batches.

All contenders share the frozen weights, with adapters on query and value and AdamW, and
a classifier's head is trained. They run in one process, in rotated order, and each is
divided by the LoRA step and by the exact-DoRA step *of the same round*. Memory is that
of one iteration on its own: the most bytes of tensors held at once, beyond those that
were held before it (weights, optimizer state).
"""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import _model, _shapes, _step_picture
from benchmarks._common import add_model_arguments, done, write_result
from benchmarks._step_report import SETTING, judge, report, summarise
from benchmarks._step_rows import DEAR, PLAIN, Batch, Row, bidora_rows, plain_row
from hypergrad import NumericalWarning, estimator_names
from hypergrad.compare._measure import collected, peak_bytes

QUESTION = "What does one BiDoRA iteration cost over one LoRA or DoRA step?"
MIN_SECONDS = 2.0  # a shorter run is repeated within its round
DEAR_EVERY = 3  # rounds from one timing of a dear estimator to the next


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)  # reasons go into the JSON
    device = torch.device(arguments.device)
    base = make_base(arguments, device)
    examples = arguments.batch
    batches = _shapes.make_batches(base, examples, arguments.tokens, device, 16)
    makers: dict[str, Callable[[], Row]] = {
        name: partial(plain_row, base, arguments.rank, name) for name in PLAIN
    }
    chosen = bidora_rows(base, arguments.rank, examples, arguments.estimators)
    makers.update(dict(chosen))
    rows: list[Row] = []
    with tqdm(total=len(makers) * (arguments.rounds + 1), unit="run") as bar:
        for name, make in makers.items():
            bar.set_postfix_str(name)
            rows.append(prepare(name, make, batches, device))
            free(device)
            bar.update()
        time_in_rounds(rows, arguments.rounds, batches, device, bar)
    results = summarise(rows, examples * arguments.tokens)
    report(results)
    name = "step_cost" + (f"_{arguments.shape}" if arguments.shape else "")
    more: dict[str, Any] = {}
    setting = {name: getattr(arguments, name) for name in SETTING}
    if not arguments.shape and setting == SETTING:
        more["targets"] = judge(results)
    written = write_result(
        name,
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        results,
        command=shlex.join(["python", "-m", "benchmarks.step_cost", *sys.argv[1:]]),
        device=device_name(device),
        base_parameters=sum(p.numel() for p in base.parameters()),
        unit="seconds of an iteration (on one thread of a CPU those that it worked, beside "
        "those of the wall clock), and ratios to those of the step of the same round; "
        "most bytes of tensors held at once beyond those before the iteration; tokens of "
        "inner batches a second",
        **more,
    )
    done(written, _step_picture.draw(results, name, title(arguments, device)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.set_defaults(layers=None, batch=16, tokens=128)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument(
        "--shape",
        choices=tuple(_shapes.SHAPES),
        help="a published shape at full depth, or with --layers of its layers; without "
        "it, 2 layers of RoBERTa-base's width with a vocabulary of 1,000",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the base weights; bfloat16 with --shape, else float32",
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=("all", *estimator_names()),
        metavar="NAME",
        help="those to measure, or all; without it, all but the dear ones",
    )
    parser.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="attention implementation of the model; sdpa is transformers' default",
    )
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.shape else "float32")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch finds no CUDA device.")
    return arguments


def make_base(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape:
        return _shapes.make_model(
            arguments.shape, arguments.layers, arguments.attention, dtype, device
        )
    arguments.layers = arguments.layers or 2
    base = _model.roberta(arguments.layers, arguments.tokens, arguments.attention)
    return base.to(device, dtype)


def prepare(
    name: str,
    make: Callable[[], Row],
    batches: list[Batch],
    device: torch.device,
) -> Row:
    """Return a row that is warmed up and whose memory is known."""
    row = Row(name, "not made", lambda *_: {}, 1, {})
    with failures_of(row):
        made = make()
        row.kind, row.facts = made.kind, made.facts
        few = [{n: t[:4] for n, t in batch.items()} for batch in batches]
        made.run(few, 0)  # makes all state
        with collected():
            start = now(device)
            made.peak_bytes = peak_bytes(partial(made.run, batches, 0), [device])
            taken = now(device) - start
        made.repeats = min(50, math.ceil(MIN_SECONDS / taken))
        row = made
    return row


def time_in_rounds(
    rows: list[Row], rounds: int, batches: list[Batch], device: torch.device, bar: Any
) -> None:
    """Time each row once in every round, the dear ones in every third.

    The order is rotated from round to round, so that a slow phase of the machine, or
    what a contender leaves in the caches, does not always hit the same neighbour.
    """
    for turn in range(rounds):
        shift = turn * len(rows) // rounds
        for row in [*rows[shift:], *rows[:shift]]:
            bar.set_postfix_str(row.name)
            bar.update()
            if row.failure or (row.name in DEAR and turn % DEAR_EVERY):
                continue
            with failures_of(row), collected():
                start, start_wall = now(device), time.perf_counter()
                for k in range(row.repeats):
                    row.note = row.run(batches, turn * row.repeats + k)
                per = row.repeats * row.iterations
                row.seconds[turn] = (now(device) - start) / per
                row.wall[turn] = (time.perf_counter() - start_wall) / per
            if row.failure:
                free(device)


def now(device: torch.device) -> float:
    """Return seconds; on one thread of a CPU, those that it worked for this process.

    These do not count what other processes take of the core.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


@contextmanager
def failures_of(row: Row) -> Iterator[None]:
    """Record that the block failed, and go on; Ctrl-C and faults of Python get through."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.failure = "out of memory"
    except RuntimeError as error:  # our own errors too, such as of a second derivative
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if row.failure:
        row.run = lambda *_: {}  # lets go of model and optimizer


def free(device: torch.device) -> None:
    """Give the memory of what is gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def title(arguments: argparse.Namespace, device: torch.device) -> str:
    """Return what was measured, in a line."""
    layers = f"{arguments.layers} layer" + "s" * (arguments.layers != 1)
    if arguments.shape is None:
        model = f"RoBERTa-base width, {layers}"
    else:
        model = arguments.shape + (f", {layers}" if arguments.layers else "")
    threads = f"{arguments.threads} thread" + "s" * (arguments.threads != 1)
    where = device_name(device) if device.type == "cuda" else threads
    size = f"{arguments.batch} × {arguments.tokens} tokens"
    return f"{model}, {arguments.dtype}, {size}, {where}"


if __name__ == "__main__":
    main()
