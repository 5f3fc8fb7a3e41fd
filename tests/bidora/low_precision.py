"""Small bfloat16 models with float32 adapters, and their derivatives in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from bidora import BiDoRAOptimizer
from hypergrad import Hypergradient

LR = 1e-2
Params = dict[str, Tensor]

_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}


def _bert() -> nn.Module:
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": 3,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
    }
    return BertForSequenceClassification(BertConfig(**shape))


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=64,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "bert": (_bert, ["query", "value"], "SEQ_CLS"),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "qwen2": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "gpt2": (_gpt2, ["c_attn"], "CAUSAL_LM"),
}
"""By name: the base model, the layers that get an adapter, and the task."""


def make(name: str) -> Any:
    """Return a frozen bfloat16 base with float32 adapters whose B is not zero."""
    torch.manual_seed(0)
    base, targets, task = MODELS[name]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=targets,
        task_type=task,
        init_lora_weights=False,
        # A head in float32 would hide what the base rounds.
        modules_to_save=None,
    )
    model: Any = get_peft_model(base().to(torch.bfloat16), config).eval()
    for n, p in model.named_parameters():
        p.requires_grad_("lora" in n)
    return model


def batch(name: str, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(3, 64, (8, 16), generator=draw)
    labels = torch.randint(0, 3, (8,), generator=draw) if name == "bert" else x
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": labels}


def loss_of(model: Any, data: dict[str, Tensor]) -> Tensor:
    """Return the loss; transformers takes that of a language model in float32."""
    logits = model(**{k: v for k, v in data.items() if k != "labels"}).logits
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    labels = data["labels"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels)


def after_one_step(name: str, estimator: Any, **settings: Any) -> Hypergradient:
    """Return the hypergradient of one SGD step from the start."""
    opt = BiDoRAOptimizer(
        make(name),
        estimator,
        loss_fn=loss_of,
        inner_optimizer=partial(torch.optim.SGD, lr=LR),
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
        outer_warmup=0,
        max_grad_norm=None,
        orthogonality=0.0,
        **settings,
    )
    opt.inner_step(batch(name, 1))
    return opt.estimator.estimate(
        opt.problem,
        inner_batch=batch(name, 1),
        outer_batch=batch(name, 2),
        steps=opt.recorded_steps,
    )


def truth(name: str) -> Tensor:
    """Return the indirect term of one SGD step, in float64, by plain autograd."""
    model = _exact_in_float64(make(name).double())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    lam = {n: p.detach().clone().requires_grad_() for n, p in named.items() if _is_m(n)}
    w = {
        n: p.detach().clone().requires_grad_() for n, p in named.items() if n not in lam
    }

    def loss(params: Params, seed: int) -> Tensor:
        wrapped = _Loss(model)
        given = {f"model.{n}": p for n, p in params.items()}
        return torch.func.functional_call(wrapped, given, (batch(name, seed),))

    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(
            loss({**w, **lam}, 1), list(w.values()), create_graph=True
        )
        moved = {n: p - LR * gi for (n, p), gi in zip(w.items(), g, strict=True)}
        leaves = list(lam.values())
        total = torch.autograd.grad(loss({**moved, **lam}, 2), leaves)
        fixed = {n: p.detach() for n, p in moved.items()}
        direct = torch.autograd.grad(loss({**fixed, **lam}, 2), leaves)
    return flat(
        {n: t - d for n, t, d in zip(lam, total, direct, strict=True)},
    )


class _Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: Any) -> Tensor:
        return loss_of(self.model, data)


def _is_m(name: str) -> bool:
    return "magnitude" in name


def _exact_in_float64(model: Any) -> Any:
    """Give every layer a DoRA forward written out, with nothing of this library's."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module

        def forward(x: Tensor, *_: Any, m: Any = layer) -> Tensor:
            base = m.get_base_layer()
            w = base.weight.T if isinstance(base, Conv1D) else base.weight
            low = m.lora_B["default"].weight @ m.lora_A["default"].weight
            v = w + m.scaling["default"] * low
            size = m.lora_magnitude_vector["default"].weight[:, None]
            unit = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            return nn.functional.linear(x, size * unit, base.bias)

        layer.forward = forward
    return model


def flat(params: Params) -> Tensor:
    return torch.cat([params[n].detach().double().flatten() for n in sorted(params)])


def relative(found: Hypergradient, true: Tensor) -> float:
    return float((flat(found.indirect) - true).norm() / true.norm())
