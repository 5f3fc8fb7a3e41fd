"""Averages: the identity on one process, the mean on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hypergrad.distributed import average, world_size

BF16 = torch.bfloat16


def test_identity_on_one_process() -> None:
    given = {"w": torch.ones(2), "e": torch.zeros(0)}
    got = average(given)
    assert world_size() == 1
    assert got == given
    assert got is not given


def _values(rank: int) -> dict[str, torch.Tensor]:
    """Return what a rank contributes; names in another order on each."""
    values = {
        "scalar": torch.tensor(1.0 + rank, dtype=torch.float64),
        "view": (torch.arange(6.0).reshape(2, 3) * (rank + 1)).T,
        "empty": torch.zeros(0, 2),
        "half": torch.full((3,), 1.0 + 2 * rank, dtype=BF16),
        # In float16 the sum would be infinite.
        "large": torch.tensor(6e4, dtype=torch.float16),
        "third": torch.tensor([1.0, 0.0][rank] / 3, dtype=torch.float64),
    }
    names = sorted(values, reverse=bool(rank))
    return {n: values[n] for n in names}


def _worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    try:
        given = _values(rank)
        before = {n: t.clone() for n, t in given.items()}
        got = average(given)
        unchanged = all(torch.equal(given[n], t) for n, t in before.items())
        messages = _count_messages(given)
        owned = len({t.data_ptr() for t in got.values() if t.numel()})
        result: dict[str, Any] = {
            "got": got,
            "order": list(got) == list(given),
            "size": world_size(),
            "unchanged": unchanged,
            "messages": messages,
            "owned": owned,
            "nothing": average({}),
        }
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _count_messages(given: dict[str, torch.Tensor]) -> int:
    count = 0
    real = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        average(given)
    finally:
        dist.all_reduce = real
    return count


@pytest.mark.distributed
def test_mean_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(_worker, (2, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    results = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for rank, result in enumerate(results):
        got, given = result["got"], _values(rank)
        assert result["size"] == 2
        assert result["order"]
        assert result["unchanged"]
        assert result["nothing"] == {}
        assert result["messages"] == 2  # float64, and all that is summed in float32
        assert result["owned"] == 5
        for name, t in got.items():
            assert t.dtype == given[name].dtype
            assert t.shape == given[name].shape
            # The same bits on each rank.
            assert torch.equal(t, results[0]["got"][name])
        assert got["scalar"].item() == 1.5
        assert got["view"].tolist() == [[0.0, 4.5], [1.5, 6.0], [3.0, 7.5]]
        assert got["half"].tolist() == [2.0, 2.0, 2.0]
        assert got["large"].item() == 6e4
        assert got["third"].item() == 1 / 6


@pytest.mark.distributed
def test_average_of_gradients_is_the_gradient_of_the_average(tmp_path: Path) -> None:
    # Linear in the loss: no estimator is needed to see it.
    mp.spawn(_gradients, (2, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = sum(_loss(w, rank) for rank in range(2)) / 2
    assert isinstance(loss, torch.Tensor)
    (truth,) = torch.autograd.grad(loss, w)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(got["w"], truth, rtol=1e-15, atol=0)


def _loss(w: torch.Tensor, rank: int) -> torch.Tensor:
    return ((w - rank) ** 3).sum() * (rank + 1)


def _gradients(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    try:
        w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(_loss(w, rank), w)
        torch.save(average({"w": g}), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
