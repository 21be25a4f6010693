"""How well an edit worked: metrics, perplexity, tables, JSON and plots."""

from __future__ import annotations

from fastedit.evaluate.metrics import KINDS, Evaluation, KindSummary, ProbeScore, evaluate
from fastedit.evaluate.perplexity import perplexity
from fastedit.evaluate.plot import plot_probabilities
from fastedit.evaluate.report import comparison_table, request_table, write_json

__all__ = [
    "KINDS",
    "Evaluation",
    "KindSummary",
    "ProbeScore",
    "comparison_table",
    "evaluate",
    "perplexity",
    "plot_probabilities",
    "request_table",
    "write_json",
]
