"""Fused activations: the family's formula to rounding, inside the context only."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model
from transformers.activations import NewGELUActivation

from fastedit.arch import resolve
from fastedit.engine.fused import fused_activations


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "phi"])
def test_same_logits_and_everything_given_back(model_type: str) -> None:
    model = tiny_model(model_type)
    batch = tiny_batch(model)
    chains = [module for module in model.modules() if type(module) is NewGELUActivation]
    assert chains
    with torch.no_grad():
        expected = model(**batch).logits
        with fused_activations(resolve(model)):
            assert all("forward" in vars(module) for module in chains)
            found = model(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all("forward" not in vars(module) for module in chains)


def test_the_formula_in_double_precision() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    fused = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(fused, NewGELUActivation()(x), rtol=1e-14, atol=1e-15)


def test_another_forward_on_the_instance_comes_back() -> None:
    model = tiny_model("gpt2")
    module = next(m for m in model.modules() if type(m) is NewGELUActivation)
    own = module.forward
    module.forward = own
    with fused_activations(resolve(model)):
        assert module.forward is not own
    assert vars(module)["forward"] is own
