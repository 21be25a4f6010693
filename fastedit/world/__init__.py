"""The embedded fact world: a small synthetic world, and two small models that know it.

`load("gpt2")` and `load("llama")` return a `World`. That facts sit at the last token of their subject is built in by
the training recipe, see docs/world.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastedit.world.embedded import World, load

__all__ = ["World", "load"]


def __getattr__(name: str) -> Any:
    # transformers is loaded when a model is, not when the package is imported. No module here may be called `load`:
    # importing it would put the module in the place of the function.
    if name in __all__:
        return getattr(import_module("fastedit.world.embedded"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
