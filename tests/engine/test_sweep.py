"""The paused sweep against hooks on full forwards, before and after updates of the layers below."""

from __future__ import annotations

import pytest
import torch
from engine.problems import GROUPS, REQUESTS, TEMPLATES, naive
from reference.target_vector import captured, padded
from tiny import CAUSAL, tiny_model, tiny_tokenizer

from fastedit.arch import is_transposed, resolve
from fastedit.engine.padded_sweep import PaddedSweep
from fastedit.engine.problem import TokenOptions, key_rows
from fastedit.engine.sweep import LayerSweep, _PackedSweep, keys_at

WEIGHTS = [1 / 2, 1 / 4, 1 / 4]


def hook_keys(model, arch, layer: int) -> torch.Tensor:
    found = []
    for request in map(naive, REQUESTS):
        ids, mask = padded(request.rows)
        with torch.no_grad(), captured(arch.mlp_out(layer)) as seen:
            model(input_ids=ids, attention_mask=mask)
        inputs = seen["in"].reshape(*ids.shape, -1)  # OPT flattens batch and sequence
        keys = torch.stack([inputs[i, at] for i, at in enumerate(request.lookup)])
        found.append(torch.stack([group.mean(0) for group in keys.split(list(GROUPS))]).mean(0))
    return torch.stack(found)


def hook_activations(model, arch, layer: int) -> torch.Tensor:
    found = []
    for request in map(naive, REQUESTS):
        with torch.no_grad(), captured(arch.block(layer)) as seen:
            model(input_ids=torch.tensor([request.rows[0]]))
        found.append(seen["out"][0, request.lookup[0]])
    return torch.stack(found)


# Some models keep their rotary tables in fp32, whatever the weights, so agreement is not to the last fp64 digit.
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_keys_and_activations_follow_the_updates(model_type: str, batch_tokens: int) -> None:
    # Gemma-2's own mask gives NaN at padded rows in fp64.
    model = tiny_model(model_type, dtype=torch.float32 if model_type == "gemma2" else torch.float64)
    arch = resolve(model)
    rows = [key_rows(tiny_tokenizer(), request, TEMPLATES, TokenOptions()) for request in REQUESTS]
    sweep = LayerSweep(model, arch, rows, WEIGHTS, (0, 2), 3, batch_tokens=batch_tokens)
    generator = torch.Generator().manual_seed(1)
    for layer in (0, 2):
        sweep.advance_to(layer)
        tolerance = 1e-4 if model_type == "gemma2" else 1e-6
        keys, activations = hook_keys(model, arch, layer).double(), hook_activations(model, arch, 3).double()
        assert torch.allclose(sweep.keys(layer), keys, rtol=0, atol=tolerance)
        assert torch.allclose(sweep.activations(3), activations, rtol=0, atol=tolerance)
        module = arch.mlp_out(layer)
        out, into = module.weight.shape[::-1] if is_transposed(module) else module.weight.shape
        update = torch.randn(out, 2, generator=generator) @ torch.randn(2, into, generator=generator) * 0.1
        module.weight.data.add_(update.T if is_transposed(module) else update)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_keys_at_one_layer(model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    rows = key_rows(tiny_tokenizer(), REQUESTS[0], TEMPLATES, TokenOptions())
    request = naive(REQUESTS[0])
    ids, mask = padded(request.rows)
    with torch.no_grad(), captured(arch.mlp_out(1)) as seen:
        model(input_ids=ids, attention_mask=mask)
    inputs = seen["in"].reshape(*ids.shape, -1)
    expected = torch.stack([inputs[i, at] for i, at in enumerate(request.lookup)])
    assert torch.allclose(keys_at(model, arch, 1, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("method", ["keys", "activations"])
def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, model_type: str, method: str) -> None:
    arch = resolve(model := tiny_model(model_type))
    rows = [key_rows(tiny_tokenizer(), request, TEMPLATES, TokenOptions()) for request in REQUESTS]

    def sweep() -> LayerSweep:
        return LayerSweep(model, arch, rows, WEIGHTS, (0, 2), 3, batch_tokens=1000)

    def swept(over: LayerSweep) -> torch.Tensor:
        over.advance_to(2)
        return over.keys(2) if method == "keys" else over.activations(3)

    expected = swept(sweep())
    for where in (_PackedSweep, PaddedSweep):
        call, failures = getattr(where, method), [torch.OutOfMemoryError("no memory for a test")] * 2

        def failing(self, layer, call=call, failures=failures):
            if failures:
                raise failures.pop()
            return call(self, layer)

        monkeypatch.setattr(where, method, failing)
    with pytest.warns(UserWarning, match="out of memory in the sweep .* going on with 250 tokens"):
        found = swept(sweep())
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"do_layer_norm_before": False}, {}])
def test_post_norm_blocks_are_run_again(options: dict[str, bool]) -> None:
    model = tiny_model("opt", dtype=torch.float64, **options)
    arch = resolve(model)
    rows = [key_rows(tiny_tokenizer(), request, TEMPLATES, TokenOptions()) for request in REQUESTS]
    sweep = LayerSweep(model, arch, rows, WEIGHTS, (0, 2), 3)
    sweep.advance_to(0)
    sweep.keys(0)
    weight = arch.mlp_out(0).weight
    weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    sweep.advance_to(2)
    assert torch.allclose(sweep.keys(2), hook_keys(model, arch, 2).double(), rtol=0, atol=1e-6)


def test_lookups_from_the_end_do_not_depend_on_the_batch() -> None:
    arch = resolve(model := tiny_model("gpt2"))
    options = TokenOptions(lookup="subject_first", rule="easyedit")
    rows = [key_rows(tiny_tokenizer(), request, TEMPLATES, options) for request in REQUESTS]
    assert any(row.lookup < 0 for request in rows for row in request)
    few, many = (
        LayerSweep(model, arch, rows, WEIGHTS, (1,), 2, batch_tokens=tokens) for tokens in (1, 10_000)
    )
    assert torch.allclose(few.keys(1), many.keys(1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(few.activations(2), many.activations(2), rtol=1e-5, atol=1e-6)


def test_repeated_requests_do_not_make_one_endless_trunk() -> None:
    arch = resolve(model := tiny_model("gpt2"))
    rows = [key_rows(tiny_tokenizer(), r, TEMPLATES, TokenOptions()) for r in (*REQUESTS, *REQUESTS)]
    small = LayerSweep(model, arch, rows, WEIGHTS, (1,), 2, batch_tokens=30)
    assert torch.allclose(small.keys(1)[:5], small.keys(1)[5:], rtol=1e-5, atol=1e-6)
    assert len(small._sweep._trunk.forest) <= 30
