"""Attention backends, and the errors of what has no second derivative."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import HypergradError, SecondOrderError
from hypergrad.attention import _MARKS, attention, explain_second_order

Flags = tuple[bool, bool, bool]


def flags() -> Flags:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def nodes(out: Tensor) -> set[str]:
    names: set[str] = set()
    pending: list[Any] = [out.grad_fn]
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [parent for parent, _ in node.next_functions if parent]
    return names


def attend() -> Tensor:
    q = torch.ones(1, 1, 4, 8, requires_grad=True)
    return nn.functional.scaled_dot_product_attention(q, q, q)


def test_math_is_plain_and_default_is_torchs_choice() -> None:
    before = flags()
    assert any("Flash" in name for name in nodes(attend()))
    with attention("default"):
        assert flags() == before
        assert any("Flash" in name for name in nodes(attend()))
    with attention("math"):
        within = flags()
        with attention("math"):  # which there is nothing left to do for
            assert not any("Flash" in name for name in nodes(attend()))
        assert flags() == within
    assert flags() == before


def test_the_backend_comes_back_after_an_exception() -> None:
    before = flags()

    def fail() -> None:
        with attention("math"), attention("default"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert flags() == before


# -- what torch really says -------------------------------------------------------------


class Forwards(torch.autograd.Function):
    """A square in the new style, without jvp."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad


class Old(torch.autograd.Function):
    """A square in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad


class Into(torch.autograd.Function):
    """A square whose backward writes into a buffer, as TRL's loss does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 2 * torch.mul(x, grad, out=torch.empty_like(x))


def flash(x: Tensor) -> Tensor:
    q = x.reshape(1, 1, 2, 2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]


def twice(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(4, requires_grad=True)
    (g,) = torch.autograd.grad(fn(x).sin().sum(), x, create_graph=True)
    g.sin().sum().backward()


def forwards(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(4)
    torch.func.jvp(torch.func.grad(lambda x: fn(x).sin().sum()), (x,), (x,))


def compiled(x: Tensor) -> Tensor:
    return torch.compile(lambda x: x.sin() * x, backend="aot_eager")(x)


def compiled_and_used(x: Tensor) -> Tensor:
    cube = torch.compile(lambda x: x @ x @ x, backend="aot_eager")
    cube(x.reshape(2, 2)).sum().backward()
    return cube(x.reshape(2, 2))


# One provocation for each mark: a mark that torch no longer says has none.
SAYS: dict[str, tuple[Callable[[Any], None], Callable[[Tensor], Tensor]]] = {
    "is not implemented": (twice, flash),
    "not currently support double backward": (twice, compiled),
    "don't support automatic differentiation": (twice, Into.apply),
    "non-empty donated buffers": (twice, compiled_and_used),
    "trying to differentiate twice": (twice, Old.apply),
    "trying to use forward ad": (forwards, flash),
    "forward mode ad": (forwards, Forwards.apply),
    "setup_context": (forwards, Old.apply),
}


def test_every_mark_has_a_provocation() -> None:
    assert set(SAYS) == set(_MARKS)


@pytest.mark.parametrize("mark", SAYS)
def test_torchs_words_are_turned_into_advice(mark: str) -> None:
    how, fn = SAYS[mark]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError) as raw:
            how(fn)
        assert mark in str(raw.value).lower()
        with pytest.raises(SecondOrderError) as caught, explain_second_order("First. "):
            how(fn)
    text = str(caught.value)
    assert str(raw.value).splitlines()[0][:40] in text
    assert "First. A fused kernel" in text
    assert 'attn_implementation="eager"' in text
    for name in ("'first-order'", "'darts'", "'sama'", "'cg'", "'neumann'"):
        assert name in text
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_pass() -> None:
    own = SecondOrderError("is not implemented, says ours")
    for error in (
        RuntimeError("shape mismatch"),
        KeyError("x"),
        HypergradError("y"),
        own,
    ):
        with pytest.raises(type(error)) as caught, explain_second_order():
            raise error
        assert caught.value is error


def test_nothing_where_nothing_is_wrong() -> None:
    with explain_second_order():
        twice(torch.tanh)
