"""Session: the factor of a second moment is packed, made once, and goes when its statistics do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from fastedit.editor import Editor
from fastedit.ops.packed_solve import packed_factor_size
from fastedit.stats import SecondMoment, StatisticsStore


def moment(ed: Editor, seed: int) -> SecondMoment:
    size = ed.session.arch.key_dim(0)
    keys = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SecondMoment(ed.session.arch.name("mlp_out", 0), 3 * size, keys.T @ keys)


def test_the_metric_is_packed_and_made_once() -> None:
    ed = Editor(tiny_model("gpt2"), tiny_tokenizer())
    first, other = moment(ed, 0), moment(ed, 1)
    ed.session.use_statistics({first.module: first})
    metric = ed.session.metric(first.module)
    assert metric.packed.shape == (packed_factor_size(metric.width),) and metric.width == first.features
    assert ed.session.metric(first.module) is metric
    lower = ed.session.cholesky(first.module)
    torch.testing.assert_close(lower, torch.linalg.cholesky(first.moment()))
    assert torch.equal(lower, lower.tril())
    ed.session.use_statistics({other.module: other})
    torch.testing.assert_close(ed.session.cholesky(other.module), torch.linalg.cholesky(other.moment()))


def test_the_metric_of_stored_statistics(tmp_path: Path) -> None:
    ed = Editor(tiny_model("gpt2"), tiny_tokenizer())
    given = moment(ed, 2)
    StatisticsStore(tmp_path).put(given, model_name="gpt2", dataset="corpus")
    made = Editor(tiny_model("gpt2"), tiny_tokenizer())
    made.session.use_statistics({given.module: StatisticsStore(tmp_path).get(given.module)})
    found = made.session.cholesky(given.module)
    torch.testing.assert_close(found, torch.linalg.cholesky(given.moment()))
    with pytest.raises(ValueError, match="no second moment of 'h.9'"):
        made.session.metric("h.9")
