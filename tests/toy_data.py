"""Small datasets for tests. The order of columns in a row is known to `Dataset` alone, so that a new column breaks no test."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdpt.data import DataSection, Dataset, EnvironmentSpec, HeldOut, Identity, RewardScale, moments
from mdpt.models import Transitions

TOY = EnvironmentSpec("Toy-v0", 3, 2, action_low=(-1.0, 0.0), action_high=(1.0, 4.0), max_episode_steps=6)


def toy_dataset(columns: dict[str, Any], ends: list[int] | None = None) -> Dataset:
    """A dataset of these columns, of which 20 rows are held out, too; episodes end at `ends`, by default at terminals."""
    arrays = {name: np.asarray(column, dtype=np.float32) for name, column in columns.items()}
    (count, o), a = arrays["observations"].shape, arrays["actions"].shape[1]
    spec = TOY
    if (o, a) != (TOY.observation_dim, TOY.action_dim):
        spec = EnvironmentSpec(None, o, a, (-1.0,) * a, (1.0,) * a, 6)
    if ends is None:
        ends = sorted({*(np.flatnonzero(arrays["terminals"]) + 1).tolist(), count})
    terminals = arrays["terminals"][:20] > 0
    held_out = HeldOut(*(arrays[key][:20] for key in ("observations", "actions", "rewards")), terminals, ~terminals)
    dataset = Dataset(
        environment=spec,
        section=DataSection(source="arrays", environment=spec.id, reference=(0.0, 100.0)),
        rows=np.zeros((0, 0), np.float32),
        ends=np.array(ends, np.int64),
        cut_actions=np.full((len(ends), a), np.nan, np.float32),
        mean=np.zeros(o, np.float32),
        deviation=np.ones(o, np.float32),
        constant=np.zeros(o, np.bool_),
        held_out=held_out,
        episode_returns=np.array([1.0, 2.0]),
        episode_lengths=np.array([6, 6]),
        reward_scale=RewardScale("none", 1.0, 0.0),
        identity=Identity("hdf5", "toy", count, "", "abc"),
        terminal_count=int(arrays["terminals"].sum()),
        timeout_count=0,
        timeouts_counted=False,
        warnings=(),
    )
    dataset = dataclasses.replace(dataset, rows=np.zeros((count, sum(dataset.sizes)), np.float32))
    for name, array in arrays.items():
        dataset.column(name)[:] = array  # type: ignore[arg-type]
    mean, deviation, constant = moments(dataset.rows, o)
    return dataclasses.replace(dataset, mean=mean, deviation=deviation, constant=constant)


def transitions(columns: dict[str, Any], ends: list[int] | None = None) -> Transitions:
    """The rows of such a dataset, on the CPU."""
    return Transitions(toy_dataset(columns, ends), "cpu")


def noisy_columns(n: int = 200, o: int = 3, a: int = 2) -> dict[str, Tensor]:
    """Columns of noise, with terminals in three of ten rows."""
    g = torch.Generator().manual_seed(3)
    return {
        "observations": torch.randn(n, o, generator=g),
        "actions": torch.rand(n, a, generator=g) * 2 - 1,
        "rewards": torch.randn(n, generator=g),
        "next_observations": torch.randn(n, o, generator=g),
        "terminals": torch.rand(n, generator=g) < 0.3,
    }


def one_state(actions: Tensor, rewards: Tensor) -> Transitions:
    """Terminal transitions from one state: actions (n,), rewards (n,)."""
    zeros = torch.zeros(len(actions), 1)
    columns = {"observations": zeros, "actions": actions[:, None], "rewards": rewards, "next_observations": zeros}
    return transitions(columns | {"terminals": torch.ones(len(actions))})
