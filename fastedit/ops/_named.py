"""The kind of an argument, checked by name before anything is read off it."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

__all__ = ["check_integer", "check_tensors"]


def check_tensors(**given: object) -> None:
    """Raise ValueError for what is no tensor, by the names it is given under."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_integer(name: str, value: object) -> None:
    """Raise ValueError for 2.0, True and whatever else is no integer."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
