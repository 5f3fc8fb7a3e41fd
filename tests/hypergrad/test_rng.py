"""Random number generators: captured, replayed and put back bit for bit."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from hypergrad import rng


def draw() -> tuple[float, ...]:
    """Draw from every generator, so that each of them moves on."""
    return (
        random.random(),
        random.gauss(0.0, 1.0),  # keeps a second number back
        float(np.random.rand()),
        float(np.random.randn()),  # likewise
        float(torch.rand(())),
        float(torch.randn(3).sum()),
    )


def test_restore_repeats_the_draws() -> None:
    draw()
    state = rng.capture()
    first = draw()
    assert draw() != first
    rng.restore(state)
    assert draw() == first


def test_numbers_kept_back_are_part_of_the_state() -> None:
    # Half of a Gaussian pair is cached in Python's and in NumPy's generator.
    random.gauss(0.0, 1.0)
    np.random.randn()
    state = rng.capture()
    first = random.gauss(0.0, 1.0), np.random.randn()
    rng.restore(state)
    assert (random.gauss(0.0, 1.0), np.random.randn()) == first


def test_numpys_generator_is_read_and_set_as_numpy_does() -> None:
    np.random.seed(0)
    # Across the point where its 624 words are made anew, with and without a number held.
    for k in range(700):
        np.random.randn() if k % 3 else np.random.rand()
        truth: Any = np.random.get_state()
        name, words, *rest = rng.capture()["numpy"]
        assert (name, *rest) == (truth[0], *truth[2:])
        assert words.tolist() == truth[1].tolist()
        after: Any = np.random.get_state()  # reading leaves it as it is
        assert after[1].tolist() == truth[1].tolist()
        assert after[2:] == truth[2:]


@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_a_number_held_back_is_dropped_where_the_state_has_none(
    held: bool, drawn: int
) -> None:
    np.random.seed(0)
    if held:
        np.random.randn()
    truth: Any = np.random.get_state()
    state = rng.capture()
    np.random.randn(drawn)
    rng.restore(state)
    after: Any = np.random.get_state()
    assert after[2:] == truth[2:]
    assert after[1].tolist() == truth[1].tolist()


def test_the_same_words_with_and_without_a_number_held_back() -> None:
    np.random.seed(0)
    np.random.randn()
    holds = rng.capture()
    number = np.random.randn()  # the one that was held: no word is drawn
    holds_none, truth = rng.capture(), np.random.rand()
    rng.restore(holds)
    rng.restore(holds_none)
    assert np.random.rand() == truth
    rng.restore(holds_none)
    rng.restore(holds)
    assert np.random.randn() == number


def test_a_captured_state_is_a_copy() -> None:
    state = rng.capture()
    before = state["cpu"].clone(), state["numpy"][1].clone()
    np.random.rand(1000)
    torch.rand(1000)
    assert torch.equal(state["cpu"], before[0])
    assert torch.equal(state["numpy"][1], before[1])


def test_replayed_leaves_no_trace() -> None:
    then = rng.capture()
    truth = draw()
    now = rng.capture()
    after = draw()
    rng.restore(now)
    with rng.replayed(then) as started:
        assert started is then
        assert draw() == truth
    assert draw() == after


def test_replayed_without_a_state_starts_from_the_present() -> None:
    now = rng.capture()
    truth = draw()
    rng.restore(now)
    with rng.replayed(None) as started:
        assert draw() == truth
    assert draw() == truth
    rng.restore(started)
    assert draw() == truth


def test_replayed_restores_when_the_block_raises() -> None:
    then = rng.capture()
    draw()
    now = rng.capture()
    after = draw()
    rng.restore(now)

    def block() -> None:
        with rng.replayed(then):
            draw()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()
    assert draw() == after


def test_replayed_restores_when_the_state_cannot_be_set() -> None:
    # Python's generator is set by then, torch's refuses.
    broken = rng.capture()
    broken["cpu"] = torch.zeros(3, dtype=torch.uint8)
    draw()
    now = rng.capture()
    after = draw()
    rng.restore(now)
    with pytest.raises(RuntimeError), rng.replayed(broken):
        pass
    assert draw() == after


def test_nested_replays() -> None:
    then = rng.capture()
    truth = draw()
    with rng.replayed(then):
        first = draw()[:3]
        with rng.replayed(then):
            assert draw() == truth
        rest = draw()
    assert first == truth[:3]
    assert rest != truth


def test_checkpoint_with_weights_only() -> None:
    random.gauss(0.0, 1.0)
    np.random.randn()
    state = rng.capture([torch.ones(1)])
    truth = draw()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with rng.replayed(loaded):
        assert draw() == truth


def test_dropout_masks_repeat() -> None:
    ones = torch.ones(1000)
    state = rng.capture([ones])
    masks = []
    for _ in range(2):
        with rng.replayed(state, [ones]):
            masks.append(torch.nn.functional.dropout(ones))
    assert torch.equal(masks[0], masks[1])


class FakeDevice:
    """The interface of torch.cuda (by device) or torch.mps (one generator)."""

    def __init__(self, indexed: bool) -> None:
        self.indexed = indexed
        self.states: dict[str, torch.Tensor] = {}

    def _key(self, device: tuple[Any, ...]) -> str:
        assert len(device) == self.indexed
        return str(device[0]) if device else "only"

    def get_rng_state(self, *device: Any) -> torch.Tensor:
        return self.states.get(self._key(device), torch.zeros(1)).clone()

    def set_rng_state(self, state: torch.Tensor, *device: Any) -> None:
        self.states[self._key(device)] = state.clone()


class Elsewhere:
    """A tensor's device, without the device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.mark.parametrize(("device", "indexed"), [("cuda:1", True), ("mps:0", False)])
def test_accelerators_are_captured_and_put_back(
    device: str, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeDevice(indexed)
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    key = device if indexed else "only"
    tensors: Any = [Elsewhere(device), torch.ones(1)]
    fake.states[key] = torch.tensor([1.0])
    state = rng.capture(tensors)
    assert set(state) == {"python", "numpy", "cpu", device}
    fake.states[key] = torch.tensor([2.0])
    # A device that only the state names is put back as well.
    for given in (tensors, ()):
        with rng.replayed(state, given):
            assert fake.states[key].item() == 1.0
            fake.states[key] = torch.tensor([9.0])
        assert fake.states[key].item() == 2.0
