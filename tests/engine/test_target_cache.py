"""Targets on disk: reused under equal settings only, or by the original's names; damaged files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine.problems import REQUESTS
from tiny import tiny_model, tiny_tokenizer

from fastedit.edit import Edit
from fastedit.editor import Editor

OPTIONS = {
    "layers": (0, 1),
    "v_num_grad_steps": 3,
    "mom2_adjustment": False,
    "context_templates": (("{}",),),
}


def solve(template: str, requests=REQUESTS[:2], seed: int = 0, **options) -> Edit:
    ed = Editor(tiny_model("gpt2", seed=seed), tiny_tokenizer())
    return ed.solve(list(requests), "memit", {**OPTIONS, **options}, cache_template=template)


def same(one: Edit, other: Edit) -> bool:
    return all(torch.equal(a.dense(), b.dense()) for a, b in zip(one.deltas, other.deltas, strict=True))


def test_cached_targets_give_the_same_edit_and_new_requests_are_added(tmp_path: Path) -> None:
    template = str(tmp_path / "z" / "layer_{}_clamp_{}_case_{}.npz")
    first = solve(template)
    assert len(first.info["losses"]) == 2
    again = solve(template)
    assert again.info["losses"] == [] and same(first, again)
    assert [row["id"] for row in solve(template, REQUESTS[:3]).info["losses"]] == ["3"]


@pytest.mark.parametrize(
    "change", [{"v_lr": 0.1}, {"seed": 4}, {"context_templates": (("{}",), ("Hm. {}",))}]
)
def test_a_full_key_is_not_reused_under_other_settings_or_weights(tmp_path: Path, change: dict) -> None:
    template = str(tmp_path / "layer_{}_clamp_{}_case_{}.npz")
    solve(template)
    assert len(solve(template, **change).info["losses"]) == 2


def test_a_full_key_holds_nothing_that_targets_do_not_depend_on(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    solve(str(tmp_path / "one" / "layer_{}_clamp_{}_case_{}.npz"))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = str(tmp_path / "two" / "layer_{}_clamp_{}_case_{}.npz")
    assert solve(moved, mom2_update_weight=7.0, batch_tokens=64).info["losses"] == []


def test_legacy_names_are_read_whatever_the_settings(tmp_path: Path) -> None:
    template = str(tmp_path / "layer_{}_clamp_{}_case_{}.npz")
    for request in REQUESTS[:2]:
        np.savez(tmp_path / f"layer_1_clamp_0.75_case_{request.id}.npz", v_star=np.ones(32, np.float32))
    edit = solve(template, z_cache_key="legacy")
    assert edit.info["losses"] == []
    assert len(solve(template).info["losses"]) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no archive at all"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    template = str(tmp_path / "layer_{}_clamp_{}_case_{}.npz")
    path = tmp_path / "layer_1_clamp_0.75_case_1.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cache_template: .*case_1\.npz is") as caught:
        solve(template, z_cache_key="legacy")
    assert "\n" not in str(caught.value)
    np.savez(path, v_star=np.ones(5, np.float32))
    with pytest.raises(ValueError, match=r"must hold 32 finite values, got \(5,\)"):
        solve(template, z_cache_key="legacy")
    np.savez(path, other=np.ones(32, np.float32))
    with pytest.raises(ValueError, match="is not a target file"):
        solve(template, z_cache_key="legacy")


def test_the_template_is_checked() -> None:
    with pytest.raises(ValueError, match="cache_template must be a path that holds three"):
        solve("x_{}.npz")
