"""Facts to be traced, from a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastedit.readers import read_requests

__all__ = ["TraceFact", "read_facts"]


@dataclass(frozen=True)
class TraceFact:
    """A prompt, its subject and the answer that the model should know.

    Attributes:
        id: names the fact in files and messages.
        prompt: with the subject in it, or one ``{}`` in its place.
        answer: ``None``: whatever the model predicts.
    """

    id: str
    prompt: str
    subject: str
    answer: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "subject"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"fact {self.id!r}: field {name!r} must be a string that is not blank, got {value!r}"
                )
        if self.answer is not None and (not isinstance(self.answer, str) or not self.answer.strip()):
            raise ValueError(
                f"fact {self.id!r}: field 'answer' must be a string that is not blank, got {self.answer!r}"
            )


def read_facts(path: str | os.PathLike[str], *, limit: int | None = None) -> list[TraceFact]:
    """Read the facts of a file of JSON or JSON lines.

    A record has ``prompt``, ``subject`` and ``answer`` (or ``attribute``, as in the published code's list of known
    facts), or is an edit request of any schema, whose ``target_true`` is the answer.

    Raises:
        ValueError: naming the file and the record: malformed JSON, a missing field, two facts with one id, or no fact.
        OSError: the file cannot be opened.
    """
    file = Path(path)
    records = _plain_records(file)
    if records is None:
        found = [
            TraceFact(request.id, request.prompt, request.subject, request.target_true)
            for request in read_requests(file, limit=limit)
        ]
    else:
        found = [_fact(file, number, record) for number, record in enumerate(records[:limit])]
    if not found:
        raise ValueError(f"{file}: must hold at least one fact, got none")
    seen: set[str] = set()
    for fact in found:
        if fact.id in seen:
            raise ValueError(f"{file}: two facts have the id {fact.id!r}")
        seen.add(fact.id)
    return found


def _plain_records(file: Path) -> list[Any] | None:
    """The records of a file of plain facts, or None for one of edit requests (or of anything else).

    The first record that can be read decides. Raises ValueError for a record of plain facts that cannot.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        # The reader of requests knows compressed files, and says what is wrong with a broken one.
        return None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            return _plain_lines(file, text)
        if _is_plain(_first_of(text)):
            raise _damaged(file, error.lineno, error) from None
        return None
    except RecursionError:
        return None
    records = whole if isinstance(whole, list) else [whole]
    return records if records and _is_plain(records[0]) else None


def _plain_lines(file: Path, text: str) -> list[Any] | None:
    records: list[Any] = []
    broken: tuple[int, ValueError] | None = None
    # Only "\n" ends a line: a JSON string may hold the others that str.splitlines knows.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            broken = broken or (number, error)
            continue
        if not _is_plain(records[0]):
            return None
    if broken is not None and records:
        raise _damaged(file, *broken)
    return records or None


def _first_of(text: str) -> Any:
    """The first record of a list that may be cut off behind it; None where it is cut off in it."""
    start = text.index("[") + 1
    try:
        return json.JSONDecoder().raw_decode(text, start + len(text[start:]) - len(text[start:].lstrip()))[0]
    except json.JSONDecodeError:
        return None


def _is_plain(record: Any) -> bool:
    if not isinstance(record, dict) or "subject" not in record:
        return False
    return "attribute" in record or "answer" in record or set(record) <= _PLAIN


def _damaged(file: Path, line: int, error: ValueError) -> ValueError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return ValueError(f"{file}: line {line}: not valid JSON ({reason})")


_PLAIN = {"id", "prompt", "subject", "answer"}


def _fact(file: Path, number: int, record: Any) -> TraceFact:
    if not isinstance(record, dict):
        raise ValueError(f"{file}: record {number}: must be an object, got {record!r}")
    try:
        chosen = str(record.get("id", record.get("known_id", number)))
        answer = record.get("answer", record.get("attribute"))
        return TraceFact(chosen, record["prompt"], record["subject"], answer)
    except KeyError as error:
        raise ValueError(f"{file}: record {number}: field {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file}: record {number}: {error}") from None
