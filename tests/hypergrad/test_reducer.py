"""Averages over ranks: one message, on the parameters' device, and one fate for all.

Two ranks run in every test run, four with `-m distributed`. What is on another device than
the host is played by tensors that say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hypergrad import (
    BatchError,
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    NumericalWarning,
    RankError,
    SecondOrderError,
    SolveError,
    make_estimator,
)
from hypergrad.reducer import Contribution, Reducer
from tests.hypergrad.ranks import Message, Outcomes, on_ranks, outcomes_of, recorded

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOST = torch.device("cpu")
Params = dict[str, Tensor]


# -- one process ------------------------------------------------------------------------


def silent(**kinds: Any) -> Contribution:
    return Contribution({n: torch.ones(2, dtype=k) for n, k in kinds.items()})


def test_identity_on_one_process() -> None:
    reducer, given = Reducer(), silent(a=F64, b=BF16)
    given.extra = object()
    with recorded() as sent:
        assert reducer.together({}, lambda: given) is given
        mean = reducer.mean(given.values)
        assert reducer.any(True, {}) is True
        assert reducer.any(False, {}) is False
        reducer.check_same("texts", "a", {})
    assert (reducer.ranks, reducer.rank) == (1, 0)
    assert all(mean[n] is t for n, t in given.values.items())
    assert mean is not given.values
    assert sent == []


@pytest.mark.parametrize("kind", [ValueError, NonFiniteError, KeyboardInterrupt])
def test_errors_pass_as_they_are_on_one_process(kind: type[BaseException]) -> None:
    error = kind("on purpose")

    def fail() -> Contribution:
        raise error

    with pytest.raises(kind) as caught:
        Reducer().together({}, fail)
    assert caught.value is error


@pytest.mark.parametrize("group", [0, "world", object()])
def test_what_is_no_group_is_refused(group: Any) -> None:
    with pytest.raises(TypeError, match=f"got {type(group).__name__}"):
        Reducer(group)


def test_a_group_of_one_sends_nothing(tmp_path: Path) -> None:
    reducer = Reducer()
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        given = silent(a=F32)
        with recorded() as sent:
            assert reducer.together(given.values, lambda: given) is given
            assert reducer.any(True, given.values)
            reducer.check_same("texts", "a", given.values)
        assert sent == []
    finally:
        dist.destroy_process_group()
    assert reducer.ranks == 1  # nothing was lost with it


# -- another device than the host -------------------------------------------------------

AWAY = torch.device("lazy")


class Away(Tensor):
    """A tensor of the host that says it is on another device."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Away], held: Tensor) -> Away:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=AWAY
        )
        made.held = held
        return made

    def tolist(self) -> list[Any]:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the held tensors; as torch, refuse those of two devices."""
    devices: set[bool] = set()

    def held(value: Any) -> Any:
        if isinstance(value, Away):
            devices.add(True)
            return value.held
        if isinstance(value, Tensor) and value.dim():
            devices.add(False)
        return value

    args, kwargs = tree_map(held, (args, kwargs))
    if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
        msg = f"{func} was given tensors on two devices"
        raise RuntimeError(msg)
    away = True in devices
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]) == AWAY
        kwargs["device"] = HOST
    out = func(*args, **kwargs)
    return tree_map(lambda v: Away(v) if away and isinstance(v, Tensor) else v, out)


@pytest.fixture
def two_alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Message]]:
    """Play the second of two ranks, both with the same numbers; yield the messages."""

    def all_reduce(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
    ) -> None:
        if op == dist.ReduceOp.SUM:
            tensor.mul_(2)

    def all_gather(every: list[Tensor], mine: Tensor, group: Any = None) -> None:
        for each in every:
            each.copy_(mine)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source, group=None: None)
    with OtherDevice(), recorded() as sent:
        yield sent


@pytest.mark.parametrize("loss_is_away", [True, False])
def test_messages_lie_where_the_parameters_are(
    two_alike: list[Message], loss_is_away: bool
) -> None:
    reducer = Reducer()
    like = {
        n: torch.ones(3, dtype=k).to(AWAY) for n, k in {"a": F32, "b": BF16}.items()
    }
    loss = torch.tensor(4.0, dtype=F64).to(AWAY if loss_is_away else HOST)
    got = reducer.together(like, lambda: Contribution(like, loss))
    assert got.loss is not None
    assert got.loss.item() == 4.0
    assert got.loss.device == AWAY
    assert all(got.values[n].device == AWAY for n in like)
    assert all(got.values[n].dtype == t.dtype for n, t in like.items())
    assert reducer.any(True, like)
    reducer.check_same("texts", "a", like)
    with pytest.raises(NonFiniteError, match="rank 1 of 2 failed: on purpose"):
        reducer.together(like, raising(NonFiniteError("on purpose")))
    calls = [m.call for m in two_alike]
    assert calls == [
        "all_reduce",
        "all_reduce",
        "all_gather",
        "all_reduce",
        "broadcast",
    ]
    assert {d for m in two_alike for d in m.devices} == {AWAY}
    # Accelerators without float64 are common, and bytes are sent by all.
    assert {d for m in two_alike for d in m.dtypes} == {F32, torch.uint8}


def test_tensors_on_several_devices_come_back_to_theirs(
    two_alike: list[Message],
) -> None:
    like = {"a": torch.ones(2).to(AWAY), "b": torch.ones(2)}
    got = Reducer().mean(like)
    assert [t.device for t in got.values()] == [AWAY, HOST]
    assert len(two_alike) == 1


def raising(error: Exception) -> Callable[[], Contribution]:
    def fail() -> Contribution:
        raise error

    return fail


# -- what each of two ranks does --------------------------------------------------------


def values(rank: int) -> Params:
    """Return what a rank contributes; names in another order on each."""
    made = {
        "scalar": torch.tensor(1.0 + rank, dtype=F64),
        "view": (torch.arange(6.0).reshape(2, 3) * (rank + 1)).T,
        "empty": torch.zeros(0, 2),
        "half": torch.full((3,), 1.0 + 2 * rank, dtype=BF16),
        # In float16 the sum would be infinite.
        "large": torch.tensor(6e4, dtype=F16),
        "third": torch.tensor([1.0, 0.0][rank] / 3, dtype=F64),
        "expanded": torch.ones(1).expand(4) * (1 + rank),
    }
    return {n: made[n] for n in sorted(made, reverse=bool(rank))}


def averaged() -> dict[str, Any]:
    reducer, given = Reducer(), values(dist.get_rank())
    before = {n: t.clone() for n, t in given.items()}
    with recorded() as sent:
        got = reducer.mean(given)
    return {
        "got": got,
        "order": list(got) == list(given),
        "unchanged": all(torch.equal(given[n], t) for n, t in before.items()),
        "storages": len({t.untyped_storage().data_ptr() for t in got.values()}),
        "nothing": reducer.mean({}),
        "place": (reducer.rank, reducer.ranks),
        "sent": sent,
    }


KINDS: dict[str, dict[str, torch.dtype]] = {
    "float32": {"a": F32, "b": F32},
    "float64": {"a": F64},
    "bfloat16": {"a": BF16, "b": BF16, "c": BF16},
    "two of them": {"a": F32, "b": F64},
    "half precision of two sorts": {"a": F16, "b": BF16},
}


def payloads() -> dict[str, list[Message]]:
    found: dict[str, list[Message]] = {}
    for name, kinds in KINDS.items():
        with recorded() as found[name]:
            given = silent(**kinds)
            given.loss = torch.tensor(1.0, dtype=F64)
            Reducer().together(given.values, lambda given=given: given)
    like = {"a": torch.ones(2)}
    with recorded() as found["any"]:
        Reducer().any(True, like)
    with recorded() as found["check_same"]:
        Reducer().check_same("texts", "a", like)
    return found


def losses_and_unused() -> list[Any]:
    """Return loss and unused names where both ranks have them, one, or none."""
    rank, like = dist.get_rank(), {"a": torch.ones(2), "b": torch.ones(2)}
    found = []
    for with_loss in ({0, 1}, {1}, set[int]()):
        for unused in (({"a", "b"}, {"a"}), ({"b"}, {"a"}), (set[str](), {"a", "b"})):
            loss = torch.tensor(2.0 + 2 * rank) if rank in with_loss else None
            mine = Contribution(dict(like), loss, set(unused[rank]), f"rank {rank}")
            got = Reducer().together(like, lambda mine=mine: mine)
            value = None if got.loss is None else got.loss.item()
            found.append((value, sorted(got.unused), got.extra))
    return found


def not_finite() -> list[Any]:
    """Return the mean of what one rank cannot compute; others' numbers do not mend it."""
    rank, found = dist.get_rank(), []
    for bad in (torch.nan, torch.inf, -torch.inf):
        mine = torch.tensor([1.0, bad if rank == 0 else 1.0])
        got = Reducer().together(
            {"a": mine}, lambda mine=mine: Contribution({"a": mine}, mine[1])
        )
        assert got.loss is not None
        found.append((got.values["a"].tolist(), got.loss.item()))
    return found


LONG = "ä" * 3000
# What is raised -> the class of which all ranks raise, and what the text ends with.
FAILURES: dict[str, tuple[Exception, type[Exception], str]] = {
    "number": (NonFiniteError("the loss is nan"), NonFiniteError, "the loss is nan"),
    "ours": (HypergradError("two\nlines, ä"), HypergradError, "two\nlines, ä"),
    "order": (SecondOrderError("fused"), SecondOrderError, "fused"),
    "solve": (SolveError("singular"), SolveError, "singular"),
    "batch": (BatchError("too few"), BatchError, "too few"),
    "rank": (RankError("rank 7 failed"), RankError, "rank 7 failed"),
    "value": (ValueError("bad"), RankError, "ValueError: bad"),
    "memory": (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
    "key": (KeyError("name"), RankError, "KeyError: 'name'"),
    "warning": (NumericalWarning("off"), RankError, "NumericalWarning: off"),
    "empty": (RuntimeError(), RankError, "RuntimeError: "),
    "long": (ValueError(LONG), RankError, "ä"),
}


def failing(group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Let each rank in turn fail, and all of them; look at what each raises."""
    reducer = Reducer(group)
    like, found = {"a": torch.ones(2)}, {}
    for name, (error, _, _) in FAILURES.items():
        for who in (*range(reducer.ranks), None):
            fails = who in (reducer.rank, None)

            def compute(error: Exception = error, fails: bool = fails) -> Contribution:
                if fails:
                    raise error
                return Contribution({"a": torch.full((2,), torch.nan)})

            with recorded() as sent:
                try:
                    reducer.together(like, compute)
                    raised: Any = None
                except Exception as caught:
                    cause = caught.__cause__ is (error if fails else None)
                    raised = type(caught).__name__, str(caught), cause
            after = reducer.mean({"a": torch.full((2,), float(reducer.rank))})["a"]
            calls = [m.call for m in sent]
            found[f"{name}, {who}"] = (raised, calls, after.tolist())
    return found


def told() -> list[bool]:
    rank, like = dist.get_rank(), {"a": torch.ones(2)}
    flags = [(False, False), (False, True), (True, False), (True, True)]
    return [Reducer().any(pair[rank], like) for pair in flags]


SAME = {
    "same": ("lr=0.1, ä", "lr=0.1, ä"),
    "other": ("lr=0.1", "lr=0.2"),
    "longer": ("lr=0.1", "lr=0.1, and more"),
    "late": ("x" * 5000 + "1", "x" * 5000 + "2"),
    "long and the same": (LONG, LONG),
}


def compared() -> dict[str, str]:
    rank, like, found = dist.get_rank(), {"a": torch.ones(2)}, {}
    for name, texts in SAME.items():
        try:
            Reducer().check_same("their settings", texts[rank], like)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


# -- a group that is gone, or is not ours -----------------------------------------------


def small(group: Any = None) -> tuple[BilevelProblem, BilevelOptimizer]:
    w = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    lam = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def inner(i: Params, o: Params, batch: Any) -> Tensor:
        return ((i["w"] - batch) ** 2).mean() + o["lam"].exp() * (i["w"] ** 2).sum()

    problem = BilevelProblem(
        inner,
        lambda i, o, batch: ((i["w"] - batch) ** 2).mean(),
        {"w": w},
        {"lam": lam},
        group=group,
    )
    opt = BilevelOptimizer(
        problem,
        estimator=make_estimator("darts", product="exact"),
        inner_optimizer=partial(torch.optim.Adam, lr=0.1),
        outer_optimizer=partial(torch.optim.Adam, lr=0.1),
        outer_warmup=0,
    )
    return problem, opt


def destroyed(own_group: bool) -> dict[str, Any]:
    """Destroy the group in the middle of training, and go on."""
    group: Any = dist.new_group([0, 1]) if own_group else None
    problem, opt = small(group)
    rank = dist.get_rank()
    opt.step(float(rank), 1.0)
    before = [t.detach().clone() for t in problem.tensors]
    dist.destroy_process_group(group)
    raised: list[Any] = []
    for call in (
        lambda: opt.step(1.0, 1.0),
        lambda: opt.outer_step(1.0),
        lambda: make_estimator("cg").estimate(
            problem, inner_batch=1.0, outer_batch=1.0
        ),
    ):
        try:
            call()
        except Exception as error:
            raised.append((type(error).__name__, str(error)))
    unmoved = all(
        torch.equal(t, b) for t, b in zip(problem.tensors, before, strict=True)
    )
    counts = opt.n_inner_steps, opt.n_outer_steps, opt.n_skipped
    again = not own_group and small()[1].step(1.0, 1.0).outer_step
    return {"raised": raised, "unmoved": unmoved, "counts": counts, "anew": again}


def destroyed_before_use() -> str:
    """Destroy a group that a problem holds and never averaged over."""
    group: Any = dist.new_group([0, 1])
    reducer = Reducer(group)
    dist.barrier()  # or one rank closes what the other is still connecting to
    dist.destroy_process_group(group)
    try:
        return f"{reducer.ranks} rank"
    except HypergradError as error:
        return str(error)


def group_of_one() -> Any:
    """Average over a group that holds rank 0 alone; on rank 1 there is no such group."""
    group: Any = dist.new_group([0])
    if dist.get_rank() == 0:
        reducer = Reducer(group)
        return reducer.ranks, reducer.rank, reducer.mean({"a": torch.ones(1)})
    with pytest.raises((TypeError, ValueError, HypergradError)) as caught:
        _ = Reducer(group).ranks
    return str(caught.value)


# -- groups within four ranks -----------------------------------------------------------


def pair() -> tuple[dist.ProcessGroup, list[int]]:
    """Return the group of this rank, and the numbers of its ranks: 0 and 2, or 1 and 3."""
    groups: list[Any] = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    own = dist.get_rank() % 2
    return groups[own], [own, own + 2]


def within_a_group() -> dict[str, Any]:
    group, members = pair()
    reducer, me = Reducer(group), dist.get_rank()
    like = {"a": torch.ones(2)}
    try:
        reducer.check_same("their settings", f"lr={me}", like)
        differ = ""
    except ValueError as error:
        differ = str(error)
    return {
        "place": (reducer.rank, reducer.ranks),
        "mean": reducer.mean({"a": torch.full((2,), float(me))})["a"].tolist(),
        "any": reducer.any(me == 3, like),
        "failing": failing(group) if members == [1, 3] else {},
        "differ": differ,
    }


def trained_in_a_group() -> list[Tensor]:
    """Train on two pairs of ranks side by side, each on data of its own."""
    group, _ = pair()
    problem, opt = small(group)
    for step in range(4):
        opt.step(float(dist.get_rank() + step), 1.0)
    return [t.detach() for t in problem.tensors]


def one_of_four() -> str:
    text = "other" if dist.get_rank() == 2 else "same"
    with pytest.raises(ValueError, match="ranks differ") as caught:
        Reducer().check_same("their settings", text, {"a": torch.ones(1)})
    return str(caught.value)


# -- cases -----------------------------------------------------------------------------

CASES: dict[str, Callable[[], Any]] = {
    "mean": averaged,
    "payloads": payloads,
    "losses": losses_and_unused,
    "not finite": not_finite,
    "failing": failing,
    "any": told,
    "check_same": compared,
    "destroyed": partial(destroyed, False),
    "own group destroyed": partial(destroyed, True),
    "destroyed before use": destroyed_before_use,
    "a group of one": group_of_one,
    "within a group": within_a_group,
    "trained in a group": trained_in_a_group,
    "one of four": one_of_four,
}


@pytest.fixture
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return outcomes_of(request, tmp_path_factory)


# -- tests -----------------------------------------------------------------------------


@on_ranks(["mean"])
def test_mean_of_everything_that_a_parameter_may_be(
    outcomes: Outcomes, case: str
) -> None:
    for rank, found in enumerate(outcomes.results(case)):
        got, given = found["got"], values(rank)
        assert found["order"]
        assert found["unchanged"]
        assert found["nothing"] == {}
        assert found["place"] == (rank, 2)
        assert len(found["sent"]) == 1
        assert found["storages"] == len(got)  # each owns its memory
        for name, t in got.items():
            assert t.dtype == given[name].dtype
            assert t.shape == given[name].shape
        assert got["scalar"].item() == 1.5
        assert got["view"].tolist() == [[0.0, 4.5], [1.5, 6.0], [3.0, 7.5]]
        assert got["half"].tolist() == [2.0, 2.0, 2.0]
        assert got["large"].item() == 6e4
        assert got["third"].item() == 1 / 6
        assert got["expanded"].tolist() == [1.5] * 4


@on_ranks(["payloads"])
def test_one_message_and_nothing_else_in_it(outcomes: Outcomes, case: str) -> None:
    for found in outcomes.results(case):
        for name, kinds in KINDS.items():
            (message,) = found[name]
            # Who failed, who has a loss, who used each name; the loss; the values.
            header = 2 + 1 + len(kinds)
            assert message.call == "all_reduce"
            assert message.numel == header + 1 + 2 * len(kinds)
            assert message.devices == {HOST}
            assert message.dtypes == {F64 if F64 in kinds.values() else F32}
        (flag,) = found["any"]
        assert flag.call == "all_reduce"
        assert flag.numel <= 2 + 1  # who failed, and the flag
        assert flag.dtypes == {F32}
        (text,) = found["check_same"]
        assert (text.call, text.dtypes) == ("all_gather", {torch.uint8})


@on_ranks(["losses"])
def test_losses_and_unused_names(outcomes: Outcomes, case: str) -> None:
    for rank, found in enumerate(outcomes.results(case)):
        # Where one rank has no loss it counts as 0: only whether it is finite is read.
        losses = [3.0] * 3 + [2.0] * 3 + [None] * 3
        unused = [["a"], [], []] * 3
        assert found == [
            (loss, names, f"rank {rank}")
            for loss, names in zip(losses, unused, strict=True)
        ]


@on_ranks(["not finite"])
def test_what_is_not_finite_on_one_rank_is_so_on_all(
    outcomes: Outcomes, case: str
) -> None:
    for found in outcomes.results(case):
        for (kept, bad), loss in found:
            assert kept == 1.0
            assert not torch.isfinite(torch.tensor([bad, loss])).any()


def check_failures(per_rank: list[Any], ranks: int, mean: float) -> None:
    for rank, found in enumerate(per_rank):
        for name, (_, kind, ending) in FAILURES.items():
            for who in (*range(ranks), None):
                raised, calls, after = found[f"{name}, {who}"]
                assert raised is not None, (name, who)
                got, text, caused = raised
                first = 0 if who is None else who
                assert got == kind.__name__, (name, who, rank)
                assert text.startswith(f"rank {first} of {ranks} failed: ")
                assert text.endswith(ending) or name == "long"
                assert caused  # by this rank's own error, where it has one
                # The same words on all, whatever each of them met.
                assert text == per_rank[0][f"{name}, {who}"][0][1]
                assert calls == ["all_reduce", "broadcast"]
                assert after == [mean, mean]  # no message was left over


@on_ranks(["failing"], ["failing"])
def test_what_one_rank_raises_all_raise(outcomes: Outcomes, case: str) -> None:
    ranks = outcomes.ranks
    check_failures(outcomes.results(case), ranks, (ranks - 1) / 2)


@on_ranks(["failing"])
def test_a_long_message_is_cut_between_two_letters(
    outcomes: Outcomes, case: str
) -> None:
    for found in outcomes.results(case):
        (_, text, _), _, _ = found["long, 1"]
        assert 900 < len(text) < 2000
        assert set(text.partition("ValueError: ")[2]) == {"ä"}


@on_ranks(["any"])
def test_a_flag_of_any_rank(outcomes: Outcomes, case: str) -> None:
    assert outcomes.results(case) == [[False, True, True, True]] * 2


@on_ranks(["check_same"])
def test_ranks_that_differ_are_named(outcomes: Outcomes, case: str) -> None:
    for found in outcomes.results(case):
        assert found["same"] == found["long and the same"] == ""
        assert "ranks differ in their settings: rank 0 has lr=0.1" in found["other"]
        assert "rank 1 has lr=0.2" in found["other"]
        assert "rank 1 has lr=0.1, and more" in found["longer"]
        assert found["late"] != ""


@on_ranks(["destroyed", "own group destroyed"])
def test_a_group_that_is_gone_stops_training(outcomes: Outcomes, case: str) -> None:
    for found in outcomes.results(case):
        kinds = [kind for kind, _ in found["raised"]]
        assert kinds == ["HypergradError"] * 3
        assert all("process group of 2 ranks is gone" in t for _, t in found["raised"])
        assert found["unmoved"]
        assert found["counts"] == (1, 1, 0)
        assert found["anew"] == (case == "destroyed")


@on_ranks(["destroyed before use"])
def test_a_group_that_is_gone_before_its_first_message(
    outcomes: Outcomes, case: str
) -> None:
    assert all("is gone" in found for found in outcomes.results(case))


@on_ranks(["a group of one"])
def test_a_rank_outside_of_the_group_is_told_so(outcomes: Outcomes, case: str) -> None:
    inside, outside = outcomes.results(case)
    assert inside == (1, 0, {"a": torch.ones(1)})
    assert "member" in outside


@on_ranks([], ["within a group"])
def test_a_group_of_two_of_four_ranks(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    assert [each["place"] for each in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [each["mean"] for each in found] == [[1.0, 1.0], [2.0, 2.0]] * 2
    assert [each["any"] for each in found] == [False, True] * 2
    # Ranks are numbered within their group.
    check_failures([found[1]["failing"], found[3]["failing"]], 2, 0.5)
    for each, (first, second) in zip(found, [(0, 2), (1, 3)] * 2, strict=True):
        assert f"rank 0 has lr={first}, rank 1 has lr={second}" in each["differ"]


@on_ranks([], ["trained in a group"])
def test_two_groups_train_side_by_side(outcomes: Outcomes, case: str) -> None:
    found = outcomes.results(case)
    for one, other in ((0, 2), (1, 3)):
        assert all(map(torch.equal, found[one], found[other]))
    assert not torch.equal(found[0][0], found[1][0])


@on_ranks([], ["one of four"])
def test_the_one_of_four_that_differs_is_named(outcomes: Outcomes, case: str) -> None:
    for text in outcomes.results(case):
        assert "rank 0 has same, rank 2 has other" in text
