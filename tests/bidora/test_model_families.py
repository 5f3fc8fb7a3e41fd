"""BiDoRA trains a tiny random model of each family, inner and outer steps as they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bidora import BiDoRAOptimizer, exact_dora_layers, magnitudes

VOCABULARY, WIDTH, LENGTH, EXAMPLES = 50, 16, 6, 6
LAYERS, HEADS = 1, 2

pytestmark = [
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT's, where the table of words is adapted and is the head's too
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]


class Family(NamedTuple):
    """A model, what is adapted in it, and what is asked of it.

    Attributes:
        make: Makes the model.
        targets: Names of the adapted modules.
        task: PEFT's task type; a head of classes is trained with the adapter.
        layers: How many layers that adapts.
        batch: Makes the examples.
    """

    make: Callable[[], Any]
    targets: list[str]
    task: str | None
    layers: int
    batch: Callable[[], dict[str, Tensor]]


def words() -> Tensor:
    return torch.randint(5, VOCABULARY, (EXAMPLES, LENGTH))


def classes() -> dict[str, Tensor]:
    ids = words()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(EXAMPLES) % 2,
    }


def language() -> dict[str, Tensor]:
    ids = words()
    return {"input_ids": ids, "labels": ids}


def translation() -> dict[str, Tensor]:
    return {"input_ids": words(), "labels": words()[:, :3].contiguous()}


def pictures() -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(EXAMPLES, 3, 8, 8),
        "labels": torch.arange(EXAMPLES) % 2,
    }


# No dropout, and weights of the size of a trained model's: at 0.02, what a model of this
# width computes hardly depends on its words.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def made(config: str, model: str, **changes: Any) -> Callable[[], Any]:
    """Return what makes the model `hf.model` of `hf.config`."""
    return lambda: getattr(hf, model)(getattr(hf, config)(**{**COMMON, **changes}))


def encoder(
    config: str, model: str, targets: list[str], layers: int, **changes: Any
) -> Family:
    return Family(
        made(config, model, **{**STILL, **changes}), targets, "SEQ_CLS", layers, classes
    )


def decoder(config: str, model: str, **changes: Any) -> Family:
    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    settings = {"num_key_value_heads": 1, "head_dim": WIDTH // HEADS, **changes}
    return Family(
        made(config, model, **settings), targets, "CAUSAL_LM", 3 * LAYERS + 1, language
    )


FAMILIES = {
    "bert": encoder(
        "BertConfig", "BertForSequenceClassification", ["query", "value"], 2 * LAYERS
    ),
    "roberta": encoder(
        "RobertaConfig",
        "RobertaForSequenceClassification",
        ["query", "value"],
        2 * LAYERS,
    ),
    "deberta-v2": encoder(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        ["query_proj", "value_proj"],
        2 * LAYERS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        pooler_dropout=0.0,
        pooler_hidden_size=WIDTH,
    ),
    "modernbert": encoder(
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        ["Wqkv", "Wo"],
        6,
        num_hidden_layers=2,  # of which one looks around, and one everywhere
        global_attn_every_n_layers=2,
        local_attention=4,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        reference_compile=False,
    ),
    # All layers are one, which is adapted once and used in each.
    "albert": encoder(
        "AlbertConfig",
        "AlbertForSequenceClassification",
        ["query", "value"],
        2,
        num_hidden_layers=3,
        embedding_size=8,
        classifier_dropout_prob=0.0,
    ),
    "esm": encoder(
        "EsmConfig",
        "EsmForSequenceClassification",
        ["query", "value"],
        2 * LAYERS,
        position_embedding_type="rotary",
        mask_token_id=4,
    ),
    "gpt2": Family(
        made(
            "GPT2Config",
            "GPT2LMHeadModel",
            n_embd=WIDTH,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        ["c_attn", "c_proj", "c_fc", "wte"],
        "CAUSAL_LM",
        4 * LAYERS + 1,
        language,
    ),
    "llama": decoder("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": decoder("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": decoder("GemmaConfig", "GemmaForCausalLM"),
    "t5": Family(
        made(
            "T5Config",
            "T5ForConditionalGeneration",
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=2 * WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        ["q", "v", "wo"],
        "SEQ_2_SEQ_LM",
        2 * 3 * LAYERS + 2 * LAYERS,
        translation,
    ),
    "vit": Family(
        made(
            "ViTConfig",
            "ViTForImageClassification",
            image_size=8,
            patch_size=4,
            **STILL,
        ),
        ["query", "q_proj", "value", "v_proj", "projection"],
        None,
        2 * LAYERS + 1,
        pictures,
    ),
}


def adapted(family: Family) -> Any:
    torch.manual_seed(0)
    model = family.make()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=family.targets,
        task_type=cast(Any, family.task),
        modules_to_save=[n for n in ("classifier", "pooler") if hasattr(model, n)],
        fan_in_fan_out=isinstance(model, hf.GPT2LMHeadModel),
    )
    return get_peft_model(model, config)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return model(**batch).loss.item()


@pytest.mark.parametrize("name", FAMILIES)
def test_bidora_trains_it(name: str) -> None:
    family = FAMILIES[name]
    model, batch = adapted(family), family.batch()
    opt = BiDoRAOptimizer(
        model, inner_lr=2e-2, outer_lr=2e-2, outer_every=2, outer_warmup=2
    )
    assert len(exact_dora_layers(model)) == len(magnitudes(model)) == family.layers
    assert set(magnitudes(model)) == set(opt.problem.outer_params)
    first = last = loss_of(model.train(), batch)
    outer_steps = 0
    for step in range(60):
        before = {n: p.detach().clone() for n, p in magnitudes(model).items()}
        report = opt.step(batch, batch)
        outer_steps += report.outer_step
        for parameter, p in magnitudes(model).items():
            still = torch.equal(p, before[parameter])
            assert still != report.outer_step, (step, parameter)
        last = loss_of(model, batch)
        if outer_steps >= 3 and last < 0.5 * first:
            break
    assert last < 0.5 * first
