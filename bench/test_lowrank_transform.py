"""MEND's gradient transform with its running statistics against the published program's loops, module by module.

The reference takes the modules of a group one after the other and their rows one by one into the statistics; ours takes
all rows of the group at once. Editing only transforms; training also takes the gradient in the network.
"""

from __future__ import annotations

import reference.lowrank_transform as twin
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops import LowRankLayer, LowRankNet, RowMoments, row_moments_
from fastedit.ops.lowrank_transform import lowrank_transform

Stats = tuple[Tensor, Tensor]
PARTS = ("V", "U", "bias", "scale", "shift")


def lowrank_transform_case(
    shape: str, modules: int, tokens: int, d_x: int, d_d: int, rank: int, *, training: bool, seed: int = 0
) -> Case:
    """modules matrices of one shape, `tokens` rows each; a network of two layers.

    seed: of inputs at which the gradient exists in float32 as well: where a pre-activation is zero to rounding, float32
    and float64 may take different sides of the kink.
    """
    n, d = modules * tokens, d_x + d_d

    def inputs(device: torch.device) -> tuple[Tensor, Tensor, LowRankNet, Stats, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def layer() -> LowRankLayer:
            U = normal(d, rank) / (rank * d) ** 0.5
            scale, shift = (mean + 0.1 * normal(modules, d) for mean in (1.0, 0.0))
            tensors = (normal(rank, d), U, 0.1 * normal(d), scale, shift)
            return LowRankLayer(*(tensor.requires_grad_(training) for tensor in tensors))

        net = LowRankNet([layer(), layer()])
        mode = torch.arange(modules, device=device).repeat_interleave(tokens)
        X, D = normal(n, d_x), 1e-4 * normal(n, d_d)
        stats = (torch.zeros(modules, d, device=device), torch.ones(modules, d, device=device))
        return X, D, net, stats, mode

    def start(device: torch.device, dtype: torch.dtype = torch.float32) -> RowMoments:
        """Statistics of 100 earlier rows."""
        m2 = torch.full((d,), 99.0, device=device, dtype=dtype)
        m2[d_x:] *= 1e-8
        return RowMoments(torch.tensor(100, device=device), torch.zeros_like(m2), m2)

    def result(z: Tensor, net: LowRankNet) -> Tensor:
        """What is compared: the rows, and when training a gradient too large to keep whole."""
        if not training:
            return z
        leaves = [getattr(layer, name) for layer in net.layers for name in PARTS]
        gradients = torch.autograd.grad(z.square().sum() / 2, leaves)
        some = [g[:64] if g.ndim == 2 else g[None] for g in gradients[1:]]  # [0] is [rank, d] as [5]
        return torch.cat([(part / part.norm()).flatten() for part in some])

    def ours(X: Tensor, D: Tensor, net: LowRankNet, stats: Stats, mode: Tensor) -> Tensor:
        trail = row_moments_(start(X.device), X, D, batches=[tokens] * modules)
        parts = lowrank_transform(X, D, net, (trail.mean, trail.std()), mode=mode)
        return result(torch.cat(parts, 1), net)

    def naive(X: Tensor, D: Tensor, net: LowRankNet, stats: Stats, mode: Tensor) -> Tensor:
        dtype = net.layers[0].V.dtype
        layers = [twin.Layer(*(getattr(layer, name) for name in PARTS)) for layer in net.layers]
        state = start(X.device, dtype)
        statistics = twin.Statistics(100, state.mean[:d_x], state.m2[:d_x], state.mean[d_x:], state.m2[d_x:])
        rows = [
            torch.cat(twin.mend_module(x, v, statistics, layers, module, training=True), 1)
            for module, (x, v) in enumerate(zip(X.split(tokens), D.split(tokens)))
        ]
        return result(torch.cat(rows), net)

    def error(found: Tensor, X: Tensor, D: Tensor, net: LowRankNet, stats: Stats, mode: Tensor) -> float:
        layers = [
            LowRankLayer(*(getattr(layer, name).detach().double().requires_grad_(training) for name in PARTS))
            for layer in net.layers
        ]
        exact = naive(X.double(), D.double(), LowRankNet(layers), stats, mode)
        return float((found.double() - exact).norm() / exact.norm())

    return Case(
        op="lowrank_transform",
        shape=f"{shape} {modules}x{tokens} rows d={d_x}+{d_d} r={rank}{' training' if training else ''}",
        dtype="fp32",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=2e-5 if training else 1e-5,
        flops=(24.0 if training else 8.0) * n * d * rank,
        bytes=(32.0 if training else 16.0) * d * rank,
        goal=5.0,
    )


SEEDS = {"llama2-7b": 1}


def cases(names: dict[str, tuple[int, int]], rank: int = 1920) -> list[Case]:
    """Per model: modules of a group (the last three FFNs; with a gated FFN two matrices of each) and rows of each."""
    return [
        lowrank_transform_case(
            name,
            modules,
            tokens,
            MODELS[name].width,
            MODELS[name].key,
            rank,
            training=training,
            seed=SEEDS.get(name, 0),
        )
        for name, (modules, tokens) in names.items()
        for training in (False, True)
    ]


CPU = cases({"gpt2": (3, 12), "gpt2-xl": (3, 12), "llama2-7b": (6, 8)})
GPU = cases({"gpt2-xl": (3, 12), "gptj-6b": (3, 12), "llama2-7b": (6, 8), "llama3-8b": (6, 8)})

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])
