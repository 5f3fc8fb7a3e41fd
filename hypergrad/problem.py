"""A bilevel problem: two losses over two named sets of leaf tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch.distributed as dist
from torch import Tensor, nn

from hypergrad import rng
from hypergrad._checks import (
    check_disjoint,
    check_module,
    check_names,
    check_scalar,
    check_tensor,
)
from hypergrad._learn import make_settings, make_start
from hypergrad._module_state import modes_of
from hypergrad._moved import moved
from hypergrad._session import Session
from hypergrad.modules import ModuleLoss, select_parameters
from hypergrad.reducer import Reducer
from hypergrad.tree import Params

__all__ = ["BilevelProblem", "Level", "Loss"]

Loss = Callable[[Params, Params, Any], Tensor]
"""`(inner_params, outer_params, batch) -> scalar`."""
Level = Literal["inner", "outer"]


class BilevelProblem:
    r"""Hold two losses and the tensors that each level moves.

    $$\min_\lambda f(w^*(\lambda), \lambda) \quad\text{s.t.}\quad
      w^*(\lambda) = \arg\min_w g(w, \lambda)$$

    Args:
        inner_loss: g, called as `inner_loss(inner_params, outer_params, batch)`;
            returns a scalar tensor.
        outer_loss: f, same signature; for `"zeroth-order"` it may return a number.
        inner_params: w, leaf tensors that require grad, by name. May be empty: the
            indirect term is then 0.
        outer_params: λ, likewise; at least one, or a learned setting or start.
        inner_outputs: for Gauss-Newton curvature: `(inner_params, outer_params, batch)
            -> outputs`, the predictions that `inner_criterion` scores.
        inner_criterion: `(outputs, batch) -> scalar`, so that
            `inner_loss = inner_criterion(inner_outputs(...), batch)`.
        inner_settings: settings of the inner optimizer that are learned, with start
            values: `{"lr": 1e-3, "weight_decay": 0.1}`. Of `lr`, `weight_decay` and
            `momentum` a number, or a list with one for each parameter group; of `betas` a
            pair, or a list of pairs; of `schedule` a list with a factor of the learning
            rate for each step of the inner run. Each becomes an outer parameter on a log
            scale, `log_lr`, or a logit scale, `logit_momentum`, and replaces what the
            inner optimizer was made with. What a scheduler or you make of the optimizer's
            own rate, relative to where that began, is a factor of the learned one.
        learn_start: whether w at the start of an inner run is learned, or names or
            patterns of the inner parameters for which it is. Each becomes an outer
            parameter, `start of NAME`.
        group: process group whose ranks each evaluate the losses on their own data, and
            average; None for all ranks, where torch.distributed is initialised.

    What is learned of the inner optimizer or the start is not handed to the losses.
    A tensor under two names in one set is kept once, under its first name; the other
    name is recorded in `aliases` and the losses still find it in their dictionary.

    Buffers and train/eval mode of a module are left as they are where the problem comes
    from `from_module`. What else a loss changes by itself cannot be seen from here.

    Raises:
        TypeError: a loss that is not callable, a value that is not a tensor, or one
            that is a shard of a distributed tensor.
        ValueError: an empty outer set; a name in both sets; a tensor that is frozen, not
            a leaf, not floating point, expanded, on the meta device, made in inference
            mode, in both sets, or that shares memory with another.

    Example:
        g(w, λ) = (w - λ)²/2 and f = w²/2: w*(λ) = λ, so df/dλ = λ = 3.

        >>> import torch
        >>> from hypergrad import make_estimator
        >>> w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> lam = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda inner, outer, batch: (inner["w"] - outer["lam"]) ** 2 / 2,
        ...     lambda inner, outer, batch: inner["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> result = make_estimator("cg").estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... )
        >>> round(result.outer_grads["lam"].item(), 12)
        3.0
    """

    def __init__(
        self,
        inner_loss: Loss,
        outer_loss: Loss | Callable[[Params, Params, Any], float],
        inner_params: Mapping[str, Tensor],
        outer_params: Mapping[str, Tensor],
        inner_outputs: Callable[[Params, Params, Any], Any] | None = None,
        inner_criterion: Callable[[Any, Any], Tensor] | None = None,
        *,
        inner_settings: Mapping[str, Any] | None = None,
        learn_start: bool | str | Sequence[str] = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, fn in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
            if not callable(fn):
                msg = (
                    f"{name} must be callable, got {type(fn).__name__}. Pass a function "
                    "(inner_params, outer_params, batch) -> scalar."
                )
                raise TypeError(msg)
        if (inner_outputs is None) != (inner_criterion is None):
            msg = (
                "inner_outputs and inner_criterion go together: Gauss-Newton needs the "
                "predictions and what scores them. Pass both or neither."
            )
            raise ValueError(msg)
        self.aliases: dict[str, str] = {}
        check_names(inner_params, outer_params)
        self.inner_params = self._own("inner_params", inner_params)
        self.outer_params = self._own("outer_params", outer_params)
        own = self.inner_params
        self.inner_settings, settings = make_settings(inner_settings, [*own.values()])
        """Learned settings of the inner optimizer, by outer parameter."""
        self.inner_start, start = make_start(learn_start, own, self.aliases)
        """Which outer parameter an inner one starts from, where that is learned."""
        check_names(self.outer_params, {**settings, **start})
        self.outer_params |= {**settings, **start}
        self.beside_losses = frozenset({*settings, *start})
        """Outer parameters that act in inner steps alone."""
        if not self.outer_params:
            msg = (
                "outer_params is empty: there is nothing to take a hypergradient of. "
                "Pass at least one leaf tensor that requires grad."
            )
            raise ValueError(msg)
        check_disjoint(self.inner_params, self.outer_params)
        self._losses = {"inner": inner_loss, "outer": outer_loss}
        self.inner_outputs = inner_outputs
        self.inner_criterion = inner_criterion
        self.reducer = Reducer(group)
        """Averages over the ranks of a data-parallel run."""
        self.module: nn.Module | None = None
        self._session: Session | None = None
        self.reported: set[str] = set()
        """Kinds of warnings that were given: each is given once for a problem."""
        self.units: dict[str, float] = {}
        """Rounding unit of what each kind of graph computed in; see `precision`."""
        self.inspected: set[str] = set()
        """Kinds of graph that were searched for what autograd cannot see through."""

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        outer: str
        | Sequence[str]
        | type[nn.Module]
        | Callable[[str, Tensor], bool]
        | None = None,
        outer_loss_fn: Callable[[Any, Any], Tensor | float] | None = None,
        inner_outputs: Callable[[Any, Any], Any] | None = None,
        inner_criterion: Callable[[Any, Any], Tensor] | None = None,
        inner_settings: Mapping[str, Any] | None = None,
        learn_start: bool | str | Sequence[str] = False,
        group: dist.ProcessGroup | None = None,
    ) -> BilevelProblem:
        """Split the trainable parameters of a module into inner and outer ones.

        Args:
            model: the module; parameters that do not require grad take no part.
            loss_fn: `(model, batch) -> scalar`, the inner loss.
            outer: which parameters are outer: names or shell-style patterns of names
                (`"*.magnitude"`), a module type (all its parameters), or a predicate
                `(name, parameter) -> bool`; None for none, where settings of the inner
                optimizer or the start are what is learned.
            outer_loss_fn: the outer loss; `loss_fn` where None.
            inner_outputs: for Gauss-Newton curvature: `(model, batch) -> outputs`, the
                predictions that `inner_criterion` scores, such as logits.
            inner_criterion: `(outputs, batch) -> scalar`.
            inner_settings: as for the class.
            learn_start: likewise.
            group: process group to average over; None for all ranks.

        Returns:
            A problem whose losses run the module as it is whenever they are called on
            the module's own tensors, and through `torch.func.functional_call` on any
            others.

        Raises:
            TypeError: `model` is not a module or is wrapped for several ranks, or
                `outer` is of no supported kind.
            ValueError: `outer` matches no trainable parameter.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> problem = BilevelProblem.from_module(
            ...     model, lambda m, x: m(x).square().mean(), outer="bias"
            ... )
            >>> sorted(problem.inner_params), sorted(problem.outer_params)
            (['weight'], ['bias'])
        """
        check_module(model)
        for name, fn in (("loss_fn", loss_fn), ("outer_loss_fn", outer_loss_fn)):
            if not callable(fn) and (fn is not None or name == "loss_fn"):
                msg = (
                    f"{name} must be callable, got {type(fn).__name__}. Pass a function "
                    "(model, batch) -> scalar."
                )
                raise TypeError(msg)
        every = dict(model.named_parameters(remove_duplicate=False))
        trainable = {n: p for n, p in every.items() if p.requires_grad}
        beside = bool(inner_settings or learn_start)
        none = outer is None and beside
        chosen = set() if none else select_parameters(model, trainable, outer)
        # A tied weight has several names; if one of them is outer, all are.
        outer_ids = {id(trainable[name]) for name in chosen}
        inner = {n: p for n, p in trainable.items() if id(p) not in outer_ids}
        outer_params = {n: p for n, p in trainable.items() if id(p) in outer_ids}
        inner_loss = ModuleLoss(model, loss_fn, _unique(trainable))
        outer_loss = ModuleLoss(model, outer_loss_fn or loss_fn, _unique(trainable))
        predict = inner_outputs
        if predict is not None:
            predict = ModuleLoss(model, predict, _unique(trainable))
        problem = cls(
            cast(Loss, inner_loss),
            cast(Loss, outer_loss),
            inner,
            outer_params,
            predict,
            inner_criterion,
            inner_settings=inner_settings,
            learn_start=learn_start,
            group=group,
        )
        problem.module = model
        return problem

    # -- evaluation ---------------------------------------------------------------

    def loss(
        self,
        level: Level,
        inner_params: Params,
        outer_params: Params,
        batch: Any,
        *,
        number: bool = False,
    ) -> Tensor:
        """Evaluate one loss and check that it is a scalar.

        Args:
            level: `"inner"` or `"outer"`.
            inner_params: w, the problem's own tensors or others of the same names.
            outer_params: λ, likewise.
            batch: handed to the loss as it is.
            number: whether a plain number will do, as it does where nothing is derived.

        Returns:
            The loss, of shape `()`.

        Raises:
            TypeError: the loss returned something that is not a tensor.
            ValueError: the loss is not a scalar.
        """
        fn = self._losses[level]
        value: Any = fn(*self._named(inner_params, outer_params), batch)
        like = self.tensors[0] if number else None
        return check_scalar(f"{level}_loss", value, like)

    def inner_loss(self, inner: Params, outer: Params, batch: Any) -> Tensor:
        """Evaluate g; see `loss`."""
        return self.loss("inner", inner, outer, batch)

    def outer_loss(self, inner: Params, outer: Params, batch: Any) -> Tensor:
        """Evaluate f; see `loss`."""
        return self.loss("outer", inner, outer, batch)

    def outputs(self, inner: Params, outer: Params, batch: Any) -> Any:
        """Evaluate the predictions that the inner loss scores.

        Args:
            inner: w.
            outer: λ.
            batch: handed on as it is.

        Returns:
            What `inner_outputs` returns.

        Raises:
            ValueError: the problem was made without `inner_outputs`.
        """
        if self.inner_outputs is None:
            msg = (
                "this problem has no inner_outputs: it was made from losses alone. Pass "
                "inner_outputs and inner_criterion to it."
            )
            raise ValueError(msg)
        return self.inner_outputs(*self._named(inner, outer), batch)

    def criterion(self, outputs: Any, batch: Any) -> Tensor:
        """Evaluate what the inner loss makes of predictions, and check it as `loss` does.

        Args:
            outputs: the predictions.
            batch: handed on as it is.

        Returns:
            What `inner_criterion` returns, of shape `()`.

        Raises:
            ValueError: the problem was made without `inner_criterion`.
        """
        if self.inner_criterion is None:
            msg = (
                "this problem has no inner_criterion: it was made from losses alone. "
                "Pass inner_outputs and inner_criterion to it."
            )
            raise ValueError(msg)
        return check_scalar("inner_criterion", self.inner_criterion(outputs, batch))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of both sets."""
        return [*self.inner_params.values(), *self.outer_params.values()]

    # -- moving and restoring -----------------------------------------------------

    def at(
        self,
        inner_params: Mapping[str, Tensor] | None = None,
        outer_params: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Move parameters in place for the block, and restore them bit for bit.

        The block must hold the whole evaluation: forward, backward and product. A
        graph kept past its end raises when it is used.

        Args:
            inner_params: values for some or all of w.
            outer_params: values for some or all of λ.

        Returns:
            A context; what does not fit is refused before anything moves.

        Raises:
            TypeError: a value that is not a tensor.
            ValueError: a name that the problem does not have, or another shape.

        Example:
            >>> import torch
            >>> w = torch.zeros(1, requires_grad=True)
            >>> lam = torch.zeros(1, requires_grad=True)
            >>> problem = BilevelProblem(
            ...     lambda i, o, b: i["w"].sum(),
            ...     lambda i, o, b: i["w"].sum(),
            ...     {"w": w},
            ...     {"lam": lam},
            ... )
            >>> with problem.at({"w": torch.ones(1)}):
            ...     w.item()
            1.0
            >>> w.item()
            0.0
        """
        own = {"inner": self.inner_params, "outer": self.outer_params}
        return moved(own, {"inner": inner_params or {}, "outer": outer_params or {}})

    def swapped(self, clones: Params) -> AbstractContextManager[None]:
        """Return a context with `clones` in the places of the inner parameters.

        Needed for a graph that outlives an optimizer step; pass the same clones as
        `inner_params` to the loss. For a functional problem this does nothing.

        Args:
            clones: replacements for some or all of w.

        Raises:
            ValueError: a name that the problem does not have.
        """
        loss = self._losses["inner"]
        return loss.placed(clones) if isinstance(loss, ModuleLoss) else nullcontext()

    @contextmanager
    def untouched(
        self,
        state: rng.RngState | None = None,
        training: tuple[bool, ...] | None = None,
        *,
        keep: bool = False,
    ) -> Iterator[Session]:
        """Leave random state, buffers and train/eval modes as they are.

        The block runs on copies of a module's buffers, so that nothing it saves is
        changed when it ends. Within another such block of the same problem this starts
        one more evaluation from where the outer one began: modules are looked up and
        generators read once, and put back at the end of the outer block.

        Args:
            state: random state that the block starts from; None for that of the outer
                block, or the present one.
            training: train/eval modes that the block runs in; likewise.
            keep: whether a graph that the block builds is used after it.

        Yields:
            What the blocks share.

        Raises:
            HypergradError: the block changed a buffer too large to be copied.
        """
        if self._session is not None:
            self._session.rewind(state, training, keep=keep)
            yield self._session
            return
        session = Session(self.module, self.tensors, state, training)
        self._session = session
        try:
            session.rewind(state, training, keep=keep)
            yield session
        finally:
            self._session = None
            session.close()

    @property
    def training(self) -> tuple[bool, ...] | None:
        """Train/eval modes of evaluations that have none of their own.

        Those that `untouched` began with, whatever a loss in its block has set since; None
        for a functional problem.
        """
        if self._session is not None:
            return self._session.training
        return None if self.module is None else modes_of(self.module)

    def set_modes(self, training: tuple[bool, ...] | None) -> None:
        """Set train/eval modes, within `untouched` and until its next evaluation.

        Args:
            training: as of a `MicroBatch`; None for those of `training`.
        """
        if self._session is not None:
            self._session.set_modes(training)

    def guarded(self) -> AbstractContextManager[object]:
        """Leave all as it is after the block, as `untouched`, but start no evaluation."""
        return self.untouched() if self._session is None else nullcontext()

    # -- internals ----------------------------------------------------------------

    def _own(self, kind: str, params: Mapping[str, Tensor]) -> Params:
        kept: Params = {}
        seen: dict[int, str] = {}
        for name, tensor in params.items():
            if not isinstance(tensor, Tensor):
                msg = (
                    f"{kind}[{name!r}] must be a tensor, got {type(tensor).__name__}. "
                    "Wrap it in torch.tensor(..., requires_grad=True)."
                )
                raise TypeError(msg)
            if id(tensor) in seen:
                self.aliases[name] = seen[id(tensor)]
                continue
            check_tensor(kind, name, tensor)
            seen[id(tensor)] = name
            kept[name] = tensor
        return kept

    def _named(self, inner: Params, outer: Params) -> tuple[Params, Params]:
        """Return both sets as the losses expect them."""
        if self.beside_losses:
            outer = {n: t for n, t in outer.items() if n not in self.beside_losses}
        if self.module is None and self.aliases:
            return self._with_aliases(inner), self._with_aliases(outer)
        return inner, outer

    def _with_aliases(self, params: Params) -> Params:
        out = dict(params)
        out.update({a: params[n] for a, n in self.aliases.items() if n in params})
        return out


def _unique(tensors: Mapping[str, Tensor]) -> Params:
    seen: set[int] = set()
    out: Params = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor
    return out
