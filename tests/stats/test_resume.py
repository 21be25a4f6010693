"""A collection that is killed continues to the very bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import fastedit.stats.collect as collect_module
from fastedit.arch import resolve
from fastedit.stats import StatisticsStore, collect_statistics

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [0, 2]


def texts(n=120, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"word{rng.randint(0, 99)}" for _ in range(rng.randint(1, 20))) for _ in range(n)]


def collect(corpus=None, directory=None, model=None, **options):
    model = model or tiny_model("gpt2")
    settings = {"batch_tokens": 100, "checkpoint_seconds": 0.0, **options}
    corpus = texts() if corpus is None else corpus
    return collect_statistics(
        model, tiny_tokenizer(), resolve(model), corpus, LAYERS, directory=directory, **settings
    )


def same(a, b):
    return a.keys() == b.keys() and all(
        a[m].count == b[m].count
        and torch.equal(a[m].total, b[m].total)
        and (a[m].provenance.corpus, a[m].provenance.n_texts)
        == (b[m].provenance.corpus, b[m].provenance.n_texts)
        for m in a
    )


@pytest.fixture(scope="module")
def expected():
    torch.set_num_threads(1)
    return collect()


class Stop(Exception):
    pass


def stop_after(batches, error=Stop):
    calls = []

    def progress(state):
        calls.append(state)
        if len(calls) == batches:
            raise error

    return progress


# Windows hold 32 batches; with flush 10**9 only their ends are places to continue from.
@pytest.mark.parametrize(
    ("batches", "flush"), [(1, 1), (37, 1), (2, 350), (45, 350), (1, 10**9), (38, 10**9), (60, 10**9)]
)
def test_stopped_at_any_batch(batches, flush, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_module, "FLUSH_TOKENS", flush)
    uninterrupted = collect()
    with pytest.raises(Stop):
        collect(directory=tmp_path, progress=stop_after(batches))
    states = []
    assert same(collect(directory=tmp_path, progress=states.append), uninterrupted)
    if flush == 1:
        assert states[0].tokens > batches * 40, "work was repeated"
    assert not list(tmp_path.glob("partial_*"))


def test_stopped_again_and_again(expected, tmp_path):
    for batches in (3, 1, 30, 1, 15):
        with pytest.raises(Stop):
            collect(directory=tmp_path, progress=stop_after(batches))
    assert same(collect(directory=tmp_path), expected)


def test_ctrl_c_keeps_a_checkpoint_whatever_the_interval(expected, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        collect(directory=tmp_path, progress=stop_after(30, KeyboardInterrupt), checkpoint_seconds=1e9)
    assert len(list(tmp_path.glob("partial_*"))) == 1
    states = []
    assert same(collect(directory=tmp_path, progress=states.append), expected)
    assert states[0].tokens > 1024, "started again"


def test_ctrl_c_waits_for_the_sums(expected, tmp_path, monkeypatch):
    calls = []
    original = collect_module.Accumulator._take

    def take(self, name):
        calls.append(name)
        if len(calls) == 4:  # inside a flush, between two layers
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return original(self, name)

    monkeypatch.setattr(collect_module.Accumulator, "_take", take)
    with pytest.raises(KeyboardInterrupt):
        collect(directory=tmp_path, checkpoint_seconds=1e9)
    assert len(calls) == 4
    monkeypatch.undo()
    assert same(collect(directory=tmp_path), expected)


CHILD = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/stats"]
import torch
torch.set_num_threads(1)
from test_resume import collect
import time
print("ready", flush=True)
collect(directory=sys.argv[1], progress=lambda state: time.sleep(0.02))
"""


def test_killed_at_random_moments(expected, tmp_path):
    """SIGKILL, a few times in a row, then to the end."""
    rng = random.Random()
    command = [sys.executable, "-c", CHILD.format(root=str(ROOT)), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert same(collect(directory=tmp_path), expected)


def test_a_finished_collection_is_not_repeated(expected, tmp_path):
    collect(directory=tmp_path)
    states = []
    assert same(collect(directory=tmp_path, progress=states.append), expected)
    assert not states
    collect(corpus=[*texts(), "one more"], directory=tmp_path, progress=states.append)
    assert states


def test_other_texts_than_the_checkpoint(tmp_path):
    with pytest.raises(Stop):
        collect(directory=tmp_path, progress=stop_after(50))
    for other in (texts(seed=1), texts()[:5], texts()[1:]):
        with pytest.raises(ValueError, match="texts: .*checkpoint"):
            collect(corpus=other, directory=tmp_path)
    assert list(tmp_path.glob("partial_*"))


def test_another_model_does_not_continue_a_checkpoint(tmp_path):
    with pytest.raises(Stop):
        collect(directory=tmp_path, progress=stop_after(50))
    other = tiny_model("gpt2", seed=1)
    assert same(collect(directory=tmp_path, model=other), collect(model=other))


def test_an_edited_model_continues_and_returns_nothing_of_its_base(expected, tmp_path):
    edited = tiny_model("gpt2")
    resolve(edited).mlp_out(0).weight.data += 0.1
    with pytest.raises(Stop):
        collect(directory=tmp_path, progress=stop_after(20))
    assert same(collect(directory=tmp_path, model=edited), collect(model=edited))
    assert same(collect(directory=tmp_path), expected)


def test_another_models_results_are_not_replaced(tmp_path):
    collect(directory=tmp_path)
    states = []
    with pytest.raises(ValueError, match="another model"):
        collect(directory=tmp_path, model=tiny_model("gpt2", seed=1), progress=states.append)
    assert not states, "refused before any work"


def test_damaged_checkpoint(tmp_path):
    with pytest.raises(Stop):
        collect(directory=tmp_path, progress=stop_after(50))
    (path,) = tmp_path.glob("partial_*")
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable statistics file"):
            collect(directory=tmp_path)


def test_checkpoint_survives_a_full_disk(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        collect(directory=tmp_path, progress=stop_after(50))
    (path,) = tmp_path.glob("partial_*")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        collect(directory=tmp_path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert same(collect(directory=tmp_path), collect())


def test_results_are_in_the_store(expected, tmp_path):
    collect(directory=tmp_path)
    store = StatisticsStore(tmp_path)
    for module, moment in expected.items():
        assert torch.equal(store.get(module, model=tiny_model("gpt2")).total, moment.total)
