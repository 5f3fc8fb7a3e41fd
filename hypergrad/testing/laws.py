"""The laws of `HypergradEstimator`, each a function that raises where it is broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad import tree
from hypergrad._answer_checks import check_state
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.estimator import (
    EstimatorState,
    HypergradEstimator,
    Hypergradient,
)
from hypergrad.problem import BilevelProblem, Level
from hypergrad.testing.closed_forms import quadratic
from hypergrad.testing.known import KnownProblem, relative_error
from hypergrad.testing.snapshot import differences, snapshot, snapshot_of
from hypergrad.tree import Params

__all__ = [
    "EDGES",
    "BrokenLaw",
    "Trial",
    "on_direction",
    "on_repeat",
    "on_resolving",
    "on_scale",
    "on_truth",
]


class BrokenLaw(AssertionError):
    """A law does not hold that an estimator may declare not to have."""


@dataclass(frozen=True)
class Trial:
    """An estimator at work, and the words that say on what.

    Attributes:
        estimator: the estimator.
        where: problem, dtype and structure, for messages.
    """

    estimator: HypergradEstimator
    where: str

    def law(self, holds: bool, text: str) -> None:
        """Raise unless the law holds.

        Raises:
            BrokenLaw: with the law, the estimator and where it was broken.
        """
        if not holds:
            raise BrokenLaw(self._said(text))

    def always(self, holds: bool, text: str) -> None:
        """Raise unless what no estimator may do without holds.

        Raises:
            AssertionError: likewise.
        """
        if not holds:
            raise AssertionError(self._said(text))

    def _said(self, text: str) -> str:
        return f"{type(self.estimator).__name__} on {self.where}: {text}"

    def estimate(
        self, problem: BilevelProblem, state: EstimatorState | None = None
    ) -> Hypergradient:
        """Estimate, and check what comes out and that nothing else changed."""
        result = self.call(problem, state)
        for name, parameter in problem.outer_params.items():
            for kind in ("outer_grads", "direct", "indirect"):
                part: Params = getattr(result, kind)
                self.always(name in part, f"{kind} lacks {name!r}")
                like = part[name].shape == parameter.shape
                like &= part[name].dtype == parameter.dtype
                like &= part[name].device == parameter.device
                found = f"{tuple(part[name].shape)}, {part[name].dtype}"
                wanted = f"{tuple(parameter.shape)}, {parameter.dtype}"
                self.always(like, f"{kind}[{name!r}] is {found} where λ is {wanted}")
                self.always(
                    not part[name].requires_grad, f"{kind}[{name!r}] has a graph"
                )
            finite = bool(result.outer_grads[name].isfinite().all())
            self.always(
                finite, f"outer_grads[{name!r}] is not finite, and nothing raised"
            )
            total = result.direct[name] + result.indirect[name]
            self.always(
                torch.equal(total, result.outer_grads[name]),
                f"direct + indirect is not outer_grads[{name!r}]",
            )
        try:
            check_state(result.state, "estimate")
        except TypeError as error:
            self.always(False, f"`state` holds something that is not a tensor: {error}")
        for kind in ("outer_grads", "direct", "indirect"):
            extra = set(getattr(result, kind)) - set(problem.outer_params)
            self.always(not extra, f"{kind} has names that λ has not: {sorted(extra)}")
        return result

    def call(
        self, problem: BilevelProblem, state: EstimatorState | None = None
    ) -> Hypergradient:
        """Estimate, and check that nothing changed, also where that raises."""
        for parameter in problem.tensors:
            parameter.grad = torch.ones_like(parameter)
        before = snapshot(problem)
        settings, given = snapshot_of(vars(self.estimator)), snapshot_of(state)
        try:
            return self.estimator.estimate(
                problem, inner_batch=None, outer_batch=None, state=state
            )
        except Exception as error:
            error.add_note(f"check_estimator was on {self.where}.")
            raise
        finally:
            changed = differences(before, snapshot(problem))
            self.always(not changed, f"the estimate changed {', '.join(changed)}")
            self.always(snapshot_of(state) == given, "the estimate changed `state`")
            kept = snapshot_of(vars(self.estimator)) != settings
            self.always(not kept, "the estimate kept something on `self`")
            for parameter in problem.tensors:
                parameter.grad = None


# -- what comes out ---------------------------------------------------------------------


def on_truth(
    trial: Trial, known: KnownProblem, result: Hypergradient, tolerance: float
) -> None:
    """Check that both terms are those of the known answer."""
    for kind in ("direct", "indirect"):
        off = relative_error(getattr(result, kind), getattr(known, kind))
        trial.always(
            off <= tolerance,
            f"relative error {off:.2g} of the {kind} term is above exact_to and rounding, "
            f"{tolerance:.2g}",
        )


def on_repeat(trial: Trial, problem: BilevelProblem, first: Hypergradient) -> None:
    """Check that the same inputs give the same output, under `torch.no_grad` too."""
    again = trial.estimate(problem)
    same = _output(first) == _output(again)
    trial.always(same, "the same inputs gave another output")
    with torch.no_grad():
        within = trial.estimate(problem)
    trial.always(_output(first) == _output(within), "torch.no_grad changed the output")


def on_scale(trial: Trial, known: KnownProblem) -> None:
    """Check that the hypergradient is linear in the outer loss, at any scale."""
    base = known.problem
    first = trial.estimate(base)
    for exponent in (10, -10, 66, -66):  # 2**66 is 7e19; powers of two do not round
        factor = 2.0**exponent
        problem = BilevelProblem(
            base.inner_loss,
            lambda i, o, b, c=factor: base.outer_loss(i, o, b) * c,
            base.inner_params,
            base.outer_params,
        )
        times = f"{factor:.1e} times the outer loss"
        try:
            result = trial.estimate(problem)
        except HypergradError as error:
            msg = f"{times} must not raise {type(error).__name__} ({trial.where})"
            raise BrokenLaw(msg) from error
        for kind in ("direct", "indirect"):
            plain: Params = getattr(first, kind)
            expected = {n: t.double() * factor for n, t in plain.items()}
            off = relative_error(getattr(result, kind), expected)
            close = 100 * torch.finfo(next(iter(plain.values())).dtype).eps
            trial.law(
                off <= close,
                f"{times} does not give as many times the {kind} term: {off:.2g} off",
            )


def _output(result: Hypergradient) -> Any:
    parts = (result.outer_grads, result.direct, result.indirect, result.outer_loss)
    return snapshot_of((parts, result.state))


def on_direction(trial: Trial, dtype: torch.dtype) -> None:
    """Check that the indirect term does not point away from the truth."""
    known = quadratic([1.0], dtype=dtype)
    result = trial.estimate(known.problem)
    # Adam's first step from a minimum has degenerate coordinates alone (see `Sama`).
    if result.info.dropped:
        return
    along = tree.cosine(result.indirect, known.indirect)
    says = "is zeros" if along is None else f"has cosine {along:.2g} with the truth"
    trial.law(
        along is not None and along > 0.9,
        f"where H = 1 any approximation of its inverse is positive, and the indirect term "
        f"{says}",
    )


# -- losses that fail -------------------------------------------------------------------


class _OnPurposeError(Exception):
    pass


def _raise(loss: Tensor) -> Tensor:
    raise _OnPurposeError(f"a loss of {float(loss.detach())} failed on purpose")


_FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "raises": (_raise, _OnPurposeError),
    "is NaN": (lambda loss: loss * math.nan, NonFiniteError),
    "is infinite": (lambda loss: loss + math.inf, NonFiniteError),
}


@dataclass
class _Watch:
    """Count the calls of both losses, and spoil one of them from some call on."""

    level: str = ""
    call: int = 0
    spoil: Callable[[Tensor], Tensor] = field(default=lambda loss: loss)
    counts: dict[Level, int] = field(default_factory=lambda: {"inner": 0, "outer": 0})

    def __call__(self, level: Level, loss: Tensor) -> Tensor:
        self.counts[level] += 1
        hit = level == self.level and self.counts[level] >= self.call
        return self.spoil(loss) if hit else loss


def _on_faults(trial: Trial, make: Callable[[_Watch], BilevelProblem]) -> None:
    """Check that a loss that fails at any call raises, and then all is as ever."""
    watch = _Watch()
    clean = trial.estimate(make(watch))
    levels: tuple[Level, Level] = ("inner", "outer")
    for level in levels:
        for call in _spread(watch.counts[level]):
            for fault, (spoil, kind) in _FAULTS.items():
                where = f"an {level} loss that {fault} from call {call} on"
                expected = f"{where} must raise {kind.__name__}"
                try:
                    trial.call(make(_Watch(level, call, spoil)))
                except kind:
                    continue
                except AssertionError as error:
                    error.add_note(f"The estimate had {where}.")
                    raise
                except Exception as error:
                    msg = f"{expected}, not {type(error).__name__}"
                    raise AssertionError(f"{msg} ({trial.where})") from error
                trial.always(False, expected)
    after = trial.estimate(make(_Watch()))
    trial.always(_output(after) == _output(clean), "failures before changed the output")


def _spread(count: int) -> list[int]:
    """Return the first two of `count` calls, one in the middle, and the last."""
    return sorted({1, 2, (count + 1) // 2, count} & set(range(1, count + 1)))


# -- modules ----------------------------------------------------------------------------


class _Noisy(nn.Module):
    """A linear model of normalised inputs with dropout, for a convex inner loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        make = torch.Generator().manual_seed(0)
        draws = torch.randn(14, 3, generator=make, dtype=torch.float64)
        self.weight = nn.Parameter(draws[0].clone())
        self.log_decay = nn.Parameter(draws[1].clone())
        self.data = draws[2:]

    def forward(self, decay: bool) -> Tensor:
        off = self.drop(self.norm(self.data)) @ self.weight - self.data.sum(1)
        loss = off.square().mean() + self.log_decay.square().sum() / 10
        return loss + self.log_decay.exp() @ self.weight.square() if decay else loss


def on_module(trial: Trial) -> None:
    """Check that running statistics and modes of a module are left alone."""
    model = _Noisy()
    model.norm(model.data)  # running statistics that are not those of a new module

    def make(watch: _Watch) -> BilevelProblem:
        return BilevelProblem.from_module(
            model,
            lambda m, batch: watch("inner", m(True)),
            outer="log_decay",
            outer_loss_fn=lambda m, batch: watch("outer", m(False)),
        )

    trial = Trial(trial.estimator, "a module with dropout and batch norm, float64")
    on_repeat(trial, make(_Watch()), trial.estimate(make(_Watch())))
    _on_faults(trial, make)


# -- edges ------------------------------------------------------------------------------


def _tiny(inner_loss: Any = None, outer_loss: Any = None) -> BilevelProblem:
    base = quadratic().problem
    return BilevelProblem(
        inner_loss or base.inner_loss,
        outer_loss or base.outer_loss,
        base.inner_params,
        base.outer_params,
    )


def on_failing_losses(trial: Trial) -> None:
    """Check that a loss that fails is an error, and leaves no trace."""
    base = quadratic().problem

    def make(watch: _Watch) -> BilevelProblem:
        return _tiny(
            lambda i, o, b: watch("inner", base.inner_loss(i, o, b)),
            lambda i, o, b: watch("outer", base.outer_loss(i, o, b)),
        )

    _on_faults(trial, make)


def on_no_outer_gradient(trial: Trial) -> None:
    """Check that ∂f/∂w = 0 gives an indirect term of exact zeros."""
    problem = _tiny(
        outer_loss=lambda i, o, b: o["shift"].square().sum() + 0 * i["w"][0]
    )
    for text, tried in (
        ("∂f/∂w = 0", problem),
        ("f without w", _tiny(outer_loss=lambda i, o, b: o["shift"].square().sum())),
    ):
        result = trial.estimate(tried)
        zeros = not result.indirect["shift"].any()
        trial.law(zeros, f"{text} must give an indirect term of exact zeros")


def _ignores_lam(inner: Params, outer: Params, batch: Any) -> Tensor:
    del outer, batch
    return inner["w"].square().sum()


def on_unused_lambda(trial: Trial) -> None:
    """Check that a λ that the inner loss does not use gives the direct term."""
    result = trial.estimate(_tiny(_ignores_lam))
    zeros = not result.indirect["shift"].any()
    trial.law(zeros, "a λ that the inner loss does not use must give the direct term")


def on_unused_levels(trial: Trial) -> None:
    """Check that losses that use nothing of what they should are an error."""
    cases: dict[str, tuple[Any, Any]] = {
        "an outer loss of constants": (None, lambda i, o, b: torch.ones(()))
    }
    if _calls_inner_loss(trial):
        cases["losses without λ"] = (_ignores_lam, _ignores_lam)
    for what, losses in cases.items():
        _must_raise(trial, what, *losses)


def on_unused_w(trial: Trial) -> None:
    """Check that an inner loss that does not depend on w is an error."""

    def ignores_w(inner: Params, outer: Params, batch: Any) -> Tensor:
        del inner, batch
        return outer["shift"].square().sum()

    if _calls_inner_loss(trial):
        _must_raise(trial, "an inner loss without w", ignores_w)


def _must_raise(trial: Trial, what: str, *losses: Any) -> None:
    try:
        trial.call(_tiny(*losses))
    except HypergradError:
        return
    trial.law(False, f"{what} must raise HypergradError")


def _calls_inner_loss(trial: Trial) -> bool:
    watch, base = _Watch(), quadratic().problem
    trial.estimate(_tiny(lambda i, o, b: watch("inner", base.inner_loss(i, o, b))))
    return watch.counts["inner"] > 0


def on_resolving(trial: Trial) -> None:
    """Check that what an estimator resolves to resolves to itself."""
    problem = quadratic().problem
    before = snapshot(problem)
    rule = trial.estimator.virtual_rule()
    chosen = trial.estimator.resolve(problem, None, rule)
    taken = chosen.estimator
    same = taken.resolve(problem, None, rule).estimator is taken
    trial.always(same, "what `resolve` returns must resolve to itself")
    changed = differences(before, snapshot(problem))
    trial.always(not changed, f"`resolve` changed {', '.join(changed)}")


EDGES: dict[str, Callable[[Trial], None]] = {
    "failing losses": on_failing_losses,
    "module": on_module,
    "no outer gradient": on_no_outer_gradient,
    "unused lambda": on_unused_lambda,
    "unused levels": on_unused_levels,
    "unused w": on_unused_w,
}
"""Laws on problems made for them, in float64."""
