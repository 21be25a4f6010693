"""Rows that share beginnings: every path spells its row, and no token of a common beginning is there twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastedit.engine.forest import Forest

ROWS = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12)


def spelled(forest: Forest, path: tuple[int, ...]) -> list[int]:
    trunk = forest.trunk
    ids = [*(trunk.ids if trunk is not None else []), *forest.ids]
    return [ids[number] for number in path]


@given(ROWS, ROWS)
def test_paths_spell_their_rows(first: list[list[int]], second: list[list[int]]) -> None:
    trunk = Forest()
    for row in first:
        assert spelled(trunk, trunk.insert(row)) == row
    forest = Forest(trunk)
    for row in second:
        assert spelled(forest, forest.insert(row)) == row
    beginnings = {tuple(row[: i + 1]) for row in [*first, *second] for i in range(len(row))}
    assert len(trunk) + len(forest) == len(beginnings)


@given(ROWS)
def test_branches_cover_the_tokens_in_order(rows: list[list[int]]) -> None:
    forest = Forest()
    for row in rows:
        forest.insert(row)
    at = 0
    for branch in forest.branches:
        assert (branch.start, len(branch.columns)) == (at, forest.positions[branch.start])
        assert all(column < branch.start for column in branch.columns)
        places = forest.positions[branch.start : branch.stop]
        assert places == list(range(len(branch.columns), len(branch.columns) + len(places)))
        at = branch.stop
    assert at == len(forest)


@given(st.lists(ROWS, max_size=4), st.integers(1, 3))
def test_the_common_beginnings_are_those_of_enough_owners(owners: list[list[list[int]]], least: int) -> None:
    found = Forest.common(owners, least=least)
    starts = [{tuple(row[: i + 1]) for row in rows for i in range(len(row))} for rows in owners]
    every = set().union(*starts)
    shared = {start for start in every if sum(start in own for own in starts) >= least}
    assert len(found) == len(shared)
    for start in shared:
        assert len(found.insert(list(start))) == len(start)
    assert len(found) == len(shared)
