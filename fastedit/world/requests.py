"""Edit requests over the fact world, with every probe the world can answer for.

The subjects are divided into two halves once and for all: `split="tune"` is for choosing layers and
hyper-parameters, `split="test"` for reporting; no subject is in both.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal, get_args

from fastedit.request import EditRequest, Probe
from fastedit.world.facts import Fact, Facts
from fastedit.world.relations import HOPS, RELATIONS

__all__ = ["Split", "make_requests"]

Split = Literal["tune", "test"]
_SHARES = {"person": 0.6, "company": 0.15, "landmark": 0.15, "city": 0.1}
_NEIGHBOURS = 10
_SPLIT_SEED = 20


def _subjects(facts: Facts, split: Split) -> dict[str, list[str]]:
    """The subjects of one half, by type."""
    rng = random.Random(_SPLIT_SEED)
    halves: dict[str, list[str]] = {}
    for kind in _SHARES:
        subjects = list(facts.entities[kind])
        rng.shuffle(subjects)
        middle = len(subjects) // 2
        halves[kind] = subjects[:middle] if split == "tune" else subjects[middle:]
    return halves


def _choose(facts: Facts, n: int, rng: random.Random, split: Split) -> list[Fact]:
    """`n` facts of `n` different subjects; a type that runs out is made up for by persons."""
    halves = _subjects(facts, split)
    total = sum(len(subjects) for subjects in halves.values())
    if not 1 <= n <= total:
        raise ValueError(f"n must be between 1 and {total} for split {split!r}, got {n}")
    counts = {kind: min(int(share * n), len(halves[kind])) for kind, share in _SHARES.items()}
    for kind in ("person", "landmark", "company", "city"):
        counts[kind] += min(n - sum(counts.values()), len(halves[kind]) - counts[kind])
    subjects = [x for kind, count in counts.items() for x in rng.sample(halves[kind], count)]
    rng.shuffle(subjects)
    chosen = []
    for subject in subjects:
        known = facts.about(subject)
        # first steps of two-hop questions twice as often: the others have no portability probes
        weights = [2 if any(h.first == fact.relation for h in HOPS.values()) else 1 for fact in known]
        chosen += rng.choices(known, weights)
    return chosen


def _prompt(fact: Fact, rng: random.Random, prefer: str | None = None) -> str:
    template = prefer if prefer in fact.train else rng.choice(fact.train)
    return template.replace("{}", fact.subject)


def _portability(facts: Facts, fact: Fact, new: str, edited: Collection[tuple[str, str]]) -> list[Probe]:
    """Two-hop questions that no training text answers, with the answer that follows from the edit and, as `avoid`,
    the one that held before; none whose second step is edited too."""
    probes = []
    for c in facts.hops_over(fact):
        second = HOPS[c.hop].second
        answer = facts.facts[new, second].object
        if c.trained or answer == c.answer or {(new, second), (c.bridge, second)} & set(edited):
            continue
        probes += [
            Probe(
                prompt=template.replace("{}", fact.subject),
                target=answer,
                avoid=c.answer,
                kind="portability",
                group=c.hop,
            )
            for template in c.templates
        ]
    return probes


def make_requests(facts: Facts, n: int, seed: int = 0, split: Split = "test") -> list[EditRequest]:
    """`n` counterfactual edits of `n` different subjects.

    Probes: "paraphrase" (two wordings never trained for this fact), "neighbourhood" (the same relation of up to ten
    other subjects, not edited themselves), "same_subject" (the subject's other facts), "portability" (two-hop
    questions through the new object, of pairs never trained on).

    Raises:
        ValueError: unknown split, or more requests than the half has subjects.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    rng = random.Random(f"{split} {seed}")
    chosen = _choose(facts, n, rng, split)
    edited = {(fact.subject, fact.relation) for fact in chosen}
    # an object that no training text names has an untrained embedding, and cannot be said by any edit
    named = {f.object for f in facts.facts.values()} | {subject for subject, _ in facts.facts}
    requests = []
    for fact in chosen:
        pool = [o for o in facts.entities[RELATIONS[fact.relation].object] if o in named and o != fact.object]
        new = rng.choice(pool)
        template = rng.choice(fact.train)
        probes = [
            Probe(prompt=t.replace("{}", fact.subject), target=new, avoid=fact.object, kind="paraphrase")
            for t in fact.held_out
        ]
        near = [
            f for f in facts.neighbours(fact) if (f.subject, f.relation) not in edited and f.object != new
        ]
        for other in rng.sample(near, min(_NEIGHBOURS, len(near))):
            probes.append(
                Probe(
                    prompt=_prompt(other, rng, template), target=other.object, avoid=new, kind="neighbourhood"
                )
            )
        for other in facts.other_facts(fact):
            probes.append(
                Probe(
                    prompt=_prompt(other, rng), target=other.object, kind="same_subject", group=other.relation
                )
            )
        probes += _portability(facts, fact, new, edited)
        requests.append(
            EditRequest(
                id=f"{fact.subject} / {fact.relation}",
                prompt=template,
                subject=fact.subject,
                target_new=new,
                target_true=fact.object,
                relation=fact.relation,
                probes=tuple(probes),
            )
        )
    return requests
