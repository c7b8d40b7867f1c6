"""Windows of [data] horizon rows: batches, losses, judgement, acting, and the Transformer that denoises them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdpt import data, models
from mdpt.data import DataSection, Experiment, GuidanceSection, PolicySection
from mdpt.models import GUIDANCES, POLICIES, Batch, Bundle, Run, Transitions

SMALL = {"steps": 12, "batch_size": 16, "snapshots": 1}


def episodes_of(lengths: list[int], ends: str, o: int = 3, a: int = 2, seed: int = 0) -> dict[str, Any]:
    """Columns of random episodes; ends: "t" terminal, "l" time limit or "-" neither (the last one only), of each."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    last = np.cumsum(lengths) - 1
    columns = {
        "observations": rng.standard_normal((n, o)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, a)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "next_observations": rng.standard_normal((n, o)).astype(np.float32),
    }
    for key, mark in (("terminals", "t"), ("timeouts", "l")):
        columns[key] = np.zeros(n, bool)
        columns[key][last[[end == mark for end in ends]]] = True
    return columns


def load(columns: dict[str, Any], horizon: int, has_next: bool = True, **section: Any) -> data.Dataset:
    columns = {key: column for key, column in columns.items() if has_next or key != "next_observations"}
    settings = {"held_out": 0.0, "reward_scale": "none", "reference": (0.0, 1.0)} | section
    return data.load_dataset(DataSection(source="arrays", horizon=horizon, **settings), arrays=columns)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("has_next", [True, False])
@pytest.mark.parametrize("horizon", [1, 2, 4, 9])
def test_windows_against_brute_force(
    horizon: int, has_next: bool, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    lengths, ends, g = [5, 1, 7, 3, 2, 6], "tlltl-", 0.9
    columns = episodes_of(lengths, ends)
    source = Transitions(load(columns, horizon, has_next, storage=storage), "cpu")
    # episode by episode, the rows that are transitions, in file order
    episodes, start = [], 0
    for length, end in zip(lengths, ends, strict=True):
        episodes.append(list(range(start, start + length - (not has_next and end in "l-"))))
        start += length
    order = [row for episode in episodes for row in episode]
    assert len(source) == len(order)
    batch = source.take(torch.arange(len(order)).expand(2, -1))
    rewards, discounts = batch.discounted(g)
    next_actions, exists = batch.next_actions()
    known = batch.known()

    def following(place: int) -> np.ndarray[Any, Any]:  # actions of H rows from this place of `order` on
        return np.concatenate([columns["actions"][order[(place + i) % len(order)]] for i in range(horizon)])

    for episode, length, end in zip(episodes, lengths, ends, strict=True):
        for i, row in enumerate(episode):
            place, window = order.index(row), episode[i : i + horizon]
            own = len(window)
            for s in range(2):
                assert np.array_equal(batch.observations[s, place], columns["observations"][row])
                assert np.array_equal(batch.actions[s, place], following(place))
                counted = torch.ones(2 * horizon) > 0 if known is None else known[s, place]
                assert counted.tolist() == [True] * 2 * own + [False] * 2 * (horizon - own)
                total = sum(g**j * columns["rewards"][each] for j, each in enumerate(window))
                assert rewards[s, place] == pytest.approx(total, abs=1e-5)
                assert discounts[s, place] == pytest.approx(g**own)
                after = columns["next_observations"][window[-1]] if has_next else None
                if after is None:  # the row that follows; after a terminal nothing is asked for
                    after = columns["observations"][min(window[-1] + 1, sum(lengths) - 1)]
                assert np.array_equal(batch.next_observations[s, place], after)
                assert bool(batch.terminals[s, place]) == columns["terminals"][window[-1]]
                more = i + own < len(episode)
                cut = window[-1] + 1 if not has_next and end in "l-" and not more else None
                assert bool(exists[s, place]) == (more or cut is not None)
                if more:
                    assert np.array_equal(next_actions[s, place], following(place + own))
                elif cut is not None:  # the row at the limit is no transition, its action is known
                    rest = following(place + own)[: 2 * (horizon - 1)]
                    assert np.array_equal(next_actions[s, place], np.concatenate([columns["actions"][cut], rest]))


def test_held_out_windows_against_brute_force() -> None:
    columns = episodes_of([5, 1, 7, 3], "tllt")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    held_out, n = data.HeldOut(*(columns[key] for key in keys)), 16
    rows = np.random.default_rng(1).permutation(n)
    actions, known = held_out.windows(rows, 4)
    stops = [5, 6, 13, 16]
    for row, window, counted in zip(rows.tolist(), actions, known, strict=True):
        assert np.array_equal(window, columns["actions"][[(row + i) % n for i in range(4)]])
        assert counted.tolist() == [row + i < next(stop for stop in stops if stop > row) for i in range(4)]
