"""``fastedit trace``: one prompt, many facts, stopped and resumed, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Run

PROMPT = ("--prompt", "The mother tongue of LeBron James is the", "--subject", "LeBron James")
FAST = ("--samples", 2, "--window", 2)


def test_one_prompt(fastedit: Run, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = fastedit(
        *("trace", "--model", home / "model", *PROMPT, *FAST, "--json"),
        *("--out", tmp_path / "t.npz", "--plot", tmp_path / "t.svg"),
    )
    assert done.code == 0, done.err
    found = done.json
    assert [Path(name).name for name in found["files"]] == ["t.npz", "t_mlp.npz", "t_attn.npz", "t.svg"]
    with np.load(tmp_path / "t.npz", allow_pickle=False) as arrays:
        assert np.allclose(arrays["scores"], found["scores"]["hidden"])
    table = fastedit("trace", "--model", home / "model", *PROMPT, *FAST, "--kinds", "hidden,severed_mlp")
    assert table.code == 0 and "severed_mlp: best layer" in table.out
    assert "clean" in table.out and "corrupted" in table.out


def test_many_facts_go_on_where_they_were(fastedit: Run, home: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    lines = [
        {"prompt": "The Eiffel Tower is located in the city of", "subject": "Eiffel Tower"},
        {"prompt": "LeBron James plays the sport of", "subject": "LeBron James"},
    ]
    facts.write_text("\n".join(json.dumps(line) for line in lines))
    command = ("trace", "--model", home / "model", "--facts", facts, *FAST, "--out", tmp_path / "traces")
    first = fastedit(*command, "--json")
    assert first.code == 0, first.err
    assert first.json["facts"] == 2 and len(first.json["kinds"]["hidden"]["mean"]) == 6
    names = {path.name for path in (tmp_path / "traces").iterdir()}
    assert names == {"study.json", "cases", "average.json", "average.npz"}
    before = (tmp_path / "traces" / "cases" / "0.json").stat().st_mtime_ns
    again = fastedit(*command)
    assert again.code == 0 and "2 facts" in again.out
    assert (tmp_path / "traces" / "cases" / "0.json").stat().st_mtime_ns == before
    other = fastedit(*command, "--seed", 2)
    assert other.code == 2 and "was made with other options" in other.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt and --subject, or --facts, must be given"),
        (("--prompt", "a"), "--prompt and --subject must be given together"),
        ((*PROMPT, "--kinds", "block"), "kinds must be of hidden, mlp, attn"),
        ((*PROMPT, "--window", 0), "window must be an integer of at least 1, got 0"),
        ((*PROMPT, "--samples", 0), "noise.samples must be an integer of at least 1, got 0"),
        ((*PROMPT, "--plot", "x.pdf"), "--plot must end in .png or .svg, got 'x.pdf'"),
        ((*PROMPT, "--out", "x.csv"), "--out must end in .npz or .json for a prompt, got 'x.csv'"),
        ((*PROMPT, "--facts", "x.jsonl"), "--facts must not be given with --prompt"),
        (("--prompt", "The sea is", "--subject", "Marie"), "subject must occur in the prompt"),
        (("--facts", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_bad_input(fastedit: Run, home: Path, arguments: tuple[object, ...], message: str) -> None:
    done = fastedit("trace", "--model", home / "model", *arguments)
    assert done.code == 2 and done.out == ""
    assert message in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1
