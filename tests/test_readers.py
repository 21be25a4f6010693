"""Request files: every schema read, every kind of broken file refused with its place, files written whole."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_request import REQUESTS

from fastedit.readers import FORMATS, format_of, read_requests, request_from, write_requests
from fastedit.request import EditRequest, Probe

DATA = Path(__file__).parent / "data" / "requests"
PLAIN = {"id": "a", "prompt": "{} is in", "subject": "Paris", "target_new": "Rome"}


def _kinds(request: EditRequest) -> dict[str, int]:
    return dict(Counter(probe.kind for probe in request.probes))


# ------------------------------------------------------------------------------------------------ the schemas


def test_counterfact() -> None:
    first, second = read_requests(DATA / "counterfact.json")
    assert (first.id, first.prompt, first.subject) == ("7", "{}, created by", "Vega 12")
    assert (first.target_new, first.target_true, first.relation) == ("Honda", "Porsche", "P176")
    assert _kinds(first) == {"paraphrase": 2, "neighbourhood": 2, "attribute": 1, "generation": 2}
    assert _kinds(second) == {"paraphrase": 1}
    by_kind = {kind: first.probes_of(kind)[0] for kind in _kinds(first)}
    assert by_kind["paraphrase"] == Probe(
        prompt="It rained. Vega 12 is developed by", target="Honda", avoid="Porsche", kind="paraphrase"
    )
    # What the neighbours say must stay, and what subjects that always had the new answer say too.
    assert (by_kind["neighbourhood"].target, by_kind["neighbourhood"].avoid) == ("Porsche", "Honda")
    assert (by_kind["attribute"].target, by_kind["attribute"].avoid) == ("Honda", "Porsche")
    assert (by_kind["generation"].target, by_kind["generation"].avoid) == ("", None)


def test_condensed_rephrase_prompt_is_not_called_a_paraphrase() -> None:
    (request,) = read_requests(DATA / "condensed.json")
    assert (request.prompt, request.target_true) == ("The mother tongue of {} is", "French")
    assert _kinds(request) == {"generation": 1, "neighbourhood": 1}
    assert request.probes_of("generation")[0].target == "English"
    neighbour = request.probes_of("neighbourhood")[0]
    assert (neighbour.target, neighbour.avoid) == ("French", "English")


def test_zsre() -> None:
    problems: list[str] = []
    first, last = read_requests(DATA / "zsre.json", problems=problems)
    assert (first.id, first.prompt) == ("0", "What is the product made by {}?")
    assert (first.target_new, first.target_true) == ("unmanned aircraft", "uniform")
    assert _kinds(first) == {"paraphrase": 1, "locality": 1}
    locality = first.probes_of("locality")[0]
    assert (locality.prompt, locality.target) == (
        "nq question: who plays the bear in the film",
        "Walter Brook",
    )
    assert last.id == "2"
    assert last.probes_of("portability")[0].target == "Finland"
    assert problems == [f"{DATA / 'zsre.json'}: record 2: request '1': field 'alt' must not be empty, is ''"]
    with pytest.raises(ValueError, match="record 2: request '1': field 'alt'"):
        read_requests(DATA / "zsre.json")


def test_knowedit() -> None:
    first, second = read_requests(DATA / "knowedit.json")
    assert first.target_true is None  # "<|endoftext|>" stands for an unknown answer
    assert _kinds(first) == {"portability": 3, "locality": 2}
    assert [probe.group for probe in first.probes] == [
        *["Subject_Aliasing"] * 2,
        "Reasoning",
        "Relation_Specificity",
        "Forgetfulness",
    ]
    assert [probe.target for probe in first.probes] == [
        "Syria",
        "Syria",
        "Syrian pound",
        "male",
        "United States",
    ]
    assert (second.id, second.prompt) == ("1", "This is a passage about {}.")
    assert second.target_new == "He was educated in London."
    assert _kinds(second) == {"locality": 1}


def test_easyedit_request_dicts() -> None:
    first, second = read_requests(DATA / "easyedit.json")
    assert (first.prompt, first.target_new, first.target_true) == ("{}, the", "violin", "piano")
    assert _kinds(first) == {"paraphrase": 1, "portability": 1, "locality": 1}
    assert (second.target_new, second.target_true, second.probes) == (" chess", None, ())


def test_memit_request_dicts() -> None:
    requests = read_requests(DATA / "memit.jsonl")
    assert [request.id for request in requests] == ["180", "b", "2"]
    assert [request.target_true for request in requests] == ["London", None, None]
    assert [request.relation for request in requests] == ["hq", None, None]


def test_own_format() -> None:
    first, second = read_requests(DATA / "fastedit.jsonl")
    assert (first.id, first.relation) == ("tower", "city")
    assert _kinds(first) == {"paraphrase": 1, "neighbourhood": 1}
    assert (second.id, second.prompt) == ("1", "The capital of {} is")


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("counterfact.json", "counterfact"),
        ("condensed.json", "counterfact-condensed"),
        ("zsre.json", "zsre"),
        ("knowedit.json", "knowedit"),
        ("easyedit.json", "easyedit"),
        ("memit.jsonl", "memit"),
        ("fastedit.jsonl", "fastedit"),
    ],
)
def test_formats_are_told_apart_and_can_be_named(name, format) -> None:
    text = (DATA / name).read_text(encoding="utf-8")
    record = json.loads(text) if name.endswith(".json") else [json.loads(text.split("\n")[0])]
    assert format_of(record[0]) == format
    assert format in FORMATS
    problems: list[str] = []
    assert read_requests(DATA / name, format=format, problems=problems) == read_requests(
        DATA / name, problems=problems
    )
    # Every schema's requests survive the project's own.
    for request in read_requests(DATA / name, problems=problems):
        assert EditRequest.from_dict(request.to_dict()) == request


def test_flat_dict_with_a_case_id_keeps_its_true_answer() -> None:
    made = request_from({**PLAIN, "case_id": 3, "target_true": "Lyon"})
    assert (made.id, made.target_true) == ("3", "Lyon")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requested_rewrite": None}, "field 'requested_rewrite' must be an object, is NoneType None"),
        (
            {"requested_rewrite": {"prompt": "{} is", "subject": "x"}},
            "field 'requested_rewrite.target_new' is missing",
        ),
        (
            {"paraphrase_prompts": [1]},
            "field 'paraphrase_prompts' must be a string or a list of strings, is int 1",
        ),
        ({"case_id": True}, "field 'case_id' must be a string or an integer, is True"),
    ],
)
def test_counterfact_errors_name_the_records_own_field(change, message) -> None:
    record = json.loads((DATA / "counterfact.json").read_text(encoding="utf-8"))[0]
    with pytest.raises(ValueError) as error:
        request_from({**record, **change})
    assert str(error.value).split(": ", 1)[1] == message


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("zsre", {"src": "x"}, "request '0': field 'alt' is missing"),
        ("zsre", {"src": "x", "alt": 5}, "request '0': field 'alt' must be a string, is int 5"),
        (
            "zsre",
            {"src": "x y", "subject": "x", "alt": "a", "loc": "q"},
            "request '0': field 'loc_ans' is missing",
        ),
        (
            "knowedit",
            {**PLAIN, "portability": {"R": {"prompt": ["a", "b"], "ground_truth": ["c"]}}},
            "request 'a': field 'portability.R.ground_truth' must have one answer for each prompt, has 1 for 2",
        ),
        (
            "knowedit",
            {**PLAIN, "locality": {"R": {"prompt": ["a"], "ground_truth": [[]]}}},
            "request 'a': field 'locality.R.ground_truth': probe: field 'target' must be a string, "
            "is NoneType None",
        ),
        (
            "knowedit",
            {**PLAIN, "locality": []},
            "request 'a': field 'locality' must be an object, is list []",
        ),
        (
            "memit",
            {**PLAIN, "target_new": "Rome"},
            "request 'a': field 'target_new' must be an object, is str 'Rome'",
        ),
        ("memit", {**PLAIN, "target_new": {}}, "request 'a': field 'target_new.str' is missing"),
        ("easyedit", {"prompt": "x"}, "request '0': field 'subject' is missing"),
        ("fastedit", {**PLAIN, "x": 1}, "request 'a': field 'x' is unknown"),
        ("csv", PLAIN, f"format must be one of auto, {', '.join(FORMATS)}, is 'csv'"),
        ("auto", [], "request '0': must be an object with fields, is list"),
        ("auto", {}, f"request '0': fields (none) match no known schema; known: {', '.join(FORMATS)}"),
    ],
)
def test_schema_errors_name_the_field(format, record, message) -> None:
    with pytest.raises(ValueError) as error:
        request_from(record, format=format)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- the files


def _write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


LINE = json.dumps(PLAIN)
OTHER = json.dumps({**PLAIN, "id": "b"})


@pytest.mark.parametrize(
    "data",
    [
        f"[{LINE}, {OTHER}]",
        f"{LINE}\n{OTHER}",
        f"\n{LINE}\r\n\r\n{OTHER}\r\n",
        f"\ufeff[{LINE},\n{OTHER}]",
        gzip.compress(f"{LINE}\n{OTHER}\n".encode()),
    ],
    ids=["list", "lines", "windows-lines", "bom", "gzip"],
)
@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.gz", "r"])
def test_a_file_is_what_its_bytes_are(tmp_path, name, data) -> None:
    requests = read_requests(_write(tmp_path / name, data))
    assert [request.id for request in requests] == ["a", "b"]


def test_one_object_is_one_request(tmp_path) -> None:
    assert len(read_requests(_write(tmp_path / "r.json", json.dumps(PLAIN, indent=2)))) == 1


def test_limit_counts_requests(tmp_path) -> None:
    bad = json.dumps({**PLAIN, "target_new": ""})
    path = _write(tmp_path / "r.jsonl", f"{bad}\n{LINE}\n{OTHER}\n")
    problems: list[str] = []
    assert [request.id for request in read_requests(path, limit=1, problems=problems)] == ["a"]
    assert len(problems) == 1
    for limit in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="limit must be None or an integer of at least 1"):
            read_requests(path, limit=limit)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "file is empty"),
        (" \n\t\n", "file is empty"),
        (gzip.compress(b""), "file is empty"),
        (gzip.compress(LINE.encode() * 50)[:-20], "gzip data is truncated or corrupt: "),
        (b"\x1f\x8b" + b"\x08\x00nothing of the kind", "gzip data is truncated or corrupt: "),
        (b'{"a": "\xff"}', "not UTF-8 text: byte 7 is 0xff"),
        ("prompt,subject\n", "must hold a JSON list, object or JSON lines, begins with 'prompt,subject\\n'"),
        (f"[{LINE},\n{LINE[:-9]}", "line 2 column "),
        (f"[{LINE}", "line 1 column "),
        (f"{LINE}\n{LINE[:-9]}\n", "line 2 column "),
        (f"{LINE}\nx\n", "line 2 column 1: not valid JSON: Expecting value"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[]", "holds no valid request"),
        (f"[{LINE}, {OTHER}, {LINE}]", "record 3: request 'a': field 'id' is also that of record 1"),
        (f"{LINE}\n\n{LINE}", "line 3: request 'a': field 'id' is also that of line 1"),
        (f"[{LINE}, 5]", "record 2: request '1': must be an object with fields, is int"),
        (f"{LINE}\n[1]", "line 2: request '1': must be an object with fields, is list"),
        (
            '{"question": "?"}',
            "record 1: request '0': fields ('question') match no known schema; known: fastedit,",
        ),
        (f'{LINE}\n{{"prompt": "p"}}', "line 2: request '1': field 'subject' is missing"),
        ('[{"src": "a b", "alt": "c"}]', "record 1: request '0': field 'subject' is missing"),
        (
            f'{LINE}\n{{"id": "c", "prompt": "{{}} is", "subject": "x", "target_new": NaN}}',
            "line 2: request 'c': field 'target_new' must be a string, is float nan",
        ),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, data, message) -> None:
    path = _write(tmp_path / "requests.json", data)
    with pytest.raises(ValueError) as error:
        read_requests(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_problems_do_not_hide_a_file_without_requests(tmp_path) -> None:
    path = _write(tmp_path / "r.json", '[{"prompt": "p"}]')
    with pytest.raises(ValueError, match="holds no valid request, first: .*record 1: .*'subject' is missing"):
        read_requests(path, problems=[])


def test_first_record_decides_the_format(tmp_path) -> None:
    """A condensed record that lost a field must not turn into an EasyEdit dict and its prompt into a paraphrase."""
    record = json.loads((DATA / "condensed.json").read_text(encoding="utf-8"))[0]
    lame = {key: value for key, value in record.items() if not key.startswith("locality")} | {"case_id": 1}
    with pytest.raises(ValueError, match="record 2: request '1': field 'locality_ground_truth' is missing"):
        read_requests(_write(tmp_path / "r.json", json.dumps([record, lame])))


def test_missing_file_and_unknown_format(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        read_requests(tmp_path / "none.json")
    with pytest.raises(ValueError, match="format must be one of auto, fastedit"):
        read_requests(tmp_path / "none.json", format="csv")


# ------------------------------------------------------------------------------------------------- writing


@settings(max_examples=50)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=4, unique_by=lambda request: request.id),
    packed=st.booleans(),
)
def test_file_round_trip(tmp_path_factory, requests, packed) -> None:
    path = tmp_path_factory.mktemp("trip") / ("r.jsonl.gz" if packed else "r.jsonl")
    write_requests(path, requests)
    assert read_requests(path) == requests


def test_writing_is_reproducible_and_whole(tmp_path, monkeypatch) -> None:
    requests = read_requests(DATA / "fastedit.jsonl")
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_requests(tmp_path / name, requests)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "kept.jsonl"
    write_requests(path, requests[:1])
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_requests(path, requests)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz", "kept.jsonl"]


@settings(max_examples=80)
@given(cut=st.integers(0, 2000), flip=st.integers(0, 2000), value=st.integers(0, 255), packed=st.booleans())
def test_damaged_files_give_requests_or_one_line(tmp_path_factory, cut, flip, value, packed) -> None:
    data = (DATA / "counterfact.json").read_bytes()
    data = gzip.compress(data) if packed else data
    data = bytearray(data[: cut or None])
    data[flip % len(data)] = value
    path = _write(tmp_path_factory.mktemp("cut") / "r.json", bytes(data))
    try:
        read_requests(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
