"""Packed lower triangles hold the same bits in the same order as a loop over rows."""

from __future__ import annotations

import pytest
import torch

from fastedit.stats import triangle
from fastedit.stats.triangle import pack_lower, packed_size, unpack_lower


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 63, 200])
@pytest.mark.parametrize("elements", [1, 1000, 1 << 18])
def test_equals_a_loop_over_rows(
    n: int, elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triangle, "_ELEMENTS", elements)
    full = torch.randn(n, n, dtype=dtype)
    full[0, 0] = -0.0
    packed = torch.cat(list(pack_lower(full)))
    expected = torch.cat([full[i, : i + 1] for i in range(n)])
    assert packed.shape == (packed_size(n),)
    assert packed.numpy().tobytes() == expected.numpy().tobytes()
    assert unpack_lower(packed).numpy().tobytes() == full.tril().numpy().tobytes()


def test_transposed_views_are_read_as_they_are() -> None:
    full = torch.arange(9.0).view(3, 3).T
    assert torch.cat(list(pack_lower(full))).tolist() == [0, 1, 4, 2, 5, 8]


def test_a_vector_of_no_triangle_is_refused() -> None:
    with pytest.raises(ValueError, match="packed: must have n"):
        unpack_lower(torch.zeros(5))
