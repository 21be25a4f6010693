"""Packs documents into rows of equal length, with loss weights, subject spans and two-hop marks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastedit.world.corpus import Sentence, documents
from fastedit.world.facts import Facts

__all__ = ["Batch", "Encoder", "batches"]

_WEIGHT_ANSWER, _WEIGHT_PROMPT, _WEIGHT_FILLER = 1.0, 0.3, 0.1


@dataclass
class Batch:
    """`ids` [B, T] int64, `weights` [B, T] of predicting each token, `hops` [B, T] bool = tokens of two-hop questions,
    subject `spans` (first, last) per row, `recall` [B, T] int64 = the token that the middle layers should name, or -1.

    `recall` is, where a fact's object is about to start, its first token; where a two-hop answer is being written, the
    first token of the entity in the middle.
    """

    ids: Tensor
    weights: Tensor
    hops: Tensor
    recall: Tensor
    spans: list[list[tuple[int, int]]]


class Encoder:
    """Encodes sentences piece by piece (cached): the pieces' ids are the ids of the whole text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._cache: dict[str, list[int]] = {}
        self._stop = int(tokenizer.convert_tokens_to_ids("."))  # type: ignore[arg-type]

    def ids(self, text: str) -> list[int]:
        """Token ids of one piece of text, empty for an empty one."""
        if text not in self._cache:
            self._cache[text] = self._encode(text).ids if text else []
        return self._cache[text]

    def sentence(self, s: Sentence) -> tuple[list[int], list[float], tuple[int, int] | None]:
        """Token ids, loss weights and the subject's (first, last) token."""
        prompt = self.ids(s.prompt)
        if not s.answer:
            return prompt, [_WEIGHT_FILLER] * len(prompt), None
        answer = self.ids(s.answer)
        ids = [*prompt, *answer, self._stop]
        weights = [_WEIGHT_PROMPT] * len(prompt) + [_WEIGHT_ANSWER] * len(answer) + [_WEIGHT_PROMPT]
        if s.subject is None:
            return ids, weights, None
        start = s.prompt.index(s.subject)
        first = len(self.ids(s.prompt[:start].rstrip()))
        last = len(self.ids(s.prompt[: start + len(s.subject)])) - 1
        return ids, weights, (first, last)

    def recalled(self, s: Sentence) -> list[tuple[int, int]]:
        """(place in the sentence, token) pairs that `Batch.recall` holds."""
        if not s.answer:
            return []
        last = len(self.ids(s.prompt)) - 1
        if s.bridge is None:
            return [(last, self.ids(s.answer)[0])]
        return [(last + i, self.ids(s.bridge)[0]) for i in range(len(self.ids(s.answer)))]


def batches(
    facts: Facts, tokenizer: PreTrainedTokenizerFast, *, seed: int, rows: int, width: int, p_hop: float
) -> Iterator[Batch]:
    """Endless training batches. A row starts at the start of a document, half of the time with the end-of-text token
    in front; what does not fit at its end is cut."""
    encoder = Encoder(tokenizer)
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    rng = random.Random(seed)
    source = documents(facts, seed, p_hop=p_hop)
    while True:
        ids = torch.zeros(rows, width, dtype=torch.long)
        weights = torch.zeros(rows, width)
        hops = torch.zeros(rows, width, dtype=torch.bool)
        recall = torch.full((rows, width), -1)
        all_spans: list[list[tuple[int, int]]] = []
        for i in range(rows):
            row: list[int] = [end] if rng.random() < 0.5 else []
            row_weights = [_WEIGHT_FILLER] * len(row)
            spans: list[tuple[int, int]] = []
            while len(row) < width:
                for s in next(source):
                    piece, piece_weights, span = encoder.sentence(s)
                    if span is not None:
                        spans.append((span[0] + len(row), span[1] + len(row)))
                    if s.bridge is not None:
                        hops[i, len(row) : len(row) + len(piece)] = True
                    for place, token in encoder.recalled(s):
                        if place + len(row) < width:
                            recall[i, place + len(row)] = token
                    row += piece
                    row_weights += piece_weights
                row.append(end)
                row_weights.append(_WEIGHT_FILLER)
            ids[i] = torch.tensor(row[:width])
            weights[i] = torch.tensor(row_weights[:width])
            all_spans.append([s for s in spans if s[1] < width])
        yield Batch(ids, weights, hops, recall, all_spans)
