"""kth_magnitude and magnitude_mask_: exact against a sort, with ties, NaN, denormals, ugly shapes and bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.kth_magnitude import kth_magnitude as reference
from reference.kth_magnitude import magnitude_mask_ as reference_mask
from torch import Tensor

import fastedit
from fastedit.ops import _dispatch, magnitude_mask_
from fastedit.ops.kth_magnitude import _op, _op_mask, kth_magnitude

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SIZES = [1, 2, 63, 1000, 70_001]


@contextmanager
def forced(backend: str) -> Iterator[None]:
    have = {impl.name for op in ("kth_magnitude", "magnitude_mask_") for impl in _dispatch._OPS[op].impls}
    if backend not in {"eager", *have}:
        pytest.skip(f"kth_magnitude has no implementation {backend}")
    with fastedit.backend(backend):
        yield


def data(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "scales":  # from denormals to near infinity, with zeros of both signs
        x = x.sign() * torch.exp(20 * x)
        x[::7] = 0.0
        x[::14] = -0.0
    elif kind == "few":  # many ties
        x = (2 * x).round()
    elif kind == "same":
        x = torch.full((n,), -1.5, dtype=torch.float64)
    elif kind == "sorted":  # what samples at even distances tell least about
        x = x.abs().sort().values
    elif kind == "outlier":
        x = 1 + 1e-3 * x
        x[n // 2] = 1e4
    elif kind == "nan":
        x[::5], x[1::9], x[2::11] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


KINDS = ["normal", "scales", "few", "same", "sorted", "outlier", "nan"]


def ranks(n: int) -> list[int]:
    return sorted({1, 2, n // 5, n // 2, round(0.4 * n), n - 1, n} & set(range(1, n + 1)))


def check(kind: str, n: int, dtype: torch.dtype) -> None:
    x = data(kind, n, dtype)
    order = x.abs().sort(descending=True).values  # NaN first, as in topk
    for k in ranks(n):
        found = kth_magnitude(x, k)
        assert found.shape == () and found.dtype == dtype
        torch.testing.assert_close(found, order[k - 1], rtol=0, atol=0, equal_nan=True)
        least = kth_magnitude(x, k, largest=False)
        torch.testing.assert_close(least, order[n - k], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found, reference(x, k), rtol=0, atol=0, equal_nan=True)


def check_mask(kind: str, n: int, dtype: torch.dtype) -> None:
    score = data(kind, n, dtype)
    size = score.abs()
    size = torch.where(size.isnan(), torch.inf, size.double())
    # NaN above infinity, then the lowest index first.
    order = sorted(range(n), key=lambda i: (not score[i].isnan(), -float(size[i]), i))
    for k in (0, *ranks(n)):
        kept = torch.zeros(n, dtype=torch.bool)
        kept[order[:k]] = True
        every = kept.clone()
        if k:
            last = order[k - 1]
            every |= score.isnan() if score[last].isnan() else (size == size[last]) & ~score.isnan()
        for x in (score, torch.randn(n).to(torch.bfloat16), torch.randn(n)):
            for ties, wanted in (("first", kept), ("all", every)):
                found = x.clone()
                magnitude_mask_(found, k, score=None if x is score else score, ties=ties)
                assert (
                    found[wanted].view(BITS[x.element_size()]).equal(x[wanted].view(BITS[x.element_size()]))
                )
                assert found[~wanted].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_eager(kind: str, dtype: torch.dtype) -> None:
    with forced("eager"):
        for n in SIZES:
            check(kind, n, dtype)
        for n in SIZES[:4]:
            check_mask(kind, n, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu(cpu_level: str, dtype: torch.dtype) -> None:
    with forced("cpu"):
        for kind in KINDS:
            for n in SIZES:
                check(kind, n, dtype)
            for n in SIZES[:4]:
                check_mask(kind, n, dtype)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@settings(deadline=None, max_examples=60)
@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=80), share=st.floats(0, 1))
def test_any_bits(backend: str, bits: list[int], share: float) -> None:
    """Every pattern, NaN of any payload among them: the order is that of torch.topk."""
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    k = 1 + int(share * (len(bits) - 1))
    with forced(backend):
        found = kth_magnitude(x, k)
        masked = x.clone()
        magnitude_mask_(masked, k)
    torch.testing.assert_close(found, x.abs().topk(k).values[-1], rtol=0, atol=0, equal_nan=True)
    gone = masked.view(torch.int32) != x.view(torch.int32)
    kept_nan = int(masked.isnan().sum())
    assert int(gone.sum()) <= len(bits) - k and kept_nan == min(k, int(x.isnan().sum()))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_every_half(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        order = x.abs().sort(descending=True).values
        with forced(backend):
            for k in (1, 100, 2000, 4097, 30_000, 65_535, 65_536):
                torch.testing.assert_close(kth_magnitude(x, k), order[k - 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_mask_equals_topk_where_nothing_ties(backend: str) -> None:
    x, score = torch.randn(50, 70), torch.randperm(3500).view(50, 70) - 1700.5
    for k in (0, 1, 1400, 3500):
        ours, theirs = x.clone(), x.clone()
        with forced(backend):
            magnitude_mask_(ours, k, score=score**3)
        reference_mask(theirs, k, score=score)
        assert ours.equal(theirs)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(40, 56)).round().to(dtype)
    expected, k = x.clone(), 700
    magnitude_mask_(expected, k)
    wide = torch.full((80, 100), 1000.0, dtype=dtype)
    odd = torch.full((40 * 56 + 1,), 1000.0, dtype=dtype)
    views = {
        "strided": wide[::2, 13:69],
        "column major": torch.empty(56, 40, dtype=dtype).T,
        "misaligned": odd[1:].view(40, 56),
    }
    for view in views.values():
        view.copy_(x)
        with forced(backend):
            assert kth_magnitude(view, k).equal(kth_magnitude(x, k))
            for score in (view.clone(), torch.empty(56, 40, dtype=dtype).T.copy_(view), None):
                view.copy_(x)
                magnitude_mask_(view, k, score=score)
                assert view.equal(expected)
    assert wide[1::2].eq(1000).all() and wide[:, :13].eq(1000).all() and wide[:, 69:].eq(1000).all()
    assert odd[0] == 1000
    with forced(backend):
        y, row = torch.ones(3, 4), torch.tensor([1.0, 5, 2, 5])
        magnitude_mask_(y, 4, score=row.expand(3, 4))
        assert y.equal(torch.tensor([[0.0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]))
        assert kth_magnitude(row.expand(3, 4), 6) == 5 and kth_magnitude(row.expand(3, 4), 7) == 2


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_parameters_scalars_and_nothing(backend: str) -> None:
    with forced(backend):
        weight = torch.nn.Parameter(torch.tensor([3.0, -4, 1]))
        assert not kth_magnitude(weight, 1).requires_grad and kth_magnitude(weight, 1) == 4
        magnitude_mask_(weight, 1)
        assert weight.requires_grad and weight.tolist() == [0, -4, 0]
        scalar = torch.tensor(-2.0)
        assert kth_magnitude(scalar, 1) == 2
        magnitude_mask_(scalar, 1)
        assert scalar == -2
        magnitude_mask_(torch.empty(0, 3), 0)
        same = torch.tensor([1.0, -3])
        magnitude_mask_(same, 1, score=same)
        assert same.tolist() == [0, -3]


def test_threads_give_the_same_bits(native_cpu: None) -> None:
    x = (1000 * torch.randn(300_000)).round()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            masked = x.clone()
            with forced("cpu"):
                magnitude_mask_(masked, 100_000)
                results.append((kth_magnitude(x, 100_000), masked))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(one.equal(two) for one, two in zip(results[0], other))


def test_bad_input_names_the_argument() -> None:
    x = torch.zeros(2, 3)
    for k in (0, 7):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 6\], the number of entries of x, got {k}"):
            kth_magnitude(x, k)
    for k in (-1, 7):
        with pytest.raises(ValueError, match=rf"k must be in \[0, 6\], the number of entries of x, got {k}"):
            magnitude_mask_(x, k)
    for k in (2.0, True, None):
        for call in (kth_magnitude, magnitude_mask_):
            with pytest.raises(ValueError, match=f"k must be an integer, got {k}"):
                call(x, k)  # type: ignore[operator]
    with pytest.raises(ValueError, match="x must be a tensor, got list"):
        kth_magnitude([1, 2], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be float64, float32, bfloat16 or float16, got torch.int64"):
        kth_magnitude(x.long(), 1)
    with pytest.raises(ValueError, match="score must be float64, .* got torch.int32"):
        magnitude_mask_(x, 1, score=x.int())
    with pytest.raises(ValueError, match=r"score must have x's shape \[2, 3\], got \[3, 2\]"):
        magnitude_mask_(x, 1, score=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="score must be on x's device cpu, got meta"):
        magnitude_mask_(x, 1, score=torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match="ties must be 'first' or 'all', got 'last'"):
        magnitude_mask_(x, 1, ties="last")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_score_in_the_memory_of_x_counts_as_it_was(backend: str) -> None:
    for shift in (1, 5):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(shift))
        for target, score in (
            (slice(shift, None), slice(None, -shift)),
            (slice(None, -shift), slice(shift, None)),
        ):
            found, expected = x.clone(), x[target].clone()
            with forced(backend):
                magnitude_mask_(expected, 300, score=x[score].clone())
                magnitude_mask_(found[target], 300, score=found[score])
            assert found[target].equal(expected)
    with pytest.raises(ValueError, match="x must not overlap itself"):
        magnitude_mask_(torch.zeros(3).expand(2, 3), 1)


def test_opcheck_and_compile() -> None:
    x = torch.randn(6, 7)
    torch.library.opcheck(_op, (x, 5))
    torch.library.opcheck(_op_mask, (x.clone(), None, 5, False))
    torch.library.opcheck(_op_mask, (x.clone(), x.bfloat16(), 5, True))

    def masked(y: Tensor) -> Tensor:
        y = y.clone()
        magnitude_mask_(y, 9)
        return y / kth_magnitude(y, 3)

    assert torch.compile(masked, fullgraph=True, backend="aot_eager")(x).equal(masked(x))
    assert fastedit.explain("kth_magnitude", x, 3, largest=False)
    assert fastedit.explain("magnitude_mask_", x, 3, score=x, ties="all")
