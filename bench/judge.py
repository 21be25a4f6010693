"""When two results are equal, and what happens to a bench's figures: printed, recorded, then judged."""

from __future__ import annotations

import json
from typing import Any

import record
from torch import Tensor

__all__ = ["error_of", "green", "report"]

# Searched targets differ by what a sign-like Adam step makes of rounding; with targets given, rounding is all there is.
SEARCHED, GIVEN = 2e-2, 1e-5


def error_of(edit: Any, expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a layer's update from the twin's, by module name."""
    errors = []
    for delta in edit.deltas:
        want = expected[delta.name]
        errors.append(float((delta.dense().to(want) - want).norm() / want.norm()))
    return max(errors)


def green(searched: float, given: float) -> None:
    """No time is taken of updates that are not the twin's."""
    assert searched <= SEARCHED, f"updates differ by {searched:.1e}, at most {SEARCHED:.0e}"
    assert given <= GIVEN, f"updates differ by {given:.1e} with the same targets, at most {GIVEN:.0e}"


def report(
    document: str,
    section: str,
    benchmark: Any,
    figures: dict[str, Any],
    least: dict[str, float],
    *,
    judged: bool = True,
    device: str = "cpu",
) -> None:
    """Print and record, then judge `figures` by `least`, so that a miss leaves its figures behind."""
    figures = record.rounded({**figures, "at_least": least})
    benchmark.extra_info.update(figures)
    print(f"\n{section}: {json.dumps(figures, indent=2)}")
    if judged:
        record.write(document, section, figures, device)
        missed = {name: figures[name] for name, value in least.items() if figures[name] < value}
        assert not missed, f"{section}: {missed}, at least {least}"
