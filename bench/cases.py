"""What the op benches run: shapes by model name, inputs, the work they are, the error they may have.

A case is one call of one op. Adding an op: a function that returns its cases, and bench/test_<op>.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference.second_moment
import torch
from torch import Tensor

from fastedit.ops import second_moment_

__all__ = ["MODELS", "Case", "Model", "second_moment_cases"]


@dataclass(frozen=True)
class Model:
    """Sizes of the edited matrix [width, key] and of the vocabulary."""

    width: int
    key: int
    vocab: int


MODELS = {
    "gpt2": Model(768, 3072, 50257),
    "gpt2-xl": Model(1600, 6400, 50257),
    "gptj-6b": Model(4096, 16384, 50400),
    "llama2-7b": Model(4096, 11008, 32000),
    "llama3-8b": Model(4096, 14336, 128256),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one op; ours and reference take what inputs(device) returns and give back the result.

    error: (result, *inputs) -> relative error against fp64. No time is taken of a call with more than tolerance.
    flops and bytes: the least the call has to do, for rates and fractions of the roofline.
    """

    op: str
    shape: str
    dtype: str
    inputs: Callable[[torch.device], tuple[Any, ...]]
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    error: Callable[..., float]
    tolerance: float
    reference_tolerance: float | None = None  # where the twin itself is less exact than ours must be
    flops: float
    bytes: float
    goal: float | None = None  # ratio to the reference to be reached on one CPU thread
    goal_on: str = "cpu"  # the implementation that must reach it
    unit: str | None = None  # whose arithmetic peak is the roof: "bf16", "fp32" or "fp64"; None: by the dtype

    @property
    def id(self) -> str:
        return f"{self.shape}-{self.dtype}"

    @property
    def roof(self) -> str:
        """The unit, or the one of the first dtype named; halves without a unit of their own count as fp32."""
        first = self.dtype.split()[0].rstrip(",")
        return self.unit or (first if first in ("bf16", "fp64") else "fp32")


def second_moment_cases(device: str) -> list[Case]:
    """On a CPU the key width of gpt2 and the width of gptj-6b; on a GPU the key widths of all models."""
    if device == "cpu":
        shapes = {"gpt2 key": (MODELS["gpt2"].key, 2048), "gptj-6b width": (MODELS["gptj-6b"].width, 4096)}
    else:
        shapes = {f"{name} key": (model.key, 8192) for name, model in MODELS.items()}
    return [
        _second_moment_case(shape, d, tokens, keys, master)
        for shape, (d, tokens) in shapes.items()
        for keys in (torch.float32, torch.bfloat16)
        for master in (torch.float32, torch.float64)
    ]


def _second_moment_case(shape: str, d: int, tokens: int, keys: torch.dtype, master: torch.dtype) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        K = torch.randn(tokens, d, generator=generator, device=device)
        return torch.zeros(d, d, dtype=master, device=device), K.to(keys)

    def error(result: Tensor, C: Tensor, K: Tensor) -> float:
        # The first and the last rows of the triangle: every kind of tile, at a fraction of the fp64 product.
        worst = 0.0
        for start in (0, d - 256):
            rows = slice(start, start + 256)
            exact = (K[:, rows].double().T @ K.double()).tril(start)
            worst = max(worst, float((result[rows].double().tril(start) - exact).norm() / exact.norm()))
        return worst

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
    return Case(
        op="second_moment_",
        shape=f"{shape} d={d} T={tokens}",
        dtype=f"{names[keys]} keys, {names[master]} C",
        inputs=inputs,
        ours=_in_place(second_moment_),
        reference=_in_place(reference.second_moment.second_moment_),
        error=error,
        tolerance=5e-6,
        flops=tokens * d * (d + 1),
        goal=1.4,
        bytes=tokens * d * keys.itemsize + d * (d + 1) * master.itemsize,
    )


def _in_place(op: Callable[..., None]) -> Callable[..., Tensor]:
    """An op that changes its first argument, as a function that returns it."""

    def call(first: Tensor, *rest: Any) -> Tensor:
        op(first, *rest)
        return first

    return call
