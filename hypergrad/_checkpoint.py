"""What a checkpoint holds, in containers that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._answer_checks import check_state
from hypergrad._checks import some
from hypergrad._run import Run
from hypergrad.batches import MicroBatch
from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators import make_estimator
from hypergrad.problem import BilevelProblem
from hypergrad.products import Product, make_product
from hypergrad.reporting import report
from hypergrad.rng import relocated
from hypergrad.rules import rule_from_config
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["Checkpointer", "pack_estimator", "unpack_estimator"]


class Checkpointer:
    """Turn the state of a run into plain containers, and back.

    Args:
        problem: the problem; tensors are put where its parameters are.
        asked: the estimator that the optimizer was made with.
    """

    def __init__(self, problem: BilevelProblem, asked: HypergradEstimator) -> None:
        self._problem = problem
        self._asked = asked

    def pack(self, run: Run) -> dict[str, Any]:
        """Return a run as plain containers."""
        chosen = run.estimator is not self._asked
        reducer = self._problem.reducer
        return {
            "estimator": type(self._asked).__name__,
            "learned": tree.clone(self._learned),
            "chosen": pack_estimator(run.estimator) if chosen else None,
            "resolved": run.resolved,
            "n_inner_steps": run.n_inner_steps,
            "n_outer_steps": run.n_outer_steps,
            "n_skipped": run.n_skipped,
            "outer_frozen": run.outer_frozen,
            "window": [self._pack_step(s) for s in run.window],
            "left": run.left,
            "last": self._pack_batches(run.last),
            "estimator_state": dict(run.estimator_state),
            "why": run.why,
            "began": run.began,
            "outer_began": run.outer_began,
            "asked": run.asked,
            "rank": (reducer.rank, reducer.ranks),
        }

    def without_data(self, run: Run, state_dict: Mapping[str, Any]) -> Run:
        """Return a run without the batches that some rank lacks."""
        reducer = self._problem.reducer
        own = tuple(state_dict["bilevel"].get("rank", (0, 1)))
        if run.window:
            report(
                f"some of the {reducer.ranks} ranks loaded a checkpoint that another "
                f"one saved (here: of rank {own[0]} of {own[1]}), and its batches are "
                "not theirs. The recorded inner steps were left out on all; the first "
                "outer steps wait for new ones. Save one file for each rank."
            )
        return replace(run, window=(), last=(), left=None)

    def unpack(
        self, state_dict: Mapping[str, Any], levels: list[str]
    ) -> tuple[Run, bool]:
        """Return the run that `pack` was given, and whether it is another rank's.

        Args:
            state_dict: what is to be loaded.
            levels: level of each of the optimizer's parameter groups.

        Raises:
            TypeError: it holds something else than tensors as state.
            ValueError: it comes from another kind of optimizer, estimator or problem.
        """
        saved = _check_saved(state_dict, self._asked, levels)
        _check_learned(saved["learned"], self._learned)
        chosen = saved.get("chosen")
        check_state(saved["estimator_state"], "the checkpoint")
        # Steps share λ where it did not move between them.
        shared: dict[int, Params] = {}
        window = tuple(self._unpack_step(s, shared) for s in saved["window"])
        last = self._unpack_batches(saved["last"])
        left = saved.get("left")
        reducer, own = self._problem.reducer, tuple(saved.get("rank", (0, 1)))
        foreign = own != (reducer.rank, reducer.ranks)
        run = Run(
            self._asked if chosen is None else unpack_estimator(chosen),
            1,
            saved["n_inner_steps"],
            saved["n_outer_steps"],
            saved["n_skipped"],
            saved["outer_frozen"],
            window,
            _state_at(saved["estimator_state"], self._device),
            last,
            saved.get("resolved", True),
            None if left is None else left.to(self._device),
            saved.get("why", ""),
            saved.get("began", 0),
            saved.get("outer_began", 0),
            saved.get("asked", False),
        )
        return run, foreign

    def place_learned(self, state_dict: Mapping[str, Any]) -> None:
        """Put the settings and starts that are learned where they were.

        They are in no module, so that no other file has them.

        Args:
            state_dict: one that `unpack` took.
        """
        saved = state_dict["bilevel"]["learned"]
        with torch.inference_mode(mode=False):
            own = self._learned
            tree.copy(list(own.values()), [saved[n].to(own[n].device) for n in own])

    @property
    def _learned(self) -> Params:
        problem = self._problem
        return {n: problem.outer_params[n] for n in sorted(problem.beside_losses)}

    @property
    def _device(self) -> torch.device:
        return self._problem.tensors[0].device

    def _pack_batches(self, batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
        return [
            {
                "batch": _plain(m.batch),
                "weight": m.weight,
                "rng_state": m.rng_state,
                "attention": m.attention,
                "training": m.training,
                # A loss may move its batch by itself.
                "on_host": self._device.type != "cpu" and _is_on_host(m.batch),
            }
            for m in batches
        ]

    def _unpack_batches(
        self, packed: Sequence[Mapping[str, Any]]
    ) -> tuple[MicroBatch, ...]:
        found = []
        for each in packed:
            values = dict(each)
            on_host = values.pop("on_host", False)
            where = torch.device("cpu") if on_host else self._device
            values["batch"] = _moved(values["batch"], where)
            values["rng_state"] = relocated(values["rng_state"], self._device)
            found.append(MicroBatch(**values))
        return tuple(found)

    def _pack_step(self, step: InnerStep) -> dict[str, Any]:
        """Return a step as plain containers; a kept graph is left out and built again."""
        return {
            "inner_params": step.inner_params,
            "outer_params": step.outer_params,
            "state": step.state,
            "micro_batches": self._pack_batches(step.micro_batches),
            "grads": step.grads,
            "rule": step.rule.config(),
            "outer_grads": step.outer_grads,
            "grad_norm": step.grad_norm,
            "follows": step.follows,
            "directed": step.directed,
            "number": step.number,
        }

    def _unpack_step(
        self, packed: Mapping[str, Any], shared: dict[int, Params]
    ) -> InnerStep:
        problem, values = self._problem, dict(packed)
        inner, outer = set(values["inner_params"]), set(values["outer_params"])
        if inner and inner != set(problem.inner_params):
            raise ValueError(
                _OTHER_NAMES.format("inner", *_both(inner, problem.inner_params))
            )
        if outer != set(problem.outer_params):
            raise ValueError(
                _OTHER_NAMES.format("outer", *_both(outer, problem.outer_params))
            )

        def placed(given: Mapping[str, Tensor] | None, like: Params) -> Params | None:
            if given is None:
                return None
            return {n: t.to(like[n].device) for n, t in given.items()}

        w, lam = problem.inner_params, problem.outer_params
        values["inner_params"] = placed(values["inner_params"], w)
        outer = values["outer_params"]
        if id(outer) not in shared:
            shared[id(outer)] = placed(outer, lam) or {}
        values["outer_params"] = shared[id(outer)]
        values["grads"] = placed(values["grads"], w)
        values["outer_grads"] = placed(values["outer_grads"], lam)
        values["state"] = {
            # torch counts steps on the host.
            n: {k: t.cpu() if k == "step" else t.to(w[n].device) for k, t in s.items()}
            for n, s in values["state"].items()
        }
        values["micro_batches"] = self._unpack_batches(values["micro_batches"])
        values["rule"] = rule_from_config(values["rule"])
        return InnerStep(**values)


_OTHER_NAMES = (
    "the recorded inner steps have other {} parameters than this problem ({}; here: {}). "
    "Load the state of an optimizer over the same model."
)


def _both(saved: set[str], here: Params) -> tuple[str, str]:
    """Return the names that differ: those saved, and those here."""
    return (
        some(dict.fromkeys(sorted(saved - set(here)))) or "none",
        some({n: t for n, t in here.items() if n not in saved}) or "none",
    )


def _check_learned(saved: Params, mine: Params) -> None:
    """Refuse the state of a problem that learns other settings or starts.

    Raises:
        ValueError: naming them, with their shapes where only those differ.
    """
    theirs, here = ({n: list(t.shape) for n, t in p.items()} for p in (saved, mine))
    if theirs == here:
        return
    if theirs.keys() == here.keys():
        theirs = {n: shape for n, shape in theirs.items() if shape != here[n]}
        here = {n: here[n] for n in theirs}
        msg = (
            f"what this state_dict learned of the inner run has other shapes: {theirs}, "
            f"and here {here}. Make the problem with as many values in inner_settings, "
            "one for each parameter group or for each step of a schedule."
        )
        raise ValueError(msg)
    msg = (
        f"this state_dict is of a problem that learns {list(theirs) or 'nothing'} of the "
        f"inner run, and this one learns {list(here) or 'nothing'}: the outer parameters "
        "would not fit. Make the problem with the same inner_settings and learn_start."
    )
    raise ValueError(msg)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _state_at(state: Any, device: torch.device) -> Any:
    """Return an estimator's state where the parameters are."""
    if not isinstance(state, dict):
        return _moved(state, device)
    # torch counts steps on the host, and so do the rules that an estimator may use.
    return {
        key: item if key == "step" else _state_at(item, device)
        for key, item in state.items()
    }


def _is_on_host(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "cpu"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_is_on_host, value))
    return True


def _check_saved(
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


def _packed_setting(value: Any) -> Any:
    """Return a setting as plain values; a product as its name and settings."""
    if not isinstance(value, Product):
        return value
    made = make_product(value.name)
    settings = {
        f.name: getattr(value, f.name)
        for f in fields(value)  # pyright: ignore[reportArgumentType]
        if getattr(value, f.name) != getattr(made, f.name)
    }
    return {"product": value.name, "settings": settings}


def _unpacked_setting(value: Any) -> Any:
    if isinstance(value, Mapping) and value.keys() == {"product", "settings"}:
        return make_product(value["product"], **value["settings"])
    return value


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
                settings[field.name] = _packed_setting(value)
        made = {key: _unpacked_setting(value) for key, value in settings.items()}
        same = make_estimator(estimator.name, **made) == estimator
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
    settings = packed["settings"]
    made = {key: _unpacked_setting(value) for key, value in settings.items()}
    return make_estimator(packed["name"], **made)
