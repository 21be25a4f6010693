"""Causal tracing: where in a model restoring one state brings the answer back (Meng et al. 2022, arXiv:2202.05262)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastedit.engine.attention import not_handed_over
from fastedit.engine.encoder_decoder import is_encoder_decoder
from fastedit.forward import evaluating
from fastedit.session import Session
from fastedit.trace.base import Base
from fastedit.trace.budget import Budget, combined, jobs_of
from fastedit.trace.draws import Draws, DrawsGiven
from fastedit.trace.embeddings import Moments
from fastedit.trace.grid import Grid
from fastedit.trace.head import plain, probabilities
from fastedit.trace.lanes import Lane
from fastedit.trace.options import TraceOptions
from fastedit.trace.padded import padded_traces
from fastedit.trace.prompts import TracePrompt, decoder_ids
from fastedit.trace.result import CausalTrace
from fastedit.trace.seq2seq import trace_seq2seq
from fastedit.trace.sweep import Run, Sweep, grouped

__all__ = ["TraceOptions", "check_model", "trace_prompts"]


def check_model(session: Session, options: TraceOptions) -> None:
    """Make sure, before any work, that a model can be traced and takes the options.

    Raises:
        ValueError: an option that the model has no use for, or a decoder's prefix without tokens.
        NotImplementedError: a masked language model.
    """
    arch = session.arch
    if is_encoder_decoder(arch):
        decoder_ids(session, options.decoder_prefix)
        return
    for name in ("side", "decoder_prefix"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"{name} must be None for a model that is no encoder-decoder, got {value!r}")
    if arch.row.side == "encoder":
        raise NotImplementedError(
            f"model: causal tracing needs a causal language model, got {type(arch.model).__name__}"
        )


def trace_prompts(
    session: Session,
    prompts: Sequence[TracePrompt],
    options: TraceOptions | None = None,
    *,
    subjects: Sequence[str] | None = None,
    texts: Iterable[str] | Moments | None = None,
    draws: DrawsGiven | None = None,
) -> list[CausalTrace]:
    """Trace prompts, many cells of all of them at a time.

    Args:
        subjects: whose embeddings the noise is scaled by; ``None``: those of the prompts.
        texts: corpus that the ``"multivariate"`` and ``"student"`` noise is measured on, or its `corpus_moments`.
        draws: per prompt one or two sets ``[samples, subject's tokens, d]`` of noise to use as they are, in place of
            ``options.noise``'s draws (``options.noise.replace`` still says how); the second set is for severed kinds.

    Raises:
        ValueError: no prompts, malformed draws or ones that are not finite, a run that gives NaN or infinity, or what
            `check_model` refuses.
        NotImplementedError: a masked language model.
    """
    options = options or TraceOptions()
    check_model(session, options)
    arch = session.arch
    if is_encoder_decoder(arch):
        return trace_seq2seq(session, prompts, options, subjects=subjects, texts=texts, draws=draws)
    if not prompts:
        raise ValueError("prompts: at least one is needed, got 0")
    noise = Draws(session, prompts, options, subjects, texts, draws)
    parts = sorted({kind.removeprefix("severed_") for kind in options.kinds if kind != "hidden"})
    longest = max(len(prompt) for prompt in prompts)
    budget = Budget.of(arch, options.memory, len(parts), longest=longest, noise=noise.nbytes())
    reason = not_handed_over(arch)
    found: dict[int, list[tuple[int, CausalTrace]]] = {}
    with evaluating(session.model):
        if reason is not None:
            return padded_traces(session, prompts, noise, options, parts, budget, reason)
        counts = [(noise.sets(i), noise.samples(i)) for i in range(len(prompts))]
        for job in jobs_of(prompts, counts, budget):
            drawn = [noise.of(i, job.samples) for i in job.prompts]
            traces = _trace(session, [prompts[i] for i in job.prompts], drawn, options, parts, budget.run)
            for i, sets, trace in zip(job.prompts, drawn, traces, strict=True):
                found.setdefault(i, []).append((len(sets[0]), trace))
    return [combined(found[i]) for i in range(len(prompts))]


def _trace(
    session: Session,
    prompts: Sequence[TracePrompt],
    noises: Sequence[tuple[Tensor, ...]],
    options: TraceOptions,
    parts: Sequence[str],
    batch_tokens: int,
) -> list[CausalTrace]:
    arch = session.arch
    base = Base(arch, prompts, noises, replace=options.noise.replace, parts=parts)
    final = base.hidden[-1]
    counts = [[len(drawn) for drawn in sets] for sets in noises]
    clean, corrupted = [], []
    for index, (prompt, sets) in enumerate(zip(prompts, counts, strict=True)):
        clean.append(base.clean(index, len(prompt) - 1))
        for number, count in enumerate(sets):
            corrupted += [base.corrupted(index, number, s, len(prompt) - 1) for s in range(count)]
    rows = (torch.tensor(number, device=final.device) for number in (clean, corrupted))
    read = plain(arch, prompts, counts, *(final[where] for where in rows))
    grids = [Grid(prompt, i, read, options, arch.depth) for i, prompt in enumerate(prompts)]
    work = [
        [_run(index, len(prompts[index]), lane, kind, counts[index]) for lane in family]
        for index, grid in enumerate(grids)
        for kind, family in grid.lanes()
    ]
    sweep = Sweep(arch, base)
    sweep.restore(work)
    with sweep.running():
        for group in grouped(work, batch_tokens):
            labels = [read.answers[run.prompt] for run in group for _ in run.samples]
            p = probabilities(arch, torch.cat(sweep.finals(group)), labels)
            for run, part in zip(group, p.split([len(run.samples) for run in group]), strict=True):
                grids[run.prompt].take(run.lane, part)
    return [grid.result(session, "packed tokens") for grid in grids]


def _run(index: int, length: int, lane: Lane, kind: str, counts: Sequence[int]) -> Run:
    # Severed runs restore in the second set of draws, where there is one, what was recorded in the first.
    rows = len(counts) - 1 if kind.startswith("severed") else 0
    return Run(index, length, lane, range(counts[0]), rows)
