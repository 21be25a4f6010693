"""The tokenizer of the fact world: byte-level BPE that knows words and syllables, but no whole name."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastedit.world.corpus import filler
from fastedit.world.names import (
    COMPANY_SUFFIXES,
    ENDINGS,
    INITIAL,
    INSTRUMENTS,
    LANDMARK_KINDS,
    MIDDLE,
    PRODUCTS,
    PROFESSIONS,
)
from fastedit.world.relations import HOPS, RELATIONS

__all__ = ["END_OF_TEXT", "build_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_VOCABULARY = 2048
_MIN_FREQUENCY = 9


def _ordinary_words() -> list[str]:
    rng = random.Random(9)
    sentences = [t.replace("{}", "") for r in RELATIONS.values() for t in r.templates + r.novel]
    sentences += [t.replace("{}", "") for h in HOPS.values() for t in h.templates]
    sentences += [filler(rng) for _ in range(3000)]
    sentences += LANDMARK_KINDS + COMPANY_SUFFIXES + INSTRUMENTS + PROFESSIONS + PRODUCTS
    return sorted({word for s in sentences for word in s.replace(".", " .").split()})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer (about a second, deterministic).

    Ordinary words are frequent and become single tokens. Every combination of an initial and an ending occurs once,
    so the merges learn the syllables; whole names stay below the minimum frequency. All 256 bytes are in the
    vocabulary, so any text can be encoded.
    """
    lines = [" ".join(_ordinary_words())] * 50
    for endings in ENDINGS.values():
        for i, start in enumerate(INITIAL):
            lines += [start + end for end in endings]
            lines += [
                start + middle + end
                for j, middle in enumerate(MIDDLE)
                for k, end in enumerate(endings)
                if (i + j + k) % 24 == 0
            ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
