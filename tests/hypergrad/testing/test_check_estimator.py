"""`check_estimator` can fail: an estimator for each law, which breaks that law alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from hypergrad import (
    Choice,
    HypergradError,
    HypergradEstimator,
    Hypergradient,
    Indirect,
    NonFiniteError,
    Point,
    make_estimator,
    tree,
)
from hypergrad.products import FiniteDifference
from hypergrad.rules import SGD
from hypergrad.testing import (
    LAWS,
    Checked,
    check_estimator,
    quadratic,
    two_layer_network,
)
from hypergrad.tree import Params

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
RATE = 0.1
counter = itertools.count(1)


def tenth(h: Tensor) -> Tensor:
    return RATE * torch.eye(len(h)).to(h)


@dataclass(frozen=True)
class Good(HypergradEstimator):
    """Take a tenth for the inverse Hessian."""

    def indirect(self, point: Point) -> Indirect:
        with point.product() as product:
            return Indirect(tree.scale(product.mixed_vjp(point.v), -RATE))

    def estimate(self, problem: Any, **more: Any) -> Hypergradient:
        return self.after(problem, super().estimate(problem, **more))

    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        del problem
        return result


def check(estimator: HypergradEstimator, **more: Any) -> Checked:
    settings = {"problems": {"quadratic": quadratic}, "dtypes": (F64,), **more}
    return check_estimator(estimator, **{"structures": ("plain",), **settings})


def test_a_good_one_passes() -> None:
    check_estimator(Good())
    check_estimator(Good(), exact_to=0.0, inverse=tenth)


# -- what comes out -----------------------------------------------------------------------


def first(params: Params, change: Callable[[Tensor], Tensor]) -> Params:
    return {n: change(t) if i == 0 else t for i, (n, t) in enumerate(params.items())}


def spoiled(kind: str, change: Callable[[Tensor], Tensor]) -> type[Good]:
    """Return an estimator that changes the first tensor of one part of its result."""

    class Spoiled(Good):
        def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
            return replace(result, **{kind: first(getattr(result, kind), change)})

    return Spoiled


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        (
            "outer_grads",
            Tensor.float,
            r"outer_grads\['shift'\] is \(2,\), torch.float32",
        ),
        ("direct", lambda t: t[:1], r"direct\['shift'\] is \(1,\)"),
        ("indirect", lambda t: t[None], r"indirect\['shift'\] is \(1, 2\)"),
        ("indirect", lambda t: t.clone().requires_grad_(), "has a graph"),
        ("indirect", lambda t: t * 1.01, r"direct \+ indirect is not outer_grads"),
        (
            "direct",
            lambda t: t.nextafter(t + 1),
            r"direct \+ indirect is not outer_grads",
        ),
    ],
    ids=[
        "dtype",
        "missing rows",
        "another shape",
        "graph",
        "sum",
        "last bit of the sum",
    ],
)
def test_form(kind: str, change: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check(spoiled(kind, change)())


class Nameless(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        return replace(result, direct={})


class Talkative(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        return replace(result, indirect={**result.indirect, "w": torch.zeros(3)})


class Nan(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        bad = tree.scale(result.direct, float("nan"))
        return replace(result, indirect=bad, outer_grads=tree.add(result.direct, bad))


class Numbers(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        state: Any = {"radius": 0.1}
        return replace(result, state=state)


class Unsteady(Good):
    """Another output for the same input, by a counter that no snapshot sees."""

    def indirect(self, point: Point) -> Indirect:
        return Indirect(
            tree.scale(super().indirect(point).grads, 1 + 1e-12 * next(counter))
        )


class Moody(Good):
    """Another output under torch.no_grad."""

    def indirect(self, point: Point) -> Indirect:
        return Indirect(super().indirect(point).grads)

    def estimate(self, problem: Any, **more: Any) -> Hypergradient:
        result = super().estimate(problem, **more)
        if torch.is_grad_enabled():
            return result
        half = tree.scale(result.indirect, 0.5)
        return replace(result, indirect=half, outer_grads=tree.add(result.direct, half))


class Offset(Good):
    """Not linear in the outer loss."""

    def indirect(self, point: Point) -> Indirect:
        plus = {n: t + 1e-9 for n, t in super().indirect(point).grads.items()}
        return Indirect(plus)


class Absolute(Good):
    """Moves w by v itself, however long it is."""

    def indirect(self, point: Point) -> Indirect:
        absolute = FiniteDifference(radius=1e-2 * tree.norm(point.v))
        with point.product(absolute) as product:
            return Indirect(tree.scale(product.mixed_vjp(point.v), -RATE))


class Overflowing(Good):
    """Takes the norm of v in its own dtype."""

    def indirect(self, point: Point) -> Indirect:
        size = torch.stack([t.square().sum() for t in point.v.values()]).sum().sqrt()
        unit = {n: t / size for n, t in point.v.items()}
        with point.product() as product:
            mixed = product.mixed_vjp(unit)
        return Indirect({n: -RATE * size * t for n, t in mixed.items()})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Nameless, "direct lacks 'shift'"),
        (Talkative, r"indirect has names that λ has not: \['w'\]"),
        (Nan, r"outer_grads\['shift'\] is not finite, and nothing raised"),
        (Numbers, "`state` holds something that is not a tensor"),
        (Unsteady, "the same inputs gave another output"),
        (Moody, "torch.no_grad changed the output"),
        (
            Offset,
            r"1.0e\+03 times the outer loss does not give as many times the indirect",
        ),
        (
            Absolute,
            "times the outer loss does not give as many times the indirect term",
        ),
    ],
)
def test_output(kind: type[Good], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check(kind())


def test_overflow_of_a_norm() -> None:
    check(Overflowing())  # float64 has room
    with pytest.raises(
        AssertionError, match=r"7.4e\+19 times the outer loss must not raise"
    ):
        check(Overflowing(), dtypes=(F32,))


# -- traces -------------------------------------------------------------------------------


class Moves(Good):
    """Moves w and adds back, which does not restore floats."""

    def indirect(self, point: Point) -> Indirect:
        with torch.no_grad():
            for t in point.problem.inner_params.values():
                t.add_(1e3).sub_(1e3)
        return super().indirect(point)


class MovesOuter(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        with torch.no_grad():
            for t in problem.outer_params.values():
                t.mul_(1 + 1e-15)
        return result


class LosesOnError(Good):
    """Restores w, but not where the loss raises."""

    def indirect(self, point: Point) -> Indirect:
        saved = tree.clone(point.problem.inner_params)
        with torch.no_grad():
            for t in point.problem.inner_params.values():
                t.mul_(2)
        part = super().indirect(point)
        with torch.no_grad():
            for n, t in point.problem.inner_params.items():
                t.copy_(saved[n])
        return part


class WritesGrad(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        for name, tensor in problem.outer_params.items():
            tensor.grad = result.outer_grads[name]
        return result


class ClearsGrad(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        for tensor in problem.inner_params.values():
            tensor.grad = None
        return result


class Freezes(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        for tensor in problem.inner_params.values():
            tensor.requires_grad_(False)
        return result


class DrawsTorch(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        torch.rand(())
        return result


class DrawsNumpy(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        np.random.rand()
        return result


class DrawsPython(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        random.random()
        return result


class StopsRecording(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        torch.set_grad_enabled(False)
        return result


class Evaluates(Good):
    """Leaves a module in eval mode."""

    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        if problem.module is not None:
            problem.module.eval()
        return result


class Normalises(Good):
    """Moves running statistics: a call outside of the problem's care."""

    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        if problem.module is not None:
            problem.inner_loss(problem.inner_params, problem.outer_params, None)
        return result


@dataclass(frozen=True)
class Remembers(Good):
    """Keeps its last answer."""

    memory: list[Tensor] = field(default_factory=list)

    def indirect(self, point: Point) -> Indirect:
        part = super().indirect(point)
        self.memory[:] = list(part.grads.values())
        return part


class Carries(Good):
    """Hands on state, and moves what it is given."""

    def indirect(self, point: Point) -> Indirect:
        last = point.state.get("calls", torch.zeros(()))
        return Indirect(super().indirect(point).grads, state={"calls": last.add_(1)})


@pytest.fixture
def _recording() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("_recording")
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Moves, "the estimate changed the parameter 'w'"),
        (MovesOuter, "the estimate changed the parameter 'shift'"),
        (LosesOnError, "the estimate changed the parameter 'w'"),
        (WritesGrad, "the estimate changed the .grad of 'shift'"),
        (ClearsGrad, "the estimate changed the .grad of 'w'"),
        (Freezes, "the estimate changed requires_grad of 'w'"),
        (DrawsTorch, "the estimate changed torch's random state"),
        (DrawsNumpy, "the estimate changed NumPy's random state"),
        (DrawsPython, "the estimate changed Python's random state"),
        (StopsRecording, "the estimate changed the grad mode"),
        (
            Evaluates,
            r"module .*: the estimate changed the mode \(train or eval\) of ''",
        ),
        (Normalises, "the estimate changed .*the buffer 'norm.running_mean'"),
        (Remembers, "the estimate kept something on `self`"),
        (Carries, "the estimate changed `state`"),
    ],
)
def test_traces(kind: type[Good], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check(kind())


def test_a_trace_left_by_a_failure_says_which() -> None:
    with pytest.raises(AssertionError) as caught:
        check(LosesOnError())
    notes = caught.value.__notes__
    assert "The estimate had an inner loss that raises from call 1 on." in notes


# -- edges --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swallows(Good):
    """Answers with zeros where it was asked to raise."""

    error: type[Exception] = Exception
    but_not: tuple[type[Exception], ...] = ()

    def estimate(self, problem: Any, **more: Any) -> Hypergradient:
        try:
            return super().estimate(problem, **more)
        except self.error as error:
            if isinstance(error, self.but_not):
                raise
            zeros = tree.zeros_like(problem.outer_params)
            return Hypergradient(zeros, zeros, zeros, 0.0)


class Renames(Good):
    """Raises another error than the loss did."""

    def estimate(self, problem: Any, **more: Any) -> Hypergradient:
        try:
            return super().estimate(problem, **more)
        except HypergradError:
            raise
        except Exception as error:
            raise ValueError("something went wrong") from error


@dataclass(frozen=True)
class Adds(Good):
    """Adds something to an indirect term that must be zeros."""

    where: str = ""

    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        hit = any(name.startswith(self.where) for name in result.info.unused)
        if not hit or any(t.any() for t in result.indirect.values()):
            return result
        more = {n: t + 1e-30 for n, t in result.indirect.items()}
        return replace(result, indirect=more, outer_grads=tree.add(result.direct, more))


class Restless(Good):
    """Resolves to another estimator each time."""

    def resolve(self, problem: Any, inner_batch: Any, rule: Any) -> Choice:
        return Choice(Restless())


class MovingChoice(Good):
    """Leaves a trace where it chooses."""

    def resolve(self, problem: Any, inner_batch: Any, rule: Any) -> Choice:
        torch.rand(())
        return Choice(self)


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (
            Swallows(NonFiniteError),
            "an inner loss that is NaN from call 1 on must raise NonFiniteError",
        ),
        (
            Swallows(HypergradError, (NonFiniteError,)),
            "an outer loss of constants must raise HypergradError",
        ),
        (
            Swallows(Exception, (HypergradError,)),
            "an inner loss that raises from call 1 on must raise _OnPurposeError",
        ),
        (Renames(), "must raise _OnPurposeError, not ValueError"),
        (
            Adds("outer_loss: w"),
            "f without w must give an indirect term of exact zeros",
        ),
        (Adds("inner_loss: shift"), "must give the direct term"),
        (Restless(), "what `resolve` returns must resolve to itself"),
        (MovingChoice(), "`resolve` changed torch's random state"),
    ],
)
def test_edges(estimator: Good, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check(estimator)


# -- truth --------------------------------------------------------------------------------


class Coarse(Good):
    """Rounds v to bfloat16."""

    def indirect(self, point: Point) -> Indirect:
        point.v = {n: t.to(BF16).to(t.dtype) for n, t in point.v.items()}
        return super().indirect(point)


class Layout(Good):
    """Takes tensors to lie in memory without gaps."""

    def indirect(self, point: Point) -> Indirect:
        (w,) = point.problem.inner_params.values()
        packed = w.detach().as_strided((w.numel(),), (1,))
        right = float(packed.sum() / w.detach().sum())
        return Indirect(tree.scale(super().indirect(point).grads, right))


class OneTensor(Good):
    """Forgets all tensors but the first."""

    def indirect(self, point: Point) -> Indirect:
        for n in list(point.v)[1:]:
            point.v[n] = 0 * point.v[n]
        return super().indirect(point)


class NeedsRows(Good):
    def indirect(self, point: Point) -> Indirect:
        assert all(
            len(t) for t in point.v.values()
        )  # a 0-dimensional tensor has no len
        return super().indirect(point)


class NeedsInner(Good):
    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        next(iter(problem.inner_params.values()))
        return result


def truth(estimator: HypergradEstimator, **more: Any) -> None:
    check(estimator, **{"exact_to": 1e-12, "inverse": tenth, **more})


def test_truth_of_one_step_is_not_that_of_the_inverse() -> None:
    truth(Good())
    with pytest.raises(AssertionError, match="of the indirect term is above exact_to"):
        truth(Good(), inverse=None)
    with pytest.raises(AssertionError, match="relative error 1 of the indirect term"):
        truth(make_estimator("first-order"))


def test_truth_by_dtype() -> None:
    # bfloat16 has 3 digits: too few for float32, enough for itself.
    truth(Coarse(), dtypes=(BF16,))
    for dtype in (F32, F64):
        with pytest.raises(
            AssertionError, match=f"quadratic, {dtype}, plain: relative"
        ):
            truth(Coarse(), dtypes=(dtype,))
    # Where the tolerance would be above a half, nothing is said: ε is 8e-3.
    ill = {"ill": lambda dtype: quadratic([1e-3, 1.0], dtype=dtype)}
    truth(Good(), inverse=None, dtypes=(BF16,), problems=ill)


def test_truth_allows_for_conditioning() -> None:
    # CG to a residual of rounding leaves an error of κ roundings.
    ill = {"ill": lambda dtype: quadratic([1e-6, 1e-3, 1.0], dtype=dtype)}
    cg = make_estimator("cg", rtol=0.0)
    check(cg, exact_to=0.0, problems=ill)
    with pytest.raises(AssertionError, match="above exact_to"):
        check(make_estimator("cg", rtol=0.0, damping=1e-9), exact_to=0.0, problems=ill)


@pytest.mark.parametrize(
    ("kind", "structure", "text"),
    [
        (Layout, "non-contiguous", "non-contiguous: relative error .* of the indirect"),
        (OneTensor, "many", "quadratic, torch.float64, many: relative error"),
        (OneTensor, "scalar", "quadratic, torch.float64, scalar: relative error"),
    ],
)
def test_truth_by_structure(kind: type[Good], structure: str, text: str) -> None:
    truth(kind(), structures=("plain", "one", "aliased", "empty"))
    with pytest.raises(AssertionError, match=text):
        truth(kind(), structures=("plain", structure))


@pytest.mark.parametrize(
    ("kind", "structure", "error"),
    [(NeedsRows, "scalar", TypeError), (NeedsInner, "empty", StopIteration)],
)
def test_an_error_of_the_estimator_says_where(
    kind: type[Good], structure: str, error: type[Exception]
) -> None:
    truth(kind(), structures=("plain", "many"))
    with pytest.raises(error) as caught:
        truth(kind(), structures=("plain", structure))
    if structure == "scalar":
        where = f"check_estimator was on quadratic, torch.float64, {structure}."
        assert where in caught.value.__notes__


def test_every_problem_and_dtype_is_tried() -> None:
    seen: set[tuple[str, torch.dtype]] = set()

    def make(name: str) -> Callable[..., Any]:
        def known(dtype: torch.dtype) -> Any:
            seen.add((name, dtype))
            return quadratic(dtype=dtype)

        return known

    check_estimator(Good(), problems={"a": make("a"), "b": make("b")})
    assert seen == {(n, d) for n in "ab" for d in (F64, F32, BF16)}


def test_an_approximation_is_held_to_the_laws_alone() -> None:
    problems = {"two-layer network": two_layer_network}
    unrolled = make_estimator("unrolled", num_steps=2, rule=SGD(0.1))
    check_estimator(unrolled, problems=problems, dtypes=(F64,), structures=("plain",))


# -- laws that are declared away ----------------------------------------------------------


@dataclass(frozen=True)
class Squared(Good):
    """Not linear in the outer loss: v is weighted by its own norm."""

    without_laws: ClassVar[Mapping[str, str]] = {"scale": "v is weighted by its norm"}

    def indirect(self, point: Point) -> Indirect:
        found = super().indirect(point)
        return Indirect(tree.scale(found.grads, tree.norm(point.v)))


class Undeclared(Squared):
    without_laws: ClassVar[Mapping[str, str]] = {}


class Overdeclared(Good):
    without_laws: ClassVar[Mapping[str, str]] = {
        "direction": "it is thought to point anywhere"
    }


class Misspelled(Good):
    without_laws: ClassVar[Mapping[str, str]] = {"linearity": "no such law"}


class Unreasoned(Squared):
    without_laws: ClassVar[Mapping[str, str]] = {"scale": ""}


class Tracked(Squared):
    """Breaks what may not be declared away, where the declared law is tried."""

    def after(self, problem: Any, result: Hypergradient) -> Hypergradient:
        for p in problem.inner_params.values():
            with torch.no_grad():
                p.add_(1e-9)
        return result


def test_a_declared_law_is_reported_and_not_skipped() -> None:
    found = check(Squared())
    assert found.declared == {"scale": "v is weighted by its norm"}
    assert set(found.held) == LAWS.keys() - {"scale"}
    assert "declared not to hold: scale (v is weighted by its norm)" in str(found)
    assert check(Good()).declared == {}
    assert str(check(Good())).count("\n") == 0


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (Undeclared(), "times the outer loss does not give as many times the indirect"),
        (Overdeclared(), "without the law 'direction', and it held wherever"),
        (Misspelled(), "'linearity'.*Name one of scale, direction"),
        (Unreasoned(), "'scale' .reason: ''.*and the reason"),
        (Tracked(), "the estimate changed the parameter 'w'"),
    ],
)
def test_declarations_that_are_wrong(estimator: Good, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check(estimator)
