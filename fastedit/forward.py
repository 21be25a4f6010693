"""Running a user's model without a trace: modes and flags are put back, and a forward may end early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["StopForward", "evaluating"]


class StopForward(Exception):
    """Ends a forward once everything that is wanted has been seen."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to ``eval()`` without weight gradients, and restore both, module by module.

    Dropout would make results random, and a weight that requires a gradient makes every product keep its input. The
    flags are restored one by one because users freeze parts.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in wanted:
            parameter.requires_grad_(True)
