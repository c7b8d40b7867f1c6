"""Tests of the statistics in mdpt.py: loops, an independent computation and simulations are the judge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

import mdpt.mdpt as cli
from mdpt.data import Array


def test_normalized_score() -> None:
    returns = np.array([[-5.0, 10.0], [2.5, 25.0]])
    assert cli.normalized_score(returns, (-5.0, 10.0)).tolist() == [[0, 100], [50, 200]]
    assert cli.normalized_score(returns, None).tolist() == returns.tolist()


# --- statistics


def spread(table: Array) -> dict[str, float]:
    """Of pairs that share no member, one shift after the other."""
    shifts = [[row[(i + k) % len(row)] for i, row in enumerate(table)] for k in range(len(table[0]))]
    shifts = [scores for scores in shifts if not np.isnan(scores).all()]
    return {
        "iqr": np.mean([stats.iqr(scores) for scores in shifts]),
        "std": np.mean([np.std(scores, ddof=1) for scores in shifts]),
    }


def changes(own: Array, swapped: Array) -> dict[str, float]:
    before, after, swapped = spread(own[:, None]), spread(swapped), swapped[~np.isnan(swapped)]
    wins = stats.mannwhitneyu(swapped.ravel(), own).statistic / (swapped.size * own.size)
    middle = np.median(swapped) - np.median(own)
    return {"median": middle, "improvement": wins} | {key: after[key] - before[key] for key in before}


def draw(random: np.random.Generator, tails: str, size: tuple[int, ...]) -> Array:
    """Random parts of scores: normal, Student's t with 3 degrees of freedom, or normal where 15 % fail by 4."""
    if tails == "heavy":
        return random.standard_t(3, size) / np.sqrt(3)
    return random.normal(size=size) - 4 * (random.random(size) < 0.15) * (tails == "failing")


CHANGES = ("median", "improvement", "iqr", "std")


def per_episode(scores: Array) -> Array:
    """Scores of four episodes with these means, as they would be if some starts were better than others."""
    return scores[..., None] + np.array([-30.0, -10.0, 5.0, 35.0])


def test_comparisons_agree_with_an_independent_computation() -> None:
    random = np.random.default_rng(1)
    own, table = random.normal(50, 20, 6), random.normal(60, 5, (6, 5))
    before, after = per_episode(own), per_episode(table)
    found = cli.compare(before, after)
    assert {key: getattr(found, key) for key in CHANGES} == pytest.approx(changes(own, table))
    others = random.normal(60, 5, (6, 6))
    others[range(6), range(6)] = np.nan  # other seeds alone
    change = cli.compare(before, per_episode(others))
    assert {key: getattr(change, key) for key in CHANGES} == pytest.approx(changes(own, others))
    assert change.range == pytest.approx([np.nanmin(others.T - own), np.nanmax(others.T - own)])
    assert found.iqr_percent == pytest.approx(100 * (spread(table)["iqr"] / stats.iqr(own) - 1))
    summary = cli.summarize(after)
    assert [summary.iqr, summary.std] == pytest.approx([*spread(table).values()])
    assert summary.range == pytest.approx([table.min(), table.max()])
    alone, copied = (cli.summarize(np.tile(before[:, None], (width, 1))) for width in (1, 6))  # the same is no news
    assert copied.members == 6 and np.ptp(copied.iqm_interval) > 0.8 * np.ptp(alone.iqm_interval)
    level = cli.compare(np.full((3, 4), 2.0), after[:3])
    assert level.iqr_percent is level.iqr_percent_by_chance is level.spread_p is None
    for width in (1, 6):  # a guidance that changes nothing, crossed or not
        same = cli.compare(before, np.tile(before[:, None], (width, 1)))
        expected = {"median": 0, "improvement": 0.5, "iqr": 0, "std": 0}
        assert {key: getattr(same, key) for key in CHANGES} == pytest.approx(expected, abs=1e-9)
        assert same.intervals and same.spread_p is None
        assert np.ptp([*same.intervals.values()], axis=1) == pytest.approx(0)
    one = cli.summarize(after[:1])  # a single policy: over those who guide it
    assert [one.iqr, one.std] == pytest.approx([stats.iqr(table[0]), table[0].std(ddof=1)])
    gaps = table[0] - own[0]
    alone = cli.compare(before[:1], after[:1])
    assert alone.median == pytest.approx(np.median(gaps)) and alone.range == pytest.approx([min(gaps), max(gaps)])


@pytest.mark.parametrize(("members", "guidances"), [(4, 1), (4, 6), (6, 4)])
def test_few_members_have_a_range_and_no_interval(members: int, guidances: int) -> None:
    table = per_episode(np.random.default_rng(1).normal(60, 5, (members, guidances)))
    assert cli.summarize(table).iqm_interval is cli.compare(table[:, 0], table).intervals is None


@pytest.mark.slow
def test_intervals_agree_with_a_bootstrap_in_a_loop() -> None:
    random = np.random.default_rng(1)
    own, table = random.normal(50, 20, (12, 9)), random.normal(60, 5, (12, 12, 9)) + random.normal(0, 30, 9)
    draws = []
    for _ in range(2_000):
        rows, columns, episodes = (random.integers(0, size, size) for size in table.shape)
        draws.append((own[np.ix_(rows, episodes)].mean(1), table[np.ix_(rows, columns, episodes)].mean(2)))
    drawn = [changes(mine, swapped) for mine, swapped in draws]  # own and swapped together
    found = cli.compare(own, table).intervals
    assert set(found) == set(CHANGES)
    level = stats.norm.cdf(np.sqrt(12 / 11) * stats.t.ppf(0.025, 11))
    for name in CHANGES:
        low, high = np.quantile([change[name] for change in drawn], [level, 1 - level])
        assert found[name] == pytest.approx([low, high], abs=0.15 * (high - low)), name
    low, high = np.quantile([stats.trim_mean(swapped.ravel(), 0.25) for _, swapped in draws], [level, 1 - level])
    assert cli.summarize(table).iqm_interval == pytest.approx([low, high], abs=0.15 * (high - low))


@pytest.mark.slow
def test_intervals_cover_what_they_should() -> None:
    """Of 95 %: for five members and their mean, the plain percentiles' is too short; and for starts not yet seen."""
    random = np.random.default_rng(4)

    def covered(tables: Array) -> float:
        return float(np.mean([low <= 0 <= high for low, high in (cli.summarize(t).iqm_interval for t in tables)]))

    members, starts = random.normal(size=(1_000, 5, 1, 1)), random.normal(0, np.sqrt(10), (300, 1, 1, 10))
    plain = stats.trim_mean(members[:, random.integers(5, size=(2_000, 5)), 0, 0], 0.25, axis=-1)
    low, high = np.quantile(plain, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.92 <= covered(members)
    assert covered(members[:300] + starts) >= 0.9  # the mean over ten starts varies as much as members do
    found = [cli.summarize(table.mean(-1, keepdims=True)).iqm_interval for table in members[:300] + starts]
    assert np.mean([low <= 0 <= high for low, high in found]) < 0.85  # members drawn alone


@pytest.mark.parametrize("others", ["all", "other seeds"])
def test_crossing_changes_no_spread_by_itself(others: str) -> None:
    random = np.random.default_rng(2)
    noise = random.normal(0, 1, (4_000, 4, 4))  # every pair's score is its own
    if others == "other seeds":
        noise[:, range(4), range(4)] = np.nan
    crossed, alone = cli.spread(noise), cli.spread(random.normal(0, 1, (4_000, 4, 1)))
    for one, other in zip(crossed, alone, strict=True):
        assert one.mean() == pytest.approx(other.mean(), rel=0.04)


def test_the_test_of_spreads_by_hand() -> None:
    own, other = np.array([0.0, 1, 2, 3]), np.array([1.5, 0, 5, 10])
    # sums 1.5 1 7 13, ranks 2 1 3 4; differences 1.5 -1 3 7, ranks 2 1 3 4: of 24 orders, 1 agrees as well, 1 is opposite
    assert cli.spread_test(own, other[:, None]) == pytest.approx(2 / 24)
    assert cli.spread_test(own + 9, other[:, None]) == pytest.approx(2 / 24)  # levels do not matter
    columns = np.stack([own * 2, other, own, other], 1)  # policy member i meets guidance member i + 1 in the second
    crossed = np.stack([np.roll(row, i) for i, row in enumerate(columns)])
    assert cli.spread_test(own, crossed) == pytest.approx(2 / 24)
    assert cli.spread_test(own, crossed[:, :3]) is None  # members share a guidance
    assert cli.spread_test(own[:2], other[:2, None]) is cli.spread_test(own, np.ones((4, 1))) is None
    assert cli.spread_test(own, own[:, None] + 1e-9 * other[:, None]) is None  # rounding is no change
    random = np.random.default_rng(0)
    for members in (5, 7, 8, 30):
        before, after = random.normal(size=(2, members))
        found = cli.spread_test(before, after[:, None])
        r, p = stats.spearmanr(before + after, after - before)
        if members > 7:
            assert found == pytest.approx(p)
        else:
            orders = np.array(list(permutations(range(members))))
            others = [np.corrcoef(range(members), order)[0, 1] for order in orders]
            assert found == pytest.approx(np.mean(np.abs(others) >= abs(r) - 1e-9))


def test_holm_by_hand() -> None:
    assert cli.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert cli.holm([0.5, 0.6]) == [1, 1] and cli.holm([0.02]) == [0.02] and cli.holm([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["normal", "heavy", "failing"])
def test_the_test_of_spreads_errs_as_rarely_as_it_says(tails: str) -> None:
    """On scores it rejects 12 % of cases without a change where tails are heavy; on ranks not much more than 5 %."""
    random = np.random.default_rng(5)
    shared, one, other = (draw(random, tails, (1_000, 10)) for _ in range(3))
    own, same = shared + one, shared + other
    rejected = {
        ratio: np.mean(
            [(cli.spread_test(*pair) or 1) < 0.05 for pair in zip(own, ratio * same[..., None], strict=True)]
        )
        for ratio in (1.0, 0.5, 0.14)
    }
    assert rejected[1.0] < 0.08 and rejected[0.5] > 0.4 and rejected[0.14] > 0.97
    policies, guidances, pairs = (draw(random, tails, (500, *shape)) for shape in ((10, 1), (1, 10), (10, 10)))
    table = policies + guidances + 0.7 * pairs  # each policy grew under the guidance of its place
    crossed = [(cli.spread_test(scores.diagonal(), scores) or 1) < 0.05 for scores in table]
    assert np.mean(crossed) < 0.08


@pytest.mark.parametrize(("members", "correlation"), [(3, 0.0), (5, 0.5), (10, 0.9)])
def test_chance_changes_an_iqr_as_far_as_it_says(members: int, correlation: float) -> None:
    covariance = [[1, correlation], [correlation, 1]]
    drawn = np.random.default_rng(6).multivariate_normal([50, 50], covariance, (10_000, members))
    before, after = np.moveaxis(stats.iqr(drawn, axis=1), -1, 0)
    low, high = cli.by_chance(members, correlation)
    assert np.mean((low < 100 * (after / before - 1)) & (100 * (after / before - 1) < high)) == pytest.approx(
        0.95, abs=0.015
    )


def test_falling_short_is_a_one_sided_test_over_members() -> None:
    random = np.random.default_rng(7)
    for gap in (0.0, 0.5, 1.5):
        ours, theirs = random.normal(-gap, 1, (5, 4)), random.normal(0, 1, (5, 4))
        tests = [(ours, ours.mean(1), theirs, theirs.mean(1)), (ours[:1], ours[0], theirs[:1], theirs[0])]
        for some, mine, others, yours in tests:  # of a single member: over its episodes
            p = stats.ttest_rel(mine, yours, alternative="less").pvalue
            assert cli.falls_short(some, others) == (p < 0.05)
            assert cli.falls_short(some, 1.0) == (stats.ttest_1samp(mine, 1.0, alternative="less").pvalue < 0.05)
    assert not cli.falls_short(np.zeros((1, 1)), 9.0) and not cli.falls_short(ours, ours)
    assert cli.falls_short(np.zeros((2, 3)), 1.0)  # without any variance


def test_probability_of_improvement_against_a_loop() -> None:
    random = np.random.default_rng(3)
    first, second = random.integers(0, 8, 11).astype(np.float64), random.integers(0, 6, 10).astype(np.float64)
    assert set(first) & set(second)  # ties

    def wins(some: Sequence[float], others: Sequence[float]) -> float:
        points = [1.0 if one > other else 0.5 if one == other else 0.0 for one in some for other in others]
        return sum(points) / len(points)

    ours, theirs = first[:, None], second[:, None]  # an episode each
    found, interval = cli.probability_of_improvement(ours, theirs)
    assert found == pytest.approx(wins(first, second))
    assert cli.probability_of_improvement(theirs, ours)[0] == pytest.approx(1 - found)
    draws = [wins(random.choice(first, len(first)), random.choice(second, len(second))) for _ in range(4_000)]
    level = stats.norm.cdf(np.sqrt(10 / 9) * stats.t.ppf(0.025, 9))
    low, high = np.quantile(draws, [level, 1 - level])  # each drawn apart
    assert interval == pytest.approx((low, high), abs=0.1 * (high - low))
    assert cli.probability_of_improvement(ours + 10, theirs) == (1, (1, 1))
    for few in (1, 4):
        assert cli.probability_of_improvement(ours, theirs[:few]) == (wins(first, second[:few]), None)
        assert cli.probability_of_improvement(ours[:few], theirs) == (wins(first[:few], second), None)


def test_scores_in_a_table() -> None:
    def pair(member: int, seed: int, *returns: float) -> cli.Pair:
        return cli.Pair(member, 10 + member, seed, 0.0, 0.0, 0.0, list(returns), [], None, None)

    crossed = cli.tabulate([pair(0, 7, 1.0, 3.0), pair(0, 3, 2.0, 2.0), pair(1, 3, 4.0, 0.0)], 3, (0, 100))
    none = [np.nan, np.nan]
    assert np.array_equal(crossed, [[[1, 3], [2, 2]], [none, [4, 0]], [none, none]], equal_nan=True)
    paired = cli.tabulate([pair(0, 7, 1.0, 3.0), pair(2, 3, 0.0, 6.0)], 3, (1, 3))
    assert np.array_equal(paired, [[[0, 100]], [none], [[-50, 250]]], equal_nan=True)
    others = [pair(i, seed, 10.0 * i + seed) for i in range(3) for seed in (12, 7, 10, 11) if seed != 10 + i]
    (table,) = np.moveaxis(cli.tabulate(others, 3, (0, 100)), -1, 0)
    assert np.array_equal(table, [[np.nan, 11, 12, 7], [20, np.nan, 22, 17], [30, 31, np.nan, 27]], equal_nan=True)


def test_what_a_single_pair_shows_is_no_spread() -> None:
    table = np.array([[[np.nan], [10.0]], [[30.0], [20.0]]])  # a policy of two members under the guidance of the first
    found = cli.summarize(table)  # one shift has 10 and 30, the other 20 alone
    assert (found.iqr, found.std) == (10, pytest.approx(200**0.5))
    alone = np.array([[[np.nan]], [[30.0]]])
    assert (cli.summarize(alone).iqr, cli.summarize(alone).std) == (None, None)
    change = cli.compare(np.array([[10.0], [20.0]]), alone)
    assert (change.iqr, change.std, change.iqr_percent) == (None, None, None)


def test_what_is_rounded_otherwise_is_no_change() -> None:
    random = np.random.default_rng(0)
    own = random.normal(50, 20, (10, 3))
    found = cli.compare(own, own[:, None] + random.normal(0, 1e-9, (10, 1, 3)))
    assert (found.spread_p, found.improvement) == (None, 0.5)


def test_components_of_a_crossed_table_by_hand() -> None:
    """Additive shares without a rest are found again; the analysis of variance of a table with one, by hand."""
    policy, guidance = np.array([-1.0, 0.0, 1.0]), np.array([-3.0, 3.0])
    found = cli.variance_components(50 + policy[:, None] + guidance)
    assert found["policy"].std == pytest.approx(1) and found["guidance"].std == pytest.approx(18**0.5)
    assert found["rest"].std == pytest.approx(0) and found["policy"].interval is None  # fewer than five
    noisy = cli.variance_components(np.array([[1.0, 0.0], [0.0, 1.0]]))  # no main effect: these variances are negative
    assert noisy["rest"].std == pytest.approx(1.0)  # sum of squares 1, one degree of freedom
    assert noisy["policy"].std == noisy["guidance"].std == 0


@pytest.mark.slow
@pytest.mark.parametrize(("count", "width", "shares"), [(5, 5, (10, 5, 5)), (10, 10, (12, 0, 6)), (5, 10, (8, 8, 8))])
def test_intervals_of_components_cover(count: int, width: int, shares: tuple[float, ...]) -> None:
    random, draws = np.random.default_rng(0), 1_000
    covered = np.zeros(3)
    for _ in range(draws):
        columns, rows, rest = (random.normal(size=size) for size in (width, (count, 1), (count, width)))
        found = cli.variance_components(shares[0] * columns + shares[1] * rows + shares[2] * rest)
        for place, (name, share) in enumerate(zip(("guidance", "policy", "rest"), shares, strict=True)):
            low, high = found[name].interval
            covered[place] += low <= share <= high
    assert (covered / draws > 0.93).all() and (covered / draws < 0.985).all()
