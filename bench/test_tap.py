"""Inputs and output gradients of the linears that MEND, MALMEN and UltraEdit edit, against plain autograd.

Two twins: every weight requires a gradient, as in MEND's and MALMEN's trainers, or only the edited ones (UltraEdit).
Both make the dense gradients and the logits of every token.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference.tap
import torch
from locate import edit_requests, editor, paired

from fastedit.engine.tap import TapBatch, tap
from fastedit.tokens import encode_edit, target_ids

REQUESTS = 32
SETS = {
    "mend": [(site, layer) for layer in (9, 10, 11) for site in ("mlp_in", "mlp_out")],
    "malmen": [("mlp_out", layer) for layer in range(6, 12)],
    "ultraedit": [("mlp_out", layer) for layer in range(8, 12)],
}


@pytest.mark.parametrize("every_weight", [True, False], ids=["all-weights", "edited-weights"])
@pytest.mark.parametrize("method", SETS)
@pytest.mark.usefixtures("one_thread")
def test_tap(benchmark: Any, method: str, every_weight: bool) -> None:
    ed = editor()
    arch, tokenizer = ed.session.arch, ed.tokenizer
    rows = [
        encode_edit(tokenizer, r.prompt, r.subject, target=target_ids(tokenizer, r.target_new))
        for r in edit_requests(REQUESTS)
    ]
    batch = TapBatch.of(rows)
    names = [arch.name(site, layer) for site, layer in SETS[method]]
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}

    def ours() -> Any:
        return tap(arch, batch, names, reduction="batch_mean")

    def naive() -> Any:
        return reference.tap.tap(
            ed.model, inputs, batch.labels, names, reduction="batch_mean", every_weight=every_weight
        )

    ours(), naive()
    fast, slow, found, (twin, losses) = paired(ours, naive, rounds=7)
    real = batch.mask.bool()
    error = max(
        float((ours_ - twin_).norm() / twin_.norm())
        for name in names
        for ours_, twin_ in (
            (found[name].inputs, twin[name][0][real]),
            (found[name].grads, twin[name][1][real]),
        )
    )
    assert error <= 1e-5, f"relative error {error:.1e}"
    assert torch.allclose(found.losses, losses, rtol=1e-5, atol=0)
    benchmark.extra_info.update(seconds=fast, reference_seconds=slow, ratio=slow / fast, error=error)
    benchmark.pedantic(ours, rounds=3)
    print(
        f"\ntap {method}, {REQUESTS} requests, twin with {'all' if every_weight else 'edited'} weights' gradients: "
        f"{1e3 * fast:.0f} ms, twin {1e3 * slow:.0f} ms, {slow / fast:.1f}x, error {error:.0e}"
    )
