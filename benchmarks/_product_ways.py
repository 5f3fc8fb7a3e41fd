"""Ways to a training step's gradient, or to a product, for `product_memory`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._blocks import recomputed
from bidora import magnitudes, use_exact_dora
from hypergrad import BilevelProblem
from hypergrad.attention import attention
from hypergrad.batches import Accumulated, as_micro_batches
from hypergrad.products import (
    Hints,
    ProductLike,
    Tally,
    bind_product,
    gradients,
)

Batch = dict[str, Tensor]


class Ways:
    """A PEFT DoRA model on its exact forward, with magnitudes outside and B not zero."""

    def __init__(self, model: nn.Module) -> None:
        use_exact_dora(model)
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)
        self.model: Any = model
        self.problem = BilevelProblem.from_module(
            model, lambda m, batch: m(**batch).loss, outer=list(magnitudes(model))
        )
        self.u = {n: torch.randn_like(p) for n, p in self.problem.inner_params.items()}
        self.layers = list(model.base_model.model.roberta.encoder.layer)  # pyright: ignore

    def take(self, way: str, batch: Batch) -> Tensor | None:
        """Return the product in one piece; None of a training step."""
        halves = [{n: t[k::2] for n, t in batch.items()} for k in range(2)]
        match way:
            case "exact-DoRA step":
                self.model(**batch).loss.backward()
                self.model.zero_grad()
                return None
            case "exact, graph kept":
                return self._kept(batch)
            case "exact, two micro-batches":
                return self._product("exact", Accumulated(halves))
            case "exact, checkpointed":
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
                try:
                    return self._product("exact", batch)
                finally:
                    self.model.gradient_checkpointing_disable()
                    self.model.disable_input_require_grads()
            case "exact, blocks again":
                with recomputed(self.layers):
                    return self._product("exact", batch)
            case "forward-over-reverse as it was":
                return self._by_func_grad(batch)
            case "central difference":
                return self._product("finite-difference", batch)
            case _:
                return self._product(way, batch)

    def _product(
        self, product: ProductLike, data: Any, hints: Hints | None = None
    ) -> Tensor:
        tally = Tally()
        hints = hints or Hints(single_use=True)
        batches = as_micro_batches(data)
        bound = bind_product(product, self.problem, batches, tally, hints=hints)
        found = bound.vjp(self.u)
        tally.read()
        return _flat(*found)

    def _kept(self, batch: Batch) -> Tensor:
        micro = as_micro_batches(batch)
        graph = gradients(self.problem, "inner", micro, Tally(), keep=True).graph
        gradients(self.problem, "outer", micro, Tally())
        return self._product("exact", batch, Hints(graph, single_use=True))

    def _by_func_grad(self, batch: Batch) -> Tensor:
        problem = self.problem
        w = {n: p.detach() for n, p in problem.inner_params.items()}
        lam = {n: p.detach() for n, p in problem.outer_params.items()}
        slope = torch.func.grad(
            lambda a, b: problem.inner_loss(a, b, batch), argnums=(0, 1)
        )
        with attention("math"):
            _, pushed = torch.func.jvp(lambda a: slope(a, lam), (w,), (self.u,))
        return _flat(*pushed)


def _flat(*parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for part in parts for t in part.values()])
