"""Method options from text and files: what is accepted, how it is read, and what the rest is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastedit.cli.settings import parse_layers, read_settings


@dataclass(frozen=True, kw_only=True)
class Options:
    layers: tuple[int, ...] = ()
    rate: float = 0.5
    steps: int = 3
    on: bool = True
    last: int | None = None
    place: Literal["first", "last"] = "last"
    pairs: tuple[tuple[int, int], ...] = ()
    texts: tuple[str, ...] | None = None
    name: str = ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("layers=3,4", (3, 4)),
        ("layers=3", (3,)),
        ("layers=3-5", (3, 4, 5)),
        ("layers=1, 3-5", (1, 3, 4, 5)),
        ("layers=[]", ()),
        ("rate=1e-3", 1e-3),
        ("rate=2", 2.0),
        ("on=False", False),
        ("on=true", True),
        ("last=none", None),
        ("last=null", None),
        ("last=7", 7),
        ("place=first", "first"),
        ("pairs=[[5, 10], [10, 10]]", ((5, 10), (10, 10))),
        ('texts=["{}", "So. {}"]', ("{}", "So. {}")),
        ("name=12", "12"),
        ("name=a=b", "a=b"),
    ],
)
def test_assignments_are_read_by_type(text: str, value: object) -> None:
    (found,) = read_settings(Options, assignments=[text]).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=NaN", "rate must be a number, got 'NaN'"),
        ("rate=Infinity", "rate must be a number, got 'Infinity'"),
        ("steps=1.5", "steps must be an integer, got '1.5'"),
        ("steps=true", "steps must be an integer, got 'true'"),
        ("on=1", "on must be true or false, got '1'"),
        ("last=x", "last must be an integer or none, got 'x'"),
        ("place=middle", "place must be one of 'first', 'last', got 'middle'"),
        ("layers=a,b", "layers must be a list of .an integer., got 'a,b'"),
        ("pairs=5,10", "pairs must be a list of "),
        ("stepz=1", "unknown option 'stepz'; known: layers, rate, steps"),
        ("=1", "--set must be key=value, got '=1'"),
        ("layers=5-3", "--set layers must have ascending ranges, got '5-3'"),
    ],
)
def test_wrong_assignments_are_told_the_rule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(Options, assignments=[text])


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"layers": [1], "rate": 1, "steps": 9}))
    found = read_settings(Options, file=path, assignments=["steps=5"], layers="6-7")
    assert found == {"layers": (6, 7), "rate": 1.0, "steps": 5}
    assert isinstance(found["rate"], float)


def test_an_option_is_given_once() -> None:
    with pytest.raises(ValueError, match="--set must give steps once, got '4' and '5'"):
        read_settings(Options, assignments=["steps=4", " steps =5"])
    with pytest.raises(ValueError, match="--layers must not be given with --set layers, got '6-7' and '2'"):
        read_settings(Options, assignments=["layers=2"], layers="6-7")


@given(st.lists(st.integers(0, 200), min_size=1, unique=True))
def test_layer_lists_round_trip(layers: list[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == layers


@given(st.integers(0, 100), st.integers(0, 100))
def test_layer_ranges_include_both_ends(low: int, more: int) -> None:
    assert parse_layers(f" {low}-{low + more}") == list(range(low, low + more + 1))


def test_absurd_ranges_are_refused_before_they_fill_the_memory() -> None:
    with pytest.raises(ValueError, match="--layers must be below 10000, got '0-99999999999999'"):
        parse_layers("0-99999999999999")


@given(st.text(max_size=12))
def test_layers_are_read_or_refused_in_one_line(text: str) -> None:
    try:
        layers = parse_layers(text)
    except ValueError as error:
        assert str(error).startswith("--layers must") and repr(text) in str(error)
    else:
        assert layers and len(set(layers)) == len(layers) and min(layers) >= 0
