"""Integrated gradients of all layers' neurons in one sweep up the model and one back down.

The attribution of layer l scales that layer's activation a at the prompt's last token by s_1 .. s_m and follows the
answer's probability. Only the last token changes, from layer l on: every (layer, step) is one token that joins the
sweep at its layer and attends to the clean keys and values of the tokens before it. So

- nothing is computed below a layer or before the last token; a sweep of L layers runs about m L^2 / 2 tokens through
  one block each, in products of up to m L rows;
- where the MLP's last product is added to the stream as it is, a token joins by arithmetic: the output of block l is
  h + (s - 1) W a, with no block run; and the gradient of a is W^T times that of the output, taken once per layer
  after summing over steps;
- elsewhere (norms behind the MLP, pre-activations) the tokens run through block l too, with their activation replaced;
- the head sees these tokens only.

The same products in another order, so results agree to rounding with those of whole forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.attention import attending
from fastedit.engine.forest import Branch
from fastedit.engine.fused import fused_activations
from fastedit.engine.memory import saved_bytes
from fastedit.engine.packed import BlockRunner, Call, Plan, at_tokens
from fastedit.engine.precision import wide_residual
from fastedit.trace.neurons_budget import TEMPORARIES, NeuronBudget
from fastedit.trace.neurons_clean import (
    Activation,
    CleanPass,
    Question,
    checked_probabilities,
    head_gradient,
    log_probability,
    spot,
)
from fastedit.trace.neurons_matrix import mlp_gradient, mlp_product

__all__ = ["Join", "NeuronSweep"]


@dataclass(frozen=True, order=True)
class Join:
    """One token of the sweep: it joins at ``layer`` with the activation of ``question`` scaled by ``fraction``."""

    layer: int
    question: int
    step: int
    fraction: float


class NeuronSweep:
    """Gradients of the answers' probabilities with respect to scaled activations.

    Args:
        questions: causal, their position the last token.
        layers: attributed layers, ascending.
        fractions: s_1 .. s_m.
        budget: bytes that it may take.

    Attributes:
        activations: per layer ``[Q, f]``, clean.
        probabilities: ``[Q]`` of the answers in the clean run.

    Raises:
        ValueError: the clean run gives NaN.
    """

    def __init__(
        self,
        arch: ResolvedArch,
        questions: Sequence[Question],
        layers: Sequence[int],
        fractions: Sequence[float],
        activation: Activation,
        budget: NeuronBudget,
    ) -> None:
        self._arch, self._layers, self._activation = arch, layers, activation
        self._fractions = tuple(fractions)
        self._runner = BlockRunner(arch)
        self._clean = CleanPass(arch, questions, activation)
        self._answers = torch.tensor([question.answer for question in questions])
        # Only what is added to the stream as it is can be scaled outside of its block.
        row = arch.row
        self._by_arithmetic = activation == "activation" and not (row.post_norm or row.norm_after_add)
        self._device = self._clean.inputs[0].device
        self._head_rows = budget.head_rows(arch, self._device)
        self._head_bytes = budget.head_bytes(arch, self._device)
        self._left = budget.sweep(arch, self._device, self._clean.kept_bytes())
        self.activations = self._clean.activations
        parts = zip(
            self._clean.outputs[-1].split(self._head_rows), self._answers.split(self._head_rows), strict=True
        )
        with torch.no_grad(), self._running():
            found = [log_probability(arch, rows, answers) for rows, answers in parts]
        self.probabilities = checked_probabilities(torch.cat(found))

    def run(self) -> list[Tensor]:
        """Per layer ``[Q, f]``: the gradient with respect to the scaled activation, summed over the steps."""
        count = len(self._answers)
        joins = [
            Join(layer, question, step, fraction)
            for layer in self._layers
            for question in range(count)
            for step, fraction in enumerate(self._fractions)
        ]
        sums: dict[int, Tensor] = {}
        for chunk in self._chunks(joins):
            for layer, (where, gradient) in self._sweep(chunk).items():
                if layer not in sums:
                    sums[layer] = gradient.new_zeros(count, gradient.shape[1])
                sums[layer].index_add_(0, where.to(gradient.device), gradient)
        return [self._harvest(layer, sums[layer]) for layer in self._layers]

    def row_bytes(self) -> int:
        """Bytes that one token keeps per block for the backward, as measured."""
        layer, two = self._arch.depth - 1, [Join(0, 0, step, 1.0) for step in range(2)]
        hidden = self._clean.inputs[layer][[0, 0]]

        def forward() -> Tensor:
            return self._block(layer, hidden.requires_grad_(), two, self._plan(two, hidden.device))

        with self._running():
            return max(1, saved_bytes(self._arch, forward) // 2)

    def predicted_bytes(self) -> tuple[int, int]:
        """Bytes above the model that the clean forward leaves, and that the sweep takes at its peak."""
        blocks = sum(self._arch.depth - layer for layer in self._layers)
        total = int(TEMPORARIES * self.row_bytes() * blocks * len(self._fractions) * len(self._answers))
        return self._clean.kept_bytes(), min(total, self._left) + self._head_bytes

    def _chunks(self, joins: list[Join]) -> Iterator[list[Join]]:
        """Joins in their order, as many together as the budget takes."""
        most = max(1, int(self._left / (TEMPORARIES * self.row_bytes())))
        start = used = 0
        for index, join in enumerate(joins):
            blocks = self._arch.depth - join.layer
            if used + blocks > most and index > start:
                yield joins[start:index]
                start, used = index, 0
            used += blocks
        yield joins[start:]

    def _sweep(self, joins: Sequence[Join]) -> dict[int, tuple[Tensor, Tensor]]:
        """Per layer that is joined: the question of each of its rows, and the gradient ``[n, d or f]`` there."""
        plan = self._plan(joins, self._device)
        leaves: dict[int, Tensor] = {}
        at = 0  # rows that have joined
        hidden: Tensor | None = None
        with self._running():
            for layer in range(joins[0].layer, self._arch.depth):
                new = [join for join in joins[at:] if join.layer == layer]
                end = at + len(new)
                if new and not self._by_arithmetic:
                    hidden, leaves[layer] = self._through(layer, hidden, joins[:end], new, plan)
                else:
                    if hidden is not None:
                        hidden = self._block(layer, hidden, joins[:at], plan)
                    if new:
                        leaves[layer] = leaf = self._scaled(layer, new)
                        hidden = leaf if hidden is None else torch.cat([hidden.to(leaf.device), leaf])
                at = end
            final: Tensor = hidden  # type: ignore[assignment]  # at least one row has joined
            answers = self._answers[[join.question for join in joins]]
            seed, factor = head_gradient(self._arch, final, answers, self._head_rows)
            gradients = torch.autograd.grad(final, list(leaves.values()), seed)
        found, at = {}, 0
        for layer, gradient in zip(leaves, gradients, strict=True):
            questions = torch.tensor([join.question for join in joins if join.layer == layer])
            if factor is not None:
                gradient = factor[at : at + len(questions), None].to(gradient) * gradient
            found[layer] = questions, gradient
            at += len(questions)
        return found

    def _scaled(self, layer: int, new: Sequence[Join]) -> Tensor:
        """Outputs ``[n, d]`` of a block whose activation is scaled: h + (s - 1) W a."""
        clean = self._clean
        with torch.no_grad():
            product = mlp_product(self._arch.mlp_out(layer), clean.activations[layer])
            base = clean.outputs[layer]
            where = torch.tensor([join.question for join in new], device=base.device)
            less = torch.tensor([join.fraction - 1.0 for join in new], device=base.device, dtype=base.dtype)
            return (base[where] + less[:, None] * product.to(base.device)[where]).requires_grad_()

    def _harvest(self, layer: int, gradient: Tensor) -> Tensor:
        """From the summed gradient at the leaves of a layer to that of its activation, ``[Q, f]``."""
        if not self._by_arithmetic:
            return gradient
        return mlp_gradient(self._arch.mlp_out(layer), self._clean.activations[layer], gradient)

    def _through(
        self, layer: int, hidden: Tensor | None, joins: Sequence[Join], new: Sequence[Join], plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Output of a block for all rows, the new ones with their activation replaced by the leaf returned beside."""
        entering = self._clean.inputs[layer]
        where = torch.tensor([join.question for join in new], device=entering.device)
        scale = torch.tensor([join.fraction for join in new], device=entering.device, dtype=entering.dtype)
        activation = self._clean.activations[layer]
        leaf = (
            scale.to(activation.device)[:, None] * activation[where.to(activation.device)]
        ).requires_grad_()
        rows = entering[where]
        rows = rows if hidden is None else torch.cat([hidden.to(rows.device), rows])
        old = len(joins) - len(new)

        def put(value: Tensor) -> Tensor:
            kept = value.reshape(len(joins), -1)[:old]
            return torch.cat([kept, leaf.to(kept.dtype)]).reshape(value.shape)

        with spot(self._arch, layer, self._activation).watched(put):
            return self._block(layer, rows, joins, plan), leaf

    def _block(self, layer: int, hidden: Tensor, joins: Sequence[Join], plan: Plan) -> Tensor:
        """Output ``[n, d]`` of one block for the first n rows of a sweep."""
        n = len(joins)
        some = replace(
            plan,
            columns=plan.columns[:n],
            q_starts=plan.q_starts[: n + 1],
            q_offsets=plan.q_offsets[:n],
            k_starts=plan.k_starts[: n + 1],
        )
        tokens = self._clean.last[[join.question for join in joins]]
        name, named = self._clean.calls[layer]
        call: Call = (name, at_tokens(named, tokens, self._clean.tokens))
        return self._runner.block(layer, hidden[None], call, some, self._store)[0]

    def _plan(self, joins: Sequence[Join], device: torch.device) -> Plan:
        columns = self._clean.columns
        return Plan.of(
            [Branch(row, row + 1, columns[join.question]) for row, join in enumerate(joins)], device
        )

    def _store(self, layer: int, _k: Tensor, _v: Tensor) -> tuple[Tensor, Tensor]:
        return self._clean.stores[layer]

    @contextmanager
    def _running(self) -> Iterator[None]:
        with (
            attending(self._arch, self._runner.attend),
            wide_residual(self._arch),
            fused_activations(self._arch),
        ):
            yield
