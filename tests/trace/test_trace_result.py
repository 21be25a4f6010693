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
from fastedit.trace.embeddings import Moments, corpus_moments
from fastedit.trace.noise_code import noise_fields
from fastedit.trace.plot import _figure
from fastedit.trace.result import trace_files

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
        Noise(samples=2, scale=[0.1 for _ in range(32)]),  # type: ignore[arg-type]
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


def test_moments_of_a_corpus(editor: Editor) -> None:
    texts = ["The sport of basketball", "The city of Paris is the city"]
    found = corpus_moments(editor.session.arch, editor.tokenizer, texts)
    ids = [i for text in texts for i in editor.tokenizer(text)["input_ids"]]
    rows = editor.session.arch.embed(torch.tensor(ids)).double()
    assert torch.allclose(found.mean, rows.mean(0), atol=1e-12)
    assert torch.allclose(found.covariance, torch.cov(rows.T), atol=1e-12)


def test_noise_with_a_corpus_moments() -> None:
    """Mean and covariance are the corpus', also of Student's t, whose tails are heavier."""
    factor = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), factor @ factor.T)
    drawn = Noise(samples=100_000, distribution="multivariate").draw(2, 3, moments)[0].flatten(0, 1)
    assert torch.allclose(drawn.mean(0), moments.mean, atol=0.03)
    assert torch.allclose(torch.cov(drawn.T), moments.covariance, atol=0.06)
    student = Noise(samples=100_000, distribution="student", degrees=8.0).draw(2, 3, moments)[0]
    plain = Noise(samples=100_000, distribution="multivariate").draw(2, 3, moments)[0]
    # One factor a token, sqrt((degrees - 2) / u): its square has mean 1.
    factors = student / plain
    assert torch.allclose(factors, factors[..., :1].expand_as(factors))
    assert float(factors[..., 0].square().mean()) == pytest.approx(1.0, abs=0.02)
    u = np.random.RandomState(2).chisquare(8.0, 1000)
    assert np.allclose(factors[..., 0].flatten()[:1000].numpy(), np.sqrt(6 / u))


def test_noise_of_a_corpus_corrupts(editor: Editor, found: CausalTrace) -> None:
    texts = ["The sport of basketball", "The city of Paris is the city"]
    for distribution in ("multivariate", "student"):
        noise = Noise(samples=2, distribution=distribution)  # type: ignore[arg-type]
        other = editor.trace(TEXT, SUBJECT, kinds=("hidden",), noise=noise, texts=texts)
        assert other.low_score != found.low_score


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("s3", {"sigmas": 3.0}),
        ("s", {"sigmas": 1.0}),
        ("0.1", {"scale": 0.1}),
        ("u0.2", {"distribution": "uniform", "scale": 0.2}),
        ("m", {"distribution": "multivariate"}),
        ("t4", {"distribution": "student", "degrees": 4.0}),
    ],
)
def test_published_names_of_noise(code: str, fields: dict[str, Any]) -> None:
    assert noise_fields(code) == fields
    Noise(**fields)


@pytest.mark.parametrize("code", ["", "x", "t", "u", "sx", "3s", "mm"])
def test_other_names_are_refused(code: str) -> None:
    with pytest.raises(ValueError, match=f"noise must be s or sN .*, got {code!r}"):
        noise_fields(code)


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
    figure = _figure(found, None)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width, "the legend is cut off"
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
    ({"memory": 0}, r"memory must be an integer of at least 1 \(bytes\) or None, got 0"),
    ({"noise": 3}, r"noise must be a Noise, got 3"),
    ({"subjects": []}, r"subjects must be one or more strings that are not blank, got \[\]"),
    ({"memory": "1GB"}, r"memory must be an integer of at least 1 \(bytes\) or None, got '1GB'"),
    ({"draws": [torch.zeros(2, 1, 32)]}, r"draws must be of shape \[samples, \d+, 32\], got \[2, 1, 32\]"),
    ({"draws": []}, r"draws must be one or two tensors a prompt, got 0"),
    ({"draws": 3}, r"draws must be one or two tensors a prompt, got int"),
    ({"draws": [torch.zeros(0, 10, 32)]}, r"draws must hold at least 1 sample, got \[0, 10, 32\]"),
    ({"draws": [torch.full((2, 10, 32), torch.nan)]}, r"draws must be finite, got NaN or infinity"),
    ({"draws": [torch.full((2, 10, 32), torch.inf)]}, r"draws must be finite, got NaN or infinity"),
    ({"draws": [np.zeros((2, 10, 32))]}, r"draws must be tensors of floating-point numbers, got ndarray"),
    (
        {"draws": torch.zeros(2, 10, 32, dtype=torch.int64)},
        r"draws must be tensors of floating.*, got torch\.int64",
    ),
    ({"windows": 3}, r"TraceOptions: unknown option 'windows'; known: kinds, window, tokens, noise, memory"),
    (
        {"noise": Noise(distribution="student")},
        r"texts must be the texts of a corpus for .* 'student', got None",
    ),
    (
        {"noise": Noise(distribution="multivariate"), "texts": ["a"]},
        r"texts must hold at least 2 tokens, got 1",
    ),
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
        (
            {"scale": -1.0},
            r"noise\.scale must be finite and >= 0 \(a number, or one per dimension\), got -1.0",
        ),
        ({"distribution": "cauchy"}, r"noise\.distribution must be one of .*, student, got 'cauchy'"),
        ({"scale": [1.0, "a"]}, r"noise\.scale must be finite and >= 0 .*, got \(1\.0, 'a'\)"),
        ({"scale": "3"}, r"noise\.scale must be finite and >= 0 .*, got '3'"),
        ({"replace": 1}, r"noise\.replace must be True or False, got 1"),
        ({"degrees": 2.0}, r"noise\.degrees must be a finite number > 2, got 2\.0"),
        ({"distribution": "student", "scale": 1.0}, r"noise\.scale must be None for 'student'"),
        ({"distribution": "multivariate", "per_dimension": True}, r"noise\.per_dimension must be False for"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_clean_run_that_is_not_finite(value: float) -> None:
    model = tiny_model("gpt2")
    model.transformer.ln_f.weight.data[0] = value
    with pytest.raises(ValueError, match="the clean run of the prompt must be finite, got NaN or infinity"):
        Editor(model, tiny_tokenizer()).trace(TEXT, SUBJECT)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_corrupted_runs_that_are_not_finite(name: str, tmp_path: Path) -> None:
    """In half precision a large noise overflows: nothing is to be averaged then, and nothing is written."""
    editor = Editor(tiny_model(name, dtype=torch.float16), tiny_tokenizer())
    with pytest.raises(
        ValueError, match="noise: the corrupted runs of the prompt must be finite, got NaN"
    ) as raised:
        editor.trace(TEXT, SUBJECT, noise=Noise(scale=1e7, samples=2)).save(tmp_path / "t.json")
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


def test_a_restored_run_that_is_not_finite(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit.trace.sweep import Sweep

    real = Sweep.finals
    broken = lambda *args: [x.index_fill(0, torch.tensor([0]), torch.nan) for x in real(*args)]  # noqa: E731
    monkeypatch.setattr(Sweep, "finals", broken)
    with pytest.raises(
        ValueError, match="model: a run with hidden restored must be finite, got NaN .* at token"
    ):
        editor.trace(TEXT, SUBJECT, noise=Noise(samples=2))


def test_no_trace_and_no_file_holds_nan(found: CausalTrace) -> None:
    grids = {kind: grid.copy() for kind, grid in found.scores.items()}
    grids["mlp"][3, 1] = np.nan
    with pytest.raises(ValueError, match="scores of mlp must be finite, got nan at token 3 and layer 1"):
        CausalTrace(**{**vars(found), "scores": grids})
    with pytest.raises(ValueError, match="low_score must be finite, got inf"):
        CausalTrace(**{**vars(found), "low_score": float("inf")})


def test_only_the_named_file_is_replaced(found: CausalTrace, tmp_path: Path) -> None:
    assert trace_files(tmp_path / "a.npz", found.kinds) == found.save(tmp_path / "a.npz")
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    (tmp_path / "a_attn.npz").write_text("mine")
    (tmp_path / "a_mlp.npz").unlink()
    with pytest.raises(
        ValueError, match=r"path must leave a_attn\.npz, a file of the same trace, free \(force=True"
    ):
        found.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before and not (tmp_path / "a_mlp.npz").exists()
    assert len(found.save(tmp_path / "a.npz", force=True)) == 3
    assert found.save(tmp_path / "a.json") == found.save(tmp_path / "a.json")


def test_hooks_are_gone_after_a_failure(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a hook cannot be put on in the first place."""

    def fail(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no hook")

    for run in (editor, Editor(tiny_model("falcon"), tiny_tokenizer())):
        monkeypatch.setattr(run.session.arch.attn(2), "register_forward_hook", fail)
        with pytest.raises(RuntimeError, match="no hook"):
            run.trace(TEXT, SUBJECT, noise=Noise(samples=2))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
        monkeypatch.undo()
