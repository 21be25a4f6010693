"""The paused sweep for models whose attention cannot be handed over: padded rows instead of packed tokens.

Same results as `fastedit.engine.sweep`, with more work: every row runs whole up to its lookup token, and a paused layer
runs again after its update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch
from fastedit.engine.replay import Replay
from fastedit.tokens import Encoded, pad_right

__all__ = ["PaddedSweep", "padded_keys_at"]


def _cut(row: Encoded) -> list[int]:
    # A negative lookup (a published quirk) refers to the padded row, so nothing may be cut off.
    return list(row.ids if row.lookup < 0 else row.ids[: row.lookup + 1])


def _padded(rows: list[list[int]], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    """ids and mask, right-padded to at least ``width``."""
    ids, mask = pad_right(rows, pad_id)
    more = max(0, width - ids.shape[1])
    return nn.functional.pad(ids, (0, more), value=pad_id), nn.functional.pad(mask, (0, more))


def _at_lookup(hidden: Tensor, lookup: Tensor) -> Tensor:
    return hidden[torch.arange(len(lookup), device=hidden.device), lookup]


def padded_keys_at(
    model: nn.Module, arch: ResolvedArch, layer: int, rows: Sequence[Encoded], *, pad_id: int = 0
) -> Tensor:
    """``[len(rows), f]`` inputs of the edited matrix of ``layer`` at the lookup token of each row."""
    ids, mask = pad_right([_cut(row) for row in rows], pad_id)
    replay = Replay.capture(model, arch, ids, mask, start=layer, stop=layer + 1)
    with torch.no_grad():
        _, inputs = replay.run_block_inputs(replay.hidden, layer, arch.mlp_out(layer))
    index = [row.lookup % ids.shape[1] for row in rows]
    return _at_lookup(inputs, torch.tensor(index, device=inputs.device))


class _Chunk:
    """Replayable rows of some requests: all templates for the keys, the bare prompts for the residual."""

    def __init__(
        self,
        model: nn.Module,
        arch: ResolvedArch,
        requests: Sequence[Sequence[Encoded]],
        start: int,
        stop: int,
        pad_id: int,
        widths: tuple[int, int],
    ):
        self.requests = len(requests)
        rows = [row for request in requests for row in request]
        bare = [request[0] for request in requests]
        self.templates = Replay.capture(
            model, arch, *_padded([_cut(r) for r in rows], pad_id, widths[0]), start=start, stop=stop
        )
        self.bare = Replay.capture(
            model, arch, *_padded([_cut(r) for r in bare], pad_id, widths[1]), start=start, stop=stop
        )
        device = self.templates.hidden.device
        width, bare_width = self.templates.hidden.shape[1], self.bare.hidden.shape[1]
        self.lookup = torch.tensor([row.lookup % width for row in rows], device=device)
        self.bare_lookup = torch.tensor([row.lookup % bare_width for row in bare], device=device)
        self.hidden = self.templates.hidden
        self.bare_hidden = self.bare.hidden


class PaddedSweep:
    """A paused forward over the rows of all requests.

    Use: for each edited layer in order, ``advance_to(layer)``, ``keys(layer)``, ``activations(z_layer)``, write
    the update into the model, and go on.

    Args:
        rows: per request, its encoded prompts, the bare prompt first; every request has the same number.
        weights: ``[rows per request]`` averaging weights of the keys, summing to 1.
        layers: edited layers, ascending.
        z_layer: layer whose output the targets refer to (>= the last edited layer).
        batch_tokens: tokens of a chunk of requests; bounds the temporaries, not the result.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: ResolvedArch,
        rows: Sequence[Sequence[Encoded]],
        weights: Sequence[float],
        layers: Sequence[int],
        z_layer: int,
        *,
        pad_id: int = 0,
        batch_tokens: int,
    ):
        self._arch = arch
        self._weights = torch.tensor(list(weights), dtype=torch.float64)
        self._at = min(layers)
        longest = max(len(_cut(row)) for request in rows for row in request)
        widths = (0, 0)
        if any(row.lookup < 0 for request in rows for row in request):
            # An index from the end of the padded rows must not depend on how they are cut into chunks.
            widths = (longest, max(len(_cut(request[0])) for request in rows))
        size = max(1, batch_tokens // (longest * len(self._weights)))
        self._chunks = [
            _Chunk(model, arch, rows[i : i + size], self._at, z_layer + 1, pad_id, widths)
            for i in range(0, len(rows), size)
        ]

    def advance_to(self, layer: int) -> None:
        """Run the blocks up to (not including) ``layer`` with the model's present weights."""
        with torch.no_grad():
            for chunk in self._chunks:
                chunk.hidden = chunk.templates.run(chunk.hidden, start=self._at, stop=layer)
                chunk.bare_hidden = chunk.bare.run(chunk.bare_hidden, start=self._at, stop=layer)
        self._at = layer

    def keys(self, layer: int) -> Tensor:
        """``[n, f]`` weighted mean over templates of the input of ``layer``'s edited matrix, in fp64."""
        found = []
        with torch.no_grad():
            for chunk in self._chunks:
                _, inputs = chunk.templates.run_block_inputs(chunk.hidden, layer, self._arch.mlp_out(layer))
                keys = _at_lookup(inputs, chunk.lookup).double().view(chunk.requests, len(self._weights), -1)
                found.append(torch.einsum("nrf,r->nf", keys, self._weights.to(keys.device)))
        return torch.cat(found)

    def activations(self, z_layer: int) -> Tensor:
        """``[n, d]`` output of block ``z_layer`` at the lookup token of the bare prompt, in fp64."""
        found = []
        with torch.no_grad():
            for chunk in self._chunks:
                hidden = chunk.bare.run(chunk.bare_hidden, start=self._at, stop=z_layer + 1)
                found.append(_at_lookup(hidden, chunk.bare_lookup).double())
        return torch.cat(found)
