"""Edit files: round trips, damage of every sort, interrupted saves."""

from __future__ import annotations

import errno
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from fastedit import edit_file
from fastedit.arch import editable_weight, resolve
from fastedit.delta import fingerprint
from fastedit.edit import Dense, Edit, LowRank, Rows

QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_edit(seed: int = 0, dtype: torch.dtype = torch.float32) -> Edit:
    model = tiny_model("gpt2")
    arch, generator = resolve(model), torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(dtype)

    names = [arch.name("mlp_out", i) for i in range(4)]
    deltas = (
        LowRank(names[0], draw(32, 3), draw(3, 64)),
        Dense(names[1], draw(64, 32).T),
        Rows(names[2], torch.tensor([5, 1]), draw(2, 64), size=32),
        Rows(names[3], torch.tensor([60]), draw(1, 32), size=64, axis=1),
    )
    base = {name: fingerprint(editable_weight(model, name)[0]) for name in names}
    request = {"id": "é", "prompt": "{} ist in", "subject": "Köln 😀", "target_new": "Rom"}
    info = {"seconds": {"solve": 0.25}, "losses": [[1.5, 0.5]], "context_templates": ["{}"], "seed": 0}
    return Edit("memit", {"layers": (1, 2), "clamp": 0.75}, (request,), deltas, base, info)


def same(one: Edit, two: Edit) -> bool:
    fields = ("method", "config", "requests", "base", "info")
    if any(getattr(one, name) != getattr(two, name) for name in fields) or len(one.deltas) != len(two.deltas):
        return False
    for first, second in zip(one.deltas, two.deltas):
        if type(first) is not type(second) or first.name != second.name or first.shape != second.shape:
            return False
        for name in first.fields:
            left, right = getattr(first, name), getattr(second, name)
            if left.dtype != right.dtype or not torch.equal(left, right):
                return False
        if (
            isinstance(first, Rows)
            and isinstance(second, Rows)
            and (first.size, first.axis) != (second.size, second.axis)
        ):
            return False
    return True


@lru_cache(maxsize=1)
def saved_bytes() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        make_edit().save(path)
        return path.read_bytes()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    edit, path = make_edit(dtype=dtype), tmp_path / "edit.safetensors"
    edit.save(path)
    loaded = Edit.load(str(path))
    assert same(edit, loaded)
    assert list(files_in(tmp_path)) == ["edit.safetensors"]
    # An ordinary safetensors file, and the same bytes every time.
    assert set(load_file(path)) == {
        "0.left",
        "0.right",
        "1.value",
        "2.index",
        "2.value",
        "3.index",
        "3.value",
    }
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_loaded_edit_changes_a_model_like_the_original(tmp_path: Path) -> None:
    edit = make_edit()
    edit.save(tmp_path / "e.safetensors")
    one, two = tiny_model("gpt2"), tiny_model("gpt2")
    edit.apply(one)
    Edit.load(tmp_path / "e.safetensors").apply(two)
    for (name, first), second in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(first, second), name


@QUIET
@given(
    rank=st.integers(0, 4),
    seed=st.integers(0, 999),
    text=st.text(max_size=20),
    number=st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()),
)
def test_any_content_survives(tmp_path: Path, rank: int, seed: int, text: str, number: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = LowRank(
        "a.b", torch.randn(5, rank, generator=generator), torch.randn(rank, 3, generator=generator)
    )
    edit = Edit(
        "m", {text: number}, ({"id": text},), (delta,), {"a.b": "5x3:float32:0"}, {"x": [text, number]}
    )
    edit.save(tmp_path / "edit.safetensors")
    assert same(edit, Edit.load(tmp_path / "edit.safetensors"))


def loads_the_same_or_says_why(path: Path) -> None:
    try:
        loaded = Edit.load(path)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and path.name in message, message
    else:
        assert same(loaded, make_edit())


@QUIET
@given(data=st.data())
def test_flipped_bits_are_noticed(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(saved_bytes())
    # Half of the flips in the header, which is where parsers break.
    header = 8 + int.from_bytes(content[:8], "little")
    place = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for position in data.draw(st.lists(place, min_size=1, max_size=3, unique=True)):
        content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "edit.safetensors"
    path.write_bytes(content)
    loads_the_same_or_says_why(path)


@QUIET
@given(length=st.integers(0, 20_000), tail=st.binary(max_size=40))
def test_truncated_and_extended_files_are_noticed(tmp_path: Path, length: int, tail: bytes) -> None:
    content = saved_bytes()
    path = tmp_path / "edit.safetensors"
    path.write_bytes(content[: min(length, len(content))] + tail)
    loads_the_same_or_says_why(path)


@QUIET
@given(content=st.binary(max_size=200))
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file, or it is truncated or damaged"):
        Edit.load(path)


def test_every_single_byte_of_the_header_can_break(tmp_path: Path) -> None:
    content, path = saved_bytes(), tmp_path / "edit.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(0, header, 7):
        for flip in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            loads_the_same_or_says_why(path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "edit.pt"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Edit.load(path)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors' is not a fastedit-edit file \(format 'pt'\)"):
        Edit.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"\(format 'None'\)"):
        Edit.load(path)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit_file.write_file(path, {"w": torch.ones(2)}, {}, kind="fastedit-edit", version=2)
    with pytest.raises(ValueError, match="has version '2', this release reads 1"):
        Edit.load(path)


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "no deltas": (
        {"method": "m", "config": {}, "requests": [], "base": {}, "info": {}},
        "lacks or misuses a field",
    ),
    "unknown kind": ({"deltas": [{"kind": "pickle", "name": "a"}]}, "lacks or misuses a field"),
    "not a list": ({"deltas": 3}, "lacks or misuses a field"),
    "no tensor": ({"deltas": [{"kind": "dense", "name": "a"}]}, "lacks or misuses a field"),
    "no base": ({"deltas": [{"kind": "low_rank", "name": "a"}]}, "base"),
    "bad name": ({"deltas": [{"kind": "low_rank", "name": 7}]}, "name must be a module name"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused(tmp_path: Path, case: str) -> None:
    """A valid checksum over nonsense, which only a person can write."""
    header, message = FORGED[case]
    full = {"method": "m", "config": {}, "requests": [], "base": {}, "info": {}, **header}
    path = tmp_path / "edit.safetensors"
    tensors = {"0.left": torch.ones(2, 1), "0.right": torch.ones(1, 2)}
    edit_file.write_file(path, tensors, full, kind="fastedit-edit", version=1)
    with pytest.raises(ValueError, match=message):
        Edit.load(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: '.*nothing\.safetensors' does not exist"):
        Edit.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        Edit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path: folder '.*nowhere' does not exist"):
        make_edit().save(tmp_path / "nowhere" / "edit.safetensors")


# ---- interrupted saves -------------------------------------------------------------------------------------------


def _fail(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", ["write_safetensors", "fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_an_interrupted_save_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "edit.safetensors"
    make_edit().save(path)
    before = files_in(tmp_path)
    target = {
        "write_safetensors": (edit_file, "write_safetensors"),
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
    }[step]
    monkeypatch.setattr(*target, _fail(error))
    with pytest.raises(type(error)):
        make_edit(seed=1).save(path)
    monkeypatch.undo()
    assert files_in(tmp_path) == before
    make_edit(seed=1).save(path)
    assert same(Edit.load(path), make_edit(seed=1))


def test_a_half_written_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edit.safetensors"
    make_edit().save(path)
    before = files_in(tmp_path)
    whole, written = edit_file._bytes, []

    def fail_at_the_third(tensor: torch.Tensor) -> memoryview:
        written.append(tensor)
        if len(written) == 10:  # seven for the checksum, two in the file
            assert any(name.endswith(".part") for name in files_in(tmp_path))
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(tensor)

    monkeypatch.setattr(edit_file, "_bytes", fail_at_the_third)
    with pytest.raises(OSError) as caught:
        make_edit(seed=1).save(path)
    assert caught.value.errno == errno.ENOSPC and files_in(tmp_path) == before


def test_a_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """The system's own error half-way through the file, which may grow to 4 KiB only."""
    resource = pytest.importorskip("resource")
    path, edit = tmp_path / "edit.safetensors", make_edit(seed=1)
    make_edit().save(path)
    before = files_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as caught:
            edit.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and files_in(tmp_path) == before


def test_files_follow_the_umask(tmp_path: Path) -> None:
    make_edit().save(tmp_path / "edit.safetensors")
    (tmp_path / "plain").write_text(json.dumps(1))
    assert (tmp_path / "edit.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
