"""The narrow waist: one file an op. Ops take tensors, never a model, a tokenizer or a config.

Each name below loads its file, which registers the op with torch, on first use. An op named like its file is imported
from there, `from fastedit.ops.edit_solve import edit_solve`: here that name is the module.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "CholeskyMetric": "edit_solve",
    "IdentityMetric": "edit_solve",
    "LowRankLayer": "lowrank_transform",
    "LowRankNet": "lowrank_transform",
    "ProjectorMetric": "edit_solve",
    "RowMoments": "row_moments",
    "cholesky_factor": "edit_solve",
    "delta_step_": "delta_step",
    "magnitude_mask_": "kth_magnitude",
    "mirror_": "second_moment",
    "rank_update_": "rank_update",
    "row_moments_": "row_moments",
    "second_moment_": "second_moment",
    "topk_keys": "nearest_key",
}

__all__ = [
    "CholeskyMetric",
    "IdentityMetric",
    "LowRankLayer",
    "LowRankNet",
    "ProjectorMetric",
    "RowMoments",
    "cholesky_factor",
    "delta_step_",
    "magnitude_mask_",
    "mirror_",
    "rank_update_",
    "row_moments_",
    "second_moment_",
    "topk_keys",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = import_module(f"fastedit.ops.{_LAZY[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'fastedit.ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
