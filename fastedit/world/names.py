"""Names of the fact world: every name is built from a small set of syllables, so that names span several tokens.

The syllable tables are also what the tokenizer is trained on (see :mod:`fastedit.world.tokenizer`): it learns the
syllables and never a whole name.
"""

from __future__ import annotations

import random

__all__ = [
    "COMPANY_SUFFIXES",
    "ENDINGS",
    "INITIAL",
    "INSTRUMENTS",
    "LANDMARK_KINDS",
    "MIDDLE",
    "PRODUCTS",
    "PROFESSIONS",
    "NameMaker",
]


def _words(text: str) -> list[str]:
    return text.split()


INITIAL = _words(
    "Bel Tos Vel Kan Dor Mir Rul Sen Gal Pry Hol Zan Fen Lor Tam Quil Bran Cor Dun Elm Fros Gren Hax Ist Jor Kel "
    "Lum Mod Nar Oss Pel Rav Sil Tor Ulm Vor Wex Yal Zor Ard Bos Cal Dray Erl Fal Gor Hem Ilv Jas Krop Lan Mez Nol "
    "Orb Pas Quor Ros Stel Trin Urd Vas Wol Xan Yor Zel Bik Chal Dev Eck Fur Glim Hur Ink Jev Kys Lest Mun Neb"
)
MIDDLE = _words("a e i o u an el or is um ar en")
ENDINGS: dict[str, list[str]] = {
    "first": _words("mar vik sa len dra tin bo rek lia nor fi gan mo ris tha wen lo dis kor ni"),
    "last": _words(
        "ton berg sky man dell ford rick sen wald strom quist by hurst leigh ner ham mond gard fell lock"
    ),
    "city": _words("mora polis burgh haven gate dale port stead ville minster"),
    "country": _words("ania land stan uria avia onia"),
    "language": _words("ish ese ic ian"),
    "company": _words("dyne tek corp ex ium ova ix ora"),
    "river": _words("win ster rel una ome"),
    "currency": _words("ar ot una ek"),
}
LANDMARK_KINDS = _words("Tower Bridge Castle Museum Temple Palace Theater Garden Library Fountain")
INSTRUMENTS = _words("piano violin guitar flute drums harp trumpet cello clarinet banjo organ saxophone")
PROFESSIONS = _words(
    "doctor lawyer teacher painter baker farmer carpenter dentist pilot librarian plumber journalist"
)
PRODUCTS = _words(
    "steel glass paper software bicycles furniture medicine shoes clocks cement engines chocolate"
)
COMPANY_SUFFIXES = _words("Group Industries Works Company")


class NameMaker:
    """Draws names that are all different from each other, from one random generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def words(self, count: int, endings: list[str], middle: float = 0.0) -> list[str]:
        """`count` one-word names; initials repeat only after all have been used; `middle` = share with a third
        syllable."""
        rng = self._rng
        initials = INITIAL[:]
        rng.shuffle(initials)
        names: list[str] = []
        turn = 0
        while len(names) < count:
            start = initials[turn % len(initials)]
            turn += 1
            name = start + (rng.choice(MIDDLE) if rng.random() < middle else "") + rng.choice(endings)
            if name not in self._used:
                self._used.add(name)
                names.append(name)
        return names

    def people(self, count: int, family: int = 4) -> list[str]:
        """`count` two-word names in groups of `family` that differ in the last syllable only.

        Only the last token of such a name tells who is meant, so a fact about the person can be looked up at the
        last subject token and not earlier.
        """
        rng = self._rng
        first = self.words(24, ENDINGS["first"])
        stems = rng.sample(INITIAL, 24)
        groups = [f"{name} {stem}" for name in first for stem in stems]
        rng.shuffle(groups)
        people: list[str] = []
        for group in groups[: -(-count // family)]:
            people += [group + ending for ending in rng.sample(ENDINGS["last"], family)]
        self._used.update(word for name in people for word in name.split())
        return people[:count]
