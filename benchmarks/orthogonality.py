"""What does the orthogonality term cost, beside a training step and materialised?

    python -m benchmarks.orthogonality

from the root of the repository; three minutes on one core and 2 GiB of memory. Writes
benchmarks/results/orthogonality.json and docs/images/benchmarks/orthogonality.png.

Two questions, each answered by value and gradient together:

- *24 layers of 768*: the query and value of RoBERTa-base's twelve layers. The term is
  timed beside a training step of the same exact-DoRA model, and divided by the step of the
  same round.
- *One layer of 4096*: ours, and in row blocks, where nothing is kept, over the Gram matrix
  written out; value and gradient of all three against float64.

The first call also makes what is kept, W0 W0ᵀ, once for as long as W0 stays as it is.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import _model
from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Contender,
    add_threads_argument,
    done,
    new_figure,
    paired_ratios,
    plain_axes,
    save_picture,
    time_in_rotation,
    write_result,
)
from bidora import use_exact_dora
from bidora.dora.orthogonality import orthogonality

QUESTION = "What does the orthogonality term cost?"
STEP, OURS, BLOCKS, WRITTEN_OUT = (
    "training step",
    "ours",
    "ours, row blocks",
    "written out",
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = small_layers(arguments)
    rows = compare(
        {
            STEP: training(model, arguments),
            OURS: term(model, orthogonality),
            BLOCKS: term(model, functools.partial(orthogonality, max_cache_bytes=0)),
            WRITTEN_OUT: term(model, written_out),
        },
        over=STEP,
        rounds=arguments.rounds,
        shape=f"{2 * arguments.layers} layers of 768",
    )
    del model
    rows += one_large_layer(arguments)
    report(rows)
    written = write_result(
        "orthogonality",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        rows,
        unit="seconds of value and gradient over those of `over` in the same round",
    )
    done(written, picture(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--layers", type=int, default=12, help="transformer layers")
    parser.add_argument("--batch", type=int, default=16, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in an example")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--size", type=int, default=4096, help="of the large layer")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    add_threads_argument(parser)
    return parser.parse_args()


def small_layers(arguments: argparse.Namespace) -> nn.Module:
    base = _model.roberta(arguments.layers, arguments.tokens, "sdpa")
    return ready(_model.with_adapter(base, arguments.rank, dora=True))


def one_large_layer(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the large layer, with their distance from float64."""
    torch.manual_seed(0)
    size = arguments.size
    net = nn.Sequential(nn.Linear(size, size, bias=False))
    lora = LoraConfig(r=arguments.rank, use_dora=True, target_modules=["0"])
    model = ready(get_peft_model(net, lora))  # pyright: ignore[reportArgumentType]
    runs = {
        WRITTEN_OUT: term(model, written_out),
        OURS: term(model, orthogonality),
        BLOCKS: term(model, functools.partial(orthogonality, max_cache_bytes=0)),
    }
    start = time.perf_counter()
    orthogonality(model)
    first = time.perf_counter() - start
    shape = f"one layer of {size}"
    rows = compare(runs, over=WRITTEN_OUT, rounds=arguments.rounds, shape=shape)
    found = {name: value_and_gradient(run) for name, run in runs.items()}
    value, gradient = value_and_gradient(term(model.double(), written_out))
    for row in rows:
        own_value, own_gradient = found[row["name"]]
        row["relative_error_of_value"] = abs(own_value / value - 1)
        off = (own_gradient.double() - gradient).norm() / gradient.norm()
        row["relative_error_of_gradient"] = float(off)
        if row["name"] == OURS:
            row["seconds_of_the_first_call"] = first
            row["kept_bytes"] = 4 * size**2
    return rows


def ready(model: Any) -> Any:
    """Move B away from 0, and make the model exact."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    use_exact_dora(model)
    return model


# -- what is timed -----------------------------------------------------------------------


def training(model: Any, arguments: argparse.Namespace) -> Callable[[int], Any]:
    own = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(own, lr=1e-3)
    batch = _model.draw_batch(arguments.batch, arguments.tokens, 0)

    def run(turn: int) -> dict[str, Any]:
        # In the warm-up an example alone, which makes all state too.
        part = batch if turn else {name: tensor[:1] for name, tensor in batch.items()}
        model(**part).loss.backward()
        adamw.step()
        adamw.zero_grad()
        return {}

    return run


def term(model: Any, penalty: Callable[[Any], Tensor]) -> Callable[[int], Any]:
    """Return what takes the value of a penalty and its gradient in A and B."""
    factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]

    def run(turn: int) -> dict[str, Any]:
        del turn
        value = penalty(model)
        return {"result": (value, torch.autograd.grad(value, factors))}

    return run


def written_out(model: Any) -> Tensor:
    r"""Return Σ ‖V̂ V̂ᵀ − I‖² from the matrices themselves."""
    total = torch.zeros(())
    for module in model.modules():
        if not getattr(module, "lora_magnitude_vector", None):
            continue
        a, b = (f["default"].weight for f in (module.lora_A, module.lora_B))
        v = module.base_layer.weight + module.scaling["default"] * b @ a
        v = nn.functional.normalize(v, dim=1)
        gram = v @ v.T
        total = total + (gram - torch.eye(len(v), dtype=v.dtype)).square().sum()
    return total


def value_and_gradient(run: Callable[[int], Any]) -> tuple[float, Tensor]:
    value, gradient = run(1)["result"]
    return float(value.detach()), torch.cat([g.flatten() for g in gradient])


def compare(
    runs: dict[str, Callable[[int], Any]], *, over: str, rounds: int, shape: str
) -> list[dict[str, Any]]:
    contenders = {
        name: Contender(name, functools.partial(without_result, run))
        for name, run in runs.items()
    }
    with tqdm(total=(rounds + 1) * len(runs), unit="run", desc=shape) as bar:
        time_in_rotation(list(contenders.values()), rounds, bar)
    return [
        {
            "shape": shape,
            "name": name,
            "over": over,
            "ratio": paired_ratios(c.seconds, contenders[over].seconds),
            "seconds": c.seconds,
        }
        for name, c in contenders.items()
    ]


def without_result(run: Callable[[int], Any], turn: int) -> dict[str, Any]:
    run(turn)
    return {}


# -- what is shown -----------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'':40} seconds  ratio [min, max]             off in value, gradient")
    for row in rows:
        ratio, label = row["ratio"], f"{row['shape']}: {row['name']}"
        print(
            f"{label:40} {statistics.median(row['seconds']):7.3f}",
            f" {ratio['median']:.4f} [{ratio['min']:.4f}, {ratio['max']:.4f}]"
            f" of {row['over']}".ljust(46),
            *(f"{row[k]:.0e}" for k in row if k.startswith("relative_error")),
        )


def picture(rows: list[dict[str, Any]]) -> Any:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = new_figure(10, 3.4)
    colours = {STEP: GREY, OURS: BLUE, BLOCKS: BLUE, WRITTEN_OUT: ORANGE}
    for axes, shape in zip(figure.subplots(1, len(shapes)), shapes, strict=True):
        group = [row for row in rows if row["shape"] == shape]
        seconds = [statistics.median(row["seconds"]) for row in group]
        for y, (row, median) in enumerate(zip(group, seconds, strict=True)):
            axes.barh(y, median, color=colours[row["name"]], height=0.6)
            axes.annotate(
                share(row, median),
                (median, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
        axes.set_yticks(range(len(group)), [row["name"] for row in group])
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.set_xlim(min(seconds) / 3, max(seconds) * 20)
        axes.set_xlabel("seconds, value and gradient (log scale)")
        axes.set_title(shape, fontsize=10)
        plain_axes(axes, "x")
    figure.suptitle("The orthogonality term")
    return save_picture(figure, "orthogonality")


def share(row: dict[str, Any], median: float) -> str:
    """Return a row's seconds and what they are of the ones it is compared with."""
    text = f"{median:.2g} s"
    ratio = row["ratio"]["median"]
    if row["name"] == row["over"]:
        return text
    if row["over"] == STEP:
        return f"{text}, {100 * ratio:.1f} % of a step"
    return f"{text}, {1 / ratio:.2g} times faster"


if __name__ == "__main__":
    main()
