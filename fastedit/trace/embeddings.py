"""Embeddings that noise is measured on: of subjects, and of the tokens of a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastedit.arch import ResolvedArch

__all__ = ["Moments", "corpus_moments", "embedding_width", "subject_embeddings"]

_TOKENS = 4096  # embedded at a time


@dataclass(frozen=True)
class Moments:
    """Mean ``[d]`` and covariance ``[d, d]`` (unbiased) of a corpus' token embeddings, float64."""

    mean: Tensor
    covariance: Tensor


def embedding_width(arch: ResolvedArch) -> int:
    """Width of the token embeddings: not the stream's where a model projects them (OPT-350m)."""
    weight: Tensor = arch.embed.weight  # type: ignore[assignment]
    return weight.shape[1]


def subject_embeddings(
    arch: ResolvedArch, tokenizer: PreTrainedTokenizerBase, subjects: Sequence[str]
) -> Tensor:
    """``[n, d]`` embeddings of all tokens of the subjects, special tokens included, as the published code takes them.

    Raises ValueError for no subjects, blank ones, or embeddings that are not finite.
    """
    texts = [subjects] if isinstance(subjects, str) else list(subjects)
    if not texts or not all(isinstance(subject, str) and subject.strip() for subject in texts):
        raise ValueError(f"subjects must be one or more strings that are not blank, got {texts!r}")
    found = _embedded(arch, [number for text in texts for number in tokenizer(text)["input_ids"]])
    if not bool(found.isfinite().all()):
        raise ValueError("model: the embeddings of the subjects must be finite, got NaN or infinity")
    return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found


def corpus_moments(arch: ResolvedArch, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Moments:
    """Mean and covariance of the embeddings of all tokens of the texts.

    Only how often a token occurs matters, so each is embedded once. Raises ValueError for fewer than two tokens.
    """
    counts: Counter[int] = Counter()
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts must hold strings, got {text!r}")
        counts.update(tokenizer(text)["input_ids"])
    if counts.total() < 2:
        raise ValueError(f"texts must hold at least 2 tokens, got {counts.total()}")
    width, total = embedding_width(arch), float(counts.total())
    mean, second = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    ids = sorted(counts)
    parts = [ids[first : first + _TOKENS] for first in range(0, len(ids), _TOKENS)]
    for part in parts:
        weights = torch.tensor([counts[i] for i in part], dtype=torch.float64)
        mean += weights @ _embedded(arch, part).double().cpu() / total
    for part in parts:
        weights = torch.tensor([counts[i] for i in part], dtype=torch.float64)
        away = _embedded(arch, part).double().cpu() - mean
        second += (away * weights[:, None]).T @ away
    if not bool(second.isfinite().all()):
        raise ValueError("model: the embeddings of the texts must be finite, got NaN or infinity")
    return Moments(mean, second / (total - 1))


def _embedded(arch: ResolvedArch, ids: Sequence[int]) -> Tensor:
    """``[n, d]``, through the module: some families scale what they look up."""
    weight: Tensor = arch.embed.weight  # type: ignore[assignment]
    with torch.no_grad():
        found: Tensor = arch.embed(torch.tensor(list(ids), device=weight.device)[None])[0]
    return found
