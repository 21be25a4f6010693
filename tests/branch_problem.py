"""Problems for branch_attention: arguments of ugly shapes with NaN in what is not read, and the check in float64."""

from __future__ import annotations

from typing import Any

import torch
from reference.branch_attention import branch_attention as reference
from torch import Tensor

from fastedit.ops.branch_attention import branch_attention

__all__ = ["SHAPES", "TENSORS", "TOLERANCES", "check", "problem", "widened", "with_gradients"]

TENSORS = ("q", "k", "v", "k_prefix", "v_prefix", "columns", "q_starts", "q_offsets", "k_starts")

SHAPES = {
    "one token": {"B": 1, "own": (1, 1), "prefix": (0, 0), "H": 1, "G": 1, "D": 1},
    "one branch": {"B": 1, "own": (6, 6), "prefix": (9, 9)},
    "no prefix": {"prefix": (0, 0)},
    "63 of everything": {"B": 63, "own": (1, 63), "prefix": (0, 63), "H": 3, "G": 3, "D": 63},
    "long": {"B": 2, "own": (200, 300), "prefix": (100, 200), "H": 2, "G": 1, "D": 16},
    "branches without tokens": {"B": 9, "own": (0, 1)},
}


def problem(
    B: int = 7,
    *,
    own: tuple[int, int] = (1, 5),
    prefix: tuple[int, int] = (0, 6),
    H: int = 4,
    G: int = 2,
    D: int = 8,
    every_query: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Arguments by name. Rows of the store are shared at random; some, at NaN, are named by no branch."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    keys, lengths = integers(*own, B), integers(*prefix, B)
    queries = keys if every_query else (torch.rand(B, generator=generator) * (keys + 1)).long()
    offsets = [
        torch.randperm(int(n), generator=generator)[: int(m)].sort().values for n, m in zip(keys, queries)
    ]
    P = max(2 * prefix[1], 1)
    columns = torch.full((B, prefix[1]), -1)
    for row, length in zip(columns, lengths):
        row[:length] = 1 + torch.randperm(P, generator=generator)[:length]
    k_prefix, v_prefix = normal(P + 2, G, D), normal(P + 2, G, D)
    unused = torch.ones(P + 2, dtype=torch.bool)
    unused[columns[columns >= 0]] = False
    k_prefix[unused.to(device)], v_prefix[unused.to(device)] = torch.nan, torch.nan
    return {
        "q": normal(int(queries.sum()), H, D),
        "k": normal(int(keys.sum()), G, D),
        "v": normal(int(keys.sum()), G, D),
        "k_prefix": k_prefix,
        "v_prefix": v_prefix,
        "columns": columns.to(device),
        "q_starts": torch.cat([torch.zeros(1).long(), queries.cumsum(0)]).to(device),
        "q_offsets": torch.cat([torch.zeros(0).long(), *offsets]).to(device),
        "k_starts": torch.cat([torch.zeros(1).long(), keys.cumsum(0)]).to(device),
        "max_q": int(queries.max()) if B else 0,
        "max_k": int(keys.max()) if B else 0,
        "scale": D**-0.5,
        **options,
    }


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same problem in float64, on the CPU."""
    return {
        name: value.cpu().double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.cpu()
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def with_gradients(
    function: Any, arguments: dict[str, Any], rounded: torch.dtype = torch.float64
) -> list[Tensor]:
    """Result, and gradients in q, k and v of a random mix of it, with weights that `rounded` can hold."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    out = function(**{**arguments, **leaves})
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(mix.to(rounded).to(out.device, out.dtype))
    gradients = (leaf.grad for leaf in leaves.values())
    return [out.detach(), *(grad for grad in gradients if grad is not None)]


# (relative, absolute); in half precision half a unit of the last place, for the one rounding at the end.
TOLERANCES = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (1.01 * 2.0**-8, 2e-5),
    torch.float16: (1.01 * 2.0**-11, 2e-5),
}


def check(arguments: dict[str, Any]) -> None:
    dtype = arguments["q"].dtype
    rtol, atol = TOLERANCES[dtype]
    found = with_gradients(branch_attention, arguments, dtype)
    expected = with_gradients(reference, widened(arguments), dtype)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected):
        assert ours.dtype == dtype and ours.shape == theirs.shape, name
        torch.testing.assert_close(
            ours.cpu().double(), theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
