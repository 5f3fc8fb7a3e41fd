"""Every method: it trains, saves, loads again, and refuses what means nothing to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bidora import load_run
from bidora.methods import METHODS
from tests.tolerances import error, tol

OF_ONE_PHASE = ("dora", "dora-peft", "lora", "rslora", "houlsby", "full")

pytestmark = [
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.mark.parametrize("name", METHODS.names())
def test_what_was_trained_is_what_is_loaded(
    finished: Callable[[str], Any], name: str, capsys: Any
) -> None:
    run = finished(name)
    truth = run.logits()
    loaded, tokenizer = load_run(run.folder)
    assert error(run.logits(loaded), truth) <= tol(torch.float32, cond=10)
    assert tokenizer(["apple"])["input_ids"]
    lines: dict[str, Any] = {}
    exec(run.result.loading_code, lines)
    assert not lines["model"].training
    assert error(run.logits(lines["model"]), truth) <= tol(torch.float32, cond=10)
