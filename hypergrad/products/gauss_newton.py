"""Gauss-Newton curvature: the Hessian without the curvature of the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.attention import attention, explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.products.autograd import differentiate, recording
from hypergrad.products.base import BoundProduct, total_loss
from hypergrad.products.evaluation import accumulate, replay
from hypergrad.products.tally import check_finite_loss
from hypergrad.reducer import Contribution
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


class GaussNewton(BoundProduct):
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
        product: takes the mixed products, and Ju where it is of first order.

    Raises:
        ValueError: the problem has no `inner_outputs`.
    """

    def __init__(self, product: BoundProduct) -> None:
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
        self.unused, self.info = self.product.unused, self.product.info
        if not inner:
            return {}, mixed
        self.tally.watch_direction(direction)
        w = self.problem.inner_params
        return self._averaged(w, lambda: self.compute(direction, w)).values, mixed

    def compute(self, direction: Params, wanted: Params) -> Contribution:
        """Return $J^T C J$ `direction`."""
        self.tally.n_hvp += 1
        sums: list[Tensor] = []
        losses: list[Tensor] = []
        for micro in self.batches:
            with recording(), explain_second_order():
                if self.product.order == 1:
                    parts = self._by_differences(micro, direction, losses)
                else:
                    plain = replace(micro, attention="math")
                    parts = self._exact(plain, direction, losses)
                sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
        return Contribution(
            dict(zip(wanted, sums, strict=True)), total_loss(losses), set()
        )

    def push(self, inner: Params, outer: Params) -> Contribution:
        """Return $J^T C J$ u, and the change of ∂g/∂w along μ."""
        w = self.problem.inner_params
        curved = self.compute(inner, w)
        if not outer:
            return curved
        mixed = self.product.push(tree.zeros_like(w), outer)
        losses = [c.loss for c in (curved, mixed) if c.loss is not None]
        return Contribution(
            tree.add(curved.values, mixed.values), total_loss(losses), mixed.unused
        )

    def _by_differences(
        self, micro: MicroBatch, direction: Params, losses: list[Tensor]
    ) -> list[Tensor | None]:
        moved = self.product.outputs_jvp(direction, lambda: self._outputs(micro))
        if moved is None:
            msg = (
                f"{type(self.product).__name__} is of first order and has no outputs_jvp:"
                " curvature='gauss-newton' needs it. Define it, or take "
                "product='finite-difference'."
            )
            raise HypergradError(msg)
        with replay(self.problem, micro):
            return self._pull(self._predict(micro, losses), list(moved.values()))

    def _outputs(self, micro: MicroBatch) -> Params:
        problem = self.problem
        self.tally.n_forward += 1
        with replay(problem, micro), torch.no_grad():
            outputs = problem.outputs(
                problem.inner_params, problem.outer_params, micro.batch
            )
        # Copies: an output may be a parameter itself, which is about to move.
        return {str(i): v.detach().clone() for i, v in enumerate(_tensors(outputs))}

    def _exact(
        self, micro: MicroBatch, direction: Params, losses: list[Tensor]
    ) -> list[Tensor | None]:
        w = self.problem.inner_params
        if self._kept is None:
            with replay(self.problem, micro, keep=True):
                z = self._predict(micro, losses)
            cotangents = [torch.zeros_like(v, requires_grad=True) for v in z.values]
            self.tally.n_backward += 1
            leaves = list(w.values())
            pulled = differentiate(z.values, leaves, cotangents, create_graph=True)
        else:
            z, cotangents, pulled = self._kept
        if len(self.batches) == 1:
            self._kept = z, cotangents, pulled
        self.tally.n_backward += 1
        directions = [direction[n] for n in w]
        # Checkpointing runs the forward pass again, and in the same modes.
        self.problem.set_modes(micro.training)
        with attention("math"):
            moved = differentiate(pulled, cotangents, directions, retain_graph=True)
            return self._pull(z, moved)

    def _predict(self, micro: MicroBatch, losses: list[Tensor]) -> _Predictions:
        problem = self.problem
        self.tally.n_forward += 1
        outputs = problem.outputs(
            problem.inner_params, problem.outer_params, micro.batch
        )
        values = _tensors(outputs)
        leaves = [v.detach().requires_grad_() for v in values]
        loss = problem.criterion(_refilled(outputs, leaves), micro.batch)
        losses.append(loss.detach())
        slope = differentiate([loss], leaves, create_graph=True)
        if not self._checked:
            self._check_same_loss(micro, loss.detach())
        return _Predictions(values, leaves, slope)

    def _pull(
        self, z: _Predictions, moved: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return Jᵀ C (Ju)."""
        self.tally.n_backward += 1
        curved = differentiate(z.slope, z.leaves, moved, retain_graph=True)
        leaves = list(self.problem.inner_params.values())
        return differentiate(z.values, leaves, curved, retain_graph=True)

    def _check_same_loss(self, micro: MicroBatch, scored: Tensor) -> None:
        problem = self.problem
        self.tally.n_forward += 1
        with replay(problem, micro), torch.no_grad():
            given = problem.inner_loss(
                problem.inner_params, problem.outer_params, micro.batch
            )
        found, loss = tree.read([scored, given])
        check_finite_loss("inner", found)
        if abs(loss - found) > _MOST_APART * max(abs(loss), abs(found)):
            msg = (
                f"inner_criterion(inner_outputs) is {found:.6g} where the inner loss is "
                f"{loss:.6g}: it scores something else, and so would its curvature. A "
                "penalty, label smoothing or shifted labels are the usual cause. Put "
                "them into inner_criterion (outputs may be a tuple that carries "
                "parameters along), or pass curvature='hessian'."
            )
            raise HypergradError(msg)
        self._checked = True


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
