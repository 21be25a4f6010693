"""Perplexity of the session's model on plain texts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastedit.arch import position_limit
from fastedit.evaluate.scoring import score_targets
from fastedit.tokens import Encoded

if TYPE_CHECKING:
    from fastedit.session import Session

__all__ = ["perplexity"]

_LONGEST = 1024


def perplexity(
    session: Session, texts: Iterable[str], *, max_length: int | None = None, batch_tokens: int = 4096
) -> float:
    """exp(mean negative log-likelihood per token) over all texts together (not a mean of perplexities).

    Each text is tokenised with the tokenizer's special tokens and cut into windows of at most max_length
    tokens (default: the model's context, at most 1024). Inside a text windows overlap by one token, so every
    token but the first of the text is predicted once, from the tokens of its own window.
    Raises ValueError for max_length < 2 or above the model's number of positions, or when no text has two tokens.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string")
    limit = position_limit(session.arch)
    length = min(limit or _LONGEST, _LONGEST) if max_length is None else max_length
    if length < 2:
        raise ValueError(f"max_length must be >= 2, got {length}")
    if limit is not None and length > limit:
        raise ValueError(f"max_length must be <= {limit}, the model's number of positions, got {length}")
    windows: list[Encoded] = []
    for text in texts:
        ids = tuple(session.tokenizer(text)["input_ids"])
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            windows.append(Encoded(ids=window[:-1], lookup=0, target_start=0, target=window[1:]))
    if not windows:
        raise ValueError("texts must hold at least one text of two tokens or more")
    scores = score_targets(session, windows, batch_tokens=batch_tokens)
    return math.exp(-sum(score.log_prob for score in scores) / sum(score.tokens for score in scores))
