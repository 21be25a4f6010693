"""branch_attention: values and gradients against every branch by itself, at ugly shapes and under poison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from branch_problem import SHAPES, TENSORS, TOLERANCES, check, problem, widened, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.branch_attention import branch_attention as reference
from torch import Tensor

import fastedit
from fastedit.ops import branch_attention as module
from fastedit.ops.branch_attention import _backward_op, _op, branch_attention


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few branches at a time, so that small problems take several chunks and end in a partial one."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1 << 10)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    B=st.integers(1, 12),
    own=st.sampled_from([(1, 1), (0, 3), (1, 5), (9, 9)]),
    prefix=st.sampled_from([(0, 0), (0, 3), (4, 4), (0, 11)]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    D=st.sampled_from([1, 5, 8]),
    softcap=st.sampled_from([None, 0.7]),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    every_query=st.booleans(),
)
def test_values_and_gradients(
    seed: int,
    B: int,
    own: tuple[int, int],
    prefix: tuple[int, int],
    heads: tuple[int, int],
    D: int,
    softcap: float | None,
    window: int | None,
    every_query: bool,
) -> None:
    H, G = heads
    options = {"softcap": softcap, "window": window}
    check(problem(B, own=own, prefix=prefix, H=H, G=G, D=D, every_query=every_query, seed=seed, **options))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window": 3}], ids=["plain", "softcap, window"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager(shape: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    with fastedit.backend("eager"):
        check(problem(**SHAPES[shape], dtype=dtype, **options))


def test_default_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with fastedit.backend("eager"):
        check(problem(40, H=16, G=16, D=64, prefix=(10, 20), own=(4, 8), dtype=torch.float32))


@pytest.mark.parametrize("options", [{}, {"softcap": 0.9}, {"window": 3}], ids=["plain", "softcap", "window"])
def test_gradcheck(options: dict[str, Any]) -> None:
    arguments = problem(3, own=(1, 3), prefix=(0, 3), D=3, **options)
    rest = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    assert torch.autograd.gradcheck(lambda q, k, v: branch_attention(q, k, v, **rest), leaves)


def test_a_shared_prefix_equals_a_repeated_one() -> None:
    arguments = problem(5, prefix=(4, 4), every_query=True)
    shared = torch.tensor([3, 1, 2, 5]).expand(5, 4)
    k_prefix, v_prefix = torch.randn(2, 9, 2, 8, dtype=torch.float64)
    arguments |= {"columns": shared, "k_prefix": k_prefix, "v_prefix": v_prefix}
    found = with_gradients(branch_attention, arguments)
    rows = shared.reshape(-1)
    arguments |= {
        "columns": torch.arange(20).view(5, 4),
        "k_prefix": k_prefix[rows],
        "v_prefix": v_prefix[rows],
    }
    for one, other in zip(found, with_gradients(branch_attention, arguments)):
        assert torch.equal(one, other)


def test_a_branch_equals_the_end_of_a_whole_row() -> None:
    """Causal attention over prefix and branch as one sequence, by torch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 8, generator=generator, dtype=torch.float64)
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True
    )
    starts = torch.tensor([0, 4])
    columns, offsets = torch.arange(5)[None], torch.arange(4)
    found = branch_attention(
        q[5:], k[5:], v[5:], k[:5], v[:5], columns, starts, offsets, starts, max_q=4, max_k=4, scale=8**-0.5
    )
    torch.testing.assert_close(found, whole.transpose(0, 1)[5:])


def permuted(arguments: dict[str, Any], order: list[int]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The problem with its branches in another order, and where its queries and own keys come from."""
    rows = {}
    for name in ("q_starts", "k_starts"):
        spans = [torch.arange(int(a), int(b)) for a, b in arguments[name].unfold(0, 2, 1)]
        rows[name] = torch.cat([spans[b] for b in order])
        counts = arguments[name].diff()[order]
        arguments = {**arguments, name: torch.cat([torch.zeros(1).long(), counts.cumsum(0)])}
    queries, keys = rows["q_starts"], rows["k_starts"]
    new = {name: arguments[name][keys] for name in ("k", "v")}
    new |= {name: arguments[name][queries] for name in ("q", "q_offsets")}
    return {**arguments, **new, "columns": arguments["columns"][order]}, queries, keys


def test_the_order_of_branches_does_not_matter() -> None:
    arguments = problem(9, dtype=torch.float32)
    out, queries, keys = permuted(arguments, [4, 0, 8, 2, 1, 7, 3, 6, 5])
    torch.testing.assert_close(branch_attention(**out), branch_attention(**arguments)[queries])
    mixed = torch.zeros_like(arguments["k"])
    mixed[keys] = out["k"]
    assert torch.equal(mixed, arguments["k"])


def test_a_branch_at_nan_stays_alone(dtype: torch.dtype = torch.float64) -> None:
    """A diverged branch, of queries, keys or gradient, spoils no other one, not even one without queries."""
    arguments = problem(8, own=(2, 4), prefix=(0, 3), seed=3, dtype=dtype)
    counts = arguments["q_starts"].diff()
    assert (counts == 0).any()
    clean = with_gradients(branch_attention, arguments)
    for bad in counts.nonzero()[:, 0].tolist():
        spans = {name: slice(*arguments[f"{name}_starts"][bad : bad + 2].tolist()) for name in ("q", "k")}
        spoiled = {name: arguments[name].clone() for name in ("q", "k", "v")}
        for name, tensor in spoiled.items():
            tensor[spans["q" if name == "q" else "k"]] = torch.nan
        found = with_gradients(branch_attention, {**arguments, **spoiled})
        for ours, theirs, name in zip(found, clean, ("q", "q", "k", "k")):
            kept = torch.ones(len(ours), dtype=torch.bool)
            kept[spans[name]] = False
            assert torch.equal(ours[kept], theirs[kept])


def test_rounding_is_that_of_float32() -> None:
    """Half precision in, float32 inside: the result is that of the widened inputs, rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        arguments = problem(dtype=dtype)
        floats = ("q", "k", "v", "k_prefix", "v_prefix")
        wide = {**arguments, **{name: arguments[name].float() for name in floats}}
        found, expected = (with_gradients(branch_attention, some, dtype) for some in (arguments, wide))
        for ours, theirs in zip(found, expected):
            assert torch.equal(ours, theirs.to(dtype))


def test_large_scores() -> None:
    arguments = problem(dtype=torch.float32, every_query=True)
    arguments["q"] = 1e4 * arguments["q"]
    found = with_gradients(branch_attention, arguments)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[0].double(), reference(**widened(arguments)), rtol=1e-5, atol=1e-5)


def test_strides(dtype: torch.dtype = torch.float64) -> None:
    """Slices of one fused tensor, of a store of all layers, and an expanded gradient."""
    arguments = problem(every_query=True, H=2, G=2, own=(3, 3), dtype=dtype)
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    fused = torch.stack([q, k, v], 1)  # [N, 3, H, D]
    layers = torch.stack([arguments["k_prefix"], arguments["v_prefix"]], 1)
    views = {"q": fused[:, 0], "k": fused[:, 1], "v": fused[:, 2], "k_prefix": layers[:, 0]}
    expected = branch_attention(**arguments)
    for changed in (views, {"v": v.transpose(0, 1).contiguous().transpose(0, 1)}):
        assert torch.equal(branch_attention(**{**arguments, **changed}), expected)
    leaf = fused.clone().requires_grad_()
    branch_attention(**{**arguments, "q": leaf[:, 0], "k": leaf[:, 1], "v": leaf[:, 2]}).sum().backward()
    one = fused.clone().requires_grad_()
    parts = [one[:, i].contiguous() for i in range(3)]
    out = branch_attention(*parts, **{name: arguments[name] for name in arguments if name not in "qkv"})
    out.backward(torch.ones_like(out))
    assert torch.equal(leaf.grad, one.grad)  # type: ignore[arg-type]


def test_a_strided_last_dimension(dtype: torch.dtype = torch.float64) -> None:
    arguments = problem(dtype=dtype)
    k = arguments["k"]
    odd = torch.zeros(*k.shape[:2], 19, dtype=dtype)[:, :, 1:17:2].copy_(k)
    assert torch.equal(branch_attention(**{**arguments, "k": odd}), branch_attention(**arguments))


def test_what_is_kept_and_what_has_a_gradient() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    arguments = problem(20, own=(4, 8), prefix=(10, 20), every_query=True)
    arguments["q"].requires_grad_()
    arguments["k_prefix"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = branch_attention(**arguments)
    lse = arguments["q"].numel() // arguments["q"].shape[2]
    assert sum(kept.values()) <= sum(arguments[name].numel() for name in TENSORS) + lse
    out.sum().backward()
    assert arguments["q"].grad is not None
    assert arguments["k"].grad is None and arguments["k_prefix"].grad is None
    with torch.no_grad():
        assert not branch_attention(**arguments).requires_grad


@pytest.mark.parametrize("B", [0, 3])
def test_nothing_to_do(B: int, dtype: torch.dtype = torch.float64) -> None:
    arguments = problem(B, own=(2, 2) if B else (0, 0), prefix=(0, 2), dtype=dtype)
    nothing = {"q": arguments["q"][:0], "q_offsets": arguments["q_offsets"][:0], "max_q": 0}
    arguments |= nothing | {"q_starts": torch.zeros(B + 1).long()}
    out, *gradients = with_gradients(branch_attention, arguments)
    assert out.shape == (0, 4, 8)
    assert all(grad.eq(0).all() for grad in gradients)


def test_an_empty_store(dtype: torch.dtype = torch.float64) -> None:
    arguments = problem(prefix=(0, 0), dtype=dtype)
    expected = branch_attention(**arguments)
    arguments |= {name: arguments[name][:0] for name in ("k_prefix", "v_prefix")}
    for C in (0, 3):
        found = branch_attention(**{**arguments, "columns": torch.full((7, C), -1)})
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4)}, r"q must be float of shape \[R, H, D\], got torch.float32 \[3, 4\]"),
        ({"q": torch.zeros(3, 4, 8).int()}, "q must be float"),
        ({"k": torch.zeros(3, 2, 7)}, r"k must be float of shape \[N, G, 8\], got torch.float32 \[3, 2, 7\]"),
        ({"k": torch.zeros(3, 3, 8)}, "q's heads must be a multiple of k's, got 4 and 3"),
        ({"v": torch.zeros(2, 2, 8)}, r"v must be float of shape \[3, 2, 8\]"),
        (
            {"k_prefix": torch.zeros(5, 4, 8)},
            r"k_prefix must be float of shape \[P, 2, 8\], got torch.float32 \[5",
        ),
        ({"v_prefix": torch.zeros(4, 2, 8)}, r"v_prefix must be float of shape \[5, 2, 8\]"),
        ({"columns": torch.zeros(2, 2)}, r"columns must be int64 of shape \[B, C\], got torch.float32"),
        (
            {"q_starts": torch.zeros(2).long()},
            r"q_starts must be int64 of shape \[3\], got torch.int64 \[2\]",
        ),
        ({"q_offsets": torch.zeros(3).int()}, r"q_offsets must be int64 of shape \[3\], got torch.int32"),
        ({"k_starts": torch.zeros(4).long()}, r"k_starts must be int64 of shape \[3\]"),
        ({"max_q": 1}, "max_q must be the most of a branch, 3 over 2 branches, got 1"),
        ({"max_k": 1}, "max_k must be the most of a branch"),
        ({"softcap": 0.0}, "softcap must be > 0 or None, got 0.0"),
        ({"window": 0}, "window must be >= 1 or None, got 0"),
        ({"columns": torch.zeros(2, 2).long().to("meta")}, "columns must be on q's device cpu, got meta"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], message: str) -> None:
    starts = torch.tensor([0, 1, 3])
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 4, 8),
        **{name: torch.zeros(3, 2, 8) for name in ("k", "v")},
        **{name: torch.zeros(5, 2, 8) for name in ("k_prefix", "v_prefix")},
        "columns": torch.zeros(2, 2).long(),
        "q_starts": starts,
        "q_offsets": torch.tensor([0, 0, 1]),
        "k_starts": starts,
        "max_q": 2,
        "max_k": 2,
        "scale": 1.0,
    }
    branch_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        branch_attention(**{**arguments, **change})


def test_opcheck_and_compile() -> None:
    arguments = problem(3, dtype=torch.float32)
    arguments["k_prefix"].nan_to_num_(), arguments["v_prefix"].nan_to_num_()
    tensors = [arguments[name] for name in TENSORS]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    numbers = (arguments["max_q"], arguments["max_k"], 0.3, 2.0, 4)
    torch.library.opcheck(_op, (*leaves, *tensors[3:], *numbers))
    out, lse = _op(*tensors, *numbers)
    torch.library.opcheck(_backward_op, (torch.ones_like(out), lse, *tensors, *numbers))

    def loss(q: Tensor) -> Tensor:
        return branch_attention(**{**arguments, "q": q}).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, other = (arguments["q"].clone().requires_grad_() for _ in range(2))
    compiled(one).backward(), loss(other).backward()
    assert one.grad is not None and other.grad is not None
    torch.testing.assert_close(one.grad, other.grad)


def test_explain() -> None:
    arguments = problem()
    rows = fastedit.explain("branch_attention", **arguments)
    assert rows[-1].name == "eager" and rows[-1].chosen


@pytest.mark.parametrize(
    "test",
    [
        test_a_branch_at_nan_stays_alone,
        test_strides,
        test_an_empty_store,
        lambda dtype: test_nothing_to_do(0, dtype),
        lambda dtype: test_nothing_to_do(3, dtype),
        lambda _: test_rounding_is_that_of_float32(),
        lambda _: test_large_scores(),
        lambda _: test_the_order_of_branches_does_not_matter(),
    ],
    ids=["nan", "strides", "empty store", "no branches", "no queries", "rounding", "large scores", "order"],
)
def test_cpu_like_eager(cpu_level: str, test: Any) -> None:
    with fastedit.backend("cpu"):
        test(torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window": 3}], ids=["plain", "softcap, window"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gpu(backend: str, shape: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    with fastedit.backend(backend):
        check(problem(**SHAPES[shape], dtype=dtype, device="cuda", **options))
