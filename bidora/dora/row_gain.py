r"""The gains of a DoRA layer, $g_i = m_i / \|v_i\|$ with $v_i = w_i + s\,b_i A$.

Written out in operations of autograd, a second derivative of the gains takes some eighty
of them for each layer, on matrices that are small. Here it is one closed form. With
$q_i = \|v_i\|^2$, $u_i = A v_i$ and a direction $(\dot A, \dot B, \dot m)$,

$$\dot q_i = 2 s\,e_i, \qquad e_i = \dot b_i \cdot u_i + b_i \cdot \dot A v_i, \qquad
  \dot g_i = \dot m_i\,q_i^{-1/2} - s\,m_i\,q_i^{-3/2}\,e_i ,$$

and the first and second derivatives are the gradients of $\sum \bar g_i g_i$ and of
$\sum \bar g_i \dot g_i$. Matrices of a row for each output are kept transposed, `(r, out)`,
so that `(out,)` vectors multiply them as they are; `u` and what is like it are kept
times −s.

Where $v_i$ is zero, which takes a zero row of $W$ and a zero row of $B A$, the quotient is
0/0 and the gain is the constant 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bidora.dora import norms as _norms
from bidora.dora.function import Function, is_last
from bidora.dora.norms import BaseNorms, BaseWeight

__all__ = [
    "row_gains",
]


def row_gains(
    weight: BaseWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    base: BaseNorms,
    rows: Tensor | None = None,
) -> Tensor:
    """Return m / ‖w_i + s·b_i A‖ of every row, `(out,)`, differentiable.

    Args:
        weight: The frozen weight, `(out, in)`.
        lora_a: `A`, `(r, in)`.
        lora_b: `B`, `(out, r)`.
        magnitude: m, `(out,)`.
        scaling: s.
        base: `base_norms(weight, dtype)` in the dtype to compute in.
        rows: As in `squared_norms`.

    Returns:
        Gains, `(out,)`, in the dtype of `base`.
    """
    dtype = base.squared.dtype
    a, b, m = (t.to(dtype) for t in (lora_a, lora_b, magnitude))
    if rows is None and weight.key() is not None:
        on_cpu = base.squared.device.type == "cpu"
        # Where rows that cancel are looked for, none of the others is below the floor.
        floor = None if on_cpu else base.floor
        tensors = a, b, m, weight.stored, base.squared, floor, base.zero
        gain, _, squared, *_ = cast(
            tuple[Tensor, ...], _RowGain.apply(*tensors, weight, scaling)
        )
        if not on_cpu or _norms.cancels(squared, base.guard) is False:
            return gain
    squared = _norms.squared_norms(weight, a, b, scaling, base, rows)
    return _norms.gains(m, squared, base)


class _Factors(NamedTuple):
    """What every derivative at a point is made of.

    Attributes:
        inverse: 1 / ‖v_i‖, `(out,)`; zero where v_i is, which makes every derivative zero.
        squared: ‖v_i‖², `(out,)`; 1 where v_i is zero.
        scaled: −s A Vᵀ, `(r, out)`.
        gram: A Aᵀ, `(r, r)`.
    """

    inverse: Tensor
    squared: Tensor
    scaled: Tensor
    gram: Tensor


class _Pulled(NamedTuple):
    """What the first derivative for a gradient ḡ leaves to the second.

    Attributes:
        cubed: q^(−3/2), zero where q is at its floor, `(out,)`.
        slope: m q^(−3/2), `(out,)`.
        pulled: ḡ m q^(−3/2), `(out,)`.
        inner: Bᵀ diag(pulled) B, `(r, r)`.
    """

    cubed: Tensor
    slope: Tensor
    pulled: Tensor
    inner: Tensor


class _Pushed(NamedTuple):
    """What a direction leaves to the second derivative.

    Attributes:
        change: −s e, `(out,)`.
        moved: −s Ȧ Vᵀ, `(r, out)`.
        cross: Ȧ Aᵀ, `(r, r)`.
        b_dot: Ḃᵀ, `(r, out)`.
    """

    change: Tensor
    moved: Tensor
    cross: Tensor
    b_dot: Tensor


class _Point(NamedTuple):
    """Where a derivative is taken: the inputs of `_RowGain`."""

    a: Tensor
    b: Tensor
    m: Tensor
    base: Tensor
    floor: Tensor | None
    zero: Tensor | None
    weight: BaseWeight
    scaling: float

    def factors(self) -> _Factors:
        """Return the squared norms and what they are made of."""
        squared, scaled, gram = _norms.expansion(
            self.weight, self.a, self.b, self.scaling, self.base
        )
        if self.floor is not None:
            squared = squared.clamp(min=self.floor)
        if self.zero is None:
            return _Factors(squared.rsqrt(), squared, scaled, gram)
        gone = self.zero & (squared.detach() <= torch.finfo(squared.dtype).tiny)
        # Replaced before the root, whose derivative at 0 a third derivative would meet.
        squared = torch.where(gone, 1.0, squared)
        inverse = torch.where(gone, 0.0, squared.rsqrt())
        return _Factors(inverse, squared, scaled, gram)

    def gains(self, factors: _Factors) -> Tensor:
        """Return m / ‖v_i‖, and 1 where v_i is zero."""
        gain = self.m * factors.inverse
        if self.zero is None:
            return gain
        return torch.where(self.zero & (factors.inverse == 0), 1.0, gain)

    def pull(
        self, grad: Tensor, factors: _Factors
    ) -> tuple[tuple[Tensor, Tensor, Tensor], _Pulled]:
        """Return the gradients of Σ ḡ g in A, B and m, and what they leave."""
        s = self.scaling
        cubed = factors.inverse / factors.squared
        if self.floor is not None:
            cubed = torch.where(factors.squared > self.floor, cubed, 0.0)
        slope = self.m * cubed
        p = grad * slope
        rows = p * self.b.t()
        inner = rows @ self.b
        in_a = _norms.times_rows(rows, self.weight, adjoint=True)
        in_a = torch.addmm(in_a, inner, self.a, beta=-s, alpha=-s * s)
        in_b = (p * factors.scaled).t()
        return (in_a, in_b, grad * factors.inverse), _Pulled(cubed, slope, p, inner)

    def push(
        self,
        factors: _Factors,
        slope: Tensor,
        a_dot: Tensor,
        b_dot: Tensor,
        m_dot: Tensor | None,
    ) -> tuple[Tensor, _Pushed]:
        """Return ġ in a direction, and what a second derivative takes of it."""
        s, bt, bt_dot = self.scaling, self.b.t(), b_dot.t()
        cross = a_dot @ self.a.t()
        moved = torch.addmm(
            _norms.times_rows(a_dot, self.weight), cross, bt, beta=-s, alpha=-s * s
        )
        change = torch.addcmul(bt_dot * factors.scaled, bt, moved).sum(0)
        gain = slope * change
        if m_dot is not None:
            gain = torch.addcmul(gain, m_dot, factors.inverse)
        return gain, _Pushed(change, moved, cross, bt_dot)

    def curve(
        self,
        grad: Tensor,
        factors: _Factors,
        pulled: _Pulled,
        pushed: _Pushed,
        a_dot: Tensor,
        m_dot: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of Σ ḡ ġ in A, B and m, for the direction pushed."""
        s, bt, p = self.scaling, self.b.t(), pulled.pulled
        # A third of what the squared norm's own derivative is multiplied by.
        third = p * pushed.change / factors.squared
        if m_dot is not None:
            third = torch.addcmul(third, grad * m_dot, pulled.cubed, value=1 / 3)
        across = p * pushed.b_dot
        rows = torch.addcmul(across, third, bt, value=3)
        inner = torch.addmm(rows @ self.b, bt, across.t())
        in_a = _norms.times_rows(rows, self.weight, adjoint=True)
        in_a = torch.addmm(in_a, inner, self.a, beta=-s, alpha=-s * s)
        in_a = torch.addmm(in_a, pulled.inner, a_dot, alpha=-s * s)
        moved = torch.addmm(pushed.moved, factors.gram, pushed.b_dot, alpha=-s * s)
        moved = torch.addmm(moved, pushed.cross.t(), bt, alpha=-s * s)
        in_b = torch.addcmul(p * moved, third, factors.scaled, value=3).t()
        return in_a, in_b, grad * pushed.change * pulled.cubed


class _RowGain(Function):
    """`row_gains` without the rows that cancel; returns the gains and `_Factors`.

    The factors are there to be saved, and nothing is computed from them outside.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor,
        m: Tensor,
        stored: Tensor,
        base: Tensor,
        floor: Tensor | None,
        zero: Tensor | None,
        weight: BaseWeight,
        scaling: float,
    ) -> tuple[Tensor, ...]:
        with _norms.autocast_off(a.device):
            point = _Point(a, b, m, base, floor, zero, weight, scaling)
            factors = point.factors()
            return point.gains(factors), *factors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.weight, ctx.scaling = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad, *_), rest = grads, (None,) * 6
        if grad is None:
            return (None, None, None, *rest)
        last = is_last()
        if last and not any(ctx.needs_input_grad[:2]):
            return (None, None, grad * ctx.saved_tensors[7], *rest)
        derivative: Any = _RowGainBackward.forward if last else _RowGainBackward.apply
        found = derivative(grad, *ctx.saved_tensors, ctx.weight, ctx.scaling)
        return (*found[:3], *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        a, b, m, _, base, floor, zero, *kept = ctx.saved_tensors
        point = _Point(a, b, m, base, floor, zero, ctx.weight, ctx.scaling)
        with _norms.autocast_off(a.device):
            factors = _Factors(*kept)
            a_dot, b_dot = _zeros_for_none(point, *tangents[:2])
            slope = m * factors.inverse / factors.squared
            if floor is not None:
                slope = torch.where(factors.squared > floor, slope, 0.0)
            gain, _ = point.push(factors, slope, a_dot, b_dot, tangents[2])
        return gain, None, None, None, None


class _RowGainBackward(Function):
    """The derivative of `_RowGain`; returns the gradients and `_Pulled`.

    The `_Factors` among its inputs are functions of the others, and its derivatives count
    them as such.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        a: Tensor,
        b: Tensor,
        m: Tensor,
        stored: Tensor,
        base: Tensor,
        floor: Tensor | None,
        zero: Tensor | None,
        inverse: Tensor,
        squared: Tensor,
        scaled: Tensor,
        gram: Tensor,
        weight: BaseWeight,
        scaling: float,
    ) -> tuple[Tensor, ...]:
        factors = _Factors(inverse, squared, scaled, gram)
        with _norms.autocast_off(a.device):
            point = _Point(a, b, m, base, floor, zero, weight, scaling)
            gradients, pulled = point.pull(grad, factors)
            return *gradients, *pulled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.weight, ctx.scaling = inputs
        ctx.save_for_backward(*tensors, *output[3:])
        ctx.save_for_forward(*tensors, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a_dot, b_dot, m_dot, *_ = grads
        grad, point, factors, pulled = _kept(ctx)
        with _norms.autocast_off(grad.device):
            if torch.is_grad_enabled():  # a third derivative: nothing is a constant
                factors = point.factors()
                _, pulled = point.pull(grad, factors)
            a_dot, b_dot = _zeros_for_none(point, a_dot, b_dot)
            change, pushed = point.push(factors, pulled.slope, a_dot, b_dot, m_dot)
            rest: tuple[Tensor | None, ...] = (None, None, None)
            if any(ctx.needs_input_grad[1:4]):
                rest = point.curve(grad, factors, pulled, pushed, a_dot, m_dot)
        return (change, *rest, *(None,) * 10)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        grad_dot, a_dot, b_dot, m_dot, *_ = tangents
        grad, point, factors, pulled = _kept(ctx)
        with _norms.autocast_off(grad.device):
            a_dot, b_dot = _zeros_for_none(point, a_dot, b_dot)
            _, pushed = point.push(factors, pulled.slope, a_dot, b_dot, m_dot)
            moved = point.curve(grad, factors, pulled, pushed, a_dot, m_dot)
            if grad_dot is not None:
                own, _ = point.pull(grad_dot, factors)
                moved = tuple(x + y for x, y in zip(moved, own, strict=True))
        return *moved, None, None, None, None


def _kept(ctx: Any) -> tuple[Tensor, _Point, _Factors, _Pulled]:
    """Return what `_RowGainBackward` saved."""
    grad, a, b, m, _, base, floor, zero, *rest = ctx.saved_tensors
    point = _Point(a, b, m, base, floor, zero, ctx.weight, ctx.scaling)
    return grad, point, _Factors(*rest[:4]), _Pulled(*rest[4:])


def _zeros_for_none(
    point: _Point, a_dot: Tensor | None, b_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a direction in A and B; what has none gets zeros."""
    return (
        torch.zeros_like(point.a) if a_dot is None else a_dot,
        torch.zeros_like(point.b) if b_dot is None else b_dot,
    )
