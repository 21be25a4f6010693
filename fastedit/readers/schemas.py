"""Records of the known data sets and tools as ``EditRequest``s: one function a schema, and the choice among them.

| format                | recognised by                                | where it comes from                   |
|-----------------------|----------------------------------------------|---------------------------------------|
| counterfact           | requested_rewrite                            | COUNTERFACT, full records (ROME)      |
| zsre                  | src with alt, rephrase or answers            | ZsRE in MEND's format                 |
| counterfact-condensed | locality_prompt                              | COUNTERFACT as EasyEdit ships it      |
| memit                 | target_new or target_true is an object       | request dicts of ROME and MEMIT       |
| easyedit              | rephrase_prompt, ground_truth or case_id     | request dicts of EasyEdit             |
| knowedit              | portability, locality, concept or labels     | KnowEdit                              |
| fastedit              | prompt or subject, and none of the above     | ``EditRequest.to_dict``               |

``docs/requests.md`` says which field becomes what. Fields that are not read are ignored, except in the
project's own format, where an unknown field is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastedit.readers.fields import Fields
from fastedit.request import EditRequest

__all__ = ["FORMATS", "format_of", "request_from"]

# What EasyEdit and KnowEdit write where they do not know the true answer.
_NO_ANSWER = "<|endoftext|>"


def format_of(record: Any) -> str | None:
    """The format a record is in, judged by its fields; None for no known one."""
    if not isinstance(record, Mapping):
        return None
    has = record.keys()
    if "requested_rewrite" in has:
        return "counterfact"
    if "src" in has and has & {"alt", "rephrase", "answers"}:
        return "zsre"
    if "locality_prompt" in has:
        return "counterfact-condensed"
    if any(isinstance(record.get(name), Mapping) for name in ("target_new", "target_true")):
        return "memit"
    if has & {"rephrase_prompt", "target_neg", "loc_prompt"}:
        return "easyedit"
    if has & {"portability", "locality", "concept", "labels"}:
        return "knowedit"  # read by the same function as "easyedit"
    if has & {"ground_truth", "case_id"}:
        return "easyedit"
    return "fastedit" if has & {"prompt", "subject"} else None


def request_from(record: Any, *, format: str = "auto", default_id: str = "0") -> EditRequest:
    """One record in a known schema as an EditRequest.

    Args:
        format: One of ``FORMATS``, or "auto" to judge by the record's fields.
        default_id: The id of a record that has none.

    Raises:
        ValueError: an unknown format or schema; a missing, empty or wrong field, by its name in the record.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format must be one of auto, {', '.join(FORMATS)}, is {format!r}")
    if not isinstance(record, Mapping):
        raise ValueError(f"request {default_id!r}: must be an object with fields, is {type(record).__name__}")
    found = format_of(record) if format == "auto" else format
    if found is None:
        shown = ", ".join(repr(name) for name in list(record)[:6]) or "none"
        raise ValueError(
            f"request {default_id!r}: fields ({shown}) match no known schema; known: {', '.join(FORMATS)}"
        )
    if found == "fastedit":
        return EditRequest.from_dict({"id": default_id, **record})
    name = record.get("case_id", record.get("id"))
    if name is None:
        name = default_id
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(
            f"request {default_id!r}: field 'case_id' must be a string or an integer, is {name!r}"
        )
    fields = Fields(record, f"request {str(name)!r}")
    return EditRequest(id=str(name), **_PARSERS[found](fields))


def _counterfact(record: Fields) -> dict[str, Any]:
    """The neighbourhood keeps the old answer; attribute prompts are subjects that had the new one already."""
    rewrite = record.object("requested_rewrite")
    made = _memit(rewrite)
    new, old = made["target_new"], rewrite.object("target_true").text("str")
    probes = [
        *record.probes("paraphrase_prompts", "paraphrase", target=new, avoid=old),
        *record.probes("neighborhood_prompts", "neighbourhood", target=old, avoid=new),
        *record.probes("attribute_prompts", "attribute", target=new, avoid=old),
        *record.probes("generation_prompts", "generation", target="", avoid=None),
    ]
    return {**made, "probes": tuple(probes)}


def _condensed(record: Fields) -> dict[str, Any]:
    """``rephrase_prompt`` is mostly one of COUNTERFACT's generation prompts ("X is incredible at"), whose next
    words are not the target: kind "generation", so that it never counts as a paraphrase.
    """
    made = _plain(record)
    new, old = made["target_new"], made["target_true"]
    probes = [
        *record.probes("rephrase_prompt", "generation", target=new, avoid=old),
        *record.probes(
            "locality_prompt", "neighbourhood", target=record.text("locality_ground_truth"), avoid=new
        ),
    ]
    return {**made, "probes": tuple(probes)}


def _zsre(record: Fields) -> dict[str, Any]:
    """The new answer is ``alt``, the old one the first of ``answers``; ``pred`` is another model's guess."""
    new = record.text("alt")
    old = next(iter(record.texts("answers")), None)
    probes = [*record.probes("rephrase", "paraphrase", target=new, avoid=old)]
    if record.has("loc"):
        probes += record.probes("loc", "locality", target=record.text("loc_ans"), avoid=None)
    if record.has("portability") and record.object("portability").has("New Question"):
        hop = record.object("portability")
        probes += hop.probes("New Question", "portability", target=hop.text("New Answer"), avoid=None)
    else:
        probes += record.answered("portability", "portability")
    probes += record.answered("locality", "locality")
    return {
        "prompt": record.text("src"),
        "subject": record.text("subject"),
        "target_new": new,
        "target_true": old,
        "probes": tuple(probes),
    }


def _knowedit(record: Fields) -> dict[str, Any]:
    """KnowEdit's records and EasyEdit's request dicts: a plain fact, rephrasings, and named groups of probes."""
    made = _plain(record)
    new, old = made["target_new"], made["target_true"]
    probes = [
        *record.probes("rephrase_prompt", "paraphrase", target=new, avoid=old),
        *record.probes("rephrase", "paraphrase", target=new, avoid=old),
        *record.answered("portability", "portability"),
        *record.answered("locality", "locality"),
    ]
    return {**made, "probes": tuple(probes)}


def _memit(record: Fields) -> dict[str, Any]:
    old = record.object("target_true").text("str") if record.has("target_true") else None
    return {
        "prompt": record.text("prompt"),
        "subject": record.text("subject"),
        "target_new": record.object("target_new").text("str"),
        "target_true": None if old == _NO_ANSWER else old,
        "relation": record.text("relation_id") if record.has("relation_id") else None,
    }


def _plain(record: Fields) -> dict[str, Any]:
    answers = record.texts("ground_truth" if record.has("ground_truth") else "target_true")
    return {
        "prompt": record.text("prompt", "text"),
        "subject": record.text("subject", "concept"),
        "target_new": record.text("target_new", "labels"),
        "target_true": None if not answers or answers[0] == _NO_ANSWER else answers[0],
        "relation": record.text("relation_id") if record.has("relation_id") else None,
    }


_PARSERS: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    "counterfact": _counterfact,
    "zsre": _zsre,
    "counterfact-condensed": _condensed,
    "memit": _memit,
    "knowedit": _knowedit,
    "easyedit": _knowedit,
}

FORMATS = ("fastedit", *_PARSERS)
