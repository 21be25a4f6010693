"""The registry of editing methods: one method, one file, found by name.

A method is a function ``solve(session, requests, config, *, targets=None) -> Edit`` that leaves the model
bit-identical, also when it raises. ``@method`` registers it beside its configuration class.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastedit.config import MethodConfig

__all__ = ["MODES", "MethodSpec", "get", "method", "names"]

MODES = ("single", "batch", "sequential")


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A registered method.

    Attributes:
        name: its file's name.
        paper: where it was published.
        modes: of ``single`` (one request), ``batch`` (many at once), ``sequential`` (one after the other).
        config: configuration class.
        defaults: published hyper-parameters by model name.
        solve: the function.
        estimate: ``(session, requests, config) -> MemoryEstimate`` predicts the peak memory of ``solve``.
    """

    name: str
    paper: str
    modes: tuple[str, ...]
    config: type[MethodConfig]
    defaults: Mapping[str, Mapping[str, Any]]
    solve: Callable[..., Any]
    estimate: Callable[..., Any]

    def __post_init__(self) -> None:
        if self.solve.__module__.rsplit(".", 1)[-1] != self.name:
            raise ValueError(
                f"method {self.name!r} must be defined in methods/{self.name}.py, got {self.solve.__module__}"
            )
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown:
            raise ValueError(
                f"method {self.name!r}: mode must be one of {', '.join(MODES)}, got {unknown[0]!r}"
            )


def method(
    name: str,
    *,
    paper: str,
    modes: tuple[str, ...],
    config: type[MethodConfig],
    defaults: Mapping[str, Mapping[str, Any]],
    estimate: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as a method; ``get`` finds it as the ``spec`` attribute of the function."""

    def register(solve: Callable[..., Any]) -> Callable[..., Any]:
        spec = MethodSpec(
            name=name,
            paper=paper,
            modes=modes,
            config=config,
            defaults=defaults,
            solve=solve,
            estimate=estimate,
        )
        solve.spec = spec  # type: ignore[attr-defined]
        return solve

    return register


def names() -> list[str]:
    """All methods, sorted by name: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> MethodSpec:
    """The method called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in names():
        raise ValueError(f"method must be one of {', '.join(names())}, got {name!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    spec: MethodSpec = getattr(module, name).spec
    return spec
