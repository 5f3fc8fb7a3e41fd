"""Settings out of range or of another kind are refused at construction, by name.

The tables are made from the dataclasses: a new setting is tested without a new line.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import torchopt

from hypergrad import estimator_names, make_estimator
from hypergrad.estimators import registry as estimators
from hypergrad.products import (
    FiniteDifference,
    as_product,
    check_curvature,
    product_names,
)
from hypergrad.rules import SGD, Adam, AdamW, Clipped, Grouped, TorchOptRule
from hypergrad.solvers import make_solver, solver_names
from hypergrad.solvers import registry as solvers

# To pass what their types forbid.
sgd, clipped, grouped = cast("Any", (SGD, Clipped, Grouped))

NUMBERS = [math.nan, -1.0, "big", True, [0.1], 1j, torch.tensor(0.1)]
COUNTS = [-1, 1.5, math.nan, "3", True, None]
SWITCHES = ["yes", 1, None, math.nan]
NAMES = ["guess", None, 3, ["cg"], math.nan]
OBJECTS = ["sgd", 3, object]

# What a setting may be beside what its type says.
ALLOWED: dict[tuple[str, str], list[Any]] = {
    ("SGD", "dampening"): [-1.0],  # torch takes either sign
}


def bad_values(hint: Any) -> list[Any]:
    """Return values that a setting of this type must refuse."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    optional = types.NoneType in options
    if any(option is float for option in options):
        values = [*NUMBERS, None]
    elif int in options:
        values = COUNTS
    elif bool in options:
        values = SWITCHES
    elif str in options or any(typing.get_origin(o) is Literal for o in options):
        values = NAMES
    else:
        values = [*OBJECTS, None]
    if optional:
        values = [v for v in values if v is not None]
    return values


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def table(kinds: list[type]) -> Iterator[tuple[type, str, Any]]:
    for kind in kinds:
        if not dataclasses.is_dataclass(kind):
            continue
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            key = (kind.__name__, field.name)
            if not field.init:
                continue
            for value in bad_values(hints[field.name]):
                if value not in ALLOWED.get(key, []):
                    yield kind, field.name, value


def required(kind: type, name: str) -> dict[str, Any]:
    """Return the other settings that this kind cannot be made without."""
    given: dict[str, Any] = {"lr": 0.1, "rule": SGD(0.1), "max_norm": 1.0}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    return {
        n: given[n]
        for n, f in fields.items()
        if n != name
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    }


def classes(factories: Mapping[str, Any]) -> list[Any]:
    return [kind for kind in factories.values() if isinstance(kind, type)]


ESTIMATORS = classes(estimators._registry)
SOLVERS = classes(solvers._registry)
RULES: list[Any] = [SGD, Adam, AdamW, Clipped]


def label(value: Any) -> str:
    return getattr(value, "__name__", repr(value))


@pytest.mark.parametrize(
    ("kind", "name", "value"), list(table(ESTIMATORS + SOLVERS + RULES)), ids=label
)
def test_refused(kind: type, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        kind(**required(kind, name), **{name: value})
    text = str(caught.value)
    assert name in text, text
    # Shown as it was passed.
    assert repr(value) in text or str(value) in text, text


def test_the_table_has_every_estimator_solver_and_setting() -> None:
    rows = {(kind, name) for kind, name, _ in table(ESTIMATORS + SOLVERS + RULES)}
    assert {kind.name for kind in ESTIMATORS} == set(estimator_names())
    assert len(SOLVERS) == len(solver_names())
    for kind in filter(dataclasses.is_dataclass, ESTIMATORS + SOLVERS + RULES):
        for field in dataclasses.fields(kind):
            assert (kind, field.name) in rows, (kind, field.name)
    assert len(rows) > 60


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SGD(-0.1), r"lr=-0\.1 must be finite and at least 0\. Pass the value"),
        (
            lambda: Adam(0.1, betas=(1.0, 0.999)),
            r"betas\[0\]=1\.0 must be below 1: .* Pass e\.g\. 0\.9",
        ),
        (lambda: SGD(0.1, dampening=math.inf), "dampening=inf must be finite. Pass"),
        (lambda: sgd("0.1"), r"lr='0\.1' must be a number, got str\. Pass a plain"),
        (lambda: Clipped(SGD(0.1), 0.0), r"max_norm=0\.0 must be positive: .* Leave"),
        (
            lambda: clipped("sgd", 1.0),
            r"rule='sgd' must be a hypergrad.rules.Rule\. Pass",
        ),
        (lambda: grouped(((("a",), "sgd"),)), "the rule of group a='sgd' must be a"),
        (lambda: TorchOptRule(3), "must be a TorchOpt .*, got int. Pass e"),
        (lambda: TorchOptRule(torchopt.sgd(0.1), lr=-1.0), r"lr=-1\.0 must be finite"),
        (lambda: make_estimator("cg", max_iter=0), "max_iter=0 must be at least 1"),
        (
            lambda: make_estimator("cg", rtol=1.0),
            r"rtol=1\.0 must be in \[0, 1\): it is",
        ),
        (lambda: make_estimator("neumann", num_terms=0), "num_terms=0 .* pass scale"),
        (lambda: make_estimator("neumann", scale=-1), "scale=-1 must be 'auto' or pos"),
        (
            lambda: make_estimator("unrolled", num_steps=0),
            "num_steps=0 must be at least",
        ),
        (
            lambda: make_estimator("darts", inner_lr=0.0),
            r"inner_lr=0\.0 must be .* Pass",
        ),
        (
            lambda: FiniteDifference(radius=0.0),
            r"radius=0\.0 must be .* Pass None",
        ),
        (
            lambda: make_estimator("cg", product="fd"),
            "'fd' is unknown; choose one of 'auto', 'e",
        ),
        (
            lambda: make_solver("cg", on_failure="no"),
            "on_failure='no' must be 'warn', ",
        ),
    ],
    ids=label,
)
def test_texts(make: Callable[[], Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(0.0, dampening=-0.5, nesterov=True),
        lambda: sgd(np.float32(0.1)),
        lambda: Adam(1, eps=0.0, betas=(0.0, 0.0)),
        lambda: Clipped(SGD(0.1), math.inf),
        lambda: make_estimator("cg", rtol=0.0, damping=0),
        lambda: make_estimator("neumann", num_terms=0, scale=1),
        lambda: make_estimator("sama", rule=None, product=FiniteDifference(radius=1)),
        lambda: make_estimator("darts", inner_lr=1e300),
    ],
)
def test_at_the_edge_of_the_range(make: Callable[[], Any]) -> None:
    make()


@pytest.mark.parametrize("name", estimator_names())
def test_an_unknown_setting_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=rf"estimator {name!r} refused .*nonsense"):
        make_estimator(name, nonsense=1)


def test_unknown_names_list_the_known() -> None:
    for make, known in (
        (make_estimator, estimator_names()),
        (make_solver, solver_names()),
        (as_product, product_names()),
        (check_curvature, ["hessian", "gauss-newton"]),
    ):
        with pytest.raises(ValueError, match="'nope' is unknown; choose one") as caught:
            make("nope")
        assert all(name in str(caught.value) for name in known)
