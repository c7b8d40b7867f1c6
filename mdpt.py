"""The command line of mdpt: what is played and what came of it, statistics, reports, tables, pictures, commands.

Legend for shapes: S policy members, K guidance members, E episodes.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, groupby, pairwise, product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

if __name__ == "mdpt":  # imported from the checkout as a plain file: act as the package that it belongs to
    __path__ = [str(Path(__file__).parent)]

import typer
from typer.core import TyperCommand, TyperGroup


class Lazy(ModuleType):
    """A module that is imported when one of its attributes is first read, so that `mdpt --help` imports little."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import numpy as np
    import pydantic
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from mdpt import data, models
    from mdpt.data import Array, Dataset, Experiment, HeldOut, Watch, Workers
    from mdpt.models import Bundle, Inference, Play, Run
else:
    np, pydantic, data, models = map(Lazy, ("numpy", "pydantic", "mdpt.data", "mdpt.models"))

Kind: TypeAlias = Literal["guidance", "policy"]
Text: TypeAlias = str | None  # options that may be left out
Texts: TypeAlias = list[str] | None
File: TypeAlias = Path | None
Files: TypeAlias = list[Path] | None
Number: TypeAlias = int | None

# --- talking to the user ------------------------------------------------------------------------------------------


def make_console(*, stderr: bool = False) -> Console:
    """A Rich console that prints text as it is, without control characters."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(data.printable(text), **options)

    return Plain(stderr=stderr, markup=False, emoji=False)  # names of files are no markup


def say(text: str, *, stderr: bool = False, wrap: bool = False) -> None:
    """Print a text; if `wrap`, in lines that the terminal is wide enough for."""
    make_console(stderr=stderr).print(text, highlight=False, markup=False, soft_wrap=not wrap)


def warn(text: str) -> None:
    warnings.warn(text, data.MdptWarning, stacklevel=2)


@contextmanager
def warnings_printed() -> Iterator[None]:
    """Print each `MdptWarning` inside this block once, as `warning: ...` on stderr."""
    printed: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", data.MdptWarning)
        show_other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if not issubclass(category, data.MdptWarning):
                show_other(message, category, *place, **options)
            elif (text := str(message)) not in printed:
                printed.add(text)
                say(f"warning: {text}", stderr=True)

        warnings.showwarning = show
        yield


def show_table(table: Table) -> None:
    """Print a table between its title and its caption; a narrow terminal breaks names, and cuts no figures."""
    title, caption, table.title, table.caption = table.title, table.caption, None, None
    say(str(title), wrap=True)
    console = make_console()
    names = [column for column in table.columns if not column.no_wrap]
    for column in names:
        column.max_width = NARROW
    narrowest = console.measure(table, options=console.options.update(max_width=1000)).maximum
    for column in names:
        column.max_width = None
    console.width = max(console.width, narrowest)
    console.print(table)
    if caption is not None:
        say(str(caption), wrap=True)


NARROW = 12  # characters of a name that stay together


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise data.MdptError(f"{path}: exists already; choose another name, or --overwrite to replace it")


def check_ending(option: str, path: File, endings: Sequence[str]) -> None:
    if path is not None and path.suffix not in endings:
        *others, last = endings
        raise data.MdptError(f"{option} {path}: expected a {', '.join(others)}{' or ' if others else ''}{last} file")


def plain_files(names: Iterable[str]) -> set[str]:
    """The files that names such as FILE@STEP and FILE#SEED belong to; a name of no file is left out."""
    left = set(names)
    while missing := {name for name in left if not Path(name).exists()}:
        left = left - missing | {name[: max(0, name.rfind("@"), name.rfind("#"))] for name in missing}
    return left


@contextmanager
def progress(title: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr; where stderr is no terminal, a line after a second and at each tenth of the way."""
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
    began, logged, waits = time.perf_counter(), start * 10 // total, True

    def log(done: int, text: str) -> None:
        nonlocal logged, waits
        passed, tenth = time.perf_counter() - began, done * 10 // total
        if tenth > logged or (waits and passed > 1):
            logged, waits = tenth, False
            left = passed / max(1, done - start) * (total - done)
            wait = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            console.print(f"{title}: {done}/{total}  {text}  {wait} left", highlight=False, soft_wrap=True)

    yield log


@contextmanager
def resumable(does: bool) -> Iterator[None]:
    """If `does`, say at an interruption that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if does:
            raise data.Interrupted("interrupted; the same command goes on") from None
        raise


@contextmanager
def about(path: Path | str) -> Iterator[None]:
    """Name a file at the start of error messages that do not name it themselves."""
    try:
        yield
    except data.MdptError as error:
        if data.printable(str(path)) not in str(error):
            error.args = (f"{path}: {error}",)
        raise


@contextmanager
def claimed(overwrite: bool, outputs: dict[str, File], inputs: Iterable[object] = ()) -> Iterator[None]:
    """Check that output files can be written, lock them for this block, and say at its end what was written.

    outputs: files by option. inputs: names of files that are read, also FILE@STEP and FILE#SEED. Raises: MdptError
    for an output that cannot be written, is read by this command, is locked by another process, or exists without
    `overwrite`; options in RESUMABLE check the last themselves.
    """
    used = {os.path.realpath(name): "read by" for name in plain_files(str(name) for name in inputs if name)}
    with ExitStack() as stack:
        for option, path in outputs.items():
            if path is None:
                continue
            if (place := os.path.realpath(path)) in used:
                raise data.MdptError(f"{option} {path}: is {used[place]} this command; choose another")
            used[place] = "another output of"

            def refuse(number: str, output: str = f"{option} {path}") -> None:
                raise data.MdptError(f"{output}: process {number} writes it now; wait for that, or choose another")

            try:
                if path.exists() and not path.is_file():
                    kind = "a folder" if path.is_dir() else "a device or pipe"
                    raise data.MdptError(f"{option} {path}: is {kind}; choose a file")
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(data.locked(path, refuse))
                if option not in RESUMABLE:
                    refuse_to_overwrite(path, overwrite)
                data.temporary_beside(path).unlink()
            except OSError as error:
                raise data.MdptError(
                    f"{option} {path}: cannot be written ({error.strerror}); choose another"
                ) from error
        yield
    for path in filter(None, outputs.values()):
        say(f"wrote {path}")


RESUMABLE = ("--out", "--json")  # options whose file may be what an interrupted run has left


@contextmanager
def training_run(
    kind: Kind,
    run: Experiment,
    device: str,
    path: Path,
    begun: Bundle | None,
    extend: bool,
    board: File,
    workers: Number,
) -> Iterator[Run]:
    """The `Run` of a training command: it saves to `path`, shows progress, and ends after the step at a signal."""
    section = run.guidance if kind == "guidance" else run.policy
    title, (start, history) = f"{kind} {section.algorithm}", (begun.step, begun.history) if begun else (0, [])
    write = (lambda entry: None) if board is None else scalar_writer(board / path.stem, run.seeds, history)
    began, caught = time.perf_counter(), [0]
    with about(path), progress(title, section.steps, start) as bar, data.on_signals(lambda n, _: caught.append(n)):

        def show(entry: models.Entry) -> None:
            write(entry)
            speed = (entry.step - start) / (time.perf_counter() - began)
            bar(entry.step, f"loss {sum(entry.metrics['loss']) / len(run.seeds):.4g}, {speed:.0f} steps/s")

        yield models.Run(
            device=device,
            begun=begun,
            extend=extend,
            save=lambda bundle: models.save_bundle(path, bundle),
            show=show,
            interrupted=lambda: caught[-1],
            tell=lambda text: warn(f"{path}: {text}"),
            workers=workers or models.fastest_workers(len(run.seeds), section.steps - start),
        )


def unfinished(path: Path, board: File, overwrite: bool, extend: bool) -> Bundle | None:
    """The unfinished bundle to go on from; None to begin anew. Raises: MdptError if that would overwrite a file."""
    if overwrite or not path.exists():
        if board is not None:
            refuse_to_overwrite(board / path.stem, overwrite)
        return None
    bundle = models.read_bundle(path)
    if bundle.complete:
        end = "; its learning rate has fallen to 0: train anew with more steps" if extend else ""
        raise data.MdptError(
            f"{path}: exists already and is complete{end}; choose another --out, or --overwrite to replace it"
        )
    return bundle


def scalar_writer(
    folder: Path, seeds: Sequence[int], history: Sequence[models.Entry]
) -> Callable[[models.Entry], None]:
    """A function that writes entries of a training history for TensorBoard, one curve for each metric and member.

    history: entries that are written at once; what an earlier run has left in the folder is hidden.
    """
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = lambda _: None  # the next call raises what the writer's thread has raised
    writers: list[SummaryWriter] = []

    def write(*entries: models.Entry) -> None:
        try:
            writer = writers[0] if writers else SummaryWriter(str(folder), purge_step=0)
            writers[:] = [writer]
            for entry in entries:
                for name, values in entry.metrics.items():
                    for seed, value in zip(seeds, values, strict=True):
                        writer.add_scalar(f"{name}/seed {seed}", value, entry.step)
            writer.flush()
        except OSError as error:
            raise data.MdptError(f"--tensorboard {folder}: cannot be written ({error.strerror})") from error

    write(*history)
    return write


def load_data(section: data.DataSection, workers: Workers, spec: data.EnvironmentSpec | None = None) -> Dataset:
    """Load a dataset, showing progress where it is collected or downloaded first, and report its warnings.

    spec: of the environment, if known; else the environment is made to find out.
    """
    with resumable(section.source == "collect"), ExitStack() as stack:
        bars: dict[str, Callable[[int, str], None]] = {}

        def show(title: str, done: int, total: int) -> None:
            if title not in bars:
                stack.close()  # the bar before this one: Rich draws one at a time
                if not (done or total):  # a wait, whose length is not known
                    say(f"{title} ...", stderr=True)
                bars[title] = stack.enter_context(progress(title, max(1, total)))
            bars[title](done, "")

        dataset = data.load_dataset(section, workers, show, spec=spec)
    for text in dataset.warnings:
        warn(text)
    return dataset


def load_run(kind: Kind, path: Path, overrides: Texts, seeds: Text, device: Text) -> tuple[Experiment, str]:
    """The experiment of a training command and the device it runs on, both checked; reports fields that nothing reads."""
    options = {"seeds": None if seeds is None else f"[{seeds}]", "device": device}
    settings = [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
    with about(path):
        run = models.load_experiment(path, settings)
    given = {setting_name(setting) for setting in settings}
    for owner, unread in models.unread_fields(run, kind).items():
        for name in unread:
            if name in given:
                warn(f"--set {name}: not read by {owner}")
        if rest := [name.partition(".")[2] for name in unread if name not in given]:
            say(f"not read by {owner}: {', '.join(rest)}", stderr=True)
    return run, models.pick_device(run.device)


def setting_name(setting: str) -> str:
    """table.key of "table.key=value"."""
    return ".".join(part.strip() for part in setting.partition("=")[0].split("."))


# --- cells: what is played ----------------------------------------------------------------------------------------

OWN = "its own"  # the guidance that a policy was trained under
MANY_ROLLOUTS = 2_000  # above this number, swap pairs members by position unless --pairs says otherwise


@dataclass(frozen=True)
class Guidance:
    """The guidance of a cell: bundles, and how their members act on a policy's members."""

    name: str
    files: Mapping[str, Sequence[Bundle]]  # bundles by file, as given, perhaps with @STEP and #SEED; or by OWN
    ensemble: str | None = None  # rule that makes all members one; "none": one each; None: as [evaluation] says
    crossed: bool = False  # pairs each policy member with each guidance member; else by position

    @property
    def bundles(self) -> list[Bundle]:
        return [bundle for bundles in self.files.values() for bundle in bundles]

    @property
    def seeds(self) -> list[int]:
        return [seed for bundle in self.bundles for seed in bundle.seeds]

    @property
    def algorithm(self) -> str | None:
        return " + ".join(sorted({bundle.experiment.guidance.algorithm for bundle in self.bundles})) or None


NONE = Guidance("none", {})


@dataclass(frozen=True)
class Cell:
    """A policy at a step, its guidance, how it acts, which members are paired, and how many episodes each pair plays."""

    policy: str  # its file, perhaps with @STEP
    guidance: Guidance
    bundle: Bundle
    section: data.EvaluationSection
    how: Inference
    idle: list[str]  # settings that were given and have no effect here
    warnings: list[str]
    pairs: list[tuple[int, int | None]]  # policy member, guidance member

    @property
    def rollouts(self) -> int:
        return len(self.pairs) * self.section.episodes

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the files that the cell comes from."""
        named = {self.policy: [self.bundle], **self.guidance.files}
        return {
            file: bundles[0].digest for name, bundles in named.items() if name != OWN for file in plain_files([name])
        }

    @property
    def shares(self) -> list[tuple[int, list[tuple[int | None, int]]]]:
        """The cell's tasks: a policy member and its rollouts (guidance member, episode), which act in one batch.

        A task has more rollouts the more the cell has. The number of workers changes nothing, so results do not
        depend on it.
        """
        size = min(max(self.rollouts // 8, 5), 20)
        shares = []
        for i, pairs in groupby(self.pairs, key=lambda pair: pair[0]):
            rollouts = list(product([j for _, j in pairs], range(self.section.episodes)))
            count = math.ceil(len(rollouts) / size)
            bounds = [len(rollouts) * k // count for k in range(count + 1)]
            shares += [(i, rollouts[start:stop]) for start, stop in pairwise(bounds)]
        return shares

    @property
    def guidance_text(self) -> str:
        """The guidance in the words of a protocol."""
        guidance, rule, name = self.guidance, self.how.ensemble, self.guidance.name
        if name == OWN:
            name = f"{OWN} {guidance.algorithm} guidance"
        elif rule != "none":
            name = ", ".join(guidance.files)
        whose = f"each position's {len(guidance.bundles)}" if self.how.by_position else f"all {len(guidance.seeds)}"
        whole = f"the {rule} of {whose} members of " if rule != "none" else ""
        return data.printable(whole + name)


def make_cell(policy: str, bundle: Bundle, guidance: Guidance, settings: Sequence[str]) -> Cell:
    """The cell of a policy and a guidance, under settings such as "evaluation.episodes=5".

    Raises: MdptError if the two do not fit together, or a setting is wrong.
    """
    if wrong := [setting for setting in settings if not setting.startswith("evaluation.")]:
        raise data.MdptError(f"--set {wrong[0]}: only evaluation.KEY=VALUE can be set here")
    run = data.check_experiment(policy, bundle.experiment.model_dump(), settings)
    if guidance.ensemble is not None:
        run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"ensemble": guidance.ensemble})})
    guidance = guidance if guidance.bundles else NONE
    members = range(len(bundle.seeds))
    pairs: list[tuple[int, int | None]] = [(i, None) for i in members]
    try:
        how, acts = models.pick_inference(run, bool(guidance.bundles), bundle.step)
        models.check_ensemble(guidance.bundles, how.ensemble)
        models.check_positions(guidance.bundles, how, len(members))
        notes = list(dict.fromkeys(text for each in guidance.bundles for text in models.check_fit(bundle, each)))
        if guidance.bundles and how.ensemble == "none":
            count = len(guidance.seeds)
            crosses, by_position = product(members, range(count)), models.pair_members
            pairs = list(crosses if guidance.crossed else enumerate(by_position(len(members), count)))
    except data.MdptError as error:
        raise data.MdptError(f"{policy}, {guidance.name}: {error}") from error
    given = {setting_name(setting).removeprefix("evaluation.") for setting in settings}
    idle = [key for key, does in acts.items() if key in given and not does]
    return Cell(policy, guidance, bundle, run.evaluation, how, idle, notes, pairs)


def read_cell_guidance(names: Sequence[str]) -> Guidance | None:
    """The guidance in the files of these names, or in "none"; without names None: each policy's own."""
    if "none" in names:
        models.read_named(names)  # raises if there are other names
        return NONE
    files = {name: models.read_guidances(Path(name)) for name in names}
    return Guidance(", ".join(files), files) if files else None


def read_cell(path: Path, guidance: Guidance | None, settings: Sequence[str]) -> Cell:
    """The cell of a policy bundle and a guidance; None: the one inside the bundle."""
    bundle = models.read_policy(path)
    return make_cell(str(path), bundle, guidance or Guidance(OWN, {OWN: bundle.guidances}), settings)


def one_samples(cells: Sequence[Cell], settings: Sequence[str]) -> list[Cell]:
    """One sample of each policy, for cells in which a guidance acts."""
    acts = [cell for cell in cells if cell.how.candidates > 1 or cell.how.guidance_weight > 0]
    return [make_cell(cell.policy, cell.bundle, NONE, settings) for cell in acts]


def guidance_snapshots(names: Sequence[str]) -> dict[str, list[str]]:
    """For each name FILE@all the names of all snapshots of the guidance in FILE, for each other name itself.

    Raises: MdptError if there are none: a policy bundle holds only the last of the guidance that it learned under.
    """
    found = {}
    for name in names:
        file = name.removesuffix("@all")
        if file == name or Path(name).exists():
            found[name] = [name]
            continue
        bundle = models.read_bundle(Path(file))
        if not bundle.snapshots or (bundle.kind == "policy" and not bundle.joint):
            raise data.MdptError(f"{name}: {file} holds no snapshots of a guidance; name a guidance bundle")
        found[name] = [f"{file}@{step}" for step in bundle.snapshots]
    return found


def snapshots(path: Path) -> list[Path]:
    """The names of all snapshots of a policy bundle, in order. Raises: MdptError if there are none."""
    if (mark := path.name.rfind("@")) > 0 and path.with_name(path.name[:mark]).is_file():
        raise data.MdptError(f"{path}: --curve scores every snapshot; leave out {path.name[mark:]}")
    if not (steps := models.read_policy(path).snapshots):
        raise data.MdptError(f"{path}: holds no snapshots yet; its training command goes on")
    return [path.with_name(f"{path.name}@{step}") for step in steps]


def warn_of_cells(cells: Sequence[Cell]) -> None:
    """Warn of unfinished bundles, and of guidance that learned from other data than its policy."""
    for cell in cells:
        named = [(cell.policy, cell.bundle), *((cell.guidance.name, bundle) for bundle in cell.guidance.bundles)]
        for name, bundle in named:
            if name != OWN and not bundle.complete:
                warn(f"{name}: this {bundle.kind} is unfinished, at step {bundle.step}")
    for text in [text for cell in cells for text in cell.warnings]:
        warn(text)


def check_imports(cells: Sequence[Cell], trusted: Sequence[str]) -> None:
    """Raises: MdptError if an environment is made by a module that the user has not named with --import."""
    for cell in cells:
        environment = cell.bundle.environment.id
        module = data.imported_for(environment or "")
        if module and module not in trusted:
            raise data.MdptError(
                f"{cell.policy}: its environment {environment} imports the module {module}, and so runs its code; "
                f"if you trust it, add --import {module}"
            )


def cut_into_tasks(cell: Cell, products: models.Products) -> Iterator[Play]:
    """The tasks of a cell for workers, each some rollouts of one policy member."""
    for i, rollouts in cell.shares:
        judges = [i] if cell.how.by_position else sorted({j for j, _ in rollouts if j is not None})
        bundles = cell.guidance.bundles
        yield models.Play(
            name=cell.policy,
            policy=models.select_members(cell.bundle, [i]),
            guidances=tuple(models.select_members(each, judges or range(len(each.seeds))) for each in bundles),
            judges=tuple(judges.index(j) for j, _ in rollouts if j is not None),
            episodes=tuple(episode for _, episode in rollouts),
            how=cell.how,
            seed=cell.section.seed,
            products=products,
        )


def plan_swap(policies: Sequence[Path], guidances: Sequence[str], pairs: Text, settings: Sequence[str]) -> list[Cell]:
    """The cells of a swap: each policy under its own guidance, none, each named guidance, and ensembles of these.

    A file named twice counts once. guidances: empty means those inside the policies; FILE@all is each snapshot of FILE,
    without ensembles. pairs: "all" pairs each policy member with each member of a named guidance, "matched" pairs them by
    position; None: "all" up to MANY_ROLLOUTS. Beside ensembles of members that are not crossed, `first_member`. What
    acts as the policy's own guidance does is left out.

    Raises: MdptError naming the files if they do not fit together or cannot be compared.
    """
    bundles = {str(path): models.read_policy(path) for path in policies}
    columns = guidance_snapshots([str(Path(name)) for name in guidances])
    chosen = read_cell_guidance(list(chain.from_iterable(columns.values())))
    named = dict(chosen.files) if chosen else {}
    series = {name for names in columns.values() if len(names) > 1 for name in names}
    for name, bundle in bundles.items() if chosen is None else ():
        others = [other for each in named.values() for other in each]
        if not all(any(models.same_weights(inner, other) for other in others) for inner in bundle.guidances):
            named[name] = bundle.guidances
    if chosen is None and not named:
        raise data.MdptError(f"{', '.join(bundles)}: no guidance inside; name one with --guidance FILE")

    def plan(crossed: bool) -> list[Cell]:
        cells = []
        for name, bundle in bundles.items():
            alone, rule = make_cell(name, bundle, NONE, settings), bundle.experiment.policy.ensemble
            own = make_cell(name, bundle, Guidance(OWN, {OWN: bundle.guidances}, rule), settings)
            single = [Guidance(file, {file: each}, "none", crossed) for file, each in named.items() if len(each) == 1]
            joined = ensembles({file: named[file] for file in named if file not in series}, alone.section, rule)
            others = [*single, *joined]
            if joined and not crossed and alone.section.ensemble_over == "all":
                controls = [first_member(each) for each in single if each.name not in series]
                others += [control for control in controls if control.name not in named]
            made = [make_cell(name, bundle, guidance, settings) for guidance in others]
            kept = [cell for cell in made if cell.guidance.name in series or not act_alike(cell, own)]
            cells += [*[own] * bool(bundle.guidances), alone, *kept]
        return cells

    cells = plan(pairs != "matched")
    check_comparable(cells)
    if pairs is None and sum(cell.rollouts for cell in cells) > MANY_ROLLOUTS:
        sizes = [(len(cell.guidance.seeds), len(cell.bundle.seeds)) for cell in cells if cell.guidance.crossed]
        if all(count in (1, members) for count, members in sizes):
            return plan(False)
    return cells


def first_member(guidance: Guidance) -> Guidance:
    """The first member of a guidance alone, which all policy members share: the control for an ensemble."""
    ((file, (bundle,)),) = guidance.files.items()
    name = file if len(bundle.seeds) == 1 else f"{file}#{bundle.seeds[0]}"
    return Guidance(name, {name: [models.select_members(bundle, [0])]}, "none")


def act_alike(first: Cell, second: Cell) -> bool:
    """Whether two cells of a policy have the same pairs under the same guidance."""
    ours, theirs = first.guidance.bundles, second.guidance.bundles
    same = len(ours) == len(theirs) and all(map(models.same_weights, ours, theirs))
    return same and (first.pairs, first.how) == (second.pairs, second.how)


def ensembles(named: Mapping[str, Sequence[Bundle]], section: data.EvaluationSection, learned: str) -> list[Guidance]:
    """An ensemble of each named guidance, and one of all, where they have several members, perhaps by position.

    The rule is that of [evaluation]; by default the one that the policy learned under, else the mean, or the mean rank
    where values have different scales. Where that rank would need a gradient, there is no such ensemble.
    """
    groups = [{file: bundles} for file, bundles in named.items()] + [dict(named)] * (len(named) > 1)
    made = []
    for files in groups if section.ensemble != "none" else ():
        guidance = Guidance("", files)
        scales_differ = len(set(map(models.values_scale, guidance.bundles))) > 1
        if scales_differ and not section.ensemble and section.guide != "rank":
            continue
        rule = section.ensemble or ("rank" if scales_differ else "mean" if learned == "none" else learned)
        name, by_position = ", ".join(files) if len(files) == 1 else "all", section.ensemble_over == "position"
        count = len(guidance.bundles if by_position else guidance.seeds)
        if count > 1:
            made.append(Guidance(f"{name} ({rule} of {count}{' by position' * by_position})", files, rule))
    return made


def check_comparable(cells: Sequence[Cell]) -> None:
    """Raises: MdptError if two policies are not evaluated alike, so that their scores cannot be compared."""

    def conditions(cell: Cell) -> dict[str, Any]:
        shared = {"reference": [*(cell.bundle.reference or ())], "environment": cell.bundle.environment.id}
        return cell.section.model_dump(exclude={"w", "ensemble"}) | shared

    ours = conditions(cells[0])
    for cell in cells[1:]:
        theirs = conditions(cell)
        if differences := [f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
            raise data.MdptError(
                f"{cells[0].policy} and {cell.policy} are not evaluated alike: {'; '.join(differences)}; evaluate them "
                "apart, or give the settings that make them equal"
            )


def find_held_out(cell: Cell, data_file: Path | None) -> HeldOut:
    """The held-out part of a policy's data, or of another file.

    Raises: MdptError if the data cannot be found, have changed since training, or have no held-out episodes.
    """
    section = cell.bundle.experiment.data
    if data_file is not None:
        section = section.model_copy(update={"source": "hdf5", "path": str(data_file), "dataset": None})
    elif section.source == "arrays":
        raise data.MdptError(f"{cell.policy}: was trained on arrays; name a file of the same data with --data")
    try:
        dataset = load_data(section, data.Workers(), cell.bundle.environment)
    except data.MdptError as error:
        raise error if data_file else data.MdptError(f"{cell.policy}: {error} --data FILE names its data.") from error
    if dataset.identity.hash != cell.bundle.dataset.hash:
        if data_file is None:
            raise data.MdptError(f"{cell.policy}: {dataset.identity.name} has changed since; name the data with --data")
        warn(f"{data_file}: other data than {cell.policy} was trained on")
    if not len(dataset.held_out.rewards):
        raise data.MdptError(f"{cell.policy}: its data have no held-out episodes; train with [data] held_out above 0")
    return dataset.held_out


def no_environment(cell: Cell) -> str:
    """Why a policy cannot be scored, for lack of an environment; else ""."""
    if cell.bundle.environment.id is not None:
        return ""
    return f"{cell.policy}: cannot be scored: {cell.bundle.dataset.no_environment}"


# --- statistics ---------------------------------------------------------------------------------------------------

Ends = tuple[float, float]  # of an interval or a range
FEWEST = 5  # members: below this, an interval says no more than the range, and an IQM is the mean or nearly so
MANY = 20  # members: below this, no interval of a probability covers what it should


class Part:
    """A part of a report. Written as JSON; read back with every key present, none unknown, and finite numbers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Summary(Part):
    """Statistics of scores over pairs of members. None: too few members."""

    members: int
    median: float
    iqr: float | None
    iqm: float | None
    iqm_interval: Ends | None
    range: Ends
    mean: float
    std: float | None


@dataclass(frozen=True)
class Change(Part):
    """How scores change under another guidance, see `compare`; of a single policy member, median and range alone.

    iqr_percent_by_chance: in older files.
    """

    median: float
    range: Ends
    iqr: float | None = None
    std: float | None = None
    improvement: float | None = None
    iqr_percent: float | None = None
    iqr_percent_by_chance: Ends | None = None
    spread_p: float | None = None
    intervals: dict[str, Ends] | None = None
    mean: float | None = None
    std_percent: float | None = None


@dataclass(frozen=True)
class Share(Part):
    """A component of variance as a standard deviation. interval: in older files."""

    std: float
    interval: Ends | None = None


def normalized_score(returns: Array, reference: Ends | None) -> Array:
    """Raw returns on the scale where the reference's min is 0 and its max is 100; as they are without a reference.

    Source: arXiv 2004.07219, eq. 1.
    """
    returns = np.asarray(returns, dtype=np.float64)
    if reference is None:
        return returns
    low, high = reference
    return np.asarray(100 * (returns - low) / (high - low))


def summarize(table: Array) -> Summary:
    """Statistics of scores: median, IQR, interquartile mean (IQM) with its 95 % interval, range, mean, std.

    table: (S, K, E), the score of each episode of policy members under guidance members; nan where there is no such
    pair. The score of a pair is the mean over its episodes. IQR and std: as in `spread`; of a single policy member,
    over the guidance members. Range: the lowest and the highest pair. IQM: None below 5 members.
    Source: interquartile mean as in rliable (arXiv 2108.13264).
    """
    table = table[~np.isnan(table).all((1, 2))]
    scores = table.mean(-1)  # (S, K)
    values = scores[~np.isnan(scores)]
    iqr, std = spread(scores if len(scores) > 1 else scores.T)
    iqm = interquartile_mean(scores) if len(table) >= FEWEST else None
    scores_range, median, mean = ends((values.min(), values.max())), float(np.median(values)), float(values.mean())
    interval = None if iqm is None else iqm_interval(table)
    return Summary(len(table), median, none_if_nan(iqr), iqm, interval, scores_range, mean, none_if_nan(std))


def interquartile_mean(scores: Array) -> float:
    from scipy import stats

    return float(stats.trim_mean(scores[~np.isnan(scores)], 0.25))


def none_if_nan(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def ends(pair: Iterable[Any]) -> Ends:
    low, high = pair
    return float(low), float(high)


def shift(table: Array) -> Array:
    """Tables of pairs (..., S, K), reordered so that column k of row i holds guidance member (i + k) modulo K."""
    count, width = table.shape[-2:]
    rows = np.arange(count)[:, None]
    shifted: Array = table[..., rows, (rows + np.arange(width)) % width]
    return shifted


def spread(table: Array) -> tuple[Any, Any]:
    """IQR and standard deviation over pairs that share no member, in tables of scores (..., S, K): each (...).

    For each shift k = 0 .. K - 1, policy member i is paired with guidance member (i + k) modulo K; IQR and standard
    deviation of these S scores are averaged over the shifts. So crossed members are judged on as many scores at a time,
    as independent ones, as members that are paired once; if K < S, some of the S share a guidance member. nan is left
    out. Quartiles are interpolated linearly, as in numpy. A shift with a single pair has no spread and is left out;
    the result is nan if no other is left.
    """
    ordered = np.sort(shift(table), axis=-2)  # (..., S, K), nan last
    # numpy's nanpercentile takes tables one by one, which is twenty times slower than this
    last = (~np.isnan(ordered)).sum(axis=-2, keepdims=True) - 1  # (..., 1, K); -1: all nan

    def quantile(share: float) -> Any:
        place = share * last
        below = np.floor(place).astype(np.int64)
        low, high = (np.take_along_axis(ordered, index, axis=-2) for index in (below, np.minimum(below + 1, last)))
        return (low + (place - below) * (high - low))[..., 0, :]

    with warnings.catch_warnings():  # of shifts without any pair, or with one
        warnings.simplefilter("ignore", RuntimeWarning)
        deviation = np.nanstd(ordered, axis=-2, ddof=1)
        between = np.where(last[..., 0, :] > 0, quantile(0.75) - quantile(0.25), np.nan)
        return np.nanmean(between, axis=-1), np.nanmean(deviation, axis=-1)


def jackknife(left: Iterable[Any]) -> Any:
    """Variance of a statistic, from its values without each of n members. Source: Efron and Stein 1981 (Ann. Stat. 9)."""
    values = np.array(list(left))
    return (len(values) - 1) / len(values) * np.square(values - values.mean(0)).sum(0)


def without_each(*tables: Array) -> Iterator[list[Array]]:
    """Tables (S, 1) and (S, S) without policy member i and, where members are crossed, without guidance member i."""
    for i in range(len(tables[0])):
        rows = [np.delete(table, i, 0) for table in tables]
        yield [np.delete(table, i, 1) if table.shape[1] > 1 else table for table in rows]


def has_intervals(count: int, width: int) -> bool:
    """Whether tables (S, K) have intervals: of at least 5 members, paired one to one or crossed with as many."""
    return count >= FEWEST and width in (1, count)


def half_width(variance: Any, freedom: float) -> Any:
    """Half of a 95 % interval, by Student's t."""
    from scipy import stats

    return stats.t.ppf(0.975, freedom) * np.sqrt(variance)


def location_interval(value: float, variance: float, freedom: float, table: Array) -> Ends:
    """95 % interval of a location of scores (S, K, E): for new members and, where E > 1, new start states.

    variance, freedom: of the value as it comes from the members, whose scores contain the noise of their episodes. What
    start states do to all members alike (analysis of variance) comes on top. Degrees of freedom: Satterthwaite 1946.
    """
    rows = np.nanmean(table, axis=1)  # (S, E)
    episodes = rows.shape[1]
    starts = variance_components(rows)["guidance"] ** 2 / episodes if episodes > 1 else 0.0
    if starts > 0:
        parts = variance**2 / freedom + starts**2 / (episodes - 1)
        variance, freedom = variance + starts, (variance + starts) ** 2 / parts
    half = half_width(variance, freedom)
    return ends((value - half, value + half))


def iqm_interval(table: Array) -> Ends | None:
    """95 % interval of the IQM of scores (S, K, E), see `location_interval`; None as `has_intervals` says.

    Matched members: by the winsorized variance of a trimmed mean (Tukey and McLaughlin 1963); crossed: `jackknife`.
    """
    from scipy import stats

    count, width, _ = table.shape
    if not has_intervals(count, width):
        return None
    scores, freedom = table.mean(-1), count - 1
    if width == 1:
        kept = count - 2 * (count // 4)
        winsorized = np.asarray(stats.mstats.winsorize(scores[:, 0], (0.25, 0.25)))
        variance, freedom = (count - 1) * winsorized.var(ddof=1) / (kept * (kept - 1)), kept - 1
    else:
        variance = jackknife(interquartile_mean(each) for (each,) in without_each(scores))
    return location_interval(interquartile_mean(scores), float(variance), freedom, table)


def chance_interval(value: float, variance: float, freedom: float) -> Ends | None:
    """95 % interval of a probability, symmetric in its logit; None at 0 and 1, where that is infinite."""
    from scipy import special

    if not 0 < value < 1:
        return None
    half = half_width(variance, freedom) / (value * (1 - value))
    return ends(special.expit(special.logit(value) + np.array([-half, half])))


def compare(own: Array, swapped: Array) -> Change:
    """How scores change against those under the guidance of training.

    own: (S, E), the baseline of each policy member. swapped: (S, K, E), the scores of that member under other guidance
    members, nan where there is no such pair. For S > 1, also:

    - median, mean, iqr, std: of swapped minus own, in points of score; IQR and std as in `spread`.
    - range: the lowest and the highest change of a pair.
    - improvement: probability that a swapped score is higher than an own one, ties counting half (arXiv 2108.13264).
    - iqr_percent: 100 (IQR swapped - IQR own) / IQR own, and std_percent likewise; None below 5 members.
    - spread_p: as in `spread_test`.
    - intervals: as in `change_intervals`.
    """
    swapped = np.where(np.abs(swapped - own[:, None]) < 1e-3, own[:, None], swapped)  # rounding of other batches
    mine, others = own.mean(-1)[:, None], swapped.mean(-1)  # (S, 1), (S, K)
    gaps = others - mine
    gap_range = float(np.nanmin(gaps)), float(np.nanmax(gaps))
    if len(own) < 2:
        return Change(float(np.nanmedian(gaps)), gap_range)
    (own_iqr, own_std), (iqr, std) = spread(mine), spread(others)

    def percent(after: Any, before: Any) -> float | None:
        return none_if_nan(100 * (after / before - 1)) if len(own) >= FEWEST and before > 0 else None

    return Change(
        median=float(np.nanmedian(others) - np.median(mine)),
        range=gap_range,
        iqr=none_if_nan(iqr - own_iqr),
        std=none_if_nan(std - own_std),
        improvement=wins(others[~np.isnan(others)], mine),
        iqr_percent=percent(iqr, own_iqr),
        spread_p=spread_test(mine[:, 0], others),
        intervals=change_intervals(own, swapped),
        mean=float(np.nanmean(others) - mine.mean()),
        std_percent=percent(std, own_std),
    )


def wins(first: Array, second: Array) -> float:
    """The share of pairs in which a score of `first` is higher than one of `second`; ties count half."""
    ordered = np.sort(second.ravel())
    lower, not_higher = (np.searchsorted(ordered, first.ravel(), side) for side in ("left", "right"))
    return float((lower + not_higher).mean() / 2 / len(ordered))


def change_intervals(own: Array, swapped: Array) -> dict[str, Ends] | None:
    """95 % intervals of changes from scores (S, E) to (S, K, E), by name; None as `has_intervals` says.

    By `jackknife`, of the mean as in `location_interval`; of std and IQR from the logarithm of their ratio, which is
    closer to normal, in percent; of the improvement from 20 members on. That of the median covers too little.
    """
    count, width, _ = swapped.shape
    if not has_intervals(count, width):
        return None

    def figures(mine: Array, others: Array) -> list[float]:
        (own_iqr, own_std), (iqr, std) = spread(mine), spread(others)
        with np.errstate(divide="ignore", invalid="ignore"):  # of scores without any spread
            ratios = [float(np.log(std / own_std)), float(np.log(iqr / own_iqr))]
        return [float(np.nanmean(others) - mine.mean()), *ratios, wins(others[~np.isnan(others)], mine)]

    scores = own.mean(-1)[:, None], swapped.mean(-1)
    with np.errstate(invalid="ignore"):
        mean, *ratios, chance = figures(*scores)
        variance, *variances, chance_variance = jackknife(figures(*each) for each in without_each(*scores))
    found = {"mean": location_interval(mean, variance, count - 1, swapped - own[:, None])}
    for name, ratio, each in zip(("std_percent", "iqr_percent"), ratios, variances, strict=True):
        if np.isfinite([ratio, each]).all():
            half = half_width(each, count - 1)
            found[name] = ends(100 * (np.exp([ratio - half, ratio + half]) - 1))
    if count >= MANY and (interval := chance_interval(chance, chance_variance, count - 1)):
        found["improvement"] = interval
    return found


def falls_short(scores: Array, other: Array | float) -> bool:
    """Whether scores (S, E) are below others (S, E) in the mean by more than chance would make them in 5 % of cases.

    By Student's t on the differences of members, or of the episodes of a single one; False if there is only one.
    """
    from scipy import stats

    gaps = np.asarray(scores - other)
    gaps = gaps.mean(1) if len(gaps) > 1 else gaps[0]
    if len(gaps) < 2:
        return False
    return bool(gaps.mean() < stats.t.ppf(0.05, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps)))


def spread_test(own: Array, swapped: Array) -> float | None:
    """p value of the hypothesis that own (S,) and swapped (S, K) scores have the same spread over members.

    Two-sided test of whether the ranks of sums and of differences of paired scores correlate (Spearman): the test of
    Pitman and Morgan on ranks, since with heavy tails that of scores rejects too often. Exact for up to 7 pairs, above
    by Student's t with S - 2 degrees of freedom. Crossed members: policy member i with guidance member i + 1. None:
    below 3 pairs, without variance, or if 1 < K < S, where pairs share guidance members and so are not independent.
    Source: Pitman 1939, Morgan 1939 (Biometrika 31).
    """
    from scipy import stats

    if 1 < swapped.shape[1] < len(own):
        return None
    other = shift(swapped)[:, min(1, swapped.shape[1] - 1)]
    before, after = own[~np.isnan(other)], other[~np.isnan(other)]
    values = (before, after, before + after, after - before)
    if len(after) < 3 or min(map(np.ptp, values)) < 1e-6:
        return None
    sums, differences = (stats.rankdata(each.round(6)) for each in values[2:])
    exact = stats.PermutationMethod() if len(after) <= 7 else None  # all 7! orders
    return float(stats.pearsonr(sums, differences, method=exact).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p values of several hypotheses, corrected for their number. Source: Holm 1979 (Scand. J. Stat. 6)."""
    corrected, order = np.ones(len(values)), np.argsort(values)
    corrected[order] = np.maximum.accumulate(np.sort(values) * np.arange(len(values), 0, -1))
    return [float(value) for value in np.minimum(corrected, 1)]


def variance_components(scores: Array) -> dict[str, float]:
    """Components of the variance of crossed scores (S, K) as standard deviations: of "guidance", "policy" and "rest".

    score = mean + policy's part + guidance's part + rest, by analysis of variance; the rest is what is special to the
    pair, and the choice of its episodes. A negative variance counts as 0. No interval covers them if tails are heavy.
    """
    count, width = scores.shape
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    rest_variance = float(np.square(rest).sum()) / ((count - 1) * (width - 1))
    parts = {
        "guidance": float(scores.mean(0).var(ddof=1)) - rest_variance / count,
        "policy": float(scores.mean(1).var(ddof=1)) - rest_variance / width,
        "rest": rest_variance,
    }
    return {name: math.sqrt(max(0.0, variance)) for name, variance in parts.items()}


def probability_of_improvement(first: Array, second: Array) -> tuple[float, Ends | None]:
    """Probability that a score of `first` (S, E) is higher than one of `second` (K, E), as in `wins`.

    Its 95 % interval: None below 20 members, see `chance_interval`. Source: arXiv 2108.13264.
    """
    ours, theirs = first.mean(-1), second.mean(-1)
    value, fewest = wins(ours, theirs), min(len(ours), len(theirs))
    if fewest < MANY:
        return value, None
    variance = jackknife(wins(np.delete(ours, i), theirs) for i in range(len(ours)))
    variance += jackknife(wins(ours, np.delete(theirs, i)) for i in range(len(theirs)))
    return value, chance_interval(value, variance, fewest - 1)


# --- reports: what was found --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(Part):
    """A policy member under a guidance member: mean return, score and length, success rate, and each episode's.

    success, successes: None where the environment reports no success.
    """

    policy_member: int
    policy_seed: int
    guidance_seed: int | None
    mean_return: Annotated[float, pydantic.Field(alias="return")]
    score: float
    length: float
    returns: list[float]
    lengths: list[int]
    success: float | None
    successes: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Acting(Part):
    """How a policy acts and under which guidance; from `candidates` on, the fields of `models.Inference`."""

    policy: str
    step: int
    guidance: str | None
    guide: str
    candidates: int
    selection: str
    weight_temperature: float
    temperature: float
    w: float
    guidance_weight: float
    jacobian: bool
    temperature_on: str
    ensemble: str
    support: float
    ensemble_over: str = "all"
    execute: int = 1  # steps


@dataclass(frozen=True, kw_only=True)
class Protocol(Acting):
    """How a cell was played."""

    steps: int
    no_effect: list[str]
    episodes: int
    seed: int
    environment: str
    repeatable: bool
    reference: Ends | None
    products: str
    horizon: int = 1


@dataclass(frozen=True)
class DataScores(Part):
    """The dataset of a policy, and the scores of its episodes."""

    source: str
    name: str
    transitions: int
    no_environment: str
    hash: str
    training_transitions: int
    episodes: int
    mismatched: list[int]
    mean_return: float
    best_return: float
    mean_score: float
    best_score: float


@dataclass(frozen=True)
class Result(Part):
    """What a cell gave."""

    policy: str
    guidance: str
    step: int
    algorithm: str
    guidance_algorithm: str | None
    warnings: list[str]
    protocol: Protocol
    pairs: list[Pair]
    dataset: DataScores
    accounting: models.Account
    versions: dict[str, str]

    @property
    def episode_scores(self) -> Array:  # (pairs, E)
        return normalized_score(np.array([pair.returns for pair in self.pairs]), self.protocol.reference)

    @property
    def scores(self) -> Array:  # (pairs,)
        return np.array([pair.score for pair in self.pairs])

    @property
    def median(self) -> float:
        return float(np.median(self.scores))

    @property
    def members(self) -> int:
        return len({pair.policy_member for pair in self.pairs})

    @property
    def guidance_seeds(self) -> list[int | None]:
        return list(dict.fromkeys(pair.guidance_seed for pair in self.pairs))


@dataclass(frozen=True)
class Comparison(Part):
    """Statistics of a group of a result's pairs, and their change against the baseline, if that is another cell."""

    policy: str
    guidance: str
    step: int
    warnings: list[str]
    seeds: str  # "same seed", "other seeds" or "all"
    pairs: int
    length: float
    success: float | None
    summary: Summary
    change: Change | None


SHARED = "members, one guidance shared"


@dataclass(frozen=True)
class Spread(Part):
    """The spread of a policy's scores under a guidance: IQR and standard deviation.

    over: "members"; SHARED: policy members that share a guidance member; "episodes" or "snapshots" of a member, of which
    IQR, std and changes are the median over members. Changes are against the policy in `find_baselines`. p is two-sided;
    p_holm is corrected for the tests of the same kind that one table shows. None: no such change or test.
    """

    policy: str
    guidance: str
    over: str
    iqr: float | None
    std: float | None
    iqr_change: float | None
    std_change: float | None
    p: float | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Rivalry(Part):
    """The probability that a member of the first policy scores higher than one of the second."""

    first: str
    second: str
    improvement: float
    interval: Ends | None


@dataclass(frozen=True)
class Choice(Part):
    """The cell of several snapshots whose mean score over all members is best on the start states of even number.

    snapshots: their number. mean: that score. summary: of the scores on the start states of odd number; last: the mean of
    the last snapshot there.
    """

    policy: str
    guidance: str
    snapshots: int
    mean: float
    summary: Summary
    last: float


@dataclass(frozen=True)
class BestGuidance(Part):
    """The guidance member with the highest mean score over all policy members."""

    seed: int | None
    mean: float


@dataclass(frozen=True)
class Components(Part):
    """Of a crossed cell: the parts of its spread, None for a single policy member, and the best guidance member."""

    policy: str
    guidance: str
    step: int
    std: dict[str, Share] | None
    best_guidance: BestGuidance


@dataclass(frozen=True)
class Conditions(Part):
    """What decides the results of a report: runs under the same conditions play the same cells."""

    bundles: dict[str, str]  # digest by file
    cells: list[tuple[str, str, int]]  # policy, guidance, number of pairs
    evaluation: list[data.EvaluationSection]  # of each cell
    products: str
    version: str


@dataclass(frozen=True)
class Report(Part):
    """What `evaluate` and `swap` find; settings and finished cells alone while cells are played."""

    settings: Conditions
    cells: list[Result]
    summary: list[Comparison] | None = None
    spreads: list[Spread] | None = None
    choices: list[Choice] | None = None
    rivalry: list[Rivalry] | None = None  # of evaluate
    verdicts: list[str] | None = None  # of swap
    components: list[Components] | None = None  # of swap


@dataclass(frozen=True, kw_only=True)
class OfflineResult(Acting):
    """What held-out data say of a policy that is not played; lists hold a figure per member."""

    warnings: list[str]
    data: str
    seed: int
    seeds: list[int]
    states: int
    distance: list[float]
    distance_one: list[float]  # of one sample
    gain: list[float] | None
    chance: float
    values: dict[str, models.Values]  # by the name of the judge


@dataclass(frozen=True)
class OfflineReport(Part):
    """What `evaluate` finds without playing."""

    cells: list[OfflineResult]
    offline: bool = True


@cache
def schema(offline: bool = False) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(OfflineReport if offline else Report)


def store_json(path: Path | None, report: Report | OfflineReport) -> None:
    """Write a report as JSON, whole or not at all; without a path, nothing."""
    if path is not None:
        content = schema(isinstance(report, OfflineReport)).dump_python(report, by_alias=True)
        text = json.dumps({key: part for key, part in content.items() if part is not None}, indent=2)
        with data.written_whole(path, "choose another --json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def play_cells(cells: Sequence[Cell], file: Path | None, overwrite: bool, workers: Workers) -> Report:
    """Play all cells. With a file, each finished cell is stored, and an interrupted run goes on from there."""
    products = models.choose_products()
    report = begin_report(cells, products, file, overwrite)
    left = cells[len(report.cells) :]
    rollouts = sum(cell.rollouts for cell in left)
    if len(cells) > 1:
        kind = "each with each" if any(len(cell.pairs) > len(cell.bundle.seeds) for cell in cells) else "by position"
        say(f"{len(left)} of {len(cells)} cells to play, members paired {kind}: {rollouts} rollouts", stderr=True)
    tasks = (task for cell in left for task in cut_into_tasks(cell, products))
    played = data.parallel(models.play, tasks, workers, sum(len(cell.shares) for cell in left))
    done = 0
    with resumable(file is not None), closing(played), progress("play", max(1, rollouts)) as show:
        for cell in left:
            parts = []
            for _ in cell.shares:
                parts.append(next(played))
                done += len(parts[-1].returns)
                show(done, "episodes")
            columns = zip(*(vars(part).values() for part in parts), strict=True)
            report.cells.append(make_result(cell, data.Played(*map(np.concatenate, columns)), products))
            store_json(file, report)
    return replace(report, summary=compare_results(report.cells))


def make_result(cell: Cell, played: data.Played, products: str) -> Result:
    """The result of a cell from its rollouts, in order.

    Where some episode reported success or failure, those that reported nothing have failed.
    """
    bundle, members = cell.bundle, cell.guidance.seeds
    columns = (array.reshape(len(cell.pairs), -1) for array in vars(played).values())
    pairs, told = [], not np.isnan(played.successes).all()
    for (i, j), returns, lengths, reported in zip(cell.pairs, *columns, strict=True):
        seeds, steps = (bundle.seeds[i], None if j is None else members[j]), lengths.astype(int).tolist()
        mean, wins = float(returns.mean()), np.nan_to_num(reported)
        score = float(normalized_score(np.array(mean), bundle.reference))
        success = (float(wins.mean()), wins.tolist()) if told else (None, None)
        pairs.append(Pair(i, *seeds, mean, score, float(lengths.mean()), returns.tolist(), steps, *success))
    scores = normalized_score(np.array([bundle.dataset.mean_return, bundle.dataset.best_return]), bundle.reference)
    mean_score, best_score = scores.tolist()
    return Result(
        policy=data.printable(cell.policy),
        guidance=data.printable(cell.guidance.name),
        step=bundle.step,
        algorithm=bundle.experiment.policy.algorithm,
        guidance_algorithm=cell.guidance.algorithm,
        warnings=cell.warnings,
        protocol=make_protocol(cell, products),
        pairs=pairs,
        dataset=DataScores(**vars(bundle.dataset), mean_score=mean_score, best_score=best_score),
        accounting=bundle.accounting,
        versions=bundle.versions.model_dump() | {"played_with": data.version()},
    )


def played_again(pairs: Sequence[Pair]) -> data.Played:
    """The rollouts that pairs were made from."""
    columns = [[pair.returns, pair.lengths, pair.successes or [np.nan] * len(pair.returns)] for pair in pairs]
    return data.Played(*(np.array(column, dtype=np.float64).ravel() for column in zip(*columns, strict=True)))


def make_protocol(cell: Cell, products: str) -> Protocol:
    environment = cell.bundle.environment
    return Protocol(
        policy=data.printable(cell.policy),
        step=cell.bundle.step,
        guidance=cell.guidance_text if cell.guidance.bundles else None,
        guide=cell.section.guide,
        **vars(cell.how),
        steps=cell.bundle.experiment.policy.steps,
        no_effect=cell.idle,
        episodes=cell.section.episodes,
        seed=cell.section.seed,
        environment=str(environment.id),
        repeatable=environment.repeatable,
        reference=cell.bundle.reference,
        products=products,
        horizon=cell.bundle.experiment.data.horizon,
    )


def begin_report(cells: Sequence[Cell], products: str, file: Path | None, overwrite: bool) -> Report:
    """A report without results, or with those that an interrupted run of the same cells has stored in the file.

    overwrite: begin anew if the file holds anything else. Raises: MdptError in that case without overwrite.
    """
    conditions = Conditions(
        bundles=dict(sorted(pair for cell in cells for pair in cell.digests.items())),
        cells=[(cell.policy, cell.guidance.name, len(cell.pairs)) for cell in cells],
        evaluation=[cell.section for cell in cells],
        products=products,
        version=data.version(),
    )
    if file is None or not file.exists():
        return Report(conditions, [])
    try:
        return read_report(file, conditions, cells)
    except data.MdptError:
        if overwrite:
            return Report(conditions, [])
        raise


def read_report(file: Path, conditions: Conditions, cells: Sequence[Cell]) -> Report:
    """The report in a JSON file, checked against the cells to be played.

    Raises: MdptError naming the part of the file that is missing or wrong, was played under other conditions, or does
    not follow from the returns and lengths of its episodes.
    """
    again = "choose another name, or --overwrite to replace it"
    try:
        stored: Report = schema().validate_json(file.read_bytes())
    except OSError as error:
        raise data.MdptError(f"{file}: cannot be read ({error.strerror}); {again}") from error
    except pydantic.ValidationError as error:
        problem, *_ = error.errors(include_url=False)
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        reason = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise data.MdptError(f"{file}: exists already and is no report of this version ({reason}); {again}") from error
    if other := differing(stored.settings, conditions):
        raise data.MdptError(f"{file}: holds results of other {other}; repeat its options to go on, {again}")
    if len(stored.cells) > len(cells):
        raise data.MdptError(f"{file}: holds {len(stored.cells)} cells, expected at most {len(cells)}; {again}")
    for place, (result, cell) in enumerate(zip(stored.cells, cells, strict=False)):
        episodes = [(pair.returns, pair.lengths, pair.successes or pair.returns) for pair in result.pairs]
        wrong = "pairs"
        if len(episodes) == len(cell.pairs) and {len(v) for each in episodes for v in each} == {cell.section.episodes}:
            wrong = differing(result, make_result(cell, played_again(result.pairs), conditions.products))
        if wrong:
            raise data.MdptError(f"{file}: cells[{place}] was changed: other {wrong} than its episodes give; {again}")
    return stored


def differing(first: Part, second: Part) -> str:
    """The names of the fields in which two parts of a kind differ."""
    return ", ".join(name for name, value in vars(first).items() if value != vars(second)[name])


def find_baselines(results: Sequence[Result]) -> dict[str, Result]:
    """For each policy the result under its own guidance; under none if it was not played under its own."""
    return {result.policy: result for name in ("none", OWN) for result in results if result.guidance == name}


def compare_results(results: Sequence[Result]) -> list[Comparison]:
    """Statistics of each result over pairs of members, and changes against the baseline, see `find_baselines`.

    Pairs whose policy and guidance have the same seed, and pairs of different seeds, are groups of their own.
    """
    baselines, comparisons = find_baselines(results), []
    for result in results:
        baseline = baselines.get(result.policy, result)
        own, name = baseline.episode_scores, (result.policy, result.guidance, result.step, result.warnings)
        for group, pairs in seed_groups(result.pairs).items():
            table = tabulate(pairs, len(own), result.protocol.reference)
            complete = result is not baseline and not np.isnan(table).all((1, 2)).any()  # each policy member has a pair
            change = compare(own, table) if complete else None
            lengths, wins = zip(*((pair.length, pair.success) for pair in pairs), strict=True)
            means = float(np.mean(lengths)), None if None in wins else float(np.mean(wins))
            comparisons.append(Comparison(*name, group, len(pairs), *means, summarize(table), change))
    return comparisons


def tabulate(pairs: Sequence[Pair], members: int, reference: Ends | None) -> Array:
    """Scores of each episode by policy member and guidance seed, (S, K, E); nan where there is no such pair.

    If members are paired one to one, K = 1: they are drawn as pairs, not apart. Else the guidance of the seed of policy
    member i is in column i, so that each shift of `spread` has either all pairs of the same seed or none.
    """
    crossed = len(pairs) > len({pair.policy_member for pair in pairs})
    columns = list(dict.fromkeys(pair.guidance_seed if crossed else None for pair in pairs))
    for pair in pairs if crossed else ():
        seed, place = pair.policy_seed, pair.policy_member
        if seed in columns and place < len(columns):
            at = columns.index(seed)
            columns[at], columns[place] = columns[place], seed
    table = np.full((members, len(columns), len(pairs[0].returns)), np.nan)
    for pair in pairs:
        column = columns.index(pair.guidance_seed) if crossed else 0
        table[pair.policy_member, column] = normalized_score(np.array(pair.returns), reference)
    return table


def seed_groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs of the same seed, pairs of different seeds, and all, where these differ."""
    same = [pair for pair in pairs if pair.guidance_seed == pair.policy_seed]
    other = [pair for pair in pairs if pair.guidance_seed not in (None, pair.policy_seed)]
    groups = {name: chosen for name, chosen in (("same seed", same), ("other seeds", other)) if chosen}
    return groups if len(groups) == 1 else groups | {"all": list(pairs)}


def overall(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Of each cell the comparison of all its pairs, which comes last."""
    return list({(each.policy, each.guidance): each for each in comparisons}.values())


def compare_spreads(results: Sequence[Result], comparisons: Sequence[Comparison], together: bool) -> list[Spread]:
    """Spreads of each cell over members and over episodes, and over snapshots where several are played, with changes.

    Of crossed members also that of the policies under one guidance member that all share, averaged over these members:
    the control for an ensemble, which all share, too. together: all spreads are shown in one table, else those of a
    policy; p is corrected for the tests of one kind in a table.
    """
    baselines, spreads = find_baselines(results), []
    for result, each in zip(results, overall(comparisons), strict=True):
        name, change, home = (result.policy, result.guidance), each.change, baselines.get(result.policy, result)
        changes = (change.iqr, change.std, change.spread_p) if change else (None, None, None)
        spreads.append(Spread(*name, "members", each.summary.iqr, each.summary.std, *changes))
        if len(result.pairs) > result.members > 1:
            own_iqr, own_std = map(float, spread(home.scores[:, None]))
            iqr, std = (float(one.mean()) for one in spread(result.scores.reshape(result.members, -1).T[..., None]))
            spreads.append(Spread(*name, SHARED, iqr, std, iqr - own_iqr, std - own_std, None))
        if result.protocol.episodes > 1:
            before = None if result is home else spreads_within([home])
            spreads.append(spread_within(*name, "episodes", spreads_within([result]), before))
    files: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        files.setdefault((file_of(result.policy), file_of(result.guidance)), []).append(result)
    for (policy, guidance), group in files.items():
        if len(group) > 1:
            base = next((files[policy, name] for name in (OWN, "none") if (policy, name) in files), group)
            before = None if base is group or len(base) < 2 else spreads_within(base)
            spreads.append(spread_within(policy, guidance, "snapshots", spreads_within(group), before))
    families: dict[tuple[str, str], list[int]] = {}
    for place, found in enumerate(spreads):
        if found.p is not None:
            families.setdefault(("" if together else found.policy, found.over), []).append(place)
    for places in families.values():
        for place, p in zip(places, holm([spreads[place].p or 0.0 for place in places]), strict=True):
            spreads[place] = replace(spreads[place], p_holm=p)
    return spreads


def file_of(name: str) -> str:
    """The file that a name such as FILE@STEP or FILE@STEP#SEED belongs to; FILE#SEED counts as a file."""
    return re.sub(r"@(\d+|last)(?=#\d+$|$)", "", name)


def choose_snapshots(results: Sequence[Result], curve: bool) -> list[Choice]:
    """Of each policy in a curve, or of each policy and guidance of which several snapshots are played, the best one.

    Chosen and scored by different episodes, since a score that was chosen for being high is too good. Of a single
    episode nothing is chosen.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        name = (file_of(result.policy), result.guidance) if curve else (result.policy, file_of(result.guidance))
        groups.setdefault(name, []).append(result)
    choices = []
    for group in groups.values():
        if len(group) > 1 and group[0].protocol.episodes > 1:
            means = [float(result.episode_scores[:, ::2].mean()) for result in group]
            best, last = group[int(np.argmax(means))], float(group[-1].episode_scores[:, 1::2].mean())
            table = tabulate(best.pairs, best.members, best.protocol.reference)[..., 1::2]
            choices.append(Choice(best.policy, best.guidance, len(group), max(means), summarize(table), last))
    return choices


def spreads_within(results: Sequence[Result]) -> Array:
    """IQR and std of each policy member's scores, averaged over its guidance members: (S, 2).

    Over the episodes of a result, or over several results of the same pairs.
    """
    result = results[0]
    table = result.episode_scores if len(results) == 1 else np.stack([each.scores for each in results], 1)
    each: Array = np.stack(spread(table[..., None]), -1).reshape(result.members, -1, 2).mean(1)
    return each


def spread_within(policy: str, guidance: str, over: str, each: Array, own: Array | None) -> Spread:
    """The median over members of the spreads (S, 2) that each has, and of their changes against own (S, 2).

    p: of the std, by Wilcoxon's signed ranks of members; None below 3 members, or without a change.
    """
    from scipy import stats

    iqr, std = np.median(each, axis=0).tolist()
    if own is None:
        return Spread(policy, guidance, over, iqr, std, None, None, None)
    gaps = (each - own).round(6)
    p = float(stats.wilcoxon(gaps[:, 1]).pvalue) if len(gaps) > 2 and gaps[:, 1].any() else None
    iqr_change, std_change = np.median(gaps, axis=0).tolist()
    return Spread(policy, guidance, over, iqr, std, iqr_change, std_change, p)


def split_spread(result: Result) -> Components:
    """Of a crossed cell: the components of its spread, and the best guidance member."""
    seeds, scores = result.guidance_seeds, result.scores.reshape(result.members, -1)
    means = scores.mean(0)
    best = BestGuidance(seeds[means.argmax()], float(means.max()))
    std = {name: Share(each) for name, each in variance_components(scores).items()} if len(scores) > 1 else None
    return Components(result.policy, result.guidance, result.step, std, best)


def compare_algorithms(results: Sequence[Result]) -> list[str]:
    """For each policy under a guidance of another algorithm than its own: a comparison with the stronger of the two.

    The two are the policy under its own guidance, and the best other policy here whose own guidance is of the other
    algorithm. If there is no such policy, the comparison is with the policy under its own guidance.
    """
    home = {result.policy: result for result in results if result.guidance == OWN}
    lines = []
    for result in results:
        algorithm, mine = result.guidance_algorithm, home.get(result.policy)
        if mine is None or algorithm in (None, mine.guidance_algorithm):
            continue
        others = [other for other in home.values() if other.guidance_algorithm == algorithm]
        stronger = max([mine, *others], key=lambda each: each.median)
        against = "the stronger of the two" if others else f"itself alone (no policy here learned under {algorithm})"
        lines.append(
            f"{result.policy} under {result.guidance} ({algorithm}){' *' if result.warnings else ''}: median "
            f"{result.median:.1f}, compared with {against}, {stronger.policy} under its own guidance: "
            f"{stronger.median:.1f} ({result.median - stronger.median:+.1f})"
        )
    return lines


def policy_of(name: str, curve: bool) -> str:
    """The policy of a result by its name: the steps of a curve belong together."""
    return file_of(name) if curve else name


def asked_for(results: Sequence[Result]) -> list[Result]:
    """The first result of each policy; what follows under the same name is one sample of it."""
    policies = [result.policy for result in results]
    return [result for place, result in enumerate(results) if result.policy not in policies[:place]]


def compare_policies(results: Sequence[Result], curve: bool) -> list[Rivalry]:
    """How often a member of one policy scores higher than one of another; of a curve, at the last steps."""
    last = {policy_of(result.policy, curve): result for result in asked_for(results)}
    return [
        Rivalry(first.policy, second.policy, *probability_of_improvement(first.episode_scores, second.episode_scores))
        for first, second in combinations(last.values(), 2)
    ]


def evaluate_offline(cells: Sequence[Cell], data_file: Path | None, held_out: HeldOut | None = None) -> OfflineReport:
    """What can be said of policies without playing, on the held-out part of their data, or of another file.

    held_out: that part, if it is at hand. Raises: MdptError as `find_held_out`.
    """
    results, parts = [], {}
    for cell in cells:
        bundle, bundles, seed = cell.bundle, cell.guidance.bundles, cell.section.seed
        source = repr((bundle.experiment.data, bundle.environment, bundle.dataset.hash))
        if source not in parts:  # the steps of a curve share theirs
            parts[source] = held_out or find_held_out(cell, data_file)
        rule = bundle.experiment.policy.ensemble
        acting = OWN if (cell.guidance.name, cell.how.ensemble) == (OWN, rule) else cell.guidance_text
        judges = {OWN: (bundle.guidances, rule, False), acting: (bundles, cell.how.ensemble, cell.how.by_position)}
        judges = {name: judge for name, judge in judges.items() if judge[0] and judge[1] != "rank"}  # ranks: no values
        result = OfflineResult(
            policy=cell.policy,
            step=bundle.step,
            guidance=acting,
            guide=cell.section.guide,
            **vars(cell.how),
            warnings=cell.warnings,
            data=str(data_file or bundle.dataset.name),
            seed=seed,
            seeds=bundle.seeds,
            **vars(models.judge_offline(bundle, bundles, cell.how, parts[source], seed, judges)),
        )
        results.append(result)
    return OfflineReport(results)


# --- tables -------------------------------------------------------------------------------------------------------

ONE_SAMPLE = "one sample"
TEMPERATURES = {"all": "", "start": " of the first noise", "steps": " of all but the first noise"}
NAMED_APART = ("algorithm", "scheme", "steps", "snapshots")  # settings with a line of their own


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str] | None], caption: Text = None, left: int = 1
) -> Table:
    """A table of rows; None draws a line. The first `left` columns are aligned left, the others right.

    Cells at the end of a row may be missing. Columns without any figure are left out.
    """
    from rich.table import Table

    table = Table(title=title, caption=caption)
    lines = [row and [*row, *[""] * (len(columns) - len(row))] for row in rows]
    shown = [place for place in range(len(columns)) if any(line and line[place] not in ("", "-") for line in lines)]
    for place in shown:
        named = place < left
        table.add_column(columns[place], justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for line in lines:
        table.add_section() if line is None else table.add_row(*(line[place] for place in shown))
    return table


def number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else f"{value:{form}}"


def interval_text(pair: Sequence[float] | None, form: str = ".1f") -> str:
    return "-" if pair is None else f"{pair[0]:{form}} .. {pair[1]:{form}}"


def scale_text(scale: data.RewardScale) -> str:
    return f"{scale.rule}, x {scale.multiplier:.4g}" + (f" {scale.offset:+.4g}" if scale.offset else "")


def settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={settings[key]}" for key in settings if key not in NAMED_APART)


def quality_table(bundle: Bundle) -> Table:
    """The quality of a guidance on held-out data: of each member, and the mean over members at each snapshot."""
    *earlier, last = bundle.quality
    forms = {"correlation": ".3f", "advantage_correlation": ".3f", "mean_v": ".2f", "mean_return": ".2f"}

    def mean(values: Sequence[float | None]) -> float | None:
        numbers = [value for value in values if value is not None]
        return float(np.mean(numbers)) if numbers else None

    members = [
        [str(seed), *(number(getattr(last, key)[i], form) for key, form in forms.items())]
        for i, seed in enumerate(bundle.seeds)
    ]
    means = [
        [f"mean @{each.step}", *(number(mean(getattr(each, key)), form) for key, form in forms.items())]
        for each in earlier
    ]
    returns = "discounted return to the episode's end"
    if last.bootstrapped:
        returns = "discounted return to the time limit, plus V there, since no episode here ends in a terminal state"
    elif last.left_out:
        returns += (
            f", which {last.left_out} more transitions do not reach before a time limit: the correlations leave them out, "
            "the means cover them, with V at the limit for what came after"
        )
    return make_table(
        f"guidance on {last.rows} held-out transitions (values in scaled rewards: {scale_text(bundle.reward_scale)})",
        ("seed", "corr(V, return)", "corr(Q gain, return - V)", "mean V", "mean return"),
        [*members, None, *means],
        f"return: {returns}; Q gain: Q of the action taken minus the mean Q of other actions of the data in its state; "
        f"std of Q between members {number(last.q_spread_members, '.3f')}, between transitions {last.q_spread_rows:.3f}",
    )


def growth_text(section: data.GuidanceSection) -> str:
    """How far V will have grown, at least; "" for an algorithm whose values do not grow through target networks.

    Measured where rewards are dense and episodes long; where they end early, V grows faster.
    """
    if not models.GUIDANCES[section.algorithm].bootstraps:
        return ""
    share = 1 - math.exp(-(1 - section.discount) * section.tau * section.steps)
    return f"V will have grown to at least {100 * share:.0f} % of the returns: 1 - exp(-(1 - discount) x tau x steps)"


def value_problem(bundle: Bundle) -> str:
    """Which members' V is still near its initial value, 0, that is closer to 0 than half of the mean return; else "".

    Where V estimates an upper expectile or maximum, a V between 0 and a positive mean return counts, too. A V above 0
    has left its initial value where the mean return is negative.
    """
    last, section = bundle.quality[-1], bundle.experiment.guidance
    v, mean = (np.array(values, dtype=np.float64) for values in (last.mean_v, last.mean_return))  # (S,), None is nan
    upper = section.value_loss == "gumbel" or section.expectile > 0.5
    above = upper and "value_loss" in models.GUIDANCES[section.algorithm].reads
    near = ((abs(v) < abs(mean) / 2) & ~((v > 0) & (mean < 0))) | (above & (v > 0) & (v < mean))
    if not near.any():
        return ""
    seeds = [str(seed) for seed, each in zip(bundle.seeds, near, strict=True) if each]
    return (
        f"V of seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} is still near its initial value (mean V {v[near].mean():.1f}, mean "
        f"return {mean[near].mean():.1f}): train longer, or raise tau or learning_rate"
    )


def unit(result: Result) -> str:
    return "score (0 to 100)" if result.protocol.reference else "return"


def acting(how: Acting | Inference) -> str:
    """How a policy acts, as a heading."""
    if how.candidates > 1:
        return f"{'best' if how.selection == 'max' else how.selection} of {how.candidates}"
    return "guided" if how.guidance_weight > 0 else ONE_SAMPLE


def summary_cells(each: Comparison) -> dict[str, str]:
    summary, change = each.summary, each.change
    return {
        "median": number(summary.median),
        "IQR": number(summary.iqr),
        "IQM": number(summary.iqm),
        "IQM 95 %": interval_text(summary.iqm_interval),
        "range": interval_text(summary.range),
        "mean": number(summary.mean),
        "std": number(summary.std),
        "length": number(each.length, ".0f"),
        "success": number(each.success, ".0%"),
        "change": number(change.median if change else None, "+.1f"),
    }


STATISTICS = ("median", "IQR", "IQM", "IQM 95 %", "range", "mean", "std")


def data_scores(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Name and score of the mean and the best episode of the data of all these results."""
    parts = {result.dataset.hash: result for result in results}
    for kind, result in product(("mean", "best"), parts.values()):
        name = f"data {kind}" + (f", {result.policy}" if len(parts) > 1 else "")
        yield name, number(getattr(result.dataset, f"{kind}_score"))


def score_table(results: Sequence[Result], comparisons: Sequence[Comparison]) -> Table:
    """One policy, and one sample of it if that was played: each member, statistics over members, and the dataset."""
    rows: list[list[str] | None] = []
    for first, *others in zip(*(result.pairs for result in results), strict=True):
        raw = number(first.mean_return) if results[0].protocol.reference else ""
        scores = [number(pair.score) for pair in (first, *others)]
        rows.append([str(first.policy_seed), *scores, raw, number(first.length, ".0f"), number(first.success, ".0%")])
    figures = [summary_cells(each) for each in comparisons]
    lines = [[name, *(each[name] for each in figures)] for name in STATISTICS]
    rows += [None, *(line for line in lines if set(line[1:]) != {"-"}), None]
    rows += [[name, *[score] * len(figures)] for name, score in data_scores(results)]
    columns = ("seed", *(acting(result.protocol) for result in results), "return", "length", "success")
    return make_table(unit(results[0]), columns, rows)


def summary_tables(
    title: str,
    heads: tuple[str, str],
    rows: Sequence[tuple[str, str, Comparison]],
    results: Sequence[Result],
    caption: Text,
) -> Iterator[Table]:
    """A line for each comparison, after two names, and for the data; then the statistics that are read less often."""

    def lines(*keys: str) -> list[Any]:
        return [[one, two, *(summary_cells(each)[key] for key in keys)] for one, two, each in rows]

    first, more = ("median", "IQR", "length", "success", "change"), STATISTICS[2:]
    scores = [[name, "", score] for name, score in data_scores(results)]
    yield make_table(title, (*heads, *first), [*lines(*first), None, *scores], caption, left=2)
    yield make_table("more statistics", (*heads, *more), lines(*more), left=2)


def spread_table(title: str, head: str, rows: Sequence[tuple[str, Spread]]) -> Table:
    """Spreads with their changes and tests, each after a name, one kind after the other."""
    lines: list[Sequence[str] | None] = []
    tests = []
    for over in ("members", SHARED, "episodes", "snapshots"):
        kind = [(name, each) for name, each in rows if each.over == over]
        for name, each in kind:
            changes = number(each.iqr_change, "+.1f"), number(each.std_change, "+.1f")
            p = number(each.p_holm, ".3f")
            lines.append((name, over, number(each.iqr), changes[0], number(each.std), changes[1], p))
        lines += [None] * bool(kind)
        tests += [f"{count} over {over}"] if (count := sum(each.p is not None for _, each in kind)) else []
    caption = "over episodes and snapshots: those of a member, median over members"
    if tests:
        caption += (
            "; p of the hypothesis that the spread has not changed: two-sided, by ranks, corrected (Holm) for the "
        )
        caption += f"tests here: {', '.join(tests)}"
    return make_table(title, (head, "over", "IQR", "change", "std", "change", "p"), lines, caption, left=2)


def offline_tables(result: OfflineResult) -> Iterator[Table]:
    """What held-out data say of a policy: for each member the distance to the data's actions, and values by each judge."""

    def rows(*columns: Sequence[float] | None) -> Iterator[list[str]]:
        for i, seed in enumerate(result.seeds):
            yield [str(seed), *(number(column[i], ".3f") if column else "-" for column in columns)]

    act = replace(result, guidance=None) if result.guidance == "none" else result
    yield make_table(
        f"{result.policy}, step {result.step}: offline, on {result.states} held-out states",
        ("seed", "distance", "of one sample", "gain"),
        rows(result.distance, result.distance_one, result.gain),
        f"distance: root mean square to the data's actions, in [-1, 1]; {result.chance:.3f} between two actions of the data. "
        "gain: Q of the best candidate minus Q of the data's action, in standard deviations of V over states. "
        f"Acts by: {', '.join(choice(act))}",
    )
    for name, values in result.values.items():
        title = f"mean Q by {name}, and the fraction of states where that of the policy's action is higher"
        shown = rows(values.policy, values.data, values.higher)
        yield make_table(title, ("seed", "of the policy", "of the data", "higher"), shown)


def window_text(horizon: int) -> str:
    """How many rows each window has, where there is more than one."""
    return f", in windows of {horizon} rows" if horizon > 1 else ""


def data_table(dataset: Dataset) -> Table:
    """What a dataset is, before anything is trained on it."""
    described, section, spec = data.describe_data(dataset), dataset.section, dataset.environment
    returns = np.array(described.returns)
    quartiles = ", ".join(f"{name} {{:.1f}}" for name in ("worst", "quarter", "median", "three quarters", "best"))
    bars = np.ceil(8 * np.array(described.histogram) / max(described.histogram)).astype(int)
    lengths = " / ".join(f"{length:.0f}" for length in described.lengths)
    counted = " counted from the first row on" if described.timeouts_counted else ""
    both = f", {described.both} rows are both" if described.both else ""
    facts = {
        "environment": f"{spec.id or 'none'}, O {spec.observation_dim}, A {spec.action_dim}, limit {spec.max_episode_steps}",
        "transitions": f"{described.transitions} to train on, {described.held_out} held out"
        + window_text(section.horizon),
        "episodes": f"{len(dataset.episode_returns)} whole, of {lengths} steps (shortest / median / longest)",
        "ends": f"{described.terminals} terminals, {described.timeouts} time limits{counted}{both}",
        "returns": quartiles.format(*returns),
        "histogram": f"{''.join(' ▁▂▃▄▅▆▇█'[bar] for bar in bars)} from worst to best",
    }
    if spec.id is None:
        facts["no environment"] = dataset.identity.no_environment
    if section.reference is not None:
        scores = normalized_score(returns, data.reference_returns(section.reference))
        facts["scores"] = quartiles.format(*scores)
    facts |= {
        "rewards": f"scaled by {scale_text(dataset.reward_scale)}",
        "constant features": ", ".join(map(str, described.constant)) or "none",
        "actions at a bound": ", ".join(f"{share:.0%}" for share in described.at_bounds),
        "duplicates": f"{described.duplicates:.1%} of transitions repeat the observation and action of another",
    }
    return make_table(f"{dataset.identity.source} {dataset.identity.name}", ("what", "value"), facts.items(), left=2)


def policy_tables(
    results: Sequence[Result], comparisons: Sequence[Comparison], curve: bool, choices: Sequence[Choice]
) -> Iterator[Table]:
    """Several policies, or the steps of a curve, one of which is chosen."""
    rows, chosen = [], [choice.policy for choice in choices]
    for result, each in zip(results, comparisons, strict=True):
        points = [other for other in comparisons if policy_of(other.policy, curve) == policy_of(each.policy, curve)]
        notes = ", ".join(["chosen"] * (each.policy in chosen) + ["last"] * (each is points[-1]))
        rows.append((each.policy, notes if curve else acting(result.protocol), each))
    return summary_tables(unit(results[0]), ("policy", "" if curve else "acting"), rows, results, None)


def choice_text(choice: Choice) -> str:
    """Which snapshot is chosen, and its scores on other start states than it was chosen by."""
    name, summary = choice.policy + (f" under {choice.guidance}" if choice.guidance != OWN else ""), choice.summary
    return (
        f"chosen of {choice.snapshots} snapshots: {name}, which has the best mean ({choice.mean:.1f}) over all members on the "
        f"start states of even number; on the odd ones mean {summary.mean:.1f}, median {summary.median:.1f}, IQR "
        f"{number(summary.iqr)}, std {number(summary.std)} (the last snapshot: mean {choice.last:.1f})"
    )


def advise(cell: Cell, acts: Result, one: Result) -> None:
    """Warn where ranking does harm, or a policy scores below the mean of its data however it acts, beyond chance.

    one: one sample of the policy. The advice follows from what is known of policy and guidance.
    """
    bundle, mean, scores = cell.bundle, acts.dataset.mean_score, (acts.episode_scores, one.episode_scores)
    section, found, remedies = bundle.experiment.policy, [], []
    if falls_short(*scores):
        found.append("its guidance does harm")
        young = [problem for each in cell.guidance.bundles if each.quality and (problem := value_problem(each))]
        far = "its actions may be far from the data"
        if bundle.experiment.data.path and not young:  # else the data would be collected or downloaded for this
            with suppress(data.MdptError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (each,) = evaluate_offline([cell], None).cells
                ours, others = np.mean(each.distance), np.mean(each.distance_one)
                far = f"distance to the data {ours:.3f}, of one sample {others:.3f}"
        remedies += young or [f"{far}: take a guidance with more conservatism, or fewer --candidates"]
    if all(falls_short(each, mean) for each in scores):
        found.append("it is below the mean of its data")
        remedies.append(f"train the policy longer, now {bundle.step} steps")
        if "eta" in models.POLICIES[section.algorithm].reads and models.learns_under_guidance(section, bundle.step):
            remedies.append(f"or with a smaller [policy] eta, now {section.eta:g}")
        remedies += ["or rank its candidates by --infer-guidance FILE"] * (acting(acts.protocol) == ONE_SAMPLE)
    if columns := bundle.dataset.mismatched:
        remedies = [f"observation columns {columns} of environment and data do not match, which comes first"]
    if found:
        means = {acting(each.protocol): each.episode_scores.mean() for each in (acts, one)} | {"the data's mean": mean}
        told = ", ".join(f"{name} {value:.1f}" for name, value in means.items())
        warn(f"{cell.policy}: {' and '.join(found)} ({told}): {', '.join(remedies)}")


def show_evaluation(report: Report, comparisons: Sequence[Comparison], curve: bool) -> None:
    """Print the tables of an evaluation, and for each policy its protocol and its training cost."""
    results, asked = report.cells, asked_for(report.cells)
    choices = report.choices or []
    if len(asked) == 1:
        show_table(score_table(results, comparisons))
    for table in policy_tables(results, comparisons, curve, choices) if len(asked) > 1 else ():
        show_table(table)
    for choice in choices:
        say(choice_text(choice), wrap=True)
    last = {policy_of(result.policy, curve): result for result in asked}
    shown = {*(result.policy for result in last.values()), *last}  # of a curve, the last step, and all steps together
    spreads = [each for each in report.spreads or [] if each.policy in shown]
    if spreads:
        several = len(last) > 1 or curve
        how = {
            (result.policy, result.guidance): f"{result.policy}, " * several + acting(result.protocol)
            for result in results
        }
        lines = [(how.get((each.policy, each.guidance), each.policy), each) for each in spreads]
        show_table(spread_table(f"spread of {unit(results[0])}", "policy", lines))
    if report.rivalry:
        rows = [(e.first, e.second, f"{e.improvement:.2f}", interval_text(e.interval, ".2f")) for e in report.rivalry]
        title = "probability that a member of the first scores higher than one of the second"
        show_table(make_table(title, ("first", "second", "P", "95 %"), rows, left=2))
    for policy, result in last.items():
        name = f"{policy}: " if len(last) > 1 else ""
        points = [other for other in asked if policy_of(other.policy, curve) == policy]
        early = [point.step for point in points if point.protocol.w != result.protocol.w]  # before labels were learned
        line = protocol_line(result.protocol, result.members, weights=not curve)
        say(name + line + (f", but w 0 until step {max(early)}" if early else ""), wrap=True)
        say(f"{name}training cost: {account_text(result.accounting)}", wrap=True)


def swap_tables(
    results: Sequence[Result], comparisons: Sequence[Comparison], spreads: Sequence[Spread]
) -> Iterator[Table | str]:
    """For each policy its scores over pairs of members, lines of their changes against its own guidance; then spreads."""
    star = "* this guidance learned from other data than the policy: the paper's guarantee does not hold there"
    for policy, group in groupby(comparisons, key=lambda each: each.policy):
        parts, mine = list(group), [result for result in results if result.policy == policy]
        rows = [(each.guidance + " *" * bool(each.warnings), each.seeds, each) for each in parts]
        title, other = f"{policy}: {unit(mine[0])}, over pairs of members", any(each.warnings for each in parts)
        yield from summary_tables(title, ("guidance", "seeds"), rows, mine, star if other else None)
        for guidance, seeds, each in rows:
            if each.change is not None:
                yield f"change under {guidance}, {seeds} ({each.pairs} pairs): {change_text(each.change)}"
    for policy in dict.fromkeys(each.policy for each in spreads):
        named = [(each.guidance, each) for each in spreads if each.policy == policy]
        yield spread_table(f"{policy}: spread of {unit(results[0])}", "guidance", named)


def change_text(change: Change) -> str:
    """A change with its 95 % intervals; a single member has no spread, few members have no interval."""

    def figure(name: str, form: str = "+.1f", unit: str = "") -> str:
        value, interval = getattr(change, name), (change.intervals or {}).get(name)
        shown = f"{value:{form}}{unit}" if value is not None else ""
        return shown + (f" ({interval_text(interval, form)})" if shown and interval else "")

    def both(name: str) -> str:
        percent = figure(f"{name}_percent", "+.0f", " %")
        return figure(name) + f", {percent}" * bool(percent)

    parts = {
        "mean": figure("mean"),
        "median": figure("median"),
        "range": interval_text(change.range, "+.1f"),
        "IQR": both("iqr"),
        "std": both("std"),
        "P(better)": figure("improvement", ".2f"),
    }
    return ", ".join(f"{name} {text}" for name, text in parts.items() if text)


def member_tables(result: Result, parts: Components) -> Iterator[Table]:
    """Scores of each policy member under each guidance member, and the components of their spread."""
    scores = result.scores.reshape(result.members, -1)
    seeds = list(dict.fromkeys(str(pair.policy_seed) for pair in result.pairs))
    best = parts.best_guidance
    caption = f"guidance {best.seed} is best over all policies: mean {best.mean:.1f} (online selection)"
    if parts.std is not None:
        shares = [f"{share.std:.1f} from the {name}" for name, share in parts.std.items()]
        caption = f"spread of scores, as std: {', '.join(shares)}; {caption}"
    for start in range(0, width := scores.shape[1], ACROSS):
        part = slice(start, start + ACROSS)
        rows = [(seed, *map(number, row[part])) for seed, row in zip(seeds, scores, strict=True)]
        columns = ("policy", *map(str, result.guidance_seeds[part]))
        title = f"{result.policy} under {result.guidance}: seeds of the policy by seeds of the guidance"
        yield make_table(title, columns, rows, caption if start + ACROSS >= width else None)


ACROSS = 7  # columns of members: more are not seen at once


def choice(how: Acting) -> list[str]:
    """How a guidance, or none, chooses actions, in the words of a protocol."""
    if how.guidance is None:
        return ["ranked by none, 1 candidate"]
    parts = []
    if how.guide != "gradient":
        softmax = f" at inverse temperature {how.weight_temperature:g}" if how.selection == "softmax" else ""
        support = f" minus {how.support:g} x distance to their median" if how.support else ""
        parts.append(f"{how.selection}{softmax} of {how.candidates} by {how.guidance}{support}")
    if how.guidance_weight > 0:
        parts.append(f"{how.guidance_weight:g} x gradient of {how.guidance}")
    return parts


def protocol_line(how: Protocol, *members: int, weights: bool = True) -> str:
    """A protocol in one line. members: their number, or that of each policy. weights: say of which step they are."""
    counts = " or ".join(map(str, sorted(set(members))))
    parts = [f"{how.environment}, {counts} members x {how.episodes} episodes, seed {how.seed}", *choice(how)]
    if how.w > 0:
        parts.append(f"w {how.w:g}")
    if how.horizon > 1:
        parts.append(f"{how.execute} of the {how.horizon} actions of a window taken")
    parts.append(f"temperature {how.temperature:g}" + TEMPERATURES[how.temperature_on])
    if weights:
        early = f"weights of step {how.step} of {how.steps} (online selection, if chosen by score)"
        parts.append("last weights" if how.step == how.steps else early)
    new = "members and start states" if how.episodes > 1 else "members"
    parts.append(f"intervals are for new {new}" if max(members) >= FEWEST else f"no intervals below {FEWEST} members")
    if how.ensemble != "none" and how.ensemble_over == "all":
        parts.append("an ensemble is shared by all members: statistics hold for this ensemble alone")
    if not how.repeatable:
        parts.append("not repeatable: the environment gives different results under one seed")
    if how.products != "default":
        parts.append(f"{how.products} products")
    if how.no_effect:
        parts.append(f"without effect here: {', '.join(how.no_effect)}")
    return ", ".join(parts)


def swap_line(results: Sequence[Result]) -> str:
    """The protocol that the guided cells of a swap share, in one line."""
    guided = [result for result in results if result.guidance != "none"] or results
    protocols = [result.protocol for result in guided]
    idle = set.intersection(*(set(how.no_effect) for how in protocols))
    joined = next((how for how in protocols if how.ensemble != "none"), protocols[0])
    name = protocols[0].guidance and "each guidance"
    shared = replace(joined, guidance=name, w=0, no_effect=sorted(idle))
    line = protocol_line(shared, *(result.members for result in guided), weights=False) + "; under none 1 candidate"
    labels = sorted({result.protocol.w for result in results} - {0})
    return line + (f"; w of policies with labels {' or '.join(f'{w:g}' for w in labels)}" if labels else "")


def describe(bundle: Bundle, path: Path, joint: bool = False) -> Iterator[Table]:
    """What a bundle is: experiment, lineage, data, cost, training history. joint: a guidance trained with its policy."""
    experiment, environment, identity = bundle.experiment, bundle.environment, bundle.dataset
    policy = experiment.policy
    section = policy if bundle.kind == "policy" else experiment.guidance
    pace = policy if joint else section  # a joint guidance takes the policy's steps and batches
    settings = section.model_dump() | {"batch_size": pace.batch_size}
    lineage = "\n".join(
        f"{each.experiment.guidance.algorithm} guidance, step {each.step}, seeds {', '.join(map(str, each.seeds))}"
        for each in bundle.guidances
    )
    facts = {
        "algorithm": section.algorithm + (f", {policy.scheme}" if bundle.kind == "policy" else ""),
        "experiment": experiment.name,
        "seeds": ", ".join(map(str, bundle.seeds)),
        "settings": settings_text(settings),
        "steps": f"{bundle.step} of {pace.steps}" + ("" if bundle.complete else " (unfinished)"),
        "snapshots": "".join(f"@{step}, " for step in bundle.snapshots) + "@last",
        "environment": f"{environment.id or 'none'}, O {environment.observation_dim}, A {environment.action_dim}",
        "data": f"{identity.source} {identity.name}, {identity.transitions} transitions, {identity.episodes} episodes"
        + window_text(experiment.data.horizon),
        "data hash": identity.hash[:16],
        "reward scale": scale_text(bundle.reward_scale),
        "reference": "{:g} is score 0, {:g} is 100".format(*bundle.reference) if bundle.reference else "none",
        "evaluation": settings_text(experiment.evaluation.model_dump()),
        "training cost": account_text(bundle.accounting),
        "versions": ", ".join(f"{name} {text}" for name, text in bundle.versions),
        "trained under": (lineage or "no guidance") if bundle.kind == "policy" else "data alone",
    }
    if bundle.kind == "policy":
        facts["best snapshot"] = "evaluate --curve chooses it, and scores it on other start states"
    yield make_table(f"{path}: {bundle.kind}", ("what", "value"), facts.items(), left=2)
    if history := bundle.history:  # of a joint guidance it is in the policy's
        names = metric_names(history)
        rows = []
        for entry in [*history[: -1 : max(1, len(history) // 10)], history[-1]]:
            values = (entry.metrics.get(name) for name in names)
            rows.append([str(entry.step), *(f"{sum(each) / len(each):.4g}" if each else "-" for each in values)])
        yield make_table("training history, mean over members", ("step", *names), rows)
    if bundle.quality:
        yield quality_table(bundle)
    for inner in bundle.guidances:
        yield from describe(inner, path, policy.scheme == "joint")


def metric_names(history: Sequence[models.Entry]) -> list[str]:
    """All metrics of a training history; guidance_from and guidance_until decide when some begin or end."""
    return list(dict.fromkeys(name for entry in history for name in entry.metrics))


def account_text(account: models.Account) -> str:
    """The cost of a training run, all members together."""
    return (
        f"{account.parameters_trained:,} parameters trained of {account.parameters_held:,} held, "
        f"optimizer {account.optimizer_bytes / 2**20:.1f} MiB, "
        f"peak {account.peak_bytes / 2**20:.1f} MiB above the data, "
        f"{account.seconds:.1f} s on {account.device} ({account.products} products), "
        f"{account.seconds_per_1000_steps:.2f} s per 1,000 steps"
    )


# --- pictures and film --------------------------------------------------------------------------------------------

INK, SHADE = "black", "0.75"
MARKERS = "osD^vP*X"
COLOURS = ("#332288", "#cc6677", "#117733", "#88ccee", "#882255", "#ddcc77", "#44aa99", "#aa4499")  # Paul Tol's
PICTURES = (".png", ".svg", ".pdf")


@contextmanager
def picture(path: Path, title: str, width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, written at the end of the block as PNG, SVG or PDF by the ending of `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # names are no formulas
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(textwrap.fill(data.printable(title), int(width * 14)), fontsize=9)
        yield figure
        with data.written_whole(path, "choose another --plot") as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])


def colour_of(seed: int) -> str:
    """The colour of the member with this seed, in all pictures."""
    return COLOURS[seed % len(COLOURS)]


def draw_pairs(axes: Axes, place: int, result: Result, median: float) -> None:
    """The score of each pair, and of its episodes as dots, side by side around a place; the median of pairs as a line."""
    seeds = np.array([pair.policy_seed for pair in result.pairs])
    places = place + np.linspace(-0.3, 0.3, len(seeds) + 2)[1:-1]
    for seed in dict.fromkeys(seeds.tolist()):
        scores, mine = result.episode_scores[seeds == seed], places[seeds == seed]
        axes.plot(mine.repeat(scores.shape[1]), scores.ravel(), ".", color=colour_of(seed), alpha=0.3, markersize=3)
        axes.plot(mine, scores.mean(1), "D", color=colour_of(seed), markersize=4, label=f"seed {seed}")
    axes.hlines(median, place - 0.4, place + 0.4, color=INK, linewidth=1, label="median")


def finish_axes(axes: Axes, results: Sequence[Result]) -> None:
    """Axes of scores: their unit, and lines of the dataset, if all policies learned from the same.

    The best episode of the data is a line only where that leaves the scores most of the picture.
    """
    parts = {(result.dataset.mean_score, result.dataset.best_score) for result in results}
    for mean, best in parts if len(parts) == 1 else ():
        axes.axhline(mean, color="0.5", linestyle=":", label=f"data mean {mean:.1f}")
        low, high = axes.get_ylim()
        if low <= best <= high + 0.3 * (high - low):
            axes.axhline(best, color="0.5", linestyle="--", label=f"data best {best:.1f}")
        else:
            axes.plot([], [], " ", label=f"data best {best:.1f}, outside")
    axes.set_ylabel(unit(results[0]))


def add_legend(figure: Figure) -> None:
    """One legend of all axes, in which each label stands once."""
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    columns = max(1, int(figure.get_figwidth() / 2.2))  # inches, enough for a bundle's name
    place: Any = "outside lower center"
    figure.legend(handles.values(), handles, loc=place, ncols=columns, frameon=False, fontsize=8)


def plot_scores(path: Path, results: Sequence[Result], comparisons: Sequence[Comparison]) -> None:
    """The score of each episode and member, the median of members, and the dataset; one sample after the rest."""
    guided = [result for result in results if acting(result.protocol) != ONE_SAMPLE] or results
    names = ", ".join(dict.fromkeys(result.policy for result in results))
    guidance = " or ".join(dict.fromkeys(str(result.protocol.guidance) for result in guided))
    how = replace(guided[0].protocol, guidance=guidance)
    members, steps = [result.members for result in results], {result.step for result in results}
    line = protocol_line(how, *members, weights=len(steps) == 1)
    with picture(path, f"{names}: {line}", max(7, 1.8 * len(results)), 4.5) as figure:
        axes = figure.add_subplot()
        for place, (result, each) in enumerate(zip(results, comparisons, strict=True)):
            draw_pairs(axes, place, result, each.summary.median)
        labels = [f"{textwrap.fill(result.policy, 24)}\n{acting(result.protocol)}" for result in results]
        axes.set_xticks(range(len(results)), labels, fontsize=8)
        axes.set_xlabel("diamonds: members; dots: their episodes")
        finish_axes(axes, results)
        add_legend(figure)


def plot_curve(path: Path, results: Sequence[Result]) -> None:
    """Score, length and success rate over training steps: median and interquartile range, members if of one policy."""
    curves: dict[str, list[Result]] = {}
    for result in results:
        curves.setdefault(policy_of(result.policy, True), []).append(result)
    line = protocol_line(results[0].protocol, *(result.members for result in results), weights=False)
    told = all(pair.success is not None for result in results for pair in result.pairs)
    panels, heights, alone = ["score", "length", *["success"] * told], [3, 1, *[1] * told], len(curves) == 1
    with picture(path, f"{', '.join(curves)}: {line}", 7, 1 + 1.2 * sum(heights)) as figure:
        for axes, key in zip(figure.subplots(len(panels), 1, sharex=True, height_ratios=heights), panels, strict=True):
            for (name, points), marker in zip(curves.items(), MARKERS * len(curves), strict=False):
                steps = [point.step for point in points]
                values = np.array([[getattr(pair, key) for pair in point.pairs] for point in points])  # (steps, S)
                for pair, column in zip(points[0].pairs if alone else (), values.T, strict=False):
                    label = f"seed {pair.policy_seed}"
                    axes.plot(steps, column, color=colour_of(pair.policy_seed), linewidth=1, label=label)
                style: dict[str, Any] = {"label": "median of members", "color": INK} if alone else {"label": name}
                (median,) = axes.plot(steps, np.median(values, 1), marker=marker, **style)
                low, high = np.percentile(values, [25, 75], axis=1)
                axes.fill_between(steps, low, high, color=median.get_color(), alpha=0.12, linewidth=0)
            axes.set(ylabel=key)
        finish_axes(figure.axes[0], results)
        figure.axes[-1].set_xlabel("gradient steps; shaded: interquartile range")
        add_legend(figure)


def plot_history(path: Path, bundle: Bundle, name: Path) -> None:
    """The training history of a bundle: each metric over gradient steps, for each member and the mean."""
    history, names = bundle.history, metric_names(bundle.history)
    algorithm = getattr(bundle.experiment, bundle.kind).algorithm
    rows = math.ceil(len(names) / 2)
    title = f"{name}: training of {algorithm} {bundle.kind} on {bundle.environment.id}"
    with picture(path, title, 8, 1.2 + 2 * rows) as figure:
        for place, key in enumerate(names, start=1):
            axes = figure.add_subplot(rows, 2, place)
            entries = [entry for entry in history if key in entry.metrics]
            steps, values = [entry.step for entry in entries], np.array([entry.metrics[key] for entry in entries])
            for seed, column in zip(bundle.seeds, values.T, strict=True):
                axes.plot(steps, column, color=colour_of(seed), linewidth=0.8, label=f"seed {seed}")
            axes.plot(steps, values.mean(1), color=INK, linewidth=1.2, label="mean")
            axes.set(xlabel="gradient steps" if place > len(names) - 2 else "", ylabel=key)
        add_legend(figure)


def plot_swap(path: Path, results: Sequence[Result], comparisons: Sequence[Comparison]) -> None:
    """The matrix of medians and IQR, policies by guidances, above a panel with every pair for each policy."""
    cells = {(result.policy, result.guidance): result for result in results}
    summaries = {(each.policy, each.guidance): each.summary for each in comparisons}
    policies, guidances = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    middle = np.array([[summaries[p, g].median if (p, g) in cells else np.nan for g in guidances] for p in policies])
    middling = (np.nanmin(middle) + np.nanmax(middle)) / 2
    heights = [1 + 0.45 * len(policies), *[2.2] * len(policies)]
    with picture(path, swap_line(results), 2 + 1.5 * len(guidances), sum(heights) + 1) as figure:
        matrix, *panels = figure.subplots(len(heights), 1, height_ratios=heights)
        for axes in panels:
            axes.sharey(panels[0])
        matrix.imshow(middle, cmap="cividis", aspect="auto")
        for (p, g), result in cells.items():
            row, column = policies.index(p), guidances.index(g)
            text = f"{middle[row, column]:.1f}{' *' * bool(result.warnings)}\nIQR {number(summaries[p, g].iqr)}"
            ink = "black" if middle[row, column] > middling else "white"
            matrix.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
            draw_pairs(panels[row], column, result, middle[row, column])
        columns, lines = ([textwrap.fill(name, 20) for name in names] for names in (guidances, policies))
        matrix.set_yticks(range(len(policies)), lines, fontsize=8)
        star = "; *: other data" if any(result.warnings for result in results) else ""
        matrix.set_title(f"median (IQR) by policy and guidance{star}", fontsize=8)
        for policy, axes in zip(policies, panels, strict=True):
            axes.set_title(f"{policy}: pairs of members; dots: their episodes", fontsize=8)
            finish_axes(axes, [result for result in results if result.policy == policy])
        for axes in figure.axes:
            axes.set_xticks(range(len(guidances)), columns, fontsize=8)
            axes.set_xlim(-0.5, len(guidances) - 0.5)
        add_legend(figure)


FRAME_EVERY = 3  # steps: at the 60 per second of PyBullet, 20 frames per second


def film(cell: Cell, seed: int | None, path: Path, workers: Workers) -> None:
    """Play one episode of the member with this seed (None: the first) and write it as a GIF, figures in each frame."""
    from PIL import Image, ImageDraw

    seeds, reference = cell.bundle.seeds, cell.bundle.reference
    if seed is not None and seed not in seeds:
        raise data.MdptError(f"--member {seed}: the seeds in {cell.policy} are {', '.join(map(str, seeds))}")
    pair = cell.pairs[0 if seed is None else seeds.index(seed)]
    once = replace(cell, pairs=[pair], section=cell.section.model_copy(update={"episodes": 1}))
    tasks = list(cut_into_tasks(once, models.choose_products()))
    frames = []
    with progress("film", cell.bundle.environment.max_episode_steps) as show:

        def look(step: int, total: float, pixels: Array) -> None:
            frame = Image.fromarray(pixels)
            score = f", score {float(normalized_score(np.array(total), reference)):.1f}" if reference else ""
            text = f"return {total:.1f}{score}"
            label = f"seed {seeds[pair[0]]}, step {step}\n{text}"
            ImageDraw.Draw(frame).text((6, 4), label, fill="white", stroke_width=1, stroke_fill="black", font_size=14)
            frames.append(frame)
            show(step, text)

        def shoot(task: Play, watch: Watch) -> None:
            models.play(task, watch, look=look, every=FRAME_EVERY)

        list(data.parallel(shoot, tasks, replace(workers, count=1, cluster=None), 1))
    with data.written_whole(path, "choose another --video") as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)


# --- commands -----------------------------------------------------------------------------------------------------

SPINS = "3000"  # turns that an idle thread waits awake; by default 300,000 and more, which slows others on its cores
INTERRUPTED = 130  # exit code
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
STEP_SECONDS = 600.0  # that one step of an environment may take, by default
MESSAGE_LENGTH = 1_500  # characters of an error message, which may repeat what the user gave


class Command(TyperCommand):
    """A command whose signals and warnings are handled once its options are read: --help needs neither."""

    def invoke(self, ctx: Any) -> Any:
        try:
            os.getcwd()
        except FileNotFoundError as error:
            raise data.MdptError("the working folder was deleted; change to another one") from error
        with data.on_signals(ctx.obj), warnings_printed():
            return super().invoke(ctx)


class Commands(TyperGroup):
    """The command `mdpt`, which turns a user's mistake, or a signal, into one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if "OMP_WAIT_POLICY" not in os.environ:  # read when torch loads
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        open_closed_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # characters that its encoding lacks
        caught: list[int] = []

        def stop(number: int, frame: Any) -> None:
            caught.append(number)
            raise KeyboardInterrupt

        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False, "obj": stop})
            if code == INTERRUPTED:  # typer's answer to Ctrl-C
                raise KeyboardInterrupt
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (`explain` raises what it does not know)
            with data.on_signals(lambda number, frame: None):  # one signal is enough
                code = fail(explain(error, caught))
                if os.environ.get("MDPT_DEBUG") == "1":
                    traceback.print_exception(error)
        sys.exit(code if isinstance(code, int) else 0)


def open_closed_streams() -> None:
    """Open the standard streams that the caller closed, else an output file would take their number.

    stdout is opened for reading, so that results which nobody can see are still an error; stderr loses what it is told.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)  # the lowest free number
            os.set_inheritable(opened, True)  # by worker processes
            setattr(sys, name, open(opened, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)


def explain(error: BaseException, caught: Sequence[int]) -> Exception:
    """The error to show the user for an exception. caught: signals, which may have caused it. Raises: an unknown error."""
    if caught:
        interrupted = error if isinstance(error, data.Interrupted) else data.Interrupted()
        interrupted.code = 128 + caught[0]
        return interrupted
    if isinstance(error, data.MdptError | typer.TyperException):
        return error
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return data.Interrupted()
    if isinstance(error, OSError):
        return data.MdptError(f"{error.filename or 'the output'}: {error.strerror or error}")
    if isinstance(error, Exception) and out_of_memory(error):
        return data.MdptError("not enough memory; lower batch_size, hidden, candidates, or the number of seeds")
    raise error


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out in Python, in torch on CUDA, or in torch on a CPU, which raises a plain RuntimeError."""
    on_cpu = any(text in str(error) for text in ("can't allocate", "size calculation overflowed"))
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or on_cpu


def fail(error: Exception) -> int:
    """Print an error on stderr, even if the streams are closed; returns the exit code."""
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    text = text if len(text) < MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]} ..."
    with suppress(OSError):
        print(f"mdpt: {data.printable(text)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # Python would try again at its end, and complain
        with suppress(OSError, ValueError), open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), sys.stdout.fileno())
    return getattr(error, "code", 1)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def need_tensorboard(folder: Path | None) -> Path | None:
    if folder is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise data.MdptError(
                "--tensorboard needs the package tensorboard: pip install 'mdpt[tensorboard]'"
            ) from error
    return folder


def as_argument(path: Path) -> str:
    """A file's name as an argument that is not taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def option(help: str, metavar: str | None = None, name: str | None = None, **more: Any) -> Any:
    return typer.Option(*([name] if name else []), metavar=metavar, help=help, **more)


ExperimentFile = Annotated[Path, typer.Argument(help="experiment file, TOML")]
EvaluateBundles = Annotated[list[Path], typer.Argument(help="policy bundles; with --describe also a guidance bundle")]
SwapBundles = Annotated[list[Path], typer.Argument(help="policy bundles")]
SET = "override a field of {}; without VALUE, leave the field out; repeatable"
Overrides = Annotated[Texts, option(SET.format("the experiment file"), "TABLE.KEY=VALUE", "--set")]
Settings = Annotated[Texts, option(SET.format("[evaluation]"), "evaluation.KEY=VALUE", "--set")]
Seeds = Annotated[Text, option("one member for each seed, trained side by side", "0,1,2")]
Device = Annotated[Text, option("auto, cpu or cuda", "NAME")]
Out = Annotated[File, option("bundle to write; by default named after experiment, algorithm and scheme", "FILE")]
AGAIN = "replace files that exist; results of the same cells are kept"
Overwrite = Annotated[bool, option(AGAIN, name="--overwrite")]
Extend = Annotated[bool, option("let an unfinished run have more steps than it was begun with", name="--extend")]
BOARD = "write the training history for TensorBoard"
Board = Annotated[File, option(BOARD, "FOLDER", "--tensorboard", callback=need_tensorboard)]
DescribeData = Annotated[bool, option("describe the data; train nothing", name="--describe-data")]
TEACHERS = "frozen guidance, or a policy that holds one; repeatable for an ensemble"
Teachers = Annotated[Files, option(TEACHERS, "FILE", "--guidance")]
ACTING = "bundle whose guidance acts, or none; by default the one inside the policy; repeatable for an ensemble"
Acts = Annotated[Texts, option(ACTING, "FILE")]
SWAPPED = (
    "bundle whose guidance acts, FILE@all for each of its snapshots, or none; by default those inside the policies; "
    "repeatable"
)
Swapped = Annotated[Texts, option(SWAPPED, "FILE", "--guidance")]
PAIRS = "matched: members by position; all: each with each; by default all, up to 2,000 rollouts"
Pairs = Annotated[Text, option(PAIRS, "KIND")]
Processes = Annotated[int, option("processes that simulate; changes no result", "N", min=1)]
Trainers = Annotated[
    Number,
    option("processes that train the members, and collect data; by default the fastest; changes no result", "N", min=1),
]
Timeout = Annotated[float, option("time limit of one step of an environment", "SECONDS", min=0.1)]
Cluster = Annotated[Text, option("play on the workers of this Dask scheduler, which must be trusted", "ADDRESS")]
Imports = Annotated[Texts, option("trust this module, which makes the environment; repeatable", "MODULE", "--import")]
Json = Annotated[
    File, option("write all figures, also each episode's return; updated after each cell", "FILE", "--json")
]
Episodes = Annotated[Number, option("episodes of each pair of members", "N")]
Candidates = Annotated[Number, option("actions drawn per state, of which the guidance chooses one", "N")]
PlaySeed = Annotated[Number, option("seed of start states and sampling noise", "N", "--seed")]
CURVE = "score every snapshot; choose one by half of the start states, score it on the others"
Curve = Annotated[bool, option(CURVE, name="--curve")]
Plot = Annotated[File, option("draw the results: .png, .svg or .pdf", "FILE", "--plot")]
Video = Annotated[File, option("film one episode, instead of scoring", "FILE.gif")]
Member = Annotated[Number, option("the member to film; by default the first", "SEED")]
Describe = Annotated[bool, option("describe the bundle; play nothing", name="--describe")]
DataFile = Annotated[File, option("evaluate offline, on held-out episodes of this file", "FILE", "--data")]


@app.callback(invoke_without_command=True)
def mdpt(
    context: typer.Context, show_version: Annotated[bool, option("print the version", name="--version")] = False
) -> None:
    """Diffusion policies for offline RL, guidance and policy as separate, swappable modules."""
    if show_version:
        say(f"mdpt {data.version()}")
    elif context.invoked_subcommand is None:
        say(context.get_help())


@app.command(cls=Command)
def guidance(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    seeds: Seeds = None,
    device: Device = None,
    out: Out = None,
    overwrite: Overwrite = False,
    extend: Extend = False,
    board: Board = None,
    describe_only: DescribeData = False,
    workers: Trainers = None,
    timeout: Timeout = STEP_SECONDS,
) -> None:
    """Train a guidance from the data alone."""
    run, chosen = load_run("guidance", experiment, overrides, seeds, device)
    where = data.Workers(workers or CORES, timeout)
    if describe_only:
        show_table(data_table(load_data(run.data, where)))
        return
    path = out or Path(f"{run.name}-{run.guidance.algorithm}.guidance.pt")
    with claimed(overwrite, {"--out": path}, [experiment, run.data.path]):
        begun = unfinished(path, board, overwrite, extend)
        dataset = load_data(run.data, where)
        if text := growth_text(run.guidance):
            say(text, stderr=True)
        with training_run("guidance", run, chosen, path, begun, extend, board, workers) as training:
            bundle = models.train_guidance(run, dataset, training)
        if bundle.quality:
            show_table(quality_table(bundle))
            if problem := value_problem(bundle):
                warn(f"{path}: {problem}")
        else:
            warn(f"{path}: its quality is not known, since no episode is held out; set [data] held_out above 0")
    same = repeated(overrides, seeds, "policy", "evaluation")
    say(f"next: {shlex.join(['mdpt', 'policy', as_argument(experiment), '--guidance', str(path), *same])}")


def repeated(overrides: Texts, seeds: Text, *tables: str) -> list[str]:
    """Options of a command that the next one needs, which reads these tables, [data] and the top level."""
    tops = {name: setting_name(name).rpartition(".")[0].partition(".")[0] for name in overrides or []}
    same = [part for name, top in tops.items() if top in ("", "data", *tables) for part in ("--set", name)]
    return same + (["--seeds", seeds] if seeds else [])


def read_teachers(files: Sequence[Path], run: Experiment) -> list[Bundle]:
    """The guidances that a policy learns under.

    Raises: MdptError if they do not go with the scheme, with each other or with the policy's members, before data are loaded.
    """
    scheme, teachers = run.policy.scheme, []
    if scheme == "guidance-first" and not files:
        raise data.MdptError(
            "scheme guidance-first needs --guidance FILE, written by `mdpt guidance`; "
            "without one, --set policy.scheme=joint or =unguided"
        )
    if scheme != "guidance-first" and files:
        raise data.MdptError(f"scheme {scheme} takes no --guidance; leave it out, or set policy.scheme=guidance-first")
    for file in dict.fromkeys(files):
        for teacher in models.read_guidances(file):
            teachers.append(teacher)
            if not teacher.complete:
                warn(f"{file}: this guidance is unfinished, at step {teacher.step}")
    models.check_ensemble(teachers, run.policy.ensemble)
    if teachers and run.policy.ensemble == "none":
        models.pair_members(len(run.seeds), len(teachers[0].seeds))
    return teachers


def warn_of_settings(section: data.PolicySection) -> None:
    """Warn of settings of [policy] that together do what the user hardly wants."""
    if section.scheme != "unguided" and not models.learns_under_guidance(section):
        names = ("eta", "advantage_weight", "label_dropout")
        reads = [name for name in names if name in models.POLICIES[section.algorithm].reads]
        values = [f"{name} {getattr(section, name)}" for name in (*reads, "guidance_from", "guidance_until")]
        warn(
            f"guidance never enters the loss of {section.algorithm} with {', '.join(values)}: this policy learns as if "
            "unguided"
        )
    if models.learns_labels(section) and section.guidance_until < 1:
        warn(
            f"labels are learned until guidance_until {section.guidance_until:g} of the steps and grow stale after it, but "
            "act to the end: evaluation.w = 0 leaves them out"
        )
    if problem := models.schedule_problem(section):
        warn(f"noise_schedule {section.noise_schedule} with {section.diffusion_steps} diffusion_steps: {problem}")


@app.command(cls=Command)
def policy(
    experiment: ExperimentFile,
    guidance_files: Teachers = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    device: Device = None,
    out: Out = None,
    overwrite: Overwrite = False,
    extend: Extend = False,
    board: Board = None,
    workers: Trainers = None,
    timeout: Timeout = STEP_SECONDS,
) -> None:
    """Train a diffusion policy under a frozen guidance."""
    run, chosen = load_run("policy", experiment, overrides, seeds, device)
    scheme, files = run.policy.scheme, guidance_files or []
    suffix = "" if scheme == "guidance-first" else f"-{scheme}"
    path = out or Path(f"{run.name}-{run.policy.algorithm}{suffix}.policy.pt")
    teachers = read_teachers(files, run)
    warn_of_settings(run.policy)
    with claimed(overwrite, {"--out": path}, [experiment, run.data.path, *files]):
        begun = unfinished(path, board, overwrite, extend)
        dataset = load_data(run.data, data.Workers(workers or CORES, timeout))
        with training_run("policy", run, chosen, path, begun, extend, board, workers) as training:
            bundle = models.train_policy(run, dataset, teachers, training)
        try:  # [evaluation] may fail where training does not
            cell = make_cell(str(path), bundle, Guidance(OWN, {OWN: bundle.guidances}), [])
            held_out = dataset.held_out if len(dataset.held_out.rewards) else None
            for found in evaluate_offline([cell], None, held_out).cells if held_out else ():
                for table in offline_tables(found):
                    show_table(table)
        except data.MdptError as error:
            warn(str(error))
    module = data.imported_for(dataset.environment.id or "")
    command = ["mdpt", "evaluate", as_argument(path), *(["--import", module] if module else [])]
    if bundle.guidances:
        say(f"next, with candidates ranked by its guidance, beside one sample: {shlex.join(command)}")
    else:
        judge = f"{run.name}-{run.guidance.algorithm}.guidance.pt"
        train = ["mdpt", "guidance", as_argument(experiment), *repeated(overrides, seeds, "guidance")]
        first = "" if Path(judge).exists() else f"{shlex.join(train)} && "
        say(
            f"next, with candidates ranked by a guidance, beside one sample: {first}{shlex.join([*command, '--infer-guidance', judge])}"
        )


@app.command(cls=Command)
def evaluate(
    policies: EvaluateBundles,
    infer_guidance: Acts = None,
    settings: Settings = None,
    episodes: Episodes = None,
    candidates: Candidates = None,
    seed: PlaySeed = None,
    json_file: Json = None,
    curve: Curve = False,
    plot_file: Plot = None,
    video: Video = None,
    member: Member = None,
    overwrite: Overwrite = False,
    describe_only: Describe = False,
    data_file: DataFile = None,
    imports: Imports = None,
    workers: Processes = CORES,
    timeout: Timeout = STEP_SECONDS,
    cluster: Cluster = None,
) -> None:
    """Score policies in their environment, their candidates ranked by a guidance."""
    given, where = evaluation_settings(settings, episodes, candidates, seed), data.Workers(workers, timeout, cluster)
    check_ending("--plot", plot_file, PICTURES)
    check_ending("--video", video, [".gif"])
    scoring: dict[str, object] = {"--curve": curve, "--json": json_file, "all bundles but one": policies[1:]}
    if describe_only:
        others = {
            "--infer-guidance": infer_guidance,
            "--video": video,
            "--data": data_file,
            "--set, --episodes, --candidates, --seed": given,
        }
        leave_out("--describe plays nothing and goes with --plot alone", scoring | others)
    if video is not None:
        leave_out("--video films one episode", scoring | {"--plot": plot_file, "--episodes": episodes})
    elif member is not None:
        leave_out("without --video no member is chosen", {f"--member {member}": True})
    outputs = {"--json": json_file, "--plot": plot_file, "--video": video}
    with claimed(overwrite, outputs, [*policies, *(infer_guidance or []), data_file]):
        if describe_only:
            show_bundle(policies[0], plot_file)
            return
        paths = [name for path in dict.fromkeys(policies) for name in (snapshots(path) if curve else [path])]
        chosen = read_cell_guidance(infer_guidance or [])
        cells = [read_cell(path, chosen, given) for path in paths]
        check_comparable(cells)
        last = {
            policy_of(cell.policy, curve): cell for cell in cells
        }.values()  # of a curve, whose steps share warnings
        warn_of_cells(list(last))
        missing = [reason for cell in last if (reason := no_environment(cell))]
        for reason in missing:
            warn(reason)
        if missing or data_file is not None:
            playing = {"--video": video, "--plot": plot_file, "--episodes": episodes, "--cluster": cluster}
            leave_out("nothing is played offline", playing)
            show_offline(cells, data_file, json_file, overwrite)
            return
        check_imports(cells, imports or [])
        if video is not None:
            film(cells[0], member, video, where)
            return
        beside = [] if curve else one_samples(cells, given)
        score_policies([*cells, *beside], curve, json_file, plot_file, overwrite, where)


def leave_out(reason: str, others: Mapping[str, object]) -> None:
    """Raises: MdptError with this reason if any of the other options is given."""
    if given := [name for name, value in others.items() if value]:
        raise data.MdptError(f"{reason}; leave out {', '.join(given)}")


def show_bundle(path: Path, plot_file: File) -> None:
    """Describe a bundle, and draw its training history if asked to."""
    bundle = models.read_bundle(path)
    if plot_file is not None:
        plot_history(plot_file, bundle, path)
    for table in describe(bundle, path):
        show_table(table)


def show_offline(cells: Sequence[Cell], data_file: File, json_file: File, overwrite: bool) -> None:
    """Evaluate policies offline: print the tables, and write a file of the same figures."""
    if json_file is not None:
        refuse_to_overwrite(json_file, overwrite)
    report = evaluate_offline(cells, data_file)
    store_json(json_file, report)
    for table in chain.from_iterable(map(offline_tables, report.cells)):
        show_table(table)


def score_policies(
    cells: Sequence[Cell], curve: bool, json_file: File, plot_file: File, overwrite: bool, where: Workers
) -> None:
    """Play cells and show their scores."""
    report = play_cells(cells, json_file, overwrite, where)
    spreads = compare_spreads(report.cells, report.summary or [], together=True)
    choices = choose_snapshots(report.cells, curve) if curve else None
    report = replace(report, spreads=spreads, choices=choices, rivalry=compare_policies(report.cells, curve))
    store_json(json_file, report)
    comparisons = overall(report.summary or [])
    if plot_file is not None:
        plot_curve(plot_file, report.cells) if curve else plot_scores(plot_file, report.cells, comparisons)
    show_evaluation(report, comparisons, curve)
    one = {result.policy: result for result in report.cells}  # where it was played, one sample comes last
    for result in {policy_of(each.policy, curve): each for each in asked_for(report.cells)}.values():
        advise(cells[report.cells.index(result)], result, one[result.policy])


@app.command(cls=Command)
def swap(
    policies: SwapBundles,
    guidances: Swapped = None,
    pairs: Pairs = None,
    settings: Settings = None,
    episodes: Episodes = None,
    candidates: Candidates = None,
    seed: PlaySeed = None,
    json_file: Json = None,
    plot_file: Plot = None,
    overwrite: Overwrite = False,
    imports: Imports = None,
    workers: Processes = CORES,
    timeout: Timeout = STEP_SECONDS,
    cluster: Cluster = None,
) -> None:
    """Score every policy member under every guidance member, under none, and under its own."""
    if pairs not in (None, "matched", "all"):
        raise data.MdptError(f"--pairs {pairs}: expected matched or all")
    check_ending("--plot", plot_file, PICTURES)
    with claimed(overwrite, {"--json": json_file, "--plot": plot_file}, [*policies, *(guidances or [])]):
        cells = plan_swap(policies, guidances or [], pairs, evaluation_settings(settings, episodes, candidates, seed))
        for cell in cells:
            if reason := no_environment(cell):
                raise data.MdptError(f"{reason}; `mdpt evaluate` evaluates it offline")
        check_imports(cells, imports or [])
        warn_of_cells(cells)
        report = play_cells(cells, json_file, overwrite, data.Workers(workers, timeout, cluster))
        crossed = [result for result in report.cells if len(result.pairs) > result.members]
        components = [split_spread(result) for result in crossed]
        spreads = compare_spreads(report.cells, report.summary or [], together=False)
        choices, verdicts = choose_snapshots(report.cells, curve=False), compare_algorithms(report.cells)
        report = replace(report, spreads=spreads, choices=choices, verdicts=verdicts, components=components)
        store_json(json_file, report)
        if plot_file is not None:
            plot_swap(plot_file, report.cells, overall(report.summary or []))
        for result, parts in zip(crossed, components, strict=True):
            for table in member_tables(result, parts):
                show_table(table)
        for part in [
            *swap_tables(report.cells, report.summary or [], report.spreads or []),
            *map(choice_text, choices),
            *verdicts,
            swap_line(report.cells),
        ]:
            say(part, wrap=True) if isinstance(part, str) else show_table(part)


def evaluation_settings(settings: Texts, episodes: Number, candidates: Number, seed: Number) -> list[str]:
    """All settings of an evaluation in the form of --set."""
    options = {"episodes": episodes, "candidates": candidates, "seed": seed}
    return [*(settings or []), *(f"evaluation.{key}={value}" for key, value in options.items() if value is not None)]


main = app  # of mdpt/__init__.py, where this file stands for the package

if __name__ == "__main__":
    app()
