"""Two edits as one: their updates concatenated where both are low-rank, their provenance side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastedit.delta import Delta, Dense, LowRank

if TYPE_CHECKING:
    from fastedit.edit import Edit

__all__ = ["compose", "merged", "summed"]


def compose(first: Edit, second: Edit, after: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an Edit with both updates.

    Args:
        after: fingerprints right after `first` was applied, by module: `second` may be solved on these.

    Raises:
        ValueError: different bases.
    """
    for name in second.base:
        if name in first.base and second.base[name] not in (first.base[name], after.get(name)):
            raise ValueError(
                f"module {name!r}: the edits have different bases, {first.base[name]} and {second.base[name]}"
            )
    deltas = [*first.deltas, *second.deltas]
    names = dict.fromkeys((*first.modules, *second.modules))
    return {
        "method": first.method if first.method == second.method else f"{first.method}+{second.method}",
        "config": {"parts": [*_parts(first, "config"), *_parts(second, "config")]},
        "requests": (*first.requests, *second.requests),
        "deltas": tuple(
            delta for name in names for delta in merged([delta for delta in deltas if delta.name == name])
        ),
        "base": {**second.base, **first.base},
        "info": {"parts": [*_parts(first, "info"), *_parts(second, "info")]},
    }


def merged(deltas: Sequence[Delta]) -> list[Delta]:
    """The low-rank deltas of one module as one, in front; addition commutes."""
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    rest: list[Delta] = [delta for delta in deltas if not isinstance(delta, LowRank)]
    if len(low) < 2:
        return [*low, *rest]
    device = low[0].left.device
    dtype = (
        torch.float64 if any(torch.float64 in (d.left.dtype, d.right.dtype) for d in low) else torch.float32
    )
    left = torch.cat([delta.left.to(device, dtype) for delta in low], dim=1)
    right = torch.cat([delta.right.to(device, dtype) for delta in low])
    return [LowRank(low[0].name, left, right), *rest]


def summed(deltas: Sequence[Delta]) -> Delta:
    """The deltas of one module, one or more, as one."""
    parts = merged(deltas)
    if len(parts) == 1:
        return parts[0]
    total = parts[0].dense()
    for delta in parts[1:]:
        total = total + delta.dense().to(total.device)
    return Dense(parts[0].name, total)


def _parts(edit: Edit, name: str) -> list[Any]:
    value: dict[str, Any] = getattr(edit, name)
    if set(value) == {"parts"}:
        parts: list[Any] = value["parts"]
        return parts
    return [{"method": edit.method, **value}]
