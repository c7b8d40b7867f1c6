"""Does ranking gain or harm, and what do `guidance.conservatism` and `evaluation.support` change?

    python experiments/support.py FOLDER [TASK ...] [--file NAME=FILE.hdf5 ...]   runs `mdpt` commands; goes on where it stopped
    python experiments/support.py --table                                        prints the tables of experiments/README.md

For each task: a `bc` policy, and for each conservatism a guidance, young (a fifth of its steps) and old; the policy is
played with one sample, and ranked; beside the scores stand the offline figures of `mdpt policy`. With --training also
policies trained under these guidances, steering by their gradient, and guidances of `dql`. Bundles and JSON of mdpt go
to FOLDER; the scores of each member go to experiments/support/TASK.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from mdpt import models
from mdpt.data import load_dataset

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "experiments" / "support"
CONSERVATISM = (0, 0.1, 1, 5)
STEPS, YOUNG = 5000, 1000
CHOICES = [(10, 0.0), (50, 0.0), (10, 0.3)]  # candidates, support
TRAINING = f"""
[guidance]
steps = {STEPS}
tau = 0.04
snapshots = {STEPS // YOUNG}

[policy]
algorithm = "bc"
scheme = "unguided"
steps = {STEPS}
snapshots = 1
"""
CONTROLLED = """
source = "hdf5"
path = "{0}.hdf5"
environment = "{1}"
reference = {2}
"""
TASKS: dict[str, str | Path] = {  # [data], or the experiment file that has it
    "hopper": ROOT / "hopper.toml",
    "halfcheetah": ROOT / "experiments" / "halfcheetah.toml",
    "ant": ROOT / "experiments" / "ant.toml",
    "pendulum": CONTROLLED.format("pendulum", "Pendulum-v1", "[-1200, -150]"),
    "mountaincar": CONTROLLED.format("mountaincar", "MountainCarContinuous-v0", "[0, 100]"),
}


def of_file(text: str) -> tuple[str, str]:
    """The name of a task and its [data], from NAME=FILE, where NAME begins with one of PyBullet's environments."""
    name, _, file = text.partition("=")
    kind = name.partition("-")[0]
    environment = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "ant": "Ant", "walker2d": "Walker2D"}[kind]
    path = f'\nsource = "hdf5"\npath = "{Path(file).resolve()}"\nenvironment = "{environment}BulletEnv-v0"\n'
    return name, f'{path}reference = "bullet-{kind}"\n'


def pendulum(observation: np.ndarray, random: np.random.Generator, noise: float) -> float:
    """Pump energy until the pendulum is near the top, then balance it; torque in [-2, 2]."""
    cosine, sine, speed = observation
    angle = np.arctan2(sine, cosine)
    missing = 5 - speed**2 / 6 - 5 * cosine  # energy to the top
    torque = -10 * angle - 2 * speed if abs(angle) < 0.5 else 2 * np.sign(speed * missing)
    return float(np.clip(torque + 2 * noise * random.normal(), -2, 2))


def mountaincar(observation: np.ndarray, random: np.random.Generator, noise: float) -> float:
    """Push in the direction of motion; force in [-1, 1]."""
    return float(np.clip(np.sign(observation[1] + 1e-6) * 0.8 + noise * random.normal(), -1, 1))


def record(path: Path, environment_id: str, controller: object, noises: tuple[float, ...], rows: int) -> None:
    """Write a file of episodes, each with one of the noises, without next_observations."""
    import gymnasium

    environment, random = gymnasium.make(environment_id), np.random.default_rng(0)
    columns: dict[str, list[object]] = {
        key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")
    }
    episode = 0
    while len(columns["rewards"]) < rows:
        observation, ended, noise = environment.reset(seed=episode)[0], False, noises[episode % len(noises)]
        while not ended:
            action = [controller(observation, random, noise)]  # type: ignore[operator]
            following, reward, terminal, timeout, _ = environment.step(np.array(action, dtype=np.float32))
            for key, value in zip(
                columns, (observation, action, reward, terminal, timeout and not terminal), strict=True
            ):
                columns[key].append(value)
            observation, ended = following, terminal or timeout
        episode += 1
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = np.array(values, dtype=bool if key in ("terminals", "timeouts") else np.float32)


def mdpt(folder: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "mdpt.mdpt", *map(str, arguments)], cwd=folder, check=True)


def train(folder: Path, kind: str, experiment: str, out: str, *options: object) -> str:
    """Run a training command, unless its bundle is complete; returns the bundle's name."""
    if not ((folder / out).exists() and models.read_bundle(folder / out).complete):
        mdpt(folder, kind, experiment, *options, "--out", out)
    return out


def score(folder: Path, name: str, *arguments: object) -> list[float]:
    """The score of each member of a `mdpt evaluate`, whose JSON is kept under this name."""
    file = folder / f"{name}.json"
    if not file.exists():
        mdpt(folder, "evaluate", *arguments, "--json", file.name)
    return [round(pair["score"], 1) for pair in json.loads(file.read_text())["cells"][0]["pairs"]]


def figures(folder: Path, file: str, policy: str, guidance: str) -> dict[str, list[float] | None]:
    """What `mdpt policy` would show of this policy under this guidance, of each member, from held-out data."""
    held_out = load_dataset(models.load_experiment(folder / file).data).held_out
    guidances, bundle = models.read_guidances(folder / guidance), models.read_policy(folder / policy)
    how, _ = models.pick_inference(bundle.experiment, guided=True, step=bundle.step)
    found = models.judge_offline(bundle, guidances, how, held_out, 0, {})
    return {"gain": found.gain, "distance": found.distance, "distance_one": found.distance_one}


def run(folder: Path, task: str, data: str | Path, training: bool) -> None:
    """All cells of a task; each is stored as soon as it is played."""
    recipes = {
        "pendulum": ("Pendulum-v1", pendulum, (0.3, 0.6, 1.0, 2.0), 40_000),
        "mountaincar": ("MountainCarContinuous-v0", mountaincar, (0.3, 0.6, 1.0, 2.0), 60_000),
    }
    if task in recipes and not (folder / f"{task}.hdf5").exists():
        record(folder / f"{task}.hdf5", *recipes[task])
    seeds = "seeds = [0, 1, 2, 3, 4]\n"
    top, table = (f'extends = "{data}"\n', "") if isinstance(data, Path) else ("", f"\n[data]{data}")
    (folder / f"{task}.toml").write_text(f'{top}name = "{task}"\ndevice = "cpu"\n{seeds}{table}{TRAINING}')
    policy, cells, told = train(folder, "policy", f"{task}.toml", f"{task}-bc.pt"), {}, {}
    cells["one sample"] = score(folder, f"{task}-one", policy)
    for alpha in CONSERVATISM:
        options = ("--set", f"guidance.conservatism={alpha}")
        guidance = train(folder, "guidance", f"{task}.toml", f"{task}-{alpha}.pt", *options)
        for age, step in (("young", YOUNG), ("old", STEPS)):
            for candidates, support in CHOICES:
                name = f"{age}, conservatism {alpha}, support {support:g}, best of {candidates}"
                how = ("--infer-guidance", f"{guidance}@{step}", "--candidates", candidates)
                how += ("--set", f"evaluation.support={support}")
                cells[name] = score(folder, f"{task}-{alpha}-{age}-{candidates}-{support}", policy, *how)
            told[f"{age}, conservatism {alpha}"] = figures(folder, f"{task}.toml", policy, f"{guidance}@{step}")
            store(task, cells, told)
    for alpha in (0, 1) if training else ():
        guidance = f"{task}-{alpha}.pt"
        under = ("--set", "policy.algorithm=dql", "--set", "policy.scheme=guidance-first", "--guidance", guidance)
        taught = train(folder, "policy", f"{task}.toml", f"{task}-{alpha}-dql.pt", *under)
        cells[f"dql under conservatism {alpha}, one sample"] = score(
            folder, f"{task}-{alpha}-dql-one", taught, "--infer-guidance", "none"
        )
        cells[f"dql under conservatism {alpha}, best of 10"] = score(folder, f"{task}-{alpha}-dql-best", taught)
        steered = ("--infer-guidance", guidance, "--set", "evaluation.guide=gradient")
        cells[f"by gradient, conservatism {alpha}"] = score(folder, f"{task}-{alpha}-gradient", policy, *steered)
        store(task, cells, told)
        same = ("--set", "guidance.algorithm=dql", "--set", f"guidance.conservatism={alpha}")
        other = train(folder, "guidance", f"{task}.toml", f"{task}-{alpha}-other.pt", *same)
        name = f"by dql guidance, conservatism {alpha}, best of 10"
        cells[name] = score(folder, f"{task}-{alpha}-other-10", policy, "--infer-guidance", other)
        store(task, cells, told)


def store(task: str, cells: dict[str, list[float]], told: dict[str, dict[str, list[float] | None]]) -> None:
    STORE.mkdir(exist_ok=True)
    (STORE / f"{task}.json").write_text(json.dumps({"cells": cells, "figures": told}, indent=1) + "\n")


def rows() -> Iterator[str]:
    """A table: tasks in columns, the median over members of each cell, and in brackets its range."""
    tasks = {path.stem: json.loads(path.read_text())["cells"] for path in sorted(STORE.glob("*.json"))}
    yield f"| | {' | '.join(tasks)} |"
    yield "|---" * (len(tasks) + 1) + "|"
    for name in dict.fromkeys(name for cells in tasks.values() for name in cells):
        texts = []
        for cells in tasks.values():
            scores = cells.get(name)
            texts.append(f"{np.median(scores):.0f} ({min(scores):.0f} to {max(scores):.0f})" if scores else "")
        yield f"| {name} | {' | '.join(texts)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=FILE", help="a PyBullet file, NAME-...")
    parser.add_argument("--training", action="store_true", help="also policies trained under these guidances")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print("\n".join(rows()))
        sys.exit()
    TASKS |= dict(map(of_file, given.file))
    given.folder.mkdir(parents=True, exist_ok=True)
    for each in given.tasks or TASKS:
        run(given.folder, each, TASKS[each], given.training)
