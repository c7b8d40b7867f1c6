"""Tests of models.py: hand-computed losses, independent implementations, and a problem solved in closed form.

The closed-form problem has one state and one action dimension. The data's actions are two Gaussians, 70 % around -0.5
and 30 % around +0.5, deviation 0.05; every transition is terminal and pays 1 - (action - 0.5)^2, so Q is known.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make busy cores 100 times slower

import contextlib
import copy
import functools
import hashlib
import io
import math
import operator
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from toy_data import TOY, noisy_columns, one_state, toy_dataset, transitions

from mdpt import data, models
from mdpt.data import (
    DataSection,
    EvaluationSection,
    Experiment,
    GuidanceSection,
    HeldOut,
    MdptError,
    MdptWarning,
    PolicySection,
    Section,
)
from mdpt.models import (
    ACTIVATIONS,
    GUIDANCES,
    POLICIES,
    Agent,
    Batch,
    Bundle,
    Denoiser,
    Diffusion,
    Guidance,
    Inference,
    Linear,
    Normalizer,
    Policy,
    Randomness,
    Run,
    Transitions,
    ValueNetwork,
    act,
    build_guidance,
    build_policy,
    check_fit,
    load_agent,
    make_schedule,
    pair_members,
    read_bundle,
    read_guidances,
    read_policy,
    save_bundle,
    select_members,
    weights_of,
)

DOUBLE = torch.float64
SEEDS = (0, 1)


class Again(Randomness):
    """Gives the same numbers at every draw of a step, to look at what a loss draws."""

    def _draw(self, *arguments: Any) -> Tensor:
        self._drawn.clear()
        return super()._draw(*arguments)


KINDS = [*(f"guidance {name}" for name in GUIDANCES), *(f"policy {name}" for name in POLICIES)]


def near(got: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=got.dtype)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def same(first: Any, second: Any) -> bool:
    """Equal to the bit, in all containers."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if torch.is_tensor(first) else bool(first == second)


def make_experiment(seeds: Sequence[int] = SEEDS, **tables: dict[str, Any]) -> Experiment:
    """Small networks, unless a table says otherwise."""
    guidance = {"hidden": [32, 32], "actor_hidden": [32, 32], "learning_rate": 3e-3, "conservatism": 0.0}
    guidance |= tables.get("guidance", {})
    policy = {"hidden": [32, 32], "time_features": 16, "learning_rate": 3e-3} | tables.get("policy", {})
    experiment = Experiment(
        seeds=list(seeds),
        data=DataSection(reference=(0.0, 100.0)),
        guidance=GuidanceSection(**guidance),
        policy=PolicySection(**policy),
    )
    return models.check_algorithms(experiment)


def make_guidance(seeds: Sequence[int] = SEEDS, o: int = 1, a: int = 1, **settings: Any) -> Guidance:
    section, normalizer = make_experiment(guidance=settings).guidance, Normalizer(torch.zeros(o), torch.ones(o))
    return Guidance(Randomness(seeds, "init"), normalizer, section, o, a)


def make_policy(seeds: Sequence[int] = SEEDS, o: int = 1, a: int = 1, **settings: Any) -> Policy:
    section, normalizer = make_experiment(policy=settings).policy, Normalizer(torch.zeros(o), torch.ones(o))
    return Policy(Randomness(seeds, "init"), normalizer, section, o, a)


def blank_bundle(kind: Any, experiment: Experiment) -> Bundle:
    """A bundle of the toy at step 0."""
    account = models.Account(device="cpu", products="default")
    return models.new_bundle(kind, experiment, toy_dataset(noisy_columns()), account)


def train(module: Any, data: Transitions, seeds: Sequence[int], guidance: Any = None) -> None:
    """The loop of `mdpt guidance` and `mdpt policy`, over a module at hand."""
    learns_values = isinstance(module, Guidance)
    kind = "guidance" if learns_values else "policy"
    bundle = blank_bundle(kind, make_experiment(seeds))

    def loss(batch: Batch, random: Randomness, done: float) -> Any:
        return module.loss(batch, random) if learns_values else module.loss(batch, guidance, random)

    learner = models.Learner([(module, module.section)], loss)
    cost = models.Cost(bundle.accounting, torch.device("cpu"))
    models.train(learner, data, module.section, bundle, [(bundle, module)], cost, Run())


def learn(kind: str, teacher: Bundle | None = None, run: Run | None = None, **settings: Any) -> Bundle:
    """`mdpt guidance` or `mdpt policy` on a tiny dataset; "joint NAME": a policy together with that guidance."""
    name, algorithm = kind.split()
    tables = {name: settings | {"algorithm": algorithm}}
    if name == "policy" and teacher is None:
        tables["policy"] |= {"scheme": "unguided"}
    if name == "joint":
        guidance = {"algorithm": algorithm, "conservatism": 1.0}
        tables = {"guidance": guidance, "policy": settings | {"scheme": "joint"}}
    experiment = make_experiment(**tables)
    if name == "guidance":
        return models.train_guidance(experiment, toy_dataset(noisy_columns()), run or Run())
    return models.train_policy(experiment, toy_dataset(noisy_columns()), [teacher] if teacher else [], run or Run())


def noisy_data(n: int = 200, o: int = 3, a: int = 2) -> Transitions:
    return transitions(noisy_columns(n, o, a))


def offers(policy: Policy, observations: Tensor, candidates: int = 1, **settings: Any) -> Tensor:
    """The policy's own actions (S, B N, A), from the same noise at every call."""
    rows = observations.shape[1] * candidates
    noises = policy.noises(Randomness(range(policy.members), "try"), "act", rows)
    return policy.sample(observations, noises, candidates=candidates, **settings).detach()


def choose(policy: Policy, guidance: Any, observations: Tensor, **how: Any) -> Tensor:
    """What `act` makes of these offers: (S, B, A)."""
    random, inference = Randomness(range(policy.members), "try"), Inference(**how)
    states, candidates = observations.shape[1], inference.candidates
    noises = policy.noises(random, "act", states * candidates)
    return act(policy, guidance, observations, noises, random.uniform("selection", states, candidates), inference)


class KnownQ:
    """A guidance whose Q is a given function of observation and action, (S, B, O), (S, B, A) -> (S, B)."""

    def __init__(self, q: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.q = q

    def one_q(self, observations: Tensor, actions: Tensor, twin: Tensor) -> Tensor:
        return self.q(observations, actions)


# ---------------------------------------------------------------------------------------------------- losses


def test_expectile_loss_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [2.0, 2.0]], requires_grad=True)
    v = torch.tensor([[0.0, 1.0], [2.0, 0.0]], requires_grad=True)
    loss, metrics = models.expectile_loss(target, v, 0.7)
    near(loss, [(0.7 + 0.3) / 2, 0.7 * 4 / 2])
    loss.sum().backward()
    near(v.grad, [[-0.7, 0.3], [0.0, -1.4]])
    assert target.grad is None
    near(metrics["v"], [0.5, 1.0])
    near(metrics["v_loss"], [0.5, 1.4])


def test_td_loss_by_hand_with_terminal_and_time_limit() -> None:
    q = torch.tensor([[[0.0, 11.0], [1.0, 12.0]]], requires_grad=True)
    next_v = torch.tensor([[10.0, 10.0]], requires_grad=True)
    loss, metrics = models.td_loss(q, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), next_v, 0.9)
    near(loss, [0.5 + 0.5])  # targets 1 and 2 + 0.9 * 10
    loss.sum().backward()
    near(q.grad, [[[-1.0, 0.0], [0.0, 1.0]]])
    assert next_v.grad is None
    near(metrics["q"], [6.0])
    near(metrics["q_loss"], [1.0])


def test_conservative_loss_by_hand() -> None:
    """log(e^0 + e^log 3) - 0 = log 4; log(e^1 + e^1) - 1 = log 2, for two critics of one state and one other action."""
    q = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
    others = torch.tensor([[[[math.log(3)]], [[1.0]]]], requires_grad=True)
    loss, metrics = models.conservative_loss(q, others)
    near(loss, [math.log(4) + math.log(2)])
    near(metrics["conservative_loss"], [math.log(8)])
    loss.sum().backward()
    near(others.grad, [[[[0.75]], [[0.5]]]])
    near(q.grad, [[[-0.75], [-0.5]]])


@pytest.mark.parametrize("algorithm", GUIDANCES)
def test_conservatism_adds_its_loss_in_a_share_of_the_states(algorithm: str) -> None:
    """With shares of the batch rounded up: 3 of 9 states at 0.25, with 5 other actions each, 2 of them near."""
    settings = {"algorithm": algorithm, "conservatism": 2.0, "conservative_actions": 5, "conservative_noise": 0.1}
    plain, guidance = (make_guidance(SEEDS, 3, 2, **each) for each in ({"algorithm": algorithm}, settings))
    batch = noisy_data().take(torch.arange(18).view(2, 9))
    (before, _), (loss, metrics) = (each.loss(batch, Again(SEEDS, "train")) for each in (plain, guidance))
    others = models.other_actions(batch.actions[:, :3], 5, 0.1, Again(SEEDS, "train"))
    assert others.shape == (2, 3, 5, 2) and others.abs().max() <= 1
    steps = (others - batch.actions[:, :3, None]).abs().amax((0, 1, 3))
    assert (steps[:2] < 0.5).all() and (steps[2:] > 0.5).all()
    expected = torch.zeros(2)
    for state in range(3):
        at = batch.observations[:, [state]]
        q = [guidance.twins(guidance.online_q, at, others[:, state, [k]]).exp() for k in range(5)]
        own = guidance.twins(guidance.online_q, at, batch.actions[:, [state]])
        expected += ((sum(q) + own.exp()).log() - own).sum((1, 2)).detach() / 3
    near(metrics["conservative_loss"], expected, 1e-5)
    near(loss.detach(), (before + 2 * expected).detach(), 1e-5)


def test_conservatism_lowers_q_where_there_are_no_data() -> None:
    """All actions of the data are near -0.5, and all rewards are 0."""
    g, margins = torch.Generator().manual_seed(0), []
    data = one_state(-0.5 + 0.05 * torch.randn(500, generator=g), torch.zeros(500))
    actions = torch.tensor([-0.5, 0.5, 1.0]).view(1, 3, 1).expand(2, -1, -1)
    for alpha in (0.0, 1.0):
        guidance = make_guidance(SEEDS, steps=100, batch_size=64, tau=0.1, learning_rate=1e-2, conservatism=alpha)
        train(guidance, data, SEEDS)
        q = guidance.q(torch.zeros(2, 3, 1), actions).detach()
        margins.append(q[:, 0] - q[:, 1:].amax(1))
    assert (margins[1] > margins[0] + 0.5).all() and (margins[1] > 0.5).all(), margins


def test_noise_loss_by_hand() -> None:
    predicted = torch.tensor([[[1.0, 1.0], [0.0, 2.0]]], requires_grad=True)
    near(models.noise_loss(predicted, torch.zeros(1, 2, 2))[0], [1.5])
    loss, metrics = models.noise_loss(predicted, torch.zeros(1, 2, 2), torch.tensor([[3.0, 0.5]]))
    near(loss, [(3 * 1 + 0.5 * 2) / 2])
    loss.sum().backward()
    near(predicted.grad, [[[1.5, 1.5], [0.0, 0.5]]])
    near(metrics["noise_loss"], [2.0])


def test_improvement_loss_raises_q_and_its_scale_has_no_gradient() -> None:
    q = torch.tensor([[1.0, -3.0], [0.5, 0.5]], requires_grad=True)
    loss, metrics = models.improvement_loss(q)
    near(loss, [0.5, -1.0])  # -mean / mean absolute value
    loss.sum().backward()
    near(q.grad, [[-0.25, -0.25], [-1.0, -1.0]])  # -1 / (B scale): descent raises every q
    near(metrics["policy_q"], [-1.0, 0.5])
    assert models.improvement_loss(torch.zeros(1, 2))[0].tolist() == [0.0]


def test_advantage_weights_by_hand() -> None:
    section = PolicySection(advantage_expectile=0.7, advantage_inverse_temperature=0.5)
    advantage = torch.tensor([[-1.0, 0.0, 2.0, 99.0]])
    expected = {
        "none": [1.0, 1.0, 1.0, 1.0],
        "expectile": [0.3, 0.7, 0.7, 0.7],
        "exponential": [math.exp(-0.5), 1.0, math.e, 100.0],
        "hard": [0.0, 1.0, 1.0, 1.0],
    }
    assert expected.keys() == models.ADVANTAGE_WEIGHTS.keys()
    for name, weights in expected.items():
        near(models.ADVANTAGE_WEIGHTS[name](section, advantage), [weights], 1e-5)


def test_add_weighs_the_second_and_keeps_every_metric() -> None:
    first, second = (torch.tensor([1.0]), {"a": torch.zeros(1)}), (torch.tensor([2.0]), {"b": torch.ones(1)})
    loss, metrics = models.add(first, second, 3.0)
    assert loss.tolist() == [7.0] and set(metrics) == {"a", "b"}
    with pytest.raises(RuntimeError, match="two losses have a metric 'a'"):
        models.add(first, first)


@pytest.mark.parametrize("algorithm", GUIDANCES)
def test_guidance_members_learn_apart(algorithm: str) -> None:
    guidance = make_guidance((0, 1, 2), 3, 2, algorithm=algorithm)
    random = Again((0, 1, 2), "train")
    loss, metrics = guidance.loss(noisy_data().sample(random, 16), random)
    assert loss.shape == (3,) and all(value.shape == (3,) for value in metrics.values())
    check_only_member_one_learns(loss, [network for network, _ in guidance.networks()])


@pytest.mark.parametrize("algorithm", POLICIES)
def test_policy_members_learn_apart(algorithm: str) -> None:
    guidance = make_guidance((0, 1, 2), 3, 2)
    guidance.requires_grad_(False)
    policy = make_policy((0, 1, 2), 3, 2, algorithm=algorithm)
    random = Again((0, 1, 2), "train")
    loss, metrics = policy.loss(noisy_data().sample(random, 16), guidance, random)
    assert loss.shape == (3,) and all(value.shape == (3,) for value in metrics.values())
    check_only_member_one_learns(loss, [network for network, _ in policy.networks()])


def check_only_member_one_learns(loss: Tensor, networks: Sequence[models.Stack]) -> None:
    for network in networks:
        gradients = torch.autograd.grad(loss[1], list(network.parameters()), retain_graph=True)
        norms = torch.stack([g.view(network.members, -1).norm(dim=1) for g in gradients])
        assert norms[:, 0].abs().max() == 0 and norms[:, 2].abs().max() == 0
        assert (norms[:, 1] > 0).sum() >= len(norms) - 1


def test_implicit_q_loss_bootstraps_time_limits_only() -> None:
    guidance = make_guidance((4,), discount=0.9, expectile=0.8)
    with torch.no_grad():
        guidance.target_q.vector.mul_(-3.0)  # so that targets and online critics differ
    rows = transitions(
        {
            "observations": [[0.1], [0.2], [0.3]],
            "actions": [[0.5], [-0.5], [0.9]],
            "rewards": [1.0, 2.0, 3.0],
            "next_observations": [[0.2], [0.7], [-0.6]],
            "terminals": [False, True, False],  # the third is a time limit
        }
    )
    batch = rows.take(torch.arange(3)[None])
    loss, _ = guidance.loss(batch, Again((4,), "train"))
    with torch.no_grad():
        v, next_v = guidance.v(batch.observations)[0], guidance.v(batch.next_observations)[0]
        target = [1 + 0.9 * next_v[0], 2.0, 3 + 0.9 * next_v[2]]
        online = guidance.twins(guidance.online_q, batch.observations, batch.actions)[0]
        least = guidance.twins(guidance.target_q, batch.observations, batch.actions)[0].min(0).values
        expected = sum((online[k, i] - target[i]) ** 2 / 3 for k in range(2) for i in range(3))
        for i in range(3):
            u = float(least[i] - v[i])
            expected += (0.8 if u > 0 else 0.2) * u * u / 3
    assert abs(next_v).min() > 1e-3
    near(loss, [float(expected)], 1e-5)


def test_diffusion_q_loss_takes_the_best_of_the_next_actions() -> None:
    guidance = make_guidance((4,), algorithm="dql", bootstrap_candidates=3, discount=0.9)
    with torch.no_grad():
        guidance.target_q.vector.mul_(-3.0)
    next_actions = torch.tensor([[0.9, -0.9, 0.1, 0.2, 0.7, -0.3]])[..., None]  # three of each state, side by side
    with torch.no_grad():  # what one critic likes the other does not
        *hidden, last = guidance.target_q.layers
        for layer in hidden:
            layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
        last.weight[1], states = -last.weight[0], torch.full((1, 6, 1), 0.35)
        middle = guidance.twins(guidance.target_q, states, next_actions)[0, 0].mean()
        last.bias[1] = 2 * middle - last.bias[0]
    seen: list[Any] = []
    actor: Any = lambda states, random: seen.append(states) or next_actions
    columns = {"observations": [[0.1], [0.2]], "actions": [[0.5], [-0.5]], "rewards": [1.0, 2.0]}
    rows = transitions(columns | {"next_observations": [[0.3], [0.4]], "terminals": [0.0, 0.0]})
    batch = rows.take(torch.arange(2)[None])
    random = Again((4,), "train")
    loss, _ = guidance.loss(batch, random, actor)
    near(seen[0], [[[0.3], [0.3], [0.3], [0.4], [0.4], [0.4]]])
    with torch.no_grad():
        expected, better = 0.0, 0
        v, data_q = guidance.v(batch.observations)[0], guidance.q(batch.observations, batch.actions)[0]
        online = guidance.twins(guidance.online_q, batch.observations, batch.actions)[0]
        for i in range(2):
            state = batch.next_observations[:, i : i + 1]
            twins = guidance.twins(guidance.target_q, state.expand(-1, 3, -1), next_actions[:, 3 * i : 3 * i + 3])[0]
            next_q = min(max(twin.tolist()) for twin in twins)
            better += next_q > max(twins.amin(0).tolist()) + 1e-6  # the best of the lower would be another
            target = float(batch.rewards[0, i]) + 0.9 * next_q
            expected += sum((float(online[k, i]) - target) ** 2 / 2 for k in range(2))
            expected += 0.5 * float(data_q[i] - v[i]) ** 2 / 2
    near(loss.detach(), [expected], 1e-5)
    assert better
    companion = guidance.actor
    assert companion is not None  # it learns by the policy loss of "dql", on top of what the critics learn from it
    apart = guidance.loss(batch, random, companion.act_alone)[0] + companion.loss(batch, guidance, random)[0]
    near(guidance.loss(batch, random)[0].detach(), apart.detach(), 1e-5)
    guidance.actor = None
    with pytest.raises(RuntimeError, match="without a companion"):
        guidance.loss(batch, random)


def test_dql_and_edp_losses_are_cloning_plus_eta_times_value() -> None:
    guidance = make_guidance((0, 1), 3, 2)
    batch = noisy_data().sample(Again((0, 1), "x"), 16)
    for algorithm in ("dql", "edp"):
        policy = make_policy((0, 1), 3, 2, algorithm=algorithm, eta=2.0)
        random = Again((0, 1), "train")
        step = policy.predict(batch, random)
        if algorithm == "dql":
            noises = random.normal("chain", 5, 16, 2)
            times = policy.denoiser.times()
            online = lambda x, t: policy.denoiser(x, times[:, t : t + 1], step.condition)  # noqa: B023
            actions = policy.diffusion.reverse(online, noises)
        else:
            alpha_bar = torch.cumprod(1 - make_schedule("vp", 5), 0)[step.t][..., None].float()
            actions = ((step.noisy - (1 - alpha_bar).sqrt() * step.predicted) / alpha_bar.sqrt()).clamp(-1, 1)
        both = guidance.twins(guidance.target_q, batch.observations, actions)
        twin = random.integers("twin", 2)
        q = torch.stack([both[s, twin[s]] for s in range(2)])
        value = -q.mean(1) / q.abs().mean(1)
        cloning = (step.predicted - step.noise).square().mean((1, 2))
        near(policy.loss(batch, guidance, random)[0], (cloning + 2.0 * value).detach(), 1e-5)
        near(policy.loss(batch, None, random)[0], cloning.detach(), 1e-6)


def test_the_share_of_rows_that_are_labelled_better() -> None:
    """The quarter with the highest advantage of each member: all other rows have the same loss as with their label."""
    known: Any = KnownQ(lambda observations, actions: actions[..., 0] - 2.0)
    known.advantage = known.q  # never positive
    batch = noisy_data().sample(Again(SEEDS, "x"), 16)
    seen: list[Tensor] = []

    def losses(**settings: Any) -> Tensor:
        policy = make_policy(SEEDS, 3, 2, algorithm="cfg", label_dropout=0.0, **settings)
        predict = policy.predict
        policy.predict = lambda *given, labels: seen.append(labels) or predict(*given, labels=labels)  # type: ignore
        loss, metrics = policy.loss(batch, known, Again(SEEDS, "train"))
        assert torch.allclose(metrics["better"], (seen[-1] == 2).float().mean(1))
        return loss

    assert not torch.equal(losses(label_share=0.25), losses())
    first = batch.actions[..., 0]
    assert torch.equal(seen[0] == 2, first >= first.sort(1).values[:, 12:13]) and (seen[1] == 1).all()


@pytest.mark.parametrize(
    ("steps", "variance", "expected"), [(5, "posterior", 0.071), (5, "beta", 0.114), (50, "posterior", 0.167)]
)
def test_few_steps_narrow_a_policy(steps: int, variance: str, expected: float) -> None:
    """Samples of the exact denoiser of a Gaussian of deviation .2: which variance, and how many steps."""
    diffusion = models.Diffusion(make_schedule("vp", steps), "cpu", variance)

    def exact(x: Tensor, t: int) -> Tensor:
        return x * diffusion.noise[t] / (diffusion.signal[t] ** 2 * 0.2**2 + diffusion.noise[t] ** 2)

    noises = torch.randn(1, steps, 40_000, 1, generator=torch.Generator().manual_seed(0))
    assert float(models.SAMPLERS["ddpm"].run(diffusion, exact, noises, steps).std()) == pytest.approx(
        expected, abs=2e-3
    )


def test_the_variance_follows_from_the_algorithm() -> None:
    """As IDQL samples; where it is only filled in, it was not set."""
    for algorithm, expected in (("idql", "beta"), ("bc", "posterior")):
        run = models.check_algorithms(make_experiment(policy={"algorithm": algorithm, "sampler": "dpm-solver++"}))
        assert run.policy.variance == expected and not models.unread_fields(run, "policy")
    assert (
        models.check_algorithms(make_experiment(policy={"algorithm": "idql", "variance": "posterior"})).policy.variance
        == "posterior"
    )


def test_dac_loss_by_hand() -> None:
    """The target noise is lower where a higher action is better, here by differences of the critic in float64."""
    guidance, batch = make_guidance(SEEDS, 3, 2), noisy_data().sample(Again(SEEDS, "x"), 16)
    with torch.no_grad():
        guidance.target_q.vector.mul_(2.0)
    policy, random = make_policy(SEEDS, 3, 2, algorithm="dac", eta=2.0), Again(SEEDS, "train")
    step, twin = policy.predict(batch, random), random.integers("twin", 2)
    alpha_bar = torch.cumprod(1 - make_schedule("vp", 5), 0)[step.t][..., None]
    noisy = alpha_bar.sqrt() * batch.actions + (1 - alpha_bar).sqrt() * step.noise
    exact = copy.deepcopy(guidance).double()

    def q(actions: Tensor) -> Tensor:
        both = exact.twins(exact.target_q, batch.observations.double(), actions)
        return torch.stack([both[s, twin[s]] for s in range(2)])

    with torch.no_grad():
        shifts = 1e-6 * torch.eye(2, dtype=DOUBLE)
        gradient = torch.stack([(q(noisy + shift) - q(noisy - shift)) / 2e-6 for shift in shifts], dim=-1)
        size = exact.twins(exact.target_q, batch.observations.double(), batch.actions.double()).amin(1).abs().mean(1)
        target = step.noise - 2.0 * (1 - alpha_bar).sqrt() * gradient / size[:, None, None]
        expected = (step.predicted - target).square().mean((1, 2))
        mean_q = q(noisy).mean(1)
    loss, metrics = policy.loss(batch, guidance, random)
    near(loss.detach().double(), expected, 1e-5)
    near(metrics["policy_q"].double(), mean_q, 1e-5)
    assert (expected - noise_error(step)).abs().min() > 1e-2
    near(policy.loss(batch, None, random)[0].detach(), noise_error(step))


class Lines(models.Stack):
    """Stands in for a denoiser: slope * x + offset, a pair for each member and diffusion step, (S, T, 2)."""

    def __init__(self, pairs: Tensor) -> None:
        super().__init__()
        self.pairs = nn.Parameter(pairs)
        self.pack()

    def condition(self, observations: Tensor, labels: Tensor | None = None) -> Tensor:
        return observations

    def times(self) -> Tensor:
        return self.pairs

    def forward(self, actions: Tensor, time: Tensor, condition: Tensor, random: Randomness | None = None) -> Tensor:
        return time[..., :1] * actions + time[..., 1:]


def test_weighted_cloning_and_labels_reach_the_loss() -> None:
    guidance = make_guidance((0, 1), 3, 2)
    data = noisy_data()
    batch = data.sample(Again((0, 1), "x"), 32)
    advantage = guidance.advantage(batch.observations, batch.actions)
    assert 0 < (advantage > 0).float().mean() < 1
    random = Again((0, 1), "train")

    policy = make_policy((0, 1), 3, 2, algorithm="bc", advantage_weight="expectile", advantage_expectile=0.9)
    step = policy.predict(batch, random)
    weight = torch.where(advantage > 0, 0.9, 0.1)
    expected = (weight[..., None] * (step.predicted - step.noise) ** 2).mean((1, 2))
    near(policy.loss(batch, guidance, random)[0], expected.detach(), 1e-5)

    for dropout in (0.0, 1.0, 0.5):
        policy = make_policy((0, 1), 3, 2, algorithm="cfg", label_dropout=dropout)
        kept = random.uniform("label", 32) >= dropout
        labels = torch.where(kept, torch.where(advantage > 0, 2, 1), 0)
        step = policy.predict(batch, random, labels)
        expected = ((step.predicted - step.noise) ** 2).mean((1, 2)).detach()
        near(policy.loss(batch, guidance, random)[0], expected)
        if dropout < 1:
            assert (policy.loss(batch, None, random)[0] - expected).abs().min() > 1e-6
    near(policy.loss(batch, None, random)[0], noise_error(policy.predict(batch, random, 0 * labels)))


def noise_error(step: models.Prediction) -> Tensor:
    return ((step.predicted - step.noise) ** 2).mean((1, 2)).detach()


# ------------------------------------------------------------------------------------------------ randomness


DRAWS: dict[str, Callable[[Randomness], Tensor]] = {
    "normal": lambda random: random.normal("a", 4, 2),
    "uniform": lambda random: random.uniform("b", 5),
    "integers": lambda random: random.integers("c", 1000, 3),
    "scalar": lambda random: random.integers("d", 1_000_000),
    "large": lambda random: random.normal("e", 40_000),  # blocks of fewer steps
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_depend_on_seed_purpose_name_and_step_alone(draw: Callable[[Randomness], Tensor]) -> None:
    three, alone = Randomness([5, 6, 7], "p"), Randomness([7], "p")
    in_order = []
    for step in range(70):
        three.step = alone.step = step
        drawn = draw(three)
        three.normal("other", 3)  # of no effect on what follows
        assert torch.equal(drawn[2:], draw(alone))
        with pytest.raises(RuntimeError, match="is drawn twice"):
            draw(three)
        in_order.append(drawn)
    assert not torch.equal(in_order[0][0], in_order[0][1])
    assert len({tuple(drawn.flatten().tolist()) for drawn in in_order}) == 70
    for step in (69, 13, 64, 26, 63, 0):  # a resumed run jumps
        jumped = Randomness([5, 6, 7], "p")
        jumped.step = step
        assert torch.equal(draw(jumped), in_order[step])
    assert not torch.equal(draw(Randomness([5, 6, 7], "q")), in_order[0])


def test_names_differ_and_values_have_their_distribution() -> None:
    random = Randomness([5], "p")
    assert not torch.equal(random.normal("a", 8), random.normal("b", 8))
    normal, uniform, integers = random.normal("x", 40_000), random.uniform("y", 40_000), random.integers("z", 3, 40_000)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    shares = torch.bincount(integers[0], minlength=3) / 40_000
    assert len(shares) == 3 and (shares - 1 / 3).abs().max() < 0.01


def test_transitions_give_whole_rows_and_each_member_its_own() -> None:
    data = noisy_data()
    batch = data.take(torch.tensor([[5, 0], [199, 5]]))
    assert batch.observations.shape == (2, 2, 3) and batch.actions.shape == (2, 2, 2)
    for s, b, row in ((0, 0, 5), (0, 1, 0), (1, 0, 199), (1, 1, 5)):
        fields = [batch.observations, batch.actions, batch.rewards, batch.next_observations, batch.terminals]
        got = torch.cat([part[s, b].flatten() for part in fields])
        assert torch.equal(got, data.rows[row])
    many, alone = Again([5, 6, 7], "train"), Again([7], "train")
    assert torch.equal(data.sample(many, 32).actions[2], data.sample(alone, 32).actions[0])
    assert not torch.equal(data.sample(many, 32).actions[2], data.sample(many, 32).actions[1])


FOLLOWING = {
    "observations": np.arange(8.0)[:, None],
    "actions": np.arange(8.0)[:, None] / 10,
    "rewards": np.array([1.0, 2, 3, 4, 5, 6, 7, 8]),
    "terminals": np.array([0, 0, 1, 0, 0, 0, 0, 0], bool),
    "timeouts": np.array([0, 0, 0, 0, 0, 1, 0, 0], bool),
}  # episodes of rows 0 to 2 (terminal), 3 to 5 (time limit), 6 and 7 (the end of the file)


def follow(keep: bool, storage: str) -> Transitions:
    """These rows as transitions; keep: rows at time limits, too, since the file has next_observations."""
    columns = FOLLOWING | ({"next_observations": FOLLOWING["observations"] + 0.5} if keep else {})
    section = DataSection(source="arrays", held_out=0.0, reward_scale="none", storage=storage)  # type: ignore[arg-type]
    return Transitions(data.load_dataset(section, arrays=columns), "cpu")


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_what_follows_in_an_episode_by_hand(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "BLOCK", 3)  # rows read at a time
    g, nan = 0.9, math.nan
    tables = {  # per row: next action, return, steps to the end, next observation there
        True: (
            [0.1, 0.2, nan, 0.4, 0.5, nan, 0.7, nan],
            [1 + g * (2 + g * 3), 2 + g * 3, 3, 4 + g * (5 + g * 6), 5 + g * 6, 6, 7 + g * 8, 8],
            [3, 2, 1, 3, 2, 1, 2, 1],
            [2.5, 2.5, 2.5, 5.5, 5.5, 5.5, 7.5, 7.5],
        ),
        False: (  # rows 5 and 7 are no transitions, their actions are known
            [0.1, 0.2, nan, 0.4, 0.5, 0.7],
            [1 + g * (2 + g * 3), 2 + g * 3, 3, 4 + g * 5, 5, 7],
            [3, 2, 1, 2, 1, 1],
            [3, 3, 3, 5, 5, 7],
        ),
    }
    for keep, (actions, returns, steps, ends) in tables.items():
        source = follow(keep, storage)
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
        batch = source.take(torch.stack([torch.arange(len(source)), order]))
        got, exists = batch.next_actions()
        expected = torch.tensor(actions)[batch.rows][..., None]
        assert torch.equal(exists, ~expected.isnan()[..., 0]) and len(actions) == len(source)
        near(got, expected.nan_to_num())
        found, count, last = batch.returns(g)
        near(found, torch.tensor(returns)[batch.rows])
        assert torch.equal(count, torch.tensor(steps)[batch.rows])
        near(last.next_observations[..., 0], torch.tensor(ends)[batch.rows])
        assert torch.equal(last.terminals > 0, (batch.rows < 3))


@pytest.mark.parametrize("keep", [True, False])
def test_sarsa_and_monte_carlo_losses_by_hand(keep: bool) -> None:
    source, g = follow(keep, "memory"), 0.9
    batch = source.take(torch.arange(len(source))[None])
    guidances = {name: make_guidance((4,), algorithm=name, discount=g) for name in ("sarsa", "mc")}
    for guidance in guidances.values():
        with torch.no_grad():
            guidance.target_q.vector.mul_(-3.0)  # so that targets and online critics differ
            v = lambda state: float(guidance.v(torch.full((1, 1, 1), state))[0, 0])  # noqa: B023
            q = lambda state, action: float(
                guidance.q(torch.full((1, 1, 1), state), torch.full((1, 1, 1), action))[0, 0]  # noqa: B023
            )
            targets = []
            for row in range(len(source)) if keep else (0, 1, 2, 3, 4, 6):
                shift = 0.5 if keep else 1.0
                follows = {2: None, 5: None, 7: None} if keep else {2: None}
                stop = (2, 5, 7) if keep else (2, 4, 6)
                last = next(end for end in stop if row <= end)
                if guidance.section.algorithm == "sarsa":
                    next_v = v(row + shift) if row in follows else q(row + shift, (row + 1) / 10)
                    targets.append(row + 1 + g * (row != 2) * next_v)
                else:
                    rewards = sum(g ** (k - row) * (k + 1) for k in range(row, last + 1))
                    targets.append(rewards + g ** (last + 1 - row) * (last != 2) * v(last + shift))
            online = guidance.twins(guidance.online_q, batch.observations, batch.actions)[0]
            target = torch.tensor(targets)
            expected = (online - target).square().mean(-1).sum()
            data_q, values = guidance.q(batch.observations, batch.actions), guidance.v(batch.observations)
            expected = expected + 0.5 * (data_q - values).square().mean()
        loss, metrics = guidance.loss(batch, Randomness((4,), "train"))
        near(loss.detach(), [float(expected)], 1e-4)
        assert metrics.keys() == {"q", "q_loss", "v", "v_loss"}


# -------------------------------------------------------------------------------------------------- networks


def perceptron(network: ValueNetwork, row: int, x: Tensor) -> Tensor:
    for i, layer in enumerate(network.layers):
        x = x @ layer.weight[row] + layer.bias[row, 0]
        if len(network.norms) > i:
            norm = network.norms[i]
            x = functional.layer_norm(x, x.shape[1:], norm.scale[row, 0], norm.shift[row, 0])
        if i < len(network.layers) - 1:
            known = {torch.relu: torch.relu, torch.tanh: torch.tanh, models.mish: functional.mish}
            x = known[network.activations[i]](x)  # type: ignore[index]
    return x[:, 0]


@pytest.mark.parametrize("layer_norm", [False, True, "tanh"])
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_value_network_is_its_members_side_by_side(activation: str, layer_norm: bool | str) -> None:
    network = ValueNetwork(Randomness([5, 6, 7], "init"), "v", 4, [8, 6], activation, layer_norm).double()
    assert len(network.norms) == {False: 0, True: 2, "tanh": 1}[layer_norm]
    assert (network.activations[0] is torch.tanh) == (layer_norm == "tanh") and network.activations[1] is not torch.tanh
    x = torch.randn(3, 5, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = network(x)
        near(got, torch.stack([perceptron(network, s, x[s]) for s in range(3)]), 1e-12)
    alone = ValueNetwork(Randomness([6], "init"), "v", 4, [8, 6], activation, layer_norm)
    assert torch.equal(alone.vector[0], network.vector[1])


@pytest.mark.parametrize("layer_norm", [False, True])
def test_twins_are_two_separate_networks(layer_norm: bool) -> None:
    guidance = make_guidance((0, 1, 2), 3, 2, layer_norm=layer_norm)
    with torch.no_grad():
        for norm in [*guidance.online_q.norms, *guidance.value.norms]:  # fresh ones would all be alike
            norm.scale.copy_(torch.rand(norm.scale.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
            norm.shift.copy_(torch.randn(norm.shift.shape, generator=torch.Generator().manual_seed(2)))
    guidance.normalizer = Normalizer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0]))
    with torch.no_grad():
        guidance.target_q.vector.mul_(1.5)
    guidance.double()
    g = torch.Generator().manual_seed(0)
    observations, actions = torch.randn(3, 4, 3, generator=g).double(), torch.rand(3, 4, 2, generator=g).double()
    inputs = torch.cat([(observations - torch.tensor([1, 2, 3])) / torch.tensor([0.5, 1, 2]), actions], dim=-1)
    with torch.no_grad():
        for network in (guidance.online_q, guidance.target_q):
            rows = [[perceptron(network, 2 * s + k, inputs[s]) for k in (0, 1)] for s in range(3)]
            expected = torch.stack([torch.stack(pair) for pair in rows])  # (S, 2, B)
            near(guidance.twins(network, observations, actions), expected, 1e-12)
        least = expected.min(1).values
        near(guidance.q(observations, actions), least, 1e-12)
        twin = torch.tensor([1, 0, 1])
        chosen = torch.stack([expected[s, twin[s]] for s in range(3)])
        near(guidance.one_q(observations, actions, twin), chosen, 1e-12)
        v = torch.stack([perceptron(guidance.value, s, inputs[s, :, :3]) for s in range(3)])
        near(guidance.v(observations), v, 1e-12)
        near(guidance.advantage(observations, actions), least - v, 1e-12)
    assert not torch.equal(guidance.online_q.vector[0], guidance.online_q.vector[1])


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("network", ["mlp", "resnet"])
def test_denoiser_is_its_members_with_one_concatenated_first_layer(network: str, labels: bool) -> None:
    random = Randomness([5, 6, 7], "init")
    section = PolicySection(network=network, hidden=[8, 8], diffusion_steps=7, dropout=0.25, time_features=6)
    denoiser = Denoiser(random, section, 3, 2, labels)
    for name, parameter in denoiser.named_parameters():
        if "scale" in name or "shift" in name:
            parameter.data += 0.1 * random.normal(name, *parameter.shape[1:])  # so that they matter
    exact: Any = copy.deepcopy(denoiser).double()
    g = torch.Generator().manual_seed(0)
    observations, actions = torch.randn(3, 5, 3, generator=g), torch.randn(3, 5, 2, generator=g)
    t, label = torch.tensor([0, 6, 3, 3, 1]), torch.tensor([0, 1, 2, 2, 1])
    dropout = Again([5, 6, 7], "train")

    def plain(s: int, kept: Callable[[str], Tensor] | None) -> Tensor:
        def weight(layer: Any) -> tuple[Tensor, Tensor]:
            return layer.weight[s], layer.bias[s, 0]

        def affine(x: Tensor, *layers: Any) -> Tensor:
            matrix = torch.cat([weight(layer)[0] for layer in layers])
            return x @ matrix + sum(weight(layer)[1] for layer in layers)

        frequencies = [10_000 ** (-i / 2) for i in range(3)]
        rows = [[math.sin(n * f) for f in frequencies] + [math.cos(n * f) for f in frequencies] for n in t.tolist()]
        time = functional.mish(affine(torch.tensor(rows, dtype=DOUBLE), exact.time_in))
        time = affine(time, exact.time_out)
        parts, layers = (
            [actions[s].double(), time, observations[s].double()],
            [exact.action, exact.time, exact.observation],
        )
        if labels:
            parts, layers = [*parts, torch.eye(3, dtype=DOUBLE)[label]], [*layers, exact.label]
        x = affine(torch.cat(parts, dim=1), *layers)
        if network == "mlp":
            x = functional.mish(x)
            for layer in exact.trunk.layers:
                x = functional.mish(affine(x, layer))
            return affine(x, exact.out)
        for block in exact.trunk.blocks:
            y = x if kept is None else x * kept(block.name)[s] / 0.75
            deviation = (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            y = (y - y.mean(1, keepdim=True)) / deviation * block.norm.scale[s] + block.norm.shift[s]
            x = x + affine(functional.mish(affine(y, block.widen)), block.narrow)
        return affine(functional.mish(x), exact.out)

    with torch.no_grad():
        condition = denoiser.condition(observations, label.expand(3, 5) if labels else None)
        got = denoiser(actions, denoiser.times()[:, t], condition)
        near(got.double(), torch.stack([plain(s, None) for s in range(3)]), 3e-6)
        trained = denoiser(actions, denoiser.times()[:, t], condition, dropout)
        if network == "resnet":
            masks = lambda name: dropout.uniform(f"{name}.dropout", 5, 8) >= 0.25
            near(trained.double(), torch.stack([plain(s, masks) for s in range(3)]), 3e-6)
            assert (trained - got).abs().max() > 1e-3
        else:
            assert torch.equal(trained, got)


def test_initial_weights_are_uniform_within_the_fan_in() -> None:
    layer = Linear(Randomness([5, 6], "init"), "x", 25, 100, copies=2, fan_in=100)
    for values in (layer.weight, layer.bias):
        assert values.shape[0] == 4
        assert 0.09 < values.max() <= 0.1 and -0.1 <= values.min() < -0.09
    assert abs(layer.weight.mean()) < 0.002 and abs(layer.weight.std() - 0.1 / math.sqrt(3)) < 0.001
    with torch.no_grad():
        x = torch.randn(4, 3, 25, generator=torch.Generator().manual_seed(0))
        near(layer(x), torch.stack([x[k] @ layer.weight[k] + layer.bias[k] for k in range(4)]), 1e-5)
        near(
            layer(x[:2], torch.tensor([3, 0])),
            torch.stack([layer(x[:1].expand(4, 3, 25))[3], layer(x[1:2].expand(4, 3, 25))[0]]),
            1e-6,
        )


def every_network() -> list[models.Stack]:
    random = Randomness([5, 6, 7], "init")
    policies = [make_policy((5, 6, 7), 3, 2, algorithm=name).denoiser for name in POLICIES]
    values = [ValueNetwork(random, "v", 4, [8], "relu", True), ValueNetwork(random, "q", 4, [8], "relu", True, 2)]
    return [*values, *policies]


def test_parameters_are_views_of_one_vector() -> None:
    for network in every_network():
        assert network.members == 3
        rows, size = len(network.vector), network.size
        assert rows * size == sum(p.numel() for p in network.parameters()) and network.vector.shape[1] % 16 == 0
        flat = torch.cat([p.detach().flatten(1) for p in network.parameters()], dim=1)
        assert torch.equal(flat, network.vector[:, :size]) and not network.vector[:, size:].any()
        with torch.no_grad():
            network.vector.copy_(torch.arange(network.vector.numel()).view_as(network.vector))
        flat = torch.cat([p.detach().flatten(1) for p in network.parameters()], dim=1)
        assert torch.equal(flat, network.vector[:, :size])
        network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
        assert network.vector[0, 0] == 1


def test_guidance_and_policy_follow_at_their_rates() -> None:
    guidance = make_guidance(tau=0.25)
    policy = make_policy(ema_decay=0.9)
    for network in (guidance.online_q, policy.denoiser):
        network.vector.fill_(2.0)
    for network in (guidance.target_q, policy.average):
        network.vector.fill_(1.0)
    guidance.follow(0)
    near(guidance.target_q.vector, torch.full_like(guidance.target_q.vector, 0.75 * 1 + 0.25 * 2))
    for step, decay in ((0, 0.1), (10, 11 / 20), (1000, 0.9)):
        policy.average.vector.fill_(1.0)
        policy.follow(step)
        near(policy.average.vector, torch.full_like(policy.average.vector, decay * 1 + (1 - decay) * 2))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_mish_is_torchs_in_value_and_gradient(dtype: torch.dtype) -> None:
    points = [0.0, 1e-8, 0.5, 1.0, 3.0, 10.0, 19.9, 20.1, 30.0, 88.0, 100.0, 1e4]
    grid = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor(points), -torch.tensor(points)])
    x = grid.to(dtype).requires_grad_()
    exact = grid.to(dtype).double().requires_grad_()
    value, expected = models.mish(x), functional.mish(exact)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    (gradient,) = torch.autograd.grad((value * 2).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * 2).sum(), exact)
    near(value.detach().double(), expected.detach(), tolerance)
    near(gradient.double(), expected_gradient, 2 * tolerance)
    with torch.no_grad():
        plain = models.mish(x).double()
    tiny = torch.finfo(dtype).tiny  # gradual underflow
    for found in (plain, value.detach().double()):  # no digit is lost where x is far below 0
        assert ((found - expected).abs() <= tolerance / 4 * expected.abs() + tiny).all()
    assert ACTIVATIONS["mish"] is models.mish


@pytest.fixture
def fresh_products() -> Iterator[None]:
    """Decide anew what multiplies matrices, and leave it to torch afterwards."""
    kinds = (models._onednn_is_exact, models._is_amd)
    for kind in kinds:
        kind.cache_clear()
    yield
    for kind in kinds:
        kind.cache_clear()
    models.choose_products("default")


@pytest.mark.usefixtures("fresh_products")
def test_onednn_multiplies_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    class Switch:
        fp32_precision = "none"

    exact, switch = torch.bmm, Switch()
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", switch, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for vendor, chosen in (("AuthenticAMD", "oneDNN"), ("GenuineIntel", "default")):
        monkeypatch.setattr(Path, "read_text", lambda *args, vendor=vendor, **kwargs: f"vendor_id : {vendor}")
        models._is_amd.cache_clear()
        for wanted in (None, "default", "oneDNN"):  # a run that goes on takes what it was begun with
            assert models.choose_products(wanted) == (wanted or chosen)
            assert switch.fp32_precision == ("bf16" if (wanted or chosen) == "oneDNN" else "none")

    def rounding(first: Tensor, second: Tensor) -> Tensor:
        return exact(first.bfloat16(), second.bfloat16()).float() if switch.fp32_precision == "bf16" else first

    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "vendor_id : AuthenticAMD")
    for change in (
        lambda: monkeypatch.setattr(torch, "bmm", rounding),  # a processor with units for bfloat16
        lambda: monkeypatch.delattr(torch.backends.mkldnn, "matmul"),  # an older torch
    ):
        change()
        switch.fp32_precision = "none"
        models._onednn_is_exact.cache_clear()
        models._is_amd.cache_clear()
        assert [models.choose_products(wanted) for wanted in (None, "oneDNN")] == ["default"] * 2
        assert switch.fp32_precision == "none"


# ------------------------------------------------------------------------------------------------- diffusion


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_schedules_against_their_formulas(steps: int) -> None:
    vp, cosine, linear = (make_schedule(name, steps) for name in ("vp", "cosine", "linear"))
    assert vp.dtype == cosine.dtype == linear.dtype == DOUBLE
    for i, t in enumerate(range(1, steps + 1)):
        assert abs(float(vp[i]) - (1 - math.exp(-0.1 / steps - 9.9 * (2 * t - 1) / (2 * steps**2)))) < 1e-14
        level = [math.cos((n / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for n in (t - 1, t)]
        assert abs(float(cosine[i]) - min(0.999, 1 - level[1] / level[0])) < 1e-12
    levels = make_schedule("cosine-levels", steps)
    for i in range(steps):
        time = min(max(i / max(1, steps - 1), 1e-3), 0.9946)
        signal = math.cos((time + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        assert abs(float(torch.prod(1 - levels[: i + 1]).sqrt()) - signal) < 1e-9
    # what is left of the signal after the last step: the integral of b(t) from 0.1 to 10 is 5.05
    assert abs(float(torch.log(1 - vp).sum()) + 5.05) < 1e-12
    assert abs(float(linear[0]) - 0.1 / steps) < 1e-12
    if steps > 20:
        assert abs(float(linear[-1]) - 20 / steps) < 1e-12


def test_diffuse_is_the_chain_of_small_steps_and_clean_undoes_it() -> None:
    betas = make_schedule("vp", 5)
    diffusion = Diffusion(betas, "cpu")
    actions, noise = torch.tensor([[[0.3], [-0.8], [1.0], [0.0], [0.5]]]), torch.ones(1, 5, 1)
    t = torch.arange(5)[None]
    mean, variance = actions[0, :, 0].double(), 0.0
    noisy = diffusion.diffuse(actions, noise, t)
    for step, beta in enumerate(betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        near(noisy[0, step, 0], mean[step] + math.sqrt(variance), 1e-6)
    near(diffusion.clean(noisy, noise, t), actions, 1e-5)
    for step in range(5):
        near(diffusion.clean(noisy[:, step : step + 1], noise[:, :1], step), actions[:, step : step + 1], 1e-5)
    out = torch.tensor([[[9.0], [-9.0]]])
    assert diffusion.clean(out, 0 * out, 3).flatten().tolist() == [1.0, -1.0]
    assert diffusion.clean(out, 0 * out, torch.tensor([[3, 3]])).flatten().tolist() == [1.0, -1.0]


def some_denoiser(x: Tensor, t: int) -> Tensor:
    return torch.sin(3 * x) + 0.3 * x + 0.1 * t


@pytest.mark.parametrize(("name", "steps"), [("vp", 5), ("vp", 1), ("vp", 50), ("cosine", 10), ("linear", 30)])
def test_reverse_against_the_definitions(name: str, steps: int) -> None:
    """Bayes' rule: the posterior of x_(t-1) given x_t and x_0, from the prior q(x_(t-1) | x_0) and q(x_t | x_(t-1))."""
    betas = make_schedule(name, steps)
    noises = torch.randn(2, steps, 40, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    x, clipped = noises[:, 0], False
    for t in reversed(range(steps)):
        beta = float(betas[t])
        alpha_bar, before = float((1 - betas[: t + 1]).prod()), float((1 - betas[:t]).prod())
        estimate = (x - math.sqrt(1 - alpha_bar) * some_denoiser(x, t)) / math.sqrt(alpha_bar)
        clipped = clipped or bool((estimate.abs() > 1).any())
        estimate = estimate.clamp(-1, 1)
        if t == 0:
            x = estimate
            break
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (math.sqrt(before) * estimate / (1 - before) + math.sqrt(1 - beta) * x / beta) / precision
        x = mean + noises[:, steps - t] / math.sqrt(precision)
    near(Diffusion(betas, "cpu").reverse(some_denoiser, noises), x, 1e-9)
    assert clipped and x.abs().max() <= 1


@pytest.mark.parametrize("steps", [5, 50])
def test_reverse_against_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.schedulers import scheduling_ddpm

    betas = make_schedule("vp", steps)
    scheduler = scheduling_ddpm.DDPMScheduler(
        num_train_timesteps=steps,
        trained_betas=betas.tolist(),
        clip_sample=True,
        variance_type="fixed_small",
        prediction_type="epsilon",
    )
    scheduler.betas, scheduler.alphas, scheduler.one = betas, 1 - betas, torch.tensor(1.0, dtype=DOUBLE)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # it keeps them in float32
    noises = torch.randn(1, steps, 40, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    x, seen = noises[:, 0], []
    for i, t in enumerate(scheduler.timesteps.tolist(), start=1):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: noises[:, i])
        seen.append(x)
        x = scheduler.step(some_denoiser(x, t), t, x).prev_sample
    ours: list[Tensor] = []
    got = Diffusion(betas, "cpu").reverse(lambda x, t: ours.append(x) or some_denoiser(x, t), noises)
    for mine, theirs in zip(ours, seen, strict=True):
        near(mine, theirs, 1e-10)
    near(got, x, 1e-10)


def test_reverse_of_an_exact_score_gives_the_distribution() -> None:
    """Ancestral sampling in many steps with the exact noise of a Gaussian ends in that Gaussian."""
    diffusion = Diffusion(make_schedule("vp", 1000), "cpu")
    noises = torch.randn(1, 1000, 5000, 1, generator=torch.Generator().manual_seed(0))
    x = diffusion.reverse(gaussian_denoiser(diffusion, 0.3, 0.1), noises)
    assert abs(x.mean() - 0.3) < 0.006 and abs(x.std() - 0.1) < 0.006


def gaussian_denoiser(diffusion: Diffusion, mean: float, deviation: float) -> models.Denoise:
    """The expected noise in x_t where clean actions are Gaussian."""

    def denoise(x: Tensor, t: int) -> Tensor:
        signal, noise = diffusion.signal[t], diffusion.noise[t]
        return noise * (x - signal * mean) / (signal**2 * deviation**2 + noise**2)

    return denoise


def solver_grid(diffusion_steps: int, steps: int, schedule: str = "vp") -> list[int]:
    seen: list[int] = []
    diffusion = Diffusion(make_schedule(schedule, diffusion_steps), "cpu")
    diffusion.solve(lambda x, t: seen.append(t) or x, torch.randn(1, 1, 2, 1), steps)
    return seen


@pytest.mark.parametrize("diffusion_steps", [1, 2, 3, 4, 5, 10, 20, 23, 50])
def test_solver_calls_the_network_at_falling_steps(diffusion_steps: int) -> None:
    for steps in range(1, diffusion_steps + 1):
        grid = solver_grid(diffusion_steps, steps)
        assert len(grid) == steps and grid[0] == diffusion_steps - 1 and grid[-1] >= 0, (diffusion_steps, steps)
        assert all(a > b for a, b in pairwise(grid)), (diffusion_steps, steps, grid)


def test_solver_goes_evenly_through_the_log_signal_to_noise_ratio_of_many_steps() -> None:
    diffusion, grid = Diffusion(make_schedule("linear", 1000), "cpu"), solver_grid(1000, 10, "linear")
    ratios = [math.log(diffusion.signal[t] / diffusion.noise[t]) for t in grid]
    steps = np.diff(ratios)
    assert (grid[0], grid[-1]) == (999, 0) and np.abs(steps / steps.mean() - 1).max() < 0.1


def test_solver_against_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    betas = make_schedule("vp", 50)
    diffusion = Diffusion(betas, "cpu")
    denoise = gaussian_denoiser(diffusion, 0.2, 0.1)
    noises = torch.randn(2, 1, 40, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(2)).clamp(-2, 2)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=50,
        trained_betas=betas.tolist(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    for steps in (15, 16, 8, 2, 1):
        scheduler.set_timesteps(timesteps=solver_grid(50, steps))
        x = noises[:, 0]
        for t in scheduler.timesteps.tolist():
            estimate = (x - diffusion.noise[t] * denoise(x, t)) / diffusion.signal[t]
            assert estimate.abs().max() < 1  # so that clipping plays no part
            x = scheduler.step(denoise(x, t), t, x).prev_sample
        near(diffusion.solve(denoise, noises, steps), x, 2e-5)


def test_solver_converges_to_the_exact_flow() -> None:
    """The probability flow of a Gaussian keeps each point's quantile; more steps come closer to it."""
    diffusion = Diffusion(make_schedule("vp", 50), "cpu")
    deviation = 0.3
    noises = torch.linspace(-2, 2, 101, dtype=DOUBLE).view(1, 1, -1, 1)
    exact = deviation * noises[:, 0] / math.sqrt(diffusion.signal[-1] ** 2 * deviation**2 + diffusion.noise[-1] ** 2)
    denoise, errors = gaussian_denoiser(diffusion, 0.0, deviation), []
    for steps in (2, 3, 5, 10, 40):
        errors.append(float((diffusion.solve(denoise, noises, steps) - exact).abs().max()))
    assert all(after < 0.9 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.05, errors


# --------------------------------------------------------------------------------------- the closed-form problem


def reward(action: Tensor) -> Tensor:
    return 1 - (action - 0.5) ** 2


@pytest.fixture(scope="module")
def mixture() -> Transitions:
    n = 10_000
    modes = torch.where(torch.arange(n) < 0.7 * n, -0.5, 0.5)
    actions = modes + 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    return one_state(actions, reward(actions))


@pytest.fixture(scope="module")
def trained_idql(mixture: Transitions) -> Guidance:
    guidance = make_guidance(SEEDS, steps=250, batch_size=64, activation="mish", tau=0.08, learning_rate=1e-2)
    train(guidance, mixture, SEEDS)
    return guidance.requires_grad_(False)


def trained(data: Transitions, guidance: Any, **settings: Any) -> Policy:
    policy = make_policy(SEEDS, **({"ema_decay": 0.99} | settings))
    train(policy, data, SEEDS, guidance)
    return policy


@pytest.fixture(scope="module")
def trained_bc(mixture: Transitions) -> Policy:
    """50 diffusion steps: with 5 the two modes blur into each other and the weights come out near 0.8 and 0.2."""
    settings = {"algorithm": "bc", "diffusion_steps": 50, "ema_decay": 0.995}
    return trained(mixture, None, steps=3000, learning_rate=1e-2, **settings)


@pytest.fixture(scope="module")
def trained_cfg(mixture: Transitions, trained_idql: Guidance) -> Policy:
    settings = {"algorithm": "cfg", "diffusion_steps": 20, "label_dropout": 0.3, "ema_decay": 0.995}
    return trained(mixture, trained_idql, steps=2500, learning_rate=1e-2, **settings)


def actions_of(policy: Policy, guidance: Any = None, n: int = 8000, **how: Any) -> Tensor:
    """n actions of each member, (S, n)."""
    return choose(policy, guidance, torch.zeros(policy.members, n, 1), **how)[..., 0]


def never_falls(means: Sequence[Tensor], tolerance: float = 0.01) -> None:
    """Each setting's mean reward, (S,), is no lower than the one before it; the last is clearly above the first."""
    assert all((after >= before - tolerance).all() for before, after in pairwise(means)), means
    assert (means[-1] > means[0] + 0.1).all(), means


@pytest.mark.parametrize("algorithm", GUIDANCES)
def test_guidance_learns_the_true_q(algorithm: str, mixture: Transitions, trained_idql: Guidance) -> None:
    guidance, close = trained_idql, (0.03, 0.15)
    if algorithm != "idql":
        close = (0.1, 0.3)
        settings = {"steps": 100, "batch_size": 64, "learning_rate": 1e-2, "activation": "mish", "tau": 0.1}
        guidance = make_guidance(SEEDS, algorithm=algorithm, **settings)
        train(guidance, mixture, SEEDS)
    batch = mixture.take(torch.arange(len(mixture)).expand(2, -1))
    with torch.no_grad():
        error = (guidance.q(batch.observations, batch.actions) - batch.rewards[..., 0]).abs()
        modes = torch.tensor([-0.5, 0.5])[None, :, None].expand(2, 2, 1)
        q = guidance.q(torch.zeros(2, 2, 1), modes)
        advantage = guidance.advantage(torch.zeros(2, 2, 1), modes)
        v = guidance.v(torch.zeros(2, 1, 1))
    assert (error.mean(1) < close[0]).all() and (error.amax(1) < close[1]).all()
    near(q, [[0.0, 1.0]] * 2, 2 * close[0])
    assert (advantage[:, 0] < -0.1).all() and (advantage[:, 1] > 0.1).all()
    # expectile e of a two-point reward, 0 and 1 with weights 0.7 and 0.3: 0.3 e / (0.3 e + 0.7 (1 - e))
    near(v, [[0.5 if algorithm == "idql" else 0.3]] * 2, 2 * close[0])


@pytest.mark.parametrize("algorithm", ["sarsa", "mc"])
def test_values_of_a_chain_are_discounted_from_its_end(algorithm: str) -> None:
    """Six steps to a terminal that pays 1, one action: Q of step k is discount ** (5 - k)."""
    steps, count = np.tile(np.arange(6), 100), 600
    columns = {"observations": steps[:, None] / 5, "actions": np.zeros((count, 1)), "rewards": steps == 5}
    chain = transitions(columns | {"next_observations": (steps + 1)[:, None] / 5, "terminals": steps == 5})
    settings = {"steps": 150, "batch_size": 64, "learning_rate": 1e-2, "tau": 0.2, "discount": 0.8}
    guidance = make_guidance(SEEDS, algorithm=algorithm, **settings)
    train(guidance, chain, SEEDS)
    states = torch.arange(6).view(1, 6, 1).expand(2, 6, 1) / 5
    with torch.no_grad():
        for values in (guidance.q(states, torch.zeros(2, 6, 1)), guidance.v(states)):
            near(values, [[0.8 ** (5 - k) for k in range(6)]] * 2, 0.06)


@pytest.mark.slow
def test_bc_recovers_the_mode_weights(trained_bc: Policy) -> None:
    actions = actions_of(trained_bc)
    right = actions > 0
    assert ((right.float().mean(1) - 0.3).abs() < 0.05).all(), right.float().mean(1)
    for s in range(2):
        for chosen, mode in ((actions[s][right[s]], 0.5), (actions[s][~right[s]], -0.5)):
            assert abs(chosen.mean() - mode) < 0.03 and chosen.std() < 0.12


@pytest.mark.parametrize("algorithm", ["dql", "edp", "dac"])
def test_value_policies_move_to_the_better_mode(algorithm: str, mixture: Transitions, trained_idql: Guidance) -> None:
    policy = trained(mixture, trained_idql, algorithm=algorithm, steps=250, batch_size=64, learning_rate=6e-3, eta=1.0)
    actions = actions_of(policy)
    assert ((actions > 0).float().mean(1) > 0.6).all()  # of the data: 0.3
    assert (reward(actions).mean(1) > 0.7).all()  # of the data: 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "etas"), [("dql", (0.0, 0.5, 3.0)), ("edp", (0.0, 0.5, 3.0)), ("dac", (0.0, 0.1, 0.5))]
)
def test_more_eta_never_lowers_the_reward(algorithm: str, etas: Sequence[float], mixture: Transitions) -> None:
    """The slope that dac follows grows without end where noise takes the action, and a large eta overshoots."""
    known, means = KnownQ(lambda observations, actions: reward(actions[..., 0])), []
    for eta in etas:
        policy = trained(mixture, known, algorithm=algorithm, steps=300, batch_size=128, eta=eta)
        means.append(reward(actions_of(policy)).mean(1))
    never_falls(means)


@pytest.mark.slow
def test_cfg_without_weight_is_the_data_and_more_weight_never_lowers_the_reward(trained_cfg: Policy) -> None:
    unguided = actions_of(trained_cfg, w=0.0)
    assert (((unguided > 0).float().mean(1) - 0.3).abs() < 0.07).all(), (unguided > 0).float().mean(1)
    means = [reward(unguided).mean(1)] + [reward(actions_of(trained_cfg, w=w)).mean(1) for w in (0.25, 0.5, 1.0, 1.5)]
    never_falls(means)
    assert (means[-1] > 0.95).all()


def test_cfg_without_weight_is_the_unconditional_prediction() -> None:
    policy = make_policy(SEEDS, algorithm="cfg", diffusion_steps=20)
    network, random = policy.average, Again(SEEDS, "try")
    observations = torch.zeros(2, 7, 1)
    times = network.times()
    chains = {}
    with torch.no_grad():
        for label in (0, 2):
            shares = network.condition(observations, torch.full((2, 7), label))
            chain = lambda x, t: network(x, times[:, t : t + 1], shares)  # noqa: B023
            chains[label] = policy.denoise_all(chain, policy.noises(random, "act", 7))
    assert (chains[0] - chains[2]).abs().max() > 1e-2
    with torch.no_grad():
        for w, label, tolerance in ((0.0, 0, 0.0), (1.0, 2, 1e-4)):
            near(offers(policy, observations, w=w), chains[label], tolerance)
            near(policy.act_alone(observations, random, w=w), chains[label], tolerance)


def test_gradient_guidance_by_hand() -> None:
    """One diffusion step without noise: the action is moved by weight sqrt(1 - alpha_bar) dQ/da."""
    policy = make_policy(SEEDS, diffusion_steps=1)
    rising = KnownQ(lambda observations, actions: 2.0 * actions[..., 0])
    shift = 0.1 * math.sqrt(float(make_schedule("vp", 1)[0])) * 2.0
    policy.average.vector.mul_(0.01)  # predictions small enough for no clipping
    plain = actions_of(policy, rising, 3, temperature=0.0)
    assert plain.abs().max() + shift < 1
    near(actions_of(policy, rising, 3, temperature=0.0, guidance_weight=0.1), plain + shift, 1e-5)


class GaussianDenoiser(nn.Module):
    """The exact network for one state whose actions are Gaussian; the share of a diffusion step is its number."""

    def __init__(self, diffusion: Diffusion, mean: float, deviation: float) -> None:
        super().__init__()
        self.exact, self.steps = gaussian_denoiser(diffusion, mean, deviation), diffusion.steps

    def condition(self, observations: Tensor, labels: Tensor | None = None) -> Tensor:
        return observations

    def times(self) -> Tensor:
        return torch.arange(self.steps).view(1, -1, 1)

    def forward(self, actions: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.exact(actions, int(time))


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_gradient_with_jacobian_is_exact_for_gaussian_data_and_linear_q(steps: int) -> None:
    """Density times exp(w k a): the mean moves by w k s^2, whatever the number of steps."""
    policy, mean, deviation, slope, w = make_policy((0,), diffusion_steps=steps), 0.05, 0.1, 2.0, 5.0
    rising = KnownQ(lambda observations, actions: slope * actions[..., 0])
    observations, drawn = torch.zeros(1, 200, 1), []
    for center, steered in ((mean, w), (mean + w * slope * deviation**2, 0.0)):
        policy.average = GaussianDenoiser(policy.diffusion, center, deviation)  # type: ignore[assignment]
        noises = policy.noises(Randomness((0,), "try"), "act", 200)
        settings = {"guidance": rising, "guidance_weight": steered, "jacobian": True}
        drawn.append(policy.sample(observations, noises, **settings))
    near(drawn[0], drawn[1], 1e-4)
    assert drawn[0].abs().max() < 1


@pytest.mark.slow
def test_more_guidance_weight_never_lowers_the_reward(trained_bc: Policy, trained_idql: Guidance) -> None:
    weights = (0.0, 0.3, 1.0, 3.0)
    for guidance in (KnownQ(lambda observations, actions: reward(actions[..., 0])), trained_idql):
        means = [reward(actions_of(trained_bc, guidance, 2000, guidance_weight=w)).mean(1) for w in weights]
        never_falls(means, 0.02)


@pytest.mark.parametrize("candidates", [1, 4])
def test_no_guidance_weight_changes_nothing_to_the_bit(candidates: int, trained_idql: Guidance) -> None:
    policy, observations = make_policy(SEEDS, algorithm="cfg", diffusion_steps=20), torch.zeros(2, 6, 1)
    plain, steered, moved = (
        offers(policy, observations, candidates, **settings)
        for settings in (
            {},
            {"guidance": trained_idql, "guidance_weight": 0.0},
            {"guidance": trained_idql, "guidance_weight": 1.0},
        )
    )
    assert torch.equal(plain, steered) and not torch.equal(plain, moved)


def test_candidates_are_ranked_in_their_own_state() -> None:
    """Each state prefers another action, so mixing up states or candidates would show."""
    policy = make_policy((0, 1, 2), 3, 2)
    known = KnownQ(lambda observations, actions: -(actions - observations[..., :2]).square().sum(-1))
    g = torch.Generator().manual_seed(0)
    observations = torch.rand(3, 4, 3, generator=g) * 2 - 1
    options = offers(policy, observations, 6).view(3, 4, 6, 2)
    chosen = choose(policy, known, observations, candidates=6)
    for s in range(3):
        for e in range(4):
            distances = [float((option - observations[s, e, :2]).norm()) for option in options[s, e]]
            assert torch.equal(chosen[s, e], options[s, e, distances.index(min(distances))])
    scores = known.q(observations.repeat_interleave(6, 1), options.flatten(1, 2)).view(3, 4, 6)
    best = models.supported_scores(scores, options, 2.0).argmax(-1)
    assert not torch.equal(best, scores.argmax(-1))
    supported = choose(policy, known, observations, candidates=6, support=2.0)
    assert torch.equal(supported, options.gather(2, best[..., None, None].expand(-1, -1, 1, 2)).squeeze(2))


def test_support_counts_the_distance_to_the_median_against_q() -> None:
    """Candidates 0, 0, 0.2, 0.8 in one dimension, the other constant: median 0.1, squares .01 .01 .01 .49.

    Mean .13 and deviation .12 sqrt 3 = .2078: standardized -.577 three times, and sqrt 3.
    """
    actions = torch.tensor([0.0, 0.0, 0.2, 0.8])[:, None].mul(torch.tensor([1.0, 0.0])).view(1, 1, 4, 2)
    q = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])  # mean 3, deviation sqrt 3.5
    far = torch.tensor([-1.0, -1.0, -1.0, 3.0]) / 3**0.5
    near(models.supported_scores(q, actions, 0.5), q - 0.5 * 3.5**0.5 * far, 1e-5)
    near(models.supported_scores(q, actions.roll(1, -1), 0.5), q - 0.5 * 3.5**0.5 * far, 1e-5)
    assert torch.equal(models.supported_scores(q, torch.full_like(actions, 0.3), 5.0), q)  # distances do not differ
    pairs, scores = torch.rand(2, 1, 500, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(models.supported_scores(scores, pairs[..., None], 5.0), scores)  # nor do they of two
    level = models.supported_scores(torch.full_like(q, 7.1), actions, 1.0)
    near(level, 7.1 - far.view(1, 1, 4), 1e-5)  # without a difference of scores the distance alone decides


@pytest.mark.parametrize("inverse_temperature", [0.0, 2.0, 20.0])
def test_softmax_selects_with_its_probabilities(inverse_temperature: float) -> None:
    policy = make_policy((0,))
    known = KnownQ(lambda observations, actions: 3.0 - actions[..., 0])
    observations = torch.zeros(1, 20_000, 1)
    options = offers(policy, observations, 3).view(20_000, 3)
    how = {"candidates": 3, "selection": "softmax", "weight_temperature": inverse_temperature}
    chosen = choose(policy, known, observations, **how)[0]
    weight = torch.exp(inverse_temperature * (3.0 - options).double())
    probability, order = (weight / weight.sum(1, keepdim=True)), options.argsort(1)
    options, probability = options.gather(1, order), probability.gather(1, order)  # lowest, middle, highest action
    picked = (options == chosen).double()
    distinct = (options.diff(dim=1) > 0).all(1)  # clipped actions may coincide
    assert distinct.float().mean() > 0.2
    difference = (picked - probability)[distinct].sum(0)
    spread = (probability * (1 - probability))[distinct].sum(0).sqrt()
    assert (difference.abs() < 4 * spread + 1).all(), difference / spread
    if inverse_temperature:
        assert picked[distinct].sum(0)[0] > 1.3 * picked[distinct].sum(0)[2]


PLACES = {"all": [0.5] * 5, "start": [0.5, 1, 1, 1, 1], "steps": [1, 0.5, 0.5, 0.5, 0.5]}


def test_temperature_scales_the_sampling_noise() -> None:
    policy = make_policy((0,))
    zero = lambda x, t: torch.zeros_like(x)
    drawn = policy.noises(Randomness((0,), "try"), "act", 9)
    one, two = (policy.denoise_all(zero, scale * drawn) for scale in (1e-3, 2e-3))
    near(two, 2 * one, 1e-6)
    for network in policy.average.parameters():
        network.data.zero_()  # predicts no noise
    near(choose(policy, None, torch.zeros(1, 9, 1), temperature=1e-3), one, 1e-6)
    assert one.abs().max() > 1e-4
    policy = make_policy((0,))
    still = actions_of(policy, n=5, temperature=0.0)
    near(still, still[:, :1].expand(1, 5))
    assert actions_of(policy, n=5).std() > 0.1
    starts = choose(make_policy((0,)), None, torch.zeros(1, 9, 1), temperature=0.0, temperature_on="start")
    assert starts.std() > 0.1  # later noise is as it was
    first = choose(policy, None, torch.zeros(1, 9, 1), temperature=1.0, temperature_on="start")
    near(first, choose(policy, None, torch.zeros(1, 9, 1)))
    scaled = {
        place: choose(policy, None, torch.zeros(1, 9, 1), temperature=0.5, temperature_on=place) for place in PLACES
    }
    chains = policy.noises(Randomness((0,), "try"), "act", 9)
    for place, scales in PLACES.items():
        noises = chains * torch.tensor(scales).view(1, -1, 1, 1)
        near(scaled[place], policy.sample(torch.zeros(1, 9, 1), noises))


def test_variance_of_sampling_is_the_posteriors_or_beta() -> None:
    betas = make_schedule("vp", 5)
    alpha_bar = torch.cumprod(1 - betas, 0)
    for t in range(1, 5):
        beta = float(betas[t])
        posterior = beta * float((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]))
        for variance, expected in (("beta", beta), ("posterior", posterior)):
            near(torch.tensor(Diffusion(betas, "cpu", variance).deviation[t] ** 2), expected, 1e-6)
    assert make_policy((0,), variance="beta").diffusion.deviation[1] > make_policy((0,)).diffusion.deviation[1]


def test_a_policy_beside_its_guidance_learns_from_the_online_critics_and_teaches_them_nothing() -> None:
    guidance = models.build_guidance(guidance_bundle(make_guidance(SEEDS, 3, 2), SEEDS), "cpu", new=True)
    policy, batch = make_policy(SEEDS, 3, 2, algorithm="dql"), noisy_data().sample(Randomness(SEEDS, "x"), 16)
    with torch.no_grad():
        guidance.online_q.vector.mul_(2.0)  # as after some steps
    twin = torch.zeros(2, dtype=torch.int64)
    online = guidance.twins(guidance.online_q, batch.observations, batch.actions)[:, 0]
    assert torch.equal(guidance.one_q(batch.observations, batch.actions, twin), online)
    loss, _ = policy.loss(batch, guidance, Randomness(SEEDS, "train"))
    parameters = [*guidance.online_q.parameters(), *guidance.target_q.parameters()]
    assert all(
        g is None
        for g in torch.autograd.grad(loss.sum(), parameters[:1] + [*policy.denoiser.parameters()], allow_unused=True)[
            :1
        ]
    )
    assert not any(name.startswith("learning") for name in guidance.state_dict())


# ------------------------------------------------------------------------------------------------ invariants


@functools.cache
def frozen_guidance(seeds: tuple[int, ...]) -> Guidance:
    guidance = make_guidance(seeds, 3, 2, steps=20, batch_size=32)
    train(guidance, noisy_data(), seeds)
    return guidance.requires_grad_(False)


def test_an_update_is_adam_with_cosine_decay_and_a_limit_for_each_network_and_member() -> None:
    guidance, data = make_guidance(SEEDS, 3, 2, gradient_norm=1.0), noisy_data()
    learner = models.Learner([(guidance, guidance.section)], lambda batch, random, done: guidance.loss(batch, random))
    alone = {
        (network, s): [nn.Parameter(rows.detach().clone()) for rows in rows_of(network.parameters(), s)]
        for network, _ in guidance.networks()
        for s in range(2)
    }
    adams = {place: torch.optim.Adam(own) for place, own in alone.items()}
    norms, random = [], Randomness(SEEDS, "train")
    for step in range(8):
        random.step = step
        loss, _ = guidance.loss(data.sample(random, 16), random)
        for (network, s), own in alone.items():
            gradients = torch.autograd.grad(loss[s], list(network.parameters()), retain_graph=True)
            for parameter, gradient in zip(own, rows_of(gradients, s), strict=True):
                parameter.grad = gradient.clone()
            norms.append(float(nn.utils.clip_grad_norm_(own, 1.0)))
            adams[network, s].param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 8)) / 2
            adams[network, s].step()
        learner.update(loss, step, 8)
    assert min(norms) < 0.9 and max(norms) > 1.1
    for (network, s), own in alone.items():
        for parameter, rows in zip(own, rows_of(network.parameters(), s), strict=True):
            near(rows.detach(), parameter.detach(), 1e-5)


def rows_of(tensors: Iterable[Tensor], member: int) -> list[Tensor]:
    """One of two members' share of parameters, (2 copies, ...) each."""
    return [tensor.chunk(2)[member] for tensor in tensors]


@pytest.mark.parametrize("algorithm", POLICIES)
def test_frozen_guidance_is_bit_identical_after_policy_training(algorithm: str, tmp_path: Path) -> None:
    path = tmp_path / "g.pt"
    save_bundle(path, guidance_bundle(frozen_guidance(SEEDS), SEEDS))
    guidance = build_guidance(*read_guidances(path), "cpu")
    before = weights_of(guidance)
    settings = {"algorithm": algorithm, "steps": 20, "batch_size": 32, "advantage_weight": "exponential"}
    policy = make_policy(SEEDS, 3, 2, **settings)
    own = weights_of(policy)
    train(policy, noisy_data(), SEEDS, guidance)
    choose(policy, guidance, torch.randn(2, 5, 3), candidates=4, guidance_weight=1.0)
    after = weights_of(guidance)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[0] for name in before} == {"target_q", "value"}  # what values need
    assert not any(p.requires_grad or p.grad is not None for p in guidance.parameters())
    changed = [not torch.equal(own[name], value) for name, value in weights_of(policy).items()]
    assert all(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_member_two_of_three_seeds_is_that_seed_alone(kind: str) -> None:
    """Equal draws and equal mathematics; batched and single matrix products round differently, and Adam divides by
    the gradient's size, so that after 50 steps the weights agree to 5e-5 and not to the bit."""
    trained = {}
    for seeds in ((5, 6, 7), (7,)):
        name, algorithm = kind.split()
        steps = {"algorithm": algorithm, "steps": 50, "batch_size": 32, "learning_rate": 1e-3}
        if name == "guidance":
            steps["conservatism"] = 1.0
            module: Any = make_guidance(seeds, 3, 2, **steps)
            train(module, noisy_data(), seeds)
        else:
            guidance, data = frozen_guidance(seeds), noisy_data()
            module = make_policy(seeds, 3, 2, dropout=0.2, **steps)
            train(module, data, seeds, guidance)
        trained[seeds] = weights_of(module)
    make: Any = make_guidance if name == "guidance" else make_policy
    initial = weights_of(make((7,), 3, 2, **steps))
    for key, alone in trained[(7,)].items():
        member = trained[(5, 6, 7)][key][-len(alone) :]
        torch.testing.assert_close(member, alone, rtol=0, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
        if key.startswith(("online_q", "value", "denoiser")):
            assert (alone - initial[key]).abs().max() > 20 * 5e-5, key  # it learned far more than the tolerance


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_products")
@pytest.mark.parametrize("kind", KINDS)
def test_through_onednn_threads_and_members_change_no_bit(kind: str) -> None:
    if models.choose_products("oneDNN") != "oneDNN":
        pytest.skip("this processor's products are left to MKL")
    (name, algorithm), threads, trained = kind.split(), torch.get_num_threads(), []
    for seeds, count in (((7,), 1), ((7,), 2), ((5, 6, 7), 1), ((5, 7), 2)):
        torch.set_num_threads(count)
        # torch leaves products of fewer than 4,096 multiplications to MKL
        settings = {"algorithm": algorithm, "steps": 30, "batch_size": 256, "hidden": [48, 48], "time_features": 64}
        settings |= {"actor_hidden": [256, 256, 256], "conservatism": 1.0} if name == "guidance" else {}
        guidance, data = make_guidance(seeds, 3, 2).requires_grad_(False), noisy_data()
        module: Any = (make_guidance if name == "guidance" else make_policy)(seeds, 3, 2, **settings)
        train(module, data, seeds, guidance)
        trained.append(weights_of(module))
    torch.set_num_threads(threads)
    for key, alone in trained[0].items():
        assert all(torch.equal(other[key][-len(alone) :], alone) for other in trained), key


@pytest.mark.usefixtures("fresh_products")
@pytest.mark.parametrize("kind", [*KINDS, *(f"joint {name}" for name in GUIDANCES)])
def test_resumed_training_is_uninterrupted_training(kind: str, tmp_path: Path) -> None:
    """Also in the unfinished bundles on the way, where the optimizers' states and a companion's weights are."""
    teacher = None if kind.startswith("joint") else guidance_bundle(frozen_guidance(SEEDS), SEEDS)
    settings = {"conservatism": 1.0} if kind.startswith("guidance") else {}

    def saved(**run: Any) -> dict[int, Bundle]:
        kept: dict[int, Bundle] = {}
        keep = Run(save=lambda bundle: kept.update({bundle.step: copy.deepcopy(bundle)}), **run)
        stopped = pytest.raises(MdptError, match="^interrupted after step 5 of 12; the same command goes on$")
        with stopped if "interrupted" in run else contextlib.nullcontext():
            learn(kind, teacher, keep, steps=12, batch_size=16, snapshots=4, **settings)
        return kept

    countdown = iter(range(1, 6))
    straight, halves = saved(), saved(interrupted=lambda: next(countdown) == 5)
    assert list(straight) == [3, 6, 9, 12] and list(halves) == [3, 5]
    save_bundle(tmp_path / "half.pt", halves[5])
    resumed = saved(begun=read_bundle(tmp_path / "half.pt"))
    assert list(resumed) == [6, 9, 12] and resumed[12].complete
    for step, got in resumed.items():
        expected = straight[step]
        ours, theirs = got.model_dump(), expected.model_dump()
        for key in ours.keys() - {"accounting", "guidances"}:
            assert same(ours[key], theirs[key]), (step, key)
        for one, other in zip(got.guidances, expected.guidances, strict=True):
            assert same(one.weights, other.weights)
        assert not any(same(weight, halves[5].weights[name]) for name, weight in got.weights.items())


def test_a_run_that_keeps_other_rows_is_another_run() -> None:
    ours = blank_bundle("guidance", make_experiment())
    section = ours.experiment.data.model_copy(update={"keep_timeouts": True})
    theirs = but(ours, experiment=ours.experiment.model_copy(update={"data": section}))
    with pytest.raises(
        MdptError, match=r"begun as another run: \[data\] keep_timeouts was True, is False; --overwrite"
    ):
        models.check_same_run(ours, theirs, extend=False)


def test_a_run_cut_short_between_two_entries_of_its_history_ends_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HISTORY_ENTRIES", 10)
    settings: dict[str, Any] = {"steps": 30, "batch_size": 8, "snapshots": 1}  # an entry every third step
    kept: list[Bundle] = []
    countdown = iter(range(1, 99))
    stop = Run(save=lambda bundle: kept.append(copy.deepcopy(bundle)), interrupted=lambda: next(countdown) == 22)
    with pytest.raises(MdptError, match="after step 22"):
        learn("guidance idql", run=stop, **settings)
    assert kept[0].history[-1].step == 21 and len(kept[0].training.pending) == 1  # type: ignore[union-attr]
    resumed = learn("guidance idql", run=Run(begun=kept[0]), **settings)
    assert resumed.history == learn("guidance idql", **settings).history


def test_a_metric_that_is_not_finite_ends_the_run_as_a_loss_does() -> None:
    for place, text in (("loss", "loss of member 1"), ("q", "q of member 1")):
        history = models.History(blank_bundle("guidance", make_experiment()))
        values = {"loss": torch.ones(2), "q": torch.ones(2)}
        values[place] = torch.tensor([1.0, math.nan])
        history.pending.append((values["loss"], {"q": values["q"]}))
        with pytest.raises(MdptError, match=f"the {text} .seed 1. became nan at step"):
            history.average()
    history.pending = [(torch.ones(2), {"step": torch.ones(2)})]  # the step is the history's own
    with pytest.raises(MdptError, match="a loss has a metric 'step', a name that the history of a bundle uses"):
        history.average()


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.pt"
    save_bundle(path, guidance_bundle(make_guidance(SEEDS, 3, 2), SEEDS))
    sound = path.read_bytes()
    assert read_bundle(path).digest == hashlib.sha256(sound).hexdigest()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    middle = largest.header_offset + 500
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    flipped = sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :]
    for damaged in (b"", sound[:-600], flipped, packed.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(MdptError, match="damaged"):
            read_bundle(path)


def test_averaged_weights_and_target_critics_act() -> None:
    guidance = frozen_guidance.__wrapped__(SEEDS)  # one of its own, since it changes
    policy = make_policy(SEEDS, 3, 2, steps=20, batch_size=32)
    train(policy, noisy_data(), SEEDS, guidance)
    observations = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))

    def chosen() -> Tensor:
        return choose(policy, guidance, observations, candidates=5)

    before = chosen()
    policy.denoiser.vector.add_(1.0)
    guidance.online_q.vector.add_(1.0)
    guidance.value.vector.add_(1.0)  # V does not depend on the action
    assert torch.equal(chosen(), before)
    guidance.target_q.vector.mul_(-1.0)
    assert not torch.equal(chosen(), before)
    guidance.target_q.vector.mul_(-1.0)
    assert torch.equal(chosen(), before)
    policy.average.vector.add_(0.1)
    assert not torch.equal(chosen(), before)


# --------------------------------------------------------------------------------------------------- bundles


def a_bundle(kind: Any, seeds: Sequence[int], module: Guidance | Policy) -> Bundle:
    bundle = blank_bundle(kind, make_experiment(seeds, **{kind: module.section.model_dump()}))
    bundle.normalizer = {"mean": torch.tensor([0.5, -0.5, 0.0]), "deviation": torch.tensor([2.0, 1.0, 0.5])}
    bundle.weights, bundle.step, bundle.complete = weights_of(module), module.section.steps, True
    return bundle


def but(bundle: Bundle, **changed: Any) -> Bundle:
    return bundle.model_copy(update=changed)


def guidance_bundle(guidance: Guidance, seeds: Sequence[int]) -> Bundle:
    return a_bundle("guidance", seeds, guidance)


def policy_bundle(seeds: Sequence[int], guidance: Bundle | None, **settings: Any) -> Bundle:
    policy = make_policy(seeds, 3, 2, **settings)
    policy.average.vector.mul_(1.5)  # so that online and averaged weights differ
    inside = [but(guidance, weights=guidance.acting)] if guidance else []
    return but(a_bundle("policy", seeds, policy), guidances=inside)


ELSEWHERE = """
import sys, torch
from pathlib import Path
from mdpt.models import Inference, Randomness, act, build_guidance, build_policy, read_guidances, read_policy
for path in map(Path, sys.argv[1:]):
    policy, guidance = build_policy(read_policy(path), "cpu"), build_guidance(*read_guidances(path), "cpu")
    observations, found = torch.arange(60.0).view(2, 10, 3).cos(), []
    for how in Inference(), Inference(candidates=5), Inference(candidates=5, selection="softmax", guidance_weight=0.1):
        random = Randomness((0, 1), "try")
        noises = policy.noises(random, "act", 10 * how.candidates)
        uniform = random.uniform("selection", 10, how.candidates)
        found.append(act(policy, guidance, observations, noises, uniform, how))
    torch.save([*found, guidance.q(observations, found[0]), guidance.v(observations)], path.with_suffix(".out"))
"""


@pytest.mark.slow
def test_a_new_process_acts_and_ranks_the_same(tmp_path: Path) -> None:
    teacher = make_guidance(SEEDS, 3, 2, algorithm="dql", steps=3, batch_size=8)
    train(teacher, noisy_data(), SEEDS)  # its companion's weights are in the bundle, as in an unfinished run's
    paths = [tmp_path / f"{algorithm}.pt" for algorithm in POLICIES]
    for path in paths:
        save_bundle(path, policy_bundle(SEEDS, guidance_bundle(teacher, SEEDS), algorithm=path.stem))
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, paths)], check=True, cwd=tmp_path)
    observations = torch.arange(60.0).view(2, 10, 3).cos()
    for path in paths:
        policy, guidance = build_policy(read_policy(path), "cpu"), build_guidance(*read_guidances(path), "cpu")
        plain, ranked, softmax, q, v = torch.load(path.with_suffix(".out"))
        assert torch.equal(choose(policy, guidance, observations), plain)
        assert torch.equal(choose(policy, guidance, observations, candidates=5), ranked)
        how = {"candidates": 5, "selection": "softmax", "guidance_weight": 0.1}
        assert torch.equal(choose(policy, guidance, observations, **how), softmax)
        assert torch.equal(guidance.q(observations, plain), q) and torch.equal(guidance.v(observations), v)
        teacher.normalizer = guidance.normalizer
        assert torch.equal(teacher.q(observations, plain), q)  # as before it was saved
        assert not torch.equal(plain, ranked)


def test_loading_restores_every_weight_that_acts_and_the_normalizer(tmp_path: Path) -> None:
    teacher = guidance_bundle(frozen_guidance(SEEDS), SEEDS)
    bundle = policy_bundle(SEEDS, teacher)
    save_bundle(tmp_path / "p.pt", bundle)
    policy, guidance = (
        build_policy(read_policy(tmp_path / "p.pt"), "cpu"),
        build_guidance(*read_guidances(tmp_path / "p.pt"), "cpu"),
    )
    for module, saved, left_out in ((policy, bundle, "denoiser"), (guidance, teacher, "online_q")):
        got, kept = weights_of(module), saved.weights.items()
        expected = {name: value for name, value in kept if not name.startswith(left_out)}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        near(module.normalizer(torch.tensor([[[2.5, 0.5, 1.0]]])), [[[1.0, 1.0, 2.0]]])
        for network in (child for child in module.modules() if isinstance(child, models.Stack)):
            network.vector.zero_()
            assert all((p == 0).all() for p in network.parameters())  # still views after loading
    copies = weights_of(policy)
    policy.average.vector.add_(1.0)
    assert all((value == 0).all() for value in copies.values())


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bundle = tmp_path / "new" / "b.pt", policy_bundle(SEEDS, None)
    save_bundle(path, bundle)
    before = path.read_bytes()
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("unexpected pos 704 vs 598"),
        KeyboardInterrupt(),
    ):

        def broken(content: Any, file: Any, error: BaseException = error) -> None:
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", broken)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MdptError):
            save_bundle(path, bundle)
        assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["b.pt"]


def test_bundles_open_with_weights_only(tmp_path: Path) -> None:
    """A file that would run code when unpickled is refused, and its code does not run."""

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": "mdpt bundle", "version": models.BUNDLE_VERSION, "kind": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(MdptError, match="cannot be read as a bundle"):
        read_bundle(tmp_path / "harmful.pt")
    assert not (tmp_path / "ran").exists()
    save_bundle(tmp_path / "p.pt", policy_bundle(SEEDS, guidance_bundle(frozen_guidance(SEEDS), SEEDS)))
    assert torch.load(tmp_path / "p.pt", weights_only=True)["kind"] == "policy"


BAD_FILES: dict[str, tuple[Callable[..., Any], Callable[[Path], Any], str]] = {
    "missing": (read_bundle, lambda path: None, "no such bundle; `mdpt guidance`"),
    "a folder": (read_bundle, lambda path: path.mkdir(), "is a folder; expected a bundle"),
    "text": (read_bundle, lambda path: path.write_text("[data]"), "damaged or something else; write it anew"),
    "a module": (read_bundle, lambda path: torch.save(nn.Linear(1, 1), path), "damaged or something else"),
    "a list": (read_bundle, lambda path: torch.save([1, 2], path), "expected a file written by `mdpt guidance`"),
    "other version": (
        read_bundle,
        lambda path: torch.save({"format": "mdpt bundle", "version": 99}, path),
        f"bundle version 99, this mdpt reads version {models.BUNDLE_VERSION}; train it anew",
    ),
    "an unknown algorithm": (
        read_bundle,
        lambda path: write_edited(path, policy_bundle(SEEDS, None), ("experiment", "policy", "algorithm"), "sac"),
        f"[policy] algorithm = 'sac': should be one of {', '.join(POLICIES)}; did you mean 'dac'?",
    ),
    "guidance as policy": (
        read_policy,
        lambda path: save_bundle(path, guidance_bundle(make_guidance(SEEDS, 3, 2), SEEDS)),
        "is a guidance bundle; expected a policy bundle, written by `mdpt policy`",
    ),
    "unguided policy": (
        read_guidances,
        lambda path: save_bundle(path, policy_bundle(SEEDS, None)),
        "was trained unguided and holds no guidance; give a guidance bundle",
    ),
}


@pytest.mark.parametrize(("read", "write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(read: Callable[..., Any], write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(path := tmp_path / "b.pt")
    with pytest.raises(MdptError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def write_edited(path: Path, bundle: Bundle, keys: Sequence[Any], value: Any = None, *, drop: bool = False) -> None:
    """Write a bundle with another value on disk, or without it."""
    content = copy.deepcopy(bundle.model_dump())
    *tables, key = keys
    table = functools.reduce(operator.getitem, tables, content)
    if drop:
        del table[key]
    else:
        table[key] = value
    torch.save(content, path)


@functools.cache
def finished() -> Bundle:
    return learn("joint idql", steps=4, batch_size=8, snapshots=1)


def defaulted() -> list[tuple[str, ...]]:
    """Every field of every table of the experiment that has a default."""
    places: list[tuple[str, ...]] = []
    for name, part in (("", Experiment()), *Experiment()):
        for field, info in type(part).model_fields.items() if isinstance(part, Section) else ():
            if not info.is_required():
                places.append((*filter(None, [name]), field))
    return places


def test_a_field_that_a_file_lacks_has_its_default() -> None:
    """As in a bundle that an older mdpt wrote. Each field is another one's new one some day."""
    places = defaulted()
    assert len(places) > 60
    for place in places:
        content = copy.deepcopy(finished().model_dump())
        *tables, field = place
        table = functools.reduce(operator.getitem, tables, content["experiment"])
        del table[field]
        unknown: list[str] = []
        read = functools.reduce(getattr, tables, Bundle.model_validate(content, context=unknown).experiment)
        filled = models.check_algorithms(Experiment(policy=PolicySection(network="mlp")))  # as in bundles
        expected = getattr(functools.reduce(getattr, tables, filled), field)
        expected = {"variance": "posterior", "conservatism": 0.0}.get(field, expected)
        assert isinstance(expected, Section) or getattr(read, field) == expected, place
        assert not unknown


def test_bundles_of_other_versions_act_and_go_on(tmp_path: Path) -> None:
    path, kept = tmp_path / "p.pt", []
    settings: dict[str, Any] = {"steps": 4, "batch_size": 8, "snapshots": 1}
    keep = Run(save=lambda bundle: kept.append(copy.deepcopy(bundle)), interrupted=lambda: 2)
    with pytest.raises(MdptError, match="interrupted"):
        learn("joint idql", run=keep, **settings)
    for table, field in (("policy", "eta"), ("evaluation", "jacobian"), ("guidance", "tau")):
        write_edited(path, kept[0], ("experiment", table, field), drop=True)
        assert same(learn("joint idql", run=Run(begun=read_bundle(path)), **settings).weights, finished().weights)
        write_edited(path, finished(), ("experiment", table, field), drop=True)
        assert load_agent(path)(np.zeros(3)).shape == (2,)
    told: list[str] = []
    for version in (kept[0].versions.mdpt, "0.0.1"):
        write_edited(path, kept[0], ("versions", "mdpt"), version)
        learn("joint idql", run=Run(begun=read_bundle(path), tell=told.append), **settings)
    assert [text for text in told if "mdpt" in text] == [
        f"was begun by mdpt 0.0.1, goes on by {kept[0].versions.mdpt}, whose losses may differ"
    ]
    for keys in ((), ("experiment",), ("experiment", "policy"), ("environment",), ("dataset",), ("reward_scale",)):
        write_edited(path, finished(), (*keys, "new"), 1)
        with pytest.warns(MdptWarning, match=rf"does not know: {'.'.join((*keys, 'new'))}$"):
            assert read_bundle(path).complete


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_without_a_part_of_today_a_bundle_is_refused(tmp_path: Path) -> None:
    bundle = learn("guidance idql", steps=4, batch_size=8, snapshots=1)
    for name, info in Bundle.model_fields.items():
        if info.is_required():
            write_edited(tmp_path / "g.pt", bundle, (name,), drop=True)
            with pytest.raises(
                MdptError, match=f"g.pt: is not a bundle as mdpt writes it; write it anew: {name}: "
            ) as caught:
                read_bundle(tmp_path / "g.pt")
            assert "\n" not in str(caught.value)
    weight = ("weights", "value.layers.0.weight")
    nested, meta = torch.nested.nested_tensor([torch.zeros(3, 32)] * 2), torch.zeros(2, 3, 32, device="meta")
    unfit = torch.zeros(2, 3, 32).double(), torch.full((2, 3, 32), math.nan), torch.zeros(1).expand(2, 3, 32)
    for wrong in (*unfit, nested, meta, 1):
        write_edited(tmp_path / "g.pt", bundle, weight, wrong)
        with pytest.raises(MdptError, match=r"write it anew: weights\.value\.layers\.0\.weight"):
            read_bundle(tmp_path / "g.pt")
    write_edited(tmp_path / "g.pt", bundle, weight, torch.zeros(2, 3, 8))
    with pytest.raises(MdptError, match=r"do not fit its experiment: .*value\.layers\.0\.weight"):
        build_guidance(read_bundle(tmp_path / "g.pt"), "cpu")


@pytest.mark.slow
def test_reading_a_bundle_imports_no_compiler(tmp_path: Path) -> None:
    save_bundle(tmp_path / "p.pt", policy_bundle(SEEDS, guidance_bundle(frozen_guidance(SEEDS), SEEDS)))
    code = (
        "import sys, pathlib; from mdpt.models import read_bundle; read_bundle(pathlib.Path('p.pt')); "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_snapshots_by_step(tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    bundle = policy_bundle(SEEDS, None, steps=20)
    snapshot = {name: value + 1 for name, value in bundle.weights.items() if name.startswith("average.")}
    save_bundle(path, but(bundle, snapshots={10: snapshot, 20: bundle.acting}))
    for name, moved, step in (("p.pt", 0, 20), ("p.pt@last", 0, 20), ("p.pt@10", 1, 10)):
        read = read_policy(tmp_path / name)
        assert read.step == step
        for key, value in bundle.weights.items():
            assert torch.equal(read.weights[key], value + moved * key.startswith("average.")), (name, key)
    for step in ("11", "best"):
        with pytest.raises(MdptError) as caught:
            read_bundle(tmp_path / f"p.pt@{step}")
        assert str(caught.value) == f"{path}@{step}: no snapshot @{step}; there are @10, @20 and @last"
    with pytest.raises(MdptError) as caught:
        read_bundle(tmp_path / "q.pt@10")
    assert str(caught.value) == f"{tmp_path / 'q.pt'}: no such bundle; `mdpt guidance` and `mdpt policy` write them"


def test_bundles_that_do_not_fit() -> None:
    ours, theirs = policy_bundle(SEEDS, None), guidance_bundle(make_guidance(SEEDS, 3, 2), SEEDS)
    assert check_fit(ours, theirs) == []
    section = theirs.experiment.data.model_copy(update={"fraction": 0.3})
    fewer = but(theirs, experiment=theirs.experiment.model_copy(update={"data": section}))
    (warning,) = check_fit(ours, fewer)
    assert "the policy (1.0, 0.05, 0) and the guidance (0.3, 0.05, 0)" in warning
    other = but(theirs, dataset=theirs.dataset.model_copy(update={"name": "two", "hash": "def"}))
    (warning,) = check_fit(ours, other)
    assert "the policy learned from toy and the guidance learned from two" in warning
    elsewhere = but(theirs, environment=replace(TOY, id="Other-v0", action_high=(1.0, 2.0)))
    with pytest.raises(MdptError, match=r"id Toy-v0 against Other-v0; action_high \(1.0, 4.0\) against \(1.0, 2.0\)"):
        check_fit(ours, elsewhere)


def test_without_an_environment_the_longest_episode_is_not_compared() -> None:
    for name in (None, "Toy-v0"):
        ours, theirs = (
            but(policy_bundle(SEEDS, None), environment=replace(TOY, id=name, max_episode_steps=longest))
            for longest in (20, 19)
        )
        with (
            contextlib.nullcontext()
            if name is None
            else pytest.raises(MdptError, match="max_episode_steps 20 against 19")
        ):
            assert check_fit(ours, theirs) == []


def test_members_are_paired_by_position() -> None:
    with pytest.raises(MdptError) as caught:
        pair_members(2, 3)
    assert str(caught.value) == (
        "2 policy members cannot be paired with 3 guidance members; use the same number, or a guidance with one member"
    )
    three = guidance_bundle(frozen_guidance((0, 1, 2)), (0, 1, 2))
    assert same(select_members(three, pair_members(3, 3)).weights, three.acting)

    one = guidance_bundle(frozen_guidance((7,)), (7,))
    alone, repeated = build_guidance(one, "cpu"), build_guidance(select_members(one, pair_members(3, 1)), "cpu")
    observations, actions = torch.randn(1, 4, 3), torch.rand(1, 4, 2)
    assert repeated.members == 3 and not any(p.requires_grad for p in repeated.parameters())
    q = repeated.q(observations.expand(3, -1, -1), actions.expand(3, -1, -1))
    near(q, alone.q(observations, actions).expand(3, -1), 1e-6)
    assert choose(make_policy((0, 1, 2), 3, 2), repeated, torch.randn(3, 5, 3), candidates=4).shape == (3, 5, 2)


def test_select_members_keeps_and_repeats_whole_members() -> None:
    teacher = make_guidance((5, 6, 7), 3, 2)
    teacher.target_q.vector.mul_(1.5)  # so that targets and online critics differ
    bundle = but(
        guidance_bundle(teacher, (5, 6, 7)),
        history=[models.Entry(step=1)],
        snapshots={1: {}},
        training=models.Training(optimizers=[], pending=[]),
    )
    quality = models.guidance_quality(teacher, toy_dataset(noisy_columns()).held_out, 0.9, 1)
    bundle.quality = [quality.model_copy(update={"mean_v": [50.0, 60.0, 70.0]})]
    before, whole = copy.deepcopy(bundle), build_guidance(bundle, "cpu")
    observations, actions = torch.randn(1, 4, 3).expand(3, -1, -1), torch.rand(1, 4, 2).expand(3, -1, -1)
    q, v = whole.q(observations, actions), whole.v(observations)
    for members, rows in (([2, 0, 2], [4, 5, 0, 1, 4, 5]), ([1], [2, 3]), ([0, 1, 2], [0, 1, 2, 3, 4, 5])):
        selected, n = select_members(bundle, members), len(members)
        assert selected.seeds == [5 + member for member in members]
        assert selected.quality[0].mean_v == [50.0 + 10 * member for member in members]
        assert {name.split(".")[0] for name in selected.weights} == {"target_q", "value"}  # what values need
        assert not (selected.history or selected.snapshots or selected.training)
        guidance = build_guidance(selected, "cpu")
        assert guidance.members == n
        near(guidance.q(observations[:n], actions[:n]), q[members], 1e-6)
        near(guidance.v(observations[:n]), v[members], 1e-6)
        assert torch.equal(guidance.target_q.vector, teacher.target_q.vector[rows])
    assert same(bundle.model_dump(), before.model_dump())

    policies = policy_bundle((5, 6, 7), bundle)
    selected = select_members(policies, [2, 1])
    assert selected.guidances == [] and len(policies.guidances) == 1
    policy = build_policy(selected, "cpu")
    assert policy.members == 2
    assert torch.equal(policy.average.vector, build_policy(policies, "cpu").average.vector[[2, 1]])
    policy.average.vector.zero_()
    assert all((p == 0).all() for p in policy.average.parameters())  # still views


# ---------------------------------------------------------------------------------------------------- agents


@pytest.mark.usefixtures("fresh_products")
@pytest.mark.parametrize("hidden", [[256, 256], [32, 32]])
@pytest.mark.parametrize("how", [Inference(), Inference(10, support=0.1), Inference(guidance_weight=0.1)])
def test_through_onednn_no_bit_of_an_episode_depends_on_how_many_there_are(hidden: list[int], how: Inference) -> None:
    if models.choose_products("oneDNN") != "oneDNN":
        pytest.skip("this processor's products are left to MKL")
    teacher = guidance_bundle(make_guidance((5, 6, 7), 3, 2, hidden=hidden), (5, 6, 7))
    member = select_members(policy_bundle(SEEDS, None, hidden=[256, 256]), [1])
    states = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    judges = np.repeat([0, 1, 2], [5, 34, 1])
    chosen = Agent(member, [teacher], how, seed=0, episodes=range(40), judges=judges.tolist())(states, np.arange(40))
    for few in ([0], [39], [2, 3], [7, 38], [*range(1, 20)], [3, 6, 39]):
        agent = Agent(member, [teacher], how, seed=0, episodes=few, judges=judges[few].tolist())
        assert np.array_equal(agent(states[few], np.arange(len(few))), chosen[few])


HOW = {
    "plain": Inference(),
    "best of four": Inference(candidates=4),
    "drawn": Inference(candidates=4, selection="softmax", weight_temperature=1.0),
    "steered": Inference(candidates=4, guidance_weight=0.1),
    "supported": Inference(candidates=4, support=1.0),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_an_episode_depends_on_seeds_its_number_and_the_step_alone(how: Inference) -> None:
    teacher = guidance_bundle(frozen_guidance(SEEDS), SEEDS)
    member, guidance = select_members(policy_bundle(SEEDS, teacher), [1]), select_members(teacher, [1])

    def agent(*episodes: int, seed: int = 0, **changed: Any) -> Callable[..., Tensor]:
        built = Agent(but(member, **changed), [guidance], how, seed=seed, episodes=episodes)
        return lambda observations, running: torch.from_numpy(built(observations.numpy(), np.array(running)))

    among, alone, fewer = agent(3, 7, 9), agent(7), agent(3, 7, 9)
    others = agent(8), agent(7, seed=1), agent(7, seeds=[0])
    states = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    for observations, running in zip(states, ([0, 1, 2], [0, 1, 2], [1, 2], [1, 2], [2]), strict=True):
        chosen = among(observations, [0, 1, 2])
        assert chosen.shape == (3, 2) and chosen.abs().max() <= 1
        near(alone(observations[[1]], [0]), chosen[[1]])
        near(fewer(observations[running], running), chosen[running])
        for other in others:
            assert (other(observations[[1]], [0]) - chosen[[1]]).abs().max() > 1e-3

    still, observations = agent(7, 7, 8), torch.zeros(3, 3)
    first, second = still(observations, [0, 1, 2]), still(observations, [0, 1, 2])
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert (first - second).abs().amax(1).min() > 1e-3


def test_other_value_losses_by_hand() -> None:
    target, v = torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.5, 0.5, 1.0]], requires_grad=True)
    loss, _ = models.quantile_loss(target, v, 0.7)
    near(loss.detach(), [(0.7 * 0.5 + 0.3 * 0.5 + 0.7 * 8) / 3])
    near(torch.autograd.grad(loss.sum(), v)[0], [[-0.7 / 3, 0.3 / 3, -0.7 / 3]])
    loss, _ = models.gumbel_loss(target, v, 0.5)
    by_hand = [math.exp(1) - 1 - 1, math.exp(-1) + 1 - 1, math.exp(7) - 7 - 1]  # the last is cut off at 7
    near(loss.detach(), [sum(by_hand) / 3], 1e-5)
    near(torch.autograd.grad(loss.sum(), v)[0], [[-(math.exp(1) - 1) / 1.5, -(math.exp(-1) - 1) / 1.5, 0]], 1e-5)
    batch = noisy_data().sample(Randomness((0,), "x"), 16)
    found = {
        name: float(make_guidance((0,), 3, 2, value_loss=name).loss(batch, Randomness((0,), "t"))[0])
        for name in models.VALUE_LOSSES
    }
    assert len(set(found.values())) == 3


def test_targets_and_averages_follow_at_their_intervals() -> None:
    guidance = make_guidance((0,), tau=0.5, target_every=3)
    guidance.online_q.vector.data.fill_(1.0)
    guidance.target_q.vector.zero_()
    seen = []
    for step in range(6):
        guidance.follow(step)
        seen.append(float(guidance.target_q.vector[0, 0]))
    assert seen == [0, 0, 0.5, 0.5, 0.5, 0.75]
    policy = make_policy((0,), ema_decay=0.5, ema_every=2, ema_from=40)
    for step, online, expected in ((39, 1.0, 1.0), (40, 0.0, 1.0), (41, 0.0, 0.5), (42, 0.0, 0.5), (43, 0.0, 0.25)):
        policy.denoiser.vector.data.fill_(online)
        policy.follow(step)
        assert float(policy.average.vector[0, 0]) == expected, step


def test_rates_decay_and_limits_are_the_sections() -> None:
    rates = {"learning_rate": 0.1, "value_learning_rate": 0.2, "actor_learning_rate": 0.4}
    for decay, left in (("cosine", 0.5), ("none", 1.0)):
        guidance = make_guidance((0,), algorithm="dql", decay=decay, gradient_norm=0.0, weight_decay=0.1, **rates)
        learner = models.Learner([(guidance, guidance.section)], lambda batch, random, done: None)  # type: ignore[arg-type, return-value]
        before = [each.network.vector.clone() for each in learner.networks]
        learner.update(sum(p.sum() for p in learner.parameters).expand(1), 5, 10)  # every gradient is 1
        for each, was, rate in zip(learner.networks, before, (0.1, 0.2, 0.4), strict=True):
            expected = (
                was * (1 - rate * left * 0.1) - rate * left
            )  # Adam's first step is the rate, whatever the gradient
            near(each.network.vector[:, : each.network.size], expected[:, : each.network.size], 1e-4)
            assert each.gradient[0, 0] == 1


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_episodes_under_several_judges_are_what_each_is_under_one(how: Inference) -> None:
    teacher = guidance_bundle(frozen_guidance(SEEDS), SEEDS)
    member, episodes, judges = select_members(policy_bundle(SEEDS, teacher), [1]), (4, 4, 5, 6), (0, 1, 1, 1)
    together = Agent(member, [teacher], how, seed=0, episodes=episodes, judges=judges)
    apart = [
        Agent(member, [select_members(teacher, [judge])], how, seed=0, episodes=[episode])
        for episode, judge in zip(episodes, judges, strict=True)
    ]
    states = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    for running in ([0, 1, 2, 3], [0, 1, 2, 3], [1, 3], [1, 3], [3]):  # the first judge's and one more end early
        chosen = together(states[running], np.array(running))
        for row, place in zip(chosen, running, strict=True):
            near(torch.from_numpy(row), apart[place](states[[place]], np.arange(1))[0])


def judges_apart(bundles: Sequence[Bundle]) -> list[Guidance]:
    return [
        build_guidance(select_members(bundle, [member]), "cpu")
        for bundle in bundles
        for member in range(len(bundle.seeds))
    ]


@pytest.mark.parametrize("rule", models.ENSEMBLES)
def test_an_ensemble_is_the_figure_of_what_its_members_say_apart(rule: str) -> None:
    """Of guidances with other networks, for several policy members, against SciPy and one member at a time."""
    small = guidance_bundle(make_guidance((4,), 3, 2, hidden=[8]).requires_grad_(False), (4,))
    bundles = [guidance_bundle(frozen_guidance(SEEDS), SEEDS), small]
    ensemble = models.build_judge(bundles, rule, 2, "cpu", candidates=5)
    states, actions = torch.randn(2, 20, 3), torch.rand(2, 20, 2) * 2 - 1
    twin, apart = torch.tensor([1, 0]), judges_apart(bundles)
    assert isinstance(ensemble, models.Ensemble) and ensemble.members == len(apart) == 3
    figure: dict[str, Callable[[Any], Any]] = {
        "mean": lambda values: values.mean(0),
        "median": lambda values: np.median(values, 0),
        "min": lambda values: values.min(0),
        "rank": lambda values: (stats.rankdata(values.reshape(-1, 5), axis=1).reshape(values.shape) - 1).mean(0) / 4,
    }

    def check(found: Tensor, ask: Callable[[Guidance, int], Tensor]) -> None:
        for s in range(2):
            values = np.stack([ask(judge, s)[0].detach().numpy() for judge in apart])
            near(found[s], torch.from_numpy(figure[rule](values)), 1e-5)

    check(ensemble.q(states, actions), lambda judge, s: judge.q(states[s : s + 1], actions[s : s + 1]))
    check(ensemble.v(states), lambda judge, s: judge.v(states[s : s + 1]))
    check(ensemble.advantage(states, actions), lambda judge, s: judge.advantage(states[s : s + 1], actions[s : s + 1]))
    check(
        ensemble.one_q(states, actions, twin),
        lambda judge, s: judge.one_q(states[s : s + 1], actions[s : s + 1], twin[s : s + 1]),
    )


def test_the_figures_of_an_ensemble_by_hand() -> None:
    values = torch.tensor(
        [[[1.0, 5.0, 2.0, 4.0]], [[3.0, 1.0, 9.0, 8.0]], [[2.0, 3.0, 4.0, 0.0]], [[8.0, 7.0, 1.0, 2.0]]]
    )
    expected = {
        "mean": [3.5, 4.0, 4.0, 3.5],
        "median": [2.5, 4.0, 3.0, 3.0],  # of an even number the two in the middle
        "min": [1.0, 1.0, 1.0, 0.0],
        "rank": [0.5, 0.5, 0.5, 0.5],  # the first two candidates 0 1 0 1 against 1 0 1 0, the others 0 1 1 0
    }
    for rule, figures in expected.items():
        near(models.ENSEMBLES[rule](values, 2), [figures])
    near(models.ENSEMBLES["rank"](values, 4), [[5 / 12, 7 / 12, 7 / 12, 5 / 12]])  # 0312, 1032, 1230, 3201 by thirds
    near(models.ENSEMBLES["rank"](torch.tensor([[[2.0, 1.0, 2.0, 2.0]]]), 4), [[2 / 3, 0, 2 / 3, 2 / 3]])  # equal ones


def test_a_gradient_is_the_gradient_of_the_figure() -> None:
    bundles = [guidance_bundle(frozen_guidance(SEEDS), SEEDS)]
    states, actions = torch.randn(1, 6, 3), (torch.rand(1, 6, 2) * 2 - 1).requires_grad_()

    def gradient(judge: Any) -> Tensor:
        (found,) = torch.autograd.grad(judge.q(states, actions).sum(), actions)
        return found

    each = torch.stack([gradient(judge) for judge in judges_apart(bundles)])
    near(gradient(models.build_judge(bundles, "mean", 1, "cpu")), each.mean(0), 1e-6)
    values = torch.stack([judge.q(states, actions) for judge in judges_apart(bundles)])  # (K, 1, B)
    lowest = each.gather(0, values.argmin(0)[None, ..., None].expand(1, -1, -1, 2))[0]
    near(gradient(models.build_judge(bundles, "min", 1, "cpu")), lowest, 1e-6)


@pytest.mark.parametrize(
    ("algorithm", "rule"),
    [
        ("idql", "min"),
        ("dql", "mean"),
        ("dql", "median"),
        ("dql", "min"),
        ("edp", "mean"),
        ("dac", "median"),
        ("cfg", "min"),
    ],
)
def test_a_policy_learns_under_all_members_at_once(algorithm: str, rule: str) -> None:
    """As under one alone where all are that one; a member of many is its seed alone; and nothing frozen moves."""
    three = guidance_bundle(frozen_guidance((5, 6, 7)), (5, 6, 7))
    before = copy.deepcopy(three)

    def taught(teachers: Sequence[Bundle], seeds: Sequence[int], ensemble: str) -> Bundle:
        weighted = {"advantage_weight": "exponential"} if algorithm == "idql" else {}
        table = {"algorithm": algorithm, "steps": 8, "batch_size": 16, "ensemble": ensemble} | weighted
        return models.train_policy(make_experiment(seeds, policy=table), toy_dataset(noisy_columns()), teachers, Run())

    many, alone = taught([three], (8, 9), rule), taught([three], (9,), rule)
    for name, weight in alone.weights.items():
        near(many.weights[name][1:], weight, 1e-4)
    assert same(three.model_dump(), before.model_dump()) and same(many.guidances[0].weights, three.acting)
    one = select_members(three, [1])
    (repeated, single), other = (taught([one] * n, (9,), way) for n, way in ((3, rule), (1, "none"))), alone.weights
    for name, weight in single.weights.items():
        near(repeated.weights[name], weight, 1e-4)
    assert not same(single.weights, other)


@pytest.mark.parametrize(("scheme", "count"), [("guidance-first", 0), ("joint", 1), ("unguided", 1)])
def test_teachers_and_scheme_agree(scheme: str, count: int) -> None:
    experiment = make_experiment(policy={"scheme": scheme})
    with pytest.raises(MdptError, match=f"scheme {scheme}: got {count} teachers; guidance-first needs one or more"):
        models.train_policy(
            experiment, toy_dataset(noisy_columns()), [guidance_bundle(frozen_guidance(SEEDS), SEEDS)] * count, Run()
        )


def test_ranking_by_an_ensemble_takes_its_best_candidate() -> None:
    bundles = [guidance_bundle(frozen_guidance((seed,)), (seed,)) for seed in SEEDS]
    policy, states = make_policy(SEEDS, 3, 2), torch.randn(2, 7, 3)
    offered = offers(policy, states, candidates=6).view(2, 7, 6, 2)
    repeated = states.repeat_interleave(6, dim=1)
    judged = [
        judge.q(repeated[s : s + 1], offered[s : s + 1].flatten(1, 2))
        for judge in judges_apart(bundles)
        for s in (0, 1)
    ]
    values = torch.stack(judged).view(2, 2, 7, 6)  # (K, S, B, N)
    ranks = values.argsort(-1).argsort(-1).float()
    for rule, scores in (
        ("mean", values.mean(0)),
        ("min", values.amin(0)),
        ("rank", ranks.mean(0)),
    ):
        chosen = choose(policy, models.build_judge(bundles, rule, 2, "cpu", 6), states, candidates=6)
        best = scores.gather(-1, (offered == chosen[:, :, None]).all(-1).float().argmax(-1, keepdim=True))[..., 0]
        near(best, scores.amax(-1), 1e-6)


class KnownValues:
    """A guidance of two members with V = s and s / 2, and Q - V = a and -a, of the first observation and action."""

    members, value = 2, SimpleNamespace(vector=torch.zeros(2, 1))

    def v(self, observations: Tensor) -> Tensor:
        return observations[..., 0] * torch.tensor([[1.0], [0.5]])

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.v(observations) + actions[..., 0] * torch.tensor([[1.0], [-1.0]])


def held_out_rows(terminal: bool) -> HeldOut:
    """Two episodes of three rows, which end so; the actions are what is missing from V to the return."""
    ends = np.array([False, False, True] * 2)
    states, rewards = np.array([1, 2, 3, 2, 0, 1], np.float32), np.array([1, 1, 4, 0, 2, 2], np.float32)
    returns = np.array([1 + (1 + 4 / 2) / 2, 1 + 4 / 2, 4, 0 + (2 + 2 / 2) / 2, 2 + 2 / 2, 2])  # discount 0.5
    actions = (returns - states)[:, None].astype(np.float32)
    return HeldOut(states[:, None], actions, rewards, ends & terminal, ends & (not terminal))


def test_the_judgement_of_a_guidance_by_hand() -> None:
    held_out = held_out_rows(terminal=True)
    found = models.guidance_quality(KnownValues(), held_out, 0.5, 7)  # type: ignore[arg-type]
    returns, states = np.array([2.5, 3, 4, 1.5, 3, 2]), held_out.observations[:, 0]
    assert (found.rows, found.bootstrapped) == (6, False)
    assert found.correlation == pytest.approx([np.corrcoef(states, returns)[0, 1]] * 2)
    actions = held_out.actions[:, 0]
    gains = actions - np.mean([np.roll(actions, k) for k in (1, 2, 3, 4)], axis=0)
    expected = [np.corrcoef(*pair)[0, 1] for pair in ((gains, returns - states), (-gains, returns - states / 2))]
    assert found.advantage_correlation == pytest.approx(expected)
    assert found.mean_v == pytest.approx([1.5, 0.75]) and found.mean_return == pytest.approx([16 / 6] * 2)

    found = models.guidance_quality(KnownValues(), held_out_rows(terminal=False), 0.9, 7)  # type: ignore[arg-type]
    assert (found.rows, found.bootstrapped) == (4, True)  # all but the last rows, whose V stands for the rest
    by_hand = [
        [1 + 0.9 * (1 + 0.9 * end), 1 + 0.9 * end, 0 + 0.9 * (2 + 0.9 * last), 2 + 0.9 * last]
        for end, last in ((3, 1), (1.5, 0.5))
    ]
    assert found.mean_return == pytest.approx([np.mean(each) for each in by_hand], rel=1e-6)
    expected = [np.corrcoef([1, 2, 2, 0], each)[0, 1] for each in by_hand]
    assert found.correlation == pytest.approx(expected)
    assert found.left_out == 0


def test_the_means_of_a_guidance_cover_what_a_time_limit_cut_off() -> None:
    """The first episode ends, the second is cut off: alone, the first would tell of successes only."""
    held_out, first = held_out_rows(terminal=True), np.arange(6) < 3
    mixed = replace(held_out, terminals=held_out.terminals & first, timeouts=held_out.terminals & ~first)
    found = models.guidance_quality(KnownValues(), mixed, 0.9, 7)  # type: ignore[arg-type]
    assert (found.rows, found.left_out, found.bootstrapped) == (3, 2, False)
    returns = [1 + 0.9 * (1 + 0.9 * 4), 1 + 0.9 * 4, 4]
    assert found.correlation == pytest.approx([np.corrcoef([1, 2, 3], returns)[0, 1]] * 2)
    means = [np.mean([*returns, 0.9 * (2 + 0.9 * last), 2 + 0.9 * last]) for last in (1, 0.5)]
    assert found.mean_return == pytest.approx(means, rel=1e-6)
    assert found.mean_v == pytest.approx([np.mean([1, 2, 3, 2, 0]), np.mean([1, 2, 3, 2, 0]) / 2])


def test_a_guidance_is_judged_at_each_snapshot() -> None:
    saved: list[bool] = []
    keep = Run(save=lambda bundle: saved.append(bool(bundle.quality)))
    bundle = learn("guidance idql", run=keep, steps=40, snapshots=4)
    assert saved == [False, False, False, True]  # a complete one is never without
    assert [entry.step for entry in bundle.quality] == [10, 20, 30, 40]
    last = models.guidance_quality(build_guidance(bundle, "cpu"), toy_dataset(noisy_columns()).held_out, 0.99, 40)
    assert bundle.quality[-1] == last and bundle.quality[0].mean_v != last.mean_v


def test_judging_offline_by_hand() -> None:
    teacher, other = guidance_bundle(frozen_guidance(SEEDS), SEEDS), guidance_bundle(make_guidance((9,), 3, 2), (9,))
    bundle, how, held_out = (
        policy_bundle(SEEDS, teacher),
        Inference(candidates=4),
        toy_dataset(noisy_columns()).held_out,
    )
    found = models.judge_offline(
        bundle, [teacher], how, held_out, 5, {"own": ([teacher], "none", False), "other": ([other], "none", False)}
    )
    policy, random = build_policy(bundle, "cpu"), Randomness(SEEDS, "evaluate 5 offline")
    observations, data = torch.from_numpy(held_out.observations), torch.from_numpy(held_out.actions)
    states, noises = observations.expand(2, -1, -1), policy.noises(random, "act", 20 * 4)
    chosen = act(policy, build_guidance(teacher, "cpu"), states, noises, random.uniform("selection", 20, 4), how)
    assert found.states == 20
    near(torch.tensor(found.distance), [float((chosen[i] - data).norm() / math.sqrt(40)) for i in range(2)], 1e-5)
    near(torch.tensor(found.chance), (data[:10] - data[10:]).norm() / math.sqrt(20), 1e-5)
    first = policy.sample(states, noises.view(2, -1, 20, 4, 2)[:, :, :, 0])
    near(torch.tensor(found.distance_one), [float((first[i] - data).norm() / math.sqrt(40)) for i in range(2)], 1e-5)
    assert not set(found.distance_one) & set(found.distance)
    for name, judge, members in (("own", teacher, (0, 1)), ("other", other, (0, 0))):
        for i, member in enumerate(members):
            guidance = build_guidance(select_members(judge, [member]), "cpu")
            ours, theirs = guidance.q(observations[None], chosen[[i]]), guidance.q(observations[None], data[None])
            for key, expected in (
                ("policy", ours.mean()),
                ("data", theirs.mean()),
                ("higher", (ours > theirs).float().mean()),
            ):
                near(torch.tensor(getattr(found.values[name], key)[i]), expected, 1e-5)
            if name == "own":
                assert found.gain is not None
                near(torch.tensor(found.gain[i]), (ours - theirs).mean() / guidance.v(observations[None]).std(), 1e-4)
    for guidances, rule in (([], "none"), ([teacher], "rank")):  # none has values
        how = Inference(4, ensemble=rule)
        assert models.judge_offline(bundle, guidances, how, held_out, 5, {}).gain is None


UNREAD: list[tuple[str, dict[str, Any], dict[str, list[str]]]] = [
    ("policy", {"policy": {"algorithm": "bc", "eta": 0.3}}, {"bc": ["policy.eta"]}),
    (
        "policy",
        {"policy": {"algorithm": "idql", "advantage_weight": "hard", "dropout": 0.2, "advantage_expectile": 0.6}},
        {"advantage_weight hard": ["policy.advantage_expectile"]},
    ),
    (
        "policy",
        {"policy": {"algorithm": "dql", "dropout": 0.2, "sampling_steps": 3, "advantage_expectile": 0.6}},
        {
            "network mlp": ["policy.dropout"],
            "sampler ddpm": ["policy.sampling_steps"],
            "dql": ["policy.advantage_expectile"],
        },
    ),
    ("policy", {"policy": {"scheme": "unguided", "guidance_from": 0.1}}, {"scheme unguided": ["policy.guidance_from"]}),
    ("policy", {"guidance": {"algorithm": "mc", "eta": 0.1}}, {}),
    (
        "policy",
        {"guidance": {"algorithm": "dql", "steps": 9, "eta": 2.0, "expectile": 0.6}, "policy": {"scheme": "joint"}},
        {"scheme joint": ["guidance.steps", "guidance.eta"], "dql": ["guidance.expectile"]},
    ),
    (
        "guidance",
        {"guidance": {"value_loss": "gumbel", "expectile": 0.6, "gumbel_temperature": 2.0, "eta": 2.0}},
        {"value_loss gumbel": ["guidance.expectile"], "idql": ["guidance.eta"]},
    ),
    (
        "guidance",
        {"guidance": {"algorithm": "mc", "expectile": 0.6}, "policy": {"eta": 3.0}},
        {"mc": ["guidance.expectile"]},
    ),
    (
        "guidance",
        {"guidance": {"conservatism": 0, "conservative_share": 0.5}},
        {"conservatism 0": ["guidance.conservative_share"]},
    ),
    ("guidance", {"guidance": {"conservative_share": 0.5}}, {}),
]


@pytest.mark.parametrize(("kind", "tables", "unread"), UNREAD)
def test_fields_that_have_no_effect_are_named(kind: Any, tables: dict[str, Any], unread: dict[str, list[str]]) -> None:
    assert models.unread_fields(models.check_algorithms(Experiment.model_validate(tables)), kind) == unread


@pytest.mark.parametrize("kind", KINDS)
def test_fields_without_effect_change_no_bit(kind: str) -> None:
    """The other fields of registry lines, set to other values, leave training as it is."""
    name, algorithm = kind.split()
    others: dict[str, Any] = {
        "guidance": {
            "expectile": 0.6,
            "gumbel_temperature": 2.0,
            "bootstrap_candidates": 2,
            "eta": 3.0,
            "ema_decay": 0.5,
        }
        | {
            "actor_hidden": [8],
            "time_features": 4,
            "diffusion_steps": 2,
            "actor_learning_rate": 0.1,
            "value_loss": "gumbel",
        }
        | {"conservative_actions": 2, "conservative_noise": 0.1, "conservative_share": 0.5},
        "policy": {
            "eta": 3.0,
            "label_dropout": 0.5,
            "label_share": 0.5,
            "advantage_expectile": 0.6,
            "advantage_inverse_temperature": 2.0,
        }
        | {"dropout": 0.5, "heads": 2, "sampling_steps": 3, "variance": "beta", "advantage_weight": "hard"},
    }
    owned = {field for registry in models.CHOICES[name].values() for line in registry.values() for field in line.reads}  # type: ignore[index]
    owned |= set(models.CONSERVATIVE) if name == "guidance" else set()
    assert others[name].keys() == owned - {"ensemble", "guidance_from", "guidance_until"}
    teacher = guidance_bundle(frozen_guidance(SEEDS), SEEDS)

    def weights(**settings: Any) -> dict[str, Tensor]:
        return learn(kind, teacher, steps=3, batch_size=8, snapshots=1, **settings).weights

    run = Experiment.model_validate({name: {"algorithm": algorithm} | others[name]})
    unread = models.unread_fields(models.check_algorithms(run), name)  # type: ignore[arg-type]
    ignored = {field.partition(".")[2] for fields in unread.values() for field in fields}
    read = {field: value for field, value in others[name].items() if field not in ignored}
    assert same(weights(**read), weights(**others[name]))


@pytest.mark.parametrize(
    ("guide", "candidates", "acts"), [("rank", 3, True), ("rank", 2, False), ("gradient", 3, False)]
)
def test_support_acts_where_candidates_can_differ_in_distance(guide: Any, candidates: int, acts: bool) -> None:
    run = make_experiment()
    evaluation = EvaluationSection(guide=guide, candidates=candidates, support=0.3)
    how, effective = models.pick_inference(run.model_copy(update={"evaluation": evaluation}), True, 1)
    assert (how.support, effective["support"]) == (0.3 * acts, acts)


def test_labels_act_once_they_are_learned() -> None:
    window = {"algorithm": "cfg", "steps": 100, "guidance_from": 0.5}
    for step, w in ((50, 0.0), (51, 1.0), (100, 1.0)):
        how, acts = models.pick_inference(make_experiment(policy=window), True, step)
        assert (how.w, acts["w"]) == (w, bool(w))
    late = make_experiment(policy=window | {"guidance_from": 0.995}).policy
    assert not models.learns_under_guidance(late)  # no step lies in it


@pytest.mark.parametrize(
    ("until", "step", "labelled"), [(1.0, 100, True), (0.995, 100, True), (0.9, 90, True), (0.9, 100, False)]
)
def test_w_needs_steps_without_a_label(until: float, step: int, labelled: bool) -> None:
    policy = {"algorithm": "cfg", "steps": 100, "guidance_until": until, "label_dropout": 0.0}
    run = make_experiment(policy=policy)
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"w": 0.0})})
    with pytest.raises(MdptError, match="only 1 is possible") if labelled else contextlib.nullcontext():
        models.pick_inference(run, True, step)


@pytest.mark.parametrize(
    ("sampler", "temperature", "on", "act"),
    [
        ("ddpm", 0.5, "steps", (True, True)),
        ("ddpm", 1.0, "steps", (True, False)),
        ("dpm-solver++", 0.5, "steps", (False, False)),  # whose only noise is the first
        ("dpm-solver++", 0.5, "start", (True, True)),
    ],
)
def test_a_temperature_of_no_noise_does_not_act(sampler: str, temperature: float, on: str, act: Any) -> None:
    run = make_experiment(policy={"sampler": sampler})
    evaluation = run.evaluation.model_copy(update={"temperature": temperature, "temperature_on": on})
    _, acts = models.pick_inference(run.model_copy(update={"evaluation": evaluation}), True, 1)
    assert (acts["temperature"], acts["temperature_on"]) == act


def test_a_loaded_agent_acts_in_the_environments_unit(tmp_path: Path) -> None:
    path, teacher = tmp_path / "p.pt", guidance_bundle(frozen_guidance(SEEDS), SEEDS)
    bundle = policy_bundle(SEEDS, teacher)
    save_bundle(path, bundle)
    observations, how = np.random.default_rng(0).standard_normal((40, 3)), {"candidates": 5, "seed": 4}
    actions = load_agent(path, member=1, **how)(observations)
    low, high = np.array(TOY.action_low), np.array(TOY.action_high)
    assert actions.shape == (40, 2) and ((low <= actions) & (actions <= high)).all()
    assert (actions[:, 1] > 1).any()

    member, guidance = select_members(bundle, [1]), select_members(teacher, [1])
    agent = Agent(member, [guidance], Inference(candidates=5), seed=4, episodes=range(40))
    scaled = agent(observations.astype(np.float32), np.arange(40))
    near(torch.from_numpy(actions), low + (scaled + 1) / 2 * (high - low), 1e-5)

    single = load_agent(str(path), member=1, **how)
    first, second = single(observations[0]), single(observations[0])
    assert first.shape == (2,) and not np.array_equal(first, second)  # each step draws anew
    near(torch.from_numpy(first), actions[0], 1e-5)
    assert not np.array_equal(load_agent(path, **how)(observations), actions)  # member 0

    save_bundle(tmp_path / "g.pt", guidance_bundle(make_guidance((7,), 3, 2), (7,)))  # one member serves all
    assert not np.array_equal(load_agent(path, tmp_path / "g.pt", member=1, **how)(observations), actions)
    both = [path, tmp_path / "g.pt"]  # all three members as one
    agent = Agent(
        member,
        [*bundle.guidances, *read_guidances(both[1])],
        Inference(5, ensemble="min"),
        seed=4,
        episodes=range(40),
    )
    scaled = agent(observations.astype(np.float32), np.arange(40))
    actions = load_agent(path, both, member=1, ensemble="min", **how)(observations)
    near(torch.from_numpy(actions), low + (scaled + 1) / 2 * (high - low), 1e-5)
    scaled = Agent(member, [], Inference(), seed=4, episodes=range(40))(observations.astype(np.float32), np.arange(40))
    actions = load_agent(path, "none", member=1, **how)(observations)
    near(torch.from_numpy(actions), low + (scaled + 1) / 2 * (high - low), 1e-5)
    with pytest.raises(MdptError, match="2 guidances act together only as an ensemble"):
        load_agent(path, both)
    with pytest.raises(MdptError, match="none cannot be combined"):
        load_agent(path, ["none", path])
    with pytest.raises(MdptError, match="seed = -1"):
        load_agent(path, seed=-1)
    held = bundle.experiment.model_copy(update={"evaluation": EvaluationSection(**how)})
    save_bundle(tmp_path / "held.pt", but(bundle, experiment=held))  # its own settings act, the seed among them
    assert np.array_equal(
        load_agent(tmp_path / "held.pt", member=1)(observations), load_agent(path, member=1, **how)(observations)
    )
    for wrong in (2, "0", -1):
        with pytest.raises(MdptError, match=f"has no member {wrong}; there are 0 to 1"):
            load_agent(path, member=wrong)  # type: ignore[arg-type]
    assert single(np.zeros((0, 3))).shape == (0, 2)  # no episode runs any more
    for broken in (np.zeros(2), np.zeros((2, 2, 3)), np.full(3, np.nan)):
        with pytest.raises(MdptError, match=r"observations of shape .*; expected \(3,\) or \(E, 3\), finite"):
            single(broken)
    for thing, name in (({"position": np.zeros(3)}, "dict"), ("x", "str"), ([[1, 2, 3], [4]], "list")):
        with pytest.raises(MdptError, match=rf"no array of numbers, but {name}; expected \(3,\) or \(E, 3\), finite"):
            single(thing)  # type: ignore[arg-type]
    save_bundle(tmp_path / "other.pt", but(teacher, environment=replace(TOY, id="Other-v0")))
    with pytest.raises(MdptError, match="do not fit together: id Toy-v0 against Other-v0"):
        load_agent(path, tmp_path / "other.pt")
