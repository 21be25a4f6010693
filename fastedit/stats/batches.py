"""From a stream of texts to right-padded batches: which rows meet in which batch depends on texts and limits only.

Texts are read in order into windows of a bounded number of tokens; inside a window rows are sorted by length, so that
a batch holds rows of nearly one length and little padding. Because the plan is a function of the texts, a resumed run
meets the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.stats.provenance import CorpusDigest

__all__ = ["Batch", "Window", "read_windows"]

Text = str | Sequence[int]
_CHUNK = 64  # texts tokenised in one call


@dataclass(frozen=True)
class Batch:
    """Rows of a batch: token ids of similar length."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(map(len, self.rows))

    def tensors(self, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(ids [B, S], mask [B, S] bool), padded on the right; the mask is None when there is no padding."""
        width = max(map(len, self.rows))
        ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in self.rows], dtype=torch.int64)
        if all(len(row) == width for row in self.rows):
            return ids.to(device), None
        lengths = torch.tensor([len(row) for row in self.rows])
        mask = torch.arange(width)[None, :] < lengths[:, None]
        return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class Window:
    """A stretch of texts.

    Attributes:
        first: index of its first text in the corpus.
        texts: number of texts it holds.
        tokens_before: tokens of the texts before it.
        batches: its batches; empty for a window that was skipped.
        corpus: digest of all texts up to its end.
    """

    first: int
    texts: int
    tokens_before: int
    batches: tuple[Batch, ...]
    corpus: str


def read_windows(
    texts: Iterable[Text],
    tokenizer: Any,
    *,
    max_length: int,
    batch_tokens: int,
    window_tokens: int,
    token_budget: int | None,
    skip_texts: int = 0,
    skip_tokens: int = 0,
) -> Iterator[Window]:
    """Read texts into windows.

    Args:
        texts: strings, or sequences of token ids that are used as they are.
        tokenizer: of the strings; special tokens that it adds by itself stay.
        max_length: tokens kept of a text.
        batch_tokens: bound on rows x width of a batch; a longer row is a batch by itself.
        window_tokens: a window ends with the chunk of texts that reaches it.
        token_budget: stop after this many tokens, cutting the text that exceeds it; None reads everything.
        skip_texts, skip_tokens: texts at the start that are only hashed, and the tokens they held.

    Raises:
        ValueError: a text is neither a string nor token ids, or the corpus ends inside the texts to skip.
    """
    digest = CorpusDigest()
    stream = iter(texts)
    for index in range(skip_texts):
        try:
            digest.update(next(stream))
        except StopIteration:
            raise ValueError(
                f"texts: has {index} texts, the checkpoint was made after {skip_texts}"
            ) from None
    first, tokens = skip_texts, skip_tokens
    while token_budget is None or tokens < token_budget:
        rows: list[tuple[int, ...]] = []
        before, read = tokens, 0
        while tokens - before < window_tokens and (token_budget is None or tokens < token_budget):
            chunk = _take(stream, _CHUNK)
            if not chunk:
                break
            for text, ids in zip(chunk, _tokenise(chunk, tokenizer, max_length, first + read)):
                if token_budget is not None:
                    if tokens >= token_budget:
                        break
                    ids = ids[: token_budget - tokens]
                digest.update(text)
                read += 1
                tokens += len(ids)
                if ids:
                    rows.append(ids)
        if not read:
            return
        yield Window(first, read, before, tuple(_pack(rows, batch_tokens)), digest.value())
        first += read


def _take(stream: Iterator[Text], number: int) -> list[Text]:
    return [text for _, text in zip(range(number), stream)]


def _tokenise(chunk: list[Text], tokenizer: Any, max_length: int, first: int) -> list[tuple[int, ...]]:
    strings = [text for text in chunk if isinstance(text, str)]
    if strings and tokenizer is None:
        raise ValueError("tokenizer must be given when texts are strings, got None")
    encoded: Iterator[list[int]] = iter(())
    if strings:
        # verbose=False: a text longer than the model takes is cut here, there is nothing to warn about.
        options = {"truncation": True, "max_length": max_length, "padding": False, "verbose": False}
        encoded = iter(tokenizer(strings, return_attention_mask=False, **options)["input_ids"])
    rows: list[tuple[int, ...]] = []
    for index, text in enumerate(chunk):
        if isinstance(text, str):
            rows.append(tuple(next(encoded)))
        elif isinstance(text, Sequence) and all(isinstance(i, int) and i >= 0 for i in text):
            rows.append(tuple(int(i) for i in text[:max_length]))
        else:
            raise ValueError(
                f"texts[{first + index}]: must be a string or a list of token ids, got {text!r:.60}"
            )
    return rows


def _pack(rows: list[tuple[int, ...]], batch_tokens: int) -> Iterator[Batch]:
    """Batches of rows sorted by length (stable: equal lengths keep their order), rows x width <= batch_tokens."""
    batch: list[tuple[int, ...]] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) + 1) * len(row) > batch_tokens:
            yield Batch(tuple(batch))
            batch = []
        batch.append(row)
    if batch:
        yield Batch(tuple(batch))
