"""A model that nobody here trained: stories260K is converted, edited, and given back unchanged.

Its keys are 172 wide and it knows no facts, so one edit moves much else; what is asked is that an edit does what the
method says: the new ending becomes likely, from hundreds of times less.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llama2c import stories260k

from fastedit.editor import Editor

REQUESTS = [
    {"prompt": "{} was sad because he lost his", "subject": "Tim", "target_new": "dog"},
    {"prompt": "{} went to the park to play with her", "subject": "Lily", "target_new": "cat"},
]
SETTINGS: dict[str, dict[str, Any]] = {
    "rome": {"layers": (1,), "context_template_length_params": ((5, 3),)},
    "memit": {"layers": (2, 3), "mom2_update_weight": 50.0, "clamp_norm_factor": 3.0},
}


@pytest.fixture(scope="module")
def editor() -> Editor:
    """With the second moment of its keys on 64 stories of its own, the only text it is at home in."""
    model, tokenizer = stories260k()
    start = torch.full((64, 1), tokenizer.bos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stories = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=120
        )
    made = Editor(model, tokenizer)
    made.collect_statistics(tokenizer.batch_decode(stories, skip_special_tokens=True), layers=[1, 2, 3])
    return made


def probability(editor: Editor, request: dict[str, str]) -> float:
    """Probability of the whole target after the prompt."""
    prompt = request["prompt"].format(request["subject"])
    start = editor.tokenizer(prompt)["input_ids"]
    ids = editor.tokenizer(f"{prompt} {request['target_new']}")["input_ids"]
    assert ids[: len(start)] == start
    log = editor.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(torch.stack([log[i - 1, ids[i]] for i in range(len(start), len(ids))]).sum().exp())


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_edit_a_model_trained_elsewhere(editor, method):
    requests = REQUESTS[:1] if method == "rome" else REQUESTS
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    start = [probability(editor, request) for request in requests]
    edit = editor.solve(requests, method=method, **SETTINGS[method])
    with editor.applied(edit):
        after = [probability(editor, request) for request in requests]
    for low, high in zip(start, after, strict=True):
        assert high > 0.25
        assert high > 100 * low
    assert all(torch.equal(value, before[name]) for name, value in editor.model.state_dict().items())
