"""lowrank_transform: the published networks in float64, row by row, are the truth; gradients, layouts, bad input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference.lowrank_transform import Layer, Statistics, malmen_blocks, mend_module, mend_network
from torch import Tensor

import fastedit
from fastedit.ops import LowRankLayer, LowRankNet, RowMoments, row_moments_
from fastedit.ops.lowrank_transform import _arguments, _backward_op, _op, lowrank_transform

# n, d_x, d_d, modules, rank
SHAPES = [
    (1, 1, 1, 1, 1),
    (5, 33, 17, 2, 7),
    (63, 40, 24, 6, 63),
    (3, 64, 1000, 3, 9),
    (70, 96, 32, 1, 300),
    (70, 20, 13, 2, 0),  # only bias, scale and shift are left of a layer of rank 0
]
PARTS = ("V", "U", "bias", "scale", "shift")


def net_of(
    d: int, modules: int, rank: int, *, layers: int = 2, clamp_first: bool = False, dtype: torch.dtype
) -> LowRankNet:
    generator = torch.Generator().manual_seed(d + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = []
    for _ in range(layers):
        U = normal(d, rank) / (rank * d) ** 0.5
        scale, shift = 1 + 0.3 * normal(modules, d), 0.3 * normal(modules, d)
        tensors = (normal(rank, d), U, 0.3 * normal(d), scale, shift)
        made.append(LowRankLayer(*(t.to(dtype) for t in tensors)))
    return LowRankNet(made, clamp_first)


def problem(
    n: int, d_x: int, d_d: int, modules: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """X, D, (mean, std) per module, mode."""
    generator = torch.Generator().manual_seed(n)
    z = 3 * torch.randn(n, d_x + d_d, generator=generator, dtype=torch.float64) + 1
    z[:, d_x:] *= 1e-4
    mean = torch.randn(modules, d_x + d_d, generator=generator, dtype=torch.float64)
    std = 0.5 + torch.rand(modules, d_x + d_d, generator=generator, dtype=torch.float64)
    mean[:, d_x:] *= 1e-4
    std[:, d_x:] *= 1e-4
    mode = torch.randint(0, modules, (n,), generator=generator)
    return z[:, :d_x].to(dtype), z[:, d_x:].to(dtype), (mean, std), mode


def twin(
    X: Tensor,
    D: Tensor,
    net: LowRankNet,
    stats: tuple[Tensor, Tensor] | None,
    mode: Tensor | None,
    eps: float = 1e-7,
) -> Tensor:
    """Row by row in float64, differentiable."""
    run = malmen_blocks if net.clamp_first else mend_network
    layers = [Layer(*(getattr(layer, name).double() for name in PARTS)) for layer in net.layers]
    out = []
    for index, row in enumerate(torch.cat([X.double(), D.double()], 1)):
        module = 0 if mode is None else int(mode[index])
        z = row[None]
        if stats is not None:
            mean, std = (t.double() if t.ndim == 1 else t.double()[module] for t in stats)
            z = (z - mean) / (std + eps)
        out.append(run(z, layers, module))
    return torch.cat(out) if out else torch.zeros(0, X.shape[1] + D.shape[1]).double()


def both(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.double() for part in parts], 1)


def refused(implementation: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> bool:
    """Whether the implementation leaves this type to the eager default, and says so."""
    if implementation == "eager" or dtype != torch.float64:
        return False
    with fastedit.backend(implementation), pytest.raises(RuntimeError, match="float32"):
        lowrank_transform(*args, **kwargs)
    return True


def check(found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Column by column relative to the largest number of the row: d is four orders below x."""
    assert found.shape == exact.shape and not found.isnan().any()
    if exact.numel():
        assert float((found.double() - exact).norm()) <= tolerance * float(exact.norm())


@pytest.mark.parametrize("clamp_first", [False, True], ids=["mend", "malmen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_published_networks(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype, clamp_first: bool
) -> None:
    n, d_x, d_d, modules, rank = shape
    X, D, stats, mode = problem(n, d_x, d_d, modules, dtype)
    net = net_of(d_x + d_d, modules, rank, clamp_first=clamp_first, dtype=dtype)
    if refused(implementation, dtype, X, D, net, stats, mode=mode):
        return
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for given in (stats, (stats[0][0], stats[1][0]), None):
        with fastedit.backend(implementation):
            found = lowrank_transform(X, D, net, given, mode=mode)
        assert [part.shape[1] for part in found] == [d_x, d_d] and found[0].dtype == dtype
        check(both(found), twin(X, D, net, given, mode), tolerance)


@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_of_any_type(implementation: str, rows: torch.dtype) -> None:
    X, D, _, mode = problem(9, 20, 13, 2, torch.float64)
    X, D = X.to(rows), (1e4 * D).to(rows)
    stats = (torch.zeros(33), torch.ones(33))
    net = net_of(33, 2, 5, dtype=torch.float32)
    if refused(implementation, rows, X, D, net, stats, mode=mode):
        return
    with fastedit.backend(implementation):
        found = lowrank_transform(X, D, net, stats, mode=mode)
        mixed = lowrank_transform(X.float(), D, net, stats, mode=mode)
    assert found[0].dtype == found[1].dtype == torch.float32
    check(both(found), twin(X, D, net, stats, mode), 2e-6)
    assert torch.equal(both(found), both(mixed))


def test_one_group_equals_mend_module_by_module(implementation: str) -> None:
    """Training: each module's rows enter the statistics before they are normalised, after those of earlier modules."""
    sizes, d_x, d_d = [4, 9, 6], 21, 12
    dtype = torch.float64 if implementation == "eager" else torch.float32
    net = net_of(d_x + d_d, 3, 8, dtype=dtype)
    layers = [Layer(*(getattr(layer, name).double() for name in PARTS)) for layer in net.layers]
    X, D, _, _ = problem(19, d_x, d_d, 1, dtype)
    D = 1e4 * D
    zeros = [torch.zeros(width).double() for width in (d_x, d_x, d_d, d_d)]
    statistics, state = Statistics(0, *zeros), RowMoments.zeros(d_x + d_d)
    expected = [
        mend_module(x, d, statistics, layers, module, training=True)
        for module, (x, d) in enumerate(zip(X.split(sizes), D.split(sizes)))
    ]
    mode = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    trail = row_moments_(state, X, D, batches=sizes)
    with fastedit.backend(implementation):
        found = lowrank_transform(X, D, net, (trail.mean, trail.std()), mode=mode)
    check(
        both(found), torch.cat([both(parts) for parts in expected]), 1e-11 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("clamp_first", [False, True], ids=["mend", "malmen"])
def test_gradcheck(clamp_first: bool) -> None:
    X, D, stats, mode = problem(5, 4, 3, 2, torch.float64)
    D = 1e4 * D
    stats = (stats[0], stats[1].clamp(min=0.5))
    net = net_of(7, 2, 3, clamp_first=clamp_first, dtype=torch.float64)
    leaves = [t.requires_grad_() for layer in net.layers for t in (getattr(layer, name) for name in PARTS)]

    def run(X: Tensor, D: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        layers = [LowRankLayer(*leaves[i : i + 5]) for i in range(0, len(leaves), 5)]
        return lowrank_transform(X, D, LowRankNet(layers, clamp_first), stats, mode=mode)

    with fastedit.backend("eager"):
        assert torch.autograd.gradcheck(run, (X.requires_grad_(), D.requires_grad_(), *leaves))


@pytest.mark.parametrize("clamp_first", [False, True], ids=["mend", "malmen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_net(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype, clamp_first: bool
) -> None:
    n, d_x, d_d, modules, rank = shape
    X, D, stats, mode = problem(n, d_x, d_d, modules, dtype)
    if implementation == "cpu" and dtype == torch.float64:
        return  # refused, as test_equals_the_published_networks has it
    weight = torch.randn(n, d_x + d_d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = []
    for exact in (False, True):
        net = net_of(d_x + d_d, modules, rank, clamp_first=clamp_first, dtype=dtype)
        leaves = [t for layer in net.layers for t in (getattr(layer, name) for name in PARTS)]
        for leaf in leaves:
            leaf.requires_grad_()
        if exact:
            out = twin(X, D, net, stats, mode)
        else:
            with fastedit.backend(implementation):
                out = both(lowrank_transform(X, D, net, stats, mode=mode))
        gradients.append(torch.autograd.grad((out * weight).sum(), leaves))
    for found, expected in zip(*gradients):
        check(found, expected.double(), 1e-10 if dtype == torch.float64 else 1e-5)


def test_the_identity_at_the_start(implementation: str) -> None:
    """U = 0, bias = 0, scale = 1, shift = 0: rows come back normalised, and U gets a gradient at the clamp's kink."""
    V, zero = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 9)
    U = torch.zeros(9, 4, requires_grad=True)
    net = LowRankNet([LowRankLayer(V, U, torch.zeros(9), torch.ones(1, 9), zero)])
    X, D = torch.randn(3, 5), torch.randn(3, 4)
    with fastedit.backend(implementation):
        found = lowrank_transform(X, D, net, None)
    assert torch.equal(found[0], X) and torch.equal(found[1], D)
    both(found).sum().backward()
    assert U.grad is not None and torch.isfinite(U.grad).all() and U.grad.abs().sum() > 0


def test_no_rows_and_no_layers(implementation: str) -> None:
    net = net_of(7, 2, 3, dtype=torch.float32)
    leaves = [layer.U.requires_grad_() for layer in net.layers]
    stats = (torch.zeros(7), torch.ones(7))
    with fastedit.backend(implementation):
        found = lowrank_transform(torch.empty(0, 4), torch.empty(0, 3), net, stats)
        assert [list(part.shape) for part in found] == [[0, 4], [0, 3]]
        for gradient in torch.autograd.grad(both(found).sum(), leaves):
            assert gradient.eq(0).all()
        X, D = torch.randn(5, 4), torch.randn(5, 3)
        only = lowrank_transform(X, D, LowRankNet([]), (torch.ones(7), torch.full((7,), 2.0)), eps=0.0)
        assert torch.equal(only[0], (X - 1) / 2) and torch.equal(only[1], (D - 1) / 2)
    none = lowrank_transform(X[:, :0], D[:, :0], LowRankNet([]), (torch.ones(0), torch.ones(2, 0)[0]))
    assert [list(part.shape) for part in none] == [[5, 0], [5, 0]]
    wide = lowrank_transform(X.double(), D, LowRankNet([]), None)
    assert wide[1].dtype == torch.float64


def test_nan_stays_in_its_row(implementation: str) -> None:
    X, D, stats, mode = problem(6, 20, 9, 2, torch.float32)
    net = net_of(29, 2, 5, dtype=torch.float32)
    clean = both(lowrank_transform(X, D, net, stats, mode=mode))
    X = X.clone()
    X[2] = float("nan")
    with fastedit.backend(implementation):
        found = both(lowrank_transform(X, D, net, stats, mode=mode))
    assert found[2].isnan().any()
    rest = [0, 1, 3, 4, 5]
    check(found[rest], clean[rest], 2e-6)


def test_layouts(implementation: str) -> None:
    """Odd strides, misaligned pointers, transposed weights: MALMEN keeps A = V^T and B = U^T."""
    X, D, stats, mode = problem(6, 20, 13, 3, torch.float32)
    net = net_of(33, 3, 7, dtype=torch.float32)
    expected = both(lowrank_transform(X, D, net, stats, mode=mode))

    def odd(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    def strided(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = t
        return wide[..., 1::2]

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.ndim == 2 else t

    for change in (odd, strided, turned):
        layers = [LowRankLayer(*(change(getattr(layer, name)) for name in PARTS)) for layer in net.layers]
        with fastedit.backend(implementation):
            found = lowrank_transform(
                change(X), change(D), LowRankNet(layers), (change(stats[0]), change(stats[1])), mode=mode
            )
        check(both(found), expected, 2e-6)


def test_threads_give_the_same_bits(native_cpu: None) -> None:
    X, D, stats, mode = problem(40, 200, 100, 3, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            net = net_of(300, 3, 70, dtype=torch.float32)
            with fastedit.backend("cpu"):
                results.append(both(lowrank_transform(X, D, net, stats, mode=mode)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_long_sum_keeps_its_digits(implementation: str) -> None:
    """No worse than twice torch's own error over a depth of 4000, on rows whose scales differ by six decades."""
    generator = torch.Generator().manual_seed(0)
    X, D = torch.randn(20, 2500, generator=generator), 1e-6 * torch.randn(20, 1500, generator=generator)
    net = net_of(4000, 1, 40, layers=1, dtype=torch.float32)
    exact = twin(X, D, net, None, None)
    with fastedit.backend("eager"):
        plain = both(lowrank_transform(X, D, net, None))
    with fastedit.backend(implementation):
        found = both(lowrank_transform(X, D, net, None))
    assert float((found - exact).norm()) <= 2 * float((plain - exact).norm())


def test_inputs_are_left_alone_and_gradients_stop_where_none_is_asked() -> None:
    X, D, stats, mode = problem(6, 20, 13, 3, torch.float32)
    net = net_of(33, 3, 7, dtype=torch.float32)
    before = [X.clone(), D.clone()]
    x, d = lowrank_transform(X, D, net, stats, mode=mode)
    assert torch.equal(X, before[0]) and torch.equal(D, before[1])
    assert not x.requires_grad
    net.layers[1].shift.requires_grad_()
    x, d = lowrank_transform(X, D, net, stats, mode=mode)
    (x.sum() + d.sum()).backward()
    assert net.layers[1].shift.grad is not None and net.layers[0].U.grad is None
    with torch.no_grad():
        assert not lowrank_transform(X, D, net, stats, mode=mode)[0].requires_grad


BASE: dict[str, Any] = {"mode": torch.tensor([0, 1, 1])}


def _net(**change: Tensor) -> LowRankNet:
    tensors = {
        "V": torch.zeros(2, 7),
        "U": torch.zeros(7, 2),
        "bias": torch.zeros(7),
        "scale": torch.ones(2, 7),
        "shift": torch.zeros(2, 7),
    }
    return LowRankNet([LowRankLayer(**{**tensors, **change})])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.zeros(3)}, "X must be a float matrix"),
        ({"D": torch.zeros(3, 3).int()}, "D must be a float matrix, got torch.int32"),
        ({"D": torch.zeros(2, 3)}, "D must have X's 3 rows, got 2"),
        ({"eps": -1.0}, "eps must be >= 0, got -1.0"),
        ({"net": _net(V=torch.zeros(2, 6))}, r"net.layers\[0\].V must have shape \[2, 7\], got \[2, 6\]"),
        ({"net": _net(U=torch.zeros(7, 3))}, r"net.layers\[0\].U must have shape \[7, 2\], got \[7, 3\]"),
        ({"net": _net(shift=torch.zeros(3, 7))}, r"net.layers\[0\].shift must have shape \[2, 7\]"),
        ({"net": _net(bias=torch.zeros(7).double())}, r"net.layers\[0\].bias must be float32 or float64"),
        ({"net": _net(V=torch.zeros(2, 7).half())}, "must be float32 or float64 like all of the net"),
        ({"net": _net(V=torch.zeros(2, 7, device="meta"))}, "must be on X's device cpu, got meta"),
        (
            {"stats": (torch.zeros(6), torch.ones(6))},
            r"stats mean must have shape \[7\] or \[L, 7\], got \[6\]",
        ),
        ({"stats": (torch.zeros(7), torch.ones(2, 7))}, "stats std must have shape"),
        ({"stats": (torch.zeros(3, 7), torch.ones(3, 7))}, "one row for each of the net's 2 modules, got 3"),
        ({"stats": (torch.zeros(7).int(), torch.ones(7).int())}, "stats mean must be float, got torch.int32"),
        ({"mode": torch.zeros(3)}, r"mode must be int64 of shape \[3\], got torch.float32"),
        ({"mode": torch.tensor([0, 2, 1])}, r"mode must be in \[0, 2\), got 2"),
        ({"mode": torch.tensor([0, -1, 1])}, r"mode must be in \[0, 2\), got -1"),
        ({"mode": None, "net": _net(scale=torch.ones(0, 7), shift=torch.ones(0, 7))}, "at least one module"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    given = {"X": torch.zeros(3, 4), "D": torch.zeros(3, 3), "net": _net(), "stats": None, **BASE, **change}
    positional = [given.pop(name) for name in ("X", "D", "net", "stats")]
    with pytest.raises(ValueError, match=message):
        lowrank_transform(*positional, **given)


@pytest.mark.parametrize("clamp_first", [False, True], ids=["mend", "malmen"])
def test_opcheck(clamp_first: bool) -> None:
    X, D, stats, mode = problem(5, 4, 3, 2, torch.float32)
    net = net_of(7, 2, 3, clamp_first=clamp_first, dtype=torch.float32)
    torch.library.opcheck(_op, _arguments(X, D, net, stats, mode))
    for layer in net.layers:
        layer.V.requires_grad_()
    arguments = _arguments(X.requires_grad_(), D, net, stats, mode)
    torch.library.opcheck(_op, arguments)
    z, Z, A, H = (t.detach() for t in _op(*arguments))
    _, _, _, std, V, U, _, scale, shift, *_ = arguments
    lists = [[t.detach() for t in part] for part in (V, U, scale, shift)]
    for needed in (False, True):
        torch.library.opcheck(
            _backward_op,
            (torch.ones_like(z), Z, A, H, std, *lists, mode, 1e-7, clamp_first, needed),
        )
