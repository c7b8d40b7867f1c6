"""mdpt: diffusion policies for offline reinforcement learning, guidance and policy as separate modules.

Commands, experiment file, training loop, reports. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version as installed_version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tomli
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typer.core import TyperGroup

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from data import Dataset
    from models import Batch, Bundle, Guidance, Inference, Loss, Policy, Randomness, Stack, Transitions

    Pairs = list[tuple[int, int | None]]  # policy member, guidance member


class MdptError(Exception):
    """A user's mistake: what, where, got and expected, what to do. Printed to stderr, exit code 1."""


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

    algorithm: Literal["idql", "dql"] = Field("idql", description="implicit Q-learning, or Diffusion-QL's critic")
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

    algorithm: Literal["bc", "idql", "dql", "edp", "cfg"] = Field("dql", description="training objective")
    scheme: Literal["guidance-first", "joint", "unguided"] = Field("guidance-first", description="when guidance learns")
    hidden: Widths = Field([256, 256, 256], description="hidden units of each layer; idql: of each residual block")
    activation: Activation = Field("mish", description="of the denoiser")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="in idql's residual blocks")
    time_features: Annotated[int, Field(ge=2, multiple_of=2)] = Field(64, description="sinusoids of the diffusion step")
    diffusion_steps: Positive = Field(5, description="T")
    noise_schedule: Literal["vp", "cosine", "linear"] = Field("vp", description="betas; vp as in Diffusion-QL")
    sampler: Literal["ddpm", "dpm-solver++"] = Field("ddpm", description="ancestral, or DPM-Solver++ 2M")
    sampling_steps: Positive = Field(5, description="network calls of dpm-solver++, at most diffusion_steps")
    eta: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the guidance term (dql, edp)")
    ema_decay: Fraction = Field(0.999, description="of the averaged weights that act, per step")
    label_dropout: Fraction = Field(0.1, description="cfg: share of labels dropped in training")
    advantage_weight: Literal["none", "expectile", "exponential"] = Field(
        "none", description="of transitions: bc, idql"
    )
    advantage_expectile: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="for advantage_weight expectile")
    advantage_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="inverse, for exponential")
    guidance_from: Fraction = Field(0.0, description="fraction of the run at which the guidance term begins")
    guidance_until: Fraction = Field(1.0, description="fraction of the run at which it ends")

    @model_validator(mode="after")
    def _fields_agree(self) -> PolicySection:
        if self.algorithm == "idql" and len(set(self.hidden)) > 1:
            raise ValueError(f"hidden {self.hidden}: idql's residual blocks are all of one width")
        if self.sampler == "dpm-solver++" and self.sampling_steps > self.diffusion_steps:
            raise ValueError(
                f"sampling_steps {self.sampling_steps} is more than diffusion_steps {self.diffusion_steps}"
            )
        if self.guidance_from > self.guidance_until:
            raise ValueError(f"guidance_from {self.guidance_from} is after guidance_until {self.guidance_until}")
        return self

    @property
    def learns_labels(self) -> bool:
        """Whether the policy ever learns under a label."""
        guided = self.scheme != "unguided" and self.guidance_from < self.guidance_until
        return guided and self.algorithm == "cfg" and self.label_dropout < 1


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


def load_experiment(path: Path, overrides: Sequence[str], seeds: str | None, device: str | None) -> Experiment:
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
    if seeds is not None:
        overrides = [*overrides, f"seeds=[{seeds}]"]
    if device is not None:
        overrides = [*overrides, f"device={device}"]
    for override in overrides:
        _override(content, override)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise MdptError(_explain(path, error)) from error


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


def _explain(path: Path, error: ValidationError) -> str:
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


# --- training ---------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A network that learns: its optimizer, initial learning rate and gradient-norm limit."""

    network: Stack
    learning_rate: float
    gradient_norm: float
    gradient: Any = None
    adam: Any = None


class Learner:
    """Modules that learn together under one loss, with Adam, cosine decay and a gradient-norm limit per member.

    frozen: guidance that the loss uses and nothing here changes; it only counts as held.
    """

    def __init__(
        self,
        modules: Sequence[tuple[Guidance | Policy, TrainingSection]],
        loss: Callable[[Batch, Randomness, float], Loss],
        frozen: Sequence[Guidance] = (),
    ) -> None:
        import torch

        self.modules, self.loss, self.frozen = [module for module, _ in modules], loss, frozen
        self.parts = [
            Part(network, section.learning_rate, section.gradient_norm)
            for module, section in modules
            for network in module.networks()
        ]
        for part in self.parts:
            part.gradient = part.network.vector.grad = torch.zeros_like(part.network.vector)
            part.adam = torch.optim.Adam([part.network.vector], lr=part.learning_rate, fused=True)
        self.parameters = [parameter for part in self.parts for parameter in part.network.parameters()]

    def update(self, loss: Tensor, step: int, steps: int) -> None:
        """One gradient step of every network, then targets and averages follow. loss: (S,)."""
        import torch

        gradients = iter(torch.autograd.grad(loss.sum(), self.parameters))
        for part in self.parts:
            pieces = [next(gradients).flatten(1) for _ in part.network.parameters()]
            torch.cat(pieces, dim=1, out=part.gradient[:, : part.network.size])
            by_member = part.gradient.view(len(loss), -1)  # (S, copies * P)
            norm = torch.linalg.vector_norm(by_member, dim=1, keepdim=True)
            by_member.mul_((part.gradient_norm / (norm + 1e-6)).clamp(max=1.0))
            part.adam.param_groups[0]["lr"] = part.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            part.adam.step()
        for module in self.modules:
            module.follow(step)

    def broken_member(self) -> int | None:
        """The first member with a weight that is not finite."""
        import torch

        rows = [part.network.vector.view(part.network.members, -1) for part in self.parts]
        finite = torch.cat(rows, dim=1).isfinite().all(1)
        return None if finite.all() else int(finite.int().argmin())

    def state(self) -> list[dict[str, Any]]:
        """Optimizer states, one per network, as plain containers."""
        return [part.adam.state_dict() for part in self.parts]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.adam.load_state_dict(state)


def train(
    learner: Learner,
    transitions: Transitions,
    random: Randomness,
    *,
    batch_size: int,
    start: int,
    steps: int,
    monitor: Monitor,
    keep: Callable[[int], None],
) -> None:
    """The training loop of guidance and policy alike: sample, step, log, save."""
    for step in range(start, steps):
        random.step = step
        batch = transitions.sample(random, batch_size)
        loss, metrics = learner.loss(batch, random, step / steps)
        learner.update(loss, step, steps)
        monitor.record(step, loss.detach(), metrics)
        if step + 1 in monitor.milestones or monitor.interrupted:
            monitor.log()
            keep(step + 1)
        if monitor.interrupted and step + 1 < steps:
            raise MdptError(f"interrupted after step {step + 1} of {steps}; the same command with --resume goes on")


def scalar_writer(
    folder: Path, seeds: Sequence[int], history: Sequence[dict[str, Any]]
) -> Callable[[dict[str, Any]], None]:
    """What writes entries of a training history for TensorBoard, a curve for each metric and member.

    history: the entries there are already; what an earlier run left in the folder is no longer shown.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(folder), purge_step=0)
    except OSError as error:
        raise MdptError(f"--tensorboard {folder}: cannot be written ({error.strerror})") from error

    def write(entry: dict[str, Any]) -> None:
        for name in entry.keys() - {"step"}:
            for seed, value in zip(seeds, entry[name], strict=True):
                writer.add_scalar(f"{name}/seed {seed}", value, entry["step"])
        writer.flush()

    for entry in history:
        write(entry)
    return write


@dataclass
class Monitor:
    """Watches a run: progress on the screen, history for the bundle, an end where a loss is not finite."""

    title: str
    start: int
    steps: int
    seeds: Sequence[int]
    milestones: set[int]
    history: list[dict[str, Any]]
    kept: str
    interrupted: bool = False
    began: float = field(default_factory=time.perf_counter)
    pending: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    show: Callable[[int, str], None] = lambda done, text: None
    board: Callable[[dict[str, Any]], None] = lambda entry: None

    def record(self, step: int, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        self.pending.append((loss, metrics))
        if (step + 1) % max(1, self.steps // 200) == 0 or step + 1 == self.steps:
            self.log()

    def log(self) -> None:
        """Check and average what came since the last call; one transfer from the device."""
        import torch

        if not self.pending:
            return
        done = (self.history[-1]["step"] if self.history else 0) + len(self.pending)
        losses = torch.stack([loss for loss, _ in self.pending]).cpu()  # (steps, S)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step, member = done - len(self.pending) + int(bad[0, 0]), int(bad[0, 1])
            self.give_up("loss", member, losses[bad[0, 0], member].item(), step)
        names = {name for _, metrics in self.pending for name in metrics}
        means = {
            name: torch.stack([m[name] for _, m in self.pending if name in m]).mean(0).tolist()
            for name in sorted(names)
        }
        self.history.append({"step": done, "loss": losses.mean(0).tolist(), **means})
        self.board(self.history[-1])
        self.pending.clear()
        speed = (done - self.start) / (time.perf_counter() - self.began)
        self.show(done, f"loss {losses.mean():.4g}, {speed:.0f} steps/s")

    def give_up(self, what: str, member: int, value: object, step: int) -> NoReturn:
        """End the run: raises MdptError."""
        raise MdptError(
            f"the {what} of member {member} (seed {self.seeds[member]}) became {value} at step {step}; {self.kept}; "
            "lower learning_rate or look at the data"
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show progress, and let Ctrl-C end the run after a whole step."""

        def interrupt(*_: object) -> None:
            self.interrupted = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            with progress(self.title, self.steps, self.start) as self.show:
                yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def progress(title: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A Rich progress bar on stderr, or a log line each tenth of the way where stderr is no terminal."""
    from rich import progress as rich_progress

    console = make_console(stderr=True)
    if console.is_terminal:
        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[text]}"),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=start, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)
        return
    began, logged = time.perf_counter(), start * 10 // total

    def log(done: int, text: str) -> None:
        nonlocal logged
        if done * 10 // total > logged:
            logged = done * 10 // total
            left = (time.perf_counter() - began) / (done - start) * (total - done)
            console.print(f"{title}: {done}/{total}  {text}  {left:.0f} s left", highlight=False, soft_wrap=True)

    yield log


def pick_device(name: str, begun: Bundle | None = None) -> tuple[str, str]:
    """ "cpu" or "cuda", and what multiplies matrices on the CPU; begun: a run that goes on as it was begun.

    Raises: MdptError where cuda is asked for and missing.
    """
    import torch

    from models import choose_products

    if name not in ("auto", "cpu", "cuda"):
        raise MdptError(f"device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise MdptError("device cuda: this machine or this torch has none; use --device cpu")
    device = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    before = {} if begun is None else begun["accounting"]
    products = choose_products(before.get("products"))
    if (was := before.get("device", device)) != device:
        warn(f"this run was begun on {was}, goes on on {device}: other random numbers than it would have had")
    elif (way := before.get("products", products)) != products:
        warn(f"this run was begun with {way} matrix products, which this machine has not: its rounding changes")
    return device, products


def load_data(run: Experiment, workers: int) -> Dataset:
    """The experiment's dataset, collected first where that is its source and the cache does not have it."""
    from data import CollectSettings, load_dataset, reference_returns

    section = run.data
    reference_returns(section.reference)  # a mistake in it shall not wait for the collection
    noise = section.action_noise if isinstance(section.action_noise, float) else tuple(section.action_noise)
    settings = CollectSettings(section.transitions, tuple(section.levels), noise, section.seed)
    with progress("collect", section.transitions) as show:
        dataset = load_dataset(
            source=section.source,
            environment_id=section.environment,
            path=Path(section.path) if section.path else None,
            reward_scale=section.reward_scale,
            held_out=section.held_out,
            seed=section.seed,
            collect=settings if section.source == "collect" else None,
            workers=workers,
            progress=lambda done, total: show(done, ""),
        )
    for warning in dataset.warnings:
        warn(warning)
    return dataset


def new_bundle(kind: str, run: Experiment, dataset: Dataset) -> Bundle:
    """All of a bundle that does not change while it learns."""
    import torch

    from data import reference_returns
    from models import BUNDLE_FORMAT, BUNDLE_VERSION

    spec, table = dataset.environment, run.model_dump()[kind]
    apart = {*TrainingSection.model_fields, "scheme", "guidance_from", "guidance_until"}
    observations = torch.from_numpy(dataset.observations).double()
    returns = dataset.episode_returns
    return {
        "format": BUNDLE_FORMAT,
        "version": BUNDLE_VERSION,
        "kind": kind,
        "experiment": run.model_dump(),
        "seeds": list(run.seeds),
        "environment": asdict(spec),
        "reference": reference_returns(run.data.reference),
        "dataset": dataset.identity
        | {
            "training_transitions": len(dataset.rewards),
            "episodes": len(returns),
            "mean_return": float(returns.mean()),
            "best_return": float(returns.max()),
        },
        "normalizer": {
            "mean": observations.mean(0).float(),
            "deviation": observations.std(0, unbiased=False).float() + 1e-3,  # 1e-3 as TD3+BC: some features never vary
        },
        "reward_scale": dataset.reward_scale,
        "architecture": {
            "observation_dim": spec.observation_dim,
            "action_dim": spec.action_dim,
            **{key: value for key, value in table.items() if key not in apart},
        },
        "versions": {"mdpt": version(), "torch": str(torch.__version__), "python": platform.python_version()},
        "step": 0,
        "complete": False,
        "history": [],
        "snapshots": {},
        "accounting": {},
        "guidance": None,
    }


def train_bundle(
    bundle: Bundle,
    learner: Learner,
    section: GuidanceSection | PolicySection,
    transitions: Transitions,
    kept: Sequence[tuple[Bundle, Guidance | Policy]],
    out: Path,
    resumed: Bundle | None,
    meter: Meter,
    board: Path | None,
) -> None:
    """Train `learner` and write `bundle` to `out` at each snapshot and at the end.

    kept: the modules that learn, each with the bundle its weights go to: `bundle` itself, or one inside it.
    resumed: an unfinished bundle to go on from. board: a folder for TensorBoard.
    """
    from models import Randomness, save_bundle, weights_of

    if resumed is not None:
        bundle |= {key: resumed[key] for key in ("step", "history", "accounting")}
        learner.restore(resumed["training"])
        meter.before = resumed["accounting"]
    milestones = {round(section.steps * (i + 1) / section.snapshots) for i in range(section.snapshots)}
    monitor = Monitor(
        title=f"{bundle['kind']} {section.algorithm}",
        start=bundle["step"],
        steps=section.steps,
        seeds=bundle["seeds"],
        milestones=milestones,
        history=bundle["history"],
        kept=f"{out} holds step {bundle['step']}" if resumed else "no snapshot was reached",
    )
    if board is not None:
        monitor.board = scalar_writer(board / out.stem, bundle["seeds"], bundle["history"])

    def keep(step: int) -> None:
        if (member := learner.broken_member()) is not None:
            monitor.give_up("weights", member, "not finite", step)
        complete = step == section.steps
        account = meter.read(learner, step)
        for target, module in kept:
            weights = weights_of(module)
            if complete:  # a companion actor has done its work
                weights = {name: value for name, value in weights.items() if not name.startswith("actor.")}
            target.update(step=step, complete=complete, weights=weights, accounting=account)
            if step in milestones:
                acting = {name: value for name, value in weights.items() if name.startswith(ACTING)}
                target["snapshots"] = target["snapshots"] | {step: acting}
        bundle["training"] = None if complete else learner.state()
        save_bundle(out, bundle)
        monitor.kept = f"the last good snapshot, of step {step}, is kept in {out}"

    with monitor.watching():
        train(
            learner,
            transitions,
            Randomness(bundle["seeds"], f"{bundle['kind']} train", transitions.rows.device),
            batch_size=section.batch_size,
            start=bundle["step"],
            steps=section.steps,
            monitor=monitor,
            keep=keep,
        )


ACTING = ("average.", "target_q.", "value.")  # the weights that act or are asked for values


class Meter:
    """What a training run costs: time, memory above the loaded dataset, parameters, optimizer state."""

    def __init__(self, device: Any, products: str) -> None:
        self.device, self.products = device, products
        self.before: dict[str, Any] = {"seconds": 0.0, "peak_bytes": 0}
        self.began, self.base = time.perf_counter(), memory_now(device, restart=True)

    def read(self, learner: Learner, step: int) -> dict[str, Any]:
        """The account after `step` gradient steps; counts and bytes are of all members together."""
        import torch

        seconds = self.before["seconds"] + time.perf_counter() - self.began
        state = [value for part in learner.parts for state in part.adam.state.values() for value in state.values()]
        held = [p.numel() for module in (*learner.modules, *learner.frozen) for p in module.parameters()]
        return {
            "parameters_trained": sum(parameter.numel() for parameter in learner.parameters),
            "parameters_held": sum(held),
            "optimizer_bytes": sum(value.nbytes for value in state if torch.is_tensor(value)),
            "peak_bytes": max(self.before["peak_bytes"], memory_now(self.device) - self.base),
            "seconds": seconds,
            "seconds_per_1000_steps": 1000 * seconds / step,
            "device": str(self.device),
            "products": self.products,
        }


def memory_now(device: Any, *, restart: bool = False) -> int:
    """Peak bytes since the last restart, allocated on CUDA, resident on a CPU; restart: from the current ones on."""
    import torch

    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # no Linux, or one that hides this: the whole process's peak is all there is
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_guidance(run: Experiment, out: Path, resumed: Bundle | None, workers: int, board: Path | None) -> Bundle:
    """Train a guidance from the data alone, judge it on held-out episodes, and write its bundle."""
    from models import Transitions, save_bundle

    device, products = pick_device(run.device, resumed)
    dataset = load_data(run, workers)
    bundle = new_bundle("guidance", run, dataset)
    transitions = Transitions(vars(dataset), device)
    meter = Meter(transitions.rows.device, products)
    guidance: Guidance = new_module(bundle, device, out, resumed, companion=True)
    learner = Learner([(guidance, run.guidance)], lambda batch, random, _: guidance.loss(batch, random))
    train_bundle(bundle, learner, run.guidance, transitions, [(bundle, guidance)], out, resumed, meter, board)
    bundle["quality"] = guidance_quality(guidance, dataset, run.guidance.discount, device)
    save_bundle(out, bundle)
    return bundle


def train_policy(
    run: Experiment, teacher: Bundle | None, out: Path, resumed: Bundle | None, workers: int, board: Path | None
) -> None:
    """Train a policy under a frozen guidance, together with one ("joint"), or unguided, and write its bundle."""
    from models import Transitions, add, build_guidance, check_fit, pair_members

    section, (device, products) = run.policy, pick_device(run.device, resumed)
    dataset = load_data(run, workers)
    bundle = new_bundle("policy", run, dataset)
    if section.scheme == "joint":
        bundle["guidance"] = new_bundle("guidance", run, dataset)
    transitions = Transitions(vars(dataset), device)
    meter = Meter(transitions.rows.device, products)
    policy: Policy = new_module(bundle, device, out, resumed)
    guidance: Guidance | None = None
    frozen: list[Guidance] = []
    learning: list[tuple[Bundle, Guidance | Policy]] = [(bundle, policy)]
    if section.scheme == "joint":
        guidance = new_module(bundle["guidance"], device, out, resumed and resumed["guidance"])
        learning.insert(0, (bundle["guidance"], guidance))
    elif teacher is not None:
        for warning in check_fit(bundle, teacher):
            warn(warning)
        if resumed is not None:
            check_same_guidance(teacher, resumed, out)
        bundle["guidance"] = teacher | {"snapshots": {}, "training": None}  # what acts, not how it got there
        guidance = build_guidance(teacher, device)
        guidance.pick(pair_members(policy.members, guidance.members))
        frozen.append(guidance)
        if policy.algorithm.labels:
            transitions.label(guidance)

    def loss(batch: Batch, random: Randomness, done: float) -> Loss:
        guided = section.guidance_from <= done < section.guidance_until
        own = policy.loss(batch, guidance if guided else None, random)
        if guidance not in learner.modules:
            return own
        w = float(section.learns_labels and done >= section.guidance_from)
        return add(own, guidance.loss(batch, random, policy, w))

    tables = {"guidance": run.guidance, "policy": section}
    learner = Learner([(module, tables[target["kind"]]) for target, module in learning], loss, frozen)
    train_bundle(bundle, learner, section, transitions, learning, out, resumed, meter, board)


def new_module(bundle: Bundle, device: str, out: Path, resumed: Bundle | None, *, companion: bool = False) -> Any:
    """The module a new bundle describes, ready to learn: with initial weights, or those of the resumed bundle."""
    from models import build_new

    module = build_new(bundle, device, companion=companion)
    if resumed is not None:
        check_same_run(bundle, resumed, out)
        bundle["snapshots"] = resumed["snapshots"]
        module.load_state_dict(resumed["weights"])
    return module


def check_same_run(bundle: Bundle, resumed: Bundle, out: Path) -> None:
    """Raises: MdptError where an unfinished bundle is of another experiment, dataset or guidance."""
    if resumed["kind"] != bundle["kind"]:
        raise MdptError(f"{out}: is an unfinished {resumed['kind']} bundle, expected a {bundle['kind']} bundle")
    for table, ours in bundle["experiment"].items():
        theirs = resumed["experiment"][table]
        if ours != theirs and table not in ("name", "device", "evaluation"):
            changed = [table]
            if isinstance(ours, dict):
                changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            raise MdptError(
                f"{out}: was begun with another [{table}]: {', '.join(changed)} differ; "
                "--resume needs the same experiment, --overwrite begins anew"
            )
    if resumed["dataset"]["hash"] != bundle["dataset"]["hash"]:
        raise MdptError(f"{out}: was begun on other data; --resume needs the same, --overwrite begins anew")


def check_same_guidance(teacher: Bundle, resumed: Bundle, out: Path) -> None:
    """Raises: MdptError where an unfinished policy was begun under a guidance with other weights."""
    if not same_weights(resumed["guidance"], teacher):
        raise MdptError(f"{out}: was begun under another guidance; --resume needs the same, --overwrite begins anew")


def same_weights(first: Bundle, second: Bundle) -> bool:
    ours, theirs = first["weights"], second["weights"]
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def guidance_quality(guidance: Guidance, dataset: Dataset, discount: float, device: str) -> dict[str, Any]:
    """How far to trust a guidance, on held-out episodes: V against discounted Monte-Carlo returns, Q among members.

    Correlations are Pearson's, one per member, over rows whose return is known (the episode ended, or what a time
    limit cut off weighs at most 5 %). The spread is the deviation of Q over members, averaged, beside that over rows.
    """
    import numpy as np
    import torch

    from data import discounted_returns

    held_out = dataset.held_out
    if not len(held_out.rewards):
        return {"rows": 0}
    returns, known = discounted_returns(held_out.rewards, held_out.terminals, held_out.timeouts, discount)
    tensors = [torch.from_numpy(array) for array in (held_out.observations, held_out.actions)]
    found = []
    with torch.no_grad():
        for block in zip(*(torch.split(tensor, 8192) for tensor in tensors), strict=True):
            observations, actions = (part.to(device).expand(guidance.members, -1, -1) for part in block)
            found.append(torch.stack([guidance.v(observations), guidance.q(observations, actions)]).cpu())
    v, q = torch.cat(found, dim=-1).double().numpy()  # (S, rows)
    enough = known.sum() > 1 and returns[known].std() > 0
    return {
        "rows": int(known.sum()),
        "correlation": [float(np.corrcoef(member[known], returns[known])[0, 1]) for member in v] if enough else [],
        "mean_v": v[:, known].mean(1).tolist() if enough else [None] * len(v),
        "mean_return": float(returns[known].mean()) if enough else None,
        "q_spread_members": float(q.std(0).mean()) if len(q) > 1 else None,
        "q_spread_rows": float(q.std(1).mean()),
    }


# --- evaluation -------------------------------------------------------------------------------------------------


def pair_up(trial: Trial) -> Pairs:
    """The members of policy and guidance that act together: each with each if crossed, else by position.

    Raises: BundleError where their numbers cannot be paired.
    """
    from models import pair_members

    members = range(len(trial.bundle["seeds"]))
    if trial.guidance is None:
        return [(i, None) for i in members]
    count = len(trial.guidance["seeds"])
    if trial.crossed:
        return list(product(members, range(count)))
    return list(enumerate(pair_members(len(members), count)))


def actor(trial: Trial, pairs: Pairs, first: int = 0) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What chooses actions in a trial: observations (pairs, E, O) -> actions (pairs, E, A).

    The noise belongs to the policy's member, so that its pairs differ by guidance alone. first: the first of the E
    episodes, where a trial is played in parts.
    """
    import torch

    from models import Randomness, act, build_guidance, build_policy

    policy = build_policy(trial.bundle, trial.device)
    policy.pick([i for i, _ in pairs])
    guidance = None if trial.guidance is None else build_guidance(trial.guidance, trial.device)
    if guidance is not None:
        guidance.pick([j or 0 for _, j in pairs])
    seeds = [trial.bundle["seeds"][i] for i, _ in pairs]
    part = f" from {first}" if first else ""
    random = Randomness(seeds, f"evaluate {trial.section.seed}{part}", trial.device)

    def choose(observations: NDArray[np.float32]) -> NDArray[np.float32]:
        states = torch.from_numpy(observations).to(trial.device)
        actions: NDArray[np.float32] = act(policy, guidance, states, random, trial.how).cpu().numpy()
        random.step += 1
        return actions

    return choose


AT_ONCE = 150  # rollouts side by side: a PyBullet environment takes 30 MB


def slices(trial: Trial) -> list[tuple[slice, slice]]:
    """A trial's pairs and episodes, so many at a time that at most AT_ONCE rollouts run side by side."""
    count, episodes = len(pair_up(trial)), trial.section.episodes
    long = min(AT_ONCE, episodes)
    many = AT_ONCE // long
    return [
        (slice(i, min(i + many, count)), slice(j, min(j + long, episodes)))
        for i in range(0, count, many)
        for j in range(0, episodes, long)
    ]


def play(trial: Trial, workers: int, title: str = "evaluate") -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Play a trial's episodes: raw returns and lengths, both (pairs, E)."""
    import numpy as np

    from data import EnvironmentSpec, rollout

    pairs, episodes = pair_up(trial), range(trial.section.episodes)
    returns = np.zeros((len(pairs), len(episodes)))
    lengths = np.zeros(returns.shape, dtype=np.int64)  # 0: not played yet
    with progress(title, returns.size) as show:
        for part in slices(trial):
            some, now = pairs[part[0]], episodes[part[1]]
            returns[part], lengths[part] = rollout(
                actor(trial, some, now.start),
                EnvironmentSpec(**trial.bundle["environment"]),
                members=len(some),
                episodes=now,
                seed=trial.section.seed,
                workers=workers,
                progress=lambda done, _: show(int(np.count_nonzero(lengths)) + done, "episodes"),
            )
    return returns, lengths


def summarize(scores: NDArray[np.float64]) -> dict[str, Any]:
    """Statistics of scores, 0 to 100: median, IQR, IQM with a bootstrap 95 % interval, mean, standard deviation.

    scores: (S,) of the members of a policy, or (S, K) with K members of a guidance, nan where there is no such pair.
    IQR and standard deviation as in `spread`; of a single policy member, over those of the guidance.
    Source: interquartile mean and interval as in rliable (arXiv 2108.13264); the interval resamples members.
    """
    import numpy as np
    from scipy import stats

    def interquartile_mean(values: NDArray[np.float64]) -> Any:
        return stats.trim_mean(values, 0.25, axis=-1, nan_policy="omit")

    table = scores.reshape(len(scores), -1)
    table = table[~np.isnan(table).all(1)]
    values = table[~np.isnan(table)]
    interval = None
    if len(table) > 1:
        interval = bootstrap(table, lambda rows, columns: interquartile_mean(flat(draw(table, rows, columns)))).tolist()
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


def spread(table: NDArray[np.float64]) -> tuple[Any, Any]:
    """IQR and standard deviation of pairs of members that share none, in tables of scores (..., S, K): each (...).

    Policy member i is paired with guidance member (i + k) modulo K, and what these S scores show is averaged over
    k = 0 .. K - 1: so crossed members are judged on as many scores at a time, and as independent ones, as members
    paired once. nan is left out. Quartiles are interpolated linearly, as numpy does.
    """
    import warnings

    import numpy as np

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


def bootstrap(table: NDArray[np.float64], statistic: Callable[..., Any]) -> NDArray[np.float64]:
    """95 % percentile bootstrap interval (2, ...) of statistic(rows, columns), for a table of scores (S, K).

    rows (..., S) are members of the policy, drawn with replacement; columns (..., K) likewise of the guidance.
    """
    import warnings

    import numpy as np
    from scipy import stats

    count, width = table.shape

    def of_draws(rows: NDArray[np.int64], *columns: NDArray[np.int64], axis: int) -> Any:
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
    ends: NDArray[np.float64] = np.nanquantile(found.bootstrap_distribution, [0.025, 0.975], axis=-1)
    return ends


def draw(table: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """The scores of drawn members, (..., S, K)."""
    return table[rows[..., :, None], columns[..., None, :]]


def flat(table: NDArray[np.float64]) -> NDArray[np.float64]:
    return table.reshape(*table.shape[:-2], -1)  # (..., S K)


def pick_inference(
    run: Experiment, guidance: Bundle | None, options: dict[str, Any]
) -> tuple[EvaluationSection, Inference]:
    """The evaluation section under the options given, and what it asks of `act`.

    Without a guidance nothing can be ranked, so one candidate is drawn; asking for more is an error.
    """
    from models import Inference

    try:
        section = EvaluationSection.model_validate(run.evaluation.model_dump() | options)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise MdptError(f"{option} {first['input']}: {first['msg'].replace('Input should', 'should')}") from error
    policy, labels = run.policy, run.policy.learns_labels  # a policy that saw none has nothing to weigh
    if labels and section.w != 1 and policy.label_dropout == 0:
        raise MdptError(
            f"w {section.w:g}: this policy learned with label_dropout 0 and knows no noise without a label; "
            "only 1 is possible"
        )
    ranked = guidance is not None and section.guide != "gradient"
    steered = guidance is not None and section.guide != "rank"
    needs = {
        "candidates": (ranked, "--guide rank or both"),
        "selection": (ranked, "--guide rank or both"),
        "weight_temperature": (ranked and section.selection == "softmax", "--selection softmax"),
        "guidance_weight": (steered, "--guide gradient or both"),
        "guide": (guidance is not None, "a guidance"),
        "w": (labels, f"a cfg policy that learned from labels, not {policy.scheme} {policy.algorithm}"),
    }
    for key, (acts, need) in needs.items():
        if key in options and not acts and (key, options[key]) not in (("candidates", 1), ("guide", "rank")):
            problem = f"acts only with {need}; leave the option out"
            if guidance is None and key != "w":
                problem = "there is no guidance to choose by; name one with --infer-guidance, or leave the option out"
            raise MdptError(f"--{key.replace('_', '-')} {options[key]}: {problem}")
    return section, Inference(
        candidates=section.candidates if ranked else 1,
        selection=section.selection,
        weight_temperature=section.weight_temperature,
        temperature=section.temperature,
        w=section.w if labels else 0.0,
        guidance_weight=section.guidance_weight if steered else 0.0,
    )


OWN = "its own"  # the guidance a policy was trained under


@dataclass(frozen=True)
class Trial:
    """A policy bundle, the guidance it acts under, and how: what an evaluation or a cell of a swap needs."""

    path: Path
    bundle: Bundle
    guidance: Bundle | None
    name: str  # of the guidance: its file, OWN or "none"
    section: EvaluationSection
    how: Inference
    device: str
    products: str
    warnings: list[str]
    crossed: bool = False  # every member of the policy with every one of the guidance


def load_trial(path: Path, infer_guidance: str | None, options: dict[str, Any], device: str | None) -> Trial:
    """Read a policy bundle and the guidance asked for: the one inside it, that of another bundle, or "none"."""
    from models import read_guidance, read_policy

    bundle = read_policy(path)
    if infer_guidance is None:
        return prepare(path, bundle, OWN, bundle["guidance"], options, device)
    teacher = None if infer_guidance == "none" else read_guidance(Path(infer_guidance))
    if teacher is not None:
        warn_unfinished(infer_guidance, teacher)
    return prepare(path, bundle, infer_guidance, teacher, options, device)


def warn_unfinished(name: object, bundle: Bundle) -> None:
    if not bundle["complete"]:
        warn(f"{name}: this {bundle['kind']} is unfinished, at step {bundle['step']}")


def prepare(
    path: Path,
    bundle: Bundle,
    name: str,
    guidance: Bundle | None,
    options: dict[str, Any],
    device: str | None,
    *,
    crossed: bool = False,
) -> Trial:
    """A trial of a policy under a guidance. Raises: MdptError and BundleError where it cannot be run."""
    from models import check_fit

    try:
        run = Experiment.model_validate(bundle["experiment"])
    except ValidationError as error:
        raise MdptError(
            f"{path}: was written by mdpt {bundle['versions']['mdpt']}, whose experiments this mdpt does not know; "
            f"use that one\n{_explain(path, error)}"
        ) from error
    section, how = pick_inference(run, guidance, options)
    warnings = check_fit(bundle, guidance) if guidance is not None else []
    for warning in warnings:
        warn(warning)
    name = "none" if guidance is None else name
    trial = Trial(path, bundle, guidance, name, section, how, *pick_device(device or run.device), warnings, crossed)
    pair_up(trial)
    return trial


def evaluate_trial(trial: Trial, workers: int, title: str = "evaluate") -> dict[str, Any]:
    """Everything an evaluation finds, as plain containers."""
    from data import normalized_score

    bundle, data = trial.bundle, trial.bundle["dataset"]
    returns, lengths = play(trial, workers, title)
    scores = normalized_score(returns.mean(1), bundle["reference"])
    return {
        "protocol": protocol(trial),
        "step": bundle["step"],
        "summary": summarize(scores),
        "members": [
            {
                "seed": seed,
                "return": float(returns[i].mean()),
                "score": float(scores[i]),
                "length": float(lengths[i].mean()),
                "returns": returns[i].tolist(),
                "lengths": lengths[i].tolist(),
            }
            for i, seed in enumerate(bundle["seeds"])
        ],
        "dataset": data
        | {f"{kind}_score": float(normalized_score(data[f"{kind}_return"], bundle["reference"])) for kind in KINDS},
        "accounting": bundle["accounting"],
        "versions": bundle["versions"] | {"evaluated_with": version()},
    }


KINDS = ("mean", "best")


def protocol(trial: Trial) -> dict[str, Any]:
    """What an evaluation did, in full."""
    return {
        "policy": str(trial.path),
        "step": trial.bundle["step"],
        "steps": trial.bundle["experiment"]["policy"]["steps"],
        "guidance": guidance_name(trial),
        "guide": trial.section.guide,
        **asdict(trial.how),
        "episodes": trial.section.episodes,
        "seed": trial.section.seed,
        "environment": trial.bundle["environment"]["id"],
        "reference": trial.bundle["reference"],
        "products": trial.products,
        "warnings": trial.warnings,
    }


def guidance_name(trial: Trial) -> str | None:
    """The guidance of a trial in the words of a protocol."""
    if trial.guidance is None:
        return None
    return (
        trial.name if trial.name != OWN else f"{OWN} {trial.guidance['experiment']['guidance']['algorithm']} guidance"
    )


def evaluate_curve(
    path: Path, infer_guidance: str | None, options: dict[str, Any], device: str | None, workers: int
) -> dict[str, Any]:
    """Score every snapshot of a policy: the score over training steps, and the best step, chosen by these scores."""
    from models import read_policy

    steps = list(read_policy(path)["snapshots"])
    if not steps:
        raise MdptError(f"{path}: holds no snapshots yet; go on with `mdpt policy --resume`")
    points = []
    for step in steps:
        trial = load_trial(path.with_name(f"{path.name}@{step}"), infer_guidance, options, device)
        points.append(evaluate_trial(trial, workers, f"evaluate @{step}"))
    best = max(points, key=lambda point: point["summary"]["iqm"])
    return {
        "protocol": protocol(trial) | {"policy": str(path), "step": None},
        "curve": points,
        "best_step": best["step"],
        "accounting": trial.bundle["accounting"],
    }


# --- swapping ---------------------------------------------------------------------------------------------------

MANY_ROLLOUTS = 2_000  # beyond this, members are paired by position unless asked otherwise


def plan_swap(
    policies: Sequence[Path], guidances: Sequence[Path], pairs: str | None, options: dict[str, Any], device: str | None
) -> list[Trial]:
    """Every policy under its own guidance, under none, and under each one named; a name twice counts once.

    guidances: none named means those inside the policies. pairs: "all" crosses the members under a named guidance,
    "matched" pairs them by position; None crosses them as long as that is at most MANY_ROLLOUTS.

    Raises: MdptError before anything runs, naming the files, if they cannot be put together or compared.
    """
    from models import BundleError, read_guidance, read_policy

    bundles = {path: read_policy(path) for path in policies}
    named: dict[Path, Bundle] = {path: read_guidance(path) for path in guidances}
    for path, bundle in bundles.items() if not guidances else ():
        inner = bundle["guidance"]
        if inner is not None and not any(same_weights(inner, other) for other in named.values()):
            named[path] = inner
    if not named:
        raise MdptError(f"{', '.join(map(str, bundles))}: no guidance inside; name one with --guidance FILE")
    for path, bundle in (*bundles.items(), *named.items()):
        warn_unfinished(path, bundle)
    bare = {key: value for key, value in options.items() if key in ("episodes", "temperature", "seed")}
    trials: list[Trial] = []
    for path, bundle in bundles.items():
        if bundle["guidance"] is not None:
            trials.append(prepare(path, bundle, OWN, bundle["guidance"], options, device))
        trials.append(prepare(path, bundle, "none", None, bare, device))
        for name, guidance in named.items():
            try:
                trial = prepare(path, bundle, str(name), guidance, options, device, crossed=pairs != "matched")
            except BundleError as error:
                raise MdptError(f"{path}, {name}: {error}") from error
            check_comparable(trials, trial)
            trials.append(trial)
    if pairs is None and count_rollouts(trials) > MANY_ROLLOUTS:
        alike = [len(trial.guidance["seeds"]) in (1, len(trial.bundle["seeds"])) for trial in trials if trial.guidance]
        if all(alike):
            trials = [replace(trial, crossed=False) for trial in trials]
    return trials


def check_comparable(trials: Sequence[Trial], trial: Trial) -> None:
    """Raises: MdptError where the scores of a trial could not stand beside those of the others."""
    first = next((other for other in trials if other.guidance is not None), trial)
    ours, theirs = (
        other.section.model_dump(exclude={"w"}) | {"reference": list(other.bundle["reference"])}
        for other in (first, trial)
    )
    if differing := [f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
        raise MdptError(
            f"{first.path} and {trial.path} are not tried alike: {'; '.join(differing)}; "
            "evaluate them apart, or give the options that make them equal"
        )


def count_rollouts(trials: Sequence[Trial]) -> int:
    return sum(len(pair_up(trial)) * trial.section.episodes for trial in trials)


def play_cell(trial: Trial, workers: int, title: str) -> dict[str, Any]:
    """A policy under a guidance: which they are, and score, returns and lengths of every pair of members."""
    from data import normalized_score

    returns, lengths = play(trial, workers, title)
    scores = normalized_score(returns.mean(1), trial.bundle["reference"])
    teacher = trial.guidance
    return {
        "policy": str(trial.path),
        "guidance": trial.name,
        "algorithm": trial.bundle["experiment"]["policy"]["algorithm"],
        "guidance_algorithm": None if teacher is None else teacher["experiment"]["guidance"]["algorithm"],
        "warnings": trial.warnings,
        "protocol": protocol(trial),
        "pairs": [
            {
                "policy_member": i,
                "policy_seed": trial.bundle["seeds"][i],
                "guidance_seed": None if teacher is None or j is None else teacher["seeds"][j],
                "score": float(scores[row]),
                "returns": returns[row].tolist(),
                "lengths": lengths[row].tolist(),
            }
            for row, (i, j) in enumerate(pair_up(trial))
        ],
    }


def compare(own: NDArray[np.float64], swapped: NDArray[np.float64]) -> dict[str, Any]:
    """How scores change against those under the guidance of training.

    own: (S,), the baseline of each policy member. swapped: (S, K), that member's scores under other guidance members,
    nan where there is none. Changes of median, IQR and standard deviation (as in `spread`) are swapped minus own, in
    points of score; iqr_percent is 100 (IQR swapped - IQR own) / IQR own; improvement is the probability that a swapped
    score beats an own one, ties counting half (arXiv 2108.13264). Intervals as in `bootstrap`; a policy member's own
    and swapped scores are drawn together.
    """
    import numpy as np

    def changes(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        mine, drawn = own[rows], draw(swapped, rows, columns)  # (..., S), (..., S, K)
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


def judge_swap(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each (policy, guidance) says: statistics over pairs of members, and changes against the baseline.

    The baseline is the policy under its own guidance, or under none if it was trained unguided. Pairs are told apart
    by whether policy and guidance grew from the same seed.
    """
    import numpy as np

    baselines = {cell["policy"]: cell for name in ("none", OWN) for cell in cells if cell["guidance"] == name}
    found = []
    for cell in cells:
        baseline = baselines[cell["policy"]]
        own = np.array([pair["score"] for pair in baseline["pairs"]])
        for group, pairs in seed_groups(cell["pairs"]).items():
            table = tabulate(pairs, len(own))
            complete = cell is not baseline and not np.isnan(table).all(1).any()  # every policy member has a pair
            found.append(
                {
                    **{key: cell[key] for key in ("policy", "guidance", "warnings")},
                    "seeds": group,
                    "pairs": len(pairs),
                    "summary": summarize(table),
                    "change": compare(own, table) if complete else None,
                }
            )
    return found


def tabulate(pairs: Sequence[dict[str, Any]], members: int) -> NDArray[np.float64]:
    """Scores by policy member and guidance seed, (S, K), nan where there is no such pair.

    Where members are paired one to one, K = 1: they are drawn as pairs, not apart.
    """
    import numpy as np

    columns = list(dict.fromkeys(pair["guidance_seed"] for pair in pairs))
    table = np.full((members, len(columns)), np.nan)
    for pair in pairs:
        table[pair["policy_member"], columns.index(pair["guidance_seed"])] = pair["score"]
    known = ~np.isnan(table)
    return table if known.sum(1).max() > 1 else np.where(known.any(1), np.nansum(table, 1), np.nan)[:, None]


def seed_groups(pairs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Pairs grown from the same seed, from different ones, and all, where these differ."""
    same = [pair for pair in pairs if pair["guidance_seed"] == pair["policy_seed"]]
    other = [pair for pair in pairs if pair["guidance_seed"] not in (None, pair["policy_seed"])]
    groups = {name: chosen for name, chosen in (("same seed", same), ("other seeds", other)) if chosen}
    return groups if len(groups) == 1 else groups | {"all": list(pairs)}


def judge_algorithms(cells: Sequence[dict[str, Any]]) -> list[str]:
    """For each policy under a guidance of another algorithm than its own: how it compares with the stronger of the two.

    The two are the policy under its own guidance, and the best other policy here whose own guidance is of the
    swapped-in algorithm; where there is none, the policy's own guidance is all there is to compare with.
    """
    import numpy as np

    def median(cell: dict[str, Any]) -> float:
        return float(np.median([pair["score"] for pair in cell["pairs"]]))

    home = {cell["policy"]: cell for cell in cells if cell["guidance"] == OWN}
    lines = []
    for cell in cells:
        algorithm, mine = cell["guidance_algorithm"], home.get(cell["policy"])
        if mine is None or algorithm in (None, mine["guidance_algorithm"]):
            continue
        others = [other for other in home.values() if other["guidance_algorithm"] == algorithm]
        stronger = max([mine, *others], key=median)
        value, best = median(cell), median(stronger)
        against = "the stronger of the two" if others else f"itself alone (no policy here grew under {algorithm})"
        lines.append(
            f"{cell['policy']} under {cell['guidance']} ({algorithm}){' *' if cell['warnings'] else ''}: median "
            f"{value:.1f}, compared with {against}, {stronger['policy']} under its own guidance: {best:.1f} "
            f"({value - best:+.1f})"
        )
    return lines


def estimate_seconds(trials: Sequence[Trial], workers: int) -> float:
    """How long the trials take if every episode runs its full length: a few steps of each are timed."""
    import numpy as np

    from data import EnvironmentSpec, step_seconds

    spec = EnvironmentSpec(**trials[0].bundle["environment"])
    each, seconds = step_seconds(spec), 0.0
    for trial in trials:
        pairs = pair_up(trial)
        members, episodes = (part.stop for part in slices(trial)[0])
        choose = actor(trial, pairs[:members])
        observations = np.zeros((members, episodes, spec.observation_dim), dtype=np.float32)
        choose(observations)  # the first call is slower
        began = time.perf_counter()
        choose(observations)
        together = members * episodes
        once = time.perf_counter() - began + each * math.ceil(together / workers)
        seconds += once * len(pairs) * trial.section.episodes / together
    return spec.max_episode_steps * seconds


def forecast_swap(trials: Sequence[Trial], pairs: str | None, workers: int, file: Path | None) -> str:
    """What is about to be played, how members are paired and why, how long it may take, and what Ctrl-C leaves."""
    kind = "each member with each"
    if not any(trial.crossed for trial in trials):
        why = f" (each with each: more than {MANY_ROLLOUTS}, for --pairs all)" if pairs is None else ""
        kind = f"members paired by position{why}"
    minutes = estimate_seconds(trials, workers) / 60
    return (
        f"{len(trials)} cells, {kind}: {count_rollouts(trials)} rollouts, "
        f"about {minutes:.1f} min if every episode runs its full length"
        + (f"; {file} keeps each finished cell, and the same command goes on" if file else "")
    )


def begin_swap(trials: Sequence[Trial], file: Path | None, overwrite: bool) -> dict[str, Any]:
    """The report of a swap without cells yet, or with those that a run cut short has stored in the file.

    overwrite: begin anew where the file holds something else, or a swap of other bundles or with other options.

    Raises: MdptError in that case without overwrite.
    """
    report: dict[str, Any] = {
        "settings": {
            "bundles": {name: digest(Path(name)) for name in sorted(bundle_files(trials))},
            "cells": [[str(trial.path), trial.name, trial.crossed] for trial in trials],
            "evaluation": [trial.section.model_dump() for trial in trials],
            "device": [trials[0].device, trials[0].products],
            "version": version(),
        },
        "cells": [],
    }
    if file is None or not file.exists():
        return report
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        settings, cells = stored["settings"], stored["cells"]
        changed = [name for name, value in report["settings"].items() if settings.get(name) != value]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        problem = "exists already and is no swap; choose another name, or --overwrite to replace it"
    else:
        if not changed:
            return report | {"cells": cells}
        problem = (
            f"holds a swap with other {', '.join(changed)}; repeat its options to go on, "
            "choose another name, or --overwrite to begin anew"
        )
    if overwrite:
        return report
    raise MdptError(f"{file}: {problem}")


def bundle_files(trials: Sequence[Trial]) -> set[str]:
    """The files, without @STEP, that a swap reads."""
    names = {str(trial.path) for trial in trials} | {trial.name for trial in trials} - {OWN, "none"}
    return {name if Path(name).exists() else name.rpartition("@")[0] for name in names}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reports ----------------------------------------------------------------------------------------------------


def version() -> str:
    """The installed version; pyproject.toml is its only source."""
    return installed_version("mdpt")


def make_console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def say(text: str) -> None:
    make_console().print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    make_console(stderr=True).print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)


def show_table(table: Table) -> None:
    """Print a table under its title and over its caption, which may be wider than the table."""
    title, caption, table.title, table.caption = table.title, table.caption, None, None
    say(str(title))
    console = make_console()  # figures are never cut to fit: a narrow terminal wraps the lines
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    if caption is not None:
        say(str(caption))


def make_table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def quality_table(bundle: Bundle) -> Table:
    """Held-out judgement of a guidance."""
    quality = bundle["quality"]
    rule = bundle["reward_scale"]["rule"]
    title = f"guidance on {quality['rows']} held-out transitions (values in rewards scaled by '{rule}')"
    table = make_table(title, "seed", "corr(V, MC return)", "mean V", "mean MC return")
    for i, seed in enumerate(bundle["seeds"]):
        correlation = quality["correlation"][i] if quality["correlation"] else None
        table.add_row(
            str(seed), number(correlation, 3), number(quality["mean_v"][i], 2), number(quality["mean_return"], 2)
        )
    spread = number(quality["q_spread_members"], 3)
    table.caption = f"spread of Q between members {spread}, between transitions {quality['q_spread_rows']:.3f}"
    return table


def score_table(report: dict[str, Any]) -> Table:
    """An evaluation: per member, over members, and the dataset on the same scale; the protocol is its caption."""
    table = make_table("scores (0 to 100 between the reference returns)", "seed", "return", "score", "length")
    for member in report["members"]:
        table.add_row(
            str(member["seed"]), number(member["return"]), number(member["score"]), number(member["length"], 0)
        )
    table.add_section()
    for name, text in summary_cells(report["summary"]).items():
        table.add_row(name, "", text, "")
    table.add_section()
    for kind in KINDS:
        data = report["dataset"]
        table.add_row(f"data {kind}", number(data[f"{kind}_return"]), number(data[f"{kind}_score"]), "")
    return table


def curve_table(report: dict[str, Any]) -> Table:
    """Scores over training steps."""
    columns = summary_cells(report["curve"][0]["summary"])
    table = make_table("score over training steps (0 to 100)", "step", *columns, "")
    last = report["curve"][-1]["step"]
    for point in report["curve"]:
        note = "best (online selection)" if point["step"] == report["best_step"] else ""
        note = ", ".join(filter(None, [note, "last" if point["step"] == last else ""]))
        table.add_row(str(point["step"]), *summary_cells(point["summary"]).values(), note)
    return table


def swap_tables(report: dict[str, Any]) -> Iterator[Table]:
    """Scores over pairs of members, and their change against the guidance of training."""
    scores = make_table("scores (0 to 100), statistics over pairs of members", "policy", "guidance", "seeds", "pairs")
    for column in ("median", "IQR", "IQM", "IQM 95 %", "mean", "std"):
        scores.add_column(column, justify="right")
    columns = ("median, 95 %", "IQR, 95 %", "IQR in %", "std, 95 %", "P(better), 95 %")
    changes = make_table("change against the policy's own guidance (or none)", "policy", "guidance", "seeds", *columns)
    for entry in report["summary"]:
        name = [entry["policy"], entry["guidance"] + (" *" if entry["warnings"] else ""), entry["seeds"]]
        scores.add_row(*name, str(entry["pairs"]), *summary_cells(entry["summary"]).values())
        if (change := entry["change"]) is not None:
            changes.add_row(*name, *change_cells(change))
    if any(entry["warnings"] for entry in report["summary"]):
        scores.caption = "* this guidance saw other data than the policy: the paper's guarantee does not hold there"
    yield scores
    yield changes


def change_cells(change: dict[str, Any]) -> list[str]:
    """A row of the table of changes; a single member has neither spread nor interval."""
    if "intervals" not in change:
        return [f"{change['median']:+.1f}", "-", "-", "-", "-"]
    cells = {
        key: f"{change[key]:{form}} ({low:{form}} .. {high:{form}})"
        for key, (low, high) in change["intervals"].items()
        for form in [".2f" if key == "improvement" else "+.1f"]
    }
    percent = "-" if change["iqr_percent"] is None else f"{change['iqr_percent']:+.0f} %"
    return [cells["median"], cells["iqr"], percent, cells["std"], cells["improvement"]]


def member_table(cell: dict[str, Any]) -> Table:
    """Scores of each policy member under each guidance member."""
    columns = list(dict.fromkeys(pair["guidance_seed"] for pair in cell["pairs"]))
    table = make_table(
        f"{cell['policy']} under {cell['guidance']}", "policy", *(f"guidance {seed}" for seed in columns)
    )
    for member in dict.fromkeys((pair["policy_member"], pair["policy_seed"]) for pair in cell["pairs"]):
        found = {pair["guidance_seed"]: pair["score"] for pair in cell["pairs"] if pair["policy_member"] == member[0]}
        table.add_row(str(member[1]), *(number(found.get(seed)) for seed in columns))
    return table


def summary_cells(summary: dict[str, Any]) -> dict[str, str]:
    interval = summary["iqm_interval"]
    return {
        "median": number(summary["median"]),
        "IQR": number(summary["iqr"]),
        "IQM": number(summary["iqm"]),
        "IQM 95 %": "-" if interval is None else f"{interval[0]:.1f} .. {interval[1]:.1f}",
        "mean": number(summary["mean"]),
        "std": number(summary["std"]),
    }


def protocol_line(how: dict[str, Any], members: int | str) -> str:
    """The protocol of an evaluation in one line."""
    parts = [f"{how['environment']}, {members} members x {how['episodes']} episodes, seed {how['seed']}"]
    if how["guidance"] is None:
        parts.append("ranked by none, 1 candidate")
    elif how["guide"] != "gradient":
        softmax = f" at inverse temperature {how['weight_temperature']:g}" if how["selection"] == "softmax" else ""
        parts.append(f"{how['selection']}{softmax} of {how['candidates']} by {how['guidance']}")
    if how["guidance_weight"] > 0:
        parts.append(f"{how['guidance_weight']:g} x gradient of {how['guidance']}")
    if how["w"] > 0:
        parts.append(f"w {how['w']:g}")
    parts.append(f"temperature {how['temperature']:g}")
    if how["step"] is not None:
        early = f"weights of step {how['step']} of {how['steps']} (online selection, if chosen by score)"
        parts.append("last weights" if how["step"] == how["steps"] else early)
    parts += [f"{how['products']} products"] if how["products"] != "default" else []
    return ", ".join(parts)


def swap_line(report: dict[str, Any]) -> str:
    """The protocol that the guided cells of a swap share, in one line."""
    cells = [cell for cell in report["cells"] if cell["guidance"] != "none"]
    weights = {cell["protocol"]["w"] for cell in report["cells"]} - {0}
    how = cells[0]["protocol"] | {"guidance": "each guidance", "step": None, "w": 0}
    members = {len({pair["policy_member"] for pair in cell["pairs"]}) for cell in cells}
    line = protocol_line(how, " or ".join(map(str, sorted(members)))) + "; under none 1 candidate"
    return line + (f"; w of cfg policies {' or '.join(f'{w:g}' for w in sorted(weights))}" if weights else "")


# --- pictures and film ------------------------------------------------------------------------------------------

INK, SHADE = "black", "0.75"  # pictures read alike in black and white, and by colour-blind people
MARKERS = "osD^vP*X"
PICTURES = (".png", ".svg", ".pdf")


@contextmanager
def picture(path: Path, title: str, width: float, height: float) -> Iterator[Figure]:
    """A figure under a title, written as PNG, SVG or PDF by the ending of `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(width * 14)), fontsize=9)
    yield figure
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise MdptError(f"--plot {path}: cannot be written ({error.strerror})") from error
    say(f"wrote {path}")


def check_ending(option: str, path: Path | None, endings: Sequence[str]) -> None:
    if path is not None and path.suffix not in endings:
        *others, last = endings
        raise MdptError(f"{option} {path}: expected a {', '.join(others)}{' or ' if others else ''}{last} file")


def draw_dataset(axes: Axes, dataset: dict[str, Any]) -> None:
    for kind, style in zip(KINDS, (":", "--"), strict=True):
        axes.axhline(dataset[f"{kind}_score"], color="0.5", linestyle=style, label=f"dataset {kind}")


def draw_legend(figure: Figure) -> None:
    columns = max(1, int(figure.get_figwidth() / 2.2))  # inches, enough for a bundle's name
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def plot_scores(path: Path, report: dict[str, Any]) -> None:
    """Score of each member, an episode a dot, beside the median of members and the dataset."""
    import numpy as np

    from data import normalized_score

    members, reference = report["members"], report["protocol"]["reference"]
    title = f"{report['protocol']['policy']}: {protocol_line(report['protocol'], len(members))}"
    with picture(path, title, 7, 4.5) as figure:
        axes = figure.add_subplot()
        for x, member in enumerate(members):
            episodes = normalized_score(np.array(member["returns"]), reference)
            axes.plot(np.full(len(episodes), x), episodes, ".", color=SHADE, label=None if x else "episode")
            axes.plot(x, member["score"], "D", color=INK, label=None if x else "member (mean of its episodes)")
        axes.axhline(report["summary"]["median"], color=INK, linewidth=1, label="median of members")
        draw_dataset(axes, report["dataset"])
        axes.set_xticks(range(len(members)), [str(member["seed"]) for member in members])
        axes.set(xlabel="seed", ylabel="normalized score")
        draw_legend(figure)


def plot_curve(path: Path, report: dict[str, Any]) -> None:
    """Score over training steps: members, their median, the interquartile range, the dataset."""
    import numpy as np

    curve = report["curve"]
    steps = [point["step"] for point in curve]
    scores = np.array([[member["score"] for member in point["members"]] for point in curve])  # (steps, S)
    title = f"{report['protocol']['policy']}: {protocol_line(report['protocol'], scores.shape[1])}"
    with picture(path, title, 7, 4.5) as figure:
        axes = figure.add_subplot()
        axes.plot(steps, scores, color=SHADE, linewidth=1)
        axes.plot(steps, np.median(scores, 1), color=INK, marker="o", label="median of members")
        low, high = np.percentile(scores, [25, 75], axis=1)
        axes.fill_between(steps, low, high, color="0.9", label="interquartile range")
        draw_dataset(axes, curve[0]["dataset"])
        axes.set(xlabel="gradient steps", ylabel="normalized score")
        draw_legend(figure)


def plot_history(path: Path, bundle: Bundle, name: Path) -> None:
    """Training history of a bundle: each metric over gradient steps, members and their mean."""
    import numpy as np

    history, section = bundle["history"], bundle["experiment"][bundle["kind"]]
    names = metric_names(history)
    rows = math.ceil(len(names) / 2)
    title = (
        f"{name}: training of {section['algorithm']} {bundle['kind']} on {bundle['environment']['id']}, "
        f"{len(bundle['seeds'])} members (grey) and their mean"
    )
    with picture(path, title, 8, 0.8 + 2 * rows) as figure:
        for place, key in enumerate(names, start=1):
            axes = figure.add_subplot(rows, 2, place)
            entries = [entry for entry in history if key in entry]
            steps = [entry["step"] for entry in entries]
            values = np.array([entry[key] for entry in entries])
            axes.plot(steps, values, color=SHADE, linewidth=0.8)
            axes.plot(steps, values.mean(1), color=INK, linewidth=1.2)
            axes.set(xlabel="gradient steps" if place > len(names) - 2 else "", ylabel=key)


def plot_swap(path: Path, report: dict[str, Any]) -> None:
    """The matrix of medians with their IQR, policies by guidances, and every pair's score as a dot over box plots."""
    import numpy as np

    cells = {(cell["policy"], cell["guidance"]): cell for cell in report["cells"]}
    policies = list(dict.fromkeys(policy for policy, _ in cells))
    guidances = list(dict.fromkeys(guidance for _, guidance in cells))
    scores = {key: np.array([pair["score"] for pair in cell["pairs"]]) for key, cell in cells.items()}
    found = {(entry["policy"], entry["guidance"]): entry["summary"] for entry in report["summary"]}  # the last: all
    middle = np.array([[found[p, g]["median"] if (p, g) in found else np.nan for g in guidances] for p in policies])
    heights = 1 + 0.45 * len(policies), 3.2
    with picture(path, swap_line(report), 2 + 1.5 * len(guidances), sum(heights) + 0.5) as figure:
        matrix, boxes = figure.subplots(2, 1, height_ratios=heights)
        matrix.imshow(middle, cmap="cividis", aspect="auto")
        middling = (np.nanmin(middle) + np.nanmax(middle)) / 2
        for (row, p), (column, g) in product(enumerate(policies), enumerate(guidances)):
            if (p, g) in scores:
                mark = " *" if cells[p, g]["warnings"] else ""
                text = f"{middle[row, column]:.1f}{mark}\nIQR {found[p, g]['iqr']:.1f}"
                ink = "black" if middle[row, column] > middling else "white"
                matrix.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
        columns, lines = ([textwrap.fill(name, 20) for name in names] for names in (guidances, policies))
        matrix.set_xticks(range(len(guidances)), columns, fontsize=8)
        matrix.set_yticks(range(len(policies)), lines, fontsize=8)
        star = "; *: other data" if any(cell["warnings"] for cell in report["cells"]) else ""
        matrix.set_title(f"median score (IQR) by policy and guidance{star}", fontsize=8)
        wide = 0.8 / len(policies)
        for (row, p), (column, g) in product(enumerate(policies), enumerate(guidances)):
            if (values := scores.get((p, g))) is not None:
                x = column - 0.4 + wide * (row + 0.5)
                boxes.boxplot(values, positions=[x], widths=wide * 0.8, showfliers=False, medianprops={"color": INK})
                spread = x + np.linspace(-0.25, 0.25, len(values)) * wide
                marker = MARKERS[row % len(MARKERS)]
                label = p if g == "none" else None
                boxes.plot(spread, values, marker, color="0.4", markersize=3, markerfacecolor="white", label=label)
        boxes.set_xticks(range(len(guidances)), columns, fontsize=8)
        boxes.set_title("score of every pair of members", fontsize=8)
        boxes.set(ylabel="normalized score")
        draw_legend(figure)


FRAME_EVERY = 3  # steps: at the 60 per second of PyBullet, 20 frames per second


def film(trial: Trial, seed: int | None, path: Path) -> None:
    """Play one episode of the member with this seed (None: the first) and write it as a GIF, figures in each frame."""
    import numpy as np
    from PIL import Image, ImageDraw

    from data import EnvironmentSpec, film_episode, normalized_score

    seeds = trial.bundle["seeds"]
    if seed is not None and seed not in seeds:
        raise MdptError(f"--member {seed}: the seeds in {trial.path} are {', '.join(map(str, seeds))}")
    member = 0 if seed is None else seeds.index(seed)
    choose, spec = actor(trial, [pair_up(trial)[member]]), EnvironmentSpec(**trial.bundle["environment"])

    def act(observation: NDArray[np.float32]) -> NDArray[np.float32]:
        action: NDArray[np.float32] = choose(observation[None, None])[0, 0]
        return action

    frames = []
    with progress("film", spec.max_episode_steps) as show:
        for step, total, pixels in film_episode(act, spec, seed=trial.section.seed, every=FRAME_EVERY):
            frame = Image.fromarray(pixels)
            score = float(normalized_score(np.array(total), trial.bundle["reference"]))
            text = f"return {total:.1f}, score {score:.1f}"
            label = f"seed {seeds[member]}, step {step}\n{text}"
            ImageDraw.Draw(frame).text((6, 4), label, fill="white", stroke_width=1, stroke_fill="black", font_size=14)
            frames.append(frame)
            show(step, text)
    try:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, loop=0)
    except OSError as error:
        raise MdptError(f"--video {path}: cannot be written ({error.strerror})") from error
    say(f"wrote {path}")


NAMED_APART = ("algorithm", "scheme", "steps", "snapshots")  # settings with a line of their own


def describe(bundle: Bundle, path: Path) -> Iterator[Table]:
    """What a bundle is: experiment, lineage, data, cost, training history."""
    while bundle is not None:
        section = bundle["experiment"][bundle["kind"]]
        history = bundle["history"]  # none: the guidance of a joint run, which took the policy's steps
        pace = section if history else bundle["experiment"]["policy"]
        settings = section | {"batch_size": pace["batch_size"]}
        data, account = bundle["dataset"], bundle["accounting"]
        table = make_table(f"{path}: {bundle['kind']}", "what", "value")
        facts = {
            "algorithm": section["algorithm"] + (f", {section['scheme']}" if "scheme" in section else ""),
            "experiment": bundle["experiment"]["name"],
            "seeds": ", ".join(map(str, bundle["seeds"])),
            "settings": textwrap.fill(
                ", ".join(f"{key}={settings[key]}" for key in settings if key not in NAMED_APART), 80
            ),
            "steps": f"{bundle['step']} of {pace['steps']}" + ("" if bundle["complete"] else " (unfinished)"),
            "snapshots": "".join(f"@{step}, " for step in bundle["snapshots"]) + "@last",
            "environment": f"{bundle['environment']['id']}, O {bundle['environment']['observation_dim']}, "
            f"A {bundle['environment']['action_dim']}",
            "data": f"{data['source']} {data['name']}, {data['transitions']} transitions, {data['episodes']} episodes",
            "data hash": data["hash"][:16],
            "reward scale": f"{bundle['reward_scale']['rule']}, x {bundle['reward_scale']['multiplier']:.4g}",
            "training cost": account_line(account),
            "versions": ", ".join(f"{name} {text}" for name, text in bundle["versions"].items()),
            "trained under": describe_guidance(bundle["guidance"]) if bundle["kind"] == "policy" else "data alone",
        }
        if bundle["kind"] == "policy":
            facts["best snapshot"] = "for evaluate --curve to tell (online selection)"
        for name, text in facts.items():
            table.add_row(name, text)
        table.columns[1].justify, table.columns[1].no_wrap = "left", False
        yield table
        if not history:
            return
        names = metric_names(history)
        log = make_table("training history, mean over members", "step", *names)
        for entry in [*history[: -1 : max(1, len(history) // 10)], history[-1]]:
            log.add_row(str(entry["step"]), *(f"{sum(v) / len(v):.4g}" if (v := entry.get(n)) else "-" for n in names))
        yield log
        bundle = bundle["guidance"]


def show_bundle(path: Path, plot_file: Path | None) -> None:
    """Describe a bundle, and draw its training history if asked to."""
    from models import read_bundle

    bundle = read_bundle(path)
    for table in describe(bundle, path):
        show_table(table)
    if plot_file is not None:
        plot_history(plot_file, bundle, path)


def metric_names(history: Sequence[dict[str, Any]]) -> list[str]:
    """All metrics of a training history; some end or begin with the guidance."""
    return list(dict.fromkeys(name for entry in history for name in entry if name != "step"))


def account_line(account: dict[str, Any]) -> str:
    """What a training run cost, all members together."""
    return (
        f"{account['parameters_trained']:,} parameters trained of {account['parameters_held']:,} held, "
        f"optimizer {account['optimizer_bytes'] / 2**20:.1f} MiB, "
        f"peak {account['peak_bytes'] / 2**20:.1f} MiB above the data, "
        f"{account['seconds']:.1f} s on {account['device']} ({account['products']} products), {account['seconds_per_1000_steps']:.2f} s per 1,000 steps"
    )


def describe_guidance(bundle: Bundle | None) -> str:
    if bundle is None:
        return "no guidance"
    seeds = ", ".join(map(str, bundle["seeds"]))
    return f"{bundle['experiment']['guidance']['algorithm']} guidance, step {bundle['step']}, seeds {seeds}"


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if asked for, whole or not at all."""
    if path is not None:
        store_json(path, report)
        say(f"wrote {path}")


def store_json(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise MdptError(f"--json {path}: cannot be written ({error.strerror})") from error


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    if not path.absolute().parent.is_dir():
        raise MdptError(f"{path}: there is no folder {path.parent}; make it or choose another")
    if path.exists() and not overwrite:
        raise MdptError(f"{path}: exists already; choose another name, or --overwrite to replace it")


# --- commands ---------------------------------------------------------------------------------------------------


SPINS = "3000"  # turns a thread waits awake: the default, 300,000 and more, starves any other run on the same cores


class Commands(TyperGroup):
    """Turns a user's mistake into one line on stderr and exit code 1."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if "OMP_WAIT_POLICY" not in os.environ:  # read when torch loads
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except (MdptError, typer.TyperException) as error:
            code = _fail(error)
        except typer.Abort:
            print("mdpt: interrupted", file=sys.stderr)
            code = 130
        except Exception as error:
            from data import DataError
            from models import BundleError

            if out_of_memory(error):
                error = MdptError("not enough memory; lower batch_size, hidden, candidates, or the number of seeds")
            elif not isinstance(error, DataError | BundleError):
                raise
            code = _fail(error)
        sys.exit(code if isinstance(code, int) else 0)


def out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on CUDA, or torch on a CPU (a plain RuntimeError) says so."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate" in str(error)


def _fail(error: Exception) -> int:
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    print(f"mdpt: {text}", file=sys.stderr)
    return 1


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def need_tensorboard(folder: Path | None) -> Path | None:
    if folder is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise MdptError("--tensorboard needs the package tensorboard: pip install 'mdpt[tensorboard]'") from error
    return folder


ExperimentFile = Annotated[Path, typer.Argument(help="experiment file, TOML")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="table.key=value, over the file; repeatable")]
Seeds = Annotated[str | None, typer.Option(help="such as 0,1,2: one member each")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda")]
Out = Annotated[Path | None, typer.Option(help="bundle to write; named after the experiment by default")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace files that exist")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an unfinished bundle")]
Board = Annotated[
    Path | None,
    typer.Option("--tensorboard", help="folder for the training history, as it grows", callback=need_tensorboard),
]
Workers = Annotated[int, typer.Option(min=1, help="processes that simulate; changes no result")]
Json = Annotated[Path | None, typer.Option("--json", help="write all figures, each episode's return included")]
Episodes = Annotated[int | None, typer.Option(help="episodes per member")]
Candidates = Annotated[int | None, typer.Option(help="actions drawn per state")]
Selection = Annotated[str | None, typer.Option(help="max, or softmax")]
WeightTemperature = Annotated[float | None, typer.Option(help="inverse temperature of the softmax")]
Temperature = Annotated[float | None, typer.Option(help="scale of the sampling noise")]
W = Annotated[float | None, typer.Option("--w", help="classifier-free guidance weight, for cfg")]
Guide = Annotated[str | None, typer.Option(help="rank, gradient or both")]
GuidanceWeight = Annotated[float | None, typer.Option(help="weight of the gradient, for gradient and both")]
Plot = Annotated[Path | None, typer.Option("--plot", help="draw it: .png, .svg or .pdf")]
EvaluationSeed = Annotated[int | None, typer.Option("--seed", help="of start states and sampling noise")]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.callback(invoke_without_command=True)
def mdpt(
    context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    """Diffusion policies for offline RL, guidance and policy as separate, swappable modules."""
    if show_version:
        say(f"mdpt {version()}")
    elif context.invoked_subcommand is None:
        say(context.get_help())


@app.command()
def guidance(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    seeds: Seeds = None,
    device: Device = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    board: Board = None,
    workers: Workers = CORES,
) -> None:
    """Train a guidance, from the data alone."""
    run = load_experiment(experiment, overrides or [], seeds, device)
    path = out or Path(f"{run.name}-{run.guidance.algorithm}.guidance.pt")
    bundle = train_guidance(run, path, unfinished(path, board, overwrite, resume), workers, board)
    if "q_spread_rows" in bundle["quality"]:
        show_table(quality_table(bundle))
    same = [part for override in overrides or [] for part in ("--set", override)] + (
        ["--seeds", seeds] if seeds else []
    )
    command = ["mdpt", "policy", str(experiment), "--guidance", str(path), *same]
    say(f"wrote {path}\nnext: {shlex.join(command)}")


@app.command()
def policy(
    experiment: ExperimentFile,
    teacher: Annotated[
        Path | None, typer.Option("--guidance", help="frozen guidance, or a policy that holds one")
    ] = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    device: Device = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    board: Board = None,
    workers: Workers = CORES,
) -> None:
    """Train a diffusion policy under a frozen guidance."""
    from models import read_guidance

    run = load_experiment(experiment, overrides or [], seeds, device)
    scheme = run.policy.scheme
    if scheme == "guidance-first" and teacher is None:
        raise MdptError(
            "scheme guidance-first needs --guidance FILE, written by `mdpt guidance`; "
            "without one, --set policy.scheme=joint or =unguided"
        )
    if scheme != "guidance-first" and teacher is not None:
        raise MdptError(f"scheme {scheme} takes no --guidance; leave it out, or --set policy.scheme=guidance-first")
    suffix = "" if scheme == "guidance-first" else f"-{scheme}"
    path = out or Path(f"{run.name}-{run.policy.algorithm}{suffix}.policy.pt")
    frozen = read_guidance(teacher) if teacher else None
    if frozen is not None:
        warn_unfinished(teacher, frozen)
    train_policy(run, frozen, path, unfinished(path, board, overwrite, resume), workers, board)
    say(f"wrote {path}\nnext: {shlex.join(['mdpt', 'evaluate', str(path)])}")


@app.command()
def evaluate(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="policy bundle; with --describe also a guidance bundle")],
    infer_guidance: Annotated[
        str | None, typer.Option(help="bundle whose guidance ranks, or none; default: the one inside the policy's")
    ] = None,
    episodes: Episodes = None,
    candidates: Candidates = None,
    selection: Selection = None,
    weight_temperature: WeightTemperature = None,
    temperature: Temperature = None,
    w: W = None,
    guide: Guide = None,
    guidance_weight: GuidanceWeight = None,
    seed: EvaluationSeed = None,
    device: Device = None,
    json_file: Json = None,
    curve: Annotated[bool, typer.Option("--curve", help="score every snapshot")] = False,
    plot_file: Plot = None,
    video: Annotated[Path | None, typer.Option(help="film one episode, .gif, instead of scoring")] = None,
    member: Annotated[int | None, typer.Option(help="seed of the member to film; default: the first")] = None,
    overwrite: Overwrite = False,
    describe_only: Annotated[bool, typer.Option("--describe", help="say what the bundle is; run nothing")] = False,
    workers: Workers = CORES,
) -> None:
    """Score a policy in its environment, its candidates ranked by a guidance."""
    check_ending("--plot", plot_file, PICTURES)
    options = given_options(context)
    if describe_only and (curve or json_file or infer_guidance or options):
        raise MdptError("--describe runs nothing and writes no scores; it goes with --plot alone")
    if video is not None and (curve or describe_only or json_file or plot_file or "episodes" in options):
        raise MdptError(
            "--video films one episode and does nothing else; leave out --curve, --describe, --episodes, --json, --plot"
        )
    check_ending("--video", video, [".gif"])
    if member is not None and video is None:
        raise MdptError(f"--member {member}: acts only with --video; leave the option out")
    for file in filter(None, (json_file, plot_file, video)):
        refuse_to_overwrite(file, overwrite)
    if describe_only:
        show_bundle(bundle, plot_file)
        return
    if video is not None:
        film(load_trial(bundle, infer_guidance, options, device), member, video)
        return
    if curve:
        report = evaluate_curve(bundle, infer_guidance, options, device, workers)
        show_table(curve_table(report))
        members = report["curve"][0]["summary"]["members"]
    else:
        report = evaluate_trial(load_trial(bundle, infer_guidance, options, device), workers)
        show_table(score_table(report))
        members = report["summary"]["members"]
    say(protocol_line(report["protocol"], members))
    say(f"training cost: {account_line(report['accounting'])}")
    write_json(json_file, report)
    if plot_file is not None:
        (plot_curve if curve else plot_scores)(plot_file, report)


@app.command()
def swap(
    context: typer.Context,
    policies: Annotated[list[Path], typer.Argument(help="policy bundles")],
    guidances: Annotated[
        list[Path] | None,
        typer.Option("--guidance", help="bundle whose guidance ranks, repeatable; default: those inside the policies"),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="matched: members by position; all: each with each; default: all, if not too many"),
    ] = None,
    episodes: Episodes = None,
    candidates: Candidates = None,
    selection: Selection = None,
    weight_temperature: WeightTemperature = None,
    temperature: Temperature = None,
    guide: Guide = None,
    guidance_weight: GuidanceWeight = None,
    seed: EvaluationSeed = None,
    device: Device = None,
    json_file: Json = None,
    plot_file: Plot = None,
    overwrite: Overwrite = False,
    workers: Workers = CORES,
) -> None:
    """Score every policy member under every guidance member, under none, and under its own."""
    if pairs not in (None, "matched", "all"):
        raise MdptError(f"--pairs {pairs}: expected matched or all")
    check_ending("--plot", plot_file, PICTURES)
    if plot_file is not None:
        refuse_to_overwrite(plot_file, overwrite)
    if json_file is not None and not json_file.exists():
        refuse_to_overwrite(json_file, overwrite)
    trials = plan_swap(policies, guidances or [], pairs, given_options(context), device)
    report = begin_swap(trials, json_file, overwrite)
    left = trials[len(report["cells"]) :]
    if left:
        say(forecast_swap(left, pairs, workers, json_file))
    for trial in left:
        title = f"cell {len(report['cells']) + 1}/{len(trials)}"
        report["cells"].append(play_cell(trial, workers, title))
        if json_file is not None:
            store_json(json_file, report)
    report |= {"summary": judge_swap(report["cells"]), "verdicts": judge_algorithms(report["cells"])}
    for trial, cell in zip(trials, report["cells"], strict=True):
        if trial.crossed:
            show_table(member_table(cell))
    for table in swap_tables(report):
        show_table(table)
    for line in report["verdicts"]:
        say(line)
    say(swap_line(report))
    write_json(json_file, report)
    if plot_file is not None:
        plot_swap(plot_file, report)


def given_options(context: typer.Context) -> dict[str, Any]:
    """The fields of [evaluation] given on the command line, which has an option of the same name for each."""
    given = {key: context.params.get(key) for key in EvaluationSection.model_fields}
    return {key: value for key, value in given.items() if value is not None}


def unfinished(path: Path, board: Path | None, overwrite: bool, resume: bool) -> Bundle | None:
    """The unfinished bundle to go on from, or None to begin. Raises: MdptError where that would lose work."""
    from data import make_writable_folder
    from models import read_bundle

    if overwrite and resume:
        raise MdptError("--overwrite begins anew and --resume goes on; give one of them")
    try:
        make_writable_folder(path.parent)
    except OSError as error:
        raise MdptError(f"--out {path}: cannot be written ({error.strerror}); choose another") from error
    if path.is_dir():
        raise MdptError(f"--out {path}: is a folder; choose a file")
    if board is not None and (board / path.stem).exists():
        refuse_to_overwrite(board / path.stem, overwrite or resume)
    if not path.exists():
        if resume:
            raise MdptError(f"{path}: there is nothing to resume; leave --resume out to begin")
        return None
    if overwrite:
        return None
    bundle = read_bundle(path)
    if bundle["complete"]:
        raise MdptError(f"{path}: exists already and is complete; choose another --out, or --overwrite to replace it")
    if not resume:
        raise MdptError(f"{path}: is unfinished, at step {bundle['step']}; --resume goes on, --overwrite begins anew")
    return bundle


if __name__ == "__main__":
    app()
