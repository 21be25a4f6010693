"""The v* / z optimisation of the locate-then-edit family, batched over requests.

Each request runs Adam on its own vector with its own step count, projects it onto the ball of radius
``clamp * ||h0||`` after every step (arXiv:2202.05262 sec. 3.1, arXiv:2210.07229 sec. 4.3) and stops early by its
own loss, so a batch gives what one-by-one runs give. Finished requests leave the batch when half of it is done.
The last iteration, which the originals only print, has no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch
from fastedit.engine.objective import TargetObjective, TargetSpec
from fastedit.engine.problem import Problem
from fastedit.ops.delta_step import delta_step_

__all__ = ["LossRow", "Targets", "optimise_targets"]

LossRow = tuple[float, float, float, float, float]


@dataclass
class Targets:
    """Result for E requests. ``value = init + delta`` is the vector to be written.

    Attributes:
        delta: ``[E, d]`` optimised offset.
        init: ``[E, d]`` clean activation of row 0 at its lookup token.
        losses: per request, one ``(total, nll, kl, weight decay, probability)`` per forward pass.
    """

    delta: Tensor
    init: Tensor
    losses: list[list[LossRow]] = field(default_factory=list)

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
    batch_tokens: int = 8192,
    on_done: Callable[[int], None] | None = None,
) -> Targets:
    """Optimise the targets of all requests together, in batches of at most ``batch_tokens`` tokens.

    Args:
        on_done: called with the number of requests finished so far.

    Raises:
        ValueError: a loss is not finite; the message names the request.
    """
    problems = list(problems)
    targets: Targets | None = None
    losses: list[list[LossRow]] = [[] for _ in problems]
    finished = 0
    for chunk in _chunks(problems, batch_tokens):
        delta, init = _optimise_chunk(model, arch, problems, chunk, spec, pad_id, losses)
        if targets is None:
            targets = Targets(
                delta.new_zeros(len(problems), delta.shape[1]), init.new_zeros(len(problems), init.shape[1])
            )
        targets.delta[chunk] = delta
        targets.init[chunk] = init
        finished += len(chunk)
        if on_done is not None:
            on_done(finished)
    if targets is None:
        raise ValueError("requests: at least one is needed, got 0")
    targets.losses = losses
    return targets


def _chunks(problems: Sequence[Problem], batch_tokens: int) -> list[list[int]]:
    """Consecutive requests whose padded rows fit into ``batch_tokens`` (at least one request each)."""
    chunks: list[list[int]] = []
    rows = longest = 0
    for index, problem in enumerate(problems):
        length = max(longest, *(len(row.ids) for row in problem.rows))
        if chunks and (rows + len(problem.rows)) * length <= batch_tokens:
            chunks[-1].append(index)
        else:
            chunks.append([index])
            rows, length = 0, max(len(row.ids) for row in problem.rows)
        rows, longest = rows + len(problem.rows), length
    return chunks


def _optimise_chunk(
    model: nn.Module,
    arch: ResolvedArch,
    problems: Sequence[Problem],
    chunk: list[int],
    spec: TargetSpec,
    pad_id: int,
    losses: list[list[LossRow]],
) -> tuple[Tensor, Tensor]:
    objective = TargetObjective(model, arch, [problems[i] for i in chunk], spec, pad_id=pad_id)
    init = objective.init
    result = torch.zeros_like(init)
    live = list(range(len(chunk)))  # positions in the chunk that the current objective covers
    state = {name: torch.zeros_like(init) for name in ("delta", "exp_avg", "exp_avg_sq")}
    step = torch.zeros(len(chunk), dtype=torch.int64, device=init.device)
    active = torch.ones(len(chunk), dtype=torch.bool, device=init.device)
    for iteration in range(spec.v_num_grad_steps):
        last = iteration == spec.v_num_grad_steps - 1
        loss, gradient = objective(state["delta"], grad=not last)
        table = torch.stack(
            [loss.total, loss.nll, loss.kl, loss.weight_decay, loss.probability], dim=1
        ).tolist()
        alive = active.tolist()
        for position, values in enumerate(table):
            if not alive[position]:
                continue
            request = problems[chunk[live[position]]]
            if not all(value - value == 0 for value in values):
                raise ValueError(
                    f"request {request.id!r}: loss is not finite at step {iteration}, the model is unchanged"
                )
            losses[chunk[live[position]]].append(tuple(values))
            alive[position] = values[0] >= spec.stop_loss
        if gradient is None or not any(alive):
            break
        active = torch.tensor(alive, device=init.device)
        delta_step_(
            state["delta"],
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step,
            objective.init.norm(dim=1),
            active,
            lr=spec.v_lr,
            weight_decay=spec.v_weight_decay,
            clamp=spec.clamp_norm_factor,
        )
        if sum(alive) * 2 <= len(alive):
            keep = [i for i, is_alive in enumerate(alive) if is_alive]
            result[live] = state["delta"]
            live = [live[i] for i in keep]
            state = {name: tensor[keep].contiguous() for name, tensor in state.items()}
            step, active = step[keep].contiguous(), active[keep].contiguous()
            objective = TargetObjective(model, arch, [problems[chunk[i]] for i in live], spec, pad_id=pad_id)
    result[live] = state["delta"]
    return result, init
