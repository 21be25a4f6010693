"""Restored cells of one side of an encoder-decoder, in one sweep over its layers.

One clean and some corrupted rows are kept. A cell changes nothing below its layer, so it joins the batch there, as all
tokens of a row (encoder) or those from its own on (decoder, whose earlier tokens' keys and values are kept). Blocks
that windowed cells begin with are run once for all tokens: a patched module changes its own token's output only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.encoder_decoder import Decoder, Encoder, Encodings, KeysValues
from fastedit.trace.hooks import hooks, part_module
from fastedit.trace.lanes import Lane, heads_of

__all__ = ["DecoderSide", "EncoderSide", "Side"]


class Side:
    """What is kept of the clean and the corrupted rows of one side, and the runs of lanes above them.

    Row 0 is clean, row ``1 + set * samples + sample`` corrupted.

    Attributes:
        hidden: per layer its input ``[R, n, d]``; one more, the last block's output.
        parts: module -> per layer its output ``[R, n, d]``.
    """

    causal = False

    def __init__(self, arch: ResolvedArch, parts: Sequence[str], samples: int) -> None:
        self.arch, self.samples = arch, samples
        self.hidden: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {part: [] for part in parts}
        self._restored: dict[tuple[str, int], Tensor] = {}
        self._patch: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # part -> rows, tokens, values

    def block(self, layer: int, hidden: Tensor, rows: Sequence[int], first: int) -> Tensor:
        """Output of a block for lanes one behind the other, each of the adjacent rows ``rows``, from ``first`` on."""
        raise NotImplementedError

    def record(self, hidden: Tensor) -> None:
        """Run clean and corrupted rows ``[R, n, d]`` from the first block on, and keep what lanes start from."""
        rows = range(len(hidden))
        self.hidden = [hidden]
        with self._hooks(lambda part: self._recording(part)):
            for layer in range(self.arch.depth):
                self.hidden.append(self.block(layer, self.hidden[-1], rows, 0))

    def finals(self, lanes: Sequence[Lane], samples: range, chosen: int) -> Tensor:
        """``[lanes * samples, tokens, d]`` last block's outputs, lane by lane.

        Args:
            lanes: with forks behind the lane that they leave; in a decoder all of one token.
            chosen: set of draws.
        """
        first = lanes[0].token if self.causal else 0
        rows = [1 + chosen * self.samples + sample for sample in samples]
        heads = heads_of(lanes)
        active: list[int] = []
        hidden: Tensor | None = None
        with self._hooks(lambda part: self._patching(part)):
            for layer in range(min(lane.start for lane in lanes), self.arch.depth + 1):
                joining = [i for i, lane in enumerate(lanes) if lane.start == layer]
                # Forks copy from lanes that are there already.
                for i in sorted(joining, key=lambda i: lanes[i].fork):
                    new = self._entry(lanes[i], rows, first) if not lanes[i].fork else None
                    if hidden is not None:
                        at = active.index(heads[i]) * len(rows) if new is None else 0
                        new = hidden[at : at + len(rows)] if new is None else new
                        hidden = torch.cat([hidden, new])
                    else:
                        hidden = new
                    active.append(i)
                if layer == self.arch.depth or hidden is None:
                    continue
                self._patch = self._patches([lanes[i] for i in active], layer, rows, first, samples)
                hidden = self.block(layer, hidden, rows, first)
                self._patch = {}
        if hidden is None:
            raise RuntimeError("lanes must be at least one")
        order = torch.tensor(active, device=hidden.device).argsort()
        return hidden.view(len(lanes), len(rows), *hidden.shape[1:])[order].flatten(0, 1)

    def _entry(self, lane: Lane, rows: Sequence[int], first: int) -> Tensor:
        """Input ``[samples, w, d]`` of block ``lane.start``: corrupted but for the lane's token."""
        source = self.hidden[lane.start]
        entry = source[list(rows), first:].clone()
        if lane.part is None or lane.frozen:
            entry[:, lane.token - first] = source[0, lane.token]
        else:
            begun = self._begun(lane.part, lane.enters)
            entry[:, lane.token - first] = begun[list(rows), lane.token].to(entry.device)
        return entry

    def _begun(self, part: str, layer: int) -> Tensor:
        """``[R, n, d]`` output of a block if ``part`` gave at every token what it gives in the clean row."""
        if (part, layer) not in self._restored:
            hidden, kept = self.hidden[layer], self._patch
            count, n = hidden.shape[:2]
            rows = torch.arange(count).repeat_interleave(n)
            tokens = torch.arange(n).repeat(count)
            self._patch = {part: (rows, tokens, self.parts[part][layer][0].repeat(count, 1))}
            self._restored[part, layer] = self.block(layer, hidden, range(count), 0)
            self._patch = kept
        return self._restored[part, layer]

    def _patches(
        self, lanes: Sequence[Lane], layer: int, rows: Sequence[int], first: int, samples: range
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        found: dict[str, list[tuple[int, Tensor]]] = {}
        at: dict[str, list[int]] = {}
        for place, lane in enumerate(lanes):
            if lane.part is None or layer >= lane.stop:
                continue
            kept = self.parts[lane.part][layer]
            # What is frozen comes from the first set of draws, which the recording run has.
            values = kept[
                [1 + sample for sample in samples] if lane.frozen else [0] * len(samples), lane.token
            ]
            found.setdefault(lane.part, []).append((lane.token - first, values))
            at.setdefault(lane.part, []).extend(range(place * len(rows), (place + 1) * len(rows)))
        return {
            part: (
                torch.tensor(at[part]),
                torch.tensor([token for token, _ in listed]).repeat_interleave(len(rows)),
                torch.cat([values for _, values in listed]),
            )
            for part, listed in found.items()
        }

    @contextmanager
    def _hooks(self, make: Callable[[str], Any]) -> Iterator[None]:
        with hooks() as hook, torch.no_grad(), ExitStack() as stack:
            for part in self.parts:
                for layer in range(self.arch.depth):
                    hook(part_module(self.arch, part, layer), make(part))
            self._enter(stack)
            yield

    def _enter(self, stack: ExitStack) -> None:
        pass

    def _recording(self, part: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.parts[part].append(block_output(output).detach().clone())

        return hook

    def _patching(self, part: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if part in self._patch:
                rows, tokens, values = self._patch[part]
                out = block_output(output)
                out[rows.to(out.device), tokens.to(out.device)] = values.to(out)

        return hook


class EncoderSide(Side):
    """The encoder: every row is a whole source."""

    def __init__(self, encoder: Encoder, parts: Sequence[str], samples: int) -> None:
        super().__init__(encoder.arch, parts, samples)
        self._encoder = encoder

    def block(self, layer: int, hidden: Tensor, rows: Sequence[int], first: int) -> Tensor:
        """See `Side.block`; ``first`` is 0."""
        return self._encoder.block(layer, hidden)


class DecoderSide(Side):
    """The decoder: rows look at the encoding of their number."""

    causal = True

    def __init__(self, decoder: Decoder, states: Tensor, parts: Sequence[str], samples: int) -> None:
        """states: ``[R, T, d]``, the clean encoding and the corrupted ones."""
        super().__init__(decoder.arch, parts, samples)
        self._decoder = decoder
        self._encodings = Encodings(states, keep=True)
        self._past: list[KeysValues] = []

    def block(self, layer: int, hidden: Tensor, rows: Sequence[int], first: int) -> Tensor:
        """See `Side.block`."""
        start, stop = rows[0], rows[-1] + 1
        past = None
        if first:
            lanes = len(hidden) // len(rows)
            k, v = (old[start:stop, :, :first].repeat(lanes, 1, 1, 1) for old in self._past[layer])
            past = k, v
        # The pass that records makes keys and values of all rows.
        whole = stop - start == len(self._encodings.states)
        encodings = self._encodings if whole else self._encodings.part(start, stop)
        output, seen = self._decoder.block(layer, hidden, encodings, first=first, past=past)
        if len(self._past) == layer:
            self._past.append(seen)
        return output

    def _enter(self, stack: ExitStack) -> None:
        stack.enter_context(self._decoder.running())
