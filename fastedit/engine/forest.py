"""Token rows that share beginnings, as branches: every token that rows have in common is there once.

A token's activation depends on the tokens before it only. So rows with a common beginning (a context template before
every request, the subject at the head of several prompts) share its activations exactly, and the common tokens need
to be run once. Sharing is decided by token ids, never by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Branch", "Forest"]


@dataclass(frozen=True)
class Branch:
    """Consecutive tokens ``start .. stop-1`` of a forest that follow the tokens ``columns``, in order of position."""

    start: int
    stop: int
    columns: tuple[int, ...]


@dataclass
class Forest:
    """Rows inserted one after another; only the part of a row that no earlier row has makes a new branch.

    Tokens are numbered across ``trunk`` (a finished forest that this one grows on) and this forest: those of the trunk
    come first.

    Attributes:
        ids, positions: token id and position of this forest's own tokens.
        branches: own branches; ``start`` and ``stop`` count own tokens, ``columns`` are numbers across both.
    """

    trunk: Forest | None = None
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    _child: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Number of tokens of the trunk: the number of this forest's first own token."""
        return 0 if self.trunk is None else self.trunk.offset + len(self.trunk.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def _find(self, parent: int, token: int) -> int | None:
        found = self._child.get((parent, token))
        if found is None and self.trunk is not None:
            return self.trunk._find(parent, token)
        return found

    def insert(self, row: Sequence[int]) -> tuple[int, ...]:
        """Add a row; returns the number of the token at each of its positions."""
        path: list[int] = []
        for token in row:
            known = self._find(path[-1] if path else -1, token)
            if known is None:
                break
            path.append(known)
        if len(path) < len(row):
            start, columns, offset = len(self.ids), tuple(path), self.offset
            for token in row[len(path) :]:
                number = offset + len(self.ids)
                self._child[(path[-1] if path else -1, token)] = number
                self.ids.append(token)
                self.positions.append(len(path))
                path.append(number)
            self.branches.append(Branch(start, len(self.ids), columns))
        return tuple(path)

    @classmethod
    def common(
        cls, rows_of: Sequence[Sequence[Sequence[int]]], *, least: int | None = None, most: int | None = None
    ) -> Forest:
        """The beginnings that rows of at least ``least`` different owners have in common.

        Args:
            rows_of: per owner (a request), its rows.
            least: ``None``: two, and one in 32 of very many owners. There any two may agree by chance, and what only
                a few share is better left with them.
            most: tokens that the result may have; it takes more owners to share one until they fit.
        """
        least = max(2, len(rows_of) // 32) if least is None else least
        while True:
            found = cls._shared(rows_of, least)
            if most is None or len(found) <= most or least > len(rows_of):
                return found
            least *= 2

    @classmethod
    def _shared(cls, rows_of: Sequence[Sequence[Sequence[int]]], least: int) -> Forest:
        whole = cls()
        owners: list[set[int]] = []
        for owner, rows in enumerate(rows_of):
            for row in rows:
                path = whole.insert(row)
                owners.extend(set() for _ in range(len(whole) - len(owners)))
                for number in path:
                    # A token shared by enough owners needs no more counting: sets stay small.
                    if len(owners[number]) < least:
                        owners[number].add(owner)
        found = cls()
        for rows in rows_of:
            for row in rows:
                path = whole.insert(row)
                shared = next((i for i, number in enumerate(path) if len(owners[number]) < least), len(path))
                found.insert(row[:shared])
        return found
