"""What an edit does to one weight: a low-rank, a dense or a by-rows update, always in canonical (out, in) orientation.

All three are additions: ``W <- W + delta.dense()``, computed in float32 (float64 if the weight or a factor is) and
rounded once into the weight's dtype. Transposition for Conv1D happens once, where the delta meets the weight.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fastedit.ops.rank_update import rank_update_

__all__ = ["KINDS", "Delta", "Dense", "LowRank", "Rows", "fingerprint"]

_SAMPLES = 1 << 16


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right``: the update of ROME, MEMIT and their family.

    Attributes:
        name: dotted module name; the parameter is ``name + ".weight"``.
        left: [out, r], any float dtype.
        right: [r, in], any float dtype, on the same device.
    """

    kind: ClassVar[str] = "low_rank"
    fields: ClassVar[tuple[str, ...]] = ("left", "right")

    name: str
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        _check_name(self)
        _check_matrix(self, "left")
        _check_matrix(self, "right")
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"delta {self.name!r}: left [out, r] and right [r, in] must share r, "
                f"got {list(self.left.shape)} and {list(self.right.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight this changes."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The whole update [out, in], in the wider dtype of the factors and at least float32."""
        dtype = _wide(self.left.dtype, self.right.dtype)
        return self.left.to(dtype) @ self.right.to(dtype)

    def norm(self) -> float:
        """Frobenius norm, from two r x r Gram matrices in float64."""
        left, right = self.left.double(), self.right.double()
        return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """The same delta with its factors moved or converted, as ``Tensor.to`` does."""
        return replace(self, left=self.left.to(*args, **kwargs), right=self.right.to(*args, **kwargs))

    def add_to(self, weight: Tensor, *, transposed: bool) -> None:
        """Add to a weight [out, in] (or [in, out]) in place; the caller has checked shapes."""
        device = weight.device
        rank_update_(weight, self.left.to(device), self.right.to(device), transposed=transposed)


@dataclass(frozen=True, eq=False)
class Dense:
    """A full-rank update: fine-tuning, masked updates.

    Attributes:
        name: dotted module name.
        value: [out, in], any float dtype.
    """

    kind: ClassVar[str] = "dense"
    fields: ClassVar[tuple[str, ...]] = ("value",)

    name: str
    value: Tensor

    def __post_init__(self) -> None:
        _check_name(self)
        _check_matrix(self, "value")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight this changes."""
        return self.value.shape[0], self.value.shape[1]

    def dense(self) -> Tensor:
        """The update [out, in], at least float32."""
        return self.value.to(_wide(self.value.dtype))

    def norm(self) -> float:
        """Frobenius norm in float64."""
        return float(torch.linalg.vector_norm(self.value, dtype=torch.float64))

    def to(self, *args: Any, **kwargs: Any) -> Dense:
        """The same delta with its value moved or converted."""
        return replace(self, value=self.value.to(*args, **kwargs))

    def add_to(self, weight: Tensor, *, transposed: bool) -> None:
        """Add to a weight [out, in] (or [in, out]) in place; the caller has checked shapes."""
        value = self.value.to(weight.device)
        _add(weight, value.T if transposed else value)


@dataclass(frozen=True, eq=False)
class Rows:
    """An update of a few rows (or columns) of a weight: single neurons.

    Attributes:
        name: dotted module name.
        index: [k] int64, distinct, from 0 to ``size - 1``.
        value: [k, in] added to rows ``index`` (axis 0), or [k, out] added to columns ``index`` (axis 1).
        size: number of rows (axis 0) or columns (axis 1) of the weight.
        axis: 0 or 1, of the canonical (out, in) weight.
    """

    kind: ClassVar[str] = "rows"
    fields: ClassVar[tuple[str, ...]] = ("index", "value")

    name: str
    index: Tensor
    value: Tensor
    size: int
    axis: int = 0

    def __post_init__(self) -> None:
        _check_name(self)
        _check_matrix(self, "value")
        index = self.index
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"delta {self.name!r}: index must be a vector of int64, got {_described(index)}")
        if index.shape[0] != self.value.shape[0]:
            raise ValueError(
                f"delta {self.name!r}: index and value must have the same length, "
                f"got {index.shape[0]} and {self.value.shape[0]}"
            )
        if self.axis not in (0, 1):
            raise ValueError(f"delta {self.name!r}: axis must be 0 or 1, got {self.axis!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"delta {self.name!r}: size must be a positive integer, got {self.size!r}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise ValueError(f"delta {self.name!r}: index must be from 0 to {self.size - 1}")
        if index.unique().numel() != index.numel():
            raise ValueError(f"delta {self.name!r}: index must not repeat a row")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight this changes."""
        width = self.value.shape[1]
        return (self.size, width) if self.axis == 0 else (width, self.size)

    def dense(self) -> Tensor:
        """The whole update [out, in], zero outside the rows, at least float32."""
        value = self.value.to(_wide(self.value.dtype))
        full = value.new_zeros(self.shape)
        return full.index_add_(self.axis, self.index, value if self.axis == 0 else value.T)

    def norm(self) -> float:
        """Frobenius norm in float64."""
        return float(torch.linalg.vector_norm(self.value, dtype=torch.float64))

    def to(self, *args: Any, **kwargs: Any) -> Rows:
        """The same delta with its value moved or converted; the index follows the device and stays int64."""
        value = self.value.to(*args, **kwargs)
        return replace(self, value=value, index=self.index.to(value.device))

    def add_to(self, weight: Tensor, *, transposed: bool) -> None:
        """Add to a weight [out, in] (or [in, out]) in place; the caller has checked shapes."""
        canonical = weight.T if transposed else weight
        lines = canonical if self.axis == 0 else canonical.T  # a view whose rows are what `index` counts
        index, value = self.index.to(weight.device), self.value.to(weight.device)
        wide = _wide(weight.dtype, value.dtype)
        lines[index] = (lines[index].to(wide) + value.to(wide)).to(weight.dtype)


Delta: TypeAlias = LowRank | Dense | Rows

KINDS: dict[str, type[LowRank] | type[Dense] | type[Rows]] = {
    kind.kind: kind for kind in (LowRank, Dense, Rows)
}


def fingerprint(weight: Tensor) -> str:
    """Shape, dtype and a hash of up to 65,536 evenly spread values: ``"768x3072:bfloat16:9f86d081884c7d65"``.

    Cheap, so it tells models and edits apart but does not notice the change of a few values.
    """
    shape = "x".join(str(size) for size in weight.shape)
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.is_meta:
        raise ValueError(f"weight: must hold data, got a {shape} tensor on the meta device")
    flat = weight.detach().reshape(-1)
    if flat.numel() > _SAMPLES:
        # A stride that shares no factor with the size visits every row and every column, not a few of them.
        stride = flat.numel() // _SAMPLES
        while math.gcd(stride, flat.numel()) != 1:
            stride += 1
        flat = flat[::stride]
    data = flat.contiguous().view(torch.uint8).cpu().numpy().data
    return f"{shape}:{dtype}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def _add(weight: Tensor, value: Tensor) -> None:
    dtype = _wide(weight.dtype, value.dtype)
    if weight.dtype == dtype:
        weight.add_(value.to(dtype))
    else:
        weight.copy_(weight.to(dtype) + value.to(dtype))


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_name(delta: Delta) -> None:
    if not isinstance(delta.name, str) or not delta.name or delta.name.endswith(".weight"):
        raise ValueError(f"delta: name must be a module name without '.weight', got {delta.name!r}")


def _check_matrix(delta: Delta, field: str) -> None:
    value = getattr(delta, field)
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
        raise ValueError(f"delta {delta.name!r}: {field} must be a float matrix, got {_described(value)}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return type(value).__name__
