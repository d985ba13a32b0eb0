"""Statistics on simulated data of which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from ballast.statistics import front, items, moderate, power, ranks, seeds
from ballast.statistics.adjust import benjamini_hochberg
from ballast.statistics.crossed import Differences, differences, prior_of_rows

ITEMS = 60


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(11)


def scores(
    draw: np.random.Generator, rows: int, n_seeds: int, seed: float, item: float, rest: float
) -> np.ndarray:
    """Items of rows that do not differ, [row, seed, item]. seed, item, rest: sd of a row's mean
    over seeds and items that comes from each."""
    return (
        seed * np.sqrt(n_seeds) * draw.standard_normal((rows, n_seeds, 1))
        + item * np.sqrt(ITEMS) * draw.standard_normal((rows, 1, ITEMS))
        + rest * np.sqrt(n_seeds * ITEMS) * draw.standard_normal((rows, n_seeds, ITEMS))
    )


def pairwise(cube: np.ndarray) -> Differences:
    """Rows 0 and 1, 2 and 3 ... against each other, with their items."""
    all_pairs = differences(cube.mean(axis=2), [(1.0, cube)], np.ones(len(cube), dtype=bool))
    a = np.arange(0, len(cube), 2)
    return all_pairs.part(a, a + 1)


# -- coverage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 10])
def test_t_interval_paired_by_seed_covers(draw, n):
    shared = draw.normal(0, 30, (20_000, n))  # what a seed does to both methods cancels
    a, b = (shared + draw.normal(mean, 5, (20_000, n)) for mean in (60, 50))
    found = seeds.t_interval(a - b)
    covered = ((found.low < 10) & (found.high > 10)).mean()
    assert covered == pytest.approx(0.95, abs=0.007)
    unpaired = seeds.t_interval(a).sd.mean()
    assert found.sd.mean() < unpaired / 2


@pytest.mark.parametrize(
    ("n", "lowest", "highest"), [(3, 0.65, 0.80), (5, 0.78, 0.89), (10, 0.86, 0.93)]
)
def test_bootstrap_over_seeds_undercovers_as_its_note_says(draw, n, lowest, highest):
    runs = [seeds.bootstrap_interval(x, draws=400) for x in draw.normal(50, 5, (600, n))]
    covered = np.mean([run.low < 50 < run.high for run in runs])
    assert lowest < covered < highest
    said = int(runs[0].note.split("about ")[1].split("%")[0])
    assert said == pytest.approx(100 * covered, abs=6)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_interval_paired_by_seed_and_item_covers_in_every_mixture(draw, n):
    for seed, item in [(1.0, 0.05), (1.0, 1.0), (0.0, 1.0)]:
        test = [pairwise(10 + scores(draw, 12, n, seed, item, 0.3)) for _ in range(250)]
        covered = np.mean([np.abs(t.mean) < t.half() for t in test])
        assert 0.94 < covered < 0.99, (seed, item)


# -- size and power ---------------------------------------------------------------------------

MIXTURES = {"seeds": (1.0, 0.0), "items": (0.0, 1.0), "both": (1.0, 1.0), "mostly seeds": (3, 1)}


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_size_of_the_crossed_test(draw, n, mixture):
    p = np.ravel([pairwise(scores(draw, 16, n, *MIXTURES[mixture], 0.3)).p() for _ in range(300)])
    assert (p < 0.05).mean() < 0.062  # 2,400 tests: 0.05 and 2.7 standard errors
    assert (p < 0.001).mean() < 0.003


def test_satterthwaite_alone_would_be_too_sure_where_seeds_dominate(draw):
    """Why the test over seeds has to agree."""
    from scipy.special import stdtr

    tests = [pairwise(scores(draw, 16, 3, 3.0, 1.0, 0.3)) for _ in range(300)]
    alone = np.ravel([2 * stdtr(t.df, -np.abs(t.mean) / np.sqrt(t.variance)) for t in tests])
    assert (alone < 0.001).mean() > 0.004


def test_seeds_alone_would_be_too_sure_where_items_dominate(draw):
    """Why items are in the test: the same items are asked of every seed."""
    cubes = [scores(draw, 16, 5, 0.0, 1.0, 0.3) for _ in range(100)]
    p = [seeds.paired(x[0].mean(axis=1), x[1].mean(axis=1)).p for x in cubes]
    assert np.mean(np.array(p) < 0.05) > 0.3


def test_power_of_the_crossed_test_grows_with_the_difference(draw):
    found = []
    for shift in (0.0, 3.0, 6.0, 12.0):
        cubes = [scores(draw, 16, 3, 0.5, 1.0, 0.3) for _ in range(100)]
        for cube in cubes:
            cube[::2] += shift
        found.append(np.mean([pairwise(cube).p() < 0.05 for cube in cubes]))
    assert found == sorted(found)
    assert found[0] < 0.07
    assert found[-1] > 0.99


@pytest.mark.parametrize(("n", "mixture"), [(3, "seeds"), (5, "seeds"), (10, "both")])
def test_minimum_detectable_difference_has_its_power(draw, n, mixture):
    make = (n, *MIXTURES[mixture], 0.01)
    pooled = pairwise(scores(draw, 600, *make))
    smallest = power.minimum_detectable(pooled)
    cubes = [scores(draw, 16, *make) for _ in range(150)]
    for cube in cubes:
        cube[::2] += smallest
    found = np.mean([pairwise(cube).p() < 0.05 for cube in cubes])
    assert found == pytest.approx(0.8, abs=0.06)


def test_exact_mcnemar_keeps_its_size(draw):
    right = draw.random((2, 1500, 100)) < 0.7
    p = np.array([items.mcnemar_p(a, b) for a, b in zip(*right, strict=True)])
    assert 0.01 < (p < 0.05).mean() < 0.055
    better = draw.random((300, 100)) < 0.92
    p = np.array([items.mcnemar_p(a, b) for a, b in zip(better, right[1], strict=False)])
    assert (p < 0.05).mean() > 0.9


# -- ties -------------------------------------------------------------------------------------


def adjusted(test: Differences) -> np.ndarray:
    a, b = np.triu_indices(len(test.mean), k=1)
    p = np.ones(test.mean.shape)
    p[a, b] = p[b, a] = benjamini_hochberg(test.part(a, b).p())
    return p


def spans_of(cube: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    every = np.ones(len(cube), dtype=bool)
    test = differences(cube.mean(axis=2), [(1.0, cube)], every)
    return ranks.rank_spans(test.mean, adjusted(test), every)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_rows_that_do_not_differ_tie(draw, mixture):
    all_tied = []
    for _ in range(300):
        low, high = spans_of(scores(draw, 10, 3, *MIXTURES[mixture], 0.3))
        all_tied.append((low == 1).all() and (high == 10).all())
    assert np.mean(all_tied) >= 0.93


def test_clear_groups_are_told_apart_and_few_claims_are_false(draw):
    group = np.repeat([0.0, 20.0, 40.0], 3)
    same, apart, false = group[:, None] == group[None, :], [], []
    for _ in range(150):
        cube = scores(draw, 9, 5, 0.5, 0.5, 0.1) + group[:, None, None]
        claimed = adjusted(differences(cube.mean(axis=2), [(1.0, cube)], np.ones(9, bool))) < 0.05
        low, high = spans_of(cube)
        inside = (low <= [9, 9, 9, 6, 6, 6, 3, 3, 3]) & (high >= [7, 7, 7, 4, 4, 4, 1, 1, 1])
        apart.append(inside.all() and claimed[~same].all())
        false.append((claimed & same).sum() / max(claimed.sum(), 1))
    assert np.mean(apart) > 0.95
    assert np.mean(false) < 0.05


# -- the front --------------------------------------------------------------------------------


def front_of(e: np.ndarray, f: np.ndarray) -> front.Front:
    known = np.ones(len(e), dtype=bool)
    means = e.mean(axis=2), f.mean(axis=2)
    return front.front(*means, [(1.0, e)], [(1.0, f)], (known, known), front.Box(90, -80, 20))


def test_dominated_rows_are_not_on_the_front_and_ties_share_it(draw):
    e, f = (scores(draw, 5, 5, 0.5, 0.5, 0.1) for _ in range(2))
    e += np.array([50, 30, 20, 50, 60])[:, None, None]
    f += np.array([-30, -10, -40, -30, -60])[:, None, None]  # 2 is below all, 0 and 3 tie
    found = front_of(e, f)
    assert found.share[2] == 0
    assert found.share[1] == found.share[4] == 1
    assert found.share[0] + found.share[3] >= 1
    even = []
    for _ in range(60):
        pair = [scores(draw, 2, 5, 0.5, 0.5, 0.1) for _ in range(2)]
        even.append(front_of(*pair).share[0])
    assert np.mean(even) == pytest.approx(0.75, abs=0.12)  # better in E, or in F, or in both


def test_equal_rows_are_both_on_the_front(draw):
    e, f = (np.repeat(draw.integers(0, 2, (1, 3, 40)) * 100.0, 2, axis=0) for _ in range(2))
    assert front_of(e, f).share.tolist() == [1.0, 1.0]


def test_hypervolume_interval_holds_the_truth_mostly(draw):
    held = []
    for _ in range(120):
        e, f = (scores(draw, 1, 10, 1.0, 1.0, 0.1) for _ in range(2))
        found = front_of(e + 45, f - 40)
        held.append(found.low < 45 * 40 / (90 * 100) < found.high)
    assert 0.8 < np.mean(held) < 0.99


def test_single_seeds_have_no_front(draw):
    e, f = (scores(draw, 3, 1, 1.0, 1.0, 0.1) for _ in range(2))
    found = front_of(e, f)
    assert np.isnan(found.share).all()
    assert (found.hypervolume, found.low, found.high) == (None, None, None)


# -- variances that are lent -------------------------------------------------------------------


@pytest.mark.parametrize(("d0", "low", "high"), [(4.0, 1.6, 2.5), (20.0, 6.0, 30.0)])
def test_the_prior_of_variances_is_found(draw, d0, low, high):
    true = 9.0 * d0 / draw.chisquare(d0, 4000)
    sample = true * draw.chisquare(2, 4000) / 2
    found = moderate.prior_of(sample, np.full(4000, 2), most=1e6)
    assert low < found.df < high  # half of d0 is believed
    assert found.variance == pytest.approx(9.0, rel=0.15)


def test_equal_variances_lend_all_that_is_believed(draw):
    sample = 9.0 * draw.chisquare(2, 4000) / 2
    found = moderate.prior_of(sample, np.full(4000, 2), most=30.0)
    assert found.df == pytest.approx(15.0, rel=0.4)
    assert moderate.moderated(np.array([1.0, 100.0]), 2, moderate.Prior(6.0, 9.0)).tolist() == [
        (6 * 9 + 2 * 1) / 8,
        (6 * 9 + 2 * 100) / 8,
    ]


def test_few_or_equal_numbers_lend_nothing():
    assert moderate.prior_of(np.array([1.0, 2.0]), np.full(2, 2), most=10.0) == moderate.NONE
    assert moderate.prior_of(np.zeros(9), np.full(9, 2), most=10.0) == moderate.NONE
    four = np.random.default_rng(0).normal(size=(4, 3))
    assert prior_of_rows(four) == moderate.NONE


def table_of(draw: np.random.Generator, rows: int, unlike: float, gap: float) -> np.ndarray:
    """Three seeds of rows, half of them `gap` points better; sd 3 points, or unlike each other."""
    sd = 3 * np.exp(unlike * draw.standard_normal(rows))
    values = 50 + 2 * draw.standard_normal(3) + sd[:, None] * draw.standard_normal((rows, 3))
    values[: rows // 2] += gap
    return values


@pytest.mark.parametrize("unlike", [0.0, 0.7, 1.5])
def test_moderated_tests_keep_their_size(draw, unlike):
    a, b = np.triu_indices(12, 1)
    single, table = [], []
    for _ in range(300):
        values = table_of(draw, 12, unlike, 0.0)
        test = differences(values, [], np.zeros(12, dtype=bool), prior_of_rows(values))
        p = test.p()[a, b]
        single.append((p < 0.05).mean())
        table.append((benjamini_hochberg(p) < 0.05).any())
    assert np.mean(single) < 0.065
    assert np.mean(table) < 0.075


@pytest.mark.parametrize(("unlike", "least"), [(0.0, 0.9), (0.7, 0.6)])
def test_moderated_tests_find_more(draw, unlike, least):
    a, b = np.triu_indices(12, 1)
    apart = (a < 6) != (b < 6)
    found = {False: [], True: []}
    for _ in range(60):
        values = table_of(draw, 12, unlike, 15.0)
        for lend in found:
            prior = prior_of_rows(values) if lend else moderate.NONE
            p = differences(values, [], np.zeros(12, dtype=bool), prior).p()[a, b]
            found[lend].append((benjamini_hochberg(p) < 0.05)[apart].mean())
    assert np.mean(found[True]) > least > np.mean(found[False]) + 0.15
