"""Exact DoRA under torch.compile: one graph, the numbers of eager, nothing stale.

The default tests trace both passes and run torch's own kernels (`aot_eager`), which
takes a second; the slow ones let inductor write kernels, which takes a minute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from bidora import BiDoRAOptimizer, use_exact_dora
from bidora.dora import check_norms, direction_norms
from bidora.dora.norms import COMPILED_ROWS
from hypergrad import SecondOrderError

IN, HIDDEN, CLASSES = 5, 7, 3
Batch = tuple[Tensor, Tensor]

pytestmark = [
    # The model has a Linear and a Conv1D; PEFT sets fan_in_fan_out for each, and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    # torch's and transformers' own, raised while torch.compile looks at them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.fc2, self.head = Conv1D(6, HIDDEN), nn.Linear(6, CLASSES)
        nn.init.normal_(self.fc2.weight, std=0.5)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


def dora_net(
    dtype: torch.dtype = torch.float64, checkpointed: bool = False, **lora: Any
) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        use_dora=True,
        target_modules=["fc1", "fc2"],
        modules_to_save=["head"],
        **lora,
    )
    model = get_peft_model(cast(Any, Net(checkpointed)), config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    use_exact_dora(model)
    return model


def wrapped(model: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model: Any, backend: str = "aot_eager") -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def batch(seed: int, dtype: torch.dtype = torch.float64, rows: int = 9) -> Batch:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, IN, generator=make, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (rows,), generator=make)


def loss_fn(model: Any, data: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]), data[1])


def loss_and_gradients(model: Any, data: Batch) -> list[Tensor]:
    params = [p for p in model.parameters() if p.requires_grad]
    loss = loss_fn(model, data)
    return [loss.detach(), *torch.autograd.grad(loss, params)]


def check_equal(model: Any, other: Any, data: Batch, rtol: float = 1e-13) -> None:
    found, expected = loss_and_gradients(model, data), loss_and_gradients(other, data)
    for got, wanted in zip(found, expected, strict=True):
        assert float((got - wanted).norm()) <= rtol * float(wanted.norm())


def no_recompiles() -> Any:
    return torch.compiler.set_stance("fail_on_recompile")


# --- outputs, gradients, graphs -------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "checkpointed"),
    [
        (wrapped, False),
        pytest.param(wrapped, True, marks=pytest.mark.slow),
        (in_place, False),
    ],
)
def test_numbers_are_those_of_eager(
    how: Callable[[Any], Any], checkpointed: bool
) -> None:
    compiled = how(dora_net(checkpointed=checkpointed))
    # Some sums run in another order: 1e-13 is 500 units of rounding in float64.
    check_equal(compiled, dora_net(), batch(0))


def test_one_compilation_serves_a_training() -> None:
    eager, model = dora_net(), dora_net()
    compiled = wrapped(model)
    loss_and_gradients(compiled, batch(0))
    with no_recompiles():
        for step in range(3):
            check_equal(compiled, eager, batch(step))
            check_norms(model)
            model(batch(step)[0])  # eager in between, which fills its caches
            with torch.no_grad():
                for p, q in zip(model.parameters(), eager.parameters(), strict=True):
                    if p.requires_grad:
                        p.add_(0.01)
                        q.add_(0.01)


def test_an_empty_cache_is_no_reason_to_compile_again() -> None:
    model = copy.deepcopy(dora_net())  # copies come without their caches
    compiled = wrapped(model)
    compiled(batch(0)[0])
    with no_recompiles():
        compiled(batch(0)[0])
        model(batch(0)[0])
        compiled(batch(0)[0])


@pytest.mark.slow
def test_a_second_size_of_batch_is_the_last_to_compile() -> None:
    eager, compiled = dora_net(), wrapped(dora_net())
    for rows in (9, 4):
        check_equal(compiled, eager, batch(0, rows=rows))
    with no_recompiles():
        for rows in (5, 8, 30):
            check_equal(compiled, eager, batch(0, rows=rows))


def test_a_changed_base_weight_is_seen() -> None:
    """Any change, that through .data in place too, which eager's caches cannot see."""
    model = dora_net()
    compiled = wrapped(model)
    compiled(batch(0)[0])
    weight = model.base_model.model.fc1.base_layer.weight
    with no_recompiles():
        for change in (
            lambda: weight.mul_(2),
            lambda: weight.data.mul_(0.3),
            lambda: weight.data.copy_(torch.randn_like(weight)),
        ):
            with torch.no_grad():
                change()
            check_equal(compiled, copy.deepcopy(model), batch(0))


def in_autocast(model: Any) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model, batch(0, torch.float32))
    grads = torch.autograd.grad(loss, params)
    return torch.cat([loss.detach().view(1), *(g.flatten() for g in grads)])


def test_autocast() -> None:
    eager = in_autocast(dora_net(torch.float32))
    checkpointed = in_autocast(dora_net(torch.float32, checkpointed=True))
    assert torch.equal(checkpointed, eager)
    compiled = in_autocast(wrapped(dora_net(torch.float32, checkpointed=True)))
    truth = torch.cat([t.view(-1) for t in loss_and_gradients(dora_net(), batch(0))])
    for found in (eager, compiled):
        # A few roundings to bfloat16 in a row, of 2e-3 on average each. A compiled
        # backward pass runs under the forward's autocast and eager's does not, so the
        # two are equally good and not equal.
        assert float((found - truth).norm() / truth.norm()) < 1e-2


def test_the_norm_stays_in_float32_under_autocast() -> None:
    w, a, b = torch.randn(40, 96), torch.randn(4, 96), torch.randn(40, 4) / 3
    truth = (w.double() + 1.7 * b.double() @ a.double()).norm(dim=1)
    norms = torch.compile(direction_norms, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = norms(w, a, b, 1.7)
    assert found.dtype == torch.float32
    # 10 eps of float32; the same sums in bfloat16 are 1e-3 off.
    assert float(((found - truth) / truth).abs().max()) < 1.2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_the_adapter_cancels(dtype: torch.dtype) -> None:
    """A graph cannot look for them; it computes the lowest few from their entries."""
    few, out = COMPILED_ROWS, 3 * COMPILED_ROWS
    a = torch.randn(few, 96).to(dtype).float()
    w = torch.randn(out, 96)
    w[:few] = a + 0.01 * torch.randn_like(a)
    w, b = w.to(dtype), torch.randn(out, few) / 10
    b[:few] = -torch.eye(few)
    exact = (w.double() + b.double() @ a.double()).norm(dim=1)
    norms = torch.compile(direction_norms, backend="aot_eager", fullgraph=True)
    a.requires_grad_()
    found = norms(w, a, b)
    # The entries are differences a hundredth of their terms' size, each rounded: 100 eps.
    assert float(((found.detach() - exact) / exact).abs().max()) < 1.2e-5
    (gradient,) = torch.autograd.grad(found.sum(), a)
    (expected,) = torch.autograd.grad(direction_norms(w, a, b).sum(), a)
    assert float((gradient - expected).norm() / expected.norm()) < 1.2e-5


# --- bilevel steps ----------------------------------------------------------------------


def bidora(model: Any, estimator: str, **settings: Any) -> BiDoRAOptimizer:
    chosen = {
        "outer_every": 1,
        "outer_warmup": 0,
        "inner_lr": 1e-3,
        "orthogonality": 1e-2,
        **settings,
    }
    return BiDoRAOptimizer(model, estimator, loss_fn=loss_fn, **chosen)


def values(opt: BiDoRAOptimizer) -> list[Tensor]:
    params = [*opt.problem.inner_params.values(), *opt.problem.outer_params.values()]
    return [p.detach().clone() for p in params]


def steps(opt: BiDoRAOptimizer, first: int, last: int) -> None:
    for t in range(first, last):
        assert opt.step(batch(2 * t), batch(2 * t + 1)).outer_step


@pytest.mark.parametrize(("estimator", "how"), [("darts", wrapped), ("sama", in_place)])
def test_bilevel_steps_of_order_one(estimator: str, how: Callable[[Any], Any]) -> None:
    """Inner steps, and finite differences, which move the weights of the graph."""
    eager, compiled = bidora(dora_net(), estimator), bidora(how(dora_net()), estimator)
    start = values(eager)
    steps(eager, 0, 4)
    steps(compiled, 0, 1)
    with no_recompiles():
        steps(compiled, 1, 4)
    for got, expected, before in zip(
        values(compiled), values(eager), start, strict=True
    ):
        # A difference divides rounding by its radius of 6e-6: at most 2e-16 / 6e-6 of
        # the products, and Adam's 1/sqrt(v) keeps that relative.
        moved = float((expected - before).norm())
        assert moved > 0
        assert float((got - expected).norm()) < 1e-8 * moved


def indirect(model: Any) -> Tensor:
    """Return darts's indirect term, all random numbers being drawn from one seed."""
    opt = bidora(model, "darts", outer_every=5, orthogonality=0.0)
    torch.manual_seed(3)
    opt.inner_step(batch(0))
    found = opt.estimator.estimate(
        opt.problem,
        inner_batch=batch(1),
        outer_batch=batch(2),
        steps=opt.recorded_steps,
    )
    return torch.cat(list(found.indirect.values()))


def test_both_sides_of_a_difference_see_the_same_dropout() -> None:
    eager = indirect(dora_net(lora_dropout=0.4).train())
    compiled = indirect(wrapped(dora_net(lora_dropout=0.4).train()))
    # Rounding over the radius, as above.
    assert float((compiled - eager).norm()) < 1e-8 * float(eager.norm())


@pytest.mark.parametrize(
    ("estimator", "how"), [("cg", wrapped), ("unrolled", in_place)]
)
def test_order_two_is_refused_and_nothing_is_lost(
    estimator: str, how: Callable[[Any], Any]
) -> None:
    settings = {"outer_every": None} if estimator == "unrolled" else {}
    opt = bidora(how(dora_net()), estimator, **settings)
    every = max(1, opt.estimator.needs.lookback)
    for t in range(every - 1):
        opt.step(batch(2 * t), batch(2 * t + 1))
    before, state = values(opt), torch.get_rng_state()
    with pytest.raises(SecondOrderError) as caught:
        opt.step(batch(50), batch(51))
    text = str(caught.value)
    for words in ("without torch.compile", "first-order estimator", "'darts'"):
        assert words in text
    assert all(torch.equal(p, q) for p, q in zip(values(opt), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    steps(bidora(opt.model, "darts"), 0, 1)  # the remedy is one


# --- kernels by inductor ----------------------------------------------------------------


@pytest.mark.slow
def test_inductor_on_a_transformer() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    lora = LoraConfig(
        r=2, use_dora=True, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = get_peft_model(BertForSequenceClassification(config), lora).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    use_exact_dora(model)
    data = {
        "input_ids": torch.randint(0, 20, (3, 6)),
        "labels": torch.tensor([0, 1, 1]),
    }
    params = [p for p in model.parameters() if p.requires_grad]
    compiled = wrapped(model, "inductor")
    expected = torch.autograd.grad(model(**data).loss, params)
    found = torch.autograd.grad(compiled(**data).loss, params)
    for got, wanted in zip(found, expected, strict=True):
        assert float((got - wanted).norm()) <= 1e-12 * float(wanted.norm())
    with no_recompiles():
        torch.autograd.grad(compiled(**data).loss, params)


@pytest.mark.slow
def test_inductor_through_bilevel_steps() -> None:
    eager = bidora(dora_net(), "darts")
    compiled = bidora(wrapped(dora_net(), "inductor"), "darts")
    steps(eager, 0, 3)
    steps(compiled, 0, 1)
    with no_recompiles():
        steps(compiled, 1, 3)
    for got, expected in zip(values(compiled), values(eager), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_inductor_draws_the_same_dropout_on_both_sides() -> None:
    """Its generator is its own, seeded from torch's, and its masks are not eager's."""
    model = dora_net(lora_dropout=0.4).train()
    compiled = wrapped(model, "inductor")
    found: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(
            torch.cat([t.view(-1) for t in loss_and_gradients(compiled, batch(0))])
        )
    assert torch.equal(*found)
    # Two masks would leave a difference of gradients divided by a radius of 6e-6.
    assert float(indirect(compiled).norm()) < 10 * float(indirect(model).norm())
