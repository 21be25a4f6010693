"""fastedit: edit what a language model knows, with compiled kernels under every method.

Importing the package defines names and does nothing else; the names below load their module on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastedit.edit import Edit
    from fastedit.editor import Editor
    from fastedit.ops._dispatch import backend, explain
    from fastedit.request import EditRequest

__all__ = ["Edit", "EditRequest", "Editor", "__version__", "backend", "explain"]

__version__ = "0.1.0"

_LAZY = {
    "Edit": "fastedit.edit",
    "EditRequest": "fastedit.request",
    "Editor": "fastedit.editor",
    "backend": "fastedit.ops._dispatch",
    "explain": "fastedit.ops._dispatch",
}

# The Triton sources live in kernels/ at the top of the repository and install as fastedit.kernels. In a checkout,
# which a CMakeLists.txt beside the package marks, this makes `import fastedit.kernels.x` find them; the folder has no
# __init__.py and must never be importable as a top-level `kernels` (that is another distribution's name).
_root = Path(__file__).resolve().parent.parent
if (_root / "CMakeLists.txt").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
