"""delta_step_ of many edits against torch.optim.Adam edit by edit."""

from __future__ import annotations

from collections.abc import Callable

import reference.delta_step
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops import delta_step_

RATES = {"lr": 0.5, "weight_decay": 0.5, "clamp": 0.75}


def delta_step_case(shape: str, E: int, d: int) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        delta, grad, m, v = (torch.randn(E, d, generator=generator, device=device) for _ in range(4))
        step = torch.arange(E, device=device) % 25
        active = torch.arange(E, device=device) % 5 < 4
        return 1e-2 * delta, grad, m, v.abs(), step, torch.full((E,), 10.0, device=device), active

    def run(function: Callable[..., None]) -> Callable[..., Tensor]:
        def call(*state: Tensor) -> Tensor:
            function(*state, **RATES)
            return state[0]

        return call

    def error(found: Tensor, *_: Tensor) -> float:
        exact = [t.double() if t.is_floating_point() else t for t in inputs(found.device)]
        reference.delta_step.delta_step_(*exact, **RATES)
        return float((found.double() - exact[0]).norm() / exact[0].norm())

    return Case(
        op="delta_step_",
        shape=f"{shape} E={E} d={d}",
        dtype="fp32",
        inputs=inputs,
        ours=run(delta_step_),
        reference=run(reference.delta_step.delta_step_),
        error=error,
        tolerance=1e-6,
        flops=15.0 * E * d,
        bytes=28.0 * E * d,
        goal=3.0,
    )


CPU = [delta_step_case(name, E, MODELS[name].width) for name in ("gpt2-xl", "gptj-6b") for E in (1, 64)]
CPU.append(delta_step_case("gptj-6b key", 8, MODELS["gptj-6b"].key))
GPU = [delta_step_case(name, E, MODELS[name].width) for name in ("gpt2-xl", "gptj-6b") for E in (64, 1024)]

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])
