"""The benches of tracing gone through with tiny models; a tracer that restores nothing does not pass their gates."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize("name", ["hidden", "all kinds", "severed"])
def test_figures_of_a_small_model(bench: Any, name: str) -> None:
    found = bench("test_trace")
    small = found.editor(found.SMALL)
    figures = found.figures_of(small, name)
    low, high = figures["probabilities"]
    assert high - low > 0.2 * high and figures["error_of_effect"] <= 1e-4
    assert figures["layers"] == found.SMALL["n_layer"] and figures["ratio"] > 0


def test_every_cell_counts(bench: Any) -> None:
    found, judge = bench("test_trace"), bench("judge")
    small = found.editor(found.SMALL)
    trace = found.ours(small, ("hidden",))
    judge.same_effects(found.grid_error(small, trace))
    nothing = {"hidden": np.full_like(trace.scores["hidden"], trace.low_score)}
    assert found.grid_error(small, replace(trace, scores=nothing)) == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(AssertionError, match="of the largest effect"):
        judge.same_effects(found.grid_error(small, replace(trace, scores=nothing)))
    one = trace.scores["hidden"].copy()
    one[5, 2] += 0.01 * (trace.high_score - trace.low_score)
    with pytest.raises(AssertionError, match="of the largest effect"):
        judge.same_effects(found.grid_error(small, replace(trace, scores={"hidden": one})))


def test_no_effect_proves_nothing(bench: Any) -> None:
    with pytest.raises(AssertionError, match="effects are"):
        bench("judge").effect_error(np.full(3, 1e-3), np.full(3, 1e-3), 1e-3, 1e-3)


@pytest.mark.parametrize("name", ["encoder", "encoder, severed", "decoder"])
def test_encoder_decoders_of_small_shape(bench: Any, name: str) -> None:
    bench("test_seq2seq").test_every_cell_on_a_smaller_model(name)
