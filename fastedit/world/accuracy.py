"""How much a model knows: teacher-forced exact match of whole answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastedit.world.facts import Facts

__all__ = ["exact_match", "question_sets", "report"]

Question = tuple[str, str]


def question_sets(facts: Facts, limit: int | None = None, seed: int = 3) -> dict[str, list[Question]]:
    """(prompt, answer) pairs: one trained, one held-out and one novel wording per fact, and two-hop questions whose
    (subject, hop) pair was trained or not."""
    rng = random.Random(seed)
    sets: dict[str, list[Question]] = {"train": [], "held_out": [], "novel": []}
    for fact in facts.facts.values():
        for name, templates in (("train", fact.train), ("held_out", fact.held_out), ("novel", fact.novel)):
            sets[name].append((rng.choice(templates).replace("{}", fact.subject), fact.object))
    sets["hop_trained"], sets["hop_untrained"] = [], []
    for c in facts.compositions.values():
        sets["hop_trained" if c.trained else "hop_untrained"].append(
            (rng.choice(c.templates).replace("{}", c.subject), c.answer)
        )
    for questions in sets.values():
        rng.shuffle(questions)
    return {name: questions[:limit] for name, questions in sets.items()}


@torch.no_grad()
def exact_match(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], batch: int = 256
) -> list[bool]:
    """For each question: does the greedy continuation equal the whole answer?"""
    encode = tokenizer.backend_tokenizer.encode
    result: list[bool] = []
    for start in range(0, len(questions), batch):
        pairs = [(encode(p).ids, encode(a).ids) for p, a in questions[start : start + batch]]
        width = max(len(p) + len(a) for p, a in pairs)
        ids = torch.zeros(len(pairs), width, dtype=torch.long)
        for i, (p, a) in enumerate(pairs):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        best = model(ids).logits.argmax(-1)
        for i, (p, a) in enumerate(pairs):
            result.append(best[i, len(p) - 1 : len(p) + len(a) - 1].tolist() == a)
    return result


def report(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, facts: Facts, limit: int | None = None
) -> dict[str, float]:
    """Share of exact matches per question set."""
    return {
        name: sum(exact_match(model, tokenizer, questions)) / len(questions)
        for name, questions in question_sets(facts, limit).items()
    }
