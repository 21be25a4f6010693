"""Edit requests over the world: structure, disjoint halves, probes that the world can answer for."""

from __future__ import annotations

import pytest

from fastedit.world.facts import build_facts
from fastedit.world.relations import HOPS, RELATIONS
from fastedit.world.requests import make_requests


@pytest.fixture(scope="module")
def facts():
    return build_facts()


@pytest.fixture(scope="module")
def requests(facts):
    return make_requests(facts, 50, seed=0, split="test")


def test_fifty_requests_of_fifty_subjects_with_every_kind_of_probe(requests):
    assert len({r.subject for r in requests}) == 50
    assert len({r.id for r in requests}) == 50
    for r in requests:
        assert len(r.probes_of("paraphrase")) == 2
        assert 1 <= len(r.probes_of("neighbourhood")) <= 10
        assert r.probes_of("same_subject")
        assert r.text == r.prompt.replace("{}", r.subject)
    assert sum(bool(r.probes_of("portability")) for r in requests) >= 8


def test_requests_agree_with_the_facts(facts, requests):
    for r in requests:
        fact = facts.facts[r.subject, r.relation]
        assert r.target_true == fact.object != r.target_new
        assert r.target_new in facts.entities[RELATIONS[fact.relation].object]
        assert r.prompt in fact.train
        assert {p.prompt for p in r.probes_of("paraphrase")} == {
            t.replace("{}", r.subject) for t in fact.held_out
        }
        assert all(p.target == r.target_new for p in r.probes_of("paraphrase"))
        assert {p.group for p in r.probes_of("same_subject")} == {f.relation for f in facts.other_facts(fact)}


def test_new_objects_occur_in_the_training_text(facts, requests):
    named = {f.object for f in facts.facts.values()} | {subject for subject, _ in facts.facts}
    unnamed = {o for kind in facts.entities.values() for o in kind} - named
    assert unnamed, "the world has objects that no fact uses"
    many = [r for seed in range(5) for r in make_requests(facts, 60, seed, "tune")]
    assert all(r.target_new in named for r in (*requests, *many))


def test_neighbours_are_unedited_facts_with_their_true_object(facts, requests):
    edited = {(r.subject, r.relation) for r in requests}
    for r in requests:
        truth = {
            t.replace("{}", f.subject): f
            for f in facts.neighbours(facts.facts[r.subject, r.relation])
            for t in f.train
        }
        for p in r.probes_of("neighbourhood"):
            fact = truth[p.prompt]
            assert p.target == fact.object != r.target_new
            assert (fact.subject, fact.relation) not in edited


def test_portability_probes_follow_the_new_object_and_were_never_trained(facts, requests):
    for r in requests:
        for p in r.probes_of("portability"):
            c = facts.compositions[r.subject, p.group]
            assert not c.trained
            assert p.avoid == c.answer != p.target
            assert p.target == facts.facts[r.target_new, HOPS[p.group].second].object


def test_the_two_halves_share_no_subject(facts):
    tune = {r.subject for seed in range(4) for r in make_requests(facts, 50, seed, "tune")}
    test = {r.subject for seed in range(4) for r in make_requests(facts, 50, seed, "test")}
    assert tune and test and not tune & test


def test_seeds(facts, requests):
    assert make_requests(facts, 50, 0, "test") == requests
    assert make_requests(facts, 50, 1, "test") != requests


@pytest.mark.parametrize("n", [0, 10_000])
def test_a_number_out_of_range_is_refused(facts, n):
    with pytest.raises(ValueError, match=f"n must be between 1 and .* for split 'test', got {n}"):
        make_requests(facts, n)


def test_an_unknown_split_is_refused(facts):
    with pytest.raises(ValueError, match="split must be one of tune, test, got 'dev'"):
        make_requests(facts, 5, split="dev")
