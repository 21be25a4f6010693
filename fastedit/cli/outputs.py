"""Where commands write: refused before any work where it cannot be, and named where it fails all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fastedit.atomic_file import can_write

__all__ = ["check_not_input", "check_output", "check_plot", "saving"]


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
    if not can_write(parent):
        raise ValueError(f"{option} must lie in a folder that can be written to, got {str(path)!r}")


def check_not_input(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | str | None], *, folder: bool = False
) -> None:
    """Refuse an output that is one of the inputs, whatever --force says; or, of folders, that holds one.

    Inputs that are no files (names of models) are left alone.
    """
    for option, path in outputs.items():
        for other, given in inputs.items():
            if path is None or given is None or not path.exists() or not Path(given).exists():
                continue
            if path.samefile(given):
                raise ValueError(f"{option} must not be {other}, got {str(path)!r} for both")
            if folder and path.resolve() in Path(given).resolve().parents:
                raise ValueError(f"{option} must not hold {other}, got {str(path)!r} and {str(given)!r}")


def check_plot(path: Path | None, *, force: bool, out: Path | None = None) -> None:
    """``check_output`` for --plot, whose suffix chooses the format and which must not be --out.

    Raises RuntimeError without matplotlib: before any work, too.
    """
    if path is not None and out is not None and path.resolve() == out.resolve():
        raise ValueError(f"--plot must be another file than --out, got {str(path)!r} for both")
    if path is not None and path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {str(path)!r}")
    check_output(path, force=force, option="--plot")
    if path is not None and find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'fastedit-kernels[plot]'")


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
