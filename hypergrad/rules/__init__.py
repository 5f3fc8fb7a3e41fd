"""Rules: what an inner optimizer's step did, and its adjoint."""

from __future__ import annotations

from hypergrad.rules._many import Many
from hypergrad.rules.adam import Adam, AdamW
from hypergrad.rules.base import Pullback, Pushforward, Rule, State
from hypergrad.rules.compose import Clipped, Grouped
from hypergrad.rules.elementwise import Counts, ElementwiseRule, ManySlots
from hypergrad.rules.optimizers import (
    SUPPORTED,
    check_supported,
    rule_from_config,
    rule_of,
    state_of,
)
from hypergrad.rules.sgd import SGD
from hypergrad.rules.torchopt import TorchOptRule

__all__ = [
    "SGD",
    "SUPPORTED",
    "Adam",
    "AdamW",
    "Clipped",
    "Counts",
    "ElementwiseRule",
    "Grouped",
    "Many",
    "ManySlots",
    "Pullback",
    "Pushforward",
    "Rule",
    "State",
    "TorchOptRule",
    "check_supported",
    "rule_from_config",
    "rule_of",
    "state_of",
]
