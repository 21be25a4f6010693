"""Attribution on whole rows: for encoders, and for models whose attention cannot be handed over.

In an encoder every token above the scaled layer changes, and some decoders compute attention in line. There each layer
runs its copies of the whole prompt from that layer up; what is below comes from one clean forward. Half-precision
blocks run on a float32 stream, as in the sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.fused import fused_activations
from fastedit.engine.memory import saved_bytes
from fastedit.engine.precision import stream_dtype, wide_residual
from fastedit.engine.replay import Replay
from fastedit.trace.neurons_budget import TEMPORARIES, NeuronBudget
from fastedit.trace.neurons_clean import (
    Activation,
    Question,
    checked_probabilities,
    log_probability,
    of_logarithm,
    spot,
)

__all__ = ["NeuronRows"]


class NeuronRows:
    """The same as `NeuronSweep`, a question and a layer at a time."""

    def __init__(
        self,
        arch: ResolvedArch,
        questions: Sequence[Question],
        layers: Sequence[int],
        fractions: Sequence[float],
        activation: Activation,
        budget: NeuronBudget,
    ) -> None:
        self._arch, self._questions, self._layers = arch, questions, layers
        self._fractions, self._kind, self._budget = tuple(fractions), activation, budget
        self._device: torch.device = arch.embed.weight.device  # type: ignore[assignment,union-attr]
        self._token_bytes = 0
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
        length = len(question.ids)
        inputs, activations = self._clean(self._capture(question, 1), length, question.position)
        kept = sum(tensor.nbytes for tensor in (*inputs, *activations))
        taken = []
        for layer in self._layers:
            rows = self._rows_at_once(layer, length, kept, inputs[-2])
            taken.append(rows * self._row_bytes(layer, length, inputs[-2]))
        return kept, max(taken)

    def _of_one(self, question: Question) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradients of the attributed layers, activations of all, and the clean probability ``[1]``."""
        arch, length = self._arch, len(question.ids)
        answer = torch.tensor([question.answer])
        replay = self._capture(question, 1)
        inputs, activations = self._clean(replay, length, question.position)
        with torch.no_grad(), self._running():
            clean = log_probability(arch, inputs[-1][:, question.position], answer)
        probability = checked_probabilities(clean)
        kept = sum(tensor.nbytes for tensor in (*inputs, *activations))
        gradients = []
        for layer in self._layers:
            size = self._rows_at_once(layer, length, kept, inputs[-2])
            if len(replay.hidden) != size:
                # The model's own masks and biases, for as many rows as run together.
                del replay
                replay = self._capture(question, size)
            with self._running():
                gradients.append(self._of_layer(replay, question, layer, inputs[layer], activations[layer]))
        return gradients, activations, probability

    def _of_layer(
        self, replay: Replay, question: Question, layer: int, entering: Tensor, activation: Tensor
    ) -> Tensor:
        """Gradient ``[f]`` of one layer, in as many rows at a time as the captured arguments are for."""
        size, total = len(replay.hidden), torch.zeros_like(activation)
        logarithm = of_logarithm(self._arch)
        answers = torch.tensor([question.answer] * size)
        for start in range(0, len(self._fractions), size):
            some = self._fractions[start : start + size]
            padded = [*some, *[some[-1]] * (size - len(some))]
            scale = torch.tensor(padded, device=total.device, dtype=total.dtype)
            leaf = (scale[:, None] * activation).requires_grad_()
            final = self._upward(replay, layer, entering, leaf, question.position)
            with torch.enable_grad():
                found = log_probability(self._arch, final[:, question.position], answers)[: len(some)]
                value = found if logarithm else found.exp()
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            gradient = gradient[: len(some)]
            if logarithm:
                gradient = found.detach().exp().to(gradient)[:, None] * gradient
            total += gradient.sum(dim=0)
        return total

    def _capture(self, question: Question, rows: int) -> Replay:
        ids = torch.tensor([question.ids] * rows, device=self._device)
        return Replay.capture(self._arch.model, self._arch, ids, torch.ones_like(ids), start=0)

    def _clean(self, replay: Replay, length: int, position: int) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs ``[1, T, d]`` of all blocks and the last output; activations ``[f]`` at the position."""
        hidden = replay.hidden.to(stream_dtype(replay.hidden.dtype))
        inputs, activations = [hidden], list[Tensor]()

        def see(value: Tensor) -> None:
            row = value.detach().reshape(length, -1)[position]
            activations.append(row.to(stream_dtype(row.dtype), copy=True))

        with torch.no_grad(), self._running():
            for layer in range(self._arch.depth):
                with spot(self._arch, layer, self._kind).watched(see):
                    hidden = replay.run(hidden, start=layer, stop=layer + 1)
                inputs.append(hidden)
        return inputs, activations

    def _upward(self, replay: Replay, layer: int, entering: Tensor, leaf: Tensor, position: int) -> Tensor:
        """Output ``[n, T, d]`` of the last block with the activation at the position replaced by ``leaf [n, f]``."""
        count, length = len(leaf), entering.shape[1]

        def put(value: Tensor) -> Tensor:
            rows = value.reshape(count, length, -1)
            rows = torch.cat([rows[:, :position], leaf[:, None].to(rows), rows[:, position + 1 :]], dim=1)
            return rows.reshape(value.shape)

        with torch.enable_grad():
            with spot(self._arch, layer, self._kind).watched(put):
                hidden = replay.run(entering.expand(count, -1, -1).clone(), start=layer, stop=layer + 1)
            return replay.run(hidden, start=layer + 1)

    def _rows_at_once(self, layer: int, length: int, kept: int, entering: Tensor) -> int:
        """Rows that fit the budget: what the last block keeps for a row, times the blocks that keep it."""
        if not self._token_bytes:
            ids = torch.zeros(1, length, dtype=torch.int64, device=self._device)
            single = Replay.capture(self._arch.model, self._arch, ids, torch.ones_like(ids), start=0)
            hidden, top = entering.detach().clone().requires_grad_(), self._arch.depth - 1
            with self._running():
                saved = saved_bytes(self._arch, lambda: single.run(hidden, start=top))
            self._token_bytes = max(1, saved // length)
        left = self._budget.sweep(self._arch, self._device, kept)
        return max(1, min(len(self._fractions), left // self._row_bytes(layer, length, entering)))

    def _row_bytes(self, layer: int, length: int, entering: Tensor) -> int:
        """What a row takes: all blocks' activations, one block's gradients, its capture with a mask, its logits."""
        blocks = TEMPORARIES * (self._arch.depth - layer) + 1
        captured = 4 * entering.nbytes + 8 * length * length
        return int(self._token_bytes * blocks * length) + captured + self._budget.logits_bytes(self._arch)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with wide_residual(self._arch), fused_activations(self._arch):
            yield
