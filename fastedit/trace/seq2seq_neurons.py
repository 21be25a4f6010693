"""Knowledge neurons of an encoder-decoder (T5): those of the decoder's MLPs.

The prompt is the encoder's input. A neuron's score is read where the decoder predicts the answer: the activation of
one decoder layer at the last token of the decoder's input (start token, forced prefix, earlier tokens of the answer)
is scaled, as in `fastedit.trace.neurons`. An encoder has no token that predicts the answer, so its neurons have no
such score. With ``positions="all"`` the activations of all the decoder's tokens are scaled together, each has a score,
and a neuron's is the highest of its own, so that it is above a threshold where any of them is (EasyEdit's T5, there on
the first matrix of the MLP: ``activation="pre_activation"``; of a gated MLP the gate's).

One clean pass keeps the encoding, its keys and values per decoder layer, and those of earlier decoder tokens. Then all
(layer, step) pairs go up the decoder in one sweep, each from its layer on, and back down in one backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastedit.engine.encoder_decoder import Decoder, Encoder, Encodings, KeysValues
from fastedit.engine.fused import fused_activations
from fastedit.engine.memory import saved_bytes
from fastedit.engine.precision import stream_dtype, wide_residual
from fastedit.session import Session
from fastedit.trace.neurons_clean import Activation, last_layer_probability, spot
from fastedit.trace.seq2seq import decoder_ids

if TYPE_CHECKING:
    from fastedit.trace.neurons import NeuronOptions

__all__ = ["Seq2SeqNeurons", "SourceQuestion", "own_decoded", "source_questions"]

_TEMPORARIES = 1.3  # a backward holds gradients beside the activations that it has not freed yet


@dataclass(frozen=True)
class SourceQuestion:
    """The encoder's input, the decoder's, and the token whose probability is attributed."""

    source: tuple[int, ...]
    ids: tuple[int, ...]
    answer: int


def own_decoded(session: Session, source: Sequence[int], behind: Sequence[int], count: int) -> list[int]:
    """The model's likeliest ``count`` tokens behind the decoder's input, each given those before."""
    row, device = list(behind), session.device
    for _ in range(count):
        with torch.no_grad():
            logits = session.model(
                input_ids=torch.tensor([list(source)], device=device),
                decoder_input_ids=torch.tensor([row], device=device),
                use_cache=False,
            ).logits
        row.append(int(logits[0, -1].argmax()))
    return row[len(behind) :]


def source_questions(
    session: Session, source: Sequence[int], answer: Sequence[int], options: NeuronOptions
) -> list[SourceQuestion]:
    """One question per token of the answer."""
    behind = decoder_ids(session, options.decoder_prefix)
    then: Sequence[int] = ()
    if len(answer) > 1 and options.continuation == "argmax":
        then = own_decoded(session, source, behind, len(answer) - 1)
    elif options.continuation == "answer":
        then = answer[:-1]
    return [
        SourceQuestion(tuple(source), (*behind, *then[:step]), token) for step, token in enumerate(answer)
    ]


class Seq2SeqNeurons:
    """The same as `fastedit.trace.neurons_sweep.NeuronSweep` for an encoder-decoder, a question at a time."""

    def __init__(
        self,
        session: Session,
        questions: Sequence[SourceQuestion],
        layers: Sequence[int],
        fractions: Sequence[float],
        options: NeuronOptions,
        memory_budget: int,
    ) -> None:
        self._session, self._questions, self._layers = session, questions, tuple(layers)
        self._fractions, self._options, self._budget = tuple(fractions), options, memory_budget
        self.activations: list[Tensor] = []
        self.probabilities = torch.empty(0)

    def run(self) -> list[Tensor]:
        """Per layer ``[Q, f]``: the gradient with respect to the scaled activation, summed over the steps."""
        rows: list[list[Tensor]] = []
        clean: list[list[Tensor]] = []
        probabilities = []
        for question in self._questions:
            one = self._one(question)
            gradients = one.run(self._layers, self._fractions, self._budget)
            kept = list(one.activations)
            for number, layer in enumerate(self._layers):
                # [w, f] to [f]: each neuron at the token of its highest score.
                at = (gradients[number] * kept[layer]).argmax(dim=0, keepdim=True)
                gradients[number] = gradients[number].gather(0, at)[0]
                kept[layer] = kept[layer].gather(0, at)[0]
            rows.append(gradients)
            clean.append([kept[layer].reshape(-1, kept[layer].shape[-1])[-1] for layer in range(len(kept))])
            probabilities.append(one.probability)
        self.probabilities = torch.stack(probabilities)
        self.activations = [torch.stack(listed) for listed in zip(*clean, strict=True)]
        return [torch.stack(listed) for listed in zip(*rows, strict=True)]

    def predicted_bytes(self) -> tuple[int, int]:
        """Bytes above the model that the clean pass leaves, and that the sweep takes at its peak."""
        question = max(self._questions, key=lambda question: len(question.source) * len(question.ids))
        one = self._one(question)
        blocks = sum(self._session.arch.depth - layer for layer in self._layers)
        total = int(_TEMPORARIES * one.row_bytes() * blocks * len(self._fractions))
        return one.nbytes, min(total, self._budget)

    def _one(self, question: SourceQuestion) -> _One:
        every = self._options.positions == "all"
        return _One(self._session, question, self._options.activation, every)


class _One:
    """One question: its clean pass, and the sweep."""

    def __init__(
        self, session: Session, question: SourceQuestion, activation: Activation, every: bool
    ) -> None:
        arch = session.arch
        self._arch, self._kind = arch, activation
        device = session.device
        self._first = 0 if every else len(question.ids) - 1
        self._answer = torch.tensor([question.answer])
        self.activations: list[Tensor] = []  # per layer [w, f]
        self._inputs: list[Tensor] = []  # per layer [w, d]; one more, the last block's output
        self._past: list[KeysValues] = []
        self._decoder = Decoder(arch, len(question.ids))
        encoder = Encoder(arch, len(question.source))
        with torch.no_grad(), fused_activations(arch):
            hidden = encoder.arch.embed(torch.tensor([question.source], device=device))
            for layer in range(encoder.arch.depth):
                hidden = encoder.block(layer, hidden)
            self._encodings = Encodings(encoder.states(hidden), keep=True)
        with torch.no_grad(), self._running():
            hidden = self._stream(arch.embed(torch.tensor([question.ids], device=device)))
            for layer in range(arch.depth):
                self._inputs.append(hidden[0, self._first :])
                handle = spot(arch, layer, activation).watch(self._keep)
                try:
                    hidden, (k, v) = self._decoder.block(layer, hidden, self._encodings)
                finally:
                    handle.remove()
                self._past.append((k[:, :, : self._first].clone(), v[:, :, : self._first].clone()))
            self._inputs.append(hidden[0, self._first :])
            self.probability = last_layer_probability(arch, hidden[:, -1], self._answer)[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the clean pass leaves."""
        stores = [*self._past, *(self._encodings.keys_values(0, self._arch.cross(0)),) * self._arch.depth]
        kept = [
            *self.activations,
            *self._inputs,
            self._encodings.states,
            *(x for pair in stores for x in pair),
        ]
        return sum(tensor.nbytes for tensor in kept)

    def row_bytes(self) -> int:
        """Bytes that one row keeps per block for the backward, as measured."""
        layer = self._arch.depth - 1
        hidden = self._inputs[layer][None].repeat(2, 1, 1).requires_grad_()
        with self._running():
            return max(1, saved_bytes(self._arch, lambda: self._block(layer, hidden)) // 2)

    def run(self, layers: Sequence[int], fractions: Sequence[float], budget: int) -> list[Tensor]:
        """Per layer ``[w, f]``."""
        joins = [(layer, fraction) for layer in layers for fraction in fractions]
        most = max(1, int(budget / (_TEMPORARIES * self.row_bytes())))
        sums = {layer: torch.zeros(()) for layer in layers}
        for chunk in self._chunks(joins, most):
            for layer, gradient in self._sweep(chunk).items():
                sums[layer] = sums[layer].to(gradient.device) + gradient
        return [self._harvest(layer, sums[layer]) for layer in layers]

    def _chunks(self, joins: Sequence[tuple[int, float]], most: int) -> Iterator[Sequence[tuple[int, float]]]:
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
            answers = self._answer.expand(len(final))
            p = last_layer_probability(self._arch, final[:, -1], answers)
            gradients = torch.autograd.grad(p.sum(), list(leaves.values()))
        return {layer: gradient.sum(dim=0) for layer, gradient in zip(leaves, gradients, strict=True)}

    def _scaled(self, layer: int, fractions: Sequence[float]) -> Tensor:
        """Outputs ``[n, w, d]`` of a block whose activation is scaled: h + (s - 1) W a."""
        with torch.no_grad():
            product = self._stream(self._arch.mlp_out(layer)(self.activations[layer]))
            base = self._inputs[layer + 1].to(product)
            less = torch.tensor(fractions, device=base.device, dtype=base.dtype) - 1.0
            return (base + less[:, None, None] * product).requires_grad_()

    def _harvest(self, layer: int, gradient: Tensor) -> Tensor:
        """From the summed gradient at a layer's leaves to that of its activation, ``[w, f]``."""
        if self._kind == "pre_activation":
            return gradient
        leaf = self.activations[layer].clone().requires_grad_()
        with self._running(), torch.enable_grad():
            output = self._arch.mlp_out(layer)(leaf)
        (found,) = torch.autograd.grad(output, leaf, gradient.to(output))
        return self._stream(found)

    def _through(
        self, layer: int, hidden: Tensor | None, fractions: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Output of a block for all rows, the new ones with their activation replaced by the leaf beside it."""
        activation, entering = self.activations[layer], self._inputs[layer]
        scale = torch.tensor(fractions, device=activation.device, dtype=activation.dtype)
        leaf = (scale[:, None, None] * activation).requires_grad_()
        rows = entering.expand(len(fractions), *entering.shape)
        rows = rows if hidden is None else torch.cat([hidden.to(rows), rows])

        def put(value: Tensor) -> Tensor:
            return torch.cat([value[: len(rows) - len(leaf)], leaf.to(value.dtype)])

        handle = spot(self._arch, layer, self._kind).watch(put)
        try:
            return self._block(layer, rows), leaf
        finally:
            handle.remove()

    def _block(self, layer: int, hidden: Tensor) -> Tensor:
        past = self._past[layer] if self._first else None
        return self._decoder.block(layer, hidden, self._encodings, first=self._first, past=past)[0]

    def _keep(self, value: Tensor) -> None:
        self.activations.append(self._stream(value.detach()[0, self._first :]).clone())

    def _stream(self, value: Tensor) -> Tensor:
        return value.to(stream_dtype(value.dtype))

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._decoder.running(), wide_residual(self._arch), fused_activations(self._arch):
            yield
