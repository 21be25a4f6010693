"""Evaluations for people and for machines: rich tables and JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastedit.atomic_file import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

    from fastedit.evaluate.metrics import Evaluation, KindSummary

__all__ = ["comparison_table", "request_table", "write_json"]

# Heading, field of KindSummary, shown as a percentage.
_COLUMNS = (
    ("accuracy", "accuracy", True),
    ("p(target)", "probability", False),
    ("p(whole)", "whole_probability", False),
    ("p(other)", "avoid_probability", False),
    ("success", "success", True),
    ("magnitude", "magnitude", False),
)


def comparison_table(stages: Mapping[str, Evaluation], *, title: str | None = None) -> Table:
    """One row per kind and stage. stages: label -> evaluation, e.g. {"before": ..., "after": ...}; "" hides
    the column.

    Kinds that were not measured have no row; measures that need a competing continuation show a dash without
    one.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    if not stages:
        raise ValueError("stages must hold at least one evaluation")
    labelled = any(stages)
    # Without lines between columns the headings fit into 80 of them.
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, show_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("n", justify="right")
    if labelled:
        table.add_column("", no_wrap=True)
    for heading, _, _ in _COLUMNS:
        # Folded where a terminal is too narrow: an ellipsis would cut numbers.
        table.add_column(heading, justify="right", overflow="fold")
    kinds = dict.fromkeys(kind for evaluation in stages.values() for kind in evaluation.summary)
    for kind in kinds:
        first = True
        for label, evaluation in stages.items():
            summary = evaluation.summary.get(kind)
            if summary is None:
                continue
            head = [kind, _count(summary)] if first else ["", ""]
            table.add_row(*head, *([label] if labelled else []), *_cells(summary))
            first = False
        table.add_section()
    scores = {label: evaluation.score for label, evaluation in stages.items()}
    if any(score is not None for score in scores.values()):
        texts = [f"{label} {100 * score:.1f}".strip() for label, score in scores.items() if score is not None]
        table.caption = (
            "score S (harmonic mean of rewrite, paraphrase and neighbourhood success): " + ", ".join(texts)
        )
        table.caption_justify = "left"
    return table


def request_table(stages: Mapping[str, Evaluation], *, limit: int = 20) -> Table:
    """Accuracy and probability of the rewrite prompt of each request (the first ``limit``), one row a
    request.
    """
    from rich.table import Table

    table = Table()
    table.add_column("request", no_wrap=True)
    table.add_column("prompt")
    table.add_column("target")
    for label in stages:
        table.add_column(f"p(target) {label}".strip(), justify="right")
    first = next(iter(stages.values()))
    rewrites = [probe for probe in first.probes if probe.kind == "rewrite"]
    for probe in rewrites[:limit]:
        values = [evaluation.of(probe.request)["rewrite"].probability for evaluation in stages.values()]
        table.add_row(probe.request, probe.prompt, probe.target, *(f"{value:.3f}" for value in values))
    if len(rewrites) > limit:
        table.caption = f"{len(rewrites) - limit} more requests are not shown"
        table.caption_justify = "left"
    return table


def write_json(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write payload as indented JSON; an existing file is replaced only once the new one is safely on
    disk.
    """
    text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as part:
        part.write_bytes(text.encode() + b"\n")


def _count(summary: KindSummary) -> str:
    if summary.probes == summary.requests:
        return str(summary.requests)
    return f"{summary.requests} ({summary.probes})"


def _cells(summary: KindSummary) -> list[str]:
    cells = []
    for _, field, percent in _COLUMNS:
        value = getattr(summary, field)
        cells.append("–" if value is None else f"{100 * value:.1f} %" if percent else f"{value:.3f}")
    return cells
