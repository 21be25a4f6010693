"""``fastedit demo`` through the real entry point: every step happened, every file is there, the model is
untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastedit.world
from fastedit.edit import Edit
from fastedit.readers import read_requests

WEIGHTS = Path(fastedit.world.__file__).parent / "weights"
NAMES = ("gpt2", "llama")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastedit", "demo", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("name", NAMES)
def test_demo(tmp_path: Path, name: str) -> None:
    before = digest(WEIGHTS / name)
    done = demo(tmp_path / "out", "--model", name, "--edits", "6", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert "Traceback" not in done.stderr and "arning" not in done.stderr

    assert report["rome"]["undone"] and report["memit"]["undone"]
    hashes = report["memit"]["weights"]
    assert hashes["original"] == hashes["undone"] != hashes["edited"]
    assert digest(WEIGHTS / name) == before

    rome = report["rome"]
    answer = rome["completions"]["edited fact"]
    assert answer["before"] == rome["request"]["target_true"]
    assert answer["after"] == rome["request"]["target_new"]
    stages = report["memit"]["evaluation"]
    assert set(stages["after"]["kinds"]) >= {"rewrite", "paraphrase", "neighbourhood", "same_subject"}
    assert stages["before"]["kinds"]["rewrite"]["accuracy"] == 0.0
    assert stages["after"]["kinds"]["rewrite"]["accuracy"] >= 0.8
    assert report["memit"]["perplexity"]["after"] < 1.2 * report["memit"]["perplexity"]["before"]

    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "edit.safetensors",
        "probabilities.png",
        "report.json",
        "requests.jsonl",
        "trace.png",
    }
    trace = report["trace"]
    assert trace["clean"] > trace["restored"]["probability"] > 3 * trace["corrupted"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert len(read_requests(tmp_path / "out" / "requests.jsonl")) == 6
    assert len(Edit.load(tmp_path / "out" / "edit.safetensors").requests) == 6
    from matplotlib.image import imread

    pixels = imread(tmp_path / "out" / "probabilities.png")
    assert pixels.shape[0] >= 500 and pixels.shape[1] >= 900 and pixels.std() > 0.05


def test_the_files_of_the_demo_feed_the_other_commands(fastedit: Any, tmp_path: Path) -> None:
    """What the README shows next: the demo's requests, edited by name, with the embedded model's own
    statistics.
    """
    out = tmp_path / "demo"
    assert fastedit("demo", "--edits", "3", "--out", out).code == 0
    assert fastedit("demo", "--edits", "2", "--out", out).code == 0  # its own folder may be there
    options = ("--model", "world:gpt2", "--requests", out / "requests.jsonl")
    fast = ("--set", "v_num_grad_steps=4", "--set", "context_template_length_params=[[3,2]]", "--no-evaluate")
    assert (
        fastedit("edit", *options, "--method", "rome", *fast, "--out", tmp_path / "e.safetensors").code == 0
    )
    scores = fastedit(
        "eval", *options, "--edit", tmp_path / "e.safetensors", "--kinds", "rewrite", "--json"
    ).json
    assert scores["evaluation"]["after"]["kinds"]["rewrite"]["requests"] == 2
    tables = fastedit("eval", *options, "--kinds", "rewrite,neighbourhood")
    assert tables.code == 0 and "neighbourhood" in tables.out
    stats = fastedit(
        "stats", "--model", "world:gpt2", "--layers", "0", "--samples", "50", "--out", tmp_path / "s"
    )
    assert stats.code == 0 and "transformer.h.0.mlp.c_proj" in stats.out
    shown = fastedit(
        "apply", "--model", "world:gpt2", "--edit", tmp_path / "e.safetensors", "--out", tmp_path / "m"
    )
    assert shown.code == 0
    assert (
        fastedit("eval", "--model", tmp_path / "m", "--requests", out / "requests.jsonl", "--limit", "1").code
        == 0
    )
