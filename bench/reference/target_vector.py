"""The search for v* (ROME) and z (MEMIT): full forwards of every prompt, one request at a time, hooks and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Request", "captured", "device_of", "padded", "target_vector", "weight_canonical"]


@dataclass(frozen=True)
class Request:
    """One edit as token ids.

    rows: prompts filled into the context templates, the bare one first, without the target.
    lookup: index of the subject's last token in each row. target: target ids. kl_row, kl_lookup: "<subject> is a".
    groups: how many rows belong to each group of templates (MEMIT averages groups of averages; [len(rows)] if empty).
    """

    rows: list[list[int]]
    lookup: list[int]
    target: list[int]
    kl_row: list[int]
    kl_lookup: int
    groups: tuple[int, ...] = ()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's embedding is: the device of its first parameter."""
    return next(model.parameters()).device


def padded(rows: list[list[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """ids and mask [B, S], padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def weight_canonical(module: nn.Module) -> Tensor:
    """The weight as (out, in): Conv1D stores it the other way round."""
    weight = module.weight
    return weight.T if type(module).__name__ == "Conv1D" else weight  # type: ignore[return-value,operator]


@contextmanager
def captured(
    module: nn.Module, edit: Callable[[Tensor], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect a module's input and output; `edit` may replace the output."""
    seen: dict[str, Tensor] = {}

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        seen["in"] = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        new = first if edit is None else edit(first)
        seen["out"] = new.clone()  # Falcon adds the attention to it in place
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def target_vector(
    model: nn.Module,
    site: str,
    request: Request,
    *,
    steps: int,
    lr: float,
    clamp: float,
    weight_decay: float,
    kl_factor: float,
    stop: float = 5e-2,
) -> tuple[Tensor, Tensor, list[float]]:
    """h0 [d], delta [d] and the loss at each step, for delta added to the output of module `site` at the lookup tokens.

    loss = mean_i (1/|t|) sum_j -log p(t_j) + kl_factor KL(p || p0) at the subject of the KL prompt
    + weight_decay ||delta|| / ||h0||^2; Adam; delta is pulled back to ||delta|| <= clamp ||h0|| after each step.
    """
    target, n = request.target, len(request.rows)
    full = [row + target[:-1] for row in request.rows]
    ids, mask = padded([*full, request.kl_row], device_of(model))
    lookup = [*request.lookup, request.kl_lookup]
    delta = torch.zeros(model.config.hidden_size, device=ids.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)
    h0: Tensor | None = None
    logp0: Tensor | None = None
    losses: list[float] = []

    def add(output: Tensor) -> Tensor:
        nonlocal h0
        moved = output.clone().view(*ids.shape, -1)  # OPT flattens batch and sequence before its MLP
        if h0 is None:
            h0 = moved[0, lookup[0]].detach().clone()
        for row, token in enumerate(lookup):
            moved[row, token] = moved[row, token] + delta
        return moved.view(output.shape)

    for step in range(steps):
        with captured(model.get_submodule(site), add):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logp = torch.log_softmax(logits, dim=-1)
        nll = torch.stack(
            [
                -sum(logp[i, len(full[i]) - len(target) + j, t] for j, t in enumerate(target)) / len(target)
                for i in range(n)
            ]
        ).mean()
        logp_kl = logp[n, request.kl_lookup]
        if logp0 is None:
            logp0 = logp_kl.detach().clone()
        kl = kl_factor * (logp_kl.exp() * (logp_kl - logp0)).sum()
        loss = nll + kl + weight_decay * delta.norm() / h0.norm() ** 2
        losses.append(loss.item())
        if losses[-1] < stop or step == steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimizer.step()
        limit = clamp * h0.norm()
        if delta.norm() > limit:
            with torch.no_grad():
                delta.mul_(limit / delta.norm())
    return h0, delta.detach(), losses
