"""The clean and the corrupted runs of one prompt as rows, and how its blocks are called again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.fused import fused_activations
from fastedit.engine.packed import named_arguments
from fastedit.engine.padded import Frozen
from fastedit.forward import StopForward
from fastedit.trace.hooks import hooks, part_module
from fastedit.trace.prompts import TracePrompt

__all__ = ["PaddedBase"]


class PaddedBase:
    """What padded sweeps keep of the runs without restored cells.

    Attributes:
        clean, corrupted: per block its input ``[1, T, d]`` and ``[R, T, d]``; one more, the last block's output.
        clean_parts, parts: ``"mlp"`` and ``"attn"`` -> per layer the same of the sub-layer's output.
        cached: blocks take keys and values of earlier tokens, so that later tokens can run alone.
    """

    def __init__(
        self,
        arch: ResolvedArch,
        prompt: TracePrompt,
        noises: Sequence[Tensor],
        *,
        replace: bool,
        parts: Sequence[str],
        cached: bool,
    ) -> None:
        """Run the prompt, and all sets of draws ``[S, k, d]``, one set's samples behind the other's.

        Args:
            cached: the model's attention takes a mask and may be given a cache.
        """
        self._arch, self._length, self._span = arch, len(prompt), prompt.span
        self._calls: list[tuple[str, dict[str, Any]]] = []
        self._cache: Any = None
        ids = torch.tensor(prompt.ids)
        self.clean, self.clean_parts = self._run(ids[None], None, replace, parts, cached)
        self.cached = cached and all(_takes_cache(named) for _, named in self._calls)
        noise = torch.cat(list(noises))
        self.corrupted, self.parts = self._run(ids.expand(len(noise), -1), noise, replace, parts, self.cached)

    def _run(
        self, ids: Tensor, noise: Tensor | None, replace: bool, parts: Sequence[str], cached: bool
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        arch, (first, end) = self._arch, self._span
        inputs: list[Tensor] = []
        found: dict[str, list[Tensor]] = {part: [] for part in parts}
        device = arch.embed.weight.device  # type: ignore[union-attr]

        def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if noise is None:
                return output
            given, noised = noise.to(output.device), output.clone()
            # Added in double precision and rounded once, as published.
            noised[:, first:end] = (given if replace else output[:, first:end].double() + given).to(
                output.dtype
            )
            return noised

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = named_arguments(block, args, kwargs)
            name = next(iter(named))
            inputs.append(named.pop(name).detach().clone())
            if noise is None:
                self._calls.append((name, named))

        def keep(into: list[Tensor]) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                # A copy: some blocks add to the output in place.
                into.append(block_output(output).detach().reshape(*ids.shape, -1).clone())

            return hook

        def stop(_block: nn.Module, _args: Any, _output: Any) -> None:
            # Logits of all tokens are not wanted.
            raise StopForward

        with hooks() as hook, torch.no_grad(), fused_activations(arch), suppress(StopForward):
            hook(arch.embed, corrupt)
            for layer in range(arch.depth):
                hook(arch.block(layer), enter, before=True)
                for part, into in found.items():
                    hook(part_module(arch, part, layer), keep(into))
            hook(arch.block(arch.depth - 1), keep(inputs))
            hook(arch.block(arch.depth - 1), stop)
            ids = ids.to(device)  # type: ignore[arg-type]
            options: dict[str, Any] = {"use_cache": False}
            if cached:
                # No configuration: a sliding-window layer would otherwise drop keys that later tokens still need.
                self._cache = DynamicCache()
                options = {"past_key_values": self._cache, "use_cache": True}
            arch.model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        for part, outputs in found.items():
            if len(outputs) != arch.depth:
                name = type(part_module(arch, part, 0)).__name__
                raise RuntimeError(f"model: its blocks do not call {name}, so {part} cannot be restored")
        return inputs, found

    def begin(self, token: int) -> int:
        """First token that is run where one is restored."""
        return token if self.cached else 0

    def call(self, layer: int, begin: int, rows: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """The name of a block's hidden states, and its other arguments for tokens from ``begin`` on.

        Args:
            rows: the corrupted runs whose keys and values come before them.
        """
        name, named = self._calls[layer]
        given: dict[str, Any] = {}
        for key, value in named.items():
            if isinstance(value, DynamicCache):
                kept = self._cache.layers[layer]
                at = torch.tensor(list(rows), device=kept.keys.device)
                given[key] = Frozen(*(x[at, :, :begin] for x in (kept.keys, kept.values)))
            elif key == "attention_mask":
                given[key] = self._mask(value, begin, layer)
            elif key == "alibi" and isinstance(value, Tensor):
                given[key] = value.repeat(len(rows), *[1] * (value.ndim - 1))
            elif key == "use_cache":
                given[key] = False
            else:
                given[key] = self._later(value, begin)
        return name, given

    def _mask(self, captured: Any, begin: int, layer: int) -> Any:
        if captured is None and begin:
            # Left out where every token sees all before it: here a token's place is not its row in the mask.
            device = self.corrupted[layer].device
            places = torch.arange(self._length, device=device)
            hidden = places[None] > places[begin:, None]
            lowest = torch.finfo(self.corrupted[layer].dtype).min
            blank = torch.zeros(hidden.shape, dtype=self.corrupted[layer].dtype, device=device)
            return blank.masked_fill_(hidden, lowest)[None, None]
        return captured[..., begin:, :] if isinstance(captured, Tensor) and captured.ndim == 4 else captured

    def _later(self, value: Any, begin: int) -> Any:
        """Positions, rotary tables and the like of one row ``[1, T, ...]`` from a token on; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self._later(item, begin) for item in value)
        if isinstance(value, dict):
            return {name: self._later(item, begin) for name, item in value.items()}
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == self._length:
            return value[:, begin:]
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) == self._length:
            return value[begin:]
        return value


def _takes_cache(named: dict[str, Any]) -> bool:
    return any(isinstance(value, DynamicCache) for value in named.values())
