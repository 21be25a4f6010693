"""Every message a wrong command line gets: one line, the option, the rule and the value; and what is left on
disk.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import FAST, QUICK, Run

from fastedit.cli.errors import Interrupted, describe


def edit(home: Path, out: Path, *, settings: tuple[str, ...] = FAST, **changes: Any) -> list[Any]:
    """A good `edit` command line, with options replaced (None leaves one out)."""
    options = {
        "model": home / "model",
        "requests": home / "requests.jsonl",
        "layers": "1,2",
        "out": out,
        **changes,
    }
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return ["edit", *given, *settings]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "memmit"}, ["method must be one of", "memit", "rome", "'memmit'"]),
        ({"model": "./nowhere"}, ["--model must be a folder that exists or a hub name", "'./nowhere'"]),
        ({"model": "no-such-model-anywhere"}, ["--model 'no-such-model-anywhere' cannot be loaded"]),
        ({"model": "world:gpt5"}, ["gpt2", "llama", "gpt5"]),
        ({"requests": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"]),
        ({"layers": "9"}, ["layer", "0 to 3", "9"]),
        ({"layers": "5-3"}, ["--layers must have ascending ranges", "5-3"]),
        ({"layers": "1,1"}, ["--layers must not repeat", "1,1"]),
        ({"layers": "one"}, ["--layers must look like 3,4,5 or 3-8", "'one'"]),
        ({"layers": None}, ["layers must be given", "gpt2-xl"]),
        ({"set": "v_rate=1"}, ["--set: unknown option 'v_rate'", "v_lr", "kl_factor"]),
        ({"set": "v_lr=fast"}, ["--set: v_lr must be a number, got 'fast'"]),
        ({"set": "v_lr=true"}, ["--set: v_lr must be a number, got 'true'"]),
        ({"set": "v_lr=-1"}, ["v_lr must be a number > 0", "-1"]),
        ({"set": "v_num_grad_steps=2.5"}, ["v_num_grad_steps must be an integer", "2.5"]),
        ({"set": "fact_token=middle"}, ["fact_token must be one of", "subject_last", "'middle'"]),
        ({"set": "v_lr"}, ["--set must be key=value", "'v_lr'"]),
        ({"dtype": "int4"}, ["--dtype must be one of", "'int4'"]),
        ({"device": "tpu9"}, ["--device must be", "'tpu9'"]),
        ({"stats": "nowhere"}, ["--stats must be a folder", "'nowhere'"]),
        ({"config": "nowhere.json"}, ["nowhere.json: no such file"]),
        ({"out": None}, ["--out must name the edit file"]),
        ({"limit": "0"}, ["--limit must be at least 1, got 0"]),
        ({"seed": str(2**70)}, ["--seed", str(2**70)]),
        ({"set": "v_loss_layer=77"}, ["layer", "0 to 3", "77"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_options_of_edit(
    fastedit: Run, home: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    out = tmp_path / "edit.safetensors"
    fastedit(*edit(home, **{"out": out, **changes})).refused(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            '{"id": "a", "prompt": "Paris is in", "subject": "Rome", "target_new": "Italy"}',
            ["'a'", "'prompt'", "Rome"],
        ),
        (
            '{"id": "a", "prompt": "{} is in", "subject": "Rome", "target_new": " "}',
            ["'a'", "'target_new'", "empty"],
        ),
        ('{"id": "a", "prompt": "{} is in", "subject": "Rome"', ["r.jsonl"]),
        ("", ["r.jsonl"]),
    ],
    ids=["subject not in prompt", "empty target", "truncated", "empty file"],
)
def test_bad_requests(fastedit: Run, home: Path, tmp_path: Path, record: str, words: list[str]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(record)
    fastedit(*edit(home, tmp_path / "e.safetensors", requests=path)).refused(*words)
    fastedit("eval", "--model", home / "model", "--requests", path).refused(*words)
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["must be a JSON file"]),
        ("[1]", ["must hold one JSON object", "list"]),
        ('{"v_rate": 1}', ["unknown option 'v_rate'", "v_lr"]),
        ('{"v_lr": "fast"}', ["v_lr must be a number, got 'fast'"]),
    ],
)
def test_bad_config_file(fastedit: Run, home: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    fastedit(*edit(home, tmp_path / "e.safetensors", config=path)).refused("--config", "config.json", *words)


def test_model_folders_that_are_none(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.safetensors"
    fastedit(*edit(home, out, model=tmp_path)).refused(
        "--model must be a folder with a config.json", str(tmp_path)
    )
    fastedit(*edit(home, out, model=home / "requests.jsonl")).refused(
        "--model must be a folder or a hub name"
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    fastedit(*edit(home, out, model=tmp_path)).refused("cannot be loaded")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    words = (f"--model {str(tmp_path)!r}", "mixtral", "mixture-of-experts", "=8")
    fastedit(*edit(home, out, model=tmp_path)).refused(*words)
    (tmp_path / "config.json").write_text('{"model_type": "xlnet"}')
    fastedit(*edit(home, out, model=tmp_path)).refused("--model", "'xlnet'", "no architecture row")
    broken = tmp_path / "broken"
    shutil.copytree(home / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fastedit(*edit(home, out, model=broken)).refused(f"--model {str(broken)!r}", "damaged")
    # A checkpoint that lacks weights would be filled up with random ones.
    shutil.copy(home / "model" / "model.safetensors", weights)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "n_layer": 5}))
    fastedit(*edit(home, out, model=broken)).refused("--model", "lacks", "transformer.h.4.")
    (broken / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    fastedit(*edit(home, out, model=broken)).refused("--model", "shapes")
    shutil.copy(home / "model" / "config.json", broken)
    for path in broken.glob("token*"):
        path.unlink()
    fastedit(*edit(home, out, model=broken)).refused("--model", "holds no tokenizer")
    assert not out.exists()


def test_encoder_decoder_models_are_refused_by_name(fastedit: Run, home: Path, tmp_path: Path) -> None:
    fastedit("eval", "--model", home / "t5", "--requests", home / "requests.jsonl").refused(
        "--model", "'t5'", "encoder-decoder"
    )


def test_missing_statistics(fastedit: Run, home: Path, tmp_path: Path) -> None:
    result = fastedit(*edit(home, tmp_path / "e.safetensors", settings=QUICK))
    result.refused("statistics", "transformer.h.1.mlp.c_proj", "fastedit stats")


def test_statistics_of_another_model(fastedit: Run, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stats"
    texts = ("--corpus", home / "texts.txt", "--layers", "1,2", "--out", folder)
    assert fastedit("stats", "--model", home / "other", *texts).code == 0
    command = edit(home, tmp_path / "e.safetensors", settings=QUICK, stats=folder)
    fastedit(*command).refused("--stats", "transformer.h.1.mlp.c_proj", "model")


def test_edit_files_that_cannot_be_used(fastedit: Run, home: Path, tmp_path: Path) -> None:
    good = home / "edit.safetensors"
    broken = tmp_path / "broken.safetensors"
    data = good.read_bytes()
    for content in (data[: len(data) // 2], data[:-1] + bytes([data[-1] ^ 1]), b"", b"not an edit at all"):
        broken.write_bytes(content)
        for command in (
            ["apply", "--out", tmp_path / "out"],
            ["export", "--to", "peft", "--out", tmp_path / "out"],
            ["eval", "--requests", home / "requests.jsonl"],
        ):
            fastedit(*command, "--model", home / "model", "--edit", broken).refused("broken.safetensors")
    fastedit("apply", "--model", home / "model", "--edit", "nowhere", "--out", tmp_path / "out").refused(
        "nowhere"
    )
    other = ("--model", home / "other", "--edit", good)
    fastedit("apply", *other, "--out", tmp_path / "out").refused("transformer.h.1.mlp.c_proj", "base")
    fastedit("eval", *other, "--requests", home / "requests.jsonl").refused(
        "transformer.h.1.mlp.c_proj", "base"
    )
    assert list(tmp_path.iterdir()) == [broken]


def test_outputs_that_exist_need_force(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.safetensors"
    out.write_bytes(b"old")
    fastedit(*edit(home, out)).refused("--out must not exist (--force replaces it)", "e.safetensors")
    fastedit(
        "apply", "--model", home / "model", "--edit", home / "edit.safetensors", "--out", tmp_path
    ).refused("--out must not exist")
    plot = tmp_path / "p.png"
    plot.touch()
    fastedit(*edit(home, tmp_path / "new.safetensors"), "--plot", plot).refused("--plot must not exist")
    assert out.read_bytes() == b"old"
    assert fastedit(*edit(home, out), "--no-evaluate", "--force").code == 0
    assert out.read_bytes() != b"old"


def test_force_replaces_no_folder_of_something_else(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("years of work")
    arguments = ("--model", home / "model", "--edit", home / "edit.safetensors", "--out", out, "--force")
    for command in (["apply"], ["export", "--to", "peft"], ["export", "--to", "hf"]):
        fastedit(*command, *arguments).refused("--out must be empty or hold a model or an adapter", "thesis")
    assert (out / "chapter1.tex").read_text() == "years of work"


def test_outputs_that_cannot_be_written(fastedit: Run, home: Path, tmp_path: Path) -> None:
    fastedit(*edit(home, tmp_path / "missing" / "e.safetensors")).refused(
        "--out must lie in a folder that exists"
    )
    fastedit(*edit(home, home / "texts.txt" / "e.safetensors")).refused(
        "--out must lie in a folder that exists"
    )
    if Path("/proc").is_dir():
        fastedit(*edit(home, Path("/proc/e.safetensors"))).refused(
            "--out must lie in a folder that can be written to"
        )
    fastedit("demo", "--out", home / "texts.txt").refused("--out must be a folder", "texts.txt")
    same = tmp_path / "same.png"
    fastedit(*edit(home, same), "--plot", same).refused("--plot must be another file than --out", "same.png")
    suffix = fastedit(*edit(home, tmp_path / "e.safetensors"), "--plot", tmp_path / "p.pdf")
    suffix.refused("--plot must end in .png or .svg", "p.pdf")
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow over 2 KiB inside: writing fails as on a disk that fills up.

    Only around the command itself: a test report that goes to a file is a file of this process, too.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["edit", "plot", "apply", "stats"])
def test_a_full_disk_keeps_the_old_file(fastedit: Run, home: Path, tmp_path: Path, what: str) -> None:
    out, plot = tmp_path / "e.safetensors", tmp_path / "p.png"
    model = ("--model", home / "model")
    old = tmp_path / "out"
    if what == "edit":
        out.write_bytes(b"old")
        with full_disk():
            result, name = fastedit(*edit(home, out), "--no-evaluate", "--force"), "e.safetensors"
        assert out.read_bytes() == b"old"
    elif what == "plot":
        plot.write_bytes(b"old")
        requests = ("--requests", home / "requests.jsonl", "--plot", plot)
        with full_disk():
            result, name = fastedit("eval", *model, *requests, "--force"), "p.png"
        assert plot.read_bytes() == b"old"
    elif what == "apply":
        old.mkdir()
        (old / "config.json").write_text("old")
        written = ("--edit", home / "edit.safetensors", "--out", old)
        with full_disk():
            result, name = fastedit("apply", *model, *written, "--force"), "out"
        assert (old / "config.json").read_text() == "old"
    else:
        corpus = ("--corpus", home / "texts.txt", "--layers", "1", "--out", old)
        with full_disk():
            result, name = fastedit("stats", *model, *corpus), "out"
        assert not list(old.rglob("*.npz"))
    assert result.code == 1, result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and name in last, last
    assert result.out == "" and "Traceback" not in result.err
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_targets_kinds_and_options(fastedit: Run, home: Path, tmp_path: Path) -> None:
    model = ("--model", home / "model")
    edit_file = ("--edit", home / "edit.safetensors")
    fastedit("export", *model, *edit_file, "--to", "onnx", "--out", tmp_path / "x").refused(
        "--to", "peft, hf", "'onnx'"
    )
    fastedit("eval", *model, "--requests", home / "requests.jsonl", "--kinds", "rewrite,speed").refused(
        "kinds must be among", "paraphrase", "'speed'"
    )
    fastedit("eval", *model).refused("--requests")
    fastedit("eval", *model, "--colour").refused("--colour")
    fastedit("edti").refused("edti")
    fastedit("demo", "--edits", "9999", "--out", tmp_path / "s").refused("--edits", "9999")
    fastedit("demo", "--model", "bert", "--out", tmp_path / "d").refused("--model", "gpt2, llama", "'bert'")
    fastedit(
        "stats", *model, "--layers", "0-9", "--corpus", home / "texts.txt", "--out", tmp_path / "s"
    ).refused("0 to 3")
    fastedit("stats", *model, "--layers", "0", "--corpus", "nowhere.txt", "--out", tmp_path / "s").refused(
        "nowhere.txt"
    )
    fastedit("stats", *model, "--layers", "0", "--out", tmp_path / "s").refused("--corpus")
    fastedit("revert", *model, "--out", tmp_path / "x").refused("undo")
    fastedit("revert", *model).refused("--out", "--in-place")
    fastedit("revert", "--model", "nowhere", "--in-place").refused("--model must be a folder", "'nowhere'")
    assert not list(tmp_path.iterdir())


def test_errors_are_raised_in_debug_mode(fastedit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEDIT_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        fastedit("eval", "--model", "world:gpt2", "--requests", "nowhere.jsonl")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (ValueError("x must\n  be 1"), "error: x must be 1", 2),
        (NotImplementedError("no"), "error: no", 2),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"),
            "error: a.json: no such file",
            2,
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), "error: a.json: no space left", 1),
        (OSError("could not be written (No space left)"), "error: could not be written (No space left)", 1),
        (RuntimeError("build it"), "error: build it", 1),
        (MemoryError(), "error: MemoryError", 1),
        (ModuleNotFoundError("No module named 'x'"), "error: No module named 'x' (fastedit doctor", 1),
        (KeyError("a"), "error: unexpected KeyError: 'a' (FASTEDIT_DEBUG=1", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (Interrupted("go on with --resume"), "interrupted: go on with --resume", 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exceptions_become_one_line(error: BaseException, line: str, code: int) -> None:
    message, found = describe(error)
    assert message.startswith(line) and "\n" not in message
    assert found == code
