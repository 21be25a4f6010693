"""The plot of probabilities before and after an edit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.atomic_file import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastedit.evaluate.metrics import Evaluation, ProbeScore

__all__ = ["plot_probabilities"]

_SUFFIXES = (".png", ".svg")
# Okabe and Ito's blue and vermilion: told apart with any common colour blindness, and by line style and
# marker too.
_SERIES: Mapping[str, Mapping[str, Any]] = {
    "probability": {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "what the probe asks for"},
    "avoid_probability": {
        "color": "#D55E00",
        "marker": "s",
        "linestyle": "--",
        "label": "the competing answer",
    },
}
_MAX_LINES = 300  # thin lines per panel; more would only darken the band


def plot_probabilities(
    stages: Mapping[str, Evaluation], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw p(target) and p(competing answer) of every probe over the stages, one panel a kind; returns the
    path.

    stages: label -> evaluation of the same requests, e.g. {"before": ..., "after ROME": ...}; at least one.
    path: the suffix chooses the format, .png or .svg. Thin lines are probes, thick lines the
    means of the report. Raises ValueError for another suffix, no stages, or stages of different probes;
    RuntimeError without matplotlib.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(_SUFFIXES)}, got {str(target)!r}")
    if not stages:
        raise ValueError("stages must hold at least one evaluation")
    panels = _panels(stages)
    means = {kind: _means(stages, kind) for kind in panels}
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'fastedit-kernels[plot]'") from error

    svg = target.suffix.lower() == ".svg"
    # Figure and canvas are made by hand: pyplot would set the process's backend and keep the figure alive.
    figure = Figure(figsize=(max(5.0, 2.6 * len(panels) + 0.6), 4.2), layout="constrained")
    (FigureCanvasSVG if svg else FigureCanvasAgg)(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (kind, rows) in zip(axes, panels.items()):
        _draw_panel(axis, kind, rows, means[kind], list(stages))
    axes[0].set_ylabel("probability per token")
    if title:
        figure.suptitle(title)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    # Text stays text in an SVG (it can be searched and is read aloud), and equal plots are equal files.
    with atomic_path(target) as part, rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastedit"}):
        figure.savefig(
            part, format="svg" if svg else "png", dpi=150, metadata={"Date": None} if svg else None
        )
    return target


def _panels(stages: Mapping[str, Evaluation]) -> dict[str, list[tuple[ProbeScore, ...]]]:
    """Kind -> one tuple per probe with its score at every stage."""
    columns = [evaluation.probes for evaluation in stages.values()]
    identity = [
        [(probe.request, probe.kind, probe.prompt, probe.target) for probe in column] for column in columns
    ]
    if any(column != identity[0] for column in identity):
        raise ValueError("stages must hold evaluations of the same requests and kinds, in the same order")
    kinds = next(iter(stages.values())).summary
    panels: dict[str, list[tuple[ProbeScore, ...]]] = {kind: [] for kind in kinds}
    for row in zip(*columns):
        panels[row[0].kind].append(row)
    if not panels:
        raise ValueError("stages must hold at least one scored probe, got none")
    return panels


def _means(stages: Mapping[str, Evaluation], kind: str) -> dict[str, list[float]]:
    """Series -> mean at every stage, the very means of the report (over requests of the mean over probes)."""
    means: dict[str, list[float]] = {}
    for field in _SERIES:
        values = [getattr(evaluation.summary[kind], field) for evaluation in stages.values()]
        if None not in values:
            means[field] = values
    return means


def _draw_panel(
    axis: Axes,
    kind: str,
    rows: list[tuple[ProbeScore, ...]],
    means: Mapping[str, list[float]],
    labels: list[str],
) -> None:
    from matplotlib.collections import LineCollection

    places = list(range(len(labels)))
    for field in means:
        style = _SERIES[field]
        lines = [line for row in rows if None not in (line := [getattr(probe, field) for probe in row])]
        # One collection instead of hundreds of lines: laying out the figure asks every artist for its extent.
        paths = [list(zip(places, line)) for line in lines[:: -(-len(lines) // _MAX_LINES)]]
        thin = {"colors": style["color"], "linestyles": style["linestyle"], "linewidths": 0.6, "alpha": 0.2}
        axis.add_collection(LineCollection(paths, **thin))
        axis.plot(places, means[field], **style, linewidth=2.4, markersize=7, zorder=3)
    for field, values in means.items():
        for place, value in enumerate(values):
            # The higher of the two means carries its number above, the lower below, so that they never
            # collide.
            above = value >= max(other[place] for other in means.values()) and field == "probability"
            above = above or value > means["probability"][place]
            axis.annotate(
                f"{value:.2f}",
                (place, value),
                xytext=(0, 9 if above else -16),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=_SERIES[field]["color"],
                zorder=4,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )
    axis.set_title(f"{kind.replace('_', ' ')} (n = {len(rows)})", fontsize=11)
    axis.set_xticks(places, labels)
    axis.set_xlim(-0.4, len(labels) - 0.6)
    axis.set_ylim(-0.12, 1.12)
    axis.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
