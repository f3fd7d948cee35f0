"""Ranks and rank correlations, against scipy."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from pretrain.downstream.ranks import Ranks, pearson, spearman
from pretrain.downstream.score import spearman as agreement
from pretrain.downstream.variants import Variant


@pytest.mark.parametrize("levels", [2, 7, None])
def test_spearman_is_scipys_in_a_large_table_with_ties(levels: int | None) -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=100_000)
    measured = (scores + generator.normal(size=100_000) > 0).astype(float)
    if levels:
        scores = np.floor(levels * scores)
    assert spearman(scores, measured) == pytest.approx(spearmanr(scores, measured).statistic, abs=1e-12)
    assert spearman(scores, measured) > 0.5
    assert spearman(scores, -measured) == pytest.approx(-spearman(scores, measured), abs=1e-12)


def test_a_correlation_with_what_is_constant_or_no_number_is_not_defined() -> None:
    several = [0.1, 0.2, 0.4]
    for other in ([0.1, 0.1, 0.1], [0.1, np.nan, 0.2]):
        assert np.isnan(spearman(several, other))
        assert np.isnan(spearman(other, several))
    assert np.isnan(pearson(np.array(several), np.full(3, 0.1), np.ones((1, 3)))).all()
    assert np.isnan(spearman([1.0], [2.0]))
    assert np.isnan(spearman([], []))


def test_a_weight_is_a_number_of_copies() -> None:
    generator = np.random.default_rng(0)
    values, other = generator.integers(8, size=30).astype(float), generator.normal(size=30)
    rows = generator.integers(30, size=(5, 30))
    weights = np.stack([np.bincount(row, minlength=30) for row in rows]).astype(float)
    ranks, some = Ranks(values)(weights), Ranks(values, of=values[:4])(weights)
    correlation = pearson(values, other, weights)
    for number, row in enumerate(rows):
        expected = rankdata(values[row])
        assert np.array_equal(ranks[number, row], expected)
        assert np.array_equal(some[number, row[row < 4]], expected[row < 4])
        assert correlation[number] == pytest.approx(np.corrcoef(values[row], other[row])[0, 1])


def test_score_agrees_with_a_measured_effect_of_two_values_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=100_000)
    measured = (scores + generator.normal(size=100_000) > 0).astype(float)
    variants = [Variant({}, "MK", [], "MK", effect) for effect in measured]
    assert agreement(variants, scores) == pytest.approx(spearmanr(scores, measured).statistic, abs=1e-12)
