"""Inputs and output gradients of chosen linears, without weight gradients.

For a linear y = W x + b, the gradient of a loss in W is sum_t d_t x_t^T with d_t = dL/dy_t. Methods that transform the
gradient (MEND, KE) or solve with it (MALMEN, UltraEdit) need the factors, never the matrix:

    batch = TapBatch.of(rows)                                   # encoded requests; or ids, mask and labels of your own
    found = tap(arch, batch, ["transformer.h.10.mlp.c_proj", "transformer.h.11.mlp.c_proj"], tokens="labels")
    X, D = found["transformer.h.11.mlp.c_proj"].inputs, found["transformer.h.11.mlp.c_proj"].grads

What is skipped, exactly: weights require no gradient, so no product for them is formed and no input is kept for one;
the graph begins at the outputs of the lowest chosen linears, so the forward below records nothing and the backward
ends there; the forward ends after the last block, and logits exist at the label tokens only, a chunk of the vocabulary
at a time. Of the linears only the chosen tokens' rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch, find_module, is_transposed
from fastedit.engine.tap_batch import LabelRows, Places, Reduction, TapBatch
from fastedit.engine.tap_pass import Pass, encoder_of
from fastedit.forward import evaluating

__all__ = ["LabelRows", "Tap", "TapBatch", "Tapped", "tap"]

Tokens = Literal["all", "labels"]


@dataclass(frozen=True, eq=False)
class Tapped:
    """One linear at T tokens, ordered by row, then position.

    Attributes:
        inputs: X ``[T, in]``, what the module read.
        grads: D ``[T, out]``, the gradient of the total loss in what it returned.
        rows: ``[T]`` row of the batch of each token.
        positions: ``[T]`` its position in that row (of the source for modules of an encoder, and for the keys and
            values of a cross-attention).
    """

    inputs: Tensor
    grads: Tensor
    rows: Tensor
    positions: Tensor

    def active(self) -> Tensor:
        """``[T]`` True where neither x nor d is all zero: the tokens that add to the weight's gradient, as in MEND."""
        return (self.inputs != 0).any(1) & (self.grads != 0).any(1)

    def weight_gradient(self) -> Tensor:
        """``[out, in]`` sum_t d_t x_t^T over these tokens, in float32 (float64 if D is)."""
        dtype = torch.float64 if self.grads.dtype == torch.float64 else torch.float32
        return self.grads.to(dtype).T @ self.inputs.to(dtype)


@dataclass(frozen=True, eq=False)
class Tap:
    """What `tap` found; ``found["<module name>"]`` is a `Tapped`.

    Attributes:
        modules: by name, in the order asked for.
        losses: ``[B]`` loss of each request before its weight, float32 (float64 for float64 models).
        loss: the number that was differentiated, ``sum_b weights[b] losses[b]``.
    """

    modules: Mapping[str, Tapped]
    losses: Tensor
    loss: Tensor

    def __getitem__(self, name: str) -> Tapped:
        return self.modules[name]


def tap(
    arch: ResolvedArch,
    batch: TapBatch,
    modules: Sequence[str],
    *,
    tokens: Tokens | Tensor = "all",
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    loss: Callable[[LabelRows], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
) -> Tap:
    """Inputs X and output gradients D of linears inside blocks, at chosen tokens, for one batch of B requests.

    The loss is L = sum_b weights[b] L_b. Without ``loss``, L_b is the negative log-likelihood of the labels of row b,
    reduced over its label tokens. One forward and one backward; dropout is off, the model's weights, modes,
    requires_grad flags, ``.grad`` and hooks are afterwards as they were before, also after an exception.

    Args:
        arch: the resolved model; of an encoder-decoder model its decoder side.
        batch: tokens and labels.
        modules: dotted names of Linear or Conv1D modules inside blocks, of either side of an encoder-decoder model.
        tokens: which tokens to return: ``"all"`` real ones, those with ``"labels"``, or a bool mask ``[B, S]`` of the
            labels' shape. Source tokens of an encoder-decoder model have no label: of them always all real ones.
        weights: ``[B]`` factor of each request's loss; None: ones.
        reduction: L_b is the ``"mean"`` or ``"sum"`` over the row's label tokens, or, ``"batch_mean"``, the sum over
            them divided by the number of label tokens of the whole batch.
        loss: a loss of your own. Gets the `LabelRows` and returns ``[B]`` losses with a gradient in their ``hidden``.
        dtype: of X and D; None: as the model computes them.
        loss_scale: the loss is multiplied by it for the backward, and D divided by it in float32 before the cast to
            ``dtype``. A power of two changes no bit of D except that small gradients of float16 models survive.

    Returns:
        Tap: per module X ``[T, in]``, D ``[T, out]`` and where the T tokens are; the losses.

    Raises:
        ValueError: an unknown module name (near names are listed), a module that is no linear, lies outside the
            blocks, or is not run exactly once; shapes; padding on the left; a row without a label; a label outside
            the vocabulary; a loss of the wrong shape or without a gradient.

    Source: the factors of MEND (arXiv:2110.11309), KE (arXiv:2104.08164), MALMEN (arXiv:2311.04661) and UltraEdit
    (arXiv:2505.14679).
    """
    batch.check(arch)
    linears = _find(arch, modules)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: must be a floating point type or None, got {dtype}")
    if not loss_scale > 0:
        raise ValueError(f"loss_scale: must be > 0, got {loss_scale}")
    if weights is not None and not (isinstance(weights, Tensor) and weights.shape == (batch.requests,)):
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights: must be a tensor of shape [{batch.requests}], got {got}")
    batch = batch.with_decoder(arch)
    run = Pass(arch, batch, _chosen(batch, tokens), dtype, loss_scale)
    with evaluating(arch.model), torch.inference_mode(False), torch.enable_grad():
        rows = run.forward(linears)
        losses = rows.reduce(rows.nll(), reduction) if loss is None else loss(rows)
        total = _total(losses, weights, batch.requests)
        run.backward(linears, total)
    found = {}
    for name in linears:
        X, D = run.inputs[name], run.grads[name]
        found[name] = Tapped(X, D, *run.places[name].on(X.device))
    return Tap(found, losses.detach(), total.detach())


def _find(arch: ResolvedArch, names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(names, str) or not names:
        raise ValueError(f"modules: must be a list of one or more module names, got {names!r}")
    roots = [arch.block(i) for i in range(arch.depth)]
    if (encoder := encoder_of(arch)) is not None:
        roots.append(encoder)
    inside = {id(module) for root in roots for module in root.modules()}
    linears: dict[str, nn.Module] = {}
    for name in names:
        try:
            module = find_module(arch.model, name)
        except ValueError:
            known = [n for n, m in arch.model.named_modules() if id(m) in inside and _is_linear(m)]
            near = ", ".join(get_close_matches(name, known, n=3, cutoff=0.4)) or ", ".join(known[-3:])
            raise ValueError(
                f"modules: {type(arch.model).__name__} has no module {name!r}; near names: {near}"
            ) from None
        if not _is_linear(module):
            raise ValueError(f"modules: {name!r} must be a Linear or a Conv1D, is a {type(module).__name__}")
        if id(module) not in inside:
            raise ValueError(
                f"modules: {name!r} must lie inside a block, as {arch.name('mlp_out', 0)!r} does"
            )
        if name in linears:
            raise ValueError(f"modules: {name!r} is named twice")
        linears[name] = module
    return linears


def _is_linear(module: nn.Module) -> bool:
    try:
        is_transposed(module)
    except NotImplementedError:
        return False
    return True


def _total(losses: Tensor, weights: Tensor | None, requests: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (requests,):
        what = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss: must return one loss per request, shape [{requests}], got {what}")
    if not losses.requires_grad:
        raise ValueError(
            "loss: must return losses with a gradient in the label rows' hidden states, got none"
        )
    if weights is None:
        return losses.sum()
    if weights.shape != (requests,):
        raise ValueError(f"weights: must have shape [{requests}], got {list(weights.shape)}")
    return (losses * weights.to(losses)).sum()


def _chosen(batch: TapBatch, tokens: Tokens | Tensor) -> Places:
    """The tokens to return, of those on the side of the labels."""
    real = batch.label_side.bool()
    if not isinstance(tokens, Tensor):
        if tokens not in get_args(Tokens):
            raise ValueError(
                f"tokens: must be a bool mask or one of {', '.join(get_args(Tokens))}, got {tokens!r}"
            )
        return Places.of(real if tokens == "all" else batch.labels >= 0)
    if tokens.shape != real.shape or tokens.dtype != torch.bool:
        raise ValueError(
            f"tokens: must be bool of shape {list(real.shape)}, got {tokens.dtype} {list(tokens.shape)}"
        )
    if (padding := tokens & ~real.to(tokens.device)).any():
        row, position = padding.nonzero()[0].tolist()
        raise ValueError(
            f"tokens: must choose tokens only, chooses padding in row {row} at position {position}"
        )
    return Places.of(tokens)
