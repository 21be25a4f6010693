"""Memory: what a sweep takes stays below the budget, and the budget changes no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.trace import Noise

TEXT, SUBJECT = "The mother tongue of LeBron James is the", "LeBron James"

# Peak resident memory above the model for several budgets, in a process whose freed blocks go back to the system.
MEASURE = """
import json, sys
sys.path += {paths!r}
from pathlib import Path
import torch
from tiny import tiny_model, tiny_tokenizer
from fastedit.editor import Editor
from fastedit.trace import Noise
torch.set_num_threads(1)
def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
editor = Editor(tiny_model("gpt2", n_embd=256, n_inner=1024, n_layer=6), tiny_tokenizer())
def trace(memory):
    return editor.trace({text!r}, {subject!r}, window=3, memory=memory, noise=Noise(samples=24))
trace(100_000_000)
found = {{}}
for memory in (12_000_000, 60_000_000):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trace(memory)
    found[memory] = resident("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
def test_peak_stays_below_the_budget() -> None:
    root = Path(__file__).resolve().parents[2]
    code = MEASURE.format(paths=[str(root / "tests"), str(root)], text=TEXT, subject=SUBJECT)
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **malloc},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = {int(memory): peak for memory, peak in json.loads(done.stdout.splitlines()[-1]).items()}
    for memory, peak in found.items():
        assert peak <= memory, found
    assert found[12_000_000] < found[60_000_000]


@pytest.mark.parametrize("memory", [1, 300_000, 2_000_000])
def test_samples_in_parts_give_the_same(memory: int) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    options = {"window": 3, "noise": Noise(samples=5), "kinds": ("hidden", "mlp", "attn", "severed_mlp")}
    whole, parts = (editor.trace(TEXT, SUBJECT, memory=m, **options) for m in (10**9, memory))
    assert abs(whole.low_score - parts.low_score) <= 1e-6 and whole.high_score == parts.high_score
    first = whole.subject_range[0]
    for kind in whole.kinds:
        assert np.abs(whole.scores[kind] - parts.scores[kind]).max() <= 1e-6
        assert (parts.scores[kind][:first] == parts.low_score).all()
    assert (parts.scores["hidden"][:-1, -1] == parts.low_score).all()
    assert parts.scores["hidden"][-1, -1] == parts.high_score
