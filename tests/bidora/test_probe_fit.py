"""The fit of a probe against scikit-learn and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from bidora.errors import UserError
from bidora.probing import (
    Features,
    LinearFit,
    constant_answer,
    fit_linear,
)
from bidora.probing.fit import PENALTIES, STRENGTHS, USUAL_STRENGTH
from tests.tolerances import error, tol

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore::hypergrad.errors.NumericalWarning",
    "ignore::FutureWarning:sklearn",
)

# -- the fit ------------------------------------------------------------------------


def drawn(rows: int = 60, width: int = 5, seed: int = 0) -> np.ndarray:
    """Return features of unlike scales that are far from zero."""
    dealer = np.random.default_rng(seed)
    scales, shifts = np.logspace(-1, 1, width), np.linspace(-3, 3, width)
    return dealer.standard_normal((rows, width)) * scales + shifts


def of_classes(y: np.ndarray, outputs: int, **given: Any) -> Features:
    x = given.pop("x", drawn(len(y)))
    x = x + np.eye(outputs, x.shape[1])[y]  # something to find
    return Features(x, y, np.arange(len(y)), "classes", outputs, **given)


def logits_of(fit: LinearFit, x: np.ndarray) -> np.ndarray:
    return x @ fit.weight.T + fit.bias


def probabilities(fit: LinearFit, x: np.ndarray) -> Tensor:
    return torch.tensor(logits_of(fit, x)).softmax(-1)


def enlarged(fit: LinearFit, x: np.ndarray) -> float:
    """Return how much of logits may cancel, as a condition number."""
    sizes = np.abs(x) @ np.abs(fit.weight).T + np.abs(fit.bias)
    return float(max(1.0, np.linalg.norm(sizes) / np.linalg.norm(logits_of(fit, x))))


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_are_those_of_scikit_learn(classes: int) -> None:
    given = of_classes(np.arange(60) % classes, classes)
    fit = fit_linear(given)
    # The scaler is of all rows, as in the fit: scores by hand, on scaled features.
    scaled = StandardScaler().fit_transform(given.values)
    means, errors = [], []
    with threadpool_limits(1):
        for strength in STRENGTHS:
            scores = cross_val_score(
                LogisticRegression(C=strength, max_iter=300),
                scaled,
                given.targets,
                scoring="neg_log_loss",
                cv=StratifiedKFold(5, shuffle=True, random_state=0),
            )
            means.append(scores.mean())
            errors.append(scores.std(ddof=1) / 5**0.5)
        best = int(np.argmax(means))
        least = next(
            c
            for c, m in zip(STRENGTHS, means, strict=True)
            if m >= means[best] - errors[best]
        )
        direct = make_pipeline(
            StandardScaler(), LogisticRegression(C=least, max_iter=300)
        ).fit(given.values, given.targets)
    assert fit.penalty == least <= STRENGTHS[best]
    # On features as they are: the standardisation is in the layer.
    truth = torch.tensor(direct.predict_proba(given.values))
    cond = enlarged(fit, given.values)
    assert error(probabilities(fit, given.values), truth) <= tol(torch.float64, cond)


@pytest.mark.parametrize("has_bias", [True, False])
def test_classes_minimise_the_penalised_loss(has_bias: bool) -> None:
    """Its gradient is 0: (P - Y)ᵀX + W / C in standardised features."""
    given = of_classes(np.arange(60) % 3, 3, has_bias=has_bias)
    fit = fit_linear(given)
    scale = given.values.std(axis=0)
    x = (given.values - given.values.mean(axis=0) * has_bias) / scale
    missed = probabilities(fit, given.values).numpy() - np.eye(3)[given.targets]
    gradient = missed.T @ x + fit.weight * scale / fit.penalty
    assert np.abs(gradient).max() / len(x) <= 1e-3  # lbfgs stops at 1e-4 of its own
    if has_bias:
        assert np.abs(missed.sum(axis=0)).max() / len(x) <= 1e-3
    else:
        assert not fit.bias.any()


def test_absent_classes_are_never_chosen() -> None:
    given = of_classes(np.repeat([1, 3, 4], 20), 6)
    fit = fit_linear(given)
    far = np.concatenate([given.values, 100 * drawn(500, seed=1)])
    assert set(logits_of(fit, far).argmax(-1)) <= {1, 3, 4}
    assert not fit.weight[[0, 2, 5]].any()


@pytest.mark.parametrize("has_bias", [True, False])
def test_one_class_alone_is_always_answered(has_bias: bool) -> None:
    given = of_classes(np.full(7, 2), 3, has_bias=has_bias)
    fit = fit_linear(given)
    assert np.isfinite(fit.weight).all()
    assert np.isnan(fit.penalty)
    if has_bias:
        assert set(logits_of(fit, given.values).argmax(-1)) == {2}


def test_a_class_with_one_example_is_fitted_at_the_usual_strength() -> None:
    given = of_classes(np.array([0] * 20 + [1] * 20 + [2]), 3)
    fit = fit_linear(given)
    assert fit.penalty == USUAL_STRENGTH
    direct = make_pipeline(
        StandardScaler(), LogisticRegression(C=USUAL_STRENGTH, max_iter=300)
    ).fit(given.values, given.targets)
    truth = torch.tensor(direct.predict_proba(given.values))
    cond = enlarged(fit, given.values)
    assert error(probabilities(fit, given.values), truth) <= tol(torch.float64, cond)


def test_tags_are_left_out_by_whole_sentences() -> None:
    """Tokens of a sentence are alike: left out one by one, they would find themselves."""
    dealer = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 6)
    y = dealer.integers(0, 3, 120)
    own = dealer.standard_normal((20, 12))[groups]  # each sentence has its own sign
    signs = np.eye(3, 12)[y]
    given = Features(3 * own + signs, y, groups, "classes", 3)
    shuffled = Features(given.values, y, np.arange(120), "classes", 3)
    assert fit_linear(given).weight.shape == (3, 12)
    assert fit_linear(shuffled).penalty in STRENGTHS
    rare = np.where(groups == 0, 2, y % 2)  # a tag of one sentence, absent elsewhere
    found = fit_linear(Features(given.values, rare, groups, "classes", 3))
    assert np.isfinite(found.weight).all()


def test_labels_are_logistic_regressions_of_one_strength() -> None:
    x = drawn(60)
    truth = np.stack(
        [
            x[:, 0] > x[:, 0].mean(),
            x[:, 1] + x[:, 2] > 0,
            np.zeros(60, bool),
            np.ones(60, bool),
        ],
        axis=1,
    )
    given = Features(x, truth.astype(float), np.arange(60), "labels", 4)
    fit = fit_linear(given)
    standard = StandardScaler().fit_transform(x)
    for label in (0, 1):
        direct = LogisticRegression(C=fit.penalty, max_iter=300, tol=1e-8)
        direct.fit(standard, truth[:, label])
        wanted = torch.tensor(direct.decision_function(standard))
        found = torch.tensor(logits_of(fit, x)[:, label])
        assert error(found, wanted) <= 1e-3  # two solvers, each to its own tolerance
    said = logits_of(fit, x)
    assert (said[:, 2] < 0).all()
    assert (said[:, 3] > 0).all()
    assert not fit.weight[2:].any()
    assert np.isfinite(said).all()


def test_few_examples_of_labels_have_the_usual_strength() -> None:
    y = np.eye(3)[np.arange(6) % 3]
    fit = fit_linear(Features(drawn(6), y, np.arange(6), "labels", 3))
    assert fit.penalty == USUAL_STRENGTH


@pytest.mark.parametrize("outputs", [1, 2])
def test_numbers_are_the_closed_form_of_ridge(outputs: int) -> None:
    x = drawn(14, 3)
    dealer = np.random.default_rng(1)
    y = x @ dealer.standard_normal((3, outputs)) + dealer.standard_normal((14, outputs))
    given = Features(
        x, y[:, 0] if outputs == 1 else y, np.arange(14), "numbers", outputs
    )
    fit = fit_linear(given)
    standard = (x - x.mean(0)) / x.std(0)

    def solve(a: np.ndarray, b: np.ndarray, penalty: float) -> Any:
        mean, middle = a.mean(0), b.mean(0)
        gram = (a - mean).T @ (a - mean) + penalty * np.eye(a.shape[1])
        weight = np.linalg.solve(gram, (a - mean).T @ (b - middle))
        return lambda new: (new - mean) @ weight + middle

    def left_out(penalty: float) -> float:
        errors = [
            solve(np.delete(standard, i, 0), np.delete(y, i, 0), penalty)(standard[i])
            - y[i]
            for i in range(len(y))
        ]
        return float(np.square(errors).sum())

    best = min(PENALTIES, key=left_out)
    assert fit.penalty == best
    truth = torch.tensor(solve(standard, y, best)(standard))
    found = torch.tensor(logits_of(fit, x))
    cond = enlarged(fit, x) * np.linalg.cond(standard) ** 2
    assert error(found, truth) <= tol(torch.float64, cond)


def test_a_feature_that_never_changes_is_left_alone() -> None:
    given = of_classes(np.arange(60) % 3, 3)
    wider = np.concatenate([given.values, np.full((60, 1), 7.0)], axis=1)
    y, groups = given.targets, given.groups
    fit = fit_linear(Features(wider, y, groups, "classes", 3))
    without = fit_linear(given)
    assert np.abs(fit.weight[:, -1]).max() <= 1e-12
    found, truth = probabilities(fit, wider), probabilities(without, given.values)
    assert error(found, truth) <= tol(torch.float64, enlarged(fit, wider))


def test_what_is_not_finite_is_refused() -> None:
    given = of_classes(np.arange(60) % 3, 3)
    given.values[3, 1] = np.nan
    with pytest.raises(UserError, match="features are not finite"):
        fit_linear(given)
    numbers = np.arange(6.0)
    numbers[2] = np.inf
    with pytest.raises(UserError, match="numbers to learn are not finite"):
        fit_linear(Features(drawn(6), numbers, np.arange(6), "numbers", 1))


@pytest.mark.parametrize(
    ("labels", "outputs", "said"),
    [
        ([0, 1, 3], 3, r"label 3 .* has 3, for 0 to 2\. .* num_labels=4 or more"),
        ([0, 1], 1, r"label 1 .* has 1, for 0 alone\. .* num_labels=2 or more"),
        ([3, 3], 2, r"label 3 .* has 2, for 0 to 1\."),
        ([-1, 1], 2, r"label -1 .* has 2, for 0 to 1\. Number the classes from 0"),
    ],
)
def test_a_class_without_an_output_is_refused(
    labels: list[int], outputs: int, said: str
) -> None:
    y = np.array(labels * 4)
    given = Features(drawn(len(y)), y, np.arange(len(y)), "classes", outputs)
    with pytest.raises(UserError, match=rf"{said}.* pass them as floats"):
        fit_linear(given)


@pytest.mark.parametrize(
    ("y", "kind", "outputs", "truth"),
    [
        ([2, 0, 2, 1], "classes", 4, [0, 0, 1, 0]),
        ([1, 0, 1, 0], "classes", 2, [1, 1]),  # of two that are as common, the first
        ([1.0, 2.0, 6.0], "numbers", 1, [3.0]),
        ([[1.0, 0.0], [3.0, 0.5]], "numbers", 2, [2.0, 0.25]),
        ([[1, 0, 1], [1, 0, 0], [1, 1, 0]], "labels", 3, [1, -1, -1]),
    ],
)
def test_constant_answers_by_hand(
    y: list[Any], kind: Any, outputs: int, truth: list[float]
) -> None:
    targets = np.array(y)
    x = np.zeros((len(y), 1))
    given = Features(x, targets, np.arange(len(y)), kind, outputs)
    assert constant_answer(given).tolist() == truth


@pytest.mark.parametrize("spread", [0.0, 1e-33, 1e-9])
def test_what_hardly_varies_gets_no_large_weights(spread: float) -> None:
    """Coordinates of 1e-33, as MiniLM has, made weights of 1e30 and infinite gradients."""
    y = np.arange(60) % 3
    usual = of_classes(y, 3)
    flat = np.random.default_rng(1).standard_normal(60) * spread + 0.5
    wider = of_classes(y, 3, x=np.column_stack([usual.values, flat]) - np.eye(3, 6)[y])
    fit, other = fit_linear(wider), fit_linear(usual)
    assert np.abs(fit.weight[:, :5]).max() < 100
    assert np.abs(fit.weight[:, 5]).max() <= np.abs(fit.weight[:, :5]).max()
    assert (
        logits_of(fit, wider.values).argmax(1)
        == logits_of(other, usual.values).argmax(1)
    ).all()
