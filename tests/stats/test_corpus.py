"""Reading texts: every format and container, samples as the originals draw them, errors with file and line."""

from __future__ import annotations

import gzip
import json
import random
import sys
from types import SimpleNamespace

import pytest

from fastedit.stats import Corpus, read_corpus

PARAGRAPHS = "First line\nsecond line\n\n\n  \nAnother — paragraph\n"


def write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_formats(tmp_path, zipped):
    lines = '{"text": "a"}\n\n{"text": "b", "title": "t"}\n"c"\n'
    plain = write(tmp_path / f"p.txt{zipped}", PARAGRAPHS)
    assert list(read_corpus(plain)) == ["First line\nsecond line", "Another — paragraph"]
    assert list(read_corpus(plain, documents="line")) == ["First line", "second line", "Another — paragraph"]
    assert list(read_corpus(plain, documents="file")) == [PARAGRAPHS]
    assert list(read_corpus(write(tmp_path / f"l.jsonl{zipped}", lines))) == ["a", "b", "c"]
    listed = write(tmp_path / f"l.json{zipped}", json.dumps(["a", {"text": "b"}]))
    assert list(read_corpus(listed)) == ["a", "b"]
    assert list(read_corpus(write(tmp_path / f"f.jsonl{zipped}", '{"body": "x"}'), field="body")) == ["x"]


def test_directories_are_read_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl.gz", '{"text": "three"}')
    write(tmp_path / "a.txt", "one\n\ntwo")
    write(tmp_path / "notes.md", "not this")
    corpus = read_corpus(tmp_path)
    assert list(corpus) == ["one", "two", "three"] == list(corpus)
    assert len(corpus) == 3 and corpus.name == tmp_path.name


def test_names():
    assert Corpus("x", lambda: iter(["a"])).name == "x"


@pytest.mark.parametrize("seed", [1, 7])
def test_sample_is_that_of_the_originals(tmp_path, seed):
    texts = [f"text {i}" for i in range(50)]
    path = write(tmp_path / "wiki.txt", "\n".join(texts))
    order = list(range(50))
    random.Random(seed).shuffle(order)
    sample = read_corpus(path, 12, documents="line", seed=seed)
    assert list(sample) == [texts[i] for i in order[:12]] == list(sample)
    assert len(sample) == 12 and sample.name == "wiki"
    assert len(read_corpus(path, 500, documents="line")) == 50


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.txt", " \n\n", "must hold at least one text"),
        ("j.jsonl", '{"text": "a"}\n{"text"', "line 2: cannot be read"),
        ("j.jsonl", '{"text": "a"}\n{"body": "b"}', "line 2.*field 'text'"),
        ("j.jsonl", '{"text": 5}', "line 1.*field 'text'"),
        ("j.json", '{"text": "a"}', "must be a list of texts"),
        ("j.json", "[1]", "field 'text'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=rf"corpus '.*{name}'.*{message}") as error:
        list(read_corpus(write(tmp_path / name, text)))
    assert "\n" not in str(error.value)


def test_damaged_containers_are_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(PARAGRAPHS.encode() * 50)[:60])
    (tmp_path / "no.txt.gz").write_bytes(b"plain")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"corpus '.*{path.name}'.*cannot be read"):
            list(read_corpus(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be an integer >= 1, got 0"),
        ({"documents": "page"}, "documents must be one of paragraph, line, file, got 'page'"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_corpus(write(tmp_path / "a.txt", "a"), **options)


def test_missing_and_empty(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_corpus(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        read_corpus(tmp_path)


def test_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install fastedit-kernels\[datasets\]"):
        read_corpus("hub:wikipedia")


def test_hub_names(monkeypatch):
    asked = []

    class Data(list):
        column_names = ("title", "text")

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return Data({"text": f"article {i}"} for i in range(9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = read_corpus("hub:wikipedia", 3)
    order = list(range(9))
    random.Random(1).shuffle(order)
    assert list(corpus) == [f"article {i}" for i in order[:3]] and corpus.name == "wikipedia"
    assert read_corpus("hub:me/mine:small").name == "me_mine"
    assert asked == [("wikimedia/wikipedia", "20231101.en", "train"), ("me/mine", "small", "train")]
    with pytest.raises(ValueError, match="field must be one of title, text"):
        read_corpus("hub:me/mine", field="body")
