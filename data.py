"""What is given: the experiment file, environments and rollouts, sources of data, datasets. Nothing here imports torch.

Shapes: n rows or transitions, O observation dimensions, A action dimensions, E episodes, R episodes that still run.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import ctypes
import difflib
import faulthandler
import glob
import hashlib
import http.client
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import multiprocessing.connection
import os
import pickle
import platform
import random
import re
import runpy
import signal
import stat
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, Self, TextIO, TypeAlias, TypeVar, cast

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

import h5py  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import tomli
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    import gymnasium

# --- errors, files, the cache -------------------------------------------------------------------------------------

Array: TypeAlias = npt.NDArray[Any]
Task = TypeVar("Task")
Result = TypeVar("Result")

Show: TypeAlias = Callable[[str, int, int], None]  # shows progress: what is done, how far, of how much (0: unknown)
OTHER_CACHE = "set MDPT_CACHE to another folder"


def printable(text: str) -> str:
    """Escape characters that could control a terminal or cannot be encoded; for the content and the names of files."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class MdptError(Exception):
    """A user's mistake: what, where, got and expected, what to do. Printed to stderr; `code` is the exit code."""

    code = 1

    def __str__(self) -> str:
        return printable(super().__str__())  # also where Python prints it


class Interrupted(MdptError):
    """A signal ended the run. The text says what is kept; the exit code is 128 + the number of the signal."""

    def __init__(self, text: str = "interrupted", number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.code = 128 + number


class MdptWarning(UserWarning):
    """What a function of this package reports while it goes on; the command line prints it as `warning: ...`."""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def on_signals(act: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call `act` on SIGINT, SIGTERM or SIGHUP inside this block. A signal that is ignored, as by `nohup`, stays so.

    Outside the main thread, where Python gets no signals, this does nothing.
    """
    numbers = ENDS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def version() -> str:
    """The version of the installed package; pyproject.toml is its only source."""
    return importlib.metadata.version("mdpt")


@contextlib.contextmanager
def written_whole(path: Path, remedy: str) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to, and rename it to `path` at the end of the block.

    Of a symbolic link, the file that it points to is written. If the block fails, the temporary file is removed. So are
    those that killed processes of this machine left.
    Raises: MdptError that ends with `remedy`, where writing raises OSError or RuntimeError (a library's full disk).
    """
    try:
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)  # still there only if something failed
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it could not be stored; is the disk full?"
        raise MdptError(f"{path}: cannot be written ({reason}); {remedy}") from error


def temporary_beside(path: Path) -> Path:
    """Create an empty file beside `path`, named after this machine and process; remove those of dead processes.

    Raises: OSError.
    """
    start = f".{path.name}.{platform.node()}."  # a process id says nothing about another machine's processes
    for left in path.parent.glob(f"{glob.escape(start)}*.tmp"):
        number = left.name.removeprefix(start).partition(".")[0]
        if os.name == "posix" and number.isdecimal() and not is_alive(int(number)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{start}{os.getpid()}.{os.urandom(4).hex()}.tmp")
    temporary.touch(exist_ok=False)
    return temporary


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which need not exist; the lock ends when this process ends.

    The lock is on the file `.NAME.lock` beside it, which holds the process id and is removed at the end of the block.
    busy: called with the process id of the holder again and again, until the lock is free or `busy` raises.
    Raises: OSError. Windows has no such locks: nothing is held there.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
            if holder := _lock_or_holder(file):
                busy(holder)
                time.sleep(0.2)
                continue
            try:
                removed = not os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                removed = True
            if removed:  # by its holder, after this process opened it
                continue
            try:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _lock_or_holder(file: TextIO) -> str:
    """Lock a file and return "", or return the process id of its holder ("?" if it does not say)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return file.read() or "?"
    except OSError:  # a file system without locks: only the process id in the file can tell
        number = file.read()
        file.seek(0)
        return number if number.isdecimal() and int(number) != os.getpid() and is_alive(int(number)) else ""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends no signal
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process
        pass
    return True


def _cache_folder() -> Path:
    if folder := os.environ.get("MDPT_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mdpt")
    except RuntimeError as error:  # neither HOME nor an entry for this user
        raise MdptError(f"this user has no home folder for the cache; {OTHER_CACHE}") from error


def working_folder() -> Path:
    """Raises: MdptError where it was deleted, or may not be read."""
    try:
        return Path.cwd()
    except OSError as error:
        raise MdptError(f"the working folder is gone ({error.strerror}); change to another one") from error


def why_unreadable(path: Path, missing: str) -> str:
    """Why a path is no file to read, "" if it is one. missing: what to say where nothing is there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return missing
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is a folder" if stat.S_ISDIR(mode) else "" if stat.S_ISREG(mode) else missing


def make_writable_folder(folder: Path) -> None:
    """Make a folder and write a test file, so that a problem shows before hours of work. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def making(path: Path, show: Show) -> Iterator[bool]:
    """Lock a file of the cache, waiting for other processes; gives whether the file still has to be made.

    Raises: MdptError for a folder that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            make_writable_folder(path.parent)
            stack.enter_context(locked(path, lambda holder: show(f"wait for process {holder}", 0, 0)))
        except OSError as error:
            raise MdptError(f"{path.parent}: cannot be written ({error.strerror}); {OTHER_CACHE}") from error
        yield not path.exists()


def check_memory(needed: int, remedy: str) -> None:
    """Raises: MdptError where this many bytes of transitions cannot be allocated."""
    if needed > (free := free_memory()):
        raise MdptError(
            f"{needed / 1e9:.1f} GB of transitions do not fit into {free / 1e9:.1f} GB of free memory; {remedy}"
        )


def free_memory() -> float:
    """Bytes that can be allocated without swapping; infinite where the system does not say."""
    try:
        return 1024.0 * int(Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0])
    except (OSError, LookupError, ValueError):
        return math.inf


# --- the experiment file ------------------------------------------------------------------------------------------


def _check_size(value: float) -> float:
    if value >= 2**63:  # the integers of TOML, HDF5 and torch end there, and float32 has room to multiply below it
        raise ValueError("should be below 2 ** 63, that is 9.2e18")
    return value


Whole = Annotated[int, Field(ge=0), AfterValidator(_check_size)]
Positive = Annotated[int, Field(ge=1), AfterValidator(_check_size)]
Few = Annotated[int, Field(ge=1, le=10_000)]  # for sizes that memory grows with
Many = Annotated[int, Field(ge=1, le=1_000_000)]
Amount = Annotated[float, Field(ge=0), AfterValidator(_check_size)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Widths = Annotated[list[Few], Field(min_length=1, max_length=16)]
Features = Annotated[int, Field(ge=2, le=1_000, multiple_of=2)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Rate = Annotated[float, Field(gt=0)]
Activation = Literal["relu", "mish"]

# Arguments of gymnasium.make itself, which environment_kwargs may not contain.
MAKE_ARGUMENTS = {"id", "environment_id", "max_episode_steps", "disable_env_checker", "render_mode"}


class Section(BaseModel):
    """A table of the experiment file: frozen, strictly typed, without unknown keys.

    A field whose default is not what mdpt did before the field existed says what it did, in its
    `json_schema_extra={"before": ...}`; see `experiment_as_stored`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    """[data]: the transitions to learn from."""

    source: Literal["collect", "hdf5", "d4rl", "minari", "arrays"] = Field(
        "collect",
        description="where the data come from; by default as path or dataset tell (with a slash minari, else d4rl)",
    )
    dataset: str | None = Field(None, description="name of the dataset, for sources d4rl and minari")
    path: str | None = Field(None, description="the file, for source hdf5; relative to the experiment file")
    environment: str | None = Field(None, description="gymnasium id; by default the source's; else scores are offline")
    environment_kwargs: dict[str, Any] = Field({}, description="keyword arguments of the environment")
    max_episode_steps: Many | None = Field(None, description="time limit; by default the environment's")
    observation_columns: Positive | None = Field(None, description="use only this many leading observation columns")
    observation_keys: list[str] = Field([], description="parts of Dict observations, in order; by default all, by name")
    action_range: Pair | list[Pair] | None = Field(
        None, description="bounds of actions without an environment, or a pair for each; else the source's, or [-1, 1]"
    )
    keep_timeouts: bool = Field(
        False, description="without next_observations, keep time limits' rows, as if they stayed"
    )
    reference: str | Pair | None = Field(
        None,
        description="returns that are scores 0 and 100: a D4RL family or [min, max]; by default the source's own; "
        "without any, scores are returns",
    )
    transitions: Annotated[int, Field(ge=100, le=10**10)] = Field(200_000, description="environment steps to collect")
    levels: Annotated[list[Amount], Field(min_length=1)] = Field(
        [0.2, 0.4, 0.6, 0.8], description="perturbations of the agent's weights, drawn per episode; equal shares"
    )
    action_noise: Amount | list[Amount] = Field(
        0.1, description="standard deviation of the noise on collected actions; a number, or a list with one per level"
    )
    seed: Whole = Field(0, description="seed of collection and of the choice of episodes")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="fraction of the whole episodes to use")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = Field(0.05, description="fraction of these kept from training")
    reward_scale: Literal["none", "return-range", "minus-one"] | Rate | Pair | None = Field(
        None,
        description="return-range: time limit (IQL: 1000) / (best - worst return); minus-one; none; a factor; or [factor, "
        "offset]; by default the source's own, else return-range",
    )
    normalization: Literal["gaussian", "none"] = Field("gaussian", description="of observations, before networks")
    storage: Literal["memory", "disk"] = Field("memory", description="disk: for more transitions than memory holds")
    horizon: Annotated[int, Field(ge=1, le=1_000)] = Field(
        1, description="actions in a window: what a policy generates and a guidance values at once"
    )

    @model_validator(mode="before")
    @classmethod
    def _source_follows(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "source" in given:
            return given
        if given.get("path") is not None:
            return given | {"source": "hdf5"}
        if (dataset := given.get("dataset")) is not None:
            return given | {"source": "minari" if "/" in str(dataset) else "d4rl"}
        return given

    @model_validator(mode="after")
    def _source_is_complete(self) -> DataSection:
        problems = []
        for key, needed in (("path", ("hdf5",)), ("dataset", ("d4rl", "minari"))):
            if self.source in needed and getattr(self, key) is None:
                problems.append(f"source {self.source!r} needs a {key}")
            if self.source not in needed and getattr(self, key) is not None:
                problems.append(f"{key} is only for source {' and '.join(map(repr, needed))}")
        if self.environment_kwargs and self.environment is None:
            problems.append("environment_kwargs need an environment")
        if own := sorted(self.environment_kwargs.keys() & MAKE_ARGUMENTS):
            problems.append(f"environment_kwargs has {own[0]!r}, which is gymnasium.make's own")
        try:
            json.dumps(self.environment_kwargs, allow_nan=False)
        except (RecursionError, TypeError, ValueError):
            problems.append("environment_kwargs may hold finite numbers, text, lists and tables, not nested too deep")
        if self.transitions % len(self.levels):
            problems.append(f"transitions {self.transitions} cannot be shared equally by {len(self.levels)} levels")
        if isinstance(self.action_noise, list) and len(self.action_noise) != len(self.levels):
            problems.append(f"action_noise has {len(self.action_noise)} entries for {len(self.levels)} levels")
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = np.array(self.action_range or (-1, 1), dtype=np.float32).reshape(-1, 2).T
            sound = (low < high) & np.isfinite(high - low)
        if not sound.all():
            wrong = json.dumps(self.action_range)
            problems.append(f"action_range {wrong}: expected [low, high] with low < high, or a list of such pairs")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TrainingSection(Section):
    """What the training of guidance and of policies have in common."""

    steps: Annotated[int, Field(ge=1, le=10**9)] = Field(20_000, description="gradient steps")
    batch_size: Many = Field(256, description="transitions per step and member")
    learning_rate: Rate = Field(3e-4, description="initial learning rate of Adam")
    decay: Literal["cosine", "none"] = Field("cosine", description="of the learning rate, to 0 at the last step")
    weight_decay: Amount = Field(0.0, description="decoupled, as in AdamW (1711.05101)")
    gradient_norm: Amount = Field(10.0, description="largest gradient norm per network and member; 0: no limit")
    save_every: Amount = Field(60.0, description="seconds between saves of an unfinished bundle")
    snapshots: Few = Field(10, description="evenly spaced copies of the acting weights kept in the bundle")


class GuidanceSection(TrainingSection):
    """[guidance]: the value estimator."""

    learning_rate: Rate = Field(1e-3, description="initial learning rate of Adam")
    algorithm: str = Field("idql", description="how values are learned, see below")
    hidden: Widths = Field([256, 256], description="hidden units of each layer of critics and V")
    activation: Activation = Field("relu", description="of critics, V and companion actor")
    layer_norm: bool | Literal["tanh"] = Field(
        True, description="before each activation of critics and V; tanh: before the first only, which is tanh then"
    )
    discount: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="per environment step")
    value_loss: Literal["expectile", "quantile", "gumbel"] = Field("expectile", description="loss of the V regression")
    expectile: Inside = Field(0.7, description="expectile of the V regression, or its quantile for value_loss quantile")
    gumbel_temperature: Rate = Field(1.0, description="temperature of value_loss gumbel (2301.02328)")
    value_learning_rate: Rate | None = Field(None, description="learning rate of V; by default learning_rate")
    tau: Annotated[float, Field(gt=0, le=1)] = Field(0.005, description="target <- (1 - tau) target + tau online")
    target_every: Positive = Field(1, description="gradient steps between updates of target networks")
    conservatism: Amount = Field(
        1.0,
        description="weight of the loss that lowers Q at actions that the data do not contain (2006.04779); 0: none",
        json_schema_extra={"before": 0.0},
    )
    conservative_actions: Few = Field(
        4, description="such actions per state; half the data's action plus noise, half uniform"
    )
    conservative_noise: Amount = Field(0.3, description="deviation of that noise, of actions in [-1, 1]")
    conservative_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="fraction of a batch's states where it is computed"
    )
    bootstrap_candidates: Few = Field(1, description="next actions drawn per state; the target takes the best of them")
    actor_learning_rate: Rate | None = Field(None, description="of the companion actor; by default learning_rate")
    actor_hidden: Widths = Field([256, 256, 256], description="hidden units of each layer of the companion actor")
    time_features: Features = Field(64, description="sinusoidal features of the diffusion step, in the companion actor")
    eta: Amount = Field(1.0, description="weight of Q in the loss of the companion actor")
    diffusion_steps: Few = Field(5, description="diffusion steps of the companion actor")
    ema_decay: Fraction = Field(0.999, description="decay of the companion actor's averaged weights, per gradient step")


class PolicySection(TrainingSection):
    """[policy]: the diffusion model over actions."""

    algorithm: str = Field("dql", description="training objective, see below")
    scheme: Literal["guidance-first", "joint", "unguided"] = Field("guidance-first", description="when guidance learns")
    network: str | None = Field(None, description="mlp, resnet or transformer; by default the algorithm's")
    ensemble: Literal["none", "mean", "median", "min"] = Field(
        "none",
        description="none: policy member i learns from guidance member i; otherwise all learn from the mean, median or "
        "minimum over members",
    )
    hidden: Widths | None = Field(
        None,
        description="hidden units of each layer; resnet, transformer: of each block; by default [256, 256, 256], "
        "transformer: [64, 64]",
    )
    heads: Few = Field(4, description="attention heads of each block; they divide its width")
    activation: Activation = Field("mish", description="of the denoiser")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="dropout rate in residual blocks")
    time_features: Features = Field(64, description="sinusoidal features of the diffusion step")
    diffusion_steps: Few = Field(5, description="diffusion steps T")
    noise_schedule: Literal["vp", "cosine", "cosine-levels", "linear", "linear-unscaled"] = Field(
        "vp", description="of betas; vp: Diffusion-QL; cosine-levels: CleanDiffuser; linear: DDPM, scaled to T or not"
    )
    sampler: Literal["ddpm", "dpm-solver++"] = Field("ddpm", description="ancestral sampling, or DPM-Solver++ 2M")
    variance: Literal["posterior", "beta"] | None = Field(
        None,
        description="of ddpm's steps; by default the algorithm's. With 5 steps an exact denoiser of deviation .2 gives "
        "samples of .07 (posterior) or .11 (beta)",
        json_schema_extra={"before": "posterior"},
    )
    sampling_steps: Few = Field(5, description="network calls of dpm-solver++; at most diffusion_steps")
    eta: Amount = Field(
        0.1,
        description="weight of the guidance term, in units of mean abs Q",
    )
    ema_decay: Fraction = Field(0.999, description="decay of the averaged weights, which act, per update")
    ema_every: Positive = Field(1, description="gradient steps between updates of the averaged weights")
    ema_from: Whole = Field(0, description="gradient step of the first such update; until then they are a copy")
    label_dropout: Fraction = Field(0.1, description="fraction of labels dropped in training")
    label_share: Inside | None = Field(
        None, description="fraction of a batch labelled better, by its advantage; by default all above 0"
    )
    advantage_weight: Literal["none", "expectile", "exponential", "hard"] = Field(
        "none", description="weight of transitions in the loss, by their advantage A; hard: A >= 0 (IDQL: -0.01)"
    )
    advantage_expectile: Inside = Field(0.7, description="expectile of advantage_weight expectile")
    advantage_inverse_temperature: Rate = Field(1.0, description="inverse temperature of advantage_weight exponential")
    guidance_from: Fraction = Field(0.0, description="fraction of the run at which the guidance term begins")
    guidance_until: Fraction = Field(1.0, description="fraction of the run at which the guidance term ends")

    @model_validator(mode="after")
    def _fields_agree(self) -> PolicySection:
        if self.sampler == "dpm-solver++" and self.sampling_steps > self.diffusion_steps:
            raise ValueError(f"sampling_steps {self.sampling_steps} exceeds diffusion_steps {self.diffusion_steps}")
        if self.guidance_from > self.guidance_until:
            raise ValueError(f"guidance_from {self.guidance_from} is after guidance_until {self.guidance_until}")
        if self.ensemble != "none" and self.scheme != "guidance-first":
            raise ValueError(f"ensemble {self.ensemble!r} needs trained guidance: scheme 'guidance-first'")
        return self


class EvaluationSection(Section):
    """[evaluation]: how a policy acts and is scored."""

    episodes: Many = Field(10, description="episodes per member")
    candidates: Few = Field(10, description="actions drawn per state, one of which the guidance chooses")
    selection: Literal["max", "softmax"] = Field("max", description="max: the best candidate; softmax: a draw by value")
    weight_temperature: Amount = Field(100.0, description="inverse temperature of the softmax")
    support: Amount = Field(
        0.0,
        description="how much a candidate's distance to the median of the candidates counts against its Q, both in "
        "standard deviations over them",
        json_schema_extra={"before": 0.0},
    )
    ensemble: Literal["none", "mean", "median", "min", "rank"] | None = Field(
        None,
        description="how members of the guidance judge, as in [policy], whose value is the default; rank: mean rank among "
        "the candidates, independent of the scale of Q",
    )
    ensemble_over: Literal["all", "position"] = Field(
        "all",
        description="whose members an ensemble has: all of all guidances given, shared by all policy members; or, for "
        "policy member i, member i of each guidance given, so that policy members share none",
        json_schema_extra={"before": "all"},
    )
    temperature: Amount = Field(1.0, description="scale of the sampling noise")
    temperature_on: Literal["all", "start", "steps"] = Field(
        "all", description="which noise temperature scales: all; start: the initial noise; steps: that of the steps"
    )
    w: Amount = Field(1.0, description="weight of classifier-free guidance")
    guide: Literal["rank", "gradient", "both"] = Field(
        "rank", description="rank candidates, steer by gradient, or both"
    )
    guidance_weight: Amount = Field(1.0, description="weight of the gradient, for guide gradient and both")
    jacobian: bool = Field(
        False, description="differentiate through the denoiser; the weight is then an inverse temperature"
    )
    execute: Positive | None = Field(
        None, description="actions of a window taken before the next decision; by default all of them"
    )
    seed: Whole = Field(0, description="seed of start states and sampling noise")


class Experiment(Section):
    """The whole experiment file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        "experiment", description="prefix of the names of output files"
    )
    seeds: Annotated[list[Whole], Field(min_length=1, max_length=256)] = Field(
        [0, 1, 2], description="one member per seed, trained side by side"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if available, else cpu")
    data: DataSection = DataSection()
    guidance: GuidanceSection = GuidanceSection()
    policy: PolicySection = PolicySection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _tables_agree(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; each member needs its own")
        if (self.evaluation.execute or 1) > self.data.horizon:
            raise ValueError(
                f"[evaluation] execute = {self.evaluation.execute}: a window has [data] horizon = {self.data.horizon} actions"
            )
        return self


def load_experiment(path: Path, overrides: Sequence[str]) -> Experiment:
    """Read and check an experiment file.

    overrides: texts "table.key=value", the value as in TOML. `extends = "base.toml"` takes what this file leaves out
    from another one. Paths are relative to the file that they stand in.
    Raises: MdptError that names file, table, key, value and what is allowed.
    """
    return check_experiment(str(path), _read_tables(path, ()), overrides)


def _read_tables(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a file, completed by those that it extends. extending: the files that extend this one."""
    if problem := why_unreadable(path, "no such experiment file"):
        example = f" in {working_folder()}; hopper.toml in the repository is an example"
        raise MdptError(f"{path}: {problem}" + (f", which {extending[-1]} extends" if extending else example))
    try:
        content = tomli.loads(path.read_text(encoding="utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8, and numbers that are too long
        raise MdptError(f"{path}: is not TOML: {error}") from error
    table = content.get("data")
    if isinstance(table, dict) and isinstance(table.get("path"), str):
        table["path"] = _absolute(table["path"], path.parent)
    if (base := content.pop("extends", None)) is None:
        return content
    if not isinstance(base, str):
        raise MdptError(f"{path}: extends = {base!r}: expected the name of one file")
    other = Path(_absolute(base, path.parent))
    if other in (extending := (*extending, Path(_absolute(str(path), Path())))):
        raise MdptError(f"{path}: extends = {base!r}: that file extends this one")
    tables = _read_tables(other, extending)
    for key, value in content.items():
        inherited = tables.get(key)
        tables[key] = inherited | value if isinstance(inherited, dict) and isinstance(value, dict) else value
    return tables


def _absolute(name: str, folder: Path) -> str:
    path = os.path.join(folder, os.path.expanduser(name))
    return os.path.normpath(path if os.path.isabs(path) else os.path.join(working_folder(), path))


def check_experiment(where: str, content: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """Apply the overrides to nested tables and check them. Raises: MdptError with a line for each mistake."""
    for override in overrides:
        _override(content, override)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise MdptError(_explain(where, error)) from error


def experiment_as_stored(tables: dict[str, Any], where: str = "the experiment") -> tuple[Experiment, list[str]]:
    """Build the experiment of a file that mdpt wrote, perhaps an older or a newer version of mdpt.

    A field that the tables lack takes its `before` (see `Section`), else its default.
    Returns: the experiment, and the names of what was left out as unknown, such as "policy.nonsense".
    Raises: MdptError for a value that is not allowed.
    """
    fields, unknown = _known_fields(tables, Experiment, "")
    return check_experiment(where, fields), unknown


def _known_fields(table: dict[str, Any], section: type[Section], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a table that its section has, completed by `before`, and the names of the others."""
    fields: dict[str, Any] = {}
    unknown = [f"{prefix}{key}" for key in table if key not in section.model_fields]
    for name, info in section.model_fields.items():
        extra = info.json_schema_extra
        if isinstance(info.default, Section) and isinstance(inner := table.get(name, {}), dict):
            fields[name], more = _known_fields(inner, type(info.default), f"{name}.")
            unknown += more
        elif name in table:
            fields[name] = table[name]
        elif isinstance(extra, dict) and "before" in extra:
            fields[name] = extra["before"]
    return fields, unknown


def _override(content: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    *tables, key = (part.strip() for part in keys.split("."))
    if not equals or not key or len(tables) > 1:
        raise MdptError(
            f"--set {override}: expected table.key=value, such as policy.steps=5000 or data.environment_kwargs={{g=9.8}}"
        )
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        parsed = {"value": text.strip()}  # text without quotes; its field says whether it is allowed
    except (ValueError, RecursionError) as error:
        raise MdptError(f"--set {keys}: is not TOML: {error}") from error
    if parsed.keys() != {"value"}:
        raise MdptError(f"--set {keys}: more than one value; give each its own --set")
    target = content
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise MdptError(f"--set {override}: {table} is a key, not a table")
    if text.strip():
        target[key] = parsed["value"]
    else:
        target.pop(key, None)  # as if the file did not contain it


def _explain(path: str, error: ValidationError) -> str:
    """A line for each mistake: file, table, key, value, what is allowed; for an unknown key, the nearest one."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        section: type[BaseModel] = Experiment
        names = [*problem["loc"]]
        where = f"{path}:"
        if names and isinstance(table := getattr(Experiment(), str(names[0]), None), Section):
            section, where = type(table), f"{where} [{names.pop(0)}]"
        if names:  # after the key comes the place in a list, or the branch of a union
            where += f" {names[0]}" + "".join(f"[{place}]" for place in names[1:] if isinstance(place, int))
        if not isinstance(problem["input"], dict):
            where += f" = {shown(problem['input'])}"
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if problem["type"] == "model_type":
            message = "should be a table"
        elif problem["type"] == "extra_forbidden":
            message = f"unknown key; {_hint(str(names[0]), list(section.model_fields))}"
        lines.setdefault(where, []).append(message)
    return "\n".join(f"{where.removesuffix(':')}: {', or '.join(messages)}" for where, messages in lines.items())


def _hint(key: str, keys: Sequence[str]) -> str:
    """Which of these keys was meant by an unknown one, or where it belongs."""
    if near := difflib.get_close_matches(key, keys, n=1):
        return f"did you mean {near[0]!r}?"
    if key == "extends" or key in Experiment.model_fields:
        return "it belongs at the top of the file, before the first table"
    tables = [name for name, part in Experiment() if isinstance(part, Section) and key in type(part).model_fields]
    if tables:
        return f"it belongs in [{'] or ['.join(tables)}]"
    return f"known keys are {', '.join(keys)}"


def shown(value: Any) -> str:
    """The repr of a value in one line, cut after 200 characters."""
    try:
        text = " ".join(repr(value).split())  # arrays and tensors have several lines
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        return "..."
    return text if len(text) < 200 else f"{text[:200]}..."


# --- work in other processes --------------------------------------------------------------------------------------


class Watch:
    """What a worker is doing, so that an environment that hangs can be named."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.doing, self.since, self.ended = seconds, "", float("inf"), False

    @contextlib.contextmanager
    def over(self, doing: str) -> Iterator[None]:
        """Watch a block that may take `seconds`; whatever it raises becomes an MdptError that says `doing`."""
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


Work: TypeAlias = Callable[[Task, Watch], Result]


@dataclass(frozen=True)
class Workers:
    """Where work is done: in processes here, or by the workers of a Dask scheduler."""

    count: int = 1  # processes; 1: this one
    timeout: float = 600.0  # seconds that one step of an environment may take
    cluster: str | None = None  # address of the scheduler

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 1e6:  # threads cannot wait much longer
            raise MdptError(f"--timeout {self.timeout:g}: expected seconds, at most a million")


def parallel(
    work: Work[Task, Result], tasks: Iterable[Task], workers: Workers, total: int
) -> Generator[Result, None, None]:
    """Yield work(task, watch) for each of `total` tasks, in order. Worker processes end with this one, even if killed.

    Raises: MdptError, also for an environment that fails or hangs, and for a worker that dies.
    """
    count = min(workers.count, total)
    if workers.cluster is not None:
        yield from _on_cluster(work, tasks, workers)
    elif count <= 1:
        for task in tasks:
            with _quiet(1):
                result = _watched(work, task, workers.timeout)
            yield result
    else:
        import joblib
        from joblib.externals.loky.backend import resource_tracker
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        warnings.filterwarnings("ignore", module=r"joblib\.parallel")  # about tasks that an early end gives up
        begin = {"initializer": _begin_worker, "initargs": (os.getpid(),)}
        pool = joblib.Parallel(n_jobs=count, backend="loky", batch_size=1, return_as="generator", **begin)
        try:
            with _starting_processes():
                resource_tracker.ensure_running()  # in a block of its own: as it starts, it unblocks signals
            with _starting_processes():
                results = pool(joblib.delayed(_watched)(work, task, workers.timeout, backstop=True) for task in tasks)
        except (OSError, RuntimeError) as error:  # too few file handles or threads, or a folder that is gone
            working_folder()
            problem = f"worker processes cannot be started. {_one_line(error)}"
            raise MdptError(f"{problem}. --workers 1 plays in this process") from error
        try:
            yield from results
        except TerminatedWorkerError as error:
            reason = "its environment ended it or hung, or memory ran out; --workers 1 plays in this process"
            raise MdptError(f"a worker process ended unexpectedly: {reason}") from error


def _on_cluster(work: Work[Task, Result], tasks: Iterable[Task], workers: Workers) -> Generator[Result, None, None]:
    """`parallel` on Dask's workers, with a few tasks ahead. Dask repeats the tasks of a worker that is lost.

    joblib's Dask backend is not used: it waits forever where a worker lacks a module or a task kills its workers.
    """
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise MdptError("--cluster needs the package distributed: pip install 'mdpt[cluster]'") from error
    where = f"--cluster {workers.cluster}"
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises, too
    try:
        certificates = distributed.Security().get_connection_args("client")["ssl_context"]
        if str(workers.cluster).startswith("tls://") and certificates is None:
            raise MdptError(f"{where}: tls needs certificates; name them in Dask's settings, at distributed.comm.tls")
        client = distributed.Client(workers.cluster, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MdptError(f"{where}: no Dask scheduler answers there ({_one_line(error)})") from error
    with client:
        if not client.ncores():
            raise MdptError(f"{where}: its scheduler has no workers yet; start some")
        ahead: collections.deque[Any] = collections.deque()
        try:
            _check_versions(client, where)
            for task in tasks:
                ahead.append(client.submit(_on_worker, work, task, workers.timeout, pure=False))
                if len(ahead) > 2 * sum(client.ncores().values()):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except distributed.KilledWorker as error:
            raise MdptError(f"{where}: a task ended several workers, one after the other; see their logs") from error
        except ImportError as error:
            raise MdptError(f"{where}: a worker lacks a module: {_one_line(error)}; install it there") from error
        except (distributed.CancelledError, OSError) as error:
            raise MdptError(f"{where}: its scheduler ended, or the connection to it. {_one_line(error)}") from error


def _check_versions(client: Any, where: str) -> None:
    """Raises: MdptError where a worker has another version of mdpt or torch than this process."""
    for package in ("mdpt", "torch"):
        here = importlib.metadata.version(package)
        for worker, there in client.run(importlib.metadata.version, package, on_error="return").items():
            found = "none" if isinstance(there, ImportError) else str(there)
            lost = isinstance(there, OSError)  # a worker that ended meanwhile
            if not lost and found.partition("+")[0] != here.partition("+")[0]:  # behind the +: how it was built
                raise MdptError(f"{where}: the worker {worker} has {package} {found}, expected {here} as here")


def _on_worker(work: Work[Task, Result], task: Task, timeout: float) -> Result:
    """`_watched` on a worker of a cluster; errors say so."""
    try:
        return _watched(work, task, timeout)
    except (MdptError, OSError) as error:
        text = str(error) if isinstance(error, MdptError) else _one_line(error)
        raise MdptError(f"on the worker {platform.node()}: {text}") from error


@contextlib.contextmanager
def _starting_processes() -> Iterator[None]:
    """Start processes in this block that ignore the signals of `ENDS`; those that arrive are raised after it.

    They do not look for modules in the current folder, where a user's copy.py would hide Python's own.
    """
    caught: list[int] = []
    safe_path = os.environ.get("PYTHONSAFEPATH", "")  # "" is as if it were not set
    with on_signals(lambda number, frame: caught.append(number)):
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS) if hasattr(signal, "pthread_sigmask") else None
        try:
            os.environ["PYTHONSAFEPATH"] = "1"
            yield
        finally:
            os.environ["PYTHONSAFEPATH"] = safe_path
            if held is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
    for number in caught:
        signal.raise_signal(number)


def _begin_worker(parent: int) -> None:
    _silence(1)  # PyBullet prints at each connection
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class SideBySide:
    """Processes that work at the same time, one for each task: each calls work(task, shared, numbers, send).

    shared: whatever holds large arrays, which all processes map from one file. numbers: int64, which all read and
    write. send: gives an object to `received`. The processes end with the block, and with this one, even if it is
    killed.
    Raises: MdptError where they cannot be started.
    """

    def __init__(self, work: Callable[..., None], tasks: Sequence[Any], shared: object, numbers: int) -> None:
        self.work, self.tasks, self.shared, self.count = work, tasks, shared, numbers
        self.processes: list[Any] = []
        self.open: dict[Any, int] = {}  # connections, and the place of their task

    def __enter__(self) -> Self:
        import joblib
        from joblib.externals.loky.backend import get_context, resource_tracker

        context, folder, files = get_context("loky"), _cache_folder(), []
        try:
            with _starting_processes():
                resource_tracker.ensure_running()
            make_writable_folder(folder)
            files = [temporary_beside(folder / name) for name in ("shared", "numbers")]
            joblib.dump(self.shared, files[0])
            self.numbers = np.memmap(files[1], np.int64, "w+", shape=(self.count,))
            for place, task in enumerate(self.tasks):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (self.work, pickle.dumps(task), *files, theirs, os.getpid())
                process = context.Process(target=_work_beside, args=arguments)
                with _starting_processes():
                    process.start()
                theirs.close()
                self.processes.append(process)
                self.open[ours] = place
            for connection in self.open:  # once all have opened the files, these need no name
                connection.poll(None)
        except (OSError, RuntimeError) as error:  # too few file handles, or no room on the disk
            self.__exit__()
            problem = f"{folder}: worker processes cannot be started. {_one_line(error)}"
            raise MdptError(f"{problem}. --workers 1 trains in this process") from error
        except BaseException:
            self.__exit__()
            raise
        finally:
            for file in files:
                with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
                    file.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has SIGTERM only
            process.join()

    def received(self, seconds: float) -> Iterator[tuple[int, Any]]:
        """What arrives within this time: the place of a task, and what it sent; None: its process has ended."""
        ready: list[Any] = multiprocessing.connection.wait(list(self.open), seconds)
        for connection in ready:
            place = self.open[connection]
            try:
                message = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                del self.open[connection]
                message = None
            if message is not ...:
                yield place, message


def _work_beside(
    work: Callable[..., None], task: bytes, shared: Path, numbers: Path, connection: Any, parent: int
) -> None:
    """What a process of `SideBySide` does. Whatever the work raises is sent.

    Objects are packed by pickle itself: torch has taught `connection.send` to share the memory of tensors.
    """

    def send(message: object) -> None:
        try:
            connection.send_bytes(pickle.dumps(message))
        except OSError:  # the parent has ended
            os._exit(1)

    _begin_worker(parent)
    try:
        import joblib

        mapped = joblib.load(shared, mmap_mode="c"), np.memmap(numbers, np.int64, "r+")
        send(...)  # has started
        work(pickle.loads(task), *mapped, send)
    except BaseException as error:  # noqa: BLE001 (the parent raises it again)
        send(error)


def _watched(work: Work[Task, Result], task: Task, timeout: float, *, backstop: bool = False) -> Result:
    """Run work(task, watch) in a thread, and give it up where the environment hangs.

    backstop: end this process where the environment hangs in C code that lets no other thread of Python run.
    """
    watch, future = Watch(timeout), futures.Future[Result]()

    def run() -> None:
        try:
            future.set_result(work(task, watch))
        except BaseException as error:  # noqa: BLE001 (future.result raises it again)
            future.set_exception(error)

    def arm() -> None:
        if backstop:
            faulthandler.dump_traceback_later(2 * timeout, exit=True, file=1)  # stdout, which is silenced

    try:
        arm()
        threading.Thread(target=run, daemon=True).start()
        while not futures.wait([future], min(0.5, timeout / 4)).done:
            arm()
            if watch.late:
                raise MdptError(f"{watch.doing}: took longer than {timeout:g} s; --timeout SECONDS sets the limit")
    except RuntimeError as error:  # of threading
        raise MdptError(f"the system allows no more threads ({error}); raise its limit, see ulimit -u") from error
    except KeyboardInterrupt:
        watch.ended = True  # the thread ends at its next step: Python aborts if it ends while one is inside torch
        futures.wait([future], 5)
        raise
    faulthandler.cancel_dump_traceback_later()
    return future.result()


@contextlib.contextmanager
def _quiet(*streams: int) -> Iterator[None]:
    """Discard what is written to these file descriptors in this block, also by C code."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None
    flush(None)
    copies = [(stream, os.dup(stream)) for stream in streams]
    try:
        _silence(*streams)
        yield
    finally:
        flush(None)  # C buffers what it writes to a file or pipe, and would write it after the block
        for stream, copy in copies:
            os.dup2(copy, stream)
            os.close(copy)


def _silence(*streams: int) -> None:
    with open(os.devnull, "wb") as sink:
        for stream in streams:
            os.dup2(sink.fileno(), stream)


# --- environments and rollouts ------------------------------------------------------------------------------------

NUMERIC = "biuf"  # kinds of dtypes


@dataclass(frozen=True)
class EnvironmentSpec:
    """How to make an environment, and its dimensions and bounds, as plain values."""

    id: str | None  # None: there is only data
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]  # A entries
    action_high: tuple[float, ...]
    max_episode_steps: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    flattened: bool = False  # whether observations are a Dict, which is flattened by key
    observation_keys: tuple[str, ...] = ()  # the parts of the Dict that are used, in this order; empty: all of them
    repeatable: bool = field(default=True, compare=False)  # whether seed and actions decide what happens

    @property
    def name(self) -> str:
        return self.id or "the data"


def environment_spec(
    environment_id: str,
    kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    timeout: float = 600.0,
    observation_keys: Sequence[str] = (),
) -> EnvironmentSpec:
    """Describe a gymnasium or PyBullet environment, and try it for a few steps.

    max_episode_steps: None: its own. timeout: seconds that one step may take. observation_keys: as in
    `EnvironmentSpec`; without effect where observations are no Dict.
    Raises: MdptError for an unknown id, a space that is no Box, actions without finite bounds, a missing time limit, or
    an environment that does not behave as gymnasium specifies.
    """
    options = (kwargs or {}) | ({} if max_episode_steps is None else {"max_episode_steps": max_episode_steps})

    def describe(environment_id: str, watch: Watch) -> EnvironmentSpec:
        with watch.over(f"{environment_id}: the environment"):
            environment = _make(environment_id, observation_keys, **options)
            environment.close()
        spec = _describe(environment, environment_id, kwargs or {}, observation_keys)
        return replace(spec, repeatable=_try(spec, watch))

    with _quiet(1):  # PyBullet prints at each connection
        return _watched(describe, environment_id, timeout)


def _describe(
    environment: gymnasium.Env[Any, Any], environment_id: str, kwargs: dict[str, Any], observation_keys: Sequence[str]
) -> EnvironmentSpec:
    from gymnasium.spaces import Box

    observations: Any = environment.observation_space
    actions: Any = environment.action_space
    for name, space in (("observation", observations), ("action", actions)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
            has_option = "continuous" in inspect.signature(type(environment.unwrapped).__init__).parameters
            remedy = (
                " Set [data] environment_kwargs = { continuous = true }." if has_option and name == "action" else ""
            )
            problem = f"its {name} space is {space}; only a Box with one axis can be learned."
            raise MdptError(f"{environment_id}: {problem}{remedy}")
    if not np.issubdtype(actions.dtype, np.floating):
        raise MdptError(f"{environment_id}: its actions are {actions.dtype}, {actions}; only floats can be learned.")
    if environment.spec is None or not environment.spec.max_episode_steps:
        raise MdptError(f"{environment_id}: it has no time limit; set [data] max_episode_steps.")
    flattened = any(type(layer).__name__ == "FlattenObservation" for layer in _layers(environment))
    spec = EnvironmentSpec(
        id=environment_id,
        observation_dim=observations.shape[0],
        action_dim=actions.shape[0],
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
        max_episode_steps=environment.spec.max_episode_steps,
        kwargs=kwargs,
        flattened=flattened,
        observation_keys=tuple(observation_keys) if flattened else (),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        _, half = _center_and_half(spec)
    if not (np.isfinite(half) & (half > 0)).all():
        raise MdptError(f"{environment_id}: its actions lack finite bounds with low < high, {actions}; wrap it.")
    return spec


def _layers(environment: Any) -> Iterator[Any]:
    """The environment and what it wraps, from the outside in."""
    while environment is not environment.unwrapped:
        yield environment
        environment = environment.env
    yield environment


def _try(spec: EnvironmentSpec, watch: Watch, steps: int = 5) -> bool:
    """Play the same few steps twice; whether both are equal.

    Raises: MdptError where the environment does not behave as gymnasium specifies.
    """
    episodes: list[list[Array]] = []
    actions = unscale_actions(np.random.default_rng(0).uniform(-0.1, 0.1, (steps, spec.action_dim)), spec)
    wrappers = ("TimeLimit", "OrderEnforcing", "FlattenObservation", "TransformObservation")  # they unpack wrong tuples
    for _ in range(2):
        seed_generators(0)
        with watch.over(f"{spec.id}: its reset"):
            environment = make_environment(spec)
            inner = next(layer for layer in _layers(environment) if type(layer).__name__ not in wrappers)
            _check_tuple(inner.reset(seed=0), "observation", "info")
        with watch.over(f"{spec.id}: its step"):
            _check_tuple(inner.step(actions[0]), "observation", "reward", "terminated", "truncated", "info")
            seen = [reset(environment, spec, 1)]
            for action in actions:
                observation, reward, terminal, timeout, _ = take_step(environment, spec, action)
                seen += [observation, np.array(reward)]
                if terminal or timeout:
                    break
            environment.close()
        episodes.append(seen)
    return len(episodes[0]) == len(episodes[1]) and all(map(np.array_equal, *episodes))


def _check_tuple(given: Any, *names: str) -> None:
    if not isinstance(given, tuple) or len(given) != len(names):
        got = f"{len(given)} values" if isinstance(given, tuple) else type(given).__name__
        raise ValueError(f"expected ({', '.join(names)}) as in gymnasium, got {got}; wrap it")


def reset(environment: gymnasium.Env[Any, Any], spec: EnvironmentSpec, seed: int) -> Array:
    """Begin an episode; returns its first observation (O,) float32. Raises: ValueError for a wrong one."""
    return _checked(environment.reset(seed=seed)[0], spec)


def take_step(
    environment: gymnasium.Env[Any, Any], spec: EnvironmentSpec, action: Array
) -> tuple[Array, float, bool, bool, float]:
    """Take a step; returns the observation (O,) float32, reward, terminal, timeout, success (nan: it does not say).

    Raises: ValueError for a reward or an observation of a wrong type or shape, or not finite.
    """
    observation, reward, terminal, timeout, info = environment.step(action)
    number = np.asarray(reward)
    if number.ndim or number.dtype.kind not in NUMERIC or not np.isfinite(number):
        raise ValueError(f"its reward is {reward!r}, expected one finite number")
    said = np.asarray(info.get("is_success", info.get("success")) if isinstance(info, Mapping) else None)
    success = float(said.item() > 0) if said.size == 1 and said.dtype.kind in NUMERIC else math.nan
    return _checked(observation, spec), float(reward), bool(terminal), bool(timeout), success


def _checked(given: Any, spec: EnvironmentSpec) -> Array:
    with np.errstate(over="ignore"):
        observation = np.asarray(given, dtype=np.float32)
    if observation.shape != (spec.observation_dim,):
        raise ValueError(f"its observation has shape {observation.shape}, its space ({spec.observation_dim},)")
    if not np.isfinite(observation).all():
        raise ValueError(f"its observation is not finite: {observation.tolist()}")
    return observation


def seed_generators(*numbers: int) -> None:
    """Seed Python's and NumPy's global generators, for environments that draw from them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)


def scale_actions(actions: Array, spec: EnvironmentSpec) -> Array:
    """Scale actions (..., A) from the environment's bounds to [-1, 1]; float32."""
    center, half = _center_and_half(spec)
    return np.asarray((actions - center) / half, dtype=np.float32)


def unscale_actions(actions: Array, spec: EnvironmentSpec) -> Array:
    """Scale actions (..., A) from [-1, 1] to the environment's bounds, and clip them to these; float32."""
    center, half = _center_and_half(spec)
    low, high = _bounds(spec)  # which rounding to float32 may have moved outwards
    low = np.where(low < np.array(spec.action_low), np.nextafter(low, high), low)
    high = np.where(high > np.array(spec.action_high), np.nextafter(high, low), high)
    return np.clip(np.asarray(actions * half + center, dtype=np.float32), low, high)


def _center_and_half(spec: EnvironmentSpec) -> tuple[Array, Array]:
    # In this form, bounds of [-1, 1] leave every bit of an action as it was.
    low, high = _bounds(spec)
    return (high + low) / 2, (high - low) / 2


def _bounds(spec: EnvironmentSpec) -> tuple[Array, Array]:
    return np.array(spec.action_low, dtype=np.float32), np.array(spec.action_high, dtype=np.float32)


def _make(environment_id: str, observation_keys: Sequence[str], **options: Any) -> gymnasium.Env[Any, Any]:
    import gymnasium
    from gymnasium.wrappers import FlattenObservation, TransformObservation

    register_environments()
    if "mujoco" in str(getattr(gymnasium.registry.get(environment_id), "entry_point", "")):
        mujoco: Any = importlib.import_module("mujoco")  # it would log its warnings to a file in the user's folder
        mujoco.set_mju_user_warning(lambda text: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # old data were made in an old version
            environment = gymnasium.make(environment_id, disable_env_checker=True, **options)
        if isinstance(space := environment.observation_space, gymnasium.spaces.Dict):
            if observation_keys:
                check_keys(observation_keys, space, environment_id)
                parts = gymnasium.spaces.Dict([(key, space[key]) for key in observation_keys])
                choose = lambda seen: {key: seen[key] for key in observation_keys}
                environment = TransformObservation(environment, choose, parts)
            environment = FlattenObservation(environment)
        return environment
    except MdptError:
        raise
    except BaseException as error:  # its constructor may also exit, or interrupt itself
        module, _, name = environment_id.rpartition(":")
        if module and module not in sys.modules:
            problem = f"the module {module} cannot be imported. {_one_line(error)}. Install it, or set PYTHONPATH."
        elif name in gymnasium.registry:
            problem = f"the environment cannot be made. {_one_line(error)}"
        else:
            near = difflib.get_close_matches(name, gymnasium.registry, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else "Write 'module:Name-v0' for one that a module registers."
            problem = f"no such environment is registered with gymnasium. {hint}"
        raise MdptError(f"{environment_id}: {problem}") from error


def check_keys(observation_keys: Sequence[str], parts: Iterable[str], where: str) -> None:
    """Raises: MdptError where one of these keys is none of the parts of a Dict, or occurs twice."""
    known = sorted(parts)
    if wrong := [key for key in observation_keys if key not in known or observation_keys.count(key) > 1]:
        problem = f"{wrong[0]!r}: expected each once, of {', '.join(known)}, the parts of {where}"
        raise MdptError(f"[data] observation_keys has {problem}.")


def imported_for(environment_id: str) -> str:
    """The module that making an environment would import besides gymnasium's own, or ""; files may not ask for one."""
    module, _, name = environment_id.rpartition(":")
    return module or ("shimmy" if name.startswith("GymV2") else "")  # its keyword arguments name a module


def register_environments() -> None:
    """Register PyBullet's environments with gymnasium, and those of gymnasium-robotics if it is installed."""
    with _quiet(1, 2):
        for name in ("pybullet", "pybullet_envs_gymnasium"):  # the first prints, the second registers
            importlib.import_module(name)
        with contextlib.suppress(Exception):  # not installed, or broken
            importlib.import_module("gymnasium_robotics")


def make_environment(spec: EnvironmentSpec, **options: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment whose episodes depend only on `reset(seed=...)` and the actions.

    It is reset once, because PyBullet's first episode, which loads the bodies, differs from later ones of the same seed.
    Raises: MdptError also where the environment differs from its description, naming what changed.
    """
    if spec.id is None:
        raise MdptError("there is no environment to play in; name one in [data]")
    keys = spec.observation_keys
    environment = _make(spec.id, keys, max_episode_steps=spec.max_episode_steps, **spec.kwargs, **options)
    now = asdict(replace(_describe(environment, spec.id, spec.kwargs, keys), repeatable=spec.repeatable))
    if changed := [f"{key} was {was}, is {now[key]}" for key, was in asdict(spec).items() if was != now[key]]:
        raise MdptError(f"{spec.id}: is another environment than when this was trained: {'; '.join(changed)}.")
    environment.reset(seed=0)
    return environment


def first_observations(spec: EnvironmentSpec, timeout: float, count: int = 20) -> tuple[Array, Array]:
    """First observations of so many resets, (count, O), and the bounds of the observation space, (2, O).

    timeout: seconds that one reset may take. Raises: MdptError.
    """

    def look(spec: EnvironmentSpec, watch: Watch) -> tuple[Array, Array]:
        seed_generators(0)
        seen = []
        environment = make_environment(spec)
        for seed in range(count):
            with watch.over(f"{spec.id}: its reset"):
                seen.append(reset(environment, spec, seed))
        environment.close()
        space: Any = environment.observation_space
        return np.stack(seen), np.stack([space.low, space.high])

    with _quiet(1):
        return _watched(look, spec, timeout)


Act: TypeAlias = Callable[[Array, Array], Array]


@dataclass(frozen=True, eq=False)
class Played:
    """What episodes gave, one number for each."""

    returns: Array  # (E,) float64, raw; every reward counts, also that of the last step
    lengths: Array  # (E,) int64, in steps
    successes: Array  # (E,) float64: 1 or 0, as the environment's info said at any step; nan where it never says


def rollout(
    act: Act,
    spec: EnvironmentSpec,
    episodes: Sequence[int],
    *,
    seed: int,
    name: str = "the policy",
    watch: Watch | None = None,
    look: Callable[[int, float, Array], None] | None = None,
    every: int = 1,
) -> Played:
    """Play numbered episodes side by side; an episode starts from the state that `seed` and its number decide.

    act: observations (R, O) float32 and places (R,) in `episodes` of those that still run -> actions (R, A) in [-1, 1].
    name: of the policy, for messages. look: called for the first episode with steps, return so far and a frame
    (height, width, 3) uint8, at the start, every `every` steps and at the end.
    Raises: MdptError for actions that are not finite or of a wrong shape, and for an environment that fails or cannot be
    filmed.
    """
    watch = watch or Watch(float("inf"))
    count = len(episodes)
    observations = np.empty((count, spec.observation_dim), dtype=np.float32)
    returns, lengths, running = np.zeros(count), np.zeros(count, dtype=np.int64), np.arange(count)
    successes = np.full(count, np.nan)
    environments: list[gymnasium.Env[Any, Any]] = []

    def show(place: int) -> None:
        if look is not None and place == 0:
            with watch.over(f"{spec.id}: episode {episodes[0]}, a frame after step {lengths[0]}"):
                frame = _frame(environments[0], spec.name)
            look(int(lengths[0]), float(returns[0]), frame)

    seed_generators(seed, *episodes)
    for place, episode in enumerate(episodes):
        with watch.over(f"{spec.id}: episode {episode}"):
            environments.append(make_environment(spec, **({"render_mode": "rgb_array"} if look else {})))
            start = int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
            observations[place] = reset(environments[place], spec, start)
        show(place)
    while len(running):
        actions = _checked_actions(act(observations[running], running), spec, len(running), name)
        ended = np.zeros(len(running), dtype=np.bool_)
        for i, (place, action) in enumerate(zip(running.tolist(), actions, strict=True)):
            with watch.over(f"{spec.id}: episode {episodes[place]}, step {lengths[place] + 1}"):
                observations[place], reward, terminal, timeout, success = take_step(environments[place], spec, action)
            returns[place] += reward
            successes[place] = np.fmax(successes[place], success)
            lengths[place] += 1
            ended[i] = terminal or timeout
            if lengths[place] % every == 0 or ended[i]:
                show(place)
        running = running[~ended]
    for episode, environment in zip(episodes, environments, strict=True):
        with watch.over(f"{spec.id}: the end of episode {episode}"):
            environment.close()
    return Played(returns, lengths, successes)


def _checked_actions(given: Any, spec: EnvironmentSpec, count: int, name: str) -> Array:
    """Actions (count, A) of a policy, in the environment's bounds."""
    actions = np.asarray(given)
    if actions.shape != (count, spec.action_dim):
        raise MdptError(f"act: actions of shape {actions.shape}, expected {(count, spec.action_dim)}.")
    if not np.isfinite(actions).all():
        raise MdptError(f"{name} chose an action that is not finite; its training has diverged.")
    return unscale_actions(actions, spec)


def _frame(environment: Any, name: str) -> Array:
    try:
        frame: Any = environment.render()
    except Exception as error:
        mujoco = hasattr(environment.unwrapped, "mujoco_renderer") and "MUJOCO_GL" not in os.environ
        remedy = ". Without a display, set the environment variable MUJOCO_GL=egl" if mujoco else ""
        raise MdptError(f"{name} cannot be filmed off-screen. {_one_line(error)}{remedy}") from error
    if np.ndim(frame) != 3:
        modes = ", ".join(environment.metadata.get("render_modes") or ()) or "none"
        raise MdptError(f"{name} cannot be filmed: it needs render mode rgb_array, and has {modes}.")
    return np.asarray(frame, dtype=np.uint8)


# --- columns of a file --------------------------------------------------------------------------------------------

FLAGS = ("terminals", "timeouts", "masks")
NARROW = ("rewards", "terminals", "timeouts")  # one number per row
KEYS = ("observations", "actions", "rewards", "terminals", "next_observations", *FLAGS[1:])  # the first four are needed

CHUNK = 65_536  # rows that are read, checked and converted at a time
MORE_MEMORY = "choose a smaller dataset, or a machine with more memory"
RECIPES = "experiments/RECIPES.md in the repository reads it in Python, with source = 'arrays'"
FLAT = "flat rows (n, O): array.reshape(n, -1); of (steps, environments, O), swap the first two axes before"


@dataclass(frozen=True, eq=False)
class Columns:
    """What a source gives, not yet read: arrays or datasets of an open file by D4RL's keys, with a row for each step.

    observations (n, O), actions (n, A), rewards (n,), terminals (n,); optional: next_observations (n, O), timeouts
    (n,), and OGBench's masks (n,), which are 0 at real ends, where terminals are the ends of trajectories.
    """

    name: str
    where: str
    arrays: Mapping[str, Any]
    keys: tuple[str, ...] = ()  # all keys of the source, also those that are not read

    def read(self, key: str, start: int = 0, stop: int | None = None, unread: Array | None = None) -> Array:
        """Rows of a column as float32, or bool for flags. Raises: MdptError that names the first row at fault.

        unread: rows (n,) bool that nothing is learned from; numbers that are not finite become 0 there.
        """
        try:
            array = np.asarray(self.arrays[key][start:stop])
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:  # h5py, if damaged
            raise damaged(self.where, error) from error
        if key in FLAGS:
            self.forbid(key, array, (array != 0) & (array != 1), "expected only 0 and 1", start)
            return array.astype(np.bool_).reshape(len(array))
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is reported
            array = array.astype(np.float32)
        if unread is not None:
            array[unread] = np.nan_to_num(array[unread], posinf=0.0, neginf=0.0)
        self.forbid(key, array, ~np.isfinite(array), "expected finite numbers", start)
        return array.reshape(len(array)) if key == "rewards" else array

    def forbid(self, key: str, array: Array, bad: Array, expected: str, start: int) -> None:
        if bad.any():
            row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
            raise MdptError(f"{self.where}: {key!r} row {start + row} is {array[row].tolist()}, {expected}.")


def damaged(
    where: Path | str, error: Exception, problem: str = "a truncated or damaged HDF5 file; get it again"
) -> MdptError:
    """What to say where a library cannot read an HDF5 file; problem: if nothing else keeps it from being read."""
    if "unable to lock file" in str(error):
        problem = "its file system has no locks; set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
    elif number := getattr(error, "errno", None):
        problem = f"cannot be read ({os.strerror(number)})"
    return MdptError(f"{where}: {problem}. {_one_line(error)}")


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Columns]:
    """Open the columns of a file in D4RL's format. Other keys are not read, and nothing outside the file is.

    Raises: MdptError for a file that is missing, something else, damaged, or held open by a writer.
    Source: the D4RL wiki, "Off-policy evaluation and dataset format".
    """
    if problem := why_unreadable(path, "no such file"):
        hint = "; name the file in it" if problem == "is a folder" else f"; looked in {_absolute('.', path.parent)}"
        raise MdptError(f"{path}: {problem}{hint}.")
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise MdptError(f"{path}: another process holds it open for writing; wait until that has ended.") from error
    except PermissionError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror}).") from error
    except OSError as error:
        if error.errno is None and (problem := _other_format(path)):
            raise MdptError(f"{path}: {problem}.") from error
        raise damaged(path, error) from error
    with file:
        try:
            columns = Columns(path.name, str(path), _datasets(path, file), tuple(map(str, file)))
        except (RuntimeError, LookupError, OSError, TypeError, ValueError) as error:  # h5py, if its tables are damaged
            raise damaged(path, error) from error
        yield columns


def _other_format(path: Path) -> str:
    """Why a file is no HDF5 file by its first bytes or its name, "" where it begins like one."""
    with path.open("rb") as raw:
        start = raw.read(8)
    if start == b"\x89HDF\r\n\x1a\n":
        return ""
    kinds = {b"PK\x03\x04": "a zip file such as npz", b"PAR1": "a parquet file", b"\x93NUM": "an npy file"}
    kind = kinds.get(start[:4]) or (f"a {path.suffix[1:]} file" if path.suffix in (".csv", ".tsv") else "")
    expected = "not an HDF5 file. Expected D4RL's format: observations, actions, rewards, terminals"
    return f"{kind}, not HDF5; {RECIPES}" if kind else expected


def _datasets(path: Path, file: h5py.File) -> dict[str, h5py.Dataset]:
    if "episode_0" in file:
        example = "source = 'minari' and its name as dataset, such as 'mujoco/hopper/medium-v0'"
        raise MdptError(f"{path}: is a Minari dataset; use {example}.")
    data = file["data"] if isinstance(file.get("data", getlink=True), h5py.HardLink) else ()
    if any(str(key).startswith("demo") for key in data):
        raise MdptError(f"{path}: is robomimic's layout, with an episode in each 'data/demo_...'; {RECIPES}.")
    if "episode_terminals" in file and "timeouts" not in file:
        raise MdptError(f"{path}: is a dump of d3rlpy, where 'timeouts' are missing; {RECIPES}.")
    datasets = {}
    for key in KEYS:
        link, dataset = file.get(key, getlink=True), file.get(key)
        if link is not None and not isinstance(link, h5py.HardLink):
            raise MdptError(f"{path}: {key!r} is a link; copy the data into the file.")
        if isinstance(dataset, h5py.Dataset):
            if problem := storage_problem(dataset, key in NARROW[1:]):
                raise MdptError(f"{path}: {key!r} {problem}")
            datasets[key] = dataset
        elif dataset is not None:
            raise MdptError(f"{path}: {key!r} is a group; expected an array. {RECIPES}.")
    return datasets


def storage_problem(dataset: h5py.Dataset, may_lack_rows: bool = False) -> str:
    """Why a dataset cannot be read safely, "" if it can: all its rows are in its file, and compressed once at most."""
    if dataset.external or dataset.is_virtual:
        return "lies in other files; copy the data into this one."
    settings, harmless = dataset.id.get_create_plist(), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
    filters = [settings.get_filter(i) for i in range(settings.get_nfilters())]
    if sum(number not in harmless for number, *_ in filters) > 1:
        return "is compressed more than once, so that kilobytes could become gigabytes; write it anew."
    for number, *_, name in filters:
        with contextlib.suppress(ImportError):
            if not h5py.h5z.filter_avail(number):
                importlib.import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(number):
            kind = f"the HDF5 filter {number} {name.decode(errors='replace')}".rstrip()
            return f"is compressed by {kind}, which is not installed: pip install hdf5plugin"
    if may_lack_rows or not dataset.size:
        return ""
    if dataset.chunks is None:
        held, claimed = dataset.id.get_storage_size(), dataset.nbytes
    else:
        held = dataset.id.get_num_chunks()
        claimed = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    return "" if held >= claimed else f"claims {dataset.shape[0]} rows, but not all were written; write it anew."


def bytes_to_read(array: Any, rows: int) -> int:
    """Memory that so many rows of an array take while they are read and converted, with a chunk of HDF5 as stored."""
    size, chunk = array.dtype.itemsize, math.prod(getattr(array, "chunks", None) or (0,))
    return int((size + 12) * rows * math.prod(array.shape[1:]) + size * chunk)  # 12: copies as float32 and float64


def check_shapes(columns: Columns, spec: EnvironmentSpec | None, width: int | None) -> tuple[int, int]:
    """Check that columns fit each other, the environment and memory, before any is read.

    width: number of observation columns to use, None: all. Returns: O and A.
    Raises: MdptError with a line for each problem.
    """
    arrays, where = columns.arrays, columns.where
    problems = []
    if missing := [repr(key) for key in KEYS[:4] if key not in arrays]:
        verb = "the key {} is missing" if len(missing) == 1 else "the keys {} are missing"
        problems.append(f"{verb.format(', '.join(missing))}. It has: {', '.join(sorted(columns.keys)) or 'none'}.")
    others = {key: array.dtype for key, array in arrays.items() if array.dtype.kind not in NUMERIC}
    problems += [f"{key!r} holds {dtype}, expected numbers." for key, dtype in others.items()]
    if problems:
        raise MdptError("\n".join(f"{where}: {problem}" for problem in problems))
    shapes: dict[str, tuple[int, ...]] = {key: array.shape or () for key, array in arrays.items()}
    rows = next((shape[0] for shape in shapes.values() if shape), 0)
    wide, actions = ((*shapes[key], 1, 1)[1] for key in ("observations", "actions"))
    if spec is not None:
        wide, actions = spec.observation_dim, spec.action_dim
    if width not in (None, wide) and spec is not None:
        raise MdptError(f"[data] observation_columns = {width}: {spec.id} has {spec.observation_dim} observations.")
    wide = width or wide
    for key, shape in shapes.items():
        narrow = key in (*NARROW, *FLAGS)
        expected = (rows,) if narrow else (rows, actions if key == "actions" else wide)
        fits = shape == expected or (narrow and shape == (rows, 1))
        if width is not None and key.endswith("observations"):  # there may be more columns
            fits = len(shape) == 2 and shape[0] == rows and shape[1] >= width
        if not fits or 0 in expected[1:]:
            sizes = ", ".join(str(size or "at least 1") for size in expected) + "," * (len(expected) == 1)
            problems.append(f"{key!r} has shape {shape}, expected ({sizes}){f' for {spec.id}' if spec else ''}.")
    if any(len(shape) > 2 for shape in shapes.values()):
        problems.append(f"mdpt reads {FLAT}. Encode images.")
    if not problems and rows < 2:
        problems.append(f"{rows} row(s), expected at least 2.")
    if problems:
        raise MdptError("\n".join(f"{where}: {problem}" for problem in problems))
    at_once = {key: rows if key in (*NARROW, *FLAGS) else min(rows, CHUNK + 1) for key in arrays}
    check_memory(sum(bytes_to_read(array, at_once[key]) for key, array in arrays.items()), MORE_MEMORY)
    return wide, actions


def count_timeouts(terminals: Array, max_episode_steps: int) -> Array:
    """Rows (n,) bool at which D4RL takes an episode for cut by its time limit, in a file without timeouts.

    D4RL's count decides which rows its users train on, so it is copied exactly: it is 0 at the first row of the file and
    after a cut, but 1 after a terminal, and it cuts at max_episode_steps - 1.
    Source: d4rl.qlearning_dataset, `episode_step`.
    """
    count, cuts = 0, []
    for row, terminal in enumerate(terminals.tolist()):
        if count == max_episode_steps - 1:
            cuts.append(row)
            count = 0
        else:
            count = 1 if terminal else count + 1
    timeouts = np.zeros(len(terminals), dtype=np.bool_)
    timeouts[cuts] = True
    return timeouts


def episode_bounds(terminals: Array, timeouts: Array) -> tuple[Array, Array]:
    """First row and one past the last row, (E,) int64 each, of every episode; the last one may be incomplete."""
    ends = np.flatnonzero(terminals | timeouts) + 1
    if not len(ends) or ends[-1] != len(terminals):
        ends = np.append(ends, len(terminals))
    return np.concatenate([[0], ends[:-1]]), ends


def transition_rows(timeouts: Array, has_next: bool, keep_timeouts: bool = False) -> Array:
    """Which rows (n,) bool are transitions. has_next: whether the data have next_observations.

    keep_timeouts: as in [data].

    Without them, the next row gives the next observation. As in D4RL, a row at a time limit is then dropped, because what
    followed it is unknown (also if it is a terminal), and so is the last row of the file. With them, every row is kept:
    at a time limit, which is not a terminal, the value is bootstrapped. (D4RL ignores that key and drops those rows.)
    Source: d4rl.qlearning_dataset(terminate_on_end=False), equal to it in values, types and order.
    """
    if has_next:
        return np.ones(len(timeouts), dtype=np.bool_)
    followed = np.arange(len(timeouts)) < len(timeouts) - 1
    return timeouts | followed if keep_timeouts else ~timeouts & followed


def discounted_returns(
    rewards: Array, terminals: Array, timeouts: Array, discount: float, tail: float = 0.05
) -> tuple[Array, Array]:
    """Monte-Carlo returns (n,) float64 from each row to the end of its episode, and which to trust, (n,) bool.

    A return is trusted if its episode ended in a terminal, or if the weight of what was cut off is small:
    discount ** (remaining steps) <= tail. Returns are in the unit of `rewards`.
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


def _write_hdf5(path: Path, arrays: dict[str, Array], attributes: dict[str, Any]) -> None:
    """Write a file whole or not at all; the same arrays and attributes give the same bytes."""
    with written_whole(path, OTHER_CACHE) as temporary, h5py.File(temporary, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, track_times=False)
        file.attrs.update(attributes)


# --- sources ------------------------------------------------------------------------------------------------------

Opened: TypeAlias = contextlib.AbstractContextManager[Columns]


Bounds: TypeAlias = tuple[list[float], list[float]]  # lower and upper, one for each dimension


class Known(NamedTuple):
    """What a source knows before its data are read."""

    fields: dict[str, Any]  # of [data], for what the user leaves out
    no_environment: str = ""  # why the data cannot be played
    warnings: tuple[str, ...] = ()
    recorded: tuple[Bounds | None, Bounds | None] = (None, None)  # of observations and of actions, where they are known


UNNAMED = Known({}, "[data] names no environment")


class Source(Protocol):
    """Where data come from: a line of `SOURCES`."""

    def know(self, section: DataSection) -> Known:
        return UNNAMED

    def open(self, section: DataSection, workers: Workers, show: Show) -> Opened: ...


class Hdf5File(Source):
    """A file in D4RL's format."""

    def open(self, section: DataSection, workers: Workers, show: Show) -> Opened:
        return open_hdf5(Path(section.path or ""))


@dataclass(frozen=True)
class Arrays(Source):
    """Arrays from Python, by D4RL's keys."""

    arrays: Mapping[str, Array] | None = None

    def open(self, section: DataSection, workers: Workers, show: Show) -> Opened:
        if self.arrays is None:
            raise MdptError("[data] source = 'arrays': give them in Python, as load_dataset(section, arrays=...)")
        return contextlib.nullcontext(columns_of("arrays", self.arrays, section.observation_keys))


def columns_of(name: str, arrays: Mapping[str, Any], observation_keys: Sequence[str] = ()) -> Columns:
    """The columns of arrays that are in memory already; the parts of a Dict of arrays are put side by side."""
    try:
        flat = {key: _side_by_side(arrays[key], observation_keys, key) for key in KEYS if key in arrays}
    except (ValueError, TypeError) as error:
        raise MdptError(f"{name}: expected arrays of numbers. {_one_line(error)}") from error
    return Columns(name, name, flat, tuple(arrays))


def _side_by_side(given: Any, observation_keys: Sequence[str], where: str) -> Array:
    """An array, or the parts of a Dict as rows (n, -1): these keys in this order, by default all, sorted."""
    if not isinstance(given, Mapping):
        return np.asarray(given)
    check_keys(observation_keys, given, where)
    parts = [_side_by_side(given[key], (), where) for key in observation_keys or sorted(given)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


BULLET = {f"{name}BulletEnv-v0": f"bullet-{name.lower()}" for name in ("Ant", "HalfCheetah", "Hopper", "Walker2D")}
GENERATOR = 1  # version of the collected data: raise it when the same settings would give other bytes
SHARD = 5_000  # transitions that one worker collects at a time


class Collect(Source):
    """Rollouts of PyBullet's bundled agents, kept in the cache."""

    def know(self, section: DataSection) -> Known:
        environment = section.environment or "HopperBulletEnv-v0"
        _bundled_agent(environment)
        return Known({"environment": environment, "reference": BULLET.get(environment)})

    def open(self, section: DataSection, workers: Workers, show: Show) -> Opened:
        return open_hdf5(collect_dataset(section, workers, show))


def collect_dataset(
    section: DataSection,
    workers: Workers = Workers(),
    show: Show = lambda doing, done, total: None,
    folder: Path | None = None,
) -> Path:
    """Roll out PyBullet's bundled agent with perturbed weights into a file in D4RL's format, or find it in the cache.

    The file depends on the environment and the settings only, not on `workers`. folder: the cache; by default
    $MDPT_CACHE, else mdpt in $XDG_CACHE_HOME or ~/.cache. show: is told transitions.
    Raises: MdptError without an agent for this environment, for a damaged cached file, for more than memory holds.
    """
    environment = section.environment or ""
    agent = _bundled_agent(environment)
    options = section.environment_kwargs, section.max_episode_steps
    made_by = section.model_dump(include={"environment", "transitions", "levels", "action_noise", "seed"})
    made_by |= {"generator": GENERATOR}
    if any(options):
        made_by |= {"special": json.dumps(options)}
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or _cache_folder()) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', environment)}-{digest}.hdf5"
    if os.path.exists(path):
        _check_cached(path, section.transitions)
        return path

    spec = environment_spec(environment, *options, workers.timeout)
    if (dims := (agent[0].shape[0], agent[-1].shape[0])) != (spec.observation_dim, spec.action_dim):
        raise MdptError(f"{spec.id}: its agent takes {dims[0]} observations and gives {dims[1]} actions.")
    row = 4 * (spec.observation_dim + spec.action_dim + 1) + 2  # bytes; twice, while parts are joined
    check_memory(2 * row * section.transitions, "collect fewer [data] transitions")
    with making(path, show) as missing:
        if missing:
            shards = _shards(section, spec, agent)
            kept = [path.with_name(f".{path.stem}.{index}.part") for index in range(len(shards))]
            parts = list(_collected_parts(kept, shards, workers, partial(show, "collect")))
            arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            levels = np.array([shard.sigma for shard in shards], dtype=np.float32)
            arrays["infos/level"] = np.repeat(levels, [shard.size for shard in shards])
            packages = ("pybullet", "pybullet_envs_gymnasium", "numpy")
            _write_hdf5(path, arrays, made_by | {name: importlib.metadata.version(name) for name in packages})
            for file in kept:
                file.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Shard:
    """The rows of one level that a worker collects at a time."""

    spec: EnvironmentSpec
    agent: list[Array]
    sigma: float  # relative perturbation of the weights
    noise: float  # deviation of the noise on actions, in the environment's unit
    size: int
    seed: tuple[int, ...]


def _shards(section: DataSection, spec: EnvironmentSpec, agent: list[Array]) -> list[Shard]:
    share = section.transitions // len(section.levels)
    noise = np.broadcast_to(section.action_noise, len(section.levels)).tolist()
    return [
        Shard(spec, agent, sigma, noise[level], min(SHARD, share - start), (section.seed, level, index))
        for level, sigma in enumerate(section.levels)
        for index, start in enumerate(range(0, share, SHARD))
    ]


def _collected_parts(
    kept: Sequence[Path], shards: Sequence[Shard], workers: Workers, show: Callable[[int, int], None]
) -> Iterator[dict[str, Array]]:
    """Collect one shard after the other; each is kept in its file until all are there, so that a run can go on."""
    done, total = 0, sum(shard.size for shard in shards)
    old = list(itertools.takewhile(bool, map(_read_part, kept, shards)))
    left = shards[len(old) :]
    show(done, total)
    with contextlib.closing(parallel(collect_shard, left, workers, len(left))) as new:
        for index, part in enumerate(itertools.chain(old, new)):
            if index >= len(old):
                _write_hdf5(kept[index], part, {})
            done += shards[index].size
            show(done, total)
            yield part


def collect_shard(shard: Shard, watch: Watch) -> dict[str, Array]:
    """Play episodes, the last of which is cut where the shard is full: columns in D4RL's format."""
    spec, size, low_high = shard.spec, shard.size, _bounds(shard.spec)
    random = np.random.default_rng(np.random.SeedSequence(shard.seed))
    observations = np.empty((size, spec.observation_dim), dtype=np.float32)
    actions = np.empty((size, spec.action_dim), dtype=np.float32)
    rewards = np.empty(size, dtype=np.float32)
    terminals, timeouts = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    row, before = 0, shard.seed[-1] * SHARD  # rows of this level in other shards
    seed_generators(*shard.seed)

    def watched() -> contextlib.AbstractContextManager[None]:
        return watch.over(f"collecting in {spec.id}: level {shard.sigma:g}, row {before + row + 1:,}")

    with watched():
        environment = make_environment(spec)
    while row < size:
        weights = [w * (1 + np.float32(shard.sigma) * random.standard_normal(w.shape, np.float32)) for w in shard.agent]
        noise = random.standard_normal((spec.max_episode_steps, spec.action_dim), np.float32)
        noise *= np.float64(shard.noise)  # a Python float would be rounded to float32 first, and give other data
        with watched():
            observation = reset(environment, spec, int(random.integers(2**31)))
        for step in range(min(spec.max_episode_steps, size - row)):
            observations[row] = observation
            actions[row] = action = np.clip(_agent_action(weights, observations[row]) + noise[step], *low_high)
            with watched():
                observation, rewards[row], terminals[row], timeout, _ = take_step(environment, spec, action)
            row += 1
            if terminals[row - 1] or timeout:
                break
        timeouts[row - 1] = not terminals[row - 1]
    with watched():
        environment.close()
    columns = (observations, actions, rewards, terminals, timeouts)
    return dict(zip(("observations", "actions", *NARROW), columns, strict=True))


def _agent_action(weights: list[Array], observation: Array) -> Array:
    hidden = np.maximum(observation @ weights[0] + weights[1], 0)
    hidden = np.maximum(hidden @ weights[2] + weights[3], 0)
    return np.asarray(hidden @ weights[4] + weights[5])


def _read_part(path: Path, shard: Shard) -> dict[str, Array]:
    """The columns that were kept of a shard; empty if there is nothing, or something else."""
    try:
        with h5py.File(path, "r") as file:
            part = {key: np.asarray(file[key]) for key in ("observations", "actions", *NARROW)}
            return part if {len(array) for array in part.values()} == {shard.size} else {}
    except (OSError, RuntimeError, LookupError, TypeError):
        return {}


def _check_cached(path: Path, transitions: int) -> None:
    problem = "this cached dataset is damaged; delete the file, and it will be collected again"
    try:
        with h5py.File(path, "r") as file:
            if not len(file["rewards"]) == transitions == len(file["infos/level"]):
                raise LookupError("it lacks rows")
    except (OSError, RuntimeError, LookupError) as error:
        raise damaged(path, error, problem) from error


@cache  # it takes 0.15 s
def _bundled_agent(environment_id: str) -> list[Array]:
    """Weights and biases of the agent that PyBullet ships for an environment, layer by layer, float32.

    Its file is parsed, not run, because it would import an old gym.
    """
    package = importlib.util.find_spec("pybullet_envs")
    folder = Path(*package.submodule_search_locations or ()) / "examples" if package else Path()
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


MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # raw files under D4RL's names
PAUSE = 1.0  # seconds before a connection that was cut is made again
BLOCK = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class Family:
    """What the D4RL datasets whose whole name matches `pattern` have in common. Source: d4rl's registrations."""

    pattern: str
    environment: str | None  # the gymnasium id that moves and pays as in the data, or None for a reason
    max_episode_steps: int
    reward_scale: Literal["return-range", "minus-one", "none"]
    reason: str = ""
    observation_columns: int | None = None  # how many of the data's columns the environment observes; None: all
    warning: str = ""
    warning_from: tuple[int, ...] = ()  # MuJoCo's first version that the warning is about


NO_ANTMAZE = "gymnasium-robotics' AntMaze has motors five times as strong, another goal radius and Dict observations"
NO_MAZE2D = "gymnasium-robotics' PointMaze has other coordinates and goals, and Dict observations"
NO_BULLET = "D4RL's mazes for PyBullet are not registered with gymnasium"
NO_KITCHEN = "gymnasium-robotics' FrankaKitchen has Dict observations of 59 numbers, the data have 60"
NO_PEN = "gymnasium-robotics' AdroitHandPen goes on when the pen drops, where D4RL's ends"
NO_HAND = "gymnasium-robotics' AdroitHand adds the distance to the object to the reward, where D4RL's subtracts it"
ANT = "Ant-v4 does not move as in the data (error of one step: 0.18, below MuJoCo 3.5 0.005); use 'mujoco<3.5'"
MAZES = {"open": 150, "umaze": 300, "medium": 600, "large": 800}

FAMILIES = (
    Family("bullet-hopper-.+-v0", "HopperBulletEnv-v0", 1000, "return-range"),
    Family("bullet-halfcheetah-.+-v0", "HalfCheetahBulletEnv-v0", 1000, "return-range"),
    Family("bullet-walker2d-.+-v0", "Walker2DBulletEnv-v0", 1000, "return-range"),
    Family("bullet-ant-.+-v0", "AntBulletEnv-v0", 1000, "return-range"),
    Family("hopper-.+-v[0-2]", "Hopper-v4", 1000, "return-range"),
    Family("halfcheetah-.+-v[0-2]", "HalfCheetah-v4", 1000, "return-range"),
    Family("walker2d-.+-v[0-2]", "Walker2d-v4", 1000, "return-range"),  # v5 has other friction and reward
    Family("ant-.+-v[0-2]", "Ant-v4", 1000, "return-range", "", 27, ANT, (3, 5)),  # the other 84 columns are zero
    Family("antmaze-umaze(-.+)?-v[0-2]", None, 700, "minus-one", NO_ANTMAZE),
    Family("antmaze-(medium|large)-.+-v[0-2]", None, 1000, "minus-one", NO_ANTMAZE),
    *(Family(rf"maze2d-(eval-)?{maze}(-.+)?-v\d", None, steps, "none", NO_MAZE2D) for maze, steps in MAZES.items()),
    *(Family(f"bullet-maze2d-{maze}-v0", None, steps, "none", NO_BULLET) for maze, steps in MAZES.items()),
    Family("kitchen-.+-v0", None, 280, "none", NO_KITCHEN),
    Family("pen-.+-v[01]", None, 100, "none", NO_PEN),
    *(Family(f"{task}-.+-v[01]", None, 200, "none", NO_HAND) for task in ("door", "hammer", "relocate")),
)
REFUSED = {"flow": "needs the simulator SUMO", "carla": "needs the simulator CARLA", "minigrid": "has discrete actions"}


class D4rl(Source):
    """A dataset of D4RL by name."""

    def know(self, section: DataSection) -> Known:
        return d4rl_facts(section.dataset or "")

    def open(self, section: DataSection, workers: Workers, show: Show) -> Opened:
        return open_hdf5(find_d4rl(section.dataset or "", _cache_folder(), show))


def d4rl_facts(dataset: str) -> Known:
    """What D4RL knows about a dataset: environment, observation_columns, max_episode_steps, reward_scale and reference.

    Raises: MdptError for a name that is unknown or cannot be used, or where D4RL is not installed.
    """
    infos, family = _d4rl(dataset)
    names = ("environment", "observation_columns", "max_episode_steps", "reward_scale")
    fields = {key: value for key in names if (value := getattr(family, key)) is not None}
    if dataset in infos["REF_MIN_SCORE"]:
        fields["reference"] = tuple(float(infos[f"REF_{end}_SCORE"][dataset]) for end in ("MIN", "MAX"))
    warnings: tuple[str, ...] = ()
    if family.warning and _mujoco_version() >= family.warning_from:
        warnings = (f"{dataset}: with MuJoCo {importlib.metadata.version('mujoco')}, {family.warning}.",)
    return Known(fields, family.reason, warnings)


def _mujoco_version() -> tuple[int, ...]:
    """The first two numbers of the installed version; empty if there is none."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("mujoco"))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _d4rl(dataset: str) -> tuple[dict[str, Any], Family]:
    where, kind = f"dataset {dataset!r}", dataset.partition("-")[0]
    if kind in REFUSED:
        raise MdptError(f"{where}: cannot be used: {kind} {REFUSED[kind]}. Choose one like hopper-medium-v2.")
    infos = d4rl_infos(f"{where}: D4RL's table of datasets is not installed: pip install d4rl.")
    names = infos["DATASET_URLS"].keys()
    family = next((family for family in FAMILIES if re.fullmatch(family.pattern, dataset)), None)
    if family is None or dataset not in names:
        usable = [name for name in names if name.partition("-")[0] not in REFUSED]
        near = difflib.get_close_matches(dataset.lower(), usable, n=3, cutoff=0.3) or ["hopper-medium-v2"]
        raise MdptError(f"{where}: unknown to D4RL. Nearest: {', '.join(near)}.")
    return infos, family


def d4rl_infos(otherwise: str) -> dict[str, Any]:
    """D4RL's tables by dataset: DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE.

    Raises: MdptError with the text `otherwise`, where D4RL is not installed.
    """
    package = importlib.util.find_spec("d4rl")
    if package is None or not package.submodule_search_locations:
        raise MdptError(otherwise)
    # Only this file is run: importing the package would look for MuJoCo and complain.
    return runpy.run_path(str(Path(package.submodule_search_locations[0], "infos.py")))


def reference_returns(reference: str | tuple[float, float]) -> tuple[float, float]:
    """The raw returns that are scores 0 and 100: of a D4RL family, of a D4RL dataset, or the pair itself.

    A family is what comes before the dataset's kind: "bullet-hopper" for bullet-hopper-medium-v0.
    Raises: MdptError for an unknown name, a family whose tasks have different references, or min >= max.
    Source: d4rl/infos.py (arXiv 2004.07219).
    """
    if not isinstance(reference, str):
        low, high = reference
        if not low < high:
            raise MdptError(f"reference: [{low}, {high}] must be [min, max] with min < max.")
        return float(low), float(high)
    where = f"reference {reference!r}"
    infos = d4rl_infos(f"{where}: D4RL's table is not installed; give [min, max] instead.")
    table = {name: (float(low), float(infos["REF_MAX_SCORE"][name])) for name, low in infos["REF_MIN_SCORE"].items()}
    if reference in table:
        return table[reference]
    family = [name for name in table if re.fullmatch(re.escape(reference) + r"-.+-v\d+", name)]
    if len({table[name] for name in family}) > 1:
        raise MdptError(f"{where}: its tasks have different references; name one, such as {family[0]!r}.")
    if not family:
        families = sorted({re.sub(r"-[^-]+(-expert|-replay)?-v\d+$", "", name) for name in table})
        near = difflib.get_close_matches(reference, families, n=3, cutoff=0.3) or families
        raise MdptError(f"{where}: unknown to D4RL. Nearest: {', '.join(near)}. Or give [min, max].")
    return table[family[0]]


def find_d4rl(dataset: str, folder: Path, show: Show) -> Path:
    """The file of a D4RL dataset: from $D4RL_DATASET_DIR, ~/.d4rl/datasets or the cache `folder`, else downloaded there.

    Raises: MdptError as `d4rl_facts` and `download` do.
    """
    infos, _ = _d4rl(dataset)
    address = infos["DATASET_URLS"][dataset]
    name = address.rpartition("/")[2]
    places = [os.environ.get("D4RL_DATASET_DIR"), os.path.expanduser("~/.d4rl/datasets"), folder / "d4rl"]
    for path in (Path(place, name) for place in places if place):
        if os.path.isfile(path):
            return path
    addresses = [re.sub("^http:", "https:", address), MIRROR + name]
    with making(path, show) as missing:
        if missing:
            download(addresses, path, KEYS[:4], partial(show, "download"))
    return path


def download(
    addresses: Sequence[str], path: Path, keys: Sequence[str], show: Callable[[int, int], None], timeout: float = 30.0
) -> None:
    """Download an HDF5 file to `path`, whole or not at all, from the first address that has it.

    keys: that the file must have at its top. show: is told bytes so far, and in all (0: unknown). timeout: seconds that a
    connection may be silent.
    Raises: MdptError for a folder that cannot be written, and where no address has the file: why, for each.
    """
    problems: list[str] = []
    with written_whole(path, f"make room there, or {OTHER_CACHE}") as temporary:
        for address in addresses:
            try:
                return _save(address, temporary, keys, show, timeout)
            except MdptError as error:
                problems.append(f"  {address}: {error}")
        by_hand = f"Get it elsewhere, and put it into {path.parent} as {path.name}."
        raise MdptError("\n".join([f"{path.name}: cannot be downloaded.", *problems, by_hand]))


def _save(address: str, path: Path, keys: Sequence[str], show: Callable[[int, int], None], timeout: float) -> None:
    """Write what an address sends to a file. Raises: OSError where writing fails, MdptError for the address's faults."""
    kind = ""
    with path.open("wb") as file:
        for start, piece, total, kind in _pieces(address, timeout):
            file.seek(start)
            file.write(piece)
            show(start + len(piece), total)
        file.truncate()
    if not h5py.is_hdf5(path):
        raise MdptError(f"sent {path.stat().st_size:,} bytes of {kind!r}, which are no HDF5 file")
    try:
        with h5py.File(path, "r") as content:
            missing = [key for key in keys if key not in content]
    except (OSError, RuntimeError) as error:
        raise MdptError(f"sent a damaged HDF5 file. {_one_line(error)}") from error
    if missing:
        raise MdptError(f"sent an HDF5 file without {', '.join(missing)}")


def _pieces(address: str, timeout: float) -> Generator[tuple[int, bytes, int, str], None, None]:
    """Yield what an address sends: a piece's first byte, the piece, bytes in all (0: unknown), and Content-Type.

    A connection that is cut is made again, as long as each gets further than all before. It goes on where it was, or from
    byte 0 if the server knows no ranges or has another file by now.
    Raises: MdptError.
    """
    done = furthest = total = 0
    validator = ""
    while True:
        headers = {"User-Agent": "mdpt"} | ({"Range": f"bytes={done}-"} if done else {})
        headers |= {"If-Range": validator} if done and validator else {}
        before, problem = furthest, "the connection was cut"
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=timeout) as response:
                kind = response.headers.get("Content-Type", "")
                if done and response.status == 206:
                    sent, expected = response.headers.get("Content-Range", ""), rf"bytes {done}-\d+/({total or '.+'})"
                    if not re.fullmatch(expected, sent):
                        raise MdptError(f"sent {sent!r} when asked for the bytes from {done:,} of {total:,} on")
                else:
                    done, total = 0, response.length or 0
                    validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                while piece := response.read1(min(BLOCK, total - done) if total else BLOCK):
                    yield done, piece, total, kind
                    done += len(piece)
                    furthest = max(furthest, done)
                if done >= total:
                    return
        except (OSError, http.client.HTTPException) as error:
            problem = _one_line(error)
        if furthest == before:
            raise MdptError(problem + (f", after {furthest:,} of {total:,} bytes" if furthest else ""))
        time.sleep(PAUSE)


class Minari(Source):
    """A dataset of Minari by name."""

    def know(self, section: DataSection) -> Known:
        """What the metadata say: environment, environment_kwargs, max_episode_steps and reference.

        Of the environment only id, keyword arguments (without render_mode) and time limit are taken, because an entry
        point or a wrapper could be any code. Source: gymnasium's EnvSpec.to_json, of Minari's `recover_environment`.
        Raises: MdptError for a wrong id, a dataset that is missing and cannot be downloaded, or damaged metadata.
        """
        folder, metadata = _minari_metadata(section.dataset or "")
        fields: dict[str, Any] = {}
        bounds = _recorded(metadata, "observation_space", section.observation_keys), _recorded(metadata, "action_space")
        if bounds[1] and np.isfinite(bounds[1]).all() and np.less(*bounds[1]).all():
            fields["action_range"] = list(zip(*bounds[1], strict=True))
        low, high = (cast(Any, metadata.get(key)) for key in ("ref_min_score", "ref_max_score"))
        if type(low) in (int, float) and type(high) in (int, float) and -1e300 < low < high < 1e300:
            fields["reference"] = (low, high)
        try:
            spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or '{"id": null}')
            environment, kwargs, steps = spec["id"], {**(spec.get("kwargs") or {})}, spec.get("max_episode_steps")
            wrappers = ", ".join(repr(wrapper["name"]) for wrapper in spec.get("additional_wrappers") or ())
            kwargs.pop("render_mode", None)  # data may not ask for a window, or for pictures of each step
            json.dumps(kwargs, allow_nan=False)
            if own := kwargs.keys() & MAKE_ARGUMENTS:
                raise ValueError(f"kwargs have {sorted(own)}, which are gymnasium.make's own")
            reason = _unplayable(environment)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            problem = f"{folder}: the specification of its environment is unsound. {_one_line(error)}"
            return Known(fields, problem, (), bounds)
        if type(steps) is int and steps > 0:
            fields["max_episode_steps"] = steps
        if reason:
            return Known(fields, f"{folder}: {reason} You may name an environment yourself.", (), bounds)
        told = (f"{folder}: its environment was wrapped in {wrappers}; not applied here.",) if wrappers else ()
        return Known(fields | {"environment": environment, "environment_kwargs": kwargs}, "", told, bounds)

    def open(self, section: DataSection, workers: Workers, show: Show) -> Opened:
        dataset = section.dataset or ""
        return contextlib.nullcontext(columns_of(dataset, read_minari(dataset, section.observation_keys)))


def _recorded(metadata: dict[str, Any], key: str, keys: Sequence[str] = ()) -> Bounds | None:
    """The bounds of a space, flat, as Minari wrote it; of a Dict, of these parts. None where it has none."""

    def flat(space: dict[str, Any], end: str, keys: Sequence[str]) -> list[float]:
        if space["type"] != "Dict":
            return [float(bound) for bound in np.ravel(space[end])]
        parts = space["subspaces"]
        return [bound for part in keys or parts for bound in flat(parts[part], end, ())]

    try:
        space = json.loads(metadata[key])
        return flat(space, "low", keys), flat(space, "high", keys)
    except (LookupError, RecursionError, TypeError, ValueError):  # what the data need of it is checked as they are read
        return None


def _unplayable(environment: Any) -> str:
    """Why an environment that a file names is not made, or "" if gymnasium knows its id without importing a module."""
    import gymnasium

    if environment is None:
        return "it names no environment."
    if not isinstance(environment, str) or imported_for(environment):
        return f"its environment {environment!r} would import a module, which a file may not ask for."
    register_environments()
    if environment not in gymnasium.registry:
        return f"its environment {environment!r} is not registered with gymnasium; install what registers it."
    return ""


def _minari_metadata(dataset: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a dataset in Minari's local store, downloaded if missing, and its metadata.json."""
    where = f"Minari dataset {dataset!r}"
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", dataset):
        raise MdptError(f"{where}: not an id; expected one such as 'D4RL/door/human-v2'.")
    store = os.environ.get("MINARI_DATASETS_PATH") or os.path.expanduser("~/.minari/datasets")
    folder = Path(store, dataset, "data")
    if problem := why_unreadable(folder / "metadata.json", "is missing"):
        if problem != "is missing":
            raise MdptError(f"{folder / 'metadata.json'}: {problem}.")
        if (folder / "main_data.hdf5").is_file():
            told = "is there, but no metadata.json: the layout of a Minari before 0.5, which is not read; get it again"
            raise MdptError(f"{folder / 'main_data.hdf5'}: {told}: minari download {dataset}")
        if importlib.util.find_spec("minari") is None:
            remedy = f"pip install 'minari[hf]', and then: minari download {dataset}"
            raise MdptError(f"{where}: not in {store}. Get it: {remedy}")
        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("minari").download_dataset(dataset)
        except Exception as error:
            raise MdptError(f"{where}: not in {store}, and its download failed. {_one_line(error)}") from error
    try:
        metadata = json.loads((folder / "metadata.json").read_bytes())
        if not isinstance(metadata, dict):
            raise TypeError(f"expected an object, got {type(metadata).__name__}")
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise MdptError(f"{folder}: metadata.json is missing or damaged; get it again. {_one_line(error)}") from error
    return folder, metadata


def read_minari(dataset: str, observation_keys: Sequence[str] = ()) -> dict[str, Array]:
    """Read a Minari dataset into columns in D4RL's form, with episodes in the order of their numbers.

    observations and next_observations (n, O), actions (n, A), rewards (n,), terminals and timeouts (n,) bool. Dict
    observations are flattened as by gymnasium's FlattenObservation; observation_keys: its parts to use, in this order.
    Where the metadata have no spaces, as before Minari 0.5, they are inferred from the arrays. A step that is
    terminated and truncated is a terminal; an episode that ends with neither was cut by a time limit.
    Raises: MdptError that names the episode and the key at fault.
    Source: Minari's dataset standard, https://minari.farama.org/content/dataset_standards.
    """
    folder, metadata = _minari_metadata(dataset)
    columns: dict[str, list[Array]] = {}
    try:
        storage = metadata.get("data_format", "hdf5")
        if storage == "hdf5":  # else Minari would make an environment by the file's own entry point, to know the spaces
            metadata = {"observation_space": "null", "action_space": "null"} | metadata
        observation_space, action_space = (json.loads(metadata[f"{key}_space"]) for key in ("observation", "action"))
        if action_space and action_space["type"] != "Box":
            raise MdptError(f"{folder}: its actions are {action_space['type']!r}; only a Box can be learned.")
        for where, episode in _minari_episodes(dataset, folder, storage):
            steps = _child(episode, "rewards", where).size
            observations = _flatten(episode, "observations", observation_space, steps + 1, where, observation_keys)
            rewards, ends, cuts = (
                _flatten(episode, key, None, steps, where)[:, 0] for key in ("rewards", "terminations", "truncations")
            )
            terminals, timeouts = ends != 0, (cuts != 0) & (ends == 0)
            timeouts[-1:] |= ~terminals[-1:]
            actions = _flatten(episode, "actions", action_space, steps, where)
            if not action_space and actions.dtype.kind != "f":
                raise MdptError(f"{where} 'actions' are {actions.dtype}; only floats can be learned.")
            arrays = (observations[:-1], actions, rewards, terminals, observations[1:], timeouts)
            for key, array in zip(KEYS, arrays, strict=False):
                columns.setdefault(key, []).append(array)
    except (AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(folder, error, "incomplete or damaged; get it again") from error
    if not columns:
        raise MdptError(f"{folder}: it holds no episode.")
    check_memory(max(sum(array.nbytes for array in arrays) for arrays in columns.values()), MORE_MEMORY)
    return {key: np.concatenate(columns.pop(key)) for key in [*columns]}


def _minari_episodes(dataset: str, folder: Path, storage: str) -> Iterator[tuple[str, Any]]:
    """Yield for each episode its place, for messages, and its arrays by key: HDF5 not yet read, or from Minari's reader."""
    if storage == "hdf5":
        with h5py.File(folder / "main_data.hdf5", "r") as file:
            for key in sorted((key for key in file if re.fullmatch(r"episode_\d+", key)), key=lambda key: int(key[8:])):
                yield f"{folder}: {key}", _child(file, key, f"{folder}:")
        return
    try:
        for episode in importlib.import_module("minari").load_dataset(dataset).iterate_episodes():
            yield f"{folder}: episode_{episode.id}", vars(episode)
    except Exception as error:
        remedy = "pip install 'minari[arrow]'"
        raise MdptError(f"{folder}: {storage!r} needs Minari's own reader: {remedy}. {_one_line(error)}") from error


def _child(parent: Any, key: str, where: str) -> Any:
    """What is stored under a key: an array, or a group of arrays by key; of HDF5 only what is in the file itself."""
    if not isinstance(parent, h5py.Group):
        return parent[key]
    inside = "/" not in key and isinstance(
        parent.get(key, getlink=True), h5py.HardLink
    )  # a path could pass other links
    node = parent[key] if inside else None
    if node is None:
        raise MdptError(f"{where} {key!r} is missing, or lies outside the file, where it is not looked for.")
    if isinstance(node, h5py.Dataset) and (problem := storage_problem(node)):
        raise MdptError(f"{where} {key!r} {problem}")
    return node


def _flatten(
    parent: Any, key: str, space: dict[str, Any] | None, rows: int, where: str, keys: Sequence[str] = ()
) -> Array:
    """Read what an episode holds under a key, (rows, -1); the parts of a Dict side by side, in the order of its space.

    space: as Minari writes it to its metadata; None for numbers of any shape, or a Dict of such in alphabetical order.
    keys: the parts of the Dict to use, in this order; empty: all.
    """
    node, where = _child(parent, key, where), f"{where} {key!r}"
    kind = space["type"] if space else "Dict" if isinstance(node, Mapping) else "Box"
    if kind == "Dict":
        spaces = space["subspaces"] if space else dict.fromkeys(sorted(node))
        check_keys(keys, spaces, where)
        return np.concatenate([_flatten(node, name, spaces[name], rows, where) for name in keys or spaces], axis=1)
    if keys:
        raise MdptError(f"{where} is no Dict, of which [data] observation_keys could choose.")
    if kind != "Box" or not hasattr(node, "dtype") or node.dtype.kind not in NUMERIC:
        problem = kind if kind != "Box" else "not numbers"
        raise MdptError(f"{where} is {problem}; only a Box, or a Dict of such, is read.")
    expected = (rows, *(space["shape"] if space else node.shape[1:]))
    if node.shape != expected:
        raise MdptError(f"{where} has shape {node.shape}, expected {expected}.")
    check_memory(bytes_to_read(node, rows), MORE_MEMORY)
    return np.asarray(node[()]).reshape(rows, int(np.prod(expected[1:])))


SOURCES: dict[str, Source] = {
    "collect": Collect(),
    "hdf5": Hdf5File(),
    "d4rl": D4rl(),
    "minari": Minari(),
    "arrays": Arrays(),
}

# --- the dataset --------------------------------------------------------------------------------------------------


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

    def windows(self, rows: Array, horizon: int) -> tuple[Array, Array]:
        """Actions of the windows that begin at `rows` (n,), and which of them are of the same episode: (n, H, A), (n, H).

        The others are the actions of the rows that follow, as in training.
        """
        _, stops = episode_bounds(self.terminals, self.timeouts)
        places = rows[:, None] + np.arange(horizon)
        ends = stops[np.searchsorted(stops, rows, side="right")]
        return self.actions[places % len(self.actions)], places < ends[:, None]


@dataclass(frozen=True)
class RewardScale:
    """How rewards are scaled before values are learned from them: multiplier * raw + offset."""

    rule: str  # "none", "minus-one", "return-range" or "number"
    multiplier: float
    offset: float


@dataclass(frozen=True)
class Identity:
    """Which data these are."""

    source: str  # as in [data]
    name: str  # of the dataset or the file
    transitions: int  # rows of the file
    no_environment: str  # why they cannot be played, or ""
    hash: str  # SHA-256 of the content of all columns that are read
    mismatched: list[int] = field(default_factory=list)  # observation columns that start otherwise than after a reset


Column = Literal["observations", "actions", "rewards", "next_observations", "terminals"]
ROW: tuple[Column, ...] = ("observations", "actions", "rewards", "next_observations", "terminals")


def join_columns(columns: Mapping[Column, Array], out: Array | None = None) -> Array:
    """Put columns (n, size) or (n,) side by side as rows, float32, in the order of `ROW`."""
    parts = [column if column.ndim == 2 else column[:, None] for column in (columns[name] for name in ROW)]
    if out is None:
        out = np.empty((len(parts[0]), sum(part.shape[1] for part in parts)), dtype=np.float32)
    return np.concatenate(parts, axis=1, out=out)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training transitions as rows, held-out episodes, and where they came from.

    The next row of `rows` is the next step of the same episode, up to the episode's end in `ends`. In data without
    next_observations, the last row of an episode that a time limit cut, or that the file ends with, is no transition, as
    what followed it is unknown; its action is kept in `cut_actions`, as the next action of the row before. With [data]
    keep_timeouts it is one that is followed by itself.
    """

    environment: EnvironmentSpec
    section: DataSection  # completed by what its source knows
    rows: Array  # (n, 2 O + A + 2) float32, see `ROW`: raw observations, actions in [-1, 1], scaled rewards
    ends: Array  # (E,) int64, increasing: one past the last row of each training episode that has rows
    cut_actions: Array  # (E, A) float32 in [-1, 1]: the action after that row; NaN where none is known
    mean: Array  # (O,) float32, of the training observations
    deviation: Array  # (O,) float32
    constant: Array  # (O,) bool, those that never vary
    held_out: HeldOut
    episode_returns: Array  # (W,) float64, raw, undiscounted, of all whole episodes used, held-out ones included
    episode_lengths: Array  # (W,) int64
    reward_scale: RewardScale
    identity: Identity
    terminal_count: int  # in all data
    timeout_count: int
    timeouts_counted: bool  # whether the data have no timeouts, so that time limits were counted
    warnings: tuple[str, ...]
    both_count: int = 0  # rows of all data that are a terminal and at a time limit

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> list[int]:
        """Widths of the columns of `ROW`."""
        spec = self.environment
        dims = {"observations": spec.observation_dim, "next_observations": spec.observation_dim}
        return [(dims | {"actions": spec.action_dim}).get(name, 1) for name in ROW]

    def column(self, name: Column) -> Array:
        """A column of the transitions, (n, O), (n, A) or (n,), as a view."""
        sizes, place = self.sizes, ROW.index(name)
        part = self.rows[:, sum(sizes[:place]) : sum(sizes[: place + 1])]
        return part[:, 0] if name in NARROW else part


def load_dataset(
    section: DataSection,
    workers: Workers = Workers(),
    show: Show = lambda doing, done, total: None,
    arrays: Mapping[str, Array] | None = None,
    spec: EnvironmentSpec | None = None,
) -> Dataset:
    """Get the data from their source and prepare them for training.

    workers: for collecting. show: is told what takes long. arrays: the data of source "arrays", by D4RL's keys. spec: of
    the environment, if it is known already and need not be made.
    Raises: MdptError for a mistake in the settings or the data.
    """
    if arrays is not None and section.source != "arrays":
        raise MdptError(f"[data] source = {section.source!r}: arrays are for source 'arrays'")
    source = SOURCES[section.source] if arrays is None else Arrays(arrays)
    section, known = _completed(section, source.know(section))
    resets = None
    if spec is None and section.environment is not None:
        options = section.environment_kwargs, section.max_episode_steps
        spec = environment_spec(section.environment, *options, workers.timeout, section.observation_keys)
        if section.source != "collect":
            resets = partial(first_observations, spec, workers.timeout)
        if not spec.repeatable:
            told = f"{spec.id}: two episodes with the same seed and actions differ; no score is repeatable."
            known = known._replace(warnings=(*known.warnings, told))
    observations = arrays["observations"] if arrays is not None and "observations" in arrays else None
    is_dict = section.source == "minari" or isinstance(observations, Mapping)
    if section.observation_keys and not is_dict and not (spec and spec.observation_keys):
        raise MdptError("[data] observation_keys: neither the data nor the environment have Dict observations.")
    with source.open(section, workers, show) as columns:
        return prepare(columns, section, spec, known, show, resets)


def _completed(section: DataSection, known: Known) -> tuple[DataSection, Known]:
    """[data] with what its source knows, where the user says nothing; and what still holds of that."""
    if section.environment not in (None, known.fields.get("environment")):  # the user's own; the source knows another
        about = ("environment_kwargs", "max_episode_steps", "observation_columns")
        known = Known({key: value for key, value in known.fields.items() if key not in about}, "", known.warnings)
    blank = {key: value for key, value in known.fields.items() if getattr(section, key) in (None, {})}
    path = None if section.path is None else _absolute(section.path, Path())
    reward_scale = section.reward_scale or known.fields.get("reward_scale", "return-range")
    section = section.model_copy(update=blank | {"path": path, "reward_scale": reward_scale})
    if section.reference is not None:
        reference_returns(section.reference)
    return section, known


def prepare(
    columns: Columns,
    section: DataSection,
    spec: EnvironmentSpec | None,
    known: Known,
    show: Show,
    resets: Callable[[], tuple[Array, Array]] | None = None,
) -> Dataset:
    """Build the dataset of these columns, which are read once, some rows at a time.

    spec: None where there is no environment. resets: gives `first_observations`, to compare the data with; None: nothing
    is compared. Raises: MdptError that names what is at fault in the columns.
    """
    where, dims = columns.where, check_shapes(columns, spec, section.observation_columns)
    limit = section.max_episode_steps if spec is None or spec.id is None else spec.max_episode_steps
    episodes, told = read_episodes(columns, limit)
    spec = spec or _spec_of_data(section, dims, int(episodes.lengths.max()))
    if spec.id is not None and known.recorded[1] is not None:
        _check_recorded_actions(*known.recorded[1], spec, where)
    has_next = "next_observations" in columns.arrays
    use = choose_rows(episodes, section, spec, has_next, where)
    if not (has_next or section.keep_timeouts):
        told += _check_cut_rewards(episodes, where)
    if section.held_out > 0 and not use.held_out.any():
        told += (f"{where}: a single episode, so none is held out.",)
    returns = np.add.reduceat(episodes.rewards.astype(np.float64), episodes.starts)[use.whole]
    scale = _reward_scale(section.reward_scale or "none", returns, spec.max_episode_steps)
    rewards = _scale_rewards(episodes.rewards, scale, where)
    wide = _read_wide(columns, spec, section.storage, episodes, rewards, use, show)
    wide.cut_actions[use.train[use.last]] = np.nan  # these rows are transitions, and nothing follows
    mean, deviation, constant = moments(wide.rows, dims[0])
    told += tuple(f"{where}: observation columns {text}." for text in _hidden_columns(mean, deviation, constant))
    told += tuple(f"{where}: {text}." for text in _odd_actions(wide.rows, spec))
    if has_next:
        told += _check_next(wide.rows, spec, episodes, use, where, section.source)
    mismatched: list[int] = []
    if resets is not None:
        starts = wide.rows[np.append(0, use.ends[:-1]), : dims[0]]
        mismatched, text = _compare(starts, len(episodes.starts), known.recorded[0], spec, *resets())
        told += tuple(f"{where}: {each}." for each in text)
    if count := len(wide.excess):
        told += (f"{where}: clipped the actions of {count} rows, out of bounds by {wide.excess.max():.1e} at most.",)
    if section.normalization == "none":
        mean, deviation = np.zeros_like(mean), np.ones_like(deviation)
    narrow = (column[use.held_out] for column in (rewards, episodes.terminals, episodes.timeouts))
    return Dataset(
        environment=spec,
        section=section,
        rows=wide.rows,
        ends=use.ends,
        cut_actions=wide.cut_actions,
        mean=mean,
        deviation=deviation,
        constant=constant,
        held_out=HeldOut(wide.observations, wide.actions, *narrow),
        episode_returns=returns,
        episode_lengths=episodes.lengths[use.whole],
        reward_scale=scale,
        identity=Identity(section.source, columns.name, len(rewards), known.no_environment, wide.hash, mismatched),
        terminal_count=int(episodes.terminals.sum()),
        timeout_count=int(episodes.timeouts.sum()),
        both_count=int((episodes.terminals & episodes.timeouts).sum()),
        timeouts_counted=episodes.counted,
        warnings=known.warnings + told,
    )


def _spec_of_data(section: DataSection, dims: tuple[int, int], longest: int) -> EnvironmentSpec:
    """What stands for an environment where there is none; longest: length of the longest episode."""
    given = section.action_range or (-1.0, 1.0)
    pairs = given if isinstance(given, list) else [given] * dims[1]
    if len(pairs) != dims[1]:
        raise MdptError(f"[data] action_range has {len(pairs)} pairs of bounds for {dims[1]} actions.")
    low, high = zip(*pairs, strict=True)
    return EnvironmentSpec(None, *dims, low, high, section.max_episode_steps or longest)


@dataclass(frozen=True, eq=False)
class Episodes:
    """Where episodes begin and how they end: rewards (n,) raw, terminals and timeouts (n,) bool, starts, lengths (E,)."""

    rewards: Array
    terminals: Array
    timeouts: Array
    starts: Array
    lengths: Array
    counted: bool  # whether the data have no timeouts, so that time limits were counted


def read_episodes(columns: Columns, limit: int | None) -> tuple[Episodes, tuple[str, ...]]:
    """The episodes of these columns, cut every `limit` rows if there are no timeouts, and warnings."""
    rewards, terminals, where = columns.read("rewards"), columns.read("terminals"), columns.where
    warnings: tuple[str, ...] = ()
    timeouts = columns.read("timeouts") if "timeouts" in columns.arrays else np.zeros_like(terminals)
    if "masks" in columns.arrays:
        ends, terminals = terminals, ~columns.read("masks")
        timeouts = timeouts | (ends & ~terminals)
        meant = f"the {terminals.sum()} rows where 'masks' are 0 are terminals, other ends {timeouts.sum()} time limits"
        warnings = (f"{where}: has 'masks', as OGBench: {meant}.",)
    counted = "timeouts" not in columns.arrays and not timeouts.any()
    if counted and limit is not None:
        timeouts = count_timeouts(terminals, limit)
        warnings += (f"{where}: no 'timeouts'; episodes end at terminals and every {limit} rows.",)
        if (both := int((terminals & timeouts).sum())) > 0.5 * terminals.sum():
            told = f"{both} of its {terminals.sum()} terminals fall on such rows; 'timeouts' would tell"
            warnings += (f"{where}: {told}.",)
    elif counted:
        warnings += (f"{where}: no 'timeouts'; episodes end at terminals alone. [data] max_episode_steps cuts them.",)
    elif timeouts.any() and terminals[timeouts].all():
        remedy = "if these episodes were only cut, set 'terminals' to 0 in these rows"
        told = f"all {timeouts.sum()} 'timeouts' are 'terminals', too, which win: nothing is expected after them"
        warnings += (f"{where}: {told}; {remedy}.",)
    starts, stops = episode_bounds(terminals, timeouts)
    if looks_late(columns, starts, terminals, rewards):
        late = "begins with reward 0 and ends with action 0, as in d4rl-pybullet's files, whose rewards and terminals"
        warnings += (f"{where}: every episode {late} lie one row late; if so, move them up before training.",)
    return Episodes(rewards, terminals, timeouts, starts, stops - starts, counted), warnings


def looks_late(columns: Columns, starts: Array, terminals: Array, rewards: Array) -> bool:
    """Whether rewards and terminals seem to lie a row late: episodes begin with reward 0 and end with action 0."""
    ends = np.flatnonzero(terminals)[:50]
    if len(ends) < 2 or rewards[starts].any() or not rewards.any():
        return False
    return not any(columns.read("actions", row, row + 1).any() for row in ends.tolist())


def _check_cut_rewards(episodes: Episodes, where: str) -> tuple[str, ...]:
    """A warning where rows at time limits, which are dropped, hold more of the reward than of the rows.

    Raises: MdptError where they hold much more.
    """
    size, cuts = np.abs(episodes.rewards.astype(np.float64)), episodes.timeouts
    dropped, kept = size[cuts].sum(), size[~cuts].sum()
    share, rows = dropped / (dropped + kept or 1.0), cuts.mean()
    if share < 0.01 or (share < 2 * rows and kept):
        return ()
    problem = (
        f"the {cuts.sum()} rows at time limits hold {share:.1%} of the reward, and are dropped: what follows is unknown"
    )
    text = f"{where}: {problem}; add 'next_observations', or set [data] keep_timeouts = true."
    if share > 5 * rows or not kept:
        raise MdptError(text)
    return (text,)


class Use(NamedTuple):
    """How the rows and episodes of the columns are used."""

    train: Array  # (n,) bool, training transitions
    held_out: Array  # (n,) bool
    whole: Array  # (all episodes,) bool: used, and complete, so that their returns count
    last: Array  # (E,) int64, the last row of each training episode that has transitions, itself one or not
    ends: Array  # (E,) int64, as in Dataset


def choose_rows(episodes: Episodes, section: DataSection, spec: EnvironmentSpec, has_next: bool, where: str) -> Use:
    """Choose the episodes to train on and to hold out, and the rows of these that are transitions.

    Raises: MdptError where nothing is left, or an episode is longer than the time limit.
    """
    starts, lengths, longest = episodes.starts, episodes.lengths, int(episodes.lengths.argmax())
    if spec.id is not None and lengths[longest] > spec.max_episode_steps:
        raise MdptError(
            f"{where}: the episode from row {starts[longest]} on has {lengths[longest]} rows, more than the time limit "
            f"{spec.max_episode_steps} of {spec.id}. Its 'timeouts' miss the ends of episodes, and values would be learned "
            "across them: mend or delete 'timeouts', or set [data] max_episode_steps."
        )
    train, held_out, whole = _choose_episodes(episodes, section, spec)
    transitions = transition_rows(episodes.timeouts, has_next, section.keep_timeouts)
    chosen = transitions & np.repeat(train, lengths)
    if not chosen.any():
        remedy = f"lower held_out (now {section.held_out}) or add episodes"
        raise MdptError(f"{where}: no transition is left to train on; {remedy}.")
    counts = np.add.reduceat(chosen, starts, dtype=np.int64)
    with_rows = counts > 0
    last, ends = (starts + lengths - 1)[with_rows], np.cumsum(counts[with_rows])
    return Use(chosen, np.repeat(held_out, lengths), whole, last, ends)


def _choose_episodes(episodes: Episodes, section: DataSection, spec: EnvironmentSpec) -> tuple[Array, Array, Array]:
    """Which episodes to train on, which to hold out, and which of both are whole; bool, one of each episode."""
    ends = episodes.starts + episodes.lengths - 1
    complete = (episodes.terminals | episodes.timeouts)[ends]
    if not complete.any():
        complete[:] = True
    whole, used = complete, np.ones(len(ends), dtype=np.bool_)
    if section.source == "collect":  # a shard that is full cuts an episode
        whole = episodes.terminals[ends] | (episodes.lengths == spec.max_episode_steps)
    if section.fraction < 1:
        used = _draw(complete, section.fraction, [section.seed, 1], spare=0)
        complete &= used
    held_out = _draw(complete, section.held_out, section.seed, spare=1)
    return used & ~held_out, held_out, whole & used if (whole & used).any() else complete


def _draw(complete: Array, fraction: float, seed: int | list[int], spare: int) -> Array:
    """Draw a fraction of the complete episodes, at least one, but never the last `spare`; bool, one of each episode."""
    drawn = np.zeros(len(complete), dtype=np.bool_)
    total = int(complete.sum())
    count = min(max(1, round(fraction * total)), total - spare) if fraction > 0 else 0
    drawn[np.random.default_rng(seed).permutation(np.flatnonzero(complete))[:count]] = True
    return drawn


def _reward_scale(rule: str | float | tuple[float, float], returns: Array, max_episode_steps: int) -> RewardScale:
    if rule in ("none", "minus-one"):
        return RewardScale(str(rule), 1.0, -1.0 if rule == "minus-one" else 0.0)
    if rule == "return-range":
        where, spread = "reward_scale 'return-range'", float(returns.max() - returns.min())
        if len(returns) == 1:
            ends = "'terminals', 'timeouts' or [data] max_episode_steps tell where episodes end"
            raise MdptError(f"{where}: there is a single episode. {ends}; or choose 'none' or a number.")
        if spread <= 1e-6 * np.abs(returns).max():
            found = f"{returns.min():.7g} to {returns.max():.7g}"
            raise MdptError(f"{where}: all returns are equal, {found}; choose 'none' or a number.")
        return RewardScale(rule, max_episode_steps / spread, 0.0)
    multiplier, offset = rule if isinstance(rule, tuple) else (float(rule), 0.0)
    return RewardScale("number", multiplier, offset)


def _scale_rewards(rewards: Array, scale: RewardScale, where: str) -> Array:
    """Rewards (n,) as values are learned from them, float32."""
    with np.errstate(over="ignore"):
        scaled: Array = (rewards * scale.multiplier + scale.offset).astype(np.float32)
    if not np.isfinite(scaled).all():
        problem = f"rewards x {scale.multiplier:.4g} are no finite float32"
        raise MdptError(f"{where}: {problem}; choose another reward_scale.")
    return scaled


def _allocate(storage: str, count: int, width: int) -> Array:
    """Rows (count, width) float32, uninitialized: in memory, or in a file of the cache that ends with this process."""
    size = 4 * count * width  # bytes
    if storage == "memory":
        check_memory(size, "set [data] storage = 'disk', or a smaller fraction")
        return np.empty((count, width), dtype=np.float32)
    folder = _cache_folder()
    try:
        make_writable_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # else a disk that is full later would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype=np.float32, mode="r+", shape=(count, width))
    except OSError as error:
        problem = f"no room for {size / 1e9:.1f} GB of transitions ({error.strerror})"
        raise MdptError(f"{folder}: {problem}; set MDPT_CACHE to a folder on a larger disk") from error


class Wide(NamedTuple):
    """What a pass over the wide columns gives."""

    rows: Array  # training transitions, as in Dataset
    observations: Array  # (m, O), held out
    actions: Array  # (m, A), held out
    cut_actions: Array  # (E, A): of the last row of each training episode
    excess: Array  # (clipped rows,): how far their actions were out of bounds
    hash: str  # of all columns


def _read_wide(
    columns: Columns, spec: EnvironmentSpec, storage: str, episodes: Episodes, rewards: Array, use: Use, show: Show
) -> Wide:
    """Read the wide columns once, some rows at a time, and fill the rows. rewards: (n,), scaled."""
    total, dim, has_next = len(rewards), spec.observation_dim, "next_observations" in columns.arrays
    rows = _allocate(storage, int(use.train.sum()), 2 * dim + spec.action_dim + 2)
    digests = {key: hashlib.sha256() for key in ("observations", "actions", "next_observations")[: 2 + has_next]}
    digests |= {key: hashlib.sha256(getattr(episodes, key).data) for key in NARROW}
    kept: list[tuple[Array, ...]] = []
    filled, is_last = 0, np.zeros(total, dtype=np.bool_)
    is_last[use.last] = True
    for start in range(0, total, CHUNK):
        part = slice(start, min(start + CHUNK, total))
        block = columns.read("observations", start, part.stop + 1)[:, :dim]
        clipped, excess = _clip(columns, spec, part)
        read = {"observations": block[: part.stop - start], "actions": clipped}
        if has_next:
            after = columns.read("next_observations", start, part.stop, unread=episodes.terminals[part])
            read["next_observations"] = after[:, :dim]
        for key, array in read.items():
            digests[key].update(np.ascontiguousarray(array).data)
        observations, actions = read["observations"], scale_actions(clipped, spec)
        places, aside = np.flatnonzero(use.train[part]), use.held_out[part]
        following = places + ~episodes.timeouts[part][places]  # of a time limit's row that is kept, itself
        row: dict[Column, Array] = {
            "observations": observations[places],
            "actions": actions[places],
            "rewards": rewards[part][places],
            "next_observations": read["next_observations"][places] if has_next else block[following],
            "terminals": episodes.terminals[part][places],
        }
        join_columns(row, out=rows[filled : filled + len(places)])
        filled += len(places)
        kept.append((observations[aside], actions[aside], actions[is_last[part]], excess))
        if total > 10 * CHUNK:
            show("read", part.stop, total)
    observations, actions, last_actions, excess = map(np.concatenate, zip(*kept, strict=True))
    digest = json.dumps(sorted((key, sha.hexdigest()) for key, sha in digests.items()))
    return Wide(rows, observations, actions, last_actions, excess, hashlib.sha256(digest.encode()).hexdigest())


def _clip(columns: Columns, spec: EnvironmentSpec, part: slice) -> tuple[Array, Array]:
    """Read actions (m, A), clipped to their bounds, and how far rows were outside, (clipped,). Raises: MdptError."""
    actions, (low, high) = columns.read("actions", part.start, part.stop), _bounds(spec)
    excess = np.maximum(low - actions, actions - high)
    expected = f"expected within {low.tolist()} and {high.tolist()} of {spec.name}"
    remedy = "" if spec.id else "; [data] action_range sets the bounds"
    columns.forbid("actions", actions, excess > 1e-3 * (high - low), expected + remedy, part.start)
    return np.clip(actions, low, high), excess[(excess > 0).any(axis=1)].max(axis=1)


def moments(rows: Array, wide: int) -> tuple[Array, Array, Array]:
    """Mean and deviation (wide,) float32 of the leading columns, and which of them never vary, (wide,) bool.

    A thousandth is added to deviations, as in TD3+BC; that of a column that never varies is 1, so that noise is not
    amplified. Computed in float64, some rows at a time, so that memory and disk give the same.
    """
    count, mean, squares = 0, np.zeros(wide), np.zeros(wide)
    low, high = np.full(wide, np.inf), np.full(wide, -np.inf)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK, :wide].astype(np.float64)
        low, high = np.minimum(low, part.min(0)), np.maximum(high, part.max(0))
        shift, more = part.mean(0) - mean, len(part)
        squares += part.var(0) * more + shift**2 * (count * more / (count + more))
        mean += shift * (more / (count + more))
        count += more
    constant = high - low <= 1e-6 * np.maximum(1, np.abs(mean))
    deviation = np.where(constant, 1.0, np.sqrt(squares / count) + 1e-3)
    return mean.astype(np.float32), deviation.astype(np.float32), constant


def _hidden_columns(mean: Array, deviation: Array, constant: Array) -> Iterator[str]:
    """Report columns that networks cannot see though they may vary, by what `moments` returned."""
    if (far := constant & (np.abs(mean) > 1e4)).any():
        yield f"{np.flatnonzero(far).tolist()} do not vary in float32, so far from 0; subtract what they have in common"
    if (faint := ~constant & (deviation < 1.1e-3)).any():
        yield f"{np.flatnonzero(faint).tolist()} vary by less than 0.0001, too little to be seen; use another unit"


def _odd_actions(rows: Array, spec: EnvironmentSpec) -> Iterator[str]:
    """Report dimensions of actions that can hardly be learned."""
    actions = rows[:: 1 + len(rows) // 20_000, spec.observation_dim : spec.observation_dim + spec.action_dim]
    low, high = actions.min(axis=0), actions.max(axis=0)
    if (narrow := (high > low) & (high - low < 0.02)).any():  # of [-1, 1]
        remedy = (
            "choose narrower bounds" if spec.id else "[data] action_range takes a pair of bounds for each dimension"
        )
        yield f"actions fill less than 1 % of their range in dimensions {np.flatnonzero(narrow).tolist()}; {remedy}"
    two = (high > low) & ((actions == low) | (actions == high)).all(axis=0)
    if spec.id is None and two.any():
        remedy = "discrete or one-hot actions cannot be learned"
        yield f"actions have only two values in dimensions {np.flatnonzero(two).tolist()}; {remedy}"


def _check_next(
    rows: Array, spec: EnvironmentSpec, episodes: Episodes, use: Use, where: str, source: str
) -> tuple[str, ...]:
    """A warning where next_observations never differ from observations.

    Raises: MdptError where those at time limits are of other episodes; where these limits are only counted, a warning.
    """
    own, following = rows[:, : spec.observation_dim], rows[:, -1 - spec.observation_dim : -1]
    parts = (slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK))
    if all(np.array_equal(own[part], following[part]) for part in parts) and not rows[:, -1].all():
        return (
            f"{where}: 'next_observations' are 'observations' in every row; leave them out, and the next row tells.",
        )
    cut = (episodes.timeouts & ~episodes.terminals)[use.last[:-1]] & use.train[use.last[:-1] + 1]
    begin = use.ends[:-1][cut]
    begin = begin[(own[begin] != own[begin - 1]).any(axis=1)]  # else nothing can be told
    if source != "minari" and len(begin) > 1 and np.array_equal(own[begin], following[begin - 1]):
        problem = (
            f"{where}: 'next_observations' at all time limits are the observations of the next rows, where other "
            "episodes begin, as environments store them that reset themselves. Leave 'next_observations' out (rows at "
            "time limits are then dropped); or, where one recording goes on across the cut, set 'timeouts' to 0 there."
        )
        if not episodes.counted:
            raise MdptError(problem)
        return (problem,)
    return ()


def _compare(
    starts: Array, episodes: int, recorded: Bounds | None, spec: EnvironmentSpec, seen: Array, bounds: Array
) -> tuple[list[int], list[str]]:
    """Observation columns that do not match the environment, and what to warn of.

    starts: first observations in the data (E, O). recorded: bounds in the data. seen, bounds: `first_observations`.
    A column does not match where more than half of those seen lie outside of the range of `starts`, widened on both
    sides by its width, or by 1 % of its size where it has none.
    """
    mismatched, texts = [], []
    low, high = starts.min(axis=0).astype(np.float64), starts.max(axis=0).astype(np.float64)
    margin = np.where(high - low > 1e-6, high - low, 0.01 * np.abs(low) + 1e-6)
    outside = ((seen < low - margin) | (seen > high + margin)).mean(axis=0) > 0.5
    if episodes >= 10 and outside.any():  # fewer say too little about the range
        mismatched = np.flatnonzero(outside).tolist()
        first = mismatched[0]
        own, there = (f"{each[:, first].min():.3g} to {each[:, first].max():.3g}" for each in (starts, seen))
        other = f"episodes begin otherwise than in {spec.id} in the observation columns {mismatched}"
        remedy = "compare order ([data] observation_keys) and units"
        texts += [f"{other} (column {first}: {own} in the data, {there} there); {remedy}"]
    if recorded is not None and np.shape(recorded) == bounds.shape and not np.allclose(recorded, bounds):
        other = f"its observations were recorded within other bounds than those of {spec.id}, perhaps under a wrapper"
        texts += [f"{other}; name an environment in [data] that has this wrapper"]
    return mismatched, texts


def _check_recorded_actions(low: list[float], high: list[float], spec: EnvironmentSpec, where: str) -> None:
    """Raises: MdptError where actions were recorded with other finite bounds than those of the environment."""
    recorded, bounds = np.array([low, high]), np.array([spec.action_low, spec.action_high])
    if recorded.shape == bounds.shape and np.isfinite(recorded).all() and not np.allclose(recorded, bounds, rtol=1e-4):
        other = (
            f"its actions were recorded within {low} and {high}, perhaps under a wrapper, and those of {spec.id} are"
        )
        remedy = "name an environment in [data] that has this wrapper"
        raise MdptError(f"{where}: {other} within {[*spec.action_low]} and {[*spec.action_high]}; {remedy}.")


@dataclass(frozen=True)
class Description:
    """What a user wants to know of a dataset before training on it."""

    transitions: int  # to train on
    held_out: int  # rows
    lengths: list[float]  # steps of the shortest, median and longest whole episode
    returns: list[float]  # quartiles, from worst to best
    histogram: list[int]  # episodes in equal parts of the range of returns
    constant: list[int]  # observation columns that never vary
    at_bounds: list[float]  # fraction of actions at a bound, per dimension
    duplicates: float  # fraction of transitions that repeat the observation and action of another
    terminals: int  # in all data
    timeouts: int
    both: int  # rows that are a terminal and at a time limit
    timeouts_counted: bool


def describe_data(dataset: Dataset) -> Description:
    """Summarize a dataset in one pass over its rows."""
    wide, many = dataset.environment.observation_dim, len(dataset)
    order = np.random.default_rng(0).standard_normal(wide + dataset.environment.action_dim)
    keys, bound = np.empty(many), np.zeros(dataset.environment.action_dim)
    for start in range(0, many, CHUNK):
        part = dataset.rows[start : start + CHUNK, : len(order)]
        keys[start : start + CHUNK] = part.astype(np.float64) @ order  # equal pairs have equal keys
        bound += (np.abs(part[:, wide:]) >= 1 - 1e-6).sum(0)
    return Description(
        transitions=many,
        held_out=len(dataset.held_out.rewards),
        lengths=np.quantile(dataset.episode_lengths, [0, 0.5, 1]).tolist(),
        returns=np.quantile(dataset.episode_returns, [0, 0.25, 0.5, 0.75, 1]).tolist(),
        histogram=histogram(dataset.episode_returns).tolist(),
        constant=np.flatnonzero(dataset.constant).tolist(),
        at_bounds=(bound / many).tolist(),
        duplicates=1 - len(np.unique(keys)) / many,
        terminals=dataset.terminal_count,
        timeouts=dataset.timeout_count,
        both=dataset.both_count,
        timeouts_counted=dataset.timeouts_counted,
    )


def histogram(values: Array, bins: int = 20) -> Array:
    """How many values there are in each of `bins` equal parts of their range."""
    low, high = values.min(), values.max()
    places = ((values - low) / (high - low or 1.0) * bins).astype(np.int64)
    return np.bincount(places.clip(0, bins - 1), minlength=bins)
