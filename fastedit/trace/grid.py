"""The grids of a trace: what is known without a run, which lanes the other cells need, and the result."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastedit.session import Session
from fastedit.trace.head import Plain, check_restored
from fastedit.trace.lanes import SEVERED, Cell, Lane, families
from fastedit.trace.options import TraceOptions
from fastedit.trace.prompts import TracePrompt
from fastedit.trace.result import CausalTrace

__all__ = ["Grid"]


class Grid:
    """Scores of one prompt, filled as runs give them.

    Attributes:
        traced: tokens that the rows are.
    """

    def __init__(
        self, prompt: TracePrompt, number: int, read: Plain, options: TraceOptions, depth: int
    ) -> None:
        """Fill in what needs no run: the corrupted runs' probability, and the clean one's in the last cell."""
        self._prompt, self._number, self._read, self._options = prompt, number, read, options
        self._depth = depth
        end = prompt.span[1]
        self.traced = tuple(range(len(prompt))) if options.tokens == "all" else (end - 1,)
        self._scores: dict[str, np.ndarray] = {}
        self._found: dict[Cell, list[Tensor]] = {}
        low, high, last = read.low[number], read.high[number], len(prompt) - 1
        for kind in options.kinds:
            severed = kind in SEVERED
            grid = np.full((len(self.traced), depth), low[-1] if severed else low[0])
            # Restoring the last layer is seen at the last token only. With nothing above it to sever, severed runs are
            # the first, ordinary ones.
            grid[:, depth - 1] = low[0]
            if kind not in ("mlp", "attn") and last in self.traced:
                grid[self.traced.index(last), depth - 1] = high
            self._scores[kind] = grid

    def lanes(self) -> list[tuple[str, tuple[Lane, ...]]]:
        """Kind and family of the lanes that the other cells need."""
        tokens = [token for token in self.traced if token >= self._prompt.span[0]]
        shape = {"depth": self._depth, "length": len(self._prompt), "window": self._options.window}
        return [
            (kind, family)
            for kind in self._options.kinds
            for family in families(kind, tokens, range(self._depth), **shape)
        ]

    def take(self, lane: Lane, found: Tensor) -> None:
        """Some samples' probabilities of a lane. Raises ValueError where one is not finite."""
        check_restored(found, *lane.cells[0], self._prompt.text)
        for cell in lane.cells:
            self._found.setdefault(cell, []).append(found)

    def result(self, session: Session, engine: str) -> CausalTrace:
        """The trace, once all lanes have been taken."""
        for (kind, token, layer), pieces in self._found.items():
            self._scores[kind][self.traced.index(token), layer] = float(torch.cat(pieces).mean())
        prompt, read, number = self._prompt, self._read, self._number
        return CausalTrace(
            prompt=prompt.text,
            subject=prompt.subject,
            input_ids=prompt.ids,
            input_tokens=prompt.tokens,
            subject_range=prompt.span,
            traced=self.traced,
            answer_id=read.answers[number],
            answer=session.tokenizer.decode([read.answers[number]]),
            correct_prediction=read.predicted[number] == read.answers[number],
            low_score=read.low[number][0],
            high_score=read.high[number],
            window=self._options.window,
            scores=self._scores,
            engine=engine,
        )
