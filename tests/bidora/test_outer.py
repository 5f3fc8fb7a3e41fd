"""Outer levels: the registry, magnitudes, and one of a third party."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from bidora import BiDoRAOptimizer, magnitudes
from bidora.errors import UserError
from bidora.outer import OUTER_LEVELS, OuterLevel, make_outer_level
from tests.bidora.tiny_trainer import adapter, bert, collate, labelled, trainer


def test_magnitudes_are_the_only_one_of_ours() -> None:
    assert OUTER_LEVELS.names() == ("magnitudes",)
    level = make_outer_level("magnitudes")
    assert (level.name, level.adapter) == ("magnitudes", "use_dora")
    with pytest.raises(UserError, match=r"unknown outer level 'ranks'; choose one of"):
        make_outer_level("ranks")


def test_magnitudes_are_frozen_when_they_settle() -> None:
    model = bert()
    level = make_outer_level("magnitudes")
    found = level.parameters(model)
    assert found.keys() == magnitudes(model).keys()
    for _ in range(2):  # a retraining that goes on settles again
        level.settle(model)
        assert not any(p.requires_grad for p in found.values())
    with pytest.raises(ValueError, match=r"magnitudes of the model are frozen"):
        level.parameters(model)


class HeadBias(OuterLevel):
    """The bias of the head, as somebody else's level."""

    name: ClassVar[str] = "head-bias"

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = model.named_parameters()
        return {n: p for n, p in found if n.endswith("default.bias")}


@pytest.fixture
def head_bias(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(OUTER_LEVELS, "_homes", dict(OUTER_LEVELS._homes))
    OUTER_LEVELS.register("head-bias", f"{__name__}:HeadBias")
    monkeypatch.setitem(__import__("sys").modules, __name__, _this_module())
    return "head-bias"


def _this_module() -> Any:
    module = type(nn)(__name__)
    module.HeadBias = HeadBias
    return module


def test_the_optimizer_moves_what_a_level_names(head_bias: str) -> None:
    model = bert()
    opt = BiDoRAOptimizer(model, outer_level=head_bias, outer_warmup=0, outer_every=1)
    assert [*opt.problem.outer_params] == [*HeadBias().parameters(model)]
    assert set(magnitudes(model)) <= set(opt.problem.inner_params)
    start = adapter(model)
    rows: Any = labelled(8)
    batch = collate(list(rows))
    assert opt.step(batch, batch).outer_step
    moved = {n for n, p in adapter(model).items() if not torch.equal(p, start[n])}
    assert set(opt.problem.outer_params) <= moved


def test_the_trainer_searches_and_freezes_it(head_bias: str, tmp_path: Path) -> None:
    t = trainer(tmp_path, outer_level=head_bias, retrain="fresh")
    (name,) = HeadBias().parameters(t.model)
    start = adapter(t.model)
    t.train()
    end = adapter(t.model)
    frozen = {n for n, p in t.model.named_parameters() if not p.requires_grad}
    assert name in frozen
    assert not set(magnitudes(t.model)) & frozen
    assert not torch.equal(end[name], start[name])
