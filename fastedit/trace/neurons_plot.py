"""The plot of an attribution: how many neurons each layer has, and what its activation gives the answer."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.atomic_file import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastedit.trace.neurons_result import Neurons

__all__ = ["neurons_svg", "plot_neurons"]

_SUFFIXES = (".png", ".svg")
# Okabe and Ito's blue and vermilion, told apart with any common colour blindness.
_BARS, _LINE = "#0072B2", "#D55E00"
# Text stays text in an SVG (it can be searched and is read aloud), and equal plots are equal files.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fastedit"}


def plot_neurons(found: Neurons, path: str | os.PathLike[str]) -> Path:
    """Draw chosen neurons per layer (bars) and the layer's summed scores (line: mean and range over prompts).

    Raises:
        ValueError: a suffix other than .png and .svg.
        RuntimeError: without matplotlib.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(_SUFFIXES)}, got {str(target)!r}")
    figure = _figure(found)
    with atomic_path(target) as part:
        part.write_bytes(_drawn(figure, target.suffix.lower().removeprefix(".")))
    return target


def neurons_svg(found: Neurons) -> str:
    """The picture as an SVG element, to be put into a page. Raises RuntimeError without matplotlib."""
    text = _drawn(_figure(found), "svg").decode()
    return text[text.index("<svg") :]


def _drawn(figure: Figure, kind: str) -> bytes:
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _figure(found: Neurons) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'fastedit-kernels[plot]'") from error

    # Figure and canvas are made by hand: pyplot would set the process's backend and keep the figure alive.
    width = max(6.0, 0.28 * len(found.layers) + 2.0)
    figure = Figure(figsize=(width, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
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
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    return figure
