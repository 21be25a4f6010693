"""From text to token rows: where the subject sits, what the target is, right-padded batches.

The subject's place is the ``{}`` of the prompt, never a search for the subject's text, and its tokens come
from the tokenizer's character offsets. A target is tokenised once, alone, and its ids are appended to the
prompt's; the joined text is never tokenised again. Special tokens that the tokenizer puts in front (BOS) stay
and are counted.

Two older index rules and the re-tokenised target are kept for comparison with published code, each by
explicit choice:

* ``rule="rome"`` (ROME, MEMIT, PMET): the prompt is cut at ``{}``, the trailing space of the first part moves
  to the subject, the parts are tokenised apart and their lengths added. Counts one token too many per piece
  where the tokenizer adds BOS, so it is refused there.
* ``rule="easyedit"`` (EasyEdit, AlphaEdit, EMMET): the length of the tokenised first part with the subject.

``docs/requests.md`` says where the rules differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from fastedit.request import PLACEHOLDER, split_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Encoded",
    "Lookup",
    "TokenRule",
    "encode_edit",
    "encode_prompt",
    "pad_id",
    "pad_right",
    "target_ids",
    "token_span",
]

Lookup = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]
TokenRule = Literal["offsets", "rome", "easyedit"]


@dataclass(frozen=True)
class Encoded:
    """One row of token ids, and what to read from it.

    Attributes:
        ids: The prompt's tokens and all but the last of the target's, no padding.
        lookup: Index in ``ids`` of the token where the edit acts. Negative only under an older rule that
            counted from the end of the *padded* row: it then indexes the row after ``pad_right``.
        target_start: Index of the row whose logits predict ``target[0]``; row ``target_start + j`` predicts
            ``target[j]``. The last token of the prompt, so also defined where there is no target.
        target: The target's ids.
    """

    ids: tuple[int, ...]
    lookup: int
    target_start: int
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str, *, rule: TokenRule = "offsets") -> list[int]:
    """The ids of a target as it continues a prompt: with one leading space, without special tokens.

    A space is added where ``target`` does not begin with whitespace. SentencePiece tokenizers put a word mark
    of their own before any text; on top of our space that is a token which running text never has there, so
    under "offsets" the ids are those the target gets after a word. The older rules keep the doubled mark.

    Raises:
        ValueError: ``target`` is blank or tokenises to nothing; "rome" with a tokenizer that adds special
            tokens.
    """
    _check_rule(tokenizer, rule)
    if not isinstance(target, str) or not target.strip():
        raise ValueError(f"target must be a string that is not empty, is {target!r}")
    spaced = target if target[0].isspace() else " " + target
    ids = list(tokenizer.encode(spaced, add_special_tokens=False))
    if rule == "offsets":
        word = tokenizer.encode("a", add_special_tokens=False)
        if "".join(tokenizer.convert_ids_to_tokens(word)).startswith("\u2581"):
            joined = tokenizer.encode("a" + spaced, add_special_tokens=False)
            ids = list(joined[len(word) :]) if joined[: len(word)] == word else ids
    if not ids:
        raise ValueError(f"target {target!r} tokenises to nothing with this tokenizer")
    return ids


def encode_edit(
    tokenizer: PreTrainedTokenizerBase,
    request_prompt: str,
    subject: str,
    *,
    context: str = PLACEHOLDER,
    target: Sequence[int] = (),
    lookup: Lookup = "subject_last",
    rule: TokenRule = "offsets",
    retokenize: bool = False,
) -> Encoded:
    """One row for an edit: the context around the prompt, the prompt around the subject, the target's ids
    after it.

    Args:
        request_prompt: Exactly one ``{}``, where the subject goes.
        context: Exactly one ``{}``, where the prompt goes ("Some text. {}"). Other braces are literal in
            both.
        target: Ids from ``target_ids``; empty for rows that only read activations (keys, the KL prompt).
        lookup: Which token: the subject's last or first, the first after its last (its last where nothing
            follows), or the prompt's last. Of a token that spans the subject's end, "subject_last" takes it
            all the same: it is the last token that holds a part of the subject.
        rule: How the index is found; see the module's docstring. "rome" returns -1 for "last", as published.
        retokenize: Compatibility: decode ``target[:-1]``, join the text, tokenise it again, and put the
            target on the last ``len(target)`` positions whether or not the tokens came out the same.

    Raises:
        ValueError: not exactly one ``{}``, a blank subject, an unknown choice, a rule this tokenizer cannot
            follow, or a subject that owns no token.
    """
    _check_rule(tokenizer, rule)
    if lookup not in get_args(Lookup):
        raise ValueError(f"lookup must be one of {', '.join(get_args(Lookup))}, is {lookup!r}")
    if not subject.strip():
        raise ValueError(f"subject must not be empty, is {subject!r}")
    before, after = split_once(request_prompt, "a prompt")
    ahead, behind = split_once(context, "a context template")
    before, after = ahead + before, after + behind
    target = tuple(target)

    if retokenize and len(target) > 1:
        after += tokenizer.decode(list(target[:-1]))
    text = before + subject + after
    tokens = _encode(tokenizer, text, offsets=rule == "offsets")
    _check_end(tokens, target)
    row = tokens.ids if retokenize else tokens.ids + target[:-1]
    start = len(row) - len(target) if retokenize and target else tokens.end - 1
    if start < 0:
        raise ValueError(
            f"a target of {len(target)} tokens does not fit into the {len(row)} tokens of {text!r}"
        )

    if lookup == "last":
        index = -1 if rule == "rome" else start
    elif rule == "offsets":
        first, last = _overlap(text, (len(before), len(before) + len(subject)), tokens.offsets)
        final = len(row) - 1 if target else tokens.end - 1
        index = {"subject_first": first, "subject_last": last}.get(lookup, min(last + 1, final))
    elif rule == "rome":
        index = _by_pieces(tokenizer, before, subject, after, lookup, len(row) > len(tokens.ids))
    else:
        index = _by_length(tokenizer, before, subject, lookup, len(row))
    if not -len(row) <= index < len(row):
        raise ValueError(f"rule {rule!r} gives token {index} in a row of {len(row)}: {text!r}")
    return Encoded(ids=row, lookup=index, target_start=start, target=target)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, target: Sequence[int] = ()) -> Encoded:
    """One row for a plain text without a subject (a probe): ``lookup`` and ``target_start`` are its last
    token.

    Raises ValueError for a text that tokenises to nothing, or a tokenizer that puts a special token in
    between.
    """
    tokens = _encode(tokenizer, text, offsets=False)
    _check_end(tokens, target)
    last = tokens.end - 1
    return Encoded(ids=tokens.ids + tuple(target[:-1]), lookup=last, target_start=last, target=tuple(target))


def token_span(tokenizer: PreTrainedTokenizerBase, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """First and last token of ``text`` that hold a part of the characters ``span[0]:span[1]``, both
    inclusive.

    White space at the ends of the span does not count: its token usually belongs to the neighbouring word.
    Raises ValueError where no token overlaps, or the tokenizer reports no offsets.
    """
    return _overlap(text, span, _encode(tokenizer, text, offsets=True).offsets)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one batch, padded on the right.

    Padding on the right keeps every index into a row valid, and the positions of models that count them from
    0.

    Returns:
        ``ids`` [B, S] int64 and ``mask`` [B, S] int64, 1 on real tokens. The mask, never a comparison with
        ``pad_id``, tells padding from text: in many tokenizers pad, EOS and UNK are one id.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError(
            f"rows must be one or more non-empty id lists, lengths are {[len(row) for row in rows]}"
        )
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(tuple(row), dtype=torch.int64)
        mask[number, : len(row)] = 1
    return ids, mask


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: pad, else EOS, else 0. Which one is of no consequence, since the mask hides it."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


@dataclass(frozen=True)
class _Tokens:
    """A text as ids with special tokens, the characters of each (if asked for), and where the text's own ids
    end."""

    ids: tuple[int, ...]
    offsets: list[tuple[int, int]]
    end: int


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, offsets: bool) -> _Tokens:
    if offsets and not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and reports no character offsets, so the "
            "subject's tokens cannot be located; load the fast one or choose rule='easyedit'"
        )
    made: Any = tokenizer(text, return_offsets_mapping=offsets, return_special_tokens_mask=True)
    ids = tuple(made["input_ids"])
    # Only what the tokenizer adds is masked; a special token written out in the text belongs to the text.
    special = list(made["special_tokens_mask"]) if tokenizer.is_fast else _slow_specials(tokenizer, text, ids)
    if all(special):
        raise ValueError(f"text {text!r} tokenises to nothing")
    end = len(ids) - special[::-1].index(0)
    return _Tokens(ids, [tuple(pair) for pair in made["offset_mapping"]] if offsets else [], end)


def _slow_specials(tokenizer: PreTrainedTokenizerBase, text: str, ids: tuple[int, ...]) -> list[int]:
    """A slow tokenizer's mask marks special tokens of the text too: compare with the text encoded without
    them."""
    plain = tuple(tokenizer.encode(text, add_special_tokens=False))
    for lead in range(len(ids) - len(plain) + 1):
        if plain and ids[lead : lead + len(plain)] == plain:
            return [1] * lead + [0] * len(plain) + [1] * (len(ids) - lead - len(plain))
    return [1] * len(ids) if not plain else [0] * len(ids)


def _check_end(tokens: _Tokens, target: Sequence[int]) -> None:
    if target and tokens.end < len(tokens.ids):
        raise ValueError(
            f"the tokenizer ends every text with special tokens {list(tokens.ids[tokens.end :])}, so no "
            "target can follow the prompt; load it without them (add_eos_token=False)"
        )


def _overlap(text: str, span: tuple[int, int], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token that hold a visible character of ``span``. Special tokens have empty offsets."""
    start, end = span
    piece = text[start:end]
    start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
    inside = [
        number for number, (low, high) in enumerate(offsets) if low < end and high > start and high > low
    ]
    if start >= end or not inside:
        raise ValueError(f"no token of this tokenizer holds {piece!r} in {text!r}")
    return inside[0], inside[-1]


def _by_pieces(
    tokenizer: PreTrainedTokenizerBase, before: str, subject: str, after: str, lookup: Lookup, followed: bool
) -> int:
    """The "rome" rule; ``followed``: target ids come after the text."""
    if before and not before.endswith(" "):
        raise ValueError(f"rule 'rome' needs a space before the subject, the text before it is {before!r}")
    first = len(tokenizer.encode(before[:-1])) if before else 0
    stop = first + len(tokenizer.encode(f" {subject.strip()}" if before else subject))
    if lookup == "subject_first":
        return first
    follows = followed or bool(after and tokenizer.encode(after))
    return stop if lookup == "subject_first_after_last" and follows else stop - 1


def _by_length(
    tokenizer: PreTrainedTokenizerBase, before: str, subject: str, lookup: Lookup, row: int
) -> int:
    """The "easyedit" rule, with its negative index for the first token."""
    if lookup == "subject_first":
        return len(tokenizer.encode(before)) - row
    stop = len(tokenizer.encode(before + subject))
    return stop if lookup == "subject_first_after_last" and row > stop else stop - 1


def _check_rule(tokenizer: PreTrainedTokenizerBase, rule: str) -> None:
    if rule not in get_args(TokenRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(TokenRule))}, is {rule!r}")
    if rule == "rome" and tokenizer.num_special_tokens_to_add():
        raise ValueError(
            "rule 'rome' tokenises the pieces of a prompt apart and over-counts where the tokenizer adds "
            "special tokens (BOS), as this one does; use rule 'offsets' or 'easyedit'"
        )
