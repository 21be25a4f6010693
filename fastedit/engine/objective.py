"""The objective of the v* / z optimisation, batched over requests, with its gradient.

For request e the vector delta_e is added to the output of one layer at the lookup token of all its rows and
minimises (arXiv:2202.05262 eq. 4, arXiv:2210.07229 eq. 16)

    L_e = mean_i -1/|t| sum_j log p(t_j | row_i)  +  kl_factor * KL(p0 || p)  +  wd * ||delta|| / ||h0||^2

The losses of different requests share no term, so one backward gives the gradient of each.

What is skipped, exactly: blocks below the injected one and tokens before the lookup token are captured once (they do
not see delta), weights get no gradient, and logits are formed at the rows that enter the loss only. Requests can leave
and join between evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch
from fastedit.engine.attention import padded_because
from fastedit.engine.capture import Injection
from fastedit.engine.forest import Forest
from fastedit.engine.packed import Trunk
from fastedit.engine.padded_rows import PaddedRows
from fastedit.engine.problem import Problem
from fastedit.engine.suffix import PackedSuffix
from fastedit.ops.target_loss import target_loss

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
        padded: why padded rows are run instead of packed suffixes, or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: ResolvedArch,
        problems: Sequence[Problem],
        spec: TargetSpec,
        *,
        pad_id: int = 0,
        trunk: Trunk | None = None,
    ):
        self._arch = arch
        self._spec = spec
        self._problems: list[Problem] = []
        injection = Injection(
            layer=spec.layer,
            # Where a norm follows the MLP, before or after the residual sum, a vector added to the MLP must pass
            # through the block itself; elsewhere adding to the block's output is the same sum.
            inside=spec.site == "mlp" and arch.row.normed_output,
            site=spec.site,
            loss_layer=arch.depth - 1 if spec.v_loss_layer is None else spec.v_loss_layer,
        )
        self.padded = padded_because(arch, [row for problem in problems for row in problem.rows])
        self._rows: PackedSuffix | PaddedRows
        if self.padded is None:
            self._rows = PackedSuffix(arch, trunk or Trunk(arch, Forest()), injection)
        else:
            self._rows = PaddedRows(model, arch, injection, pad_id)
        self._kl_logp = torch.empty(0)
        self.extend(problems)

    @property
    def init(self) -> Tensor:
        """``[E, d]`` clean activation at the injection point (row 0 of each request), fp32 or fp64."""
        return self._rows.init

    @property
    def tokens(self) -> int:
        """Tokens that every evaluation computes above the injection."""
        return self._rows.tokens

    @property
    def checkpointed(self) -> bool:
        """Whether blocks are run again in the backward instead of keeping their activations."""
        return self._rows.checkpointed

    @checkpointed.setter
    def checkpointed(self, value: bool) -> None:
        self._rows.checkpointed = value

    def extend(self, problems: Sequence[Problem]) -> None:
        """Let more requests join, behind the present ones."""
        known = len(self._problems)
        self._rows.extend(problems)
        self._problems += problems
        fresh = self._clean_log_probabilities(known)
        self._kl_logp = torch.cat([self._kl_logp, fresh]) if known else fresh
        self._index()

    def keep(self, positions: Sequence[int]) -> None:
        """Keep the requests at these positions, in this order; the others leave."""
        self._rows.keep(positions)
        self._problems = [self._problems[i] for i in positions]
        self._kl_logp = self._kl_logp[torch.tensor(list(positions), device=self._kl_logp.device)]
        self._index()

    def _clean_log_probabilities(self, first: int) -> Tensor:
        """log p0 at the KL rows of the requests from ``first`` on, ``[E', V]``."""
        with torch.no_grad(), self._rows.running():
            rows = self._rows.kl_clean[first:]
            if rows.dtype != self.init.dtype:
                # A half-precision forward differs from the single-precision stream that p is read from.
                _, rows = self._rows.run(torch.zeros_like(self.init))
                rows = rows[first:]
            rows = self._arch.head_input(rows).to(self.init.dtype)
        # Outside of the blocks' context, which would round the products to the weights' type.
        with torch.no_grad():
            weight: Tensor = self._arch.head.weight  # type: ignore[assignment]
            # In pieces: a half-precision head is never copied whole to single precision.
            logits = torch.cat([rows @ part.to(rows.dtype).T for part in weight.split(8192)], dim=1)
            if (bias := getattr(self._arch.head, "bias", None)) is not None:
                logits += bias.to(rows.dtype)
            if (cap := self._arch.softcap) is not None:
                logits = torch.tanh(logits / cap) * cap
            return torch.log_softmax(logits, dim=-1)

    def _index(self) -> None:
        """Label, weight and owner of every loss row, in order of request, row and target token."""
        device, dtype = self.init.device, self.init.dtype
        label: list[int] = []
        owner, context, context_owner = list[int](), list[int](), list[int]()
        share, token_share, context_share = list[float](), list[float](), list[float]()
        for edit, problem in enumerate(self._problems):
            rows, length = len(problem.rewriting), len(problem.target)
            for _ in range(rows):
                label += problem.target
                context += [len(context_owner)] * length
                context_owner.append(edit)
                context_share.append(1.0 / rows)
            owner += [edit] * (rows * length)
            share += [1.0 / (rows * length)] * (rows * length)
            token_share += [1.0 / length] * (rows * length)
        self._label = torch.tensor(label, device=device)
        self._nll_owner = torch.tensor(owner, device=device)
        self._nll_context = torch.tensor(context, device=device)
        self._context_owner = torch.tensor(context_owner, device=device)
        self._weight = torch.tensor(share, device=device, dtype=dtype)
        self._token_share = torch.tensor(token_share, device=device, dtype=dtype)
        self._context_share = torch.tensor(context_share, device=device, dtype=dtype)
        self._kl_rows = torch.arange(len(self._problems), device=device)
        self._no_label = torch.full((len(self._problems),), -1, device=device)

    def __call__(self, delta: Tensor, *, grad: bool = True) -> tuple[Loss, Tensor | None]:
        """Loss terms and the gradient of ``nll + kl_factor * kl`` (``delta_step_`` adds the decay's).

        Args:
            delta: ``[E, d]``.
            grad: ``False`` skips the backward.
        """
        leaf = delta.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad), self._rows.running():
            nll, kl, nll_edit = self._evaluate(leaf)
            objective = (nll_edit + self._spec.kl_factor * kl).sum()
            gradient = torch.autograd.grad(objective, leaf)[0] if grad else None
        return self._terms(delta, nll.detach(), nll_edit.detach(), kl.detach()), gradient

    def forward(self, delta: Tensor) -> Tensor:
        """``nll + kl_factor * kl`` summed over requests, with its graph; for measuring what a backward keeps."""
        with self._rows.running():
            _, kl, nll_edit = self._evaluate(delta)
            return (nll_edit + self._spec.kl_factor * kl).sum()

    def _evaluate(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """NLL per loss row ``[R]``, KL per request ``[E]`` and NLL per request ``[E]``."""
        nll, kl = self._losses(*self._rows.run(delta))
        edits = torch.zeros(len(self.init), dtype=nll.dtype, device=nll.device)
        return nll, kl, edits.index_add(0, self._nll_owner, nll * self._weight)

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
