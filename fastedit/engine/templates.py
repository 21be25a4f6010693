"""Context templates: short texts sampled from the model itself, put before the prompt.

The originals sample them unseeded with top-5 sampling, once per process. Here they come from the session's
generator, are stored in the Edit, and can be injected, because results depend on them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

__all__ = ["MEMIT_SEEDS", "flat_templates", "grouped_templates", "sample_texts"]

MEMIT_SEEDS = ("The", "Therefore", "Because", "I", "You")


def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    length: int,
    generator: torch.Generator,
    *,
    top_k: int = 5,
) -> list[str]:
    """Continue each prompt to ``length`` tokens in all (prompt included) by top-k sampling.

    Args:
        generator: a CPU generator; the same state gives the same texts on one machine.
    """
    device = next(model.parameters()).device
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = []
    with torch.no_grad():
        for row in rows:
            # One prompt at a time: lengths differ, and a padded row would see its pads.
            ids = list(row)
            while len(ids) < length:
                row_ids = torch.tensor([ids], device=device)
                mask = torch.ones_like(row_ids)
                output = model(input_ids=row_ids, attention_mask=mask, use_cache=False, return_dict=True)
                logits = output.logits[0, -1].float().cpu()
                top = torch.topk(logits, min(top_k, logits.numel()))
                choice = torch.multinomial(torch.softmax(top.values, -1), 1, generator=generator)
                ids.append(int(top.indices[choice]))
            texts.append(_clean(tokenizer.decode(ids), tokenizer))
    return texts


def _clean(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The originals' clean-up: NFKD, no special tokens, no blank lines; braces would look like slots."""
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ")
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.replace("{", " ").replace("}", " ").strip()


def flat_templates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> tuple[str, ...]:
    """ROME's list: the bare prompt, then ``count`` texts of ``length`` tokens for each ``(length, count)``."""
    start = tokenizer.bos_token or tokenizer.eos_token
    seeds = [start] if start is not None and not tokenizer("").get("input_ids") else list(MEMIT_SEEDS)
    templates = ["{}"]
    for length, count in lengths:
        prompts = [seeds[i % len(seeds)] for i in range(count)]
        templates += [f"{text}. {{}}" for text in sample_texts(model, tokenizer, prompts, length, generator)]
    return tuple(templates)


def grouped_templates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> tuple[tuple[str, ...], ...]:
    """MEMIT's groups: ``(("{}",), (five texts ...))``, one group per ``(length, count)``."""
    groups: list[tuple[str, ...]] = [("{}",)]
    for length, count in lengths:
        prompts = [MEMIT_SEEDS[i % len(MEMIT_SEEDS)] for i in range(count)]
        groups.append(
            tuple(f"{text}. {{}}" for text in sample_texts(model, tokenizer, prompts, length, generator))
        )
    return tuple(groups)
