"""Pictures of an average trace: lines over layers with confidence bands, and bars for severed runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastedit.trace.plot import COLOURS, figure_svg, layer_ticks, new_figure, picture_path, save_figure
from fastedit.trace.result import TITLES
from fastedit.trace.roles import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastedit.trace.average import AverageTrace

__all__ = ["average_svg", "plot_average"]

# Okabe and Ito's colours, and a line style and marker each: told apart in grey, too.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#56B4E9", "linestyle": ":", "marker": "v"},
    {"color": "#999999", "linestyle": "-.", "marker": "x"},
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#E69F00", "linestyle": "--", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "+"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
)
_HATCHES = ("", "//", "..", "xx")


def plot_average(found: AverageTrace, path: str | os.PathLike[str]) -> Path:
    """Draw a panel a kind, and one of bars where severed kinds were traced; returns the path (.png or .svg).

    Raises ValueError for another suffix, RuntimeError without matplotlib.
    """
    target = picture_path(path)
    return save_figure(_figure(found), target)


def average_svg(found: AverageTrace) -> str:
    """The picture as an SVG element, to be put into a page. Raises RuntimeError without matplotlib."""
    return figure_svg(_figure(found))


def _figure(found: AverageTrace) -> Figure:
    severed = [kind for kind in found.kinds if kind.startswith("severed")]
    lines = [kind for kind in found.kinds if kind not in severed]
    panels = len(lines) + bool(severed)
    with new_figure(4.2 * panels + 0.4, 4.4 if panels > 1 else 5.0) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for axis, kind in zip(axes, lines, strict=False):
            _draw_lines(axis, found, kind)
        # One scale, so that panels can be compared.
        top = max((axis.get_ylim()[1] for axis in axes[: len(lines)]), default=1.0)
        bottom = min((axis.get_ylim()[0] for axis in axes[: len(lines)]), default=0.0)
        for axis in axes[: len(lines)]:
            axis.set_ylim(bottom, top)
        if severed:
            _draw_bars(axes[-1], found, [kind for kind in ("hidden", *severed) if kind in found.effects])
        axes[0].set_ylabel("average gain in the answer's probability")
        handles = {
            label: handle
            for axis in axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(3, len(handles)),
            frameon=False,
            fontsize=9,
        )
        all_of_them = found.facts + found.skipped
        count = f"{all_of_them} fact{'s'[: all_of_them != 1]}"
        predicted = f"{found.facts} of {count}, those predicted:" if found.skipped else f"{count},"
        figure.suptitle(
            f"{predicted} clean {found.high.mean():.3f}, corrupted {found.low.mean():.3f}; "
            "bands: 95 % of the mean",
            fontsize=10,
        )
        return figure


def _draw_lines(axis: Axes, found: AverageTrace, kind: str) -> None:
    mean, band = found.mean(kind), np.nan_to_num(found.band(kind))
    layers = np.arange(mean.shape[1])
    for role, name in enumerate(ROLES):
        if not np.isfinite(mean[role]).all():
            continue
        style = _LINES[role]
        axis.plot(layers, mean[role], label=name, linewidth=1.8, markersize=4, **style)
        axis.fill_between(
            layers,
            mean[role] - band[role],
            mean[role] + band[role],
            color=style["color"],
            alpha=0.18,
            linewidth=0,
        )
    window = "" if kind == "hidden" else f", window {found.window}"
    axis.set_title(f"restoring the {TITLES[kind]}{window}", fontsize=10)
    axis.set_xlabel("layer")
    layer_ticks(axis)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_bars(axis: Axes, found: AverageTrace, kinds: list[str]) -> None:
    # A decoder's tokens hold no subject: what its last one gains is what is read.
    subject = ROLES.index("last subject token")
    role = subject if found.count(kinds[-1])[subject] else ROLES.index("last token")
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        mean, band = found.mean(kind)[role], np.nan_to_num(found.band(kind)[role])
        at = np.arange(len(mean)) + (place - (len(kinds) - 1) / 2) * width
        axis.bar(
            at,
            mean,
            width,
            yerr=band,
            label=TITLES[kind],
            color=COLOURS[kind],
            hatch=_HATCHES[place],
            error_kw={"linewidth": 0.7},
        )
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set_title(f"{ROLES[role]}, paths severed", fontsize=10)
    axis.set_xlabel("layer")
    layer_ticks(axis)
