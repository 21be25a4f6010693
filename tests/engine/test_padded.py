"""Suffixes against whole rows: the same hidden states, for every architecture, prefix and padding."""

from __future__ import annotations

import pytest
import torch
from tiny import CAUSAL, tiny_batch, tiny_model

from fastedit.arch import resolve
from fastedit.engine.padded import SuffixReplay, whole_rows_because
from fastedit.engine.replay import Replay

LENGTH = 24  # beyond the tiny models' sliding window of 16


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_suffixes_equal_whole_rows(model_type: str, start: int) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    batch = tiny_batch(model, batch=4, length=LENGTH)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask[1, 19:] = 0
    mask[3, 22:] = 0
    lookup = [20, 3, 0, 17]
    whole = Replay.capture(model, arch, ids, mask, start=start)
    suffix = SuffixReplay(model, arch, ids, mask, start=start, lookup=lookup)
    shift = torch.randn(4, arch.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = torch.arange(4)
        moved = whole.hidden.index_put((rows, torch.tensor(lookup)), shift, accumulate=True)
        expected = whole.run(moved)
        hidden = suffix.hidden.clone()
        hidden[:, 0] += shift
        found = suffix.run(hidden)
    assert suffix.tokens == 4 + 16 + 24 + 5
    for row, at in enumerate(lookup):
        stop = int(mask[row].sum())
        assert torch.equal(suffix.final[row, : stop - at], whole.final[row, at:stop])
        assert torch.allclose(found[row, : stop - at], expected[row, at:stop], rtol=1e-4, atol=2e-5), row


def test_what_needs_whole_rows() -> None:
    model = tiny_model("llama")
    assert whole_rows_because(model, [0, 3]) is None
    assert "end of the padded row" in str(whole_rows_because(model, [0, -1]))
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(whole_rows_because(model, [0]))
