"""Peak memory of a solve above the model, before it runs.

What varies most between models, what a step of the target optimisation keeps for its backward, is measured on one
request (`fastedit.engine.memory`). The rest is counted: factors, keys, hidden states, logits. Activations that blocks
use and drop at once are counted as three tensors of the MLP's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.engine.memory import automatic_tokens, batch_sizes, suffix_tokens
from fastedit.engine.objective import TargetObjective, TargetSpec
from fastedit.engine.problem import Problem
from fastedit.engine.replay import evaluating
from fastedit.engine.suffix import shared_beginnings
from fastedit.engine.sweep import BATCH_TOKENS, KEPT_BYTES
from fastedit.session import Session

__all__ = ["MemoryEstimate", "estimate_locate"]

_DOUBLE = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes above the model.

    Attributes:
        statistics: Cholesky factors of the second moments.
        kept: copies of the edited matrices, and the update's factors.
        targets, sweep, equations: what each phase adds at its peak; phases follow one another.
        batch_tokens: tokens that the target optimisation runs together.
    """

    statistics: int
    kept: int
    targets: int
    sweep: int
    equations: int
    batch_tokens: int

    @property
    def peak(self) -> int:
        """Predicted peak above the model, in bytes."""
        return self.statistics + self.kept + max(self.targets, self.sweep, self.equations)

    def to_dict(self) -> dict[str, int]:
        """JSON-able copy, the peak included."""
        return {**asdict(self), "peak": self.peak}


def estimate_locate(
    session: Session,
    problems: Sequence[Problem],
    spec: TargetSpec,
    *,
    layers: Sequence[int],
    together: bool,
    batch_tokens: int | None,
    second_moments: bool,
) -> MemoryEstimate:
    """Estimate for a method of the locate-then-edit family. Runs one request forward; changes nothing.

    Args:
        problems: the requests as they would be encoded.
        layers: edited layers.
        together: all requests are one solve (MEMIT); else one after the other (ROME).
        batch_tokens: as configured, ``None`` to choose.
        second_moments: factors of the second moments are used.
    """
    arch = session.arch
    count = len(problems) if together else 1
    longest = max(problems, key=suffix_tokens)
    with evaluating(session.model):
        objective = TargetObjective(session.model, arch, [longest], spec, pad_id=session.pad_id)
        automatic, report = automatic_tokens(objective, arch)
    limit = automatic if batch_tokens is None else batch_tokens
    forest = None if objective.padded is not None else shared_beginnings(problems)
    sizes = batch_sizes(problems, forest)
    total = sum(sizes) if together else max(sizes)
    tokens = max(max(sizes), min(limit, total))
    live = min(count, max(1, tokens // max(sizes)))
    item, head = _weight(arch, layers[0]).element_size(), _vocabulary(arch)
    width = max(arch.key_dim(layer) for layer in layers)
    rows = [row for problem in problems for row in problem.rewriting] if together else longest.rewriting
    ahead = sum(row.lookup % len(row.ids) + 1 for row in rows)
    per_batch = min(ahead, BATCH_TOKENS) * 3 * width * item
    # The clean forward, over five tokens before the lookup for each that counts as one, and the steps follow one
    # another.
    capture = min(5 * tokens, tokens + ahead) * 3 * width * item
    # Beside them: clean logits, their logarithms, and a copy.
    targets = max(report.step_bytes(tokens), capture) + live * 3 * 4 * head
    sweep = ahead * 3 * arch.width * item + min(ahead * (width + arch.width) * item, KEPT_BYTES) + per_batch
    equations = 4 * count * width * _DOUBLE + 2 * count * count * _DOUBLE
    if count > 0.6 * width:
        equations += 3 * width * width * _DOUBLE
    squares = sum(arch.key_dim(layer) ** 2 for layer in layers) * _DOUBLE
    factors = len(layers) * len(problems) * (width + arch.width) * _DOUBLE
    originals = sum(_weight(arch, layer).numel() for layer in layers) * item
    return MemoryEstimate(
        statistics=squares if second_moments else 0,
        kept=originals + factors,
        targets=targets,
        sweep=sweep,
        equations=equations,
        batch_tokens=tokens,
    )


def _weight(arch: ResolvedArch, layer: int) -> Tensor:
    weight: Tensor = arch.mlp_out(layer).weight  # type: ignore[assignment]
    return weight


def _vocabulary(arch: ResolvedArch) -> int:
    weight: Tensor = arch.head.weight  # type: ignore[assignment]
    return weight.shape[0]
