"""What is learned: networks, diffusion, losses, policies, guidance, bundles, acting, the training loop.

Shapes: S members (one per seed), B batch, N candidates, O observation dimensions, A action dimensions,
T diffusion steps, E episodes, R episodes that still run, H hidden units. Observations are raw, actions are scaled to
[-1, 1], rewards are scaled by the dataset's reward scale.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import math
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Protocol, Self

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mdpt.data import (
    Array,
    Dataset,
    EnvironmentSpec,
    Experiment,
    GuidanceSection,
    HeldOut,
    Interrupted,
    MdptError,
    PolicySection,
    TrainingSection,
    Watch,
    check_experiment,
    discounted_returns,
    episode_bounds,
    reference_returns,
    rollout,
    shown,
    unscale_actions,
    version,
    written_whole,
)

# --- matrix products ----------------------------------------------------------------------------------------------


def choose_products(wanted: str | None = None) -> str:
    """Route the CPU's float32 matrix products for this process: "oneDNN" or "default"; returns which it is.

    wanted: what an earlier process used, taken where this one can; None: oneDNN on AMD's processors, for which MKL has
    only its AVX2 kernels. The processor decides, not a timing: a run that goes on must not choose otherwise because the
    machine was busy. CUDA is untouched.
    """
    exact = _onednn_is_exact()
    chosen = (wanted or ("oneDNN" if _is_amd() else "default")) if exact else "default"
    if exact:
        _switch().fp32_precision = "bf16" if chosen == "oneDNN" else "none"
    return chosen


def _switch() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)  # torch has it since 2.9


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN can be had, and multiplies in float32.

    torch sends products there only by leave to round them to bfloat16. oneDNN makes use of that leave where the
    processor has units for it, so one product is checked.
    """
    switch = _switch()
    if not hasattr(switch, "fp32_precision") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    first, second = torch.randn(2, 2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = first.double() @ second.double()
    switch.fp32_precision = "bf16"
    error = (torch.bmm(first, second) - exact).abs().max() / exact.abs().max()
    switch.fp32_precision = "none"
    return bool(error < 1e-5)


@functools.cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AuthenticAMD" in platform.processor()


# --- randomness and batches ---------------------------------------------------------------------------------------


class Randomness:
    """Named streams of random numbers, one per member (or per episode of one, when acting).

    Each draw depends on (seed, purpose, name, step) alone. So member k of many draws what seed k alone
    draws, a resumed run draws what an uninterrupted one would have, and adding a draw changes no other.
    Values are made for a block of steps at once, so that no training step loops over the members.
    """

    def __init__(self, seeds: Sequence[int | str], purpose: str, device: torch.device | str = "cpu") -> None:
        self.seeds, self.purpose, self.device, self.step = tuple(seeds), purpose, torch.device(device), 0
        self._generator = torch.Generator(self.device)
        self._blocks: dict[str, tuple[int, Tensor]] = {}

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal values, (S, *shape)."""
        return self._draw(f"normal {name}", shape, torch.float32, lambda values, g: values.normal_(generator=g))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform values in [0, 1), (S, *shape)."""
        return self._draw(f"uniform {name}", shape, torch.float32, lambda values, g: values.uniform_(generator=g))

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), (S, *shape), int64."""
        return self._draw(
            f"integers {high} {name}", shape, torch.int64, lambda values, g: values.random_(0, high, generator=g)
        )

    def _draw(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        length = max(1, min(64, 2**20 // max(1, math.prod(shape))))
        block, offset = divmod(self.step, length)
        key = f"{name} {shape}"
        if key not in self._blocks or self._blocks[key][0] != block:
            members = [
                fill(torch.empty(length, *shape, dtype=dtype, device=self.device), self._seeded(seed, key, block))
                for seed in self.seeds
            ]
            self._blocks[key] = block, torch.stack(members, dim=1)
        return self._blocks[key][1][offset]

    def _seeded(self, seed: int | str, key: str, block: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed}/{self.purpose}/{key}/{block}".encode(), digest_size=16).digest()
        generator = self._generator.manual_seed(int.from_bytes(digest[:8]) >> 1)
        if self.device.type == "cpu":  # whose Mersenne Twister takes 32 bits of a seed: fill its whole state
            state = generator.get_state()
            words = np.random.SeedSequence(int.from_bytes(digest)).generate_state(TWISTER, np.uint32)
            state[24 : 24 + 8 * TWISTER] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
            generator.set_state(state)
        return generator


class Shapes(Randomness):
    """Draws that hold no numbers, for modules of which only the shapes are asked."""

    def __init__(self, seeds: Sequence[int | str]) -> None:
        self.seeds, self.device = tuple(seeds), torch.device("meta")

    def _draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: object) -> Tensor:
        return torch.empty(len(self.seeds), *shape, dtype=dtype, device=self.device)


TWISTER = 624  # words of its state, which torch keeps in 8 bytes each, after 24 of seed and counters


@dataclass(frozen=True)
class Batch:
    """Transitions drawn for each member: observations (S, B, O), actions (S, B, A), the others (S, B)."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor


class Transitions:
    """Rows (n, 2 O + A + 2) of a dataset as one tensor, so that a batch is one gather.

    sizes: widths of the columns, in the order of `Batch`. on_disk: the rows stay there, and only batches come to the
    training device.
    """

    def __init__(self, rows: Array, sizes: Sequence[int], device: torch.device | str, on_disk: bool = False) -> None:
        self.device, self.sizes = torch.device(device), list(sizes)
        self.rows = torch.from_numpy(rows) if on_disk else torch.from_numpy(rows).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Batch:
        """The transitions of rows `index`, (S, B)."""
        rows = self.rows.index_select(0, index.flatten().to(self.rows.device)).to(self.device)
        parts = torch.split(rows.view(*index.shape, -1), self.sizes, dim=-1)
        observations, actions, rewards, next_observations, terminals = parts
        return Batch(observations, actions, rewards.squeeze(-1), next_observations, terminals.squeeze(-1))

    def sample(self, random: Randomness, batch_size: int) -> Batch:
        """A batch for each member, drawn uniformly with replacement."""
        return self.take(random.integers("batch", len(self), batch_size))


# --- networks -----------------------------------------------------------------------------------------------------


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p, v = _mish_parts(x)
        inverse = torch.rsub(v, 1.0).reciprocal_()
        factor = v.mul_(inverse)
        rest = torch.rsub(p, 1.0).mul_(inverse).square_().mul_(p)  # factor' = p ((1 - p) / (1 - v))^2
        ctx.save_for_backward(torch.addcmul(factor, x, rest))
        return factor.mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope  # type: ignore[no-any-return]


def _mish_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """p and v in x tanh(softplus(x)) = x v / (1 - v), v = p - p^2 / 2, p the sigmoid of x: one function, not three.

    Nothing cancels where x is negative, nothing overflows where it is large.
    """
    p = torch.sigmoid(x)
    return p, torch.addcmul(p, p, p, value=-0.5)


def mish(x: Tensor) -> Tensor:
    """Mish (arXiv 1908.08681)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)  # type: ignore[no-untyped-call, no-any-return]
    _, v = _mish_parts(x)
    return v.div_(torch.rsub(v, 1.0)).mul_(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "mish": mish}


class Linear(nn.Module):
    """S independent affine maps, (S, B, inputs) -> (S, B, outputs), as one batched product.

    Weights and biases start uniform in +-1/sqrt(fan_in). `copies` networks per member lie side by side on the first
    axis (twin critics: rows 2 s and 2 s + 1 belong to member s).
    """

    def __init__(
        self, random: Randomness, name: str, inputs: int, outputs: int, *, copies: int = 1, fan_in: int | None = None
    ) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(fan_in or inputs)
        weight = random.uniform(f"{name}.weight", copies, inputs, outputs)  # (S, copies, inputs, outputs)
        bias = random.uniform(f"{name}.bias", copies, 1, outputs)
        self.weight = nn.Parameter((weight.flatten(0, 1) * 2 - 1) * bound)
        self.bias = nn.Parameter((bias.flatten(0, 1) * 2 - 1) * bound)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[rows], x, self.weight[rows])


class LayerNorm(nn.Module):
    """Independent layer norms (arXiv 1607.06450), one for each of `rows` networks: (rows, B, width) -> the same."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(rows, 1, width, device=device))
        self.shift = nn.Parameter(torch.zeros(rows, 1, width, device=device))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        scale, shift = (self.scale, self.shift) if rows is None else (self.scale[rows], self.shift[rows])
        return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:]), scale)


class Stack(nn.Module):
    """Base of the networks: all parameters of a network are views into one tensor `vector`, (S copies, >= P).

    An optimizer step, an average, a norm or a copy is then one operation for all layers and members.
    """

    copies = 1
    size: int  # parameters of one network; a row is longer, and 0 from there on
    vector: Tensor

    def pack(self, vector: Tensor | None = None) -> None:
        """Move the parameters into one tensor, each row a whole number of the longest SIMD words.

        An optimizer then rounds a row the same way however many there are. vector: theirs from now on, in place of a new
        one with their values.
        """
        parameters = list(self.parameters())
        sizes = [parameter[0].numel() for parameter in parameters]
        self.size = sum(sizes)
        pieces = torch.cat([parameter.detach().flatten(1) for parameter in parameters], dim=1)
        self.vector = functional.pad(pieces, (0, -self.size % 16)) if vector is None else vector
        for parameter, piece in zip(parameters, torch.split(self.vector[:, : self.size], sizes, dim=1), strict=True):
            parameter.data = piece.view_as(parameter)

    @property
    def members(self) -> int:
        return self.vector.shape[0] // self.copies

    def frozen_copy(self) -> Self:
        """A copy that does not learn: a target network or a moving average."""
        clone = copy.deepcopy(self).requires_grad_(False)
        clone.pack()
        return clone

    def onlooker(self) -> Self:
        """The same weights, also as they learn, with no gradient to them."""
        clone = copy.deepcopy(self).requires_grad_(False)
        clone.pack(self.vector)
        return clone

    @torch.no_grad()
    def follow(self, online: Stack, rate: float) -> None:
        """self <- (1 - rate) self + rate online."""
        self.vector.lerp_(online.vector, rate)


class ValueNetwork(Stack):
    """Multilayer perceptron to one value: (S copies, B, inputs) -> (S copies, B).

    layer_norm: normalize before each activation, which keeps values of unseen inputs near seen ones (RLPD,
    arXiv 2302.02948); "tanh": before the first alone, which is a tanh then (the critics of arXiv 2506.03154's authors).
    """

    def __init__(
        self,
        random: Randomness,
        name: str,
        inputs: int,
        hidden: Sequence[int],
        activation: str,
        layer_norm: bool | str,
        copies: int = 1,
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden, 1]
        self.copies, first = copies, torch.tanh if layer_norm == "tanh" else ACTIVATIONS[activation]
        self.activations = [first, *[ACTIVATIONS[activation]] * (len(hidden) - 1)]
        self.layers = nn.ModuleList(
            Linear(random, f"{name}.{i}", sizes[i], sizes[i + 1], copies=copies) for i in range(len(sizes) - 1)
        )
        rows, normalized = copies * len(random.seeds), 1 if layer_norm == "tanh" else len(hidden) * bool(layer_norm)
        self.norms = nn.ModuleList(LayerNorm(rows, width, random.device) for width in hidden[:normalized])
        self.pack()

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        *hidden, last = self.layers
        for layer, norm, activation in zip_longest(hidden, self.norms, self.activations):
            x = layer(x, rows)
            x = activation(x if norm is None else norm(x, rows))
        return last(x, rows).squeeze(-1)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Dropout, layer norm, widening by four, back, plus the input. Source: IDQL (arXiv 2304.10573), LN-ResNet."""

    def __init__(self, random: Randomness, name: str, width: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.name, self.dropout, self.activation = name, dropout, ACTIVATIONS[activation]
        self.norm = LayerNorm(len(random.seeds), width, random.device)
        self.widen = Linear(random, f"{name}.widen", width, 4 * width)
        self.narrow = Linear(random, f"{name}.narrow", 4 * width, width)

    def forward(self, x: Tensor, random: Randomness | None) -> Tensor:
        y = x
        if random is not None and self.dropout > 0:
            survives = random.uniform(f"{self.name}.dropout", *x.shape[1:]) >= self.dropout
            y = x * (survives / (1.0 - self.dropout))
        return x + self.narrow(self.activation(self.widen(self.norm(y))))  # type: ignore[no-any-return]


class Perceptron(nn.Module):
    """Hidden layers of a denoiser, one after the other. Source: Diffusion-QL (arXiv 2208.06193)."""

    equal_widths = False

    def __init__(self, random: Randomness, section: PolicySection) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[section.activation]
        widths = enumerate(pairwise(section.hidden))
        self.layers = nn.ModuleList(Linear(random, f"hidden{i}", a, b) for i, (a, b) in widths)

    def forward(self, x: Tensor, random: Randomness | None) -> Tensor:
        x = self.activation(x)
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


class ResidualNetwork(nn.Module):
    """Residual blocks of a denoiser, all of one width. Source: IDQL (arXiv 2304.10573), LN-ResNet."""

    equal_widths = True

    def __init__(self, random: Randomness, section: PolicySection) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[section.activation]
        self.blocks = nn.ModuleList(
            ResidualBlock(random, f"block{i}", width, section.activation, section.dropout)
            for i, width in enumerate(section.hidden)
        )

    def forward(self, x: Tensor, random: Randomness | None) -> Tensor:
        for block in self.blocks:
            x = block(x, random)
        return self.activation(x)


NETWORKS: dict[str, type[Perceptron | ResidualNetwork]] = {"mlp": Perceptron, "resnet": ResidualNetwork}


class Denoiser(Stack):
    """Predicts the noise in a noisy action: (S, B, A) -> (S, B, A), given the observation and the diffusion step.

    The first layer acts on [action, step, observation, label]. It is kept as a sum of maps, so that the observation's
    share is computed once for a whole chain and the step's once for all rows. `labels`: adds an embedding of {dropped,
    worse, better}.
    """

    features: Tensor

    def __init__(
        self, random: Randomness, section: PolicySection, observation_dim: int, action_dim: int, labels: bool
    ) -> None:
        super().__init__()
        first, time_features = section.hidden[0], section.time_features
        fan_in = action_dim + time_features + observation_dim
        self.observation = Linear(random, "observation", observation_dim, first, fan_in=fan_in)
        self.action = Linear(random, "action", action_dim, first, fan_in=fan_in)
        self.time_in = Linear(random, "time_in", time_features, 2 * time_features)
        self.time_out = Linear(random, "time_out", 2 * time_features, time_features)
        self.time = Linear(random, "time", time_features, first, fan_in=fan_in)
        self.label = Linear(random, "label", 3, first, fan_in=fan_in) if labels else None
        self.trunk = NETWORKS[section.network or "mlp"](random, section)
        self.out = Linear(random, "out", section.hidden[-1], action_dim)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(time_features // 2) / max(1, time_features // 2 - 1))
        angles = torch.arange(section.diffusion_steps)[:, None] * frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(random.device)
        self.register_buffer("features", features, persistent=False)  # (T, time_features)
        self.pack()

    def condition(self, observations: Tensor, labels: Tensor | None = None) -> Tensor:
        """The first layer's share of observations (S, B, O), normalized, and labels (S, B): (S, B, H)."""
        shares = self.observation(observations)
        if self.label is not None:
            if labels is None:
                labels = torch.zeros(observations.shape[:2], dtype=torch.int64, device=observations.device)
            shares = shares + self.label(functional.one_hot(labels, 3).float())
        return shares  # type: ignore[no-any-return]

    def times(self) -> Tensor:
        """The first layer's share of every diffusion step: (S, T, H)."""
        features = self.features.expand(self.members, -1, -1)
        return self.time(self.time_out(mish(self.time_in(features))))  # type: ignore[no-any-return]

    def forward(self, actions: Tensor, time: Tensor, condition: Tensor, random: Randomness | None = None) -> Tensor:
        """actions: (S, B, A); time: (S, B or 1, H); condition: (S, B, H); random: for dropout, None when acting."""
        return self.out(self.trunk(self.action(actions) + condition + time, random))  # type: ignore[no-any-return]


class Normalizer(nn.Module):
    """Observations to zero mean and unit deviation, fitted once on the training data: mean, deviation (O,)."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("inverse", 1.0 / deviation, persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) * self.inverse


# --- diffusion ----------------------------------------------------------------------------------------------------

Denoise = Callable[[Tensor, int], Tensor]  # (noisy actions (S, B, A), diffusion step) -> predicted noise (S, B, A)


def make_schedule(name: str, steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Tensor:
    """beta_1 .. beta_T, (T,), float64.

    "vp": the variance-preserving schedule of Diffusion-QL (arXiv 2208.06193, eq. after 3; arXiv 2112.07804);
    "cosine": improved DDPM (arXiv 2102.09672, eq. 17), "cosine-levels": T levels of that curve from its begin to its end,
    as CleanDiffuser (arXiv 2406.09509) has them; "linear": DDPM's betas (arXiv 2006.11239), spaced for T steps,
    "linear-unscaled" as they are.
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if name == "vp":
        return 1 - torch.exp(-beta_min / steps - (beta_max - beta_min) * (2 * t - 1) / (2 * steps**2))
    if name == "cosine":
        level = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)
    if name == "cosine-levels":
        time = torch.linspace(0, 1, steps, dtype=torch.float64).clamp(1e-3, 0.9946)
        level = (torch.cos((time + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
        return 1 - level / torch.cat([torch.ones(1, dtype=torch.float64), level[:-1]])
    scale = 1000 / steps if name == "linear" else 1.0
    return (torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64) * scale).clamp(max=0.999)


def schedule_problem(section: PolicySection) -> str:
    """What is wrong with a noise schedule for this many steps, or ""."""
    signal = torch.cumprod(1 - make_schedule(section.noise_schedule, section.diffusion_steps), 0).sqrt()
    if signal[-1] > 0.2:
        return f"its last step still shows {signal[-1]:.0%} of the action, but sampling starts from noise alone"
    if (share := float((signal < 0.05).double().mean())) > 0.5:
        return f"{share:.0%} of its steps are noise alone"
    return ""


class Diffusion:
    """Forward and reverse process of DDPM (arXiv 2006.11239) for actions in [-1, 1]; step t runs from 0 to T - 1."""

    def __init__(self, betas: Tensor, device: torch.device | str, variance: str = "posterior") -> None:
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=betas.dtype), alpha_bar[:-1]])
        self.steps = len(betas)
        self.signal, self.noise = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        self.levels = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1).float().to(device)  # (T, 2)
        # eq. 7: the posterior's mean is clean_share * x_0 + noisy_share * x_t; its variance, or beta (section 3.2)
        self.clean_share = (betas * previous.sqrt() / (1 - alpha_bar)).tolist()
        self.noisy_share = ((1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)).tolist()
        self.deviation = (betas * (1 if variance == "beta" else (1 - previous) / (1 - alpha_bar))).sqrt().tolist()

    def diffuse(self, actions: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy actions at steps t (S, B), eq. 4: (S, B, A)."""
        signal, deviation = torch.split(self.levels[t], 1, dim=-1)  # (S, B, 1)
        return signal * actions + deviation * noise

    def clean(self, noisy: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """One-step estimate of the clean action from the predicted noise, clipped to the bounds."""
        if isinstance(t, int):
            return ((noisy - self.noise[t] * noise) / self.signal[t]).clamp(-1.0, 1.0)  # type: ignore[no-any-return]
        signal, deviation = torch.split(self.levels[t], 1, dim=-1)  # (S, B, 1)
        return ((noisy - deviation * noise) / signal).clamp(-1.0, 1.0)

    def reverse(self, denoise: Denoise, noises: Tensor) -> Tensor:
        """Ancestral sampling, Algorithm 2: noises (S, T, B, A), the start's first, to clean actions (S, B, A)."""
        x = noises[:, 0]
        for i, t in enumerate(range(self.steps - 1, 0, -1), start=1):
            clean = self.clean(x, denoise(x, t), t)
            x = self.clean_share[t] * clean + self.noisy_share[t] * x + self.deviation[t] * noises[:, i]
        return self.clean(x, denoise(x, 0), 0)  # the last posterior is the clean action itself

    def solve(self, denoise: Denoise, noises: Tensor, steps: int) -> Tensor:
        """DPM-Solver++ 2M (arXiv 2211.01095, Algorithm 2) in at most `steps` network calls: noises (S, 1, B, A).

        They lie evenly over the diffusion steps, or where these are many, over their log signal-to-noise ratio.
        """
        log_snr = [math.log(signal / noise) for signal, noise in zip(self.signal, self.noise, strict=True)]
        grid = [round((self.steps - 1) * (1 - i / max(1, steps - 1))) for i in range(steps)]
        if self.steps >= 200:
            even = np.linspace(log_snr[-1], log_snr[0], steps)
            near = {int(np.abs(np.array(log_snr) - ratio).argmin()) for ratio in even}
            grid = sorted(near, reverse=True)
        x, before, h_before = noises[:, 0], None, 0.0
        for s, t in pairwise(grid):
            clean, h = self.clean(x, denoise(x, s), s), log_snr[t] - log_snr[s]
            mixed = clean if before is None else clean + (clean - before) * (h / (2 * h_before))
            x = (self.noise[t] / self.noise[s]) * x - self.signal[t] * math.expm1(-h) * mixed
            before, h_before = clean, h
        return self.clean(x, denoise(x, grid[-1]), grid[-1])  # no noise is left: first order, the estimate itself


# --- losses -------------------------------------------------------------------------------------------------------

Loss = tuple[Tensor, dict[str, Tensor]]  # the loss of each member, (S,), and metrics of the same shape


def expectile_loss(target_q: Tensor, v: Tensor, expectile: float) -> Loss:
    """Expectile regression of V towards target Q.

    target_q, v: (S, B), in scaled-reward units; gradient flows through v only. expectile in (0, 1).
    Source: implicit Q-learning, arXiv 2110.06169, eq. 5.
    """
    difference = target_q.detach() - v
    weight = torch.where(difference < 0, 1.0 - expectile, expectile)
    loss = (weight * difference.square()).mean(-1)
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(-1)}


def quantile_loss(target_q: Tensor, v: Tensor, quantile: float) -> Loss:
    """Quantile regression of V towards target Q; shapes and units as for `expectile_loss`.

    Source: implicit diffusion Q-learning, arXiv 2304.10573, section 4.1.
    """
    difference = target_q.detach() - v
    loss = torch.maximum(quantile * difference, (quantile - 1.0) * difference).mean(-1)
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(-1)}


def gumbel_loss(target_q: Tensor, v: Tensor, temperature: float) -> Loss:
    """Gumbel regression of V towards target Q; shapes and units as for `expectile_loss`, temperature in the unit of Q.

    From 7 temperatures above V on, a target teaches nothing: z is cut off there.
    Source: extreme Q-learning, arXiv 2301.02328, eq. 9.
    """
    z = ((target_q.detach() - v) / temperature).clamp(max=7.0)
    loss = (z.exp() - z - 1.0).mean(-1)
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(-1)}


VALUE_LOSSES: dict[str, Callable[[Tensor, Tensor, GuidanceSection], Loss]] = {
    "expectile": lambda target_q, v, section: expectile_loss(target_q, v, section.expectile),
    "quantile": lambda target_q, v, section: quantile_loss(target_q, v, section.expectile),
    "gumbel": lambda target_q, v, section: gumbel_loss(target_q, v, section.gumbel_temperature),
}


def td_loss(q: Tensor, rewards: Tensor, terminals: Tensor, next_v: Tensor, discount: float) -> Loss:
    """Squared error of both critics to r + discount (1 - terminal) V(s').

    q: (S, 2, B); rewards, terminals, next_v: (S, B), in scaled-reward units. A time limit is no terminal.
    Source: implicit Q-learning, arXiv 2110.06169, eq. 6; Diffusion-QL, arXiv 2208.06193, eq. 4.
    """
    target = (rewards + discount * (1.0 - terminals) * next_v).detach()
    loss = (q - target[:, None]).square().mean(-1).sum(-1)
    return loss, {"q_loss": loss.detach(), "q": q.detach().mean((-2, -1))}


def noise_loss(predicted: Tensor, noise: Tensor, weight: Tensor | None = None) -> Loss:
    """Mean squared error of the predicted noise.

    predicted, noise: (S, B, A); weight of each transition: (S, B), or None for equal ones.
    Source: DDPM, arXiv 2006.11239, eq. 14; weighted: IDQL, arXiv 2304.10573, eq. 9.
    """
    error = (predicted - noise).square().mean(-1)
    loss = (error if weight is None else weight * error).mean(-1)
    return loss, {"noise_loss": loss.detach()}


def improvement_loss(q: Tensor) -> Loss:
    """Minus the mean value of the policy's own actions, in units of their mean absolute value.

    q: (S, B), with gradient to the actions.
    Source: Diffusion-QL, arXiv 2208.06193, eq. 3 and its normalization by the data's value scale.
    """
    loss = -q.mean(-1) / q.detach().abs().mean(-1).clamp(min=1e-6)
    return loss, {"policy_q": q.detach().mean(-1)}


def advantage_weights(advantage: Tensor, rule: str, expectile: float, inverse_temperature: float) -> Tensor:
    """Weight of each transition in the noise error, (S, B).

    "expectile": |expectile - 1(advantage < 0)|; "exponential": exp(inverse_temperature * advantage), at most 100;
    "hard": 1(advantage >= 0).
    Source: IDQL, arXiv 2304.10573, table 1; "exponential": implicit Q-learning, arXiv 2110.06169, eq. 7.
    """
    if rule == "expectile":
        return torch.where(advantage < 0, 1.0 - expectile, expectile)
    if rule == "hard":
        return (advantage >= 0).float()
    return (inverse_temperature * advantage).exp().clamp(max=100.0)


def add(first: Loss, second: Loss, weight: float = 1.0) -> Loss:
    """first + weight * second, with the metrics of both."""
    return first[0] + weight * second[0], first[1] | second[1]


# --- policies -----------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """A diffusion model over actions, given the observation; the moving average of its weights acts."""

    def __init__(
        self,
        random: Randomness,
        normalizer: Normalizer,
        section: PolicySection,
        observation_dim: int,
        action_dim: int,
    ) -> None:
        super().__init__()
        self.section, self.normalizer, self.algorithm = section, normalizer, POLICIES[section.algorithm]
        self.action_dim = action_dim
        betas = make_schedule(section.noise_schedule, section.diffusion_steps)
        self.diffusion = Diffusion(betas, random.device, section.variance)
        self.denoiser = Denoiser(random, section, observation_dim, action_dim, self.algorithm.labels)
        self.average = self.denoiser.frozen_copy()
        self.times: Tensor | None = None  # (S, T, H), where the weights change no more

    @property
    def members(self) -> int:
        return self.average.members

    def networks(self) -> list[tuple[Stack, float]]:
        """The networks that learn, and their learning rates at the start."""
        return [(self.denoiser, self.section.learning_rate)]

    def loss(self, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
        """The algorithm's loss under a guidance, or without its guidance term where there is none."""
        return self.algorithm.loss(self, batch, guidance, random)

    def follow(self, step: int) -> None:
        """Move the average after gradient step `step`; it forgets the initial weights faster than ema_decay."""
        if step < max(self.section.ema_from, self.section.ema_every - 1):
            self.average.follow(self.denoiser, 1.0)
        elif (step + 1) % self.section.ema_every == 0:
            self.average.follow(self.denoiser, 1.0 - min(self.section.ema_decay, (1 + step) / (10 + step)))

    def predict(self, batch: Batch, random: Randomness, labels: Tensor | None = None) -> Prediction:
        """Noise the batch's actions at random diffusion steps and predict that noise."""
        rows = batch.rewards.shape[1]
        t = random.integers("t", self.diffusion.steps, rows)
        noise = random.normal("noise", rows, self.action_dim)
        noisy = self.diffusion.diffuse(batch.actions, noise, t)
        condition = self.denoiser.condition(self.normalizer(batch.observations), labels)
        times = self.denoiser.times()
        chosen = functional.one_hot(t, self.diffusion.steps).float() @ times  # (S, B, H)
        return Prediction(self.denoiser(noisy, chosen, condition, random), noise, noisy, t, condition, times)

    def sample(
        self,
        observations: Tensor,
        noises: Tensor,
        *,
        candidates: int = 1,
        w: float = 1.0,
        guidance: Ranker | None = None,
        guidance_weight: float = 0.0,
        jacobian: bool = False,
    ) -> Tensor:
        """Actions of the averaged policy: raw observations (S, B, O) -> (S, B N, A), the N of a state side by side.

        noises: as from `noises`, for B N rows. w is the weight of classifier-free guidance (0: unguided; arXiv
        2207.12598), for policies that know labels. guidance_weight > 0 shifts the predicted noise against dQ/da at the
        one-step estimate of the clean action: with jacobian by -guidance_weight * sqrt(1 - alpha_bar) * dQ/dx, through
        that estimate's network, which draws from the policy's density times exp(guidance_weight * Q), exactly so where
        the one is Gaussian and the other linear (arXiv 2105.05233, Algorithm 2); without it by -guidance_weight *
        sqrt(alpha_bar) * dQ/da (Q-guided flow, arXiv 2606.11087), which moves the clean action by guidance_weight *
        sqrt(1 - alpha_bar) * dQ/da: no temperature.
        """
        network = self.average
        normalized = self.normalizer(observations)
        conditions = [network.condition(normalized)]
        if self.algorithm.labels:
            better = torch.full(observations.shape[:2], 2, dtype=torch.int64, device=observations.device)
            conditions.append(network.condition(normalized, better))
        conditions = [condition.repeat_interleave(candidates, dim=1) for condition in conditions]
        repeated = observations.repeat_interleave(candidates, dim=1)
        times = network.times() if self.times is None else self.times

        def predict(x: Tensor, t: int) -> Tensor:
            noise: Tensor = network(x, times[:, t : t + 1], conditions[0])
            for condition in conditions[1:]:
                noise = noise + w * (network(x, times[:, t : t + 1], condition) - noise)
            return noise

        def denoise(x: Tensor, t: int) -> Tensor:
            if guidance is None or guidance_weight == 0:
                return predict(x, t)
            with torch.enable_grad():
                start = x.detach().requires_grad_(jacobian)
                noise = predict(start, t)
                clean = self.diffusion.clean(start, noise, t)
                if not jacobian:
                    start = clean = clean.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(guidance.q(repeated, clean).sum(), start)
            scale = self.diffusion.noise[t] if jacobian else self.diffusion.signal[t]
            steered: Tensor = noise.detach() - guidance_weight * scale * gradient
            return steered

        return self.denoise_all(denoise, noises)

    def act_alone(self, observations: Tensor, random: Randomness, w: float = 1.0) -> Tensor:
        """One action for each of B states, unranked: (S, B, O) -> (S, B, A)."""
        return self.sample(observations, self.noises(random, "act", observations.shape[1]), w=w)

    def noises(self, random: Randomness, name: str, rows: int) -> Tensor:
        """The noise a chain needs: (S, T, rows, A), or (S, 1, rows, A) for a deterministic solver."""
        return random.normal(name, 1 if self.solves else self.diffusion.steps, rows, self.action_dim)

    @property
    def solves(self) -> bool:
        return self.section.sampler == "dpm-solver++"

    def denoise_all(self, denoise: Denoise, noises: Tensor) -> Tensor:
        """Run the policy's sampler: noises as drawn -> clean actions (S, rows, A)."""
        if self.solves:
            return self.diffusion.solve(denoise, noises, self.section.sampling_steps)
        return self.diffusion.reverse(denoise, noises)


@dataclass(frozen=True)
class Prediction:
    """A step of denoising training: predicted, noise, noisy (S, B, A), t (S, B), shares of the first layer."""

    predicted: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    condition: Tensor
    times: Tensor


def cloning_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """The noise error alone (DDPM, arXiv 2006.11239), its transitions weighted by the advantage if so set."""
    step = policy.predict(batch, random)
    section = policy.section
    if guidance is None or section.advantage_weight == "none":
        return noise_loss(step.predicted, step.noise)
    with torch.no_grad():
        advantage = guidance.advantage(batch.observations, batch.actions)
    weights = advantage_weights(
        advantage, section.advantage_weight, section.advantage_expectile, section.advantage_inverse_temperature
    )
    return noise_loss(step.predicted, step.noise, weights)


def chain_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error minus eta times the scaled Q of actions from the whole chain (Diffusion-QL, arXiv 2208.06193, eq. 3)."""
    step = policy.predict(batch, random)
    cloning = noise_loss(step.predicted, step.noise)
    if guidance is None or policy.section.eta == 0:
        return cloning

    def denoise(x: Tensor, t: int) -> Tensor:
        return policy.denoiser(x, step.times[:, t : t + 1], step.condition)  # type: ignore[no-any-return]

    actions = policy.denoise_all(denoise, policy.noises(random, "chain", batch.rewards.shape[1]))
    q = guidance.one_q(batch.observations, actions, random.integers("twin", 2))
    return add(cloning, improvement_loss(q), policy.section.eta)


def one_step_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error minus eta times the scaled Q of the one-step estimate of the clean action (EDP, arXiv 2305.20081, eq. 9)."""
    step = policy.predict(batch, random)
    cloning = noise_loss(step.predicted, step.noise)
    if guidance is None or policy.section.eta == 0:
        return cloning
    actions = policy.diffusion.clean(step.noisy, step.predicted, step.t)
    q = guidance.one_q(batch.observations, actions, random.integers("twin", 2))
    return add(cloning, improvement_loss(q), policy.section.eta)


def noise_regression_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Squared error to noise - eta sqrt(1 - alpha_bar) dQ/da at the noisy action (DAC, arXiv 2405.20555)."""
    step = policy.predict(batch, random)
    if guidance is None or policy.section.eta == 0:
        return noise_loss(step.predicted, step.noise)
    noisy = step.noisy.detach().requires_grad_()
    q = guidance.one_q(batch.observations, noisy, random.integers("twin", 2))
    (gradient,) = torch.autograd.grad(q.sum(), noisy)
    deviation = policy.diffusion.levels[step.t][..., 1:]  # (S, B, 1)
    loss, metrics = noise_loss(step.predicted, step.noise - policy.section.eta * deviation * gradient)
    return loss, metrics | {"policy_q": q.detach().mean(-1)}


def label_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error given "this action is an improvement", label dropped at random (arXiv 2505.23458; 2207.12598)."""
    if guidance is None:
        return cloning_loss(policy, batch, None, random)
    with torch.no_grad():
        better = guidance.advantage(batch.observations, batch.actions) > 0
    shown = random.uniform("label", better.shape[1]) >= policy.section.label_dropout
    step = policy.predict(batch, random, labels=shown * (1 + better.long()))
    loss, metrics = noise_loss(step.predicted, step.noise)
    return loss, metrics | {"better": better.float().mean(-1)}


def weighed_by_eta(section: PolicySection) -> bool:
    return section.eta > 0


@dataclass(frozen=True)
class PolicyAlgorithm:
    """A line of the registry: how a policy learns, when a guidance enters its loss, its network, whether it has labels."""

    loss: Callable[[Policy, Batch, Judge | None, Randomness], Loss]
    guided: Callable[[PolicySection], bool] = weighed_by_eta
    network: str = "mlp"
    labels: bool = False


def _weighted(section: PolicySection) -> bool:
    return section.advantage_weight != "none"


POLICIES = {
    "bc": PolicyAlgorithm(cloning_loss, _weighted),
    "idql": PolicyAlgorithm(cloning_loss, _weighted, network="resnet"),
    "dql": PolicyAlgorithm(chain_loss),
    "edp": PolicyAlgorithm(one_step_loss),
    "dac": PolicyAlgorithm(noise_regression_loss),
    "cfg": PolicyAlgorithm(label_loss, lambda section: section.label_dropout < 1, labels=True),
}


# --- guidance -----------------------------------------------------------------------------------------------------


class Guidance(nn.Module):
    """Values learned from the dataset alone. Whatever trained them, every policy and ranking uses q, v, advantage.

    Twin critics and their Polyak targets, (2 S, ...), and V, (S, ...). `companion=False` leaves out the actor that
    "dql" needs where it learns alone.
    """

    def __init__(
        self,
        random: Randomness,
        normalizer: Normalizer,
        section: GuidanceSection,
        observation_dim: int,
        action_dim: int,
        companion: bool = True,
    ) -> None:
        super().__init__()
        self.section, self.normalizer, self.algorithm = section, normalizer, GUIDANCES[section.algorithm]
        shape = section.hidden, section.activation, section.layer_norm
        self.online_q = ValueNetwork(random, "q", observation_dim + action_dim, *shape, copies=2)
        self.target_q = self.online_q.frozen_copy()
        self.value = ValueNetwork(random, "v", observation_dim, *shape)
        self.learning: list[Stack] = []  # the critics as they learn; in a list, since they are stored already
        self.actor: Policy | None = None
        if companion and self.algorithm.has_actor:
            shared = ("activation", "time_features", "diffusion_steps", "eta", "ema_decay")
            table = {key: getattr(section, key) for key in shared} | {
                "algorithm": "dql",
                "hidden": section.actor_hidden,
            }
            self.actor = Policy(random, normalizer, PolicySection(**table), observation_dim, action_dim)

    @property
    def members(self) -> int:
        return self.value.members

    def twins(self, network: Stack, observations: Tensor, actions: Tensor) -> Tensor:
        """Both critics' values: observations (S, B, O), actions (S, B, A) -> (S, 2, B)."""
        inputs = torch.cat([self.normalizer(observations), actions], dim=-1)
        values: Tensor = network(inputs.repeat_interleave(2, dim=0))  # (2 S, B)
        return values.view(self.members, 2, -1)

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Minimum of the twin target critics: raw (S, B, O), scaled (S, B, A) -> (S, B), scaled-reward units."""
        return self.twins(self.target_q, observations, actions).amin(1)

    def one_q(self, observations: Tensor, actions: Tensor, twin: Tensor, members: Tensor | None = None) -> Tensor:
        """What teaches a policy: critic `twin` (S,) in {0, 1} of each member, or of `members` (S,): (S, B).

        The target, or where the guidance learns along the online one, which no gradient of a policy's loss reaches.
        """
        inputs = torch.cat([self.normalizer(observations), actions], dim=-1)
        rows = 2 * (torch.arange(self.members, device=twin.device) if members is None else members) + twin
        (network,) = self.learning or [self.target_q]
        return network(inputs, rows)  # type: ignore[no-any-return]

    def v(self, observations: Tensor) -> Tensor:
        """State value: raw (S, B, O) -> (S, B), scaled-reward units."""
        return self.value(self.normalizer(observations))  # type: ignore[no-any-return]

    def advantage(self, observations: Tensor, actions: Tensor) -> Tensor:
        """q - v, (S, B)."""
        return self.q(observations, actions) - self.v(observations)

    def networks(self) -> list[tuple[Stack, float]]:
        """The networks that learn, and their learning rates at the start."""
        rate = self.section.learning_rate
        actor = [] if self.actor is None else [(self.actor.denoiser, self.section.actor_learning_rate or rate)]
        return [(self.online_q, rate), (self.value, self.section.value_learning_rate or rate), *actor]

    def loss(self, batch: Batch, random: Randomness, actor: Sampler | None = None) -> Loss:
        """The algorithm's loss. actor: what acts in a joint run, in place of the companion."""
        return self.algorithm.loss(self, batch, random, actor)

    def follow(self, step: int) -> None:
        """Targets and averages after gradient step `step`: target <- (1 - tau) target + tau online."""
        if (step + 1) % self.section.target_every == 0:
            self.target_q.follow(self.online_q, self.section.tau)
        if self.actor is not None:
            self.actor.follow(step)


@dataclass(frozen=True)
class Ensemble:
    """Guidances that judge as one, asked as one is: all their members judge each row, and a rule makes one of K figures.

    rule: of `ENSEMBLES`. candidates: how many rows side by side are of one state, for "rank".
    """

    guidances: Sequence[Guidance]
    rule: str
    candidates: int = 1

    @property
    def members(self) -> int:
        """K, over all guidances."""
        return sum(guidance.members for guidance in self.guidances)

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(guidance.parameters() for guidance in self.guidances)

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """As `Guidance.q`: (S, B, O), (S, B, A) -> (S, B), of any number of policy members."""
        return self._judge(Guidance.q, observations, actions)

    def v(self, observations: Tensor) -> Tensor:
        """As `Guidance.v`."""
        return self._judge(Guidance.v, observations)

    def advantage(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The figure of all advantages, each against its own V."""
        return self._judge(Guidance.advantage, observations, actions)

    def one_q(self, observations: Tensor, actions: Tensor, twin: Tensor) -> Tensor:
        """As `Guidance.one_q`: all members judge by the twin that a policy member drew, (S,); one by one, for the cache."""
        found = [
            guidance.one_q(observations, actions, twin, torch.full_like(twin, member))
            for guidance in self.guidances
            for member in range(guidance.members)
        ]
        return ENSEMBLES[self.rule](torch.stack(found), self.candidates)

    def _judge(self, ask: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        found = [
            torch.cat(
                [ask(guidance, *(row.expand(guidance.members, -1, -1) for row in rows)) for guidance in self.guidances]
            )
            for rows in zip(*inputs, strict=True)  # of one policy member after another: together they fill the memory
        ]
        return ENSEMBLES[self.rule](torch.stack(found, dim=1), self.candidates)  # of (K, S, B)


def median(values: Tensor) -> Tensor:
    """Over the first axis; of an even number the mean of the two in the middle."""
    ordered, count = values.sort(0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def mean_rank(values: Tensor, candidates: int) -> Tensor:
    """(K, S, B) -> (S, B): the place of each row among its N of one state, 0 the lowest and 1 the highest, mean over K.

    Equal ones share the mean of their places.
    """

    def places(each: Tensor) -> Tensor:  # of equal ones the first is the lowest
        return each.argsort(dim=-1, stable=True).argsort(dim=-1).float()

    states = values.view(*values.shape[:2], -1, candidates)  # (K, S, B / N, N)
    ranks: Tensor = (places(states) + places(states.flip(-1)).flip(-1)) / 2
    return ranks.flatten(-2).mean(0) / max(1, candidates - 1)


ENSEMBLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda values, candidates: values.mean(0),
    "median": lambda values, candidates: median(values),
    "min": lambda values, candidates: values.amin(0),
    "rank": mean_rank,
}

Judge = Guidance | Ensemble

Sampler = Callable[[Tensor, Randomness], Tensor]  # raw observations (S, B, O) -> actions (S, B, A)


def implicit_q_loss(guidance: Guidance, batch: Batch, random: Randomness, actor: Sampler | None) -> Loss:
    """Implicit Q-learning (arXiv 2110.06169, Algorithm 1; arXiv 2304.10573): no action outside the data is valued."""
    with torch.no_grad():
        target_q = guidance.q(batch.observations, batch.actions)
        next_v = guidance.v(batch.next_observations)
    v = guidance.v(batch.observations)
    q = guidance.twins(guidance.online_q, batch.observations, batch.actions)
    return add(
        VALUE_LOSSES[guidance.section.value_loss](target_q, v, guidance.section),
        td_loss(q, batch.rewards, batch.terminals, next_v, guidance.section.discount),
    )


def diffusion_q_loss(guidance: Guidance, batch: Batch, random: Randomness, actor: Sampler | None) -> Loss:
    """The critics of Diffusion-QL (arXiv 2208.06193, eq. 4), bootstrapped by the actor, or else by a companion.

    Of `bootstrap_candidates` next actions the best by each critic counts, and of the critics the lower. V regresses to
    Q at the data's actions. The companion learns along by the loss of "dql".
    """
    companion = guidance.actor if actor is None else None
    if companion is not None:
        actor = companion.act_alone
    if actor is None:
        raise RuntimeError("this guidance was built to be used, or to learn beside a policy")
    repeated = batch.next_observations.repeat_interleave(guidance.section.bootstrap_candidates, dim=1)  # (S, B N, O)
    with torch.no_grad():
        next_actions = actor(repeated, random)
        both = guidance.twins(guidance.target_q, repeated, next_actions)  # (S, 2, B N)
        next_q = both.view(*both.shape[:2], batch.rewards.shape[1], -1).amax(-1).amin(1)
        target_q = guidance.q(batch.observations, batch.actions)
    q = guidance.twins(guidance.online_q, batch.observations, batch.actions)
    critic = td_loss(q, batch.rewards, batch.terminals, next_q, guidance.section.discount)
    value = expectile_loss(target_q, guidance.v(batch.observations), 0.5)
    loss = add(critic, value)
    return loss if companion is None else add(loss, companion.loss(batch, guidance, random))


@dataclass(frozen=True)
class GuidanceAlgorithm:
    """A line of the registry: how a guidance learns, and whether it needs an actor to do so."""

    loss: Callable[[Guidance, Batch, Randomness, Sampler | None], Loss]
    has_actor: bool = False


GUIDANCES = {
    "idql": GuidanceAlgorithm(implicit_q_loss),
    "dql": GuidanceAlgorithm(diffusion_q_loss, has_actor=True),
}

# --- algorithms and their settings --------------------------------------------------------------------------------


def check_algorithms(run: Experiment) -> Experiment:
    """The experiment with all that follows from its algorithms filled in; this is what bundles hold.

    Raises: MdptError for a name that no registry has, or a setting that the algorithm cannot take.
    """

    def known(where: str, name: str, registry: Mapping[str, Any]) -> Any:
        if name in registry:
            return registry[name]
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MdptError(f"{where} = {name!r}: should be one of {', '.join(registry)}{hint}")

    known("[guidance] algorithm", run.guidance.algorithm, GUIDANCES)
    section = run.policy
    algorithm = known("[policy] algorithm", section.algorithm, POLICIES)
    network = section.network or algorithm.network
    if known("[policy] network", network, NETWORKS).equal_widths and len(set(section.hidden)) > 1:
        raise MdptError(f"[policy] hidden = {section.hidden}: the blocks of network {network!r} are all of one width")
    return run.model_copy(update={"policy": section.model_copy(update={"network": network})})


def guided_steps(section: PolicySection, step: int | None = None) -> range:
    """The steps, until `step` or ever, in whose loss guidance_from and guidance_until let a guidance be."""
    first, end = (math.ceil(share * section.steps) for share in (section.guidance_from, section.guidance_until))
    return range(first, end if step is None else min(end, step))


def learns_under_guidance(section: PolicySection, step: int | None = None) -> bool:
    """Whether anything of a guidance enters a policy's loss, until `step` or ever."""
    guided = section.scheme != "unguided" and len(guided_steps(section, step)) > 0
    return guided and POLICIES[section.algorithm].guided(section)


def learns_labels(section: PolicySection, step: int | None = None) -> bool:
    """Whether a policy learns under a label, until `step` or ever."""
    return POLICIES[section.algorithm].labels and learns_under_guidance(section, step)


# --- bundles ------------------------------------------------------------------------------------------------------

Bundle = dict[str, Any]

ACTING = ("average.", "target_q.", "value.")  # the weights that act or are asked for values

BUNDLE_FORMAT, BUNDLE_VERSION = "mdpt bundle", 6


def new_bundle(kind: str, experiment: Experiment, dataset: Dataset) -> Bundle:
    """All of a bundle that does not change while it learns."""
    returns, reference = dataset.episode_returns, dataset.section.reference
    return {
        "format": BUNDLE_FORMAT,
        "version": BUNDLE_VERSION,
        "kind": kind,
        "experiment": experiment.model_copy(update={"data": dataset.section}).model_dump(),
        "seeds": list(experiment.seeds),
        "environment": asdict(dataset.environment),
        "reference": None if reference is None else reference_returns(reference),
        "dataset": dataset.identity
        | {
            "training_transitions": len(dataset),
            "episodes": len(returns),
            "mean_return": float(returns.mean()),
            "best_return": float(returns.max()),
        },
        "normalizer": {"mean": torch.from_numpy(dataset.mean), "deviation": torch.from_numpy(dataset.deviation)},
        "reward_scale": dataset.reward_scale,
        "versions": {"mdpt": version(), "torch": str(torch.__version__), "python": platform.python_version()},
        "step": 0,
        "complete": False,
        "history": [],
        "snapshots": {},
        "accounting": {},
        "guidances": [],  # of a policy: those it learns under
    }


def plain(tensor: Tensor) -> Tensor:
    """A tensor that holds what it claims to."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError("should be a plain tensor")
    return tensor


Plain = Annotated[Tensor, AfterValidator(plain)]
Tensors = dict[str, Plain]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A table of a bundle: every key of its kind, none more, every number finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Environment(Part):
    """An `EnvironmentSpec`."""

    id: str | None
    observation_dim: Annotated[int, Field(ge=1)]
    action_dim: Annotated[int, Field(ge=1)]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: Annotated[int, Field(ge=1)]
    kwargs: dict[str, Any]
    flattened: bool
    repeatable: bool


class Data(Part):
    """What is known of the data: their identity, and returns of whole episodes."""

    source: str
    name: str
    hash: str
    no_environment: str
    transitions: Count
    training_transitions: Count
    episodes: Count
    mean_return: float
    best_return: float


class Account(Part):
    """As `Cost.read` gives it."""

    parameters_trained: Count
    parameters_held: Count
    optimizer_bytes: Count
    peak_bytes: int
    seconds: float
    seconds_per_1000_steps: float
    device: str
    products: Literal["oneDNN", "default"]


class RewardScale(Part):
    rule: str
    multiplier: float
    offset: float


class Versions(Part):
    mdpt: str
    torch: str
    python: str


class Training(Part):
    """What only going on needs: states as `Learner.state`, and what `History` has yet to average."""

    optimizers: list[Tensors]
    pending: list[tuple[Plain, Tensors]]


class Entry(Part):
    """Of a training history: a step, and for each metric a number per member."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[float]]
    step: Count


class Quality(Part):
    """As `guidance_quality` finds it, at a step: lists hold a number per member, None where no return is known."""

    step: Count
    rows: Count
    bootstrapped: bool
    correlation: list[float | None]
    advantage_correlation: list[float | None]
    mean_v: list[float | None]
    mean_return: list[float | None]
    q_spread_members: float | None
    q_spread_rows: float


class Schema(Part):
    """A bundle."""

    format: str
    version: int
    kind: Literal["guidance", "policy"]
    experiment: dict[str, Any]
    seeds: Annotated[list[int], Field(min_length=1, max_length=256)]
    environment: Environment
    reference: tuple[float, float] | None
    dataset: Data
    normalizer: Tensors
    reward_scale: RewardScale
    versions: Versions
    step: Annotated[int, Field(ge=1)]
    complete: bool
    history: list[Entry]
    snapshots: dict[int, Tensors]
    accounting: Account
    guidances: list[Schema]
    weights: Tensors
    training: Training | None = None
    quality: list[Quality] = []


def save_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle, plain containers and tensors only, so that it is there whole or not at all."""
    with written_whole(path, "choose another --out") as temporary, temporary.open("wb") as file:
        torch.save(bundle, file)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle of either kind onto the CPU, opened with weights_only=True.

    FILE@STEP gives the snapshot of that gradient step (a joint run's guidance likewise), FILE@last the last weights.

    Raises: MdptError for a file that is missing, damaged, no bundle, of another version, or without that snapshot.
    """
    if path.is_dir():
        raise MdptError(f"{path}: is a folder; expected a bundle")
    name, at, step = path.name.rpartition("@")
    if at and name and not path.exists():
        return _at_step(read_bundle(path.with_name(name)), path, step)
    if not path.is_file():
        if path.with_name(path.name.rpartition("#")[0] or path.name).is_file():
            raise MdptError(f"{path}: #SEED names a member of a guidance; expected a whole bundle")
        raise MdptError(f"{path}: no such bundle; `mdpt guidance` and `mdpt policy` write them")
    if path.suffix == ".toml":
        raise MdptError(
            f"{path}: is an experiment file; expected a bundle, which `mdpt guidance` and `mdpt policy` write"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or archive.testzip():
                raise ValueError("an entry is packed, or not what was written")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("it claims to hold more than it does")
            if len({entry.filename for entry in entries}) < len(entries) or entries[0].header_offset:
                raise ValueError("readers of zip files would not agree on what is in it")
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise MdptError(
            f"{path}: cannot be read as a bundle, it is damaged or something else; write it anew"
        ) from error
    if not isinstance(bundle, dict) or str(bundle.get("format")) != BUNDLE_FORMAT:
        raise MdptError(f"{path}: is no mdpt bundle; expected a file written by `mdpt guidance` or `mdpt policy`")
    if (found := shown(bundle.get("version"))) != str(BUNDLE_VERSION):
        raise MdptError(
            f"{path}: bundle version {found}, this mdpt reads version {BUNDLE_VERSION}; "
            "train it anew or use the mdpt that wrote it"
        )
    try:
        Schema.model_validate(bundle)
        check_bundle(bundle)
    except ValidationError as error:
        where, what = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise MdptError(f"{path}: {ALTERED}: {'.'.join(map(str, where))}: {what}") from error
    except MdptError as error:
        raise MdptError(f"{path}: {error}") from error
    return bundle


ALTERED = "is no bundle as mdpt writes it; write it anew"


def check_bundle(bundle: Bundle, outer: Bundle | None = None) -> None:
    """Check what a bundle that follows the schema says against itself, before anything is allocated by it.

    outer: the policy that holds it. Raises: MdptError naming the first part that does not agree.
    """
    try:
        run = check_algorithms(check_experiment("it", bundle["experiment"]))
    except MdptError as error:
        written = bundle["versions"]["mdpt"]
        raise MdptError(f"written by mdpt {written}, which this mdpt does not follow: {error}") from error
    kind, seeds, spec, step = bundle["kind"], bundle["seeds"], bundle["environment"], bundle["step"]
    along = outer is not None and outer["experiment"]["policy"]["scheme"] == "joint"
    grew_along = outer is not None and run.policy.scheme == "joint"  # beside that policy or another
    steps = max(getattr(run, kind).steps, run.policy.steps * grew_along)
    inside = {"unguided": (0,), "joint": (1,)}.get(run.policy.scheme, range(257)) if kind == "policy" else (0,)
    learns = not bundle["complete"] and outer is None
    low, high = (np.array(spec[key]) for key in ("action_low", "action_high"))
    pending = (bundle.get("training") or {"pending": []})["pending"]
    ends = [0, *(entry["step"] for entry in bundle["history"])]
    qualities = bundle.get("quality", [])
    whole = ends[-1] + len(pending) == step or outer is not None  # a joint policy's guidance has none of its own
    agrees = {
        "experiment": all(bundle["experiment"].get(name) == table for name, table in run.model_dump().items()),
        "format": (bundle["format"], bundle["version"]) == (BUNDLE_FORMAT, BUNDLE_VERSION),
        "kind": outer is None or kind == "guidance",
        "guidances": len(bundle["guidances"]) in inside,
        "seeds": set(seeds) <= set(run.seeds) and len(set(seeds)) == len(seeds),
        "step": step <= steps and (outer is not None or bundle["complete"] == (step == steps)),
        "environment": low.shape == high.shape == (spec["action_dim"],)
        and bool(((low < high) & (high - low < 1e30)).all()),
        "reference": spec["id"] is None
        if bundle["reference"] is None
        else 0 < bundle["reference"][1] - bundle["reference"][0] < math.inf,
        "quality": all(
            len(found) == len(seeds) for entry in qualities for found in entry.values() if type(found) is list
        ),
        "history": whole
        and all(a < b for a, b in pairwise(ends))
        and all(len(entry[key]) == len(seeds) for entry in bundle["history"] for key in entry.keys() - {"step"}),
        "snapshots": all(1 <= at <= step for at in bundle["snapshots"]),
        "training": (bundle.get("training") is not None) == learns,
    }
    if wrong := [key for key, right in agrees.items() if not right]:
        raise MdptError(f"{ALTERED}: {wrong[0]} does not agree with the rest")
    check_tensors("normalizer", bundle["normalizer"], dict.fromkeys(("mean", "deviation"), (spec["observation_dim"],)))
    if not (bundle["normalizer"]["deviation"] > 1e-30).all():
        raise MdptError(f"{ALTERED}: normalizer.deviation is not positive")
    for loss, metrics in pending:
        check_tensors("training.pending", {"loss": loss} | metrics, dict.fromkeys(("loss", *metrics), (len(seeds),)))
    for inner in bundle["guidances"]:
        check_bundle(inner, bundle)
        check_fit(bundle, inner)
        if run.policy.scheme == "joint" and any(inner[key] != bundle[key] for key in ("experiment", "seeds", "step")):
            raise MdptError(f"{ALTERED}: guidances.0 is of another run")
    check_shapes(bundle, outer is None or along, learns)


def check_shapes(bundle: Bundle, whole: bool, learns: bool) -> None:
    """Check the tensors of a bundle against modules that hold no numbers.

    whole: it holds all its weights, not only those that act. learns: it is to go on, so has states of optimizers.
    """
    module: Guidance | Policy
    if bundle["kind"] == "policy":
        module = build_policy(bundle, "meta", new=True)
    else:
        module = build_guidance(bundle, "meta", new=True, companion=learns)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    acting = {name: shape for name, shape in shapes.items() if name.startswith(ACTING)}
    check_tensors("weights", bundle["weights"], shapes if whole else acting)
    for at, weights in bundle["snapshots"].items():
        check_tensors(f"snapshots.{at}", weights, acting)
    if learns:
        joint = bundle["guidances"] if bundle["experiment"]["policy"]["scheme"] == "joint" else []
        first = [build_guidance(each, "meta", new=True, companion=False) for each in joint]
        networks = [network for part in (*first, module) for network, _ in part.networks()]
        states = bundle["training"]["optimizers"]
        for place, (network, state) in enumerate(zip_longest(networks, states)):
            shape = tuple(network.vector.shape) if network is not None else ()
            check_tensors(
                f"training.optimizers.{place}", state or {}, {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
            )


def check_tensors(where: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises: MdptError where tensors have other names or shapes, are no float32 or not finite."""
    for name in sorted(tensors.keys() | shapes.keys()):
        tensor = tensors.get(name)
        if tensor is None or name not in shapes:
            raise MdptError(f"{ALTERED}: {where}.{name} is {'missing' if tensor is None else 'unknown'}")
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32:
            found = f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise MdptError(f"{ALTERED}: {where}.{name} has shape {found}; expected {shapes[name]}, {torch.float32}")
        if not tensor.isfinite().all():
            raise MdptError(f"{ALTERED}: {where}.{name} is not finite")


def _at_step(bundle: Bundle, path: Path, step: str) -> Bundle:
    if step == "last":
        return bundle
    if not step.isdecimal() or int(step) not in bundle["snapshots"]:
        known = ", ".join(f"@{known}" for known in bundle["snapshots"])
        raise MdptError(f"{path}: no snapshot @{step}; there are {known or 'none yet'} and @last")
    if bundle["experiment"]["policy"]["scheme"] == "joint":  # whose guidance grew along
        bundle["guidances"] = [_at_step(inner, path, step) for inner in bundle["guidances"]]
    bundle["weights"] |= bundle["snapshots"][int(step)]
    return bundle | {"step": int(step)}


def read_guidances(path: Path) -> list[Bundle]:
    """The guidance bundle in `path`, or those inside the policy bundle there; FILE#SEED gives the member of that seed.

    Raises: MdptError, also for a policy bundle without guidance.
    """
    name, mark, seed = path.name.rpartition("#")
    if mark and name and not path.exists():
        bundles = read_guidances(path.with_name(name))
        seeds = [str(known) for bundle in bundles for known in bundle["seeds"]]
        if "@" in seed:
            raise MdptError(f"{path}: a member of a snapshot is named FILE@STEP#SEED")
        if seeds.count(seed) != 1:
            raise MdptError(f"{path}: there is not one member of this seed; the seeds are {', '.join(seeds)}")
        return [
            select_members(bundle, [bundle["seeds"].index(int(seed))])
            for bundle in bundles
            if int(seed) in bundle["seeds"]
        ]
    bundle = read_bundle(path)
    if bundle["kind"] != "policy":
        return [bundle]
    if not bundle["guidances"]:
        raise MdptError(f"{path}: this policy was trained unguided and holds no guidance; give a guidance bundle")
    return list(bundle["guidances"])


def read_named(names: Sequence[str]) -> list[Bundle]:
    """The guidances in files, a name twice once, or of "none" none. Raises: MdptError, also for none beside others."""
    if "none" in names and len(names) > 1:
        raise MdptError(f"{', '.join(names)}: none is no guidance beside others; leave it out")
    return [bundle for name in dict.fromkeys(names) if name != "none" for bundle in read_guidances(Path(name))]


def read_policy(path: Path) -> Bundle:
    """The policy bundle in `path`. Raises: MdptError, also for a guidance bundle."""
    bundle = read_bundle(path)
    if bundle["kind"] != "policy":
        raise MdptError(f"{path}: is a {bundle['kind']} bundle; expected a policy bundle, written by `mdpt policy`")
    return bundle


def check_fit(first: Bundle, second: Bundle) -> list[str]:
    """Warnings about using two bundles together.

    Raises: MdptError listing each environment property in which they differ, by value.
    """
    ours, theirs = first["environment"], second["environment"]
    own = {"repeatable"} | ({"max_episode_steps"} if ours["id"] is None else set())  # without one the data's longest
    facts = [key for key in ours if key not in own]
    mismatches = [f"{key} {ours[key]} against {theirs[key]}" for key in facts if ours[key] != theirs[key]]
    if mismatches:
        raise MdptError(
            f"the {first['kind']} and the {second['kind']} do not fit together: {'; '.join(mismatches)}; "
            "use bundles of one environment"
        )
    both, known = (first, second), "swapping is known to hold only under one data distribution"
    if first["dataset"]["hash"] != second["dataset"]["hash"]:
        names = [f"the {bundle['kind']} learned from {bundle['dataset']['name']}" for bundle in both]
        return [f"{' and '.join(names)}: {known}"]
    shares = [tuple(bundle["experiment"]["data"][key] for key in ("fraction", "held_out", "seed")) for bundle in both]
    if shares[0] != shares[1]:
        names = [f"the {bundle['kind']} {share}" for bundle, share in zip(both, shares, strict=True)]
        return [f"other episodes of one dataset, by fraction, held_out and seed: {' and '.join(names)}: {known}"]
    return []


def check_teachers(bundle: Bundle, teachers: Sequence[Bundle], rule: str) -> list[str]:
    """Warnings about a policy and all that guides it by a rule of `ENSEMBLES`, or "none".

    Raises: MdptError where they do not fit, or cannot judge as one.
    """
    warnings = list(dict.fromkeys(warning for teacher in teachers for warning in check_fit(bundle, teacher)))
    if rule == "none" and len(teachers) > 1:
        raise MdptError(
            f"{len(teachers)} guidances act together only as an ensemble; set policy.ensemble, under which a policy learns, "
            "or evaluation.ensemble, by which it acts, to mean, median or min, the latter also to rank"
        )
    if rule != "rank":
        scales = [values_scale(teacher) for teacher in teachers]
        for other in scales[1:]:
            if other != scales[0]:
                raise MdptError(
                    f"values of {scales[0]} and of {other} have no {rule} together; leave one out (only "
                    "evaluation.ensemble=rank knows no scale)"
                )
    return warnings


def values_scale(guidance: Bundle) -> str:
    """What its values count: guidances with another scale have no mean."""
    scale, discount = guidance["reward_scale"], guidance["experiment"]["guidance"]["discount"]
    return f"rewards x {scale['multiplier']:.6g} + {scale['offset']:.6g}, discounted by {discount:g}"


def pair_members(policies: int, guidances: int) -> list[int]:
    """The guidance member that goes with each policy member: by position; one guidance member serves all.

    Raises: MdptError for any other difference in number, naming both.
    """
    if guidances not in (1, policies):
        raise MdptError(
            f"{policies} policy members cannot be paired with {guidances} guidance members; "
            "use the same number, or a guidance with one member"
        )
    return list(range(policies)) if guidances > 1 else [0] * policies


def select_members(bundle: Bundle, members: Sequence[int]) -> Bundle:
    """The bundle of the given members, in the given order, repetitions allowed, with no more than acting needs."""
    count = len(bundle["seeds"])

    def rows(tensor: Tensor) -> Tensor:  # (S copies, ...)
        return tensor.view(count, -1, *tensor.shape[1:])[list(members)].flatten(0, 1)

    weights = {name: rows(tensor) for name, tensor in acting_weights(bundle).items()}
    bare: Bundle = {"history": [], "snapshots": {}, "training": None, "guidances": []}
    if "quality" in bundle:
        bare["quality"] = [
            {key: [found[i] for i in members] if isinstance(found, list) else found for key, found in entry.items()}
            for entry in bundle["quality"]
        ]
    return bundle | bare | {"weights": weights, "seeds": [bundle["seeds"][member] for member in members]}


def build_guidance(bundle: Bundle, device: str, *, new: bool = False, companion: bool = True) -> Guidance:
    """The guidance of a bundle, frozen, without what only its training needed; new: one that is yet to learn."""
    guidance = Guidance(*_shape(bundle, device), companion=new and companion)
    if new:
        guidance.learning = [guidance.online_q.onlooker()]
        return guidance
    del guidance.online_q  # its targets speak for it
    guidance.load_state_dict(acting_weights(bundle))
    return guidance.requires_grad_(False)


def build_judge(bundles: Sequence[Bundle], rule: str, members: int, device: str, candidates: int = 1) -> Judge:
    """What judges the actions of policy members: a guidance member each, by position, or all members as one."""
    if rule == "none":
        (bundle,) = bundles
        return build_guidance(select_members(bundle, pair_members(members, len(bundle["seeds"]))), device)
    return Ensemble([build_guidance(bundle, device) for bundle in bundles], rule, candidates)


def build_policy(bundle: Bundle, device: str, *, new: bool = False) -> Policy:
    """The policy of a bundle, without its guidance, ready to act; new: one that is yet to learn."""
    policy = Policy(*_shape(bundle, device))
    if not new:
        del policy.denoiser  # its average acts
        policy.load_state_dict(acting_weights(bundle))
        policy.requires_grad_(False).times = policy.average.times()
    return policy


def acting_weights(bundle: Bundle) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in bundle["weights"].items() if name.startswith(ACTING)}


def _shape(bundle: Bundle, device: str) -> tuple[Randomness, Normalizer, Any, int, int]:
    section = getattr(Experiment.model_validate(bundle["experiment"]), bundle["kind"])
    seeds = bundle["seeds"]
    random = Shapes(seeds) if device == "meta" else Randomness(seeds, f"{bundle['kind']} init", device)
    sizes = bundle["environment"]["observation_dim"], bundle["environment"]["action_dim"]
    return random, Normalizer(**bundle["normalizer"]).to(device), section, *sizes


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Named weights as independent CPU tensors, online and target or averaged ones."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


# --- acting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """How an action is chosen: N candidates, ranked by a guidance, sampled at a temperature, perhaps steered.

    ensemble: the rule that makes one of all members of all guidances, or "none": one member judges.
    """

    candidates: int = 1
    selection: str = "max"
    weight_temperature: float = 100.0
    temperature: float = 1.0
    w: float = 1.0
    guidance_weight: float = 0.0
    jacobian: bool = False
    temperature_on: str = "all"
    ensemble: str = "none"


def pick_inference(run: Experiment, guided: bool, step: int) -> tuple[Inference, dict[str, bool]]:
    """What [evaluation] asks of `act`, and which of its settings act. Without a guidance nothing can be ranked.

    step: of the policy's weights.

    Raises: MdptError for a w that this policy cannot take, or a gradient of ranks.
    """
    section, labels = run.evaluation, learns_labels(run.policy, step)  # a policy that saw none has nothing to weigh
    always = guided_steps(run.policy, step) == range(step)  # else it cloned, too
    if labels and section.w != 1 and run.policy.label_dropout == 0 and always:
        raise MdptError(
            f"evaluation.w = {section.w:g}: this policy learned with label_dropout 0 and knows no noise without a label; "
            "only 1 is possible"
        )
    ranked, steered = guided and section.guide != "gradient", guided and section.guide != "rank"
    ensemble = (section.ensemble or run.policy.ensemble) if guided else "none"
    if steered and ensemble == "rank":
        raise MdptError(
            f"evaluation.ensemble = 'rank' has no gradient for guide {section.guide!r}; use another, 'none', or guide 'rank'"
        )
    scaled = section.temperature_on != "steps" or run.policy.sampler != "dpm-solver++"  # whose only noise is the first
    how = Inference(
        candidates=section.candidates if ranked else 1,
        selection=section.selection,
        weight_temperature=section.weight_temperature,
        temperature=section.temperature,
        w=section.w if labels else 0.0,
        guidance_weight=section.guidance_weight if steered else 0.0,
        jacobian=section.jacobian,
        temperature_on=section.temperature_on,
        ensemble=ensemble,
    )
    return how, {
        "candidates": ranked or section.candidates == 1,
        "selection": ranked,
        "weight_temperature": ranked and section.selection == "softmax",
        "guide": guided,
        "guidance_weight": steered,
        "jacobian": steered,
        "ensemble": guided,
        "temperature": scaled,
        "temperature_on": scaled and section.temperature != 1,
        "w": labels,
    }


class Ranker(Protocol):
    """What acting asks of a guidance."""

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Values of actions, as `Guidance.q`."""


@dataclass(frozen=True)
class RowsApart:
    """Judges that share the rows out: the first judges the first `sizes[0]`, and so on."""

    guidances: Sequence[Judge]
    sizes: Sequence[int]

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Raw (1, rows, O), scaled (1, rows, A) -> (1, rows)."""
        shares = (torch.split(tensor, list(self.sizes), dim=1) for tensor in (observations, actions))
        judged = zip(self.guidances, *shares, strict=True)
        return torch.cat([guidance.q(states, chosen) for guidance, states, chosen in judged], dim=1)


@torch.no_grad()
def act(
    policy: Policy,
    guidance: Ranker | None,
    observations: Tensor,
    noises: Tensor,
    uniform: Tensor,
    how: Inference,
) -> Tensor:
    """Choose actions: raw observations (S, B, O) -> (S, B, A), scaled.

    Of N candidates per state the guidance takes the best ("max"), or draws one with probability proportional to
    exp(weight_temperature * q) ("softmax"; V would cancel, since it does not depend on the action). noises: standard
    normal, as from `Policy.noises` for B N rows. uniform: (S, B, N) in [0, 1), for "softmax".
    """
    scale = torch.full((noises.shape[1], 1, 1), 1.0 if how.temperature_on == "start" else how.temperature)
    scale[0] = 1.0 if how.temperature_on == "steps" else how.temperature
    actions = policy.sample(
        observations,
        scale.to(noises.device) * noises,
        candidates=how.candidates,
        w=how.w,
        guidance=guidance,
        guidance_weight=how.guidance_weight,
        jacobian=how.jacobian,
    ).view(*observations.shape[:2], how.candidates, -1)  # (S, B, N, A)
    if guidance is None or how.candidates == 1:
        return actions[:, :, 0]
    repeated = observations.repeat_interleave(how.candidates, dim=1)
    scores = guidance.q(repeated, actions.flatten(1, 2)).view(actions.shape[:3])  # (S, B, N)
    if how.selection == "softmax":  # the Gumbel-max trick draws from the softmax
        scores = how.weight_temperature * scores - (-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
    best = scores.argmax(-1)[..., None, None].expand(-1, -1, 1, actions.shape[-1])
    return actions.gather(2, best).squeeze(2)


SMALL = 16**3  # multiplications; torch multiplies matrices another way where there are no more than these


def fewest_rows(*parts: nn.Module) -> int:
    """Rows from which on no product of these modules is SMALL: what a row gives then depends on no other, by oneDNN."""
    sizes = [layer.weight[0].numel() for part in parts for layer in part.modules() if isinstance(layer, Linear)]
    return 1 + SMALL // min(sizes, default=SMALL + 1)


class Agent:
    """One policy member in numbered episodes that run side by side, perhaps under a guidance member each.

    judges: the position of each episode's guidance member, ascending; by default the first serves all, or an ensemble
    of all members of all guidances. What an episode draws depends on the policy member's seed, the episode's number, the
    step and `seed` alone.
    """

    def __init__(
        self,
        policy: Bundle,
        guidances: Sequence[Bundle],
        how: Inference,
        *,
        seed: int,
        episodes: Sequence[int],
        judges: Sequence[int] | None = None,
    ) -> None:
        self.policy, self.how, apart = build_policy(policy, "cpu"), how, [guidances] if guidances else []
        if how.ensemble == "none":
            apart = [[select_members(each, [member])] for each in guidances for member in range(len(each["seeds"]))]
        self.guidances = [build_judge(each, how.ensemble, 1, "cpu", how.candidates) for each in apart]
        self.judges = np.array(judges or [0] * len(episodes))
        critics = chain.from_iterable(one.guidances if isinstance(one, Ensemble) else [one] for one in self.guidances)
        self.fewest, self.fewest_apart = fewest_rows(self.policy), math.ceil(fewest_rows(*critics) / how.candidates)
        (member,) = policy["seeds"]
        self.random = Randomness([f"{member} episode {episode}" for episode in episodes], f"evaluate {seed}")

    def __call__(self, observations: Array, running: Array) -> Array:
        """Actions (R, A) in [-1, 1], from observations (R, O) of the episodes at the places `running` (R,)."""
        judges, count = self.judges[running], self.how.candidates
        shares = [np.flatnonzero(judges == judge) for judge in np.unique(judges)]
        places = np.concatenate([np.resize(share, max(len(share), self.fewest_apart)) for share in shares])
        places = np.pad(places, (0, max(0, self.fewest - len(places))), "edge")  # where states are few, some act twice
        rows = torch.from_numpy(running[places])
        noises = self.policy.noises(self.random, "act", count)[rows]  # (R, T, N, A)
        uniform = self.random.uniform("selection", count)[rows]  # (R, N)
        self.random.step += 1
        states = torch.from_numpy(observations[places])[None]
        noises = noises.transpose(0, 1).flatten(1, 2)[None]  # (1, T, R N, A)
        sizes = count * np.bincount(judges[places], minlength=len(self.guidances))
        ranker = RowsApart(self.guidances, sizes.tolist()) if self.guidances else None
        actions = np.empty((len(running), noises.shape[-1]), np.float32)
        actions[places] = act(self.policy, ranker, states, noises, uniform[None], self.how)[0].numpy()
        return actions


@dataclass(frozen=True)
class Play:
    """A task for a worker: rollouts of a policy of one member, each a number of episode and a judge, as for `Agent`."""

    policy: Bundle
    guidances: tuple[Bundle, ...]
    judges: tuple[int, ...]
    episodes: tuple[int, ...]
    how: Inference
    seed: int
    products: str


def play(task: Play, watch: Watch, **film: Any) -> tuple[Array, Array]:
    """Raw returns and lengths of a task's episodes, as from `data.rollout`; on one thread, so that no bit depends on
    how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        choose_products(task.products)
        agent = Agent(task.policy, task.guidances, task.how, seed=task.seed, episodes=task.episodes, judges=task.judges)
        spec = EnvironmentSpec(**task.policy["environment"])
        return rollout(agent, spec, task.episodes, seed=task.seed, watch=watch, **film)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def judge_offline(
    policy: Bundle,
    teachers: Sequence[Bundle],
    how: Inference,
    held_out: HeldOut,
    seed: int,
    judges: Mapping[str, tuple[Sequence[Bundle], str]],
) -> dict[str, Any]:
    """What can be said of a policy without playing, on up to 2,000 held-out states; lists hold a figure per member.

    distance: root mean square difference between its action and the data's, in [-1, 1]; chance: between the data's
    actions of two states. For each of `judges`, guidances and how they judge as one: mean Q of its actions and of the
    data's, and how often its own is higher.
    """
    count = len(policy["seeds"])
    some = np.linspace(0, len(held_out.rewards) - 1, min(len(held_out.rewards), 2_000)).astype(np.int64)
    observations, actions = (torch.from_numpy(array[some]) for array in (held_out.observations, held_out.actions))
    states, data = observations.expand(count, -1, -1), actions.expand(count, -1, -1)
    actor, random = build_policy(policy, "cpu"), Randomness(policy["seeds"], f"evaluate {seed} offline")
    noises = actor.noises(random, "act", len(some) * how.candidates)
    uniform = random.uniform("selection", len(some), how.candidates)
    ranker = build_judge(teachers, how.ensemble, count, "cpu", how.candidates) if teachers else None
    chosen = act(actor, ranker, states, noises, uniform, how).clamp(-1, 1)
    values = {}
    for name, (bundles, rule) in judges.items():
        guidance = build_judge(bundles, rule, count, "cpu")
        own, given = guidance.q(states, chosen), guidance.q(states, data)
        values[name] = {"policy": own.mean(1).tolist(), "data": given.mean(1).tolist()}
        values[name]["higher"] = (own > given).float().mean(1).tolist()
    return {
        "states": len(some),
        "distance": (chosen - data).square().mean((1, 2)).sqrt().tolist(),
        "chance": float((actions - actions.roll(len(some) // 2, 0)).square().mean().sqrt()),
        "values": values,
    }


def load_agent(
    path: Path | str,
    guidance: Path | str | Sequence[Path | str] | None = None,
    *,
    member: int = 0,
    **evaluation: Any,
) -> Callable[[Array], Array]:
    """A policy for other programs: observations (O,) or (E, O) -> actions (A,) or (E, A), in the environment's unit.

    guidance: another bundle to act under than what is inside, several, or "none". member: by position. evaluation: fields
    of [evaluation], such as candidates, ensemble or seed, over those of the policy's experiment.

    Raises: MdptError, as for `mdpt evaluate`.
    """
    bundle = read_policy(Path(path))
    names = [guidance] if isinstance(guidance, str | Path) else guidance or ()
    teachers = read_named(list(map(str, names))) if names else bundle["guidances"]
    if member not in range(count := len(bundle["seeds"])):
        raise MdptError(f"{path}: has no member {member}; there are 0 to {count - 1}")
    table = bundle["experiment"] | {"evaluation": bundle["experiment"]["evaluation"] | evaluation}
    run = check_experiment(str(path), table)
    how, _ = pick_inference(run, bool(teachers), bundle["step"])
    check_teachers(bundle, teachers, how.ensemble)
    if how.ensemble == "none":
        teachers = [select_members(each, [pair_members(count, len(each["seeds"]))[member]]) for each in teachers]
    one, spec, agents = select_members(bundle, [member]), EnvironmentSpec(**bundle["environment"]), {}
    choose_products()  # as where it is scored

    def choose(observations: Array) -> Array:
        rows = np.atleast_2d(np.asarray(observations, dtype=np.float32))
        if rows.ndim != 2 or rows.shape[1] != spec.observation_dim or not np.isfinite(rows).all():
            raise MdptError(
                f"{path}: observations of shape {np.shape(observations)}; expected ({spec.observation_dim},) or "
                f"(E, {spec.observation_dim}), finite"
            )
        if not len(rows):
            return np.empty((0, spec.action_dim), np.float32)
        if len(rows) not in agents:
            agents[len(rows)] = Agent(one, teachers, how, seed=run.evaluation.seed, episodes=range(len(rows)))
        actions = unscale_actions(agents[len(rows)](rows, np.arange(len(rows))), spec)
        return actions if np.ndim(observations) == 2 else actions[0]

    return choose


# --- learning -----------------------------------------------------------------------------------------------------


@dataclass
class Parameters:
    """A network that learns: its optimizer, initial learning rate, and what its section says of both."""

    network: Stack
    learning_rate: float
    section: TrainingSection

    def __post_init__(self) -> None:
        self.gradient = self.network.vector.grad = torch.zeros_like(self.network.vector)
        weight_decay = self.section.weight_decay
        self.adam = torch.optim.AdamW([self.network.vector], self.learning_rate, weight_decay=weight_decay, fused=True)


class Learner:
    """Modules that learn together under one loss, with Adam, cosine decay and a gradient-norm limit per member.

    frozen: guidance that the loss uses and nothing here changes; it only counts as held.
    """

    def __init__(
        self,
        modules: Sequence[tuple[Guidance | Policy, TrainingSection]],
        loss: Callable[[Batch, Randomness, float], Loss],
        frozen: Sequence[Judge] = (),
    ) -> None:
        self.modules, self.loss, self.frozen = [module for module, _ in modules], loss, frozen
        self.networks = [
            Parameters(network, rate, section) for module, section in modules for network, rate in module.networks()
        ]
        self.parameters = [parameter for each in self.networks for parameter in each.network.parameters()]

    def update(self, loss: Tensor, step: int, steps: int) -> None:
        """One gradient step of every network, then targets and averages follow. loss: (S,)."""
        gradients = iter(torch.autograd.grad(loss.sum(), self.parameters))
        for each in self.networks:
            pieces = [next(gradients).flatten(1) for _ in each.network.parameters()]
            torch.cat(pieces, dim=1, out=each.gradient[:, : each.network.size])
            by_member = each.gradient.view(len(loss), -1)  # (S, copies * P)
            if each.section.gradient_norm > 0:
                norm = torch.linalg.vector_norm(by_member, dim=1, keepdim=True)
                by_member.mul_((each.section.gradient_norm / (norm + 1e-6)).clamp(max=1.0))
            left = 0.5 * (1 + math.cos(math.pi * step / steps)) if each.section.decay == "cosine" else 1.0
            each.adam.param_groups[0]["lr"] = each.learning_rate * left
            each.adam.step()
        for module in self.modules:
            module.follow(step)

    def broken_member(self) -> int | None:
        """The first member with a weight that is not finite."""
        rows = [each.network.vector.view(each.network.members, -1) for each in self.networks]
        finite = torch.cat(rows, dim=1).isfinite().all(1)
        return None if finite.all() else int(finite.int().argmin())

    def state(self) -> list[dict[str, Tensor]]:
        """Optimizer states, one per network; rates and limits follow from the experiment."""
        return [dict(each.adam.state[each.network.vector]) for each in self.networks]

    def restore(self, states: Sequence[dict[str, Tensor]]) -> None:
        for each, state in zip(self.networks, states, strict=True):
            each.adam.load_state_dict(each.adam.state_dict() | {"state": {0: state}})


@dataclass
class Run:
    """How a training run meets the world: what it goes on from, and what hears of it.

    begun: an unfinished bundle of the same run. extend: it may have more steps now. save: keeps the bundle. show: hears
    each new entry of the history. interrupted: the number of the signal to end after this step for, or 0. tell: hears
    what is noteworthy.
    """

    device: str = "cpu"
    begun: Bundle | None = None
    extend: bool = False
    save: Callable[[Bundle], None] = lambda bundle: None
    show: Callable[[dict[str, Any]], None] = lambda entry: None
    interrupted: Callable[[], int] = lambda: 0
    tell: Callable[[str], None] = lambda text: None

    def choose_products(self) -> str:
        """What multiplies matrices: as in the run that was begun, where this machine can."""
        return choose_products(None if self.begun is None else self.begun["accounting"]["products"])


def train(
    learner: Learner,
    transitions: Transitions,
    section: TrainingSection,
    bundle: Bundle,
    parts: Sequence[tuple[Bundle, Guidance | Policy]],
    cost: Cost,
    run: Run,
) -> None:
    """The training loop of guidance and policy alike: sample, step, log, save.

    parts: the modules that learn, each with the bundle its weights go to: `bundle` itself, or one inside it.
    """
    steps, seeds, start = section.steps, bundle["seeds"], bundle["step"]
    random = Randomness(seeds, f"{bundle['kind']} train", transitions.device)
    milestones = {round(steps * (i + 1) / section.snapshots) for i in range(section.snapshots)}
    history = History(bundle["history"], start, seeds)
    history.pending = (bundle.get("training") or {"pending": []})["pending"]
    due = time.monotonic() + section.save_every
    for step in range(start, steps):
        random.step = step
        batch = transitions.sample(random, section.batch_size)
        loss, metrics = learner.loss(batch, random, step / steps)
        learner.update(loss, step, steps)
        history.record(loss.detach(), metrics)
        done, stopped = step + 1, run.interrupted()
        if done % max(1, steps // 200) == 0 or done in milestones or done == steps:
            run.show(history.average())
        began = time.monotonic()
        if done in milestones or stopped or began >= due:
            if (member := learner.broken_member()) is not None:
                history.give_up("weights", member, "not finite", done)
            for target, module in parts:
                keep_weights(target, module, done, done == steps, done in milestones)
                target["accounting"] = cost.read(learner, done)
            bundle["training"] = None if done == steps else {"optimizers": learner.state(), "pending": history.pending}
            run.save(bundle)
            history.saved = done
            due = time.monotonic() + max(section.save_every, 20 * (time.monotonic() - began))  # a twentieth at most
        if stopped and done < steps:
            raise Interrupted(f"interrupted after step {done} of {steps}; the same command goes on", stopped)


def keep_weights(bundle: Bundle, module: nn.Module, step: int, complete: bool, snapshot: bool) -> None:
    """Put a module's weights into its bundle, and beside them, if this is a snapshot, those that act."""
    weights = weights_of(module)
    if complete:  # a companion actor has done its work
        weights = {name: value for name, value in weights.items() if not name.startswith("actor.")}
    bundle.update(step=step, complete=complete, weights=weights)
    if snapshot:
        bundle["snapshots"] = bundle["snapshots"] | {step: acting_weights(bundle)}


class History:
    """What a run's losses and metrics were, averaged over the steps between two entries; it ends with the first NaN.

    entries: of the bundle, which this continues. saved: the last step that was saved.
    """

    def __init__(self, entries: list[dict[str, Any]], start: int, seeds: Sequence[int]) -> None:
        self.entries, self.saved, self.seeds = entries, start, seeds
        self.pending: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.start, self.began = start, time.perf_counter()

    def record(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        self.pending.append((loss, metrics))

    def average(self) -> dict[str, Any]:
        """A new entry of what came since the last; one transfer from the device. Raises: MdptError for a NaN."""
        done = (self.entries[-1]["step"] if self.entries else 0) + len(self.pending)
        losses = torch.stack([loss for loss, _ in self.pending]).cpu()  # (steps, S)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step, member = done - len(self.pending) + int(bad[0, 0]), int(bad[0, 1])
            self.give_up("loss", member, losses[bad[0, 0], member].item(), step)
        names = sorted({name for _, metrics in self.pending for name in metrics})
        means = {
            name: torch.stack([metrics[name] for _, metrics in self.pending if name in metrics]).mean(0).tolist()
            for name in names
        }
        self.entries.append({"step": done, "loss": losses.mean(0).tolist(), **means})
        self.pending.clear()
        return self.entries[-1]

    def give_up(self, what: str, member: int, value: object, step: int) -> NoReturn:
        """End the run: raises MdptError."""
        last = f"the last good weights, of step {self.saved}, are kept" if self.saved else "no snapshot was reached"
        raise MdptError(
            f"the {what} of member {member} (seed {self.seeds[member]}) became {value} at step {step}; {last}; "
            "lower learning_rate or look at the data"
        )


class Cost:
    """What a training run costs: time, memory above the loaded dataset, parameters, optimizer state."""

    def __init__(self, device: torch.device, products: str, begun: Bundle | None) -> None:
        self.device, self.products = device, products
        self.before = {"seconds": 0.0, "peak_bytes": 0} if begun is None else begun["accounting"]
        self.began, self.base = time.perf_counter(), memory_now(device, restart=True)

    def read(self, learner: Learner, step: int) -> dict[str, Any]:
        """The account after `step` gradient steps; counts and bytes are of all members together."""
        seconds = self.before["seconds"] + time.perf_counter() - self.began
        state = [value for each in learner.networks for state in each.adam.state.values() for value in state.values()]
        held = [p.numel() for module in (*learner.modules, *learner.frozen) for p in module.parameters()]
        return {
            "parameters_trained": sum(parameter.numel() for parameter in learner.parameters),
            "parameters_held": sum(held),
            "optimizer_bytes": sum(value.nbytes for value in state if torch.is_tensor(value)),
            "peak_bytes": max(self.before["peak_bytes"], memory_now(self.device) - self.base),
            "seconds": seconds,
            "seconds_per_1000_steps": 1000 * seconds / step,
            "device": str(self.device),
            "products": self.products,
        }


def memory_now(device: torch.device, *, restart: bool = False) -> int:
    """Peak bytes since the last restart, allocated on CUDA, resident on a CPU; restart: from the current ones on."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # no Linux, or one that hides this: the whole process's peak is all there is
        import resource  # not there on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(name: str) -> str:
    """ "cpu" or "cuda". Raises: MdptError where cuda is asked for and missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MdptError("device cuda: this machine or this torch has none; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def train_guidance(experiment: Experiment, dataset: Dataset, run: Run) -> Bundle:
    """Train a guidance from the data alone and judge it on held-out episodes."""
    experiment, run = check_algorithms(experiment), replace(run, device=pick_device(run.device))
    bundle = new_bundle("guidance", experiment, dataset)
    transitions = Transitions(dataset.rows, dataset.sizes, run.device, dataset.section.storage == "disk")
    cost = Cost(transitions.device, run.choose_products(), run.begun)
    guidance = build_guidance(bundle, run.device, new=True)
    learner = Learner([(guidance, experiment.guidance)], lambda batch, random, _: guidance.loss(batch, random))
    go_on(bundle, run, [(bundle, guidance)], learner)

    def save(bundle: Bundle) -> None:
        if bundle["complete"]:  # never without its judgement
            bundle["quality"] = judge_guidance(bundle, dataset.held_out, run.device)
        run.save(bundle)

    train(learner, transitions, experiment.guidance, bundle, [(bundle, guidance)], cost, replace(run, save=save))
    return bundle


def train_policy(experiment: Experiment, dataset: Dataset, teachers: Sequence[Bundle], run: Run) -> Bundle:
    """Train a policy under frozen guidance, together with its own ("joint"), or unguided.

    teachers: one, or several that teach as one by `[policy] ensemble`. Raises: MdptError where they cannot.
    """
    experiment, run = check_algorithms(experiment), replace(run, device=pick_device(run.device))
    section = experiment.policy
    if bool(teachers) != (section.scheme == "guidance-first"):
        raise MdptError(
            f"scheme {section.scheme}: got {len(teachers)} teachers; guidance-first alone has any, one or more"
        )
    bundle = new_bundle("policy", experiment, dataset)
    transitions = Transitions(dataset.rows, dataset.sizes, run.device, dataset.section.storage == "disk")
    cost = Cost(transitions.device, run.choose_products(), run.begun)
    policy = build_policy(bundle, run.device, new=True)
    parts: list[tuple[Bundle, Guidance | Policy]] = [(bundle, policy)]
    frozen: list[Judge] = []
    joint: Guidance | None = None
    if section.scheme == "joint":
        bundle["guidances"] = [new_bundle("guidance", experiment, dataset)]
        joint = build_guidance(bundle["guidances"][0], run.device, new=True, companion=False)
        parts.insert(0, (bundle["guidances"][0], joint))
    if teachers:
        check_teachers(bundle, teachers, section.ensemble)
        bare: Bundle = {"snapshots": {}, "training": None}  # what acts, not how it got there
        bundle["guidances"] = [each | bare | {"weights": acting_weights(each)} for each in teachers]
        frozen = [build_judge(teachers, section.ensemble, policy.members, run.device)]
    guidance = joint or next(iter(frozen), None)

    def loss(batch: Batch, random: Randomness, done: float) -> Loss:
        guided = section.guidance_from <= done < section.guidance_until
        own = policy.loss(batch, guidance if guided else None, random)
        if joint is None:
            return own
        labelled = learns_labels(section) and done >= section.guidance_from  # until then it knows no labels
        act_alone = functools.partial(policy.act_alone, w=float(labelled))
        return add(own, joint.loss(batch, random, act_alone))

    tables: dict[str, TrainingSection] = {"guidance": experiment.guidance, "policy": section}
    learner = Learner([(module, tables[target["kind"]]) for target, module in parts], loss, frozen)
    go_on(bundle, run, parts, learner)
    train(learner, transitions, section, bundle, parts, cost, run)
    return bundle


def go_on(bundle: Bundle, run: Run, parts: Sequence[tuple[Bundle, Guidance | Policy]], learner: Learner) -> None:
    """Bring a new bundle, its modules and their optimizers to where the run that was begun stopped, if one was.

    Raises: MdptError where that was another run, naming what differs.
    """
    if (begun := run.begun) is None:
        return
    check_same_run(bundle, begun, run.extend)
    bundle |= {key: begun[key] for key in ("step", "history", "accounting")}
    for target, module in parts:
        stored = begun if target is bundle else begun["guidances"][0]
        target["snapshots"] = stored["snapshots"]
        module.load_state_dict(stored["weights"])
    learner.restore(begun["training"]["optimizers"])
    bundle["training"] = {
        "pending": [
            (loss.to(run.device), {name: value.to(run.device) for name, value in metrics.items()})
            for loss, metrics in begun["training"]["pending"]
        ]
    }
    steps, planned = (each["experiment"][each["kind"]]["steps"] for each in (bundle, begun))
    schedule = f"; the learning rate now falls over {steps} steps, not {planned}" if steps != planned else ""
    run.tell(f"going on from step {begun['step']}{schedule}")
    device, products = begun["accounting"]["device"].partition(":")[0], begun["accounting"]["products"]
    if device != run.device:
        run.tell(f"was begun on {device}, goes on on {run.device}: other random numbers than it would have had")
    elif products != run.choose_products():
        run.tell(f"was begun with {products} matrix products, which this machine has not: its rounding changes")


def check_same_run(ours: Bundle, theirs: Bundle, extend: bool) -> None:
    """Raises: MdptError naming what differs, of all that shapes a module: its tables, seeds, training set, guidance.

    extend: there may be more steps.
    """
    if ours["kind"] != theirs["kind"]:
        raise MdptError(
            f"is an unfinished {theirs['kind']} bundle, expected a {ours['kind']} bundle; choose another --out, or "
            "--overwrite to replace it"
        )
    joint = ours["kind"] == "policy" and ours["experiment"]["policy"]["scheme"] == "joint"
    unused = {"guidance": {"steps", "batch_size"} if joint else set()}  # the pace is the policy's
    fields = {
        f"[{table}] {key}": [bundle["experiment"][table].get(key) for bundle in (ours, theirs)]
        for table in ("guidance", "policy")
        if joint or table == ours["kind"]
        for key in ours["experiment"][table].keys() - unused.get(table, set()) - {"snapshots", "save_every"}
    }
    fields |= {
        f"[data] {key}": [bundle["experiment"]["data"].get(key) for bundle in (ours, theirs)]
        for key in ("seed", "fraction", "held_out", "reward_scale", "normalization")
    }
    fields["seeds"] = [bundle["seeds"] for bundle in (ours, theirs)]
    fields["environment"] = [EnvironmentSpec(**bundle["environment"]) for bundle in (ours, theirs)]
    fields["data (by content)"] = [bundle["dataset"]["hash"][:8] for bundle in (ours, theirs)]
    steps = f"[{ours['kind']}] steps"
    longer = fields[steps][0] > fields[steps][1]
    section = ours["experiment"]["policy"]
    movable = ours["kind"] != "policy" or (section["guidance_from"], section["guidance_until"]) == (0, 1)  # no window
    if extend and longer and movable:
        del fields[steps]
    changed = {name: f"{name} was {was}, is {now}" for name, (now, was) in sorted(fields.items()) if now != was}
    if not joint and not (
        len(ours["guidances"]) == len(theirs["guidances"])
        and all(map(same_weights, ours["guidances"], theirs["guidances"]))
    ):
        changed["guidance"] = "the guidance has other weights"
    if changed:
        hint = "; --extend lets it have more steps" if [*changed] == [steps] and longer and movable else ""
        raise MdptError(f"was begun as another run: {'; '.join(changed.values())}{hint}; --overwrite begins anew")


def same_weights(first: Bundle, second: Bundle) -> bool:
    """Whether two bundles act alike."""
    ours, theirs = acting_weights(first), acting_weights(second)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def judge_guidance(bundle: Bundle, held_out: HeldOut, device: str) -> list[dict[str, Any]]:
    """What `guidance_quality` finds of a guidance bundle at each of its snapshots, the last of which is what it is."""
    discount = bundle["experiment"]["guidance"]["discount"]
    return [
        {"step": step} | guidance_quality(build_guidance(bundle | {"weights": weights}, device), held_out, discount)
        for step, weights in bundle["snapshots"].items()
        if len(held_out.rewards)
    ]


OTHERS = 4  # actions that an action is measured against


@torch.no_grad()
def guidance_quality(guidance: Guidance, held_out: HeldOut, discount: float) -> dict[str, Any]:
    """How far to trust a guidance, on held-out episodes; lists hold a figure per member.

    correlation: Pearson's, of V and discounted Monte-Carlo returns; advantage_correlation: of return - V and what Q gives
    to the row's action above the mean of OTHERS actions of other rows, which is about actions alone (not of Q - V: there
    an error of V is on both sides, and correlates where actions matter to nothing). Over rows whose return is known: the
    episode ended, or what a time limit cut off weighs at most 5 %. Where none is, all rows count, and V at the limit
    stands for what came after it (bootstrapped). V is an upper expectile: it lies above the returns, unless values have
    not spread yet. q_spread: the deviation of Q over members, averaged, and over rows.
    """
    found = []
    device = guidance.value.vector.device
    apart = [max(1, len(held_out.actions) * k // (OTHERS + 1)) for k in range(1, OTHERS + 1)]  # mostly other episodes
    others = [np.roll(held_out.actions, rows, axis=0) for rows in apart]
    tensors = [torch.from_numpy(array) for array in (held_out.observations, held_out.actions, *others)]
    for block in zip(*(torch.split(tensor, 8192) for tensor in tensors), strict=True):
        observations, *actions = (part.to(device).expand(guidance.members, -1, -1) for part in block)
        found.append(
            torch.stack([guidance.v(observations), *(guidance.q(observations, each) for each in actions)]).cpu()
        )
    v, q, *theirs = torch.cat(found, dim=-1).double().numpy()  # (S, rows)
    gains = q - np.mean(theirs, axis=0)
    rewards, terminals, timeouts = held_out.rewards, held_out.terminals, held_out.timeouts
    shared, known = discounted_returns(rewards, terminals, timeouts, discount)
    returns = np.broadcast_to(shared, v.shape)
    if bootstrapped := not known.any():
        _, stops = episode_bounds(terminals, timeouts)
        cut = np.zeros(len(rewards), dtype=np.bool_)
        cut[stops - 1] = ~terminals[stops - 1]
        known, columns = ~cut, np.where(cut, v, rewards)  # (S, rows): a last V is a last reward
        returns = np.stack([discounted_returns(column, terminals, timeouts, discount)[0] for column in columns])
    v, gains, returns = v[:, known], gains[:, known], returns[:, known]

    def correlate(first: Array, second: Array) -> list[float | None]:
        return [
            float(np.corrcoef(one, other)[0, 1]) if known.sum() > 1 and one.std() > 0 and other.std() > 0 else None
            for one, other in zip(first, second, strict=True)
        ]

    return {
        "rows": int(known.sum()),
        "bootstrapped": bootstrapped,
        "correlation": correlate(v, returns),
        "advantage_correlation": correlate(gains, returns - v),
        "mean_v": v.mean(1).tolist() if known.any() else [None] * len(v),
        "mean_return": returns.mean(1).tolist() if known.any() else [None] * len(v),
        "q_spread_members": float(q.std(0).mean()) if len(q) > 1 else None,
        "q_spread_rows": float(q.std(1).mean()),
    }
