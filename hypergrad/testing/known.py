"""Problems whose hypergradient is known, made of any two losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import SolveError
from hypergrad.problem import BilevelProblem
from hypergrad.tree import Params

__all__ = ["DataLoss", "KnownProblem", "at_minimum", "cut", "leaf", "relative_error"]

DataLoss = Callable[[Params, Params, Sequence[Tensor]], Tensor]
"""`(inner_params, outer_params, data) -> scalar`, in whatever dtype it is given."""


@dataclass(frozen=True)
class KnownProblem:
    r"""A problem at a minimum of its inner loss, with the hypergradient there.

    All truth is float64, of the numbers that the problem holds: its data and λ as its
    dtype rounds them. Vectors and matrices run over the entries of the inner (n) and
    outer (p) parameters, in order.

    Attributes:
        problem: the problem; its w is w*(λ), and its losses take no batch.
        direct: ∂f/∂λ.
        indirect: the term through w*(λ).
        hessian: $H = ∂^2g/∂w^2$, `(n, n)`.
        mixed: $M = ∂^2g/∂λ∂w$, `(p, n)`.
        v: ∂f/∂w, `(n,)`.
        unit: rounding unit of what the losses compute in, where that is coarser than
            their parameters; else 0.
    """

    problem: BilevelProblem
    direct: Params
    indirect: Params
    hessian: Tensor
    mixed: Tensor
    v: Tensor
    unit: float = 0.0

    @property
    def outer_grads(self) -> Params:
        """df/dλ."""
        return tree.add(self.direct, self.indirect)

    @property
    def condition(self) -> float:
        """Largest eigenvalue of H over the smallest; 1 where there is no w."""
        spectrum = torch.linalg.eigvalsh(self.hessian)
        return float(spectrum[-1] / spectrum[0]) if len(spectrum) else 1.0

    def indirect_by(self, inverse: Tensor) -> Params:
        """Return the indirect term, `inverse` standing for the inverse of H.

        Args:
            inverse: `(n, n)`; α times the identity for one step of gradient descent at
                rate α.

        Returns:
            Same keys and shapes as the outer parameters, float64.

        Example:
            g = (w - λ)², f = w²/2, w = λ = 3: M = -2 and v = 3.

            >>> three = {"w": torch.tensor(3.0)}, {"lam": torch.tensor(3.0)}
            >>> known = at_minimum(
            ...     lambda inner, outer, data: (inner["w"] - outer["lam"]) ** 2,
            ...     lambda inner, outer, data: inner["w"] ** 2 / 2,
            ...     *three,
            ... )
            >>> known.indirect_by(torch.eye(1).double())["lam"].item()
            6.0
        """
        return cut(-self.mixed @ (inverse @ self.v), self.problem.outer_params)


def at_minimum(
    inner_loss: DataLoss,
    outer_loss: DataLoss,
    inner_params: Params,
    outer_params: Params,
    *,
    inner_data: Sequence[Tensor] = (),
    outer_data: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
) -> KnownProblem:
    r"""Minimise the inner loss and compute the hypergradient there, by dense algebra.

    Newton's method runs in float64 until rounding stops it. Then
    $\mathrm df/\mathrm d\lambda = \partial f/\partial\lambda - M H^{-1} v$, with all
    derivatives from `torch.func` and H as a matrix: nothing of this library's products
    and solvers is in it.

    Args:
        inner_loss: g, a pure function, which gets `inner_data` as it is rounded.
        outer_loss: f, likewise with `outer_data`.
        inner_params: where Newton's method starts.
        outer_params: λ.
        inner_data: tensors; those of floating point are rounded to `dtype`.
        outer_data: likewise.
        dtype: dtype of the problem.
        device: where its tensors are; the truth stays on the host.
        compute: what the problem's losses compute in, with parameters that stay in
            `dtype`; None for `dtype`. The truth knows nothing of it.

    Returns:
        The problem at w*(λ), and its truth.

    Raises:
        SolveError: Newton's method did not get to a minimum with a positive definite
            Hessian.

    Example:
        g = (w - λ)²/2, f = w²/2 at λ = 3: w* = λ, and df/dλ = λ.

        >>> known = at_minimum(
        ...     lambda inner, outer, data: (inner["w"] - outer["lam"]) ** 2 / 2,
        ...     lambda inner, outer, data: inner["w"] ** 2 / 2,
        ...     {"w": torch.tensor(0.0)},
        ...     {"lam": torch.tensor(3.0)},
        ... )
        >>> known.outer_grads["lam"].item(), known.problem.inner_params["w"].item()
        (3.0, 3.0)
    """

    def rounded(data: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(dtype) if t.is_floating_point() else t for t in data]

    def wide(data: Sequence[Tensor]) -> list[Tensor]:
        return [t.double() if t.is_floating_point() else t for t in data]

    here, held = rounded(inner_data), rounded(outer_data)
    wide_here, wide_held = wide(here), wide(held)
    outer = {n: t.detach().to(dtype) for n, t in outer_params.items()}
    lam = _joined({n: t.double() for n, t in outer.items()})

    def g(w: Tensor, lam: Tensor) -> Tensor:
        return inner_loss(cut(w, inner_params), cut(lam, outer_params), wide_here)

    def f(w: Tensor, lam: Tensor) -> Tensor:
        return outer_loss(cut(w, inner_params), cut(lam, outer_params), wide_held)

    start = _joined({n: t.detach().double() for n, t in inner_params.items()})
    w = _newton(lambda w: g(w, lam), start)
    hessian = torch.func.hessian(g)(w, lam)
    mixed = torch.func.jacrev(torch.func.grad(g), argnums=1)(w, lam).T
    v, direct = torch.func.grad(f, argnums=(0, 1))(w, lam)
    indirect = -mixed @ torch.linalg.solve(hessian, v)

    def computed(loss: DataLoss, data: Sequence[Tensor]) -> Callable[..., Tensor]:
        kind = compute or dtype
        placed = [
            t.to(device, kind) if t.is_floating_point() else t.to(device) for t in data
        ]

        def evaluate(inner: Params, outer: Params, batch: Any) -> Tensor:
            del batch
            if compute is not None:
                inner = {n: t.to(kind) for n, t in inner.items()}
                outer = {n: t.to(kind) for n, t in outer.items()}
            return loss(inner, outer, placed).to(dtype)

        return evaluate

    problem = BilevelProblem(
        computed(inner_loss, here),
        computed(outer_loss, held),
        {n: leaf(t.to(device, dtype)) for n, t in cut(w, inner_params).items()},
        {n: leaf(t.to(device)) for n, t in outer.items()},
    )
    unit = 0.0 if compute is None else torch.finfo(compute).eps
    like = {n: t.detach().cpu() for n, t in problem.outer_params.items()}
    return KnownProblem(
        problem, cut(direct, like), cut(indirect, like), hessian, mixed, v, unit
    )


def relative_error(value: Params, truth: Params) -> float:
    """Return the relative L2 distance of two dictionaries, in float64.

    Where the truth is 0, the distance itself.

    Example:
        >>> import torch
        >>> one, two = {"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])}
        >>> relative_error(one, two)
        0.5
    """
    found = {n: value[n].detach().cpu() for n in truth}
    known = {n: t.detach().cpu() for n, t in truth.items()}
    size, own = tree.norms(known, found)
    return tree.relative_error(found, known) if size else own


def cut(vector: Tensor, like: Mapping[str, Tensor]) -> Params:
    """Return the entries of a vector in the names and shapes of `like`.

    Example:
        >>> cut(torch.arange(3), {"a": torch.zeros(()), "b": torch.zeros(2)})
        {'a': tensor(0), 'b': tensor([1, 2])}
    """
    parts = vector.split([t.numel() for t in like.values()])
    return {
        n: p.reshape(t.shape) for (n, t), p in zip(like.items(), parts, strict=True)
    }


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that can be a parameter of a problem."""
    return tensor.detach().clone().requires_grad_()


def _joined(params: Params) -> Tensor:
    return torch.cat([t.reshape(-1) for t in params.values()])


def _newton(g: Callable[[Tensor], Tensor], w: Tensor, max_steps: int = 200) -> Tensor:
    """Return a minimum of g, with as many digits as its gradient has."""
    slope, curvature = torch.func.grad(g), torch.func.hessian(g)
    for _ in range(max_steps):
        grad = slope(w)
        spectrum, basis = torch.linalg.eigh(curvature(w))
        definite = float(spectrum[0]) > 1e-12 * float(spectrum.abs().max())
        # Where g curves down, the step goes down too.
        steepness = spectrum.abs().clamp_min(1e-3 * float(spectrum.abs().max()))
        step = -(basis @ ((basis.T @ grad) / steepness))
        if definite and slope(w + step).norm() < grad.norm() / 2:
            w = w + step
            continue
        if definite and step.norm() <= 1e-10 * (1 + w.norm()):
            return w  # at the end, rounding keeps the gradient from halving
        size = 1.0
        while not g(w + size * step) < g(w):
            size /= 2
            if size < 1e-10:
                msg = (
                    f"Newton's method is stuck where the gradient is "
                    f"{float(grad.norm()):.2g} and the Hessian's lowest eigenvalue "
                    f"{float(spectrum[0]):.2g}: no strict minimum is near. Start "
                    "elsewhere, or add weight decay."
                )
                raise SolveError(msg)
        w = w + size * step
    msg = (
        f"Newton's method took {max_steps} steps and is not at a minimum (gradient "
        f"{float(slope(w).norm()):.2g}): the loss has none, or is flat. Add weight decay."
    )
    raise SolveError(msg)
