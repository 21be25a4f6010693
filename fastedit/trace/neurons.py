"""Knowledge neurons: which neurons of the MLPs an answer depends on (Dai et al. 2022, arXiv:2104.08696).

The score of neuron j of layer l, with a the clean activation at the token that predicts the answer y:

    score = (a_j / m) sum_k dP(y | activation of layer l is s_k a) / d(s_k a)_j                        (eq. 5)

an integrated gradient from zero to the clean activation. Neurons above a share of the highest score are a prompt's;
those that a share of several prompts of one fact have in common are the fact's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fastedit.arch import ResolvedArch
from fastedit.config import check
from fastedit.engine.attention import not_handed_over
from fastedit.engine.encoder_decoder import is_encoder_decoder
from fastedit.engine.memory import free_memory
from fastedit.forward import evaluating
from fastedit.session import Session
from fastedit.trace.neurons_budget import NeuronBudget, groups_of
from fastedit.trace.neurons_clean import Question, spot
from fastedit.trace.neurons_options import NeuronOptions, fractions
from fastedit.trace.neurons_questions import Row, encode_rows, own_answer, questions_of
from fastedit.trace.neurons_result import Neurons
from fastedit.trace.neurons_rows import NeuronRows
from fastedit.trace.neurons_sweep import NeuronSweep
from fastedit.trace.seq2seq_neurons import Seq2SeqNeurons

__all__ = [
    "NeuronOptions",
    "attribute",
    "attribution_bytes",
    "coarse_neurons",
    "find_neurons",
    "fractions",
    "own_answer",
    "shared_neurons",
]

Neuron = tuple[int, int]

_SHARE = 0.6  # of the free memory


def find_neurons(
    session: Session, prompts: str | Sequence[str], answer: str | None, options: NeuronOptions
) -> Neurons:
    """Attribute ``answer`` after every prompt, choose each prompt's neurons and those that prompts share.

    Scores and activations are float32 for half-precision models too, float64 for a float64 model.

    Args:
        prompts: one prompt, or several of one fact. For a masked language model each holds its mask token once.
        answer: text; ``None``: the model's own likeliest next token after the first prompt.

    Raises:
        ValueError: no prompt, a blank prompt or answer, a prompt and answer longer than the model takes, no such layer,
            options of encoder-decoders for another model, or a model that gives NaN or infinity.
    """
    layers = _layers(session.arch, options)
    listed, rows, target = encode_rows(
        session, prompts, answer, options.continuation, prefix=options.decoder_prefix
    )
    with _undisturbed(session):
        if target is None:
            target = own_answer(session, rows[0], 1)
        scores, activations, probability = attribute(
            session, [(row, target) for row in rows], layers, options
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("prompts: the scores are not finite, the model gives NaN or infinity on them")
    coarse = tuple(coarse_neurons(one, layers, options.adaptive_threshold) for one in scores)
    return Neurons(
        prompts=listed,
        answer=answer if answer is not None else str(session.tokenizer.decode(list(target))),
        answer_ids=target,
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
    rows: Sequence[tuple[Row, Sequence[int]]],
    layers: Sequence[int],
    options: NeuronOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and activations ``[rows, layers, f]``, and the probability ``[rows]`` of the answer's first token.

    Gradients are summed over the steps, and scores averaged over an answer's tokens, in the type of the results:
    float32, or float64 for a float64 model.

    Args:
        rows: per prompt its tokens and the answer's ids.
        layers: attributed layers, ascending.
    """
    questions, sizes = _questions(session, rows, options)
    budget = _budget(session, options)
    scores, activations, probabilities = [], [], []
    for group in _groups(session, questions, budget):
        engine = _engine(session, group, layers, options, budget)
        gradients = engine.run()
        at = gradients[0].device
        gradient = torch.stack([one.to(at) for one in gradients], dim=1)
        activation = torch.stack([engine.activations[layer].to(gradient) for layer in layers], dim=1)
        scores.append(activation * gradient / options.steps)
        activations.append(activation)
        probabilities.append(engine.probabilities)
    score, activation = torch.cat(scores), torch.cat(activations)
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return (
        torch.stack([part.mean(dim=0) for part in score.split(sizes)]),
        torch.stack([part.mean(dim=0) for part in activation.split(sizes)]),
        torch.cat(probabilities)[firsts],
    )


def attribution_bytes(
    session: Session,
    rows: Sequence[tuple[Row, Sequence[int]]],
    layers: Sequence[int],
    options: NeuronOptions,
) -> tuple[int, int]:
    """Predicted bytes above the model of `attribute` with the same arguments: clean forward, and sweep."""
    questions, _ = _questions(session, rows, options)
    budget = _budget(session, options)
    groups = _groups(session, questions, budget)
    largest = max(groups, key=lambda group: sum(len(q.source) + len(q.ids) for q in group))
    return _engine(session, largest, layers, options, budget).predicted_bytes()


def coarse_neurons(scores: Tensor, layers: Sequence[int], threshold: float) -> tuple[Neuron, ...]:
    """``(layer, neuron)`` of the scores ``[layers, f]`` above ``threshold`` times the highest, in that order.

    None where no score is positive.
    """
    chosen = scores > threshold * scores.max()
    return tuple((layers[i], j) for i, j in chosen.nonzero().tolist())


def shared_neurons(sets: Sequence[Sequence[Neuron]], p: float) -> tuple[Neuron, ...]:
    """The neurons of more than ``p`` of the prompts, ascending."""
    counts = Counter(neuron for one in sets for neuron in one)
    return tuple(sorted(neuron for neuron, count in counts.items() if count > p * len(sets)))


def _questions(
    session: Session, rows: Sequence[tuple[Row, Sequence[int]]], options: NeuronOptions
) -> tuple[list[Question], list[int]]:
    """Questions of all rows, and how many each row has."""
    found = [questions_of(session, row, answer, options.continuation) for row, answer in rows]
    return [question for some in found for question in some], [len(some) for some in found]


def _budget(session: Session, options: NeuronOptions) -> NeuronBudget:
    return NeuronBudget(options.memory or int(_SHARE * free_memory(session.device)))


def _groups(
    session: Session, questions: Sequence[Question], budget: NeuronBudget
) -> Iterator[Sequence[Question]]:
    """Questions that an engine has together; an encoder-decoder's has one at a time anyway."""
    if is_encoder_decoder(session.arch):
        yield from ([question] for question in questions)
    else:
        yield from groups_of(session.arch, questions, budget)


def _engine(
    session: Session,
    questions: Sequence[Question],
    layers: Sequence[int],
    options: NeuronOptions,
    budget: NeuronBudget,
) -> NeuronSweep | NeuronRows | Seq2SeqNeurons:
    arch = session.arch
    points = fractions(options.steps, options.grid)
    if is_encoder_decoder(arch):
        (question,) = questions
        every = options.positions == "all"
        return Seq2SeqNeurons(arch, question, layers, points, options.activation, budget, every=every)
    whole = arch.row.side == "encoder" or not_handed_over(arch) is not None
    made = NeuronRows if whole else NeuronSweep
    return made(arch, questions, layers, points, options.activation, budget)


@contextmanager
def _undisturbed(session: Session) -> Iterator[None]:
    """Whatever mode the caller is in: no dropout, gradients of activations and of nothing else."""
    with ExitStack() as modes:
        # Inference tensors cannot be differentiated.
        modes.enter_context(torch.inference_mode(False))
        if any(getattr(module, "_compiled_call_impl", None) for module in session.model.modules()):
            # Compiled blocks do not call the hooks that activations are read by.
            modes.enter_context(torch.compiler.set_stance("force_eager"))
        modes.enter_context(evaluating(session.model))
        yield


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
