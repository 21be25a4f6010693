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


def _all() -> dict[str, Case]:
    groups = (_second_moment,)
    return {f"{case.op}: {case.what}": case for group in groups for case in group()}


CASES = _all()


def case_ids(*, slow: bool) -> list[str]:
    return [name for name, case in CASES.items() if case.slow == slow]


def compile_case(name: str, arch: int, directory: Path) -> list[dict[str, object]]:
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
    rows: list[dict[str, object]] = []
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
    _print(rows, markdown=args.markdown)
    return 1 if any(row["failed"] for row in rows) else 0


def _print(rows: list[dict[str, object]], *, markdown: bool) -> None:
    import triton

    columns = ("kernel", "arch", "warps", "stages", "registers", "shared", "tensor_core", "bulk_loads")
    print(f"Triton {triton.__version__}: {len(rows)} compiled")
    seen = set()
    for row in rows:
        line = tuple(row.get(column, "") for column in columns)
        if markdown and line not in seen:
            print(f"| {row['case']} | " + " | ".join(map(str, line)) + " |")
        elif not markdown:
            print(
                f"{'FAILED' if row['failed'] else 'ok':6} sm_{row['arch']} {row['case']}: {line} {row['failed']}"
            )
        seen.add(line)


if __name__ == "__main__":
    sys.exit(main())
