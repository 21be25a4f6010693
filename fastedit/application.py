"""Deltas meet weights: everything is checked before anything is written, and each weight is rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastedit.arch import editable_weight
from fastedit.delta import Delta, fingerprint

__all__ = ["Application", "Target", "Touched", "add_all", "plan"]


@dataclass(frozen=True, eq=False)
class Touched:
    """One parameter that an edit changed in one model: its first module name, its values, and fingerprints."""

    name: str
    original: Tensor
    before: str
    after: str


@dataclass(eq=False)
class Application:
    """An edit in a model: its mark on the parameters, and what was there before."""

    token: object
    touched: tuple[Touched, ...]


@dataclass(frozen=True, eq=False)
class Target:
    """One parameter to change: its first module name, and its deltas, each with whether it is stored transposed."""

    name: str
    weight: nn.Parameter
    deltas: list[tuple[Delta, bool]]


def plan(model: nn.Module, deltas: Sequence[Delta], base: Mapping[str, str], *, strict: bool) -> list[Target]:
    """Each parameter once, also where modules share it; everything is checked, nothing changed.

    Raises:
        ValueError: no such module, another shape, another base model when `strict`, or a delta that is not finite.
        NotImplementedError: a weight that cannot be changed in place.
    """
    targets: dict[int, Target] = {}
    for delta in deltas:
        weight, transposed = editable_weight(model, delta.name)
        shape = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
        if shape != delta.shape:
            raise ValueError(
                f"module {delta.name!r}: the delta is for an (out, in) = {delta.shape} weight, "
                f"the model's is {shape}"
            )
        if strict and (found := fingerprint(weight)) != base[delta.name]:
            raise ValueError(
                f"module {delta.name!r}: the edit is for another base model or an edited one, its weight was "
                f"{base[delta.name]} and is {found}; apply(model, strict=False) edits it nevertheless"
            )
        for name in delta.fields:
            value = getattr(delta, name)
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"module {delta.name!r}: {name} of the delta is not finite, the model is unchanged"
                )
        target = targets.setdefault(id(weight), Target(delta.name, weight, []))
        target.deltas.append((delta, transposed))
    return list(targets.values())


def add_all(target: Target) -> None:
    """Add one or several deltas with one rounding; raise ValueError if the result is not finite."""
    weight = target.weight.detach()
    if len(target.deltas) == 1:
        delta, transposed = target.deltas[0]
        delta.add_to(weight, transposed=transposed)
    else:
        tensors = [getattr(delta, name) for delta, _ in target.deltas for name in delta.fields]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in (weight, *tensors)) else torch.float32
        total = weight.to(wide, copy=True)
        for delta, transposed in target.deltas:
            delta.add_to(total, transposed=transposed)
        weight.copy_(total)
    if not bool(torch.isfinite(weight).all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"module {target.name!r}: the edited weight is not finite in {dtype}, the model is unchanged"
        )
