"""Teacher-forced scores of targets: one padded forward a batch, logits only at the rows that are needed.

The model's own head (and whatever it does to the logits afterwards: soft-capping, scaling) is used; only its
input is narrowed to the rows that predict a scored token. That is exact, because heads act on each row alone,
and it keeps memory at ``rows x vocab`` where a plain forward would hold ``batch x length x vocab``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastedit.arch import position_limit
from fastedit.forward import evaluating
from fastedit.tokens import Encoded, pad_id, pad_right

if TYPE_CHECKING:
    from fastedit.session import Session

__all__ = ["Score", "score_targets"]

# Elements of one fp32 logits block: 32 Mi elements are 128 MiB, twice that while the log-softmax is taken.
_LOGIT_BUDGET = 32 * 1024 * 1024


@dataclass(frozen=True)
class Score:
    """What a teacher-forced pass says about one target of n tokens.

    log_prob: sum over tokens of log p(token | everything before), fp32 log-softmax.
    tokens: n.  matches: how many of the n tokens are the arg-max of their row.
    """

    log_prob: float
    tokens: int
    matches: int

    @property
    def greedy(self) -> bool:
        """True when greedy decoding of n tokens would give exactly this target."""
        return self.matches == self.tokens


def score_targets(session: Session, items: Sequence[Encoded], *, batch_tokens: int = 4096) -> list[Score]:
    """Scores of every item, in order; equal items are computed once.

    batch_tokens: upper bound of padded input tokens in one forward (a single longer item still runs alone).
    items: from ``tokens.encode_prompt`` with a target.
    Raises ValueError for an item without a target or of more tokens than the model has positions, or
    batch_tokens < 1, NotImplementedError for models that are not decoder-only, and RuntimeError when the
    model returns non-finite logits.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be >= 1, got {batch_tokens}")
    limit = position_limit(session.arch)
    for position, item in enumerate(items):
        if not item.target:
            raise ValueError(f"items[{position}] must have a target of at least one token, got none")
        if limit is not None and len(item) > limit:
            raise ValueError(
                f"items[{position}]: {len(item)} tokens with its target, the model has {limit} positions"
            )
    _check_decoder_only(session)
    found: dict[Encoded, Score] = {}
    # Longest first: the largest batch comes at the start, so running out of memory shows at once, not at the
    # end.
    unique = sorted(set(items), key=lambda item: (-len(item), item.ids, item.target))
    with evaluating(session.model):
        for batch in _batches(unique, batch_tokens, _vocabulary(session.model)):
            found.update(zip(batch, _score_batch(session, batch)))
    return [found[item] for item in items]


def _check_decoder_only(session: Session) -> None:
    config: Any = session.model.config
    if getattr(config, "is_encoder_decoder", False) or session.arch.row.side == "encoder":
        raise NotImplementedError(
            f"evaluation needs a decoder-only language model, got model_type={config.model_type!r}"
        )


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _batches(items: Sequence[Encoded], batch_tokens: int, vocabulary: int) -> Iterator[list[Encoded]]:
    """Runs of items (sorted longest first) within the token budget and the logits budget."""
    batch: list[Encoded] = []
    rows = 0
    for item in items:
        width = len(batch[0]) if batch else len(item)
        full = (len(batch) + 1) * width > batch_tokens or (
            rows + len(item.target)
        ) * vocabulary > _LOGIT_BUDGET
        if batch and full:
            yield batch
            batch, rows = [], 0
        batch.append(item)
        rows += len(item.target)
    if batch:
        yield batch


def _score_batch(session: Session, batch: Sequence[Encoded]) -> list[Score]:
    embedding: Any = session.arch.embed
    device = embedding.weight.device
    ids, mask = pad_right([item.ids for item in batch], pad_id(session.tokenizer))  # [B, S] both
    which: list[int] = []
    where: list[int] = []
    wanted: list[int] = []
    for number, item in enumerate(batch):
        which += [number] * len(item.target)
        where += range(item.target_start, item.target_start + len(item.target))
        wanted += item.target
    logits = _rows_of_logits(session, ids.to(device), mask.to(device), which, where)  # [R, V]
    targets = torch.tensor(wanted, device=logits.device)  # [R]
    log_probs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].double().cpu()  # [R]
    matches = (logits.argmax(dim=-1) == targets).cpu()  # [R]
    if not bool(torch.isfinite(log_probs).all()):
        raise RuntimeError("evaluation stopped: the model returned non-finite logits; its weights are broken")
    scores = []
    start = 0
    for item in batch:
        stop = start + len(item.target)
        scores.append(Score(float(log_probs[start:stop].sum()), stop - start, int(matches[start:stop].sum())))
        start = stop
    return scores


def _rows_of_logits(
    session: Session, ids: Tensor, mask: Tensor, which: Sequence[int], where: Sequence[int]
) -> Tensor:
    """fp32 logits [R, V] of the rows (which[r], where[r]) of a forward over ids [B, S] with mask [B, S].

    Runs the model itself with the head's input narrowed by a forward pre-hook, which is removed again.
    """
    head: nn.Module = session.arch.head

    def narrow(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]  # [B, S, d]
        return (hidden[list(which), list(where)].unsqueeze(0), *arguments[1:])  # [1, R, d]

    handle = head.register_forward_pre_hook(narrow)
    try:
        with torch.no_grad():
            logits = session.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0].float()
