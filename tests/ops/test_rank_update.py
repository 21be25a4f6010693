"""rank_update_: every implementation against float64, one rounding, ugly shapes and layouts, bad input."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from reference.rank_update import rank_update_ as reference
from torch import Tensor

import fastedit
from fastedit.ops import rank_update_
from fastedit.ops.rank_update import _op

WEIGHTS = [torch.float32, torch.bfloat16, torch.float16]
FACTORS = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(1, 1, 1), (33, 17, 4), (97, 63, 1), (5, 100, 300), (200, 49, 7), (96, 48, 16), (65, 130, 50)]
ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def problem(
    rows: int, columns: int, rank: int, weight: torch.dtype, factor: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + rank)
    shapes = ((rows, columns), (rows, rank), (rank, columns))
    W, left, right = (torch.randn(shape, generator=generator) for shape in shapes)
    return W.to(device, weight), left.to(device, factor), right.to(device, factor)


def check(
    found: Tensor, W: Tensor, left: Tensor, right: Tensor, alpha: float, *, last_bits: float = 0
) -> None:
    """Within half a unit of the last place of the exact sum, plus what summing in fp32 (or fp64) may lose.

    last_bits: further units allowed, where a tool is known to round otherwise.
    """
    W, left, right = W.cpu().double(), left.cpu().double(), right.cpu().double()
    exact = W + alpha * left @ right
    size = W.abs() + abs(alpha) * left.abs() @ right.abs()
    wide = found.dtype == torch.float64
    slack = (1e-15 if wide else 2e-6) * size
    unit = ULP[found.dtype]
    error = (found.cpu().double() - exact).abs() - (1.001 + 2 * last_bits) * unit * exact.abs() - slack
    assert not found.isnan().any() and float(error.max()) <= 0


def run_shapes(backend: str, weight: torch.dtype, factor: torch.dtype, device: str = "cpu") -> None:
    for rows, columns, rank in SHAPES:
        if backend == "cuda" and rank > 8:
            continue
        W, left, right = problem(rows, columns, rank, weight, factor, device)
        found, turned = W.clone(), W.T.clone(memory_format=torch.contiguous_format)
        with fastedit.backend(backend):
            rank_update_(found, left, right, alpha=-0.3)
            rank_update_(turned, left, right, alpha=-0.3, transposed=True)
        check(found, W, left, right, -0.3)
        check(turned.T, W, left, right, -0.3)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("weight", [*WEIGHTS, torch.float64], ids=str)
def test_eager(weight: torch.dtype, factor: torch.dtype) -> None:
    run_shapes("eager", weight, factor)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_cpu(cpu_level: str, weight: torch.dtype, factor: torch.dtype) -> None:
    run_shapes("cpu", weight, factor)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("update", [1e-3, 16.0, 1e-7])
def test_every_half_rounds_like_torch(cpu_level: str, weight: torch.dtype, update: float) -> None:
    """All 65536 bit patterns: denormals, infinities, NaN and the ties between them."""
    W = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(weight).view(256, 256)
    left, right = torch.full((256, 1), update), torch.ones(1, 256)
    found, expected = W.clone(), W.clone()
    with fastedit.backend("cpu"):
        rank_update_(found, left, right)
    reference(expected, left, right)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_one_rounding_keeps_what_two_would_lose() -> None:
    # Each term is under half a unit of 1.0 in bfloat16; together they are not.
    for backend in ("eager", "cpu"):
        W = torch.ones(40, 40, dtype=torch.bfloat16)
        with fastedit.backend(backend) if backend == "eager" or _native() else fastedit.backend("eager"):
            rank_update_(W, torch.full((40, 4), 0.0019), torch.ones(4, 40))
        assert W.eq(1.0078125).all()


def _native() -> bool:
    return importlib.util.find_spec("fastedit._cpu") is not None


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(backend: str, weight: torch.dtype, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    W, left, right = problem(40, 56, 6, weight, torch.float64)
    wide = torch.full((40, 100), 7.0, dtype=weight)
    odd = torch.full((40 * 56 + 1,), 7.0, dtype=weight)
    views = {
        "columns of a wider tensor": wide[:, 13:69],
        "column major": torch.empty(56, 40, dtype=weight).T,
        "misaligned": odd[1:].view(40, 56),
    }
    factors = {
        "strided": (torch.zeros(80, 13).double()[::2, 1::2], torch.zeros(12, 57).double()[::2, 1:]),
        "transposed": (torch.zeros(6, 40).double().T, torch.zeros(56, 6).double().T),
    }
    for view in views.values():
        for left_view, right_view in factors.values():
            view.copy_(W), left_view.copy_(left), right_view.copy_(right)
            with fastedit.backend(backend):
                rank_update_(view, left_view, right_view, alpha=0.5)
            check(view, W, left, right, 0.5)
    assert wide[:, :13].eq(7).all() and wide[:, 69:].eq(7).all() and odd[0] == 7


def test_strides_no_kernel_takes(native_cpu: None) -> None:
    W, left, right = problem(20, 30, 3, torch.bfloat16, torch.float32)
    view = torch.zeros(40, 60, dtype=torch.bfloat16)[::2, ::2]
    view.copy_(W)
    with (
        fastedit.backend("cpu"),
        pytest.raises(RuntimeError, match=r"unit stride along one dimension, got strides"),
    ):
        rank_update_(view, left, right)
    rank_update_(view, left, right)
    check(view, W, left, right, 1.0)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_nothing_to_add(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    with fastedit.backend(backend):
        W = torch.randn(9, 7).bfloat16()
        kept = W.clone()
        rank_update_(W, torch.empty(9, 0), torch.empty(0, 7))
        assert torch.equal(W, kept)
        rank_update_(torch.empty(0, 7).bfloat16(), torch.empty(0, 2), torch.empty(2, 7))
        rank_update_(torch.empty(9, 0).bfloat16(), torch.empty(9, 2), torch.empty(2, 0))


def test_thousands_of_ranks(native_cpu: None) -> None:
    W, left, right = problem(50, 70, 5000, torch.bfloat16, torch.float32)
    found = W.clone()
    with fastedit.backend("cpu"):
        rank_update_(found, left, right, alpha=0.01)
    check(found, W, left, right, 0.01)


def test_threads_give_the_same_bits(native_cpu: None) -> None:
    W, left, right = problem(500, 130, 20, torch.bfloat16, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(W.clone())
            with fastedit.backend("cpu"):
                rank_update_(results[-1], left, right)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("factor", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_measured_on_every_level(cpu_level: str, weight: torch.dtype, factor: torch.dtype) -> None:
    measured("cpu", weight, factor)


@pytest.mark.parametrize("factor", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [*WEIGHTS, torch.float64], ids=str)
def test_measured_by_the_default(weight: torch.dtype, factor: torch.dtype) -> None:
    measured("eager", weight, factor)


def measured(backend: str, weight: torch.dtype, factor: torch.dtype) -> None:
    """What is reported is what happened to the bits, and the result is that of the call which does not report."""
    sizes = [(1, 1, 1), (97, 63, 2), (200, 49, 7)]
    problems = [problem(*size, weight, factor) for size in sizes]
    W, left, right = (list(part) for part in zip(*problems))
    left = [1e-2 * part for part in left]
    plain, found = [w.clone() for w in W], [w.clone() for w in W]
    with fastedit.backend(backend):
        rank_update_(plain, left, right, alpha=[0.5, 1.0, -2.0])
        added, lost = rank_update_(found, left, right, alpha=[0.5, 1.0, -2.0], measure=True)
    for index, alpha in enumerate((0.5, 1.0, -2.0)):
        if backend == "cpu" or weight != factor:  # torch's addmm_ and a sum of two steps round otherwise
            assert torch.equal(plain[index], found[index])
        change = found[index].double() - W[index].double()
        update = alpha * left[index].double() @ right[index].double()
        torch.testing.assert_close(added[index], change.square().sum())
        rest = (update - change).norm()
        slack = 1e-6 * float(update.norm() + W[index].double().norm())  # the sum over ranks is float32
        assert abs(float(lost[index].sqrt() - rest)) <= 1e-4 * float(rest) + slack


def test_what_bfloat16_cannot_hold_is_lost(cpu_level: str) -> None:
    for backend in ("eager", "cpu"):
        W = torch.ones(50, 70).bfloat16()
        with fastedit.backend(backend):
            added, lost = rank_update_(W, torch.full((50, 1), 1e-3), torch.ones(1, 70), measure=True)
        assert W.eq(1).all() and added.tolist() == [0.0]
        torch.testing.assert_close(lost, torch.tensor([50 * 70 * 1e-6], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_several_modules_in_one_call(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    sizes = [(33, 17, 4), (17, 33, 1), (5, 100, 0), (40, 40, 9)]
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    problems = [problem(*size, kind, torch.float64) for size, kind in zip(sizes, kinds)]
    W, left, right = (list(part) for part in zip(*problems))
    found = [w.T.clone(memory_format=torch.contiguous_format) for w in W]
    with fastedit.backend(backend):
        rank_update_(found, left, right, alpha=0.25, transposed=True)
    for index in range(len(W)):
        check(found[index].T, W[index], left[index], right[index], 0.25)


def test_bad_groups() -> None:
    W, left, right = torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="W must be at least one weight, got an empty sequence"):
        rank_update_([], [], [])
    with pytest.raises(ValueError, match="right must have one entry for each of the 2 weights, got 1"):
        rank_update_([W, W.clone()], [left, left], [right])
    with pytest.raises(ValueError, match="alpha must have one entry for each of the 1 weights, got 2"):
        rank_update_(W, left, right, alpha=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"left\[1\] must be \[4, r\] for W \[4, 3\], got \[3, 1\]"):
        rank_update_([W, W.clone()], [left, left[:3]], [right, right])
    with pytest.raises(ValueError, match=r"W\[1\] must be on W's device cpu, got meta"):
        rank_update_([W, W.to("meta")], [left, left], [right, right])
    with pytest.raises(ValueError, match=r"W\[1\] must not share memory with W\[0\]"):
        rank_update_([W, W], [left, left], [right, right])
    with pytest.raises(ValueError, match=r"W must not overlap itself, got shape \[4, 3\]"):
        rank_update_(torch.zeros(3).expand(4, 3), left, right)
    with pytest.raises(ValueError, match="W must not be a negated view"):
        rank_update_(torch.zeros(4, 3, dtype=torch.complex64).conj().imag, left, right)


def test_threads_give_the_same_norms(native_cpu: None) -> None:
    W, left, right = problem(500, 130, 20, torch.bfloat16, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with fastedit.backend("cpu"):
                results.append(torch.stack(rank_update_(W.clone(), left, right, measure=True)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_parameters_are_changed_in_place() -> None:
    for weight in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(8, 6, dtype=weight)
        before = layer.weight.detach().clone()
        left = torch.ones(6, 1, requires_grad=True)
        rank_update_(layer.weight, left * 2, torch.ones(1, 8))
        assert layer.weight.requires_grad and layer.weight.is_leaf
        torch.testing.assert_close(layer.weight.detach(), before + 2)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_autograd_notices_the_change(weight: torch.dtype) -> None:
    W, x = torch.ones(4, 3, dtype=weight, requires_grad=True), torch.ones(3, dtype=weight, requires_grad=True)
    loss = (W @ x).sum()
    rank_update_(W, torch.ones(4, 1), torch.ones(1, 3))
    assert W._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        frozen = torch.ones(4, 3, dtype=weight)
        rank_update_(frozen, torch.ones(4, 1), torch.ones(1, 3))
    assert frozen.eq(2).all()


def test_what_runs(native_cpu: None) -> None:
    left, right = torch.zeros(8, 2), torch.zeros(2, 6)

    def chosen(weight: torch.dtype, factor: torch.dtype) -> str:
        rows = fastedit.explain(
            "rank_update", torch.zeros(8, 6, dtype=weight), left.to(factor), right.to(factor)
        )
        return next(row.name for row in rows if row.chosen)

    assert chosen(torch.bfloat16, torch.float32) == "cpu"
    assert chosen(torch.float32, torch.float64) == "cpu"
    assert chosen(torch.float32, torch.float32) == "eager"
    assert chosen(torch.float64, torch.float32) == "eager"


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((4,), (4, 1), (1, 3)), "fff", "W must be a float matrix, got torch.float32"),
        (((4, 3), (4, 1), (1, 3)), "iff", "W must be a float matrix, got torch.int32"),
        (((4, 3), (4,), (1, 3)), "fff", "left must be a float matrix"),
        (((4, 3), (4, 1), (1, 3)), "ffi", "right must be a float matrix, got torch.int32"),
        (((4, 3), (3, 1), (1, 3)), "fff", r"left must be \[4, r\] for W \[4, 3\], got \[3, 1\]"),
        (((4, 3), (4, 2), (1, 3)), "fff", r"right must be \[2, 3\], got \[1, 3\]"),
    ],
)
def test_bad_input_names_the_argument(shapes: tuple[tuple[int, ...], ...], dtypes: str, message: str) -> None:
    kinds = {"f": torch.float32, "i": torch.int32}
    W, left, right = (torch.zeros(shape, dtype=kinds[kind]) for shape, kind in zip(shapes, dtypes))
    with pytest.raises(ValueError, match=message):
        rank_update_(W, left, right)


def test_other_bad_input() -> None:
    W, left, right = torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="left must be on W's device cpu, got meta"):
        rank_update_(W, left.to("meta"), right)
    with pytest.raises(ValueError, match=r"left must be \[3, r\]"):
        rank_update_(W, left, right, transposed=True)


def test_opcheck() -> None:
    for weight in (torch.float32, torch.bfloat16):
        W, left, right = problem(6, 5, 2, weight, torch.float32)
        torch.library.opcheck(_op, ([W], [left], [right], [0.5], False, False))
        torch.library.opcheck(_op, ([W, W.clone()], [right.T] * 2, [left.T] * 2, [0.5, 1.0], True, True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("factor", FACTORS, ids=str)
@pytest.mark.parametrize("weight", [*WEIGHTS, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_gpu(backend: str, weight: torch.dtype, factor: torch.dtype) -> None:
    run_shapes(backend, weight, factor, "cuda")
