"""Prompts of causal tracing as tokens: where the subject is, and what the answer is."""

from __future__ import annotations

from dataclasses import dataclass

from fastedit.arch import position_limit
from fastedit.engine.encoder_decoder import decoder_start, is_encoder_decoder
from fastedit.session import Session
from fastedit.tokens import encode_prompt, target_ids

__all__ = ["TracePrompt", "decoder_ids", "encode_trace"]


@dataclass(frozen=True)
class TracePrompt:
    """A prompt whose answer is traced.

    Attributes:
        text, subject: as given, with the subject in its place.
        ids: token ids, special tokens included.
        span: first token of the subject, and one past its last.
        answer: id of the answer's (first) token, or ``None``: what the clean run predicts.
        tokens: text of every token.
    """

    text: str
    subject: str
    ids: tuple[int, ...]
    span: tuple[int, int]
    answer: int | None
    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def encode_trace(session: Session, prompt: str, subject: str, answer: str | None = None) -> TracePrompt:
    """Tokenise one prompt.

    Args:
        prompt: with the subject in it (its first occurrence counts), or with one ``{}`` in its place.
        subject: must be made of whole tokens.
        answer: text of the answer; its first token is traced. ``None``: the token that the model predicts.

    Raises:
        ValueError: the subject is blank, not in the prompt or not made of whole tokens; the answer is blank or has no
            token; the prompt is longer than the model takes.
    """
    for name, value in (("prompt", prompt), ("subject", subject)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} must be a string that is not blank, got {value!r}")
    tokenizer = session.tokenizer
    if prompt.count("{}") == 1:
        start = prompt.index("{}")
        text = prompt.replace("{}", subject)
    else:
        start, text = prompt.find(subject), prompt
    if start < 0:
        raise ValueError(f"subject must occur in the prompt, got {subject!r} in {prompt!r}")
    encoded = encode_prompt(tokenizer, text)
    # An encoder reads its whole input, with the special token at its end.
    ids = encoded.ids if is_encoder_decoder(session.arch) else encoded.ids[: encoded.lookup + 1]
    limit = position_limit(session.arch)
    if limit is not None and len(ids) > limit:
        raise ValueError(f"prompt must have at most {limit} tokens, the model's positions, got {len(ids)}")
    span = _span(session, text, start, start + len(subject))
    chosen = None
    if answer is not None:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"answer must have at least one token, got {answer!r}")
        chosen = target_ids(tokenizer, answer)[0]
    return TracePrompt(text, subject, tuple(ids), span, chosen, tuple(tokenizer.decode([i]) for i in ids))


def decoder_ids(session: Session, prefix: str | None) -> tuple[int, ...]:
    """An encoder-decoder's decoder input before the answer: its start token and the prefix's tokens.

    Raises ValueError for a prefix without tokens, or a model whose configuration names no start token.
    """
    start = decoder_start(session.arch)
    if prefix is None:
        return (start,)
    ids = session.tokenizer.encode(prefix, add_special_tokens=False)
    if not ids:
        raise ValueError(f"decoder_prefix must have at least one token, got {prefix!r}")
    return (start, *ids)


def _span(session: Session, text: str, start: int, end: int) -> tuple[int, int]:
    if not session.tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must report character offsets (a fast one), got {type(session.tokenizer).__name__}"
        )
    offsets = session.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    subject = text[start:end]
    low, high = start + len(subject) - len(subject.lstrip()), end - len(subject) + len(subject.rstrip())
    inside = [i for i, (first, last) in enumerate(offsets) if first < high and last > low and last > first]
    if not inside:
        raise ValueError(f"subject must own a token of the prompt, got {subject!r} in {text!r}")
    covered = text[offsets[inside[0]][0] : offsets[inside[-1]][1]]
    if covered.strip() != subject.strip():
        raise ValueError(
            f"subject must be made of whole tokens, got {subject!r}, whose tokens also hold {covered.strip()!r}"
        )
    return inside[0], inside[-1] + 1
