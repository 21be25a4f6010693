"""Every architecture row against a tiny random model: paths, keys, residual stream, logits, block replay, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CAUSAL, DEPTH, TINY, VOCAB, WIDTH, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastedit.arch import (
    ARCHITECTURES,
    Architecture,
    ResolvedArch,
    block_output,
    editable_weight,
    find_module,
    is_transposed,
    replace_block_output,
    resolve,
    unwrap,
)

# A row, and the configuration switches that change what `resolve` reads from it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY},
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon-sequential": ("falcon", {"parallel_attn": False}),
    "falcon-alibi": ("falcon", {"parallel_attn": False, "alibi": True, "bias": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "gemma3_text-softcap": ("gemma3_text", {"final_logit_softcapping": 3.0}),
    "llama-wide-key": ("llama", {"intermediate_size": WIDTH}),
}
CAUSAL_VARIANTS = tuple(name for name, (row, _) in VARIANTS.items() if row in CAUSAL)


class Captured(SimpleNamespace):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


@contextmanager
def capture(modules: dict[str, nn.Module]) -> Iterator[dict[str, Captured]]:
    """What each module was called with and returned, cloned: Falcon adds into its MLP's output in place."""
    seen: dict[str, Captured] = {}

    def clone(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(clone(item) for item in value)
        return value.clone() if isinstance(value, Tensor) else value

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            kwargs = {key: clone(value) for key, value in kwargs.items()}
            seen[name] = Captured(args=clone(args), kwargs=kwargs, out=clone(out))

        return record

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def build(variant: str) -> tuple[PreTrainedModel, ResolvedArch]:
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides)
    return model, resolve(model)


def forward(model: PreTrainedModel, *, padded: bool = False) -> Tensor:
    batch = tiny_batch(model)
    if padded:
        batch["attention_mask"][1, 4:] = 0
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def test_the_table_is_the_documented_one() -> None:
    decoders = (
        "bloom falcon gemma gemma2 gemma3_text gpt2 gpt_neox gptj llama mistral opt phi phi3 qwen2 qwen3"
    )
    assert sorted(ARCHITECTURES) == ["bert", *decoders.split(), "t5"]
    assert set(ARCHITECTURES) == set(TINY)
    assert all(row.model_type == name for name, row in ARCHITECTURES.items())
    with pytest.raises(TypeError):
        ARCHITECTURES["x"] = ARCHITECTURES["gpt2"]  # type: ignore[index]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_is_called_and_named(variant: str) -> None:
    model, arch = build(variant)
    sites = ("block", "mlp", "mlp_in", "mlp_out", "attn", "attn_out")
    modules = {f"{site}{i}": getattr(arch, site)(i) for site in sites for i in range(arch.depth)}
    modules |= {"embed": arch.embed, "head": arch.head}
    if arch.final_norm is not None:
        modules["final_norm"] = arch.final_norm
    with capture(modules) as seen:
        forward(model)
    assert set(seen) == set(modules)
    assert (arch.depth, arch.width) == (DEPTH, WIDTH)
    for site in sites:
        for i in range(DEPTH):
            assert model.get_submodule(arch.name(site, i)) is getattr(arch, site)(i)


@pytest.mark.parametrize("variant", VARIANTS)
def test_key_is_the_input_of_the_edited_matrix(variant: str) -> None:
    model, arch = build(variant)
    with capture({str(i): arch.mlp_out(i) for i in range(DEPTH)}) as seen:
        forward(model)
    for i in range(DEPTH):
        module = arch.mlp_out(i)
        key, out = seen[str(i)].args[0], seen[str(i)].out
        weight, transposed = editable_weight(model, arch.name("mlp_out", i))
        assert transposed is is_transposed(module) is (arch.row.model_type == "gpt2")
        canonical = weight.T if transposed else weight
        bias = getattr(module, "bias", None)
        expected = key @ canonical.T + (0.0 if bias is None else bias)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert canonical.shape == (WIDTH, arch.key_dim(i)) and key.shape[-1] == arch.key_dim(i)
        assert (key.dim() == 2) is arch.row.flat_mlp


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_linears_and_gates(variant: str) -> None:
    _, arch = build(variant)
    features = arch.key_dim(0)
    weight = arch.mlp_in(0).weight
    rows = weight.shape[1] if is_transposed(arch.mlp_in(0)) else weight.shape[0]
    assert rows == features * (2 if arch.row.fused_gate else 1)
    gated = arch.row.model_type in {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
    gate = arch.mlp_gate(0)
    assert (gate is not None) is (gated or variant == "t5-gated")
    if gate is not None:
        assert gate.weight.shape == weight.shape and gate is not arch.mlp_in(0)


@pytest.mark.parametrize("variant", CAUSAL_VARIANTS)
def test_the_residual_stream_adds_up(variant: str) -> None:
    """block output = block input + attention + MLP, with the flags of the row, and MLP input says `parallel`."""
    model, arch = build(variant)
    modules = {"block": arch.block(1), "attn_out": arch.attn_out(1), "mlp_out": arch.mlp_out(1)}
    with capture(modules | {"mlp": arch.mlp(1)}) as seen:
        forward(model)
    captured = seen["block"]
    entering = captured.args[0] if captured.args else captured.kwargs["hidden_states"]
    leaving = block_output(captured.out)
    attention, mlp = (seen[site].out.reshape(entering.shape) for site in ("attn_out", "mlp_out"))
    adds = torch.allclose(entering + attention + mlp, leaving, rtol=1e-4, atol=1e-5)
    assert adds is not (arch.row.post_norm or arch.row.norm_after_add)
    increment = block_output(seen["mlp"].out).reshape(entering.shape)
    assert torch.equal(increment, mlp) is not arch.row.residual_inside

    # Change what the attention adds: in a parallel block the MLP must not notice.
    handle = arch.attn_out(1).register_forward_hook(lambda _m, _a, out: out + 1.0)
    with capture({"mlp_out": arch.mlp_out(1)}) as shifted:
        forward(model)
    handle.remove()
    assert torch.equal(shifted["mlp_out"].args[0], seen["mlp_out"].args[0]) is arch.row.parallel


def test_flags_of_the_rows() -> None:
    flags = {name: build(name)[1].row for name in VARIANTS}
    assert {name for name, row in flags.items() if row.parallel} == {
        "gptj", "gpt_neox", "falcon", "falcon-new", "phi",
    }  # fmt: skip
    assert {name for name, row in flags.items() if row.post_norm} == {
        "gemma2",
        "gemma3_text",
        "gemma3_text-softcap",
    }
    assert {name for name, row in flags.items() if row.norm_after_add} == {"opt-350m", "bert"}
    assert {name for name, row in flags.items() if row.residual_inside} == {"bloom", "bert"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_from_the_last_block(variant: str) -> None:
    model, arch = build(variant)
    with capture({"last": arch.block(DEPTH - 1)}) as seen:
        expected = forward(model)
    with torch.no_grad():
        assert torch.equal(arch.logits(block_output(seen["last"].out)), expected)
    assert arch.head.weight.shape[0] == VOCAB


def test_softcap_is_read_from_the_config() -> None:
    assert build("gemma2")[1].softcap == 5.0
    assert build("gemma3_text")[1].softcap is None and build("gemma3_text-softcap")[1].softcap == 3.0
    assert resolve(tiny_model("gemma2", final_logit_softcapping=None)).softcap is None
    assert all(build(name)[1].softcap is None for name in ("gpt2", "llama", "bert"))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replaying_a_block_gives_the_same_bits(variant: str, padded: bool) -> None:
    model, arch = build(variant)
    with capture({str(i): arch.block(i) for i in range(DEPTH)}) as seen:
        forward(model, padded=padded)
    for i in range(DEPTH):
        call = seen[str(i)]
        with torch.no_grad():
            again = arch.block(i)(*call.args, **call.kwargs)
        assert type(again) is type(call.out)
        assert torch.equal(block_output(again), block_output(call.out))


@pytest.mark.parametrize("variant", VARIANTS)
def test_replacing_a_block_output_reaches_the_logits(variant: str) -> None:
    model, arch = build(variant)
    before = forward(model)
    for shift, same in ((0.0, True), (0.5, False)):
        handle = arch.block(1).register_forward_hook(
            lambda _m, _a, out, by=shift: replace_block_output(
                out, block_output(out) + torch.arange(WIDTH) * by
            )
        )
        assert torch.equal(forward(model), before) is same
        handle.remove()


def test_block_outputs() -> None:
    h, other = torch.zeros(1, 2, 3), torch.ones(1)
    assert block_output(h) is h and block_output((h, other)) is h
    assert replace_block_output(h, other) is other
    replaced = replace_block_output((h, other, None), h + 1)
    assert isinstance(replaced, tuple) and replaced[1] is other and replaced[2] is None
    assert isinstance(replace_block_output([h], h), list)
    for bad in (None, (), (None, h), {"hidden": h}):
        with pytest.raises(ValueError, match="out: must be a tensor or a tuple"):
            block_output(bad)


# ---- sides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_t5_has_two_sides(gated: bool) -> None:
    model = tiny_model("t5", num_decoder_layers=3, feed_forward_proj="gated-gelu" if gated else "relu")
    decoder, encoder = resolve(model), resolve(model, side="encoder")
    assert (decoder.depth, encoder.depth) == (3, 4)
    assert decoder.name("mlp_out", 2) == "decoder.block.2.layer.2.DenseReluDense.wo"
    assert encoder.name("mlp_out", 2) == "encoder.block.2.layer.1.DenseReluDense.wo"
    assert decoder.name("cross", 2) == "decoder.block.2.layer.1.EncDecAttention"
    with pytest.raises(ValueError, match="site: 't5' has no 'cross'"):
        encoder.cross(0)
    assert encoder.row.side == "encoder" and resolve(model, side="decoder").row.side == "decoder"
    with capture({"embed": encoder.embed, "mlp_out": encoder.mlp_out(3), "gate": encoder.mlp_in(0)}) as seen:
        forward(model)
    assert seen["mlp_out"].args[0].shape == (2, 7, encoder.key_dim(3))
    with pytest.raises(ValueError, match="no head"):
        encoder.logits(seen["mlp_out"].out)


def test_a_side_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="side: 'gpt2' has only the decoder side, got 'encoder'"):
        resolve(tiny_model("gpt2"), side="encoder")
    with pytest.raises(ValueError, match="side: 'bert' has only the encoder side"):
        resolve(tiny_model("bert"), side="decoder")
    with pytest.raises(ValueError, match="side: must be 'encoder' or 'decoder', got 'left'"):
        resolve(tiny_model("t5"), side="left")


# ---- orientation -----------------------------------------------------------------------------------------------


def test_orientation_comes_from_the_type() -> None:
    # Square, so that no shape could tell.
    assert is_transposed(Conv1D(8, 8)) is True
    assert is_transposed(nn.Linear(8, 8)) is False
    with pytest.raises(NotImplementedError, match="must be a Linear or a Conv1D, got Embedding"):
        is_transposed(nn.Embedding(8, 8))


# ---- wrappers --------------------------------------------------------------------------------------------------


def test_wrapped_models_resolve_to_the_same_modules() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("gpt2")
    expected = resolve(model)
    compiled = resolve(torch.compile(model, backend="eager"))
    assert compiled.model is model and compiled.mlp_out(2) is expected.mlp_out(2)

    config = peft.LoraConfig(r=2, target_modules=["mlp.c_proj"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config)
    adapted = resolve(torch.compile(wrapped, backend="eager"))
    assert unwrap(wrapped) is model
    assert (
        adapted.mlp_out(2) is expected.mlp_out(2)
        and adapted.name("mlp_out", 2) == "transformer.h.2.mlp.c_proj"
    )
    assert editable_weight(wrapped, "transformer.h.2.mlp.c_proj") == (expected.mlp_out(2).weight, True)


# ---- refusals --------------------------------------------------------------------------------------------------

MOE = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "olmoe",
    "gpt_oss",
    "phimoe",
    "granitemoe",
    "jamba",
    "dbrx",
)
WRAPPERS = ("gemma3", "mllama", "llava", "qwen2_vl", "llama4")


class Stub(nn.Module):
    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.config = AutoConfig.for_model(model_type)


@pytest.mark.parametrize("model_type", MOE)
def test_mixture_of_experts_is_refused(model_type: str) -> None:
    with pytest.raises(
        ValueError, match=f"model_type='{model_type}': mixture-of-experts .* no single key; known: bert, "
    ):
        resolve(Stub(model_type))


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_multi_modal_wrappers_are_refused(model_type: str) -> None:
    with pytest.raises(
        ValueError, match=f"model_type='{model_type}': a multi-modal wrapper .*known: .*pass arch="
    ):
        resolve(Stub(model_type))


def test_an_unknown_type_is_refused_and_an_architecture_accepted() -> None:
    config = AutoConfig.for_model("olmo", **{**TINY["llama"], "vocab_size": VOCAB, "pad_token_id": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError) as error:
        resolve(model)
    message = str(error.value)
    assert "\n" not in message and "model_type='olmo': no architecture row; known: bert, bloom," in message
    assert "pass arch=Architecture(...)" in message
    row = replace(ARCHITECTURES["llama"], model_type="olmo")
    assert resolve(model, row).name("mlp_out", 3) == resolve(model, "llama").name("mlp_out", 3)
    with pytest.raises(ValueError, match="arch: must be an Architecture or one of bert, .*, got 'lama'"):
        resolve(model, "lama")


def test_a_missing_path_is_named() -> None:
    model = tiny_model("gpt2")
    row = replace(ARCHITECTURES["gpt2"], attn_out="attn.o_proj")
    with pytest.raises(
        ValueError, match=r"no module 'transformer\.h\.0\.attn\.o_proj', which the row 'gpt2' names"
    ):
        resolve(model, row)
    with pytest.raises(ValueError, match=r"GPT2Model has no module 'transformer\.h\.0'.*model with its head"):
        resolve(GPT2Model(model.config))


def test_depth_must_agree_with_the_config() -> None:
    model = tiny_model("gpt2")
    del model.transformer.h[3]
    with pytest.raises(ValueError, match=r"no module 'transformer\.h\.3'"):
        resolve(model)
    model.config.n_layer = 2
    with pytest.raises(
        ValueError, match=r"has 3 blocks at 'transformer\.h', but config\.num_hidden_layers is 2"
    ):
        resolve(model)


def test_a_module_without_config_is_refused() -> None:
    with pytest.raises(ValueError, match="model: must be a Hugging Face model with a config, got Linear"):
        resolve(nn.Linear(2, 2))


@pytest.mark.parametrize("layer", [-1, 4, 1.0, True, None, "1"])
def test_layers_out_of_range(layer: Any) -> None:
    arch = resolve(tiny_model("gpt2"))
    with pytest.raises(ValueError, match="layer: must be an integer from 0 to 3, got "):
        arch.mlp_out(layer)
    assert arch.check_layer(3) == 3


def test_sites_that_are_not_there() -> None:
    arch = resolve(tiny_model("gpt2"))
    with pytest.raises(ValueError, match="site: 'gpt2' has no 'mlp_gate'"):
        arch.name("mlp_gate", 0)
    with pytest.raises(ValueError, match="site: must be one of block, mlp, .*, got 'down'"):
        arch.name("down", 0)  # type: ignore[arg-type]
    assert arch.mlp_gate(0) is None


def test_rows_validate_themselves() -> None:
    with pytest.raises(ValueError, match=r"Architecture\.block: must contain exactly one '{}'"):
        replace(ARCHITECTURES["gpt2"], block="transformer.h")
    with pytest.raises(ValueError, match=r"Architecture\.side: must be 'decoder' or 'encoder', got 'both'"):
        replace(ARCHITECTURES["gpt2"], side="both")
    with pytest.raises(TypeError):
        Architecture("gpt2")  # type: ignore[call-arg, misc]


def test_bloom_bypassing_its_own_module_is_refused() -> None:
    with pytest.raises(ValueError, match="slow_but_exact: must be False"):
        resolve(tiny_model("bloom", pretraining_tp=2, slow_but_exact=True))


# ---- weights that cannot be edited -----------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """Stands for a packed linear of a quantisation library."""


class Packed(nn.Module):
    in_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


class PackedParameter(nn.Parameter):
    pass


def _quantised() -> dict[str, nn.Module]:
    uint8 = Linear4bit(4, 4)
    uint8.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    subclass = Linear4bit(4, 4)
    subclass.weight = PackedParameter(torch.zeros(4, 4))
    float8 = nn.Linear(4, 4)
    float8.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    return {
        "uint8": uint8,
        "subclass": subclass,
        "float8": float8,
        "packed": Packed(),
        "meta": nn.Linear(4, 4, device="meta"),
    }


@pytest.mark.parametrize("kind", ["uint8", "subclass", "float8", "packed", "meta"])
def test_weights_that_cannot_be_edited_are_refused(kind: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = _quantised()[kind]
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(NotImplementedError, match=f"module '{name}': ") as error:
        editable_weight(model, name)
    assert "\n" not in str(error.value)
    assert "offloaded" in str(error.value) if kind == "meta" else "quantised" in str(error.value)
    resolve(model)  # tracing and statistics work on quantised models


def test_unknown_module_name() -> None:
    with pytest.raises(ValueError, match=r"module 'transformer\.h\.9\.mlp': not found in GPT2LMHeadModel"):
        find_module(tiny_model("gpt2"), "transformer.h.9.mlp")


def test_tiny_models_are_reproducible_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert math.isfinite(float(forward(first).sum()))
