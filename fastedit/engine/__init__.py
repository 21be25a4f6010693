"""Computations that methods share, over a model: replayed blocks, target optimisation, the layer sweep.

Import what you need from its module; importing this package does nothing.
"""

from __future__ import annotations

__all__: list[str] = []
