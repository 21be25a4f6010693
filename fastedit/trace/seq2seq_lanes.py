"""Which runs the cells of an encoder's or a decoder's grid need (see `fastedit.trace.lanes` for what a lane is).

In an encoder every token sees every other one: a cell changes all tokens of the layers above it, and no cell of a
prompt of more than one token is trivial. In a decoder that reads a corrupted encoder every token is corrupted from the
first layer on, and two sorts of cells are trivial: what is restored in the last layer is seen at the last token only,
and the first layer's self-attention reads embeddings, which are not corrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastedit.trace.lanes import SEVERED, Cell, Lane, window_of, windowed

__all__ = ["CROSS", "check_side", "severs", "side_families"]

CROSS = ("cross", "severed_cross")


def check_side(side: object, tokens: str, decoder_prefix: object) -> None:
    """Raise ValueError for options of encoder-decoders that are none, or do not go together."""
    if side not in (None, "encoder", "decoder"):
        raise ValueError(f"side must be 'encoder', 'decoder' or None, got {side!r}")
    if side == "decoder" and tokens != "all":
        raise ValueError(f"tokens must be 'all' for side='decoder', which has no subject, got {tokens!r}")
    ok = decoder_prefix is None or (isinstance(decoder_prefix, str) and decoder_prefix.strip())
    if not ok:
        raise ValueError(f"decoder_prefix must be a text that is not blank, or None, got {decoder_prefix!r}")


def severs(kind: str) -> bool:
    """Whether a kind keeps a module's outputs corrupted."""
    return kind in SEVERED or kind == "severed_cross"


def side_families(
    kinds: Sequence[str], tokens: Sequence[int], *, depth: int, length: int, window: int, causal: bool
) -> list[tuple[Lane, ...]]:
    """The lanes of all cells that need a run; those of a family run together, the first one first.

    Args:
        tokens: that are traced, of ``length``.
        causal: the decoder's side.
    """
    found: list[tuple[Lane, ...]] = []
    for token in tokens:
        whole = [kind for kind in kinds if kind == "hidden" or severs(kind)]
        for kind in whole:
            part = kind.removeprefix("severed_") if severs(kind) else None
            found += [
                (Lane(((kind, token, layer),), token, layer + 1, part, depth, part is not None, layer),)
                for layer in range(depth - 1)
            ]
        if whole and not causal:
            # Nothing above to sever: the last layer's cells of all these kinds are one.
            cells: tuple[Cell, ...] = tuple((kind, token, depth - 1) for kind in whole)
            found.append((Lane(cells, token, depth, None, depth, False, depth - 1),))
        for kind in kinds:
            if kind not in whole:
                layers = [
                    layer
                    for layer in range(depth)
                    if not causal
                    or _counts(kind, *window_of(layer, window, depth), depth, token == length - 1)
                ]
                found += windowed(kind, token, layers, depth=depth, window=window)
    return found


def _counts(kind: str, low: int, high: int, depth: int, last: bool) -> bool:
    """Whether restoring layers ``low`` to ``high`` of a decoder's token can change anything."""
    seen = last or low < depth - 1
    return seen and not (kind == "attn" and high <= 1)
