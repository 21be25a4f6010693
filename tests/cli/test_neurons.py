"""`fastedit neurons`: table, JSON, files, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Run
from tiny import tiny_model, tiny_tokenizer

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
        (("--steps", 0), "--steps must be an integer from 1 to 100000, got 0"),
        (("--steps", "many"), "--steps must be an integer, got 'many'"),
        (("--grid", "x"), "--grid must be one of left, right, ends, got 'x'"),
        (("--activation", "x"), "--activation must be one of activation, pre_activation, got 'x'"),
        (
            ("--answer", "a", "--continuation", "x"),
            "--continuation must be one of argmax, answer, fixed, got 'x'",
        ),
        (("--continuation", "fixed"), "--continuation needs --answer, got 'fixed' without one"),
        (("--threshold", 1), "--threshold must be a number from 0 to 1, 1 excluded, got 1.0"),
        (("--threshold", -0.5), "--threshold must be a number from 0 to 1, 1 excluded, got -0.5"),
        (("--threshold", "nan"), "--threshold must be a number from 0 to 1, 1 excluded, got nan"),
        (("--share", 2), "--share must be a number from 0 to 1, 1 excluded, got 2.0"),
        (("--layers", "99"), "layer: must be an integer from 0 to 3, got 99"),
        (("--layers", "a"), "--layers must look like 3,4,5 or 3-8, got 'a'"),
        (("--memory", "much"), "--memory must be a size like 500MB or 2GB, got 'much'"),
        (("--memory", "0"), "--memory must be a size like 500MB or 2GB, got '0'"),
        (("--top", 0), "--top must be at least 1, got 0"),
        (("--answer", " "), "--answer must not be blank, got ' '"),
        (("--prompt", ""), "--prompt must not be empty"),
        (("--prompt", "word " * 200), "prompts: "),
        (("--force",), "--force needs --out or --plot, got neither"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_bad_options_are_one_line(
    fastedit: Run, home: Path, options: tuple[object, ...], message: str
) -> None:
    fastedit("neurons", "--model", home / "model", *PROMPTS, *options).refused(message)


def test_a_share_needs_several_prompts(fastedit: Run, home: Path) -> None:
    result = fastedit("neurons", "--model", home / "model", *PROMPTS[:2], "--share", 0.5)
    result.refused("--share needs several --prompt, got 0.5 with one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "n.txt"), "--out must end in .json or .npz"),
        (("--out", "there.npz"), "--out must not exist (--force replaces it)"),
        (("--out", "none/n.npz"), "--out must lie in a folder that exists"),
        (("--out", "folder.npz", "--force"), "--out must be a file"),
        (("--plot", "n.pdf"), "--plot must end in .png or .svg"),
        (("--plot", "there.png"), "--plot must not exist (--force replaces it)"),
        (("--plot", "none/n.svg"), "--plot must lie in a folder that exists"),
    ],
)
def test_files_are_checked_before_the_model_is_opened(
    fastedit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_text("old")
    (tmp_path / "there.png").write_text("old")
    (tmp_path / "folder.npz").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    # There is no such model, and nobody looks for it.
    fastedit("neurons", "--model", "no/where/at/all", *PROMPTS, *options).refused(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.npz").read_text() == "old"


def test_force_replaces_both_files(fastedit: Run, home: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "n.npz", tmp_path / "n.png"
    out.write_text("old")
    plot.write_text("old")
    files = ("--out", out, "--plot", plot, "--force")
    result = fastedit("neurons", "--model", home / "model", *PROMPTS, "--steps", 2, *files)
    assert result.code == 0, result.err
    assert f"saved {out}" in result.out and f"saved {plot}" in result.out
    assert Neurons.load(out).options["steps"] == 2 and plot.read_bytes().startswith(b"\x89PNG")


def test_the_list_has_the_length_asked_for_and_a_budget_is_taken(fastedit: Run, home: Path) -> None:
    arguments = ("neurons", "--model", home / "model", *PROMPTS, "--steps", 3, "--top", 3, "--json")
    report = fastedit(*arguments, "--memory", "1MB", "--share", 0.2).json
    assert len(report["top"]) == 3 and report["files"] == []
    assert report["options"]["memory"] == 1_000_000 and report["options"]["p"] == 0.2


def test_a_stopped_run_leaves_no_file(
    fastedit: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastedit.trace.neurons_sweep.NeuronSweep.run", stop)
    result = fastedit("neurons", "--model", home / "model", *PROMPTS, "--out", tmp_path / "n.npz")
    assert result.code == 130 and result.err == "interrupted\n" and not list(tmp_path.iterdir())


def test_a_broken_model_leaves_no_file(fastedit: Run, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "n.npz"
    result = fastedit("neurons", "--model", tmp_path / "model", *PROMPTS, "--answer", "the", "--out", out)
    result.refused("prompts: the model gives NaN or infinity in a clean run")
    assert not out.exists()


def test_bert_from_a_folder(fastedit: Run, tmp_path: Path) -> None:
    """A masked language model is read, and edited with kn, at its mask token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    arguments = ("neurons", "--model", tmp_path / "bert", "--steps", 3, "--json")
    found = fastedit(*arguments, "--prompt", "The Eiffel Tower is in [MASK] today", "--answer", "the")
    assert found.code == 0, found.err
    assert found.json["neurons"]
    fastedit(*arguments, "--prompt", "The Eiffel Tower is in").refused("prompts must hold the mask token")


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
