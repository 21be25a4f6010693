"""second_moment_: every implementation against fp64, ugly shapes, masks, poison, bad input."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from reference.second_moment import second_moment_ as reference
from torch import Tensor

import fastedit
from fastedit.ops import mirror_, second_moment_
from fastedit.ops.second_moment import Precision, _list_op, _op

# Relative Frobenius error against fp64 on the same keys. bf16 and fp16 products are exact, so only sums round: torch
# sums a whole flush in one chain when d is 1, the compiled kernel never more than 128 terms.
TOLERANCE = {"eager": 2e-6, "cpu": 3e-7, "gpu": 5e-6}
# Two bf16 planes hold a fp32 key to 2^-18, so no product of two keys is off by more than this.
TWO_PLANES = 2.0**-17
FLOAT64 = 1e-14
KEYS = [torch.float32, torch.bfloat16, torch.float16]
MASTERS = [torch.float64, torch.float32]
SHAPES = [(T, d) for T in (0, 1, 63, 1000) for d in (1, 8, 63, 200)] + [(2100, 200), (130, 391)]


def problem(T: int, d: int, dtype: torch.dtype, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Keys with NaN in the masked rows, and the mask."""
    generator = torch.Generator().manual_seed(1000 * T + d)
    K = torch.randn(T, d, generator=generator).to(dtype)
    mask = torch.rand(T, generator=generator) > 0.3
    K[~mask] = float("nan")
    return K.to(device), mask.to(device)


def check(C: Tensor, K: Tensor, mask: Tensor | None, *, tolerance: float) -> None:
    """C started as ones on and below the diagonal and NaN above it."""
    d = C.shape[-1]
    expected = torch.ones(d, d, dtype=torch.float64)
    reference(expected, K.cpu(), None if mask is None else mask.cpu())
    lower = torch.ones(d, d, dtype=torch.bool).tril()
    C = C.cpu()
    assert C[~lower].isnan().all(), "the strict upper triangle was written"
    error = (C[lower].double() - expected[lower]).norm() / expected[lower].norm()
    assert error <= tolerance, f"T={K.shape[-2]} d={d}: relative error {error:.1e}"


def started(d: int, dtype: torch.dtype, *, device: str = "cpu") -> Tensor:
    C = torch.ones(d, d, dtype=dtype)
    C[torch.ones(d, d, dtype=torch.bool).triu(1)] = float("nan")
    return C.to(device)


def run_shapes(
    backend: str,
    dtype: torch.dtype,
    master: torch.dtype,
    *,
    device: str = "cpu",
    precision: Precision = "exact",
    tolerance: float | None = None,
) -> None:
    if tolerance is None:
        tolerance = FLOAT64 if dtype == master == torch.float64 else TOLERANCE[backend]
    for T, d in SHAPES:
        K, mask = problem(T, d, dtype, device=device)
        C = started(d, master, device=device)
        with fastedit.backend(backend):
            second_moment_(C, K, mask, precision=precision)
        check(C, K, mask, tolerance=tolerance)
        K = K.nan_to_num(0.5)
        C = started(d, master, device=device)
        with fastedit.backend(backend):
            second_moment_(C, K, precision=precision)
        check(C, K, None, tolerance=tolerance)


@pytest.mark.parametrize("master", MASTERS, ids=str)
@pytest.mark.parametrize("dtype", [*KEYS, torch.float64], ids=str)
def test_eager(dtype: torch.dtype, master: torch.dtype) -> None:
    run_shapes("eager", dtype, master)


@pytest.mark.parametrize("master", MASTERS, ids=str)
@pytest.mark.parametrize("dtype", KEYS, ids=str)
def test_cpu(cpu_level: str, dtype: torch.dtype, master: torch.dtype) -> None:
    run_shapes("cpu", dtype, master)


@pytest.mark.parametrize("master", MASTERS, ids=str)
def test_cpu_fp32_keys_by_default(cpu_level: str, master: torch.dtype) -> None:
    tolerance = TWO_PLANES if cpu_level == "amx" else TOLERANCE["cpu"]
    run_shapes("cpu", torch.float32, master, precision="default", tolerance=tolerance)


@pytest.mark.parametrize("dtype", KEYS, ids=str)
def test_cpu_on_several_threads_gives_the_same_bits(cpu_level: str, dtype: torch.dtype) -> None:
    K, mask = problem(1500, 391, dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            C = torch.zeros(391, 391, dtype=torch.float64)
            with fastedit.backend("cpu"):
                second_moment_(C, K, mask)
            results.append(C)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_long_sums_beat_one_fp32_product(native_cpu: None) -> None:
    # All-positive keys are the hard case: every rounding of the running sum goes the same way for longer.
    K = torch.rand(20_000, 64, generator=torch.Generator().manual_seed(0))
    exact = (K.double().T @ K.double()).tril()
    C = torch.zeros(64, 64, dtype=torch.float64)
    with fastedit.backend("cpu"):
        second_moment_(C, K)
    assert (C - exact).norm() / exact.norm() < 1e-7


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_layouts(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    wide, mask = problem(60, 300, torch.float32)
    wide = wide.nan_to_num(0.25)
    layouts = {
        "columns of a wider tensor": wide[:, 17:117],
        "every second row": wide[::2, :100],
        "every second column": wide[:, ::3],
        "transposed": wide.T[:100, :60].T,
        "one row repeated": wide[:1, :100].expand(60, 100),
        "misaligned": torch.zeros(60 * 100 + 1)[1:].view(60, 100).copy_(wide[:, :100]),
    }
    for K in layouts.values():
        C = started(K.shape[1], torch.float64)
        m = mask[: K.shape[0]]
        with fastedit.backend(backend):
            second_moment_(C, K, m, precision="exact")
        check(C, K, m, tolerance=1e-6)
    C = torch.full((100, 240), 7.0, dtype=torch.float64)
    view = C[:, 40:140]
    view.copy_(started(100, torch.float64))
    with fastedit.backend(backend):
        second_moment_(view, wide[:, :100], precision="exact")
    check(view, wide[:, :100], None, tolerance=1e-6)
    assert C[:, :40].eq(7).all() and C[:, 140:].eq(7).all()


def test_column_major_master_is_refused_by_the_kernel_and_done_by_eager(native_cpu: None) -> None:
    K, mask = problem(63, 64, torch.float32)
    C = torch.zeros(64, 64, dtype=torch.float64).T.contiguous().T
    with fastedit.backend("cpu"), pytest.raises(RuntimeError, match="C must have unit column stride, got 64"):
        second_moment_(C, K, mask)
    second_moment_(C, K, mask)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    reference(expected, K, mask)
    torch.testing.assert_close(C, expected.tril(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_batches_of_sequences_and_of_layers(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("native_cpu")
    K = torch.randn(3, 21, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    mask = torch.rand(3, 21, generator=torch.Generator().manual_seed(4)) > 0.5
    with fastedit.backend(backend):
        one = torch.zeros(40, 40, dtype=torch.float64)
        second_moment_(one, K, mask)
        flat = torch.zeros_like(one)
        second_moment_(flat, K.reshape(-1, 40), mask.reshape(-1).int())
        assert torch.equal(one, flat)
        layers = torch.zeros(3, 40, 40, dtype=torch.float64)
        second_moment_(layers, K, mask[0])
        for layer in range(3):
            alone = torch.zeros_like(one)
            second_moment_(alone, K[layer], mask[0])
            assert torch.equal(layers[layer], alone)


def test_a_sequence_of_layers(cpu_level: str) -> None:
    # Layers of their own strides; together they are more than one packing of the kernel's.
    wide = torch.randn(4, 300, 400, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(300, generator=torch.Generator().manual_seed(6)) > 0.5
    keys = [wide[0][:, :130], wide[1][:, 7:137], wide[2][:, ::3][:, :130], wide[3].T[:300, :130].contiguous()]
    sums = [torch.zeros(130, 130 + 5 * i, dtype=torch.float64)[:, :130] for i in range(4)]
    with fastedit.backend("cpu"):
        second_moment_(sums, keys, mask)
        for C, K in zip(sums, keys):
            alone = torch.zeros(130, 130, dtype=torch.float64)
            second_moment_(alone, K, mask)
            assert torch.equal(C, alone)
    before = [C.clone() for C in sums]
    with fastedit.backend("eager"):
        second_moment_(sums, keys, mask)
    for C, once in zip(sums, before):
        torch.testing.assert_close(C, 2 * once, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", KEYS, ids=str)
def test_sums_are_positive_semidefinite(cpu_level: str, dtype: torch.dtype) -> None:
    # Few tokens: most eigenvalues are 0, and rounding must not push them below what fp32 sums allow.
    K = torch.randn(60, 150, generator=torch.Generator().manual_seed(7)).to(dtype)
    C = torch.zeros(150, 150, dtype=torch.float64)
    with fastedit.backend("cpu"):
        second_moment_(C, K)
    mirror_(C)
    values = torch.linalg.eigvalsh(C)
    assert values[0] > -3e-7 * values[-1]


def test_an_update_from_fp32_keys_is_nearer_to_fp64_than_with_one_fp32_product(native_cpu: None) -> None:
    # The update of MEMIT, D = R ((mu C + K K^T)^-1 K)^T, magnifies the errors of C by its condition.
    for condition in (1e3, 1e5, 1e7):
        exact, ours, product = update_errors(condition, torch.float32)
        assert 1.5 * max(exact, ours) < product, f"{condition:.0e} {exact:.1e} {ours:.1e} {product:.1e}"


def test_an_update_from_bf16_keys_is_nearer_to_fp64_than_with_one_fp32_product(native_cpu: None) -> None:
    for condition in (1e3, 1e5, 1e7):
        exact, ours, product = update_errors(condition, torch.bfloat16)
        assert exact == ours and 2.5 * ours < product, f"{condition:.0e} {ours:.1e} {product:.1e}"


def update_errors(condition: float, dtype: torch.dtype) -> tuple[float, float, float]:
    """Relative errors of an update with C summed exactly, by default, and by one fp32 product."""
    d, T, n = 256, 8192, 32
    generator = torch.Generator().manual_seed(8)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    keys = (torch.randn(T, d, generator=generator, dtype=torch.float64) * scales @ basis.T).to(dtype)
    new = torch.randn(d, n, generator=generator, dtype=torch.float64)
    residual = torch.randn(64, n, generator=generator, dtype=torch.float64)

    def update(C: Tensor) -> Tensor:
        mirror_(C)
        return residual @ torch.linalg.solve(15_000 * C.double() / T + new @ new.T, new).T

    sums = [torch.zeros(d, d, dtype=torch.float64) for _ in range(3)]
    with fastedit.backend("cpu"):
        second_moment_(sums[0], keys, precision="exact")
        second_moment_(sums[1], keys)
    sums[2] += keys.float().T @ keys.float()
    expected = update(keys.double().T @ keys.double())
    errors = [float((update(C) - expected).norm() / expected.norm()) for C in sums]
    return errors[0], errors[1], errors[2]


def test_amx_is_a_level_of_its_own(monkeypatch: pytest.MonkeyPatch, native_cpu: None) -> None:
    from fastedit import _cpu

    if "amx" not in _cpu.info()["isa_levels"]:
        pytest.skip("this machine has no AMX, or its kernel does not permit it")
    K = torch.randn(100, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    left = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    expected = left @ left
    results = []
    for level in ("amx", "avx512", "amx"):
        monkeypatch.setenv("FASTEDIT_ISA", level)
        C = torch.zeros(64, 64, dtype=torch.float64)
        with fastedit.backend("cpu"):
            second_moment_(C, K)
        results.append(C)
        # The products of torch use the tiles as well; each side configures them for itself.
        assert torch.equal(left @ left, expected)
    assert torch.equal(results[0], results[2])


def test_amx_takes_the_smallest_keys_for_zero(cpu_level: str) -> None:
    K = torch.full((3, 40), 1e-39).bfloat16()
    K[:, 0] = 1e38
    C = torch.zeros(40, 40, dtype=torch.float64)
    with fastedit.backend("cpu"):
        second_moment_(C, K)
    small = 0.0 if cpu_level == "amx" else 3 * float(K[0, 0].double() * K[0, 1].double())
    assert C[1, 0].item() == pytest.approx(small, rel=1e-6)


def test_gradients_do_not_flow() -> None:
    K = torch.randn(50, 40, requires_grad=True)
    C = torch.zeros(40, 40)
    second_moment_(C, K * 2, precision="exact")
    assert not C.requires_grad
    torch.testing.assert_close(C, (4 * K.detach().T @ K.detach()).tril(), rtol=1e-5, atol=1e-4)


def test_mask_of_zeros_leaves_C_alone() -> None:
    C = torch.full((40, 40), 3.0)
    second_moment_(C, torch.full((9, 40), float("nan")), torch.zeros(9, dtype=torch.int64))
    assert C.eq(3).all()


def test_nan_in_a_kept_row_shows() -> None:
    K = torch.ones(5, 40)
    K[2, 7] = float("nan")
    C = torch.zeros(40, 40)
    second_moment_(C, K)
    assert C[7, :8].isnan().all() and not C[:7, :7].isnan().any()


@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("dtype", KEYS, ids=str)
def test_infinity_shows_where_it_is(cpu_level: str, dtype: torch.dtype, precision: Precision) -> None:
    # Planes of an infinite key, and of products beyond fp32, cancel to NaN; nothing else is touched, nothing is finite.
    K = torch.randn(70, 64, generator=torch.Generator().manual_seed(10)).to(dtype)
    K[5, 7] = float("inf")
    if dtype == torch.float32:
        K[:, 40] = 1e25
    C = torch.zeros(64, 64, dtype=torch.float64)
    with fastedit.backend("cpu"):
        second_moment_(C, K, precision=precision)
    exact = (K.double().T @ K.double()).tril()
    there = exact.isfinite() & (exact.abs() < 1e30)
    assert C.isfinite().equal(there)
    torch.testing.assert_close(C[there], exact[there], rtol=1e-4, atol=1e-3 * float(exact[there].abs().max()))


def test_mirror() -> None:
    for d in (1, 5, 513, 1030):
        C = torch.randn(d, d)
        expected = C.tril() + C.tril(-1).T
        mirror_(C)
        assert torch.equal(C, expected)
    C = torch.randn(2, 7, 7)
    expected = C.tril() + C.tril(-1).mT
    mirror_(C)
    assert torch.equal(C, expected)
    with pytest.raises(ValueError, match="C must be square"):
        mirror_(torch.zeros(3, 4))


SHARED = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(5, 4)), r"C must be \[d, d\] or \[L, d, d\], got shape \[3, 4\]"),
        ((torch.zeros(4), torch.zeros(5, 4)), "C must be"),
        ((torch.zeros(4, 4).half(), torch.zeros(5, 4)), "C must be float64 or float32, got float16"),
        ((torch.zeros(4, 4, requires_grad=True), torch.zeros(5, 4)), "C must not require grad"),
        (
            (torch.zeros(4, 4), torch.zeros(5, 4).int()),
            "K must be float32, bfloat16, float16 or float64, got int32",
        ),
        ((torch.zeros(4, 4), torch.zeros(5, 3)), r"K must be \[T, 4\] or \[B, S, 4\] .* got shape \[5, 3\]"),
        ((torch.zeros(4, 4), torch.zeros(4)), "K must be"),
        ((torch.zeros(2, 4, 4), torch.zeros(5, 4)), r"K must be \[2, T, 4\]"),
        ((torch.zeros(2, 4, 4), torch.zeros(3, 5, 4)), r"K must be \[2, T, 4\]"),
        (
            (torch.zeros(4, 4), torch.zeros(5, 4, device="meta")),
            "K must be on the device of C, cpu, got meta",
        ),
        (
            (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(5)),
            "mask must be bool or an integer type, got float32",
        ),
        (
            (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(4).bool()),
            r"mask must have shape \[5\] .* got \[4\]",
        ),
        ((torch.zeros(4, 4), torch.zeros(2, 5, 4), torch.ones(10).bool()), r"mask must have shape \[2, 5\]"),
        (
            (torch.zeros(4, 4), torch.zeros(5, 4), torch.ones(5, device="meta").bool()),
            "mask must be on the device",
        ),
        (([torch.zeros(4, 4)], []), "K must hold keys of every layer, one for each of the 1 of C, got 0"),
        (([], []), "K must hold keys of every layer"),
        (([torch.zeros(4, 4)] * 2, [torch.zeros(5, 4)] * 2), "C must be a different matrix for every layer"),
        (
            ([torch.zeros(4, 4), torch.zeros(3, 3)], [torch.zeros(5, 4), torch.zeros(5, 3)]),
            r"C must have one shape and dtype in all layers, got \[4, 4\] float32 and \[3, 3\] float32",
        ),
        (
            ([torch.zeros(4, 4), torch.zeros(4, 4)], [torch.zeros(5, 4), torch.zeros(5, 4).half()]),
            "K must have one shape and dtype in all layers",
        ),
        ((None, torch.zeros(5, 4)), "C must be a tensor or a sequence of them, got NoneType"),
        (([None], [torch.zeros(5, 4)]), r"C\[0\] must be a tensor, got NoneType"),
        ((torch.zeros(4, 4), torch.zeros(5, 4), [1] * 5), "mask must be a tensor, got list"),
        ((torch.zeros(4).expand(4, 4), torch.zeros(5, 4)), "C must not overlap itself"),
        ((torch.zeros(4, 4).expand(3, 4, 4), torch.zeros(3, 5, 4)), "C must not overlap itself"),
        (
            ([torch.zeros(4, 4), torch.zeros(4).expand(4, 4)], [torch.zeros(5, 4)] * 2),
            r"C\[1\] must not overlap itself",
        ),
        (
            ([SHARED, torch.zeros(4, 4), SHARED.view(4, 4)], [torch.zeros(5, 4)] * 3),
            r"C\[2\] must not share memory with C\[0\]",
        ),
        (([torch.zeros(2, 4, 4)], [torch.zeros(2, 5, 4)]), r"C must be a sequence of \[d, d\]"),
    ],
)
def test_bad_input_names_the_argument(args: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        second_moment_(*args)


@pytest.mark.parametrize("precision", ["default", "exact"])
def test_no_columns(precision: Precision) -> None:
    for C, K in (((0, 0), (5, 0)), ((0, 0), (2, 5, 0)), ((3, 0, 0), (3, 5, 0))):
        second_moment_(torch.zeros(C), torch.zeros(K), precision=precision)
    second_moment_([torch.zeros(0, 0)], [torch.zeros(5, 0)], precision=precision)


def test_precision_is_one_of_two() -> None:
    for C, K in (
        (torch.zeros(4, 4), torch.zeros(5, 4)),
        ([torch.zeros(4, 4)], [torch.zeros(5, 4)]),
    ):
        with pytest.raises(ValueError, match="precision must be 'default' or 'exact', got 'tf32'"):
            second_moment_(C, K, precision="tf32")


def test_unknown_isa_is_an_error(native_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEDIT_ISA", "sse9")
    with (
        fastedit.backend("cpu"),
        pytest.raises(ValueError, match="FASTEDIT_ISA must be one of scalar.*'sse9'"),
    ):
        second_moment_(torch.zeros(40, 40), torch.zeros(5, 40))


def test_opcheck() -> None:
    K, mask = problem(63, 40, torch.float32)
    K = K.nan_to_num(0.0)
    torch.library.opcheck(_op, (torch.zeros(40, 40, dtype=torch.float64), K, mask, "default"))
    torch.library.opcheck(_op, (torch.zeros(2, 40, 40), torch.ones(2, 9, 40), None, "exact"))
    torch.library.opcheck(
        _list_op, ([torch.zeros(40, 40), torch.zeros(40, 40)], [K, K.clone()], mask, "default")
    )


def test_small_sizes_go_to_eager(native_cpu: None) -> None:
    small = fastedit.explain("second_moment", torch.zeros(8, 8), torch.zeros(5, 8))
    large = fastedit.explain(
        "second_moment", torch.zeros(64, 64), torch.zeros(2, 5, 64), mask=torch.ones(2, 5).int()
    )
    assert [row.name for row in small if row.chosen] == ["eager"]
    assert [row.name for row in large if row.chosen] == ["cpu"]
    assert "under 32" in next(row.reason for row in small if row.name == "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("master", MASTERS, ids=str)
@pytest.mark.parametrize("dtype", KEYS, ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_gpu(backend: str, dtype: torch.dtype, master: torch.dtype) -> None:
    for T, d in [(T, d) for T in (1, 63, 1000, 9000) for d in (8, 200, 1600)]:
        K, mask = problem(T, d, dtype, device="cuda")
        C = started(d, master, device="cuda")
        if backend == "cuda" and dtype == torch.float32:
            with fastedit.backend(backend), pytest.raises(RuntimeError, match="K is float32"):
                second_moment_(C, K, mask)
            continue
        with fastedit.backend(backend):
            second_moment_(C, K, mask)
        check(C, K, mask, tolerance=TOLERANCE["gpu"])  # tensor-core accumulators truncate
        again = started(d, master, device="cuda")
        with fastedit.backend(backend):
            second_moment_(again, K, mask)
        assert torch.equal(C.tril(), again.tril())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_module_without_a_device_says_so() -> None:
    if importlib.util.find_spec("fastedit._cuda") is None:
        pytest.skip("fastedit._cuda is not built: `FASTEDIT_CUDA=on make build`")
    from fastedit import _cuda

    assert _cuda.info()["devices"] == 0
    with pytest.raises(RuntimeError, match="no CUDA device: "):
        _cuda.second_moment(0, True, 8, 64, 0, 0, 1, 8, 1, 0, True, 8, 64, 0, False, 0)
