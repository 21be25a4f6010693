"""The result of a trace: files in the published keys, pictures, a page; and what bad input gets."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.trace import CausalTrace, Noise

TEXT, SUBJECT = "The mother tongue of LeBron James is the", "LeBron James"
KEYS = {
    *("scores", "low_score", "high_score", "input_ids", "input_tokens", "subject_range"),
    *("answer", "window", "correct_prediction", "kind"),
}


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(tiny_model("gpt2"), tiny_tokenizer())


@pytest.fixture(scope="module")
def found(editor: Editor) -> CausalTrace:
    return editor.trace(TEXT, SUBJECT, window=2, noise=Noise(samples=2))


def test_the_seed_decides(editor: Editor, found: CausalTrace) -> None:
    again = editor.trace(TEXT, SUBJECT, window=2, noise=Noise(samples=2))
    other = editor.trace(TEXT, SUBJECT, window=2, noise=Noise(samples=2, seed=2))
    for kind in found.kinds:
        assert np.array_equal(found.scores[kind], again.scores[kind])
    assert other.low_score != found.low_score


def test_the_prompt_may_hold_a_place_for_the_subject(editor: Editor, found: CausalTrace) -> None:
    same = editor.trace("The mother tongue of {} is the", SUBJECT, window=2, noise=Noise(samples=2))
    assert same.prompt == TEXT and same.low_score == found.low_score
    assert found.correct_prediction
    asked = editor.trace(TEXT, SUBJECT, answer="Paris", kinds=("hidden",), noise=Noise(samples=2))
    assert asked.answer_id != found.answer_id and not asked.correct_prediction


@pytest.mark.parametrize(
    "noise",
    [
        Noise(samples=2, distribution="uniform"),
        Noise(samples=2, per_dimension=True),
        Noise(samples=2, scale=0.5),
        Noise(samples=2, scale=tuple(0.1 for _ in range(32))),
        Noise(samples=2, replace=True),
    ],
    ids=["uniform", "per dimension", "scale", "scales", "replace"],
)
def test_noise_rules(editor: Editor, found: CausalTrace, noise: Noise) -> None:
    other = editor.trace(TEXT, SUBJECT, kinds=("hidden",), noise=noise)
    assert other.low_score != found.low_score and np.isfinite(other.scores["hidden"]).all()


def test_per_dimension_scale_is_each_dimensions_own(editor: Editor) -> None:
    rows = torch.arange(12.0).view(4, 3) ** 2
    arch: Any = type("Arch", (), {"width": 3})()
    assert torch.allclose(Noise(per_dimension=True).scaled(arch, rows), 3 * rows.std(dim=0).double())
    assert torch.allclose(Noise(sigmas=2.0).scaled(arch, rows), 2 * rows.std().double())


def test_save_in_the_published_keys(found: CausalTrace, tmp_path: Path) -> None:
    written = found.save(tmp_path / "case.npz")
    assert [path.name for path in written] == ["case.npz", "case_mlp.npz", "case_attn.npz"]
    for path, kind in zip(written, found.kinds, strict=True):
        with np.load(path, allow_pickle=False) as arrays:
            assert set(arrays) == KEYS
            assert np.array_equal(arrays["scores"], found.scores[kind])
            assert arrays["low_score"] == found.low_score
            assert arrays["input_tokens"].tolist() == list(found.input_tokens)
            assert str(arrays["kind"]) == ("" if kind == "hidden" else kind)


def test_json_and_back(found: CausalTrace, tmp_path: Path) -> None:
    (path,) = found.save(tmp_path / "trace.json")
    back = CausalTrace.from_dict(json.loads(path.read_text(encoding="utf-8")))
    assert back.to_dict() == found.to_dict()
    with pytest.raises(ValueError, match="to_dict"):
        CausalTrace.from_dict({"prompt": "a"})


def test_save_refuses_other_suffixes(found: CausalTrace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.json or \.npz, got .*case\.csv"):
        found.save(tmp_path / "case.csv")
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg"):
        found.plot(tmp_path / "case.pdf")
    with pytest.raises(ValueError, match="kind must be one of hidden, mlp, attn, got 'severed_mlp'"):
        found.plot(tmp_path / "case.png", kinds=("severed_mlp",))
    assert list(tmp_path.iterdir()) == []


def test_plots(found: CausalTrace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    image = imread(found.plot(tmp_path / "trace.png"))
    assert image.shape[0] > 300 and image.shape[1] > 1200
    assert image[..., :3].std() > 0.1
    svg = found.plot(tmp_path / "trace.svg").read_text(encoding="utf-8")
    assert svg == found.plot(tmp_path / "again.svg").read_text(encoding="utf-8")
    for text in ("restoring the hidden state", "restoring the MLP, window 2", "layer"):
        assert text in svg
    first, end = found.subject_range
    for token in range(len(found.input_tokens)):
        text = found.input_tokens[token]
        label = (text.strip() or repr(text)) + ("*" if first <= token < end else "")
        assert f">{html.escape(label, quote=False)}<" in svg


def test_bars_of_severed_runs(editor: Editor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = editor.trace(
        TEXT,
        SUBJECT,
        kinds=("hidden", "severed_mlp", "severed_attn"),
        tokens="subject_last",
        noise=Noise(samples=2),
    )
    svg = found.plot(tmp_path / "bars.svg").read_text(encoding="utf-8")
    for text in ("hidden state, MLPs severed", "hidden state, attention severed", "layer restored at token"):
        assert text in svg


def test_repr_in_a_notebook(found: CausalTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert "<svg" in found._repr_html_() and "corrupted" in found._repr_html_()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    table = found._repr_html_()
    assert "<svg" not in table and table.count("<tr>") == len(found.traced) + 1
    assert "&lt;" in CausalTrace.from_dict({**found.to_dict(), "prompt": "<b>"})._repr_html_()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"subject": "Marie Curie"}, r"subject must occur in the prompt, got 'Marie Curie' in 'The mother"),
    ({"subject": " "}, r"subject must be a string that is not blank, got ' '"),
    ({"prompt": ""}, r"prompt must be a string that is not blank, got ''"),
    ({"answer": "  "}, r"answer must have at least one token, got '  '"),
    ({"kinds": ("block",)}, r"kinds must be of hidden, mlp, attn, severed_mlp, severed_attn, got 'block'"),
    ({"kinds": ()}, r"kinds must be one or more of .*, got \(\)"),
    ({"kinds": "hidden"}, r"kinds must be one or more of .*, got 'hidden'"),
    ({"kinds": ("mlp", "mlp")}, r"kinds must be distinct, got mlp, mlp"),
    ({"window": 0}, r"window must be an integer of at least 1, got 0"),
    ({"window": 2.5}, r"window must be an integer of at least 1, got 2.5"),
    ({"tokens": "last"}, r"tokens must be 'all' or 'subject_last', got 'last'"),
    ({"memory": 0}, r"memory must be at least 1 byte or None, got 0"),
    ({"noise": 3}, r"noise must be a Noise, got 3"),
    ({"subjects": []}, r"subjects must be one or more strings that are not blank, got \[\]"),
    ({"draws": [torch.zeros(2, 1, 32)]}, r"draws must be of shape \[samples, \d+, 32\], got \[2, 1, 32\]"),
    ({"prompt": "the " * 200 + "LeBron James"}, r"prompt must have at most 128 tokens, .* got \d+"),
    ({"noise": Noise(scale=(1.0, 2.0))}, r"noise\.scale must have one value or 32, .* got 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(editor: Editor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        editor.trace(**{"prompt": TEXT, "subject": SUBJECT, **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, r"noise\.samples must be an integer of at least 1, got 0"),
        ({"sigmas": float("nan")}, r"noise\.sigmas must be a finite number > 0, got nan"),
        ({"scale": -1.0}, r"noise\.scale must be finite and >= 0, got -1.0"),
        ({"distribution": "cauchy"}, r"noise\.distribution must be one of gaussian, uniform, got 'cauchy'"),
        ({"seed": -1}, r"noise\.seed must be an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"scale": 1.0, "per_dimension": True}, r"noise\.per_dimension must be False where noise\.scale"),
    ],
)
def test_bad_noise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(**change)


def test_a_part_of_a_token_is_no_subject(editor: Editor) -> None:
    tokens = editor.tokenizer.convert_ids_to_tokens(editor.tokenizer(TEXT)["input_ids"])
    long = next(re.sub(r"\W", "", token.replace("Ġ", "")) for token in tokens if len(token) > 3)
    with pytest.raises(
        ValueError, match=r"subject must be made of whole tokens, got .* whose tokens also hold"
    ):
        editor.trace(TEXT, long[:-1])


def test_nan_in_the_clean_run() -> None:
    model = tiny_model("gpt2")
    model.transformer.ln_f.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="the clean run of the prompt must be finite, got NaN"):
        Editor(model, tiny_tokenizer()).trace(TEXT, SUBJECT)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_what_cannot_be_traced_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"model: causal tracing (cannot run|needs a causal)"):
        Editor(tiny_model(name), tiny_tokenizer()).trace(TEXT, SUBJECT)
