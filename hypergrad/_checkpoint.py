"""Inner steps as plain containers, for `state_dict` and `torch.load(weights_only=True)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypergrad.batches import MicroBatch
from hypergrad.rules import rule_from_config
from hypergrad.steps import InnerStep

__all__ = ["pack_batches", "pack_step", "unpack_batches", "unpack_step"]


def _plain(value: Any) -> Any:
    """Turn mappings (a tokenizer's BatchEncoding) into dictionaries, deeply."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def pack_batches(batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
    """Return micro-batches as plain containers."""
    return [
        {
            "batch": _plain(m.batch),
            "weight": m.weight,
            "rng_state": m.rng_state,
            "attention": m.attention,
        }
        for m in batches
    ]


def unpack_batches(packed: Sequence[Mapping[str, Any]]) -> tuple[MicroBatch, ...]:
    """Return the micro-batches that `pack_batches` was given."""
    return tuple(MicroBatch(**dict(m)) for m in packed)


def pack_step(step: InnerStep) -> dict[str, Any]:
    """Return a step as plain containers; a kept graph is left out and built again."""
    return {
        "inner_params": step.inner_params,
        "outer_params": step.outer_params,
        "state": step.state,
        "micro_batches": pack_batches(step.micro_batches),
        "grads": step.grads,
        "rule": step.rule.config(),
        "outer_grads": step.outer_grads,
    }


def unpack_step(packed: Mapping[str, Any]) -> InnerStep:
    """Return the step that `pack_step` was given."""
    fields = dict(packed)
    fields["micro_batches"] = unpack_batches(fields["micro_batches"])
    fields["rule"] = rule_from_config(fields["rule"])
    return InnerStep(**fields)
