"""Raise at every place where something can fail, and look at all that could change.

The places that a call passes are counted while it goes well; then it is made to fail at
each of them, in each way.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hypergrad import BilevelProblem
from hypergrad.optimizer import BilevelOptimizer

__all__ = ["Faults", "break_everywhere", "content", "differences", "identities"]

KINDS: tuple[Callable[[], BaseException], ...] = (
    lambda: RuntimeError("on purpose"),
    lambda: KeyboardInterrupt("on purpose"),
    lambda: torch.OutOfMemoryError("on purpose"),
)

Make = Callable[["Faults"], tuple[BilevelProblem, BilevelOptimizer | None]]


class Faults:
    """Count the places that a run passes, and raise at a chosen one."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.at: int | None = None
        self.kind = KINDS[0]
        self.mess: Callable[[], Any] = lambda: None
        """What a loss that raises leaves behind."""

    def __call__(self, place: str) -> None:
        self.passed.append(place)
        if len(self.passed) == self.at:
            if place.endswith("a loss"):
                self.mess()
            raise self.kind()

    def watch(self, tensor: Tensor) -> Tensor:
        """Return the tensor; each backward pass through it passes a place."""
        return _Watch.apply(tensor, self)

    def loss(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the loss with a place before it and one after."""

        def watched(*args: Any) -> Tensor:
            self("before a loss")
            value = compute(*args)
            self("after a loss")
            return value

        return watched

    def steps(self, optimizer: torch.optim.Optimizer, level: str) -> None:
        """Pass a place before, within and after each step of a torch optimizer."""
        real = optimizer.step

        def step() -> None:
            self(f"before an {level} step")
            with _Midway(optimizer, lambda: self(f"within an {level} step")):
                real()
            self(f"after an {level} step")

        optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]


class _Watch(torch.autograd.Function):
    """The identity; its derivatives are too, and each passes a place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, faults: Faults) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.faults = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.faults("a backward pass")
        return _Watch.apply(grad, ctx.faults), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.faults("a tangent")
        return tangent.view_as(tangent)


class _Midway(TorchFunctionMode):
    """Call back once, when the first parameter of an optimizer was changed in place."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, call: Callable[[], None]
    ) -> None:
        super().__init__()
        own = (p for group in optimizer.param_groups for p in group["params"])
        self._ids = {id(p) for p in own}
        self._call: Callable[[], None] | None = call

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        moves = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if self._call is not None and moves and args and id(args[0]) in self._ids:
            call, self._call = self._call, None
            call()
        return out


# -- what could change ------------------------------------------------------------------


def content(problem: BilevelProblem, opt: BilevelOptimizer | None = None) -> Any:
    """Return all that a caller could see changed, bit for bit, as plain values."""
    numpy: Any = np.random.get_state(legacy=True)
    out: dict[str, Any] = {
        "parameters": [_plain(t) for t in problem.tensors],
        "requires_grad": [t.requires_grad for t in problem.tensors],
        "grads": [_plain(t.grad) for t in problem.tensors],
        "torch": _plain(torch.get_rng_state()),
        "numpy": (numpy[1].tobytes(), numpy[2:]),
        "python": random.getstate(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "filters": list(warnings.filters),
    }
    if problem.module is not None:
        modules = list(problem.module.modules())
        out["buffers"] = {n: _plain(b) for n, b in problem.module.named_buffers()}
        out["training"] = [m.training for m in modules]
        out["hooks"] = [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in modules
        ]
        out["attributes"] = [sorted(vars(m)) for m in modules]
    if opt is not None:
        order = {id(t): i for i, t in enumerate(problem.tensors)}
        out["state"] = {
            order.get(id(key), key): _plain(dict(slots))
            for key, slots in opt.state.items()
        }
        out["groups"] = [
            {k: _plain(v) for k, v in g.items() if k != "params"}
            for g in opt.param_groups
        ]
        out["progress"] = {
            name: _plain(value)
            for name, value in vars(opt._run).items()
            if name not in ("estimator", "window")
        }
        out["estimator"] = repr(opt.estimator)
        out["window"] = _plain(opt._run.window)
    return out


def identities(problem: BilevelProblem, opt: BilevelOptimizer | None = None) -> Any:
    """Return which objects are in which places."""
    out: dict[str, Any] = {
        "tensors": [(id(t), id(t.grad)) for t in problem.tensors],
        "hooks": [t._backward_hooks for t in problem.tensors],
    }
    if problem.module is not None:
        out["parameters"] = [(n, id(p)) for n, p in problem.module.named_parameters()]
        out["buffers"] = [(n, id(b)) for n, b in problem.module.named_buffers()]
    if opt is not None:
        own = [[id(p) for p in g["params"]] for g in opt.param_groups]
        out["groups"] = [own, id(opt.param_groups), [id(g) for g in opt.param_groups]]
        out["views"] = [
            opt.inner.state is opt.state,
            opt.outer.state is opt.state,
            [id(g) for g in (*opt.inner.param_groups, *opt.outer.param_groups)],
        ]
    return out


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (value.dtype, tuple(value.shape), flat.numpy().tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f.name for f in dataclasses.fields(value) if f.compare]
        return {name: _plain(getattr(value, name)) for name in shown}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# -- breaking things --------------------------------------------------------------------


class _Subject:
    """A problem with random generators of its own, so that two of them can take turns."""

    def __init__(self, make: Make) -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        self.faults = Faults()
        self.problem, self.opt = make(self.faults)
        self._random = _generators()

    def run(self, call: Callable[..., Any]) -> Any:
        """Return what the call returns, or the exception that it raises."""
        self.faults.passed.clear()
        self._restore()
        try:
            return call(self.problem, self.opt)
        except BaseException as error:
            return error
        finally:
            self._random = _generators()

    def look(self) -> Any:
        self._restore()
        return content(self.problem, self.opt), identities(self.problem, self.opt)

    def _restore(self) -> None:
        torch.set_rng_state(self._random[0])
        np.random.set_state(self._random[1])
        random.setstate(self._random[2])


def _generators() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()


def _was_broken(outcome: Any) -> bool:
    return isinstance(outcome, BaseException) and "on purpose" in str(outcome)


def break_everywhere(
    make: Make,
    call: Callable[..., Any],
    *,
    recovers: bool = False,
    anew: bool = False,
) -> list[str]:
    """Make a call fail at each of its places, in each way, and then succeed.

    Two equal subjects go the same way. The calls of one are broken before each of them
    succeeds, those of the other never. After each failure the one must be what it was,
    and after each success what the other is.

    Args:
        make: makes a subject, equal each time, that reports its places.
        call: the call.
        recovers: whether the library may find another way to succeed.
        anew: whether each place is tried on new subjects, with a graph that was kept;
            after a failure it is built again, and the call takes more evaluations.

    Returns:
        The places that the last call passed.
    """
    broken, whole = _Subject(make), _Subject(make)
    place, passed = 0, ["not known yet"]
    while place < len(passed):
        place += 1
        if anew:
            broken, whole = _Subject(make), _Subject(make)
        before = broken.look()
        for kind in KINDS:
            broken.faults.at, broken.faults.kind = place, kind
            outcome = broken.run(call)
            if not _was_broken(outcome):
                break
            assert type(outcome) is type(kind())
            changed = differences(before, broken.look())
            assert not changed, f"{kind()!r} at {broken.faults.passed}: {changed}"
        else:
            broken.faults.at = None
            outcome = broken.run(call)
        if isinstance(outcome, BaseException):
            raise outcome
        passed = list(broken.faults.passed)
        result = whole.run(call)
        if broken.faults.at is not None and place <= len(passed):
            assert recovers, f"no error after an exception at place {place}, {passed}"
            broken, whole = _Subject(make), _Subject(make)
            continue
        for got, wanted in (
            (_plain(outcome), _plain(result)),
            (broken.look()[0], whole.look()[0]),
        ):
            apart = set(differences(got, wanted))
            apart -= {".info.n_forward", ".info.n_backward"} if anew else set()
            assert not apart, f"after failures at place {place} of {passed}: {apart}"
        assert anew or passed == whole.faults.passed
    return passed
