"""What bench/gpu.sh keeps between its parts, and the document and table it ends with.

check OUT             the device in one line; exit 1 where something is missing
has OUT PART          exit 0 if the part passed before
add OUT PART STATUS SECONDS JSON XML     note a part with its figures, where it left any
ceilings JSON         measure what the device gives at best
collect OUT           bench/results/<device>-<date>.json, a copy in OUT, and OUT/table.txt, printed
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pytest",
    "pytest_benchmark",
    "hypothesis",
)


def check() -> int:
    missing = [name for name in (*NEEDED, "pytest_timeout") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{sys.executable} lacks {', '.join(missing)}: install them, or set PYTHON to one that has them"
        )
        return 1
    import torch

    if not torch.cuda.is_available() and not os.environ.get("DRY"):
        print(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
        return 1
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device (DRY)"
    print(f"{name}, torch {torch.__version__}, {sys.executable}")
    return 0


def parts(out: Path) -> dict[str, Any]:
    path = out / "parts.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add(out: Path, part: str, status: str, seconds: int, benchmarks: Path, junit: Path) -> None:
    noted: dict[str, Any] = {"status": status, "seconds": seconds}
    # A run that was cut off leaves an empty file.
    if benchmarks.exists() and benchmarks.stat().st_size:
        found = json.loads(benchmarks.read_text())
        noted["figures"] = [row(bench) for bench in found["benchmarks"]] if "benchmarks" in found else found
    if junit.exists() and junit.stat().st_size:
        suite = ElementTree.parse(junit).getroot().find("testsuite")
        counts = {} if suite is None else suite.attrib
        noted["tests"] = {
            k: int(counts[k]) for k in ("tests", "failures", "errors", "skipped") if k in counts
        }
    known = {**parts(out), part: noted}
    temporary = out / "parts.json.new"
    temporary.write_text(json.dumps(known, indent=2) + "\n")
    temporary.replace(out / "parts.json")


def row(bench: dict[str, Any]) -> dict[str, Any]:
    """One line of an op bench: what conftest's bench_op put into extra_info, and the median."""
    info = bench["extra_info"]
    keep = (
        "backend",
        "dtype",
        "error",
        "ratio_to_reference",
        "flops",
        "bytes",
        "of_roofline",
        "peak_bytes",
        "commit",
    )
    seconds = info.get("seconds") or bench["stats"]["median"]  # the clock that ratio and fraction are from
    return {"case": bench["group"] or bench["name"], "seconds": seconds, **{k: info.get(k) for k in keep}}


def ceilings(path: Path) -> None:
    sys.path.append(str(ROOT / "bench"))
    import torch
    from ceilings import measure

    if not torch.cuda.is_available():
        print("skipped: no device")
        return
    found = measure("cuda")
    rates = {f"{unit} TFLOP/s": rate / 1e12 for unit, rate in found.flops.items()}
    rates["copy GB/s"] = found.bandwidth / 1e9
    path.write_text(json.dumps(rates))
    print("  ".join(f"{name} {value:.0f}" for name, value in rates.items()))


def table(noted: dict[str, Any]) -> list[str]:
    best = noted.get("ceilings", {}).get("figures") or {}
    lines = [f"{name:<24} {part['status']:<11} {part['seconds']:4d} s" for name, part in noted.items()]
    lines += [f"ceiling {name}: {value:.1f}" for name, value in best.items()]
    for section, figures in (noted.get("limits", {}).get("figures") or {}).items():
        lines += [f"{section}, {key}: {json.dumps(value)}" for key, value in figures.items()]
    benches = [b for name, part in noted.items() if name.startswith("op-") for b in part.get("figures", [])]
    width = max((len(b["case"]) for b in benches), default=0)
    for bench in benches:
        ratio, share = bench["ratio_to_reference"], bench["of_roofline"]
        line = f"{bench['case']:<{width}}  {bench['backend'] or '':<9} {1e3 * bench['seconds']:10.3f} ms"
        line += f"  {ratio:7.2f}x" if ratio else " " * 10
        line += f"  {100 * share:3.0f} % of roofline" if share else ""
        lines.append(line)
    return lines


def collect(out: Path) -> None:
    sys.path.append(str(ROOT / "bench"))
    import record
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = record.machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") if device == "cuda" else "dry"
    noted = parts(out)
    engines: dict[str, Any] = {}
    for path in sorted([*out.glob("*-engines.json"), *out.glob("*-seeing.json")]):
        engines |= json.loads(path.read_text())
    lines = table(noted)
    for section, figures in engines.items():
        shown = {k: v for k, v in figures.items() if isinstance(v, (int, float, str))}
        lines += [f"engines, {section}: " + ", ".join(f"{k} {v}" for k, v in shown.items())]
    document = json.dumps({"machine": about, "parts": noted, "engines": engines}, indent=2) + "\n"
    folders = {out} if device == "cpu" else {out, ROOT / "bench" / "results"}
    for folder in folders:
        (folder / f"{name}-{about['date']}.json").write_text(document)
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(command: str, *words: str) -> int:
    if command == "ceilings":
        ceilings(Path(words[0]))
        return 0
    out = Path(words[0])
    if command == "check":
        return check()
    if command == "has":
        return int(parts(out).get(words[1], {}).get("status") != "passed")
    if command == "add":
        add(out, words[1], words[2], int(words[3]), Path(words[4]), Path(words[5]))
    else:
        collect(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
