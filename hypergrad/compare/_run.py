"""The comparison: one estimate for its numbers, one for its bytes, some for seconds."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from hypergrad import tree
from hypergrad._checks import check_count
from hypergrad.batches import as_micro_batches
from hypergrad.compare._candidates import (
    read_estimators,
    read_steps,
    solve_reference,
    with_needed_grads,
)
from hypergrad.compare._measure import collected, left_alone, peak_bytes, seconds_of
from hypergrad.compare._result import Comparison, Reference, Row
from hypergrad.estimator import HypergradEstimator, Hypergradient, Info
from hypergrad.problem import BilevelProblem
from hypergrad.products import Tally, gradients
from hypergrad.reporting import silenced
from hypergrad.steps import InnerStep

__all__ = ["compare_estimators"]


def compare_estimators(
    problem: BilevelProblem,
    estimators: Sequence[Any] | Mapping[str, Any] | HypergradEstimator,
    inner_batch: Any,
    outer_batch: Any,
    *,
    steps: Sequence[InnerStep] | None = None,
    reference: Any = "auto",
    repeats: int = 3,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Measure estimators side by side on one problem, at its present parameters.

    Each estimator runs `repeats + 2` times: once for its numbers, which also warms up,
    once for its peak of memory, and `repeats` times for its seconds, in an order that is
    rotated from one repeat to the next. All see the same batches, random numbers and
    steps. The problem is left bit for bit as it was.

    An estimator that raises (too few steps, no second derivative, out of memory) becomes
    a row with its message in `failure`; the others go on.

    There are two questions: where the minimum of the inner loss goes, and what the inner
    steps do. Away from a minimum their answers differ, so look at `answers` of a row and
    of the reference before you call a distance an error.

    Args:
        problem: the problem, at the w after `steps`.
        estimators: names, `(name, settings)` pairs or estimators; a dictionary of them
            by labels of your own; or a single one.
        inner_batch: data of the inner loss; a batch or `Accumulated` of several.
        outer_batch: data of the outer loss, likewise.
        steps: records of the inner steps just taken, such as
            `BilevelOptimizer.recorded_steps`, for estimators that look back. Without
            them such an estimator needs a rule of its own, and its virtual steps start
            at w. Graphs that the records kept are not used: all recompute, and so does
            an outer step that follows.
        reference: `"auto"` (the steps unrolled where there are any; else the inner
            Hessian as a matrix up to 3,000 inner parameters; else long conjugate
            gradients, as where the matrix is singular), `"unrolled"`, `"dense"`,
            `"cg"`, an estimator, a `Hypergradient`, or the total derivative as tensors
            by name.
        repeats: timed runs of each.
        on_progress: called as `(runs done, runs in all, label)` before each run.

    Returns:
        Rows, the nearest to the reference first.

    Raises:
        HypergradError: the reference could not be computed.
        TypeError: an argument of an unsupported kind.
        ValueError: an unknown name, a setting out of range, or a label twice.

    Example:
        g = (w - λ)²/2 and f = w²/2 at w = λ = 3: df/dλ = 3. One step of gradient
        descent at rate 1/2 shows half of it, in the right direction.

        >>> import torch
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]).square().sum() / 2,
        ...     lambda i, o, b: i["w"].square().sum() / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> exact_darts = ("darts", {"inner_lr": 0.5, "product": "exact"})
        >>> found = compare_estimators(problem, ["cg", exact_darts], None, None)
        >>> [(row.indirect_error, row.indirect_cosine) for row in found.rows]
        [(0.0, 1.0), (0.5, 1.0)]
    """
    check_count("repeats", repeats)
    candidates = [
        _Candidate(label, estimator)
        for label, estimator in read_estimators(estimators).items()
    ]
    records = with_needed_grads(
        problem, read_steps(steps), (c.estimator for c in candidates)
    )
    devices = sorted({t.device for t in problem.tensors}, key=str)
    data = _Data(problem, inner_batch, outer_batch, records)
    # One for each estimator and pass, one inner gradient for each pass but that of bytes.
    progress = _Progress(on_progress, 2 + repeats + len(candidates) * (2 + repeats))
    with silenced(), left_alone(problem):  # `reason` tells each time
        progress("reference")
        truth, name, why, answers = solve_reference(
            problem, reference, inner_batch, outer_batch, records
        )
        for candidate in candidates:
            progress(candidate.label)
            candidate.prepare(data)
        with collected():
            for candidate in candidates:
                progress(candidate.label)
                candidate.weigh(data, devices)
        base = _time_in_rotation(candidates, data, devices, repeats, progress)
    against = Reference(
        name,
        why,
        answers,
        _indirect_share(truth),
        reason=truth.info.reason,
        residual_norm=truth.info.residual_norm,
        converged=truth.info.converged,
        damping=truth.info.damping,
        forwards=None if answers == "given" else forwards_of(truth.info),
        n_hvp=None if answers == "given" else truth.info.n_hvp,
    )
    rows = [candidate.row(truth, base, records) for candidate in candidates]
    rows.sort(key=_worst_last)
    return Comparison(
        tuple(rows),
        against,
        statistics.median(base),
        settings={
            "steps": len(records or ()),
            "repeats": repeats,
            "inner_parameters": sum(t.numel() for t in problem.inner_params.values()),
            "outer_parameters": sum(t.numel() for t in problem.outer_params.values()),
        },
        environment=_environment(devices),
    )


def forwards_of(info: Info) -> float:
    """Return the cost in forward passes, by the counts.

    A backward pass through a loss costs about a forward. One through the graph of a
    gradient costs about two; it is known by having no forward of its own.

    Example:
        Central differences take a gradient of f and two of g; an exact product a
        gradient of f, the graph of one of g, and a pass through that.

        >>> forwards_of(Info(n_forward=3, n_backward=3))
        6.0
        >>> forwards_of(Info(n_forward=2, n_backward=3))
        6.0
    """
    through_graphs = max(0, info.n_backward - info.n_forward)
    return float(info.n_forward + info.n_backward + through_graphs)


@dataclass(frozen=True)
class _Data:
    problem: BilevelProblem
    inner_batch: Any
    outer_batch: Any
    steps: tuple[InnerStep, ...] | None

    def estimate(self, estimator: HypergradEstimator) -> Hypergradient:
        return estimator.estimate(
            self.problem,
            inner_batch=self.inner_batch,
            outer_batch=self.outer_batch,
            steps=self.steps,
        )

    def inner_gradient(self) -> None:
        batches = as_micro_batches(self.inner_batch)
        gradients(self.problem, "inner", batches, Tally(), outer=False)


@dataclass
class _Candidate:
    """One estimator and what was measured of it so far."""

    label: str
    estimator: HypergradEstimator
    failure: str = ""
    result: Hypergradient | None = None
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)

    def prepare(self, data: _Data) -> None:
        """Let `auto` choose, and take the estimate whose numbers count."""

        def run() -> None:
            rule = data.steps[-1].rule if data.steps else None
            chosen = self.estimator.resolve(data.problem, data.inner_batch, rule)
            self.estimator = chosen.estimator
            self.result = data.estimate(self.estimator).because(chosen.why)

        self._try(run, data)

    def weigh(self, data: _Data, devices: Sequence[torch.device]) -> None:
        def run() -> None:
            self.peak = peak_bytes(lambda: data.estimate(self.estimator), devices)

        self._try(run, data)

    def time(self, data: _Data, devices: Sequence[torch.device]) -> None:
        def run() -> None:
            taken = seconds_of(lambda: data.estimate(self.estimator), devices)
            self.seconds.append(taken)

        self._try(run, data)

    def _try(self, run: Callable[[], None], data: _Data) -> None:
        if self.failure:
            return
        try:
            with left_alone(data.problem):
                run()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def row(self, truth: Hypergradient, base: list[float], steps: Any) -> Row:
        shown, answers = repr(self.estimator), self.estimator.answers
        if self.failure or self.result is None:
            return Row(self.label, shown, answers, self.failure)
        result, info = self.result, self.result.info
        reason = info.reason
        lookback = self.estimator.needs.lookback
        if lookback and steps is None:
            reason = f"{_VIRTUAL.format(lookback)} {reason}".strip()
        ratios = [own / one for own, one in zip(self.seconds, base, strict=True)]
        return Row(
            self.label,
            shown,
            answers,
            error=tree.relative_error(result.outer_grads, truth.outer_grads),
            cosine=tree.cosine(result.outer_grads, truth.outer_grads),
            indirect_error=tree.relative_error(result.indirect, truth.indirect),
            indirect_cosine=tree.cosine(result.indirect, truth.indirect),
            forwards=forwards_of(info),
            n_forward=info.n_forward,
            n_backward=info.n_backward,
            n_hvp=info.n_hvp,
            seconds=statistics.median(self.seconds),
            seconds_min=min(self.seconds),
            seconds_max=max(self.seconds),
            inner_gradients=statistics.median(ratios),
            peak_bytes=self.peak,
            residual_norm=info.residual_norm,
            converged=info.converged,
            fd_error=info.fd_error,
            reason=reason,
        )


_VIRTUAL = (
    "No steps were given: it took {} virtual step(s) by its own rule, and the outer loss "
    "is that at their end, not at the reference's w."
)


class _Progress:
    def __init__(
        self, tell: Callable[[int, int, str], None] | None, total: int
    ) -> None:
        self._tell = tell
        self._total = total
        self._done = 0

    def __call__(self, label: str) -> None:
        if self._tell is not None:
            self._tell(self._done, self._total, label)
        self._done += 1


def _time_in_rotation(
    candidates: Sequence[_Candidate],
    data: _Data,
    devices: Sequence[torch.device],
    repeats: int,
    progress: _Progress,
) -> list[float]:
    """Time all in every repeat; return the seconds of an inner gradient in each."""
    base: list[float] = []

    def time_base() -> None:
        progress("inner gradient")
        base.append(seconds_of(data.inner_gradient, devices))

    def time_one(candidate: _Candidate) -> None:
        progress(candidate.label)
        candidate.time(data, devices)

    progress("inner gradient")
    data.inner_gradient()
    turns: list[Callable[[], None]] = [time_base]
    turns += [lambda candidate=c: time_one(candidate) for c in candidates]
    for repeat in range(repeats):
        first = repeat * len(turns) // repeats
        with collected():
            for turn in (*turns[first:], *turns[:first]):
                turn()
    return base


def _indirect_share(truth: Hypergradient) -> float:
    """Return the norm of the indirect term over that of the total."""
    total, indirect = tree.norms(truth.outer_grads, truth.indirect)
    if total == 0.0:
        return 0.0 if indirect == 0.0 else float("inf")
    return indirect / total


def _worst_last(row: Row) -> tuple[bool, float, float]:
    error = float("inf") if row.indirect_error is None else row.indirect_error
    return bool(row.failure), error, row.forwards or 0.0


def _environment(devices: Sequence[torch.device]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "hypergrad-bidora": _version("hypergrad-bidora"),
        "devices": [_describe(device) for device in devices],
        "threads": torch.get_num_threads(),
    }


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
