"""Estimators by name: ours, those registered by hand, those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from hypergrad._checks import check_new_name
from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators.auto import Auto
from hypergrad.estimators.cg import ConjugateGradient
from hypergrad.estimators.darts import Darts
from hypergrad.estimators.f2sa import F2SA
from hypergrad.estimators.first_order import FirstOrder
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.neumann import Neumann
from hypergrad.estimators.nystrom import Nystrom
from hypergrad.estimators.pbgd_free import PBGDFree
from hypergrad.estimators.penalty import Penalty
from hypergrad.estimators.sama import Sama
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.estimators.zeroth_order import ZerothOrder

__all__ = ["estimator_names", "make_estimator", "register_estimator"]

Factory = Callable[..., HypergradEstimator]

_ENTRY_POINTS = "hypergrad.estimators"
_registry: dict[str, Factory] = {
    kind.name: kind
    for kind in (
        Auto,
        FirstOrder,
        Darts,
        Unrolled,
        Forward,
        Implicit,
        ConjugateGradient,
        Neumann,
        Nystrom,
        Sama,
        Penalty,
        F2SA,
        PBGDFree,
        ZerothOrder,
    )
}


def register_estimator(name: str, factory: Factory) -> None:
    """Make an estimator known by name.

    Installed packages do the same without a call, by an entry point of the group
    `hypergrad.estimators`.

    Args:
        name: lower-case letters, digits and hyphens.
        factory: a `HypergradEstimator` subclass, or a function that returns one's
            instance from settings.

    Raises:
        TypeError: `factory` is not callable.
        ValueError: the name is taken or not of that form.

    Example:
        >>> register_estimator("mine", FirstOrder)
        >>> make_estimator("mine")
        FirstOrder()
        >>> del _registry["mine"]
    """
    if not callable(factory):
        msg = f"factory must be callable, got {type(factory).__name__}."
        raise TypeError(msg)
    check_new_name("an estimator", name, _registry)
    _registry[name] = factory


def estimator_names() -> list[str]:
    """Return all names that `make_estimator` knows.

    Example:
        >>> estimator_names()[:2]
        ['auto', 'cg']
    """
    found = {point.name for point in entry_points(group=_ENTRY_POINTS)}
    return sorted(found | set(_registry))


def make_estimator(name: str, **settings: Any) -> HypergradEstimator:
    """Make an estimator by name.

    Args:
        name: one of `estimator_names()`.
        **settings: settings of its constructor.

    Returns:
        The estimator.

    Raises:
        TypeError: a setting that the estimator does not have.
        ValueError: an unknown name, or a setting out of range.

    Example:
        >>> make_estimator("unrolled", num_steps=2).needs.lookback
        2
    """
    factory = _registry.get(name)
    if factory is None:
        for point in entry_points(group=_ENTRY_POINTS, name=name):
            factory = point.load()
    if factory is None:
        known = ", ".join(estimator_names())
        msg = f"estimator {name!r} is unknown; choose one of {known}."
        raise ValueError(msg)
    try:
        return factory(**settings)
    except TypeError as error:
        msg = f"estimator {name!r} refused its settings {sorted(settings)}: {error}"
        raise TypeError(msg) from error
