"""Hypergradients of a small block of exact DoRA layers, against plain autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bidora import BiDoRAOptimizer, use_exact_dora, use_peft_dora
from hypergrad import BilevelProblem, make_estimator
from hypergrad.batches import as_micro_batches
from hypergrad.products import Tally, second_order
from hypergrad.testing import relative_error

Params = dict[str, Tensor]


def block() -> nn.Module:
    """Two DoRA layers and a head in float64, B away from 0."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 3)
    ).double()
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        use_dora=True,
        target_modules=["0", "3"],
        modules_to_save=["4"],
    )
    model = get_peft_model(net, config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.copy_(0.3 * torch.randn_like(p))
    use_exact_dora(model)
    return model


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 5, generator=make, dtype=torch.float64)
    return x, torch.randint(0, 3, (9,), generator=make)


def materialised(w: Params, m: Params, model: nn.Module, data: Any) -> Tensor:
    """Compute the block's loss with W' = m (W0 + sBA) / norm written out."""
    own = dict(model.named_parameters())

    def dora(i: int, x: Tensor) -> Tensor:
        prefix = f"base_model.model.{i}"
        direction = own[f"{prefix}.base_layer.weight"] + 3.0 * (
            w[f"{prefix}.lora_B.default.weight"] @ w[f"{prefix}.lora_A.default.weight"]
        )
        scale = m[f"{prefix}.lora_magnitude_vector.default.weight"] / direction.norm(
            dim=1
        )
        return x @ (scale[:, None] * direction).T + own[f"{prefix}.base_layer.bias"]

    x = dora(0, data[0])
    norm = "base_model.model.1"
    x = nn.functional.layer_norm(x, (7,), own[f"{norm}.weight"], own[f"{norm}.bias"])
    x = dora(3, x.tanh())
    head = "base_model.model.4.modules_to_save.default"
    return nn.functional.cross_entropy(
        x @ w[f"{head}.weight"].T + w[f"{head}.bias"], data[1]
    )


def truth(model: nn.Module, problem: BilevelProblem, kind: str, k: int) -> Params:
    """Return the indirect term through k hand-written steps from the present point."""
    m = {
        n: t.detach().clone().requires_grad_() for n, t in problem.outer_params.items()
    }
    w = {
        n: t.detach().clone().requires_grad_() for n, t in problem.inner_params.items()
    }
    first = {n: torch.zeros_like(t) for n, t in w.items()}
    second = {n: torch.zeros_like(t) for n, t in w.items()}
    for t in range(1, k + 1):
        loss = materialised(w, m, model, batch(t))
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        for (n, p), g in zip(list(w.items()), grads, strict=True):
            if kind == "sgd":
                w[n] = p - 0.1 * g
                continue
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g**2
            d = (second[n] / (1 - 0.999**t)).sqrt() + 1e-8
            w[n] = p * (1 - 0.1 * 0.01) - 0.1 * first[n] / (1 - 0.9**t) / d
    value = materialised(w, m, model, batch(0))
    total = torch.autograd.grad(value, list(m.values()))
    at_end = {n: t.detach() for n, t in w.items()}
    direct = torch.autograd.grad(
        materialised(at_end, m, model, batch(0)), list(m.values())
    )
    return {n: a - b for n, a, b in zip(m, total, direct, strict=True)}


def run(estimator: Any, kind: str, k: int, **settings: Any) -> tuple[Any, Params]:
    model = block()
    make = (
        partial(torch.optim.SGD, lr=0.1)
        if kind == "sgd"
        else partial(torch.optim.AdamW, lr=0.1)
    )
    opt = BiDoRAOptimizer(
        model,
        estimator,
        loss_fn=loss_fn,
        inner_optimizer=make,
        **{"max_grad_norm": None, "orthogonality": 0.0, **settings},
    )
    expected = truth(model, opt.problem, kind, k)
    for t in range(1, k + 1):
        opt.inner_step(batch(t))
    result = opt.estimator.estimate(
        opt.problem, inner_batch=None, outer_batch=batch(0), steps=opt.recorded_steps
    )
    return result.indirect, expected


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("k", [2, 5, 20])
def test_unrolled(kind: str, k: int) -> None:
    ours, expected = run(make_estimator("unrolled", num_steps=k), kind, k)
    # The norm by its low-rank expansion and materialised differ by some roundings, which
    # Adam's 1/(sqrt(v) + ε) enlarges.
    assert relative_error(ours, expected) < 1e-11


def test_darts_by_every_product() -> None:
    for product, bar in (
        ("exact", 1e-13),
        ("forward-over-reverse", 1e-13),
        ("finite-difference", 4e-10),
    ):
        ours, expected = run(make_estimator("darts", product=product), "sgd", 1)
        assert relative_error(ours, expected) < bar, product


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_sama_equals_unrolling_one_step(kind: str) -> None:
    sama, _ = run(make_estimator("sama", product="exact"), kind, 1)
    unrolled, _ = run(make_estimator("unrolled", num_steps=1), kind, 1)
    assert relative_error(sama, unrolled) < 1e-15


def test_kept_graph_equals_recomputed() -> None:
    estimator = make_estimator("sama", product="exact")
    kept, _ = run(estimator, "sgd", 1, reuse_graph=True)
    recomputed, _ = run(estimator, "sgd", 1, reuse_graph=False)
    assert relative_error(kept, recomputed) < 1e-14


def products(model: nn.Module, names: list[str]) -> tuple[dict[str, Any], Params]:
    outer = [n for n, _ in model.named_parameters() if "magnitude" in n]
    problem = BilevelProblem.from_module(model, loss_fn, outer=outer)
    torch.manual_seed(1)
    u = {n: torch.randn_like(t) for n, t in problem.inner_params.items()}
    out = {}
    for name in names:
        with second_order(
            name, problem, as_micro_batches(batch(1)), Tally()
        ) as product:
            out[name] = product.vjp(u)
    return out, u


def test_jvp_of_grad_equals_double_backward() -> None:
    found, _ = products(block(), ["exact", "forward-over-reverse"])
    for one, other in zip(*found.values(), strict=True):
        assert relative_error(one, other) < 1e-13


def test_peft_forward_is_why_the_exact_one_exists() -> None:
    """Its backward is not the gradient of the loss, so its products disagree."""
    model = block()
    use_peft_dora(model)
    found, _ = products(model, ["exact", "finite-difference"])
    truth_found, _ = products(block(), ["exact", "finite-difference"])
    exact, difference = truth_found.values()
    assert relative_error(exact[1], difference[1]) < 1e-8
    assert relative_error(found["exact"][1], exact[1]) > 0.1
