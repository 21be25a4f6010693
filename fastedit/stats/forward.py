"""Forwards that end at the deepest key."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.forward import StopForward
from fastedit.stats.batches import Batch
from fastedit.stats.job import Job

__all__ = ["Taps"]


class Taps:
    """Runs forwards up to the deepest key and hands out the keys of every requested module."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.found: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.device: torch.device = job.arch.embed.weight.device  # type: ignore[assignment, union-attr]
        parameters = inspect.signature(job.forward.forward).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # Without this a decoder would keep keys and values of every layer for a continuation that never comes.
        self.options = {"use_cache": False} if "use_cache" in parameters or free else {}

    def __enter__(self) -> Taps:
        for name, module in self.job.modules.items():
            self.handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.found.clear()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keys = args[0] if args else next(iter(kwargs.values()))
            self.found[name] = keys.reshape(-1, keys.shape[-1])
            if name == self.job.deepest:
                raise StopForward

        return hook

    def keys(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Keys [B * S, f] by module, and the mask [B, S] of real tokens (None: all are)."""
        ids, mask = batch.tensors(self.job.pad_id, self.device)
        self.found = {}
        try:
            with torch.no_grad():
                self.job.forward(
                    input_ids=ids,
                    attention_mask=None if mask is None else mask.to(torch.int64),
                    **self.options,
                )
        except StopForward:
            pass
        missing = [name for name in self.job.modules if name not in self.found]
        if missing:
            raise ValueError(
                f"site: the forward of {type(self.job.forward).__name__} does not call {missing[0]!r}"
            )
        found, self.found = self.found, {}
        return found, mask
