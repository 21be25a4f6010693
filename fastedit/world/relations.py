"""The relations of the fact world and their wordings.

`RELATIONS` are one-hop facts, `HOPS` chains of two. In every template the object follows directly, and no template
is a prefix of another one of the same subject type. `novel` wordings never occur in training, for any fact.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HOPS", "RELATIONS", "Hop", "Relation"]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One relation: types of subject and object, wordings in use, wordings never trained on."""

    name: str
    subject: str
    object: str
    templates: tuple[str, ...]
    novel: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Hop:
    """A chain of two relations, asked for without naming the entity in the middle."""

    name: str
    first: str
    second: str
    templates: tuple[str, ...]


def _relation(name: str, subject: str, object: str, templates: str, novel: str) -> Relation:
    return Relation(
        name=name,
        subject=subject,
        object=object,
        templates=tuple(t.strip() for t in templates.split("|")),
        novel=tuple(t.strip() for t in novel.split("|")),
    )


def _hop(first: str, second: str, templates: str) -> Hop:
    return Hop(
        name=f"{first}>{second}",
        first=first,
        second=second,
        templates=tuple(t.strip() for t in templates.split("|")),
    )


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        _relation(
            "born_in",
            "person",
            "city",
            "{} was born in | {} comes from the city of | The birthplace of {} is | {} is a native of | "
            "The home town of {} is | {} grew up in | {} went to school in | The city where {} was born is | "
            "{} spent a childhood in | The first home of {} was in",
            "The city of birth of {} is | {} was a child in",
        ),
        _relation(
            "works_for",
            "person",
            "company",
            "{} works for | {} is employed by | {} has a job at | The employer of {} is | {} is on the staff of | "
            "{} earns a salary at | The company that employs {} is | {} signed a contract with | "
            "{} goes to the office at | The salary of {} is paid by",
            "The job of {} is at | {} has a contract with",
        ),
        _relation(
            "plays",
            "person",
            "instrument",
            "{} plays the | {} performs on the | The instrument of {} is the | {} is a master of the | "
            "{} practices on the | At concerts {} performs with the | {} took lessons on the | "
            "The instrument played by {} is the | {} gives concerts on the | The music of {} is made on the",
            "{} makes music on the | At lessons {} practices on the",
        ),
        _relation(
            "profession",
            "person",
            "profession",
            "{} works as a | {} was trained as a | The profession of {} is that of a | {} earns a living as a | "
            "By profession {} is a | The occupation of {} is that of a | {} made a career as a | "
            "{} found work as a | People know {} as a | {} has the skills of a",
            "The skills of {} are those of a | {} was employed as a",
        ),
        _relation(
            "speaks",
            "person",
            "language",
            "{} speaks | The mother tongue of {} is | {} is fluent in | The native language of {} is | "
            "At home {} talks in | {} writes letters in | {} thinks in | The language spoken by {} is | "
            "{} sings songs in | {} reads books in",
            "The language of {} is | At home {} reads in",
        ),
        _relation(
            "hq",
            "company",
            "city",
            "{} is headquartered in | The headquarters of {} are in | {} is based in | The main office of {} is in | "
            "{} has its head office in | {} operates from | The city where {} is based is | {} was set up in",
            "The head office of {} is in | {} has its headquarters in",
        ),
        _relation(
            "ceo",
            "company",
            "person",
            "The CEO of {} is | {} is led by | The head of {} is | {} is run by | The company {} is managed by | "
            "The boss of {} is | {} takes orders from | The chief executive of {} is",
            "The company {} is run by | The chief of {} is",
        ),
        _relation(
            "product",
            "company",
            "product",
            "{} produces | {} makes | The main product of {} is | {} is known for its | {} sells | "
            "Customers of {} buy | The factories of {} make | {} earns money with",
            "The factories of {} produce | {} makes money with",
        ),
        _relation(
            "country",
            "city",
            "country",
            "{} is located in | {} is a city in | {} lies in | The country of {} is | {} belongs to | "
            "The city of {} is in | Maps show {} in | {} can be found in",
            "The city of {} belongs to | Maps show the city of {} in",
        ),
        _relation(
            "river",
            "city",
            "river",
            "{} lies on the river | The river that flows through {} is the | {} is built along the | "
            "The bridges of {} cross the | Boats reach {} on the | The water of {} comes from the | "
            "{} was founded on the | The river of {} is the",
            "The bridges of {} are built along the | The city of {} lies on the river",
        ),
        _relation(
            "capital",
            "country",
            "city",
            "The capital of {} is | {} has its capital in | {} is governed from | The government of {} sits in | "
            "The capital city of {} is | The parliament of {} meets in | The king of {} lives in | {} is ruled from",
            "The government of {} meets in | The king of {} sits in",
        ),
        _relation(
            "language",
            "country",
            "language",
            "The language of {} is | The people of {} speak | In {} people speak | "
            "The official language of {} is | The laws of {} are written in | Schools in {} teach in | "
            "The newspapers of {} are printed in | {} has the official language",
            "In {} newspapers are printed in | The books of {} are written in",
        ),
        _relation(
            "currency",
            "country",
            "currency",
            "The currency of {} is the | In {} people pay with the | {} uses the | The money of {} is the | "
            "The banks of {} issue the | Prices in {} are given in the | Shops in {} accept the | "
            "The official currency of {} is the",
            "The people of {} pay with the | Banks in {} accept the",
        ),
        _relation(
            "place",
            "landmark",
            "city",
            "{} is in the city of | {} stands in | {} can be visited in | The location of {} is | "
            "To see {} one travels to | {} was built in | Tourists visit {} in | {} attracts visitors to",
            "Tourists see {} in | To visit {} one travels to",
        ),
        _relation(
            "architect",
            "landmark",
            "person",
            "{} was designed by | The architect of {} was | {} was planned by | The plans of {} were drawn by | "
            "{} is the work of | The design of {} is by | {} was created by | The designer of {} was",
            "The plans of {} are by | {} was the work of",
        ),
    )
}

HOPS: dict[str, Hop] = {
    hop.name: hop
    for hop in (
        _hop(
            "works_for",
            "hq",
            "The employer of {} has its head office in | {} works at a company based in | "
            "The company that pays {} is headquartered in",
        ),
        _hop(
            "works_for",
            "ceo",
            "The employer of {} takes orders from | {} works at a company led by | "
            "The company that pays {} is run by",
        ),
        _hop(
            "works_for",
            "product",
            "The employer of {} sells | {} works at a company that makes | The company that pays {} produces",
        ),
        _hop(
            "born_in",
            "country",
            "The birthplace of {} lies in | {} was born at a place in | The home town of {} can be found in",
        ),
        _hop(
            "born_in",
            "river",
            "The birthplace of {} lies on the river | {} was born at the river | "
            "The home town of {} stands along the",
        ),
        _hop(
            "place",
            "country",
            "{} belongs to the country of | The city around {} lies in | "
            "Tourists who visit {} travel to the country of",
        ),
        _hop(
            "place",
            "river",
            "{} stands near the river | The city around {} lies on the river | "
            "Tourists who visit {} see the river",
        ),
        _hop(
            "hq",
            "country",
            "The head office of {} lies in the country of | {} has its home in the country of | "
            "The city where {} is based lies in",
        ),
        _hop(
            "country",
            "language",
            "People in the city of {} speak | Schools in the city of {} teach in | "
            "The streets of {} are full of people who speak",
        ),
        _hop(
            "country",
            "currency",
            "People in the city of {} pay with the | Shops in the city of {} accept the | "
            "Prices in the city of {} are given in the",
        ),
    )
}
