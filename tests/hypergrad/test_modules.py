"""Losses of modules: tensors swapped in, functional calls, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypergrad import BilevelProblem, HypergradError, swapped, tree
from hypergrad.batches import as_micro_batches
from hypergrad.modules import refuse_recompute
from hypergrad.products import DoubleBackward, ForwardOverReverse, Tally, gradients
from tests.tolerances import error, tol

F64 = torch.float64


class Tied(nn.Module):
    """Two layers with one weight, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * self.scale


def square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


# -- swapped ----------------------------------------------------------------------------


def test_tied_weights_are_swapped_in_every_place() -> None:
    model = Tied()
    own, new = model.a.weight, torch.eye(2, requires_grad=True)
    with swapped(model, {"a.weight": new}):
        assert model.a.weight is model.b.weight is new
        assert dict(model.named_parameters())["a.weight"] is new
        model(torch.ones(1, 2)).sum().backward()
    assert model.a.weight is model.b.weight is own
    assert new.grad is not None
    assert own.grad is None
    with swapped(model, {"b.weight": new}):  # by its other name
        assert model.a.weight is new
    with swapped(model, {"a.weight": new, "b.weight": new}):
        assert model.b.weight is new


def test_two_tensors_for_one_tied_weight_are_refused() -> None:
    model = Tied()
    two = {"a.weight": torch.eye(2), "b.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"'b\.weight' is tied"), swapped(model, two):
        pass
    assert model.a.weight is model.b.weight


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_own_parameters_come_back_after_an_exception(kind: Any) -> None:
    model = Tied()
    own = dict(model.named_parameters())

    def fail() -> None:
        with swapped(model, {n: t.detach() * 2 for n, t in own.items()}):
            raise kind

    with pytest.raises(kind):
        fail()
    assert all(own[n] is p for n, p in model.named_parameters())


def test_nested_swaps_come_back_in_order() -> None:
    model = nn.Linear(1, 1)
    own, one, two = model.bias, torch.ones(1), torch.full((1,), 2.0)
    with swapped(model, {"bias": one}):
        with swapped(model, {"bias": two}):
            assert model.bias is two
        assert model.bias is one
    assert model.bias is own


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"nope": torch.ones(1)}, "no parameter 'nope'"),
        (
            {"bias": torch.ones(2)},
            r"'bias' has shape \(2,\) but the parameter has \(1,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tensors: Any, text: str) -> None:
    model = nn.Linear(1, 1)
    own = model.bias
    with pytest.raises(ValueError, match=text), swapped(model, tensors):
        pass
    assert model.bias is own


def test_hooks_see_the_swapped_module() -> None:
    model = nn.Linear(1, 1, bias=False)
    seen: list[float] = []
    model.register_forward_pre_hook(lambda m, args: seen.append(m.weight.item()))  # pyright: ignore[reportCallIssue]
    with swapped(model, {"weight": torch.full((1, 1), 5.0)}):
        model(torch.ones(1, 1))
    assert seen == [5.0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_on_what_was_swapped_in(kind: Any) -> None:
    model = kind(2, 3)
    x = torch.ones(4, 1, 2)
    true = model(x)[0]
    doubled = {n: 2 * t.detach() for n, t in model.named_parameters()}
    with swapped(model, doubled):
        other = model(x)[0]
    assert torch.equal(model(x)[0], true)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(doubled[name])
    assert torch.equal(model(x)[0], other)


# -- a module among wrappers ------------------------------------------------------------


class Wrapper(nn.Module):
    """Hands everything on, as data-parallel wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_wrapped_module() -> None:
    inner = Tied().double()
    x = torch.randn(3, 2, dtype=F64)
    plain = BilevelProblem.from_module(inner, square, outer="scale")
    wrapped = BilevelProblem.from_module(Wrapper(inner), square, outer="module.scale")
    u = {n: torch.ones_like(t) for n, t in plain.inner_params.items()}
    v = {f"module.{n}": t for n, t in u.items()}
    for kind in (DoubleBackward, ForwardOverReverse):
        a = kind().bind(plain, as_micro_batches(x), Tally()).vjp(u)
        b = kind().bind(wrapped, as_micro_batches(x), Tally()).vjp(v)
        for one, two in zip(a, b, strict=True):
            named = {n.removeprefix("module."): t for n, t in two.items()}
            assert error(named, one) < tol(F64)


def test_a_compiled_module() -> None:
    model = Tied()
    x = torch.randn(3, 2)
    compiled: Any = torch.compile(model, backend="eager")
    problem = BilevelProblem.from_module(compiled, square, outer="*scale")
    plain = BilevelProblem.from_module(model, square, outer="scale")
    g = gradients(problem, "inner", as_micro_batches(x), Tally(), keep=True)
    true = gradients(plain, "inner", as_micro_batches(x), Tally())
    named = {n.removeprefix("_orig_mod."): t for n, t in (g.inner or {}).items()}
    assert error(named, true.inner or {}) < tol(torch.float32)
    assert g.unused == frozenset()


class Positive(nn.Module):
    """Makes a weight positive."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_a_parametrised_weight() -> None:
    # The parameter is what the weight is computed from.
    model = nn.Linear(3, 2).double()
    nn.utils.parametrize.register_parametrization(model, "weight", Positive())
    problem = BilevelProblem.from_module(model, square, outer="*original")
    assert list(problem.outer_params) == ["parametrizations.weight.original"]
    x = torch.randn(4, 3, dtype=F64)
    u = {n: torch.ones_like(t) for n, t in problem.inner_params.items()}
    a = DoubleBackward().bind(problem, as_micro_batches(x), Tally()).vjp(u)
    b = ForwardOverReverse().bind(problem, as_micro_batches(x), Tally()).vjp(u)
    for one, two in zip(a, b, strict=True):
        assert error(two, one) < tol(F64, cond=10)


# -- activation checkpointing on the functional path ------------------------------------


class Checkpointed(nn.Module):
    """One layer under activation checkpointing, in plain torch."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.gate = nn.Parameter(torch.ones(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.gate
        out: Any = checkpoint(
            lambda z: torch.tanh(self.first(z) * self.gate),
            h,
            use_reentrant=self.reentrant,
        )
        return out


class Marked(nn.Module):
    """A model with transformers' mark of gradient checkpointing on a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        self.gate = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gate


def test_checkpointing_on_the_functional_path_would_lie() -> None:
    # The reason for the refusal: functional_call alone gives another derivative.
    model = Checkpointed().double()
    x = torch.randn(3, 2, dtype=F64)
    other = {n: 2 * t.detach() for n, t in model.named_parameters()}
    leaves = {n: t.clone().requires_grad_() for n, t in other.items()}
    out: Any = torch.func.functional_call(model, leaves, (x,))
    lie = torch.autograd.grad(out.square().mean(), list(leaves.values()))
    model.load_state_dict(other)
    square(model, x).backward()
    true = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert error(dict(zip(leaves, lie, strict=True)), true) > 0.1


@pytest.mark.parametrize(
    "model", [Checkpointed(), Checkpointed(reentrant=True), Marked()], ids=str
)
def test_checkpointing_on_the_functional_path_is_refused(model: nn.Module) -> None:
    problem = BilevelProblem.from_module(model, square, outer="gate")
    x = torch.randn(3, 2)
    foreign = {n: 2 * t.detach() for n, t in problem.inner_params.items()}
    leaves = {n: t.clone().requires_grad_() for n, t in foreign.items()}
    for given in (foreign, leaves):
        with pytest.raises(HypergradError, match="checkpointing"):
            problem.inner_loss(given, problem.outer_params, x)
    u = {n: torch.ones_like(t) for n, t in problem.inner_params.items()}
    with pytest.raises(
        (HypergradError, RuntimeError), match=r"checkpointing|setup_context"
    ):
        ForwardOverReverse().bind(problem, as_micro_batches(x), Tally()).hvp(u)
    # Nothing stays behind.
    assert all(not m._forward_pre_hooks for m in model.modules())
    with torch.autograd.graph.save_on_cpu():
        model.eval()(x)
    if not getattr(model, "reentrant", False):
        problem.inner_loss(problem.inner_params, problem.outer_params, x)


def test_a_marked_model_in_eval_mode_does_not_checkpoint() -> None:
    model = Marked().eval()
    problem = BilevelProblem.from_module(model, square, outer="gate")
    model.layer.eval()
    x = torch.ones(1, 2)
    zero = tree.zeros_like(problem.inner_params)
    assert problem.inner_loss(zero, problem.outer_params, x).item() == 0.0


def test_refuse_recompute_lets_other_errors_through() -> None:
    def fail(error: Exception) -> None:
        with refuse_recompute():
            raise error

    with pytest.raises(RuntimeError, match=r"^other$"):
        fail(RuntimeError("other"))
    with pytest.raises(HypergradError, match=r"^ours$"):
        fail(HypergradError("ours"))
    with pytest.raises(KeyError):
        fail(KeyError("key"))


def test_refuse_recompute_names_the_remedies() -> None:
    def run() -> None:
        with refuse_recompute():
            checkpoint(
                torch.tanh, torch.ones(2, requires_grad=True), use_reentrant=False
            )

    with pytest.raises(HypergradError) as caught:
        run()
    for part in ("gradient_checkpointing_disable()", "product='exact'", "#122729"):
        assert part in str(caught.value)


def test_a_loss_that_raises_on_the_functional_path_leaves_the_module() -> None:
    model = Tied()

    def broken(model: Any, x: Tensor) -> Tensor:
        model(x)
        raise KeyError("on purpose")

    problem = BilevelProblem.from_module(model, broken, outer="scale")
    own = dict(model.named_parameters())
    with pytest.raises(KeyError, match="on purpose"):
        problem.inner_loss(
            tree.clone(problem.inner_params), problem.outer_params, torch.ones(1, 2)
        )
    assert all(own[n] is p for n, p in model.named_parameters())
    assert model.a.weight is model.b.weight
    assert "_hypergrad_functional" not in vars(model)
