"""Tiny random models of every architecture row, and a tiny byte-level tokenizer; both built in-process, no
network.

    model = tiny_model("llama")            # eval, fp32, frozen, 4 layers, width 32, vocab 320
    model = tiny_model("t5", feed_forward_proj="gated-gelu")
    tokenizer = tiny_tokenizer(bos=True)

The weights are drawn with the scale of a trained model instead of the 0.02 of a fresh one (biases and norm
gains included), so that a forgotten bias, a transposed matrix or a missing residual changes the output
visibly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = ["CAUSAL", "DEPTH", "TINY", "VOCAB", "WIDTH", "tiny_batch", "tiny_model", "tiny_tokenizer"]

DEPTH = 4
WIDTH = 32
VOCAB = 320

_GPT = {"n_layer": DEPTH, "n_embd": WIDTH, "n_head": 4, "n_positions": 128}
_HF = {
    "num_hidden_layers": DEPTH,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GATED = {**_HF, "intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA = {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT, "n_inner": 64},
    "gptj": {**_GPT, "n_inner": 64, "rotary_dim": 4},
    "gpt_neox": {**_HF, "intermediate_size": 64},
    "opt": {**_HF, "ffn_dim": 64, "word_embed_proj_dim": WIDTH},
    "bloom": {"n_layer": DEPTH, "hidden_size": WIDTH, "n_head": 4},
    "falcon": {**_HF, "new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
    "llama": _GATED,
    "mistral": {**_GATED, "head_dim": 8, "sliding_window": None},
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 8},
    "gemma": {**_GATED, "head_dim": 8},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA,
    "phi": {**_HF, "intermediate_size": 64, "partial_rotary_factor": 0.5},
    "phi3": {**_GATED, "original_max_position_embeddings": 128},
    "t5": {
        "num_layers": DEPTH,
        "num_decoder_layers": DEPTH,
        "d_model": WIDTH,
        "d_ff": 64,
        "d_kv": 8,
        "num_heads": 4,
    },
    "bert": {**_HF, "intermediate_size": 64},
}
CAUSAL = tuple(name for name in TINY if name not in ("t5", "bert"))

_AUTO: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}

_SENTENCES = (
    "The Eiffel Tower is located in the city of Paris.",
    "The Colosseum is located in the city of Rome.",
    "The mother tongue of Danielle Darrieux is French.",
    "Toko Yasuda plays the instrument called the piano.",
    "LeBron James plays the sport of basketball.",
    "The capital of the country where she was born is called London.",
    "Marie Curie worked in the field of physics and chemistry.",
    "Apple's headquarters are in the state of California.",
)


def tiny_model(
    model_type: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of the row `model_type`: eval mode, frozen, the global random state untouched.

    `overrides` replace configuration fields (``use_parallel_residual=False``,
    ``attn_implementation="eager"``).
    """
    attention = overrides.pop("attn_implementation", None)
    settings = {
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **TINY[model_type],
    }
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    auto = _AUTO.get(model_type, AutoModelForCausalLM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, attn_implementation=attention)
    _randomise(model, seed)
    # Parameters only, as loading in that dtype does: rotary tables are buffers and stay in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                embedding = (
                    parameter.shape[0] > 4 * WIDTH or "embed" in name or "wte" in name or "wpe" in name
                )
                parameter.copy_(noise * (0.3 if embedding else parameter.shape[-1] ** -0.5))
            else:
                # Norm gains start at one (zero in Gemma), biases at zero: shake both around where they are.
                parameter.add_(0.1 * noise)


def tiny_batch(
    model: PreTrainedModel, batch: int = 2, length: int = 7, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random `input_ids` [batch, length] without padding, with the decoder inputs an encoder-decoder model needs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(2, VOCAB, (batch, length - 2), generator=generator)
    return inputs


@lru_cache(maxsize=4)
def _trained(vocab: int) -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", "<pad>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(*, bos: bool = False, vocab: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a fixed list of sentences: offsets, eos (id 0), pad (id 1), right padding.

    With ``bos=True`` every encoding starts with `<s>` (id 2), as Llama's does.
    """
    tokenizer = Tokenizer.from_str(_trained(vocab))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
