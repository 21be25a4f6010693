"""Averages over facts: roles, bands, resuming; and that they show where the embedded model keeps its facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from fastedit.readers import write_requests
from fastedit.request import EditRequest
from fastedit.session import Session
from fastedit.trace import Noise, TraceOptions, encode_trace, trace_prompts
from fastedit.trace.average import average
from fastedit.trace.facts import TraceFact, read_facts
from fastedit.trace.roles import ROLES, by_role, role_of
from fastedit.trace.study import read_study, trace_facts
from fastedit.world import load

FACTS = [
    TraceFact("tower", "The {} is located in the city of", "Eiffel Tower"),
    TraceFact("tongue", "The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
    TraceFact("sport", "LeBron James plays the sport of", "LeBron James"),
]
OPTIONS = TraceOptions(kinds=("hidden", "mlp", "severed_mlp"), window=2, noise=Noise(samples=2))


@pytest.fixture
def session() -> Session:
    return Session(tiny_model("gpt2"), tiny_tokenizer())


def test_roles() -> None:
    names = [None if r is None else ROLES[r] for r in (role_of(t, (1, 5), 9) for t in range(9))]
    assert names[0] is None
    assert names[1:] == [
        "first subject token",
        "middle subject tokens",
        "middle subject tokens",
        "last subject token",
        "first subsequent token",
        "further tokens",
        "further tokens",
        "last token",
    ]
    assert role_of(0, (0, 1), 2) == 2 and role_of(1, (0, 1), 2) == 5
    grid = np.arange(18.0).reshape(9, 2)
    found = by_role(grid, range(9), (1, 5), 9)
    assert found[1].tolist() == grid[2:4].mean(axis=0).tolist() and found[5].tolist() == grid[8].tolist()
    assert np.isnan(by_role(grid[:2], range(2), (0, 1), 2)[0]).all()


def test_means_and_bands(session: Session) -> None:
    prompts = [encode_trace(session, fact.prompt, fact.subject) for fact in FACTS]
    found = average(trace_prompts(session, prompts, OPTIONS))
    assert found.facts == 3 and found.skipped == 0 and found.kinds == OPTIONS.kinds
    effects = found.effects["hidden"]
    assert np.allclose(found.mean("hidden")[2], effects[:, 2].mean(axis=0))
    spread = effects[:, 2].std(axis=0, ddof=1)
    assert np.allclose(found.band("hidden")[2], 1.959963984540054 * spread / np.sqrt(3))
    assert found.count("hidden")[2] == 3


def test_wrong_predictions_are_left_out(session: Session) -> None:
    prompts = [encode_trace(session, fact.prompt, fact.subject) for fact in FACTS[:2]]
    prompts.append(encode_trace(session, FACTS[2].prompt, FACTS[2].subject, "zzz"))
    traces = trace_prompts(session, prompts, OPTIONS)
    assert not traces[2].correct_prediction
    assert average(traces).facts == 2 and average(traces).skipped == 1
    assert average(traces, all_facts=True).facts == 3
    with pytest.raises(ValueError, match="the model predicts the answer of none of the 1 facts"):
        average(traces[2:])


def test_a_stopped_study_goes_on(session: Session, tmp_path: Path) -> None:
    whole = trace_facts(session, FACTS, tmp_path / "whole", OPTIONS)
    home, seen = tmp_path / "part", []

    def stop(state: Any) -> None:
        seen.append(state)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_facts(session, FACTS, home, OPTIONS, batch=1, progress=stop)
    assert len(list((home / "cases").glob("*.json"))) == 1
    assert seen[0].done == 1 and seen[0].total == 3 and seen[0].eta_seconds > 0
    seen.clear()
    resumed = trace_facts(session, FACTS, home, OPTIONS, batch=1, progress=seen.append)
    assert [state.done for state in seen] == [2, 3]
    for one, other in zip(whole, resumed, strict=True):
        for kind in one.kinds:
            assert np.abs(one.scores[kind] - other.scores[kind]).max() <= 1e-6
    assert read_study(home).facts == 3
    assert (home / "cases" / "0_mlp.npz").is_file()


def test_another_study_in_the_same_folder_is_refused(session: Session, tmp_path: Path) -> None:
    trace_facts(session, FACTS[:1], tmp_path / "one", OPTIONS)
    with pytest.raises(ValueError, match="other settings: number of facts 1, now 3; other facts$"):
        trace_facts(session, FACTS, tmp_path / "one", OPTIONS)
    with pytest.raises(
        ValueError, match="kinds hidden,mlp,severed_mlp, now hidden,mlp,attn; window 2, now 3; noise"
    ):
        trace_facts(session, FACTS[:1], tmp_path / "one", TraceOptions(window=3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="directory must be new, empty or hold a study"):
        trace_facts(session, FACTS, tmp_path / "other", OPTIONS)
    (tmp_path / "one" / "cases" / "0.json").write_text("{")
    with pytest.raises(ValueError, match=r"0\.json: not a readable trace .*; delete it and run again"):
        trace_facts(session, FACTS[:1], tmp_path / "one", OPTIONS)


def test_a_folder_with_cases_only(session: Session, tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    trace_facts(session, FACTS[:1], tmp_path, OPTIONS)
    (tmp_path / "study.json").unlink()
    with pytest.raises(ValueError, match=r"directory must hold study\.json beside cases, .* without it"):
        trace_facts(session, FACTS[:1], tmp_path, OPTIONS)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ValueError, match=r"study\.json: not readable; delete the folder and run again"):
        trace_facts(session, FACTS[:1], tmp_path, OPTIONS)
    (tmp_path / "cases" / "notes.json").write_text("{}")
    assert read_study(tmp_path).facts == 1


def test_a_bad_fact_stops_before_any_work(session: Session, tmp_path: Path) -> None:
    bad = [*FACTS, TraceFact("lost", "Nothing here", "Marie Curie")]
    with pytest.raises(ValueError, match="fact 'lost': subject must occur in the prompt"):
        trace_facts(session, bad, tmp_path / "none", OPTIONS)
    assert not (tmp_path / "none").exists()


def test_files_of_facts(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    known = {
        "known_id": 7,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "prompt": "Vinson Massif is in",
    }
    path.write_text(json.dumps([known]))
    assert read_facts(path) == [TraceFact("7", "Vinson Massif is in", "Vinson Massif", "Antarctica")]
    path.write_text('{"prompt": "A is", "subject": "A"}\n{"prompt": "B is", "subject": "B"}\n')
    assert read_facts(path, limit=1) == [TraceFact("0", "A is", "A")]
    request = EditRequest(id="x", prompt="{} is", subject="A", target_new="b", target_true="c")
    write_requests(path, [request])
    assert read_facts(path) == [TraceFact("x", "{} is", "A", "c")]
    path.write_text('{"prompt": "A is", "subject": "A"}\n{"prompt": "B is"}\n')
    with pytest.raises(ValueError, match="record 1: field 'subject' is missing"):
        read_facts(path)
    path.write_text('{"prompt": "A is", "subject": "A"}\n[1]\n')
    with pytest.raises(ValueError, match=r"record 1: must be an object, got \[1\]"):
        read_facts(path)
    path.write_text('{"prompt": "A is", "subject": "A", "answer": " "}\n')
    with pytest.raises(
        ValueError, match="record 0: fact '0': field 'answer' must be a string that is not blank"
    ):
        read_facts(path)
    path.write_text('{"id": 1, "prompt": "A is", "subject": "A"}\n' * 2)
    with pytest.raises(ValueError, match="two facts have the id '1'"):
        read_facts(path)


def average_of(name: Literal["gpt2", "llama"]) -> Any:
    world = load(name)
    session = Session(world.model, world.tokenizer)
    prompts = [
        encode_trace(session, request.prompt, request.subject, request.target_true)
        for request in world.requests(24, split="tune")
    ]
    options = TraceOptions(kinds=("hidden", "mlp", "attn", "severed_mlp", "severed_attn"), window=3)
    return average(trace_prompts(session, prompts, options))


@pytest.fixture(scope="module")
def world_average() -> Any:
    return average_of("gpt2")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_average_shows_where_the_world_model_keeps_facts(
    name: Literal["gpt2", "llama"], request: pytest.FixtureRequest
) -> None:
    """Early on at the subject's last token; late at its last token, where attention brings more back than MLPs."""
    found = request.getfixturevalue("world_average") if name == "gpt2" else average_of(name)
    hidden, mlp, attn = (found.mean(kind) for kind in ("hidden", "mlp", "attn"))
    depth = hidden.shape[1]
    subject, last = ROLES.index("last subject token"), ROLES.index("last token")
    assert found.high.mean() > 0.8 and found.low.mean() < {"gpt2": 0.2, "llama": 0.25}[name]
    assert hidden[subject].argmax() < depth / 2 <= hidden[last].argmax()
    assert hidden[subject, 1] > 0.5 > hidden[last, 1]
    assert hidden[last, -1] > 0.5 > hidden[subject, -1]
    others = [0, 1, 3, 4]
    assert mlp[subject, :3].max() > 2 * mlp[:, :3][others].max()
    assert attn[subject, :3].max() > 2 * attn[:, :3][others].max()
    middle = slice(2, 5)
    assert (attn[last, middle] > mlp[last, middle]).all() and attn[last].max() > mlp[last].max()
    # Of the subject's first layer MLPs above bring more than attention above.
    severed = found.mean("severed_mlp")[subject, 0], found.mean("severed_attn")[subject, 0]
    assert hidden[subject, 0] - severed[0] > 5 * abs(hidden[subject, 0] - severed[1])


def test_plots_of_averages(world_average: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    image = imread(world_average.plot(tmp_path / "average.png"))
    assert image.shape[0] > 500 and image.shape[1] > 2000 and image[..., :3].std() > 0.05
    svg = world_average.plot(tmp_path / "average.svg").read_text(encoding="utf-8")
    for text in (*ROLES, "24 facts" if world_average.facts == 24 else "facts", "restoring the MLP, window 3"):
        assert text in svg
    assert "paths severed" in svg and "<svg" in world_average._repr_html_()
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg"):
        world_average.plot(tmp_path / "average.jpg")


def test_files_of_averages(world_average: Any, tmp_path: Path) -> None:
    values = json.loads(world_average.save(tmp_path / "average.json").read_text())
    assert values["roles"] == list(ROLES) and values["facts"] == world_average.facts
    with np.load(world_average.save(tmp_path / "average.npz"), allow_pickle=False) as arrays:
        assert np.array_equal(arrays["hidden/mean"], world_average.mean("hidden"), equal_nan=True)
        assert arrays["mlp/effects"].shape[0] == world_average.facts
    with pytest.raises(ValueError, match=r"path must end in \.json or \.npz"):
        world_average.save(tmp_path / "average.txt")
