"""What a command finds out before it starts: statistics that were given, prompts that are too long, checkpoints of
other runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import FAST, Run

from fastedit.editor import Editor
from fastedit.methods import names
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


def test_cuda_graphs_need_a_cuda_device(fastedit: Run, home: Path, tmp_path: Path) -> None:
    command = (
        "edit",
        "--model",
        home / "model",
        "--requests",
        home / "requests.jsonl",
        "--layers",
        "1",
        *FAST,
    )
    result = fastedit(*command, "--set", "cuda_graphs=true", "--device", "cpu", "--out", tmp_path / "e")
    result.refused("cuda_graphs needs the model on a CUDA device, it is on cpu")
    assert not list(tmp_path.iterdir())


def test_the_folder_of_cached_targets(fastedit: Run, home: Path, tmp_path: Path) -> None:
    command = [
        "edit",
        "--model",
        home / "model",
        "--requests",
        home / "requests.jsonl",
        "--layers",
        "1",
        *FAST,
    ]
    command += ["--no-evaluate", "--out", tmp_path / "e.safetensors"]
    below = f"{home / 'texts.txt'}/z/{{}}_{{}}_{{}}.npz"
    fastedit(*command, "--set", f"cache_template={below}").refused("cache_template", "texts.txt")
    if Path("/proc").is_dir():
        fastedit(*command, "--set", "cache_template=/proc/z/{}_{}_{}.npz").refused("cache_template", "/proc")
    new = tmp_path / "a" / "b"
    assert fastedit(*command, "--dry-run", "--set", f"cache_template={new}/{{}}_{{}}_{{}}.npz").code == 0
    assert not list(tmp_path.iterdir())
    assert fastedit(*command, "--set", f"cache_template={new}/{{}}_{{}}_{{}}.npz").code == 0
    assert len(list(new.iterdir())) == 2


def test_outputs_are_no_inputs(fastedit: Run, home: Path, tmp_path: Path) -> None:
    """--force replaces what is at the output, but not what the command reads."""
    for name in ("requests.jsonl", "edit.safetensors", "texts.txt"):
        shutil.copy(home / name, tmp_path)
    requests, edit, texts = (tmp_path / name for name in ("requests.jsonl", "edit.safetensors", "texts.txt"))
    config = tmp_path / "config.json"  # makes the folder look like a model's
    config.write_text("{}")
    link = tmp_path / "link.svg"
    link.symlink_to(requests)
    shutil.copytree(home / "model", tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = ("--model", tmp_path / "model", "--force")
    facts, apply = ("--requests", requests, *FAST, "--layers", "1"), ("--edit", edit)
    for command, words in (
        (["edit", *model, *facts, "--out", requests], ["--out must not be --requests", "requests.jsonl"]),
        (["edit", *model, *facts, "--out", config, "--config", config], ["--out must not be --config"]),
        (["edit", *model, *facts, "--out", "e", "--plot", link], ["--plot must not be --requests"]),
        (["eval", *model, "--requests", requests, *apply, "--out", edit], ["--out must not be --edit"]),
        (["eval", *model, "--requests", requests, "--texts", texts, "--out", texts], ["not be --texts"]),
        (["apply", *model, *apply, "--out", tmp_path / "model"], ["--out must not be --model"]),
        (
            ["apply", "--model", home / "model", "--force", *apply, "--out", tmp_path],
            ["must not hold --edit"],
        ),
        (["export", "--to", "peft", *model, *apply, "--out", tmp_path], ["--out must not hold --model"]),
        (["revert", *model, "--out", tmp_path / "model"], ["--model"]),
    ):
        fastedit(*command).refused(*words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_differs_from_an_edits_base_is_said(fastedit: Run, home: Path, tmp_path: Path) -> None:
    edit, out = ("--edit", home / "edit.safetensors"), ("--out", tmp_path / "out")
    other = fastedit("apply", "--model", home / "other", *edit, *out)
    other.refused(
        "module 'transformer.h.1.mlp.c_proj'", "base model", "the weights differ: was 64x32:float32:"
    )
    half = fastedit("apply", "--model", home / "model", "--dtype", "bfloat16", *edit, *out)
    half.refused("the dtype differs: was 64x32:float32:", "is 64x32:bfloat16:")
    assert "strict" not in other.err + half.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--limit", "abc"], ["--limit must be an integer, got 'abc'"]),
        (["demo", "--seed=1.5"], ["--seed must be an integer, got '1.5'"]),
        (["stats", "--tokens", "1", "--tokens", "1e6"], ["--tokens must be an integer, got '1e6'"]),
        (["edit", "--requests", ""], ["--requests must not be empty, got ''"]),
        (["edit", "--out="], ["--out must not be empty, got ''"]),
        (["apply", "-o", ""], ["-o must not be empty, got ''"]),
    ],
)
def test_values_the_parser_refuses(fastedit: Run, arguments: list[str], words: list[str]) -> None:
    fastedit(*arguments).refused(*words)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("meta", ["--device must be auto, cpu, cuda or cuda:N, got 'meta'"]),
        ("cpu:1", ["--device must be", "'cpu:1'"]),
        ("cuda:99", ["--device must be one this machine has", "'cuda:99'"]),
    ],
)
def test_devices(fastedit: Run, home: Path, device: str, words: list[str]) -> None:
    command = ("eval", "--model", home / "model", "--requests", home / "requests.jsonl")
    fastedit(*command, "--device", device).refused(*words)


def test_files_that_are_not_there_are_named_with_their_option(fastedit: Run, home: Path) -> None:
    model, requests = ("--model", home / "model"), ("--requests", home / "requests.jsonl")
    fastedit("eval", *model, "--requests", "nowhere").refused("--requests nowhere: no such file")
    fastedit("eval", *model, *requests, "--edit", "nowhere").refused("--edit nowhere: no such file")
    fastedit("eval", *model, *requests, "--kinds", "speed").refused("--kinds must be among", "'speed'")
    edit = ("edit", *model, *requests, "--dry-run")
    fastedit(*edit, "--config", "nowhere").refused("--config nowhere: no such file")
    fastedit(*edit, "--method", "x").refused(f"--method must be one of {', '.join(names())}", "'x'")
    fastedit(*edit, "--layers", "9").refused("--layers: a layer must be from 0 to 3, got 9")


def test_demo_leaves_nothing_when_it_is_refused(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "a" / "b")
    fastedit("demo", "--model", "world:foo", *out).refused("--model must be one of gpt2, llama, got 'foo'")
    fastedit("demo", "--model", "world:gpt2", "--edits", "99999", *out).refused("--edits", "99999")
    fastedit("demo", "--seed", "-1", *out).refused("--seed")
    fastedit("demo", "--out", home / "texts.txt" / "b").refused("--out must be a folder that can be made")
    assert not list(tmp_path.iterdir())


def test_documents_belong_to_a_corpus(fastedit: Run, home: Path, tmp_path: Path) -> None:
    command = ("stats", "--layers", "1", "--out", tmp_path / "s")
    fastedit(*command, "--model", "world:gpt2", "--documents", "line").refused("--documents needs", "'line'")
    corpus = ("--model", home / "model", "--corpus", home / "texts.txt")
    fastedit(*command, *corpus, "--documents", "word").refused("--documents must be", "'word'")
    fastedit("stats", *corpus, "--layers", "7", "--out", tmp_path / "s").refused(
        "--layers", "0 to 3", "got 7"
    )


def test_a_wrong_backend_is_found_before_any_work(
    fastedit: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTEDIT_BACKEND", "tpu")
    command = ("eval", "--model", home / "model", "--requests", "nowhere")
    fastedit(*command).refused("FASTEDIT_BACKEND must be one of eager, cpu, triton, cuda, got 'tpu'")


@pytest.mark.skipif(
    os.name != "posix", reason="permission bits and closed streams as POSIX systems have them"
)
def test_written_models_have_the_users_permissions(fastedit: Run, home: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        arguments = ("--model", home / "model", "--edit", home / "edit.safetensors", "--out", tmp_path / "m")
        assert fastedit("apply", *arguments).code == 0
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640} and "model.safetensors" in modes


@pytest.mark.skipif(
    os.name != "posix", reason="permission bits and closed streams as POSIX systems have them"
)
@pytest.mark.parametrize(("redirect", "code"), [("| head -c 1", 1), (">&-", 0), ("> /dev/full", 1)])
def test_output_that_nobody_reads(tmp_path: Path, redirect: str, code: int) -> None:
    if "/dev/full" in redirect and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which Linux has")
    command = f"{sys.executable} -m fastedit methods --json; echo $? >&2"
    shell = f"({command.replace(';', f' {redirect};')})"
    if redirect.startswith("|"):
        shell = f"({command}) {redirect}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    # A reader that goes away may still have had room for all of it.
    assert int(lines[-1]) in (code, 0) if redirect.startswith("|") else int(lines[-1]) == code
    assert len(lines) == (2 if "full" in redirect else 1)
