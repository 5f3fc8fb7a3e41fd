"""`BilevelProblem`: what it takes, what it refuses, and how it comes back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypergrad import BilevelProblem, HypergradError, rng, tree
from hypergrad._module_state import LARGEST_COPIED_BUFFER
from hypergrad.batches import as_micro_batches
from hypergrad.products import Tally, gradients
from hypergrad.tree import Params
from tests.tolerances import error

F64 = torch.float64


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype).requires_grad_()


def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
    return (inner["w"] * outer["l"]).sum()


def make(
    inner: Any = None, outer: Any = None, fn: Any = loss, **rest: Any
) -> BilevelProblem:
    return BilevelProblem(
        fn,
        fn,
        {"w": leaf(3)} if inner is None else inner,
        {"l": leaf()} if outer is None else outer,
        **rest,
    )


# -- what is refused --------------------------------------------------------------------


def frozen() -> Tensor:
    return torch.ones(2)


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, requires_grad=True)


def windows() -> Tensor:
    return torch.ones(5).as_strided((3, 3), (1, 1)).requires_grad_()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "frozen": (frozen, r"frozen \(requires_grad is False\).*\.requires_grad_\(\)"),
    "integer": (lambda: torch.ones(2, dtype=torch.int64), "dtype torch.int64"),
    "boolean": (lambda: torch.ones(2, dtype=torch.bool), "dtype torch.bool"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "dtype torch.complex64"),
    "computed": (lambda: leaf(2) * 2, r"not a leaf: it was computed by .*MulBackward"),
    "meta": (lambda: torch.ones(2, device="meta", requires_grad=True), "meta device"),
    "expanded": (lambda: torch.ones(1).expand(3).requires_grad_(), "expanded.*clone"),
    "windows": (windows, r"expanded.*strides \(1, 1\)"),
    "inference": (inference, "inference_mode.*clone"),
}


@pytest.mark.parametrize("level", ["inner_params", "outer_params"])
@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_cannot_be_parameters(level: str, kind: str) -> None:
    build, text = REFUSED[kind]
    params = {level.removesuffix("_params"): {"bad": build()}}
    with pytest.raises(ValueError, match=rf"^{level}\['bad'\] .*{text}"):
        make(**params)


def test_strided_tensors_that_do_not_overlap_are_taken() -> None:
    base = torch.ones(4, 6)
    good = {
        "transposed": base.T.detach().requires_grad_(),
        "columns": torch.ones(4, 6)[:, ::2].detach().requires_grad_(),
        "one row": torch.ones(6).expand(1, 6).detach().requires_grad_(),
        "woven": torch.ones(9).as_strided((2, 2), (3, 2)).detach().requires_grad_(),
        "empty": torch.ones(0, 3).requires_grad_(),
        "empty too": torch.ones(1).expand(0).detach().requires_grad_(),
    }
    assert set(make(inner=good).inner_params) == set(good)


@pytest.mark.parametrize("level", ["inner_params", "outer_params"])
@pytest.mark.parametrize("value", [1.0, [1.0], None, nn.Linear(1, 1)])
def test_values_that_are_not_tensors(level: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{level}\['bad'\] must be a tensor, got"):
        make(**{level.removesuffix("_params"): {"bad": value}})


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("value", [[leaf(2)], (leaf(2),), leaf(2), iter([])])
def test_sets_that_are_not_dictionaries(level: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{level}_params must be a dictionary .* got"):
        make(**{level: value})


def test_an_empty_outer_set() -> None:
    with pytest.raises(ValueError, match=r"outer_params is empty.*at least one"):
        make(outer={})


def test_an_empty_inner_set_is_fine() -> None:
    assert make(inner={}).inner_params == {}


@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
def test_a_loss_that_is_not_callable(which: str) -> None:
    losses: Any = {"inner_loss": loss, "outer_loss": loss, which: torch.ones(())}
    with pytest.raises(TypeError, match=f"{which} must be callable, got Tensor"):
        BilevelProblem(
            **losses, inner_params={"w": leaf(1)}, outer_params={"l": leaf()}
        )


def test_outputs_and_criterion_go_together() -> None:
    with pytest.raises(ValueError, match="go together"):
        make(inner_outputs=loss)
    problem = make(inner_outputs=loss, inner_criterion=lambda o, b: o.sum())
    assert problem.inner_outputs is loss


def test_one_tensor_in_both_sets() -> None:
    shared = leaf(2)
    with pytest.raises(ValueError, match=r"inner \('a'\) and outer \('b'\)"):
        make({"a": shared}, {"b": shared})
    nothing = leaf(0)
    with pytest.raises(ValueError, match=r"inner \('a'\) and outer \('b'\)"):
        make({"a": nothing}, {"b": nothing})


def test_one_name_in_both_sets() -> None:
    with pytest.raises(ValueError, match="name 'x' is in inner_params and in outer"):
        make({"x": leaf(2)}, {"x": leaf(2)})
    one = leaf(2)
    with pytest.raises(ValueError, match="name 'x'"):  # also where it is an alias
        make({"w": one, "x": one}, {"x": leaf(2)})


@pytest.mark.parametrize("same_level", [True, False])
def test_different_tensors_that_share_memory(same_level: bool) -> None:
    base = torch.ones(6)
    a = base[:4].detach().requires_grad_()
    b = base[3:].detach().requires_grad_()
    with pytest.raises(ValueError, match=r"'a'.*'b'|'b'.*'a'"):
        make(
            {"a": a, "b": b} if same_level else {"a": a},
            None if same_level else {"b": b},
        )


def test_views_that_share_nothing_are_taken() -> None:
    base = torch.ones(2, 6)
    even = base[:, ::2].detach().requires_grad_()
    odd = base[:, 1::2].detach().requires_grad_()
    halves = base.new_ones(6)
    left, right = (halves[i : i + 3].detach().requires_grad_() for i in (0, 3))
    make({"even": even, "left": left}, {"odd": odd, "right": right})


# -- aliases ----------------------------------------------------------------------------


def test_aliases_are_kept_once_and_found_under_both_names() -> None:
    shared, other = leaf(2), leaf(2)
    names: list[set[str]] = []

    def both(inner: Params, outer: Params, batch: Any) -> Tensor:
        names.append(set(inner) | set(outer))
        return (inner["a"] * inner["b"] * outer["l"] * outer["m"]).sum()

    problem = make({"a": shared, "b": shared}, {"l": other, "m": other}, both)
    assert problem.aliases == {"b": "a", "m": "l"}
    assert list(problem.inner_params) == ["a"]
    assert problem.inner_params["a"] is shared
    assert [id(t) for t in problem.tensors] == [id(shared), id(other)]
    g = gradients(problem, "inner", as_micro_batches(None), Tally())
    assert names == [{"a", "b", "l", "m"}]
    assert (g.inner or {})["a"].tolist() == [2.0, 2.0]  # d(a²)/da
    # Foreign tensors are found under both names too, and the given dict stays as it is.
    given = {"a": torch.full((2,), 3.0)}
    assert problem.inner_loss(given, problem.outer_params, None).item() == 18.0
    assert set(given) == {"a"}


# -- losses -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_loss_that_is_not_a_scalar(level: Any) -> None:
    problem = make(fn=lambda i, o, b: i["w"] * o["l"])
    with pytest.raises(
        ValueError, match=rf"{level}_loss returned .* shape \(3,\).*mean"
    ):
        problem.loss(level, problem.inner_params, problem.outer_params, None)


@pytest.mark.parametrize(
    "value", [1.0, None, (torch.ones(()),), {"loss": torch.ones(())}]
)
def test_a_loss_that_is_not_a_tensor(value: Any) -> None:
    problem = make(fn=lambda i, o, b: value)
    name = type(value).__name__
    with pytest.raises(TypeError, match=f"inner_loss returned {name}, not a tensor"):
        problem.inner_loss(problem.inner_params, problem.outer_params, None)


# -- from_module ------------------------------------------------------------------------


class Net(nn.Module):
    """Tied weights, a norm, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 3, bias=False)
        self.norm = nn.LayerNorm(3)
        self.leave = nn.Linear(3, 3)
        self.leave.weight = self.enter.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.frozen(self.norm(torch.tanh(self.enter(x)))))


def square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


NORM = {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("outer", "names"),
    [
        ("norm.weight", {"norm.weight"}),
        ("norm.*", NORM),
        ("*.bias", {"norm.bias", "leave.bias"}),
        (["norm.weight", "*.bias"], {*NORM, "leave.bias"}),
        ({"norm.weight"}, {"norm.weight"}),
        (dict.fromkeys(NORM).keys(), NORM),
        (nn.LayerNorm, NORM),
        (nn.Linear, {"enter.weight", "leave.bias"}),
        (lambda name, p: p.dim() == 1, {*NORM, "leave.bias"}),
        ("leave.weight", {"enter.weight"}),  # tied: under its first name
        (nn.Module, {*NORM, "enter.weight", "leave.bias"}),
    ],
)
def test_outer_parameters_are_chosen(outer: Any, names: set[str]) -> None:
    model = Net()
    problem = BilevelProblem.from_module(model, square, outer=outer)
    assert set(problem.outer_params) == names
    every = {*NORM, "enter.weight", "leave.bias"}
    assert set(problem.inner_params) == every - names
    assert problem.module is model
    own = dict(model.named_parameters())
    assert all(own[n] is t for n, t in problem.inner_params.items())


@pytest.mark.parametrize(
    ("outer", "text"),
    [
        ("nope", "outer='nope' matches none of the 5 trainable parameters"),
        ("frozen.*", r"outer='frozen\.\*' matches none.*requires_grad"),
        (["norm.*", "nope"], "outer='nope' matches none"),
        ([], r"outer=\[\] matches none"),
        (nn.Conv2d, "outer=Conv2d matches none"),
        (lambda name, p: False, "matches none of the 5"),
    ],
)
def test_outer_that_matches_nothing(outer: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BilevelProblem.from_module(Net(), square, outer=outer)


@pytest.mark.parametrize("outer", [None, 3, [3], Tensor, [nn.LayerNorm]])
def test_outer_of_no_supported_kind(outer: Any) -> None:
    with pytest.raises(TypeError, match="outer must be names, a module type or a pred"):
        BilevelProblem.from_module(Net(), square, outer=outer)


def test_names_with_brackets_are_names() -> None:
    model = nn.Module()
    model.register_parameter("a[0]", nn.Parameter(torch.ones(1)))
    model.register_parameter("a0", nn.Parameter(torch.ones(1)))
    problem = BilevelProblem.from_module(model, square, outer="a[0]")
    # As a name, and as the pattern that it is too.
    assert set(problem.outer_params) == {"a[0]", "a0"}


def test_what_from_module_takes() -> None:
    model: Any = "not a module"
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        BilevelProblem.from_module(model, square, outer="*")
    fn: Any = None
    with pytest.raises(TypeError, match="loss_fn must be callable, got NoneType"):
        BilevelProblem.from_module(Net(), fn, outer="norm.*")
    fn = 3
    with pytest.raises(TypeError, match="outer_loss_fn must be callable, got int"):
        BilevelProblem.from_module(Net(), square, outer="norm.*", outer_loss_fn=fn)


def test_two_losses_of_a_module() -> None:
    problem = BilevelProblem.from_module(
        Net(), square, outer="norm.*", outer_loss_fn=lambda m, x: -square(m, x)
    )
    x = torch.ones(2, 3)
    args = problem.inner_params, problem.outer_params, x
    assert problem.outer_loss(*args).item() == -problem.inner_loss(*args).item() != 0


def test_tied_weights_of_a_module_are_one_parameter() -> None:
    problem = BilevelProblem.from_module(Net(), square, outer="norm.*")
    assert problem.aliases == {"leave.weight": "enter.weight"}
    assert set(problem.inner_params) == {"enter.weight", "leave.bias"}


# -- moving and restoring ---------------------------------------------------------------


def bits(tensor: Tensor) -> list[Any]:
    return tensor.detach().contiguous().view(torch.int32).tolist()


def odd_floats() -> Tensor:
    """NaNs with payloads, signed zeros, subnormals, infinities."""
    patterns = [0x7FC00001, -0x00300007, -0x80000000, 1, 0x7F800000, 0x3F800000]
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32)


def test_comes_back_bit_for_bit() -> None:
    w = odd_floats().requires_grad_()
    strided = torch.stack([odd_floats(), torch.ones(6)], 1)[:, 0].requires_grad_()
    assert not strided.is_contiguous()
    lam = leaf()
    problem = make({"w": w, "s": strided}, {"l": lam})
    before = [bits(t) for t in problem.tensors]
    with problem.at(
        {"w": torch.ones(6), "s": torch.zeros(6)}, {"l": torch.tensor(2.0)}
    ):
        assert w.tolist() == [1.0] * 6
        assert strided.tolist() == [0.0] * 6
        assert lam.item() == 2.0
        assert w.requires_grad
        assert w.is_leaf
    assert [bits(t) for t in problem.tensors] == before
    assert problem.inner_params["w"] is w


def test_comes_back_after_an_exception() -> None:
    problem = make()

    def fail() -> None:
        with problem.at({"w": torch.zeros(3)}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert problem.inner_params["w"].tolist() == [1.0] * 3


def test_nests() -> None:
    problem = make()
    w = problem.inner_params["w"]
    with problem.at({"w": torch.full((3,), 2.0)}):
        with problem.at({"w": torch.full((3,), 3.0)}):
            assert w[0].item() == 3.0
        assert w[0].item() == 2.0
    assert w[0].item() == 1.0


def test_moves_some_or_none() -> None:
    problem = make({"w": leaf(3), "x": leaf(2)})
    with problem.at(outer_params={"l": torch.tensor(5.0)}):
        assert problem.outer_params["l"].item() == 5.0
    with problem.at({"x": torch.zeros(2)}):
        assert problem.inner_params["w"].tolist() == [1.0] * 3
    with problem.at():
        pass


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        (
            {"w": torch.zeros(3), "x": torch.zeros(3)},
            ValueError,
            r"'x' .*\(3,\).*\(2,\)",
        ),
        ({"w": torch.zeros(3), "y": torch.zeros(2)}, ValueError, r"'y' .*\(w, x\)"),
        ({"w": torch.zeros(3), "x": 0.0}, TypeError, "'x' is a float"),
        ({"w": torch.zeros(3), "x": torch.zeros(2, device="meta")}, Exception, "meta"),
    ],
)
def test_what_does_not_fit_moves_nothing(values: Any, kind: Any, text: str) -> None:
    problem = make({"w": leaf(3), "x": leaf(2)})
    with pytest.raises(kind, match=text), problem.at(values):
        pass
    assert problem.inner_params["w"].tolist() == [1.0] * 3
    assert problem.inner_params["x"].tolist() == [1.0] * 2


def test_values_may_be_views_of_what_moves() -> None:
    problem = make({"w": leaf(2), "x": (2 * torch.ones(2)).requires_grad_()})
    w, x = problem.inner_params["w"], problem.inner_params["x"]
    with problem.at({"w": x, "x": w}):  # they change places
        assert (w.tolist(), x.tolist()) == ([2.0, 2.0], [1.0, 1.0])
    square = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    problem = make({"w": square})
    with problem.at({"w": square.detach().T}):
        assert square.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert square.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode]
)
def test_autograd_sees_the_move(mode: Any) -> None:
    # A move through .data would leave a kept graph silently wrong.
    problem = make(fn=lambda i, o, b: (i["w"] ** 3 * o["l"]).sum())
    kept = problem.inner_loss(problem.inner_params, problem.outer_params, None)
    with mode(), problem.at({"w": torch.zeros(3)}):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    with problem.at({"w": torch.zeros(3)}):
        inside = problem.inner_loss(problem.inner_params, problem.outer_params, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_values_of_another_dtype_are_cast() -> None:
    problem = make()
    with problem.at({"w": torch.full((3,), 0.5, dtype=F64)}):
        assert problem.inner_params["w"].dtype == torch.float32
        assert problem.inner_params["w"][0].item() == 0.5


# -- foreign dictionaries of a module ---------------------------------------------------


class Small(nn.Module):
    """A batch-normalised layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.4)
        self.second = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.norm(self.first(x)))))


def small() -> tuple[BilevelProblem, Small, Tensor]:
    model = Small().double()
    problem = BilevelProblem.from_module(model, square, outer="norm.*")
    return problem, model, torch.randn(5, 3, dtype=F64)


def test_foreign_dictionaries_are_never_ignored() -> None:
    problem, model, x = small()
    state = torch.get_rng_state()
    w = {n: 2 * t.detach() for n, t in problem.inner_params.items()}
    lam = {n: t.detach() - 0.3 for n, t in problem.outer_params.items()}
    (gw, gl), value = torch.func.grad_and_value(problem.inner_loss, argnums=(0, 1))(
        w, lam, x
    )
    torch.set_rng_state(state)
    other = Small().double()
    torch.set_rng_state(state)
    other.load_state_dict({**model.state_dict(), **w, **lam})
    true = square(other, x)
    true.backward()
    grads = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert value.item() == true.item()
    assert error({**gw, **gl}, grads) < 1e-15
    assert all(
        t.any() for n, t in gw.items() if n != "first.bias"
    )  # BatchNorm kills it


def test_one_foreign_tensor_is_enough() -> None:
    problem, model, x = small()
    model.eval()
    zero = {**problem.inner_params, "second.weight": torch.zeros(1, 4, dtype=F64)}
    value = problem.inner_loss(zero, problem.outer_params, x)
    assert value.item() == pytest.approx(model.second.bias.item() ** 2)
    assert model.second.weight.any()


def test_own_tensors_run_the_module_as_it_is() -> None:
    problem, model, x = small()
    seen: list[nn.Module] = []
    model.register_forward_hook(lambda m, args, out: seen.append(m))
    before = model.norm.running_mean
    assert before is not None
    problem.inner_loss(problem.inner_params, problem.outer_params, x)
    assert seen == [model]
    assert model.norm.running_mean is before
    assert before.any()  # and it trains its buffers


def test_the_functional_path_leaves_buffers_alone() -> None:
    problem, model, x = small()
    before = {n: b.clone() for n, b in model.named_buffers()}
    problem.inner_loss(tree.clone(problem.inner_params), problem.outer_params, x)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())


def test_tied_weights_on_the_functional_path() -> None:
    model = Net()
    problem = BilevelProblem.from_module(model, square, outer="norm.*")
    x = torch.randn(2, 3)
    w = {**problem.inner_params, "enter.weight": torch.eye(3)}
    value = problem.inner_loss(w, problem.outer_params, x)
    with torch.no_grad():
        model.enter.weight.copy_(torch.eye(3))
    assert value.item() == square(model, x).item()


def test_unknown_names_are_refused() -> None:
    problem, _, x = small()
    with pytest.raises(ValueError, match=r"no parameter 'nope' \(first.weight, "):
        problem.inner_loss({"nope": leaf(1)}, problem.outer_params, x)


def test_a_parameter_replaced_since_is_served_functionally() -> None:
    problem, model, x = small()
    model.eval()
    true = square(model, x).item()
    model.second.weight = nn.Parameter(torch.zeros_like(model.second.weight))
    g = gradients(problem, "inner", as_micro_batches(x), Tally())
    assert g.loss == pytest.approx(true)  # the problem's own tensor, not the new one
    assert g.unused == frozenset()
    del model.second.weight
    with pytest.raises(HypergradError, match=r"no longer has .*second\.weight"):
        problem.inner_loss(tree.clone(problem.inner_params), problem.outer_params, x)


# -- swapped ----------------------------------------------------------------------------


def test_swapped_puts_clones_in_place() -> None:
    problem, model, x = small()
    model.eval()
    zeros = tree.zeros_like(problem.inner_params)
    own = problem.inner_params["first.weight"]
    with problem.swapped(zeros):
        assert model.first.weight is zeros["first.weight"]
        assert problem.inner_loss(zeros, problem.outer_params, x).item() == 0.0
    assert model.first.weight is own
    with problem.swapped({}):
        pass
    with (
        pytest.raises(ValueError, match="no parameter 'nope'"),
        problem.swapped({"nope": leaf(1)}),
    ):
        pass


def test_swapped_is_nothing_for_functions() -> None:
    with make().swapped({"w": torch.zeros(3)}):
        pass


# -- untouched --------------------------------------------------------------------------


class Stateful(nn.Module):
    """Buffers that are changed in place, assigned anew, made, removed, and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.gate = nn.Parameter(torch.ones(2))
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("removed", torch.zeros(2))
        self.register_buffer("none", None)
        self.register_buffer("table", torch.arange(2.0), persistent=False)
        self.length = 2
        self.other = nn.Module()
        self.other.register_buffer("shared", self.counted)

    counted: Tensor
    assigned: Tensor
    table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.counted += 1
        assert self.other.shared is self.counted
        self.assigned = self.assigned + 1
        if x.numel() > self.length:
            self.length = x.numel()
            self.register_buffer("table", torch.arange(float(self.length)))
        self.register_buffer("new", torch.ones(1))
        if "removed" in self._buffers:
            del self.removed
        self.none = torch.ones(1)
        self.train(not self.training)
        return (x * self.w * self.gate).sum() + self.table.sum() * 0 + torch.rand(())


def stateful() -> tuple[BilevelProblem, Stateful]:
    model = Stateful()
    fn: Any = lambda m, x: m(x).square()  # noqa: E731
    return BilevelProblem.from_module(model, fn, outer="gate"), model


def snapshot(model: Stateful) -> dict[str, Any]:
    buffers = {n: (id(b), b.tolist()) for n, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    return {"buffers": buffers, "modes": modes, "none": model.none, "n": model.length}


@pytest.mark.parametrize("fails", [False, True])
def test_untouched_restores_buffers_modes_and_random_state(fails: bool) -> None:
    problem, model = stateful()
    before, state = snapshot(model), torch.get_rng_state()

    def run() -> None:
        with problem.untouched():
            model(torch.ones(2))
            assert model.counted.item() == 1
            model(torch.ones(2))
            assert model.counted.item() == 2
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_untouched_takes_numbers_beside_an_assigned_buffer_back() -> None:
    class Table(nn.Module):
        """A table of positions that grows, as rotary embeddings keep one."""

        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.gate = nn.Parameter(torch.ones(1))
            self.register_buffer("table", torch.arange(2.0))
            self.length = 2

        def forward(self, n: int) -> Tensor:
            if n > self.length:
                self.table, self.length = torch.arange(float(n)), n
            return (self.table[:n] * self.w * self.gate).sum()

    model = Table()
    problem = BilevelProblem.from_module(model, lambda m, n: m(n), outer="gate")
    assert gradients(problem, "inner", as_micro_batches(4), Tally()).loss == 6.0
    assert (model.length, len(model.table)) == (2, 2)
    assert model(4).item() == 6.0


def test_untouched_starts_from_a_given_random_state() -> None:
    problem, _ = stateful()
    state = rng.capture()
    first = torch.rand(3)
    with problem.untouched(state):
        assert torch.equal(torch.rand(3), first)


def test_a_large_buffer_that_changes_is_an_error_and_one_that_does_not_is_shared() -> (
    None
):
    class Large(nn.Module):
        big: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.gate = nn.Parameter(torch.ones(1))
            packed = torch.zeros(LARGEST_COPIED_BUFFER + 1, dtype=torch.int8)
            self.register_buffer("big", packed)

        def forward(self, write: bool) -> Tensor:
            if write:
                self.big[0] += 1
            return (self.w * self.gate).sum() + self.big[0]

    model = Large()
    problem = BilevelProblem.from_module(model, lambda m, b: m(b), outer="gate")
    own = model.big
    with problem.untouched():
        assert model.big is own
        model(False)
    with pytest.raises(
        HypergradError, match=r"changed the buffers \['big'\].*eval mode"
    ):
        gradients(problem, "inner", as_micro_batches(True), Tally())

    def fail() -> None:
        with problem.untouched():
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        fail()


def test_buffers_made_in_inference_mode_are_no_obstacle() -> None:
    model = Small()
    with torch.inference_mode():
        model.register_buffer("made", torch.ones(1))
    problem = BilevelProblem.from_module(model, square, outer="norm.*")
    x = torch.randn(4, 3)
    with torch.inference_mode():
        g = gradients(problem, "inner", as_micro_batches(x), Tally())
    assert math.isfinite(g.loss)


def test_python_and_numpy_generators_come_back() -> None:
    def draws(i: Params, o: Params, b: Any) -> Tensor:
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return (i["w"] * o["l"]).sum() + noise

    problem = make(fn=draws)
    before = (
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
    )
    values = {
        gradients(problem, "inner", as_micro_batches(None), Tally()).loss
        for _ in range(3)
    }
    assert len(values) == 1
    after = (
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
    )
    assert before == after
