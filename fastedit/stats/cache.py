"""Statistics on disk: the originals' npz files, each with its provenance beside it, and cached Cholesky factors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, find_module, resolve
from fastedit.atomic_file import atomic_path
from fastedit.stats.checkpoint import read_tensors, write_tensors
from fastedit.stats.legacy import FileName, file_name, model_folders, read_npz, write_npz
from fastedit.stats.moment import SecondMoment
from fastedit.stats.provenance import Provenance, model_fingerprint, tokenizer_fingerprint
from fastedit.stats.triangle import pack_lower, packed_size, unpack_lower

__all__ = ["StatisticsStore", "StoredFile"]

_log = logging.getLogger(__name__)
# What must agree for a stored result to be the result of a collection.
_SAME_JOB = ("module", "dtype", "weights_fingerprint", "tokenizer", "dataset", "max_length", "token_budget")


@dataclass(frozen=True)
class StoredFile:
    """One statistics file of a store.

    Attributes:
        path: of the npz.
        folder: the model's folder, relative to the store.
        dataset: from the folder name.
        name: what the file name says.
        provenance: from the file beside it; None for files of other programs.
        digest: of the matrix, from the file beside it.
    """

    path: Path
    folder: str
    dataset: str
    name: FileName
    provenance: Provenance | None
    digest: str | None

    def read(self) -> SecondMoment:
        """The statistics.

        Raises:
            ValueError: damaged, or not the matrix that its provenance describes.
        """
        moment = read_npz(self.path, self.name.module, dataset=self.dataset)
        if self.provenance is None:
            return moment
        moment = SecondMoment(moment.module, moment.count, moment.total, self.provenance)
        if moment.digest != self.digest:
            raise ValueError(
                f"{self.path}: not the matrix that {_beside(self.path).name} describes; delete both and collect again"
            )
        return moment


class StatisticsStore:
    """A directory of second moments, in the layout of ROME, MEMIT, AlphaEdit, EMMET and EasyEdit.

    Their caches are read as they are, and what is written here they read. Files written here have a JSON file with
    their provenance beside them; where it is there, it is compared with what is asked for.

    Args:
        directory: need not exist until something is stored.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"statistics: {self.directory} must be a directory")

    def files(self, module: str | None = None) -> list[StoredFile]:
        """Every statistics file, or those of one module, sorted by path."""
        return sorted(self._scan(module), key=lambda file: file.path)

    def _scan(self, module: str | None) -> Iterator[StoredFile]:
        for pattern in ("*_stats", "*/*_stats", "*/*/*_stats"):
            for folder in self.directory.glob(pattern):
                for path in folder.glob("*.npz"):
                    name = FileName.parse(path.name)
                    if name is not None and module in (None, name.module):
                        relative = folder.parent.relative_to(self.directory).as_posix()
                        model = self.directory.resolve().name if relative == "." else relative
                        yield StoredFile(
                            path, model, folder.name.removesuffix("_stats"), name, *_read_beside(path)
                        )

    def get(
        self,
        module: str,
        *,
        model: nn.Module | None = None,
        arch: ResolvedArch | None = None,
        tokenizer: Any = None,
        dataset: str | None = None,
        dtype: str | None = None,
        n_texts: int | None = None,
    ) -> SecondMoment | None:
        """The statistics of a module, or None if there are none.

        Files of this package are found by the model's fingerprint; files of other programs by the model's name, in
        each of their four spellings. Of several, float64 is preferred, then the most texts.

        Args:
            module: dotted module name.
            model, arch: the model they are for (either one); None takes any model's.
            tokenizer: compared if given.
            dataset, dtype, n_texts: which file, if there are several.

        Raises:
            ValueError: there are some, but of another model, model dtype, tokenizer or width; several data sets (or,
                without a model, several models) to choose from; a damaged file.
        """
        if arch is None and model is not None:
            arch = resolve(model)
        files = [
            file
            for file in self.files(module)
            if dataset in (None, file.dataset)
            and dtype in (None, file.name.dtype)
            and n_texts in (None, file.name.n_texts)
        ]
        conflict = None
        if arch is not None:
            files, conflict = _of_model(files, arch, tokenizer)
        if not files:
            if conflict is not None:
                raise ValueError(
                    f"statistics of {module!r}: {conflict}; collect them for this one, or pass the SecondMoment itself"
                )
            return None
        for what, values in (("dataset", {f.dataset for f in files}), ("model", {f.folder for f in files})):
            if len(values) > 1 and (what == "dataset" or arch is None):
                raise ValueError(
                    f"statistics of {module!r}: several {what}s ({', '.join(sorted(values))}); keep them in folders of "
                    f"their own, or pass {what}= to StatisticsStore.get"
                )
        best = max(
            files,
            key=lambda f: (f.provenance is not None, f.name.dtype, f.name.n_texts or 0, not f.name.limited),
        )
        moment = best.read()
        if arch is not None:
            _check_width(moment, arch.model, best.path)
        return moment

    def stored(self, provenance: Provenance) -> SecondMoment | None:
        """The result of the collection that `provenance` describes (corpus and counts aside), or None."""
        for file in self.files(provenance.module):
            have = file.provenance
            if have is not None and all(
                getattr(have, name) == getattr(provenance, name) for name in _SAME_JOB
            ):
                return file.read()
        return None

    def refuse_other_model(self, provenance: Provenance) -> None:
        """Raise ValueError if storing under this provenance would mix two models in one folder."""
        folder = self._folder(provenance)
        for file in self._scan(provenance.module):
            if (
                file.path.parent == folder
                and file.name.dtype == provenance.dtype
                and file.provenance is not None
            ):
                conflict = file.provenance.conflict(
                    model_dtype=provenance.model_dtype, model_fingerprint=provenance.model_fingerprint
                )
                if conflict:
                    raise ValueError(
                        f"directory: {file.path} holds statistics of another model of this name ({conflict}); "
                        f"use another directory or delete it"
                    )

    def put(self, moment: SecondMoment, *, model_name: str | None = None, dataset: str | None = None) -> Path:
        """Store statistics, replacing those of the same model, data set, precision and number of texts.

        Args:
            moment: what to store.
            model_name, dataset: for the path; None takes the provenance's.

        Returns:
            Path of the npz.

        Raises:
            ValueError: another model's statistics are stored under this name.
            OSError: disk full, no permission: older files are kept.
        """
        have = moment.provenance or Provenance(
            module=moment.module, dtype=str(moment.total.dtype).removeprefix("torch.")
        )
        values = {
            **have.to_dict(),
            "model_name": model_name or have.model_name,
            "dataset": dataset or have.dataset,
        }
        provenance = Provenance.from_dict(values)
        self.refuse_other_model(provenance)
        path = self._folder(provenance) / file_name(moment.module, provenance.dtype, provenance.n_texts)
        write_npz(path, moment, provenance.n_texts)
        document = {"digest": moment.digest, "count": moment.count, "provenance": provenance.to_dict()}
        with atomic_path(_beside(path)) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return path

    def cholesky(self, moment: SecondMoment, *, jitter: float = 0.0) -> Tensor:
        """Lower Cholesky factor of `moment`, [f, f] float64, from the cache or computed and cached.

        The cache is filed by a hash of the matrix, so a factor of replaced statistics is never used.

        Raises:
            ValueError: as `SecondMoment.cholesky`.
        """
        provenance = moment.provenance or Provenance(module=moment.module, dtype="float64")
        key = f"{moment.digest}-{jitter}"
        stem = f"{moment.module}_cholesky"
        path = (
            self._folder(provenance) / f"{stem}_{key[:16]}{f'_jitter{jitter}' if jitter else ''}.safetensors"
        )
        size = packed_size(moment.features)
        if path.exists():
            try:
                tensors, meta = read_tensors(path)
                if meta.get("key") == key and tensors["packed"].shape == (size,):
                    return unpack_lower(tensors["packed"])
            except (ValueError, KeyError) as error:
                _log.warning("computing the Cholesky factor again: %s", error)
        lower = moment.cholesky(jitter)
        packed = {"packed": (torch.float64, (size,), pack_lower(lower))}
        try:
            write_tensors(path, packed, key=key, module=moment.module)
            for old in path.parent.glob(f"{stem}_*.safetensors"):
                if old != path and "_jitter" not in old.name:
                    old.unlink()
        except OSError as error:
            _log.warning("the Cholesky factor of %s is not cached: %s", moment.module, error)
        return lower

    def partial_path(self, key: str) -> Path:
        """Where the checkpoint of an unfinished collection lies."""
        return self.directory / f"partial_{key}.safetensors"

    def _folder(self, provenance: Provenance) -> Path:
        dataset = (provenance.dataset or "corpus").replace("/", "_")
        return self.directory / model_folders(provenance.model_name)[0] / f"{dataset}_stats"


def _of_model(
    files: list[StoredFile], arch: ResolvedArch, tokenizer: Any
) -> tuple[list[StoredFile], str | None]:
    """Files for this model, and why a file in its folder is not one."""
    if not files:
        return [], None
    folders = model_folders(str(getattr(arch.model.config, "_name_or_path", "") or ""))  # type: ignore[union-attr]
    weight: Tensor = arch.embed.weight  # type: ignore[assignment]
    expected = {
        "model_dtype": str(weight.dtype).removeprefix("torch."),
        "model_fingerprint": model_fingerprint(arch),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    kept, conflict = [], None
    for file in files:
        if file.provenance is None or file.provenance.model_fingerprint is None:
            if file.folder in folders:
                kept.append(file)
            continue
        problem = file.provenance.conflict(**expected)
        if problem is None:
            kept.append(file)
        else:
            conflict = f"{file.path} was collected on another model or tokenizer ({problem})"
    return kept, conflict


def _check_width(moment: SecondMoment, model: nn.Module, path: Path) -> None:
    module = find_module(model, moment.module)
    for attribute in ("in_features", "nx"):
        width = getattr(module, attribute, None)
        if isinstance(width, int) and width != moment.features:
            raise ValueError(
                f"statistics of {moment.module!r}: {path} has {moment.features} features, "
                f"this model's module takes {width}; it belongs to another model"
            )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.provenance.json")


def _read_beside(path: Path) -> tuple[Provenance | None, str | None]:
    file = _beside(path)
    if not file.exists():
        return None, None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return Provenance.from_dict(document["provenance"]), str(document["digest"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{file}: not a readable provenance file ({error}); delete it and {path.name}"
        ) from None
