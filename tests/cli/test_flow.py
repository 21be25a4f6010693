"""The main job through the command line: edit, score, apply, revert, export, collect; and what is on stdout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import FAST, QUICK, Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastedit.edit import Edit


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one
    )


def test_edit_reports_json_and_writes_edit_and_plot(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "e.safetensors", tmp_path / "p.svg"
    before = weights(home / "model")
    options = ("--requests", home / "requests.jsonl", "--layers", "1-2", *FAST)
    result = fastedit("edit", "--model", home / "model", *options, "--out", out, "--plot", plot, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report["requests"] == 2 and report["method"] == "memit"
    assert report["modules"] == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert report["config"]["v_num_grad_steps"] == 3 and report["config"]["mom2_adjustment"] is False
    assert all(norm > 0 for norm in report["norms"].values())
    kinds = {label: stage["kinds"] for label, stage in report["evaluation"].items()}
    assert set(kinds["after"]) == {"rewrite", "paraphrase", "neighbourhood"}
    assert kinds["after"]["rewrite"]["probability"] > kinds["before"]["rewrite"]["probability"]
    edit = Edit.load(out)
    assert [request["id"] for request in edit.requests] == ["tower", "player"]
    assert "paraphrase" in plot.read_text()
    assert same_bits(before, weights(home / "model"))


def test_dry_run_plans_and_writes_nothing(fastedit: Run, home: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"v_lr": 0.25, "kl_factor": 0, "layers": [0]}))
    arguments = (
        "edit",
        "--model",
        home / "model",
        "--requests",
        home / "requests.jsonl",
        *FAST,
        "--config",
        config,
    )
    result = fastedit(
        *arguments, "--layers", "3", "--set", "kl_factor=0.5", "--method", "rome", "--dry-run", "--json"
    )
    plan = result.json
    assert plan["dry_run"] and plan["modules"] == ["transformer.h.3.mlp.c_proj"]
    assert (plan["config"]["v_lr"], plan["config"]["kl_factor"]) == (0.25, 0.5)
    table = fastedit(*arguments, "--dry-run").out
    assert "what would run" in table and "v_lr" in table and "0.25" in table
    assert list(tmp_path.iterdir()) == [config]


def test_apply_and_revert_give_the_original_bits(fastedit: Run, home: Path, tmp_path: Path) -> None:
    edited, restored = tmp_path / "edited", tmp_path / "restored"
    arguments = ("--model", home / "model", "--edit", home / "edit.safetensors")
    applied = fastedit("apply", *arguments, "--out", edited)
    assert applied.code == 0 and applied.err == ""
    original = weights(home / "model")
    assert not same_bits(original, weights(edited))
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    Edit.load(home / "edit.safetensors").apply(model)
    name = "transformer.h.1.mlp.c_proj.weight"
    assert torch.equal(model.state_dict()[name], weights(edited)[name])

    result = fastedit("revert", "--model", edited, "--out", restored, "--json")
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (1, 2)]
    assert result.json["restored"] == names
    assert same_bits(original, weights(restored))
    assert not same_bits(original, weights(edited))
    fastedit("revert", "--model", restored, "--out", tmp_path / "again").refused(
        "--model", "undo", str(restored)
    )
    fastedit("revert", "--model", edited, "--out", edited / "in").refused("--out must not lie inside --model")
    assert fastedit("revert", "--model", edited, "--in-place").code == 0
    assert same_bits(original, weights(edited))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited", "restored"]


def test_export_to_both_targets(fastedit: Run, home: Path, tmp_path: Path) -> None:
    arguments = ("export", "--model", home / "model", "--edit", home / "edit.safetensors")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert fastedit(*arguments, "--to", "peft", "--out", adapter, "--json").json["to"] == "peft"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    assert fastedit(*arguments, "--to", "hf", "--out", merged).code == 0
    assert (merged / "tokenizer.json").is_file() and not same_bits(weights(home / "model"), weights(merged))
    fastedit(*arguments, "--to", "peft", "--out", adapter).refused("--out must not exist")
    assert fastedit(*arguments, "--to", "peft", "--out", adapter, "--force").code == 0


def test_eval_scores_before_and_after(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "scores.json", tmp_path / "p.png"
    arguments = ("eval", "--model", home / "model", "--requests", home / "requests.jsonl")
    files = ("--texts", home / "texts.txt", "--out", out, "--plot", plot)
    report = fastedit(*arguments, "--edit", home / "edit.safetensors", *files, "--json").json
    assert json.loads(out.read_text()) == report
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(report["evaluation"]) == set(report["perplexity"]) == {"before", "after"}
    assert len(report["evaluation"]["after"]["probes"]) == 5
    tables = fastedit(*arguments, "--kinds", "rewrite", "--limit", "1").out
    assert "The Eiffel Tower is located in the city of" in tables
    assert "paraphrase" not in tables and "LeBron" not in tables


def test_invalid_records_can_be_skipped(fastedit: Run, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = (home / "requests.jsonl").read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace("chess", " ")]))
    result = fastedit("eval", "--model", home / "model", "--requests", path, "--skip-invalid", "--json")
    assert result.json["requests"] == 1
    assert "skipped: " in result.err and "player" in result.err


def test_statistics_feed_an_edit(fastedit: Run, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stats"
    arguments = (
        "stats",
        "--model",
        home / "model",
        "--corpus",
        home / "texts.txt",
        "--layers",
        "1,2",
        "--out",
        folder,
    )
    rows = fastedit(*arguments, "--json").json["statistics"]
    assert [row["features"] for row in rows] == [64, 64] and all(row["usable"] for row in rows)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    assert len(files) == 2
    again = fastedit(*arguments)
    assert again.code == 0 and "cached" in again.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == files
    options = ("--layers", "1,2", *QUICK, "--set", "mom2_update_weight=10")
    edit = (
        "edit",
        "--model",
        home / "model",
        "--requests",
        home / "requests.jsonl",
        "--stats",
        folder,
        *options,
    )
    assert fastedit(*edit, "--out", tmp_path / "e.safetensors", "--no-evaluate").code == 0


def test_too_few_tokens_are_said(fastedit: Run, home: Path, tmp_path: Path) -> None:
    arguments = ("stats", "--model", home / "model", "--corpus", home / "texts.txt", "--layers", "1")
    result = fastedit(*arguments, "--tokens", "20", "--out", tmp_path / "stats")
    assert result.code == 0
    assert "warning: transformer.h.1.mlp.c_proj" in result.err and "20" in result.err


def test_stopped_statistics_resume_to_the_same_bits(
    fastedit: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.stats.forward import Taps

    arguments: list[Any] = [
        "stats",
        "--model",
        home / "model",
        "--corpus",
        home / "texts.txt",
        "--layers",
        "1",
    ]
    arguments += ["--batch-tokens", "100", "--out"]
    assert fastedit(*arguments, tmp_path / "whole").code == 0
    fastedit(*arguments, tmp_path / "parts", "--resume").refused("--resume needs the checkpoint", "parts")
    calls = 0
    keys = Taps.keys

    def stop(self: Taps, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise KeyboardInterrupt
        return keys(self, batch)

    monkeypatch.setattr(Taps, "keys", stop)
    stopped = fastedit(*arguments, tmp_path / "parts")
    assert stopped.code == 130 and stopped.out == ""
    assert stopped.err.splitlines()[-1].startswith("interrupted: run the same command with --resume")
    monkeypatch.setattr(Taps, "keys", keys)
    assert fastedit(*arguments, tmp_path / "parts", "--resume").code == 0
    assert not list((tmp_path / "parts").glob("partial_*"))
    one, two = (next((tmp_path / name).rglob("*.npz")).read_bytes() for name in ("whole", "parts"))
    assert one == two


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The real entry point in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("FASTEDIT_DEBUG", None)
    command = [sys.executable, "-m", "fastedit", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_real_entry_edit_prints_pure_json(home: Path, tmp_path: Path) -> None:
    options = ("--requests", home / "requests.jsonl", "--layers", "1", *FAST, "--json")
    process = start("edit", "--model", home / "model", *options, "--out", tmp_path / "e.safetensors")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["requests"] == 2
    assert Edit.load(tmp_path / "e.safetensors").method == "memit"


def test_real_entry_ctrl_c_keeps_a_checkpoint(home: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text((home / "texts.txt").read_text() * 2000)
    options = ("--corpus", texts, "--layers", "1,2", "--batch-tokens", "100", "--out", tmp_path / "stats")
    process = start("stats", "--model", home / "model", *options)
    assert process.stderr is not None
    while "collecting layers" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted: run the same command with --resume")
    assert list((tmp_path / "stats").glob("partial_*.safetensors"))
    shutil.rmtree(tmp_path / "stats")


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT as POSIX systems send it")
@pytest.mark.parametrize("module", ["typer", "fastedit.cli.app", "fastedit.arch"])
def test_ctrl_c_during_an_import(module: str) -> None:
    code = (
        "import os, signal, sys, fastedit.cli\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['fastedit', 'models']\n"
        "fastedit.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
