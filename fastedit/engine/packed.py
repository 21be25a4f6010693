"""Run packed tokens through a model's own blocks: many rows as one, no padding, shared beginnings once.

The model's forward sees one row ``[1, N]`` of tokens with their positions. Everything but attention acts on tokens
alone; attention is handed over (`fastedit.engine.attention`) to `branch_attention`, which lets each token see what is
before it in its own row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.attention import Attend, attending
from fastedit.engine.forest import Branch, Forest
from fastedit.engine.fused import fused_activations
from fastedit.engine.replay import StopForward
from fastedit.ops.branch_attention import branch_attention

__all__ = [
    "BlockRunner",
    "Call",
    "Passage",
    "Plan",
    "Store",
    "Trunk",
    "at_tokens",
    "forest_tensors",
    "joined",
    "named_arguments",
    "pass_through",
]

Call = tuple[str, dict[str, Any]]  # name of a block's hidden states, and its other arguments
Store = Callable[
    [int, Tensor, Tensor], tuple[Tensor, Tensor]
]  # layer, own k and v -> k and v of earlier tokens


@dataclass(frozen=True)
class Plan:
    """Which keys each packed query sees; the arguments of `branch_attention` of the same names."""

    columns: Tensor
    q_starts: Tensor
    q_offsets: Tensor
    k_starts: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(
        cls, branches: Sequence[Branch], device: torch.device, queries: Sequence[int] | None = None
    ) -> Plan:
        """Plan of consecutive branches that begin at token 0.

        Args:
            queries: tokens, ascending, that ask; the others are keys only. ``None``: all.
        """
        widest = max((len(branch.columns) for branch in branches), default=0)
        columns = [[*branch.columns, *[-1] * (widest - len(branch.columns))] for branch in branches]
        ends = [branch.stop for branch in branches]
        asked = range(ends[-1] if ends else 0) if queries is None else queries
        q_starts, q_offsets, at = [0], [], 0
        for branch in branches:
            begin = at
            while at < len(asked) and asked[at] < branch.stop:
                q_offsets.append(asked[at] - branch.start)
                at += 1
            q_starts.append(q_starts[-1] + at - begin)
        counts = [after - before for before, after in pairwise(q_starts)]
        return cls(
            torch.tensor(columns, device=device, dtype=torch.int64).view(len(branches), widest),
            torch.tensor(q_starts, device=device),
            torch.tensor(q_offsets, device=device, dtype=torch.int64),
            torch.tensor([0, *ends], device=device),
            max(counts, default=0),
            max((branch.stop - branch.start for branch in branches), default=0),
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_prefix: Tensor,
        v_prefix: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """`branch_attention` by this plan, on the queries' device."""
        at = q.device
        return branch_attention(
            q,
            k,
            v,
            k_prefix,
            v_prefix,
            self.columns.to(at),
            self.q_starts.to(at),
            self.q_offsets.to(at),
            self.k_starts.to(at),
            max_q=self.max_q,
            max_k=self.max_k,
            scale=scale,
            softcap=softcap,
            window=window,
        )


@dataclass
class Passage:
    """What a packed forward leaves behind.

    Attributes:
        hidden: ``[1, N, d]`` input of block ``start`` (output of the last block that ran if none starts there).
        calls: per block from ``start`` on, its other arguments for all N tokens, and the name of its hidden states.
        final: ``[1, kept, d]`` output of the last block that ran, at the kept tokens.
    """

    hidden: Tensor
    calls: list[Call]
    final: Tensor


def pass_through(
    arch: ResolvedArch,
    ids: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    start: int,
    narrow: int,
    keep: Tensor,
    stop: int | None = None,
) -> Passage:
    """One forward without gradients over packed tokens: all of them below block ``narrow``, some from it on.

    Args:
        ids, positions: ``[N]`` int64.
        attend: attention of every layer, see `fastedit.engine.attention`; it sees N tokens below ``narrow`` and
            ``len(keep)`` tokens from there on.
        start: first block whose input and arguments are kept; at most ``narrow``.
        keep: ``[n]`` tokens that go on from block ``narrow``.
        stop: one past the last block that runs; ``None``: all.

    Raises:
        RuntimeError: a block did not hand its attention over.
    """
    stop = arch.depth if stop is None else stop
    calls: list[Call] = []
    entered: list[Tensor] = []
    final: list[Tensor] = []
    seen: set[int] = set()

    def enter(layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = named_arguments(block, args, kwargs)
            name = next(iter(named))
            hidden = named.pop(name)
            calls.append((name, named))
            if layer == start:
                entered.append(hidden.detach().clone())
            if layer < narrow:
                return None
            if layer == narrow:
                hidden = hidden[:, keep.to(hidden.device)]
            return (), {name: hidden, **at_tokens(named, keep, len(ids))}

        return hook

    def end(_block: nn.Module, _args: Any, output: Any) -> None:
        final.append(block_output(output).detach())
        raise StopForward

    def counted(layer: int, *args: Tensor, **options: Any) -> Tensor:
        seen.add(layer)
        return attend(layer, *args, **options)

    handles = [
        arch.block(i).register_forward_pre_hook(enter(i), with_kwargs=True) for i in range(start, stop)
    ]
    handles.append(arch.block(stop - 1).register_forward_hook(end))
    device = arch.embed.weight.device  # type: ignore[union-attr]
    row, places = ids.to(device)[None], positions.to(device)[None]  # type: ignore[arg-type]
    try:
        # Caught inside the contexts: an exception that passes through them keeps this frame, and its tensors, alive
        # until the next collection of cycles.
        with torch.no_grad(), attending(arch, counted), fused_activations(arch), suppress(StopForward):  # type: ignore[arg-type]
            arch.model(input_ids=row, position_ids=places, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < stop:
        missing = min(set(range(stop)) - seen)
        raise RuntimeError(
            f"attention of layer {missing} did not go through transformers' attention interface"
        )
    return Passage(entered[0] if entered else final[0], calls, final[0])


class BlockRunner:
    """Runs single blocks on packed tokens. Its `attend` belongs into the `attending` context around the calls."""

    def __init__(self, arch: ResolvedArch) -> None:
        self._arch = arch
        self._plan: Plan
        self._store: Store
        self._given: list[Tensor] | None = None

    def block(self, layer: int, hidden: Tensor, call: Call, plan: Plan, store: Store) -> Tensor:
        """Output ``[1, n, d]`` of one block for ``hidden [1, n, d]``.

        Args:
            call: name of the hidden states, and the other arguments at these tokens.
            plan: which keys they see.
            store: what comes before the tokens' own keys and values.
        """
        self._plan, self._store, self._given = plan, store, None
        name, named = call
        return block_output(self._arch.block(layer)(**{**named, name: hidden}))

    def block_at(
        self, layer: int, hidden: Tensor, call: Call, plan: Plan, store: Store, wanted: Tensor
    ) -> Tensor:
        """Output ``[1, w, d]`` at some tokens; the others give their keys and values only.

        Args:
            plan: which keys the wanted tokens see.
            wanted: ``[w]`` tokens, ascending.
        """
        self._plan, self._store, self._given = plan, store, []
        name, named = call
        block, count = self._arch.block(layer), hidden.shape[1]
        wanted = wanted.to(hidden.device)
        try:
            with suppress(StopForward):
                block(**{**named, name: hidden})
            return block_output(block(**{**at_tokens(named, wanted, count), name: hidden[:, wanted]}))
        finally:
            self._given = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of the running block."""
        if self._given is not None:
            if not self._given:
                self._given += [k, v]
                raise StopForward
            k, v = self._given
        return self._plan.attend(q, k, v, *self._store(layer, k, v), **options)


def named_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, the hidden states first."""
    signature = inspect.signature(block.forward)
    bound = signature.bind(*args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    named.setdefault("attention_mask", None)
    return named


def at_tokens(value: Any, tokens: Tensor, count: int) -> Any:
    """Positions, rotary tables and the like ``[1, count, ...]`` at some tokens; anything else as it is."""
    if isinstance(value, dict):
        return {name: at_tokens(item, tokens, count) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(at_tokens(item, tokens, count) for item in value)
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == count:
        return value[:, tokens.to(value.device)]
    if isinstance(value, Tensor) and value.ndim == 1 and len(value) == count:
        return value[tokens.to(value.device)]
    return value


def joined(mine: Any, theirs: Any) -> Any:
    """Token tables of two captures, one after the other; anything else must be the same and stays."""
    if isinstance(mine, dict):
        return {name: joined(value, theirs[name]) for name, value in mine.items()}
    if isinstance(mine, tuple):
        return tuple(joined(a, b) for a, b in zip(mine, theirs, strict=True))
    if isinstance(mine, Tensor):
        return torch.cat([mine, theirs], dim=1 if mine.ndim >= 2 else 0)
    return mine


def forest_tensors(forest: Forest) -> tuple[Tensor, Tensor]:
    """``(ids, positions)`` of a forest's own tokens, ``[N]`` int64 each."""
    return torch.tensor(forest.ids, dtype=torch.int64), torch.tensor(forest.positions, dtype=torch.int64)


class Trunk:
    """Tokens that rows of several requests begin with, run once: their keys and values in every layer.

    Attributes:
        forest: the shared tokens; may be empty.
        keys, values: per layer that ran, ``[len(forest), G, D]``.
    """

    def __init__(self, arch: ResolvedArch, forest: Forest, *, stop: int | None = None) -> None:
        """Run ``forest`` up to (not including) block ``stop``; ``None`` runs all."""
        self.forest = forest
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        stop = arch.depth if stop is None else stop
        if len(forest) and stop > 0:
            self._run(arch, stop)

    def _run(self, arch: ResolvedArch, stop: int) -> None:
        ids, positions = forest_tensors(self.forest)
        plan = Plan.of(self.forest.branches, arch.embed.weight.device)  # type: ignore[union-attr,arg-type]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            self.keys[layer], self.values[layer] = k.clone(), v.clone()
            return plan.attend(q, k, v, self.keys[layer], self.values[layer], **options)

        every = torch.arange(len(ids))
        pass_through(arch, ids, positions, attend, start=stop, narrow=stop, keep=every, stop=stop)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's keys and values of a layer followed by more tokens' ``[n, G, D]``."""
        if not len(self.forest):
            return k.contiguous(), v.contiguous()
        return torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
