"""The blocks above an injection, on the tokens from the lookup token on, against frozen keys and values.

A vector added at token t of layer l moves nothing below l and nothing before t: the keys and values of earlier tokens
are those of the clean forward, in every layer. So one clean forward is made, its keys and values are kept, and the
blocks above run on the few tokens from t on (subject end, rest of the prompt, target), which attend to the frozen
prefix and to each other. What follows from that, all of it exact:

- tokens of all requests are one packed row: no padding, and prefixes that rows share are kept once;
- a row that is the beginning of another row of its request (``"{} is a"`` against a prompt that starts with the
  subject) is not run again;
- the last block computes keys and values of all tokens, and the rest at loss rows only;
- above ``loss_layer`` only the lookup tokens of the KL rows go on.

The same products in another order, so fp32 results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch
from fastedit.engine.attention import attending
from fastedit.engine.capture import Capture, Injection, Placed, place
from fastedit.engine.forest import Branch, Forest
from fastedit.engine.fused import fused_activations
from fastedit.engine.packed import BlockRunner, Call, Plan, Trunk, at_tokens, joined
from fastedit.engine.precision import stream_dtype, wide_residual
from fastedit.engine.problem import Problem
from fastedit.engine.recompute import recomputed

__all__ = ["PackedSuffix", "shared_beginnings", "trunk_of"]


_MOST = 1024  # tokens of a trunk: its keys and values stay for the whole optimisation


def shared_beginnings(problems: Sequence[Problem]) -> Forest:
    """The beginnings, up to the lookup token, that rows of several requests have in common."""
    rows = [[row.ids[: min(row.lookup, row.target_start)] for row in p.rows] for p in problems]
    return Forest.common(rows, most=_MOST)


def trunk_of(arch: ResolvedArch, problems: Sequence[Problem]) -> Trunk:
    """The requests' shared beginnings, run."""
    return Trunk(arch, shared_beginnings(problems))


class PackedSuffix:
    """Suffixes of the rows of some requests, to be run again and again from vectors at their lookup tokens.

    Requests can leave (`keep`) and join (`extend`) between runs; the rest keeps its place and its bits.

    Attributes:
        init: ``[E, d]`` clean activation at ``site`` and row 0's lookup token, in the stream's dtype.
        kl_clean: ``[E, d]`` clean output of the last block at the KL rows.
        checkpointed: run blocks again in the backward instead of keeping what they saved.
    """

    def __init__(self, arch: ResolvedArch, trunk: Trunk, injection: Injection) -> None:
        self._arch, self._trunk, self._at = arch, trunk, injection
        self._start = injection.layer if injection.inside else injection.layer + 1
        self._edits: list[Placed] = []
        self._hidden = torch.empty(0)
        self._calls: list[Call] = []
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._runner = BlockRunner(arch)
        self.init = self.kl_clean = torch.empty(0)
        self.checkpointed = False

    @property
    def tokens(self) -> int:
        """Tokens that every run computes."""
        return sum(edit.tokens for edit in self._edits)

    def extend(self, problems: Sequence[Problem]) -> None:
        """Capture more requests: one clean forward over their tokens."""
        prefix = Forest(self._trunk.forest)
        shift = 0 if not self._stores else len(next(iter(self._stores.values()))[0]) - prefix.offset
        edits: list[Placed] = []
        ids: list[int] = []
        places: list[int] = []
        firsts: list[int] = []
        for problem in problems:
            edit, first, own_ids, own_places = place(problem, prefix)
            firsts.append(len(ids) + first)
            edits.append(edit)
            ids += own_ids
            places += own_places
        captured = Capture(self._arch, self._trunk, prefix, edits, ids, places, self._at, self._start)
        number = {prefix.offset + i: prefix.offset + i + shift for i in range(len(prefix))} if shift else {}
        self._append(captured, [edit.renumbered(number) for edit in edits], firsts)

    def _append(self, new: Capture, edits: list[Placed], firsts: list[int]) -> None:
        dtype = stream_dtype(new.hidden.dtype)
        init = new.site[torch.tensor(firsts, device=new.site.device)].to(dtype)
        if not self._edits:
            self._hidden, self._calls, self._stores = new.hidden.to(dtype), new.calls, new.stores(self._trunk)
            self.init, self.kl_clean = init, new.kl_clean
        else:
            self._hidden = torch.cat([self._hidden, new.hidden.to(dtype)])
            self._calls = [
                (name, joined(mine, theirs))
                for (name, mine), (_, theirs) in zip(self._calls, new.calls, strict=True)
            ]
            for layer, (k, v) in self._stores.items():
                k_new, v_new = new.own(layer)
                self._stores[layer] = (torch.cat([k, k_new]), torch.cat([v, v_new]))
            self.init = torch.cat([self.init, init])
            self.kl_clean = torch.cat([self.kl_clean, new.kl_clean])
        self._edits += edits
        self._arrange()

    def keep(self, positions: Sequence[int]) -> None:
        """Keep the requests at these positions, in this order; the others leave."""
        starts = [0]
        for edit in self._edits:
            starts.append(starts[-1] + edit.tokens)
        tokens = [t for i in positions for t in range(starts[i], starts[i + 1])]
        kept = [self._edits[i] for i in positions]
        trunk = len(self._trunk.forest)
        used = sorted({c for edit in kept for columns, *_ in edit.branches for c in columns if c >= trunk})
        number = {old: trunk + new for new, old in enumerate(used)}
        self._edits = [edit.renumbered(number) for edit in kept]
        before = len(self._hidden)
        at = torch.tensor(tokens, dtype=torch.int64, device=self._hidden.device)
        self._hidden = self._hidden[at]
        self._calls = [(name, at_tokens(named, at, before)) for name, named in self._calls]
        rows = torch.tensor([*range(trunk), *used], dtype=torch.int64, device=at.device)
        self._stores = {
            layer: (k[rows.to(k.device)], v[rows.to(v.device)]) for layer, (k, v) in self._stores.items()
        }
        edits = torch.tensor(list(positions), dtype=torch.int64, device=at.device)
        self.init, self.kl_clean = (
            self.init[edits.to(self.init.device)],
            self.kl_clean[edits.to(self.kl_clean.device)],
        )
        self._arrange()

    def _arrange(self) -> None:
        """Index tensors of the present requests."""
        device = self._hidden.device
        branches, lookup, owner, nll, kl, kl_columns = [], [], [], [], [], []
        start = 0
        for index, edit in enumerate(self._edits):
            nll += [start + token for token in edit.nll]
            kl.append(start + edit.kl)
            kl_columns.append(edit.branches[edit.kl_branch][0])
            for columns, count, shift in edit.branches:
                branches.append(Branch(start, start + count, columns))
                lookup.append(start + shift)
                owner.append(index)
                start += count
        self._lookup = torch.tensor(lookup, device=device)
        self._owner = torch.tensor(owner, device=device)
        self._plan = Plan.of(branches, device)
        early = self._at.loss_layer + 1 < self._arch.depth
        wanted = sorted({*nll, *([] if early else kl)})
        number = {token: i for i, token in enumerate(wanted)}
        self._wanted = torch.tensor(wanted, dtype=torch.int64, device=device)
        self._nll = torch.tensor([number[token] for token in nll], device=device)
        self._kl_tokens = torch.tensor(kl, device=device)
        if early:
            # A KL token is a lookup token: above the loss layer it sees its prefix and itself only.
            self._last = Plan.of([Branch(i, i + 1, columns) for i, columns in enumerate(kl_columns)], device)
            self._kl = torch.arange(len(kl), device=device)
            tokens, total = self._kl_tokens, len(self._hidden)
            self._kl_calls = [(name, at_tokens(named, tokens, total)) for name, named in self._calls]
        else:
            self._last = Plan.of(branches, device, wanted)
            self._kl = torch.tensor([number[token] for token in kl], device=device)

    def run(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden rows before the final norm, with ``delta [E, d]`` added: loss rows ``[R, d]``, KL rows ``[E, d]``.

        Loss rows are in order of request, row and target token. Differentiable in ``delta``; call it, and its
        backward, inside `running`.
        """
        at, depth = self._at, self._arch.depth
        shift = delta.to(self._hidden)[self._owner]
        if at.inside:
            hidden = self._block_with(shift)
        else:
            hidden = self._hidden.index_put((self._lookup,), shift, accumulate=True)[None]
        done = at.layer + 1
        early = at.loss_layer + 1 < depth
        for layer in range(done, at.loss_layer + 1 if early else depth - 1):
            hidden = self._block(layer, hidden, self._calls, self._plan)
        if early:
            nll_rows = hidden[0, self._wanted.to(hidden.device)]
            hidden = hidden[:, self._kl_tokens.to(hidden.device)]
            for layer in range(at.loss_layer + 1, depth):
                hidden = self._block(layer, hidden, self._kl_calls, self._last)
            return nll_rows[self._nll.to(nll_rows.device)], hidden[0]
        wanted = hidden[:, self._wanted] if done >= depth else self._last_block(hidden)
        return wanted[0, self._nll.to(wanted.device)], wanted[0, self._kl.to(wanted.device)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context for `run` and its backward: attention handed over, residual stream in the stream's dtype."""
        with (
            attending(self._arch, self._runner.attend),
            wide_residual(self._arch),
            fused_activations(self._arch),
        ):
            yield

    def _block(self, layer: int, hidden: Tensor, calls: list[Call], plan: Plan) -> Tensor:
        call = calls[layer - self._start]
        return recomputed(
            lambda h: self._runner.block(layer, h, call, plan, self._store), hidden, self.checkpointed
        )

    def _last_block(self, hidden: Tensor) -> Tensor:
        layer = self._arch.depth - 1
        call, plan, wanted = self._calls[layer - self._start], self._last, self._wanted
        return recomputed(
            lambda h: self._runner.block_at(layer, h, call, plan, self._store, wanted),
            hidden,
            self.checkpointed,
        )

    def _store(self, layer: int, _k: Tensor, _v: Tensor) -> tuple[Tensor, Tensor]:
        return self._stores[layer]

    def _block_with(self, shift: Tensor) -> Tensor:
        """The injected block, with the vectors added to its MLP's last matrix."""
        total = len(self._hidden)

        def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            rows = output.reshape(total, -1).to(shift.dtype)
            return rows.index_put((self._lookup,), shift, accumulate=True).reshape(output.shape)

        handle = self._arch.mlp_out(self._at.layer).register_forward_hook(add)
        try:
            return self._block(self._at.layer, self._hidden[None], self._calls, self._plan)
        finally:
            handle.remove()
