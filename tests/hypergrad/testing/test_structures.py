"""A problem in another form is the same problem, with the same truth."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hypergrad.testing import (
    PROBLEMS,
    STRUCTURES,
    KnownProblem,
    Structure,
    dora_block,
    relative_error,
    restructured,
    ridge,
)
from hypergrad.tree import Params
from tests.tolerances import error, tol

F64 = torch.float64
FULL = [s for s in STRUCTURES if s != "empty"]


def flat(params: Params) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in params.values()])


def gradients(known: KnownProblem, level: str) -> tuple[float, Tensor, Tensor]:
    """Return a loss and its gradients in w and λ, entry by entry, by torch.autograd."""
    problem = known.problem
    w, lam = problem.inner_params, problem.outer_params
    loss = (problem.inner_loss if level == "inner" else problem.outer_loss)(
        w, lam, None
    )
    every = [*w.values(), *lam.values()]
    grads = torch.autograd.grad(loss, every, materialize_grads=True, allow_unused=True)
    flats = [g.reshape(-1) for g in grads]
    return float(loss.detach()), torch.cat(flats[: len(w)]), torch.cat(flats[len(w) :])


@pytest.mark.parametrize("structure", FULL)
@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_losses_and_truth_go_along(make: Any, structure: Structure) -> None:
    known = make()
    form = restructured(known, structure)
    for level in ("inner", "outer"):
        was, now = gradients(known, level), gradients(form, level)
        assert now[0] == pytest.approx(was[0], rel=tol(F64))
        # At the minimum the inner gradient in w is rounding: compare it absolutely.
        assert torch.allclose(now[1], was[1], rtol=1e-13, atol=1e-14)
        assert torch.allclose(now[2], was[2], rtol=1e-13, atol=1e-14)
    outer = form.problem.outer_params
    for truth in (form.direct, form.indirect, form.outer_grads):
        assert {n: t.shape for n, t in truth.items()} == {
            n: t.shape for n, t in outer.items()
        }
    assert error(flat(form.direct), gradients(form, "outer")[2]) < tol(F64)
    assert torch.equal(flat(form.indirect), flat(known.indirect))
    by_inverse = form.indirect_by(torch.linalg.inv(form.hessian))
    assert relative_error(by_inverse, form.indirect) < tol(F64, 10 * form.condition)
    assert form.problem.tensors[0].dtype == F64


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_original_is_left_alone(structure: Structure) -> None:
    known = dora_block()
    before = flat(known.problem.inner_params), flat(known.problem.outer_params)
    form = restructured(known, structure)
    with torch.no_grad():
        for tensor in form.problem.tensors:
            tensor.fill_(0.0)
    assert torch.equal(flat(known.problem.inner_params), before[0])
    assert torch.equal(flat(known.problem.outer_params), before[1])


def shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    params = restructured(dora_block(), structure).problem.inner_params
    return {name: tuple(t.shape) for name, t in params.items()}


def test_forms() -> None:
    original = {"lora_A": (2, 4), "lora_B": (3, 2), "head": (3,)}
    assert shapes("plain") == shapes("non-contiguous") == shapes("aliased") == original
    assert shapes("one") == {"lora_A+lora_B+head": (17,)}
    assert shapes("many") == {
        "lora_A.0": (4,),
        "lora_A.1": (4,),
        "lora_B.0": (3,),
        "lora_B.1": (3,),
        "head.0": (2,),
        "head.1": (1,),
    }
    scalars = shapes("scalar")
    assert set(scalars.values()) == {()}
    assert len(scalars) == 17


def test_non_contiguous_tensors_are_views_with_gaps() -> None:
    problem = restructured(dora_block(), "non-contiguous").problem
    for tensor in problem.tensors:
        assert not tensor.is_contiguous()
        assert not tensor.T.is_contiguous() if tensor.dim() == 2 else True
        assert tensor.is_leaf
    assert problem.inner_params["lora_A"].stride() == (2, 4)


def test_transposed_tensors_are_dense_and_have_no_flat_view() -> None:
    problem = restructured(dora_block(), "transposed").problem
    matrix = problem.inner_params["lora_A+lora_B+head"]
    assert (matrix.shape, matrix.stride(), matrix.is_leaf) == ((2, 8), (1, 2), True)
    assert matrix.T.is_contiguous()
    assert problem.inner_params["lora_A+lora_B+head, rest"].shape == ()


def test_aliased_tensors_are_read_under_both_names() -> None:
    known = ridge()
    problem = restructured(known, "aliased").problem
    assert problem.aliases == {"w again": "w", "penalty again": "penalty"}
    w, lam = problem.inner_params["w"], problem.outer_params["penalty"]
    loss = problem._losses["inner"]
    both = {"penalty": lam, "penalty again": lam}
    for given in ({"w": 2 * w, "w again": 0 * w}, {"w": 0 * w, "w again": 2 * w}):
        whole = known.problem.inner_loss({"w": w}, {"penalty": lam}, None)
        assert torch.equal(loss(given, both, None), whole)


def test_empty_keeps_the_direct_term_alone() -> None:
    known = dora_block()
    form = restructured(known, "empty")
    assert form.problem.inner_params == {}
    assert relative_error(form.outer_grads, known.direct) == 0
    assert not flat(form.indirect).any()
    assert form.hessian.shape == (0, 0)
    assert form.condition == 1.0
    assert not flat(form.indirect_by(torch.zeros(0, 0, dtype=F64))).any()
    was = known.problem.outer_loss(
        known.problem.inner_params, known.problem.outer_params, None
    )
    now = form.problem.outer_loss({}, form.problem.outer_params, None)
    assert torch.equal(was, now)


def test_bad_structures() -> None:
    with pytest.raises(
        ValueError, match=r"structure='nested' is unknown; .*'plain', 'one'"
    ):
        restructured(ridge(), cast(Structure, "nested"))
    with pytest.raises(ValueError, match="depends on λ only through w"):
        restructured(ridge(), "empty")


def test_gauss_newton_outputs_go_along() -> None:
    known = ridge()
    base = known.problem
    base.inner_outputs = lambda i, o, b: i["w"] * o["penalty"]
    base.inner_criterion = lambda outputs, b: outputs.sum()
    problem = restructured(known, "many").problem
    assert problem.inner_outputs is not None
    outputs = problem.inner_outputs(problem.inner_params, problem.outer_params, None)
    assert torch.equal(outputs, base.inner_params["w"] * base.outer_params["penalty"])
    assert problem.inner_criterion is base.inner_criterion
