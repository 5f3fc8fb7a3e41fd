"""Problems whose hypergradient is known, and the laws that every estimator obeys."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import NonFiniteError
from hypergrad.estimator import HypergradEstimator
from hypergrad.problem import BilevelProblem
from hypergrad.tree import Params

__all__ = ["KnownProblem", "check_estimator", "quadratic", "relative_error", "ridge"]


@dataclass(frozen=True)
class KnownProblem:
    """A problem at a minimum of its inner loss, with the hypergradient there.

    Attributes:
        problem: the problem; its w is w*(λ).
        outer_grads: df/dλ, float64.
        hessian: ∂²g/∂w² at the minimum, `(n, n)`, float64.
    """

    problem: BilevelProblem
    outer_grads: Params
    hessian: Tensor


def ridge(
    n_features: int = 8,
    n_examples: int = 40,
    *,
    dtype: torch.dtype = torch.float64,
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
    data = [(a.to(dtype), b.to(dtype)) for a, b in ((x, y), (x_val, y_val))]

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
        {"w": w.to(dtype).requires_grad_()},
        {"penalty": penalty.to(dtype).requires_grad_()},
    )
    return KnownProblem(problem, {"penalty": grads}, hessian)


def quadratic(
    eigenvalues: Sequence[float],
    *,
    dtype: torch.dtype = torch.float64,
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
    grads = shift + mix.T @ torch.linalg.solve(hessian, w - centre)
    h, b, c = hessian.to(dtype), mix.to(dtype), centre.to(dtype)

    def inner_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        del batch
        x = inner["w"]
        return x @ (h @ x) / 2 - x @ (b @ outer["shift"])

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        del batch
        return ((inner["w"] - c).square().sum() + outer["shift"].square().sum()) / 2

    problem = BilevelProblem(
        inner_loss,
        outer_loss,
        {"w": w.to(dtype).requires_grad_()},
        {"shift": shift.to(dtype).requires_grad_()},
    )
    return KnownProblem(problem, {"shift": grads}, hessian)


def relative_error(value: Params, truth: Params) -> float:
    """Return the relative L2 distance of two dictionaries, in float64.

    Example:
        >>> import torch
        >>> one, two = {"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])}
        >>> relative_error(one, two)
        0.5
    """
    wide = {n: t.detach().double() for n, t in truth.items()}
    off = {n: value[n].detach().double() - wide[n] for n in wide}
    size = tree.norm(wide)
    return tree.norm(off) / size if size else tree.norm(off)


def check_estimator(
    estimator: HypergradEstimator, *, exact_to: float | None = None
) -> None:
    """Check the laws of `HypergradEstimator` on problems with a known answer.

    Names, shapes and dtypes are those of the outer parameters; direct + indirect =
    total; the same inputs give the same output; parameters, `.grad`, random state and
    the caller's `state` come back bit for bit, also when a loss raises; ∂f/∂w = 0 gives
    an indirect term of exact zeros; a λ that the inner loss does not use gives the
    direct term; a NaN loss raises.

    Args:
        estimator: the estimator; one that looks back needs settings to take virtual
            steps by.
        exact_to: relative error to the known hypergradient that it must reach at the
            minimum; None where it approximates.

    Raises:
        AssertionError: naming the law that does not hold.

    Example:
        >>> from hypergrad import make_estimator
        >>> check_estimator(make_estimator("cg"), exact_to=1e-5)
    """
    for known in (ridge(), quadratic([1.0, 2.0, 5.0])):
        _check_laws(estimator, known.problem)
        if exact_to is not None:
            result = estimator.estimate(
                known.problem, inner_batch=None, outer_batch=None
            )
            error = relative_error(result.outer_grads, known.outer_grads)
            _law(
                error <= exact_to,
                f"relative error {error:.2g} is above exact_to={exact_to:.2g}",
            )
    _check_edges(estimator)


def _law(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def _check_laws(estimator: HypergradEstimator, problem: BilevelProblem) -> None:
    for parameter in problem.tensors:
        parameter.grad = torch.ones_like(parameter)
    before = _everything(problem)

    def run() -> Any:
        return estimator.estimate(problem, inner_batch=None, outer_batch=None)

    first, second = run(), run()
    _law(_same(before, _everything(problem)), "the problem or random state changed")
    for name, parameter in problem.outer_params.items():
        for part in (first.outer_grads, first.direct, first.indirect):
            _law(name in part, f"{name!r} is missing")
            like = part[name].shape == parameter.shape
            _law(
                like and part[name].dtype == parameter.dtype,
                f"{name!r} has another form",
            )
        total = first.direct[name] + first.indirect[name]
        _law(torch.equal(total, first.outer_grads[name]), "direct + indirect != total")
        again = torch.equal(first.outer_grads[name], second.outer_grads[name])
        _law(again, "the same inputs gave another output")
    for parameter in problem.tensors:
        parameter.grad = None


def _check_edges(estimator: HypergradEstimator) -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)

    def bowl(inner: Params, outer: Params, batch: Any) -> Tensor:
        del outer, batch
        return inner["w"].square().sum()

    def coupled(inner: Params, outer: Params, batch: Any) -> Tensor:
        del batch
        return (inner["w"] * outer["lam"]).square().sum()

    def only_outer(inner: Params, outer: Params, batch: Any) -> Tensor:
        del inner, batch
        return outer["lam"].square().sum()

    def nan(inner: Params, outer: Params, batch: Any) -> Tensor:
        return coupled(inner, outer, batch) * float("nan")

    def broken(inner: Params, outer: Params, batch: Any) -> Tensor:
        del inner, outer, batch
        raise RuntimeError("on purpose")

    def run(inner_loss: Any, outer_loss: Any) -> Any:
        problem = BilevelProblem(inner_loss, outer_loss, {"w": w}, {"lam": lam})
        before = _everything(problem)
        try:
            return estimator.estimate(problem, inner_batch=None, outer_batch=None)
        finally:
            _law(_same(before, _everything(problem)), "a failure changed the problem")

    flat = run(coupled, only_outer).indirect["lam"]
    _law(not flat.any(), "∂f/∂w = 0 must give an indirect term of exact zeros")
    direct = run(bowl, coupled)
    _law(not direct.indirect["lam"].any(), "an unused λ must give the direct term")
    for losses, kind in (
        ((coupled, nan), NonFiniteError),
        ((coupled, broken), RuntimeError),
    ):
        try:
            run(*losses)
        except kind:
            continue
        raise AssertionError(f"a failing loss must raise {kind.__name__}")


def _everything(problem: BilevelProblem) -> list[Any]:
    tensors = [t.detach().clone() for t in problem.tensors]
    tensors += [t.grad.clone() for t in problem.tensors if t.grad is not None]
    return [
        *tensors,
        torch.get_rng_state(),
        torch.from_numpy(np.random.get_state(legacy=True)[1].astype(np.int64)),  # pyright: ignore[reportArgumentType]
        random.getstate(),
        torch.is_grad_enabled(),
    ]


def _same(a: list[Any], b: list[Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else x == y

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
