"""Loads the committed world models: `fastedit.world.load("gpt2")`, `fastedit.world.load("llama")`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastedit.request import EditRequest
from fastedit.world.corpus import texts
from fastedit.world.facts import Facts, build_facts
from fastedit.world.model import ARCHS
from fastedit.world.requests import Split, make_requests
from fastedit.world.tokenizer import END_OF_TEXT

__all__ = ["World", "load", "load_tokenizer"]

_WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class World:
    """A model that knows the fact world, and the world.

    Attributes:
        model: GPT-2 or Llama of `transformers`, fp32, eval mode, nothing of the training left in it.
        tokenizer: its tokenizer.
        facts: all entities, facts with their wordings, and two-hop compositions.
        rome, memit: recommended options of these methods for this model, chosen on `split="tune"` only.
        recipe: how the model was trained, and what it knew then.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    facts: Facts
    rome: Mapping[str, Any]
    memit: Mapping[str, Any]
    recipe: Mapping[str, Any]

    def requests(self, n: int, seed: int = 0, split: Split = "test") -> list[EditRequest]:
        """`n` counterfactual edits with all their probes; see `fastedit.world.requests.make_requests`."""
        return make_requests(self.facts, n, seed, split)

    def corpus(self, n_docs: int = 1000, seed: int = 0) -> list[str]:
        """`n_docs` texts like those the model was trained on (about 45 tokens each), for key statistics and
        perplexity. ValueError if `n_docs` < 1."""
        return texts(self.facts, n_docs, seed)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer both models use."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(_WEIGHTS / "tokenizer.json"),
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load(name: str, *, weights: str | Path | None = None) -> World:
    """Load a world model.

    Args:
        name: "gpt2" or "llama".
        weights: directory written by `python -m fastedit.world.train --arch NAME`, instead of the committed weights.

    Raises:
        ValueError: unknown name, a directory without a model, or a model of the other architecture.
    """
    if name not in ARCHS:
        raise ValueError(f"name must be one of {', '.join(ARCHS)}, got {name!r}")
    directory = Path(weights) if weights is not None else _WEIGHTS / name
    recipe_file = directory / "recipe.json"
    if not recipe_file.is_file():
        raise ValueError(f"weights: {str(directory)!r} holds no world model (no recipe.json)")
    recipe = json.loads(recipe_file.read_text())
    if recipe.get("arch") != name:
        raise ValueError(f"weights: {str(directory)!r} holds a {recipe.get('arch')!r} model, not {name!r}")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    model.requires_grad_(False)
    options = json.loads((Path(__file__).parent / "options.json").read_text())[name]
    return World(
        name=name,
        model=model,
        tokenizer=load_tokenizer(),
        facts=build_facts(),
        rome=options["rome"],
        memit=options["memit"],
        recipe=recipe,
    )
