"""What is given: the experiment file, environments and rollouts, sources, datasets.

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
import glob
import hashlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeAlias, TypeVar, cast

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
Found = TypeVar("Found")

Show: TypeAlias = Callable[[str, int, int], None]  # what is going on, how far it is, of how much
OTHER_CACHE = "set MDPT_CACHE to another folder"


def printable(text: str) -> str:
    """Text of files and names with what could steer a terminal, or cannot be encoded, written out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class MdptError(Exception):
    """A user's mistake: what, where, got and expected, what to do. Printed to stderr, exit code `code`."""

    code = 1

    def __str__(self) -> str:
        return printable(super().__str__())  # also where Python prints it


class Interrupted(MdptError):
    """A run was ended by a signal: what is kept, and the signal's number."""

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
    """What a signal that asks for an end does here; one that was ignored at the start, as by `nohup`, stays so."""
    before = {number: signal.getsignal(number) for number in ENDS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, act)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def version() -> str:
    """The installed version; pyproject.toml is its only source."""
    return importlib.metadata.version("mdpt")


@contextlib.contextmanager
def written_whole(path: Path, remedy: str) -> Iterator[Path]:
    """A file to write beside `path`, whose place it takes once it is whole; where that fails, nothing of it is left.

    What processes of this machine that were killed have left of the same goes, too.

    Raises: MdptError that ends with a remedy, where writing raises OSError, or RuntimeError: libraries' full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # still there only if something failed, or Ctrl-C came
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it could not be stored; is the disk full?"
        raise MdptError(f"{path}: cannot be written ({reason}); {remedy}") from error


def temporary_beside(path: Path) -> Path:
    """A new, empty file that says whose it is and which process's; those of dead ones are removed. Raises: OSError."""
    start = f".{path.name}.{platform.node()}."  # a number says nothing of another machine's processes
    for left in path.parent.glob(f"{glob.escape(start)}*.tmp"):
        number = left.name.removeprefix(start).partition(".")[0]
        if os.name == "posix" and number.isdecimal() and not is_alive(int(number)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{start}{os.getpid()}.{os.urandom(4).hex()}.tmp")
    temporary.touch(exist_ok=False)
    return temporary


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock on `path`, which need not exist: one that ends with this process, in a file that tells its number.

    busy: told the number of the process that holds it, again and again until the lock is free, or `busy` raises.

    Raises: OSError. Windows has no such locks: nothing is held there.
    """
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+") as file:
            if number := _holder(file):
                busy(number)
                time.sleep(0.2)
                continue
            try:
                gone = not os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                gone = True
            if gone:  # its holder has removed it since it was opened
                continue
            try:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _holder(file: TextIO) -> str:
    """The number of the process that holds a lock file; empty: this one does, now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return file.read() or "?"
    except OSError:  # a file system without locks: all there is to know is what the file says
        number = file.read()
        file.seek(0)
        return number if number.isdecimal() and int(number) != os.getpid() and is_alive(int(number)) else ""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def _cache_folder() -> Path:
    if folder := os.environ.get("MDPT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mdpt")


def make_writable_folder(folder: Path) -> None:
    """Make a folder and try to write there: now, not after hours of work. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def making(path: Path, show: Show) -> Iterator[bool]:
    """Whether a file of the cache is still to be made: by this process alone, since others wait for it meanwhile.

    Raises: MdptError for a folder that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            make_writable_folder(path.parent)
            stack.enter_context(locked(path, lambda number: show(f"wait for process {number}", 0, 0)))
        except OSError as error:
            raise MdptError(f"{path.parent}: cannot be written ({error.strerror}); {OTHER_CACHE}") from error
        yield not path.exists()


def check_memory(needed: int, remedy: str) -> None:
    """Raises: MdptError where so many bytes of transitions are more than can be allocated."""
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
    if value >= 2**63:  # which neither integers of TOML, HDF5 and torch hold, nor float32 with room to multiply
        raise ValueError("should be below 2 ** 63, that is 9.2e18")
    return value


Whole = Annotated[int, Field(ge=0), AfterValidator(_check_size)]
Positive = Annotated[int, Field(ge=1), AfterValidator(_check_size)]
Few = Annotated[int, Field(ge=1, le=10_000)]  # what costs memory for each of them
Many = Annotated[int, Field(ge=1, le=1_000_000)]
Amount = Annotated[float, Field(ge=0), AfterValidator(_check_size)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Widths = Annotated[list[Few], Field(min_length=1, max_length=16)]
MAKES_OWN = {"id", "environment_id", "max_episode_steps", "disable_env_checker", "render_mode"}  # gymnasium.make's
Pair = Annotated[tuple[float, float], Field(strict=False)]
Rate = Annotated[float, Field(gt=0)]
Activation = Literal["relu", "mish"]


class Section(BaseModel):
    """A table of the experiment file: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    """[data]: which transitions to learn from."""

    source: Literal["collect", "hdf5", "d4rl", "minari", "arrays"] = Field(
        "collect",
        description="roll out bundled agents, read a file in D4RL's format, or name a dataset; arrays: Python",
    )
    dataset: str | None = Field(None, description="its name, for sources d4rl and minari")
    path: str | None = Field(None, description="the file, for source hdf5; seen from the experiment file")
    environment: str | None = Field(
        None, description="gymnasium id; by default the source's own; where there is none, scores are offline"
    )
    environment_kwargs: dict[str, Any] = Field({}, description="what the environment is made with")
    max_episode_steps: Many | None = Field(None, description="time limit; by default the environment's")
    observation_columns: Positive | None = Field(None, description="use so many of the data's, from the first on")
    action_range: Pair = Field((-1.0, 1.0), description="bounds of actions where there is no environment")
    reference: str | Pair | None = Field(
        None, description="D4RL family or [min, max], whose returns are scores 0 and 100; by default the source's own"
    )
    transitions: Annotated[int, Field(ge=100, le=10**10)] = Field(200_000, description="environment steps to collect")
    levels: Annotated[list[Amount], Field(min_length=1)] = Field(
        [0.2, 0.4, 0.6, 0.8], description="perturbation of the agent's weights, drawn per episode; equal shares"
    )
    action_noise: Amount | list[Amount] = Field(
        0.1, description="deviation of noise on collected actions; one for all levels, or a list with one for each"
    )
    seed: Whole = Field(0, description="of collection and of the choice of episodes")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of whole episodes to use at all")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = Field(0.05, description="fraction of these kept from training")
    reward_scale: Literal["none", "return-range", "minus-one"] | Rate | Pair | None = Field(
        None,
        description="return-range: episode length / (best - worst return); minus-one; none; a factor; or [factor, offset]; "
        "by default the source's own, else return-range",
    )
    normalization: Literal["gaussian", "none"] = Field("gaussian", description="of observations, as networks see them")
    storage: Literal["memory", "disk"] = Field("memory", description="disk: for more transitions than memory holds")

    @model_validator(mode="after")
    def _source_is_complete(self) -> DataSection:
        problems = []
        for key, needed in (("path", ("hdf5",)), ("dataset", ("d4rl", "minari"))):
            if self.source in needed and getattr(self, key) is None:
                problems.append(f"source {self.source!r} needs a {key}")
            if self.source not in needed and getattr(self, key) is not None:
                problems.append(f"{key} is only for source {' and '.join(map(repr, needed))}")
        if self.environment_kwargs and self.environment is None:
            problems.append("environment_kwargs are for a named environment")
        if own := sorted(self.environment_kwargs.keys() & MAKES_OWN):
            problems.append(f"environment_kwargs has {own[0]!r}, which is not the environment's to be given")
        try:
            json.dumps(self.environment_kwargs, allow_nan=False)
        except (RecursionError, TypeError, ValueError):
            problems.append("environment_kwargs are to be finite numbers, words, lists and tables, not many in another")
        if self.transitions % len(self.levels):
            problems.append(f"transitions {self.transitions} cannot be shared equally by {len(self.levels)} levels")
        if isinstance(self.action_noise, list) and len(self.action_noise) != len(self.levels):
            problems.append(f"action_noise has {len(self.action_noise)} entries for {len(self.levels)} levels")
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = np.array(self.action_range, dtype=np.float32)
            sound = low < high and np.isfinite(high - low)
        if not sound:
            problems.append(f"action_range {list(self.action_range)} should be [low, high] with low < high")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TrainingSection(Section):
    """What guidance and policy training have in common."""

    steps: Annotated[int, Field(ge=1, le=10**9)] = Field(20_000, description="gradient steps")
    batch_size: Many = Field(256, description="transitions per step and member")
    learning_rate: Rate = Field(3e-4, description="of Adam at the start")
    decay: Literal["cosine", "none"] = Field("cosine", description="of the learning rate, to 0 at the last step")
    weight_decay: Amount = Field(0.0, description="as of AdamW (1711.05101)")
    gradient_norm: Amount = Field(10.0, description="limit per network and member; 0: none")
    save_every: Amount = Field(60.0, description="seconds between saves of an unfinished bundle")
    snapshots: Few = Field(10, description="evenly spaced copies of the acting weights kept in the bundle")


class GuidanceSection(TrainingSection):
    """[guidance]: the value estimator."""

    learning_rate: Rate = Field(1e-3, description="of Adam at the start")
    algorithm: str = Field("idql", description="how values are learned, see below")
    hidden: Widths = Field([256, 256], description="hidden units of each layer")
    activation: Activation = Field("relu", description="of critics, V and companion actor")
    layer_norm: bool | Literal["tanh"] = Field(
        True, description="before each activation of critics and V; tanh: before the first alone, which is a tanh then"
    )
    discount: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="per environment step")
    value_loss: Literal["expectile", "quantile", "gumbel"] = Field("expectile", description="idql: of V")
    expectile: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="idql: of V, or its quantile")
    gumbel_temperature: Rate = Field(1.0, description="idql: for value_loss gumbel (2301.02328)")
    value_learning_rate: Rate | None = Field(None, description="of V; by default learning_rate")
    tau: Annotated[float, Field(gt=0, le=1)] = Field(
        0.005, description="Polyak: target <- (1 - tau) target + tau online"
    )
    target_every: Positive = Field(1, description="gradient steps between such updates")
    bootstrap_candidates: Few = Field(1, description="dql: next actions of which the best counts")
    actor_learning_rate: Rate | None = Field(None, description="dql: of the companion; by default learning_rate")
    actor_hidden: Widths = Field([256, 256, 256], description="dql: hidden units of the companion actor")
    time_features: Annotated[int, Field(ge=2, le=1_000, multiple_of=2)] = Field(64, description="dql: as in [policy]")
    eta: Amount = Field(1.0, description="dql: value weight in the companion actor's loss")
    diffusion_steps: Few = Field(5, description="dql: of the companion actor")
    ema_decay: Fraction = Field(0.999, description="dql: of the companion actor's averaged weights, per step")


class PolicySection(TrainingSection):
    """[policy]: the diffusion model over actions."""

    algorithm: str = Field("dql", description="training objective, see below")
    scheme: Literal["guidance-first", "joint", "unguided"] = Field("guidance-first", description="when guidance learns")
    network: str | None = Field(None, description="mlp, or resnet; by default what the algorithm brings")
    ensemble: Literal["none", "mean", "median", "min"] = Field(
        "none", description="each member's guidance: one member by position, or all as one, by this figure of their Q"
    )
    hidden: Widths = Field([256, 256, 256], description="hidden units of each layer; resnet: of each residual block")
    activation: Activation = Field("mish", description="of the denoiser")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="in residual blocks")
    time_features: Annotated[int, Field(ge=2, le=1_000, multiple_of=2)] = Field(
        64, description="sinusoids of the diffusion step"
    )
    diffusion_steps: Few = Field(5, description="T")
    noise_schedule: Literal["vp", "cosine", "cosine-levels", "linear", "linear-unscaled"] = Field(
        "vp",
        description="betas; vp: Diffusion-QL's; cosine-levels: CleanDiffuser's; linear: DDPM's, spread over T or not",
    )
    sampler: Literal["ddpm", "dpm-solver++"] = Field("ddpm", description="ancestral, or DPM-Solver++ 2M")
    variance: Literal["posterior", "beta"] = Field("posterior", description="of ddpm's steps; beta: wider (IDQL)")
    sampling_steps: Few = Field(5, description="network calls of dpm-solver++, at most; and at most diffusion_steps")
    eta: Amount = Field(
        0.1,
        description="weight of the guidance term (dql, edp: in units of mean abs Q; dac: 1 / Q, as rewards are scaled)",
    )
    ema_decay: Fraction = Field(0.999, description="of the averaged weights that act, per update")
    ema_every: Positive = Field(1, description="gradient steps between such updates")
    ema_from: Whole = Field(0, description="gradient step of the first; until then it is a copy")
    label_dropout: Fraction = Field(0.1, description="cfg: share of labels dropped in training")
    advantage_weight: Literal["none", "expectile", "exponential", "hard"] = Field(
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
        if self.ensemble != "none" and self.scheme != "guidance-first":
            raise ValueError(f"ensemble {self.ensemble} needs guidance that is there already: scheme guidance-first")
        return self


class EvaluationSection(Section):
    """[evaluation]: how a policy is tried."""

    episodes: Many = Field(10, description="per member")
    candidates: Few = Field(10, description="actions drawn per state, of which the guidance takes one")
    selection: Literal["max", "softmax"] = Field("max", description="the best candidate, or a draw by value")
    weight_temperature: Amount = Field(100.0, description="inverse temperature of the softmax")
    ensemble: Literal["none", "mean", "median", "min", "rank"] | None = Field(
        None, description="as in [policy], its default; or by the mean of ranks, 0 to 1, which no scale of Q matters to"
    )
    temperature: Amount = Field(1.0, description="scale of the sampling noise")
    temperature_on: Literal["all", "start", "steps"] = Field(
        "all", description="which noise: all, that of the start, or all but that"
    )
    w: Amount = Field(1.0, description="classifier-free guidance weight (cfg)")
    guide: Literal["rank", "gradient", "both"] = Field("rank", description="how guidance acts at inference")
    guidance_weight: Amount = Field(1.0, description="of the gradient, for gradient and both")
    jacobian: bool = Field(False, description="gradient through the denoiser: its weight is an inverse temperature")
    seed: Whole = Field(0, description="of start states and sampling noise")


class Experiment(Section):
    """The whole experiment file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        "experiment", description="names files"
    )
    seeds: Annotated[list[Whole], Field(min_length=1, max_length=256)] = Field(
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

    `extends = "base.toml"` takes from another file what this one leaves out. Paths are seen from the file they are in.

    Raises: MdptError naming file, table, key, value and what is allowed.
    """
    return check_experiment(str(path), _read_tables(path, ()), overrides)


def _read_tables(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        problem = f"{path}: is a folder" if path.is_dir() else f"{path}: no such experiment file in {Path.cwd()}"
        by = f", which {seen[-1]} extends" if seen else "; hopper.toml in the repository is one to start from"
        raise MdptError(problem + by)
    try:
        content = tomli.loads(path.read_text(encoding="utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also of letters that are not UTF-8, and of endless numbers
        raise MdptError(f"{path}: is not TOML: {error}") from error
    table = content.get("data")
    if isinstance(table, dict) and isinstance(table.get("path"), str):
        table["path"] = _absolute(table["path"], path.parent)
    if (base := content.pop("extends", None)) is None:
        return content
    if not isinstance(base, str):
        raise MdptError(f"{path}: extends = {base!r}: expected the name of one file")
    other = Path(_absolute(base, path.parent))
    if other in (seen := (*seen, Path(_absolute(str(path), Path())))):
        raise MdptError(f"{path}: extends = {base!r}: that file is extended by this one")
    inherited = _read_tables(other, seen)
    for key, value in content.items():
        known = inherited.get(key)
        inherited[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
    return inherited


def _absolute(name: str, folder: Path) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(name)))


def check_experiment(where: str, content: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a nest of tables under overrides. Raises: MdptError, one line for each mistake."""
    for override in overrides:
        _override(content, override)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise MdptError(_explain(where, error)) from error


def experiment_as_stored(tables: dict[str, Any], where: str = "the experiment") -> tuple[Experiment, list[str]]:
    """The experiment of a file that mdpt wrote, perhaps by an older or newer version.

    A field that the file lacks takes the value `before` of its `json_schema_extra`, which says what mdpt did before the
    field existed, else its default.

    Returns: the experiment, and what was left out as unknown, such as "policy.nonsense" or "nonsense".

    Raises: MdptError for a value that is not allowed.
    """
    known, unknown = _known_fields(tables, Experiment, "")
    return check_experiment(where, known), unknown


def _known_fields(table: dict[str, Any], section: type[Section], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a table that its section knows, completed by `before`, and the names of the others."""
    known: dict[str, Any] = {}
    unknown = [f"{prefix}{key}" for key in table if key not in section.model_fields]
    for name, info in section.model_fields.items():
        extra = info.json_schema_extra
        if isinstance(info.default, Section) and isinstance(inner := table.get(name, {}), dict):
            known[name], more = _known_fields(inner, type(info.default), f"{name}.")
            unknown += more
        elif name in table:
            known[name] = table[name]
        elif isinstance(extra, dict) and "before" in extra:
            known[name] = extra["before"]
    return known, unknown


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
        parsed = {"value": text.strip()}  # a bare word; its field says whether it is allowed
    except (ValueError, RecursionError) as error:
        raise MdptError(f"--set {keys}: is not TOML: {error}") from error
    if parsed.keys() != {"value"}:
        raise MdptError(f"--set {keys}: more than one value; give each its own --set")
    value = parsed["value"]
    target = content
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise MdptError(f"--set {override}: {table} is a key, not a table")
    if text.strip():
        target[key] = value
    else:
        target.pop(key, None)  # as if the file did not say it


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
            where += f" = {shown(problem['input'])}"
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if problem["type"] == "model_type":
            message = "should be a table"
        elif problem["type"] == "extra_forbidden":
            known = list(section.model_fields)
            message = f"unknown key; {_hint(str(names[0]), known)}"
        lines.setdefault(where, []).append(message)
    return "\n".join(f"{where.removesuffix(':')}: {', or '.join(messages)}" for where, messages in lines.items())


def _hint(key: str, known: Sequence[str]) -> str:
    """Which key was meant by one that is unknown where it is."""
    tables = {name: part for name, part in Experiment() if isinstance(part, Section)}
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]!r}?"
    if key == "extends" or key in Experiment.model_fields:
        return "it belongs at the top of the file, before the first table"
    if there := [name for name, part in tables.items() if key in type(part).model_fields]:
        return f"it belongs into [{'] or ['.join(there)}]"
    return f"known are {', '.join(known)}"


def shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())  # arrays and tensors have lines
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        return "..."
    return text if len(text) < 200 else f"{text[:200]}..."


# --- work in other processes --------------------------------------------------------------------------------------


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

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 1e6:  # what threads can wait for has an end
            raise MdptError(f"--timeout {self.timeout:g}: expected seconds, at most a million")


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
        from joblib.externals.loky.backend import resource_tracker
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        warnings.filterwarnings("ignore", module=r"joblib\.parallel")  # of tasks given up where a command ends early
        begin = {"initializer": _begin_worker, "initargs": (os.getpid(),)}
        pool = joblib.Parallel(n_jobs=count, backend="loky", batch_size=1, return_as="generator", **begin)
        with _unheard():
            resource_tracker.ensure_running()  # it would let through, as it starts, what is held back here
        with _unheard():
            results = pool(joblib.delayed(_watched)(work, task, workers.timeout, backstop=True) for task in tasks)
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


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Processes begun here never hear a signal that asks for an end: it is for this one, which acts on it afterwards."""
    caught: list[int] = []
    with on_signals(lambda number, frame: caught.append(number)):
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS) if hasattr(signal, "pthread_sigmask") else None
        try:
            yield
        finally:
            if held is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
    for number in caught:
        signal.raise_signal(number)


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


@contextlib.contextmanager
def _quiet(*streams: int) -> Iterator[None]:
    """Keep off the terminal what C code writes there, at file-descriptor level."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None
    flush(None)
    copies = [(stream, os.dup(stream)) for stream in streams]
    try:
        _silence(*streams)
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


# --- environments and rollouts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvironmentSpec:
    """How an environment is made and what the rest of the tool needs to know of it, as plain values.

    id: None where there is the data alone. Observations of a Dict are flattened by key. Action bounds have A entries
    each. repeatable: whether `reset(seed=...)` and the actions decide all that happens.
    """

    id: str | None
    observation_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    flattened: bool = False
    repeatable: bool = field(default=True, compare=False)

    @property
    def name(self) -> str:
        return self.id or "the data"


def environment_spec(
    environment_id: str,
    kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    timeout: float = 600.0,
) -> EnvironmentSpec:
    """What a gymnasium environment is, tried for a few steps; PyBullet's are known, too. max_episode_steps: its own.

    timeout: seconds that a step may take, as of `Workers`. Raises: MdptError for an unknown id, spaces that are no boxes,
    actions that cannot be scaled from their bounds, no time limit, or one that breaks gymnasium's contract: by what.
    """
    options = (kwargs or {}) | ({} if max_episode_steps is None else {"max_episode_steps": max_episode_steps})

    def find(environment_id: str, watch: Watch) -> EnvironmentSpec:
        with watch.over(f"{environment_id}: the environment"):
            environment = _make(environment_id, **options)
            environment.close()
        spec = _describe(environment, environment_id, kwargs or {})
        return replace(spec, repeatable=_try(spec, watch))

    with _quiet(1):  # PyBullet writes there at each connection
        return _watched(find, environment_id, timeout)


def _describe(environment: gymnasium.Env[Any, Any], environment_id: str, kwargs: dict[str, Any]) -> EnvironmentSpec:
    from gymnasium.spaces import Box

    observations: Any = environment.observation_space
    actions: Any = environment.action_space
    for name, space in (("observation", observations), ("action", actions)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
            raise MdptError(f"{environment_id}: its {name} space is {space}; only a Box with one axis can be learned.")
    if not np.issubdtype(actions.dtype, np.floating):
        raise MdptError(f"{environment_id}: its actions are {actions.dtype}, {actions}; only floats can be learned.")
    if environment.spec is None or not environment.spec.max_episode_steps:
        raise MdptError(f"{environment_id}: it has no time limit; set [data] max_episode_steps.")
    spec = EnvironmentSpec(
        id=environment_id,
        observation_dim=observations.shape[0],
        action_dim=actions.shape[0],
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
        max_episode_steps=environment.spec.max_episode_steps,
        kwargs=kwargs,
        flattened=any(type(layer).__name__ == "FlattenObservation" for layer in _layers(environment)),
    )
    with np.errstate(over="ignore", invalid="ignore"):
        _, half = _center_and_half(spec)
    if not (np.isfinite(half) & (half > 0)).all():
        raise MdptError(
            f"{environment_id}: its actions lack finite bounds that differ, {actions}; wrap it to give such."
        )
    return spec


def _layers(environment: Any) -> Iterator[Any]:
    while environment is not environment.unwrapped:
        yield environment
        environment = environment.env


def _try(spec: EnvironmentSpec, watch: Watch, steps: int = 5) -> bool:
    """Whether two episodes that should be the same are, for a few steps. Raises: MdptError for a broken contract."""
    seen: list[list[Array]] = []
    actions = unscale_actions(np.random.default_rng(0).uniform(-0.1, 0.1, (steps, spec.action_dim)), spec)
    for _ in range(2):
        seed_generators(0)
        with watch.over(f"{spec.id}: its reset"):
            inner: Any = make_environment(spec)
            environment = inner
            while type(inner).__name__ in ("TimeLimit", "OrderEnforcing", "FlattenObservation"):  # they would unpack
                inner = inner.env
            started = inner.reset(seed=0)
            if not isinstance(started, tuple) or len(started) != 2:
                raise ValueError(f"expected (observation, info) as in gymnasium, got {type(started).__name__}; wrap it")
        with watch.over(f"{spec.id}: its step"):
            stepped = inner.step(actions[0])
            if not isinstance(stepped, tuple) or len(stepped) != 5:
                got = f"{len(stepped)} values" if isinstance(stepped, tuple) else type(stepped).__name__
                raise ValueError(
                    f"expected (observation, reward, terminated, truncated, info) as in gymnasium, got {got}; wrap it"
                )
            seen.append([reset(environment, spec, 1)])
            for action in actions:
                observation, reward, terminal, timeout = take_step(environment, spec, action)
                seen[-1] += [observation, np.array(reward)]
                if terminal or timeout:
                    break
            environment.close()
    return len(seen[0]) == len(seen[1]) and all(map(np.array_equal, *seen))


def reset(environment: gymnasium.Env[Any, Any], spec: EnvironmentSpec, seed: int) -> Array:
    """The observation (O,) float32 that an episode starts with. Raises: ValueError for one of another kind."""
    return _checked(environment.reset(seed=seed)[0], spec)


def take_step(
    environment: gymnasium.Env[Any, Any], spec: EnvironmentSpec, action: Array
) -> tuple[Array, float, bool, bool]:
    """Observation (O,) float32, reward, terminal, timeout.

    Raises: ValueError for a reward or observation of another kind than gymnasium's, or not finite.
    """
    observation, reward, terminal, timeout, _ = environment.step(action)
    number = np.asarray(reward)
    if number.ndim or number.dtype.kind not in "biuf" or not np.isfinite(number):
        raise ValueError(f"its reward is {reward!r}, expected one finite number")
    return _checked(observation, spec), float(reward), bool(terminal), bool(timeout)


def _checked(observation: Any, spec: EnvironmentSpec) -> Array:
    with np.errstate(over="ignore"):
        found = np.asarray(observation, dtype=np.float32)
    if found.shape != (spec.observation_dim,):
        raise ValueError(f"its observation has shape {found.shape}, its space ({spec.observation_dim},)")
    if not np.isfinite(found).all():
        raise ValueError(f"its observation is not finite: {found.tolist()}")
    return found


def seed_generators(*numbers: int) -> None:
    """Seed Python's and NumPy's global generators, for environments that draw from them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)


def scale_actions(actions: Array, spec: EnvironmentSpec) -> Array:
    """Actions (..., A) from the environment's bounds to [-1, 1], float32."""
    center, half = _center_and_half(spec)
    return np.asarray((actions - center) / half, dtype=np.float32)


def unscale_actions(actions: Array, spec: EnvironmentSpec) -> Array:
    """Actions (..., A) from [-1, 1] to the environment's bounds, float32; what is outside comes to a bound."""
    center, half = _center_and_half(spec)
    least, most = _bounds(spec)  # which rounding may have moved outwards
    least = np.where(least < np.array(spec.action_low), np.nextafter(least, most), least)
    most = np.where(most > np.array(spec.action_high), np.nextafter(most, least), most)
    return np.clip(np.asarray(actions * half + center, dtype=np.float32), least, most)


def _center_and_half(spec: EnvironmentSpec) -> tuple[Array, Array]:
    # In this form bounds of [-1, 1] leave every bit of an action as it was.
    low, high = _bounds(spec)
    return (high + low) / 2, (high - low) / 2


def _bounds(spec: EnvironmentSpec) -> tuple[Array, Array]:
    return np.array(spec.action_low, dtype=np.float32), np.array(spec.action_high, dtype=np.float32)


def _make(environment_id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    import gymnasium

    register_environments()
    if "mujoco" in str(getattr(gymnasium.registry.get(environment_id), "entry_point", "")):
        mujoco: Any = importlib.import_module("mujoco")  # of whose warnings it would keep a log where the user is
        mujoco.set_mju_user_warning(lambda text: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # an older version is what old data were made in
            environment = gymnasium.make(environment_id, disable_env_checker=True, **options)
        if isinstance(environment.observation_space, gymnasium.spaces.Dict):
            environment = gymnasium.wrappers.FlattenObservation(environment)
        return environment
    except BaseException as error:  # its constructor may also exit, or interrupt itself
        module, _, name = environment_id.rpartition(":")
        if module and module not in sys.modules:
            hint = f"{_one_line(error)}. Install it, or put its folder on PYTHONPATH."
            raise MdptError(f"{environment_id}: the module {module} cannot be imported. {hint}") from error
        if name in gymnasium.registry:
            raise MdptError(f"{environment_id}: the environment cannot be made. {_one_line(error)}") from error
        near = difflib.get_close_matches(name, gymnasium.registry, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "Write 'module:Name-v0' for one that a module registers."
        raise MdptError(f"{environment_id}: no such environment is registered with gymnasium. {hint}") from error


def imported_for(environment_id: str) -> str:
    """The module that making an environment would import besides gymnasium's own, "" for none: a file may not ask for it."""
    module, _, name = environment_id.rpartition(":")
    return module or ("shimmy" if name.startswith("GymV2") else "")  # whose kwargs name one


def register_environments() -> None:
    """Let gymnasium know PyBullet's environments, and gymnasium-robotics' where they are installed."""
    with _quiet(1, 2):
        for name in ("pybullet", "pybullet_envs_gymnasium"):  # the one announces itself, the other registers
            importlib.import_module(name)
        with contextlib.suppress(Exception):  # where it is not installed, or not whole
            importlib.import_module("gymnasium_robotics")


def make_environment(spec: EnvironmentSpec, **options: Any) -> gymnasium.Env[Any, Any]:
    """An environment whose episodes depend on nothing but `reset(seed=...)` and the actions.

    PyBullet's first episode, in which it loads its bodies, differs from a later one with the same seed, so it is
    spent here.

    Raises: MdptError also where the environment is not what it was when it was described, naming what differs.
    """
    if spec.id is None:
        raise MdptError("there is no environment to play in; name one in [data]")
    environment = _make(spec.id, max_episode_steps=spec.max_episode_steps, **spec.kwargs, **options)
    today = asdict(_describe(environment, spec.id, spec.kwargs))
    changed = [
        f"{key} was {was}, is {today[key]}"
        for key, was in asdict(spec).items()
        if was != today[key] and key != "repeatable"
    ]
    if changed:
        raise MdptError(f"{spec.id}: is another environment than when this was trained: {'; '.join(changed)}.")
    environment.reset(seed=0)
    return environment


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
                frame = _frame(environments[0], spec.name)
            look(int(lengths[0]), float(returns[0]), frame)

    seed_generators(seed, *episodes)
    for place, episode in enumerate(episodes):
        with watch.over(f"{spec.id}: episode {episode}"):
            environments.append(make_environment(spec, **({"render_mode": "rgb_array"} if look else {})))
            observations[place] = reset(environments[place], spec, _start(seed, episode))
        show(place)
    while len(running):
        actions = np.asarray(act(observations[running], running))
        if actions.shape != (expected := (len(running), spec.action_dim)):
            raise MdptError(f"act: actions of shape {actions.shape}, expected {expected}.")
        if not np.isfinite(actions).all():
            raise MdptError("the policy chose an action that is not finite; its training has diverged.")
        ended = np.zeros(len(running), dtype=np.bool_)
        scaled = unscale_actions(actions, spec)
        for i, (place, action) in enumerate(zip(running.tolist(), scaled, strict=True)):
            with watch.over(f"{spec.id}: episode {episodes[place]}, step {lengths[place] + 1}"):
                observations[place], reward, terminal, timeout = take_step(environments[place], spec, action)
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


# --- columns of a file --------------------------------------------------------------------------------------------

KEYS = ("observations", "actions", "rewards", "terminals", "next_observations", "timeouts")
FLAGS = ("terminals", "timeouts")

MANY = 10**8  # numbers


@dataclass(frozen=True, eq=False)
class Columns:
    """What a source gives, unread: arrays or datasets of an open file under D4RL's keys, a row for each step.

    observations (n, O), actions (n, A), rewards (n,), terminals (n,), perhaps next_observations (n, O), timeouts (n,).
    """

    name: str
    where: str
    arrays: Mapping[str, Any]
    found: tuple[str, ...] = ()  # all that is there, also what is not read

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows of a column: float32, or bool for flags. Raises: MdptError, also with the first row at fault."""
        try:
            array = np.asarray(self.arrays[key][start:stop])
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:  # h5py, where damaged
            raise damaged(self.where, error) from error
        if key in FLAGS:
            self.forbid(key, array, (array != 0) & (array != 1), "expected only 0 and 1", start)
            return array.astype(np.bool_).reshape(len(array))
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
            array = array.astype(np.float32)
        self.forbid(key, array, ~np.isfinite(array), "expected finite numbers", start)
        return array.reshape(len(array)) if key == "rewards" else array

    def forbid(self, key: str, array: Array, bad: Array, expected: str, start: int) -> None:
        if bad.any():
            row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
            raise MdptError(f"{self.where}: {key!r} row {start + row} is {array[row].tolist()}, {expected}.")


def damaged(where: Path | str, error: Exception) -> MdptError:
    return MdptError(f"{where}: a truncated or damaged HDF5 file; get it again. {_one_line(error)}")


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Columns]:
    """The columns of a file in D4RL's format; other keys are not read, and nothing outside the file is.

    Raises: MdptError for a file that is missing, something else, damaged or held open by a writer.
    Source: the D4RL wiki, "Off-policy evaluation and dataset format".
    """
    if os.path.isdir(path):
        raise MdptError(f"{path}: is a folder; name the file in it.")
    if not os.path.isfile(path):
        raise MdptError(f"{path}: no such file; looked in {path.absolute().parent}.")
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise MdptError(f"{path}: another process holds it open for writing; wait until that has ended.") from error
    except PermissionError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror}).") from error
    except OSError as error:
        with path.open("rb") as raw:
            if raw.read(8) != b"\x89HDF\r\n\x1a\n":
                raise MdptError(
                    f"{path}: not an HDF5 file. Expected D4RL's format: observations, actions, rewards, terminals."
                ) from error
        raise damaged(path, error) from error
    with file:
        try:
            columns = Columns(path.name, str(path), _arrays(path, file), tuple(map(str, file)))
        except (RuntimeError, LookupError, OSError, TypeError, ValueError) as error:  # h5py, where tables are damaged
            raise damaged(path, error) from error
        yield columns


def _arrays(path: Path, file: h5py.File) -> dict[str, h5py.Dataset]:
    """The datasets under D4RL's keys. Raises: MdptError for what lies elsewhere."""
    if "episode_0" in file:
        raise MdptError(
            f"{path}: is a Minari dataset; use source = 'minari' and its name as dataset, such as "
            "'mujoco/hopper/medium-v0'."
        )
    arrays = {}
    for key in KEYS:
        link = file.get(key, getlink=True)
        if link is not None and not isinstance(link, h5py.HardLink):
            raise MdptError(f"{path}: {key!r} is a link; copy the data into the file.")
        found = file.get(key)
        if isinstance(found, h5py.Dataset):
            if problem := not_inside(found, key in FLAGS):
                raise MdptError(f"{path}: {key!r} {problem}")
            arrays[key] = found
        elif found is not None:
            raise MdptError(f"{path}: {key!r} is a group; expected an array.")
    return arrays


def not_inside(dataset: h5py.Dataset, blank: bool = False) -> str:
    """Why the rows of a dataset are not in its file, "" where they are. blank: some may be left unwritten, if not many."""
    if dataset.external or dataset.is_virtual:
        return "lies in other files; copy the data into this one."
    if not dataset.size or (blank and dataset.size <= MANY):
        return ""
    if dataset.chunks is None:
        held, claimed = dataset.id.get_storage_size(), dataset.nbytes
    else:
        held = dataset.id.get_num_chunks()
        claimed = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    return "" if held >= claimed else f"claims {dataset.shape[0]} rows, but not all were written; write it anew."


def check_shapes(columns: Columns, spec: EnvironmentSpec | None, width: int | None) -> tuple[int, int]:
    """O and A of columns that fit together, and the environment. Raises: MdptError, a line for each problem.

    width: so many observation columns are used, None: all.
    """
    arrays, where, problems = columns.arrays, columns.where, []
    if missing := [repr(key) for key in KEYS[:4] if key not in arrays]:
        is_missing = "the key {} is missing" if len(missing) == 1 else "the keys {} are missing"
        has = ", ".join(sorted(columns.found)) or "none"
        problems.append(f"{where}: {is_missing.format(', '.join(missing))}. It has: {has}.")
    shapes: dict[str, tuple[int, ...]] = {key: array.shape or () for key, array in arrays.items()}
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            problems.append(f"{where}: {key!r} holds {array.dtype}, expected numbers.")
    if problems:
        raise MdptError("\n".join(problems))
    rows = next((shape[0] for shape in shapes.values() if shape), 0)
    dims = [(*shapes[key], 1, 1)[1] for key in ("observations", "actions")]
    if spec is not None:
        dims = [spec.observation_dim, spec.action_dim]
    if width is not None:
        if spec is not None and width != spec.observation_dim:
            raise MdptError(f"[data] observation_columns = {width}: {spec.id} has {spec.observation_dim} observations.")
        dims[0] = width
    for key, shape in shapes.items():
        wide = {"observations": dims[0], "next_observations": dims[0], "actions": dims[1]}.get(key)
        expected = (rows,) if wide is None else (rows, wide)
        fits = shape[: len(expected)] == expected and shape[len(expected) :] in ((), (1,) * (wide is None))
        if width is not None and key.endswith("observations"):
            fits = len(shape) == 2 and shape[0] == rows and shape[1] >= width
        fits = fits and 0 not in expected[1:]
        if not fits:
            of = f" for {spec.id}" if spec else ""
            wanted = ", ".join(str(size or "at least 1") for size in expected) + "," * (len(expected) == 1)
            problems.append(f"{where}: {key!r} has shape {shape}, expected ({wanted}){of}.")
    if not problems and rows < 2:
        problems.append(f"{where}: {rows} row(s), expected at least 2.")
    if problems:
        raise MdptError("\n".join(problems))
    return dims[0], dims[1]


def count_timeouts(terminals: Array, max_episode_steps: int) -> Array:
    """Rows (n,) bool at which D4RL takes an episode for cut by its time limit, in a file that does not say so.

    That count is kept to the letter, since it decides which rows D4RL's users train on: it starts at 0 in the
    file's first row and after a cut, but at 1 after a terminal (unless that terminal was itself a cut), and
    cuts where it reaches max_episode_steps - 1.
    Source: d4rl.qlearning_dataset, `episode_step`.
    """
    n = len(terminals)
    starts, stops = episode_bounds(terminals, np.zeros(n, dtype=np.bool_))
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


def transition_rows(timeouts: Array, known: bool) -> Array:
    """Which rows (n,) bool are transitions. known: whether the file has next_observations.

    Without them the next row is the next observation. Then, as D4RL does, a row at a time limit is dropped (what
    followed it is unknown, even if it is a terminal, too) and so is the file's last row. With them every row is kept:
    a time limit is not a terminal, so its value is bootstrapped, and a terminal stays one. (D4RL ignores the key and
    drops those rows; nothing is gained by that.)
    Source: d4rl.qlearning_dataset(terminate_on_end=False), equal to it in values, types and order.
    """
    if known:
        return np.ones(len(timeouts), dtype=np.bool_)
    return ~timeouts & (np.arange(len(timeouts)) < len(timeouts) - 1)


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


def _write_hdf5(path: Path, arrays: dict[str, Array], attributes: dict[str, Any]) -> None:
    """Write a whole file or none; the same arrays and attributes give the same bytes."""
    with written_whole(path, OTHER_CACHE) as temporary, h5py.File(temporary, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, track_times=False)
        file.attrs.update(attributes)


# --- sources ------------------------------------------------------------------------------------------------------

Known: TypeAlias = tuple[dict[str, Any], str, tuple[str, ...]]  # fields of [data], why nothing can play it, warnings


@dataclass(frozen=True)
class Source:
    """A line of the registry: what is known of a dataset beforehand, and its file or its arrays."""

    know: Callable[[DataSection], Known]
    read: Callable[[DataSection, Workers, Show], Path | dict[str, Array]]


def _given(section: DataSection, workers: Workers, show: Show) -> dict[str, Array]:
    raise MdptError("[data] source = 'arrays': the arrays come from Python, as load_dataset(section, arrays=...)")


NO_ENVIRONMENT = "[data] names no environment"

BULLET = {f"{name}BulletEnv-v0": f"bullet-{name.lower()}" for name in ("Ant", "HalfCheetah", "Hopper", "Walker2D")}

GENERATOR = 1  # version of the collected data: raise it when the same settings would give other bytes
SHARD = 5_000  # transitions that one worker collects at a time


def _collected(environment: str) -> Known:
    _bundled_agent(environment)
    return {"environment": environment, "reference": BULLET.get(environment)}, "", ()


def collect_dataset(
    section: DataSection,
    workers: Workers = Workers(),
    show: Show = lambda what, done, total: None,
    cache: Path | None = None,
) -> Path:
    """Roll out PyBullet's bundled agent with perturbed weights into a D4RL-format file, or find it in the cache.

    The file depends on the environment and the settings only, not on `workers`. The cache is `cache`, else
    $MDPT_CACHE, else mdpt in $XDG_CACHE_HOME or ~/.cache. show: hears of transitions.

    Raises: MdptError without an agent for this environment, for a damaged cached file, for more than memory holds.
    """
    share = section.transitions // len(section.levels)
    environment = section.environment or ""
    agent = _bundled_agent(environment)
    settings = section.model_dump(include={"environment", "transitions", "levels", "action_noise", "seed"})
    made_by = settings | {"generator": GENERATOR}
    special = section.environment_kwargs, section.max_episode_steps
    if any(special):
        made_by |= {"special": json.dumps(special)}
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', environment)}-{digest}.hdf5"
    path = (cache or _cache_folder()) / name
    if path.exists():
        _check_cached(path, section.transitions)
        return path

    spec = environment_spec(environment, *special, workers.timeout)
    if (wide := (agent[0].shape[0], agent[-1].shape[0])) != (spec.observation_dim, spec.action_dim):
        raise MdptError(f"{spec.id}: its agent takes {wide[0]} observations and gives {wide[1]} actions.")
    row = 4 * (spec.observation_dim + spec.action_dim + 1) + 2
    check_memory(2 * row * section.transitions, "collect fewer [data] transitions")
    noise = np.broadcast_to(section.action_noise, len(section.levels)).tolist()
    shards = [
        Shard(spec, agent, sigma, noise[level], min(SHARD, share - start), (section.seed, level, index))
        for level, sigma in enumerate(section.levels)
        for index, start in enumerate(range(0, share, SHARD))
    ]
    versions = {name: importlib.metadata.version(name) for name in ("pybullet", "pybullet_envs_gymnasium", "numpy")}
    with making(path, show) as missing:
        if missing:
            kept = [path.with_name(f".{path.stem}.{index}.part") for index in range(len(shards))]
            parts = list(_collected_parts(kept, shards, workers, partial(show, "collect")))
            arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            arrays["infos/level"] = np.repeat(np.array(section.levels, dtype=np.float32), share)
            _write_hdf5(path, arrays, made_by | versions)
            for file in kept:
                file.unlink(missing_ok=True)
    return path


def _collected_parts(
    kept: Sequence[Path], shards: Sequence[Shard], workers: Workers, show: Callable[[int, int], None]
) -> Iterator[dict[str, Array]]:
    """Shard after shard, each kept in its file until all are there, so that a run cut short goes on."""
    done, total = 0, sum(shard.size for shard in shards)
    old = list(itertools.takewhile(bool, map(_read_part, kept, shards)))
    left = shards[len(old) :]
    show(done, total)
    with contextlib.closing(parallel(collect_shard, left, workers, len(left))) as found:
        for index, part in enumerate(itertools.chain(old, found)):
            if index >= len(old):
                _write_hdf5(kept[index], part, {})
            done += len(part["rewards"])
            show(done, total)
            yield part


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
    row, before = 0, shard.seed[-1] * SHARD  # rows of this level that other shards hold
    seed_generators(*shard.seed)

    def doing() -> contextlib.AbstractContextManager[None]:
        return watch.over(f"collecting in {spec.id}: level {shard.sigma:g}, row {before + row + 1:,}")

    with doing():
        environment = make_environment(spec)
    while row < size:
        weights = [w * (1 + np.float32(shard.sigma) * random.standard_normal(w.shape, np.float32)) for w in shard.agent]
        noise = random.standard_normal((spec.max_episode_steps, spec.action_dim), np.float32)
        noise *= np.float64(shard.noise)  # a float would round the factor first, and give other data
        with doing():
            observation = reset(environment, spec, int(random.integers(2**31)))
        for step in range(min(spec.max_episode_steps, size - row)):
            observations[row] = observation
            actions[row] = action = np.clip(_agent_action(weights, observations[row]) + noise[step], *low_high)
            with doing():
                observation, rewards[row], terminals[row], timeout = take_step(environment, spec, action)
            row += 1
            if terminals[row - 1] or timeout:
                break
        timeouts[row - 1] = not terminals[row - 1]
    with doing():
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


def _read_part(path: Path, shard: Shard) -> dict[str, Array]:
    """What was kept of a shard; empty: nothing, or something else."""
    try:
        with h5py.File(path, "r") as file:
            part = {key: np.asarray(file[key]) for key in ("observations", "actions", "rewards", *FLAGS)}
            return part if {len(array) for array in part.values()} == {shard.size} else {}
    except (OSError, RuntimeError, LookupError, TypeError):
        return {}


def _check_cached(path: Path, transitions: int) -> None:
    try:
        with h5py.File(path, "r") as file:
            if len(file["rewards"]) == transitions == len(file["infos/level"]):
                return
    except (OSError, RuntimeError, KeyError):
        pass
    raise MdptError(f"{path}: this cached dataset is damaged; delete the file, and it will be collected again.")


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


MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # raw files under D4RL's names
PAUSE = 1.0  # seconds before a connection that was cut is made again
BLOCK = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class Family:
    """What all D4RL datasets whose whole name matches `pattern` have in common.

    environment: the gymnasium id that moves and pays as the data did, or None for a reason. Dimensions are its own,
    else the data's. observation_columns: how many of the data's it has. max_episode_steps: in environment steps.
    warning: told where MuJoCo has version warning_from or a later one. Source: d4rl's registrations.
    """

    pattern: str
    environment: str | None
    observation_dim: int
    action_dim: int
    observation_columns: int | None
    max_episode_steps: int
    reward_scale: Literal["return-range", "minus-one", "none"]
    reason: str = ""
    warning: str = ""
    warning_from: tuple[int, ...] = (0,)


NO_ANTMAZE = "gymnasium-robotics' AntMaze has motors five times as strong, another goal radius and a Dict to observe"
NO_MAZE2D = "gymnasium-robotics' PointMaze has other coordinates and goals, and a Dict to observe"
NO_BULLET = "D4RL's mazes for PyBullet are not registered with gymnasium"
NO_KITCHEN = "gymnasium-robotics' FrankaKitchen observes a Dict of 59 numbers, not these 60"
NO_PEN = "gymnasium-robotics' AdroitHandPen goes on when the pen drops, where D4RL's ends"
NO_HAND = "gymnasium-robotics' AdroitHand pays for the distance to the object, for which D4RL's takes away"
ANT = "Ant-v4 does not move as the data did (one step: error 0.18, below MuJoCo 3.5 0.005): 'mujoco<3.5' is nearer"
MAZES = {"open": 150, "umaze": 300, "medium": 600, "large": 800}

FAMILIES = (
    Family("bullet-hopper-.+-v0", "HopperBulletEnv-v0", 15, 3, None, 1000, "return-range"),
    Family("bullet-halfcheetah-.+-v0", "HalfCheetahBulletEnv-v0", 26, 6, None, 1000, "return-range"),
    Family("bullet-walker2d-.+-v0", "Walker2DBulletEnv-v0", 22, 6, None, 1000, "return-range"),
    Family("bullet-ant-.+-v0", "AntBulletEnv-v0", 28, 8, None, 1000, "return-range"),
    Family("hopper-.+-v[0-2]", "Hopper-v4", 11, 3, None, 1000, "return-range"),
    Family("halfcheetah-.+-v[0-2]", "HalfCheetah-v4", 17, 6, None, 1000, "return-range"),
    Family("walker2d-.+-v[0-2]", "Walker2d-v4", 17, 6, None, 1000, "return-range"),  # v5: other friction and reward
    Family("ant-.+-v[0-2]", "Ant-v4", 27, 8, 27, 1000, "return-range", "", ANT, (3, 5)),  # the other 84 are zero
    Family("antmaze-umaze(-.+)?-v[0-2]", None, 29, 8, None, 700, "minus-one", NO_ANTMAZE),
    Family("antmaze-(medium|large)-.+-v[0-2]", None, 29, 8, None, 1000, "minus-one", NO_ANTMAZE),
    *(Family(rf"maze2d-(eval-)?{maze}(-.+)?-v\d", None, 4, 2, None, n, "none", NO_MAZE2D) for maze, n in MAZES.items()),
    *(Family(f"bullet-maze2d-{maze}-v0", None, 4, 2, None, n, "none", NO_BULLET) for maze, n in MAZES.items()),
    Family("kitchen-.+-v0", None, 60, 9, None, 280, "none", NO_KITCHEN),
    Family("pen-.+-v[01]", None, 45, 24, None, 100, "none", NO_PEN),
    Family("door-.+-v[01]", None, 39, 28, None, 200, "none", NO_HAND),
    Family("hammer-.+-v[01]", None, 46, 26, None, 200, "none", NO_HAND),
    Family("relocate-.+-v[01]", None, 39, 30, None, 200, "none", NO_HAND),
)
REFUSED = {"flow": "needs the simulator SUMO", "carla": "needs the simulator CARLA", "minigrid": "has discrete actions"}


def d4rl_facts(dataset: str) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """What D4RL knows of a dataset: fields of [data], why nothing here can play it (or ""), and warnings.

    The fields are environment, observation_columns, max_episode_steps, reward_scale and reference, [min, max]; one
    that it does not have is left out.

    Raises: MdptError for a name that is unknown or cannot be used, or where D4RL is not installed.
    """
    infos, family = _d4rl(dataset)
    fields = ("environment", "observation_columns", "max_episode_steps", "reward_scale")
    facts = {key: value for key in fields if (value := getattr(family, key)) is not None}
    if dataset in infos["REF_MIN_SCORE"]:
        facts["reference"] = (float(infos["REF_MIN_SCORE"][dataset]), float(infos["REF_MAX_SCORE"][dataset]))
    told = family.warning and _mujoco_version() >= family.warning_from
    warnings = (f"{dataset}: with MuJoCo {importlib.metadata.version('mujoco')}, {family.warning}.",) if told else ()
    return facts, family.reason, warnings


def _mujoco_version() -> tuple[int, ...]:
    """The installed one's first two numbers; none where there is none."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("mujoco"))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _d4rl(dataset: str) -> tuple[dict[str, Any], Family]:
    kind = dataset.partition("-")[0]
    if kind in REFUSED:
        raise MdptError(
            f"dataset {dataset!r}: cannot be used: {kind} {REFUSED[kind]}. Choose one like hopper-medium-v2."
        )
    infos = d4rl_infos(f"dataset {dataset!r}: D4RL's table of datasets is not installed: pip install d4rl.")
    family = next((family for family in FAMILIES if re.fullmatch(family.pattern, dataset)), None)
    if family is None or dataset not in infos["DATASET_URLS"]:
        known = [name for name in infos["DATASET_URLS"] if name.partition("-")[0] not in REFUSED]
        near = difflib.get_close_matches(dataset.lower(), known, n=3, cutoff=0.3) or ["hopper-medium-v2"]
        raise MdptError(f"dataset {dataset!r}: unknown to D4RL. Nearest: {', '.join(near)}.")
    return infos, family


def d4rl_infos(otherwise: str) -> dict[str, Any]:
    """D4RL's tables, by dataset: DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE.

    Raises: MdptError, saying `otherwise`, where D4RL is not installed.
    """
    found = importlib.util.find_spec("d4rl")
    if found is None or not found.submodule_search_locations:
        raise MdptError(otherwise)
    # Its own file only: importing the package would look for MuJoCo and complain.
    return runpy.run_path(str(Path(found.submodule_search_locations[0], "infos.py")))


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
    infos = d4rl_infos(f"reference {reference!r}: D4RL's table is not installed; give [min, max] instead.")
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


def find_d4rl(dataset: str, cache: Path, show: Show) -> Path:
    """The file of a D4RL dataset: as it lies in $D4RL_DATASET_DIR, ~/.d4rl/datasets or the cache, or downloaded there.

    Raises: MdptError as `d4rl_facts` and `download` do.
    """
    address = _d4rl(dataset)[0]["DATASET_URLS"][dataset]
    name = address.rpartition("/")[2]
    folders = [os.environ.get("D4RL_DATASET_DIR"), os.path.expanduser("~/.d4rl/datasets"), cache / "d4rl"]
    for path in (Path(folder, name) for folder in folders if folder):
        if os.path.isfile(path):
            return path
    addresses = [re.sub("^http:", "https:", address), MIRROR + name]
    with making(path, show) as missing:
        if missing:
            download(addresses, path, ("observations", "actions", "rewards", "terminals"), partial(show, "download"))
    return path


def download(
    addresses: Sequence[str], path: Path, keys: Sequence[str], show: Callable[[int, int], None], timeout: float = 30.0
) -> None:
    """Put the HDF5 file that the first of these addresses has at `path`: whole, or not at all.

    keys: what it must have at its top. show: told the bytes so far, and in all (0: unknown). timeout: seconds that a
    connection may be silent.

    Raises: MdptError for a folder that cannot be written; where no address has the file, saying why for each.
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
    """Write what an address has into a file. Raises: OSError where that fails, MdptError for all that is not here."""
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
    """What an address has: a piece's first byte, the piece, how many bytes there are in all (or 0), and Content-Type.

    A connection that is cut is made again and goes on where it was, or, if the server knows no ranges or has another
    file by now, from byte 0; as long as each gets further than all before.

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


def minari_facts(dataset: str) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """What the metadata of a Minari dataset says for [data], why nothing can be played ("": it can), and warnings.

    environment, environment_kwargs, max_episode_steps and reference; what is unknown is left out. Of the environment
    only id, kwargs (without render_mode) and time limit are taken: an entry point or a wrapper could be any code.

    Raises: MdptError for an id that is none, a dataset that is not there and cannot be had, or damaged metadata.
    Source: gymnasium's EnvSpec.to_json, of Minari's `recover_environment(eval_env=True)`.
    """
    folder, metadata = _minari_metadata(dataset)
    facts: dict[str, Any] = {}
    low, high = (cast(Any, metadata.get(key)) for key in ("ref_min_score", "ref_max_score"))
    if type(low) in (int, float) and type(high) in (int, float) and -1e300 < low < high < 1e300:
        facts["reference"] = (low, high)
    try:
        spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or '{"id": null}')
        environment, kwargs, steps = spec["id"], {**(spec.get("kwargs") or {})}, spec.get("max_episode_steps")
        wrappers = ", ".join(repr(wrapper["name"]) for wrapper in spec.get("additional_wrappers") or ())
        kwargs.pop("render_mode", None)  # a window, or pictures of each step, are not the dataset's to ask for
        json.dumps(kwargs, allow_nan=False)
        if own := kwargs.keys() & MAKES_OWN:
            raise ValueError(f"kwargs have {sorted(own)}, which are gymnasium.make's own")
        reason = _unplayable(environment)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        return facts, f"{folder}: the specification of its environment is unsound. {_one_line(error)}", ()
    if type(steps) is int and steps > 0:
        facts["max_episode_steps"] = steps
    if reason:
        return facts, f"{folder}: {reason} You may name an environment yourself.", ()
    found = (f"{folder}: its environment was wrapped in {wrappers}; not applied here.",) if wrappers else ()
    return facts | {"environment": environment, "environment_kwargs": kwargs}, "", found


def _unplayable(environment: Any) -> str:
    """Why an environment that a file names is not made, "" where it may be: gymnasium knows its id without help."""
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
    """The folder of a dataset in Minari's local store and what its metadata.json says, downloaded if need be."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", dataset):
        raise MdptError(f"Minari dataset {dataset!r}: not an id; expected one such as 'D4RL/door/human-v2'.")
    store = os.environ.get("MINARI_DATASETS_PATH") or os.path.expanduser("~/.minari/datasets")
    folder = Path(store, dataset, "data")
    if not (folder / "metadata.json").is_file():
        if importlib.util.find_spec("minari") is None:
            remedy = f"pip install 'minari[hf]', and then: minari download {dataset}"
            raise MdptError(f"Minari dataset {dataset!r}: not in {store}. Get it: {remedy}")
        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("minari").download_dataset(dataset)
        except Exception as error:
            where = f"Minari dataset {dataset!r}: not in {store}"
            raise MdptError(f"{where}, and its download failed. {_one_line(error)}") from error
    try:
        metadata = json.loads((folder / "metadata.json").read_bytes())
        if not isinstance(metadata, dict):
            raise TypeError(f"expected an object, got {type(metadata).__name__}")
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise MdptError(f"{folder}: metadata.json is missing or damaged; get it again. {_one_line(error)}") from error
    return folder, metadata


MORE_MEMORY = "it is read whole: choose a smaller dataset, or a machine with more memory"


def read_minari(dataset: str) -> dict[str, Array]:
    """The columns of a Minari dataset in D4RL's form, episodes in the order of their numbers, as they are stored.

    observations and next_observations (n, O), actions (n, A), rewards (n,), terminals and timeouts (n,) bool. A Dict
    of observations is flattened as gymnasium's FlattenObservation does. A step that terminates and is truncated
    counts as terminal; an episode that ends with neither was cut by a time limit.

    Raises: MdptError that names the episode and the key at fault.
    Source: Minari's dataset standard, https://minari.farama.org/content/dataset_standards.
    """
    folder, metadata = _minari_metadata(dataset)
    columns: dict[str, list[Array]] = {}
    try:
        observation_space, action_space = (json.loads(metadata[f"{key}_space"]) for key in ("observation", "action"))
        if action_space["type"] != "Box":
            raise MdptError(f"{folder}: its actions are {action_space['type']!r}; only a Box can be learned.")
        for where, episode in _minari_episodes(dataset, folder, metadata.get("data_format", "hdf5")):
            steps = _child(episode, "rewards", where).size
            observations = _flatten(episode, "observations", observation_space, steps + 1, where)  # (T + 1, O)
            rewards, ends, cuts = (
                _flatten(episode, key, None, steps, where)[:, 0] for key in ("rewards", "terminations", "truncations")
            )
            terminals, timeouts = ends != 0, (cuts != 0) & (ends == 0)
            timeouts[-1:] |= ~terminals[-1:]
            found = {
                "observations": observations[:-1],
                "actions": _flatten(episode, "actions", action_space, steps, where),
                "rewards": rewards,
                "next_observations": observations[1:],
                "terminals": terminals,
                "timeouts": timeouts,
            }
            for key, array in found.items():
                columns.setdefault(key, []).append(array)
    except (AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise MdptError(f"{folder}: incomplete or damaged; get it again. {_one_line(error)}") from error
    if not columns:
        raise MdptError(f"{folder}: it holds no episode.")
    check_memory(max(sum(array.nbytes for array in arrays) for arrays in columns.values()), MORE_MEMORY)
    return {key: np.concatenate(columns.pop(key)) for key in [*columns]}


def _minari_episodes(dataset: str, folder: Path, storage: str) -> Iterator[tuple[str, Any]]:
    """Where each episode is, for messages, and its arrays by key: of HDF5 not yet read, else from Minari's reader."""
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
    """What is stored under a key, an array or more of such by key; of HDF5 only what lies in the file itself."""
    if not isinstance(parent, h5py.Group):
        return parent[key]
    kept = "/" not in key and isinstance(parent.get(key, getlink=True), h5py.HardLink)  # a path could pass other links
    node = parent[key] if kept else None
    if node is None:
        raise MdptError(f"{where} {key!r} is missing, or lies outside the file, where it is not looked for.")
    if isinstance(node, h5py.Dataset) and (problem := not_inside(node)):
        raise MdptError(f"{where} {key!r} {problem}")
    return node


def _flatten(parent: Any, key: str, space: dict[str, Any] | None, rows: int, where: str) -> Array:
    """What an episode holds under a key, (rows, -1); of a Dict the parts side by side, in the order of its space.

    space: as Minari writes it to its metadata; None for numbers of any shape.
    """
    node, kind, where = _child(parent, key, where), space["type"] if space else "Box", f"{where} {key!r}"
    if space and kind == "Dict":
        parts = [_flatten(node, name, part, rows, where) for name, part in space["subspaces"].items()]
        return np.concatenate(parts, axis=1)
    if kind != "Box" or not hasattr(node, "dtype") or node.dtype.kind not in "biuf":
        raise MdptError(
            f"{where} is {kind if kind != 'Box' else 'not numbers'}; only a Box, or a Dict of such, is read."
        )
    expected = (rows, *(space["shape"] if space else node.shape[1:]))
    if node.shape != expected:
        raise MdptError(f"{where} has shape {node.shape}, expected {expected}.")
    check_memory(node.nbytes, MORE_MEMORY)
    return np.asarray(node[()]).reshape(rows, int(np.prod(expected[1:])))


SOURCES = {
    "collect": Source(
        lambda section: _collected(section.environment or "HopperBulletEnv-v0"),
        lambda section, workers, show: collect_dataset(section, workers, show),
    ),
    "hdf5": Source(
        lambda section: ({}, NO_ENVIRONMENT, ()),
        lambda section, workers, show: Path(section.path or ""),
    ),
    "d4rl": Source(
        lambda section: d4rl_facts(section.dataset or ""),
        lambda section, workers, show: find_d4rl(section.dataset or "", _cache_folder(), show),
    ),
    "minari": Source(
        lambda section: minari_facts(section.dataset or ""),
        lambda section, workers, show: read_minari(section.dataset or ""),
    ),
    "arrays": Source(lambda section: ({}, NO_ENVIRONMENT, ()), _given),
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


@dataclass(frozen=True)
class RewardScale:
    """How rewards are scaled before values are learned from them: multiplier * raw + offset.

    rule: "none", "minus-one", "return-range" or "number".
    """

    rule: str
    multiplier: float
    offset: float


@dataclass(frozen=True)
class Identity:
    """Which data these are.

    source, name: as in [data]; a file by its name. transitions: rows of the file. no_environment: why there is no
    environment to play in, or "". hash: SHA-256 of the content of all columns that are read.
    """

    source: str
    name: str
    transitions: int
    no_environment: str
    hash: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training transitions as rows, held-out episodes, and where they came from.

    The next row of `rows` is the next step of the same episode, up to its end in `ends`. At a time limit of data
    without next_observations the last row of an episode is no transition, because what followed it is unknown; its
    action is kept in `cut_actions`, as the next action of the row before. The same holds for the last row of a file.
    """

    environment: EnvironmentSpec
    section: DataSection  # with what its source knew
    rows: Array  # (n, 2 O + A + 2) float32: raw observations, actions in [-1, 1], scaled rewards, next ones, terminals
    ends: Array  # (E,) int64, increasing: one past the last row of each training episode that has rows
    cut_actions: Array  # (E, A) float32 in [-1, 1]: the action after that last row; NaN where there is none
    mean: Array  # (O,) float32, of the training observations
    deviation: Array  # (O,) float32
    constant: Array  # (O,) bool, those that never vary
    held_out: HeldOut
    episode_returns: Array  # (W,) float64, raw, undiscounted, of all whole episodes used, held-out ones included
    episode_lengths: Array  # (W,) int64
    reward_scale: RewardScale
    identity: Identity
    terminal_count: int  # in the whole file
    timeout_count: int
    timeouts_counted: bool  # whether the file has no timeouts, so that time limits were counted
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> list[int]:
        """Widths of the columns side by side in a row."""
        wide, spec = self.environment.observation_dim, self.environment
        return [wide, spec.action_dim, 1, wide, 1]

    def column(self, name: Literal["observations", "actions", "rewards", "next_observations", "terminals"]) -> Array:
        """A column of the transitions, (n, O), (n, A) or (n,), as a view."""
        place = ("observations", "actions", "rewards", "next_observations", "terminals").index(name)
        start = sum(self.sizes[:place])
        part = self.rows[:, start : start + self.sizes[place]]
        return part[:, 0] if name in ("rewards", "terminals") else part


CHUNK = 65_536  # rows read, checked and converted at a time


def load_dataset(
    section: DataSection,
    workers: Workers = Workers(),
    show: Show = lambda what, done, total: None,
    arrays: Mapping[str, Array] | None = None,
    spec: EnvironmentSpec | None = None,
) -> Dataset:
    """Get the data from their source and make them ready for training.

    workers: for collecting. show: hears of what takes long. arrays: what source "arrays" reads, under D4RL's keys.
    spec: of the environment, where it is known already and need not be made.

    Raises: MdptError for a mistake in any of it.
    """
    if arrays is not None and section.source != "arrays":
        raise MdptError(f"[data] source = {section.source!r}: arrays are for source 'arrays'")
    source = SOURCES[section.source]
    known, missing, warnings = source.know(section)
    if section.environment not in (None, known.get("environment")):  # the user's own; what is known is of another
        own = ("environment_kwargs", "max_episode_steps", "observation_columns")
        missing, known = "", {key: value for key, value in known.items() if key not in own}
    blank = {key: value for key, value in known.items() if getattr(section, key) in (None, {})}
    path = None if section.path is None else _absolute(section.path, Path())
    reward_scale = section.reward_scale or known.get("reward_scale", "return-range")
    section = section.model_copy(update=blank | {"path": path, "reward_scale": reward_scale})
    if section.reference is not None:
        reference_returns(section.reference)
    elif section.environment is not None:
        raise MdptError(
            f"[data] reference is missing: name the D4RL family, or give [min, max], the returns in {section.environment} "
            "that are to be scores 0 and 100."
        )
    if spec is None and section.environment is not None:
        spec = environment_spec(
            section.environment, section.environment_kwargs, section.max_episode_steps, workers.timeout
        )
        if not spec.repeatable:
            warnings += (f"{spec.id}: two episodes with the same seed and actions differ; no score is repeatable.",)
    found: Path | Mapping[str, Array] = source.read(section, workers, show) if arrays is None else arrays
    if not isinstance(found, Path):
        name = section.dataset or "arrays"
        try:
            columns = Columns(name, name, {key: np.asarray(found[key]) for key in KEYS if key in found}, tuple(found))
        except ValueError as error:
            raise MdptError(f"{name}: expected arrays of numbers. {_one_line(error)}") from error
        return prepare(columns, section, spec, missing, warnings, show)
    with open_hdf5(found) as columns:
        return prepare(columns, section, spec, missing, warnings, show)


def prepare(
    columns: Columns,
    section: DataSection,
    spec: EnvironmentSpec | None,
    missing: str,
    warnings: tuple[str, ...],
    show: Show,
) -> Dataset:
    """The dataset of these columns, which are read once, some rows at a time.

    spec: None where there is no environment, for the reason `missing`.

    Raises: MdptError naming what is at fault in them.
    """
    where = columns.where
    widths = check_shapes(columns, spec, section.observation_columns)
    limit = section.max_episode_steps if spec is None or spec.id is None else spec.max_episode_steps
    episodes, told = read_episodes(columns, limit)
    spec = spec or _without_environment(widths, section, int(episodes.lengths.max()))
    if spec.id is not None:
        episodes.check_lengths(where, spec)
    train, held, whole = choose_episodes(episodes, section, spec)
    if section.held_out > 0 and not held.any():
        told += (f"{where}: a single episode, so none is held out.",)
    returns = np.add.reduceat(episodes.rewards.astype(np.float64), episodes.starts)[whole]
    scale = _reward_scale(section.reward_scale or "none", returns, spec.max_episode_steps)
    scaled = _scale_rewards(episodes.rewards, scale, where)
    aside = np.repeat(held, episodes.lengths)  # (n,)
    transitions = transition_rows(episodes.timeouts, "next_observations" in columns.arrays)
    kept = transitions & np.repeat(train, episodes.lengths)
    if not kept.any():
        raise MdptError(
            f"{where}: no transition is left to train on; lower held_out (now {section.held_out}) or add episodes."
        )
    rows = _allocate(section.storage, int(kept.sum()), 2 * widths[0] + widths[1] + 2)
    counts = np.add.reduceat(kept, episodes.starts, dtype=np.int64)  # transitions of each episode
    last = (episodes.starts + episodes.lengths - 1)[counts > 0]
    cut = np.zeros(len(kept), dtype=np.bool_)  # (n,)
    cut[last] = ~transitions[last]
    observations, actions, after, digest, clipped = _fill(rows, columns, spec, episodes, scaled, kept, aside, cut, show)
    cut_actions = np.full((len(last), widths[1]), np.nan, dtype=np.float32)
    cut_actions[cut[last]] = after
    mean, deviation, constant = moments(rows, widths[0])
    told += tuple(f"{where}: observation columns {text}." for text in _hidden_columns(mean, deviation, constant))
    if section.normalization == "none":
        mean, deviation = np.zeros_like(mean), np.ones_like(deviation)
    return Dataset(
        environment=spec,
        section=section,
        rows=rows,
        ends=np.cumsum(counts[counts > 0]),
        cut_actions=cut_actions,
        mean=mean,
        deviation=deviation,
        constant=constant,
        held_out=HeldOut(observations, actions, scaled[aside], episodes.terminals[aside], episodes.timeouts[aside]),
        episode_returns=returns,
        episode_lengths=episodes.lengths[whole],
        reward_scale=scale,
        identity=Identity(section.source, columns.name, len(scaled), missing, digest),
        terminal_count=int(episodes.terminals.sum()),
        timeout_count=int(episodes.timeouts.sum()),
        timeouts_counted="timeouts" not in columns.arrays,
        warnings=warnings + told + clipped,
    )


@dataclass(frozen=True, eq=False)
class Episodes:
    """Where episodes begin and how they end: rewards (n,) raw, terminals and timeouts (n,) bool, starts, lengths (E,)."""

    rewards: Array
    terminals: Array
    timeouts: Array
    starts: Array
    lengths: Array

    def check_lengths(self, where: str, spec: EnvironmentSpec) -> None:
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > spec.max_episode_steps:
            raise MdptError(
                f"{where}: the episode from row {self.starts[longest]} on has {self.lengths[longest]} rows, more than the "
                f"time limit {spec.max_episode_steps} of {spec.id}. Its 'timeouts' miss the ends of episodes, and values "
                "would be learned across them: mend or delete 'timeouts', or set [data] max_episode_steps."
            )


def read_episodes(columns: Columns, limit: int | None) -> tuple[Episodes, tuple[str, ...]]:
    """The episodes of these columns, cut every `limit` rows where they do not say so themselves, and warnings."""
    rewards, terminals, where = columns.read("rewards"), columns.read("terminals"), columns.where
    warnings: tuple[str, ...] = ()
    if "timeouts" in columns.arrays:
        timeouts = columns.read("timeouts")
    elif limit is not None:
        timeouts = count_timeouts(terminals, limit)
        warnings = (f"{where}: no 'timeouts'; episodes end at terminals and every {limit} rows.",)
        if (both := int((terminals & timeouts).sum())) > 0.5 * terminals.sum():
            warnings += (
                f"{where}: {both} of its {terminals.sum()} terminals fall on such rows; 'timeouts' would tell.",
            )
    else:
        timeouts = np.zeros(len(terminals), dtype=np.bool_)
        warnings = (f"{where}: no 'timeouts'; episodes end at terminals alone. [data] max_episode_steps cuts them.",)
    starts, stops = episode_bounds(terminals, timeouts)
    if looks_late(columns, starts, terminals, rewards):
        late = (
            "begins with reward 0 and ends with action 0, as in d4rl-pybullet's files whose rewards and terminals lie"
        )
        warnings += (f"{where}: every episode {late} one row late; if this is one, move them up before training.",)
    return Episodes(rewards, terminals, timeouts, starts, stops - starts), warnings


def choose_episodes(episodes: Episodes, section: DataSection, spec: EnvironmentSpec) -> tuple[Array, Array, Array]:
    """Which episodes (E,) bool to train on, which to hold out, and which of both are whole, so that returns count."""
    ends = episodes.starts + episodes.lengths - 1
    complete = (episodes.terminals | episodes.timeouts)[ends]
    if not complete.any():
        complete[:] = True
    whole, used = complete, np.ones(len(ends), dtype=np.bool_)
    if section.source == "collect":  # cut where a worker's share of the rows is full
        whole = episodes.terminals[ends] | (episodes.lengths == spec.max_episode_steps)
    if section.fraction < 1:
        used = _choose(complete, section.fraction, [section.seed, 1], spare=0)
        complete &= used
    held = _choose(complete, section.held_out, section.seed, spare=1)
    return used & ~held, held, whole & used if (whole & used).any() else complete


def _choose(complete: Array, fraction: float, seed: int | list[int], spare: int) -> Array:
    """Some episodes, (E,) bool: a fraction of the complete ones, one at least, but never the last `spare`."""
    chosen = np.zeros(len(complete), dtype=np.bool_)
    total = int(complete.sum())
    count = min(max(1, round(fraction * total)), total - spare) if fraction > 0 else 0
    chosen[np.random.default_rng(seed).permutation(np.flatnonzero(complete))[:count]] = True
    return chosen


def _without_environment(widths: tuple[int, int], section: DataSection, longest: int) -> EnvironmentSpec:
    low, high = ((end,) * widths[1] for end in section.action_range)
    return EnvironmentSpec(None, *widths, low, high, section.max_episode_steps or longest)


def _fill(
    rows: Array,
    columns: Columns,
    spec: EnvironmentSpec,
    episodes: Episodes,
    rewards: Array,
    train: Array,
    aside: Array,
    cut: Array,
    show: Show,
) -> tuple[Array, Array, Array, str, tuple[str, ...]]:
    """Read the wide columns and put the transitions `train` (n,) into rows, with scaled rewards (n,).

    Returns: observations and actions of the rows `aside` (n,), actions of the rows `cut` (n,), a hash of the content of
    all columns, and warnings.
    """
    wide, total = spec.observation_dim, len(train)
    low, high = _bounds(spec)
    bounds = f"expected within {low.tolist()} and {high.tolist()} of {spec.name}" + (
        "" if spec.id else "; [data] action_range says what they may be"
    )
    own = "next_observations" in columns.arrays
    digests = {key: hashlib.sha256() for key in ("observations", "actions", *(["next_observations"] if own else []))}
    digests |= {key: hashlib.sha256(getattr(episodes, key).data) for key in ("rewards", "terminals", "timeouts")}
    kept: list[tuple[Array, Array, Array]] = []
    filled, outside, most = 0, 0, 0.0
    for start in range(0, total, CHUNK):
        stop = min(start + CHUNK, total)
        block = columns.read("observations", start, stop + 1)[:, :wide]
        part = {"observations": block[: stop - start], "actions": columns.read("actions", start, stop)}
        if own:
            part["next_observations"] = columns.read("next_observations", start, stop)[:, :wide]
        actions = part["actions"]
        excess = np.maximum(low - actions, actions - high)
        columns.forbid("actions", actions, excess > 1e-3 * (high - low), bounds, start)
        outside, most = outside + int((excess > 0).any(axis=1).sum()), max(most, float(excess.max()))
        part["actions"] = np.clip(actions, low, high)
        for key, array in part.items():
            digests[key].update(np.ascontiguousarray(array).data)
        scaled = scale_actions(part["actions"], spec)
        chosen, held = train[start:stop], aside[start:stop]
        kept.append((part["observations"][held], scaled[held], scaled[cut[start:stop]]))
        places = np.flatnonzero(chosen)
        following = part["next_observations"][places] if own else block[places + 1]
        target = rows[filled : filled + len(places)]
        parts = part["observations"][places], scaled[places], rewards[start:stop][places, None], following
        np.concatenate([*parts, episodes.terminals[start:stop][places, None]], axis=1, out=target, dtype=None)
        filled += len(places)
        if total > 10 * CHUNK:
            show("read", stop, total)
    observations, actions, after = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    clipped = f"{columns.where}: clipped the actions of {outside} rows, out of bounds by {most:.1e} at most."
    found = json.dumps(sorted((key, digest.hexdigest()) for key, digest in digests.items()))
    return observations, actions, after, hashlib.sha256(found.encode()).hexdigest(), (clipped,) * (outside > 0)


def _allocate(storage: str, count: int, width: int) -> Array:
    """Room for rows (count, width) float32: in memory, or in a file of the cache that goes with this process."""
    if storage == "memory":
        check_memory(4 * count * width, "set [data] storage = 'disk', or a smaller fraction")
        return np.empty((count, width), dtype=np.float32)
    folder = _cache_folder()
    try:
        make_writable_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
                os.posix_fallocate(file.fileno(), 0, 4 * count * width)
            return np.memmap(file, dtype=np.float32, mode="r+", shape=(count, width))
    except OSError as error:
        raise MdptError(
            f"{folder}: no room for {4 * count * width / 1e9:.1f} GB of transitions ({error.strerror}); set MDPT_CACHE to "
            "a folder on a larger disk"
        ) from error


def moments(rows: Array, wide: int) -> tuple[Array, Array, Array]:
    """Mean, deviation (wide,) float32 of the first columns, and which never vary: theirs is 1, all else would be noise.

    A thousandth is added as TD3+BC does, for columns that hardly do. In float64, some rows at a time, so that memory
    and disk give the same.
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
    """What to say of columns, as `moments` found them, that networks will not see though they may vary."""
    if (far := constant & (np.abs(mean) > 1e4)).any():
        yield f"{np.flatnonzero(far).tolist()} do not vary, as float32 and so far from 0; take off what they share"
    if (faint := ~constant & (deviation < 1.1e-3)).any():
        yield f"{np.flatnonzero(faint).tolist()} vary by less than 0.0001, too little to be seen; use another unit"


@dataclass(frozen=True)
class Description:
    """What a user wants to know of a dataset before training on it.

    transitions: to train on. held_out: rows. lengths: shortest, median and longest whole episode, in steps. returns:
    quartiles, from worst to best. histogram: episodes by return. constant: observation columns that never vary. at_bounds:
    fraction of actions at a bound, per dimension. duplicates: fraction of transitions that repeat the observation and
    action of another. terminals, timeouts: how many the whole file has. timeouts_counted: the file has no timeouts.
    """

    transitions: int
    held_out: int
    lengths: list[float]
    returns: list[float]
    histogram: list[int]
    constant: list[int]
    at_bounds: list[float]
    duplicates: float
    terminals: int
    timeouts: int
    timeouts_counted: bool


def describe_data(dataset: Dataset) -> Description:
    """Summarize a dataset in one pass over its rows."""
    wide, many = dataset.environment.observation_dim, len(dataset)
    order = np.random.default_rng(0).standard_normal(wide + dataset.environment.action_dim)
    keys, bound = np.empty(many), np.zeros(dataset.environment.action_dim)
    for start in range(0, many, CHUNK):
        part = dataset.rows[start : start + CHUNK, : len(order)]
        keys[start : start + CHUNK] = part.astype(np.float64) @ order
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
        timeouts_counted=dataset.timeouts_counted,
    )


def histogram(values: Array, bins: int = 20) -> Array:
    """How many values there are in each of so many equal parts of their range."""
    low, high = values.min(), values.max()
    places = ((values - low) / (high - low or 1.0) * bins).astype(np.int64)
    return np.bincount(places.clip(0, bins - 1), minlength=bins)


def looks_late(columns: Columns, starts: Array, terminals: Array, rewards: Array) -> bool:
    """Whether rewards and terminals seem to lie a row late: episodes begin with reward 0 and end with action 0."""
    ends = np.flatnonzero(terminals)[:50]
    if len(ends) < 2 or rewards[starts].any() or not rewards.any():
        return False
    return not any(columns.read("actions", row, row + 1).any() for row in ends.tolist())


def _reward_scale(rule: str | float | tuple[float, float], returns: Array, max_episode_steps: int) -> RewardScale:
    if rule == "none":
        return RewardScale(rule, 1.0, 0.0)
    if rule == "minus-one":
        return RewardScale(rule, 1.0, -1.0)
    if rule == "return-range":
        if len(returns) == 1:
            raise MdptError(
                "reward_scale 'return-range': there is a single episode. 'terminals', 'timeouts' or [data] "
                "max_episode_steps tell where episodes end; or choose 'none' or a number."
            )
        spread = float(returns.max() - returns.min())
        if spread <= 1e-6 * np.abs(returns).max():
            raise MdptError(
                f"reward_scale 'return-range': all returns are equal, {returns.min():.7g} to {returns.max():.7g}; choose "
                "'none' or a number."
            )
        return RewardScale(rule, max_episode_steps / spread, 0.0)
    factor, offset = rule if isinstance(rule, tuple) else (float(rule), 0.0)
    return RewardScale("number", factor, offset)


def _scale_rewards(rewards: Array, scale: RewardScale, where: str) -> Array:
    """Rewards (n,) as values are learned from them, float32."""
    with np.errstate(over="ignore"):
        scaled: Array = (rewards * scale.multiplier + scale.offset).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise MdptError(
            f"{where}: rewards x {scale.multiplier:.4g} are no finite float32; choose another reward_scale."
        )
    return scaled
