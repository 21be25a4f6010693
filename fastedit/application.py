"""Deltas meet weights: everything is checked before anything is written, and each weight is rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastedit.arch import editable_weight
from fastedit.delta import Delta, fingerprint

__all__ = ["Application", "OtherBaseError", "Target", "Touched", "add_all", "plan"]


class OtherBaseError(ValueError):
    """The edit was solved on other weights; `problem` is the message without the hint for Python."""

    def __init__(self, name: str, was: str, found: str) -> None:
        names = ("shape", "dtype", "weights")
        differ = [what for what, a, b in zip(names, was.split(":"), found.split(":")) if a != b]
        # Other shapes or dtypes have other hashes by themselves.
        differ = differ[:-1] or differ
        verb = "differ" if differ[-1] == "weights" or len(differ) > 1 else "differs"
        self.problem = (
            f"module {name!r}: the edit is for another base model or an edited one, the {' and '.join(differ)} "
            f"{verb}: was {was}, is {found}"
        )
        super().__init__(f"{self.problem}; apply(model, strict=False) edits it nevertheless")


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
            raise OtherBaseError(delta.name, base[delta.name], found)
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
