"""Commands on a T5: trace, neurons, and the edit by neurons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Run
from tiny_seq2seq import PREFIX, session_of

PROMPT = ("--prompt", "The sport of LeBron James is the", "--subject", "LeBron James")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    session = session_of("v1.1", torch.float32)
    session.model.save_pretrained(folder)  # type: ignore[operator]
    session.tokenizer.save_pretrained(folder)
    return folder


def test_trace_and_neurons(fastedit: Run, t5: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = fastedit(
        *("trace", "--model", t5, *PROMPT, "--answer", "the", "--samples", 2, "--window", 2, "--json"),
        *("--out", tmp_path / "t.npz", "--plot", tmp_path / "t.png"),
    )
    assert done.code == 0, done.err
    assert len(done.json["scores"]["hidden"][0]) == 4 and (tmp_path / "t_attn.npz").exists()
    side = ("--side", "decoder", "--decoder-prefix", PREFIX, "--kinds", "hidden,cross,severed_cross")
    other = fastedit("trace", "--model", t5, *PROMPT, "--samples", 2, *side, "--json")
    assert other.code == 0, other.err
    assert len(other.json["scores"]["cross"][0]) == 3 and other.json["subject_range"] == [0, 0]
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        json.dumps({"prompt": PROMPT[1], "subject": PROMPT[3]})
        + "\n"
        + json.dumps({"prompt": "LeBron James plays", "subject": PROMPT[3]})
    )
    many = fastedit(
        "trace", "--model", t5, "--facts", facts, "--samples", 2, "--out", tmp_path / "f", "--json"
    )
    assert many.code == 0 and many.json["facts"] == 2, many.err
    average = ("--facts", facts, "--samples", 2, "--plot", tmp_path / "average.svg")
    behind = fastedit("trace", "--model", t5, *average, *side)
    assert behind.code == 0 and "cross: best layer" in behind.out, behind.err
    picture = (tmp_path / "average.svg").read_text(encoding="utf-8")
    for title in ("restoring the cross-attention, window 10", "last token, paths severed"):
        assert title in picture
    assert "subsequent token" not in picture
    found = fastedit("neurons", "--model", t5, "--prompt", "LeBron James plays", "--answer", "the", "--json")
    assert found.code == 0 and found.json["neurons"] and found.json["layers"] == [0, 1, 2], found.err
    every = ("--positions", "all", "--decoder-prefix", PREFIX, "--steps", 3)
    found = fastedit("neurons", "--model", t5, "--prompt", "LeBron James plays", *every, "--json")
    assert found.code == 0 and found.json["options"]["positions"] == "all", found.err


def test_an_edit_is_solved_applied_and_undone(fastedit: Run, t5: Path, home: Path, tmp_path: Path) -> None:
    edit = ("edit", "--model", t5, "--requests", home / "requests.jsonl", "--limit", 1, "--method", "kn")
    out = tmp_path / "e.safetensors"
    fastedit(*edit, "--out", out).refused("--model", "'t5'", "encoder-decoder", "--no-evaluate")
    assert not out.exists()
    plan = fastedit(*edit, "--set", "steps=3", "--dry-run", "--json")
    assert plan.code == 0, plan.err
    done = fastedit(*edit, "--set", "steps=3", "--no-evaluate", "--out", out)
    assert done.code == 0, done.err
    assert fastedit("apply", "--model", t5, "--edit", out, "--out", tmp_path / "m").code == 0
    assert fastedit("revert", "--model", tmp_path / "m", "--out", tmp_path / "r").code == 0
    peft = fastedit("export", "--model", t5, "--edit", out, "--to", "peft", "--out", tmp_path / "p")
    assert peft.code == 0, peft.err


def test_what_is_refused(fastedit: Run, t5: Path, home: Path) -> None:
    fastedit("eval", "--model", t5, "--requests", home / "requests.jsonl").refused("encoder-decoder")
    fastedit("trace", "--model", t5, *PROMPT, "--kinds", "cross").refused("kinds must be of", "'cross'")
    fastedit("trace", "--model", t5, *PROMPT, "--side", "up").refused("side must be 'encoder', 'decoder'")
    fastedit("trace", "--model", home / "model", *PROMPT, "--side", "decoder").refused("side must be None")
    fastedit("neurons", "--model", t5, "--prompt", "a", "--positions", "b").refused(
        "positions must be one of"
    )
