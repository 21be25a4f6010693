"""A tiny T5 with a tokenizer that ends texts in EOS, as T5's does."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors

from fastedit.session import Session

__all__ = ["PREFIX", "VARIANTS", "session_of"]

VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
PREFIX = "<pad> the city"


def session_of(variant: str, dtype: torch.dtype = torch.float64, **options: Any) -> Session:
    """A session of a model with 4 encoder and 3 decoder layers."""
    settings = {"num_layers": 4, "num_decoder_layers": 3, "decoder_start_token_id": 1, **VARIANTS[variant]}
    model: Any = tiny_model("t5", dtype=dtype, **{**settings, **options})
    if variant == "v1.0":
        # Its head divides by the root of the width, so its embeddings are large.
        model.shared.weight.data *= 5
    made = tiny_tokenizer()
    end = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    made.backend_tokenizer.post_processor = processors.Sequence([made.backend_tokenizer.post_processor, end])
    return Session(model, made)
