"""What is read from transformers beyond its documented interface, in one place."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["frozen_new_head", "trainable_base_weights", "use_one_device"]

_ADAPTER_MARKS = ("lora_", "modules_to_save", "trainable_tokens")


def _backbone(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the transformers model inside and its backbone, None where there is none."""
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", None)
        # A PeftModel has the attribute too, and leads to the transformers model.
        if isinstance(prefix, str) and hasattr(module, "config_class"):
            backbone = getattr(module, prefix, None) if prefix else None
            return module, backbone if isinstance(backbone, nn.Module) else module
    return None


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in _ADAPTER_MARKS)


def trainable_base_weights(model: nn.Module) -> list[str]:
    """Return the trainable parameters that belong to neither an adapter nor a head.

    Without a transformers model inside, every parameter that PEFT did not add counts as
    the base's.
    """
    found = _backbone(model)
    base = None if found is None else {id(p) for p in found[1].parameters()}
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not _is_adapter(name) and (base is None or id(p) in base)
    ]


def frozen_new_head(model: nn.Module) -> list[str]:
    """Return parameters of a task head that are newly initialised and frozen.

    `from_pretrained` marks what it read from the checkpoint by `_is_hf_initialized`.
    """
    found = _backbone(model)
    if found is None or found[0] is found[1]:
        return []
    base = {id(p) for p in found[1].parameters()}
    return [
        name
        for name, p in model.named_parameters()
        if not p.requires_grad
        and id(p) not in base
        and not _is_adapter(name)
        and ".original_module." not in name
        and not getattr(p, "_is_hf_initialized", False)
    ]


def use_one_device(args: Any) -> None:
    """Let a Trainer use the first GPU where there are several, without DataParallel."""
    if args.n_gpu > 1:
        args._n_gpu = 1
