"""Edit: what a method decided to change, as data that can be applied, taken out again, saved, combined and shipped.

    edit.apply(model); edit.revert(model)          # the model's bits are the original ones again
    with edit.applied(model): ...
    edit.save("paris.safetensors"); Edit.load("paris.safetensors")
    edit.to_peft("adapter/")

Originals are kept, not subtracted: subtracting in bfloat16 is no undo. They live as long as the Edit and the model.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import editable_weight, unwrap
from fastedit.delta import KINDS, Delta, Dense, LowRank, Rows, fingerprint
from fastedit.edit_file import read_file, write_file

__all__ = ["Delta", "Dense", "Edit", "LowRank", "Rows", "fingerprint"]

_KIND = "fastedit-edit"
_VERSION = 1
# The edits applied to a parameter, oldest first, are noted on the parameter itself: tuples (token, method).
_STACK = "_fastedit_applied"


@dataclass(frozen=True, eq=False)
class _Touched:
    """One parameter that an edit changed in one model."""

    name: str
    original: Tensor
    before: str
    after: str


@dataclass(eq=False)
class _Application:
    """An edit in a model: its mark on the parameters, and what was there before."""

    token: object
    touched: tuple[_Touched, ...]


@dataclass(frozen=True, eq=False)
class Edit:
    """The result of an editing method, and its provenance.

    Attributes:
        method: key of the method, "rome".
        config: its configuration, JSON-able.
        requests: the requests as dicts.
        deltas: updates of the weights, added in order.
        base: `fingerprint` of the unedited weight by module name, for every delta.
        info: timings, losses, templates, seeds, versions; JSON-able.

    Raises:
        ValueError: a field that is not JSON-able, or a delta without a fingerprint.
    """

    method: str
    config: dict[str, Any]
    requests: tuple[dict[str, Any], ...]
    deltas: tuple[Delta, ...]
    base: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)
    _applied: weakref.WeakKeyDictionary[nn.Module, _Application] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )
    # Fingerprints right after the last `apply`: what an edit solved on top of this one has as its base.
    _after: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _model: list[weakref.ref[nn.Module]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise ValueError(f"edit: method must be a name, got {self.method!r}")
        for name in ("config", "base", "info"):
            object.__setattr__(self, name, _json_object(name, getattr(self, name)))
        requests = [_json_object("requests", request) for request in self.requests]
        object.__setattr__(self, "requests", tuple(requests))
        object.__setattr__(self, "deltas", tuple(self.deltas))
        for delta in self.deltas:
            if not isinstance(delta, LowRank | Dense | Rows):
                raise ValueError(f"edit: deltas must be LowRank, Dense or Rows, got {type(delta).__name__}")
            if not isinstance(self.base.get(delta.name), str):
                raise ValueError(f"edit: base has no fingerprint for module {delta.name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Where it is applied belongs to this process and these models.
        return Edit, (self.method, self.config, self.requests, self.deltas, self.base, self.info)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules it changes, each once."""
        return tuple(dict.fromkeys(delta.name for delta in self.deltas))

    # ---- in and out of a model -------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, strict: bool = True) -> None:
        """Add the deltas to the model's weights, in place; on any exception every bit is as before.

        Args:
            model: the model it was solved on, or an equal one; wrappers are seen through.
            strict: refuse weights whose fingerprint differs from the base's.

        Raises:
            ValueError: another base model, no such module, another shape, already applied, or a result that is
                not finite.
            NotImplementedError: quantised, packed, sharded or offloaded weights.
        """
        model = unwrap(model)
        if model in self._applied:
            raise ValueError("edit: is already applied to this model; revert it first")
        groups = self._plan(model, strict=strict)
        before = [fingerprint(weight) for weight, _, _ in groups]
        originals = [weight.detach().clone() for weight, _, _ in groups]
        try:
            with torch.no_grad():
                for weight, deltas, _ in groups:
                    _add_all(weight.detach(), deltas)
            touched = tuple(
                _Touched(name, original, old, fingerprint(weight))
                for (weight, _, name), original, old in zip(groups, originals, before)
            )
        except BaseException:
            with torch.no_grad():
                for (weight, _, _), original in zip(groups, originals):
                    weight.copy_(original)
            raise
        application = _Application(object(), touched)
        for weight, _, _ in groups:
            setattr(weight, _STACK, (*getattr(weight, _STACK, ()), (application.token, self.method)))
        self._applied[model] = application
        self._after.update({name: fingerprint(editable_weight(model, name)[0]) for name in self.modules})
        self._model[:] = [weakref.ref(model)]

    def revert(self, model: nn.Module, *, strict: bool = True) -> None:
        """Put the original weights back, bit for bit.

        Args:
            model: a model that this very object was applied to.
            strict: refuse if something else changed the weights since (training, a conversion).

        Raises:
            ValueError: not applied to this model; another edit was applied to the same weights later (revert that
                first); or, when strict, weights that changed since.
        """
        model = unwrap(model)
        application = self._applied.get(model)
        if application is None:
            raise ValueError(
                "edit: is not applied to this model; only the Edit object that was applied keeps the originals "
                "(an exported folder keeps its own: fastedit.export.restore_exported)"
            )
        weights = []
        for touched in application.touched:
            weight, _ = editable_weight(model, touched.name)
            weights.append(weight)
            stack = getattr(weight, _STACK, ())
            if (weight.shape, weight.dtype) != (touched.original.shape, touched.original.dtype):
                raise ValueError(
                    f"module {touched.name!r}: the weight was converted since the edit was applied, from "
                    f"{touched.before.rpartition(':')[0]} to {fingerprint(weight).rpartition(':')[0]}"
                )
            if stack and stack[-1][0] is not application.token:
                raise ValueError(
                    f"module {touched.name!r}: an edit by {stack[-1][1]!r} was applied after this one; "
                    f"edits of one weight are reverted last in, first out"
                )
            # The original bits are fine too: an interrupted revert, or the user restored them.
            if strict and fingerprint(weight) not in (touched.after, touched.before):
                raise ValueError(
                    f"module {touched.name!r}: something other than an edit changed the weight since this edit was "
                    f"applied; revert(model, strict=False) discards that change"
                )
        with torch.no_grad():
            for weight, touched in zip(weights, application.touched):
                weight.copy_(touched.original)
        for weight in weights:
            if remaining := getattr(weight, _STACK, ())[:-1]:
                setattr(weight, _STACK, remaining)
            elif hasattr(weight, _STACK):
                delattr(weight, _STACK)
        del self._applied[model]

    @contextmanager
    def applied(self, model: nn.Module, *, strict: bool = True) -> Iterator[None]:
        """The edit is in the model inside the block and out of it afterwards."""
        self.apply(model, strict=strict)
        try:
            yield
        finally:
            self.revert(model)

    def is_applied(self, model: nn.Module) -> bool:
        """Whether this object is applied to `model` now."""
        return unwrap(model) in self._applied

    def originals(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights before this edit, by module name and as stored, of a model it is applied to."""
        application = self._applied.get(unwrap(model))
        if application is None:
            raise ValueError("edit: is not applied to this model")
        return {touched.name: touched.original for touched in application.touched}

    def _plan(
        self, model: nn.Module, *, strict: bool
    ) -> list[tuple[nn.Parameter, list[tuple[Delta, bool]], str]]:
        """Each parameter once, with its deltas and the first module name; everything is checked, nothing changed."""
        groups: dict[int, tuple[nn.Parameter, list[tuple[Delta, bool]], str]] = {}
        for delta in self.deltas:
            weight, transposed = editable_weight(model, delta.name)
            shape = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
            if shape != delta.shape:
                raise ValueError(
                    f"module {delta.name!r}: the delta is for an (out, in) = {delta.shape} weight, "
                    f"the model's is {shape}"
                )
            if strict and (found := fingerprint(weight)) != self.base[delta.name]:
                raise ValueError(
                    f"module {delta.name!r}: the edit is for another base model or an edited one, its weight was "
                    f"{self.base[delta.name]} and is {found}; apply(model, strict=False) edits it nevertheless"
                )
            for name in delta.fields:
                value = getattr(delta, name)
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise ValueError(
                        f"module {delta.name!r}: {name} of the delta is not finite, the model is unchanged"
                    )
            groups.setdefault(id(weight), (weight, [], delta.name))[1].append((delta, transposed))
        return list(groups.values())

    # ---- as data ---------------------------------------------------------------------------------------------

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the whole update, by module name."""
        return {name: _sum(self._of(name)).norm() for name in self.modules}

    def __add__(self, other: Edit) -> Edit:
        """One Edit with both updates; the low-rank ones of a module are concatenated.

        Both must be solved on the same base, or `other` on a model that `self` was applied to (by this object).
        """
        if not isinstance(other, Edit):
            return NotImplemented
        for name in other.base:
            if name in self.base and other.base[name] not in (self.base[name], self._after.get(name)):
                raise ValueError(
                    f"module {name!r}: the edits have different bases, {self.base[name]} and {other.base[name]}"
                )
        deltas: list[Delta] = []
        for name in dict.fromkeys((*self.modules, *other.modules)):
            deltas.extend(_merge([*self._of(name), *other._of(name)]))
        return Edit(
            method=self.method if self.method == other.method else f"{self.method}+{other.method}",
            config={"parts": [*_parts(self, "config"), *_parts(other, "config")]},
            requests=(*self.requests, *other.requests),
            deltas=tuple(deltas),
            base={**other.base, **self.base},
            info={"parts": [*_parts(self, "info"), *_parts(other, "info")]},
        )

    def _of(self, name: str) -> list[Delta]:
        return [delta for delta in self.deltas if delta.name == name]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a JSON header; an interrupted save leaves the old file.

        Raises:
            FileNotFoundError: no such folder.
            OSError: the disk.
        """
        tensors: dict[str, Tensor] = {}
        described = []
        for index, delta in enumerate(self.deltas):
            entry: dict[str, Any] = {"kind": delta.kind, "name": delta.name}
            if isinstance(delta, Rows):
                entry.update(size=delta.size, axis=delta.axis)
            described.append(entry)
            tensors.update({f"{index}.{name}": getattr(delta, name) for name in delta.fields})
        header = {
            "method": self.method,
            "config": self.config,
            "requests": list(self.requests),
            "base": self.base,
            "info": self.info,
            "deltas": described,
        }
        write_file(path, tensors, header, kind=_KIND, version=_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote; tensors are on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, damaged, another format or a newer version.
        """
        tensors, header = read_file(path, kind=_KIND, version=_VERSION)
        try:
            deltas: list[Delta] = []
            for index, entry in enumerate(header["deltas"]):
                kind: Any = KINDS[entry["kind"]]
                parts = {name: tensors[f"{index}.{name}"] for name in kind.fields}
                extra = {key: entry[key] for key in ("size", "axis") if key in entry}
                deltas.append(kind(name=entry["name"], **parts, **extra))
            fields = {name: header[name] for name in ("method", "config", "base", "info")}
            return cls(**fields, requests=tuple(header["requests"]), deltas=tuple(deltas))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"path: {str(path)!r} lacks or misuses a field ({error})") from None

    def to_peft(
        self,
        directory: str | Path,
        model: nn.Module | Any | None = None,
        *,
        rank: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the edit as a LoRA adapter; see `fastedit.export.peft.to_peft`.

        `model` (or its config) may be left out if the edit has been applied to a model that still exists.
        """
        from fastedit.export.peft import to_peft

        if model is None:
            model = self._model[0]() if self._model else None
        if model is None:
            raise ValueError(
                "model: is needed to know the edited modules' types; pass the model or its config"
            )
        to_peft(self, model, directory, rank=rank, overwrite=overwrite)


def _add_all(weight: Tensor, deltas: list[tuple[Delta, bool]]) -> None:
    """Add one or several deltas with one rounding; raise if the result is not finite."""
    if len(deltas) == 1:
        delta, transposed = deltas[0]
        delta.add_to(weight, transposed=transposed)
    else:
        tensors = [getattr(delta, name) for delta, _ in deltas for name in delta.fields]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in (weight, *tensors)) else torch.float32
        total = weight.to(wide, copy=True)
        for delta, transposed in deltas:
            delta.add_to(total, transposed=transposed)
        weight.copy_(total)
    if not bool(torch.isfinite(weight).all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"module {deltas[0][0].name!r}: the edited weight is not finite in {dtype}, the model is unchanged"
        )


def _merge(deltas: list[Delta]) -> list[Delta]:
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


def _sum(deltas: list[Delta]) -> Delta:
    merged = _merge(deltas)
    if len(merged) == 1:
        return merged[0]
    total = merged[0].dense()
    for delta in merged[1:]:
        total = total + delta.dense().to(total.device)
    return Dense(merged[0].name, total)


def _parts(edit: Edit, name: str) -> list[Any]:
    value: dict[str, Any] = getattr(edit, name)
    if set(value) == {"parts"}:
        parts: list[Any] = value["parts"]
        return parts
    return [{"method": edit.method, **value}]


def _json_object(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"edit: {name} must be a mapping, got {type(value).__name__}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"edit: {name} must be JSON-able ({error})") from None
    return copied
