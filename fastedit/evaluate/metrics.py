"""Metrics of an edit: accuracy, probability, and COUNTERFACT's success and magnitude, per request and on
average.

Every probe is one prompt with the continuation it should have (``target``) and, where known, the one it
should not (``avoid``): what the edit asks for in a rewrite or a paraphrase, what was true before in a
neighbour or another fact. So success always reads p(target) > p(avoid), which for rewrite, paraphrase and
neighbourhood is COUNTERFACT's ES, PS and NS, and magnitude is p(target) - p(avoid) (Meng et al. 2022,
arXiv:2202.05262, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastedit.arch import position_limit
from fastedit.evaluate.scoring import Score, score_targets
from fastedit.request import PROBE_KINDS, EditRequest, Probe, as_requests
from fastedit.tokens import Encoded, encode_prompt, target_ids

if TYPE_CHECKING:
    from rich.table import Table

    from fastedit.session import Session

__all__ = ["KINDS", "Evaluation", "KindSummary", "ProbeScore", "evaluate"]

KINDS = tuple(kind for kind in PROBE_KINDS if kind != "generation")
"""What can be scored, in the order of reports. "generation" is left out: it has no continuation to force."""

_SCORE_KINDS = ("rewrite", "paraphrase", "neighbourhood")


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """One probe, scored by teacher forcing.

    group: the data set's own subdivision of the kind, or None.
    accuracy: 1.0 when every token of the whole target is the arg-max (greedy decoding gives the target), else
    0.0.
    token_accuracy: share of the target's tokens that are.
    probability: exp(mean per-token log-probability); whole_probability: exp(sum).
    avoid_*: the same of the competing continuation, None without one.
    success: 1.0 when probability > avoid_probability, else 0.0; magnitude: their difference. None without
    one.
    """

    request: str
    kind: str
    group: str | None
    prompt: str
    target: str
    avoid: str | None
    accuracy: float
    token_accuracy: float
    probability: float
    whole_probability: float
    avoid_accuracy: float | None
    avoid_probability: float | None
    avoid_whole_probability: float | None
    success: float | None
    magnitude: float | None


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """Means of one kind: over the requests, of the mean over each request's probes (as COUNTERFACT averages).

    requests, probes: how many went in. pairs: requests with a competing continuation; success, magnitude and
    avoid_probability are means over those and None when there are none.
    """

    requests: int
    probes: int
    accuracy: float
    token_accuracy: float
    probability: float
    whole_probability: float
    pairs: int
    avoid_accuracy: float | None
    avoid_probability: float | None
    success: float | None
    magnitude: float | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of all probes, in the order of the requests."""

    probes: tuple[ProbeScore, ...]

    @cached_property
    def summary(self) -> Mapping[str, KindSummary]:
        """Kind -> means. A kind without probes is absent."""
        groups = {kind: [probe for probe in self.probes if probe.kind == kind] for kind in KINDS}
        return {kind: _summarise(group) for kind, group in groups.items() if group}

    @property
    def score(self) -> float | None:
        """COUNTERFACT's S: harmonic mean of ES, PS and NS; None unless all three were measured."""
        values = [self.summary[kind].success if kind in self.summary else None for kind in _SCORE_KINDS]
        known = [value for value in values if value is not None]
        if len(known) < len(_SCORE_KINDS):
            return None
        return len(known) / sum(1.0 / value for value in known) if all(known) else 0.0

    def of(self, request: str) -> Mapping[str, KindSummary]:
        """Kind -> means of one request id. KeyError for an id that was not evaluated."""
        chosen = tuple(probe for probe in self.probes if probe.request == request)
        if not chosen:
            raise KeyError(request)
        return Evaluation(chosen).summary

    def table(self, title: str | None = None) -> Table:
        """The summary as a rich table."""
        from fastedit.evaluate.report import comparison_table

        return comparison_table({"": self}, title=title)

    def to_dict(self, *, probes: bool = True) -> dict[str, Any]:
        """JSON-able: {"score", "kinds": {kind: means}, "probes": [...]}; absent kinds and None values are
        left out.
        """
        out: dict[str, Any] = {}
        if self.score is not None:
            out["score"] = self.score
        out["kinds"] = {kind: _without_none(asdict(summary)) for kind, summary in self.summary.items()}
        if probes:
            out["probes"] = [_without_none(asdict(probe)) for probe in self.probes]
        return out


def evaluate(
    session: Session,
    requests: EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]],
    *,
    kinds: Sequence[str] | None = None,
    batch_tokens: int = 4096,
) -> Evaluation:
    """Score every request and its probes on the session's model as it is now.

    kinds: which of KINDS to score; default all that are present.
    batch_tokens: bound of padded tokens in one forward.
    Raises ValueError for no requests, two requests of one id, an unknown kind, a prompt or target
    without tokens, a prompt that is longer than the model's positions.
    """
    checked = as_requests(requests)
    seen: set[str] = set()
    for request in checked:
        if request.id in seen:
            raise ValueError(f"requests must have different ids, got {request.id!r} twice")
        seen.add(request.id)
    probes = [(request.id, probe) for request in checked for probe in _probes(request)]
    wanted = KINDS if kinds is None else _checked_kinds(kinds)
    probes = [(name, probe) for name, probe in probes if probe.kind in wanted]

    encoded = []
    for name, probe in probes:
        encoded.append(_encode(session, name, probe, probe.target))
        if probe.avoid is not None:
            encoded.append(_encode(session, name, probe, probe.avoid))
    scores = iter(score_targets(session, encoded, batch_tokens=batch_tokens))
    return Evaluation(
        tuple(
            _probe_score(name, probe, next(scores), None if probe.avoid is None else next(scores))
            for name, probe in probes
        )
    )


def _probes(request: EditRequest) -> list[Probe]:
    rewrite = Probe(prompt=request.text, target=request.target_new, avoid=request.target_true, kind="rewrite")
    return [rewrite, *request.probes]


def _checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    if isinstance(kinds, str):
        raise ValueError(f"kinds must be a sequence of names, got the string {kinds!r}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}; got {kind!r}")
    return tuple(kinds)


def _encode(session: Session, request: str, probe: Probe, target: str) -> Encoded:
    try:
        row = encode_prompt(session.tokenizer, probe.prompt, target=target_ids(session.tokenizer, target))
        if (limit := position_limit(session.arch)) is not None and len(row) > limit:
            raise ValueError(f"{len(row)} tokens with its target, the model has {limit} positions")
        return row
    except ValueError as error:
        raise ValueError(f"request {request!r}: {probe.kind} probe: {error}") from error


def _probe_score(name: str, probe: Probe, target: Score, avoid: Score | None) -> ProbeScore:
    probability = math.exp(target.log_prob / target.tokens)
    other = None if avoid is None else math.exp(avoid.log_prob / avoid.tokens)
    return ProbeScore(
        request=name,
        kind=probe.kind,
        group=probe.group,
        prompt=probe.prompt,
        target=probe.target,
        avoid=probe.avoid,
        accuracy=float(target.greedy),
        token_accuracy=target.matches / target.tokens,
        probability=probability,
        whole_probability=math.exp(target.log_prob),
        avoid_accuracy=None if avoid is None else float(avoid.greedy),
        avoid_probability=other,
        avoid_whole_probability=None if avoid is None else math.exp(avoid.log_prob),
        # Compared as log-probabilities: two probabilities can both underflow to 0.
        success=None
        if avoid is None
        else float(target.log_prob / target.tokens > avoid.log_prob / avoid.tokens),
        magnitude=None if other is None else probability - other,
    )


def _summarise(probes: Sequence[ProbeScore]) -> KindSummary:
    groups: dict[str, list[ProbeScore]] = {}
    for probe in probes:
        groups.setdefault(probe.request, []).append(probe)

    def mean(field: str) -> float | None:
        means = []
        for group in groups.values():
            values = [getattr(probe, field) for probe in group if getattr(probe, field) is not None]
            if values:
                means.append(sum(values) / len(values))
        return sum(means) / len(means) if means else None

    return KindSummary(
        requests=len(groups),
        probes=len(probes),
        accuracy=mean("accuracy") or 0.0,
        token_accuracy=mean("token_accuracy") or 0.0,
        probability=mean("probability") or 0.0,
        whole_probability=mean("whole_probability") or 0.0,
        pairs=sum(any(probe.success is not None for probe in group) for group in groups.values()),
        avoid_accuracy=mean("avoid_accuracy"),
        avoid_probability=mean("avoid_probability"),
        success=mean("success"),
        magnitude=mean("magnitude"),
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
