"""The module that Houlsby's adapters put around a projection."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Bottleneck"]


class Bottleneck(nn.Module):
    """A frozen projection, and a small network with a residual connection after it.

    Args:
        projection: What was there.
        size: Width of the bottleneck.
    """

    def __init__(self, projection: nn.Module, size: int) -> None:
        super().__init__()
        weight = next(projection.parameters())
        # A Conv1D of GPT-2 holds its weight the other way round, and has the bias last.
        *_, last = projection.parameters()
        width = last.shape[0] if last.ndim == 1 else weight.shape[0]
        self.projection = projection
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)
        self.to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection's output with the adapter's change."""
        h = self.projection(x)
        change = self.up(nn.functional.gelu(self.down(h.to(self.down.weight.dtype))))
        return h + change.to(h.dtype)
