"""What part a token plays in a fact: averages over prompts of different lengths go by these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["ROLES", "by_role", "role_of"]

# As in the figures of arXiv:2202.05262.
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


def role_of(token: int, span: tuple[int, int], length: int) -> int | None:
    """Place in ROLES of a token of a prompt; None before the subject, where restoring changes nothing.

    A subject of one token has only a last one; the prompt's last token is that and nothing else, unless it is the
    subject's. Where there is no subject (an empty span: a decoder's tokens), the others are further tokens.
    """
    first, end = span
    if first == end:
        return 5 if token == length - 1 else 4
    if token < first:
        return None
    if token < end:
        return 2 if token == end - 1 else 0 if token == first else 1
    if token == length - 1:
        return 5
    return 3 if token == end else 4


def by_role(grid: np.ndarray, traced: Sequence[int], span: tuple[int, int], length: int) -> np.ndarray:
    """``[len(ROLES), layers]`` mean over the tokens of each role of ``grid [len(traced), layers]``; NaN for none."""
    found = np.full((len(ROLES), grid.shape[1]), np.nan)
    roles = [role_of(token, span, length) for token in traced]
    for role in range(len(ROLES)):
        rows = [row for row, own in enumerate(roles) if own == role]
        if rows:
            found[role] = grid[rows].mean(axis=0)
    return found
