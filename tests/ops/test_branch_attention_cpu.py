"""The compiled CPU kernels of branch_attention: every instruction set, every mix of types, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from branch_problem import SHAPES, TENSORS, TOLERANCES, check, problem, widened, with_gradients
from reference.branch_attention import branch_attention as reference
from torch import Tensor

import fastedit
from fastedit.ops.branch_attention import _backward_op, _op, branch_attention


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        found = empty(*args, **kwargs)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poisoned)


CPU_SHAPES = {
    **SHAPES,
    "heads of a group": {"B": 5, "own": (4, 8), "prefix": (10, 20), "H": 8, "G": 2, "D": 64},
    "many heads of a group": {"B": 3, "own": (9, 17), "prefix": (0, 40), "H": 6, "G": 1, "D": 128},
    "copied": {"B": 2, "own": (40, 70), "prefix": (30, 50), "H": 2, "G": 2, "D": 80},
}


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0, "window": 3}, {"softcap": 50.0}, {"window": 40}],
    ids=["plain", "softcap, window", "high softcap", "wide window"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES)
def test_cpu(
    cpu_level: str,
    shape: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = problem(**CPU_SHAPES[shape], dtype=dtype, **options)
    poison(monkeypatch)
    with fastedit.backend("cpu"):
        check(arguments)


@pytest.mark.parametrize("D", [1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 48, 65, 96])
def test_cpu_at_random(cpu_level: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for seed in range(12):
        heads = ((1, 1), (4, 4), (4, 2), (6, 1), (14, 2))[seed % 5]
        arguments = problem(
            *(1 + seed,),
            own=((1, 1), (0, 3), (1, 7), (9, 13))[seed % 4],
            prefix=((0, 0), (0, 3), (4, 4), (0, 21))[seed // 2 % 4],
            H=heads[0],
            G=heads[1],
            D=D,
            softcap=(None, 0.7)[seed % 2],
            window=(None, 1, 2, 5, 100)[seed % 5],
            every_query=seed % 3 == 0,
            dtype=torch.float32,
            seed=seed,
        )
        with fastedit.backend("cpu"):
            check(arguments)


@pytest.mark.parametrize("D", [8, 16])
def test_cpu_takes_mixed_dtypes(cpu_level: str, D: int) -> None:
    """Every tensor in a type of its own; what half precision holds is exact in float64."""
    arguments = problem(D=D, dtype=torch.float32)
    types = {
        "q": torch.float32,
        "k": torch.bfloat16,
        "v": torch.float16,
        "k_prefix": torch.float16,
        "v_prefix": torch.bfloat16,
    }
    arguments |= {name: arguments[name].to(dtype) for name, dtype in types.items()}
    with fastedit.backend("cpu"):
        found = with_gradients(branch_attention, arguments, torch.float32)
    expected = with_gradients(reference, widened(arguments), torch.float32)
    for ours, theirs, dtype in zip(found, expected, (types["q"], types["q"], types["k"], types["v"])):
        rtol, atol = TOLERANCES[dtype]
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


def test_cpu_threads_give_the_same_bits(native_cpu: None) -> None:
    arguments = problem(40, H=6, G=3, D=24, prefix=(0, 15), dtype=torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with fastedit.backend("cpu"):
                results.append(with_gradients(branch_attention, arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_a_forward_by_one_and_a_backward_by_the_other(native_cpu: None) -> None:
    arguments = problem(dtype=torch.float32, softcap=0.8)
    tensors = [arguments[name] for name in TENSORS]
    numbers = (arguments["max_q"], arguments["max_k"], arguments["scale"], 0.8, 0)
    results = []
    for first, second in (("eager", "eager"), ("cpu", "eager"), ("eager", "cpu"), ("cpu", "cpu")):
        with fastedit.backend(first):
            out, lse = _op(*tensors, *numbers)
        with fastedit.backend(second):
            results.append((out, lse, *_backward_op(out.sin(), lse, *tensors, *numbers)))
    for other in results[1:]:
        for one, two in zip(results[0], other):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_nan_is_not_lost(cpu_level: str) -> None:
    """A query at NaN, a key at NaN or at infinity: every result that sees it says so, like eager's."""
    for name, value in (("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("k", torch.inf)):
        arguments = problem(1, own=(4, 4), prefix=(3, 3), every_query=True, dtype=torch.float32)
        arguments[name][0] = value
        with fastedit.backend("cpu"):
            found = with_gradients(branch_attention, arguments)
        with fastedit.backend("eager"):
            expected = with_gradients(branch_attention, arguments)
        assert torch.equal(found[0].isnan(), expected[0].isnan())
        assert any(tensor.isnan().any() for tensor in found)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("columns", (0, 0), 99, "columns must lie within the 8 rows it names.*got 99"),
        ("q_starts", (-1,), 100, "q_starts must lie within the .* got 100"),
        ("k_starts", (1,), -1, "k_starts must lie within .* in ascending order if starts, got -1"),
    ],
)
def test_the_cpu_kernel_stays_within_the_tensors(
    native_cpu: None, name: str, place: tuple[int, ...], value: int, message: str
) -> None:
    arguments = problem(prefix=(3, 3), dtype=torch.float32)
    arguments[name][place] = value
    with fastedit.backend("cpu"), pytest.raises(IndexError, match=message):
        branch_attention(**arguments)


def test_what_runs_on_a_cpu(native_cpu: None) -> None:
    def chosen(arguments: dict[str, Any]) -> str:
        rows = fastedit.explain("branch_attention", **arguments)
        return next(row.name for row in rows if row.chosen)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(problem(dtype=dtype)) == "cpu"
    arguments = problem(dtype=torch.float32)
    assert chosen({**arguments, "v_prefix": arguments["v_prefix"].double()}) == "eager"
    odd = torch.zeros(*arguments["k"].shape, 2)[..., 0]
    assert chosen({**arguments, "k": odd}) == "eager"
    with fastedit.backend("cpu"):
        with pytest.raises(RuntimeError, match="k must have unit stride along its last dimension, got"):
            branch_attention(**{**arguments, "k": odd})
        with pytest.raises(RuntimeError, match=r"from float32, bfloat16 or float16, and q is torch\.float64"):
            branch_attention(**problem())
    branch_attention(**{**arguments, "k": odd})
