"""Pictures of an average trace: lines over layers with confidence bands, and bars for severed runs."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastedit.trace.lanes import KINDS, SEVERED
from fastedit.trace.plot import COLOURS, STYLE, new_figure, save_figure
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
    target = Path(path)
    if target.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg, got {str(target)!r}")
    return save_figure(_figure(found), target)


def average_svg(found: AverageTrace) -> str:
    """The picture as an SVG element, to be put into a page. Raises RuntimeError without matplotlib."""
    figure = _figure(found)
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _figure(found: AverageTrace) -> Figure:
    lines = [kind for kind in KINDS if kind in found.effects]
    severed = [kind for kind in SEVERED if kind in found.effects]
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
        predicted = (
            f" of {found.facts + found.skipped} facts, those predicted:" if found.skipped else " facts,"
        )
        figure.suptitle(
            f"{found.facts}{predicted} clean {found.high.mean():.3f}, corrupted {found.low.mean():.3f}; "
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
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_bars(axis: Axes, found: AverageTrace, kinds: list[str]) -> None:
    role = ROLES.index("last subject token")
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
    axis.set_title("last subject token, paths severed", fontsize=10)
    axis.set_xlabel("layer")
