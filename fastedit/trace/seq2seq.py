"""Causal tracing of encoder-decoder models (T5).

The prompt is the encoder's input, special tokens included. In the corrupted runs the embeddings of the subject's
tokens carry noise in the encoder. The answer is what the decoder gives behind its start token, or behind a forced
prefix such as ``<extra_id_0>``: a model that was trained on spans only says the sentinel first. A cell then restores

- ``side="encoder"``: the clean state of source token t at encoder layer l (a window of layers for ``"mlp"`` and
  ``"attn"``), in an otherwise corrupted run. Attention there is bidirectional: all tokens of all layers above change.
- ``side="decoder"``: the same at the decoder's tokens, whose cross-attention reads the corrupted encoder; ``"cross"``
  restores the output of the cross-attention.

What is not computed: encoder layers below a cell; the first block of a window, which is run once for all tokens;
keys and values of encodings that only a few decoder tokens look at (see `fastedit.engine.encoder_decoder`); in the
decoder tokens before the cell's; the head but for the last token. Results equal those of full runs to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.encoder_decoder import Decoder, Encoder, Encodings, source_side
from fastedit.engine.fused import fused_activations
from fastedit.forward import evaluating
from fastedit.session import Session
from fastedit.trace.budget import combined
from fastedit.trace.draws import Draws, DrawsGiven
from fastedit.trace.embeddings import Moments
from fastedit.trace.head import check_restored, plain, probabilities
from fastedit.trace.lanes import Cell, Lane
from fastedit.trace.options import TraceOptions
from fastedit.trace.prompts import TracePrompt, decoder_ids
from fastedit.trace.result import CausalTrace
from fastedit.trace.seq2seq_budget import SideBudget
from fastedit.trace.seq2seq_lanes import severs, side_families
from fastedit.trace.seq2seq_sweep import DecoderSide, EncoderSide, Side

__all__ = ["trace_seq2seq"]


def trace_seq2seq(
    session: Session,
    prompts: Sequence[TracePrompt],
    options: TraceOptions,
    *,
    subjects: Sequence[str] | None = None,
    texts: Iterable[str] | Moments | None = None,
    draws: DrawsGiven | None = None,
) -> list[CausalTrace]:
    """`fastedit.trace.causal.trace_prompts` for an encoder-decoder, with the same arguments.

    With ``side="decoder"`` a trace's tokens are the decoder's, and its ``subject_range`` is empty.

    Raises:
        ValueError: no prompts, malformed draws or ones that are not finite, a prefix without tokens, or a run that
            gives NaN or infinity.
    """
    if not prompts:
        raise ValueError("prompts: at least one is needed, got 0")
    behind = decoder_ids(session, options.decoder_prefix)
    noise = Draws(session, prompts, options, subjects, texts, draws)
    names = sorted({kind.removeprefix("severed_") for kind in options.kinds if kind != "hidden"})
    arch = session.arch if options.side == "decoder" else source_side(session.arch)
    found = []
    with evaluating(session.model), fused_activations(session.arch):
        for index, prompt in enumerate(prompts):
            sets, samples = noise.sets(index), noise.samples(index)
            budget = SideBudget.of(
                arch,
                session.arch,
                options.memory,
                parts=len(names),
                source=len(prompt),
                behind=len(behind),
                noise=noise.nbytes(),
            )
            step = max(1, (budget.kept // len(prompt) - 1) // sets)
            parts = []
            for start in range(0, samples, step):
                drawn = noise.of(index, slice(start, min(start + step, samples)))
                one = _One(session, prompt, behind, drawn, options, names, budget)
                parts.append((len(drawn[0]), one.trace()))
            found.append(combined(parts))
    return found


class _One:
    """One prompt with some samples."""

    def __init__(
        self,
        session: Session,
        prompt: TracePrompt,
        behind: tuple[int, ...],
        sets: tuple[Tensor, ...],
        options: TraceOptions,
        parts: Sequence[str],
        budget: SideBudget,
    ) -> None:
        self._session, self._prompt, self._sets, self._options = session, prompt, sets, options
        self._behind, self._budget = behind, budget
        self._on_decoder = options.side == "decoder"
        arch = session.arch
        encoder = Encoder(arch, len(prompt))
        self._encoder, self._decoder = encoder, Decoder(arch, len(behind))
        samples = len(sets[0])
        source = EncoderSide(encoder, () if self._on_decoder else parts, samples)
        source.record(self._embedded(encoder.arch))
        states = encoder.states(source.hidden[-1])
        self._side: Side = source
        with torch.no_grad():
            embedded = arch.embed(torch.tensor([behind], device=_device(arch)))
        self._start: Tensor = embedded  # [1, D, d]
        if self._on_decoder:
            self._side = DecoderSide(self._decoder, states, parts, samples)
            self._side.record(embedded.expand(len(states), -1, -1))
            self._final = self._side.hidden[-1][:, -1]
        else:
            self._final = self._decoded(states)

    def trace(self) -> CausalTrace:
        """All cells."""
        prompt, options, side = self._prompt, self._options, self._side
        counts = [len(drawn) for drawn in self._sets]
        read = plain(self._session.arch, [prompt], [counts], self._final[:1], self._final[1:])
        (answer,), (high,), (low,) = read.answers, read.high, read.low
        decoder = self._on_decoder
        depth, length = side.arch.depth, len(self._behind if decoder else prompt)
        tokens = tuple(range(length)) if options.tokens == "all" else (prompt.span[1] - 1,)
        scores = {}
        for kind in options.kinds:
            severed = severs(kind)
            grid = np.full((len(tokens), depth), low[-1 if severed else 0])
            # Restoring the decoder's last layer is seen at its last token only; nothing is above it to sever.
            grid[:, depth - 1] = low[0]
            if decoder and (kind == "hidden" or severed):
                grid[-1, depth - 1] = high
            scores[kind] = grid
        families = side_families(
            options.kinds, tokens, depth=depth, length=length, window=options.window, causal=decoder
        )
        found: dict[Cell, list[Tensor]] = {}
        for lanes, samples, chosen in self._groups(families, length):
            finals = side.finals(lanes, samples, chosen)
            last = finals[:, -1] if decoder else self._decoded(self._encoder.states(finals))
            p = probabilities(self._session.arch, last, [answer] * len(last)).split(len(samples))
            for lane, part in zip(lanes, p, strict=True):
                check_restored(part, *lane.cells[0], prompt.text)
                for cell in lane.cells:
                    found.setdefault(cell, []).append(part)
        for (kind, token, layer), pieces in found.items():
            scores[kind][tokens.index(token), layer] = float(torch.cat(pieces).mean())
        tokenizer = self._session.tokenizer
        return CausalTrace(
            prompt=prompt.text,
            subject=prompt.subject,
            input_ids=self._behind if decoder else prompt.ids,
            input_tokens=tuple(tokenizer.decode([i]) for i in self._behind) if decoder else prompt.tokens,
            subject_range=(0, 0) if decoder else prompt.span,
            traced=tokens,
            answer_id=answer,
            answer=tokenizer.decode([answer]),
            correct_prediction=read.predicted[0] == answer,
            low_score=low[0],
            high_score=high,
            window=options.window,
            scores=scores,
            engine="rows of one length",
        )

    def _embedded(self, arch: ResolvedArch) -> Tensor:
        """``[1 + sets * samples, T, d]`` embeddings of the clean row and the corrupted ones."""
        first, end = self._prompt.span
        with torch.no_grad():
            clean = arch.embed(torch.tensor([self._prompt.ids], device=_device(arch)))
        noise = torch.cat(self._sets).to(clean.device)
        rows = clean.repeat(1 + len(noise), 1, 1)
        at = rows[1:, first:end]
        # Added in double precision and rounded once, as published.
        rows[1:, first:end] = (noise if self._options.noise.replace else at.double() + noise).to(rows.dtype)
        return rows

    def _decoded(self, states: Tensor) -> Tensor:
        """``[n, d]`` last decoder block's output at the last token, for encodings ``[n, T, d]``."""
        found = []
        with torch.no_grad(), self._decoder.running():
            for some in states.split(self._budget.decoded):
                hidden, encodings = self._start.expand(len(some), -1, -1), Encodings(some)
                for layer in range(self._decoder.arch.depth):
                    hidden, _ = self._decoder.block(layer, hidden, encodings)
                found.append(hidden[:, -1])
        return torch.cat(found)

    def _groups(
        self, families: Sequence[tuple[Lane, ...]], length: int
    ) -> Iterator[tuple[list[Lane], range, int]]:
        """Lanes that run together, with their samples and set of draws: families undivided, within the memory."""
        sets: dict[tuple[int, int], list[tuple[Lane, ...]]] = {}
        for family in families:
            lane = family[0]
            # In a decoder lanes of one token have one length.
            token = lane.token if self._on_decoder else 0
            chosen = len(self._sets) - 1 if lane.frozen else 0
            sets.setdefault((token, chosen), []).append(family)
        every = range(len(self._sets[0]))
        for (token, chosen), listed in sets.items():
            group: list[Lane] = []
            for family in sorted(listed, key=lambda family: -family[0].start):
                cost = (length - token) * len(family)
                if (step := max(1, self._budget.run // cost)) < len(every):
                    for start in range(0, len(every), step):
                        yield list(family), every[start : start + step], chosen
                    continue
                if group and (len(group) + len(family)) * (length - token) * len(every) > self._budget.run:
                    yield group, every, chosen
                    group = []
                group += family
            if group:
                yield group, every, chosen


def _device(arch: ResolvedArch) -> torch.device:
    weight: Tensor = arch.embed.weight  # type: ignore[assignment]
    return weight.device
