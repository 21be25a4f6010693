"""A second moment: the sum of k kᵀ over tokens, their number, and where they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastedit.ops.edit_solve import cholesky_factor
from fastedit.stats.provenance import Provenance, tensor_digest

__all__ = ["SecondMoment", "merge"]


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Uncentred second moment of the inputs of one module.

    Attributes:
        module: dotted module name.
        count: number of tokens summed.
        total: [f, f] float64 or float32, symmetric: the SUM of k kᵀ, not the mean.
        provenance: what it was computed from; None for matrices made by hand.
    """

    module: str
    count: int
    total: Tensor
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.total.shape)
        if len(shape) != 2 or shape[0] != shape[1] or not self.total.is_floating_point():
            raise ValueError(
                f"statistics of {self.module!r}: total must be a square float matrix, "
                f"got {self.total.dtype} of shape {list(shape)}"
            )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ValueError(
                f"statistics of {self.module!r}: count must be an integer >= 0, got {self.count!r}"
            )

    @property
    def features(self) -> int:
        """Width f of the keys."""
        return int(self.total.shape[0])

    @cached_property
    def digest(self) -> str:
        """Hash of the count and of every value, by which factors are filed."""
        return f"{tensor_digest(self.total)}-{self.count}"

    def check(self) -> None:
        """Raise ValueError, saying what to do, if these statistics cannot be factored for editing."""
        f, who = self.features, f"statistics of {self.module!r}"
        diagonal = self.total.diagonal()
        if not bool(torch.isfinite(diagonal).all()) or not bool(torch.isfinite(self.total.sum(dim=0)).all()):
            raise ValueError(
                f"{who}: total must be finite, but it holds NaN or infinite values; collect it again"
            )
        if self.count < f:
            raise ValueError(
                f"{who}: {self.count} tokens are too few for {f} features, at least {f} are needed "
                f"({10 * f} is safe); collect more text"
            )
        dead = int((diagonal <= 0).sum())
        if dead:
            raise ValueError(
                f"{who}: {dead} of {f} features never fired (zero on the diagonal), so it is singular; "
                f"collect more or other text, or pass jitter > 0"
            )

    def moment(self) -> Tensor:
        """E[k kᵀ] = total / count, [f, f], in the dtype of the sum.

        Raises:
            ValueError: no token was counted.
        """
        if self.count == 0:
            raise ValueError(f"statistics of {self.module!r}: count must be > 0, got 0")
        return self.total / self.count

    def cholesky(self, jitter: float = 0.0) -> Tensor:
        """Lower Cholesky factor of `moment()`, [f, f] float64, computed anew; `StatisticsStore.cholesky` caches it.

        Args:
            jitter: >= 0; times the mean of the diagonal is added to the diagonal. With jitter > 0 too few tokens and
                dead features are accepted.

        Raises:
            ValueError: the statistics are not finite, or singular.
        """
        if jitter == 0:
            self.check()
        try:
            return cholesky_factor(self.total.double() / max(self.count, 1), jitter=jitter)
        except ValueError as error:
            raise ValueError(f"statistics of {self.module!r}: {error}") from None


def merge(moments: Sequence[SecondMoment]) -> SecondMoment:
    """Add statistics of one module over disjoint slices of a corpus: sums and counts are added in the order given.

    Raises:
        ValueError: nothing to merge, or the parts come from different modules, models, tokenizers or settings.
    """
    if not moments:
        raise ValueError("moments must not be empty")
    first = moments[0]
    for other in moments[1:]:
        if (other.module, other.features) != (first.module, first.features):
            raise ValueError(
                f"moments must be of one module, got {first.module!r} [{first.features}] "
                f"and {other.module!r} [{other.features}]"
            )
        if first.provenance is not None and other.provenance is not None:
            p = first.provenance
            conflict = other.provenance.conflict(
                model_fingerprint=p.model_fingerprint,
                weights_fingerprint=p.weights_fingerprint,
                tokenizer=p.tokenizer,
                max_length=p.max_length,
                dtype=p.dtype,
            )
            if conflict:
                raise ValueError(f"statistics of {first.module!r} cannot be merged: {conflict}")
    total = first.total.clone()
    for other in moments[1:]:
        total += other.total.to(total)
    return SecondMoment(first.module, sum(m.count for m in moments), total, _merged_provenance(moments))


def _merged_provenance(moments: Sequence[SecondMoment]) -> Provenance | None:
    parts = [m.provenance for m in moments if m.provenance is not None]
    if len(parts) < len(moments):
        return None
    corpora = [p.corpus for p in parts]
    texts = [p.n_texts for p in parts]
    return dataclasses.replace(
        parts[0],
        corpus=None if None in corpora else "+".join(str(c) for c in corpora),
        n_texts=None if None in texts else sum(t for t in texts if t is not None),
        n_tokens=sum(m.count for m in moments),
        token_budget=None,
    )
