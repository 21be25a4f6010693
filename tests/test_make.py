"""The two commands refuse an interpreter that is too old, in one line, before anything is made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(target: str, python: Path, folder: Path) -> tuple[int, list[str]]:
    command = ["make", target, f"VENV={folder / 'venv'}", f"PYTHON={python}"]
    # These tests may themselves run under make: what it hands down would make this one announce its directories.
    env = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    return done.returncode, [*done.stdout.splitlines(), *lines]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_an_old_python_is_named_in_one_line(target, tmp_path):
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\ntest "$1" = -V || exit 1\necho "Python 2.7.18" >&2\n')
    old.chmod(0o755)
    code, lines = make(target, old, tmp_path)
    assert code == 2
    assert len(lines) == 1
    assert "needs Python 3.10 to 3.14" in lines[0]
    assert "Python 2.7.18" in lines[0]
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_named(tmp_path):
    code, lines = make("test", tmp_path / "nothing", tmp_path)
    assert code == 2
    assert len(lines) == 1
    assert f"{tmp_path / 'nothing'} is missing" in lines[0]
