"""`fastedit neurons`: table, JSON, files, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run

from fastedit.edit import Edit
from fastedit.trace.neurons_result import Neurons

PROMPTS = ("--prompt", "The Eiffel Tower is located in the city of", "--prompt", "The Eiffel Tower is in")


def test_neurons_report_and_files(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "n.npz", tmp_path / "n.svg"
    arguments = ("neurons", "--model", home / "model", *PROMPTS, "--answer", "the", "--steps", 5)
    result = fastedit(*arguments, "--layers", "1-2", "--out", out, "--plot", plot, "--json")
    assert result.code == 0, result.err
    report = result.json
    found = Neurons.load(out)
    assert report["neurons"] == [list(neuron) for neuron in found.neurons] and report["neurons"]
    assert report["layers"] == [1, 2] and report["options"]["steps"] == 5
    assert len(report["coarse"]) == len(report["probability"]) == 2
    assert "knowledge neurons" in plot.read_text()
    table = fastedit(*arguments, "--top", 3)
    assert table.code == 0 and "knowledge neurons; probability" in table.out
    assert fastedit(*arguments, "--out", out).code == 2
    written = tmp_path / "n.json"
    assert fastedit(*arguments, "--out", written).code == 0
    assert json.loads(written.read_text())["answer"] == "the"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "steps must be an integer >= 1, got 0"),
        (("--grid", "x"), "grid must be one of left, right, ends, got 'x'"),
        (("--threshold", 1), "adaptive_threshold must be a number from 0 to 1"),
        (("--layers", "99"), "layer: must be an integer from 0 to 3, got 99"),
        (("--top", 0), "--top must be at least 1, got 0"),
        (("--out", "n.txt"), "--out must end in .json or .npz"),
        (("--plot", "n.pdf"), "--plot"),
        (("--answer", " "), "answer must be a text that is not blank"),
    ],
)
def test_bad_options_are_one_line(
    fastedit: Run, home: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = fastedit("neurons", "--model", home / "model", *PROMPTS, *options)
    assert result.code == 2 and message in result.err
    assert result.err.count("\n") == 1 and not result.out


def test_kn_edits_from_the_command_line(fastedit: Run, home: Path, tmp_path: Path) -> None:
    arguments = ("edit", "--model", home / "model", "--requests", home / "requests.jsonl", "--method", "kn")
    plan = fastedit(*arguments, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    # Without a choice every layer may be edited.
    assert len(plan.json["modules"]) == 4 and plan.json["config"]["layers"] is None
    out = tmp_path / "e.safetensors"
    result = fastedit(*arguments, "--set", "steps=4", "--set", "refine=true", "--out", out, "--json")
    assert result.code == 0, result.err
    assert set(result.json["norms"]) <= set(result.json["modules"])
    edit = Edit.load(out)
    assert [row["id"] for row in edit.info["neurons"]] == ["tower", "player"]
    assert fastedit("eval", *arguments[1:5], "--edit", out).code == 0
    refused = fastedit(*arguments, "--set", "scale=x", "--out", tmp_path / "no.safetensors")
    assert refused.code == 2 and "scale must be one of 'plain', 'norm', got 'x'" in refused.err
