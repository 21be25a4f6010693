"""The report behind `fastedit doctor`: versions, what was built, what could be, and which kernel each op would run."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastedit.ops import _dispatch

__all__ = ["collect"]


def collect() -> dict[str, Any]:
    """JSON-able. Starts nothing on a GPU and builds nothing; loading the native modules is its only side effect."""
    from fastedit import __version__

    return {
        "fastedit": __version__,
        "transformers": _version("transformers"),
        **_dispatch.report(),
        "c++": _which("c++", "CXX"),
        "nvcc": _which("nvcc", "CUDACXX"),
    }


def _which(name: str, override: str) -> str:
    return shutil.which(os.environ.get(override) or name) or "not found"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
