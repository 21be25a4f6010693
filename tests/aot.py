"""Compiles what a launcher would launch, for a GPU that need not be there, and reads what the code uses.

A launcher of `kernels/` runs unchanged on meta tensors of real sizes: Triton is told of a device of the given
architecture, every launch stops after its compilation, and the compiled code is read with the tools that come with
Triton. So the gate sees the launcher's own tiles, stages and argument types, also the alignment that Triton finds.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SHARED_LIMIT", "Compiled", "compile_launches"]

# Bytes of shared memory one block may use.
SHARED_LIMIT = {80: 166_912, 90: 232_448}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel. spills: loads and stores of local memory; tensor_core: matrix instructions; bulk_loads:
    loads by the bulk copy engine."""

    kernel: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    bulk_loads: int


class _Device:
    """What Triton asks of a driver before it launches. The architecture stands for the device's number, by which
    Triton keeps what it has compiled."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _stopped_launches(arch: int) -> Iterator[list[Any]]:
    """Inside, a launch compiles for `arch` and adds what it compiled to the list."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    built: list[Any] = []
    run, capability = JITFunction.run, torch.cuda.get_device_capability

    def stopped(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        built.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return built[-1]

    JITFunction.run = stopped
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    driver.set_active(_Device(arch))
    try:
        yield built
    finally:
        JITFunction.run = run
        torch.cuda.get_device_capability = capability
        driver._active = None


def compile_launches(launcher: Callable[[], object], arch: int, directory: Path) -> list[Compiled]:
    """The kernels that `launcher()`, called on meta tensors, launches on a device of this architecture."""
    with _stopped_launches(arch) as built:
        launcher()
    unique = {kernel.hash: kernel for kernel in built}
    return [_read(kernel, directory) for kernel in unique.values()]


def _read(kernel: Any, directory: Path) -> Compiled:
    import triton

    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
    code = _output(tools / "nvdisasm", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {usage[:200]!r}")
    return Compiled(
        kernel=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=_count("STL|LDL", code),
        shared=int(kernel.metadata.shared),
        tensor_core=_count("HGMMA|HMMA|QGMMA|DMMA", code),
        bulk_loads=_count("UTMALDG", code),
    )


def _count(names: str, code: str) -> int:
    return len(re.findall(rf"\b(?:{names})\b", code))


def _output(tool: Path, *args: object) -> str:
    return subprocess.run([str(tool), *map(str, args)], capture_output=True, text=True, check=True).stdout
