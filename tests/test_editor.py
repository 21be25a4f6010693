"""What the user's handle says about input that makes no sense, each in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.stats import StatisticsStore

REQUEST = {"prompt": "{} is in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}
OPTIONS = {"layers": (1,), "v_num_grad_steps": 2, "context_templates": ("{}",)}


@pytest.fixture
def ed() -> Editor:
    return Editor(tiny_model("gpt2"), tiny_tokenizer())


@pytest.mark.parametrize("edit", [None, "edit.safetensors", {}], ids=repr)
@pytest.mark.parametrize("call", ["apply", "revert", "applied"])
def test_what_is_no_edit_is_named(ed: Editor, call: str, edit: Any) -> None:
    with pytest.raises(ValueError, match="edit must be an Edit, as `solve` and `Edit.load` return, got "):
        made = getattr(ed, call)(edit)
        made.__enter__()


def test_layers_and_texts_of_statistics_are_named(ed: Editor) -> None:
    with pytest.raises(ValueError, match="layers must be a sequence of layer numbers, got 1"):
        ed.collect_statistics(["a text"], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="texts must be a sequence of texts, got 1"):
        ed.collect_statistics(1, [1])  # type: ignore[arg-type]


def test_a_missing_statistics_directory_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(ValueError, match="statistics must be a directory that exists, got '.*absent'"):
        Editor(tiny_model("gpt2"), tiny_tokenizer(), statistics=absent)
    # A store may be of a folder that comes into being later.
    ed = Editor(tiny_model("gpt2"), tiny_tokenizer(), statistics=StatisticsStore(absent))
    message = (
        "statistics: directory .*absent' does not exist, wanted for the second moment of 'transformer.h.1.mlp"
    )
    with pytest.raises(ValueError, match=message) as caught:
        ed.solve(REQUEST, "rome", OPTIONS)
    assert "\n" not in str(caught.value)
    absent.mkdir()
    with pytest.raises(ValueError, match="no second moment of 'transformer.h.1.mlp.c_proj' in .*absent'"):
        ed.solve(REQUEST, "rome", OPTIONS)


def test_model_and_tokenizer_in_the_wrong_order_are_told_in_one_short_line() -> None:
    for model, tokenizer, rule in (
        (tiny_tokenizer(), tiny_model("gpt2"), "model must be a torch.nn.Module, got a "),
        (
            tiny_model("gpt2"),
            tiny_model("gpt2"),
            "tokenizer must be the model's tokenizer, got a GPT2LMHeadModel",
        ),
    ):
        with pytest.raises(ValueError, match=rule) as caught:
            Editor(model, tokenizer)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 100
