"""The npz files that ROME, MEMIT, AlphaEdit, EMMET and EasyEdit keep statistics in: names, reading, writing.

A file is ``{stats_dir}/{model}/{dataset}_stats/{module}_{precision}_mom2[_t...][_{N}].npz``, uncompressed, with
``mom2.constructor`` (ignored on loading), ``mom2.count``, ``mom2.mom2`` (the SUM of k kᵀ) and ``sample_size``.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastedit.atomic_file import atomic_path
from fastedit.stats.moment import SecondMoment
from fastedit.stats.provenance import Provenance, dtype_name

__all__ = ["FileName", "file_name", "model_folders", "read_npz", "write_npz"]

_CONSTRUCTOR = "util.runningstats.SecondMoment()"
# How the original stores None: a NaN with this payload, read back by its bits.
_NULL = np.array(0xFFF8000000000002, dtype=np.uint64).view(np.float64)
# The originals meant to write the token limit after _t but wrote the braces themselves.
_NAME = re.compile(
    r"(?P<module>.+)_(?P<dtype>float(?:16|32|64))_(?P<stats>[a-z0-9_-]*mom2[a-z0-9-]*)"
    r"(?P<limit>_t(?:\{batch_tokens\}|\d+))?(?:_(?P<n>\d+))?\.npz"
)


@dataclass(frozen=True)
class FileName:
    """What a statistics file's name says."""

    module: str
    dtype: str
    n_texts: int | None
    limited: bool

    @classmethod
    def parse(cls, name: str) -> FileName | None:
        """The parts of a file name, or None if it is no such name."""
        found = _NAME.fullmatch(name)
        if found is None or "mom2" not in found["stats"].split("-"):
            return None
        n = None if found["n"] is None else int(found["n"])
        return cls(found["module"], found["dtype"], n, found["limit"] is not None)


# What reading a damaged archive can raise. A flipped bit may claim encryption, a future zip version or an unknown
# compression (RuntimeError, NotImplementedError), or a header that is no Python literal.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    EOFError,
    OSError,
    KeyError,
    TypeError,
    RuntimeError,
    OverflowError,
    SyntaxError,
    MemoryError,
)


def file_name(module: str, dtype: str, n_texts: int | None) -> str:
    """The file's name in the originals' spelling."""
    return f"{module}_{dtype}_mom2{'' if n_texts is None else f'_{n_texts}'}.npz"


def model_folders(name: str | None) -> tuple[str, ...]:
    """Folders in which the different programs look for a model called `name` (`config._name_or_path`).

    The first is ROME's and MEMIT's and the one this package writes; then EasyEdit's and AlphaEdit's (the last part of
    the path), older EasyEdit's (its download folder in the name), and EMMET's (the name as it is).
    """
    name = (name or "").rstrip("/")
    if name in ("", ".", ".."):
        return ("model",)
    last = name.rsplit("/", 1)[-1]
    folders = [name.replace("/", "_"), last, f"._hugging_cache_{last}"]
    if not name.startswith("/") and ".." not in name.split("/"):
        folders.append(name.removeprefix("./"))
    return tuple(dict.fromkeys(folders))


def read_npz(path: Path, module: str, *, dataset: str | None = None) -> SecondMoment:
    """Read a statistics file of any of the programs. The provenance holds what the name and the file say.

    Raises:
        ValueError: truncated or damaged, or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in ("mom2.mom2", "mom2.count") if key not in arrays]
            if missing:
                raise ValueError(f"it has no array {missing[0]!r}")
            total, count = arrays["mom2.mom2"], arrays["mom2.count"]
            size = arrays.get("sample_size", _NULL)
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable statistics file ({error})") from None
    if total.ndim != 2 or total.shape[0] != total.shape[1] or total.dtype.kind != "f" or count.size != 1:
        raise ValueError(
            f"{path}: not a readable statistics file (mom2.mom2 must be a square float matrix with one count, "
            f"got {total.dtype} {list(total.shape)}, count {list(count.shape)})"
        )
    sums = torch.from_numpy(total.astype(np.float32) if total.dtype == np.float16 else total)
    provenance = Provenance(
        module=module,
        dtype=dtype_name(sums.dtype),
        dataset=dataset,
        n_texts=None if size.size != 1 or np.isnan(float(size)) else int(size),
        n_tokens=int(count),
    )
    return SecondMoment(module, int(count), sums, provenance)


def write_npz(path: Path, moment: SecondMoment, sample_size: int | None) -> None:
    """Write a file that the original programs load: same keys, order, types and values.

    Raises:
        OSError: it cannot be written; an older file is kept.
    """
    arrays = {
        "mom2.constructor": _CONSTRUCTOR,
        "mom2.count": moment.count,
        "mom2.mom2": moment.total.detach().cpu().numpy(),
        "sample_size": _NULL if sample_size is None else sample_size,
    }
    # A file object, because numpy appends .npz to the temporary path's name.
    with atomic_path(path, make_folder=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
