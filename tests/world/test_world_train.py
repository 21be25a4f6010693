"""Training: a three-step smoke run, the mask, what an interrupted or wrong call leaves behind."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastedit.world import train as training
from fastedit.world.embedded import load, load_tokenizer
from fastedit.world.facts import build_facts
from fastedit.world.model import BottleneckAttention, ModelShape, build_model
from fastedit.world.train import Recipe, main

SMALL = {
    "rows": 4,
    "width": 32,
    "shape": {"depth": 2, "width": 32, "heads": 2, "inner": 64},
    "mask_layer": 1,
    "recall_layer": 0,
}


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_three_steps_write_a_plain_model_that_loads(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "report", lambda *_: {"train": 0.0})
    out = tmp_path / "model"
    code = main(["--arch", arch, "--steps", "3", "--out", str(out), "--set", json.dumps(SMALL)])
    assert code == 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["arch"] == arch and recipe["steps"] == 3
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.model_type == arch
    assert load(arch, weights=out).model.dtype == torch.float32
    with pytest.raises(ValueError, match="holds a"):
        load("llama" if arch == "gpt2" else "gpt2", weights=out)


def test_same_seed_same_weights():
    facts, tokenizer = build_facts(), load_tokenizer()
    recipe = Recipe(
        steps=2, rows=2, width=32, shape=ModelShape(**SMALL["shape"]), mask_layer=1, recall_layer=0
    )
    state = torch.random.get_rng_state()
    first, second = (training.train(recipe, facts, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_without_masks_the_training_attention_is_plain_attention(arch):
    shape = ModelShape(depth=2, width=32, heads=2, inner=64)
    model = build_model(arch, shape, 64, BottleneckAttention(1, 0.7).name).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        ours = model(ids).logits
        model.config._attn_implementation = "sdpa"
        assert torch.allclose(ours, model(ids).logits, atol=1e-5)


def test_the_mask_lets_only_the_last_subject_token_through():
    # logits after the subject depend on its tokens only through the last one's residual stream: with the mask on,
    # the tokens behind cannot see a change of an earlier subject token below the mask's layer
    shape = ModelShape(depth=1, width=32, heads=2, inner=64)
    attention = BottleneckAttention(1, 1.0)
    model = build_model("gpt2", shape, 64, attention.name).eval()
    ids = torch.arange(1, 9).view(1, 8)
    changed = ids.clone()
    changed[0, 2] = 40
    hops = torch.zeros(1, 8, dtype=torch.bool)
    with torch.no_grad():
        attention.prepare([[(2, 4)]], hops, 8, random.Random(0))
        assert torch.equal(model(ids).logits[0, 5:], model(changed).logits[0, 5:])
        assert not torch.equal(model(ids).logits[0, 4], model(changed).logits[0, 4])
        attention.release()
        assert not torch.equal(model(ids).logits[0, 5:], model(changed).logits[0, 5:])


def test_two_hop_questions_send_no_gradient_into_the_subject():
    shape = ModelShape(depth=2, width=32, heads=2, inner=64)
    attention = BottleneckAttention(1, 0.0)
    model = build_model("gpt2", shape, 64, attention.name)
    embedded = model.transformer.wte(torch.arange(1, 9).view(1, 8)).detach().requires_grad_(True)
    hops = torch.zeros(1, 8, dtype=torch.bool)
    for marked in (False, True):
        hops[:] = marked
        embedded.grad = None
        attention.prepare([[(2, 4)]], hops, 8, random.Random(0))
        model(inputs_embeds=embedded).logits[0, 7].sum().backward()
        assert bool(embedded.grad[0, 2:5].abs().max() > 0) is not marked


def test_ctrl_c_leaves_the_earlier_model(tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    out.mkdir()
    (out / "recipe.json").write_text("{}")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert main(["--arch", "gpt2", "--out", str(out)]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["recipe.json"]


def test_an_output_directory_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--arch", "gpt2", "--out", str(tmp_path)]) == 2
    assert "must be new, empty or an earlier world model" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_wrong_recipe_is_refused(tmp_path, capsys):
    assert main(["--arch", "gpt2", "--steps", "0", "--out", str(tmp_path / "x")]) == 2
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
