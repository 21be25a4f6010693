"""What the benches of the engines run on: random models of published shapes, made-up facts, made-up statistics.

The facts have the token counts of COUNTERFACT (means over its first thousand requests): 0.67 tokens before the subject
(79.6 % of the prompts start with it), 3.8 of the subject, 3.1 after it, 1.3 of the target. Words are made up, one token
each; their ids are spread over the whole vocabulary, so embedding and head are read as by real text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from reference.target_vector import Request
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from fastedit.editor import Editor
from fastedit.request import EditRequest
from fastedit.stats import SecondMoment

__all__ = [
    "GPT2_MEDIUM",
    "GPTJ_6B",
    "MEMIT",
    "MEMIT_GPTJ",
    "ROME",
    "editor",
    "facts",
    "made_up_moment",
    "second_moments",
    "statistics_of",
    "templates",
    "trained_scale",
    "twin_request",
]

GPTJ_6B = {
    "n_layer": 28,
    "n_embd": 4096,
    "n_head": 16,
    "vocab_size": 50400,
    "n_positions": 2048,
    "rotary_dim": 64,
}
GPT2_MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16, "vocab_size": 50257, "n_positions": 1024}
# Published hyper-parameters (kmeng01/rome for gpt2-medium, kmeng01/memit for gpt2-xl) as the twins name them; MEMIT's
# layers are those of the same depth as gpt2-xl's 13-17 of 48, shifted to where a 24-layer model recalls facts.
ROME = {"layer": 8, "steps": 20, "lr": 0.5, "clamp": 3.0, "weight_decay": 0.5, "kl_factor": 0.0625}
MEMIT = {
    "layers": (8, 9, 10, 11, 12),
    "steps": 20,
    "lr": 0.5,
    "clamp": 0.75,
    "weight_decay": 0.5,
    "kl_factor": 0.0625,
    "lam": 20000.0,
}
MEMIT_GPTJ = {**MEMIT, "layers": (3, 4, 5, 6, 7, 8), "steps": 25, "lam": 15000.0}

# (tokens before, tokens after the subject) of 49 relations: 39 start with the subject.
_BEFORE = [3] * 7 + [4] * 3 + [0] * 39
_AFTER = [1] * 6 + [2] * 13 + [3] * 13 + [4] * 9 + [5] * 4 + [6] * 4
_SUBJECT = [4, 3, 5, 4, 2, 4, 3, 5, 4, 4, 3, 6, 4, 2, 5, 3, 4, 4, 3, 4]
_TARGET = [1, 1, 2, 1, 1, 1, 2, 1, 1, 2]


def editor(
    shape: dict[str, int] = GPT2_MEDIUM, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Editor:
    """A random model (GPT-2; GPT-J if the shape has a rotary_dim) made on `device`, frozen, behind an Editor."""
    torch.manual_seed(0)
    end = shape["vocab_size"] - 1
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": end, "eos_token_id": end}
    classes = (GPTJConfig, GPTJForCausalLM) if "rotary_dim" in shape else (GPT2Config, GPT2LMHeadModel)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device):
            model = classes[1](classes[0](**shape, **off))
    finally:
        torch.set_default_dtype(before)
    return Editor(model.eval().requires_grad_(False), tokenizer(shape["vocab_size"]))


def trained_scale(model: nn.Module, logits: float = 5.0) -> None:
    """Redraw a model's weights at about the scale that training gives them, on its device; always the same ones.

    With the 0.02 of a fresh model all tokens are nearly as likely whatever is corrupted, so that a trace shows nothing.
    Here a matrix keeps the size of what it reads, embeddings and head give logits of a standard deviation of `logits`,
    and gains and biases are shaken. A corrupted subject then takes a sizeable part of the answer's probability.
    """
    made: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = made.setdefault(weight.device, torch.Generator(weight.device).manual_seed(1))
            if weight.dim() > 1:
                words = any(part in name for part in ("wte", "wpe", "shared", "lm_head"))
                weight.normal_(generator=generator).mul_(
                    (logits if words else 1.0) * weight.shape[-1] ** -0.5
                )
            else:
                shaken = torch.empty_like(weight).normal_(generator=generator)
                weight.add_(shaken, alpha=0.1)


def _words(count: int) -> list[str]:
    syllables = [consonant + vowel for consonant, vowel in product("bdfgklmnprstvz", "aeiou")]
    made = ["".join(parts) for parts in product(syllables, repeat=3)]
    random.Random(1).shuffle(made)
    return made[:count]


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, another for the word after a space (as byte-level BPE has it), shuffled over the ids."""
    words = ["is", "a", *_words((vocabulary - 6) // 2)]
    entries = [form for word in words for form in (word, f" {word}")] + ["."]
    ids = list(range(vocabulary - 1))
    random.Random(2).shuffle(ids)
    vocab = {**dict(zip(entries, ids, strict=False)), "<|endoftext|>": vocabulary - 1}
    made = Tokenizer(WordLevel(vocab, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+|[.]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", padding_side="right")


def facts(count: int, vocabulary: int = GPT2_MEDIUM["vocab_size"], seed: int = 0) -> list[EditRequest]:
    """Distinct facts; prompts share 49 relations, subjects and targets are drawn anew."""
    rng = random.Random(seed)
    words = _words((vocabulary - 6) // 2)
    before, after = _BEFORE.copy(), _AFTER.copy()
    random.Random(3).shuffle(before)
    random.Random(4).shuffle(after)
    relations = []
    for ahead, behind in zip(before, after, strict=True):
        lead, tail = rng.sample(words, ahead), rng.sample(words, behind)
        relations.append(" ".join([*lead, "{}", *tail]))
    found: dict[str, EditRequest] = {}
    while len(found) < count:
        index = len(found)
        subject = " ".join(rng.sample(words, _SUBJECT[index % len(_SUBJECT)]))
        target = " ".join(rng.sample(words, _TARGET[index % len(_TARGET)]))
        prompt = relations[index % len(relations)]
        found.setdefault(
            subject, EditRequest(id=str(index), prompt=prompt, subject=subject, target_new=target)
        )
    return list(found.values())


def templates(lengths: Sequence[tuple[int, int]], vocabulary: int = GPT2_MEDIUM["vocab_size"]) -> list[str]:
    """The bare prompt, then `count` texts of `length` tokens and a full stop for each (length, count)."""
    rng = random.Random(5)
    words = _words((vocabulary - 6) // 2)
    texts = [" ".join(rng.sample(words, length)) for length, count in lengths for _ in range(count)]
    return ["{}", *(f"{text}. {{}}" for text in texts)]


def twin_request(
    tokens: Any, request: EditRequest, contexts: Sequence[str], groups: tuple[int, ...] = ()
) -> Request:
    """The request as the twins take it, tokenised by words alone and not by fastedit."""

    def ids(text: str) -> list[int]:
        return list(tokens(text)["input_ids"])

    lead = request.prompt.split("{}")[0]
    full = request.prompt.replace("{}", request.subject)
    return Request(
        rows=[ids(context.replace("{}", full)) for context in contexts],
        lookup=[len(ids(context.replace("{}", lead + request.subject))) - 1 for context in contexts],
        target=ids(f" {request.target_new}"),
        kl_row=ids(f"{request.subject} is a"),
        kl_lookup=len(ids(request.subject)) - 1,
        groups=groups,
    )


def statistics_of(tokens: Any, requests: Sequence[EditRequest]) -> dict[str, float]:
    """Mean tokens of the requests' parts, and the share of prompts that start with the subject."""
    sums = {"before": 0, "subject": 0, "after": 0, "target": 0, "starts_with_subject": 0}
    for request in requests:
        bare = twin_request(tokens, request, ["{}"])
        lead = request.prompt.split("{}")[0].strip()
        ahead = len(tokens(lead)["input_ids"]) if lead else 0
        sums["before"] += ahead
        sums["subject"] += bare.lookup[0] + 1 - ahead
        sums["after"] += len(bare.rows[0]) - bare.lookup[0] - 1
        sums["target"] += len(bare.target)
        sums["starts_with_subject"] += not ahead
    return {name: round(total / len(requests), 3) for name, total in sums.items()}


def made_up_moment(ed: Editor, layer: int) -> Tensor:
    """A well-conditioned second moment [f, f] of the keys of `layer`, fp64 on its device: diagonal plus low rank."""
    module: nn.Module = ed.session.arch.mlp_out(layer)
    device, size = module.weight.device, ed.session.arch.key_dim(layer)
    kind = {"generator": torch.Generator(device).manual_seed(layer), "dtype": torch.float64, "device": device}
    factor = torch.randn(size, 64, **kind) / 64
    moment = factor @ factor.T
    moment.diagonal().add_(torch.rand(size, **kind) + 0.5)
    return moment


def second_moments(ed: Editor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Made-up second moments by layer, given to the editor and factored by it."""
    found = {layer: made_up_moment(ed, layer) for layer in layers}
    names = {layer: ed.session.arch.name("mlp_out", layer) for layer in layers}
    # The count is a power of two, so that sum and mean have the same digits.
    count = 1 << 20
    ed.session.use_statistics({n: SecondMoment(n, count, found[layer] * count) for layer, n in names.items()})
    for name in names.values():
        ed.session.metric(name)
    return found
