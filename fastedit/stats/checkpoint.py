"""Partial sums on disk: written through a temporary file, whole or not at all, without a second copy in memory."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastedit.atomic_file import atomic_path

__all__ = ["deferred_interrupt", "read_tensors", "write_tensors"]

_NAMES = {torch.float64: "F64", torch.float32: "F32"}


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], Iterable[Tensor]]], **meta: Any
) -> None:
    """Write a safetensors file from pieces.

    `safetensors.torch.save_file` first copies every tensor into bytes; matrices that fill most of the memory are
    written in place here instead, and packed triangles a few rows at a time.

    Args:
        path: replaced atomically.
        tensors: name -> (dtype, shape, contiguous pieces whose values in order fill the shape).
        meta: JSON-able values, stored as one JSON document under "fastedit" in the file's metadata.

    Raises:
        OSError: the file cannot be written; an older file at `path` is kept.
    """
    header: dict[str, Any] = {"__metadata__": {"fastedit": json.dumps(meta)}}
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path, make_folder=True) as temporary, temporary.open("wb", buffering=1 << 20) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in tensors.values():
            for piece in pieces:
                file.write(piece.detach().cpu().contiguous().numpy().data.cast("B"))


def read_tensors(
    path: Path, into: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors and the meta values.

    Args:
        into: tensors to fill instead of returning new ones; names and shapes must agree.

    Raises:
        ValueError: truncated, damaged or foreign file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["fastedit"])
            if into is None:
                return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
            for name, tensor in into.items():
                tensor.copy_(file.get_tensor(name))
            return {}, meta
    except (SafetensorError, KeyError, json.JSONDecodeError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable statistics file ({error}); delete it and run again"
        ) from None


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block instead of inside, so that sums and files are never half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    pending: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[0])
