"""Small learning problems, at the minimum that Newton's method finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hypergrad.testing.known import KnownProblem, at_minimum
from hypergrad.tree import Params

__all__ = ["dora_block", "reweighting", "softmax_regression", "two_layer_network"]

_Draw = Callable[..., Tensor]


def softmax_regression(
    n_features: int = 4,
    n_classes: int = 3,
    n_examples: int = 30,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> KnownProblem:
    r"""Make a softmax regression with one log-penalty for each feature.

    $$g = \tfrac1n\sum_i \ell(W^\top x_i, y_i) +
      \tfrac12\sum_j e^{\lambda_j}\|W_j\|^2,\qquad
      f = \tfrac1n\sum_i \ell(W^\top x'_i, y'_i)$$

    with the cross-entropy $\ell$.

    Args:
        n_features: rows of W, and size of λ.
        n_classes: columns of W.
        n_examples: n, in each of both data sets.
        dtype: dtype of the problem; the truth is float64.
        device: where its tensors are; the truth stays on the host.
        seed: of the data.

    Returns:
        The problem, with inner parameter `"weight"` and outer `"log_penalty"`.

    Example:
        >>> known = softmax_regression()
        >>> known.problem.inner_params["weight"].shape, known.hessian.shape
        (torch.Size([4, 3]), torch.Size([12, 12]))
    """
    draw = _drawer(seed)
    teacher = draw(n_features, n_classes)

    def inner_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        x, y = data
        penalty = outer["log_penalty"].exp() @ inner["weight"].square().sum(1)
        return cross_entropy(x @ inner["weight"], y) + penalty / 2

    def outer_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        del outer
        x, y = data
        return cross_entropy(x @ inner["weight"], y)

    return at_minimum(
        inner_loss,
        outer_loss,
        {"weight": torch.zeros(n_features, n_classes)},
        {"log_penalty": torch.linspace(-2.5, -0.5, n_features)},
        inner_data=_labelled(draw, teacher, n_examples),
        outer_data=_labelled(draw, teacher, n_examples),
        dtype=dtype,
        device=device,
    )


def reweighting(
    n_features: int = 3,
    n_examples: int = 20,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> KnownProblem:
    r"""Make a regression on noisy labels, with one weight for each example.

    $$g = \tfrac1n\sum_i \sigma(\lambda_i)\,\ell(w^\top x_i, y_i) +
      \tfrac{1}{20}\|w\|^2,\qquad f = \tfrac1n\sum_i \ell(w^\top x'_i, y'_i)$$

    with the logistic loss $\ell$. A third of the labels $y$ are wrong, none of $y'$ are:
    λ learns which examples to trust.

    Args:
        n_features: size of w.
        n_examples: n, in each of both data sets, and size of λ.
        dtype: dtype of the problem; the truth is float64.
        device: where its tensors are; the truth stays on the host.
        seed: of the data.

    Returns:
        The problem, with inner parameter `"weight"` and outer `"logits"`.

    Example:
        Trusting a mislabelled example less lowers the loss on clean data.

        >>> known = reweighting()
        >>> grads = known.outer_grads["logits"]
        >>> bool(grads[::3].mean() > 0 > grads[1::3].mean())
        True
    """
    draw = _drawer(seed)
    teacher = draw(n_features)
    x, x_clean = draw(2, n_examples, n_features)
    sign, clean = (x @ teacher).sign(), (x_clean @ teacher).sign()
    sign[::3] *= -1

    def losses(inner: Params, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (x @ inner["weight"]))

    def inner_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        fit = (outer["logits"].sigmoid() * losses(inner, *data)).mean()
        return fit + inner["weight"].square().sum() / 20

    def outer_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        del outer
        return losses(inner, *data).mean()

    return at_minimum(
        inner_loss,
        outer_loss,
        {"weight": torch.zeros(n_features)},
        {"logits": 0.5 * draw(n_examples)},
        inner_data=(x, sign),
        outer_data=(x_clean, clean),
        dtype=dtype,
        device=device,
    )


def two_layer_network(
    n_features: int = 3,
    n_hidden: int = 3,
    n_examples: int = 20,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> KnownProblem:
    r"""Make a tanh network with a weight decay for each layer and a scale of each input.

    $$g = \tfrac1n\sum_i \big(h(x_i) - y_i\big)^2 + e^{\lambda_1}\|W\|^2 +
      e^{\lambda_2}\|u\|^2,\qquad f = \tfrac1n\sum_i \big(h(x'_i) - y'_i\big)^2$$

    with $h(x) = u^\top\tanh\big(W(s \odot x)\big)$. The decay makes the minimum a strict
    one. The scales s act on f directly too.

    Args:
        n_features: columns of W, and size of s.
        n_hidden: rows of W, and size of u.
        n_examples: n, in each of both data sets.
        dtype: dtype of the problem; the truth is float64.
        device: where its tensors are; the truth stays on the host.
        seed: of the data.

    Returns:
        The problem, with inner parameters `"first"` (W) and `"second"` (u), and outer
        `"log_decay"` (λ) and `"scale"` (s).

    Raises:
        SolveError: this seed leads to no strict minimum.

    Example:
        >>> known = two_layer_network()
        >>> known.hessian.shape, known.condition < 100
        (torch.Size([12, 12]), True)
    """
    draw = _drawer(seed)
    teacher = {"first": draw(n_hidden, n_features), "second": draw(n_hidden)}
    scale = torch.linspace(0.5, 1.5, n_features).double()

    def predict(inner: Params, scale: Tensor, x: Tensor) -> Tensor:
        return torch.tanh((x * scale) @ inner["first"].T) @ inner["second"]

    def inner_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        x, y = data
        sizes = torch.stack([t.square().sum() for t in inner.values()])
        fit = (predict(inner, outer["scale"], x) - y).square().mean()
        return fit + outer["log_decay"].exp() @ sizes

    def outer_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        x, y = data
        return (predict(inner, outer["scale"], x) - y).square().mean()

    def data() -> tuple[Tensor, Tensor]:
        x = draw(n_examples, n_features)
        return x, predict(teacher, scale, x) + 0.1 * draw(n_examples)

    return at_minimum(
        inner_loss,
        outer_loss,
        teacher,
        {"log_decay": torch.tensor([-2.0, -1.5]), "scale": scale},
        inner_data=data(),
        outer_data=data(),
        dtype=dtype,
        device=device,
    )


def dora_block(
    n_features: int = 4,
    n_outputs: int = 3,
    rank: int = 2,
    n_examples: int = 20,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
    seed: int = 0,
) -> KnownProblem:
    r"""Make one linear layer with an exact DoRA adapter, and a head on top of it.

    $$h(x) = u^\top\Big(m \odot \frac{V x}{\|V\|}\Big),\qquad V = W_0 + BA$$

    $\|V\|$ are the norms of the rows of V, and have a derivative as everything else:
    without it, this is not the derivative of the loss. Magnitudes m are outer, B, A and
    the head u inner. The inner loss holds them near their start, since BA alone leaves
    rotations of the factors open.

    Args:
        n_features: columns of W₀.
        n_outputs: rows of W₀, and size of m.
        rank: of BA.
        n_examples: in each of both data sets.
        dtype: dtype of the problem; the truth is float64.
        device: where its tensors are; the truth stays on the host.
        compute: what the losses compute in, with parameters in `dtype`; None for that.
        seed: of the data.

    Returns:
        The problem, with inner parameters `"lora_A"`, `"lora_B"` and `"head"`, and outer
        `"magnitude"`.

    Raises:
        SolveError: this seed leads to no strict minimum.

    Example:
        >>> known = dora_block()
        >>> known.hessian.shape, known.condition < 100
        (torch.Size([17, 17]), True)
    """
    draw = _drawer(seed)
    base = draw(n_outputs, n_features) / n_features**0.5
    start = {
        "lora_A": draw(rank, n_features) / n_features**0.5,
        "lora_B": torch.zeros(n_outputs, rank).double(),
        "head": draw(n_outputs) / n_outputs**0.5,
    }
    magnitude = base.norm(dim=1)

    def predict(inner: Params, magnitude: Tensor, base: Tensor, x: Tensor) -> Tensor:
        weight = base + inner["lora_B"] @ inner["lora_A"]
        unit = weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        return (magnitude * (x @ unit.T)) @ inner["head"]

    def inner_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        x, y, base, *starts = data
        moved = zip(inner.values(), starts, strict=True)
        decay = torch.stack([(a - b).square().sum() for a, b in moved]).sum()
        off = predict(inner, outer["magnitude"], base, x) - y
        return off.square().mean() / 2 + decay / 4

    def outer_loss(inner: Params, outer: Params, data: Sequence[Tensor]) -> Tensor:
        x, y, base = data
        return (predict(inner, outer["magnitude"], base, x) - y).square().mean() / 2

    def data() -> tuple[Tensor, Tensor]:
        x = draw(n_examples, n_features)
        return x, x @ teacher

    teacher = (base + draw(n_outputs, n_features) / n_features).T @ start["head"]
    return at_minimum(
        inner_loss,
        outer_loss,
        start,
        {"magnitude": magnitude},
        inner_data=(*data(), base, *start.values()),
        outer_data=(*data(), base),
        dtype=dtype,
        device=device,
        compute=compute,
    )


def _drawer(seed: int) -> _Draw:
    make = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=make, dtype=torch.float64)


def _labelled(draw: _Draw, teacher: Tensor, n_examples: int) -> tuple[Tensor, Tensor]:
    x = draw(n_examples, len(teacher))
    return x, (x @ teacher + draw(n_examples, teacher.shape[1])).argmax(1)
