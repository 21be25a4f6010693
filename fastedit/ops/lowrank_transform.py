"""The editor network of MEND and MALMEN: normalised gradient factors through residual low-rank layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, Slower, _forced, backend, define_op

__all__ = ["LowRankLayer", "LowRankNet", "lowrank_transform"]

_PARTS = ("V", "U", "bias", "scale", "shift")


@dataclass(frozen=True)
class LowRankLayer:
    """One residual layer over rows of width d = d_x + d_d, with a scale and a shift for each of L modules.

    V: [r, d]; U: [d, r]; bias: [d]; scale, shift: [L, d]. All float32 or all float64, any strides. A checkpoint of
    MEND has them as v, u, bias, mode_scale and mode_shift; MALMEN as A transposed, B transposed, bias, scale, shift.
    """

    V: Tensor
    U: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class LowRankNet:
    """Layers in order, and where the clamp stands: before scale and shift (MALMEN) or after them (MEND)."""

    layers: Sequence[LowRankLayer]
    clamp_first: bool = False


def lowrank_transform(
    X: Tensor,
    D: Tensor,
    net: LowRankNet,
    stats: tuple[Tensor, Tensor] | None,
    *,
    mode: Tensor | None = None,
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """Rows [x | d] normalised, through the net's layers, and split again; the rows of all modules of a shape at once.

    z_0 = ([x | d] - mean) / (std + eps), then for each layer, with a = U (V z) + bias and l the row's module,
    z' = z + max(scale_l a + shift_l, 0), or z + scale_l max(a, 0) + shift_l where the net clamps first;
    [x~ | d~] = z at the end. As in torch, the gradient passes where the clamped number is exactly 0.

    X: [n, d_x] and D: [n, d_d], inputs of a linear layer and gradients of its outputs, n >= 0, any float dtypes and
    strides.
    stats: (mean, std), each [d] or, one per module, [L, d] (`row_moments_`; constants here); None: no normalising.
    mode: [n] int64 in [0, L), the module of each row; None: module 0. eps: 1e-7 in MEND, 1.1920929e-07 in MALMEN. A net
    without layers only normalises (UltraEdit).
    Returns (x~ [n, d_x], d~ [n, d_d]) in the net's dtype, float32 or float64, which is that of all arithmetic (without
    layers: float64 if X or D is, else float32).
    Differentiable in X, D and all tensors of the net. Raises ValueError for wrong shapes, dtypes and devices; module
    numbers are checked where that needs no synchronisation, on the CPU.

        net = LowRankNet([LowRankLayer(V, U, bias, scale, shift), LowRankLayer(...)])
        x, d = lowrank_transform(X, D, net, (state.mean, state.std()), mode=mode)

    Source: the editor networks of MEND (arXiv:2110.11309, section 3) and MALMEN (arXiv:2311.04661).
    """
    _check(X, D, net, stats, mode, eps)
    arguments = _arguments(X, D, net, stats, mode, eps)
    z = _op(*arguments)[0]
    return z[:, : X.shape[1]], z[:, X.shape[1] :]


def _arguments(
    X: Tensor,
    D: Tensor,
    net: LowRankNet,
    stats: tuple[Tensor, Tensor] | None,
    mode: Tensor | None = None,
    eps: float = 1e-7,
) -> tuple[Any, ...]:
    """The public function's arguments as the op's schema has them."""
    layers = net.layers
    lists = tuple([getattr(layer, name) for layer in layers] for name in _PARTS)
    mean, std = (
        (None, None) if stats is None else (t.detach()[None] if t.ndim == 1 else t.detach() for t in stats)
    )
    needs = torch.is_grad_enabled() and any(t.requires_grad for part in ([X, D], *lists) for t in part)
    return X, D, mean, std, *lists, mode, float(eps), net.clamp_first, needs


def _check(
    X: Tensor,
    D: Tensor,
    net: LowRankNet,
    stats: tuple[Tensor, Tensor] | None,
    mode: Tensor | None,
    eps: float,
) -> None:
    for name, tensor in (("X", X), ("D", D)):
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float matrix, got {tensor.dtype} {list(tensor.shape)}")
    n, d = X.shape[0], X.shape[1] + D.shape[1]
    if D.shape[0] != n:
        raise ValueError(f"D must have X's {n} rows, got {D.shape[0]}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    dtype = _dtype(X, D, [layer.V for layer in net.layers])
    modules = net.layers[0].scale.shape[0] if net.layers else None
    tensors: dict[str, Tensor | None] = {"D": D, "mode": mode}
    for index, layer in enumerate(net.layers):
        rank = layer.V.shape[0] if layer.V.ndim else 0
        shapes = {"V": (rank, d), "U": (d, rank), "bias": (d,), "scale": (modules, d), "shift": (modules, d)}
        for name, shape in shapes.items():
            tensor, path = getattr(layer, name), f"net.layers[{index}].{name}"
            tensors[path] = tensor
            if tensor.shape != shape:
                raise ValueError(f"{path} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != dtype or dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{path} must be float32 or float64 like all of the net, got {tensor.dtype}")
    if stats is not None:
        for name, tensor in zip(("mean", "std"), stats):
            tensors[f"stats {name}"] = tensor
            if tensor.shape != stats[0].shape or tensor.shape[-1:] != (d,) or tensor.ndim > 2:
                raise ValueError(f"stats {name} must have shape [{d}] or [L, {d}], got {list(tensor.shape)}")
            if not tensor.is_floating_point():
                raise ValueError(f"stats {name} must be float, got {tensor.dtype}")
        if stats[0].ndim == 2 and modules not in (None, stats[0].shape[0]):
            raise ValueError(
                f"stats must have one row for each of the net's {modules} modules, got {stats[0].shape[0]}"
            )
        if stats[0].ndim == 2 and modules is None:
            modules = stats[0].shape[0]
    for name, other in tensors.items():
        if other is not None and other.device != X.device:
            raise ValueError(f"{name} must be on X's device {X.device}, got {other.device}")
    _check_mode(mode, n, modules)


def _check_mode(mode: Tensor | None, n: int, modules: int | None) -> None:
    if mode is None:
        if modules == 0 and n:
            raise ValueError("net must have at least one module, got scales of shape [0, d]")
        return
    if mode.shape != (n,) or mode.dtype != torch.int64:
        raise ValueError(f"mode must be int64 of shape [{n}], got {mode.dtype} {list(mode.shape)}")
    if mode.device.type == "cpu" and n and modules is not None:
        low, high = (int(end) for end in torch.aminmax(mode))
        if low < 0 or high >= modules:
            raise ValueError(f"mode must be in [0, {modules}), got {low if low < 0 else high}")


def _dtype(X: Tensor, D: Tensor, V: Sequence[Tensor]) -> torch.dtype:
    """Of the result and of all arithmetic."""
    if len(V):
        return V[0].dtype
    return torch.float64 if torch.float64 in (X.dtype, D.dtype) else torch.float32


def _of_mode(rows: Tensor, mode: Tensor | None) -> Tensor:
    """The row of a per-module table that each row of the batch takes; a table of one row serves all."""
    if rows.shape[0] == 1 or mode is None:
        return rows[:1]
    return rows[mode]


def _eager(
    X: Tensor,
    D: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    bias: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [n, d] and, with_grad, of each of the k layers its input Z [k, n, d], A [k, n, d] = U (V z) + bias and V z,
    side by side [n, sum of ranks]; empty otherwise."""
    dtype = _dtype(X, D, V)
    z, Z, A, H = _fake(X, D, mean, std, V, U, bias, scale, shift, mode, eps, clamp_first, with_grad)
    z[:, : X.shape[1]] = X
    z[:, X.shape[1] :] = D
    if mean is not None and std is not None:
        # In place: a fresh matrix costs more in pages than in arithmetic.
        z.sub_(_of_mode(mean.to(dtype), mode)).div_(_of_mode(std.to(dtype) + eps, mode))
    column = 0
    for index, (v, u) in enumerate(zip(V, U)):
        hidden = z @ v.mT
        a = torch.addmm(bias[index], hidden, u.mT)
        if with_grad:
            Z[index], A[index] = z, a
            H[:, column : column + v.shape[0]] = hidden
            column += v.shape[0]
        s, h = _of_mode(scale[index], mode), _of_mode(shift[index], mode)
        if clamp_first:
            z.addcmul_(a.clamp_(min=0), s).add_(h)
        else:
            z.add_(a.mul_(s).add_(h).clamp_(min=0))
    return z, Z, A, H


def _fake(
    X: Tensor,
    D: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    bias: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d, dtype = X.shape[0], X.shape[1] + D.shape[1], _dtype(X, D, V)
    k, ranks = (len(V), sum(v.shape[0] for v in V)) if with_grad else (0, 0)
    shapes = ((n, d), (k, n, d), (k, n, d), (n, ranks))
    z, Z, A, H = (X.new_empty(shape, dtype=dtype) for shape in shapes)
    return z, Z, A, H


# csrc/cpu/lowrank_transform.h: RowType
_ROW_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _run_cpu(
    native: Callable[..., Any],
    X: Tensor,
    D: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    bias: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, Z, A, H = _fake(X, D, mean, std, V, U, bias, scale, shift, mode, eps, clamp_first, with_grad)
    n, d = z.shape
    hidden = H if with_grad else z.new_empty(n, max((v.shape[0] for v in V), default=0))
    a = A if with_grad else z.new_empty(1, n, d)
    kept: list[Tensor] = []  # what the kernel reads must live until it returns

    def address(tensor: Tensor) -> int:
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    def matrix(tensor: Tensor) -> tuple[int, int]:
        """Address and row stride of a matrix whose rows are runs of memory."""
        kept.append(tensor if tensor.stride(1) == 1 else tensor.contiguous())
        return kept[-1].data_ptr(), kept[-1].stride(0)

    layers, column = [], 0
    for index, (v, u) in enumerate(zip(V, U)):
        rank = v.shape[0]
        tables = [address(table[index]) for table in (bias, scale, shift)]
        copy, of = (Z[index].data_ptr(), a[index]) if with_grad else (0, a[0])
        out = (copy, of.data_ptr(), hidden[:, column:].data_ptr(), hidden.stride(0))
        layers.append((*matrix(v), *matrix(u), rank, *tables, *out))
        column += rank if with_grad else 0
    parts = []
    for part in (X, D):
        start, stride = matrix(part)
        parts.append((start, _ROW_CODES[part.dtype], stride, part.shape[1]))
    moments = [0, 0]
    # The kernel takes row mode[i] of every table: a mean for all is repeated where there is more than one module.
    modules = scale[0].shape[0] if len(scale) else 1 if mean is None else mean.shape[0]
    if mean is not None and std is not None:
        tables32 = (mean.to(torch.float32), std.to(torch.float32) + eps)
        moments = [address(table.expand(modules, d)) for table in tables32]
    native(
        *parts,
        *moments,
        mode=0 if mode is None or modules == 1 else address(mode),
        z=z.data_ptr(),
        n=n,
        layers=layers,
        clamp_first=clamp_first,
        threads=torch.get_num_threads(),
    )
    return z, Z, A, H


def _refuse_cpu(
    X: Tensor,
    D: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    *_rest: Any,
) -> str | None:
    dtype = _dtype(X, D, V)
    if X.shape[1] + D.shape[1] == 0:
        return "the rows have no entries: there is nothing to compute"
    if dtype != torch.float32:
        return f"the kernel computes in float32, the net is {dtype}"
    for name, part in (("X", X), ("D", D)):
        if part.dtype not in _ROW_CODES:
            return f"{name} must be float32, bfloat16 or float16, got {part.dtype}"
    if len(V) == 0:
        return None
    if any(part.stride(1) != 1 for part in (*V, *U)):
        return Slower("V or U is stored transposed: torch's product takes it as it lies")
    from fastedit import _cpu  # it is there: a missing module is refused before

    if _cpu.info()["isa"] != "amx":
        return Slower("without AMX tiles torch's products are at the limit of the machine")
    return None


_Lists: TypeAlias = Sequence[Tensor]
_Gradients: TypeAlias = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
# (dz, a, scale, shift, mode, clamp_first, dbias, dscale, dshift) -> da: the way back through a layer's last step.
_Residual: TypeAlias = Callable[..., Tensor]


def _eager_backward(
    grad: Tensor,
    Z: Tensor,
    A: Tensor,
    H: Tensor,
    std: Tensor | None,
    V: _Lists,
    U: _Lists,
    scale: _Lists,
    shift: _Lists,
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    need_rows: bool,
    *,
    residual: _Residual | None = None,
) -> _Gradients:
    """Gradients in the rows [x | d] (empty unless need_rows), then per layer in V, U, bias, scale and shift."""
    found = _fake_backward(grad, Z, A, H, std, V, U, scale, shift, mode, eps, clamp_first, need_rows)
    rows, dV, dU, dbias, dscale, dshift = found
    dz = grad.clone(memory_format=torch.contiguous_format)
    column = H.shape[1]
    for index in reversed(range(len(V))):
        column -= V[index].shape[0]
        hidden = H[:, column : column + V[index].shape[0]]
        tables = (scale[index], shift[index], mode, clamp_first, dbias[index], dscale[index], dshift[index])
        da = (residual or _residual_backward)(dz, A[index], *tables)
        torch.mm(da.mT, hidden, out=dU[index])
        dh = da @ U[index]
        torch.mm(dh.mT, Z[index], out=dV[index])
        if index or need_rows:
            dz.addmm_(dh, V[index])
    if need_rows:
        rows.copy_(dz if std is None else dz / _of_mode(std.to(dz.dtype) + eps, mode))
    return found


def _residual_backward(
    dz: Tensor,
    a: Tensor,
    scale: Tensor,
    shift: Tensor,
    mode: Tensor | None,
    clamp_first: bool,
    dbias: Tensor,
    dscale: Tensor,
    dshift: Tensor,
) -> Tensor:
    """da [n, d], and dbias [d], dscale and dshift [L, d] filled."""
    s = _of_mode(scale, mode)
    # where, not a product with the mask: a NaN that the clamp cut off must not come back.
    if clamp_first:
        _sum_by_mode(dscale, dz * a.clamp(min=0), mode)
        _sum_by_mode(dshift, dz, mode)
        da = torch.where(a >= 0, dz * s, 0.0)
    else:
        dq = torch.where(a * s + _of_mode(shift, mode) >= 0, dz, 0.0)
        _sum_by_mode(dscale, torch.where(dq == 0, 0.0, dq * a), mode)
        _sum_by_mode(dshift, dq, mode)
        da = dq * s
    torch.sum(da, 0, out=dbias)
    return da


def _run_cpu_backward(native: Callable[..., Any], *args: Any) -> _Gradients:
    """The products stay torch's; the pass over the rows between them is one."""

    def residual(
        dz: Tensor,
        a: Tensor,
        scale: Tensor,
        shift: Tensor,
        mode: Tensor | None,
        clamp_first: bool,
        dbias: Tensor,
        dscale: Tensor,
        dshift: Tensor,
    ) -> Tensor:
        da, of = torch.empty_like(dz), None if mode is None else mode.contiguous()
        scale, shift, a = scale.contiguous(), shift.contiguous(), a.contiguous()
        tensors = {"dz": dz, "a": a, "scale": scale, "shift": shift, "da": da}
        tensors |= {"dbias": dbias, "dscale": dscale, "dshift": dshift}
        native(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            mode=0 if of is None else of.data_ptr(),
            n=dz.shape[0],
            d=dz.shape[1],
            modules=scale.shape[0],
            clamp_first=clamp_first,
            threads=torch.get_num_threads(),
        )
        return da

    return _eager_backward(*args, residual=residual)


def _refuse_cpu_backward(grad: Tensor, *_rest: Any) -> str | None:
    return None if grad.dtype == torch.float32 else f"the kernel computes in float32, the net is {grad.dtype}"


def _sum_by_mode(out: Tensor, rows: Tensor, mode: Tensor | None) -> None:
    """out [L, d] = the sums of the rows of each module."""
    out.zero_()
    if mode is None or out.shape[0] == 1:
        out[0] = rows.sum(0)
    else:
        out.index_add_(0, mode, rows)


def _fake_backward(
    grad: Tensor,
    Z: Tensor,
    A: Tensor,
    H: Tensor,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    need_rows: bool,
) -> _Gradients:
    new = grad.new_empty
    return (
        new(grad.shape if need_rows else (0, grad.shape[1])),
        [new(v.shape) for v in V],
        [new(u.shape) for u in U],
        [new((u.shape[0],)) for u in U],
        [new(s.shape) for s in scale],
        [new(s.shape) for s in shift],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    X, D, _mean, std, V, U, _bias, scale, shift, mode, eps, clamp_first, with_grad = inputs
    if not with_grad:
        raise RuntimeError("lowrank_transform was called without with_grad, so it has no gradient to give")
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], std, mode, *V, *U, *scale, *shift)
    ctx.layers, ctx.eps, ctx.clamp_first = len(V), eps, clamp_first
    ctx.rows = [(part.shape[1], part.dtype, part.requires_grad) for part in (X, D)]
    ctx.forced = _forced()


def _backward(ctx: Any, grad: Tensor, *_states: Tensor) -> tuple[Any, ...]:
    Z, A, H, std, mode, *rest = ctx.saved_tensors
    V, U, scale, shift = (rest[i * ctx.layers : (i + 1) * ctx.layers] for i in range(4))
    (width, _, _), _ = ctx.rows
    need_rows = any(needed for _, _, needed in ctx.rows)
    # On a GPU autograd calls this from a thread of its own, where a backend forced around the forward is unknown.
    with nullcontext() if ctx.forced is None else backend(ctx.forced):
        drows, dV, dU, dbias, dscale, dshift = _backward_op(
            grad, Z, A, H, std, V, U, scale, shift, mode, ctx.eps, ctx.clamp_first, need_rows
        )
    dX, dD = (
        part.to(dtype) if needed else None
        for part, (_, dtype, needed) in zip((drows[:, :width], drows[:, width:]), ctx.rows)
    )
    return dX, dD, None, None, dV, dU, dbias, dscale, dshift, None, None, None, None


def _refuse_triton(*arguments: Any) -> str | None:
    """Any strides and dtypes: each pass replaces several of the eager default's."""
    return None


_KERNELS = "fastedit.kernels.lowrank_transform:lowrank_transform"
_NET = "Tensor[] V, Tensor[] U"

_backward_op = define_op(
    "lowrank_transform_backward",
    f"(Tensor grad, Tensor Z, Tensor A, Tensor H, Tensor? std, {_NET}, Tensor[] scale, Tensor[] shift, Tensor? mode, "
    "float eps, bool clamp_first, bool need_rows) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    _fake_backward,
    _eager_backward,
    [
        Impl("triton", "cuda", f"{_KERNELS}_backward", _refuse_triton),
        Impl(
            "cpu", "cpu", "fastedit._cpu:lowrank_residual_backward", _refuse_cpu_backward, _run_cpu_backward
        ),
    ],
)
_op = define_op(
    "lowrank_transform",
    f"(Tensor X, Tensor D, Tensor? mean, Tensor? std, {_NET}, Tensor[] bias, Tensor[] scale, Tensor[] shift, "
    "Tensor? mode, float eps, bool clamp_first, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", _KERNELS, _refuse_triton),
        Impl("cpu", "cpu", "fastedit._cpu:lowrank_transform", _refuse_cpu, _run_cpu),
    ],
    autograd=(_backward, _setup),
    bind=_arguments,
)
