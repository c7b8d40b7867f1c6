"""What is given: datasets, environments, rollouts and the reference returns that normalize a score.

Reading order: environments, scores, files, transitions, the dataset, worker processes, collecting, rollouts.
Shapes: n rows or transitions, O observation dimensions, A action dimensions, S members, E episodes.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import gymnasium

Array: TypeAlias = npt.NDArray[Any]
Progress: TypeAlias = Callable[[int, int], None]  # (done, total)

GENERATOR = 1  # version of the collected data: raise it when the same settings would give other bytes
SHARD = 5_000  # transitions that one worker collects at a time


class DataError(Exception):
    """A mistake in data or environment that the user can mend."""


# ---------------------------------------------------------------------------------------------- environments


@dataclass(frozen=True)
class EnvironmentSpec:
    """What the rest of the tool needs to know of an environment; action bounds have A entries each."""

    id: str
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: int


def environment_spec(environment_id: str) -> EnvironmentSpec:
    """Dimensions, action bounds and time limit of a gymnasium environment; PyBullet's are known, too.

    Raises: DataError for an unknown id, spaces that are not flat boxes, actions that cannot be scaled from their
    bounds, or no time limit.
    """
    from gymnasium.spaces import Box

    environment = _make(environment_id)
    environment.close()
    observations: Any = environment.observation_space
    actions: Any = environment.action_space
    for name, space in (("observation", observations), ("action", actions)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
            raise DataError(f"{environment_id}: its {name} space is {space}; only a Box with one axis can be learned.")
    if not np.issubdtype(actions.dtype, np.floating):
        raise DataError(f"{environment_id}: its actions are {actions.dtype}, {actions}; only floats can be learned.")
    if environment.spec is None or not environment.spec.max_episode_steps:
        raise DataError(f"{environment_id}: it has no time limit; register it with max_episode_steps.")
    spec = EnvironmentSpec(
        id=environment_id,
        observation_dim=observations.shape[0],
        action_dim=actions.shape[0],
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
        max_episode_steps=environment.spec.max_episode_steps,
    )
    with np.errstate(over="ignore", invalid="ignore"):
        _, half = _center_and_half(spec)
    if not (np.isfinite(half) & (half > 0)).all():
        raise DataError(
            f"{environment_id}: its actions lack finite bounds that differ, {actions}; wrap it to give such."
        )
    return spec


def scale_actions(actions: Array, spec: EnvironmentSpec) -> Array:
    """Actions (..., A) from the environment's bounds to [-1, 1], float32."""
    center, half = _center_and_half(spec)
    return np.asarray((actions - center) / half, dtype=np.float32)


def unscale_actions(actions: Array, spec: EnvironmentSpec) -> Array:
    """Actions (..., A) from [-1, 1] to the environment's bounds, float32."""
    center, half = _center_and_half(spec)
    return np.asarray(actions * half + center, dtype=np.float32)


def _center_and_half(spec: EnvironmentSpec) -> tuple[Array, Array]:
    # In this form bounds of [-1, 1] leave every bit of an action as it was.
    low, high = _bounds(spec)
    return (high + low) / 2, (high - low) / 2


def _bounds(spec: EnvironmentSpec) -> tuple[Array, Array]:
    return np.array(spec.action_low, dtype=np.float32), np.array(spec.action_high, dtype=np.float32)


def _make(environment_id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    import gymnasium

    with _quiet():
        for name in ("pybullet", "pybullet_envs_gymnasium"):  # the one announces itself, the other registers
            importlib.import_module(name)
    try:
        return gymnasium.make(environment_id, disable_env_checker=True, **options)
    except Exception as error:
        module, _, name = environment_id.rpartition(":")
        if module and isinstance(error, ImportError):
            hint = f"{_one_line(error)}. Install it, or put its folder on PYTHONPATH."
            raise DataError(f"{environment_id}: the module {module} cannot be imported. {hint}") from error
        if name in gymnasium.registry:
            raise DataError(f"{environment_id}: the environment cannot be made. {_one_line(error)}") from error
        near = difflib.get_close_matches(name, gymnasium.registry, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "Write 'module:Name-v0' for one that a module registers."
        raise DataError(f"{environment_id}: no such environment is registered with gymnasium. {hint}") from error


def _make_environment(environment_id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """An environment whose episodes depend on nothing but `reset(seed=...)` and the actions.

    PyBullet's first episode, in which it loads its bodies, differs from a later one with the same seed, so it is
    spent here.
    """
    environment = _make(environment_id, **options)
    environment.reset(seed=0)
    return environment


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what C code writes there, at file-descriptor level."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None
    flush(None)
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    _silence(1, 2)
    try:
        yield
    finally:
        flush(None)  # C buffers its lines when they go to a file or pipe; they must leave while it is quiet
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)


def _silence(*streams: int) -> None:
    with open(os.devnull, "wb") as sink:
        for stream in streams:
            os.dup2(sink.fileno(), stream)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------------------------------------------- scores


def reference_returns(reference: str | tuple[float, float]) -> tuple[float, float]:
    """The raw returns that stand for 0 and for 100: of a D4RL family, a full D4RL name, or the pair itself.

    A family is what comes before the dataset's kind: "bullet-hopper" for bullet-hopper-medium-v0.

    Raises: DataError for an unknown name, a family whose tasks differ in reference, or min >= max.
    Source: d4rl/infos.py (arXiv 2004.07219).
    """
    if not isinstance(reference, str):
        low, high = reference
        if not low < high:
            raise DataError(f"reference: [{low}, {high}] must be [min, max] with min < max.")
        return float(low), float(high)
    found = importlib.util.find_spec("d4rl")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"reference {reference!r}: D4RL's table is not installed; give [min, max] instead.")
    # Its own file only: importing the package would look for MuJoCo and complain.
    infos = runpy.run_path(str(Path(found.submodule_search_locations[0], "infos.py")))
    table = {name: (float(low), float(infos["REF_MAX_SCORE"][name])) for name, low in infos["REF_MIN_SCORE"].items()}
    if reference in table:
        return table[reference]
    family = [name for name in table if re.fullmatch(re.escape(reference) + r"-.+-v\d+", name)]
    if len({table[name] for name in family}) > 1:
        raise DataError(f"reference {reference!r}: its tasks differ in reference; name one, such as {family[0]!r}.")
    if not family:
        families = sorted({re.sub(r"-[^-]+(-expert|-replay)?-v\d+$", "", name) for name in table})
        near = difflib.get_close_matches(reference, families, n=3, cutoff=0.3) or families
        raise DataError(f"reference {reference!r}: unknown to D4RL. Nearest: {', '.join(near)}. Or give [min, max].")
    return table[family[0]]


def normalized_score(returns: Array, reference: tuple[float, float]) -> Array:
    """Raw returns on the scale where the reference's min is 0 and its max is 100. Source: arXiv 2004.07219, eq. 1."""
    low, high = reference
    return np.asarray(100 * (np.asarray(returns, dtype=np.float64) - low) / (high - low))


# ----------------------------------------------------------------------------------------------------- files


def read_hdf5(path: Path, spec: EnvironmentSpec) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The checked arrays of a file in D4RL's format, and warnings.

    observations (n, O), actions (n, A), rewards (n,) and, where the file has it, next_observations (n, O) as
    float32; terminals and, where the file has it, timeouts (n,) as bool. Other keys are not read.

    Raises: DataError that names the key and the first row at fault.
    Source: the D4RL wiki, "Off-policy evaluation and dataset format".
    """
    columns = {"observations": spec.observation_dim, "actions": spec.action_dim, "rewards": 0, "terminals": 0}
    optional = {"next_observations": spec.observation_dim, "timeouts": 0}
    raw = _read_arrays(path, [*columns], [*optional])
    rows = len(raw["observations"]) if raw["observations"].ndim else 0
    for key, array in raw.items():
        width = (columns | optional)[key]
        expected = (rows, width) if width else (rows,)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: {key!r} holds {array.dtype}, expected numbers.")
        if not width and array.shape == (rows, 1):
            array = array[:, 0]
        if array.shape != expected:
            raise DataError(f"{path}: {key!r} has shape {array.shape}, expected {expected} for {spec.id}.")
        if key in ("terminals", "timeouts"):
            _forbid(path, key, array, (array != 0) & (array != 1), "expected only 0 and 1")
            raw[key] = array.astype(np.bool_)
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
                raw[key] = array.astype(np.float32)
            _forbid(path, key, raw[key], ~np.isfinite(raw[key]), "expected finite numbers")
    if rows < 2:
        raise DataError(f"{path}: {rows} row(s), expected at least 2.")

    warnings = []
    low, high = _bounds(spec)
    actions = raw["actions"]
    excess = np.maximum(low - actions, actions - high)
    bounds = f"expected within {low.tolist()} and {high.tolist()} of {spec.id}"
    _forbid(path, "actions", actions, excess > 1e-3 * (high - low), bounds)
    if (outside := (excess > 0).any(axis=1)).any():
        count, most = outside.sum(), excess.max()
        warnings.append(f"{path}: clipped the actions of {count} rows, out of bounds by {most:.1e} at most.")
        raw["actions"] = np.clip(actions, low, high)
    if "timeouts" not in raw:
        warnings.append(f"{path}: no 'timeouts'; episodes end at terminals and every {spec.max_episode_steps} rows.")
    return raw, tuple(warnings)


def _read_arrays(path: Path, required: Sequence[str], optional: Sequence[str]) -> dict[str, Array]:
    """The arrays of an HDF5 file under these keys, unchecked."""
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        readable = h5py.is_hdf5(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not readable:
        raise DataError(f"{path}: not an HDF5 file. Expected D4RL's format: observations, actions, rewards, terminals.")
    raw: dict[str, Array] = {}
    try:
        with h5py.File(path, "r") as file:
            for key in (*required, *optional):
                if key in file and isinstance(file[key], h5py.Dataset):
                    raw[key] = np.asarray(file[key][()])
                elif key in required:
                    found = ", ".join(sorted(map(str, file)))
                    raise DataError(f"{path}: the key {key!r} is missing. It has: {found or 'none'}.")
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:  # h5py, where damaged
        raise DataError(f"{path}: a truncated or damaged HDF5 file; get it again. {_one_line(error)}") from error
    return raw


def _forbid(path: Path, key: str, array: Array, bad: Array, expected: str) -> None:
    if bad.any():
        row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
        raise DataError(f"{path}: {key!r} row {row} is {array[row].tolist()}, {expected}.")


# ----------------------------------------------------------------------------------------------- transitions


def mark_timeouts(raw: dict[str, Array], max_episode_steps: int) -> Array:
    """Rows (n,) bool at which an episode was cut by its time limit: the file's own, else D4RL's count of steps.

    That count is kept to the letter, since it decides which rows D4RL's users train on: it starts at 0 in the
    file's first row and after a cut, but at 1 after a terminal (unless that terminal was itself a cut), and
    cuts where it reaches max_episode_steps - 1.
    Source: d4rl.qlearning_dataset, `episode_step`.
    """
    if "timeouts" in raw:
        return raw["timeouts"]
    n = len(raw["terminals"])
    starts, stops = episode_bounds(raw["terminals"], np.zeros(n, dtype=np.bool_))
    lengths = stops - starts
    # The count at a run's first row is 0 or 1. By its length, a run passes that on to the next, flips it, or sets 1.
    passes = lengths % max_episode_steps == 0
    flips = ((lengths + 1) % max_episode_steps == 0) & ~passes
    runs = np.arange(len(lengths))
    last_set = np.maximum.accumulate(np.where(passes | flips, -1, runs))
    flipped = np.concatenate([[0], np.cumsum(flips)])
    after = (last_set >= 0) ^ ((flipped[1:] - flipped[last_set + 1]) % 2 == 1)
    first = np.concatenate([[0], after[:-1]])
    count = np.arange(n) - np.repeat(starts - first, lengths)
    return np.asarray(count % max_episode_steps == max_episode_steps - 1)


def episode_bounds(terminals: Array, timeouts: Array) -> tuple[Array, Array]:
    """First row and one past the last row, (E,) int64 each, of every episode; the last one may be incomplete."""
    ends = np.flatnonzero(terminals | timeouts) + 1
    if not len(ends) or ends[-1] != len(terminals):
        ends = np.append(ends, len(terminals))
    return np.concatenate([[0], ends[:-1]]), ends


def build_transitions(raw: dict[str, Array], max_episode_steps: int) -> dict[str, Array]:
    """Transitions from the rows of a file, with "rows", the row each came from.

    Without next_observations the next row is the next observation. Then, as D4RL does, a row at a time limit is
    dropped (what followed it is unknown, even if it is a terminal, too) and so is the file's last row. With them
    every row is kept: a time limit is not a terminal, so its value is bootstrapped, and a terminal stays one.
    (D4RL ignores the key and drops those rows; nothing is gained by that.)
    Source: d4rl.qlearning_dataset(terminate_on_end=False), equal to it in values, types and order.
    """
    if "next_observations" in raw:
        rows = np.arange(len(raw["terminals"]))
        next_observations = raw["next_observations"]
    else:
        rows = np.flatnonzero(~mark_timeouts(raw, max_episode_steps)[:-1])
        next_observations = raw["observations"][rows + 1]
    kept = {key: raw[key][rows] for key in ("observations", "actions", "rewards", "terminals")}
    return kept | {"next_observations": next_observations, "rows": rows}


def discounted_returns(
    rewards: Array, terminals: Array, timeouts: Array, discount: float, tail: float = 0.05
) -> tuple[Array, Array]:
    """Monte-Carlo returns (n,) float64 from each row to its episode's end, and where to trust them, (n,) bool.

    A return is trusted if its episode ended in a terminal, or if what was cut off weighs no more than `tail`:
    discount ** (steps that remain) <= tail. Returns are in the unit of `rewards`.
    """
    starts, stops = episode_bounds(terminals, timeouts)
    longest_first = np.argsort(starts - stops, kind="stable")
    lengths, stops = (stops - starts)[longest_first], stops[longest_first]
    returns = np.zeros(len(rewards))
    later = np.zeros(len(lengths))
    trusted = np.zeros(len(rewards), dtype=np.bool_)
    for remaining in range(1, int(lengths[0]) + 1):  # all episodes at once, one step further from their ends
        reach = int(np.searchsorted(-lengths, -remaining, side="right"))
        rows = stops[:reach] - remaining
        later[:reach] = returns[rows] = rewards[rows] + discount * later[:reach]
        trusted[rows] = terminals[stops[:reach] - 1] | (discount**remaining <= tail)
    return returns, trusted


# ----------------------------------------------------------------------------------------------- the dataset


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Whole episodes kept from training, row after row: observations (m, O), actions (m, A) in [-1, 1], the rest (m,).

    Rewards are scaled as the training rewards are.
    """

    observations: Array
    actions: Array
    rewards: Array
    terminals: Array
    timeouts: Array


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training transitions (n, ...), held-out episodes, and where they came from."""

    environment: EnvironmentSpec
    observations: Array  # (n, O) float32, raw
    actions: Array  # (n, A) float32, in [-1, 1]
    rewards: Array  # (n,) float32, scaled
    next_observations: Array  # (n, O) float32, raw
    terminals: Array  # (n,) bool
    held_out: HeldOut
    episode_returns: Array  # (E,) float64, raw, undiscounted, of all whole episodes, held-out ones included
    reward_scale: dict[str, float | str]  # scaled = multiplier * raw + offset
    identity: dict[str, str | int]  # source, name, transitions (rows of the file), hash
    warnings: tuple[str, ...]


def load_dataset(
    *,
    source: str,
    environment_id: str,
    path: Path | None,
    reward_scale: str | float,
    held_out: float,
    seed: int,
    collect: CollectSettings | None,
    workers: int,
    progress: Progress | None,
) -> Dataset:
    """Read a D4RL-format file ("hdf5"), or roll one out first ("collect"), and make it ready for training.

    held_out: fraction of the complete episodes kept from training, chosen by `seed`; at least one unless 0.
    reward_scale: "none", "return-range" (max_episode_steps / (best - worst episode return), as IQL does),
    "minus-one" (adds -1, as for antmaze), or a positive factor.

    Raises: DataError for a mistake in any of it.
    """
    if source == "collect" and collect is not None:
        path = collect_dataset(environment_id, collect, workers, progress)
    elif source != "hdf5" or path is None:
        raise DataError(f"data source {source!r}: expected 'hdf5' with a path, or 'collect' with its settings.")
    spec = environment_spec(environment_id)
    raw, warnings = read_hdf5(path, spec)
    timeouts = mark_timeouts(raw, spec.max_episode_steps)
    lengths, complete, episode_returns = _judge_episodes(raw, timeouts, spec, collected=source == "collect")
    scale = _reward_scale(reward_scale, episode_returns, spec.max_episode_steps)
    rewards = (raw["rewards"] * float(scale["multiplier"]) + float(scale["offset"])).astype(np.float32)

    chosen = _choose_episodes(complete, held_out, seed)
    kept = np.repeat(chosen, lengths)  # (rows,) held out
    if held_out > 0 and not chosen.any():
        warnings += (f"{path}: a single episode, so none is held out.",)

    actions = scale_actions(raw["actions"], spec)
    transitions = build_transitions(raw | {"rewards": rewards, "actions": actions}, spec.max_episode_steps)
    train = ~kept[transitions.pop("rows")]
    if not train.any():
        raise DataError(f"{path}: no transition is left to train on; lower held_out (now {held_out}) or add episodes.")
    if not train.all():
        transitions = {key: array[train] for key, array in transitions.items()}
    return Dataset(
        environment=spec,
        **transitions,
        held_out=HeldOut(
            raw["observations"][kept], actions[kept], rewards[kept], raw["terminals"][kept], timeouts[kept]
        ),
        episode_returns=episode_returns,
        reward_scale=scale,
        identity={"source": source, "name": path.name, "transitions": len(timeouts), "hash": _content_hash(raw)},
        warnings=warnings,
    )


def _judge_episodes(
    raw: dict[str, Array], timeouts: Array, spec: EnvironmentSpec, *, collected: bool
) -> tuple[Array, Array, Array]:
    """Length of each episode (E,), whether it is complete (E,) bool (all are, if none is), and the raw returns (W,)
    float64 of the whole ones.
    """
    starts, stops = episode_bounds(raw["terminals"], timeouts)
    complete = (raw["terminals"] | timeouts)[stops - 1]
    if not complete.any():
        complete[:] = True
    whole = complete
    if collected:  # ours are cut where a worker's share of the rows is full
        whole = raw["terminals"][stops - 1] | (stops - starts == spec.max_episode_steps)
    returns = np.add.reduceat(raw["rewards"].astype(np.float64), starts)
    return stops - starts, complete, returns[whole if whole.any() else complete]


def _choose_episodes(complete: Array, fraction: float, seed: int) -> Array:
    """Which episodes to hold out, (E,) bool: a fraction of the complete ones, one at least, but never all."""
    chosen = np.zeros(len(complete), dtype=np.bool_)
    total = int(complete.sum())
    count = min(max(1, round(fraction * total)), total - 1) if fraction > 0 else 0
    chosen[np.random.default_rng(seed).permutation(np.flatnonzero(complete))[:count]] = True
    return chosen


def _reward_scale(rule: str | float, returns: Array, max_episode_steps: int) -> dict[str, float | str]:
    if rule == "none":
        return {"rule": rule, "multiplier": 1.0, "offset": 0.0}
    if rule == "minus-one":
        return {"rule": rule, "multiplier": 1.0, "offset": -1.0}
    if rule == "return-range":
        spread = float(returns.max() - returns.min())
        if spread == 0:
            raise DataError("reward_scale 'return-range': all returns are equal; choose 'none' or a number.")
        return {"rule": rule, "multiplier": max_episode_steps / spread, "offset": 0.0}
    if isinstance(rule, str) or not 0 < rule < float("inf"):
        raise DataError(f"reward_scale {rule!r}: expected none, return-range, minus-one, or a positive number.")
    return {"rule": "number", "multiplier": float(rule), "offset": 0.0}


def _content_hash(raw: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for key in sorted(raw):
        digest.update(f"{key} {raw[key].shape} {raw[key].dtype.str}\n".encode())
        digest.update(np.ascontiguousarray(raw[key]).data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ worker processes


class _Worker:
    """A process that answers requests one by one with `build(*arguments)(request)`."""

    def __init__(self, build: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # never fork: the parent may run torch's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, request: Any) -> None:
        with contextlib.suppress(OSError):  # a worker that is gone is reported by `receive`
            self.pipe.send(request)

    def receive(self) -> Any:
        try:
            reply = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            code = self.process.exitcode
            raise DataError(f"A worker process ended unexpectedly, exit code {code}; try fewer workers.") from None
        if isinstance(reply, DataError):
            raise reply
        return reply

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, build: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    _silence(1)  # PyBullet writes there at each connection
    try:
        answer = build(*arguments)
        while True:
            pipe.send(answer(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception as error:
        known = isinstance(error, DataError)
        pipe.send(error if known else DataError(f"The environment failed in a worker process. {_one_line(error)}"))
        raise SystemExit(1) from error


@contextlib.contextmanager
def _worker_processes(
    build: Callable[..., Callable[[Any], Any]], arguments: list[tuple[Any, ...]]
) -> Iterator[list[_Worker]]:
    """One worker for each entry of `arguments`; none of them outlives the block."""
    workers: list[_Worker] = []
    try:
        for each in arguments:
            workers.append(_Worker(build, each))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


# ------------------------------------------------------------------------------------------------ collecting


@dataclass(frozen=True)
class CollectSettings:
    """How to roll out the bundled agent: `transitions` in all, in equal shares over the `levels`.

    levels: relative standard deviation of the agent's weights, drawn once per episode.
    action_noise: standard deviation of what is added to each action, in the environment's unit; one for each level,
    or one for all.
    """

    transitions: int
    levels: tuple[float, ...]
    action_noise: float | tuple[float, ...]
    seed: int


def collect_dataset(
    environment_id: str,
    settings: CollectSettings,
    workers: int,
    progress: Progress | None,
    cache: Path | None = None,
) -> Path:
    """Roll out PyBullet's bundled agent with perturbed weights into a D4RL-format file, or find it in the cache.

    The file depends on the environment and the settings only, not on `workers`. The cache is `cache`, else
    $MDPT_CACHE, else mdpt in $XDG_CACHE_HOME or ~/.cache. progress counts transitions.

    Raises: DataError without an agent for this environment, for settings that do not divide, a damaged cached file.
    """
    wanted = f"{settings.transitions} transitions for {len(settings.levels)} levels"
    if not settings.levels or settings.transitions < 1 or settings.transitions % len(settings.levels):
        raise DataError(f"collect: {wanted}; expected the same number at each.")
    share = settings.transitions // len(settings.levels)
    agent = _bundled_agent(environment_id)
    made_by = {"environment": environment_id, **asdict(settings), "generator": GENERATOR}
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache or _cache_folder()) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', environment_id)}-{digest}.hdf5"
    if path.exists():
        _check_cached(path, settings.transitions)
        return path

    spec = environment_spec(environment_id)
    if (wide := (agent[0].shape[0], agent[-1].shape[0])) != (spec.observation_dim, spec.action_dim):
        raise DataError(f"{environment_id}: its agent takes {wide[0]} observations and gives {wide[1]} actions.")
    shards = [
        (level, shard, min(SHARD, share - start))
        for level in range(len(settings.levels))
        for shard, start in enumerate(range(0, share, SHARD))
    ]
    try:
        make_writable_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot be written ({error.strerror}); set MDPT_CACHE to another folder"
        ) from error
    parts = _play_shards(spec, agent, settings, shards, workers, progress)
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    arrays["infos/level"] = np.repeat(np.array(settings.levels, dtype=np.float32), share)
    versions = {name: importlib.metadata.version(name) for name in ("pybullet", "pybullet_envs_gymnasium", "numpy")}
    _write_hdf5(path, arrays, made_by | versions)
    return path


def make_writable_folder(folder: Path) -> None:
    """Make a folder and try to write there: now, not after hours of work. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _cache_folder() -> Path:
    if folder := os.environ.get("MDPT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mdpt")


def _check_cached(path: Path, transitions: int) -> None:
    try:
        with h5py.File(path, "r") as file:
            if len(file["rewards"]) == transitions == len(file["infos/level"]):
                return
    except (OSError, RuntimeError, KeyError):
        pass
    raise DataError(f"{path}: this cached dataset is damaged; delete the file, and it will be collected again.")


def _write_hdf5(path: Path, arrays: dict[str, Array], attributes: dict[str, Any]) -> None:
    """Write a whole file or none; the same arrays and attributes give the same bytes."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        os.close(handle)
        with h5py.File(name, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, track_times=False)
            file.attrs.update(attributes)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(name, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({_one_line(error)}).") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _bundled_agent(environment_id: str) -> list[Array]:
    """Weights and biases of the agent that PyBullet ships for an environment, layer by layer, float32.

    Its file is parsed, never run: it would import an old gym.
    """
    found = importlib.util.find_spec("pybullet_envs")
    folder = Path(*found.submodule_search_locations or ()) / "examples" if found else Path()
    files = {
        f"{name}-{version}": file
        for file in sorted(folder.glob("enjoy_TF_*_v0_2017may.py"))
        for name, version in [file.stem.removeprefix("enjoy_TF_").split("_")[:2]]
    }
    if environment_id not in files:
        raise DataError(f"{environment_id}: no agent is bundled with PyBullet for it. It has: {', '.join(files)}.")
    layers: dict[str, Array] = {}
    for node in ast.parse(files[environment_id].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.targets[0])
            if name.startswith("weights_"):
                layers[name] = np.array(ast.literal_eval(node.value.args[0]), dtype=np.float32)
    return [layers[f"weights_{layer}_{part}"] for layer in ("dense1", "dense2", "final") for part in "wb"]


def _play_shards(
    spec: EnvironmentSpec,
    agent: list[Array],
    settings: CollectSettings,
    shards: list[tuple[int, int, int]],
    workers: int,
    progress: Progress | None,
) -> list[dict[str, Array]]:
    parts: dict[int, dict[str, Array]] = {}
    queue = iter(range(len(shards)))
    count = max(1, min(workers, len(shards)))
    with _worker_processes(_ShardPlayer, [(spec, agent, settings)] * count) as processes:
        running: dict[Any, tuple[_Worker, int]] = {}

        def hand_out(worker: _Worker) -> None:
            if (shard := next(queue, None)) is not None:
                worker.send(shards[shard])
                running[worker.pipe] = worker, shard

        for worker in processes:
            hand_out(worker)
        done = 0
        while running:
            for pipe in wait(list(running)):
                worker, shard = running.pop(pipe)
                parts[shard] = worker.receive()
                hand_out(worker)
                done += shards[shard][2]
                if progress:
                    progress(done, settings.transitions)
    return [parts[shard] for shard in range(len(shards))]


class _ShardPlayer:
    """Plays whole episodes of one level, cutting the last at the shard's end."""

    def __init__(self, spec: EnvironmentSpec, agent: list[Array], settings: CollectSettings) -> None:
        self.spec, self.agent, self.settings = spec, agent, settings
        self.environment = _make_environment(spec.id)

    def __call__(self, shard: tuple[int, int, int]) -> dict[str, Array]:
        level, index, size = shard
        spec, sigma = self.spec, self.settings.levels[level]
        low, high = _bounds(spec)
        random = np.random.default_rng(np.random.SeedSequence([self.settings.seed, level, index]))
        observations = np.empty((size, spec.observation_dim), dtype=np.float32)
        actions = np.empty((size, spec.action_dim), dtype=np.float32)
        rewards = np.empty(size, dtype=np.float32)
        terminals, timeouts = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
        row = 0
        while row < size:
            weights = [w * (1 + np.float32(sigma) * random.standard_normal(w.shape, np.float32)) for w in self.agent]
            noise = random.standard_normal((spec.max_episode_steps, spec.action_dim), np.float32)
            noise *= np.broadcast_to(self.settings.action_noise, len(self.settings.levels))[level]
            observation, _ = self.environment.reset(seed=int(random.integers(2**31)))
            for step in range(min(spec.max_episode_steps, size - row)):
                observations[row] = observation
                actions[row] = action = np.clip(_agent_action(weights, observations[row]) + noise[step], low, high)
                observation, rewards[row], terminals[row], timeout, _ = self.environment.step(action)
                row += 1
                if terminals[row - 1] or timeout:
                    break
            timeouts[row - 1] = not terminals[row - 1]
        return {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminals": terminals,
            "timeouts": timeouts,
        }


def _agent_action(weights: list[Array], observation: Array) -> Array:
    hidden = np.maximum(observation @ weights[0] + weights[1], 0)
    hidden = np.maximum(hidden @ weights[2] + weights[3], 0)
    return np.asarray(hidden @ weights[4] + weights[5])


# -------------------------------------------------------------------------------------------------- rollouts


def rollout(
    act: Callable[[Array], Array],
    spec: EnvironmentSpec,
    *,
    members: int,
    episodes: Sequence[int],
    seed: int,
    workers: int,
    progress: Progress | None = None,
) -> tuple[Array, Array]:
    """Play E numbered episodes with each member: raw returns (S, E) float64 and lengths (S, E) int64 in steps.

    act: observations (S, E, O) float32 -> actions (S, E, A) in [-1, 1], which are scaled back to the bounds.
    An episode starts from the state of its number, the same for every member. Every reward counts, the last step's
    included. After its end an episode is not stepped, contributes nothing, and shows `act` its last observation
    until all ended. progress counts episodes.

    Raises: DataError for actions that are not finite or of another shape, and for a worker that fails.
    """
    total, shape = members * len(episodes), (members, len(episodes))
    count = max(1, min(workers, total))
    starts = [_start(seed, episode) for episode in episodes]
    parts = [slice(first, None, count) for first in range(count)]  # interleaved: every worker serves all members
    observations = np.zeros((total, spec.observation_dim), dtype=np.float32)
    rewards, returns = np.zeros(total), np.zeros(total)
    lengths, running = np.zeros(total, dtype=np.int64), np.ones(total, dtype=np.bool_)
    with _worker_processes(_Stage, [(spec, (starts * members)[part]) for part in parts]) as processes:

        def exchange(actions: Array | None) -> None:
            for worker, part in zip(processes, parts, strict=True):
                worker.send(None if actions is None else actions[part])
            for worker, part in zip(processes, parts, strict=True):
                observations[part], rewards[part], running[part] = worker.receive()

        exchange(None)
        finished = 0
        while running.any():
            actions = np.asarray(act(observations.reshape(*shape, -1).copy()))
            if actions.shape != (expected := (*shape, spec.action_dim)):
                raise DataError(f"act: actions of shape {actions.shape}, expected {expected}.")
            if not np.isfinite(actions).all():
                member = int(np.argmin(np.isfinite(actions).all(axis=(1, 2))))
                raise DataError(f"act: member {member} chose an action that is not finite; its training has diverged.")
            lengths += running
            exchange(unscale_actions(np.clip(actions, -1, 1), spec).reshape(total, -1))
            returns += rewards
            if progress and total - running.sum() > finished:
                finished = total - int(running.sum())
                progress(finished, total)
    return returns.reshape(shape), lengths.reshape(shape)


def _start(seed: int, episode: int) -> int:
    """What an episode's environment is reset with."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def film_episode(
    act: Callable[[Array], Array], spec: EnvironmentSpec, *, seed: int, every: int
) -> Iterator[tuple[int, float, Array]]:
    """Play an episode from `rollout`'s first start: now and then, and at its end, steps, return so far, a frame.

    act: observation (O,) float32 -> action (A,) in [-1, 1]. A frame is (height, width, 3) uint8, drawn off-screen by
    the environment itself.

    Raises: DataError where it cannot.
    """
    with _worker_processes(_Camera, [(spec, _start(seed, 0), every)]) as (worker,):
        total, step, running = 0.0, 0, True
        worker.send(None)
        observation, frame = worker.receive()
        yield step, total, frame
        while running:
            step += 1
            worker.send(unscale_actions(np.clip(act(observation), -1, 1), spec))
            observation, reward, running, frame = worker.receive()
            total += reward
            if frame is not None:
                yield step, total, frame


class _Camera:
    """One environment that shows itself."""

    def __init__(self, spec: EnvironmentSpec, seed: int, every: int) -> None:
        self.name, self.seed, self.every, self.step = spec.id, seed, every, 0
        try:
            self.environment = _make_environment(spec.id, render_mode="rgb_array")
        except DataError as error:
            raise DataError(f"{spec.id} cannot be filmed: it does not take render_mode rgb_array. {error}") from error

    def __call__(self, action: Array | None) -> Any:
        if action is None:
            observation, _ = self.environment.reset(seed=self.seed)
            return np.asarray(observation, dtype=np.float32), self.look()
        observation, reward, terminal, timeout, _ = self.environment.step(action)
        self.step += 1
        running = not (terminal or timeout)
        frame = None if running and self.step % self.every else self.look()
        return np.asarray(observation, dtype=np.float32), float(reward), running, frame

    def look(self) -> Array:
        try:
            frame: Any = self.environment.render()
        except Exception as error:
            raise DataError(f"{self.name} cannot be filmed off-screen. {_one_line(error)}") from error
        if np.ndim(frame) != 3:
            modes = ", ".join(self.environment.metadata.get("render_modes") or ()) or "none"
            raise DataError(f"{self.name} cannot be filmed: it needs render mode rgb_array, and has {modes}.")
        return np.asarray(frame, dtype=np.uint8)


def step_seconds(spec: EnvironmentSpec, environments: int = 16, steps: int = 5) -> float:
    """Seconds that a step of one environment takes in a worker, measured at the start of a few episodes."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, environments, spec.action_dim)).astype(np.float32)
    with _worker_processes(_Stage, [(spec, list(range(environments)))]) as (worker,):
        worker.send(None)
        worker.receive()
        began = time.perf_counter()
        for action in unscale_actions(actions, spec):
            worker.send(action)
            worker.receive()
        return (time.perf_counter() - began) / (steps * environments)


class _Stage:
    """A worker's share of the environments, each of which plays one episode."""

    def __init__(self, spec: EnvironmentSpec, seeds: list[int]) -> None:
        self.seeds = seeds
        self.environments = [_make_environment(spec.id) for _ in seeds]
        self.observations = np.empty((len(seeds), spec.observation_dim), dtype=np.float32)
        self.running = np.ones(len(seeds), dtype=np.bool_)

    def __call__(self, actions: Array | None) -> tuple[Array, Array, Array]:
        """Step the running environments (or, with None, start them): observations, rewards, still running."""
        rewards = np.zeros(len(self.seeds))
        if actions is None:
            for index, environment in enumerate(self.environments):
                self.observations[index], _ = environment.reset(seed=self.seeds[index])
            return self.observations, rewards, self.running
        for index in np.flatnonzero(self.running).tolist():
            environment = self.environments[index]
            self.observations[index], rewards[index], terminal, timeout, _ = environment.step(actions[index])
            self.running[index] = not (terminal or timeout)
        return self.observations, rewards, self.running
