"""Windows of [data] horizon rows: batches, losses, judgement, acting, and the Transformer that denoises them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models import fresh_products, near  # noqa: F401
from torch import Tensor, nn

from mdpt import data, models
from mdpt.data import DataSection, Experiment, GuidanceSection, MdptError, PolicySection
from mdpt.models import (
    GUIDANCES,
    POLICIES,
    Agent,
    Batch,
    Bundle,
    Inference,
    Linear,
    Randomness,
    Run,
    Transitions,
    load_agent,
    save_bundle,
    select_members,
)

SMALL: dict[str, Any] = {"steps": 12, "batch_size": 16, "snapshots": 1}
SIGNS = "toy_environment:Signs-v0"


def episodes_of(lengths: list[int], ends: str, o: int = 3, a: int = 2, seed: int = 0) -> dict[str, Any]:
    """Columns of random episodes; ends: "t" terminal, "l" time limit or "-" neither (the last one only), of each."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    last = np.cumsum(lengths) - 1
    columns = {
        "observations": rng.standard_normal((n, o)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, a)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "next_observations": rng.standard_normal((n, o)).astype(np.float32),
    }
    for key, mark in (("terminals", "t"), ("timeouts", "l")):
        columns[key] = np.zeros(n, bool)
        columns[key][last[[end == mark for end in ends]]] = True
    return columns


def load(columns: dict[str, Any], horizon: int, has_next: bool = True, **section: Any) -> data.Dataset:
    columns = {key: column for key, column in columns.items() if has_next or key != "next_observations"}
    settings = {"held_out": 0.0, "reward_scale": "none", "reference": (0.0, 1.0)} | section
    return data.load_dataset(DataSection(source="arrays", horizon=horizon, **settings), arrays=columns)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("has_next", [True, False])
@pytest.mark.parametrize("horizon", [1, 2, 4, 9])
def test_windows_against_brute_force(
    horizon: int, has_next: bool, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    lengths, ends, g = [5, 1, 7, 3, 2, 6], "tlltl-", 0.9
    columns = episodes_of(lengths, ends)
    source = Transitions(load(columns, horizon, has_next, storage=storage), "cpu")
    # episode by episode, the rows that are transitions, in file order
    episodes, start = [], 0
    for length, end in zip(lengths, ends, strict=True):
        episodes.append(list(range(start, start + length - (not has_next and end in "l-"))))
        start += length
    order = [row for episode in episodes for row in episode]
    assert len(source) == len(order)
    batch = source.take(torch.arange(len(order)).repeat(2, 1))
    rewards, discounts = batch.discounted(g)
    next_actions, exists = batch.next_actions()
    known = batch.known()

    def following(place: int) -> np.ndarray[Any, Any]:  # actions of H rows from this place of `order` on
        return np.concatenate([columns["actions"][order[(place + i) % len(order)]] for i in range(horizon)])

    for episode, length, end in zip(episodes, lengths, ends, strict=True):
        for i, row in enumerate(episode):
            place, window = order.index(row), episode[i : i + horizon]
            own = len(window)
            for s in range(2):
                assert np.array_equal(batch.observations[s, place], columns["observations"][row])
                assert np.array_equal(batch.actions[s, place], following(place))
                counted = torch.ones(2 * horizon) > 0 if known is None else known[s, place]
                assert counted.tolist() == [True] * 2 * own + [False] * 2 * (horizon - own)
                total = sum(g**j * columns["rewards"][each] for j, each in enumerate(window))
                assert rewards[s, place] == pytest.approx(total, abs=1e-5)
                assert discounts[s, place] == pytest.approx(g**own)
                after = columns["next_observations"][window[-1]] if has_next else None
                if after is None:  # the row that follows; after a terminal nothing is asked for
                    after = columns["observations"][min(window[-1] + 1, sum(lengths) - 1)]
                assert np.array_equal(batch.next_observations[s, place], after)
                assert bool(batch.terminals[s, place]) == columns["terminals"][window[-1]]
                more = i + own < len(episode)
                cut = window[-1] + 1 if not has_next and end in "l-" and not more else None
                assert bool(exists[s, place]) == (more or cut is not None)
                if more:
                    assert np.array_equal(next_actions[s, place], following(place + own))
                elif cut is not None:  # the row at the limit is no transition, its action is known
                    rest = following(place + own)[: 2 * (horizon - 1)]
                    assert np.array_equal(next_actions[s, place], np.concatenate([columns["actions"][cut], rest]))


def test_held_out_windows_against_brute_force() -> None:
    columns = episodes_of([5, 1, 7, 3], "tllt")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    held_out, n = data.HeldOut(*(columns[key] for key in keys)), 16
    rows = np.random.default_rng(1).permutation(n)
    actions, known = held_out.windows(rows, 4)
    stops = [5, 6, 13, 16]
    for row, window, counted in zip(rows.tolist(), actions, known, strict=True):
        assert np.array_equal(window, columns["actions"][[(row + i) % n for i in range(4)]])
        assert counted.tolist() == [row + i < next(stop for stop in stops if stop > row) for i in range(4)]


@functools.cache
def some_data(horizon: int, has_next: bool = True) -> data.Dataset:
    """Forty short episodes of every kind; some are held out."""
    return load(episodes_of([6, 3, 1, 9] * 10, "tltl" * 10), horizon, has_next, held_out=0.2)


def train(kind: str, horizon: int, seeds: Sequence[int] = (3, 4), run: Run | None = None, **settings: Any) -> Bundle:
    """`mdpt guidance` or `mdpt policy` on `some_data`; a policy learns under an IDQL guidance, or jointly."""
    name, algorithm = kind.split()
    tables = {
        "guidance": {**SMALL, "hidden": [16], "actor_hidden": [16]},
        "policy": {**SMALL, "hidden": [16, 16], "time_features": 8},
    }
    tables[name] |= {"algorithm": algorithm} | settings
    experiment = Experiment(
        seeds=list(seeds),
        data=some_data(horizon).section,
        guidance=GuidanceSection(**tables["guidance"]),
        policy=PolicySection(**tables["policy"]),
    )
    experiment = models.check_algorithms(experiment)
    if name == "guidance":
        return models.train_guidance(experiment, some_data(horizon), run or Run())
    first = experiment.policy.scheme == "guidance-first"
    teachers = [models.train_guidance(experiment, some_data(horizon), Run())] if first else []
    return models.train_policy(experiment, some_data(horizon), teachers, run or Run())


KINDS = [*(f"guidance {name}" for name in GUIDANCES), *(f"policy {name}" for name in POLICIES)]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_one_row_leave_every_bit_of_a_training_as_it_was(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against batches of whole rows, an error of the noise without a mask, and a discount that is one number."""
    now = train(kind, 1)

    def take(self: Transitions, rows: Tensor) -> Batch:
        taken = self.rows.index_select(0, rows.flatten()).view(*rows.shape, -1)
        observations, actions, rewards, after, terminals = torch.split(taken, self.sizes, dim=-1)
        return Batch(observations, actions, rewards, after, terminals.squeeze(-1), torch.ones_like(rows), rows, self)

    monkeypatch.setattr(Transitions, "take", take)
    monkeypatch.setattr(Batch, "known", lambda self: None)
    monkeypatch.setattr(Batch, "discounted", lambda self, discount: (self.rewards.squeeze(-1), discount))
    before = train(kind, 1)
    assert now.weights.keys() == before.weights.keys()
    assert all(torch.equal(now.weights[name], before.weights[name]) for name in now.weights)


@pytest.mark.parametrize("network", ["mlp", "resnet"])
def test_the_parts_of_the_first_layer_are_added_in_the_order_of_before(network: str) -> None:
    """To the bit; another order rounds otherwise."""
    section = PolicySection(network=network, hidden=[32, 32], time_features=8, dropout=0.0)
    denoiser, g = models.Denoiser(Randomness([0], "init"), section, 3, 2, False), torch.Generator().manual_seed(0)
    actions, states = torch.randn(1, 50, 2, generator=g), torch.randn(1, 50, 3, generator=g)
    condition, time = denoiser.condition(states), denoiser.times()[:, 1:2]
    x, trunk = denoiser.action(actions) + condition + time, denoiser.trunk
    if isinstance(trunk, models.Perceptron):
        for layer in trunk.layers:
            x = layer(models.mish(x))
    else:
        for block in trunk.blocks:  # type: ignore[union-attr]
            x = block(x, None)
    assert torch.equal(denoiser(actions, time, condition), denoiser.out(models.mish(x)))


def test_the_noise_of_missing_actions_does_not_count() -> None:
    predicted, noise = torch.tensor([[[1.0, 3.0], [2.0, 5.0]]]), torch.zeros(1, 2, 2)
    known = torch.tensor([[[True, True], [True, False]]])
    near(models.noise_loss(predicted, noise, known=known)[0], [(5 + 2) / 2])
    near(models.noise_loss(predicted, noise, torch.tensor([[1.0, 3.0]]), known)[0], [(5 + 3 * 2) / 2])


@pytest.mark.parametrize("algorithm", POLICIES)
@pytest.mark.parametrize("guided", [False, True])
def test_no_policy_learns_from_the_noise_of_missing_actions(algorithm: str, guided: bool) -> None:
    """In windows of which no row but the first is their own, where the output layer has no gradient for the others."""
    source = Transitions(load(episodes_of([1] * 9, "t" * 9), 3), "cpu")
    section = PolicySection(algorithm=algorithm, hidden=[8], advantage_weight="expectile", eta=1e-9)
    normalizer = models.Normalizer(torch.zeros(3), torch.ones(3))
    policy = models.Policy(Randomness([0], "init"), normalizer, section, 3, 6, 3)
    guidance = models.Guidance(Randomness([0], "init"), normalizer, GuidanceSection(hidden=[8]), 3, 6)
    judge = guidance.requires_grad_(False) if guided else None
    policy.loss(source.take(torch.arange(9)[None]), judge, Randomness([0], "train"))[0].sum().backward()
    gradient = policy.denoiser.out.weight.grad
    assert gradient is not None and gradient[0, :, :2].abs().min() > 1e-5
    assert gradient[0, :, 2:].abs().max() < 1e-7  # what eta leaves of the values of all actions


def test_values_fall_before_the_end_of_an_episode() -> None:
    """Windows that an episode's end cuts are kept: without them, nothing would be learned of its last rows."""
    n, g = 240, 0.9
    columns = {
        "observations": np.tile(np.eye(6, dtype=np.float32), (n // 6, 1)),
        "actions": np.random.default_rng(0).uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": np.ones(n, np.float32),
        "terminals": np.arange(n) % 6 == 5,
        "timeouts": np.zeros(n, bool),
    }
    dataset = load(columns, 4, has_next=False, normalization="none")
    for algorithm in GUIDANCES:
        section = GuidanceSection(
            algorithm=algorithm, steps=150, batch_size=64, discount=g, hidden=[32], expectile=0.5, tau=0.1,
            learning_rate=1e-2, actor_hidden=[8],
            diffusion_steps=2, eta=0.0,
        )  # fmt: skip
        experiment = Experiment(seeds=[0], data=dataset.section, guidance=section)
        guidance = models.build_guidance(models.train_guidance(experiment, dataset, Run()), "cpu")
        near(guidance.v(torch.eye(6)[None])[0], [sum(g**i for i in range(6 - row)) for row in range(6)], 0.15)


LEARNERS = [*KINDS, "policy joint"]


@pytest.mark.parametrize(
    ("kind", "network"),
    [(kind, net) for kind in LEARNERS for net in (["mlp", "transformer"] if kind.startswith("policy") else [None])],
)
def test_a_run_on_windows_goes_on_and_its_members_are_apart(kind: str, network: str | None) -> None:
    settings: dict[str, Any] = {} if network is None else {"network": network}
    if kind == "policy joint":
        kind, settings = "policy dql", settings | {"scheme": "joint"}
    whole, kept = train(kind, 3, **settings), []
    stopping = Run(save=lambda bundle: kept.append(copy.deepcopy(bundle)), interrupted=lambda: 2 * (len(kept) == 0))
    with pytest.raises(MdptError, match="interrupted"):
        train(kind, 3, run=stopping, **settings)
    resumed = train(kind, 3, run=Run(begun=kept[-1]), **settings)
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    alone = train(kind, 3, seeds=[4], **settings)
    for name, weights in alone.acting.items():
        near(whole.acting[name].chunk(2)[1], weights, 1e-5)
    with pytest.raises(MdptError, match=r"\[data\] horizon was 3, is 2"):
        train(kind, 2, run=Run(begun=kept[-1]), **settings)


def test_a_judgement_takes_the_windows_of_the_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, held_out = train("guidance idql", 3), some_data(3).held_out
    guidance, count = models.build_guidance(bundle, "cpu"), len(held_out.rewards)
    windows = torch.from_numpy(held_out.windows(np.arange(count), 3)[0]).flatten(1)
    states = torch.from_numpy(held_out.observations).expand(2, -1, -1)
    apart = [max(1, count * k // 5) for k in range(1, 5)]
    theirs = torch.stack([guidance.q(states, windows.roll(k, 0).expand(2, -1, -1)) for k in apart]).mean(0)
    monkeypatch.setattr(models, "QUALITY_ROWS", 7)  # built block by block
    v, q, others = models._held_out_values(guidance, held_out, 3)
    near(torch.from_numpy(v).float(), guidance.v(states))
    near(torch.from_numpy(q).float(), guidance.q(states, windows.expand(2, -1, -1)))
    near(torch.from_numpy(others).float(), theirs)
    assert bundle.quality[0].rows > 0


def test_a_distance_counts_the_actions_of_the_own_episode_only() -> None:
    policy, held_out = train("policy bc", 3, scheme="unguided"), some_data(3).held_out
    found = models.judge_offline(policy, [], Inference(execute=3), held_out, 0, {})
    count = len(held_out.rewards)
    windows, known = map(torch.from_numpy, held_out.windows(np.arange(count), 3))
    assert found.states == count and not known.all()
    actor, random = models.build_policy(policy, "cpu"), Randomness(policy.seeds, "evaluate 0 offline")
    chosen = actor.sample(torch.from_numpy(held_out.observations).expand(2, -1, -1), actor.noises(random, "act", count))
    apart = [(one.view(count, 3, 2) - windows)[known].square().mean().sqrt().item() for one in chosen]
    assert found.distance == pytest.approx(apart, rel=1e-5)
    both = known & known.roll(count // 2, 0)
    chance = (windows - windows.roll(count // 2, 0))[both].square().mean().sqrt().item()
    assert found.chance == pytest.approx(chance, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the Transformer


def a_denoiser(horizon: int, labels: bool = False, **settings: Any) -> models.Denoiser:
    section = PolicySection(network="transformer", hidden=[8, 8], heads=2, time_features=6, **settings)
    return models.Denoiser(Randomness([0, 1], "init"), section, 3, 2 * horizon, labels, horizon)


@torch.no_grad()
def denoised(network: models.Denoiser, actions: Tensor, observations: Tensor, labels: Tensor | None = None) -> Tensor:
    times, condition = network.times(), network.condition(observations, labels)
    return network(actions, times[:, 1:2], condition)  # type: ignore[no-any-return]


@torch.no_grad()
def stirred(network: models.Denoiser) -> models.Denoiser:
    network.vector.copy_(torch.randn(network.vector.shape, generator=torch.Generator().manual_seed(0)) / 2)
    return network


def test_a_transformer_sees_all_actions_of_a_window_and_their_places() -> None:
    g = torch.Generator().manual_seed(0)
    actions, states = torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 3, generator=g)
    fresh, network = a_denoiser(4, True), stirred(a_denoiser(4, True))
    for first, second in ((0, 3), (3, 0)):  # in both directions
        changed = actions.clone()
        changed.unflatten(-1, (4, 2))[:, :, first] += 1.0
        seen = lambda one: (denoised(one, changed, states) - denoised(one, actions, states)).unflatten(-1, (4, 2))  # noqa: B023
        assert (seen(fresh)[:, :, second] == 0).all() and seen(fresh)[:, :, first].abs().min() > 0  # gates begin at 0
        assert seen(network)[:, :, second].abs().min() > 1e-4
    swapped = actions.unflatten(-1, (4, 2)).flip(2).flatten(2)
    assert (denoised(network, swapped, states).unflatten(-1, (4, 2)).flip(2).flatten(2) - denoised(network, actions, states)).abs().max() > 0.01  # fmt: skip
    plain = denoised(network, actions, states)
    assert (denoised(fresh, actions, states + 1) == denoised(fresh, actions, states)).all()
    for other in (denoised(network, actions, states + 1), denoised(network, actions, states, torch.full((2, 5), 2))):
        assert (other - plain).abs().min() > 1e-5
    with torch.no_grad():
        later = network(actions, network.times()[:, 2:3], network.condition(states))
    assert (later - plain).abs().max() > 1e-3


def test_a_transformer_is_multihead_attention_with_adaptive_norms() -> None:
    """Against torch's own layers, member by member."""
    network, g = stirred(a_denoiser(4)), torch.Generator().manual_seed(1)
    actions, states = torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 3, generator=g)
    got, trunk = denoised(network, actions, states), network.trunk
    assert isinstance(trunk, models.Transformer)
    norm = nn.LayerNorm(8, elementwise_affine=False)

    def layer(linear: Linear, x: Tensor, s: int) -> Tensor:
        return x @ linear.weight[s] + linear.bias[s]

    with torch.no_grad():
        for s in range(2):
            condition = models.mish(network.condition(states)[s] + network.times()[s, 1])
            x = layer(network.action, actions[s].view(5, 4, 2), s) + trunk.places[s]
            for block in trunk.blocks:
                for i in range(2):
                    scale, shift, gate = layer(block.norms[i].maps, condition, s)[:, None].chunk(3, -1)
                    y = norm(x) * (1 + scale) + shift
                    if i == 0:
                        mha = nn.MultiheadAttention(8, 2, batch_first=True)
                        mha.in_proj_weight.copy_(block.attention.inward.weight[s].T)
                        mha.in_proj_bias.copy_(block.attention.inward.bias[s, 0])
                        mha.out_proj.weight.copy_(block.attention.outward.weight[s].T)
                        mha.out_proj.bias.copy_(block.attention.outward.bias[s, 0])
                        x = x + gate * mha(y, y, y, need_weights=False)[0]
                    else:
                        x = x + gate * layer(block.narrow, models.mish(layer(block.widen, y, s)), s)
            scale, shift = layer(trunk.norm.maps, condition, s)[:, None].chunk(2, -1)
            near(got[s], layer(network.out, norm(x) * (1 + scale) + shift, s).flatten(1), 1e-4)


def test_many_windows_attend_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network, g = stirred(a_denoiser(2)), torch.Generator().manual_seed(1)
    actions, states = torch.randn(2, 9, 4, generator=g), torch.randn(2, 9, 3, generator=g)
    whole, counts = denoised(network, actions, states), []
    attend = models.functional.scaled_dot_product_attention

    def counted(*parts: Tensor) -> Tensor:
        counts.append(len(parts[0]))
        return attend(*parts)

    monkeypatch.setattr(models, "MOST_WINDOWS", 4)
    monkeypatch.setattr(models.functional, "scaled_dot_product_attention", counted)
    near(denoised(network, actions, states), whole)
    assert counts == 2 * [4, 4, 4, 4, 2]  # 2 members x 9 windows, in each of 2 blocks


def test_a_transformer_has_by_default_as_many_parameters_as_the_mlp() -> None:
    for horizon in (1, 4, 8):
        sizes = []
        for name in ("mlp", "transformer"):
            section = models.check_algorithms(Experiment(policy=PolicySection(network=name))).policy
            sizes.append(models.Denoiser(Randomness([0], "i"), section, 11, 3 * horizon, False, horizon).size)
        assert 0.9 < sizes[1] / sizes[0] < 1.1


def test_heads_divide_the_width_and_are_read_by_the_transformer_alone() -> None:
    with pytest.raises(MdptError, match=r"\[policy\] heads = 4: should divide the width of hidden = \[6, 6\]"):
        models.check_algorithms(Experiment(policy=PolicySection(network="transformer", hidden=[6, 6])))
    with pytest.raises(MdptError, match="all blocks of network 'transformer' have the same width"):
        models.check_algorithms(Experiment(policy=PolicySection(network="transformer", hidden=[8, 16])))
    for network, unread in (("mlp", {"network mlp": ["policy.heads"]}), ("transformer", {})):
        run = models.check_algorithms(Experiment(policy=PolicySection(network=network, heads=2)))
        assert models.unread_fields(run, "policy") == unread


# ---------------------------------------------------------------------------------------------------- acting


def signs(episodes: int) -> dict[str, Any]:
    """Data of Signs-v0: in half of the fours, the actions have one sign."""
    rng = np.random.default_rng(0)
    sides = rng.choice([-1.0, 1.0], (episodes, 2, 4))
    sides = np.where(rng.uniform(size=(episodes, 2, 1)) < 0.5, sides[..., :1], sides)
    rewards = np.zeros(sides.shape, np.float32)
    rewards[..., 3] = np.abs(sides.sum(-1)) == 4
    return {
        "observations": np.tile(np.eye(4, dtype=np.float32), (2 * episodes, 1)),
        "actions": (sides * rng.uniform(0.2, 1, sides.shape)).astype(np.float32).reshape(-1, 1),
        "rewards": rewards.ravel(),
        "terminals": np.arange(8 * episodes) % 8 == 7,
        "timeouts": np.zeros(8 * episodes, bool),
    }


@functools.cache
def learned_values(horizon: int) -> tuple[data.Dataset, Bundle]:
    """These data, and an `idql` guidance."""
    section = DataSection(
        source="arrays", environment=SIGNS, horizon=horizon, reward_scale="none", reference=(0.0, 2.0)
    )
    values = GuidanceSection(hidden=[32, 32], steps=300, batch_size=64, learning_rate=3e-3, tau=0.02, snapshots=1)
    dataset = data.load_dataset(section, arrays=signs(1000))
    run = models.check_algorithms(Experiment(seeds=[0], data=section, guidance=values))
    return dataset, models.train_guidance(run, dataset, Run())


def learned_signs(horizon: int, **settings: Any) -> Bundle:
    """A `dql` policy that learned under it."""
    dataset, teacher = learned_values(horizon)
    policy = PolicySection(batch_size=64, eta=1.0, ema_decay=0.98, snapshots=1, **settings)
    run = models.check_algorithms(Experiment(seeds=[0], data=dataset.section, policy=policy))
    return models.train_policy(run, dataset, [teacher], Run())


def share_won(policy: Bundle) -> float:
    """With one sample for each decision, without ranking."""
    how = Inference(execute=policy.experiment.data.horizon)
    agent = Agent(select_members(policy, [0]), [], how, seed=0, episodes=range(60))
    return float(data.rollout(agent, policy.environment, range(60), seed=0).returns.mean() / 2)


def small(network: str) -> dict[str, Any]:
    if network == "transformer":
        return {"network": network, "hidden": [16], "heads": 2, "steps": 100, "learning_rate": 1e-2}
    return {"hidden": [32, 32], "steps": 300, "learning_rate": 3e-3}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("horizon, network, least, most", [(1, "mlp", 0, 0.35), (4, "mlp", 0.9, 1), (4, "transformer", 0.9, 1)])  # fmt: skip
def test_windows_learn_what_single_actions_cannot(horizon: int, network: str, least: float, most: float) -> None:
    """Four actions in a row must have one sign, and the observation does not tell that of the ones before."""
    assert least <= share_won(learned_signs(horizon, **small(network))) <= most


class Recorded(Agent):
    """An agent whose decisions are numbers that say when, for whom and what: action i of decision k is k + i / 10."""

    def decide(self, observations: np.ndarray[Any, Any], running: np.ndarray[Any, Any]) -> Any:
        self.asked = [*getattr(self, "asked", []), (self.step, running.tolist())]
        windows = len(self.asked) / 10 + np.arange(self.how.execute) / 100
        return np.tile(windows[:, None], (len(running), 1, 2))


@pytest.mark.parametrize("execute", [1, 2, 3])
def test_all_episodes_decide_at_the_same_steps_and_one_that_ends_inside_a_window_stops_there(execute: int) -> None:
    """In the toy, whose episodes have 3 to 6 steps and pay what the second action says."""
    environment = data.environment_spec("Gentle-v0")
    policy = select_members(train("policy bc", 3, scheme="unguided"), [0]).model_copy(
        update={"environment": environment}
    )
    agent = object.__new__(Recorded)
    agent.how, agent.step = Inference(execute=execute), 0
    agent.windows = np.empty((9, execute, 2), np.float32)
    played = data.rollout(agent, policy.environment, range(9), seed=0)
    lengths = played.lengths.tolist()
    assert set(lengths) > {3, 5} and max(lengths) == 6
    steps = range(0, 6, execute)
    assert agent.asked == [(step, [i for i in range(9) if lengths[i] > step]) for step in steps]
    actions = [(step // execute + 1) / 10 + step % execute / 100 for step in range(6)]
    for length, total in zip(lengths, played.returns, strict=True):
        paid = [2 + 2 * action for action in actions[:length]]  # in [0, 4]
        assert total == pytest.approx(sum(paid) + 100 * (length < 6 or total > 100), abs=1e-4)


def test_an_agent_for_other_programs_gives_windows_and_stays_stateless(tmp_path: Path) -> None:
    policy, states = train("policy dql", 3), np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    save_bundle(tmp_path / "p.pt", policy)
    whole, two = load_agent(tmp_path / "p.pt"), load_agent(tmp_path / "p.pt", execute=2)
    assert whole(states).shape == (5, 3, 2) and two(states).shape == (5, 2, 2) and two(states[0]).shape == (2, 2)
    assert two(states[:0]).shape == (0, 2, 2)
    ours, teacher = (select_members(bundle, [0]) for bundle in (policy, policy.guidances[0]))
    how = Inference(candidates=10, execute=3)
    chooser, again = Agent(ours, [teacher], how, seed=0, episodes=range(5)), load_agent(tmp_path / "p.pt")
    for call in range(3):  # each call is a decision, whatever was chosen before
        windows = data.unscale_actions(chooser.decide(states + call, np.arange(5)), policy.environment)
        assert np.array_equal(again(states + call), windows)
        if call == 0:
            assert np.array_equal(load_agent(tmp_path / "p.pt", execute=2)(states), windows[:, :2])
    save_bundle(tmp_path / "one.pt", train("policy dql", 1))
    assert load_agent(tmp_path / "one.pt")(states).shape == (5, 2)
    with pytest.raises(MdptError, match=r"\[evaluation\] execute = 4: a window has \[data\] horizon = 3 actions"):
        load_agent(tmp_path / "p.pt", execute=4)


@pytest.mark.usefixtures("fresh_products")
@pytest.mark.parametrize("horizon", [1, 3])
def test_through_onednn_no_bit_of_a_window_depends_on_how_many_episodes_there_are(horizon: int) -> None:
    if models.choose_products("oneDNN") != "oneDNN":
        pytest.skip("this processor's products are left to MKL")
    policy = train("policy dql", horizon, network="transformer", hidden=[64, 64])
    policy, teacher = select_members(policy, [1]), select_members(policy.guidances[0], [1])
    states = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    for how in (
        Inference(),
        Inference(10),
        Inference(guidance_weight=0.1),
        Inference(guidance_weight=0.1, jacobian=True),
    ):
        how = replace(how, execute=horizon)
        chosen = Agent(policy, [teacher], how, seed=0, episodes=range(40)).decide(states, np.arange(40))
        for few in ([0], [39], [2, 3], [*range(1, 20)]):
            agent = Agent(policy, [teacher], how, seed=0, episodes=few)
            assert np.array_equal(agent.decide(states[few], np.arange(len(few))), chosen[few])


def test_bundles_of_other_horizons_do_not_fit() -> None:
    with pytest.raises(MdptError, match="do not fit together: horizon 2 against 4; use bundles of one"):
        models.check_fit(train("policy bc", 2, scheme="unguided"), train("guidance mc", 4))
