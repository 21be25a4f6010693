"""The noise of some prompts: given or drawn, checked, and made when it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastedit.engine.encoder_decoder import source_side
from fastedit.session import Session
from fastedit.trace.embeddings import Moments, corpus_moments, embedding_width, subject_embeddings
from fastedit.trace.options import TraceOptions
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.seq2seq_lanes import severs

__all__ = ["Draws", "DrawsGiven"]

DrawsGiven = Sequence[Sequence[Tensor]]


class Draws:
    """Sets of draws ``[samples, subject's tokens, d]`` of prompts: two where severed runs use another.

    Args:
        subjects: whose embeddings the noise is scaled by; ``None``: those of the prompts.
        texts: corpus of the rules that are measured on one, or its moments.
        given: per prompt one or two sets to use as they are.

    Raises:
        ValueError: draws of another number or shape, or not finite; no corpus where the rule needs one.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[TracePrompt],
        options: TraceOptions,
        subjects: Sequence[str] | None = None,
        texts: Iterable[str] | Moments | None = None,
        given: DrawsGiven | None = None,
    ) -> None:
        self._prompts, self._noise = prompts, options.noise
        arch = source_side(session.arch)
        self._width = embedding_width(arch)
        severed = any(severs(kind) for kind in options.kinds)
        self._given: list[tuple[Tensor, ...]] | None = None
        self._drawn: dict[int, tuple[Tensor, ...]] = {}
        self._sets = 2 if severed and self._noise.redraw else 1
        if given is not None:
            if isinstance(given, Tensor) or not isinstance(given, Sequence) or len(given) != len(prompts):
                count = len(given) if isinstance(given, Sequence) else type(given).__name__
                raise ValueError(f"draws must be one per prompt, {len(prompts)}, got {count}")
            self._given = [
                self._checked(prompt, sets)[: 2 if severed else 1]
                for prompt, sets in zip(prompts, given, strict=True)
            ]
            return
        self._measured: Tensor | Moments
        if self._noise.needs_corpus:
            if texts is None or isinstance(texts, str):
                raise ValueError(
                    f"texts must be the texts of a corpus for noise.distribution {self._noise.distribution!r}, "
                    f"got {texts!r}"
                )
            if isinstance(texts, Moments):
                self._measured = texts
            else:
                self._measured = corpus_moments(arch, session.tokenizer, texts)
        else:
            names = [prompt.subject for prompt in prompts] if subjects is None else subjects
            embeddings = subject_embeddings(arch, session.tokenizer, names)
            self._measured = self._noise.scaled(arch, embeddings)

    def sets(self, prompt: int) -> int:
        """Number of sets of draws."""
        return self._sets if self._given is None else len(self._given[prompt])

    def samples(self, prompt: int) -> int:
        """Number of samples of a set."""
        return self._noise.samples if self._given is None else len(self._given[prompt][0])

    def nbytes(self) -> int:
        """Bytes of the largest prompt's noise."""
        tokens = max(prompt.span[1] - prompt.span[0] for prompt in self._prompts)
        samples = max(self.samples(i) for i in range(len(self._prompts)))
        return 8 * samples * tokens * self._width * max(self.sets(i) for i in range(len(self._prompts)))

    def of(self, prompt: int, samples: slice) -> tuple[Tensor, ...]:
        """The sets of some samples of a prompt, float64."""
        if self._given is not None:
            return tuple(drawn[samples].double().cpu() for drawn in self._given[prompt])
        tokens = self._prompts[prompt].span[1] - self._prompts[prompt].span[0]
        if tokens not in self._drawn:
            # The generator starts anew for every prompt, so the draws depend on the number of tokens only.
            self._drawn = {tokens: self._noise.draw(tokens, self._width, self._measured)}
        return tuple(drawn[samples] for drawn in self._drawn[tokens][: self._sets])

    def _checked(self, prompt: TracePrompt, sets: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if isinstance(sets, Tensor) or not isinstance(sets, Sequence) or len(sets) not in (1, 2):
            count = (
                type(sets).__name__
                if isinstance(sets, Tensor) or not isinstance(sets, Sequence)
                else len(sets)
            )
            raise ValueError(f"draws must be one or two tensors a prompt, got {count}")
        wanted = (prompt.span[1] - prompt.span[0], self._width)
        for drawn in sets:
            if not isinstance(drawn, Tensor) or not drawn.is_floating_point():
                kind = drawn.dtype if isinstance(drawn, Tensor) else type(drawn).__name__
                raise ValueError(f"draws must be tensors of floating-point numbers, got {kind}")
            if drawn.ndim != 3 or tuple(drawn.shape[1:]) != wanted or drawn.shape != sets[0].shape:
                raise ValueError(
                    f"draws must be of shape [samples, {wanted[0]}, {wanted[1]}], got {list(drawn.shape)}"
                )
            if not len(drawn):
                raise ValueError(f"draws must hold at least 1 sample, got {list(drawn.shape)}")
            if not bool(torch.isfinite(drawn).all()):
                raise ValueError("draws must be finite, got NaN or infinity")
        return tuple(sets)
