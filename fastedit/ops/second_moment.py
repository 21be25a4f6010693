"""Second moments of keys, summed over tokens: C += K^T diag(m) K.

This is the covariance statistic of ROME (arXiv:2202.05262, eq. 15) and MEMIT (arXiv:2210.07229, eq. 15). The result is
symmetric, so only the lower triangle is computed; `mirror_` fills the upper one once, at the end of a collection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, Slower, define_op
from fastedit.ops._named import check_tensors
from fastedit.ops._written import check_written

__all__ = ["mirror_", "second_moment_"]

KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASTER_DTYPES = (torch.float32, torch.float64)

Precision = Literal["default", "exact"]

# Tokens summed in fp32 before the sum goes to C: longer chains lose digits on the diagonal, a sum of positive terms.
FLUSH_TOKENS = 1024
_PANEL = 512


def second_moment_(
    C: Tensor | Sequence[Tensor],
    K: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    precision: Precision = "default",
) -> None:
    """C += K^T diag(mask) K on and below the diagonal of C; what lies above it is left as it was.

    C: [d, d], [L, d, d] or a sequence of L matrices [d, d]; fp64 (the default choice) or fp32, changed in place.
    K: [T, d] or [B, S, d] for one matrix, [L, T, d] or a sequence of L of either for L of them; fp32, bf16, fp16 or
        fp64; keys are rows. L layers of one width in one call share the threads and the reading of the mask.
    mask: None, or [T] ([B, S] with such K), bool or integer; rows where it is 0 are not read into the sums, so NaN
        in padding does no harm. L matrices share one mask.
    precision: what is taken of fp32 keys. "default": on a CPU with AMX, and in the Triton kernel of a GPU, their first
        16 bits, all four products of two bf16 planes: the second moment of keys that differ from yours by 2^-18 at
        most, still positive semidefinite, 2e-6 from the exact one. "exact": all 24 bits (six products of three
        planes). Elsewhere both are exact, as is every product of bf16 and fp16 keys.

    Sums are fp32 over a flush of tokens and then C's dtype: 1024 tokens, with AMX 2048 (bf16) or 512 (other keys), in
    chains of 128 terms at most; on a GPU 8192 tokens, in chains of 1024. fp64 keys: fp64 throughout. With AMX numbers
    under 1.2e-38 count as 0.
    Keys that are split into planes (with AMX fp32 and fp16, on a GPU fp32 in the Triton kernel) show NaN where others
    show an infinity: where a key is infinite or beyond 3.3e38, or a sum of products is beyond fp32.
    The bits of the result depend on the machine's instruction set, not on the number of threads or the run.
    Gradients do not flow through K. Raises ValueError naming the argument for a wrong dtype, shape or device,
    and for a C that overlaps itself or, of a sequence, another.

        C = torch.zeros(d, d, dtype=torch.float64)
        for keys, mask in batches:  # keys [B, S, d], mask [B, S]
            second_moment_(C, keys, mask)
        mirror_(C)

    Source: Meng et al., arXiv:2202.05262, eq. 15. The three-product split of fp32 keys is not offered: its result is
    no Gram matrix, and a solve with it can be wrong in the first digit.
    """
    if isinstance(C, Tensor) and isinstance(K, Tensor):
        _op(*_arguments(C, K, mask, precision))
        return
    Cs, Ks, rows = _layers(C, K, mask, precision)
    if Cs[0].device.type == "cpu":
        _list_op(Cs, Ks, rows, precision)
        return
    for matrix, keys in zip(Cs, Ks):
        _op(matrix, keys, rows, precision)


def mirror_(C: Tensor) -> None:
    """Copy the lower triangle of C [..., d, d] onto its upper triangle, in place, in blocks (no second matrix)."""
    if C.dim() < 2 or C.shape[-1] != C.shape[-2]:
        raise ValueError(f"C must be square in its last two dimensions, got shape {list(C.shape)}")
    d = C.shape[-1]
    for start in range(0, d, _PANEL):
        stop = min(start + _PANEL, d)
        block = C[..., start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)
        C[..., start:stop, stop:] = C[..., stop:, start:stop].mT


def _arguments(
    C: Tensor, K: Tensor, mask: Tensor | None = None, precision: str = "default"
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """The op's arguments: checked, keys [T, d] or [L, T, d], mask [T] bool."""
    _check(C, K, mask)
    _check_precision(precision)
    check_written({"C": C})
    K = K.detach()
    if C.dim() == 2:
        K = K.flatten(0, -2)
    if mask is not None:
        mask = mask.reshape(-1) if mask.dtype == torch.bool else mask.reshape(-1) != 0
    return C, K, mask, precision


def _layers(
    C: Tensor | Sequence[Tensor], K: Tensor | Sequence[Tensor], mask: Tensor | None, precision: str
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """The list op's arguments: checked, C [d, d] and keys [T, d] of one dtype and shape each, mask [T] bool."""
    for name, several in (("C", C), ("K", K)):
        if not isinstance(several, (Tensor, Sequence)):
            raise ValueError(f"{name} must be a tensor or a sequence of them, got {type(several).__name__}")
    Cs, Ks = list(C), list(K)
    for name, given in (("C", Cs), ("K", Ks)):
        check_tensors(**{f"{name}[{index}]": tensor for index, tensor in enumerate(given)})
    if not Cs or len(Cs) != len(Ks):
        raise ValueError(
            f"K must hold keys of every layer, one for each of the {len(Cs)} of C, got {len(Ks)}"
        )
    _check_precision(precision)
    if len({id(matrix) for matrix in Cs}) != len(Cs):
        raise ValueError("C must be a different matrix for every layer, got one of them twice")
    for name, given in (("C", Cs), ("K", Ks)):
        for other in given[1:]:
            if (other.shape, other.dtype) != (given[0].shape, given[0].dtype):
                raise ValueError(
                    f"{name} must have one shape and dtype in all layers, "
                    f"got {list(given[0].shape)} {_name(given[0].dtype)} and {list(other.shape)} {_name(other.dtype)}"
                )
    for matrix, keys in zip(Cs, Ks):
        if matrix.dim() != 2:
            raise ValueError(f"C must be a sequence of [d, d], got one of shape {list(matrix.shape)}")
        _check(matrix, keys, mask)
    check_written({f"C[{index}]": matrix for index, matrix in enumerate(Cs)})
    bound = [_arguments(matrix, keys, mask, precision) for matrix, keys in zip(Cs, Ks)]
    return Cs, [keys for _, keys, _, _ in bound], bound[0][2]


def _bind(
    C: Tensor | Sequence[Tensor],
    K: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """For `explain`: what holds for the first of several layers holds for all."""
    if isinstance(C, Tensor) and isinstance(K, Tensor):
        return _arguments(C, K, mask, precision)
    Cs, Ks, rows = _layers(C, K, mask, precision)
    return Cs[0], Ks[0], rows, precision


def _check_precision(precision: str) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be 'default' or 'exact', got {precision!r}")


def _check(C: Tensor, K: Tensor, mask: Tensor | None) -> None:
    check_tensors(C=C, K=K, **({} if mask is None else {"mask": mask}))
    if C.dim() not in (2, 3) or C.shape[-1] != C.shape[-2]:
        raise ValueError(f"C must be [d, d] or [L, d, d], got shape {list(C.shape)}")
    if C.dtype not in MASTER_DTYPES:
        raise ValueError(f"C must be float64 or float32, got {_name(C.dtype)}")
    if C.requires_grad:
        raise ValueError("C must not require grad: it is a running sum, changed in place")
    if K.dtype not in KEY_DTYPES:
        raise ValueError(f"K must be float32, bfloat16, float16 or float64, got {_name(K.dtype)}")
    if K.device != C.device:
        raise ValueError(f"K must be on the device of C, {C.device}, got {K.device}")
    d = C.shape[-1]
    if C.dim() == 2 and (K.dim() not in (2, 3) or K.shape[-1] != d):
        raise ValueError(
            f"K must be [T, {d}] or [B, S, {d}] for C {list(C.shape)}, got shape {list(K.shape)}"
        )
    if C.dim() == 3 and (K.dim() != 3 or K.shape[-1] != d or K.shape[0] != C.shape[0]):
        raise ValueError(f"K must be [{C.shape[0]}, T, {d}] for C {list(C.shape)}, got shape {list(K.shape)}")
    if mask is None:
        return
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise ValueError(f"mask must be bool or an integer type, got {_name(mask.dtype)}")
    if mask.device != C.device:
        raise ValueError(f"mask must be on the device of C, {C.device}, got {mask.device}")
    expected = list(K.shape[:-1]) if C.dim() == 2 else [K.shape[1]]
    if list(mask.shape) != expected:
        raise ValueError(f"mask must have shape {expected} for K {list(K.shape)}, got {list(mask.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fake(C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> None:
    return None


def _fake_list(C: list[Tensor], K: list[Tensor], mask: Tensor | None, precision: str) -> None:
    return None


def _eager(C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> None:
    """Block-column panels of the triangle: about 1.5 times a whole product on a CPU. fp32 keys are taken in full."""
    if C.dim() == 3:
        for matrix, keys in zip(C, K):
            _eager(matrix, keys, mask, precision)
        return
    rows = K if mask is None else K[mask]
    dtype = torch.float64 if K.dtype == torch.float64 else torch.float32
    d = C.shape[0]
    for first in range(0, rows.shape[0], FLUSH_TOKENS):
        X = rows[first : first + FLUSH_TOKENS].to(dtype)  # [t, d]
        for start in range(0, d, _PANEL):
            stop = min(start + _PANEL, d)
            panel = X[:, start:stop]
            C[start:stop, start:stop] += (panel.mT @ panel).tril()
            if stop < d:
                C[stop:, start:stop] += X[:, stop:].mT @ panel


def _eager_list(C: list[Tensor], K: list[Tensor], mask: Tensor | None, precision: str) -> None:
    for matrix, keys in zip(C, K):
        _eager(matrix, keys, mask, precision)


_KEY_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/second_moment.h: KeyType
_MASTER_CODES = {torch.float32: 0, torch.float64: 1}  # MasterType


def _run_cpu(native: Callable[..., Any], C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> None:
    if C.dim() == 3:
        return _run_cpu_list(native, list(C), list(K), mask, precision)
    return _run_cpu_list(native, [C], [K], mask, precision)


def _run_cpu_list(
    native: Callable[..., Any], C: list[Tensor], K: list[Tensor], mask: Tensor | None, precision: str
) -> None:
    if not C:
        return
    rows = None if mask is None else mask.nonzero().flatten()
    K = [keys if keys.stride(-1) == 1 else keys.contiguous() for keys in K]
    native(
        layers=[
            (keys.data_ptr(), keys.stride(0), matrix.data_ptr(), matrix.stride(0))
            for matrix, keys in zip(C, K)
        ],
        key_type=_KEY_CODES[K[0].dtype],
        master_type=_MASTER_CODES[C[0].dtype],
        rows=0 if rows is None else rows.data_ptr(),
        tokens=K[0].shape[0] if rows is None else rows.shape[0],
        d=C[0].shape[-1],
        exact=precision == "exact",
        threads=torch.get_num_threads(),
    )


def _refuse(C: Tensor, K: Tensor) -> str | None:
    """What no compiled kernel takes."""
    if C.shape[-1] == 0:
        return "C has no entries: there is nothing to add"
    if K.dtype == torch.float64:
        return "K is float64: torch's own fp64 product is at the limit already"
    if C.stride(-1) != 1 and C.shape[-1] > 1:
        return f"C must have unit column stride, got {C.stride(-1)}"
    return None


def _refuse_cpu(C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> str | None:
    reason = _refuse(C, K)
    if reason is None and C.shape[-1] < 32:
        return Slower(f"d={C.shape[-1]} is under 32: one small product is as fast")
    return reason


def _refuse_cpu_list(C: list[Tensor], K: list[Tensor], mask: Tensor | None, precision: str) -> str | None:
    return next((reason for c, k in zip(C, K) if (reason := _refuse_cpu(c, k, mask, precision))), None)


def _refuse_triton(C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> str | None:
    return _refuse(C, K) or _slower_on_gpu(C, K)


def _refuse_cuda(C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> str | None:
    if K.dtype == torch.float32:
        return "K is float32, this kernel takes bfloat16 and float16"
    if C.shape[-1] % 8 != 0:
        return f"d must be a multiple of 8 (16-byte rows), got {C.shape[-1]}"
    if K.device.type == "cuda" and torch.cuda.get_device_capability(K.device) < (8, 0):
        return "the device is older than sm_80"
    return _refuse(C, K) or _slower_on_gpu(C, K)


def _slower_on_gpu(C: Tensor, K: Tensor) -> str | None:
    # Too few tiles to fill the device, or a C that costs more to read and write than the product.
    if C.shape[-1] < 256:
        return Slower(f"d={C.shape[-1]} is under 256: too few tiles for the device")
    if K.shape[-2] < 64:
        return Slower(f"{K.shape[-2]} tokens are under 64: reading and writing C dominates")
    return None


def _run_triton(
    kernel: Callable[..., None], C: Tensor, K: Tensor, mask: Tensor | None, precision: str
) -> None:
    kernel(C, K, mask, 6 if precision == "exact" else 4)


def _run_cuda(native: Callable[..., Any], C: Tensor, K: Tensor, mask: Tensor | None, precision: str) -> None:
    masters, keys = (C, K) if C.dim() == 3 else (C[None], K[None])
    if keys.stride(-1) != 1 or any(stride % 8 for stride in keys.stride()[:-1]) or keys.data_ptr() % 16:
        keys = keys.clone(memory_format=torch.contiguous_format)
    rows = count = None
    if mask is not None:
        # A stable sort puts the kept rows first without telling the host how many they are: no synchronisation.
        rows = torch.argsort(~mask, stable=True).to(torch.int32)
        count = mask.sum(dtype=torch.int32)
    sm90 = torch.cuda.get_device_capability(keys.device)[0] == 9
    staging = None
    if sm90 and rows is not None:
        # Bulk copies cannot skip rows: the kept ones are gathered here, up to a whole step of 64.
        staging = keys.new_empty(keys.shape[0], -(-keys.shape[1] // 64) * 64, keys.shape[2])
    with torch.cuda.device(keys.device):
        native(
            keys=keys.data_ptr(),
            bfloat16=keys.dtype == torch.bfloat16,
            key_stride=keys.stride(1),
            key_layer_stride=keys.stride(0),
            rows=0 if rows is None else rows.data_ptr(),
            count=0 if count is None else count.data_ptr(),
            tokens=keys.shape[1],
            d=keys.shape[2],
            layers=keys.shape[0],
            master=masters.data_ptr(),
            master_float64=masters.dtype == torch.float64,
            master_stride=masters.stride(1),
            master_layer_stride=masters.stride(0),
            staging=0 if staging is None else staging.data_ptr(),
            sm90=sm90,
            stream=torch.cuda.current_stream(keys.device).cuda_stream,
        )


_op = define_op(
    "second_moment_",
    "(Tensor(a!) C, Tensor K, Tensor? mask, str precision) -> ()",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", "fastedit.kernels.second_moment:second_moment_", _refuse_triton, _run_triton),
        Impl("cuda", "cuda", "fastedit._cuda:second_moment", _refuse_cuda, _run_cuda),
        Impl("cpu", "cpu", "fastedit._cpu:second_moment", _refuse_cpu, _run_cpu),
    ],
    bind=_bind,
)

# Layers that are no view of one tensor, on a CPU.
_list_op = define_op(
    "second_moment_list_",
    "(Tensor(a!)[] C, Tensor[] K, Tensor? mask, str precision) -> ()",
    _fake_list,
    _eager_list,
    [Impl("cpu", "cpu", "fastedit._cpu:second_moment", _refuse_cpu_list, _run_cpu_list)],
)
