"""What `auto` chooses, that it says why, and that it never chooses what raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hypergrad import (
    BilevelProblem,
    Choice,
    HypergradError,
    SecondOrderError,
    make_estimator,
)
from hypergrad.batches import as_micro_batches
from hypergrad.estimators import Auto, auto
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.products import Tally, choice, second_order
from hypergrad.rules import SGD, Adam, AdamW, Clipped, Grouped, Rule
from hypergrad.testing import ridge
from tests.tolerances import error


class Once(torch.autograd.Function):
    """The identity, with a backward that ends the graph, as fused kernels have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Tensor:
        return grads[0] * 1.0


class Packed(nn.Module):
    """A linear layer of 8-bit weights, whose kernel knows one derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (4, 4), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        out: Any = Once.apply(x @ (weight.to(x) / 9).T)
        return out


class Body(nn.Module):
    """Scaled inputs, some kernel, a head."""

    def __init__(self, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.first = nn.Linear(4, 4)
        self.kernel = kernel
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.kernel(self.first(x * self.scale))))


def flash(x: Tensor) -> Tensor:
    """Fused attention past torch's dispatcher, as FlashAttention's own package calls."""
    q = x[None, None]
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    return out[0][0, 0]


def attend(x: Tensor) -> Tensor:
    """The attention that torch picks the backend of."""
    q = x[None, None]
    return functional.scaled_dot_product_attention(q, q, q)[0, 0]


def once(x: Tensor) -> Tensor:
    out: Any = Once.apply(x)
    return out


KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "plain": (torch.sin, True),
    "attention": (attend, True),
    "flash": (flash, False),
    "once": (once, False),
    "packed": (Packed(), False),
}
RULES: dict[str, Rule | None] = {
    "none": None,
    "sgd": SGD(0.1),
    "momentum": SGD(0.1, momentum=0.9),
    "adam": Adam(0.1),
    "adamw": AdamW(0.1),
    "clipped": Clipped(AdamW(0.1), 1.0),
}


def problem(
    kernel: str = "plain", dtype: torch.dtype = torch.float32
) -> BilevelProblem:
    torch.manual_seed(0)
    model = Body(KERNELS[kernel][0]).to(dtype)
    return BilevelProblem.from_module(
        model, lambda m, x: (m(x) - 1).square().mean(), outer="scale"
    )


def batch() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def chosen(made: BilevelProblem, rule: Rule | None) -> Choice:
    picked = Auto().resolve(made, batch(), rule)
    again = picked.estimator.resolve(made, batch(), rule)
    assert again.estimator is picked.estimator
    return picked


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_never_chooses_order_2_where_the_product_raises(
    kernel: str, rule: str
) -> None:
    made = problem(kernel)
    picked = chosen(made, RULES[rule])
    works = True
    try:
        batches = as_micro_batches(batch())
        with second_order("exact", problem(kernel), batches, Tally()) as product:
            product.mixed_vjp(
                {n: torch.ones_like(p) for n, p in product.problem.inner_params.items()}
            )
    except SecondOrderError:
        works = False
    assert works is KERNELS[kernel][1]
    assert picked.estimator.needs.order == (2 if works else 1)
    # What it chose runs, through an optimizer or alone.
    if RULES[rule] is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # curvature is negative far from a minimum
            given: Any = {"inner_batch": batch(), "outer_batch": batch()}
            result = Auto().estimate(made, **given)
            same = picked.estimator.estimate(made, **given)
        assert result.info.reason == f"{picked.why} {same.info.reason}".strip()
        assert picked.why.startswith(f"auto took {picked.estimator.name}(")
        assert all(t.isfinite().all() for t in result.outer_grads.values())


@pytest.mark.parametrize(
    ("kernel", "rule", "choice", "settings"),
    [
        ("plain", "adamw", "unrolled", {"num_steps": 1}),
        ("plain", "sgd", "unrolled", {"num_steps": 1}),
        ("attention", "adam", "unrolled", {"num_steps": 1}),
        ("plain", "none", "cg", {"max_iter": 25, "product": "exact"}),
        ("once", "none", "cg", {"max_iter": 25, "product": "finite-difference"}),
        ("once", "sgd", "darts", {"product": "finite-difference"}),
        ("once", "momentum", "sama", {"product": "finite-difference"}),
        ("flash", "adamw", "sama", {"product": "finite-difference"}),
        ("flash", "clipped", "sama", {"product": "finite-difference"}),
    ],
)
def test_the_table(
    kernel: str, rule: str, choice: str, settings: dict[str, Any]
) -> None:
    picked = chosen(problem(kernel), RULES[rule])
    assert picked.estimator == make_estimator(choice, **settings)
    shown = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    assert picked.why.startswith(f"auto took {choice}({shown}): ")


def test_many_parameters_take_neumann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "SMALL", 10)
    assert chosen(problem(), None).estimator.name == "neumann"
    assert "25 parameters are many" in chosen(problem(), None).why


def test_it_names_a_quantised_layer() -> None:
    assert "a quantised layer (Packed)" in chosen(problem("packed"), AdamW(0.1)).why


def test_attention_that_would_not_fit_in_math_mode_stays_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = problem("attention")
    # Six copies of 6 × 6 scores in float32.
    needed = 6 * 6 * 6 * 4
    monkeypatch.setattr(choice, "_free_memory", lambda problem: 2 * needed)
    assert chosen(made, AdamW(0.1)).estimator.name == "unrolled"
    monkeypatch.setattr(choice, "_free_memory", lambda problem: 2 * needed - 1)
    picked = chosen(made, AdamW(0.1))
    assert picked.estimator.name == "sama"
    assert "attention in math mode" in picked.why
    monkeypatch.setattr(choice, "_free_memory", lambda problem: None)
    assert chosen(made, AdamW(0.1)).estimator.name == "unrolled"


def test_out_of_memory_means_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(choice.DoubleBackward, "bind", fail)
    picked = chosen(problem(), AdamW(0.1))
    assert picked.estimator.name == "sama"
    assert "does not fit into memory" in picked.why


def test_a_product_that_is_not_finite_means_first_order() -> None:
    w = torch.zeros(2, requires_grad=True)
    lam = torch.ones((), requires_grad=True)

    def loss(inner: Any, outer: Any, batch: Any) -> Tensor:
        # |w|^1.5 has the slope 0 and an infinite second derivative at 0.
        return (inner["w"].abs() ** 1.5).sum() * outer["lam"] + inner["w"].sum()

    made = BilevelProblem(loss, loss, {"w": w}, {"lam": lam})
    picked = Auto().resolve(made, None, SGD(0.1))
    assert picked.estimator.name == "darts"
    assert "is not finite where the gradient is" in picked.why


def test_no_inner_parameters() -> None:
    lam = torch.ones((), requires_grad=True)
    made = BilevelProblem(
        lambda i, o, b: o["lam"], lambda i, o, b: o["lam"] ** 2, {}, {"lam": lam}
    )
    result = Auto().estimate(made, inner_batch=None, outer_batch=None)
    assert result.outer_grads["lam"].item() == 2.0
    assert "first-order" in result.info.reason


def test_errors_of_the_loss_itself_come_through() -> None:
    w = torch.zeros((), requires_grad=True)
    lam = torch.zeros((), requires_grad=True)

    def nan(inner: Any, outer: Any, batch: Any) -> Tensor:
        return (inner["w"] + outer["lam"]) * float("nan")

    made = BilevelProblem(nan, nan, {"w": w}, {"lam": lam})
    with pytest.raises(HypergradError, match="the inner loss is nan"):
        Auto().estimate(made, inner_batch=None, outer_batch=None)


def test_the_problem_and_the_random_state_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    made = BilevelProblem.from_module(
        model, lambda m, x: m(x).square().mean(), outer="0.bias"
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    assert Auto().resolve(made, torch.randn(4, 3), AdamW(0.1)).why
    torch.set_rng_state(state)
    torch.randn(4, 3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_it_is_the_estimator_it_chose() -> None:
    known = ridge(6)
    ours = make_estimator("auto").estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    assert error(ours.outer_grads, known.outer_grads) <= 1e-5
    same = make_estimator("cg", max_iter=6).estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    assert torch.equal(ours.outer_grads["penalty"], same.outer_grads["penalty"])
    assert ours.info.n_hvp == same.info.n_hvp


@pytest.mark.parametrize("kernel", ["plain", "once"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Rprop"])
def test_under_an_optimizer(kernel: str, kind: str) -> None:
    """Its outer steps are those of the estimator that it names, bit for bit."""

    def run(estimator: Any) -> tuple[list[Tensor], Any]:
        made = problem(kernel)
        opt = BilevelOptimizer(
            made,
            estimator=estimator,
            inner_optimizer=partial(getattr(torch.optim, kind), lr=0.01),
            outer_optimizer=partial(torch.optim.SGD, lr=0.01),
            outer_warmup=2,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reports = [opt.step(batch(), batch() + k) for k in range(4)]
        return [t.detach().clone() for t in made.tensors], (opt, reports[-1])

    ours, (opt, report) = run("auto")
    picked = opt.estimator
    looks_back = kind != "Rprop"  # for which there is no rule
    expected = {
        (True, "plain"): "unrolled",
        (True, "once"): "darts" if kind == "SGD" else "sama",
        (False, "plain"): "cg",
        (False, "once"): "cg",
    }[looks_back, kernel]
    assert picked.name == expected
    assert opt.why.startswith(f"auto took {expected}(")
    assert report.info is not None
    assert report.info.reason.startswith(f"auto took {expected}(")
    theirs, _ = run(picked)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_groups_count_as_plain_sgd_where_all_are() -> None:
    head, rest = ("head.weight", "head.bias"), ("first.weight", "first.bias")
    made = problem("once")
    plain = Grouped(((head, SGD(0.1)), (rest, SGD(0.2))))
    assert chosen(made, plain).estimator.name == "darts"
    mixed = Grouped(((head, SGD(0.1)), (rest, SGD(0.2, momentum=0.5))))
    assert chosen(made, mixed).estimator.name == "sama"


def test_it_estimates_nothing_itself() -> None:
    with pytest.raises(HypergradError, match="has not chosen yet"):
        Auto().terms(None)  # pyright: ignore[reportArgumentType]
