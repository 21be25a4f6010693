"""Knowledge neurons (arXiv:2104.08696): full forwards and backwards of the prompt per layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attribution", "coarse_neurons", "extended", "layer_scores", "refined_neurons"]


@contextmanager
def patched(module: nn.Module, edit: Any, *, output: bool) -> Any:
    """`edit` sees a module's output (or its input) and returns what takes its place."""
    if output:
        handle = module.register_forward_hook(lambda _module, _args, out: edit(out))
    else:
        handle = module.register_forward_pre_hook(lambda _module, args: (edit(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def layer_scores(
    model: nn.Module,
    module: str,
    ids: Sequence[int],
    answer: int,
    *,
    fractions: Sequence[float],
    output: bool = False,
    position: int = -1,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [f] and activation [f] of one layer: (a / m) sum_k dP(answer) / d(s_k a).

    The activation a is the input (or output) of `module` at `position`, where also the answer is read.
    rows: how many scaled copies run together; all if None.
    """
    place = model.get_submodule(module)
    at = next(model.parameters()).device
    prompt = torch.tensor([list(ids)], device=at)
    seen: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        seen.append(value.detach().reshape(1, prompt.shape[1], -1)[0, position].clone())
        return value

    with torch.no_grad(), patched(place, look, output=output):
        model(input_ids=prompt)
    activation, total = seen[0], torch.zeros_like(seen[0])
    for some in torch.tensor(list(fractions), dtype=activation.dtype, device=at).split(
        rows or len(fractions)
    ):
        scaled = (some[:, None] * activation).requires_grad_()

        def put(value: Tensor, scaled: Tensor = scaled) -> Tensor:
            new = value.clone().reshape(len(scaled), prompt.shape[1], -1)
            new[:, position] = scaled
            return new.view(value.shape)

        with patched(place, put, output=output):
            logits = model(input_ids=prompt.expand(len(some), -1)).logits
        probability = torch.softmax(logits[:, position], dim=-1)[:, answer]
        total += torch.autograd.grad(probability.sum(), scaled)[0].sum(dim=0)
    return activation * total / len(fractions), activation


def extended(model: nn.Module, ids: Sequence[int], answer: Sequence[int], rule: str) -> list[list[int]]:
    """A prompt per answer token: followed by the model's own choices, by the answer itself, or by nothing."""
    rows = [list(ids)]
    for token in answer[:-1]:
        with torch.no_grad():
            own = int(model(input_ids=torch.tensor([rows[-1]])).logits[0, -1].argmax())
        rows.append([*rows[-1], {"argmax": own, "answer": token}[rule]] if rule != "fixed" else rows[-1])
    return rows


def attribution(
    model: nn.Module,
    modules: Sequence[str],
    ids: Sequence[int],
    answer: Sequence[int],
    *,
    fractions: Sequence[float],
    output: bool = False,
    rule: str = "argmax",
    position: int = -1,
) -> Tensor:
    """Scores [layers, f], averaged over the answer's tokens."""
    rows = extended(model, ids, answer, rule)
    return torch.stack(
        [
            sum(
                layer_scores(
                    model, module, row, token, fractions=fractions, output=output, position=position
                )[0]
                for row, token in zip(rows, answer)
            )
            / len(answer)
            for module in modules
        ]
    )


def coarse_neurons(scores: Tensor, threshold: float) -> set[tuple[int, int]]:
    """(layer, neuron) of the scores above a share of the highest."""
    return {(int(i), int(j)) for i, j in (scores > threshold * scores.max()).nonzero()}


def refined_neurons(scores: Sequence[Tensor], threshold: float, share: float) -> set[tuple[int, int]]:
    """Those that more than a share of the prompts have in common."""
    sets = [coarse_neurons(one, threshold) for one in scores]
    return {n for n in set().union(*sets) if sum(n in one for one in sets) > share * len(sets)}
