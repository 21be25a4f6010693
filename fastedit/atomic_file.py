"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "can_write", "fsync_path"]


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, make_folder: bool = False) -> Iterator[Path]:
    """A fresh path beside `path` to write to; renamed over `path` at the end, removed if the block raises.

    Args:
        path: what the file is to be called; a file of that name stays until the new one is on the disk.
        make_folder: make the folder (and those above it) if there is none.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: folder {str(path.parent)!r} does not exist")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        fsync_path(part)
        part.replace(path)
        fsync_path(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Force a file or a folder's entries to the disk; folders cannot be synchronised by every system."""
    if os.name != "posix" and path.is_dir():
        return
    # Windows synchronises files open for writing only.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, by trying: permission bits say little about root, mounts and quotas."""
    probe = folder / f".fastedit-{os.getpid()}.tmp"
    try:
        probe.touch(exist_ok=False)
    except OSError:
        return False
    probe.unlink()
    return True
