"""The plot of an attribution: how many neurons each layer has, and what its activation gives the answer."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from fastedit.trace.plot import COLOURS, figure_svg, layer_ticks, new_figure, picture_path, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastedit.trace.neurons_result import Neurons

__all__ = ["neurons_svg", "plot_neurons"]

_BARS, _LINE = COLOURS["hidden"], COLOURS["attn"]


def plot_neurons(found: Neurons, path: str | os.PathLike[str]) -> Path:
    """Draw chosen neurons per layer (bars) and the layer's summed scores (line: mean and range over prompts).

    Raises:
        ValueError: a suffix other than .png and .svg.
        RuntimeError: without matplotlib.
    """
    target = picture_path(path)
    return save_figure(_figure(found), target)


def neurons_svg(found: Neurons) -> str:
    """The picture as an SVG element, to be put into a page. Raises RuntimeError without matplotlib."""
    return figure_svg(_figure(found))


def _figure(found: Neurons) -> Figure:
    width = max(6.0, 0.28 * len(found.layers) + 2.0)
    with new_figure(width, 5.2) as figure:
        _draw(figure, found, width)
        return figure


def _draw(figure: Figure, found: Neurons, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    above, below = figure.subplots(2, 1, sharex=True)
    layers, counts = list(found.layers), found.per_layer()
    above.bar(layers, [counts[layer] for layer in layers], color=_BARS, width=0.8)
    above.set_ylabel("knowledge neurons")
    above.set_ylim(0, max(1, *counts.values()) * 1.1)
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    sums = found.scores.sum(dim=2).double()
    mean, low, high = sums.mean(dim=0), sums.amin(dim=0), sums.amax(dim=0)
    if len(found.prompts) > 1:
        below.fill_between(
            layers,
            low.tolist(),
            high.tolist(),
            color=_LINE,
            alpha=0.2,
            linewidth=0,
            label="range over prompts",
        )
    below.plot(layers, mean.tolist(), color=_LINE, marker="o", linewidth=2, label="mean over prompts")
    if len(found.prompts) > 1:
        below.legend(frameon=False, fontsize=9)
    below.axhline(0, color="#888888", linewidth=0.8)
    below.set_ylabel("sum of scores")
    below.set_xlabel("layer")
    layer_ticks(below)
    for axis in (above, below):
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    more = len(found.prompts) - 1
    others = f" (and {more} more prompt{'s'[: more != 1]})" if more else ""
    title = " ".join(f"{found.prompts[0]} → {found.answer.strip()}{others}".split())
    # A dollar sign would start mathematics; a long prompt would run over the edge.
    figure.suptitle(
        "\n".join(textwrap.wrap(title, int(12 * width), max_lines=3)).replace("$", r"\$"), fontsize=10
    )
