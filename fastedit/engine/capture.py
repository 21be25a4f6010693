"""The clean forward behind a target optimisation: what the suffixes start from and attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.forest import Branch, Forest
from fastedit.engine.packed import Plan, Trunk, at_tokens, forest_tensors, pass_through
from fastedit.engine.problem import Problem

__all__ = ["Capture", "Injection", "Placed", "place"]


@dataclass(frozen=True)
class Injection:
    """Where vectors enter and what is read.

    Attributes:
        layer: injected layer.
        inside: the vector is added to the output of the MLP's last matrix and passes through the rest of its block
            (post-norm blocks); else it is added to the block's output.
        site: module whose clean output at the lookup token is the starting point: ``"mlp"`` or ``"block"``.
        loss_layer: block whose output the target's rows are read from; the KL row reads the last block's.
    """

    layer: int
    inside: bool
    site: str
    loss_layer: int


@dataclass(frozen=True)
class Placed:
    """Where one request's suffixes are. Tokens are counted from the request's first.

    Attributes:
        branches: per suffix, the prefix tokens that it sees (numbers across trunk and own prefix), its length, and
            which of its tokens is the lookup token.
        nll: token of every loss row, in order of row and target token.
        kl, kl_branch: token of the KL row, a lookup token, and the suffix whose prefix it sees.
    """

    branches: tuple[tuple[tuple[int, ...], int, int], ...]
    nll: tuple[int, ...]
    kl: int
    kl_branch: int

    @property
    def tokens(self) -> int:
        """Number of suffix tokens."""
        return sum(count for _, count, _ in self.branches)

    def renumbered(self, number: dict[int, int]) -> Placed:
        """The same with prefix tokens under other numbers; those not named keep theirs."""
        branches = tuple(
            (tuple(number.get(c, c) for c in columns), count, shift)
            for columns, count, shift in self.branches
        )
        return replace(self, branches=branches)


def place(problem: Problem, prefix: Forest) -> tuple[Placed, int, list[int], list[int]]:
    """A request's branches, the lookup token of its first row, and its suffix tokens' ids and positions."""
    known: list[tuple[tuple[int, ...], tuple[int, ...], int, int]] = []
    branches: list[tuple[tuple[int, ...], int, int]] = []
    ids: list[int] = []
    places: list[int] = []

    def tail(row: tuple[int, ...], begin: int, lookup: int) -> tuple[int, int]:
        """(branch, first token) of a row's suffix, one that another row of this request already has if it can."""
        path, own, shift = prefix.insert(row[:begin]), row[begin:], lookup - begin
        for branch, (columns, suffix, at, first) in enumerate(known):
            if (columns, at) == (path, shift) and suffix[: len(own)] == own:
                return branch, first
        known.append((path, own, shift, len(ids)))
        branches.append((path, len(own), shift))
        ids.extend(own)
        places.extend(range(begin, len(row)))
        return len(branches) - 1, known[-1][3]

    nll: list[int] = []
    lookups: list[int] = []
    for row in problem.rewriting:
        # A lookup token behind the subject may be a target token: what predicts it comes before it.
        begin = min(row.lookup, row.target_start)
        _, token = tail(row.ids, begin, row.lookup)
        lookups.append(token + row.lookup - begin)
        nll += [token + row.target_start - begin + j for j in range(len(problem.target))]
    # Of the KL row only the lookup token is read, and what follows it cannot reach it.
    essence = problem.essence
    branch, kl = tail(essence.ids[: essence.lookup + 1], essence.lookup, essence.lookup)
    return Placed(tuple(branches), tuple(nll), kl, branch), lookups[0], ids, places


class Capture:
    """The clean forward of some requests."""

    def __init__(
        self,
        arch: ResolvedArch,
        trunk: Trunk,
        prefix: Forest,
        edits: Sequence[Placed],
        ids: list[int],
        places: list[int],
        at: Injection,
        start: int,
    ) -> None:
        own_ids, own_places = forest_tensors(prefix)
        P = len(own_ids)
        below, above, tokens, kl = list(prefix.branches), list(prefix.branches), P, []
        for edit in edits:
            kl.append(tokens + edit.kl)
            above.append(Branch(P + len(kl) - 1, P + len(kl), edit.branches[edit.kl_branch][0]))
            for columns, count, _ in edit.branches:
                below.append(Branch(tokens, tokens + count, columns))
                tokens += count
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        # A vector inside a block starts from an activation there, so that block still sees every token.
        narrow = max(start, at.layer + 1)
        plans: dict[tuple[bool, torch.device], Plan] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            upper = layer >= narrow
            if layer >= start:
                self._own[layer] = (k[:P].clone(), v[:P].clone())
            key = (upper, q.device)
            if key not in plans:
                plans[key] = Plan.of(above if upper else below, q.device)
            return plans[key].attend(q, k, v, *trunk.store(layer, k[:P], v[:P]), **options)

        found: list[Tensor] = []

        def keep_site(_module: nn.Module, _args: object, output: Any) -> None:
            # A copy at once: some blocks add the attention's output to the MLP's in place.
            found.append(block_output(output).detach().reshape(-1, arch.width).clone())

        module = arch.mlp_out(at.layer) if at.site == "mlp" else arch.block(at.layer)
        all_ids = torch.cat([own_ids, torch.tensor(ids, dtype=torch.int64)])
        all_places = torch.cat([own_places, torch.tensor(places, dtype=torch.int64)])
        go_on = torch.cat([torch.arange(P), torch.tensor(kl, dtype=torch.int64)])
        if narrow >= arch.depth:
            go_on = torch.arange(len(all_ids))
        handle = module.register_forward_hook(keep_site)
        try:
            passed = pass_through(arch, all_ids, all_places, attend, start=start, narrow=narrow, keep=go_on)
        finally:
            handle.remove()
        self.site = found[0][P:]
        self.hidden = passed.hidden[0, P:]
        suffix = torch.arange(P, len(all_ids))
        self.calls = [(name, at_tokens(named, suffix, len(all_ids))) for name, named in passed.calls]
        final = passed.final[0]
        self.kl_clean = final[torch.tensor(kl)] if narrow >= arch.depth else final[P:]

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the own prefix tokens."""
        return self._own[layer]

    def stores(self, trunk: Trunk) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of trunk and own prefix, per layer."""
        return {layer: trunk.store(layer, k, v) for layer, (k, v) in self._own.items()}
