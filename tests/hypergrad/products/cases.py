"""Inner losses with dense second derivatives from formulas written a second time.

Each case has the loss as a user writes it (a module, or a function of two dictionaries)
and the same loss as one plain float64 formula, whose dense Hessian is the truth. Only
`BilevelProblem` itself is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad import BilevelProblem
from hypergrad.tree import Params

F64, F32 = torch.float64, torch.float32

Formula = Callable[[Params, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """One inner loss, twice.

    Attributes:
        problem: the problem, made anew.
        batch: its data.
        formula: the inner loss of all tensors together.
        outer_formula: the outer loss of all tensors together.
    """

    problem: BilevelProblem
    batch: Any
    formula: Formula
    outer_formula: Formula


@dataclass(frozen=True)
class Truth:
    """Dense second derivatives in float64.

    Attributes:
        hessian: of all tensors, flattened one after another.
        at: where each tensor lies in it, by name.
        shapes: the shape of each tensor.
        v: gradient of the outer loss in the inner tensors.
    """

    hessian: Tensor
    at: dict[str, slice]
    shapes: dict[str, torch.Size]
    v: Params

    def product(self, u: Params, names: Iterable[str]) -> Params:
        """Contract the first index with u."""
        left = sum(
            u[n].detach().double().reshape(-1) @ self.hessian[self.at[n]] for n in u
        )
        assert isinstance(left, Tensor)
        return {n: left[self.at[n]].reshape(self.shapes[n]) for n in names}


def draw(make: torch.Generator, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Numbers that are exact in `dtype`, as that dtype."""
    return torch.randn(shape, generator=make, dtype=F64).to(dtype)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


# -- functional problems ----------------------------------------------------------------


def quadratic(dtype: torch.dtype) -> Case:
    """g = wᵀHw/2 - wᵀBλ: the Hessian is H, the mixed derivative -B."""
    make = rng()
    root = draw(make, 5, 5)
    h = ((root @ root.T) / 5 + torch.eye(5, dtype=F64)).to(dtype)
    h = (h + h.T) / 2
    b = draw(make, 5, 3, dtype=dtype)

    def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        return inner["w"] @ (x @ inner["w"]) / 2 - inner["w"] @ (y @ outer["lam"])

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        return (inner["w"] - 1).square().sum() / 2 + outer["lam"].sum()

    problem = BilevelProblem(
        loss,
        outer_loss,
        {"w": leaf(draw(make, 5, dtype=dtype))},
        {"lam": leaf(draw(make, 3, dtype=dtype))},
    )

    def formula(p: Params, batch: Any) -> Tensor:
        x, y = (t.double() for t in batch)
        fit = torch.einsum("i,ij,j->", p["w"], x, p["w"]) / 2
        return fit - torch.einsum("i,ij,j->", p["w"], y, p["lam"])

    return Case(
        problem,
        (h, b),
        formula,
        lambda p, batch: (p["w"] - 1).pow(2).sum() / 2 + p["lam"].sum(),
    )


def softmax(dtype: torch.dtype) -> Case:
    """Softmax regression with one log penalty for each feature."""
    make = rng()
    x = draw(make, 15, 4, dtype=dtype)
    y = torch.randint(0, 3, (15,), generator=make)

    def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        fit = nn.functional.cross_entropy(x @ inner["w"] + inner["b"], y)
        return fit + (outer["log"].exp()[:, None] * inner["w"] ** 2).sum() / 2

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(-x @ inner["w"] + inner["b"], y)

    problem = BilevelProblem(
        loss,
        outer_loss,
        {
            "w": leaf(draw(make, 4, 3, dtype=dtype)),
            "b": leaf(draw(make, 3, dtype=dtype)),
        },
        {"log": leaf(draw(make, 4, dtype=dtype) / 2)},
    )

    def nll(logits: Tensor, y: Tensor) -> Tensor:
        top = logits.exp().sum(1).log()
        return sum(
            (top[i] - logits[i, y[i]] for i in range(len(y))), start=top.sum() * 0
        )

    def formula(p: Params, batch: Any) -> Tensor:
        x, y = batch
        fit = nll(x.double() @ p["w"] + p["b"], y) / len(y)
        return fit + torch.einsum("i,ij->", p["log"].exp(), p["w"].pow(2)) / 2

    def outer_formula(p: Params, batch: Any) -> Tensor:
        x, y = batch
        return nll(-(x.double() @ p["w"]) + p["b"], y) / len(y)

    return Case(problem, (x, y), formula, outer_formula)


def shapes(dtype: torch.dtype) -> Case:
    """Scalar, 1-D, 2-D, transposed, strided and empty tensors at both levels."""
    make = rng()
    transposed = draw(make, 3, 2, dtype=dtype).T
    strided = draw(make, 3, 4, dtype=dtype)[:, ::2]
    inner = {
        "scalar": draw(make, dtype=dtype),
        "vector": draw(make, 3, dtype=dtype),
        "transposed": transposed,
        "empty": draw(make, 0, 3, dtype=dtype),
    }
    outer = {"strided": strided, "one": draw(make, dtype=dtype), "none": strided[:0]}
    assert not transposed.is_contiguous()
    assert not strided.is_contiguous()

    def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        mixed = (inner["vector"] @ outer["strided"]) @ inner["transposed"]
        total = (mixed * inner["scalar"]).sin().sum() * outer["one"].exp()
        return total + inner["empty"].sum() * outer["none"].sum() + batch * mixed.sum()

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        return sum((t**3).sum() for t in inner.values()) + outer["one"]

    problem = BilevelProblem(
        loss,
        outer_loss,
        {n: leaf(t) for n, t in inner.items()},
        {n: leaf(t) for n, t in outer.items()},
    )

    def formula(p: Params, batch: Any) -> Tensor:
        mixed = torch.einsum("i,ij,jk->k", p["vector"], p["strided"], p["transposed"])
        total = torch.exp(p["one"]) * torch.sin(mixed * p["scalar"]).sum()
        return total + batch * mixed.sum()

    def outer_formula(p: Params, batch: Any) -> Tensor:
        return sum((p[n].pow(3).sum() for n in inner), start=p["one"])

    return Case(problem, 0.5, formula, outer_formula)


# -- modules ----------------------------------------------------------------------------


def filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give every parameter plain random values."""
    make = torch.Generator().manual_seed(7)
    model = model.to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=make, dtype=F64))
            if p.dim() == 1:
                p.add_(0.5)
    return model


def fit(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def held(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return (model(x.flip(0)) - y).pow(2).mean() + (model(x) * y).mean()


def from_module(
    model: nn.Module,
    outer: Any,
    batch: Any,
    forward: Callable[[Params, Tensor], Tensor],
) -> Case:
    problem = BilevelProblem.from_module(model, fit, outer=outer, outer_loss_fn=held)

    def formula(p: Params, batch: Any) -> Tensor:
        x, y = (t.double() for t in batch)
        return (forward(p, x) - y).pow(2).sum() / y.numel()

    def outer_formula(p: Params, batch: Any) -> Tensor:
        x, y = (t.double() for t in batch)
        first = (forward(p, x.flip(0)) - y).pow(2).sum()
        return (first + (forward(p, x) * y).sum()) / y.numel()

    return Case(problem, batch, formula, outer_formula)


def normalised(x: Tensor, dim: int) -> Tensor:
    centred = x - x.sum(dim, keepdim=True) / x.shape[dim]
    variance = centred.pow(2).sum(dim, keepdim=True) / x.shape[dim]
    return centred / (variance + 1e-5).sqrt()


def layer_norm(dtype: torch.dtype) -> Case:
    """Linear, tanh, LayerNorm (outer), linear."""
    make = rng()
    batch = (draw(make, 6, 3, dtype=dtype), draw(make, 6, 2, dtype=dtype))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))

    def forward(p: Params, x: Tensor) -> Tensor:
        h = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
        h = normalised(h, 1) * p["2.weight"] + p["2.bias"]
        return h @ p["3.weight"].T + p["3.bias"]

    return from_module(filled(model, dtype), nn.LayerNorm, batch, forward)


def batch_norm(dtype: torch.dtype) -> Case:
    """Linear, BatchNorm in train mode (outer), tanh, linear."""
    make = rng()
    batch = (draw(make, 7, 3, dtype=dtype), draw(make, 7, 2, dtype=dtype))
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    )

    def forward(p: Params, x: Tensor) -> Tensor:
        h = normalised(x @ p["0.weight"].T + p["0.bias"], 0)
        h = torch.tanh(h * p["1.weight"] + p["1.bias"])
        return h @ p["3.weight"].T + p["3.bias"]

    return from_module(filled(model, dtype), "1.*", batch, forward)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention as transformers use it: fused attention by default."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.scale
        return self.attend(h, h, h, need_weights=False)[0]


class Sdpa(nn.Module):
    """The same by F.scaled_dot_product_attention, which picks flash on CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.mix(x * self.scale).view(batch, length, 3, 2, 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(batch, length, 4))


def attention_formula(names: list[str]) -> Callable[[Params, Tensor], Tensor]:
    weight, bias, out_weight, out_bias = names

    def forward(p: Params, x: Tensor) -> Tensor:
        mixed = (x * p["scale"]) @ p[weight].T + p[bias]
        heads = []
        for head in range(2):
            at = [slice(4 * i + 2 * head, 4 * i + 2 * head + 2) for i in range(3)]
            q, k, v = (mixed[..., s] for s in at)
            scores = torch.einsum("bid,bjd->bij", q, k) / 2**0.5
            e = scores.exp()
            heads.append((e / e.sum(-1, keepdim=True)) @ v)
        return torch.cat(heads, -1) @ p[out_weight].T + p[out_bias]

    return forward


def attention(dtype: torch.dtype) -> Case:
    """nn.MultiheadAttention; outer: a scale of its input."""
    make = rng()
    batch = (draw(make, 2, 3, 4, dtype=dtype), draw(make, 2, 3, 4, dtype=dtype))
    names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    formula = attention_formula([f"attend.{n}" for n in names])
    return from_module(filled(SelfAttention(), dtype), "scale", batch, formula)


def sdpa(dtype: torch.dtype) -> Case:
    """F.scaled_dot_product_attention; outer: a scale of its input."""
    make = rng()
    batch = (draw(make, 2, 3, 4, dtype=dtype), draw(make, 2, 3, 4, dtype=dtype))
    formula = attention_formula(["mix.weight", "mix.bias", "out.weight", "out.bias"])
    return from_module(filled(Sdpa(), dtype), "scale", batch, formula)


FUNCTIONAL = {"quadratic": quadratic, "softmax": softmax, "shapes": shapes}
MODULES = {
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "attention": attention,
    "sdpa": sdpa,
}
CASES = {**FUNCTIONAL, **MODULES}


@cache
def truth(name: str, dtype: torch.dtype) -> Truth:
    """Dense second derivatives at the values that the problem of that dtype holds."""
    case = CASES[name](dtype)
    return dense(case.problem, case.formula, case.outer_formula, case.batch)


def dense(
    problem: BilevelProblem, formula: Formula, outer_formula: Formula, batch: Any
) -> Truth:
    params = {**problem.inner_params, **problem.outer_params}
    at: dict[str, slice] = {}
    for n, t in params.items():
        start = list(at.values())[-1].stop if at else 0
        at[n] = slice(start, start + t.numel())
    point = torch.cat([t.detach().double().reshape(-1) for t in params.values()])

    def split(x: Tensor) -> Params:
        return {n: x[at[n]].reshape(params[n].shape) for n in params}

    hessian: Any = torch.autograd.functional.hessian(
        lambda x: formula(split(x), batch), point
    )
    gradient: Any = torch.autograd.functional.jacobian(
        lambda x: outer_formula(split(x), batch), point
    )
    v = {n: t for n, t in split(gradient).items() if n in problem.inner_params}
    return Truth(hessian, at, {n: t.shape for n, t in params.items()}, v)


def direction(case: Case, known: Truth, kind: str, dtype: torch.dtype) -> Params:
    """v = ∂f/∂w, or random numbers; in the dtype of the problem."""
    if kind == "outer gradient":
        return {n: t.to(dtype) for n, t in known.v.items()}
    make = torch.Generator().manual_seed(11)
    return {
        n: draw(make, *p.shape, dtype=dtype)
        for n, p in case.problem.inner_params.items()
    }


class Dropped(nn.Module):
    """A linear map, dropout, a scale (outer), tanh and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.second = nn.Linear(5, 2)
        self.rate = 0.4

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.first(x), self.rate, self.training)
        return self.second(torch.tanh(h * self.scale))


def dropout_case() -> tuple[BilevelProblem, Any, Truth]:
    """The problem, its batch, and the truth for the mask that comes next."""
    make = rng()
    x, y = draw(make, 6, 3), draw(make, 6, 2)
    problem = BilevelProblem.from_module(filled(Dropped(), F64), fit, outer="scale")
    state = torch.get_rng_state()
    mask = nn.functional.dropout(torch.ones(6, 5, dtype=F64), 0.4)
    torch.set_rng_state(state)
    assert 0 < int((mask == 0).sum()) < mask.numel()

    def formula(p: Params, batch: Any) -> Tensor:
        h = (x @ p["first.weight"].T + p["first.bias"]) * mask
        h = torch.tanh(h * p["scale"])
        return (h @ p["second.weight"].T + p["second.bias"] - y).pow(2).sum() / 12

    return problem, (x, y), dense(problem, formula, formula, None)
