"""The memory of an attribution: below its budget, counted in bytes of live tensors, and changing no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import DEPTH, tiny_model, tiny_tokenizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastedit.editor import Editor
from fastedit.session import Session
from fastedit.trace.neurons import NeuronOptions, attribution_bytes, find_neurons
from fastedit.trace.neurons_questions import encode_rows

PROMPTS = [f"The {name} Tower is located in the city of" for name in ("Eiffel", "London", "Marie")]
# The sweep that joins by arithmetic, the one that joins through blocks, whole rows, and a decoder behind an encoder.
PATHS = ("gpt2", "gemma2", "bloom", "bert", "t5")


def session(family: str, dtype: torch.dtype = torch.float32) -> Session:
    tokenizer = tiny_tokenizer()
    if family == "bert":
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    given = {"decoder_start_token_id": 1} if family == "t5" else {}
    return Session(tiny_model(family, dtype=dtype, **given), tokenizer)


def prompts_of(family: str) -> list[str]:
    return [f"{prompt} [MASK]" if family == "bert" else prompt for prompt in PROMPTS]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation made and that is still there; the model's are not."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._total = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._total += storage.nbytes()
        # What has gone since is only looked for where it matters.
        if self._total > self.peak:
            self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
            self._total = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._total)
        return out


def peak(made: Session, prompts: list[str], options: NeuronOptions) -> tuple[int, Any]:
    with LiveBytes() as meter:
        found = find_neurons(made, prompts, " the", options)
    return meter.peak, found


@pytest.mark.parametrize(
    ("family", "dtype", "most"),
    [*((family, torch.float32, 1e-5) for family in PATHS), ("gpt2", torch.float16, 2e-3)],
    ids=[*PATHS, "gpt2-fp16"],
)
def test_the_peak_stays_below_the_budget(family: str, dtype: torch.dtype, most: float) -> None:
    """``most``: rounding; half-precision products round differently in batches of different sizes."""
    made, prompts = session(family, dtype), prompts_of(family)
    whole, want = peak(made, prompts, NeuronOptions(steps=6, memory=1 << 40))
    result = want.scores.nbytes + want.activations.nbytes
    budget = whole // 3
    taken, found = peak(made, prompts, NeuronOptions(steps=6, memory=budget))
    # Beside the budget there is the result, and for a moment the parts that it is put together from.
    assert taken <= budget + 2 * result, (whole, budget, taken)
    assert float((found.scores - want.scores).norm() / want.scores.norm()) <= most
    if dtype == torch.float32:
        assert found.neurons == want.neurons and found.coarse == want.coarse


@pytest.mark.parametrize("family", PATHS)
def test_any_budget_gives_the_same(family: str) -> None:
    made, prompts = session(family), prompts_of(family)[:2]
    whole = find_neurons(made, prompts, " the", NeuronOptions(steps=4))
    for budget in (1, 200_000):
        parts = find_neurons(made, prompts, " the", NeuronOptions(steps=4, memory=budget))
        assert float((parts.scores - whole.scores).norm() / whole.scores.norm()) <= 1e-5
        assert parts.neurons == whole.neurons
        assert parts.probability == pytest.approx(whole.probability, rel=1e-5)


@pytest.mark.parametrize("family", PATHS)
def test_the_prediction_is_above_the_peak(family: str) -> None:
    made, prompts = session(family), prompts_of(family)[:2]
    for budget in (None, 600_000):
        options = NeuronOptions(steps=4, memory=budget)
        _, rows, target = encode_rows(made, prompts, " the", "argmax")
        assert target is not None
        predicted = sum(attribution_bytes(made, [(row, target) for row in rows], range(DEPTH), options))
        most, found = peak(made, prompts, options)
        assert most <= predicted + 3 * (found.scores.nbytes + found.activations.nbytes)


def test_the_editor_and_the_method_take_it() -> None:
    ed = Editor(tiny_model("gpt2"), tiny_tokenizer())
    found = ed.neurons(PROMPTS[0], "the", memory=300_000)
    assert found.options["memory"] == 300_000
    request = {"prompt": "{} is in the city of", "subject": "The Eiffel Tower", "target_new": "the"}
    whole, parts = (ed.solve(request, "kn", steps=4, memory=m) for m in (None, 200_000))
    for one, other in zip(whole.deltas, parts.deltas, strict=True):
        torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-5, atol=1e-6)
