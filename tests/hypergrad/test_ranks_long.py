"""Long walks back on ranks that share the data out: in few copies, and where they explode.

Two ranks run in every test run, four with `-m distributed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad import BilevelOptimizer, BilevelProblem, make_estimator
from hypergrad.rules import SGD
from tests.faults import differences
from tests.hypergrad.rank_cases import (
    bits,
    functional,
    joined,
    own,
    train,
    values,
)
from tests.hypergrad.ranks import Outcomes, on_ranks, outcomes_of, recorded
from tests.tolerances import error

F64, F32 = torch.float64, torch.float32
STEPS = 66
"""More than the 64 after which the host looks at the device on its way."""
COPIES = 5
EXACT = 1e-12
"""Sums in another order: some hundred roundings in each step, and steps contract."""

# -- few copies --------------------------------------------------------------------------


def walk(data: Callable[[int], Any], snapshots: Any) -> dict[str, Any]:
    """Take all steps, and one outer step through them."""
    opt = BilevelOptimizer(
        functional(),
        estimator=make_estimator("unrolled", num_steps=STEPS, snapshots=snapshots),
        inner_optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=STEPS + 1,
    )
    reports = train(opt, data, range(STEPS))
    kept = sum(step.is_snapshot for step in opt.recorded_steps)
    with recorded() as sent:
        report = opt.outer_step(data(STEPS))
    assert not any(report["outer_step"] for report in reports)
    assert report.info is not None
    return {
        "values": values(opt),
        "norms": report.info.adjoint_norms,
        "kept": kept,
        "sent": len([m for m in sent if m.dtypes == {F64}]),
    }


def walked() -> dict[str, Any]:
    return walk(own("even"), COPIES)


# -- an explosion ------------------------------------------------------------------------


def linear(dtype: torch.dtype) -> BilevelProblem:
    """g = h (w - λ)²/2 and f = s w, h and s from batches: adjoints of s (1 - η h)^k."""

    def leaf() -> Tensor:
        return torch.tensor(0.0, dtype=dtype, requires_grad=True)

    return BilevelProblem(
        lambda i, o, h: h * (i["w"] - o["lam"]) ** 2 / 2,
        lambda i, o, s: s * i["w"],
        {"w": leaf()},
        {"lam": leaf()},
    )


def curvature() -> float:
    """Of this rank's data; the mean over ranks is 3, so that adjoints double."""
    return 3.0 + dist.get_rank() - (dist.get_world_size() - 1) / 2


def explosion() -> Any:
    result = make_estimator("unrolled", num_steps=54, rule=SGD(1.0)).estimate(
        linear(F64), inner_batch=curvature(), outer_batch=1.0
    )
    return result.info.reason, result.info.adjoint_norms


def overflow() -> Any:
    opt = BilevelOptimizer(
        linear(F32),
        estimator=make_estimator("unrolled", num_steps=30),
        inner_optimizer=partial(torch.optim.SGD, lr=1.0),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
    )
    for _ in range(30):
        opt.inner_step(curvature())
    report = opt.outer_step(2.0**100)
    return report.skipped, opt.n_skipped, opt.problem.outer_params["lam"].item()


CASES: dict[str, Callable[[], Any]] = {
    "walk": walked,
    "explosion": explosion,
    "overflow": overflow,
}


@pytest.fixture
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return outcomes_of(request, tmp_path_factory)


# -- tests -------------------------------------------------------------------------------


@on_ranks(["walk"], ["walk"])
def test_a_walk_in_few_copies(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    for other in found[1:]:
        assert differences(bits(found[0]), bits(other)) == []
    assert 0 < found[0]["kept"] <= COPIES
    # Steps that are taken again have their averaged gradient on record: no message more
    # than that of ∂f and of a product for each step.
    assert found[0]["sent"] == 1 + STEPS
    truth = walk(partial(joined, "even", ranks=outcomes.ranks), "all")
    assert truth["kept"] == STEPS
    norms, known = (torch.tensor(x["norms"], dtype=F64) for x in (found[0], truth))
    assert error(norms, known) <= EXACT
    begun = functional().outer_params
    for n, there in truth["values"].items():
        assert error(found[0]["values"][n], there) <= EXACT, n
        if n in begun:
            assert not torch.equal(there, begun[n]), n


@on_ranks(["explosion"], ["explosion"])
def test_an_explosion_is_said_on_every_rank(outcomes: Outcomes, case: str) -> None:
    for outcome in outcomes.of[case]:
        reason, norms = outcome.result
        assert norms == tuple(2.0**k for k in range(53, -1, -1))
        assert "grew 9e+15-fold" in reason
        assert [text for text in outcome.warned if "grew 9e+15-fold" in text]


@on_ranks(["overflow"], ["overflow"])
def test_an_overflow_is_skipped_on_every_rank_alike(
    outcomes: Outcomes, case: str
) -> None:
    """Step 30 - j takes 3·2^(100 + j), and the sum over R ranks R times that.

    In float32 3·2^127 is too much, so the step is 30 - 27 + log2(R).
    """
    found = outcomes.results(case)
    assert all(each == found[0] for each in found)
    skipped, n_skipped, lam = found[0]
    number = 3 + math.log2(outcomes.ranks)
    assert f"walking back, at inner step {number:.0f} of 30" in skipped
    assert (n_skipped, lam) == (1, 0.0)
