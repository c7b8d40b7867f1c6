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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py  # type: ignore[import-untyped]
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import mdpt
import models
from models import Guidance, Inference, Normalizer, Policy, Randomness

Work = Callable[[], object]
O, A = 15, 3  # Hopper's


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


def build(kind: type[Any], section: Any, members: int, **settings: Any) -> tuple[Any, Any]:
    """A guidance or policy with initial weights, and its section of the experiment."""
    section = section(**settings)
    names = set(kind.__init__.__kwdefaults__ or {}) | set(kind.__init__.__annotations__)
    wanted = {key: value for key, value in section.model_dump().items() if key in names}
    normalizer = Normalizer(torch.zeros(O), torch.ones(O))
    random = Randomness(range(members), "benchmark")
    return kind(random, normalizer, observation_dim=O, action_dim=A, **wanted), section


def training(kind: str, algorithm: str, members: int, transitions: models.Transitions) -> Work:
    """A gradient step of "guidance", "policy" (under a frozen idql guidance) or "joint" training."""
    of_guidance = {"algorithm": algorithm} if kind == "guidance" or algorithm in models.GUIDANCES else {}
    guidance, guidance_section = build(
        Guidance, mdpt.GuidanceSection, members, **(of_guidance if kind != "policy" else {})
    )
    policy, policy_section = build(
        Policy, mdpt.PolicySection, members, **({"algorithm": algorithm} if kind != "guidance" else {})
    )
    random = Randomness(range(members), "train")
    if kind == "guidance":
        learner = mdpt.Learner([(guidance, guidance_section)], lambda batch, random, _: guidance.loss(batch, random))
    elif kind == "policy":
        guidance.requires_grad_(False)
        if policy.algorithm.labels:
            transitions.label(guidance)
        learner = mdpt.Learner(
            [(policy, policy_section)], lambda batch, random, _: policy.loss(batch, guidance, random)
        )
    else:
        guidance.actor = None

        def both(batch: models.Batch, random: Randomness, _: float) -> models.Loss:
            return models.add(policy.loss(batch, guidance, random), guidance.loss(batch, random, policy, 1.0))

        learner = mdpt.Learner([(guidance, guidance_section), (policy, policy_section)], both)

    def step() -> None:
        random.step += 1
        loss, _ = learner.loss(transitions.sample(random, 256), random, 0.5)
        learner.update(loss, random.step, 1_000_000)

    return step


def acting(algorithm: str, states: int, candidates: int) -> Work:
    """An action in each of `states` environments, the best of `candidates` by an idql guidance."""
    policy, guidance = (
        build(kind, section, 1, **settings)[0]
        for kind, section, settings in (
            (Policy, mdpt.PolicySection, {"algorithm": algorithm}),
            (Guidance, mdpt.GuidanceSection, {}),
        )
    )
    observations, random = torch.zeros(1, states, O), Randomness([0], "act")

    def act() -> None:
        random.step += 1
        models.act(policy, guidance, observations, random, Inference(candidates=candidates))

    return act


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


def table(works: dict[tuple[str, str], Work], threads: list[int], rounds: int, calls: int) -> None:
    """Print calls per second and share of the floor, for each work and number of threads."""
    side = 1536
    product: Work = lambda: torch.mm(torch.ones(side, side), torch.ones(side, side))
    found: dict[Any, list[float]] = {(name, count): [] for name in (*works, "rate") for count in threads}
    operations = {name: arithmetic(work) for name, work in works.items()}
    for _ in range(rounds):
        for count in threads:
            torch.set_num_threads(count)
            product()
            found["rate", count].append(2 * side**3 / seconds(product, 2))
            for name, work in works.items():
                work()
                found[name, count].append(seconds(work, calls))
    middle = {key: statistics.median(values) for key, values in found.items()}
    print(
        "| work | size | " + " | ".join(f"{count} thread{'s' * (count > 1)} | of the floor" for count in threads) + " |"
    )
    print("|---|---|" + "---|---|" * len(threads))
    for name in works:
        cells = [
            f"{1 / middle[name, n]:.1f} | {operations[name] / middle['rate', n] / middle[name, n]:.0%}" for n in threads
        ]
        print(f"| {name[0]} | {name[1]} | " + " | ".join(cells) + " |")
    rates = ", ".join(
        f"{middle['rate', count] / 1e9:.0f} GFLOP/s on {count} thread{'s' * (count > 1)}" for count in threads
    )
    print(f"\nCalls per second, median of {rounds} rounds of {calls}. Float32 matrix product: {rates}.\n")


def loading(folder: Path, rows: int) -> float:
    """Seconds to make a file of `rows` transitions ready for training."""
    arrays = random_transitions(rows)
    del arrays["next_observations"]
    with h5py.File(folder / "rows.hdf5", "w") as file:
        for key, array in arrays.items():
            file[key] = array
        file["timeouts"] = np.arange(rows) % 1000 == 999
    gymnasium.register("Shape-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=1000)
    spec = data.EnvironmentSpec("Shape-v0", O, A, (-1.0,) * A, (1.0,) * A, 1000)
    data.environment_spec = lambda name: spec
    began = time.perf_counter()
    data.load_dataset(
        source="hdf5",
        environment_id="Shape-v0",
        path=folder / "rows.hdf5",
        reward_scale="return-range",
        held_out=0.05,
        seed=0,
        collect=None,
        workers=1,
        progress=None,
    )
    return time.perf_counter() - began


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
    parser.add_argument("--episodes", type=int, default=10, help="to evaluate; 0: none")
    parser.add_argument("--members", type=int, nargs="*", default=[1, 5])
    given = parser.parse_args()
    threads = sorted({1, len(os.sched_getaffinity(0))})
    print(f"torch {torch.__version__}, matrix products: {getattr(models, 'choose_products', lambda: 'default')()}\n")
    transitions = models.Transitions(random_transitions(100_000), "cpu")
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
    table(works, threads, given.rounds, given.calls)
    with tempfile.TemporaryDirectory() as name:
        print(f"Loading {given.rows:,} transitions: {loading(Path(name), given.rows):.1f} s.")
        if given.episodes:
            print(
                f"`mdpt evaluate`, 3 members x {given.episodes} episodes: {evaluation(Path(name), given.episodes):.1f} s."
            )


if __name__ == "__main__":
    main()
