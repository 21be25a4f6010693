"""Activations in one kernel where a family writes them as a chain of elementwise operations.

``gelu_new`` of GPT-2, GPT-J and Phi is the tanh form of GELU, eight passes over the widest tensor of the block and as
many tensors kept for the backward. PyTorch has it as one kernel with one kept tensor; results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from fastedit.arch import ResolvedArch

__all__ = ["fused_activations"]


def _tanh_gelu(hidden: Tensor) -> Tensor:
    return nn.functional.gelu(hidden, approximate="tanh")


@contextmanager
def fused_activations(arch: ResolvedArch) -> Iterator[None]:
    """Inside, tanh GELUs of ``arch``'s model run as one kernel."""
    # Exact types: a subclass may compute something else.
    chains = [m for m in arch.model.modules() if type(m) in (FastGELUActivation, NewGELUActivation)]
    before = [vars(module).get("forward") for module in chains]
    try:
        for module in chains:
            module.forward = _tanh_gelu  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in zip(chains, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]
