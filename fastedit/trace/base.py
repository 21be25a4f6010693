"""The clean and the corrupted run of some prompts, once, with everything that restored cells start from.

All rows are one packed row of tokens (`fastedit.engine.packed`): per prompt its clean row, then for every set of noise
draws and every sample the tokens from the subject's first one on. Tokens before it do not see the noise, in whatever
sample: they are there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.attention import attending
from fastedit.engine.forest import Branch
from fastedit.engine.fused import fused_activations
from fastedit.engine.packed import BlockRunner, Call, Plan, pass_through
from fastedit.trace.hooks import hooks, part_module
from fastedit.trace.prompts import TracePrompt

__all__ = ["Base", "Rows"]

Rows = tuple[Tensor, ...]


class Base:
    """What a sweep keeps of the runs without restored cells.

    Attributes:
        calls: per block, its arguments at all N tokens.
        hidden: per block its input ``[N, d]``; one more, the last block's output.
        parts: ``"mlp"`` and ``"attn"`` -> per layer the module's output ``[N, d]``, for those asked for.
        keys, values: per layer ``[N, G, D]``.
    """

    def __init__(
        self,
        arch: ResolvedArch,
        prompts: Sequence[TracePrompt],
        noises: Sequence[Rows],
        *,
        replace: bool,
        parts: Sequence[str],
    ) -> None:
        """Run.

        Args:
            noises: per prompt one or two sets ``[S, k, d]`` of noise on its subject's tokens.
            replace: put the noise in place of the embeddings.
            parts: sub-layers whose outputs are kept.
        """
        self._prompts = prompts
        self.calls: list[Call] = []
        self.hidden: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {part: [] for part in parts}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._starts: list[int] = []
        self._samples = [len(sets[0]) for sets in noises]
        ids: list[int] = []
        places: list[int] = []
        self._branches: list[Branch] = []
        noisy: list[int] = []
        for prompt, sets in zip(prompts, noises, strict=True):
            start, count, first = len(ids), len(prompt), prompt.span[0]
            self._starts.append(start)
            ids += prompt.ids
            places += range(count)
            self._branches.append(Branch(start, start + count, ()))
            seen = tuple(range(start, start + first))
            for _ in range(sum(len(rows) for rows in sets)):
                self._branches.append(Branch(len(ids), len(ids) + count - first, seen))
                noisy += range(len(ids), len(ids) + prompt.span[1] - first)
                ids += prompt.ids[first:]
                places += range(first, count)
        self._count = len(ids)
        self._noisy = torch.tensor(noisy)
        noise = torch.cat([rows.flatten(0, 1) for sets in noises for rows in sets])
        self._plan = Plan.of(self._branches, arch.embed.weight.device)  # type: ignore[union-attr,arg-type]
        self._run(arch, torch.tensor(ids), torch.tensor(places), noise, replace)

    def _run(self, arch: ResolvedArch, ids: Tensor, places: Tensor, noise: Tensor, replace: bool) -> None:
        def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            at, given = self._noisy.to(output.device), noise.to(output.device)
            noised = output.clone()
            # Added in double precision and rounded once, as published.
            noised[0, at] = (given if replace else output[0, at].double() + given).to(output.dtype)
            return noised

        def keep(found: list[Tensor]) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                # A copy: some blocks add to the output in place.
                found.append(block_output(output).detach().reshape(-1, arch.width).clone())

            return hook

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            if layer != len(self.keys):
                raise RuntimeError(f"attention of layer {layer} ran out of turn")
            self.keys.append(k.contiguous())
            self.values.append(v.contiguous())
            return self._plan.attend(q, k, v, self.keys[-1], self.values[-1], **options)

        outputs: list[Tensor] = []
        every = torch.arange(self._count)
        with hooks() as hook:
            hook(arch.embed, corrupt)
            for layer in range(arch.depth):
                hook(arch.block(layer), keep(outputs))
                for part, found in self.parts.items():
                    hook(part_module(arch, part, layer), keep(found))
            passed = pass_through(arch, ids, places, attend, start=0, narrow=arch.depth, keep=every)
        self.calls = passed.calls
        self.hidden = [passed.hidden[0], *outputs]
        if len(outputs) < arch.depth:
            # The pass ends inside the last block's hooks, possibly before ours.
            self.hidden.append(passed.final[0])

    @property
    def count(self) -> int:
        """Number of packed tokens N."""
        return self._count

    def store(self, layer: int, _k: Tensor, _v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that come before those of restored cells."""
        return self.keys[layer], self.values[layer]

    def clean(self, prompt: int, token: int) -> int:
        """Number of a token of a clean row."""
        return self._starts[prompt] + token

    def corrupted(self, prompt: int, rows: int, sample: int, token: int) -> int:
        """Number of a token of a corrupted row; ``rows``: which set of draws."""
        chosen = self._prompts[prompt]
        first = chosen.span[0]
        if token < first:
            return self._starts[prompt] + token
        row = rows * self._samples[prompt] + sample
        return self._starts[prompt] + len(chosen) + row * (len(chosen) - first) + token - first

    def restored(self, arch: ResolvedArch, part: str, layer: int) -> Tensor:
        """``[N, d]`` output of block ``layer`` if ``part`` gave at each token what it gives in the clean row.

        Patching a sub-layer's output at one token changes the block's output at that token only, so one run of the
        block serves the first patched layer of every token and sample.
        """
        source = self.parts[part][layer]
        number = list(range(self._count))
        for index, prompt in enumerate(self._prompts):
            first, begin = prompt.span[0], self._starts[index] + len(prompt)
            end = self._starts[index + 1] if index + 1 < len(self._starts) else self._count
            for token in range(begin, end):
                number[token] = self._starts[index] + first + (token - begin) % (len(prompt) - first)
        values = source[torch.tensor(number, device=source.device)]

        def patch(_module: nn.Module, _args: Any, output: Any) -> None:
            block_output(output).view(-1, arch.width).copy_(values)

        runner = BlockRunner(arch)
        with hooks() as hook, torch.no_grad(), attending(arch, runner.attend), fused_activations(arch):
            hook(part_module(arch, part, layer), patch)
            return runner.block(
                layer, self.hidden[layer][None], self.calls[layer], self._plan, lambda _, k, v: (k, v)
            )[0]
