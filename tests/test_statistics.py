"""Tests of the statistics in mdpt.py: loops, an independent computation and simulations are the judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import Any

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
    assert found.mean == pytest.approx(table.mean() - own.mean())
    assert found.std_percent == pytest.approx(100 * (spread(table)["std"] / own.std(ddof=1) - 1))
    level = cli.compare(np.full((3, 4), 2.0), after[:3])
    assert level.iqr_percent is level.spread_p is None
    for width in (1, 6):  # a guidance that changes nothing, crossed or not
        same = cli.compare(before, np.tile(before[:, None], (width, 1)))
        expected = {"median": 0, "improvement": 0.5, "iqr": 0, "std": 0}
        assert {key: getattr(same, key) for key in CHANGES} == pytest.approx(expected, abs=1e-9)
        assert same.spread_p is None and set(same.intervals) == {"mean", "std_percent", "iqr_percent"}
        assert np.abs([*same.intervals.values()]).max() < 1e-9
    one = cli.summarize(after[:1])  # a single policy: over those who guide it
    assert [one.iqr, one.std] == pytest.approx([stats.iqr(table[0]), table[0].std(ddof=1)])
    gaps = table[0] - own[0]
    alone = cli.compare(before[:1], after[:1])
    assert alone.median == pytest.approx(np.median(gaps)) and alone.range == pytest.approx([min(gaps), max(gaps)])


@pytest.mark.parametrize(("members", "guidances"), [(4, 1), (4, 4), (6, 4), (5, 6)])
def test_few_members_or_unequal_numbers_have_no_interval(members: int, guidances: int) -> None:
    table = per_episode(np.random.default_rng(1).normal(60, 5, (members, guidances)))
    summary, change = cli.summarize(table), cli.compare(table[:, 0], table)
    assert summary.iqm_interval is change.intervals is None
    few = members < 5  # then the IQM is the mean or nearly so, and a percentage is of little
    shown = (summary.iqm, change.iqr_percent, change.std_percent)
    assert [value is None for value in shown] == [few] * 3 and None not in (change.iqr, change.std, change.mean)


def test_intervals_of_matched_members_by_other_means() -> None:
    """Of the mean as a paired t-test has it; of an IQM by the trimmed t of Tukey and McLaughlin, by hand."""
    random = np.random.default_rng(2)
    own, other = random.normal(50, 20, (8, 1)), random.normal(60, 5, (8, 1))
    found = cli.compare(own, other[:, None]).intervals
    assert found["mean"] == pytest.approx(tuple(stats.ttest_rel(other[:, 0], own[:, 0]).confidence_interval()))
    left = [np.log(np.std(np.delete(other, i), ddof=1) / np.std(np.delete(own, i), ddof=1)) for i in range(8)]
    ratio, half = np.log(other.std(ddof=1) / own.std(ddof=1)), stats.t.ppf(0.975, 7) * np.sqrt(7 * np.var(left))
    assert found["std_percent"] == pytest.approx(tuple(100 * (np.exp([ratio - half, ratio + half]) - 1)))
    scores = np.array([0.0, 1, 2, 4, 6, 7, 9, 50])  # kept: 2 4 6 7, mean 4.75; winsorized: 2 2 2 4 6 7 7 7
    half = stats.t.ppf(0.975, 3) * np.sqrt(7 * np.var([2, 2, 2, 4, 6, 7, 7, 7], ddof=1) / (4 * 3))
    assert cli.summarize(scores[:, None, None]).iqm_interval == pytest.approx((4.75 - half, 4.75 + half))


def test_what_starts_do_to_all_members_widens_an_interval_once() -> None:
    """Noise of episodes is in the members' scores; what all members share is not, and comes on top."""
    random = np.random.default_rng(3)
    scores, starts = random.normal(0, 1, (6, 1, 8)), random.normal(0, 3, 8)
    scores -= scores.mean(0) - scores.mean()  # nothing is shared
    alone, shared = cli.summarize(scores).iqm_interval, cli.summarize(scores + starts).iqm_interval
    assert alone == pytest.approx(cli.summarize(scores.mean(2, keepdims=True)).iqm_interval)
    rest = np.var(scores - scores.mean(2, keepdims=True)) * 48 / 35  # by analysis of variance
    kept = stats.mstats.winsorize(scores.mean(2)[:, 0], (0.25, 0.25))
    ours, theirs = 5 * np.var(kept, ddof=1) / (4 * 3), (np.var(starts, ddof=1) - rest / 6) / 8
    freedom = (ours + theirs) ** 2 / (ours**2 / 3 + theirs**2 / 7)
    assert np.ptp(shared) / 2 == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(ours + theirs))
    own = random.normal(0, 1, (6, 8))
    found, expected = (cli.compare(own + each, (own + 5 + each)[:, None]).intervals["mean"] for each in (starts, 0))
    assert found == pytest.approx((5, 5)) and expected == pytest.approx((5, 5))  # in changes it cancels


def test_intervals_of_crossed_members_leave_out_policy_and_guidance_together() -> None:
    random = np.random.default_rng(4)
    own, table = random.normal(50, 20, 6), random.normal(60, 5, (6, 6))
    change, half = cli.compare(own[:, None], table[..., None]), {}
    keep = [[j for j in range(6) if j != i] for i in range(6)]
    for name, figure in (
        ("mean", lambda rows: table[np.ix_(rows, rows)].mean() - own[rows].mean()),
        ("std", lambda rows: np.log(spread(table[np.ix_(rows, rows)])["std"] / own[rows].std(ddof=1))),
        ("iqm", lambda rows: stats.trim_mean(table[np.ix_(rows, rows)].ravel(), 0.25)),
    ):
        half[name] = stats.t.ppf(0.975, 5) * np.sqrt(5 * np.var([figure(rows) for rows in keep]))
    assert change.intervals["mean"] == pytest.approx((change.mean - half["mean"], change.mean + half["mean"]))
    assert np.ptp(np.log(np.array(change.intervals["std_percent"]) / 100 + 1)) == pytest.approx(2 * half["std"])
    assert np.ptp(cli.summarize(table[..., None]).iqm_interval) == pytest.approx(2 * half["iqm"])


EPISODES = 4


def simulated(
    random: np.random.Generator, tails: str, members: int, crossed: bool, changed: bool, starts: float
) -> Any:
    """Scores of policies under their own and other guidance, (S, E) and (S, K, E).

    A score is a policy's part, a guidance's and a pair's, and noise of the episode; perhaps a part of the start state,
    which is the same for all members. Changed: half the spread, around a higher mean.
    """
    width = members if crossed else 1
    policy, own, pair = (draw(random, tails, (members, 1)) for _ in range(3))
    guidance = draw(random, tails, (1, width, 1) if crossed else (members, 1, 1))
    pairs, ratio, gain = draw(random, tails, (members, width, 1)), 0.5 if changed else 1.0, 0.7 * changed
    noises = (draw(random, tails, (*shape, EPISODES)) for shape in ((members,), (members, width)))
    noise, other_noise = noises
    start, other_start = starts * random.normal(size=(2, EPISODES))
    before = 0.5 * policy + own + 0.7 * pair + noise + start
    after = ratio * (0.5 * policy[:, None] + guidance + 0.7 * pairs + other_noise) + gain + start + 0.5 * other_start
    return before, after, ratio, gain


@cache
def true_chance(tails: str) -> float:
    """P(better) where the spread is halved around a higher mean."""
    random, size = np.random.default_rng(99), 400_000
    parts = np.array([0.5, 1, 0.7, EPISODES**-1])
    one, other = (
        sum(
            part * draw(random, tails, (count, size)).sum(0)
            for part, count in zip(parts, (1, 1, 1, EPISODES), strict=True)
        )
        for _ in range(2)
    )
    return float(np.searchsorted(np.sort(one), 0.5 * other + 0.7).mean() / size)


def coverage(tails: str, members: int, draws: int) -> dict[str, list[float]]:
    """How often each interval covers the truth: by statistic, a share for each of the situations."""
    found: dict[str, list[float]] = {}
    for crossed, changed, starts in product((False, True), (False, True), (0.0, 1.0)):
        random, hits = np.random.default_rng([members, crossed, changed, int(starts)]), {}
        for _ in range(draws):
            before, after, ratio, gain = simulated(random, tails, members, crossed, changed, starts)
            percent = 100 * (ratio - 1)
            truth = {"mean": gain, "std_percent": percent, "iqr_percent": percent}
            truth |= {} if starts else {"improvement": true_chance(tails) if changed else 0.5}
            intervals = cli.change_intervals(before, after)
            for name, value in truth.items():
                if name in intervals:
                    low, high = intervals[name]
                    hits.setdefault(name, []).append(low <= value <= high)
            low, high = cli.iqm_interval(after)
            hits.setdefault("IQM", []).append(low <= gain <= high)
        kind = "crossed" if crossed else "matched"
        for name, each in hits.items():
            found.setdefault(f"{name}, {kind}", []).append(float(np.mean(each)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["normal", "heavy"])
@pytest.mark.parametrize("members", [5, 10, 20])
def test_intervals_cover_what_they_should(members: int, tails: str) -> None:
    """As often as a thousand draws for a table of experiments/README.md do, up to the error of fewer draws."""
    found = coverage(tails, members, draws=240)
    assert ("improvement, matched" in found) == (members >= 20)
    for name, shares in found.items():  # a share of 0.95 has an error of 0.014, the mean of four of 0.007
        assert 0.88 < min(shares) and max(shares) < 0.995 and 0.92 < np.mean(shares) < 0.98, (name, shares)


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
    assert interval is None  # fewer than twenty
    many, more = random.normal(1, 1, (20, 3)), random.normal(0, 2, (25, 3))
    one, other = many.mean(1), more.mean(1)
    share, (low, high) = cli.probability_of_improvement(many, more)
    parts = [wins(np.delete(one, i), other) for i in range(20)], [wins(one, np.delete(other, i)) for i in range(25)]
    error = np.sqrt(sum((len(part) - 1) * np.var(part) for part in parts))
    half = stats.t.ppf(0.975, 19) * error / (share * (1 - share))
    assert np.log([low / (1 - low), high / (1 - high)]) == pytest.approx(np.log(share / (1 - share)) + [-half, half])
    assert cli.probability_of_improvement(ours + 10, theirs) == (1, None)
    assert cli.probability_of_improvement(many + 99, more) == (1, None)
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
    assert [found["policy"], found["guidance"], found["rest"]] == pytest.approx([1, 18**0.5, 0])
    noisy = cli.variance_components(np.array([[1.0, 0.0], [0.0, 1.0]]))  # no main effect: these variances are negative
    assert noisy == {"policy": 0, "guidance": 0, "rest": pytest.approx(1)}  # sum of squares 1, one degree of freedom


if __name__ == "__main__":  # prints the table of experiments/README.md
    for members_, tails_ in product((5, 10, 20), ("normal", "heavy")):
        for name_, shares_ in coverage(tails_, members_, 1_000).items():
            print(f"{members_} {tails_} {name_}: {' '.join(f'{100 * share:.1f}' for share in shares_)}", flush=True)
