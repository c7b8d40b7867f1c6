"""What is given: the experiment file, environments, datasets, rollouts, scores and their statistics.

Shapes: n rows or transitions, O observation dimensions, A action dimensions, S members, K members of another
guidance, E episodes, R episodes that still run. Nothing here knows of torch.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import ctypes
import difflib
import faulthandler
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

import h5py  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import tomli
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    import gymnasium

Array: TypeAlias = npt.NDArray[Any]
Task = TypeVar("Task")
Found = TypeVar("Found")

GENERATOR = 1  # version of the collected data: raise it when the same settings would give other bytes
SHARD = 5_000  # transitions that one worker collects at a time


class MdptError(Exception):
    """A user's mistake: what, where, got and expected, what to do. Printed to stderr, exit code 1."""


def version() -> str:
    """The installed version; pyproject.toml is its only source."""
    return importlib.metadata.version("mdpt")


# --- the experiment file ----------------------------------------------------------------------------------------

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Widths = Annotated[list[Positive], Field(min_length=1, max_length=16)]
Activation = Literal["relu", "mish"]


class Section(BaseModel):
    """A table of the experiment file: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    """[data]: which transitions to learn from."""

    source: Literal["collect", "hdf5"] = Field("collect", description="roll out bundled agents, or read a D4RL file")
    environment: str = Field("HopperBulletEnv-v0", description="gymnasium id")
    reference: str | Annotated[tuple[float, float], Field(strict=False)] = Field(
        "bullet-hopper", description="D4RL family whose returns are scores 0 and 100, or [min, max]"
    )
    path: str | None = Field(None, description="the file, for source hdf5")
    transitions: Annotated[int, Field(ge=100)] = Field(200_000, description="environment steps to collect")
    levels: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = Field(
        [0.2, 0.4, 0.6, 0.8], description="perturbation of the agent's weights, drawn per episode; equal shares"
    )
    action_noise: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = Field(
        0.1, description="deviation of noise on collected actions; one for all levels, or a list with one for each"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of collection and of the choice of held-out episodes")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = Field(0.05, description="fraction of episodes kept from training")
    reward_scale: Literal["none", "return-range", "minus-one"] | Annotated[float, Field(gt=0)] = Field(
        "return-range", description="return-range: episode length / (best - worst return); minus-one; or a factor"
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> DataSection:
        if self.source == "hdf5" and self.path is None:
            raise ValueError("source 'hdf5' needs a path")
        if self.source == "collect" and self.path is not None:
            raise ValueError("path is only for source 'hdf5'")
        if self.transitions % len(self.levels):
            raise ValueError(f"transitions {self.transitions} cannot be shared equally by {len(self.levels)} levels")
        if isinstance(self.action_noise, list) and len(self.action_noise) != len(self.levels):
            raise ValueError(f"action_noise has {len(self.action_noise)} entries for {len(self.levels)} levels")
        return self


class TrainingSection(Section):
    """What guidance and policy training have in common."""

    steps: Positive = Field(20_000, description="gradient steps")
    batch_size: Positive = Field(256, description="transitions per step and member")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="of Adam at the start; cosine decay to 0")
    gradient_norm: Annotated[float, Field(gt=0)] = Field(10.0, description="limit per network and member")
    snapshots: Positive = Field(10, description="evenly spaced copies of the acting weights kept in the bundle")


class GuidanceSection(TrainingSection):
    """[guidance]: the value estimator."""

    algorithm: str = Field("idql", description="how values are learned, see below")
    hidden: Widths = Field([256, 256], description="hidden units of each layer")
    activation: Activation = Field("relu", description="of critics, V and companion actor")
    layer_norm: bool = Field(False, description="before each activation, of critics and V")
    discount: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="per environment step")
    expectile: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="of V, for idql (2110.06169, eq. 5)")
    tau: Annotated[float, Field(gt=0, le=1)] = Field(
        0.005, description="Polyak: target <- (1 - tau) target + tau online"
    )
    bootstrap_candidates: Positive = Field(1, description="dql: next actions of which the best counts")
    actor_hidden: Widths = Field([256, 256, 256], description="dql: hidden units of the companion actor")
    time_features: Annotated[int, Field(ge=2, multiple_of=2)] = Field(64, description="dql: as in [policy]")
    eta: Annotated[float, Field(ge=0)] = Field(1.0, description="dql: value weight in the companion actor's loss")
    diffusion_steps: Positive = Field(5, description="dql: of the companion actor")
    ema_decay: Fraction = Field(0.999, description="dql: of the companion actor's averaged weights, per step")


class PolicySection(TrainingSection):
    """[policy]: the diffusion model over actions."""

    algorithm: str = Field("dql", description="training objective, see below")
    scheme: Literal["guidance-first", "joint", "unguided"] = Field("guidance-first", description="when guidance learns")
    network: str | None = Field(None, description="mlp, or resnet; by default what the algorithm brings")
    hidden: Widths = Field([256, 256, 256], description="hidden units of each layer; resnet: of each residual block")
    activation: Activation = Field("mish", description="of the denoiser")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="in residual blocks")
    time_features: Annotated[int, Field(ge=2, multiple_of=2)] = Field(64, description="sinusoids of the diffusion step")
    diffusion_steps: Positive = Field(5, description="T")
    noise_schedule: Literal["vp", "cosine", "linear"] = Field("vp", description="betas; vp as in Diffusion-QL")
    sampler: Literal["ddpm", "dpm-solver++"] = Field("ddpm", description="ancestral, or DPM-Solver++ 2M")
    sampling_steps: Positive = Field(5, description="network calls of dpm-solver++, at most diffusion_steps")
    eta: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the guidance term (dac, dql, edp)")
    ema_decay: Fraction = Field(0.999, description="of the averaged weights that act, per step")
    label_dropout: Fraction = Field(0.1, description="cfg: share of labels dropped in training")
    advantage_weight: Literal["none", "expectile", "exponential"] = Field(
        "none", description="of transitions: bc, idql"
    )
    advantage_expectile: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="for advantage_weight expectile")
    advantage_inverse_temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="for advantage_weight exponential"
    )
    guidance_from: Fraction = Field(0.0, description="fraction of the run at which the guidance term begins")
    guidance_until: Fraction = Field(1.0, description="fraction of the run at which it ends")

    @model_validator(mode="after")
    def _fields_agree(self) -> PolicySection:
        if self.sampler == "dpm-solver++" and self.sampling_steps > self.diffusion_steps:
            raise ValueError(
                f"sampling_steps {self.sampling_steps} is more than diffusion_steps {self.diffusion_steps}"
            )
        if self.guidance_from > self.guidance_until:
            raise ValueError(f"guidance_from {self.guidance_from} is after guidance_until {self.guidance_until}")
        return self


class EvaluationSection(Section):
    """[evaluation]: how a policy is tried."""

    episodes: Positive = Field(10, description="per member")
    candidates: Positive = Field(10, description="actions drawn per state, of which the guidance takes one")
    selection: Literal["max", "softmax"] = Field("max", description="the best candidate, or a draw by value")
    weight_temperature: Annotated[float, Field(ge=0)] = Field(100.0, description="inverse temperature of the softmax")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="scale of the sampling noise")
    w: Annotated[float, Field(ge=0)] = Field(1.0, description="classifier-free guidance weight (cfg)")
    guide: Literal["rank", "gradient", "both"] = Field("rank", description="how guidance acts at inference")
    guidance_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the gradient, for gradient and both")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of start states and sampling noise")


class Experiment(Section):
    """The whole experiment file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "experiment", description="names files"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=256)] = Field(
        [0, 1, 2], description="one member each, trained side by side"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    data: DataSection = DataSection()
    guidance: GuidanceSection = GuidanceSection()
    policy: PolicySection = PolicySection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _seeds_differ(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; each member needs its own")
        return self


def load_experiment(path: Path, overrides: Sequence[str]) -> Experiment:
    """Read and check an experiment file; each override is "table.key=value", its value written as in TOML.

    Raises: MdptError naming file, table, key, value and what is allowed.
    """
    if not path.is_file():
        raise MdptError(f"{path}: no such experiment file; hopper.toml in the repository is one to start from")
    try:
        content = tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MdptError(f"{path}: is not TOML: {error}") from error
    return check_experiment(str(path), content, overrides)


def check_experiment(where: str, content: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a nest of tables under overrides. Raises: MdptError, one line for each mistake."""
    for override in overrides:
        _override(content, override)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise MdptError(_explain(where, error)) from error


def _override(content: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    *tables, key = (part.strip() for part in keys.split("."))
    if not equals or not key or len(tables) > 1:
        raise MdptError(f"--set {override}: expected table.key=value, such as policy.steps=5000")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text.strip()  # a bare word; its field says whether it is allowed
    target = content
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise MdptError(f"--set {override}: {table} is a key, not a table")
    target[key] = value


def _explain(path: str, error: ValidationError) -> str:
    """A line for each mistake: file, table, key, value, what is allowed, and for an unknown key the nearest one."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        section: type[BaseModel] = Experiment
        names = [*problem["loc"]]
        where = f"{path}:"
        if names and isinstance(table := getattr(Experiment(), str(names[0]), None), Section):
            section, where = type(table), f"{where} [{names.pop(0)}]"
        if names:  # what follows the key: the place in a list, or the branch of a union
            where += f" {names[0]}" + "".join(f"[{place}]" for place in names[1:] if isinstance(place, int))
        if not isinstance(problem["input"], dict):
            where += f" = {problem['input']!r}"
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if problem["type"] == "model_type":
            message = "should be a table"
        elif problem["type"] == "extra_forbidden":
            known = list(section.model_fields)
            near = difflib.get_close_matches(str(names[0]), known, n=1)
            message = "unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
        lines.setdefault(where, []).append(message)
    return "\n".join(f"{where.removesuffix(':')}: {', or '.join(messages)}" for where, messages in lines.items())


# --- environments -----------------------------------------------------------------------------------------------


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

    Raises: MdptError for an unknown id, spaces that are not flat boxes, actions that cannot be scaled from their
    bounds, or no time limit.
    """
    from gymnasium.spaces import Box

    environment = _make(environment_id)
    environment.close()
    observations: Any = environment.observation_space
    actions: Any = environment.action_space
    for name, space in (("observation", observations), ("action", actions)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
            raise MdptError(f"{environment_id}: its {name} space is {space}; only a Box with one axis can be learned.")
    if not np.issubdtype(actions.dtype, np.floating):
        raise MdptError(f"{environment_id}: its actions are {actions.dtype}, {actions}; only floats can be learned.")
    if environment.spec is None or not environment.spec.max_episode_steps:
        raise MdptError(f"{environment_id}: it has no time limit; register it with max_episode_steps.")
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
        raise MdptError(
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

    with _quiet(1, 2):
        for name in ("pybullet", "pybullet_envs_gymnasium"):  # the one announces itself, the other registers
            importlib.import_module(name)
    try:
        return gymnasium.make(environment_id, disable_env_checker=True, **options)
    except Exception as error:
        module, _, name = environment_id.rpartition(":")
        if module and isinstance(error, ImportError):
            hint = f"{_one_line(error)}. Install it, or put its folder on PYTHONPATH."
            raise MdptError(f"{environment_id}: the module {module} cannot be imported. {hint}") from error
        if name in gymnasium.registry:
            raise MdptError(f"{environment_id}: the environment cannot be made. {_one_line(error)}") from error
        near = difflib.get_close_matches(name, gymnasium.registry, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "Write 'module:Name-v0' for one that a module registers."
        raise MdptError(f"{environment_id}: no such environment is registered with gymnasium. {hint}") from error


def make_environment(environment_id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """An environment whose episodes depend on nothing but `reset(seed=...)` and the actions.

    PyBullet's first episode, in which it loads its bodies, differs from a later one with the same seed, so it is
    spent here.
    """
    environment = _make(environment_id, **options)
    environment.reset(seed=0)
    return environment


@contextlib.contextmanager
def _quiet(*streams: int) -> Iterator[None]:
    """Keep off the terminal what C code writes there, at file-descriptor level."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None
    flush(None)
    copies = [(stream, os.dup(stream)) for stream in streams]
    _silence(*streams)
    try:
        yield
    finally:
        flush(None)  # C buffers its lines when they go to a file or pipe; they must leave while it is quiet
        for stream, copy in copies:
            os.dup2(copy, stream)
            os.close(copy)


def _silence(*streams: int) -> None:
    with open(os.devnull, "wb") as sink:
        for stream in streams:
            os.dup2(sink.fileno(), stream)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# --- work in other processes ------------------------------------------------------------------------------------


class Watch:
    """What a worker is at, so that an environment that hangs can be named."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.doing, self.since, self.ended = seconds, "", float("inf"), False

    @contextlib.contextmanager
    def over(self, doing: str) -> Iterator[None]:
        """Say what begins, which may take `seconds`, and turn whatever goes wrong there into a line about it."""
        if self.ended:
            raise MdptError(f"{doing}: interrupted")
        self.doing, self.since = doing, time.monotonic()
        try:
            yield
        except MdptError:
            raise
        except BaseException as error:  # an environment may also exit, or interrupt itself
            raise MdptError(f"{doing}: the environment failed. {_one_line(error)}") from error
        finally:
            self.since = float("inf")

    @property
    def late(self) -> bool:
        return time.monotonic() - self.since > self.seconds


@dataclass(frozen=True)
class Workers:
    """Where work is done: in `count` processes here (1: in this one), or by the workers of a Dask scheduler.

    timeout: seconds that one step of an environment may take. cluster: the scheduler's address.
    """

    count: int = 1
    timeout: float = 600.0
    cluster: str | None = None


def parallel(
    work: Callable[[Task, Watch], Found], tasks: Iterable[Task], workers: Workers, total: int
) -> Generator[Found, None, None]:
    """work(task, watch) for each of `total` tasks, in their order. No process here outlives this one, even if killed.

    Raises: MdptError, also for an environment that fails or hangs, and for a worker that dies.
    """
    count = min(workers.count, total)
    if workers.cluster is not None:
        yield from _on_cluster(work, tasks, workers)
    elif count <= 1:
        for task in tasks:
            with _quiet(1):
                found = _watched(work, task, workers.timeout)
            yield found
    else:
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        warnings.filterwarnings("ignore", module=r"joblib\.parallel")  # of tasks given up where a command ends early
        begin = {"initializer": _begin_worker, "initargs": (os.getpid(),)}
        pool = joblib.Parallel(n_jobs=count, backend="loky", batch_size=1, return_as="generator", **begin)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is for the parent alone
        try:
            results = pool(joblib.delayed(_watched)(work, task, workers.timeout, backstop=True) for task in tasks)
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            yield from results
        except TerminatedWorkerError as error:
            raise MdptError(
                "a worker process ended unexpectedly: its environment ended it or hung, or memory ran out; --workers 1 "
                "plays in this process"
            ) from error


def _on_cluster(
    work: Callable[[Task, Watch], Found], tasks: Iterable[Task], workers: Workers
) -> Generator[Found, None, None]:
    """The same by Dask's workers, a few tasks ahead of what was taken; a task of a worker that is lost is repeated."""
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise MdptError("--cluster needs the package distributed: pip install 'mdpt[cluster]'") from error
    try:
        client = distributed.Client(workers.cluster, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MdptError(f"--cluster {workers.cluster}: no Dask scheduler answers there ({_one_line(error)})") from error
    with client:
        if not client.ncores():
            raise MdptError(f"--cluster {workers.cluster}: its scheduler has no workers yet; start some")
        ahead: collections.deque[Any] = collections.deque()
        for task in tasks:
            ahead.append(client.submit(_watched, work, task, workers.timeout, pure=False))
            if len(ahead) > 2 * sum(client.ncores().values()):
                yield _result_of(ahead.popleft())
        while ahead:
            yield _result_of(ahead.popleft())


def _result_of(future: Any) -> Any:
    distributed: Any = importlib.import_module("distributed")
    try:
        return future.result()
    except distributed.KilledWorker as error:
        raise MdptError("a task ended several workers of the cluster, one after the other; see their logs") from error
    except ImportError as error:
        raise MdptError(f"a worker of the cluster lacks a module: {_one_line(error)}; install it there") from error


def _begin_worker(parent: int) -> None:
    _silence(1)  # PyBullet writes there at each connection
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _watched(work: Callable[[Task, Watch], Found], task: Task, timeout: float, *, backstop: bool = False) -> Found:
    """work(task, watch) in a thread of its own, given up where the environment hangs.

    backstop: end this process where the environment hangs in C code that lets no other thread of Python run.
    """
    watch, found, failed, ended = Watch(timeout), [], [], threading.Event()

    def run() -> None:
        try:
            found.append(work(task, watch))
        except BaseException as error:  # noqa: BLE001 (raised again where the thread is waited for)
            failed.append(error)
        ended.set()

    def arm() -> None:
        if backstop:
            faulthandler.dump_traceback_later(2 * timeout, exit=True, file=1)  # where nothing is shown

    try:
        arm()
        threading.Thread(target=run, daemon=True).start()
        while not ended.wait(min(0.5, timeout / 4)):  # a join that Ctrl-C cuts short would take the thread for dead
            arm()
            if watch.late:
                raise MdptError(
                    f"{watch.doing}: took longer than {timeout:g} s; --timeout SECONDS says how long it may"
                )
    except KeyboardInterrupt:
        watch.ended = True  # the thread ends at its next step: Python aborts if it ends while one is inside torch
        ended.wait(5)
        raise
    faulthandler.cancel_dump_traceback_later()
    if failed:
        raise failed[0]
    return found[0]


# --- sources ----------------------------------------------------------------------------------------------------


def read_hdf5(path: Path, spec: EnvironmentSpec) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The checked arrays of a file in D4RL's format, and warnings.

    observations (n, O), actions (n, A), rewards (n,) and, where the file has it, next_observations (n, O) as
    float32; terminals and, where the file has it, timeouts (n,) as bool. Other keys are not read.

    Raises: MdptError that names the key and the first row at fault.
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
            raise MdptError(f"{path}: {key!r} holds {array.dtype}, expected numbers.")
        if not width and array.shape == (rows, 1):
            array = array[:, 0]
        if array.shape != expected:
            raise MdptError(f"{path}: {key!r} has shape {array.shape}, expected {expected} for {spec.id}.")
        if key in ("terminals", "timeouts"):
            _forbid(path, key, array, (array != 0) & (array != 1), "expected only 0 and 1")
            raw[key] = array.astype(np.bool_)
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
                raw[key] = array.astype(np.float32)
            _forbid(path, key, raw[key], ~np.isfinite(raw[key]), "expected finite numbers")
    if rows < 2:
        raise MdptError(f"{path}: {rows} row(s), expected at least 2.")

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
        raise MdptError(f"{path}: no such file.")
    try:
        readable = h5py.is_hdf5(path)
    except OSError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror}).") from error
    if not readable:
        raise MdptError(f"{path}: not an HDF5 file. Expected D4RL's format: observations, actions, rewards, terminals.")
    raw: dict[str, Array] = {}
    try:
        with h5py.File(path, "r") as file:
            for key in (*required, *optional):
                if key in file and isinstance(file[key], h5py.Dataset):
                    raw[key] = np.asarray(file[key][()])
                elif key in required:
                    found = ", ".join(sorted(map(str, file)))
                    raise MdptError(f"{path}: the key {key!r} is missing. It has: {found or 'none'}.")
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:  # h5py, where damaged
        raise MdptError(f"{path}: a truncated or damaged HDF5 file; get it again. {_one_line(error)}") from error
    return raw


def _forbid(path: Path, key: str, array: Array, bad: Array, expected: str) -> None:
    if bad.any():
        row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
        raise MdptError(f"{path}: {key!r} row {row} is {array[row].tolist()}, {expected}.")


# --- columns ----------------------------------------------------------------------------------------------------


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
    columns = {key: raw[key][rows] for key in ("observations", "actions", "rewards", "terminals")}
    return columns | {"next_observations": next_observations, "rows": rows}


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
    section: DataSection, workers: Workers = Workers(), progress: Callable[[int], None] | None = None
) -> Dataset:
    """Read a D4RL-format file ("hdf5"), or roll one out first ("collect"), and make it ready for training.

    workers, progress: as for `collect_dataset`.

    Raises: MdptError for a mistake in any of it.
    """
    if section.source == "collect":
        path = collect_dataset(section, workers, progress)
    else:
        path = Path(section.path or "")
    spec = environment_spec(section.environment)
    raw, warnings = read_hdf5(path, spec)
    timeouts = mark_timeouts(raw, spec.max_episode_steps)
    lengths, complete, episode_returns = _judge_episodes(raw, timeouts, spec, collected=section.source == "collect")
    scale = _reward_scale(section.reward_scale, episode_returns, spec.max_episode_steps)
    rewards = (raw["rewards"] * float(scale["multiplier"]) + float(scale["offset"])).astype(np.float32)

    chosen = _choose_episodes(complete, section.held_out, section.seed)
    held_out = np.repeat(chosen, lengths)  # (rows,)
    if section.held_out > 0 and not chosen.any():
        warnings += (f"{path}: a single episode, so none is held out.",)

    actions = scale_actions(raw["actions"], spec)
    transitions = build_transitions(raw | {"rewards": rewards, "actions": actions}, spec.max_episode_steps)
    train = ~held_out[transitions.pop("rows")]
    if not train.any():
        raise MdptError(
            f"{path}: no transition is left to train on; lower held_out (now {section.held_out}) or add episodes."
        )
    if not train.all():
        transitions = {key: array[train] for key, array in transitions.items()}
    return Dataset(
        environment=spec,
        **transitions,
        held_out=HeldOut(
            raw["observations"][held_out],
            actions[held_out],
            rewards[held_out],
            raw["terminals"][held_out],
            timeouts[held_out],
        ),
        episode_returns=episode_returns,
        reward_scale=scale,
        identity={
            "source": section.source,
            "name": path.name,
            "transitions": len(timeouts),
            "hash": _content_hash(raw),
        },
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
            raise MdptError("reward_scale 'return-range': all returns are equal; choose 'none' or a number.")
        return {"rule": rule, "multiplier": max_episode_steps / spread, "offset": 0.0}
    return {"rule": "number", "multiplier": float(rule), "offset": 0.0}


def _content_hash(raw: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for key in sorted(raw):
        digest.update(f"{key} {raw[key].shape} {raw[key].dtype.str}\n".encode())
        digest.update(np.ascontiguousarray(raw[key]).data)
    return digest.hexdigest()


# --- collecting -------------------------------------------------------------------------------------------------


def collect_dataset(
    section: DataSection,
    workers: Workers = Workers(),
    progress: Callable[[int], None] | None = None,
    cache: Path | None = None,
) -> Path:
    """Roll out PyBullet's bundled agent with perturbed weights into a D4RL-format file, or find it in the cache.

    The file depends on the environment and the settings only, not on `workers`. The cache is `cache`, else
    $MDPT_CACHE, else mdpt in $XDG_CACHE_HOME or ~/.cache. progress counts transitions.

    Raises: MdptError without an agent for this environment, a damaged cached file.
    """
    share = section.transitions // len(section.levels)
    agent = _bundled_agent(section.environment)
    settings = section.model_dump(include={"environment", "transitions", "levels", "action_noise", "seed"})
    made_by = settings | {"generator": GENERATOR}
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', section.environment)}-{digest}.hdf5"
    path = (cache or _cache_folder()) / name
    if path.exists():
        _check_cached(path, section.transitions)
        return path

    spec = environment_spec(section.environment)
    if (wide := (agent[0].shape[0], agent[-1].shape[0])) != (spec.observation_dim, spec.action_dim):
        raise MdptError(f"{spec.id}: its agent takes {wide[0]} observations and gives {wide[1]} actions.")
    noise = np.broadcast_to(section.action_noise, len(section.levels)).tolist()
    shards = [
        Shard(spec, agent, sigma, noise[level], min(SHARD, share - start), (section.seed, level, index))
        for level, sigma in enumerate(section.levels)
        for index, start in enumerate(range(0, share, SHARD))
    ]
    try:
        make_writable_folder(path.parent)
    except OSError as error:
        raise MdptError(
            f"{path.parent}: cannot be written ({error.strerror}); set MDPT_CACHE to another folder"
        ) from error
    parts: list[dict[str, Array]] = []
    for part in parallel(collect_shard, shards, workers, len(shards)):
        parts.append(part)
        if progress:
            progress(sum(len(part["rewards"]) for part in parts))
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    arrays["infos/level"] = np.repeat(np.array(section.levels, dtype=np.float32), share)
    versions = {name: importlib.metadata.version(name) for name in ("pybullet", "pybullet_envs_gymnasium", "numpy")}
    _write_hdf5(path, arrays, made_by | versions)
    return path


@dataclass(frozen=True)
class Shard:
    """A worker's share of the rows of one level: weights perturbed by sigma, actions by noise, in the environment's unit."""

    spec: EnvironmentSpec
    agent: list[Array]
    sigma: float
    noise: float
    size: int
    seed: tuple[int, ...]


def collect_shard(shard: Shard, watch: Watch) -> dict[str, Array]:
    """Play whole episodes, cutting the last at the shard's end: rows in D4RL's format."""
    spec, size, low_high = shard.spec, shard.size, _bounds(shard.spec)
    random = np.random.default_rng(np.random.SeedSequence(shard.seed))
    observations = np.empty((size, spec.observation_dim), dtype=np.float32)
    actions = np.empty((size, spec.action_dim), dtype=np.float32)
    rewards = np.empty(size, dtype=np.float32)
    terminals, timeouts = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    row, doing = 0, f"collecting in {spec.id}"
    with watch.over(doing):
        environment = make_environment(spec.id)
    while row < size:
        weights = [w * (1 + np.float32(shard.sigma) * random.standard_normal(w.shape, np.float32)) for w in shard.agent]
        noise = random.standard_normal((spec.max_episode_steps, spec.action_dim), np.float32)
        noise *= np.float64(shard.noise)  # a float would round the factor first, and give other data
        with watch.over(doing):
            observation, _ = environment.reset(seed=int(random.integers(2**31)))
        for step in range(min(spec.max_episode_steps, size - row)):
            observations[row] = observation
            actions[row] = action = np.clip(_agent_action(weights, observations[row]) + noise[step], *low_high)
            with watch.over(doing):
                observation, rewards[row], terminals[row], timeout, _ = environment.step(action)
            row += 1
            if terminals[row - 1] or timeout:
                break
        timeouts[row - 1] = not terminals[row - 1]
    with watch.over(doing):
        environment.close()
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
    raise MdptError(f"{path}: this cached dataset is damaged; delete the file, and it will be collected again.")


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
        raise MdptError(f"{path}: cannot be written ({_one_line(error)}).") from error
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
        raise MdptError(f"{environment_id}: no agent is bundled with PyBullet for it. It has: {', '.join(files)}.")
    layers: dict[str, Array] = {}
    for node in ast.parse(files[environment_id].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.targets[0])
            if name.startswith("weights_"):
                layers[name] = np.array(ast.literal_eval(node.value.args[0]), dtype=np.float32)
    return [layers[f"weights_{layer}_{part}"] for layer in ("dense1", "dense2", "final") for part in "wb"]


# --- rollouts ---------------------------------------------------------------------------------------------------

Act: TypeAlias = Callable[[Array, Array], Array]


def rollout(
    act: Act,
    spec: EnvironmentSpec,
    episodes: Sequence[int],
    *,
    seed: int,
    watch: Watch | None = None,
    look: Callable[[int, float, Array], None] | None = None,
    every: int = 1,
) -> tuple[Array, Array]:
    """Play numbered episodes side by side: raw returns (E,) float64 and lengths (E,) int64 in steps.

    act: observations (R, O) float32 of the episodes that still run, their places (R,) in `episodes` -> actions (R, A)
    in [-1, 1], which are scaled back to the bounds. An episode starts from the state of its number. Every reward
    counts, the last step's included, and nothing after the end. look: shown steps, return so far and a frame
    (height, width, 3) uint8 of the first episode, `every` so many steps and at its end.

    Raises: MdptError for actions that are not finite or of another shape, for an environment that fails or cannot be
    filmed.
    """
    watch = watch or Watch(float("inf"))
    count = len(episodes)
    observations = np.empty((count, spec.observation_dim), dtype=np.float32)
    returns, lengths, running = np.zeros(count), np.zeros(count, dtype=np.int64), np.arange(count)
    environments: list[gymnasium.Env[Any, Any]] = []

    def show(place: int) -> None:
        if look is not None and place == 0:
            with watch.over(f"{spec.id}: episode {episodes[0]}, a frame after step {lengths[0]}"):
                frame = _frame(environments[0], spec.id)
            look(int(lengths[0]), float(returns[0]), frame)

    for place, episode in enumerate(episodes):
        with watch.over(f"{spec.id}: episode {episode}"):
            environments.append(make_environment(spec.id, **({"render_mode": "rgb_array"} if look else {})))
            observations[place], _ = environments[place].reset(seed=_start(seed, episode))
        show(place)
    while len(running):
        actions = np.asarray(act(observations[running], running))
        if actions.shape != (expected := (len(running), spec.action_dim)):
            raise MdptError(f"act: actions of shape {actions.shape}, expected {expected}.")
        if not np.isfinite(actions).all():
            raise MdptError("the policy chose an action that is not finite; its training has diverged.")
        ended = np.zeros(len(running), dtype=np.bool_)
        scaled = unscale_actions(actions.clip(-1, 1), spec)
        for i, (place, action) in enumerate(zip(running.tolist(), scaled, strict=True)):
            with watch.over(f"{spec.id}: episode {episodes[place]}, step {lengths[place] + 1}"):
                observations[place], reward, terminal, timeout, _ = environments[place].step(action)
            returns[place] += reward
            lengths[place] += 1
            ended[i] = terminal or timeout
            if lengths[place] % every == 0 or ended[i]:
                show(place)
        running = running[~ended]
    for episode, environment in zip(episodes, environments, strict=True):
        with watch.over(f"{spec.id}: the end of episode {episode}"):
            environment.close()
    return returns, lengths


def _start(seed: int, episode: int) -> int:
    """What an episode's environment is reset with."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def _frame(environment: Any, name: str) -> Array:
    try:
        frame: Any = environment.render()
    except Exception as error:
        raise MdptError(f"{name} cannot be filmed off-screen. {_one_line(error)}") from error
    if np.ndim(frame) != 3:
        modes = ", ".join(environment.metadata.get("render_modes") or ()) or "none"
        raise MdptError(f"{name} cannot be filmed: it needs render mode rgb_array, and has {modes}.")
    return np.asarray(frame, dtype=np.uint8)


# --- scores -----------------------------------------------------------------------------------------------------


def reference_returns(reference: str | tuple[float, float]) -> tuple[float, float]:
    """The raw returns that stand for 0 and for 100: of a D4RL family, a full D4RL name, or the pair itself.

    A family is what comes before the dataset's kind: "bullet-hopper" for bullet-hopper-medium-v0.

    Raises: MdptError for an unknown name, a family whose tasks differ in reference, or min >= max.
    Source: d4rl/infos.py (arXiv 2004.07219).
    """
    if not isinstance(reference, str):
        low, high = reference
        if not low < high:
            raise MdptError(f"reference: [{low}, {high}] must be [min, max] with min < max.")
        return float(low), float(high)
    found = importlib.util.find_spec("d4rl")
    if found is None or not found.submodule_search_locations:
        raise MdptError(f"reference {reference!r}: D4RL's table is not installed; give [min, max] instead.")
    # Its own file only: importing the package would look for MuJoCo and complain.
    infos = runpy.run_path(str(Path(found.submodule_search_locations[0], "infos.py")))
    table = {name: (float(low), float(infos["REF_MAX_SCORE"][name])) for name, low in infos["REF_MIN_SCORE"].items()}
    if reference in table:
        return table[reference]
    family = [name for name in table if re.fullmatch(re.escape(reference) + r"-.+-v\d+", name)]
    if len({table[name] for name in family}) > 1:
        raise MdptError(f"reference {reference!r}: its tasks differ in reference; name one, such as {family[0]!r}.")
    if not family:
        families = sorted({re.sub(r"-[^-]+(-expert|-replay)?-v\d+$", "", name) for name in table})
        near = difflib.get_close_matches(reference, families, n=3, cutoff=0.3) or families
        raise MdptError(f"reference {reference!r}: unknown to D4RL. Nearest: {', '.join(near)}. Or give [min, max].")
    return table[family[0]]


def normalized_score(returns: Array, reference: tuple[float, float]) -> Array:
    """Raw returns on the scale where the reference's min is 0 and its max is 100. Source: arXiv 2004.07219, eq. 1."""
    low, high = reference
    return np.asarray(100 * (np.asarray(returns, dtype=np.float64) - low) / (high - low))


def summarize(scores: Array) -> dict[str, Any]:
    """Statistics of scores, 0 to 100: median, IQR, IQM with a bootstrap 95 % interval, mean, standard deviation.

    scores: (S,) of the members of a policy, or (S, K) with K members of a guidance, nan where there is no such pair.
    IQR and standard deviation as in `spread`; of a single policy member, over those of the guidance.
    Source: interquartile mean and interval as in rliable (arXiv 2108.13264); the interval resamples members.
    """
    from scipy import stats

    def interquartile_mean(values: Array) -> Any:
        return stats.trim_mean(values, 0.25, axis=-1, nan_policy="omit")

    table = scores.reshape(len(scores), -1)
    table = table[~np.isnan(table).all(1)]
    values = table[~np.isnan(table)]
    interval = None
    if len(table) > 1:
        interval = bootstrap(table, lambda rows, columns: interquartile_mean(flat(pick(table, rows, columns)))).tolist()
    iqr, std = spread(table if len(table) > 1 else table.T)
    return {
        "members": len(table),
        "median": float(np.median(values)),
        "iqr": float(iqr),
        "iqm": float(interquartile_mean(values)),
        "iqm_interval": interval,
        "mean": float(values.mean()),
        "std": float(std) if len(values) > 1 else None,
    }


def spread(table: Array) -> tuple[Any, Any]:
    """IQR and standard deviation of pairs of members that share none, in tables of scores (..., S, K): each (...).

    Policy member i is paired with guidance member (i + k) modulo K, and what these S scores show is averaged over
    k = 0 .. K - 1: so crossed members are judged on as many scores at a time, and as independent ones, as members
    paired once. nan is left out. Quartiles are interpolated linearly, as numpy does.
    """
    count, width = table.shape[-2:]
    rows = np.arange(count)[:, None]
    ordered = np.sort(table[..., rows, (rows + np.arange(width)) % width], axis=-2)  # (..., S, K), nan last
    # numpy's nanpercentile goes through a bootstrap's tables one by one, twenty times slower than this
    last = (~np.isnan(ordered)).sum(axis=-2, keepdims=True) - 1  # (..., 1, K); -1: all nan

    def quantile(share: float) -> Any:
        place = share * last
        below = np.floor(place).astype(np.int64)
        low, high = (np.take_along_axis(ordered, index, axis=-2) for index in (below, np.minimum(below + 1, last)))
        return (low + (place - below) * (high - low))[..., 0, :]

    with warnings.catch_warnings():  # of a k without any pair, or with one alone
        warnings.simplefilter("ignore", RuntimeWarning)
        deviation = np.nanstd(ordered, axis=-2, ddof=1)
        return np.nanmean(quantile(0.75) - quantile(0.25), axis=-1), np.nanmean(deviation, axis=-1)


def bootstrap(table: Array, statistic: Callable[..., Any]) -> Array:
    """95 % percentile bootstrap interval (2, ...) of statistic(rows, columns), for a table of scores (S, K).

    rows (..., S) are members of the policy, drawn with replacement; columns (..., K) likewise of the guidance.
    """
    from scipy import stats

    count, width = table.shape

    def of_draws(rows: Array, *columns: Array, axis: int) -> Any:
        return statistic(rows, *columns or [np.zeros(1, dtype=np.int64)])

    with warnings.catch_warnings():  # a draw may hold no pair at all, or one value alone
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.bootstrap(
            [np.arange(size) for size in ((count, width) if width > 1 else (count,))],
            of_draws,
            vectorized=True,
            method="percentile",
            n_resamples=9_999 if width == 1 else 2_000,
            batch=max(1, 10_000_000 // (count * count * width)),
            rng=np.random.default_rng(0),
        )
    ends: Array = np.nanquantile(found.bootstrap_distribution, [0.025, 0.975], axis=-1)
    return ends


def pick(table: Array, rows: Array, columns: Array) -> Array:
    """The scores of drawn members, (..., S, K)."""
    return table[rows[..., :, None], columns[..., None, :]]


def flat(table: Array) -> Array:
    return table.reshape(*table.shape[:-2], -1)  # (..., S K)


def compare(own: Array, swapped: Array) -> dict[str, Any]:
    """How scores change against those under the guidance of training.

    own: (S,), the baseline of each policy member. swapped: (S, K), that member's scores under other guidance members,
    nan where there is none. Changes of median, IQR and standard deviation (as in `spread`) are swapped minus own, in
    points of score; iqr_percent is 100 (IQR swapped - IQR own) / IQR own; improvement is the probability that a swapped
    score beats an own one, ties counting half (arXiv 2108.13264). Intervals as in `bootstrap`; a policy member's own
    and swapped scores are drawn together.
    """

    def changes(rows: Array, columns: Array) -> Array:
        mine, drawn = own[rows], pick(swapped, rows, columns)  # (..., S), (..., S, K)
        other, (iqr, std), (own_iqr, own_std) = flat(drawn), spread(drawn), spread(mine[..., None])
        wins = (np.sign(other[..., :, None] - mine[..., None, :]) + 1) / 2
        medians = np.nanmedian(other, axis=-1) - np.median(mine, axis=-1)
        return np.stack([medians, iqr - own_iqr, std - own_std, np.nanmean(wins, axis=(-2, -1))])

    if len(own) < 2:
        return {"median": float(np.nanmedian(swapped) - own[0])}
    names = ("median", "iqr", "std", "improvement")
    found = dict(zip(names, changes(*map(np.arange, swapped.shape)).tolist(), strict=True))
    base = float(spread(own[:, None])[0])
    return {
        **found,
        "iqr_percent": 100 * found["iqr"] / base if base > 0 else None,
        "intervals": dict(zip(names, bootstrap(swapped, changes).T.tolist(), strict=True)),
    }


def tabulate(pairs: Sequence[dict[str, Any]], members: int) -> Array:
    """Scores by policy member and guidance seed, (S, K), nan where there is no such pair.

    Where members are paired one to one, K = 1: they are drawn as pairs, not apart.
    """
    columns = list(dict.fromkeys(pair["guidance_seed"] for pair in pairs))
    table = np.full((members, len(columns)), np.nan)
    for pair in pairs:
        table[pair["policy_member"], columns.index(pair["guidance_seed"])] = pair["score"]
    known = ~np.isnan(table)
    return table if known.sum(1).max() > 1 else np.where(known.any(1), np.nansum(table, 1), np.nan)[:, None]


def probability_of_improvement(first: Array, second: Array) -> tuple[float, tuple[float, float] | None]:
    """How often a score of `first` (S,) beats one of `second` (K,), ties counting half, and its 95 % interval.

    The members of each are drawn apart, as in `bootstrap`. Source: arXiv 2108.13264.
    """
    wins = (np.sign(first[:, None] - second[None, :]) + 1) / 2  # (S, K)
    if min(wins.shape) < 2:
        return float(wins.mean()), None
    low, high = bootstrap(wins, lambda rows, columns: pick(wins, rows, columns).mean(axis=(-2, -1)))
    return float(wins.mean()), (float(low), float(high))
