"""Progress of a collection: a record for callbacks, and a bar for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["CollectProgress", "ProgressCallback", "reporter"]


@dataclass(frozen=True)
class CollectProgress:
    """State of a collection, as passed to a progress callback after every batch.

    Attributes:
        tokens, texts: done so far, including what a resumed run found done.
        total_tokens, total_texts: how many there will be at most; None if unknown.
        seconds: spent in this run.
        tokens_per_second: of this run.
        eta_seconds: estimated time to the end; None if unknown.
    """

    tokens: int
    texts: int
    total_tokens: int | None
    total_texts: int | None
    seconds: float
    tokens_per_second: float
    eta_seconds: float | None


ProgressCallback = Callable[[CollectProgress], None]


@contextmanager
def reporter(progress: bool | ProgressCallback) -> Iterator[ProgressCallback]:
    """What to call after every batch: a bar on stderr for True, nothing for False, or the callback itself."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda _: None
    else:
        with _bar() as report:
            yield report


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("statistics"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, detail="")

        def report(state: CollectProgress) -> None:
            total, done = state.total_tokens, state.tokens
            if total is None:
                total, done = state.total_texts, state.texts
            eta = "" if state.eta_seconds is None else f", {_clock(state.eta_seconds)} left"
            detail = f"{state.tokens} tokens, {state.tokens_per_second:.0f}/s{eta}"
            bar.update(task, completed=done, total=total, detail=detail)

        yield report


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
