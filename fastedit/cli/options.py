"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Device",
    "Dtype",
    "EditFile",
    "Force",
    "Json",
    "Limit",
    "Model",
    "Plot",
    "Requests",
    "Seed",
    "SkipInvalid",
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Folder or hub name of a model, or world:gpt2 / world:llama for the embedded ones.",
        show_default=False,
    ),
]
Requests = Annotated[
    Path,
    typer.Option(
        "--requests",
        "-r",
        help="Edit requests: JSON or JSONL of this project, COUNTERFACT, ZsRE, KnowEdit, EasyEdit or MEMIT.",
        show_default=False,
    ),
]
EditFile = Annotated[
    Path,
    typer.Option("--edit", "-e", help="Edit file (.safetensors) from `fastedit edit`.", show_default=False),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Weights' dtype: auto (as stored), float32, bfloat16 or float16.")
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Read only the first N requests.", show_default=False)
]
SkipInvalid = Annotated[
    bool,
    typer.Option("--skip-invalid", help="Leave out records that are no valid request, and say which."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Write a plot of the probabilities (.png or .svg).", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists at the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
