"""The contract of all estimators, and the registry."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from hypergrad import (
    HypergradEstimator,
    Indirect,
    Point,
    estimator_names,
    make_estimator,
    register_estimator,
)
from hypergrad.estimators import registry
from hypergrad.rules import SGD, AdamW
from hypergrad.testing import check_estimator

TABLE: list[tuple[str, dict[str, Any], float | None]] = [
    ("first-order", {}, None),
    ("darts", {"inner_lr": 0.1}, None),
    ("darts", {"inner_lr": 0.1, "product": "exact"}, None),
    ("darts", {"inner_lr": 0.1, "scheme": "forward"}, None),
    ("sama", {"rule": AdamW(0.1)}, None),
    ("sama", {"rule": AdamW(0.1), "product": "exact"}, None),
    ("unrolled", {"num_steps": 3, "rule": SGD(0.1, momentum=0.9)}, None),
    ("unrolled", {"num_steps": 500, "rule": SGD(0.2)}, 1e-6),
    ("cg", {}, 1e-6),
    ("cg", {"product": "finite-difference", "rtol": 1e-7}, 1e-6),
    ("neumann", {"num_terms": 150}, 1e-3),
    ("neumann", {"num_terms": 20, "product": "forward-over-reverse"}, None),
]


@pytest.mark.parametrize(("name", "settings", "exact_to"), TABLE)
def test_laws(name: str, settings: dict[str, Any], exact_to: float | None) -> None:
    check_estimator(make_estimator(name, **settings), exact_to=exact_to)


def test_every_registered_estimator_is_in_the_table() -> None:
    assert set(estimator_names()) == {name for name, _, _ in TABLE}


@dataclass(frozen=True)
class Doubled(HypergradEstimator):
    """An estimator that breaks a law on purpose: it moves the parameters."""

    name = "doubled"

    def indirect(self, point: Point) -> Indirect:
        with torch.no_grad():
            for t in point.problem.inner_params.values():
                t.mul_(2)
        return Indirect({n: 0 * t for n, t in point.problem.outer_params.items()})


def test_check_estimator_can_fail() -> None:
    with pytest.raises(AssertionError, match="the problem or random state changed"):
        check_estimator(Doubled())
    with pytest.raises(AssertionError, match="above exact_to"):
        check_estimator(make_estimator("first-order"), exact_to=1e-3)


def test_unknown_names_list_the_known() -> None:
    known = "cg, darts, first-order, neumann, sama, unrolled"
    with pytest.raises(ValueError, match=f"'newton' is unknown; choose one of {known}"):
        make_estimator("newton")
    for planned in ("nystrom", "auto"):
        with pytest.raises(ValueError, match=f"'{planned}' is not in this version"):
            make_estimator(planned)


def test_unknown_setting_is_named() -> None:
    with pytest.raises(TypeError, match=r"'cg' refused its settings \['steps'\]"):
        make_estimator("cg", steps=3)


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    register_estimator("doubled", Doubled)
    assert isinstance(make_estimator("doubled"), Doubled)
    with pytest.raises(ValueError, match="'doubled' is registered already"):
        register_estimator("doubled", Doubled)
    with pytest.raises(ValueError, match="lower-case letters"):
        register_estimator("Not OK", Doubled)
    with pytest.raises(TypeError, match="must be callable"):
        register_estimator("other", 3)  # pyright: ignore[reportArgumentType]


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("third", f"{__name__}:Doubled", registry._ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Doubled)

    def found(group: str, name: str = "third") -> list[EntryPoint]:
        assert group == "hypergrad.estimators"
        return [point] if name == "third" else []

    monkeypatch.setattr(registry, "entry_points", found)
    assert "third" in estimator_names()
    assert isinstance(make_estimator("third"), Doubled)
