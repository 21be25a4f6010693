"""EditRequest and Probe: what they accept, what they refuse and how they say it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastedit
from fastedit.request import PROBE_KINDS, EditRequest, Probe, as_requests, fill, split_once

FACT = {"id": "7", "prompt": "The {} is in", "subject": "Eiffel Tower", "target_new": "Rome"}
PROBE = {"prompt": "Where is it? In", "target": "Rome", "kind": "paraphrase"}


def test_request_fills_its_prompt() -> None:
    request = EditRequest(**FACT)
    assert request.text == "The Eiffel Tower is in"
    assert request.prompt == "The {} is in"
    assert (request.target_true, request.relation, request.probes) == (None, None, ())
    assert fastedit.EditRequest is EditRequest
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.prompt = "x"
    assert hash(request) == hash(EditRequest(**FACT))


def test_prompt_with_the_subject_in_it_is_made_a_template() -> None:
    assert EditRequest(**{**FACT, "prompt": "The Eiffel Tower is in"}) == EditRequest(**FACT)


def test_other_braces_are_text() -> None:
    request = EditRequest(**{**FACT, "prompt": "f({0}) = {name} {} }{", "subject": "{x}"})
    assert request.text == "f({0}) = {name} {x} }{"
    assert EditRequest.from_dict(request.to_dict()) == request
    assert fill("{a} {} {b}", "{}") == "{a} {} {b}"
    with pytest.raises(ValueError, match=r"^a title must hold exactly one '\{\}', holds 2: '\{\}\{\}'$"):
        split_once("{}{}", "a title")


def test_probes_of_a_kind() -> None:
    probes = [Probe(**PROBE), Probe(prompt="Go on:", target="", kind="generation")]
    request = EditRequest(**FACT, probes=probes)
    assert request.probes == tuple(probes)
    assert request.probes_of("paraphrase") == (probes[0],)
    assert request.probes_of("attribute") == ()
    with pytest.raises(ValueError, match="kind must be one of rewrite, paraphrase, .*, is 'neighborhood'"):
        request.probes_of("neighborhood")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt": "It is in"},
            "field 'prompt' holds neither '{}' nor the subject 'Eiffel Tower': 'It is in'",
        ),
        ({"prompt": "{} and {}"}, "field 'prompt' must hold exactly one '{}', holds 2: '{} and {}'"),
        (
            {"prompt": "Eiffel Tower, Eiffel Tower"},
            "field 'prompt' holds the subject 'Eiffel Tower' 2 times, write '{}' at the edited one: "
            "'Eiffel Tower, Eiffel Tower'",
        ),
        ({"prompt": ""}, "field 'prompt' must not be empty, is ''"),
        ({"subject": " "}, "field 'subject' must not be empty, is ' '"),
        ({"target_new": ""}, "field 'target_new' must not be empty, is ''"),
        ({"target_new": "\n"}, r"field 'target_new' must not be empty, is '\n'"),
        ({"target_new": math.nan}, "field 'target_new' must be a string, is float nan"),
        ({"target_new": None}, "field 'target_new' must be a string, is NoneType None"),
        ({"target_new": ["Rome"]}, "field 'target_new' must be a string, is list ['Rome']"),
        ({"target_true": 3}, "field 'target_true' must be a string, is int 3"),
        ({"target_true": ""}, "field 'target_true' must not be empty, is ''"),
        ({"relation": b"x"}, "field 'relation' must be a string, is bytes b'x'"),
        ({"subject": "a\ud800"}, r"field 'subject' holds a lone surrogate, which is not text: 'a\ud800'"),
        ({"probes": ["x"]}, "field 'probes' must be a tuple of Probe, is ('x',)"),
        ({"probes": None}, "field 'probes' must be a tuple of Probe, is None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_field_is_named(change, message) -> None:
    with pytest.raises(ValueError) as error:
        EditRequest(**{**FACT, **change})
    assert str(error.value) == f"request '7': {message}"


@pytest.mark.parametrize("name", ["", " ", None, 7, math.nan])
def test_a_bad_id_is_named(name) -> None:
    with pytest.raises(ValueError, match="field 'id' must be a string that is not blank"):
        EditRequest(**{**FACT, "id": name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rephrase"}, f"probe: field 'kind' must be one of {', '.join(PROBE_KINDS)}, is 'rephrase'"),
        ({"kind": None}, f"probe: field 'kind' must be one of {', '.join(PROBE_KINDS)}, is None"),
        ({"target": ""}, "probe: field 'target' must not be empty, is ''"),
        ({"prompt": 5}, "probe: field 'prompt' must be a string, is int 5"),
        ({"avoid": ""}, "probe: field 'avoid' must not be empty, is ''"),
        ({"group": 1.5}, "probe: field 'group' must be a string, is float 1.5"),
    ],
)
def test_a_bad_probe_is_named(change, message) -> None:
    with pytest.raises(ValueError) as error:
        Probe(**{**PROBE, **change})
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        EditRequest.from_dict({**FACT, "probes": [PROBE, {**PROBE, **change}]})
    assert str(error.value) == f"request '7': field 'probes[1]': {message}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "request must be an object with fields, is list []"),
        ({}, "request: field 'id' is missing"),
        ({"id": "7"}, "request '7': field 'prompt' is missing"),
        ({**FACT, "probes": 5}, "request '7': field 'probes' must be a list, is 5"),
        (
            {**FACT, "probes": [5]},
            "request '7': field 'probes[0]': probe must be an object with fields, is int 5",
        ),
        ({**FACT, "probes": [{}]}, "request '7': field 'probes[0]': probe: field 'prompt' is missing"),
        (
            {**FACT, "target": "x"},
            "request '7': field 'target' is unknown "
            "(known: id, prompt, subject, target_new, target_true, relation, probes)",
        ),
    ],
)
def test_from_dict_names_what_is_wrong(record, message) -> None:
    with pytest.raises(ValueError) as error:
        EditRequest.from_dict(record)
    assert str(error.value) == message


def test_a_long_value_is_cut_to_one_line() -> None:
    with pytest.raises(ValueError) as error:
        EditRequest(**{**FACT, "prompt": "x\n" * 500})
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_as_requests_takes_one_or_many_in_any_schema() -> None:
    request = EditRequest(**FACT)
    assert as_requests(request) == [request]
    assert as_requests(FACT) == as_requests([FACT]) == as_requests(iter([request])) == [request]
    made = as_requests(
        [FACT, {k: v for k, v in FACT.items() if k != "id"}, {**FACT, "target_new": {"str": "Rome"}}]
    )
    assert [item.id for item in made] == ["7", "1", "7"]
    assert {item.target_new for item in made} == {"Rome"}
    for bad in ("text", b"x", 5, None):
        with pytest.raises(ValueError, match="requests must be EditRequest, dict or a list of them"):
            as_requests(bad)
    with pytest.raises(ValueError, match="at least one request"):
        as_requests([])
    with pytest.raises(ValueError, match=r"^request '1': must be an object with fields, is str$"):
        as_requests([request, "x"])
    with pytest.raises(
        ValueError, match=r"^request '0': fields \('a'\) match no known schema; known: fastedit, "
    ):
        as_requests({"a": 1})


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
PLAIN = TEXT.filter(lambda text: "{}" not in text)
PROBES = st.builds(
    Probe,
    prompt=TEXT,
    target=TEXT,
    avoid=st.none() | TEXT,
    kind=st.sampled_from(list(PROBE_KINDS)),
    group=st.none() | TEXT,
)
REQUESTS = st.builds(
    lambda before, after, **rest: EditRequest(prompt=before.rstrip("{") + "{}" + after.lstrip("}"), **rest),
    before=PLAIN | st.just(""),
    after=PLAIN | st.just(""),
    id=TEXT,
    subject=TEXT,
    target_new=TEXT,
    target_true=st.none() | TEXT,
    relation=st.none() | TEXT,
    probes=st.lists(PROBES, max_size=3).map(tuple),
)


@given(request=REQUESTS)
def test_dict_round_trip(request) -> None:
    assert EditRequest.from_dict(request.to_dict()) == request
    assert as_requests(request.to_dict()) == [request]
    assert request.text == request.prompt.replace("{}", request.subject)
