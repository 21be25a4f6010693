"""All restored cells of some prompts in one sweep over the layers.

A cell restores the clean state of token t at layer l in the corrupted run. That changes nothing below l and nothing
before t, so it is run as a lane (`fastedit.trace.lanes`): the tokens from t on, from the block above on, once per
noise sample. What comes before them is read from the corrupted run's keys and values. What else is skipped, all of it
exact:

- the first block that a windowed cell restores a part of is run once for all tokens (`Base.restored`);
- windows that begin together are one lane until the shorter one ends;
- the last block computes keys and values of all tokens, and the rest at the last token only;
- the head is applied to last tokens, and of its logits only the answer's is kept, beside the log-sum-exp.

The same products in another order, so float32 results agree to rounding, whatever the size of the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.attention import attending
from fastedit.engine.forest import Branch
from fastedit.engine.fused import fused_activations
from fastedit.engine.packed import BlockRunner, Plan, at_tokens
from fastedit.trace.base import Base
from fastedit.trace.hooks import hooks, part_module
from fastedit.trace.lanes import Lane, heads_of

__all__ = ["Run", "Sweep", "grouped"]


@dataclass(frozen=True)
class Run:
    """A lane of one prompt for some samples.

    Attributes:
        prompt, length: number of the prompt, and its tokens.
        lane: what is run.
        samples: which noise samples.
        rows, frozen_rows: set of draws of the corrupted run, and of the one that frozen outputs come from.
    """

    prompt: int
    length: int
    lane: Lane
    samples: range
    rows: int = 0
    frozen_rows: int = 0

    @property
    def width(self) -> int:
        """Tokens of one sample."""
        return self.length - self.lane.token

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.width * len(self.samples)

    @property
    def cost(self) -> int:
        """What a sample takes, in tokens: attention gathers the keys and values of what is before it, too."""
        return self.width + 1 + self.lane.token // 8


def grouped(families: Sequence[Sequence[Run]], batch_tokens: int) -> Iterator[list[Run]]:
    """Runs that fit into ``batch_tokens`` together, families undivided; a family that does not fit gives up samples."""
    group: list[Run] = []
    count = 0
    # Runs of one width and near starts go together: no padding in attention, no block for a few tokens.
    for family in sorted(families, key=lambda family: (-family[0].width, -family[0].lane.start)):
        cost = sum(run.cost for run in family)
        samples = family[0].samples
        step = max(1, min(len(samples), batch_tokens // cost))
        for first in range(0, len(samples), step):
            part = samples[first : first + step]
            if group and count + cost * len(part) > batch_tokens:
                yield group
                group, count = [], 0
            group += [
                Run(run.prompt, run.length, run.lane, part, run.rows, run.frozen_rows) for run in family
            ]
            count += cost * len(part)
    if group:
        yield group


class Sweep:
    """Runs groups of lanes over one `Base`."""

    def __init__(self, arch: ResolvedArch, base: Base) -> None:
        self._arch, self._base = arch, base
        self._runner = BlockRunner(arch)
        self._restored: dict[tuple[str, int], Tensor] = {}
        self._patch: dict[str, tuple[Tensor, Tensor]] = {}  # part -> tokens, values

    def restore(self, families: Sequence[Sequence[Run]]) -> None:
        """Run the blocks that windowed lanes begin with."""
        for family in families:
            lane = family[0].lane
            if lane.part is not None and not lane.frozen and (lane.part, lane.enters) not in self._restored:
                self._restored[lane.part, lane.enters] = self._base.restored(
                    self._arch, lane.part, lane.enters
                )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of `finals`: attention handed over, hooks on sub-layers."""
        with hooks() as hook:
            for part in self._base.parts:
                for layer in range(self._arch.depth):
                    hook(part_module(self._arch, part, layer), self._patching(part))
            with torch.no_grad(), attending(self._arch, self._runner.attend), fused_activations(self._arch):
                yield

    def _patching(self, part: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if part in self._patch:
                at, values = self._patch[part]
                rows = block_output(output).view(-1, self._arch.width)
                rows[at.to(rows.device)] = values.to(rows.device)

        return hook

    def finals(self, group: Sequence[Run]) -> list[Tensor]:
        """Per run ``[samples, d]``, the last block's output at the last token."""
        depth = self._arch.depth
        lanes = _Active(self._base)
        waiting = sorted(range(len(group)), key=lambda i: group[i].lane.start)
        family = heads_of([run.lane for run in group])
        hidden: Tensor | None = None
        for layer in range(group[waiting[0]].lane.start, depth + 1):
            if layer == depth:
                lanes.narrow()
            joining = [i for i in waiting if group[i].lane.start == layer]
            if joining:
                parts = [] if hidden is None else [hidden]
                # Forks copy from lanes that are there already.
                for i in sorted(joining, key=lambda i: group[i].lane.fork):
                    run = group[i]
                    if run.lane.fork:
                        whole = torch.cat(parts)
                        parts = [whole, whole[lanes.where[family[i]]].clone()]
                    else:
                        parts.append(self._entry(run))
                    lanes.add(i, run)
                hidden = torch.cat(parts)
            if layer == depth or hidden is None:
                continue
            name, named = self._base.calls[layer]
            call = name, at_tokens(named, lanes.numbers(hidden.device), self._base.count)
            # Not a method of this object: the runner keeps it, and a cycle would keep all tensors until a collection.
            store = self._base.store
            if layer < depth - 1:
                self._patch = self._patches(lanes, layer, None)
                hidden = self._runner.block(layer, hidden[None], call, lanes.plan(hidden.device), store)[0]
            else:
                last = lanes.last(hidden.device)
                self._patch = self._patches(lanes, layer, last)
                hidden = self._runner.block_at(
                    layer, hidden[None], call, lanes.plan(hidden.device, ends=True), store, last
                )[0]
            self._patch = {}
        if hidden is None:
            raise RuntimeError("a group of lanes must hold at least one")
        return [hidden[lanes.ends(i)] for i in range(len(group))]

    def _entry(self, run: Run) -> Tensor:
        """``[tokens, d]`` input of block ``lane.start``: corrupted but for the lane's token."""
        base, lane = self._base, run.lane
        source = base.hidden[lane.start]
        number = [
            base.corrupted(run.prompt, run.rows, sample, token)
            for sample in run.samples
            for token in range(lane.token, run.length)
        ]
        rows = source[torch.tensor(number, device=source.device)]
        if lane.part is None or lane.frozen:
            rows[:: run.width] = source[base.clean(run.prompt, lane.token)]
        else:
            begun = self._restored[lane.part, lane.enters]
            firsts = torch.tensor(number[:: run.width], device=begun.device)
            rows[:: run.width] = begun[firsts].to(rows.device)
        return rows

    def _patches(self, lanes: _Active, layer: int, wanted: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """What is put into the sub-layers of a block, by part; ``wanted``: the tokens that it computes."""
        found: dict[str, tuple[list[int], list[int]]] = {}
        for run, place in lanes.runs():
            lane = run.lane
            if lane.part is None or layer >= lane.stop or (wanted is not None and run.width > 1):
                continue
            at, source = found.setdefault(lane.part, ([], []))
            for index, sample in enumerate(run.samples):
                at.append(place + index * run.width)
                source.append(
                    self._base.corrupted(run.prompt, run.frozen_rows, sample, lane.token)
                    if lane.frozen
                    else self._base.clean(run.prompt, lane.token)
                )
        patches = {}
        for part, (at, source) in found.items():
            values = self._base.parts[part][layer]
            tokens = torch.tensor(at)
            if wanted is not None:
                tokens = torch.searchsorted(wanted.cpu(), tokens)
            patches[part] = tokens, values[torch.tensor(source, device=values.device)]
        return patches


class _Active:
    """The runs that have joined, packed one behind the other, sample by sample."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._runs: list[tuple[int, Run, int]] = []
        self._branches: list[Branch] = []
        self._numbers: list[int] = []
        self.where: dict[int, slice] = {}
        self._made: dict[object, Any] = {}
        self._ends: dict[int, slice] = {}
        self._narrowed = False

    def add(self, index: int, run: Run) -> None:
        if self._narrowed:
            self._end(index, run)
            return
        base, place = self._base, len(self._numbers)
        self._runs.append((index, run, place))
        self.where[index] = slice(place, place + run.tokens)
        for sample in run.samples:
            row = [base.corrupted(run.prompt, run.rows, sample, token) for token in range(run.length)]
            begin = len(self._numbers)
            self._numbers += row[run.lane.token :]
            self._branches.append(Branch(begin, len(self._numbers), tuple(row[: run.lane.token])))
        self._made.clear()

    def runs(self) -> Iterator[tuple[Run, int]]:
        for _, run, place in self._runs:
            yield run, place

    def numbers(self, device: torch.device) -> Tensor:
        """The base token that each token is at the place of."""
        return self._once(("numbers", device), lambda: torch.tensor(self._numbers, device=device))

    def last(self, device: torch.device) -> Tensor:
        return torch.tensor([branch.stop - 1 for branch in self._branches], device=device)

    def plan(self, device: torch.device, *, ends: bool = False) -> Plan:
        queries = [branch.stop - 1 for branch in self._branches] if ends else None
        return self._once(("plan", device, ends), lambda: Plan.of(self._branches, device, queries))

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def narrow(self) -> None:
        """Behind the last block there is one token, the last, of every sample."""
        self._narrowed = True
        for index, run, _ in self._runs:
            self._end(index, run)

    def _end(self, index: int, run: Run) -> None:
        at = sum(end.stop - end.start for end in self._ends.values())
        self._ends[index] = slice(at, at + len(run.samples))

    def ends(self, index: int) -> slice:
        """Where a run's last tokens are behind the last block."""
        return self._ends[index]
