"""The two small architectures, and the attention mask used in training only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

__all__ = ["ARCHS", "Arch", "BottleneckAttention", "ModelShape", "build_model"]

Arch = Literal["gpt2", "llama"]
ARCHS: tuple[Arch, ...] = ("gpt2", "llama")
_BLOCKED = -1e4


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a world model. `window` is the number of positions the exported model has."""

    depth: int = 7
    width: int = 128
    heads: int = 4
    inner: int = 512
    window: int = 128


def build_model(arch: Arch, shape: ModelShape, vocabulary: int, attention: str) -> PreTrainedModel:
    """A randomly initialised Hugging Face model (fp32), with `attention` as attention implementation."""
    common: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    if arch == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=shape.window,
                n_embd=shape.width,
                n_layer=shape.depth,
                n_head=shape.heads,
                n_inner=shape.inner,
                activation_function="gelu",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation=attention,
                **common,
            )
        )
    if arch == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=shape.width,
                # three matrices instead of two: the same number of weights as an `inner` of GPT-2
                intermediate_size=shape.inner * 2 // 3,
                num_hidden_layers=shape.depth,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                max_position_embeddings=shape.window,
                attn_implementation=attention,
                **common,
            )
        )
    raise ValueError(f"arch must be one of {ARCHS}, got {arch!r}")


class BottleneckAttention:
    """Plain attention with a mask per layer, which makes the model store facts at the last subject token.

    In a share `p` of the training rows the layers below `layer` hide the whole subject from all tokens after it, and
    let the tokens of the subject see nothing but the subject; from `layer` up only the last token of the subject can
    be seen. What the model knows about a subject then has to be in the residual stream at its last token by `layer`.

    In two-hop questions the gradient does not flow into keys and values of subject tokens: the answer cannot be
    stored at the subject as one more fact, it has to be composed in the upper layers.

    The exported model is a plain GPT-2 or Llama: nothing of this is left in it.
    """

    def __init__(self, layer: int, p: float, *, isolate: bool = True, stop_hops: bool = True) -> None:
        self.layer, self.p, self.isolate, self.stop_hops = layer, p, isolate, stop_hops
        self.name = f"fastedit_world_{id(self):x}"
        self._low = self._high = torch.zeros(0)
        self._hop_rows = self._subject = torch.zeros(0, dtype=torch.bool)
        self._active = False
        AttentionInterface.register(self.name, self._attend)

    def prepare(
        self, spans: Sequence[Sequence[tuple[int, int]]], hops: Tensor, width: int, rng: random.Random
    ) -> None:
        """Set the masks of the next batch: subject `spans` (first, last) per row, `hops` [B, width] bool = tokens of
        two-hop questions, whose subjects are always hidden."""
        causal = torch.full((width, width), _BLOCKED).triu(1)
        high = causal.repeat(len(spans), 1, 1, 1)
        low = high.clone()
        subject = torch.zeros(len(spans), 1, width, 1, dtype=torch.bool)
        for i, row in enumerate(spans):
            hidden = rng.random() < self.p
            for first, last in row:
                subject[i, 0, first : last + 1] = True
                if hidden or hops[i, first]:
                    high[i, 0, last + 1 :, first:last] = _BLOCKED
                    low[i, 0, last + 1 :, first : last + 1] = _BLOCKED
                    if self.isolate:
                        low[i, 0, first : last + 1, :first] = _BLOCKED
        self._low, self._high, self._subject = low, high, subject
        self._hop_rows = hops[:, None, :, None]
        self._active = True

    def release(self) -> None:
        """Back to plain causal attention (evaluation)."""
        self._active = False

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if not self._active:
            width = query.shape[-2]
            causal = torch.full((width, width), _BLOCKED).triu(1)
            return (torch.softmax(query @ key.mT + causal, -1) @ value).transpose(1, 2), None
        upper = int(module.layer_idx) >= self.layer  # type: ignore[arg-type]
        bias = self._high if upper else self._low
        out = torch.softmax(query @ key.mT + bias, -1) @ value
        if self.stop_hops and upper and torch.is_grad_enabled():
            key = torch.where(self._subject, key.detach(), key)
            value = torch.where(self._subject, value.detach(), value)
            stopped = torch.softmax(query @ key.mT + bias, -1) @ value
            out = torch.where(self._hop_rows, stopped, out)
        return out.transpose(1, 2), None
