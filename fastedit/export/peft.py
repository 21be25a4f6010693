"""An edit as a LoRA adapter: PEFT, vLLM and their kind serve it over the unchanged base model.

LoRA adds ``(alpha / r) B A`` to a weight (arXiv:2106.09685); with B = left, A = right and alpha = r that is the edit
itself, not an approximation. Files are written here, the `peft` package is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import find_module, is_transposed, unwrap
from fastedit.delta import Delta, Dense, LowRank, Rows
from fastedit.edit import Edit
from fastedit.edit_file import write_safetensors
from fastedit.export.folder import atomic_folder

__all__ = ["lora_factors", "to_peft"]

_PREFIX = "base_model.model."


def to_peft(
    edit: Edit,
    model: nn.Module | Any,
    directory: str | Path,
    *,
    rank: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `edit` as a LoRA adapter folder: adapter_model.safetensors (float32) and adapter_config.json.

    Low-rank and by-rows updates are exact to float32 rounding. A dense update needs `rank`.

    Args:
        edit: the edit.
        model: the base model, edited or not (only the modules' types are read); or its configuration.
        directory: the folder to make.
        rank: replace updates of a higher rank by their best approximation of this one (truncated SVD).
        overwrite: replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ValueError: no deltas, a dense update without `rank`, modules that the model does not have.
        FileExistsError: the folder is not empty.
    """
    if not edit.deltas:
        raise ValueError("edit: has no deltas, there is nothing to put into an adapter")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: must be a positive integer, got {rank!r}")
    base = unwrap(model) if isinstance(model, nn.Module) else _skeleton(model)
    transposed: dict[str, bool] = {}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in edit.modules:
        module: Any = find_module(base, name)
        transposed[name] = is_transposed(module)
        deltas = [delta for delta in edit.deltas if delta.name == name]
        weight = module.weight
        shape = (weight.shape[1], weight.shape[0]) if transposed[name] else tuple(weight.shape)
        if deltas[0].shape != shape:
            raise ValueError(
                f"module {name!r}: the delta is for an (out, in) = {deltas[0].shape} weight, the model's is {shape}"
            )
        left, right = lora_factors(deltas, rank=rank)
        ranks[name] = left.shape[1]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = right
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = left
    with atomic_folder(directory, overwrite=overwrite) as folder:
        write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        config = _adapter_config(base.config, ranks, any(transposed.values()))
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(directory)


def lora_factors(deltas: list[Delta], *, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(B [out, r], A [r, in]) in float32 on the CPU with B @ A = the sum of `deltas`, all of one module.

    r is at least 1 and at most min(out, in), and at most `rank` (then B @ A may be an approximation).
    """
    out, width = deltas[0].shape
    if rank is None and (dense := next((d for d in deltas if isinstance(d, Dense)), None)) is not None:
        raise ValueError(
            f"module {dense.name!r}: a dense update has no exact low-rank form; rank=... writes its best "
            f"approximation (rank={min(out, width)} is exact)"
        )
    limit = min(out, width) if rank is None else min(out, width, rank)
    if not any(isinstance(delta, Dense) for delta in deltas):
        pairs = [_exact(delta) for delta in deltas]
        left = torch.cat([pair[0] for pair in pairs], dim=1)
        right = torch.cat([pair[1] for pair in pairs])
        if left.shape[1] == 0:
            return torch.zeros(out, 1), torch.zeros(1, width)
        if left.shape[1] <= limit:
            return left.float().contiguous(), right.float().contiguous()
    total = sum((delta.dense().cpu() for delta in deltas), torch.zeros(out, width))
    if limit == min(out, width):
        # The identity is a factor of everything: exact, at the largest useful rank.
        if out <= width:
            return torch.eye(out), total.float().contiguous()
        return total.float().contiguous(), torch.eye(width)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    root = S[:limit].sqrt()
    return (U[:, :limit] * root).float().contiguous(), (root[:, None] * Vh[:limit]).float().contiguous()


def _exact(delta: Delta) -> tuple[Tensor, Tensor]:
    """Factors in float64, [out, r] and [r, in]."""
    if isinstance(delta, LowRank):
        return delta.left.cpu().double(), delta.right.cpu().double()
    if isinstance(delta, Rows):
        index, value = delta.index.cpu(), delta.value.cpu().double()
        chosen = torch.zeros(len(index), delta.size, dtype=torch.float64)
        chosen[torch.arange(len(index)), index] = 1.0
        return (chosen.T, value) if delta.axis == 0 else (value.T, chosen)
    raise ValueError(f"module {delta.name!r}: a {delta.kind} update has no exact low-rank form")


def _adapter_config(config: Any, ranks: dict[str, int], transposed: bool) -> dict[str, Any]:
    largest = max(ranks.values())
    # alpha equals the rank in every module, so the scaling is 1 with and without support for the patterns.
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": _task(config),
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _task(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    masked = any("MaskedLM" in name for name in getattr(config, "architectures", None) or ())
    return None if masked else "CAUSAL_LM"


def _skeleton(config: Any) -> nn.Module:
    """The model of a configuration without data, for the types and shapes of its modules."""
    if not hasattr(config, "model_type"):
        raise ValueError(f"model: must be a model or its configuration, got {type(config).__name__}")
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    auto: Any = {"SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM, "CAUSAL_LM": AutoModelForCausalLM}.get(
        _task(config) or "", AutoModelForMaskedLM
    )
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    return model
