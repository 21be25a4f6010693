"""Blocks of a T5 run one by one, behind prefixes and on shared encodings, against the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_seq2seq import VARIANTS, session_of

from fastedit.engine import encoder_decoder
from fastedit.engine.encoder_decoder import Decoder, Encoder, Encodings, decoder_start

SOURCE, BEHIND = 9, 4


def setting(variant: str, **options: Any) -> Any:
    arch = session_of(variant, **options).arch
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 300, (3, SOURCE), generator=generator)
    behind = torch.randint(2, 300, (3, BEHIND), generator=generator)
    model: Any = arch.model
    with torch.no_grad():
        want = model(input_ids=ids, decoder_input_ids=behind, use_cache=False).logits
        encoder = Encoder(arch, SOURCE)
        hidden = encoder.arch.embed(ids)
        for layer in range(encoder.arch.depth):
            hidden = encoder.block(layer, hidden)
        return arch, behind, want, encoder.states(hidden)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_rows_and_rows_behind_a_prefix(variant: str, attention: str) -> None:
    arch, behind, want, states = setting(variant, attn_implementation=attention)
    decoder = Decoder(arch, BEHIND)
    for keep in (False, True):
        encodings = Encodings(states, keep=keep)
        with torch.no_grad(), decoder.running():
            whole = arch.embed(behind)
            head, tail = whole[:, :3], whole[:, 3:]
            for layer in range(arch.depth):
                whole, _ = decoder.block(layer, whole, encodings)
                head, past = decoder.block(layer, head, encodings)
                tail, _ = decoder.block(layer, tail, encodings, first=3, past=past)
        for found in (whole, torch.cat([head, tail], dim=1)):
            assert float((arch.logits(found) - want).abs().max()) <= 1e-12


def test_rows_that_share_encodings_and_parts_of_them() -> None:
    arch, behind, want, states = setting("v1.1")
    decoder, encodings = Decoder(arch, BEHIND), Encodings(states, keep=True)
    with torch.no_grad(), decoder.running():
        twice = arch.embed(behind).repeat(2, 1, 1)
        part = arch.embed(behind)[1:]
        for layer in range(arch.depth):
            twice, _ = decoder.block(layer, twice, encodings)
            part, _ = decoder.block(layer, part, encodings.part(1, 3))
    assert float((arch.logits(twice) - want.repeat(2, 1, 1)).abs().max()) <= 1e-12
    assert float((arch.logits(part) - want[1:]).abs().max()) <= 1e-12


@pytest.mark.parametrize("cheaper", [False, True])
def test_keys_and_values_need_not_be_made(cheaper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, behind, want, states = setting("v1.0")
    monkeypatch.setattr(encoder_decoder, "_cheaper_absorbed", lambda *_: cheaper)
    decoder = Decoder(arch, BEHIND)
    with torch.no_grad(), decoder.running():
        hidden = arch.embed(behind)
        for layer in range(arch.depth):
            hidden, _ = decoder.block(layer, hidden, Encodings(states))
    assert float((arch.logits(hidden) - want).abs().max()) <= 1e-12


def test_forwards_of_the_instance_come_back() -> None:
    arch, *_ = setting("v1.0")
    own = arch.attn(1).forward
    arch.attn(1).forward = own
    with pytest.raises(KeyError), Decoder(arch, BEHIND).running():
        raise KeyError
    assert vars(arch.attn(1))["forward"] is own and "forward" not in vars(arch.cross(1))
    assert decoder_start(arch) == 1
