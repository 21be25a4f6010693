"""Causal tracing of an encoder-decoder by one full run of the model a cell.

Row 0 of the batch is the clean source, every other row has noise on the embeddings of the subject's tokens in the
encoder. A cell (token t, layer l) restores, in the noisy rows, the clean output of a module of the encoder (or of the
decoder) at token t, and reads the mean probability of the answer behind the decoder's last token.
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
    decoder_ids: Tensor,
    start: int,
    noise: Tensor,
    restore: Sequence[tuple[str, int]] = (),
    frozen: Mapping[tuple[str, int], Tensor] | None = None,
    seen: dict[tuple[str, int], Tensor] | None = None,
    replace: bool = False,
) -> Tensor:
    """Next-token probabilities [1 + S, V].

    ids: [T]; decoder_ids: [D]; noise: [S, k, d], added to (replace: put in place of) the embeddings of the source
    tokens start..start+k-1. restore: (module name, token) set to row 0's output in the other rows. frozen: (module
    name, token) -> [S, d], set after. seen: its keys get the noisy rows' outputs [S, d].
    """
    S, k, _ = noise.shape
    points: dict[str, list[int]] = {}
    for name, token in [*restore, *(frozen or {}), *(seen or {})]:
        points.setdefault(name, []).append(token)
    with torch.no_grad():
        embedded = model.encoder.embed_tokens(ids.expand(S + 1, -1)).clone()
    if replace:
        embedded[1:, start : start + k] = noise.to(embedded.dtype)
    else:
        embedded[1:, start : start + k] += noise

    def patch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            h = _first(output).clone()
            for token in points[name]:
                if (name, token) in restore:
                    h[1:, token] = h[0, token]
                if frozen and (name, token) in frozen:
                    h[1:, token] = frozen[name, token]
                if seen is not None and (name, token) in seen:
                    seen[name, token] = h[1:, token].clone()
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    handles = [model.get_submodule(name).register_forward_hook(patch(name)) for name in points]
    try:
        with torch.no_grad():
            logits = model(
                inputs_embeds=embedded, decoder_input_ids=decoder_ids.expand(S + 1, -1), use_cache=False
            ).logits
        return torch.softmax(logits[:, -1], dim=1)
    finally:
        for handle in handles:
            handle.remove()


def trace(
    model: nn.Module,
    ids: Tensor,
    decoder_ids: Tensor,
    names: Sequence[str],
    tokens: int,
    start: int,
    noise: Tensor,
    *,
    window: int | None = None,
    replace: bool = False,
) -> tuple[Tensor, float, float, int]:
    """Scores [tokens, L], low score, high score, and the answer's id.

    names: per layer the module to restore, of either side; tokens: how many that side has. window: None restores layer
    l, else layers max(0, l - window // 2) up to (not including) min(L, l - (-window // 2)).
    """
    L = len(names)
    plain = run(model, ids, decoder_ids, start, noise, replace=replace)
    answer = int(plain[0].argmax())
    scores = torch.full((tokens, L), float("nan"), dtype=plain.dtype)
    for t, layer in [(t, layer) for t in range(tokens) for layer in range(L)]:
        low, high = layer, layer + 1
        if window is not None:
            low, high = max(0, layer - window // 2), min(L, layer - (-window // 2))
        restore = [(names[j], t) for j in range(low, high)]
        p = run(model, ids, decoder_ids, start, noise, restore, replace=replace)
        scores[t, layer] = p[1:, answer].mean()
    return scores, float(plain[1:, answer].mean()), float(plain[0, answer]), answer


def severed(
    model: nn.Module,
    ids: Tensor,
    decoder_ids: Tensor,
    blocks: Sequence[str],
    names: Sequence[str],
    tokens: int,
    start: int,
    noise: Tensor,
    answer: int,
    *,
    first_noise: Tensor | None = None,
) -> Tensor:
    """Scores [tokens, L] of restoring a block's output while token t's outputs of `names` above it stay corrupted.

    first_noise: noise of the run that records what stays, where it differs.
    """
    L = len(blocks)
    recording = noise if first_noise is None else first_noise
    scores = torch.full((tokens, L), float("nan"), dtype=torch.float64)
    for t, layer in [(t, layer) for t in range(tokens) for layer in range(L)]:
        seen = {(name, t): torch.empty(0) for name in names[layer + 1 :]}
        if seen:
            run(model, ids, decoder_ids, start, recording, seen=seen)
        # Nothing to freeze in the last layer: one run, with the first noise.
        noised = noise if seen else recording
        p = run(model, ids, decoder_ids, start, noised, [(blocks[layer], t)], seen)
        scores[t, layer] = p[1:, answer].mean()
    return scores
