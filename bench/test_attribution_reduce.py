"""attribution_reduce of all layers of a prompt's sweep against a sum per layer."""

from __future__ import annotations

import reference.attribution_reduce
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops.attribution_reduce import attribution_reduce

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
STEPS = 20


def attribution_case(shape: str, groups: int, f: int, dtype: torch.dtype) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        gradient = torch.randn(groups * STEPS, f, generator=generator, device=device)
        activation = torch.randn(groups, f, generator=generator, device=device)
        starts = torch.arange(groups + 1, device=device) * STEPS
        return gradient.to(dtype), starts, activation.to(dtype)

    def ours(*tensors: Tensor) -> Tensor:
        return attribution_reduce(*tensors, steps=STEPS)

    def naive(*tensors: Tensor) -> Tensor:
        return reference.attribution_reduce.attribution_reduce(*tensors, steps=STEPS)

    def error(found: Tensor, gradient: Tensor, starts: Tensor, activation: Tensor) -> float:
        exact = gradient.double().view(groups, STEPS, f).sum(1) * activation.double() / STEPS
        return float((found - exact).norm() / exact.norm())

    return Case(
        op="attribution_reduce",
        shape=f"{shape} G={groups} m={STEPS} f={f}",
        dtype=NAMES[dtype],
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-6,
        flops=float(groups * STEPS * f),
        bytes=float(groups * STEPS * f * dtype.itemsize),
    )


BOTH = (torch.float32, torch.bfloat16)
CPU = [attribution_case("gpt2 layers", 12, MODELS["gpt2"].key, dtype) for dtype in BOTH]
CPU += [attribution_case("gptj-6b layers", 28, MODELS["gptj-6b"].key, dtype) for dtype in BOTH]
GPU = [
    attribution_case(f"{name} layers", groups, MODELS[name].key, dtype)
    for name, groups in (("gpt2-xl", 48), ("gptj-6b", 28))
    for dtype in BOTH
]

test_cpu, test_gpu = op_benches(CPU, GPU, device=["triton"])
