"""Write a folder as a whole: into a temporary one beside it, to the disk, then renamed."""

from __future__ import annotations

import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastedit.atomic_file import fsync_path

__all__ = ["atomic_folder"]


@contextmanager
def atomic_folder(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder to fill; takes the place of `directory` at the end, and is removed if the block raises.

    Raises:
        FileExistsError: `directory` is a file, or holds something and `overwrite` is False.
        FileNotFoundError: the folder that is to hold it does not exist.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"directory: {str(directory)!r} is a file")
    if directory.is_dir() and not overwrite and any(directory.iterdir()):
        raise FileExistsError(f"directory: {str(directory)!r} is not empty; overwrite=True replaces it")
    if not directory.parent.is_dir():
        raise FileNotFoundError(f"directory: folder {str(directory.parent)!r} does not exist")
    mark = secrets.token_hex(4)
    part = directory.with_name(f".{directory.name}.{mark}.part")
    part.mkdir()
    try:
        yield part
        _give_usual_modes(part)
        for path in (*part.rglob("*"), part):
            fsync_path(path)
        if directory.is_dir():
            old = directory.with_name(f".{directory.name}.{mark}.old")
            directory.rename(old)
            try:
                part.rename(directory)
            except BaseException:
                old.rename(directory)
                raise
            shutil.rmtree(old)
        else:
            part.rename(directory)
        fsync_path(directory.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    """Files as readable as the user's others: the safetensors library makes them for the owner only."""
    probe = folder / ".mode"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | usual)
