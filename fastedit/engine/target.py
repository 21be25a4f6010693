"""The v* / z optimisation of the locate-then-edit family, batched over requests.

Each request runs Adam on its own vector with its own step count, projects it onto the ball of radius
``clamp * ||h0||`` after every step (arXiv:2202.05262 sec. 3.1, arXiv:2210.07229 sec. 4.3) and stops early by its
own loss, so a batch gives what one-by-one runs give. Finished requests leave the batch at once and waiting ones take
their room. A step costs one host synchronisation: the table of losses. The last iteration, which the originals only
print, has no backward unless others in the batch need one.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch
from fastedit.engine.attention import padded_because
from fastedit.engine.graph import GraphedObjective
from fastedit.engine.memory import (
    MemoryReport,
    automatic_tokens,
    batch_sizes,
    out_of_memory,
    release_memory,
    saved_bytes,
)
from fastedit.engine.objective import Loss, TargetObjective, TargetSpec
from fastedit.engine.packed import Trunk
from fastedit.engine.problem import Problem
from fastedit.engine.suffix import trunk_of
from fastedit.ops.delta_step import delta_step_

__all__ = ["LossRow", "Targets", "optimise_targets"]

LossRow = tuple[float, float, float, float, float]

# Capturing a newcomer costs about as much as a step of it; joining a few at a time would capture shared beginnings
# and rearrange the batch more often than it fills it.
_REFILL = 0.25


@dataclass
class Targets:
    """Result for E requests. ``value = init + delta`` is the vector to be written.

    Attributes:
        delta: ``[E, d]`` optimised offset.
        init: ``[E, d]`` clean activation of row 0 at its lookup token.
        losses: per request, one ``(total, nll, kl, weight decay, probability)`` per forward pass.
        memory: the batch that was used, and why.
    """

    delta: Tensor
    init: Tensor
    losses: list[list[LossRow]] = field(default_factory=list)
    memory: MemoryReport = field(default_factory=MemoryReport)

    @property
    def value(self) -> Tensor:
        """``[E, d]`` the target activation."""
        return self.init + self.delta


def optimise_targets(
    model: nn.Module,
    arch: ResolvedArch,
    problems: Sequence[Problem],
    spec: TargetSpec,
    *,
    pad_id: int = 0,
    batch_tokens: int | None = None,
    cuda_graphs: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> Targets:
    """Optimise the targets of all requests together, at most ``batch_tokens`` suffix tokens at a time.

    Args:
        batch_tokens: tokens from the lookup token on that run together; at least one request always does. ``None``
            chooses by the device and its free memory. Changes memory and speed, not results beyond rounding.
        cuda_graphs: replay a step as a CUDA graph while its batch stays the same (`fastedit.engine.graph`).
        on_done: called with the number of requests finished so far.

    Raises:
        ValueError: a loss is not finite, and the message names the request; ``cuda_graphs`` without a CUDA device.
        torch.OutOfMemoryError, MemoryError, RuntimeError: one request alone does not fit into memory. Before that the
            batch is halved and blocks are recomputed in the backward, each with a warning.
    """
    if not problems:
        raise ValueError("requests: at least one is needed, got 0")
    device = arch.embed.weight.device  # type: ignore[union-attr]
    if cuda_graphs and device.type != "cuda":  # type: ignore[union-attr]
        raise ValueError(f"cuda_graphs needs the model on a CUDA device, it is on {device}")
    run = _Run(model, arch, list(problems), spec, pad_id, batch_tokens, cuda_graphs)
    finished = 0
    while run.unfinished:
        done = run.step()
        finished += done
        if done and on_done is not None:
            on_done(finished)
    return Targets(run.delta, run.init, run.losses, run.memory)


class _Run:
    """Queue, batch and state of one optimisation. State is kept per request, so a request may leave and come back."""

    def __init__(
        self,
        model: nn.Module,
        arch: ResolvedArch,
        problems: list[Problem],
        spec: TargetSpec,
        pad_id: int,
        batch_tokens: int | None,
        cuda_graphs: bool,
    ) -> None:
        self._cuda_graphs = cuda_graphs
        self._graphed: GraphedObjective | None = None
        self._model, self._arch, self._spec, self._pad_id = model, arch, spec, pad_id
        self._problems = problems
        self._queue = deque(range(len(problems)))
        self._live: list[int] = []
        self._objective: TargetObjective | None = None
        self._checkpointed = False
        self._packed = padded_because(arch, [row for problem in problems for row in problem.rows]) is None
        self._trunk: Trunk | None = None
        self._sizes: list[int] = []
        self.losses: list[list[LossRow]] = [[] for _ in problems]
        self.memory = MemoryReport()
        self._capacity = batch_tokens
        self.delta = self.init = torch.empty(0)

    @property
    def unfinished(self) -> bool:
        return bool(self._queue or self._live)

    def step(self) -> int:
        """One iteration of every request in the batch; returns how many finished."""
        try:
            self._refill()
            loss, gradient = self._evaluate()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or not self._can_shrink():
                raise
            message = str(error).splitlines()[0]
        else:
            return self._advance(loss, gradient)
        # Outside the handler: the traceback would keep the tensors that did not fit.
        self._shrink(message)
        return 0

    def _refill(self) -> None:
        if not self._queue:
            return
        if not self._sizes:
            if self._packed:
                self._trunk = trunk_of(self._arch, self._problems)
            forest = None if self._trunk is None else self._trunk.forest
            self._sizes = batch_sizes(self._problems, forest)
        if self._capacity is None:
            self._capacity = self._choose()
        self.memory.limit_tokens = self._capacity
        used = sum(self._sizes[i] for i in self._live)
        room = self._capacity - used
        if self._live and room < _REFILL * self._capacity:
            return
        joining: list[int] = []
        while self._queue and (self._sizes[self._queue[0]] <= room or not (self._live or joining)):
            joining.append(self._queue.popleft())
            room -= self._sizes[joining[-1]]
        if not joining:
            return
        newcomers = [self._problems[i] for i in joining]
        self._graphed = None
        # They count as live from here on: if they do not fit they go back into the queue with the others.
        self._live += joining
        if self._objective is None:
            self._objective = self._build(newcomers)
        else:
            self._objective.extend(newcomers)
        self._note(joining)

    def _build(self, problems: list[Problem]) -> TargetObjective:
        objective = TargetObjective(
            self._model, self._arch, problems, self._spec, pad_id=self._pad_id, trunk=self._trunk
        )
        objective.checkpointed = self._checkpointed
        return objective

    def _choose(self) -> int:
        """Tokens of a batch, from what one request's step keeps."""
        if len(self._problems) == 1:
            return self._sizes[0]
        first = self._queue[0]
        probe = self._build([self._problems[first]])
        tokens, self.memory = automatic_tokens(probe, self._arch)
        return tokens

    def _note(self, joining: list[int]) -> None:
        """Make room for state, and record where the newcomers start."""
        assert self._objective is not None  # noqa: S101 - for the type checker
        init = self._objective.init
        if not len(self.init):
            E, d = len(self._problems), init.shape[1]
            self.init, self.delta = init.new_zeros(E, d), init.new_zeros(E, d)
            self._exp_avg, self._exp_avg_sq = init.new_zeros(E, d), init.new_zeros(E, d)
            self._step = torch.zeros(E, dtype=torch.int64, device=init.device)
        self.init[self._index(joining)] = init[-len(joining) :]
        self._at = self._index(self._live)
        self.memory.batch_tokens = max(self.memory.batch_tokens, self._objective.tokens)

    def _index(self, requests: Sequence[int]) -> Tensor:
        return torch.tensor(list(requests), device=self.init.device)

    def _is_last(self, request: int) -> bool:
        return len(self.losses[request]) == self._spec.v_num_grad_steps - 1

    def _evaluate(self) -> tuple[Loss, Tensor | None]:
        assert self._objective is not None  # noqa: S101 - for the type checker
        needed = not all(self._is_last(request) for request in self._live)
        delta = self.delta[self._at]
        if needed and not self.memory.bytes_per_token:
            return self._measured(delta)
        if not (self._cuda_graphs and needed):
            return self._objective(delta, grad=needed)
        if self._graphed is None:
            self._graphed = GraphedObjective(self._objective)
        return self._graphed(delta)

    def _is_done(self, request: int) -> bool:
        return len(self.losses[request]) == self._spec.v_num_grad_steps

    def _measured(self, delta: Tensor) -> tuple[Loss, Tensor | None]:
        """An evaluation that counts what it keeps for its backward, for the report."""
        assert self._objective is not None  # noqa: S101 - for the type checker
        objective, found = self._objective, list[tuple[Loss, Tensor | None]]()
        kept = saved_bytes(self._arch, lambda: found.append(objective(delta)))
        self.memory.bytes_per_token = max(1, kept // objective.tokens)
        self.memory.predicted_bytes = self.memory.step_bytes(self.memory.limit_tokens or objective.tokens)
        return found[0]

    def _advance(self, loss: Loss, gradient: Tensor | None) -> int:
        """Record the losses, step those that go on and let the others go."""
        assert self._objective is not None  # noqa: S101 - for the type checker
        terms = [loss.total, loss.nll, loss.kl, loss.weight_decay, loss.probability]
        alive: list[bool] = []
        for request, values in zip(self._live, torch.stack(terms, dim=1).tolist(), strict=True):
            iteration, last = len(self.losses[request]), self._is_last(request)
            if not all(value - value == 0 for value in values):
                raise ValueError(
                    f"request {self._problems[request].id!r}: loss is not finite at step {iteration}, "
                    "the model is unchanged"
                )
            self.losses[request].append(tuple(values))
            alive.append(values[0] >= self._spec.stop_loss and not last)
        if gradient is not None and any(alive):
            self._adam(gradient, loss, alive)
        going = [position for position, is_alive in enumerate(alive) if is_alive]
        finished = len(alive) - len(going)
        if finished:
            self._graphed = None
        if not going:
            self._live, self._objective = [], None
        elif finished:
            self._live = [self._live[position] for position in going]
            self._at = self._index(self._live)
            self._objective.keep(going)
        return finished

    def _adam(self, gradient: Tensor, loss: Loss, alive: list[bool]) -> None:
        at, spec = self._at, self._spec
        # On the device, without a copy from the host, unless some are at their last iteration.
        active = loss.total >= spec.stop_loss
        if any(map(self._is_done, self._live)):
            active = torch.tensor(alive, device=at.device)
        state = [tensor[at] for tensor in (self.delta, self._exp_avg, self._exp_avg_sq, self._step)]
        delta_step_(
            state[0],
            gradient,
            state[1],
            state[2],
            state[3],
            self.init[at].norm(dim=1),
            active,
            lr=spec.v_lr,
            weight_decay=spec.v_weight_decay,
            clamp=spec.clamp_norm_factor,
        )
        for tensor, new in zip((self.delta, self._exp_avg, self._exp_avg_sq, self._step), state, strict=True):
            tensor[at] = new

    def _can_shrink(self) -> bool:
        return len(self._live) > 1 or not self._checkpointed

    def _shrink(self, message: str) -> None:
        """Half the batch; with one request left, recompute blocks in the backward instead."""
        tokens = sum(self._sizes[i] for i in self._live) if self._sizes else 0
        if len(self._live) > 1:
            self._capacity = max(1, tokens // 2)
            what = f"going on with {self._capacity}"
        else:
            self._checkpointed = True
            what = "going on with blocks recomputed in the backward"
        self._queue.extendleft(reversed(self._live))
        self._live, self._objective, self._graphed = [], None, None
        release_memory(self._arch)
        self.memory.shrunk.append(what)
        warnings.warn(
            f"out of memory with {tokens} tokens in a batch of targets ({message}): {what}", stacklevel=2
        )
