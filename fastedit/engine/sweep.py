"""Keys and residuals of all edited layers from one forward that pauses at each of them.

The key of layer l depends on the weights below l only, so the sweep stands still at an edited layer while its update is
solved and written, and goes on from there: nothing below is computed twice. What else is skipped, exactly:

- rows end at their lookup token, because later tokens cannot reach it;
- beginnings that rows share (context templates, the subject) are there once, for all requests;
- a paused layer is not run again after its update: only its last matrix is, on the keys that it was just given;
- the residual's look-ahead to the target layer runs the bare prompts, and there the lookup tokens, only.

Models whose attention cannot be handed over run padded rows instead (`PaddedSweep`), with the same results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch
from fastedit.engine.attention import attending, padded_because
from fastedit.engine.forest import Forest
from fastedit.engine.fused import fused_activations
from fastedit.engine.memory import out_of_memory, release_memory
from fastedit.engine.packed import (
    BlockRunner,
    Call,
    Plan,
    Store,
    Trunk,
    at_tokens,
    forest_tensors,
    joined,
    pass_through,
)
from fastedit.engine.padded_sweep import PaddedSweep, padded_keys_at
from fastedit.engine.replay import StopForward
from fastedit.tokens import Encoded

__all__ = ["BATCH_TOKENS", "KEPT_BYTES", "LayerSweep", "keys_at"]

# Keys of all tokens that a paused layer keeps for its second product; beyond that the layer is run again instead.
KEPT_BYTES = 1 << 29
BATCH_TOKENS = 2048


T = TypeVar("T")


class _Tokens:
    """Tokens of a forest between two blocks.

    Attributes:
        hidden: ``[1, N, d]`` input of the block that the sweep stands at.
        output: ``[1, N, d]`` output of that block with the weights it had when it was last run.
        keys, product: input and output of the block's last matrix in that run, where kept.
    """

    def __init__(self, arch: ResolvedArch, forest: Forest, trunk: Trunk, start: int, stop: int) -> None:
        self.forest = forest
        ids, positions = forest_tensors(forest)
        self.plan = Plan.of(forest.branches, arch.embed.weight.device)  # type: ignore[union-attr,arg-type]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            if layer < start:
                return self.plan.attend(q, k, v, *trunk.store(layer, k, v), **options)
            # From `start` on one token goes through, so that the model hands out its blocks' arguments.
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

        passed = pass_through(
            arch, ids, positions, attend, start=start, narrow=start, keep=torch.tensor([0]), stop=stop
        )
        self.hidden, self.calls = passed.hidden, passed.calls
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to the block that the sweep has left."""
        self.output = self.keys = self.product = torch.empty(0)

    def run(
        self, runner: BlockRunner, index: int, layer: int, store: Store, seen: list[Tensor], keep: bool
    ) -> None:
        """Run a block; ``seen`` is where a hook leaves input and output of its last matrix, kept if ``keep``."""
        self.output = runner.block(layer, self.hidden, self.calls[index], self.plan, store)
        if keep:
            self.keys, self.product = seen


class _Part:
    """Some requests' rows: their tokens, and where keys and residuals are read. Numbers count trunk and own tokens."""

    def __init__(self, arch: ResolvedArch, rows: Sequence[Sequence[Encoded]], trunk: Trunk) -> None:
        self.requests = len(rows)
        self.forest = Forest(trunk.forest)
        paths = [self.forest.insert(row.ids[: row.lookup + 1]) for request in rows for row in request]
        device = arch.embed.weight.device  # type: ignore[union-attr]
        self.lookup = torch.tensor([path[-1] for path in paths], device=device)  # type: ignore[arg-type]
        # The bare prompts alone: what the look-ahead runs, and where its tokens are among the others.
        bare = Forest()
        where: dict[int, int] = {}
        ends = []
        first = 0
        for request in rows:
            path = bare.insert(request[0].ids[: request[0].lookup + 1])
            where.update(zip(path, paths[first], strict=True))
            ends.append(path[-1])
            first += len(request)
        self.bare = torch.tensor([where[i] for i in range(len(bare))], device=device)  # type: ignore[arg-type]
        self.bare_plan = Plan.of(bare.branches, device)  # type: ignore[arg-type]
        wanted = sorted(set(ends))
        self.ends = torch.tensor(wanted, device=device)  # type: ignore[arg-type]
        self.end_of = torch.tensor([wanted.index(end) for end in ends], device=device)  # type: ignore[arg-type]
        self.ends_plan = Plan.of(bare.branches, device, wanted)  # type: ignore[arg-type]


class LayerSweep:
    """A paused forward over the rows of all requests.

    Use: for each edited layer in order, ``advance_to(layer)``, ``activations(z_layer)``, ``keys(layer)``, write the
    update into the model, and go on.

    Args:
        rows: per request, its encoded prompts, the bare prompt first; every request has the same number.
        weights: ``[rows per request]`` averaging weights of the keys, summing to 1.
        layers: edited layers, ascending.
        z_layer: layer whose output the targets refer to (>= the last edited layer).
        batch_tokens: tokens that run together; bounds the temporaries, not the result. ``None``: enough for speed.

    Attributes:
        padded: why padded rows are run instead of packed tokens, or ``None``.
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
        batch_tokens: int | None = None,
    ) -> None:
        self._arch = arch
        every = [row for request in rows for row in request]
        self.padded = padded_because(arch, every)
        self._first = min(layers)
        self._batch_tokens = BATCH_TOKENS if batch_tokens is None else batch_tokens
        self._least = max(map(len, every))

        def build(tokens: int) -> PaddedSweep | _PackedSweep:
            if self.padded is None:
                return _PackedSweep(arch, rows, weights, layers, z_layer, tokens)
            return PaddedSweep(
                model, arch, rows, weights, layers, z_layer, pad_id=pad_id, batch_tokens=tokens
            )

        self._build = build
        self._sweep: PaddedSweep | _PackedSweep | None = None
        self._at = self._first

    def _try(self, call: Callable[[PaddedSweep | _PackedSweep], T]) -> T:
        """Run a call; when memory runs out, from the start once more with half the tokens at a time."""
        while True:
            try:
                if self._sweep is None:
                    self._sweep = self._build(self._batch_tokens)
                    # The weights below this layer are final: they give the states that were there before.
                    self._sweep.advance_to(self._at)
                return call(self._sweep)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self._batch_tokens <= self._least:
                    raise
                message = str(error).splitlines()[0]
            self._sweep = None
            release_memory(self._arch)
            self._batch_tokens = max(self._least, self._batch_tokens // 2)
            warnings.warn(
                f"out of memory in the sweep ({message}): going on with {self._batch_tokens} tokens in a batch",
                stacklevel=3,
            )

    def advance_to(self, layer: int) -> None:
        """Run the blocks up to (not including) ``layer`` with the model's present weights."""
        self._try(lambda sweep: sweep.advance_to(layer))
        self._at = layer

    def keys(self, layer: int) -> Tensor:
        """``[n, f]`` weighted mean over templates of the input of ``layer``'s edited matrix, in fp64."""
        return self._try(lambda sweep: sweep.keys(layer))

    def activations(self, z_layer: int) -> Tensor:
        """``[n, d]`` output of block ``z_layer`` at the lookup token of the bare prompt, in fp64."""
        return self._try(lambda sweep: sweep.activations(z_layer))


class _PackedSweep:
    def __init__(
        self,
        arch: ResolvedArch,
        rows: Sequence[Sequence[Encoded]],
        weights: Sequence[float],
        layers: Sequence[int],
        z_layer: int,
        batch_tokens: int,
    ) -> None:
        self._arch = arch
        self._weights = torch.tensor(list(weights), dtype=torch.float64)
        self._runner = BlockRunner(arch)
        self._means: list[Tensor] = []  # mean keys of every part, while the sweep stands still
        self._first = self._at = min(layers)
        self._stop = z_layer + 1
        cut = [[row.ids[: row.lookup + 1] for row in request] for request in rows]
        self._trunk = Trunk(arch, Forest.common(cut, most=batch_tokens), stop=self._first)
        self._parts = [_Part(arch, rows[a:b], self._trunk) for a, b in _spans(cut, batch_tokens)]
        make: Callable[[Forest, Trunk], _Tokens] = lambda forest, trunk: _Tokens(  # noqa: E731
            arch, forest, trunk, self._first, self._stop
        )
        # A trunk is tokens like any other, with nothing before them.
        self._shared = make(self._trunk.forest, Trunk(arch, Forest())) if len(self._trunk.forest) else None
        self._own = [make(part.forest, self._trunk) if len(part.forest) else None for part in self._parts]
        count = sum(len(tokens.forest) for tokens in self._all())
        weight: Tensor = arch.mlp_out(0).weight  # type: ignore[assignment]
        size = weight.element_size() * max(arch.key_dim(layer) for layer in layers)
        # A norm behind the last matrix makes the block's output more than a sum with its product, and in half
        # precision that sum would be rounded twice.
        exact = weight.dtype in (torch.float32, torch.float64) and not arch.row.normed_output
        self._correct = exact and count * size <= KEPT_BYTES

    def _all(self) -> list[_Tokens]:
        """All tokens, what others attend to first."""
        return [tokens for tokens in (self._shared, *self._own) if tokens is not None]

    def advance_to(self, layer: int) -> None:
        while self._at < layer:
            paused = bool(self._means)
            # The weights may have changed since the pause.
            if not (paused and self._correct):
                self._run()
            module = self._arch.mlp_out(self._at)
            for tokens in self._all():
                output = tokens.output
                if paused and self._correct:
                    with torch.no_grad():
                        moved = module(tokens.keys).reshape(output.shape) - tokens.product.reshape(
                            output.shape
                        )
                    output = output + moved
                tokens.hidden = output
                tokens.forget()
            self._means.clear()
            self._at += 1

    def _run(self) -> None:
        """Outputs of the block that the sweep stands at, and the mean keys of every part."""
        layer, runner = self._at, self._runner
        trunk: tuple[Tensor, Tensor] | None = None
        trunk_keys: Tensor | None = None
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # A copy: some blocks add to the output in place.
            seen[:] = args[0].detach(), output.detach().clone()

        def first(_layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal trunk
            trunk = (k, v)
            return trunk

        def later(_layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return (k, v) if trunk is None else (torch.cat([trunk[0], k]), torch.cat([trunk[1], v]))

        self._means.clear()
        handle = self._arch.mlp_out(layer).register_forward_hook(keep)
        try:
            with torch.no_grad(), attending(self._arch, runner.attend), fused_activations(self._arch):
                if self._shared is not None:
                    self._shared.run(runner, layer - self._first, layer, first, seen, self._correct)
                    trunk_keys = seen[0]
                for part, own in zip(self._parts, self._own, strict=True):
                    found = [trunk_keys]
                    if own is not None:
                        own.run(runner, layer - self._first, layer, later, seen, self._correct)
                        found.append(seen[0])
                    keys = _gather(found, part.lookup).double()
                    keys = keys.view(part.requests, len(self._weights), -1)
                    self._means.append(torch.einsum("nrf,r->nf", keys, self._weights.to(keys.device)))
        finally:
            handle.remove()

    def keys(self, layer: int) -> Tensor:
        self._pause_at(layer)
        return torch.cat(self._means)

    def _pause_at(self, layer: int) -> None:
        self.advance_to(layer)
        if not self._means:
            self._run()

    def activations(self, z_layer: int) -> Tensor:
        self._pause_at(self._at)
        return torch.cat(
            [self._look_ahead(part, own, z_layer) for part, own in zip(self._parts, self._own, strict=True)]
        )

    def _look_ahead(self, part: _Part, own: _Tokens | None, z_layer: int) -> Tensor:
        both = (self._shared, own)
        hidden = _gather([None if tokens is None else tokens.output for tokens in both], part.bare)[None]
        if self._at == z_layer:
            return hidden[0, part.ends.to(hidden.device)][part.end_of.to(hidden.device)].double()
        runner = self._runner
        with torch.no_grad(), attending(self._arch, runner.attend), fused_activations(self._arch):
            for layer in range(self._at + 1, z_layer + 1):
                call = _call_at(both, layer - self._first, part.bare)
                if layer < z_layer:
                    hidden = runner.block(layer, hidden, call, part.bare_plan, _itself)
                else:
                    hidden = runner.block_at(layer, hidden, call, part.ends_plan, _itself, part.ends)
        return hidden[0, part.end_of.to(hidden.device)].double()


def _gather(parts: Sequence[Tensor | None], numbers: Tensor) -> Tensor:
    """Rows of tokens by number, counted through trunk and own tokens."""
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts if part is not None])
    return rows[numbers.to(rows.device)]


def _call_at(both: Sequence[_Tokens | None], index: int, numbers: Tensor) -> Call:
    """A block's arguments at tokens by number, counted through trunk and own tokens."""
    there = [tokens for tokens in both if tokens is not None]
    name, named = there[0].calls[index]
    for tokens in there[1:]:
        named = joined(named, tokens.calls[index][1])
    return name, at_tokens(named, numbers, sum(len(tokens.forest) for tokens in there))


def _itself(_layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def _spans(rows: Sequence[Sequence[Sequence[int]]], batch_tokens: int) -> list[tuple[int, int]]:
    """Consecutive requests of about ``batch_tokens`` tokens, not counting what they share."""
    spans, start, count = [], 0, 0
    for index, request in enumerate(rows):
        size = sum(len(row) for row in request)
        if index > start and count + size > batch_tokens:
            spans.append((start, index))
            start, count = index, 0
        count += size
    return [*spans, (start, len(rows))]


def keys_at(
    model: nn.Module, arch: ResolvedArch, layer: int, rows: Sequence[Encoded], *, pad_id: int = 0
) -> Tensor:
    """``[len(rows), f]`` inputs of the edited matrix of ``layer`` at the lookup token of each row."""
    if padded_because(arch, rows) is not None:
        return padded_keys_at(model, arch, layer, rows, pad_id=pad_id)
    forest = Forest()
    lookup = [forest.insert(row.ids[: row.lookup + 1])[-1] for row in rows]
    tokens = _Tokens(arch, forest, Trunk(arch, Forest()), layer, layer + 1)
    wanted = sorted(set(lookup))
    runner, found = BlockRunner(arch), list[Tensor]()

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].detach().reshape(len(wanted), -1))
        raise StopForward

    handle = arch.mlp_out(layer).register_forward_pre_hook(keep)
    device = tokens.hidden.device
    try:
        with torch.no_grad(), suppress(StopForward), attending(arch, runner.attend):
            plan = Plan.of(forest.branches, device, wanted)
            at = torch.tensor(wanted, device=device)
            runner.block_at(layer, tokens.hidden, tokens.calls[0], plan, _itself, at)
    finally:
        handle.remove()
    return found[0][[wanted.index(number) for number in lookup]]
