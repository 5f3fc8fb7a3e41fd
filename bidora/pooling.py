"""A linear head on pooled token states: how a sentence encoder was trained to be read.

The classes of transformers for classifying sequences read the first token, through a
dense layer of their own. A sentence encoder was trained for another reading, mostly the
mean of its tokens, and says so beside its weights.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from bidora.defaults import PAIRINGS, POOLINGS
from bidora.errors import UserError

__all__ = ["PooledModel", "contrast", "own_pooling", "pool"]

FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
"""What sentence-transformers writes, and our word for it."""

CONTRASTS = 3
"""Numbers that `contrast` makes of two entries."""


def pool(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    r"""Return one vector a sequence of token states.

    `mean` is $\sum_t m_t h_t / \sum_t m_t$; `max` is taken by coordinate; `first` and
    `last` are the states of the first and the last token that the mask keeps. A sequence
    of padding alone has no tokens: their mean and maximum are 0 by definition.

    Args:
        states: `(batch, tokens, width)`.
        mask: `(batch, tokens)`, 1 for tokens and 0 for padding on either side; None where
            nothing is padded.
        how: `mean`, `first`, `last` or `max`.

    Returns:
        `(batch, width)`, in the dtype of `states`.

    Raises:
        ValueError: If `how` is another.

    Example:
        >>> states = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> pool(states, torch.tensor([[1, 1, 0]]), "mean").item()
        2.0
    """
    if how not in POOLINGS[2:]:
        raise ValueError(f"unknown pooling {how!r}; choose {', '.join(POOLINGS[2:])}.")
    # Places and counts are whole numbers: those above 256 are not all in bfloat16.
    kept = states.new_ones(states.shape[:2]) if mask is None else mask
    kept = (kept != 0).long()
    if how == "mean":
        count = kept.sum(1, keepdim=True).clamp(min=1)
        total = (states * kept.unsqueeze(-1).to(states.dtype)).sum(1)
        return total / count.to(states.dtype)
    if how == "max":
        hidden = kept.unsqueeze(-1) == 0
        largest = states.masked_fill(hidden, torch.finfo(states.dtype).min).amax(1)
        return largest.masked_fill(hidden.all(1), 0.0)
    rows, places = (torch.arange(n, device=states.device) for n in states.shape[:2])
    found = kept if how == "first" else kept * places
    return states[rows, found.argmax(1)]


def contrast(first: Tensor, second: Tensor) -> Tensor:
    r"""Return how the vectors of two texts differ, as a linear head can read it.

    With $\hat u = \sqrt d\,u/\lVert u\rVert$, whose entries have a mean square of 1, and
    $\hat v$ likewise, it is $[\hat u \hat v,\; (\hat u - \hat v)^2,\; \hat u - \hat v]$
    by entry. The mean of the first third is the cosine of $u$ and $v$; the last third
    alone tells which text came first. A vector of zeros stays one.

    Args:
        first: `(batch, width)`.
        second: Likewise.

    Returns:
        `(batch, CONTRASTS * width)`.

    Example:
        >>> contrast(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])).round()
        tensor([[ 0.,  0.,  2.,  2.,  1., -1.]])
    """
    u, v = (nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5
            for x in (first, second))  # fmt: skip
    return torch.cat([u * v, (u - v) ** 2, u - v], dim=-1)


class PooledModel(PreTrainedModel):
    """A transformer without its own head, pooled, under dropout and one linear layer.

    `config.pooling` says how tokens are pooled (see `pool`). Where `config.pairs` is
    `"apart"`, an example is two texts, each of which the transformer reads by itself, and
    the layer reads their `contrast`. The loss is that of the stock classes, by
    `config.problem_type`.

    Args:
        config: That of the body, with `pooling`.
        body: The loaded transformer; None to make one with random weights.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig(
        ...     vocab_size=9,
        ...     hidden_size=8,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ...     intermediate_size=8,
        ...     num_labels=3,
        ...     pooling="mean",
        ... )
        >>> model = PooledModel(config)
        >>> model(torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 3])
    """

    base_model_prefix = "body"
    config_class: Any = AutoConfig  # that of whatever body it is
    supports_gradient_checkpointing = True
    # The body has decided that already.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    # Its loss is the mean of the batch: a Trainer must not hand it (and so the body) the
    # count of examples in all batches of a step, nor take the loss to be divided by it.
    accepts_loss_kwargs = False

    def __init__(self, config: Any, body: PreTrainedModel | None = None) -> None:
        """Put the body under a new head."""
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self.body = AutoModel.from_config(config) if body is None else body
        self.dropout = nn.Dropout(_head_dropout(config))
        self.pairs = getattr(config, "pairs", PAIRINGS[1])
        width = config.get_text_config().hidden_size
        width *= CONTRASTS if self.pairs == "apart" else 1
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the head as the bodies draw their layers; they have drawn their own."""
        if module is self.head:
            std = getattr(self.config, "initializer_range", 0.02)
            nn.init.normal_(self.head.weight, std=std)
            nn.init.zeros_(self.head.bias)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the weights by the names that the module has for them.

        transformers would give some, ESM's among them, those of older checkpoints, which
        a plain module such as the one on the card does not load.

        Args:
            args: As for any model.
            kwargs: Likewise.
        """
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits, and the loss where there are labels.

        Args:
            input_ids: As for the body.
            attention_mask: Likewise.
            labels: Classes, numbers, or rows of zeros and ones.
            pair_input_ids: The second texts, padded to the length of the first ones.
            pair_attention_mask: Likewise.
            kwargs: What else the body takes.

        Raises:
            ValueError: If there are second texts and the model reads none, or the other
                way round.
        """
        apart = self.pairs == "apart"
        if pair_input_ids is not None and not apart:
            raise ValueError(
                "pair_input_ids were given, and this model reads no second text by "
                'itself; one whose config.pairs is "apart" does.'
            )
        if apart:
            if input_ids is None or pair_input_ids is None:
                raise ValueError(
                    "this model reads two texts, each by itself: give it input_ids and "
                    "pair_input_ids, padded to one length."
                )
            input_ids = torch.cat([input_ids, pair_input_ids])
            if attention_mask is not None and pair_attention_mask is not None:
                attention_mask = torch.cat([attention_mask, pair_attention_mask])
        kwargs["return_dict"] = True
        found = self.body(input_ids, attention_mask=attention_mask, **kwargs)
        pooled = pool(found.last_hidden_state, attention_mask, self.config.pooling)
        if apart:
            pooled = contrast(*pooled.chunk(2))
        logits = self.head(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, logits=logits, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )


def own_pooling(location: str, *, is_local: bool) -> str | None:
    """Return how a model was trained to be pooled, None where it does not say.

    Models of sentence-transformers say so in a file that `modules.json` leads to. A
    concatenation of several poolings is none of ours, so nothing is returned for it.

    Args:
        location: A folder, or a repository of the Hub.
        is_local: Whether it is a folder.

    Raises:
        UserError: If a file is there and is no JSON of that kind.
    """
    modules = _read(location, "modules.json", is_local=is_local)
    if modules is None:
        return None
    try:
        folder = next(
            (m["path"] for m in modules if m["type"].endswith(".Pooling")), None
        )
        if folder is None:
            return None
        file = f"{folder}/config.json".removeprefix("/")
        config = _read(location, file, is_local=is_local) or {}
        chosen = [FLAGS.get(name, "") for name, is_on in config.items()
                  if name.startswith("pooling_mode_") and is_on]  # fmt: skip
        named = config.get("pooling_mode")  # newer files have one word
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the pooling settings of {location} cannot be read ({error!r}); say what "
            f"they are with --pooling: {', '.join(POOLINGS[1:])}."
        ) from error
    if isinstance(named, str):
        chosen = [{"cls": "first", "lasttoken": "last"}.get(named, named)]
    known = len(chosen) == 1 and chosen[0] in FLAGS.values()
    return chosen[0] if known else None


def _read(location: str, name: str, *, is_local: bool) -> Any:
    from transformers.utils.hub import cached_file

    found = cached_file(
        location,
        name,
        local_files_only=is_local,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    try:
        with open(found, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{found} cannot be read ({error}); say how the model is pooled with "
            f"--pooling: {', '.join(POOLINGS[1:])}."
        ) from error


def _head_dropout(config: Any) -> float:
    """Return the dropout that the stock head of such a model would have."""
    for name in ("classifier_dropout", "hidden_dropout_prob", "seq_classif_dropout"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return 0.1
