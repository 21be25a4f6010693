"""The committed weights: what they know, and that they are plain models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastedit.world
from fastedit.world.accuracy import report

ARCHS = ("gpt2", "llama")
WEIGHTS = Path(fastedit.world.__file__).parent / "weights"


@pytest.fixture(scope="module", params=ARCHS)
def world(request):
    return fastedit.world.load(request.param)


def test_a_plain_fp32_model_without_gradients(world):
    assert world.model.config.model_type == world.name
    assert type(world.model).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    assert {p.dtype for p in world.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in world.model.parameters())
    assert not world.model.training


def test_it_knows_its_facts_in_wordings_never_trained_for_them(world):
    scores = report(world.model, world.tokenizer, world.facts, 200)
    assert scores["train"] >= 0.98
    assert scores["held_out"] >= 0.97
    assert scores["hop_untrained"] >= 0.6


def test_recommended_options_fit_the_model(world):
    depth = world.model.config.num_hidden_layers
    assert all(0 <= layer < depth for layer in (*world.rome["layers"], *world.memit["layers"]))


def test_requests_and_corpus(world):
    assert len(world.requests(5, seed=1, split="tune")) == 5
    assert len(world.corpus(7, seed=1)) == 7


def test_the_weights_are_small():
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) <= 16 * 2**20


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name must be one of gpt2, llama, got 'bert'"):
        fastedit.world.load("bert")
    with pytest.raises(ValueError, match="holds no world model"):
        fastedit.world.load("gpt2", weights=tmp_path)


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, fastedit.world; raise SystemExit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=WEIGHTS.parents[2]).returncode == 0
