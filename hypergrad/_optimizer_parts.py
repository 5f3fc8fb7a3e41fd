"""What a `BilevelOptimizer` is made of, checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad.errors import NumericalWarning
from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators import make_estimator
from hypergrad.problem import BilevelProblem
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = [
    "OptimizerLike",
    "apply_gradients",
    "check_settings",
    "make_estimator_of",
    "make_level",
    "make_problem",
    "numerical_warnings",
    "without_graphs",
]

OptimizerLike = torch.optim.Optimizer | Callable[[list[Tensor]], torch.optim.Optimizer]
"""A torch optimizer, or a function from the list of parameters to one."""


def make_problem(
    given: BilevelProblem | nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    outer: Any,
    outer_loss_fn: Callable[[Any, Any], Tensor] | None,
) -> BilevelProblem:
    """Return the problem that was given, or make it of a module.

    Raises:
        TypeError: neither a problem nor a module, or arguments for the other.
    """
    if isinstance(given, BilevelProblem):
        if loss_fn is not None or outer is not None or outer_loss_fn is not None:
            msg = (
                "loss_fn, outer and outer_loss_fn go with a module; this problem has its"
                " losses and outer parameters already. Leave them out."
            )
            raise TypeError(msg)
        return given
    if not isinstance(given, nn.Module):
        msg = (
            "the first argument must be a BilevelProblem or a torch.nn.Module, got "
            f"{type(given).__name__}."
        )
        raise TypeError(msg)
    if loss_fn is None or outer is None:
        msg = "with a module, pass loss_fn and outer (which parameters are outer) too."
        raise TypeError(msg)
    return BilevelProblem.from_module(
        given, loss_fn, outer=outer, outer_loss_fn=outer_loss_fn
    )


def make_estimator_of(given: Any) -> HypergradEstimator:
    """Return the estimator that was given, or make it of its name.

    Raises:
        TypeError: neither a name nor an estimator.
    """
    if isinstance(given, str):
        return make_estimator(given)
    if not isinstance(given, HypergradEstimator):
        msg = (
            f"estimator must be a name or a HypergradEstimator, got {given!r}. Pass e.g. "
            "estimator='neumann'."
        )
        raise TypeError(msg)
    return given


def make_level(
    level: str, given: OptimizerLike, params: Params
) -> torch.optim.Optimizer:
    """Return the optimizer of one level, over exactly its parameters.

    Raises:
        TypeError: neither an optimizer nor a function that makes one.
        ValueError: an optimizer over other tensors.
    """
    if isinstance(given, torch.optim.Optimizer):
        optimizer = given
    elif callable(given):
        # torch refuses an empty list; an empty group steps nothing, which is right.
        tensors = list(params.values())
        optimizer = given(tensors) if tensors else given([{"params": []}])  # pyright: ignore[reportArgumentType]
    else:
        msg = (
            f"{level}_optimizer must be a torch optimizer or a function that makes one, "
            f"got {type(given).__name__}. Pass e.g. partial(torch.optim.AdamW, lr=1e-3)."
        )
        raise TypeError(msg)
    if not isinstance(optimizer, torch.optim.Optimizer):
        msg = f"{level}_optimizer made a {type(optimizer).__name__}, not an optimizer."
        raise TypeError(msg)
    names = {id(p): n for n, p in params.items()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for i, n in names.items() if i not in held]
    if missing or held - set(names):
        msg = (
            f"{level}_optimizer holds {len(held & set(names))} of the {len(names)} "
            f"{level} parameters and {len(held - set(names))} other tensors "
            f"(missing: {missing[:4]}). Make it over exactly the problem's "
            f"{level}_params."
        )
        raise ValueError(msg)
    return optimizer


def check_settings(
    outer_every: int | None,
    outer_warmup: int,
    max_grad_norm: float | None,
    reuse_graph: Any,
) -> None:
    """Refuse settings out of range.

    Raises:
        TypeError: a count that is not a whole number.
        ValueError: naming the setting and its value.
    """
    counts = [("outer_warmup", outer_warmup, 0)]
    if outer_every is not None:
        counts.append(("outer_every", outer_every, 1))
    for name, value, least in counts:
        if not isinstance(value, int) or isinstance(value, bool):
            msg = f"{name}={value!r} must be a whole number of inner steps."
            raise TypeError(msg)
        if value < least:
            msg = f"{name}={value} must be at least {least} inner steps."
            raise ValueError(msg)
    if max_grad_norm is not None and not max_grad_norm > 0:
        msg = (
            f"max_grad_norm={max_grad_norm} must be positive, or None for no clipping."
        )
        raise ValueError(msg)
    if reuse_graph not in (True, False, "auto"):
        msg = f"reuse_graph={reuse_graph!r} must be True, False or 'auto'."
        raise ValueError(msg)


@contextmanager
def numerical_warnings(*, silent: bool) -> Iterator[list[str]]:
    """Yield a list that tells, after the block, which `NumericalWarning` it gave.

    Args:
        silent: whether those are kept back; all others are passed on.
    """
    texts: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield texts
    finally:
        for w in caught:
            numerical = issubclass(w.category, NumericalWarning)
            texts += [str(w.message)] if numerical else []
            if not (numerical and silent):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def apply_gradients(
    optimizer: torch.optim.Optimizer, params: Params, grads: Params
) -> None:
    """Step one level on these gradients; `.grad` is left alone."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in params.items()}
    held = [p.grad for p in own]
    try:
        for p in own:
            p.grad = grads[names[id(p)]].to(p.dtype)
        optimizer.step()
        # Fused optimizers move values without raising the version of their tensors, by
        # which records and graphs tell that something moved.
        torch.autograd.graph.increment_version(own)
    finally:
        for p, grad in zip(own, held, strict=True):
            p.grad = grad


def without_graphs(steps: Sequence[InnerStep]) -> tuple[InnerStep, ...]:
    """Return the steps without the graphs that they kept."""
    return tuple(s if s.graph is None else replace(s, graph=None) for s in steps)
