"""What an edit asks for: ``EditRequest`` and the ``Probe``s that measure it.

Both are frozen and check themselves when they are made, so a request that exists is a request every method
can use: the prompt has exactly one ``{}``, the subject and the target are not blank, every field has its
type. Errors are one line and name the request and the field. Reading files and foreign schemas is
``fastedit.readers``' part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["PLACEHOLDER", "PROBE_KINDS", "EditRequest", "Probe", "as_requests", "fill", "split_once"]

PLACEHOLDER = "{}"

PROBE_KINDS: Mapping[str, str] = {
    "rewrite": "the edit's own prompt; the target is the new answer (efficacy)",
    "paraphrase": "the edited fact in other words; the target is the new answer (generality)",
    "neighbourhood": "the same relation of another subject; the target is the old answer (locality)",
    "attribute": "the same relation of another subject that already has the new answer",
    "same_subject": "another fact of the edited subject; the target is its unchanged answer",
    "locality": "any other fact that must stay (KnowEdit, ZsRE); the target is its unchanged answer",
    "portability": "a consequence of the edited fact: one-hop reasoning, an alias, the inverse relation",
    "generation": "a prompt to continue freely; the target, where there is one, is not its next words",
}


def split_once(text: str, what: str) -> tuple[str, str]:
    """Splits ``text`` at its only ``{}``; any other brace is an ordinary character.

    Raises ValueError, starting with ``what``, unless ``text`` holds exactly one ``{}``.
    """
    count = text.count(PLACEHOLDER)
    if count != 1:
        raise ValueError(f"{what} must hold exactly one '{{}}', holds {count}: {_shown(text)}")
    before, after = text.split(PLACEHOLDER)
    return before, after


def fill(template: str, text: str) -> str:
    """Puts ``text`` at the only ``{}`` of ``template``. Unlike ``str.format`` it leaves other braces
    alone."""
    before, after = split_once(template, "a template")
    return before + text + after


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One question asked of the model before and after an edit.

    Attributes:
        prompt: Plain text, no placeholder; braces are literal.
        target: The answer that counts as right. Empty only for kind "generation" (nothing to compare with).
        avoid: The competing answer, for scores of the form p(target) > p(avoid); None where there is none.
        kind: One of ``PROBE_KINDS``.
        group: The data set's own name for a subdivision of the kind ("Subject_Aliasing", ...), or None.
    """

    prompt: str
    target: str
    avoid: str | None = None
    kind: str
    group: str | None = None

    def __post_init__(self) -> None:
        _check_text("probe", "prompt", self.prompt)
        if not isinstance(self.kind, str) or self.kind not in PROBE_KINDS:
            known = ", ".join(PROBE_KINDS)
            raise ValueError(f"probe: field 'kind' must be one of {known}, is {_shown(self.kind)}")
        _check_text("probe", "target", self.target, blank_ok=self.kind == "generation")
        _check_text("probe", "avoid", self.avoid, optional=True)
        _check_text("probe", "group", self.group, optional=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; optional fields only where they are set."""
        return _set_fields(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Probe:
        """The inverse of ``to_dict``. Raises ValueError for a missing, an unknown or a wrong field."""
        _check_fields(cls, "probe", record, required=("prompt", "target", "kind"))
        return cls(**record)


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to write: after the edit, ``text`` should be continued by ``target_new``.

    Attributes:
        id: Names the request in errors and reports.
        prompt: Exactly one ``{}``, where the subject goes. A prompt without it in which the subject occurs
            exactly once is accepted and rewritten.
        subject: What the fact is about.
        target_new: The new answer, with or without its leading space (``tokens.target_ids`` adds it).
        target_true: The answer that held before, or None where it is not known.
        relation: The relation's name or id in its data set, or None.
        probes: What to measure; see ``Probe``.

    Raises:
        ValueError: ``request 'ID': field 'NAME' ...`` for anything else.
    """

    id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    relation: str | None = None
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip():
            raise ValueError(f"request {_shown(self.id)}: field 'id' must be a string that is not blank")
        who = f"request {_shown(self.id)}"
        for name in ("prompt", "subject", "target_new"):
            _check_text(who, name, getattr(self, name))
        for name in ("target_true", "relation"):
            _check_text(who, name, getattr(self, name), optional=True)
        object.__setattr__(self, "prompt", _templated(who, self.prompt, self.subject))
        if isinstance(self.probes, list):
            object.__setattr__(self, "probes", tuple(self.probes))
        if not isinstance(self.probes, tuple) or not all(isinstance(probe, Probe) for probe in self.probes):
            raise ValueError(f"{who}: field 'probes' must be a tuple of Probe, is {_shown(self.probes)}")

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return fill(self.prompt, self.subject)

    def probes_of(self, kind: str) -> tuple[Probe, ...]:
        """The probes of one kind, in order. Raises ValueError for a kind that is not in ``PROBE_KINDS``."""
        if kind not in PROBE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(PROBE_KINDS)}, is {_shown(kind)}")
        return tuple(probe for probe in self.probes if probe.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; optional fields only where they are set."""
        record = _set_fields(self)
        record.pop("probes", None)
        if self.probes:
            record["probes"] = [probe.to_dict() for probe in self.probes]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """The inverse of ``to_dict``. Raises ValueError for a missing, an unknown or a wrong field."""
        name = record.get("id") if isinstance(record, Mapping) else None
        who = "request" if name is None else f"request {_shown(name)}"
        _check_fields(cls, who, record, required=("id", "prompt", "subject", "target_new"))
        probes = record.get("probes", ())
        if not isinstance(probes, (list, tuple)):
            raise ValueError(f"{who}: field 'probes' must be a list, is {_shown(probes)}")
        made = []
        for number, probe in enumerate(probes):
            try:
                made.append(Probe.from_dict(probe))
            except ValueError as error:
                raise ValueError(f"{who}: field 'probes[{number}]': {error}") from None
        return cls(**{**record, "probes": tuple(made)})


def as_requests(requests: EditRequest | Mapping[str, Any] | Iterable[Any]) -> list[EditRequest]:
    """One request or many, each an ``EditRequest`` or a dict in any known schema, as a list.

    A dict without an id is named by its place in the list. Raises ValueError for an empty list, for anything
    else than the above, and for a dict that is not a valid request (``request 'ID': field 'NAME' ...``).
    """
    from fastedit.readers.schemas import request_from

    if isinstance(requests, (str, bytes)) or not isinstance(requests, (EditRequest, Mapping, Iterable)):
        raise ValueError(f"requests must be EditRequest, dict or a list of them, is {_shown(requests)}")
    items: list[Any] = [requests] if isinstance(requests, (EditRequest, Mapping)) else list(requests)
    if not items:
        raise ValueError("requests must hold at least one request, is empty")
    return [
        item if isinstance(item, EditRequest) else request_from(item, default_id=str(place))
        for place, item in enumerate(items)
    ]


def _templated(who: str, prompt: str, subject: str) -> str:
    """The prompt with ``{}`` at the subject. A subject that occurs twice has no place of its own: refused."""
    count = prompt.count(PLACEHOLDER)
    if count == 1:
        return prompt
    if count > 1:
        raise ValueError(
            f"{who}: field 'prompt' must hold exactly one '{{}}', holds {count}: {_shown(prompt)}"
        )
    found = prompt.count(subject)
    if found == 0:
        raise ValueError(
            f"{who}: field 'prompt' holds neither '{{}}' nor the subject {_shown(subject)}: {_shown(prompt)}"
        )
    if found > 1:
        raise ValueError(
            f"{who}: field 'prompt' holds the subject {_shown(subject)} {found} times, "
            f"write '{{}}' at the edited one: {_shown(prompt)}"
        )
    return prompt.replace(subject, PLACEHOLDER)


def _check_text(who: str, name: str, value: Any, *, optional: bool = False, blank_ok: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str):
        # NaN arrives here too: a table's empty cell is a float.
        raise ValueError(f"{who}: field '{name}' must be a string, is {type(value).__name__} {_shown(value)}")
    if not blank_ok and not value.strip():
        raise ValueError(f"{who}: field '{name}' must not be empty, is {_shown(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{who}: field '{name}' holds a lone surrogate, which is not text: {_shown(value)}")


def _check_fields(kind: type, who: str, record: Any, *, required: tuple[str, ...]) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{who} must be an object with fields, is {type(record).__name__} {_shown(record)}")
    for name in required:
        if name not in record:
            raise ValueError(f"{who}: field '{name}' is missing")
    known = [field.name for field in fields(kind)]
    for name in record:
        if name not in known:
            raise ValueError(f"{who}: field {_shown(name)} is unknown (known: {', '.join(known)})")


def _set_fields(item: Any) -> dict[str, Any]:
    return {f.name: value for f in fields(item) if (value := getattr(item, f.name)) is not None}


def _shown(value: Any, limit: int = 80) -> str:
    """One line of ``repr``, cut to ``limit`` characters, for error messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
