"""LoRA adapters: PEFT itself loads them and its logits are those of the edited model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn

from fastedit.arch import editable_weight, resolve
from fastedit.delta import fingerprint
from fastedit.edit import Dense, Edit, LowRank, Rows
from fastedit.export.peft import lora_factors, to_peft

peft = pytest.importorskip("peft")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low_rank(name: str, shape: tuple[int, int], rank: int) -> LowRank:
    return LowRank(name, draw(shape[0], rank), draw(rank, shape[1]))


def make_edit(model: nn.Module, *deltas: Any) -> Edit:
    base = {delta.name: fingerprint(editable_weight(model, delta.name)[0]) for delta in deltas}
    return Edit("memit", {}, (), deltas, base, {})


def three_layers(model_type: str, ranks: tuple[int, ...] = (2, 2, 2)) -> tuple[Any, Edit]:
    model = tiny_model(model_type)
    arch = resolve(model)
    shape = (arch.width, arch.key_dim(0))
    return model, make_edit(
        model, *(low_rank(arch.name("mlp_out", i), shape, r) for i, r in enumerate(ranks))
    )


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def edited_logits(model: Any, edit: Edit) -> Tensor:
    with edit.applied(model):
        return logits(model, tiny_batch(model))


def adapted(model_type: str, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "error", category=UserWarning
        )  # a wrong fan_in_fan_out or a missing key is only a warning to PEFT
        return peft.PeftModel.from_pretrained(tiny_model(model_type), folder).eval()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj", "gemma2", "phi3", "t5"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 5, 3)], ids=str)
def test_peft_loads_the_adapter_and_its_logits_are_the_edited_ones(
    tmp_path: Path, model_type: str, ranks: tuple[int, ...]
) -> None:
    model, edit = three_layers(model_type, ranks)
    plain, expected = logits(model, tiny_batch(model)), edited_logits(model, edit)
    folder = to_peft(edit, model, tmp_path / "adapter")
    wrapped = adapted(model_type, folder)
    found = logits(wrapped, tiny_batch(model))
    assert (expected - plain).abs().max() > 0.05
    assert (found - expected).abs().max() <= 1e-5
    merged = wrapped.merge_and_unload()
    assert (logits(merged, tiny_batch(model)) - expected).abs().max() <= 1e-5


def test_the_files_are_what_servers_read(tmp_path: Path) -> None:
    model, edit = three_layers("llama", (1, 5, 3))
    to_peft(edit, model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj"
    assert len(tensors) == 6 and {value.dtype for value in tensors.values()} == {torch.float32}
    assert tensors[f"{name}.lora_A.weight"].shape == (5, 48) and tensors[f"{name}.lora_B.weight"].shape == (
        32,
        5,
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    assert config["r"] == config["lora_alpha"] == 5  # servers that ignore the patterns scale by one as well
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {"model.layers.0.mlp.down_proj": 1, "model.layers.2.mlp.down_proj": 3}
    assert config["target_modules"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert config["fan_in_fan_out"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_only_the_edited_layers_are_adapted(tmp_path: Path) -> None:
    """Layer 1 of twelve: its name must not catch layers 10 and 11."""
    model = tiny_model("gpt2", n_layer=12)
    name = resolve(model).name("mlp_out", 1)
    to_peft(make_edit(model, low_rank(name, (32, 64), 2)), model, tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(tiny_model("gpt2", n_layer=12), tmp_path / "a")
    assert [key for key, _ in wrapped.named_modules() if key.endswith("lora_A")] == [
        f"base_model.model.{name}.lora_A"
    ]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_rows_are_exact(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    arch = resolve(model)
    width, features = arch.width, arch.key_dim(0)
    name = arch.name("mlp_out", 2)
    rows = Rows(name, torch.tensor([7, 3]), draw(2, features), size=width)
    columns = Rows(name, torch.tensor([0, 40]), draw(2, width), size=features, axis=1)
    edit = make_edit(model, rows, columns, low_rank(name, (width, features), 1))
    to_peft(edit, model, tmp_path / "a")
    found = logits(adapted(model_type, tmp_path / "a"), tiny_batch(model))
    assert (found - edited_logits(model, edit)).abs().max() <= 1e-5


def test_a_square_matrix_keeps_its_orientation(tmp_path: Path) -> None:
    """Attention outputs are square: nothing but the module's type tells."""
    for model_type in ("gpt2", "llama"):
        model = tiny_model(model_type)
        edit = make_edit(model, low_rank(resolve(model).name("attn_out", 1), (32, 32), 2))
        to_peft(edit, model, tmp_path / model_type)
        found = logits(adapted(model_type, tmp_path / model_type), tiny_batch(model))
        assert (found - edited_logits(model, edit)).abs().max() <= 1e-5


def test_dense_updates_need_a_rank(tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = resolve(model).name("mlp_out", 1)
    edit = make_edit(model, Dense(name, draw(32, 48)))
    with pytest.raises(
        ValueError, match=r"module 'model\.layers\.1.*no exact low-rank form; rank=.*\(rank=32 is exact\)"
    ):
        to_peft(edit, model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    to_peft(edit, model, tmp_path / "exact", rank=32)
    found = logits(adapted("llama", tmp_path / "exact"), tiny_batch(model))
    assert (found - edited_logits(model, edit)).abs().max() <= 1e-5


def test_a_given_rank_is_the_best_approximation() -> None:
    value = draw(20, 30)
    left, right = lora_factors([Dense("m", value)], rank=4)
    assert left.shape == (20, 4) and right.shape == (4, 30)
    best = float(torch.linalg.svdvals(value)[4:].norm())
    assert float((left @ right - value).norm()) == pytest.approx(best, rel=1e-4)
    # An update that is already of that rank is taken as it is.
    low = LowRank("m", draw(20, 3), draw(3, 30))
    left, right = lora_factors([low], rank=4)
    assert torch.equal(left, low.left) and torch.equal(right, low.right)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_more_columns_than_the_matrix_are_folded(shape: tuple[int, int]) -> None:
    delta = low_rank("m", shape, 50)
    left, right = lora_factors([delta])
    assert left.shape == (shape[0], 20) and right.shape == (20, shape[1])
    torch.testing.assert_close(left @ right, delta.dense())


def test_an_empty_update_is_a_zero_adapter() -> None:
    left, right = lora_factors([LowRank("m", torch.ones(4, 0), torch.ones(0, 3))])
    assert torch.equal(left @ right, torch.zeros(4, 3)) and left.shape[1] == 1


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    for model_type in ("gpt2", "llama", "t5", "bert"):
        model, edit = three_layers(model_type)
        to_peft(edit, model, tmp_path / "model", overwrite=True)
        to_peft(edit, model.config, tmp_path / "config", overwrite=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "config" / file).read_bytes(), (
                model_type
            )


def test_the_method_of_an_edit_remembers_its_model(tmp_path: Path) -> None:
    model, edit = three_layers("gpt2")
    with pytest.raises(ValueError, match="model: is needed to know the edited modules' types"):
        edit.to_peft(tmp_path / "a")
    edit.apply(model)
    edit.to_peft(tmp_path / "applied")
    edit.revert(model)
    edit.to_peft(tmp_path / "reverted")
    edit.to_peft(tmp_path / "given", model)
    contents = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("applied", "reverted", "given")
    ]
    assert contents[0] == contents[1] == contents[2]


def test_refusals_write_nothing(tmp_path: Path) -> None:
    model, edit = three_layers("llama")
    other = tiny_model("llama", intermediate_size=40)
    for call, message in (
        (
            lambda d: to_peft(edit, other, d),
            r"is for an \(out, in\) = \(32, 48\) weight, the model's is \(32, 40\)",
        ),
        (lambda d: to_peft(edit, tiny_model("gpt2"), d), "not found in GPT2LMHeadModel"),
        (lambda d: to_peft(edit, "llama", d), "model: must be a model or its configuration, got str"),
        (lambda d: to_peft(edit, model, d, rank=0), "rank: must be a positive integer, got 0"),
        (lambda d: to_peft(make_edit(model), model, d), "edit: has no deltas"),
    ):
        with pytest.raises(ValueError, match=message):
            call(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    model, edit = three_layers("llama")
    (tmp_path / "a").mkdir()
    to_peft(edit, model, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_config.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"directory: '.*a' is not empty; overwrite=True replaces it"):
        to_peft(edit, model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == before
    (tmp_path / "a" / "extra").write_text("x")
    to_peft(edit, model, tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(FileExistsError, match="is a file"):
        to_peft(edit, model, tmp_path / "a" / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        to_peft(edit, model, tmp_path / "no" / "where")
