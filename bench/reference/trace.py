"""Causal tracing by one full run of the model a cell, as in Meng et al. 2022 (arXiv:2202.05262, section 2).

Row 0 of the batch is the clean prompt, every other row has noise on the embeddings of the subject's tokens. A cell
(token t, layer l) restores, in the noisy rows, the clean output of a module at token t, and reads the mean
probability of the answer at the last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["run", "severed", "trace"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def run(
    model: nn.Module,
    ids: Tensor,
    embed: str,
    start: int,
    noise: Tensor,
    restore: Sequence[tuple[str, int]] = (),
    frozen: Mapping[tuple[str, int], Tensor] | None = None,
    seen: dict[tuple[str, int], Tensor] | None = None,
    replace: bool = False,
) -> Tensor:
    """Next-token probabilities [1 + S, V].

    ids: [T]; noise: [S, k, d], added to (replace: put in place of) the embeddings of tokens start..start+k-1.
    restore: (module name, token) set to row 0's output in the other rows. frozen: (module name, token) -> [S, d], set
        after.
    seen: its keys get the noisy rows' outputs [S, d].
    """
    S, k, _ = noise.shape
    points: dict[str, list[int]] = {}
    for name, token in [*restore, *(frozen or {}), *(seen or {})]:
        points.setdefault(name, []).append(token)

    def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if replace:
            output[1:, start : start + k] = noise.to(output.dtype)
        else:
            output[1:, start : start + k] += noise
        return output

    def patch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            whole = _first(output).clone()
            h = whole.view(S + 1, len(ids), -1)
            for token in points[name]:
                if (name, token) in restore:
                    h[1:, token] = h[0, token]
                if frozen and (name, token) in frozen:
                    h[1:, token] = frozen[name, token]
                if seen is not None and (name, token) in seen:
                    seen[name, token] = h[1:, token].clone()
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return hook

    handles = [model.get_submodule(embed).register_forward_hook(corrupt)]
    handles += [model.get_submodule(name).register_forward_hook(patch(name)) for name in points]
    try:
        with torch.no_grad():
            logits = model(ids.expand(S + 1, -1), use_cache=False).logits
        return torch.softmax(logits[:, -1], dim=1)
    finally:
        for handle in handles:
            handle.remove()


def trace(
    model: nn.Module,
    ids: Tensor,
    embed: str,
    names: Sequence[str],
    start: int,
    noise: Tensor,
    *,
    window: int | None = None,
    cells: Sequence[tuple[int, int]] | None = None,
    replace: bool = False,
) -> tuple[Tensor, float, float, int]:
    """Scores [T, L] (NaN where a cell was not asked for), low score, high score, and the answer's id.

    names: per layer the module to restore. window: None restores layer l, else layers max(0, l - window // 2) up to
    (not including) min(L, l - (-window // 2)).
    """
    T, L = len(ids), len(names)
    plain = run(model, ids, embed, start, noise, replace=replace)
    answer = int(plain[0].argmax())
    scores = torch.full((T, L), float("nan"), dtype=plain.dtype)
    for t, layer in cells if cells is not None else [(t, layer) for t in range(T) for layer in range(L)]:
        low, high = (
            (layer, layer + 1)
            if window is None
            else (max(0, layer - window // 2), min(L, layer - (-window // 2)))
        )
        restore = [(names[j], t) for j in range(low, high)]
        p = run(model, ids, embed, start, noise, restore, replace=replace)
        scores[t, layer] = p[1:, answer].mean()
    return scores, float(plain[1:, answer].mean()), float(plain[0, answer]), answer


def severed(
    model: nn.Module,
    ids: Tensor,
    embed: str,
    blocks: Sequence[str],
    names: Sequence[str],
    start: int,
    noise: Tensor,
    answer: int,
    *,
    first_noise: Tensor | None = None,
    cells: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Scores [T, L] of restoring a block's output while token t's outputs of `names` above it stay what they were.

    Every cell makes two runs, as published: one records the outputs to freeze, one restores and freezes. first_noise:
    noise of the recording run, where it differs (the original code draws anew for the second run).
    """
    T, L = len(ids), len(blocks)
    recording = noise if first_noise is None else first_noise
    scores = torch.full((T, L), float("nan"), dtype=torch.float64)
    for t, layer in cells if cells is not None else [(t, layer) for t in range(T) for layer in range(L)]:
        seen = {(name, t): torch.empty(0) for name in names[layer + 1 :]}
        if seen:
            run(model, ids, embed, start, recording, seen=seen)
        # Nothing to freeze in the last layer: the original makes one run, with the first noise.
        p = run(model, ids, embed, start, noise if seen else recording, [(blocks[layer], t)], seen)
        scores[t, layer] = p[1:, answer].mean()
    return scores
