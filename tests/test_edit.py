"""Edits in and out of models: bit-exact undo, refusals that change nothing, order, composition, wrappers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn

from fastedit.arch import editable_weight, resolve
from fastedit.delta import fingerprint
from fastedit.edit import Dense, Edit, LowRank, Rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def site(model: nn.Module, layer: int = 1) -> str:
    return resolve(model).name("mlp_out", layer)


def canonical(model: nn.Module, name: str) -> Tensor:
    weight, transposed = editable_weight(model, name)
    return (weight.T if transposed else weight).detach()


def make_delta(
    model: nn.Module, name: str, kind: str = "low_rank", *, seed: int = 0, scale: float = 0.05
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    out, width = canonical(model, name).shape
    if kind == "low_rank":
        left, right = (torch.randn(shape, generator=generator) for shape in ((out, 2), (2, width)))
        return LowRank(name, left * scale, right)
    if kind == "dense":
        return Dense(name, torch.randn(out, width, generator=generator) * scale)
    axis = 0 if kind == "rows" else 1
    size, length = (out, width) if axis == 0 else (width, out)
    return Rows(
        name, torch.tensor([3, 0, 7]), torch.randn(3, length, generator=generator), size=size, axis=axis
    )


def make_edit(model: nn.Module, *deltas: Any, method: str = "rome") -> Edit:
    base = {delta.name: fingerprint(editable_weight(model, delta.name)[0]) for delta in deltas}
    request = {"id": "0", "prompt": "{} is in", "subject": "Rome", "target_new": "Paris"}
    return Edit(method, {"layers": (1, 2)}, (request,), deltas, base, {"seconds": {"solve": 0.5}})


def simple_edit(
    model: nn.Module, *, layer: int = 1, seed: int = 0, kind: str = "low_rank", method: str = "rome"
) -> Edit:
    return make_edit(model, make_delta(model, site(model, layer), kind, seed=seed), method=method)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(now[name].contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8))
        for name in before
    )


# ---- apply and revert ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["low_rank", "dense", "rows", "columns"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj"])
def test_apply_adds_and_revert_restores_every_bit(model_type: str, kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    name = site(model)
    edit = simple_edit(model, kind=kind)
    before, original = bits(model), canonical(model, name).clone()
    storage = editable_weight(model, name)[0].data_ptr()

    edit.apply(model)
    expected = (original.float() + edit.deltas[0].dense()).to(dtype)
    # One rounding of a float32 sum; the order of that sum may differ in its last bit.
    torch.testing.assert_close(canonical(model, name), expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [f"{name}.weight"]
    assert editable_weight(model, name)[0].data_ptr() == storage

    edit.revert(model)
    assert same_bits(model, before)
    assert editable_weight(model, name)[0].data_ptr() == storage


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference", "train"])
def test_gradient_settings_are_kept(requires_grad: bool, mode: str) -> None:
    model = tiny_model("llama").requires_grad_(requires_grad).train(mode == "train")
    edit, before = simple_edit(model), bits(model)
    context = torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(mode != "no_grad")
    with context, edit.applied(model):
        weight, _ = editable_weight(model, site(model))
        assert weight.is_leaf and weight.grad_fn is None and weight.requires_grad is requires_grad
        assert not same_bits(model, before)
    assert same_bits(model, before) and model.training is (mode == "train")


def test_autograd_notices_the_change() -> None:
    """A backward through weights that were edited after the forward must fail, not return wrong gradients."""
    model = tiny_model("llama").requires_grad_(True)
    loss = model(**tiny_batch(model)).logits.sum()
    simple_edit(model).apply(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_stay_tied() -> None:
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = bits(model)
    delta = LowRank("lm_head", torch.ones(320, 1), torch.ones(1, 32))
    edit = make_edit(model, delta)
    with edit.applied(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.transformer.wte.weight, before["lm_head.weight"] + 1)
    assert same_bits(model, before)


def test_one_parameter_under_two_names_is_edited_by_both_and_restored() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    second.weight = first.weight
    before = bits(model)
    edit = make_edit(model, make_delta(model, site(model, 0)), make_delta(model, site(model, 1), seed=1))
    with edit.applied(model):
        total = edit.deltas[0].dense() + edit.deltas[1].dense()
        torch.testing.assert_close(first.weight, before["model.layers.0.mlp.down_proj.weight"] + total)
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_several_deltas_of_one_weight_are_rounded_once(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    name = site(model)
    deltas = [
        make_delta(model, name, kind, seed=i)
        for i, kind in enumerate(("low_rank", "rows", "dense", "columns"))
    ]
    edit, original, before = make_edit(model, *deltas), canonical(model, name).clone(), bits(model)
    with edit.applied(model):
        exact = original.double() + sum(delta.dense().double() for delta in deltas)
        torch.testing.assert_close(
            canonical(model, name), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6
        )
    assert same_bits(model, before)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_exception_half_way_leaves_every_bit(
    monkeypatch: pytest.MonkeyPatch, layers: int, error: type[BaseException]
) -> None:
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    edit = make_edit(model, *(make_delta(model, site(model, i), seed=i) for i in range(3)))
    before = bits(model)
    add, calls = LowRank.add_to, []

    def failing(self: LowRank, weight: Tensor, *, transposed: bool) -> None:
        add(self, weight, transposed=transposed)
        calls.append(self.name)
        if len(calls) == layers:
            raise error("half-way")

    monkeypatch.setattr(LowRank, "add_to", failing)
    with pytest.raises(error, match="half-way"):
        edit.apply(model)
    assert len(calls) == layers and same_bits(model, before) and not edit.is_applied(model)
    monkeypatch.undo()
    edit.apply(model)
    edit.revert(model)
    assert same_bits(model, before)


def test_an_exception_inside_applied_reverts() -> None:
    model = tiny_model("llama", dtype=torch.float16)
    edit, before = simple_edit(model), bits(model)
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        raise ZeroDivisionError
    assert same_bits(model, before) and not edit.is_applied(model)


def test_an_edit_in_two_models_reverts_in_each() -> None:
    one, two = tiny_model("gpt2"), tiny_model("gpt2")
    edit, before = simple_edit(one), bits(one)
    edit.apply(one)
    edit.apply(two)
    edit.revert(one)
    assert same_bits(one, before) and not same_bits(two, before)
    edit.revert(two)
    assert same_bits(two, before)


def test_models_and_originals_are_not_kept_alive() -> None:
    model = tiny_model("gpt2")
    edit = simple_edit(model)
    edit.apply(model)
    original, alive = edit.originals(model), weakref.ref(model)
    assert set(original) == {site(model)}
    dropped = weakref.ref(original[site(model)])
    del model, original
    gc.collect()
    assert alive() is None and dropped() is None


def test_wrapped_models_are_seen_through() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    edit, before = simple_edit(model), bits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    compiled = torch.compile(wrapped, backend="eager")
    edit.apply(compiled)
    assert edit.is_applied(model) and edit.is_applied(wrapped)
    edit.revert(wrapped)
    assert same_bits(wrapped.unload(), before)


# ---- order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_of_one_weight_revert_last_in_first_out(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    before = bits(model)
    first = simple_edit(model, method="rome")
    first.apply(model)
    between = bits(model)
    second = simple_edit(model, seed=1, method="memit")
    second.apply(model)
    after = bits(model)
    with pytest.raises(ValueError, match="an edit by 'memit' was applied after this one.*last in, first out"):
        first.revert(model)
    assert same_bits(model, after)
    second.revert(model)
    assert same_bits(model, between)
    first.revert(model)
    assert same_bits(model, before)


def test_edits_of_different_weights_revert_in_any_order() -> None:
    model = tiny_model("gpt2")
    before = bits(model)
    first, second = simple_edit(model, layer=0), simple_edit(model, layer=2)
    first.apply(model)
    second.apply(model)
    first.revert(model)
    second.revert(model)
    assert same_bits(model, before)


def test_applying_twice_is_refused() -> None:
    model = tiny_model("gpt2")
    edit = simple_edit(model)
    edit.apply(model)
    after = bits(model)
    with pytest.raises(ValueError, match="already applied to this model; revert it first"):
        edit.apply(model)
    assert same_bits(model, after)


def test_reverting_what_was_not_applied_is_refused() -> None:
    model = tiny_model("gpt2")
    edit = simple_edit(model)
    with pytest.raises(ValueError, match="not applied to this model; only the Edit object that was applied"):
        edit.revert(model)
    with pytest.raises(ValueError, match="not applied to this model"):
        edit.originals(model)
    edit.apply(model)
    with pytest.raises(ValueError, match="not applied"):
        edit.revert(copy.deepcopy(model))


def test_weights_that_something_else_changed() -> None:
    model = tiny_model("llama")
    edit, before = simple_edit(model), bits(model)
    edit.apply(model)
    weight, _ = editable_weight(model, site(model))
    with torch.no_grad():
        weight.mul_(1.01)
    trained = bits(model)
    with pytest.raises(ValueError, match=r"something other than an edit changed the weight.*strict=False"):
        edit.revert(model)
    assert same_bits(model, trained) and edit.is_applied(model)
    edit.revert(model, strict=False)
    assert same_bits(model, before)


def test_weights_that_the_user_restored_can_be_reverted() -> None:
    model = tiny_model("llama")
    edit, before = simple_edit(model), bits(model)
    edit.apply(model)
    model.load_state_dict(before)
    edit.revert(model)
    assert same_bits(model, before) and not edit.is_applied(model)


def test_a_converted_model_cannot_be_reverted_by_bits() -> None:
    model = tiny_model("llama")
    edit = simple_edit(model)
    edit.apply(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"converted since .* from 32x48:float32 to 32x48:bfloat16"):
        edit.revert(model)


# ---- refusals that change nothing --------------------------------------------------------------------------------


def refused(model: nn.Module, edit: Edit, match: str, error: type[Exception] = ValueError) -> None:
    before = bits(model)
    with pytest.raises(error, match=match) as caught:
        edit.apply(model)
    assert "\n" not in str(caught.value)
    assert same_bits(model, before) and not edit.is_applied(model)


def test_another_base_model_is_refused() -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    edit = make_edit(model, make_delta(model, site(model, 0)), make_delta(model, site(model, 2)))
    with torch.no_grad():
        other.transformer.h[0].mlp.c_proj.weight.copy_(model.transformer.h[0].mlp.c_proj.weight)
    refused(
        other,
        edit,
        r"module 'transformer\.h\.2\.mlp\.c_proj': the edit is for another base model.*64x32:float32:",
    )
    edit.apply(other, strict=False)
    edit.revert(other)
    refused(
        tiny_model("gpt2", dtype=torch.bfloat16),
        edit,
        "the dtype differs: was 64x32:float32:.*, is 64x32:bfloat16:",
    )


def test_another_shape_or_module_is_refused() -> None:
    model = tiny_model("gpt2")
    edit = simple_edit(model)
    refused(
        tiny_model("gpt2", n_inner=40),
        edit,
        r"is for an \(out, in\) = \(32, 64\) weight, the model's is \(32, 40\)",
    )
    refused(
        tiny_model("llama"), edit, r"module 'transformer\.h\.1\.mlp\.c_proj': not found in LlamaForCausalLM"
    )
    refused(tiny_model("gpt2", n_layer=1), edit, r"not found in GPT2LMHeadModel")


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    edit = make_edit(model, make_delta(model, site(model, 0)), make_delta(model, site(model, 1)))
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(
        torch.zeros(4, dtype=torch.uint8), requires_grad=False
    )
    refused(model, edit, "Linear holds uint8 weights; quantised", NotImplementedError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["low_rank", "dense", "rows"])
def test_a_delta_that_is_not_finite_is_refused(kind: str, value: float) -> None:
    model = tiny_model("gpt2")
    good, bad = make_delta(model, site(model, 0)), make_delta(model, site(model, 1), kind)
    getattr(bad, bad.fields[-1])[1, 1] = value
    refused(
        model,
        make_edit(model, good, bad),
        f"module '{site(model, 1)}': {bad.fields[-1]} of the delta is not finite",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_result_that_overflows_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    huge = 1e4 if dtype is torch.float16 else 1e30
    delta = LowRank(site(model, 1), torch.full((32, 1), huge), torch.full((1, 64), huge))
    name = str(dtype).removeprefix("torch.")
    refused(
        model,
        make_edit(model, make_delta(model, site(model, 0)), delta),
        f"edited weight is not finite in {name}",
    )


# ---- composition -------------------------------------------------------------------------------------------------


def test_edits_of_one_base_add_up() -> None:
    model = tiny_model("gpt2")
    one = make_edit(model, make_delta(model, site(model, 1)), make_delta(model, site(model, 2)))
    two = simple_edit(model, seed=1, method="memit")
    both = one + two
    assert [(delta.name, delta.kind, delta.rank) for delta in both.deltas] == [
        (site(model, 1), "low_rank", 4),
        (site(model, 2), "low_rank", 2),
    ]
    torch.testing.assert_close(both.deltas[0].dense(), one.deltas[0].dense() + two.deltas[0].dense())
    assert both.method == "rome+memit" and both.requests == one.requests + two.requests
    assert [part["method"] for part in both.config["parts"]] == ["rome", "memit"]
    three = both + simple_edit(model, layer=3)
    assert [part["method"] for part in three.config["parts"]] == ["rome", "memit", "rome"]
    before = bits(model)
    with three.applied(model):
        assert not same_bits(model, before)
    assert same_bits(model, before)
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


def test_an_edit_solved_on_top_of_another_composes_with_it() -> None:
    model = tiny_model("llama")
    first = simple_edit(model)
    first.apply(model)
    second = simple_edit(model, seed=1)
    second.apply(model)
    sequential = canonical(model, site(model)).clone()
    second.revert(model)
    first.revert(model)
    with (first + second).applied(model):
        torch.testing.assert_close(canonical(model, site(model)), sequential)
    with pytest.raises(
        ValueError, match="the edits have different bases, 32x48:float32:.* and 32x48:float32:"
    ):
        second + first


def test_edits_of_different_bases_do_not_add_up() -> None:
    one, two = tiny_model("llama"), tiny_model("llama", seed=1)
    with pytest.raises(
        ValueError, match=r"module 'model\.layers\.1\.mlp\.down_proj': the edits have different bases"
    ):
        simple_edit(one) + simple_edit(two)


def test_mixed_kinds_compose() -> None:
    model = tiny_model("gpt2")
    name = site(model)
    kinds = ("low_rank", "dense", "rows", "low_rank")
    parts = [simple_edit(model, kind=kind, seed=i) for i, kind in enumerate(kinds)]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert [delta.kind for delta in total.deltas] == ["low_rank", "dense", "rows"]
    expected = sum(part.deltas[0].dense() for part in parts)
    before = canonical(model, name).clone()
    with total.applied(model):
        torch.testing.assert_close(canonical(model, name), before + expected)
    assert total.norms()[name] == pytest.approx(float(expected.norm()), rel=1e-5)


# ---- the records themselves ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    rank=st.integers(0, 5),
    seed=st.integers(0, 99),
    scale=st.floats(0.1, 9),
)
def test_norms_agree_with_the_dense_update(out: int, width: int, rank: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(shape, generator=generator) * scale for shape in ((out, rank), (rank, width)))
    delta = LowRank("m", left, right)
    assert delta.shape == (out, width) and delta.dense().shape == (out, width)
    assert delta.norm() == pytest.approx(float(delta.dense().double().norm()), rel=1e-4, abs=1e-5)
    assert delta.to(torch.float64).left.dtype == torch.float64
    dense = Dense("m", delta.dense())
    assert dense.norm() == pytest.approx(delta.norm(), rel=1e-4, abs=1e-5)


def test_rows_are_rows_of_the_canonical_weight() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    rows = Rows("m", torch.tensor([2, 0]), value, size=4)
    assert rows.shape == (4, 3)
    assert torch.equal(rows.dense(), torch.stack([value[1], torch.zeros(3), value[0], torch.zeros(3)]))
    columns = Rows("m", torch.tensor([2, 0]), value, size=4, axis=1)
    assert columns.shape == (3, 4) and torch.equal(columns.dense(), rows.dense().T)
    assert rows.to(torch.float64).index.dtype == torch.int64
    assert rows.norm() == pytest.approx(float(value.norm()))


BAD_DELTAS: dict[str, tuple[Any, str]] = {
    "name": (lambda m: LowRank("", m, m), "name must be a module name"),
    "parameter": (lambda m: LowRank("mlp.weight", m, m), "without '.weight', got 'mlp.weight'"),
    "vector": (
        lambda m: LowRank("mlp", m[0], m),
        r"delta 'mlp': left must be a float matrix, got float32 of shape \[3\]",
    ),
    "integers": (lambda m: LowRank("mlp", m, m.long()), "right must be a float matrix, got int64"),
    "rank": (lambda m: LowRank("mlp", m, m[:2]), r"must share r, got \[3, 3\] and \[2, 3\]"),
    "list": (lambda m: Dense("mlp", [[1.0]]), "value must be a float matrix, got list"),
    "float index": (lambda m: Rows("mlp", m[0], m, size=4), "index must be a vector of int64, got float32"),
    "length": (lambda m: Rows("mlp", torch.tensor([1]), m, size=4), "must have the same length, got 1 and 3"),
    "axis": (lambda m: Rows("mlp", torch.arange(3), m, size=4, axis=2), "axis must be 0 or 1, got 2"),
    "size": (lambda m: Rows("mlp", torch.arange(3), m, size=0), "size must be a positive integer, got 0"),
    "range": (lambda m: Rows("mlp", torch.arange(3), m, size=2), "index must be from 0 to 1"),
    "repeat": (lambda m: Rows("mlp", torch.tensor([1, 1, 2]), m, size=4), "index must not repeat a row"),
}


@pytest.mark.parametrize("case", BAD_DELTAS)
def test_deltas_validate_themselves(case: str) -> None:
    build, message = BAD_DELTAS[case]
    with pytest.raises(ValueError, match=message):
        build(torch.eye(3))


def test_edits_validate_themselves() -> None:
    delta = LowRank("mlp", torch.ones(2, 1), torch.ones(1, 2))
    good: dict[str, Any] = {
        "method": "rome", "config": {}, "requests": (), "deltas": (delta,), "base": {"mlp": "2x2:float32:0"}, "info": {}
    }  # fmt: skip
    assert Edit(**good).modules == ("mlp",)
    for change, message in (
        ({"method": ""}, "edit: method must be a name, got ''"),
        ({"config": {"x": torch.ones(1)}}, "edit: config must be JSON-able"),
        ({"info": [1]}, "edit: info must be a mapping, got list"),
        ({"requests": ("a",)}, "edit: requests must be a mapping, got str"),
        ({"base": {}}, "edit: base has no fingerprint for module 'mlp'"),
        ({"deltas": (torch.ones(1),)}, "edit: deltas must be LowRank, Dense or Rows, got Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            Edit(**{**good, **change})


def test_an_edit_can_be_pickled_but_not_its_applications() -> None:
    model = tiny_model("gpt2")
    edit = simple_edit(model)
    edit.apply(model)
    again = pickle.loads(pickle.dumps(edit))
    assert not again.is_applied(model) and torch.equal(again.deltas[0].left, edit.deltas[0].left)
    assert again.base == edit.base and again.config == edit.config == {"layers": [1, 2]}


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 9))
def test_fingerprints_tell_weights_apart(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mark = fingerprint(weight)
    assert mark == fingerprint(weight.clone()) and mark.startswith(f"{rows}x{columns}:float32:")
    assert mark != fingerprint(weight.to(torch.bfloat16)) and mark != fingerprint(weight + 1)
    changed = weight.clone()
    changed[-1, -1] += 1
    assert mark != fingerprint(changed)
    if rows != columns:
        assert mark != fingerprint(weight.T)


def test_fingerprints_of_large_weights_sample_every_column() -> None:
    weight = torch.zeros(1024, 768)
    mark = fingerprint(weight)
    for column in range(0, 768, 97):
        changed = weight.clone()
        changed[:, column] = 1
        assert fingerprint(changed) != mark
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(torch.empty(2, 2, device="meta"))
