"""First derivatives, what they leave untouched, and graphs kept from an inner step."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypergrad import (
    Accumulated,
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    SecondOrderError,
    tree,
)
from hypergrad.batches import as_micro_batches
from hypergrad.products import (
    DoubleBackward,
    Gradients,
    Hints,
    Tally,
    gradients,
    vjp_of,
)
from hypergrad.tree import Params
from tests.hypergrad.products.cases import (
    CASES,
    F64,
    Case,
    draw,
    filled,
    fit,
    leaf,
    normalised,
    rng,
    truth,
)
from tests.tolerances import error, tol

EXACT = tol(F64, cond=5)  # a normalisation, an exponential


def run(
    problem: BilevelProblem, batch: Any, level: Any = "inner", **how: Any
) -> Gradients:
    return gradients(problem, level, as_micro_batches(batch), Tally(), **how)


def plain(case: Case, level: str) -> tuple[float, Params]:
    """Value and gradient of the separate formula, by plain autograd."""
    params = {**case.problem.inner_params, **case.problem.outer_params}
    leaves = {n: leaf(t.detach().double().clone()) for n, t in params.items()}
    formula = case.formula if level == "inner" else case.outer_formula
    loss = formula(leaves, case.batch)
    parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {
        n: torch.zeros_like(t) if g is None else g
        for (n, t), g in zip(leaves.items(), parts, strict=True)
    }
    return loss.item(), grads


# -- values -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_equals_plain_autograd(name: str, level: str) -> None:
    case = CASES[name](F64)
    problem = case.problem
    loss, true = plain(case, level)
    g = run(problem, case.batch, level)
    assert g.loss == pytest.approx(loss, rel=EXACT)
    assert error(g.inner or {}, {n: true[n] for n in problem.inner_params}) < EXACT
    outer = {n: true[n] for n in problem.outer_params}
    if any(t.any() for t in outer.values()):
        assert error(g.outer or {}, outer) < EXACT
    else:
        assert g.outer is not None
        assert all(not t.any() for t in g.outer.values())


def test_only_what_is_asked_for() -> None:
    case = CASES["softmax"](F64)
    g = run(case.problem, case.batch, outer=False)
    assert g.outer is None
    assert set(g.inner or {}) == {"w", "b"}
    # The by-product alone, as a finite difference takes it.
    only = run(case.problem, case.batch, inner=False)
    assert only.inner is None
    assert only.outer is not None
    assert torch.equal(
        only.outer["log"], (run(case.problem, case.batch).outer or {})["log"]
    )
    neither = run(case.problem, case.batch, inner=False, outer=False)
    assert (neither.inner, neither.outer) == (None, None)
    assert neither.loss == g.loss


@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_micro_batches_add_up_with_their_weights(name: str) -> None:
    case = CASES[name](F64)
    x, y = case.batch
    n = len(x)
    parts = Accumulated([(x[:2], y[:2]), (x[2:], y[2:])], [2 / n, 1 - 2 / n])
    whole, split = run(case.problem, case.batch), run(case.problem, parts)
    assert split.loss == pytest.approx(whole.loss, rel=EXACT)
    if name == "softmax":  # its penalty is in each loss; the weights add up to 1
        assert sum(m.weight for m in split.batches) == 1.0
    assert error(split.inner or {}, whole.inner or {}) < EXACT
    assert error(split.outer or {}, whole.outer or {}) < EXACT


def test_unused_tensors_are_zeros_and_listed() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return (i["w"] * 3).sum()

    inner = {"w": leaf(torch.ones(2)), "idle": leaf(torch.ones(3))}
    problem = BilevelProblem(loss, loss, inner, {"l": leaf(torch.ones(()))})
    g = run(problem, None)
    assert g.unused == {"idle", "l"}
    assert (g.inner or {})["idle"].tolist() == [0, 0, 0]
    assert (g.outer or {})["l"].item() == 0
    assert (g.inner or {})["w"].tolist() == [3, 3]


def test_used_in_one_micro_batch_is_used() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return i[b].sum()

    inner = {"a": leaf(torch.ones(2)), "b": leaf(torch.ones(2))}
    problem = BilevelProblem(loss, loss, inner, {"l": leaf(torch.ones(()))})
    g = run(problem, Accumulated(["a", "b"]))
    assert g.unused == {"l"}
    assert (g.inner or {})["a"].tolist() == [0.5, 0.5]


def test_counts() -> None:
    case = CASES["softmax"](F64)
    tally = Tally()
    batches = as_micro_batches(Accumulated([case.batch] * 3))
    gradients(case.problem, "inner", batches, tally)
    assert (tally.n_forward, tally.n_backward, tally.n_hvp) == (3, 3, 0)


def test_parameters_and_grad_fields_are_not_touched() -> None:
    case = CASES["batch_norm"](F64)
    versions = [t._version for t in case.problem.tensors]
    held = torch.ones(1)
    case.problem.tensors[0].grad = kept = (
        torch.ones_like(case.problem.tensors[0]) * held
    )
    run(case.problem, case.batch)
    run(case.problem, case.batch, live=True, keep=True)
    assert [t._version for t in case.problem.tensors] == versions
    assert case.problem.tensors[0].grad is kept
    assert all(t.grad is None for t in case.problem.tensors[1:])


# -- live and replay --------------------------------------------------------------------


class Noisy(nn.Module):
    """Batch norm, dropout, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.norm(self.first(x)), 0.5, self.training)
        return self.second(h)


def noisy() -> tuple[BilevelProblem, Any]:
    make = rng()
    problem = BilevelProblem.from_module(filled(Noisy(), F64), fit, outer="norm.*")
    return problem, (draw(make, 6, 3), draw(make, 6, 2))


def bits(problem: BilevelProblem) -> list[Tensor]:
    assert problem.module is not None
    buffers = [b.clone() for b in problem.module.buffers()]
    return [torch.get_rng_state(), *buffers]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_replay_leaves_no_trace(keep: bool) -> None:
    problem, batch = noisy()
    before = bits(problem)
    first = run(problem, batch, keep=keep)
    assert same(before, bits(problem))
    second = run(problem, batch, keep=keep)
    assert same(before, bits(problem))
    assert torch.equal(
        (first.inner or {})["first.weight"], (second.inner or {})["first.weight"]
    )


def test_replay_comes_back_from_a_recorded_state() -> None:
    problem, batch = noisy()
    live = run(problem, batch, live=True)
    torch.rand(5)
    again = gradients(problem, "inner", live.batches, Tally())
    assert torch.equal(
        (live.inner or {})["first.weight"], (again.inner or {})["first.weight"]
    )


@pytest.mark.parametrize("keep", [False, True])
def test_live_advances_like_plain_training(keep: bool) -> None:
    problem, batch = noisy()
    state = torch.get_rng_state()
    before = bits(problem)
    run(problem, batch, live=True, keep=keep)
    after = bits(problem)
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    model = filled(Noisy(), F64)
    torch.set_rng_state(state)
    fit(model, batch).backward()
    assert torch.equal(torch.get_rng_state(), after[0])
    assert same([b.clone() for b in model.buffers()], after[1:])


def test_live_micro_batches_draw_one_after_another() -> None:
    problem, batch = noisy()
    g = run(problem, Accumulated([batch, batch]), live=True)
    first, second = (m.rng_state for m in g.batches)
    assert first is not None
    assert second is not None
    assert not torch.equal(first["cpu"], second["cpu"])


# -- a graph kept across an optimizer step ----------------------------------------------


class Block(nn.Module):
    """A normalised layer under dropout, with or without activation checkpointing."""

    def __init__(self, checkpointing: bool, rate: float) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 2)
        self.checkpointing = checkpointing
        self.rate = rate

    def block(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        return nn.functional.dropout(h, self.rate, self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointing:
            return self.second(self.block(x))
        h: Any = checkpoint(self.block, x, use_reentrant=False)
        return self.second(h)


def block_case(checkpointing: bool, rate: float) -> tuple[BilevelProblem, Any]:
    make = rng()
    model = filled(Block(checkpointing, rate), F64)
    problem = BilevelProblem.from_module(model, fit, outer="norm.*")
    return problem, (draw(make, 6, 3), draw(make, 6, 2))


def random_direction(problem: BilevelProblem) -> Params:
    make = torch.Generator().manual_seed(5)
    return {n: draw(make, *p.shape) for n, p in problem.inner_params.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_kept_graph_equals_recomputed_after_the_step(
    checkpointing: bool, rate: float
) -> None:
    problem, batch = block_case(checkpointing, rate)
    u = random_direction(problem)
    g = run(problem, batch, live=True, keep=True)
    before = tree.clone(problem.inner_params)
    optimizer = torch.optim.AdamW(problem.inner_params.values(), lr=0.3)
    for name, p in problem.inner_params.items():
        p.grad = (g.inner or {})[name]
    optimizer.step()
    torch.rand(3)
    kept = DoubleBackward().bind(
        problem, g.batches, Tally(), Hints(kept=g.graph, single_use=True)
    )
    value = kept.vjp(u)
    here = DoubleBackward().bind(problem, g.batches, Tally()).vjp(u)
    with problem.at(before):
        recomputed = DoubleBackward().bind(problem, g.batches, Tally()).vjp(u)
    for a, b, c in zip(value, recomputed, here, strict=True):
        assert error(a, b) < EXACT
        assert error(a, c) > 0.05  # the step moved the point


def test_kept_graph_of_a_functional_problem() -> None:
    case, known = CASES["shapes"](F64), truth("shapes", F64)
    g = run(case.problem, case.batch, live=True, keep=True)
    with torch.no_grad():
        for p in case.problem.inner_params.values():
            p.add_(1.0)
    product = DoubleBackward().bind(
        case.problem, g.batches, Tally(), Hints(kept=g.graph)
    )
    hvp, mixed = product.vjp(known.v)
    assert error(hvp, known.product(known.v, hvp)) < EXACT
    assert error(mixed, known.product(known.v, mixed)) < EXACT


def test_kept_graph_survives_evaluations_with_batch_norm() -> None:
    # Other evaluations must not change the running statistics that the graph saved.
    case, known = CASES["batch_norm"](F64), truth("batch_norm", F64)
    g = run(case.problem, case.batch, live=True, keep=True)
    run(case.problem, case.batch, "outer")
    product = DoubleBackward().bind(
        case.problem, g.batches, Tally(), Hints(kept=g.graph)
    )
    mixed = product.mixed_vjp(known.v)
    assert error(mixed, known.product(known.v, mixed)) < EXACT


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_graph_raises_where_lambda_moved(checkpointing: bool) -> None:
    problem, batch = block_case(checkpointing, 0.0)
    g = run(problem, batch, keep=True)
    with torch.no_grad():
        problem.outer_params["norm.weight"].add_(1.0)
    product = DoubleBackward().bind(problem, g.batches, Tally(), Hints(kept=g.graph))
    with pytest.raises(HypergradError, match=r"norm\.weight.*moved after the graph"):
        product.vjp(random_direction(problem))


def test_kept_graph_serves_once_where_it_is_single() -> None:
    problem, batch = block_case(False, 0.0)
    u = random_direction(problem)
    g = run(problem, batch, keep=True)
    assert g.graph is not None
    DoubleBackward().bind(
        problem, g.batches, Tally(), Hints(kept=g.graph, single_use=True)
    ).vjp(u)
    product = DoubleBackward().bind(problem, g.batches, Tally(), Hints(kept=g.graph))
    with pytest.raises(HypergradError, match="used already"):
        product.vjp(u)


def test_kept_graph_is_a_first_order_cost() -> None:
    problem, batch = block_case(False, 0.0)
    tally = Tally()
    g = gradients(problem, "inner", as_micro_batches(batch), tally, keep=True)
    product = DoubleBackward().bind(
        problem, g.batches, tally, Hints(kept=g.graph, single_use=True)
    )
    product.mixed_vjp(random_direction(problem))
    assert (tally.n_forward, tally.n_backward, tally.n_hvp) == (1, 2, 1)


def test_kept_graph_wants_one_micro_batch() -> None:
    case = CASES["softmax"](F64)
    with pytest.raises(ValueError, match="one micro-batch, not of 2"):
        run(case.problem, Accumulated([case.batch] * 2), keep=True)


@pytest.mark.parametrize("also", [0.0, 1.0])
def test_kept_graph_refuses_a_loss_with_a_tensor_of_its_own(also: float) -> None:
    w = leaf(torch.ones(2, dtype=F64))

    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return (w**2).sum() * o["l"] + also * (i["w"] ** 2).sum() + i["v"].sum()

    inner = {"w": w, "v": leaf(torch.ones(2, dtype=F64))}
    problem = BilevelProblem(loss, loss, inner, {"l": leaf(torch.ones((), dtype=F64))})
    assert (run(problem, None).inner or {})["w"].tolist() == [2 * (1 + also)] * 2
    with pytest.raises(HypergradError, match=r"w .*read the problem's own"):
        run(problem, None, keep=True)


# -- what is refused --------------------------------------------------------------------


class Reentrant(nn.Module):
    """Reentrant checkpointing of the last layer, or of the first, whose input is data."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 2)
        self.gate = nn.Parameter(torch.ones(2))
        self.early = first
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        def run(layer: nn.Module, x: Tensor, on: bool) -> Any:
            return checkpoint(layer, x, use_reentrant=True) if on else layer(x)

        h = run(self.first, x, self.on and self.early)
        return run(self.second, h, self.on and not self.early) * self.gate


@pytest.mark.parametrize(
    "early", [False, True], ids=["raises in torch", "None in torch"]
)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_is_refused(early: bool, keep: bool) -> None:
    model = filled(Reentrant(early), F64)
    problem = BilevelProblem.from_module(model, fit, outer="gate")
    batch = (draw(rng(), 4, 3), draw(rng(), 4, 2))
    with pytest.raises(HypergradError, match=r"reentrant.*use_reentrant.*False"):
        run(problem, batch, keep=keep)
    with pytest.raises(HypergradError, match="reentrant"):
        run(problem, batch, keep=keep)  # a second time too
    model.on = False  # pyright: ignore[reportArgumentType]
    assert run(problem, batch, keep=keep).unused == frozenset()


@pytest.mark.parametrize(
    "early", [False, True], ids=["raises in torch", "None in torch"]
)
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_switched_on_later_is_refused(early: bool) -> None:
    model = filled(Reentrant(early), F64)
    problem = BilevelProblem.from_module(model, fit, outer="gate")
    batch = (draw(rng(), 4, 3), draw(rng(), 4, 2))
    model.on = False  # pyright: ignore[reportArgumentType]
    run(problem, batch)
    model.on = True  # pyright: ignore[reportArgumentType]
    with pytest.raises(HypergradError, match="reentrant"):
        run(problem, batch)


def test_warnings_of_a_loss_reach_the_caller() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        warnings.warn("from the loss", UserWarning, stacklevel=1)
        return (i["w"] * o["l"]).sum()

    problem = BilevelProblem(
        loss, loss, {"w": leaf(torch.ones(2))}, {"l": leaf(torch.ones(()))}
    )
    for _ in range(2):
        with pytest.warns(UserWarning, match="from the loss"):
            run(problem, None)


def test_a_loss_without_any_inner_parameter_is_refused() -> None:
    def detached(i: Params, o: Params, b: Any) -> Tensor:
        return (i["w"].detach() * o["l"]).sum()

    w = leaf(torch.ones(2))
    problem = BilevelProblem(detached, detached, {"w": w}, {"l": leaf(torch.ones(()))})
    with pytest.raises(HypergradError, match=r"none of the 1 inner parameters \(w\)"):
        run(problem, None)
    # That is no error where the gradient in λ alone is asked for, or for the outer loss.
    assert (run(problem, None, inner=False).outer or {})["l"].item() == 2.0
    assert run(problem, None, "outer").unused == {"w"}


def test_a_loss_that_needs_no_gradient_at_all() -> None:
    def constant(i: Params, o: Params, b: Any) -> Tensor:
        return torch.ones(())

    problem = BilevelProblem(
        constant, constant, {"w": leaf(torch.ones(2))}, {"l": leaf(torch.ones(()))}
    )
    with pytest.raises(HypergradError, match="depends on none"):
        run(problem, None)
    assert run(problem, None, "outer").unused == {"w", "l"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_loss_that_is_not_finite(bad: float, level: str) -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return (i["w"] * o["l"]).sum() * bad

    problem = BilevelProblem(
        loss, loss, {"w": leaf(torch.ones(2))}, {"l": leaf(torch.ones(()))}
    )
    with pytest.raises(NonFiniteError, match=f"the {level} loss is {bad}"):
        run(problem, None, level)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return i["w"].norm() * 0 + i["root"].sqrt().sum() + o["l"]

    inner = {"w": leaf(torch.ones(2)), "root": leaf(torch.zeros(2))}
    problem = BilevelProblem(loss, loss, inner, {"l": leaf(torch.ones(()))})
    with pytest.raises(NonFiniteError, match=r"not finite in root, although .* is 1\."):
        run(problem, None)


@pytest.mark.parametrize("level", ["inner_params", "outer_params"])
def test_a_tensor_frozen_since(level: str) -> None:
    case = CASES["softmax"](F64)
    params = getattr(case.problem, level)
    name = next(iter(params))
    params[name].requires_grad_(False)
    with pytest.raises(HypergradError, match=f"{name} no longer requires grad"):
        run(case.problem, case.batch)


# -- callers' modes ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", [False, True])
def test_the_callers_mode_does_not_matter(mode: Any, keep: bool) -> None:
    case = CASES["batch_norm"](F64)
    true = plain(case, "inner")[1]
    with mode():
        g = run(case.problem, case.batch, keep=keep, live=True)
        replayed = run(case.problem, case.batch)
    for value in (g, replayed):
        assert error(value.inner or {}, {n: true[n] for n in value.inner or {}}) < EXACT
    assert not any(t.is_inference() for t in (g.inner or {}).values())
    if keep:
        assert g.graph is not None
        u = truth("batch_norm", F64).v
        mixed = (
            DoubleBackward()
            .bind(case.problem, g.batches, Tally(), Hints(kept=g.graph))
            .mixed_vjp(u)
        )
        assert error(mixed, truth("batch_norm", F64).product(u, mixed)) < EXACT


def test_autocast_around_the_call_does_not_serve_stale_casts() -> None:
    # Autocast keeps casts by tensor; without care the second point gives the first's
    # gradient, and the module of the caller runs on a point that is gone.
    def loss(i: Params, o: Params, b: Any) -> Tensor:
        return nn.functional.linear(b, i["w"]).float().square().sum() * o["l"]

    w = leaf(torch.ones(1, 2))
    problem = BilevelProblem(loss, loss, {"w": w}, {"l": leaf(torch.ones(()))})
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (run(problem, x).outer or {})["l"].item() == 4.0
        with problem.at({"w": torch.full((1, 2), 3.0)}):
            assert (run(problem, x).outer or {})["l"].item() == 36.0
        assert nn.functional.linear(x, w).item() == 2.0


def test_no_grad_before_within_one_autocast_does_not_cut_the_graph() -> None:
    model = nn.Linear(2, 1)
    problem = BilevelProblem.from_module(
        model, lambda m, x: m(x).float().square().sum(), outer="bias"
    )
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model(x)  # leaves casts without a graph in autocast's cache
        assert run(problem, x).unused == frozenset()


# -- vjp_of -----------------------------------------------------------------------------


def test_vjp_of() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])

    def fn(a: Tensor, b: Tensor) -> list[Tensor]:
        return [a * a, a.detach() * 2]

    with torch.no_grad():
        parts = vjp_of(fn, [a, b], [torch.ones(2), torch.ones(2)])
    assert parts[0].tolist() == [2.0, 4.0]
    assert parts[1].tolist() == [0.0, 0.0]
    none = vjp_of(lambda a: [a.detach()], [a], [torch.ones(2)])
    assert none[0].tolist() == [0.0, 0.0]


def test_attention_backend_of_a_micro_batch_is_used() -> None:
    case = CASES["sdpa"](torch.float32)
    micro = as_micro_batches(case.batch)[0]
    g = gradients(
        case.problem, "inner", [replace(micro, attention="math")], Tally(), keep=True
    )
    assert g.graph is not None
    u = truth("sdpa", torch.float32).v
    with case.problem.swapped(g.graph.inner):
        g.graph.product(
            {n: t.float() for n, t in u.items()}, g.graph.inner, Tally(), retain=False
        )
    fused = gradients(case.problem, "inner", [micro], Tally(), keep=True)
    assert fused.graph is not None
    with pytest.raises(SecondOrderError, match="flash"):
        fused.graph.product(
            {n: t.float() for n, t in u.items()},
            fused.graph.inner,
            Tally(),
            retain=False,
        )


def test_normalised_is_layer_norm() -> None:
    # The formula that the cases rest on.
    x = draw(rng(), 3, 4)
    assert torch.allclose(
        normalised(x, 1), nn.functional.layer_norm(x, (4,)), atol=1e-14
    )
