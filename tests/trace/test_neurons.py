"""The sweep against whole forwards layer by layer: scores, neurons, chunks, and what bad input gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import neurons as twin
from tiny import DEPTH, tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.engine.attention import not_handed_over
from fastedit.session import Session
from fastedit.trace.neurons import NeuronOptions, coarse_neurons, find_neurons, fractions, shared_neurons
from fastedit.trace.neurons_result import Neurons

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma")
OTHERS = ("opt", "bloom", "falcon", "qwen3", "gemma2", "gemma3_text", "phi", "phi3")
PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "The Eiffel Tower is in",
    "LeBron James plays the sport of",
)


def session(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Session:
    return Session(tiny_model(family, dtype=dtype, **overrides), tiny_tokenizer())


def sites(made: Session, activation: str) -> tuple[list[str], bool]:
    """Module names as the twin takes them, and whether their output is meant."""
    if activation == "activation":
        return [made.arch.name("mlp_out", layer) for layer in range(DEPTH)], False
    site: Any = "mlp_gate" if made.arch.mlp_gate(0) is not None else "mlp_in"
    return [made.arch.name(site, layer) for layer in range(DEPTH)], True


def naive(made: Session, prompt: str, answer: tuple[int, ...], options: NeuronOptions) -> torch.Tensor:
    modules, output = sites(made, options.activation)
    return twin.attribution(
        made.model,
        modules,
        made.tokenizer.encode(prompt),
        answer,
        fractions=fractions(options.steps, options.grid),
        output=output,
        rule=options.continuation,
    )


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def compare(
    made: Session, prompts: tuple[str, ...], answer: str, options: NeuronOptions, most: float
) -> None:
    found = find_neurons(made, prompts, answer, options)
    want = torch.stack([naive(made, prompt, found.answer_ids, options) for prompt in prompts])
    assert error(found.scores, want) <= most
    # Every neuron of the twin, and no other; scores that lie on the threshold may fall either way.
    expected = twin.refined_neurons(list(want), options.adaptive_threshold, options.p)
    edge = {
        (int(i), int(j))
        for one in want
        for i, j in ((one / (options.adaptive_threshold * one.max()) - 1).abs() < 1e-4).nonzero()
    }
    assert set(found.neurons) ^ expected <= edge
    assert expected


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("activation", ["activation", "pre_activation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_neurons_are_the_twins(
    family: str, activation: Any, dtype: torch.dtype, most: float
) -> None:
    made = session(family, dtype)
    # GPT-J's attention computes its scores in float32 whatever the model's type; ours in the model's.
    most = max(most, 1e-6) if family == "gptj" else most
    compare(made, PROMPTS, " Rome", NeuronOptions(activation=activation), most)


@pytest.mark.parametrize("family", OTHERS)
def test_other_block_types(family: str) -> None:
    compare(session(family), PROMPTS[:2], " Rome", NeuronOptions(steps=6), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_whole_rows_run_where_attention_is_handed_over(family: str) -> None:
    made = session(family)
    assert not_handed_over(made.arch) is None
    widest = 0

    def see(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal widest
        widest = max(widest, args[0].reshape(-1, args[0].shape[-1]).shape[0])

    handle = made.arch.mlp_out(DEPTH - 1).register_forward_pre_hook(see)
    find_neurons(made, PROMPTS[0], " the", NeuronOptions())
    handle.remove()
    assert widest <= 20 * DEPTH


@pytest.mark.parametrize("rule", ["argmax", "answer", "fixed"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_answers_of_several_tokens(family: str, rule: Any) -> None:
    made = session(family)
    options = NeuronOptions(continuation=rule, steps=5)
    assert len(made.tokenizer.encode(" physics and chemistry")) > 2
    compare(made, PROMPTS[:2], " physics and chemistry", options, 1e-4)


@pytest.mark.parametrize(
    ("steps", "grid"), [(1, "ends"), (1, "right"), (7, "ends"), (7, "left"), (7, "right")]
)
def test_points_of_the_path(steps: int, grid: Any) -> None:
    points = fractions(steps, grid)
    assert len(points) == steps
    assert {"left": points[0] == 0, "right": points[-1] == 1, "ends": points[0] == 0}[grid]
    compare(session("gpt2"), PROMPTS[:1], " Rome", NeuronOptions(steps=steps, grid=grid), 1e-4)


def test_scores_sum_to_what_the_layer_gives_the_answer() -> None:
    """An integrated gradient is complete: a layer's scores sum to P(activation) - P(zero), here by many steps."""
    made = session("gpt2", torch.float64)
    found = find_neurons(made, PROMPTS[0], " the", NeuronOptions(steps=2000))
    ids = made.tokenizer.encode(PROMPTS[0])

    def probability() -> float:
        return float(made.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)[found.answer_ids[0]])

    assert found.probability[0] == pytest.approx(probability(), rel=1e-9)
    for layer in range(DEPTH):

        def silence(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            new = args[0].clone()
            new[:, -1] = 0
            return (new,)

        handle = made.arch.mlp_out(layer).register_forward_pre_hook(silence)
        without = probability()
        handle.remove()
        assert float(found.scores[0, layer].sum()) == pytest.approx(found.probability[0] - without, rel=2e-3)


def test_some_layers_only() -> None:
    made = session("llama")
    every = find_neurons(made, PROMPTS[0], " Rome", NeuronOptions())
    some = find_neurons(made, PROMPTS[0], " Rome", NeuronOptions(layers=(3, 1)))
    assert some.layers == (1, 3)
    assert error(some.scores, every.scores[:, [1, 3]]) <= 1e-5
    assert error(some.activations, every.activations[:, [1, 3]]) <= 1e-6
    assert {layer for layer, _ in some.neurons} <= {1, 3}


def test_the_models_own_answer_and_the_model_left_as_it_was() -> None:
    made = session("gpt2")
    made.model.train().requires_grad_(True)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    found = find_neurons(made, PROMPTS[0], None, NeuronOptions(steps=4))
    assert made.model.training and all(p.requires_grad and p.grad is None for p in made.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    made.model.eval()
    logits = made.model(input_ids=torch.tensor([made.tokenizer.encode(PROMPTS[0])])).logits[0, -1]
    assert found.answer_ids == (int(logits.argmax()),)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.model.modules())


def test_choosing_neurons() -> None:
    scores = torch.tensor([[1.0, 0.2, 0.5], [-3.0, 0.21, 0.0]])
    assert coarse_neurons(scores, (4, 7), 0.2) == ((4, 0), (4, 2), (7, 1))
    assert coarse_neurons(-scores.abs() - 1, (4, 7), 0.2) == ()
    assert coarse_neurons(torch.zeros(2, 3), (4, 7), 0.2) == ()
    sets = [[(0, 1), (0, 2)], [(0, 2)], [(0, 2), (1, 1)], [(1, 1)]]
    assert shared_neurons(sets, 0.4) == ((0, 2), (1, 1))
    assert shared_neurons(sets, 0.5) == ((0, 2),)
    assert shared_neurons(sets, 0.0) == ((0, 1), (0, 2), (1, 1))


@pytest.mark.parametrize(
    ("prompts", "answer", "options", "message"),
    [
        ([], " Rome", {}, "prompts must be a text or a list of at least one, got"),
        (5, " Rome", {}, "prompts must be a text or a list of at least one, got 5"),
        (["a", " "], " Rome", {}, "prompts must hold texts that are not blank, got ' '"),
        ("a", "", {}, "answer must be a text that is not blank, got ''"),
        ("a", 3, {}, "answer must be a text that is not blank, got 3"),
        (
            "word " * 200,
            " Rome",
            {},
            "prompts: .* tokens with the answer, the model has 128 positions, got 'word word",
        ),
        ("a", " Rome", {"layers": (99,)}, "layer: must be an integer from 0 to 3, got 99"),
        ("a", " Rome", {"layers": ()}, "layers must be a non-empty list"),
        ("a", " Rome", {"layers": (1, 1)}, "layers must not repeat a layer"),
        ("a", " Rome", {"steps": 0}, "steps must be an integer from 1 to 100000, got 0"),
        ("a", " Rome", {"grid": "middle"}, "grid must be one of left, right, ends, got 'middle'"),
        (
            "a",
            " Rome",
            {"activation": "post"},
            "activation must be one of activation, pre_activation, got 'post'",
        ),
        ("a", " Rome", {"continuation": "x"}, "continuation must be one of argmax, answer, fixed, got 'x'"),
        ("a", " Rome", {"adaptive_threshold": 1.0}, "adaptive_threshold must be a number from 0 to 1"),
        ("a", " Rome", {"p": float("nan")}, "p must be a number from 0 to 1"),
        ("a", " Rome", {"memory": 0}, "memory must be a number of bytes >= 1, or None, got 0"),
    ],
)
def test_bad_input_is_one_line(prompts: Any, answer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_neurons(session("gpt2"), prompts, answer, NeuronOptions(**options))
    assert "\n" not in str(caught.value)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="activation: must be 'activation' for 'phi3'"):
        find_neurons(session("phi3"), "a", " Rome", NeuronOptions(activation="pre_activation"))
    broken = session("gpt2")
    with torch.no_grad():
        broken.arch.mlp_out(2).weight[0, 0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(ValueError, match="prompts: the model gives NaN or infinity in a clean run"):
        find_neurons(broken, PROMPTS[0], " Rome", NeuronOptions())


def test_the_result_saves_loads_plots_and_shows(tmp_path: Path) -> None:
    found = find_neurons(session("gpt2"), PROMPTS, " the", NeuronOptions(layers=(1, 2)))
    found.save(tmp_path / "n.npz")
    found.save(tmp_path / "n.json")
    loaded = Neurons.load(tmp_path / "n.npz")
    assert torch.equal(loaded.scores, found.scores) and torch.equal(loaded.activations, found.activations)
    for name in ("prompts", "answer", "answer_ids", "layers", "probability", "coarse", "neurons", "options"):
        assert getattr(loaded, name) == getattr(found, name), name
    assert json.loads((tmp_path / "n.json").read_text())["neurons"] == [list(n) for n in found.neurons]
    for suffix in ("png", "svg"):
        assert found.plot(tmp_path / f"n.{suffix}").stat().st_size > 1000
    svg = (tmp_path / "n.svg").read_text()
    assert "knowledge neurons" in svg and "located in the city" in svg
    shown = found._repr_html_()
    assert shown.count("<tr>") == 13 and "LeBron James" in shown
    layer, neuron, score = found.top(1)[0]
    assert score == float(found.scores.mean(dim=0).max()) == float(found.scores[:, layer - 1, neuron].mean())
    assert sum(found.per_layer().values()) == len(found.neurons)
    assert repr(found).startswith(f"Neurons({len(found.neurons)} of 128 neurons")
    for call in (found.save, found.plot):
        with pytest.raises(ValueError, match="path must end in"):
            call(tmp_path / "n.txt")
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match=r"path must be a file that Neurons.save wrote"):
        Neurons.load(tmp_path / "other.npz")


def test_the_editors_door() -> None:
    made = session("gpt2")
    ed = Editor(made.model, made.tokenizer)
    found = ed.neurons(PROMPTS[0], "the", steps=5, layers=[1, 2])
    want = find_neurons(made, PROMPTS[0], "the", NeuronOptions(steps=5, layers=(1, 2)))
    assert found.neurons == want.neurons and torch.equal(found.scores, want.scores)
    with pytest.raises(ValueError, match="NeuronOptions: unknown option 'step'; known: layers, steps"):
        ed.neurons(PROMPTS[0], "the", step=5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "bloom", "bert"])
def test_on_a_gpu_the_scores_are_the_same(family: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    prompt = f"{PROMPTS[0]} [MASK]" if family == "bert" else PROMPTS[0]
    here, there = (Session(tiny_model(family).to(device), tokenizer) for device in ("cpu", "cuda"))
    want, found = (find_neurons(made, prompt, " the", NeuronOptions()) for made in (here, there))
    assert error(found.scores, want.scores) <= 1e-4
    assert found.neurons == want.neurons


def test_hooks_are_gone_after_any_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be registered, a forward that stops, a backward that stops."""

    def clean(made: Session) -> bool:
        modules = list(made.model.modules())
        return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)

    for family in ("gpt2", "gemma2", "bloom"):
        made = session(family)
        target = made.arch.mlp_out(2)
        places = ((target, "register_forward_pre_hook"), (target, "forward"), (torch.autograd, "grad"))
        for owner, name in places:

            def stop(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stop)
                with pytest.raises(KeyboardInterrupt):
                    find_neurons(made, PROMPTS[0], " the", NeuronOptions(steps=2))
            vars(target).pop("forward", None)
            assert clean(made), (family, name)
            assert find_neurons(made, PROMPTS[0], " the", NeuronOptions(steps=2)).scores.isfinite().all()


def test_the_callers_inference_mode_does_not_matter() -> None:
    made = session("gpt2")
    want = find_neurons(made, PROMPTS[0], " the", NeuronOptions(steps=3))
    with torch.inference_mode():
        assert torch.equal(find_neurons(made, PROMPTS[0], " the", NeuronOptions(steps=3)).scores, want.scores)


@pytest.mark.parametrize("answer", [None, " Rome", " physics and chemistry"])
@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_a_prompt_that_is_too_long_is_refused_before_any_forward(family: str, answer: str | None) -> None:
    made = session(family)

    def never(*_: Any) -> None:
        raise AssertionError("a forward ran")

    made.model.register_forward_pre_hook(never)
    with pytest.raises(ValueError, match="prompts: .* tokens with the answer, the model has 128 positions"):
        find_neurons(made, "word " * 200, answer, NeuronOptions())


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    found = find_neurons(session("gpt2"), PROMPTS[0], " the", NeuronOptions(steps=2))
    for changes in (
        {"scores": found.scores * float("nan")},
        {"activations": found.activations / 0},
        {"probability": (float("nan"),)},
    ):
        broken = dataclasses.replace(found, **changes)  # type: ignore[arg-type]
        for suffix in ("json", "npz"):
            with pytest.raises(ValueError, match="must be finite to be saved"):
                broken.save(tmp_path / f"n.{suffix}")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "n.npz"
    find_neurons(session("gpt2"), PROMPTS[0], " the", NeuronOptions(steps=2)).save(path)
    data = path.read_bytes()
    for broken in (
        b"",
        b"no archive",
        data[: len(data) // 2],
        data[:-100],
        data[:200] + b"x" * 50 + data[250:],
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="path must be a file that Neurons.save wrote") as caught:
            Neurons.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        Neurons.load(tmp_path / "none.npz")


def test_options_of_the_wrong_kind_are_one_line() -> None:
    ed = Editor(session("gpt2").model, tiny_tokenizer())
    for options, message in (
        ({"steps": [1]}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"grid": ["left"]}, "grid must be one of"),
        ({"layers": 3}, "layers must be a non-empty list"),
        ({"layers": [[1]]}, "layers must be a non-empty list"),
        ({"p": "0.5"}, "p must be a number"),
        ({"adaptive_threshold": -0.1}, "adaptive_threshold must be a number from 0 to 1"),
        ({"memory": 1.5}, "memory must be a number of bytes"),
        ({"memory": -1}, "memory must be a number of bytes"),
        ({"memory_budget": 5}, "NeuronOptions: unknown option 'memory_budget'; known: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ed.neurons(PROMPTS[0], "the", **options)
        assert "\n" not in str(caught.value)
