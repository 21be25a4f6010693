"""Attention handed over to a function, and given back."""

from __future__ import annotations

import pytest
import torch
from tiny import CAUSAL, tiny_batch, tiny_model

from fastedit.arch import resolve
from fastedit.engine.attention import attending, not_handed_over

IN_LINE = ("bloom", "falcon")


def plain(_layer, q, k, v, *, scale, softcap, window):
    """One causal row of attention."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    gap = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = gap < 0 if window is None else (gap < 0) | (gap >= window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in IN_LINE])
def test_the_models_own_forward_with_another_attention(model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    assert not_handed_over(arch) is None
    ids = tiny_batch(model, batch=1, length=24)["input_ids"]  # beyond the tiny sliding windows
    before = model.config._attn_implementation
    seen = []

    def attend(layer, *args, **options):
        seen.append(layer)
        return plain(layer, *args, **options)

    with torch.no_grad():
        expected = model(ids).logits
        with attending(arch, attend):
            found = model(input_ids=ids, position_ids=torch.arange(24)[None], use_cache=False).logits
        again = model(ids).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert seen == list(range(arch.depth))
    assert torch.equal(again, expected)
    assert model.config._attn_implementation == before
    assert all("_attn" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("model_type", IN_LINE)
def test_what_cannot_be_handed_over_says_why(model_type: str) -> None:
    reason = not_handed_over(resolve(tiny_model(model_type)))
    assert reason is not None and ("in line" in reason or "position_ids" in reason)


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
def test_given_back_after_an_exception_and_when_nested(model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    ids = tiny_batch(model, batch=1)["input_ids"]
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "use_cache": False}

    def fail(*_args, **_options):
        raise OSError("stop")

    with torch.no_grad():
        expected = model(ids).logits
        with attending(arch, plain):
            with pytest.raises(OSError, match="stop"), attending(arch, fail):
                model(**inputs)
            assert torch.allclose(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(ids).logits, expected)


def test_an_argument_that_would_change_the_result_is_refused() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("llama")
    arch = resolve(model)
    names = set(ALL_ATTENTION_FUNCTIONS)
    q = torch.zeros(1, 4, 3, 8)
    with attending(arch, plain):
        call = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
        with pytest.raises(NotImplementedError, match="attention with s_aux"):
            call(arch.attn(0), q, q, q, None, s_aux=torch.zeros(4))
    assert set(ALL_ATTENTION_FUNCTIONS) == names


def test_an_attention_of_the_users_own_is_not_replaced() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("llama")
    arch = resolve(model)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert not_handed_over(arch) is None
    ALL_ATTENTION_FUNCTIONS["mine"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        model.config._attn_implementation = "mine"
        assert "attention implementation 'mine'" in str(not_handed_over(arch))
    finally:
        del ALL_ATTENTION_FUNCTIONS["mine"]
    model.config._attn_implementation = "sdpa"
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **options: plain(*args, **options)
    try:
        assert "'sdpa'" in str(not_handed_over(arch))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_foreign_config_on_a_submodule_is_left_alone() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[0].mlp.config = {"mine": 1}
    with attending(resolve(model), plain):
        pass
    assert model.transformer.h[0].mlp.config == {"mine": 1}
