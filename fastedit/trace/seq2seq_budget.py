"""How many rows of an encoder-decoder a sweep may run and keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.memory import free_memory
from fastedit.trace.budget import enough_tokens
from fastedit.trace.head import head_bytes

__all__ = ["SideBudget"]


@dataclass(frozen=True)
class SideBudget:
    """Attributes:
    kept: tokens of clean and corrupted rows that may be kept together.
    run: tokens of restored cells that may run together.
    decoded: rows whose encoding the decoder may look at together.
    """

    kept: int
    run: int
    decoded: int

    @classmethod
    def of(
        cls,
        side: ResolvedArch,
        decoder: ResolvedArch,
        memory: int | None,
        *,
        parts: int,
        source: int,
        behind: int,
        noise: int,
    ) -> SideBudget:
        """Two fifths of ``memory`` bytes (of a part of what is free) for what is kept, and for what runs.

        What does not grow with rows, such as the head's logits, is taken off before.

        Args:
            side: whose cells run.
            parts: sub-layers whose outputs are kept.
            source, behind: tokens of the encoder's and the decoder's input.
            noise: bytes of a prompt's noise.
        """
        weight: Tensor = side.mlp_out(0).weight  # type: ignore[assignment]
        attention: Any = side.attn(0)
        size, width = weight.element_size(), side.width
        inner, heads = attention.q.out_features, attention.n_heads
        # Hidden states of every layer, outputs of sub-layers and of blocks with one restored; for a decoder, keys and
        # values of the encodings.
        encoded = 2 * inner * decoder.depth if side is decoder else 0
        stay = size * (width * (1 + 2 * parts) * (side.depth + 1) + encoded)
        # The stream and copies of it, queries, keys and values, the MLP's inside.
        at_once = size * (8 * width + 8 * inner + 4 * side.key_dim(0))
        row = behind * (at_once + size * heads * (3 * width + source)) + 2 * size * source * width
        # The head is as large for one row as for many.
        fixed = head_bytes(decoder) + 2 * noise
        half = max(0, int(0.4 * (int(memory or 0.6 * free_memory(weight.device)) - fixed)))
        kept, run = half // (stay + at_once), half // at_once
        if memory is None:
            enough = enough_tokens(weight.device)
            kept, run = min(kept, enough), min(run, enough)
        return cls(max(1, kept), max(1, run), max(1, half // row))
