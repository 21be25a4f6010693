"""Causal tracing where attention cannot be handed over: rows of one prompt side by side instead of packed tokens.

The same cells with the same results as `fastedit.trace.sweep`, with more work. What is shared: a restored cell joins
at its layer, and where the model's attention takes a mask and a cache, only tokens from the restored one on are run,
against the corrupted run's keys and values. What is not: prompts run one by one, the cells of one token together;
windows that begin together are runs of their own, and the last block runs all tokens. The blocks are the model's own,
called as it calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.fused import fused_activations
from fastedit.engine.padded import whole_rows_because
from fastedit.session import Session
from fastedit.trace.budget import Budget, combined
from fastedit.trace.draws import Draws
from fastedit.trace.grid import Grid
from fastedit.trace.head import plain, probabilities
from fastedit.trace.hooks import hooks, part_module
from fastedit.trace.lanes import Lane
from fastedit.trace.options import TraceOptions
from fastedit.trace.padded_base import PaddedBase
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.result import CausalTrace

__all__ = ["padded_traces"]


@dataclass(frozen=True)
class _Row:
    """A lane for one sample.

    Attributes:
        row: of the corrupted runs, where it restores; ``frozen``: where frozen outputs come from.
    """

    lane: Lane
    row: int
    frozen: int

    @property
    def start(self) -> int:
        """First block that runs: one whose part is patched runs itself."""
        whole = self.lane.part is None or self.lane.frozen
        return self.lane.enters + 1 if whole else self.lane.enters


def padded_traces(
    session: Session,
    prompts: Sequence[TracePrompt],
    noise: Draws,
    options: TraceOptions,
    parts: Sequence[str],
    budget: Budget,
    reason: str,
) -> list[CausalTrace]:
    """What `fastedit.trace.causal.trace_prompts` returns; ``reason``: why tokens cannot be packed."""
    whole = whole_rows_because(session.arch.model, [0])
    found = []
    for index, prompt in enumerate(prompts):
        sets, samples = noise.sets(index), noise.samples(index)
        # As many samples at a time as may be kept beside the clean row.
        step = max(1, (budget.kept // len(prompt) - 1) // sets)
        traces = []
        for first in range(0, samples, step):
            drawn = noise.of(index, slice(first, min(first + step, samples)))
            trace = _trace(session, prompt, drawn, options, parts, budget.run, reason, whole is None)
            traces.append((len(drawn[0]), trace))
        found.append(combined(traces))
    return found


def _trace(
    session: Session,
    prompt: TracePrompt,
    noises: Sequence[Tensor],
    options: TraceOptions,
    parts: Sequence[str],
    tokens: int,
    reason: str,
    masked: bool,
) -> CausalTrace:
    arch = session.arch
    base = PaddedBase(arch, prompt, noises, replace=options.noise.replace, parts=parts, cached=masked)
    samples = len(noises[0])
    final = base.corrupted[-1][:, -1]
    read = plain(arch, [prompt], [[samples] * len(noises)], base.clean[-1][:, -1], final)
    grid = Grid(prompt, 0, read, options, arch.depth)
    by_token: dict[int, list[_Row]] = {}
    for kind, family in grid.lanes():
        shift = samples * (len(noises) - 1) if kind.startswith("severed") else 0
        for lane in family:
            # What is frozen was recorded in the first set of draws.
            by_token.setdefault(lane.token, []).extend(_Row(lane, shift + s, s) for s in range(samples))
    sweep = _Sweep(arch, base, parts)
    taken: dict[int, tuple[Lane, list[Tensor]]] = {}
    with sweep.running():
        for token, rows in by_token.items():
            rows.sort(key=lambda row: row.start)
            most = max(1, tokens // (len(prompt) - base.begin(token)))
            for first in range(0, len(rows), most):
                group = rows[first : first + most]
                p = probabilities(arch, sweep.finals(token, group), read.answers * len(group))
                for row, value in zip(group, p.split(1), strict=True):
                    taken.setdefault(id(row.lane), (row.lane, []))[1].append(value)
    for lane, values in taken.values():
        grid.take(lane, torch.cat(values))
    rows_of = "padded rows" if base.cached else "whole padded rows"
    return grid.result(session, f"{rows_of} ({reason})")


class _Sweep:
    """Runs rows of one token from the blocks on at which they join."""

    def __init__(self, arch: ResolvedArch, base: PaddedBase, parts: Sequence[str]) -> None:
        self._arch, self._base, self._parts = arch, base, parts
        self._patch: dict[str, tuple[Tensor, int, Tensor]] = {}  # part -> rows, place of the token, values

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of `finals`."""

        def patching(part: str) -> Any:
            def put(_module: nn.Module, _args: Any, output: Any) -> None:
                if part in self._patch:
                    rows, place, values = self._patch[part]
                    whole = block_output(output)
                    whole[rows.to(whole.device), place] = values.to(whole.device)

            return put

        with hooks() as hook, torch.no_grad(), fused_activations(self._arch):
            for part in self._parts:
                for layer in range(self._arch.depth):
                    hook(part_module(self._arch, part, layer), patching(part))
            yield

    def finals(self, token: int, group: Sequence[_Row]) -> Tensor:
        """``[rows, d]``, the last block's output at the last token; rows ascend in `_Row.start`."""
        arch, base = self._arch, self._base
        begin = base.begin(token)
        hidden: Tensor | None = None
        joined = 0
        for layer in range(group[0].start, arch.depth):
            first = joined
            while joined < len(group) and group[joined].start == layer:
                joined += 1
            if joined > first:
                entering = self._entry(token, group[first:joined], layer)
                hidden = entering if hidden is None else torch.cat([hidden, entering])
            if hidden is None:
                raise RuntimeError("a group of rows must hold at least one")
            self._patches(token, group[:joined], layer, hidden.device)
            name, named = base.call(layer, begin, [row.row for row in group[:joined]])
            hidden = block_output(arch.block(layer)(**{**named, name: hidden}))
        self._patch.clear()
        late = list(group[joined:])
        parts = [] if hidden is None else [hidden[:, -1]]
        if late:
            # A cell of the last block has nothing above it to run.
            parts.append(self._entry(token, late, arch.depth)[:, -1])
        return torch.cat(parts)

    def _entry(self, token: int, rows: Sequence[_Row], layer: int) -> Tensor:
        """``[rows, tokens, d]`` input of block ``layer``."""
        base, begin = self._base, self._base.begin(token)
        source = base.corrupted[layer]
        found = source[torch.tensor([row.row for row in rows], device=source.device), begin:]
        restored = [i for i, row in enumerate(rows) if row.lane.part is None or row.lane.frozen]
        found[restored, token - begin] = base.clean[layer][0, token].to(found.device)
        return found

    def _patches(self, token: int, rows: Sequence[_Row], layer: int, device: torch.device) -> None:
        """Sets what is put into the sub-layers of a block."""
        self._patch.clear()
        for part in self._parts:
            at = [i for i, row in enumerate(rows) if row.lane.part == part and layer < row.lane.stop]
            if not at:
                continue
            clean, corrupted = (found[part][layer] for found in (self._base.clean_parts, self._base.parts))
            values = torch.stack(
                [
                    corrupted[rows[i].frozen, token]
                    if rows[i].lane.frozen
                    else clean[0, token].to(corrupted.device)
                    for i in at
                ]
            )
            self._patch[part] = torch.tensor(at, device=device), token - self._base.begin(token), values
