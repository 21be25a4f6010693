"""A solve in progress: the model may be changed inside, and is bit-identical afterwards, whatever happens."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor

from fastedit.arch import ResolvedArch, editable_weight, is_transposed
from fastedit.config import MethodConfig
from fastedit.edit import Delta, Edit, fingerprint
from fastedit.engine.replay import evaluating
from fastedit.engine.target import Targets
from fastedit.ops.rank_update import rank_update_
from fastedit.request import EditRequest
from fastedit.session import Session

__all__ = ["Trial", "causal_decoder", "finite", "injected", "loss_report"]


class Trial:
    """Context in which a method writes trial updates into the session's model.

    Originals are copied when a weight is first touched and put back on exit, also on an exception; dropout is
    off inside. ``info`` collects what goes into the Edit's provenance.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.seconds: dict[str, float] = {}
        self._saved: dict[int, Tensor] = {}
        self._evaluating = evaluating(session.model)
        self._generator_state = session.generator.get_state()
        self._templates = dict(session.templates)
        self._started = 0.0

    def __enter__(self) -> Trial:
        self._started = time.perf_counter()
        self._modes = ExitStack()
        # Inference tensors cannot be differentiated: the caller's mode must not reach the solve.
        self._modes.enter_context(torch.inference_mode(False))
        if any(getattr(module, "_compiled_call_impl", None) for module in self.session.model.modules()):
            # Compiled blocks do not call the hooks that the engines read them by.
            self._modes.enter_context(torch.compiler.set_stance("force_eager"))
        self._evaluating.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.no_grad():
            for layer, original in self._saved.items():
                self._weight(layer).copy_(original)
        self._saved.clear()
        self._evaluating.__exit__(kind, error, trace)
        self._modes.close()
        if kind is not None:
            # A failed solve must not change what the next one draws.
            self.session.generator.set_state(self._generator_state)
            self.session.templates = self._templates
        self.seconds["solve"] = time.perf_counter() - self._started

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to ``seconds[phase]``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def _weight(self, layer: int) -> Tensor:
        weight: Tensor = self.session.arch.mlp_out(layer).weight  # type: ignore[assignment]
        return weight

    def add(self, layer: int, left: Tensor, right: Tensor) -> None:
        """Add ``left [d, n] @ right [n, f]`` to the edited matrix of ``layer`` until the trial ends."""
        weight = self._weight(layer)
        with torch.no_grad():
            if layer not in self._saved:
                self._saved[layer] = weight.detach().clone()
            rank_update_(weight.data, left, right, transposed=is_transposed(self.session.arch.mlp_out(layer)))

    def templates(
        self, draw: Callable[..., tuple[Any, ...]], lengths: Sequence[tuple[int, int]]
    ) -> tuple[Any, ...]:
        """Context templates of this specification: drawn once per session, from its generator."""
        key = (draw.__name__, tuple(lengths))
        if key not in self.session.templates:
            self.session.templates[key] = draw(
                self.session.model, self.session.tokenizer, lengths, self.session.generator
            )
        return self.session.templates[key]

    def edit(
        self,
        method: str,
        config: MethodConfig,
        requests: Sequence[EditRequest],
        deltas: Sequence[Delta],
        info: dict[str, Any],
    ) -> Edit:
        """The finished Edit, with its provenance. Call it after the trial has ended: it reads the originals."""
        if self._saved:
            raise RuntimeError("edit must be built after the trial has ended")
        return Edit(
            method=method,
            config=config.to_dict(),
            requests=tuple(request.to_dict() for request in requests),
            deltas=tuple(deltas),
            base={
                delta.name: fingerprint(editable_weight(self.session.model, delta.name)[0])
                for delta in deltas
            },
            info={
                **info,
                "seconds": dict(self.seconds),
                "seed": self.session.seed,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
        )


def causal_decoder(session: Session, method: str, layers: Sequence[int]) -> ResolvedArch:
    """The session's architecture, if the method's causality argument holds for it and `layers` can be edited.

    Raises:
        ValueError: an encoder or an encoder-decoder, or no such layer.
        NotImplementedError: quantised, packed, sharded or offloaded weights.
    """
    arch = session.arch
    if arch.row.model_type in ("t5", "bert"):
        raise ValueError(
            f"model: {method} is defined for causal decoders, got model_type={arch.row.model_type!r}"
        )
    for layer in layers:
        arch.check_layer(layer)
        editable_weight(session.model, arch.name("mlp_out", layer))
    return arch


def injected(targets: Tensor | None, requests: int, width: int) -> Tensor | None:
    """Check targets given by the caller: ``[requests, width]``, finite."""
    if targets is None:
        return None
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be a float tensor, got {kind}")
    if tuple(targets.shape) != (requests, width):
        raise ValueError(f"targets must have shape {(requests, width)}, got {tuple(targets.shape)}")
    if not bool(torch.isfinite(targets).all()):
        raise ValueError("targets must be finite, got NaN or infinity")
    return targets


def finite(what: str, *factors: Tensor) -> None:
    """Stop before a broken update reaches the model."""
    for factor in factors:
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"{what}: the update is not finite, the model is unchanged")


def loss_report(targets: Targets, requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    """Per request: steps, first and last loss, the target's probability and the size of delta."""
    names = ("total", "nll", "kl", "weight_decay", "probability")
    ratio = (targets.delta.norm(dim=1) / targets.init.norm(dim=1)).tolist()
    return [
        {
            "id": request.id,
            "steps": len(rows),
            "first": dict(zip(names, rows[0], strict=True)),
            "last": dict(zip(names, rows[-1], strict=True)),
            "delta_norm_ratio": ratio[index],
        }
        for index, (request, rows) in enumerate(zip(requests, targets.losses, strict=True))
    ]
