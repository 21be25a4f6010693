"""The objective of the v* / z optimisation, batched over requests, with its gradient.

For request e the vector delta_e is added to the output of one layer at the lookup token of all its rows and
minimises (arXiv:2202.05262 eq. 4, arXiv:2210.07229 eq. 16)

    L_e = mean_i -1/|t| sum_j log p(t_j | row_i)  +  kl_factor * KL(p0 || p)  +  wd * ||delta|| / ||h0||^2

The losses of different requests share no term, so one backward gives the gradient of each.

What is skipped, exactly: blocks below the injected one and tokens before the lookup token are captured once (they do
not see delta), weights get no gradient, and logits are formed at the rows that enter the loss only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.problem import Problem
from fastedit.engine.replay import Replay
from fastedit.engine.suffix import SuffixReplay, whole_rows_because
from fastedit.ops.target_loss import target_loss
from fastedit.tokens import Encoded, pad_right

__all__ = ["Loss", "TargetObjective", "TargetSpec"]

Site = Literal["mlp", "block"]


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Where the vector is injected and how it is optimised. Names follow the published hyper-parameters.

    Attributes:
        layer: injected layer.
        site: ``"mlp"`` adds to what the MLP adds to the residual stream, the output of its last matrix (ROME);
            ``"block"`` adds to the block's output (MEMIT).
        v_num_grad_steps: forward passes; at most one fewer updates.
        v_loss_layer: layer whose output is read for the NLL (``None``: the last).
        soft_cap_nll: apply the model's logit soft cap to the NLL too (MEMIT's code bypasses it).
        stop_loss: a request ends when its loss is below this value.
    """

    layer: int
    site: Site
    v_num_grad_steps: int
    v_lr: float
    v_weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    v_loss_layer: int | None = None
    soft_cap_nll: bool = True
    stop_loss: float = 5e-2


@dataclass(frozen=True)
class Loss:
    """Loss terms per request, each ``[E]`` in the delta's dtype; ``probability`` is that of the target."""

    total: Tensor
    nll: Tensor
    kl: Tensor
    weight_decay: Tensor
    probability: Tensor


class TargetObjective:
    """The objective of several requests at one injection point, with its gradient.

    Attributes:
        init: ``[E, d]`` clean activation at the injection point (row 0 of each request), fp32 or fp64.
        whole_rows: why whole rows are run instead of suffixes, or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: ResolvedArch,
        problems: Sequence[Problem],
        spec: TargetSpec,
        *,
        pad_id: int = 0,
    ):
        self._arch = arch
        self._spec = spec
        rows = [row for problem in problems for row in problem.rows]
        self.whole_rows = whole_rows_because(model, [row.lookup for row in rows])
        # Of the KL row only the lookup token is read, and what follows it cannot reach it.
        cut = [
            row.ids if row.target or self.whole_rows is not None else row.ids[: row.lookup + 1]
            for row in rows
        ]
        ids, mask = pad_right(cut, pad_id)
        # A negative lookup counts from the end of the padded row, as one published index rule does.
        lookup = [row.lookup % ids.shape[1] for row in rows]
        # A post-norm block normalises the MLP's output before the residual sum, so a vector added to the MLP
        # must pass through the block itself; elsewhere adding to the block's output is the same sum.
        self._inside = spec.site == "mlp" and arch.row.post_norm
        start = spec.layer if self._inside else spec.layer + 1
        self._replay, self.init = self._capture(model, ids, mask, start, lookup, problems)
        device, dtype = self._replay.hidden.device, self.init.dtype
        self._row = torch.arange(len(rows), device=device)
        # Where a row's first position is its lookup token, positions count from there.
        origin = [0] * len(rows) if self.whole_rows is not None else lookup
        lookup = [at - zero for at, zero in zip(lookup, origin, strict=True)]
        self._lookup = torch.tensor(lookup, device=device)
        counts = [len(problem.rows) for problem in problems]
        self._owner = torch.repeat_interleave(torch.arange(len(problems)), torch.tensor(counts)).to(device)
        self._index_rows(problems, rows, lookup, origin, device, dtype)

    def _capture(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        start: int,
        lookup: list[int],
        problems: Sequence[Problem],
    ) -> tuple[Replay | SuffixReplay, Tensor]:
        """Clean forward; keeps the block inputs to replay from and the activation to start from."""
        arch, spec = self._arch, self._spec
        first = [0]
        for problem in problems[:-1]:
            first.append(first[-1] + len(problem.rows))
        at = [lookup[row] for row in first]
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Any) -> None:
            # A copy of the rows at once: some blocks add the attention's output to the MLP's in place.
            activation = block_output(output).detach()
            found.append(activation.reshape(*ids.shape, -1)[first, at])

        module = arch.mlp_out(spec.layer) if spec.site == "mlp" else arch.block(spec.layer)
        handle = module.register_forward_hook(keep)
        try:
            begin = min(start, arch.depth - 1)
            replay: Replay | SuffixReplay
            if self.whole_rows is None:
                replay = SuffixReplay(model, arch, ids, mask, start=begin, lookup=lookup)
            else:
                replay = Replay.capture(model, arch, ids, mask, start=begin)
        finally:
            handle.remove()
        # Injecting above the last block leaves nothing to replay: the vector meets the final norm directly.
        self._nothing_above = start >= arch.depth
        init = found[0]
        return replay, init.to(torch.float64 if init.dtype == torch.float64 else torch.float32)

    def _index_rows(
        self,
        problems: Sequence[Problem],
        rows: Sequence[Encoded],
        lookup: list[int],
        origin: list[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Which hidden rows enter the loss, with which label and weight."""
        batch, position, label, weight, owner, context = [], [], [], [], [], []
        kl_batch = []
        row = 0
        contexts = 0
        for edit, problem in enumerate(problems):
            share = 1.0 / (len(problem.target) * len(problem.rewriting))
            for encoded in problem.rewriting:
                for offset, token in enumerate(problem.target):
                    batch.append(row)
                    position.append(encoded.target_start + offset - origin[row])
                    label.append(token)
                    weight.append(share)
                    owner.append(edit)
                    context.append(contexts)
                row += 1
                contexts += 1
            kl_batch.append(row)
            row += 1
        self._nll_at = torch.tensor([batch, position], device=device)
        self._label = torch.tensor(label, device=device)
        self._weight = torch.tensor(weight, device=device, dtype=dtype)
        self._nll_owner = torch.tensor(owner, device=device)
        self._nll_context = torch.tensor(context, device=device)
        self._context_owner = torch.tensor(
            [edit for edit, problem in enumerate(problems) for _ in problem.rewriting], device=device
        )
        self._context_share = torch.tensor(
            [1.0 / len(problem.rewriting) for problem in problems for _ in problem.rewriting],
            device=device,
            dtype=dtype,
        )
        self._token_share = torch.tensor(
            [
                1.0 / len(problem.target)
                for problem in problems
                for _ in range(len(problem.rewriting) * len(problem.target))
            ],
            device=device,
            dtype=dtype,
        )
        self._kl_at = torch.tensor([kl_batch, [lookup[r] for r in kl_batch]], device=device)
        self._kl_rows = torch.arange(len(problems), device=device)
        self._no_label = torch.full((len(problems),), -1, device=device)
        with torch.no_grad():
            logits = self._arch.logits(self._replay.final[self._kl_at[0], self._kl_at[1]])
            self._kl_logp = torch.log_softmax(logits.to(dtype), dim=-1)

    def _forward(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden rows for the NLL and for the KL, before the final norm."""
        spec, replay = self._spec, self._replay
        shift = delta[self._owner]
        loss_layer = self._arch.depth - 1 if spec.v_loss_layer is None else spec.v_loss_layer
        nll_source: Tensor | None = None
        if self._inside:
            hidden = self._block_with_shift(shift)
            done = spec.layer + 1
        else:
            base = replay.final if self._nothing_above else replay.hidden
            hidden = base.index_put((self._row, self._lookup), shift.to(base.dtype), accumulate=True)
            done = spec.layer + 1
        if loss_layer + 1 < self._arch.depth:
            hidden = replay.run(hidden, start=done, stop=loss_layer + 1)
            nll_source = hidden
            done = loss_layer + 1
        hidden = replay.run(hidden, start=done, stop=self._arch.depth)
        source = hidden if nll_source is None else nll_source
        return source[self._nll_at[0], self._nll_at[1]], hidden[self._kl_at[0], self._kl_at[1]]

    def _block_with_shift(self, shift: Tensor) -> Tensor:
        def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            rows = output.reshape(*self._replay.mask.shape, -1)
            rows = rows.index_put((self._row, self._lookup), shift.to(output.dtype), accumulate=True)
            return rows.reshape(output.shape)

        handle = self._arch.mlp_out(self._spec.layer).register_forward_hook(add)
        try:
            return self._replay.run(self._replay.hidden, start=self._spec.layer, stop=self._spec.layer + 1)
        finally:
            handle.remove()

    def __call__(self, delta: Tensor, *, grad: bool = True) -> tuple[Loss, Tensor | None]:
        """Loss terms and the gradient of ``nll + kl_factor * kl`` (``delta_step_`` adds the decay's).

        Args:
            delta: ``[E, d]``.
            grad: ``False`` skips the backward.
        """
        spec = self._spec
        leaf = delta.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            nll_rows, kl_rows = self._forward(leaf)
            nll, kl = self._losses(nll_rows, kl_rows)
            edits = len(self.init)
            nll_edit = torch.zeros(edits, dtype=nll.dtype, device=nll.device).index_add(
                0, self._nll_owner, nll * self._weight
            )
            objective = (nll_edit + spec.kl_factor * kl).sum()
            gradient = torch.autograd.grad(objective, leaf)[0] if grad else None
        return self._terms(delta, nll.detach(), nll_edit.detach(), kl.detach()), gradient

    def _losses(self, nll_rows: Tensor, kl_rows: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of each label row and KL of each request, from hidden rows before the final norm."""
        arch, cap = self._arch, self._arch.softcap
        weight: Tensor = arch.head.weight  # type: ignore[assignment]
        bias = getattr(arch.head, "bias", None)
        if cap is None or self._spec.soft_cap_nll:
            # One pass over the vocabulary serves both.
            rows = arch.head_input(torch.cat([nll_rows, kl_rows]))
            labels = torch.cat([self._label, self._no_label])
            at = self._kl_rows + len(self._label)
            nll, kl = target_loss(rows, weight, bias, labels, at, self._kl_logp, softcap=cap)
            return nll[: len(self._label)], kl
        nll, _ = target_loss(arch.head_input(nll_rows), weight, bias, self._label, None, None)
        head_rows = arch.head_input(kl_rows)
        _, kl = target_loss(
            head_rows, weight, bias, self._no_label, self._kl_rows, self._kl_logp, softcap=cap
        )
        return nll, kl

    def _terms(self, delta: Tensor, nll: Tensor, nll_edit: Tensor, kl: Tensor) -> Loss:
        spec = self._spec
        decay = spec.v_weight_decay * delta.norm(dim=1) / self.init.norm(dim=1) ** 2
        contexts = torch.zeros(len(self._context_owner), dtype=nll.dtype, device=nll.device)
        contexts.index_add_(0, self._nll_context, nll * self._token_share)
        probability = torch.zeros_like(nll_edit).index_add_(
            0, self._context_owner, torch.exp(-contexts) * self._context_share
        )
        kl_term = spec.kl_factor * kl
        return Loss(nll_edit + kl_term + decay, nll_edit, kl_term, decay, probability)
