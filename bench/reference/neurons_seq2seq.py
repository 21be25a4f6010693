"""Knowledge neurons of an encoder-decoder's decoder: full forwards and backwards per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attribution", "layer_scores"]


def layer_scores(
    model: nn.Module,
    module: str,
    ids: Sequence[int],
    decoder_ids: Sequence[int],
    answer: int,
    *,
    fractions: Sequence[float],
    output: bool = False,
    every: bool = False,
) -> Tensor:
    """Scores [f] of one layer: (a / m) sum_k dP(answer) / d(s_k a), at the decoder's last token.

    a: the input (or output) of `module` there; every: at all tokens at once, a score being its highest over them.
    """
    place = model.get_submodule(module)
    first = 0 if every else len(decoder_ids) - 1
    seen: list[Tensor] = []

    def hooked(edit: Any) -> Any:
        if output:
            return place.register_forward_hook(lambda _module, _args, out: edit(out))
        return place.register_forward_pre_hook(lambda _module, args: (edit(args[0]), *args[1:]))

    def probability() -> Tensor:
        logits = model(
            input_ids=torch.tensor([list(ids)]), decoder_input_ids=torch.tensor([list(decoder_ids)])
        )
        return torch.softmax(logits.logits[0, -1], dim=-1)[answer]

    def look(value: Tensor) -> Tensor:
        seen.append(value.detach()[0, first:].clone())
        return value

    handle = hooked(look)
    with torch.no_grad():
        probability()
    handle.remove()
    activation, total = seen[0], torch.zeros_like(seen[0])
    for fraction in fractions:
        scaled = (fraction * activation).requires_grad_()

        def put(value: Tensor, scaled: Tensor = scaled) -> Tensor:
            return torch.cat([value[:, :first], scaled[None]], dim=1)

        handle = hooked(put)
        total += torch.autograd.grad(probability(), scaled)[0]
        handle.remove()
    return (activation * total / len(fractions)).max(dim=0).values


def attribution(
    model: nn.Module,
    modules: Sequence[str],
    ids: Sequence[int],
    prefix: Sequence[int],
    answer: Sequence[int],
    *,
    fractions: Sequence[float],
    output: bool = False,
    rule: str = "argmax",
    every: bool = False,
) -> Tensor:
    """Scores [layers, f], averaged over the answer's tokens.

    prefix: what the decoder has before the answer. rule: later tokens follow the model's own choices ("argmax"), the
    answer ("answer") or nothing ("fixed").
    """
    rows = [list(prefix)]
    for token in answer[:-1]:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([list(ids)]), decoder_input_ids=torch.tensor([rows[-1]])
            ).logits
        own = int(logits[0, -1].argmax())
        rows.append(rows[-1] if rule == "fixed" else [*rows[-1], {"argmax": own, "answer": token}[rule]])
    scores = []
    for module in modules:
        parts = [
            layer_scores(model, module, ids, row, token, fractions=fractions, output=output, every=every)
            for row, token in zip(rows, answer)
        ]
        scores.append(sum(parts) / len(parts))
    return torch.stack(scores)
