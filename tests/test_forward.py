"""Models come back as they were."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from fastedit.engine import replay
from fastedit.forward import StopForward, evaluating


def test_evaluating_restores_each_modules_own_mode_and_flags() -> None:
    model = tiny_model("gpt2").train().requires_grad_(True)
    model.transformer.h[1].eval()
    model.transformer.h[2].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(StopForward), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise StopForward
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_the_engines_use_the_same() -> None:
    assert replay.evaluating is evaluating and replay.StopForward is StopForward
