"""Comparisons: distances against closed forms, costs, failures, and what is left alone."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelProblem,
    HypergradError,
    HypergradEstimator,
    Indirect,
    Info,
    Point,
    SecondOrderError,
    compare_estimators,
    make_estimator,
)
from hypergrad.compare import Comparison, Reference, Row
from hypergrad.compare._measure import peak_bytes
from hypergrad.compare._run import forwards_of
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.products import Tally
from hypergrad.rules import SGD
from hypergrad.steps import with_grads
from hypergrad.testing import ridge
from tests.tolerances import tol

CPU = torch.device("cpu")
MEBI = 2**20
compare = partial(compare_estimators, inner_batch=None, outer_batch=None, repeats=1)


def half(inner: dict[str, Tensor], outer: dict[str, Tensor], batch: Any) -> Tensor:
    del batch
    return (inner["w"] - outer["lam"]).square().sum() / 2


def small(
    inner_loss: Any = half, outer_loss: Any = half, dtype: torch.dtype = torch.float64
) -> BilevelProblem:
    w = torch.tensor([2.0, -1.0], dtype=dtype, requires_grad=True)
    lam = torch.tensor([1.0, 3.0], dtype=dtype, requires_grad=True)
    return BilevelProblem(inner_loss, outer_loss, {"w": w}, {"lam": lam})


@dataclass(frozen=True)
class Custom(HypergradEstimator):
    """Calls a function, so that a test says what it does."""

    act: Any = None

    def indirect(self, point: Point) -> Indirect:
        """Return zeros after the act."""
        self.act(point)
        return Indirect({n: 0 * t for n, t in point.problem.outer_params.items()})


def raising(error: BaseException) -> Custom:
    def act(point: Point) -> None:
        raise error

    return Custom(act)


# -- distances ------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["auto", "dense", "cg", "closed form"])
def test_distances_are_those_of_the_closed_forms(reference: Any) -> None:
    known = ridge(8)
    h, truth = known.hessian, known.outer_grads["penalty"]
    w = known.problem.inner_params["w"].detach()
    v = h @ (-truth / w)  # df/dλ = -w ∘ H⁻¹v
    scale = 0.9 / float(torch.linalg.eigvalsh(h)[-1])
    series, term = torch.zeros_like(v), v.clone()
    for _ in range(4):  # α Σ_{j≤3} (I - αH)^j v
        series, term = series + scale * term, term - scale * h @ term
    wanted = {"first-order": 0 * w, "darts": -0.05 * w * v, "neumann": -w * series}
    settings = {"first-order": {}, "darts": {"inner_lr": 0.05, "product": "exact"}}
    settings["neumann"] = {"num_terms": 3, "scale": scale}
    against = known.outer_grads if reference == "closed form" else reference
    found = compare(
        known.problem,
        {name: (name, settings[name]) for name in wanted},
        reference=against,
    )
    # κ(H) is below 100 here; the error is a ratio of about 1, the cosine likewise.
    near = tol(torch.float64, cond=100)
    for name, grad in wanted.items():
        row = found[name]
        error = float((grad - truth).norm() / truth.norm())
        assert row.indirect_error == pytest.approx(error, abs=near)
        assert row.error == pytest.approx(error, abs=near)  # there is no direct term
        if grad.any():
            cosine = float(grad @ truth / grad.norm() / truth.norm())
            assert row.indirect_cosine == pytest.approx(cosine, abs=near)
            assert row.cosine == pytest.approx(cosine, abs=near)
        else:
            assert row.indirect_cosine is row.cosine is None
    assert found.reference.indirect_share == pytest.approx(1.0, abs=near)
    ours = make_estimator("cg", max_iter=20, rtol=1e-14)
    row = compare(known.problem, ours, reference=against).rows[0]
    assert row.indirect_error is not None
    assert row.indirect_error < tol(torch.float64, cond=100)


def test_total_and_indirect_term_are_told_apart() -> None:
    # f = g: direct λ - w, and one SGD step of rate 1/4 adds (w - λ)/4; w*(λ) = λ adds
    # w - λ, so that the truth is 0 in total.
    found = compare(
        small(),
        {
            "darts": ("darts", {"inner_lr": 0.25, "product": "exact"}),
            "none": "first-order",
        },
        reference=make_estimator("unrolled", num_steps=1, rule=SGD(0.5)),
    )
    # The virtual steps end at λ + 3/4 and λ + 1/2 of w - λ: d = w - λ.
    # darts: direct -3/4 d, indirect 3/16 d. Reference: direct -d/2, indirect d/4.
    row = found["darts"]
    assert row.indirect_error == pytest.approx(0.25, rel=1e-12)
    assert row.error == pytest.approx((9 / 16 - 1 / 4) / (1 / 4), rel=1e-12)
    assert row.indirect_cosine == pytest.approx(1.0, rel=1e-12)
    # first-order: -d in all, where the reference has -d/4.
    assert found["none"].error == pytest.approx(3.0, rel=1e-12)
    assert found["none"].cosine == pytest.approx(1.0, rel=1e-12)
    assert found["none"].indirect_error == 1.0
    assert found.reference.indirect_share == pytest.approx(1.0, rel=1e-12)


def test_a_reference_without_indirect_term() -> None:
    def apart(inner: Any, outer: Any, batch: Any) -> Tensor:
        return outer["lam"].square().sum()

    found = compare(small(outer_loss=apart), ["first-order", "cg"])
    for row in found.rows:
        assert (row.indirect_error, row.indirect_cosine) == (0.0, None)
        assert row.error == 0.0
    wrong = found.rows[0].__class__("x", "", "steps", indirect_error=math.inf)
    as_json = Comparison((wrong,), found.reference, 1.0).to_dict()
    assert as_json["rows"][0]["indirect_error"] is None


# -- references ------------------------------------------------------------------------


def trained(estimator: Any = "unrolled", steps: int = 12) -> BilevelOptimizer:
    opt = BilevelOptimizer(
        small(),
        estimator=estimator,
        inner_optimizer=partial(torch.optim.AdamW, lr=0.05),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    for _ in range(steps):
        opt.inner_step(None)
    return opt


def test_auto_reference_unrolls_the_steps_and_says_so() -> None:
    opt = trained()
    names = ["unrolled", "sama", "cg", "first-order"]
    found = compare(opt.problem, names, steps=opt.recorded_steps)
    assert found.reference.estimator == "Unrolled(num_steps=5)"
    assert "5 inner steps" in found.reference.why
    assert found.reference.answers == "steps"
    assert found["unrolled"].indirect_error == 0.0
    answers = {row.label: row.answers for row in found.rows}
    assert answers == dict(
        zip(names, ["steps", "steps", "minimum", "neither"], strict=True)
    )
    text = str(found)
    assert "* cg" in text
    assert "another question, where the minimum" in text
    assert "* sama" not in text
    assert "* first-order" not in text


def test_references_that_are_passed() -> None:
    known = ridge(4)
    solved = make_estimator("cg", rtol=1e-14).estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    for reference in (solved, known.outer_grads, solved.outer_grads):
        found = compare(known.problem, ["cg"], reference=reference)
        assert (found.reference.answers, found.reference.forwards) == ("given", None)
        assert found["cg"].indirect_error is not None
        # The default stops at a residual of 1e-6.
        assert found["cg"].indirect_error < tol(torch.float64, 100, "solve", rtol=1e-6)
    for wrong in ({"penalty": torch.zeros(3)}, {"other": torch.zeros(4)}, {}):
        with pytest.raises(ValueError, match="names and shapes of outer_params"):
            compare(known.problem, ["cg"], reference=wrong)


def test_a_singular_hessian_is_left_to_conjugate_gradients() -> None:
    def flat(inner: Any, outer: Any, batch: Any) -> Tensor:
        return (inner["w"] - outer["lam"])[0].square() / 2

    found = compare(small(flat), ["cg"])
    assert found.reference.estimator.startswith("ConjugateGradient(")
    assert "singular" in found.reference.why
    with pytest.raises(HypergradError, match="singular"):
        compare(small(flat), ["cg"], reference="dense")


def test_a_reference_that_fails_says_so() -> None:
    with pytest.raises(HypergradError, match=r"reference .* failed.*on purpose"):
        compare(small(), ["cg"], reference=raising(RuntimeError("on purpose")))


# -- costs ------------------------------------------------------------------------------


def test_counts_are_those_of_info() -> None:
    opt = trained()
    names = ["first-order", "darts", "sama", "unrolled", "neumann", "cg"]
    found = compare(opt.problem, names, steps=opt.recorded_steps)
    # sama is not charged for the gradients that the records of unrolled were spared.
    assert not any(step.grads for step in opt.recorded_steps)
    steps = [with_grads(opt.problem, step, Tally()) for step in opt.recorded_steps]
    for name in names:
        info = (
            make_estimator(name)
            .estimate(opt.problem, inner_batch=None, outer_batch=None, steps=steps)
            .info
        )
        row = found[name]
        counts = (row.n_forward, row.n_backward, row.n_hvp)
        assert counts == (info.n_forward, info.n_backward, info.n_hvp)
        assert row.forwards == forwards_of(info)
        for field in ("residual_norm", "converged", "fd_error", "reason"):
            assert getattr(row, field) == getattr(info, field)
        assert row.seconds_min is not None
        assert row.seconds is not None
        assert row.seconds_max is not None
        assert 0 < row.seconds_min <= row.seconds <= row.seconds_max
        assert row.inner_gradients is not None
        assert row.inner_gradients > 0


@pytest.mark.parametrize(
    ("forward", "backward", "cost"),
    [
        (1, 1, 2),  # first-order: a gradient
        (3, 3, 6),  # darts, sama: a gradient of f and two of g
        (2, 3, 6),  # with an exact product: 2F, the graph 2F, the pass through it 2F
        (6, 11, 22),  # unrolled, K = 5: 2F and two gradients a step
        (2, 8, 16),  # neumann, 5 terms: 2F + 4F + 2F each
    ],
)
def test_forwards_follow_the_convention(forward: int, backward: int, cost: int) -> None:
    assert forwards_of(Info(n_forward=forward, n_backward=backward)) == cost


def test_each_runs_as_often_as_said_and_in_rotation() -> None:
    calls: list[str] = []
    estimators = {
        name: Custom(lambda point, name=name: calls.append(name)) for name in "abc"
    }
    told: list[tuple[int, int, str]] = []
    compare(
        small(),
        estimators,
        reference="dense",
        repeats=4,
        on_progress=lambda *heard: told.append(heard),
    )
    assert calls[:6] == ["a", "b", "c"] * 2
    assert "".join(calls[6:]) == "abcabcbcacab"  # the base takes a turn of its own
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {len(told)}
    assert told[0][2] == "reference"


def test_peak_of_memory_is_what_a_loss_allocates() -> None:
    def wasteful(inner: Any, outer: Any, batch: Any) -> Tensor:
        room = torch.zeros(64 * MEBI // 8, dtype=torch.float64)
        return half(inner, outer, batch) + 0 * room[0]

    # Custom takes no product: the one loss that is evaluated is the outer one.
    problem = small(outer_loss=wasteful)
    peaks = []
    for _ in range(2):
        row = compare(problem, {"it": Custom(lambda p: None)}, reference="dense").rows[
            0
        ]
        peaks.append(row.peak_bytes)
    plain = compare(small(), {"it": Custom(lambda p: None)}, reference="dense").rows[0]
    assert plain.peak_bytes is not None
    assert peaks[0] is not None
    assert peaks[0] == peaks[1], "equal calls give equal numbers"
    # What else a problem of four numbers and its random states take.
    assert 0 < plain.peak_bytes < MEBI
    assert 64 * MEBI <= peaks[0] <= 65 * MEBI


def test_peak_of_memory_counts_what_lives_at_once() -> None:
    def in_turn() -> None:
        for _ in range(3):
            torch.zeros(4 * MEBI, dtype=torch.uint8)

    def at_once() -> list[Tensor]:
        return [torch.zeros(4 * MEBI, dtype=torch.uint8) for _ in range(3)]

    held = torch.zeros(4 * MEBI, dtype=torch.uint8)  # before the call: not its own
    assert peak_bytes(in_turn, [CPU]) == 4 * MEBI
    assert peak_bytes(at_once, [CPU]) == 12 * MEBI
    assert peak_bytes(held.clone, [CPU]) == 4 * MEBI
    assert peak_bytes(in_turn, [torch.device("meta")]) is None


@pytest.mark.gpu
def test_peak_of_memory_on_a_gpu() -> None:
    cuda = torch.device("cuda", 0)
    held = torch.zeros(4 * MEBI, dtype=torch.uint8, device=cuda)
    assert peak_bytes(held.clone, [cuda]) == 4 * MEBI


# -- failures ---------------------------------------------------------------------------


def test_failures_are_rows_and_the_others_go_on() -> None:
    opt = trained()
    found = compare(
        opt.problem,
        {
            "short": ("unrolled", {"num_steps": 9}),
            "order": raising(SecondOrderError("no second derivative")),
            "memory": raising(torch.OutOfMemoryError("too much")),
            "fine": "cg",
        },
        steps=opt.recorded_steps,
    )
    assert [row.label for row in found.rows] == ["fine", "short", "order", "memory"]
    assert not found["fine"].failure
    assert "looks back at 9 inner steps but `steps` holds 5" in found["short"].failure
    assert found["order"].failure == "SecondOrderError: no second derivative"
    assert found["memory"].failure == "OutOfMemoryError: too much"
    for label in ("short", "order", "memory"):
        row = asdict(found[label])
        given = ("label", "estimator", "answers", "failure")
        assert all(not row[name] for name in row if name not in given)
        assert f"- {label} failed: " in str(found)


def test_without_steps_a_lookback_needs_a_rule() -> None:
    found = compare(small(), ["sama", ("darts", {"inner_lr": 0.1})])
    assert "set rule=" in found["sama"].failure
    virtual = found["darts(inner_lr=0.1)"]
    assert not virtual.failure
    assert virtual.reason.startswith("No steps were given: it took 1 virtual step")


def test_a_failure_in_a_later_run_counts() -> None:
    runs = itertools.count()

    def act(point: Point) -> None:
        if next(runs) == 2:
            raise RuntimeError("the third run")

    found = compare(small(), {"moody": Custom(act), "cg": "cg"})
    assert found["moody"].failure == "RuntimeError: the third run"
    assert found["moody"].seconds is None
    assert found["cg"].seconds is not None


def test_ctrl_c_ends_it() -> None:
    problem = small()
    before = problem.inner_params["w"].detach().clone()
    with pytest.raises(KeyboardInterrupt):
        compare(problem, {"it": raising(KeyboardInterrupt())})
    assert torch.equal(before, problem.inner_params["w"])


# -- nothing is touched -----------------------------------------------------------------


def everything(problem: BilevelProblem) -> list[bytes]:
    tensors = [
        *problem.tensors,
        *[t.grad for t in problem.tensors if t.grad is not None],
    ]
    if problem.module is not None:
        tensors += list(problem.module.buffers())
    numbers: Any = np.random.get_state(legacy=True)
    return [
        *(t.detach().numpy().tobytes() for t in tensors),
        torch.get_rng_state().numpy().tobytes(),
        numbers[1].tobytes(),
        repr(random.getstate()).encode(),
        repr(
            problem.module and [m.training for m in problem.module.modules()]
        ).encode(),
    ]


def test_the_problem_is_left_bit_for_bit() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
    )
    problem = BilevelProblem.from_module(
        model, lambda m, x: m(x).square().mean(), outer="3.*"
    )
    for tensor in problem.tensors:
        tensor.grad = torch.rand_like(tensor)
    grads = [t.grad for t in problem.tensors]
    x = torch.randn(6, 3)
    before = everything(problem)

    def leave_traces(point: Point) -> None:
        with torch.no_grad():
            for t in point.problem.tensors:
                t.mul_(2)
        point.problem.tensors[0].grad = None
        other = point.problem.tensors[1].grad
        assert other is not None
        other.zero_()
        model.eval()
        torch.rand(3)

    found = compare_estimators(
        problem,
        {
            "cg": "cg",
            "differences": ("neumann", {"product": "finite-difference"}),
            "virtual": ("unrolled", {"num_steps": 2, "rule": SGD(0.1)}),
            "breaks the law": Custom(leave_traces),
            "raises": raising(RuntimeError("on purpose")),
        },
        x,
        x,
        repeats=2,
    )
    assert everything(problem) == before
    assert [t.grad for t in problem.tensors] == grads, "the same tensors, too"
    failed = [row.label for row in found.rows if row.failure]
    assert failed == ["breaks the law", "raises"]
    assert "changed the problem's parameters" in found["breaks the law"].failure


def test_steps_can_be_used_afterwards() -> None:
    exact = make_estimator("darts", product="exact")
    results = []
    for looked in (False, True):
        opt = BilevelOptimizer(
            small(),
            estimator=exact,
            inner_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
            reuse_graph=True,
        )
        opt.inner_step(None)
        if looked:
            found = compare(opt.problem, [exact], steps=opt.recorded_steps)
            assert found.rows[0].n_forward == 2, "f, and g again"
        assert opt.outer_step(None).outer_step
        results.append(opt.problem.outer_params["lam"].detach().clone())
    assert torch.equal(*results)


# -- looking at it ----------------------------------------------------------------------


def made(points: list[tuple[float, float]], **more: Any) -> Comparison:
    rows = [
        Row(f"r{i}", "", "steps", indirect_error=y, forwards=x, **more)
        for i, (x, y) in enumerate(points)
    ]
    against = Reference("Unrolled(num_steps=5)", "it was passed", "steps", 1.0)
    return Comparison(tuple(rows), against, 0.1)


def test_pareto_front_is_that_of_its_definition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        # Few values, so that ties come in every kind.
        points = [
            (draw.randint(1, 4) * 1.0, draw.randint(0, 4) / 4)
            for _ in range(draw.randint(1, 7))
        ]
        # Not on the front: some other is no worse in both and better in one.
        beaten = set()
        for i, a in enumerate(points):
            for b in points:
                no_worse = b[0] <= a[0] and b[1] <= a[1]
                better = b[0] < a[0] or b[1] < a[1]
                if no_worse and better:
                    beaten.add(i)
        front = made(points).pareto()
        wanted = {f"r{i}" for i in range(len(points))} - {f"r{i}" for i in beaten}
        assert set(front) == wanted
        costs = [points[int(label[1:])][0] for label in front]
        assert costs == sorted(costs)


def test_recommendation_is_the_cheapest_that_points_there() -> None:
    def row(label: str, cost: float, cosine: float | None) -> Row:
        return Row(
            label,
            "",
            "steps",
            indirect_error=0.5,
            indirect_cosine=cosine,
            forwards=cost,
        )

    against = made([]).reference
    rows = (
        row("a", 2, None),
        row("b", 6, 0.98),
        row("c", 9, 0.995),
        row("d", 9, 0.999),
    )
    found = Comparison((*rows, row("e", 20, 1.0)), against, 0.1)
    assert found.recommend() == "d"
    assert found.recommend(0.97) == "b"
    assert found.recommend(0.9999) == "e"
    assert Comparison(rows, against, 0.1).recommend(0.9999) is None


def test_table_frame_and_json_agree(tmp_path: Path) -> None:
    opt = trained()
    found = compare(
        opt.problem,
        ["first-order", "darts", "unrolled", "cg", ("unrolled", {"num_steps": 9})],
        steps=opt.recorded_steps,
    )
    text = found.to_json(tmp_path / "found.json")
    data = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert data == json.loads(text)
    assert data["pareto"] == found.pareto()
    assert data["reference"] == asdict(found.reference)
    assert data["settings"]["steps"] == 5
    assert data["settings"]["inner_parameters"] == 2
    assert data["environment"]["torch"] == torch.__version__
    assert data["rows"] == [asdict(row) for row in found.rows]
    frame = found.to_frame()
    assert list(frame.columns) == [field.name for field in fields(Row)]
    for (_, got), row in zip(frame.iterrows(), found.rows, strict=True):
        for name, value in asdict(row).items():
            cell: Any = got[name]
            assert (
                cell == value if value is not None else np.isnan(float(cell or "nan"))
            )
    lines = found.table().splitlines()
    assert all(len(line) <= 100 for line in lines)
    order = [line[2:].split()[0] for line in lines[2:] if line.strip()][:4]
    assert order == [row.label for row in found.rows[:4]]
    errors = [row.indirect_error for row in found.rows[:4]]
    assert errors == sorted(errors, key=lambda error: error or 0.0)
    for row in found.rows[:4]:
        cells = next(
            line for line in lines if line[2:].startswith(f"{row.label} ")
        ).split()
        assert f"{row.forwards:.4g}" in cells
        assert f"{row.error:.1e}" in cells or row.error == 0.0


def test_table_fits_and_cuts_long_labels() -> None:
    rows = (Row("a" * 200, "", "steps", indirect_error=math.inf),)
    lines = Comparison(rows, made([]).reference, 0.1).table(90).splitlines()
    assert all(len(line) <= 90 for line in lines)
    assert "…" in lines[2]
    assert "inf" in lines[2]


def test_long_numbers_of_a_table_stay_apart() -> None:
    costs = {"seconds": 0.0592, "peak_bytes": 368, "forwards": 1.23456e6}
    rows = (Row("a", "", "steps", indirect_error=1.0, n_hvp=123456, **costs),)
    lines = Comparison(rows, made([]).reference, 0.1).table(100).splitlines()
    assert {"0.0592", "0.000351", "1.235e+06", "1.235e+05"} <= set(lines[2].split())
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


@pytest.mark.parametrize(
    "cost", ["forwards", "seconds", "inner_gradients", "peak_bytes"]
)
def test_picture_is_a_png_with_every_label(tmp_path: Path, cost: Any) -> None:
    found = compare(ridge(4).problem, ["first-order", "neumann", "cg", "sama"])
    figure = found.plot(tmp_path / "front.png", cost)
    content = (tmp_path / "front.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 10_000
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"first-order", "neumann", "cg"}
    assert "failed: sama" in figure.axes[0].get_title()


def test_labels_of_equal_points_do_not_cover_each_other() -> None:
    points = [(2.0, 1.0), *[(6.0, 0.9)] * 5, (22.0, 0.0), (16.0, 1.4), (46.0, 1.3)]
    figure = made(points).plot()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_nothing_to_draw_is_an_error() -> None:
    found = compare(small(), ["sama"])
    with pytest.raises(ValueError, match="1 rows, 1 failed"):
        found.plot()
    with pytest.raises(ValueError, match="'price' is unknown"):
        found.pareto("price")  # pyright: ignore[reportArgumentType]


# -- input ------------------------------------------------------------------------------


def test_labels() -> None:
    solver = make_estimator("cg", max_iter=3, rtol=1e-3)
    given = ["cg", ("cg", {"max_iter": 5}), ("neumann", {}), solver]
    labels = {row.label for row in compare(small(), given).rows}
    assert labels == {
        "cg",
        "cg(max_iter=5)",
        "neumann",
        "ConjugateGradient(max_iter=3, rtol=0.001)",
    }
    assert [row.label for row in compare(small(), {"mine": solver}).rows] == ["mine"]
    assert [row.label for row in compare(small(), "cg").rows] == ["cg"]
    with pytest.raises(KeyError):
        compare(small(), "cg")["darts"]


@pytest.mark.parametrize(
    ("estimators", "settings", "error", "message"),
    [
        ([], {}, ValueError, "estimators is empty"),
        (["cg", "cg"], {}, ValueError, "'cg' is listed twice"),
        (["magic"], {}, ValueError, "'magic' is unknown"),
        ([("cg", {"sweets": 1})], {}, TypeError, "sweets"),
        ([3], {}, TypeError, "estimators holds 3"),
        (7, {}, TypeError, "estimators holds 7"),
        (["cg"], {"reference": "magic"}, ValueError, "'magic' is unknown"),
        (["cg"], {"reference": 3}, TypeError, "reference=3"),
        (["cg"], {"reference": "unrolled"}, ValueError, "no inner steps"),
        (["cg"], {"repeats": 0}, ValueError, "repeats"),
        (["cg"], {"repeats": 1.5}, TypeError, "repeats"),
        (["cg"], {"steps": ["a"]}, TypeError, "steps holds a str"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    estimators: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(small(), estimators, **settings)
