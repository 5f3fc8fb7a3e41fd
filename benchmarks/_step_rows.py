"""What `step_cost` measures: training steps, and BiDoRA iterations by estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _model
from bidora import BiDoRAOptimizer, use_exact_dora
from bidora.budget import budget_defaults
from hypergrad import make_estimator

LORA = "PEFT LoRA step"
PEFT_DORA = "PEFT DoRA step"
EXACT = "exact DoRA step"
ECONOMICAL = "economical budget"
RECOMPUTED = "darts, exact product, recomputed"
DEAR = ("auto", "cg", "neumann", "nystrom", "unrolled, K = 5")
VALIDATION_FRACTION = 0.2  # the command's default

Batch = dict[str, Tensor]
PLAIN = (LORA, PEFT_DORA, EXACT)


@dataclass
class Row:
    """One thing to measure, and what was found.

    Attributes:
        name: what it is called in the results.
        kind: a training step, or a BiDoRA iteration.
        run: takes its inner steps, and the outer one if any, on batches from the given
            position on; returns what the results say about it.
        iterations: inner steps that one run takes; seconds are reported for one of them.
        facts: what the results say about its settings.
        repeats: runs in each timed round.
        seconds: seconds of one iteration by timed round, by the clock of `step_cost`.
        wall: the same by the wall clock.
        peak_bytes: most bytes of tensors that a run held beyond those before it.
        note: what the last run returned.
        failure: why there are no figures; None where there are.
    """

    name: str
    kind: str
    run: Callable[[list[Batch], int], dict[str, Any]]
    iterations: int
    facts: dict[str, Any]
    repeats: int = 1
    seconds: dict[int, float] = field(default_factory=dict)
    wall: dict[int, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    note: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


def plain_row(base: nn.Module, rank: int, name: str) -> Row:
    """Return a step of training without an outer level."""
    model = _model.with_adapter(base, rank, dora=name != LORA)
    if name == EXACT:
        use_exact_dora(model)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0)

    def train(batches: list[Batch], at: int) -> dict[str, Any]:
        optimizer.zero_grad()
        model(**_pick(batches, at)).loss.backward()
        optimizer.step()
        return {}

    facts = {"trainable": sum(p.numel() for p in own)}
    return Row(name, "training step", train, 1, facts)


def bidora_rows(
    base: nn.Module, rank: int, examples: int, estimators: list[str] | None
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the name of each BiDoRA iteration, and what makes it.

    Args:
        base: the model without an adapter.
        rank: rank of the adapter.
        examples: number of examples of an inner batch.
        estimators: registered names to take; None for all that are not dear, `["all"]`
            for the dear ones too.

    Yields:
        Name and maker.
    """
    budget = budget_defaults(
        "economical",
        steps=1,
        batch_size=examples,
        validation_fraction=VALIDATION_FRACTION,
    )
    yield (
        ECONOMICAL,
        partial(
            _bidora_row,
            base,
            rank,
            ECONOMICAL,
            budget["estimator"],
            budget["estimator_settings"],
            every=budget["outer_every"],
            outer_examples=budget["outer_batch_size"],
        ),
    )
    for label, name, settings in _model.estimator_variants():
        chosen = label not in DEAR if estimators is None else name in estimators
        if not chosen and estimators != ["all"]:
            continue
        make = partial(_bidora_row, base, rank, label, name, settings)
        yield label, make
        if (name, settings) == ("darts", {"product": "exact"}):
            yield (
                RECOMPUTED,
                partial(
                    _bidora_row,
                    base,
                    rank,
                    RECOMPUTED,
                    name,
                    settings,
                    reuse_graph=False,
                ),
            )


def _bidora_row(
    base: nn.Module,
    rank: int,
    label: str,
    name: str,
    settings: dict[str, Any],
    *,
    every: int | None = None,
    outer_examples: int | None = None,
    reuse_graph: bool = True,
) -> Row:
    estimator = make_estimator(name, **settings)
    every = every or max(1, estimator.needs.lookback)
    opt = BiDoRAOptimizer(
        _model.with_adapter(base, rank, dora=True),
        estimator,
        outer_every=every,
        outer_warmup=0,
        orthogonality=0.0,
        max_grad_norm=None,
        reuse_graph="auto" if reuse_graph else False,
    )

    def iterate(batches: list[Batch], at: int) -> dict[str, Any]:
        report = None
        for k in range(at * every, (at + 1) * every):
            outer = {n: t[:outer_examples] for n, t in _pick(batches, k + 1).items()}
            report = opt.step(_pick(batches, k), outer)
        if report is None or report.info is None:
            why = report.skipped if report else None
            raise RuntimeError(f"{label} took no outer step: {why}")
        info = report.info
        counts = {n: getattr(info, n) for n in ("n_forward", "n_backward", "n_hvp")}
        # Its order too: `auto` has one where it has chosen.
        found = {"per_outer_step": counts, "reason": info.reason}
        return {**found, "order": opt.estimator.needs.order}

    facts = {
        "estimator": name,
        "estimator_settings": settings,
        "outer_every": every,
        "outer_examples": outer_examples or "as the inner batch",
        "reuse_graph": opt.reuse_graph,
        "trainable": sum(p.numel() for p in opt.problem.tensors),
    }
    return Row(label, "BiDoRA iteration", iterate, every, facts)


def _pick(batches: list[Batch], position: int) -> Batch:
    return batches[position % len(batches)]
