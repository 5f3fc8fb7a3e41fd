"""Problems whose hypergradient has a closed form: quadratic in w."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.problem import BilevelProblem
from hypergrad.testing.known import KnownProblem, leaf
from hypergrad.tree import Params

__all__ = ["quadratic", "ridge"]


def ridge(
    n_features: int = 8,
    n_examples: int = 40,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> KnownProblem:
    r"""Make a ridge regression with one penalty for each feature.

    $$g = \tfrac{1}{2n}\|Xw - y\|^2 + \tfrac12\sum_i\lambda_i w_i^2,\qquad
      f = \tfrac{1}{2n}\|X'w - y'\|^2$$

    With $H = X^\top X/n + \mathrm{diag}(\lambda)$: $w^* = H^{-1}X^\top y/n$ and
    $\mathrm df/\mathrm d\lambda = -w^*\odot H^{-1}\nabla f(w^*)$.

    Args:
        n_features: size of w and λ.
        n_examples: n.
        dtype: dtype of the problem; the truth is float64.
        device: where its tensors are; the truth stays on the host.
        seed: of the data.

    Returns:
        The problem, with inner parameter `"w"` and outer parameter `"penalty"`.

    Example:
        >>> known = ridge(3)
        >>> known.outer_grads["penalty"].shape
        torch.Size([3])
    """
    make = torch.Generator().manual_seed(seed)
    shape = (2, n_examples, n_features)
    features = torch.randn(shape, generator=make, dtype=torch.float64)
    truth = torch.randn(n_features, generator=make, dtype=torch.float64)
    noise = torch.randn(2, n_examples, generator=make, dtype=torch.float64)
    targets = features @ truth + 0.5 * noise
    penalty = 0.1 + torch.rand(n_features, generator=make, dtype=torch.float64)
    # Truth for the numbers that the problem holds, not for those before rounding.
    features, targets, penalty = (
        t.to(dtype).double() for t in (features, targets, penalty)
    )
    x, x_val = features
    y, y_val = targets
    hessian = x.T @ x / n_examples + penalty.diag()
    w = torch.linalg.solve(hessian, x.T @ y / n_examples)
    v = x_val.T @ (x_val @ w - y_val) / n_examples
    grads = -w * torch.linalg.solve(hessian, v)
    data = [
        (a.to(device, dtype), b.to(device, dtype)) for a, b in ((x, y), (x_val, y_val))
    ]

    def inner_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        del batch
        a, b = data[0]
        fit = (a @ inner["w"] - b).square().mean() / 2
        return fit + (outer["penalty"] * inner["w"].square()).sum() / 2

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        del outer, batch
        a, b = data[1]
        return (a @ inner["w"] - b).square().mean() / 2

    problem = BilevelProblem(
        inner_loss,
        outer_loss,
        {"w": leaf(w.to(device, dtype))},
        {"penalty": leaf(penalty.to(device, dtype))},
    )
    direct = {"penalty": torch.zeros_like(grads)}
    return KnownProblem(problem, direct, {"penalty": grads}, hessian, w.diag(), v)


def quadratic(
    eigenvalues: Sequence[float] = (1.0, 2.0, 5.0),
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
    seed: int = 0,
) -> KnownProblem:
    r"""Make a quadratic whose Hessian has the given eigenvalues.

    $$g = \tfrac12 w^\top H w - w^\top B\lambda,\qquad
      f = \tfrac12\|w - c\|^2 + \tfrac12\|\lambda\|^2$$

    so that $w^* = H^{-1}B\lambda$ and
    $\mathrm df/\mathrm d\lambda = \lambda + B^\top H^{-1}(w^* - c)$.

    Args:
        eigenvalues: of H; its size is that of w.
        dtype: dtype of the problem; the truth is float64.
        device: where its tensors are; the truth stays on the host.
        compute: what the losses compute in, with parameters in `dtype`; None for that.
        seed: of the rest.

    Returns:
        The problem, with inner parameter `"w"` and outer parameter `"shift"` of size 2.

    Example:
        >>> round(quadratic([1.0, 2.0]).hessian.trace().item(), 9)
        3.0
    """
    make = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    gauss = torch.randn(n, n, generator=make, dtype=torch.float64)
    basis, _ = torch.linalg.qr(gauss)
    spectrum = torch.tensor(list(eigenvalues), dtype=torch.float64)
    hessian = (basis * spectrum) @ basis.T
    hessian = ((hessian + hessian.T) / 2).to(dtype).double()
    rest = torch.randn(n, 3, generator=make, dtype=torch.float64).to(dtype).double()
    mix, centre = rest[:, :2], rest[:, 2]
    shift = torch.randn(2, generator=make, dtype=torch.float64).to(dtype).double()
    w = torch.linalg.solve(hessian, mix @ shift)
    v = w - centre
    through = mix.T @ torch.linalg.solve(hessian, v)
    kind = compute or dtype
    h, b, c = (t.to(device, kind) for t in (hessian, mix, centre))

    def inner_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        del batch
        x, shift = inner["w"].to(kind), outer["shift"].to(kind)
        return (x @ (h @ x) / 2 - x @ (b @ shift)).to(dtype)

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        del batch
        x, shift = inner["w"].to(kind), outer["shift"].to(kind)
        return (((x - c).square().sum() + shift.square().sum()) / 2).to(dtype)

    problem = BilevelProblem(
        inner_loss,
        outer_loss,
        {"w": leaf(w.to(device, dtype))},
        {"shift": leaf(shift.to(device, dtype))},
    )
    direct, indirect = {"shift": shift}, {"shift": through}
    unit = 0.0 if compute is None else torch.finfo(compute).eps
    return KnownProblem(problem, direct, indirect, hessian, -mix.T, v, unit)
