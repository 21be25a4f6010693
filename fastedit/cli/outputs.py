"""Where commands write: refused before any work where it cannot be, and named where it fails all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_output", "check_plot", "saving"]


# What a folder written by apply, revert or export holds one of.
_OURS = ("config.json", "adapter_config.json")


def check_output(
    path: Path | None, *, force: bool, option: str = "--out", folder: bool = False, added: bool = False
) -> None:
    """Refuse an output that exists (without force), whose parent is not there, or that could not be written.

    A folder is replaced as a whole, so one that holds no model or adapter is refused with force too; with added,
    what is in the folder stays and anything may be.

    Raises ValueError before any work is done, so that hours of it are not lost on the last line.
    """
    if path is None:
        return
    if path.exists() and not force:
        raise ValueError(f"{option} must not exist (--force replaces it), got {str(path)!r}")
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{option} must be a {'folder' if folder else 'file'}, got {str(path)!r}")
    if folder and not added and path.exists() and not _replaceable(path):
        raise ValueError(
            f"{option} must be empty or hold a model or an adapter for --force to replace it, got {str(path)!r}"
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{option} must lie in a folder that exists, got {str(path)!r}")
    if not _writable(parent):
        raise ValueError(f"{option} must lie in a folder that can be written to, got {str(path)!r}")


def check_plot(path: Path | None, *, force: bool, out: Path | None = None) -> None:
    """``check_output`` for --plot, whose suffix chooses the format and which must not be --out."""
    if path is not None and out is not None and path.resolve() == out.resolve():
        raise ValueError(f"--plot must be another file than --out, got {str(path)!r} for both")
    if path is not None and path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {str(path)!r}")
    check_output(path, force=force, option="--plot")


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Gives an error of the disk inside the block the name of what was being written."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replaceable(folder: Path) -> bool:
    return not any(folder.iterdir()) or any((folder / name).is_file() for name in _OURS)


def _writable(folder: Path) -> bool:
    """By trying: permission bits say little about root, read-only mounts and quotas."""
    probe = folder / f".fastedit-{os.getpid()}.tmp"
    try:
        probe.touch(exist_ok=False)
    except OSError:
        return False
    probe.unlink()
    return True
