"""Metrics: every number against its definition, computed here from plain forwards."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from fastedit.arch import resolve
from fastedit.evaluate import Evaluation, ProbeScore, evaluate, perplexity
from fastedit.request import EditRequest, Probe
from fastedit.tokens import encode_prompt, target_ids

NEAR = {"rel": 1e-4, "abs": 1e-6}


@pytest.fixture(scope="module")
def session() -> Any:
    model = tiny_model("gpt2")
    return SimpleNamespace(model=model, tokenizer=tiny_tokenizer(), arch=resolve(model))


def request(name: str = "a", *probes: Probe, true: str | None = "Paris") -> EditRequest:
    return EditRequest(
        id=name,
        prompt="{} is located in the city of",
        subject="The Eiffel Tower",
        target_new="Rome",
        target_true=true,
        probes=probes,
    )


def probe(kind: str, prompt: str = "The Colosseum is in", avoid: str | None = "Paris") -> Probe:
    return Probe(kind=kind, prompt=prompt, target="Rome", avoid=avoid)


def log_probs(session: Any, prompt: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token log-probabilities [n] of the target, and which tokens are the arg-max [n]."""
    item = encode_prompt(session.tokenizer, prompt, target=target_ids(session.tokenizer, target))
    with torch.no_grad():
        rows = session.model(input_ids=torch.tensor([item.ids])).logits[0, item.target_start :].double()
    wanted = torch.tensor(item.target)
    return rows.log_softmax(-1).gather(1, wanted[:, None])[:, 0], rows.argmax(-1) == wanted


def test_every_number_of_a_probe(session: Any) -> None:
    (score,) = evaluate(session, request()).probes
    new, hit = log_probs(session, "The Eiffel Tower is located in the city of", "Rome")
    old, _ = log_probs(session, "The Eiffel Tower is located in the city of", "Paris")
    assert (score.request, score.kind, score.target, score.avoid) == ("a", "rewrite", "Rome", "Paris")
    assert score.probability == pytest.approx(math.exp(new.mean()), **NEAR)
    assert score.whole_probability == pytest.approx(math.exp(new.sum()), **NEAR)
    assert score.avoid_probability == pytest.approx(math.exp(old.mean()), **NEAR)
    assert score.avoid_whole_probability == pytest.approx(math.exp(old.sum()), **NEAR)
    assert score.accuracy == float(hit.all())
    assert score.token_accuracy == pytest.approx(float(hit.double().mean()))
    assert score.success == float(new.mean() > old.mean())
    assert score.magnitude == pytest.approx(math.exp(new.mean()) - math.exp(old.mean()), **NEAR)


def test_means_are_over_requests_and_empty_kinds_are_absent(session: Any) -> None:
    prompts = ("The Colosseum is in", "LeBron James plays", "Marie Curie worked in the field of")
    evaluation = evaluate(
        session,
        [
            request("a", probe("paraphrase", prompts[0]), probe("paraphrase", prompts[1])),
            request("b", probe("paraphrase", prompts[2]), true=None),
            request("c", Probe(kind="generation", prompt="The Eiffel Tower", target="")),
        ],
    )
    summary = evaluation.summary
    assert list(summary) == ["rewrite", "paraphrase"]
    one, two, three = (math.exp(log_probs(session, prompt, "Rome")[0].mean()) for prompt in prompts)
    assert summary["paraphrase"].probability == pytest.approx(((one + two) / 2 + three) / 2, **NEAR)
    assert (summary["paraphrase"].requests, summary["paraphrase"].probes) == (2, 3)
    assert (summary["rewrite"].requests, summary["rewrite"].pairs) == (3, 2)
    assert evaluation.score is None
    assert "score" not in evaluation.to_dict() and "neighbourhood" not in evaluation.to_dict()["kinds"]
    assert list(evaluation.of("b")) == ["rewrite", "paraphrase"]
    assert evaluation.of("b")["rewrite"].success is None
    with pytest.raises(KeyError):
        evaluation.of("d")


def made(kind: str, success: float | None, name: str = "a") -> ProbeScore:
    return ProbeScore(
        request=name,
        kind=kind,
        group=None,
        prompt="p",
        target="t",
        avoid=None if success is None else "u",
        accuracy=1.0,
        token_accuracy=1.0,
        probability=0.5,
        whole_probability=0.25,
        avoid_accuracy=None if success is None else 0.0,
        avoid_probability=None if success is None else 0.5,
        avoid_whole_probability=None if success is None else 0.5,
        success=success,
        magnitude=None if success is None else 0.0,
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_score_is_the_harmonic_mean(rows: list[tuple[bool, bool, bool]]) -> None:
    kinds = ("rewrite", "paraphrase", "neighbourhood")
    probes = [made(kind, float(row[i]), str(n)) for n, row in enumerate(rows) for i, kind in enumerate(kinds)]
    means = [sum(row[i] for row in rows) / len(rows) for i in range(3)]
    expected = 3 / sum(1 / mean for mean in means) if all(means) else 0.0
    assert Evaluation(tuple(probes)).score == pytest.approx(expected)


def test_score_needs_all_three_kinds_and_pairs() -> None:
    assert Evaluation((made("rewrite", 1.0), made("paraphrase", 1.0))).score is None
    unpaired = (made("rewrite", 1.0), made("paraphrase", 1.0), made("neighbourhood", None))
    assert Evaluation(unpaired).score is None


def test_the_dict_is_json_and_keeps_the_probes(session: Any) -> None:
    evaluation = evaluate(session, request("a", probe("neighbourhood", avoid=None)))
    document = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert document["kinds"]["rewrite"]["probes"] == 1
    assert "success" not in document["kinds"]["neighbourhood"]
    assert [item["kind"] for item in document["probes"]] == ["rewrite", "neighbourhood"]
    assert "probes" not in evaluation.to_dict(probes=False)


def test_kinds_choose_what_is_scored(session: Any) -> None:
    requests = [request("a", probe("paraphrase"), probe("neighbourhood"))]
    assert list(evaluate(session, requests, kinds=["paraphrase"]).summary) == ["paraphrase"]
    assert evaluate(session, requests, kinds=["portability"]).summary == {}
    with pytest.raises(ValueError, match=r"kinds must be among rewrite, .*; got 'generation'"):
        evaluate(session, requests, kinds=["generation"])
    with pytest.raises(ValueError, match="kinds must be a sequence"):
        evaluate(session, requests, kinds="paraphrase")


def test_bad_requests_are_named(session: Any) -> None:
    with pytest.raises(ValueError, match="requests must hold at least one"):
        evaluate(session, [])
    with pytest.raises(ValueError, match="different ids, got 'a' twice"):
        evaluate(session, [request("a"), request("a")])


def test_perplexity_is_the_exponential_of_the_mean_loss(session: Any) -> None:
    texts = ["The Eiffel Tower is located in the city of Paris.", "LeBron James plays basketball.", "a"]
    total, count = 0.0, 0
    for text in texts[:2]:
        ids = torch.tensor([session.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = session.model(input_ids=ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert perplexity(session, texts) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_of_long_texts_scores_every_token_in_windows(session: Any) -> None:
    text = "The Eiffel Tower is located in the city of Paris."
    ids = session.tokenizer(text)["input_ids"]
    total = 0.0
    for start in range(0, len(ids) - 1, 4):
        window = torch.tensor([ids[start : start + 5]])
        with torch.no_grad():
            total += float(session.model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    assert perplexity(session, [text], max_length=4) == pytest.approx(
        math.exp(total / (len(ids) - 1)), rel=1e-4
    )


def test_perplexity_of_nothing_is_refused(session: Any) -> None:
    with pytest.raises(ValueError, match="at least one text of two tokens"):
        perplexity(session, ["", "a"])
    with pytest.raises(ValueError, match="texts must be a list"):
        perplexity(session, "The")
    with pytest.raises(ValueError, match="max_length must be >= 2, got 1"):
        perplexity(session, ["The city"], max_length=1)
