"""Reading a record of a foreign schema field by field, with errors in the record's own words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastedit.request import Probe

__all__ = ["Fields"]


class Fields:
    """A record's fields, read with errors that name the request and the field as the record spells it."""

    def __init__(self, record: Mapping[str, Any], who: str, path: str = "") -> None:
        self.record, self.who, self.path = record, who, path

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.record.get(name) is not None

    def object(self, name: str) -> Fields:
        """A field that is itself a record."""
        value = self.value(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object", value)
        return Fields(value, self.who, f"{self.path}{name}.")

    def text(self, *names: str) -> str:
        """The first of ``names`` that is there; a list of one or more texts gives its first."""
        name = next((name for name in names if self.has(name)), names[0])
        texts = _flat(self.value(name))
        if not texts or not isinstance(texts[0], str):
            raise self._wrong(name, "a string", self.record[name])
        if not texts[0].strip():
            raise ValueError(f"{self.who}: field '{self.path}{name}' must not be empty, is {texts[0]!r}")
        return texts[0]

    def texts(self, name: str) -> list[str]:
        """A text or a list of them; empty where the field is absent."""
        if not self.has(name):
            return []
        texts = _flat(self.record[name])
        for text in texts:
            if not isinstance(text, str):
                raise self._wrong(name, "a string or a list of strings", text)
        return [text for text in texts if text.strip()]

    def probes(self, name: str, kind: str, *, target: str, avoid: str | None) -> Iterator[Probe]:
        """One probe for each text of the field; ``avoid`` is dropped where it is the target."""
        for prompt in self.texts(name):
            yield self.probe(name, prompt, target, kind, None if avoid == target else avoid)

    def answered(self, name: str, kind: str) -> Iterator[Probe]:
        """Groups of questions with answers: ``{group: {prompt, ground_truth}}``, each one text or a list of
        equal length, or ``{group: [{prompt, ground_truth}, ...]}``. Of alternative answers the first counts.
        """
        for group in self.object(name).record if self.has(name) else ():
            value = self.object(name).record[group]
            items = value if isinstance(value, list) else [value]
            for item in items:
                if item is None:
                    continue
                one = Fields({group: item}, self.who, f"{self.path}{name}.").object(group)
                prompts, answers = _listed(one.value("prompt")), _listed(one.value("ground_truth"))
                if len(prompts) == 1 and len(answers) > 1:
                    answers = answers[:1]
                if len(prompts) != len(answers):
                    raise ValueError(
                        f"{self.who}: field '{one.path}ground_truth' must have one answer for each prompt, "
                        f"has {len(answers)} for {len(prompts)}"
                    )
                for prompt, answer in zip(prompts, answers):
                    first = next(iter(_flat(answer)), None)
                    yield one.probe("ground_truth", prompt, first, kind, None, group)

    def probe(
        self, name: str, prompt: Any, target: Any, kind: str, avoid: str | None, group: str | None = None
    ) -> Probe:
        """One probe; what is wrong with it is said of the field ``name``."""
        try:
            return Probe(prompt=prompt, target=target, avoid=avoid, kind=kind, group=group)
        except ValueError as error:
            raise ValueError(f"{self.who}: field '{self.path}{name}': {error}") from None

    def value(self, name: str) -> Any:
        """The field as it is; ValueError where it is missing."""
        if name not in self.record:
            raise ValueError(f"{self.who}: field '{self.path}{name}' is missing")
        return self.record[name]

    def _wrong(self, name: str, wanted: str, value: Any) -> ValueError:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        return ValueError(
            f"{self.who}: field '{self.path}{name}' must be {wanted}, is {type(value).__name__} {shown}"
        )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _flat(value: Any) -> list[Any]:
    """The leaves of nested lists."""
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]
