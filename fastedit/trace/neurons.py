"""Knowledge neurons: which neurons of the MLPs an answer depends on (Dai et al. 2022, arXiv:2104.08696).

The score of neuron j of layer l, with a the clean activation at the token that predicts the answer y:

    score = (a_j / m) sum_k dP(y | activation of layer l is s_k a) / d(s_k a)_j                        (eq. 5)

an integrated gradient from zero to the clean activation. Neurons above a share of the highest score are a prompt's;
those that a share of several prompts of one fact have in common are the fact's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch, position_limit
from fastedit.config import MethodConfig, check, is_integer, is_number
from fastedit.engine.attention import not_handed_over
from fastedit.engine.encoder_decoder import is_encoder_decoder
from fastedit.engine.memory import free_memory
from fastedit.forward import evaluating
from fastedit.session import Session
from fastedit.tokens import encode_prompt, target_ids
from fastedit.trace.neurons_clean import Activation, Question, spot
from fastedit.trace.neurons_result import Neurons
from fastedit.trace.neurons_rows import NeuronRows
from fastedit.trace.neurons_sweep import NeuronSweep
from fastedit.trace.seq2seq import decoder_ids
from fastedit.trace.seq2seq_lanes import check_side
from fastedit.trace.seq2seq_neurons import Seq2SeqNeurons, own_decoded, source_questions

__all__ = [
    "Continuation",
    "Grid",
    "NeuronOptions",
    "attribute",
    "attribution_bytes",
    "coarse_neurons",
    "encode_question",
    "find_neurons",
    "fractions",
    "own_answer",
    "shared_neurons",
]

Grid = Literal["left", "right", "ends"]
Continuation = Literal["argmax", "answer", "fixed"]
Positions = Literal["answer", "all"]
Neuron = tuple[int, int]

_SHARE = 0.6  # of the free memory


@dataclass(frozen=True, kw_only=True)
class NeuronOptions(MethodConfig):
    """How neurons are attributed and chosen.

    Attributes:
        layers: attributed layers; ``None``: all.
        steps: m, the points of the path from zero to the clean activation.
        grid: which points: ``"left"`` k/m from 0 (the authors' code), ``"right"`` k/m up to 1 (the paper's formula),
            ``"ends"`` m points that include both 0 and 1 (EleutherAI's code and EasyEdit).
        activation: ``"activation"``: what the MLP's last matrix reads; ``"pre_activation"``: what its first matrix (the
            gate's, if there is one) gives, as EleutherAI's code for GPT-2 and EasyEdit's for Llama have it.
        continuation: what follows the prompt when a later token of an answer is scored: the model's own likeliest
            tokens (``"argmax"``, the original), the answer's (``"answer"``), or nothing (``"fixed"``, what EasyEdit
            does for GPT-2 and GPT-J). Scores are averaged over the answer's tokens.
        adaptive_threshold: a prompt's neurons score more than this share of its highest score.
        p: the fact's neurons are those of more than this share of its prompts.
        memory_budget: bytes that the sweep may keep for its backward; ``None``: what is free. Changes no result.
        positions: of an encoder-decoder, whose activations are scaled: those of the decoder's token that predicts the
            answer, or of ``"all"`` its tokens (EasyEdit); see `fastedit.trace.seq2seq_neurons`.
        decoder_prefix: of an encoder-decoder, text between the decoder's start token and the answer.
    """

    layers: tuple[int, ...] | None = None
    steps: int = 20
    grid: Grid = "left"
    activation: Activation = "activation"
    continuation: Continuation = "argmax"
    adaptive_threshold: float = 0.2
    p: float = 0.4
    memory_budget: int | None = None
    positions: Positions = "answer"
    decoder_prefix: str | None = None

    def __post_init__(self) -> None:
        layers, steps = self.layers, self.steps
        if layers is not None:
            ok = (
                isinstance(layers, tuple)
                and len(layers) > 0
                and all(is_integer(i) and i >= 0 for i in layers)
            )
            check(ok, "layers", "be a non-empty list of integers >= 0, or None", layers)
            check(len(set(layers)) == len(layers), "layers", "not repeat a layer", layers)
        check(is_integer(steps) and steps >= 1, "steps", "be an integer >= 1", steps)
        check_side(None, "all", self.decoder_prefix)
        choice = {
            "grid": Grid,
            "activation": Activation,
            "continuation": Continuation,
            "positions": Positions,
        }
        for name, choices in choice.items():
            value = getattr(self, name)
            check(value in get_args(choices), name, f"be one of {', '.join(get_args(choices))}", value)
        for name in ("adaptive_threshold", "p"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < 1, name, "be a number from 0 to 1, 1 excluded", value)
        budget = self.memory_budget
        ok = budget is None or (is_integer(budget) and budget >= 1)
        check(ok, "memory_budget", "be an integer >= 1, or None", budget)


def fractions(steps: int, grid: Grid) -> tuple[float, ...]:
    """s_1 .. s_m."""
    if grid == "ends":
        return tuple(torch.linspace(0, 1, steps, dtype=torch.float64).tolist())
    first = 0 if grid == "left" else 1
    return tuple((k + first) / steps for k in range(steps))


def find_neurons(
    session: Session, prompts: str | Sequence[str], answer: str | None, options: NeuronOptions
) -> Neurons:
    """Attribute ``answer`` after every prompt, choose each prompt's neurons and those that prompts share.

    Args:
        prompts: one prompt, or several of one fact. For a masked language model each holds its mask token once.
        answer: text; ``None``: the model's own likeliest next token after the first prompt.

    Raises:
        ValueError: no prompt, a blank prompt or answer, a prompt and answer longer than the model takes, no such layer,
            options of encoder-decoders for another model, or scores that are not finite.
    """
    listed = _listed(prompts)
    if answer is not None:
        check(
            isinstance(answer, str) and bool(answer.strip()), "answer", "be a text that is not blank", answer
        )
    arch = session.arch
    layers = _layers(arch, options)
    with evaluating(session.model):
        encoded = [encode_question(session, prompt) for prompt in listed]
        target = target_ids(session.tokenizer, answer) if answer is not None else None
        if target is None:
            first, position = encoded[0]
            target = own_answer(session, first, 1, position=position, prefix=options.decoder_prefix)
        scores, activations, probability = attribute(
            session, [(ids, position, tuple(target)) for ids, position in encoded], layers, options
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("prompts: the scores are not finite, the model gives NaN or infinity on them")
    coarse = tuple(coarse_neurons(one, layers, options.adaptive_threshold) for one in scores)
    return Neurons(
        prompts=tuple(listed),
        answer=answer if answer is not None else str(session.tokenizer.decode(list(target))),
        answer_ids=tuple(target),
        layers=layers,
        scores=scores.cpu(),
        activations=activations.cpu(),
        probability=tuple(probability.tolist()),
        coarse=coarse,
        neurons=shared_neurons(coarse, options.p),
        options={name: getattr(options, name) for name in options.__dataclass_fields__},
    )


def attribute(
    session: Session,
    rows: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    layers: Sequence[int],
    options: NeuronOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and activations ``[rows, layers, f]``, and the probability ``[rows]`` of the answer's first token.

    Args:
        rows: per prompt its ids, the position that predicts the answer, and the answer's ids.
        layers: attributed layers, ascending.
    """
    engine = _engine(session, rows, layers, options)
    gradients = engine.run()
    at = gradients[0].device
    gradient = torch.stack([one.to(at) for one in gradients], dim=1)
    activation = torch.stack([engine.activations[layer].to(gradient) for layer in layers], dim=1)
    scores = activation * gradient / options.steps
    sizes = [len(answer) for _, _, answer in rows]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return (
        torch.stack([part.mean(dim=0) for part in scores.split(sizes)]),
        torch.stack([part.mean(dim=0) for part in activation.split(sizes)]),
        engine.probabilities[firsts].detach(),
    )


def attribution_bytes(
    session: Session,
    rows: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    layers: Sequence[int],
    options: NeuronOptions,
) -> tuple[int, int]:
    """Predicted bytes above the model of `attribute` with the same arguments: clean forward, and sweep."""
    return _engine(session, rows, layers, options).predicted_bytes()


def _engine(
    session: Session,
    rows: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    layers: Sequence[int],
    options: NeuronOptions,
) -> NeuronSweep | NeuronRows | Seq2SeqNeurons:
    arch = session.arch
    budget = options.memory_budget or int(_SHARE * free_memory(session.device))
    points = fractions(options.steps, options.grid)
    if is_encoder_decoder(arch):
        asked = [one for ids, _, answer in rows for one in source_questions(session, ids, answer, options)]
        return Seq2SeqNeurons(session, asked, layers, points, options, budget)
    questions: list[Question] = []
    for ids, position, answer in rows:
        questions += _questions(session, ids, position, answer, options.continuation)
    whole = arch.row.side == "encoder" or not_handed_over(arch) is not None
    made = NeuronRows if whole else NeuronSweep
    return made(arch, questions, layers, points, options.activation, budget)


def own_answer(
    session: Session, ids: Sequence[int], count: int, *, position: int = -1, prefix: str | None = None
) -> list[int]:
    """The model's likeliest ``count`` tokens after a prompt (and a decoder's prefix), each given those before."""
    if is_encoder_decoder(session.arch):
        return own_decoded(session, ids, decoder_ids(session, prefix), count)
    row, found = list(ids), list[int]()
    for _ in range(count):
        with torch.no_grad():
            logits = session.model(input_ids=torch.tensor([row], device=session.device)).logits
        found.append(int(logits[0, position].argmax()))
        row.append(found[-1])
    return found


def coarse_neurons(scores: Tensor, layers: Sequence[int], threshold: float) -> tuple[Neuron, ...]:
    """``(layer, neuron)`` of the scores ``[layers, f]`` above ``threshold`` times the highest, in that order."""
    chosen = scores > threshold * scores.max()
    return tuple((layers[i], j) for i, j in chosen.nonzero().tolist())


def shared_neurons(sets: Sequence[Sequence[Neuron]], p: float) -> tuple[Neuron, ...]:
    """The neurons of more than ``p`` of the prompts, ascending."""
    counts = Counter(neuron for one in sets for neuron in one)
    return tuple(sorted(neuron for neuron, count in counts.items() if count > p * len(sets)))


def _questions(
    session: Session, ids: Sequence[int], position: int, answer: Sequence[int], continuation: Continuation
) -> list[Question]:
    """One question per token of the answer."""
    causal = session.arch.row.side == "decoder"
    if len(answer) > 1 and not causal:
        raise ValueError(
            f"answer must be one token for a masked language model, got {len(answer)} tokens: {list(answer)}"
        )
    length = len(ids) + (0 if continuation == "fixed" else len(answer) - 1)
    limit = getattr(session.model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"prompts: prompt and answer have {length} tokens, the model takes {limit}")
    own: Sequence[int] = ()
    if len(answer) > 1 and continuation == "argmax":
        own = own_answer(session, ids, len(answer) - 1)
    elif continuation == "answer":
        own = answer[:-1]
    rows = [(*ids, *own[:step]) for step in range(len(answer))]
    return [
        Question(row, len(row) - 1 if causal else position, token)
        for row, token in zip(rows, answer, strict=True)
    ]


def encode_question(session: Session, prompt: str) -> tuple[tuple[int, ...], int]:
    """Token ids of a prompt, and the position that predicts the answer."""
    tokenizer = session.tokenizer
    if session.arch.row.side == "encoder":
        ids = tuple(tokenizer(prompt)["input_ids"])
        masks = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
        if len(masks) != 1:
            raise ValueError(
                f"prompts must hold the mask token {tokenizer.mask_token!r} once each, got {prompt!r}"
            )
        return ids, masks[0]
    row = encode_prompt(tokenizer, prompt)
    if is_encoder_decoder(session.arch):
        limit = position_limit(session.arch)
        ok = limit is None or len(row) <= limit
        check(ok, "prompts", f"have at most {limit} tokens, the model's positions", len(row))
        return row.ids, row.target_start
    return row.ids[: row.target_start + 1], row.target_start


def _listed(prompts: str | Sequence[str]) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else prompts
    ok = isinstance(listed, Sequence) and len(listed) > 0
    check(ok, "prompts", "be a text or a list of at least one", prompts)
    for prompt in listed:
        check(
            isinstance(prompt, str) and bool(prompt.strip()),
            "prompts",
            "hold texts that are not blank",
            prompt,
        )
    return list(listed)


def _layers(arch: ResolvedArch, options: NeuronOptions) -> tuple[int, ...]:
    """Attributed layers, checked, ascending."""
    if not is_encoder_decoder(arch):
        for name, value in (("positions", "answer"), ("decoder_prefix", None)):
            given = getattr(options, name)
            check(given == value, name, f"be {value!r} for a model that is no encoder-decoder", given)
    layers = tuple(range(arch.depth)) if options.layers is None else tuple(sorted(options.layers))
    for layer in layers:
        arch.check_layer(layer)
        spot(arch, layer, options.activation)
    widths = {arch.key_dim(layer) for layer in layers}
    check(len(widths) == 1, "layers", "have MLPs of one width", sorted(widths))
    return layers
