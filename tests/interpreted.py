"""What the Triton kernels compute, in Triton's interpreter on small shapes: `python tests/interpreted.py [NAME ...]`.

A process of its own with TRITON_INTERPRET=1, which is read when a kernel is decorated. The interpreter multiplies the
bit patterns of bf16 and cuts float32 off where a GPU rounds it to bf16; kernels widen before a product there, and the
tolerances that have to allow for the cut say so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import test_attribution_reduce
import test_branch_attention
import test_delta_step
import test_kth_magnitude
import test_lowrank_transform
import test_nearest_key
import test_rank_update
import test_row_moments
import test_target_loss
import torch
import triton
import triton.language as tl

import fastedit
from fastedit.kernels import attribution_reduce as attribution_kernel
from fastedit.kernels import kth_magnitude as kth_magnitude_kernel
from fastedit.kernels import second_moment as second_moment_kernel
from fastedit.kernels import target_loss as target_loss_kernel
from fastedit.kernels.second_moment import _tile_of

__all__ = ["CHECKS"]

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@triton.jit
def _tiles_probe(out, n, tiles, GROUP: tl.constexpr):
    p = tl.minimum(tl.arange(0, 512), n - 1)
    i, j = _tile_of(p, tiles, GROUP)
    tl.store(out + 2 * p, i)
    tl.store(out + 2 * p + 1, j)


@check
def second_moment_tiles() -> None:
    """Every tile of the triangle is somebody's, and nobody else's."""
    for group in (1, 4, 8):
        for tiles in (1, 2, 3, 7, 8, 9, 16, 23, 31):
            n = tiles * (tiles + 1) // 2
            out = torch.full((n, 2), -1, dtype=torch.int32)
            _tiles_probe[(1,)](out, n, tiles, group)
            assert {tuple(row) for row in out.tolist()} == {
                (i, j) for i in range(tiles) for j in range(i + 1)
            }


def _second_moment(arch: int) -> None:
    second_moment_kernel.architecture = lambda tensor: arch
    upper = lambda d: torch.ones(d, d, dtype=torch.bool).triu(1)  # noqa: E731
    for T, d, layers, keys, master in (
        (63, 200, 2, torch.bfloat16, torch.float64),
        (1, 8, 1, torch.float16, torch.float32),
        (0, 63, 1, torch.bfloat16, torch.float32),
        (130, 136, 1, torch.float16, torch.float64),
        (1030, 63, 1, torch.float32, torch.float64),
        (70, 264, 2, torch.float32, torch.float32),
    ):
        for masked in (False, True):
            for products in (4, 6) if keys == torch.float32 else (6,):
                generator = torch.Generator().manual_seed(T + d)
                K = torch.randn(layers, T, d, generator=generator).to(keys)
                mask = torch.rand(T, generator=generator) > 0.4
                if masked:
                    K[:, ~mask] = float("nan")
                C = torch.ones(layers, d, d, dtype=master)
                C[:, upper(d)] = 7
                second_moment_kernel.second_moment_(C, K, mask if masked else None, products)
                kept = (K[:, mask] if masked else K).double()
                exact = (1 + kept.mT @ kept).tril()
                error = float((C.double().tril() - exact).norm() / exact.norm())
                # Two planes keep 16 bits of a key; cut off instead of rounded, twice the error.
                assert error < (3e-5 if products == 4 else 1e-6), (T, d, keys, masked, products, error)
                assert C[:, upper(d)].eq(7).all()


@check
def second_moment() -> None:
    _second_moment(80)


@check
def second_moment_bulk() -> None:
    """The same through descriptors, as on sm_90."""
    _second_moment(90)


@check
def second_moment_strides() -> None:
    """Rows of odd width and alignment, keys that are a part of a wider tensor, C with a stride, several flushes."""
    for arch in (80, 90):
        second_moment_kernel.architecture = lambda tensor, arch=arch: arch
        config = second_moment_kernel.CONFIGS[arch, 8]
        second_moment_kernel.CONFIGS[arch, 8] = dataclasses.replace(
            config, tile_m=32, tile_n=32, parts=1, flush=128, promote=64
        )
        for K in (
            torch.randn(200, 41, dtype=torch.bfloat16)[:, 1:],
            torch.randn(40, 200, dtype=torch.bfloat16).T,
            torch.randn(1, 40).bfloat16().expand(200, 40),
            torch.randn(200, 80).half()[:, :40],
        ):
            C = torch.zeros(50, 64, dtype=torch.float64)[:40, 3:43]
            second_moment_kernel.second_moment_(C, K, None, 6)
            exact = (K.double().T @ K.double()).tril()
            assert (C.tril() - exact).norm() < 1e-6 * exact.norm()
            assert not C.triu(1).any()
            mask = torch.arange(200) % 3 > 0
            second_moment_kernel.second_moment_(C, K, mask, 6)
            exact += (K[mask].double().T @ K[mask].double()).tril()
            assert (C.tril() - exact).norm() < 1e-6 * exact.norm()
        second_moment_kernel.CONFIGS[arch, 8] = config


@check
def attribution_reduce() -> None:
    t = test_attribution_reduce
    with fastedit.backend("triton"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            t.check(*t.problem((3, 1, 0, 20, 7), 63, dtype))
        t.check(*t.problem((2, 9), 700, torch.float16, before=0, after=0))
        gradient, starts, activation = t.problem((3, 5), 14, torch.float32)
        wide = torch.full((2 * len(gradient), 31), torch.nan)
        wide[::2, 2:30:2] = gradient
        t.check(wide[::2, 2:30:2], starts, activation.T.contiguous().T)
        # Rows outside of the gradient are not read, whatever `starts` says of them.
        kernel = attribution_kernel.attribution_reduce
        found = kernel(torch.ones(4, 3), torch.tensor([-2, 1, 9]), None, 1)
        assert found.tolist() == [[1.0] * 3, [3.0] * 3]


@check
def branch_attention() -> None:
    t = test_branch_attention
    options: tuple[dict[str, float], ...] = (
        {},
        {"softcap": 2.0},
        {"window": 3},
        {"softcap": 0.5, "window": 2},
    )
    with fastedit.backend("triton"):
        for shape in ("one token", "one branch", "no prefix", "branches without tokens"):
            for option in options:
                dtype = torch.float16 if option else torch.float32
                t.check(t.problem(**t.SHAPES[shape], dtype=dtype, **option))
        # Several tiles of keys and of queries; four query heads to a key head; heads of odd widths.
        wide = {"own": (20, 40), "prefix": (30, 50), "H": 4, "G": 1}
        t.check(t.problem(2, **wide, D=17, dtype=torch.float32, window=50, softcap=2.0))
        t.check(t.problem(3, own=(0, 3), H=6, G=2, D=63, dtype=torch.float32, seed=3))
        t.test_a_branch_at_nan_stays_alone(torch.float32)
        t.test_strides(torch.float32), t.test_a_strided_last_dimension(torch.float32)
        t.test_nothing_to_do(3, torch.float32), t.test_an_empty_store(torch.float32)


@check
def nearest_key() -> None:
    t = test_nearest_key
    with fastedit.backend("triton"):
        for dtype in t.DTYPES:
            for shape in ((1, 1, 1), (3, 2, 5), (9, 70, 300), (17, 33, 24)):
                t.check(*t.problem(*shape, dtype))
        # Equal keys in one block of keys and in several: the lowest index, and the tie is the second.
        for places in ([3, 7], [5, 40], [20, 21, 60]):
            keys = torch.randn(64, 24)
            keys[places] = 0.5
            found = t.nearest_key(torch.full((3, 24), 0.25), keys, 1.5)
            assert found.key.tolist() == [places[0]] * 3 and found.hit.all()
            assert found.distance.equal(found.second)
    t.forced = lambda backend, op: fastedit.backend(backend if op == "nearest_key" else "eager")
    t.test_no_cancellation("triton")
    t.test_a_pair_has_one_distance("triton")
    t.test_nan_and_infinity("triton", 9)
    with fastedit.backend("triton"):
        none = t.nearest_key(torch.ones(2, 3), torch.ones(0, 3), 1.0)
        assert none.key.tolist() == [-1, -1] and none.distance.isinf().all() and not none.hit.any()
        assert t.nearest_key(torch.ones(0, 3), torch.ones(2, 3), 1.0).key.shape == (0,)
    t.test_layouts("triton", torch.bfloat16)


@check
def kth_magnitude() -> None:
    t = test_kth_magnitude
    with fastedit.backend("triton"):
        for dtype in t.DTYPES:
            t.check("nan", 63, dtype), t.check_mask("few", 63, dtype)
        t.check("outlier", 63, torch.float32), t.check_mask("nan", 63, torch.float16)
        kth_magnitude_kernel._PROGRAMS = 2
        x = t.data("scales", 9000, torch.float32)
        for k in (1, 700, 9000):
            assert t.kth_magnitude(x, k).equal(x.abs().sort(descending=True).values[k - 1])
    t.forced = fastedit.backend
    t.test_layouts("triton", torch.float32)
    t.test_parameters_scalars_and_nothing("triton")


@check
def delta_step() -> None:
    t = test_delta_step
    with fastedit.backend("triton"):
        t.test_inactive_rows_keep_every_bit(torch.float32)
        t.test_inactive_rows_keep_every_bit(torch.float64)
        t.test_a_whole_trajectory()
        t.test_first_step_from_zero_is_the_sign_of_the_gradient()
        t.test_a_zero_gradient_at_zero_moves_nothing()
        t.test_gradients_may_be_narrower()


@check
def row_moments() -> None:
    t = test_row_moments
    for state in t.STATES:
        for dtype in t.ROWS:
            for n, d in ((1, 1), (63, 17), (100, 130)):
                t.test_one_batch("triton", n, d, state, dtype)
    for test in (
        t.test_equals_mends_loop,
        t.test_equals_malmens_normaliser,
        t.test_a_single_row_is_no_nan,
        t.test_nothing_to_add,
        t.test_an_unused_state_may_hold_anything,
        t.test_a_far_mean_keeps_its_variance,
        t.test_strides_alignment_and_gradients,
    ):
        test("triton")


@check
def lowrank_transform() -> None:
    t = test_lowrank_transform
    t.refused = lambda *args, **kwargs: False  # these kernels compute in float64 too
    for clamp_first in (False, True):
        for shape in t.SHAPES[:3]:
            t.test_equals_the_published_networks("triton", shape, torch.float32, clamp_first)
            t.test_gradients_of_the_net("triton", shape, torch.float64, clamp_first)
    for rows in (torch.float32, torch.bfloat16, torch.float64):
        t.test_rows_of_any_type("triton", rows)
    for test in (
        t.test_one_group_equals_mend_module_by_module,
        t.test_the_identity_at_the_start,
        t.test_no_rows_and_no_layers,
        t.test_nan_stays_in_its_row,
        t.test_layouts,
    ):
        test("triton")


@check
def rank_update() -> None:
    t = test_rank_update
    for weight in (torch.bfloat16, torch.float16, torch.float32):
        for factor in (torch.float32, torch.float64):
            for rows, columns, rank in ((97, 63, 3), (33, 130, 50), (1, 1, 9)):
                W, left, right = t.problem(rows, columns, rank, weight, factor)
                for transposed in (False, True):
                    found = W.T.clone(memory_format=torch.contiguous_format) if transposed else W.clone()
                    with fastedit.backend("triton"):
                        t.rank_update_(found, left, right, alpha=0.3, transposed=transposed)
                    found = found.T if transposed else found
                    # Cut off to bfloat16 instead of rounded: one more unit.
                    last = 1.0 if weight == torch.bfloat16 else 0.0
                    t.check(found, W, left, right, 0.3, last_bits=last)
        t.measured("triton", weight, torch.float32)


def _target_loss(
    R: int, d: int, V: int, Q: int, dtype: torch.dtype, weight: torch.dtype, **options: object
) -> None:
    t = test_target_loss
    H, w, bias, *rest = t.problem(R, d, V, Q, dtype, seed=R + V)
    with fastedit.backend("triton"):
        for bias_or_none in (None, bias):
            for found, expected in t.both(H, w.to(weight), bias_or_none, *rest, **options):
                torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


@check
def target_loss() -> None:
    target_loss_kernel._BLOCK = 64
    target_loss_kernel._COLUMNS = 16
    for softcap in (None, 3.0):
        for weight in (torch.float32, torch.bfloat16):
            _target_loss(5, 24, 301, 3, torch.float32, weight, softcap=softcap)
            # From here on in chunks.
            target_loss_kernel._CHUNK_COLUMNS, target_loss_kernel._LEAST_COLUMNS = 100, 70
            target_loss_kernel._CHUNK_ELEMENTS = 1
    _target_loss(1, 1, 1, 0, torch.float32, torch.float32)
    _target_loss(3, 7, 2, 1, torch.float32, torch.float16)
    t = test_target_loss
    target_loss_kernel._CHUNK_COLUMNS, target_loss_kernel._LEAST_COLUMNS = 7, 7
    with fastedit.backend("triton"):
        for scale in (1e-30, 1e4, 1e30):
            t.test_extreme_logits(scale)
        t.test_a_masked_vocabulary()
        t.test_kl_of_a_distribution_with_itself_is_zero()
        t.test_no_gradient_is_kept_when_none_is_asked()
        t.test_no_rows()


def main() -> int:
    names = [name for name in sys.argv[1:] if not name.startswith("--json=")]
    out = [Path(name.removeprefix("--json=")) for name in sys.argv[1:] if name.startswith("--json=")]
    results = {}
    for name in names or CHECKS:
        start = time.process_time()
        try:
            CHECKS[name]()
            results[name] = ""
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()[-3000:]
        print(f"{name}: {results[name] or 'ok'} ({time.process_time() - start:.1f} s)", flush=True)
    for path in out:
        path.write_text(json.dumps(results), encoding="utf-8")
    return 1 if any(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
