"""What the op benches print, keep and draw."""

from __future__ import annotations

import io
import json

import op_table
import pytest
from ceilings import Ceilings
from rich.console import Console

ROOF = Ceilings({"fp32": 100e9, "bf16": 1e12}, 10e9, "made up")


def row(backend, seconds, **changes):
    made = {
        "op": "rank_update_",
        "shape": "gpt2-xl [1600, 6400] r=1",
        "dtype": "bf16",
        "backend": backend,
        "seconds": seconds,
        "ratio": None if backend == "reference" else 3.5,
        "goal": 3.0 if backend == "cpu" else None,
        "error": 1e-7,
        "flops": 2e7,
        "bytes": 4e7,
        "of_roofline": 0.5,
        "peak_bytes": 1e6,
    }
    return {**made, **changes}


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    assert ROOF.floor("fp32", 1e9, 1) == pytest.approx(1e-2)
    assert ROOF.floor("fp32", 1, 1e9) == pytest.approx(1e-1)
    assert ROOF.floor("fp64", 1, 1) is None


def test_the_table_names_every_figure_and_marks_a_missed_goal():
    out = io.StringIO()
    op_table.show([row("reference", 2e-3), row("cpu", 1e-3, ratio=2.0)], Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    assert lines[0].split()[:5] == ["op", "shape", "dtype", "backend", "time"]
    assert "2.00x" in lines[1] and "3x missed" in lines[1] and "50 %" in lines[1]
    assert "reference" in lines[2] and "x missed" not in lines[2]


def test_a_later_run_replaces_its_own_rows_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BENCH_RESULTS", str(tmp_path))
    monkeypatch.setenv("FASTEDIT_COMMIT", "first")
    op_table.keep([row("reference", 2e-3), row("cpu", 1e-3)], set(), ROOF, "cpu-ops", "cpu")
    monkeypatch.setenv("FASTEDIT_COMMIT", "second")
    path = op_table.keep([row("cpu", 5e-4)], set(), ROOF, "cpu-ops", "cpu")
    found = json.loads(path.read_text())
    seen = {r["backend"]: (r["seconds"], found["machines"][r["machine"]]["commit"]) for r in found["rows"]}
    assert seen == {"reference": (2e-3, "first"), "cpu": (5e-4, "second")}


def test_a_case_that_failed_leaves_no_older_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BENCH_RESULTS", str(tmp_path))
    one = row("cpu", 1e-3)
    op_table.keep([row("reference", 2e-3), one], set(), ROOF, "cpu-ops", "cpu")
    tried = {tuple(one[name] for name in ("op", "shape", "dtype", "backend"))}
    path = op_table.keep([], tried, ROOF, "cpu-ops", "cpu")
    assert [r["backend"] for r in json.loads(path.read_text())["rows"]] == ["reference"]


def test_the_roofline_is_a_picture(tmp_path):
    path = tmp_path / "roofline.png"
    op_table.plot([row("reference", 2e-3), row("cpu", 1e-3), row("eager", 3e-3)], ROOF, path, "Ops")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 10_000
