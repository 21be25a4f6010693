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
    assert other.code == 2 and "--out must be new or hold this study" in other.err
    assert "noise.seed 1, now 2" in other.err and other.err.count("\n") == 1


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
        ((*PROMPT, "--limit", 3), "--limit is for many facts and must not be given with --prompt, got 3"),
        ((*PROMPT, "--batch", 4), "--batch is for many facts and must not be given with --prompt, got 4"),
        ((*PROMPT, "--all-facts"), "--all-facts is for many facts and must not be given with --prompt"),
        ((*PROMPT, "--memory", "much"), "--memory must be a size like 500MB or 2GB, got 'much'"),
        ((*PROMPT, "--noise", "x3"), "--noise must be s or sN"),
        ((*PROMPT, "--noise", "t2"), "noise.degrees must be a finite number > 2, got 2.0"),
        ((*PROMPT, "--noise", "nan"), "noise.scale must be finite and >= 0"),
        ((*PROMPT, "--noise", "m"), "--texts must be given for multivariate noise"),
        ((*PROMPT, "--noise", "m", "--distribution", "uniform"), "--distribution must agree with --noise m"),
        ((*PROMPT, "--texts", "a.txt"), "--texts is for multivariate and student noise"),
        ((*PROMPT, "--noise", "m", "--texts", "missing.txt"), "missing.txt"),
    ],
)
def test_bad_input(fastedit: Run, home: Path, arguments: tuple[object, ...], message: str) -> None:
    done = fastedit("trace", "--model", home / "model", *arguments)
    assert done.code == 2 and done.out == ""
    assert message in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1


def test_no_file_of_a_trace_is_replaced_unasked(fastedit: Run, home: Path, tmp_path: Path) -> None:
    (tmp_path / "t_mlp.npz").write_text("mine")
    command = ("trace", "--model", home / "model", *PROMPT, *FAST, "--out", tmp_path / "t.npz")
    # Before the model is opened: there is none of this name.
    refused = fastedit(*(part if part != home / "model" else home / "nothing" for part in command))
    refused.refused("--out must not exist (--force replaces it)", "t_mlp.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["t_mlp.npz"]
    assert (tmp_path / "t_mlp.npz").read_text() == "mine"
    done = fastedit(*command, "--force")
    assert done.code == 0, done.err
    assert np.load(tmp_path / "t_mlp.npz")["kind"] == "mlp"


@pytest.mark.parametrize("noise", ["s2", "0.3", "u0.3", "m", "t4"])
def test_short_names_of_noise_and_memory(fastedit: Run, home: Path, noise: str) -> None:
    texts = ("--texts", home / "texts.txt") if noise in ("m", "t4") else ()
    command = ("trace", "--model", home / "model", *PROMPT, *FAST, "--kinds", "hidden", "--json")
    done = fastedit(*command, "--noise", noise, *texts, "--memory", "64MB")
    assert done.code == 0, done.err
    assert done.json["low_score"] != fastedit(*command).json["low_score"]


def test_a_readable_name_is_the_short_one(fastedit: Run, home: Path) -> None:
    command = ("trace", "--model", home / "model", *PROMPT, *FAST, "--kinds", "hidden", "--json")
    short = fastedit(*command, "--noise", "u0.3").json
    assert short == fastedit(*command, "--noise", "0.3", "--distribution", "uniform").json


def test_more_facts_than_there_are(fastedit: Run, home: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "LeBron James plays the sport of", "subject": "LeBron James"}\n')
    done = fastedit("trace", "--model", home / "model", "--facts", facts, *FAST, "--limit", 5)
    assert done.code == 0 and "--limit 5: " in done.err and "holds 1" in done.err
    fastedit("trace", "--model", "world:gpt2", "--limit", 100_000).refused(
        "--limit must be between 1 and 88", "got 100000"
    )
    facts.write_text('{"prompt": "LeBron James plays')
    fastedit("trace", "--model", home / "model", "--facts", facts).refused("facts.jsonl")


def test_interrupted_and_gone_on_with(
    fastedit: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.trace import study

    facts = tmp_path / "facts.jsonl"
    lines = [{"prompt": f"{s} is in the city of", "subject": s} for s in ("Paris", "Rome", "London")]
    facts.write_text("\n".join(json.dumps(line) for line in lines))
    command = (
        "trace",
        "--model",
        home / "model",
        "--facts",
        facts,
        *FAST,
        "--out",
        tmp_path / "o",
        "--batch",
        1,
    )
    calls, real = [], study.trace_prompts

    def stopping(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(study, "trace_prompts", stopping)
    stopped = fastedit(*command)
    assert stopped.code == 130 and "run the same command to go on" in stopped.err
    assert "Traceback" not in stopped.err
    done = fastedit(*command)
    assert done.code == 0 and "1 of them done before" in done.err and len(calls) == 4


def test_a_picture_that_cannot_be_made(
    fastedit: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without matplotlib it is known before the model is opened; where drawing fails, the table is there."""
    from fastedit.cli import outputs
    from fastedit.trace import CausalTrace

    command = ("trace", "--model", home / "model", *PROMPT, *FAST, "--plot", tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "find_spec", lambda name: None)
        nothing = [part if part != home / "model" else home / "nothing" for part in command]
        fastedit(*nothing).refused("--plot needs matplotlib: pip install", code=1)

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CausalTrace, "plot", fail)
    done = fastedit(*command)
    assert done.code == 1 and "best layer" in done.out and "no space left" in done.err
    assert fastedit(*command, "--json").json["files"] == []


def test_one_fact_and_none_that_is_predicted(fastedit: Run, home: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    fact = {"prompt": "LeBron James plays the sport of", "subject": "LeBron James", "answer": "zzz"}
    facts.write_text(json.dumps(fact))
    command = ("trace", "--model", home / "model", "--facts", facts, *FAST)
    done = fastedit(*command)
    assert done.code == 2 and done.out == ""
    assert done.err.splitlines()[-1].startswith("error: --all-facts must be given")
    done = fastedit(*command, "--all-facts")
    assert done.code == 0 and done.out.startswith("1 fact: "), done.err


def test_redraw(fastedit: Run, home: Path) -> None:
    command = ("trace", "--model", home / "model", *PROMPT, *FAST, "--kinds", "hidden,severed_mlp", "--json")
    shared, redrawn = fastedit(*command).json, fastedit(*command, "--redraw").json
    assert shared["scores"]["hidden"] == redrawn["scores"]["hidden"]
    assert shared["scores"]["severed_mlp"] != redrawn["scores"]["severed_mlp"]


def test_a_refused_study_does_not_block_the_next_one(fastedit: Run, home: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "LeBron James plays the sport of", "subject": "LeBron James"}\n')
    command = ("trace", "--model", home / "model", "--facts", facts, *FAST, "--out", tmp_path / "out")
    fastedit(*command, "--side", "encoder").refused("side must be None")
    assert not (tmp_path / "out").exists()
    assert fastedit(*command).code == 0
