"""The Triton kernels in the interpreter, in a process of its own; `tests/interpreted.py` holds the checks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
pytestmark = [
    pytest.mark.interp,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
# Read, not imported: importing them makes this process interpret.
SOURCE = (HERE / "interpreted.py").read_text(encoding="utf-8")
CHECKS = re.findall(r"^@check\ndef (\w+)", SOURCE, re.MULTILINE)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    items = [item for item in request.session.items if "check" in getattr(item, "fixturenames", ())]
    names = sorted({item.callspec.params["check"] for item in items})
    out = tmp_path_factory.mktemp("interpreted") / "results.json"
    paths = [str(HERE / "ops"), str(HERE), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "interpreted.py"), f"--json={out}", *names]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr[-3000:]
    found: dict[str, str] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(results: dict[str, str], check: str) -> None:
    assert results[check] == ""
