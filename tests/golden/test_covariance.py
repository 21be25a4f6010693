"""Our second moments against those of the original layer_stats: same texts, exact count, 1e-5 relative Frobenius."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden.golden import load_model, moments

from fastedit.arch import resolve
from fastedit.stats import collect_statistics, read_corpus

TEXTS = Path(__file__).parent / "cov" / "texts.json.gz"


@pytest.mark.parametrize("name", ["gpt2-facts", "gptj-facts", "llama-facts"])
def test_second_moments_equal_the_originals(name):
    model, tokenizer = load_model(name)
    expected = moments(name)
    found = collect_statistics(model, tokenizer, resolve(model), read_corpus(TEXTS), [0, 1, 2])
    assert list(found) == list(expected)
    for module, ours in found.items():
        theirs = expected[module]
        assert ours.count == theirs.count
        C, C_ref = ours.moment(), theirs.moment()
        assert torch.linalg.norm(C - C_ref) <= 1e-5 * torch.linalg.norm(C_ref)
        assert (C.diagonal() / C_ref.diagonal() - 1).abs().max() <= 1e-4
        assert torch.equal(C, C.mT)
