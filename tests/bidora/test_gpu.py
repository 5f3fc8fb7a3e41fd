"""BiDoRA on an accelerator: the numbers of the CPU, low precision, compiled models, reads.

pytest -m gpu tests/bidora/test_gpu.py
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from benchmarks._counting import counted
from bidora import BiDoRAOptimizer, exact_dora_layers, use_exact_dora
from hypergrad import estimator_names, make_estimator
from hypergrad.testing import relative_error
from tests.devices import chosen_device, needs_cuda, waits_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # torch's and transformers' own, raised while torch.compile looks at them
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
F64 = torch.float64
CPU = torch.device("cpu")
Params = dict[str, Tensor]


@pytest.fixture
def device() -> torch.device:
    return chosen_device()


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


def bert_on(
    device: torch.device,
    dtype: torch.dtype = F64,
    dropout: float = 0.0,
    attention: str = "sdpa",
    head: bool = True,
) -> Any:
    """Return a DoRA model of a dtype, its adapters at least in float32, as PEFT has them.

    A head that is trained has the dtype of the base.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 3,
        "initializer_range": 0.2,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "attn_implementation": attention,
    }
    base = BertForSequenceClassification(BertConfig(**settings)).double()
    lora = LoraConfig(
        r=4,
        use_dora=True,
        target_modules=["query", "value"],
        task_type="SEQ_CLS" if head else None,
    )
    model = get_peft_model(cast(Any, base), lora).double()
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # as after some training
                p.copy_(0.2 * torch.randn(p.shape, generator=make, dtype=F64))
    coarse = dtype if dtype.itemsize >= 4 else torch.float32
    for name, p in model.named_parameters():
        p.data = p.data.to(coarse if "lora_" in name else dtype)
    return model.to(device).train()


def batch(seed: int, device: torch.device) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    drawn = {
        "input_ids": torch.randint(0, 50, (4, 8), generator=make),
        "labels": torch.randint(0, 3, (4,), generator=make),
    }
    return {name: tensor.to(device) for name, tensor in drawn.items()}


def optimizer_of(model: Any, estimator: Any, **settings: Any) -> BiDoRAOptimizer:
    made = make_estimator(estimator) if isinstance(estimator, str) else estimator
    given: dict[str, Any] = {
        "outer_every": max(1, made.needs.lookback),
        "outer_warmup": 0,
        "inner_weight_decay": 0.0,
        "orthogonality": 0.0,
        "max_grad_norm": None,
        **settings,
    }
    return BiDoRAOptimizer(
        model,
        estimator,
        inner_lr=1e-3,
        outer_optimizer=partial(torch.optim.SGD, lr=1e-2),
        **given,
    )


def run(opt: BiDoRAOptimizer, start: int, end: int, device: torch.device) -> None:
    for k in range(start, end):
        report = opt.step(batch(k, device), batch(100 + k, device))
        assert report.skipped is None


def values(opt: BiDoRAOptimizer) -> Params:
    both = {**opt.problem.inner_params, **opt.problem.outer_params}
    return {n: t.detach().cpu().double().clone() for n, t in both.items()}


def moved(opt: BiDoRAOptimizer, start: Params) -> Params:
    return {n: t - start[n] for n, t in values(opt).items()}


def indirect(model: Any, device: torch.device, **settings: Any) -> Params:
    """Return the indirect term of one AdamW step."""
    opt = optimizer_of(model, make_estimator("darts", **settings), outer_every=1000)
    opt.inner_step(batch(0, device))
    found = opt.estimator.estimate(
        opt.problem,
        inner_batch=batch(0, device),
        outer_batch=batch(1, device),
        steps=opt.recorded_steps,
    )
    return {n: t.cpu().double() for n, t in found.indirect.items()}


# -- the numbers of the CPU --------------------------------------------------------------


@pytest.mark.parametrize("name", estimator_names())
def test_every_estimator_equals_the_cpu(name: str, device: torch.device) -> None:
    here = optimizer_of(bert_on(CPU), name)
    there = optimizer_of(bert_on(device), name)
    start = values(here)
    run(here, 0, 6, CPU)
    run(there, 0, 6, device)
    assert here.n_outer_steps == there.n_outer_steps > 0
    # A difference over a radius of 6e-6 magnifies rounding by as much.
    within = 1e-6 if here.estimator.needs.order == 1 else 1e-9
    assert relative_error(moved(there, start), moved(here, start)) < within


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_exact_products_are_those_of_eager_attention(
    attention: str, device: torch.device
) -> None:
    """Under torch's own choice of a kernel, the library takes the plain one (MATH)."""
    truth = indirect(bert_on(CPU, attention="eager"), CPU, product="exact")
    model = bert_on(device, torch.float32, attention=attention)
    found = indirect(model, device, product="exact")
    assert relative_error(found, truth) < 1e-3


# -- a bfloat16 base ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the task head is newly initialised:UserWarning")
@pytest.mark.parametrize("head", [True, False], ids=["head", "adapters alone"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_products_over_a_bfloat16_base(
    attention: str, head: bool, device: torch.device
) -> None:
    """Adapters in float32 do not make a loss of that precision."""
    truth = indirect(bert_on(CPU, head=head), CPU, product="exact")
    found = {
        product: indirect(
            bert_on(device, torch.bfloat16, attention=attention, head=head),
            device,
            product=product,
        )
        for product in ("exact", "finite-difference")
    }
    assert relative_error(found["exact"], truth) < 0.15
    assert relative_error(found["finite-difference"], truth) < 0.3


@pytest.mark.parametrize("name", estimator_names())
def test_every_estimator_trains_over_a_bfloat16_base(
    name: str, device: torch.device
) -> None:
    model = bert_on(device, torch.bfloat16, dropout=0.1)
    opt = optimizer_of(model, name)
    before = values(opt)
    run(opt, 0, 6, device)
    assert opt.n_outer_steps > 0
    assert opt.n_skipped == 0
    for n, value in values(opt).items():
        assert bool(value.isfinite().all()), n
        assert not torch.equal(value, before[n]), n


# -- torch.compile -----------------------------------------------------------------------


def compiled(model: Any, device: torch.device) -> Any:
    # Kernels by inductor take a minute on a CPU, and are tested there elsewhere.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(model, backend=backend, fullgraph=True)


def gradients(model: Any, data: dict[str, Tensor]) -> Params:
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(model(**data).loss, list(params.values()))
    return {n.removeprefix("_orig_mod."): g for n, g in zip(params, grads, strict=True)}


def test_a_compiled_exact_model_has_the_gradients_of_eager(
    device: torch.device,
) -> None:
    model = bert_on(device)
    use_exact_dora(model)
    assert exact_dora_layers(model)
    data = batch(0, device)
    expected, faster = gradients(model, data), compiled(model, device)
    assert relative_error(gradients(faster, data), expected) < 1e-11
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(faster, data)


def test_a_compiled_exact_model_trains_as_eager(device: torch.device) -> None:
    eager = optimizer_of(bert_on(device), "darts")
    model = bert_on(device)
    use_exact_dora(model)
    faster = optimizer_of(compiled(model, device), "darts")
    run(eager, 0, 4, device)
    run(faster, 0, 1, device)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(faster, 1, 4, device)
    found = {n.removeprefix("_orig_mod."): t for n, t in values(faster).items()}
    assert relative_error(found, values(eager)) < 1e-6  # rounding over the radius


# -- checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["the same device", "a CPU"])
def test_resume(to: str, device: torch.device) -> None:
    where = device if to == "the same device" else CPU
    whole = optimizer_of(bert_on(device), "unrolled")
    run(whole, 0, 7, device)
    file = io.BytesIO()
    model = cast(Any, whole.model)
    torch.save({"model": model.state_dict(), "optimizer": whole.state_dict()}, file)
    file.seek(0)
    run(whole, 7, 11, device)
    held = torch.load(file, map_location=where, weights_only=True)
    second = optimizer_of(bert_on(where), "unrolled")
    cast(Any, second.model).load_state_dict(held["model"])
    second.load_state_dict(held["optimizer"])
    run(second, 7, 11, where)
    assert second.n_outer_steps == whole.n_outer_steps > 0
    assert relative_error(values(second), values(whole)) < 1e-9


# -- reads -------------------------------------------------------------------------------


def test_a_pass_through_exact_layers_does_not_wait(device: torch.device) -> None:
    needs_cuda()
    model = bert_on(device)
    use_exact_dora(model)
    data = batch(0, device)
    gradients(model, data)
    waits = waits_of(lambda: gradients(model, data))
    assert not waits, waits


@pytest.mark.parametrize("name", ["darts", "sama", "unrolled", "neumann"])
def test_torch_sees_no_wait_that_was_not_counted(
    name: str, device: torch.device
) -> None:
    needs_cuda()
    opt = optimizer_of(bert_on(device), name, outer_every=1000)
    inner, outer = batch(0, device), batch(1, device)
    for _ in range(max(2, opt.estimator.needs.lookback)):
        opt.inner_step(inner)
    opt.outer_step(outer)
    for step in (partial(opt.inner_step, inner), partial(opt.outer_step, outer)):
        with counted() as counts:
            step()
        waits = waits_of(step)
        assert waits.total() <= counts.reads, (waits, counts.by_place)
