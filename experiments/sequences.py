"""What do windows of actions and a Transformer change: scores, values, and what they cost?

    python experiments/sequences.py FOLDER [TASK ...] [--seeds N] [--steps N]   runs `mdpt` commands; goes on where it stopped
    python experiments/sequences.py --table                                     prints the tables of what is stored
    python experiments/sequences.py --costs [--rounds N]                        measures steps and decisions of each network

For each task and each window: a guidance (`idql`), a `bc` policy ranked by it, and a `dql` policy that learned under it,
with one sample and ranked; each takes one action of a window, or all, before it decides again. Bundles and JSON of mdpt
go to FOLDER; scores of each member, speeds and the judgement of the guidance go to experiments/sequences/TASK.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import ROOT, score, train

from mdpt import models
from mdpt.data import DataSection, Experiment, PolicySection, load_dataset

STORE = ROOT / "experiments" / "sequences"
TASKS = {"hopper": ROOT / "hopper.toml", "halfcheetah": ROOT / "experiments" / "halfcheetah.toml"}
ARMS = [("mlp", 1), ("mlp", 4), ("mlp", 8), ("transformer", 4)]  # network of the policy, horizon
TRAINING = """
[guidance]
steps = {0}
tau = 0.04
snapshots = 1

[policy]
steps = {0}
snapshots = 1
"""


def milliseconds(decide: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        decide()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def run(folder: Path, task: str, seeds: int, steps: int) -> None:
    """All cells of a task; each is stored as soon as it is played."""
    top = f'extends = "{TASKS[task]}"\nname = "{task}"\ndevice = "cpu"\nseeds = {list(range(seeds))}\n'
    (folder / f"{task}.toml").write_text(top + TRAINING.format(steps))
    cells: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for network, horizon in ARMS:
        arm, window = f"{network}, H {horizon}", ("--set", f"data.horizon={horizon}")
        guidance = f"{task}-{horizon}.guidance.pt"
        values = models.read_bundle(folder / train(folder, "guidance", f"{task}.toml", guidance, *window))
        judged = values.quality[-1].model_dump() if values.quality else {}
        facts[f"guidance, H {horizon}"] = judged | {"speed": 1e3 / values.accounting.seconds_per_1000_steps}
        for algorithm in ("bc", "dql"):
            file = f"{task}-{algorithm}-{network}-{horizon}.policy.pt"
            taught = algorithm == "dql"
            options = ["--set", f"policy.algorithm={algorithm}", "--set", f"policy.network={network}", *window]
            options += ["--guidance", guidance] if taught else ["--set", "policy.scheme=unguided"]
            bundle = models.read_bundle(folder / train(folder, "policy", f"{task}.toml", file, *options))
            act = models.load_agent(folder / file, folder / guidance)
            states = np.zeros((10, bundle.environment.observation_dim), np.float32)
            account = bundle.accounting
            facts[f"{algorithm}, {arm}"] = {
                "parameters": account.parameters_trained // seeds,
                "speed": 1e3 / account.seconds_per_1000_steps,
                "decision": milliseconds(lambda act=act, states=states: act(states)),  # type: ignore[misc]
            }
            ways = {"ranked": guidance} | ({"one sample": "none"} if taught else {})
            for execute in sorted({1, horizon}):
                for way, judge in ways.items():
                    name = f"{algorithm}, {arm}, K {execute}, {way}"
                    acting = ("--infer-guidance", judge, "--set", f"evaluation.execute={execute}")
                    cells[name] = score(folder, f"{Path(file).stem}-{execute}-{way[:3]}", file, *acting)
                    STORE.mkdir(exist_ok=True)
                    stored = {"steps": steps, "cells": cells, "facts": facts}
                    (STORE / f"{task}.json").write_text(json.dumps(stored, indent=1) + "\n")


def rows() -> Iterator[str]:
    """Tables: median over members of each cell and its range; speeds; how far V can be trusted."""
    tasks = {path.stem: json.loads(path.read_text()) for path in sorted(STORE.glob("*.json"))}
    yield f"| score | {' | '.join(tasks)} |"
    yield "|---" * (len(tasks) + 1) + "|"
    for name in dict.fromkeys(name for found in tasks.values() for name in found["cells"]):
        scores = [found["cells"].get(name) for found in tasks.values()]
        texts = [f"{np.median(each):.0f} ({min(each):.0f} to {max(each):.0f})" if each else "" for each in scores]
        yield f"| {name} | {' | '.join(texts)} |"
    for task, found in tasks.items():
        yield from ("", f"| {task} | parameters | steps/s | ms per decision of 10 states |", "|---|---|---|---|")
        for name, fact in found["facts"].items():
            if "decision" in fact:
                yield f"| {name} | {fact['parameters']:,} | {fact['speed']:.1f} | {fact['decision']:.0f} |"
        keys = ("correlation", "advantage_correlation", "mean_v", "mean_return")
        yield from ("", f"| {task} | {' | '.join(key.replace('_', ' ') for key in keys)} | steps/s |", "|---" * 6 + "|")
        for name, fact in found["facts"].items():
            if "correlation" in fact:
                means = [np.mean([each for each in fact[key] if each is not None] or [np.nan]) for key in keys]
                yield f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} | {fact['speed']:.1f} |"


def costs(rounds: int, members: int = 5, wide: int = 15, narrow: int = 3) -> Iterator[str]:
    """Parameters, milliseconds of a gradient step of `dql` and `bc`, and of a decision: medians of interleaved rounds."""
    models.choose_products()
    random, count = np.random.default_rng(0), 10_000
    columns = {
        "observations": random.standard_normal((count, wide), np.float32),
        "actions": random.uniform(-1, 1, (count, narrow)).astype(np.float32),
        "rewards": random.random(count, np.float32),
        "terminals": np.arange(count) % 100 == 99,
        "timeouts": np.zeros(count, bool),
    }
    works: dict[tuple[str, int, str], Callable[[], object]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for horizon in (1, 4, 8):
        section = DataSection(source="arrays", held_out=0.0, reward_scale="none", horizon=horizon)
        dataset = load_dataset(section, arrays=columns)
        transitions = models.Transitions(dataset, "cpu")
        for network in models.NETWORKS:
            for algorithm in ("bc", "dql"):
                policy = PolicySection(algorithm=algorithm, network=network)
                plan = models.check_algorithms(Experiment(seeds=list(range(members)), data=section, policy=policy))
                bundles = {
                    kind: models.new_bundle(kind, plan, dataset, models.Run().account()) for kind in models.CHOICES
                }
                teacher = models.build_guidance(bundles["guidance"], "cpu", new=True)
                learner = models.build_policy(bundles["policy"], "cpu", new=True)
                sizes[network, horizon] = learner.denoiser.size
                bundles["guidance"].weights = models.weights_of(teacher)
                bundles["policy"].weights = models.weights_of(learner)
                works[network, horizon, algorithm] = a_step(
                    learner, teacher.requires_grad_(False), transitions, members
                )
            how = models.Inference(candidates=10, execute=horizon)
            ranked = [models.select_members(bundles[kind], [0]) for kind in ("policy", "guidance")]
            for states in (1, 10):
                agent = models.Agent(ranked[0], ranked[1:], how, seed=0, episodes=range(states))
                seen, places = np.zeros((states, wide), np.float32), np.arange(states)
                works[network, horizon, f"act {states}"] = lambda agent=agent, seen=seen, places=places: agent.decide(  # type: ignore[misc]
                    seen, places
                )
    times: dict[tuple[str, int, str], list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            work()
            times[name].append(milliseconds(work, 3))
    columns_of = ("bc", "dql", "act 1", "act 10")
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {rounds} interleaved rounds, in ms:"
    yield from ("", f"| network | H | parameters | {' | '.join(columns_of)} |", "|---" * (3 + len(columns_of)) + "|")
    for (network, horizon), size in sizes.items():
        middle = [f"{statistics.median(times[network, horizon, name]):.1f}" for name in columns_of]
        yield f"| {network} | {horizon} | {size:,} | {' | '.join(middle)} |"


def a_step(
    policy: models.Policy, teacher: models.Guidance, transitions: models.Transitions, members: int
) -> Callable[[], None]:
    """A gradient step of this policy under this guidance."""

    def loss(batch: models.Batch, random: models.Randomness, done: float) -> models.Loss:
        return policy.loss(batch, teacher, random)

    learner = models.Learner([(policy, policy.section)], loss)
    random = models.Randomness(range(members), "costs")

    def step() -> None:
        random.step += 1
        batch = transitions.sample(random, policy.section.batch_size)
        learner.update(learner.loss(batch, random, 0.0)[0], random.step, 10**9)

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--costs", action="store_true")
    given = parser.parse_args()
    if given.table or given.costs:
        print("\n".join(rows() if given.table else costs(given.rounds)))
        sys.exit()
    if given.folder is None:
        parser.error("name a FOLDER for bundles and JSON")
    given.folder.mkdir(parents=True, exist_ok=True)
    for each in given.tasks or TASKS:
        run(given.folder.resolve(), each, given.seeds, given.steps)
