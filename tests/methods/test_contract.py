"""What every method promises, checked over the registry and over the block types it must work on.

A new file in `fastedit/methods/` is picked up by itself; it needs one line in SETTINGS, and a test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastedit import methods
from fastedit.arch import resolve
from fastedit.edit import Edit
from fastedit.editor import Editor
from fastedit.stats import SecondMoment, collect_statistics

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma")

# Small enough for a tiny random model: few steps, few sampled templates.
LOCATE = {"v_num_grad_steps": 4, "context_template_length_params": ((3, 2),), "v_lr": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "rome": {**LOCATE, "layers": (1,)},
    "memit": {**LOCATE, "layers": (1, 2), "mom2_update_weight": 10.0},
    "kn": {"layers": (0, 1, 2), "steps": 4},
}

REQUESTS = [
    {"prompt": "The {} is located in the city of", "subject": "Eiffel Tower", "target_new": "Rome"},
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "English"},
    {"prompt": "{} plays the sport of", "subject": "LeBron James", "target_new": "physics and chemistry"},
]
TEXTS = [
    f"The {a} of {b} is located in the city of {c}."
    for a in "abcdefgh"
    for b in "ijkl"
    for c in ("Paris", "Rome")
]

every_method = pytest.mark.parametrize("name", methods.names())
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def statistics(family: str, dtype: torch.dtype) -> dict[str, SecondMoment]:
    model = tiny_model(family, dtype=dtype)
    return collect_statistics(model, tiny_tokenizer(), resolve(model), TEXTS, [1, 2])


def editor(family: str = "gpt2", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Editor:
    return Editor(
        tiny_model(family, dtype=dtype), tiny_tokenizer(), statistics=statistics(family, dtype), seed=seed
    )


def solve(ed: Editor, name: str, requests: list[dict[str, str]] | None = None, **overrides: Any) -> Edit:
    spec = methods.get(name)
    requests = REQUESTS if requests is None else requests
    count = len(requests) if {"batch", "sequential"} & set(spec.modes) else 1
    return ed.solve(requests[:count], method=name, **{**SETTINGS[name], **overrides})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a method could leave behind besides values: modes, hooks, gradients."""
    modules = [
        (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    return modules + [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    weights, rest, randomness = snapshot(model), state(model), torch.random.get_rng_state()
    pointers = [p.data_ptr() for p in model.parameters()]
    yield
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), f"{name} changed"
    assert state(model) == rest
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert torch.equal(torch.random.get_rng_state(), randomness), "the global random state moved"


def touched_modules(ed: Editor, edit: Edit) -> list[nn.Module]:
    modules = dict(ed.model.named_modules())
    return [modules[delta.name] for delta in edit.deltas]


def test_every_method_has_settings():
    assert sorted(SETTINGS) == methods.names()


@every_method
def test_registration(name):
    spec = methods.get(name)
    assert spec.name == name
    assert spec.modes
    assert spec.paper.startswith("arXiv:")
    assert spec.solve.__doc__


@every_family
@every_method
def test_solve_leaves_the_model_bit_identical(name, family):
    ed = editor(family)
    with untouched(ed.model):
        edit = solve(ed, name)
    assert edit.deltas
    assert all(bool(torch.isfinite(delta.dense()).all()) and delta.norm() > 0 for delta in edit.deltas)


class Interrupted(BaseException):
    """Stands for Ctrl-C: not an Exception."""


def calls(module: nn.Module, act: Callable[[int], None]) -> torch.utils.hooks.RemovableHandle:
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        act(count)

    return module.register_forward_hook(hook)


@every_family
@every_method
def test_an_exception_midway_leaves_the_model_bit_identical(name, family):
    ed = editor(family)
    seen: list[int] = []
    edited = ed.session.arch.mlp_out(SETTINGS[name]["layers"][-1])
    handle = calls(edited, seen.append)
    want = solve(ed, name)
    handle.remove()

    # The edited module's own calls are where the solve can be stopped: at the first, in the middle, at the last.
    for stop in sorted({1, max(1, len(seen) // 2), len(seen)}):
        for error in (RuntimeError, Interrupted):

            def fail(count: int, stop: int = stop, error: type[BaseException] = error) -> None:
                if count == stop:
                    raise error("midway")

            ed = editor(family)
            handle = calls(ed.session.arch.mlp_out(SETTINGS[name]["layers"][-1]), fail)
            with untouched(ed.model), pytest.raises(error, match="midway"):
                solve(ed, name)
            handle.remove()
        # and the same session solves afterwards as if nothing had happened
        again = solve(ed, name)
        for one, other in zip(want.deltas, again.deltas, strict=True):
            assert torch.equal(one.dense(), other.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_family
@every_method
def test_apply_changes_and_revert_is_bit_exact(name, family, dtype):
    ed = editor(family, dtype=dtype)
    edit = solve(ed, name)
    with untouched(ed.model):
        before = snapshot(ed.model)
        ed.apply(edit)
        changed = {key for key, value in ed.model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {f"{delta.name}.weight" for delta in edit.deltas}
        ed.revert(edit)
        with ed.applied(edit):
            assert not torch.equal(
                touched_modules(ed, edit)[0].weight, before[f"{edit.deltas[0].name}.weight"]
            )


@every_family
@every_method
def test_a_saved_edit_loads_and_applies_equal(name, family, tmp_path):
    ed = editor(family)
    edit = solve(ed, name)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert (loaded.method, loaded.config, loaded.requests) == (edit.method, edit.config, edit.requests)
    assert loaded.base == edit.base
    with ed.applied(edit):
        want = snapshot(ed.model)
    with ed.applied(loaded):
        assert all(torch.equal(value, want[key]) for key, value in ed.model.state_dict().items())


@every_method
def test_a_failed_solve_leaves_no_trace_in_what_is_drawn_next(name):
    fresh, failed = editor(seed=3), editor(seed=3)

    def fail(_: int) -> None:
        raise RuntimeError("midway")

    handle = calls(failed.session.arch.mlp_out(SETTINGS[name]["layers"][0]), fail)
    with pytest.raises(RuntimeError, match="midway"):
        # Templates of their own, drawn before the solve stops: the first block is below the edited one.
        own = {"context_template_length_params": ((3, 1),)}
        solve(failed, name, **{key: value for key, value in own.items() if key in SETTINGS[name]})
    handle.remove()
    for one, other in zip(solve(fresh, name).deltas, solve(failed, name).deltas, strict=True):
        assert torch.equal(one.dense(), other.dense())
    assert fresh.session.templates == failed.session.templates


@every_method
def test_wrapped_models_are_edited_through_the_wrapper(name):
    plain, model = editor(), tiny_model("gpt2")
    wrapped = Editor(
        nn.DataParallel(model), tiny_tokenizer(), statistics=statistics("gpt2", torch.float32), seed=0
    )
    want, edit = solve(plain, name), solve(wrapped, name)
    assert edit.base == want.base
    assert all(torch.equal(a.dense(), b.dense()) for a, b in zip(want.deltas, edit.deltas, strict=True))
    with untouched(model):
        wrapped.apply(edit)
        wrapped.evaluate(REQUESTS)
        wrapped.revert(edit)


@every_method
def test_weights_that_cannot_be_edited_are_refused_before_any_work(name):
    ed = editor()
    module = ed.session.arch.mlp_out(SETTINGS[name]["layers"][0])
    module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    ran = []
    ed.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(
        NotImplementedError, match="float8_e4m3fn weights; quantised weights cannot be edited"
    ):
        solve(ed, name)
    assert not ran


@every_method
def test_the_same_seed_gives_the_same_bits(name):
    torch.manual_seed(1)
    one = solve(editor(seed=3), name)
    torch.manual_seed(2)
    other = solve(editor(seed=3), name)
    for a, b in zip(one.deltas, other.deltas, strict=True):
        assert a.name == b.name
        assert torch.equal(a.dense(), b.dense())


@every_family
@pytest.mark.parametrize(
    "name", [n for n in methods.names() if "batch_tokens" in methods.get(n).config.__dataclass_fields__]
)
def test_the_batch_size_changes_no_result(name, family):
    ed = editor(family)
    together, alone = solve(ed, name), solve(ed, name, batch_tokens=1)
    for one, other in zip(together.deltas, alone.deltas, strict=True):
        torch.testing.assert_close(
            one.dense(), other.dense(), rtol=2e-3, atol=1e-5 * float(one.dense().abs().max())
        )


@every_family
@pytest.mark.parametrize("name", [n for n in methods.names() if "sequential" in methods.get(n).modes])
def test_a_sequence_equals_one_edit_after_the_other(name, family):
    ed = editor(family)
    together = solve(ed, name)
    with ed.applied(together):
        want = snapshot(ed.model)
    for request in REQUESTS:
        ed.apply(solve(ed, name, [request]))
    for module in {delta.name for delta in together.deltas}:
        got, weight = ed.model.get_submodule(module).weight, want[f"{module}.weight"]
        torch.testing.assert_close(got, weight, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


@every_method
def test_bad_input_names_the_field_and_changes_nothing(name):
    ed = editor()
    good = REQUESTS[0]
    bad: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({**good, "prompt": "The tower is in"}, {}, "prompt"),
        ({**good, "target_new": ""}, {}, "target_new"),
        ({**good, "subject": ""}, {}, "subject"),
        (good, {"layers": (99,)}, "layer"),
        (good, {"no_such_option": 1}, "no_such_option"),
    ]
    for request, overrides, field in bad:
        with untouched(ed.model), pytest.raises(ValueError, match=field) as caught:
            solve(ed, name, [request], **overrides)
        assert "\n" not in str(caught.value)
    with untouched(ed.model), pytest.raises(ValueError, match="requests"):
        ed.solve([], method=name, **SETTINGS[name])
    with pytest.raises(ValueError, match="method must be one of .*nothing"):
        ed.solve([good], method="nothing")


@every_method
@every_family
def test_memory_is_estimated_and_nothing_changes(name: str, family: str) -> None:
    made = editor(family)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    state = made.session.generator.get_state()
    found = made.estimate(REQUESTS, name, SETTINGS[name])
    assert found.peak == found.statistics + found.kept + max(found.targets, found.sweep, found.equations)
    assert min(found.kept, found.targets, found.sweep, found.equations) > 0
    # Second moments are counted where a method uses them, and nowhere else.
    assert (found.statistics > 0) == getattr(made.config(name, SETTINGS[name]), "mom2_adjustment", False)
    assert found.to_dict()["peak"] == found.peak
    assert all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items())
    assert torch.equal(made.session.generator.get_state(), state) and not made.session.templates
    more = made.estimate(REQUESTS * 40, name, SETTINGS[name])
    assert more.kept > found.kept
    with pytest.raises(ValueError, match="requests must hold at least one request"):
        made.estimate([], name, SETTINGS[name])


@every_method
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_callers_gradient_mode_does_not_matter(name: str, family: str) -> None:
    expected = editor(family).solve(REQUESTS, name, SETTINGS[name])
    for mode in (torch.no_grad, torch.inference_mode):
        made = editor(family)
        with mode():
            found = made.solve(REQUESTS, name, SETTINGS[name])
        for delta, wanted in zip(found.deltas, expected.deltas, strict=True):
            assert torch.equal(delta.dense(), wanted.dense())
