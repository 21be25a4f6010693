"""The launches that the compile gate goes through, and the gate as a program: `python tests/aot_cases.py --help`.

A case calls a launcher of `kernels/` on meta tensors of a real model's sizes. Sizes matter only by what Triton
specialises on (16, not 16, 1), so one odd case an op is enough beside those of models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ARCHITECTURES", "CASES", "Case", "case_ids"]

ARCHITECTURES = (80, 90)
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_NAMES = {BF16: "bf16", F16: "fp16", F32: "fp32", F64: "fp64"}


@dataclass(frozen=True)
class Case:
    """launch: calls the launcher. dots: whether every kernel with a product must use tensor cores, by kernel name."""

    op: str
    what: str
    launch: Callable[[], object]
    dots: tuple[str, ...] = ()
    bulk: tuple[str, ...] = ()  # kernels that must use the bulk copy engine on sm_90
    slow: bool = False


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _second_moment() -> Iterator[Case]:
    from fastedit.kernels.second_moment import second_moment_

    def case(
        keys: torch.dtype, master: torch.dtype, *, products: int = 6, masked: bool, d: int, slow: bool
    ) -> Case:
        def launch() -> None:
            mask = meta(8192, dtype=torch.bool) if masked else None
            second_moment_(meta(d, d, dtype=master), meta(8192, d, dtype=keys), mask, products)

        what = f"{_NAMES[keys]} keys, {_NAMES[master]} C, d={d}"
        what += f", {products} products" * (keys == F32) + ", mask" * masked
        kernel = ("_second_moment_kernel",)
        return Case("second_moment_", what, launch, dots=kernel, bulk=kernel, slow=slow)

    for master in (F64, F32):
        yield case(BF16, master, masked=False, d=16384, slow=False)
        yield case(BF16, master, masked=True, d=16384, slow=False)
        yield case(F32, master, masked=True, d=16384, slow=False)
        yield case(F32, master, products=4, masked=False, d=16384, slow=True)
        yield case(F16, master, masked=True, d=6403, slow=True)


def _rank_update() -> Iterator[Case]:
    from fastedit.kernels.rank_update import rank_update_

    def case(
        weight: torch.dtype, factor: torch.dtype, rank: int, *, measure: bool, width: int = 16384, slow: bool
    ) -> Case:
        def launch() -> None:
            norms = meta(2, dtype=F64) if measure else None
            left, right = meta(4096, rank, dtype=factor), meta(rank, width, dtype=factor)
            rank_update_(meta(4096, width, dtype=weight), left, right, 0.5, norms)

        what = (
            f"{_NAMES[weight]} W, {_NAMES[factor]} factors, rank {rank}, width {width}"
            + ", measured" * measure
        )
        return Case("rank_update_", what, launch, dots=("_rank_update_kernel",) * (rank > 8), slow=slow)

    for rank in (4, 64):
        yield case(BF16, F32, rank, measure=False, slow=False)
        yield case(BF16, F32, rank, measure=True, slow=False)
        yield case(F32, F64, rank, measure=True, slow=False)
        yield case(F32, F64, rank, measure=False, slow=True)
        yield case(F16, F32, rank, measure=True, width=6403, slow=True)


def _branch_attention() -> Iterator[Case]:
    from fastedit.kernels.branch_attention import CONFIGS, branch_attention, branch_attention_backward

    def case(width: int, half: bool, *, options: bool, slow: bool) -> Case:
        kind = BF16 if half else F32
        heads, group = 32, 4 if options else 1

        def launch() -> None:
            q, lse = meta(2000, heads, width, dtype=kind), meta(2000, heads)
            k, v, k_prefix, v_prefix = (meta(2000, heads // group, width, dtype=kind) for _ in range(4))
            columns = meta(450, 32, dtype=torch.int64)
            index = (columns, *(meta(n, dtype=torch.int64) for n in (451, 2000, 451)))
            limits = (8, 8, 0.125, 30.0 if options else 0.0, 100 if options else 0)
            branch_attention(q, k, v, k_prefix, v_prefix, *index, *limits)
            # The op refuses the other: `_WIDEST_FLOAT_BACKWARD`.
            if half or width <= 64:
                branch_attention_backward(q, lse, q, k, v, k_prefix, v_prefix, *index, *limits)

        what = f"{_NAMES[kind]}, heads of {width}" + ", grouped, capped, windowed" * options
        kernels = ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel")
        return Case("branch_attention", what, launch, dots=kernels, slow=slow)

    for width, half in CONFIGS:
        yield case(width, half, options=True, slow=width < 64 or not half)
        if width == 64:
            yield case(width, half, options=False, slow=not half)


def _target_loss() -> Iterator[Case]:
    from fastedit.kernels.target_loss import target_loss

    def case(weight: torch.dtype, *, full: bool, slow: bool) -> Case:
        def launch() -> None:
            rows, logp = meta(8, dtype=torch.int64), meta(8, 50400)
            bias = meta(50400, dtype=weight) if full else None
            given = (rows, logp) if full else (None, None)
            head = meta(50400, 4096, dtype=weight)
            target_loss(meta(64, 4096), head, bias, meta(64, dtype=torch.int64), *given, 30.0 * full, full)

        return Case(
            "target_loss", f"{_NAMES[weight]} head" + ", bias, cap, KL, gradient" * full, launch, slow=slow
        )

    yield case(BF16, full=True, slow=False)
    yield case(F32, full=True, slow=False)
    yield case(F16, full=False, slow=True)
    yield case(BF16, full=False, slow=True)


def _delta_step() -> Iterator[Case]:
    from fastedit.kernels.delta_step import delta_step_

    def case(kind: torch.dtype, grad: torch.dtype, d: int, *, slow: bool) -> Case:
        def launch() -> None:
            delta, m, v = (meta(64, d, dtype=kind) for _ in range(3))
            rows = (meta(64, dtype=torch.int64), meta(64, dtype=kind), meta(64, dtype=torch.bool))
            delta_step_(delta, meta(64, d, dtype=grad), m, v, *rows, 0.5, 0.5, 0.75, 0.9, 0.999, 1e-8)

        return Case("delta_step_", f"{_NAMES[kind]} state, {_NAMES[grad]} gradient, d={d}", launch, slow=slow)

    yield case(F32, F32, 4096, slow=False)
    yield case(F64, F64, 4096, slow=False)
    yield case(F32, BF16, 1601, slow=True)


def _nearest_key() -> Iterator[Case]:
    from fastedit.kernels.nearest_key import nearest_key

    def case(kind: torch.dtype, d: int, *, slow: bool) -> Case:
        def launch() -> None:
            nearest_key(meta(8, d, dtype=kind), meta(10000, d, dtype=kind), meta(10000))

        return Case("nearest_key", f"{_NAMES[kind]}, d={d}", launch, slow=slow)

    yield case(F32, 4096, slow=False)
    yield case(BF16, 4096, slow=False)
    yield case(F64, 4096, slow=True)
    yield case(F16, 1601, slow=True)


def _kth_magnitude() -> Iterator[Case]:
    from fastedit.kernels.kth_magnitude import kth_magnitude, magnitude_mask_

    def select(kind: torch.dtype, *, slow: bool) -> Case:
        def launch() -> None:
            kth_magnitude(meta(4096, 16384, dtype=kind), 1000)

        return Case("kth_magnitude", _NAMES[kind], launch, slow=slow)

    def mask(kind: torch.dtype, *, all_ties: bool, slow: bool) -> Case:
        def launch() -> None:
            magnitude_mask_(meta(4096, 16384, dtype=kind), None, 1000, all_ties)

        what = f"{_NAMES[kind]}, {'all' if all_ties else 'first'} ties"
        return Case("magnitude_mask_", what, launch, slow=slow)

    yield select(F32, slow=False)
    for kind in (BF16, F16, F64):
        yield select(kind, slow=True)
    yield mask(BF16, all_ties=False, slow=False)
    yield mask(F32, all_ties=True, slow=True)
    yield mask(F64, all_ties=False, slow=True)


def _attribution_reduce() -> Iterator[Case]:
    from fastedit.kernels.attribution_reduce import attribution_reduce

    def case(kind: torch.dtype, *, f: int, activation: bool, slow: bool) -> Case:
        def launch() -> None:
            own = meta(400, f, dtype=kind) if activation else None
            attribution_reduce(meta(8000, f, dtype=kind), meta(401, dtype=torch.int64), own, 20)

        what = f"{_NAMES[kind]}, f={f}" + ", activation" * activation
        return Case("attribution_reduce", what, launch, slow=slow)

    yield case(F32, f=16384, activation=True, slow=False)
    yield case(BF16, f=16384, activation=True, slow=False)
    yield case(F64, f=6403, activation=False, slow=True)


def _row_moments() -> Iterator[Case]:
    from fastedit.kernels.row_moments import row_moments_

    def case(state: torch.dtype, rows: torch.dtype, *, parts: bool, slow: bool) -> Case:
        def launch() -> None:
            X, D = meta(640, 4096, dtype=rows), meta(640, 16384, dtype=rows) if parts else None
            width = 20480 if parts else 4096
            mask = meta(640, dtype=torch.bool) if parts else None
            tensors = (
                torch.empty((), dtype=torch.int64, device="meta"),
                meta(width, dtype=state),
                meta(width, dtype=state),
            )
            row_moments_(*tensors, X, D, mask, [100, 0, 540], parts)

        what = f"{_NAMES[state]} state, {_NAMES[rows]} rows" + ", two parts, mask, inflated" * parts
        return Case("row_moments_", what, launch, slow=slow)

    yield case(F64, F32, parts=True, slow=False)
    yield case(F32, BF16, parts=False, slow=False)
    yield case(F64, F64, parts=False, slow=True)


def _lowrank_transform() -> Iterator[Case]:
    from fastedit.kernels.lowrank_transform import lowrank_transform, lowrank_transform_backward

    def case(kind: torch.dtype, rows: torch.dtype, *, clamp_first: bool, modules: int, slow: bool) -> Case:
        def launch() -> None:
            n, d, rank = 640, 20480, 1920
            std = meta(modules, d, dtype=kind)
            V, U = [meta(rank, d, dtype=kind)] * 2, [meta(d, rank, dtype=kind)] * 2
            table = [meta(modules, d, dtype=kind)] * 2
            mode = meta(n, dtype=torch.int64)
            net = (V, U, [meta(d, dtype=kind)] * 2, table, table, mode, 1e-7, clamp_first)
            X, D = meta(n, 4096, dtype=rows), meta(n, 16384, dtype=rows)
            z, Z, A, H = lowrank_transform(X, D, std, std, *net, True)
            lowrank_transform_backward(z, Z, A, H, std, V, U, table, table, mode, 1e-7, clamp_first, True)

        what = f"{_NAMES[kind]} net, {_NAMES[rows]} rows, {modules} modules, {'MALMEN' if clamp_first else 'MEND'}"
        return Case("lowrank_transform", what, launch, slow=slow)

    yield case(F32, BF16, clamp_first=False, modules=3, slow=False)
    yield case(F32, F32, clamp_first=True, modules=1, slow=False)
    yield case(F64, F64, clamp_first=False, modules=3, slow=True)
    yield case(F64, F32, clamp_first=True, modules=3, slow=True)


def _all() -> dict[str, Case]:
    groups = (
        _attribution_reduce,
        _branch_attention,
        _delta_step,
        _kth_magnitude,
        _lowrank_transform,
        _nearest_key,
        _rank_update,
        _row_moments,
        _second_moment,
        _target_loss,
    )
    return {f"{case.op}: {case.what}": case for group in groups for case in group()}


CASES = _all()


def case_ids(*, slow: bool) -> list[str]:
    return [name for name, case in CASES.items() if case.slow == slow]


def compile_case(name: str, arch: int, directory: Path) -> list[dict[str, Any]]:
    """What the gate has to say of one case: a row a kernel, `failed` is the reason or empty."""
    from aot import SHARED_LIMIT, compile_launches

    case = CASES[name]
    rows = []
    for found in compile_launches(case.launch, arch, directory):
        failed = []
        if found.stack or found.spills:
            failed.append(f"{found.stack} bytes of stack, {found.spills} loads and stores of local memory")
        if found.shared > SHARED_LIMIT[arch]:
            failed.append(f"{found.shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}")
        if found.kernel in case.dots and not found.tensor_core:
            failed.append("no tensor-core instruction")
        if arch == 90 and found.kernel in case.bulk and not found.bulk_loads:
            failed.append("no bulk copy")
        rows.append({**dataclasses.asdict(found), "arch": arch, "case": name, "failed": "; ".join(failed)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels and fail on spills and sizes.")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--slow", action="store_true", help="the long list too")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")
    parser.add_argument("names", nargs="*", help="cases, all by default")
    args = parser.parse_args()
    # Triton's next release changes the default and warns until then.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    names = args.names or case_ids(slow=False) + (case_ids(slow=True) if args.slow else [])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            for arch in args.arch or ARCHITECTURES:
                try:
                    rows += compile_case(name, arch, Path(directory))
                except Exception:
                    reason = traceback.format_exc()[-3000:]
                    rows.append({"case": name, "arch": arch, "kernel": "?", "failed": reason})
    if args.json:
        args.json.write_text(json.dumps(rows), encoding="utf-8")
    (_print_table if args.markdown else _print)(rows)
    return 1 if any(row["failed"] for row in rows) else 0


def _print(rows: list[dict[str, Any]]) -> None:
    import triton

    columns = ("kernel", "warps", "stages", "registers", "shared", "tensor_core", "bulk_loads")
    print(f"Triton {triton.__version__}: {len(rows)} compiled")
    for row in rows:
        line = tuple(row.get(column, "") for column in columns)
        print(
            f"{'FAILED' if row['failed'] else 'ok':6} sm_{row['arch']} {row['case']}: {line} {row['failed']}"
        )


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A line a kernel: the most of all its cases, sm_80 / sm_90."""
    print(
        "| op | kernel | warps | registers a thread | shared memory, bytes |\n| --- | --- | --- | --- | --- |"
    )
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kernels.setdefault((CASES[row["case"]].op, row["kernel"]), []).append(row)
    for (op, kernel), found in sorted(kernels.items()):
        cells = [
            " / ".join(
                f"{max(row[what] for row in found if row['arch'] == arch):,}" for arch in ARCHITECTURES
            )
            for what in ("registers", "shared")
        ]
        warps = ", ".join(map(str, sorted({row["warps"] for row in found})))
        print(f"| `{op}` | `{kernel}` | {warps} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    sys.exit(main())
