"""The synthetic world itself: facts, wordings, text, tokenizer. No weights needed."""

from __future__ import annotations

import random

import pytest

from fastedit.world.batches import Encoder, batches
from fastedit.world.corpus import documents, filler, text_of, texts
from fastedit.world.embedded import load_tokenizer
from fastedit.world.facts import SUBJECT_TYPES, build_facts
from fastedit.world.relations import HOPS, RELATIONS
from fastedit.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def facts():
    return build_facts()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_same_seed_gives_the_same_world_and_another_seed_another(facts):
    assert build_facts().facts == facts.facts
    assert build_facts(1).facts != facts.facts


def test_every_fact_has_disjoint_train_held_out_and_novel_wordings(facts):
    for fact in facts.facts.values():
        assert len(fact.held_out) == 2 and len(fact.train) >= 6 and len(fact.novel) == 2
        assert len({*fact.train, *fact.held_out, *fact.novel}) == len(fact.train) + 4


def test_held_out_wordings_are_trained_for_other_subjects(facts):
    for relation in RELATIONS.values():
        trained = {t for f in facts.facts.values() if f.relation == relation.name for t in f.train}
        assert trained == set(relation.templates)


def test_no_template_is_part_of_another_one_of_its_subject_type():
    # as a prefix it would have two continuations, as a suffix a held-out wording would occur in the training text
    for kind in SUBJECT_TYPES:
        templates = [t for r in RELATIONS.values() if r.subject == kind for t in r.templates]
        templates += [t for h in HOPS.values() if RELATIONS[h.first].subject == kind for t in h.templates]
        for t in templates:
            assert t.count("{}") == 1
            assert not [u for u in templates if u != t and t in u], t


def test_novel_wordings_are_not_part_of_any_trained_one():
    for relation in RELATIONS.values():
        assert not any(n in t for n in relation.novel for t in relation.templates)


def test_compositions_follow_the_facts(facts):
    for (subject, name), c in facts.compositions.items():
        hop = HOPS[name]
        assert c.bridge == facts.facts[subject, hop.first].object
        assert c.answer == facts.facts[c.bridge, hop.second].object
    trained = [c.trained for c in facts.compositions.values()]
    assert 0.6 < sum(trained) / len(trained) < 0.75


def test_relations_around_a_fact(facts):
    fact = facts.facts[facts.entities["person"][0], "born_in"]
    assert {f.relation for f in facts.other_facts(fact)} == {"works_for", "plays", "profession", "speaks"}
    assert all(f.relation == "born_in" and f.subject != fact.subject for f in facts.neighbours(fact))
    assert {c.hop for c in facts.hops_over(fact)} == {"born_in>country", "born_in>river"}
    with pytest.raises(ValueError, match="'Nobody' is not an entity"):
        facts.about("Nobody")


def test_untrained_compositions_and_held_out_wordings_never_occur_in_text(facts):
    text = "\n".join(texts(facts, 1000, 1))
    for c in facts.compositions.values():
        if not c.trained:
            assert not any(t.replace("{}", c.subject) in text for t in c.templates)
    for fact in facts.facts.values():
        assert not any(t.replace("{}", fact.subject) + " " + fact.object in text for t in fact.held_out)


def test_texts_are_reproducible_and_refuse_a_count_below_one(facts):
    assert texts(facts, 5, 3) == texts(facts, 5, 3) != texts(facts, 5, 4)
    with pytest.raises(ValueError, match="n_docs must be at least 1, got 0"):
        texts(facts, 0, 1)


def test_committed_tokenizer_is_what_the_builder_builds(tokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_tokenizer_round_trip(facts, tokenizer):
    for text in texts(facts, 50, 5):
        assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    odd = "Größe 漢字 \U0001f600 {x}"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]).strip() == odd


def test_names_are_syllables_and_ordinary_words_single_tokens(facts, tokenizer):
    people = [len(tokenizer(p)["input_ids"]) for p in facts.entities["person"]]
    assert min(people) >= 4
    assert len(tokenizer("headquartered")["input_ids"]) == 1


def test_pieces_encode_to_the_ids_of_the_whole_text_with_the_right_spans(facts, tokenizer):
    encoder, source = Encoder(tokenizer), documents(facts, 8)
    for _ in range(200):
        document = next(source)
        ids: list[int] = []
        for sentence in document:
            piece, weights, span = encoder.sentence(sentence)
            assert len(piece) == len(weights)
            if span is not None:
                assert tokenizer.decode(piece[span[0] : span[1] + 1]).strip() == sentence.subject
            ids += piece
        assert ids == tokenizer(text_of(document))["input_ids"]


def test_batches_have_their_shapes_and_mark_two_hop_tokens(facts, tokenizer):
    batch = next(batches(facts, tokenizer, seed=0, rows=4, width=48, p_hop=0.9))
    assert batch.ids.shape == batch.weights.shape == batch.hops.shape == (4, 48)
    assert batch.hops.any() and not batch.hops.all()
    assert all(0 <= a <= b < 48 for spans in batch.spans for a, b in spans)


def test_filler_ends_with_a_full_stop():
    rng = random.Random(0)
    assert all(filler(rng).endswith(".") for _ in range(200))
