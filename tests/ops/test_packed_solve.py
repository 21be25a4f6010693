"""packed_solve: both directions on every instruction set against the substitution, layouts, threads, bad input."""

from __future__ import annotations

import pytest
import torch
from reference.packed_solve import pack, unpack
from reference.packed_solve import packed_solve as reference
from torch import Tensor

import fastedit
from fastedit.ops.packed_solve import (
    _op,
    pack_factor,
    packed_factor_size,
    packed_solve,
    unpack_factor,
)

WIDTHS = [1, 5, 127, 128, 129, 300]
COUNTS = [0, 1, 2, 7, 8, 9, 17, 33, 64, 70, 131]
directions = pytest.mark.parametrize("transposed", [False, True], ids=["L", "L^T"])


def factor(f: int, seed: int = 0) -> Tensor:
    X = torch.randn(2 * f + 10, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.cholesky(X.T @ X / f)


def right_hand_sides(n: int, f: int) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def check(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float64 and found.is_contiguous()
    assert not found.isnan().any()
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


@pytest.mark.parametrize("f", WIDTHS)
def test_pack_and_unpack(f: int) -> None:
    lower = factor(f)
    dirty = lower + torch.full((f, f), float("nan"), dtype=torch.float64).triu(1)
    packed = pack_factor(dirty)  # what lies above the diagonal is not read
    assert packed.shape == (packed_factor_size(f),)
    torch.testing.assert_close(packed, pack(lower), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(unpack_factor(packed, f), lower, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(unpack(packed, f), lower, rtol=1e-12, atol=1e-14)


def test_packed_is_about_half() -> None:
    assert packed_factor_size(4096) == 4096 * (4096 + 128) // 2
    assert packed_factor_size(0) == 0


@directions
def test_equals_the_substitution(transposed: bool) -> None:
    for f in (3, 130):
        packed, rows = pack_factor(factor(f)), right_hand_sides(3, f)
        check(
            packed_solve(packed, rows, transposed=transposed), reference(packed, rows, transposed=transposed)
        )


@directions
@pytest.mark.parametrize("f", WIDTHS)
def test_every_level_and_count(cpu_level: str, f: int, transposed: bool) -> None:
    lower = factor(f)
    packed = pack_factor(lower)
    for n in COUNTS:
        rows = right_hand_sides(n, f)
        exact = torch.linalg.solve_triangular(lower.mT if transposed else lower, rows.mT, upper=transposed).mT
        for backend in ("cpu", "eager"):
            with fastedit.backend(backend):
                check(packed_solve(packed, rows, transposed=transposed), exact)


@directions
def test_several_tasks_and_threads_give_the_same_bits(native_cpu: None, transposed: bool) -> None:
    f = 1300  # three tasks of rows under the first block column
    packed = pack_factor(factor(f))
    threads = torch.get_num_threads()
    try:
        for n in (1, 20, 40):
            rows, found = right_hand_sides(n, f), []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                with fastedit.backend("cpu"):
                    found.append(packed_solve(packed, rows, transposed=transposed))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
            lower = unpack_factor(packed, f)
            check(found[0] @ (lower if transposed else lower.mT), rows)
    finally:
        torch.set_num_threads(threads)


def test_the_order_of_right_hand_sides_does_not_change_bits(native_cpu: None) -> None:
    packed, rows = pack_factor(factor(200)), right_hand_sides(40, 200)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with fastedit.backend("cpu"):
        assert torch.equal(packed_solve(packed, rows[order]), packed_solve(packed, rows)[order])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@directions
def test_layouts_dtypes_and_gradients(backend: str, transposed: bool, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    f = 150
    packed, rows = pack_factor(factor(f)), right_hand_sides(6, f)
    with fastedit.backend(backend):
        expected = packed_solve(packed, rows, transposed=transposed)
        wide = torch.zeros(12, 2 * f + 1, dtype=torch.float64)
        wide[::2, 1::2] = rows
        odd = torch.zeros(packed.numel() + 1, dtype=torch.float64)
        odd[1:] = packed
        spread = torch.zeros(packed.numel(), 2, dtype=torch.float64)
        spread[:, 1] = packed
        for view in (wide[::2, 1::2], rows.T.contiguous().T, torch.nn.Parameter(rows)):
            for vector in (packed, odd[1:], spread[:, 1], torch.nn.Parameter(packed)):
                before = view.detach().clone()
                found = packed_solve(vector, view, transposed=transposed)
                assert torch.equal(found, expected) and not found.requires_grad
                assert torch.equal(view, before)
        for dtype in (torch.float32, torch.bfloat16):
            low = rows.to(dtype)
            assert torch.equal(
                packed_solve(packed, low, transposed=transposed),
                packed_solve(packed, low.double(), transposed=transposed),
            )


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@directions
def test_batches(backend: str, transposed: bool, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    f = 140
    lowers = torch.stack([factor(f, seed) for seed in range(3)])
    packed, rows = pack_factor(lowers), right_hand_sides(12, f).view(3, 4, f)
    with fastedit.backend(backend):
        every = packed_solve(packed, rows, transposed=transposed)
        shared = packed_solve(packed[1], rows, transposed=transposed)
        for layer in range(3):
            check(every[layer], packed_solve(packed[layer], rows[layer], transposed=transposed))
            check(shared[layer], packed_solve(packed[1], rows[layer], transposed=transposed))
    assert packed_solve(packed[:0], rows[:0]).shape == (0, 4, f)


def test_ill_conditioned_factors_keep_a_small_residual() -> None:
    f = 300
    Q = torch.linalg.qr(right_hand_sides(f, f))[0]
    lower = torch.linalg.cholesky((Q * torch.logspace(0, -9, f, dtype=torch.float64)) @ Q.T)
    rows = right_hand_sides(5, f)
    found = packed_solve(pack_factor(lower), rows)
    backward = (found @ lower.mT - rows).norm() / (found.norm() * lower.norm())
    assert float(backward) < 1e-12


def test_bad_input_names_the_argument() -> None:
    packed, rows = pack_factor(factor(20)), right_hand_sides(4, 20)
    for bad, message in [
        (lambda: packed_solve(packed, rows.int()), "rows must be float"),
        (lambda: packed_solve(packed, rows[0]), "rows must be float"),
        (lambda: packed_solve(packed[1:], rows), r"packed must be \[..., 400\] float64 for rows of width 20"),
        (lambda: packed_solve(packed.float(), rows), "packed must be .* got torch.float32"),
        (lambda: packed_solve(packed.expand(2, -1), rows), "packed must have the batch shape of rows"),
        (lambda: packed_solve(packed.to("meta"), rows), "packed must be on rows' device"),
        (lambda: unpack_factor(packed, 19), "packed must be"),
        (lambda: pack_factor(torch.zeros(3, 4).double()), "lower must be"),
        (lambda: pack_factor(torch.eye(4)), "lower must be .* float64, got torch.float32"),
        (lambda: pack_factor(torch.zeros(4, 4).double()), "finite diagonal without zeros"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_opcheck_and_explain(native_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, rows = pack_factor(factor(20)), right_hand_sides(4, 20)
    torch.library.opcheck(_op, (packed, rows, False))
    torch.library.opcheck(_op, (packed, rows.float(), True))
    assert [row.name for row in fastedit.explain("packed_solve", packed, rows, transposed=True)] == [
        "cpu",
        "eager",
    ]
    many = fastedit.explain("packed_solve", packed, right_hand_sides(300, 20), transposed=True)
    assert [row.chosen for row in many] == [False, True] and "BLAS" in many[0].reason
    monkeypatch.setenv("FASTEDIT_ISA", "sse9")
    with fastedit.backend("cpu"), pytest.raises(ValueError, match="FASTEDIT_ISA must be one of scalar"):
        packed_solve(packed, rows)
