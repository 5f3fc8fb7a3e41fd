r"""How a training changes norms ($\Delta M$) and directions ($\Delta D$) of weight rows.

For the rows $n$ of a weight $W$ that began as $W_0$, the analysis of DoRA [LWY24] and
BiDoRA [QZX24] compares

$$
\Delta M = \operatorname{mean}_n \bigl| \lVert W_n \rVert - \lVert W_{0,n} \rVert \bigr|,
\qquad \Delta D = \operatorname{mean}_n \bigl( 1 - \cos(W_n, W_{0,n}) \bigr).
$$

Here $W$ is the weight that the model computes with, whatever the method: $W_0 + sBA$ for
LoRA, each row of that scaled to its magnitude for DoRA, the weight itself for full
fine-tuning. With DoRA $\lVert W_n \rVert$ is the magnitude $m_n$, and $W_n$ has the
direction of $V_n$, as long as $m_n$ is positive: there both are the papers' quantities.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Line", "WeightChange", "effective_weight", "fit_line", "weight_change"]

CHUNK = 2**22
"""Entries of a weight that are held in float64 at once."""


@dataclass(frozen=True)
class WeightChange:
    """How far a weight is from where it began.

    Attributes:
        magnitude: ΔM, mean absolute change of the rows' norms.
        direction: ΔD, mean of 1 − cos of the rows.
        rows: Rows that both are means of.
        zero_rows: Rows left out: one of zeros, before or after, has no direction.
    """

    magnitude: float
    direction: float
    rows: int
    zero_rows: int = 0


def effective_weight(
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    magnitude: Tensor | None = None,
) -> Tensor:
    r"""Return the weight that an adapted layer computes with.

    $V = W_0 + sBA$ for LoRA, and $m_i V_i / \lVert V_i \rVert$ row by row for DoRA; a row
    of zeros stays one. In float32, or float64 where the base is.

    Args:
        base: W0, `(out, in)`.
        lora_a: A, `(r, in)`.
        lora_b: B, `(out, r)`.
        scaling: s.
        magnitude: m, `(out,)`; None for LoRA.

    Returns:
        The weight, `(out, in)`.

    Example:
        The row (3, 0) + 4·1·(0, 1) = (3, 4) has norm 5, and is scaled to norm 10.

        >>> W, A, B = torch.tensor([[3.0, 0.0]]), torch.eye(2)[1:], torch.ones(1, 1)
        >>> effective_weight(W, A, B, scaling=4.0, magnitude=torch.tensor([10.0]))
        tensor([[6., 8.]])
    """
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    change = lora_b.to(base.device, dtype) @ lora_a.to(base.device, dtype)
    weight = base.to(dtype) + scaling * change
    if magnitude is None:
        return weight
    norms = weight.norm(dim=1, keepdim=True)
    gain = magnitude.to(base.device, dtype).reshape(-1, 1) / norms
    return weight * torch.where(norms == 0, 0.0, gain)


def weight_change(weight: Tensor, base: Tensor) -> WeightChange:
    r"""Return how far the rows of a weight are from those of its base.

    Computed in float64, some rows at a time. ΔD is taken as half the squared distance of
    the normalised rows, which has digits where $1 - \cos$ has none.

    Args:
        weight: W, `(out, in)`.
        base: W0, `(out, in)`; it may be on another device.

    Returns:
        Both means; 0 where every row is left out.

    Raises:
        ValueError: If the shapes differ, or are not those of matrices.

    Example:
        The first row is turned by 90 degrees, the second is twice as long.

        >>> weight_change(
        ...     torch.tensor([[0.0, 1.0], [4.0, 0.0]]),
        ...     torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
        ... )
        WeightChange(magnitude=1.0, direction=0.5, rows=2, zero_rows=0)
    """
    if weight.dim() != 2 or weight.shape != base.shape:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} cannot be compared with a base of "
            f"shape {tuple(base.shape)}; both must be (out, in)."
        )
    magnitude = direction = 0.0
    zero_rows = 0
    step = max(1, CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        now = _exact(weight[start : start + step])
        before = _exact(base[start : start + step]).to(now.device)
        new, old = now.norm(dim=1), before.norm(dim=1)
        kept = (new != 0) & (old != 0)
        new, old, now, before = new[kept], old[kept], now[kept], before[kept]
        apart = now / new.unsqueeze(1) - before / old.unsqueeze(1)
        magnitude += (new - old).abs().sum().item()
        direction += 0.5 * apart.square().sum().item()
        zero_rows += int((~kept).sum())
    rows = weight.shape[0] - zero_rows
    return WeightChange(
        magnitude / max(1, rows), direction / max(1, rows), rows, zero_rows
    )


def _exact(rows: Tensor) -> Tensor:
    """Return rows in float64, where the device has it."""
    rows = rows.detach()
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


@dataclass(frozen=True)
class Line:
    """The straight line through points of ΔM against ΔD.

    Attributes:
        points: How many there are.
        slope: Of ΔM on ΔD, by least squares; None where there is no line.
        intercept: ΔM where the line has ΔD = 0; None where there is no line.
        correlation: Pearson's; None where it is not defined.
        reason: Why a number is None; empty where none is.
    """

    points: int
    slope: float | None
    intercept: float | None
    correlation: float | None
    reason: str = ""


def fit_line(direction: Sequence[float], magnitude: Sequence[float]) -> Line:
    """Fit ΔM on ΔD by least squares, with an intercept.

    Args:
        direction: ΔD of each point.
        magnitude: ΔM of each point.

    Returns:
        The line, or why there is none.

    Raises:
        ValueError: If there are not as many of both.

    Example:
        >>> line = fit_line([0.0, 1.0, 2.0], [5.0, 3.0, 1.0])
        >>> line.slope, line.intercept, line.correlation
        (-2.0, 5.0, -1.0)
    """
    if len(direction) != len(magnitude):
        raise ValueError(
            f"{len(direction)} values of ΔD and {len(magnitude)} of ΔM: a point has both."
        )
    count = len(direction)
    if count < 2:
        return Line(count, None, None, None, f"{count} point(s); a line needs two")
    if min(direction) == max(direction):
        return Line(count, None, None, None, "every point has the same ΔD")
    slope, intercept = statistics.linear_regression(direction, magnitude)
    if min(magnitude) == max(magnitude):
        why = "every point has the same ΔM, so no correlation"
        return Line(count, 0.0, magnitude[0], None, why)
    correlation = statistics.correlation(direction, magnitude)
    return Line(count, slope, intercept, correlation)
