"""What the engines need to know about a request: its token rows, where to inject, what to predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastedit.request import EditRequest
from fastedit.tokens import Encoded, Lookup, TokenRule, encode_edit, target_ids

__all__ = ["Problem", "TokenOptions", "build_problem", "key_rows"]


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How prompts become tokens. The defaults are exact; the rest reproduces the original programs.

    Attributes:
        lookup: which token carries the edit.
        rule: how its index is found: by offsets, or by the rules of the ROME or EasyEdit code.
        retokenize: decode ``target[:-1]`` into the prompt and tokenise the text again, as the originals do.
    """

    lookup: Lookup = "subject_last"
    rule: TokenRule = "offsets"
    retokenize: bool = False


@dataclass(frozen=True)
class Problem:
    """Rows of one request.

    Attributes:
        id: the request's id, for messages.
        rewriting: one encoded row per context template, target tokens (but the last) appended.
        essence: the row whose distribution at the subject must not move (``"{} is a"``).
        target: token ids of the new object.
    """

    id: str
    rewriting: tuple[Encoded, ...]
    essence: Encoded
    target: tuple[int, ...]

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """All rows, the essence row last."""
        return (*self.rewriting, self.essence)


def build_problem(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Sequence[str],
    options: TokenOptions,
    *,
    essence: str = "{} is a",
    positions: int | None = None,
) -> Problem:
    """Encode one request for the target optimisation (Meng et al. 2022, arXiv:2202.05262, eq. 4).

    Raises ValueError, naming the request and the field, where the tokenizer makes nothing of it or a row has more
    than ``positions`` tokens (``arch.position_limit``; None checks nothing).
    """
    with _naming(request, "target_new"):
        target = tuple(target_ids(tokenizer, request.target_new, rule=options.rule))
    with _naming(request, "prompt"):
        rewriting = tuple(
            encode_edit(
                tokenizer,
                request.prompt,
                request.subject,
                context=template,
                target=target,
                lookup=options.lookup,
                rule=options.rule,
                retokenize=options.retokenize,
            )
            for template in templates
        )
        _check_length(rewriting, positions, "its target and context")
    with _naming(request, "subject"):
        kl_row = encode_edit(tokenizer, essence, request.subject, lookup=options.lookup, rule=options.rule)
        _check_length((kl_row,), positions, f"{essence!r} around it")
    return Problem(request.id, rewriting, kl_row, target)


def key_rows(
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Sequence[str],
    options: TokenOptions,
    *,
    positions: int | None = None,
) -> list[Encoded]:
    """Encode one request's prompts without target: the rows whose keys are averaged. Raises as ``build_problem``."""
    with _naming(request, "prompt"):
        rows = [
            encode_edit(
                tokenizer,
                request.prompt,
                request.subject,
                context=template,
                lookup=options.lookup,
                rule=options.rule,
            )
            for template in templates
        ]
        _check_length(rows, positions, "its context")
    return rows


def _check_length(rows: Sequence[Encoded], positions: int | None, around: str) -> None:
    longest = max(map(len, rows), default=0)
    if positions is not None and longest > positions:
        raise ValueError(f"{longest} tokens with {around}, the model has {positions} positions")


@contextmanager
def _naming(request: EditRequest, field: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"request {request.id!r}: field {field!r}: {error}") from error
