"""Causal tracing of T5 against its naive twin, one full run of the model a cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.trace_seq2seq import severed as twin_severed
from reference.trace_seq2seq import trace as twin_trace
from tiny import tiny_model, tiny_tokenizer
from tiny_seq2seq import PREFIX, VARIANTS, session_of

from fastedit.arch import resolve
from fastedit.editor import Editor
from fastedit.session import Session
from fastedit.trace import Noise, TraceOptions, TracePrompt, encode_trace, trace_prompts
from fastedit.trace.prompts import decoder_ids

EVERY = ("hidden", "mlp", "attn", "severed_mlp", "severed_attn")
DECODER = (*EVERY, "cross", "severed_cross")
TEXT, SUBJECT = "The sport of LeBron James is the", "LeBron James"


def draws(session: Session, prompt: TracePrompt, samples: int = 2, sets: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (samples, prompt.span[1] - prompt.span[0], session.arch.width)
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(sets)]


def twin(
    session: Session, prompt: TracePrompt, kind: str, noise: Any, options: TraceOptions
) -> tuple[Any, float, float]:
    arch = resolve(session.model, side=options.side or "encoder")
    behind = decoder_ids(session, options.decoder_prefix)
    tokens = len(behind) if options.side == "decoder" else len(prompt)
    part: Any = "block" if kind == "hidden" else kind.removeprefix("severed_")
    names = [arch.name(part, i) for i in range(arch.depth)]
    blocks = [arch.name("block", i) for i in range(arch.depth)]
    ids, start = (torch.tensor(prompt.ids), torch.tensor(behind)), prompt.span[0]
    if not kind.startswith("severed"):
        window = None if kind == "hidden" else options.window
        found = twin_trace(
            session.model, *ids, names, tokens, start, noise[0], window=window, replace=options.noise.replace
        )
        return found[0].double().numpy(), found[1], found[2]
    _, low, high, answer = twin_trace(session.model, *ids, [], tokens, start, noise[0])
    scores = twin_severed(
        session.model, *ids, blocks, names, tokens, start, noise[-1], answer, first_noise=noise[0]
    )
    return scores.numpy(), low, high


def check(session: Session, prompt: TracePrompt, noise: Any, options: TraceOptions, bound: float) -> Any:
    (found,) = trace_prompts(session, [prompt], options, draws=[noise])
    for kind in options.kinds:
        scores, low, high = twin(session, prompt, kind, noise, options)
        assert found.scores[kind].shape == scores.shape
        assert np.abs(found.scores[kind] - scores).max() <= bound, kind
        assert abs(found.low_score - low) <= bound and abs(found.high_score - high) <= bound
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_every_kind_of_the_encoder_in_double_precision(variant: str, prefix: str | None) -> None:
    session = session_of(variant)
    prompt = encode_trace(session, TEXT, SUBJECT)
    assert prompt.ids[-1] == 0 and prompt.span[0] > 0
    options = TraceOptions(kinds=EVERY, window=3, decoder_prefix=prefix)
    found = check(session, prompt, draws(session, prompt), options, 1e-12)
    assert found.traced == tuple(range(len(prompt))) and found.input_ids == prompt.ids
    # Nothing is above the last layer to sever.
    for kind in ("severed_mlp", "severed_attn"):
        assert (found.scores[kind][:, -1] == found.scores["hidden"][:, -1]).all()
    assert abs(found.high_score - found.low_score) > 1e-4
    # Tokens before the subject count, too.
    assert np.abs(found.effect("hidden")[: prompt.span[0]]).max() > 1e-6
    assert np.abs(found.scores["hidden"] - found.scores["severed_mlp"]).max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_every_kind_of_the_decoder_in_double_precision(variant: str, prefix: str | None) -> None:
    session = session_of(variant)
    prompt = encode_trace(session, TEXT, SUBJECT)
    options = TraceOptions(kinds=DECODER, window=2, decoder_prefix=prefix, side="decoder")
    found = check(session, prompt, draws(session, prompt), options, 1e-12)
    behind = decoder_ids(session, prefix)
    assert found.input_ids == behind and found.subject_range == (0, 0)
    for kind in ("hidden", "severed_mlp", "severed_attn", "severed_cross"):
        assert found.scores[kind][-1, -1] == found.high_score
        assert (found.scores[kind][:-1, -1] == found.low_score).all()
    # Embeddings of the decoder are not corrupted.
    assert (found.scores["attn"][:, 0] == found.low_score).all()
    assert np.abs(found.effect("cross")).max() > 1e-5


@pytest.mark.parametrize("window", [1, 2, 4, 10])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_windows(side: Any, window: int) -> None:
    session = session_of("v1.1")
    prompt = encode_trace(session, "LeBron James plays", SUBJECT)
    kinds = ("mlp", "attn", *(("cross",) if side == "decoder" else ()))
    options = TraceOptions(kinds=kinds, window=window, side=side, decoder_prefix=PREFIX)
    check(session, prompt, draws(session, prompt), options, 1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision(variant: str, attention: str) -> None:
    session = session_of(variant, torch.float32, attn_implementation=attention)
    prompt = encode_trace(session, TEXT, SUBJECT)
    for side in ("encoder", "decoder"):
        kinds = EVERY if side == "encoder" else DECODER
        options = TraceOptions(kinds=kinds, window=2, side=side)  # type: ignore[arg-type]
        check(session, prompt, draws(session, prompt), options, 1e-5)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_severed_runs_with_noise_drawn_anew_and_replaced_embeddings(side: Any) -> None:
    session = session_of("v1.0")
    prompt = encode_trace(session, TEXT, SUBJECT)
    kinds = EVERY if side == "encoder" else DECODER
    options = TraceOptions(kinds=kinds, window=2, side=side, decoder_prefix=PREFIX)
    check(session, prompt, draws(session, prompt, sets=2), options, 1e-12)
    options = TraceOptions(kinds=("hidden", "attn"), window=2, side=side, noise=Noise(replace=True))
    check(session, prompt, draws(session, prompt), options, 1e-12)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("memory", [1, 100_000])
def test_many_prompts_and_any_memory_give_the_same(side: Any, memory: int) -> None:
    session = session_of("v1.1")
    prompts = [
        encode_trace(session, TEXT, SUBJECT),
        encode_trace(session, "{} works in the field of", "Marie Curie", "physics"),
    ]
    noise = [draws(session, prompt, samples=3) for prompt in prompts]
    kinds = ("hidden", "mlp", "severed_attn") if side == "encoder" else DECODER
    settings: Any = {"kinds": kinds, "window": 3, "side": side, "decoder_prefix": PREFIX}
    alone = [
        trace_prompts(session, [p], TraceOptions(**settings), draws=[n])[0]
        for p, n in zip(prompts, noise, strict=True)
    ]
    together = trace_prompts(session, prompts, TraceOptions(**settings, memory=memory), draws=noise)
    for one, other in zip(alone, together, strict=True):
        assert one.input_ids == other.input_ids and one.answer_id == other.answer_id
        for kind in kinds:
            assert np.abs(one.scores[kind] - other.scores[kind]).max() <= 1e-12
    assert together[1].answer_id == prompts[1].answer


def test_the_subjects_last_token_only() -> None:
    session = session_of("v1.0")
    prompt = encode_trace(session, TEXT, SUBJECT)
    noise = draws(session, prompt)
    every, last = (
        trace_prompts(session, [prompt], TraceOptions(kinds=EVERY, window=2, tokens=tokens), draws=[noise])[0]
        for tokens in ("all", "subject_last")
    )
    assert last.traced == (prompt.span[1] - 1,)
    for kind in EVERY:
        assert np.abs(last.scores[kind][0] - every.scores[kind][prompt.span[1] - 1]).max() <= 1e-12


def test_half_precision_runs() -> None:
    session = session_of("v1.1", torch.bfloat16)
    exact = session_of("v1.1", torch.float32)
    found, want = (
        trace_prompts(s, [encode_trace(s, TEXT, SUBJECT)], TraceOptions(noise=Noise(samples=2, scale=0.5)))[0]
        for s in (session, exact)
    )
    if found.answer_id == want.answer_id:
        assert np.abs(found.scores["hidden"] - want.scores["hidden"]).max() < 0.05
    assert np.isfinite(found.scores["mlp"]).all()


def test_the_model_stays_as_it_was() -> None:
    session = session_of("v1.1")
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    session.model.train()
    prompt = encode_trace(session, TEXT, SUBJECT)
    trace_prompts(session, [prompt], TraceOptions(noise=Noise(samples=2)))
    trace_prompts(session, [prompt], TraceOptions(noise=Noise(samples=2), side="decoder"))
    assert session.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in session.model.modules())


def test_the_editors_door_and_its_files(tmp_path: Path) -> None:
    made = session_of("v1.0", torch.float32)
    editor = Editor(made.model, made.tokenizer)
    found = editor.trace(TEXT, SUBJECT, noise=Noise(samples=2), kinds=("hidden", "mlp"), window=2)
    assert [path.name for path in found.save(tmp_path / "t.npz")] == ["t.npz", "t_mlp.npz"]
    arrays = np.load(tmp_path / "t.npz")
    assert arrays["scores"].shape == (len(found.input_ids), 4) and arrays["kind"] == ""
    assert found.plot(tmp_path / "t.svg").stat().st_size > 1000
    assert "LeBron James" in found._repr_html_()
    decoder = editor.trace(TEXT, SUBJECT, side="decoder", kinds=DECODER, noise=Noise(samples=2))
    assert decoder.plot(tmp_path / "d.png").stat().st_size > 1000
    assert decoder.scores["cross"].shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "left"}, "side must be 'encoder', 'decoder' or None, got 'left'"),
        ({"side": "decoder", "tokens": "subject_last"}, "tokens must be 'all' for side='decoder'"),
        ({"decoder_prefix": " "}, "decoder_prefix must be a text that is not blank, or None, got ' '"),
        ({"kinds": ("cross",)}, "kinds must be of hidden, mlp, attn, severed_mlp, severed_attn, got 'cross'"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TraceOptions(**change)


@pytest.mark.parametrize(
    ("prompt", "subject", "answer", "message"),
    [
        (TEXT, "Marie Curie", None, "subject must occur in the prompt"),
        (TEXT, "Th", None, "subject must be made of whole tokens"),
        (TEXT, " ", None, "subject must be a string that is not blank"),
        (TEXT, SUBJECT, " ", "answer must have at least one token"),
        (TEXT * 20, SUBJECT, None, "prompt must have at most 64 tokens"),
    ],
)
def test_bad_prompts(prompt: str, subject: str, answer: str | None, message: str) -> None:
    made = session_of("v1.0", torch.float32, n_positions=64)
    with pytest.raises(ValueError, match=message):
        Editor(made.model, made.tokenizer).trace(prompt, subject, answer=answer)


def test_nan_no_start_token_and_other_models() -> None:
    made = session_of("v1.0", torch.float32)
    prompt = encode_trace(made, TEXT, SUBJECT)
    with pytest.raises(ValueError, match="prompts: at least one is needed, got 0"):
        trace_prompts(made, [])
    with pytest.raises(ValueError, match=r"draws must be of shape \[samples, "):
        trace_prompts(made, [prompt], draws=[[torch.zeros(2, 1, 3)]])
    made.model.decoder.final_layer_norm.weight.data[0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the clean run of the prompt must be finite, got NaN"):
        trace_prompts(made, [prompt])
    bare = session_of("v1.0", torch.float32)
    bare.model.config.decoder_start_token_id = None  # type: ignore[union-attr]
    bare.model.generation_config.decoder_start_token_id = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="model: config.decoder_start_token_id must name"):
        trace_prompts(bare, [prompt])
    other = Editor(tiny_model("gpt2"), tiny_tokenizer())
    for option in ({"side": "decoder"}, {"decoder_prefix": "a"}):
        with pytest.raises(ValueError, match="must be None for a model that is no encoder-decoder"):
            other.trace(TEXT, SUBJECT, **option)
