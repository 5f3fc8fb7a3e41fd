"""Gauss-Newton products against dense JᵀCJ, and what the criterion may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergrad import (
    Accumulated,
    BilevelProblem,
    HypergradError,
    NumericalWarning,
    make_estimator,
)
from hypergrad.batches import as_micro_batches
from hypergrad.products import GaussNewton, Tally, second_order
from hypergrad.tree import Params
from tests.tolerances import error, tol

F64, F32 = torch.float64, torch.float32
PRODUCTS: list[Any] = ["exact", "forward-over-reverse", "finite-difference"]


def squared(outputs: Any, batch: Any) -> Tensor:
    return functional.mse_loss(outputs, functional.one_hot(batch[1], 3).to(outputs))


def softmax(outputs: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(outputs, batch[1])


CRITERIA = {"squared": squared, "softmax": softmax}


def network(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(n: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=make, dtype=F64)
    return x, torch.randint(0, 3, (n,), generator=make)


def problem_of(model: nn.Module, criterion: Any, **changes: Any) -> BilevelProblem:
    dtype = next(model.parameters()).dtype

    def predict(model: nn.Module, batch: Any) -> Any:
        return model(batch[0].to(dtype))

    settings = {"inner_outputs": predict, "inner_criterion": criterion, **changes}
    return BilevelProblem.from_module(
        model, lambda m, b: criterion(predict(m, b), b), outer="0.bias", **settings
    )


def dense(problem: BilevelProblem, criterion: Any, batch: Any) -> Tensor:
    """Return JᵀCJ in float64, from torch.func on the module alone."""
    module = problem.module
    assert module is not None
    state = {n: p.detach().double() for n, p in module.named_parameters()}
    names = list(problem.inner_params)

    def predict(*w: Tensor) -> Any:
        given = {**state, **dict(zip(names, w, strict=True))}
        return torch.func.functional_call(module, given, batch[0])

    w = tuple(state[n] for n in names)
    z = predict(*w)
    jacobians: Any = torch.func.jacrev(predict, argnums=tuple(range(len(w))))(*w)
    j = torch.cat([part.reshape(z.numel(), -1) for part in jacobians], 1)
    c: Any = torch.func.hessian(lambda v: criterion(v.reshape(z.shape), batch))(
        z.reshape(-1)
    )
    return j.T @ c @ j


def flat(params: Params) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in params.values()])


def draw(problem: BilevelProblem, seed: int = 5) -> Params:
    make = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=make, dtype=F64).to(p.dtype)
        for n, p in problem.inner_params.items()
    }


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("loss", CRITERIA)
def test_products_equal_the_dense_matrix(
    loss: str, name: Any, dtype: torch.dtype
) -> None:
    problem, batch = problem_of(network(dtype), CRITERIA[loss]), data()
    truth = dense(problem, CRITERIA[loss], batch)
    u = draw(problem)
    with second_order(
        name, problem, as_micro_batches(batch), Tally(), "gauss-newton"
    ) as product:
        first, second = product.hvp(u), product.hvp(draw(problem, seed=6))
    # A random direction: five times what a difference along a gradient loses.
    bar = tol(dtype, 5, "difference") if name == "finite-difference" else tol(dtype, 5)
    assert error(flat(first), truth @ flat(u)) <= bar
    assert error(flat(second), truth @ flat(draw(problem, seed=6))) <= bar


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_mixed_product_is_that_of_the_loss_itself(name: Any) -> None:
    problem, batch = problem_of(network(), softmax), data()
    u = draw(problem)
    results = []
    for curvature in ("hessian", "gauss-newton"):
        with second_order(
            name, problem, as_micro_batches(batch), Tally(), curvature
        ) as product:
            results.append((product.hvp(u), product.mixed_vjp(u)))
    (hessian, mixed), (gauss_newton, same) = results
    assert error(same, mixed) <= 1e-14
    assert error(gauss_newton, hessian) > 1e-2  # the model is not linear


def test_it_is_the_hessian_where_the_model_is_linear() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()

    def predict(m: nn.Module, batch: Any) -> Tensor:
        return m(batch[0])

    problem = BilevelProblem.from_module(
        model,
        lambda m, b: softmax(m(b[0]), b),
        outer="bias",
        inner_outputs=predict,
        inner_criterion=softmax,
    )
    u = draw(problem)
    values = []
    for curvature in ("hessian", "gauss-newton"):
        batches = as_micro_batches(data())
        with second_order("exact", problem, batches, Tally(), curvature) as product:
            values.append(product.hvp(u))
    assert error(*values) <= tol(F64, 5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_accumulated_batches_add_up(name: Any) -> None:
    problem = problem_of(network(), squared)
    parts = [data(4, 1), data(6, 2)]
    first, second = (dense(problem, squared, b) for b in parts)
    truth = 0.3 * first + 0.7 * second
    u = draw(problem)
    accumulated = Accumulated(parts, [0.3, 0.7])
    with second_order(name, problem, accumulated, Tally(), "gauss-newton") as product:
        got = product.hvp(u)
    bar = tol(F64, 5, "difference") if name == "finite-difference" else tol(F64, 5)
    assert error(flat(got), truth @ flat(u)) <= bar


def test_dropout_is_replayed() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    problem, batch = problem_of(model.train(), softmax), data()
    u = draw(problem)
    values = []
    for name in PRODUCTS:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        batches = as_micro_batches(batch)
        with second_order(name, problem, batches, Tally(), "gauss-newton") as product:
            values.append(product.hvp(u))
        assert torch.equal(torch.get_rng_state(), before)
    # The same mask in each, or the products would differ by O(1).
    assert error(values[1], values[0]) <= 1e-14
    assert error(values[2], values[0]) <= 5 * tol(F64, 1, "difference")


def test_costs_are_counted() -> None:
    problem, batches = problem_of(network(), squared), as_micro_batches(data())
    counts = {}
    for name in ("exact", "finite-difference"):
        tally = Tally()
        with second_order(name, problem, batches, tally, "gauss-newton") as product:
            for seed in range(3):
                product.hvp(draw(problem, seed))
        counts[name] = tally
    # Predictions, their check against the loss, and the graph of Jᵀz once; then a
    # derivative of it and a pull-back for each product.
    assert counts["exact"] == Tally(n_forward=2, n_backward=1 + 3 * 2, n_hvp=3)
    # Two displaced predictions, one to pull back through.
    assert counts["finite-difference"] == Tally(
        n_forward=1 + 3 * 3, n_backward=3, n_hvp=3
    )


def test_outputs_may_be_several_tensors_and_carry_parameters_along() -> None:
    """A penalty goes into the criterion, by way of the predictions."""
    x, y = data()
    w = torch.randn(4, 3, dtype=F64, requires_grad=True)
    lam = torch.tensor(0.3, dtype=F64, requires_grad=True)
    for kind in (tuple, dict):

        def predict(inner: Params, outer: Params, batch: Any, kind: Any = kind) -> Any:
            parts = {
                "logits": x @ inner["w"],
                "scaled": outer["lam"].sqrt() * inner["w"],
            }
            return parts if kind is dict else tuple(parts.values())

        def score(outputs: Any, batch: Any) -> Tensor:
            logits, scaled = outputs.values() if isinstance(outputs, dict) else outputs
            return functional.cross_entropy(logits, y) + scaled.square().sum() / 2

        def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
            return score(predict(inner, outer, batch), batch)

        problem = BilevelProblem(loss, loss, {"w": w}, {"lam": lam}, predict, score)
        u = draw(problem)
        values = []
        for curvature in ("hessian", "gauss-newton"):
            batches = as_micro_batches(None)
            with second_order("exact", problem, batches, Tally(), curvature) as made:
                values.append(made.hvp(u))
        # The model is linear in w: both are the same matrix.
        assert error(*values) <= tol(F64, 5)


def test_negative_curvature_of_the_hessian_is_none_of_gauss_newton() -> None:
    problem, batch = problem_of(network(), softmax), data()
    kwargs: Any = {"inner_batch": batch, "outer_batch": data(5, 4)}
    with pytest.warns(NumericalWarning, match="curvature of the inner loss is -"):
        raised = make_estimator("cg", max_iter=60).estimate(problem, **kwargs)
    assert raised.info.curvature is not None
    assert raised.info.curvature[0] < 0
    settings: Any = {"max_iter": 60, "rtol": 1e-12, "damping": 0.1}
    settings["curvature"] = "gauss-newton"
    good = make_estimator("cg", **settings).estimate(problem, **kwargs)
    assert good.info.damping == 0.1
    assert good.info.curvature is not None
    assert good.info.curvature[0] > -1e-12
    # The whole estimate by dense matrices.
    truth = dense_estimate(problem, batch, data(5, 4), 0.1)
    assert error(flat(good.indirect), truth) <= tol(F64, 1e2, "solve", rtol=1e-12)


def dense_estimate(
    problem: BilevelProblem, batch: Any, outer_batch: Any, damping: float
) -> Tensor:
    assert problem.module is not None
    names = list(problem.inner_params)
    state = {n: p.detach() for n, p in problem.module.named_parameters()}

    def loss(w: tuple[Tensor, ...], lam: Tensor, batch: Any) -> Tensor:
        given = {**state, **dict(zip(names, w, strict=True)), "0.bias": lam}
        assert problem.module is not None
        return softmax(
            torch.func.functional_call(problem.module, given, batch[0]), batch
        )

    w = tuple(state[n] for n in names)
    lam = state["0.bias"]
    slope: Any = torch.func.grad(loss)(w, lam, outer_batch)
    v = torch.cat([part.reshape(-1) for part in slope])
    mixed: Any = torch.func.jacrev(torch.func.grad(loss), argnums=1)(w, lam, batch)
    cross = torch.cat([part.reshape(-1, len(lam)) for part in mixed])
    matrix = dense(problem, softmax, batch)
    return -cross.T @ torch.linalg.solve(
        matrix + damping * torch.eye(len(v), dtype=F64), v
    )


def test_a_criterion_of_another_loss_is_refused() -> None:
    problem = problem_of(
        network(), softmax, inner_criterion=lambda z, b: 2 * softmax(z, b)
    )
    with (
        second_order(
            "exact", problem, as_micro_batches(data()), Tally(), "gauss-newton"
        ) as product,
        pytest.raises(HypergradError, match=r"it scores something else.*penalty"),
    ):
        product.hvp(draw(problem))


def test_without_predictions_it_says_what_to_pass() -> None:
    problem = BilevelProblem.from_module(
        network(), lambda m, b: softmax(m(b[0]), b), outer="0.bias"
    )
    with pytest.raises(ValueError, match="Pass inner_outputs and inner_criterion"):
        make_estimator("cg", curvature="gauss-newton").estimate(
            problem, inner_batch=data(), outer_batch=data()
        )
    with pytest.raises(ValueError, match="has no inner_outputs"):
        problem.outputs(problem.inner_params, problem.outer_params, data())
    with pytest.raises(ValueError, match="has no inner_criterion"):
        problem.criterion(torch.zeros(1), data())


@pytest.mark.parametrize("outputs", [3.0, "logits", (), [torch.zeros(2), None]])
def test_predictions_of_another_kind(outputs: Any) -> None:
    problem = problem_of(network(), softmax, inner_outputs=lambda m, b: outputs)
    with (
        second_order(
            "exact", problem, as_micro_batches(data()), Tally(), "gauss-newton"
        ) as product,
        pytest.raises(TypeError, match="that is not made of tensors"),
    ):
        product.hvp(draw(problem))


def test_an_unknown_curvature() -> None:
    with pytest.raises(
        ValueError, match="curvature='fisher' is unknown; choose one of"
    ):
        make_estimator("cg", curvature="fisher")


def test_a_zero_direction_gives_zeros() -> None:
    problem = problem_of(network(), squared)
    zero = {n: torch.zeros_like(p) for n, p in problem.inner_params.items()}
    for name in PRODUCTS:
        batches = as_micro_batches(data())
        with second_order(name, problem, batches, Tally(), "gauss-newton") as product:
            assert isinstance(product, GaussNewton)
            assert not any(t.any() for t in product.hvp(zero).values())


def test_outputs_that_carry_a_parameter_along() -> None:
    # g = (w·x λ - 1)²/2 + |w|²: JᵀCJ = λ² x xᵀ + 2I, and w is an output itself.
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)

    def outputs(i: Any, o: Any, b: Any) -> Any:
        return i["w"] @ x * o["lam"], i["w"]

    def criterion(z: Any, b: Any) -> Tensor:
        return (z[0] - 1) ** 2 / 2 + z[1].square().sum()

    made = BilevelProblem(
        lambda i, o, b: criterion(outputs(i, o, b), b),
        lambda i, o, b: i["w"].square().sum(),
        {"w": w},
        {"lam": lam},
        outputs,
        criterion,
    )
    u = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    true = 0.3**2 * x * (x @ u) + 2 * u
    for name in ("exact", "finite-difference"):
        with second_order(
            name, made, as_micro_batches(None), Tally(), "gauss-newton"
        ) as product:
            assert error(product.hvp({"w": u})["w"], true) < 1e-9
