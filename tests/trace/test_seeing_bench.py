"""The bench of tracing and neurons on a GPU, gone through on a CPU with a tiny model of the same family."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SHAPE = {"n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 512, "n_positions": 64, "rotary_dim": 4}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("test_seeing_gpu")


@pytest.mark.parametrize("name", ["neurons_against_twin", "trace_against_twin"])
def test_values_are_the_twins_and_figures_are_there(bench: Any, name: str) -> None:
    figures = getattr(bench, name)(SHAPE, "cpu")
    bench.green(figures)
    assert figures["layers"] == 3
    assert all(figures[key] > 0 for key in ("seconds", "seconds_tf32", "twin_seconds", "ratio", "ratio_tf32"))


def test_it_skips_without_a_device() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(BENCH / "test_seeing_gpu.py"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=BENCH.parent, timeout=300)
    assert done.returncode == 0 and "2 skipped" in done.stdout, done.stdout + done.stderr
