"""delta_step_: torch.optim.Adam run edit by edit is the truth."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.delta_step import delta_step_ as reference
from torch import Tensor

import fastedit
from fastedit.ops import delta_step_
from fastedit.ops.delta_step import _op

CHECKED = [(torch.float64, 1e-12, "eager"), (torch.float32, 2e-6, "eager")]
if importlib.util.find_spec("fastedit._cpu"):
    CHECKED.append((torch.float32, 2e-6, "cpu"))
RATES: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.5, "clamp": 0.75}


def problem(E: int, d: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """delta, grad, exp_avg, exp_avg_sq, step, init_norm, active; fresh rows and rows some steps in."""
    generator = torch.Generator().manual_seed(seed)
    delta, grad, m, v = (torch.randn(E, d, generator=generator, dtype=torch.float64) for _ in range(4))
    step = torch.randint(0, 30, (E,), generator=generator)
    fresh = torch.arange(E) % 3 == 0
    step[fresh] = 0
    for state in (delta, m, v):
        state[fresh] = 0
    init_norm = 1 + 3 * torch.rand(E, generator=generator, dtype=torch.float64)
    active = torch.rand(E, generator=generator) > 0.3
    return [*(t.to(dtype) for t in (0.1 * delta, grad, m, v.abs())), step, init_norm.to(dtype), active]


def copies(state: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in state]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    E=st.integers(0, 7),
    d=st.sampled_from([1, 63, 100]),
    clamp=st.sampled_from([1e-3, 0.75, 4.0, 1e9]),
    decay=st.sampled_from([0.0, 1e-3, 0.5]),
)
def test_equals_adam_per_edit(seed: int, E: int, d: int, clamp: float, decay: float) -> None:
    for dtype, tolerance, name in CHECKED:
        ours = problem(E, d, dtype, seed)
        theirs = copies(ours)
        for _ in range(3):
            with fastedit.backend(name):
                delta_step_(*ours, lr=0.5, weight_decay=decay, clamp=clamp)
            reference(*theirs, lr=0.5, weight_decay=decay, clamp=clamp)
        for found, expected in zip(ours, theirs):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_whole_trajectory() -> None:
    """25 steps towards a target, the gradient recomputed from the moving delta; edits stop at different steps."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(6, 64, dtype=torch.float64)
    ours = [zeros.clone(), zeros, zeros.clone(), zeros.clone(), torch.zeros(6).long()]
    ours += [torch.full((6,), 2.0).double(), torch.ones(6).bool()]
    theirs = copies(ours)
    for step in range(25):
        for state, function in ((ours, delta_step_), (theirs, reference)):
            state[1] = 2 * (state[0] - target)
            state[6] = torch.arange(6) * 5 >= step - 10
            function(*state, **RATES)
    assert ours[4].tolist() == [11, 16, 21, 25, 25, 25]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-12)
    assert (ours[0].norm(dim=1) <= 0.75 * 2.0 * (1 + 1e-12)).all()


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("E", "d"), [(1, 1), (3, 63), (7, 1000), (0, 5), (2, 0), (5, 17)])
def test_every_level(implementation: str, E: int, d: int, grad: torch.dtype) -> None:
    ours = problem(E, d, torch.float32)
    ours[1] = ours[1].to(grad)
    ours[1][~ours[6]] = float("nan")
    theirs = [t.double() if t.is_floating_point() else t.clone() for t in ours]
    for _ in range(2):
        with fastedit.backend(implementation):
            delta_step_(*ours, **RATES)
        reference(*theirs, **RATES)
    for index, (found, expected) in enumerate(zip(ours, theirs)):
        if index != 1:
            torch.testing.assert_close(found.to(expected.dtype), expected, rtol=5e-6, atol=5e-6)


def test_layouts_of_the_kernel(cpu_level: str) -> None:
    """Rows with gaps, misaligned pointers, other types of norm; what the kernel cannot take it refuses by name."""
    state = problem(4, 37, torch.float32)
    expected = copies(state)
    with fastedit.backend("eager"):
        delta_step_(*expected, **RATES)
    given = []
    for tensor in state[:4]:
        wide = torch.full((4, 50), 7.0)
        wide[:, 3:40] = tensor
        given.append(wide[:, 3:40])
    given += [state[4].clone(), state[5].double(), state[6].repeat_interleave(2)[::2]]
    with fastedit.backend("cpu"):
        delta_step_(*given, **RATES)
    for found, want in zip(given, expected):
        torch.testing.assert_close(found.to(want.dtype), want, rtol=2e-6, atol=2e-6)
    assert all(part._base[:, :3].eq(7).all() and part._base[:, 40:].eq(7).all() for part in given[:4])
    refusals = {
        "delta is torch.float64": problem(4, 37, torch.float64),
        "exp_avg must have unit stride": [*state[:2], torch.zeros(37, 4).T, *state[3:]],
        "step must be contiguous": [*state[:4], torch.zeros(8).long()[::2], *state[5:]],
        "grad must be float32": [state[0], state[1].double(), *state[2:]],
    }
    for message, case in refusals.items():
        with fastedit.backend("cpu"), pytest.raises(RuntimeError, match=message):
            delta_step_(*case, **RATES)
    with fastedit.backend("cpu"), pytest.raises(RuntimeError, match="the rows of delta must not overlap"):
        _op(torch.zeros(1, 37).expand(4, 37), *state[1:], 0.5, 0.5, 0.75, 0.9, 0.999, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inactive_rows_keep_every_bit(dtype: torch.dtype) -> None:
    state = problem(5, 33, dtype)
    state[6] = torch.tensor([True, False, True, False, True])
    state[1][1] = float("nan")
    state[5][3] = 0.0  # a radius that would divide by zero
    state[2][3] = float("inf")
    before = copies(state)
    delta_step_(*state, **RATES)
    for found, expected in zip(state, before):
        for row in (1, 3):
            assert torch.equal(found[row].nan_to_num(7.0), expected[row].nan_to_num(7.0))
    assert state[0][[0, 2, 4]].isfinite().all()
    assert state[4].tolist() == (before[4] + before[6]).tolist()


def test_first_step_from_zero_is_the_sign_of_the_gradient() -> None:
    d = 16
    grad = torch.randn(1, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = torch.zeros(1, d, dtype=torch.float64)
    delta = zeros.clone()
    norm, on = torch.full((1,), 100.0).double(), torch.ones(1).bool()
    delta_step_(delta, grad, zeros.clone(), zeros.clone(), torch.zeros(1).long(), norm, on, **RATES)
    torch.testing.assert_close(delta, -0.5 * grad.sign(), rtol=1e-6, atol=0)


def test_a_zero_gradient_at_zero_moves_nothing() -> None:
    zeros = torch.zeros(2, 8)
    delta = zeros.clone()
    norm, on = torch.ones(2), torch.ones(2).bool()
    delta_step_(delta, zeros, zeros.clone(), zeros.clone(), torch.zeros(2).long(), norm, on, **RATES)
    assert delta.eq(0).all()


def test_gradients_may_be_narrower() -> None:
    state = problem(4, 20, torch.float32)
    state[1] = state[1].bfloat16()
    same = copies(state)
    same[1] = same[1].float()
    delta_step_(*state, **RATES)
    delta_step_(*same, **RATES)
    assert torch.equal(state[0], same[0]) and state[1].dtype == torch.bfloat16


def test_parameters_and_strides() -> None:
    state = problem(4, 20, torch.float64)
    expected = copies(state)
    delta_step_(*expected, **RATES)
    wide = torch.zeros(4, 41, dtype=torch.float64)
    view = wide[:, 1::2]
    view.copy_(state[0])
    delta_step_(view, *copies(state)[1:], **RATES)
    torch.testing.assert_close(view, expected[0])
    parameter = torch.nn.Parameter(state[0].clone())
    delta_step_(parameter, *copies(state)[1:], **RATES)
    assert torch.equal(parameter.detach(), expected[0]) and parameter.requires_grad


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(3, 4).half(), "delta must be float32 or float64"),
        (0, torch.zeros(4), "delta must be"),
        (1, torch.zeros(3, 5), r"grad must be float of delta's shape \[3, 4\], got torch.float32 \[3, 5\]"),
        (2, torch.zeros(3, 4).double(), "exp_avg must have delta's dtype torch.float32, got torch.float64"),
        (3, torch.zeros(2, 4), "exp_avg_sq must be float of delta's shape"),
        (0, torch.zeros(1, 4).expand(3, 4), "delta must not overlap itself"),
        (2, torch.zeros(3, 1).expand(3, 4), "exp_avg must not overlap itself"),
        (2, torch.zeros(3, 4, device="meta"), "exp_avg must be on delta's device cpu, got meta"),
        (3, torch.zeros(3, 4, device="meta"), "exp_avg_sq must be on delta's device cpu, got meta"),
        (4, torch.zeros(1).long().expand(3), "step must not overlap itself"),
        (4, torch.zeros(3), "step must be int64, got torch.float32"),
        (4, torch.zeros(2).long(), r"step must have shape \[3\], got \[2\]"),
        (5, torch.zeros(3, 1), r"init_norm must have shape \[3\], got \[3, 1\]"),
        (6, torch.zeros(3), "active must be bool, got torch.float32"),
        (6, torch.zeros(3).bool().to("meta"), "active must be on delta's device cpu, got meta"),
    ],
)
def test_bad_input_names_the_argument(index: int, value: Tensor, message: str) -> None:
    state = problem(3, 4, torch.float32)
    state[index] = value
    with pytest.raises(ValueError, match=message):
        delta_step_(*state, **RATES)


def test_what_is_written_is_memory_of_its_own() -> None:
    state = problem(3, 4, torch.float32)
    before = copies(state)
    for first, second in ((0, 2), (0, 3), (2, 3)):
        given = list(state)
        given[second] = given[first]
        names = ["delta", "grad", "exp_avg", "exp_avg_sq"]
        with pytest.raises(ValueError, match=f"{names[second]} must not share memory with {names[first]},"):
            delta_step_(*given, **RATES)
    assert all(torch.equal(one, two) for one, two in zip(state, before))
    wide = torch.cat([state[0], state[2], state[3]], dim=1)  # side by side is no overlap
    delta_step_(wide[:, :4], state[1], wide[:, 4:8], wide[:, 8:], *copies(state)[4:], **RATES)
    delta_step_(*state, **RATES)
    assert torch.equal(wide, torch.cat([state[0], state[2], state[3]], dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"clamp": float("nan")}, "clamp must be >= 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"eps": -1e-8}, "eps must be >= 0"),
    ],
)
def test_bad_rates(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_step_(*problem(3, 4, torch.float32), **{**RATES, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autograd_notices_the_change(dtype: torch.dtype) -> None:
    state = problem(3, 4, dtype)
    state[0].requires_grad_()
    loss = state[0].square().sum()
    delta_step_(*state, **RATES)
    assert all(state[index]._version > 0 for index in (0, 2, 3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck() -> None:
    state = problem(3, 4, torch.float32)
    torch.library.opcheck(_op, (*state, 0.5, 0.5, 0.75, 0.9, 0.999, 1e-8))
