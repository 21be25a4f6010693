"""Find the parts of a Hugging Face model: one frozen row per `model_type`, resolved loudly and at once.

    arch = resolve(model)                      # every path of every layer is looked up here, or this raises
    arch.mlp_out(5), arch.name("mlp_out", 5)   # a module, and its dotted name "model.layers.5.mlp.down_proj"

A key of layer i is the INPUT of ``arch.mlp_out(i)``. Orientation is a property of the module's type
(`is_transposed`), never of a shape or a name. Wrappers (PEFT, torch.compile, DistributedDataParallel) are
seen through; names are always those of the wrapped model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastedit.arch_table import ARCHITECTURES, ENCODERS, Architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ResolvedArch",
    "Site",
    "block_output",
    "editable_weight",
    "find_module",
    "is_transposed",
    "position_limit",
    "replace_block_output",
    "resolve",
    "row_of",
    "unwrap",
]

Site = Literal["block", "mlp", "mlp_in", "mlp_gate", "mlp_out", "attn", "attn_out", "cross"]

_SITES: tuple[str, ...] = get_args(Site)
_EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Attributes by which mixture-of-experts configurations announce their experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_WRAPPED = ("text_config", "vision_config", "audio_config", "llm_config", "thinker_config")


@dataclass(frozen=True, eq=False)
class ResolvedArch:
    """The modules of one model, found through one row. Made by `resolve`.

    Attributes:
        row: the row with what this model's config switches (`parallel`, gates, ...).
        model: the model without its wrappers; `name` is relative to it.
        depth, width: number of blocks, size of the residual stream.
        embed, final_norm, head, before_head: modules; `final_norm` may be None.
        softcap: logits are ``softcap * tanh(logits / softcap)``, or None.
    """

    row: Architecture
    model: nn.Module
    depth: int
    width: int
    embed: nn.Module
    final_norm: nn.Module | None
    head: nn.Module
    before_head: tuple[nn.Module, ...]
    softcap: float | None
    modules: Mapping[str, tuple[nn.Module, ...]]
    names: Mapping[str, tuple[str, ...]]

    def check_layer(self, i: int) -> int:
        """Return `i`, or raise ValueError naming the range of layers."""
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.depth:
            raise ValueError(f"layer: must be an integer from 0 to {self.depth - 1}, got {i!r}")
        return i

    def name(self, site: Site, i: int) -> str:
        """Dotted module name of a site in layer `i`, as `model.get_submodule` takes it."""
        if site not in _SITES:
            raise ValueError(f"site: must be one of {', '.join(_SITES)}, got {site!r}")
        if site not in self.names:
            raise ValueError(f"site: {self.row.model_type!r} has no {site!r}")
        return self.names[site][self.check_layer(i)]

    def block(self, i: int) -> nn.Module:
        """Transformer block `i`; read its output with `block_output`."""
        return self.modules["block"][self.check_layer(i)]

    def mlp(self, i: int) -> nn.Module:
        """The MLP of layer `i` (its last linear where the family has no MLP module)."""
        return self.modules["mlp"][self.check_layer(i)]

    def mlp_in(self, i: int) -> nn.Module:
        """First linear of the MLP (the up projection of gated MLPs)."""
        return self.modules["mlp_in"][self.check_layer(i)]

    def mlp_gate(self, i: int) -> nn.Module | None:
        """Gate projection, or None (not gated, or fused: see `Architecture.fused_gate`)."""
        self.check_layer(i)
        return self.modules["mlp_gate"][i] if "mlp_gate" in self.modules else None

    def mlp_out(self, i: int) -> nn.Module:
        """Last linear of the MLP: its input is the key, its output what the MLP adds (before any post-norm)."""
        return self.modules["mlp_out"][self.check_layer(i)]

    def attn(self, i: int) -> nn.Module:
        """Self-attention of layer `i`."""
        return self.modules["attn"][self.check_layer(i)]

    def attn_out(self, i: int) -> nn.Module:
        """Output projection of the self-attention of layer `i`."""
        return self.modules["attn_out"][self.check_layer(i)]

    def cross(self, i: int) -> nn.Module:
        """Attention to the encoder of layer `i` of a decoder; ValueError where there is none."""
        if "cross" not in self.modules:
            raise ValueError(f"site: {self.row.model_type!r} has no 'cross'")
        return self.modules["cross"][self.check_layer(i)]

    def key_dim(self, i: int) -> int:
        """Number of input features of ``mlp_out(i)``."""
        return _in_features(self.mlp_out(i), self.name("mlp_out", i))

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads, from the output of the last block [..., width]: norm, `before_head`, scale."""
        if self.row.side == "encoder" and getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError("side: the encoder of an encoder-decoder model has no head, got side='encoder'")
        for module in (self.final_norm, *self.before_head):
            hidden = hidden if module is None else module(hidden)
        return hidden if self.row.head_scale == 1.0 else hidden * self.row.head_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] from the output of the last block [..., width], as the model computes them."""
        logits: Tensor = self.head(self.head_input(hidden))
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def resolve(
    model: nn.Module, arch: Architecture | str | None = None, *, side: str | None = None
) -> ResolvedArch:
    """Find every module of every layer of `model`.

    Args:
        model: a Hugging Face model with its head (``...ForCausalLM``, ...), wrapped or not.
        arch: an `Architecture`, or the `model_type` of a row to use for this model; None looks
            `model.config.model_type` up.
        side: "encoder" or "decoder" of an encoder-decoder model; None takes the row's side.

    Raises:
        ValueError: no row and none given, a path that the model does not have, a layer count that differs
            from the config's, or a side that the row does not have.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ValueError(f"model: must be a Hugging Face model with a config, got {type(model).__name__}")
    row = row_of(config, arch)
    if side is not None and side != row.side:
        if side not in ("encoder", "decoder"):
            raise ValueError(f"side: must be 'encoder' or 'decoder', got {side!r}")
        if side != "encoder" or row.model_type not in ENCODERS:
            raise ValueError(f"side: {row.model_type!r} has only the {row.side} side, got {side!r}")
        row = ENCODERS[row.model_type]
    if row.adapt is not None:
        row = row.adapt(row, config)

    depth = _config_int(config, row.depth, row)
    names: dict[str, tuple[str, ...]] = {"block": tuple(row.block.format(i) for i in range(depth))}
    modules: dict[str, tuple[nn.Module, ...]] = {}
    find = _finder(model, row)
    modules["block"] = tuple(find(name)[1] for name in names["block"])
    _check_depth(model, row, depth)
    for site in _SITES[1:]:
        relative: str | None = getattr(row, site)
        if relative is not None:
            found = [find("|".join(f"{b}.{p}" for p in relative.split("|"))) for b in names["block"]]
            names[site] = tuple(name for name, _ in found)
            modules[site] = tuple(module for _, module in found)
    resolved = ResolvedArch(
        row=row,
        model=model,
        depth=depth,
        width=_config_int(config, row.width, row),
        embed=find(row.embed)[1],
        final_norm=None if row.final_norm is None else find(row.final_norm)[1],
        head=find(row.head)[1],
        before_head=tuple(find(path)[1] for path in row.before_head),
        softcap=_softcap(config, row),
        modules=modules,
        names=names,
    )
    for i in range(depth):
        resolved.key_dim(i)
    return resolved


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT, torch.compile and DistributedDataParallel wrappers; `model` itself if there are none."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and callable(get_base := getattr(model, "get_base_model", None)):
            model = get_base()
        else:
            return model


def position_limit(arch: ResolvedArch) -> int | None:
    """Tokens that a row may have: the positions that the model's configuration names; None if it names none."""
    config: Any = getattr(arch.model, "config", None)
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    for name in ("n_positions", "max_position_embeddings"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module called `name` in the unwrapped model; of an adapted layer, the layer below the adapter.

    Raises:
        ValueError: there is none.
    """
    model = unwrap(model)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"module {name!r}: not found in {type(model).__name__}") from None
    get_base = getattr(module, "get_base_layer", None)
    return get_base() if callable(get_base) else module


def is_transposed(module: nn.Module) -> bool:
    """True if the weight is stored (in, out), as `transformers`' Conv1D does; False for Linear's (out, in).

    Raises:
        NotImplementedError: another type of module, whose orientation is not known.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise NotImplementedError(f"module: must be a Linear or a Conv1D, got {type(module).__name__}")


def editable_weight(model: nn.Module, name: str) -> tuple[nn.Parameter, bool]:
    """The weight parameter of module `name`, and whether it is stored transposed.

    Raises:
        ValueError: no such module.
        NotImplementedError: the weight cannot be changed in place (quantised, packed, sharded, offloaded).
    """
    module = find_module(model, name)
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter:
        what = "no weight" if weight is None else f"a weight of type {type(weight).__name__}"
        raise NotImplementedError(
            f"module {name!r}: {kind} has {what}; quantised, packed or sharded weights cannot be edited, "
            f"load the model in float32, bfloat16 or float16"
        )
    transposed = is_transposed(module)
    if weight.dtype not in _EDITABLE:
        raise NotImplementedError(
            f"module {name!r}: {kind} holds {str(weight.dtype).removeprefix('torch.')} weights; quantised "
            f"weights cannot be edited, load the model in float32, bfloat16 or float16"
        )
    if weight.is_meta:
        raise NotImplementedError(
            f"module {name!r}: the weight is offloaded (meta device); keep edited layers on a device"
        )
    return weight, transposed


def block_output(out: Any) -> Tensor:
    """The hidden states in what a block (or an attention or MLP module) returned: a tensor, or a tuple's first."""
    if isinstance(out, tuple | list) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise ValueError(f"out: must be a tensor or a tuple starting with one, got {type(out).__name__}")
    return out


def replace_block_output(out: Any, tensor: Tensor) -> Any:
    """`out` with its hidden states replaced by `tensor`; everything else a block returned is kept."""
    block_output(out)
    if isinstance(out, Tensor):
        return tensor
    return type(out)([tensor, *out[1:]])


def row_of(config: Any, arch: Architecture | str | None = None) -> Architecture:
    """The row for a Hugging Face configuration; no weights are needed.

    Raises:
        ValueError: no row, with the reason (mixture-of-experts, multi-modal, unknown) and the known ones.
    """
    if isinstance(arch, Architecture):
        return arch
    key = config.model_type if arch is None else arch
    if key in ARCHITECTURES:
        return ARCHITECTURES[key]
    known = ", ".join(sorted(ARCHITECTURES))
    if arch is not None:
        raise ValueError(f"arch: must be an Architecture or one of {known}, got {arch!r}")
    raise ValueError(
        f"model_type={key!r}: {_why_unknown(config)}; known: {known}; "
        f"pass arch=Architecture(...) with the paths of this model, or arch='<row>' if it is built like a known one"
    )


def _why_unknown(config: Any) -> str:
    for field in _WRAPPED:
        if getattr(config, field, None) is not None:
            return f"a multi-modal wrapper (config.{field}), edit its language model instead"
    for part in (config, getattr(config, "ffn_config", None)):
        for field in _EXPERTS:
            if getattr(part, field, None):
                count = getattr(part, field)
                return (
                    f"mixture-of-experts (config.{field}={count}) has one matrix per expert and no single key"
                )
    return "no architecture row"


def _config_int(config: Any, attribute: str, row: Architecture) -> int:
    value = getattr(config, attribute, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"config.{attribute}: must be a positive integer for {row.model_type!r}, got {value!r}"
        )
    return value


def _softcap(config: Any, row: Architecture) -> float | None:
    value = None if row.softcap is None else getattr(config, row.softcap, None)
    return None if value is None else float(value)


def _finder(model: nn.Module, row: Architecture) -> Callable[[str], tuple[str, nn.Module]]:
    def find(path: str) -> tuple[str, nn.Module]:
        for name in path.split("|"):
            try:
                return name, find_module(model, name)
            except ValueError:
                continue
        raise ValueError(
            f"model: {type(model).__name__} has no module {path!r}, which the row {row.model_type!r} names; "
            f"pass the model with its head, or arch=Architecture(...)"
        )

    return find


def _check_depth(model: nn.Module, row: Architecture, depth: int) -> None:
    stack, brace, rest = row.block.partition(".{}")
    if not brace or rest:
        return
    found = sum(1 for _ in _children(model, stack))
    if found != depth:
        raise ValueError(f"model: has {found} blocks at {stack!r}, but config.{row.depth} is {depth}")


def _children(model: nn.Module, name: str) -> Iterator[nn.Module]:
    return find_module(model, name).children()


def _in_features(module: nn.Module, name: str) -> int:
    # Quantised linears keep `in_features`; Conv1D calls it `nx`.
    for attribute in ("in_features", "nx", "infeatures"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    raise ValueError(f"module {name!r}: {type(module).__name__} does not say how many input features it has")
