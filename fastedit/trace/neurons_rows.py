"""Attribution on whole rows: for encoders, and for models whose attention cannot be handed over.

In an encoder every token above the scaled layer changes, and some decoders compute attention in line. There each layer
runs its copies of the whole prompt from that layer up; what is below comes from one clean forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.memory import saved_bytes
from fastedit.engine.replay import Replay
from fastedit.trace.neurons_clean import Activation, Question, last_layer_probability, spot

__all__ = ["NeuronRows"]

_TEMPORARIES = 1.3


class NeuronRows:
    """The same as `NeuronSweep`, a layer at a time."""

    def __init__(
        self,
        arch: ResolvedArch,
        questions: Sequence[Question],
        layers: Sequence[int],
        fractions: Sequence[float],
        activation: Activation,
        memory_budget: int,
    ) -> None:
        self._arch, self._questions, self._layers = arch, questions, layers
        self._fractions, self._kind, self._budget = tuple(fractions), activation, memory_budget
        device = arch.embed.weight.device  # type: ignore[union-attr]
        self._device: torch.device = device  # type: ignore[assignment]
        self.activations: list[Tensor] = []
        self.probabilities = torch.empty(0)

    def run(self) -> list[Tensor]:
        """Per layer ``[Q, f]``: the gradient with respect to the scaled activation, summed over the steps."""
        found = [self._of_one(question) for question in self._questions]
        self.activations = [torch.stack(rows) for rows in zip(*(one[1] for one in found), strict=True)]
        self.probabilities = torch.cat([one[2] for one in found])
        return [torch.stack(rows) for rows in zip(*(one[0] for one in found), strict=True)]

    def predicted_bytes(self) -> tuple[int, int]:
        """Bytes above the model that the clean forward leaves, and that a layer's copies take at their peak."""
        question = max(self._questions, key=lambda question: len(question.ids))
        inputs, activations = self._clean(self._capture(question, 1), len(question.ids), question.position)
        self._rows_at_once(0, question, inputs[0])
        lowest = self._arch.depth - min(self._layers)
        total = int(_TEMPORARIES * self._row_bytes * lowest * len(question.ids) * len(self._fractions))
        return sum(tensor.nbytes for tensor in (*inputs, *activations)), min(total, self._budget)

    def _of_one(self, question: Question) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradients of the attributed layers, activations of all, and the clean probability ``[1]``."""
        arch, length = self._arch, len(question.ids)
        inputs, activations = self._clean(self._capture(question, 1), length, question.position)
        answer = torch.tensor([question.answer])
        with torch.no_grad():
            clean = last_layer_probability(arch, inputs[-1][:, question.position], answer)
        replay: Replay | None = None
        gradients = []
        for layer in self._layers:
            size = self._rows_at_once(layer, question, inputs[layer])
            if replay is None or len(replay.hidden) != size:
                # The model's own masks and biases, for as many rows as run together.
                replay = self._capture(question, size)
            total = torch.zeros_like(activations[layer])
            for start in range(0, len(self._fractions), size):
                some = self._fractions[start : start + size]
                padded = [*some, *[some[-1]] * (size - len(some))]
                scale = torch.tensor(padded, device=total.device, dtype=total.dtype)
                leaf = (scale[:, None] * activations[layer]).requires_grad_()
                final = self._upward(replay, layer, inputs[layer], leaf, question.position)
                p = last_layer_probability(arch, final[:, question.position], answer.expand(size))
                (gradient,) = torch.autograd.grad(p[: len(some)].sum(), leaf)
                total += gradient.sum(dim=0)
            gradients.append(total)
        return gradients, activations, clean

    def _capture(self, question: Question, rows: int) -> Replay:
        ids = torch.tensor([question.ids] * rows, device=self._device)
        return Replay.capture(self._arch.model, self._arch, ids, torch.ones_like(ids), start=0)

    def _clean(self, replay: Replay, length: int, position: int) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs ``[1, T, d]`` of all blocks and the last output; activations ``[f]`` at the position."""
        hidden, inputs = replay.hidden, [replay.hidden]
        activations: list[Tensor] = []
        for layer in range(self._arch.depth):

            def see(value: Tensor) -> None:
                activations.append(value.detach().reshape(length, -1)[position].clone())

            handle = spot(self._arch, layer, self._kind).watch(see)
            try:
                with torch.no_grad():
                    hidden = replay.run(hidden, start=layer, stop=layer + 1)
            finally:
                handle.remove()
            inputs.append(hidden)
        return inputs, activations

    def _upward(self, replay: Replay, layer: int, entering: Tensor, leaf: Tensor, position: int) -> Tensor:
        """Output ``[n, T, d]`` of the last block with the activation at the position replaced by ``leaf [n, f]``."""
        count, length = len(leaf), entering.shape[1]

        def put(value: Tensor) -> Tensor:
            rows = value.reshape(count, length, -1)
            rows = torch.cat([rows[:, :position], leaf[:, None].to(rows), rows[:, position + 1 :]], dim=1)
            return rows.reshape(value.shape)

        handle = spot(self._arch, layer, self._kind).watch(put)
        try:
            with torch.enable_grad():
                hidden = replay.run(entering.expand(count, -1, -1).clone(), start=layer, stop=layer + 1)
        finally:
            handle.remove()
        with torch.enable_grad():
            return replay.run(hidden, start=layer + 1)

    def _rows_at_once(self, layer: int, question: Question, entering: Tensor) -> int:
        """Rows that fit the budget: what the last block keeps for one row, times the blocks that keep it."""
        if not hasattr(self, "_row_bytes"):
            single = self._capture(question, 1)
            hidden = entering.detach().clone().requires_grad_()
            top = self._arch.depth - 1
            self._row_bytes = saved_bytes(self._arch, lambda: single.run(hidden, start=top)) // len(
                question.ids
            )
        blocks = self._arch.depth - layer
        per_row = _TEMPORARIES * max(1, self._row_bytes) * blocks * len(question.ids)
        return max(1, min(len(self._fractions), int(self._budget / per_row)))
