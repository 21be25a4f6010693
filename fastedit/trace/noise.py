"""How the subject is corrupted: noise on, or in place of, the embeddings of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.config import check, is_integer, is_number
from fastedit.trace.embeddings import Moments, embedding_width

__all__ = ["Distribution", "Noise"]

Distribution = Literal["gaussian", "uniform", "multivariate", "student"]
_OF_A_CORPUS = ("multivariate", "student")


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
        distribution: ``"gaussian"``; ``"uniform"`` on [-scale, scale]; ``"multivariate"``, Gaussian with the mean and
            the covariance of a corpus' token embeddings; ``"student"``, the same with Student's t distribution.
            The last two have the corpus' scale, so ``sigmas`` is not used.
        degrees: degrees of freedom of ``"student"``, more than 2.
        replace: put the noise in place of the embeddings instead of adding it.
        seed: of the draws.
        redraw: severed runs draw anew for the run that restores, as the published code does; else they share the
            noise of the run that records what is frozen.

    Raises:
        ValueError: a value that breaks its rule, named ``noise.<field>``.
    """

    samples: int = 10
    sigmas: float = 3.0
    scale: float | tuple[float, ...] | None = None
    per_dimension: bool = False
    distribution: Distribution = "gaussian"
    degrees: float = 3.0
    replace: bool = False
    seed: int = 1
    redraw: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.scale, list):
            object.__setattr__(self, "scale", tuple(self.scale))
        samples, seed, scale, known = self.samples, self.seed, self.scale, get_args(Distribution)
        check(is_integer(samples) and samples >= 1, "noise.samples", "be an integer of at least 1", samples)
        ok = self.distribution in known
        check(ok, "noise.distribution", f"be one of {', '.join(known)}", self.distribution)
        ok = is_number(self.sigmas) and self.sigmas > 0
        check(ok, "noise.sigmas", "be a finite number > 0", self.sigmas)
        scales = scale if isinstance(scale, tuple) else () if scale is None else (scale,)
        ok = scale is None or (len(scales) > 0 and all(is_number(x) and x >= 0 for x in scales))
        check(ok, "noise.scale", "be finite and >= 0 (a number, or one per dimension)", scale)
        for name in ("per_dimension", "replace", "redraw"):
            value = getattr(self, name)
            check(isinstance(value, bool), f"noise.{name}", "be True or False", value)
        given = scale is not None
        check(
            not (given and self.per_dimension),
            "noise.per_dimension",
            "be False where noise.scale is given",
            True,
        )
        if self.needs_corpus:
            check(not given, "noise.scale", f"be None for {self.distribution!r}, which has its own", scale)
            check(not self.per_dimension, "noise.per_dimension", f"be False for {self.distribution!r}", True)
        ok = is_number(self.degrees) and self.degrees > 2
        check(ok, "noise.degrees", "be a finite number > 2", self.degrees)
        ok = is_integer(seed) and 0 <= seed < 2**32
        check(ok, "noise.seed", "be an integer from 0 to 2**32 - 1", seed)

    @property
    def needs_corpus(self) -> bool:
        """Whether the rule is measured on a corpus instead of on subjects."""
        return self.distribution in _OF_A_CORPUS

    def scaled(self, arch: ResolvedArch, embeddings: Tensor) -> Tensor:
        """The scale, ``[]`` or ``[d]`` float64 on the CPU.

        Args:
            embeddings: ``[n, d]`` embeddings of subjects, which the standard deviation is measured on.

        Raises:
            ValueError: a scale of another width than the embeddings', or a standard deviation of too few embeddings.
        """
        if self.scale is not None:
            scale = torch.tensor(self.scale, dtype=torch.float64)
            if scale.ndim and len(scale) != (width := embedding_width(arch)):
                raise ValueError(
                    f"noise.scale must have one value or {width}, the embeddings' width, got {len(scale)}"
                )
            return scale
        if self.per_dimension and len(embeddings) < 2:
            raise ValueError(
                "noise.per_dimension needs the embeddings of at least 2 tokens (give more subjects), "
                f"got {len(embeddings)}"
            )
        std = embeddings.std(dim=0) if self.per_dimension else embeddings.std()
        return self.sigmas * std.double().cpu()

    def draw(self, tokens: int, width: int, measured: Tensor | Moments) -> tuple[Tensor, Tensor]:
        """Two draws ``[samples, tokens, width]`` float64; the second differs only with ``redraw``.

        Args:
            measured: the scale, or the moments of a corpus where the rule is of one.
        """
        generator = np.random.RandomState(self.seed)
        shape = (self.samples, tokens, width)
        shaped = self._shaped(measured) if isinstance(measured, Moments) else lambda drawn: drawn * measured

        def one() -> Tensor:
            uniform = self.distribution == "uniform"
            drawn = generator.uniform(-1, 1, shape) if uniform else generator.randn(*shape)
            return shaped(torch.from_numpy(drawn))

        first = one()
        return first, one() if self.redraw else first

    def _shaped(self, moments: Moments) -> _Shaped:
        # The published code's root of the covariance: which root decides the draws, not their distribution.
        _, values, rows = torch.linalg.svd(moments.covariance)
        return _Shaped(rows.mT * values.sqrt(), moments.mean, self.degrees if self._student else None)

    @property
    def _student(self) -> bool:
        return self.distribution == "student"


@dataclass(frozen=True)
class _Shaped:
    """Standard normal draws ``[S, k, d]`` to draws with a mean and a covariance; of Student's t with ``degrees``."""

    root: Tensor  # [d, d], root root^T = covariance
    mean: Tensor
    degrees: float | None

    def __call__(self, drawn: Tensor) -> Tensor:
        found = drawn @ self.root.mT + self.mean
        if self.degrees is None:
            return found
        # A t draw is a normal one over sqrt(u / degrees), u of chi-squared; with degrees - 2 in place of degrees it
        # keeps the covariance. A generator of its own, and one u a token, as published.
        count = drawn.shape[0] * drawn.shape[1]
        u = torch.from_numpy(np.random.RandomState(2).chisquare(self.degrees, count))
        return found * ((self.degrees - 2) / u).sqrt().view(*drawn.shape[:2], 1)
