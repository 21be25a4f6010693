"""Causal tracing: where in a model restoring one state brings the answer back (Meng et al. 2022, arXiv:2202.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.attention import not_handed_over
from fastedit.engine.encoder_decoder import is_encoder_decoder
from fastedit.forward import evaluating
from fastedit.ops.target_loss import target_loss
from fastedit.session import Session
from fastedit.trace.base import Base
from fastedit.trace.budget import Budget, combined, jobs_of
from fastedit.trace.lanes import KINDS, SEVERED, families
from fastedit.trace.noise import Noise, subject_embeddings
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.result import CausalTrace
from fastedit.trace.seq2seq_lanes import CROSS, check_side, severs
from fastedit.trace.sweep import Run, Sweep, grouped

__all__ = ["TraceOptions", "noises_of", "trace_prompts"]

Tokens = Literal["all", "subject_last"]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What is traced.

    Attributes:
        kinds: what a cell restores: ``"hidden"`` (a block's output), ``"mlp"``, ``"attn"`` (the module's output, in a
            window of layers); ``"severed_mlp"`` and ``"severed_attn"`` restore a block's output while the token's
            outputs of that module above it stay corrupted.
        window: layers that a cell of ``"mlp"`` or ``"attn"`` restores.
        tokens: ``"all"``, or ``"subject_last"``: the subject's last token only.
        noise: how the subject is corrupted.
        side: of an encoder-decoder, whose states are restored: ``"encoder"`` (``None`` is that) or ``"decoder"``, which
            reads the corrupted encoder and has the kinds ``"cross"`` and ``"severed_cross"``, too; see
            `fastedit.trace.seq2seq`. ``None`` for other models.
        decoder_prefix: of an encoder-decoder, text that the decoder has behind its start token and before the answer,
            such as ``"<extra_id_0>"``.
        memory: bytes that the sweep may take above the model; ``None``: a part of what is free. It decides how many
            cells run together, not what they give. At least one sample of one cell runs.
    """

    kinds: tuple[str, ...] = KINDS
    window: int = 10
    tokens: Tokens = "all"
    noise: Noise = field(default_factory=Noise)
    memory: int | None = None
    side: Literal["encoder", "decoder"] | None = None
    decoder_prefix: str | None = None

    def __post_init__(self) -> None:
        known = (*KINDS, *SEVERED, *(CROSS if self.side == "decoder" else ()))
        if isinstance(self.kinds, str) or not self.kinds:
            raise ValueError(f"kinds must be one or more of {', '.join(known)}, got {self.kinds!r}")
        for kind in self.kinds:
            if kind not in known:
                raise ValueError(f"kinds must be of {', '.join(known)}, got {kind!r}")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be distinct, got {', '.join(self.kinds)}")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be an integer of at least 1, got {self.window!r}")
        if self.tokens not in ("all", "subject_last"):
            raise ValueError(f"tokens must be 'all' or 'subject_last', got {self.tokens!r}")
        if not isinstance(self.noise, Noise):
            raise ValueError(f"noise must be a Noise, got {self.noise!r}")
        check_side(self.side, self.tokens, self.decoder_prefix)
        if self.memory is not None and (isinstance(self.memory, bool) or self.memory < 1):
            raise ValueError(f"memory must be at least 1 byte or None, got {self.memory!r}")


def trace_prompts(
    session: Session,
    prompts: Sequence[TracePrompt],
    options: TraceOptions | None = None,
    *,
    subjects: Sequence[str] | None = None,
    draws: Sequence[Sequence[Tensor]] | None = None,
) -> list[CausalTrace]:
    """Trace prompts, many cells of all of them at a time.

    Args:
        subjects: whose embeddings the noise is scaled by; ``None``: those of the prompts.
        draws: per prompt one or two sets ``[samples, subject's tokens, d]`` of noise to use as they are, in place of
            ``options.noise``'s draws (``options.noise.replace`` still says how); the second set is for severed kinds.

    Raises:
        ValueError: no prompts, draws of another shape, or a clean run that gives NaN.
        NotImplementedError: a model whose attention cannot be run on packed tokens, or that is no causal language
            model.
    """
    options = options or TraceOptions()
    arch = session.arch
    if is_encoder_decoder(arch):
        from fastedit.trace.seq2seq import trace_seq2seq

        return trace_seq2seq(session, prompts, options, subjects=subjects, draws=draws)
    for name in ("side", "decoder_prefix"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(f"{name} must be None for a model that is no encoder-decoder, got {value!r}")
    if arch.row.side == "encoder":
        raise NotImplementedError(
            f"model: causal tracing needs a causal language model, got {type(arch.model).__name__}"
        )
    if (reason := not_handed_over(arch)) is not None:
        raise NotImplementedError(f"model: causal tracing cannot run on packed tokens here: {reason}")
    if not prompts:
        raise ValueError("prompts: at least one is needed, got 0")
    noises = noises_of(session, arch, prompts, options, subjects, draws)
    parts = sorted({kind.removeprefix("severed_") for kind in options.kinds if kind != "hidden"})
    budget = Budget.of(arch, options.memory, len(parts))
    found: dict[int, list[tuple[int, CausalTrace]]] = {}
    with evaluating(session.model):
        for job in jobs_of(prompts, noises, budget):
            drawn = [tuple(rows[job.samples] for rows in noises[i]) for i in job.prompts]
            traces = _trace(session, [prompts[i] for i in job.prompts], drawn, options, parts, budget.run)
            for i, sets, trace in zip(job.prompts, drawn, traces, strict=True):
                found.setdefault(i, []).append((len(sets[0]), trace))
    return [combined(found[i]) for i in range(len(prompts))]


def noises_of(
    session: Session,
    arch: ResolvedArch,
    prompts: Sequence[TracePrompt],
    options: TraceOptions,
    subjects: Sequence[str] | None,
    draws: Sequence[Sequence[Tensor]] | None,
) -> list[tuple[Tensor, ...]]:
    """Per prompt the sets of draws that are run: two where severed runs use another; ``arch`` has the embedding."""
    noise = options.noise
    severed = any(severs(kind) for kind in options.kinds)
    made: list[tuple[Tensor, ...]] = []
    if draws is not None:
        if len(draws) != len(prompts):
            raise ValueError(f"draws must be one per prompt, {len(prompts)}, got {len(draws)}")
        for prompt, sets in zip(prompts, draws, strict=True):
            wanted = (prompt.span[1] - prompt.span[0], arch.width)
            for drawn in sets:
                if drawn.ndim != 3 or tuple(drawn.shape[1:]) != wanted or drawn.shape != sets[0].shape:
                    raise ValueError(
                        f"draws must be of shape [samples, {wanted[0]}, {wanted[1]}], got {list(drawn.shape)}"
                    )
            made.append(tuple(drawn.double().cpu() for drawn in (sets if severed else sets[:1])))
        return made
    names = [prompt.subject for prompt in prompts] if subjects is None else subjects
    embeddings = subject_embeddings(arch, session.tokenizer, names)
    scale = noise.scaled(arch, embeddings)
    for prompt in prompts:
        first, second = noise.draw(prompt.span[1] - prompt.span[0], arch.width, scale)
        made.append((first, second) if severed and noise.redraw else (first,))
    return made


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
    answers, predicted, high, low = _plain(arch, base, prompts, noises)
    depth = arch.depth
    work: list[list[Run]] = []
    scores: list[dict[str, np.ndarray]] = []
    traced: list[tuple[int, ...]] = []
    for index, (prompt, sets) in enumerate(zip(prompts, noises, strict=True)):
        first, end = prompt.span
        tokens = tuple(range(len(prompt))) if options.tokens == "all" else (end - 1,)
        traced.append(tokens)
        grids = {}
        for kind in options.kinds:
            severed = kind in SEVERED
            rows = len(sets) - 1 if severed else 0
            grid = np.full((len(tokens), depth), low[index][rows])
            # Restoring the last layer is seen at the last token only. With nothing above it to sever, severed runs are
            # the first, ordinary ones.
            grid[:, depth - 1] = low[index][0] if severed else low[index][rows]
            if kind not in ("mlp", "attn") and len(prompt) - 1 in tokens:
                grid[tokens.index(len(prompt) - 1), depth - 1] = high[index]
            grids[kind] = grid
            lanes = families(
                kind,
                [token for token in tokens if token >= first],
                range(depth),
                depth=depth,
                length=len(prompt),
                window=options.window,
            )
            samples = range(len(sets[0]))
            work += [[Run(index, len(prompt), lane, samples, rows) for lane in family] for family in lanes]
        scores.append(grids)
    sweep = Sweep(arch, base)
    sweep.restore(work)
    found: dict[tuple[int, str, int, int], list[Tensor]] = {}
    with sweep.running():
        for group in grouped(work, batch_tokens):
            finals = sweep.finals(group)
            labels = [answers[run.prompt] for run in group for _ in run.samples]
            p = _probabilities(arch, torch.cat(finals), labels)
            for run, part in zip(group, p.split([len(run.samples) for run in group]), strict=True):
                for kind, token, layer in run.lane.cells:
                    found.setdefault((run.prompt, kind, token, layer), []).append(part)
    for (index, kind, token, layer), pieces in found.items():
        scores[index][kind][traced[index].index(token), layer] = float(torch.cat(pieces).mean())
    return [
        CausalTrace(
            prompt=prompt.text,
            subject=prompt.subject,
            input_ids=prompt.ids,
            input_tokens=prompt.tokens,
            subject_range=prompt.span,
            traced=traced[index],
            answer_id=answers[index],
            answer=session.tokenizer.decode([answers[index]]),
            correct_prediction=predicted[index] == answers[index],
            low_score=low[index][0],
            high_score=high[index],
            window=options.window,
            scores=scores[index],
        )
        for index, prompt in enumerate(prompts)
    ]


def _plain(
    arch: ResolvedArch, base: Base, prompts: Sequence[TracePrompt], noises: Sequence[tuple[Tensor, ...]]
) -> tuple[list[int], list[int], list[float], list[list[float]]]:
    """Per prompt the answer, the clean run's prediction, its probability, and the corrupted one's by set of draws."""
    final = base.hidden[-1]
    clean = torch.tensor([base.clean(i, len(prompt) - 1) for i, prompt in enumerate(prompts)])
    with torch.no_grad():
        logits = arch.logits(final[clean.to(final.device)])
    for index, prompt in enumerate(prompts):
        if not bool(logits[index].isfinite().any()) or bool(logits[index].isnan().any()):
            raise ValueError(
                f"model: the clean run of the prompt must be finite, got NaN for {prompt.text!r}"
            )
    predicted = logits.argmax(dim=1).tolist()
    answers = [
        p if prompt.answer is None else prompt.answer for p, prompt in zip(predicted, prompts, strict=True)
    ]
    rows, labels = clean.tolist(), list(answers)
    for index, (prompt, sets) in enumerate(zip(prompts, noises, strict=True)):
        for number, drawn in enumerate(sets):
            rows += [base.corrupted(index, number, s, len(prompt) - 1) for s in range(len(drawn))]
            labels += [answers[index]] * len(drawn)
    p = _probabilities(arch, final[torch.tensor(rows, device=final.device)], labels)
    high, rest = p[: len(prompts)].tolist(), p[len(prompts) :]
    low = []
    for sets in noises:
        means = []
        for drawn in sets:
            means.append(float(rest[: len(drawn)].mean()))
            rest = rest[len(drawn) :]
        low.append(means)
    return answers, predicted, high, low


def _probabilities(arch: ResolvedArch, hidden: Tensor, labels: Sequence[int]) -> Tensor:
    """``[n]`` float64 on the CPU: the labels' probabilities, from the last block's outputs ``[n, d]``."""
    weight: Tensor = arch.head.weight  # type: ignore[assignment]
    with torch.no_grad():
        rows = arch.head_input(hidden).to(weight.device)
        wanted = torch.tensor(list(labels), device=rows.device)
        bias = getattr(arch.head, "bias", None)
        nll, _ = target_loss(rows, weight, bias, wanted, None, None, softcap=arch.softcap)
    return torch.exp(-nll.double()).cpu()
