"""The paper's argument (arXiv 2506.03154) on a problem solved in closed form: guidance first, and plug and play.

One state, one step, T = 1 diffusion step, actions a ~ N(0, s^2), Q = 1 + k a. Write c^2 = alpha_bar = 1 - n^2 and m for
the policy's mean action. Noise carries no mean, so the best noise prediction is the data's plus a constant b, and
m = -n b / c. dql and edp (one objective at T = 1) minimize b^2 - eta (1 + k m) / Q, where Q = 1 + k m is held fixed:
m (1 + k m) = eta k n^2 / (2 c^2), which is .178 for s = .2, k = 1/2, eta = .005. dac regresses to noise - eta n k:
b = -eta n k, at every diffusion step of any T.

Run as a program it measures, prints a table and draws `experiments/theory.png`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in test_models.py

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import KnownQ, Lines, blank_bundle, make_experiment, make_guidance, make_policy, train
from torch import Tensor, nn
from toy_data import one_state, transitions

from mdpt import models
from mdpt.models import Guidance, Policy, Randomness, Run, Transitions

SEEDS = (0, 1, 2)
SPREAD, SLOPE, ETA = 0.2, 0.5, 0.005
TIMES = (100, 200, 400, 800, 1600)  # gradient steps
PICTURE = Path(__file__).parents[1] / "experiments" / "theory.png"

Schedule = Callable[[int], float]  # gradient step -> share of Q's slope that the critic has learned by then

SCHEDULES: dict[str, Schedule] = {
    "frozen": lambda step: 1.0,
    "growing": lambda step: 1 - math.exp(-step / 500),
    "wrong first": lambda step: 1 - 2 * math.exp(-step / 250),
}


# ---------------------------------------------------------------------------------------------- guidance first


def with_lines(policy: Any) -> Any:
    """A policy whose denoiser is two parameters for each diffusion step, and begins as the data's."""
    levels = zip(policy.diffusion.signal, policy.diffusion.noise, strict=True)
    slopes = torch.tensor([noise / (signal**2 * SPREAD**2 + noise**2) for signal, noise in levels])
    policy.denoiser = Lines(torch.stack([slopes, 0 * slopes], dim=1).repeat(policy.members, 1, 1))
    policy.average = policy.denoiser.frozen_copy()
    return policy


def cloned(steps: int = 1600, **settings: Any) -> Policy:
    """A policy that has cloned the data and is yet to learn under a guidance."""
    defaults = {
        "algorithm": "dql",
        "eta": ETA,
        "diffusion_steps": 1,
        "learning_rate": 7e-4,
        "batch_size": 512,
        "ema_decay": 0.98,
    }
    return with_lines(make_policy(SEEDS, **(defaults | {"steps": steps, "snapshots": 16} | settings)))


def gaussian(n: int = 10_000) -> Transitions:
    """The quantiles of N(0, s^2)."""
    return one_state(SPREAD * torch.special.ndtri((torch.arange(n) + 0.5) / n), torch.zeros(n))


def mean_action(policy: Policy, n: int = 10_000) -> Tensor:
    """The mean of the acting policy's actions, (S,): the noise and its mirror image, so that chance adds nothing."""
    noises = policy.noises(Randomness(SEEDS, "try"), "act", n)
    with torch.no_grad():
        actions = policy.sample(torch.zeros(policy.members, 2 * n, 1), torch.cat([noises, -noises], dim=2))
    return actions.mean((1, 2))


def learn(policy: Policy, schedule: Schedule) -> dict[int, Tensor]:
    """The project's loop under a Q whose slope follows a schedule: the policy's mean (S,) at each snapshot's step."""
    bundle = blank_bundle("policy", make_experiment(SEEDS))

    def loss(batch: models.Batch, random: Randomness, done: float) -> models.Loss:
        slope = SLOPE * schedule(random.step)
        known: Any = KnownQ(lambda observations, actions: 1 + slope * actions[..., 0])
        return policy.loss(batch, known, random)

    learner = models.Learner([(policy, policy.section)], loss)
    cost = models.Cost(bundle.accounting, torch.device("cpu"))
    models.train(learner, gaussian(), policy.section, bundle, [(bundle, policy)], cost, Run())
    means = {}
    for step, weights in bundle.snapshots.items():
        policy.load_state_dict(weights, strict=False)
        means[step] = mean_action(policy)
    return means


@functools.cache
def means_under(name: str) -> dict[int, Tensor]:
    return learn(cloned(), SCHEDULES[name])


def best_mean(share: float = 1.0) -> float:
    """Of dql and edp at T = 1, by the formula above."""
    (signal,), (noise,) = cloned().diffusion.signal, cloned().diffusion.noise
    slope = abs(share) * SLOPE
    root = math.sqrt(1 + 2 * ETA * (slope * noise / signal) ** 2)
    return math.copysign((root - 1) / (2 * slope), share)


def within(got: Tensor, expected: float, share: float) -> None:
    assert ((got - expected).abs() < share * expected).all(), (got, expected)


def test_the_best_mean_is_what_the_formula_says() -> None:
    """It solves its equation, and no offset of the noise has a lower objective."""
    m, (signal,), (noise,) = best_mean(), cloned().diffusion.signal, cloned().diffusion.noise
    assert abs(m - 0.178) < 1e-4 and best_mean(-1.0) == -m
    offsets = -signal / noise * (m + torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64))
    objective = offsets**2 - ETA * (1 - SLOPE * noise / signal * offsets) / (1 + SLOPE * m)
    assert objective.argmin() == 1000


def test_a_frozen_guidance_is_followed_at_once() -> None:
    means = means_under("frozen")
    for step in TIMES:
        within(means[step], best_mean(), 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dql", "edp"])
def test_a_network_finds_the_best_mean_too(algorithm: str) -> None:
    """One that begins with random weights, in 400 steps."""
    settings = {"algorithm": algorithm, "eta": ETA, "diffusion_steps": 1, "ema_decay": 0.98}
    policy = make_policy(SEEDS, steps=400, snapshots=1, learning_rate=5e-3, batch_size=1024, **settings)
    within(learn(policy, SCHEDULES["frozen"])[400], best_mean(), 0.03)


@pytest.mark.parametrize("steps", [1, 5])
def test_dac_finds_its_best_noise_at_every_diffusion_step(steps: int) -> None:
    """eta for a mean near .17; of 5 steps the first clips, so the sampler itself says where the best noise leads."""
    eta = {1: 0.0287, 5: 0.87}[steps]
    best = cloned(algorithm="dac", eta=eta, diffusion_steps=steps)
    best.average.pairs[..., 1] = -eta * SLOPE * torch.tensor(best.diffusion.noise)
    expected = float(mean_action(best)[0])
    assert expected > 0.16
    if steps == 1:
        (signal,), (noise,) = best.diffusion.signal, best.diffusion.noise
        assert abs(expected - eta * SLOPE * noise**2 / signal) < 1e-4
    policy = cloned(400, algorithm="dac", eta=eta, diffusion_steps=steps, learning_rate=5e-3, batch_size=1024)
    within(learn(policy, SCHEDULES["frozen"])[400], expected, 0.03)


def test_a_guidance_that_still_learns_is_followed_late() -> None:
    """As late as the guidance is: its mean is near the best one for the slope of the time."""
    means, frozen = means_under("growing"), means_under("frozen")
    below = dict(zip(TIMES, (0.25, 0.4, 0.6, 0.85, 0.98), strict=True))  # of what a frozen guidance's policy has
    for step in TIMES:
        assert (means[step] < below[step] * frozen[step]).all(), step
        assert abs(means[step].mean() - best_mean(SCHEDULES["growing"](step))) < 0.01, step
    assert all((after > before).all() for before, after in pairwise(means[step] for step in TIMES))


def test_a_guidance_that_begins_wrong_leads_the_wrong_way_first() -> None:
    means = means_under("wrong first")
    assert (means[100] < -0.07).all() and (means[200] < 0.02).all()
    within(means[1600], best_mean(), 0.03)


# ---------------------------------------------------------------------------------------------- plug and play


def behaviour(seed: int, mean: float, n: int = 300) -> Transitions:
    """Data with actions N(mean, 0.25^2), whose reward has noise. One reward for every behaviour."""
    g = torch.Generator().manual_seed(seed)
    observations = torch.rand(n, 1, generator=g) * 2 - 1
    actions = mean + 0.25 * torch.randn(n, 1, generator=g)
    rewards = reward(observations, actions) + 0.1 * torch.randn(n, generator=g)
    columns = {"observations": observations, "actions": actions, "rewards": rewards}
    return transitions(columns | {"next_observations": observations, "terminals": torch.ones(n)})


def reward(observations: Tensor, actions: Tensor) -> Tensor:
    return 1 - (actions - 0.3 * observations)[..., 0] ** 2


def fitted(seeds: Sequence[int], data: Transitions) -> Guidance:
    guidance = make_guidance(seeds, algorithm="idql", steps=400, batch_size=128, tau=0.03, learning_rate=5e-3)
    train(guidance, data, seeds)
    return guidance.requires_grad_(False)


@functools.cache
def judged(data: int, mean: float, states: int = 200, candidates: int = 20) -> tuple[Tensor, Tensor]:
    """Three critics of a draw of a behaviour's data, beside three others of draw 0 with mean 0.

    Returns their rank correlation over candidates in a state, averaged over states, for each pair (3, 3), and by how
    much the reward of what they pick is above the candidates' mean (3,). The candidates are actions of draw 0's kind.
    """
    g = torch.Generator().manual_seed(9)
    observations = (torch.rand(states, 1, generator=g) * 2 - 1).repeat_interleave(candidates, 0).expand(3, -1, -1)
    actions = (0.25 * torch.randn(states * candidates, 1, generator=g)).expand(3, -1, -1)
    rewards = reward(observations, actions).view(3, states, candidates)

    def scores(critics: Guidance) -> Tensor:
        return critics.q(observations, actions).view(3, states, candidates)

    def ranks(of: Tensor) -> Tensor:  # of mean 0 and length 1 in each state
        order = of.argsort(-1).argsort(-1).double()
        return nn.functional.normalize(order - order.mean(-1, keepdim=True), dim=-1)

    theirs = scores(fitted(range(3, 6), behaviour(data, mean)))
    pairs = torch.einsum("inc,jnc->ijn", ranks(scores(first_critics())), ranks(theirs)).mean(-1)
    return pairs, (rewards.gather(2, theirs.argmax(2, keepdim=True)).mean((1, 2)) - rewards.mean())


@functools.cache
def first_critics() -> Guidance:
    return fitted(range(3), behaviour(0, 0.0))


@pytest.mark.slow
def test_critics_of_one_behaviour_rank_alike_and_of_another_do_not() -> None:
    """Other seeds on the same data, other seeds on fresh data of that behaviour, and another behaviour's data."""
    (same, gain), (fresh, gain_of_fresh), (other, gain_of_other) = judged(0, 0.0), judged(1, 0.0), judged(1, 0.8)
    for pairs, gained in ((same, gain), (fresh, gain_of_fresh)):
        assert pairs.median() > 0.85 and (pairs > 0.7).all() and (gained > 0.06).all()
    assert (other < 0.5).all() and (gain_of_other < 0).all()


# -------------------------------------------------------------------------------------------------- the picture

SHIFTS = (0.0, 0.2, 0.4, 0.6, 0.8)  # of the behaviour's mean action, whose deviation is 0.25


def tables() -> Iterator[str]:
    yield from ("| policy's mean after | " + " | ".join(map(str, TIMES)) + " |", "|---|" + "---|" * len(TIMES))
    for name in SCHEDULES:
        means = means_under(name)
        yield f"| {name} | " + " | ".join(f"{means[step].mean():.3f}" for step in TIMES) + " |"
    yield from ("", "| the second critic's data | rank correlation: median (lowest, highest) | reward gained |")
    yield "|---|---|---|"
    kinds = {"the same": (0, 0.0)} | {f"fresh, mean action {shift:g}": (1, shift) for shift in SHIFTS}
    for name, data in kinds.items():
        pairs, gain = judged(*data)
        yield f"| {name} | {pairs.median():.2f} ({pairs.min():.2f}, {pairs.max():.2f}) | {gain.mean():.3f} |"


def draw(path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(3, 2), layout="constrained")
    for axes in (left, right):
        axes.axhline(0, color="lightgrey", linewidth=1, zorder=0)
    left.axhline(best_mean(), color="black", linestyle=":", linewidth=1, label="best, in closed form")
    for name, schedule in SCHEDULES.items():
        means = learn(cloned(snapshots=80), schedule)
        steps, of = [0, *means], torch.stack([torch.zeros(len(SEEDS)), *means.values()])
        (line,) = left.plot(steps, of.mean(1), label=name)
        left.fill_between(steps, of.amin(1), of.amax(1), color=line.get_color(), alpha=0.3, linewidth=0)
    left.set(xlabel="gradient steps of the policy", ylabel="mean action", title="Guidance first")
    left.legend(frameon=False, loc="lower right", title="slope of Q", fontsize=8, title_fontsize=8)
    pairs = torch.stack([judged(1, shift)[0].flatten() for shift in SHIFTS])
    right.fill_between(SHIFTS, pairs.amin(1), pairs.amax(1), alpha=0.3, linewidth=0, label="lowest to highest")
    right.plot(SHIFTS, pairs.median(1).values, marker="o", label="median of 9 pairs")
    right.set(xlabel="distance of the mean actions", ylabel="rank correlation", title="Plug and play")
    right.legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    draw(PICTURE)
    print(*tables(), sep="\n")
