"""The folder of a study: what its traces depend on, and whether a run may go on in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastedit.atomic_file import atomic_path
from fastedit.session import Session
from fastedit.trace.facts import TraceFact
from fastedit.trace.options import TraceOptions

__all__ = ["check_folder", "claim", "settings_of"]

_SETTINGS = "study.json"
_CASES = "cases"
# Told by a digest, whose value says nothing to a reader.
_DIGESTS = ("facts", "texts", "model", "tokenizer")


def settings_of(
    session: Session, facts: Sequence[TraceFact], options: TraceOptions, texts: Sequence[str] | None
) -> dict[str, Any]:
    """What a study's traces depend on, by name: options as they are, facts, texts and model as digests."""
    from fastedit.stats.provenance import model_fingerprint, tokenizer_fingerprint

    chosen = asdict(options)
    # Decides what runs together, and no result.
    chosen.pop("memory")
    noise = chosen.pop("noise")
    settings = {
        **chosen,
        **{f"noise.{name}": value for name, value in noise.items()},
        "number of facts": len(facts),
        "facts": _digest([asdict(fact) for fact in facts]),
        "texts": None if texts is None else _digest(list(texts)),
        "model": model_fingerprint(session.arch),
        "tokenizer": tokenizer_fingerprint(session.tokenizer),
    }
    # Through JSON and back: tuples become lists, as they are when read.
    known: dict[str, Any] = json.loads(json.dumps(settings))
    return known


def check_folder(home: Path, settings: dict[str, Any]) -> None:
    """Make sure that a folder is, or may become, a study's; nothing is written.

    Raises ValueError where it may not, with all that differs.
    """
    file = home / _SETTINGS
    if file.exists():
        differing = _differences(_read(file), settings)
        if differing:
            raise ValueError(
                f"directory must be new or hold this study to go on with, got {str(home)!r}, "
                f"made with other settings: {'; '.join(differing)}"
            )
    elif home.exists() and any(home.iterdir()):
        cases = home / _CASES
        if not cases.is_dir():
            raise ValueError(f"directory must be new, empty or hold a study to go on with, got {str(home)!r}")
        if any(cases.iterdir()):
            raise ValueError(
                f"directory must hold {_SETTINGS} beside {_CASES}, which says what the traces were made with, "
                f"got {str(home)!r} without it"
            )


def claim(home: Path, settings: dict[str, Any]) -> None:
    """Make a folder a study's. Raises what `check_folder` does."""
    check_folder(home, settings)
    file = home / _SETTINGS
    home.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with atomic_path(file) as part:
            part.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (home / _CASES).mkdir(exist_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{file}: not readable; delete the folder and run again")
    return there


def _differences(there: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    found = []
    for name, value in settings.items():
        if there.get(name) == value:
            continue
        if name in _DIGESTS:
            found.append(f"other {name}")
        else:
            found.append(f"{name} {_shown(there.get(name))}, now {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()
