"""check_written: exact against the addresses of all bytes, named messages, tensors without memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastedit.ops._written import check_written, share_memory

LAYOUTS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=0, max_size=3)


def places(tensor: Tensor) -> list[int]:
    """The place in `base` of every element."""
    index = torch.arange(200).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return [int(place) for place in index.flatten()]


@settings(deadline=None, max_examples=300)
@given(one=LAYOUTS, other=LAYOUTS, start=st.integers(0, 40))
def test_is_exact(one: list[tuple[int, int]], other: list[tuple[int, int]], start: int) -> None:
    base = torch.zeros(200)
    a = base.as_strided([n for n, _ in one], [s for _, s in one], 20)
    b = base.as_strided([n for n, _ in other], [s for _, s in other], start)
    for tensor in (a, b):
        if len(set(places(tensor))) < tensor.numel():
            with pytest.raises(ValueError, match="x must not overlap itself, got shape"):
                check_written({"x": tensor})
        else:
            check_written({"x": tensor})
    assert share_memory(a, b) == bool(set(places(a)) & set(places(b)))


def test_messages_name_the_tensors() -> None:
    x = torch.zeros(6, 4)
    with pytest.raises(
        ValueError, match=r"W must not overlap itself, got shape \[3, 4\] with strides \[0, 1\]"
    ):
        check_written({"W": torch.zeros(4).expand(3, 4)})
    for tensors in ((x, x), (x, x.T), (x[1:], x[:2]), (x, x.view(torch.int32)), (x[2:], x)):
        with pytest.raises(ValueError, match="b must not share memory with a, for both are written"):
            check_written(dict(zip("ab", tensors)))
    with pytest.raises(ValueError, match="W must not be a negated view"):
        check_written({"W": torch.zeros(3, dtype=torch.complex64).conj().imag})
    check_written({"a": x[:, :2], "b": x[:, 2:], "c": torch.zeros(3), "d": x[:0], "e": x.new_zeros(0, 3)})
    assert not share_memory(x[::2], x[1::2]) and share_memory(x[:, 1:], x[:, :2])


def test_memory_by_two_names() -> None:
    numbers = torch.zeros(8).numpy()
    with pytest.raises(ValueError, match="b must not share memory with a"):
        check_written({"a": torch.from_numpy(numbers), "b": torch.from_numpy(numbers)})


@pytest.mark.filterwarnings("error")
def test_tensors_without_memory_pass() -> None:
    meta = torch.zeros(4, device="meta")
    check_written({"a": meta, "b": meta, "c": meta.expand(3, 4)})
    with FakeTensorMode():
        fake = torch.zeros(4)
        check_written({"a": fake, "b": fake})
        assert not share_memory(fake, fake)
