"""Statistics against scipy, statsmodels and brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from ballast.statistics import adjust, front, items, power, ranks, seeds, stability
from ballast.statistics.crossed import Differences, differences
from ballast.statistics.rows import row_key, status_note
from ballast.tradeoff import non_dominated


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_t_interval_is_scipys(draw, n):
    values = draw.normal(40, 5, n)
    found = seeds.t_interval(values)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert (found.mean, found.sd, found.n) == pytest.approx((values.mean(), values.std(ddof=1), n))


def test_t_interval_leaves_missing_seeds_out(draw):
    values = draw.normal(size=(4, 3))
    gaps = np.insert(values, 1, np.nan, axis=1)
    for a, b in zip(*(vars(seeds.t_interval(x)).values() for x in (values, gaps)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_one_seed_has_a_mean_and_nothing_else():
    found = seeds.t_interval(np.array([[3.0], [np.nan]]))
    assert found.mean[0] == 3
    assert np.isnan([found.sd, found.low, found.high]).all()
    assert np.isnan(found.mean[1])
    assert seeds.bootstrap_interval(np.array([3.0])) is None
    single = seeds.paired([1.0, np.nan], [0.0, 5.0])
    assert (single.difference, single.n) == (1.0, 1)
    assert np.isnan([single.low, single.high, single.p]).all()


@pytest.mark.parametrize("n", [2, 3, 10])
def test_paired_is_scipys(draw, n):
    a, b = draw.normal(1, 1, n), draw.normal(size=n)
    found, theirs = seeds.paired(a, b), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(interval), rel=1e-9)


def test_differences_without_items_are_the_paired_t_test_on_common_seeds(draw):
    values = draw.normal(50, 10, (6, 5))
    values[1, 0] = values[2, 3] = values[3, :3] = np.nan
    values[4, 1:] = np.nan
    values[5, :4] = np.nan
    found = differences(values, [], np.zeros(6, dtype=bool))
    for a, b in [(0, 1), (1, 2), (0, 3), (2, 3), (3, 1)]:
        common = ~np.isnan(values[a]) & ~np.isnan(values[b])
        assert found.n[a, b] == common.sum()
        assert found.mean[a, b] == pytest.approx((values[a] - values[b])[common].mean())
        if common.sum() > 1:
            theirs = stats.ttest_rel(values[a, common], values[b, common])
            assert found.p()[a, b] == pytest.approx(theirs.pvalue, rel=1e-9)
            low = theirs.confidence_interval(0.95).low
            assert found.mean[a, b] - found.half()[a, b] == pytest.approx(low, rel=1e-9)
    assert found.n[0, 4] == 1
    assert np.isnan(found.p()[0, 4])
    assert found.mean[0, 4] == values[0, 0] - values[4, 0]
    assert found.n[4, 5] == 0
    assert np.isnan(found.mean[4, 5])


def _by_hand(gap: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of D[seed, item], and Satterthwaite's df, by the sums of an ANOVA."""
    s, n = gap.shape
    by_seed, by_item = gap.mean(axis=1), gap.mean(axis=0)
    rest = gap - by_seed[:, None] - by_item[None, :] + gap.mean()
    mean_squares = (
        n * by_seed.var(ddof=1), s * by_item.var(ddof=1), (rest**2).sum() / ((s - 1) * (n - 1))
    )  # fmt: skip
    signs, freedom = (1, 1, -1), (s - 1, n - 1, (s - 1) * (n - 1))
    parts = [sign * ms / (s * n) for sign, ms in zip(signs, mean_squares, strict=True)]
    variance = max(sum(parts), parts[0], parts[1])
    df = variance**2 / sum(p * p / k for p, k in zip(parts, freedom, strict=True))
    return variance, max(df, s - 1)


def test_crossed_variance_is_the_two_way_anova(draw):
    cube = draw.normal(size=(5, 4, 30)) + 2 * draw.normal(size=(5, 4, 1))
    cube += 3 * draw.normal(size=(5, 1, 30))
    found = differences(cube.mean(axis=2), [(1.0, cube)], np.ones(5, dtype=bool))
    for a in range(5):
        for b in range(a):
            variance, df = _by_hand(cube[a] - cube[b])
            assert found.variance[a, b] == pytest.approx(variance, rel=1e-9)
            assert found.df[a, b] == pytest.approx(df, rel=1e-9)


def test_crossed_variance_of_tasks_adds_their_items(draw):
    one, two = (
        draw.normal(size=(2, 3, n)) + draw.normal(0, 3, (2, 3, 1)) + draw.normal(0, 5, (2, 1, n))
        for n in (20, 50)
    )
    values = 0.25 * one.mean(axis=2) + 0.75 * two.mean(axis=2)
    test = differences(values, [(0.25, one), (0.75, two)], np.ones(2, dtype=bool))
    expected = np.diff(values, axis=0).var(ddof=1) / 3
    for weight, x in ((0.25, one), (0.75, two)):
        gap = x[0] - x[1]
        rest = gap - gap.mean(axis=1, keepdims=True) - gap.mean(axis=0) + gap.mean()
        n = gap.shape[1]
        residual = (rest**2).sum() / (2 * (n - 1)) / (3 * n)
        expected += weight**2 * (gap.mean(axis=0).var(ddof=1) / n - residual)
    assert test.variance[0, 1] == pytest.approx(expected, rel=1e-9)


def test_rows_without_items_are_compared_by_seed_alone(draw):
    cube = draw.normal(size=(3, 3, 20)) + draw.normal(0, 9, (3, 1, 20))
    cube[2] = np.nan
    values = draw.normal(size=(3, 3))
    found = differences(values, [(1.0, cube)], np.array([True, True, False]))
    alone = differences(values, [], np.zeros(3, dtype=bool))
    assert found.variance[0, 2] == alone.variance[0, 2]
    assert found.variance[0, 1] != alone.variance[0, 1]


def test_equal_rows_do_not_differ_and_rounding_is_not_a_difference():
    values = np.array([[0.1 + 0.2, 0.3, 0.3], [0.3, 0.3, 0.3], [5.0, 5.0, 5.0]])
    p = differences(values, [], np.zeros(3, dtype=bool)).p()
    assert p[0, 1] == pytest.approx(1)
    assert p[0, 2] < 1e-6


@pytest.mark.parametrize("size", [1, 2, 40])
def test_adjustments_are_statsmodels(draw, size):
    p = draw.uniform(size=size) ** 3
    p[-1] = p[0]
    mixed = np.insert(p, size // 2, np.nan)
    for function, name in ((adjust.holm, "holm"), (adjust.benjamini_hochberg, "fdr_bh")):
        theirs = multipletests(p, method=name)[1]
        found = function(mixed)
        np.testing.assert_allclose(found[~np.isnan(mixed)], theirs, rtol=1e-12)
        assert np.isnan(found[size // 2])
        assert np.isnan(function(np.array([np.nan]))).all()


def test_mcnemar_is_statsmodels_and_the_binomial(draw):
    a, b = (draw.random((2, 200)) < [[0.7], [0.6]]).astype(float)
    won, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    both = int(((a == 1) & (b == 1)).sum())
    theirs = mcnemar([[both, won], [lost, 200 - both - won - lost]], exact=True).pvalue
    found = items.compare_items(a, b)
    assert found.p == pytest.approx(theirs, rel=1e-12)
    assert found.p == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)
    assert (found.won, found.lost, found.n) == (won, lost, 200)
    assert found.test == "exact McNemar"
    assert found.difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.low < found.difference < found.high


def test_partial_scores_take_the_paired_t_test(draw):
    a, b = draw.random((2, 80))
    found = items.compare_items(a, b)
    assert found.test == "t test paired by item"
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_paired_bootstrap_is_scipys(draw):
    d = draw.normal(0.1, 1, 150)
    low, high = items.bootstrap_difference([(1.0, d)], draws=8000)
    theirs = stats.bootstrap((d,), np.mean, n_resamples=8000, method="percentile", rng=1)
    interval = theirs.confidence_interval
    assert (low, high) == pytest.approx((100 * interval.low, 100 * interval.high), abs=1.0)


def test_paired_bootstrap_weighs_its_tasks(draw):
    d = draw.normal(0.1, 1, 60)
    whole, part = (items.bootstrap_difference([(weight, d)]) for weight in (1.0, 0.25))
    assert part == pytest.approx([bound / 4 for bound in whole])


def test_two_checkpoints_over_tasks_use_welchs_degrees_of_freedom(draw):
    one, two = draw.normal(0.2, 1, 30), draw.normal(-0.1, 2, 50)
    theirs = stats.ttest_ind(one, -two, equal_var=False)  # the difference is the sum of both
    _, _, _, p = items.compare_means([(1.0, one), (1.0, two)])
    assert p == pytest.approx(theirs.pvalue, rel=1e-9)


def _front_draws(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Coarse values, so that ties in one and in both coordinates happen.
    return draw.integers(0, 6, (200, 7)).astype(float), draw.integers(-6, 0, (200, 7)).astype(float)


def test_front_of_every_draw_is_by_pairwise_dominance(draw):
    e, f = _front_draws(draw)
    expected = [non_dominated(list(zip(x, y, strict=True))) for x, y in zip(e, f, strict=True)]
    np.testing.assert_array_equal(front.on_front(e, f), expected)


def test_hypervolume_is_by_counting_cells(draw):
    e, f = _front_draws(draw)
    box = front.Box(5.0, -5.0, 2.0)  # points lie outside of it, too
    grid_e, grid_f = np.meshgrid(np.arange(5) + 0.5, np.arange(-5, 2) + 0.5)
    below = (e[:, :, None, None] > grid_e) & (f[:, :, None, None] > grid_f)
    expected = below.any(axis=1).mean(axis=(1, 2))
    np.testing.assert_allclose(front.hypervolume(e, f, box), expected, atol=1e-12)


def test_front_draw_is_the_mean_of_the_resampled_cube(draw):
    cube = draw.integers(0, 2, (3, 4, 25)).astype(float) * 100
    weights = np.ones((5, 3, 4), dtype=np.float32)
    found = front._resampled(
        cube.mean(axis=2), [(1.0, cube)], np.ones(3, bool), weights, np.random.default_rng(5)
    )
    counts = np.random.default_rng(5).multinomial(25, np.full(25, 1 / 25), size=5)
    expected = np.einsum("rsi,bi->br", cube, counts) / (4 * 25)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_seed_weights_are_joint_and_never_empty(draw):
    known = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)
    weights = front._seed_weights(known, 500, draw)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    assert (weights.sum(axis=2) > 0).all()
    assert (weights[:, 2, 2:] == 0).all()
    some = weights[:, 0, :2].sum(axis=1) > 0
    np.testing.assert_array_equal(weights[some, 2, :2], weights[some, 0, :2])


def test_rank_spans_by_hand():
    difference = np.array([[0, 1, 5, 9], [-1, 0, 4, 8], [-5, -4, 0, 4], [-9, -8, -4, 0.0]])
    p = np.where(np.abs(difference) >= 4, 0.01, 0.5)
    low, high = ranks.rank_spans(difference, p, np.ones(4, dtype=bool))
    assert low.tolist() == [1, 1, 3, 4]
    assert high.tolist() == [2, 2, 3, 4]
    low, high = ranks.rank_spans(difference, p, np.array([True, False, True, True]))
    assert np.isnan([low[1], high[1]]).all()
    assert low[[0, 2, 3]].tolist() == [1, 2, 3]


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_minimum_detectable_is_statsmodels_for_seeds(draw, n):
    values = draw.normal(0, 4, (5, n))
    upper = np.triu_indices(5, k=1)
    test = differences(values, [], np.zeros(5, dtype=bool)).part(*upper)
    sd = np.sqrt((test.spread**2).mean())
    found = power.minimum_detectable(test)
    assert TTestPower().power(found / sd, n, 0.05) == pytest.approx(0.8, abs=1e-3)
    median = np.median(test.spread)
    typical = power.minimum_detectable(test, typical=True)
    assert TTestPower().power(typical / median, n, 0.05) == pytest.approx(0.8, abs=0.02)


def test_nothing_is_detectable_without_seeds():
    blank = [np.full(3, np.nan) for _ in range(4)]
    empty = Differences(*blank, np.zeros(3), np.ones(3, dtype=int))
    assert power.minimum_detectable(empty) is None


def test_noise_floor_counts_pairs_of_seeds_within_rows():
    values = np.array([[1.0, 2.0, 4.0], [5.0, np.nan, 9.0], [7.0, np.nan, np.nan]])
    floor, pairs = power.noise_floor(values)
    assert pairs == 4
    assert floor == pytest.approx(np.quantile([1, 3, 2, 4], 0.95))
    assert power.noise_floor(values[2:]) == (None, 0)


def test_definitions_are_turned_so_that_higher_is_better_and_tau_is_scipys(draw):
    rows = pd.DataFrame(draw.uniform(10, 90, (12, 3)), columns=["O", "H", "forgetting_per_gain"])
    rows.loc[:2, "forgetting_per_gain"] = np.nan
    rows["Avg"] = rows["O"] / 2
    table = stability.agreement(stability.definitions(rows)).set_index(["a", "b"])
    assert table.loc[("O", "Avg"), "tau"] == pytest.approx(1)
    theirs = stats.kendalltau(rows["O"], rows["H"]).statistic
    assert table.loc[("O", "H"), "tau"] == pytest.approx(theirs)
    lower = table.loc[("O", "Forgetting per point gained")]
    known = rows.dropna()
    theirs = stats.kendalltau(known["O"], known["forgetting_per_gain"]).statistic
    assert lower["tau"] == pytest.approx(-theirs)
    assert lower["n"] == 9
    assert len(table) == 6


def test_ties_by_rounding_stay_ties():
    values = {"O": np.array([0.1 + 0.2, 0.3, 1.0]), "H": np.array([1.0, 1.0, 2.0])}
    assert stability.agreement(values)["tau"].iloc[0] == pytest.approx(1)


def test_nothing_to_order():
    assert stability.agreement({}).empty
    alone = stability.agreement({"O": np.array([1.0]), "H": np.array([1.0])})
    assert alone["tau"].isna().all()


def test_names_of_rows():
    assert row_key("lora", 8, "") == "lora-r8"
    assert row_key("full_st", None, "") == "full_st"
    assert row_key("lora", pd.NA, "dropped") == "lora+dropped"
    assert row_key("lora", 2, pd.NA) == "lora-r2"


def test_status_note_names_reasons_of_failures_only():
    bad = [("failed", "diverged: NaN"), ("missing", "not run yet"), ("failed", "diverged: NaN")]
    assert status_note(bad) == "2 failed (diverged: NaN), 1 missing"
    assert status_note([]) == ""
    assert len(status_note([("failed", "x" * 500)])) < 120
