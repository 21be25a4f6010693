"""Compiles Triton kernels for a GPU that need not be there and reads registers, stack, spills and shared memory."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SHARED_LIMIT", "Compiled", "compile_kernel"]

# Bytes of shared memory one block may use.
SHARED_LIMIT = {80: 166_912, 90: 232_448}


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    arch: int,
    warps: int,
    stages: int,
    aligned: tuple[str, ...],
    directory: Path,
) -> Compiled:
    """signature: Triton types by argument ("*bf16", "i32", ...), without the constexprs; aligned: arguments known to be
    multiples of 16 at launch, without which loads would not be vectors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    types = {name: types[name] for name in kernel.arg_names}
    attrs = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name in aligned
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attrs)
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
    code = _output(tools / "nvdisasm", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {usage[:200]!r}")
    return Compiled(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=int(built.metadata.shared),
        tensor_core=len(re.findall(r"\b(?:HGMMA|HMMA|QGMMA|DMMA)\b", code)),
    )


def _output(tool: Path, *args: object) -> str:
    return subprocess.run([str(tool), *map(str, args)], capture_output=True, text=True, check=True).stdout
