"""Whole models: exported folders load with transformers, carry their undo, and appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastedit.arch import editable_weight, resolve
from fastedit.delta import fingerprint
from fastedit.edit import Edit, LowRank
from fastedit.export.hf import UNDO, export_model, restore_exported


def make_edit(model: nn.Module, names: tuple[str, ...] | None = None, seed: int = 0) -> Edit:
    arch, generator = resolve(model), torch.Generator().manual_seed(seed)
    names = names or (arch.name("mlp_out", 1), arch.name("mlp_out", 2))
    deltas, base = [], {}
    for name in names:
        weight, transposed = editable_weight(model, name)
        out, width = reversed(weight.shape) if transposed else weight.shape
        left, right = (torch.randn(shape, generator=generator) for shape in ((out, 2), (2, width)))
        deltas.append(LowRank(name, 0.1 * left, right))
        base[name] = fingerprint(weight)
    return Edit("memit", {}, (), tuple(deltas), base, {})


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shard", ["5GB", 40_000], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_an_exported_model_loads_edited_and_restores_every_bit(
    tmp_path: Path, model_type: str, dtype: torch.dtype, shard: str | int
) -> None:
    model = tiny_model(model_type, dtype=dtype)
    edit, before = make_edit(model), bits(model)
    folder = export_model(model, tiny_tokenizer(), tmp_path / "out", edit=edit, max_shard_size=shard)
    assert equal(bits(model), before) and not edit.is_applied(model)
    if shard != "5GB":
        assert len(list(folder.glob("model-*.safetensors"))) > 1

    with edit.applied(model):
        edited = bits(model)
        expected = model(**tiny_batch(model)).logits
    exported = load(folder)
    assert equal(bits(exported), edited) and torch.equal(exported(**tiny_batch(model)).logits, expected)
    assert (
        AutoTokenizer.from_pretrained(folder)("The Eiffel Tower").input_ids
        == tiny_tokenizer()("The Eiffel Tower").input_ids
    )
    assert Edit.load(folder / "fastedit" / "edit.safetensors").base == edit.base
    # Loaders that take every *.safetensors of a folder must find weights only.
    assert all(path.name.startswith("model") for path in folder.glob("*.safetensors"))

    restored = restore_exported(folder)
    assert sorted(restored) == sorted(f"{name}.weight" for name in edit.modules)
    assert equal(bits(load(folder)), before)
    assert not (folder / "fastedit").exists()
    with pytest.raises(FileNotFoundError, match=r"undo\.safetensors' does not exist"):
        restore_exported(folder)


def test_an_applied_edit_is_exported_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    edit, before = make_edit(model), bits(model)
    edit.apply(model)
    edited = bits(model)
    export_model(model, None, tmp_path / "out", edit=edit)
    assert (
        edit.is_applied(model) and equal(bits(model), edited) and equal(bits(load(tmp_path / "out")), edited)
    )
    restore_exported(tmp_path / "out")
    assert equal(bits(load(tmp_path / "out")), before)


def test_without_an_edit_the_model_is_exported_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    export_model(model, None, tmp_path / "out")
    assert equal(bits(load(tmp_path / "out")), bits(model)) and not (tmp_path / "out" / "fastedit").exists()


def test_tied_weights_are_found_under_the_name_they_are_stored_by(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    edit, before = make_edit(model, ("lm_head",)), bits(model)
    export_model(model, None, tmp_path / "out", edit=edit)
    assert not equal(bits(load(tmp_path / "out")), before)
    assert restore_exported(tmp_path / "out") == ("transformer.wte.weight",)
    assert equal(bits(load(tmp_path / "out")), before)


def test_a_compiled_model_is_seen_through_and_an_adapter_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    export_model(torch.compile(model, backend="eager"), None, tmp_path / "out", edit=make_edit(model))
    assert load(tmp_path / "out").config.model_type == "llama"
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="model: has a PEFT adapter"):
        export_model(wrapped, None, tmp_path / "adapter")
    with pytest.raises(ValueError, match="save_pretrained, got Linear"):
        export_model(nn.Linear(2, 2), None, tmp_path / "linear")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- interrupted and refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["tokenizer", "fsync", "rename"])
def test_an_interrupted_export_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    edit, before, out = make_edit(model), bits(model), tmp_path / "out"
    export_model(model, tokenizer, out)
    files = snapshot(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise error
        return rename(self, target)

    if step == "rename":
        monkeypatch.setattr(Path, "rename", fail_second)
    else:
        monkeypatch.setattr(
            *{"tokenizer": (type(tokenizer), "save_pretrained"), "fsync": (os, "fsync")}[step], fail
        )
    with pytest.raises(type(error)):
        export_model(model, tokenizer, out, edit=edit, overwrite=True)
    monkeypatch.undo()
    assert snapshot(tmp_path) == files
    assert equal(bits(model), before) and not edit.is_applied(model)
    export_model(model, tokenizer, out, edit=edit, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    restore_exported(out)
    assert equal(bits(load(out)), before)


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty; overwrite=True replaces it"):
        export_model(tiny_model("llama"), None, tmp_path)
    assert snapshot(tmp_path) == {"thesis.txt": b"x"}


def test_an_edit_for_another_model_exports_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=1)
    before = bits(model)
    with pytest.raises(ValueError, match="the edit is for another base model"):
        export_model(model, None, tmp_path / "out", edit=make_edit(tiny_model("llama")))
    assert equal(bits(model), before) and not list(tmp_path.iterdir())


def exported(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    return export_model(model, None, tmp_path / "out", edit=make_edit(model))


def test_weights_that_changed_since_the_export_are_not_overwritten(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name] * 2}, path, metadata={"format": "pt"})
    files = snapshot(folder)
    with pytest.raises(
        ValueError,
        match=r"tensor 'model\.layers\.2\..*something changed 'model\.safetensors' since the export",
    ):
        restore_exported(folder)
    assert snapshot(folder) == files
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.2\..*not in 'model\.safetensors'"):
        restore_exported(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no weight file 'model\.safetensors'"):
        restore_exported(folder)


def test_a_damaged_undo_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    content = bytearray((folder / UNDO).read_bytes())
    content[-5] ^= 1
    (folder / UNDO).write_bytes(content)
    files = snapshot(folder)
    with pytest.raises(ValueError, match="is damaged: its checksum does not match"):
        restore_exported(folder)
    assert snapshot(folder) == files


def test_an_interrupted_restore_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = bits(model)
    folder = export_model(model, None, tmp_path / "out", edit=make_edit(model), max_shard_size=40_000)
    replace, done = Path.replace, []

    def once(self: Path, target: Path) -> Path:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        restore_exported(folder)
    monkeypatch.undo()
    assert len(done) == 1 and not equal(bits(load(folder)), before)
    restore_exported(folder)
    assert equal(bits(load(folder)), before)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
