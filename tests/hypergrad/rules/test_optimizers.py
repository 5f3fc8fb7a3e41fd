"""Rules read off torch.optim optimizers: which work, what they do, how they are saved."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad.rules import (
    SGD,
    SUPPORTED,
    Adam,
    AdamW,
    Clipped,
    Grouped,
    Rule,
    TorchOptRule,
    check_supported,
    rule_from_config,
    rule_of,
    state_of,
)
from tests.hypergrad.rules.reference import random_named
from tests.tolerances import error, tol

F64 = torch.float64
Groups = list[dict[str, Any]]

MAKERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "sgd": lambda g: torch.optim.SGD(g, lr=0.1),
    "momentum": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True),
    "maximize": lambda g: torch.optim.SGD(g, lr=0.1, maximize=True),
    "adam": lambda g: torch.optim.Adam(g, lr=0.1, weight_decay=0.1),
    "decoupled": lambda g: torch.optim.Adam(
        g, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "amsgrad": lambda g: torch.optim.Adam(g, lr=0.1, amsgrad=True),
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.1, betas=(0.5, 0.7), eps=1e-4),
    "foreach": lambda g: torch.optim.AdamW(g, lr=0.1, foreach=True),
    "fused": lambda g: torch.optim.AdamW(g, lr=0.1, fused=True),
    "tensor-lr": lambda g: torch.optim.AdamW(g, lr=torch.tensor(0.1)),
    "capturable-off": lambda g: torch.optim.SGD(g, lr=torch.tensor(0.1)),
}


def _leaves(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    return {n: t.requires_grad_() for n, t in random_named(0, dtype).items()}


def _two_groups(params: dict[str, Tensor]) -> Groups:
    return [
        {"params": [params["b"]], "lr": 0.3},
        {"params": [params["c"], params["a"]]},
    ]


@pytest.mark.parametrize("max_norm", [None, 5.0], ids=["", "clip"])
@pytest.mark.parametrize("kind", MAKERS)
def test_rule_does_what_the_optimizer_does(kind: str, max_norm: float | None) -> None:
    # Per-group learning rates, a scheduler, clipping: at each step the rule and the state
    # read just before give the optimizer's own result.
    params = _leaves()
    optimizer = MAKERS[kind](_two_groups(params))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for k in range(5):
        g = random_named(10 + k)
        for n, p in params.items():
            p.grad = g[n].clone()
        rule = rule_of(optimizer, params, max_norm)
        now = {n: p.detach().clone() for n, p in params.items()}
        moved, state = rule.apply(now, state_of(optimizer, params), g)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(params.values()), max_norm)
        optimizer.step()
        # A learning rate in a float32 tensor is used as float32.
        exact = tol(torch.float32 if "lr" in kind else F64)
        assert error(moved, {n: p.detach() for n, p in params.items()}) <= exact
        after = state_of(optimizer, params)
        for slot in after["a"]:
            theirs = {n: slots[slot] for n, slots in after.items()}
            assert error({n: state[n][slot] for n in theirs}, theirs) <= tol(F64)
        rates = rule.learning_rates(params)
        assert rates["b"] == pytest.approx(float(optimizer.param_groups[0]["lr"]))
        assert rates["a"] == rates["c"] == float(optimizer.param_groups[1]["lr"])
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(0.3 * 0.7**5)


def test_rules_read_off() -> None:
    params = _leaves()
    optimizer = torch.optim.Adam(list(params.values()), decoupled_weight_decay=True)
    rule = rule_of(optimizer, params, 2.0)
    assert isinstance(rule, Clipped)
    assert rule.max_norm == 2.0
    assert isinstance(rule.rule, Grouped)
    ((names, inner),) = rule.rule.groups
    assert names == ("a", "b", "c")
    assert inner == AdamW(1e-3, weight_decay=0.0)


def test_rule_of_a_part_of_the_parameters() -> None:
    params = _leaves()
    optimizer = torch.optim.SGD(_two_groups(params), lr=0.1)
    part = {"a": params["a"]}
    assert rule_of(optimizer, part) == Grouped(((("a",), SGD(0.1)),))
    assert rule_of(optimizer, {}) == Grouped(())
    stranger = {**params, "d": torch.ones(1), "e": torch.ones(1)}
    with pytest.raises(ValueError, match=r"'d' \(and 1 others\).*Make it over all"):
        rule_of(optimizer, stranger)


class MyAdamW(torch.optim.AdamW):
    """A subclass may step in another way than its parent."""


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.LBFGS,
        MyAdamW,
    ],
)
def test_others_are_refused_by_name(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> None:
    params = _leaves()
    optimizer = make(list(params.values()))
    for refuse in (check_supported, lambda o: rule_of(o, params)):
        with pytest.raises(TypeError) as caught:
            refuse(optimizer)
        message = str(caught.value)
        assert type(optimizer).__name__ in message
        for kind in SUPPORTED:
            assert f"torch.optim.{kind.__name__}" in message
        assert "lookback 0" in message


def test_state_is_a_copy() -> None:
    params = _leaves()
    optimizer = torch.optim.AdamW(list(params.values()), lr=0.1)
    assert state_of(optimizer, params) == {"a": {}, "b": {}, "c": {}}
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = state_of(optimizer, params)
    kept = state["a"]["exp_avg"].clone()
    assert state["a"]["step"].item() == 1
    optimizer.step()
    assert torch.equal(state["a"]["exp_avg"], kept)
    assert state["a"]["step"].item() == 1
    state["a"]["exp_avg"].zero_()
    assert optimizer.state[params["a"]]["exp_avg"].abs().max() > 0


def test_a_buffer_that_is_none_is_no_slot() -> None:
    # torch.optim.SGD without momentum leaves momentum_buffer None in some versions.
    params = _leaves()
    optimizer = torch.optim.SGD(list(params.values()), lr=0.1)
    optimizer.state[params["a"]]["momentum_buffer"] = None
    assert state_of(optimizer, params)["a"] == {}


RULES: dict[str, Rule] = {
    "sgd": SGD(0.1, momentum=0.9, dampening=-0.5, weight_decay=0.2, maximize=True),
    "nesterov": SGD(0.1, momentum=0.9, nesterov=True),
    "adam": Adam(0.1, betas=(0.5, 0.999), amsgrad=True, weight_decay=0.3),
    "adamw": AdamW(0.1, eps=1e-3),
    "nested": Clipped(
        Grouped(((("a", "b"), SGD(0.1)), (("c",), Clipped(AdamW(0.2), 0.5)))), 3.0
    ),
    "unbounded": Clipped(SGD(0.1), float("inf")),
    "empty": Grouped(()),
}


@pytest.mark.parametrize("name", RULES)
def test_config_survives_a_checkpoint(name: str) -> None:
    file = io.BytesIO()
    torch.save(RULES[name].config(), file)
    file.seek(0)
    loaded = rule_from_config(torch.load(file, weights_only=True))
    assert loaded == RULES[name]
    assert hash(loaded) == hash(RULES[name])


def test_config_of_another_version() -> None:
    with pytest.raises(
        ValueError, match=r"unknown rule 'lion'.*adamw.*another version"
    ):
        rule_from_config({"kind": "lion", "lr": 0.1})
    with pytest.raises(ValueError, match="unknown rule None"):
        rule_from_config({})


def test_config_of_closures_is_refused() -> None:
    torchopt: Any = importlib.import_module("torchopt")
    with pytest.raises(ValueError, match="cannot be saved"):
        Clipped(TorchOptRule(torchopt.sgd(0.1)), 1.0).config()
