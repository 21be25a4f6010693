"""nearest_key and topk_keys: every implementation against float64, ties, NaN, empty lists, ugly shapes, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from reference.nearest_key import nearest_key as reference
from reference.nearest_key import topk_keys as reference_topk
from torch import Tensor

import fastedit
from fastedit.ops import _dispatch, topk_keys
from fastedit.ops import nearest_key as module
from fastedit.ops.nearest_key import _op, _op_topk, nearest_key

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1, 1), (3, 2, 5), (1, 63, 63), (5, 1000, 17), (2, 70, 1000), (33, 130, 24), (9, 40, 16)]


def implementations(op: str) -> list[str]:
    return ["eager", *(impl.name for impl in _dispatch._OPS[op].impls if impl.device == "cpu")]


@contextmanager
def forced(backend: str, op: str) -> Iterator[None]:
    if backend not in implementations(op):
        pytest.skip(f"{op} has no implementation {backend}")
    with fastedit.backend(backend):
        yield


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs take several chunks, and end in a partial one."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 200)


@pytest.fixture
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN, or a number no result may have, until it is written."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(torch.nan if out.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: self.new_zeros(*a, **k).fill_(99))


def problem(B: int, N: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries near some keys; radii that some are within."""
    generator = torch.Generator().manual_seed(seed + 7 * B + N + d)
    keys = torch.randn(N, d, generator=generator, dtype=torch.float64)
    near = keys[torch.randint(0, N, (B,), generator=generator)]
    q = near + 0.3 * torch.randn(B, d, generator=generator, dtype=torch.float64)
    eps = 0.6 * d**0.5 * torch.rand(N, generator=generator, dtype=torch.float64)
    return q.to(dtype), keys.to(dtype), eps.float()


def check(q: Tensor, keys: Tensor, eps: Tensor) -> None:
    found = nearest_key(q, keys, eps)
    exact = (q.double()[:, None] - keys.double()).square().sum(-1).sqrt()
    distance, index = exact.sort(dim=1, stable=True)
    wide = torch.float64 in (q.dtype, keys.dtype)
    rtol = 1e-14 if wide else 2e-6
    assert found.key.dtype == torch.int64 and found.hit.dtype == torch.bool
    assert found.distance.dtype == found.second.dtype == (torch.float64 if wide else torch.float32)
    # A rival that rounding cannot tell apart may win.
    chosen = exact.gather(1, found.key[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance[:, 0], rtol=rtol, atol=0)
    clear = distance[:, 1:2] > distance[:, :1] * (1 + rtol) if keys.shape[0] > 1 else index[:, :1] >= 0
    assert found.key[clear[:, 0]].equal(index[:, 0][clear[:, 0]])
    torch.testing.assert_close(found.distance.double(), distance[:, 0], rtol=rtol, atol=0)
    if keys.shape[0] > 1:
        torch.testing.assert_close(found.second.double(), distance[:, 1], rtol=rtol, atol=0)
    else:
        assert found.second.isinf().all()
    assert found.hit.equal(found.distance <= eps[found.key])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager(_poison: None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        with fastedit.backend("eager"):
            check(*problem(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_cpu(cpu_level: str, _poison: None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        with forced("cpu", "nearest_key"):
            check(*problem(*shape, dtype))
            q, keys, eps = problem(*shape, dtype)
            check(q.float(), keys, eps), check(q.bfloat16(), keys.float(), eps)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_equals_cdist(backend: str) -> None:
    q, keys, eps = problem(20, 25, 8, torch.float32)  # so few that cdist takes differences as well
    with forced(backend, "nearest_key"):
        found = nearest_key(q, keys, eps)
    for ours, theirs in zip(found, reference(q, keys, eps)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_no_cancellation(backend: str) -> None:
    """Keys of norm 3000 with differences of 1e-2: the expanded square has no digit left."""
    generator = torch.Generator().manual_seed(0)
    base = 100 * torch.randn(1, 768, generator=generator)
    for B in (1, 40):
        keys = base + 1e-2 * torch.randn(300, 768, generator=generator)
        q = base + 1e-2 * torch.randn(B, 768, generator=generator)
        with forced(backend, "nearest_key"):
            check(q, keys, torch.full((300,), 0.3))


def test_ties_take_the_lowest_index(cpu_level: str) -> None:
    ties("eager"), ties("cpu")


def ties(backend: str) -> None:
    for N in (2, 50, 333):
        for B in (1, 30):
            keys = torch.randn(7, 40)[torch.arange(N) % 7]
            q = keys[:7][torch.arange(B) % min(N, 7)] + 1e-3
            with forced(backend, "nearest_key"):
                found = nearest_key(q, keys, torch.ones(N))
            assert found.key.equal(torch.arange(B) % min(N, 7))
            if N > 7:
                assert found.key.lt(7).all()
                assert (found.second == found.distance).eq(found.key + 7 < N).all()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_pair_has_one_distance(backend: str) -> None:
    """A radius set to a distance is hit again, wherever the key lies and however many there are."""
    q, keys, _ = problem(40, 100, 77, torch.float32)
    with forced(backend, "nearest_key"):
        whole = nearest_key(q, keys, 1.0)
        for b in (0, 7, 39):
            key = keys[whole.key[b]]
            alone = nearest_key(q[b : b + 1], key[None], whole.distance[b : b + 1])
            assert alone.hit.all() and alone.distance.equal(whole.distance[b : b + 1])
            below = nearest_key(q[b : b + 1], key[None], whole.distance[b : b + 1].nextafter(torch.zeros(1)))
            assert not below.hit.any()
            odd = torch.zeros(78)[1:].copy_(q[b])
            assert nearest_key(odd[None], keys[13:], 0.0).distance.ge(whole.distance[b]).all()
            assert nearest_key(odd[None], keys, 0.0).distance.equal(whole.distance[b : b + 1])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("B", [1, 20])
def test_nan_and_infinity(backend: str, B: int) -> None:
    q, keys, eps = problem(B, 30, 19, torch.float32)
    expected = nearest_key(q, keys[10:], eps[10:])
    spoilt = keys.clone()
    spoilt[:4, 3], spoilt[4:7, 5], spoilt[7:10, 2] = torch.nan, torch.inf, -torch.inf
    with forced(backend, "nearest_key"):
        found = nearest_key(q, spoilt, torch.full((30,), torch.inf))
        assert found.hit.all() and found.key.equal(expected.key + 10)
        torch.testing.assert_close(found.second, expected.second)
        for bad in (torch.nan, torch.inf):
            q[0, 7] = bad
            found = nearest_key(q, keys, torch.full((30,), torch.inf))
            assert found.key[0] == -1 and found.distance[0].isinf() and not found.hit[0]
            assert found.second[0].isinf() and (found.key[1:] >= 0).all() and found.hit[1:].all()
        assert not nearest_key(q, keys, torch.nan).hit.any()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_empty(backend: str) -> None:
    with forced(backend, "nearest_key"):
        found = nearest_key(torch.randn(3, 8), torch.empty(0, 8), torch.empty(0))
        assert found.key.eq(-1).all() and found.distance.isinf().all() and not found.hit.any()
        assert nearest_key(torch.empty(0, 8), torch.randn(5, 8), 1.0).key.shape == (0,)
        found = nearest_key(torch.empty(2, 0), torch.empty(3, 0), 0.0)
        assert found.key.eq(0).all() and found.distance.eq(0).all() and found.hit.all()
        scores, index = topk_keys(torch.empty(0, 8), torch.randn(5, 8), 2)
        assert scores.shape == index.shape == (0, 2)
        scores, index = topk_keys(torch.empty(2, 0), torch.empty(3, 0), 2, cosine=True)
        assert scores.eq(0).all() and index.equal(torch.tensor([[0, 1], [0, 1]]))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    q, keys, eps = problem(3, 50, 21, dtype)
    expected, best = nearest_key(q, keys, eps), topk_keys(q, keys, 4)
    columns = keys.T.contiguous().T
    wide = torch.full((100, 50), torch.nan, dtype=dtype)
    wide[::2, 1:43:2] = keys
    odd = torch.full((50 * 21 + 1,), torch.nan, dtype=dtype)[1:].view(50, 21).copy_(keys)
    turned = torch.empty(21, 3, dtype=dtype).T.copy_(q)
    radii = torch.zeros(100)[::2].copy_(eps)
    for view in (columns, wide[::2, 1:43:2], odd, keys.clone().requires_grad_()):
        with forced(backend, "nearest_key"):
            for ours, theirs in zip(nearest_key(turned, view, radii), expected):
                torch.testing.assert_close(ours, theirs)
        with forced(backend, "topk_keys"):
            for ours, theirs in zip(topk_keys(turned, view, 4), best):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cosine", [False, True])
def test_topk_eager(_poison: None, dtype: torch.dtype, cosine: bool) -> None:
    for shape in SHAPES:
        with fastedit.backend("eager"):
            check_topk(*problem(*shape, dtype)[:2], cosine)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_topk_cpu(cpu_level: str, _poison: None, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        q, keys, _ = problem(*shape, dtype)
        with forced("cpu", "topk_keys"):
            check_topk(q, keys, False), check_topk(q, keys, True), check_topk(q.float(), keys, False)


def check_topk(q: Tensor, keys: Tensor, cosine: bool) -> None:
    N = keys.shape[0]
    wide = torch.float64 in (q.dtype, keys.dtype)
    tolerance = 1e-13 if wide else 1e-5
    exact = q.double() @ keys.double().T
    size = q.double().norm(dim=1)[:, None] * keys.double().norm(dim=1)
    exact = exact / size if cosine else exact
    slack = torch.ones_like(size) if cosine else size
    for k in sorted({1, min(5, N), N}):
        scores, index = topk_keys(q, keys, k, cosine=cosine)
        assert scores.dtype == (torch.float64 if wide else torch.float32)
        theirs, _ = reference_topk(q.double(), keys.double(), k, cosine=cosine)
        atol = float(tolerance * slack.max())
        torch.testing.assert_close(scores.double(), theirs, rtol=0, atol=atol)
        torch.testing.assert_close(exact.gather(1, index), scores.double(), rtol=0, atol=atol)
        assert all(len(set(row)) == k for row in index.tolist())
        assert scores.diff(dim=1).le(0).all()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_topk_ties_nan_and_zero_vectors(backend: str) -> None:
    keys = torch.tensor([[0.0, 1], [2, 0], [torch.nan, 0], [2, 0], [0, 0], [2, 5], [1, 0]])
    with forced(backend, "topk_keys"):
        scores, index = topk_keys(torch.tensor([[1.0, 0]]), keys, 7)
        assert index.tolist() == [[1, 3, 5, 6, 0, 4, 2]]
        assert scores[0, :-1].tolist() == [2, 2, 2, 1, 0, 0] and scores[0, -1] == -torch.inf
        for k in range(1, 7):
            few = topk_keys(torch.tensor([[1.0, 0]]), keys, k)
            assert few[0].equal(scores[:, :k]) and few[1].equal(index[:, :k])
        scores, index = topk_keys(torch.tensor([[3.0, 0], [0, 0]]), keys, 4, cosine=True)
        assert index.tolist() == [[1, 3, 6, 5], [0, 1, 3, 4]]
        assert scores[1].eq(0).all() and scores[0, :3].eq(1).all()


def test_threads_give_the_same_bits(native_cpu: None) -> None:
    q, keys, eps = problem(11, 3000, 50, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with forced("cpu", "nearest_key"):
                results.append((*nearest_key(q, keys, eps), *nearest_key(q[:1], keys, eps)))
            if "cpu" in implementations("topk_keys"):
                with fastedit.backend("cpu"):
                    results[-1] += topk_keys(q, keys, 9)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(one.equal(two) for one, two in zip(results[0], other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4)}, r"q must be float of shape \[B, d\], got torch.float32 \[4\]"),
        ({"q": torch.zeros(2, 4).int()}, "q must be float of shape"),
        ({"keys": torch.zeros(3, 5)}, r"keys must be float of shape \[N, 4\], got torch.float32 \[3, 5\]"),
        ({"keys": torch.zeros(3, 4).long()}, "keys must be float of shape"),
        ({"eps": torch.zeros(2)}, r"eps must be float of shape \[3\], got torch.float32 \[2\]"),
        ({"eps": torch.zeros(3).int()}, "eps must be float of shape"),
        ({"keys": torch.zeros(3, 4, device="meta")}, "keys must be on q's device cpu, got meta"),
        ({"eps": torch.zeros(3, device="meta")}, "eps must be on q's device cpu, got meta"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Tensor], message: str) -> None:
    arguments = {"q": torch.zeros(2, 4), "keys": torch.zeros(3, 4), "eps": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        nearest_key(**arguments)


def test_bad_k() -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], the number of keys, got {k}"):
            topk_keys(torch.zeros(2, 4), torch.zeros(3, 4), k)


def test_opcheck_and_compile() -> None:
    q, keys, eps = problem(3, 20, 8, torch.float32)
    torch.library.opcheck(_op, (q, keys, eps))
    torch.library.opcheck(_op, (q, keys.bfloat16(), eps.double()))
    torch.library.opcheck(_op_topk, (q, keys, 3, True))
    compiled = torch.compile(
        lambda a, b: (nearest_key(a, b, eps).distance, topk_keys(a, b, 2)[1]),
        fullgraph=True,
        backend="aot_eager",
    )
    distance, index = compiled(q, keys)
    assert distance.equal(nearest_key(q, keys, eps).distance) and index.equal(topk_keys(q, keys, 2)[1])
    assert fastedit.explain("nearest_key", q, keys, 1.0) and fastedit.explain("topk_keys", q, keys, 2)
