"""The keys of earlier edits as a factored Gram matrix: what sequential MEMIT and AlphaEdit carry from edit to edit.

An edit after m others then costs one pass of its own keys through the metric and O(m) work, instead of the past keys
through the metric and a new m x m factorisation. Memory is m whitened keys and m^2 / 2 numbers; once that would pass
what one factor of the metric's size takes, the past is folded into such a factor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastedit.ops.edit_form import DIRECT_ABOVE, factors_of, gram, not_definite, solve_spd
from fastedit.ops.edit_metric import Metric, check_keys, split, thin_product, whitening
from fastedit.ops.edit_rows import RowFactor
from fastedit.ops.packed_solve import pack_factor, packed_factor_size, packed_solve, unpack_factor

__all__ = ["EditHistory"]

# Past keys over the metric's dimension above which they are folded. At 0.41 the open form has the memory and the work
# per edit of the folded one; a fold costs as much as many edits, and its share falls until about 0.8.
_FOLD_ABOVE = 0.6
_PANEL = 512  # columns of a product of triangles computed at a time


class EditHistory:
    """Past keys of one layer, for edits that must leave their outputs as they are.

    `solve(K, R)` gives what `edit_solve(metric, K, R, mu=mu, history=past, weights=weights)` gives. The past is not
    changed by it: append the keys that the edit ends up with (AlphaEdit appends those after the edit).

    Args:
        metric: of the layer, unbatched; the history refers to it and does not copy it. Not one with a float32 factor.
        width: f of the keys.
        mu: > 0, the same for all edits of this history.
        dtype: float64, or float32 to keep past keys rounded, in half the memory; the system is then solved exactly
            for these slightly different keys.
        fold_above: part of the metric's dimension that the number of past keys may reach before they are folded into
            one factor of the metric's size; None never folds. Folded keys cannot be truncated.

        past = EditHistory(ProjectorMetric(U), 4096, mu=10.0)
        left, right = past.solve(K, R)
        past.append(K_after)

    Source: arXiv:2410.02355 eq. 14 (AlphaEdit); bordered Cholesky factorisation.
    """

    def __init__(
        self,
        metric: Metric,
        width: int,
        *,
        mu: float,
        dtype: torch.dtype = torch.float64,
        fold_above: float | None = _FOLD_ABOVE,
    ) -> None:
        if not 0 < mu < float("inf"):
            raise ValueError(f"mu must be finite and > 0, got {mu}")
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        if fold_above is not None and not fold_above > 0:
            raise ValueError(f"fold_above must be > 0 or None, got {fold_above}")
        kind, factor, moment = split(metric)
        if moment is not None:
            raise ValueError(
                "metric must have a float64 factor to carry a history, got float32 with a moment"
            )
        if factor is not None and factor.ndim != (1 if kind == "packed" else 2):
            raise ValueError(f"metric must be of one layer, got a factor of shape {list(factor.shape)}")
        device = torch.device("cpu") if factor is None else factor.device
        check_keys(kind, factor, None, torch.empty(0, width, device=device))
        self.metric, self.width, self.mu, self.fold_above = metric, width, float(mu), fold_above
        self._maps = whitening(kind, factor, None)
        self._size = factor.shape[-1] if factor is not None and kind == "basis" else width
        self._buffer = torch.empty(
            0, self._size, dtype=dtype, device=device
        )  # whitened keys, with room for more
        self._open = 0
        self._factor = RowFactor()
        self._folded: Tensor | None = None  # packed factor of mu I + Y^T Y over the folded keys Y
        self._folded_count = 0

    def __len__(self) -> int:
        """Number of past keys, folded ones included."""
        return self._folded_count + self._open

    @property
    def open(self) -> int:
        """Number of past keys that can still be truncated."""
        return self._open

    @property
    def nbytes(self) -> int:
        """Memory of the state, without the metric's."""
        folded = 0 if self._folded is None else self._folded.nbytes
        return self._buffer.nbytes + self._factor.nbytes + folded

    def append(self, K: Tensor, *, weights: Tensor | None = None) -> None:
        """Add past keys [n, f]; weights: [n] >= 0, how much each counts, None is 1.

        Raises ValueError for wrong shapes, non-finite keys, or keys that repeat so closely that mu drowns in rounding;
        the history is then unchanged.
        """
        self._check(K)
        n = len(K)
        if weights is not None and not (
            weights.shape == (n,) and bool(((weights >= 0) & weights.isfinite()).all())
        ):
            raise ValueError(f"weights must be [{n}], finite and >= 0, got shape {list(weights.shape)}")
        if n == 0:
            return
        if self.fold_above is not None and self.open > self.fold_above * self._size:
            self.fold()
        self._to(K.device)
        Y = self._whiten(K)
        if weights is not None:
            Y = Y * weights.double().sqrt()[:, None].to(Y.device)
        Y = Y.to(self._buffer.dtype)
        B, D = self._border(Y.double())
        self._factor.append(B, D)
        if self._open + n > len(self._buffer):
            # An eighth of slack: appending one key at a time does not copy the past every time.
            grown = self._buffer.new_empty(max(self._open + n, self._open * 9 // 8), self._size)
            grown[: self._open] = self._keys
            self._buffer = grown
        self._buffer[self._open : self._open + n] = Y
        self._open += n

    def truncate(self, n: int) -> None:
        """Forget the last n past keys. Raises ValueError when more are asked for than are open."""
        if not 0 <= n <= self.open:
            raise ValueError(f"n must be from 0 to {self.open}, the past keys that are not folded, got {n}")
        self._open -= n
        self._factor.truncate(self._open)

    def replace(self, K: Tensor, *, weights: Tensor | None = None) -> None:
        """Put these keys in the place of as many last ones (keys after an edit for those before it)."""
        self._check(K)
        before = self._open, self._factor.copy()
        self.truncate(len(K))
        try:
            self.append(K, weights=weights)
        except ValueError:
            self._open, self._factor = before  # keys are written after the last check
            raise

    def solve(self, K: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """left [d, r], right [r, f] float64 of the update for new keys K [n, f], residuals R [n, d], as `edit_solve`.

        Raises ValueError for wrong shapes or non-finite keys.
        """
        self._check(K)
        if R.ndim != 2 or len(R) != len(K) or not R.is_floating_point() or R.device != K.device:
            raise ValueError(
                f"R must be float with one row per key on {K.device}, got {R.dtype} {list(R.shape)}"
            )
        self._to(K.device)
        R = R.detach().double()
        if len(K) == 0:
            return R.new_zeros(R.shape[1], 0), R.new_zeros(0, self.width)
        Y = self._whiten(K)
        past = self._keys.double()
        if len(K) > DIRECT_ABOVE * self._size:
            every = torch.cat([past, Y])
            A = gram(every.mT, self._ridge)
            lower = self._cholesky(A, "mu I + Y^T Y of the whitened keys")
            if R.shape[0] > R.shape[1]:
                eye = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
                return eye, self._unwhiten(solve_spd(lower, Y.mT @ R).mT).contiguous()
            return R.mT.clone(), self._unwhiten(solve_spd(lower, Y.mT).mT).contiguous()
        B, D = self._border(Y)
        T = Y - thin_product(self._factor.solve(B, transposed=True), past)
        return factors_of(T, lambda X: solve_spd(D, X), R, self.width, self._unwhiten)

    def fold(self) -> None:
        """Put all past keys into one factor of the metric's size (the primal form): the same updates, fixed memory.

        `append` calls it when it pays; calling it early is exact too.
        """
        if self.open == 0:
            return
        lower = self._cholesky(gram(self._keys.double().mT, self._ridge), "mu I + Y^T Y of the past keys")
        if self._folded is not None:
            # In the coordinates that the earlier fold whitened: (A B)(A B)^T = A (I + Y^T Y) A^T.
            lower = _product(unpack_factor(self._folded, self._size), lower)
        self._folded = pack_factor(lower)
        self._folded_count += self.open
        self._buffer, self._open, self._factor = self._buffer[:0].clone(), 0, RowFactor()

    def state(self) -> dict[str, Tensor]:
        """Everything but the metric, as tensors: for a checkpoint. `load` gives a history with the same bits."""
        tensors = {
            "keys": self._keys.clone(),
            "factor": self._factor.packed().to(self._buffer.device),
            "mu": torch.tensor(self.mu, dtype=torch.float64),
            "fold_above": torch.tensor(
                float("nan") if self.fold_above is None else self.fold_above, dtype=torch.float64
            ),
            "folded_count": torch.tensor(self._folded_count),
            "probe": self._probe(),
        }
        return tensors if self._folded is None else {**tensors, "folded": self._folded}

    @classmethod
    def load(cls, metric: Metric, width: int, tensors: Mapping[str, Tensor]) -> EditHistory:
        """The history that `state` described. Raises ValueError for another metric's or a damaged one."""
        names = ("keys", "factor", "mu", "fold_above", "folded_count", "probe")
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"tensors must hold {', '.join(names)}, but {', '.join(missing)} is missing")
        keys, fold_above = tensors["keys"], float(tensors["fold_above"])
        found = cls(
            metric,
            width,
            mu=float(tensors["mu"]),
            dtype=keys.dtype,
            fold_above=None if fold_above != fold_above else fold_above,
        )
        if keys.ndim != 2 or keys.shape[1] != found._size:
            raise ValueError(f"tensors['keys'] must be [m, {found._size}], got {list(keys.shape)}")
        probe = found._probe()
        if not torch.allclose(probe, tensors["probe"].to(probe), rtol=1e-6, atol=0):
            raise ValueError(
                "tensors must come from a history of this metric, but its whitened probe differs"
            )
        folded = tensors.get("folded")
        if folded is not None and folded.shape != (packed_factor_size(found._size),):
            raise ValueError(
                f"tensors['folded'] must be a packed factor of {found._size}, got {list(folded.shape)}"
            )
        found._buffer, found._open = keys.clone(), len(keys)
        found._folded = None if folded is None else folded.clone()
        found._folded_count = int(tensors["folded_count"])
        found._factor = RowFactor.of(tensors["factor"], len(keys))
        return found

    @property
    def _keys(self) -> Tensor:
        return self._buffer[: self._open]

    @property
    def _ridge(self) -> float:
        return self.mu if self._folded is None else 1.0

    def _whiten(self, K: Tensor) -> Tensor:
        Y = self._maps[0](K.detach().double())
        return Y if self._folded is None else packed_solve(self._folded, Y)

    def _unwhiten(self, T: Tensor) -> Tensor:
        return self._maps[1](T if self._folded is None else packed_solve(self._folded, T, transposed=True))

    def _border(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """B [n, m], D [n, n]: the rows that new whitened keys add to the Gram matrix's factor."""
        B = self._factor.solve(thin_product(Y, self._keys.double().mT), transposed=False)
        S = gram(Y, self._ridge) - B @ B.mT
        return B, self._cholesky(S, f"the Gram matrix of {len(Y)} keys after {self.open} past ones")

    def _cholesky(self, A: Tensor, what: str) -> Tensor:
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(A)
        if int(info):
            raise ValueError(not_definite(A, what, self.mu))
        return lower

    def _check(self, K: Tensor) -> None:
        if K.ndim != 2 or K.shape[1] != self.width or not K.is_floating_point():
            raise ValueError(f"K must be float [n, {self.width}], got {K.dtype} of shape {list(K.shape)}")

    def _to(self, device: torch.device) -> None:
        if self._buffer.device != device:
            if len(self) or split(self.metric)[1] is not None:
                raise ValueError(f"K must be on the history's device {self._buffer.device}, got {device}")
            self._buffer = self._buffer.to(device)

    def _probe(self) -> Tensor:
        """Two numbers that tell this metric from others."""
        row = torch.linspace(1.0, 2.0, self.width, dtype=torch.float64, device=self._buffer.device).cos()
        seen = self._maps[0](row[None])
        return torch.stack([seen.norm(), seen.abs().sum()])


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A B of lower triangles, skipping most of their zeros."""
    found = torch.zeros_like(A)
    for start in range(0, len(A), _PANEL):
        stop = min(start + _PANEL, len(A))
        found[start:, start:stop] = A[start:, start:] @ B[start:, start:stop]
    return found
