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
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
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
RATES = {"fp32": "fp32 TFLOP/s", "bf16": "bf16 TFLOP/s", "fp64": "fp64 TFLOP/s"}


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
    keep = ("backend", "dtype", "error", "ratio_to_reference", "flops", "bytes", "commit")
    seconds = bench["stats"]["median"]
    return {"case": bench["group"] or bench["name"], "seconds": seconds, **{k: info.get(k) for k in keep}}


def ceilings(path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        print("skipped: no device")
        return
    torch.backends.cuda.matmul.allow_tf32 = False

    def seconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(12):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times[4:])

    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        found[RATES[name]] = 2 * 8192**3 / seconds(lambda a=a, b=b: a @ b) / 1e12
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source)) / 1e9
    path.write_text(json.dumps(found))
    print("  ".join(f"{name} {value:.0f}" for name, value in found.items()))


def floor(bench: dict[str, Any], best: dict[str, float]) -> float | None:
    """Seconds that bytes and operations take at the device's best; the rate is that of the first dtype named."""
    rate = best.get(RATES.get((bench["dtype"] or "").split()[0] if bench["dtype"] else "", ""))
    if not best or rate is None or not bench["flops"]:
        return None
    return max(bench["flops"] / rate / 1e12, (bench["bytes"] or 0) / best["copy GB/s"] / 1e9)


def table(noted: dict[str, Any]) -> list[str]:
    best = noted.get("ceilings", {}).get("figures") or {}
    lines = [f"{name:<24} {part['status']:<11} {part['seconds']:4d} s" for name, part in noted.items()]
    lines += [f"ceiling {name}: {value:.1f}" for name, value in best.items()]
    benches = [b for name, part in noted.items() if name.startswith("op-") for b in part.get("figures", [])]
    width = max((len(b["case"]) for b in benches), default=0)
    for bench in benches:
        ratio, least = bench["ratio_to_reference"], floor(bench, best)
        line = f"{bench['case']:<{width}}  {bench['backend'] or '':<9} {1e3 * bench['seconds']:10.3f} ms"
        line += f"  {ratio:7.2f}x" if ratio else " " * 10
        line += f"  {100 * least / bench['seconds']:3.0f} % of floor" if least else ""
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
