"""The facts of ``fastedit trace``: an embedded model's own, and the run over many of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastedit.cli.inputs import Opened
    from fastedit.trace import TraceOptions
    from fastedit.trace.average import AverageTrace
    from fastedit.trace.facts import TraceFact

__all__ = ["folder", "study", "world_facts"]

_WORLD_FACTS = 40


def world_facts(opened: Opened, limit: int | None) -> list[TraceFact]:
    """An embedded model's own facts. Raises ValueError for another model, or more than it has."""
    from fastedit.trace.facts import TraceFact

    if opened.world is None:
        raise ValueError("--facts must be given for a model that is not embedded")
    try:
        requests = opened.world.requests(limit or _WORLD_FACTS)
    except ValueError as error:
        raise ValueError(f"--limit{str(error).removeprefix('n')}") from error
    return [TraceFact(r.id, r.prompt, r.subject, r.target_true) for r in requests]


@contextmanager
def folder(out: Path | None) -> Iterator[Path]:
    """--out, or else a folder that is gone afterwards."""
    if out is not None:
        yield out
        return
    with TemporaryDirectory() as made:
        yield Path(made)


def study(
    opened: Opened,
    facts: Sequence[TraceFact],
    home: Path,
    options: TraceOptions,
    batch: int,
    all_facts: bool,
    texts: Sequence[str] | None,
    *,
    resumable: bool,
) -> AverageTrace:
    """Trace the facts that ``home`` does not hold yet, and average all of them."""
    from fastedit.cli.console import log
    from fastedit.cli.errors import Interrupted
    from fastedit.cli.outputs import saving
    from fastedit.cli.trace_report import progress_bar
    from fastedit.trace.average import average
    from fastedit.trace.study import Study

    with saving(home):
        try:
            made = Study(opened.editor.session, facts, home, options, texts=texts)
        except ValueError as error:
            if not str(error).startswith("directory "):
                raise
            raise ValueError(f"--out{str(error).removeprefix('directory')}") from error
    there = f", {len(made.found)} of them done before" if made.found else ""
    log(
        f"tracing {len(facts)} fact{'s'[: len(facts) != 1]}{there}"
        + ("; Ctrl-C keeps what is done" if resumable else "")
    )
    try:
        with saving(home), progress_bar(len(facts), len(made.found)) as progress:
            traces = made.run(batch, progress)
    except KeyboardInterrupt:
        if not resumable or not made.found:
            raise
        raise Interrupted(f"run the same command to go on; what is done is in {home}") from None
    if not all_facts and not any(trace.correct_prediction for trace in traces):
        raise ValueError(
            f"--all-facts must be given where the model predicts no answer, got 0 of {len(traces)} predicted"
        )
    return average(traces, all_facts=all_facts)
