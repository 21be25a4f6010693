"""Every module says what it offers: `__all__` is present and true, what it lists is annotated and documented."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "fastedit").rglob("*.py") if p.name != "__main__.py")
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def listed(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            return list(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return None


def public_functions(tree: ast.Module) -> list[tuple[str, Function, bool]]:
    """(qualified name, node, is a method) of public functions and of public methods of public classes."""
    found: list[tuple[str, Function, bool]] = []
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            found.append((node.name, node, False))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [n for n in node.body if isinstance(n, Function) and not n.name.startswith("_")]
            found.extend((f"{node.name}.{n.name}", n, True) for n in methods)
    return found


def unannotated(node: Function, method: bool) -> list[str]:
    a = node.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if method and not static:
        arguments = arguments[1:]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    return missing if node.returns is not None else [*missing, "return"]


@pytest.mark.parametrize("path", MODULES + KERNELS, ids=module_name)
def test_all_is_present_and_lists_what_is_public(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = listed(tree)
    assert names is not None, "define __all__"
    assert len(set(names)) == len(names), "a name is listed twice"
    defined = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, *Function.__args__)) and not node.name.startswith("_")
    ]
    assert set(defined) <= set(names), f"public but not in __all__: {sorted(set(defined) - set(names))}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_all_is_true(path):
    module = importlib.import_module(module_name(path))
    for name in module.__all__:
        assert hasattr(module, name), f"__all__ lists {name}, which does not exist"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_public_functions_are_annotated_and_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "give the module a docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for name, node, method in public_functions(tree):
        overload = any(ast.unparse(d).endswith(("overload", ".setter")) for d in node.decorator_list)
        assert ast.get_docstring(node) or overload, f"{name} has no docstring"
        assert not unannotated(node, method), f"{name}: not annotated: {unannotated(node, method)}"
