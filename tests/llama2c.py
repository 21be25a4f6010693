"""Converter: a model and tokenizer in the llama2.c format (version 0) -> transformers' Llama.

The model file is seven int32 (width, hidden width, layers, heads, key-value heads, vocabulary, context; a negative
vocabulary means a head of its own) followed by fp32 tensors in the order of `_tensors`. The tokenizer file is the
longest token's length as int32, then for each token an fp32 score, an int32 length and the bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["load_llama2c", "load_llama2c_tokenizer", "read_llama2c", "stories260k"]

STORIES = Path(__file__).parent / "data" / "stories260K"


def stories260k() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The committed stories260K model (fp32, eval, no gradients) and its tokenizer."""
    return load_llama2c(STORIES / "stories260K.bin"), load_llama2c_tokenizer(STORIES / "tok512.bin")


def read_llama2c(path: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Header and raw tensors of a llama2.c file, by the format's own names; ValueError if sizes do not add up."""
    data = path.read_bytes()
    if len(data) < 28:
        raise ValueError(f"path must hold a llama2.c model, but {path.name} is {len(data)} bytes")
    names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")
    header = dict(zip(names, struct.unpack("7i", data[:28])))
    shared = header["vocab"] > 0
    header["vocab"] = abs(header["vocab"])
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())
    tensors: dict[str, torch.Tensor] = {}
    at = 0
    for name, shape in _tensors(header, shared):
        size = int(np.prod(shape))
        if at + size > values.numel():
            raise ValueError(f"path must hold a whole llama2.c model, but {path.name} ends inside {name!r}")
        tensors[name] = values[at : at + size].view(shape)
        at += size
    if at != values.numel():
        raise ValueError(
            f"path must hold one llama2.c model, but {path.name} has {values.numel() - at} values more"
        )
    return header, tensors


def _tensors(h: dict[str, int], shared: bool) -> list[tuple[str, tuple[int, ...]]]:
    d, f, n, v = h["dim"], h["hidden"], h["layers"], h["vocab"]
    head = d // h["heads"]
    kv = head * h["kv_heads"]
    rows: list[tuple[str, tuple[int, ...]]] = [
        ("embed", (v, d)),
        ("attn_norm", (n, d)),
        ("wq", (n, d, d)),
        ("wk", (n, kv, d)),
        ("wv", (n, kv, d)),
        ("wo", (n, d, d)),
        ("mlp_norm", (n, d)),
        ("w1", (n, f, d)),
        ("w2", (n, d, f)),
        ("w3", (n, f, d)),
        ("final_norm", (d,)),
        ("rope_cos", (h["context"], head // 2)),  # recomputed by every reader, stored all the same
        ("rope_sin", (h["context"], head // 2)),
    ]
    return rows if shared else [*rows, ("head", (v, d))]


def load_llama2c(path: Path) -> LlamaForCausalLM:
    """The model as transformers' Llama: fp32, eval, requires_grad False."""
    h, t = read_llama2c(path)
    config = LlamaConfig(
        vocab_size=h["vocab"],
        hidden_size=h["dim"],
        intermediate_size=h["hidden"],
        num_hidden_layers=h["layers"],
        num_attention_heads=h["heads"],
        num_key_value_heads=h["kv_heads"],
        max_position_embeddings=h["context"],
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings="head" not in t,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    state = {"model.embed_tokens.weight": t["embed"], "model.norm.weight": t["final_norm"]}
    state["lm_head.weight"] = t.get("head", t["embed"])
    for i in range(h["layers"]):
        block = f"model.layers.{i}."
        state[block + "input_layernorm.weight"] = t["attn_norm"][i]
        state[block + "post_attention_layernorm.weight"] = t["mlp_norm"][i]
        state[block + "self_attn.q_proj.weight"] = _halves(t["wq"][i], h["heads"])
        state[block + "self_attn.k_proj.weight"] = _halves(t["wk"][i], h["kv_heads"])
        state[block + "self_attn.v_proj.weight"] = t["wv"][i]
        state[block + "self_attn.o_proj.weight"] = t["wo"][i]
        state[block + "mlp.gate_proj.weight"] = t["w1"][i]
        state[block + "mlp.down_proj.weight"] = t["w2"][i]
        state[block + "mlp.up_proj.weight"] = t["w3"][i]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...), the rotary layout here."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def load_llama2c_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as a fast tokenizer: scores become merge ranks, unknown text falls back to bytes."""
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + size].decode("utf-8"))
        scores.append(score)
        at += 8 + size
    # The file has spaces where the vocabulary has U+2581, and writes the two control tokens with newlines.
    vocab = {_token(i, piece): i for i, piece in enumerate(pieces)}
    # The reader merges whichever neighbouring pair makes the best-scored token: rank each split of a token by it.
    merges = []
    for token, i in vocab.items():
        if i >= 259:
            splits = [(token[:k], token[k:]) for k in range(1, len(token))]
            merges += [(-scores[i], pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    merges.sort(key=lambda item: item[0])
    model = BPE(vocab, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _token(i: int, piece: str) -> str:
    return piece.strip("\n") if i < 3 else piece.replace(" ", "▁")
