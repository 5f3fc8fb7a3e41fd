"""What estimators give over a bfloat16 base, against float64."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import NumericalWarning, make_estimator
from hypergrad.products import FiniteDifference
from tests.bidora.low_precision import MODELS, after_one_step, relative
from tests.bidora.low_precision import truth as computed_truth

BF16 = torch.bfloat16


@functools.cache
def truth(name: str) -> Tensor:
    return computed_truth(name)


@functools.cache
def exact_error(name: str) -> float:
    exact = make_estimator("darts", product="exact")
    return relative(after_one_step(name, exact), truth(name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ["darts", "sama", "auto"])
def test_with_nothing_set_it_is_as_right_as_bfloat16_allows(
    name: str, estimator: str
) -> None:
    # With differences at the radius of float32 the same is 0.4 to 1.4 off.
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        found = after_one_step(name, estimator)
    assert relative(found, truth(name)) <= max(2 * exact_error(name), 0.05)


@pytest.mark.parametrize("scheme", ["central", "forward", "richardson"])
@pytest.mark.parametrize("name", MODELS)
def test_a_difference_takes_the_radius_of_the_base_and_knows_its_error(
    name: str, scheme: Any
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = after_one_step(
            name, make_estimator("darts", product=FiniteDifference(scheme))
        )
    power = {"central": 1 / 3, "forward": 1 / 2, "richardson": 1 / 5}[scheme]
    assert found.info.fd_radius == pytest.approx(torch.finfo(BF16).eps ** power / 2)
    error = relative(found, truth(name))
    assert found.info.fd_error is not None
    assert error / 3 < found.info.fd_error < 3 * error
    assert error < {"central": 0.1, "forward": 0.4, "richardson": 0.2}[scheme]
    told = [w for w in caught if "difference is off by about" in str(w.message)]
    assert len(told) == (found.info.fd_error > 0.1)


@pytest.mark.parametrize("radius", [0.02, 0.05, 0.08, 0.26])
@pytest.mark.parametrize("name", MODELS)
def test_the_error_of_other_radii_is_known_too(name: str, radius: float) -> None:
    product = FiniteDifference(radius=radius)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        found = after_one_step(name, make_estimator("darts", product=product))
    error = relative(found, truth(name))
    assert found.info.fd_error is not None
    assert error / 3 < found.info.fd_error < 3 * error
