"""When two results are equal, and what happens to a bench's figures: printed, recorded, then judged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import record
from torch import Tensor

__all__ = ["effect_error", "error_of", "green", "report", "same_effects"]

# Searched targets differ by what a sign-like Adam step makes of rounding; with targets given, rounding is all there is.
SEARCHED, GIVEN = 2e-2, 1e-5
# Of a trace: the largest error in units of the effects, and the least effect, in units of the clean probability, that
# makes the comparison one.
EFFECTS, LEAST_EFFECT = 1e-3, 2e-2


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


def effect_error(found: np.ndarray, want: np.ndarray, low: float, high: float) -> float:
    """Largest difference from the twin's probabilities of restored cells, in units of their largest effect.

    Args:
        found, want: ours and the twin's, of the same cells.
        low, high: the twin's probability of the answer with the subject corrupted, and without.

    Raises AssertionError where restoring the cells hardly changes anything: then equality would prove nothing.
    """
    effect = float(np.abs(want - low).max())
    assert effect >= LEAST_EFFECT * high, f"effects are {effect:.1e} at most, of a probability of {high:.1e}"
    return float(np.abs(found - want).max()) / effect


def same_effects(error: float) -> None:
    """No time is taken of a trace that is not the twin's."""
    assert error <= EFFECTS, (
        f"probabilities differ by {error:.1e} of the largest effect, at most {EFFECTS:.0e}"
    )


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
