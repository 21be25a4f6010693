"""Tapped inputs and output gradients equal those of plain autograd with every weight gradient and every logit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import reference.tap
import torch
from tiny import CAUSAL, TINY, VOCAB, tiny_batch, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastedit.arch import ResolvedArch, find_module, resolve
from fastedit.engine.tap import LabelRows, Tap, TapBatch, Tapped, tap
from fastedit.tokens import encode_edit, target_ids

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def make_batch(model: PreTrainedModel, *, rows: int = 3, seed: int = 0) -> TapBatch:
    """Three rows of unequal length, two or three labels each (BERT: at masked tokens; T5: at the decoder's)."""
    made = tiny_batch(model, batch=rows, length=9, seed=seed)
    ids, mask = made["input_ids"], made["attention_mask"]
    mask[1, 6:] = 0
    decoder = made.get("decoder_input_ids")
    labels = torch.full_like(ids if decoder is None else decoder, -100)
    generator = torch.Generator().manual_seed(seed + 1)
    for row in range(rows):
        for position in (2, 4, 5)[row % 2 :]:
            labels[row, position] = torch.randint(2, VOCAB, (1,), generator=generator)
    if decoder is None:
        return TapBatch(ids, mask, labels)
    decoder_mask = torch.ones_like(decoder)
    decoder_mask[1, 6:] = 0
    return TapBatch(ids, mask, labels, decoder, decoder_mask)


def inputs_of(batch: TapBatch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if batch.decoder_ids is not None:
        inputs |= {"decoder_input_ids": batch.decoder_ids, "decoder_attention_mask": batch.decoder_mask}
    return inputs


def names_of(arch: ResolvedArch) -> list[str]:
    """Linears of three blocks, several of one block, of both sides where there are two."""
    sites = [("mlp_in", 1), ("mlp_out", 1), ("attn_out", 2), ("mlp_out", arch.depth - 1)]
    names = [arch.name(site, layer) for site, layer in sites]
    if arch.mlp_gate(1) is not None:
        names.insert(0, arch.name("mlp_gate", 1))
    if arch.model.config.is_encoder_decoder:
        encoder = resolve(arch.model, side="encoder")
        names += [encoder.name("mlp_out", 1), encoder.name("attn_out", 3)]
        names += [f"decoder.block.2.layer.1.EncDecAttention.{part}" for part in "qkv"]
    return names


def real_tokens(batch: TapBatch, name: str) -> Tensor:
    source = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    mask = batch.decoder_mask if batch.decoder_mask is not None and not source else batch.mask
    return mask.bool()


def stored(module: nn.Module, gradient: Tensor) -> Tensor:
    return gradient.T if isinstance(module, Conv1D) else gradient


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("model_type", TINY)
def test_equals_plain_autograd(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    arch = resolve(model)
    batch, names, limit = make_batch(model), names_of(arch), TOLERANCES[dtype]
    weights = torch.tensor([0.5, 2.0, 1.0])
    found = tap(arch, batch, names, weights=weights)
    twin, losses = reference.tap.tap(model, inputs_of(batch), batch.labels, names, weights=weights)
    assert list(found.modules) == names
    assert error(found.losses, losses) <= limit and found.losses.dtype == dtype
    assert error(found.loss, (weights * losses).sum()) <= limit
    for name in names:
        X, D, gradient = twin[name]
        real, one = real_tokens(batch, name), found[name]
        assert error(one.inputs, X[real]) <= limit, name
        assert error(one.grads, D[real]) <= limit, name
        assert torch.equal(torch.stack([one.rows, one.positions], 1), real.nonzero())
        assert one.inputs.dtype == one.grads.dtype == dtype
        # The identity that makes the factors enough: sum_t d_t x_t^T is the gradient of the weight.
        assert error(stored(find_module(model, name), one.weight_gradient()), gradient) <= limit, name


@pytest.mark.parametrize("variant", [{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {}])
def test_t5_makes_its_decoder_inputs_from_the_labels(variant: dict[str, Any]) -> None:
    model = tiny_model("t5", dtype=torch.float64, decoder_start_token_id=1, **variant)
    arch = resolve(model)
    batch = tiny_batch(model)
    labels = torch.tensor([[5, 6, 7, 0], [8, 0, -100, -100]])
    names = names_of(arch)
    found = tap(
        arch, TapBatch(batch["input_ids"], batch["attention_mask"], labels), names, reduction="batch_mean"
    )
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    assert error(found.loss, expected.loss) <= 1e-12
    assert found[names[0]].rows.tolist() == [0, 0, 0, 0, 1, 1]
    assert len(found["encoder.block.1.layer.1.DenseReluDense.wo"].rows) == 14


def test_source_and_target_tokens_of_equal_number_are_told_apart() -> None:
    model = tiny_model("t5")
    arch = resolve(model)
    made = make_batch(model)
    keep = slice(0, made.labels.shape[1])
    batch = TapBatch(made.ids[:, keep], made.mask[:, keep], made.labels, made.decoder_ids, made.decoder_mask)
    names = [f"decoder.block.2.layer.1.EncDecAttention.{part}" for part in "qkv"]
    found = tap(arch, batch, names, tokens="labels")
    labelled, source = (batch.labels >= 0).nonzero(), batch.mask.nonzero()
    for name, places in zip(names, (labelled, source, source), strict=True):
        assert torch.equal(torch.stack([found[name].rows, found[name].positions], 1), places)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batch_mean"])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bert"])
def test_reductions(model_type: str, reduction: Any) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    arch = resolve(model)
    batch, name = make_batch(model), arch.name("mlp_out", 2)
    found = tap(arch, batch, [name], reduction=reduction)
    twin, losses = reference.tap.tap(model, inputs_of(batch), batch.labels, [name], reduction=reduction)
    assert error(found.losses, losses) <= 1e-12
    assert error(found[name].grads, twin[name][1][batch.mask.bool()]) <= 1e-10


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "falcon", "llama", "bert"])
def test_a_batch_equals_a_loop(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    arch = resolve(model)
    batch, names = make_batch(model), names_of(arch)
    together = tap(arch, batch, names)
    for row in range(batch.requests):
        length = int(batch.mask[row].sum())
        cut = (slice(row, row + 1), slice(0, length))
        alone = tap(arch, TapBatch(batch.ids[cut], batch.mask[cut], batch.labels[cut]), names)
        assert error(alone.losses[0], together.losses[row]) <= 1e-10
        for name in names:
            one = together[name]
            assert error(alone[name].inputs, one.inputs[one.rows == row]) <= 1e-10
            assert error(alone[name].grads, one.grads[one.rows == row]) <= 1e-10


def test_tokens_are_chosen_by_name_or_mask() -> None:
    model = tiny_model("llama")
    arch = resolve(model)
    batch, name = make_batch(model), arch.name("mlp_gate", 2)
    every, labels = tap(arch, batch, [name])[name], tap(arch, batch, [name], tokens="labels")[name]
    mask = batch.labels >= 0
    masked = tap(arch, batch, [name], tokens=mask)[name]
    inside = mask[every.rows, every.positions]
    for one in (labels, masked):
        assert torch.equal(one.inputs, every.inputs[inside]) and torch.equal(one.grads, every.grads[inside])
        assert torch.equal(one.rows, mask.nonzero()[:, 0]) and torch.equal(
            one.positions, mask.nonzero()[:, 1]
        )


def test_active_tokens_of_the_last_mlp_are_the_labelled_ones() -> None:
    model = tiny_model("gpt2")
    arch = resolve(model)
    batch = make_batch(model)
    last, lower = arch.name("mlp_out", arch.depth - 1), arch.name("mlp_out", 1)
    found = tap(arch, batch, [lower, last])
    active = found[last].active()
    assert torch.equal(found[last].positions[active], (batch.labels >= 0).nonzero()[:, 1])
    # Below, earlier tokens count through attention; those after a row's last label never do.
    assert torch.equal(found[lower].active(), found[lower].positions <= 5)


def test_encoded_requests_become_a_batch() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("gpt2")
    arch = resolve(model)
    cases = [("The {} is in", "Eiffel Tower", "Rome"), ("{} plays the", "Toko Yasuda", "big piano")]
    rows = []
    for prompt, subject, target in cases:
        rows.append(encode_edit(tokenizer, prompt, subject, target=target_ids(tokenizer, target)))
    batch = TapBatch.of(rows, pad_id=1)
    found = tap(arch, batch, [arch.name("mlp_out", 2)], tokens="labels")
    for number, row in enumerate(rows):
        text = torch.tensor([[*row.ids, row.target[-1]]])
        with torch.no_grad():
            logp = model(input_ids=text).logits.log_softmax(-1)[0]
        nll = -logp[row.target_start : -1].gather(1, text[0, row.target_start + 1 :, None]).mean()
        assert torch.allclose(found.losses[number], nll, atol=1e-5)
    assert len(found[arch.name("mlp_out", 2)].rows) == sum(len(row.target) for row in rows)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "t5"])
def test_a_loss_of_ones_own(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    arch = resolve(model)
    batch, name = make_batch(model), arch.name("mlp_out", 2)
    labelled = batch.labels >= 0
    old = torch.randn(int(labelled.sum()), VOCAB, dtype=torch.float64).log_softmax(-1)

    def locality(rows: LabelRows) -> Tensor:
        new = rows.logits().log_softmax(-1)
        return rows.reduce((old.exp() * (old - new)).sum(-1)) + rows.reduce(rows.nll(), "sum")

    found = tap(arch, batch, [name], loss=locality)
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0].clone()

    handle = find_module(model, name).register_forward_hook(hook)
    new = model(**inputs_of(batch)).logits[labelled].log_softmax(-1)
    handle.remove()
    owner = labelled.nonzero()[:, 0]
    divergence = (old.exp() * (old - new)).sum(-1) / labelled.sum(1)[owner]
    losses = torch.zeros(3, dtype=torch.float64).index_add(
        0, owner, divergence - new.gather(1, batch.labels[labelled][:, None])[:, 0]
    )
    (grad,) = torch.autograd.grad(losses.sum(), seen[0])
    assert error(found.losses, losses) <= 1e-12
    assert error(found[name].grads, grad[real_tokens(batch, name)]) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "gemma2", "t5"])
def test_half_precision(model_type: str, dtype: torch.dtype) -> None:
    model, exact = tiny_model(model_type, dtype=dtype), tiny_model(model_type, dtype=dtype).float()
    batch, arch = make_batch(model), resolve(model)
    names = names_of(arch)
    found, wide = tap(arch, batch, names), tap(arch, batch, names, dtype=torch.float32)
    truth = tap(resolve(exact), batch, names)
    twin, losses = reference.tap.tap(model, inputs_of(batch), batch.labels, names)
    assert found.losses.dtype == losses.dtype == torch.float32
    assert error(found.losses, truth.losses) <= 3 * error(losses, truth.losses)
    for name in names:
        assert found[name].inputs.dtype == found[name].grads.dtype == dtype
        assert wide[name].inputs.dtype == wide[name].grads.dtype == torch.float32
        assert torch.equal(wide[name].grads, found[name].grads.float())
        # Not three times further from the same weights in float32 than autograd in the model's own precision.
        expected = twin[name][1][real_tokens(batch, name)]
        assert error(found[name].grads, truth[name].grads) <= 3 * error(expected, truth[name].grads), name


def test_loss_scale_saves_small_gradients_of_float16_models() -> None:
    model = tiny_model("gpt2", dtype=torch.float16)
    arch = resolve(model)
    batch, name = make_batch(model), arch.name("mlp_out", 1)
    tiny = torch.full((3,), 2.0**-22)
    lost = tap(arch, batch, [name], weights=tiny, dtype=torch.float32)[name].grads
    kept = tap(arch, batch, [name], weights=tiny, dtype=torch.float32, loss_scale=2.0**22)[name].grads
    plain = tap(arch, batch, [name], dtype=torch.float32)[name].grads
    assert torch.equal(kept, plain * 2.0**-22)
    assert error(lost, kept) > 0.1


def test_what_is_skipped() -> None:
    model = tiny_model("gpt2")
    arch = resolve(model)
    batch = make_batch(model)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**inputs_of(batch))
    last, first = arch.name("mlp_out", arch.depth - 1), arch.name("mlp_in", 0)
    with FlopCounterMode(display=False) as top:
        tap(arch, batch, [last])
    with FlopCounterMode(display=False) as bottom:
        tap(arch, batch, [first])
    # The head's products are not counted inside `target_loss`.
    blocks = forward.get_total_flops() - batch.ids.numel() * 2 * VOCAB * 32
    # Above the last linear there is no product left, so the whole costs one forward of the blocks.
    assert top.get_total_flops() == blocks
    # Without weight gradients the backward of a block costs its forward, but for attention, which costs 2.5 times.
    assert 1.7 * blocks < bottom.get_total_flops() <= 2.3 * blocks


def test_leaves_nothing_behind() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    model.requires_grad_(True)
    model.model.layers[0].requires_grad_(False)
    arch = resolve(model)
    before = [p.detach().clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def check() -> None:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())

    batch, name = make_batch(model), arch.name("mlp_out", 1)
    with torch.no_grad():
        found = tap(arch, batch, [name])
    assert not found.loss.requires_grad and not found[name].inputs.requires_grad
    check()
    with torch.inference_mode():
        assert error(tap(arch, make_batch(model), [name])[name].grads, found[name].grads) == 0
    check()

    def fails(_rows: LabelRows) -> Tensor:
        raise RuntimeError("a loss that fails")

    with pytest.raises(RuntimeError, match="a loss that fails"):
        tap(arch, batch, [name], loss=fails)
    check()

    def breaks(*_: Any) -> None:
        raise RuntimeError("a block that fails")

    handle = arch.block(2).register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match="a block that fails"):
        tap(arch, batch, [name])
    handle.remove()
    check()


def test_keeps_only_what_it_returns() -> None:
    model = tiny_model("gpt2")
    arch = resolve(model)
    alive: list[weakref.ref[Tensor]] = []

    def watch(_module: nn.Module, _args: Any, output: Any) -> None:
        alive.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    handles = [module.register_forward_hook(watch) for module in model.transformer.h.modules()]
    found = tap(arch, make_batch(model), [arch.name("mlp_out", 1)], tokens="labels")
    for handle in handles:
        handle.remove()
    gc.collect()
    assert len(alive) > 20 and all(reference() is None for reference in alive)
    one = found[arch.name("mlp_out", 1)]
    for kept in (one.inputs, one.grads):
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_an_adapted_linear_is_found_below_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    arch, batch = resolve(model), make_batch(model)
    name = arch.name("mlp_out", 2)
    plain = tap(arch, batch, [name])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
    found = tap(resolve(adapted), batch, [name])
    assert torch.equal(found[name].inputs, plain[name].inputs)
    assert error(found[name].grads, plain[name].grads) <= 1e-6
    assert all(p.grad is None for p in adapted.parameters())


def changed(batch: TapBatch, **fields: Tensor) -> TapBatch:
    return TapBatch(**{**vars(batch), **fields})


def at(tensor: Tensor, index: Any, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


NAME = "transformer.h.1.mlp.c_proj"
BAD_BATCH: dict[str, tuple[Callable[[TapBatch], TapBatch], str]] = {
    "ids": (
        lambda b: changed(b, ids=b.ids.float()),
        r"ids: must be int64 of shape \[B, S\], got torch.float32",
    ),
    "token": (
        lambda b: changed(b, ids=at(b.ids, 0, VOCAB)),
        "ids: must be from 0 to 319, are from .* to 320",
    ),
    "mask": (lambda b: changed(b, mask=b.mask[:, 1:]), r"mask: must have shape \[3, 9\], got \[3, 8\]"),
    "left": (lambda b: changed(b, mask=b.mask.flip(1)), "mask: .*padded on the right only"),
    "labels": (lambda b: changed(b, labels=b.labels[:, 1:]), r"labels: must have the shape of ids \[3, 9\]"),
    "kind": (lambda b: changed(b, labels=b.labels.float()), r"labels: must be int64 of shape \[3, \.\.\.\]"),
    "none": (lambda b: changed(b, labels=at(b.labels, 1, -100)), "labels: row 1 has no label token"),
    "large": (
        lambda b: changed(b, labels=at(b.labels, (2, 3), VOCAB)),
        "from 0 to 319, is 320 in row 2 at position 3",
    ),
    "low": (
        lambda b: changed(b, labels=at(b.labels, (0, 3), -1)),
        "from 0 to 319, is -1 in row 0 at position 3",
    ),
    "padding": (
        lambda b: changed(b, labels=at(b.labels, (1, 7), 5)),
        "row 1 has a label on padding, at position 7",
    ),
    "decoder": (lambda b: changed(b, decoder_ids=b.ids), "decoder_ids: GPT2LMHeadModel has no decoder"),
}


@pytest.mark.parametrize("case", BAD_BATCH)
def test_a_bad_batch_gets_one_clear_line(case: str) -> None:
    model = tiny_model("gpt2")
    change, message = BAD_BATCH[case]
    with pytest.raises(ValueError, match=message):
        tap(resolve(model), change(make_batch(model)), [NAME])


BAD_ARGUMENT: dict[str, tuple[dict[str, Any], str]] = {
    "near": ({"modules": [NAME + ".weight"]}, "GPT2LMHeadModel has no module .*; near names: .*" + NAME),
    "far": ({"modules": ["zzz"]}, "no module 'zzz'; near names: .*transformer.h.3.mlp.c_proj"),
    "block": ({"modules": ["transformer.h.1"]}, "must be a Linear or a Conv1D, is a GPT2Block"),
    "head": ({"modules": ["lm_head"]}, "modules: 'lm_head' must lie inside a block"),
    "twice": ({"modules": [NAME, NAME]}, f"'{NAME}' is named twice"),
    "empty": ({"modules": []}, "modules: must be a list of one or more"),
    "string": ({"modules": NAME}, "modules: must be a list of one or more"),
    "tokens": ({"tokens": "some"}, "tokens: must be a bool mask or one of all, labels, got 'some'"),
    "shape": ({"tokens": torch.ones(3, 8, dtype=torch.bool)}, r"tokens: must be bool of shape \[3, 9\]"),
    "padding": ({"tokens": torch.ones(3, 9, dtype=torch.bool)}, "chooses padding in row 1 at position 6"),
    "reduction": ({"reduction": "max"}, "reduction: must be one of mean, sum, batch_mean, got 'max'"),
    "weights": ({"weights": torch.ones(2)}, r"weights: must be a tensor of shape \[3\], got \[2\]"),
    "list": ({"weights": [1.0] * 3}, r"weights: must be a tensor of shape \[3\], got list"),
    "dtype": ({"dtype": torch.int64}, "dtype: must be a floating point type or None, got torch.int64"),
    "scale": ({"loss_scale": 0.0}, "loss_scale: must be > 0, got 0.0"),
    "scalar": ({"loss": lambda rows: rows.nll().mean()}, r"one loss per request, shape \[3\], got \[\]"),
    "fixed": ({"loss": lambda rows: torch.ones(3)}, "must return losses with a gradient"),
    "number": ({"loss": lambda rows: 1.0}, r"one loss per request, shape \[3\], got float"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENT)
def test_a_bad_argument_gets_one_clear_line(case: str) -> None:
    model = tiny_model("gpt2")
    arguments, message = BAD_ARGUMENT[case]
    arguments = {"modules": [NAME], **arguments}
    with pytest.raises(ValueError, match=message) as caught:
        tap(resolve(model), make_batch(model), **arguments)
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_linear_without_one_gradient_per_token_is_refused() -> None:
    model = tiny_model("gpt2")
    arch, batch = resolve(model), make_batch(model)
    block = arch.block(1)
    block.spare = nn.Linear(32, 32)
    with pytest.raises(
        ValueError, match=r"'transformer.h.1.spare' is not run in a forward of GPT2LMHeadModel"
    ):
        tap(arch, batch, ["transformer.h.1.spare"])
    handle = block.register_forward_pre_hook(lambda module, args: (block.spare(args[0]), None)[1])
    with pytest.raises(ValueError, match=r"'transformer.h.1.spare' has no gradient"):
        tap(arch, batch, ["transformer.h.1.spare", NAME])
    handle.remove()
    handle = block.register_forward_pre_hook(lambda module, args: (block.spare(args[0][:2]), None)[1])
    with pytest.raises(ValueError, match=r"reads \[2, 9, 32\], which is not one vector per token"):
        tap(arch, batch, ["transformer.h.1.spare"])
    handle.remove()
    arch.block(2).mlp.c_proj = block.mlp.c_proj
    with pytest.raises(ValueError, match=f"'{NAME}' is run more than once"):
        tap(arch, batch, [NAME])


def test_the_encoder_side_of_t5_is_refused() -> None:
    model = tiny_model("t5")
    with pytest.raises(ValueError, match="arch: must be the decoder side"):
        tap(resolve(model, side="encoder"), make_batch(model), ["encoder.block.0.layer.1.DenseReluDense.wo"])


def test_results_are_what_the_docstring_says() -> None:
    model = tiny_model("qwen3")
    arch = resolve(model)
    found = tap(arch, make_batch(model), [arch.name("mlp_out", 0)], tokens="labels")
    assert isinstance(found, Tap) and isinstance(found[arch.name("mlp_out", 0)], Tapped)
    one = found[arch.name("mlp_out", 0)]
    assert one.inputs.shape == (8, 48) and one.grads.shape == (8, 32)
    assert found.losses.shape == (3,) and found.loss.shape == ()
    assert set(CAUSAL) < set(TINY)
