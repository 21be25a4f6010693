"""Where output goes: results on stdout (a table or, with --json, JSON and nothing else), everything else on
stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["emit_json", "line", "log", "quiet_libraries", "results"]


def results() -> Console:
    """The console of results. Piped output gets a fixed width instead of rich's 80 columns."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # No markup: prompts and paths may hold square brackets.
    return Console(width=120 if piped else None, highlight=False, markup=False, emoji=False)


def line(text: str = "") -> None:
    """One line of a result on stdout, never wrapped or styled, so that paths can be copied."""
    typer.echo(text)


def log(message: str) -> None:
    """One line of progress for people, on stderr."""
    typer.echo(message, err=True)


def emit_json(payload: Mapping[str, Any]) -> None:
    """The command's one JSON document, on stdout."""
    typer.echo(json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers' loading bars and notes off inside: a command prints its own lines."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
