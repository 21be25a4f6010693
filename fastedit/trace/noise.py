"""How the subject is corrupted: noise on, or in place of, the embeddings of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastedit.arch import ResolvedArch

__all__ = ["Noise", "subject_embeddings"]

Distribution = Literal["gaussian", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A rule that gives noise for a number of tokens.

    The draws are those of the published code for the same seed: numpy's legacy generator, float64, shape
    ``[samples, tokens, width]``, started anew for every prompt.

    Attributes:
        samples: corrupted runs whose probabilities are averaged.
        sigmas: scale in standard deviations of the embeddings of subjects (arXiv:2202.05262, appendix B.1: 3).
        scale: scale itself, instead of ``sigmas``: a number, or one per dimension.
        per_dimension: measure a standard deviation per dimension instead of one over all of them.
        distribution: ``"gaussian"``, or ``"uniform"`` on [-scale, scale].
        replace: put the noise in place of the embeddings instead of adding it.
        seed: of the draws.
        redraw: severed runs draw anew for the run that restores, as the published code does; else they share the
            noise of the run that records what is frozen.
    """

    samples: int = 10
    sigmas: float = 3.0
    scale: float | tuple[float, ...] | None = None
    per_dimension: bool = False
    distribution: Distribution = "gaussian"
    replace: bool = False
    seed: int = 1
    redraw: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"noise.samples must be an integer of at least 1, got {self.samples!r}")
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"noise.distribution must be one of {', '.join(get_args(Distribution))}, got {self.distribution!r}"
            )
        if not _positive(self.sigmas):
            raise ValueError(f"noise.sigmas must be a finite number > 0, got {self.sigmas!r}")
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if self.scale is not None and not all(_not_negative(value) for value in scales):
            raise ValueError(f"noise.scale must be finite and >= 0, got {self.scale!r}")
        if self.scale is not None and self.per_dimension:
            raise ValueError("noise.per_dimension must be False where noise.scale is given, got True")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"noise.seed must be an integer from 0 to 2**32 - 1, got {self.seed!r}")

    def scaled(self, arch: ResolvedArch, embeddings: Tensor) -> Tensor:
        """The scale, ``[]`` or ``[d]`` float64 on the CPU.

        Args:
            embeddings: ``[n, d]`` embeddings of subjects, which the standard deviation is measured on.

        Raises:
            ValueError: a scale of another width than the model's, or a standard deviation of too few embeddings.
        """
        if self.scale is not None:
            scale = torch.tensor(self.scale, dtype=torch.float64)
            if scale.ndim and len(scale) != arch.width:
                raise ValueError(
                    f"noise.scale must have one value or {arch.width}, the model's width, got {len(scale)}"
                )
            return scale
        if self.per_dimension and len(embeddings) < 2:
            raise ValueError(
                "noise.per_dimension needs the embeddings of at least 2 tokens (give more subjects), "
                f"got {len(embeddings)}"
            )
        std = embeddings.std(dim=0) if self.per_dimension else embeddings.std()
        return self.sigmas * std.double().cpu()

    def draw(self, tokens: int, width: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Two draws ``[samples, tokens, width]`` float64; the second differs only with ``redraw``."""
        generator = np.random.RandomState(self.seed)
        shape = (self.samples, tokens, width)

        def one() -> Tensor:
            uniform = self.distribution == "uniform"
            drawn = generator.uniform(-1, 1, shape) if uniform else generator.randn(*shape)
            return torch.from_numpy(drawn) * scale

        first = one()
        return first, one() if self.redraw else first


def subject_embeddings(
    arch: ResolvedArch, tokenizer: PreTrainedTokenizerBase, subjects: Sequence[str]
) -> Tensor:
    """``[n, d]`` embeddings of all tokens of the subjects, special tokens included, as the published code takes them.

    Raises ValueError for no subjects, or blank ones.
    """
    if not subjects or not all(isinstance(subject, str) and subject.strip() for subject in subjects):
        raise ValueError(f"subjects must be one or more strings that are not blank, got {list(subjects)!r}")
    ids = [number for subject in subjects for number in tokenizer(subject)["input_ids"]]
    weight: Tensor = arch.embed.weight  # type: ignore[assignment]
    with torch.no_grad():
        # Through the module: some families scale what they look up.
        found: Tensor = arch.embed(torch.tensor(ids, device=weight.device)[None])[0]
    return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _not_negative(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
