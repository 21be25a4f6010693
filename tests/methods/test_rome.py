"""ROME against its naive twin, and the algebra that the update must satisfy."""

from __future__ import annotations

import pytest
import torch
from engine.problems import REQUESTS, TEMPLATES, naive
from reference.rome import rome as naive_rome
from tiny import CAUSAL, tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.methods import names
from fastedit.stats import SecondMoment

LAYER = 1
OPTIONS = {
    "layers": (LAYER,),
    "v_num_grad_steps": 5,
    "v_lr": 0.2,
    "kl_factor": 0.1,
    "clamp_norm_factor": 2.0,
    "context_templates": TEMPLATES,
}


def editor(model_type: str, **options) -> tuple[Editor, torch.Tensor]:
    """An editor with a made-up, well-conditioned second moment, and that matrix."""
    ed = Editor(tiny_model(model_type), tiny_tokenizer(), **options)
    arch = ed.session.arch
    size = arch.key_dim(LAYER)
    factor = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment = SecondMoment(module=arch.name("mlp_out", LAYER), count=3 * size, total=factor.T @ factor)
    ed.session.use_statistics({moment.module: moment})
    return ed, moment.moment()


@pytest.mark.parametrize("asym_keys", [True, False])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_update_equals_the_naive_twin(model_type: str, asym_keys: bool) -> None:
    ed, moment = editor(model_type)
    arch = ed.session.arch
    edit = ed.solve(REQUESTS[0], "rome", OPTIONS, asym_keys=asym_keys)
    theirs = naive_rome(
        ed.model,
        naive(REQUESTS[0]),
        module=arch.name("mlp_out", LAYER),
        site=arch.name("mlp_out", LAYER),
        C=moment,
        steps=5,
        lr=0.2,
        clamp=2.0,
        weight_decay=0.5,
        kl_factor=0.1,
        mixed_keys=asym_keys,
    )
    (delta,) = edit.deltas
    assert delta.rank == 1
    assert (delta.dense().double() - theirs).norm() <= 2e-3 * theirs.norm()


def test_the_edited_matrix_maps_the_bare_key_to_the_target() -> None:
    """(W + Delta) k_b = v*, the invariant of the published update."""
    ed, _ = editor("gpt2")
    target = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    edit = ed.solve(REQUESTS[0], "rome", OPTIONS, targets=target)
    arch = ed.session.arch
    seen = {}
    with ed.applied(edit):
        handle = arch.mlp_out(LAYER).register_forward_hook(lambda _m, args, out: seen.update(out=out))
        request = naive(REQUESTS[0])
        ed.model(input_ids=torch.tensor([request.rows[0]]))
        handle.remove()
    assert torch.allclose(seen["out"][0, request.lookup[0]], target[0], rtol=0, atol=2e-5)


def test_without_second_moment_the_direction_is_the_mean_key() -> None:
    ed = Editor(tiny_model("llama"), tiny_tokenizer())
    edit = ed.solve(REQUESTS[1], "rome", OPTIONS, mom2_adjustment=False)
    theirs = naive_rome(
        ed.model,
        naive(REQUESTS[1]),
        module="model.layers.1.mlp.down_proj",
        site="model.layers.1.mlp.down_proj",
        C=None,
        steps=5,
        lr=0.2,
        clamp=2.0,
        weight_decay=0.5,
        kl_factor=0.1,
    )
    assert (edit.deltas[0].dense().double() - theirs).norm() <= 2e-3 * theirs.norm()


def test_several_requests_build_on_each_other() -> None:
    ed, _ = editor("gpt2")
    together = ed.solve(list(REQUESTS[:2]), "rome", OPTIONS)
    first = ed.edit(REQUESTS[0], "rome", OPTIONS)
    second = ed.solve(REQUESTS[1], "rome", OPTIONS)
    expected = first.deltas[0].dense() + second.deltas[0].dense()
    assert together.deltas[0].rank == 2
    assert (together.deltas[0].dense() - expected).norm() <= 1e-3 * expected.norm()
    ed.revert(first)


def test_templates_are_sampled_once_from_the_seed_and_recorded() -> None:
    options = {**OPTIONS, "context_templates": None, "context_template_length_params": ((4, 2), (6, 1))}
    ed, _ = editor("gpt2", seed=7)
    first = ed.solve(REQUESTS[0], "rome", options)
    templates = first.info["context_templates"]
    assert templates[0] == "{}" and len(templates) == 4
    assert ed.solve(REQUESTS[1], "rome", options).info["context_templates"] == templates
    again, _ = editor("gpt2", seed=7)
    assert again.solve(REQUESTS[0], "rome", options).info["context_templates"] == templates
    other, _ = editor("gpt2", seed=8)
    assert other.solve(REQUESTS[0], "rome", options).info["context_templates"] != templates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (9,)}, "layer.*0 to 3.*9"),
        ({"layers": ()}, "layers must be a non-empty"),
        ({"layers": (1, 1)}, "layers must not repeat"),
        ({"v_lr": 0}, "v_lr must be a number > 0, got 0"),
        ({"v_lr": float("nan")}, "v_lr must be a number > 0, got nan"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps must be an integer >= 1, got 0"),
        ({"kl_factor": "x"}, "kl_factor must be a number >= 0, got 'x'"),
        ({"fact_token": "middle"}, "fact_token must be one of subject_last"),
        ({"context_templates": ("Hm. {}",)}, "context_templates must start with the bare template"),
        ({"context_templates": ("{}", "no slot")}, "context_templates must hold texts with one"),
        ({"context_templates": ("{}", 3)}, "context_templates must hold texts with one .* got 3"),
        ({"context_templates": 3}, "context_templates must start with the bare template .* got 3"),
        (
            {"context_template_length_params": 5},
            "context_template_length_params must be a list of pairs, got 5",
        ),
        ({"no_such": 1}, "unknown option 'no_such'; known: layers"),
        ({"mom2_adjustment": 1}, "mom2_adjustment must be true or false"),
    ],
)
def test_bad_options_are_named_and_the_model_is_unchanged(options: dict, message: str) -> None:
    ed, _ = editor("gpt2")
    before = {name: value.clone() for name, value in ed.model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        ed.solve(REQUESTS[0], "rome", {**OPTIONS, **options})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in ed.model.state_dict().items())


def test_bad_input_around_the_solve() -> None:
    ed, _ = editor("gpt2")
    with pytest.raises(ValueError, match=r"statistics: no second moment of 'transformer.h.2.mlp.c_proj'"):
        ed.solve(REQUESTS[0], "rome", OPTIONS, layers=(2,))
    with pytest.raises(
        ValueError, match=r"layers must be given: RomeConfig has published layers for gpt-j-6b"
    ):
        ed.solve(REQUESTS[0], "rome")
    with pytest.raises(ValueError, match=r"targets must have shape \(1, 32\), got \(2, 32\)"):
        ed.solve(REQUESTS[0], "rome", OPTIONS, targets=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="targets must be finite"):
        ed.solve(REQUESTS[0], "rome", OPTIONS, targets=torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match=f"method must be one of {', '.join(names())}, got 'romr'"):
        ed.solve(REQUESTS[0], "romr", OPTIONS)
    with pytest.raises(ValueError, match="targets must be a float tensor, got list"):
        ed.solve(REQUESTS[0], "rome", OPTIONS, targets=[[0.0] * 32])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must be a RomeConfig or a mapping, got int"):
        ed.solve(REQUESTS[0], "rome", 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold at least one request"):
        ed.solve([], "rome", OPTIONS)
    with pytest.raises(ValueError, match="rome is defined for causal decoders, got model_type='bert'"):
        Editor(tiny_model("bert"), tiny_tokenizer()).solve(
            REQUESTS[0], "rome", OPTIONS, mom2_adjustment=False
        )


def test_statistics_of_another_model_are_refused() -> None:
    ed, _ = editor("gpt2")
    moment = SecondMoment(module="transformer.h.1.mlp.c_proj", count=99, total=torch.eye(48).double())
    with pytest.raises(ValueError, match="48 features, but the module's weight"):
        ed.session.use_statistics({moment.module: moment})
    made = Editor(tiny_model("gpt2", seed=5), tiny_tokenizer()).collect_statistics(["The Eiffel Tower."], [1])
    with pytest.raises(ValueError, match="collected on another model"):
        ed.session.use_statistics(made)


def test_single_precision_inverse_is_the_published_one() -> None:
    ed, _ = editor("gpt2")
    target = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    exact = ed.solve(REQUESTS[0], "rome", OPTIONS, targets=target).deltas[0].dense()
    single = ed.solve(REQUESTS[0], "rome", OPTIONS, targets=target, inv_dtype="float32").deltas[0].dense()
    assert not torch.equal(exact, single)
    assert (exact - single).norm() <= 1e-4 * exact.norm()
    module = ed.session.arch.name("mlp_out", LAYER)
    dead = torch.eye(64, dtype=torch.float64)
    dead[5, 5] = 0
    ed.session.use_statistics({module: SecondMoment(module, 1000, dead)})
    with pytest.raises(ValueError, match="1 of 64 features never fired"):
        ed.solve(REQUESTS[0], "rome", OPTIONS, inv_dtype="float32")
    alike = torch.ones(64, 64, dtype=torch.float64)
    ed.session.use_statistics({module: SecondMoment(module, 1000, alike)})
    with pytest.raises(ValueError, match="singular in float32"):
        ed.solve(REQUESTS[0], "rome", OPTIONS, inv_dtype="float32")


def test_a_bare_key_off_the_direction_is_warned_of() -> None:
    ed, _ = editor("gpt2")
    arch = ed.session.arch
    # The identity as metric: u is the mean of two opposite keys and a third, so it hardly meets the first.
    request = naive(REQUESTS[0])
    seen = {}
    handle = arch.mlp_out(LAYER).register_forward_hook(lambda _m, args, _o: seen.update(key=args[0]))
    ed.model(input_ids=torch.tensor([request.rows[0]]))
    handle.remove()
    key = seen["key"][0, request.lookup[0]].double()
    size = len(key)
    basis = torch.linalg.qr(torch.cat([key[:, None], torch.eye(size, dtype=torch.float64)[:, 1:]], 1)).Q
    spectrum = torch.ones(size, dtype=torch.float64)
    spectrum[0] = 1e9
    total = basis @ torch.diag(spectrum) @ basis.T
    module = arch.name("mlp_out", LAYER)
    ed.session.use_statistics({module: SecondMoment(module=module, count=10**6, total=total * 10**6)})
    with pytest.warns(UserWarning, match="request '1': the bare prompt's key.*may disable the model"):
        ed.solve(REQUESTS[0], "rome", OPTIONS)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_bare_prompt_reads_the_optimised_vector(model_type: str) -> None:
    """(W + Delta) k_b - W k_b is the optimised delta, in every family: bloom's MLP module returns more than its sum."""
    ed, _ = editor(model_type)
    arch = ed.session.arch
    edit = ed.solve(REQUESTS[0], "rome", OPTIONS)
    request = naive(REQUESTS[0])
    outputs = []
    for applied in (False, True):
        seen = {}
        handle = arch.mlp_out(LAYER).register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.update(out=out.clone())
        )
        if applied:
            ed.apply(edit)
        ed.model(input_ids=torch.tensor([request.rows[0]]))
        handle.remove()
        outputs.append(seen["out"].reshape(len(request.rows[0]), -1)[request.lookup[0]].clone())
    ed.revert(edit)
    moved = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert moved == pytest.approx(edit.info["losses"][0]["delta_norm_ratio"], rel=1e-3)
