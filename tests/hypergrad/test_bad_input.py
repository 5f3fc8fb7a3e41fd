"""Bad input to every estimator: an error that says what to do, or the right answer.

Whatever happens, everything of the caller's is bit for bit as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypergrad import (
    Accumulated,
    BilevelProblem,
    HypergradError,
    HypergradEstimator,
    Hypergradient,
    NonFiniteError,
    SecondOrderError,
    estimator_names,
    make_estimator,
)
from hypergrad.rules import SGD
from hypergrad.solvers import CGSolver
from hypergrad.tree import Params
from tests.tolerances import error, tol

F64 = torch.float64
NAMES = estimator_names()
SETTINGS: dict[str, dict[str, Any]] = {
    "darts": {"inner_lr": 0.1},
    "sama": {"rule": SGD(0.1)},
    "unrolled": {"rule": SGD(0.1), "num_steps": 3},
    "penalty": {"rule": SGD(0.1), "num_steps": 3},
    "f2sa": {"rule": SGD(0.1), "num_steps": 3},
    "forward": {"rule": SGD(0.1), "num_steps": 3, "num_directions": 2},
    "zeroth-order": {"rule": SGD(0.1), "num_steps": 1, "num_directions": 1},
    "cg": {"on_failure": "return", "damping": 0.1, "max_iter": 4},
    "neumann": {"on_failure": "return"},
    "nystrom": {"on_failure": "return", "damping": 0.1, "rank": 4},
    "implicit": {"solver": CGSolver(4, damping=0.1, on_failure="return")},
}
# The direct term is all that these compute: they never call the inner loss.
WITH_INNER = [name for name in NAMES if name not in ("first-order", "pbgd-free")]

every = pytest.mark.parametrize("name", NAMES)
every_with_inner = pytest.mark.parametrize("name", WITH_INNER)
# By values alone nobody sees what a loss is computed from, nor a derivative.
BY_GRADIENTS = [name for name in NAMES if name != "zeroth-order"]
every_by_gradients = pytest.mark.parametrize("name", BY_GRADIENTS)


def estimator(name: str, **more: Any) -> HypergradEstimator:
    return make_estimator(name, **{**SETTINGS.get(name, {}), **more})


def run(name: str, problem: BilevelProblem, batch: Any = None) -> Hypergradient:
    return estimator(name).estimate(problem, inner_batch=batch, outer_batch=batch)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).requires_grad_()


def inner_loss(i: Params, o: Params, b: Any) -> Tensor:
    return ((i["w"] - o["l"]) ** 2).sum() + (i["w"] ** 4 * o["l"].exp()).sum() / 8


def outer_loss(i: Params, o: Params, b: Any) -> Tensor:
    return ((i["w"] - 0.5) ** 2).sum() + (o["l"] ** 3).sum()


def make(inner: Any = inner_loss, outer: Any = outer_loss) -> BilevelProblem:
    return BilevelProblem(inner, outer, {"w": leaf(0.3, -0.7)}, {"l": leaf(0.2, 0.1)})


# -- losses -----------------------------------------------------------------------------


@every_with_inner
@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (lambda i, o: i["w"] * o["l"], ValueError, r"inner_loss .* shape \(2,\)"),
        (lambda i, o: (i["w"] * o["l"]).sum().item(), TypeError, "inner_loss .* float"),
        (lambda i, o: None, TypeError, "inner_loss returned NoneType"),
        (
            lambda i, o: (i["w"] * o["l"]).sum() * math.nan,
            NonFiniteError,
            "inner .* nan",
        ),
        (
            lambda i, o: (i["w"] * o["l"]).sum() / 0,
            NonFiniteError,
            "inner loss is -?inf",
        ),
        (
            lambda i, o: (i["w"].detach() * o["l"]).sum(),
            HypergradError,
            r"none .*\(w\)",
        ),
        (lambda i, o: (i["w"] * 0).sqrt().sum() + o["l"][0], NonFiniteError, "in w"),
    ],
    ids=["vector", "float", "None", "nan", "inf", "detached", "nan gradient"],
)
def test_inner_losses(name: str, value: Any, kind: Any, text: str) -> None:
    problem = make(lambda i, o, b: value(i, o))
    before = everything(problem)
    with pytest.raises(kind, match=text):
        run(name, problem)
    assert everything(problem) == before


@every_by_gradients
@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (lambda i, o: i["w"] * o["l"], ValueError, r"outer_loss .* shape \(2,\)"),
        (lambda i, o: (i["w"] * o["l"]).sum().item(), TypeError, "outer_loss .* float"),
        (
            lambda i, o: (i["w"] * o["l"]).sum() * math.nan,
            NonFiniteError,
            "outer .* nan",
        ),
        (
            lambda i, o: (i["w"] * o["l"]).sum() / 0,
            NonFiniteError,
            "outer loss is -?inf",
        ),
        (lambda i, o: torch.ones(()), HypergradError, "outer loss depends on no param"),
        (lambda i, o: (o["l"] * 0).sqrt().sum() + i["w"][0], NonFiniteError, "in l"),
    ],
    ids=["vector", "float", "nan", "inf", "constant", "nan gradient"],
)
def test_outer_losses(name: str, value: Any, kind: Any, text: str) -> None:
    problem = make(outer=lambda i, o, b: value(i, o))
    before = everything(problem)
    with pytest.raises(kind, match=text):
        run(name, problem)
    assert everything(problem) == before


def test_first_order_does_not_need_the_inner_loss() -> None:
    problem = make(lambda i, o, b: torch.full((), math.nan))
    result = run("first-order", problem)
    assert torch.equal(
        result.outer_grads["l"], 3 * problem.outer_params["l"].detach() ** 2
    )


# -- what a loss does not use -----------------------------------------------------------


@every_by_gradients
def test_lambda_unused_by_the_inner_loss_leaves_the_direct_term(name: str) -> None:
    problem = make(lambda i, o, b: (i["w"] ** 2).sum())
    result = run(name, problem)
    direct = 3 * problem.outer_params["l"].detach() ** 2
    assert torch.equal(result.outer_grads["l"], direct)
    assert not result.indirect["l"].any()
    if name in WITH_INNER:
        assert "inner_loss: l" in result.info.unused


@every_by_gradients
def test_part_of_lambda_unused_by_the_inner_loss(name: str) -> None:
    problem = BilevelProblem(
        inner_loss,
        lambda i, o, b: outer_loss(i, o, b) + o["idle"] * 5,
        {"w": leaf(0.3, -0.7)},
        {"l": leaf(0.2, 0.1), "idle": torch.ones((), dtype=F64).requires_grad_()},
    )
    result = run(name, problem)
    assert result.outer_grads["idle"].item() == 5.0
    assert result.indirect["idle"].item() == 0.0
    if name in WITH_INNER:
        assert result.indirect["l"].all()
        assert result.info.unused == ("inner_loss: idle",)


@every_by_gradients
def test_w_unused_by_the_outer_loss_has_no_indirect_term(name: str) -> None:
    problem = make(outer=lambda i, o, b: (o["l"] ** 3).sum())
    result = run(name, problem)
    assert torch.equal(result.outer_grads["l"], result.direct["l"])
    assert not result.indirect["l"].any()
    if name in WITH_INNER:  # the others do not ask for ∂f/∂w
        assert "outer_loss: w" in result.info.unused


@every_by_gradients
def test_part_of_w_unused_is_zeros(name: str) -> None:
    # "idle" takes part in neither loss; it must change nothing.
    def build(**more: Tensor) -> BilevelProblem:
        return BilevelProblem(
            inner_loss,
            outer_loss,
            {"w": leaf(0.3, -0.7), **more},
            {"l": leaf(0.2, 0.1)},
        )

    plain, more = run(name, build()), run(name, build(idle=leaf(1.0, 2.0, 3.0)))
    if name != "neumann":  # its scale is learned along v, whatever its size
        assert error(more.outer_grads, plain.outer_grads) < tol(F64, 1e3)
    if name in WITH_INNER:
        assert "outer_loss: idle" in more.info.unused


@every_with_inner
def test_no_loss_uses_lambda(name: str) -> None:
    if name not in BY_GRADIENTS:
        return
    problem = make(
        lambda i, o, b: (i["w"] ** 2).sum(), lambda i, o, b: (i["w"] ** 3).sum()
    )
    with pytest.raises(HypergradError, match=r"no outer parameter \(l\) acts"):
        run(name, problem)


@every_by_gradients
def test_an_empty_inner_set(name: str) -> None:
    problem = BilevelProblem(
        lambda i, o, b: (o["l"] ** 2).sum(),
        lambda i, o, b: (o["l"] ** 3).sum(),
        {},
        {"l": leaf(0.2, 0.1)},
    )
    result = run(name, problem)
    assert not result.indirect["l"].any()
    assert torch.equal(
        result.outer_grads["l"], 3 * problem.outer_params["l"].detach() ** 2
    )


# -- tensors ----------------------------------------------------------------------------


def matrix_losses() -> tuple[Any, Any]:
    def inner(i: Params, o: Params, b: Any) -> Tensor:
        fit = torch.tanh(i["m"] @ o["p"]).sum() + i["s"] ** 2
        return fit + ((i["m"] ** 2).sum() + (i["m"] ** 4).sum()) * 0.7

    def outer(i: Params, o: Params, b: Any) -> Tensor:
        return ((i["m"] - 1) ** 2).sum() + (o["p"] ** 2).sum() + i["s"]

    return inner, outer


@every
def test_non_contiguous_parameters(name: str) -> None:
    make_random = torch.Generator().manual_seed(0)
    m = torch.randn(3, 2, generator=make_random, dtype=F64).T
    p = torch.randn(3, 8, generator=make_random, dtype=F64)[:, ::4]
    s = torch.tensor(0.4, dtype=F64)
    assert not m.is_contiguous()
    assert not p.is_contiguous()

    def build(copy: Callable[[Tensor], Tensor]) -> BilevelProblem:
        leaves = [copy(t.detach()).requires_grad_() for t in (m, s, p)]
        inner = {"m": leaves[0], "s": leaves[1]}
        return BilevelProblem(*matrix_losses(), inner, {"p": leaves[2]})

    odd, plain = (
        build(lambda t: t),
        build(lambda t: t.clone(memory_format=torch.contiguous_format)),
    )
    before = everything(odd)
    a, b = run(name, odd), run(name, plain)
    # Finite differences of these sums agree to rounding over the radius.
    assert error(a.outer_grads, b.outer_grads) < tol(F64, kind="difference")
    assert everything(odd) == before
    assert not odd.inner_params["m"].is_contiguous()


@every
def test_aliased_tensors(name: str) -> None:
    w, lam = leaf(0.3, -0.7), leaf(0.2, 0.1)

    def inner(i: Params, o: Params, b: Any) -> Tensor:
        first = ((i["w"] - o["l"]) * (i["x"] - o["k"])).sum()
        return first + (i["x"] ** 4 * o["k"].exp()).sum() / 8

    aliased = BilevelProblem(inner, outer_loss, {"w": w, "x": w}, {"l": lam, "k": lam})
    a, b = run(name, aliased), run(name, make())
    assert error(a.outer_grads, b.outer_grads) < tol(F64, 100)


@every
def test_gradients_of_the_caller_stay(name: str) -> None:
    problem = make()
    for t in problem.tensors:
        t.grad = torch.ones_like(t)
    held = [t.grad for t in problem.tensors]
    run(name, problem)
    assert all(t.grad is g for t, g in zip(problem.tensors, held, strict=True))
    assert all(bool((t.grad == 1).all()) for t in problem.tensors if t.grad is not None)


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(name: str, mode: Any) -> None:
    true = run(name, make())
    problem = make()
    with mode():
        result = run(name, problem)
    assert torch.equal(result.outer_grads["l"], true.outer_grads["l"])


@every_by_gradients
def test_frozen_since_the_problem_was_made(name: str) -> None:
    problem = make()
    problem.outer_params["l"].requires_grad_(False)
    with pytest.raises(HypergradError, match="l no longer requires grad"):
        run(name, problem)


# -- losses that raise midway -----------------------------------------------------------


class Net(nn.Module):
    """Batch norm, dropout, and a switch of the mode, beside a gate (outer)."""

    def __init__(self) -> None:
        super().__init__()
        make_random = torch.Generator().manual_seed(1)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(4, 1)
        self.gate = nn.Parameter(torch.ones(4))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=make_random) / 2 + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.norm(self.first(x))) * self.gate)
        return self.second(h)


class Failing:
    """A loss that raises at its k-th call, after it has changed all it can change."""

    def __init__(self, at: int | None, error: BaseException | None = None) -> None:
        self.calls = 0
        self.at = at
        self.error = error

    def __call__(self, model: Any, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + float(np.random.rand())
        value = (model(x) - noise).square().mean()
        if self.calls == self.at and self.error is not None:
            model.train(not model.training)
            torch.set_grad_enabled(False)
            raise self.error
        return value + sum(p.square().sum() for p in model.parameters())


def module_problem(
    at: int | None = None, error: Any = None
) -> tuple[BilevelProblem, Failing]:
    fails = Failing(at, error)
    return BilevelProblem.from_module(Net(), fails, outer="gate"), fails


def everything(problem: BilevelProblem) -> dict[str, Any]:
    """All that a caller could see changed, bit for bit."""
    numpy: Any = np.random.get_state(legacy=True)
    out: dict[str, Any] = {
        "tensors": [bits(t) for t in problem.tensors],
        "objects": [(id(t), t.requires_grad, id(t.grad)) for t in problem.tensors],
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy[1].tolist(), numpy[2:]),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
    }
    if problem.module is not None:
        modules = list(problem.module.modules())
        out["buffers"] = [
            (n, id(b), bits(b)) for n, b in problem.module.named_buffers()
        ]
        out["parameters"] = [(n, id(p)) for n, p in problem.module.named_parameters()]
        out["modes"] = [m.training for m in modules]
        out["hooks"] = [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in modules
        ]
        out["attributes"] = [sorted(vars(m)) for m in modules]
    return out


def bits(tensor: Tensor) -> list[Any]:
    kind = {1: torch.int8, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().clone().view(kind).tolist()


def batch() -> Any:
    make_random = torch.Generator().manual_seed(2)
    x = torch.randn(8, 3, generator=make_random, dtype=F64)
    return Accumulated([x[:4], x[4:]])


def seeded() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@every
@pytest.mark.parametrize(
    "kind",
    [
        RuntimeError("on purpose"),
        pytest.param(KeyboardInterrupt(), marks=pytest.mark.slow),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
def test_a_loss_that_raises_at_any_call(name: str, kind: BaseException) -> None:
    seeded()
    problem, counted = module_problem()
    before = everything(problem)
    true = run(name, problem, batch())
    assert everything(problem) == before
    calls = counted.calls
    assert calls >= 2
    if name == "auto":  # it tries a product, then is CG, which is tested by itself
        calls = 6
    else:
        assert calls == true.info.n_forward
    for k in range(1, calls + 1):
        seeded()
        problem, fails = module_problem(k, kind)
        before = everything(problem)
        with pytest.raises(type(kind)):
            run(name, problem, batch())
        assert fails.calls == k
        assert everything(problem) == before, f"call {k} of {calls}"
        again = run(name, problem, batch())
        assert torch.equal(again.outer_grads["gate"], true.outer_grads["gate"])
        assert everything(problem) == before


@every
@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
def test_the_same_input_gives_the_same_output(name: str) -> None:
    seeded()
    problem, _ = module_problem()
    first, second = run(name, problem, batch()), run(name, problem, batch())
    assert torch.equal(first.outer_grads["gate"], second.outer_grads["gate"])
    total = first.direct["gate"] + first.indirect["gate"]
    assert torch.equal(total, first.outer_grads["gate"])


# -- models -----------------------------------------------------------------------------


class Reentrant(nn.Module):
    """Reentrant checkpointing, before a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 2)
        self.gate = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        h: Any = checkpoint(self.second, self.first(x), use_reentrant=True)
        return h * self.gate


@every
def test_reentrant_checkpointing(name: str) -> None:
    problem = BilevelProblem.from_module(
        Reentrant(), lambda m, x: m(x).square().mean(), outer="gate"
    )
    before = everything(problem)
    with pytest.raises(HypergradError, match=r"reentrant.*use_reentrant"):
        run(name, problem, torch.ones(2, 3))
    assert everything(problem) == before


@every
def test_no_second_derivative(name: str) -> None:
    def fused(i: Params, o: Params, b: Any) -> Tensor:
        q = (i["w"] * o["l"]).reshape(1, 1, 2, 1)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(q, q, q)[0].square().sum() + (i["w"] ** 2).sum()

    problem = make(fused)
    before = everything(problem)
    if estimator(name).needs.order < 2:
        assert run(name, problem).outer_grads["l"].isfinite().all()
    else:
        with pytest.raises(SecondOrderError, match=r'attn_implementation="eager"'):
            run(name, problem)
    assert everything(problem) == before


@every_with_inner
def test_lookback_without_a_rule(name: str) -> None:
    bare = make_estimator(name)
    if not bare.needs.lookback:
        return
    setting = "inner_lr" if name == "darts" else "rule"
    with pytest.raises(ValueError, match=rf"looks back .* set {setting}=") as caught:
        bare.estimate(make(), inner_batch=None, outer_batch=None)
    assert "steps" in str(caught.value)
