"""What exact DoRA computes and keeps, counted; seconds are for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from bidora import use_exact_dora
from bidora.dora.gain import apply_gain

IN, OUT, RANK, ROWS = 12, 10, 2, 24
VIEWS = {"view", "t", "transpose", "_unsafe_view", "detach", "reshape", "unsqueeze"}


class LargeOps(TorchDispatchMode):
    """Notes the operations that write a tensor of the size of an activation."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.names = limit, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        large = isinstance(result, Tensor) and result.numel() >= self.limit
        if large and name not in VIEWS:
            self.names.append(name)
        return result


def layer(*, dora: bool, bias: bool = True) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=3, use_dora=dora, target_modules=["0"])
    net = nn.Sequential(nn.Linear(IN, OUT, bias=bias))
    model: Any = get_peft_model(cast(Any, net), config)
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    if dora:
        use_exact_dora(model)
    return model


def passes(model: Any) -> tuple[list[str], list[str]]:
    """Return the large operations of a forward and a backward pass."""
    x = torch.randn(ROWS, IN, requires_grad=True)
    grad = torch.randn(ROWS, OUT)
    with LargeOps(ROWS * OUT) as forward:
        y = model(x)
    with LargeOps(ROWS * OUT) as backward:
        y.backward(grad)
    return forward.names, backward.names


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # At this size a whole activation would be one block, and a block count as large.
    monkeypatch.setattr("bidora.dora.gain.BLOCK_ELEMENTS", 4 * OUT)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_one_pair_one_multiply_add(bias: bool) -> None:
    forward, backward = passes(layer(dora=True, bias=bias))
    linear = "addmm" if bias else "mm"
    assert forward == [linear, "addmm", "addcmul" if bias else "mul"]
    # The gain times the gradient; the input's gradient through A and through W; their sum.
    assert backward == ["mul", "mm", "mm", "add"]
    lora_forward, lora_backward = passes(layer(dora=False, bias=bias))
    assert len(forward) == len(lora_forward) - 1
    assert len(backward) == len(lora_backward)


def test_it_keeps_its_output_and_a_few_numbers_a_row_beyond_lora() -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            y = model(torch.randn(ROWS, IN))
        del y
        return sum(sizes.values())

    extra = kept(layer(dora=True)) - kept(layer(dora=False))
    # Per row of W: cross products and their like, of rank numbers, and a few scalars.
    assert 4 * ROWS * OUT <= extra <= 4 * (ROWS * OUT + OUT * (3 * RANK + 8))


def test_merged_inference_is_the_plain_layer() -> None:
    exact = layer(dora=True)
    x = torch.randn(ROWS, IN)
    expected = exact(x)

    def operations(model: nn.Module) -> list[str]:
        with torch.no_grad(), LargeOps(0) as ops:
            model(x)
        return ops.names

    plain = operations(nn.Linear(IN, OUT))
    assert plain == ["addmm"]
    exact.merge_adapter()
    assert operations(exact) == plain
    exact.unmerge_adapter()
    merged = exact.merge_and_unload()
    assert operations(merged) == plain
    assert type(merged[0]) is nn.Linear
    # float32: products of length IN, 10 · eps · sqrt(IN).
    torch.testing.assert_close(merged(x), expected, rtol=4e-6, atol=4e-6)


# --- the multiply-add and its derivative ------------------------------------------------


def written_out(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return gain * z if bias is None else gain * (z - bias) + bias


def operands(*shape: int) -> list[Tensor]:
    shapes = shape, shape[-1:], shape[-1:]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(OUT,), (0, OUT), (7, OUT), (2, 9, OUT)])
def test_gradients_in_blocks(shape: tuple[int, ...]) -> None:
    z, gain, bias = operands(*shape)
    weights = torch.randn(shape, dtype=torch.float64)
    for inputs in ([z, gain, bias], [z, gain]):
        rest = [None] * (3 - len(inputs))
        found: list[tuple[Tensor, ...]] = []
        for fn in (apply_gain, written_out):
            value: Tensor = cast(Callable[..., Tensor], fn)(*inputs, *rest)
            found.append((value, *torch.autograd.grad((value * weights).sum(), inputs)))
        for got, expected in zip(*found, strict=True):
            # float64 sums over 18 rows in another order.
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_derivatives_of_any_order_and_mode() -> None:
    inputs = operands(3, 2)
    fn = apply_gain
    assert torch.autograd.gradcheck(fn, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, inputs, check_fwd_over_rev=True)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(fn, inputs, check_forward_ad=True, **batched)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    z, gain, bias = operands(3, 2)
    value = apply_gain(z, gain.detach(), bias.detach())
    (only,) = torch.autograd.grad(value.sum(), z)
    assert torch.equal(only, gain.detach().expand(3, 2))


def test_dtypes_of_the_gradients() -> None:
    z = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.rand(4, requires_grad=True)
    bias = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    value = apply_gain(z, gain, bias)
    assert value.dtype == torch.float32
    value.sum().backward()
    for t in (z, gain, bias):
        assert t.grad is not None
        assert t.grad.dtype == t.dtype
    difference = z.detach().double() - bias.detach().double()
    # Three float32 terms, 3 eps of their sizes; in bfloat16 it would be 4e-3 of them.
    bound = 3 * 1.2e-7 * difference.abs().sum(0)
    error = cast(Tensor, gain.grad) - difference.sum(0)
    assert bool((error.abs() <= bound).all())
