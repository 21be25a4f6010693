"""Floating-point operations of the locate-then-edit engines and of their twins, counted on a bench's own token rows.

A token costs P multiply-adds in a block (P: the block's weights, 12 d^2 here) and H = V d in the head; a backward to
activations costs what the forward of the blocks it passes costs. Attention scores, norms and elementwise work (under
3 % at these lengths) are left out of both sides. With L blocks, an injection at block l, n texts and target t:

    twin    forward   (L P + H) x (n + 1) x padded length           backward  ((L - 1 - l) P + H) x the same
    ours    forward   (L - 1 - l) P x tokens from the lookup token on + H x loss rows,   backward the same, and once
            P x (L x tokens before the lookup token, prefixes that texts share counted once + (l + 1) x tokens after)

The last block's queries, output projection and MLP (10 d^2 of 12) are due at loss rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reference.target_vector import Request

__all__ = ["Flops", "padded_tokens"]

_LAST = 10 / 12  # share of a block that is due at loss rows only when it is the last


def padded_tokens(request: Request) -> int:
    """Tokens of the twin's batch of one request, padding and KL row included."""
    longest = max(max(map(len, request.rows)) + len(request.target) - 1, len(request.kl_row))
    return (len(request.rows) + 1) * longest


def _distinct(rows: Iterable[Sequence[int]]) -> int:
    """Tokens left when shared beginnings are counted once: nodes of the rows' trie."""
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


@dataclass(frozen=True)
class Flops:
    """Sizes of a GPT-2 or GPT-J: blocks, width, vocabulary; every count below is in flops (two a multiply-add)."""

    depth: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Flops:
        return cls(config.n_layer, config.n_embd, config.vocab_size)

    @property
    def block(self) -> float:
        return 2.0 * 12 * self.width**2

    @property
    def head(self) -> float:
        return 2.0 * self.vocabulary * self.width

    def twin_targets(self, requests: Sequence[Request], layer: int, steps: int) -> float:
        tokens = sum(map(padded_tokens, requests))
        forward = self.depth * self.block + self.head
        backward = (self.depth - 1 - layer) * self.block + self.head
        return tokens * (steps * forward + (steps - 1) * backward)

    def twin_keys(self, requests: Sequence[Request], layers: int, *, bare: bool = True) -> float:
        """Keys from all texts and, if `bare`, activations from the bare prompt, both by full forwards per layer."""
        tokens = sum(len(r.rows) * max(map(len, r.rows)) + bare * len(r.rows[0]) for r in requests)
        return layers * tokens * (self.depth * self.block + self.head)

    def our_step(self, requests: Sequence[Request], layer: int) -> float:
        """One forward of the suffixes of all requests; a backward costs the same."""
        above = self.depth - 1 - layer
        loss_rows = sum(len(r.rows) * len(r.target) + 1 for r in requests)
        return (
            self.block * ((above - _LAST) * _suffix_tokens(requests) + _LAST * loss_rows)
            + self.head * loss_rows
        )

    def our_setup(self, requests: Sequence[Request], layer: int) -> float:
        prefixes = [row[:at] for r in requests for row, at in _rows(r)]
        return self.block * (self.depth * _distinct(prefixes) + (layer + 1) * _suffix_tokens(requests))

    def our_targets(self, requests: Sequence[Request], layer: int, steps: int) -> float:
        return self.our_setup(requests, layer) + (2 * steps - 1) * self.our_step(requests, layer)

    def our_sweep(self, requests: Sequence[Request], layers: Sequence[int]) -> float:
        """Texts up to the lookup token through the edited blocks once; bare prompts from each of them to the last."""
        last = layers[-1]
        texts = _distinct(row[: at + 1] for r in requests for row, at in zip(r.rows, r.lookup, strict=True))
        bare = _distinct(r.rows[0][: r.lookup[0] + 1] for r in requests)
        return self.block * ((last + 1) * texts + sum(last - layer for layer in layers) * bare)

    def twin_equations(self, edits: int, layers: int) -> float:
        f, d = 4.0 * self.width, float(self.width)
        return layers * (2 * f**3 / 3 + 4 * f**2 * edits + 2 * edits * f * d)

    def our_equations(self, edits: int, layers: int) -> float:
        """Two triangular solves with a cached factor, the n x n system, the factors' product."""
        f, d, n = 4.0 * self.width, float(self.width), float(edits)
        return layers * (2 * f**2 * n + 2 * n**2 * f + n**3 / 3 + 2 * n**2 * min(f, d) + 2 * n * f * d)


def _rows(request: Request) -> list[tuple[list[int], int]]:
    """Token rows of the target search with their lookup tokens; of the KL prompt only the lookup token is due."""
    full = [row + request.target[:-1] for row in request.rows]
    kl = (request.kl_row[: request.kl_lookup + 1], request.kl_lookup)
    return [*zip(full, request.lookup, strict=True), kl]


def _suffix_tokens(requests: Sequence[Request]) -> int:
    return sum(len(row) - at for request in requests for row, at in _rows(request))
