"""Pictures of averages and traces: which panels, whole layers, limits that hold every cell; a decoder's roles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_seq2seq import PREFIX, session_of

from fastedit.trace import CausalTrace, Noise, TraceOptions, encode_trace, trace_prompts
from fastedit.trace.average import AverageTrace, average
from fastedit.trace.neurons_plot import _figure as neurons_figure
from fastedit.trace.neurons_result import Neurons
from fastedit.trace.plot import _figure as trace_figure
from fastedit.trace.plot_average import _figure as average_figure
from fastedit.trace.roles import ROLES, by_role, role_of

TEXTS = (("The sport of LeBron James is the", "LeBron James"), ("Paris is the city of", "Paris"))


@pytest.fixture(scope="module")
def decoded() -> list[CausalTrace]:
    session = session_of("v1.1", torch.float32)
    options = TraceOptions(
        kinds=("hidden", "cross", "severed_mlp", "severed_cross"),
        side="decoder",
        decoder_prefix=PREFIX,
        window=2,
        noise=Noise(samples=2),
    )
    return trace_prompts(session, [encode_trace(session, *text) for text in TEXTS], options)


def kept(found: AverageTrace, *kinds: str) -> AverageTrace:
    return replace(found, effects={kind: found.effects[kind] for kind in kinds})


def test_tokens_of_a_decoder_are_no_subject() -> None:
    assert [role_of(token, (0, 0), 3) for token in range(3)] == [4, 4, 5]
    assert role_of(0, (0, 0), 1) == 5
    grid = np.arange(6.0).reshape(3, 2)
    found = by_role(grid, range(3), (0, 0), 3)
    assert np.isnan(found[:4]).all()
    assert found[4].tolist() == [1.0, 2.0] and found[5].tolist() == [4.0, 5.0]


def test_panels_of_a_decoder(decoded: list[CausalTrace]) -> None:
    pytest.importorskip("matplotlib")
    found = average(decoded, all_facts=True)
    titles = [axis.get_title() for axis in average_figure(found).axes]
    assert titles == [
        "restoring the hidden state",
        "restoring the cross-attention, window 2",
        "last token, paths severed",
    ]
    (only,) = average_figure(kept(found, "cross")).axes
    lines = {line.get_label(): line.get_ydata() for line in only.lines}
    assert set(lines) == {"further tokens", "last token"}
    assert np.array_equal(lines["last token"], found.mean("cross")[ROLES.index("last token")])
    bars = average_figure(kept(found, "hidden", "severed_mlp")).axes[-1]
    heights = [bar.get_height() for bar in bars.patches]
    expected = [found.mean(kind)[ROLES.index("last token")] for kind in ("hidden", "severed_mlp")]
    assert np.allclose(heights, np.concatenate(expected)) and np.abs(heights).max() > 0
    assert "severed" in average_figure(kept(found, "severed_cross")).axes[0].get_title()
    assert "<svg" in found._repr_html_()


def test_one_fact_is_singular(decoded: list[CausalTrace]) -> None:
    pytest.importorskip("matplotlib")
    assert average_figure(average(decoded[:1], all_facts=True)).get_suptitle().startswith("1 fact, clean")
    found = replace(average(decoded[:1], all_facts=True), skipped=2)
    assert average_figure(found).get_suptitle().startswith("1 of 3 facts, those predicted: clean")


def whole(figure: object) -> bool:
    axes = figure.axes  # type: ignore[attr-defined]
    ticks = [axis.get_xticks() for axis in axes if axis.get_xlabel().startswith("layer")]
    assert ticks
    return all(len(found) and np.array_equal(found, np.round(found)) for found in ticks)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_ticks_are_at_whole_layers(decoded: list[CausalTrace], depth: int) -> None:
    pytest.importorskip("matplotlib")
    cut = [replace(t, scores={kind: grid[:, :depth] for kind, grid in t.scores.items()}) for t in decoded]
    assert whole(average_figure(average(cut, all_facts=True)))
    assert whole(trace_figure(cut[0], None))
    row = replace(cut[0], traced=(0,), scores={kind: grid[:1] for kind, grid in cut[0].scores.items()})
    assert whole(trace_figure(row, None))


def test_ticks_of_neurons_are_at_whole_layers() -> None:
    pytest.importorskip("matplotlib")
    from tiny import tiny_model, tiny_tokenizer

    from fastedit.editor import Editor

    found: Neurons = Editor(tiny_model("gpt2"), tiny_tokenizer()).neurons(TEXTS[0][0], steps=2, layers=(1,))
    assert whole(neurons_figure(found))


@pytest.mark.parametrize("shift", [-0.2, 0.0])
def test_limits_hold_every_cell(decoded: list[CausalTrace], shift: float, tmp_path: Path) -> None:
    """Also of a trace whose every cell, and whose clean run, lies below (or at) the corrupted probability."""
    pytest.importorskip("matplotlib")
    level = 0.5
    grids = {kind: np.full_like(grid, level + shift) for kind, grid in decoded[0].scores.items()}
    below = replace(decoded[0], low_score=level, high_score=level + shift, scores=grids)
    figure = trace_figure(below, None)
    for axis in figure.axes[:-1]:
        low, high = axis.images[0].get_clim()
        assert low <= level + shift <= high
    below.plot(tmp_path / "below.png")
    mixed = replace(below, scores={"hidden": np.array([[0.1, 0.9]] * len(below.traced))})
    (axis, _) = trace_figure(mixed, None).axes
    assert axis.images[0].get_clim() == (0.1, 0.9)


def test_kinds_of_a_picture(decoded: list[CausalTrace], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for kinds, message in (
        ("hidden", "kinds must be a list or tuple of hidden, cross, .*, got 'hidden'"),
        ((), "kinds must be one or more of hidden, cross, .*, got none"),
        (("attn",), "kind must be one of hidden, cross, .*, got 'attn'"),
    ):
        with pytest.raises(ValueError, match=message):
            decoded[0].plot(tmp_path / "a.png", kinds=kinds)  # type: ignore[arg-type]
