"""Peak memory of one ROME edit and of 64 MEMIT edits on a GPT-2-medium-size model: ours at most the twin's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from judge import report


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_peak_memory(benchmark: Any, method: str) -> None:
    def alone(who: str) -> dict[str, float]:
        script = Path(__file__).with_name("peak_memory.py")
        done = subprocess.run(
            [sys.executable, str(script), method, who], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(lambda: {who: alone(who) for who in ("ours", "twin")}, rounds=1)
    ratio = found["twin"]["above_prepared_mb"] / found["ours"]["above_prepared_mb"]
    figures = {**found, "twin_over_ours": ratio}
    report("cpu-engines", f"memory {method}", benchmark, figures, {"twin_over_ours": 1.0})
