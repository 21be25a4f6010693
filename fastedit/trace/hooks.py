"""Hooks of a run: none stays behind, whatever raises; and the modules whose outputs are a block's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fastedit.arch import ResolvedArch

__all__ = ["hooks", "part_module"]


@contextmanager
def hooks() -> Iterator[Callable[..., None]]:
    """A function ``(module, hook, before=False)`` that puts a forward hook, or with ``before`` a pre-hook with keyword
    arguments, on a module; all are gone behind the block, also those that were put on before one failed.
    """
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Callable[..., Any], before: bool = False) -> None:
            put = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(put(function, with_kwargs=before).remove)

        yield hook


def part_module(arch: ResolvedArch, part: str, layer: int) -> nn.Module:
    """The module whose output is what the MLP (``"mlp"``), attention (``"attn"``) or, in the decoder of an
    encoder-decoder, cross-attention (``"cross"``) of a layer adds.

    Where a family's modules return the sum with the residual stream (BLOOM), restoring their output would restore the
    stream: there it is the last matrix of the module.
    """
    if part == "cross":
        return arch.cross(layer)
    if arch.row.residual_inside:
        return arch.mlp_out(layer) if part == "mlp" else arch.attn_out(layer)
    return arch.mlp(layer) if part == "mlp" else arch.attn(layer)
