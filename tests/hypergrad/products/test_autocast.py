"""A caller's autocast acts on the forward pass alone, as torch asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hypergrad import BilevelProblem
from hypergrad.batches import as_micro_batches
from hypergrad.products import Tally, gradients, second_order


def low() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def problem(inside: bool) -> tuple[BilevelProblem, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    batch = (torch.randn(8, 16), torch.randint(0, 3, (8,)))

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        if not inside:
            return nn.functional.cross_entropy(model(x).float(), y)
        with low():
            return nn.functional.cross_entropy(model(x).float(), y)

    return BilevelProblem.from_module(model, loss_fn, outer="0.bias"), batch


@pytest.mark.parametrize("order", [1, 2])
def test_around_the_call_equals_inside_the_loss(order: int) -> None:
    found = []
    for inside in (True, False):
        made, batch = problem(inside)
        tally, data = Tally(), as_micro_batches(batch)
        u = {n: torch.ones_like(t) for n, t in made.inner_params.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            if order == 1:
                g = gradients(made, "inner", data, tally)
                found.append({**(g.inner or {}), **(g.outer or {})})
            else:
                with second_order("exact", made, data, tally) as product:
                    found.append({**product.vjp(u)[0], **product.vjp(u)[1]})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
