"""One ROME edit with 21 contexts, C factored before, against the naive twin: full forwards, an inverse an edit."""

from __future__ import annotations

from typing import Any

import pytest
from locate import TEMPLATES, edit_requests, editor, paired, second_moments
from reference.rome import rome as naive_rome
from reference.target_vector import Request

from fastedit.engine.problem import TokenOptions, build_problem, key_rows

LAYER = 4
STEPS = 5
CONTEXTS = (TEMPLATES * 4)[:21]


@pytest.mark.usefixtures("one_thread")
def test_one_edit(benchmark: Any) -> None:
    ed = editor()
    moment = second_moments(ed, (LAYER,))[LAYER]
    (request,) = edit_requests(1)
    options = {
        "layers": (LAYER,),
        "v_num_grad_steps": STEPS,
        "context_templates": ("{}", *CONTEXTS[1:]),
        "v_lr": 0.1,
    }
    problem = build_problem(ed.tokenizer, request, CONTEXTS, TokenOptions())
    rows = key_rows(ed.tokenizer, request, CONTEXTS, TokenOptions())
    twin = Request(
        rows=[list(row.ids) for row in rows],
        lookup=[row.lookup for row in rows],
        target=list(problem.target),
        kl_row=list(problem.essence.ids),
        kl_lookup=problem.essence.lookup,
    )
    arch = ed.session.arch

    def ours() -> Any:
        return ed.solve(request, "rome", options).deltas[0].dense().double()

    def naive() -> Any:
        return naive_rome(
            ed.model,
            twin,
            module=arch.name("mlp_out", LAYER),
            site=arch.name("mlp_out", LAYER),
            C=moment,
            steps=STEPS,
            lr=0.1,
        )

    fast, slow, delta, expected = paired(ours, naive, rounds=1)
    error = float((delta - expected).norm() / expected.norm())
    assert error <= 2e-3, f"relative error {error:.1e}"
    benchmark.extra_info.update(seconds=fast, reference_seconds=slow, ratio=slow / fast, error=error)
    benchmark.pedantic(ours, rounds=1)
    print(f"\nROME, one edit: {fast:.2f} s, twin {slow:.2f} s, {slow / fast:.1f}x, error {error:.0e}")
