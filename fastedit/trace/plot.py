"""Pictures of a causal trace: a heat map a kind, and bars for severed runs."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.atomic_file import atomic_path
from fastedit.trace.result import TITLES, CausalTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "figure_svg",
    "layer_ticks",
    "new_figure",
    "picture_path",
    "plot_trace",
    "save_figure",
    "trace_svg",
]

# Okabe and Ito's colours: told apart with any common colour blindness, and by marker and line style too.
COLOURS = {
    "hidden": "#0072B2",
    "mlp": "#009E73",
    "attn": "#D55E00",
    "severed_mlp": "#56B4E9",
    "severed_attn": "#E69F00",
    "cross": "#CC79A7",
    "severed_cross": "#999999",
}
# Text stays text in an SVG (it can be searched and is read aloud), and equal plots are equal files.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fastedit"}
_SUFFIXES = (".png", ".svg")


def plot_trace(
    trace: CausalTrace, path: str | os.PathLike[str], *, kinds: Sequence[str] | None = None
) -> Path:
    """Draw the probability of the answer over tokens and layers, one panel a kind; returns the path.

    kinds: which; None: all. The suffix chooses the format, .png or .svg. Tokens of the subject are marked with "*".
    A trace of one token is drawn as bars over the layers, its kinds side by side. Raises ValueError for another
    suffix or a kind that was not traced, RuntimeError without matplotlib.
    """
    target = picture_path(path)
    return save_figure(_figure(trace, kinds), target)


def trace_svg(trace: CausalTrace) -> str:
    """The picture as an SVG element, to be put into a page. Raises RuntimeError without matplotlib."""
    return figure_svg(_figure(trace, None))


def picture_path(path: str | os.PathLike[str]) -> Path:
    """The path of a picture. Raises ValueError for a suffix other than .png and .svg."""
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(_SUFFIXES)}, got {str(target)!r}")
    return target


def figure_svg(figure: Figure) -> str:
    """A figure as an SVG element, to be put into a page."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def save_figure(figure: Figure, target: Path) -> Path:
    """Write a figure in one piece, in the format of the path's suffix."""
    from matplotlib import rc_context

    svg = target.suffix.lower() == ".svg"
    with atomic_path(target) as part, rc_context(_STYLE):
        figure.savefig(
            part, format="svg" if svg else "png", dpi=150, metadata={"Date": None} if svg else None
        )
    return target


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure with a canvas of its own: pyplot would set the process's backend and keep it alive."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'fastedit-kernels[plot]'") from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def layer_ticks(axis: Axes) -> None:
    """Ticks at whole layers, however few there are."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _figure(trace: CausalTrace, kinds: Sequence[str] | None) -> Figure:
    if isinstance(kinds, str):
        raise ValueError(f"kinds must be a list or tuple of {', '.join(trace.kinds)}, got {kinds!r}")
    chosen = tuple(trace.kinds if kinds is None else kinds)
    if not chosen:
        raise ValueError(f"kinds must be one or more of {', '.join(trace.kinds)}, got none")
    for kind in chosen:
        if kind not in trace.kinds:
            raise ValueError(f"kind must be one of {', '.join(trace.kinds)}, got {kind!r}")
    grids = {kind: trace.scores[kind] for kind in chosen}
    rows = len(trace.traced)
    if rows == 1:
        with new_figure(max(5.0, 0.28 * next(iter(grids.values())).shape[1] * len(grids)), 3.4) as figure:
            _bars(figure.subplots(), trace, grids)
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
            return figure
    with new_figure(4.4 * len(grids) + 0.8, max(2.6, 0.24 * rows + 1.3)) as figure:
        axes = figure.subplots(1, len(grids), squeeze=False)[0]
        # One scale for all panels; a cell may also fall below the corrupted runs.
        low = min(trace.low_score, *(float(grid.min()) for grid in grids.values()))
        top = max(trace.high_score, *(float(grid.max()) for grid in grids.values()))
        for place, (axis, (kind, grid)) in enumerate(zip(axes, grids.items(), strict=True)):
            # cividis: even steps of lightness, seen alike with red-green and blue-yellow blindness.
            image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=low, vmax=top)
            window = "" if kind == "hidden" or kind.startswith("severed") else f", window {trace.window}"
            axis.set_title(f"restoring the {TITLES[kind]}{window}", fontsize=10)
            axis.set_xlabel("layer")
            layer_ticks(axis)
            if place:
                axis.set_yticks([])
            else:
                _label_tokens(axis, trace)
        bar = figure.colorbar(image, ax=list(axes))
        bar.set_label(f"p({_visible(trace.answer)})")
        figure.suptitle(f"clean {trace.high_score:.3f}, corrupted {trace.low_score:.3f}", fontsize=10)
        return figure


def _label_tokens(axis: Axes, trace: CausalTrace) -> None:
    first, end = trace.subject_range
    labels = [
        _visible(trace.input_tokens[token]) + ("*" if first <= token < end else "") for token in trace.traced
    ]
    axis.set_yticks(range(len(labels)), labels, fontsize=9)


def _visible(token: str) -> str:
    """Token text that a label can show: no line breaks, no mathematics between dollar signs."""
    return (token.strip() or repr(token)).replace("\n", "\\n").replace("$", "\\$")


def _bars(axis: Axes, trace: CausalTrace, grids: dict[str, Any]) -> None:
    width = 0.8 / len(grids)
    hatches = ("", "//", "..", "xx", "\\\\", "--", "++")
    for place, (kind, grid) in enumerate(grids.items()):
        at = [layer + (place - (len(grids) - 1) / 2) * width for layer in range(grid.shape[1])]
        effect = grid[0] - trace.low_score
        axis.bar(
            at, effect, width, label=TITLES[kind], color=COLOURS[kind], hatch=hatches[place % len(hatches)]
        )
    axis.axhline(0, color="#444444", linewidth=0.8)
    layer_ticks(axis)
    axis.set_xlabel(f"layer restored at token {_visible(trace.input_tokens[trace.traced[0]])}")
    axis.set_ylabel(f"gain in p({_visible(trace.answer)})")
    axis.set_title(f"clean {trace.high_score:.3f}, corrupted {trace.low_score:.3f}", fontsize=10)
