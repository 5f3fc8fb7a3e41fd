"""The one set of defaults: of the command, of the Trainer's arguments, of the optimizer."""

from __future__ import annotations

__all__ = [
    "BITFIT_LEARNING_RATE",
    "BUDGET",
    "BUNDLED_MODEL",
    "ESTIMATOR",
    "FULL_LEARNING_RATE",
    "LEARNING_RATE",
    "MAX_GRAD_NORM",
    "METHOD",
    "ORTHOGONALITY",
    "OTHER_FULL_LEARNING_RATE",
    "OTHER_LEARNING_RATE",
    "OTHER_METHODS",
    "OUTER_EVERY",
    "OUTER_WARMUP",
    "PAIRINGS",
    "POOLINGS",
    "PRODUCT_FRACTION",
    "PROTEIN_MODEL",
    "RETRAIN_SHARE",
    "SEARCH_SHARE",
    "SMALL_LLM",
    "STARTS",
    "VALIDATION_FRACTION",
    "WARMUP_RATIO",
    "WEIGHT_DECAY",
]

BUNDLED_MODEL = "all-MiniLM-L6-v2"
"""Name of the encoder that the extra `demo` installs."""

SMALL_LLM = "smollm2"
"""Name of the language model that the extra `llm` installs: SmolLM2-135M-Instruct."""

PROTEIN_MODEL = "antiberty"
"""Name of the protein model that the extra `protein` installs: AntiBERTy, of antibodies."""

POOLINGS = ("auto", "head", "mean", "first", "last", "max")
"""What `--pooling` takes: `auto` is the model's own, else `head`, the stock class."""

PAIRINGS = ("auto", "together", "apart")
"""What `--pairs` takes: `auto` is apart for a model that was trained on texts alone."""

METHOD = "full"
"""How the bundled encoder is trained; a model as small loses nothing by it."""

OTHER_METHODS = ("lora", "lora-plus", "bidora")
"""How every other model is trained, and this one where a setting is given that means
nothing to `METHOD`: by the first of these to which every given setting is of use."""

STARTS = ("probe", "random")
"""What the head starts from."""

BUDGET = "economical"
"""See `bidora.budget`."""

ESTIMATOR = "darts"
"""That of every budget, and of `BiDoRAOptimizer`."""

LEARNING_RATE = 6e-4
"""AdamW's rate of directions, head and magnitudes for the bundled encoder."""

OTHER_LEARNING_RATE = 5e-4
"""Likewise for every other model. transformers' own 5e-5 is for training all weights."""

FULL_LEARNING_RATE = 1e-4
"""Of full fine-tuning, for the bundled encoder."""

OTHER_FULL_LEARNING_RATE = 5e-5
"""Likewise for every other model: transformers' own."""

BITFIT_LEARNING_RATE = 1e-3
"""Of BitFit, whose biases want a higher rate than whole models."""

WEIGHT_DECAY = 0.1
"""AdamW's decoupled weight decay, on both levels."""

WARMUP_RATIO = 0.06
"""Part of each phase in which the rates rise."""

MAX_GRAD_NORM = 1.0
"""Norm that inner gradients are clipped to."""

VALIDATION_FRACTION = 0.2
"""Part of the training examples that is held back for the outer level."""

OUTER_EVERY = 4
"""Inner steps from one outer step to the next, in the economical budget."""

OUTER_WARMUP = 10
"""Inner steps before the first outer step, at most a quarter of the search."""

ORTHOGONALITY = 1e-5
"""Weight of the orthogonality term in the inner loss, where there is one: the paper's."""

PRODUCT_FRACTION = 0.25
"""Part of the inner batch that the mixed product is taken on, in the economical budget."""

SEARCH_SHARE = 1 / 2
"""Steps of the search over those that were asked for, in the economical budget."""

RETRAIN_SHARE = 2 / 3
"""Likewise those of its retraining, which is warm."""
