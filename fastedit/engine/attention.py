"""Hand the attention of a model's own blocks over to a function of packed queries, keys and values.

Tokens of many rows run through a block as one row ``[1, N, d]``: norms, projections and MLPs act on each token alone.
Attention does not, so inside this context every block calls the given function with its packed queries, keys and
values (rotary embedding and norms applied) instead of its own kernel. The blocks stay the model's own.

Most families look their kernel up in transformers' ``AttentionInterface``; a name is added there for the time of the
context. GPT-J calls a method of its own, which is shadowed on the instance. Families that compute attention in line
(BLOOM, Falcon, remote code) cannot be handed over: `not_handed_over` says so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from fastedit.arch import ResolvedArch
from fastedit.tokens import Encoded

__all__ = ["Attend", "attending", "not_handed_over", "padded_because"]


class Attend(Protocol):
    """Attention of one layer over packed tokens."""

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """``q [N, H, D]``, ``k, v [N, G, D]`` of ``layer`` to ``[N, H, D]``."""
        ...


# Kernels of one function: softmax(mask(cap(scale q k^T))) v.
_KERNELS = (
    *("eager", "sdpa", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)

# What an attention call may carry beside the tensors without changing which key a query sees.
_HARMLESS = (
    *("dropout", "scaling", "softcap", "sliding_window", "position_ids", "cache_position", "use_cache"),
    *("output_attentions", "position_embeddings", "is_causal", "past_key_values", "head_mask"),
)


def not_handed_over(arch: ResolvedArch) -> str | None:
    """Why the attention of this model cannot be handed over, or ``None`` if it can."""
    if "position_ids" not in inspect.signature(arch.model.forward).parameters:
        return f"{type(arch.model).__name__} takes no position_ids"
    for config in _configs(arch):
        # Another kernel of the same function may be replaced; a function of the user's own may not.
        name = config._attn_implementation_internal or "eager"
        own = ALL_ATTENTION_FUNCTIONS.get(name, eager_attention_forward)
        if name not in _KERNELS or not own.__module__.startswith("transformers."):
            return f"the model's attention implementation {name!r} is not one of {', '.join(_KERNELS)}"
    for layer in range(arch.depth):
        module = arch.attn(layer)
        if _own_method(module):
            continue
        scope = vars(sys.modules[type(module).__module__])
        if scope.get("ALL_ATTENTION_FUNCTIONS") is not ALL_ATTENTION_FUNCTIONS or not hasattr(
            module, "config"
        ):
            return f"{type(module).__name__} computes attention in line"
    return None


def padded_because(arch: ResolvedArch, rows: Sequence[Encoded]) -> str | None:
    """Why these rows cannot run as packed tokens, or ``None`` if they can."""
    if any(row.lookup < 0 for row in rows):
        return "a lookup token is counted from the end of the padded row"
    return not_handed_over(arch)


def _configs(arch: ResolvedArch) -> list[Any]:
    found = {
        id(c): c
        for m in arch.model.modules()
        if isinstance(c := getattr(m, "config", None), PretrainedConfig)
    }
    return list(found.values())


def _own_method(module: nn.Module) -> bool:
    return type(module).__name__ == "GPTJAttention" and hasattr(module, "_attn")


@contextmanager
def attending(arch: ResolvedArch, attend: Attend) -> Iterator[None]:
    """Inside, the blocks of ``arch`` call ``attend``; outside, everything is as it was.

    Calls are for one packed row, without a mask and without a cache. The model's ``_attn_implementation`` is another
    inside, so its forward builds no masks. Not for two threads at once on one model.
    """
    layers = {module: i for i in range(arch.depth) for module in arch.block(i).modules()}

    def interface(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        for name, option in options.items():
            if option is not None and name not in _HARMLESS:
                raise NotImplementedError(
                    f"{type(module).__name__}: attention with {name} cannot run on packed tokens"
                )
        scale = options.get("scaling")
        out = attend(
            layers[module],
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            softcap=options.get("softcap"),
            window=options.get("sliding_window"),
        )
        return out[None], None

    def method(module: nn.Module) -> Any:
        def call(query: Tensor, key: Tensor, value: Tensor, _mask: Any = None) -> tuple[Tensor, None]:
            out, _ = interface(module, query, key, value, None, scaling=1.0 / float(module.scale_attn))  # type: ignore[arg-type]
            return out.transpose(1, 2), None

        return call

    own = [module for module in map(arch.attn, range(arch.depth)) if _own_method(module)]
    configs = _configs(arch)
    before = [config._attn_implementation_internal for config in configs]
    # A name per context, so that contexts on two models do not meet.
    name = f"fastedit_{id(layers):x}"
    ALL_ATTENTION_FUNCTIONS[name] = interface
    methods = [vars(module).get("_attn") for module in own]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        for module in own:
            module._attn = method(module)  # type: ignore[assignment]
        yield
    finally:
        for module, outer in zip(own, methods, strict=True):
            vars(module).pop("_attn", None)
            if outer is not None:
                module._attn = outer
        for config, outer_name in zip(configs, before, strict=True):
            config._attn_implementation_internal = outer_name
        del ALL_ATTENTION_FUNCTIONS[name]
