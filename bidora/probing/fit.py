"""The fit of a probe: a regularised linear layer on features, by scikit-learn."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bidora.errors import UserError

__all__ = ["Features", "Kind", "LinearFit", "constant_answer", "fit_linear"]

Kind = Literal["classes", "numbers", "labels"]
"""What a target is: a class, one or more numbers, zeros and ones of several labels."""

FOLDS = 5

STRENGTHS = tuple(float(c) for c in np.logspace(-4, 1, 11))
"""Inverse penalties C of a logistic regression on standardised features."""

FEW_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Those tried for tags and labels, of which each is a fit, or many, of some time."""

PENALTIES = tuple(float(a) for a in np.logspace(-1, 5, 13))
"""Penalties of a ridge regression on standardised features."""

LEAST_SCALE = 1e-3
"""Of a coordinate's standard deviation, over the root mean square of all."""

USUAL_STRENGTH = 0.01
"""C where there are too few examples to choose it by."""

ENOUGH = 1000
"""Examples of several labels that are enough to choose one number by."""


@dataclass(frozen=True)
class Features:
    """What the last linear layer of a model reads of some examples.

    Args:
        values: `(rows, width)`, one row an example, or a token that has a tag.
        targets: Classes `(rows,)` as integers, numbers `(rows,)` or `(rows, outputs)`,
            or labels `(rows, labels)` of zeros and ones.
        groups: The example that each row is of.
        kind: What the targets are.
        outputs: How many outputs the layer has.
        has_bias: Whether it has a bias.
    """

    values: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    kind: Kind
    outputs: int
    has_bias: bool = True


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear layer.

    Args:
        weight: `(outputs, width)`.
        bias: `(outputs,)`; zeros where the layer has none.
        penalty: The strength that cross-validation chose, as scikit-learn counts it: C
            of a logistic regression, alpha of a ridge; NaN where nothing was fitted.
    """

    weight: np.ndarray
    bias: np.ndarray
    penalty: float


def fit_linear(features: Features) -> LinearFit:
    r"""Fit a linear layer on standardised features, its penalty by cross-validation.

    Classes: a multinomial logistic regression, by the log-loss over stratified folds.
    Tags: the same, by accuracy over folds of whole sentences. For both, C is the least
    within one standard error of the best. Labels: a logistic
    regression for each, with one C for all, by the log-loss over folds. Numbers: a ridge
    regression, its penalty by leaving each example out. The standardisation is folded
    into the layer: $W = \hat W / \sigma,\; b = \hat b - W\mu$.

    Args:
        features: What to fit on.

    Returns:
        The layer. Classes without an example have zero weights and a low bias.

    Raises:
        UserError: If features or numbers are not finite, or a class has no output.

    Example:
        Two numbers that a line goes through:

        >>> two = Features(
        ...     np.array([[0.0], [1.0], [2.0], [3.0]]),
        ...     np.array([1.0, 3.0, 5.0, 7.0]),
        ...     np.arange(4),
        ...     "numbers",
        ...     1,
        ... )
        >>> fit = fit_linear(two)
        >>> round(float(fit.weight[0, 0]), 1), round(float(fit.bias[0]), 1)
        (2.0, 1.1)
    """
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if not np.isfinite(features.values).all():
        raise UserError(
            "the frozen model's features are not finite, so no probe can be fitted; the "
            "model or its precision is at fault."
        )
    scaler = StandardScaler(with_mean=features.has_bias).fit(features.values)
    sizes: Any = scaler.scale_
    # What hardly varies would get weights without bound, and with them the gradients of
    # whatever lies below: a sentence encoder has coordinates of 1e-33.
    scaler.scale_ = np.maximum(sizes, LEAST_SCALE * np.sqrt(np.mean(sizes**2)))
    x = np.asarray(scaler.transform(features.values))
    fit = {"classes": _fit_classes, "labels": _fit_labels, "numbers": _fit_numbers}
    # One thread sums in one order on every machine; and where cores are shared, threads
    # that wait for each other take many times as long.
    with threadpool_limits(1), warnings.catch_warnings():
        # A fit that has not quite converged is a fine start; and what scikit-learn will
        # change in later versions is no concern of those who call this.
        warnings.filterwarnings("ignore", module="sklearn")
        weight, bias, penalty = fit[features.kind](x, features)
    weight = weight / scaler.scale_
    if features.has_bias:
        bias = bias - weight @ np.asarray(scaler.mean_)
    return LinearFit(weight, bias, penalty)


_Fitted = tuple[np.ndarray, np.ndarray, float]


def _fit_classes(x: np.ndarray, features: Features) -> _Fitted:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold

    y, groups = features.targets, features.groups
    present, counts = np.unique(y, return_counts=True)
    _check_range(present, features.outputs)
    weight = np.zeros((features.outputs, x.shape[1]))
    bias = np.full(features.outputs, 0.0)
    if len(present) < 2:
        bias[present] = 1.0 if features.has_bias else 0.0
        return weight, bias, math.nan
    settings: dict[str, Any] = {
        "max_iter": 300,
        "fit_intercept": features.has_bias,
    }
    by_sentence = len(np.unique(groups)) < len(groups)
    folds = min(FOLDS, len(np.unique(groups)) if by_sentence else int(counts.min()))
    if folds < 2:  # a class with one example cannot be left out and found again
        model: Any = LogisticRegression(C=USUAL_STRENGTH, **settings).fit(x, y)
        penalty = USUAL_STRENGTH
    else:
        cv: Any = (
            list(GroupKFold(folds).split(x, y, groups))
            if by_sentence
            else StratifiedKFold(folds, shuffle=True, random_state=0)
        )
        strengths = FEW_STRENGTHS if by_sentence else STRENGTHS
        # A fold of sentences may lack a tag, whose loss would be infinite.
        scoring = "accuracy" if by_sentence else "neg_log_loss"
        search: Any = GridSearchCV(
            LogisticRegression(**settings),
            {"C": strengths},
            scoring=scoring,
            cv=cv,
            refit=_strongest_penalty,  # pyright: ignore[reportArgumentType]
        ).fit(x, y)
        model, penalty = search.best_estimator_, search.best_params_["C"]
    coef, intercept = model.coef_, np.atleast_1d(model.intercept_)
    if len(present) == 2:  # scikit-learn has one row for two classes
        coef = np.concatenate([-coef, coef]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    if features.has_bias:
        bias[:] = intercept.min() - math.log(len(y) + 1)
        bias[present] = intercept
    weight[present] = coef
    return weight, bias, penalty


def _check_range(present: np.ndarray, outputs: int) -> None:
    """Refuse classes that the layer has no output for.

    Args:
        present: The classes that occur, in rising order.
        outputs: Of the layer.

    Raises:
        UserError: If there are such classes.
    """
    least, most = int(present[0]), int(present[-1])
    if least >= 0 and most < outputs:
        return
    wrong = least if least < 0 else most
    allowed = f"0 to {outputs - 1}" if outputs > 1 else "0 alone"
    remedy = "Number the classes from 0"
    if least >= 0:
        remedy = f"Load the model with num_labels={most + 1} or more"
    raise UserError(
        f"the label {wrong} is a class that the model has no output for: its last layer "
        f"has {outputs}, for {allowed}. {remedy}; or, if the labels are numbers to "
        "predict, pass them as floats: integers are classes."
    )


def _strongest_penalty(found: Any) -> int:
    """Return which of rising strengths is the least within one standard error of the best.

    Those are equal as far as folds can tell [HTF09, Sec. 7.10]. The smaller head is the
    better start: the larger its weights, the more a step of fine-tuning moves the logits.
    """
    scores = np.stack([v for n, v in found.items() if n.startswith("split")])
    means = scores.mean(axis=0)
    errors = scores.std(axis=0, ddof=1) / math.sqrt(len(scores))
    best = int(means.argmax())
    return int(np.flatnonzero(means >= means[best] - errors[best])[0])


def _fit_labels(x: np.ndarray, features: Features) -> _Fitted:
    """Fit one logistic regression a label, at the strength that suits them together."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold

    y = features.targets > 0.5
    settings: dict[str, Any] = {
        "solver": "newton-cholesky" if len(x) > x.shape[1] else "lbfgs",
        "max_iter": 100,
        "fit_intercept": features.has_bias,
    }

    def fit(rows: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        weight = np.zeros((features.outputs, x.shape[1]))
        bias = np.zeros(features.outputs)
        for label in range(features.outputs):
            truth = y[rows, label]
            if truth.all() or not truth.any():  # nothing to tell apart
                share = (truth.sum() + 0.5) / (len(rows) + 1)
                bias[label] = math.log(share / (1 - share)) * features.has_bias
                continue
            one: Any = LogisticRegression(C=strength, **settings).fit(x[rows], truth)
            weight[label], bias[label] = one.coef_[0], np.ravel(one.intercept_)[0]
        return weight, bias

    every = np.arange(len(x))
    if len(x) < 2 * FOLDS:
        return (*fit(every, USUAL_STRENGTH), USUAL_STRENGTH)
    losses = np.zeros(len(FEW_STRENGTHS))
    # The first of a file may be all of one kind.
    some = np.random.default_rng(0).permutation(every)[:ENOUGH]
    for first, second in KFold(3).split(some):
        first, second = some[first], some[second]
        for i, strength in enumerate(FEW_STRENGTHS):
            weight, bias = fit(first, strength)
            logits = x[second] @ weight.T + bias
            losses[i] += np.logaddexp(0.0, np.where(y[second], -logits, logits)).sum()
    best = FEW_STRENGTHS[int(losses.argmin())]
    return (*fit(every, best), best)


def _fit_numbers(x: np.ndarray, features: Features) -> _Fitted:
    from sklearn.linear_model import RidgeCV

    y = features.targets.reshape(len(x), -1)
    if not np.isfinite(y).all():
        raise UserError(
            "some numbers to learn are not finite, so no probe can be fitted."
        )
    ridge: Any = RidgeCV(list(PENALTIES), fit_intercept=features.has_bias).fit(x, y)
    weight = np.reshape(ridge.coef_, (features.outputs, x.shape[1]))
    bias = np.broadcast_to(ridge.intercept_, (features.outputs,)).astype(np.float64)
    return weight, bias.copy(), float(ridge.alpha_)


def constant_answer(features: Features) -> np.ndarray:
    """Return logits that are the best answer for those who look at nothing.

    The most common class, the mean number, the labels that most examples have.

    Args:
        features: Whose targets are looked at.

    Returns:
        `(outputs,)`.

    Example:
        >>> ones = Features(
        ...     np.zeros((3, 1)), np.array([1, 1, 0]), np.arange(3), "classes", 3
        ... )
        >>> constant_answer(ones).argmax()
        np.int64(1)
    """
    y = features.targets
    if features.kind == "classes":
        counts = np.bincount(y.astype(np.int64), minlength=features.outputs)
        return (counts == counts.max()).astype(np.float64)
    mean = y.reshape(len(y), -1).mean(axis=0)
    return mean if features.kind == "numbers" else np.where(mean > 0.5, 1.0, -1.0)
