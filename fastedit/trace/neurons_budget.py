"""How a budget of bytes is divided: prompts into groups, rows of the sweep into chunks, rows of logits into parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.forest import Forest
from fastedit.trace.neurons_clean import Question

__all__ = ["TEMPORARIES", "NeuronBudget", "groups_of"]

TEMPORARIES = 1.3  # a backward holds gradients beside the activations that it has not freed yet

# Rows of logits at a time: about 25 MB of them for the vocabulary of GPT-2. More is not faster.
_HEAD_ROWS = {"cpu": 128, "cuda": 2048}
_FEW = 128
_LOGITS = 5  # tensors [rows, vocabulary] of a loss and its gradient


@dataclass(frozen=True)
class NeuronBudget:
    """Attributes:
    total: bytes above the model.
    """

    total: int

    def head_rows(self, arch: ResolvedArch, device: torch.device) -> int:
        """Rows whose logits are formed together: a tenth of the budget at most."""
        rows = int(0.1 * self.total) // self.logits_bytes(arch)
        return max(1, min(rows, _HEAD_ROWS.get(device.type, _FEW)))

    def head_bytes(self, arch: ResolvedArch, device: torch.device) -> int:
        """What their logits take."""
        return self.head_rows(arch, device) * self.logits_bytes(arch)

    def sweep(self, arch: ResolvedArch, device: torch.device, kept: int) -> int:
        """What is left for a sweep's backward beside ``kept`` bytes and the logits."""
        return max(0, self.total - kept - self.head_bytes(arch, device))

    @staticmethod
    def logits_bytes(arch: ResolvedArch) -> int:
        """What one row of logits takes, its loss and gradients included."""
        head: Tensor = arch.head.weight  # type: ignore[assignment]
        return _LOGITS * max(4, head.element_size()) * head.shape[0]


def groups_of(
    arch: ResolvedArch, questions: Sequence[Question], budget: NeuronBudget
) -> Iterator[list[Question]]:
    """Questions whose clean runs and results are kept together, in order: two fifths of the budget, one at least."""
    weight: Tensor = arch.mlp_out(0).weight  # type: ignore[assignment]
    size, width, depth = weight.element_size(), arch.width, arch.depth
    keys = sum(_inputs(arch, layer) for layer in range(depth))
    # A token keeps keys and values (no more heads than queries have); a question what enters, leaves and is scaled in
    # every layer, its gradients and scores; a block that runs holds the stream, its copies and the MLP's inside.
    token = 2 * keys * size
    question = max(4, size) * depth * (3 * width + 4 * arch.key_dim(0))
    running = max(4, size) * (16 * width + 4 * arch.key_dim(0))
    group: list[Question] = []
    forest = Forest()
    for one in questions:
        forest.insert(one.ids)
        taken = (token + running) * len(forest) + question * (len(group) + 1)
        if group and taken > 0.4 * budget.total:
            yield group
            group, forest = [], Forest()
            forest.insert(one.ids)
        group.append(one)
    yield group


def _inputs(arch: ResolvedArch, layer: int) -> int:
    """Features of all heads: what attention's last matrix reads."""
    weight: Tensor = arch.attn_out(layer).weight  # type: ignore[assignment]
    return weight.numel() // arch.width
