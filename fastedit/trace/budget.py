"""How many tokens a sweep may run and keep, and how prompts and noise samples are divided to stay below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.memory import free_memory
from fastedit.trace.head import head_bytes
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.result import CausalTrace

__all__ = ["Budget", "Job", "combined", "enough_tokens", "jobs_of"]

# As many tokens as make matrix products as fast as they get; more would only cost memory.
_ENOUGH = {"cpu": 1024, "cuda": 32768}
_FEW = 1024
# Bytes of a tile that attention gathers at a time (`branch_attention`'s chunks in float32), and how many there are.
_ATTENTION = {"cpu": 4 << 19, "cuda": 4 << 26}
_TILES = 2


def enough_tokens(device: torch.device) -> int:
    """Tokens to run together where no budget is given."""
    return _ENOUGH.get(device.type, _FEW)


@dataclass(frozen=True)
class Budget:
    """Attributes:
    kept: tokens of clean and corrupted runs that may be kept together.
    run: tokens of restored cells that may run together.
    """

    kept: int
    run: int

    @classmethod
    def of(cls, arch: ResolvedArch, memory: int | None, parts: int, *, longest: int, noise: int) -> Budget:
        """As many of both, so that what is kept and what runs at a time fit into ``memory`` bytes (a part of what is
        free), once what does not grow with tokens is taken off.

        Args:
            parts: sub-layers whose outputs are kept.
            longest: tokens of the longest prompt.
            noise: bytes of a prompt's noise.
        """
        weight: Tensor = arch.mlp_out(0).weight  # type: ignore[assignment]
        size, width, device = weight.element_size(), arch.width, weight.device
        out: Tensor = arch.attn_out(0).weight  # type: ignore[assignment]
        inside = out.numel() // width  # heads times their width: not the stream's in every family
        # Keys, values and hidden states of every layer, outputs of sub-layers and of blocks with one restored; and
        # what a block holds at a time: the stream and copies of it, queries, keys, values, attention's result, the
        # MLP's inside, which attention sees a token of how long a row, and the noise on embeddings in double precision.
        stay = size * (width * (1 + 2 * parts) + 2 * inside) * (arch.depth + 1)
        seen = 6 * longest + 32
        at_once = size * (10 * width + 7 * inside + 4 * arch.key_dim(0)) + seen
        # The head and a tile of attention: as large for one token as for many.
        fixed = head_bytes(arch) + _TILES * _ATTENTION.get(device.type, _ATTENTION["cpu"]) + 2 * noise
        usable = int(0.95 * (memory or 0.6 * free_memory(device))) - fixed
        # Clean and corrupted runs are made before any cell is, so that one of them runs at a time.
        kept = run = usable // (stay + max(at_once, 3 * 8 * width))
        if memory is None:
            enough = enough_tokens(device)
            kept, run = min(kept, enough), min(run, enough)
        return cls(max(1, kept), max(1, run))


@dataclass(frozen=True)
class Job:
    """Prompts whose clean and corrupted rows run together: their numbers, and which noise samples."""

    prompts: tuple[int, ...]
    samples: slice


def jobs_of(prompts: Sequence[TracePrompt], counts: Sequence[tuple[int, int]], budget: Budget) -> list[Job]:
    """The least number of jobs; a prompt that does not fit with all its samples has several of its own.

    Args:
        counts: per prompt its sets of draws, and the samples of each.
    """
    jobs: list[Job] = []
    group: list[int] = []
    count = 0

    def close() -> None:
        if group:
            jobs.append(Job(tuple(group), slice(None)))
            group.clear()

    for index, (prompt, (sets, whole)) in enumerate(zip(prompts, counts, strict=True)):
        sample = sets * (len(prompt) - prompt.span[0])
        own = len(prompt) + whole * sample
        if own > budget.kept:
            close()
            step = max(1, (budget.kept - len(prompt)) // sample)
            jobs += [Job((index,), slice(a, min(a + step, whole))) for a in range(0, whole, step)]
            count = 0
            continue
        if count + own > budget.kept:
            close()
            count = 0
        group.append(index)
        count += own
    close()
    return jobs


def combined(parts: Sequence[tuple[int, CausalTrace]]) -> CausalTrace:
    """One trace from those of disjoint samples, each with its number of samples."""
    if len(parts) == 1:
        return parts[0][1]
    counts = np.array([count for count, _ in parts], dtype=np.float64)
    traces = [trace for _, trace in parts]
    first = traces[0]

    def mean(values: Sequence[np.ndarray]) -> np.ndarray:
        stacked = np.stack(values)
        averaged = np.tensordot(counts / counts.sum(), stacked, axes=1)
        # What does not depend on the samples keeps its bits.
        kept: np.ndarray = np.where((stacked == stacked[0]).all(axis=0), stacked[0], averaged)
        return kept

    low = mean([np.array(trace.low_score) for trace in traces])
    scores = {kind: mean([trace.scores[kind] for trace in traces]) for kind in first.kinds}
    for kind, grid in scores.items():
        # Trivial cells are the low score itself: a sum in another order must not tell them apart.
        grid[np.all([t.scores[kind] == t.low_score for t in traces], axis=0)] = low
    return replace(first, low_score=float(low), scores=scores)
