"""What held-back data can do for magnitudes, beyond what the command offers.

    python -m benchmarks.held_back --seeds 100,101,102

The task is that of `bidora train`. Every variant ends with magnitudes, with which the
directions are trained alike: from the same start (the probe's head, A and B as first
drawn), on all training examples, for the same number of steps. They are scored on
validation examples alone.

- `fixed`: the pretrained magnitudes.
- `joint`: magnitudes trained with the directions, on the same examples (DoRA).
- `search`: BiDoRA's search by `darts`, a fifth of the examples held back.
- `search-averaged`: the mean of that search's magnitudes over its outer steps.
- `cross-fitting`: no retraining; two halves take turns as training and held-back part.
- `whole-run`: magnitudes moved by hypergradients through whole runs (`unrolled` over all
  steps of a run), each iteration on another fold, so that every example serves on both
  sides.
- `whole-run-factors`: the same with one factor for each layer's magnitudes.
- `whole-run-rates`: the magnitudes stay; what is moved so is the learning rates of A and of
  B in each layer of the encoder, and of all else.

Runs that are in the results are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks._common import RESULTS
from bidora import BiDoRAOptimizer
from bidora.dora import magnitudes
from bidora.methods import make_method
from bidora.models import find_model
from bidora.probing import extract, fit_linear, set_head
from bidora.runs.examples import read_examples
from bidora.runs.prepared import prepare
from bidora.runs.results import Listener, environment
from bidora.runs.settings import TrainSettings
from hypergrad import BilevelOptimizer
from hypergrad.estimators import Unrolled

OUT = RESULTS / "held_back.json"
BATCH, RANK = 16, 32
SEARCH_STEPS, STEPS = 120, 120
OUTER_EVERY = 4
ITERATIONS = 5


class Job:
    """The prepared model and data of one seed, and what every variant does with them."""

    def __init__(
        self,
        seed: int,
        rate: float,
        targets: tuple[str, ...] | None,
        rank: int = RANK,
    ) -> None:
        settings = TrainSettings(
            method="dora",
            seed=seed,
            lora_r=rank,
            lora_alpha=2.0 * rank,
            target_modules=targets,
        )
        method = make_method("dora")
        examples = read_examples(settings, Listener(), searches=False)
        self.job = prepare(
            settings,
            method,
            find_model(),
            examples,
            torch.device("cpu"),
            Listener(),
        )
        self.seed, self.rate = seed, rate
        self.model = self.job.model
        self.data = self.job.sets["train"]
        self.found = magnitudes(self.model)
        self.first = {
            n: p.detach().clone()
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        self.features, self.head = extract(self.model, self.data, self.job.collate)
        self.everything = list(range(len(self.data)))

    def restart(self, indices: list[int], values: dict[str, Tensor]) -> None:
        """Put directions back, the head to a probe of `indices`, magnitudes to `values`."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.first:
                    parameter.copy_(values.get(name, self.first[name]))
        chosen = np.isin(self.features.groups, indices)
        part = type(self.features)(
            self.features.values[chosen],
            self.features.targets[chosen],
            self.features.groups[chosen],
            self.features.kind,
            self.features.outputs,
        )
        set_head(self.head, fit_linear(part))
        torch.manual_seed(self.seed)
        self.model.train()

    def batches(self, indices: list[int], salt: int = 0) -> Iterator[Any]:
        """Yield shuffled batches without end, texts of like length in one, as the job."""
        lengths = [len(self.data[i]["input_ids"]) for i in indices]
        dealer = torch.Generator().manual_seed(1000 * self.seed + salt)
        sampler = LengthGroupedSampler(BATCH, lengths=lengths, generator=dealer)
        queue: list[int] = []
        while True:
            while len(queue) < BATCH:
                queue += [indices[i] for i in sampler]
            chosen, queue = queue[:BATCH], queue[BATCH:]
            yield self.job.collate([self.data[i] for i in chosen])

    def batch(self, indices: list[int]) -> Any:
        """Return one batch of all of `indices`."""
        return self.job.collate([self.data[i] for i in indices])

    def optimizer(self, estimator: Any, steps: int, **own: Any) -> tuple[Any, Any]:
        """Return a bilevel optimizer with a linear schedule of the inner rate."""
        made = BiDoRAOptimizer(
            self.model,
            estimator,
            inner_lr=self.rate,
            inner_weight_decay=0.01,
            outer_lr=own.pop("outer_lr", 10 * self.rate),
            outer_warmup=min(10, steps // 4),
            outer_weight_decay=0.0,
            loss_fn=_loss,
            **own,
        )
        return made, get_linear_schedule_with_warmup(made, int(0.06 * steps), steps)

    def train(
        self,
        values: dict[str, Tensor],
        *,
        joint: bool = False,
        rates: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Train the directions on everything, from the start; return the score."""
        self.restart(self.everything, values)
        for parameter in self.found.values():
            parameter.requires_grad_(joint)
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        trained = list(named.values())
        optimizer = torch.optim.AdamW(
            _by_group(trained, [_group(n) for n in named], rates) if rates else trained,
            lr=self.rate,
            weight_decay=0.01,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * STEPS), STEPS)
        stream = self.batches(self.everything)
        for _ in range(STEPS):
            loss = self.model(**next(stream)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        for parameter in self.found.values():
            parameter.requires_grad_(True)
        return self.score()

    @torch.no_grad()
    def score(self) -> dict[str, Any]:
        """Return accuracy and loss on the validation examples."""
        features, layer = extract(
            self.model, self.job.sets["validation"], self.job.collate
        )
        logits = features.values @ layer.weight.double().numpy().T
        logits = torch.as_tensor(logits + layer.bias.double().numpy())
        truth = torch.as_tensor(features.targets)
        return {
            "accuracy": float((logits.argmax(1) == truth).double().mean()),
            "loss": float(cross_entropy(logits, truth)),
        }

    def values(self) -> dict[str, Tensor]:
        """Return copies of the magnitudes."""
        return {n: p.detach().clone() for n, p in self.found.items()}


def fixed(job: Job) -> dict[str, Any]:
    return job.train({})


def joint(job: Job) -> dict[str, Any]:
    return job.train({}, joint=True)


def _search(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the last magnitudes of a search, and their mean over its outer steps."""
    inner, outer = _split(job)
    job.restart(inner, {})
    optimizer, schedule = job.optimizer("darts", SEARCH_STEPS, outer_every=OUTER_EVERY)
    inner_stream, outer_stream = job.batches(inner), job.batches(outer, 1)
    mean, count = {n: torch.zeros_like(p) for n, p in job.found.items()}, 0
    for _ in range(SEARCH_STEPS):
        report = optimizer.step(next(inner_stream), lambda: next(outer_stream))
        schedule.step()
        if report.outer_step:
            count += 1
            for name, value in job.values().items():
                mean[name] += (value - mean[name]) / count
    return job.values(), mean


def search(job: Job) -> dict[str, Any]:
    return job.train(_search(job)[0])


def search_averaged(job: Job) -> dict[str, Any]:
    return job.train(_search(job)[1])


def cross_fitting(job: Job) -> dict[str, Any]:
    halves = _folds(job, 2)
    job.restart(job.everything, {})
    optimizer, schedule = job.optimizer("darts", STEPS, outer_every=OUTER_EVERY)
    streams = [job.batches(half, i) for i, half in enumerate(halves)]
    others = [job.batches(half, 2 + i) for i, half in enumerate(halves)]
    for step in range(STEPS):
        turn = step // OUTER_EVERY % 2  # they swap after every outer step
        optimizer.step(next(streams[turn]), lambda turn=turn: next(others[1 - turn]))
        schedule.step()
    return job.score()


def whole_run(job: Job, *, factors: bool = False) -> dict[str, Any]:
    first = job.values()
    logs = {n: torch.zeros(1 if factors else p.shape[0]) for n, p in first.items()}
    adam = torch.optim.Adam(list(logs.values()), lr=0.05 if factors else 0.01)
    history = []
    for number, held in enumerate(_folds(job, ITERATIONS)):
        inner = sorted(set(job.everything) - set(held))
        job.restart(inner, {n: first[n] * logs[n].exp() for n in first})
        now = job.values()
        optimizer, schedule = job.optimizer(
            Unrolled(num_steps=STEPS, snapshots="all"), STEPS
        )
        found = _walk_back(job, optimizer, schedule, inner, held, number)
        history.append(_told(found))
        for name, gradient in found.outer_grads.items():
            moved = gradient * now[name]  # λ = log of the factor: dm/dλ = m
            logs[name].grad = moved.sum().reshape(1) if factors else moved
        adam.step()
    result = job.train({n: first[n] * logs[n].exp() for n in first})
    return {**result, "iterations": history}


def whole_run_factors(job: Job) -> dict[str, Any]:
    return whole_run(job, factors=True)


def whole_run_rates(job: Job) -> dict[str, Any]:
    for parameter in job.found.values():
        parameter.requires_grad_(False)
    names = [n for n, p in job.model.named_parameters() if p.requires_grad]
    groups = [_group(n) for n in names]
    kinds = sorted(set(groups))
    logs = torch.full((len(kinds),), math.log(job.rate))
    adam = torch.optim.Adam([logs], lr=0.3)
    history = []
    for number, held in enumerate(_folds(job, ITERATIONS)):
        inner = sorted(set(job.everything) - set(held))
        job.restart(inner, {})
        rates = dict(zip(kinds, logs.exp().tolist(), strict=True))
        optimizer = BilevelOptimizer(
            job.model,
            _loss,
            estimator=Unrolled(num_steps=STEPS, snapshots="all"),
            inner_optimizer=lambda tensors, rates=rates: torch.optim.AdamW(
                _by_group(tensors, groups, rates), weight_decay=0.01
            ),
            outer_optimizer=partial(torch.optim.SGD, lr=0.0),  # moved here, by Adam
            inner_settings={"lr": list(rates.values())},
            max_grad_norm=1.0,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * STEPS), STEPS)
        found = _walk_back(job, optimizer, schedule, inner, held, number)
        history.append({**_told(found), "rates": rates})
        logs.grad = found.outer_grads["log_lr"]
        adam.step()
    rates = dict(zip(kinds, logs.exp().tolist(), strict=True))
    return {**job.train({}, rates=rates), "iterations": history, "rates": rates}


def _walk_back(
    job: Job,
    optimizer: Any,
    schedule: Any,
    inner: list[int],
    held: list[int],
    salt: int,
) -> Any:
    """Train on `inner`; return the hypergradient on `held` through all steps."""
    stream = job.batches(inner, salt)
    for _ in range(STEPS):
        optimizer.inner_step(next(stream))
        schedule.step()
    return optimizer.estimator.estimate(
        optimizer.problem,
        inner_batch=None,
        outer_batch={**job.batch(held), "without_dropout": True},
        steps=optimizer.recorded_steps,
    )


def _loss(model: Any, batch: Any) -> Tensor:
    """Return the loss, with dropout unless the batch says that it is without."""
    inputs = dict(batch)
    model.train(not inputs.pop("without_dropout", False))
    return model(**inputs).loss


def _told(found: Any) -> dict[str, float]:
    return {
        "outer_loss": float(found.outer_loss),
        "direct": _norm(found.direct),
        "indirect": _norm(found.indirect),
        "largest_adjoint": max(found.info.adjoint_norms),
    }


def _group(name: str) -> str:
    """Return what shares a rate with a parameter: A or B of its layer, or the head."""
    part = re.search(r"layer\.(\d+)\..*lora_([AB])", name)
    return f"layer {part[1]} {part[2]}" if part else "rest"


def _by_group(
    tensors: Iterable[Tensor], groups: list[str], rates: dict[str, float]
) -> list[dict[str, Any]]:
    tensors = list(tensors)
    return [
        {
            "params": [t for t, g in zip(tensors, groups, strict=True) if g == kind],
            "lr": rate,
        }
        for kind, rate in rates.items()
    ]


VARIANTS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "fixed": fixed,
    "joint": joint,
    "search": search,
    "search-averaged": search_averaged,
    "cross-fitting": cross_fitting,
    "whole-run": whole_run,
    "whole-run-factors": whole_run_factors,
    "whole-run-rates": whole_run_rates,
}


def _split(job: Job) -> tuple[list[int], list[int]]:
    task, schema = job.job.examples.task, job.job.examples.schema
    return task.split(job.job.examples.rows["train"], schema, 0.2, job.seed)


def _folds(job: Job, count: int) -> list[list[int]]:
    from sklearn.model_selection import StratifiedKFold

    maker = StratifiedKFold(count, shuffle=True, random_state=job.seed)
    labels = job.features.targets
    return [held.tolist() for _, held in maker.split(labels, labels)]


def _norm(values: dict[str, Tensor]) -> float:
    return float(sum(v.double().square().sum() for v in values.values()) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", default="100,101,102")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    found: dict[str, Any] = {"environment": environment("cpu"), "runs": []}
    if given.out.exists():
        found = json.loads(given.out.read_text("utf-8"))
    targets = tuple(given.targets.split(","))
    for seed in (int(s) for s in given.seeds.split(",")):
        for name in given.variants.split(","):
            key = {
                "seed": seed,
                "variant": name,
                "rate": given.rate,
                "targets": targets,
            }
            if any(
                {**key, "targets": list(targets)}.items() <= r.items()
                for r in found["runs"]
            ):
                continue
            job = Job(seed, given.rate, targets)
            started = time.perf_counter()
            result = VARIANTS[name](job)
            seconds = time.perf_counter() - started
            found["runs"].append(
                {**key, "targets": list(targets), "seconds": seconds, **result}
            )
            given.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            print(
                seed,
                name,
                result["accuracy"],
                result["loss"],
                round(seconds),
                flush=True,
            )


if __name__ == "__main__":
    main()
