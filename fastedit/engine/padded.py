"""The blocks above an injection, on the tokens from the lookup token on, against frozen keys and values.

A vector added at token t of layer l moves nothing before t: the keys and values of earlier tokens are those of the
clean forward, in every layer. So one clean forward is captured with its cache, and the blocks above run on the few
tokens from t on (subject end, rest of the prompt, target), which attend to the frozen prefix and to each other. The
blocks are the model's own, called as it calls them: their masks, positions, rotary tables and ALiBi slopes are those
of the captured call, read at the positions of the suffix.

Exact: the same products in another order, so fp32 results agree to rounding. What cannot be called this way (attention
kernels that take no mask, lookup tokens counted from the end of a padded row) runs on whole rows, see ``Replay``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.packed import named_arguments
from fastedit.engine.replay import StopForward

__all__ = ["Frozen", "SuffixReplay", "whole_rows_because"]

_MASK_TAKING = ("eager", "sdpa")  # attention implementations that accept an additive [B, 1, S', P + S'] mask


def whole_rows_because(model: nn.Module, lookup: list[int]) -> str | None:
    """Why suffixes cannot be used for these rows, or ``None`` if they can."""
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind not in _MASK_TAKING:
        return f"attention implementation {kind!r} takes no explicit mask"
    if any(index < 0 for index in lookup):
        return "a lookup token is counted from the end of the padded row"
    return None


class Frozen:
    """What a block sees as its cache: the prefix of the clean forward, the same at every call."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys = keys
        self._values = values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to: the frozen prefix, then the block's own."""
        return torch.cat([self._keys, keys], dim=-2), torch.cat([self._values, values], dim=-2)

    def get_seq_length(self, *_: Any) -> int:
        """Length of the prefix."""
        return self._keys.shape[-2]


class SuffixReplay:
    """A captured forward whose blocks ``start..depth-1`` run again on suffixes.

    Attributes:
        hidden: ``[B, S', d]`` input of block ``start`` at the suffix of each row; position 0 is the lookup token.
        final: ``[B, S', d]`` output of the last block there.
        mask: ``[B, S']`` 1 on suffix tokens, 0 on padding.
        tokens: number of suffix tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: ResolvedArch,
        ids: Tensor,
        mask: Tensor,
        *,
        start: int,
        lookup: list[int],
    ) -> None:
        device = arch.embed.weight.device  # type: ignore[union-attr]
        ids, mask = ids.to(device), mask.to(device)  # type: ignore[arg-type]
        self.arch, self.start = arch, start
        calls, cache, hidden, final = _capture(model, arch, ids, mask, start)
        width = ids.shape[1]
        at = torch.tensor(lookup, device=hidden.device)
        lengths = mask.to(hidden.device).sum(1) - at
        offsets = torch.arange(int(lengths.max()), device=hidden.device)
        # Padding repeats the row's last position: masked as a key, never read as a result.
        where = (at[:, None] + offsets).clamp(max=width - 1)
        self.mask = (offsets < lengths[:, None]).to(mask.dtype)
        rows = torch.arange(len(lookup), device=hidden.device)[:, None]
        self.hidden, self.final = hidden[rows, where], final[rows, where]
        self._place = _Place(rows, where, at, int(at.max()), width, self.mask)
        self._calls = [
            self._place.call(arch.block(start + i), call, cache.layers[start + i])
            for i, call in enumerate(calls)
        ]

    @property
    def tokens(self) -> int:
        """Suffix tokens of all rows, without padding."""
        return int(self.mask.sum())

    def run(self, hidden: Tensor, *, start: int | None = None, stop: int | None = None) -> Tensor:
        """Output ``[B, S', d]`` of block ``stop - 1`` when block ``start`` is given ``hidden``."""
        first = self.start if start is None else start
        last = self.start + len(self._calls) if stop is None else stop
        for index in range(first, last):
            name, call = self._calls[index - self.start]
            hidden = block_output(self.arch.block(index)(**{**call, name: hidden}))
        return hidden


def _capture(
    model: nn.Module, arch: ResolvedArch, ids: Tensor, mask: Tensor, start: int
) -> tuple[list[dict[str, Any]], DynamicCache, Tensor, Tensor]:
    """One clean forward with a cache; the named arguments of every block from ``start`` on."""
    calls: list[dict[str, Any]] = []
    first: list[Tensor] = []
    last: list[Tensor] = []

    def remember(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = named_arguments(block, args, kwargs)
        if not first:
            first.append(next(iter(named.values())).detach())
        calls.append(named)

    def end(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        last.append(block_output(output).detach())
        raise StopForward

    handles = [
        arch.block(i).register_forward_pre_hook(remember, with_kwargs=True) for i in range(start, arch.depth)
    ]
    handles.append(arch.block(arch.depth - 1).register_forward_hook(end))
    # No configuration: a sliding-window layer would otherwise drop keys that a suffix still needs.
    cache = DynamicCache()
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls, cache, first[0], last[0]


class _Place:
    """Where the suffixes sit in their rows, and how the arguments of a call look from there."""

    def __init__(
        self, rows: Tensor, where: Tensor, lookup: Tensor, prefix: int, width: int, mask: Tensor
    ) -> None:
        self.rows, self.where, self.prefix, self.width = rows, where, prefix, width
        columns = torch.arange(prefix, device=where.device)
        before = columns < lookup[:, None]  # [B, P]
        steps = torch.arange(where.shape[1], device=where.device)
        own = (steps[None, :] <= steps[:, None])[None] & mask[:, None].bool()  # [B, S', S']
        self.allowed = torch.cat([before[:, None].expand(-1, len(steps), -1), own], dim=2)  # [B, S', P + S']
        # Columns of the captured row that the P + S' attended positions are.
        self.columns = torch.cat([columns.expand(len(rows), -1), where], dim=1)  # [B, P + S']

    def call(self, block: nn.Module, named: dict[str, Any], layer: Any) -> tuple[str, dict[str, Any]]:
        """The name of the hidden states, and the other arguments for the suffix."""
        hidden_name = next(iter(named))
        dtype = named[hidden_name].dtype
        out: dict[str, Any] = {}
        for name, value in list(named.items())[1:]:
            if isinstance(value, DynamicCache):
                keys, values = layer.keys[..., : self.prefix, :], layer.values[..., : self.prefix, :]
                out[name] = Frozen(keys, values)
            elif name == "attention_mask":
                out[name] = self._attention_mask(value, dtype)
            elif name == "alibi" and isinstance(value, Tensor):
                out[name] = self._alibi(value)
            elif name == "use_cache":
                out[name] = False
            else:
                out[name] = self._at_suffix(value)
        return hidden_name, out

    def _attention_mask(self, captured: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Additive mask; what the captured one hides (padding, a sliding window) or adds (ALiBi) it keeps."""
        hidden, lowest = ~self.allowed[:, None], torch.finfo(dtype).min
        if captured is None:
            return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, lowest)
        # One mask for all rows or one a row, one for all heads or one a head.
        rows = captured.expand(len(self.rows), -1, -1, -1).transpose(1, 2)  # [B, S, H, S]
        rows = rows[self.rows, self.where].transpose(1, 2)  # [B, H, S', S]
        columns = self.columns[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
        seen = rows.gather(3, columns)  # [B, H, S', P + S']
        if seen.dtype == torch.bool:
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                hidden | ~seen, lowest
            )
        return seen.to(dtype).masked_fill(hidden | (seen <= torch.finfo(seen.dtype).min / 2), lowest)

    def _alibi(self, captured: Tensor) -> Tensor:
        """Slope times position of every attended key: ``[B * heads, 1, S]`` becomes ``[B * heads, 1, P + S']``."""
        batch = len(self.rows)
        heads = captured.view(batch, -1, captured.shape[-1])
        return heads.gather(2, self.columns[:, None].expand(-1, heads.shape[1], -1)).view(
            captured.shape[0], 1, -1
        )

    def _at_suffix(self, value: Any) -> Any:
        """Positions and rotary tables ``[1 or B, S, ...]`` at the suffix; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(self._at_suffix(item) for item in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == self.width:
            return value.expand(len(self.rows), *value.shape[1:])[self.rows, self.where]
        return value
