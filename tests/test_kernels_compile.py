"""Every Triton kernel and each chosen configuration compiles for sm_80 and sm_90 within a block's means; no GPU needed.

In a process of its own, which compiles all that this run selected: whether Triton compiles or interprets is fixed for a
process. `make aot36` goes through the same cases with Triton 3.6.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot_cases import ARCHITECTURES, CASES, case_ids

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OLDER = ROOT / "build" / "triton36"  # made by `make triton36`


def run_gate(out: Path, *args: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    before = [str(entry) for entry in path]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*before, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(HERE / "aot_cases.py"), "--json", str(out), *args]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    selected = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and "case" in getattr(item, "fixturenames", ())
    ]
    names = sorted({params["case"] for params in selected})
    archs = sorted({params["arch"] for params in selected})
    out = tmp_path_factory.mktemp("gate") / "rows.json"
    done = run_gate(out, *(f"--arch={arch}" for arch in archs), *names)
    assert out.exists(), done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * CASES[name].slow) for name in CASES]
)
def test_compiles(rows: list[dict[str, Any]], case: str, arch: int) -> None:
    mine = [row for row in rows if (row["case"], row["arch"]) == (case, arch)]
    assert mine, "nothing was launched"
    assert not [f"{row['kernel']}: {row['failed']}" for row in mine if row["failed"]]


@pytest.mark.slow
@pytest.mark.skipif(not OLDER.exists(), reason="`make triton36` installs Triton 3.6 beside this one")
def test_compiles_with_the_older_triton(tmp_path: Path) -> None:
    done = run_gate(tmp_path / "rows.json", "--slow", path=(OLDER,))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith("Triton 3.6."), done.stdout[:200]


def test_the_gate_sees_what_it_should(tmp_path: Path) -> None:
    """A kernel that spills and one that asks for too much shared memory do not pass."""
    code = """
        import aot, aot_cases, tempfile, pathlib, triton, torch
        import triton.language as tl
        from fastedit.kernels.second_moment import CONFIGS, Config, second_moment_
        name = "second_moment_: bf16 keys, fp64 C, d=16384"
        there = pathlib.Path(tempfile.mkdtemp())
        CONFIGS[90, 8] = Config(tile_m=128, tile_n=128, depth=64, parts=1, warps=4, stages=4)
        print([row["failed"] for row in aot_cases.compile_case(name, 90, there)])
        CONFIGS[90, 8] = Config(tile_m=128, tile_n=64, depth=256, parts=4, warps=8, stages=4)
        print([row["failed"] for row in aot_cases.compile_case(name, 90, there)])
    """
    import textwrap

    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    spilled, too_big = done.stdout.splitlines()
    assert "bytes of stack" in spilled and "bytes of shared memory" in too_big
    assert case_ids(slow=False)
