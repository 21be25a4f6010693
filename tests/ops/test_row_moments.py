"""row_moments_: the published editors' own loops and float64 are the truth; batches, masks, merging, bad input."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.row_moments import malmen_normaliser, welford_
from torch import Tensor

import fastedit
from fastedit.ops import RowMoments, row_moments_
from fastedit.ops.row_moments import _op

STATES = [torch.float64, torch.float32]
ROWS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = 1.1920929e-07


def rows(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Rows whose columns differ in scale and have means of several deviations."""
    generator = torch.Generator().manual_seed(seed + 1000 * n + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    spread = 10.0 ** torch.empty(d).uniform_(-3, 1, generator=generator).double()
    return ((x + 3 * torch.randn(d, generator=generator, dtype=torch.float64)) * spread).to(dtype)


def backends() -> list[str]:
    return ["eager", "cpu"] if importlib.util.find_spec("fastedit._cpu") else ["eager"]


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.mean(0), (x - x.mean(0)).square().sum(0)


def close(state: RowMoments, count: int, mean: Tensor, m2: Tensor, tolerance: float) -> None:
    assert int(state.count) == count
    scale = (m2 / max(count, 1)).sqrt() + mean.abs()
    assert float(((state.mean.double() - mean).abs() - tolerance * scale).max()) <= 0
    torch.testing.assert_close(state.m2.double(), m2, rtol=20 * tolerance, atol=0)


@pytest.mark.parametrize("dtype", ROWS, ids=str)
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 63), (63, 17), (1000, 40), (5, 1000), (300, 1)])
def test_one_batch(implementation: str, n: int, d: int, state_dtype: torch.dtype, dtype: torch.dtype) -> None:
    state, x = RowMoments.zeros(d, dtype=state_dtype), rows(n, d, dtype)
    with fastedit.backend(implementation):
        trail = row_moments_(state, x)
    close(state, n, *exact(x), 1e-13 if state_dtype == torch.float64 else 1e-6)
    for kept, now in zip((trail.count, trail.mean, trail.m2), (state.count, state.mean, state.m2)):
        assert kept.shape == (1, *now.shape) and torch.equal(kept[0], now)


def test_equals_mends_loop(implementation: str) -> None:
    """Three modules after one another, each with a trail state that has seen itself and those before it."""
    for state_dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        state, x, sizes = RowMoments.zeros(41, dtype=state_dtype), rows(30, 41, state_dtype), [12, 1, 17]
        count, mean, m2 = 0, torch.zeros(41, dtype=state_dtype), torch.zeros(41, dtype=state_dtype)
        with fastedit.backend(implementation):
            trail = row_moments_(state, x[:, :29], x[:, 29:], batches=sizes)
        for index, part in enumerate(x.split(sizes)):
            count = welford_(count, mean, m2, part)
            found = RowMoments(trail.count[index], trail.mean[index], trail.m2[index])
            close(found, count, mean.double(), m2.double(), tolerance)
            torch.testing.assert_close(
                found.std(), (m2 / (count - 1)).sqrt(), rtol=20 * tolerance, atol=0, check_dtype=True
            )
        assert torch.equal(trail.m2[2], state.m2) and int(state.count) == 30


def test_equals_malmens_normaliser(implementation: str) -> None:
    state, sizes = RowMoments.zeros(23), [2, 5, 30, 4]
    x = rows(41, 23)
    count, mean, m2 = 0, torch.zeros(23).double(), torch.zeros(23).double()
    with fastedit.backend(implementation):
        row_moments_(state, x, batches=sizes, inflated=True)
    for part in x.split(sizes):
        count, mean, m2 = malmen_normaliser(count, mean, m2, part)
    close(state, count, mean, m2, 1e-12)
    torch.testing.assert_close(state.std(EPS), torch.sqrt(m2 / (count - 1 + EPS)))
    assert (state.std(EPS) > x.std(0)).all()  # what the rule is named for


def test_a_single_row_is_no_nan(implementation: str) -> None:
    """The published normaliser is NaN for ever after a batch of one row; here its variance counts as 0."""
    state, x = RowMoments.zeros(5), rows(4, 5)
    with fastedit.backend(implementation):
        row_moments_(state, x[:1], inflated=True)
        assert torch.equal(state.mean, x[0]) and state.m2.eq(0).all()
        row_moments_(state, x[1:2], inflated=True)
    close(state, 2, *exact(x[:2]), 1e-13)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    d=st.sampled_from([1, 7, 33]),
    sizes=st.lists(st.integers(0, 9), min_size=0, max_size=5),
    masked=st.booleans(),
    split=st.booleans(),
)
def test_batches_masks_and_order(seed: int, d: int, sizes: list[int], masked: bool, split: bool) -> None:
    n = sum(sizes)
    x = rows(n, d, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, generator=generator) > 0.4 if masked else None
    kept = x if mask is None else x[mask]
    poisoned = x.clone()
    if mask is not None:
        poisoned[~mask] = float("nan")
    cut = d // 2
    parts = (poisoned[:, :cut], poisoned[:, cut:]) if split else (poisoned,)
    for name in backends():
        with fastedit.backend(name):
            state, turned = RowMoments.zeros(d), RowMoments.zeros(d)
            row_moments_(state, *parts, mask=mask, batches=sizes)
            row_moments_(turned, kept.flip(0))
        if len(kept):
            for found in (state, turned):
                close(found, len(kept), *exact(kept), 1e-11)
        else:
            assert int(state.count) == 0 and state.m2.eq(0).all()


def test_nothing_to_add(implementation: str) -> None:
    state = RowMoments.zeros(4)
    with fastedit.backend(implementation):
        row_moments_(state, rows(6, 4))
        before = [t.clone() for t in (state.count, state.mean, state.m2)]
        for inflated in (False, True):
            row_moments_(state, torch.empty(0, 4), inflated=inflated)
            row_moments_(state, torch.empty(0, 4), batches=[], inflated=inflated)
            row_moments_(
                state, torch.full((3, 4), float("nan")), mask=torch.zeros(3).bool(), inflated=inflated
            )
        for old, new in zip(before, (state.count, state.mean, state.m2)):
            assert torch.equal(old, new)
        empty = row_moments_(RowMoments.zeros(0), torch.empty(5, 0))
    assert empty.count.tolist() == [5] and empty.mean.shape == (1, 0)


def test_an_unused_state_may_hold_anything(implementation: str) -> None:
    nan = torch.full((6,), float("nan")).double()
    state, x = RowMoments(torch.tensor(0), nan.clone(), nan.clone()), rows(3, 6)
    with fastedit.backend(implementation):
        row_moments_(state, x)
    close(state, 3, *exact(x), 1e-13)


def test_a_far_mean_keeps_its_variance(implementation: str) -> None:
    """Deviations of 1 around 10^6, in bits that a sum of squares would lose in float64 and any sum in float32."""
    x = torch.randn(500, 9, generator=torch.Generator().manual_seed(2)).double() + 1e6
    state = RowMoments.zeros(9)
    with fastedit.backend(implementation):
        row_moments_(state, x, batches=[1, 99, 400])
    torch.testing.assert_close(state.m2, exact(x)[1], rtol=1e-9, atol=0)


def test_strides_alignment_and_gradients(implementation: str) -> None:
    x = rows(20, 11, torch.float32)
    expected, wide, odd = RowMoments.zeros(11), torch.zeros(40, 25), torch.zeros(221)
    row_moments_(expected, x)
    views = [
        wide[::2, 1:23:2],
        torch.zeros(11, 20).T,
        odd[1:].view(20, 11),
        torch.zeros(20, 30)[:, 3:14],
        torch.nn.Parameter(torch.zeros(20, 11)),
    ]
    for view in views:
        with torch.no_grad():
            view.copy_(x)
        state = RowMoments.zeros(11)
        buffer = torch.zeros(22).double()
        strided = RowMoments(state.count, buffer[::2], buffer[1::2])
        with fastedit.backend(implementation):
            trail = row_moments_(strided, view)
        close(strided, 20, expected.mean, expected.m2, 1e-13)
        assert not trail.mean.requires_grad
    with fastedit.backend(implementation):
        repeated = RowMoments.zeros(11)
        row_moments_(repeated, x[:1].expand(7, 11))
    assert int(repeated.count) == 7 and float(repeated.m2.abs().max()) < 1e-12


def test_many_rows_and_threads(native_cpu: None) -> None:
    """More rows than are summed in one go, more columns than one task; the same bits on any number of threads."""
    x = rows(1000, 300, torch.bfloat16)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = RowMoments.zeros(300)
            with fastedit.backend("cpu"):
                row_moments_(state, x[:, :170], x[:, 170:], batches=[600, 400])
            results.append(state)
    finally:
        torch.set_num_threads(before)
    close(results[0], 1000, *exact(x), 1e-13)
    for other in results[1:]:
        assert torch.equal(results[0].mean, other.mean) and torch.equal(results[0].m2, other.m2)


def test_merging_states() -> None:
    x = rows(50, 8)
    whole, first, second = (RowMoments.zeros(8) for _ in range(3))
    row_moments_(whole, x), row_moments_(first, x[:13]), row_moments_(second, x[13:])
    first.merge_(second)
    close(first, 50, whole.mean, whole.m2, 1e-13)
    first.merge_(RowMoments.zeros(8))
    close(first, 50, whole.mean, whole.m2, 1e-13)
    empty = RowMoments.zeros(8, dtype=torch.float32)
    empty.merge_(whole)
    close(empty, 50, whole.mean, whole.m2, 1e-6)
    with pytest.raises(ValueError, match="other must be one state of width 8"):
        first.merge_(RowMoments.zeros(9))


def test_std_of_few_rows() -> None:
    state = RowMoments.zeros(3)
    assert state.std().isnan().all() or state.std().eq(0).all()
    row_moments_(state, torch.ones(1, 3))
    assert state.std().isnan().all() and state.std(EPS).eq(0).all()


SHARED = torch.zeros(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.zeros(3, 4).int()}, "X must be a float matrix, got torch.int32"),
        ({"X": torch.zeros(4)}, "X must be a float matrix"),
        ({"D": torch.zeros(2, 2)}, "D must have X's 3 rows, got 2"),
        ({"D": torch.zeros(3)}, "D must be a float matrix"),
        ({"D": torch.zeros(3, 1)}, "state must have the width 5 of the rows, got 6"),
        ({"mask": torch.ones(2).bool()}, r"mask must be bool of shape \[3\], got torch.bool \[2\]"),
        ({"mask": torch.ones(3)}, r"mask must be bool of shape \[3\], got torch.float32"),
        ({"mask": [True] * 3}, "mask must be a tensor, got list"),
        ({"X": [[0.0] * 4] * 3}, "X must be a tensor, got list"),
        ({"batches": [1, 1]}, r"batches must be >= 0 and sum to X's 3 rows, got \[1, 1\]"),
        ({"batches": [4, -1]}, r"batches must be >= 0 and sum to X's 3 rows"),
        ({"X": torch.zeros(3, 4, device="meta")}, "X must be on the state's device cpu, got meta"),
        (
            {"state": RowMoments(torch.tensor(0), torch.zeros(6).half(), torch.zeros(6).half())},
            "state.mean must be float64 or float32",
        ),
        (
            {"state": RowMoments(torch.tensor(0), torch.zeros(6), torch.zeros(6).double())},
            "state.m2 must be torch.float32",
        ),
        (
            {"state": RowMoments(torch.tensor(0), torch.zeros(1).expand(6), torch.zeros(6))},
            "state.mean must not overlap itself",
        ),
        (
            {"state": RowMoments(torch.tensor(0), SHARED, SHARED)},
            "state.m2 must not share memory with state.mean",
        ),
        (
            {"state": RowMoments(torch.tensor(0.0), torch.zeros(6), torch.zeros(6))},
            "state.count must be int64",
        ),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    given = {"state": RowMoments.zeros(6), "X": torch.zeros(3, 4), "D": torch.zeros(3, 2), **change}
    state, x, d = given.pop("state"), given.pop("X"), given.pop("D")
    with pytest.raises(ValueError, match=message):
        row_moments_(state, x, d, **given)


def test_opcheck() -> None:
    state, x = RowMoments.zeros(6), rows(5, 6)
    tensors = (state.count, state.mean, state.m2)
    torch.library.opcheck(_op, (*tensors, x, None, None, [5], False))
    mask = torch.tensor([True, True, False, True, True])
    torch.library.opcheck(_op, (*tensors, x[:, :2], x[:, 2:], mask, [2, 3], True))
