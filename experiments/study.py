"""The reference study of modular guidance: transfer, order of training, necessity, conditions, offline figures.

    python experiments/study.py FOLDER PART ... [--file NAME=FILE.hdf5 ...]   runs `mdpt` commands; goes on where it stopped
    python experiments/study.py FOLDER pilot                                  does ranking beat one sample?
    python experiments/study.py --table                                       prints the tables and tests of README.md here
    python experiments/study.py --check                                       compares README.md with these tables
    python experiments/study.py --plot                                        draws experiments/study/*.png

Bundles and JSON of mdpt go to FOLDER; each episode's return goes to experiments/study/PART.json as soon as its cell is
played. All parts come from one commit: run the script from a clean checkout, with mdpt installed from it.

Hypotheses, each tested once, all corrected together by Holm's rule (two-sided where nothing else is said):
  spread      (S1, each task) under guidances of other seeds (B) the scores spread otherwise than under the policy's own
              (A): over members (Spearman's correlation of the sums and differences of pairs); over episodes and over
              snapshots within a member (Wilcoxon's signed-rank test of the members' standard deviations).
  transfer    (S1, each task) guidances of another algorithm (C) score no worse: the mean of C - A is above -15
              (one-sided t test over members).
  ensemble    (S1b, each task) ranks of A and B by position spread otherwise than A alone, over members.
  order       (S2, each algorithm and fraction) guidance first and joint training, of as many steps of both modules,
              end with other scores; have other areas under the curve (paired t tests over members).
  necessity   (S3) what a stage of guidance does depends on the algorithm: interaction in an analysis of variance of
              ranks; for one sample, and ranked.
S4 and S5 are exploratory: nothing is tested.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import integrate, stats
from support import mdpt, of_file, train

from mdpt import mdpt as cli
from mdpt import models
from mdpt.data import load_dataset

ROOT = Path(__file__).resolve().parent.parent
STORE, PAGE = ROOT / "experiments" / "study", ROOT / "experiments" / "README.md"
STEPS, SNAPSHOTS = 5000, 5
TASKS: dict[str, Path | str] = {
    "hopper": ROOT / "hopper.toml",
    "halfcheetah": ROOT / "experiments" / "halfcheetah.toml",
}
MARGIN = 15.0  # points by which another algorithm's guidance may be worse
STAGES = {
    "never": (0, 0),
    "first third": (0, 1 / 3),
    "second": (1 / 3, 2 / 3),
    "last": (2 / 3, 1),
    "throughout": (0, 1),
}
CONDITIONS: dict[str, Sequence[str]] = {  # S4: settings of guidance and policy
    "as S1": (),
    "young guidance": (f"guidance.steps={STEPS // 10}",),
    "a tenth of the data": ("data.fraction=0.1",),
    "no layer norm": ("guidance.layer_norm=false",),
    "eta 0": ("policy.eta=0",),
    "conservatism 0": ("guidance.conservatism=0",),  # 1 is the default
}
Scores = np.ndarray  # (members, episodes)


# --- running ------------------------------------------------------------------------------------------------------


class Part:
    """One part of the study: commands in a folder, and what its cells gave, which is stored after each."""

    def __init__(self, folder: Path, name: str, task: str, seeds: Sequence[int]) -> None:
        self.folder, self.task, self.file = folder / name, task, STORE / f"{name}.json"
        self.seeds = ",".join(map(str, seeds))
        self.found: dict[str, Any] = {"commit": commit(), "cells": {}, "figures": {}}
        if self.file.exists():
            self.found = json.loads(self.file.read_text())
            if self.found["commit"] != commit():
                sys.exit(f"{self.file} is of commit {self.found['commit']}; check that one out, or remove the file")
        self.folder.mkdir(parents=True, exist_ok=True)
        training = f"steps = {STEPS}\nsnapshots = {SNAPSHOTS}\n"
        data = TASKS[task]
        top, table = (f'extends = "{data}"\n', "") if isinstance(data, Path) else ("", f"[data]{data}")
        text = f'{top}name = "{name}"\ndevice = "cpu"\n{table}[guidance]\ntau = 0.04\n{training}[policy]\n{training}'
        (self.folder / "task.toml").write_text(text)

    def train(self, kind: str, name: str, settings: Sequence[str], seeds: str, *options: str) -> str:
        sets = [part for setting in settings for part in ("--set", setting)]
        return train(self.folder, kind, "task.toml", f"{name}.pt", *sets, "--seeds", seeds, *options)

    def guidance(self, name: str, *settings: str, seeds: Sequence[int] = ()) -> str:
        """Train a guidance, by default with the part's seeds; returns its file."""
        return self.train("guidance", name, settings, ",".join(map(str, seeds)) or self.seeds)

    def policy(self, name: str, algorithm: str, teacher: str | None, *settings: str, seeds: str = "") -> str:
        """Train a policy under a guidance, or, without one, as `settings` say; returns its file."""
        options = ("--guidance", teacher) if teacher else ()
        return self.train("policy", name, (f"policy.algorithm={algorithm}", *settings), seeds or self.seeds, *options)

    def play(self, names: Sequence[str], command: str, policy: str, *options: object) -> None:
        """Play with `evaluate` or `swap`; `names`: of the first cells of its report, "" for one to leave out."""
        if all(name in self.found["cells"] for name in names if name):
            return
        file = f"{'-'.join(names).replace(' ', '-')}.json"
        again = ["--overwrite"] if (self.folder / file).exists() else []  # keeps what was played
        mdpt(self.folder, command, policy, *options, "--json", file, *again)
        report = json.loads((self.folder / file).read_text())
        for name, cell in zip(names, report["cells"], strict=False):  # others: one samples that are known, ensembles
            low, high = cell["protocol"]["reference"]
            scores = [
                [round(100 * (each - low) / (high - low), 1) for each in pair["returns"]] for pair in cell["pairs"]
            ]
            if name:
                self.found["cells"][name] = scores
        self.found["versions"] = report["cells"][0]["versions"]
        self.store()

    def store(self) -> None:
        STORE.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(self.found) + "\n")


def commit() -> str:
    """The commit of this checkout. Exits where it is not clean, or mdpt is another one."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = [line for line in git("status", "--porcelain").splitlines() if "experiments/study/" not in line]
    installed = Path(models.__file__).parent
    others = [
        name for name in ("data.py", "models.py", "mdpt.py") if not filecmp.cmp(installed / name, ROOT / name, False)
    ]
    if changed or others:
        sys.exit(f"run this from a clean checkout, with mdpt installed from it; differs: {', '.join(changed + others)}")
    return git("rev-parse", "HEAD")


def transfer(part: Part) -> None:
    """S1 and S1b: `dql` policies under A, judged by A, none, B and C, by A and B, and A, B and C, ranked by position."""
    members = len(part.seeds.split(","))
    a = part.guidance("A")
    b = part.guidance("B", seeds=range(100, 100 + members))
    c = part.guidance("C", "guidance.algorithm=dql")
    policy = part.policy("P", "dql", a)
    part.play(["A", "none"], "evaluate", policy)
    part.play(["B"], "evaluate", policy, "--infer-guidance", b)
    part.play(["C"], "evaluate", policy, "--infer-guidance", c)
    position = ("--set", "evaluation.ensemble=rank", "--set", "evaluation.ensemble_over=position")
    judges = ["--infer-guidance", a, "--infer-guidance", b]
    part.play(["A and B"], "evaluate", policy, *judges, *position)
    part.play(["A, B and C"], "evaluate", policy, *judges, "--infer-guidance", c, *position)
    for name, judge in (("A", a), ("B", b)):
        steps = [f"{name} at snapshot {number}" for number in range(1, SNAPSHOTS + 1)]
        part.play(steps, "evaluate", policy, "--curve", "--infer-guidance", judge)


def order(part: Part, algorithm: str, *settings: str) -> None:
    """S2: guidance first, and joint training of as many steps of both modules, and of twice as many."""
    ways = {
        "first": part.policy("first", algorithm, part.guidance("A", *settings), *settings),
        "joint": part.policy("joint", algorithm, None, "policy.scheme=joint", *settings),
        "joint 2": part.policy(
            "joint2", algorithm, None, "policy.scheme=joint", f"policy.steps={2 * STEPS}", *settings
        ),
    }
    for name, policy in ways.items():
        steps = [f"{name} at snapshot {number}" for number in range(1, SNAPSHOTS + 1)]
        part.play(steps, "evaluate", policy, "--curve")


def necessity(part: Part) -> None:
    """S3: guidance in one third of the training, in none, throughout; one sample, and ranked."""
    a = part.guidance("A")
    for algorithm in ("dql", "edp", "cfg"):
        for stage, (start, stop) in STAGES.items():
            window = (f"policy.guidance_from={start}", f"policy.guidance_until={stop}")
            policy = part.policy(f"{algorithm}-{stage.replace(' ', '-')}", algorithm, a, *window)
            part.play([f"{algorithm}, {stage}, ranked", f"{algorithm}, {stage}, one sample"], "evaluate", policy)


def conditions(part: Part) -> None:
    """S4: under which conditions B in the place of A changes the spread."""
    seeds = range(100, 100 + len(part.seeds.split(",")))
    for name, settings in CONDITIONS.items():
        short = name.replace(" ", "-")
        a, b = part.guidance(f"{short}-A", *settings), part.guidance(f"{short}-B", *settings, seeds=seeds)
        policy = part.policy(f"{short}-P", "dql", a, *settings)
        part.play([f"{name}, A", f"{name}, none"], "evaluate", policy)
        part.play([f"{name}, B"], "evaluate", policy, "--infer-guidance", b)
        if not settings:
            part.play(["50 candidates, A"], "evaluate", policy, "--candidates", 50)
            part.play(["50 candidates, B"], "evaluate", policy, "--candidates", 50, "--infer-guidance", b)


def offline(part: Part) -> None:
    """S5: figures of A and C at five snapshots, known before any play, and the scores of one policy that they rank."""
    policy = part.policy("P", "bc", None, "policy.scheme=unguided", seeds="0")
    held_out = load_dataset(models.load_experiment(part.folder / "task.toml").data).held_out
    bundle = models.read_policy(part.folder / policy)
    how, _ = models.pick_inference(bundle.experiment, guided=True, step=bundle.step)
    for name, algorithm in (("A", "idql"), ("C", "dql")):
        path = part.guidance(name, f"guidance.algorithm={algorithm}")
        quality = {each.step: each for each in models.read_bundle(part.folder / path).quality}
        for number in range(1, SNAPSHOTS + 1):
            step = number * STEPS // SNAPSHOTS
            cell, named = f"{name} at snapshot {number}", f"{path}@{step}"
            part.play(["none", cell], "swap", policy, "--guidance", named, "--pairs", "all")
            (guidance,) = models.read_guidances(part.folder / named)
            members = [models.select_members(guidance, [member]) for member in range(len(guidance.seeds))]
            told = [models.judge_offline(bundle, [member], how, held_out, 0, {}) for member in members]
            known = quality[step]
            part.found["figures"][cell] = {
                "corr(V, return)": known.correlation,
                "corr(Q gain, return - V)": known.advantage_correlation,
                "mean V / mean return": list(np.divide(known.mean_v, known.mean_return)),
                "gain": [each.gain[0] for each in told if each.gain],
                "distance": [each.distance[0] for each in told],
            }
            part.store()


def pilot(part: Part) -> None:
    """Three members: one sample of `dql`, and ranked by its own guidance."""
    part.play(["ranked", "one sample"], "evaluate", part.policy("P", "dql", part.guidance("A")))


Recipe = tuple[str, int, Callable[[Part], None]]  # task, members, what to do
PARTS: dict[str, Recipe] = {
    "pilot": ("hopper", 3, pilot),
    "s1-hopper": ("hopper", 20, transfer),
    "s1-halfcheetah": ("halfcheetah", 20, transfer),
    "s2-dql": ("hopper", 10, lambda part: order(part, "dql")),
    "s2-edp": ("hopper", 10, lambda part: order(part, "edp")),
    "s2-dql-0.1": ("hopper", 10, lambda part: order(part, "dql", "data.fraction=0.1")),
    "s2-dql-0.3": ("hopper", 10, lambda part: order(part, "dql", "data.fraction=0.3")),
    "s3": ("hopper", 12, necessity),
    "s4": ("hopper", 10, conditions),
    "s5-hopper": ("hopper", 10, offline),
    "s5-halfcheetah": ("halfcheetah", 10, offline),
}


# --- findings -----------------------------------------------------------------------------------------------------


def spread_test(first: np.ndarray, second: np.ndarray) -> float:
    """p of a two-sided rank test that paired scores (members,) spread alike."""
    p = cli.spread_test(first, second[:, None])
    return 1.0 if p is None else p  # None: nothing varies


def not_worse(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """p that the mean of second - first is above -MARGIN, one-sided, and the lower end of its 95 % interval."""
    test = stats.ttest_1samp(second - first, -MARGIN, alternative="greater")
    return float(test.pvalue), float(test.confidence_interval(0.95).low)


def interaction(scores: np.ndarray) -> float:
    """p of an interaction of two factors, by an analysis of variance of ranks. scores: (stages, algorithms, members)."""
    ranks = stats.rankdata(scores).reshape(scores.shape)
    cells, rows, columns = ranks.mean(2), ranks.mean((1, 2)), ranks.mean((0, 2))
    both = cells - rows[:, None] - columns + ranks.mean()
    count = scores.shape[2]
    degrees, rest = (len(rows) - 1) * (len(columns) - 1), ranks.size - cells.size
    ratio = (count * (both**2).sum() / degrees) / (((ranks - cells[..., None]) ** 2).sum() / rest)
    return float(stats.f.sf(ratio, degrees, rest))


def holm(values: dict[str, float]) -> dict[str, float]:
    """p values corrected over all of them."""
    return dict(zip(values, cli.holm([*values.values()]), strict=True))


def read_parts() -> dict[str, dict[str, Any]]:
    """What was stored of each part. Exits where parts are of different commits."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(STORE.glob("*.json"))}
    if len(commits := {part["commit"] for part in parts.values()}) > 1:
        sys.exit(f"experiments/study: the parts are of different commits: {', '.join(sorted(commits))}")
    return parts


def cells_of(part: dict[str, Any]) -> dict[str, Scores]:
    return {name: np.array(scores) for name, scores in part["cells"].items()}


def snapshots_of(cells: dict[str, Scores], name: str) -> np.ndarray:
    """Scores of the members at each snapshot, (snapshots, members)."""
    return np.array([cells[f"{name} at snapshot {number}"].mean(1) for number in range(1, SNAPSHOTS + 1)])


def tests(parts: dict[str, dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """For each hypothesis whose part is there: p, and what was compared."""
    found: dict[str, tuple[float, str]] = {}

    def spread(name: str, first: np.ndarray, second: np.ndarray) -> None:
        figures = (f"IQR {stats.iqr(each):.1f}, std {each.std(ddof=1):.1f}" for each in (first, second))
        found[name] = (spread_test(first, second), " against ".join(figures))

    def within(name: str, first: np.ndarray, second: np.ndarray) -> None:
        """Of (repetitions, members)."""
        one, other = first.std(0, ddof=1), second.std(0, ddof=1)
        text = f"std {np.median(one):.1f} against {np.median(other):.1f} (medians over members)"
        found[name] = (float(stats.wilcoxon(one, other).pvalue), text)

    def location(name: str, first: np.ndarray, second: np.ndarray) -> None:
        found[name] = (float(stats.ttest_rel(first, second).pvalue), f"{first.mean():.1f} against {second.mean():.1f}")

    for task in TASKS:
        if (part := parts.get(f"s1-{task}")) is None:
            continue
        cells = cells_of(part)
        a, b, c = (cells[name] for name in "ABC")
        spread(f"{task}: spread over members, A against B", a.mean(1), b.mean(1))
        within(f"{task}: spread over episodes within members, A against B", a.T, b.T)
        within(
            f"{task}: spread over snapshots within members, A against B", *(snapshots_of(cells, each) for each in "AB")
        )
        p, low = not_worse(a.mean(1), c.mean(1))
        difference = (c.mean(1) - a.mean(1)).mean()
        found[f"{task}: C not worse than A"] = (p, f"mean difference {difference:+.1f}, lower end {low:+.1f}")
        spread(f"{task}: spread over members, A against A and B by position", a.mean(1), cells["A and B"].mean(1))
    for name, part in parts.items():
        if name.startswith("s2-"):
            cells = cells_of(part)
            first, joint = snapshots_of(cells, "first"), snapshots_of(cells, "joint")
            location(f"{name}: last score, guidance first against joint", first[-1], joint[-1])
            location(f"{name}: area under the curve, guidance first against joint", area(first, late=True), area(joint))
    if "s3" in parts:
        cells = cells_of(parts["s3"])
        for how in ("one sample", "ranked"):
            algorithms = ("dql", "edp", "cfg")
            scores = np.array([[cells[f"{each}, {stage}, {how}"].mean(1) for each in algorithms] for stage in STAGES])
            found[f"s3: stage and algorithm, {how}"] = (interaction(scores), "interaction")
    return found


def area(scores: np.ndarray, late: bool = False) -> np.ndarray:
    """Mean score (members,) over the steps of both modules, from (snapshots, members); late: guidance comes first.

    Until the first snapshot a policy has its score at a straight line from 0; guidance alone has 0.
    """
    times = np.linspace(0, 1, SNAPSHOTS + 1)
    if late:
        times = np.append(0, np.linspace(0.5, 1, SNAPSHOTS + 1))
    heights = np.vstack([np.zeros((len(times) - SNAPSHOTS, scores.shape[1])), scores])
    return integrate.trapezoid(heights, times, axis=0)


def table(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The tests, the cells of each part, and the rank correlations of S5, as Markdown."""
    if found := tests(parts):
        corrected = holm({name: p for name, (p, _) in found.items()})
        yield from (f"| hypothesis | found | p | p, corrected over {len(found)} |", "|---|---|---|---|")
        yield from (f"| {name} | {text} | {p:.3f} | {corrected[name]:.3f} |" for name, (p, text) in found.items())
    for name, part in parts.items():
        yield from ("", f"| {name} | members | median | IQR | mean | std | IQR within members |", "|---" * 7 + "|")
        for cell, scores in cells_of(part).items():
            members, inner = scores.mean(1), np.median(stats.iqr(scores, axis=1))
            figures = (
                np.median(members),
                stats.iqr(members),
                members.mean(),
                members.std(ddof=1) if len(members) > 1 else 0,
            )
            yield f"| {cell} | {len(members)} | {' | '.join(f'{each:.1f}' for each in (*figures, inner))} |"
        if part["figures"]:
            yield from predictions(part)


def predictions(part: dict[str, Any]) -> Iterator[str]:
    """How well each offline figure predicts the score: Spearman's correlation over guidance members and snapshots."""
    cells = cells_of(part)
    scores = np.concatenate([cells[name].mean(1) for name in part["figures"]])
    yield from ("", "| figure | rank correlation with the score | 95 % |", "|---|---|---|")
    for figure in next(iter(part["figures"].values())):
        values = np.concatenate([each[figure] for each in part["figures"].values()]).astype(float)
        fit = stats.bootstrap(
            (values, scores), lambda x, y: stats.spearmanr(x, y).statistic, paired=True, vectorized=False, rng=0
        )
        low, high = fit.confidence_interval
        yield f"| {figure} | {stats.spearmanr(values, scores).statistic:.2f} | {low:.2f} to {high:.2f} |"


BEGIN, END = "<!-- STUDY -->\n", "<!-- END OF STUDY -->\n"


def check(page: str) -> bool:
    """Whether the page holds the tables as the stored parts give them."""
    return page.partition(BEGIN)[2].partition(END)[0].strip() == "\n".join(table(read_parts())).strip()


# --- pictures -----------------------------------------------------------------------------------------------------


def plot(parts: dict[str, dict[str, Any]]) -> None:
    """Draw what is there: pairs of own and swapped scores with their spreads (S1), and curves over total steps (S2)."""
    from matplotlib.figure import Figure

    transfers = {name: cells_of(part) for name, part in parts.items() if name.startswith("s1-")}
    orders = {name: cells_of(part) for name, part in parts.items() if name.startswith("s2-")}
    for file, panels, draw in (("transfer", transfers, draw_pairs), ("order", orders, draw_curves)):
        if panels:
            figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
            for axes, (name, cells) in zip(
                figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
            ):
                axes.set(title=name, ylabel="score (0 to 100)")
                draw(axes, cells)
            figure.savefig(STORE / f"{file}.png", dpi=120)


def draw_pairs(axes: Any, cells: dict[str, Scores]) -> None:
    """A line for each member, from judge to judge; below each judge the standard deviation over members.

    In brackets: the range of 95 of 100 such deviations where only chance separates the judge from A, by exchanging the
    two judges of random members.
    """
    judges = [name for name in ("none", "A", "B", "C", "A and B", "A, B and C") if name in cells]
    scores = np.array([cells[name].mean(1) for name in judges])  # (judges, members)
    axes.plot(scores, color="0.6", linewidth=0.7)
    axes.plot(np.median(scores, axis=1), "k_", markersize=24)
    random, own = np.random.default_rng(0), cells["A"].mean(1)
    labels = []
    for name, column in zip(judges, scores, strict=True):
        mixed = np.where(random.random((2000, len(own))) < 0.5, own - own.mean(), column - column.mean()).std(1, ddof=1)
        low, high = np.percentile(mixed, (2.5, 97.5))
        labels.append(f"{name}\n{column.std(ddof=1):.0f}\n({low:.0f} to {high:.0f})")
    axes.set_xticks(range(len(judges)), labels, fontsize=8)
    axes.set_xlabel("judge; std over members (its range by chance)")


def draw_curves(axes: Any, cells: dict[str, Scores]) -> None:
    """Median and quartiles over members, over the gradient steps of guidance and policy together."""
    for name, start, each in (("first", STEPS, 1), ("joint", 0, 2), ("joint 2", 0, 4)):
        steps = start + each * STEPS / SNAPSHOTS * np.arange(1, SNAPSHOTS + 1)
        low, median, high = np.percentile(snapshots_of(cells, name), (25, 50, 75), axis=1)
        (line,) = axes.plot(steps, median, label={"first": "guidance first"}.get(name, name))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("gradient steps of both modules")
    axes.legend(frameon=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--file", action="append", default=[], metavar="NAME=FILE", help="a PyBullet file for part s5-NAME"
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(read_parts())))
    elif given.plot:
        plot(read_parts())
    elif given.check:
        sys.exit(None if check(PAGE.read_text(encoding="utf-8")) else "experiments/README.md: its tables are not these")
    else:
        TASKS |= (files := dict(map(of_file, given.file)))
        PARTS |= {f"s5-{name}": (name, 10, offline) for name in files}
        for each in given.parts:
            task, members, recipe = PARTS[each]
            recipe(Part(given.folder, each, task, range(members)))
