"""What does the Trainer cost over a loop of one's own?

    python -m benchmarks.trainer_overhead

from the root of the repository; about three minutes on one core. Writes
benchmarks/results/trainer_overhead.json and docs/images/benchmarks/trainer_overhead.png.

A model of MiniLM's shape on 16 × 32 tokens, and one so small that little else than
overhead is left. Each runs three ways: `BiDoRATrainer`'s search beside a loop over
`BiDoRAOptimizer.step`; its retraining, and transformers' own `Trainer`, beside a loop of
forward, backward, clipping and AdamW. Saving and evaluation are off, and a line is logged
every ten steps. The search has the economical budget, whose steps are the cheapest: there
overhead counts most.

The Trainer and its loop take turns step by step, in one process: when the Trainer has
taken a step, the loop takes the same one, on the same batches, on a copy of the model.
Both end with the same weights, bit for bit, which is checked; so they did the same work.
The batches are made by the Trainer, and the loop finds them ready. What is reported is
the ratio of the times of 20 steps (five outer steps, two lines of the log), for each 20.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    add_threads_argument,
    done,
    new_figure,
    paired_ratios,
    plain_axes,
    save_picture,
    write_result,
)
from benchmarks._model import VOCABULARY
from bidora import BiDoRAOptimizer, BiDoRATrainer, BiDoRATrainingArguments
from bidora.budget import budget_defaults
from bidora.defaults import OUTER_WARMUP
from bidora.dora import magnitudes, use_exact_dora
from hypergrad import make_estimator

QUESTION = "What does the Trainer cost over a loop of one's own?"
TARGET = 1.03
BATCH, TOKENS = 16, 32
WARM_UP, BLOCK = 12, 20
EXAMPLES = 640
RATE, CLIP = 1e-3, 1.0
FRACTION = 0.2
# Layers, width, heads, feed-forward width.
MODELS = {"MiniLM's shape": (6, 384, 12, 1536), "tiny": (2, 64, 2, 128)}
KINDS = {
    "search": "BiDoRATrainer, search",
    "retrain": "BiDoRATrainer, retraining",
    "trainer": "transformers' Trainer",
}
Batch = dict[str, Tensor]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    steps = WARM_UP + BLOCK * arguments.blocks
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(KINDS) * len(MODELS) * steps, unit="step") as bar:
        for name in MODELS:
            bar.set_postfix_str(name)
            for kind, pair in measured(name, steps, bar).items():
                rows.append({"model": name, "kind": kind, **summary(pair)})
    report(rows)
    search = next(r for r in rows if r["kind"] == "search")
    written = write_result(
        "trainer_overhead",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        rows,
        targets=[
            {
                "what": "the search over a loop over BiDoRAOptimizer, MiniLM's shape",
                "at most": TARGET,
                "is": search["ratio"]["median"],
                "met": search["ratio"]["median"] <= TARGET,
            }
        ],
        unit="seconds of a step, one entry for each 20 (on one thread those that the "
        "process worked), and ratios to the loop of the same 20",
    )
    done(written, picture(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_threads_argument(parser)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of 20 steps")
    return parser.parse_args()


# -- the two that take turns -----------------------------------------------------------


class Pair(TrainerCallback):
    """Time a Trainer's steps, and after each of them the same step of a loop."""

    def __init__(self, loop: Callable[[], None], bar: Any) -> None:
        self.loop, self.bar = loop, bar
        self.trainer: list[float] = []
        self.own: list[float] = []
        self.start: float | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        end = now()
        if self.start is not None:  # what comes before the first step is no step
            self.trainer.append(end - self.start)
        start = now()
        self.loop()
        self.own.append(now() - start)
        self.bar.update()
        self.start = now()


class Phases(TrainerCallback):
    """Hand each phase of a `BiDoRATrainer` to its own pair."""

    def __init__(self, pairs: dict[str, Pair]) -> None:
        self.pairs = pairs
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.pairs[self.trainer.phase].on_step_end()


class Batches:
    """Collate examples, and keep the batches in order, those of either size."""

    def __init__(self) -> None:
        self.made: dict[int, list[Batch]] = {}

    def __call__(self, examples: list[Batch]) -> Batch:
        batch = {n: torch.stack([e[n] for e in examples]) for n in examples[0]}
        self.made.setdefault(len(examples), []).append(dict(batch))
        return batch


def measured(name: str, steps: int, bar: Any) -> dict[str, Pair]:
    """Return the pairs of timings for one model."""
    data, pairs = examples(), dict[str, Pair]()
    shared: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
    }
    budget = budget_defaults(
        "economical", steps=steps, batch_size=BATCH, validation_fraction=FRACTION
    )
    search, retrain, batches = model(name), model(name), Batches()
    use_exact_dora(retrain)
    size = budget["outer_batch_size"]
    pairs["search"] = Pair(search_loop(search, steps, batches, size, budget), bar)
    # The retraining's batches come after those of the search.
    pairs["retrain"] = Pair(plain_loop(retrain, steps, batches), bar)
    phases = Phases(pairs)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = BiDoRATrainer(
            model(name),
            BiDoRATrainingArguments(
                folder,
                # Not the economical one, whose search would take half of the steps.
                budget="full",
                estimator_settings=budget["estimator_settings"],
                outer_every=budget["outer_every"],
                per_device_outer_batch_size=size,
                outer_warmup_steps=OUTER_WARMUP,
                orthogonality=0.0,
                validation_fraction=FRACTION,
                **shared,
            ),
            train_dataset=data,
            data_collator=batches,
            callbacks=[phases, Seam(search, retrain, batches)],
        )
        phases.trainer = trainer
        trainer.train()
    check_same(retrain, trainer.model)

    plain, batches = model(name), Batches()
    theirs = model(name)
    for one in (plain, theirs):
        use_exact_dora(one)
        freeze_magnitudes(one)
    pairs["trainer"] = Pair(plain_loop(plain, steps, batches), bar)
    with tempfile.TemporaryDirectory() as folder, quiet():
        other = Trainer(
            theirs,
            TrainingArguments(folder, **shared),
            train_dataset=data,
            data_collator=batches,
            callbacks=[pairs["trainer"]],
        )
        other.train()
    check_same(plain, theirs)
    return pairs


class Seam(TrainerCallback):
    """Where a retraining begins, check the search, and give its loop what it found."""

    def __init__(self, search: nn.Module, retrain: nn.Module, batches: Batches) -> None:
        self.search, self.retrain, self.batches = search, retrain, batches
        self.begun = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1
        if self.begun == 2:
            found = magnitudes(self.search)
            check_same(found, magnitudes(kwargs["model"]))
            with torch.no_grad():
                for name, own in magnitudes(self.retrain).items():
                    own.copy_(found[name])
            freeze_magnitudes(self.retrain)
            self.batches.made.clear()


def search_loop(
    model: Any, steps: int, batches: Batches, size: int, budget: dict[str, Any]
) -> Callable[[], None]:
    optimizer = BiDoRAOptimizer(
        model,
        make_estimator("darts", **budget["estimator_settings"]),
        inner_optimizer=grouped(model),
        outer_optimizer=grouped(model),
        outer_every=budget["outer_every"],
        outer_warmup=OUTER_WARMUP,
        max_grad_norm=CLIP,
        orthogonality=0.0,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    inner, outer = reader(batches, BATCH), reader(batches, size)

    def step() -> None:
        optimizer.step(inner(), outer)
        schedule.step()

    return step


def plain_loop(model: Any, steps: int, batches: Batches) -> Callable[[], None]:
    """Return a step of forward, backward, clipping and AdamW; made at the first one."""
    read = reader(batches, BATCH)
    made: list[Any] = []

    def step() -> None:
        if not made:
            params = [p for p in model.parameters() if p.requires_grad]
            optimizer = grouped(model)(params)
            schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
            made.extend((params, optimizer, schedule))
        params, optimizer, schedule = made
        model.train()
        model(**read()).loss.backward()
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def grouped(model: nn.Module) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Return a maker of AdamW with fused steps, which is the Trainer's default."""
    return partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, fused=True)


def reader(batches: Batches, size: int) -> Callable[[], Batch]:
    """Return a function that reads one batch of a size after another."""
    position = iter(range(10**9))
    return lambda: batches.made[size][next(position)]


# -- models and data -------------------------------------------------------------------


def model(name: str) -> Any:
    layers, width, heads, inner = MODELS[name]
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        use_dora=True,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, config)


def examples() -> Any:
    make = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(5, VOCABULARY, (TOKENS,), generator=make),
            "attention_mask": torch.ones(TOKENS, dtype=torch.long),
            "labels": torch.randint(2, (), generator=make),
        }
        for _ in range(EXAMPLES)
    ]


def freeze_magnitudes(model: nn.Module) -> None:
    for parameter in magnitudes(model).values():
        parameter.requires_grad_(False)


def check_same(one: Any, other: Any) -> None:
    """Make sure that two did the same work: their parameters are equal, bit for bit."""
    own, theirs = (
        x if isinstance(x, dict) else dict(x.named_parameters()) for x in (one, other)
    )
    different = [n for n in own if not torch.equal(own[n], theirs[n])]
    assert not different, f"{len(different)} parameters differ: {different[:3]}"


def now() -> float:
    """Return seconds; on one thread, those that this process worked."""
    single = torch.get_num_threads() == 1
    return time.process_time() if single else time.perf_counter()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the Trainer's lines from the screen, and the collector out of the times."""
    gc.collect()
    gc.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.enable()


# -- what is told ----------------------------------------------------------------------


def summary(pair: Pair) -> dict[str, Any]:
    # The Trainer's first step has no beginning: its list is one shorter.
    theirs, own = pair.trainer[WARM_UP - 1 :], pair.own[WARM_UP:]
    blocks = range(0, len(own), BLOCK)
    theirs, own = (
        [statistics.fmean(x[i : i + BLOCK]) for i in blocks] for x in (theirs, own)
    )
    extra = [a - b for a, b in zip(theirs, own, strict=True)]
    return {
        "seconds": theirs,
        "loop_seconds": own,
        "extra_milliseconds": 1e3 * statistics.median(extra),
        "ratio": paired_ratios(theirs, own),
    }


def report(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        ratio = row["ratio"]
        print(
            f"{row['model']:16} {KINDS[row['kind']]:28} "
            f"{1e3 * statistics.median(row['loop_seconds']):7.1f} ms the loop, "
            f"{row['extra_milliseconds']:5.2f} ms more, {ratio['median']:.3f} times "
            f"({ratio['min']:.3f} to {ratio['max']:.3f})"
        )


def picture(rows: list[dict[str, Any]]) -> Any:
    colors = dict(zip(KINDS, (BLUE, ORANGE, GREY), strict=True))
    figure = new_figure(8.4, 3.2)
    all_axes: Any = figure.subplots(1, len(MODELS))
    for axes, name in zip(all_axes, MODELS, strict=True):
        own = [r for r in rows if r["model"] == name]
        for y, row in enumerate(reversed(own)):
            extra = [100 * (r - 1) for r in row["ratio"]["by_round"]]
            middle = 100 * (row["ratio"]["median"] - 1)
            axes.barh(y, middle, 0.6, color=colors[row["kind"]])
            axes.plot(extra, [y] * len(extra), "|", color=INK, markersize=8, alpha=0.5)
            most = max(0.0, middle, *extra)
            label = f"  {middle:.1f} %, {row['extra_milliseconds']:.2f} ms"
            axes.text(most, y, label, va="center", fontsize=9, color=INK)
        axes.set_yticks(range(len(own)), [KINDS[r["kind"]] for r in reversed(own)])
        axes.set_xlabel("more time than the loop (%)")
        axes.set_title(name, fontsize=10, loc="left")
        axes.margins(x=0.45)
        if axes is not all_axes[0]:
            axes.set_yticklabels([])
        else:
            axes.axvline(100 * (TARGET - 1), color=INK, linewidth=0.8, linestyle=":")
        plain_axes(axes, "x")
    return save_picture(figure, "trainer_overhead")


if __name__ == "__main__":
    main()
