"""Times of the naive twins of ROME and MEMIT, measured on few steps and few edits, and what they come to in full.

The target search is linear in steps: T(s) = first + (s - 1) step, `first` being one forward and `step` one forward and
one backward. Both come from two runs, of one step and of SAMPLED. Over edits it is linear in padded tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine_flops import padded_tokens
from reference.memit import hidden, mean_key, update
from reference.target_vector import Request, target_vector
from torch import Tensor, nn

__all__ = ["SAMPLED", "TwinTargets", "equation_seconds", "key_seconds", "time_targets", "timed"]

SAMPLED = 3  # steps of the sampled search


def timed(call: Callable[[], Any], device: str | torch.device = "cpu") -> tuple[float, Any]:
    """Seconds (of the process on a CPU, of the wall on a GPU, waited for) and the result."""
    cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start, result


@dataclass(frozen=True)
class TwinTargets:
    """Seconds per padded token of the twin's search, and the targets [sampled edits, d] it found in SAMPLED steps."""

    first: float
    step: float
    values: Tensor

    def seconds(self, requests: Sequence[Request], steps: int) -> float:
        return sum(map(padded_tokens, requests)) * (self.first + (steps - 1) * self.step)

    def mean(self, later: TwinTargets) -> TwinTargets:
        """Of a measurement before ours and one after, so that a change of load falls on both sides."""
        return TwinTargets((self.first + later.first) / 2, (self.step + later.step) / 2, self.values)


def time_targets(
    model: nn.Module, site: str, requests: Sequence[Request], hyper: dict[str, float]
) -> TwinTargets:
    device = next(model.parameters()).device
    first, whole, values = 0.0, 0.0, []
    for request in requests:
        seconds, _ = timed(
            lambda request=request: target_vector(model, site, request, steps=1, **hyper), device
        )
        first += seconds
        seconds, found = timed(
            lambda request=request: target_vector(model, site, request, steps=SAMPLED, **hyper), device
        )
        whole += seconds
        values.append(found[0] + found[1])
    tokens = sum(map(padded_tokens, requests))
    return TwinTargets(first / tokens, (whole - first) / (SAMPLED - 1) / tokens, torch.stack(values))


def key_seconds(
    model: nn.Module,
    module: str,
    site: str,
    sample: Sequence[Request],
    requests: Sequence[Request],
    layers: int,
) -> float:
    """Keys and activations of all `requests` for all layers; a layer costs as much as any other, full forwards all."""
    edited, device = model.get_submodule(module), next(model.parameters()).device

    def both(request: Request) -> None:
        with torch.no_grad():
            mean_key(model, edited, request)
            hidden(model, site, request)

    def tokens(chosen: Sequence[Request]) -> int:
        return sum(len(r.rows) * max(map(len, r.rows)) + len(r.rows[0]) for r in chosen)

    seconds = sum(timed(lambda request=request: both(request), device)[0] for request in sample)
    return layers * seconds * tokens(requests) / tokens(sample)


def equation_seconds(C: Tensor, edits: int, width: int, lam: float, layers: int) -> float:
    """The dense f x f solves of all layers for `edits` random keys; one is timed."""
    kind = {"dtype": torch.float64, "device": C.device}
    K, R = torch.randn(edits, C.shape[0], **kind), torch.randn(edits, width, **kind)
    update(C[:64, :64], K[:, :64], R, lam)  # loads the libraries
    return layers * timed(lambda: update(C, K, R, lam), C.device)[0]
