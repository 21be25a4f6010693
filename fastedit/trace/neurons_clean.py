"""What the attribution of neurons starts from: questions, where activations are, and one clean forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.forest import Forest
from fastedit.engine.packed import Plan, forest_tensors, pass_through
from fastedit.engine.precision import stream_dtype, wide_residual

__all__ = [
    "Activation",
    "CleanPass",
    "Question",
    "Spot",
    "checked_probabilities",
    "head_gradient",
    "log_probability",
    "of_logarithm",
    "spot",
]

Activation = Literal["activation", "pre_activation"]


@dataclass(frozen=True)
class Question:
    """A prompt and the one token whose probability is attributed.

    Attributes:
        ids: the prompt's tokens; of an encoder-decoder the decoder's.
        position: token that predicts the answer, and whose activations are scaled; the last of a causal model.
        answer: token id.
        source: of an encoder-decoder, the encoder's tokens.
    """

    ids: tuple[int, ...]
    position: int
    answer: int
    source: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spot:
    """Where a layer's activation is: the output of ``module``, or its input."""

    module: nn.Module
    output: bool

    @contextmanager
    def watched(self, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Call ``see`` with the activation of every call inside; what it returns, unless ``None``, takes its place."""

        def after(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
            return see(output)

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            new = see(args[0])
            return None if new is None else (new, *args[1:])

        module = self.module
        handle = (
            module.register_forward_hook(after) if self.output else module.register_forward_pre_hook(before)
        )
        try:
            yield
        finally:
            handle.remove()


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
    """One forward over all questions' tokens, shared beginnings once; in half precision on a float32 stream.

    Attributes:
        columns: per question, the tokens before its last.
        last: ``[Q]`` its last token.
        inputs, outputs: per layer ``[Q, d]``, what goes into and comes out of the block at the last tokens, in the
            stream's type (`fastedit.engine.precision`).
        activations: per layer ``[Q, f]``, in the stream's type.
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
        entered: list[Tensor] = []
        ids, positions = forest_tensors(forest)
        plans: dict[torch.device, Plan] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            self.stores[layer] = k.clone(), v.clone()
            plan = plans.setdefault(q.device, Plan.of(forest.branches, q.device))
            return plan.attend(q, k, v, *self.stores[layer], **options)

        def at_last(value: Tensor) -> Tensor:
            rows = value.detach().reshape(self.tokens, -1)
            rows = rows[self.last.to(rows.device)]
            return rows.to(stream_dtype(rows.dtype))

        def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            wide = hidden.to(stream_dtype(hidden.dtype))
            entered.append(at_last(wide))
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": wide}
            return (wide, *args[1:]), kwargs

        def leave(_block: nn.Module, _args: object, output: Any) -> None:
            self.outputs.append(at_last(block_output(output)))

        def see(value: Tensor) -> None:
            self.activations.append(at_last(value))

        with ExitStack() as stack:
            stack.callback(arch.block(0).register_forward_pre_hook(enter, with_kwargs=True).remove)
            for layer in range(arch.depth):
                stack.callback(arch.block(layer).register_forward_hook(leave).remove)
                stack.enter_context(spot(arch, layer, activation).watched(see))
            stack.enter_context(wide_residual(arch))
            every = torch.arange(self.tokens)
            passed = pass_through(arch, ids, positions, attend, start=0, narrow=arch.depth, keep=every)
        self.calls = passed.calls
        self.inputs = [entered[0], *self.outputs[:-1]]

    def kept_bytes(self) -> int:
        """Bytes of everything that is kept."""
        stores = [tensor for store in self.stores.values() for tensor in store]
        return sum(t.nbytes for t in (*stores, self.inputs[0], *self.outputs, *self.activations))


def log_probability(arch: ResolvedArch, hidden: Tensor, answers: Tensor) -> Tensor:
    """``[n]`` logarithm of the probability of each row's answer, from outputs of the last block ``[n, d]``.

    In float32 (float64 for a float64 model).
    """
    logits = arch.logits(hidden)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, dim=-1).gather(1, answers.to(wide.device)[:, None])[:, 0]


def of_logarithm(arch: ResolvedArch) -> bool:
    """Whether gradients are those of the logarithm, multiplied by the probability after the backward.

    So in half precision: the gradient of a small probability itself is zero where it passes through float16.
    """
    # T5 in half precision may keep its last matrices of MLPs, and nothing else, in float32.
    weights: list[Tensor] = [arch.mlp_out(0).weight, arch.attn_out(0).weight]  # type: ignore[list-item]
    return any(stream_dtype(weight.dtype) != weight.dtype for weight in weights)


def head_gradient(
    arch: ResolvedArch, hidden: Tensor, answers: Tensor, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Gradient ``[n, d]`` of each row's P(answer), or of its logarithm; then P(answer) ``[n]`` too.

    Args:
        hidden: ``[n, d]`` outputs of the last block.
        rows: whose logits are formed together.
    """
    gradients, probabilities = [], []
    logarithm = of_logarithm(arch)
    for part, wanted in zip(hidden.detach().split(rows), answers.split(rows), strict=True):
        leaf = part.requires_grad_()
        found = log_probability(arch, leaf, wanted)
        p = found.exp()
        gradients += torch.autograd.grad((found if logarithm else p).sum(), leaf)
        probabilities.append(p.detach())
    return torch.cat(gradients), torch.cat(probabilities) if logarithm else None


def checked_probabilities(logarithms: Tensor) -> Tensor:
    """Probabilities of clean runs.

    Raises:
        ValueError: one is not a number.
    """
    found = logarithms.detach().exp()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            "prompts: the model gives NaN or infinity in a clean run, so nothing can be attributed"
        )
    return found
