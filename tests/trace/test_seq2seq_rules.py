"""Tracing T5 under the rules that hold for every model: noise, runs that are not finite, folders of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_seq2seq import PREFIX, session_of

from fastedit.editor import Editor
from fastedit.session import Session
from fastedit.trace import Noise, TraceOptions, encode_trace, trace_prompts
from fastedit.trace.embeddings import corpus_moments
from fastedit.trace.facts import TraceFact
from fastedit.trace.study import trace_facts

TEXT, SUBJECT = "The sport of LeBron James is the", "LeBron James"
TEXTS = ["The Eiffel Tower is located in the city of Paris.", "Marie Curie worked in the field of physics."]
SIDES = ("encoder", "decoder")


@pytest.fixture
def made() -> Session:
    return session_of("v1.1", torch.float32)


@pytest.mark.parametrize(
    "rule",
    [
        {"distribution": "uniform", "scale": 0.5},
        {"per_dimension": True},
        {"distribution": "multivariate"},
        {"distribution": "student", "degrees": 4.0, "replace": True},
    ],
    ids=lambda rule: rule.get("distribution", "per dimension"),
)
@pytest.mark.parametrize("side", SIDES)
def test_every_noise_rule_gives_its_draws(made: Session, side: Any, rule: dict[str, Any]) -> None:
    noise = Noise(samples=3, **rule)
    prompt = encode_trace(made, TEXT, SUBJECT)
    options = TraceOptions(kinds=("hidden",), noise=noise, side=side)
    (found,) = trace_prompts(made, [prompt], options, texts=TEXTS if noise.needs_corpus else None)
    if noise.needs_corpus:
        measured: Any = corpus_moments(made.arch, made.tokenizer, TEXTS)
    else:
        # The special token at the end counts, as it does for the published code.
        ids = torch.tensor(made.tokenizer(SUBJECT)["input_ids"])
        measured = noise.scaled(made.arch, made.arch.embed.weight.detach()[ids])  # type: ignore[index,union-attr]
    drawn = noise.draw(prompt.span[1] - prompt.span[0], made.arch.width, measured)[0]
    (want,) = trace_prompts(made, [prompt], options, draws=[[drawn]])
    assert found.low_score == want.low_score != found.high_score
    assert np.array_equal(found.scores["hidden"], want.scores["hidden"])
    assert found.engine == "rows of one length"


def test_rules_of_a_corpus_need_one_and_draws_are_finite(made: Session) -> None:
    prompt = encode_trace(made, TEXT, SUBJECT)
    with pytest.raises(
        ValueError, match="texts must be the texts of a corpus for noise.distribution 'student'"
    ):
        trace_prompts(made, [prompt], TraceOptions(noise=Noise(distribution="student")))
    drawn = torch.full((1, prompt.span[1] - prompt.span[0], made.arch.width), float("inf"))
    with pytest.raises(ValueError, match="draws must be finite, got NaN or infinity"):
        trace_prompts(made, [prompt], draws=[[drawn]])


@pytest.mark.parametrize("side", SIDES)
def test_runs_that_are_not_finite(made: Session, side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit.trace.seq2seq_sweep import Side

    editor = Editor(made.model, made.tokenizer)
    prompt = encode_trace(made, TEXT, SUBJECT)
    options = TraceOptions(side=side, noise=Noise(replace=True))
    shape = (2, prompt.span[1] - prompt.span[0], made.arch.width)
    drawn = torch.full(shape, 1e39, dtype=torch.float64)  # more than float32 holds
    with pytest.raises(ValueError, match="noise: the corrupted runs of the prompt must be finite, got NaN"):
        trace_prompts(made, [prompt], options, draws=[[drawn]])
    real = Side.finals
    monkeypatch.setattr(Side, "finals", lambda *args: real(*args) * torch.nan)
    with pytest.raises(
        ValueError, match=r"model: a run with \w+ restored must be finite, got NaN .* at token"
    ):
        editor.trace(TEXT, SUBJECT, side=side, noise=Noise(samples=2))
    assert not any(m._forward_hooks or "forward" in vars(m) for m in made.model.modules())


def test_a_study_goes_on_and_says_what_differs(made: Session, tmp_path: Path) -> None:
    facts = [
        TraceFact("a", TEXT, SUBJECT, None),
        TraceFact("b", "{} works in the field of", "Marie Curie", None),
    ]
    options = TraceOptions(
        kinds=("hidden", "cross"),
        side="decoder",
        decoder_prefix=PREFIX,
        noise=Noise(samples=2, distribution="multivariate"),
    )
    first = trace_facts(made, facts, tmp_path, options, texts=TEXTS)
    (tmp_path / "cases" / "1.json").unlink()
    again = trace_facts(made, facts, tmp_path, options, texts=TEXTS)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.scores["cross"], other.scores["cross"])
    with pytest.raises(ValueError, match="side decoder, now encoder; decoder_prefix .*, now None"):
        other = TraceOptions(kinds=("hidden",), side="encoder", noise=options.noise)
        trace_facts(made, facts, tmp_path, other, texts=TEXTS)
