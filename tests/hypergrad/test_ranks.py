"""Ranks that hold parts of the data do what one process does with all of it.

Two ranks run in every test run, four with `-m distributed`. The truth is one process on the
joined data: another order of sums, and nothing else. Ranks agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hypergrad import estimator_names, make_estimator
from hypergrad.products.difference import default_radius
from tests.faults import differences
from tests.hypergrad.rank_cases import (
    INNER,
    LAYOUTS,
    OUTER,
    STEPS,
    TABLE,
    Row,
    bits,
    functional,
    joined,
    look,
    of_module,
    optimizer,
    own,
    plain,
    train,
    values,
)
from tests.hypergrad.ranks import (
    Message,
    Outcomes,
    on_ranks,
    outcomes_of,
    recorded,
)
from tests.tolerances import error

pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
F64 = torch.float64

# -- what each rank does, and one process with all of the data ---------------------------


def estimated(name: str, layout: str) -> dict[str, Any]:
    row, problem, rank = TABLE[name], functional(), dist.get_rank()
    estimator = make_estimator(row.name, **row.settings, **row.virtual)
    before = look(problem)
    with recorded() as sent:
        result = estimator.estimate(
            problem,
            inner_batch=LAYOUTS[layout](1, rank),
            outer_batch=LAYOUTS[layout](2, rank),
        )
    changed = differences(before, look(problem))
    return {"result": plain(result), "sent": sent, "changed": changed}


def true_estimate(name: str, layout: str, ranks: int) -> dict[str, Any]:
    row = TABLE[name]
    estimator = make_estimator(row.name, **row.settings, **row.virtual)
    result = estimator.estimate(
        functional(),
        inner_batch=joined(layout, 1, ranks, whole=row.whole),
        outer_batch=joined(layout, 2, ranks, whole=row.whole),
    )
    return plain(result)


def trained(name: str, layout: str, **more: Any) -> dict[str, Any]:
    opt = optimizer(of_module(), TABLE[name], **more)
    reports = train(opt, own(layout), range(STEPS - 1))
    with recorded() as sent:
        reports += train(opt, own(layout), [STEPS - 1])
    return {
        "reports": reports,
        "sent": sent,
        "values": values(opt),
        "state": opt.state_dict()["state"],
    }


def truly_trained(name: str, layout: str, ranks: int) -> dict[str, Any]:
    row = TABLE[name]
    opt = optimizer(of_module(), row)
    data = partial(joined, layout, ranks=ranks, whole=row.whole)
    return {"reports": train(opt, data, range(STEPS)), "values": values(opt)}


def audited() -> dict[str, Any]:
    return trained("darts exact", "uneven", audit_every=1, audit_reference="unrolled")


ESTIMATES = {
    f"estimate, {name}, {layout}": partial(estimated, name, layout)
    for name in TABLE
    for layout in LAYOUTS
}
TRAININGS = {
    f"train, {name}, {layout}": partial(trained, name, layout)
    for name in TABLE
    for layout in LAYOUTS
}
CASES: dict[str, Callable[[], Any]] = {**ESTIMATES, **TRAININGS, "audit": audited}


@pytest.fixture
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return outcomes_of(request, tmp_path_factory)


# -- tests -------------------------------------------------------------------------------


def test_every_estimator_is_in_the_table() -> None:
    assert {row.name for row in TABLE.values()} == set(estimator_names())


EXACT = 1e-12
"""Sums in another order: some hundred roundings, and a solve with a condition below 50."""


def allowed(row: Row) -> float:
    """Return the relative error that another order of sums may make."""
    if not row.scheme:
        return EXACT
    # A difference divides the rounding of gradients by the distance.
    radius = default_radius(F64, row.scheme)  # pyright: ignore[reportArgumentType]
    return 10 * torch.finfo(F64).eps / radius


COUNTS = ("n_forward", "n_backward", "n_hvp")
"""What depends on how many micro-batches a rank has."""


def uncounted(value: Any) -> Any:
    """Return a nested value without them."""
    if isinstance(value, dict):
        return {k: uncounted(item) for k, item in value.items() if k not in COUNTS}
    if isinstance(value, list | tuple):
        return [uncounted(item) for item in value]
    return value


def check_alike(found: Sequence[Any]) -> None:
    """Refuse ranks whose results differ in a bit."""
    for rank, other in enumerate(found[1:], start=1):
        assert differences(bits(found[0]), bits(other)) == [], f"rank {rank}"


def numel(code: str, ranks: int) -> int:
    """Return the entries of a message; see `Row.sends`."""
    shapes = {"W": INNER, "L": OUTER, "V": {"loss": ()}}
    stacked = int(code[:-1]) if code[:-1].isdigit() else 1
    kinds = [shapes[letter] for letter in code.strip("0123456789'")]
    count = sum(torch.Size(s).numel() for kind in kinds for s in kind.values())
    count, names = stacked * count, sum(map(len, kinds))
    if code.endswith("L'"):  # a single number more
        count, names = count + 1, names + 1
    # Who failed, who has a loss, who used each name; the loss.
    return ranks + 1 + names + 1 + count


def spelled(codes: Sequence[str], n_hvp: int) -> list[str]:
    """Return the codes with as many products in the place of the dots as were taken."""
    if "…" not in codes:
        return list(codes)
    at = codes.index("…")
    sketched = sum(int(c[:-1]) for c in codes[:at] if c[:-1].isdigit())
    return [*codes[:at], *["W"] * (n_hvp - sketched - 1), *codes[at + 1 :]]


def check_messages(
    found: Sequence[list[Message]],
    codes: Sequence[str],
    n_hvp: int,
    *,
    agreements: int,
) -> None:
    """Refuse messages other than one for each gradient and product, of its size.

    Args:
        found: what each rank sent.
        codes: what it should have sent; see `Row.sends`.
        n_hvp: products that were taken.
        agreements: messages of a few numbers that may be among them.
    """
    ranks = len(found)
    for sent in found:
        assert sent == found[0]
        assert {m.call for m in sent} == {"all_reduce"}
        assert {d for m in sent for d in m.devices} == {torch.device("cpu")}
        # Agreements are smaller than any tree: a few numbers.
        small = [
            m for m in sent if m.numel <= ranks + 4 and {*m.dtypes} == {torch.float32}
        ]
        assert len(small) <= agreements
        trees = [m for m in sent if m not in small]
        assert {d for m in trees for d in m.dtypes} == {F64}
        assert [m.numel for m in trees] == [
            numel(code, ranks) for code in spelled(codes, n_hvp)
        ]


@on_ranks(ESTIMATES, [case for case in ESTIMATES if case.endswith("uneven")])
def test_estimate(outcomes: Outcomes, case: str) -> None:
    _, name, layout = case.split(", ")
    row, ranks, found = TABLE[name], outcomes.ranks, outcomes.results(case)
    results = [each["result"] for each in found]
    check_alike(uncounted(results))
    assert [each["changed"] for each in found] == [[]] * ranks
    truth, got = true_estimate(name, layout, ranks), results[0]
    assert error(got["direct"], truth["direct"]) <= EXACT
    assert error(got["indirect"], truth["indirect"]) <= allowed(row)
    assert abs(got["outer_loss"] - truth["outer_loss"]) <= EXACT * truth["outer_loss"]
    # What one rank alone uses is used.
    by_values = row.name == "zeroth-order"  # which do not tell
    assert got["info"]["unused"] == (() if by_values else ("outer_loss: log_decay",))
    # The first rank has one micro-batch, so that it counts each product once.
    n_hvp = got["info"]["n_hvp"]
    sent = [each["sent"] for each in found]
    check_messages(sent, row.sends.split(), n_hvp, agreements=2)


def of_a_step(row: Row) -> list[str]:
    """Return what a step with an outer one sends."""
    if row.name == "auto":
        return ["W", "WL", "L"]  # one step unrolled
    if row.trains:
        return row.trains.split()
    codes = row.sends.split()
    lookback = make_estimator(row.name, **row.settings).needs.lookback
    return [codes[0] if lookback else "W", *codes[lookback:]]


# Those that differ in what a training step keeps for them, and in what they keep.
SHORT = (
    "first-order",
    "darts exact",
    "darts auto",
    "darts forward",
    "darts part",
    "sama exact",
    "sama forward-over-reverse",
    "sama central",
    "cg exact",
    "cg warm",
    "cg preconditioned",
    "neumann gauss-newton",
    "nystrom exact",
    "one step unrolled exact",
    "three steps unrolled exact",
    "three steps unrolled finite-difference",
    "penalty",
    "f2sa four points",
    "pbgd-free",
    "two steps forward random",
    "zeroth-order",
    "zeroth-order two steps",
    "auto",
)


@on_ranks(
    [f"train, {name}, uneven" for name in SHORT] + ["train, darts exact, even"],
    [f"train, {name}, uneven" for name in TABLE] + ["train, darts exact, even"],
)
def test_training(outcomes: Outcomes, case: str) -> None:
    _, name, layout = case.split(", ")
    row, found = TABLE[name], outcomes.results(case)
    n_hvp = found[0]["reports"][-1]["info"]["n_hvp"]
    sent = [each["sent"] for each in found]
    # Once training goes on, only whether a batch can be divided is agreed upon.
    check_messages(sent, of_a_step(row), n_hvp, agreements=int("part" in name))
    check_alike(
        [
            (each["values"], each["state"], each["reports"])
            for each in map(uncounted, found)
        ]
    )
    truth = truly_trained(name, layout, outcomes.ranks)
    assert error(found[0]["values"], truth["values"]) <= allowed(row)
    for report, true in zip(found[0]["reports"], truth["reports"], strict=True):
        assert report["outer_step"] == true["outer_step"]
        assert report["skipped"] is None


@on_ranks(["audit"], ["audit"])
def test_audits(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    for each in found:
        audits = [r["audit"] for r in each["reports"] if r["outer_step"]]
        assert len(audits) == STEPS - 1
        assert all(a["cosine"] is not None for a in audits)
    check_alike([uncounted(each["reports"]) for each in found])
