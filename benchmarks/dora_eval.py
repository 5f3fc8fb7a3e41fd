"""What does DoRA cost in eval, and what do kept gains save?

    python -m benchmarks.dora_eval

from the root of the repository; about two minutes on one core. Writes
benchmarks/results/dora_eval.json and docs/images/benchmarks/dora_eval.png.

A random RoBERTa of two layers, 768 wide, with adapters of rank 8 in every linear layer of
them, forward without gradients: exact DoRA with its gains kept, and computed anew in each
pass; PEFT's DoRA, plain and in `DoraCaching`, which keeps norms and B A; and the merged
model, by whose time all are divided, pass by pass. Seconds of the processor, by turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from transformers import RobertaConfig, RobertaModel

from benchmarks._common import (
    BLUE,
    add_threads_argument,
    done,
    new_figure,
    paired_ratios,
    plain_axes,
    save_picture,
    write_result,
)
from bidora.dora import use_exact_dora

QUESTION = "What does DoRA cost in eval, and what do kept gains save?"
SHAPES = ((1, 16), (1, 64), (4, 128))
WIDTH, LAYERS, RANK = 768, 2, 8


def models() -> dict[str, Any]:
    """Return the same model in each form."""
    torch.manual_seed(0)
    base = RobertaModel(
        RobertaConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=1000)
    )
    config = LoraConfig(
        r=RANK, use_dora=True, target_modules=["query", "key", "value", "dense"]
    )
    peft = get_peft_model(cast(Any, base), config).eval()
    exact = copy.deepcopy(peft)
    use_exact_dora(exact)
    return {
        "merged": copy.deepcopy(peft).merge_and_unload(),
        "exact, kept": exact,
        "exact, anew": copy.deepcopy(exact),
        "PEFT, caching": copy.deepcopy(peft),
        "PEFT": peft,
    }


def forgetful(model: Any) -> Callable[[Any], None]:
    """Return a pass before which a magnitude was written to, as by a step."""
    written = [p for n, p in model.named_parameters() if "magnitude" in n]

    def run(ids: Any) -> None:
        for p in written:
            p.mul_(1.0)
        model(input_ids=ids)

    return run


def cached(model: Any) -> Callable[[Any], None]:
    """Return a pass in PEFT's caching context."""

    def run(ids: Any) -> None:
        with DoraCaching():
            model(input_ids=ids)

    return run


def seconds(run: Callable[[Any], None], ids: Any) -> float:
    """Return the processor's seconds of one pass."""
    start = time.process_time()
    run(ids)
    return time.process_time() - start


def main() -> None:
    """Measure, and write results and picture."""
    parser = argparse.ArgumentParser(description=QUESTION)
    add_threads_argument(parser)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs: dict[str, Callable[[Any], None]] = {}
    for name, model in models().items():
        makers = {"exact, anew": forgetful, "PEFT, caching": cached}
        make = makers.get(name, lambda model: lambda ids: model(input_ids=ids))
        runs[name] = make(model)

    results: dict[str, Any] = {}
    with torch.no_grad():
        for shape in SHAPES:
            ids = torch.randint(5, 1000, shape)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(arguments.rounds + 1):
                for name, run in runs.items():
                    taken = seconds(run, ids)
                    if turn:  # the first warms up, and fills what is kept
                        times[name].append(taken)
            base = times["merged"]
            results[f"{shape[0]} x {shape[1]}"] = {
                name: {"seconds": own, "ratio": paired_ratios(own, base)}
                for name, own in times.items()
            }

    figure = new_figure(7, 3)
    for place, (title, found) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), place + 1)
        names = list(found)
        axes.barh(names, [found[n]["ratio"]["median"] for n in names], color=BLUE)
        axes.set_title(f"{title} tokens", fontsize=9)
        axes.set_xlabel("times the merged model", fontsize=8)
        axes.tick_params(labelsize=8)
        if place:
            axes.set_yticklabels([])
        plain_axes(axes, "x")
    settings = {"rounds": arguments.rounds, "width": WIDTH, "rank": RANK}
    done(
        write_result("dora_eval", QUESTION, settings, arguments.threads, results),
        save_picture(figure, "dora_eval"),
    )


if __name__ == "__main__":
    main()
