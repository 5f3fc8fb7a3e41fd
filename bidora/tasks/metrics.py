"""Scores, thin over scikit-learn and scipy, with what they leave open decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bidora.errors import UserError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CLASSIFICATION_METRICS",
    "MULTILABEL_METRICS",
    "REGRESSION_METRICS",
    "choose_metric",
    "classification_scores",
    "multilabel_scores",
    "outputs",
    "regression_scores",
    "softmax",
]

CLASSIFICATION_METRICS = ("accuracy", "f1_macro", "matthews_correlation", "f1")
REGRESSION_METRICS = ("pearson", "spearman")
"""Those that choices can be made by: more of them is better. The error is told beside."""
MULTILABEL_METRICS = ("f1_micro", "f1_macro")
_ZERO: Any = 0  # the stubs of scikit-learn know words alone


def choose_metric(name: str, known: Sequence[str]) -> str:
    """Return the metric's name, if it is known.

    Args:
        name: As the user or the data set has it.
        known: Names of the task's metrics.

    Raises:
        UserError: If it is another.
    """
    if name not in known:
        raise UserError(
            f"unknown metric {name!r} for this task type; choose one of "
            f"{', '.join(known)} with --metric."
        )
    return name


def outputs(predictions: Any) -> np.ndarray:
    """Return the model's scores as float64.

    Args:
        predictions: An array, or a tuple that begins with it: some models return
            hidden states beside their scores.

    Raises:
        UserError: If some are not finite.
    """
    import numpy as np

    first = predictions[0] if isinstance(predictions, tuple) else predictions
    array = np.asarray(first, dtype=np.float64)
    bad = int((~np.isfinite(array.reshape(len(array), -1))).any(axis=1).sum())
    if bad:
        raise UserError(
            f"the model's outputs are not finite for {bad} of {len(array)} examples, so "
            "they can't be scored; training has diverged. Lower --learning-rate (and "
            "--outer-learning-rate), or leave --bf16 out."
        )
    return array


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of classes, one row an example.

    Example:
        >>> import numpy as np
        >>> softmax(np.array([[0.0, 0.0]])).tolist()
        [[0.5, 0.5]]
    """
    from scipy.special import softmax as of_scipy

    return of_scipy(logits, axis=-1)


def classification_scores(
    chosen: np.ndarray, truth: np.ndarray, metric: str = "accuracy"
) -> dict[str, float]:
    """Return accuracy, macro F1, and `metric`.

    Macro F1 is the mean over the classes that occur or are predicted. Binary F1 is that
    of class 1. Matthews' correlation counts 0 where it is undefined: where all examples,
    or all predictions, are of one class.

    Args:
        chosen: Index of the predicted class of each example.
        truth: Index of the right one.
        metric: One of `CLASSIFICATION_METRICS`, returned beside the others.

    Example:
        >>> import numpy as np
        >>> right, said = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
        >>> classification_scores(said, right)["accuracy"]
        0.75
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    macro = f1_score(truth, chosen, average="macro", zero_division=_ZERO)
    scores = {"accuracy": accuracy_score(truth, chosen), "f1_macro": macro}
    if metric == "matthews_correlation":
        is_one = len({*truth.tolist(), *chosen.tolist()}) < 2
        scores[metric] = 0.0 if is_one else matthews_corrcoef(truth, chosen)
    elif metric == "f1":
        scores[metric] = f1_score(
            truth, chosen, labels=[1], average="macro", zero_division=_ZERO
        )
    return {name: float(score) for name, score in scores.items()}


def regression_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, and the mean squared error.

    A correlation with a constant is undefined and counts 0: it orders nothing.

    Args:
        predicted: One number an example.
        truth: What it should be.

    Example:
        >>> import numpy as np
        >>> regression_scores(np.array([1.0, 2.0]), np.array([2.0, 4.0]))["mse"]
        2.5
    """
    import numpy as np
    from scipy import stats

    scores = {"pearson": 0.0, "spearman": 0.0}
    if len(truth) > 1 and np.ptp(predicted) > 0 and np.ptp(truth) > 0:
        linear: Any = stats.pearsonr(predicted, truth)  # the stubs know tuples alone
        monotone: Any = stats.spearmanr(predicted, truth)
        scores = {"pearson": linear.statistic, "spearman": monotone.statistic}
    scores["mse"] = float(np.mean((predicted - truth) ** 2))
    return {name: float(score) for name, score in scores.items()}


def multilabel_scores(chosen: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return micro and macro F1; a label that neither occurs nor is predicted counts 0.

    Args:
        chosen: Zeros and ones, `(examples, labels)`.
        truth: Likewise.

    Example:
        >>> import numpy as np
        >>> multilabel_scores(np.array([[1, 0]]), np.array([[1, 1]]))["f1_macro"]
        0.5
    """
    from sklearn.metrics import f1_score

    return {
        f"f1_{average}": float(
            f1_score(truth, chosen, average=average, zero_division=_ZERO)
        )
        for average in ("micro", "macro")
    }
