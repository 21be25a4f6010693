"""Where the subject sits, what the target is, and the older rules, on tokenizers of every kind in use."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from fastedit.engine.problem import TokenOptions, build_problem, key_rows
from fastedit.request import EditRequest
from fastedit.tokens import (
    Encoded,
    encode_edit,
    encode_prompt,
    pad_id,
    pad_right,
    target_ids,
    token_span,
)

SENTENCES = [
    "The Eiffel Tower is located in the city of Paris.",
    "Newcastle is a new castle in the north, says Ada Lovelace.",
    "The mother tongue of Danielle Darrieux is French, is it?",
]


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece as T5 and Gemma have it: the word mark is put on by the pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"]))
    return _fast(tokenizer, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>")


def _sentencepiece() -> PreTrainedTokenizerFast:
    """SentencePiece as Llama 2 has it: the mark is text, spaces double it, BOS in front, bytes for the rest."""
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens])
    # Learn words as the SentencePiece trainer does, without merging across spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # the byte tokens are ordinary ones
    tokenizer = Tokenizer.from_str(json.dumps({**made, "pre_tokenizer": None}))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _closing() -> PreTrainedTokenizerFast:
    """A tokenizer that ends every text with EOS, as T5's and BERT's do."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    return made


class _CharTokenizer(PreTrainedTokenizer):
    """A slow tokenizer: one token a character, BOS in front, no offsets."""

    def __init__(self) -> None:
        super().__init__(bos_token="<s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return 300

    def get_vocab(self) -> dict[str, int]:
        return {**{chr(code): code for code in range(300)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(
        self, first: list[int], second: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *first]


BPE = tiny_tokenizer()
BOS = tiny_tokenizer(bos=True)
META = _metaspace()
PIECE = _sentencepiece()
ALL = pytest.mark.parametrize("tokenizer", [BPE, BOS, META, PIECE], ids=["bpe", "bos", "metaspace", "piece"])
LOOKUPS = ["subject_last", "subject_first", "subject_first_after_last", "last"]


def _token(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> str:
    return tokenizer.decode([encoded.ids[encoded.lookup]])


# ---------------------------------------------------------------------------------------- the subject's tokens


@ALL
@pytest.mark.parametrize("context", ["{}", "Then. {}", "{x} } {}"], ids=["bare", "text", "braces"])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of {} is", "Danielle Darrieux"),
        ("{} is located in the city of", "Eiffel Tower"),
        ("The {} is not the {0} or {name}, it is", "Eiffel Tower"),
        ("Who is {}", "Ada Lovelace"),
        ("{}", "Paris"),
        ("Ada Lovelace said that Ada knew {}, and Ada Lovelace is", "Ada"),
        ("caf\u00e9 na\u00efve \U0001f600 {} \u65e5\u672c is", "Paris \U0001f680"),
    ],
)
def test_subject_tokens_cover_the_placeholder(tokenizer, context, prompt, subject) -> None:
    first = encode_edit(tokenizer, prompt, subject, context=context, lookup="subject_first")
    last = encode_edit(tokenizer, prompt, subject, context=context)
    after = encode_edit(tokenizer, prompt, subject, context=context, lookup="subject_first_after_last")
    text = context.replace("{}", prompt, 1).replace("{}", "\0", 1).replace("\0", subject)
    assert last.ids == tuple(tokenizer(text)["input_ids"])
    words = tokenizer.decode(last.ids[first.lookup : last.lookup + 1]).strip()
    if "<unk>" not in words:
        assert words.startswith(subject[:3])
        assert words.endswith(subject[-3:])
    # The tokens before are the text before: the place is the placeholder's, not another occurrence's.
    before = text[: context.index("{}") + prompt.index("{}")].strip()
    if "<unk>" not in tokenizer.decode(last.ids):
        assert tokenizer.decode(last.ids[: first.lookup], skip_special_tokens=True).strip() == before
    assert after.lookup == min(last.lookup + 1, len(last.ids) - 1)
    assert encode_edit(tokenizer, prompt, subject, context=context, lookup="last").lookup == len(last.ids) - 1
    assert last.target_start == len(last.ids) - 1


def test_subject_in_front_has_no_leading_space() -> None:
    bare = encode_edit(BPE, "{} is Paris", "the city", lookup="subject_first")
    led = encode_edit(BPE, "{} is Paris", "the city", context="Then {}", lookup="subject_first")
    assert bare.lookup == 0
    assert _token(BPE, bare)[0] != " "
    assert _token(BPE, led)[0] == " "
    assert encode_edit(BOS, "{} is located in", "Paris", lookup="subject_first").lookup == 1


def test_subject_of_one_token_and_nothing_after_it() -> None:
    subject = next(word for word in ("is", "the", "in") if len(BPE.encode(f" {word}")) == 1)
    for lookup in LOOKUPS:
        encoded = encode_edit(BPE, "Paris {}", subject, lookup=lookup)
        assert encoded.lookup == len(encoded.ids) - 1 == encoded.target_start


def test_token_after_the_subject_may_be_the_target() -> None:
    target = target_ids(BPE, "the city of Rome")
    encoded = encode_edit(BPE, "Paris and {}", "Ada", target=target, lookup="subject_first_after_last")
    assert encoded.lookup == encoded.target_start + 1
    assert encoded.ids[encoded.lookup] == target[0]


def test_token_over_the_subjects_end_is_its_last() -> None:
    vocabulary = {
        token: number for number, token in enumerate(["<unk>", "The", " ", "new", "newcastle", "s"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    merged = _fast(tokenizer, unk_token="<unk>")
    encoded = encode_edit(merged, "The {}castle", "new")
    assert encoded.ids == (1, 2, 4)
    assert encoded.lookup == 2
    # The rule by length sees the subject alone, and happens to agree; by pieces too.
    assert encode_edit(merged, "The {}castle", "new", rule="easyedit").lookup == 2


def test_white_space_at_the_subjects_ends_does_not_count() -> None:
    tight = encode_edit(BPE, "The {} is", "Ada")
    assert encode_edit(BPE, "The{}is", " Ada ") == tight


def test_special_token_written_in_the_text_is_text() -> None:
    encoded = encode_edit(BPE, "<|endoftext|>The {} is", "Ada")
    assert encoded.ids[0] == BPE.eos_token_id
    assert encoded.lookup == encode_edit(BPE, "The {} is", "Ada").lookup + 1
    ended = encode_edit(BPE, "{} is<|endoftext|>", "Ada")
    assert ended.target_start == len(ended.ids) - 1


@ALL
def test_token_span(tokenizer) -> None:
    text = "The Eiffel Tower is in Paris"
    first, last = token_span(tokenizer, text, (4, 16))
    assert tokenizer.decode(tokenizer(text)["input_ids"][first : last + 1]).strip() == "Eiffel Tower"
    with pytest.raises(ValueError, match="no token"):
        token_span(tokenizer, text, (3, 4))


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"]), min_size=1)


@settings(max_examples=150, deadline=None)
@given(before=WORDS, subject=WORDS, after=WORDS, glue=st.sampled_from(["", " "]), bos=st.booleans())
def test_span_decodes_to_the_subject(before, subject, after, glue, bos) -> None:
    tokenizer = BOS if bos else BPE
    before, after = before.replace("{}", ""), after.replace("{}", "")
    prompt = f"{before}{glue}{{}}{glue}{after}"
    if prompt.count("{}") != 1:
        return
    first = encode_edit(tokenizer, prompt, subject, lookup="subject_first")
    last = encode_edit(tokenizer, prompt, subject)
    decoded = tokenizer.decode(last.ids[first.lookup : last.lookup + 1])
    assert subject.strip() in decoded
    assert len(decoded) <= len(prompt) + len(subject)


# ------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize(
    "target", ["Paris", " Paris", "the city of Paris", "\U0001f600 caf\u00e9", "\n\u65e5"]
)
@pytest.mark.parametrize("tokenizer", [BPE, BOS, PIECE], ids=["bpe", "bos", "piece"])
def test_target_continues_the_prompt_as_ids(tokenizer, target) -> None:
    ids = target_ids(tokenizer, target)
    encoded = encode_edit(tokenizer, "The mother tongue of {} is", "Ada", target=ids)
    bare = encode_edit(tokenizer, "The mother tongue of {} is", "Ada")
    assert encoded.ids == bare.ids + tuple(ids[:-1])
    assert encoded.target == tuple(ids)
    assert encoded.lookup == bare.lookup
    assert encoded.target_start == len(bare.ids) - 1
    spaced = target if target[0].isspace() else f" {target}"
    whole = tokenizer.decode([*bare.ids, *ids], skip_special_tokens=True)
    assert whole == f"The mother tongue of Ada is{spaced}"


def test_target_has_one_space_and_no_special_tokens() -> None:
    assert target_ids(BPE, "Paris") == target_ids(BPE, " Paris") == BPE.encode(" Paris")
    assert target_ids(BOS, "Paris") == target_ids(BPE, "Paris")
    assert target_ids(BOS, "Paris", rule="easyedit") == target_ids(BPE, "Paris")


def test_sentencepiece_target_is_not_marked_twice() -> None:
    mark = PIECE.convert_tokens_to_ids("\u2581")
    doubled = target_ids(PIECE, "Paris", rule="easyedit")
    ids = target_ids(PIECE, "Paris")
    assert ids == target_ids(PIECE, " Paris") == PIECE("is Paris")["input_ids"][-len(ids) :]
    assert doubled != ids
    assert mark in doubled or PIECE.convert_ids_to_tokens(doubled)[0].startswith("\u2581\u2581")
    assert target_ids(META, "Paris") == target_ids(META, " Paris") == META("is Paris")["input_ids"][1:]


def test_target_that_is_nothing_is_refused() -> None:
    for target in ("", "  ", None):
        with pytest.raises(ValueError, match="target must be a string that is not empty"):
            target_ids(BPE, target)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.Replace("Rome", "")
    with pytest.raises(ValueError, match="'Rome' tokenises to nothing"):
        target_ids(_fast(tokenizer), "Rome")
    with pytest.raises(ValueError, match="'Rome' tokenises to nothing"):
        encode_prompt(_fast(tokenizer), "Rome")


def test_an_engine_names_the_request_and_the_field() -> None:
    request = EditRequest(id="7", prompt="The {} is", subject="Ada", target_new="Rome")
    options = TokenOptions(rule="rome")
    with pytest.raises(ValueError, match=r"^request '7': field 'target_new': rule 'rome' .* special tokens"):
        build_problem(BOS, request, ["{}"], options)
    with pytest.raises(ValueError, match=r"^request '7': field 'prompt': .* needs a space before"):
        build_problem(BPE, dataclasses.replace(request, prompt="The({}) is"), ["{}"], options)
    with pytest.raises(ValueError, match=r"^request '7': field 'prompt': the tokenizer ends every text"):
        build_problem(_closing(), request, ["{}"], TokenOptions())
    with pytest.raises(ValueError, match=r"^request '7': field 'prompt': .* is not a fast tokenizer"):
        key_rows(_CharTokenizer(), request, ["{}"], TokenOptions())


def test_target_after_a_closing_token_is_refused() -> None:
    closing = _closing()
    bare = encode_edit(closing, "The {} is", "Ada")
    assert bare.ids[-1] == closing.eos_token_id
    assert bare.target_start == len(bare.ids) - 2
    with pytest.raises(ValueError, match="no target can follow"):
        encode_edit(closing, "The {} is", "Ada", target=[5])
    with pytest.raises(ValueError, match="no target can follow"):
        encode_prompt(closing, "The Ada is", target=[5])


def test_encode_prompt() -> None:
    target = target_ids(BOS, "Paris")
    encoded = encode_prompt(BOS, "The capital {} is", target=target)
    assert encoded.ids == (*BOS("The capital {} is")["input_ids"], *target[:-1])
    assert encoded.target_start == encoded.lookup == len(encoded.ids) - len(target)
    assert len(encoded) == len(encoded.ids)
    with pytest.raises(dataclasses.FrozenInstanceError):
        encoded.lookup = 0


# -------------------------------------------------------------------------------------------- the older rules


@pytest.mark.parametrize("lookup", LOOKUPS[:3])
@pytest.mark.parametrize("context", ["{}", "Then the {}", "In Rome. {}"])
@pytest.mark.parametrize("prompt", ["The tongue of {} is", "{} is a", "Paris knows {}"])
@pytest.mark.parametrize("target", ["French", "the city of Paris"])
def test_rules_agree_where_words_do_not_merge(prompt, context, target, lookup) -> None:
    options = {"context": context, "target": target_ids(BPE, target), "lookup": lookup}
    wanted = encode_edit(BPE, prompt, "Danielle Darrieux", **options)
    for rule in ("offsets", "rome", "easyedit"):
        for retokenize in (False, True):
            got = encode_edit(BPE, prompt, "Danielle Darrieux", rule=rule, retokenize=retokenize, **options)
            if (rule, lookup) == ("easyedit", "subject_first"):
                # The published rule counts back from the row's end, a lone space of the prefix included.
                assert got.lookup < 0
                got = dataclasses.replace(got, lookup=wanted.lookup)
            assert got == wanted


def test_easyedit_rule_counts_bos_and_rome_refuses_it() -> None:
    assert encode_edit(BOS, "The {} is", "Ada", rule="easyedit") == encode_edit(BOS, "The {} is", "Ada")
    for call in (
        lambda: encode_edit(BOS, "The {} is", "Ada", rule="rome"),
        lambda: target_ids(BOS, "Paris", rule="rome"),
    ):
        with pytest.raises(ValueError, match="adds special tokens"):
            call()


def test_rome_rule_indexes_the_padded_row_for_last() -> None:
    assert encode_edit(BPE, "The {} is", "Ada", rule="rome", lookup="last").lookup == -1


def test_rome_rule_needs_a_space_before_the_subject() -> None:
    with pytest.raises(ValueError, match="needs a space before the subject"):
        encode_edit(BPE, "The({}) is", "Ada", rule="rome")


def test_rome_rule_misses_where_tokens_merge() -> None:
    """Why it is not the default: a subject ending in a space, which the next word takes."""
    by_offsets = encode_edit(BPE, "The {}is", "Ada ")
    assert encode_edit(BPE, "The {}is", "Ada ", rule="easyedit").lookup > by_offsets.lookup


def test_retokenised_target_that_changes_keeps_the_last_places() -> None:
    """SentencePiece's decode drops the first space, so the joined text reads "isFrench": other tokens."""
    target = target_ids(PIECE, "Darrieux Darrieux")
    assert len(target) > 1
    kept = encode_edit(PIECE, "The tongue of {} is", "Ada", target=target)
    again = encode_edit(PIECE, "The tongue of {} is", "Ada", target=target, retokenize=True)
    assert again.ids != kept.ids
    assert again.ids == tuple(PIECE("The tongue of Ada is" + PIECE.decode(target[:-1]))["input_ids"])
    assert again.target_start == len(again.ids) - len(target)
    with pytest.raises(ValueError, match="does not fit"):
        encode_edit(BPE, "{}", "a", target=BPE.convert_tokens_to_ids(list("the" * 6)), retokenize=True)


def test_slow_tokenizer_needs_an_explicit_rule() -> None:
    slow = _CharTokenizer()
    with pytest.raises(ValueError, match="not a fast tokenizer.*rule='easyedit'"):
        encode_edit(slow, "The {} is", "Ada")
    encoded = encode_edit(slow, "The {} is", "Ada", target=target_ids(slow, "x"), rule="easyedit")
    assert encoded.ids == (slow.bos_token_id, *map(ord, "The Ada is"), ord(" "))
    assert (encoded.lookup, encoded.target_start) == (7, 10)
    assert encode_prompt(slow, "Ada").target_start == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"request_prompt": "The Ada is"}, r"a prompt must hold exactly one '\{\}', holds 0"),
        ({"request_prompt": "{} and {}"}, r"a prompt must hold exactly one '\{\}', holds 2"),
        ({"context": "Then."}, r"a context template must hold exactly one '\{\}', holds 0"),
        ({"subject": " "}, "subject must not be empty"),
        ({"lookup": "middle"}, "lookup must be one of subject_last"),
        ({"rule": "memit"}, "rule must be one of offsets, rome, easyedit"),
    ],
)
def test_bad_arguments_name_themselves(options, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        encode_edit(BPE, **{"request_prompt": "The {} is", "subject": "Ada", **options})
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- padding


def test_pad_right() -> None:
    ids, mask = pad_right([[5, 0], (7, 8, 9), [0]], 0)
    assert torch.equal(ids, torch.tensor([[5, 0, 0], [7, 8, 9], [0, 0, 0]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]))
    assert ids.dtype == mask.dtype == torch.int64
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="rows must be one or more non-empty id lists"):
            pad_right(rows, 0)


def test_one_id_for_pad_eos_and_unk_is_told_apart_by_the_mask() -> None:
    assert META.pad_token_id == META.eos_token_id == META.unk_token_id == pad_id(META)
    row = encode_edit(META, "\u65e5 {} is", "Paris").ids  # the first sign is unknown: the id that pads
    ids, mask = pad_right([row, row[:2]], pad_id(META))
    assert pad_id(META) in row
    assert mask.sum().item() == len(row) + 2
    assert tuple(ids[0, mask[0].bool()].tolist()) == row


def test_pad_id_falls_back_to_eos_then_zero() -> None:
    assert pad_id(BPE) == BPE.pad_token_id
    assert pad_id(PIECE) == PIECE.eos_token_id
    assert pad_id(_fast(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))) == 0
