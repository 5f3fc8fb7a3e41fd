"""Bad numbers to every estimator: an error of three parts, or the right answer.

Not finite anywhere; Hessians that are singular or indefinite; nothing to solve; already
solved; limits reached.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import (
    BilevelProblem,
    HypergradEstimator,
    NonFiniteError,
    NumericalWarning,
    SolveError,
    estimator_names,
    make_estimator,
)
from hypergrad.estimators import Implicit
from hypergrad.rules import SGD, Adam, AdamW
from hypergrad.solvers import (
    CGSolver,
    DenseSolver,
    NystromSketch,
    Solver,
    SolveResult,
)
from hypergrad.steps import take_steps
from hypergrad.tree import Params
from tests.tolerances import error, tol

F64 = torch.float64
NAMES = estimator_names()
QUIET: dict[str, Any] = {"on_failure": "return"}
SETTINGS: dict[str, dict[str, Any]] = {
    "darts": {"inner_lr": 0.1},
    "sama": {"rule": SGD(0.1)},
    "unrolled": {"rule": SGD(0.1), "num_steps": 3},
    "penalty": {"rule": SGD(0.1), "num_steps": 3},
    "f2sa": {"rule": SGD(0.1), "num_steps": 3},
    "forward": {"rule": SGD(0.1), "num_steps": 3, "num_directions": 2},
    "zeroth-order": {"rule": SGD(0.1), "num_steps": 2},
    "cg": QUIET,
    "neumann": QUIET,
    "nystrom": {"rank": 3, **QUIET},
    "implicit": {"solver": CGSolver(**QUIET)},
    # As it resolves where second derivatives work and no step is looked back at.
}
WITH_INNER = [name for name in NAMES if name not in ("first-order", "pbgd-free")]
SOLVED = ["cg", "neumann", "nystrom", "implicit"]

every = pytest.mark.parametrize("name", NAMES)
every_with_inner = pytest.mark.parametrize("name", WITH_INNER)
# By values alone nobody sees what a loss is computed from, nor a derivative.
BY_GRADIENTS = [name for name in NAMES if name != "zeroth-order"]
every_by_gradients = pytest.mark.parametrize("name", BY_GRADIENTS)
every_solved = pytest.mark.parametrize("name", SOLVED)


def estimator(name: str, **more: Any) -> HypergradEstimator:
    return make_estimator(name, **{**SETTINGS.get(name, {}), **more})


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).requires_grad_()


VERBS = (
    "call|check|choose|compute|keep|leave|load|look|lower|make|pass|raise|reduce|rename|"
    "replay|run|scale|set|take|train"
)


def three_parts(text: str) -> None:
    """Check what happened, with a number or a name; why; and at the end what to do."""
    assert re.search(r"\d|nan|inf|'", text), text
    clauses = re.split(r"[.:;,] |, so | or ", text.strip().rstrip("."))
    assert len(clauses) >= 3, text
    assert any(re.match(VERBS, clause.strip(), re.I) for clause in clauses[-3:]), text


def fails(
    kind: type[Exception], text: str, problem: BilevelProblem, run: Callable[[], Any]
) -> None:
    before = [t.detach().clone() for t in problem.tensors]
    with pytest.raises(kind, match=text) as caught:
        run()
    three_parts(str(caught.value))
    for t, was in zip(problem.tensors, before, strict=True):
        assert torch.equal(t.detach().nan_to_num(7.5), was.nan_to_num(7.5))


# -- not finite -------------------------------------------------------------------------


def inner_loss(i: Params, o: Params, b: Any) -> Tensor:
    fit = ((i["w"] - o["l"]) ** 2).sum() + (i["w"] ** 4 * o["l"].exp()).sum() / 8
    return fit + (b * i["w"] * o["l"]).sum()


def outer_loss(i: Params, o: Params, b: Any) -> Tensor:
    return ((i["w"] - 0.5 * b) ** 2).sum() + (o["l"] ** 3).sum()


def make(inner: Any = inner_loss, outer: Any = outer_loss) -> BilevelProblem:
    return BilevelProblem(inner, outer, {"w": leaf(0.3, -0.7)}, {"l": leaf(0.2, 0.1)})


ONE = torch.ones(2, dtype=F64)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["inner batch", "outer batch", "w", "lambda"])
@every
def test_input_that_is_not_finite(name: str, place: str, bad: float) -> None:
    if name not in WITH_INNER and place == "inner batch":
        return  # it never reads one
    problem = make()
    batches: dict[str, Any] = {"inner_batch": ONE, "outer_batch": ONE}
    broken = torch.tensor([1.0, bad], dtype=F64)
    if place.endswith("batch"):
        batches[place.replace(" ", "_")] = broken
    with torch.no_grad():
        if place == "w":
            problem.inner_params["w"][1] = bad
        if place == "lambda":
            problem.outer_params["l"][1] = bad
    level = place.split()[0] if place.endswith("batch") else "(inner|outer)"
    fails(
        NonFiniteError,
        f"the {level} loss is (nan|-?inf)",
        problem,
        lambda: estimator(name).estimate(problem, **batches),
    )


def at_zero(name: str, inner: Any, outer: Any = outer_loss) -> BilevelProblem:
    problem = make(inner, outer)
    with torch.no_grad():
        {**problem.inner_params, **problem.outer_params}[name][1] = 0
    return problem


@every_with_inner
def test_gradient_alone_that_is_not_finite(name: str) -> None:
    # √|w| is 0 at w = 0 and has no derivative there.
    # Without inner steps it is the second derivative alone that is looked at; auto looks
    # at the gradient before it tries one.
    problem = at_zero("w", lambda i, o, b: (i["w"].abs().sqrt() * o["l"].exp()).sum())
    what = "a second-derivative product" if name in SOLVED else "the gradient"
    fails(
        NonFiniteError,
        f"{what} of the inner loss is not finite in w",
        problem,
        lambda: estimator(name).estimate(problem, inner_batch=ONE, outer_batch=ONE),
    )


@every_by_gradients
def test_outer_gradient_alone_that_is_not_finite(name: str) -> None:
    problem = at_zero("l", inner_loss, lambda i, o, b: outer_loss(i, o, b) + root(o))
    fails(
        NonFiniteError,
        "the gradient of the outer loss is not finite in l, although the loss is",
        problem,
        lambda: estimator(name).estimate(problem, inner_batch=ONE, outer_batch=ONE),
    )


def root(o: Params) -> Tensor:
    return o["l"].abs().sqrt().sum()


@pytest.mark.parametrize("product", ["exact", "forward-over-reverse"])
@pytest.mark.parametrize("name", ["cg", "neumann", "nystrom"])
def test_hessian_alone_that_is_not_finite(name: str, product: Any) -> None:
    # |w|^1.5 has a gradient at 0, and no second derivative.
    problem = at_zero(
        "w", lambda i, o, b: (i["w"].abs() ** 1.5).sum() + (i["w"] * o["l"]).sum()
    )
    fails(
        NonFiniteError,
        r"(product of the inner loss is not finite in w|product .* is not finite)",
        problem,
        lambda: estimator(name, product=product).estimate(
            problem, inner_batch=ONE, outer_batch=ONE
        ),
    )


class Trusting(Solver):
    """A solver that does not look at its products."""

    def solve(self, matvec: Any, b: Params, state: Any = None) -> SolveResult:
        return SolveResult(matvec(b), n_matvec=1)


def test_a_product_that_its_solver_did_not_look_at() -> None:
    # It comes before the direction that it leads to, and so does its message.
    problem = at_zero(
        "w", lambda i, o, b: (i["w"].abs() ** 1.5).sum() + (i["w"] * o["l"]).sum()
    )
    fails(
        NonFiniteError,
        "a second-derivative product of the inner loss is not finite in w",
        problem,
        lambda: Implicit(Trusting()).estimate(
            problem, inner_batch=ONE, outer_batch=ONE
        ),
    )


@every_with_inner
def test_mixed_product_alone_that_is_not_finite(name: str) -> None:
    if name not in BY_GRADIENTS:
        return
    # ∂g/∂w = √λ + 2w is finite at λ = 0, its derivative in λ is not.
    problem = at_zero("l", lambda i, o, b: (i["w"] * o["l"].sqrt() + i["w"] ** 2).sum())
    fails(
        NonFiniteError,
        # Pushed forward, it is in w that it shows.
        f"of the inner loss is not finite in {'w' if name == 'forward' else 'l'}",
        problem,
        lambda: estimator(name).estimate(problem, inner_batch=ONE, outer_batch=ONE),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq", "gradient"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sama", {}),
        ("sama", {"product": "exact"}),
        ("unrolled", {"num_steps": 1}),
        ("unrolled", {"num_steps": 2}),
    ],
)
def test_recorded_steps_that_are_not_finite(
    name: str, settings: dict[str, Any], slot: str, bad: float
) -> None:
    if slot == "exp_avg_sq" and bad == math.inf:
        return  # a step of 0, and its derivative too
    problem = make()
    steps, _ = take_steps(problem, [ONE] * 3, AdamW(0.1))
    last = steps[-1]
    broken = torch.tensor([1.0, bad], dtype=F64)
    if slot == "gradient":
        last = replace(last, grads={"w": broken})
    else:
        last = replace(last, state={"w": {**last.state["w"], slot: broken}})
    fails(
        NonFiniteError,
        "the derivative of an inner step is not finite in w: a NaN or infinity in the",
        problem,
        lambda: make_estimator(name, **settings).estimate(
            problem, inner_batch=ONE, outer_batch=ONE, steps=[*steps[:-1], last]
        ),
    )


def test_a_derivative_of_one_over_zero() -> None:
    # Adam with ε = 0 where a gradient is 0: its own step is 0/0.
    problem = BilevelProblem(
        lambda i, o, b: (i["w"] * o["l"])[0] ** 2 + i["w"][1] ** 3,
        lambda i, o, b: i["w"].sum(),
        {"w": leaf(1.0, 0.0)},
        {"l": leaf(1.0, 1.0)},
    )
    rule = Adam(0.1, eps=0.0)
    steps, _ = take_steps(problem, [None], rule)
    fails(
        NonFiniteError,
        r"Adam with eps=0 where a gradient is 0.* raise eps",
        problem,
        lambda: make_estimator("unrolled", num_steps=1).estimate(
            problem, inner_batch=None, outer_batch=None, steps=steps
        ),
    )


STATEFUL: list[HypergradEstimator] = [
    make_estimator("neumann", **QUIET),
    make_estimator("nystrom", rank=2, every=5, **QUIET),
    Implicit(CGSolver(warm_start=True, **QUIET)),
    Implicit(CGSolver(preconditioner=NystromSketch(2, every=5), **QUIET)),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("made", STATEFUL, ids=lambda made: repr(made)[:40])
def test_state_that_is_not_finite_counts_as_none(
    made: HypergradEstimator, bad: float
) -> None:
    problem = make()
    batches: dict[str, Any] = {"inner_batch": ONE, "outer_batch": ONE}
    cold = made.estimate(problem, **batches)
    assert cold.state
    state = {
        n: torch.full_like(t, bad) if t.is_floating_point() else t
        for n, t in cold.state.items()
    }
    again = made.estimate(problem, **batches, state=state)
    assert error(again.indirect, cold.indirect) <= tol(F64, 100)


@pytest.mark.parametrize("made", STATEFUL, ids=lambda made: repr(made)[:40])
def test_state_of_another_problem_counts_as_none(made: HypergradEstimator) -> None:
    other = BilevelProblem(
        lambda i, o, b: (i["w"] ** 2 * o["l"].sum()).sum(),
        lambda i, o, b: i["w"].sum(),
        {"w": leaf(*[0.5] * 7)},
        {"l": leaf(0.2, 0.1)},
    )
    state = made.estimate(other, inner_batch=None, outer_batch=None).state
    problem = make()
    batches: dict[str, Any] = {"inner_batch": ONE, "outer_batch": ONE}
    got = made.estimate(problem, **batches, state=state)
    cold = made.estimate(problem, **batches)
    assert error(got.indirect, cold.indirect) <= tol(F64, 100)


@every_solved
def test_overflow_of_what_is_finite(name: str) -> None:
    # Curvature of 1e-200 under ∂f/∂w of 1e200: the solution is 1e400.
    problem = BilevelProblem(
        lambda i, o, b: 1e-200 * ((i["w"] - o["l"]) ** 2).sum(),
        lambda i, o, b: 1e200 * i["w"].sum(),
        {"w": leaf(0.3, -0.7)},
        {"l": leaf(0.2, 0.1)},
    )
    more = {"damping": 0.0} if name == "nystrom" else {}
    fails(
        NonFiniteError,
        "not finite|norm (nan|inf)",
        problem,
        lambda: estimator(name, **more).estimate(
            problem, inner_batch=None, outer_batch=None
        ),
    )


# -- Hessians ---------------------------------------------------------------------------

MIX = torch.tensor([[1.0, -2.0], [0.5, 1.0], [2.0, 0.3]], dtype=F64)


def quadratic(h: list[float], v: list[float]) -> BilevelProblem:
    """g = wᵀHw/2 - wᵀBλ, f = vᵀw: the indirect term is Bᵀ times what H does to v."""
    curved, slope = torch.tensor(h, dtype=F64), torch.tensor(v, dtype=F64)
    return BilevelProblem(
        lambda i, o, b: (curved * i["w"] ** 2).sum() / 2 - i["w"] @ (MIX @ o["l"]),
        lambda i, o, b: slope @ i["w"],
        {"w": leaf(0.4, -0.3, 0.9)},
        {"l": leaf(0.2, 0.1)},
    )


V = [1.0, -1.0, 0.5]
HESSIANS = {
    "indefinite": [-1.0, 0.5, 2.0],
    "negative": [-1.0, -0.5, -2.0],
    "singular": [0.0, 1.0, 2.0],
    "zero": [0.0, 0.0, 0.0],
}


@every_solved
@pytest.mark.parametrize("kind", HESSIANS)
def test_hessians_that_are_not_positive_definite(kind: str, name: str) -> None:
    h = torch.tensor(HESSIANS[kind], dtype=F64)
    problem = quadratic(HESSIANS[kind], V)
    more = {"num_terms": 4000} if name == "neumann" else {}
    result = estimator(name, **more).estimate(
        problem, inner_batch=None, outer_batch=None
    )
    info = result.info
    if name == "nystrom" and kind in ("singular", "zero"):
        assert info.damping == 0.01  # its default is enough
    elif name == "neumann" and kind == "singular":
        # Flat directions grow by α at each term: 4001 α in the end.
        alpha = 1 / float(result.state["lambda_max"])
        inverse = torch.tensor([4001 * alpha, 1.0, 0.5], dtype=F64)
        truth = {"l": MIX.T @ (inverse * torch.tensor(V, dtype=F64))}
        assert error(result.indirect, truth) <= tol(F64, 1e4)
        return
    elif kind == "zero":
        assert not result.indirect["l"].any()
        assert info.converged is False
        three_parts(info.reason)
        return
    else:
        three_parts(info.reason)
    # What was solved is the damped system, to the damping that is told.
    assert info.damping is not None
    assert float(h.min()) + info.damping > 0
    truth = {"l": MIX.T @ (torch.tensor(V, dtype=F64) / (h + info.damping))}
    assert error(result.indirect, truth) <= tol(F64, 1e4)
    assert info.curvature is not None
    assert info.curvature[0] == pytest.approx(float(h.min()), abs=1e-12)


@pytest.mark.parametrize("name", ["cg", "implicit"])
def test_a_singular_hessian_with_a_solution(name: str) -> None:
    # ∂f/∂w has no part along the flat direction: nothing to damp, nothing to say.
    problem = quadratic([0.0, 1.0, 2.0], [0.0, 3.0, -1.0])
    result = estimator(name).estimate(problem, inner_batch=None, outer_batch=None)
    truth = {"l": MIX.T @ torch.tensor([0.0, 3.0, -0.5], dtype=F64)}
    assert error(result.indirect, truth) <= tol(F64, 10)
    assert result.info.damping == 0.0
    assert result.info.reason.count("amping was raised") == 0


@pytest.mark.parametrize("kind", ["singular", "zero"])
def test_a_dense_solve_of_a_singular_hessian(kind: str) -> None:
    problem = quadratic(HESSIANS[kind], V)
    fails(
        SolveError,
        "the inner Hessian with damping 0 is singular to working precision",
        problem,
        lambda: Implicit(DenseSolver()).estimate(
            problem, inner_batch=None, outer_batch=None
        ),
    )


@pytest.mark.parametrize("kind", HESSIANS)
@pytest.mark.parametrize("name", ["darts", "sama", "unrolled"])
def test_steps_do_not_mind_the_curvature(kind: str, name: str) -> None:
    # Σ_j (I - ξH)^j ξ, three terms for three steps, one for one.
    h, v = torch.tensor(HESSIANS[kind], dtype=F64), torch.tensor(V, dtype=F64)
    settings = {} if name == "unrolled" else {"product": "exact"}
    result = estimator(name, **settings).estimate(
        quadratic(HESSIANS[kind], V), inner_batch=None, outer_batch=None
    )
    terms = 3 if name == "unrolled" else 1
    inverse = sum((0.1 * (1 - 0.1 * h) ** j for j in range(terms)), start=0 * h)
    assert error(result.indirect, {"l": MIX.T @ (inverse * v)}) <= tol(F64)
    assert result.info.reason == ""


# -- nothing to solve, already solved ---------------------------------------------------


@every_by_gradients
def test_nothing_to_solve(name: str) -> None:
    # w minimises f: ∂f/∂w = 0 in every bit, and the indirect term with it.
    problem = make(outer=lambda i, o, b: ((i["w"] - still) ** 2).sum() + root(o))
    still = problem.inner_params["w"].detach().clone()
    if estimator(name).needs.lookback:
        # Virtual steps would leave that point: record them at rest.
        steps, _ = take_steps(problem, [ONE] * 3, SGD(0.1))
    else:
        steps = None
    result = estimator(name).estimate(
        problem, inner_batch=ONE, outer_batch=ONE, steps=steps
    )
    assert not result.indirect["l"].any()
    assert torch.equal(result.outer_grads["l"], result.direct["l"])
    assert result.info.n_hvp == 0


@every_solved
def test_solved_by_the_first_product(name: str) -> None:
    # H = 4I: whatever v is, Hv tells all.
    problem = quadratic([4.0, 4.0, 4.0], V)
    more: dict[str, Any] = {"damping": 0.0} if name == "nystrom" else {}
    result = estimator(name, **more).estimate(
        problem, inner_batch=None, outer_batch=None
    )
    truth = {"l": MIX.T @ torch.tensor(V, dtype=F64) / 4}
    assert error(result.indirect, truth) <= tol(F64)
    assert result.info.converged
    if name != "nystrom":
        assert result.info.n_hvp == 2  # one, and the mixed one


def test_a_warm_start_from_the_solution() -> None:
    made = Implicit(CGSolver(warm_start=True, on_failure="raise"))
    problem = quadratic([1.0, 2.0, 3.0], V)
    first = made.estimate(problem, inner_batch=None, outer_batch=None)
    again = made.estimate(
        problem, inner_batch=None, outer_batch=None, state=first.state
    )
    truth = {"l": MIX.T @ (torch.tensor(V, dtype=F64) / torch.arange(1, 4))}
    for result in (first, again):
        assert error(result.indirect, truth) <= tol(F64, 10)
    assert again.info.converged
    assert again.info.n_hvp == 2  # the residual's product, and the mixed one


@pytest.mark.parametrize("name", ["darts", "sama", "unrolled"])
def test_steps_at_a_minimum(name: str) -> None:
    # The gradient is 0, and its derivative is not.
    problem = quadratic([1.0, 2.0, 4.0], V)
    h = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    with torch.no_grad():
        problem.inner_params["w"].copy_(MIX @ problem.outer_params["l"] / h)
    settings = {} if name == "unrolled" else {"product": "exact"}
    result = estimator(name, **settings).estimate(
        problem, inner_batch=None, outer_batch=None
    )
    terms = 3 if name == "unrolled" else 1
    inverse = sum((0.1 * (1 - 0.1 * h) ** j for j in range(terms)), start=0 * h)
    truth = {"l": MIX.T @ (inverse * torch.tensor(V, dtype=F64))}
    assert error(result.indirect, truth) <= tol(F64, 10)


# -- limits -----------------------------------------------------------------------------

LIMITS: list[tuple[str, dict[str, Any], str]] = [
    ("cg", {"max_iter": 1}, r"CG stopped after 1 products .* \(rtol 1e-06\)"),
    (
        "neumann",
        {"scale": 1.5},
        r"series diverges: scale 1\.5 times .* must be below 2",
    ),
    ("neumann", {"scale": 0.1, "damping": 30.0}, "series diverges: scale 0.1 times"),
]


@pytest.mark.parametrize(("name", "settings", "text"), LIMITS)
def test_limits_are_told_as_asked_for(
    name: str, settings: dict[str, Any], text: str
) -> None:
    problem = quadratic([0.5, 1.0, 2.0], V)

    def run(on_failure: str) -> Any:
        made = make_estimator(name, **settings, on_failure=on_failure)
        return made.estimate(problem, inner_batch=None, outer_batch=None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = run("return")
    assert quiet.info.converged is False
    assert re.search(text, quiet.info.reason)
    three_parts(quiet.info.reason)
    with pytest.warns(NumericalWarning, match=text) as caught:
        told = run("warn")
    assert str(caught[0].message) == quiet.info.reason
    assert torch.equal(told.indirect["l"], quiet.indirect["l"])
    fails(SolveError, text, problem, lambda: run("raise"))
