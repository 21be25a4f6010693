"""Teacher-forced scores against a plain forward per item, on every decoder-only architecture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CAUSAL, tiny_model, tiny_tokenizer

from fastedit.arch import resolve
from fastedit.evaluate import scoring
from fastedit.evaluate.scoring import score_targets
from fastedit.tokens import Encoded, encode_prompt, target_ids

PROMPTS = ("The", "The Eiffel Tower is located in the city of", "Marie Curie worked in")
TARGETS = ("Rome", "physics and chemistry", "x")


def session_of(model: Any, tokenizer: Any) -> Any:
    return SimpleNamespace(model=model, tokenizer=tokenizer, arch=resolve(model))


def items_of(tokenizer: Any) -> list[Encoded]:
    pairs = [(prompt, target) for prompt in PROMPTS for target in TARGETS]
    return [encode_prompt(tokenizer, p, target=target_ids(tokenizer, t)) for p, t in pairs]


def plain(model: Any, item: Encoded) -> tuple[float, int]:
    """log p of the target and arg-max matches from one unpadded forward with all logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([item.ids])).logits[0].double()  # [T, V]
    rows = logits[item.target_start :]  # [n, V]
    targets = torch.tensor(item.target)
    log_probs = rows.log_softmax(-1)[torch.arange(len(targets)), targets]
    return float(log_probs.sum()), int((rows.argmax(-1) == targets).sum())


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_equals_a_plain_forward_per_item(model_type: str, batch_tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(model_type)
    items = items_of(tokenizer)
    scores = score_targets(session_of(model, tokenizer), items, batch_tokens=batch_tokens)
    for item, score in zip(items, scores, strict=True):
        log_prob, matches = plain(model, item)
        assert score.log_prob == pytest.approx(log_prob, abs=2e-4)
        assert (score.tokens, score.matches) == (len(item.target), matches)
        assert score.greedy == (matches == len(item.target))


def test_greedy_is_what_generation_gives() -> None:
    tokenizer, model = tiny_tokenizer(bos=True), tiny_model("llama")
    row = encode_prompt(tokenizer, PROMPTS[1])
    with torch.no_grad():
        out = model.generate(torch.tensor([row.ids]), max_new_tokens=4, do_sample=False, pad_token_id=1)
    target = tuple(out[0, len(row.ids) :].tolist())
    items = [
        Encoded(row.ids + target[:-1], row.lookup, row.target_start, target),
        Encoded(row.ids + target[:-1], row.lookup, row.target_start, (*target[:-1], (target[-1] + 1) % 300)),
    ]
    first, second = score_targets(session_of(model, tokenizer), items)
    assert first.greedy and not second.greedy
    assert second.matches == len(target) - 1


def test_memory_is_bounded_and_repeats_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("gpt2")
    items = items_of(tokenizer)
    shapes = []
    forward = scoring._rows_of_logits

    def spy(session: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = forward(session, ids, *rest)
        shapes.append((ids.numel(), logits.numel()))
        return logits

    monkeypatch.setattr(scoring, "_rows_of_logits", spy)
    monkeypatch.setattr(scoring, "_LOGIT_BUDGET", 12 * model.config.vocab_size)
    scores = score_targets(session_of(model, tokenizer), items * 3, batch_tokens=50)
    assert scores[: len(items)] * 3 == scores
    assert sum(logits for _, logits in shapes) == sum(len(i.target) for i in items) * model.config.vocab_size
    longest = max(len(item.target) for item in items) * model.config.vocab_size
    assert all(tokens <= 50 and logits <= max(longest, 12 * 320) for tokens, logits in shapes)


def test_the_model_is_left_as_it_was() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("gpt2")
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="non-finite"):
        with torch.no_grad():
            model.transformer.wte.weight[5] = float("nan")
        score_targets(session_of(model, tokenizer), items_of(tokenizer))
    assert [module.training for module in model.modules()] == before
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("model_type", ["t5", "bert"])
def test_other_models_are_refused(model_type: str) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(NotImplementedError, match=f"decoder-only .*={model_type!r}"):
        score_targets(session_of(tiny_model(model_type), tokenizer), items_of(tokenizer))


def test_bad_arguments() -> None:
    tokenizer = tiny_tokenizer()
    session = session_of(tiny_model("gpt2"), tokenizer)
    with pytest.raises(ValueError, match=r"batch_tokens must be >= 1, got 0"):
        score_targets(session, items_of(tokenizer), batch_tokens=0)
    with pytest.raises(ValueError, match=r"items\[0\] must have a target"):
        score_targets(session, [encode_prompt(tokenizer, "The")])
