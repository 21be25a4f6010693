"""Run the upper blocks of a model again from a captured forward.

An injection into the output of block ``l`` changes nothing below it, so one clean forward is captured up
to the block of interest, together with the arguments that the model hands to every later block (masks,
positions, rotary embeddings, ALiBi). The later blocks are then the model's own modules, called directly:
no second implementation of any architecture, and bit-identical outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.forward import StopForward, evaluating

__all__ = ["BlockCall", "Replay", "StopForward", "evaluating"]


@dataclass(frozen=True)
class BlockCall:
    """The arguments the model passed to one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if "hidden_states" in self.kwargs:
            return block_output(block(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return block_output(block(hidden, *self.args, **self.kwargs))


class Replay:
    """A captured forward whose blocks ``start..depth-1`` can be run again from any hidden state.

    Attributes:
        start: first captured block.
        hidden: ``[B, S, d]`` input of block ``start`` in the clean forward.
        final: ``[B, S, d]`` output of the last captured block in the clean forward.
        mask: ``[B, S]`` attention mask (1 on tokens, right padded).
    """

    def __init__(
        self,
        arch: ResolvedArch,
        start: int,
        calls: list[BlockCall],
        hidden: Tensor,
        final: Tensor,
        mask: Tensor,
    ):
        self.arch = arch
        self.start = start
        self.hidden = hidden
        self.final = final
        self.mask = mask
        self._calls = calls

    @property
    def stop(self) -> int:
        """One past the last captured block."""
        return self.start + len(self._calls)

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        arch: ResolvedArch,
        ids: Tensor,
        mask: Tensor,
        *,
        start: int,
        stop: int | None = None,
    ) -> Replay:
        """One forward without gradients, ended after block ``stop - 1`` (default: the last).

        Args:
            ids: ``[B, S]`` int64 token ids, right padded.
            mask: ``[B, S]`` attention mask, 1 on tokens.
            start: first block that will be run again.
            stop: one past the last block that will be run again.
        """
        stop = arch.depth if stop is None else stop
        seen: dict[int, BlockCall] = {}
        first: list[Tensor] = []
        final: list[Tensor] = []

        def remember(index: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                positional = "hidden_states" not in kwargs
                hidden = args[0] if positional else kwargs["hidden_states"]
                if index == start:
                    first.append(hidden.detach())
                seen[index] = BlockCall(args[1:] if positional else args, kwargs)

            return hook

        def end(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            final.append(block_output(output).detach())
            raise StopForward

        handles = [
            arch.block(i).register_forward_pre_hook(remember(i), with_kwargs=True) for i in range(start, stop)
        ]
        handles.append(arch.block(stop - 1).register_forward_hook(end))
        embedding: Tensor = arch.embed.weight  # type: ignore[assignment]
        device = embedding.device
        try:
            with torch.no_grad():
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        calls = [seen[i] for i in range(start, stop)]
        return cls(arch, start, calls, first[0], final[0], mask.to(device))

    def run(self, hidden: Tensor, *, start: int | None = None, stop: int | None = None) -> Tensor:
        """Output of block ``stop - 1`` when block ``start`` is given ``hidden [B, S, d]``."""
        start = self.start if start is None else start
        stop = self.stop if stop is None else stop
        for index in range(start, stop):
            hidden = self._calls[index - self.start](self.arch.block(index), hidden)
        return hidden

    def run_block_inputs(self, hidden: Tensor, index: int, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Run block ``index`` alone; returns its output and the input ``[B, S, f]`` of ``module`` inside it."""
        inputs: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
        try:
            output = self.run(hidden, start=index, stop=index + 1)
        finally:
            handle.remove()
        # OPT flattens batch and sequence before its MLP.
        return output, inputs[0].reshape(*hidden.shape[:2], -1)
