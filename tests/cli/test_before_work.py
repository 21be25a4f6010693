"""What a command finds out before it starts: statistics that were given, prompts that are too long, checkpoints of
other runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import FAST, Run

from fastedit.editor import Editor
from fastedit.request import EditRequest

LONG = "long " * 300


def request_file(
    folder: Path, prompt: str, target: str = "Rome", subject: str = "Paris", **more: Any
) -> Path:
    path = folder / "r.jsonl"
    fact = {"id": "far", "prompt": prompt, "subject": subject, "target_new": target, **more}
    path.write_text(json.dumps(fact))
    return path


def test_statistics_that_were_given_are_used_or_refused(fastedit: Run, home: Path, tmp_path: Path) -> None:
    """An embedded model has a corpus of its own, which must not take the place of what the user named."""
    stats, out = tmp_path / "stats", tmp_path / "e.safetensors"
    texts = ("--samples", "300", "--layers", "0,1", "--out", stats)
    assert fastedit("stats", "--model", "world:gpt2", *texts).code == 0
    command = ["edit", "--model", "world:gpt2", "--requests", home / "requests.jsonl", "--out", out]
    command += [
        "--layers",
        "0,1",
        "--set",
        "v_num_grad_steps=2",
        "--set",
        "context_template_length_params=[]",
    ]
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", ["no second moment"]), (home, ["no second moment"])):
        fastedit(*command, "--stats", folder).refused("--stats", str(folder), *words)
    fastedit(*command, "--stats", stats, "--dtype", "bfloat16").refused("--stats", "model_dtype", "bfloat16")
    good = fastedit(*command, "--stats", stats, "--dry-run")
    assert good.code == 0 and "embedded corpus" not in good.err
    (file,) = stats.rglob("*.h.1.*.npz")
    file.write_bytes(file.read_bytes()[:-40])
    fastedit(*command, "--stats", stats).refused("--stats", file.name)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        ([], {"prompt": LONG + "{} is in"}, ["field 'prompt'", "tokens with its target and context"]),
        (
            [],
            {"prompt": "{} is in", "target": LONG},
            ["field 'prompt'", "tokens with its target and context"],
        ),
        ([], {"prompt": "{} is in", "subject": LONG}, ["field 'prompt'"]),
        (
            ["--set", "context_template_length_params=[[500,2]]"],
            {"prompt": "{} is in"},
            ["field 'prompt'", "tokens with its target and context"],
        ),
        (
            ["--set", f'context_templates=[["{{}}"],["{LONG}{{}}"]]'],
            {"prompt": "{} is in"},
            ["field 'prompt'", "tokens with its target and context"],
        ),
    ],
    ids=["prompt", "target", "subject", "sampled context", "given context"],
)
def test_rows_longer_than_the_model(
    fastedit: Run, home: Path, tmp_path: Path, options: list[str], fields: dict[str, str], words: list[str]
) -> None:
    path = request_file(tmp_path, **fields)
    settings = [part for part in FAST if part != "--set"]
    kept = [part for part in settings if not (options and part.startswith("context_template_length"))]
    given = [part for value in kept for part in ("--set", value)]
    command = ("edit", "--model", home / "model", "--requests", path, "--layers", "1")
    result = fastedit(*command, *given, *options, "--out", tmp_path / "e.safetensors")
    result.refused("request 'far'", *words, "the model has 128 positions")
    assert list(tmp_path.iterdir()) == [path]


def test_probes_longer_than_the_model(fastedit: Run, home: Path, tmp_path: Path) -> None:
    probe = {"kind": "paraphrase", "prompt": LONG, "target": "Rome"}
    path = request_file(tmp_path, "{} is in", probes=[probe])
    result = fastedit("eval", "--model", home / "model", "--requests", path)
    result.refused("request 'far': paraphrase probe", "tokens", "the model has 128 positions")


def test_requests_are_checked_under_the_rule_that_will_be_used(
    fastedit: Run, home: Path, tmp_path: Path
) -> None:
    path = request_file(tmp_path, "(({} is in")
    command = ["edit", "--model", home / "model", "--requests", path, "--layers", "1", *FAST, "--dry-run"]
    assert fastedit(*command).code == 0
    fastedit(*command, "--set", "token_rule=rome").refused("request 'far'", "'prompt'", "rule 'rome'")


def test_resume_takes_no_checkpoint_of_another_run(
    fastedit: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.stats.forward import Taps

    calls, keys, out = 0, Taps.keys, tmp_path / "stats"

    def stop(self: Taps, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise KeyboardInterrupt
        return keys(self, batch)

    command = ["stats", "--model", home / "model", "--corpus", home / "texts.txt", "--batch-tokens", "100"]
    monkeypatch.setattr(Taps, "keys", stop)
    assert fastedit(*command, "--layers", "1", "--out", out).code == 130
    monkeypatch.setattr(Taps, "keys", keys)
    (partial,) = out.iterdir()
    before = partial.read_bytes()
    for other in (["--layers", "2"], ["--layers", "1", "--max-length", "9"]):
        fastedit(*command, *other, "--out", out, "--resume").refused(
            "--resume needs the checkpoint", str(out)
        )
    assert list(out.iterdir()) == [partial] and partial.read_bytes() == before
    fastedit(*command, "--layers", "1", "--max-length", "999", "--out", out).refused(
        "--max-length must be <= 128", "999"
    )


def test_evaluate_in_python_checks_the_length_as_well(home: Path) -> None:
    editor = Editor.from_pretrained(home / "model")
    request = EditRequest(id="far", prompt="{} is in", subject="Paris", target_new="Rome")
    with pytest.raises(ValueError, match=r"request 'far': rewrite probe: \d+ tokens .* 128 positions"):
        editor.evaluate(EditRequest(id="far", prompt=LONG + "{}", subject="Paris", target_new="Rome"))
    assert editor.evaluate(request).summary["rewrite"].requests == 1
