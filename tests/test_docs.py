"""The documents say what is true: links resolve, files exist, every method and environment variable is listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from fastedit import methods
from fastedit.arch import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(
        r"`((?:fastedit|bench|tests|csrc|kernels|docs)/[\w./-]+\.(?:py|md|cpp|cu|h|npz))`", text
    )
    placeholders = {"foo", "bar", "bar_kernel", "test_foo", "test_bar"}
    for path in paths:
        if Path(path).stem not in placeholders and not path.startswith("bench/results/"):
            assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_readme_lists_every_method_with_its_modes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for key in methods.names():
        spec = methods.get(key)
        cells = ["yes" if mode in spec.modes else "" for mode in methods.MODES]
        row = [f"`{key}`", spec.paper, *cells]
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
        assert row in lines, f"README's table lacks the row {row}"


def test_readme_lists_every_architecture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [key for key in ARCHITECTURES if not re.search(rf"\b{key}\b", text)] == []


def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    code = block[1]
    for large, tiny in (("range(13, 18)", "range(1, 3)"), ("layers=[17]", "layers=[1], v_num_grad_steps=3")):
        assert large in code
        code = code.replace(large, tiny)
    texts = [f"The {a} of {b} is located in the city of Paris." for a in "abcdefgh" for b in "ijkl"]
    monkeypatch.chdir(tmp_path)
    exec(code, {"model": tiny_model("gpt2"), "tokenizer": tiny_tokenizer(), "texts": texts})
    assert "rewrite" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "rome.safetensors"]


def test_every_environment_variable_is_documented():
    read = set()
    sources = [*(ROOT / "fastedit").rglob("*.py"), *(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"(?:environ\S*?|getenv)[\[(]\s*\"(FASTEDIT_\w+)\"", text))
    assert read
    documented = (ROOT / "ENV.md").read_text(encoding="utf-8")
    assert [variable for variable in sorted(read) if f"`{variable}`" not in documented] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_place_is_left_to_be_filled(page):
    assert not re.findall(r"<!--|\{[A-Z_]{4,}\}|TBD", page.read_text(encoding="utf-8")), name(page)
