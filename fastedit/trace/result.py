"""What a causal trace found, as arrays, files and pictures."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastedit.atomic_file import atomic_path

__all__ = ["TITLES", "CausalTrace", "trace_files"]

TITLES = {
    "hidden": "hidden state",
    "mlp": "MLP",
    "attn": "attention",
    "severed_mlp": "hidden state, MLPs severed",
    "severed_attn": "hidden state, attention severed",
    "cross": "cross-attention",
    "severed_cross": "hidden state, cross-attention severed",
}


def trace_files(path: str | Path, kinds: Sequence[str]) -> list[Path]:
    """What saving a trace of these kinds under a path writes: one ``.json``, or an ``.npz`` a kind.

    ``name.npz`` holds the hidden states, ``name_mlp.npz`` the MLPs and so on, as published. Raises ValueError for
    another suffix.
    """
    target = Path(path)
    if target.suffix == ".json":
        return [target]
    if target.suffix != ".npz":
        raise ValueError(f"path must end in .json or .npz, got {str(target)!r}")
    return [target if kind == "hidden" else target.with_name(f"{target.stem}_{kind}.npz") for kind in kinds]


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """One prompt's trace. Making one with a score that is not finite raises ValueError.

    Attributes:
        prompt, subject: what was asked.
        input_ids, input_tokens: the prompt's tokens.
        subject_range: the subject's first token, and one past its last.
        traced: the tokens that the grids' rows are.
        answer_id: the token whose probability is read at the prompt's last token.
        answer: its text.
        correct_prediction: the clean run predicts it.
        low_score, high_score: its mean probability in the corrupted runs, and that in the clean one.
        window: layers that a cell of ``"mlp"`` or ``"attn"`` restores.
        scores: kind -> ``[len(traced), layers]`` float64, mean probability of the answer with a cell restored.
        engine: how the runs were made: ``"packed tokens"``; ``"padded rows"`` and why; of an encoder-decoder ``"rows of
            one length"``. Changes no result.
    """

    prompt: str
    subject: str
    input_ids: tuple[int, ...]
    input_tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    traced: tuple[int, ...]
    answer_id: int
    answer: str
    correct_prediction: bool
    low_score: float
    high_score: float
    window: int
    scores: dict[str, np.ndarray] = field(repr=False)
    engine: str = "packed tokens"

    def __post_init__(self) -> None:
        for name in ("low_score", "high_score"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)} for {self.prompt!r}")
        for kind, grid in self.scores.items():
            if not np.isfinite(grid).all():
                row, layer = np.argwhere(~np.isfinite(grid))[0].tolist()
                raise ValueError(
                    f"scores of {kind} must be finite, got {grid[row, layer]} at token {self.traced[row]} "
                    f"and layer {layer} for {self.prompt!r}"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that were traced, in the order asked for."""
        return tuple(self.scores)

    def effect(self, kind: str = "hidden") -> np.ndarray:
        """``[len(traced), layers]`` indirect effect: what restoring a cell adds to the corrupted probability."""
        return self._grid(kind) - self.low_score

    def _grid(self, kind: str) -> np.ndarray:
        if kind not in self.scores:
            raise ValueError(f"kind must be one of {', '.join(self.scores)}, got {kind!r}")
        return self.scores[kind]

    def arrays(self, kind: str = "hidden") -> dict[str, Any]:
        """One kind under the published code's names; ``kind`` is ``""`` for ``"hidden"`` (there: ``None``)."""
        return {
            "scores": self._grid(kind),
            "low_score": np.float64(self.low_score),
            "high_score": np.float64(self.high_score),
            "input_ids": np.array(self.input_ids, dtype=np.int64),
            "input_tokens": np.array(self.input_tokens),
            "subject_range": np.array(self.subject_range, dtype=np.int64),
            "answer": np.array(self.answer),
            "window": np.int64(self.window),
            "correct_prediction": np.bool_(self.correct_prediction),
            "kind": np.array("" if kind == "hidden" else kind),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "prompt": self.prompt,
            "subject": self.subject,
            "input_ids": list(self.input_ids),
            "input_tokens": list(self.input_tokens),
            "subject_range": list(self.subject_range),
            "traced": list(self.traced),
            "answer_id": self.answer_id,
            "answer": self.answer,
            "correct_prediction": self.correct_prediction,
            "low_score": self.low_score,
            "high_score": self.high_score,
            "window": self.window,
            "scores": {kind: grid.tolist() for kind, grid in self.scores.items()},
            "engine": self.engine,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CausalTrace:
        """The inverse of `to_dict`. Raises ValueError for what `to_dict` does not give."""
        try:
            found = cls(
                **{
                    **values,
                    **{name: tuple(values[name]) for name in ("input_ids", "input_tokens", "traced")},
                    "subject_range": (int(values["subject_range"][0]), int(values["subject_range"][1])),
                    "scores": {k: np.array(grid, dtype=np.float64) for k, grid in values["scores"].items()},
                }
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"values must be what CausalTrace.to_dict gives: {error}") from error
        found._check_shapes()
        return found

    def _check_shapes(self) -> None:
        length = len(self.input_ids)
        if len(self.input_tokens) != length:
            raise ValueError(
                f"input_tokens must be as many as input_ids, {length}, got {len(self.input_tokens)}"
            )
        if not self.traced or not all(isinstance(t, int) and 0 <= t < length for t in self.traced):
            raise ValueError(
                f"traced must be one or more tokens from 0 to {length - 1}, got {list(self.traced)}"
            )
        if not self.scores:
            raise ValueError("scores must hold one or more kinds, got none")
        width = max(grid.shape[-1] if grid.ndim else 0 for grid in self.scores.values())
        for kind, grid in self.scores.items():
            if kind not in TITLES:
                raise ValueError(f"scores must be of {', '.join(TITLES)}, got {kind!r}")
            if grid.shape != (len(self.traced), width) or not width:
                raise ValueError(
                    f"scores of {kind} must be of shape [{len(self.traced)}, {max(width, 1)}], "
                    f"got {list(grid.shape)}"
                )

    def save(self, path: str | Path, *, force: bool = False) -> list[Path]:
        """Write ``.json`` (everything) or ``.npz`` (the published code's keys); returns what was written.

        One ``.npz`` holds one kind, so there may be several: see `trace_files`. The file that is named is replaced; the
        others are only with ``force``. Raises ValueError for another suffix or a file that is there, before anything is
        written.
        """
        target = Path(path)
        files = trace_files(target, self.kinds)
        for file in files:
            if file != target and not force and file.exists():
                raise ValueError(
                    f"path must leave {file.name}, a file of the same trace, free (force=True replaces it), "
                    f"got {str(target)!r}"
                )
        if target.suffix == ".json":
            text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
            with atomic_path(target) as part:
                part.write_text(text, encoding="utf-8")
            return files
        for file, kind in zip(files, self.scores, strict=True):
            with atomic_path(file) as part, part.open("wb") as out:
                np.savez(out, **self.arrays(kind))
        return files

    def plot(self, path: str | Path, *, kinds: tuple[str, ...] | None = None) -> Path:
        """Write a heat map a kind; the suffix, .png or .svg, chooses the format. Returns the path."""
        from fastedit.trace.plot import plot_trace

        return plot_trace(self, path, kinds=kinds)

    def _repr_html_(self) -> str:
        """An inline picture where matplotlib is installed, else a table of each token's best layer."""
        head = (
            f"<b>{html.escape(self.prompt)}</b> → <b>{html.escape(self.answer)}</b>: "
            f"{self.high_score:.3f} clean, {self.low_score:.3f} corrupted"
        )
        try:
            from fastedit.trace.plot import trace_svg

            return f"<div>{head}<br>{trace_svg(self)}</div>"
        except RuntimeError:
            return f"<div>{head}{self._table()}</div>"

    def _table(self) -> str:
        out = io.StringIO()
        out.write("<table><tr><th>token</th>")
        for kind in self.scores:
            out.write(f"<th>{html.escape(TITLES.get(kind, kind))}: best layer</th>")
        out.write("</tr>")
        for row, token in enumerate(self.traced):
            out.write(f"<tr><td>{html.escape(self.input_tokens[token])}</td>")
            for grid in self.scores.values():
                best = int(grid[row].argmax())
                out.write(f"<td>{best} ({grid[row, best]:.3f})</td>")
            out.write("</tr>")
        out.write("</table>")
        return out.getvalue()
