"""second_moment_ against its naive twin, C += K^T K in C's dtype."""

from __future__ import annotations

from cases import second_moment_cases
from op_bench import op_benches

CPU = second_moment_cases("cpu")
GPU = second_moment_cases("cuda")

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton", "cuda"])
