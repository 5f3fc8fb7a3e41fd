"""One grouping of parameters for every method: what decays, and at which rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bidora.methods import METHODS
from bidora.methods.training import parameter_groups

ALL = METHODS.names()


def is_bias_or_norm(name: str) -> bool:
    return name.endswith("bias") or "LayerNorm" in name


def is_magnitude(name: str) -> bool:
    return "lora_magnitude_vector" in name


@pytest.mark.parametrize("name", ALL)
def test_biases_and_norms_never_decay(
    finished: Callable[[str], Any], name: str
) -> None:
    run = finished(name)
    for phase, found in run.groups.items():
        assert set(found) <= {n for n, _ in run.job.model.named_parameters()}
        assert any(is_bias_or_norm(n) for n in found)
        for parameter, (rate, decay) in found.items():
            fast = name == "lora-plus" and ("lora_B" in parameter or decay == 0.0)
            assert rate == pytest.approx(0.16 if fast else 1e-2), (phase, parameter)
            assert decay == (0.0 if is_bias_or_norm(parameter) else 0.1), parameter
        with_magnitudes = phase == "search" or name in ("dora", "dora-peft")
        assert any(map(is_magnitude, found)) == with_magnitudes


# Where nothing follows, the search has frozen the magnitudes that it held; and the probe
# has no optimizer.
@pytest.mark.parametrize(
    "name", [n for n in ALL if n not in ("bidora-no-retraining", "probe")]
)
def test_optimizers_hold_all_that_is_trained(
    finished: Callable[[str], Any], name: str
) -> None:
    run = finished(name)
    last = list(run.groups)[-1]
    trained = {n for n, p in run.job.model.named_parameters() if p.requires_grad}
    assert set(run.groups[last]) == trained


def test_magnitudes_have_a_rate_and_a_decay_of_their_own(
    finished: Callable[[str], Any],
) -> None:
    model = finished("dora").job.model
    decaying = {n for n, _ in model.named_parameters() if not is_bias_or_norm(n)}
    groups = parameter_groups(
        model, decaying, lr=0.1, weight_decay=0.2, magnitude_rate=0.3,
        magnitude_decay=0.4,
    )  # fmt: skip
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]
    }
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, values in found.items():
        inner = (0.1, 0.0 if is_bias_or_norm(name) else 0.2)
        assert values == ((0.3, 0.4) if is_magnitude(name) else inner), name


def test_a_rate_of_its_own_splits_a_group_and_comes_after_the_usual_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    decaying, rates = {"0.weight", "1.weight"}, {"0.weight": 0.01, "1.bias": 0.3}
    groups = parameter_groups(model, decaying, lr=0.1, weight_decay=0.2, rates=rates)
    names = {id(p): n for n, p in model.named_parameters()}
    told = [
        ([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"])
        for g in groups
    ]
    assert told == [
        (["1.weight"], 0.1, 0.2),
        (["0.bias"], 0.1, 0.0),
        (["0.weight"], 0.01, 0.2),
        (["1.bias"], 0.3, 0.0),
    ]


def test_frozen_parameters_are_in_no_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = parameter_groups(model, set(), lr=0.1, weight_decay=0.2)
    assert group["params"] == list(model[1].parameters())
    assert group["weight_decay"] == 0.0
