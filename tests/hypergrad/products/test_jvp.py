"""The forward direction of products: the transpose of `vjp`, and a derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    make_estimator,
    tree,
)
from hypergrad.batches import Accumulated, as_micro_batches
from hypergrad.products import (
    NO_HINTS,
    BoundProduct,
    DoubleBackward,
    FiniteDifference,
    Tally,
    as_product,
    bind_product,
    product_names,
)
from hypergrad.rules import SGD
from hypergrad.tree import Params
from tests.tolerances import error

F64 = torch.float64
EXACT = ("exact", "forward-over-reverse")


class Net(nn.Module):
    """A normalised two-layer network with dropout and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(torch.tanh(self.first(x)))))


def problem() -> BilevelProblem:
    torch.manual_seed(0)
    model = Net().double()
    return BilevelProblem.from_module(
        model,
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        outer="norm.*",
        inner_outputs=lambda m, b: m(b[0]),
        inner_criterion=lambda z, b: nn.functional.cross_entropy(z, b[1]),
    )


def batch(seed: int = 1) -> Any:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, generator=make, dtype=F64)
    return x, torch.randint(0, 2, (6,), generator=make)


def drawn(like: Params, seed: int) -> Params:
    make = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=make, dtype=F64) for n, t in like.items()}


DATA: dict[str, Any] = {
    "one": as_micro_batches(batch()),
    "two": Accumulated([batch(1), batch(3)], [0.25, 0.75]),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", product_names())
def test_it_is_the_transpose_of_vjp(name: str, data: str) -> None:
    made = problem()
    before = {n: t.detach().clone() for n, t in made.inner_params.items()}
    u, v = drawn(made.inner_params, 2), drawn(made.inner_params, 3)
    mu = drawn(made.outer_params, 4)
    torch.manual_seed(5)
    tally = Tally()
    with made.untouched():
        product = bind_product(name, made, DATA[data], tally)
        pushed = product.jvp(u, mu)
        # A difference moves λ, and does not differentiate in it.
        assert product.unused == (set() if name in EXACT else None)
        hvp, mixed = product.vjp(v)
        tally.read()
    there = tree.dot(v, pushed)
    back = tree.dot(u, hvp) + tree.dot(mu, mixed)
    size = tree.norm(v) * tree.norm(pushed)
    # A one-sided difference is right to ε^(1/2), the others to ε^(2/3).
    fine = {"exact": 1e-14, "forward-over-reverse": 1e-14, "forward-difference": 1e-6}
    assert abs(there - back) <= fine.get(name, 1e-8) * size
    assert all(torch.equal(t, before[n]) for n, t in made.inner_params.items())


@pytest.mark.parametrize("name", product_names())
def test_it_is_the_change_of_the_gradient(name: str) -> None:
    """By hand: g = λ²·w₁·w₂ has ∂g/∂w = λ²(w₂, w₁)."""
    w = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    lam = torch.tensor(1.5, dtype=F64, requires_grad=True)
    gone = torch.tensor(7.0, dtype=F64, requires_grad=True)
    made = BilevelProblem(
        lambda i, o, b: o["lam"] ** 2 * i["w"].prod(),
        lambda i, o, b: i["w"].sum(),
        {"w": w},
        {"lam": lam, "gone": gone},
    )
    product = bind_product(name, made, as_micro_batches(None), Tally())
    u = {"w": torch.tensor([1.0, -2.0], dtype=F64)}
    mu = {"lam": torch.tensor(0.5, dtype=F64)}
    # λ²(u₂, u₁) + 2λμ(w₂, w₁) = 2.25·(-2, 1) + 1.5·(3, 2)
    truth = {"w": torch.tensor([0.0, 5.25], dtype=F64)}
    assert error(product.jvp(u, mu), truth) <= 1e-6
    # λ that is left out stays where it is; so does w.
    still = {"w": torch.tensor([-4.5, 2.25], dtype=F64)}
    assert error(product.jvp(u, {}), still) <= 1e-6
    alone = {"w": torch.tensor([4.5, 3.0], dtype=F64)}
    assert error(product.jvp(tree.zeros_like(u), mu), alone) <= 1e-6
    if name in EXACT:
        product.jvp(u, {**mu, "gone": torch.ones((), dtype=F64)})
        assert product.unused == {"gone"}
    zeros = product.jvp(tree.zeros_like(u), {})
    assert not zeros["w"].any()


@pytest.mark.parametrize("name", ["exact", "finite-difference"])
def test_gauss_newton_pushes_the_mixed_part_of_the_loss_itself(name: str) -> None:
    made = problem()
    assert made.module is not None
    made.module.eval()
    u, v = drawn(made.inner_params, 2), drawn(made.inner_params, 3)
    mu = drawn(made.outer_params, 4)
    product = bind_product(name, made, DATA["one"], Tally(), "gauss-newton")
    pushed = product.jvp(u, mu)
    curved, mixed = product.vjp(v)
    there, back = tree.dot(v, pushed), tree.dot(u, curved) + tree.dot(mu, mixed)
    close = 1e-14 if name == "exact" else 1e-8
    assert abs(there - back) <= close * tree.norm(v) * tree.norm(pushed)


def test_one_graph_serves_several() -> None:
    made, tally = problem(), Tally()
    assert made.module is not None
    made.module.eval()
    product = bind_product("exact", made, DATA["one"], tally)
    u, mu = drawn(made.inner_params, 2), drawn(made.outer_params, 4)
    first, again = product.jvp(u, mu), product.jvp(u, mu)
    assert error(first, again) == 0.0
    assert (tally.n_forward, tally.n_backward, tally.n_hvp) == (1, 3, 2)
    for kind in (FiniteDifference(), DoubleBackward()):
        tally = Tally()
        bind_product(kind, made, DATA["one"], tally).jvp(u, mu)
        assert (tally.n_forward, tally.n_hvp) == (1 if kind.order == 2 else 2, 1)


def test_a_direction_that_is_not_finite() -> None:
    made, tally = problem(), Tally()
    u = drawn(made.inner_params, 2)
    bad = {n: t * float("inf") for n, t in drawn(made.outer_params, 4).items()}
    bind_product("exact", made, DATA["one"], tally).jvp(u, bad)
    with pytest.raises(NonFiniteError, match="the direction of a second-derivative"):
        tally.read()


class Backward(BoundProduct):
    def compute(self, direction: Any, wanted: Any) -> Any:
        raise NotImplementedError


def test_a_product_without_it_says_so() -> None:
    made = problem()
    product = Backward(made, DATA["one"], Tally())
    with pytest.raises(
        HypergradError, match=r"Backward has no forward direction.*push"
    ):
        product.jvp(drawn(made.inner_params, 2), {})
    assert as_product("exact").bind(made, DATA["one"], Tally(), NO_HINTS).unused is None


def quartic(dtype: torch.dtype = F64) -> BilevelProblem:
    """Make g = λw⁴/24 at w = λ = 1: ∂g/∂w = λw³/6 is (1 + s)⁴/6 along (1, 1)."""
    one = torch.ones((), dtype=dtype)
    return BilevelProblem(
        lambda i, o, b: o["lam"] * i["w"] ** 4 / 24,
        lambda i, o, b: i["w"].square(),
        {"w": one.clone().requires_grad_()},
        {"lam": one.clone().requires_grad_()},
    )


@pytest.mark.parametrize(("scheme", "evaluations"), [("central", 4), ("forward", 3)])
def test_a_difference_says_how_far_it_moved_and_what_that_costs(
    scheme: Any, evaluations: int
) -> None:
    """By hand: the quotient at s = ±h, h² = radius²/2, and at twice that."""
    one = {"w": torch.ones((), dtype=F64)}
    both = one, {"lam": one["w"]}
    tally, radius = Tally(), 0.1
    difference = FiniteDifference(scheme, radius=radius, error_estimate=True)
    product = difference.bind(quartic(), DATA["one"], tally)
    assert not product.info
    found = product.jvp(*both)["w"].item()

    def quotient(h: float) -> float:
        low = 1 - h if scheme == "central" else 1.0
        return ((1 + h) ** 4 - low**4) / (6 * (1 + h - low))

    h = radius / 2**0.5
    share = 1 / 3 if scheme == "central" else 1.0
    off = share * (quotient(2 * h) - quotient(h))
    assert found == pytest.approx(quotient(h), rel=1e-12)
    assert product.info["fd_radius"] == radius
    assert float(product.info["fd_error"]) == pytest.approx(off / found, rel=1e-10)
    if scheme == "central":  # the fourth power has no further terms: it is the error
        assert found - off == pytest.approx(4 / 6, rel=1e-12)
    assert (tally.n_forward, tally.n_hvp) == (evaluations, 1)
    # As with the other products, what is not moved at all has no error.
    product.jvp({"w": torch.zeros((), dtype=F64)}, {})
    assert float(product.info["fd_error"]) == 0.0


def test_a_difference_judges_a_push_where_it_judges_others() -> None:
    for dtype, judged in ((F64, False), (torch.bfloat16, True)):
        one = torch.ones((), dtype=dtype)
        told = []
        for call in ("jvp", "vjp"):
            product = FiniteDifference().bind(quartic(dtype), DATA["one"], Tally())
            product.jvp({"w": one}, {}) if call == "jvp" else product.vjp({"w": one})
            told.append(set(product.info))
        assert told[0] == told[1] == {"fd_radius"} | ({"fd_error"} if judged else set())


def test_forward_mode_reports_it() -> None:
    """One step of rate 1/2 along λ: w ends at 1 - (1 + s)/12, and f's slope is 11/6."""
    estimator = make_estimator(
        "forward",
        num_steps=1,
        rule=SGD(0.5),
        product=FiniteDifference(radius=0.1, error_estimate=True),
    )
    found = estimator.estimate(quartic(), inner_batch=None, outer_batch=None)
    assert found.outer_grads["lam"].item() == pytest.approx(-11 / 72, rel=1e-12)
    assert found.info.fd_radius == 0.1
    assert found.info.fd_error is not None  # linear in λ: rounding is all there is
    assert found.info.fd_error <= 1e-13
