"""What a second moment says about itself before it is factored."""

from __future__ import annotations

import pytest
import torch

from fastedit.stats import SecondMoment


def moment(total, count=100):
    return SecondMoment("layer.out", count, total)


def gram(n, f=8, seed=0):
    K = torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return K.mT @ K


def test_mean_and_factor():
    total = gram(50)
    m = moment(total, 50)
    torch.testing.assert_close(m.moment(), total / 50)
    lower = m.cholesky()
    assert lower.dtype == torch.float64 and not lower.triu(1).any()
    torch.testing.assert_close(lower @ lower.mT, total / 50)
    torch.testing.assert_close(moment(total.float(), 50).cholesky(), lower, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        m.cholesky(0.1).square().sum(1), (total / 50).diagonal() + 0.1 * (total / 50).diagonal().mean()
    )


def test_too_few_tokens_say_how_many():
    with pytest.raises(
        ValueError, match=r"statistics of 'layer.out': 5 tokens are too few for 8 features, at least 8"
    ):
        moment(gram(5), 5).cholesky()
    assert moment(gram(5), 5).cholesky(jitter=0.1).shape == (8, 8)


def test_dead_features_are_counted():
    total = gram(50)
    total[[1, 4], :] = 0
    total[:, [1, 4]] = 0
    with pytest.raises(ValueError, match=r"2 of 8 features never fired"):
        moment(total).cholesky()
    assert moment(total).cholesky(jitter=0.1).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(2, 2), (5, 1)])
def test_values_must_be_finite(value, place):
    total = gram(50)
    total[place] = value
    with pytest.raises(ValueError, match="must be finite"):
        moment(total).cholesky()


def test_repeated_tokens_do_not_make_a_full_rank():
    K = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(30, 1)
    with pytest.raises(ValueError, match=r"statistics of 'layer.out': C .* singular"):
        moment(K.mT @ K, 120).cholesky()


@pytest.mark.parametrize(
    ("total", "count", "message"),
    [
        (torch.zeros(3, 4), 5, "total must be a square float matrix"),
        (torch.zeros(3, 3, dtype=torch.int64), 5, "total must be a square float matrix"),
        (torch.zeros(3, 3), -1, "count must be an integer >= 0"),
        (torch.zeros(3, 3), 2.5, "count must be an integer >= 0"),
    ],
)
def test_made_wrong(total, count, message):
    with pytest.raises(ValueError, match=message):
        SecondMoment("layer.out", count, total)


def test_nothing_counted():
    with pytest.raises(ValueError, match="count must be > 0"):
        moment(torch.zeros(3, 3), 0).moment()
