"""What a `BilevelOptimizer` is made of, read and checked."""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch
from torch import nn

from hypergrad._audit import Auditor
from hypergrad._estimate_checks import check_reaches
from hypergrad._hooks import follows
from hypergrad._learned_groups import note_rates
from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators import make_estimator
from hypergrad.learned import check_learned
from hypergrad.problem import BilevelProblem
from hypergrad.reference import choose_reference
from hypergrad.reporting import report
from hypergrad.rules import check_supported, rule_of

__all__ = [
    "check_inner",
    "check_outer",
    "check_settings",
    "describe",
    "make_estimator_of",
    "make_problem",
]


def make_problem(given: BilevelProblem | nn.Module, **of_module: Any) -> BilevelProblem:
    """Return the problem that was given, or make it of a module.

    Raises:
        TypeError: neither a problem nor a module, or arguments for the other.
    """
    if isinstance(given, BilevelProblem):
        if any(
            value is not None and value is not False for value in of_module.values()
        ):
            msg = (
                f"{', '.join(of_module)} go with a module; this problem has its losses "
                "and outer parameters already. Leave them out."
            )
            raise TypeError(msg)
        return given
    if not isinstance(given, nn.Module):
        msg = (
            "the first argument must be a BilevelProblem or a torch.nn.Module, got "
            f"{type(given).__name__}."
        )
        raise TypeError(msg)
    beside = of_module["inner_settings"] or of_module["learn_start"]
    if of_module["loss_fn"] is None or (of_module["outer"] is None and not beside):
        msg = "with a module, pass loss_fn and outer (which parameters are outer) too."
        raise TypeError(msg)
    return BilevelProblem.from_module(given, **of_module)


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


def check_inner(
    problem: BilevelProblem,
    estimator: HypergradEstimator,
    inner: torch.optim.Optimizer,
    auditor: Auditor,
) -> None:
    """Refuse an inner optimizer whose steps do not give what is asked of them.

    Notes where its learning rates begin, where these are learned.

    Args:
        problem: the problem.
        estimator: the one that was asked for.
        inner: the inner optimizer.
        auditor: may need steps that can be looked back at.

    Raises:
        HypergradError: the estimator does not see where λ acts.
        TypeError: the optimizer has no rule, and one is needed.
        ValueError: it does not have what is learned, or a rate began at 0; or the
            auditor's reference cannot be had.
    """
    if problem.beside_losses:
        check_supported(inner, problem.beside_losses)
    elif estimator.needs.lookback or follows(estimator) or auditor.needs_steps:
        check_supported(inner)
    check_reaches(estimator, problem)
    if problem.inner_settings:
        check_learned(rule_of(inner, problem.inner_params), problem)
        note_rates(inner, problem)
    if auditor.every and auditor.reference in ("dense", "cg"):
        choose_reference(problem, None, auditor.reference)


def check_outer(problem: BilevelProblem, outer: torch.optim.Optimizer) -> None:
    """Warn of decay of learned settings, which goes towards 0 on their scales.

    Args:
        problem: the problem.
        outer: the outer optimizer.
    """
    learned = {id(problem.outer_params[n]): n for n in problem.inner_settings}
    for group in outer.param_groups:
        names = [learned[id(p)] for p in group["params"] if id(p) in learned]
        if names and group.get("weight_decay"):
            report(
                f"the outer optimizer's weight_decay={group['weight_decay']} pulls "
                f"{', '.join(names)} towards 0, whatever the hypergradient: a learning "
                "rate towards 1, a momentum towards 1/2. Put what is learned of the inner "
                "optimizer in a group with weight_decay=0."
            )


def describe(
    estimator: HypergradEstimator, problem: BilevelProblem, **settings: Any
) -> str:
    """Return what has to be the same on every rank, without addresses.

    Args:
        estimator: the one that was asked for.
        problem: the problem, whose parameters are told by name, shape and dtype, and
            what it learns of the optimizer by its values.
        **settings: of the optimizer.
    """
    names = {
        n: (tuple(t.shape), str(t.dtype))
        for params in (problem.inner_params, problem.outer_params)
        for n, t in params.items()
    }
    settings["parameters"] = f"{len(names)} ({zlib.crc32(repr(names).encode()):08x})"
    if problem.inner_settings:  # in the place of the optimizer's own
        held = problem.outer_params
        settings["learned"] = {n: held[n].tolist() for n in problem.inner_settings}
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    return re.sub(r" at 0x[0-9a-f]+", "", f"{estimator!r}, {shown}")
