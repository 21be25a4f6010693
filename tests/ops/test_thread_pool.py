"""The pool under the CPU kernels: several callers at once, a forked child, more threads than tasks."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

pytestmark = pytest.mark.usefixtures("native_cpu")


def product(K: torch.Tensor, threads: int) -> torch.Tensor:
    from fastedit import _cpu

    d = K.shape[1]
    C = torch.zeros(d, d, dtype=torch.float64)
    _cpu.second_moment([(K.data_ptr(), d, C.data_ptr(), d)], 0, 1, 0, K.shape[0], d, True, threads)
    return C


@pytest.fixture
def keys() -> torch.Tensor:
    return torch.randn(300, 400, generator=torch.Generator().manual_seed(0))


def test_any_number_of_threads_gives_the_same_bits(keys: torch.Tensor) -> None:
    one = product(keys, 1)
    for threads in (0, 2, 3, 64, 2):
        assert torch.equal(product(keys, threads), one)


def test_several_callers_at_once(keys: torch.Tensor) -> None:
    expected, results = product(keys, 1), []

    def call() -> None:
        for _ in range(5):
            results.append(product(keys, 2))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 20 and all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_gets_its_own_threads(keys: torch.Tensor) -> None:
    from fastedit import _cpu

    expected = product(keys, 3)  # the parent's pool exists now; its threads do not live on in the child
    C, d = torch.zeros_like(expected), keys.shape[1]
    # The child may call no torch op: OpenMP hangs after a fork.
    wanted, result = expected.numpy().tobytes(), C.numpy()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _cpu.second_moment([(keys.data_ptr(), d, C.data_ptr(), d)], 0, 1, 0, keys.shape[0], d, True, 3)
            status = 0 if result.tobytes() == wanted else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
