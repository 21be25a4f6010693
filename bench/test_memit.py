"""Eight MEMIT edits over five layers against the naive twin: one request at a time, full forwards, dense solves."""

from __future__ import annotations

from typing import Any

import pytest
from locate import TEMPLATES, edit_requests, editor, paired, second_moments
from reference.memit import memit as naive_memit
from reference.target_vector import Request

from fastedit.engine.problem import TokenOptions, build_problem, key_rows

LAYERS = (3, 4, 5, 6, 7)
STEPS = 5
EDITS = 8


@pytest.mark.usefixtures("one_thread")
def test_eight_edits(benchmark: Any) -> None:
    ed = editor()
    moments = second_moments(ed, LAYERS)
    requests = edit_requests(EDITS)
    options = {
        "layers": LAYERS,
        "v_num_grad_steps": STEPS,
        "v_lr": 0.1,
        "context_templates": (TEMPLATES[:1], TEMPLATES[1:]),
        "mom2_update_weight": 100.0,
    }
    twins = []
    for request in requests:
        problem = build_problem(ed.tokenizer, request, TEMPLATES, TokenOptions())
        rows = key_rows(ed.tokenizer, request, TEMPLATES, TokenOptions())
        twins.append(
            Request(
                rows=[list(row.ids) for row in rows],
                lookup=[row.lookup for row in rows],
                target=list(problem.target),
                kl_row=list(problem.essence.ids),
                kl_lookup=problem.essence.lookup,
                groups=(1, len(TEMPLATES) - 1),
            )
        )
    arch = ed.session.arch

    def ours() -> Any:
        return ed.solve(requests, "memit", options).deltas

    def naive() -> Any:
        return naive_memit(
            ed.model,
            twins,
            layers=LAYERS,
            module=f"{arch.row.block}.{arch.row.mlp_out}",
            site=arch.row.block,
            C=moments,
            lam=100.0,
            steps=STEPS,
            lr=0.1,
        )

    fast, slow, deltas, expected = paired(ours, naive, rounds=1)
    error = max(
        float((delta.dense().double() - expected[layer]).norm() / expected[layer].norm())
        for layer, delta in zip(LAYERS, deltas, strict=True)
    )
    assert error <= 5e-3, f"relative error {error:.1e}"
    benchmark.extra_info.update(seconds=fast, reference_seconds=slow, ratio=slow / fast, error=error)
    benchmark.pedantic(ours, rounds=1)
    print(f"\nMEMIT, {EDITS} edits: {fast:.2f} s, twin {slow:.2f} s, {slow / fast:.1f}x, error {error:.0e}")
