"""The blocks above an injection for models whose attention cannot be handed over: padded rows instead of packed tokens.

Same results as `fastedit.engine.suffix`, with more work: suffixes are padded to the longest (`SuffixReplay`), or, where
an attention kernel takes no mask or a lookup token is counted from the end of the padded row, whole rows (`Replay`).
When requests leave or join, the rest is captured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.capture import Injection
from fastedit.engine.fused import fused_activations
from fastedit.engine.padded import SuffixReplay, whole_rows_because
from fastedit.engine.precision import stream_dtype, wide_residual
from fastedit.engine.problem import Problem
from fastedit.engine.recompute import recomputed
from fastedit.engine.replay import Replay
from fastedit.tokens import pad_right

__all__ = ["PaddedRows"]


class PaddedRows:
    """Rows of some requests, to be run again and again from vectors at their lookup tokens.

    Attributes:
        init: ``[E, d]`` clean activation at the site and row 0's lookup token, in the stream's dtype.
        kl_clean: ``[E, d]`` clean output of the last block at the KL rows.
        whole_rows: why whole rows are run instead of suffixes, or ``None``.
    """

    def __init__(self, model: nn.Module, arch: ResolvedArch, injection: Injection, pad_id: int) -> None:
        self._model, self._arch, self._at, self._pad_id = model, arch, injection, pad_id
        self._problems: list[Problem] = []
        self.init = self.kl_clean = torch.empty(0)
        self.whole_rows: str | None = None
        self.checkpointed = False

    @property
    def tokens(self) -> int:
        """Tokens that every run computes, padding included."""
        return int(self._replay.mask.numel())

    def extend(self, problems: Sequence[Problem]) -> None:
        """Capture more requests."""
        self._capture([*self._problems, *problems])

    def keep(self, positions: Sequence[int]) -> None:
        """Keep the requests at these positions, in this order; the others leave."""
        self._capture([self._problems[i] for i in positions])

    def _capture(self, problems: list[Problem]) -> None:
        """Clean forward of the rows; keeps the block inputs to run from and the activation to start from."""
        arch, at = self._arch, self._at
        self._problems = problems
        rows = [row for problem in problems for row in problem.rows]
        self.whole_rows = whole_rows_because(self._model, [row.lookup for row in rows])
        # Of the KL row only the lookup token is read, and what follows it cannot reach it.
        cut = [row.ids if row.target or self.whole_rows else row.ids[: row.lookup + 1] for row in rows]
        ids, mask = pad_right(cut, self._pad_id)
        # A negative lookup counts from the end of the row padded with its request's others, as one published rule does.
        widths = [max(map(len, problem.rows)) for problem in problems for _ in problem.rows]
        lookup = [row.lookup % width for row, width in zip(rows, widths, strict=True)]
        # A lookup token behind the subject may be a target token: what predicts it comes before it.
        begin = [min(at, row.target_start) for row, at in zip(rows, lookup, strict=True)]
        first = [0]
        for problem in problems[:-1]:
            first.append(first[-1] + len(problem.rows))
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Any) -> None:
            # A copy of the rows at once: some blocks add the attention's output to the MLP's in place.
            activation = block_output(output).detach().reshape(*ids.shape, -1)
            found.append(activation[first, [lookup[row] for row in first]])

        module = arch.mlp_out(at.layer) if at.site == "mlp" else arch.block(at.layer)
        start = at.layer if at.inside else at.layer + 1
        # Injecting above the last block leaves nothing to run: the vector meets the final norm directly.
        self._nothing_above = start >= arch.depth
        handle = module.register_forward_hook(keep)
        try:
            lowest = min(start, arch.depth - 1)
            self._replay: Replay | SuffixReplay
            if self.whole_rows is None:
                self._replay = SuffixReplay(self._model, arch, ids, mask, start=lowest, lookup=begin)
            else:
                self._replay = Replay.capture(self._model, arch, ids, mask, start=lowest)
        finally:
            handle.remove()
        self.init = found[0].to(stream_dtype(found[0].dtype))
        self._index(rows, lookup, [0] * len(rows) if self.whole_rows is not None else begin)

    def _index(self, rows: Sequence[Any], lookup: list[int], origin: list[int]) -> None:
        """Where vectors enter and what is read; a row's positions count from its origin."""
        device = self._replay.hidden.device
        local = [at - zero for at, zero in zip(lookup, origin, strict=True)]
        nll: tuple[list[int], list[int]] = ([], [])
        kl: tuple[list[int], list[int]] = ([], [])
        owner: list[int] = []
        row = 0
        for edit, problem in enumerate(self._problems):
            for encoded in problem.rewriting:
                nll[0].extend([row] * len(problem.target))
                nll[1].extend(encoded.target_start + j - origin[row] for j in range(len(problem.target)))
                row += 1
            kl[0].append(row)
            kl[1].append(local[row])
            row += 1
            owner += [edit] * len(problem.rows)
        self._row = torch.arange(len(rows), device=device)
        self._lookup = torch.tensor(local, device=device)
        self._owner = torch.tensor(owner, device=device)
        self._nll, self._kl = torch.tensor(nll, device=device), torch.tensor(kl, device=device)
        self.kl_clean = self._replay.final[self._kl[0], self._kl[1]]

    def run(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden rows before the final norm, with ``delta [E, d]`` added: loss rows ``[R, d]``, KL rows ``[E, d]``."""
        replay, at, depth = self._replay, self._at, self._arch.depth
        base = replay.final if self._nothing_above else replay.hidden
        base = base.to(stream_dtype(base.dtype))
        shift = delta[self._owner].to(base.dtype)
        if at.inside:
            hidden = self._block_with(base, shift)
        else:
            hidden = base.index_put((self._row, self._lookup), shift, accumulate=True)
        done, source = at.layer + 1, None
        if at.loss_layer + 1 < depth:
            hidden = source = self._blocks(hidden, done, at.loss_layer + 1)
            done = at.loss_layer + 1
        hidden = self._blocks(hidden, done, depth)
        source = hidden if source is None else source
        return source[self._nll[0], self._nll[1]], hidden[self._kl[0], self._kl[1]]

    def _blocks(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        for layer in range(start, stop):
            hidden = recomputed(self._block(layer), hidden, self.checkpointed)
        return hidden

    def _block(self, layer: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: self._replay.run(hidden, start=layer, stop=layer + 1)

    def _block_with(self, base: Tensor, shift: Tensor) -> Tensor:
        def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            rows = output.reshape(*self._replay.mask.shape, -1).to(shift.dtype)
            return rows.index_put((self._row, self._lookup), shift, accumulate=True).reshape(output.shape)

        handle = self._arch.mlp_out(self._at.layer).register_forward_hook(add)
        try:
            return self._replay.run(base, start=self._at.layer, stop=self._at.layer + 1)
        finally:
            handle.remove()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context for `run` and its backward."""
        with wide_residual(self._arch), fused_activations(self._arch):
            yield
