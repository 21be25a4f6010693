"""Blocks that are run again in the backward instead of keeping what they saved for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


def recomputed(block: Callable[[Tensor], Tensor], hidden: Tensor, again: bool) -> Tensor:
    """``block(hidden)``; with ``again`` only ``hidden`` is kept for the backward, which runs the block once more."""
    if not (again and hidden.requires_grad):
        return block(hidden)
    # Nothing random runs in a block (dropout is off), and saving a generator's state stops a CUDA graph's capture.
    output: Tensor = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
    return output
