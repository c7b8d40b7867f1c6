"""Tests of experiments/study.py, whose statistics are checked by hand and against its page, and of labels.py's table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import labels
import study


def test_holm_by_hand() -> None:
    found = study.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


def test_the_test_of_spreads() -> None:
    """Independent of shifts and of the order of the two; small where one spread is ten times the other."""
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 20))
    p = study.spread_test(first, second)
    assert p == pytest.approx(study.spread_test(second + 5, first)) and p > 0.05
    assert study.spread_test(first, 10 * second) < 1e-3


def test_not_worse_by_hand() -> None:
    """Differences -10, -12, -8: mean 5 above the margin, standard error 2 / sqrt(3)."""
    p, low = study.not_worse(np.array([20.0, 30, 40]), np.array([10.0, 18, 32]))
    assert low == pytest.approx(-10 - stats.t.ppf(0.95, 2) * 2 / 3**0.5)
    assert p == pytest.approx(stats.t.sf(5 / (2 / 3**0.5), 2))


def test_the_interaction_against_a_regression() -> None:
    """The F test of the interaction is the comparison of two linear models of the ranks."""
    scores = np.random.default_rng(1).normal(size=(5, 3, 12)) + np.arange(5)[:, None, None]
    scores[4, 0] += 3
    ranks = stats.rankdata(scores)
    rows, columns = (part.ravel() for part in np.indices(scores.shape)[:2])
    apart = np.hstack([np.eye(5)[rows], np.eye(3)[columns][:, 1:]])
    together = np.eye(15)[rows * 3 + columns]
    rests = [float(((ranks - design @ np.linalg.lstsq(design, ranks)[0]) ** 2).sum()) for design in (apart, together)]
    ratio = ((rests[0] - rests[1]) / 8) / (rests[1] / (180 - 15))
    assert study.interaction(scores) == pytest.approx(stats.f.sf(ratio, 8, 165))


def test_areas_by_hand() -> None:
    """Scores 10 to 50 at five snapshots: from 0, a straight line; after guidance, in the second half only."""
    scores = 10.0 * np.arange(1, 6)[:, None]
    assert study.area(scores) == pytest.approx([25]) and study.area(scores, late=True) == pytest.approx([12.5])


def test_the_page_shows_what_the_files_hold() -> None:
    assert study.check((EXPERIMENTS / "README.md").read_text(encoding="utf-8")), "python experiments/study.py --table"


def test_the_table_of_labels_compares_with_a_clone_that_acts_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten members, all better by 1 to 10: p is 2 / 2^10, times two for the first of two cells; ranked, all are worse."""
    monkeypatch.setattr(labels, "STORE", tmp_path)
    base, gains = [0.0] * 10, list(range(1, 11))
    cells = {
        "bc, one sample": base,
        "bc, best of 10": [20.0] * 10,
        "cfg, w 1, one sample": gains,
        "cfg, w 2, one sample": [gain * (-1) ** gain for gain in gains],
        "dac, eta 1, best of 10": gains,
    }
    (tmp_path / "hopper.json").write_text(json.dumps(cells))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in labels.rows() if line]
    assert [line[2:] for line in lines[2:4]] == [["+0.0", ""]] * 2
    assert lines[4] == ["cfg, w 1, one sample", "5.5 (1.0 to 10.0)", "+5.5", "0.004"]
    assert lines[5][2] == "+0.5" and float(lines[5][3]) > 0.5
    assert lines[6] == ["dac, eta 1, best of 10", "5.5 (1.0 to 10.0)", "-14.5", "0.002"]
