"""BiDoRA as one optimizer: directions inside, magnitudes outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bidora import defaults
from bidora._predictions import criterion_of, predictions
from bidora.dora import (
    check_norms,
    exact_dora_layers,
    plain_dora_layers,
    use_exact_dora,
)
from bidora.dora.orthogonality import orthogonality as orthogonality_term
from bidora.outer import OuterLevel, make_outer_level
from bidora.trainer.upstream import frozen_new_head, trainable_base_weights
from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators import make_estimator
from hypergrad.optimizer import BilevelOptimizer, StepReport
from hypergrad.problem import BilevelProblem

__all__ = ["BiDoRAOptimizer", "check_base_weights", "orthogonality_weight"]


class BiDoRAOptimizer(BilevelOptimizer):
    r"""Train a PEFT DoRA model as a bilevel problem [QZX24, Eq. 5-7].

    $$\min_m\; L_{val}(V^*(m), m)\quad\text{s.t.}\quad
      V^*(m) = \arg\min_V L_{tr}(V, m) + \gamma R(V)$$

    The outer parameters are the DoRA magnitudes m of the model; the inner ones are its
    other trainable parameters: A, B and the task head. AdamW steps both.

    Args:
        model: a model with a DoRA adapter, from `get_peft_model` or transformers'
            `add_adapter` with `LoraConfig(use_dora=True)`.
        estimator: a name of `hypergrad.estimator_names()` or an estimator.
        loss_fn: `(model, batch) -> scalar`; None for `model(**batch).loss`.
        outer_loss_fn: the outer loss, which `zeroth-order` takes without a derivative too,
            such as minus a metric; None for `loss_fn`, without the orthogonality term.
        inner_lr: AdamW's learning rate of the directions and the head.
        outer_lr: AdamW's learning rate of the magnitudes; None for `inner_lr`.
        inner_weight_decay: decoupled weight decay of the directions and the head.
        outer_weight_decay: decoupled weight decay of the magnitudes, which pulls them to
            0, not to where they started; None for `inner_weight_decay`.
        inner_optimizer: in place of AdamW, a function from the list of inner parameters
            to a torch optimizer; `inner_lr` and `inner_weight_decay` are then unused.
        outer_optimizer: likewise for the magnitudes.
        outer_every: inner steps from one outer step to the next; None for 4, or as many
            as the estimator looks back at where these are more.
        outer_warmup: inner steps before the first outer step.
        max_grad_norm: norm that inner gradients are clipped to; None for none.
        orthogonality: γ, the weight of the orthogonality term in the inner loss; None
            for 1e-5, and for 0 with Gauss-Newton curvature, which has no place for it.
        exact: whether to replace PEFT's DoRA forward by the exact one, whose backward is
            the gradient of the loss; see `use_exact_dora`.
        dropout: what the exact forward applies adapter dropout to; see `use_exact_dora`.
        allow_base_weights: whether trainable base weights may be inner parameters.
        outer_level: what is learned on the outer batches, a name of `OUTER_LEVELS` or an
            object.
        reuse_graph: see `BilevelOptimizer`.
        audit_every: outer steps from one comparison with a reference to the next, in
            `StepReport.audit`; None for none. See `BilevelOptimizer`.
        audit_reference: likewise.
        audit_window: likewise.

    Raises:
        TypeError: an estimator or optimizer of a kind that does not work here.
        ValueError: no trainable DoRA magnitude, magnitudes of several adapters,
            trainable base weights, or a setting out of range.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        >>> config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        >>> model = get_peft_model(net, config)
        >>> def loss_fn(model, x):
        ...     return model(x).square().mean()
        >>> opt = BiDoRAOptimizer(model, loss_fn=loss_fn, outer_every=1, outer_warmup=0)
        >>> report = opt.step(torch.ones(2, 4), torch.ones(2, 4))
        >>> report.outer_step, len(opt.problem.outer_params)
        (True, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: str | HypergradEstimator = defaults.ESTIMATOR,
        *,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        outer_loss_fn: Callable[[Any, Any], Tensor] | None = None,
        inner_lr: float = defaults.OTHER_LEARNING_RATE,
        outer_lr: float | None = None,
        inner_weight_decay: float = defaults.WEIGHT_DECAY,
        outer_weight_decay: float | None = None,
        inner_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        outer_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        outer_every: int | None = None,
        outer_warmup: int = defaults.OUTER_WARMUP,
        max_grad_norm: float | None = defaults.MAX_GRAD_NORM,
        orthogonality: float | None = None,
        exact: bool = True,
        dropout: Literal["lora", "peft"] = "lora",
        allow_base_weights: bool = False,
        outer_level: str | OuterLevel = "magnitudes",
        reuse_graph: bool | Literal["auto"] = "auto",
        audit_every: int | None = None,
        audit_reference: str | HypergradEstimator = "auto",
        audit_window: int | None = None,
    ) -> None:
        level = (
            make_outer_level(outer_level)
            if isinstance(outer_level, str)
            else outer_level
        )
        outer = level.parameters(model)
        estimator = (
            make_estimator(estimator) if isinstance(estimator, str) else estimator
        )
        gamma = orthogonality_weight(orthogonality, estimator, model)
        if outer_lr is None:
            outer_lr = inner_lr
        if outer_weight_decay is None:
            outer_weight_decay = inner_weight_decay
        if outer_every is None:
            outer_every = max(defaults.OUTER_EVERY, estimator.needs.lookback)
        check_base_weights(model, allow_base_weights)
        _warn_of_frozen_head(model)
        self.exact = exact
        self.dropout: Literal["lora", "peft"] = dropout
        if exact:
            if plain_dora_layers(model):
                use_exact_dora(model, dropout=dropout)
        else:
            warnings.warn(_DETACHED, stacklevel=2)
        compute = loss_fn or _model_loss

        def inner_loss(model: nn.Module, batch: Any) -> Tensor:
            loss = compute(model, batch)
            if gamma:
                loss = loss + gamma * orthogonality_term(model)
            return loss

        self.model = model
        super().__init__(
            BilevelProblem.from_module(
                model,
                inner_loss,
                outer=sorted(outer),
                outer_loss_fn=outer_loss_fn or compute,
                # For Gauss-Newton curvature; a loss of the user's own says nothing of it.
                inner_outputs=predictions if loss_fn is None else None,
                inner_criterion=criterion_of(model) if loss_fn is None else None,
            ),
            estimator=estimator,
            inner_optimizer=inner_optimizer
            or partial(torch.optim.AdamW, lr=inner_lr, weight_decay=inner_weight_decay),
            outer_optimizer=outer_optimizer
            or partial(torch.optim.AdamW, lr=outer_lr, weight_decay=outer_weight_decay),
            outer_every=outer_every,
            outer_warmup=outer_warmup,
            max_grad_norm=max_grad_norm,
            reuse_graph=reuse_graph,
            audit_every=audit_every,
            audit_reference=audit_reference,
            audit_window=audit_window,
        )

    def outer_step(
        self,
        outer_batch: Any,
        inner_batch: Any = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> StepReport:
        """Take an outer step alone; see `BilevelOptimizer.outer_step`.

        Args:
            outer_batch: data of the outer loss.
            inner_batch: data of the inner loss; that of the last inner step where None.
            on_progress: hears of the inner steps that the estimator goes through.

        Returns:
            What was done.

        Raises:
            ValueError: a row of some direction has zero norm.
        """
        if self.exact and plain_dora_layers(self.model):
            # An adapter was added or loaded since, and came with PEFT's own forward.
            use_exact_dora(self.model, dropout=self.dropout)
        check_norms(self.model)
        return super().outer_step(outer_batch, inner_batch, on_progress=on_progress)

    def freeze_magnitudes(self) -> None:
        """End the search: magnitudes keep their values, steps train directions alone."""
        self.freeze_outer()


_DETACHED = (
    "exact=False keeps PEFT's DoRA forward, which detaches the weight norm: its backward "
    "is not the gradient of the loss. Measured on one layer, the mixed second-derivative "
    "product was off by 650 % (cosine 0.16), and the Hessian is not symmetric, so 'cg' and "
    "'neumann' have no meaning. Leave exact=True unless you reproduce PEFT's own updates."
)


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        msg = (
            f"the model returned no loss ({type(output).__name__}): the batch has no "
            f"'labels', perhaps (its keys are {sorted(batch)}). Add them, or pass "
            "loss_fn=lambda model, batch: ..."
        )
        raise ValueError(msg)
    return loss


def orthogonality_weight(
    weight: float | None,
    estimator: HypergradEstimator,
    model: nn.Module,
    usual: float = defaults.ORTHOGONALITY,
) -> float:
    """Return the weight of the orthogonality term.

    Args:
        weight: as given; None for the usual one, where the term has a place.
        estimator: the estimator.
        model: the model.
        usual: the usual one.

    Raises:
        ValueError: out of range, or given where the term has no place.
    """
    gauss_newton = getattr(estimator, "curvature", "") == "gauss-newton"
    if weight is None:
        directions = exact_dora_layers(model) or plain_dora_layers(model)
        return usual if directions and not gauss_newton else 0.0
    if not 0 <= weight < float("inf"):
        msg = (
            f"orthogonality={weight} must be finite and at least 0: it is the weight of "
            "a term of the inner loss. The paper takes 1e-5 or 0."
        )
        raise ValueError(msg)
    if weight and gauss_newton:
        msg = (
            f"orthogonality={weight} with curvature='gauss-newton': the term is a "
            "function of the weights and not of predictions, so the inner loss has no "
            "Gauss-Newton matrix. Set orthogonality=0, or take curvature='hessian'."
        )
        raise ValueError(msg)
    return weight


def check_base_weights(model: nn.Module, allowed: bool) -> None:
    """Refuse a model with trainable base weights.

    Args:
        model: the model.
        allowed: whether they may be trainable.

    Raises:
        ValueError: naming some of them.
    """
    names = trainable_base_weights(model)
    if names and not allowed:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        msg = (
            f"{len(names)} base weights are trainable ({shown}): they would be inner "
            "parameters, each with moments, copies and second derivatives. Freeze them "
            "with requires_grad_(False), or pass allow_base_weights=True."
        )
        raise ValueError(msg)


def _warn_of_frozen_head(model: nn.Module) -> None:
    names = frozen_new_head(model)
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        warnings.warn(
            f"the task head is newly initialised and frozen ({shown}): the adapter would "
            "be fitted to random outputs. Pass task_type='SEQ_CLS' (or modules_to_save="
            "['classifier']) to LoraConfig, or call requires_grad_(True) on it.",
            stacklevel=3,
        )
