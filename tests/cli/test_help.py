"""Help, version and listings: quick to start, complete, with an example for every command."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from command_line import Run

import fastedit as package
from fastedit import methods
from fastedit.arch import ARCHITECTURES
from fastedit.cli.app import _COMMANDS, build


def test_real_entry_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from fastedit.cli import run; code = run(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in _COMMANDS:
        assert f" {name} " in done.stdout


def test_real_entry_errors_are_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "fastedit", "edit"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Missing option '--model'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_has_help_and_an_example(fastedit: Run, name: str) -> None:
    result = fastedit(name, "--help")
    assert result.code == 0 and result.err == ""
    assert f"Example: fastedit {name}" in result.out


def test_examples_parse() -> None:
    """The options of every example exist: parsed, not run."""
    command = build()
    for name, (_, example) in _COMMANDS.items():
        words = shlex.split(example)
        assert words[:2] == ["fastedit", name]
        command.commands[name].make_context(name, words[2:])


def test_version_and_no_arguments(fastedit: Run) -> None:
    assert fastedit("--version").out == f"fastedit {package.__version__}\n"
    bare = fastedit()
    assert bare.code == 0 and "Usage: fastedit" in bare.out


def test_listings_are_the_registries(fastedit: Run) -> None:
    listed = fastedit("methods", "--json").json["methods"]
    assert [item["name"] for item in listed] == methods.names()
    assert all(item["paper"].startswith("arXiv:") and item["options"] for item in listed)
    rows = fastedit("models", "--json").json["models"]
    assert [row["model_type"] for row in rows] == list(ARCHITECTURES)
    tables = fastedit("methods").out + fastedit("models").out
    for name in (*methods.names(), *ARCHITECTURES):
        assert name in tables


def test_doctor_names_every_op(fastedit: Run) -> None:
    report = fastedit("doctor", "--json").json
    assert report["fastedit"] == package.__version__
    for candidates in report["ops"].values():
        assert sum(row["chosen"] for row in candidates) == 1
        assert all(row["reason"] for row in candidates)
    table = fastedit("doctor").out
    for word in ("fastedit._cpu", "torch", "implementation", *report["ops"]):
        assert word in table
