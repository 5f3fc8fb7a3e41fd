"""Gauss-Newton curvature: the Hessian without the curvature of the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.attention import explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.products.difference import FiniteDifference
from hypergrad.products.evaluation import (
    accumulate,
    backward_pass,
    check_finite_loss,
    recording,
    replay,
)
from hypergrad.products.exact import Product
from hypergrad.tree import Params

__all__ = ["GaussNewton"]

_MOST_APART = 1e-2
"""Relative difference of g and criterion(outputs) that passes for rounding in bfloat16."""


@dataclass
class _Predictions:
    """The model's outputs on one micro-batch, and the criterion's slope there.

    Attributes:
        values: the tensors, with their graph back to w.
        leaves: the same numbers, cut off from it.
        slope: ∂c/∂z with its graph back to the leaves, None where z is not scored.
    """

    values: list[Tensor]
    leaves: list[Tensor]
    slope: list[Tensor | None]


class GaussNewton(Product):
    r"""Put $J^\top C J$ in the place of the inner Hessian [S02, §3].

    With $g(w) = c(z(w))$, J the Jacobian of the predictions z in w and C the Hessian of
    the criterion c in them,

    $$\frac{\partial^2 g}{\partial w^2} = J^\top C J +
      \sum_i \frac{\partial c}{\partial z_i}\,\frac{\partial^2 z_i}{\partial w^2}.$$

    The first term alone is positive semi-definite wherever c is convex (squared error,
    softmax cross-entropy), also away from a minimum; it is the whole Hessian where z is
    linear in w. The mixed product stays that of g itself.

    With an exact product, Ju is the derivative of $J^\top z$ in z, in direction u; with
    a finite difference it is one of predictions, and first derivatives suffice.

    Args:
        product: takes the mixed products; its kind decides how Ju is taken.

    Raises:
        ValueError: the problem has no `inner_outputs`.
    """

    def __init__(self, product: Product) -> None:
        super().__init__(product.problem, product.batches, product.tally)
        if self.problem.inner_outputs is None:
            msg = (
                "curvature='gauss-newton' needs the predictions that the inner loss "
                "scores, and this problem has a loss alone. Pass inner_outputs and "
                "inner_criterion to BilevelProblem (or its from_module), or "
                "curvature='hessian'."
            )
            raise ValueError(msg)
        self.product = product
        # The last micro-batch's graph: of the predictions, and of Jᵀz.
        self._kept: tuple[_Predictions, list[Tensor], list[Tensor | None]] | None = None
        self._checked = False

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(J^T C J direction, mixed_vjp)`."""
        mixed = self.product.mixed_vjp(direction) if outer else {}
        self.unused = self.product.unused
        return self._curved(direction) if inner else {}, mixed

    def _curved(self, direction: Params) -> Params:
        self._check_direction(direction)
        self.tally.n_hvp += 1
        wanted = self.problem.inner_params
        sums: list[Tensor] = []
        for micro in self.batches:
            with recording(), explain_second_order():
                if isinstance(self.product, FiniteDifference):
                    moved = _Difference(self.product, micro).jvp(direction)
                    with replay(self.problem, micro):
                        parts = self._pull(self._predict(micro), moved)
                else:
                    parts = self._exact(replace(micro, attention="math"), direction)
                sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
        return self._split(dict(zip(wanted, sums, strict=True)), True, False)[0]

    def _exact(self, micro: MicroBatch, direction: Params) -> list[Tensor | None]:
        w = self.problem.inner_params
        with replay(self.problem, micro):
            if self._kept is None:
                z = self._predict(micro)
                cotangents = [torch.zeros_like(v, requires_grad=True) for v in z.values]
                self.tally.n_backward += 1
                pulled = _grad(
                    z.values, list(w.values()), cotangents, create_graph=True
                )
            else:
                z, cotangents, pulled = self._kept
            if len(self.batches) == 1:
                self._kept = z, cotangents, pulled
            self.tally.n_backward += 1
            directions = [direction[n] for n in w]
            return self._pull(z, _grad(pulled, cotangents, directions))

    def _predict(self, micro: MicroBatch) -> _Predictions:
        problem = self.problem
        self.tally.n_forward += 1
        outputs = problem.outputs(
            problem.inner_params, problem.outer_params, micro.batch
        )
        values = _tensors(outputs)
        leaves = [v.detach().requires_grad_() for v in values]
        loss = problem.criterion(_refilled(outputs, leaves), micro.batch)
        check_finite_loss("inner", float(loss.detach()))
        if not self._checked:
            self._check_same_loss(micro, float(loss.detach()))
        one = torch.ones_like(loss)
        return _Predictions(
            values, leaves, _grad([loss], leaves, [one], create_graph=True)
        )

    def _pull(
        self, z: _Predictions, moved: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return Jᵀ C (Ju)."""
        self.tally.n_backward += 1
        curved = _grad(z.slope, z.leaves, moved)
        return _grad(z.values, list(self.problem.inner_params.values()), curved)

    def _check_same_loss(self, micro: MicroBatch, scored: float) -> None:
        problem = self.problem
        self.tally.n_forward += 1
        with replay(problem, micro), torch.no_grad():
            loss = float(
                problem.inner_loss(
                    problem.inner_params, problem.outer_params, micro.batch
                )
            )
        if abs(loss - scored) > _MOST_APART * max(abs(loss), abs(scored)):
            msg = (
                f"inner_criterion(inner_outputs) is {scored:.6g} where the inner loss is "
                f"{loss:.6g}: it scores something else, and so would its curvature. A "
                "penalty, label smoothing or shifted labels are the usual cause. Put "
                "them into inner_criterion (outputs may be a tuple that carries "
                "parameters along), or pass curvature='hessian'."
            )
            raise HypergradError(msg)
        self._checked = True


class _Difference(FiniteDifference):
    """Differences of predictions in the place of differences of gradients."""

    def __init__(self, like: FiniteDifference, micro: MicroBatch) -> None:
        super().__init__(like.problem, [micro], like.tally, like.scheme, like._asked)

    def jvp(self, direction: Params) -> list[Tensor | None]:
        """Return Ju: a tensor for each of the predictions, None where u is 0."""
        length = self._check_direction(direction)
        total: Params = {}
        if length:
            for part, epsilon in self._groups(direction, self._asked / length):
                value = self._scheme(part, epsilon, inner=True, outer=False)[0]
                total = tree.add(total, value) if total else value
        if not total:
            return [None] * len(self._start(inner=True, outer=False))
        return list(total.values())

    def _gradient(self, w: Params, inner: bool, outer: bool) -> Params:
        with self.problem.at(w):
            return self._start(inner, outer)

    def _start(self, inner: bool, outer: bool) -> Params:
        del inner, outer
        (micro,) = self.batches
        problem = self.problem
        self.tally.n_forward += 1
        with replay(problem, micro), torch.no_grad():
            outputs = problem.outputs(
                problem.inner_params, problem.outer_params, micro.batch
            )
        return {str(i): v.detach() for i, v in enumerate(_tensors(outputs))}


def _grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Return a vector-Jacobian product, None for zeros; the graph stays."""
    pairs = [
        (o, c.to(o.dtype))
        for o, c in zip(outputs, cotangents, strict=True)
        if o is not None and c is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    with backward_pass(inputs):
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                list(inputs),
                [c for _, c in pairs],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of what `inner_outputs` returned.

    Raises:
        TypeError: it is neither a tensor nor a tuple, list or dictionary of tensors.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        parts = list(outputs.values())
    else:
        parts = list(outputs) if isinstance(outputs, (tuple, list)) else []
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        msg = (
            f"inner_outputs returned a {type(outputs).__name__} that is not made of "
            "tensors. Return the predictions: a tensor, or a tuple or dictionary of "
            "tensors."
        )
        raise TypeError(msg)
    return parts


def _refilled(outputs: Any, tensors: Sequence[Tensor]) -> Any:
    """Return `tensors` in the form that `outputs` has."""
    if isinstance(outputs, Tensor):
        return tensors[0]
    if isinstance(outputs, Mapping):
        return dict(zip(outputs, tensors, strict=True))
    return tuple(tensors)
