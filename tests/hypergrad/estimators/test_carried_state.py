"""Sketches and solutions that estimators carry from one outer step to the next."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch

from hypergrad import BilevelProblem, make_estimator
from hypergrad.estimators import FirstOrder
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.reporting import silenced
from hypergrad.rules import SGD
from hypergrad.testing import ridge, softmax_regression
from tests.tolerances import error

CASES: list[tuple[str, dict[str, Any], list[int]]] = [
    # A sketch, a residual and the mixed product; then without the sketch.
    ("nystrom", {"rank": 3}, [5, 5, 5, 5]),
    ("nystrom", {"rank": 3, "every": 3}, [5, 2, 2, 5]),
    # The sketch on top of four iterations and the mixed product.
    ("cg", {"preconditioner_rank": 3, "preconditioner_every": 2}, [8, 5, 8, 5]),
    ("cg", {"preconditioner_rank": 3}, [8, 5, 5, 5]),
    # A start from the last solution takes a product of its own.
    ("cg", {"warm_start": True}, [5, 6, 6, 6]),
    ("cg", {}, [5, 5, 5, 5]),
]


def run(name: str, settings: dict[str, Any]) -> BilevelOptimizer:
    more: dict[str, Any] = {"damping": 0.1, "on_failure": "return"}
    if name == "cg":
        more |= {"max_iter": 4, "rtol": 0.0}
    return BilevelOptimizer(
        softmax_regression().problem,
        estimator=make_estimator(name, **more, **settings),
        inner_optimizer=partial(torch.optim.SGD, lr=0.01),
        outer_optimizer=partial(torch.optim.SGD, lr=0.01),
        outer_warmup=0,
    )


def step(opt: BilevelOptimizer) -> int:
    report = opt.step(None, None)
    assert report.info is not None
    return report.info.n_hvp


@pytest.mark.parametrize(("name", "settings", "products"), CASES)
def test_products_of_successive_outer_steps(
    name: str, settings: dict[str, Any], products: list[int]
) -> None:
    opt = run(name, settings)
    assert [step(opt) for _ in products] == products


@pytest.mark.parametrize(("name", "settings", "products"), CASES)
def test_a_resumed_run_carries_on_with_it(
    name: str, settings: dict[str, Any], products: list[int]
) -> None:
    whole, first = run(name, settings), run(name, settings)
    for _ in products:
        step(whole)
    for _ in products[:2]:
        step(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = run(name, settings)
    with torch.no_grad():
        for now, then in zip(
            second.problem.tensors, first.problem.tensors, strict=True
        ):
            now.copy_(then)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [step(second) for _ in products[2:]] == products[2:]
    for a, b in zip(second.problem.tensors, whole.problem.tensors, strict=True):
        assert torch.equal(a, b)


def test_another_seed_draws_another_sketch() -> None:
    """Of low rank they differ; of full rank both are the damped inverse."""
    known = ridge(6)
    found = {}
    for rank in (2, 6):
        for seed in (0, 1):
            estimator = make_estimator(
                "nystrom", rank=rank, seed=seed, damping=0.5, on_failure="return"
            )
            result = estimator.estimate(
                known.problem, inner_batch=None, outer_batch=None
            )
            found[rank, seed] = result.indirect
    assert error(found[2, 0], found[2, 1]) > 1e-3
    assert error(found[6, 0], found[6, 1]) <= 1e-12
    inverse = torch.linalg.inv(known.hessian + 0.5 * torch.eye(6).double())
    assert error(found[6, 0], known.indirect_by(inverse)) <= 1e-12


# -- where the outer loss does not see w --------------------------------------------------


@pytest.mark.parametrize("name", ["forward", "zeroth-order"])
def test_random_directions_go_on_after_a_step_without_a_slope(name: str) -> None:
    """f = c Σ w with c = 0 in one outer step: what follows draws as if c had been 1.

    At rate 1/2 dw/dλ = 1/2, so that all hypergradients are a random direction's slope
    times it; λ stays where it is, and what differs is the draw alone.
    """

    def draws(factors: list[float]) -> list[torch.Tensor]:
        scale = [1.0]
        problem = BilevelProblem(
            lambda i, o, b: (i["w"] - o["lam"]).square().sum() / 2,
            lambda i, o, b: scale[0] * i["w"].sum() + 0 * o["lam"].sum(),
            {"w": torch.zeros(50, dtype=torch.float64, requires_grad=True)},
            {"lam": torch.zeros(50, dtype=torch.float64, requires_grad=True)},
        )
        estimator = make_estimator(name, num_steps=1, num_directions=1, rule=SGD(0.5))
        state: Any = {}
        found = []
        for factor in factors:
            scale[0] = factor
            result = estimator.estimate(
                problem, inner_batch=None, outer_batch=None, state=state
            )
            state = result.state
            found.append(result.outer_grads["lam"].sign())
        return found

    with silenced():
        plain = draws([1.0, 1.0, 1.0, 1.0])
        gap = draws([1.0, 1.0, 0.0, 1.0])
    assert not gap[2].any()
    # Without a slope `forward` has no use for a direction, and draws none.
    left = plain[3] if name == "zeroth-order" else plain[2]
    assert torch.equal(gap[3] * gap[3][0], left * left[0])
    for before in plain[:2]:
        assert not torch.equal(gap[3] * gap[3][0], before * before[0])


# -- where another inner run begins -------------------------------------------------------


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("name", ["forward", "zeroth-order"])
def test_random_directions_go_on_to_others_in_another_run(
    name: str, anew: bool
) -> None:
    """λ moves within the span of the m directions of each outer step.

    Of 20 entries, 6 moves with m = 2 are independent, unless all have the same directions:
    then their rank is 1, for the slopes of a linear f stay what they were.
    """
    slopes = torch.linspace(-1, 1, 20, dtype=torch.float64)

    def zeros() -> torch.Tensor:
        return torch.zeros(20, dtype=torch.float64, requires_grad=True)

    problem = BilevelProblem(
        lambda i, o, b: (i["w"] - o["lam"]).square().sum() / 2,
        lambda i, o, b: slopes @ i["w"],
        {"w": zeros()},
        {"lam": zeros()},
    )
    opt = BilevelOptimizer(
        problem,
        estimator=make_estimator(name, num_steps=1, num_directions=2),
        inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        outer_warmup=0,
    )
    held: list[torch.Tensor] = []
    for _ in range(6):
        if anew:
            opt.begin_run()
        before = problem.outer_params["lam"].detach().clone()
        step(opt)
        held.append(problem.outer_params["lam"].detach() - before)
    assert torch.linalg.matrix_rank(torch.stack(held), rtol=1e-6) == 6


def test_another_run_starts_without_the_last_solution() -> None:
    """A start from it takes a product; the first estimate of a run has none."""
    opt = run("cg", {"warm_start": True})
    products = []
    for _ in range(2):
        opt.begin_run()
        products += [step(opt), step(opt)]
    assert products == [5, 6, 5, 6]


def test_a_state_for_another_run_that_is_no_tensor() -> None:
    class Counted(FirstOrder):
        def new_run(self, state: Any) -> Any:
            return {"runs": 1}

    opt = BilevelOptimizer(
        softmax_regression().problem,
        estimator=Counted(),
        inner_optimizer=partial(torch.optim.SGD, lr=0.01),
        outer_optimizer=partial(torch.optim.SGD, lr=0.01),
    )
    with pytest.raises(TypeError, match=r"Counted.new_run returned 1 as state 'runs'"):
        opt.begin_run()
