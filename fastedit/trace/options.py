"""What a causal trace is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastedit.config import MethodConfig, is_integer
from fastedit.trace.lanes import KINDS, SEVERED
from fastedit.trace.noise import Noise
from fastedit.trace.seq2seq_lanes import CROSS, check_side

__all__ = ["TraceOptions"]

Tokens = Literal["all", "subject_last"]
Side = Literal["encoder", "decoder"]


@dataclass(frozen=True, kw_only=True)
class TraceOptions(MethodConfig):
    """What is traced.

    Attributes:
        kinds: what a cell restores: ``"hidden"`` (a block's output), ``"mlp"``, ``"attn"`` (what the module adds, in a
            window of layers); ``"severed_mlp"`` and ``"severed_attn"`` restore a block's output while what that module
            adds at the token above it stays corrupted.
        window: layers that a cell of ``"mlp"`` or ``"attn"`` restores.
        tokens: ``"all"``, or ``"subject_last"``: the subject's last token only.
        noise: how the subject is corrupted.
        side: of an encoder-decoder, whose states are restored: ``"encoder"`` (``None`` is that) or ``"decoder"``, which
            reads the corrupted encoder and has the kinds ``"cross"`` and ``"severed_cross"``, too; see
            `fastedit.trace.seq2seq`. ``None`` for other models.
        decoder_prefix: of an encoder-decoder, text that the decoder has behind its start token and before the answer,
            such as ``"<extra_id_0>"``.
        memory: bytes that the sweep may take above the model; ``None``: a part of what is free. It decides how many
            cells run together, not what they give. At least one sample of one cell runs.

    Raises:
        ValueError: a value that breaks its rule, with the field's name.
    """

    kinds: tuple[str, ...] = KINDS
    window: int = 10
    tokens: Tokens = "all"
    noise: Noise = field(default_factory=Noise)
    memory: int | None = None
    side: Side | None = None
    decoder_prefix: str | None = None

    def __post_init__(self) -> None:
        known = (*KINDS, *SEVERED, *(CROSS if self.side == "decoder" else ()))
        if not isinstance(self.kinds, (tuple, list)) or not self.kinds:
            raise ValueError(f"kinds must be one or more of {', '.join(known)}, got {self.kinds!r}")
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for kind in self.kinds:
            if kind not in known:
                raise ValueError(f"kinds must be of {', '.join(known)}, got {kind!r}")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be distinct, got {', '.join(self.kinds)}")
        if not is_integer(self.window) or self.window < 1:
            raise ValueError(f"window must be an integer of at least 1, got {self.window!r}")
        if self.tokens not in ("all", "subject_last"):
            raise ValueError(f"tokens must be 'all' or 'subject_last', got {self.tokens!r}")
        check_side(self.side, self.tokens, self.decoder_prefix)
        if not isinstance(self.noise, Noise):
            raise ValueError(f"noise must be a Noise, got {self.noise!r}")
        if self.memory is not None and not (is_integer(self.memory) and self.memory >= 1):
            raise ValueError(f"memory must be an integer of at least 1 (bytes) or None, got {self.memory!r}")
