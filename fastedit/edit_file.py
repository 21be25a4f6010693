"""The edit file: safetensors with a JSON header and a checksum over everything, written so that a crash keeps the old.

Tensors are stored as they are. The metadata holds ``format``, ``version``, ``header`` (JSON) and ``checksum``
(BLAKE2b over the header and over every tensor's name, dtype, shape and bytes), so a flipped bit anywhere is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastedit.atomic_file import atomic_path

__all__ = ["read_file", "write_file", "write_safetensors"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}

# What reading a damaged file can raise, from the container down to the JSON in it.
_DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError)


def write_file(
    path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, kind: str, version: int
) -> None:
    """Write `tensors` and the JSON-able `header` to `path`: temporary file, fsync, rename.

    Raises:
        FileNotFoundError: no such folder.
        OSError: the disk; a file that was there before is unchanged.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": kind, "version": str(version), "header": text, "checksum": _checksum(text, stored)}
    with atomic_path(path) as part:
        write_safetensors(part, stored, metadata)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write CPU tensors as a safetensors file: the same bytes for the same content, the user's umask, plain OSErrors.

    The library's writer orders metadata at random, makes files only the owner can read, and hides the system's error.
    """
    names = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps every tensor aligned
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(_bytes(tensors[name]))


def read_file(path: str | Path, *, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_file` wrote: (tensors on the CPU, header).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of this kind, a newer version, truncated or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: {str(path)!r} does not exist")
    if not path.is_file():
        raise ValueError(f"path: {str(path)!r} is not a file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except _DAMAGE as error:
        raise ValueError(
            f"path: {str(path)!r} is not a safetensors file, or it is truncated or damaged ({_one_line(error)})"
        ) from None
    if metadata.get("format") != kind:
        raise ValueError(
            f"path: {str(path)!r} is not a {kind} file (format {str(metadata.get('format'))[:40]!r})"
        )
    if metadata.get("version") != str(version):
        raise ValueError(
            f"path: {str(path)!r} has version {metadata.get('version', '')[:20]!r}, this release reads {version}"
        )
    text = metadata.get("header", "")
    if metadata.get("checksum") != _checksum(text, tensors):
        raise ValueError(f"path: {str(path)!r} is damaged: its checksum does not match its content")
    try:
        header = json.loads(text)
    except _DAMAGE as error:
        raise ValueError(f"path: {str(path)!r} has a header that is not JSON ({_one_line(error)})") from None
    if not isinstance(header, dict):
        raise ValueError(f"path: {str(path)!r} has a header that is not an object")
    return tensors, header


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
