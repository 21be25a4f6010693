"""What stops a study leaves nothing behind; and a folder's traces are believed only where they are the facts'."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_seq2seq import PREFIX, session_of

from fastedit.session import Session
from fastedit.trace import CausalTrace, Noise, TraceOptions
from fastedit.trace.facts import TraceFact
from fastedit.trace.study import Study, read_study, trace_facts

FACTS = [
    TraceFact("tower", "The {} is located in the city of", "Eiffel Tower"),
    TraceFact("sport", "LeBron James plays the sport of", "LeBron James"),
    TraceFact("sea", "Marie Curie lives by the sea of", "Marie Curie", "the"),
]
OPTIONS = TraceOptions(kinds=("hidden", "mlp"), window=2, noise=Noise(samples=2))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(tiny_model("gpt2"), tiny_tokenizer())


@pytest.fixture(scope="module")
def done(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("study") / "done"
    trace_facts(session, FACTS, home, OPTIONS)
    return home


@pytest.mark.parametrize("name", ["side", "decoder_prefix"])
def test_an_option_of_other_models(session: Session, tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {name: "encoder"}
    options = replace(OPTIONS, **changes)
    with pytest.raises(ValueError, match=f"{name} must be None for a model that is no encoder-decoder"):
        Study(session, FACTS, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert len(trace_facts(session, FACTS[:1], tmp_path / "out", OPTIONS)) == 1


def test_a_masked_model(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="model: causal tracing needs a causal language model"):
        Study(Session(tiny_model("bert"), tiny_tokenizer()), FACTS, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        trace_facts(Session(model, tiny_tokenizer()), FACTS, tmp_path / "out", OPTIONS)
    student = replace(OPTIONS, noise=Noise(samples=2, distribution="student"))
    with pytest.raises(ValueError, match="texts must be the texts of a corpus"):
        trace_facts(Session(tiny_model("gpt2"), tiny_tokenizer()), FACTS, tmp_path / "out", student)
    assert not (tmp_path / "out").exists()


def changed(home: Path, number: int, **values: Any) -> None:
    file = home / "cases" / f"{number}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scores": {}}, "scores must hold one or more kinds, got none"),
        ({"traced": []}, r"traced must be one or more tokens from 0 to \d+, got \[\]"),
        ({"traced": [99]}, r"traced must be one or more tokens from 0 to \d+, got \[99\]"),
        ({"input_tokens": ["a"]}, r"input_tokens must be as many as input_ids, \d+, got 1"),
        ({"scores": {"hidden": [[0.5, 0.5]]}}, r"scores of hidden must be of shape \[\d+, 2\], got \[1, 2\]"),
        ({"scores": {"hidden": 0.5}}, r"scores of hidden must be of shape \[\d+, 1\], got \[\]"),
        ({"scores": {"block": [[0.5]]}}, "scores must be of hidden, .*, got 'block'"),
        ({"scores": {"hidden": [[0.5], [0.5, 0.5]]}}, "inhomogeneous"),
        ({"low_score": "low"}, "must be what CausalTrace.to_dict gives"),
    ],
)
def test_a_damaged_trace(
    session: Session, done: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    home = shutil.copytree(done, tmp_path / "copy")
    changed(home, 1, **values)
    whole = rf"1\.json: not a readable trace \(.*{message}.*\); delete it and run again"
    for call in (lambda: read_study(home), lambda: Study(session, FACTS, home, OPTIONS)):
        with pytest.raises(ValueError, match=whole):
            call()
    (home / "cases" / "1.json").unlink()
    assert len(trace_facts(session, FACTS, home, OPTIONS)) == 3


def test_grids_are_of_one_width(done: Path) -> None:
    values = json.loads((done / "cases" / "0.json").read_text())
    values["scores"]["mlp"] = [row[:-1] for row in values["scores"]["mlp"]]
    with pytest.raises(ValueError, match=r"scores of mlp must be of shape \[\d+, \d\], got \[\d+, \d\]"):
        CausalTrace.from_dict(values)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"subject": "LeBron"}, "subject"),
        ({"window": 3}, "window"),
        ({"answer_id": 0}, "answer_id"),
    ],
)
def test_a_trace_of_something_else(
    session: Session, done: Path, tmp_path: Path, values: dict[str, Any], name: str
) -> None:
    home = shutil.copytree(done, tmp_path / "copy")
    changed(home, 2, **values)
    with pytest.raises(
        ValueError, match=rf"2\.json: not a readable trace \({name} must be .*, that of fact 'sea', got"
    ):
        Study(session, FACTS, home, OPTIONS)


def test_a_trace_of_another_fact(session: Session, done: Path, tmp_path: Path) -> None:
    home = shutil.copytree(done, tmp_path / "copy")
    shutil.copy(home / "cases" / "0.json", home / "cases" / "1.json")
    with pytest.raises(
        ValueError, match=r"1\.json: not a readable trace \(prompt must be 'LeBron James plays"
    ):
        trace_facts(session, FACTS, home, OPTIONS)


def test_a_decoders_study_goes_on(tmp_path: Path) -> None:
    """Its traces' tokens are the decoder's, not the prompt's."""
    session = session_of("v1.1", torch.float32)
    options = replace(OPTIONS, kinds=("hidden", "cross"), side="decoder", decoder_prefix=PREFIX)
    first = trace_facts(session, FACTS[:2], tmp_path / "out", options)
    study = Study(session, FACTS[:2], tmp_path / "out", options)
    assert len(study.found) == 2 and study.run()[0].to_dict() == first[0].to_dict()
