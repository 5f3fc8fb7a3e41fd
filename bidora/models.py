"""From `--model` to a model with adapters: bundled, from a folder, or from the Hub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bidora.defaults import BUNDLED_MODEL, SMALL_LLM
from bidora.errors import UserError
from bidora.packaged import PACKAGED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bidora.tasks.base import Schema, Task

__all__ = [
    "Base",
    "ModelSource",
    "find_model",
    "load_base",
    "load_config",
    "load_processor",
    "load_tokenizer",
    "longest_input",
    "without_bars",
]

LANGUAGE_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""PEFT's kinds of task that need no new head: the model's own outputs are the answer."""


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is loaded from.

    Args:
        name: What the user called it.
        location: A folder, or a repository of the Hub.
        is_local: Whether it is a folder; then nothing is ever fetched.
        vocabulary: File with the tokens of a model whose folder holds no tokenizer.
        gguf_file: The file in that folder which holds all of the model, where there is
            one; its weights are brought back from few bits to float32.
    """

    name: str
    location: str
    is_local: bool
    vocabulary: str | None = None
    gguf_file: str | None = None

    @property
    def hub_name(self) -> str:
        """What loads it on another machine; a folder of this one where nothing does."""
        packaged = PACKAGED.get(self.name)
        return (packaged and packaged.hub_name) or self.location


def find_model(name: str = BUNDLED_MODEL) -> ModelSource:
    """Find out what `--model` means, without loading anything.

    Args:
        name: `all-MiniLM-L6-v2` for the encoder of the extra `demo`, `antiberty` for the
            protein model of the extra `protein`, `smollm2` for the language model of the
            extra `llm`, a folder with a transformers model, or a repository of the Hub.

    Returns:
        Where the model is.

    Raises:
        UserError: If a packaged model is not installed, or the folder holds no
            transformers model.
    """
    if name in PACKAGED:
        folder, words = PACKAGED[name].find(name)
        words = str(words) if words else None
        return ModelSource(name, str(folder), True, words, PACKAGED[name].gguf_file)
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


def load_tokenizer(source: ModelSource, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a padding token.

    Args:
        source: Where the model is.
        kwargs: What else `from_pretrained` is told.

    Returns:
        The tokenizer.

    Raises:
        UserError: If there is none, or it can't be fetched.
    """
    from transformers import AutoTokenizer, BertTokenizer

    if source.vocabulary is not None:
        return BertTokenizer(vocab=source.vocabulary, do_lower_case=False, **kwargs)
    tokenizer: Any = _load(source, AutoTokenizer.from_pretrained, "tokenizer", **kwargs)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {source.name!r} has neither a padding nor an end "
                "token, so batches cannot be made; set pad_token in its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and its kin
    return tokenizer


def load_config(source: ModelSource) -> Any:
    """Load the model's configuration.

    Args:
        source: Where the model is.

    Returns:
        As from transformers.

    Raises:
        UserError: If there is none, or it can't be fetched.
    """
    from transformers import AutoConfig

    return _load(source, AutoConfig.from_pretrained, "model")


def load_processor(source: ModelSource, task: Task, **kwargs: Any) -> Any:
    """Load what makes the model's inputs for a task: a tokenizer, or an image processor.

    Args:
        source: Where the model is.
        task: What it is for.
        kwargs: What else `from_pretrained` is told.

    Returns:
        What the task's `auto_processor` loads.

    Raises:
        UserError: If there is none, it can't be fetched, or the model is not of a kind
            that does such a task.
    """
    if task.auto_processor == "AutoTokenizer":
        return load_tokenizer(source, **kwargs)
    import transformers

    config = load_config(source)
    auto: Any = getattr(transformers, task.auto_model)
    if type(config) not in auto._model_mapping:
        raise UserError(
            f"--model {source.name} is a {config.model_type}, which {task.auto_model} of "
            f"transformers does not load, so it can't be used for {task.name}. Pass "
            "another model, such as google/vit-base-patch16-224-in21k."
        )
    load = getattr(transformers, task.auto_processor).from_pretrained
    return _load(source, load, "image processor", **kwargs)


@dataclass(frozen=True)
class Base:
    """A loaded model with a new head, before a method puts anything in.

    Attributes:
        source: Where it came from.
        model: The transformers model.
        head: Modules to train whole: the head, and what came without weights; none where
            the model's own outputs are what the task needs.
        peft_type: PEFT's name for the kind of task, where it has one. Without one it
            knows no head, and `head` alone says what is trained whole.
        pooling: How tokens are pooled in front of a linear head; `head` for the stock
            class, whose head is its own.
        pairs: How two texts are read: `together` or `apart`.
    """

    source: ModelSource
    model: Any
    head: list[str]
    peft_type: str | None
    pooling: str = "head"
    pairs: str = "together"

    def linear_layers(self) -> list[str]:
        """Return the names of the layers that an adapter may go into.

        Not the head's, nor the one that gives a language model's outputs, whose weights
        are those of the input embeddings in many.
        """
        from transformers.pytorch_utils import Conv1D

        output = None
        if self.peft_type in LANGUAGE_TYPES:
            output = self.model.get_output_embeddings()
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
            and module is not output
            and not self._is_trained_whole(name)
        ]

    def _is_trained_whole(self, name: str) -> bool:
        """Return whether PEFT wraps a module, or one that it is in, for the head's sake.

        It goes by the ends of names: `head` is also ESM's `contact_head`.
        """
        parts = name.split(".")
        ways = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        return any(way.endswith(tuple(self.head)) for way in ways)

    def adaptable(self) -> list[str]:
        """Return the ends of those names, as `--target-modules` takes them."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.linear_layers()})


def load_base(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    schema: Schema,
    *,
    seed: int = 0,
    pooling: str = "auto",
    pairs: str = "auto",
) -> Base:
    """Load the base model and give it a new head for a task.

    The head depends on `seed` alone: it is set here. Nothing that a checkpoint says of
    its former head (number of outputs, kind of loss) is kept.

    Args:
        source: Where the base model is.
        tokenizer: Its tokenizer.
        task: What the model is for.
        schema: What the task found out about the data.
        seed: Seed of the new parameters.
        pooling: One of `bidora.defaults.POOLINGS`: `head` for the stock class of
            transformers; `auto` for the pooling that the model was trained with, where
            it says so, and elsewhere `head`, or the mean for proteins.
        pairs: One of `bidora.defaults.PAIRINGS`; `auto` reads two texts apart where the
            model says how it was trained to be pooled, for then it knows single texts.

    Returns:
        The model in float32, on the CPU.

    Raises:
        UserError: If the model can't be loaded, or pooled like that, or can't read two
            texts like that.
    """
    import transformers

    from bidora.pooling import PooledModel

    usual = task.usual_pooling(schema)
    how, was_pooled = _resolve_pooling(source, task, pooling, usual)
    reading = _resolve_pairs(source, schema, pairs, how)
    torch.manual_seed(seed)
    pooled = how != "head"
    auto: Any = getattr(transformers, "AutoModel" if pooled else task.auto_model)
    loaded: Any = _load(
        source,
        (PooledModel if was_pooled else auto).from_pretrained,
        "model",
        **_unpacked(source),
        **task.model_kwargs(schema),
        ignore_mismatched_sizes=task.peft_type not in LANGUAGE_TYPES,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, info = loaded
    if hasattr(tokenizer, "pad_token_id"):
        model.config.pad_token_id = tokenizer.pad_token_id
    if hasattr(model.config, "quantization_config") and source.gguf_file is not None:
        # Plain float32 weights by now; an older transformers still calls them quantised.
        del model.config.quantization_config
    if task.peft_type in LANGUAGE_TYPES:
        if info["missing_keys"]:
            either = ", or an encoder-decoder, such as a T5"
            raise UserError(
                f"{source.name!r} has no weights of a language model "
                f"({', '.join(sorted(info['missing_keys'])[:3])} would be new), so it "
                f"cannot write. {task.name} needs a decoder, such as --model {SMALL_LLM} "
                "or a GPT-2 or Llama"
                f"{either if task.takes_two_parts else ''}."
            )
        return Base(source, model, [], task.peft_type)
    if not pooled:
        return Base(source, model, _head_modules(model, info), task.peft_type)
    new = {key.rsplit(".", 1)[0].removeprefix("body.") for key in info["missing_keys"]}
    new = {n for n in new if n != "head" and not n.startswith("pooler.")}
    model = model.body if was_pooled else model
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None  # nothing reads it
    model.config.pooling, model.config.pairs = how, reading
    torch.manual_seed(seed)  # the head's values do not depend on the body's loading
    whole = PooledModel(model.config, model)
    return Base(
        source,
        whole,
        sorted({"head", *(f"body.{name}" for name in new)}),
        task.peft_type,
        how,
        reading,
    )


def _resolve_pooling(
    source: ModelSource, task: Task, pooling: str, usual: str
) -> tuple[str, bool]:
    """Return how tokens are pooled: the model's own way where nothing is asked for.

    A model that does not say is pooled in the task's `usual` way.

    Returns:
        The pooling, and whether the model was saved whole as a `PooledModel`, from which
        its body has to be taken.

    Raises:
        UserError: If the task or the model has no such pooling.
    """
    from bidora.pooling import own_pooling

    if task.peft_type != "SEQ_CLS" and pooling not in ("auto", "head"):
        raise UserError(
            f"--pooling {pooling} makes one vector of a text, and {task.name} needs "
            "one for each word; leave it out."
        )
    if task.peft_type in LANGUAGE_TYPES:
        return "head", False
    config = load_config(source)
    was_pooled = "PooledModel" in (config.architectures or ())
    if was_pooled and (pooling == "head" or task.peft_type != "SEQ_CLS"):
        raise UserError(
            f"{source.name!r} was saved by a run of bidora with a linear head on pooled "
            f"tokens, which the stock class that --pooling head or {task.name} needs "
            "does not read. Pass the model that the run started from."
        )
    if pooling == "head" or task.peft_type != "SEQ_CLS":
        return "head", False
    two_parts = getattr(config, "is_encoder_decoder", False)
    if pooling == "auto":
        if was_pooled:
            return config.pooling, True
        own = own_pooling(source.location, is_local=source.is_local)
        return "head" if two_parts else own or usual, False
    if two_parts:
        raise UserError(
            f"--pooling {pooling}: {source.name!r} is an encoder and a decoder, whose "
            "stock head reads the decoder; leave --pooling out."
        )
    return pooling, was_pooled


def _resolve_pairs(source: ModelSource, schema: Schema, pairs: str, how: str) -> str:
    """Return how two texts are read, `together` where there is one alone.

    Args:
        source: Where the base model is.
        schema: What the task found out about the data.
        pairs: What was asked for.
        how: How tokens are pooled.

    Raises:
        UserError: If they are to be read apart, and can't be.
    """
    from bidora.pooling import own_pooling

    are_pairs = bool(schema.settings.get("text_pair_column"))
    if pairs == "apart":
        if not are_pairs:
            raise UserError(
                "--pairs apart is about two texts, and an example has one; name the "
                "column of the second with --text-pair-column, or leave --pairs out."
            )
        if how == "head":
            raise UserError(
                f"--pairs apart needs one vector of each text, and the stock head of "
                f"{source.name!r} makes none; add --pooling mean."
            )
        return pairs
    if pairs == "together" or not are_pairs or how == "head":
        return "together"
    config = load_config(source)
    if "PooledModel" in (config.architectures or ()):
        return getattr(config, "pairs", "together")
    own = own_pooling(source.location, is_local=source.is_local)
    return "together" if own is None else "apart"


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


HOLDS = {
    "model": "a transformers encoder or decoder with its tokenizer",
    "image processor": "a transformers model for images with its "
    "preprocessor_config.json",
}
"""What a folder is to hold, by what was not found in it."""


def _unpacked(source: ModelSource) -> dict[str, Any]:
    """Return what makes plain weights of packed ones, which nothing here could train."""
    import transformers

    if source.gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}  # an older transformers unpacks them unasked
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _is_for_images(source: ModelSource) -> bool:
    """Return whether a folder has what makes inputs of images, and nothing of texts."""
    folder = Path(source.location)
    has_processor = (folder / "preprocessor_config.json").is_file()
    return has_processor and not any(folder.glob("*tokenizer*"))


def _load(source: ModelSource, load: Any, what: str, **settings: Any) -> Any:
    if source.gguf_file is not None:
        settings["gguf_file"] = source.gguf_file
    try:
        with without_bars():
            return load(
                source.location,
                local_files_only=source.is_local,
                trust_remote_code=False,
                **settings,
            )
    except Exception as error:  # each library raises its own kinds
        text = str(error).strip()
        first_line = text.split("\n")[0].strip()
        if first_line.endswith(":"):  # what follows is the reason
            first_line = " ".join(text.split())
        first_line = first_line[:200]
        if isinstance(error, ImportError):
            remedy = "Install what it names."
            if "bitsandbytes" in str(error):
                remedy = "Its weights are quantised: pip install bitsandbytes"
            raise UserError(
                f"the {what} {source.name!r} needs a package that is not installed "
                f"({first_line}). {remedy}"
            ) from error
        if what == "tokenizer" and _is_for_images(source):
            raise UserError(
                f"the folder {source.location} holds a model for images: it has a "
                "preprocessor_config.json and no tokenizer. For texts, pass a folder that "
                f"holds {HOLDS['model']}; if the examples are images, say --task-type "
                "images."
            ) from error
        if source.is_local:
            raise UserError(
                f"the {what} in the folder {source.location} cannot be loaded "
                f"({type(error).__name__}: {first_line}). Pass a "
                f"folder that holds {HOLDS.get(what, HOLDS['model'])}."
            ) from error
        raise UserError(
            f"the {what} {source.name!r} cannot be fetched from the Hub "
            f"({first_line}). Check its name and the network connection. To work offline, "
            f"run `hf download {source.location}` where there is a network and copy what "
            "it fetched into the cache of this machine (~/.cache/huggingface/hub, or where "
            "HF_HUB_CACHE says); a new run may also take a folder that save_pretrained "
            "wrote: --model FOLDER."
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' bars over weights, a second long, out of a bar of ours.

    Example:
        >>> from transformers.utils import logging
        >>> with without_bars():
        ...     logging.is_progress_bar_enabled()
        False
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
