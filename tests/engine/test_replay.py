"""Replaying the upper blocks equals the model's own forward, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny import CAUSAL, DEPTH, tiny_batch, tiny_model

from fastedit.arch import resolve
from fastedit.engine.replay import Replay


@pytest.mark.parametrize("start", [0, 2, DEPTH - 1])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_replayed_blocks_give_the_models_logits(model_type: str, start: int) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    batch = tiny_batch(model, batch=3, length=9)
    batch["attention_mask"][1, 6:] = 0
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        replay = Replay.capture(model, arch, batch["input_ids"], batch["attention_mask"], start=start)
        hidden = replay.run(replay.hidden)
        assert torch.equal(hidden, replay.final)
        logits = arch.logits(hidden)
    real = batch["attention_mask"].bool()
    assert torch.allclose(logits[real], expected[real], rtol=0, atol=1e-6)


def test_capture_ends_at_the_stop_block_and_leaves_no_hook() -> None:
    model = tiny_model("llama")
    arch = resolve(model)
    batch = tiny_batch(model)
    reached: list[int] = []
    handle = arch.block(2).register_forward_hook(lambda *_: reached.append(2))
    Replay.capture(model, arch, batch["input_ids"], batch["attention_mask"], start=0, stop=2)
    handle.remove()
    assert not reached
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
