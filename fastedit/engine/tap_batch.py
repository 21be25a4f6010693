"""What a tap runs on, token rows with labels, and what a loss of its caller's gets to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.ops.target_loss import target_loss
from fastedit.tokens import Encoded, pad_right

__all__ = ["IGNORE", "LabelRows", "Places", "Reduction", "TapBatch"]

IGNORE = -100
"""The label of a token without one, as in transformers."""

Reduction = Literal["mean", "sum", "batch_mean"]


@dataclass(frozen=True, eq=False)
class TapBatch:
    """One row of tokens per request, padded on the right, with labels at some positions.

    A label stands where it is predicted: the logits at position t are scored against ``labels[:, t]``. For causal
    models that is one before the token itself (labels given as ``ids`` with -100 at the prompt are shifted by
    ``torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)``); for T5 and BERT the place of the token.

    Attributes:
        ids: ``[B, S]`` int64 tokens; the source of encoder-decoder models.
        mask: ``[B, S]`` 1 on tokens, 0 on padding.
        labels: ``[B, S]`` int64, or ``[B, S_dec]`` with a decoder; -100 where there is none, at least one a row.
        decoder_ids: ``[B, S_dec]`` inputs of the decoder; None: the labels, shifted right as T5 does for itself.
        decoder_mask: ``[B, S_dec]`` 1 on tokens; None: up to the last label of each row.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    decoder_ids: Tensor | None = None
    decoder_mask: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Encoded], *, pad_id: int = 0) -> TapBatch:
        """Encoded prompts with targets (see `fastedit.tokens`), for a causal model."""
        ids, mask = pad_right([row.ids for row in rows], pad_id)
        labels = torch.full_like(ids, IGNORE)
        for number, row in enumerate(rows):
            labels[number, row.target_start : row.target_start + len(row.target)] = torch.tensor(row.target)
        return cls(ids, mask, labels)

    @property
    def requests(self) -> int:
        """Number of rows B."""
        return self.ids.shape[0]

    @property
    def label_side(self) -> Tensor:
        """The mask of the tokens that labels belong to: the decoder's, or of a model without one ``mask``."""
        return self.mask if self.decoder_mask is None else self.decoder_mask

    def with_decoder(self, arch: ResolvedArch) -> TapBatch:
        """The same batch with the decoder's inputs and mask filled in; itself where there is no decoder."""
        config: Any = arch.model.config
        if not getattr(config, "is_encoder_decoder", False):
            return self
        labels, ids, mask = self.labels, self.decoder_ids, self.decoder_mask
        if mask is None:
            at = torch.arange(labels.shape[1], device=labels.device)
            mask = (at <= (at * (labels >= 0)).amax(1, keepdim=True)).to(labels.dtype)
        if ids is None:
            first = torch.full_like(labels[:, :1], config.decoder_start_token_id)
            ids = torch.cat([first, labels[:, :-1]], dim=1)
            ids = ids.masked_fill(ids == IGNORE, config.pad_token_id)
        return TapBatch(self.ids, self.mask, labels, ids, mask)

    def check(self, arch: ResolvedArch) -> None:
        """Raise ValueError, naming the field, where the batch is not one for this model."""
        decoder = bool(getattr(arch.model.config, "is_encoder_decoder", False))
        if decoder and arch.row.side == "encoder":
            raise ValueError("arch: must be the decoder side of the model, got side='encoder'")
        if not decoder and (self.decoder_ids is not None or self.decoder_mask is not None):
            raise ValueError(f"decoder_ids: {type(arch.model).__name__} has no decoder to give them to")
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or 0 in self.ids.shape:
            raise ValueError(
                f"ids: must be int64 of shape [B, S], got {self.ids.dtype} {list(self.ids.shape)}"
            )
        _check_mask("mask", self.mask, self.ids.shape)
        labels = self.labels
        if (
            labels.ndim != 2
            or labels.dtype != torch.int64
            or len(labels) != self.requests
            or 0 in labels.shape
        ):
            raise ValueError(
                f"labels: must be int64 of shape [{self.requests}, ...], got {labels.dtype} {list(labels.shape)}"
            )
        shape = labels.shape if decoder else self.ids.shape
        if labels.shape != shape:
            raise ValueError(f"labels: must have the shape of ids {list(shape)}, got {list(labels.shape)}")
        if self.decoder_ids is not None and (
            self.decoder_ids.shape != shape or self.decoder_ids.dtype != torch.int64
        ):
            got = f"{self.decoder_ids.dtype} {list(self.decoder_ids.shape)}"
            raise ValueError(f"decoder_ids: must be int64 of the labels' shape {list(shape)}, got {got}")
        if self.decoder_mask is not None:
            _check_mask("decoder_mask", self.decoder_mask, shape)
        tokens = arch.embed.weight.shape[0]  # type: ignore[union-attr,index]
        for name, ids in (("ids", self.ids), ("decoder_ids", self.decoder_ids)):
            if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < tokens:
                raise ValueError(
                    f"{name}: must be from 0 to {tokens - 1}, are from {int(ids.min())} to {int(ids.max())}"
                )
        self._check_labels(arch)

    def _check_labels(self, arch: ResolvedArch) -> None:
        vocabulary = arch.head.weight.shape[0]  # type: ignore[union-attr,index]
        wrong = (self.labels != IGNORE) & ((self.labels < 0) | (self.labels >= vocabulary))
        if wrong.any():
            row, position = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"labels: must be {IGNORE} or from 0 to {vocabulary - 1}, is {int(self.labels[row, position])} "
                f"in row {row} at position {position}"
            )
        labelled = self.labels != IGNORE
        if not labelled.any(1).all():
            row = int((~labelled.any(1)).nonzero()[0])
            raise ValueError(f"labels: row {row} has no label token, all are {IGNORE}")
        side = self.label_side
        if side.shape == labelled.shape and (padded := labelled & (side.to(labelled.device) == 0)).any():
            row, position = padded.nonzero()[0].tolist()
            raise ValueError(f"labels: row {row} has a label on padding, at position {position}")


def _check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape:
        raise ValueError(f"{name}: must have shape {list(shape)}, got {list(mask.shape)}")
    real = mask.bool()
    if (real[:, 1:] & ~real[:, :-1]).any() or not real[:, 0].all():
        raise ValueError(
            f"{name}: rows must start with a token and be padded on the right only, got other rows"
        )


@dataclass(frozen=True, eq=False)
class Places:
    """T chosen tokens of ``[B, S]`` rows, by row, then position."""

    rows: Tensor
    positions: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Places:
        """Those where ``mask [B, S]`` is True."""
        rows, positions = mask.nonzero(as_tuple=True)
        return cls(rows, positions, (mask.shape[0], mask.shape[1]))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and positions on a device."""
        return self.rows.to(device), self.positions.to(device)

    def take(self, values: Tensor) -> Tensor:
        """``[T, n]`` a copy of the tokens' rows of ``[B, S, n]``, or of ``[B * S, n]`` as some blocks flatten it."""
        values = values.detach().reshape(-1, values.shape[-1])
        return values[(self.rows * self.shape[1] + self.positions).to(values.device)]


@dataclass(frozen=True, eq=False)
class LabelRows:
    """The R label tokens of a batch, by row, then position: what a loss is made of.

    Attributes:
        hidden: ``[R, d]`` what the head reads there, with its gradient.
        labels, rows, positions: ``[R]`` int64.
        requests: number of rows B.
        arch: the model.
    """

    hidden: Tensor
    labels: Tensor
    rows: Tensor
    positions: Tensor
    requests: int
    arch: ResolvedArch

    def nll(self) -> Tensor:
        """``[R]`` -log p(label), float32 (float64 for float64 models); no logits are kept."""
        weight: Tensor = self.arch.head.weight  # type: ignore[assignment]
        bias = getattr(self.arch.head, "bias", None)
        nll, _ = target_loss(self.hidden, weight, bias, self.labels, None, None, softcap=self.arch.softcap)  # type: ignore[arg-type]
        return nll

    def logits(self) -> Tensor:
        """``[R, V]`` logits in float32 (float64 for float64 models), soft-capped as the model's."""
        logits: Tensor = self.arch.head(self.hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.arch.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def reduce(self, values: Tensor, reduction: Reduction = "mean") -> Tensor:
        """``[B]`` from ``[R]`` values of the label tokens, as `tap` reduces its own."""
        total = values.new_zeros(self.requests).index_add(0, self.rows, values)
        if reduction == "sum":
            return total
        if reduction == "batch_mean":
            return total / len(self.rows)
        return total / torch.bincount(self.rows, minlength=self.requests)
