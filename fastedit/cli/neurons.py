"""``fastedit neurons``: which neurons of the MLPs an answer depends on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli.options import Device, Dtype, Force, Json, Model

if TYPE_CHECKING:
    from fastedit.trace.neurons_result import Neurons

__all__ = ["neurons"]


def neurons(
    model: Model,
    prompt: Annotated[
        list[str],
        typer.Option(
            help="A prompt that the answer follows; given several times, prompts of one fact whose shared neurons "
            "are chosen.",
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
        str, typer.Option(help="What later tokens of an answer follow: argmax, answer or fixed.")
    ] = "argmax",
    threshold: Annotated[
        float, typer.Option(help="A prompt's neurons score above this share of its highest score.")
    ] = 0.2,
    share: Annotated[
        float, typer.Option(help="Chosen neurons are of more than this share of prompts.")
    ] = 0.4,
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
    from fastedit.cli.outputs import check_output, check_plot, saving
    from fastedit.cli.settings import parse_layers
    from fastedit.trace.neurons import NeuronOptions

    check_output(out, force=force)
    if out is not None and out.suffix not in (".json", ".npz"):
        raise ValueError(f"--out must end in .json or .npz, got {str(out)!r}")
    check_plot(plot, force=force, out=out)
    at_least_one("--top", top)
    options = NeuronOptions(
        layers=None if layers is None else tuple(parse_layers(layers)),
        steps=steps,
        grid=grid,  # type: ignore[arg-type]
        activation=activation,  # type: ignore[arg-type]
        continuation=continuation,  # type: ignore[arg-type]
        adaptive_threshold=threshold,
        p=share,
        positions=positions,  # type: ignore[arg-type]
        decoder_prefix=decoder_prefix,
    )
    editor = open_model(model, dtype=dtype, device=device, encoder_decoder=True).editor
    found = editor.neurons(prompt, answer, **options.to_dict())
    if out is not None:
        with saving(out):
            found.save(out)
    if plot is not None:
        with saving(plot):
            found.plot(plot)
    if json:
        emit_json({"model": model, **found.to_dict()})
        return
    _show(found, top)


def _show(found: Neurons, count: int) -> None:
    from rich.table import Table

    from fastedit.cli.console import line, results

    chosen = set(found.neurons)
    table = Table(title=f"{found.prompts[0]} → {found.answer.strip()}")
    for column in ("layer", "neuron", "score", "chosen"):
        table.add_column(column, justify="right" if column != "chosen" else "left")
    for layer, neuron, score in found.top(count):
        table.add_row(str(layer), str(neuron), f"{score:.4g}", "yes" if (layer, neuron) in chosen else "")
    results().print(table)
    line(f"{len(chosen)} knowledge neurons; probability {found.probability[0]:.4f}")
    for layer, number in found.per_layer().items():
        if number:
            line(f"  layer {layer}: {number}")
