"""Traces of many facts: a file a fact as soon as it is done, so that a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastedit.atomic_file import atomic_path
from fastedit.session import Session
from fastedit.trace.average import AverageTrace, average
from fastedit.trace.causal import TraceOptions, trace_prompts
from fastedit.trace.facts import TraceFact
from fastedit.trace.prompts import TracePrompt, encode_trace
from fastedit.trace.result import CausalTrace

__all__ = ["StudyProgress", "read_study", "trace_facts"]

_SETTINGS = "study.json"


@dataclass(frozen=True)
class StudyProgress:
    """State of a run, as passed to a progress callback after every batch.

    Attributes:
        done, total: facts, those that a resumed run found done included.
        seconds: spent in this run.
        eta_seconds: estimated time to the end; ``None`` before the first fact of this run.
    """

    done: int
    total: int
    seconds: float
    eta_seconds: float | None


def trace_facts(
    session: Session,
    facts: Sequence[TraceFact],
    directory: str | Path,
    options: TraceOptions | None = None,
    *,
    batch: int = 4,
    progress: Callable[[StudyProgress], None] | None = None,
) -> list[CausalTrace]:
    """Trace facts into ``directory/cases``, several prompts in a sweep, and return all traces in the facts' order.

    What is there already is read instead of run. Noise is scaled by the embeddings of all facts' subjects, as
    published.

    Args:
        batch: prompts of one sweep; memory may divide it further.

    Raises:
        ValueError: no facts, a fact that cannot be traced (all are checked before any work), or a directory of a
            study of other facts, options or another model.
    """
    options = options or TraceOptions()
    if not facts:
        raise ValueError("facts: at least one is needed, got 0")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
    prompts: list[TracePrompt] = []
    for fact in facts:
        try:
            prompts.append(encode_trace(session, fact.prompt, fact.subject, fact.answer))
        except ValueError as error:
            raise ValueError(f"fact {fact.id!r}: {error}") from None
    home = Path(directory)
    _claim(home, _settings(session, facts, options))
    files = [home / "cases" / f"{number}.json" for number in range(len(facts))]
    found: dict[int, CausalTrace] = {i: _read(file) for i, file in enumerate(files) if file.exists()}
    # Prompts of one length next to each other: a sweep wastes nothing on filling up.
    waiting = sorted((i for i in range(len(facts)) if i not in found), key=lambda i: len(prompts[i]))
    subjects = [fact.subject for fact in facts]
    start, before = time.monotonic(), len(found)
    for first in range(0, len(waiting), batch):
        part = waiting[first : first + batch]
        traces = trace_prompts(session, [prompts[i] for i in part], options, subjects=subjects)
        for i, trace in zip(part, traces, strict=True):
            trace.save(files[i].with_suffix(".npz"), force=True)
            # Last, for it is what says that the fact is done.
            trace.save(files[i])
            found[i] = trace
        if progress is not None:
            seconds = time.monotonic() - start
            left = (len(facts) - len(found)) * seconds / (len(found) - before)
            progress(StudyProgress(len(found), len(facts), seconds, left))
    return [found[i] for i in range(len(facts))]


def read_study(directory: str | Path, *, all_facts: bool = False) -> AverageTrace:
    """The average over what a directory holds, finished or not.

    Raises ValueError where it holds no trace, or a damaged one.
    """
    files = sorted((Path(directory) / "cases").glob("*.json"), key=lambda file: int(file.stem))
    if not files:
        raise ValueError(
            f"directory must hold the traces of `fastedit trace --facts`, got {str(directory)!r}"
        )
    return average([_read(file) for file in files], all_facts=all_facts)


def _read(file: Path) -> CausalTrace:
    try:
        return CausalTrace.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file}: not a readable trace ({error}); delete it and run again") from None


def _settings(session: Session, facts: Sequence[TraceFact], options: TraceOptions) -> dict[str, Any]:
    """What a study's traces depend on."""
    from fastedit.stats.provenance import model_fingerprint, tokenizer_fingerprint

    listed = json.dumps([asdict(fact) for fact in facts], ensure_ascii=False)
    chosen = asdict(options)
    chosen.pop("memory")
    # Through JSON and back: tuples become lists, as they are when read.
    settings: dict[str, Any] = json.loads(
        json.dumps(
            {
                "options": chosen,
                "facts": hashlib.sha256(listed.encode()).hexdigest(),
                "model": model_fingerprint(session.arch),
                "tokenizer": tokenizer_fingerprint(session.tokenizer),
            }
        )
    )
    return settings


def _claim(home: Path, settings: dict[str, Any]) -> None:
    file = home / _SETTINGS
    if file.exists():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{file}: not readable; delete the folder and run again") from None
        differing = [name for name in settings if there.get(name) != settings[name]]
        if differing:
            raise ValueError(
                f"directory must be new or hold this study to go on with, but {str(home)!r} "
                f"was made with other {' and '.join(differing)}"
            )
        return
    if home.exists() and any(home.iterdir()):
        raise ValueError(f"directory must be new, empty or hold a study to go on with, got {str(home)!r}")
    (home / "cases").mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as part:
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")
