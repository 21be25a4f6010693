"""The table and the roofline plot that the op benches end with, and the document they are kept in."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import record
from ceilings import Ceilings
from rich.console import Console
from rich.table import Table

__all__ = ["Row", "keep", "kept", "plot", "show"]

Row = dict[str, Any]
_KEY = ("op", "shape", "dtype", "backend")


def show(rows: Sequence[Row], console: Console) -> None:
    """One line a case and backend; a goal that was missed is marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "shape", "dtype", "backend"):
        table.add_column(name, overflow="fold")
    for name in ("time ms", "ratio", "goal", "of roofline", "peak MB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _sorted(rows):
        goal, ratio = row["goal"], row["ratio"]
        table.add_row(
            *(row[name] for name in _KEY),
            f"{1e3 * row['seconds']:.3f}",
            "" if ratio is None else f"{ratio:.2f}x",
            "" if goal is None else f"{goal:g}x{'' if ratio >= goal else ' missed'}",
            "" if row["of_roofline"] is None else f"{100 * row['of_roofline']:.0f} %",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['error']:.0e}",
        )
    console.print(table)


def keep(
    rows: Sequence[Row], tried: Collection[tuple[str, ...]], ceilings: Ceilings, document: str, device: str
) -> Path:
    """Write the rows into `document`.json; rows of other cases stay, each with the machine and commit it ran at.

    tried: (op, shape, dtype, backend) of what this run began: a case that failed leaves no older figure behind.
    """
    path = record.directory() / f"{document}.json"
    known = json.loads(path.read_text()) if path.exists() else {"machines": [], "rows": []}
    about = {**record.machine(device), "ceilings": record.rounded(ceilings.as_json())}
    fresh = {tuple(row[name] for name in _KEY) for row in rows} | set(tried)
    stay = [row for row in known["rows"] if tuple(row[name] for name in _KEY) not in fresh]
    used = sorted({row["machine"] for row in stay})
    machines = [known["machines"][index] for index in used] + [about]
    for row in stay:
        row["machine"] = used.index(row["machine"])
    added = [{**record.rounded(dict(row)), "machine": len(used)} for row in rows]
    found = {"machines": machines, "rows": _sorted([*stay, *added])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def kept(path: Path) -> list[Row]:
    """All rows of a document that `keep` wrote, those of earlier runs included."""
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return rows


def plot(rows: Sequence[Row], ceilings: Ceilings, path: Path, title: str) -> None:
    """Each call at its operations per byte and its rate, under the roofs of this machine; log-log, PNG or SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["backend"] != "reference" and row["flops"] and row["bytes"]]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensity, default=0.1) / 3, max(intensity, default=1e3) * 3
    for style, (unit, rate) in zip(("-", "--", ":", "-."), sorted(ceilings.flops.items()), strict=False):
        knee = rate / ceilings.bandwidth
        across = sorted({low, min(max(knee, low), high), high})
        axes.plot(
            across,
            [min(rate, ceilings.bandwidth * x) / 1e9 for x in across],
            style,
            color="0.35",
            linewidth=1.2,
            label=f"{unit} roof, {rate / 1e9:.0f} GF/s",
        )
    # Okabe and Ito's colours are told apart without red and green; the marker says the backend,
    # and hollow ones are the ops beyond the eight colours.
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
    markers = {"eager": "o", "cpu": "^", "avx512": "v", "amx": "*", "triton": "s", "cuda": "D"}
    ops = sorted({row["op"] for row in rows})
    for number, op in enumerate(ops):
        for backend in markers:
            chosen = [row for row in rows if row["op"] == op and row["backend"] == backend]
            if chosen:
                axes.scatter(
                    [row["flops"] / row["bytes"] for row in chosen],
                    [row["flops"] / row["seconds"] / 1e9 for row in chosen],
                    marker=markers[backend],
                    s=34,
                    edgecolors=colours[number % len(colours)],
                    facecolors=colours[number] if number < len(colours) else "none",
                    alpha=0.85,
                    label=f"{op}, {backend}",
                )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte that has to move", ylabel="GFLOP/s", title=title)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _sorted(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: tuple(str(row[name]) for name in _KEY))
