"""`python bench/peak_memory.py rome|memit ours|twin [EDITS]`: peak memory of one solve, in a process of its own.

Prints one JSON line, in MB of 10^6 bytes of resident memory: what the statistics take, the peak of the solve above the
model and them, and above the model alone. Ours holds the statistics with their factors, as a store gives them; the
making of factors is counted on neither side, so the twin of ROME solves without C: its inverse is made once as well.
Two gradient steps: the second is the first with Adam's state, later ones hold nothing more. The twin solves one edit:
its search and its keys hold one at a time, and its K and R of 64 edits are 3 MB.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Blocks over 64 kB come from the system and go back to it, so that resident memory is live memory, on both sides.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
STEPS = 2


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def stored_statistics(ed: Any, layers: tuple[int, ...]) -> None:
    """Made-up statistics in a store on disk, their factors loaded, as after `fastedit stats`."""
    import engine_model as made

    from fastedit.stats import SecondMoment, StatisticsStore
    from fastedit.stats.provenance import Provenance, model_fingerprint, tokenizer_fingerprint

    folder = tempfile.mkdtemp(prefix="fastedit-bench-")
    atexit.register(shutil.rmtree, folder)
    store, arch = StatisticsStore(folder), ed.session.arch
    for layer in layers:
        name = arch.name("mlp_out", layer)
        origin = Provenance(
            module=name,
            dtype="float64",
            model_fingerprint=model_fingerprint(arch),
            tokenizer=tokenizer_fingerprint(ed.tokenizer),
        )
        store.put(SecondMoment(name, 1 << 20, made.made_up_moment(ed, layer) * (1 << 20), origin))
    ed.session.use_statistics(store)
    for layer in layers:
        ed.session.metric(arch.name("mlp_out", layer))


def prepared(ed: Any, method: str, who: str, edits: int) -> tuple[Callable[[], Any], int]:
    """The solve as a call, with statistics loaded, and the bytes it is predicted to take (ours; else 0)."""
    import engine_model as made
    from reference.memit import memit
    from reference.rome import rome

    hyper = {**(made.ROME if method == "rome" else made.MEMIT), "steps": STEPS}
    layers = (hyper.pop("layer"),) if method == "rome" else hyper.pop("layers")
    contexts = made.templates(((5, 10), (10, 10)) if method == "rome" else ((10, 5),))
    requests = made.facts(1 if method == "rome" else edits)
    arch = ed.session.arch
    if who == "ours":
        groups = tuple(contexts) if method == "rome" else ((contexts[0],), tuple(contexts[1:]))
        options = {"layers": layers, "context_templates": groups, "v_num_grad_steps": STEPS}
        stored_statistics(ed, layers)
        predicted = ed.estimate(requests, method, options)
        return lambda: ed.solve(requests, method, options), predicted.peak - predicted.statistics
    twins = [made.twin_request(ed.tokenizer, r, contexts) for r in requests[:1]]
    C = {layer: made.made_up_moment(ed, layer) for layer in layers}
    if method == "rome":
        name = arch.name("mlp_out", layers[0])
        return lambda: (C, rome(ed.model, twins[0], module=name, site=name, C=None, **hyper)), 0
    sites = {"module": f"{arch.row.block}.{arch.row.mlp_out}", "site": arch.row.block}
    return lambda: memit(ed.model, twins, layers=layers, **sites, C=C, **hyper), 0


def main(method: str, who: str, edits: int) -> None:
    root = Path(__file__).resolve().parents[1]
    # Last, as pytest does it: the repository's kernels/ must not stand in for another distribution.
    sys.path += [str(root / "bench"), str(root)]
    import engine_model as made
    import torch

    torch.set_num_threads(1)
    ed = made.editor()
    with torch.no_grad():
        # Libraries and lazily imported modules are no part of a solve.
        ed.model(input_ids=torch.tensor([[1, 2, 3]]))
    model = resident("VmRSS")
    solve, predicted = prepared(ed, method, who, edits)
    ready = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    solve()
    peak = resident("VmHWM")
    figures = {
        "statistics_mb": ready - model,
        "above_prepared_mb": peak - ready,
        "above_model_mb": peak - model,
        "predicted_mb": predicted / 1e6,
    }
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        # The C library reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64)
