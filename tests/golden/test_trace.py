"""Causal traces of the original code: the same noise, kinds, windows, rules and severed runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden.golden import Case, case_names, load_case, load_model

from fastedit.session import Session
from fastedit.trace import CausalTrace, Noise, TraceOptions, encode_trace, trace_prompts
from fastedit.trace.embeddings import subject_embeddings

NAMES = case_names("trace-gpt2-facts", "trace-gptj-facts", "trace-llama-facts")
TOLERANCE = 1e-5


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


def traced(case: Case, combo: dict[str, Any], **options: Any) -> CausalTrace:
    model, tokenizer = load_model(case.model)
    session = Session(model, tokenizer)
    prompt = encode_trace(session, case.meta["prompt"], case.meta["subject"])
    noise = Noise(
        scale=case.meta["noise"],
        samples=combo.get("samples", 10),
        distribution="uniform" if combo.get("uniform_noise") else "gaussian",
        replace=combo.get("replace", False),
        redraw=options.pop("redraw", False),
    )
    settings = {
        "kinds": (combo["kind"] or "hidden",),
        "window": combo.get("window", 10),
        "tokens": combo.get("token_range", "all"),
        **options,
    }
    return trace_prompts(session, [prompt], TraceOptions(noise=noise, **settings))[0]


def test_every_combination(case: Case) -> None:
    for name, combo in case.meta["combos"].items():
        found = traced(case, combo)
        kind = combo["kind"] or "hidden"
        assert list(found.input_ids) == case.arrays["input_ids"].tolist()
        assert list(found.subject_range) == combo["subject_range"]
        assert found.answer == combo["answer"]
        assert np.abs(found.scores[kind] - case.arrays[f"{name}/scores"]).max() <= TOLERANCE, name
        assert abs(found.high_score - case.arrays[f"{name}/high_score"]) <= TOLERANCE
        # The published code forgets the replacement when it takes the low score.
        plain = traced(case, {**combo, "replace": False}) if combo.get("replace") else found
        assert abs(plain.low_score - case.arrays[f"{name}/low_score"]) <= TOLERANCE


def test_severed_at_the_subjects_last_token(case: Case) -> None:
    found = traced(case, {"kind": "severed_mlp"}, tokens="subject_last", redraw=True)
    difference = found.scores["severed_mlp"][0] - case.arrays["severed_mlp_subjlast"]
    assert np.abs(difference).max() <= TOLERANCE


def test_scale_of_the_noise(case: Case) -> None:
    model, tokenizer = load_model(case.model)
    session = Session(model, tokenizer)
    embeddings = subject_embeddings(session.arch, tokenizer, case.meta["std_subjects"])
    scale = Noise().scaled(session.arch, embeddings)
    assert float(scale) == pytest.approx(case.meta["noise"], rel=1e-6)
