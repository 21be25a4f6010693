"""``fastedit neurons``: which neurons of the MLPs an answer depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.options import Device, Dtype, Force, Json, Model

if TYPE_CHECKING:
    from fastedit.trace.neurons_result import Neurons

__all__ = ["neurons"]

# Options of the command that `NeuronOptions` has under another name.
_NAMES = {"--threshold": "adaptive_threshold", "--share": "p", "--decoder-prefix": "decoder_prefix"}


def neurons(
    model: Model,
    prompt: Annotated[
        list[str],
        typer.Option(
            help="A prompt that the answer follows (BERT: with its mask token); given several times, prompts of one "
            "fact whose shared neurons are chosen.",
            show_default=False,
        ),
    ],
    answer: Annotated[
        str | None,
        typer.Option(help="What is attributed. Default: the model's own next token.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers, e.g. 3-5,8. Default: all.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="Points of the path from zero to the activation.")] = 20,
    grid: Annotated[
        str, typer.Option(help="left (from 0), right (up to 1), or ends (both, as EasyEdit has it).")
    ] = "left",
    activation: Annotated[
        str, typer.Option(help="activation, or pre_activation (as EasyEdit has it for GPT-2 and Llama).")
    ] = "activation",
    continuation: Annotated[
        str | None,
        typer.Option(
            help="What later tokens of an --answer follow: argmax (the model's own), answer or fixed. "
            "Default: argmax.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="A prompt's neurons score above this share of its highest score.")
    ] = 0.2,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of several prompts: chosen neurons are of more than this share of them. Default: 0.4.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory above the model that may be taken, e.g. 500MB or 2GB. Default: a part of what is free.",
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        str, typer.Option(help="Of an encoder-decoder: the decoder's token that predicts the answer, or all.")
    ] = "answer",
    decoder_prefix: Annotated[
        str | None,
        typer.Option(
            help="Of an encoder-decoder: what the decoder has before the answer, e.g. '<extra_id_0>'.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Neurons to list, best first.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the neurons (.json), with scores (.npz).", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Write a plot of layers (.png or .svg).", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Find the neurons that an answer depends on, by integrated gradients over all layers."""
    from fastedit.cli.console import emit_json
    from fastedit.cli.inputs import at_least_one, open_model
    from fastedit.cli.outputs import saving

    _check_files(out, plot, force)
    at_least_one("--top", top)
    given = _options(
        prompt,
        answer,
        {
            "--layers": layers,
            "--steps": steps,
            "--grid": grid,
            "--activation": activation,
            "--continuation": continuation,
            "--threshold": threshold,
            "--share": share,
            "--memory": memory,
            "--positions": positions,
            "--decoder-prefix": decoder_prefix,
        },
    )
    editor = open_model(model, dtype=dtype, device=device, encoder_decoder=True).editor
    found = editor.neurons(prompt, answer, **given)
    written: list[Path] = []
    if out is not None:
        with saving(out):
            written.append(found.save(out))
    if plot is not None:
        with saving(plot):
            written.append(found.plot(plot))
    if json:
        emit_json({"model": model, **found.to_dict(top), "files": [str(path) for path in written]})
        return
    _show(found, top, written)


def _check_files(out: Path | None, plot: Path | None, force: bool) -> None:
    """Every file that will be written, before the model is opened."""
    from fastedit.cli.outputs import check_output, check_plot

    check_output(out, force=force)
    if out is not None and out.suffix not in (".json", ".npz"):
        raise ValueError(f"--out must end in .json or .npz, got {str(out)!r}")
    check_plot(plot, force=force, out=out)
    if force and out is None and plot is None:
        raise ValueError("--force needs --out or --plot, got neither")


def _options(prompts: list[str], answer: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `Editor.neurons` from those of the command, each checked under the command's name for it."""
    from fastedit.cli.settings import parse_bytes, parse_layers
    from fastedit.config import from_mapping
    from fastedit.trace.neurons_options import NeuronOptions

    for text in prompts:
        if not text.strip():
            raise ValueError(f"--prompt must not be blank, got {text!r}")
    if answer is not None and not answer.strip():
        raise ValueError(f"--answer must not be blank, got {answer!r}")
    if len(prompts) == 1 and given["--share"] is not None:
        raise ValueError(f"--share needs several --prompt, got {given['--share']} with one")
    if answer is None and given["--continuation"] is not None:
        raise ValueError(f"--continuation needs --answer, got {given['--continuation']!r} without one")
    chosen: dict[str, Any] = {}
    for option, value in given.items():
        name = _NAMES.get(option, option.removeprefix("--"))
        if value is None:
            continue
        if option == "--layers":
            value = tuple(parse_layers(value))
        if option == "--memory":
            value = parse_bytes(value)
        try:
            from_mapping(NeuronOptions, {name: value})
        except ValueError as error:
            raise ValueError(f"{option}{str(error).removeprefix(name)}") from error
        chosen[name] = value
    return chosen


def _show(found: Neurons, count: int, written: Sequence[Path]) -> None:
    from rich.table import Table

    from fastedit.cli.console import line, results

    chosen = set(found.neurons)
    table = Table(title=f"{found.prompts[0]} → {found.answer.strip()}")
    for column in ("layer", "neuron", "score", "chosen"):
        table.add_column(column, justify="right" if column != "chosen" else "left")
    for layer, neuron, score in found.top(count):
        table.add_row(str(layer), str(neuron), f"{score:.4g}", "yes" if (layer, neuron) in chosen else "")
    results().print(table)
    likely = ", ".join(f"{p:.4f}" for p in found.probability)
    line(f"{len(chosen)} knowledge neurons; probability {likely}")
    for layer, number in found.per_layer().items():
        if number:
            line(f"  layer {layer}: {number}")
    for path in written:
        line(f"saved {path}")
