"""A step of the target optimisation as one CUDA graph, replayed while the batch stays the same.

A step of few requests is thousands of small launches; a graph is one. It is captured when a batch has run twice
(libraries allocate their workspaces in the first runs) and dropped when requests leave or join.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.engine.objective import Loss, TargetObjective

__all__ = ["GraphedObjective"]

_WARM = 2


class GraphedObjective:
    """Evaluates an objective with its gradient; from the third time on by replaying a graph.

    Results are overwritten by the next call. Needs a model that is whole on one CUDA device.
    """

    def __init__(self, objective: TargetObjective) -> None:
        self._objective = objective
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._delta: Tensor
        self._result: tuple[Loss, Tensor | None]

    def __call__(self, delta: Tensor) -> tuple[Loss, Tensor | None]:
        """Loss terms and gradient at ``delta [E, d]``."""
        if self._graph is None and self._runs < _WARM:
            self._runs += 1
            return self._objective(delta)
        with torch.cuda.device(delta.device):
            if self._graph is None:
                self._delta = delta.clone()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(delta.device)):
                    self._result = self._objective(self._delta)
                self._graph = graph
            self._delta.copy_(delta)
            self._graph.replay()
        return self._result
