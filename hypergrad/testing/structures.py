"""The same problem with its tensors in another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.problem import BilevelProblem
from hypergrad.testing.known import KnownProblem, cut, leaf
from hypergrad.tree import Params

__all__ = ["STRUCTURES", "Structure", "restructured"]

Structure = Literal[
    "plain",
    "one",
    "many",
    "scalar",
    "non-contiguous",
    "transposed",
    "aliased",
    "empty",
]
"""A form that `restructured` gives to the tensors of a problem."""
STRUCTURES: tuple[Structure, ...] = get_args(Structure)

# The new tensors of one level, and the way back to those that the losses know.
_Form = tuple[Params, Callable[[Params], Params]]


def restructured(known: KnownProblem, structure: Structure) -> KnownProblem:
    """Give the tensors of a problem another form; it is the same problem otherwise.

    | structure | inner and outer parameters become |
    |---|---|
    | `"plain"` | copies |
    | `"one"` | one vector for each level |
    | `"many"` | two vectors for each tensor of more than one entry |
    | `"scalar"` | a tensor of shape `()` for each entry |
    | `"non-contiguous"` | views with gaps; of two dimensions or more, transposed too |
    | `"transposed"` | a dense matrix of two rows for each level, laid out by columns |
    | `"aliased"` | each tensor under two names, half of it read from each |
    | `"empty"` | no inner parameter at all: w is part of the losses |

    The truth goes along: a hypergradient does not depend on how entries are grouped.

    Args:
        known: the problem; its own tensors are copied.
        structure: which form.

    Returns:
        The problem on tensors of that form.

    Raises:
        ValueError: an unknown structure, or `"empty"` where λ acts on the outer loss only
            through w, so that nothing would be left.

    Example:
        >>> from hypergrad.testing import quadratic
        >>> many = restructured(quadratic([1.0, 2.0, 5.0]), "many")
        >>> {name: len(t) for name, t in many.problem.inner_params.items()}
        {'w.0': 2, 'w.1': 1}
        >>> list(many.outer_grads)
        ['shift.0', 'shift.1']
    """
    if structure not in STRUCTURES:
        names = ", ".join(map(repr, STRUCTURES))
        msg = f"structure={structure!r} is unknown; choose one of {names}."
        raise ValueError(msg)
    base = known.problem
    if structure == "empty":
        if tree.norm(known.direct) == 0.0:
            msg = (
                "without inner parameters nothing is left of this problem: its outer "
                "loss depends on λ only through w. Take another, such as quadratic()."
            )
            raise ValueError(msg)
        fixed = tree.clone(base.inner_params)
        inner: _Form = {}, lambda given: fixed
    else:
        inner = _form(base.inner_params, structure)
    outer = _form(base.outer_params, structure)
    (w, old_w), (lam, old_lam) = inner, outer

    def again(loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda i, o, batch: loss(old_w(i), old_lam(o), batch)

    outputs = base.inner_outputs
    problem = BilevelProblem(
        again(base.inner_loss),
        again(base.outer_loss),
        w,
        lam,
        outputs if outputs is None else again(outputs),
        base.inner_criterion,
    )

    def along(truth: Params) -> Params:
        return cut(
            torch.cat([t.reshape(-1) for t in truth.values()]), problem.outer_params
        )

    made = replace(
        known,
        problem=problem,
        direct=along(known.direct),
        indirect=along(known.indirect),
    )
    if structure != "empty":
        return made
    return replace(
        made,
        indirect=tree.zeros_like(made.indirect),
        hessian=known.hessian[:0, :0],
        mixed=known.mixed[:, :0],
        v=known.v[:0],
    )


def _form(params: Params, structure: Structure) -> _Form:
    if structure == "non-contiguous":
        return {n: _with_gaps(t) for n, t in params.items()}, dict
    if structure == "aliased":
        copies = {n: leaf(t) for n, t in params.items()}
        again = {f"{n} again": t for n, t in copies.items()}
        return copies | again, _halves
    if structure in ("plain", "empty"):
        return {n: leaf(t) for n, t in params.items()}, dict
    vector = torch.cat([t.detach().reshape(-1) for t in params.values()])
    shapes = _pieces(params, structure)
    pieces = {n: leaf(t) for n, t in cut(vector, shapes).items()}
    if structure == "transposed":
        pieces = {n: _by_columns(t) if t.dim() else t for n, t in pieces.items()}

    def whole(given: Params) -> Params:
        return cut(torch.cat([given[n].reshape(-1) for n in pieces]), params)

    return pieces, whole


def _pieces(params: Params, structure: Structure) -> Mapping[str, Tensor]:
    """Return empty tensors of the names and shapes to cut the parameters into."""
    if structure == "one":
        return {"+".join(params): torch.empty(sum(t.numel() for t in params.values()))}
    if structure == "transposed":
        half, odd = divmod(sum(t.numel() for t in params.values()), 2)
        name = "+".join(params)
        rest = {f"{name}, rest": torch.empty(())} if odd else {}
        return {name: torch.empty(2, half), **rest}
    if structure == "scalar":
        entries = [(n, i) for n, t in params.items() for i in range(t.numel())]
        return {f"{n}.{i}": torch.empty(()) for n, i in entries}
    return {
        f"{n}.{i}": half
        for n, t in params.items()
        for i, half in enumerate(torch.empty(t.numel()).chunk(2))
    }


def _halves(given: Params) -> Params:
    # Halving is exact, so that this is the tensor itself and its gradient too.
    names = [n for n in given if f"{n} again" in given]
    return {n: given[n] / 2 + given[f"{n} again"] / 2 for n in names}


def _by_columns(tensor: Tensor) -> Tensor:
    return tensor.detach().T.contiguous().T.requires_grad_()


def _with_gaps(tensor: Tensor) -> Tensor:
    wide = tensor.detach().T if tensor.dim() == 2 else tensor.detach()
    room = wide.new_zeros((*wide.shape, 2))
    view = room[..., 0].copy_(wide)
    return (view.T if tensor.dim() == 2 else view).requires_grad_()
