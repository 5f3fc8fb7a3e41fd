"""Double backward and forward-over-reverse against dense second derivatives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hypergrad import (
    Accumulated,
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    SecondOrderError,
    tree,
)
from hypergrad.batches import as_micro_batches
from hypergrad.products import (
    BoundProduct,
    DoubleBackward,
    ForwardOverReverse,
    Hints,
    Product,
    Tally,
    gradients,
    second_order,
)
from hypergrad.tree import Params
from tests.hypergrad.products.cases import (
    CASES,
    F32,
    F64,
    MODULES,
    Sdpa,
    Truth,
    dense,
    direction,
    draw,
    dropout_case,
    filled,
    fit,
    leaf,
    normalised,
    rng,
    truth,
)
from tests.tolerances import error, tol

# Algebra: 10 ε times a condition of 5 (a normalisation, an exponential).
EXACT = {dtype: tol(dtype, cond=5) for dtype in (F64, F32, torch.bfloat16)}
KINDS = [DoubleBackward, ForwardOverReverse]


class Settled:
    """A product that is looked at after each call."""

    def __init__(self, product: BoundProduct) -> None:
        self.product = product

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.product, name)
        if name not in ("vjp", "hvp", "hvps", "mixed_vjp", "gradient"):
            return found

        def call(*args: Any, **settings: Any) -> Any:
            value = found(*args, **settings)
            self.product.tally.read()
            return value

        return call


def made(kind: Callable[..., Product], problem: BilevelProblem, batch: Any) -> Any:
    return Settled(kind().bind(problem, as_micro_batches(batch), Tally()))


def check(value: tuple[Params, Params], known: Truth, u: Params, bound: float) -> None:
    hvp, mixed = value
    assert error(hvp, known.product(u, hvp)) < bound
    assert error(mixed, known.product(u, mixed)) < bound


# -- truth ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
@pytest.mark.parametrize("along", ["outer gradient", "random"])
def test_equals_the_dense_hessian(
    kind: Any, name: str, dtype: torch.dtype, along: str
) -> None:
    case, known = CASES[name](dtype), truth(name, dtype)
    u = direction(case, known, along, dtype)
    product = made(kind, case.problem, case.batch)
    both = product.vjp(u)
    check(both, known, u, EXACT[dtype])
    for value, params in zip(
        both, (case.problem.inner_params, case.problem.outer_params), strict=True
    ):
        assert {n: (t.shape, t.dtype) for n, t in value.items()} == {
            n: (t.shape, t.dtype) for n, t in params.items()
        }
    # Each alone is the same to rounding: the order of additions may differ.
    assert error(product.hvp(u), known.product(u, both[0])) < EXACT[dtype]
    assert error(product.mixed_vjp(u), known.product(u, both[1])) < EXACT[dtype]
    assert product.vjp(u, inner=False, outer=False) == ({}, {})


@pytest.mark.parametrize("name", MODULES)
def test_jvp_of_grad_equals_double_backward_on_modules(name: str) -> None:
    case, known = CASES[name](F64), truth(name, F64)
    u = direction(case, known, "random", F64)
    backward = made(DoubleBackward, case.problem, case.batch).vjp(u)
    forward = made(ForwardOverReverse, case.problem, case.batch).vjp(u)
    for a, b in zip(backward, forward, strict=True):
        assert error(a, b) < EXACT[F64]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_with_their_weights(kind: Any) -> None:
    case = CASES["layer_norm"](F64)
    x, y = case.batch
    parts = Accumulated([(x[:2], y[:2]), (x[2:], y[2:])], [1 / 3, 2 / 3])
    known = truth("layer_norm", F64)
    u = direction(case, known, "random", F64)
    product = made(kind, case.problem, parts)
    check(product.vjp(u), known, u, EXACT[F64])
    check(product.vjp(u), known, u, EXACT[F64])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_the_mask_of_the_present_random_state(kind: Any) -> None:
    problem, batch, known = dropout_case()
    state = torch.get_rng_state()
    with second_order(
        "exact" if kind is DoubleBackward else "forward-over-reverse",
        problem,
        as_micro_batches(batch),
        Tally(),
    ) as product:
        torch.rand(3)  # what is drawn inside the block changes nothing
        check(product.vjp(known.v), known, known.v, EXACT[F64])
        check(product.vjp(known.v), known, known.v, EXACT[F64])
    torch.set_rng_state(state)
    torch.rand(3)
    other = made(kind, problem, batch).vjp(known.v)
    assert error(other[1], known.product(known.v, other[1])) > 0.1  # another mask


# -- directions -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["shapes", "layer_norm"])
def test_zero_gives_exact_zeros(kind: Any, name: str) -> None:
    case = CASES[name](F64)
    zeros = tree.zeros_like(case.problem.inner_params)
    for part in made(kind, case.problem, case.batch).vjp(zeros):
        assert all(not t.any() for t in part.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e20, 1e-20])
def test_is_linear_far_from_one(kind: Any, factor: float) -> None:
    case, known = CASES["layer_norm"](F32), truth("layer_norm", F32)
    u = direction(case, known, "outer gradient", F32)
    product = made(kind, case.problem, case.batch)
    check(product.vjp(tree.scale(u, factor)), known, tree.scale(u, factor), EXACT[F32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_direction_that_is_not_finite_is_blamed(kind: Any, bad: float) -> None:
    case = CASES["quadratic"](F64)
    u = {"w": torch.tensor([1.0, bad, 0, 0, 0], dtype=F64)}
    with pytest.raises(NonFiniteError, match=r"direction .* norm (nan|inf)"):
        made(kind, case.problem, case.batch).vjp(u)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_that_is_not_finite_is_an_error(kind: Any) -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        # The value is 0 and the gradient finite; the second derivative is not.
        return i["w"].abs().pow(1.5).sum() * o["l"]

    problem = BilevelProblem(
        loss,
        loss,
        {"w": leaf(torch.zeros(2, dtype=F64))},
        {"l": leaf(torch.ones((), dtype=F64))},
    )
    with pytest.raises(NonFiniteError, match="product"):
        made(kind, problem, None).hvp({"w": torch.ones(2, dtype=F64)})


# -- modes and dtypes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["shapes", "batch_norm"])
def test_the_callers_mode_does_not_matter(kind: Any, mode: Any, name: str) -> None:
    case, known = CASES[name](F64), truth(name, F64)
    u = direction(case, known, "outer gradient", F64)
    with mode():
        product = made(kind, case.problem, case.batch)
        check(product.vjp(u), known, u, EXACT[F64])
        check(product.vjp(u), known, u, EXACT[F64])
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["softmax", "layer_norm", "sdpa"])
def test_bfloat16_parameters(kind: Any, name: str) -> None:
    dtype = torch.bfloat16
    case, known = CASES[name](dtype), truth(name, dtype)
    u = direction(case, known, "outer gradient", dtype)
    value = made(kind, case.problem, case.batch).vjp(u)
    assert all(t.dtype == dtype for part in value for t in part.values())
    check(value, known, u, EXACT[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: Any) -> None:
    case, known = CASES["layer_norm"](F32), truth("layer_norm", F32)
    u = direction(case, known, "outer gradient", F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = made(kind, case.problem, case.batch).vjp(u)
    check(value, known, u, EXACT[torch.bfloat16])  # what autocast computes in


# -- graphs -----------------------------------------------------------------------------


def test_one_micro_batch_is_evaluated_once_for_many_products() -> None:
    case, known = CASES["batch_norm"](F64), truth("batch_norm", F64)
    tally = Tally()
    product = DoubleBackward().bind(case.problem, as_micro_batches(case.batch), tally)
    for _ in range(3):
        check(product.vjp(known.v), known, known.v, EXACT[F64])
    assert (tally.n_forward, tally.n_backward, tally.n_hvp) == (1, 4, 3)


def test_several_micro_batches_hold_one_graph_at_a_time() -> None:
    case = CASES["layer_norm"](F64)
    tally = Tally()
    batches = as_micro_batches(Accumulated([case.batch] * 2))
    product = DoubleBackward().bind(case.problem, batches, tally)
    product.hvp(truth("layer_norm", F64).v)
    product.hvp(truth("layer_norm", F64).v)
    assert tally.n_forward == 4


def test_a_graph_is_not_used_at_another_point() -> None:
    case, known = CASES["softmax"](F64), truth("softmax", F64)
    product = made(DoubleBackward, case.problem, case.batch)
    product.hvp(known.v)
    with (
        case.problem.at(tree.scale(case.problem.inner_params, 2.0)),
        pytest.raises(HypergradError, match="moved after the graph"),
    ):
        product.hvp(known.v)


def rng_bits() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("kind", KINDS)
def test_the_problem_stays_as_it_was(kind: Any) -> None:
    case, known = CASES["batch_norm"](F64), truth("batch_norm", F64)
    model = case.problem.module
    assert model is not None
    before = {n: t.clone() for n, t in model.state_dict().items()}
    objects = {n: id(t) for n, t in model.named_buffers()}
    states = rng_bits()
    made(kind, case.problem, case.batch).vjp(known.v)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert objects == {n: id(t) for n, t in model.named_buffers()}
    assert all(p.grad is None for p in model.parameters())
    assert states == rng_bits()


def test_unused_outer_parameters_are_listed() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        # "added" is used, but does not act on the gradient in w.
        return (i["w"] ** 2).sum() * o["scale"] + o["added"]

    one = torch.ones((), dtype=F64)
    outer = {n: leaf(one.clone()) for n in ("scale", "added", "absent")}
    problem = BilevelProblem(loss, loss, {"w": leaf(draw(rng(), 3))}, outer)
    product = made(DoubleBackward, problem, None)
    mixed = product.mixed_vjp({"w": torch.ones(3, dtype=F64)})
    assert product.unused == {"added", "absent"}
    assert mixed["added"].item() == mixed["absent"].item() == 0.0
    assert mixed["scale"].item() == pytest.approx(2 * float(draw(rng(), 3).sum()))


def test_linear_inner_loss_has_zero_curvature() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return i["w"].sum() + o["l"]

    problem = BilevelProblem(
        loss, loss, {"w": leaf(torch.ones(3))}, {"l": leaf(torch.ones(()))}
    )
    for kind in KINDS:
        hvp, mixed = made(kind, problem, None).vjp({"w": torch.ones(3)})
        assert not hvp["w"].any()
        assert not mixed["l"].any()


def test_sparse_embedding_gradients() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True, dtype=F64)
            self.scale = nn.Parameter(torch.ones(3, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.table(x) * self.scale)

    batch = (torch.tensor([0, 3, 3]), draw(rng(), 3, 3))
    problem = BilevelProblem.from_module(filled(Lookup(), F64), fit, outer="scale")

    def formula(p: Params, batch: Any) -> Tensor:
        rows = p["table.weight"][[0, 3, 3]]
        return (torch.tanh(rows * p["scale"]) - batch[1]).pow(2).sum() / 9

    known = dense(problem, formula, formula, batch)
    check(made(DoubleBackward, problem, batch).vjp(known.v), known, known.v, EXACT[F64])
    g = gradients(problem, "inner", as_micro_batches(batch), Tally())
    assert g.inner is not None
    assert error(g.inner, known.v) < EXACT[F64]


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.norm = nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(torch.tanh(self.a(x))))

    make = rng()
    batch = (draw(make, 4, 3), draw(make, 4, 3))
    problem = BilevelProblem.from_module(filled(Tied(), F64), fit, outer="norm.*")
    assert list(problem.inner_params) == ["a.weight"]

    def formula(p: Params, batch: Any) -> Tensor:
        x, y = batch
        h = normalised(torch.tanh(x @ p["a.weight"].T), 1)
        h = h * p["norm.weight"] + p["norm.bias"]
        return (h @ p["a.weight"].T - y).pow(2).sum() / 12

    known = dense(problem, formula, formula, batch)
    for kind in KINDS:
        check(made(kind, problem, batch).vjp(known.v), known, known.v, EXACT[F64])


# -- what cannot be differentiated twice ------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose backward is marked as not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Kernel(torch.autograd.Function):
    """A square whose backward runs outside of autograd, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * grad.detach().numpy())


class Proper(torch.autograd.Function):
    """A square that can be differentiated as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def flash(q: Tensor) -> Tensor:
    four = q.reshape(1, 1, -1, 2)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(four, four, four)[0]


def custom_problem(apply: Callable[[Tensor], Tensor]) -> BilevelProblem:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return (apply(i["w"] * o["l"]).sum() - 1) ** 2

    return BilevelProblem(
        loss,
        loss,
        {"w": leaf(draw(rng(), 4))},
        {"l": leaf(torch.ones((), dtype=F64))},
    )


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "flash": flash,
    "once differentiable": Once.apply,
    "kernel": Kernel.apply,
    "native": lambda x: torch.cdist(x[None], x.flip(0)[None], p=1.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BROKEN)
def test_no_second_derivative_says_what_to_do(kind: Any, name: str) -> None:
    problem = custom_problem(BROKEN[name])
    u = {"w": torch.ones(4, dtype=F64)}
    with pytest.raises(SecondOrderError) as caught:
        made(kind, problem, None).vjp(u)
    text = str(caught.value)
    assert 'attn_implementation="eager"' in text
    for other in ("'first-order'", "'darts'", "product='finite-difference'"):
        assert other in text
    # The first derivative is right, and still to be had.
    assert gradients(problem, "inner", as_micro_batches(None), Tally()).inner


@pytest.mark.parametrize("name", ["flash", "once differentiable", "kernel"])
def test_keeping_a_graph_without_second_derivative(name: str) -> None:
    problem = custom_problem(BROKEN[name])
    u = {"w": torch.ones(4, dtype=F64)}

    def run() -> None:
        g = gradients(problem, "inner", as_micro_batches(None), Tally(), keep=True)
        assert g.graph is not None
        g.graph.product(u, g.graph.inner, Tally(), retain=False)

    with pytest.raises(SecondOrderError, match="eager"):
        run()


def test_a_proper_custom_function_is_differentiated_twice() -> None:
    problem = custom_problem(Proper.apply)
    plain = custom_problem(lambda x: x**2)
    u = {"w": torch.ones(4, dtype=F64)}
    value = made(DoubleBackward, problem, None).hvp(u)
    true = made(DoubleBackward, plain, None).hvp(u)
    assert error(value, true) < EXACT[F64]
    with pytest.raises(SecondOrderError, match=r"setup_context.*product='exact'"):
        made(ForwardOverReverse, problem, None).hvp(u)


def test_an_lstm_is_differentiated_twice_by_double_backward() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(2, 3, batch_first=True)
            self.out = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x)[0])

    make = rng()
    batch = (draw(make, 2, 4, 2), draw(make, 2, 4, 1))
    problem = BilevelProblem.from_module(filled(Recurrent(), F64), fit, outer="out.*")

    def formula(p: Params, batch: Any) -> Tensor:
        x, y = batch
        h = c = torch.zeros(2, 3, dtype=F64)
        total = torch.zeros((), dtype=F64)
        for t in range(4):
            z = x[:, t] @ p["cell.weight_ih_l0"].T + p["cell.bias_ih_l0"]
            z = z + h @ p["cell.weight_hh_l0"].T + p["cell.bias_hh_l0"]
            i, f, g, o = z.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            total = (
                total + (h @ p["out.weight"].T + p["out.bias"] - y[:, t]).pow(2).sum()
            )
        return total / 8

    known = dense(problem, formula, formula, batch)
    check(made(DoubleBackward, problem, batch).vjp(known.v), known, known.v, EXACT[F64])
    # On clones of w too, which recurrent layers keep a list of their own of.
    g = gradients(problem, "inner", as_micro_batches(batch), Tally(), keep=True)
    kept = DoubleBackward().bind(problem, g.batches, Tally(), Hints(kept=g.graph))
    check(kept.vjp(known.v), known, known.v, EXACT[F64])


def test_the_message_of_other_errors_is_left_alone() -> None:
    def broken(i: Params, o: Params, b: Any) -> Tensor:
        raise RuntimeError("on purpose")

    problem = BilevelProblem(
        broken, broken, {"w": leaf(torch.ones(3))}, {"l": leaf(torch.ones(()))}
    )
    for kind in KINDS:
        with pytest.raises(RuntimeError, match=r"^on purpose$"):
            made(kind, problem, None).hvp({"w": torch.ones(3)})


# -- forward-over-reverse and the functional path ---------------------------------------


def test_forward_over_reverse_refuses_a_loss_that_ignores_its_arguments() -> None:
    w = leaf(torch.ones(3, dtype=F64))
    lam = leaf(torch.ones((), dtype=F64))

    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return (w**2).sum() * lam + i["w"].sum() + o["l"]  # closes over its own

    problem = BilevelProblem(loss, loss, {"w": w}, {"l": lam})
    u = {"w": torch.ones(3, dtype=F64)}
    with pytest.raises(HypergradError, match="read the problem's own"):
        made(ForwardOverReverse, problem, None).hvp(u)
    # Double backward runs on the problem's own tensors, and is right.
    assert made(DoubleBackward, problem, None).hvp(u)["w"].tolist() == [2.0, 2.0, 2.0]


class Checkpointed(nn.Module):
    """A block under activation checkpointing."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 2)
        self.norm = nn.LayerNorm(5)
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        h: Any = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.second(h)


def test_checkpointing_is_right_by_double_backward() -> None:
    make = rng()
    batch = (draw(make, 4, 3), draw(make, 4, 2))
    model = filled(Checkpointed(), F64)
    problem = BilevelProblem.from_module(model, fit, outer="norm.*")

    def formula(p: Params, batch: Any) -> Tensor:
        x, y = batch
        h = normalised(x @ p["first.weight"].T + p["first.bias"], 1)
        h = torch.tanh(h * p["norm.weight"] + p["norm.bias"])
        return (h @ p["second.weight"].T + p["second.bias"] - y).pow(2).sum() / 8

    known = dense(problem, formula, formula, batch)
    check(made(DoubleBackward, problem, batch).vjp(known.v), known, known.v, EXACT[F64])
    with pytest.raises(HypergradError, match=r"checkpointing .*122729"):
        made(ForwardOverReverse, problem, batch).vjp(known.v)


def test_forward_over_reverse_refuses_checkpointing_in_a_function() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        h: Any = checkpoint(
            lambda w: torch.tanh(w * o["l"]), i["w"], use_reentrant=False
        )
        return h.square().sum()

    problem = BilevelProblem(
        loss, loss, {"w": leaf(torch.ones(3))}, {"l": leaf(torch.ones(()))}
    )
    with pytest.raises(HypergradError, match="checkpointing"):
        made(ForwardOverReverse, problem, None).hvp({"w": torch.ones(3)})


def test_default_attention_is_fused_and_products_run_under_the_plain_one() -> None:
    # What the sdpa case tests: torch picks flash here, which cannot be derived twice.
    x = draw(rng(), 2, 3, 4, dtype=F32)
    out = filled(Sdpa(), F32)(x).square().sum()
    names: set[str] = set()
    pending: list[Any] = [out.grad_fn]
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [parent for parent, _ in node.next_functions if parent]
    assert any("Flash" in name for name in names)


def test_unknown_product_lists_the_known() -> None:
    case = CASES["quadratic"](F64)
    name: Any = "reverse-over-forward"
    with (
        pytest.raises(ValueError, match=r"'reverse-over-forward'.*'exact'"),
        second_order(name, case.problem, as_micro_batches(case.batch), Tally()),
    ):
        pass


def test_a_kept_graph_goes_with_one_micro_batch() -> None:
    case = CASES["softmax"](F64)
    g = gradients(
        case.problem, "inner", as_micro_batches(case.batch), Tally(), keep=True
    )
    two = as_micro_batches(Accumulated([case.batch] * 2))
    with pytest.raises(ValueError, match="one micro-batch, and there are 2"):
        DoubleBackward().bind(case.problem, two, Tally(), Hints(kept=g.graph))
