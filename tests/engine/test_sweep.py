"""The paused sweep against hooks on full forwards, before and after updates of the layers below."""

from __future__ import annotations

import pytest
import torch
from engine.problems import GROUPS, REQUESTS, TEMPLATES, naive
from reference.target_vector import captured, padded
from tiny import CAUSAL, tiny_model, tiny_tokenizer

from fastedit.arch import is_transposed, resolve
from fastedit.engine.problem import TokenOptions, key_rows
from fastedit.engine.sweep import LayerSweep, keys_at

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
