"""What ops write must be memory of its own: no element twice in one tensor, none in two of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["check_written", "share_memory"]

_Terms = list[tuple[int, int]]  # (step, count): a number of step * x for an x in [0, count)
_MOST_BRANCHES = 10_000  # of a search; what is undecided after them passes, as it does in torch


def check_written(written: Mapping[str, Tensor]) -> None:
    """Raise ValueError, by name, for a tensor to be written that no kernel can write: one that overlaps itself (an
    expanded row), that shares memory with another of them, or that is a lazily negated view.

    Addresses, sizes and strides only, exact for them, no synchronisation. Tensors without memory (meta, fake) pass, and
    so does all that is traced by torch.compile: there the op is given tensors of its own, and what it wrote is copied
    back by torch, which refuses a copy onto itself.

        check_written({"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    """
    if torch.compiler.is_compiling():
        return
    ranges = []
    for name, tensor in written.items():
        if tensor.is_neg():
            raise ValueError(f"{name} must not be a negated view, got one that `resolve_neg` would copy")
        found = _range(tensor)
        if found is None:
            continue
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{name} must not overlap itself, got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        ranges.append((*found, name))
    ranges.sort()
    for index, (_, stop, name) in enumerate(ranges):
        for start, _, other in ranges[index + 1 :]:
            if start >= stop:
                break
            if _meet(written[name], written[other], start - ranges[index][0]):
                first, second = sorted((name, other), key=list(written).index)
                raise ValueError(f"{second} must not share memory with {first}, for both are written")


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether a byte belongs to both; False for tensors without memory of their own (meta, fake, being compiled)."""
    if torch.compiler.is_compiling():
        return False
    mine, its = _range(one), _range(other)
    if mine is None or its is None or mine[1] <= its[0] or its[1] <= mine[0]:
        return False
    return _meet(one, other, its[0] - mine[0])


def _range(tensor: Tensor) -> tuple[int, int] | None:
    """Addresses [start, stop) of a tensor; None without any."""
    try:
        if tensor.numel() == 0 or tensor.untyped_storage().device.type == "meta":
            return None
        start = tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # a wrapper of torch.func, say
        return None
    return start, start + _reach(_terms(tensor)) + 1


def _terms(tensor: Tensor) -> _Terms:
    """The addresses of a tensor's bytes as sums of steps, from its first one."""
    size = tensor.element_size()
    dims = [(stride * size, n) for stride, n in zip(tensor.stride(), tensor.shape) if n > 1]
    return sorted([*dims, (1, size)], reverse=True)


def _reach(terms: Iterable[tuple[int, int]]) -> int:
    return sum(step * (count - 1) for step, count in terms)


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    terms = _terms(tensor)
    if any(step == 0 for step, _ in terms):
        return True
    # Two indices of one byte differ first in some dimension, by at least 1, and in those after it by any amount.
    for index, (step, count) in enumerate(terms):
        after = [(other, 2 * n - 1) for other, n in terms[index + 1 :]]
        if _reaches(_reach(terms[index + 1 :]) - step, [(step, count - 1), *after]):
            return True
    return False


def _meet(one: Tensor, other: Tensor, distance: int) -> bool:
    """Whether a byte of `other`, which starts `distance` bytes after `one`, is one of `one`."""
    mine, its = _terms(one), _terms(other)
    counts: dict[int, int] = {}
    for step, count in (*mine, *its):
        counts[step] = counts.get(step, 1) + count - 1
    return _reaches(distance + _reach(its), sorted(counts.items(), reverse=True))


def _reaches(total: int, terms: _Terms) -> bool:
    """Whether `total` is a sum of the terms, which come in falling order of their steps."""
    left = [_reach(terms[index:]) for index in range(len(terms) + 1)]
    branches = [(0, total)]
    for _ in range(_MOST_BRANCHES):
        if not branches:
            return False
        index, rest = branches.pop()
        if rest == 0:
            return True
        if index == len(terms) or not 0 < rest <= left[index]:
            continue
        step, count = terms[index]
        least = max(0, -((left[index + 1] - rest) // step))
        most = min(count - 1, rest // step)
        # One of many choices at a time: the rest of them is a branch that starts after it.
        branches.extend(
            (index + 1, rest - step * x) for x in range(least, min(most, least + _MOST_BRANCHES) + 1)
        )
    return False
