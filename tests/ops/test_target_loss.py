"""target_loss: values and gradients against every logit kept, in chunks and at the edges of the number range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.target_loss import target_loss as reference
from torch import Tensor

import fastedit
from fastedit.ops import target_loss as module
from fastedit.ops.target_loss import _op, target_loss


@pytest.fixture(autouse=True, params=["eager", "preferred"])
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The eager default, and whatever this machine prefers to it."""
    with fastedit.backend("eager") if request.param == "eager" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven columns at a time, so that small vocabularies take several chunks and end in a partial one."""
    monkeypatch.setattr(module, "_LEAST", 7)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)


def problem(
    R: int, d: int, V: int, Q: int, dtype: torch.dtype, *, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    H, weight = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (R, V))
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, V, (R,), generator=generator)
    kl_rows = torch.randint(0, max(R, 1), (Q,), generator=generator) if Q and R else None
    logp = torch.log_softmax(2 * torch.randn(Q, V, generator=generator, dtype=torch.float64), -1)
    kl_logp = logp.to(dtype) if kl_rows is not None else None
    return (scale * H).to(dtype), weight.to(dtype), bias.to(dtype), targets, kl_rows, kl_logp


def both(
    H: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | None, softcap: float | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ours, reference) of nll, kl and the gradient of a random mix of them; the reference in float64."""
    generator = torch.Generator().manual_seed(7)
    results = []
    for function, dtype in ((target_loss, H.dtype), (reference, torch.float64)):
        h = H.detach().to(dtype).requires_grad_()
        wide = [
            None if t is None or dtype != torch.float64 or t.dtype == torch.int64 else t.double()
            for t in rest
        ]
        others = [new if new is not None else old for new, old in zip(wide, rest)]
        w = weight if function is target_loss else weight.double()
        b = bias if function is target_loss or bias is None else bias.double()
        nll, kl = function(h, w, b, *others, softcap=softcap)
        generator.manual_seed(7)
        mix = (torch.randn(nll.shape, generator=generator).to(nll) * nll).sum()
        mix = mix + (torch.randn(kl.shape, generator=generator).to(kl) * kl).sum()
        (grad,) = torch.autograd.grad(mix, h)
        results.append((nll, kl, grad))
    return zip(*results)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    R=st.integers(1, 9),
    V=st.sampled_from([1, 2, 7, 8, 40, 63]),
    Q=st.integers(0, 3),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    with_bias=st.booleans(),
)
def test_values_and_gradient(
    seed: int, R: int, V: int, Q: int, softcap: float | None, with_bias: bool
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        H, weight, bias, *rest = problem(R, 6, V, Q, dtype, seed=seed)
        for ours, theirs in both(H, weight, bias if with_bias else None, *rest, softcap=softcap):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_default_chunks_at_a_real_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float64 than every logit kept in float32."""
    monkeypatch.undo()
    H, weight, bias, targets, rows, logp = problem(40, 16, 30_011, 2, torch.float32)
    assert logp is not None
    errors = []
    for function in (target_loss, reference):
        found = []
        for dtype in (torch.float32, torch.float64):
            h = H.detach().to(dtype).clone().requires_grad_()
            nll, kl = (function if dtype == torch.float32 else reference)(
                h, weight.to(dtype), bias.to(dtype), targets, rows, logp.to(dtype)
            )
            (nll.sum() + kl.sum()).backward()
            found.append((nll.detach(), kl.detach(), h.grad))
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(*found)])
    assert all(ours <= max(theirs, 1e-6) for ours, theirs in zip(*errors)), errors


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap: float | None) -> None:
    H, weight, bias, targets, rows, logp = problem(4, 5, 20, 2, torch.float64)
    H.requires_grad_()

    def losses(h: Tensor) -> tuple[Tensor, Tensor]:
        return target_loss(h, weight, bias, targets, rows, logp, softcap=softcap)

    assert torch.autograd.gradcheck(losses, (H,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    H, weight, bias, targets, rows, logp = problem(5, 8, 40, 2, dtype)
    narrow = H.clone().requires_grad_()
    wide = H.float().requires_grad_()
    assert logp is not None
    found = target_loss(narrow, weight, bias, targets, rows, logp)
    expected = target_loss(wide, weight.float(), bias.float(), targets, rows, logp.float())
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    found[0].sum().backward(), expected[0].sum().backward()
    assert narrow.grad is not None and wide.grad is not None and narrow.grad.dtype == dtype
    torch.testing.assert_close(narrow.grad, wide.grad.to(dtype))
    mixed = target_loss(H.float(), weight, None, targets, None, None)[0]
    torch.testing.assert_close(mixed, target_loss(H, weight, None, targets, None, None)[0])


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_logits(scale: float) -> None:
    """Shifted by the running maximum, nothing overflows; a certain row has loss 0 and no gradient."""
    H, weight, bias, targets, rows, logp = problem(6, 5, 30, 2, torch.float32, scale=scale)
    H.requires_grad_()
    nll, kl = target_loss(H, weight, bias, targets, rows, logp)
    expected, _ = reference(H.detach().double(), weight.double(), bias.double(), targets, None, None)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    assert kl.isfinite().all() and (nll >= 0).all()
    nll.sum().backward()
    assert H.grad is not None and H.grad.isfinite().all()


def test_falling_and_rising_maxima() -> None:
    """The largest logit in the first, in the last and in a middle chunk."""
    for order in (lambda v: v.sort(descending=True).values, lambda v: v.sort().values, lambda v: v):
        H = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
        weight = order(torch.linspace(-300, 300, 40, dtype=torch.float64).roll(20))[:, None].contiguous()
        targets = torch.tensor([3, 39])
        nll, _ = target_loss(H, weight, None, targets, None, None)
        torch.testing.assert_close(nll, reference(H.detach(), weight, None, targets, None, None)[0])


def test_a_masked_vocabulary() -> None:
    """Padded columns at -inf (a whole chunk of them, first and last) take no probability."""
    H, weight, bias, targets, rows, _ = problem(4, 5, 40, 2, torch.float32)
    bias[:9] = -torch.inf
    bias[35:] = -torch.inf
    targets = targets.clamp(9, 34)
    logp = torch.log_softmax(torch.randn(2, 40) + bias, -1)
    H.requires_grad_()
    nll, kl = target_loss(H, weight, bias, targets, rows, logp)
    expected = reference(H.detach(), weight[9:35], bias[9:35], targets - 9, rows, logp[:, 9:35])
    torch.testing.assert_close(nll.detach(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl.detach(), expected[1], rtol=1e-5, atol=1e-6)
    (nll.sum() + kl.sum()).backward()
    assert H.grad is not None and H.grad.isfinite().all()


def test_kl_of_a_distribution_with_itself_is_zero() -> None:
    """At the first step of the optimisation; logits around -100, as GPT-2's are."""
    H, weight, bias, _, _, _ = problem(1, 64, 1000, 0, torch.float32)
    bias = bias - 100
    logp = torch.log_softmax(H @ weight.T + bias, -1)
    none = torch.full((1,), -1)
    H.requires_grad_()
    nll, kl = target_loss(H, weight, bias, none, torch.zeros(1).long(), logp)
    assert nll.eq(0).all() and float(kl.detach().abs()) < 2e-5
    kl.sum().backward()
    assert H.grad is not None and float(H.grad.abs().max()) < 2e-4


def test_rows_do_not_see_each_other() -> None:
    H, weight, bias, targets, rows, logp = problem(6, 5, 30, 2, torch.float64)
    whole, _ = target_loss(H, weight, bias, targets, rows, logp)
    for r in range(6):
        one, _ = target_loss(H[r : r + 1], weight, bias, targets[r : r + 1], None, None)
        torch.testing.assert_close(one[0], whole[r], rtol=1e-13, atol=1e-13)


def test_no_gradient_is_kept_when_none_is_asked() -> None:
    H, weight, bias, targets, rows, logp = problem(6, 5, 30, 2, torch.float32)
    nll, _ = target_loss(H, weight, bias, targets, rows, logp)
    assert not nll.requires_grad
    H.requires_grad_()
    with torch.no_grad():
        quiet, _ = target_loss(H, weight, bias, targets, rows, logp)
    assert not quiet.requires_grad and torch.equal(quiet, nll)
    assert all(t.numel() == 0 for t in _op(H.detach(), weight, bias, targets, rows, logp, 0.0, False)[2:])
    tracked = target_loss(H, weight.requires_grad_(), bias, targets, rows, logp)[0]
    (grad,) = torch.autograd.grad(tracked.sum(), weight, allow_unused=True, retain_graph=True)
    assert grad is None  # the head is fixed: no gradient is computed for it


def test_nothing_the_size_of_the_logits_is_kept() -> None:
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    H, weight, bias, targets, rows, logp = problem(50, 4, 500, 3, torch.float32)
    H.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nll, kl = target_loss(H, weight, bias, targets, rows, logp)
    assert sum(kept) <= (50 + 3) * 4 + 3
    (nll.sum() + kl.sum()).backward()


def test_odd_strides() -> None:
    H, weight, bias, targets, rows, logp = problem(6, 5, 30, 2, torch.float64)
    expected = target_loss(H, weight, bias, targets, rows, logp)
    wide = torch.zeros(12, 11, dtype=torch.float64)
    wide[::2, 1::2] = H
    found = target_loss(wide[::2, 1::2], weight.T.contiguous().T, bias, targets, rows, logp)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_columns(dtype: torch.dtype) -> None:
    for R, V, Q in ((3, 10, 0), (130, 700, 2)):
        for found, expected in both(*problem(R, 0, V, Q, dtype)):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    H, weight, bias, targets, _, _ = problem(0, 5, 30, 0, torch.float32)
    nll, kl = target_loss(H.requires_grad_(), weight, bias, targets, None, None)
    assert nll.shape == kl.shape == (0,)
    nll.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"H": torch.zeros(3)}, r"H must be float of shape \[R, d\]"),
        ({"H": torch.zeros(3, 4).int()}, "H must be float"),
        (
            {"weight": torch.zeros(9, 5)},
            r"weight must be float of shape \[V, 4\], got torch.float32 \[9, 5\]",
        ),
        ({"weight": torch.zeros(0, 4)}, "weight must have at least one row"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \[9\], got \[8\]"),
        ({"targets": torch.zeros(3)}, "targets must be int64"),
        ({"targets": torch.zeros(2).long()}, r"targets must be int64 of shape \[3\], got torch.int64 \[2\]"),
        ({"kl_rows": torch.zeros(1).long()}, "kl_rows and kl_logp must be given together"),
        (
            {"kl_rows": torch.zeros(1).long(), "kl_logp": torch.zeros(2, 9)},
            r"kl_logp must have shape \[1, 9\], got \[2, 9\]",
        ),
        ({"kl_rows": torch.zeros(1), "kl_logp": torch.zeros(1, 9)}, "kl_rows must be int64"),
        ({"softcap": 0.0}, "softcap must be > 0 or None, got 0.0"),
        ({"targets": torch.zeros(3).long().to("meta")}, "targets must be on H's device cpu, got meta"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "H": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "bias": None,
        "targets": torch.zeros(3).long(),
        "kl_rows": None,
        "kl_logp": None,
    } | change
    with pytest.raises(ValueError, match=message):
        target_loss(**arguments)  # type: ignore[arg-type]


def test_a_target_or_row_that_is_not_there() -> None:
    H, weight, bias, targets, _, logp = problem(3, 4, 9, 1, torch.float32)
    with pytest.raises(IndexError, match="targets must be below 9, the rows of weight, got 9"):
        target_loss(H, weight, bias, torch.tensor([0, 9, -1]), None, None)
    for row in (3, -4):
        with pytest.raises(IndexError, match=rf"kl_rows must be rows of H, below 3, got \[{row}\]"):
            target_loss(H, weight, bias, targets, torch.tensor([row]), logp)


def test_opcheck_and_compile() -> None:
    H, weight, bias, targets, rows, logp = problem(4, 5, 20, 2, torch.float32)
    torch.library.opcheck(_op, (H.clone().requires_grad_(), weight, bias, targets, rows, logp, 0.0, True))
    torch.library.opcheck(_op, (H, weight, None, targets, None, None, 5.0, False))

    def loss(h: Tensor) -> Tensor:
        nll, kl = target_loss(h, weight, bias, targets, rows, logp)
        return nll.sum() + kl.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, other = H.clone().requires_grad_(), H.clone().requires_grad_()
    compiled(one).backward(), loss(other).backward()
    assert one.grad is not None and other.grad is not None
    torch.testing.assert_close(one.grad, other.grad)
