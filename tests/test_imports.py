"""The house rules that can be read off the sources: which way imports go, what importing does, how long files are.

kernels, csrc <- ops <- (request, tokens, arch, config) <- edit, stats, engine, session <- methods, trace, train
              <- evaluate, export, integrations, world, editor <- cli
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastedit"

# A module may import from its own level and from lower ones. A new top-level module needs a line here.
LEVELS = {
    "kernels": 0,
    "_cpu": 0,
    "_cuda": 0,
    "ops": 1,
    "atomic_file": 2,
    "request": 2,
    "readers": 2,
    "tokens": 2,
    "arch": 2,
    "arch_table": 2,
    "doctor": 2,
    "forward": 2,
    "config": 2,
    "delta": 3,
    "application": 3,
    "compose": 3,
    "edit": 3,
    "edit_file": 3,
    "stats": 3,
    "engine": 3,
    "session": 3,
    "methods": 4,
    "trace": 4,
    "train": 4,
    "evaluate": 5,
    "export": 5,
    "integrations": 5,
    "world": 5,
    "editor": 5,
    "cli": 6,
    "__main__": 6,
}
# Upward, inside a function only: conveniences on a user's handle.
LAZY_UPWARD = {("edit", "export")}

# What the waist may import from outside: it never sees a model, a tokenizer or a configuration.
FOREIGN_TO_OPS = {
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "accelerate",
    "typer",
    "rich",
    "matplotlib",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def module_name(path: Path) -> str:
    if path.parent.name == "kernels":
        return f"fastedit.kernels.{path.stem}"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module, imported at import time) of every import that runs; TYPE_CHECKING blocks do not run."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{stem}.{base}" if base else stem
            # `from fastedit import edit` imports a module as well as a name
            found.extend((f"{base}.{a.name}" if base == "fastedit" else base, top) for a in node.names)
        elif is_type_checking(node):
            for child in node.orelse:  # type: ignore[attr-defined]
                visit(child, top)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                visit(child, top and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def unit(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "fastedit" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES + KERNELS, ids=module_name)
def test_imports_go_one_way(path):
    own = unit(module_name(path))
    if own is None:
        return  # fastedit/__init__.py names its lazy exports by string
    assert own in LEVELS, f"{own}: give it a level in tests/test_imports.py"
    for module, at_import in imports(path):
        other = unit(module)
        if other is None or other not in LEVELS:
            continue
        upward = LEVELS[other] > LEVELS[own]
        lazy = not at_import and (own, other) in LAZY_UPWARD
        assert not upward or lazy, f"{module_name(path)} imports {module}, which is above it"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "ops"] + KERNELS, ids=module_name)
def test_ops_see_tensors_only(path):
    seen = {module.split(".")[0] for module, _ in imports(path)}
    assert not seen & FOREIGN_TO_OPS


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_optional_packages_are_imported_late(path):
    optional = {"triton", "matplotlib", "peft", "datasets", "accelerate", "yaml"}
    early = {module.split(".")[0] for module, at_import in imports(path) if at_import}
    assert not early & optional


def test_shipped_code_imports_no_tests_or_bench():
    outside = {p.stem for p in (ROOT / "tests").glob("*.py")} | {"reference", "bench", "tests", "cases"}
    for path in SOURCES + KERNELS:
        assert not {module.split(".")[0] for module, _ in imports(path)} & outside, path


def test_files_are_short_and_named_for_what_they_hold():
    folders = ("fastedit", "kernels", "csrc", "bench", "tests", "docs")
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds and "build" not in path.parts:
                assert path.stem not in ("utils", "util", "helpers", "misc"), path
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines, at most 600"


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


SNAPSHOT = """
import importlib, json, logging, os, random, sys
import numpy, torch
def snapshot():
    root = logging.getLogger()
    return {
        "torch rng": torch.random.get_rng_state().sum().item(),
        "numpy rng": str(numpy.random.get_state()),
        "python rng": hash(random.getstate()),
        "logging": [repr(handler) for handler in root.handlers] + [root.level],
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "environment": sorted(os.environ.items()),
    }
def report(start, *packages):
    end = snapshot()
    loaded = [name for name in packages if name in sys.modules]
    print(json.dumps({"loaded": loaded, "changed": [key for key in start if start[key] != end[key]]}))
"""

IMPORT_PACKAGE = """
start = snapshot()
import fastedit
report(start, "triton", "transformers", "matplotlib", "typer", "peft")
"""

# Others' imports are not ours to answer for: transformers' model classes set an environment variable and bring Triton
# along (that no file of ours imports it is checked on the sources, above), rich draws random numbers.
IMPORT_MODULES = """
import rich.progress
from transformers import AutoModelForCausalLM, PreTrainedModel
start = snapshot()
for name in sys.argv[1:]:
    importlib.import_module(name)
report(start, "matplotlib", "peft", "datasets")
"""


def run_python(code: str, *arguments: str) -> dict[str, list[str]]:
    command = [sys.executable, "-c", SNAPSHOT + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_importing_fastedit_does_nothing():
    assert run_python(IMPORT_PACKAGE) == {"loaded": [], "changed": []}


def test_importing_every_module_does_nothing():
    names = [module_name(path) for path in SOURCES if path.name != "__main__.py"]
    assert run_python(IMPORT_MODULES, *names) == {"loaded": [], "changed": []}
