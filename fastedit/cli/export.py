"""``fastedit export``: an edit as a LoRA adapter, or inside a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastedit.cli.options import Dtype, EditFile, Force, Json, Model

__all__ = ["export", "write_model"]

_TARGETS = ("peft", "hf")


def export(
    model: Model,
    edit: EditFile,
    to: Annotated[str, typer.Option("--to", help="peft (an exact LoRA adapter) or hf (the whole model).")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; must not exist.", show_default=False)
    ],
    dtype: Dtype = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Ship an edit: as an exact LoRA adapter (PEFT, vLLM), or merged into the model's weights."""
    from fastedit.cli.console import emit_json, line
    from fastedit.cli.inputs import open_model, read_edit
    from fastedit.cli.outputs import check_not_input, check_output, saving

    if to not in _TARGETS:
        raise ValueError(f"--to must be one of {', '.join(_TARGETS)}, got {to!r}")
    if to == "hf":
        write_model(model, edit, out, dtype=dtype, force=force, json=json)
        return
    check_output(out, force=force, folder=True)
    check_not_input({"--out": out}, {"--model": model, "--edit": edit}, folder=True)
    loaded = read_edit(edit)
    opened = open_model(model, dtype=dtype, device="cpu", encoder_decoder=True)
    from fastedit.export import to_peft

    with opened.editor.applied(loaded):
        pass  # refuses an edit of another base model; the adapter itself is made from the edit alone
    with saving(out):
        to_peft(loaded, opened.editor.model, out, overwrite=force)
    if json:
        emit_json({"model": model, "edit": str(edit), "to": to, "out": str(out)})
    else:
        line(f"LoRA adapter saved to {out}")


def write_model(model: str, edit: Path, out: Path, *, dtype: str, force: bool, json: bool) -> None:
    """Apply an edit and write the model, its tokenizer and what undoes the edit to the folder ``out``."""
    from fastedit.cli.console import emit_json, line, quiet_libraries
    from fastedit.cli.inputs import open_model, read_edit
    from fastedit.cli.outputs import check_not_input, check_output, saving
    from fastedit.export import export_model

    check_output(out, force=force, folder=True)
    check_not_input({"--out": out}, {"--model": model, "--edit": edit}, folder=True)
    loaded = read_edit(edit)
    opened = open_model(model, dtype=dtype, device="cpu", encoder_decoder=True)
    editor = opened.editor
    with quiet_libraries(), editor.applied(loaded), saving(out):
        export_model(editor.model, editor.tokenizer, out, edit=loaded, overwrite=force)
    names = list(loaded.modules)
    if json:
        emit_json({"model": model, "edit": str(edit), "out": str(out), "edited": names})
    else:
        line(f"model with {len(names)} edited weights saved to {out}; `fastedit revert` undoes it")
