"""Texts for statistics: plain text, JSON lines, gzip, directories, or a data set of the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, get_args

__all__ = ["Corpus", "Documents", "read_corpus"]

Documents = Literal["paragraph", "line", "file"]
_SUFFIXES = (".txt", ".jsonl", ".json")
# Short names as the original programs spell them, and where these data sets are now.
_HUB = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


class Corpus:
    """Texts that can be read any number of times, one at a time.

    Args:
        name: in file names of statistics.
        read: returns a fresh iterator over the texts.
        length: number of texts, if known.
    """

    def __init__(self, name: str, read: Callable[[], Iterator[str]], length: int | None = None) -> None:
        self.name, self._read, self._length = name, read, length

    def __iter__(self) -> Iterator[str]:
        return self._read()

    def __len__(self) -> int:
        """Number of texts; reads the corpus once where it is not known."""
        if self._length is None:
            self._length = sum(1 for _ in self._read())
        return self._length

    def sample(self, limit: int, *, seed: int = 1) -> Corpus:
        """The first `limit` texts of the corpus shuffled by ``random.Random(seed)``, in that order.

        With seed 1 this is the sample of ROME and MEMIT. The texts of the sample are kept in memory, the others never.

        Raises:
            ValueError: limit < 1.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit must be an integer >= 1, got {limit!r}")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        place = {index: position for position, index in enumerate(order[:limit])}
        chosen = [""] * len(place)
        for index, text in enumerate(self._read()):
            if index in place:
                chosen[place[index]] = text
        return Corpus(self.name, lambda: iter(chosen), len(chosen))


def read_corpus(
    source: str | Path,
    limit: int | None = None,
    *,
    field: str = "text",
    documents: Documents = "paragraph",
    seed: int = 1,
) -> Corpus:
    """Open a corpus.

    Args:
        source: a ``.txt``, ``.jsonl`` or ``.json`` file (a list of strings or objects), each also as ``.gz``; any other
            file is plain text; a directory of such files, read in order of their paths; or "hub:wikipedia",
            "hub:wikitext", "hub:owner/name" or "hub:owner/name:config" (needs the `datasets` package).
        limit: sample this many texts, as `Corpus.sample`; None takes all, in order.
        field: of an object that holds the text.
        documents: what is one text in a plain-text file: what blank lines separate, a line, or the whole file.
        seed: of the sample.

    Raises:
        ValueError: no such file, nothing in it, a damaged file (while reading: file and line are named), or an unknown
            value of documents.
        RuntimeError: a hub data set without the `datasets` package.
    """
    if documents not in get_args(Documents):
        raise ValueError(f"documents must be one of {', '.join(get_args(Documents))}, got {documents!r}")
    if str(source).startswith("hub:"):
        corpus = _hub(str(source).removeprefix("hub:"), field)
    else:
        corpus = _local(Path(source), field, documents)
    if next(iter(corpus), None) is None:
        raise ValueError(f"corpus {str(source)!r}: must hold at least one text, holds none")
    return corpus if limit is None else corpus.sample(limit, seed=seed)


def _local(path: Path, field: str, documents: Documents) -> Corpus:
    if not path.exists():
        raise ValueError(f"corpus {str(path)!r}: no such file or directory")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in _SUFFIXES)
        if not files:
            raise ValueError(f"corpus {str(path)!r}: holds no {', '.join(_SUFFIXES)} file (or .gz of one)")

    def read() -> Iterator[str]:
        for file in files:
            yield from _read_file(file, field, documents)

    return Corpus(path.resolve().name.split(".")[0] or "corpus", read)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_file(path: Path, field: str, documents: Documents) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            kind = _kind(path)
            if kind == ".json":
                yield from _json_list(json.load(file), field)
            elif kind == ".jsonl":
                for line in file:
                    number += 1
                    if line.strip():
                        yield _text_of(json.loads(line), field)
            elif documents == "file":
                yield file.read()
            else:
                yield from _paragraphs(file) if documents == "paragraph" else _lines(file)
    except (UnicodeDecodeError, EOFError, zlib.error, OSError, ValueError) as error:
        where = f" line {number}" if number else ""
        raise ValueError(f"corpus {str(path)!r}{where}: cannot be read ({error})") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _lines(file: IO[str]) -> Iterator[str]:
    return (line.rstrip("\n") for line in file if line.strip())


def _paragraphs(file: IO[str]) -> Iterator[str]:
    held: list[str] = []
    for line in file:
        if line.strip():
            held.append(line.rstrip("\n"))
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def _json_list(document: Any, field: str) -> Iterator[str]:
    if not isinstance(document, list):
        raise ValueError(f"must be a list of texts, is a {type(document).__name__}")
    for item in document:
        yield _text_of(item, field)


def _text_of(item: Any, field: str) -> str:
    text = item.get(field) if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ValueError(
            f"must be a string or an object with a string in field {field!r}, got {str(item)[:60]!r}"
        )
    return text


def _hub(name: str, field: str) -> Corpus:
    try:
        from datasets import load_dataset
    except ImportError:
        raise RuntimeError(
            f"corpus 'hub:{name}': needs the datasets package; run `pip install fastedit-kernels[datasets]`, "
            "or pass a file"
        ) from None
    repository, _, config = name.partition(":")
    repository, default = _HUB.get(repository, (repository, None))
    data = load_dataset(repository, config or default, split="train")
    if field not in data.column_names:
        raise ValueError(
            f"field must be one of {', '.join(data.column_names)} in {repository!r}, got {field!r}"
        )

    def read() -> Iterator[str]:
        return (row[field] for row in data)

    return Corpus(name.partition(":")[0].replace("/", "_"), read, len(data))
