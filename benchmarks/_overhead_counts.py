"""What an inner and an outer step dispatch and read, on a BERT of twelve layers.

On a CPU the exact DoRA layers look for rows that cancel, one read for each in every forward
pass; on a GPU they do not. So reads are told by package: those in `hypergrad` are the same
on every device.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks._counting import Counts, counted
from bidora import BiDoRAOptimizer
from hypergrad import NumericalWarning, make_estimator

LAYERS, EXAMPLES, TOKENS, VOCABULARY = 12, 4, 8, 64
TRAINED = 74  # A, B and a magnitude for query and value of each layer, and a head
ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "darts": ("darts", {"product": "finite-difference"}),
    "darts, exact": ("darts", {"product": "exact"}),
    "sama": ("sama", {}),
    "unrolled, K = 5": ("unrolled", {"num_steps": 5}),
    "neumann, 5 terms": ("neumann", {"num_terms": 5}),
    "cg, 5 iterations": ("cg", {"max_iter": 5}),
}
WARM_UP = (
    2  # iterations before the counted one: state is made, each graph looked through
)


def small_bert(layers: int, device: torch.device, *, dora: bool = True) -> nn.Module:
    """Return a classifier with an adapter on query and value, in float64."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
    )  # dropout as it is by default: random state is part of a step
    adapter = LoraConfig(
        r=4, use_dora=dora, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model: Any = get_peft_model(BertForSequenceClassification(config), adapter)
    return model.to(device, torch.float64).train()


def draw_batch(seed: int, device: torch.device) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    shape = (EXAMPLES, TOKENS)
    batch = {
        "input_ids": torch.randint(2, VOCABULARY, shape, generator=make),
        "labels": torch.randint(0, 2, (EXAMPLES,), generator=make),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def count_steps(
    layers: int = LAYERS, device: torch.device | None = None
) -> dict[str, Any]:
    """Return what one forward and backward pass dispatches, and each estimator's steps."""
    device = device or torch.device("cpu")
    inner, outer = draw_batch(0, device), draw_batch(1, device)
    rows = {}
    base = None
    for label, (name, settings) in ESTIMATORS.items():
        model = small_bert(layers, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            opt = BiDoRAOptimizer(
                model,
                make_estimator(name, **settings),
                outer_warmup=0,
                orthogonality=0.0,
                max_grad_norm=None,
            )
            base = base or passes(model, inner)
            rows[label] = {
                step: told(counts, base)
                for step, counts in iteration(opt, inner, outer).items()
            }
    assert base is not None
    return {
        "layers": layers,
        "examples": EXAMPLES,
        "tokens": TOKENS,
        "trained_tensors": len(trained(model)),
        "forward_and_backward": {"operations": base.operations, "reads": base.reads},
        "steps": rows,
    }


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def passes(model: Any, batch: dict[str, Tensor]) -> Counts:
    """Count a forward and a backward pass through a model."""
    for _ in range(2):
        with counted() as counts:
            model(**batch).loss.backward()
    model.zero_grad()
    return counts


def iteration(opt: Any, inner: Any, outer: Any) -> dict[str, Counts]:
    """Count an inner and an outer step, each taken on its own."""
    steps = max(1, opt.estimator.needs.lookback)
    for _ in range(WARM_UP):
        for _ in range(steps):
            opt.inner_step(inner)
        opt.outer_step(outer)
    for _ in range(steps - 1):
        opt.inner_step(inner)
    with counted() as for_inner:
        opt.inner_step(inner)
    with counted() as for_outer:
        report = opt.outer_step(outer)
    assert report.outer_step, report.skipped
    return {"inner": for_inner, "outer": for_outer}


def told(counts: Counts, base: Counts) -> dict[str, Any]:
    return {
        "operations": counts.operations,
        "in_forward_and_backward": counts.operations / base.operations,
        "reads": counts.reads,
        "reads_in": dict(by_package(counts).most_common()),
        "read_at": dict(counts.by_place.most_common()),
        "most_common": dict(counts.by_operation.most_common(12)),
    }


def by_package(counts: Counts) -> Counter[str]:
    """Return the number of reads by the package whose code asked."""
    packages: Counter[str] = Counter()
    for place, number in counts.by_place.items():
        packages[place.partition("/")[0]] += number
    return packages
