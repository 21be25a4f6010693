"""``fastedit apply`` and ``fastedit revert``: a whole model with an edit in it, and back, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastedit.cli.options import Dtype, EditFile, Force, Json, Model

__all__ = ["apply", "revert"]

Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder of the new model; must not exist.", show_default=False)
]


def apply(
    model: Model, edit: EditFile, out: Folder, dtype: Dtype = "auto", force: Force = False, json: Json = False
) -> None:
    """Write the model with the edit in it, and beside it what undoes the edit bit for bit."""
    from fastedit.cli.export import write_model

    write_model(model, edit, out, dtype=dtype, force=force, json=json)


def revert(
    model: Annotated[
        Path,
        typer.Option("--model", "-m", help="Folder written by `fastedit apply`.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the restored model; must not exist.", show_default=False),
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Restore the folder itself.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the model as it was before `fastedit apply`, bit for bit."""
    import shutil

    from fastedit.cli.console import emit_json, line
    from fastedit.cli.outputs import check_not_input, check_output, saving
    from fastedit.export import restore_exported
    from fastedit.export.folder import atomic_folder
    from fastedit.export.hf import UNDO

    if (out is None) != in_place:
        raise ValueError("--out must name the folder to write, or --in-place be given, and not both")
    if not model.is_dir():
        raise ValueError(f"--model must be a folder written by `fastedit apply`, got {str(model)!r}")
    if not (model / UNDO).is_file():
        raise ValueError(f"--model must hold an edit to undo ({UNDO}), got {str(model)!r}")
    if out is not None and model.resolve() in out.resolve().parents:
        raise ValueError(f"--out must not lie inside --model, got {str(out)!r}")
    check_output(out, force=force, folder=True)
    check_not_input({"--out": out}, {"--model": model}, folder=True)
    if out is None:
        restored = restore_exported(model)
    else:
        with saving(out), atomic_folder(out, overwrite=force) as fresh:
            shutil.copytree(model, fresh, dirs_exist_ok=True)
            restored = restore_exported(fresh)
    where = str(model if out is None else out)
    if json:
        emit_json({"model": str(model), "out": where, "restored": list(restored)})
    else:
        line(f"{len(restored)} weights restored, saved to {where}")
