"""The sweep against the naive twin, one full run of the model a cell: block types, kinds, windows, noise rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from reference.trace import severed as twin_severed
from reference.trace import trace as twin_trace
from tiny import DEPTH, tiny_model, tiny_tokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gptj import modeling_gptj

from fastedit.session import Session
from fastedit.trace import Noise, TraceOptions, TracePrompt, encode_trace, trace_prompts

FAMILIES = {
    "gpt2": {},
    "gptj": {},
    "gpt_neox": {},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "opt": {},
    "opt-projected": {"word_embed_proj_dim": 20, "do_layer_norm_before": False},
    "bloom": {},
    "falcon": {},
    "falcon-alibi": {"alibi": True},
    "falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
EVERY = ("hidden", "mlp", "attn", "severed_mlp", "severed_attn")
# 11 tokens with the subject at 5 to 9, and 8 with the subject at 0 to 5.
TEXT, SUBJECT = "the city of Paris is", "Paris"
START, FIRST = "Marie Curie is the", "Marie Curie"


@pytest.fixture(autouse=True)
def double_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families compute attention weights in float32 whatever the model's type: the twin's are not rounded."""

    def gptj(module: Any, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        weights = query @ key.mT / module.scale_attn
        return torch.softmax(weights if mask is None else weights + mask, dim=-1) @ value, None

    def gemma2(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights, cap = query @ key.mT * options["scaling"], options.get("softcap")
        weights = weights if cap is None else cap * torch.tanh(weights / cap)
        weights = weights if mask is None else weights + mask
        return (torch.softmax(weights, dim=-1) @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(modeling_gptj.GPTJAttention, "_attn", gptj)
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", gemma2)


def session_of(name: str, dtype: torch.dtype = torch.float64) -> Session:
    kind = name.split("-")[0]
    # Without sdpa the others would round their attention weights too.
    attention = "eager" if kind in ("gptj", "gemma2", "bloom") else "sdpa"
    model = tiny_model(kind, dtype=dtype, attn_implementation=attention, **FAMILIES.get(name, {}))
    return Session(model.to(dtype), tiny_tokenizer())


def twin(session: Session, prompt: TracePrompt, kind: str, noise: Any, window: int, **options: Any) -> Any:
    """(scores [T, L], low, high) by the naive twin; noise: the sets of draws."""
    arch = session.arch
    embed = next(name for name, module in arch.model.named_modules() if module is arch.embed)
    part = "block" if kind == "hidden" else kind.removeprefix("severed_")
    if part != "block" and arch.row.residual_inside:
        part += "_out"  # the module's own output is the residual stream
    names = [arch.name(part, i) for i in range(arch.depth)]
    ids = torch.tensor(prompt.ids)
    if not kind.startswith("severed"):
        found = twin_trace(
            session.model,
            ids,
            embed,
            names,
            prompt.span[0],
            noise[0],
            window=None if kind == "hidden" else window,
            **options,
        )
        return found[0].double().numpy(), found[1], found[2]
    blocks = [arch.name("block", i) for i in range(arch.depth)]
    _, low, high, answer = twin_trace(
        session.model, ids, embed, blocks, prompt.span[0], noise[0], cells=[], **options
    )
    scores = twin_severed(
        session.model, ids, embed, blocks, names, prompt.span[0], noise[-1], answer, first_noise=noise[0]
    )
    return scores.numpy(), low, high


def draws(session: Session, prompt: TracePrompt, samples: int = 3, scale: float = 1.0, sets: int = 1) -> Any:
    generator = torch.Generator().manual_seed(7)
    shape = (samples, prompt.span[1] - prompt.span[0], session.arch.embed.weight.shape[1])
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(sets)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_type_and_kind_in_double_precision(name: str) -> None:
    session = session_of(name)
    prompt = encode_trace(session, TEXT, SUBJECT)
    noise = draws(session, prompt)
    (found,) = trace_prompts(session, [prompt], TraceOptions(kinds=EVERY, window=3), draws=[noise])
    T, first = len(prompt), prompt.span[0]
    assert first > 0 and found.traced == tuple(range(T))
    for kind in EVERY:
        scores, low, high = twin(session, prompt, kind, noise, 3)
        assert found.scores[kind].shape == (T, DEPTH)
        assert np.abs(found.scores[kind] - scores).max() <= 1e-12, kind
        assert abs(found.low_score - low) <= 1e-12 and abs(found.high_score - high) <= 1e-12
        assert (found.scores[kind][:first] == found.low_score).all()
        if kind not in ("mlp", "attn"):
            assert (found.scores[kind][:-1, -1] == found.low_score).all()
            assert found.scores[kind][-1, -1] == found.high_score
    # The noise does something, and restoring does too.
    assert abs(found.high_score - found.low_score) > 1e-3
    assert np.abs(found.effect("mlp")[first:]).max() > 1e-4
    assert np.abs(found.scores["hidden"] - found.scores["severed_mlp"]).max() > 1e-5


@pytest.mark.parametrize("window", [1, 2, 3, 10])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2", "bloom"])
def test_windows(name: str, window: int) -> None:
    session = session_of(name)
    prompt = encode_trace(session, START, FIRST)
    assert prompt.span[0] == 0
    noise = draws(session, prompt, samples=2)
    options = TraceOptions(kinds=("mlp", "attn"), window=window)
    (found,) = trace_prompts(session, [prompt], options, draws=[noise])
    for kind in options.kinds:
        scores, _, _ = twin(session, prompt, kind, noise, window)
        assert np.abs(found.scores[kind] - scores).max() <= 1e-12, kind


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma2"])
def test_single_precision(name: str) -> None:
    session = session_of(name, torch.float32)
    prompt = encode_trace(session, TEXT, SUBJECT)
    noise = draws(session, prompt, samples=2)
    (found,) = trace_prompts(session, [prompt], TraceOptions(kinds=EVERY, window=2), draws=[noise])
    for kind in EVERY:
        scores, _, _ = twin(session, prompt, kind, noise, 2)
        assert np.abs(found.scores[kind] - scores).max() <= 1e-5, kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "falcon"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Against float32 runs of the same weights."""
    half = session_of(name, dtype)
    wide = session_of(name, torch.float32)
    wide.model.load_state_dict({k: v.float() for k, v in half.model.state_dict().items()})
    prompt = encode_trace(half, TEXT, SUBJECT)
    asked = encode_trace(wide, TEXT, SUBJECT)
    noise = draws(half, prompt, samples=2, scale=0.5)
    options = TraceOptions(kinds=("hidden", "mlp", "attn"), window=2)
    (reference,) = trace_prompts(wide, [asked], options, draws=[noise])
    chosen = dataclasses.replace(prompt, answer=reference.answer_id)
    (found,) = trace_prompts(half, [chosen], options, draws=[noise])
    assert abs(found.high_score - reference.high_score) <= 5e-3
    for kind in options.kinds:
        assert np.abs(found.scores[kind] - reference.scores[kind]).max() <= 5e-3, kind


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_severed_runs_with_noise_drawn_anew(name: str) -> None:
    session = session_of(name)
    prompt = encode_trace(session, TEXT, SUBJECT)
    noise = draws(session, prompt, sets=2)
    (found,) = trace_prompts(session, [prompt], TraceOptions(kinds=EVERY, window=2), draws=[noise])
    for kind in EVERY:
        scores, low, _ = twin(session, prompt, kind, noise, 2)
        assert np.abs(found.scores[kind] - scores).max() <= 1e-12, kind
        assert abs(found.low_score - low) <= 1e-12


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_replaced_embeddings(name: str) -> None:
    session = session_of(name)
    prompt = encode_trace(session, TEXT, SUBJECT)
    noise = draws(session, prompt)
    options = TraceOptions(kinds=("hidden", "attn"), window=2, noise=Noise(replace=True))
    (found,) = trace_prompts(session, [prompt], options, draws=[noise])
    for kind in options.kinds:
        scores, low, _ = twin(session, prompt, kind, noise, 2, replace=True)
        assert np.abs(found.scores[kind] - scores).max() <= 1e-12
        assert abs(found.low_score - low) <= 1e-12


@pytest.mark.parametrize("memory", [1, 9_000_000, 10**9])
@pytest.mark.parametrize("name", ["gptj", "falcon-alibi"])
def test_many_prompts_and_any_memory_give_the_same(name: str, memory: int) -> None:
    session = session_of(name)
    prompts = [
        encode_trace(session, TEXT, SUBJECT),
        encode_trace(session, START, FIRST),
        encode_trace(session, "{} is of the city", "Rome", "Paris"),
    ]
    kinds = ("hidden", "mlp", "severed_attn")
    noise = [draws(session, prompt, samples=2) for prompt in prompts]
    options = TraceOptions(kinds=kinds, window=3)
    alone = [trace_prompts(session, [p], options, draws=[n])[0] for p, n in zip(prompts, noise, strict=True)]
    together = trace_prompts(
        session, prompts, TraceOptions(kinds=kinds, window=3, memory=memory), draws=noise
    )
    for one, other in zip(alone, together, strict=True):
        assert one.input_ids == other.input_ids and one.answer_id == other.answer_id
        assert abs(one.low_score - other.low_score) <= 1e-12
        for kind in kinds:
            assert np.abs(one.scores[kind] - other.scores[kind]).max() <= 1e-12
    assert together[2].answer_id == prompts[2].answer


def test_the_result_says_how_it_was_run() -> None:
    engines = {}
    for name in ("gpt2", "bloom", "falcon"):
        session = session_of(name)
        prompt = encode_trace(session, TEXT, SUBJECT)
        options = TraceOptions(kinds=("hidden",), noise=Noise(samples=1))
        engines[name] = trace_prompts(session, [prompt], options)[0].engine
    assert engines["gpt2"] == "packed tokens"
    assert engines["bloom"].startswith("padded rows (") and "position_ids" in engines["bloom"]
    assert engines["falcon"] == "padded rows (FalconAttention computes attention in line)"


def test_attention_of_the_users_own_runs_on_whole_rows() -> None:
    """A kernel that may know nothing of masks and caches is given what the model gives it."""

    def own(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        weights = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * options["scaling"]
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = torch.softmax(weights.masked_fill(future, -torch.inf), dim=-1)
        out = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["tests_own"] = own
    try:
        session = session_of("llama")
        session.model.set_attn_implementation("tests_own")
        prompt = encode_trace(session, TEXT, SUBJECT)
        noise = draws(session, prompt, samples=2)
        (found,) = trace_prompts(session, [prompt], TraceOptions(kinds=EVERY, window=2), draws=[noise])
        assert found.engine.startswith("whole padded rows (") and "'tests_own'" in found.engine
        for kind in EVERY:
            scores, _, _ = twin(session, prompt, kind, noise, 2)
            assert np.abs(found.scores[kind] - scores).max() <= 1e-12, kind
    finally:
        del ALL_ATTENTION_FUNCTIONS["tests_own"]


def test_the_subjects_last_token_only() -> None:
    session = session_of("gpt2")
    prompt = encode_trace(session, TEXT, SUBJECT)
    noise = draws(session, prompt)
    every, last = (
        trace_prompts(session, [prompt], TraceOptions(kinds=EVERY, window=2, tokens=tokens), draws=[noise])[0]
        for tokens in ("all", "subject_last")
    )
    assert last.traced == (prompt.span[1] - 1,)
    for kind in EVERY:
        assert np.abs(last.scores[kind][0] - every.scores[kind][prompt.span[1] - 1]).max() <= 1e-12


def test_the_model_stays_as_it_was() -> None:
    session = session_of("gpt2")
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    session.model.train()
    prompt = encode_trace(session, TEXT, SUBJECT)
    trace_prompts(session, [prompt], TraceOptions(noise=Noise(samples=2)))
    assert session.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
    assert not any(module._forward_hooks for module in session.model.modules())
