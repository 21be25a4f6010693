"""The whole edited model as a Hugging Face folder, and the way back to the original bits.

The folder holds what `from_pretrained` reads, and in a subfolder (loaders that take every *.safetensors beside the
weights must not find it) ``fastedit/edit.safetensors`` and ``fastedit/undo.safetensors``: the edit, and the original
tensors of the edited weights under their names in the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastedit.arch import editable_weight, unwrap
from fastedit.atomic_file import atomic_path
from fastedit.delta import fingerprint
from fastedit.edit import Edit
from fastedit.edit_file import read_file, write_file
from fastedit.export.folder import atomic_folder

__all__ = ["UNDO", "export_model", "restore_exported"]

UNDO = "fastedit/undo.safetensors"
"""Where the original weights lie in an exported folder."""

_KIND = "fastedit-undo"
_VERSION = 1


def export_model(
    model: nn.Module,
    tokenizer: Any | None,
    directory: str | Path,
    *,
    edit: Edit | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write the model, and its tokenizer if given, as a folder for `from_pretrained`.

    Args:
        model: a Hugging Face model.
        tokenizer: its tokenizer, or None.
        directory: the folder to make; it appears complete or not at all.
        edit: an edit to export with its undo: applied for the export if it is not applied to `model` now.
        overwrite: replace a folder that is not empty.
        max_shard_size: as `save_pretrained` takes it.

    Returns:
        The folder.

    Raises:
        ValueError: an adapter around the model, or an edit that does not fit it.
        FileExistsError: the folder is not empty.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model: has a PEFT adapter; export model.merge_and_unload(), or the adapter itself")
    model = unwrap(model)
    save = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise ValueError(
            f"model: must be a Hugging Face model with save_pretrained, got {type(model).__name__}"
        )
    state = nullcontext() if edit is None or edit.is_applied(model) else edit.applied(model)
    with atomic_folder(directory, overwrite=overwrite) as folder, state:
        save(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if edit is not None:
            (folder / UNDO).parent.mkdir()
            edit.save(folder / UNDO.replace("undo", "edit"))
            _write_undo(model, edit, folder)
    return Path(directory)


def restore_exported(directory: str | Path) -> tuple[str, ...]:
    """Put the original weights back into an exported folder, bit for bit, and remove its undo.

    Each weight file is replaced atomically, so a call that was interrupted can simply be repeated.

    Returns:
        The names of the restored tensors.

    Raises:
        FileNotFoundError: the folder has no undo.
        ValueError: the undo is damaged, or something else changed the weights since the export.
    """
    directory = Path(directory)
    originals, header = read_file(directory / UNDO, kind=_KIND, version=_VERSION)
    try:
        places = {name: (str(header["files"][name]), str(header["after"][name])) for name in originals}
    except (KeyError, TypeError) as error:
        raise ValueError(f"directory: {str(directory / UNDO)!r} lacks or misuses a field ({error})") from None
    for file, _ in places.values():
        if Path(file).name != file:
            raise ValueError(
                f"directory: {str(directory / UNDO)!r} names {file!r}, which is not a file beside it"
            )
    for name, (file, after) in places.items():
        found = fingerprint(_read_tensor(directory / file, name))
        if found not in (after, fingerprint(originals[name])):
            raise ValueError(
                f"tensor {name!r}: something changed {file!r} since the export, it was {after} and is {found}"
            )
    for file in sorted({file for file, _ in places.values()}):
        here = {name: originals[name] for name, (where, _) in places.items() if where == file}
        _patch(directory / file, here)
    shutil.rmtree((directory / UNDO).parent)
    return tuple(places)


def _write_undo(model: nn.Module, edit: Edit, folder: Path) -> None:
    stored = _stored_names(folder)
    originals: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    after: dict[str, str] = {}
    for name, original in edit.originals(model).items():
        weight, _ = editable_weight(model, name)
        # Tied weights are stored once, under one of their names.
        aliases = [
            alias for alias, value in model.named_parameters(remove_duplicate=False) if value is weight
        ]
        key = next((alias for alias in aliases if alias in stored), None)
        if key is None or not torch.equal(_read_tensor(folder / stored[key], key), weight.detach().cpu()):
            raise NotImplementedError(
                f"module {name!r}: this model's save_pretrained stores the weight in another form, so the export "
                f"cannot carry an undo; export without edit=..."
            )
        originals[key], files[key], after[key] = original, stored[key], fingerprint(weight)
    header = {"files": files, "after": after, "method": edit.method}
    write_file(folder / UNDO, originals, header, kind=_KIND, version=_VERSION)


def _stored_names(folder: Path) -> dict[str, str]:
    """File name by tensor name, of every weight file in the folder."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.update(dict.fromkeys(file.keys(), path.name))
    return names


def _read_tensor(path: Path, name: str) -> Tensor:
    if not path.is_file():
        raise ValueError(f"directory: has no weight file {path.name!r}")
    with safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118
            raise ValueError(f"tensor {name!r}: not in {path.name!r}")
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _patch(path: Path, tensors: dict[str, Tensor]) -> None:
    """Overwrite the bytes of some tensors in a copy of a safetensors file, and put the copy in its place."""
    with atomic_path(path) as part:
        shutil.copy(path, part)
        with part.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
            for name, tensor in tensors.items():
                start, end = entries[name]["data_offsets"]
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                if len(data) != end - start:
                    raise ValueError(
                        f"tensor {name!r}: {end - start} bytes in {path.name!r}, {len(data)} in the undo"
                    )
                file.seek(8 + length + start)
                file.write(data)
