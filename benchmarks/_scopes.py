"""Where a call spends its time and memory: functions wrapped at their seams, from outside.

Each wrapped function charges what passes in it to its own label, less what passes in
wrapped functions that it calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from bidora import optimizer as bidora_optimizer
from hypergrad import _stepping, rng, tree
from hypergrad._rollback import Rollback
from hypergrad._stepping import Stepper
from hypergrad.compare._measure import _quiet_start
from hypergrad.problem import BilevelProblem
from hypergrad.products import BoundProduct, InnerGraph, Tally, evaluation, exact
from hypergrad.products.difference import _FiniteDifference
from hypergrad.products.exact import _DoubleBackward
from hypergrad.rules import ElementwiseRule
from hypergrad.solvers import NeumannSolver

# The package has a function of that name.
gradients: Any = import_module("hypergrad.products.gradients")

REST = "the rest"
PREFIX = "scope: "
PRODUCT = "product: differences and sums"
SOLVER = "solver's arithmetic"
OPTIMIZERS = "optimizers"
RULE = "rule of the step"
COPIES = "copies for rollback and records"
MOVES = "moving and restoring w"
STATES = "random states, buffers, modes"
CHECKS = "norms and finite checks"
ORTHOGONALITY = "orthogonality term, forward"

Label = str | Callable[..., str]


class Clock:
    """Seconds of the processor by label, and ranges in torch's profile while it runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.entered = 0
        self.profiled = False
        self._stack: list[tuple[str, Any]] = []
        self._since = 0.0
        self._level = "g"

    def __enter__(self) -> Clock:
        self.seconds, self.entered, self._stack = {}, 0, []
        self._push(REST)
        return self

    def __exit__(self, *_: object) -> None:
        self._pop()

    @contextmanager
    def scope(self, label: str) -> Iterator[None]:
        if not self._stack:  # outside of what is measured
            yield
            return
        self._push(label)
        try:
            yield
        finally:
            self._pop()

    def forward(self, _: Any, level: str, *__: Any) -> str:
        self._level = "g" if level == "inner" else "f"
        return "product: forward" if self._in_product else f"forward of {self._level}"

    def backward(self, *_: Any) -> str:
        return "product: backward" if self._in_product else f"backward of {self._level}"

    def norm(self, *_: Any) -> str:
        # What a solver or a difference computes with vectors is its own arithmetic.
        top = self._stack[-1][0] if self._stack else REST
        return top if top in (SOLVER, PRODUCT) else CHECKS

    @property
    def _in_product(self) -> bool:
        return any(label == PRODUCT for label, _ in self._stack)

    def _push(self, label: str) -> None:
        self._charge()
        mark = record_function(PREFIX + label) if self.profiled else None
        if mark:
            mark.__enter__()
        self.entered += 1
        self._stack.append((label, mark))

    def _pop(self) -> None:
        self._charge()
        mark = self._stack.pop()[1]
        if mark:
            mark.__exit__(None, None, None)

    def _charge(self) -> None:
        now = time.process_time()
        if self._stack:
            label = self._stack[-1][0]
            self.seconds[label] = self.seconds.get(label, 0.0) + now - self._since
        self._since = now


@contextmanager
def at_the_seams(clock: Clock) -> Iterator[None]:
    """Wrap what an iteration is made of, for the block."""
    functions: list[tuple[Any, str, Label]] = [
        (BilevelProblem, "loss", clock.forward),
        (evaluation, "differentiate", clock.backward),
        (InnerGraph, "product", "product: through the gradient's graph"),
        (BoundProduct, "vjp", PRODUCT),  # of all but differences, which have their own
        (_FiniteDifference, "_vjp", PRODUCT),
        (_DoubleBackward, "gradient", PRODUCT),
        (_DoubleBackward, "hvps", PRODUCT),
        (gradients, "accumulate", PRODUCT),
        (exact, "accumulate", PRODUCT),
        (NeumannSolver, "solve", SOLVER),
        (ElementwiseRule, "pullback", RULE),
        (_stepping, "rule_of", RULE),
        (_stepping, "apply_gradients", OPTIMIZERS),
        (Rollback, "level", COPIES),
        (Stepper, "_record", COPIES),
        (gradients, "_leaves_like", COPIES),
        (Rollback, "module", STATES),
        (rng, "capture", STATES),
        (rng, "restore", STATES),
        (tree, "size", clock.norm),
        (tree, "sizes", clock.norm),
        (tree, "norms", clock.norm),
        (tree, "dot", clock.norm),
        (Tally, "watch_finite", CHECKS),
        (Tally, "watch_direction", CHECKS),
        (Tally, "read", CHECKS),
        (bidora_optimizer, "check_norms", CHECKS),
        (bidora_optimizer, "orthogonality_term", ORTHOGONALITY),
    ]
    blocks = [(BilevelProblem, "at", MOVES), (BilevelProblem, "untouched", STATES)]
    patches = [
        mock.patch.object(owner, name, _wrapped(clock, getattr(owner, name), label))
        for owner, name, label in functions
    ]
    patches += [
        mock.patch.object(
            owner, name, _wrapped_block(clock, getattr(owner, name), label)
        )
        for owner, name, label in blocks
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _wrapped(clock: Clock, run: Callable[..., Any], label: Label) -> Callable[..., Any]:
    def scoped(*args: Any, **kwargs: Any) -> Any:
        name = label if isinstance(label, str) else label(*args)
        with clock.scope(name):
            return run(*args, **kwargs)

    return scoped


def _wrapped_block(
    clock: Clock, enter: Callable[..., Any], label: str
) -> Callable[..., Any]:
    """Wrap a context manager: its beginning and its end, not the block between."""

    @contextmanager
    def scoped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        block = enter(*args, **kwargs)
        with clock.scope(label):
            value = block.__enter__()
        try:
            yield value
        except BaseException as error:
            if not block.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            with clock.scope(label):
                block.__exit__(None, None, None)

    return scoped


def memory_of(clock: Clock, run: Callable[[], Any]) -> dict[str, Any]:
    """Return the bytes of tensors that a run holds beyond those before it, by label.

    Args:
        clock: the one that the run starts and stops.
        run: what to measure.

    Returns:
        `peak`: the largest number held at once; `peaks`: the same within each label;
        `kept`: what each label adds to what is held, its first time.
    """
    clock.profiled = True
    try:
        with (
            _quiet_start(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            run()
    finally:
        clock.profiled = False
    results: Any = getattr(profiler.profiler, "kineto_results", None)
    changes: list[tuple[int, int, str, int]] = []
    for event in results.events():
        start = event.start_ns()
        if event.name() == "[memory]":
            changes.append((start, 1, "", event.nbytes()))
        elif event.name().startswith(PREFIX):
            label = event.name().removeprefix(PREFIX)
            changes.append((start, 0, label, 1))
            changes.append((start + event.duration_ns(), 2, label, -1))
    live, stack = 0, [REST]
    peaks: dict[str, int] = {}
    kept: dict[str, int] = {}
    seen: set[str] = set()
    for _, _, label, change in sorted(changes, key=lambda c: c[:2]):
        if label:
            if change > 0:
                stack.append(label)
            else:
                stack.pop()
                seen.add(label)
            continue
        live += change
        top = stack[-1]
        peaks[top] = max(peaks.get(top, 0), live)
        if top not in seen:
            kept[top] = kept.get(top, 0) + change
    return {"peak": max(peaks.values()), "peaks": peaks, "kept": kept}


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the processor's seconds of a call, the least of several."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def bytes_of(tensors: Any) -> int:
    """Return the bytes of tensors by name."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def cost_of_a_scope() -> float:
    """Return the seconds that it takes to enter and leave a scope."""
    clock = Clock()
    with clock:

        def thousand() -> None:
            for _ in range(1000):
                with clock.scope(CHECKS):
                    pass

        return seconds_of(thousand) / 1000
