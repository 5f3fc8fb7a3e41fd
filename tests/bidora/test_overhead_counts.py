"""Operations and reads of the steps on a 12-layer BERT: what the library adds, counted.

In units of one forward and backward pass of the same model with plain LoRA, which nothing
here can make shorter. Its own double backward takes 2.1 of them, and exact DoRA layers
add 0.5 to each product (1.3 before their second derivatives were closed forms).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks._counting import counted
from benchmarks._overhead_counts import (
    ESTIMATORS,
    draw_batch,
    iteration,
    passes,
    small_bert,
    trained,
)
from bidora import BiDoRAOptimizer
from hypergrad import make_estimator

# Reads of what lies on the host: random states, and step counts that torch keeps there.
HOST = ("hypergrad/rng.py", "hypergrad/rules/elementwise.py")
# On a CPU every exact DoRA layer looks for cancelled rows, and on accelerators none does.
ON_A_CPU_ALONE = ("bidora/dora/norms.py",)

BARS: dict[str, tuple[float, int]] = {
    "darts": (4.6, 4),
    "darts, exact": (5.7, 4),
    "sama": (4.7, 4),
    "unrolled, K = 5": (23.0, 4),
    "neumann, 5 terms": (19.8, 4 + 5),
    "cg, 5 iterations": (19.8, 4 + 5),
}
"""By estimator: operations of an outer step, and its reads, one for each product."""


def own_reads(counts: Any) -> int:
    return sum(
        number
        for place, number in counts.by_place.items()
        if place.startswith(("hypergrad/", "bidora/"))
        and not place.startswith((*HOST, *ON_A_CPU_ALONE))
    )


BARE: dict[str, Any] = {
    "outer_warmup": 0,
    "orthogonality": 0.0,
    "max_grad_norm": None,
}
"""No penalty and no clipping: what the levels cost by themselves."""


@pytest.fixture(scope="module")
def lora() -> Any:
    model = small_bert(12, torch.device("cpu"), dora=False)
    return passes(model, draw_batch(0, torch.device("cpu")))


@pytest.fixture(scope="module")
def base() -> Any:
    model = small_bert(12, torch.device("cpu"))
    BiDoRAOptimizer(model, "first-order")  # makes the forward exact
    assert len(trained(model)) == 74
    return passes(model, draw_batch(0, torch.device("cpu")))


def test_a_training_step(base: Any, lora: Any) -> None:
    assert base.operations <= 1.42 * lora.operations


@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
@pytest.mark.parametrize("label", BARS)
def test_steps(label: str, base: Any, lora: Any) -> None:
    name, settings = ESTIMATORS[label]
    device = torch.device("cpu")
    model = small_bert(12, device)
    opt = BiDoRAOptimizer(model, make_estimator(name, **settings), **BARE)
    found = iteration(opt, draw_batch(0, device), draw_batch(1, device))
    most, reads = BARS[label]
    assert found["outer"].operations <= most * lora.operations
    assert own_reads(found["outer"]) <= reads
    adamw = 742  # its own loop over 74 tensors
    assert found["inner"].operations - adamw <= 1.05 * base.operations
    assert own_reads(found["inner"]) <= 1


def test_an_exact_product_from_a_kept_graph(lora: Any) -> None:
    device = torch.device("cpu")
    model = small_bert(12, device)
    darts = make_estimator("darts", product="exact")
    opt = BiDoRAOptimizer(model, darts, reuse_graph=True, **BARE)
    found = iteration(opt, draw_batch(0, device), draw_batch(1, device))
    assert found["outer"].operations <= 4.3 * lora.operations
    assert own_reads(found["outer"]) <= 4


def test_reads_are_seen() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with counted() as counts:
        float(x.sum())
        bool((x > 0).all())
        torch.equal(x, x)
        x.tolist()
        x.nonzero()
    assert counts.reads == 5
