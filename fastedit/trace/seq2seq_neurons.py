"""Knowledge neurons of an encoder-decoder (T5): those of the decoder's MLPs.

The prompt is the encoder's input. A neuron's score is read where the decoder predicts the answer: the activation of
one decoder layer at the last token of the decoder's input (start token, forced prefix, earlier tokens of the answer)
is scaled, as in `fastedit.trace.neurons`. An encoder has no token that predicts the answer, so its neurons have no
such score. With ``positions="all"`` the activations of all the decoder's tokens are scaled together, each has a score,
and a neuron's is the highest of its own, so that it is above a threshold where any of them is (EasyEdit's T5, there on
the first matrix of the MLP: ``activation="pre_activation"``; of a gated MLP the gate's).

One clean pass keeps the encoding, its keys and values per decoder layer, and those of earlier decoder tokens. Then all
(layer, step) pairs go up the decoder in one sweep, each from its layer on, and back down in one backward. Blocks of
a half-precision model run on a float32 stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.encoder_decoder import Decoder, Encoder, Encodings, KeysValues
from fastedit.engine.fused import fused_activations
from fastedit.engine.memory import saved_bytes
from fastedit.engine.precision import stream_dtype, wide_residual
from fastedit.trace.neurons_budget import TEMPORARIES, NeuronBudget
from fastedit.trace.neurons_clean import (
    Activation,
    Question,
    checked_probabilities,
    head_gradient,
    log_probability,
    spot,
)
from fastedit.trace.neurons_matrix import mlp_gradient, mlp_product

__all__ = ["Seq2SeqNeurons"]


class Seq2SeqNeurons:
    """The same as `fastedit.trace.neurons_sweep.NeuronSweep` for one question of an encoder-decoder.

    Args:
        every: scale the activations of all the decoder's tokens, not of the last one only.

    Attributes:
        activations: per layer ``[1, f]``, clean; with ``every``, behind `run`, those of attributed layers at each
            neuron's token of the highest score.
        probabilities: ``[1]`` of the answer in the clean run.

    Raises:
        ValueError: the clean run gives NaN or infinity.
    """

    def __init__(
        self,
        arch: ResolvedArch,
        question: Question,
        layers: Sequence[int],
        fractions: Sequence[float],
        activation: Activation,
        budget: NeuronBudget,
        *,
        every: bool,
    ) -> None:
        self._arch, self._kind, self._layers = arch, activation, tuple(layers)
        self._fractions = tuple(fractions)
        self._first = 0 if every else len(question.ids) - 1
        self._answer = torch.tensor([question.answer])
        self._clean: list[Tensor] = []  # activations, per layer [w, f]
        self._inputs: list[Tensor] = []  # per layer [w, d]; one more, the last block's output
        self._past: list[KeysValues] = []
        self._decoder = Decoder(arch, len(question.ids))
        self._encodings = self._encoded(question)
        self._device = self._encodings.states.device
        self._pass(question)
        with torch.no_grad(), self._running():
            found = log_probability(arch, self._inputs[-1][-1:], self._answer)
        self.probabilities = checked_probabilities(found)
        self.activations = [rows[-1:] for rows in self._clean]
        self._head_rows = budget.head_rows(arch, self._device)
        self._head_bytes = budget.head_bytes(arch, self._device)
        self._left = budget.sweep(arch, self._device, self.kept_bytes())

    def _encoded(self, question: Question) -> Encodings:
        arch = self._arch
        encoder = Encoder(arch, len(question.source))
        weight: Tensor = encoder.arch.embed.weight  # type: ignore[assignment]
        source = torch.tensor([question.source], device=weight.device)
        with torch.no_grad(), self._wide():
            hidden = self._stream(encoder.arch.embed(source))
            for layer in range(encoder.arch.depth):
                hidden = encoder.block(layer, hidden)
            return Encodings(encoder.states(hidden), keep=True)

    def _pass(self, question: Question) -> None:
        """The clean decoder."""
        arch = self._arch
        weight: Tensor = arch.embed.weight  # type: ignore[assignment]
        with torch.no_grad(), self._running():
            hidden = self._stream(arch.embed(torch.tensor([question.ids], device=weight.device)))
            for layer in range(arch.depth):
                self._inputs.append(hidden[0, self._first :])
                with spot(arch, layer, self._kind).watched(self._keep):
                    hidden, (k, v) = self._decoder.block(layer, hidden, self._encodings)
                self._past.append((k[:, :, : self._first].clone(), v[:, :, : self._first].clone()))
            self._inputs.append(hidden[0, self._first :])

    def kept_bytes(self) -> int:
        """Bytes that the clean pass leaves."""
        stores = [*self._past, *(self._encodings.keys_values(0, self._arch.cross(0)),) * self._arch.depth]
        pairs = (x for pair in stores for x in pair)
        return sum(x.nbytes for x in (*self._clean, *self._inputs, self._encodings.states, *pairs))

    def row_bytes(self) -> int:
        """Bytes that one row keeps per block for the backward, as measured."""
        layer = self._arch.depth - 1
        hidden = self._inputs[layer][None].repeat(2, 1, 1).requires_grad_()
        with self._running():
            return max(1, saved_bytes(self._arch, lambda: self._block(layer, hidden)) // 2)

    def predicted_bytes(self) -> tuple[int, int]:
        """Bytes above the model that the clean pass leaves, and that the sweep takes at its peak."""
        blocks = sum(self._arch.depth - layer for layer in self._layers)
        total = int(TEMPORARIES * self.row_bytes() * blocks * len(self._fractions))
        return self.kept_bytes(), min(total, self._left) + self._head_bytes

    def run(self) -> list[Tensor]:
        """Per layer ``[1, f]``: the gradient with respect to the scaled activation, summed over the steps."""
        joins = [(layer, fraction) for layer in self._layers for fraction in self._fractions]
        sums: dict[int, Tensor] = {}
        for chunk in self._chunks(joins):
            for layer, gradient in self._sweep(chunk).items():
                sums[layer] = sums[layer] + gradient if layer in sums else gradient
        return [self._highest(layer, self._harvest(layer, sums[layer])) for layer in self._layers]

    def _highest(self, layer: int, gradient: Tensor) -> Tensor:
        """``[1, f]`` of ``[w, f]``: each neuron at the token of its highest score."""
        clean = self._clean[layer]
        at = (gradient * clean.to(gradient.device)).argmax(dim=0, keepdim=True)
        self.activations[layer] = clean.gather(0, at.to(clean.device))
        return gradient.gather(0, at)

    def _chunks(self, joins: Sequence[tuple[int, float]]) -> Iterator[Sequence[tuple[int, float]]]:
        most = max(1, int(self._left / (TEMPORARIES * self.row_bytes())))
        start = used = 0
        for index, (layer, _) in enumerate(joins):
            blocks = self._arch.depth - layer
            if used + blocks > most and index > start:
                yield joins[start:index]
                start, used = index, 0
            used += blocks
        yield joins[start:]

    def _sweep(self, joins: Sequence[tuple[int, float]]) -> dict[int, Tensor]:
        """Per layer that is joined the gradient at its leaf, summed over the rows: ``[w, d]`` or ``[w, f]``."""
        leaves: dict[int, Tensor] = {}
        hidden: Tensor | None = None
        with self._running(), torch.enable_grad():
            for layer in range(joins[0][0], self._arch.depth):
                new = [fraction for at, fraction in joins if at == layer]
                if new and self._kind == "pre_activation":
                    hidden, leaves[layer] = self._through(layer, hidden, new)
                    continue
                hidden = None if hidden is None else self._block(layer, hidden)
                if new:
                    leaves[layer] = leaf = self._scaled(layer, new)
                    hidden = leaf if hidden is None else torch.cat([hidden.to(leaf), leaf])
            final: Tensor = hidden  # type: ignore[assignment]  # at least one row has joined
            last = final[:, -1]
            seed, factor = head_gradient(self._arch, last, self._answer.expand(len(last)), self._head_rows)
            gradients = torch.autograd.grad(last, list(leaves.values()), seed)
        found, at = {}, 0
        for layer, gradient in zip(leaves, gradients, strict=True):
            if factor is not None:
                gradient = factor[at : at + len(gradient), None, None].to(gradient) * gradient
            at += len(gradient)
            found[layer] = gradient.sum(dim=0)
        return found

    def _scaled(self, layer: int, fractions: Sequence[float]) -> Tensor:
        """Outputs ``[n, w, d]`` of a block whose activation is scaled: h + (s - 1) W a."""
        with torch.no_grad():
            product = mlp_product(self._arch.mlp_out(layer), self._clean[layer])
            base = self._inputs[layer + 1]
            less = torch.tensor(fractions, device=base.device, dtype=base.dtype) - 1.0
            return (base + less[:, None, None] * product.to(base)).requires_grad_()

    def _harvest(self, layer: int, gradient: Tensor) -> Tensor:
        """From the summed gradient at a layer's leaves to that of its activation, ``[w, f]``."""
        if self._kind == "pre_activation":
            return gradient
        return mlp_gradient(self._arch.mlp_out(layer), self._clean[layer], gradient)

    def _through(
        self, layer: int, hidden: Tensor | None, fractions: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Output of a block for all rows, the new ones with their activation replaced by the leaf beside it."""
        activation, entering = self._clean[layer], self._inputs[layer]
        scale = torch.tensor(fractions, device=activation.device, dtype=activation.dtype)
        leaf = (scale[:, None, None] * activation).requires_grad_()
        rows = entering.expand(len(fractions), *entering.shape)
        rows = rows if hidden is None else torch.cat([hidden.to(rows), rows])

        def put(value: Tensor) -> Tensor:
            return torch.cat([value[: len(rows) - len(leaf)], leaf.to(value.dtype)])

        with spot(self._arch, layer, self._kind).watched(put):
            return self._block(layer, rows), leaf

    def _block(self, layer: int, hidden: Tensor) -> Tensor:
        past = self._past[layer] if self._first else None
        return self._decoder.block(layer, hidden, self._encodings, first=self._first, past=past)[0]

    def _keep(self, value: Tensor) -> None:
        self._clean.append(self._stream(value.detach()[0, self._first :]).clone())

    @staticmethod
    def _stream(value: Tensor) -> Tensor:
        return value.to(stream_dtype(value.dtype))

    @contextmanager
    def _wide(self) -> Iterator[None]:
        with wide_residual(self._arch), fused_activations(self._arch):
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._decoder.running(), self._wide():
            yield
