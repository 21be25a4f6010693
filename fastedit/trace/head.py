"""The answer's probability from last hidden states, some rows at a time, and the runs that must be finite for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.ops.target_loss import target_loss
from fastedit.trace.prompts import TracePrompt

__all__ = ["Plain", "check_restored", "head_bytes", "plain", "probabilities"]

# Rows that the head reads together. More rows are no faster once the head's matrix is read for so many.
_ROWS = {"cpu": 128, "cuda": 4096}
# Logits that exist at a time: those of `target_loss`'s chunks on each kind of device.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
_WIDENED = 1 << 21


@dataclass(frozen=True)
class Plain:
    """What the runs without restored cells say, per prompt.

    Attributes:
        answers, predicted: token ids: the answer, and what the clean run predicts.
        high: probability of the answer in the clean run.
        low: mean probability of it in the corrupted runs, by set of draws.
    """

    answers: list[int]
    predicted: list[int]
    high: list[float]
    low: list[list[float]]


def head_bytes(arch: ResolvedArch) -> int:
    """Bytes that `probabilities` takes at most, its result apart."""
    weight: Tensor = arch.head.weight  # type: ignore[assignment]
    device = weight.device.type
    size = max(4, weight.element_size())
    rows, vocabulary = _ROWS.get(device, _ROWS["cpu"]), len(weight)
    logits = min(rows * vocabulary, max(_CHUNK.get(device, _CHUNK["cpu"]), 2048 * rows))
    widened = 0 if weight.element_size() >= 4 else min(_WIDENED, weight.numel())
    # Logits, and one row of all of them with copies; the rows, and copies of them through the norm.
    return size * (2 * logits + 4 * vocabulary + widened + 6 * rows * arch.width)


def probabilities(arch: ResolvedArch, hidden: Tensor, labels: Sequence[int]) -> Tensor:
    """``[n]`` float64 on the CPU: the labels' probabilities, from the last block's outputs ``[n, d]``."""
    weight: Tensor = arch.head.weight  # type: ignore[assignment]
    bias = getattr(arch.head, "bias", None)
    step = _ROWS.get(weight.device.type, _ROWS["cpu"])
    found = []
    with torch.no_grad():
        for first in range(0, len(hidden), step):
            rows = arch.head_input(hidden[first : first + step]).to(weight.device)
            wanted = torch.tensor(list(labels[first : first + step]), device=rows.device)
            nll, _ = target_loss(rows, weight, bias, wanted, None, None, softcap=arch.softcap)
            found.append(torch.exp(-nll.double()).cpu())
    return torch.cat(found)


def check_restored(found: Tensor, kind: str, token: int, layer: int, text: str) -> None:
    """Refuse probabilities of a restored cell's runs that are not finite."""
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"model: a run with {kind} restored must be finite, got NaN or infinity at token {token} and layer "
            f"{layer} for {text!r}"
        )


def plain(
    arch: ResolvedArch,
    prompts: Sequence[TracePrompt],
    counts: Sequence[Sequence[int]],
    clean: Tensor,
    corrupted: Tensor,
) -> Plain:
    """Read the runs without restored cells.

    Args:
        counts: per prompt the number of samples of every set of draws.
        clean: ``[prompts, d]`` the last block's outputs at the last tokens of the clean runs.
        corrupted: ``[sum of counts, d]`` those of the corrupted runs, prompt by prompt and set by set.

    Raises:
        ValueError: a run that is not finite.
    """
    predicted = []
    for prompt, row in zip(prompts, clean, strict=True):
        with torch.no_grad():
            logits = arch.logits(row[None])[0]
        # A logit of minus infinity is one that a model masks.
        if bool(logits.isnan().any()) or not bool((logits < torch.inf).all() and logits.isfinite().any()):
            raise ValueError(
                f"model: the clean run of the prompt must be finite, got NaN or infinity for {prompt.text!r}"
            )
        predicted.append(int(logits.argmax()))
    answers = [
        p if prompt.answer is None else prompt.answer for p, prompt in zip(predicted, prompts, strict=True)
    ]
    high = probabilities(arch, clean, answers).tolist()
    labels = [
        answer for answer, sets in zip(answers, counts, strict=True) for count in sets for _ in range(count)
    ]
    rest = probabilities(arch, corrupted, labels)
    low = []
    for prompt, sets in zip(prompts, counts, strict=True):
        means = []
        for count in sets:
            if not bool(rest[:count].isfinite().all()):
                raise ValueError(
                    f"noise: the corrupted runs of the prompt must be finite, got NaN or infinity for {prompt.text!r}"
                )
            means.append(float(rest[:count].mean()))
            rest = rest[count:]
        low.append(means)
    return Plain(answers, predicted, high, low)
