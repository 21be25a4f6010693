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

from fastedit.application import Application, Touched, add_all, plan
from fastedit.arch import editable_weight, unwrap
from fastedit.compose import compose, summed
from fastedit.delta import KINDS, Delta, Dense, LowRank, Rows, fingerprint
from fastedit.edit_file import read_file, write_file

__all__ = ["Delta", "Dense", "Edit", "LowRank", "Rows", "fingerprint"]

_KIND = "fastedit-edit"
_VERSION = 1
# The edits applied to a parameter, oldest first, are noted on the parameter itself: tuples (token, method).
_STACK = "_fastedit_applied"


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
    _applied: weakref.WeakKeyDictionary[nn.Module, Application] = field(
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
        targets = plan(model, self.deltas, self.base, strict=strict)
        before = [fingerprint(target.weight) for target in targets]
        originals = [target.weight.detach().clone() for target in targets]
        try:
            with torch.no_grad():
                for target in targets:
                    add_all(target)
            touched = tuple(
                Touched(target.name, original, old, fingerprint(target.weight))
                for target, original, old in zip(targets, originals, before)
            )
        except BaseException:
            with torch.no_grad():
                for target, original in zip(targets, originals):
                    target.weight.copy_(original)
            raise
        application = Application(object(), touched)
        for target in targets:
            stack = getattr(target.weight, _STACK, ())
            setattr(target.weight, _STACK, (*stack, (application.token, self.method)))
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

    # ---- as data ---------------------------------------------------------------------------------------------

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the whole update, by module name."""
        return {
            name: summed([delta for delta in self.deltas if delta.name == name]).norm()
            for name in self.modules
        }

    def __add__(self, other: Edit) -> Edit:
        """One Edit with both updates; the low-rank ones of a module are concatenated.

        Both must be solved on the same base, or `other` on a model that `self` was applied to (by this object).
        """
        if not isinstance(other, Edit):
            return NotImplemented
        return Edit(**compose(self, other, self._after))

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


def _json_object(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"edit: {name} must be a mapping, got {type(value).__name__}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"edit: {name} must be JSON-able ({error})") from None
    return copied
