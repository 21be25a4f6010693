"""Statistics of five layers of a GPT-2-medium-size random model: speed against five passes of the twin, memory.

Speed: process time on one thread. Ours collects over the whole corpus; the twin runs on every k-th of the batches it
would form over it and its time is scaled by padded tokens, which its cost is linear in. By default the corpus is small;
FASTEDIT_BENCH_TOKENS=50000 is the acceptance run (about 10 CPU-minutes).

Memory: a fresh process collects with results written to a directory; its peak resident size over what it held with the
model loaded is compared with 1.5 x the five matrices + one batch.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from reference.layer_stats import _batches, layer_second_moment

from fastedit.arch import resolve
from fastedit.stats import collect_statistics

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [8, 9, 10, 11, 12]
WIDTH, VOCABULARY, POSITIONS = 1024, 50257, 1024
FEATURES = 4 * WIDTH
BATCH_TOKENS = 1024
TOKENS = int(os.environ.get("FASTEDIT_BENCH_TOKENS", "2500"))
TWIN_BATCHES = 2 if TOKENS >= 20_000 else 1


def gpt2_medium() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=24, n_embd=WIDTH, n_head=16, vocab_size=VOCABULARY, n_positions=POSITIONS)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def documents(tokens: int) -> list[list[int]]:
    """Token ids of articles: log-normal lengths (median 350, as encyclopedia articles), cut at the model's limit."""
    rng = random.Random(0)
    found = []
    while tokens:
        length = min(max(10, int(rng.lognormvariate(5.86, 1.0))), POSITIONS, tokens)
        found.append([rng.randrange(VOCABULARY) for _ in range(length)])
        tokens -= length
    return found


def padded(batch: list[Any]) -> int:
    return len(batch) * max(map(len, batch))


def test_five_layers_against_five_passes(benchmark, one_thread):
    model = gpt2_medium()
    arch = resolve(model)
    rows = documents(TOKENS)
    plan = list(_batches(rows, 3 * POSITIONS))
    chosen = plan[len(plan) // (2 * TWIN_BATCHES) :: max(1, len(plan) // TWIN_BATCHES)][:TWIN_BATCHES]
    sample = [row for batch in chosen for row in batch]

    naive, expected = 0.0, {}
    for layer in LAYERS:
        module = arch.name("mlp_out", layer)
        start = time.process_time()
        parts = [layer_second_moment(model, module, batch, positions=POSITIONS) for batch in chosen]
        naive += time.process_time() - start
        expected[module] = (sum(total for total, _ in parts), sum(count for _, count in parts))
    scale = sum(map(padded, plan)) / sum(map(padded, chosen))

    checked = collect_statistics(model, None, arch, sample, LAYERS)
    for module, (total, count) in expected.items():
        ours = checked[module]
        error = float(torch.linalg.norm(ours.total - total) / torch.linalg.norm(total))
        assert ours.count == count and error <= 1e-5, f"{module}: {ours.count} {count} {error:.1e}"
    del checked, expected

    start = time.process_time()
    benchmark.pedantic(lambda: collect_statistics(model, None, arch, rows, LAYERS), rounds=1)
    seconds = time.process_time() - start
    ratio = naive * scale / seconds
    benchmark.extra_info.update(
        tokens=TOKENS,
        twin_tokens=sum(map(len, sample)),
        twin_padding=sum(map(padded, plan)) / TOKENS,
        ours_seconds=seconds,
        twin_seconds_scaled=naive * scale,
        ratio_to_reference=ratio,
        load=os.getloadavg()[0],
    )
    print(json.dumps(benchmark.extra_info))
    # One small batch per side leaves out the padding that a corpus brings the twin.
    assert ratio >= (4.0 if TOKENS >= 20_000 else 3.0), f"{ratio:.2f}x"


MEMORY = """
import json, resource, sys, tempfile
sys.path[:0] = [{root!r}, {root!r} + "/bench"]
import torch
import test_stats as bench
torch.set_num_threads(1)
model = bench.gpt2_medium()
arch = bench.resolve(model)
rows = bench.documents(4000)
# A forward of one row loads kernels and lazily imported modules, which are no part of a collection.
bench.collect_statistics(model, None, arch, [[1, 2, 3]], [0])
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with tempfile.TemporaryDirectory() as directory:
    bench.collect_statistics(
        model, None, arch, rows, bench.LAYERS,
        batch_tokens=bench.BATCH_TOKENS, directory=directory, checkpoint_seconds=0.0,
    )
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"before": before, "peak": peak}}))
"""


def test_peak_memory(benchmark):
    code = MEMORY.format(root=str(ROOT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = benchmark.pedantic(
        lambda: subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        ),
        rounds=1,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    matrices = len(LAYERS) * FEATURES**2 * 8
    # What a forward of one batch holds: the MLP's activation and its GELU's temporaries, and the layers' keys.
    batch = BATCH_TOKENS * FEATURES * 4 * (4 + len(LAYERS))
    used = found["peak"] - found["before"]
    benchmark.extra_info.update(
        found, used=used, matrices=matrices, batch=batch, used_over_matrices=used / matrices
    )
    print(json.dumps(benchmark.extra_info))
    assert used <= 1.5 * matrices + batch, f"{used / matrices:.2f} x the matrices"
