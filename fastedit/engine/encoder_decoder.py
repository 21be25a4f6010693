"""Blocks of an encoder-decoder, called one by one on many rows of one length.

The blocks are the model's own; inside `Decoder.running` their two attentions are handed over (shadowed on the
instances, as `fastedit.engine.attention` does for GPT-J), so that

- a row may begin behind a prefix whose keys and values are given;
- rows may share an encoding, whose keys and values are then made once per layer;
- where every row has its own encoding E and few tokens look at it, keys and values of E are never made: with q the
  queries of a head, ``q (E Wk^T)^T = (q Wk) E^T`` and ``p (E Wv^T) = (p E) Wv^T``, so the two products are with a
  row's few tokens instead of with all tokens of its encoding. The same sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output, resolve

__all__ = ["Decoder", "Encoder", "Encodings", "decoder_start", "is_encoder_decoder", "source_side"]

KeysValues = tuple[Tensor, Tensor]


def is_encoder_decoder(arch: ResolvedArch) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(getattr(arch.model.config, "is_encoder_decoder", False))


def source_side(arch: ResolvedArch) -> ResolvedArch:
    """The side whose embeddings a prompt goes through: the encoder's, or the model's only one."""
    return resolve(arch.model, arch.row.model_type, side="encoder") if is_encoder_decoder(arch) else arch


def decoder_start(arch: ResolvedArch) -> int:
    """The token that a decoder's input begins with.

    Raises ValueError where the model's configuration names none.
    """
    model: Any = arch.model
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, "decoder_start_token_id", None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ValueError("model: config.decoder_start_token_id must name the decoder's first token, got None")


class Encoder:
    """The encoder's blocks for rows of ``length`` tokens without padding.

    Attributes:
        arch: the encoder's side of the model.
    """

    def __init__(self, arch: ResolvedArch, length: int) -> None:
        self.arch = source_side(arch)
        attention: Any = self.arch.attn(0)
        with torch.no_grad():
            self._bias: Tensor = attention.compute_bias(length, length).detach()

    def block(self, layer: int, hidden: Tensor) -> Tensor:
        """Output ``[n, T, d]`` of one block."""
        bias = self._bias.to(hidden.device)
        return block_output(self.arch.block(layer)(hidden, attention_mask=None, position_bias=bias))

    def states(self, hidden: Tensor) -> Tensor:
        """What the decoder reads, from the last block's output."""
        norm = self.arch.final_norm
        found: Tensor = hidden if norm is None else norm(hidden)
        return found


@dataclass
class Encodings:
    """What decoder rows look at: row i at encoding ``i % m``.

    Attributes:
        states: ``[m, T, d]``.
        keep: make keys and values once per layer and keep them: for encodings that are looked at again.
    """

    states: Tensor
    keep: bool = False
    _kept: dict[int, KeysValues] = field(default_factory=dict)

    def part(self, start: int, stop: int) -> Encodings:
        """Those from ``start`` to ``stop`` alone, views of these."""
        kept = {layer: (k[start:stop], v[start:stop]) for layer, (k, v) in self._kept.items()}
        return Encodings(self.states[start:stop], self.keep, kept)

    def keys_values(self, layer: int, module: Any) -> KeysValues:
        """``[m, H, T, D]`` each."""
        if layer in self._kept:
            return self._kept[layer]
        states = self.states.to(module.k.weight.device)
        found = _heads(module.k(states), module), _heads(module.v(states), module)
        if self.keep:
            self._kept[layer] = found
        return found


@dataclass
class _Call:
    """What the attentions of the block that runs look at."""

    first: int
    past: KeysValues | None
    encodings: Encodings
    seen: KeysValues | None = None


class Decoder:
    """The decoder's blocks for rows that attend to their own tokens, to a prefix and to an encoding."""

    def __init__(self, arch: ResolvedArch, length: int) -> None:
        """length: of the decoder's input."""
        self.arch = arch
        attention: Any = arch.attn(0)
        with torch.no_grad():
            bias = attention.compute_bias(length, length).detach()  # [1, H, D, D]
        later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        self._bias: Tensor = bias.masked_fill(later, float("-inf"))
        self._call: _Call | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of `block`."""
        made: list[tuple[Any, Any]] = []
        for layer in range(self.arch.depth):
            attn, cross = self.arch.attn(layer), self.arch.cross(layer)
            made += [(attn, self._own(attn)), (cross, self._cross(layer, cross))]
        # Sharded models carry a forward of their own on the instance: it comes back afterwards.
        before = [vars(module).get("forward") for module, _ in made]
        try:
            for module, forward in made:
                module.forward = forward
            yield
        finally:
            for (module, _), forward in zip(made, before, strict=True):
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward

    def block(
        self,
        layer: int,
        hidden: Tensor,
        encodings: Encodings,
        *,
        first: int = 0,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Output ``[n, w, d]`` of one block, and keys and values ``[n, H, first + w, D]`` of its own attention.

        Args:
            hidden: ``[n, w, d]`` at the positions from ``first`` on.
            past: keys and values ``[n or 1, H, first, D]`` of the positions before.
        """
        self._call = call = _Call(first, past, encodings)
        try:
            output = self.arch.block(layer)(hidden, encoder_hidden_states=encodings.states)
        finally:
            self._call = None
        if call.seen is None:
            raise RuntimeError(f"self-attention of decoder block {layer} was not called")
        return block_output(output), call.seen

    def _own(self, module: Any) -> Any:
        def forward(hidden_states: Tensor, *_args: Any, **_options: Any) -> tuple[Any, ...]:
            call = self._calling()
            q, k, v = (_heads(linear(hidden_states), module) for linear in (module.q, module.k, module.v))
            if call.past is not None and call.first:
                old_k, old_v = (old.to(k.device).expand(len(q), -1, -1, -1) for old in call.past)
                k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
            call.seen = k, v
            stop = call.first + q.shape[2]
            bias = self._bias[:, :, call.first : stop, :stop].to(q)
            found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            return module.o(_joined(found)), None, None

        return forward

    def _cross(self, layer: int, module: Any) -> Any:
        def forward(hidden_states: Tensor, *_args: Any, **_options: Any) -> tuple[Any, ...]:
            encodings = self._calling().encodings
            m, (n, w, _) = len(encodings.states), hidden_states.shape
            # Rows of one encoding side by side: they are one row of queries to it.
            rows = hidden_states.reshape(n // m, m, w, -1).transpose(0, 1).reshape(m, n // m * w, -1)
            q = _heads(module.q(rows), module)
            if _cheaper_absorbed(module, q, encodings):
                found = _absorbed(module, q, encodings.states.to(q.device))
            else:
                k, v = encodings.keys_values(layer, module)
                found = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
            out = module.o(_joined(found))
            return out.reshape(m, n // m, w, -1).transpose(0, 1).reshape(n, w, -1), None, None

        return forward

    def _calling(self) -> _Call:
        if self._call is None:
            raise RuntimeError("decoder attention ran outside of Decoder.block")
        return self._call


def _cheaper_absorbed(module: Any, q: Tensor, encodings: Encodings) -> bool:
    """Whether products with the queries are fewer than those with all tokens of the encodings."""
    plain = all(type(linear) is nn.Linear and linear.bias is None for linear in (module.k, module.v))
    # In half precision the reordered products would be rounded at other places than the model's.
    if encodings.keep or not plain or q.dtype not in (torch.float32, torch.float64):
        return False
    _, H, Q, D = q.shape
    T, d = encodings.states.shape[1:]
    return Q * H * d * (D + T) < H * D * T * (d + Q)


def _absorbed(module: Any, q: Tensor, states: Tensor) -> Tensor:
    """Attention ``[m, H, Q, D]`` of ``q [m, H, Q, D]`` to ``states [m, T, d]`` without keys and values."""
    m, H, Q, D = q.shape
    d = states.shape[2]
    keys, values = (linear.weight.view(H, D, d) for linear in (module.k, module.v))
    wide = torch.bmm(q.transpose(0, 1).reshape(H, m * Q, D), keys).view(H, m, Q, d)
    scores = wide.transpose(0, 1).reshape(m, H * Q, d) @ states.transpose(1, 2)
    read = (torch.softmax(scores, dim=-1) @ states).view(m, H, Q, d)
    found = torch.bmm(read.transpose(0, 1).reshape(H, m * Q, d), values.transpose(1, 2))
    return found.view(H, m, Q, D).transpose(0, 1)


def _heads(value: Tensor, module: Any) -> Tensor:
    """``[n, w, H D]`` to ``[n, H, w, D]``."""
    return value.view(*value.shape[:2], -1, module.key_value_proj_dim).transpose(1, 2)


def _joined(value: Tensor) -> Tensor:
    """``[n, H, w, D]`` to ``[n, w, H D]``."""
    return value.transpose(1, 2).reshape(len(value), value.shape[2], -1)
