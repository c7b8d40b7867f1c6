"""mdpt: diffusion policies for offline reinforcement learning, guidance and policy as separate modules.

What the user touches: runs, cells and results, tables, pictures, commands. What only some command needs is imported
inside functions, so that --help is quick.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shlex
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, groupby, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "mdpt":  # found as a file in the checkout before the installed package: be that package
    __path__ = [str(Path(__file__).parent)]

import numpy as np
import typer
from typer.core import TyperGroup

from mdpt.data import (
    Array,
    DataSection,
    Dataset,
    EnvironmentSpec,
    EvaluationSection,
    Experiment,
    HeldOut,
    Interrupted,
    MdptError,
    PolicySection,
    Watch,
    Workers,
    check_experiment,
    describe_data,
    imported_for,
    load_dataset,
    load_experiment,
    locked,
    on_signals,
    parallel,
    printable,
    reference_returns,
    temporary_beside,
    version,
    written_whole,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mdpt.models import Bundle, Inference, Play, Run

    Pairs = list[tuple[int, int | None]]  # policy member, guidance member

# --- talking to the user ------------------------------------------------------------------------------------------


def make_console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Plain(stderr=stderr, markup=False, emoji=False)  # what is printed holds the names of files


def say(text: str, *, stderr: bool = False) -> None:
    make_console(stderr=stderr).print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    say(f"warning: {text}", stderr=True)


def show_table(table: Table) -> None:
    """Print a table under its title and over its caption, which may be wider than the table."""
    title, caption, table.title, table.caption = table.title, table.caption, None, None
    say(str(title))
    console = make_console()  # figures are never cut to fit: a narrow terminal wraps the lines
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    if caption is not None:
        say(str(caption))


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise MdptError(f"{path}: exists already; choose another name, or --overwrite to replace it")


def check_ending(option: str, path: Path | None, endings: Sequence[str]) -> None:
    if path is not None and path.suffix not in endings:
        *others, last = endings
        raise MdptError(f"{option} {path}: expected a {', '.join(others)}{' or ' if others else ''}{last} file")


def plain_files(names: set[str]) -> set[str]:
    """Names of files without @STEP and #SEED; what is no file has none."""
    while gone := {name for name in names if not Path(name).exists()}:
        names = names - gone | {name[: max(0, name.rfind("@"), name.rfind("#"))] for name in gone}
    return names


@contextmanager
def progress(title: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A Rich progress bar on stderr, or a log line each tenth of the way where stderr is no terminal."""
    from rich import progress as rich_progress

    console = make_console(stderr=True)
    if console.is_terminal:
        columns = (
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[text]}", markup=False),
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


@contextmanager
def going_on(does: bool) -> Iterator[None]:
    """Say of an interruption that the same command goes on, where it does."""
    try:
        yield
    except KeyboardInterrupt:
        if does:
            raise Interrupted("interrupted; the same command goes on") from None
        raise


@contextmanager
def about(path: Path | str) -> Iterator[None]:
    """Put the file that a mistake is about before it, where it does not name it itself."""
    try:
        yield
    except MdptError as error:
        if printable(str(path)) not in str(error):
            error.args = (f"{path}: {error}",)
        raise


@contextmanager
def claimed(overwrite: bool, outputs: dict[str, Path | None], inputs: Iterable[object] = ()) -> Iterator[None]:
    """Files, by option, that can be written, and that no other run writes meanwhile; says at the end what was written.

    inputs: files that are read, perhaps with @STEP and #SEED. Raises: MdptError before work begins, also for a file that
    would be lost, unless it is of an option in GO_ON.
    """
    used = {os.path.realpath(name): "read by" for name in plain_files({str(name) for name in inputs if name})}
    with ExitStack() as stack:
        for option, path in outputs.items():
            if path is not None:
                if (place := os.path.realpath(path)) in used:
                    raise MdptError(f"{option} {path}: is {used[place]} this command; choose another")
                used[place] = "another output of"

                def refuse(number: str, what: str = f"{option} {path}") -> None:
                    raise MdptError(f"{what}: process {number} writes it now; wait for that, or choose another")

                try:
                    if path.exists() and not path.is_file():
                        raise MdptError(
                            f"{option} {path}: is {'a folder' if path.is_dir() else 'a device or pipe'}; choose a file"
                        )
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(path, refuse))
                    if option not in GO_ON:
                        refuse_to_overwrite(path, overwrite)
                    temporary_beside(path).unlink()
                except OSError as error:
                    raise MdptError(f"{option} {path}: cannot be written ({error.strerror}); choose another") from error
        yield
    for path in filter(None, outputs.values()):
        say(f"wrote {path}")


GO_ON = ("--out", "--json")  # what is there may be a run's own that was cut short


@contextmanager
def training_run(
    title: str, experiment: Experiment, steps: int, path: Path, begun: Bundle | None, extend: bool, board: Path | None
) -> Iterator[Run]:
    """What a training run on screen and disk needs: it saves to `path`, shows progress, and ends well at Ctrl-C."""
    from mdpt import models

    device = models.pick_device(experiment.device)
    start = 0 if begun is None else begun["step"]
    seeds, history = list(experiment.seeds), [] if begun is None else begun["history"]
    write = (lambda entry: None) if board is None else scalar_writer(board / path.stem, seeds, history)
    began, caught = time.perf_counter(), [0]
    with about(path), progress(title, steps, start) as bar, on_signals(lambda number, _: caught.append(number)):

        def show(entry: dict[str, Any]) -> None:
            write(entry)
            speed = (entry["step"] - start) / (time.perf_counter() - began)
            bar(entry["step"], f"loss {sum(entry['loss']) / len(seeds):.4g}, {speed:.0f} steps/s")

        def save(bundle: Bundle) -> None:
            models.save_bundle(path, bundle)

        yield models.Run(device, begun, extend, save, show, lambda: caught[-1], lambda text: warn(f"{path}: {text}"))


def unfinished(path: Path, board: Path | None, overwrite: bool, extend: bool) -> Bundle | None:
    """The unfinished bundle to go on from, or None to begin. Raises: MdptError where that would lose work."""
    from mdpt.models import read_bundle

    if overwrite or not path.exists():
        if board is not None:
            refuse_to_overwrite(board / path.stem, overwrite)
        return None
    bundle = read_bundle(path)
    if bundle["complete"]:
        end = "; its learning rate has fallen to 0: train anew with more steps" if extend else ""
        raise MdptError(
            f"{path}: exists already and is complete{end}; choose another --out, or --overwrite to replace it"
        )
    return bundle


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


def load_data(section: DataSection, workers: Workers, spec: EnvironmentSpec | None = None) -> Dataset:
    """The dataset, collected or downloaded first where that is needed; what takes long shows a bar.

    spec: of the environment, where it is known already and need not be made.
    """
    with going_on(section.source == "collect"), ExitStack() as stack:
        bars: dict[str, Callable[[int, str], None]] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                stack.close()  # of what came before: Rich draws one at a time
                if not (done or total):  # there is no more to tell of it
                    say(f"{what} ...", stderr=True)
                bars[what] = stack.enter_context(progress(what, max(1, total)))
            bars[what](done, "")

        dataset = load_dataset(section, workers, show, spec=spec)
    for warning in dataset.warnings:
        warn(warning)
    return dataset


def load_run(path: Path, overrides: Sequence[str] | None, seeds: str | None, device: str | None) -> Experiment:
    """The experiment of a training command, checked whole before anything is loaded."""
    from mdpt.models import check_algorithms, pick_device

    options = {"seeds": None if seeds is None else f"[{seeds}]", "device": device}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    with about(path):
        run = check_algorithms(load_experiment(path, [*(overrides or []), *given]))
    pick_device(run.device)  # where there is none, better now than after the data
    return run


# --- cells: what is played ----------------------------------------------------------------------------------------

OWN = "its own"  # the guidance a policy was trained under
MANY_ROLLOUTS = 2_000  # beyond this, swap pairs members by position unless asked otherwise


@dataclass(frozen=True)
class Guide:
    """What guides in a cell: the guidances of some files, OWN or none, and how their members judge."""

    name: str
    bundles: Sequence[Bundle] = ()
    files: tuple[str, ...] = ()  # with @STEP and #SEED
    ensemble: str | None = None  # rule by which all members judge as one, "none": one each; None: as [evaluation] says
    crossed: bool = False  # each member of the policy under each of the guidance, else by position

    @property
    def members(self) -> int:
        return sum(len(bundle["seeds"]) for bundle in self.bundles)


NONE = Guide("none")


@dataclass(frozen=True)
class Cell:
    """A policy at a step, the guidance it acts under or none, how it acts, and which members are paired."""

    policy: str  # its file, perhaps with @STEP
    guide: Guide
    bundle: Bundle
    section: EvaluationSection
    how: Inference
    idle: list[str]  # settings that were asked for and do not act here
    warnings: list[str]
    pairs: Pairs

    @property
    def rollouts(self) -> int:
        return len(self.pairs) * self.section.episodes

    @property
    def shares(self) -> list[tuple[int, list[tuple[int | None, int]]]]:
        """Policy members, each with some rollouts (guidance member, episode): one product acts in all of them.

        The more of them a cell has, the more go together. The number of workers changes nothing.
        """
        size = min(max(self.rollouts // 8, 5), 20)
        found = []
        for i, pairs in groupby(self.pairs, key=lambda pair: pair[0]):
            rollouts = list(product([j for _, j in pairs], range(self.section.episodes)))
            count = math.ceil(len(rollouts) / size)
            bounds = [len(rollouts) * k // count for k in range(count + 1)]
            found += [(i, rollouts[start:stop]) for start, stop in pairwise(bounds)]
        return found


def make_cell(policy: str, bundle: Bundle, guide: Guide, settings: Sequence[str]) -> Cell:
    """The cell of a policy and what guides it, under settings such as "evaluation.episodes=5".

    Raises: MdptError where the two do not fit, or a setting is wrong.
    """
    from mdpt.models import check_teachers, pair_members, pick_inference

    experiment = bundle["experiment"] | {"evaluation": dict(bundle["experiment"]["evaluation"])}
    if wrong := [setting for setting in settings if not setting.startswith("evaluation.")]:
        raise MdptError(f"--set {wrong[0]}: only evaluation.KEY=VALUE can be set here")
    run = check_experiment(policy, experiment, settings)
    if guide.ensemble is not None:
        run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"ensemble": guide.ensemble})})
    guide = guide if guide.bundles else NONE
    members = range(len(bundle["seeds"]))
    pairs: Pairs = [(i, None) for i in members]
    try:
        how, acts = pick_inference(run, bool(guide.bundles), bundle["step"])
        warnings = check_teachers(bundle, guide.bundles, how.ensemble)
        if guide.bundles and how.ensemble == "none":
            crosses, by_place = product(members, range(guide.members)), pair_members
            pairs = list(crosses if guide.crossed else enumerate(by_place(len(members), guide.members)))
    except MdptError as error:
        raise MdptError(f"{policy}, {guide.name}: {error}") from error
    given = {text.partition("=")[0].removeprefix("evaluation.").strip() for text in settings}
    idle = [key for key, does in acts.items() if key in given and not does]
    return Cell(policy, guide, bundle, run.evaluation, how, idle, warnings, pairs)


def read_guide(names: Sequence[str]) -> Guide | None:
    """What guides by the names of files, or "none"; None: what is inside each policy."""
    from mdpt.models import read_named

    bundles, files = read_named(names), tuple(dict.fromkeys(names))
    if "none" in names:
        return NONE
    return Guide(", ".join(files), bundles, files) if bundles else None


def read_cell(path: Path, guide: Guide | None, settings: Sequence[str]) -> Cell:
    """The cell of a policy bundle and what guides it; None: what is inside it."""
    from mdpt.models import read_policy

    bundle = read_policy(path)
    return make_cell(str(path), bundle, guide or Guide(OWN, bundle["guidances"]), settings)


def snapshots(path: Path) -> list[Path]:
    """The names of all snapshots of a policy bundle, in order. Raises: MdptError where there are none."""
    from mdpt.models import read_policy

    if (mark := path.name.rfind("@")) > 0 and path.with_name(path.name[:mark]).is_file():
        raise MdptError(f"{path}: --curve scores every snapshot; leave out {path.name[mark:]}")
    if not (steps := read_policy(path)["snapshots"]):
        raise MdptError(f"{path}: holds no snapshots yet; its training command goes on")
    return [path.with_name(f"{path.name}@{step}") for step in steps]


def tell(cells: Sequence[Cell]) -> None:
    """Warn of unfinished bundles and of guidance that saw other data, each once."""
    unfinished = {}
    for cell in cells:
        for name, bundle in ((cell.policy, cell.bundle), *((cell.guide.name, bundle) for bundle in cell.guide.bundles)):
            if name != OWN and not bundle["complete"]:
                unfinished[name] = f"{name}: this {bundle['kind']} is unfinished, at step {bundle['step']}"
    for text in dict.fromkeys([*unfinished.values(), *(text for cell in cells for text in cell.warnings)]):
        warn(text)


def check_imports(cells: Sequence[Cell], trusted: Sequence[str]) -> None:
    """Raises: MdptError where a bundle's environment would import a module that the user has not named."""
    for cell in cells:
        module = imported_for(environment := cell.bundle["environment"]["id"])
        if module and module not in trusted:
            raise MdptError(
                f"{cell.policy}: its environment {environment} imports the module {module}, and so runs its code; "
                f"if you trust it, add --import {module}"
            )


def cut_into_tasks(cell: Cell, products: str) -> Iterator[Play]:
    """A cell's rollouts in tasks for workers, always the same: some of one policy member's each."""
    from mdpt.models import Play, select_members

    for i, rollouts in cell.shares:
        judges = sorted({j for j, _ in rollouts if j is not None})
        yield Play(
            policy=select_members(cell.bundle, [i]),
            guidances=tuple(select_members(each, judges or range(len(each["seeds"]))) for each in cell.guide.bundles),
            judges=tuple(judges.index(j) for j, _ in rollouts if j is not None),
            episodes=tuple(episode for _, episode in rollouts),
            how=cell.how,
            seed=cell.section.seed,
            products=products,
        )


def guidance_algorithm(guide: Guide) -> str | None:
    return " + ".join(sorted({bundle["experiment"]["guidance"]["algorithm"] for bundle in guide.bundles})) or None


def guidance_name(cell: Cell) -> str:
    """The guidance of a cell in the words of a protocol."""
    guide, rule = cell.guide, cell.how.ensemble
    name = guide.name if guide.name != OWN else f"{OWN} {guidance_algorithm(guide)} guidance"
    whole = f"the {rule} of all {guide.members} members of {', '.join(guide.files) or name}"
    return printable(name if rule == "none" else whole)


def bundle_files(cells: Sequence[Cell]) -> set[str]:
    """The files that cells come from."""
    return plain_files({name for cell in cells for name in (cell.policy, *cell.guide.files)})


def plan_swap(
    policies: Sequence[Path], guidances: Sequence[Path], pairs: str | None, settings: Sequence[str]
) -> list[Cell]:
    """Every policy under its own guidance, under none, under each one named, and under ensembles of these.

    A name twice counts once. guidances: none named means those inside the policies. pairs: "all" crosses the members
    under a named guidance, "matched" pairs them by position; None crosses them as long as that is at most MANY_ROLLOUTS.

    Raises: MdptError before anything runs, naming the files, if they cannot be put together or compared.
    """
    from mdpt.models import read_guidances, read_policy, same_weights

    bundles = {str(path): read_policy(path) for path in policies}
    named = {str(path): read_guidances(path) for path in guidances}
    for name, bundle in bundles.items() if not guidances else ():
        known = [each for others in named.values() for each in others]
        if not all(any(same_weights(inner, other) for other in known) for inner in bundle["guidances"]):
            named[name] = bundle["guidances"]
    if not named:
        raise MdptError(f"{', '.join(bundles)}: no guidance inside; name one with --guidance FILE")

    def plan(crossed: bool) -> list[Cell]:
        cells = []
        for name, bundle in bundles.items():
            alone = make_cell(name, bundle, NONE, settings)
            if bundle["guidances"]:
                own = Guide(OWN, bundle["guidances"], ensemble=bundle["experiment"]["policy"]["ensemble"])
                cells.append(make_cell(name, bundle, own, settings))
            guides = [
                Guide(file, each, (file,), "none", crossed) for file, each in named.items() if len(each) == 1
            ] + ensembles(named, alone.section, bundle["experiment"]["policy"]["ensemble"])
            cells += [alone, *(make_cell(name, bundle, guide, settings) for guide in guides)]
        return cells

    cells = plan(pairs != "matched")
    check_comparable(cells)
    if pairs is None and sum(cell.rollouts for cell in cells) > MANY_ROLLOUTS:
        sizes = [(cell.guide.members, len(cell.bundle["seeds"])) for cell in cells if cell.guide.crossed]
        if all(ours in (1, theirs) for ours, theirs in sizes):
            return plan(False)
    return cells


def ensembles(named: Mapping[str, Sequence[Bundle]], section: EvaluationSection, learned: str) -> list[Guide]:
    """All members of each guidance as one, and of all of them, by the rule of [evaluation].

    By default it is the one under which the policy learned, else their mean, or where scales differ the mean rank; where
    that is needed and has no gradient, there is no such ensemble.
    """
    from mdpt.models import values_scale

    groups = [(file,) for file in named] + [tuple(named)] * (len(named) > 1)
    found = []
    for files in groups if section.ensemble != "none" else ():
        guide = Guide("", [bundle for file in files for bundle in named[file]], files)
        apart = len(set(map(values_scale, guide.bundles))) > 1
        way = section.ensemble or ("rank" if apart else "mean" if learned == "none" else learned)
        if apart and not section.ensemble and section.guide != "rank":
            continue
        name = files[0] if len(files) == 1 else "all"
        found += [replace(guide, name=f"{name} ({way} of {guide.members})", ensemble=way)] * (guide.members > 1)
    return found


def check_comparable(cells: Sequence[Cell]) -> None:
    """Raises: MdptError where the scores of a cell could not stand beside those of the first."""
    first, *others = [
        (
            cell.policy,
            cell.section.model_dump(exclude={"w", "ensemble"})
            | {"reference": [*(cell.bundle["reference"] or ())], "environment": cell.bundle["environment"]["id"]},
        )
        for cell in cells
    ]
    for name, theirs in others:
        if differing := [
            f"{key} {first[1][key]} against {theirs[key]}" for key in theirs if first[1][key] != theirs[key]
        ]:
            raise MdptError(
                f"{first[0]} and {name} are not tried alike: {'; '.join(differing)}; evaluate them apart, or give the "
                "settings that make them equal"
            )


def find_held_out(cell: Cell, data_file: Path | None) -> HeldOut:
    """The held-out part of a policy's data, or of another file. Raises: MdptError as `judge_cells`."""
    section = Experiment.model_validate(cell.bundle["experiment"]).data
    if data_file is not None:
        section = section.model_copy(update={"source": "hdf5", "path": str(data_file), "dataset": None})
    elif section.source == "arrays":
        raise MdptError(f"{cell.policy}: was trained on arrays; name a file of the same data with --data")
    try:
        dataset = load_data(section, Workers(), EnvironmentSpec(**cell.bundle["environment"]))
    except MdptError as error:
        raise error if data_file else MdptError(f"{cell.policy}: {error} --data FILE names its data.") from error
    if dataset.identity["hash"] != cell.bundle["dataset"]["hash"]:
        if data_file is None:
            raise MdptError(f"{cell.policy}: {dataset.identity['name']} has changed since; name the data with --data")
        warn(f"{data_file}: other data than {cell.policy} was trained on")
    if not len(dataset.held_out.rewards):
        raise MdptError(f"{cell.policy}: its data have no held-out episodes; train with [data] held_out above 0")
    return dataset.held_out


# --- statistics ---------------------------------------------------------------------------------------------------


def normalized_score(returns: Array, reference: tuple[float, float]) -> Array:
    """Raw returns on the scale where the reference's min is 0 and its max is 100. Source: arXiv 2004.07219, eq. 1."""
    low, high = reference
    return np.asarray(100 * (np.asarray(returns, dtype=np.float64) - low) / (high - low))


FEWEST = 5  # members: an interval from fewer says no more than their range


def summarize(table: Array) -> dict[str, Any]:
    """Statistics of scores, 0 to 100: median, IQR, IQM with its 95 % interval, range, mean, standard deviation.

    table: (S, K, E), each episode's score of policy members under guidance members, nan where there is no such pair;
    a pair's score is the mean over its episodes. IQR and standard deviation as in `spread`; of a single policy member,
    over those of the guidance. Range: the lowest and the highest pair. Interval as in `bootstrap`.
    Source: interquartile mean as in rliable (arXiv 2108.13264).
    """
    from scipy import stats

    def interquartile_mean(scores: Array) -> Any:
        return stats.trim_mean(flat(scores), 0.25, axis=-1, nan_policy="omit")

    table = table[~np.isnan(table).all((1, 2))]
    scores = table.mean(-1)  # (S, K)
    values = scores[~np.isnan(scores)]
    interval = bootstrap(interquartile_mean, table)
    iqr, std = spread(scores if len(scores) > 1 else scores.T)
    return {
        "members": len(table),
        "median": float(np.median(values)),
        "iqr": None if np.isnan(iqr) else float(iqr),
        "iqm": float(interquartile_mean(scores)),
        "iqm_interval": None if interval is None else interval.tolist(),
        "range": [float(values.min()), float(values.max())],
        "mean": float(values.mean()),
        "std": None if np.isnan(std) else float(std),
    }


def shift(table: Array) -> Array:
    """Tables of pairs (..., S, K) with guidance member (i + k) modulo K in column k of policy member i."""
    count, width = table.shape[-2:]
    rows = np.arange(count)[:, None]
    shifted: Array = table[..., rows, (rows + np.arange(width)) % width]
    return shifted


def spread(table: Array) -> tuple[Any, Any]:
    """IQR and standard deviation of S pairs that share no member, in tables of scores (..., S, K): each (...).

    Policy member i is paired with guidance member (i + k) modulo K, and what these S scores show is averaged over
    k = 0 .. K - 1: so crossed members are judged on as many scores at a time, and as independent ones, as members
    paired once; where K < S some of the S share a guidance member. nan is left out. Quartiles are interpolated
    linearly, as numpy does. A k with a single pair shows no spread and is left out; nan: there is no other.
    """
    ordered = np.sort(shift(table), axis=-2)  # (..., S, K), nan last
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
        between = np.where(last[..., 0, :] > 0, quantile(0.75) - quantile(0.25), np.nan)
        return np.nanmean(between, axis=-1), np.nanmean(deviation, axis=-1)


def bootstrap(statistic: Callable[..., Any], *tables: Array) -> Array | None:
    """95 % interval (2, ...) of statistic(*scores), (..., D) for D draws; None below 5 members.

    tables: scores per episode, (S or 1, K or 1, E). Each draw takes policy members (rows), guidance members (columns)
    and episode numbers, that is start states, with replacement, the same in all tables; scores (D, S or 1, K or 1) are
    means over the episodes drawn. The expanded percentile interval begins at Phi(sqrt(S / (S - 1)) t) instead of 2.5 %,
    t that quantile of Student's t with S - 1 degrees of freedom, since draws from few vary too little by that root; of
    members drawn apart the fewer count as S: they vary least for their number. Source: Hesterberg, arXiv 1411.5279.
    """
    from scipy import stats

    count, width, episodes = (max(sizes) for sizes in zip(*(table.shape for table in tables), strict=True))
    members = count if width == 1 else min(count, width)
    if members < FEWEST:
        return None
    random, left, found = np.random.default_rng(0), 9_999 if count * width < 100 else 2_000, []
    batch = max(1, 5_000_000 // max(count * count * width, episodes))  # bounds the memory of what is compared
    while left > 0:
        size = min(batch, left)
        rows, columns = random.integers(count, size=(size, count, 1)), random.integers(width, size=(size, 1, width))
        shares = random.multinomial(episodes, np.full(episodes, 1 / episodes), size) / episodes  # (D, E)
        scores = [
            np.tensordot(shares, table, (1, 2))[np.arange(size)[:, None, None], rows[:, :s] % s, columns[..., :k] % k]
            for table in tables
            for s, k in [table.shape[:2]]
        ]
        with warnings.catch_warnings():  # a draw may hold no pair at all, or one value alone
            warnings.simplefilter("ignore", RuntimeWarning)
            found.append(statistic(*scores))
        left -= size
    level = stats.norm.cdf(np.sqrt(members / (members - 1)) * stats.t.ppf(0.025, members - 1))
    ends: Array = np.nanquantile(np.concatenate(found, axis=-1), [level, 1 - level], axis=-1)
    return ends


def flat(table: Array) -> Array:
    return table.reshape(*table.shape[:-2], -1)  # (..., S K)


def compare(own: Array, swapped: Array) -> dict[str, Any]:
    """How scores change against those under the guidance of training.

    own: (S, E), the baseline of each policy member. swapped: (S, K, E), that member's scores under other guidance
    members, nan where there is none. Changes of median, IQR and standard deviation (as in `spread`) are swapped minus
    own, in points of score; iqr_percent is 100 (IQR swapped - IQR own) / IQR own, and iqr_percent_by_chance what it
    would be where nothing changed; improvement is the probability that a swapped score beats an own one, ties counting
    half (arXiv 2108.13264); spread_p as in `pitman_morgan`; range of a pair's change. Intervals as in `bootstrap`; a
    policy member's own and swapped scores are drawn together.
    """
    swapped = np.where(np.abs(swapped - own[:, None]) < 1e-3, own[:, None], swapped)  # rounding of other batches
    mine, others = own.mean(-1)[:, None], swapped.mean(-1)  # (S, 1), (S, K)

    def changes(mine: Array, others: Array) -> Array:
        other, (iqr, std), (own_iqr, own_std) = flat(others), spread(others), spread(mine)
        wins = (np.sign(other[..., :, None] - flat(mine)[..., None, :]) + 1) / 2
        medians = np.nanmedian(other, axis=-1) - np.median(flat(mine), axis=-1)
        return np.stack([medians, iqr - own_iqr, std - own_std, np.nanmean(wins, axis=(-2, -1))])

    gaps = others - mine
    shown = {"range": [float(np.nanmin(gaps)), float(np.nanmax(gaps))]}
    if len(own) < 2:
        return {"median": float(np.nanmedian(gaps)), **shown}
    names = ("median", "iqr", "std", "improvement")
    found = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(names, changes(mine, others), strict=True)
    }
    base, ends = float(spread(mine)[0]), bootstrap(changes, own[:, None], swapped)
    return {
        **found,
        **shown,
        "iqr_percent": None if found["iqr"] is None or base == 0 else 100 * found["iqr"] / base,
        "iqr_percent_by_chance": list(by_chance(len(own), correlate(mine[:, 0], others))) if base > 0 else None,
        "spread_p": pitman_morgan(mine[:, 0], others),
        "intervals": None if ends is None else dict(zip(names, ends.T.tolist(), strict=True)),
    }


def matches(own: Array, swapped: Array) -> Iterator[tuple[Array, Array]]:
    """Scores (n,) before and after, of own (S,) and swapped (S, K), for each shift where they vary and n > 2."""
    for other in shift(swapped).T:
        before, after = own[~np.isnan(other)], other[~np.isnan(other)]
        if len(after) > 2 and min(np.ptp(before), np.ptp(after)) > 0:
            yield before, after


def correlate(own: Array, swapped: Array) -> float:
    """Correlation of scores before (S,) and after (S, K), the mean over shifts; 0 where it is unknown."""
    found = [np.corrcoef(before, after)[0, 1] for before, after in matches(own, swapped)]
    return round(float(np.mean(found or 0)), 2)


def pitman_morgan(own: Array, swapped: Array) -> float | None:
    """p that own (S,) and swapped (S, K) scores spread alike over members: of their sums and differences correlating.

    Two-sided, from Student's t with S - 2 degrees of freedom, so for normal scores. Crossed members: twice the mean p
    over the shifts of `spread` with a change, at most 1, which holds however these depend on one another. None below 3
    pairs, without variance, or where 1 < K < S, since pairs that share a guidance member are no independent ones.
    Source: Pitman 1939, Morgan 1939 (Biometrika 31); mean of p: Vovk and Wang, arXiv 1212.4966.
    """
    from scipy import stats

    if 1 < swapped.shape[1] < len(own):
        return None
    moves = [(before + after, after - before) for before, after in matches(own, swapped)]
    found = [stats.pearsonr(*move).pvalue for move in moves if min(map(np.ptp, move)) > 0]
    return min(1.0, float(np.mean(found)) * (1 if swapped.shape[1] == 1 else 2)) if found else None


@cache
def by_chance(members: int, correlation: float) -> tuple[float, float]:
    """95 % range of 100 (IQR after / IQR before - 1) of paired members where nothing changed: drawn from one normal.

    correlation: of before and after, in [-1, 1], taken as at most 0.99. Of crossed members, whose IQR is a mean over
    shifts, the range is wider than it need be.
    """
    correlation = min(max(correlation, -0.99), 0.99)
    before, noise = np.random.default_rng(0).normal(size=(2, 40_000, members, 1))
    after = correlation * before + np.sqrt(1 - correlation**2) * noise
    low, high = np.quantile(100 * (spread(after)[0] / spread(before)[0] - 1), [0.025, 0.975])
    return float(low), float(high)


def tabulate(pairs: Sequence[dict[str, Any]], members: int, reference: tuple[float, float]) -> Array:
    """Scores of each episode by policy member and guidance seed, (S, K, E), nan where there is no such pair.

    Where members are paired one to one, K = 1: they are drawn as pairs, not apart. Else the guidance that grew from the
    seed of policy member i is in column i, so that the shifts of `spread` have either all pairs of one seed or none.
    """
    crossed = len(pairs) > len({pair["policy_member"] for pair in pairs})
    columns = list(dict.fromkeys(pair["guidance_seed"] if crossed else None for pair in pairs))
    for pair in pairs if crossed else ():
        seed, place = pair["policy_seed"], pair["policy_member"]
        if seed in columns and place < len(columns):
            at = columns.index(seed)
            columns[at], columns[place] = columns[place], seed
    table = np.full((members, len(columns), len(pairs[0]["returns"])), np.nan)
    for pair in pairs:
        column = columns.index(pair["guidance_seed"]) if crossed else 0
        table[pair["policy_member"], column] = normalized_score(pair["returns"], reference)
    return table


def variance_components(scores: Array) -> dict[str, dict[str, Any]]:
    """Standard deviations of crossed scores (S, K) that come from "guidance", "policy" and the "rest".

    score = mean + policy's share + guidance's share + rest, by analysis of variance; the rest is what only the pair
    explains, and the draw of its episodes. A negative variance counts as 0. interval: 95 %, for normal shares; None below
    5 members of either. Source: Ting et al. 1990 (J. Stat. Comput. Simul. 35), as in Burdick and Graybill 1992; the rest's
    is that of a chi-squared variance.
    """
    from scipy import stats

    count, width = scores.shape
    freedom = (count - 1) * (width - 1)
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    noise = float(np.square(rest).sum() / freedom)
    known = min(count, width) >= FEWEST

    def upper(share: float, first: float, second: float) -> float:
        """The value that F of so many degrees of freedom exceeds with probability `share`."""
        return float(stats.f.isf(share, first, second))

    def component(means: Array, repeats: int) -> dict[str, Any]:
        free = len(means) - 1
        square = repeats * float(means.var(ddof=1))
        low, high, many = 0.025, 0.975, 1e9
        f, g = upper(low, free, freedom), upper(high, free, freedom)
        below, above = 1 - 1 / upper(low, free, many), 1 / upper(high, free, many) - 1
        noise_above, noise_below = 1 / upper(high, freedom, many) - 1, 1 - 1 / upper(low, freedom, many)
        lower_mixed = ((f - 1) ** 2 - (below * f) ** 2 - noise_above**2) / f
        upper_mixed = ((1 - g) ** 2 - (above * g) ** 2 - noise_below**2) / g
        down = (below * square) ** 2 + (noise_above * noise) ** 2 + lower_mixed * square * noise
        up = (above * square) ** 2 + (noise_below * noise) ** 2 + upper_mixed * square * noise
        ends = [square - noise - max(0.0, down) ** 0.5, square - noise + max(0.0, up) ** 0.5]
        return in_points(square - noise, ends, repeats)

    def in_points(square: float, ends: Sequence[float], repeats: int) -> dict[str, Any]:
        value, *interval = (max(0.0, end / repeats) ** 0.5 for end in (square, *ends))
        return {"std": value, "interval": interval if known else None}

    low, high = (freedom * noise / stats.chi2.isf(share, freedom) for share in (0.025, 0.975))
    return {
        "guidance": component(scores.mean(0), count),
        "policy": component(scores.mean(1), width),
        "rest": in_points(noise, [low, high], 1),
    }


def probability_of_improvement(first: Array, second: Array) -> tuple[float, tuple[float, float] | None]:
    """How often a score of `first` (S, E) beats one of `second` (K, E), ties counting half, and its 95 % interval.

    The members of each are drawn apart, the episodes together, as in `bootstrap`. Source: arXiv 2108.13264.
    """

    def wins(ours: Array, theirs: Array) -> Any:
        return ((np.sign(ours - theirs) + 1) / 2).mean(axis=(-2, -1))

    found = float(wins(first.mean(-1)[:, None], second.mean(-1)[None]))
    ends = bootstrap(wins, first[:, None], second[None]) if len(second) >= FEWEST else None
    return found, None if ends is None else (float(ends[0]), float(ends[1]))


# --- reports: what was found --------------------------------------------------------------------------------------

KINDS = ("mean", "best")


def play_cells(cells: Sequence[Cell], file: Path | None, overwrite: bool, workers: Workers) -> dict[str, Any]:
    """Play all cells and judge them. With a file, each finished cell is stored, and a run cut short goes on there."""
    from mdpt import models

    products = models.choose_products()
    report = begin_report(cells, products, file, overwrite)
    left = cells[len(report["cells"]) :]
    if len(cells) > 1:
        kind = "each with each" if any(len(cell.pairs) > len(cell.bundle["seeds"]) for cell in cells) else "by position"
        rollouts = sum(cell.rollouts for cell in left)
        say(f"{len(left)} of {len(cells)} cells to play, members paired {kind}: {rollouts} rollouts", stderr=True)
    tasks = (task for cell in left for task in cut_into_tasks(cell, products))
    found = parallel(models.play, tasks, workers, sum(len(cell.shares) for cell in left))
    done = 0
    with (
        going_on(file is not None),
        closing(found),
        progress("play", max(1, sum(cell.rollouts for cell in left))) as show,
    ):
        for cell in left:
            parts = []
            for _ in cell.shares:
                parts.append(next(found))
                done += len(parts[-1][0])
                show(done, "episodes")
            report["cells"].append(make_result(cell, parts, products))
            store_json(file, report)
    return report | {"summary": judge(report["cells"])}


def judge_cells(cells: Sequence[Cell], data_file: Path | None) -> dict[str, Any]:
    """What can be said of policies without playing them, on the held-out part of their data, or of another file.

    Raises: MdptError where the data are not what a policy was trained on and none were named.
    """
    from mdpt import models

    results, known = [], {}
    for cell in cells:
        bundle = cell.bundle
        data = repr((bundle["experiment"]["data"], bundle["environment"], bundle["dataset"]["hash"]))
        if data not in known:  # the steps of a curve share theirs
            known[data] = find_held_out(cell, data_file)
        rule = bundle["experiment"]["policy"]["ensemble"]
        ranker = OWN if (cell.guide.name, cell.how.ensemble) == (OWN, rule) else guidance_name(cell)
        judges = {OWN: (bundle["guidances"], rule), ranker: (cell.guide.bundles, cell.how.ensemble)}
        there = {name: judge for name, judge in judges.items() if judge[0] and judge[1] != "rank"}  # ranks: no values
        found = models.judge_offline(bundle, cell.guide.bundles, cell.how, known[data], cell.section.seed, there)
        what = {
            "policy": cell.policy,
            "guidance": ranker,
            "step": bundle["step"],
            "warnings": cell.warnings,
            "data": str(data_file or bundle["dataset"]["name"]),
            "seed": cell.section.seed,
            "guide": cell.section.guide,
            "seeds": bundle["seeds"],
        }
        results.append(what | asdict(cell.how) | found)
    return {"cells": results, "offline": True}


def make_result(cell: Cell, parts: Sequence[tuple[Array, Array]], products: str) -> dict[str, Any]:
    """Everything a cell has shown, as plain containers: what was played, and score, returns, lengths of each pair."""
    bundle, reference, data = cell.bundle, cell.bundle["reference"], cell.bundle["dataset"]
    returns, lengths = (np.concatenate(arrays).reshape(len(cell.pairs), -1) for arrays in zip(*parts, strict=True))
    scores = normalized_score(returns.mean(1), reference)
    seeds = [seed for each in cell.guide.bundles for seed in each["seeds"]]
    return {
        "policy": printable(cell.policy),
        "guidance": printable(cell.guide.name),
        "step": bundle["step"],
        "algorithm": bundle["experiment"]["policy"]["algorithm"],
        "guidance_algorithm": guidance_algorithm(cell.guide),
        "warnings": cell.warnings,
        "protocol": {
            "policy": printable(cell.policy),
            "step": bundle["step"],
            "steps": bundle["experiment"]["policy"]["steps"],
            "guidance": guidance_name(cell) if cell.guide.bundles else None,
            "guide": cell.section.guide,
            **asdict(cell.how),
            "no_effect": cell.idle,
            "episodes": cell.section.episodes,
            "seed": cell.section.seed,
            "environment": bundle["environment"]["id"],
            "repeatable": bundle["environment"]["repeatable"],
            "reference": list(reference),
            "products": products,
        },
        "pairs": [
            {
                "policy_member": i,
                "policy_seed": bundle["seeds"][i],
                "guidance_seed": None if j is None else seeds[j],
                "return": float(returns[row].mean()),
                "score": float(scores[row]),
                "length": float(lengths[row].mean()),
                "returns": returns[row].tolist(),
                "lengths": lengths[row].tolist(),
            }
            for row, (i, j) in enumerate(cell.pairs)
        ],
        "dataset": data
        | {f"{kind}_score": float(normalized_score(data[f"{kind}_return"], reference)) for kind in KINDS},
        "accounting": bundle["accounting"],
        "versions": bundle["versions"] | {"played_with": version()},
    }


def begin_report(cells: Sequence[Cell], products: str, file: Path | None, overwrite: bool) -> dict[str, Any]:
    """A report without results yet, or with those that a run cut short has stored in the file.

    overwrite: begin anew where the file holds something else, or results of other bundles or settings.

    Raises: MdptError in that case without overwrite.
    """
    report: dict[str, Any] = {
        "settings": {
            "bundles": {name: digest(Path(name)) for name in sorted(bundle_files(cells))},
            "cells": [[cell.policy, cell.guide.name, len(cell.pairs)] for cell in cells],
            "evaluation": [cell.section.model_dump() for cell in cells],
            "products": products,
            "version": version(),
        },
        "cells": [],
    }
    if file is None or not file.exists():
        return report
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        settings, finished = stored["settings"], stored["cells"]
        changed = [name for name, value in report["settings"].items() if settings.get(name) != value]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        problem = "exists already and holds no results; choose another name, or --overwrite to replace it"
    else:
        if not changed:
            return report | {"cells": finished}
        problem = (
            f"holds results of other {', '.join(changed)}; repeat its options to go on, "
            "choose another name, or --overwrite to begin anew"
        )
    if overwrite:
        return report
    raise MdptError(f"{file}: {problem}")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report, if asked for, whole or not at all."""
    if path is None:
        return
    with written_whole(path, "choose another --json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def judge(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each result says: statistics over pairs of members, and changes against the baseline.

    The baseline of a policy is itself under its own guidance, or under none where it was not played under its own.
    Pairs are told apart by whether policy and guidance grew from the same seed.
    """
    baselines = {cell["policy"]: cell for name in ("none", OWN) for cell in results if cell["guidance"] == name}
    found = []
    for cell in results:
        baseline = baselines.get(cell["policy"], cell)
        own = episode_scores(baseline)
        for group, pairs in seed_groups(cell["pairs"]).items():
            table = tabulate(pairs, len(own), cell["protocol"]["reference"])
            complete = cell is not baseline and not np.isnan(table).all((1, 2)).any()  # every policy member has a pair
            found.append(
                {
                    **{key: cell[key] for key in ("policy", "guidance", "step", "warnings")},
                    "seeds": group,
                    "pairs": len(pairs),
                    "summary": summarize(table),
                    "change": compare(own, table) if complete else None,
                }
            )
    return found


def episode_scores(cell: dict[str, Any]) -> Array:
    """Of each pair of members, (S, E)."""
    return normalized_score(np.array([pair["returns"] for pair in cell["pairs"]]), cell["protocol"]["reference"])


def overall(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell the entry about all its pairs, which comes last."""
    return list({(entry["policy"], entry["guidance"]): entry for entry in entries}.values())


def is_crossed(cell: dict[str, Any]) -> bool:
    return len(cell["pairs"]) > len({pair["policy_member"] for pair in cell["pairs"]})


def split_spread(cell: dict[str, Any]) -> dict[str, Any]:
    """Of crossed members: what of the spread comes from guidance and policy, and which guidance member served best."""
    columns = guidance_seeds(cell)
    scores = np.array([pair["score"] for pair in cell["pairs"]]).reshape(-1, len(columns))
    best = int(scores.mean(0).argmax())
    return {
        **{key: cell[key] for key in ("policy", "guidance", "step")},
        "std": variance_components(scores) if len(scores) > 1 else None,
        "best_guidance": {"seed": columns[best], "mean": float(scores[:, best].mean())},
    }


def guidance_seeds(cell: dict[str, Any]) -> list[int]:
    """Of the guidance members of a crossed cell, in order."""
    return list(dict.fromkeys(pair["guidance_seed"] for pair in cell["pairs"]))


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


def of_policy(entry: dict[str, Any], curve: bool) -> str:
    """The policy that an entry or result is of: the steps of a curve belong together."""
    return str(entry["policy"]).rpartition("@")[0] if curve else str(entry["policy"])


def rivals(results: Sequence[dict[str, Any]], curve: bool) -> list[dict[str, Any]]:
    """How often one policy's member beats another's; of a curve the last steps."""
    last = {of_policy(cell, curve): cell for cell in results}
    found = []
    for first, second in combinations(last.values(), 2):
        value, interval = probability_of_improvement(episode_scores(first), episode_scores(second))
        found.append({"first": first["policy"], "second": second["policy"], "improvement": value, "interval": interval})
    return found


# --- tables -------------------------------------------------------------------------------------------------------


def make_table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def between(ends: Sequence[float] | None, form: str = ".1f") -> str:
    return "-" if ends is None else f"{ends[0]:{form}} .. {ends[1]:{form}}"


def quality_table(bundle: Bundle) -> Table:
    """Held-out judgement of a guidance: each member as it is, then all of them as they were at each snapshot."""
    *earlier, last = bundle["quality"]
    scale = bundle["reward_scale"]
    scaled = f"'{scale['rule']}', {scale_text(scale)}"
    title = f"guidance on {last['rows']} held-out transitions (values in rewards scaled by {scaled})"
    table = make_table(title, "seed", "corr(V, return)", "corr(Q gain, return - V)", "mean V", "mean return")
    keys = {"correlation": 3, "advantage_correlation": 3, "mean_v": 2, "mean_return": 2}
    for i, seed in enumerate(bundle["seeds"]):
        table.add_row(str(seed), *(number(last[key][i], digits) for key, digits in keys.items()))
    table.add_section()
    for entry in earlier:
        means = {key: [value for value in entry[key] if value is not None] for key in keys}
        cells = (number(float(np.mean(means[key])) if means[key] else None, keys[key]) for key in keys)
        table.add_row(f"mean @{entry['step']}", *cells)
    how = "discounted return to the episode's end"
    if last["bootstrapped"]:
        how = "discounted return to the time limit and V there, since no episode here shows what comes after"
    spread = (
        f"spread of Q between members {number(last['q_spread_members'], 3)}, transitions {last['q_spread_rows']:.3f}"
    )
    gain = "Q gain: of the action taken, above the mean of others of the data in its state"
    table.caption = f"return: {how}; {gain}; {spread}"
    return table


def low_values(bundle: Bundle) -> list[int]:
    """Seeds of members whose V has not come from 0 to the returns: it is nearer to 0, or below where it lies above.

    Above is where an upper expectile lies of returns that are positive.
    """
    last, section = bundle["quality"][-1], bundle["experiment"]["guidance"]
    above = section["algorithm"] == "idql" and (section["value_loss"] == "gumbel" or section["expectile"] > 0.5)
    pairs = zip(bundle["seeds"], last["mean_v"], last["mean_return"], strict=True)
    return [
        seed
        for seed, value, known in pairs
        if value is not None and (abs(value) < abs(value - known) or (above and 0 < value < known))
    ]


def score_table(cell: dict[str, Any], summary: dict[str, Any]) -> Table:
    """One result: per member, over members, and the dataset on the same scale."""
    table = make_table("scores (0 to 100 between the reference returns)", "seed", "return", "score", "length")
    for pair in cell["pairs"]:
        row = number(pair["return"]), number(pair["score"]), number(pair["length"], 0)
        table.add_row(str(pair["policy_seed"]), *row)
    table.add_section()
    for name, text in summary_cells(summary).items():
        table.add_row(name, "", text, "")
    table.add_section()
    for kind in KINDS:
        data = cell["dataset"]
        table.add_row(f"data {kind}", number(data[f"{kind}_return"]), number(data[f"{kind}_score"]), "")
    return table


def offline_table(result: dict[str, Any]) -> Table:
    """What was found of a policy without playing: each member's distance to the data's actions, and values."""
    ranker = result["guidance"]
    title = f"{result['policy']}, step {result['step']}: offline, on {result['states']} held-out states"
    heads = [f"{what} ({name})" for name in result["values"] for what in ("Q", "Q of data", "higher")]
    table = make_table(title, "seed", "distance", *heads)
    for i, seed in enumerate(result["seeds"]):
        cells = [number(result["distance"][i], 3)]
        for value in result["values"].values():
            cells += [number(value["policy"][i], 2), number(value["data"][i], 2), f"{value['higher'][i]:.0%}"]
        table.add_row(str(seed), *cells)
    table.caption = (
        f"distance: root mean square to the data's actions, in [-1, 1]; {result['chance']:.3f} between two of the data's. "
        f"Q: of its actions, by the guidance in brackets; higher: in how many states than that of the data's. How "
        f"it acts: {', '.join(choice(result | {'guidance': None if ranker == 'none' else ranker}))}; a guidance values "
        "what it ranks first."
    )
    return table


def data_table(dataset: Dataset) -> Table:
    """What a dataset is, before anything is trained on it."""
    found, section, spec = describe_data(dataset), dataset.section, dataset.environment
    table = make_table(f"{dataset.identity['source']} {dataset.identity['name']}", "what", "value")
    returns = np.array(found["returns"])
    ends = [f"{name} {{:.1f}}" for name in ("worst", "quarter", "median", "three quarters", "best")]
    steps = np.ceil(8 * np.array(found["histogram"]) / max(found["histogram"])).astype(int)
    counted = " counted from the first row on" if found["timeouts_counted"] else ""
    facts = {
        "environment": f"{spec.id or 'none'}, O {spec.observation_dim}, A {spec.action_dim}, limit {spec.max_episode_steps}",
        "transitions": f"{found['transitions']} to train on, {found['held_out']} held out",
        "episodes": f"{len(dataset.episode_returns)} whole, of {' / '.join(f'{n:.0f}' for n in found['lengths'])} steps "
        "(shortest / median / longest)",
        "ends": f"{found['terminals']} terminals, {found['timeouts']} time limits{counted}",
        "returns": ", ".join(ends).format(*returns),
        "histogram": f"{''.join(' ▁▂▃▄▅▆▇█'[step] for step in steps)} from worst to best",
    }
    if spec.id is None:
        facts["no environment"] = str(dataset.identity["no_environment"])
    if section.reference is not None:
        facts["scores"] = ", ".join(ends).format(*normalized_score(returns, reference_returns(section.reference)))
    facts |= {
        "rewards": f"scaled by {dataset.reward_scale['rule']}, {scale_text(dataset.reward_scale)}",
        "constant features": ", ".join(map(str, found["constant"])) or "none",
        "actions at a bound": ", ".join(f"{share:.0%}" for share in found["at_bounds"]),
        "duplicates": f"{found['duplicates']:.1%} of transitions repeat another's observation and action",
    }
    for name, text in facts.items():
        table.add_row(name, text)
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    return table


def policy_table(entries: Sequence[dict[str, Any]], curve: bool) -> Table:
    """Several policies, or several steps of them, a line each. The best step is chosen by the very scores shown."""
    columns = list(summary_cells(entries[0]["summary"]))
    table = make_table("scores (0 to 100 between the reference returns)", "policy", "step", *columns, *[""] * curve)
    for entry in entries:
        points = [other for other in entries if of_policy(other, curve) == of_policy(entry, curve)]
        best = max(points, key=lambda point: point["summary"]["iqm"])
        notes = ["best (online selection)"] * (entry is best) + ["last"] * (entry is points[-1])
        cells = summary_cells(entry["summary"]).values()
        table.add_row(entry["policy"], str(entry["step"]), *cells, *[", ".join(notes)] * curve)
    return table


def far_below_the_data(cell: Cell, result: dict[str, Any], median: float) -> str:
    """What to say where a policy that its guidance has taught scores far below the data's mean, else ""."""
    from mdpt.models import POLICIES, learns_under_guidance, weighed_by_eta

    mean, section = result["dataset"]["mean_score"], PolicySection(**cell.bundle["experiment"]["policy"])
    if median > mean - 10 or not learns_under_guidance(section, cell.bundle["step"]):
        return ""
    weighed = POLICIES[section.algorithm].guided is weighed_by_eta
    return (
        f"{cell.policy}: median {median:.1f}, far below the data's mean, {mean:.1f}: what it does may have left the data; "
        f"train it longer{f', or with a smaller [policy] eta, now {section.eta:g}' * weighed}"
    )


def rivalry_table(rivalry: Sequence[dict[str, Any]]) -> Table:
    table = make_table("probability that a member of the first beats one of the second", "first", "second", "P", "95 %")
    table.columns[1].justify = "left"
    for pair in rivalry:
        table.add_row(pair["first"], pair["second"], f"{pair['improvement']:.2f}", between(pair["interval"], ".2f"))
    return table


def show_evaluation(report: dict[str, Any], curve: bool) -> None:
    """The tables of an evaluation, and for each policy its protocol and what it cost."""
    results, entries = report["cells"], overall(report["summary"])
    show_table(score_table(results[0], entries[0]["summary"]) if len(results) == 1 else policy_table(entries, curve))
    last = {of_policy(cell, curve): cell for cell in results}
    if report["rivalry"]:
        show_table(rivalry_table(report["rivalry"]))
    for policy, cell in last.items():
        name = f"{policy}: " if len(last) > 1 else ""
        weights = {other["step"]: other["protocol"]["w"] for other in results if of_policy(other, curve) == policy}
        early = [step for step, w in weights.items() if w != cell["protocol"]["w"]]  # no label was learned before
        told = f", but w 0 until step {max(early)}" if early else ""
        say(name + protocol_line(cell["protocol"] | ({"step": None} if curve else {}), len(cell["pairs"])) + told)
        say(f"{name}training cost: {account_line(cell['accounting'])}")


def swap_tables(report: dict[str, Any]) -> Iterator[Table]:
    """Scores over pairs of members, and their change against the guidance of training."""
    scores = make_table("scores (0 to 100), statistics over pairs of members", "policy", "guidance", "seeds", "pairs")
    for column in summary_cells(report["summary"][0]["summary"]):
        scores.add_column(column, justify="right")
    columns = ("median, 95 %", "range", "IQR, 95 %", "IQR in %", "std, 95 %", "p of spread", "P(better), 95 %")
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
    """A row of the table of changes; a single member has no spread, few have no interval."""
    first, second = f"{change['median']:+.1f}", between(change["range"], "+.1f")
    if "iqr" not in change:
        return [first, second, "-", "-", "-", "-", "-"]
    cells = {}
    for key in ("median", "iqr", "std", "improvement"):
        form, ends = ".2f" if key == "improvement" else "+.1f", (change["intervals"] or {}).get(key)
        figure = "-" if change[key] is None else f"{change[key]:{form}}"
        cells[key] = figure + ("" if ends is None else f" ({between(ends, form)})")
    chance = between(change["iqr_percent_by_chance"], "+.0f")
    percent = "-" if change["iqr_percent"] is None else f"{change['iqr_percent']:+.0f} % (by chance {chance})"
    p = number(change["spread_p"], 3)
    return [cells["median"], second, cells["iqr"], percent, cells["std"], p, cells["improvement"]]


def member_table(cell: dict[str, Any], parts: dict[str, Any]) -> Table:
    """Scores of each policy member under each guidance member, and what of their spread comes from which."""
    columns = guidance_seeds(cell)
    table = make_table(
        f"{cell['policy']} under {cell['guidance']}", "policy", *(f"guidance {seed}" for seed in columns)
    )
    for member in dict.fromkeys((pair["policy_member"], pair["policy_seed"]) for pair in cell["pairs"]):
        found = {pair["guidance_seed"]: pair["score"] for pair in cell["pairs"] if pair["policy_member"] == member[0]}
        table.add_row(str(member[1]), *(number(found.get(seed)) for seed in columns))
    best = parts["best_guidance"]
    lines = [f"guidance {best['seed']} served best over all policies: mean {best['mean']:.1f} (online selection)"]
    if parts["std"] is not None:
        shares = [
            f"{share['std']:.1f} from the {name}" + (f" ({between(share['interval'])})" if share["interval"] else "")
            for name, share in parts["std"].items()
        ]
        lines.insert(0, f"spread of scores, as std (95 %): {', '.join(shares)}")
    table.caption = "; ".join(lines)
    return table


def summary_cells(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "median": number(summary["median"]),
        "IQR": number(summary["iqr"]),
        "IQM": number(summary["iqm"]),
        "IQM 95 %": between(summary["iqm_interval"]),
        "range": between(summary["range"]),
        "mean": number(summary["mean"]),
        "std": number(summary["std"]),
    }


TEMPERATURES = {"all": "", "start": " of the first noise", "steps": " of all but the first noise"}


def choice(how: dict[str, Any]) -> list[str]:
    """What a guidance, or none, has to do with an action, in the words of a protocol."""
    parts = []
    if how["guidance"] is None:
        parts.append("ranked by none, 1 candidate")
    elif how["guide"] != "gradient":
        softmax = f" at inverse temperature {how['weight_temperature']:g}" if how["selection"] == "softmax" else ""
        parts.append(f"{how['selection']}{softmax} of {how['candidates']} by {how['guidance']}")
    if how["guidance_weight"] > 0:
        parts.append(f"{how['guidance_weight']:g} x gradient of {how['guidance']}")
    return parts


def protocol_line(how: dict[str, Any], *members: int) -> str:
    """The protocol of an evaluation in one line. members: how many a policy has, or each of several."""
    counts = " or ".join(map(str, sorted(set(members))))
    parts = [f"{how['environment']}, {counts} members x {how['episodes']} episodes, seed {how['seed']}", *choice(how)]
    if how["w"] > 0:
        parts.append(f"w {how['w']:g}")
    parts.append(f"temperature {how['temperature']:g}" + TEMPERATURES[how.get("temperature_on", "all")])
    if how["step"] is not None:
        early = f"weights of step {how['step']} of {how['steps']} (online selection, if chosen by score)"
        parts.append("last weights" if how["step"] == how["steps"] else early)
    drawn = "members and start states" if how["episodes"] > 1 else "members"
    parts.append(f"intervals resample {drawn}" if max(members) >= FEWEST else f"no intervals below {FEWEST} members")
    parts += ["an ensemble is one for all members: what is said of it holds for it alone"] * (how["ensemble"] != "none")
    parts += [] if how["repeatable"] else ["not repeatable: the environment differs from itself under one seed"]
    parts += [f"{how['products']} products"] if how["products"] != "default" else []
    parts += [f"without effect here: {', '.join(how['no_effect'])}"] if how["no_effect"] else []
    return ", ".join(parts)


def swap_line(report: dict[str, Any]) -> str:
    """The protocol that the guided cells of a swap share, in one line."""
    cells = [cell for cell in report["cells"] if cell["guidance"] != "none"]
    idle = set.intersection(*(set(cell["protocol"]["no_effect"]) for cell in cells))
    weights = {cell["protocol"]["w"] for cell in report["cells"]} - {0}
    together = [cell["protocol"]["ensemble"] for cell in cells if cell["protocol"]["ensemble"] != "none"]
    shared = {"guidance": "each guidance", "step": None, "w": 0, "no_effect": sorted(idle)}
    how = cells[0]["protocol"] | shared | {"ensemble": next(iter(together), "none")}
    members = {len({pair["policy_member"] for pair in cell["pairs"]}) for cell in cells}
    line = protocol_line(how, *members) + "; under none 1 candidate"
    return line + (f"; w of policies with labels {' or '.join(f'{w:g}' for w in sorted(weights))}" if weights else "")


NAMED_APART = ("algorithm", "scheme", "steps", "snapshots")  # settings with a line of their own


def settings_line(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={settings[key]}" for key in settings if key not in NAMED_APART)


def scale_text(scale: Mapping[str, Any]) -> str:
    return f"x {scale['multiplier']:.4g}" + (f" {scale['offset']:+.4g}" if scale["offset"] else "")


def describe(bundle: Bundle, path: Path, joint: bool = False) -> Iterator[Table]:
    """What a bundle is: experiment, lineage, data, cost, training history. joint: it grew along with a policy."""
    section = bundle["experiment"][bundle["kind"]]
    history = bundle["history"]  # none: the guidance of a joint run, which took the policy's steps
    pace = bundle["experiment"]["policy" if joint else bundle["kind"]]
    settings = section | {"batch_size": pace["batch_size"]}
    data, account = bundle["dataset"], bundle["accounting"]
    table = make_table(f"{path}: {bundle['kind']}", "what", "value")
    facts = {
        "algorithm": section["algorithm"] + (f", {section['scheme']}" if "scheme" in section else ""),
        "experiment": bundle["experiment"]["name"],
        "seeds": ", ".join(map(str, bundle["seeds"])),
        "settings": textwrap.fill(settings_line(settings), 80),
        "steps": f"{bundle['step']} of {pace['steps']}" + ("" if bundle["complete"] else " (unfinished)"),
        "snapshots": "".join(f"@{step}, " for step in bundle["snapshots"]) + "@last",
        "environment": f"{bundle['environment']['id'] or 'none'}, O {bundle['environment']['observation_dim']}, "
        f"A {bundle['environment']['action_dim']}",
        "data": f"{data['source']} {data['name']}, {data['transitions']} transitions, {data['episodes']} episodes",
        "data hash": data["hash"][:16],
        "reward scale": f"{bundle['reward_scale']['rule']}, {scale_text(bundle['reward_scale'])}",
        "reference": "none"
        if bundle["reference"] is None
        else "{:g} is score 0, {:g} is 100".format(*bundle["reference"]),
        "evaluation": textwrap.fill(settings_line(bundle["experiment"]["evaluation"]), 80),
        "training cost": account_line(account),
        "versions": ", ".join(f"{name} {text}" for name, text in bundle["versions"].items()),
        "trained under": describe_guidances(bundle["guidances"]) if bundle["kind"] == "policy" else "data alone",
    }
    if bundle["kind"] == "policy":
        facts["best snapshot"] = "for evaluate --curve to tell (online selection)"
    for name, text in facts.items():
        table.add_row(name, text)
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    yield table
    if history:
        names = metric_names(history)
        log = make_table("training history, mean over members", "step", *names)
        for entry in [*history[: -1 : max(1, len(history) // 10)], history[-1]]:
            log.add_row(str(entry["step"]), *(f"{sum(v) / len(v):.4g}" if (v := entry.get(n)) else "-" for n in names))
        yield log
    if bundle.get("quality"):
        yield quality_table(bundle)
    for inner in bundle["guidances"]:
        yield from describe(inner, path, bundle["experiment"]["policy"]["scheme"] == "joint")


def metric_names(history: Sequence[dict[str, Any]]) -> list[str]:
    """All metrics of a training history; some end or begin with the guidance."""
    return list(dict.fromkeys(name for entry in history for name in entry if name != "step"))


def account_line(account: dict[str, Any]) -> str:
    """What a training run cost, all members together."""
    return (
        f"{account['parameters_trained']:,} parameters trained of {account['parameters_held']:,} held, "
        f"optimizer {account['optimizer_bytes'] / 2**20:.1f} MiB, "
        f"peak {account['peak_bytes'] / 2**20:.1f} MiB above the data, "
        f"{account['seconds']:.1f} s on {account['device']} ({account['products']} products), "
        f"{account['seconds_per_1000_steps']:.2f} s per 1,000 steps"
    )


def describe_guidances(bundles: Sequence[Bundle]) -> str:
    """The lineage of a policy, a guidance a line."""
    lines = [
        f"{bundle['experiment']['guidance']['algorithm']} guidance, step {bundle['step']}, seeds "
        f"{', '.join(map(str, bundle['seeds']))}"
        for bundle in bundles
    ]
    return "\n".join(lines) or "no guidance"


# --- pictures and film --------------------------------------------------------------------------------------------

INK, SHADE = "black", "0.75"  # pictures read alike in black and white, and by colour-blind people
MARKERS = "osD^vP*X"
PICTURES = (".png", ".svg", ".pdf")


@contextmanager
def picture(path: Path, title: str, width: float, height: float) -> Iterator[Figure]:
    """A figure under a title, written as PNG, SVG or PDF by the ending of `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # names are no formulas
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(textwrap.fill(printable(title), int(width * 14)), fontsize=9)
        yield figure
        with written_whole(path, "choose another --plot") as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])


def draw_dataset(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    """Lines for the dataset, where all policies learned from one."""
    for kind, style in zip(KINDS, (":", "--"), strict=True):
        scores = {result["dataset"][f"{kind}_score"] for result in results}
        if len(scores) == 1:
            axes.axhline(scores.pop(), color="0.5", linestyle=style, label=f"dataset {kind}")


def draw_legend(figure: Figure) -> None:
    columns = max(1, int(figure.get_figwidth() / 2.2))  # inches, enough for a bundle's name
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def plot_scores(path: Path, report: dict[str, Any]) -> None:
    """Score of each member, an episode a dot, beside the median of a policy's members and the dataset."""
    results = report["cells"]
    names = ", ".join(cell["policy"] for cell in results)
    judges = list(dict.fromkeys(cell["protocol"]["guidance"] for cell in results))
    how = results[0]["protocol"] | {"guidance": judges[0] if len(judges) == 1 else " or ".join(map(str, judges))}
    if len({cell["step"] for cell in results}) > 1:
        how["step"] = None
    title = f"{names}: {protocol_line(how, *(len(cell['pairs']) for cell in results))}"
    ticks: dict[float, str] = {}
    with picture(path, title, max(7, 0.4 * sum(len(cell["pairs"]) + 1 for cell in results)), 4.5) as figure:
        axes = figure.add_subplot()
        for cell, entry in zip(results, overall(report["summary"]), strict=True):
            left = len(ticks) and max(ticks) + 2
            for x, pair in enumerate(cell["pairs"], start=int(left)):
                episodes, first = normalized_score(pair["returns"], cell["protocol"]["reference"]), x == 0
                axes.plot(np.full(len(episodes), x), episodes, ".", color=SHADE, label="episode" if first else None)
                axes.plot(x, pair["score"], "D", color=INK, label="member (mean of its episodes)" if first else None)
                ticks[x] = str(pair["policy_seed"])
            label = "" if left else "median of members"
            axes.hlines(entry["summary"]["median"], left - 0.4, max(ticks) + 0.4, color=INK, linewidth=1, label=label)
        draw_dataset(axes, results)
        axes.set_xticks(list(ticks), list(ticks.values()))
        below = "seed" if len(results) == 1 else f"seeds of {names}, from left to right"
        axes.set(xlabel=textwrap.fill(printable(below), int(figure.get_figwidth() * 11)), ylabel="normalized score")
        draw_legend(figure)


def plot_curve(path: Path, report: dict[str, Any]) -> None:
    """Score over training steps, for each policy: members (if it is alone), their median, the interquartile range."""
    results = report["cells"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for cell in results:
        curves.setdefault(of_policy(cell, True), []).append(cell)
    counts = [len(cell["pairs"]) for cell in results]
    title = f"{', '.join(curves)}: {protocol_line(results[0]['protocol'] | {'step': None}, *counts)}"
    with picture(path, title, 7, 4.5) as figure:
        axes = figure.add_subplot()
        for (name, points), marker in zip(curves.items(), MARKERS * len(curves), strict=False):
            steps = [point["step"] for point in points]
            scores = np.array([[pair["score"] for pair in point["pairs"]] for point in points])  # (steps, S)
            if len(curves) == 1:
                axes.plot(steps, scores, color=SHADE, linewidth=1)
            label = "median of members" if len(curves) == 1 else name
            (line,) = axes.plot(
                steps, np.median(scores, 1), color=INK if len(curves) == 1 else None, marker=marker, label=label
            )
            low, high = np.percentile(scores, [25, 75], axis=1)
            label = "interquartile range" if points is next(iter(curves.values())) else ""
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, label=label, linewidth=0)
        draw_dataset(axes, results)
        axes.set(xlabel="gradient steps", ylabel="normalized score")
        draw_legend(figure)


def plot_history(path: Path, bundle: Bundle, name: Path) -> None:
    """Training history of a bundle: each metric over gradient steps, members and their mean."""
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
    cells = {(cell["policy"], cell["guidance"]): cell for cell in report["cells"]}
    policies = list(dict.fromkeys(policy for policy, _ in cells))
    guidances = list(dict.fromkeys(guidance for _, guidance in cells))
    scores = {key: np.array([pair["score"] for pair in cell["pairs"]]) for key, cell in cells.items()}
    found = {(entry["policy"], entry["guidance"]): entry["summary"] for entry in overall(report["summary"])}
    middle = np.array([[found[p, g]["median"] if (p, g) in found else np.nan for g in guidances] for p in policies])
    heights = 1 + 0.45 * len(policies), 3.2
    with picture(path, swap_line(report), 2 + 1.5 * len(guidances), sum(heights) + 0.5) as figure:
        matrix, boxes = figure.subplots(2, 1, height_ratios=heights)
        matrix.imshow(middle, cmap="cividis", aspect="auto")
        middling = (np.nanmin(middle) + np.nanmax(middle)) / 2
        for (row, p), (column, g) in product(enumerate(policies), enumerate(guidances)):
            if (p, g) in scores:
                mark = " *" if cells[p, g]["warnings"] else ""
                text = f"{middle[row, column]:.1f}{mark}\nIQR {number(found[p, g]['iqr'])}"
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
        boxes.set_xlim(-0.5, len(guidances) - 0.5)  # as the columns of the matrix
        boxes.set_title("score of every pair of members", fontsize=8)
        boxes.set(ylabel="normalized score")
        draw_legend(figure)


FRAME_EVERY = 3  # steps: at the 60 per second of PyBullet, 20 frames per second


def film(cell: Cell, seed: int | None, path: Path, workers: Workers) -> None:
    """Play one episode of the member with this seed (None: the first) and write it as a GIF, figures in each frame."""
    from PIL import Image, ImageDraw

    from mdpt import models

    seeds = cell.bundle["seeds"]
    if seed is not None and seed not in seeds:
        raise MdptError(f"--member {seed}: the seeds in {cell.policy} are {', '.join(map(str, seeds))}")
    pair = cell.pairs[0 if seed is None else seeds.index(seed)]
    once = replace(cell, pairs=[pair], section=cell.section.model_copy(update={"episodes": 1}))
    tasks = list(cut_into_tasks(once, models.choose_products()))
    frames = []
    with progress("film", cell.bundle["environment"]["max_episode_steps"]) as show:

        def look(step: int, total: float, pixels: Array) -> None:
            frame = Image.fromarray(pixels)
            score = float(normalized_score(np.array(total), cell.bundle["reference"]))
            text = f"return {total:.1f}, score {score:.1f}"
            label = f"seed {seeds[pair[0]]}, step {step}\n{text}"
            ImageDraw.Draw(frame).text((6, 4), label, fill="white", stroke_width=1, stroke_fill="black", font_size=14)
            frames.append(frame)
            show(step, text)

        def shoot(task: Play, watch: Watch) -> None:
            models.play(task, watch, look=look, every=FRAME_EVERY)

        list(parallel(shoot, tasks, replace(workers, count=1, cluster=None), 1))
    with written_whole(path, "choose another --video") as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)


def show_bundle(path: Path, plot_file: Path | None) -> None:
    """Describe a bundle, and draw its training history if asked to."""
    from mdpt.models import read_bundle

    bundle = read_bundle(path)
    if plot_file is not None:
        plot_history(plot_file, bundle, path)
    for table in describe(bundle, path):
        show_table(table)


# --- commands -----------------------------------------------------------------------------------------------------

SPINS = "3000"  # turns a thread waits awake: the default, 300,000 and more, starves any other run on the same cores
INTERRUPTED = 130


class Commands(TyperGroup):
    """Turns a user's mistake, or a signal, into one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if "OMP_WAIT_POLICY" not in os.environ:  # read when torch loads
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # letters that its encoding lacks
        caught: list[int] = []

        def stop(number: int, frame: Any) -> None:
            caught.append(number)
            raise KeyboardInterrupt

        with on_signals(stop):
            try:
                code = super().main(*args, **kwargs | {"standalone_mode": False})
                if code == INTERRUPTED:  # typer's answer to Ctrl-C
                    raise KeyboardInterrupt
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (`explain` raises what it does not know)
                with on_signals(lambda number, frame: None):  # once is enough
                    code = fail(explain(error, caught))
        sys.exit(code if isinstance(code, int) else 0)


def explain(error: BaseException, caught: Sequence[int]) -> Exception:
    """What to tell the user of an error, or of a signal that was caught, whatever it made fail. Raises: any other."""
    if caught:
        told = error if isinstance(error, Interrupted) else Interrupted()
        told.code = 128 + caught[0]
        return told
    if isinstance(error, MdptError | typer.TyperException):
        return error
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return Interrupted()
    if isinstance(error, OSError):
        return MdptError(f"{error.filename or 'the output'}: {error.strerror or error}")
    if isinstance(error, Exception) and out_of_memory(error):
        return MdptError("not enough memory; lower batch_size, hidden, candidates, or the number of seeds")
    raise error


def out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on CUDA, or torch on a CPU (a plain RuntimeError) says so, or cannot even count the bytes."""
    told = any(text in str(error) for text in ("can't allocate", "size calculation overflowed"))
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or told


def fail(error: Exception) -> int:
    """Say it on stderr, whatever has become of the streams; returns the exit code."""
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    with suppress(OSError):
        print(f"mdpt: {printable(text if len(text) < LONGEST else text[:LONGEST] + ' ...')}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # Python would try once more at its end, and complain
        with suppress(AttributeError, OSError, ValueError), open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), sys.stdout.fileno())
    return getattr(error, "code", 1)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def need_tensorboard(folder: Path | None) -> Path | None:
    if folder is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise MdptError("--tensorboard needs the package tensorboard: pip install 'mdpt[tensorboard]'") from error
    return folder


def as_argument(path: Path) -> str:
    """A file's name as a shell is to pass it, where it is no option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


ExperimentFile = Annotated[Path, typer.Argument(help="experiment file, TOML")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="override a field of the experiment file, or without VALUE leave it out; repeatable",
    ),
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="one member each, trained side by side")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu or cuda")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="bundle to write; named after the experiment, algorithm and scheme by default"),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="begin anew, and replace files that exist; results of the same bundles and settings are kept",
    ),
]
Extend = Annotated[bool, typer.Option("--extend", help="let an unfinished run have more steps than it was begun with")]
Board = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        metavar="FOLDER",
        help="the training history as it grows, for TensorBoard",
        callback=need_tensorboard,
    ),
]
Count = Annotated[int, typer.Option(min=1, metavar="N", help="processes that simulate; changes no result")]
Timeout = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="how long one step of an environment may take")
]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="play on the workers of this Dask scheduler, which must be trusted"),
]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="trust this module, which makes the environment; repeatable"),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="write all figures, each episode's return included; kept as cells finish"
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="evaluation.KEY=VALUE",
        help="override a field of [evaluation], or without VALUE leave it out; repeatable",
    ),
]
Episodes = Annotated[int | None, typer.Option(metavar="N", help="episodes of each pair of members")]
Candidates = Annotated[
    int | None, typer.Option(metavar="N", help="actions drawn per state, of which the guidance takes one")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw what is shown: .png, .svg or .pdf")]
EvaluationSeed = Annotated[int | None, typer.Option("--seed", metavar="N", help="of start states and sampling noise")]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LONG = 600.0  # seconds
LONGEST = 1_500  # letters of what is told of a mistake, which may echo what it is about


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
    extend: Extend = False,
    board: Board = None,
    describe_only: Annotated[
        bool, typer.Option("--describe-data", help="say what the data are; train nothing")
    ] = False,
    workers: Count = CORES,
    timeout: Timeout = LONG,
) -> None:
    """Train a guidance, from the data alone."""
    from mdpt.models import train_guidance

    run = load_run(experiment, overrides, seeds, device)
    if describe_only:
        show_table(data_table(load_data(run.data, Workers(workers, timeout))))
        return
    path = out or Path(f"{run.name}-{run.guidance.algorithm}.guidance.pt")
    with claimed(overwrite, {"--out": path}, [experiment, run.data.path]):
        begun = unfinished(path, board, overwrite, extend)
        dataset = load_data(run.data, Workers(workers, timeout))
        title = f"guidance {run.guidance.algorithm}"
        with training_run(title, run, run.guidance.steps, path, begun, extend, board) as training:
            bundle = train_guidance(run, dataset, training)
        if not bundle["quality"]:
            warn(f"{path}: no episode is held out, so nothing judges it; [data] held_out above 0 does")
        else:
            show_table(quality_table(bundle))
            if low := low_values(bundle):
                warn(
                    f"{path}: V of seed {', '.join(map(str, low))} has not come from 0 to the returns: values have not "
                    "spread over the episodes yet; raise steps, tau or learning_rate"
                )
    same = [part for override in overrides or [] for part in ("--set", override)]
    same += ["--seeds", seeds] if seeds else []
    command = ["mdpt", "policy", as_argument(experiment), "--guidance", str(path), *same]
    say(f"next: {shlex.join(command)}")


def read_teachers(files: Sequence[Path], run: Experiment) -> list[Bundle]:
    """The guidances that teach the policy of an experiment. Raises: MdptError where they cannot, before data are there."""
    from mdpt.models import check_teachers, pair_members, read_guidances

    teachers: list[Bundle] = []
    for file in dict.fromkeys(files):
        teachers += (found := read_guidances(file))
        for teacher in found:
            if not teacher["complete"]:
                warn(f"{file}: this guidance is unfinished, at step {teacher['step']}")
    if teachers:
        check_teachers(teachers[0], teachers, run.policy.ensemble)
        if run.policy.ensemble == "none":
            pair_members(len(run.seeds), len(teachers[0]["seeds"]))
    return teachers


def policy_problems(section: PolicySection) -> Iterator[str]:
    """What to warn of before a policy learns."""
    from mdpt.models import learns_labels, learns_under_guidance, schedule_problem

    if section.scheme != "unguided" and not learns_under_guidance(section):
        yield (
            f"the guidance never enters the loss of {section.algorithm} with eta {section.eta:g}, advantage_weight "
            f"{section.advantage_weight}, label_dropout {section.label_dropout:g}, guidance_from {section.guidance_from:g} "
            f"and guidance_until {section.guidance_until:g}: this policy learns as without it"
        )
    if learns_labels(section) and section.guidance_until < 1:
        yield (
            f"labels are learned until guidance_until {section.guidance_until:g} of the steps alone and grow stale "
            "after it, but still act: evaluation.w = 0 leaves them out"
        )
    if problem := schedule_problem(section):
        yield f"noise_schedule {section.noise_schedule} with {section.diffusion_steps} diffusion_steps: {problem}"


@app.command()
def policy(
    experiment: ExperimentFile,
    guidance_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--guidance", metavar="FILE", help="frozen guidance, or a policy that holds one; repeatable for an ensemble"
        ),
    ] = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    device: Device = None,
    out: Out = None,
    overwrite: Overwrite = False,
    extend: Extend = False,
    board: Board = None,
    workers: Count = CORES,
    timeout: Timeout = LONG,
) -> None:
    """Train a diffusion policy under a frozen guidance."""
    from mdpt.models import check_teachers, train_policy

    run = load_run(experiment, overrides, seeds, device)
    scheme = run.policy.scheme
    if scheme == "guidance-first" and not guidance_files:
        raise MdptError(
            "scheme guidance-first needs --guidance FILE, written by `mdpt guidance`; "
            "without one, --set policy.scheme=joint or =unguided"
        )
    if scheme != "guidance-first" and guidance_files:
        raise MdptError(f"scheme {scheme} takes no --guidance; leave it out, or --set policy.scheme=guidance-first")
    suffix = "" if scheme == "guidance-first" else f"-{scheme}"
    path = out or Path(f"{run.name}-{run.policy.algorithm}{suffix}.policy.pt")
    teachers = read_teachers(guidance_files or [], run)
    for text in policy_problems(run.policy):
        warn(text)
    with claimed(overwrite, {"--out": path}, [experiment, run.data.path, *(guidance_files or [])]):
        begun = unfinished(path, board, overwrite, extend)
        dataset = load_data(run.data, Workers(workers, timeout))
        known = {"environment": asdict(dataset.environment), "dataset": dataset.identity}
        ours = {"kind": "policy", "experiment": run.model_dump(), **known}
        for warning in check_teachers(ours, teachers, run.policy.ensemble):
            warn(warning)
        title = f"policy {run.policy.algorithm}"
        with training_run(title, run, run.policy.steps, path, begun, extend, board) as training:
            train_policy(run, dataset, teachers, training)
    trusted = ["--import", module] if (module := imported_for(dataset.environment.id or "")) else []
    say(f"next: {shlex.join(['mdpt', 'evaluate', as_argument(path), *trusted])}")


@app.command()
def evaluate(
    policies: Annotated[list[Path], typer.Argument(help="policy bundles; with --describe also a guidance bundle")],
    infer_guidance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="bundle whose guidance acts, or none; by default what is inside the policy's; repeatable for an ensemble",
        ),
    ] = None,
    settings: Settings = None,
    episodes: Episodes = None,
    candidates: Candidates = None,
    seed: EvaluationSeed = None,
    json_file: Json = None,
    curve: Annotated[bool, typer.Option("--curve", help="score every snapshot")] = False,
    plot_file: Plot = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE.gif", help="film one episode, instead of scoring")] = None,
    member: Annotated[int | None, typer.Option(metavar="SEED", help="the member to film; by default the first")] = None,
    overwrite: Overwrite = False,
    describe_only: Annotated[bool, typer.Option("--describe", help="say what the bundle is; run nothing")] = False,
    data_file: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="judge offline, on held-out episodes of this file")
    ] = None,
    imports: Imports = None,
    workers: Count = CORES,
    timeout: Timeout = LONG,
    cluster: Cluster = None,
) -> None:
    """Score policies in their environment, their candidates ranked by a guidance."""
    given, where = evaluation_settings(settings, episodes, candidates, seed), Workers(workers, timeout, cluster)
    check_ending("--plot", plot_file, PICTURES)
    check_ending("--video", video, [".gif"])
    if describe_only and (curve or json_file or infer_guidance or given or video or data_file):
        raise MdptError("--describe runs nothing and writes no scores; it goes with --plot alone")
    if video is not None and (curve or json_file or plot_file or episodes):
        raise MdptError(
            "--video films one episode and does nothing else; leave out --curve, --episodes, --json, --plot"
        )
    if len(policies) > 1 and (describe_only or video):
        raise MdptError(f"{'--describe' if describe_only else '--video'} takes one bundle, got {len(policies)}")
    if member is not None and video is None:
        raise MdptError(f"--member {member}: acts only with --video; leave the option out")
    outputs = {"--json": json_file, "--plot": plot_file, "--video": video}
    with claimed(overwrite, outputs, [*policies, *(infer_guidance or []), data_file]):
        if describe_only:
            show_bundle(policies[0], plot_file)
            return
        paths = [name for path in dict.fromkeys(policies) for name in (snapshots(path) if curve else [path])]
        guide = read_guide(infer_guidance or [])
        cells = [read_cell(path, guide, given) for path in paths]
        check_comparable(cells)
        tell(cells)
        missing = [cell for cell in cells if cell.bundle["environment"]["id"] is None]
        if missing or data_file is not None:
            judge_apart(
                cells, missing, data_file, json_file, overwrite, bool(video or plot_file or episodes or cluster)
            )
            return
        check_imports(cells, imports or [])
        if video is not None:
            film(cells[0], member, video, where)
            return
        report = play_cells(cells, json_file, overwrite, where)
        report["rivalry"] = rivals(report["cells"], curve)
        store_json(json_file, report)
        if plot_file is not None:
            (plot_curve if curve else plot_scores)(plot_file, report)
        show_evaluation(report, curve)
        for cell, result, entry in zip(cells, report["cells"], overall(report["summary"]), strict=True):
            if text := far_below_the_data(cell, result, entry["summary"]["median"]):
                warn(text)


def judge_apart(
    cells: Sequence[Cell],
    missing: Sequence[Cell],
    data_file: Path | None,
    json_file: Path | None,
    overwrite: bool,
    played: bool,
) -> None:
    """An evaluation without playing: tables, and a file of the same figures."""
    for cell in missing:
        warn(f"{cell.policy}: cannot be scored: {cell.bundle['dataset']['no_environment']}")
    if played:
        raise MdptError("nothing is played offline; leave out --video, --plot, --episodes, --cluster")
    if json_file is not None:
        refuse_to_overwrite(json_file, overwrite)
    report = judge_cells(cells, data_file)
    store_json(json_file, report)
    for result in report["cells"]:
        show_table(offline_table(result))


@app.command()
def swap(
    policies: Annotated[list[Path], typer.Argument(help="policy bundles")],
    guidances: Annotated[
        list[Path] | None,
        typer.Option(
            "--guidance",
            metavar="FILE",
            help="bundle whose guidance acts; repeatable; by default those inside the policies",
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="matched: by position; all: each with each; by default all, up to 2,000 rollouts"
        ),
    ] = None,
    settings: Settings = None,
    episodes: Episodes = None,
    candidates: Candidates = None,
    seed: EvaluationSeed = None,
    json_file: Json = None,
    plot_file: Plot = None,
    overwrite: Overwrite = False,
    imports: Imports = None,
    workers: Count = CORES,
    timeout: Timeout = LONG,
    cluster: Cluster = None,
) -> None:
    """Score every policy member under every guidance member, under none, and under its own."""
    if pairs not in (None, "matched", "all"):
        raise MdptError(f"--pairs {pairs}: expected matched or all")
    check_ending("--plot", plot_file, PICTURES)
    with claimed(overwrite, {"--json": json_file, "--plot": plot_file}, [*policies, *(guidances or [])]):
        cells = plan_swap(policies, guidances or [], pairs, evaluation_settings(settings, episodes, candidates, seed))
        for cell in cells:
            if cell.bundle["environment"]["id"] is None:
                reason = f"{cell.bundle['dataset']['no_environment']}; `mdpt evaluate` says what can be said offline"
                raise MdptError(f"{cell.policy}: cannot be scored: {reason}")
        check_imports(cells, imports or [])
        tell(cells)
        report = play_cells(cells, json_file, overwrite, Workers(workers, timeout, cluster))
        report["verdicts"] = judge_algorithms(report["cells"])
        crossed = [cell for cell in report["cells"] if is_crossed(cell)]
        report["components"] = [split_spread(cell) for cell in crossed]
        store_json(json_file, report)
        if plot_file is not None:
            plot_swap(plot_file, report)
        for cell, parts in zip(crossed, report["components"], strict=True):
            show_table(member_table(cell, parts))
        for table in swap_tables(report):
            show_table(table)
        for line in report["verdicts"]:
            say(line)
        say(swap_line(report))


def evaluation_settings(
    settings: Sequence[str] | None, episodes: int | None, candidates: int | None, seed: int | None
) -> list[str]:
    """All settings of an evaluation in the form of --set."""
    given = {"episodes": episodes, "candidates": candidates, "seed": seed}
    return [*(settings or []), *(f"evaluation.{key}={value}" for key, value in given.items() if value is not None)]


main = app  # of mdpt/__init__.py, where this file stands for the package

if __name__ == "__main__":
    app()
