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

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.encoder_decoder import Decoder, Encoder, Encodings, decoder_start
from fastedit.engine.fused import fused_activations
from fastedit.forward import evaluating
from fastedit.session import Session
from fastedit.trace.budget import combined
from fastedit.trace.causal import TraceOptions, noises_of
from fastedit.trace.lanes import Lane
from fastedit.trace.neurons_clean import last_layer_probability
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.result import CausalTrace
from fastedit.trace.seq2seq_budget import SideBudget
from fastedit.trace.seq2seq_lanes import severs, side_families
from fastedit.trace.seq2seq_sweep import DecoderSide, EncoderSide, Side

__all__ = ["decoder_ids", "trace_seq2seq"]

_HEAD_ROWS = 128


def decoder_ids(session: Session, prefix: str | None) -> tuple[int, ...]:
    """The decoder's input: its start token and the prefix's tokens.

    Raises ValueError for a prefix without tokens, or a model whose configuration names no start token.
    """
    start = decoder_start(session.arch)
    if prefix is None:
        return (start,)
    ids = session.tokenizer.encode(prefix, add_special_tokens=False)
    if not ids:
        raise ValueError(f"decoder_prefix must have at least one token, got {prefix!r}")
    return (start, *ids)


def trace_seq2seq(
    session: Session,
    prompts: Sequence[TracePrompt],
    options: TraceOptions,
    *,
    subjects: Sequence[str] | None = None,
    draws: Sequence[Sequence[Tensor]] | None = None,
) -> list[CausalTrace]:
    """`fastedit.trace.causal.trace_prompts` for an encoder-decoder, with the same arguments.

    With ``side="decoder"`` a trace's tokens are the decoder's, and its ``subject_range`` is empty.

    Raises:
        ValueError: no prompts, draws of another shape, a prefix without tokens, or a clean run that gives NaN.
    """
    if not prompts:
        raise ValueError("prompts: at least one is needed, got 0")
    behind = decoder_ids(session, options.decoder_prefix)
    encoder = Encoder(session.arch, 1).arch
    noises = noises_of(session, encoder, prompts, options, subjects, draws)
    names = {kind.removeprefix("severed_") for kind in options.kinds if kind != "hidden"}
    arch = session.arch if options.side == "decoder" else encoder
    found = []
    with evaluating(session.model), fused_activations(session.arch):
        for prompt, sets in zip(prompts, noises, strict=True):
            samples = len(sets[0])
            budget = SideBudget.of(arch, session.arch, options.memory, len(names), len(prompt), len(behind))
            step = max(1, min(samples, (budget.kept // len(prompt) - 1) // len(sets)))
            parts = []
            for start in range(0, samples, step):
                some = tuple(rows[start : start + step] for rows in sets)
                one = _One(session, prompt, behind, some, options, sorted(names), budget)
                parts.append((len(some[0]), one.trace()))
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
        answer, predicted, high, low = self._plain()
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
        found: dict[tuple[str, int, int], list[Tensor]] = {}
        for lanes, samples, chosen in self._groups(families, length):
            finals = side.finals(lanes, samples, chosen)
            last = finals[:, -1] if decoder else self._decoded(self._encoder.states(finals))
            p = self._probabilities(last, answer).split(len(samples))
            for lane, part in zip(lanes, p, strict=True):
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
            correct_prediction=predicted == answer,
            low_score=low[0],
            high_score=high,
            window=options.window,
            scores=scores,
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

    def _plain(self) -> tuple[int, int, float, list[float]]:
        """The answer, the clean run's prediction, its probability, and the corrupted one's by set of draws."""
        with torch.no_grad():
            logits = self._session.arch.logits(self._final[:1])[0]
        if bool(logits.isnan().any()) or not bool(logits.isfinite().any()):
            raise ValueError(
                f"model: the clean run of the prompt must be finite, got NaN for {self._prompt.text!r}"
            )
        predicted = int(logits.argmax())
        answer = predicted if self._prompt.answer is None else self._prompt.answer
        p = self._probabilities(self._final, answer)
        return (
            answer,
            predicted,
            float(p[0]),
            [float(rows.mean()) for rows in p[1:].split(len(self._sets[0]))],
        )

    def _probabilities(self, hidden: Tensor, answer: int) -> Tensor:
        """``[n]`` float64 on the CPU."""
        with torch.no_grad():
            found = [
                last_layer_probability(self._session.arch, rows, torch.full((len(rows),), answer))
                for rows in hidden.split(_HEAD_ROWS)
            ]
        return torch.cat(found).double().cpu()

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
