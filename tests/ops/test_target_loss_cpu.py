"""target_loss on AMX tiles: several chunks, parts and blocks of rows, every pair of types, layouts, poison, threads."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from reference.target_loss import target_loss as reference
from torch import Tensor

import fastedit
from fastedit.ops.target_loss import _op

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def _amx() -> bool:
    if importlib.util.find_spec("fastedit._cpu") is None:
        return False
    from fastedit import _cpu

    return "amx" in _cpu.info()["isa_levels"]


needs_amx = pytest.mark.skipif(
    not _amx(), reason="needs a CPU with AMX and fastedit._cpu built: `make build`"
)
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(
    R: int, d: int, V: int, Q: int, hidden: torch.dtype = torch.float32, head: torch.dtype = torch.float32
) -> Problem:
    """H, weight, bias, targets, kl_rows, kl_logp."""
    generator = torch.Generator().manual_seed(R + d + V + Q)
    H, weight = torch.randn(R, d, generator=generator), torch.randn(V, d, generator=generator) / d**0.5
    bias = torch.randn(V, generator=generator)
    targets = torch.randint(-1, V, (R,), generator=generator)
    rows = torch.randint(0, R, (Q,), generator=generator)
    logp = torch.log_softmax(torch.randn(Q, V, generator=generator), -1)
    return (3 * H).to(hidden), weight.to(head), bias, targets, rows, logp


def exact(inputs: Problem, softcap: float) -> list[Tensor]:
    """nll, kl, and the gradients of each row's nll and of each divergence, in float64."""
    H, weight, bias, targets, rows, logp = inputs
    h = H.double().requires_grad_()
    wide = (weight.double(), bias.double(), targets, rows, logp.double())
    nll, kl = reference(h, *wide, softcap=softcap or None)
    (d_nll,) = torch.autograd.grad(nll.sum(), h, retain_graph=True)
    d_kl = [torch.autograd.grad(one, h, retain_graph=True)[0][row] for one, row in zip(kl, rows)]
    return [nll.detach(), kl.detach(), d_nll, torch.stack(d_kl) if d_kl else d_nll.new_zeros(0, H.shape[1])]


def run(inputs: Problem, softcap: float = 0.0, with_grad: bool = True) -> list[Tensor]:
    with fastedit.backend("cpu"):
        return list(_op(*inputs, softcap, with_grad))


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """To float32 rounding of sums that cancel: logits and log-probabilities here are of order ten."""
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        if ours.numel():
            # Rows of losses and of gradients: none may be lost in the norm of the others.
            size = theirs.abs() if theirs.ndim == 1 else theirs.norm(dim=1)
            error = (ours - theirs).abs() if theirs.ndim == 1 else (ours - theirs).norm(dim=1)
            assert float((error / size.clamp(min=1.0)).max()) < 5e-6


@needs_amx
@pytest.mark.parametrize("hidden", TYPES, ids=str)
@pytest.mark.parametrize("head", TYPES, ids=str)
def test_types(hidden: torch.dtype, head: torch.dtype) -> None:
    """Half precision is exact in planes: what differs from float64 is float32 rounding."""
    for shape in ((3, 33, 1000, 2), (40, 63, 530, 5), (1, 1, 1, 1), (17, 64, 63, 0)):
        for softcap in (0.0, 3.0):
            inputs = problem(*shape, hidden, head)
            close(run(inputs, softcap), exact(inputs, softcap))


@needs_amx
def test_parts_and_blocks() -> None:
    """More rows than a block, a vocabulary of several parts that ends in odd columns, rows that share a divergence."""
    inputs = problem(150, 40, 9001, 7)
    inputs[4][:4] = torch.tensor([149, 3, 149, 128])
    close(run(inputs), exact(inputs, 0.0))


@needs_amx
def test_no_further_from_float64_than_every_logit_kept() -> None:
    inputs = problem(40, 256, 8200, 3)
    expected = exact(inputs, 0.0)
    h = inputs[0].clone().requires_grad_()
    nll, kl = reference(h, *inputs[1:])
    naive = [nll.detach(), kl.detach(), torch.autograd.grad(nll.sum(), h)[0]]
    for ours, theirs, want in zip(run(inputs), naive, expected):
        assert (ours - want).norm() <= 1.5 * (theirs - want).norm() + 1e-7 * want.norm()


@needs_amx
@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(head: torch.dtype) -> None:
    H, weight, bias, targets, rows, logp = problem(5, 70, 300, 2, head=head)
    expected = run((H, weight, bias, targets, rows, logp))
    odd = torch.full((300 * 71 + 1,), torch.nan, dtype=head)[1:].view(300, 71)[:, :70].copy_(weight)
    others = (
        torch.zeros(10, 140)[::2, ::2].copy_(H),
        torch.zeros(600)[::2].copy_(bias),
        torch.zeros(10).long()[::2].copy_(targets),
        torch.zeros(4).long()[::2].copy_(rows),
        torch.zeros(300, 2).T.copy_(logp),
    )
    for view in (odd, weight.T.contiguous().T, weight.clone().requires_grad_().detach()):
        found = run((others[0], view, *others[1:]))
        assert all(a.equal(b) for a, b in zip(found, expected))


@needs_amx
def test_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(20, 50, 600, 3)
    expected = run(inputs)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    assert all(a.equal(b) for a, b in zip(run(inputs), expected))


@needs_amx
def test_nan_stays_in_its_row() -> None:
    for value in (torch.nan, torch.inf):
        inputs = problem(20, 50, 600, 3)
        inputs[4][:] = torch.tensor([4, 5, 4])
        expected = run(inputs)
        inputs[0][5, 7] = value
        nll, kl, d_nll, d_kl = run(inputs)
        others = torch.arange(20) != 5
        wanted = (inputs[3][5] < 0) | nll[5].isnan()
        assert wanted and kl[1].isnan() and d_kl[1].isnan().any()
        assert nll[others].equal(expected[0][others]) and d_nll[others].equal(expected[2][others])
        assert kl[::2].equal(expected[1][::2]) and d_kl[::2].equal(expected[3][::2])


@needs_amx
def test_losses_alone() -> None:
    inputs = problem(20, 50, 5000, 3)
    whole, alone = run(inputs), run(inputs, with_grad=False)
    assert alone[0].equal(whole[0]) and alone[1].equal(whole[1])
    assert alone[2].shape == (20, 0) and alone[3].shape == (3, 0)


@needs_amx
def test_threads_give_the_same_bits() -> None:
    inputs = problem(20, 50, 20_000, 3)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other))


@needs_amx
def test_rows_of_a_divergence_that_are_not_there() -> None:
    H, weight, bias, targets, _, logp = problem(3, 8, 40, 1)
    for row in (3, -4):
        with pytest.raises(IndexError, match=rf"kl_rows must be rows of H, below 3, got \[{row}\]"):
            run((H, weight, bias, targets, torch.tensor([row]), logp))


def test_other_levels_refuse(cpu_level: str) -> None:
    if cpu_level == "amx":
        pytest.skip("the level that has the kernel")
    inputs = problem(3, 8, 40, 1)
    with pytest.raises(
        RuntimeError, match=f"it is for AMX tiles, and the instruction-set level is {cpu_level}"
    ):
        run(inputs)
    assert [row.name for row in fastedit.explain("target_loss", *inputs) if row.chosen] == ["eager"]


@needs_amx
@pytest.mark.parametrize("head", TYPES, ids=str)
def test_a_row_has_the_same_bits_beside_any_others(head: torch.dtype) -> None:
    H, weight, bias, targets, _, _ = problem(150, 40, 5000, 0, head=head)
    whole = run((H, weight, bias, targets, None, None))  # type: ignore[arg-type]
    for some in (slice(0, 1), slice(3, 5), slice(100, 150)):
        part = run((H[some], weight, bias, targets[some], None, None))  # type: ignore[arg-type]
        assert part[0].equal(whole[0][some]) and part[2].equal(whole[2][some])


@needs_amx
def test_what_runs() -> None:
    def chosen(R: int, hidden: torch.dtype, head: torch.dtype) -> str:
        rows = fastedit.explain("target_loss", *problem(R, 8, 40, 1, hidden, head))
        return next(row.name for row in rows if row.chosen)

    assert chosen(1, torch.float32, torch.float32) == chosen(64, torch.float32, torch.float32) == "cpu"
    assert chosen(1, torch.float32, torch.bfloat16) == chosen(64, torch.float16, torch.float16) == "cpu"
    assert chosen(64, torch.float64, torch.float32) == chosen(64, torch.float32, torch.float64) == "eager"
