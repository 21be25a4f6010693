"""The llama2.c converter: equal to a direct evaluation of the file's own equations, loud on broken files."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from llama2c import STORIES, load_llama2c, load_llama2c_tokenizer, read_llama2c

PROMPT = "Once upon a time, there was a little girl named Lily. She"


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def rotate(x: np.ndarray) -> np.ndarray:  # [heads, T, head], pairs lie side by side in this format
    _, length, width = x.shape
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def forward(h: dict[str, int], t: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [T, V] of the format's model in float64."""
    x, length, head = t["embed"][ids], len(ids), h["dim"] // h["heads"]
    causal = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(h["layers"]):
        y = rms(x, t["attn_norm"][i])
        q, k, v = ((y @ t[w][i].T).reshape(length, -1, head).transpose(1, 0, 2) for w in ("wq", "wk", "wv"))
        q, k = rotate(q), np.repeat(rotate(k), h["heads"] // h["kv_heads"], 0)
        scores = q @ k.transpose(0, 2, 1) / head**0.5 + causal
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ np.repeat(v, h["heads"] // h["kv_heads"], 0)
        x = x + out.transpose(1, 0, 2).reshape(length, -1) @ t["wo"][i].T
        y = rms(x, t["mlp_norm"][i])
        gate = y @ t["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ t["w3"][i].T)) @ t["w2"][i].T
    return rms(x, t["final_norm"]) @ t.get("head", t["embed"]).T


def write_model(path, *, own_head: bool, cut: int = 0, extra: int = 0) -> None:
    """A random model in the format: width 16, 2 layers, 4 heads, 2 key-value heads, vocabulary 11, context 8."""
    d, f, n, heads, kv, v, s = 16, 24, 2, 4, 2, 11, 8
    head = d // heads
    sizes = [v * d, n * d, n * d * d, n * kv * head * d, n * kv * head * d, n * d * d, n * d]
    sizes += [n * f * d, n * d * f, n * f * d, d, s * head // 2, s * head // 2] + [v * d] * own_head
    values = np.random.default_rng(0).normal(size=sum(sizes) - cut + extra).astype("<f4") * 0.3
    path.write_bytes(struct.pack("7i", d, f, n, heads, kv, -v if own_head else v, s) + values.tobytes())


@pytest.mark.parametrize("own_head", [False, True], ids=["tied", "own-head"])
def test_synthetic_file_equals_direct_evaluation(tmp_path, own_head):
    write_model(tmp_path / "m.bin", own_head=own_head)
    header, tensors = read_llama2c(tmp_path / "m.bin")
    want = forward(header, {k: v.double().numpy() for k, v in tensors.items()}, [1, 7, 3, 10, 4])
    got = load_llama2c(tmp_path / "m.bin").double()(torch.tensor([[1, 7, 3, 10, 4]])).logits[0].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_stories_equal_direct_evaluation():
    header, tensors = read_llama2c(STORIES / "stories260K.bin")
    ids = load_llama2c_tokenizer(STORIES / "tok512.bin").encode(PROMPT)
    want = forward(header, {k: v.double().numpy() for k, v in tensors.items()}, ids)
    got = load_llama2c(STORIES / "stories260K.bin")(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_stories_are_fluent():
    tokenizer = load_llama2c_tokenizer(STORIES / "tok512.bin")
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    out = load_llama2c(STORIES / "stories260K.bin").generate(ids, max_new_tokens=30, do_sample=False)
    assert "She loved to play outside in the park." in tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize("text", [PROMPT, 'Lily said, "Hi!"\nThen', "Zoé and 日本 \U0001f600"])
def test_tokenizer_round_trip(text):
    tokenizer = load_llama2c_tokenizer(STORIES / "tok512.bin")
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    assert encoded["offset_mapping"][-1][1] == len(text)


def test_broken_files_name_what_is_wrong(tmp_path):
    (tmp_path / "short.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="short.bin is 3 bytes"):
        read_llama2c(tmp_path / "short.bin")
    write_model(tmp_path / "cut.bin", own_head=False, cut=1)
    with pytest.raises(ValueError, match="ends inside 'rope_sin'"):
        read_llama2c(tmp_path / "cut.bin")
    write_model(tmp_path / "long.bin", own_head=False, extra=3)
    with pytest.raises(ValueError, match="3 values more"):
        read_llama2c(tmp_path / "long.bin")
