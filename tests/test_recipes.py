"""Tests of experiments/RECIPES.md: each recipe runs on a tiny file in its library's layout, and gives the right rows."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from mdpt.data import Array, DataSection, Dataset, load_dataset

TEXT = (Path(__file__).parent.parent / "experiments" / "RECIPES.md").read_text(encoding="utf-8")
RECIPES = dict(
    re.findall(
        r"^## (.+?)\n.*?```python\n(.*?)```", TEXT.partition("# Other libraries' files")[2], re.MULTILINE | re.DOTALL
    )
)
ENDS = np.array([0, 0, 1, 0, 0, 0, 1], dtype=bool)  # two episodes, the first of which ends in a success
SUCCESS = np.array([0, 0, 1, 0, 0, 0, 0], dtype=bool)
PLACES, SPEEDS = np.arange(7.0)[:, None], np.arange(14.0).reshape(7, 2) / 10
ACTIONS = np.linspace(-1, 1, 7)[:, None]


def load(recipe: str, **changed: Any) -> Dataset:
    """What a recipe's arrays give."""
    names: dict[str, Any] = {"np": np, "h5py": h5py, "Path": Path, "pandas": sys.modules.get("pandas")}
    exec(RECIPES[recipe], names)  # noqa: S102
    settings: dict[str, Any] = {"source": "arrays", "held_out": 0.0, "reward_scale": "none"}
    return load_dataset(DataSection(**(settings | changed)), arrays=names["arrays"])


def check(dataset: Dataset, observations: Array, rows: list[int]) -> None:
    """These rows are transitions, and the third row is the only real end."""
    assert np.allclose(dataset.column("observations"), observations[rows])
    assert np.allclose(dataset.column("actions"), ACTIONS[rows]) and np.allclose(
        dataset.column("rewards"), SUCCESS[rows]
    )
    assert np.array_equal(dataset.column("terminals"), SUCCESS[rows]) and dataset.ends.tolist() == [3, len(rows)]
    assert (dataset.terminal_count, dataset.timeout_count) == (1, 1)
    assert np.allclose(dataset.column("next_observations")[[0, 3]], observations[[1, 4]])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_recipes_are_short() -> None:
    lines = {name: len(code.splitlines()) for name, code in RECIPES.items()}
    assert lines == {
        "robomimic": 5,
        "OGBench": 3,
        "LeRobot": 3,
        "d3rlpy": 1,
        "CSV": 4,
        "Several environments side by side": 3,
    }


def test_robomimic() -> None:
    with h5py.File("low_dim.hdf5", "w") as file:
        for number, part in ((10, slice(3, 7)), (2, slice(0, 3))):  # HDF5 lists demo_10 first
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"], demo["rewards"], demo["dones"] = ACTIONS[part], SUCCESS[part] * 1.0, ENDS[part] * 1
            demo["obs/robot0_eef_pos"], demo["obs/object"] = SPEEDS[part], PLACES[part]
    check(load("robomimic"), np.hstack([PLACES, SPEEDS]), [0, 1, 2, 3, 4, 5])
    chosen = load("robomimic", observation_keys=["robot0_eef_pos", "object"])
    check(chosen, np.hstack([SPEEDS, PLACES]), [0, 1, 2, 3, 4, 5])


def test_ogbench(monkeypatch: pytest.MonkeyPatch) -> None:
    after = np.where(ENDS[:, None], PLACES + 0.5, np.roll(PLACES, -1, axis=0))
    train = {"observations": PLACES, "actions": ACTIONS, "next_observations": after, "qpos": PLACES}
    train |= {"rewards": SUCCESS * 1.0, "terminals": ENDS * 1.0, "masks": 1.0 - SUCCESS}
    module: Any = ModuleType("ogbench")
    module.make_env_and_datasets = lambda name: (None, train, train)
    monkeypatch.setitem(sys.modules, "ogbench", module)
    dataset = load("OGBench")
    check(dataset, PLACES, [*range(7)])
    assert dataset.column("next_observations")[-1] == 6.5 and "'masks'" in dataset.warnings[0]


def concat(parts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    read = [*parts]
    return {key: np.concatenate([part[key] for part in read]) for key in read[0]}


def test_lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas, which tables need, is replaced by what reads this test's files."""
    for number, part in ((0, slice(0, 3)), (1, slice(3, 7))):
        path = Path("pusht/data/chunk-000", f"episode_{number:06d}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"observation.state": SPEEDS[part], "action": ACTIONS[part], "next.reward": SUCCESS[part] * 1.0}
        with path.open("wb") as file:
            np.savez(file, **table, **{"next.success": SUCCESS[part], "next.done": ENDS[part]})  # type: ignore[arg-type]
    module: Any = ModuleType("pandas")
    module.read_parquet = lambda path: dict(np.load(path))
    module.concat = concat
    monkeypatch.setitem(sys.modules, "pandas", module)
    check(load("LeRobot"), SPEEDS, [0, 1, 2, 3, 4, 5])


def test_d3rlpy() -> None:
    with h5py.File("d3rlpy.h5", "w") as file:
        columns = {"observations": SPEEDS, "actions": ACTIONS, "rewards": SUCCESS * 1.0, "terminals": SUCCESS * 1.0}
        for key, array in (columns | {"episode_terminals": ENDS * 1.0, "version": "1.0"}).items():
            file[key] = array
    check(load("d3rlpy"), SPEEDS, [0, 1, 2, 3, 4, 5])


def test_csv() -> None:
    head = "observation_0,observation_1,action_0,reward,done,episode"
    episodes = np.repeat([0, 1], [3, 4])[:, None]
    table = np.hstack([SPEEDS, ACTIONS, SUCCESS[:, None], SUCCESS[:, None], episodes])
    np.savetxt("my.csv", table, delimiter=",", header=head, comments="")
    check(load("CSV"), SPEEDS, [0, 1, 2, 3, 4, 5])


def test_vector_environments() -> None:
    """Two environments, four steps: each one's rows follow each other, and the last is cut."""
    observations = np.stack([np.arange(4.0), 10 + np.arange(4.0)], axis=1)[..., None]
    zeros = np.zeros((4, 2))
    terminals = zeros.copy()
    terminals[1, 0] = 1
    arrays = {"observations": observations, "actions": np.linspace(-1, 1, 8).reshape(4, 2, 1), "rewards": zeros}
    np.savez("vector.npz", **arrays, terminals=terminals, timeouts=zeros)  # type: ignore[arg-type]
    dataset = load("Several environments side by side")
    assert dataset.column("observations")[:, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert dataset.column("next_observations")[2:, 0].tolist() == [3, 11, 12, 13]
    assert dataset.ends.tolist() == [2, 3, 6] and dataset.column("terminals").tolist() == [0, 1, 0, 0, 0, 0]


def test_arrays_can_be_written_for_the_commands() -> None:
    (code,) = re.findall(r"```python\n(with h5py.*?)```", TEXT, re.DOTALL)
    arrays = {
        "observations": PLACES,
        "actions": ACTIONS,
        "rewards": SUCCESS * 1.0,
        "terminals": SUCCESS,
        "timeouts": ENDS & ~SUCCESS,
    }
    exec(code, {"h5py": h5py, "arrays": arrays})  # noqa: S102
    settings: dict[str, Any] = {"held_out": 0.0, "reward_scale": "none"}
    written = load_dataset(DataSection(path="my.hdf5", **settings))
    given = load_dataset(DataSection(source="arrays", **settings), arrays=arrays)
    assert np.array_equal(written.rows, given.rows)
