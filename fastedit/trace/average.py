"""The average trace over many facts: indirect effects by token role and layer, with confidence bands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastedit.atomic_file import atomic_path
from fastedit.trace.result import CausalTrace
from fastedit.trace.roles import ROLES, by_role

__all__ = ["AverageTrace", "average"]

_Z = 1.959963984540054  # of a normal distribution's central 95 %


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """Mean indirect effects over facts.

    Attributes:
        effects: kind -> ``[facts, roles, layers]``: a fact's mean over its tokens of a role; NaN where it has none.
        high, low: ``[facts]`` probability of the answer in the clean and in the corrupted runs.
        window: layers that a cell of ``"mlp"`` or ``"attn"`` restores.
        skipped: facts left out because the model does not predict their answer.
        engine: how the runs were made, see `CausalTrace.engine`.
    """

    effects: Mapping[str, np.ndarray] = field(repr=False)
    high: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    window: int
    skipped: int = 0
    engine: str = "packed tokens"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that were traced."""
        return tuple(self.effects)

    @property
    def facts(self) -> int:
        """Number of facts averaged."""
        return len(self.high)

    def count(self, kind: str) -> np.ndarray:
        """``[roles]`` facts that have a token of each role."""
        return np.isfinite(self.effects[kind][:, :, 0]).sum(axis=0)

    def mean(self, kind: str) -> np.ndarray:
        """``[roles, layers]`` average indirect effect; NaN for a role that no fact has."""
        grid = self.effects[kind]
        there = np.isfinite(grid)
        count = there.sum(axis=0)
        total = np.where(there, grid, 0.0).sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def band(self, kind: str) -> np.ndarray:
        """``[roles, layers]`` half width of the 95 % confidence band of the mean; NaN below two facts."""
        grid = self.effects[kind]
        there = np.isfinite(grid)
        count = there.sum(axis=0)
        away = np.where(there, grid - self.mean(kind), 0.0)
        variance = (away**2).sum(axis=0) / np.maximum(count - 1, 1)
        return np.where(count > 1, _Z * np.sqrt(variance / np.maximum(count, 1)), np.nan)

    def to_dict(self) -> dict[str, Any]:
        """Means and bands as JSON-able values; None where there is nothing to average."""
        return {
            "facts": self.facts,
            "skipped": self.skipped,
            "engine": self.engine,
            "window": self.window,
            "high_score": float(self.high.mean()),
            "low_score": float(self.low.mean()),
            "roles": list(ROLES),
            "kinds": {
                kind: {
                    "count": self.count(kind).tolist(),
                    "mean": _jsonable(self.mean(kind)),
                    "band": _jsonable(self.band(kind)),
                }
                for kind in self.effects
            },
        }

    def save(self, path: str | Path) -> Path:
        """Write ``.json`` (means and bands) or ``.npz`` (every fact's effects beside them); returns the path."""
        target = Path(path)
        if target.suffix == ".json":
            with atomic_path(target) as part:
                part.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
            return target
        if target.suffix != ".npz":
            raise ValueError(f"path must end in .json or .npz, got {str(target)!r}")
        arrays: dict[str, Any] = {"roles": np.array(ROLES), "high": self.high, "low": self.low}
        for kind, grid in self.effects.items():
            arrays.update(
                {f"{kind}/effects": grid, f"{kind}/mean": self.mean(kind), f"{kind}/band": self.band(kind)}
            )
        with atomic_path(target) as part, part.open("wb") as file:
            np.savez(file, **arrays)
        return target

    def plot(self, path: str | Path) -> Path:
        """Lines with confidence bands, a panel a kind, and bars for severed runs; .png or .svg. Returns the path."""
        from fastedit.trace.plot_average import plot_average

        return plot_average(self, path)

    def _repr_html_(self) -> str:
        """An inline picture where matplotlib is installed, else a table of each role's best layer."""
        count = f"{self.facts} fact{'s'[: self.facts != 1]}"
        head = f"{count}, {self.high.mean():.3f} clean, {self.low.mean():.3f} corrupted"
        try:
            from fastedit.trace.plot_average import average_svg

            return f"<div>{head}<br>{average_svg(self)}</div>"
        except RuntimeError:
            rows = []
            for kind in self.effects:
                mean = self.mean(kind)
                for role, name in enumerate(ROLES):
                    if np.isfinite(mean[role]).all():
                        best = int(mean[role].argmax())
                        cells = (kind, name, best, f"{mean[role, best]:.3f}")
                        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
            titles = "".join(f"<th>{title}</th>" for title in ("kind", "token", "best layer", "effect"))
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            return f"<div>{head}<table><tr>{titles}</tr>{body}</table></div>"


def average(traces: Sequence[CausalTrace], *, all_facts: bool = False) -> AverageTrace:
    """Average traces of the same kinds and window.

    Args:
        all_facts: also those whose answer the model does not predict, which are skipped as published.

    Raises:
        ValueError: no trace, none that the model predicts, or traces of different kinds, windows or models.
    """
    if not traces:
        raise ValueError("traces: at least one is needed, got 0")
    first = traces[0]
    for trace in traces:
        if trace.kinds != first.kinds or trace.window != first.window:
            raise ValueError("traces must be of the same kinds and window")
        if trace.scores[trace.kinds[0]].shape[1] != first.scores[first.kinds[0]].shape[1]:
            raise ValueError("traces must be of one model, got different numbers of layers")
    kept = [trace for trace in traces if all_facts or trace.correct_prediction]
    if not kept:
        raise ValueError(f"traces: the model predicts the answer of none of the {len(traces)} facts")
    effects = {
        kind: np.stack(
            [
                by_role(trace.effect(kind), trace.traced, trace.subject_range, len(trace.input_ids))
                for trace in kept
            ]
        )
        for kind in first.kinds
    }
    return AverageTrace(
        effects,
        np.array([trace.high_score for trace in kept]),
        np.array([trace.low_score for trace in kept]),
        first.window,
        len(traces) - len(kept),
        first.engine,
    )


def _jsonable(grid: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in grid]
