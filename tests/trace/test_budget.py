"""Memory: what a sweep takes stays below the budget, and the budget changes no result."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer
from torch.profiler import ProfilerActivity, profile

from fastedit.editor import Editor
from fastedit.trace import Noise

T5 = {"d_model": 128, "d_ff": 512, "num_decoder_layers": 4, "decoder_start_token_id": 1}
TEXT, SUBJECT = "the city of Paris is", "Paris"


def peak_bytes(call: Callable[[], Any], file: Path) -> int:
    """Most bytes of tensors that were there at once during a call, from the allocator's own record of every tensor.

    Nothing of the process counts but what the call allocates, and cycles are not collected: what they would keep alive
    counts too.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            call()
    finally:
        gc.enable()
    record.export_chrome_trace(str(file))
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        ((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"),
        key=lambda event: event[0],
    )
    peaks = np.cumsum([size for _, size in changes])
    # All of it went back with the result.
    assert abs(int(peaks[-1])) < 100_000
    return int(peaks.max())


@pytest.mark.parametrize(
    ("name", "shape", "side"),
    [
        ("gpt2", {"n_embd": 128, "n_inner": 512}, None),
        ("gpt2", {"n_embd": 64, "n_inner": 128, "vocab_size": 30_000}, None),
        ("gemma2", {"hidden_size": 64, "intermediate_size": 192, "head_dim": 64}, None),
        ("bloom", {"hidden_size": 128}, None),
        ("t5", T5, "encoder"),
        ("t5", T5, "decoder"),
    ],
    ids=["gpt2", "large vocabulary", "wide heads", "padded rows", "encoder", "decoder"],
)
def test_peak_stays_below_the_budget(name: str, shape: dict[str, int], side: Any, tmp_path: Path) -> None:
    editor = Editor(tiny_model(name, **shape), tiny_tokenizer())
    options: dict[str, Any] = {
        "kinds": ("hidden", "mlp"),
        "window": 3,
        "tokens": "all" if side == "decoder" else "subject_last",
        "noise": Noise(samples=600 if name == "t5" else 150),
        "side": side,
    }
    editor.trace(TEXT, SUBJECT, **{**options, "noise": Noise(samples=1)})
    found = []
    for memory in (16_000_000, 40_000_000):
        peak = peak_bytes(
            lambda m=memory: editor.trace(TEXT, SUBJECT, memory=m, **options), tmp_path / "t.json"
        )
        assert peak <= memory
        found.append(peak)
    # More memory is used where it helps.
    assert found[0] < found[1]


@pytest.mark.parametrize("memory", [1, 300_000, 2_000_000])
def test_samples_in_parts_give_the_same(memory: int) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    options = {"window": 3, "noise": Noise(samples=5), "kinds": ("hidden", "mlp", "attn", "severed_mlp")}
    whole, parts = (editor.trace(TEXT, SUBJECT, memory=m, **options) for m in (10**9, memory))
    assert abs(whole.low_score - parts.low_score) <= 1e-6 and whole.high_score == parts.high_score
    first = whole.subject_range[0]
    for kind in whole.kinds:
        assert np.abs(whole.scores[kind] - parts.scores[kind]).max() <= 1e-6
        assert (parts.scores[kind][:first] == parts.low_score).all()
    assert (parts.scores["hidden"][:-1, -1] == parts.low_score).all()
    assert parts.scores["hidden"][-1, -1] == parts.high_score
