"""Tests of data.py; D4RL itself is the judge of transitions, hand-made loops and a toy environment of the rest."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

import data
from data import Array, CollectSettings, DataError, EnvironmentSpec

HOPPER = "HopperBulletEnv-v0"
TOY = "toy_environment:Toy-v0"
SPEC = EnvironmentSpec("Spec-v0", 3, 2, (-1.0, 0.0), (1.0, 4.0), 5)


@pytest.fixture(scope="session")
def d4rl() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mujoco_py", None)  # D4RL then skips what needs MuJoCo, without a word
        patch.setenv("D4RL_SUPPRESS_IMPORT_ERROR", "1")
        return pytest.importorskip("d4rl")


def rows(n: int = 10, **changed: Any) -> dict[str, Any]:
    """A sound file's arrays for SPEC, some replaced; None drops a key."""
    random = np.random.default_rng(0)
    sound = {
        "observations": random.normal(size=(n, 3)).astype(np.float32),
        "actions": random.uniform([-1, 0], [1, 4], size=(n, 2)).astype(np.float32),
        "rewards": random.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, dtype=np.bool_),
        "timeouts": np.arange(n) % 5 == 4,
    }
    return {key: array for key, array in (sound | changed).items() if array is not None}


def write(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def put(array: Array, row: Any, value: float) -> Array:
    changed = array.astype(np.float64)
    changed[row] = value
    return changed


def load(path: Path | None, **changed: Any) -> data.Dataset:
    arguments: dict[str, Any] = {"source": "hdf5", "environment_id": TOY, "path": path, "reward_scale": "none"}
    arguments |= {"held_out": 0.0, "seed": 0, "collect": None, "workers": 1, "progress": None}
    return data.load_dataset(**(arguments | changed))


def toy_file(path: Path, lengths: list[int], **changed: Any) -> Path:
    """Episodes of these lengths for Toy-v0, all but the last ended by a terminal; observation 0 numbers the rows."""
    n = sum(lengths)
    terminals = np.zeros(n, dtype=np.bool_)
    terminals[np.cumsum(lengths, dtype=np.int64)[:-1] - 1] = True
    numbers = np.arange(n, dtype=np.float32)
    observations = np.stack([numbers, numbers], axis=1)
    actions = np.tile(np.array([0.5, 1.0], dtype=np.float32), (n, 1))
    arrays = {"observations": observations, "actions": actions, "rewards": numbers, "terminals": terminals}
    return write(path, arrays | {"timeouts": np.zeros(n, dtype=np.bool_)} | changed)


# ---------------------------------------------------------------------------------------------- environments


def test_environment_spec() -> None:
    assert data.environment_spec(HOPPER) == EnvironmentSpec(HOPPER, 15, 3, (-1.0,) * 3, (1.0,) * 3, 1000)
    assert data.environment_spec(TOY) == EnvironmentSpec(TOY, 2, 2, (-1.0, 0.0), (1.0, 4.0), 6)


@pytest.mark.parametrize(
    ("environment_id", "message"),
    [
        ("HoperBulletEnv-v0", "no such environment is registered with gymnasium. Did you mean 'HopperBulletEnv-v0'?"),
        ("qqq-v9", "no such environment is registered with gymnasium. Write 'module:Name-v0' for one that a module"),
        ("absent_module:Toy-v7", "the module absent_module cannot be imported. ModuleNotFoundError: No module named"),
        ("toy_environment:ToyEndless-v0", "it has no time limit; register it with max_episode_steps."),
        ("toy_environment:ToyFlawed-v0", "the environment cannot be made. OSError: no licence"),
        ("toy_environment:ToyDiscrete-v0", "its action space is Discrete(2); only a Box with one axis can be learned."),
        ("toy_environment:ToyImage-v0", "its action space is Box(0.0, 1.0, (2, 2), float32); only a Box with one axis"),
        *[
            (
                f"toy_environment:Toy{kind}-v0",
                f"its actions lack finite bounds that differ, Box({bounds}, float32); wrap",
            )
            for kind, bounds in (
                ("Unbounded", "-inf, inf, (1,)"),
                ("Pinned", "0.0, [1. 0.], (2,)"),
                ("Vast", "-3e+38, 3e+38, (1,)"),
            )
        ],
        ("toy_environment:ToyEmpty-v0", "its action space is Box("),
        ("toy_environment:ToyWhole-v0", "its actions are int64, Box(0, 9, (1,), int64); only floats can be learned."),
    ],
)
def test_environment_errors(environment_id: str, message: str) -> None:
    __import__("toy_environment")
    with pytest.raises(DataError) as caught:
        data.environment_spec(environment_id)
    assert str(caught.value).startswith(f"{environment_id}: {message}")


def test_actions_scale_to_the_bounds_and_back() -> None:
    assert data.scale_actions(np.array([[-1, 0], [1, 4], [0.5, 1]]), SPEC).tolist() == [[-1, -1], [1, 1], [0.5, -0.5]]
    scaled = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)
    assert np.allclose(data.scale_actions(data.unscale_actions(scaled, SPEC), SPEC), scaled, atol=1e-6)
    plain = EnvironmentSpec("Plain-v0", 3, 2, (-1.0, -1.0), (1.0, 1.0), 5)
    assert np.array_equal(data.scale_actions(scaled, plain), scaled)  # to the last bit
    assert data.unscale_actions(scaled, plain).dtype == np.float32


@pytest.mark.parametrize("environment_id", [HOPPER, "AntBulletEnv-v0"])
def test_an_episode_does_not_depend_on_what_came_before(environment_id: str) -> None:
    def play(environment: Any, seed: int, steps: int) -> list[Any]:
        random = np.random.default_rng(seed)
        seen = [environment.reset(seed=seed)[0].tolist()]
        for _ in range(steps):
            observation, reward, terminal, _, _ = environment.step(
                random.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
            )
            seen.append((observation.tolist(), reward))
            if terminal:
                break
        return seen

    used, fresh = data._make_environment(environment_id), data._make_environment(environment_id)
    for seed in (1, 2, 3):
        play(used, seed, 40)
    assert play(used, 9, 40) == play(fresh, 9, 40)


def test_importing_is_quick_and_does_nothing_and_pybullet_stays_silent() -> None:
    code = """
import sys, data
assert not {"gymnasium", "torch", "pybullet", "scipy"} & set(sys.modules)
assert [w.shape for w in data._bundled_agent("HopperBulletEnv-v0")[::2]] == [(15, 128), (128, 64), (64, 3)]
assert not {"pybullet_envs", "gym"} & set(sys.modules)
if __name__ == "__main__":
    spec = data.environment_spec("HopperBulletEnv-v0")
    import numpy as np
    data.rollout(lambda observations: np.zeros((1, 1, 3)), spec, members=1, episodes=[0], seed=0, workers=1)
"""
    root = str(Path(data.__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("bullet-hopper", (20.058972, 1441.8059623430963)),
        ("bullet-halfcheetah", (-1275.766996, 2381.6725)),
        ("bullet-walker2d", (16.523877, 1623.6476303317536)),
        ("bullet-ant", (373.705955, 2650.495)),
        ("bullet-ant-medium-replay-v0", (373.705955, 2650.495)),
        ("hopper", (-20.272305, 3234.3)),
        ("hopper-medium-v2", (-20.272305, 3234.3)),
        ((-5, 10), (-5.0, 10.0)),
    ],
)
def test_reference_returns(reference: Any, expected: tuple[float, float]) -> None:
    assert data.reference_returns(reference) == expected


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("bullet-hoper", "reference 'bullet-hoper': unknown to D4RL. Nearest: bullet-hopper, "),
        ("maze2d", "reference 'maze2d': its tasks differ in reference; name one, such as 'maze2d-open-v0'."),
        ((3.0, 3.0), "reference: [3.0, 3.0] must be [min, max] with min < max."),
    ],
)
def test_reference_errors(reference: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        data.reference_returns(reference)
    assert str(caught.value).startswith(message)


def test_normalized_score() -> None:
    assert data.normalized_score(np.array([[-5.0, 10.0], [2.5, 25.0]]), (-5.0, 10.0)).tolist() == [[0, 100], [50, 200]]


# ----------------------------------------------------------------------------------------------------- files


def test_read_hdf5_gives_checked_arrays(tmp_path: Path) -> None:
    sound = rows(next_observations=np.ones((10, 3)))
    file = sound | {"rewards": sound["rewards"][:, None].astype(np.float64), "terminals": np.zeros((10, 1), np.int64)}
    raw, warnings = data.read_hdf5(write(tmp_path / "a.hdf5", file | {"infos/other": np.nan}), SPEC)
    assert warnings == ()
    assert {key: (array.dtype.str, array.shape) for key, array in raw.items()} == {
        "observations": ("<f4", (10, 3)),
        "actions": ("<f4", (10, 2)),
        "rewards": ("<f4", (10,)),
        "terminals": ("|b1", (10,)),
        "next_observations": ("<f4", (10, 3)),
        "timeouts": ("|b1", (10,)),
    }
    assert all(np.array_equal(raw[key], sound[key]) for key in raw)


SOUND = rows()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": None}, "the key 'rewards' is missing. It has: actions, observations, terminals, timeouts."),
        ({"terminals": None}, "the key 'terminals' is missing. It has: actions, observations, rewards, timeouts."),
        ({"observations": SOUND["rewards"]}, "'observations' has shape (10,), expected (10, 3) for Spec-v0."),
        ({"observations": np.ones((10, 4))}, "'observations' has shape (10, 4), expected (10, 3) for Spec-v0."),
        ({"actions": np.ones((10, 3))}, "'actions' has shape (10, 3), expected (10, 2) for Spec-v0."),
        ({"actions": np.ones((9, 2))}, "'actions' has shape (9, 2), expected (10, 2) for Spec-v0."),
        ({"rewards": np.ones(11)}, "'rewards' has shape (11,), expected (10,) for Spec-v0."),
        ({"next_observations": np.ones((9, 3))}, "'next_observations' has shape (9, 3), expected (10, 3) for Spec-v0."),
        ({"rewards": [b"a"] * 10}, "'rewards' holds object, expected numbers."),
        ({"observations": h5py.Empty("f")}, "'observations' holds object, expected numbers."),
        (
            {"observations": put(np.zeros((10, 3)), (4, 1), np.nan)},
            "'observations' row 4 is [0.0, nan, 0.0], expected finite numbers.",
        ),
        ({"rewards": put(SOUND["rewards"], [8, 3], np.inf)}, "'rewards' row 3 is inf, expected finite numbers."),
        ({"rewards": put(SOUND["rewards"], 3, 1e300)}, "'rewards' row 3 is inf, expected finite numbers."),
        ({"terminals": np.arange(10)}, "'terminals' row 2 is 2, expected only 0 and 1."),
        ({"timeouts": np.full(10, 0.5)}, "'timeouts' row 0 is 0.5, expected only 0 and 1."),
        ({"terminals": np.full(10, np.nan)}, "'terminals' row 0 is nan, expected only 0 and 1."),
        (
            {"actions": np.tile([[0.5, 4.25]], (10, 1))},
            "'actions' row 0 is [0.5, 4.25], expected within [-1.0, 0.0] and [1.0, 4.0] of Spec-v0.",
        ),
        (
            {"actions": put(np.tile([[0.5, 2.0]], (10, 1)), (6, 0), -1.0625)},
            "'actions' row 6 is [-1.0625, 2.0], expected within [-1.0, 0.0] and [1.0, 4.0] of Spec-v0.",
        ),
    ],
)
def test_bad_files(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.hdf5", rows(**changed))
    with pytest.raises(DataError) as caught:
        data.read_hdf5(path, SPEC)
    assert str(caught.value) == f"{path}: {message}"


def test_short_missing_foreign_and_truncated_files(tmp_path: Path) -> None:
    short = write(tmp_path / "short.hdf5", rows(1))
    with pytest.raises(DataError, match=r"short.hdf5: 1 row\(s\), expected at least 2\."):
        data.read_hdf5(short, SPEC)
    with pytest.raises(DataError, match=r"absent\.hdf5: no such file\."):
        data.read_hdf5(tmp_path / "absent.hdf5", SPEC)
    (tmp_path / "text.hdf5").write_text("observations,actions")
    with pytest.raises(DataError, match=r"text\.hdf5: not an HDF5 file\. Expected D4RL's format"):
        data.read_hdf5(tmp_path / "text.hdf5", SPEC)
    whole = write(tmp_path / "cut.hdf5", rows(1000))
    whole.write_bytes(whole.read_bytes()[:-5000])
    linked = write(tmp_path / "linked.hdf5", {key: value for key, value in rows(10).items() if key != "rewards"})
    with h5py.File(linked, "a") as file:
        file["rewards"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DataError, match=r"linked\.hdf5: a truncated or damaged HDF5 file; get it again\. KeyError: "):
        data.read_hdf5(linked, SPEC)
    with pytest.raises(DataError, match=r"cut\.hdf5: a truncated or damaged HDF5 file; get it again\. OSError: "):
        data.read_hdf5(whole, SPEC)


def test_actions_slightly_out_of_bounds_are_clipped_with_a_warning(tmp_path: Path) -> None:
    actions = np.tile(np.array([[0.5, 2.0]], dtype=np.float32), (10, 1))
    actions[3] = [1.0005, 4.003]
    actions[7, 0] = -1.0015
    path = write(tmp_path / "a.hdf5", rows(actions=actions))
    raw, warnings = data.read_hdf5(path, SPEC)
    assert warnings == (f"{path}: clipped the actions of 2 rows, out of bounds by 3.0e-03 at most.",)
    assert raw["actions"][[3, 7]].tolist() == [[1, 4], [-1, 2]]
    untouched = np.delete(np.arange(10), [3, 7])
    assert np.array_equal(raw["actions"][untouched], actions[untouched])


# ----------------------------------------------------------------------------------------------- transitions


@pytest.mark.parametrize("with_timeouts", [True, False])
def test_transitions_agree_with_d4rl(d4rl: ModuleType, with_timeouts: bool) -> None:
    random = np.random.default_rng(int(with_timeouts))
    compared = ends_in_middle = 0
    for case in range(600):
        n, limit = int(random.integers(2, 60)), int(random.integers(1, 9))
        terminals = random.random(n) < random.choice([0, 0.05, 0.2, 0.5])
        timeouts = (random.random(n) < random.choice([0, 0.1, 0.5])) | (terminals & (random.random(n) < 0.3))
        if case % 3 == 0:
            terminals[-1] = timeouts[-1] = False
            ends_in_middle += 1
        raw = rows(n, terminals=terminals, timeouts=timeouts if with_timeouts else None)
        expected = d4rl.qlearning_dataset(SimpleNamespace(_max_episode_steps=limit), dataset=raw)
        built = data.build_transitions(raw, limit)
        assert len(built["rewards"]) == len(expected["rewards"])
        if len(expected["rewards"]):  # D4RL's empty arrays have lost type and shape
            for key, array in expected.items():
                assert built[key].dtype == array.dtype and np.array_equal(built[key], array), (case, key)
            assert np.array_equal(built["observations"], raw["observations"][built["rows"]])
            compared += 1
    assert compared > 400 and ends_in_middle == 200


@pytest.mark.parametrize("with_timeouts", [True, False])
def test_a_million_transitions_take_less_than_a_second(with_timeouts: bool) -> None:
    n = 1_000_000
    raw = {
        "observations": np.zeros((n, 15), dtype=np.float32),
        "actions": np.zeros((n, 3), dtype=np.float32),
        "rewards": np.zeros(n, dtype=np.float32),
        "terminals": np.random.default_rng(0).random(n) < 0.01,
    }
    if with_timeouts:
        raw["timeouts"] = np.arange(n) % 1000 == 999
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        start = time.perf_counter()
        built = data.build_transitions(raw, 1000)
        seconds.append(time.perf_counter() - start)
    assert len(built["rewards"]) > 0.9 * n
    assert min(seconds) < 1


def test_next_observations_are_used_and_keep_every_row() -> None:
    own = np.arange(30, dtype=np.float32).reshape(10, 3)
    terminals, timeouts = np.zeros(10, dtype=np.bool_), np.zeros(10, dtype=np.bool_)
    terminals[[2, 4]] = timeouts[[4, 7]] = True
    built = data.build_transitions(rows(next_observations=own, terminals=terminals, timeouts=timeouts), 5)
    assert built["rows"].tolist() == list(range(10))
    assert np.array_equal(built["next_observations"], own)
    assert np.flatnonzero(built["terminals"]).tolist() == [2, 4]  # row 7, a time limit, is bootstrapped


def test_discounted_returns_against_a_loop() -> None:
    random = np.random.default_rng(3)
    for discount, tail in ((0.9, 0.5), (0.5, 0.05), (1.0, 0.05)):
        n = 80
        rewards = random.normal(size=n).astype(np.float32)
        terminals, timeouts = random.random(n) < 0.1, random.random(n) < 0.1
        returns, trusted = data.discounted_returns(rewards, terminals, timeouts, discount, tail)
        for row in range(n):
            expected, weight, end = 0.0, 1.0, row
            while True:
                expected += weight * float(rewards[end])
                weight *= discount
                if terminals[end] or timeouts[end] or end == n - 1:
                    break
                end += 1
            assert returns[row] == pytest.approx(expected)
            assert trusted[row] == (terminals[end] or weight <= tail)
        assert 0 < trusted.sum() < n


def test_discounted_returns_by_hand() -> None:
    terminals, timeouts = np.array([0, 0, 1, 0, 0, 0], bool), np.array([0, 0, 0, 0, 1, 0], bool)
    returns, trusted = data.discounted_returns(np.array([1, 2, 4, 8, 16, 32]), terminals, timeouts, 0.5, tail=0.25)
    assert returns.tolist() == [3, 4, 4, 16, 16, 32]
    assert trusted.tolist() == [True, True, True, True, False, False]


# ----------------------------------------------------------------------------------------------- the dataset


def test_dataset_without_held_out_episodes(tmp_path: Path) -> None:
    loaded = load(toy_file(tmp_path / "a.hdf5", [3, 4, 2]))
    assert loaded.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert loaded.next_observations[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert np.flatnonzero(loaded.terminals).tolist() == [2, 6]
    assert loaded.actions[0].tolist() == [0.5, -0.5]
    assert loaded.episode_returns.tolist() == [3, 18]  # the last episode is incomplete
    assert (loaded.environment.id, len(loaded.held_out.rewards), loaded.warnings) == (TOY, 0, ())
    assert {key: loaded.identity[key] for key in ("source", "name", "transitions")} == {
        "source": "hdf5",
        "name": "a.hdf5",
        "transitions": 9,
    }
    only = load(toy_file(tmp_path / "b.hdf5", [5]), held_out=0.5)
    assert only.episode_returns.tolist() == [10]
    assert only.warnings == (f"{tmp_path / 'b.hdf5'}: a single episode, so none is held out.",)


def test_held_out_episodes_are_whole_and_apart(tmp_path: Path) -> None:
    path = toy_file(tmp_path / "a.hdf5", [3, 4, 2, 5, 1, 6, 3, 4, 2, 2, 3])
    everything = load(path)
    seen = set()
    for seed in range(8):
        loaded = load(path, held_out=0.2, seed=seed, reward_scale=2.0)
        kept = loaded.held_out
        held, trained = kept.observations[:, 0], loaded.observations[:, 0]
        assert kept.terminals.sum() == 2 and kept.terminals[-1]  # 2 of 10 complete episodes
        assert not set(held) & set(trained)
        assert sorted([*held, *trained]) == list(range(34))  # all but the file's last row
        assert list(held) == sorted(held) and np.array_equal(kept.rewards, 2 * held)
        assert kept.actions.shape == (len(held), 2) and kept.actions[0].tolist() == [0.5, -0.5]
        assert not kept.timeouts.any()
        assert np.array_equal(loaded.episode_returns, everything.episode_returns)
        assert np.array_equal(load(path, held_out=0.2, seed=seed).held_out.observations, kept.observations)
        seen.add(tuple(held))
    assert len(seen) > 1
    assert load(path, held_out=0.001).held_out.terminals.sum() == 1
    assert load(path, held_out=0.999).held_out.terminals.sum() == 9


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", {"rule": "none", "multiplier": 1.0, "offset": 0.0}),
        ("minus-one", {"rule": "minus-one", "multiplier": 1.0, "offset": -1.0}),
        ("return-range", {"rule": "return-range", "multiplier": 6 / 15, "offset": 0.0}),
        (0.25, {"rule": "number", "multiplier": 0.25, "offset": 0.0}),
    ],
)
def test_reward_scale(tmp_path: Path, rule: str | float, expected: dict[str, Any]) -> None:
    loaded = load(toy_file(tmp_path / "a.hdf5", [3, 4, 2]), reward_scale=rule)  # returns 3 and 18
    assert loaded.reward_scale == expected
    assert np.allclose(loaded.rewards, expected["multiplier"] * np.arange(8) + expected["offset"])
    assert loaded.rewards.dtype == np.float32


def test_dataset_errors(tmp_path: Path) -> None:
    path = toy_file(tmp_path / "a.hdf5", [3, 4, 2], rewards=np.zeros(9))
    for changed, message in (
        ({"reward_scale": "return-range"}, "all returns are equal; choose 'none' or a number."),
        ({"reward_scale": "x"}, "reward_scale 'x': expected none, return-range, minus-one, or a positive number."),
        ({"reward_scale": -1.0}, "reward_scale -1.0: expected none, return-range, minus-one, or a positive number."),
        ({"source": "s"}, "data source 's': expected 'hdf5' with a path, or 'collect' with its settings."),
        ({"path": None}, "data source 'hdf5': expected 'hdf5' with a path, or 'collect' with its settings."),
    ):
        with pytest.raises(DataError) as caught:
            load(**({"path": path} | changed))
        assert message in str(caught.value)
    with pytest.raises(DataError, match=r"no transition is left to train on; lower held_out \(now 0\.0\)"):
        load(toy_file(tmp_path / "b.hdf5", [3, 2], timeouts=np.ones(5, dtype=np.bool_)))


def test_identity_follows_the_content(tmp_path: Path) -> None:
    one, same = toy_file(tmp_path / "a.hdf5", [3, 4]), toy_file(tmp_path / "b.hdf5", [3, 4])
    other = toy_file(tmp_path / "c.hdf5", [4, 3])
    hashes = [load(path).identity["hash"] for path in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_file_without_timeouts_says_so(tmp_path: Path) -> None:
    whole = toy_file(tmp_path / "a.hdf5", [3, 9])
    with h5py.File(whole, "r+") as file:
        del file["timeouts"]
    assert load(whole).warnings == (f"{whole}: no 'timeouts'; episodes end at terminals and every 6 rows.",)


# ------------------------------------------------------------------------------------------------ collecting


SETTINGS = CollectSettings(transitions=1200, levels=(0.1, 0.8), action_noise=0.1, seed=4)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 250)
        return data.collect_dataset(HOPPER, SETTINGS, 1, None, tmp_path_factory.mktemp("one"))


def test_collecting_does_not_depend_on_the_workers(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD", 250)
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    calls: list[tuple[int, int]] = []
    path = data.collect_dataset(HOPPER, SETTINGS, 2, lambda done, total: calls.append((done, total)))
    assert path == tmp_path / collected.name
    assert path.read_bytes() == collected.read_bytes()
    assert calls[-1] == (1200, 1200) and len(calls) == 6 and sorted(calls) == calls
    assert [file.name for file in tmp_path.iterdir()] == [collected.name]  # nothing temporary is left
    assert not multiprocessing.active_children()


def test_collected_rows(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(collected) as file:
        level, observations = file["infos/level"][()], file["observations"][()]
        assert dict(file.attrs)["environment"] == HOPPER and file.attrs["transitions"] == 1200
        assert file.attrs["levels"].tolist() == [0.1, 0.8] and file.attrs["generator"] == data.GENERATOR
        assert (file.attrs["seed"], file.attrs["action_noise"]) == (4, 0.1)
        assert np.array_equal(level, np.repeat(np.array([0.1, 0.8], dtype=np.float32), 600))
        ends = file["terminals"][()] | file["timeouts"][()]
        assert ends[[249, 499, 599, 849, 1099, 1199]].all()  # the shards' ends
        assert not (file["terminals"][()] & file["timeouts"][()]).any()
        assert len(np.unique(observations, axis=0)) == 1200
        falls = file["terminals"][()].sum()  # none of these episodes reaches the time limit
    loaded = load(collected, environment_id=HOPPER, held_out=0.1)
    assert loaded.warnings == () and len(loaded.episode_returns) == ends.sum()
    assert np.abs(loaded.actions).max() == 1
    monkeypatch.setattr(data, "collect_dataset", lambda *_: collected)
    ours = load(None, source="collect", environment_id=HOPPER, held_out=0.1, collect=SETTINGS)
    assert len(ours.episode_returns) == falls < ends.sum()  # an end of a shard is no episode's end
    assert np.array_equal(ours.observations, loaded.observations)
    assert ends[:600].sum() < ends[600:].sum()  # the better agent's episodes last longer


def test_weights_are_perturbed_once_per_episode() -> None:
    agent, spec = data._bundled_agent(HOPPER), data.environment_spec(HOPPER)
    plain = data._ShardPlayer(spec, agent, CollectSettings(300, (0.0, 0.5), 0.0, 0))
    rows = plain((0, 0, 100))
    assert np.allclose(rows["actions"], np.clip(data._agent_action(agent, rows["observations"]), -1, 1), atol=1e-5)

    rows = plain((1, 0, 200))
    starts, stops = data.episode_bounds(rows["terminals"], rows["timeouts"])
    differences = rows["actions"] - np.clip(data._agent_action(agent, rows["observations"]), -1, 1)
    assert all(np.abs(differences[start:stop]).max() > 0.1 for start, stop in zip(starts, stops, strict=True))
    # Without action noise an episode's actions are one deterministic function, so a second shard with the same
    # name repeats it, and another name gives other weights and starts.
    assert all(np.array_equal(rows[key], again) for key, again in plain((1, 0, 200)).items())
    assert not np.array_equal(rows["observations"][0], plain((1, 1, 200))["observations"][0])


def test_each_level_may_have_its_own_noise() -> None:
    agent, spec = data._bundled_agent(HOPPER), data.environment_spec(HOPPER)
    play = data._ShardPlayer(spec, agent, CollectSettings(200, (0.0, 0.0), (0.0, 0.5), 0))
    noises = []
    for level in (0, 1):
        rows = play((level, 0, 100))
        difference = rows["actions"] - np.clip(data._agent_action(agent, rows["observations"]), -1, 1)
        noises.append(np.abs(difference).max())
    assert noises[0] < 1e-5 and noises[1] > 0.5


def test_cache_is_reused_by_settings(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def roll_out(*_: Any) -> Any:
        raise AssertionError("rolled out")

    monkeypatch.setattr(data, "_play_shards", roll_out)
    assert data.collect_dataset(HOPPER, SETTINGS, 1, None, collected.parent) == collected
    for changed in ({"transitions": 1202}, {"levels": (0.1, 0.7)}, {"action_noise": 0.2}, {"seed": 5}):
        with pytest.raises(AssertionError, match="rolled out"):
            data.collect_dataset(HOPPER, CollectSettings(**(vars(SETTINGS) | changed)), 1, None, collected.parent)


def test_a_damaged_cached_file_is_named(collected: Path, tmp_path: Path) -> None:
    damaged = tmp_path / collected.name
    damaged.write_bytes(collected.read_bytes()[:-3000])
    with pytest.raises(DataError) as caught:
        data.collect_dataset(HOPPER, SETTINGS, 1, None, tmp_path)
    message = "this cached dataset is damaged; delete the file, and it will be collected again."
    assert str(caught.value) == f"{damaged}: {message}"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        data._write_hdf5(tmp_path / "a.hdf5", {"x": np.zeros(3)}, {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MDPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data._cache_folder() == tmp_path / "mdpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data._cache_folder() == Path.home() / ".cache" / "mdpt"


@pytest.mark.parametrize(
    ("environment_id", "changed", "message"),
    [
        ("ReacherBulletEnv-v0", {}, "ReacherBulletEnv-v0: no agent is bundled with PyBullet for it. It has: Ant"),
        (HOPPER, {"transitions": 1201}, "collect: 1201 transitions for 2 levels; expected the same number at each."),
        (HOPPER, {"levels": ()}, "collect: 1200 transitions for 0 levels; expected the same number at each."),
    ],
)
def test_collect_errors(tmp_path: Path, environment_id: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        data.collect_dataset(environment_id, CollectSettings(**(vars(SETTINGS) | changed)), 1, None, tmp_path)
    assert str(caught.value).startswith(message)


# -------------------------------------------------------------------------------------------------- rollouts


def toy_rollout(act: Callable[[Array], Array], **changed: Any) -> tuple[Array, Array]:
    arguments: dict[str, Any] = {"members": 3, "episodes": range(5), "seed": 1, "workers": 2}
    return data.rollout(act, data.environment_spec(TOY), **(arguments | changed))


def member_pays(observations: Array) -> Array:
    """Member s chooses an action that the toy pays with s + 1."""
    actions = np.zeros((*observations.shape[:2], 2))
    actions[..., 1] = (np.arange(len(observations))[:, None] + 1) / 2 - 1
    return actions


def test_every_reward_counts_once_and_ended_episodes_contribute_nothing() -> None:
    seen: list[Array] = []
    calls: list[tuple[int, int]] = []

    def act(observations: Array) -> Array:
        seen.append(observations)
        return member_pays(observations)

    returns, lengths = toy_rollout(act, progress=lambda done, total: calls.append((done, total)))
    drawn = seen[0][..., 0]  # (S, E) the steps until the terminal
    assert np.array_equal(drawn, np.tile(drawn[0], (3, 1))) and len(set(drawn[0])) > 1  # the same starts for all
    assert (drawn <= 6).any() and (drawn > 6).any()  # terminals and time limits
    assert np.array_equal(lengths, np.minimum(drawn, 6)) and lengths.dtype == np.int64
    payment = np.array([[1.0], [2.0], [3.0]])
    assert np.allclose(returns, payment * lengths + 100 * (drawn <= 6)) and returns.dtype == np.float64
    assert len(seen) == 6 and all(each.shape == (3, 5, 2) and each.dtype == np.float32 for each in seen)
    for step, observations in enumerate(seen):  # an ended episode shows its last observation
        assert np.array_equal(observations[..., 1], np.minimum(step, lengths))
    assert calls[-1] == (15, 15) and sorted(calls) == calls


def test_rollouts_depend_on_the_seed_alone() -> None:
    one = toy_rollout(member_pays)
    for workers in (1, 4):
        assert all(map(np.array_equal, one, toy_rollout(member_pays, workers=workers)))
    assert not np.array_equal(one[1], toy_rollout(member_pays, seed=2)[1])
    assert np.array_equal(one[0][:, 3:], toy_rollout(member_pays, episodes=[3, 4])[0])  # episode e keeps its start
    assert np.array_equal(one[0][:1], toy_rollout(member_pays, members=1)[0])  # so does member 0


def test_pybullet_rollouts_do_not_depend_on_the_workers() -> None:
    spec = data.environment_spec(HOPPER)

    def act(observations: Array) -> Array:
        return np.asarray(np.sin(7 * observations[..., :3]))

    one = data.rollout(act, spec, members=2, episodes=range(3), seed=0, workers=1)
    two = data.rollout(act, spec, members=2, episodes=range(3), seed=0, workers=2)
    assert all(map(np.array_equal, one, two))
    assert np.array_equal(one[0][0], one[0][1]) and len(set(one[0][0])) == 3


def test_the_bundled_agent_hops() -> None:
    agent = data._bundled_agent(HOPPER)
    assert agent[5].tolist() == np.array([0.4868, -0.0987, -0.0946], dtype=np.float32).tolist()
    returns, lengths = data.rollout(
        lambda observations: data._agent_action(agent, observations),
        data.environment_spec(HOPPER),
        members=1,
        episodes=[0],
        seed=0,
        workers=1,
    )
    assert returns[0, 0] > 2000 and lengths[0, 0] > 800


def break_after(steps: int, member: int, value: float) -> Callable[[Array], Array]:
    def act(observations: Array) -> Array:
        actions = np.zeros((*observations.shape[:2], 2))
        if observations[0, 0, 1] == steps:
            actions[member, :, 0] = value
        return actions

    return act


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (break_after(2, 1, np.nan), "act: member 1 chose an action that is not finite; its training has diverged."),
        (break_after(2, 0, 1.0), "The environment failed in a worker process. ValueError: broken by an action"),
        (break_after(2, 2, -1.0), "A worker process ended unexpectedly, exit code 7; try fewer workers."),
        (lambda o: np.zeros((3, 2)), "act: actions of shape (3, 2), expected (3, 5, 2)."),
    ],
)
def test_rollout_failures_are_clear_and_leave_no_worker(act: Callable[[Array], Array], message: str) -> None:
    with pytest.raises(DataError) as caught:
        toy_rollout(act)
    assert str(caught.value) == message
    assert not multiprocessing.active_children()


def test_an_interrupted_rollout_leaves_no_worker() -> None:
    def act(observations: Array) -> Array:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_rollout(act)
    assert not multiprocessing.active_children()
