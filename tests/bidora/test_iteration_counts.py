"""What an iteration of BiDoRA runs through the transformer, counted on its modules.

`tests/hypergrad/test_iteration_counts.py` has each estimator on a small problem; here it is
a PEFT model, on which clones are swapped in and graphs are kept.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from bidora import BiDoRAOptimizer, magnitudes
from hypergrad import make_estimator
from hypergrad.products import FiniteDifference

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


class Counts:
    """Passes through a model's encoder, and what `torch.autograd.grad` is asked for.

    `F` is a forward pass. `w`, `m` and `wm` are backward passes for the directions, the
    magnitudes or both; with `'` where a gradient is differentiated and not a loss.
    """

    def __init__(self, model: Any, grad: Any) -> None:
        self.model, self.log, self._grad = model, list[str](), grad
        self.trained = sum(p.requires_grad for p in model.parameters())
        self.lam = {id(t) for t in magnitudes(model).values()}
        encoder = model.base_model.model.bert.encoder
        encoder.register_forward_hook(lambda *a: self.log.append("F"))

    def grad(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, **how: Any
    ) -> Any:
        asked = list(inputs)
        n = sum(id(t) in self.lam for t in asked)
        assert n in (0, len(self.lam))
        assert len(asked) - n in (0, self.trained - len(self.lam)), "no base weight"
        what = ("w" if len(asked) > n else "") + ("m" if n else "")
        self.log.append(what + ("'" if grad_outputs is not None else ""))
        return self._grad(outputs, inputs, grad_outputs, **how)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 3,
        # At the usual 0.02, gradients of query's A are 1e-7 of the others, and a finite
        # difference moves what rounding would swallow by steps of its own.
        "initializer_range": 0.3,
    }
    lora = LoraConfig(
        r=2, use_dora=True, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = get_peft_model(
        BertForSequenceClassification(BertConfig(**shape)), lora
    ).train()
    made = Counts(model, torch.autograd.grad)
    monkeypatch.setattr(torch.autograd, "grad", made.grad)
    return made


def batch(seed: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (4, 6), generator=make),
        "labels": torch.randint(0, 3, (4,), generator=make),
    }


# One string for an iteration: the inner step, the outer gradient, the product.
ITERATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "first-order": ("first-order", {}, "F w · F m"),
    "one-sided": (
        "darts",
        {"product": FiniteDifference("forward")},
        "F wm · F wm · F m",
    ),
    "central": ("darts", {}, "F w · F wm · F m F m"),
    "exact": ("darts", {"product": "exact"}, "F w · F wm · m'"),
    "sama exact": ("sama", {"product": "exact"}, "F w · F wm · m'"),
    "unrolled": ("unrolled", {"num_steps": 1}, "F w · F wm · m'"),
    "neumann": ("neumann", {"num_terms": 2}, "F w · F wm · F w w' w' m'"),
}


@pytest.mark.parametrize("case", ITERATIONS)
def test_passes_of_an_iteration(counts: Counts, case: str) -> None:
    name, settings, passes = ITERATIONS[case]
    opt = BiDoRAOptimizer(
        counts.model,
        make_estimator(name, **settings),
        outer_every=1,
        outer_warmup=0,
        orthogonality=0.0,
    )
    for t in range(3):  # in the first two, graphs are looked through
        counts.log.clear()
        assert opt.step(batch(2 * t), batch(2 * t + 1)).outer_step
    assert counts.log == passes.replace("· ", "").split()


def test_retraining_takes_no_gradient_of_the_magnitudes(counts: Counts) -> None:
    opt = BiDoRAOptimizer(counts.model, "darts", outer_every=1, outer_warmup=0)
    opt.step(batch(0), batch(1))
    opt.freeze_magnitudes()
    counts.log.clear()
    opt.step(batch(2), None)
    assert counts.log == ["F", "w"]
