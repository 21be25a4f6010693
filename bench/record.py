"""Where the figures of long benches go: a JSON document a machine, a section a bench, each with its commit and day."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["directory", "machine", "write"]

_ROOT = Path(__file__).resolve().parents[1]


def directory() -> Path:
    """FASTEDIT_BENCH_RESULTS, else bench/results."""
    return Path(os.environ.get("FASTEDIT_BENCH_RESULTS") or _ROOT / "bench" / "results")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": name or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def _commit() -> str:
    """FASTEDIT_COMMIT where the sources come without their history; "+" marks uncommitted changes to the code."""
    if given := os.environ.get("FASTEDIT_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "fastedit", "kernels", "csrc") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def write(document: str, section: str, figures: dict[str, Any], device: str = "cpu") -> Path:
    """Put one bench's figures under its name into `document`.json; the other sections stay."""
    path = directory() / f"{document}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[section] = {"machine": machine(device), **rounded(figures)}
    path.write_text(json.dumps(known, indent=2) + "\n")
    return path


def rounded(value: Any) -> Any:
    """Four significant digits: what was measured is not better than that."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
