"""Tests of data.py; D4RL itself is the judge of transitions, hand-made loops and a toy environment of the rest."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import conftest
import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from gymnasium.spaces import flatten
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from toy_environment import Parted, Toy

from mdpt import data
from mdpt.data import (
    Array,
    DataSection,
    Dataset,
    EnvironmentSpec,
    Experiment,
    MdptError,
    RewardScale,
    Shard,
    Watch,
    Workers,
)

HOPPER = "HopperBulletEnv-v0"
TOY = "toy_environment:Toy-v0"
PARTED = "toy_environment:ToyParted-v0"
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


PLAIN: dict[str, Any] = {"reward_scale": "none", "held_out": 0.0}


def load(path: Path, **changed: Any) -> Dataset:
    section = PLAIN | {"source": "hdf5", "path": str(path), "environment": TOY, "reference": (0.0, 100.0)}
    return data.load_dataset(DataSection(**(section | changed)))


def load_arrays(arrays: Mapping[str, Any], **changed: Any) -> Dataset:
    """Without an environment."""
    return data.load_dataset(DataSection(**(PLAIN | {"source": "arrays"} | changed)), arrays=arrays)


def prepare(path: Path) -> Dataset:
    """A file for SPEC, which nothing is asked for."""
    section = DataSection(source="hdf5", path=str(path), **PLAIN)
    with data.open_hdf5(path) as columns:
        return data.prepare(columns, section, SPEC, data.UNNAMED, lambda *_: None)


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


# --- environments -----------------------------------------------------------------------------------------------


def test_environment_spec() -> None:
    assert data.environment_spec(HOPPER) == EnvironmentSpec(HOPPER, 15, 3, (-1.0,) * 3, (1.0,) * 3, 1000)
    toy = EnvironmentSpec(TOY, 2, 2, (-1.0, 0.0), (1.0, 4.0), 6)
    assert data.environment_spec(TOY) == toy == replace(toy, repeatable=False) != replace(toy, flattened=True)
    special = replace(toy, kwargs={"bonus": 2.0}, max_episode_steps=3)
    assert data.environment_spec(TOY, {"bonus": 2.0}, 3) == special
    assert data.environment_spec("toy_environment:ToyEndless-v0", max_episode_steps=9).max_episode_steps == 9


@pytest.mark.parametrize(
    ("environment_id", "message"),
    [
        ("HoperBulletEnv-v0", "no such environment is registered with gymnasium. Did you mean 'HopperBulletEnv-v0'?"),
        ("qqq-v9", "no such environment is registered with gymnasium. Write 'module:Name-v0' for one that a module"),
        ("absent_module:Toy-v7", "the module absent_module cannot be imported. ModuleNotFoundError: No module named"),
        (
            "toy_environment:ToyOptional-v0",
            "its action space is Discrete(2); only a Box with one axis can be learned. Set [data] environment_kwargs = {",
        ),
        ("toy_environment:ToyEndless-v0", "it has no time limit; set [data] max_episode_steps."),
        ("toy_environment:ToyFlawed-v0", "the environment cannot be made. OSError: no licence"),
        ("toy_environment:ToyDiscrete-v0", "its action space is Discrete(2); only a Box with one axis can be learned."),
        ("toy_environment:ToyImage-v0", "its action space is Box(0.0, 1.0, (2, 2), float32); only a Box with one axis"),
        (
            "toy_environment:ToyPinned-v0",
            "its actions lack finite bounds with low < high, Box(0.0, [1. 0.], (2,), float32)",
        ),
        (
            "toy_environment:ToyVast-v0",
            "its actions lack finite bounds with low < high, Box(-3e+38, 3e+38, (1,), float32)",
        ),
        ("toy_environment:ToyWhole-v0", "its actions are int64, Box(0, 9, (1,), int64); only floats can be learned."),
    ],
)
def test_environment_errors(environment_id: str, message: str) -> None:
    __import__("toy_environment")
    with pytest.raises(MdptError) as caught:
        data.environment_spec(environment_id)
    assert str(caught.value).startswith(f"{environment_id}: {message}")


def test_actions_scale_to_the_bounds_and_back() -> None:
    assert data.scale_actions(np.array([[-1, 0], [1, 4], [0.5, 1]]), SPEC).tolist() == [[-1, -1], [1, 1], [0.5, -0.5]]
    scaled = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)
    assert np.allclose(data.scale_actions(data.unscale_actions(scaled, SPEC), SPEC), scaled, atol=1e-6)
    plain = EnvironmentSpec("Plain-v0", 3, 2, (-1.0, -1.0), (1.0, 1.0), 5)
    assert np.array_equal(data.scale_actions(scaled, plain), scaled)  # to the last bit
    assert data.unscale_actions(scaled, plain).dtype == np.float32


def test_no_action_leaves_the_bounds() -> None:
    """Not by the rounding of its scale, nor where a bound lies between two numbers of float32."""
    low, high = np.sort(np.random.default_rng(0).integers(-99, 99, (2, 2000)) / 10, axis=0) + [[0.0], [0.1]]
    for kind in (np.float32, np.float64):
        spec = EnvironmentSpec("Any-v0", 3, 2000, *(tuple(end.astype(kind).tolist()) for end in (low, high)), 5)
        for action in (-1.0, 1.0, -1.5, 1.5):
            found = data.unscale_actions(np.full(2000, action, np.float32), spec)
            assert found.dtype == np.float32
            assert (spec.action_low <= found.astype(np.float64)).all() and (
                found.astype(np.float64) <= spec.action_high
            ).all()
            assert np.allclose(found, high if action > 0 else low, atol=1e-5)


@pytest.mark.parametrize("what", ["__init__", "step"])
def test_an_environment_that_hangs_is_told_before_anything_is_trained(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, what, lambda *args, **options: time.sleep(1))
    with pytest.raises(MdptError, match=r"toy_environment:Toy-v0: .*: took longer than 0\.2 s; --timeout"):
        data.environment_spec(TOY, timeout=0.2)


def test_an_episode_does_not_depend_on_what_came_before() -> None:
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

    spec = data.environment_spec(HOPPER)
    used, fresh = data.make_environment(spec), data.make_environment(spec)
    for seed in (1, 2, 3):
        play(used, seed, 40)
    assert play(used, 9, 40) == play(fresh, 9, 40)


def alter(
    monkeypatch: pytest.MonkeyPatch,
    step: Callable[[Toy, tuple[Any, ...]], Any] | None = None,
    reset: Callable[..., Any] | None = None,
) -> None:
    """Another toy: step gives what it makes of what the toy's own gave; reset is the whole method."""
    own = Toy.step
    if step is not None:
        monkeypatch.setattr(Toy, "step", lambda toy, action: step(toy, own(toy, action)))
    if reset is not None:
        monkeypatch.setattr(Toy, "reset", reset)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"reset": lambda toy, *, seed=None, options=None: np.zeros(2)}, ("reset", "ndarray", "(observation, info)")),
        ({"reset": lambda toy: (np.zeros(2), {})}, ("reset", "TypeError", "unexpected keyword argument 'seed'")),
        ({"step": lambda toy, found: found[:4]}, ("step", "4 values", "terminated, truncated, info")),
    ],
)
def test_broken_contracts_are_told(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], told: Sequence[str]
) -> None:
    alter(monkeypatch, **changed)
    with pytest.raises(MdptError) as caught:
        data.environment_spec(TOY)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{TOY}: ") and all(each in line for each in told), line


DRAWS: dict[str, Callable[[], float]] = {
    "numpy": np.random.random,
    "python": random.random,
    "system": lambda: os.urandom(1)[0] / 256,
}


@pytest.mark.parametrize("source", DRAWS)
def test_global_generators_are_seeded(monkeypatch: pytest.MonkeyPatch, source: str, tmp_path: Path) -> None:
    seeded = source != "system"
    spec = data.environment_spec(TOY)
    alter(monkeypatch, lambda toy, found: (found[0], found[1] + DRAWS[source](), *found[2:]))
    assert data.environment_spec(TOY).repeatable is seeded
    first, other, again = (data.rollout(pay_by_place, spec, range(5), seed=seed).returns for seed in (1, 2, 1))
    assert np.array_equal(first, again) is seeded and not np.array_equal(first % 0.5, other % 0.5)
    warnings = load(toy_file(tmp_path / "a.hdf5", [3, 4])).warnings
    told = f"{TOY}: two episodes with the same seed and actions differ; no score is repeatable."
    assert warnings == (() if seeded else (told,))


def test_an_environment_that_is_another_by_now_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(*_: Any, **__: Any) -> Any:
        raise AssertionError("played")

    trained = replace(
        data.environment_spec(TOY), observation_dim=3, action_low=(-1.0, -4.0), flattened=True, repeatable=False
    )
    monkeypatch.setattr(Toy, "reset", play)
    with pytest.raises(MdptError) as caught:
        data.rollout(pay_by_place, trained, [0], seed=0)
    changes = "observation_dim was 3, is 2; action_low was (-1.0, -4.0), is (-1.0, 0.0); flattened was True, is False."
    assert str(caught.value) == f"{TOY}: is another environment than when this was trained: {changes}"


def test_settings_of_an_environment_reach_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"environment_kwargs": {"bonus": 3.0}, "max_episode_steps": 4}
    spec = load(toy_file(tmp_path / "a.hdf5", [3, 4]), **settings).environment
    assert spec == data.environment_spec(TOY, {"bonus": 3.0}, 4)
    lengths, played = toy_rollout()[1], data.rollout(pay_by_place, spec, range(5), seed=1)
    returns, shorter = played.returns, played.lengths
    assert (lengths > 4).any() and (lengths <= 4).any() and np.array_equal(shorter, np.minimum(lengths, 4))
    assert np.allclose(returns, ((np.arange(5) + 1) / 2 + 3) * shorter + 100 * (lengths <= 4))


def test_dict_observations_are_flattened_alike_in_data_and_in_play(tmp_path: Path) -> None:
    spec = data.environment_spec(PARTED)
    assert spec == EnvironmentSpec(PARTED, 2, 2, (-1.0, 0.0), (1.0, 4.0), 6, flattened=True)
    shapes = ((2, 3), (3,), (3, 3), (3,), (3, 2))
    agent = [np.zeros(shape, dtype=np.float32) for shape in shapes] + [np.array([0, 1], dtype=np.float32)]
    Parted.shown.clear()
    rows = data.collect_shard(Shard(spec, agent, 0.0, 0.1, 20, (0, 0, 0)), Watch(60))
    shown = np.array([flatten(Parted.observation_space, each) for each in Parted.shown[1:]])  # the first is spent
    starts, stops = data.episode_bounds(rows["terminals"], rows["timeouts"])
    followed = np.arange(20) + np.repeat(np.arange(len(starts)), stops - starts)  # each end is shown, and in no row
    assert len(starts) > 3 and np.array_equal(rows["observations"], shown[followed])
    assert rows["observations"][:3, 0].tolist() == [0, 1, 2]  # the count comes first, by its key

    loaded = load(write(tmp_path / "a.hdf5", rows), environment=PARTED)
    assert loaded.environment == spec
    assert np.array_equal(loaded.column("observations"), rows["observations"][~rows["timeouts"]])
    seen: list[Array] = []

    def act(observations: Array, places: Array) -> Array:
        seen.extend(observations)
        return np.zeros((len(places), 2))

    (length,) = data.rollout(act, spec, [0], seed=0).lengths
    assert np.array_equal(seen, [[step, seen[0][1]] for step in range(length)])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_importing_is_quick_and_does_nothing_and_pybullet_stays_silent(workers: int, tmp_path: Path) -> None:
    code = f"""
import sys
from mdpt import data
assert not {{"gymnasium", "torch", "pybullet", "scipy", "joblib", "matplotlib"}} & set(sys.modules)
assert [w.shape for w in data._bundled_agent("{HOPPER}")[::2]] == [(15, 128), (128, 64), (64, 3)]
assert not {{"pybullet_envs", "gym"}} & set(sys.modules)
spec = data.environment_spec("{HOPPER}")

def play(episode, watch):
    import numpy as np
    return data.rollout(lambda observations, places: np.zeros((1, 3)), spec, [episode], seed=0, watch=watch)

list(data.parallel(play, [0, 1], data.Workers({workers}), 2))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("bullet-hopper", (20.058972, 1441.8059623430963)),
        ("bullet-ant-medium-replay-v0", (373.705955, 2650.495)),
        ("hopper", (-20.272305, 3234.3)),
        ((-5, 10), (-5.0, 10.0)),
        ("bullet-hoper", "reference 'bullet-hoper': unknown to D4RL. Nearest: bullet-hopper, "),
        ("maze2d", "reference 'maze2d': its tasks have different references; name one, such as 'maze2d-open-v0'."),
        ((3.0, 3.0), "reference: [3.0, 3.0] must be [min, max] with min < max."),
    ],
)
def test_reference_returns(reference: Any, expected: tuple[float, float] | str) -> None:
    if isinstance(expected, tuple):
        assert data.reference_returns(reference) == expected
    else:
        with pytest.raises(MdptError, match=re.escape(expected)):
            data.reference_returns(reference)


# --- the experiment file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"reward_scale": "x"}, ("reward_scale = 'x'", "'none', 'return-range' or 'minus-one'", "number")),
        ({"source": "hdf5"}, ("'hdf5' needs a path",)),
        ({"source": "d4rl"}, ("'d4rl' needs a dataset",)),
        ({"source": "collect", "path": "a.hdf5"}, ("path is only for source 'hdf5'",)),
        ({"source": "arrays", "dataset": "a"}, ("dataset is only for source 'd4rl' and 'minari'",)),
        ({"environment_kwargs": {"bonus": 1.0}}, ("environment_kwargs need an environment",)),
        ({"environment": TOY, "environment_kwargs": {"render_mode": "human"}}, ("'render_mode'", "make's own")),
        ({"action_range": [1.0, -1.0]}, ("action_range [1.0, -1.0]", "low < high")),
        ({"transitions": 1201, "levels": [0.1, 0.8]}, ("1201", "2 levels")),
        ({"levels": [0.1, -0.8]}, ("levels[1] = -0.8", "greater than or equal to 0")),
        ({"action_noise": [0.1]}, ("action_noise", "1 entries", "4 levels")),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(changed: dict[str, Any], told: Sequence[str]) -> None:
    with pytest.raises(MdptError) as caught:
        data.check_experiment("my.toml", {"data": changed})
    (line,) = str(caught.value).splitlines()
    assert line.startswith("my.toml: [data]") and all(each in line for each in told), line


def toml(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_an_experiment_extends_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    toml(tmp_path / "home" / "first.toml", "name = 'first'\n[policy]\nsteps = 1\neta = 3.0\n[guidance]\nsteps = 7\n")
    base = "extends = '~/first.toml'\nname = 'base'\n[data]\nsource = 'hdf5'\npath = 'here/x.hdf5'\n"
    toml(tmp_path / "bases" / "base.toml", base)
    last = toml(tmp_path / "mine" / "last.toml", "extends = '../bases/base.toml'\n[policy]\nsteps = 2\n")
    found = data.load_experiment(last.relative_to(tmp_path), ["guidance.steps=9"])
    assert (found.name, found.policy.steps, found.policy.eta, found.guidance.steps) == ("base", 2, 3.0, 9)
    assert found.data.path == str(tmp_path / "bases" / "here" / "x.hdf5")  # seen from the file that names it
    places = {"~/x": "home/x", "../x": "x", "/x": "/x", "~nobody9/x": "mine/~nobody9/x"}
    for name, path in places.items():
        own = toml(tmp_path / "mine" / "own.toml", f"extends = '../bases/base.toml'\n[data]\npath = '{name}'\n")
        assert data.load_experiment(own, []).data.path == str(tmp_path / path)


@pytest.mark.parametrize(
    ("extends", "told"),
    [
        ("'mine.toml'", "mine.toml: extends = 'mine.toml': that file extends this one"),
        ("'back.toml'", "back.toml: extends = 'mine.toml': that file extends this one"),
        ("'absent.toml'", "absent.toml: no such experiment file"),
        ("'absent.toml'", "mine.toml extends"),
        ("'.'", "is a folder, which "),
        ("3", "mine.toml: extends = 3: expected the name of one file"),
    ],
)
def test_what_cannot_be_extended_is_told(tmp_path: Path, extends: str, told: str) -> None:
    toml(tmp_path / "back.toml", "extends = 'mine.toml'")
    with pytest.raises(MdptError) as caught:
        data.load_experiment(toml(tmp_path / "mine.toml", f"extends = {extends}"), [])
    assert told in str(caught.value)


def test_the_source_follows_from_what_is_named(tmp_path: Path) -> None:
    named: list[dict[str, Any]] = [
        {},
        {"path": "a"},
        {"dataset": "hopper-medium-v2"},
        {"dataset": "mujoco/hopper/a-v0"},
    ]
    assert [DataSection(**each).source for each in named] == ["collect", "hdf5", "d4rl", "minari"]
    experiment = data.load_experiment(toml(tmp_path / "a.toml", "[data]\npath = 'a'"), [])
    assert experiment.model_dump()["data"]["source"] == "hdf5"  # as in bundles
    loaded = load(toy_file(tmp_path / "a.hdf5", [3, 4]), reference=None)
    assert loaded.section.reference is None and loaded.environment.id == TOY


def test_an_experiment_of_another_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that was added later takes what held before it, else its default; what is unknown is named."""

    class Later(data.PolicySection):
        added: float = Field(1.0, json_schema_extra={"before": 0.0})
        other: int = Field(3)

    class LaterExperiment(Experiment):
        policy: Later = Later()
        label: str = Field("new", json_schema_extra={"before": "old"})

    stored = Experiment.model_validate({"policy": {"eta": 0.5}, "data": {"reference": [0, 1]}}).model_dump()
    del stored["policy"]["algorithm"], stored["guidance"], stored["seeds"]
    stored["policy"]["nonsense"] = stored["more"] = 1
    meant = {"policy": {"eta": 0.5}, "data": {"reference": [0, 1]}, "guidance": {"conservatism": 0}}
    assert data.experiment_as_stored(stored) == (Experiment.model_validate(meant), ["more", "policy.nonsense"])
    monkeypatch.setattr(data, "Experiment", LaterExperiment)
    later, unknown = data.experiment_as_stored(stored)
    assert isinstance(later, LaterExperiment) and unknown == ["more", "policy.nonsense"]
    assert (later.policy.added, later.policy.other, later.policy.eta, later.label) == (0.0, 3, 0.5, "old")
    assert data.experiment_as_stored({})[0].policy == Later(added=0.0, variance="posterior")
    assert data.check_experiment("", {}).policy == Later(added=1.0)
    for tables, told in (
        ({"policy": {"eta": "x"}}, r"\[policy\] eta = 'x'"),
        ({"policy": 3}, r"\[policy\] = 3: should"),
    ):
        with pytest.raises(MdptError, match=told):
            data.experiment_as_stored(tables)


# --- files ------------------------------------------------------------------------------------------------------


def test_a_file_of_other_types_gives_the_same_rows(tmp_path: Path) -> None:
    sound = rows(next_observations=np.ones((10, 3)))
    other = sound | {"rewards": sound["rewards"][:, None].astype(np.float64), "terminals": np.zeros((10, 1), np.int64)}
    one = prepare(write(tmp_path / "a.hdf5", sound))
    two = prepare(write(tmp_path / "b.hdf5", other | {"infos/other": np.nan}))
    scaled = data.scale_actions(sound["actions"], SPEC)
    by_hand = [sound["observations"], scaled, sound["rewards"][:, None], np.ones((10, 3)), np.zeros((10, 1))]
    assert np.array_equal(one.rows, np.hstack(by_hand)) and one.rows.dtype == np.float32
    assert np.array_equal(two.rows, one.rows) and two.identity.hash == one.identity.hash
    assert one.warnings == two.warnings == ()


SOUND = rows()


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({"rewards": None}, ["the key 'rewards' is missing. It has: actions, observations, terminals, timeouts."]),
        (
            {"terminals": None, "actions": [b"a"] * 10},
            [
                "the key 'terminals' is missing. It has: actions, observations, rewards, timeouts.",
                "'actions' holds object, expected numbers.",
            ],
        ),
        (
            {"observations": np.ones((10, 4)), "actions": np.ones((9, 2)), "rewards": np.ones(11)},
            [
                "'observations' has shape (10, 4), expected (10, 3) for Spec-v0.",
                "'actions' has shape (9, 2), expected (10, 2) for Spec-v0.",
                "'rewards' has shape (11,), expected (10,) for Spec-v0.",
            ],
        ),
        ({"timeouts": np.ones((10, 2))}, ["'timeouts' has shape (10, 2), expected (10,) for Spec-v0."]),
        ({"rewards": h5py.Empty("f")}, ["'rewards' has shape (), expected (10,) for Spec-v0."]),
        (
            {"next_observations": np.ones((9, 3))},
            ["'next_observations' has shape (9, 3), expected (10, 3) for Spec-v0."],
        ),
        (
            {"observations": put(np.zeros((10, 3)), (4, 1), np.nan)},
            ["'observations' row 4 is [0.0, nan, 0.0], expected finite numbers."],
        ),
        ({"rewards": put(SOUND["rewards"], 3, 1e300)}, ["'rewards' row 3 is inf, expected finite numbers."]),
        ({"terminals": np.arange(10)}, ["'terminals' row 2 is 2, expected only 0 and 1."]),
        ({"timeouts": np.full(10, np.nan)}, ["'timeouts' row 0 is nan, expected only 0 and 1."]),
        (
            {"actions": put(np.tile([[0.5, 2.0]], (10, 1)), (6, 0), -1.0625)},
            ["'actions' row 6 is [-1.0625, 2.0], expected within [-1.0, 0.0] and [1.0, 4.0] of Spec-v0."],
        ),
    ],
)
def test_bad_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], messages: list[str]
) -> None:
    monkeypatch.setattr(data, "CHUNK", 4)
    path = write(tmp_path / "bad.hdf5", rows(**changed))
    with pytest.raises(MdptError) as caught:
        prepare(path)
    assert str(caught.value).splitlines() == [f"{path}: {message}" for message in messages]


def test_short_missing_foreign_and_truncated_files(tmp_path: Path) -> None:
    def fails(path: Path) -> str:
        with pytest.raises(MdptError) as caught:
            prepare(path)
        return str(caught.value).removeprefix(f"{path}: ")

    assert fails(write(tmp_path / "short.hdf5", rows(1))) == "1 row(s), expected at least 2."
    assert fails(tmp_path / "absent.hdf5") == f"no such file; looked in {tmp_path}."
    assert fails(tmp_path) == "is a folder; name the file in it."
    (tmp_path / "text.hdf5").write_text("observations,actions")
    assert fails(tmp_path / "text.hdf5").startswith("not an HDF5 file. Expected D4RL's format: observations, actions,")
    cut = write(tmp_path / "cut.hdf5", rows(1000))
    cut.write_bytes(cut.read_bytes()[:-5000])
    assert fails(cut).startswith("a truncated or damaged HDF5 file; get it again. OSError: ")
    minari = write(tmp_path / "minari.hdf5", {"episode_0/observations": np.ones((3, 2))})
    assert fails(minari).startswith("is a Minari dataset; use source = 'minari' and its name as dataset, such as ")


def test_a_file_with_damaged_tables_is_told_or_read(tmp_path: Path) -> None:
    sound, told = write(tmp_path / "a.hdf5", rows(40)).read_bytes(), set()
    for place in range(8, 2400, 64):
        (tmp_path / "a.hdf5").write_bytes(sound[:place] + bytes(8) + sound[place + 8 :])
        try:
            prepare(tmp_path / "a.hdf5")
        except MdptError as error:
            told.add("damaged" in str(error))
    assert True in told


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"observation,action\n0,1\n", ("a csv file, not HDF5", "RECIPES.md")),
        ("a.npz", b"PK\x03\x04", ("npz, not HDF5", "RECIPES.md")),
        ("a", b"PAR1", ("a parquet file, not HDF5", "RECIPES.md")),
        ("a.hdf5", {"data/demo_0/actions": np.zeros((2, 2))}, ("robomimic's layout", "RECIPES.md")),
        ("a.hdf5", rows(timeouts=None, episode_terminals=np.zeros(10)), ("d3rlpy", "'timeouts'", "RECIPES.md")),
        ("a.hdf5", {"observations/goal": np.zeros((2, 2))}, ("'observations' is a group", "RECIPES.md")),
        (
            "a.hdf5",
            rows(observations=np.zeros((10, 1, 3))),
            ("(10, 1, 3)", "flat rows (n, O)", "swap the first two axes"),
        ),
    ],
)
def test_files_of_other_layouts_are_named(tmp_path: Path, name: str, content: Any, told: Sequence[str]) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    with pytest.raises(MdptError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and all(each in str(caught.value) for each in told), caught.value


def test_a_file_that_is_sound_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.hdf5", rows())
    for error, told in (
        (
            OSError(37, "Unable to synchronously open file (unable to lock file, errno = 37)"),
            "HDF5_USE_FILE_LOCKING=FALSE",
        ),
        (OSError(errno.EMFILE, "Unable to open file"), "cannot be read (Too many open files)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(h5py, "File", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(MdptError) as caught:
                load(path)
        assert told in str(caught.value) and "damaged" not in str(caught.value)
    with h5py.File(path, "w") as file:  # compressed by zstd, which nobody has without hdf5plugin
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((2, 3))
        settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((2, 3))
        made = h5py.h5d.create(file.id, b"observations", h5py.h5t.NATIVE_FLOAT, space, settings)
        h5py.Dataset(made).id.write_direct_chunk((0, 0), b"x" * 24)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(
        MdptError, match=r"'observations' is compressed by the HDF5 filter .*32015.* pip install hdf5plugin"
    ):
        load(path)


@pytest.mark.parametrize("how", ["dangling", "soft", "other file", "external", "virtual", "group"])
def test_nothing_outside_the_file_is_read(tmp_path: Path, how: str) -> None:
    other = write(tmp_path / "other.hdf5", {"rewards": SOUND["rewards"]})
    (tmp_path / "raw").write_bytes(SOUND["rewards"].tobytes())
    path = write(tmp_path / "a.hdf5", rows(rewards=None) | {"mine": SOUND["rewards"]})
    with h5py.File(path, "a") as file:
        if how == "external":
            file.create_dataset("rewards", (10,), "f4", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
        elif how == "virtual":
            layout = h5py.VirtualLayout((10,), "f4")
            layout[:] = h5py.VirtualSource(other, "rewards", (10,))
            file.create_virtual_dataset("rewards", layout)
        elif how == "group":
            file["rewards/0"] = np.zeros(10)
        else:
            links = {"dangling": h5py.SoftLink("/nowhere"), "soft": h5py.SoftLink("/mine")}
            file["rewards"] = links.get(how) or h5py.ExternalLink(other, "rewards")
    told = {
        "external": "lies in other files; copy",
        "virtual": "lies in other files; copy",
        "group": "is a group; expected",
    }
    with pytest.raises(MdptError, match=rf"a\.hdf5: 'rewards' {told.get(how, 'is a link; copy')}"):
        prepare(path)


def test_what_was_never_written_is_zero_where_it_says_how_rows_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", rows(terminals=None))
    with h5py.File(path, "a") as file:
        file.create_dataset("terminals", (10,), "i1")
    assert np.array_equal(prepare(path).rows, prepare(write(tmp_path / "b.hdf5", rows())).rows)


def test_columns_that_float32_or_the_normalizer_hides_are_told(tmp_path: Path) -> None:
    sound = rows()["observations"]
    hidden = sound.astype(np.float64) * [1, 1e-5, 1] + [1.7e9, 0, 0]
    assert prepare(write(tmp_path / "a.hdf5", rows())).warnings == ()
    far, faint = prepare(write(tmp_path / "b.hdf5", rows(observations=hidden))).warnings
    assert "columns [0] do not vary in float32" in far and "columns [1] vary by less than 0.0001" in faint


@pytest.mark.parametrize("chunks", [None, (1000,)])
def test_a_small_file_with_large_claims_is_refused(tmp_path: Path, chunks: tuple[int] | None) -> None:
    path = write(tmp_path / "a.hdf5", rows(rewards=None))
    with h5py.File(path, "a") as file:
        claim = file.create_dataset("rewards", (10**9,), "f4", chunks=chunks)
        if chunks:
            claim[:10] = 1.0
    with pytest.raises(MdptError, match=r"'rewards' claims 1000000000 rows, but not all were written"):
        prepare(path)


def test_more_than_memory_holds_is_told_how_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.hdf5", rows())
    prepare(path)
    for free, remedy in (([1_000], "choose a smaller dataset"), ([2_000, 300], "set .data. storage = 'disk'")):
        monkeypatch.setattr(data, "free_memory", iter(free).__next__)  # to read the file; for its rows
        with pytest.raises(MdptError, match=f"do not fit into .* free memory; {remedy}"):
            prepare(path)


def test_memory_is_bounded_by_the_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that are compressed twice: kilobytes of a file become gigabytes, also in a chunk that claims 10 numbers."""

    def compressed(passes: int, count: int, chunk: int, size: int) -> Path:
        path = write(tmp_path / f"{passes}.hdf5", rows(rewards=None))
        content = bytes(4 * size)
        for _ in range(passes):
            content = zlib.compress(content, 9)
        with h5py.File(path, "a") as file:
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_chunk((chunk,))
            for _ in range(passes):
                settings.set_deflate(9)
            space = h5py.h5s.create_simple((count,), (h5py.h5s.UNLIMITED,))
            rewards = h5py.h5d.create(file.id, b"rewards", h5py.h5t.NATIVE_FLOAT, space, settings)
            for start in range(0, count, chunk):
                rewards.write_direct_chunk((start,), content)
        return path

    path = compressed(2, 10, 10, 10_000_000)
    assert path.stat().st_size < 10_000
    with pytest.raises(MdptError, match="'rewards' is compressed more than once"):
        prepare(path)
    path = compressed(1, 10, 10_000, 10_000)
    assert len(prepare(path)) == 8
    monkeypatch.setattr(data, "free_memory", lambda: 40_000)
    with pytest.raises(MdptError, match="do not fit into .* free memory; choose a smaller dataset"):  # for one chunk
        prepare(path)


def test_a_file_that_is_still_written_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", rows())
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    writer = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"open\n"
        with pytest.raises(MdptError, match=r"a\.hdf5: another process holds it open for writing; wait"):
            prepare(path)
    finally:
        writer.communicate(timeout=30)
    assert len(prepare(path)) > 0


def test_actions_slightly_out_of_bounds_are_clipped_with_a_warning(tmp_path: Path) -> None:
    actions = np.tile(np.array([[0.5, 2.0]], dtype=np.float32), (10, 1))
    actions[3] = [1.0005, 4.003]
    actions[7, 0] = -1.0015
    path = write(tmp_path / "a.hdf5", rows(actions=actions, next_observations=np.ones((10, 3))))
    loaded = prepare(path)
    assert loaded.warnings == (f"{path}: clipped the actions of 2 rows, out of bounds by 3.0e-03 at most.",)
    assert loaded.column("actions")[[3, 7]].tolist() == [[1, 1], [-1, 0]]
    assert (np.delete(loaded.column("actions"), [3, 7], axis=0) == [0.5, 0]).all()


# --- transitions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_timeouts", [True, False])
def test_transitions_agree_with_d4rl(d4rl: ModuleType, monkeypatch: pytest.MonkeyPatch, with_timeouts: bool) -> None:
    random = np.random.default_rng(int(with_timeouts))
    compared = ends_in_middle = 0
    for case in range(300):
        monkeypatch.setattr(data, "CHUNK", int(random.integers(1, 20)))
        n, limit = int(random.integers(2, 60)), int(random.integers(1, 9))
        terminals = random.random(n) < random.choice([0, 0.05, 0.2, 0.5])
        timeouts = (random.random(n) < random.choice([0, 0.1, 0.5])) | (terminals & (random.random(n) < 0.3))
        if case % 3 == 0:
            terminals[-1] = timeouts[-1] = False
            ends_in_middle += 1
        actions = random.uniform(-1, 1, (n, 2)).astype(np.float32)
        raw = rows(n, actions=actions, terminals=terminals, timeouts=timeouts if with_timeouts else None)
        expected = d4rl.qlearning_dataset(SimpleNamespace(_max_episode_steps=limit), dataset=raw)
        if not len(expected["rewards"]):
            with pytest.raises(MdptError, match="no transition is left"):
                load_arrays(raw, max_episode_steps=None if with_timeouts else limit)
            continue
        loaded = load_arrays(raw, max_episode_steps=None if with_timeouts else limit)
        for key, array in expected.items():
            assert np.array_equal(loaded.column(key), array), (case, key)
        compared += 1
    assert compared > 200 and ends_in_middle == 100


def test_next_observations_are_used_and_keep_every_row(tmp_path: Path) -> None:
    own = np.arange(30, dtype=np.float32).reshape(10, 3)
    terminals, timeouts = np.zeros(10, dtype=np.bool_), np.zeros(10, dtype=np.bool_)
    terminals[[2, 4]] = timeouts[[4, 7]] = True
    raw = rows(next_observations=own, terminals=terminals, timeouts=timeouts)
    loaded = prepare(write(tmp_path / "a.hdf5", raw))
    assert np.array_equal(loaded.column("observations"), raw["observations"])
    assert np.array_equal(loaded.column("next_observations"), own)
    assert np.flatnonzero(loaded.column("terminals")).tolist() == [2, 4]  # row 7, a time limit, is bootstrapped


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


# --- the dataset ------------------------------------------------------------------------------------------------


def test_dataset_without_held_out_episodes(tmp_path: Path) -> None:
    loaded = load(toy_file(tmp_path / "a.hdf5", [3, 4, 2]))
    expected = [[row, row, 0.5, -0.5, row, row + 1, row + 1, row in (2, 6)] for row in range(8)]
    assert loaded.rows.tolist() == expected and loaded.rows.dtype == np.float32
    views = [loaded.column(key) for key in ("observations", "actions", "rewards", "next_observations", "terminals")]
    assert [view.shape for view in views] == [(8, 2), (8, 2), (8,), (8, 2), (8,)]
    assert np.array_equal(np.column_stack(views), expected)
    assert all(np.shares_memory(view, loaded.rows) for view in views)
    assert loaded.episode_returns.tolist() == [3, 18]  # the last episode is incomplete
    assert loaded.episode_lengths.tolist() == [3, 4]
    assert (loaded.environment.id, len(loaded), len(loaded.held_out.rewards), loaded.warnings) == (TOY, 8, 0, ())
    assert replace(loaded.identity, hash="") == data.Identity("hdf5", "a.hdf5", 9, "", "")
    only = load(toy_file(tmp_path / "b.hdf5", [5]), held_out=0.5)
    assert only.episode_returns.tolist() == [10]
    assert only.warnings == (f"{tmp_path / 'b.hdf5'}: a single episode, so none is held out.",)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("chunk", [data.CHUNK, 3])
def test_rows_follow_up_to_the_ends(storage: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row r acts with r / 100. Episodes: 0 to 2 ends by a terminal, 3 and 4 by a time limit, 5 by both, 6 to 9 by
    both, and 10 to 12 end with the file."""
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "CHUNK", chunk)
    numbers = np.arange(13)
    flags = {"terminals": np.isin(numbers, [2, 5, 9]), "timeouts": np.isin(numbers, [4, 5, 9])}
    arrays = rows(13, actions=np.stack([numbers / 100] * 2, axis=1), **flags)

    def ends(**changed: Any) -> tuple[list[int], list[float], list[int]]:
        loaded = load_arrays(arrays | changed, storage=storage, fraction=fraction, held_out=held_out, seed=4)
        assert loaded.ends.dtype == np.int64 and loaded.cut_actions.dtype == np.float32
        assert loaded.cut_actions.shape == (len(loaded.ends), 2) and loaded.ends[-1] == len(loaded)
        cut, used = loaded.cut_actions[:, 1] * 100, loaded.column("actions")[:, 0] * 100
        return loaded.ends.tolist(), np.nan_to_num(cut, nan=-1).round().tolist(), used.round().tolist()

    fraction, held_out = 1.0, 0.0
    # Rows 4, 5, 9 and 12 are no transitions, because what followed them is unknown; nothing is left of the third episode.
    assert ends() == ([3, 4, 7, 9], [-1, 4, 9, 12], [0, 1, 2, 3, 6, 7, 8, 10, 11])
    assert ends(next_observations=np.ones((13, 3))) == ([3, 5, 6, 10, 13], [-1] * 5, [*range(13)])
    fraction, held_out = (
        0.8,
        0.4,
    )  # of the four complete episodes the last three are used, the first of which is held out
    assert ends() == ([3], [9], [6, 7, 8])
    assert ends(next_observations=np.ones((13, 3))) == ([1, 5], [-1] * 2, [5, 6, 7, 8, 9])


def test_the_last_row_of_a_file_is_the_next_action_of_the_row_before() -> None:
    arrays = rows(4, actions=np.full((4, 2), 0.5), terminals=[0, 0, 0, 1], timeouts=np.zeros(4))
    loaded = load_arrays(arrays)
    assert loaded.ends.tolist() == [3] and loaded.cut_actions.tolist() == [[0.5, 0.5]]


def test_held_out_episodes_are_whole_and_apart(tmp_path: Path) -> None:
    path = toy_file(tmp_path / "a.hdf5", [3, 4, 2, 5, 1, 6, 3, 4, 2, 2, 3])
    everything = load(path)
    seen = set()
    for seed in range(8):
        loaded = load(path, held_out=0.2, seed=seed, reward_scale=2.0)
        kept = loaded.held_out
        held, trained = kept.observations[:, 0], loaded.column("observations")[:, 0]
        assert kept.terminals.sum() == 2 and kept.terminals[-1]  # 2 of 10 complete episodes
        assert not set(held) & set(trained)
        assert sorted([*held, *trained]) == list(range(34))  # all but the file's last row
        assert list(held) == sorted(held) and np.array_equal(kept.rewards, 2 * held)
        assert kept.actions.shape == (len(held), 2) and kept.actions[0].tolist() == [0.5, -0.5]
        assert not kept.timeouts.any()
        assert np.array_equal(loaded.episode_returns, everything.episode_returns)
        assert np.array_equal(load(path, held_out=0.2, seed=seed).held_out.observations, kept.observations)
        assert loaded.mean.tolist() == pytest.approx([np.mean(trained)] * 2)  # of the training rows alone
        seen.add(tuple(held))
    assert len(seen) > 1
    assert load(path, held_out=0.001).held_out.terminals.sum() == 1
    assert load(path, held_out=0.5).held_out.terminals.sum() == 5
    two = load(toy_file(tmp_path / "two.hdf5", [3, 4, 2]), held_out=0.5)
    assert two.held_out.terminals.sum() == 1 and len(two)  # never all


def test_a_fraction_is_of_whole_episodes(tmp_path: Path) -> None:
    lengths = [3, 4, 2, 5, 1, 6, 3, 4, 2, 2, 3]
    path, starts = toy_file(tmp_path / "a.hdf5", lengths), np.cumsum([0, *lengths])
    drawn = set()
    for seed in range(4):
        last: set[float] = set()
        for fraction, count in ((0.001, 1), (0.25, 2), (0.5, 5), (0.9, 9)):  # of 10 complete episodes
            loaded = load(path, fraction=fraction, seed=seed)
            used = loaded.column("observations")[:, 0].tolist()
            places = np.flatnonzero(np.isin(starts, used))
            assert len(places) == count and 10 not in places
            assert used == [row for place in places for row in range(starts[place], starts[place + 1])]
            assert loaded.episode_lengths.tolist() == [lengths[place] for place in places]
            assert loaded.identity.transitions == 35 and loaded.identity.hash == load(path).identity.hash
            assert last < {*used}  # a larger fraction adds episodes, and drops none
            last = {*used}
        drawn.add(frozenset(last))
    assert len(drawn) > 1
    assert len(load(toy_file(tmp_path / "one.hdf5", [5]), fraction=0.5)) == 4  # one at least
    both = load(path, fraction=0.5, held_out=0.4, seed=3)
    assert both.held_out.terminals.sum() == 2  # of these five
    rows = {*both.held_out.observations[:, 0], *both.column("observations")[:, 0]}
    assert rows == {*load(path, fraction=0.5, seed=3).column("observations")[:, 0]}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", RewardScale("none", 1.0, 0.0)),
        ("minus-one", RewardScale("minus-one", 1.0, -1.0)),
        ("return-range", RewardScale("return-range", 6 / 15, 0.0)),
        (None, RewardScale("return-range", 6 / 15, 0.0)),
        (0.25, RewardScale("number", 0.25, 0.0)),
        ((4.0, -2.0), RewardScale("number", 4.0, -2.0)),
    ],
)
def test_reward_scale(tmp_path: Path, rule: str | float | None, expected: RewardScale) -> None:
    loaded = load(toy_file(tmp_path / "a.hdf5", [3, 4, 2]), reward_scale=rule)  # returns 3 and 18
    assert loaded.reward_scale == expected
    assert np.allclose(loaded.column("rewards"), expected.multiplier * np.arange(8) + expected.offset)


def test_returns_that_hardly_differ_give_no_range() -> None:
    arrays = rows(4, actions=np.zeros((4, 2)), terminals=[0, 1, 0, 1], rewards=[1000, 0, 1000, 2**-11], timeouts=None)
    with pytest.raises(MdptError, match=r"'return-range': all returns are equal, 1000 to 1000; choose 'none' or a num"):
        load_arrays(arrays, reward_scale="return-range")
    loaded = load_arrays(arrays | {"rewards": [1000, 0, 1000, 2**-9]}, reward_scale="return-range")
    assert loaded.reward_scale.multiplier == 2 * 2**9


def test_other_arrays_are_left_alone() -> None:
    arrays = rows(actions=np.zeros((10, 2)))
    more = {"infos/qpos": np.zeros((10, 5)), "metadata/algorithm": np.array("SAC")}  # as D4RL's get_dataset has
    assert same(load_arrays(arrays | more), load_arrays(arrays))
    with pytest.raises(MdptError, match="arrays: expected arrays of numbers"):
        load_arrays(arrays | {"observations": [[1.0], [1.0, 2.0]]})


def test_dataset_errors(tmp_path: Path) -> None:
    with pytest.raises(MdptError, match=r"no transition is left to train on; lower held_out \(now 0\.0\)"):
        load(toy_file(tmp_path / "b.hdf5", [3, 2], timeouts=np.ones(5, dtype=np.bool_)))
    with pytest.raises(
        MdptError, match=r"episode from row 3 on has 7 rows, more than the time limit 6 of toy_env.*mend"
    ):
        load(toy_file(tmp_path / "c.hdf5", [3, 7, 2]))
    assert len(load(toy_file(tmp_path / "c.hdf5", [3, 6, 2]))) == 10
    with pytest.raises(MdptError, match=r"reference: \[1\.0, 0\.0\] must be \[min, max\]"):
        load(tmp_path / "absent.hdf5", reference=(1.0, 0.0))
    with pytest.raises(MdptError, match=r"source = 'arrays': .* load_dataset\(section, arrays=\.\.\.\)"):
        data.load_dataset(DataSection(source="arrays"))


def test_identity_follows_the_content(tmp_path: Path) -> None:
    one, same = toy_file(tmp_path / "a.hdf5", [3, 4]), toy_file(tmp_path / "b.hdf5", [3, 4])
    other = toy_file(tmp_path / "c.hdf5", [4, 3])
    hashes = [load(path).identity.hash for path in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    for key in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations"):
        arrays = rows(next_observations=np.ones((10, 3)), actions=np.zeros((10, 2)))
        before = load_arrays(arrays).identity.hash
        arrays[key] = put(arrays[key], 5, 1 - arrays[key].flat[5] / 2)  # any other value, of a flag too
        assert load_arrays(arrays).identity.hash != before, key


def test_a_file_without_timeouts_says_so(tmp_path: Path) -> None:
    whole = toy_file(tmp_path / "a.hdf5", [3, 9])
    with h5py.File(whole, "r+") as file:
        del file["timeouts"]
    loaded = load(whole)
    assert loaded.warnings == (f"{whole}: no 'timeouts'; episodes end at terminals and every 6 rows.",)
    assert (loaded.terminal_count, loaded.timeout_count, loaded.timeouts_counted) == (1, 1, True)
    bare = load(whole, environment=None, reference=None, held_out=0.5)
    told = "no 'timeouts'; episodes end at terminals alone. [data] max_episode_steps cuts them."
    assert bare.warnings == (f"{whole}: {told}", f"{whole}: a single episode, so none is held out.")
    assert bare.timeout_count == 0


def test_data_without_an_environment(tmp_path: Path) -> None:
    path = toy_file(tmp_path / "a.hdf5", [3, 40, 2])
    loaded = load(path, environment=None, reference=None, action_range=(0.0, 4.0), max_episode_steps=None)
    assert loaded.environment == EnvironmentSpec(None, 2, 2, (0.0, 0.0), (4.0, 4.0), 40)  # the longest episode
    assert loaded.column("actions")[0].tolist() == [-0.75, -0.5]
    assert loaded.identity.no_environment == "[data] names no environment"
    assert loaded.section.reference is None
    limited = load(path, environment=None, reference=None, max_episode_steps=50)
    assert limited.environment == EnvironmentSpec(None, 2, 2, (-1.0, -1.0), (1.0, 1.0), 50)
    with pytest.raises(MdptError) as caught:
        load(path, environment=None, reference=None, action_range=(0.0, 0.75))
    where = "'actions' row 0 is [0.5, 1.0], expected within [0.0, 0.0] and [0.75, 0.75] of the data"
    assert str(caught.value) == f"{path}: {where}; [data] action_range sets the bounds."


@pytest.mark.parametrize("environment", [None, TOY])
def test_a_dataset_is_loaded_again_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    reference = None if environment is None else (0.0, 1.0)
    path = write(tmp_path / "a.hdf5", noisy())
    loaded = load(path, environment=environment, reference=reference, action_range=(-1.0, 5.0))
    assert loaded.timeouts_counted
    monkeypatch.setattr(data, "environment_spec", None)  # it need not be made
    again = data.load_dataset(loaded.section, spec=loaded.environment)
    loaded = replace(loaded, identity=replace(loaded.identity, mismatched=[]), warnings=again.warnings)
    assert same(again, loaded) and (again.environment, again.section) == (loaded.environment, loaded.section)


def test_what_a_source_knows_holds_where_the_user_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {
        "environment": TOY,
        "environment_kwargs": {"bonus": 1.0},
        "max_episode_steps": 4,
        "observation_columns": 2,
        "reward_scale": "minus-one",
        "reference": (1.0, 2.0),
    }

    def settle(known: dict[str, Any], missing: str, width: int, **settings: Any) -> tuple[Dataset, dict[str, Any]]:
        monkeypatch.setattr(data.Arrays, "know", lambda *_: data.Known(known, missing, ("told",)))
        arrays = rows(observations=np.ones((10, width)), timeouts=np.arange(10) % 4 == 3, actions=np.ones((10, 2)))
        loaded = data.load_dataset(DataSection(source="arrays", **settings), arrays=arrays)
        assert loaded.warnings[0] == "told"
        return loaded, {key: getattr(loaded.section, key) for key in facts}

    loaded, found = settle(facts, "", 3)
    assert found == facts and loaded.environment == data.environment_spec(TOY, {"bonus": 1.0}, 4)
    own = {"reference": (0.0, 9.0), "reward_scale": 2.0, "max_episode_steps": 5}
    assert settle(facts, "", 3, **own)[1] == facts | own
    loaded, found = settle(facts, "", 2, environment=PARTED)  # of which nothing is known but what scores mean
    assert found == {key: None for key in facts} | {"environment": PARTED, "environment_kwargs": {}} | {
        key: facts[key] for key in ("reward_scale", "reference")
    }
    assert loaded.environment == data.environment_spec(PARTED) and loaded.identity.no_environment == ""
    loaded, _ = settle({key: facts[key] for key in ("max_episode_steps", "reward_scale")}, "none fits", 2)
    assert loaded.environment == EnvironmentSpec(None, 2, 2, (-1.0, -1.0), (1.0, 1.0), 4)
    assert loaded.identity.no_environment == "none fits"


def test_only_the_first_observation_columns_are_used(tmp_path: Path) -> None:
    arrays = rows(observations=np.arange(40.0).reshape(10, 4), next_observations=np.ones((10, 4)) * np.arange(4))
    narrow = arrays | {key: arrays[key][:, :2] for key in ("observations", "next_observations")}
    loaded, other = (
        load(write(tmp_path / "a.hdf5", arrays), observation_columns=2),
        load(write(tmp_path / "b.hdf5", narrow)),
    )
    assert loaded.environment == other.environment and loaded.identity.hash == other.identity.hash
    assert np.array_equal(loaded.rows, other.rows) and (loaded.column("next_observations") == [0, 1]).all()
    with pytest.raises(MdptError, match=r"'observations' has shape \(10, 4\), expected \(10, 2\) for toy_env"):
        load(tmp_path / "a.hdf5")
    alone = load(tmp_path / "a.hdf5", environment=None, reference=None, observation_columns=3, action_range=(-1.0, 4.0))
    assert alone.environment.observation_dim == 3 and alone.rows.shape == (10, 10)
    with pytest.raises(
        MdptError, match=r"^\[data\] observation_columns = 3: toy_environment:Toy-v0 has 2 observations"
    ):
        load(tmp_path / "a.hdf5", observation_columns=3)
    with pytest.raises(MdptError, match=r"'observations' has shape \(10, 4\), expected \(10, 5\)"):
        load(tmp_path / "a.hdf5", environment=None, reference=None, observation_columns=5)


def noisy(n: int = 100, **changed: Any) -> dict[str, Any]:
    """Rows for Toy-v0 whose actions are a little out of bounds here and there."""
    random = np.random.default_rng(7)
    sound = {
        "observations": random.normal([3, -900], [5, 0.01], size=(n, 2)),
        "actions": random.uniform(-9, 9, size=(n, 2)).clip([-1.001, -0.003], [1.001, 4.003]),
        "rewards": random.normal(size=n),
        "terminals": random.random(n) < 0.2,
    }
    return rows(n, **(sound | changed), timeouts=None)


def same(one: Dataset, other: Dataset) -> bool:
    """To the last bit."""
    held = [[*vars(each.held_out).values()] for each in (one, other)]
    return (
        replace(one.identity, name="") == replace(other.identity, name="")
        and np.array_equal(one.rows, other.rows)
        and all(map(np.array_equal, *held))
        and [text.partition(": ")[2] for text in one.warnings] == [text.partition(": ")[2] for text in other.warnings]
    )


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "a.pt", tmp_path / "there" / "b.pt"
    link.symlink_to(target)
    for text in ("new", "newer"):
        with data.written_whole(link, "") as temporary:
            temporary.write_text(text)
        assert link.is_symlink() and target.read_text() == text and len([*target.parent.iterdir()]) == 1


def test_folders_that_are_gone_or_closed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for call in (lambda: data.load_experiment(Path("a.toml"), []), lambda: load(Path("a.hdf5")), data.working_folder):
        with pytest.raises(MdptError, match="the working folder is gone"):
            call()
    monkeypatch.chdir(tmp_path)
    closed = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "stat", lambda *_, **__: (_ for _ in ()).throw(closed))
    for call in (lambda: data.load_experiment(Path("a.toml"), []), lambda: load(Path("a.hdf5"))):
        with pytest.raises(MdptError, match=r"cannot be read \(Permission denied\)"):
            call()


def test_a_user_without_a_home_needs_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MDPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(MdptError, match="no home folder for the cache; set MDPT_CACHE"):
        data.collect_dataset(DataSection(environment=HOPPER))


@pytest.mark.parametrize("own", [True, False])
def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: bool) -> None:
    following = np.random.default_rng(8).normal(size=(100, 2)) if own else None
    path = write(tmp_path / "a.hdf5", noisy(next_observations=following))
    settings: dict[str, Any] = {"held_out": 0.2, "fraction": 0.8, "reward_scale": "return-range"}
    heard: list[tuple[str, int, int]] = []
    section = DataSection(source="hdf5", path=str(path), environment=TOY, reference=(0.0, 1.0), **(PLAIN | settings))
    monkeypatch.setattr(data, "CHUNK", 8)
    data.load_dataset(section, show=lambda *progress: heard.append(progress))
    assert heard == [("read", min(stop, 100), 100) for stop in range(8, 108, 8)]
    monkeypatch.undo()
    whole = load(path, **settings)
    assert "clipped" in whole.warnings[-1] and len(whole.held_out.rewards) and 40 < len(whole) < 80
    for chunk in (1, 3, 10, 99, 100):
        monkeypatch.setattr(data, "CHUNK", chunk)
        parts = load(path, **settings)
        assert same(parts, whole)
        assert np.allclose(parts.mean, whole.mean, rtol=1e-6) and np.allclose(
            parts.deviation, whole.deviation, rtol=1e-6
        )


def test_disk_and_memory_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "CHUNK", 7)
    path = write(tmp_path / "a.hdf5", noisy())
    memory, disk = (load(path, held_out=0.2, storage=storage) for storage in ("memory", "disk"))
    assert isinstance(disk.rows, np.memmap) and not isinstance(memory.rows, np.memmap)
    assert same(disk, memory) and data.describe_data(disk) == data.describe_data(memory)
    assert np.array_equal(disk.mean, memory.mean) and np.array_equal(disk.deviation, memory.deviation)
    assert list((tmp_path / "cache").iterdir()) == []  # it goes with the process, however that ends

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        MdptError, match=rf"cache: no room for 0\.0 GB of .*{os.strerror(errno.ENOSPC)}.*set MDPT_CACHE"
    ):
        load(path, storage="disk")


def test_the_normalizer_against_numpy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 64)
    random = np.random.default_rng(0)
    columns = random.normal([0, 1e4, -3, 0.1, 0, 7], [1, 0.05, 1e3, 0, 1e-4, 0], size=(1000, 6)).astype(np.float32)
    columns[:, 5] = 7 + 1e-6 * random.random(1000)  # noise of the last bit
    mean, deviation, _ = data.moments(np.hstack([columns, columns]), 6)
    wide = columns.astype(np.float64)
    assert np.allclose(mean, wide.mean(0), rtol=1e-7, atol=1e-10) and mean.dtype == np.float32
    assert np.allclose(deviation[[0, 1, 2, 4]], wide.std(0)[[0, 1, 2, 4]] + 1e-3, rtol=1e-7)
    assert deviation[[3, 5]].tolist() == [1, 1] and deviation.dtype == np.float32  # what never varies is not blown up
    assert data.moments(np.array([[1.0, 5.0], [3.0, 5.0]]), 2)[1].tolist() == [np.float32(1.001), 1]


def test_rewards_that_lie_a_row_late_are_told() -> None:
    """As d4rl-pybullet writes them: an episode's last row has its last reward, its terminal and no action."""
    rewards, terminals = np.array([0, 1, 2, 0, 3, 4, 0], dtype=np.float32), np.array([0, 0, 1, 0, 0, 1, 0])
    actions = np.linspace([0.1, 0.2], [0.7, 0.9], 7)
    actions[[2, 5]] = 0
    late = rows(7, rewards=rewards, terminals=terminals, actions=actions, timeouts=np.zeros(7))
    (told,) = load_arrays(late).warnings
    assert "begins with reward 0 and ends with action 0" in told and "one row late" in told
    assert load_arrays(late | {"rewards": put(rewards, 3, 0.5)}).warnings == ()
    assert load_arrays(late | {"actions": put(actions, (5, 1), 0.5)}).warnings == ()
    assert load_arrays(late | {"rewards": rewards * 0}).warnings == ()  # sparse rewards that nobody earned


def test_what_is_told_of_a_dataset(tmp_path: Path) -> None:
    observations = np.array([[place / 10, 3] for place in (0, 1, 2, 0, 1, 4, 5, 6, 7)])
    actions = np.tile([0.5, 4.0], (9, 1))
    actions[:4, 0] = [1, -1, 0.25, 1]
    rewards = np.array([1, 1, 1, 2, 2, 2, 2, 5, 5])
    path = toy_file(tmp_path / "a.hdf5", [3, 4, 2], observations=observations, actions=actions, rewards=rewards)
    assert data.describe_data(load(path)) == data.Description(
        transitions=8,
        held_out=0,
        lengths=[3, 3.5, 4],
        returns=[3, 4.25, 5.5, 6.75, 8],
        histogram=[1] + 18 * [0] + [1],
        constant=[1],
        at_bounds=[3 / 8, 1],
        duplicates=1 / 8,  # rows 0 and 3
        terminals=2,
        timeouts=0,
        both=0,
        timeouts_counted=False,
    )


# --- what the data mean -----------------------------------------------------------------------------------------


def walks(episodes: int = 12, steps: int = 10, **changed: Any) -> dict[str, Any]:
    """Walks to place 4, where each further step is worth 1, cut by a time limit: V there is 10 at discount 0.9."""
    places = np.minimum(np.arange(steps), 4).astype(np.float64)
    start = np.arange(episodes)[:, None] / 100  # so that no two walks are equal
    observations = np.stack([places + start, -places + start], axis=-1).reshape(-1, 2)
    arrays = {
        "observations": observations,
        "actions": np.random.default_rng(0).uniform(-1, 1, (episodes * steps, 2)),
        "rewards": np.tile(places == 4, episodes).astype(np.float64),
        "terminals": np.zeros(episodes * steps, dtype=np.bool_),
        "timeouts": np.arange(episodes * steps) % steps == steps - 1,
    }
    return {key: array for key, array in (arrays | changed).items() if array is not None}


def following(arrays: dict[str, Any]) -> Array:
    """What truly follows: the next row's observation, and at a time limit the place 4 itself."""
    after = np.roll(arrays["observations"], -1, axis=0)
    return np.where(arrays["timeouts"][:, None], arrays["observations"], after)


def values(dataset: Dataset, discount: float = 0.9) -> dict[int, float]:
    """V by place, as the training rows have it: the mean over a place's rows of reward + discount (1 - terminal) V."""
    here, there = (np.rint(dataset.column(key)[:, 0]).astype(int) for key in ("observations", "next_observations"))
    v = np.zeros(1 + max(here.max(), there.max()))
    for _ in range(300):
        target = dataset.column("rewards") + discount * (1 - dataset.column("terminals")) * v[there]
        v[: here.max() + 1] = np.bincount(here, target) / np.maximum(np.bincount(here), 1)
    return dict(enumerate(v.tolist()))


def test_sound_data_cause_no_warning(tmp_path: Path) -> None:
    sound = walks(rewards=np.ones(120))
    resets = np.stack([np.arange(120) % 4 + 3.5, np.arange(120) % 10], axis=1)  # begins as the toy does
    at_limit = {"observations": resets, "rewards": np.tile(np.arange(50) / 50, 12)[:120]}
    ended = {"terminals": np.arange(120) % 20 == 9, "timeouts": np.arange(120) % 20 == 19}
    real = {"next_observations": following(sound)}
    gap = real["next_observations"].copy()
    gap[ended["terminals"]] = np.nan  # as pandas' shift leaves it, where nothing follows
    for changed in ({}, real, ended, ended | {"next_observations": gap}, at_limit):
        assert load_arrays(sound | changed).warnings == (), changed
        if changed.get("next_observations") is gap:
            assert np.isfinite(load_arrays(sound | changed).rows).all()
    even = walks(40, 50, rewards=np.ones(2000))  # 2 % of rows and of reward at time limits
    assert load_arrays(even).warnings == ()
    plain = {"actions": np.tile([0.5, 1.0], (120, 1)), "timeouts": np.arange(120) % 5 == 4}
    begins = np.stack([np.arange(120) // 5 % 6 + 3.0, np.arange(120) % 5], axis=1)
    played = load(write(tmp_path / "a.hdf5", sound | plain | {"observations": begins}))
    assert played.warnings == () and played.identity.mismatched == []


def test_reward_at_time_limits_is_not_dropped_without_a_word() -> None:
    """Item 1: with each reward on a row that is dropped, every training reward would be 0."""
    only = walks(rewards=np.arange(120) % 10 == 9)
    with pytest.raises(
        MdptError, match=r"^arrays: the 12 rows at time limits hold 100\.0% of the reward.*keep_timeouts"
    ):
        load_arrays(only)
    kept = load_arrays(only, keep_timeouts=True)
    assert len(kept) == 120 and kept.column("rewards").sum() == 12 and kept.warnings == ()
    last = kept.column("observations")[kept.ends - 1]
    assert np.array_equal(kept.column("next_observations")[kept.ends - 1], last)  # its own
    assert np.isnan(kept.cut_actions).all() and kept.ends.tolist() == [*range(10, 121, 10)]
    assert np.array_equal(kept.column("next_observations")[:9], kept.column("observations")[1:10])
    assert values(load_arrays(walks(), keep_timeouts=True))[4] == pytest.approx(10)  # it stays, as the walk does
    given = only | {"next_observations": following(walks())}
    assert load_arrays(given).column("rewards").sum() == 12  # nothing is dropped there

    def told(share: float) -> tuple[str, ...]:
        """For a share of the reward at a tenth of the rows."""
        return load_arrays(only | {"rewards": np.where(only["timeouts"], share / 12, (1 - share) / 108)}).warnings

    assert told(0.19) == () and "hold 21.0% of the reward" in told(0.21)[0] and "49.0%" in told(0.49)[0]
    with pytest.raises(MdptError, match=r"hold 51\.0%"):
        told(0.51)
    rare = only | {"rewards": np.where(only["timeouts"], -0.005, 1.0)}
    assert load_arrays(rare).warnings == ()  # below 1 %


def test_terminals_at_all_time_limits_are_told() -> None:
    """Item 2: as in the `dones` of stable-baselines3, of which nothing is expected afterwards."""
    sound = walks(rewards=np.ones(120))
    sound |= {"next_observations": following(sound)}
    right, wrong = (load_arrays(sound | changed) for changed in ({}, {"terminals": sound["timeouts"]}))
    assert right.warnings == () and values(right)[4] == pytest.approx(10)
    assert values(wrong)[4] < 6 and wrong.column("terminals").sum() == 12
    (told,) = wrong.warnings
    assert "all 12 'timeouts' are 'terminals', too, which win" in told and "set 'terminals' to 0" in told
    assert [data.describe_data(each).both for each in (right, wrong)] == [0, 12]
    some = load_arrays(sound | {"terminals": np.arange(120) == 9})  # a real end in the last step that is allowed
    assert some.warnings == () and data.describe_data(some).both == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("changed", "settings", "right"),
    [
        ({"next_observations": "true"}, {}, 10.0),
        ({"next_observations": "true", "terminals": "timeouts"}, {}, 1 / (1 - 0.9 * 5 / 6)),
        ({"timeouts": None, "masks": 1, "terminals": "timeouts"}, {}, 10.0),
        ({"rewards": "timeouts"}, {"keep_timeouts": True}, 1 / 6 / (1 - 0.9)),
    ],
)
def test_a_guidance_learns_these_values(changed: dict[str, Any], settings: dict[str, Any], right: float) -> None:
    """V at place 4, as `values` has it: a sixth of the rows there are at a time limit."""
    from mdpt import models

    arrays = walks()
    given: dict[Any, Any] = {"true": following(arrays), "timeouts": arrays["timeouts"] * 1.0, 1: np.ones(120)}
    dataset = load_arrays(walks(**{key: given.get(kind) for key, kind in changed.items()}), **settings)
    assert values(dataset)[4] == pytest.approx(right, abs=0.01)
    guidance = {"discount": 0.9, "expectile": 0.5, "steps": 500, "batch_size": 64, "tau": 0.1, "hidden": [32]}
    guidance |= {"learning_rate": 1e-2, "snapshots": 1}
    experiment = data.check_experiment("", {"seeds": [0], "data": dataset.section.model_dump(), "guidance": guidance})
    bundle = models.train_guidance(experiment, dataset, models.Run())
    learned = models.build_guidance(bundle, "cpu")
    there = dataset.column("observations")[dataset.column("observations")[:, 0] > 3.5]
    assert learned.v(models.torch.from_numpy(there)[None]).mean().item() == pytest.approx(right, rel=0.25)


def test_masks_are_the_real_ends() -> None:
    """Item 3: in OGBench, terminals are the ends of trajectories."""
    ends = walks()["timeouts"]
    real = np.arange(120) == 19
    ogbench = walks(terminals=ends, timeouts=None, masks=1.0 - real)
    loaded = load_arrays(ogbench)
    assert (loaded.terminal_count, loaded.timeout_count, loaded.timeouts_counted) == (1, 11, False)
    (told,) = loaded.warnings
    assert "'masks'" in told and "1 rows" in told and "11 time limits" in told
    as_d4rl = load_arrays(walks(terminals=real, timeouts=ends & ~real))
    assert np.array_equal(loaded.rows, as_d4rl.rows) and loaded.identity.hash == as_d4rl.identity.hash
    assert values(loaded)[4] > 7 and values(load_arrays(walks(terminals=ends, timeouts=None)))[4] < 5
    with pytest.raises(MdptError, match="'masks' row 3 is 0.5, expected only 0 and 1"):
        load_arrays(walks(masks=np.where(np.arange(120) == 3, 0.5, 1)))


def test_next_observations_of_other_episodes_are_refused() -> None:
    """Item 4: as environments that reset themselves store them."""
    walk = walks()
    foreign = walk | {"next_observations": np.roll(walk["observations"], -1, axis=0)}
    with pytest.raises(MdptError) as caught:
        load_arrays(foreign)
    assert all(text in str(caught.value) for text in ("Leave 'next_observations' out", "set 'timeouts' to 0 there"))
    assert values(load_arrays(walk))[4] == pytest.approx(10)  # the first remedy
    assert values(load_arrays(walk | {"next_observations": following(walk)}))[4] == pytest.approx(10)
    one = load_arrays(foreign | {"timeouts": np.zeros(120)})  # the second, for one recording
    assert values(one)[4] == pytest.approx(values_of_the_circle())
    assert load_arrays(foreign | {"terminals": foreign["timeouts"], "timeouts": np.zeros(120)}).warnings == ()
    counted = {key: array for key, array in foreign.items() if key != "timeouts"}
    assert "Leave 'next_observations' out" in load_arrays(counted, max_episode_steps=10).warnings[-1]
    true = foreign["next_observations"].copy()
    true[9] += 0.5
    assert load_arrays(foreign | {"next_observations": true}).warnings == ()  # not in all such rows
    assert load_arrays({key: array[:15] for key, array in foreign.items()}).warnings == ()  # a single one


def values_of_the_circle() -> float:
    """V at place 4 where a walk goes on from place 0: of six rows there, one leaves; worth 1 each, discount 0.9."""
    stay, leave = 0.9 * 5 / 6, 0.9 / 6 * 0.9**4
    return 1 / (1 - stay - leave)


def test_the_parts_of_a_dict_are_chosen_and_ordered(tmp_path: Path) -> None:
    """Item 5: in the data and in the environment."""
    flat = np.stack([np.arange(24) // 2 % 6 + 3.0, np.arange(24) % 2], axis=1)
    arrays = walks(12, 2, rewards=np.ones(24), actions=np.tile([0.5, 1], (24, 1)))
    parts = {"drawn": flat[:, :1], "count": flat[:, 1]}
    settings: dict[str, Any] = {"environment": PARTED}
    by_name = load_arrays(arrays | {"observations": parts}, **settings)
    assert np.array_equal(by_name.column("observations"), flat[::2, ::-1]) and by_name.warnings == ()
    keys = ["drawn", "count"]
    for observations in (parts, flat):  # flat ones are in that order
        chosen = load_arrays(arrays | {"observations": observations}, observation_keys=keys, **settings)
        assert np.array_equal(chosen.column("observations"), flat[::2]) and chosen.warnings == ()
        assert chosen.environment.observation_keys == ("drawn", "count") and chosen.environment.flattened
    (told,) = load_arrays(arrays | {"observations": flat}, **settings).warnings  # the wrong order
    assert "observation columns [1]" in told and "[data] observation_keys" in told

    seen: list[Array] = []

    def act(observations: Array, places: Array) -> Array:
        seen.extend(observations)
        return np.zeros((len(places), 2))

    data.rollout(act, chosen.environment, [0], seed=0)
    assert seen[0][0] >= 3 and [row[1] for row in seen] == [*range(len(seen))]
    count = load_arrays(arrays | {"observations": parts}, observation_keys=["count"], **settings)
    assert count.environment.observation_dim == 1 and count.column("observations").max() == 0
    with pytest.raises(MdptError, match="observation_keys has 'speed': expected each once, of count, drawn"):
        load_arrays(arrays | {"observations": parts}, observation_keys=["speed"])
    with pytest.raises(MdptError, match="neither the data nor the environment have Dict"):
        load_arrays(arrays | {"observations": flat}, observation_keys=["drawn"])


def test_each_action_may_have_a_range_of_its_own() -> None:
    """Item 7: throttle in [0, 100] beside steering in [-1, 1]."""
    throttle = np.linspace(0, 100, 120)
    actions = np.stack([np.sin(throttle), throttle], axis=1)
    own = load_arrays(walks(actions=actions), action_range=[[-1.0, 1.0], [0.0, 100.0]])
    assert own.warnings == () and own.environment.action_low == (-1, 0) and own.environment.action_high == (1, 100)
    one = load_arrays(walks(actions=actions), action_range=(-100.0, 100.0))
    for dataset, steering in ((own, 0.0015), (one, 0.15)):  # what the same error of a policy, in [-1, 1], does there
        missed = data.unscale_actions(dataset.column("actions") * 0.9 + 0.0015, dataset.environment)
        aimed = data.unscale_actions(dataset.column("actions") * 0.9, dataset.environment)
        assert np.allclose((missed - aimed)[:, 0], steering, rtol=1e-2)
    (told,) = one.warnings
    assert "dimensions [0]" in told and "[data] action_range takes a pair" in told
    with pytest.raises(MdptError, match=r"action_range has 3 pairs of bounds for 2 actions"):
        load_arrays(walks(), action_range=[(-1.0, 1.0)] * 3)


def test_data_that_do_not_match_the_environment_are_told(tmp_path: Path) -> None:
    """Item 8: columns in another order, or from another origin; a few episodes tell nothing."""
    begins = np.stack([np.arange(60) // 5 % 6 + 3.0, np.arange(60) % 5], axis=1)
    arrays = walks(12, 5, rewards=np.ones(60), actions=np.tile([0.5, 1], (60, 1))) | {"observations": begins}
    assert load(write(tmp_path / "a.hdf5", arrays)).identity.mismatched == []
    swapped = load(write(tmp_path / "b.hdf5", arrays | {"observations": begins[:, ::-1]}))
    assert swapped.identity.mismatched == [0]  # column 1 begins at 0, within 3 to 8 and as much on both sides
    (told,) = swapped.warnings
    assert f"otherwise than in {TOY} in the observation columns [0] (column 0: 0 to 0 in the data, 3 to 8" in told
    other = load(write(tmp_path / "c.hdf5", arrays | {"observations": begins + [100, 0]}))
    assert other.identity.mismatched == [0]
    few = {key: array[:45] for key, array in (arrays | {"observations": begins[:, ::-1]}).items()}
    assert load(write(tmp_path / "d.hdf5", few)).identity.mismatched == []
    again = data.load_dataset(swapped.section, spec=swapped.environment)  # not made anew, so not reset
    assert again.warnings == ()


def test_what_never_changes_and_what_has_two_values_is_told() -> None:
    """Item 9."""
    still = walks() | {"next_observations": walks()["observations"]}
    (told,) = load_arrays(still).warnings
    assert "'next_observations' are 'observations' in every row" in told
    hot = np.eye(2)[np.arange(120) % 2]
    (told,) = load_arrays(walks(actions=np.stack([hot[:, 0], np.linspace(-1, 1, 120)], axis=1))).warnings
    assert "only two values in dimensions [0]" in told
    assert not any(
        "two values" in each
        for each in load_arrays(walks(24, 5, actions=hot, rewards=np.ones(120)), environment=TOY).warnings
    )


# --- work in other processes ------------------------------------------------------------------------------------


def processes(parent: int) -> set[int]:
    """The processes that `parent` has started and that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, owner, *_ = stat.read_text().rpartition(")")[2].split()
            if int(owner) == parent and state != "Z":
                found.add(int(stat.parent.name))
    return found


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def workers_left() -> set[int]:
    """The workers of this process; loky's resource tracker is none, and ends with this process."""
    found = set()
    for process in processes(os.getpid()):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{process}/cmdline").read_bytes():
                found.add(process)
    return found


def soon(true: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


def play_one(episode: int, watch: Watch) -> tuple[int, Array, Array]:
    """An episode that pays by its number; the first ones take longest, so that later ones end before them."""
    time.sleep(0.05 * (5 - episode))
    action = np.array([[0.0, episode / 5 - 1]])
    returns, lengths = both(data.rollout(lambda *_: action, data.environment_spec(TOY), [episode], seed=1, watch=watch))
    return episode, returns, lengths


def play_broken(first_action: float, watch: Watch) -> tuple[Array, Array]:
    """Episodes 3 to 5; in the third step of episode 4 the toy is given this first action."""

    def act(observations: Array, places: Array) -> Array:
        now = (places == 1) & (observations[:, 1] == 2)
        return np.stack([now * first_action, np.zeros(len(now))], axis=1)

    spec = data.environment_spec(TOY)  # what takes long the first time takes it here, unwatched
    return both(data.rollout(act, spec, [3, 4, 5], seed=1, watch=watch))


def rest(seconds: float, watch: Watch) -> float:
    time.sleep(seconds)
    return seconds


def fails(work: Callable[..., Any], tasks: Sequence[Any], workers: int, timeout: float = 60) -> str:
    """What is said, in one line; no worker is left."""
    with pytest.raises(MdptError) as caught:
        list(data.parallel(work, tasks, Workers(workers, timeout), len(tasks)))
    assert workers == 1 or soon(lambda: not workers_left())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_results_come_in_the_order_of_the_tasks_whoever_plays() -> None:
    one, *others = (list(data.parallel(play_one, range(6), Workers(count), 6)) for count in (1, 2, 3))
    assert [episode for episode, *_ in one] == list(range(6))
    assert len({float(returns[0]) for _, returns, _ in one}) == 6
    for other in others:
        assert all(map(np.array_equal, sum(one, ()), sum(other, ())))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("first_action", "told"),
    [
        (1.0, "ValueError: broken by an action"),
        (0.75, "KeyboardInterrupt"),  # nobody pressed a key
        (0.65, "SystemExit: 3"),
    ],
)
def test_an_environment_that_fails_is_named(first_action: float, told: str, workers: int) -> None:
    line = fails(play_broken, [0.0, first_action, 0.0], workers)
    assert all(each in line for each in (TOY, "episode 4, step 3", "the environment failed", told)), line


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_environment_that_hangs_is_named_in_time(workers: int) -> None:
    start = time.monotonic()
    line = fails(play_broken, [0.85, 0.0], workers, timeout=0.5)
    assert time.monotonic() - start < 60  # it would sleep for an hour
    assert all(each in line for each in (TOY, "episode 4, step 3", "longer than 0.5 s", "--timeout")), line


@pytest.mark.slow
def test_a_thread_may_load_and_the_current_folder_hides_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers of signals belong to the main thread; a user's copy.py is in the way of workers that see it."""
    for name in ("copy", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    from joblib.externals import loky

    loky.get_reusable_executor().shutdown(wait=True)  # the next workers are new
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(data.parallel(rest, [0, 0], Workers(2), 2)))
    thread.start()
    thread.join()
    assert len(results) == 2 and not os.environ["PYTHONSAFEPATH"]


@pytest.mark.parametrize(("workers", "told"), [(1, "allows no more threads"), (2, "cannot be started")])
def test_a_system_that_allows_no_threads_says_so(monkeypatch: pytest.MonkeyPatch, workers: int, told: str) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    import joblib

    if workers > 1:
        monkeypatch.setattr(joblib.Parallel, "__call__", lambda *_: start(threading.current_thread()))
    with pytest.raises(MdptError, match=told):
        list(data.parallel(rest, [0, 0], Workers(workers), 2))


@pytest.mark.slow
def test_an_environment_that_ends_its_process_is_told() -> None:
    line = fails(play_broken, [0.0, -1.0, 0.0], 2)
    assert all(each in line for each in ("worker process ended unexpectedly", "environment", "--workers 1")), line


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_only_the_environments_own_time_is_watched(workers: int) -> None:
    assert list(data.parallel(rest, [0.3, 0.0], Workers(workers, 0.1), 2)) == [0.3, 0.0]


@pytest.mark.slow
def test_whoever_stops_listening_leaves_no_worker() -> None:
    found = data.parallel(rest, [0.0, 600.0, 600.0], Workers(2), 3)
    with pytest.raises(KeyboardInterrupt), contextlib.closing(found):
        assert next(found) == 0
        raise KeyboardInterrupt
    assert soon(lambda: not workers_left())


def test_only_the_work_is_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    def work(task: str, watch: Watch) -> str:
        os.write(1, b"silent")
        return task

    for task in data.parallel(work, "ab", Workers(), 2):
        os.write(1, task.encode())
    assert capfd.readouterr().out == "ab"


def test_an_environment_may_fail_in_its_pictures_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit(self: Any) -> Any:
        raise SystemExit(3)

    spec = data.environment_spec("conftest:Gentle-v0")
    monkeypatch.setattr(conftest.Gentle, "close", exit)
    with pytest.raises(MdptError, match=r"conftest:Gentle-v0.*episode 7.*SystemExit: 3"):
        data.rollout(pay_by_place, spec, [7], seed=0)
    monkeypatch.setattr(conftest.Gentle, "render", exit)
    with pytest.raises(MdptError, match=r"conftest:Gentle-v0.*episode 7.*SystemExit: 3"):
        data.rollout(pay_by_place, spec, [7], seed=0, look=lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "seconds"), [(signal.SIGKILL, 0), (signal.SIGKILL, 600), (signal.SIGTERM, 600), (signal.SIGINT, 600)]
)
def test_no_process_outlives_its_parent(how: signal.Signals, seconds: int, tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from mdpt import data

def rest(task, watch):
    pathlib.Path(str(task)).touch()
    time.sleep({seconds})

list(data.parallel(rest, range(2), data.Workers(2), 2))
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert soon(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        children = processes(parent.pid)
        assert len(children) >= 2
        if how == signal.SIGINT:  # as Ctrl-C does
            os.killpg(parent.pid, how)
        else:
            parent.send_signal(how)
        assert parent.wait(10) == -how
        assert soon(lambda: all(map(has_ended, children)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


# --- collecting


SETTINGS = DataSection(environment=HOPPER, transitions=1200, levels=[0.1, 0.8], action_noise=0.1, seed=4)


def changed_settings(**changed: Any) -> DataSection:
    return DataSection(**(SETTINGS.model_dump() | changed))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 250)
        return data.collect_dataset(SETTINGS, folder=tmp_path_factory.mktemp("one"))


@pytest.mark.slow
def test_collecting_does_not_depend_on_the_workers(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD", 250)
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    calls: list[tuple[str, int, int]] = []
    path = data.collect_dataset(SETTINGS, Workers(2), lambda what, done, total: calls.append((what, done, total)))
    assert path == tmp_path / collected.name
    assert path.read_bytes() == collected.read_bytes()
    assert calls == [("collect", done, 1200) for done in (0, 250, 500, 600, 850, 1100, 1200)]
    assert [file.name for file in tmp_path.iterdir()] == [collected.name]  # nothing temporary is left


def test_collecting_goes_on_where_it_was_cut_short(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 600:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "SHARD", 250)
    with pytest.raises(KeyboardInterrupt):
        data.collect_dataset(SETTINGS, Workers(), interrupt, tmp_path)
    (tmp_path / f".{collected.stem}.1.part").write_bytes(b"damaged")
    begun: list[tuple[int, ...]] = []
    collect = data.collect_shard
    monkeypatch.setattr(
        data, "collect_shard", lambda shard, watch: (begun.append(shard.seed), collect(shard, watch))[1]
    )
    path = data.collect_dataset(SETTINGS, folder=tmp_path)
    assert begun == [(4, 0, 1), (4, 0, 2), (4, 1, 0), (4, 1, 1), (4, 1, 2)]
    assert path.read_bytes() == collected.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [collected.name]


def test_two_runs_that_need_the_same_dataset_collect_it_once(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, ...]] = []
    collect = data.collect_shard
    monkeypatch.setattr(data, "SHARD", 250)
    monkeypatch.setattr(
        data, "collect_shard", lambda shard, watch: (begun.append(shard.seed), collect(shard, watch))[1]
    )
    told, waits = set[str](), threading.Event()

    def second_waits(what: str, done: int, total: int) -> None:
        told.add(what)
        waits.set()

    def first_collects(what: str, done: int, total: int) -> None:
        if not second.ident:
            second.start()
            assert waits.wait(60)

    found: list[Path] = []
    second = threading.Thread(
        target=lambda: found.append(data.collect_dataset(SETTINGS, Workers(), second_waits, tmp_path))
    )
    path = data.collect_dataset(SETTINGS, Workers(), first_collects, tmp_path)
    second.join(60)
    assert found == [path] and path.read_bytes() == collected.read_bytes()
    assert told == {f"wait for process {os.getpid()}"} and len(begun) == 6
    assert [file.name for file in tmp_path.iterdir()] == [collected.name]


@pytest.mark.parametrize(("holder", "free"), [(os.getppid(), False), (2**22 + 1, True), ("", True)])
def test_without_locks_the_number_in_a_file_tells_whether_it_is_held(
    holder: object, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_here(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def refuse(number: str) -> None:
        raise MdptError(number)

    monkeypatch.setattr("fcntl.flock", none_here)
    lock = tmp_path / ".x.pt.lock"
    lock.write_text(str(holder))
    refused = contextlib.nullcontext() if free else pytest.raises(MdptError, match=f"^{holder}$")
    with refused, data.locked(tmp_path / "x.pt", refuse):
        assert lock.read_text() == str(os.getpid())
    assert lock.exists() is not free


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
    loaded = load(collected, environment=HOPPER, held_out=0.1, seed=4)
    assert loaded.warnings == () and len(loaded.episode_returns) == ends.sum()
    assert np.abs(loaded.column("actions")).max() == 1
    monkeypatch.setenv("MDPT_CACHE", str(collected.parent))
    ours = data.load_dataset(changed_settings(environment=None, held_out=0.1, reward_scale="none"))
    assert ours.environment == loaded.environment and ours.section.reference == "bullet-hopper"  # by default
    assert len(ours.episode_returns) == falls < ends.sum()  # an end of a shard is no episode's end
    assert ours.identity.name == collected.name and ours.identity.source == "collect"
    assert np.array_equal(ours.rows, loaded.rows)
    assert ends[:600].sum() < ends[600:].sum()  # the better agent's episodes last longer


def collect(sigma: float, noise: float, size: int, *seed: int) -> dict[str, Array]:
    spec, agent = data.environment_spec(HOPPER), data._bundled_agent(HOPPER)
    return data.collect_shard(Shard(spec, agent, sigma, noise, size, seed), Watch(60))


def away_from_the_agent(rows: dict[str, Any]) -> Array:
    """How far each action (n, A) is from that of the bundled agent."""
    actions = data._agent_action(data._bundled_agent(HOPPER), rows["observations"][()])
    return np.abs(rows["actions"][()] - np.clip(actions, -1, 1))


def test_weights_are_perturbed_once_per_episode() -> None:
    assert away_from_the_agent(collect(0.0, 0.0, 100, 0, 0, 0)).max() < 1e-5

    rows = collect(0.5, 0.0, 200, 0, 1, 0)
    differences = away_from_the_agent(rows)
    starts, stops = data.episode_bounds(rows["terminals"], rows["timeouts"])
    assert len(starts) > 1
    assert all(differences[start:stop].max() > 0.1 for start, stop in zip(starts, stops, strict=True))
    # Without action noise an episode's actions are one deterministic function, so a second shard with the same
    # seed repeats it, and another seed gives other weights and starts.
    assert all(np.array_equal(rows[key], again) for key, again in collect(0.5, 0.0, 200, 0, 1, 0).items())
    assert not np.array_equal(rows["observations"][0], collect(0.5, 0.0, 1, 0, 1, 1)["observations"][0])


def test_actions_are_drawn_as_ever() -> None:
    """What fails here wants another data.GENERATOR: caches and reports would have two kinds of data under one name."""
    random = np.random.default_rng(np.random.SeedSequence([5, 1, 2]))
    agent, rows = data._bundled_agent(HOPPER), collect(0.2, 0.3, 12, 5, 1, 2)
    weights = [w * (1 + np.float32(0.2) * random.standard_normal(w.shape, np.float32)) for w in agent]
    noise = (0.3 * random.standard_normal((1000, 3), np.float32).astype(np.float64)).astype(np.float32)
    stop = data.episode_bounds(rows["terminals"], rows["timeouts"])[1][0]
    expected = [data._agent_action(weights, rows["observations"][i]) + noise[i] for i in range(stop)]
    assert stop > 5 and np.array_equal(rows["actions"][:stop], np.clip(expected, -1, 1))


def test_cache_is_reused_by_settings(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def roll_out(*_: Any) -> Any:
        raise AssertionError("rolled out")

    monkeypatch.setattr(data, "parallel", roll_out)
    folder = collected.parent
    assert data.collect_dataset(SETTINGS, folder=folder) == collected
    assert collected.name == "HopperBulletEnv-v0-9d45c44134aa7601.hdf5"  # what was cached long ago is still found
    assert data.collect_dataset(changed_settings(held_out=0.5, reward_scale=2.0), folder=folder) == collected
    others = ({"transitions": 1202}, {"levels": [0.1, 0.7]}, {"action_noise": 0.2}, {"seed": 5})
    for changed in (*others, {"max_episode_steps": 50}):
        with pytest.raises(AssertionError, match="rolled out"):
            data.collect_dataset(changed_settings(**changed), folder=folder)


def test_a_damaged_cached_file_is_named(collected: Path, tmp_path: Path) -> None:
    damaged = tmp_path / collected.name
    damaged.write_bytes(collected.read_bytes()[:-3000])
    with pytest.raises(MdptError) as caught:
        data.collect_dataset(SETTINGS, folder=tmp_path)
    message = "this cached dataset is damaged; delete the file, and it will be collected again. "
    assert str(caught.value).startswith(f"{damaged}: {message}")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MDPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data._cache_folder() == tmp_path / "mdpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data._cache_folder() == Path.home() / ".cache" / "mdpt"


def test_collecting_needs_an_agent(tmp_path: Path) -> None:
    with pytest.raises(
        MdptError, match=r"^ReacherBulletEnv-v0: no agent is bundled .* It has: Ant.*HopperBulletEnv-v0"
    ):
        data.collect_dataset(changed_settings(environment="ReacherBulletEnv-v0"), folder=tmp_path)


def test_a_cache_that_cannot_be_written_says_so_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MdptError, match=r"file/cache: cannot be written .*MDPT_CACHE"):
        data.collect_dataset(SETTINGS, folder=tmp_path / "file" / "cache")


# --- rollouts


def test_successes_are_those_the_environment_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any step, under either name; an environment that never says is not taken for one that fails."""
    assert np.isnan(data.rollout(pay_by_place, data.environment_spec(TOY), range(3), seed=1).successes).all()
    infos: list[dict[str, Any]] = [{"is_success": np.array([True])}, {"success": False}, {"success": 0.0}, {}]
    alter(monkeypatch, lambda toy, found: (*found[:4], infos[int(toy.state[1]) - 1] if toy.state[1] < 4 else {}))
    assert data.rollout(pay_by_place, data.environment_spec(TOY), range(3), seed=1).successes.tolist() == [1, 1, 1]
    infos[0] = {}
    assert data.rollout(pay_by_place, data.environment_spec(TOY), range(3), seed=1).successes.tolist() == [0, 0, 0]


def pay_by_place(observations: Array, places: Array) -> Array:
    """The toy pays place p with (p + 1) / 2 each step."""
    return np.stack([np.zeros(len(places)), (places + 1) / 4 - 1], axis=1)


def both(played: data.Played) -> tuple[Array, Array]:
    return played.returns, played.lengths


def toy_rollout(act: data.Act = pay_by_place, **changed: Any) -> tuple[Array, Array]:
    arguments: dict[str, Any] = {"episodes": range(5), "seed": 1}
    return both(data.rollout(act, data.environment_spec(TOY), **(arguments | changed)))


def test_every_reward_counts_once_and_ended_episodes_contribute_nothing() -> None:
    seen: list[tuple[Array, Array]] = []

    def act(observations: Array, places: Array) -> Array:
        seen.append((observations.copy(), places.copy()))
        return pay_by_place(observations, places)

    returns, lengths = toy_rollout(act)
    drawn = seen[0][0][:, 0]  # (E,) the steps until the terminal
    assert len(set(drawn)) > 1 and (drawn <= 6).any() and (drawn > 6).any()  # terminals and time limits
    assert np.array_equal(lengths, np.minimum(drawn, 6)) and lengths.dtype == np.int64
    payment = (np.arange(5) + 1) / 2
    assert np.allclose(returns, payment * lengths + 100 * (drawn <= 6)) and returns.dtype == np.float64
    assert len(seen) == lengths.max()
    for step, (observations, places) in enumerate(seen):
        assert np.array_equal(places, np.flatnonzero(lengths > step))  # those that still run, and no other
        assert observations.shape == (len(places), 2) and observations.dtype == np.float32
        assert np.array_equal(observations[:, 0], drawn[places]) and (observations[:, 1] == step).all()


def test_rollouts_depend_on_seed_and_number_alone() -> None:
    def act(observations: Array, places: Array) -> Array:
        return np.stack([np.zeros(len(places)), np.sin(observations.sum(axis=1))], axis=1)

    returns, lengths = toy_rollout(act)
    assert all(map(np.array_equal, (returns, lengths), toy_rollout(act)))
    assert not np.array_equal(lengths, toy_rollout(act, seed=2)[1])
    for episodes in ([3, 4], [4], [2, 0]):  # episode e keeps its start, whoever plays beside it
        played = toy_rollout(act, episodes=episodes)
        assert np.array_equal(played[0], returns[episodes]) and np.array_equal(played[1], lengths[episodes])


def test_actions_out_of_range_are_clipped() -> None:
    def far(observations: Array, places: Array) -> Array:
        return np.tile([0.0, 7.0], (len(places), 1))

    returns, lengths = toy_rollout(far, episodes=[0])
    assert returns[0] % 100 == 4 * lengths[0]


def hop(episodes: Sequence[int], watch: Watch) -> tuple[Array, Array]:
    spec = data.environment_spec(HOPPER)
    act = lambda observations, _: np.sin(7 * observations[:, :3])
    return both(data.rollout(act, spec, episodes, seed=0, watch=watch))


@pytest.mark.slow
def test_pybullet_rollouts_do_not_depend_on_who_plays_beside_them() -> None:
    ((returns, lengths),) = data.parallel(hop, [range(4)], Workers(), 1)
    assert len(set(returns)) == 4
    for count, tasks in ((2, [[0, 1], [2, 3]]), (1, [[0], [1, 2], [3]])):
        found = data.parallel(hop, tasks, Workers(count), len(tasks))
        for whole, parts in zip((returns, lengths), zip(*found, strict=True), strict=True):
            assert np.array_equal(whole, np.concatenate(parts))


def test_the_bundled_agent_hops() -> None:
    agent = data._bundled_agent(HOPPER)
    assert agent[5].tolist() == np.array([0.4868, -0.0987, -0.0946], dtype=np.float32).tolist()

    def act(observations: Array, places: Array) -> Array:
        return data._agent_action(agent, observations)

    returns, lengths = both(data.rollout(act, data.environment_spec(HOPPER), [0], seed=0))
    assert returns[0] > 2000 and lengths[0] > 800


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (lambda count: np.full((count, 2), np.nan), ("policy", "not finite", "diverged")),
        (lambda count: np.full((count, 2), np.inf), ("policy", "not finite", "diverged")),
        (lambda count: np.zeros((3, 2)), ("shape (3, 2)", "expected (5, 2)")),
        (lambda count: np.zeros(count), ("shape (5,)", "expected (5, 2)")),
    ],
)
def test_actions_that_cannot_be_are_told(action: Callable[[int], Array], told: Sequence[str]) -> None:
    with pytest.raises(MdptError) as caught:
        toy_rollout(lambda observations, places: action(len(places)))
    assert all(each in str(caught.value) for each in told)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda found: (found[0], np.nan, *found[2:]), "its reward is nan"),
        (lambda found: (found[0], np.array([2.0]), *found[2:]), "its reward is array([2.])"),
        (lambda found: (found[0][None], *found[1:]), "its observation has shape (1, 2)"),
        (lambda found: (found[0] * np.nan, *found[1:]), "its observation is not finite: [nan, nan]"),
    ],
)
def test_what_an_environment_may_not_give_is_told_with_episode_and_step(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any], told: str
) -> None:
    spec = data.environment_spec(TOY)
    alter(monkeypatch, lambda toy, found: wrong(found) if toy.state[1] == 3 else found)
    with pytest.raises(MdptError) as caught:
        data.rollout(pay_by_place, spec, [4], seed=1)
    assert all(each in str(caught.value) for each in (TOY, told, "episode 4, step 3")), caught.value


def test_data_alone_cannot_be_played() -> None:
    with pytest.raises(MdptError, match=r"there is no environment to play in; name one in \[data\]"):
        data.rollout(pay_by_place, replace(SPEC, id=None), [0], seed=0)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_first_episode_can_be_looked_at(every: int) -> None:
    seen: list[tuple[int, float, Array]] = []
    spec = data.environment_spec("conftest:Gentle-v0")
    returns, lengths = both(
        data.rollout(pay_by_place, spec, range(3), seed=1, look=lambda *now: seen.append(now), every=every)
    )
    steps = sorted({*range(0, lengths[0], every), lengths[0]})
    assert [step for step, *_ in seen] == steps
    assert [total for _, total, _ in seen] == [step / 2 for step in steps[:-1]] + [returns[0]]
    assert [(frame.shape, frame.dtype, frame.max()) for *_, frame in seen] == [
        ((48, 320, 3), np.uint8, step) for step in steps
    ]
    alone = both(data.rollout(pay_by_place, spec, range(3), seed=1))
    assert np.array_equal(alone[0], returns) and np.array_equal(alone[1], lengths)  # looking changes nothing


@pytest.mark.filterwarnings("ignore:.*render_mode")  # gymnasium says so, too
def test_an_environment_that_cannot_be_filmed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def film(environment_id: str) -> str:
        spec = data.environment_spec(environment_id)
        with pytest.raises(MdptError) as caught:
            data.rollout(pay_by_place, spec, [0], seed=0, look=lambda *_: None)
        assert environment_id in str(caught.value)
        return str(caught.value)

    def broken(self: Any) -> Any:
        raise OSError("no display")

    assert "render_mode" in film(TOY)
    monkeypatch.setattr(conftest.Gentle, "render", lambda self: "text")
    assert "rgb_array" in film("conftest:Gentle-v0")
    monkeypatch.setattr(conftest.Gentle, "render", broken)
    assert film("conftest:Gentle-v0").endswith("OSError: no display")
    monkeypatch.setattr(conftest.Gentle, "mujoco_renderer", None, raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert film("conftest:Gentle-v0").endswith("Without a display, set the environment variable MUJOCO_GL=egl")


def holds_the_lock(task: int, watch: data.Watch) -> int:
    with watch.over("in C"):
        ctypes.PyDLL(None).sleep(3600)
    return task


@pytest.mark.slow
def test_a_worker_that_hangs_in_c_code_is_ended() -> None:
    with pytest.raises(MdptError, match=r"worker process ended.* hung.*--workers 1"):
        list(data.parallel(holds_the_lock, [0, 1], Workers(2, timeout=2.0), 2))


FIELDS = ["extends", "nobody.knows", *(name for name, part in Experiment() if not isinstance(part, data.Section))] + [
    f"{name}.{key}" for name, part in Experiment() if isinstance(part, data.Section) for key in type(part).model_fields
]
WORDS = [
    "1", "-1", "0", "0.5", "1e400", "nan", "inf", "9" * 30, "''", "'x'", "'\\u0007'", "[]", "{}", "[1, 'a']", "{a = 1}", "true",
    "1979-05-27", "[[[]]]", "[0, 1]", "none", "'idql'", "'minari'", "'collect'", "", "= 1", "1\n[policy]\nsteps = 2",
]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(WORDS) | st.text(max_size=12)), max_size=4),
    written=st.booleans(),
)
def test_any_experiment_is_read_or_refused(pairs: list[tuple[str, str]], written: bool, tmp_path_factory: Any) -> None:
    """By a file or by --set: an experiment, or a `MdptError` of one line for each mistake."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    lines = [f"{key} = {text}" for key, text in pairs]
    path.write_text("\n".join(lines) if written else "", encoding="utf-8")
    try:
        run = data.load_experiment(path, [] if written else [f"{key}={text}" for key, text in pairs])
        assert isinstance(run, Experiment)
    except MdptError as error:
        assert str(error)
