"""edit_solve: the identities of the closed-form family, its edge cases, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.edit_solve import direct, metric_matrix
from reference.edit_solve import edit_solve as reference
from torch import Tensor

import fastedit
from fastedit.ops.edit_solve import (
    CholeskyMetric,
    EditProblem,
    IdentityMetric,
    Metric,
    PackedMetric,
    ProjectorMetric,
    _op,
    apply_metric,
    cholesky_factor,
    edit_residual,
    edit_solve,
    edit_solve_layers,
)
from fastedit.ops.packed_solve import pack_factor, unpack_factor

EPS = 2.0**-53
KINDS = ["cholesky", "packed", "refined", "basis", "complement", "identity"]
seeds = st.integers(0, 10_000)
counts = st.integers(1, 24)


def moment(f: int, condition: float, generator: torch.Generator) -> Tensor:
    """A symmetric positive definite [f, f] with eigenvalues spread over `condition`."""
    Q = torch.linalg.qr(torch.randn(f, f, generator=generator, dtype=torch.float64))[0]
    return (Q * torch.logspace(0, -float(torch.log10(torch.tensor(condition))), f, dtype=torch.float64)) @ Q.T


def make(kind: str, f: int, generator: torch.Generator) -> Metric:
    if kind in ("cholesky", "packed", "refined"):
        C = moment(f, 1e3, generator)
        lower = cholesky_factor(C)
        if kind == "refined":
            return CholeskyMetric(lower.float(), C)
        return PackedMetric.of(lower) if kind == "packed" else CholeskyMetric(lower)
    if kind == "identity":
        return IdentityMetric()
    basis = torch.linalg.qr(torch.randn(f, f // 2 + 1, generator=generator, dtype=torch.float64))[0]
    return ProjectorMetric(basis, complement=kind == "complement")


def problem(seed: int, n: int, f: int, d: int, m: int = 0) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    K = torch.randn(n, f, generator=generator, dtype=torch.float64)
    R = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return K, R, torch.randn(m, f, generator=generator, dtype=torch.float64), generator


def solve(metric: Metric, K: Tensor, R: Tensor, **options: object) -> Tensor:
    left, right = edit_solve(metric, K, R, **options)  # type: ignore[arg-type]
    rank = min(R.shape)
    assert left.shape == (R.shape[1], rank) and right.shape == (rank, K.shape[1])
    assert left.dtype == right.dtype == torch.float64
    return left @ right


def twin(metric: Metric) -> Tensor:
    """M [20, 20] as the twin forms it."""
    return metric_matrix(plain(metric), 20)


def plain(metric: Metric) -> Metric:
    """The same metric in the forms that the twin knows."""
    if isinstance(metric, PackedMetric):
        return CholeskyMetric(unpack_factor(metric.packed, metric.width))
    if isinstance(metric, CholeskyMetric) and metric.moment is not None:
        return CholeskyMetric(cholesky_factor(metric.moment))
    return metric


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), seed=seeds, n=counts, m=st.integers(0, 12), d=st.integers(1, 30))
def test_equals_the_definition(kind: str, seed: int, n: int, m: int, d: int) -> None:
    f = 20  # n + m on both sides of it: the dual and the direct form
    K, R, history, generator = problem(seed, n, f, d, m)
    metric = make(kind, f, generator)
    left, right = reference(plain(metric), K, R, mu=2.0, history=history)
    assert relative(solve(metric, K, R, mu=2.0, history=history), left @ right) < 1e-9


@pytest.mark.parametrize("n", [1, 5, 40, 90])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
def test_equals_the_direct_solve_of_the_papers(condition: float, n: int) -> None:
    """rel <= max(1e-9, 10 kappa eps) against R K^T (mu C + K K^T)^-1 by LU."""
    f, d, mu = 64, 24, 15.0
    K, R, history, generator = problem(n, n, f, d, 7)
    C = moment(f, condition, generator)
    metric = CholeskyMetric(cholesky_factor(C))
    A = mu * C + K.T @ K + history.T @ history
    kappa = float(torch.linalg.cond(A))
    expected = direct(C, K, R, mu=mu, history=history)
    assert relative(solve(metric, K, R, mu=mu, history=history), expected) <= max(1e-9, 10 * kappa * EPS)


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(KINDS), seed=seeds, n=st.integers(2, 24))
def test_the_order_of_edits_does_not_matter(kind: str, seed: int, n: int) -> None:
    K, R, history, generator = problem(seed, n, 20, 9, 3)
    metric = make(kind, 20, generator)
    order = torch.randperm(n, generator=generator)
    one = solve(metric, K, R, mu=1.5, history=history)
    other = solve(metric, K[order], R[order], mu=1.5, history=history[torch.tensor([2, 0, 1])])
    assert relative(other, one) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_empty_history_is_no_history(kind: str) -> None:
    K, R, history, generator = problem(0, 6, 20, 9)
    metric = make(kind, 20, generator)
    with_empty = edit_solve(metric, K, R, mu=1.0, history=history)
    for found, expected in zip(with_empty, edit_solve(metric, K, R, mu=1.0)):
        assert torch.equal(found, expected)


def test_history_is_the_same_as_adding_its_moment() -> None:
    K, R, history, generator = problem(1, 4, 30, 8, 9)
    C = moment(30, 1e3, generator)
    added = CholeskyMetric(cholesky_factor(5.0 * C + history.T @ history))
    expected = solve(added, K, R, mu=1.0)
    found = solve(CholeskyMetric(cholesky_factor(C)), K, R, mu=5.0, history=history)
    assert relative(found, expected) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mu_gives_the_first_order_update(kind: str) -> None:
    K, R, _, generator = problem(2, 5, 20, 9)
    metric = make(kind, 20, generator)
    mu = 1e12
    expected = R.T @ K @ twin(metric)
    assert relative(mu * solve(metric, K, R, mu=mu), expected) < 1e-7


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), seed=seeds, n=st.integers(1, 9), d=st.integers(1, 12))
def test_without_mu_the_keys_are_mapped_exactly(kind: str, seed: int, n: int, d: int) -> None:
    K, R, _, generator = problem(seed, n, 20, d)
    metric = make(kind, 20, generator)
    W = torch.randn(d, 20, generator=generator, dtype=torch.float64)
    delta = solve(metric, K, R, mu=0.0)
    torch.testing.assert_close((W + delta) @ K.T, W @ K.T + R.T, rtol=1e-8, atol=1e-8)


def test_without_mu_history_keeps_its_outputs() -> None:
    K, R, history, generator = problem(3, 4, 30, 8, 5)
    delta = solve(make("cholesky", 30, generator), K, R, mu=0.0, history=history)
    assert float((delta @ history.T).abs().max()) < 1e-10
    torch.testing.assert_close(delta @ K.T, R.T, rtol=1e-9, atol=1e-9)


def test_duplicate_keys_without_mu_average_their_residuals() -> None:
    K, R, _, generator = problem(4, 3, 20, 8)
    metric = make("cholesky", 20, generator)
    twice = solve(metric, torch.cat([K, K[:1]]), torch.cat([R, R[:1] + 2.0]), mu=0.0)
    once = solve(metric, K, torch.cat([R[:1] + 1.0, R[1:]]), mu=0.0)
    assert relative(twice, once) < 1e-8


def test_duplicate_keys_with_mu_are_harmless() -> None:
    K, R, _, generator = problem(5, 3, 20, 8)
    C = moment(20, 1e3, generator)
    K, R = torch.cat([K, K]), torch.cat([R, R])
    expected = direct(C, K, R, mu=0.5)
    assert relative(solve(CholeskyMetric(cholesky_factor(C)), K, R, mu=0.5), expected) < 1e-10


def test_more_keys_than_dimensions_without_mu_is_least_squares() -> None:
    K, R, _, _ = problem(6, 50, 20, 8)
    expected = torch.linalg.lstsq(K, R).solution.T
    assert relative(solve(IdentityMetric(), K, R, mu=0.0), expected) < 1e-9


def test_the_update_stays_in_the_null_space() -> None:
    K, R, history, generator = problem(7, 6, 40, 8, 11)
    U = torch.linalg.qr(torch.randn(40, 15, generator=generator, dtype=torch.float64))[0]
    for n in (6, 2):
        delta = solve(ProjectorMetric(U, complement=True), K[:n], R[:n], mu=10.0, history=history)
        assert float((delta @ U).norm() / delta.norm()) < 1e-14
    # A key that is almost all in the projected-out space still leaves nothing of it behind.
    steep = 1e8 * U[:, :1].T + K[:1]
    delta = solve(ProjectorMetric(U, complement=True), steep, R[:1], mu=10.0)
    assert float((delta @ U).norm() / delta.norm()) < 1e-12


def test_both_sides_of_a_projector_agree() -> None:
    K, R, history, generator = problem(8, 6, 40, 8, 11)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    one = solve(ProjectorMetric(Q[:, :25]), K, R, mu=10.0, history=history)
    other = solve(ProjectorMetric(Q[:, 25:], complement=True), K, R, mu=10.0, history=history)
    assert relative(one, other) < 1e-12


def test_alphaedit_equals_its_published_system() -> None:
    K, R, history, generator = problem(9, 6, 40, 8, 11)
    U = torch.linalg.qr(torch.randn(40, 25, generator=generator, dtype=torch.float64))[0]
    P = U @ U.T
    A = P @ (K.T @ K + history.T @ history) + 10.0 * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.solve(A, P @ K.T @ R).T
    assert relative(solve(ProjectorMetric(U), K, R, mu=10.0, history=history), expected) < 1e-10


def test_emmet_is_memit_with_the_product_of_its_weights() -> None:
    K, R, _, generator = problem(10, 6, 40, 8)
    C, w, eps = moment(40, 1e4, generator), 100.0, 0.15
    inverse = torch.linalg.inv(w * C)
    adj = inverse @ K.T @ torch.linalg.inv(K @ inverse @ K.T + eps * torch.eye(6, dtype=torch.float64))
    assert relative(solve(CholeskyMetric(cholesky_factor(C)), K, R, mu=w * eps), R.T @ adj.T) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 15, 35])
def test_layers_are_a_batch(kind: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    K = torch.randn(3, n, 20, generator=generator, dtype=torch.float64)
    R = torch.randn(3, n, 9, generator=generator, dtype=torch.float64)
    history = torch.randn(3, 4, 20, generator=generator, dtype=torch.float64)
    metrics = [make(kind, 20, generator) for _ in range(3)]
    batch: Metric = IdentityMetric()
    if kind in ("cholesky", "refined"):
        lowers = torch.stack([metric.lower for metric in metrics])  # type: ignore[union-attr]
        moments = [metric.moment for metric in metrics if isinstance(metric, CholeskyMetric)]
        batch = CholeskyMetric(lowers, torch.stack(moments) if kind == "refined" else None)  # type: ignore[arg-type]
    elif kind == "packed":
        packed = torch.stack([metric.packed for metric in metrics])  # type: ignore[union-attr]
        batch = PackedMetric(packed, 20)
    elif kind != "identity":
        basis = torch.stack([metric.basis for metric in metrics])  # type: ignore[union-attr]
        batch = ProjectorMetric(basis, complement=kind == "complement")
    for mu in (0.0, 3.0):
        if mu == 0.0 and n + 4 > 10:
            continue  # a rank-deficient batch falls to the pseudo-inverse as a whole; single ones are tested above
        left, right = edit_solve(batch, K, R, mu=mu, history=history)
        for layer in range(3):
            one = solve(metrics[layer], K[layer], R[layer], mu=mu, history=history[layer])
            assert relative(left[layer] @ right[layer], one) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_keys_are_solved_in_float64(dtype: torch.dtype) -> None:
    K, R, _, generator = problem(11, 6, 40, 8)
    metric = make("cholesky", 40, generator)
    K, R = K.to(dtype), R.to(dtype)
    assert torch.equal(solve(metric, K, R, mu=2.0), solve(metric, K.double(), R.double(), mu=2.0))


def test_layouts_and_gradients() -> None:
    K, R, history, generator = problem(12, 6, 40, 8, 5)
    metric = make("cholesky", 40, generator)
    assert isinstance(metric, CholeskyMetric)
    expected = solve(metric, K, R, mu=2.0, history=history)
    wide = torch.zeros(12, 81, dtype=torch.float64)
    wide[::2, 1::2] = K
    row_major = CholeskyMetric(metric.lower.contiguous())
    parameter = torch.nn.Parameter(R.T.contiguous().T)
    found = solve(row_major, wide[::2, 1::2], parameter, mu=2.0, history=history.T.contiguous().T)
    assert not found.requires_grad
    assert relative(found, expected) < 1e-12


def test_results_do_not_share_memory_with_inputs() -> None:
    K, R = torch.ones(1, 5, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    left, right = edit_solve(IdentityMetric(), K, R, mu=1.0)
    left.zero_(), right.zero_()
    assert K.eq(1).all() and R.eq(1).all()


def test_no_edits() -> None:
    K, R, _, generator = problem(13, 0, 20, 8)
    delta = solve(make("cholesky", 20, generator), K, R, mu=1.0)
    assert delta.shape == (8, 20) and delta.eq(0).all()


def test_apply_metric() -> None:
    K, _, _, generator = problem(14, 5, 20, 8)
    for kind in KINDS:
        metric = make(kind, 20, generator)
        torch.testing.assert_close(apply_metric(metric, K.float()), K.float().double() @ twin(metric))


@pytest.mark.parametrize("jitter", [0.0, 1e-3])
def test_cholesky_factor(jitter: float) -> None:
    C = moment(40, 1e6, torch.Generator().manual_seed(0))
    C[0, 1:] = float("nan")  # the upper triangle is not read
    lower = cholesky_factor(C, jitter=jitter)
    expected = C.tril() + C.tril(-1).T
    expected.diagonal().mul_(1.0).add_(jitter * float(C.diagonal().mean()))
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(lower, lower.tril())
    assert cholesky_factor(C.float(), jitter=jitter).dtype == torch.float64


def test_too_few_samples_says_how_many_are_needed() -> None:
    keys = torch.randn(30, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"C \[64, 64\] is singular: about 3\d .* collect at least 64 tokens"
    ):
        cholesky_factor(keys.T @ keys / 30)
    assert cholesky_factor(keys.T @ keys / 30, jitter=1e-6).isfinite().all()


def test_dead_neurons_are_counted() -> None:
    keys = torch.randn(300, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys[:, [3, 17]] = 0
    with pytest.raises(ValueError, match=r"2 of 64 neurons never fired"):
        cholesky_factor(keys.T @ keys)


def test_bad_input_names_the_argument() -> None:
    K, R, _, generator = problem(15, 5, 20, 8)
    metric = make("cholesky", 20, generator)
    cases: list[tuple[dict[str, object], str]] = [
        ({"metric": "C"}, "metric must be CholeskyMetric"),
        (
            {"metric": CholeskyMetric(torch.eye(20))},
            "metric.lower must be float64, got torch.float32, or float32 beside metric.moment",
        ),
        ({"metric": CholeskyMetric(torch.eye(9).double())}, r"metric.lower must be \[20, 20\]"),
        ({"metric": CholeskyMetric(torch.eye(20), torch.eye(9))}, r"metric.moment must be float \[20, 20\]"),
        ({"metric": CholeskyMetric(torch.eye(20).double().expand(2, 20, 20))}, "must have K's batch shape"),
        ({"metric": PackedMetric(torch.zeros(9).double(), 20)}, r"metric.packed must be \[..., 400\]"),
        ({"metric": PackedMetric(torch.zeros(400), 20)}, "metric.packed must be float64"),
        ({"R": []}, "R must be a tensor or a sequence of at least one"),
        ({"R": [R, R[:3]]}, "R must be float with one row per key"),
        ({"weights": torch.ones(3)}, "weights must be None without history"),
        ({"history": K, "weights": torch.ones(3)}, r"weights must be float \[5\]"),
        ({"history": K, "weights": -torch.ones(5)}, "weights must be finite and >= 0"),
        ({"metric": ProjectorMetric(torch.zeros(9, 3))}, r"metric.basis must be \[20, r\]"),
        ({"K": K.int()}, "K must be float"),
        ({"K": K[0]}, "K must be float"),
        ({"R": R[:3]}, "R must be float with one row per key"),
        ({"mu": -1.0}, "mu must be finite and >= 0, got -1.0"),
        ({"mu": float("nan")}, "mu must be finite"),
        ({"history": K[:, :7]}, "history must hold keys like K"),
        ({"R": R.to("meta")}, "R must be on K's device"),
    ]
    for change, message in cases:
        arguments: dict[str, object] = {"metric": metric, "K": K, "R": R, "mu": 1.0} | change
        with pytest.raises((ValueError, TypeError), match=message):
            edit_solve(**arguments)  # type: ignore[arg-type]
    K[2, 3] = float("nan")
    for mu in (0.0, 1.0):
        for rows in (5, 1, 18):
            bad = K[2:3].repeat(rows, 1)
            with pytest.raises(ValueError, match="must be finite"):
                edit_solve(metric, bad, R[:1].repeat(rows, 1), mu=mu)
    with pytest.raises(ValueError, match="C must be a square float matrix"):
        cholesky_factor(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="jitter must be >= 0, got -1"):
        cholesky_factor(torch.eye(3), jitter=-1)
    with pytest.raises(ValueError, match="1 entries are not"):
        cholesky_factor(torch.diag(torch.tensor([1.0, float("inf")])))


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), seed=seeds, n=counts, m=st.integers(0, 12), d=st.integers(1, 30))
def test_the_residual_of_a_solution_is_rounding(kind: str, seed: int, n: int, m: int, d: int) -> None:
    K, R, history, generator = problem(seed, n, 20, d, m)
    metric = make(kind, 20, generator)
    left, right = edit_solve(metric, K, R, mu=2.0, history=history)
    # With a refined metric K C^-1 comes as a whole, exact to kappa eps = 2e-13, not as two halves whose Gram matrix is
    # theirs to rounding; what solves with that matrix multiplies the error by its condition, some hundreds here.
    rounding = 1e-10 if kind == "refined" else 1e-11
    assert float(edit_residual(metric, K, R, left, right, mu=2.0, history=history)) < rounding
    assert float(edit_residual(metric, K, R, left, 1.001 * right, mu=2.0, history=history)) > 1e-5


def test_the_residual_without_mu_and_in_batches() -> None:
    K, R, history, generator = problem(17, 6, 20, 8, 3)
    metric = make("packed", 20, generator)
    left, right = edit_solve(metric, K, R, mu=0.0)
    assert float(edit_residual(metric, K, R, left, right, mu=0.0)) < 1e-11
    twice = [torch.stack([tensor, 2 * tensor]) for tensor in (K, R, history)]
    left, right = edit_solve(metric, twice[0], twice[1], mu=1.0, history=twice[2])
    residual = edit_residual(metric, twice[0], twice[1], left, right, mu=1.0, history=twice[2])
    assert residual.shape == (2,) and float(residual.max()) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4, 30])
def test_weights_count_past_keys(kind: str, n: int) -> None:
    K, R, history, generator = problem(18, n, 20, 8, 4)
    metric = make(kind, 20, generator)
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0])
    repeated = history[torch.tensor([0, 1, 1, 1, 3, 3])]
    expected = solve(metric, K, R, mu=2.0, history=repeated)
    assert relative(solve(metric, K, R, mu=2.0, history=history, weights=weights), expected) < 1e-10


@pytest.mark.parametrize("n", [3, 15])
def test_several_targets_share_their_keys(n: int) -> None:
    K, R, history, generator = problem(19, n, 20, 9, 4)
    metric = make("packed", 20, generator)
    left, right = edit_solve(metric, K, [R, R[:, :2].float()], mu=2.0, history=history)
    assert isinstance(left, tuple) and [part.shape[0] for part in left] == [9, 2]
    assert relative(left[0] @ right, solve(metric, K, R, mu=2.0, history=history)) < 1e-12
    second = solve(metric, K, R[:, :2].float(), mu=2.0, history=history)
    assert relative(left[1] @ right, second) < 1e-12


def test_layers_in_one_call() -> None:
    K, R, history, generator = problem(20, 6, 20, 8, 4)
    problems = {
        "h.1": EditProblem(metric=make("packed", 20, generator), K=K, R=R, mu=2.0),
        "h.2": EditProblem(metric=IdentityMetric(), K=2 * K, R=R, mu=1.0),
        "h.3": EditProblem(metric=make("basis", 20, generator), K=K[:3], R=R[:3], mu=2.0, history=history),
        "h.4": EditProblem(metric=IdentityMetric(), K=K, R=3 * R, mu=1.0),
        "h.5": EditProblem(metric=IdentityMetric(), K=K, R=R, mu=4.0, history=history, weights=torch.ones(4)),
        "h.6": EditProblem(
            metric=IdentityMetric(), K=K + 1, R=R, mu=4.0, history=history, weights=torch.ones(4)
        ),
    }
    found = edit_solve_layers(problems)
    assert list(found) == list(problems) and edit_solve_layers({}) == {}
    for name, p in problems.items():
        left, right = found[name]
        one = solve(p.metric, p.K, p.R, mu=p.mu, history=p.history, weights=p.weights)
        assert relative(left @ right, one) < 1e-12
    bad = problems | {"h.9": EditProblem(metric=IdentityMetric(), K=K, R=R[:2], mu=1.0)}
    with pytest.raises(ValueError, match=r"h.9: R must be float with one row per key"):
        edit_solve_layers(bad)
    nan = EditProblem(metric=problems["h.1"].metric, K=K * float("nan"), R=R, mu=1.0)
    with pytest.raises(ValueError, match=r"h.7: K, history and the metric must be finite"):
        edit_solve_layers(problems | {"h.7": nan})


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
def test_a_float32_factor_is_refined_to_float64(condition: float) -> None:
    f, n = 64, 5
    K, R, history, generator = problem(21, n, f, 24, 7)
    C = moment(f, condition, generator)
    C = (C + C.T) / 2
    # From the float64 factor where float32 cannot factor C at all: it is then still a preconditioner.
    metric = CholeskyMetric(cholesky_factor(C).float(), C)
    expected = solve(CholeskyMetric(cholesky_factor(C)), K, R, mu=1.0, history=history)
    assert relative(solve(metric, K, R, mu=1.0, history=history), expected) < max(1e-11, 10 * condition * EPS)
    rounded = CholeskyMetric(metric.lower.double())
    if condition > 1e3:  # what refinement repairs
        assert relative(solve(rounded, K, R, mu=1.0, history=history), expected) > 1e-7
    assert torch.equal(apply_metric(metric, K * 0), K * 0)


def test_a_factor_of_another_matrix_is_an_error() -> None:
    K, R, _, generator = problem(22, 3, 64, 8)
    C = moment(64, 1e12, generator)
    metric = CholeskyMetric(torch.eye(64), (C + C.T) / 2)
    with pytest.raises(ValueError, match="metric.lower in float32 is too far from metric.moment"):
        solve(metric, K, R, mu=1.0)


def test_a_gram_matrix_that_is_not_definite_says_so() -> None:
    K, R, _, _ = problem(23, 2, 40, 8)
    with pytest.raises(
        ValueError, match=r"Gram matrix of the keys \[4, 4\] is not positive definite .* larger mu"
    ):
        edit_solve(IdentityMetric(), torch.cat([1e12 * K, 1e12 * K]), torch.cat([R, R]), mu=1e-9)


@pytest.mark.parametrize("n", [1, 33, 100, 320])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
def test_packed_equals_the_direct_solve_of_the_papers(condition: float, n: int) -> None:
    """Over several block columns of the factor, within max(1e-9, 10 kappa eps)."""
    f, d, mu = 300, 24, 15.0
    K, R, history, generator = problem(n, n, f, d, 7)
    C = moment(f, condition, generator)
    metric = PackedMetric.of(cholesky_factor(C))
    kappa = float(torch.linalg.cond(mu * C + K.T @ K + history.T @ history))
    expected = direct(C, K, R, mu=mu, history=history)
    assert relative(solve(metric, K, R, mu=mu, history=history), expected) <= max(1e-9, 10 * kappa * EPS)


def test_packed_solves_do_not_depend_on_the_implementation(cpu_level: str) -> None:
    f = 200
    K, R, history, generator = problem(24, 33, f, 50, 20)
    metric = PackedMetric.of(cholesky_factor(moment(f, 1e4, generator)))
    assert [row.name for row in fastedit.explain("edit_solve", metric, K, R, mu=1.0) if row.chosen] == ["cpu"]
    found = solve(metric, K, R, mu=2.0, history=history)
    with fastedit.backend("eager"):
        assert relative(found, solve(metric, K, R, mu=2.0, history=history)) < 1e-12
    with fastedit.backend("cpu"):
        assert relative(found, solve(metric, K, R, mu=2.0, history=history)) < 1e-12
        with pytest.raises(RuntimeError, match="only solves with a packed factor are compiled"):
            solve(IdentityMetric(), K, R, mu=2.0)


def test_opcheck_and_explain() -> None:
    K, R, history, generator = problem(16, 5, 20, 8, 3)
    metric = make("cholesky", 20, generator)
    assert isinstance(metric, CholeskyMetric)
    torch.library.opcheck(_op, ("cholesky", metric.lower, K.float(), R.float(), 1.0, history))
    torch.library.opcheck(_op, ("identity", None, K[:1], R[:1], 1.0, None))
    torch.library.opcheck(_op, ("identity", None, K, R[:, :2], 0.0, None))
    torch.library.opcheck(_op, ("packed", pack_factor(metric.lower), K, R, 1.0, history))
    moment = metric.lower @ metric.lower.mT
    torch.library.opcheck(_op, ("refined", metric.lower.float(), K, R, 1.0, history, moment))
    rows = fastedit.explain("edit_solve", metric, K, R, mu=1.0)
    assert [(row.name, row.chosen) for row in rows] == [("cpu", False), ("eager", True)]
