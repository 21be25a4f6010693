"""What a step keeps for its backward, and what is made of it."""

from __future__ import annotations

import pytest
import torch
from engine.problems import problems
from tiny import CAUSAL, tiny_model
from torch import nn

from fastedit.arch import resolve
from fastedit.engine import memory
from fastedit.engine.memory import automatic_tokens, out_of_memory, saved_bytes, suffix_tokens
from fastedit.engine.objective import TargetObjective, TargetSpec
from fastedit.engine.target import optimise_targets

SPEC = TargetSpec(
    layer=1,
    site="block",
    v_num_grad_steps=3,
    v_lr=0.3,
    v_weight_decay=0.4,
    clamp_norm_factor=1.5,
    kl_factor=0.3,
)


def test_saved_bytes_counts_activations_once_and_weights_never() -> None:
    model = tiny_model("gpt2")
    x = torch.randn(8, 32, requires_grad=True)
    weight = model.transformer.h[0].mlp.c_fc.weight
    # exp keeps its result, the product with a weight keeps nothing of its own; the two share the result's storage.
    assert saved_bytes(resolve(model), lambda: (x @ weight).exp().square().sum()) == 8 * 64 * 4


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_batch_keeps_what_one_request_predicts(model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    one = TargetObjective(model, arch, problems()[:1], SPEC)
    every = TargetObjective(model, arch, problems(), SPEC)

    def kept(objective: TargetObjective) -> int:
        zero = torch.zeros_like(objective.init).requires_grad_()
        return saved_bytes(arch, lambda: objective.forward(zero))

    predicted = kept(one) / one.tokens * every.tokens
    assert 0.6 * predicted <= kept(every) <= 1.4 * predicted


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom"])
def test_tokens_are_counted_as_they_run(model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    for problem in problems():
        objective = TargetObjective(model, arch, [problem], SPEC)
        # Packed rows may save the KL row's token; padded rows cost more than they hold.
        if objective.padded is None:
            assert objective.tokens in (suffix_tokens(problem), suffix_tokens(problem) - 1)


def test_the_batch_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    arch = resolve(model)
    objective = TargetObjective(model, arch, problems()[:1], SPEC)
    plenty, report = automatic_tokens(objective, arch)
    assert plenty == report.limit_tokens == memory.ENOUGH_CPU
    monkeypatch.setattr(memory, "free_memory", lambda _device: 100 * report.bytes_per_token)
    little, short = automatic_tokens(objective, arch)
    assert 20 <= little <= 60 and short.predicted_bytes <= 100 * report.bytes_per_token
    monkeypatch.setattr(memory, "free_memory", lambda _device: 0)
    assert automatic_tokens(objective, arch)[0] == 1
    found = optimise_targets(model, arch, problems(), SPEC)
    assert found.memory.limit_tokens == 1
    assert found.memory.batch_tokens == max(map(suffix_tokens, problems()))


def test_free_memory_is_a_plausible_number() -> None:
    assert 1 << 20 < memory.free_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) is is_memory


def test_a_real_refusal_of_the_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(1 << 24, 1 << 24)
    assert out_of_memory(caught.value)
