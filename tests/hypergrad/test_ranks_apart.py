"""Ranks that part ways: in what is finite, what raises, settings, files, or kind of data.

What one rank meets decides for all, so that none waits for a message that never comes, and
parameters stay the same on each. Two ranks run in every test run, four with
`-m distributed`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad import (
    Accumulated,
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    make_estimator,
)
from hypergrad.products import FiniteDifference
from tests.faults import differences
from tests.hypergrad.rank_cases import (
    FAULT,
    LAYOUTS,
    STEPS,
    TABLE,
    Fault,
    bits,
    drawn,
    functional,
    look,
    of_module,
    optimizer,
    own,
    plain,
    train,
    values,
)
from tests.hypergrad.ranks import Outcomes, on_ranks, outcomes_of
from tests.tolerances import error, tol

pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
F64 = torch.float64
Params = dict[str, Tensor]

# -- numbers that are not finite, and losses that raise, on one rank -------------------


def with_poison(batch: Any, poison: str) -> Any:
    if isinstance(batch, Accumulated):
        *rest, last = batch
        parts = [*(m.batch for m in rest), {**last.batch, "poison": poison}]
        return Accumulated(parts, [m.weight for m in batch])
    return {**batch, "poison": poison}


def spoilt(name: str, level: str, poison: str, who: int) -> dict[str, Any]:
    """Train with one batch that is not fit for use, on one rank, and then go on."""
    data, rank = own("uneven"), dist.get_rank()
    opt = optimizer(of_module(), TABLE[name], outer_warmup=0)
    train(opt, data, range(3))
    inner, outer = data(100), data(101)
    if rank == who:
        inner = with_poison(inner, poison) if level == "inner" else inner
        outer = with_poison(outer, poison) if level == "outer" else outer
    before, raised, report = look(opt.problem, opt), "", None
    try:
        report = plain(opt.step(inner, outer))
    except NonFiniteError as failed:
        raised = str(failed)
    changed = differences(before, look(opt.problem, opt))
    counts = opt.n_inner_steps, opt.n_outer_steps, opt.n_skipped
    train(opt, data, range(3, STEPS))
    whole = None
    if raised:
        whole = optimizer(of_module(), TABLE[name], outer_warmup=0)
        train(whole, data, range(STEPS))
    return {
        "raised": raised,
        "report": report,
        "changed": changed,
        "counts": counts,
        "skipped": opt.n_skipped,
        "values": values(opt),
        "whole": values(whole) if whole else None,
    }


def broken(name: str, problem: str, who: int) -> dict[str, Any]:
    """Let each evaluation of each step raise on one rank, before the step succeeds."""
    rank, row = dist.get_rank(), TABLE[name]
    make = {"module": of_module, "functional": functional}[problem]
    opt = optimizer(make(), row, outer_warmup=0)
    whole = optimizer(make(), row, outer_warmup=0)
    seen: list[Any] = []
    # The first step looks at a problem, and the second knows it.
    for step in range(max(2, opt.outer_every + 1)):
        inner, outer = own("even")(2 * step), own("even")(2 * step + 1)
        if rank == who:
            inner, outer = with_poison(inner, "count"), with_poison(outer, "count")
        for place in range(1, 40):
            FAULT.update(calls=0, at=place, kind=Fault)
            before = look(opt.problem, opt)
            try:
                opt.step(inner, outer)
            except HypergradError as failed:
                # Where a graph is lost with the failure, it is built again.
                changed = differences(before, look(opt.problem, opt))
                seen.append((step, place, type(failed).__name__, str(failed), changed))
                continue
            break
        FAULT.update(at=0)
        whole.step(inner, outer)
    return {"seen": seen, "values": values(opt), "whole": values(whole)}


# -- ranks that are set up differently -------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "estimator": ({"estimator": "darts"}, {"estimator": "sama"}),
    "setting of it": (
        {"estimator": make_estimator("cg", max_iter=3)},
        {"estimator": make_estimator("cg", max_iter=4)},
    ),
    "product": (
        {"estimator": make_estimator("darts", product=FiniteDifference("forward"))},
        {"estimator": make_estimator("darts", product=FiniteDifference())},
    ),
    "outer_every": ({"outer_every": 1}, {"outer_every": 2}),
    "outer_warmup": ({"outer_warmup": 1}, {"outer_warmup": 2}),
    "max_grad_norm": ({"max_grad_norm": None}, {"max_grad_norm": 1.0}),
    "reuse_graph": ({"reuse_graph": True}, {"reuse_graph": False}),
    "inner optimizer": ({}, {"inner_optimizer": partial(torch.optim.SGD, lr=0.05)}),
    "outer optimizer": ({}, {"outer_optimizer": partial(torch.optim.Adam, lr=0.1)}),
    "inner rate": ({}, {"inner_optimizer": partial(torch.optim.AdamW, lr=0.06)}),
    "outer rate": ({}, {"outer_optimizer": partial(torch.optim.SGD, lr=0.2)}),
    "audit_every": ({}, {"audit_every": 2}),
    "audit_reference": (
        {"audit_every": 2, "audit_reference": "dense"},
        {"audit_every": 2, "audit_reference": "cg"},
    ),
    "audit_window": (
        {"audit_every": 2, "audit_window": 1},
        {"audit_every": 2, "audit_window": 2},
    ),
}


def differing() -> dict[str, str]:
    last = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, str] = {}
    for name, pair in SETTINGS.items():
        found[name] = refused(lambda given=pair[int(last)]: configured(**given))
    shape = (2,) if last else (3,)
    found["shapes"] = refused(lambda: configured(tiny(shape)))
    found["dtypes"] = refused(
        lambda: configured(tiny((2,), torch.float32 if last else F64))
    )
    found["names"] = refused(lambda: configured(tiny((2,), name="b" if last else "a")))
    for name, pair in SETTINGS.items():
        found[f"same {name}"] = refused(lambda given=pair[1]: configured(**given))
    configured().step(own("even")(0), own("even")(1))
    return found


def configured(problem: BilevelProblem | None = None, **given: Any) -> BilevelOptimizer:
    settings: dict[str, Any] = {
        "estimator": "darts",
        "inner_optimizer": partial(torch.optim.AdamW, lr=0.05),
        "outer_optimizer": partial(torch.optim.SGD, lr=0.1),
        **given,
    }
    return BilevelOptimizer(problem or of_module(), **settings)


def tiny(
    shape: tuple[int, ...], dtype: torch.dtype = F64, name: str = "a"
) -> BilevelProblem:
    def loss(i: Params, o: Params, batch: Any) -> Tensor:
        return (i[name] * o["lam"] - batch).square().sum()

    w = torch.ones(shape, dtype=dtype, requires_grad=True)
    lam = torch.ones((), dtype=dtype, requires_grad=True)
    return BilevelProblem(loss, loss, {name: w}, {"lam": lam})


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as failed:
        return str(failed)
    return ""


# -- checkpoints -----------------------------------------------------------------------


def saved(opt: BilevelOptimizer) -> bytes:
    file = io.BytesIO()
    torch.save({"values": values(opt), "optimizer": opt.state_dict()}, file)
    return file.getvalue()


def load(opt: BilevelOptimizer, data: bytes) -> None:
    found = torch.load(io.BytesIO(data), weights_only=True)
    problem = opt.problem
    with torch.no_grad():
        for name, t in {**problem.inner_params, **problem.outer_params}.items():
            t.copy_(found["values"][name])
    opt.load_state_dict(found["optimizer"])


def shared(data: bytes, source: int) -> bytes:
    """Return what one rank holds, on all."""
    box: list[Any] = [data]
    dist.broadcast_object_list(box, source)
    return box[0]


def resumed(name: str) -> dict[str, Any]:
    """Save one file for each rank and go on from it."""
    row, data = TABLE[name], own("uneven")
    opt = optimizer(of_module(), row)
    train(opt, data, range(4))
    file = saved(opt)
    anew = optimizer(of_module(), row)
    load(anew, file)
    same = differences(look(opt.problem, opt), look(anew.problem, anew))
    reports = train(opt, data, range(4, 7)), train(anew, data, range(4, 7))
    return {
        "same": same,
        "reports": reports,
        "values": (values(opt), values(anew)),
        "state": (opt.state_dict()["state"], anew.state_dict()["state"]),
    }


def resumed_from(name: str, source: str) -> dict[str, Any]:
    """Go on from files that are not each rank's own."""
    row, data, rank = TABLE[name], own("uneven"), dist.get_rank()
    opt = optimizer(of_module(), row)
    train(opt, data, range(5))
    file, ranks = saved(opt), dist.get_world_size()
    files = [shared(file, r) for r in range(ranks)]
    given = {"rank 0": files[0], "the next rank": files[(rank + 1) % ranks]}
    # All but the last rank have their own.
    given["another for one"] = files[0] if rank == ranks - 1 else files[rank]
    anew = optimizer(of_module(), row)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        load(anew, given[source])
    kept = len(anew.recorded_steps)
    reports = train(anew, data, range(5, 9))
    return {
        "warned": [str(w.message) for w in heard],
        "kept": kept,
        "reports": reports,
        "values": values(anew),
        "counts": (anew.n_inner_steps, anew.n_outer_steps, anew.n_skipped),
    }


def loaded_wrongly() -> dict[str, Any]:
    """Load a file of another estimator on the last rank."""
    last = dist.get_rank() == dist.get_world_size() - 1
    files = []
    for name in ("darts exact", "sama exact"):
        opt = optimizer(of_module(), TABLE[name])
        train(opt, own("even"), range(3))
        files.append(saved(opt))
    opt = optimizer(of_module(), TABLE["darts exact"])
    found = torch.load(io.BytesIO(files[int(last)]), weights_only=True)
    before, kind = look(opt.problem, opt), ""
    try:
        opt.load_state_dict(found["optimizer"])
    except (ValueError, HypergradError) as failed:
        kind = type(failed).__name__
    changed = differences(before, look(opt.problem, opt))
    train(opt, own("even"), range(3))
    return {"kind": kind, "changed": changed, "values": values(opt)}


# -- data that differs in kind ---------------------------------------------------------


def acts_on_some(name: str, batch: Any = None) -> dict[str, Any]:
    """Estimate where λ acts on the inner loss of rank 0 alone, and on no outer loss."""
    row = TABLE[name]
    estimator = make_estimator(row.name, **row.settings, **row.virtual)
    batch = dist.get_rank() == 0 if batch is None else batch
    w = torch.tensor([1.0, -2.0, 0.5], dtype=F64, requires_grad=True)
    lam = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def inner(i: Params, o: Params, batch: Any) -> Tensor:
        size = i["w"].square().sum()
        return o["lam"].exp() * size if batch else (i["w"] - 1).square().sum() + size

    problem = BilevelProblem(
        inner, lambda i, o, batch: (i["w"] - 2).square().sum(), {"w": w}, {"lam": lam}
    )
    return plain(estimator.estimate(problem, inner_batch=batch, outer_batch=None))


class Cube(torch.autograd.Function):
    """A function whose second derivative reads a number, which vmap cannot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return CubeSlope.apply(ctx.saved_tensors[0], grads[0])


class CubeSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, g = ctx.saved_tensors
        assert float(grads[0].abs().sum()) >= 0
        return 6 * x * g * grads[0], 3 * x**2 * grads[0]


def without_vmap_on_one(batch: Any = None) -> dict[str, Any]:
    """Take twenty products where rank 0 can take several at once, and others cannot."""
    batch = dist.get_rank() > 0 if batch is None else batch
    w = torch.linspace(-1, 1, 20, dtype=F64).requires_grad_()
    lam = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def inner(i: Params, o: Params, batch: Any) -> Tensor:
        cubed: Any = Cube.apply(i["w"]) if batch else i["w"] ** 3
        return (cubed * o["lam"] + i["w"].square()).sum() / 2

    problem = BilevelProblem(
        inner, lambda i, o, batch: (i["w"] - 2).square().sum(), {"w": w}, {"lam": lam}
    )
    estimator = make_estimator("nystrom", rank=20, damping=10.0, on_failure="return")
    return plain(estimator.estimate(problem, inner_batch=batch, outer_batch=None))


def coarse_on_one() -> dict[str, Any]:
    """Take differences where rank 0 computes its loss in bfloat16."""
    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    lam = torch.tensor(0.5, requires_grad=True)

    def inner(i: Params, o: Params, batch: Any) -> Tensor:
        x = i["w"].to(torch.bfloat16).float() if batch else i["w"]
        return (o["lam"].exp() * x.square()).sum()

    problem = BilevelProblem(
        inner, lambda i, o, batch: (i["w"] - 2).square().sum(), {"w": w}, {"lam": lam}
    )
    estimator = make_estimator("darts", inner_lr=0.1, product="finite-difference")
    batch = dist.get_rank() == 0
    return plain(estimator.estimate(problem, inner_batch=batch, outer_batch=None))


def too_few_on_one() -> str:
    """Ask for a fourth of a batch that has a single example on one rank."""
    rank = dist.get_rank()
    estimator = make_estimator(
        "darts", inner_lr=0.1, product="exact", product_fraction=0.25
    )
    batch = drawn(rank, 1 if rank == 0 else 8)
    problem = functional()
    try:
        estimator.estimate(problem, inner_batch=batch, outer_batch=drawn(3, 4))
    except HypergradError as failed:
        said = f"{type(failed).__name__}: {failed}"
    else:
        said = ""
    whole = make_estimator("darts", inner_lr=0.1, product="exact")
    whole.estimate(problem, inner_batch=batch, outer_batch=drawn(3, 4))
    return said


def without_memory_on_one() -> dict[str, Any]:
    """Let `auto` choose where second derivatives do not fit into one rank's memory."""
    rank = dist.get_rank()
    batch = LAYOUTS["even"](1, rank)
    if rank == dist.get_world_size() - 1:
        # The gradient is tried first, then the graph of a product.
        FAULT.update(calls=0, at=2, kind=torch.OutOfMemoryError)
        batch = with_poison(batch, "count")
    result = make_estimator("auto").estimate(
        functional(), inner_batch=batch, outer_batch=LAYOUTS["even"](2, rank)
    )
    return plain(result)


def without_inner(name: str) -> dict[str, Any]:
    lam = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)

    def loss(i: Params, o: Params, batch: Any) -> Tensor:
        return (o["lam"] - batch).square().sum()

    problem = BilevelProblem(loss, loss, {}, {"lam": lam})
    opt = BilevelOptimizer(
        problem,
        estimator=name,
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
    )
    rank = float(dist.get_rank())
    reports = [plain(opt.step(rank, rank)) for _ in range(2)]
    return {"reports": reports, "values": values(opt)}


# -- cases -----------------------------------------------------------------------------

NAN = [
    ("darts exact", "inner", "nan", 1),
    ("darts central", "inner", "infinity", 0),
    ("cg exact", "inner", "gradient", 1),
    ("three steps unrolled exact", "inner", "nan", 0),
]
SKIPPED = [
    ("first-order", "outer", "nan", 1),
    ("darts exact", "outer", "nan", 0),
    ("sama forward", "outer", "gradient", 1),
    ("cg exact", "outer", "infinity", 1),
    ("neumann central", "outer", "nan", 0),
    # Finite until a product is taken.
    ("darts exact", "inner", "curvature", 1),
    ("cg exact", "inner", "curvature", 0),
    ("one step unrolled exact", "inner", "curvature", 1),
]
BROKEN = [
    ("darts auto", "functional", 1),
    ("darts auto", "module", 1),
    ("darts exact", "module", 0),
    ("sama forward", "module", 1),
    ("cg exact", "functional", 0),
    ("neumann central", "module", 1),
    ("three steps unrolled exact", "module", 0),
    ("auto", "module", 1),
]
RESUMED = (
    "darts forward",
    "sama exact",
    "three steps unrolled exact",
    "cg warm",
    "auto",
)
FOREIGN = {
    "rank 0": ("darts exact", "three steps unrolled exact", "cg warm"),
    "the next rank": ("darts exact",),
    "another for one": ("darts exact", "three steps unrolled exact"),
}
ON_SOME = (
    "darts exact",
    "darts forward-over-reverse",
    "darts central",
    "darts forward",
    "cg exact",
    "cg central",
)


def named(kind: str, *parts: Any) -> str:
    return ", ".join(map(str, (kind, *parts)))


NAN_CASES = {named("nan", *c): partial(spoilt, *c) for c in NAN}
SKIPPED_CASES = {named("skipped", *c): partial(spoilt, *c) for c in SKIPPED}
BROKEN_CASES = {named("broken", *c): partial(broken, *c) for c in BROKEN}
RESUMED_CASES = {named("resumed", n): partial(resumed, n) for n in RESUMED}
FOREIGN_CASES = {
    named("foreign", n, source): partial(resumed_from, n, source)
    for source, names in FOREIGN.items()
    for n in names
}
ON_SOME_CASES = {named("on some", n): partial(acts_on_some, n) for n in ON_SOME}
EMPTY_CASES = {
    named("empty", n): partial(without_inner, n) for n in ("first-order", "auto")
}
CASES: dict[str, Callable[[], Any]] = {
    **NAN_CASES,
    **SKIPPED_CASES,
    **BROKEN_CASES,
    **RESUMED_CASES,
    **FOREIGN_CASES,
    **ON_SOME_CASES,
    **EMPTY_CASES,
    "settings": differing,
    "wrong file": loaded_wrongly,
    "vmap": without_vmap_on_one,
    "memory": without_memory_on_one,
    "part": too_few_on_one,
    "coarse": coarse_on_one,
}


@pytest.fixture
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return outcomes_of(request, tmp_path_factory)


def check_alike(found: Sequence[Any]) -> None:
    """Refuse ranks whose results differ in a bit."""
    for rank, other in enumerate(found[1:], start=1):
        assert differences(bits(found[0]), bits(other)) == [], f"rank {rank}"


COUNTS = ("n_forward", "n_backward", "n_hvp")


def uncounted(result: dict[str, Any]) -> dict[str, Any]:
    info = {k: v for k, v in result["info"].items() if k not in COUNTS}
    return {**result, "info": info}


# -- tests -----------------------------------------------------------------------------


@on_ranks(NAN_CASES, NAN_CASES)
def test_an_inner_step_is_taken_by_all_or_none(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    for each in found:
        assert "the inner loss" in each["raised"]
        assert each["raised"] == found[0]["raised"]
        assert each["changed"] == []
        assert each["counts"][0] == 3
        assert each["skipped"] == 0
        # As if that batch had never been.
        assert differences(bits(each["values"]), bits(each["whole"])) == []
    check_alike([each["values"] for each in found])


@on_ranks(SKIPPED_CASES, SKIPPED_CASES)
def test_an_outer_step_is_skipped_by_all_or_none(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    for each in found:
        assert each["raised"] == ""
        assert each["report"]["skipped"]
        assert each["report"]["skipped"] == found[0]["report"]["skipped"]
        assert not each["report"]["outer_step"]
        assert each["counts"] == (4, 3, 1)
        assert each["skipped"] == 1  # what came after was fit for use
    check_alike([each["values"] for each in found])


@on_ranks(BROKEN_CASES, BROKEN_CASES)
def test_what_raises_on_one_rank_undoes_the_step_of_all(
    outcomes: Outcomes, case: str
) -> None:
    found, who = outcomes.results(case), int(case[-1])
    said = f"rank {who} of {outcomes.ranks} failed: Fault: on purpose"
    for each in found:
        places = [entry[:4] for entry in each["seen"]]
        assert places == [entry[:4] for entry in found[0]["seen"]]
        assert len({step for step, *_ in places}) >= 2  # each step failed at first
        assert {(kind, text) for _, _, kind, text in places} == {("RankError", said)}
        assert [changed for *_, changed in each["seen"] if changed] == []
        assert differences(bits(each["values"]), bits(each["whole"])) == []
    check_alike([each["values"] for each in found])


@on_ranks(["settings"], ["settings"])
def test_ranks_that_are_set_up_differently_are_refused(
    outcomes: Outcomes, case: str
) -> None:
    found = outcomes.results(case)
    accepted = [
        name
        for name in found[0]
        if not name.startswith("same")
        and any("ranks differ in" not in each[name] for each in found)
    ]
    assert accepted == []
    for each in found:
        assert [n for n, text in each.items() if n.startswith("same") and text] == []


@on_ranks(RESUMED_CASES, RESUMED_CASES)
def test_a_file_for_each_rank_resumes_exactly(outcomes: Outcomes, case: str) -> None:
    for each in outcomes.results(case):
        assert each["same"] == []
        for went_on, resumed in (each["reports"], each["values"], each["state"]):
            # A problem that is new is looked through once more, which counts.
            apart = differences(bits(went_on), bits(resumed))
            assert [d for d in apart if not d.endswith("n_forward")] == []


@on_ranks(FOREIGN_CASES, FOREIGN_CASES)
def test_a_file_of_another_rank_has_no_data_of_this_one(
    outcomes: Outcomes, case: str
) -> None:
    found = outcomes.results(case)
    looks_back = "cg" not in case
    for each in found:
        told = [
            text for text in each["warned"] if "Save one file for each rank" in text
        ]
        assert len(told) == int(looks_back)
        assert each["kept"] == 0
        assert each["counts"][0] == 9
        assert each["counts"][2] == 0
        assert all(report["skipped"] is None for report in each["reports"])
        assert any(report["outer_step"] for report in each["reports"])
    check_alike([(each["values"], each["counts"]) for each in found])


@on_ranks(["wrong file"], ["wrong file"])
def test_a_file_that_does_not_fit_one_rank_is_refused_by_all(
    outcomes: Outcomes, case: str
) -> None:
    found = outcomes.results(case)
    for each in found:
        assert each["kind"]
        assert each["changed"] == []
    check_alike([each["values"] for each in found])


@on_ranks(ON_SOME_CASES)
def test_what_acts_on_one_rank_acts(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    check_alike([uncounted(each) for each in found])
    name = case.removeprefix("on some, ")
    truth = acts_on_some(name, Accumulated([True, False]))
    kind = "difference" if TABLE[name].scheme == "central" else "algebra"
    allowed = tol(F64, cond=10, kind=kind) if TABLE[name].scheme != "forward" else 1e-6
    assert error(found[0]["outer_grads"], truth["outer_grads"]) <= allowed
    assert found[0]["info"]["unused"] == ("outer_loss: lam",)


@on_ranks(["vmap"], ["vmap"])
def test_a_rank_that_cannot_vmap_sends_what_the_others_do(
    outcomes: Outcomes, case: str
) -> None:
    found = outcomes.results(case)
    check_alike([uncounted(each) for each in found])
    data = [False] + [True] * (outcomes.ranks - 1)
    truth = without_vmap_on_one(Accumulated(data))
    assert error(found[0]["outer_grads"], truth["outer_grads"]) <= 1e-12


@on_ranks(["memory"], ["memory"])
def test_auto_gives_way_where_one_rank_lacks_memory(
    outcomes: Outcomes, case: str
) -> None:
    found = outcomes.results(case)
    check_alike([{**uncounted(each)} for each in found])
    assert "does not fit into memory" in found[0]["info"]["reason"]
    assert "finite-difference" in found[0]["info"]["reason"]


@on_ranks(["part"], ["part"])
def test_a_batch_too_small_for_a_part_stops_all(outcomes: Outcomes, case: str) -> None:
    for said in outcomes.results(case):
        assert said.startswith(f"BatchError: rank 0 of {outcomes.ranks} failed: ")


@on_ranks(["coarse"], ["coarse"])
def test_ranks_differ_in_precision(outcomes: Outcomes, case: str) -> None:
    """The coarsest decides on the radius, and on what is sent."""
    check_alike([uncounted(each) for each in outcomes.results(case)])


@on_ranks(EMPTY_CASES)
def test_without_inner_parameters(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    check_alike(found)
    # λ against the mean of 0 and 1, by gradient descent at rate .1 on |λ - b|².
    lam = torch.tensor([1.0, 2.0], dtype=F64)
    for _ in range(2):
        lam = lam - 0.2 * (lam - 0.5)
    assert error(found[0]["values"], {"lam": lam}) <= tol(F64)
