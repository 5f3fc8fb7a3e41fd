"""What a checkpoint holds, in containers that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hypergrad.batches import MicroBatch
from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators import make_estimator
from hypergrad.rules import rule_from_config
from hypergrad.steps import InnerStep

__all__ = [
    "check_saved",
    "pack_batches",
    "pack_estimator",
    "pack_step",
    "unpack_batches",
    "unpack_estimator",
    "unpack_steps",
]


def check_saved(
    state_dict: Mapping[str, Any], estimator: HypergradEstimator, levels: list[str]
) -> dict[str, Any]:
    """Return the part of a `state_dict` that is not torch's own.

    Args:
        state_dict: what is to be loaded.
        estimator: the estimator that the optimizer was made with.
        levels: level of each of its parameter groups.

    Raises:
        ValueError: it comes from another kind of optimizer or estimator, or has other
            groups.
    """
    saved = state_dict.get("bilevel")
    if saved is None:
        msg = (
            "this state_dict has no 'bilevel' entry: it comes from another optimizer. "
            "Load one that BilevelOptimizer.state_dict returned."
        )
        raise ValueError(msg)
    mine = type(estimator).__name__
    if saved["estimator"] != mine:
        msg = (
            f"this state_dict was saved with estimator {saved['estimator']}, and this "
            f"optimizer has {mine}: its records would not fit. Make the optimizer with "
            "the same estimator."
        )
        raise ValueError(msg)
    theirs = [g.get("level") for g in state_dict["param_groups"]]
    if theirs != levels:
        msg = (
            f"the levels of the saved groups are {theirs}, those here are {levels}. Make "
            "the optimizer with the same groups."
        )
        raise ValueError(msg)
    return saved


def _plain(value: Any) -> Any:
    """Turn mappings (a tokenizer's BatchEncoding) into dictionaries, deeply."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


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


def pack_estimator(estimator: HypergradEstimator) -> dict[str, Any]:
    """Return an estimator as its name and those settings that are not the defaults.

    Raises:
        TypeError: `make_estimator` would not make the same one of them.
    """
    settings: dict[str, Any] = {}
    try:
        usual = make_estimator(estimator.name)
        for field in fields(estimator):  # pyright: ignore[reportArgumentType]
            value = getattr(estimator, field.name)
            if value != getattr(usual, field.name):
                settings[field.name] = value
        same = make_estimator(estimator.name, **settings) == estimator
    except (TypeError, ValueError, AttributeError):
        same = False
    same = same and _is_plain(settings)
    if not same:
        msg = (
            f"{estimator!r} cannot be written to a checkpoint: it must be a dataclass "
            "that make_estimator makes of its `name` and of plain settings: numbers, "
            "strings, None, lists and dictionaries. Register it under its name."
        )
        raise TypeError(msg)
    return {"name": estimator.name, "settings": settings}


def unpack_estimator(packed: Mapping[str, Any]) -> HypergradEstimator:
    """Return the estimator that `pack_estimator` was given."""
    return make_estimator(packed["name"], **packed["settings"])


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


def unpack_steps(
    packed: Sequence[Mapping[str, Any]], names: Collection[str]
) -> tuple[InnerStep, ...]:
    """Return the steps that `pack_step` was given.

    Args:
        packed: what it returned.
        names: of the inner parameters.

    Raises:
        ValueError: the steps have other inner parameters.
    """
    steps = []
    for each in packed:
        values = dict(each)
        values["micro_batches"] = unpack_batches(values["micro_batches"])
        values["rule"] = rule_from_config(values["rule"])
        steps.append(InnerStep(**values))
        if set(steps[-1].inner_params) != set(names):
            msg = (
                "the recorded inner steps have other parameter names than this problem. "
                "Load the state of an optimizer over the same model."
            )
            raise ValueError(msg)
    return tuple(steps)
