"""KN: Knowledge Neurons (Dai et al. 2022, arXiv:2104.08696; EleutherAI/knowledge-neurons, zjunlp/EasyEdit).

The neurons that the old answer depends on are found by integrated gradients (`fastedit.trace.neurons`), and what they
write into the residual stream is changed. For every chosen neuron j of a layer with last matrix W, with e the input
embeddings of the old and the new answer (sums over their tokens):

    W[:, j] += -a e_old + b e_new                      (EleutherAI, EasyEdit; a = b = 2, or 1 for several tokens)
    W[:, j] += ||W[:, j]|| (-a e_old / ||e_old|| + b e_new / ||e_new||)             (the authors; a = 1, b = 8)

or set to zero (``suppress``), or doubled (``enhance``).

In a masked language model (BERT, the authors' own) the request's prompt holds the mask token where the answer belongs,
neurons are those at that token, and answers are one token. Of an encoder-decoder (T5) they are the decoder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch, editable_weight, is_transposed
from fastedit.config import check, is_number
from fastedit.edit import Edit, LowRank
from fastedit.engine.estimate import MemoryEstimate
from fastedit.engine.trial import Trial, finite
from fastedit.forward import evaluating
from fastedit.methods import method
from fastedit.request import EditRequest
from fastedit.session import Session
from fastedit.tokens import target_ids
from fastedit.trace.neurons import attribution_bytes, find_neurons
from fastedit.trace.neurons_options import NeuronOptions
from fastedit.trace.neurons_questions import Row, check_length, encode_rows, own_answer
from fastedit.trace.neurons_result import Neurons

__all__ = ["KnConfig", "kn"]

Operation = Literal["replace", "suppress", "enhance"]
Scale = Literal["plain", "norm"]
OldAnswer = Literal["argmax", "target_true"]

# EasyEdit's hparams/KN: 0.1 for GPT-J, 0.2 elsewhere. The authors' code for BERT: in units of each neuron's norm.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-xl": {"adaptive_threshold": 0.2},
    "gpt-j-6b": {"adaptive_threshold": 0.1},
    "bert-base": {"adaptive_threshold": 0.2, "scale": "norm"},
    "bert-large": {"adaptive_threshold": 0.2, "scale": "norm"},
}
# Options of the replacement that the other operations have no use for, and their defaults.
_OF_REPLACE: Mapping[str, Any] = {
    "scale": "plain",
    "old_answer": "argmax",
    "old_weight": None,
    "new_weight": None,
}


@dataclass(frozen=True, kw_only=True)
class KnConfig(NeuronOptions):
    """KN's hyper-parameters; those of the attribution are described in ``NeuronOptions``.

    The published code for GPT-2 and GPT-J is ``activation="pre_activation", grid="ends", continuation="fixed"``.

    Attributes:
        refine: choose the neurons that the prompt and the request's paraphrases share; else those of the prompt.
        operation: ``"replace"`` the old answer by the new one, ``"suppress"`` or ``"enhance"`` what the neurons say.
        scale: ``"plain"`` adds embeddings as they are; ``"norm"`` in units of each neuron's norm.
        old_answer: whose embeddings are taken out: the model's own likeliest tokens, as many as the new answer has, or
            the request's ``target_true``.
        old_weight, new_weight: a and b; ``None``: as published for the scale. EasyEdit's a = 2, b = 1 for a target that
            is a list of one is had by giving both.
    """

    refine: bool = False
    operation: Operation = "replace"
    scale: Scale = "plain"
    old_answer: OldAnswer = "argmax"
    old_weight: float | None = None
    new_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(isinstance(self.refine, bool), "refine", "be true or false", self.refine)
        for name, choices in (("operation", Operation), ("scale", Scale), ("old_answer", OldAnswer)):
            value = getattr(self, name)
            ok = isinstance(value, str) and value in get_args(choices)
            check(ok, name, f"be one of {', '.join(get_args(choices))}", value)
        for name in ("old_weight", "new_weight"):
            value = getattr(self, name)
            ok = value is None or (is_number(value) and value >= 0)
            check(ok, name, "be a number >= 0, or None", value)
        shared = NeuronOptions.__dataclass_fields__["p"].default
        check(self.refine or self.p == shared, "p", "be left out without refine=True", self.p)
        if self.operation != "replace":
            for name, default in _OF_REPLACE.items():
                value = getattr(self, name)
                check(value == default, name, f"be left out with operation={self.operation!r}", value)

    def weights(self, tokens: int) -> tuple[float, float]:
        """a and b for a new answer of ``tokens`` tokens."""
        plain = 2.0 if tokens == 1 else 1.0
        a, b = (plain, plain) if self.scale == "plain" else (1.0, 8.0)
        return (
            a if self.old_weight is None else float(self.old_weight),
            b if self.new_weight is None else float(self.new_weight),
        )


def _estimate(session: Session, requests: Sequence[EditRequest], config: KnConfig) -> MemoryEstimate:
    """Predicted peak memory of ``kn`` with these arguments."""
    arch = session.arch
    layers = tuple(range(arch.depth)) if config.layers is None else config.layers
    asked = [_asked(session, request, config) for request in requests]
    # The tokens of an unknown answer do not matter here, only how many there are.
    longest = max(asked, key=lambda rows: sum(len(row.ids) + len(answer or ()) for row, answer in rows))
    with evaluating(session.model):
        rows = [(row, answer or (0,)) for row, answer in longest]
        clean, sweep = attribution_bytes(session, rows, sorted(layers), config)
    weight: Tensor = arch.mlp_out(layers[0]).weight  # type: ignore[assignment]
    # A first request's updates are written for the next one to see; a last one's are not.
    originals = sum(arch.width * arch.key_dim(layer) for layer in layers) * weight.element_size()
    factor = max(arch.width + arch.key_dim(layer) for layer in layers) * 4
    return MemoryEstimate(
        statistics=0,
        kept=(originals if len(requests) > 1 else 0) + len(requests) * len(layers) * factor,
        targets=sweep,
        sweep=clean,
        equations=2 * factor,
        batch_tokens=len(layers) * config.steps,
    )


@method(
    "kn",
    paper="arXiv:2104.08696",
    modes=("single", "sequential"),
    config=KnConfig,
    defaults=_DEFAULTS,
    estimate=_estimate,
)
def kn(
    session: Session, requests: Sequence[EditRequest], config: KnConfig, *, targets: Tensor | None = None
) -> Edit:
    """Solve the requests one after the other, each on the weights that the ones before it left.

    The old answer, whose neurons are looked for, is ``target_true``, or the model's own next token without one.

    Raises:
        ValueError: bad layer or request, targets given, an embedding narrower than the residual stream, no neuron
            with a positive score, or scores or an update that are not finite.
        NotImplementedError: quantised, packed, sharded or offloaded weights.
    """
    arch = _editable(session, config)
    if targets is not None:
        raise ValueError("targets must not be given: kn writes embeddings, not optimised vectors")
    embedding: Tensor = arch.embed.weight  # type: ignore[assignment]
    if embedding.shape[1] != arch.width:
        raise ValueError(
            f"model: kn needs embeddings as wide as the residual stream ({arch.width}), got {embedding.shape[1]}"
        )
    for request in requests:
        _asked(session, request, config)
    factors: dict[int, list[tuple[Tensor, Tensor]]] = {}
    found: list[dict[str, Any]] = []
    with Trial(session) as trial:
        for index, request in enumerate(requests):
            with trial.timed("attribution"), _naming(request):
                neurons = find_neurons(session, _prompts(request, config), request.target_true, config)
            if not neurons.neurons:
                raise ValueError(
                    f"request {request.id!r}: no neuron is above the threshold for {neurons.answer!r} in "
                    f"{'enough prompts' if len(neurons.prompts) > 1 else 'its prompt'}; the model is unchanged"
                )
            with trial.timed("equations"), _naming(request):
                written = _write(session, request, neurons, config)
            found.append(_report(request, neurons))
            for layer, (left, right) in written.items():
                finite(request.id, left, right)
                factors.setdefault(layer, []).append((left, right))
                if index + 1 < len(requests):
                    trial.add(layer, left, right)
    deltas = tuple(
        LowRank(
            arch.name("mlp_out", layer),
            torch.cat([left for left, _ in factors[layer]], dim=1),
            torch.cat([right for _, right in factors[layer]]),
        )
        for layer in sorted(factors)
    )
    return trial.edit("kn", config, requests, deltas, {"neurons": found})


def _editable(session: Session, config: KnConfig) -> ResolvedArch:
    """The session's architecture, if neurons can be found and changed in it."""
    arch = session.arch
    for layer in range(arch.depth) if config.layers is None else config.layers:
        arch.check_layer(layer)
        editable_weight(session.model, arch.name("mlp_out", layer))
    return arch


def _asked(
    session: Session, request: EditRequest, config: KnConfig
) -> list[tuple[Row, tuple[int, ...] | None]]:
    """Per prompt its tokens and those of the true answer, if there is one; what does not fit is refused here."""
    with _naming(request):
        asked, rule = _prompts(request, config), config.continuation
        texts, rows, true = encode_rows(
            session, asked, request.target_true, rule, prefix=config.decoder_prefix
        )
        if config.operation == "replace":
            if config.old_answer == "target_true" and true is None:
                raise ValueError("field 'target_true' must be given for old_answer='target_true'")
            new = target_ids(session.tokenizer, request.target_new)
            if len(new) > 1 and session.arch.row.side == "encoder":
                raise ValueError(
                    f"field 'target_new': must be one token for a masked language model, got {len(new)} tokens of "
                    f"{request.target_new!r}"
                )
            if config.old_answer == "argmax":
                check_length(session, texts[0], rows[0], len(new) - 1)
    return [(row, true) for row in rows]


@contextmanager
def _naming(request: EditRequest) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"request {request.id!r}: {error}") from error


def _prompts(request: EditRequest, config: KnConfig) -> list[str]:
    paraphrases = request.probes_of("paraphrase") if config.refine else ()
    return [request.text, *(probe.prompt for probe in paraphrases)]


def _report(request: EditRequest, neurons: Neurons) -> dict[str, Any]:
    return {
        "id": request.id,
        "answer": neurons.answer,
        "probability": neurons.probability[0],
        "count": len(neurons.neurons),
        "per_layer": {str(layer): count for layer, count in neurons.per_layer().items() if count},
        "neurons": [list(neuron) for neuron in neurons.neurons],
    }


def _write(
    session: Session, request: EditRequest, neurons: Neurons, config: KnConfig
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer the update as ``left [d, r]``, ``right [r, f]``: rank one, unless columns change by themselves."""
    arch = session.arch
    chosen: dict[int, list[int]] = {}
    for layer, neuron in neurons.neurons:
        chosen.setdefault(layer, []).append(neuron)
    vectors = _vectors(session, request, config) if config.operation == "replace" else None
    written = {}
    for layer, columns in chosen.items():
        module = arch.mlp_out(layer)
        weight: Tensor = module.weight.detach()  # type: ignore[assignment,operator]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        canonical = weight.T if is_transposed(module) else weight
        at = torch.tensor(columns, device=weight.device)
        own = canonical[:, at].to(wide)
        if vectors is None:
            right = own.new_zeros(len(columns), canonical.shape[1])
            right[torch.arange(len(columns), device=at.device), at] = 1.0
            written[layer] = (-own if config.operation == "suppress" else own, right)
            continue
        old, new = (vector.to(own) for vector in vectors)
        right = own.new_zeros(1, canonical.shape[1])
        right[0, at] = own.norm(dim=0) if config.scale == "norm" else 1.0
        if config.scale == "norm":
            old, new = old / old.norm(), new / new.norm()
        a, b = config.weights(len(target_ids(session.tokenizer, request.target_new)))
        written[layer] = ((b * new - a * old)[:, None], right)
    return written


def _vectors(session: Session, request: EditRequest, config: KnConfig) -> tuple[Tensor, Tensor]:
    """Embeddings ``[d]`` of the old and the new answer, summed over their tokens."""
    embedding: Tensor = session.arch.embed.weight.detach()  # type: ignore[assignment,operator]
    wide = embedding.dtype if embedding.dtype == torch.float64 else torch.float32
    new = target_ids(session.tokenizer, request.target_new)
    if config.old_answer == "target_true" and request.target_true is not None:
        old = target_ids(session.tokenizer, request.target_true)
    else:
        old = list(own_answer(session, _asked(session, request, config)[0][0], len(new)))
    first, second = (
        embedding[torch.tensor(ids, device=embedding.device)].to(wide).sum(dim=0) for ids in (old, new)
    )
    return first, second
