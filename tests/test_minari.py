"""Tests of Minari's local store in data.py, on datasets that are written here in its layout; gymnasium is the judge."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import FlattenObservation, TransformObservation
from test_cli import run

from mdpt import models
from mdpt.data import KEYS, SOURCES, Array, DataSection, Known, MdptError, load_dataset, read_minari

ID = "mdpt/test/play-v0"
BOX = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-9, -9], "high": [9, 9]}
ACTIONS = BOX | {"shape": [1], "low": [-2], "high": [2]}


def minari_facts(dataset: str) -> Known:
    return SOURCES["minari"].know(DataSection(source="minari", dataset=dataset))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return tmp_path / "store"


def serialize(space: Any) -> dict[str, Any]:
    """A space as Minari writes it to its metadata."""
    if isinstance(space, Dict):
        return {"type": "Dict", "subspaces": {key: serialize(part) for key, part in space.spaces.items()}}
    low, high = space.low.tolist(), space.high.tolist()
    return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), "low": low, "high": high}


def env_spec(environment: str = "Pendulum-v1", **changed: Any) -> str:
    """The text of gymnasium's EnvSpec.to_json."""
    sound = {"id": environment, "entry_point": "nowhere:Nothing", "max_episode_steps": 50, "kwargs": {"g": 9.0}}
    return json.dumps(sound | {"additional_wrappers": [], "vector_entry_point": None} | changed)


def episode(number: int = 0, steps: int = 3, **changed: Any) -> dict[str, Any]:
    """An episode for BOX and ACTIONS that no flag ends; its numbers tell its own and the step's; None drops a key."""
    numbers = 100.0 * number + np.arange(steps + 1, dtype=np.float32)
    flags = np.zeros(steps, dtype=np.bool_)
    sound = {"observations": np.stack([numbers, -numbers], axis=1), "actions": numbers[:-1, None] / 1000}
    sound |= {"rewards": numbers[1:].astype(np.float64), "terminations": flags, "truncations": flags}
    return {key: array for key, array in (sound | changed).items() if array is not None}


def put(group: Any, arrays: dict[str, Any]) -> None:
    for key, array in arrays.items():
        if isinstance(array, dict):
            put(group.create_group(key), array)
        else:
            group[key] = array


def write(
    store: Path, episodes: list[dict[str, Any]], observations: Any = BOX, actions: Any = ACTIONS, **more: Any
) -> Path:
    """A dataset in Minari's layout, at ID; None drops a key of its metadata. Its folder."""
    folder = store / ID / "data"
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w", track_order=True) as file:
        put(file, {f"episode_{number}": arrays for number, arrays in enumerate(episodes)})
    sound = {
        "dataset_id": ID,
        "minari_version": "0.5.4",
        "data_format": "hdf5",
        "total_episodes": len(episodes),
        "total_steps": sum(len(arrays.get("rewards", ())) for arrays in episodes),
        "observation_space": json.dumps(observations),
        "action_space": json.dumps(actions),
        "env_spec": env_spec(),
    }
    metadata = {key: value for key, value in (sound | more).items() if value is not None}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def play(environment: Any, episodes: int) -> list[list[tuple[Any, Any, float, bool, bool]]]:
    """Random play: (observation, action, reward, terminated, truncated), and a last observation with no more."""
    environment.action_space.seed(0)
    played = []
    for seed in range(episodes):
        observation, _ = environment.reset(seed=seed)
        steps: list[Any] = []
        while not steps or not (steps[-1][3] or steps[-1][4]):
            action = environment.action_space.sample()
            found, reward, terminated, truncated, _ = environment.step(action)
            steps.append((observation, action, float(reward), terminated, truncated))
            observation = found
        played.append([*steps, (observation, None, 0.0, False, False)])
    return played


def stack(values: list[Any]) -> Any:
    """(T, ...) of arrays, or a dict of such of dicts."""
    if isinstance(values[0], dict):
        return {key: stack([value[key] for value in values]) for key in reversed(values[0])}
    return np.stack(values)


def stored(played: list[Any]) -> dict[str, Any]:
    observations, actions, rewards, terminations, truncations = zip(*played, strict=True)
    found = {"observations": stack([*observations]), "actions": stack([*actions[:-1]]), "rewards": rewards[:-1]}
    return found | {"terminations": terminations[:-1], "truncations": truncations[:-1]}


def package(**functions: Any) -> ModuleType:
    """A stand-in for the minari package."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("minari", None))
    vars(module).update(functions)
    return module


def nest(space: Dict) -> Any:
    """Pendulum, its state shown in parts."""

    def show(state: Array) -> Any:
        inner = {"y": np.outer(state[:2], state[1:]).astype(np.float64), "b": np.array(state[2], dtype=np.float32)}
        return {"z": state[:1], "a": inner, "m": state}

    return TransformObservation(gymnasium.make("Pendulum-v1", max_episode_steps=4), show, space)


PARTS: dict[str, Any] = {
    "z": Box(-1, 1, (1,)),
    "m": Box(-9, 9, (3,)),
    "a": Dict({"y": Box(-9, 9, (2, 2), np.float64), "b": Box(-9, 9, ())}),
}


# --- columns ----------------------------------------------------------------------------------------------------


def test_columns_of_a_box(store: Path) -> None:
    environment = gymnasium.make("Pendulum-v1", max_episode_steps=4)
    played = play(environment, 3)
    spaces = serialize(environment.observation_space), serialize(environment.action_space)
    write(store, [stored(steps) for steps in played], *spaces)
    steps = [step for one in played for step in one[:-1]]
    columns = read_minari(ID)
    assert {*columns} == {*KEYS} - {"masks"}
    np.testing.assert_array_equal(columns["observations"], [step[0] for step in steps])
    np.testing.assert_array_equal(columns["actions"], [step[1] for step in steps])
    np.testing.assert_array_equal(columns["rewards"], [step[2] for step in steps])
    np.testing.assert_array_equal(columns["next_observations"], [step[0] for one in played for step in one[1:]])
    np.testing.assert_array_equal(columns["timeouts"], [False, False, False, True] * 3)
    assert columns["observations"].dtype == np.float32 and columns["terminals"].dtype == np.bool_
    assert not columns["terminals"].any()


@pytest.mark.parametrize("space", [Dict(PARTS), Dict(**PARTS)], ids=["sorted", "as-named"])
def test_dict_observations_are_flattened_as_gymnasium_does(store: Path, space: Dict) -> None:
    environment = nest(space)
    write(store, [stored(steps) for steps in play(environment, 2)], serialize(space), ACTIONS)
    flat = play(FlattenObservation(environment), 2)
    columns = read_minari(ID)
    assert columns["observations"].shape == (8, 9)
    np.testing.assert_array_equal(columns["observations"], [step[0] for one in flat for step in one[:-1]])
    np.testing.assert_array_equal(columns["next_observations"], [step[0] for one in flat for step in one[1:]])


def test_episodes_are_in_the_order_of_their_numbers(store: Path) -> None:
    folder = write(store, [episode(number, steps=1 + number % 3) for number in range(23)])
    with h5py.File(folder / "main_data.hdf5") as file:
        assert sorted(file)[2] == "episode_10"  # the order that is wrong
    rewards = read_minari(ID)["rewards"]
    np.testing.assert_array_equal(
        rewards, [100 * number + step for number in range(23) for step in range(1, 2 + number % 3)]
    )


@pytest.mark.parametrize(
    ("terminations", "truncations", "terminals", "timeouts"),
    [
        ([0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]),
        ([0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]),
    ],
)
def test_ends(
    store: Path, terminations: list[int], truncations: list[int], terminals: list[int], timeouts: list[int]
) -> None:
    flags: dict[str, Any] = {
        "terminations": np.array(terminations, dtype=bool),
        "truncations": np.array(truncations, dtype=bool),
    }
    write(store, [episode(0, **flags), episode(1)])
    columns = read_minari(ID)
    np.testing.assert_array_equal(columns["terminals"], [*terminals, 0, 0, 0])
    np.testing.assert_array_equal(columns["timeouts"], [*timeouts, 0, 0, 1])


def test_minaris_own_reader_agrees(store: Path) -> None:
    minari = pytest.importorskip("minari")
    space = Dict(PARTS)
    write(store, [stored(steps) for steps in play(nest(space), 11)], serialize(space), ACTIONS)
    dataset, columns, first = minari.load_dataset(ID), read_minari(ID), 0
    for own in dataset.iterate_episodes():
        rows = slice(first, first := first + len(own.rewards))
        flat = [own.observations["a"]["b"][:, None], own.observations["a"]["y"].reshape(-1, 4)]
        flat += [own.observations["m"], own.observations["z"]]
        np.testing.assert_array_equal(columns["observations"][rows], np.concatenate(flat, axis=1)[:-1])
        np.testing.assert_array_equal(columns["next_observations"][rows], np.concatenate(flat, axis=1)[1:])
        np.testing.assert_array_equal(columns["actions"][rows], own.actions)
        np.testing.assert_array_equal(columns["rewards"][rows], own.rewards)
        np.testing.assert_array_equal(columns["timeouts"][rows], own.truncations)
    assert first == len(columns["rewards"]) == dataset.total_steps == 44


@pytest.mark.parametrize("part", [{}, {"observations": {"z": np.zeros((4, 1)), "a": np.ones((4, 2))}}])
def test_arrow_is_read_by_the_package(store: Path, monkeypatch: pytest.MonkeyPatch, part: Any) -> None:
    space = {"type": "Dict", "subspaces": {"a": BOX, "z": BOX | {"shape": [1]}}} if part else BOX
    write(store, [], space, data_format="arrow")
    episodes = [SimpleNamespace(id=number, infos={}, **episode(number, **part)) for number in range(2)]
    loaded = SimpleNamespace(iterate_episodes=lambda: iter(episodes))
    monkeypatch.setitem(sys.modules, "minari", package(load_dataset={ID: loaded}.__getitem__))
    columns = read_minari(ID)
    np.testing.assert_array_equal(columns["rewards"], [1, 2, 3, 101, 102, 103])
    np.testing.assert_array_equal(columns["observations"][0], [1, 1, 0] if part else [0, 0])


def test_arrow_without_the_package(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, [], data_format="arrow")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MdptError, match=r"'arrow'.* pip install 'minari\[arrow\]'"):
        read_minari(ID)


def test_arrow_without_spaces_does_not_reach_the_package(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minari would make the environment, from the file's own entry point, to know them."""
    write(store, [], data_format="arrow", observation_space=None)
    monkeypatch.setitem(sys.modules, "minari", package(load_dataset=pytest.fail))
    with pytest.raises(MdptError, match="observation_space"):
        read_minari(ID)


@pytest.mark.parametrize("part", [{}, {"observations": {"z": np.zeros((4, 1)), "a": np.ones((4, 2))}}])
def test_spaces_that_the_metadata_lack_follow_from_the_arrays(store: Path, part: Any) -> None:
    """As before Minari 0.5, which infers them from the environment; a Dict is in alphabetical order there, too."""
    write(store, [episode(number, **part) for number in range(2)], observation_space=None, action_space=None)
    columns = read_minari(ID)
    np.testing.assert_array_equal(columns["observations"][1], [1, 1, 0] if part else [1, -1])
    assert columns["actions"].shape == (6, 1) and minari_facts(ID).recorded == (None, None)
    assert "action_range" not in minari_facts(ID).fields


def test_whole_actions_without_a_space_are_refused(store: Path) -> None:
    write(store, [episode(actions=np.arange(3))], action_space=None)
    with pytest.raises(MdptError, match="episode_0 'actions' are int64; only floats can be learned"):
        read_minari(ID)


def test_the_older_layout_is_named(store: Path) -> None:
    folder = write(store, [episode()])
    (folder / "metadata.json").unlink()
    with pytest.raises(
        MdptError, match=r"main_data.hdf5: is there, but no metadata.json: .* before 0.5.*minari download"
    ):
        minari_facts(ID)


def test_the_parts_of_a_dict_are_chosen_and_ordered(store: Path) -> None:
    space = {"type": "Dict", "subspaces": {"a": BOX, "z": BOX | {"shape": [1], "low": [-1], "high": [1]}}}
    write(store, [episode(observations={"z": np.zeros((4, 1)), "a": np.ones((4, 2))})], space)
    assert read_minari(ID, ["z", "a"])["observations"][0].tolist() == [0, 1, 1]
    section = DataSection(dataset=ID, observation_keys=["z"])
    assert SOURCES["minari"].know(section).recorded[0] == ([-1], [1])
    with pytest.raises(MdptError, match="observation_keys has 'y': expected each once, of a, z, the parts of"):
        read_minari(ID, ["y"])


TUPLE = {"type": "Tuple", "subspaces": [BOX]}
COUNT = {"type": "Discrete", "n": 3, "start": 0}
DICT = {"type": "Dict", "subspaces": {"a": BOX}}


@pytest.mark.parametrize(
    ("changed", "spaces", "message"),
    [
        ({"rewards": np.zeros(2)}, {}, "episode_1 'observations' has shape .4, 2., expected .3, 2."),
        ({"actions": np.zeros((4, 1))}, {}, "episode_1 'actions' has shape .4, 1., expected .3, 1."),
        ({"truncations": np.zeros(4)}, {}, "episode_1 'truncations' has shape .4,., expected .3,."),
        ({"observations": {"a": np.zeros((4, 2))}}, {}, "episode_1 'observations' is not numbers"),
        ({"terminations": None}, {}, "episode_1 'terminations' is missing"),
        ({"observations": {"b": np.zeros((4, 2))}}, {"observations": DICT}, "episode_1 'observations' 'a' is missing"),
        (
            {"observations": {"a": np.zeros((3, 2))}},
            {"observations": DICT},
            "episode_1 'observations' 'a' has shape .3, 2., expected .4, 2.",
        ),
        ({}, {"observations": TUPLE}, "episode_0 'observations' is Tuple"),
        ({}, {"observations": {"type": "Dict", "subspaces": {}}}, "incomplete or damaged"),
        ({}, {"observations": COUNT}, "episode_0 'observations' is Discrete"),
        ({}, {"actions": COUNT}, "its actions are 'Discrete'"),
    ],
)
def test_unsound_episodes(store: Path, changed: dict[str, Any], spaces: dict[str, Any], message: str) -> None:
    first: dict[str, Any] = {"observations": {"a": np.zeros((4, 2))}} if spaces.get("observations") == DICT else {}
    write(store, [episode(0, **first), episode(1, **changed)], **spaces)
    with pytest.raises(MdptError, match=message) as caught:
        read_minari(ID)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("free", [20.0, 100.0])  # too little for an episode; for all of them side by side
def test_more_than_memory_holds(store: Path, free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, [episode(number) for number in range(5)])
    monkeypatch.setattr("mdpt.data.free_memory", lambda: free)
    with pytest.raises(MdptError, match=r"transitions do not fit .* free memory; choose a smaller"):
        read_minari(ID)


def test_damaged_files(store: Path) -> None:
    folder = write(store, [episode(0)])
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_0"]
    with pytest.raises(MdptError, match="no episode"):
        read_minari(ID)
    (folder / "main_data.hdf5").write_bytes(b"broken" * 100)
    with pytest.raises(MdptError, match="incomplete or damaged"):
        read_minari(ID)
    (folder / "main_data.hdf5").unlink()
    with pytest.raises(MdptError, match=r"cannot be read \(No such file or directory\)"):
        read_minari(ID)
    for text in ("{", "[1]", "[" * 100_000):
        (folder / "metadata.json").write_text(text)
        with pytest.raises(MdptError, match=r"metadata\.json is missing or damaged"):
            minari_facts(ID)


@pytest.mark.parametrize("how", ["external link", "soft link", "behind a link", "episode", "raw file", "virtual"])
def test_nothing_outside_the_file_is_read(store: Path, tmp_path: Path, how: str) -> None:
    other, raw = tmp_path / "secret.hdf5", tmp_path / "secret.raw"
    with h5py.File(other, "w") as file:
        put(file, {"episode_0": episode(0)})
    raw.write_bytes(np.full((4, 2), 7, dtype=np.float32).tobytes())
    inside = {"type": "Dict", "subspaces": {"out/observations": BOX}} if how == "behind a link" else BOX
    folder = write(store, [episode(0)], inside)
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        group = file["episode_0"]
        del group["observations"]
        if how == "external link":
            group["observations"] = h5py.ExternalLink(str(other), "/episode_0/observations")
        elif how == "soft link":
            group["observations"] = h5py.SoftLink("/episode_0/actions")
        elif how == "behind a link":
            group.create_group("observations")["out"] = h5py.ExternalLink(str(other), "/episode_0")
        elif how == "episode":
            del file["episode_0"]
            file["episode_0"] = h5py.ExternalLink(str(other), "/episode_0")
        elif how == "raw file":
            size = h5py.h5f.UNLIMITED
            group.create_dataset("observations", (4, 2), np.float32, external=[(str(raw), 0, size)])
        else:
            layout = h5py.VirtualLayout((4, 2), np.float32)
            layout[:] = h5py.VirtualSource(str(other), "/episode_0/observations", (4, 2), np.float32)
            group.create_virtual_dataset("observations", layout)
    with pytest.raises(MdptError, match="missing, or lies outside the file|lies in other files"):
        read_minari(ID)


# --- facts ------------------------------------------------------------------------------------------------------


def test_facts(store: Path) -> None:
    write(store, [], ref_min_score=-1200.5, ref_max_score=-150)
    assert minari_facts(ID) == (
        {
            "environment": "Pendulum-v1",
            "environment_kwargs": {"g": 9.0},
            "max_episode_steps": 50,
            "reference": (-1200.5, -150),
            "action_range": [(-2, 2)],
        },
        "",
        (),
        (([-9, -9], [9, 9]), ([-2], [2])),
    )


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"ref_min_score": float("nan"), "ref_max_score": 1.0},
        {"ref_min_score": 0, "ref_max_score": 10**400},
        {"ref_min_score": "0", "ref_max_score": 1.0},
        {"ref_min_score": 0, "ref_max_score": 0},
    ],
)
def test_facts_without_references(store: Path, scores: dict[str, Any]) -> None:
    write(store, [], **scores)
    assert "environment" in minari_facts(ID)[0] and "reference" not in minari_facts(ID)[0]


def test_what_was_recorded_under_a_wrapper_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions in [-1, 1] for an environment that takes [-2, 2] would come out half as large."""
    numbers = gymnasium.make("Pendulum-v1").observation_space
    state = np.stack([np.ones(4), np.zeros(4), np.arange(4.0)], axis=1)

    def load(number: int, observations: Any, actions: Any, **settings: Any) -> Any:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(store / str(number)))
        episodes = [episode(0, observations=state), episode(1, observations=state, rewards=np.ones(3))]
        write(store / str(number), episodes, observations, actions)
        return load_dataset(DataSection(dataset=ID, held_out=0.0, **settings))

    assert load(0, serialize(numbers), ACTIONS).warnings == ()
    half = ACTIONS | {"low": [-1], "high": [1]}
    with pytest.raises(
        MdptError, match=r"within \[-1.0\] and \[1.0\], perhaps under a wrapper, .* \[-2.0\] and \[2.0\]"
    ):
        load(1, serialize(numbers), half)
    (told,) = load(2, BOX | {"shape": [3], "low": [-9] * 3, "high": [9] * 3}, ACTIONS).warnings
    assert "recorded within other bounds than those of Pendulum-v1" in told
    clipped = ACTIONS | {"low": [-math.inf], "high": [math.inf]}  # gymnasium's ClipAction, in the environment's unit
    assert load(3, serialize(numbers), clipped).warnings == ()


def test_without_an_environment_each_action_has_its_recorded_bounds(store: Path) -> None:
    actions = {"actions": np.array([[-1, 0], [0, 50], [1, 100]], dtype=np.float32)}
    bounds = BOX | {"low": [-1, 0], "high": [1, 100]}
    write(store, [episode(0, **actions), episode(1, **actions)], BOX, bounds, env_spec=None)
    dataset = load_dataset(DataSection(dataset=ID, held_out=0.0))
    assert (dataset.environment.action_low, dataset.environment.action_high) == ((-1, 0), (1, 100))
    assert dataset.column("actions").tolist() == [[-1, -1], [0, 0], [1, 1]] * 2
    assert dataset.section.action_range == [(-1, 1), (0, 100)]  # as in bundles


def test_the_environment_of_evaluation_comes_first(store: Path) -> None:
    evaluated = env_spec("MountainCarContinuous-v0", max_episode_steps=None, kwargs={"render_mode": "human"})
    write(store, [], eval_env_spec=evaluated)
    facts = minari_facts(ID)[0] | {"action_range": None}
    assert facts == {"environment": "MountainCarContinuous-v0", "environment_kwargs": {}, "action_range": None}


@pytest.mark.parametrize(
    ("environment", "needs"),
    [("HopperBulletEnv-v0", "pybullet_envs_gymnasium"), ("PointMaze_UMaze-v3", "gymnasium_robotics")],
)
def test_environments_of_installed_packages(store: Path, environment: str, needs: str) -> None:
    pytest.importorskip(needs)
    write(store, [], env_spec=env_spec(environment))
    assert minari_facts(ID)[0]["environment"] == environment


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"env_spec": None}, "it names no environment"),
        ({"env_spec": env_spec("Elsewhere-v0")}, "'Elsewhere-v0' is not registered.* name an environment yourself"),
        ({"env_spec": env_spec("hostile:Pendulum-v1")}, "'hostile:Pendulum-v1' would import a module"),
        ({"env_spec": env_spec("GymV26Environment-v0", kwargs={"env_id": "hostile:A-v0"})}, "would import a module"),
        ({"env_spec": env_spec(kwargs={"g": float("nan")})}, "unsound"),
        ({"env_spec": env_spec(kwargs="hostile")}, "unsound"),
        ({"env_spec": env_spec(kwargs={"max_episode_steps": 9})}, "unsound.*gymnasium.make's own"),
        ({"env_spec": env_spec(additional_wrappers=[1])}, "unsound"),
        ({"env_spec": '{"id": "Pendulum-v1", "kwargs": ' + '{"a": ' * 5_000}, "unsound"),
        ({"env_spec": "{"}, "unsound"),
        ({"env_spec": '{"id": ["Pendulum-v1"]}'}, "would import a module"),
    ],
)
def test_nothing_can_be_played(store: Path, changed: dict[str, Any], reason: str) -> None:
    write(store, [], ref_min_score=0.0, ref_max_score=1.0, **changed)
    facts, found, warnings, _ = minari_facts(ID)
    assert facts["reference"] == (0, 1) and not {"environment", "environment_kwargs"} & set(facts)
    assert len(found.splitlines()) == 1 and re.search(reason, found) and warnings == ()


def test_no_code_that_a_file_names_is_imported(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nEvil = Wrap = dict\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrapper = {"name": "Wrap", "entry_point": "hostile:Wrap", "kwargs": {}}
    kwargs = {"g": {"py/object": "hostile.Evil"}}
    code: dict[str, Any] = {
        "entry_point": "hostile:Evil",
        "vector_entry_point": "hostile:Evil",
        "additional_wrappers": [wrapper],
    }
    folder = write(store, [episode()], env_spec=env_spec(kwargs=kwargs, **code))
    facts, reason, warnings, _ = minari_facts(ID)
    assert facts["environment"] == "Pendulum-v1" and facts["environment_kwargs"] == kwargs and not reason
    assert len(warnings) == 1 and "'Wrap'" in warnings[0] and "not applied" in warnings[0]
    read_minari(ID)
    metadata = json.loads((folder / "metadata.json").read_text())
    for environment in ("hostile:Evil-v0", "GymV26Environment-v0", "GymV21Environment-v0"):
        unsafe = env_spec(environment, kwargs={"env_id": "hostile:Evil-v0"}, **code)
        (folder / "metadata.json").write_text(json.dumps(metadata | {"env_spec": unsafe}))
        assert "environment" not in minari_facts(ID)[0]
    assert not (tmp_path / "ran").exists()
    importlib.import_module("hostile")
    assert (tmp_path / "ran").exists()  # it would have been seen


# --- the store --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset", ["../x-v0", "a/../../x-v0", "/etc/x-v0", "a//x-v0", "hf://a/x-v0", "~/x", "", "a\n"]
)
def test_ids_that_leave_the_store(store: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, tmp_path: Path) -> None:
    write(store, [episode()])
    write(tmp_path, [episode()])
    (tmp_path / ID).rename(tmp_path / "x-v0")
    monkeypatch.setitem(sys.modules, "minari", package(download_dataset=pytest.fail))
    with pytest.raises(MdptError, match="not an id; expected one such as"):
        minari_facts(dataset)


def test_missing_and_no_package(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MdptError) as caught:
        minari_facts(ID)
    assert str(store) in str(caught.value) and f"minari download {ID}" in str(caught.value)


def test_the_store_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / ".minari" / "datasets", [episode()])
    assert len(read_minari(ID)["rewards"]) == 3


def test_downloads(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def download(dataset: str) -> None:
        print(f"Downloading {dataset}")
        write(store, [episode()])

    def fail(dataset: str) -> None:
        raise ValueError(f"no such version\nof {dataset}")

    monkeypatch.setitem(sys.modules, "minari", package(download_dataset=fail))
    with pytest.raises(MdptError, match=f"{ID}.*{store}.*download failed. ValueError: no such version of"):
        read_minari(ID)
    monkeypatch.setitem(sys.modules, "minari", package(download_dataset=lambda dataset: None))
    with pytest.raises(MdptError, match="missing or damaged"):
        read_minari(ID)
    monkeypatch.setitem(sys.modules, "minari", package(download_dataset=download))
    assert len(read_minari(ID)["rewards"]) == 3
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "minari", package(download_dataset=fail))
    minari_facts(ID)


class Scattered(gymnasium.ObservationWrapper):  # type: ignore[type-arg]
    """Pendulum whose observation is a Dict: the keys are out of order."""

    observation_space = Dict({"y": Box(-1, 1, (1,)), "a": Dict({"v": Box(-8, 8, (1,)), "x": Box(-1, 1, (1,))})})

    def observation(self, observation: Any) -> Any:
        x, y, v = observation[:, None]
        return {"y": y, "a": {"x": x, "v": v}}


gymnasium.register(
    "Scattered-v0", lambda g: Scattered(gymnasium.make("Pendulum-v1", g=g, max_episode_steps=-1)), max_episode_steps=50
)
TRAINING = """
seeds = [0]
device = "cpu"
[data]
source = "minari"
dataset = "mdpt/test/play-v0"
held_out = 0.2
[guidance]
steps = 20
batch_size = 16
snapshots = 2
[policy]
steps = 20
batch_size = 16
snapshots = 2
[evaluation]
episodes = 2
"""


def test_a_dataset_by_name_trains_and_is_evaluated(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Scattered-v0"
    environment = gymnasium.make(name, g=9.0, max_episode_steps=50, disable_env_checker=True)
    episodes = []
    for steps in play(environment, 10):
        observations, actions, rewards, ends, cuts = zip(*steps, strict=True)
        found = {"observations": stack([*observations]), "actions": np.stack(actions[:-1])}
        flags = {"terminations": np.array(ends[:-1]), "truncations": np.array(cuts[:-1])}
        episodes.append(found | {"rewards": np.array(rewards[:-1])} | flags)
    spaces = serialize(environment.observation_space), serialize(environment.action_space)
    write(store, episodes, *spaces, env_spec=env_spec(name), ref_min_score=-400.0, ref_max_score=0.0)
    monkeypatch.chdir(store.parent)
    Path("run.toml").write_text(TRAINING)
    run("guidance run.toml --out g.pt")
    run("policy run.toml --guidance g.pt --out p.pt")
    report = Path("report.json")
    run(f"evaluate p.pt --workers 1 --json {report}")
    (pair,) = json.loads(report.read_text())["cells"][0]["pairs"]
    assert pair["lengths"] == [50, 50] and pair["score"] == pytest.approx(100 * (np.mean(pair["returns"]) + 400) / 400)
    kept = models.read_policy(Path("p.pt")).environment
    assert (kept.id, kept.kwargs, kept.max_episode_steps) == (name, {"g": 9.0}, 50)
    assert kept.flattened and kept.observation_dim == 3
