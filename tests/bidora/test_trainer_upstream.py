"""What is used of transformers beyond its documents, and that its absence is told."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import Trainer

from bidora.trainer.upstream import (
    PRIVATE,
    _WholeName,
    check_transformers,
    steps_of,
    was_stopped,
)


def test_the_installed_version_is_right() -> None:
    check_transformers()


@pytest.mark.parametrize("version", ["5.0.0", "5.23.0", "5.99.1.dev0"])
def test_versions_that_were_made_for(version: str) -> None:
    check_transformers(version=version)


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0", "50.0"])
def test_other_versions_are_refused(version: str) -> None:
    said = rf"made for transformers>=5\.0,<6, but transformers {version} is installed"
    with pytest.raises(ImportError, match=said):
        check_transformers(version=version)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_method_that_is_gone_is_named(name: str) -> None:
    rest = {n: None for n in PRIVATE if n != name}
    with pytest.raises(ImportError, match=f"its Trainer has no {name}"):
        check_transformers(type("Changed", (), rest))
    assert callable(getattr(Trainer, name))


def test_the_name_of_a_metric_stays_whole() -> None:
    """`rewrite_logs` is what TensorBoard, wandb, comet and trackio call."""
    from transformers.integrations import integration_utils

    logs = {_WholeName("search/loss"): 1.0, _WholeName("search/eval_loss"): 2.0}
    names = integration_utils.rewrite_logs(logs)
    assert names == {"search/loss": 1.0, "search/eval_loss": 2.0}
    assert {type(name) for name in names} == {str}


def test_a_run_that_a_callback_ended() -> None:
    args = {"args": {"should_training_stop": True}}
    assert was_stopped({"stateful_callbacks": {"TrainerControl": args}})
    assert not was_stopped({"stateful_callbacks": {}})
    control: Any = transformers.TrainerControl(should_training_stop=True).state()
    assert was_stopped({"stateful_callbacks": {"TrainerControl": control}})


def test_steps_of_epochs() -> None:
    def args(**settings: Any) -> Any:
        given = {"max_steps": -1, "gradient_accumulation_steps": 2, **settings}
        return type("Args", (), given)

    assert steps_of(args(num_train_epochs=2.5), 5) == 8  # 2.5 times 3, rounded up
    assert steps_of(args(num_train_epochs=0.1), 5) == 1
    assert steps_of(args(num_train_epochs=3, max_steps=7), 5) == 7
