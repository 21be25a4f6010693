"""attribution_reduce: sums of groups of rows against float64, ragged and empty groups, NaN, layouts, bad input."""

from __future__ import annotations

import pytest
import torch
from reference.attribution_reduce import attribution_reduce as reference
from torch import Tensor

import fastedit
from fastedit.ops.attribution_reduce import _op, attribution_reduce

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (lengths of the groups, f)
SHAPES = [((1,), 1), ((20,) * 3, 63), ((0, 5, 0, 1, 7), 1000), ((2, 3), 17), ((), 5), ((300,), 8)]


def problem(
    lengths: tuple[int, ...], f: int, dtype: torch.dtype, *, before: int = 2, after: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows outside of all groups hold NaN."""
    generator = torch.Generator().manual_seed(sum(lengths) + f)
    starts = torch.tensor([before, *lengths]).cumsum(0)
    gradient = torch.randn(int(starts[-1]) + after, f, generator=generator)
    gradient[:before], gradient[int(starts[-1]) :] = torch.nan, torch.nan
    return gradient.to(dtype), starts, torch.randn(len(lengths), f, generator=generator).to(dtype)


def check(gradient: Tensor, starts: Tensor, activation: Tensor) -> None:
    for given in (activation, None):
        wide = torch.float64 in (gradient.dtype, gradient.dtype if given is None else given.dtype)
        tolerance = 1e-14 if wide else 3e-6
        found = attribution_reduce(gradient, starts, given, steps=20)
        assert found.dtype == (torch.float64 if wide else torch.float32)
        exact = reference(gradient.double(), starts, None if given is None else given.double(), steps=20)
        size = reference(gradient.double().abs(), starts, None if given is None else given.double().abs())
        assert found.shape == exact.shape and not found.isnan().any()
        assert ((found.double() - exact).abs() <= tolerance * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        with fastedit.backend("eager"):
            gradient, starts, activation = problem(*shape, dtype)
            check(gradient, starts, activation)
            check(gradient, starts, activation.double())


def test_chunks_add_up() -> None:
    gradient, starts, activation = problem((20, 20, 20), 9, torch.float64, before=0, after=0)
    whole = reference(gradient, starts, activation, steps=20)
    with fastedit.backend("eager"):
        parts = sum(
            attribution_reduce(part, (starts - at).clamp(0, len(part)), activation, steps=20)
            for at, part in ((at, gradient[at : at + 13]) for at in range(0, 60, 13))
        )
    torch.testing.assert_close(parts, whole)


def test_nan_stays_in_its_group() -> None:
    gradient, starts, activation = problem((4, 4, 4), 6, torch.float32)
    gradient[int(starts[1]), 2] = torch.nan
    activation[2, 5] = torch.inf
    with fastedit.backend("eager"):
        found = attribution_reduce(gradient, starts, activation)
    assert found.isnan().nonzero().tolist() == [[1, 2]] and found[2, 5].isinf()


def test_layouts() -> None:
    gradient, starts, activation = problem((3, 5), 14, torch.float32)
    expected = reference(gradient, starts, activation, steps=3)
    wide = torch.full((2 * len(gradient), 31), torch.nan)
    views = [wide[::2, 1:29:2], torch.empty(14, len(gradient)).T, torch.empty(len(gradient), 14)]
    for view in views:
        view.copy_(gradient)
        bounds = torch.zeros(6, dtype=torch.int64)[::2].copy_(starts)
        with fastedit.backend("eager"):
            found = attribution_reduce(view.requires_grad_(view.is_leaf), bounds, activation, steps=3)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
    row = torch.randn(1, 14)
    with fastedit.backend("eager"):
        torch.testing.assert_close(
            attribution_reduce(row.expand(8, 14), torch.tensor([0, 8])), 8 * row, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(4)}, r"gradient must be float of shape \[n, f\], got torch.float32 \[4\]"),
        ({"gradient": torch.zeros(4, 3).int()}, "gradient must be float"),
        ({"starts": torch.zeros(3)}, r"starts must be int64 of shape \[G \+ 1\], got torch.float32 \[3\]"),
        ({"starts": torch.zeros(0).long()}, "starts must be int64 of shape"),
        (
            {"activation": torch.zeros(3, 3)},
            r"activation must be float of shape \[2, 3\], got torch.float32 \[3, 3\]",
        ),
        ({"activation": torch.zeros(2, 3).int()}, "activation must be float"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        (
            {"starts": torch.tensor([0, 3, 2])},
            r"starts must not decrease and lie within \[0, 4\], got \[0, 3, 2\]",
        ),
        ({"starts": torch.tensor([0, 3, 5])}, "starts must not decrease"),
        ({"starts": torch.tensor([-1, 3, 4])}, "starts must not decrease"),
        (
            {"starts": torch.zeros(3, device="meta").long()},
            "starts must be on gradient's device cpu, got meta",
        ),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "gradient": torch.zeros(4, 3),
        "starts": torch.tensor([0, 2, 4]),
        "activation": None,
    } | change
    with pytest.raises(ValueError, match=message):
        attribution_reduce(**arguments)  # type: ignore[arg-type]


def test_opcheck_and_compile() -> None:
    gradient, starts, activation = problem((3, 5), 14, torch.float32)
    torch.library.opcheck(_op, (gradient, starts, activation, 4))
    torch.library.opcheck(_op, (gradient.bfloat16(), starts, None, 1))
    compiled = torch.compile(
        lambda g, a: attribution_reduce(g, starts, a, steps=8), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(gradient, activation), reference(gradient, starts, activation, steps=8)
    )
    assert fastedit.explain("attribution_reduce", gradient, starts, activation, steps=2)
