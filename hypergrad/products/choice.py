"""The product that fits a problem: by its precision, and by what can be derived twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hypergrad.batches import MicroBatch
from hypergrad.errors import NonFiniteError, SecondOrderError
from hypergrad.precision import FLOAT32, settings_unit
from hypergrad.problem import BilevelProblem
from hypergrad.products.base import NO_HINTS, BoundProduct, Hints, Product
from hypergrad.products.difference import FiniteDifference
from hypergrad.products.evaluation import inner_unit, seen_unit
from hypergrad.products.exact import DoubleBackward
from hypergrad.products.gradients import gradients
from hypergrad.products.tally import Tally

__all__ = ["AutoProduct", "second_order_failure"]

_ATTENTION_COPIES = 6
"""Score matrices that attention in math mode keeps for two derivatives: scores, weights,
dropout mask, and their gradients."""


@dataclass(frozen=True, repr=False)
class AutoProduct(Product):
    """Take differences where the loss computes in float32 or finer, else be exact.

    A difference of gradients loses two thirds of the digits that they have, which leaves
    nothing useful of bfloat16's three. So where anything that takes part is coarser than
    float32 (frozen weights, autocast, TensorFloat-32), the exact product is taken, if the
    model can be differentiated twice; it is tried once. Else differences at the radius of
    that precision, which estimate their error.

    Example:
        >>> AutoProduct().name
        'auto'
    """

    name: ClassVar[str] = "auto"
    order: ClassVar[int] = 1

    def chosen(
        self, problem: BilevelProblem, batches: Sequence[MicroBatch]
    ) -> tuple[Product, str]:
        """Return the product to use on this problem, and why.

        Args:
            problem: the problem; it is left as it was.
            batches: data of the inner loss, to try it with.
        """
        if not problem.inner_params:
            return FiniteDifference(), "there are no inner parameters"

        def look() -> list[float]:
            seen = seen_unit(problem)
            unit = max(settings_unit(problem), seen or 0.0)
            if seen is None and unit <= FLOAT32:
                if _runs_before_products(problem.module):
                    return [unit, 1.0]
                unit = max(unit, inner_unit(problem, batches[0], Tally()))
            return [unit, 0.0]

        unit, waits = problem.reducer.largest(2, look, problem.inner_params)
        if waits and unit <= FLOAT32:
            return self, "no graph of the inner loss was seen yet"
        if unit <= FLOAT32:
            return FiniteDifference(), "the inner loss computes in float32 or finer"
        failure = second_order_failure(problem, batches)
        coarse = f"the inner loss computes with a spacing of {unit:.2g}"
        if failure:
            return FiniteDifference(), f"{coarse}, and {failure}"
        return DoubleBackward(), f"{coarse}, too coarse for differences"

    def bind(
        self,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        hints: Hints = NO_HINTS,
    ) -> BoundProduct:
        """Return the chosen product at the problem's present point.

        Args:
            problem: the problem.
            batches: data of the inner loss.
            tally: counts the evaluations.
            hints: passed on.
        """
        if seen_unit(problem) is None:
            inner_unit(problem, batches[0], Tally())  # a look, and no part of it
        chosen, _ = self.chosen(problem, batches)
        return chosen.bind(problem, batches, tally, hints)


def second_order_failure(problem: BilevelProblem, batches: Sequence[MicroBatch]) -> str:
    """Return why second derivatives are out of reach; empty where they work.

    Args:
        problem: the problem; it is left as it was.
        batches: data of the inner loss; the first one is tried.
    """
    with _watched_attention() as scores:
        # First order, under the model's own attention: it must work in any case.
        gradients(problem, "inner", batches[:1], Tally())
    needed, free = _ATTENTION_COPIES * sum(scores), _free_memory(problem)
    short = free is not None and needed > free / 2
    # Memory differs by rank, and all have to do the same.
    if problem.reducer.any(short, problem.inner_params):
        return (
            f"attention in math mode, which second derivatives need, would take about "
            f"{needed / 2**30:.2g} GiB of the {(free or 0) / 2**30:.2g} GiB that are free"
        )
    quantised = _quantised_layer(problem.module)
    what = f"a quantised layer ({quantised})" if quantised else "a part of the model"
    tally = Tally()
    try:
        product = DoubleBackward().bind(problem, batches[:1], tally)
        product.vjp({n: torch.ones_like(p.detach()) for n, p in _inner(problem)})
        tally.read()
    except SecondOrderError as error:
        return f"{what} cannot be derived twice ({str(error).splitlines()[0][:160]})"
    except NonFiniteError:
        return "a second-derivative product is not finite where the gradient is"
    except torch.OutOfMemoryError:
        return "a second-derivative product does not fit into memory"
    return ""


def _runs_before_products(module: nn.Module | None) -> bool:
    """Return whether to wait for a graph that is built anyway.

    A module is trained by steps that run its loss, and to run it for the sake of a look
    would count in what it keeps of its own.
    """
    return module is not None


def _inner(problem: BilevelProblem) -> Iterator[tuple[str, torch.Tensor]]:
    yield from problem.inner_params.items()


def _quantised_layer(module: nn.Module | None) -> str:
    """Return the type of the first layer whose weight is not of floating point."""
    for layer in module.modules() if module is not None else ():
        for weight in (*layer._parameters.values(), *layer._buffers.values()):
            packed = weight is not None and weight.dtype in (torch.int8, torch.uint8)
            if packed and weight is not None and weight.dim() > 1:
                return type(layer).__name__
    return ""


@contextmanager
def _watched_attention() -> Iterator[list[int]]:
    """Yield a list of the bytes of each score matrix that math attention would make."""
    found: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                names = ("query", "key", "value")
                given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                query, key = given["query"], given["key"]
                rows = query.shape[:-1].numel()
                found.append(rows * key.shape[-2] * query.element_size())
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


def _free_memory(problem: BilevelProblem) -> int | None:
    """Return the bytes that are free on the problem's device; None where unknown."""
    device = problem.tensors[0].device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
