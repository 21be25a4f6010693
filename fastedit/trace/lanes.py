"""Which runs the cells of a grid need, and where they may share one.

A restored cell differs from the corrupted run from its token on and from its first restored layer on: it is a *lane*,
the tokens from that one to the last, from block ``start`` on. Windows that are cut off at layer 0 restore the same
layers until the shorter one ends: their lanes are one until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "SEVERED", "Cell", "Lane", "families", "heads_of", "window_of", "windowed"]

Kind = Literal["hidden", "mlp", "attn", "severed_mlp", "severed_attn"]
KINDS = ("hidden", "mlp", "attn")
SEVERED = ("severed_mlp", "severed_attn")

Cell = tuple[str, int, int]  # kind, token, layer


@dataclass(frozen=True)
class Lane:
    """One run of tokens ``token ..`` from block ``start`` on.

    Attributes:
        cells: what it is the result of.
        part: sub-layer that is patched at the token, or ``None``.
        stop: one past the last layer that is patched.
        frozen: patched with the corrupted output instead of the clean one.
        enters: layer whose restored output the lane starts with: the block's (no ``part``, or frozen), or what the
            block gives with its part restored.
        fork: the lane leaves the family's first one at ``start`` instead.
    """

    cells: tuple[Cell, ...]
    token: int
    start: int
    part: str | None
    stop: int
    frozen: bool
    enters: int
    fork: bool = False


def window_of(layer: int, window: int, depth: int) -> tuple[int, int]:
    """First restored layer, and one past the last (as published: ``window // 2`` below, the rest from the layer on)."""
    return max(0, layer - window // 2), min(depth, layer - (-window // 2))


def families(
    kind: str, tokens: Sequence[int], layers: Sequence[int], *, depth: int, length: int, window: int
) -> list[tuple[Lane, ...]]:
    """The lanes of a kind's cells; those of a family run together, the first one first.

    Cells that need no run are left out: see `trivial`.
    """
    found: list[tuple[Lane, ...]] = []
    for token in tokens:
        if kind not in ("mlp", "attn"):
            part = kind.removeprefix("severed_") if kind in SEVERED else None
            found += [
                (Lane(((kind, token, layer),), token, layer + 1, part, depth, part is not None, layer),)
                for layer in layers
                if layer < depth - 1
            ]
            continue
        # Restored in the last block only, a token before the last one cannot be seen any more.
        seen = [
            layer for layer in layers if window_of(layer, window, depth)[0] < depth - 1 or token == length - 1
        ]
        found += windowed(kind, token, seen, depth=depth, window=window)
    return found


def windowed(
    kind: str, token: int, layers: Sequence[int], *, depth: int, window: int
) -> list[tuple[Lane, ...]]:
    """The lanes of one token's cells of a kind that restores windows: a family for every layer that windows begin at,
    the longest first, the others forks of it where they end.
    """
    groups: dict[int, dict[int, list[int]]] = {}
    for layer in layers:
        low, high = window_of(layer, window, depth)
        groups.setdefault(low, {}).setdefault(high, []).append(layer)
    found = []
    for low, ends in groups.items():
        longest = max(ends)
        lanes = []
        for high in sorted(ends, reverse=True):
            cells = tuple((kind, token, layer) for layer in ends[high])
            start = low + 1 if high == longest else max(low + 1, high)
            lanes.append(Lane(cells, token, start, kind, high, False, low, high != longest))
        found.append(tuple(lanes))
    return found


def heads_of(lanes: Sequence[Lane]) -> dict[int, int]:
    """For every lane the last one up to it that is no fork: what a fork leaves."""
    found, head = {}, 0
    for i, lane in enumerate(lanes):
        head = head if lane.fork else i
        found[i] = head
    return found
