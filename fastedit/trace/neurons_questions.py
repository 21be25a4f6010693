"""From prompts and an answer to token rows: what is attributed, at which token, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.arch import position_limit
from fastedit.config import check
from fastedit.engine.encoder_decoder import is_encoder_decoder
from fastedit.session import Session
from fastedit.tokens import encode_prompt, target_ids
from fastedit.trace.neurons_clean import Question
from fastedit.trace.neurons_options import Continuation
from fastedit.trace.prompts import decoder_ids

__all__ = [
    "Row",
    "check_length",
    "encode_question",
    "encode_rows",
    "own_answer",
    "questions_of",
]


@dataclass(frozen=True)
class Row:
    """A prompt as tokens.

    Attributes:
        ids: its tokens; a causal model's end where the answer begins; of an encoder-decoder the encoder's.
        position: the token that predicts the answer, and whose activations are scaled; of an encoder-decoder the
            decoder's.
        behind: of an encoder-decoder, the decoder's input before the answer; else empty.
    """

    ids: tuple[int, ...]
    position: int
    behind: tuple[int, ...] = ()


def encode_rows(
    session: Session,
    prompts: str | Sequence[str],
    answer: str | None,
    continuation: Continuation,
    *,
    prefix: str | None = None,
) -> tuple[tuple[str, ...], tuple[Row, ...], tuple[int, ...] | None]:
    """Texts, rows, and the answer's ids (``None`` without one), before any forward.

    Args:
        prefix: of an encoder-decoder, text that the decoder has before the answer.

    Raises:
        ValueError: no prompt, a blank prompt or answer, more tokens than the model has positions, and for a masked
            language model a prompt without exactly one mask token or an answer of several tokens.
    """
    listed = [prompts] if isinstance(prompts, str) else prompts
    ok = isinstance(listed, Sequence) and len(listed) > 0
    check(ok, "prompts", "be a text or a list of at least one", prompts)
    for prompt in listed:
        ok = isinstance(prompt, str) and bool(prompt.strip())
        check(ok, "prompts", "hold texts that are not blank", prompt)
    ok = answer is None or (isinstance(answer, str) and bool(answer.strip()))
    check(ok, "answer", "be a text that is not blank", answer)
    rows = tuple(encode_question(session, prompt, prefix) for prompt in listed)
    target = None if answer is None else tuple(target_ids(session.tokenizer, answer))
    if target is not None and len(target) > 1 and session.arch.row.side == "encoder":
        raise ValueError(
            f"answer must be one token for a masked language model, got {len(target)} tokens of {answer!r}"
        )
    after = 0 if target is None or continuation == "fixed" else len(target) - 1
    for prompt, row in zip(listed, rows, strict=True):
        check_length(session, prompt, row, after)
    return tuple(listed), rows, target


def encode_question(session: Session, prompt: str, prefix: str | None = None) -> Row:
    """Token ids of a prompt, and the position that predicts the answer.

    Raises:
        ValueError: a prompt for a masked language model that does not hold its mask token once, or a prefix without
            tokens.
    """
    tokenizer = session.tokenizer
    if session.arch.row.side == "encoder":
        ids = tuple(tokenizer(prompt)["input_ids"])
        mask = tokenizer.mask_token_id
        masks = [place for place, token in enumerate(ids) if mask is not None and token == mask]
        if len(masks) != 1:
            raise ValueError(
                f"prompts must hold the mask token {tokenizer.mask_token!r} once each, got {prompt!r}"
            )
        return Row(ids, masks[0])
    row = encode_prompt(tokenizer, prompt)
    if is_encoder_decoder(session.arch):
        # An encoder reads its whole input, with the special token at its end.
        behind = decoder_ids(session, prefix)
        return Row(tuple(row.ids), len(behind) - 1, behind)
    return Row(row.ids[: row.target_start + 1], row.target_start)


def check_length(session: Session, prompt: str, row: Row, after: int) -> None:
    """Refuse a prompt that, with ``after`` tokens of its answer behind it, has more tokens than there are positions."""
    limit, length, read = position_limit(session.arch), len(row.ids) + after, "tokens with the answer"
    if row.behind:
        # The answer follows in the decoder, which has as many positions of its own.
        inside = len(row.behind) + after
        length, read = max((len(row.ids), "tokens"), (inside, "tokens of the decoder with the answer"))
    if limit is not None and length > limit:
        start = f"{prompt[:40]!r}..." if len(prompt) > 40 else repr(prompt)
        raise ValueError(f"prompts: {length} {read}, the model has {limit} positions, got {start}")


def own_answer(session: Session, row: Row, count: int) -> tuple[int, ...]:
    """The model's likeliest ``count`` tokens after a prompt, each given those before.

    Raises:
        ValueError: the model gives NaN or infinity.
    """
    ids, found = list(row.behind or row.ids), list[int]()

    def tensor(numbers: Sequence[int]) -> Tensor:
        return torch.tensor([list(numbers)], device=session.device)

    for _ in range(count):
        given = {"input_ids": tensor(ids)}
        if row.behind:
            given = {"input_ids": tensor(row.ids), "decoder_input_ids": tensor(ids)}
        with torch.no_grad():
            logits = session.model(**given).logits
        # Behind a causal prompt the position moves on with what was appended.
        at = logits[0, row.position + len(found)]
        if not bool(torch.isfinite(at).all()):
            raise ValueError(
                "prompts: the model gives NaN or infinity in a clean run, so nothing can be attributed"
            )
        found.append(int(at.argmax()))
        ids.append(found[-1])
    return tuple(found)


def questions_of(
    session: Session, row: Row, answer: Sequence[int], continuation: Continuation
) -> list[Question]:
    """One question per token of the answer; of an encoder-decoder with its source."""
    own: Sequence[int] = ()
    if len(answer) > 1 and continuation == "argmax":
        own = own_answer(session, row, len(answer) - 1)
    elif continuation == "answer":
        own = answer[:-1]
    found = []
    for step, token in enumerate(answer):
        # With nothing appended ("fixed") every token of the answer is read at the same place.
        ids, place = (*(row.behind or row.ids), *own[:step]), row.position + len(own[:step])
        found.append(Question(ids, place, token, row.ids if row.behind else ()))
    return found
