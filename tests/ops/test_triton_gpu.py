"""The Triton kernels on a device against the eager default on the CPU: values, the same bits twice, graph capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastedit
import fastedit.ops.attribution_reduce
import fastedit.ops.delta_step
import fastedit.ops.kth_magnitude
import fastedit.ops.lowrank_transform
import fastedit.ops.nearest_key
import fastedit.ops.row_moments
import fastedit.ops.second_moment
import fastedit.ops.target_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _second_moment(precision: str, dtype: torch.dtype) -> tuple[Any, ...]:
    mask = torch.arange(3000) % 5 > 1
    return torch.zeros(3, 520, 520, dtype=torch.float64), rand(3, 3000, 520, dtype=dtype), mask, precision


def _delta_step() -> tuple[Any, ...]:
    state = (rand(9, 1601), rand(9, 1601, seed=1), rand(9, 1601, seed=2), rand(9, 1601, seed=3).abs())
    return (
        *state,
        torch.arange(9),
        rand(9).abs() + 1,
        torch.arange(9) % 3 > 0,
        0.5,
        0.1,
        0.75,
        0.9,
        0.999,
        1e-8,
    )


def _row_moments(dtype: torch.dtype) -> tuple[Any, ...]:
    state = (torch.tensor(7), rand(300, dtype=torch.float64), rand(300, dtype=torch.float64).abs())
    return (
        *state,
        rand(500, 200, dtype=dtype),
        rand(500, 100),
        torch.arange(500) % 7 > 0,
        [100, 0, 400],
        True,
    )


def _lowrank(clamp_first: bool) -> tuple[Any, ...]:
    net = (
        [rand(40, 300)] * 2,
        [rand(300, 40, seed=1)] * 2,
        [rand(300)] * 2,
        [rand(3, 300)] * 2,
        [rand(3, 300, seed=4)] * 2,
    )
    stats = (rand(3, 300), rand(3, 300).abs() + 0.5)
    return (rand(64, 200), rand(64, 100), *stats, *net, torch.arange(64) % 3, 1e-7, clamp_first, True)


def _target_loss(dtype: torch.dtype) -> tuple[Any, ...]:
    logp = torch.log_softmax(rand(4, 20011), -1)
    head = (rand(20011, 96, dtype=dtype), rand(20011, dtype=dtype))
    targets = torch.arange(33) * 606 - 1
    return (0.3 * rand(33, 96), *head, targets, torch.tensor([0, 5, 5, 32]), logp, 30.0, True)


def _tied(dtype: torch.dtype) -> Tensor:
    return (4 * rand(300, 501)).round().to(dtype)


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]], float]] = {
    "second moment bf16": ("second_moment_", lambda: _second_moment("default", torch.bfloat16), 5e-6),
    "second moment fp32": ("second_moment_", lambda: _second_moment("exact", torch.float32), 5e-6),
    "second moment fp32, four": ("second_moment_", lambda: _second_moment("default", torch.float32), 2e-5),
    "delta step": ("delta_step_", _delta_step, 1e-5),
    "row moments fp32": ("row_moments_", lambda: _row_moments(torch.float32), 1e-12),
    "row moments bf16": ("row_moments_", lambda: _row_moments(torch.bfloat16), 1e-12),
    "low rank, MEND": ("lowrank_transform", lambda: _lowrank(False), 1e-4),
    "low rank, MALMEN": ("lowrank_transform", lambda: _lowrank(True), 1e-4),
    "target loss fp32": ("target_loss", lambda: _target_loss(torch.float32), 1e-4),
    "target loss bf16": ("target_loss", lambda: _target_loss(torch.bfloat16), 1e-4),
    "target loss fp16": ("target_loss", lambda: _target_loss(torch.float16), 1e-4),
    "nearest key": ("nearest_key", lambda: (rand(17, 700), rand(5000, 700), rand(5000).abs() * 40), 1e-5),
    "kth magnitude fp32": ("kth_magnitude", lambda: (rand(700, 701), 20_000), 0.0),
    "kth magnitude fp64": ("kth_magnitude", lambda: (rand(70, 701, dtype=torch.float64), 20_000), 0.0),
    "kth magnitude bf16": ("kth_magnitude", lambda: (rand(700, 701).bfloat16(), 20_000), 0.0),
    "mask, first": ("magnitude_mask_", lambda: (_tied(torch.float16), None, 60_000, False), 0.0),
    "mask, all": ("magnitude_mask_", lambda: (_tied(torch.float32), rand(300, 501), 60_000, True), 0.0),
    "attribution": (
        "attribution_reduce",
        lambda: (rand(80, 3000), torch.tensor([0, 20, 20, 79]), rand(3, 3000), 20),
        1e-5,
    ),
}


def run(op: str, args: tuple[Any, ...], backend: str) -> list[Tensor]:
    """What the op returns and what its arguments hold afterwards."""
    with fastedit.backend(backend):
        out = getattr(torch.ops.fastedit, op)(*args)
    return [leaf for leaf in tree_leaves((out, args)) if isinstance(leaf, Tensor)]


def on_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    moved: tuple[Any, ...] = tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, args)
    return moved


@pytest.mark.parametrize("case", CASES)
def test_equals_eager_and_repeats(case: str) -> None:
    op, make, tolerance = CASES[case]
    expected = run(op, make(), "eager")
    found = run(op, on_device(make()), "triton")
    again = run(op, on_device(make()), "triton")
    for want, have, same in zip(expected, found, again):
        torch.testing.assert_close(
            have.cpu().double(),
            want.double(),
            rtol=tolerance,
            atol=tolerance * float(want.double().abs().max() if want.numel() else 0),
        )
        assert torch.equal(have, same)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("row moments")])
def test_graph_capture(case: str) -> None:
    op, make, _ = CASES[case]
    expected = run(op, on_device(make()), "triton")
    args = on_device(make())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(op, on_device(make()), "triton")  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(op, args, "triton")
    graph.replay()
    torch.cuda.synchronize()
    for want, have in zip(expected, found):
        assert torch.equal(want, have)
