"""How neurons are attributed and chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastedit.config import MethodConfig, check, is_integer, is_number
from fastedit.trace.neurons_clean import Activation
from fastedit.trace.seq2seq_lanes import check_side

__all__ = ["Continuation", "Grid", "NeuronOptions", "Positions", "fractions"]

Grid = Literal["left", "right", "ends"]
Continuation = Literal["argmax", "answer", "fixed"]
Positions = Literal["answer", "all"]


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
        memory: bytes that an attribution may take above the model and its own result; ``None``: a part of what is
            free. It decides what runs together and changes no result beyond rounding. One prompt's clean run and one
            point of its path are taken whatever the budget.
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
    memory: int | None = None
    positions: Positions = "answer"
    decoder_prefix: str | None = None

    def __post_init__(self) -> None:
        layers, steps = self.layers, self.steps
        if layers is not None:
            ok = isinstance(layers, tuple) and len(layers) > 0
            check(
                ok and all(is_integer(i) and i >= 0 for i in layers),
                "layers",
                "be a non-empty list of integers >= 0, or None",
                layers,
            )
            check(len(set(layers)) == len(layers), "layers", "not repeat a layer", layers)
        check(is_integer(steps) and 1 <= steps <= 100_000, "steps", "be an integer from 1 to 100000", steps)
        choice = {
            "grid": Grid,
            "activation": Activation,
            "continuation": Continuation,
            "positions": Positions,
        }
        for name, choices in choice.items():
            value = getattr(self, name)
            ok = isinstance(value, str) and value in get_args(choices)
            check(ok, name, f"be one of {', '.join(get_args(choices))}", value)
        for name in ("adaptive_threshold", "p"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < 1, name, "be a number from 0 to 1, 1 excluded", value)
        check_side(None, "all", self.decoder_prefix)
        ok = self.memory is None or (is_integer(self.memory) and self.memory >= 1)
        check(ok, "memory", "be a number of bytes >= 1, or None", self.memory)


def fractions(steps: int, grid: Grid) -> tuple[float, ...]:
    """s_1 .. s_m."""
    if grid == "ends":
        return tuple(torch.linspace(0, 1, steps, dtype=torch.float64).tolist())
    first = 0 if grid == "left" else 1
    return tuple((k + first) / steps for k in range(steps))
