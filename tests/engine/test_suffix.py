"""Packed suffixes against whole rows: the same hidden rows, for every architecture, whoever joins and leaves."""

from __future__ import annotations

import pytest
import torch
from engine.problems import REQUESTS, TEMPLATES, problems
from tiny import CAUSAL, DEPTH, tiny_model, tiny_tokenizer

from fastedit.arch import resolve
from fastedit.engine.attention import not_handed_over
from fastedit.engine.capture import Injection
from fastedit.engine.forest import Forest
from fastedit.engine.memory import saved_bytes
from fastedit.engine.packed import Trunk
from fastedit.engine.padded_rows import PaddedRows
from fastedit.engine.problem import TokenOptions, build_problem
from fastedit.engine.suffix import PackedSuffix, trunk_of
from fastedit.request import EditRequest

PACKED = [name for name in CAUSAL if name not in ("bloom", "falcon")]


def injection(model_type: str, layer: int = 1, loss_layer: int = DEPTH - 1, site: str = "block") -> Injection:
    post_norm = model_type in ("gemma2", "gemma3_text")
    return Injection(layer, inside=site == "mlp" and post_norm, site=site, loss_layer=loss_layer)


def run(rows: PackedSuffix | PaddedRows, delta: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = delta.clone().requires_grad_()
    with rows.running():
        nll, kl = rows.run(leaf)
        (gradient,) = torch.autograd.grad(nll.square().sum() + kl.sin().sum(), leaf)
    return nll.detach(), kl.detach(), gradient


def forward(rows: PackedSuffix | PaddedRows, delta: torch.Tensor) -> torch.Tensor:
    with rows.running():
        nll, kl = rows.run(delta.clone().requires_grad_())
        return nll.sum() + kl.sum()


def pair(model_type: str, at: Injection, trunk: bool = True) -> tuple[PackedSuffix, PaddedRows]:
    model = tiny_model(model_type)
    # Whole rows, by the model's own attention: nothing that the two have in common but the blocks.
    arch = resolve(model)
    packed = PackedSuffix(arch, trunk_of(arch, problems()) if trunk else Trunk(arch, Forest()), at)
    padded = PaddedRows(model, arch, at, pad_id=1)
    packed.extend(problems())
    padded.extend(problems())
    return packed, padded


@pytest.mark.parametrize("loss_layer", [2, DEPTH - 1])
@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("model_type", PACKED)
def test_packed_equals_padded(model_type: str, site: str, loss_layer: int) -> None:
    packed, padded = pair(model_type, injection(model_type, loss_layer=loss_layer, site=site))
    assert torch.allclose(packed.init, padded.init, rtol=1e-4, atol=1e-5)
    assert torch.allclose(packed.kl_clean, padded.kl_clean, rtol=1e-4, atol=2e-5)
    delta = 0.3 * torch.randn(packed.init.shape, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(run(packed, delta), run(padded, delta), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("layer", [0, DEPTH - 1])
@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "gemma2"])
def test_the_first_and_the_last_layer(model_type: str, layer: int) -> None:
    for site in ("mlp", "block"):
        packed, padded = pair(model_type, injection(model_type, layer=layer, site=site))
        delta = 0.3 * torch.randn(packed.init.shape, generator=torch.Generator().manual_seed(0))
        for found, expected in zip(run(packed, delta), run(padded, delta), strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj", "gemma3_text"])
def test_requests_join_and_leave(model_type: str) -> None:
    arch = resolve(tiny_model(model_type))
    every, at = problems(), injection(model_type)
    trunk = trunk_of(arch, every)
    delta = 0.3 * torch.randn(len(every), arch.width, generator=torch.Generator().manual_seed(0))

    def alone(order: list[int]) -> tuple[torch.Tensor, ...]:
        rows = PackedSuffix(arch, trunk, at)
        rows.extend([every[i] for i in order])
        return run(rows, delta[order])

    rows = PackedSuffix(arch, trunk, at)
    rows.extend(every[:2])
    rows.extend(every[2:])
    rows.keep([4, 1, 3])
    rows.extend([every[0]])
    rows.keep([0, 2, 3])
    for found, expected in zip(run(rows, delta[[4, 3, 0]]), alone([4, 3, 0]), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_shared_beginnings_and_repeated_rows_are_not_run_again() -> None:
    arch = resolve(tiny_model("gpt2"))
    every = problems()
    shared = trunk_of(arch, every)
    # The second template is a text before every request; its tokens are in the trunk.
    lead = TEMPLATES[1].replace("{}", "")
    tokens = tiny_tokenizer()(lead.rstrip())["input_ids"]
    assert Forest.common([[tokens], [tokens]]).ids == tokens
    assert set(tokens) <= set(shared.forest.ids)
    # "{} is a" begins with the subject: against a prompt that does too it needs no token of its own.
    starts = EditRequest(id="x", prompt="{} plays", subject="Toko Yasuda", target_new="chemistry")
    problem = build_problem(tiny_tokenizer(), starts, ("{}",), TokenOptions())
    rows = PackedSuffix(arch, Trunk(arch, Forest()), injection("gpt2"))
    rows.extend([problem])
    (row,) = problem.rewriting
    assert rows.tokens == len(row.ids) - row.lookup


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gptj"])
def test_checkpointed_blocks_give_the_same_gradient_from_less_memory(model_type: str) -> None:
    for rows in pair(model_type, injection(model_type)):
        delta = 0.3 * torch.randn(rows.init.shape, generator=torch.Generator().manual_seed(0))
        arch = resolve(tiny_model(model_type))
        expected, kept = (
            run(rows, delta),
            saved_bytes(arch, lambda rows=rows, delta=delta: forward(rows, delta)),
        )
        rows.checkpointed = True
        for found, wanted in zip(run(rows, delta), expected, strict=True):
            assert torch.equal(found, wanted)
        assert saved_bytes(arch, lambda rows=rows, delta=delta: forward(rows, delta)) < kept / 2


def test_bits_do_not_depend_on_who_has_left() -> None:
    arch = resolve(tiny_model("gpt2"))
    at, every = injection("gpt2"), problems()
    trunk = Trunk(arch, Forest())
    rows = PackedSuffix(arch, trunk, at)
    rows.extend(every)
    rows.keep([2])
    before = (rows.init.clone(), rows.kl_clean.clone())
    rows.extend(every[:1])
    rows.keep([0])
    assert torch.equal(rows.init, before[0]) and torch.equal(rows.kl_clean, before[1])
    assert not_handed_over(arch) is None
    assert len(REQUESTS) == len(every)
