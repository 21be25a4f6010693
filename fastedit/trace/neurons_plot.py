"""The plot of an attribution: how many neurons each layer has, and what its activation gives the answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastedit.atomic_file import atomic_path

if TYPE_CHECKING:
    from fastedit.trace.neurons_result import Neurons

__all__ = ["plot_neurons"]

_SUFFIXES = (".png", ".svg")
# Okabe and Ito's blue and vermilion, told apart with any common colour blindness.
_BARS, _LINE = "#0072B2", "#D55E00"


def plot_neurons(found: Neurons, path: str | os.PathLike[str]) -> Path:
    """Draw chosen neurons per layer (bars) and the layer's summed scores (line: mean and range over prompts).

    Raises:
        ValueError: a suffix other than .png and .svg.
        RuntimeError: without matplotlib.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(_SUFFIXES)}, got {str(target)!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'fastedit-kernels[plot]'") from error

    svg = target.suffix.lower() == ".svg"
    # Figure and canvas are made by hand: pyplot would set the process's backend and keep the figure alive.
    figure = Figure(figsize=(max(5.0, 0.28 * len(found.layers) + 2.0), 5.0), layout="constrained")
    (FigureCanvasSVG if svg else FigureCanvasAgg)(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    layers, counts = list(found.layers), found.per_layer()
    above.bar(layers, [counts[layer] for layer in layers], color=_BARS, width=0.8)
    above.set_ylabel("knowledge neurons")
    above.yaxis.set_major_locator(MaxNLocator(integer=True))
    sums = found.scores.sum(dim=2).double()
    mean, low, high = sums.mean(dim=0), sums.amin(dim=0), sums.amax(dim=0)
    if len(found.prompts) > 1:
        below.fill_between(layers, low.tolist(), high.tolist(), color=_LINE, alpha=0.2, linewidth=0)
    below.plot(layers, mean.tolist(), color=_LINE, marker="o", linewidth=2)
    below.axhline(0, color="#888888", linewidth=0.8)
    below.set_ylabel("sum of scores")
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (above, below):
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    prompt = (
        found.prompts[0] if len(found.prompts) == 1 else f"{found.prompts[0]} (+{len(found.prompts) - 1})"
    )
    # A dollar sign would start mathematics.
    figure.suptitle(f"{prompt} → {found.answer.strip()}".replace("$", r"\$"), fontsize=10, wrap=True)
    # Text stays text in an SVG (it can be searched and is read aloud), and equal plots are equal files.
    with atomic_path(target) as part, rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastedit"}):
        figure.savefig(
            part, format="svg" if svg else "png", dpi=150, metadata={"Date": None} if svg else None
        )
    return target
