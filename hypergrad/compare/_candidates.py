"""What a user passes as estimators and as reference, read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from hypergrad import tree
from hypergrad.errors import HypergradError, SolveError
from hypergrad.estimator import HypergradEstimator, Hypergradient, Info
from hypergrad.estimators import FirstOrder, make_estimator
from hypergrad.problem import BilevelProblem
from hypergrad.products import Tally
from hypergrad.reference import choose_reference
from hypergrad.steps import InnerStep, steps_back, with_grads
from hypergrad.tree import Params

__all__ = [
    "describe",
    "read_estimators",
    "read_steps",
    "solve_reference",
    "with_needed_grads",
]


def read_estimators(given: Any) -> dict[str, HypergradEstimator]:
    """Return estimators by label, in the order given.

    Args:
        given: names, `(name, settings)` pairs or estimators; or a dictionary of them.

    Raises:
        TypeError: something else.
        ValueError: none, the same label twice, or a setting out of range.

    Example:
        >>> list(read_estimators(["cg", ("darts", {"inner_lr": 0.1})]))
        ['cg', 'darts(inner_lr=0.1)']
    """
    if isinstance(given, (str, HypergradEstimator)):
        given = [given]
    if isinstance(given, Mapping):
        found = {str(label): _make(one)[1] for label, one in given.items()}
    elif isinstance(given, Sequence):
        found: dict[str, HypergradEstimator] = {}
        for one in given:
            label, estimator = _make(one)
            if label in found:
                msg = (
                    f"{label!r} is listed twice, and rows are told apart by their label."
                    " Leave one out, or pass a dictionary with labels of your own."
                )
                raise ValueError(msg)
            found[label] = estimator
    else:
        raise TypeError(_WANTED.format(given))
    if not found:
        msg = (
            "estimators is empty: there is nothing to compare. Pass e.g. "
            "['darts', 'neumann']."
        )
        raise ValueError(msg)
    return found


_WANTED = (
    "estimators holds {!r}: pass names, (name, settings) pairs or estimators, such as "
    "['darts', ('neumann', {{'num_terms': 10}})], or a dictionary of them by label."
)


def _make(one: Any) -> tuple[str, HypergradEstimator]:
    if isinstance(one, HypergradEstimator):
        return describe(one), one
    if isinstance(one, str):
        return one, make_estimator(one)
    if isinstance(one, Sequence) and len(one) == 2 and isinstance(one[1], Mapping):
        name, settings = one
        shown = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        label = f"{name}({shown})" if shown else name
        return label, make_estimator(name, **settings)
    raise TypeError(_WANTED.format(one))


def describe(estimator: HypergradEstimator) -> str:
    """Return an estimator as it would be written: its first setting, and those changed.

    Example:
        >>> describe(make_estimator("cg", rtol=1e-9))
        'ConjugateGradient(max_iter=20, rtol=1e-09)'
    """
    if not is_dataclass(estimator) or "__repr__" not in vars(type(estimator)):
        return repr(estimator)
    settings = sorted(fields(estimator), key=lambda f: f.kw_only is True)
    shown = [
        f"{f.name}={value!r}"
        for i, f in enumerate(settings)
        if (value := getattr(estimator, f.name)) != f.default
        or (i == 0 and not f.kw_only and value is not None)
    ]
    return f"{type(estimator).__name__}({', '.join(shown)})"


def read_steps(given: Sequence[InnerStep] | None) -> tuple[InnerStep, ...] | None:
    """Return the records without the graphs that they kept, None where there are none.

    A kept graph serves once: it is not ours to use up, and one estimator would be
    spared what the next has to compute.

    Raises:
        TypeError: something that is no `InnerStep`.
    """
    if given is None or len(given) == 0:
        return None
    for step in given:
        if not isinstance(step, InnerStep):
            msg = (
                f"steps holds a {type(step).__name__}: pass records of inner steps, such "
                "as `recorded_steps` of a BilevelOptimizer, or None."
            )
            raise TypeError(msg)
    return tuple(replace(step, graph=None) for step in given)


def with_needed_grads(
    problem: BilevelProblem,
    steps: tuple[InnerStep, ...] | None,
    estimators: Iterable[HypergradEstimator],
) -> tuple[InnerStep, ...] | None:
    """Return the records as an optimizer would make them for these estimators.

    One that reads the steps' gradients is then not charged for those that the records
    of another were spared.
    """
    n = max((e.needs.lookback for e in estimators if e.needs.gradients), default=0)
    if not n or steps is None:
        return steps
    back = list(steps_back(problem, steps, n, "all", Tally()))
    last = (with_grads(problem, step, Tally()) for step in reversed(back))
    return (*steps[:-n], *last)


def solve_reference(
    problem: BilevelProblem,
    reference: Any,
    inner_batch: Any,
    outer_batch: Any,
    steps: tuple[InnerStep, ...] | None,
) -> tuple[Hypergradient, str, str, str]:
    """Return the reference's hypergradient, its name, why it is that, what it answers.

    Raises:
        HypergradError: the reference could not be computed.
        TypeError: `reference` is of no supported kind.
        ValueError: an unknown name, or tensors of other names or shapes.
    """
    if isinstance(reference, Hypergradient):
        _check_like(problem, reference.outer_grads)
        _check_like(problem, reference.indirect)
        return reference, "a hypergradient that was passed", "it was passed", "given"
    if isinstance(reference, Mapping):
        _check_like(problem, reference)
        first = FirstOrder().estimate(
            problem, inner_batch=inner_batch, outer_batch=outer_batch
        )
        total = {n: t.detach() for n, t in reference.items()}
        made = Hypergradient(
            total,
            first.direct,
            _apart(total, first.direct),
            first.outer_loss,
            {},
            Info(),
        )
        return made, "tensors that were passed", "they were passed", "given"
    estimator, why = choose_reference(problem, steps, reference)
    rule = steps[-1].rule if steps else None

    def solve(estimator: HypergradEstimator) -> Hypergradient:
        return estimator.estimate(
            problem, inner_batch=inner_batch, outer_batch=outer_batch, steps=steps
        )

    try:
        estimator = estimator.resolve(problem, inner_batch, rule).estimator
        result = solve(estimator)
    except SolveError as error:
        if reference != "auto":
            raise HypergradError(_failure(estimator, error)) from error
        # A matrix that cannot be factorised: conjugate gradients damp it and say so.
        estimator, why = choose_reference(problem, steps, "cg")
        why += f" (as a matrix: {error})"
        result = solve(estimator)
    except Exception as error:
        raise HypergradError(_failure(estimator, error)) from error
    return result, describe(estimator), why, estimator.answers


def _failure(estimator: HypergradEstimator, error: Exception) -> str:
    return (
        f"the reference {describe(estimator)} failed, so there is nothing to compare "
        f"with: {error} Or choose another `reference`."
    )


def _check_like(problem: BilevelProblem, given: Mapping[str, Any]) -> None:
    wanted = {n: tuple(t.shape) for n, t in problem.outer_params.items()}
    shapes = {n: tuple(getattr(t, "shape", ())) for n, t in given.items()}
    if shapes != wanted:
        msg = (
            f"the reference has tensors {shapes} but the outer parameters are {wanted}. "
            "Pass the total derivative, with the names and shapes of outer_params."
        )
        raise ValueError(msg)


def _apart(total: Params, direct: Params) -> Params:
    # In float64, so that a finer truth than the problem's own dtype stays that fine.
    return {
        n: tree.wide(t) - tree.wide(direct[n]).to(t.device) for n, t in total.items()
    }
