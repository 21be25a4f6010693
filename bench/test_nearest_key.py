"""nearest_key against torch.cdist and argmin, topk_keys against a product and torch.topk."""

from __future__ import annotations

from typing import Any

import reference.nearest_key
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops import topk_keys
from fastedit.ops.nearest_key import nearest_key

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Of the fewest queries, where reading the keys is the work. Many are a matrix product, which cdist is in float32.
GOALS = {1: 4.0, 4: 4.0}


def inputs_of(N: int, d: int, B: int, dtype: torch.dtype) -> Any:
    """Queries at a distance of a tenth of that between keys, from a key each."""

    def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        keys = torch.randn(N, d, generator=generator, device=device)
        near = torch.randint(0, N, (B,), generator=generator, device=device)
        q = keys[near] + 0.1 * torch.randn(B, d, generator=generator, device=device)
        return q.to(dtype), keys.to(dtype)

    return inputs


def nearest_case(shape: str, N: int, d: int, B: int, dtype: torch.dtype) -> Case:
    given = inputs_of(N, d, B, dtype)

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        return *given(device), torch.full((N,), 0.2 * d**0.5, device=device)

    def error(found: tuple[Tensor, ...], q: Tensor, keys: Tensor, eps: Tensor) -> float:
        """Of the distances; anything for another key or a wrong hit."""
        exact = torch.cat([(q[b].double() - keys.double()).square().sum(-1).sqrt()[None] for b in range(B)])
        least, index = exact.min(1)
        if not (found[0].equal(index) and found[2].equal(least <= eps[index])):
            return float("inf")
        return float(((found[1] - least) / least).abs().max())

    return Case(
        op="nearest_key",
        shape=f"{shape} N={N} d={d} B={B}",
        dtype=NAMES[dtype],
        inputs=inputs,
        ours=nearest_key,
        reference=reference.nearest_key.nearest_key,
        error=error,
        tolerance=1e-6,
        reference_tolerance=1e-2,  # its distances come from a product of norms and lose digits
        flops=3.0 * B * N * d,
        unit="fp32",
        bytes=float(N * d * dtype.itemsize),
        goal=GOALS.get(B),
    )


def topk_case(shape: str, N: int, d: int, B: int, dtype: torch.dtype, cosine: bool) -> Case:
    def ours(q: Tensor, keys: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
        return topk_keys(q, keys, k, cosine=cosine)

    def naive(q: Tensor, keys: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
        return reference.nearest_key.topk_keys(q, keys, k, cosine=cosine)

    def inputs(device: torch.device) -> tuple[Any, ...]:
        return *inputs_of(N, d, B, dtype)(device), 32, cosine

    def error(found: tuple[Tensor, Tensor], q: Tensor, keys: Tensor, k: int, cosine: bool) -> float:
        scores, _ = reference.nearest_key.topk_keys(q.double(), keys.double(), k, cosine=cosine)
        return float((found[0] - scores).abs().max() / scores.abs().max())

    return Case(
        op="topk_keys",
        shape=f"{shape} N={N} d={d} B={B} k=32 {'cosine' if cosine else 'dot'}",
        dtype=NAMES[dtype],
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-5,
        flops=2.0 * B * N * d,
        unit="fp32",
        bytes=float(N * d * dtype.itemsize),
    )


BOTH = (torch.float32, torch.bfloat16)
NEAREST = [
    nearest_case("gpt2", 10_000, MODELS["gpt2"].width, B, dtype) for B in (1, 4, 16, 64) for dtype in BOTH
]
NEAREST += [nearest_case("llama2-7b key", 1000, MODELS["llama2-7b"].key, 1, dtype) for dtype in BOTH]
# The sentence embeddings of IKE's corpus, 13 strings a fact.
TOPK = [
    topk_case("sentences", 26_000, 384, B, dtype, cosine)
    for B in (1, 16)
    for dtype in BOTH
    for cosine in (False, True)
]
GPU_NEAREST = [
    nearest_case(f"{name} key", N, MODELS[name].key, B, dtype)
    for name in ("gpt2-xl", "llama2-7b")
    for N in (1000, 10_000)
    for B in (1, 64)
    for dtype in BOTH
]
GPU_TOPK = [topk_case("sentences", 260_000, 384, B, dtype, True) for B in (1, 64) for dtype in BOTH]

test_cpu, test_gpu = op_benches(NEAREST + TOPK, GPU_NEAREST + GPU_TOPK, native=["cpu"], device=["triton"])
