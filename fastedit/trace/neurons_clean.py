"""What the attribution of neurons starts from: questions, where activations are, and one clean forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.forest import Forest
from fastedit.engine.packed import Plan, forest_tensors, pass_through

__all__ = ["Activation", "CleanPass", "Question", "Spot", "last_layer_probability", "spot"]

Activation = Literal["activation", "pre_activation"]


@dataclass(frozen=True)
class Question:
    """A prompt and the one token whose probability is attributed.

    Attributes:
        ids: the prompt's tokens.
        position: token that predicts the answer, and whose activations are scaled; the last of a causal model.
        answer: token id.
    """

    ids: tuple[int, ...]
    position: int
    answer: int


@dataclass(frozen=True)
class Spot:
    """Where a layer's activation is: the output of ``module``, or its input."""

    module: nn.Module
    output: bool

    def watch(self, see: Any) -> torch.utils.hooks.RemovableHandle:
        """Call ``see`` with the activation of every call; what it returns, unless ``None``, takes its place."""

        def after(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
            return see(output)  # type: ignore[no-any-return]

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            new = see(args[0])
            return None if new is None else (new, *args[1:])

        if self.output:
            return self.module.register_forward_hook(after)
        return self.module.register_forward_pre_hook(before)


def spot(arch: ResolvedArch, layer: int, activation: Activation) -> Spot:
    """Where neurons of ``layer`` are read and scaled.

    ``"activation"`` is what the last matrix of the MLP reads (the paper's neurons); ``"pre_activation"`` is what the
    first one gives, the gate's in gated MLPs, as published code for GPT-2 and Llama has it.

    Raises:
        ValueError: pre-activations of a gate that shares its matrix with the up projection.
    """
    if activation == "activation":
        return Spot(arch.mlp_out(layer), output=False)
    if arch.row.fused_gate:
        raise ValueError(
            f"activation: must be 'activation' for {arch.row.model_type!r}, whose gate has no matrix of its own"
        )
    return Spot(arch.mlp_gate(layer) or arch.mlp_in(layer), output=True)


class CleanPass:
    """One forward over all questions' tokens, shared beginnings once.

    Attributes:
        columns: per question, the tokens before its last.
        last: ``[Q]`` its last token.
        inputs, outputs: per layer ``[Q, d]``, what goes into and comes out of the block at the last tokens.
        activations: per layer ``[Q, f]``.
        stores: per layer, keys and values ``[N, G, D]`` of all N tokens.
        calls: per layer, the block's other arguments for all N tokens; see `fastedit.engine.packed`.
    """

    def __init__(self, arch: ResolvedArch, questions: Sequence[Question], activation: Activation) -> None:
        forest = Forest()
        paths = [forest.insert(question.ids) for question in questions]
        self.tokens = len(forest)
        self.columns = [path[:-1] for path in paths]
        self.last = torch.tensor([path[-1] for path in paths])
        self.stores: dict[int, tuple[Tensor, Tensor]] = {}
        self.outputs: list[Tensor] = []
        self.activations: list[Tensor] = []
        ids, positions = forest_tensors(forest)
        plans: dict[torch.device, Plan] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            self.stores[layer] = k.clone(), v.clone()
            plan = plans.setdefault(q.device, Plan.of(forest.branches, q.device))
            return plan.attend(q, k, v, *self.stores[layer], **options)

        def at_last(value: Tensor) -> Tensor:
            rows = value.detach().reshape(self.tokens, -1)
            return rows[self.last.to(rows.device)]

        def leave(_block: nn.Module, _args: object, output: Any) -> None:
            self.outputs.append(at_last(block_output(output)))

        def see(value: Tensor) -> None:
            self.activations.append(at_last(value))

        handles = []
        for layer in range(arch.depth):
            handles.append(arch.block(layer).register_forward_hook(leave))
            handles.append(spot(arch, layer, activation).watch(see))
        every = torch.arange(self.tokens)
        try:
            passed = pass_through(arch, ids, positions, attend, start=0, narrow=arch.depth, keep=every)
        finally:
            for handle in handles:
                handle.remove()
        self.calls = passed.calls
        self.inputs = [at_last(passed.hidden), *self.outputs[:-1]]


def last_layer_probability(arch: ResolvedArch, hidden: Tensor, answers: Tensor) -> Tensor:
    """``[n]`` probability of each row's answer, from outputs of the last block ``[n, d]``."""
    logits = arch.logits(hidden)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide, dim=-1).gather(1, answers.to(wide.device)[:, None])[:, 0]
