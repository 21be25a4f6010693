"""Request files: JSON or JSON lines, plain or gzip, in any known schema; written as JSON lines.

A file is read as what its bytes are, not as what its name says: many data sets are JSON lines named ``.json``.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastedit.atomic_file import atomic_path
from fastedit.readers.schemas import FORMATS, format_of, request_from
from fastedit.request import EditRequest

__all__ = ["read_requests", "write_requests"]


def read_requests(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    limit: int | None = None,
    problems: list[str] | None = None,
) -> list[EditRequest]:
    """Reads a file of requests.

    Args:
        format: One of ``FORMATS``. "auto" takes the format of the first record for the whole file.
        limit: Stop after so many requests.
        problems: Where given, a record that is not a valid request is left out and its error appended here;
            otherwise the first such record raises. Data sets as published hold a few.

    Returns:
        The requests in the file's order. A record without an id is named by its place, from 0.

    Raises:
        ValueError: ``PATH: record N: request 'ID': field 'NAME' ...``; also for an empty or truncated file,
            malformed JSON, an unknown schema, two records with one id, or no valid record at all.
        OSError: the file cannot be opened.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format must be one of auto, {', '.join(FORMATS)}, is {format!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be None or an integer of at least 1, is {limit!r}")
    path = Path(path)
    requests: list[EditRequest] = []
    places: dict[str, str] = {}
    for number, (place, record) in enumerate(_records(path)):
        if len(requests) == limit:
            break
        if number == 0 and format == "auto":
            format = format_of(record) or "auto"
        try:
            request = request_from(record, format=format, default_id=str(number))
            if request.id in places:
                raise ValueError(f"request {request.id!r}: field 'id' is also that of {places[request.id]}")
        except ValueError as error:
            if problems is None:
                raise ValueError(f"{path}: {place}: {error}") from None
            problems.append(f"{path}: {place}: {error}")
            continue
        places[request.id] = place
        requests.append(request)
    if not requests:
        first = f", first: {problems[0]}" if problems else ""
        raise ValueError(f"{path}: holds no valid request{first}")
    return requests


def write_requests(path: str | os.PathLike[str], requests: Iterable[EditRequest]) -> None:
    """Writes requests as JSON lines, gzip-compressed where the name ends in ``.gz``.

    The file appears whole or not at all: it is written beside its place, flushed to disk and renamed.
    """
    path = Path(path)
    lines = [
        json.dumps(request.to_dict(), ensure_ascii=False, allow_nan=False) + "\n" for request in requests
    ]
    data = "".join(lines).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)  # no time stamp: the same requests give the same bytes
    with atomic_path(path) as part:
        part.write_bytes(data)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """("record 3" or "line 7", the parsed record), in order. A single object is a file of one record."""
    text = _text(path)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        raise ValueError(f"{path}: must hold a JSON list, object or JSON lines, begins with {text[:20]!r}")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if start == "[":
            where = f"line {error.lineno} column {error.colno}"
            raise ValueError(f"{path}: {where}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    else:
        whole = whole if isinstance(whole, list) else [whole]
        yield from ((f"record {number}", record) for number, record in enumerate(whole, start=1))
        return
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {number} column {error.colno}: not valid JSON: {error.msg}"
            ) from None
        except RecursionError:
            raise ValueError(f"{path}: line {number}: not valid JSON: nested too deeply") from None


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: gzip data is truncated or corrupt: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from None
    if not text.strip():
        raise ValueError(f"{path}: file is empty")
    return text
