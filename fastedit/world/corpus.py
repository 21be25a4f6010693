"""Training text: short documents about one entity, with filler sentences between the facts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from fastedit.world.facts import SUBJECT_TYPES, Facts
from fastedit.world.relations import HOPS, RELATIONS

__all__ = ["Sentence", "documents", "filler", "text_of", "texts"]


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "old new small large quiet bright dark cold warm green red blue heavy early late simple strange busy empty happy"
)
_NOUNS = _words(
    "garden street house window river market table book letter road forest train horse dog child story song winter "
    "summer morning evening lamp door mountain field kitchen room clock boat cloud"
)
_VERBS = _words("waits stands rests moves shines stays falls sleeps changes remains turns appears")
_PREPOSITIONS = _words("near behind beside under above beyond before after")
_ADVERBS = _words("slowly often again today always quietly rarely soon")
_TIMES = _words("morning evening winter summer")
_OPENERS = _words("Because Therefore")
_PRONOUNS = _words("I You We")
_STATES = _words("know see remember like hear")


@dataclass(frozen=True)
class Sentence:
    """`prompt` + " " + `answer` + "."; without `answer`, the whole sentence is `prompt`.

    `subject` is the entity the prompt names (None in filler); `bridge` is the entity in the middle of a two-hop
    question (None elsewhere).
    """

    prompt: str
    answer: str = ""
    subject: str | None = None
    bridge: str | None = None

    @property
    def text(self) -> str:
        """The sentence with its answer, if it has one, and its full stop."""
        return f"{self.prompt} {self.answer}." if self.answer else self.prompt


def filler(rng: random.Random) -> str:
    """One sentence without any fact, sometimes broken off in the middle (as generated prefixes are)."""
    adjective, noun, other = rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.choice(_NOUNS)
    kind = rng.randrange(6)
    if kind == 0:
        text = f"The {adjective} {noun} {rng.choice(_VERBS)} {rng.choice(_PREPOSITIONS)} the {other}."
    elif kind == 1:
        text = f"The {noun} {rng.choice(_VERBS)} {rng.choice(_ADVERBS)}."
    elif kind == 2:
        text = (
            f"In the {rng.choice(_TIMES)} the {adjective} {noun} {rng.choice(_VERBS)} {rng.choice(_ADVERBS)}."
        )
    elif kind == 3:
        text = f"The {noun} is {adjective} and the {other} is {rng.choice(_ADJECTIVES)}."
    elif kind == 4:
        text = f"{rng.choice(_OPENERS)} the {noun} is {adjective} the {other} {rng.choice(_VERBS)}."
    else:
        text = f"{rng.choice(_PRONOUNS)} {rng.choice(_STATES)} the {adjective} {noun}."
    if rng.random() < 0.15:
        words = text[:-1].split()
        text = " ".join(words[: rng.randint(1, len(words))]) + "."
    return text


def _document(
    facts: Facts, rng: random.Random, weights: list[float], p_hop: float, p_filler: float
) -> list[Sentence]:
    kind = rng.choices(SUBJECT_TYPES, weights)[0]
    subject = rng.choice(facts.entities[kind])
    hops = [c for c in (facts.compositions.get((subject, h)) for h in HOPS) if c is not None and c.trained]
    known = list(facts.about(subject))
    rng.shuffle(known)
    out: list[Sentence] = []
    if rng.random() < p_filler:
        out.append(Sentence(filler(rng)))
    for fact in known[: rng.randint(1, min(4, len(known)))]:
        if hops and rng.random() < p_hop:
            hop = rng.choice(hops)
            prompt = rng.choice(hop.templates).replace("{}", subject)
            out.append(Sentence(prompt, hop.answer, subject, hop.bridge))
        prompt = rng.choice(fact.train).replace("{}", subject)
        out.append(Sentence(prompt, fact.object, subject))
        if rng.random() < p_filler * 0.3:
            out.append(Sentence(filler(rng)))
    return out


def documents(
    facts: Facts, seed: int, *, p_hop: float = 0.5, p_filler: float = 0.5
) -> Iterator[list[Sentence]]:
    """Endless documents. `p_hop` = chance of a two-hop question before each fact, `p_filler` = of a filler."""
    rng = random.Random(seed)
    weights = []
    for kind in SUBJECT_TYPES:
        n_facts = len(facts.entities[kind]) * sum(r.subject == kind for r in RELATIONS.values())
        # the small types are also the middles of two-hop questions: see them more often
        weights.append(n_facts * (1.0 if kind == "person" else 2.0))
    while True:
        yield _document(facts, rng, weights, p_hop, p_filler)


def text_of(document: list[Sentence]) -> str:
    """The document as one string."""
    return " ".join(sentence.text for sentence in document)


def texts(facts: Facts, count: int, seed: int) -> list[str]:
    """`count` documents as strings; ValueError if `count` < 1."""
    if count < 1:
        raise ValueError(f"n_docs must be at least 1, got {count}")
    source = documents(facts, seed)
    return [text_of(next(source)) for _ in range(count)]
