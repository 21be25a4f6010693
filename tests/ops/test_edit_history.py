"""EditHistory: appending, truncating and folding past keys gives the solution from scratch; its state is the state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.edit_solve import edit_solve as reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastedit.ops import EditHistory
from fastedit.ops.edit_rows import RowFactor
from fastedit.ops.edit_solve import (
    CholeskyMetric,
    IdentityMetric,
    Metric,
    PackedMetric,
    ProjectorMetric,
    cholesky_factor,
    edit_solve,
)

F = 40
KINDS = ["cholesky", "packed", "basis", "complement", "identity"]
kinds = pytest.mark.parametrize("kind", KINDS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: str, f: int = F) -> Metric:
    if kind == "identity":
        return IdentityMetric()
    if kind in ("cholesky", "packed"):
        X = normal(100, 3 * f, f)
        lower = cholesky_factor(X.T @ X / f)
        return PackedMetric.of(lower) if kind == "packed" else CholeskyMetric(lower)
    basis = torch.linalg.qr(normal(101, f, f // 2 + 1))[0]
    return ProjectorMetric(basis, complement=kind == "complement")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def solved(history: EditHistory, K: Tensor, R: Tensor) -> Tensor:
    left, right = history.solve(K, R)
    rank = min(R.shape)
    assert left.shape == (R.shape[1], rank) and right.shape == (rank, K.shape[1])
    assert left.dtype == right.dtype == torch.float64
    return left @ right


def scratch(metric: Metric, K: Tensor, R: Tensor, past: Tensor, weights: Tensor | None = None) -> Tensor:
    left, right = edit_solve(metric, K, R, mu=2.0, history=past, weights=weights)
    return left @ right


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.lists(st.integers(0, 9), max_size=6),
    n=st.integers(1, 40),
    d=st.integers(1, 30),
    fold=st.sampled_from([None, 0.01, 0.3, 0.6]),
)
def test_appending_equals_the_solution_from_scratch(
    kind: str, steps: list[int], n: int, d: int, fold: float | None
) -> None:
    metric, past, K, R = make(kind), normal(0, sum(steps), F), normal(1, n, F), normal(2, n, d)
    history = EditHistory(metric, F, mu=2.0, fold_above=fold)
    for part in past.split(steps):
        history.append(part)
    assert len(history) == sum(steps)
    assert relative(solved(history, K, R), scratch(metric, K, R, past)) < 1e-10


@kinds
def test_equals_the_twin(kind: str) -> None:
    metric, past, K, R = make(kind), normal(0, 25, F), normal(1, 7, F), normal(2, 7, 9)
    plain = CholeskyMetric(make("cholesky").lower) if kind == "packed" else metric  # type: ignore[union-attr]
    for fold in (None, 0.1):
        history = EditHistory(metric, F, mu=2.0, fold_above=fold)
        history.append(past[:11])
        history.append(past[11:])
        left, right = reference(plain, K, R, mu=2.0, history=past)
        assert relative(solved(history, K, R), left @ right) < 1e-9


@settings(deadline=None, max_examples=40)
@given(kept=st.integers(0, 20), dropped=st.integers(0, 20), n=st.integers(1, 5))
def test_append_and_truncate_is_fresh(kept: int, dropped: int, n: int) -> None:
    metric, K, R = make("packed"), normal(1, n, F), normal(2, n, 6)
    past, gone = normal(0, kept, F), normal(3, dropped, F)
    history = EditHistory(metric, F, mu=2.0, fold_above=None)
    history.append(past)
    before = solved(history, K, R)
    history.append(gone)
    history.truncate(dropped)
    assert len(history) == kept and torch.equal(solved(history, K, R), before)
    history.append(gone)  # over what was truncated
    assert relative(solved(history, K, R), scratch(metric, K, R, torch.cat([past, gone]))) < 1e-10


def test_replace_puts_keys_after_the_edit_in_the_place_of_those_before() -> None:
    metric, K, R, past = make("basis"), normal(1, 4, F), normal(2, 4, 6), normal(0, 9, F)
    history = EditHistory(metric, F, mu=2.0)
    history.append(past)
    history.append(K)
    history.replace(K + 0.1)
    expected = scratch(metric, K, R, torch.cat([past, K + 0.1]))
    assert relative(solved(history, K, R), expected) < 1e-10
    with pytest.raises(ValueError, match="must be finite"):
        history.replace(K * float("nan"))
    assert len(history) == 13 and relative(solved(history, K, R), expected) < 1e-10


@kinds
def test_weights(kind: str) -> None:
    metric, past, K, R = make(kind), normal(0, 5, F), normal(1, 3, F), normal(2, 3, 6)
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0])
    history = EditHistory(metric, F, mu=2.0)
    history.append(past[:2], weights=weights[:2])
    history.append(past[2:], weights=weights[2:])
    assert relative(solved(history, K, R), scratch(metric, K, R, past, weights)) < 1e-10


def test_history_of_size_0_is_no_history() -> None:
    K, R = normal(1, 3, F), normal(2, 3, 6)
    for kind in KINDS:
        metric = make(kind)
        history = EditHistory(metric, F, mu=2.0)
        history.append(normal(0, 0, F))
        history.fold()
        left, right = edit_solve(metric, K, R, mu=2.0)
        assert relative(solved(history, K, R), left @ right) < 1e-12
        assert solved(history, K[:0], R[:0]).shape == (6, F) and history.nbytes == 0


def test_the_order_of_past_keys_does_not_matter() -> None:
    metric, past, K, R = make("packed"), normal(0, 30, F), normal(1, 3, F), normal(2, 3, 6)
    one, other = (EditHistory(metric, F, mu=2.0, fold_above=0.3) for _ in range(2))
    one.append(past)
    for row in past.flip(0):
        other.append(row[None])
    assert relative(solved(other, K, R), solved(one, K, R)) < 1e-11


def test_repeated_keys_are_harmless_with_mu() -> None:
    metric, K, R = make("identity"), normal(1, 3, F), normal(2, 3, 6)
    history = EditHistory(metric, F, mu=2.0)
    for _ in range(4):
        history.append(K)
    assert relative(solved(history, K, R), scratch(metric, K, R, K.repeat(4, 1))) < 1e-10


def test_many_keys_over_several_blocks_of_the_factor() -> None:
    f = 500
    metric, past, K, R = make("identity", f), normal(0, 300, f), normal(1, 3, f), normal(2, 3, 6)
    history = EditHistory(metric, f, mu=2.0, fold_above=None)
    for size in (1, 126, 1, 1, 60, 111):
        history.append(past[len(history) : len(history) + size])
    assert relative(solved(history, K, R), scratch(metric, K, R, past)) < 1e-11
    for left in (257, 256, 255, 128, 100):
        history.truncate(len(history) - left)
        assert relative(solved(history, K, R), scratch(metric, K, R, past[:left])) < 1e-11


@kinds
@pytest.mark.parametrize("fold", [None, 0.2])
def test_a_saved_state_gives_the_same_bits(kind: str, fold: float | None, tmp_path: Path) -> None:
    metric, past, K, R = make(kind), normal(0, 30, F), normal(1, 3, F), normal(2, 3, 6)
    history = EditHistory(metric, F, mu=2.0, fold_above=fold)
    for part in past.split(7):
        history.append(part)
    history.truncate(1)
    save_file(history.state(), tmp_path / "history.safetensors")
    again = EditHistory.load(metric, F, load_file(tmp_path / "history.safetensors"))
    assert (len(again), again.open, again.mu, again.fold_above) == (29, history.open, 2.0, fold)
    for _ in range(2):
        for found, expected in zip(again.solve(K, R), history.solve(K, R), strict=True):
            assert torch.equal(found, expected)
        history.append(K), again.append(K)


def test_a_state_does_not_change_with_its_history() -> None:
    history = EditHistory(IdentityMetric(), F, mu=2.0)
    history.append(normal(0, 8, F))
    state = history.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    history.replace(normal(1, 8, F))
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_float32_keys_are_exact_for_the_rounded_keys() -> None:
    metric, past, K, R = IdentityMetric(), normal(0, 20, F), normal(1, 3, F), normal(2, 3, 6)
    history = EditHistory(metric, F, mu=2.0, dtype=torch.float32, fold_above=None)
    history.append(past)
    assert relative(solved(history, K, R), scratch(metric, K, R, past.float())) < 1e-12
    double = EditHistory(metric, F, mu=2.0, fold_above=None)
    double.append(past)
    assert double.nbytes - history.nbytes == 20 * F * 4


def test_folding_bounds_memory_and_keeps_the_solution() -> None:
    metric, K, R = make("complement"), normal(1, 3, F), normal(2, 3, 6)
    history, past = EditHistory(metric, F, mu=2.0), normal(0, 400, F)
    for part in past.split(5):
        history.append(part)
        assert history.open <= 0.6 * F + 5
    assert history.nbytes < 3 * F * F * 8
    assert relative(solved(history, K, R), scratch(metric, K, R, past)) < 1e-10
    with pytest.raises(ValueError, match=f"n must be from 0 to {history.open}"):
        history.truncate(history.open + 1)


def test_layouts_dtypes_and_gradients() -> None:
    metric, past, K, R = make("packed"), normal(0, 6, F), normal(1, 3, F), normal(2, 3, 6)
    history, plain = EditHistory(metric, F, mu=2.0), EditHistory(metric, F, mu=2.0)
    plain.append(past.float())
    wide = torch.zeros(12, 2 * F)
    wide[::2, 1::2] = past
    history.append(torch.nn.Parameter(wide[::2, 1::2]))
    left, right = history.solve(K.T.contiguous().T.requires_grad_(), R.T.contiguous().T)
    assert not right.requires_grad and relative(left @ right, solved(plain, K, R)) < 1e-14


def test_bad_input_names_the_argument() -> None:
    metric = make("packed")
    history = EditHistory(metric, F, mu=2.0)
    history.append(normal(0, 4, F))
    K, R = normal(1, 3, F), normal(2, 3, 6)
    state = history.state()
    lower = make("cholesky").lower  # type: ignore[union-attr]
    for bad, message in [
        (lambda: EditHistory(metric, F, mu=0.0), "mu must be finite and > 0, got 0.0"),
        (lambda: EditHistory(metric, F, mu=1.0, dtype=torch.float16), "dtype must be torch.float64 or"),
        (lambda: EditHistory(metric, F, mu=1.0, fold_above=0.0), "fold_above must be > 0 or None"),
        (lambda: EditHistory(metric, 9, mu=1.0), "metric.packed must be"),
        (
            lambda: EditHistory(CholeskyMetric(lower.float(), lower), F, mu=1.0),
            "metric must have a float64 factor",
        ),
        (
            lambda: EditHistory(CholeskyMetric(lower.expand(2, F, F)), F, mu=1.0),
            "metric must be of one layer",
        ),
        (lambda: history.append(K[:, :5]), rf"K must be float \[n, {F}\]"),
        (lambda: history.append(K.int()), "K must be float"),
        (lambda: history.append(K, weights=torch.ones(2)), r"weights must be \[3\]"),
        (lambda: history.append(K, weights=-torch.ones(3)), "weights must be .* >= 0"),
        (lambda: history.append(K * float("inf")), "must be finite"),
        (lambda: history.solve(K * float("nan"), R), "must be finite"),
        (lambda: history.solve(K, R[:2]), "R must be float with one row per key"),
        (lambda: history.solve(K.to("meta"), R.to("meta")), "K must be on the history's device"),
        (lambda: history.truncate(-1), "n must be from 0 to 4"),
        (lambda: EditHistory.load(make("identity"), F, state), "must come from a history of this metric"),
        (lambda: EditHistory.load(metric, F, {}), "tensors must hold keys"),
        (lambda: EditHistory.load(metric, F, {**state, "keys": state["keys"][:, 1:]}), r"tensors\['keys'\]"),
        (
            lambda: EditHistory.load(metric, F, {**state, "keys": state["keys"][1:]}),
            "factor must be .* for 3 keys",
        ),
        (lambda: EditHistory.load(metric, F, {**state, "folded": state["factor"]}), r"tensors\['folded'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
    assert len(history) == 4
    tiny = EditHistory(IdentityMetric(), F, mu=1e-9)
    tiny.append(1e8 * K)
    with pytest.raises(ValueError, match="3 keys after 3 past ones is not positive definite .* larger mu"):
        tiny.append(1e8 * K)


def test_row_factor() -> None:
    X = normal(0, 400, 300)
    lower = torch.linalg.cholesky(X.T @ X)
    factor, at = RowFactor(), 0
    for n in (1, 127, 3, 0, 150, 19):
        factor.append(lower[at : at + n, :at], lower[at : at + n, at : at + n])
        at += n
    rows = normal(1, 5, 300)
    for m in (300, 257, 129, 128, 3, 0):
        factor.truncate(m)
        assert len(factor) == m
        part = lower[:m, :m]
        forward = torch.linalg.solve_triangular(part, rows[:, :m].mT, upper=False).mT
        backward = torch.linalg.solve_triangular(part.mT, rows[:, :m].mT, upper=True).mT
        torch.testing.assert_close(factor.solve(rows[:, :m], transposed=False), forward)
        torch.testing.assert_close(factor.solve(rows[:, :m], transposed=True), backward)
        again = RowFactor.of(factor.packed(), m)
        assert torch.equal(
            again.solve(rows[:, :m], transposed=True), factor.solve(rows[:, :m], transposed=True)
        )
