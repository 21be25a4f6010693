"""How many tokens a sweep may run and keep, and how prompts and noise samples are divided to stay below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.memory import free_memory
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.result import CausalTrace

__all__ = ["Budget", "Job", "combined", "jobs_of"]

# As many tokens as make matrix products as fast as they get; more would only cost memory.
_ENOUGH = {"cpu": 1024, "cuda": 32768}
_FEW = 1024


@dataclass(frozen=True)
class Budget:
    """Attributes:
    kept: tokens of clean and corrupted runs that may be kept together.
    run: tokens of restored cells that may run together.
    """

    kept: int
    run: int

    @classmethod
    def of(cls, arch: ResolvedArch, memory: int | None, parts: int) -> Budget:
        """Two fifths of ``memory`` bytes (of a part of what is free) for each.

        Args:
            parts: sub-layers whose outputs are kept.
        """
        weight: Tensor = arch.mlp_out(0).weight  # type: ignore[assignment]
        size, width, device = weight.element_size(), arch.width, weight.device
        # Keys, values and hidden states of every layer, outputs of sub-layers and of blocks with one restored; and
        # what a block holds at a time: the stream and copies of it, queries, keys, values, attention's tiles, the
        # MLP's inside.
        stay = size * width * (3 + 2 * parts) * (arch.depth + 1)
        at_once = size * (16 * width + 4 * arch.key_dim(0))
        # A fifth is left for what does not grow with the tokens: the noise, index tensors, logits.
        half = int(0.4 * (memory or 0.6 * free_memory(device)))
        kept, run = half // (stay + at_once), half // at_once
        if memory is None:
            enough = _ENOUGH.get(device.type, _FEW)
            kept, run = min(kept, enough), min(run, enough)
        return cls(max(1, kept), max(1, run))


@dataclass(frozen=True)
class Job:
    """Prompts whose clean and corrupted rows run together: their numbers, and which noise samples."""

    prompts: tuple[int, ...]
    samples: slice


def jobs_of(prompts: Sequence[TracePrompt], noises: Sequence[Sequence[Tensor]], budget: Budget) -> list[Job]:
    """The least number of jobs; a prompt that does not fit with all its samples has several of its own."""
    jobs: list[Job] = []
    group: list[int] = []
    count = 0

    def close() -> None:
        if group:
            jobs.append(Job(tuple(group), slice(None)))
            group.clear()

    for index, (prompt, sets) in enumerate(zip(prompts, noises, strict=True)):
        sample = len(sets) * (len(prompt) - prompt.span[0])
        own = len(prompt) + len(sets[0]) * sample
        if own > budget.kept:
            close()
            step = max(1, (budget.kept - len(prompt)) // sample)
            whole = len(sets[0])
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
