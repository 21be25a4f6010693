"""What ``fastedit trace`` shows and writes: progress, files, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastedit.trace import CausalTrace
    from fastedit.trace.average import AverageTrace
    from fastedit.trace.study import StudyProgress

__all__ = ["deliver", "progress_bar"]


@contextmanager
def progress_bar(total: int, done: int) -> Iterator[Any]:
    """A bar on stderr over all facts; gives what `Study.run` calls after every batch."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("facts"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, detail=f"{done} of {total}")

        def report(state: StudyProgress) -> None:
            left = "" if state.eta_seconds is None else f", {state.eta_seconds:.0f} s left"
            bar.update(task, completed=state.done, detail=f"{state.done} of {state.total}{left}")

        yield report


def deliver(
    found: CausalTrace | AverageTrace, out: Path | None, plot: Path | None, json: bool, model: str
) -> None:
    """Files, then the JSON document or a table."""
    from fastedit.cli.console import emit_json, line
    from fastedit.cli.outputs import saving
    from fastedit.trace import CausalTrace

    written: list[Path] = []
    if out is not None:
        with saving(out):
            if isinstance(found, CausalTrace):
                written += found.save(out, force=True)
            else:
                written += [found.save(out / "average.json"), found.save(out / "average.npz")]
    try:
        if plot is not None:
            with saving(plot):
                written.append(found.plot(plot))
    finally:
        # Also where the picture fails: what was found has cost the time.
        if json:
            emit_json({"model": model, **found.to_dict(), "files": [str(path) for path in written]})
        else:
            _show(found)
            for path in written:
                line(f"saved {path}")


def _show(found: CausalTrace | AverageTrace) -> None:
    from rich.table import Table

    from fastedit.cli.console import line, results
    from fastedit.trace import CausalTrace
    from fastedit.trace.roles import ROLES

    if isinstance(found, CausalTrace):
        line(f"answer {found.answer!r}: {found.high_score:.3f} clean, {found.low_score:.3f} corrupted")
        names = [found.input_tokens[token] for token in found.traced]
        grids = {kind: found.effect(kind) for kind in found.kinds}
    else:
        left = f", {found.skipped} left out (not predicted)" if found.skipped else ""
        count = f"{found.facts} fact{'s'[: found.facts != 1]}{left}"
        line(f"{count}: {found.high.mean():.3f} clean, {found.low.mean():.3f} corrupted")
        names = list(ROLES)
        grids = {kind: found.mean(kind) for kind in found.kinds}
    if found.engine != "packed tokens":
        line(f"ran on {found.engine}")
    table = Table()
    table.add_column("token", no_wrap=True)
    for kind in grids:
        table.add_column(f"{kind}: best layer (gain)", justify="right")
    for row, name in enumerate(names):
        cells = []
        for grid in grids.values():
            best = int(grid[row].argmax())
            # No fact has a token of this role, or (NaN is unequal to itself) nothing is known of it.
            cells.append(f"{best} ({grid[row, best]:+.3f})" if grid[row, best] == grid[row, best] else "-")
        table.add_row(name, *cells)
    results().print(table)
