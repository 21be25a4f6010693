"""Files of facts that are cut off, damaged or begin with a byte order mark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastedit.trace.facts import TraceFact, read_facts

RECORDS = [{"prompt": f"{name} is in", "subject": name} for name in ("Paris", "Rome", "London")]
LINES = [json.dumps(record) for record in RECORDS]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join([*LINES[:2], LINES[2][:20]]))
    with pytest.raises(ValueError, match=r"facts\.jsonl: line 3: not valid JSON \(") as raised:
        read_facts(file)
    assert "\n" not in str(raised.value)
    file.write_text("\n".join(["{", "", *LINES[1:]]))
    with pytest.raises(ValueError, match=r"facts\.jsonl: line 1: not valid JSON \("):
        read_facts(file)


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text("[\n" + ",\n".join([*LINES[:2], LINES[2][:20]]))
    with pytest.raises(ValueError, match=r"facts\.json: line 4: not valid JSON \("):
        read_facts(file)
    file.write_text("[\n" + LINES[0][:20])
    with pytest.raises(ValueError, match=r"facts\.json: line 2 .*not valid JSON"):
        read_facts(file)


@pytest.mark.parametrize("text", ["\n".join(LINES), json.dumps(RECORDS), json.dumps(RECORDS, indent=1)])
def test_a_byte_order_mark(tmp_path: Path, text: str) -> None:
    file = tmp_path / "facts.json"
    file.write_text(text, encoding="utf-8-sig")
    assert read_facts(file)[1] == TraceFact("1", "Rome is in", "Rome")
    assert len(read_facts(file)) == 3


def test_other_line_ends_within_a_string(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({**record, "id": f"{n}\u2028"}, ensure_ascii=False) for n, record in enumerate(RECORDS)
        ),
        encoding="utf-8",
    )
    assert [fact.id for fact in read_facts(file)] == ["0\u2028", "1\u2028", "2\u2028"]
