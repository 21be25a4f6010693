"""The forward and the backward of a tap, and its hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, block_output
from fastedit.engine.tap_batch import LabelRows, Places, TapBatch
from fastedit.forward import StopForward

__all__ = ["Pass", "encoder_of"]


def encoder_of(arch: ResolvedArch) -> nn.Module | None:
    """The encoder of an encoder-decoder model, else None."""
    model: Any = arch.model
    decoder = getattr(model.config, "is_encoder_decoder", False)
    encoder: nn.Module | None = model.get_encoder() if decoder else None
    return encoder


class _Mark(torch.autograd.Function):
    """The identity, whose backward hands the gradient to ``keep``.

    The anchor, an empty leaf, makes the output need a gradient where nothing below does: there the graph begins. A
    copy is returned because some blocks add to a linear's output in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        ctx.keep = keep
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        ctx.keep(grad)
        return grad if ctx.needs_input_grad[0] else None, grad.new_empty(0), None


class Pass:
    """One forward and backward, and what the hooks found."""

    def __init__(
        self, arch: ResolvedArch, batch: TapBatch, target: Places, dtype: torch.dtype | None, scale: float
    ) -> None:
        self._arch, self._batch, self._dtype, self._scale = arch, batch, dtype, scale
        encoder = encoder_of(arch)
        self._encoder = encoder
        self._in_encoder = set() if encoder is None else {id(module) for module in encoder.modules()}
        self._encoded: Tensor | None = None
        self._target = target
        self._source = target if encoder is None else Places.of(batch.mask.bool())
        self._final: list[Tensor] = []
        self._anchors: list[Tensor] = []
        self.places: dict[str, Places] = {}
        self.inputs: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    def forward(self, linears: Mapping[str, nn.Module]) -> LabelRows:
        """Run the model to its last block; the label tokens' rows, with a graph down to the lowest linears."""
        arch, batch = self._arch, self._batch
        device: torch.device = arch.embed.weight.device  # type: ignore[assignment,union-attr]
        inputs: dict[str, Any] = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
        if batch.decoder_ids is not None and batch.decoder_mask is not None:
            inputs["decoder_input_ids"] = batch.decoder_ids.to(device)
            inputs["decoder_attention_mask"] = batch.decoder_mask.to(device)
        if arch.row.side == "decoder":
            inputs["use_cache"] = False
        handles = [module.register_forward_hook(self._hook(name)) for name, module in linears.items()]
        if self._encoder is not None:
            handles.append(self._encoder.register_forward_hook(self._remember_encoded))
        handles.append(arch.block(arch.depth - 1).register_forward_hook(self._end))
        try:
            arch.model(**inputs)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self._encoded = None
        for name in linears:
            if name not in self.inputs:
                raise ValueError(f"modules: {name!r} is not run in a forward of {type(arch.model).__name__}")
        return self._label_rows(self._final.pop())

    def backward(self, linears: Mapping[str, nn.Module], total: Tensor) -> None:
        """Gradients of ``total`` in the linears' outputs; no tensor accumulates one."""
        torch.autograd.grad(total * self._scale, self._anchors, allow_unused=True)
        for name in linears:
            if name not in self.grads:
                raise ValueError(f"modules: {name!r} has no gradient, for the loss does not depend on it")

    def _label_rows(self, final: Tensor) -> LabelRows:
        arch, labels = self._arch, self._batch.labels
        device: torch.device = arch.head.weight.device  # type: ignore[assignment,union-attr]
        rows, positions = (labels >= 0).nonzero(as_tuple=True)
        hidden = arch.head_input(final[rows.to(final.device), positions.to(final.device)]).to(device)
        return LabelRows(
            hidden=hidden,
            labels=labels[rows, positions].to(device),
            rows=rows.to(device),
            positions=positions.to(device),
            requests=self._batch.requests,
            arch=arch,
        )

    def _end(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._final.append(block_output(output))
        raise StopForward

    def _remember_encoded(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._encoded = output[0]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if name in self.inputs:
                raise ValueError(
                    f"modules: {name!r} is run more than once in a forward, so no token has one input"
                )
            places = self._source if self._reads_source(module, x) else self._target
            if x.numel() != places.shape[0] * places.shape[1] * x.shape[-1]:
                raise ValueError(
                    f"modules: {name!r} reads {list(x.shape)}, which is not one vector per token"
                )
            self.places[name] = places
            self.inputs[name] = places.take(x).to(self._dtype or x.dtype)
            self._anchors.append(torch.zeros(0, dtype=output.dtype, device=output.device, requires_grad=True))
            return _Mark.apply(output, self._anchors[-1], self._keeper(name, places))

        return hook

    def _keeper(self, name: str, places: Places) -> Callable[[Tensor], None]:
        def keep(grad: Tensor) -> None:
            D = places.take(grad)
            if self._scale != 1.0:
                D = D.to(torch.promote_types(D.dtype, torch.float32)) / self._scale
            self.grads[name] = D.to(self._dtype or grad.dtype)

        return keep

    def _reads_source(self, module: nn.Module, x: Tensor) -> bool:
        # The keys and values of a cross-attention are modules of the decoder, but read what the encoder returned.
        crossing = self._encoded is not None and x.data_ptr() == self._encoded.data_ptr()
        return crossing or id(module) in self._in_encoder
