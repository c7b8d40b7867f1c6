"""The speed table of experiments/README.md, as Markdown: `python tests/benchmark.py`, on a machine that does nothing else.

Each figure is the median over rounds in which every kind of work takes its turn, start-up left out. The floor is the
counted arithmetic over the rate of a large float32 matrix product on as many threads, measured in the same run: 40 %
means that the work takes 2.5 times as long as its matrix products alone would at that rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdpt import data, models
from mdpt.data import DataSection, GuidanceSection, PolicySection
from mdpt.models import Guidance, Inference, Normalizer, Policy, Randomness

Work = Callable[[], object]
O, A = 15, 3  # Hopper's
RANDOM = DataSection(source="arrays", held_out=0.0, reward_scale="none")


def random_transitions(rows: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    observations, following = random.standard_normal((2, rows, O), np.float32)
    actions = random.uniform(-1, 1, (rows, A)).astype(np.float32)
    rewards, terminals = random.standard_normal(rows, np.float32), random.random(rows) < 0.01
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "next_observations": following,
        "terminals": terminals,
    }


def build(kind: type[Any], section: Any, members: int) -> Any:
    """A guidance or policy with initial weights."""
    normalizer = Normalizer(torch.zeros(O), torch.ones(O))
    return kind(Randomness(range(members), "benchmark"), normalizer, section, O, A)


def policy_section(algorithm: str) -> PolicySection:
    return PolicySection(algorithm=algorithm, network=models.POLICIES[algorithm].network)


def training(kind: str, algorithm: str, members: int, transitions: models.Transitions) -> Work:
    """A gradient step of "guidance", "policy" (under a frozen idql guidance) or "joint" training."""
    random = Randomness(range(members), "train")
    ours = GuidanceSection(algorithm="idql" if kind == "policy" else algorithm)
    guidance = build(Guidance, ours, members)
    if kind == "guidance":
        learner = models.Learner([(guidance, ours)], lambda batch, random, _: guidance.loss(batch, random))
    else:
        theirs = policy_section(algorithm)
        policy = build(Policy, theirs, members)
        if kind == "policy":
            guidance.requires_grad_(False)
            learner = models.Learner([(policy, theirs)], lambda batch, random, _: policy.loss(batch, guidance, random))
        else:
            guidance.actor = None

            def both(batch: models.Batch, random: Randomness, _: float) -> models.Loss:
                own = policy.loss(batch, guidance, random)
                return models.add(own, guidance.loss(batch, random, policy.act_alone))

            learner = models.Learner([(guidance, ours), (policy, theirs)], both)

    def step() -> None:
        random.step += 1
        loss, _ = learner.loss(transitions.sample(random, 256), random, 0.5)
        learner.update(loss, random.step, 1_000_000)

    return step


def acting(algorithm: str, states: int, candidates: int) -> Work:
    """An action in each of `states` environments, the best of `candidates` by an idql guidance."""
    policy, guidance = build(Policy, policy_section(algorithm), 1), build(Guidance, GuidanceSection(), 1)
    random, observations = Randomness([0], "act"), torch.zeros(1, states, O)
    uniform = torch.zeros(1, states, candidates)

    def act() -> None:
        random.step += 1
        noises = policy.noises(random, "act", states * candidates)
        models.act(policy, guidance, observations, noises, uniform, Inference(candidates=candidates))

    return act


def experiment(members: int, steps: int) -> data.Experiment:
    """An `idql` guidance and a `dql` policy, to be trained on these data."""
    given = {"steps": steps, "snapshots": 1}
    sections = GuidanceSection(**given), PolicySection(**given | {"algorithm": "dql"})
    run = data.Experiment(seeds=list(range(members)), data=RANDOM, guidance=sections[0], policy=sections[1])
    return models.check_algorithms(run)


def playing(dataset: data.Dataset, states: int, candidates: int) -> Work:
    """A step of an agent in so many episodes, its candidates ranked; all that `mdpt evaluate` does but the simulation."""
    run = experiment(1, 1)
    guidance = models.train_guidance(run, dataset, models.Run())
    policy = models.train_policy(run, dataset, [guidance], models.Run())
    agent = models.Agent(policy, [guidance], Inference(candidates=candidates), seed=0, episodes=range(states))
    observations, running = np.zeros((states, O), np.float32), np.arange(states)
    return lambda: agent(observations, running)


def over_processes(dataset: data.Dataset, members: list[int], workers: list[int], rounds: int, steps: int) -> None:
    """Print gradient steps per second of whole runs over members and processes, their start left out."""
    found: dict[Any, list[float]] = {}
    for count in members * rounds:
        teacher = models.train_guidance(experiment(count, 1), dataset, models.Run())
        for number in workers:
            run, way = experiment(count, steps), models.Run(workers=number)
            guidance, policy = (
                models.train_guidance(run, dataset, way),
                models.train_policy(run, dataset, [teacher], way),
            )
            for kind, bundle in (("guidance `idql`", guidance), ("policy `dql`", policy)):
                found.setdefault((kind, count, number), []).append(1000 / bundle.accounting.seconds_per_1000_steps)
    ways = dict.fromkeys((kind, number) for kind, _, number in found)
    names = [f"{kind}, {n} process{'es' * (n > 1)}" for kind, n in ways]
    print(f"| members | {' | '.join(names)} |")
    print("|---|" + "---|" * len(ways))
    for count in members:
        middle = {way: statistics.median(found[way[0], count, way[1]]) for way in ways}
        cells = [f"{rate:.1f} ({rate / middle[kind, workers[0]]:.2f})" for (kind, _), rate in middle.items()]
        print(f"| {count} | {' | '.join(cells)} |")
    print(f"\nSteps per second, median of {rounds} rounds of {steps}; in brackets: against {workers[0]}.\n")


def arithmetic(work: Work) -> int:
    """Floating-point operations of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work: Work, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def table(works: dict[tuple[str, str], Work], ways: list[tuple[str, int]], rounds: int, calls: int) -> None:
    """Print calls per second and share of the floor, for each work and way: matrix products and number of threads."""
    side = 1536
    first, second = torch.ones(2, side, side)
    found: dict[Any, list[float]] = {(name, way): [] for name in (*works, "rate") for way in ways}
    operations = {name: arithmetic(work) for name, work in works.items()}
    for _ in range(rounds):
        for way in ways:
            models.choose_products(way[0])
            torch.set_num_threads(way[1])
            torch.mm(first, second)
            found["rate", way].append(2 * side**3 / seconds(lambda: torch.mm(first, second), 3))
            for name, work in works.items():
                work()
                found[name, way].append(seconds(work, calls))
    middle = {key: statistics.median(values) for key, values in found.items()}
    names = [f"{products} products, {count} thread{'s' * (count > 1)}" for products, count in ways]
    print("| work | size | " + " | ".join(f"{name} | of the floor" for name in names) + " |")
    print("|---|---|" + "---|---|" * len(ways))
    for name, work in works.items():
        cells = [
            f"{1 / middle[name, way]:.1f} | {operations[name] / middle['rate', way] / middle[name, way]:.0%}"
            for way in ways
        ]
        print(f"| {name[0]} | {name[1]} | {' | '.join(cells)} |")
    rates = ", ".join(f"{middle['rate', way] / 1e9:.0f} ({name})" for way, name in zip(ways, names, strict=True))
    print(f"\nCalls per second, median of {rounds} rounds of {calls}. GFLOP/s of a large product: {rates}.\n")


def write_rows(path: Path, rows: int, part: int = 1_000_000) -> None:
    """A file of random transitions, some rows at a time, so that it may be larger than memory."""
    with h5py.File(path, "w") as file:
        for start in range(0, rows, part):
            arrays = random_transitions(min(part, rows - start)) | {
                "timeouts": np.arange(start, min(start + part, rows)) % 1000 == 999
            }
            del arrays["next_observations"]
            for key, array in arrays.items():
                if not start:
                    file.create_dataset(key, (rows, *array.shape[1:]), array.dtype)
                file[key][start : start + len(array)] = array


def loading(path: Path, storage: str) -> str:
    """Seconds to make a file ready for training, batches per second from there, peak of anonymous memory (Linux)."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]))

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    dataset = data.load_dataset(DataSection(source="hdf5", path=str(path), storage=storage))
    took = time.perf_counter() - began
    transitions = models.Transitions(dataset, "cpu")
    random = Randomness([0], "benchmark")
    began = time.perf_counter()
    for random.step in range(2_000):
        transitions.sample(random, 256)
    rate = 2_000 / (time.perf_counter() - began)
    done.set()
    return (
        f"{storage}: {took:.1f} s, {rate:,.0f} batches of 256 per second, {peak[0] / 2**20:.1f} GiB anonymous at most"
    )


EXPERIMENT = """
seeds = [0, 1, 2]
device = "cpu"
[data]
source = "hdf5"
path = "rows.hdf5"
environment = "InvertedPendulumSwingupBulletEnv-v0"
reference = [0, 1000]
[guidance]
steps = 1
[policy]
steps = 1
"""


def evaluation(folder: Path, episodes: int) -> float:
    """Seconds of a whole `mdpt evaluate`: 3 members, best of 10, episodes of 1,000 steps in PyBullet, no more and no fewer."""
    random = np.random.default_rng(0)
    with h5py.File(folder / "rows.hdf5", "w") as file:
        for key, array in {
            "observations": random.standard_normal((2000, 5), np.float32),
            "actions": random.uniform(-1, 1, (2000, 1)).astype(np.float32),
            "rewards": random.random(2000, np.float32),
            "terminals": np.zeros(2000, bool),
            "timeouts": np.arange(2000) % 1000 == 999,
        }.items():
            file[key] = array
    (folder / "swing.toml").write_text(EXPERIMENT)
    call = [str(Path(sys.executable).with_name("mdpt"))]
    took = 0.0
    for words in (
        "guidance swing.toml --out g.pt",
        "policy swing.toml --guidance g.pt --out p.pt",
        f"evaluate p.pt --episodes {episodes}",
    ):
        began = time.perf_counter()
        subprocess.run([*call, *words.split()], cwd=folder, check=True, capture_output=True)
        took = time.perf_counter() - began
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=40, help="of each kind of work in a round")
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions to load")
    parser.add_argument("--only-load", action="store_true")
    parser.add_argument("--shares", type=int, nargs="*", default=[2, 3, 4, 6, 10], help="members to train in processes")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="processes to train them in")
    parser.add_argument("--steps", type=int, default=200, help="of these runs")
    parser.add_argument("--only-shares", action="store_true")
    parser.add_argument("--episodes", type=int, default=10, help="to evaluate; 0: none")
    parser.add_argument("--members", type=int, nargs="*", default=[1, 5])
    given = parser.parse_args()
    threads = sorted({1, len(os.sched_getaffinity(0))})
    products = dict.fromkeys(["default", models.choose_products("oneDNN")])
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores\n")
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name, "many.hdf5"), given.rows)
        for storage in ("disk", "memory"):
            print(f"Loading {given.rows:,} transitions, {loading(Path(name, 'many.hdf5'), storage)}.")
    if given.only_load:
        return
    dataset = data.load_dataset(RANDOM, arrays=random_transitions(100_000))
    if given.shares:
        over_processes(dataset, given.shares, given.workers, given.rounds, given.steps)
    if given.only_shares:
        return
    transitions = models.Transitions(dataset, "cpu")
    kinds = [("guidance", name) for name in models.GUIDANCES] + [("policy", name) for name in models.POLICIES]
    kinds += [("joint", name) for name in models.POLICIES if name in models.GUIDANCES]
    works = {
        (f"{kind} `{name}`", f"{members} member{'s' * (members > 1)}"): training(kind, name, members, transitions)
        for kind, name in kinds
        for members in given.members
    }
    works |= {
        (f"act `{name}`", f"{states} x 50"): acting(name, states, 50) for name in ("dql", "idql") for states in (1, 10)
    }
    works |= {("an agent's step, `dql`", f"{states} x 10"): playing(dataset, states, 10) for states in (1, 5, 10, 20)}
    table(works, [(way, count) for count in threads for way in products], given.rounds, given.calls)
    with tempfile.TemporaryDirectory() as name:
        if given.episodes:
            print(
                f"`mdpt evaluate`, 3 members x {given.episodes} episodes: {evaluation(Path(name), given.episodes):.1f} s."
            )


if __name__ == "__main__":
    main()
