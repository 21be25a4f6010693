"""Entities, facts and two-hop compositions of the fact world: pure data, drawn once from one seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from fastedit.world.names import (
    COMPANY_SUFFIXES,
    ENDINGS,
    INSTRUMENTS,
    LANDMARK_KINDS,
    PRODUCTS,
    PROFESSIONS,
    NameMaker,
)
from fastedit.world.relations import HOPS, RELATIONS

__all__ = ["SUBJECT_TYPES", "Composition", "Fact", "Facts", "build_facts"]

SUBJECT_TYPES = ("person", "company", "city", "country", "landmark")
_COUNTS = {"person": 120, "company": 12, "city": 16, "country": 8, "landmark": 28}
_HELD_OUT_TEMPLATES = 2
_HOP_TRAIN_SHARE = 0.67


@dataclass(frozen=True)
class Fact:
    """One fact (subject, relation, object) and the wordings it is trained on and not trained on.

    `train` are templates whose filled-in form occurs in the training text; `held_out` occur in the training text for
    other subjects only; `novel` never occur in it.
    """

    subject: str
    relation: str
    object: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    novel: tuple[str, ...]


@dataclass(frozen=True)
class Composition:
    """One two-hop question about `subject`: `answer` is reached through `bridge`; `trained` says whether the pair
    (subject, hop) occurs in the training text."""

    subject: str
    hop: str
    bridge: str
    answer: str
    trained: bool
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """The whole world: `entities` by type, `facts` by (subject, relation), `compositions` by (subject, hop)."""

    entities: Mapping[str, tuple[str, ...]]
    facts: Mapping[tuple[str, str], Fact]
    compositions: Mapping[tuple[str, str], Composition]

    def type_of(self, subject: str) -> str:
        """The type of a subject; ValueError if there is no such subject."""
        for kind in SUBJECT_TYPES:
            if subject in self.entities[kind]:
                return kind
        raise ValueError(f"subject: {subject!r} is not an entity of the world")

    def about(self, subject: str) -> tuple[Fact, ...]:
        """All facts whose subject is `subject`."""
        kind = self.type_of(subject)
        return tuple(self.facts[subject, name] for name, r in RELATIONS.items() if r.subject == kind)

    def other_facts(self, fact: Fact) -> tuple[Fact, ...]:
        """The other facts of the subject of `fact`."""
        return tuple(other for other in self.about(fact.subject) if other.relation != fact.relation)

    def neighbours(self, fact: Fact) -> tuple[Fact, ...]:
        """The same relation of every other subject."""
        kind = RELATIONS[fact.relation].subject
        return tuple(self.facts[x, fact.relation] for x in self.entities[kind] if x != fact.subject)

    def hops_over(self, fact: Fact) -> tuple[Composition, ...]:
        """Two-hop questions whose first step is `fact`."""
        return tuple(
            self.compositions[fact.subject, hop.name] for hop in HOPS.values() if hop.first == fact.relation
        )


def _entities(rng: random.Random) -> dict[str, tuple[str, ...]]:
    make = NameMaker(rng)
    count = _COUNTS
    people = make.people(count["person"])
    cities = make.words(count["city"], ENDINGS["city"], 0.5)
    countries = make.words(count["country"], ENDINGS["country"], 0.3)
    companies = [
        f"{word} {rng.choice(COMPANY_SUFFIXES)}"
        for word in make.words(count["company"], ENDINGS["company"], 0.3)
    ]
    languages = make.words(count["country"] + 2, ENDINGS["language"], 0.3)
    rivers = make.words(16, ENDINGS["river"], 0.3)
    currencies = make.words(count["country"], ENDINGS["currency"], 0.3)
    stems = make.words(count["landmark"] // 3, ENDINGS["city"] + ENDINGS["last"], 0.5)
    landmarks = [f"{stem} {kind}" for stem in stems for kind in LANDMARK_KINDS]
    rng.shuffle(landmarks)
    return {
        "person": tuple(people),
        "city": tuple(cities),
        "country": tuple(countries),
        "company": tuple(companies),
        "language": tuple(languages),
        "river": tuple(rivers),
        "currency": tuple(currencies),
        "landmark": tuple(landmarks[: count["landmark"]]),
        "instrument": tuple(INSTRUMENTS),
        "profession": tuple(PROFESSIONS),
        "product": tuple(PRODUCTS),
    }


def _object(rng: random.Random, entities: Mapping[str, tuple[str, ...]], relation: str, index: int) -> str:
    """The object of one fact. City i lies in country i mod n, so the capital of country i is city i."""
    if relation == "country":
        return entities["country"][index % len(entities["country"])]
    if relation in ("capital", "language", "currency"):
        return entities[RELATIONS[relation].object][index]
    return rng.choice(entities[RELATIONS[relation].object])


def build_facts(seed: int = 0) -> Facts:
    """Draw the world. The same `seed` gives the same world; the committed weights belong to seed 0."""
    rng = random.Random(seed)
    entities = _entities(rng)
    facts: dict[tuple[str, str], Fact] = {}
    for relation in RELATIONS.values():
        for index, subject in enumerate(entities[relation.subject]):
            templates = list(relation.templates)
            rng.shuffle(templates)
            facts[subject, relation.name] = Fact(
                subject=subject,
                relation=relation.name,
                object=_object(rng, entities, relation.name, index),
                train=tuple(templates[_HELD_OUT_TEMPLATES:]),
                held_out=tuple(templates[:_HELD_OUT_TEMPLATES]),
                novel=relation.novel,
            )
    compositions: dict[tuple[str, str], Composition] = {}
    for hop in HOPS.values():
        subjects = list(entities[RELATIONS[hop.first].subject])
        rng.shuffle(subjects)
        n_train = round(len(subjects) * _HOP_TRAIN_SHARE)
        for rank, subject in enumerate(subjects):
            bridge = facts[subject, hop.first].object
            compositions[subject, hop.name] = Composition(
                subject=subject,
                hop=hop.name,
                bridge=bridge,
                answer=facts[bridge, hop.second].object,
                trained=rank < n_train,
                templates=hop.templates,
            )
    return Facts(entities=entities, facts=facts, compositions=compositions)
