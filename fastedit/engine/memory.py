"""How much memory a step of the target optimisation takes, and how many tokens fit.

What a step keeps for its backward is measured, not modelled: the forward of one request runs under autograd's hooks for
saved tensors, which see every activation that any block keeps. It grows with the number of tokens and nothing else.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.forest import Forest
from fastedit.engine.objective import TargetObjective
from fastedit.engine.problem import Problem

__all__ = [
    "ENOUGH_CPU",
    "ENOUGH_CUDA",
    "MemoryReport",
    "automatic_tokens",
    "batch_sizes",
    "free_memory",
    "out_of_memory",
    "release_memory",
    "saved_bytes",
    "suffix_tokens",
]

# Where matrix products stop getting faster with more rows. More than that only costs memory.
ENOUGH_CPU = 512
ENOUGH_CUDA = 16384
_SHARE = 0.6  # of the free memory; the rest is for temporaries, factors and others
_TEMPORARIES = 1.3  # a backward holds gradients beside the activations that it has not freed yet


@dataclass
class MemoryReport:
    """The batch of a target optimisation.

    Attributes:
        batch_tokens: the most tokens that ran together.
        bytes_per_token: what a step keeps for its backward, per token; 0 where it was not measured.
        predicted_bytes: peak of a step above the model, for ``limit_tokens`` tokens.
        limit_tokens: tokens that a batch may have.
        shrunk: what was done when memory ran out, in order.
    """

    batch_tokens: int = 0
    bytes_per_token: int = 0
    predicted_bytes: int = 0
    limit_tokens: int = 0
    shrunk: list[str] = field(default_factory=list)

    def step_bytes(self, tokens: int) -> int:
        """Predicted peak of a step over ``tokens`` tokens."""
        return int(_TEMPORARIES * self.bytes_per_token * tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        return asdict(self)


def suffix_tokens(problem: Problem) -> int:
    """Tokens of a request from the lookup token on; of the KL row the lookup token only."""
    return 1 + sum(len(row.ids) - min(row.lookup, row.target_start) for row in problem.rewriting)


def batch_sizes(problems: Sequence[Problem], trunk: Forest | None) -> list[int]:
    """What each request counts in a batch: its suffix tokens, and a share of the tokens before them.

    Tokens before the lookup token keep keys and values only, of the blocks above: about a fifth of what a suffix token
    keeps for its backward. Those in the trunk belong to nobody. Padded rows (no ``trunk``) all count as the longest.
    """
    if trunk is None:
        return [len(problem.rows) * max(map(len, problem.rows)) for problem in problems]
    sizes = []
    for problem in problems:
        own = Forest(trunk)
        for row in problem.rows:
            own.insert(row.ids[: min(row.lookup, row.target_start)])
        sizes.append(suffix_tokens(problem) + len(own) // 5)
    return sizes


def saved_bytes(arch: ResolvedArch, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward of ``forward()``, the model's own tensors apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in arch.model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in arch.model.buffers()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The caller's mode must not matter: without gradients nothing would be kept, and counted.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def automatic_tokens(objective: TargetObjective, arch: ResolvedArch) -> tuple[int, MemoryReport]:
    """Tokens of a batch: enough for full speed, as few as the free memory asks for.

    Args:
        objective: that of one request, as a sample.
    """
    device = objective.init.device
    kept = saved_bytes(arch, lambda: objective.forward(torch.zeros_like(objective.init).requires_grad_()))
    per_token = max(1, kept // objective.tokens)
    enough = ENOUGH_CPU if device.type == "cpu" else ENOUGH_CUDA
    fits = int(_SHARE * free_memory(device) / (_TEMPORARIES * per_token))
    limit = max(1, min(enough, fits))
    report = MemoryReport(bytes_per_token=per_token, limit_tokens=limit)
    report.predicted_bytes = report.step_bytes(limit)
    return limit, report


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        # What PyTorch's allocator has cached is free to us too.
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int | None = None
    with suppress(OSError, KeyError, ValueError):
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = 1024 * int(rows["MemAvailable"].split()[0])
    if free is None:
        # Half of all memory where nobody says what is free, 1 GiB where nobody says even that.
        known = getattr(os, "sysconf_names", {})
        pages = (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in known else 1 << 31
        )
        free = pages // 2
    return min([free, *_container_limits()])


def _container_limits() -> list[int]:
    """What a container may still take, by version 2 and 1 of control groups; page cache can be taken back."""
    root = Path("/sys/fs/cgroup")
    found = []
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, KeyError, ValueError):  # "max" (no limit) is no number
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(stat[cache])
            found.append(int((folder / limit).read_text()) - taken)
    return found


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator and the CUDA libraries raise plain RuntimeErrors.
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def release_memory(arch: ResolvedArch) -> None:
    """Give cached blocks back before the next attempt."""
    gc.collect()
    weight: Tensor = arch.mlp_out(0).weight  # type: ignore[assignment]
    if weight.device.type == "cuda":
        torch.cuda.empty_cache()
