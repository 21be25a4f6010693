"""MEMIT against its naive twin, and the algebra that the updates must satisfy."""

from __future__ import annotations

import pytest
import torch
from engine.problems import REQUESTS, TEMPLATES, naive
from reference.memit import memit as naive_memit
from tiny import CAUSAL, tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.stats import SecondMoment

LAYERS = (0, 2)
OPTIONS = {
    "layers": LAYERS,
    "v_num_grad_steps": 5,
    "v_lr": 0.2,
    "kl_factor": 0.1,
    "clamp_norm_factor": 2.0,
    "mom2_update_weight": 3.0,
    "soft_cap_nll": True,
    "context_templates": (TEMPLATES[:1], TEMPLATES[1:]),
}


def editor(model_type: str) -> tuple[Editor, dict[int, torch.Tensor]]:
    ed = Editor(tiny_model(model_type), tiny_tokenizer())
    arch = ed.session.arch
    generator = torch.Generator().manual_seed(3)
    moments = {}
    for layer in LAYERS:
        size = arch.key_dim(layer)
        factor = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
        moments[layer] = SecondMoment(
            module=arch.name("mlp_out", layer), count=3 * size, total=factor.T @ factor
        )
    ed.session.use_statistics({moment.module: moment for moment in moments.values()})
    return ed, {layer: moment.moment() for layer, moment in moments.items()}


@pytest.mark.parametrize("model_type", CAUSAL)
def test_updates_equal_the_naive_twin(model_type: str) -> None:
    ed, moments = editor(model_type)
    arch = ed.session.arch
    edit = ed.solve(list(REQUESTS), "memit", OPTIONS)
    theirs = naive_memit(
        ed.model,
        [naive(request) for request in REQUESTS],
        layers=LAYERS,
        module=arch.row.block + "." + arch.row.mlp_out,
        site=arch.row.block,
        C=moments,
        lam=3.0,
        steps=5,
        lr=0.2,
        clamp=2.0,
        weight_decay=0.5,
        kl_factor=0.1,
    )
    for layer, delta in zip(LAYERS, edit.deltas, strict=True):
        assert delta.name == arch.name("mlp_out", layer)
        assert delta.rank == len(REQUESTS)
        assert (delta.dense().double() - theirs[layer]).norm() <= 5e-3 * theirs[layer].norm(), layer


def test_order_of_the_requests_does_not_matter() -> None:
    ed, _ = editor("llama")
    targets = torch.randn(len(REQUESTS), 32, generator=torch.Generator().manual_seed(1))
    order = [3, 0, 4, 2, 1]
    one = ed.solve(list(REQUESTS), "memit", OPTIONS, targets=targets)
    other = ed.solve([REQUESTS[i] for i in order], "memit", OPTIONS, targets=targets[order])
    for a, b in zip(one.deltas, other.deltas, strict=True):
        assert (a.dense() - b.dense()).norm() <= 1e-5 * a.norm()


def test_a_small_lambda_reaches_the_targets() -> None:
    """With almost no weight on the old keys the edited activations are the targets (one layer, distinct keys)."""
    ed, _ = editor("gpt2")
    arch = ed.session.arch
    targets = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    edit = ed.solve(
        list(REQUESTS[:2]),
        "memit",
        OPTIONS,
        layers=(2,),
        mom2_update_weight=1e-6,
        context_templates=(("{}",),),
        targets=targets,
    )
    assert edit.info["residual_norms"][0] > 1
    for request, target in zip(map(naive, REQUESTS[:2]), targets, strict=True):
        seen = {}
        with ed.applied(edit):
            handle = arch.block(2).register_forward_hook(lambda _m, _a, out, seen=seen: seen.update(out=out))
            ed.model(input_ids=torch.tensor([request.rows[0]]))
            handle.remove()
        found = seen["out"] if isinstance(seen["out"], torch.Tensor) else seen["out"][0]
        assert torch.allclose(found[0, request.lookup[0]], target, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (2, 0)}, "layers must ascend"),
        ({"mom2_update_weight": 0}, "mom2_update_weight must be a number > 0, got 0"),
        ({"mom2_update_weight": float("inf")}, "mom2_update_weight must be a number > 0, got inf"),
        ({"v_loss_layer": 1}, "v_loss_layer must be a layer >= 2"),
        ({"v_loss_layer": 7}, "layer.*0 to 3.*7"),
        ({"context_templates": ("{}",)}, "context_templates must be groups"),
        ({"context_templates": (("{}",), (3,))}, "context_templates must hold texts with one .* got 3"),
        ({"cache_template": "x_{a}_{}_{}_{}"}, "cache_template must be a path that holds three"),
        ({"cache_template": 3}, "cache_template must be a path that holds three"),
        ({"batch_tokens": 0}, "batch_tokens must be an integer >= 1"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    ed, _ = editor("gpt2")
    with pytest.raises(ValueError, match=message):
        ed.solve(list(REQUESTS), "memit", {**OPTIONS, **options})


def test_published_defaults_are_chosen_by_shape() -> None:
    from fastedit.config import family_of
    from fastedit.methods.memit import memit

    spec = memit.spec
    assert family_of("gpt2", 48, 1600, 50257) == "gpt2-xl"
    assert family_of("llama", 32, 4096, 32000) == "llama-2-7b"
    assert family_of("llama", 32, 4096, 128256) == "llama-3-8b"
    assert family_of("llama", 4, 32, 320) is None
    assert spec.defaults["gpt-j-6b"]["layers"] == (3, 4, 5, 6, 7, 8)
    for family in spec.defaults.values():
        spec.config(**family)
