"""What is learned: networks, diffusion, losses, guidance, policies, bundles.

Shapes: S members (one per seed), B batch, N candidates, O observation dimensions, A action dimensions,
T diffusion steps, E environments, H hidden units. Observations are raw, actions are scaled to [-1, 1],
rewards are scaled by the dataset's reward scale.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = tuple[Tensor, dict[str, Tensor]]  # the loss of each member, (S,), and metrics of the same shape
Bundle = dict[str, Any]
Module = TypeVar("Module", bound=nn.Module)

# --- matrix products --------------------------------------------------------------------------------------------


def choose_products(wanted: str | None = None) -> str:
    """Route the CPU's float32 matrix products for this process: "oneDNN" or "default"; returns which it is.

    wanted: what an earlier process used, taken where this one can; None: oneDNN where it serves. CUDA is untouched.
    """
    if not _onednn_serves():
        return "default"
    _switch().fp32_precision = "none" if wanted == "default" else "bf16"
    return wanted or "oneDNN"


def _switch() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)  # torch has it since 2.9


@functools.cache
def _onednn_serves() -> bool:
    """Whether oneDNN multiplies float32 exactly, on a processor for which MKL has only its AVX2 kernels.

    torch sends products there only by leave to round them to bfloat16. oneDNN makes use of that leave where the
    processor has units for it, so one product is checked. The processor decides, not a timing: a continued run must
    not choose otherwise because the machine was busy.
    """
    switch = _switch()
    if not hasattr(switch, "fp32_precision") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        processor = platform.processor()
    if "AuthenticAMD" not in processor:
        return False
    first, second = torch.randn(2, 2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = first.double() @ second.double()
    switch.fp32_precision = "bf16"
    error = (torch.bmm(first, second) - exact).abs().max() / exact.abs().max()
    switch.fp32_precision = "none"
    return bool(error < 1e-5)


# --- randomness and batches -------------------------------------------------------------------------------------


class Randomness:
    """Named streams of random numbers, one per member.

    Each draw depends on (member seed, purpose, name, step) alone. So member k of many draws what seed k alone
    draws, a resumed run draws what an uninterrupted one would have, and adding a draw changes no other.
    Values are made for a block of steps at once, so that no training step loops over the members.
    """

    def __init__(self, seeds: Sequence[int], purpose: str, device: torch.device | str = "cpu") -> None:
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
        key = f"{name}{shape}"
        if key not in self._blocks or self._blocks[key][0] != block:
            members = [
                fill(torch.empty(length, *shape, dtype=dtype, device=self.device), self._seeded(seed, name, block))
                for seed in self.seeds
            ]
            self._blocks[key] = block, torch.stack(members, dim=1)
        return self._blocks[key][1][offset]

    def _seeded(self, seed: int, name: str, block: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed}/{self.purpose}/{name}/{block}".encode(), digest_size=8).digest()
        return self._generator.manual_seed(int.from_bytes(digest) >> 1)


@dataclass(frozen=True)
class Batch:
    """Transitions drawn for each member: observations (S, B, O), actions (S, B, A), the others (S, B).

    labels: 1 where the frozen guidance calls the action an improvement (advantage > 0), or None if nothing labelled.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    labels: Tensor | None = None


class Transitions:
    """A dataset as one tensor of rows on the training device, so that a batch is one gather."""

    def __init__(self, columns: Mapping[str, Any], device: torch.device | str) -> None:
        order = [field.name for field in dataclasses.fields(Batch) if field.name != "labels"]
        parts = [torch.as_tensor(columns[name], dtype=torch.float32) for name in order]
        parts = [part if part.ndim == 2 else part[:, None] for part in parts]
        self.sizes = [part.shape[1] for part in parts]
        self.rows = torch.cat(parts, dim=1).to(device)  # (n, 2 O + A + 2)
        self.labels: Tensor | None = None  # (S, n)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Batch:
        """The transitions of rows `index`, (S, B)."""
        rows = self.rows.index_select(0, index.flatten()).view(*index.shape, -1)
        observations, actions, rewards, next_observations, terminals = torch.split(rows, self.sizes, dim=-1)
        labels = None if self.labels is None else self.labels.gather(1, index)
        return Batch(observations, actions, rewards.squeeze(-1), next_observations, terminals.squeeze(-1), labels)

    def label(self, guidance: Guidance) -> None:
        """Label every transition once: 1 where the frozen guidance's advantage is positive, for each member."""
        parts = []
        with torch.no_grad():
            for rows in torch.split(self.rows, 8_192):
                observations, actions, *_ = torch.split(rows.expand(guidance.members, -1, -1), self.sizes, dim=-1)
                parts.append(guidance.advantage(observations, actions) > 0)
        self.labels = torch.cat(parts, dim=1)

    def sample(self, random: Randomness, batch_size: int) -> Batch:
        """A batch for each member, drawn uniformly with replacement."""
        return self.take(random.integers("batch", len(self), batch_size))


# --- networks ---------------------------------------------------------------------------------------------------


class _Mish(torch.autograd.Function):
    """x tanh(softplus(x)) = x f, f = n / (n + 2), n = e^x (e^x + 2): one exponential instead of three functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e, half = _half_n(x)
        rest = half.add(1.0).reciprocal_()  # 2 / (n + 2) = 1 - f
        factor = half.mul_(rest)  # f as 1 - rest would lose its digits where x is negative
        slope = torch.addcmul(factor, x, rest.square_().mul_(e.addcmul_(e, e)))  # f + x e (e + 1) (1 - f)^2
        ctx.save_for_backward(slope)
        return factor.mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope  # type: ignore[no-any-return]


def _half_n(x: Tensor) -> tuple[Tensor, Tensor]:
    e = x.clamp(max=40.0).exp_()  # beyond 40 the factor is 1, and e^(2x) must not overflow
    return e, torch.addcmul(e, e, e, value=0.5)


def mish(x: Tensor) -> Tensor:
    """Mish (arXiv 1908.08681)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)  # type: ignore[no-untyped-call, no-any-return]
    e, half = _half_n(x)
    return half.div_(torch.add(half, 1.0, out=e)).mul_(x)


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

    def pack(self) -> None:
        """Move the parameters into one tensor, each row a whole number of the longest SIMD words.

        An optimizer then rounds a row the same way however many there are.
        """
        parameters = list(self.parameters())
        sizes = [parameter[0].numel() for parameter in parameters]
        self.size = sum(sizes)
        pieces = torch.cat([parameter.detach().flatten(1) for parameter in parameters], dim=1)
        self.vector = functional.pad(pieces, (0, -self.size % 16))
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

    @torch.no_grad()
    def follow(self, online: Stack, rate: float) -> None:
        """self <- (1 - rate) self + rate online."""
        self.vector.lerp_(online.vector, rate)

    def pick(self, members: Sequence[int]) -> None:
        """Keep the given members, in the given order, repetitions allowed."""
        rows = [member * self.copies + copy for member in members for copy in range(self.copies)]
        for parameter in self.parameters():
            parameter.data = parameter.data[rows]
        self.pack()


class ValueNetwork(Stack):
    """Multilayer perceptron to one value: (S copies, B, inputs) -> (S copies, B).

    layer_norm: normalize before each activation, which keeps values of unseen inputs near seen ones (RLPD,
    arXiv 2302.02948).
    """

    def __init__(
        self,
        random: Randomness,
        name: str,
        inputs: int,
        hidden: Sequence[int],
        activation: str,
        layer_norm: bool,
        copies: int = 1,
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden, 1]
        self.copies, self.activation = copies, ACTIVATIONS[activation]
        self.layers = nn.ModuleList(
            Linear(random, f"{name}.{i}", sizes[i], sizes[i + 1], copies=copies) for i in range(len(sizes) - 1)
        )
        rows = copies * len(random.seeds)
        self.norms = nn.ModuleList(LayerNorm(rows, width, random.device) for width in hidden if layer_norm)
        self.pack()

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        *hidden, last = self.layers
        for layer, norm in zip_longest(hidden, self.norms):
            x = layer(x, rows)
            x = self.activation(x if norm is None else norm(x, rows))
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
            kept = random.uniform(f"{self.name}.dropout", *x.shape[1:]) >= self.dropout
            y = x * (kept / (1.0 - self.dropout))
        return x + self.narrow(self.activation(self.widen(self.norm(y))))  # type: ignore[no-any-return]


class Denoiser(Stack):
    """Predicts the noise in a noisy action: (S, B, A) -> (S, B, A), given the observation and the diffusion step.

    The first layer acts on [action, step, observation, label]. It is kept as a sum of maps, so that the observation's
    share is computed once for a whole chain and the step's once for all rows. `network`: "mlp" (Diffusion-QL,
    arXiv 2208.06193) or "resnet" (IDQL, arXiv 2304.10573). `labels`: adds an embedding of {dropped, worse, better}.
    """

    features: Tensor

    def __init__(
        self,
        random: Randomness,
        *,
        observation_dim: int,
        action_dim: int,
        diffusion_steps: int,
        network: str,
        labels: bool,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
        time_features: int,
    ) -> None:
        super().__init__()
        self.activation, first = ACTIVATIONS[activation], hidden[0]
        fan_in = action_dim + time_features + observation_dim
        self.observation = Linear(random, "observation", observation_dim, first, fan_in=fan_in)
        self.action = Linear(random, "action", action_dim, first, fan_in=fan_in)
        self.time_in = Linear(random, "time_in", time_features, 2 * time_features)
        self.time_out = Linear(random, "time_out", 2 * time_features, time_features)
        self.time = Linear(random, "time", time_features, first, fan_in=fan_in)
        self.label = Linear(random, "label", 3, first, fan_in=fan_in) if labels else None
        if network == "resnet":
            names = [f"block{i}" for i in range(len(hidden))]
            self.trunk = nn.ModuleList(ResidualBlock(random, name, first, activation, dropout) for name in names)
        else:
            self.trunk = nn.ModuleList(Linear(random, f"hidden{i}", a, b) for i, (a, b) in enumerate(pairwise(hidden)))
        self.residual = network == "resnet"
        self.out = Linear(random, "out", hidden[-1], action_dim)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(time_features // 2) / max(1, time_features // 2 - 1))
        angles = torch.arange(diffusion_steps)[:, None] * frequencies
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
        x = self.action(actions) + condition + time
        if self.residual:
            for block in self.trunk:
                x = block(x, random)
            x = self.activation(x)
        else:
            x = self.activation(x)
            for layer in self.trunk:
                x = self.activation(layer(x))
        return self.out(x)  # type: ignore[no-any-return]


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


# --- diffusion --------------------------------------------------------------------------------------------------

Denoise = Callable[[Tensor, int], Tensor]  # (noisy actions (S, B, A), diffusion step) -> predicted noise (S, B, A)


def make_schedule(name: str, steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Tensor:
    """beta_1 .. beta_T, (T,), float64.

    "vp": the variance-preserving schedule of Diffusion-QL (arXiv 2208.06193, eq. after 3; arXiv 2112.07804);
    "cosine": improved DDPM (arXiv 2102.09672, eq. 17); "linear": DDPM's betas (arXiv 2006.11239), spaced for T steps.
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if name == "vp":
        return 1 - torch.exp(-beta_min / steps - (beta_max - beta_min) * (2 * t - 1) / (2 * steps**2))
    if name == "cosine":
        level = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)
    return (torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64) * 1000 / steps).clamp(max=0.999)


class Diffusion:
    """Forward and reverse process of DDPM (arXiv 2006.11239) for actions in [-1, 1]; step t runs from 0 to T - 1."""

    def __init__(self, betas: Tensor, device: torch.device | str) -> None:
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=betas.dtype), alpha_bar[:-1]])
        self.steps = len(betas)
        self.signal, self.noise = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        self.levels = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1).float().to(device)  # (T, 2)
        # eq. 7: the posterior's mean is clean_share * x_0 + noisy_share * x_t, with variance deviation^2
        self.clean_share = (betas * previous.sqrt() / (1 - alpha_bar)).tolist()
        self.noisy_share = ((1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)).tolist()
        self.deviation = (betas * (1 - previous) / (1 - alpha_bar)).sqrt().tolist()

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
        """DPM-Solver++ 2M (arXiv 2211.01095, Algorithm 2) in `steps` network calls: noises (S, 1, B, A)."""
        grid = [round((self.steps - 1) * (1 - i / max(1, steps - 1))) for i in range(steps)]
        log_snr = [math.log(signal / noise) for signal, noise in zip(self.signal, self.noise, strict=True)]
        x, before, h_before = noises[:, 0], None, 0.0
        for s, t in pairwise(grid):
            clean, h = self.clean(x, denoise(x, s), s), log_snr[t] - log_snr[s]
            mixed = clean if before is None else clean + (clean - before) * (h / (2 * h_before))
            x = (self.noise[t] / self.noise[s]) * x - self.signal[t] * math.expm1(-h) * mixed
            before, h_before = clean, h
        return self.clean(x, denoise(x, grid[-1]), grid[-1])  # no noise is left: first order, the estimate itself


# --- losses -----------------------------------------------------------------------------------------------------


def expectile_loss(target_q: Tensor, v: Tensor, expectile: float) -> Loss:
    """Expectile regression of V towards target Q.

    target_q, v: (S, B), in scaled-reward units; gradient flows through v only. expectile in (0, 1).
    Source: implicit Q-learning, arXiv 2110.06169, eq. 5.
    """
    difference = target_q.detach() - v
    weight = torch.where(difference < 0, 1.0 - expectile, expectile)
    loss = (weight * difference.square()).mean(-1)
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(-1)}


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


def value_loss(q: Tensor) -> Loss:
    """Minus the mean value of the policy's own actions, in units of their mean absolute value.

    q: (S, B), with gradient to the actions.
    Source: Diffusion-QL, arXiv 2208.06193, eq. 3 and its normalization by the data's value scale.
    """
    loss = -q.mean(-1) / q.detach().abs().mean(-1).clamp(min=1e-6)
    return loss, {"policy_q": q.detach().mean(-1)}


def advantage_weights(advantage: Tensor, rule: str, expectile: float, inverse_temperature: float) -> Tensor:
    """Weight of each transition in the noise error, (S, B).

    "expectile": |expectile - 1(advantage < 0)|; "exponential": exp(inverse_temperature * advantage), at most 100.
    Source: IDQL, arXiv 2304.10573, table 1.
    """
    if rule == "expectile":
        return torch.where(advantage < 0, 1.0 - expectile, expectile)
    return (inverse_temperature * advantage).exp().clamp(max=100.0)


def add(first: Loss, second: Loss, weight: float = 1.0) -> Loss:
    """first + weight * second, with the metrics of both."""
    return first[0] + weight * second[0], first[1] | second[1]


# --- guidance ---------------------------------------------------------------------------------------------------


class Guidance(nn.Module):
    """Values learned from the dataset alone. Whatever trained them, every policy and ranking uses q, v, advantage.

    Twin critics and their Polyak targets, (2 S, ...), and V, (S, ...). `companion=False` leaves out the actor that
    "dql" needs where it learns alone.
    """

    def __init__(
        self,
        random: Randomness,
        normalizer: Normalizer,
        *,
        algorithm: str,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: str,
        layer_norm: bool,
        discount: float,
        expectile: float,
        tau: float,
        bootstrap_candidates: int,
        actor_hidden: Sequence[int],
        time_features: int,
        eta: float,
        diffusion_steps: int,
        ema_decay: float,
        companion: bool = True,
    ) -> None:
        super().__init__()
        self.algorithm = GUIDANCES[algorithm]
        self.normalizer = normalizer
        self.discount, self.expectile, self.tau = discount, expectile, tau
        self.bootstrap_candidates = bootstrap_candidates
        self.online_q = ValueNetwork(
            random, "q", observation_dim + action_dim, hidden, activation, layer_norm, copies=2
        )
        self.target_q = self.online_q.frozen_copy()
        self.value = ValueNetwork(random, "v", observation_dim, hidden, activation, layer_norm)
        self.actor: Policy | None = None
        if companion and self.algorithm.has_actor:
            self.actor = Policy(
                random,
                normalizer,
                algorithm="dql",
                observation_dim=observation_dim,
                action_dim=action_dim,
                hidden=actor_hidden,
                activation=activation,
                dropout=0.0,
                time_features=time_features,
                diffusion_steps=diffusion_steps,
                noise_schedule="vp",
                sampler="ddpm",
                sampling_steps=diffusion_steps,
                eta=eta,
                ema_decay=ema_decay,
                label_dropout=0.0,
                advantage_weight="none",
                advantage_expectile=0.7,
                advantage_temperature=1.0,
            )

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

    def one_q(self, observations: Tensor, actions: Tensor, twin: Tensor) -> Tensor:
        """The target critic `twin` (S,) in {0, 1} of each member: (S, B)."""
        inputs = torch.cat([self.normalizer(observations), actions], dim=-1)
        rows = 2 * torch.arange(self.members, device=twin.device) + twin
        return self.target_q(inputs, rows)  # type: ignore[no-any-return]

    def v(self, observations: Tensor) -> Tensor:
        """State value: raw (S, B, O) -> (S, B), scaled-reward units."""
        return self.value(self.normalizer(observations))  # type: ignore[no-any-return]

    def advantage(self, observations: Tensor, actions: Tensor) -> Tensor:
        """q - v, (S, B)."""
        return self.q(observations, actions) - self.v(observations)

    def networks(self) -> list[Stack]:
        """The networks that learn."""
        return [self.online_q, self.value, *(self.actor.networks() if self.actor else [])]

    def loss(self, batch: Batch, random: Randomness, actor: Policy | None = None, w: float = 1.0) -> Loss:
        """The algorithm's loss. actor: the policy that learns along in a joint run, in place of a companion.

        w: weight of its classifier-free guidance, 0 for as long as it has learned no labels.
        """
        return self.algorithm.loss(self, batch, random, actor, w)

    def follow(self, step: int) -> None:
        """Targets and averages after gradient step `step`: target <- (1 - tau) target + tau online."""
        self.target_q.follow(self.online_q, self.tau)
        if self.actor is not None:
            self.actor.follow(step)

    def pick(self, members: Sequence[int]) -> None:
        """Keep the given members, in the given order, repetitions allowed."""
        for network in self.children():
            if isinstance(network, Stack):
                network.pick(members)


def implicit_q_loss(guidance: Guidance, batch: Batch, random: Randomness, actor: Policy | None, w: float) -> Loss:
    """Implicit Q-learning (arXiv 2110.06169, Algorithm 1; arXiv 2304.10573): no action outside the data is valued."""
    with torch.no_grad():
        target_q = guidance.q(batch.observations, batch.actions)
        next_v = guidance.v(batch.next_observations)
    v = guidance.v(batch.observations)
    q = guidance.twins(guidance.online_q, batch.observations, batch.actions)
    return add(
        expectile_loss(target_q, v, guidance.expectile),
        td_loss(q, batch.rewards, batch.terminals, next_v, guidance.discount),
    )


def diffusion_q_loss(guidance: Guidance, batch: Batch, random: Randomness, actor: Policy | None, w: float) -> Loss:
    """The critics of Diffusion-QL (arXiv 2208.06193, eq. 4), bootstrapped by the actor, or else by a companion.

    Of `bootstrap_candidates` next actions the best counts. V regresses to Q at the data's actions. The companion
    learns along by the loss of "dql".
    """
    companion = guidance.actor if actor is None else None
    actor = actor or companion
    if actor is None:
        raise RuntimeError("this guidance was built to be used, or to learn beside a policy")
    repeated = batch.next_observations.repeat_interleave(guidance.bootstrap_candidates, dim=1)  # (S, B N, O)
    with torch.no_grad():
        next_actions = actor.sample(repeated, random, w=w)
        next_q = guidance.q(repeated, next_actions).view(*batch.rewards.shape, -1).amax(-1)
        target_q = guidance.q(batch.observations, batch.actions)
    q = guidance.twins(guidance.online_q, batch.observations, batch.actions)
    critic = td_loss(q, batch.rewards, batch.terminals, next_q, guidance.discount)
    value = expectile_loss(target_q, guidance.v(batch.observations), 0.5)
    loss = add(critic, value)
    return loss if companion is None else add(loss, companion.loss(batch, guidance, random))


@dataclass(frozen=True)
class GuidanceAlgorithm:
    """A line of the registry: how a guidance learns, and whether it needs an actor to do so."""

    loss: Callable[[Guidance, Batch, Randomness, Policy | None, float], Loss]
    has_actor: bool = False


GUIDANCES = {
    "idql": GuidanceAlgorithm(implicit_q_loss),
    "dql": GuidanceAlgorithm(diffusion_q_loss, has_actor=True),
}


# --- policies ---------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """A diffusion model over actions, given the observation; the moving average of its weights acts."""

    def __init__(
        self,
        random: Randomness,
        normalizer: Normalizer,
        *,
        algorithm: str,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
        time_features: int,
        diffusion_steps: int,
        noise_schedule: str,
        sampler: str,
        sampling_steps: int,
        eta: float,
        ema_decay: float,
        label_dropout: float,
        advantage_weight: str,
        advantage_expectile: float,
        advantage_temperature: float,
    ) -> None:
        super().__init__()
        self.algorithm = POLICIES[algorithm]
        self.normalizer, self.action_dim = normalizer, action_dim
        self.eta, self.ema_decay, self.label_dropout = eta, ema_decay, label_dropout
        self.weighting = advantage_weight, advantage_expectile, advantage_temperature
        self.sampling_steps = sampling_steps if sampler == "dpm-solver++" else None
        self.diffusion = Diffusion(make_schedule(noise_schedule, diffusion_steps), random.device)
        self.denoiser = Denoiser(
            random,
            observation_dim=observation_dim,
            action_dim=action_dim,
            diffusion_steps=diffusion_steps,
            network=self.algorithm.network,
            labels=self.algorithm.labels,
            hidden=hidden,
            activation=activation,
            dropout=dropout,
            time_features=time_features,
        )
        self.average = self.denoiser.frozen_copy()

    @property
    def members(self) -> int:
        return self.denoiser.members

    def networks(self) -> list[Stack]:
        """The networks that learn."""
        return [self.denoiser]

    def loss(self, batch: Batch, guidance: Guidance | None, random: Randomness) -> Loss:
        """The algorithm's loss under a guidance, or without its guidance term where there is none."""
        return self.algorithm.loss(self, batch, guidance, random)

    def follow(self, step: int) -> None:
        """Move the average after gradient step `step`; it forgets the initial weights faster than ema_decay."""
        self.average.follow(self.denoiser, 1.0 - min(self.ema_decay, (1 + step) / (10 + step)))

    def pick(self, members: Sequence[int]) -> None:
        """Keep the given members, in the given order, repetitions allowed."""
        for network in (self.denoiser, self.average):
            network.pick(members)

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
        random: Randomness,
        *,
        candidates: int = 1,
        temperature: float = 1.0,
        w: float = 1.0,
        guidance: Guidance | None = None,
        guidance_weight: float = 0.0,
    ) -> Tensor:
        """Actions of the averaged policy: raw observations (S, B, O) -> (S, B N, A), the N of a state side by side.

        temperature scales all sampling noise. w is the weight of classifier-free guidance (0: unguided; arXiv
        2207.12598), for policies that know labels. guidance_weight > 0 shifts the predicted noise by
        -guidance_weight * sqrt(1 - alpha_bar) * dQ/da at the one-step estimate of the clean action, without that
        estimate's Jacobian (Q-guided flow, arXiv 2606.11087, in DDPM's terms: Diffusion Models Beat GANs,
        arXiv 2105.05233, Algorithm 2).
        """
        network = self.average
        normalized = self.normalizer(observations)
        conditions = [network.condition(normalized)]
        if self.algorithm.labels:
            better = torch.full(observations.shape[:2], 2, dtype=torch.int64, device=observations.device)
            conditions.append(network.condition(normalized, better))
        conditions = [condition.repeat_interleave(candidates, dim=1) for condition in conditions]
        repeated = observations.repeat_interleave(candidates, dim=1)
        times = network.times()

        def denoise(x: Tensor, t: int) -> Tensor:
            noise: Tensor = network(x, times[:, t : t + 1], conditions[0])
            for condition in conditions[1:]:
                noise = noise + w * (network(x, times[:, t : t + 1], condition) - noise)
            if guidance is not None and guidance_weight > 0:
                with torch.enable_grad():
                    clean = self.diffusion.clean(x, noise, t).detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(guidance.q(repeated, clean).sum(), clean)
                noise = noise - guidance_weight * self.diffusion.noise[t] * gradient
            return noise

        return self.denoise_all(denoise, temperature * self.draw(random, "act", repeated.shape[1]))

    def draw(self, random: Randomness, name: str, rows: int) -> Tensor:
        """The noise a chain needs: (S, T, rows, A), or (S, 1, rows, A) for a deterministic solver."""
        return random.normal(name, self.diffusion.steps if self.sampling_steps is None else 1, rows, self.action_dim)

    def denoise_all(self, denoise: Denoise, noises: Tensor) -> Tensor:
        """Run the policy's sampler: noises as drawn -> clean actions (S, rows, A)."""
        if self.sampling_steps is None:
            return self.diffusion.reverse(denoise, noises)
        return self.diffusion.solve(denoise, noises, self.sampling_steps)


@dataclass(frozen=True)
class Prediction:
    """A step of denoising training: predicted, noise, noisy (S, B, A), t (S, B), shares of the first layer."""

    predicted: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    condition: Tensor
    times: Tensor


def cloning_loss(policy: Policy, batch: Batch, guidance: Guidance | None, random: Randomness) -> Loss:
    """The noise error alone (DDPM, arXiv 2006.11239), its transitions weighted by the advantage if so set."""
    step = policy.predict(batch, random)
    rule, expectile, temperature = policy.weighting
    if guidance is None or rule == "none":
        return noise_loss(step.predicted, step.noise)
    with torch.no_grad():
        advantage = guidance.advantage(batch.observations, batch.actions)
    return noise_loss(step.predicted, step.noise, advantage_weights(advantage, rule, expectile, temperature))


def chain_value_loss(policy: Policy, batch: Batch, guidance: Guidance | None, random: Randomness) -> Loss:
    """Noise error plus eta times the value of actions from the whole chain (Diffusion-QL, arXiv 2208.06193, eq. 3)."""
    step = policy.predict(batch, random)
    cloning = noise_loss(step.predicted, step.noise)
    if guidance is None or policy.eta == 0:
        return cloning

    def denoise(x: Tensor, t: int) -> Tensor:
        return policy.denoiser(x, step.times[:, t : t + 1], step.condition)  # type: ignore[no-any-return]

    actions = policy.denoise_all(denoise, policy.draw(random, "chain", batch.rewards.shape[1]))
    q = guidance.one_q(batch.observations, actions, random.integers("twin", 2))
    return add(cloning, value_loss(q), policy.eta)


def one_step_value_loss(policy: Policy, batch: Batch, guidance: Guidance | None, random: Randomness) -> Loss:
    """As the whole chain's, but at the one-step estimate of the clean action (EDP, arXiv 2305.20081, eq. 9)."""
    step = policy.predict(batch, random)
    cloning = noise_loss(step.predicted, step.noise)
    if guidance is None or policy.eta == 0:
        return cloning
    actions = policy.diffusion.clean(step.noisy, step.predicted, step.t)
    q = guidance.one_q(batch.observations, actions, random.integers("twin", 2))
    return add(cloning, value_loss(q), policy.eta)


def label_loss(policy: Policy, batch: Batch, guidance: Guidance | None, random: Randomness) -> Loss:
    """Noise error given "this action is an improvement", label dropped at random (arXiv 2505.23458; 2207.12598).

    Labels come with the batch where a frozen guidance made them; otherwise from the guidance as it is now.
    """
    better = batch.labels
    if better is None and guidance is not None:
        with torch.no_grad():
            better = guidance.advantage(batch.observations, batch.actions) > 0
    if guidance is None or better is None:
        step = policy.predict(batch, random)
        return noise_loss(step.predicted, step.noise)
    kept = random.uniform("label", better.shape[1]) >= policy.label_dropout
    step = policy.predict(batch, random, labels=kept * (1 + better.long()))
    loss, metrics = noise_loss(step.predicted, step.noise)
    return loss, metrics | {"better": better.float().mean(-1)}


@dataclass(frozen=True)
class PolicyAlgorithm:
    """A line of the registry: how a policy learns under a guidance, its denoiser, and whether that knows labels."""

    loss: Callable[[Policy, Batch, Guidance | None, Randomness], Loss]
    network: str = "mlp"
    labels: bool = False


POLICIES = {
    "bc": PolicyAlgorithm(cloning_loss),
    "idql": PolicyAlgorithm(cloning_loss, network="resnet"),
    "dql": PolicyAlgorithm(chain_value_loss),
    "edp": PolicyAlgorithm(one_step_value_loss),
    "cfg": PolicyAlgorithm(label_loss, labels=True),
}


@dataclass(frozen=True)
class Inference:
    """How an action is chosen: N candidates, ranked by a guidance, sampled at a temperature, perhaps steered."""

    candidates: int = 1
    selection: str = "max"
    weight_temperature: float = 100.0
    temperature: float = 1.0
    w: float = 1.0
    guidance_weight: float = 0.0


@torch.no_grad()
def act(policy: Policy, guidance: Guidance | None, observations: Tensor, random: Randomness, how: Inference) -> Tensor:
    """Choose actions: raw observations (S, E, O) -> (S, E, A), scaled.

    Of N candidates per state the guidance takes the best ("max"), or draws one with probability proportional to
    exp(weight_temperature * q) ("softmax"; V would cancel, since it does not depend on the action).
    """
    actions = policy.sample(
        observations,
        random,
        candidates=how.candidates,
        temperature=how.temperature,
        w=how.w,
        guidance=guidance,
        guidance_weight=how.guidance_weight,
    ).view(*observations.shape[:2], how.candidates, -1)  # (S, E, N, A)
    if guidance is None or how.candidates == 1:
        return actions[:, :, 0]
    repeated = observations.repeat_interleave(how.candidates, dim=1)
    scores = guidance.q(repeated, actions.flatten(1, 2)).view(actions.shape[:3])  # (S, E, N)
    if how.selection == "softmax":  # the Gumbel-max trick draws from the softmax
        uniform = random.uniform("selection", *scores.shape[1:]).clamp(1e-20, 1 - 1e-7)
        scores = how.weight_temperature * scores - (-uniform.log()).log()
    best = scores.argmax(-1)[..., None, None].expand(-1, -1, 1, actions.shape[-1])
    return actions.gather(2, best).squeeze(2)


# --- bundles ----------------------------------------------------------------------------------------------------

BUNDLE_FORMAT, BUNDLE_VERSION = "mdpt bundle", 3


class BundleError(Exception):
    """A bundle that cannot be written, read or combined: what, where, got and expected, what to do."""


def save_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle, plain containers and tensors only, so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                torch.save(bundle, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # still there only if something failed, or Ctrl-C came
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
        reason = getattr(error, "strerror", None) or "torch could not store it; is the disk full?"
        raise BundleError(f"{path}: cannot write the bundle ({reason}); choose another --out") from error


def read_bundle(path: Path) -> Bundle:
    """Read a bundle of either kind onto the CPU, opened with weights_only=True.

    FILE@STEP gives the snapshot of that gradient step (a joint run's guidance likewise), FILE@last the last weights.

    Raises: BundleError for a file that is missing, damaged, no bundle, of another version, or without that snapshot.
    """
    name, at, step = path.name.rpartition("@")
    if at and name and not path.exists():
        return _at_step(read_bundle(path.with_name(name)), path, step)
    if not path.is_file():
        raise BundleError(f"{path}: no such bundle; `mdpt guidance` and `mdpt policy` write them")
    try:
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise BundleError(
            f"{path}: cannot be read as a bundle, it is damaged or something else; write it anew"
        ) from error
    if not isinstance(bundle, dict) or bundle.get("format") != BUNDLE_FORMAT:
        raise BundleError(f"{path}: is no mdpt bundle; expected a file written by `mdpt guidance` or `mdpt policy`")
    if bundle.get("version") != BUNDLE_VERSION:
        raise BundleError(
            f"{path}: bundle version {bundle.get('version')}, this mdpt reads version {BUNDLE_VERSION}; "
            "train it anew or use the mdpt that wrote it"
        )
    return bundle


def _at_step(bundle: Bundle, path: Path, step: str) -> Bundle:
    if step == "last":
        return bundle
    if not step.isdecimal() or int(step) not in bundle["snapshots"]:
        known = ", ".join(f"@{known}" for known in bundle["snapshots"])
        raise BundleError(f"{path}: no snapshot @{step}; there are {known or 'none yet'} and @last")
    inner = bundle["guidance"]
    if inner is not None and inner["snapshots"] and bundle["experiment"]["policy"]["scheme"] == "joint":
        bundle["guidance"] = _at_step(inner, path, step)
    bundle["weights"] |= bundle["snapshots"][int(step)]
    return bundle | {"step": int(step)}


def read_guidance(path: Path) -> Bundle:
    """The guidance bundle in `path`, or the one inside the policy bundle there.

    Raises: BundleError, also for a policy bundle without guidance.
    """
    bundle = read_bundle(path)
    if bundle["kind"] == "policy":
        if bundle["guidance"] is None:
            raise BundleError(f"{path}: this policy was trained unguided and holds no guidance; give a guidance bundle")
        bundle = bundle["guidance"]
    return bundle


def read_policy(path: Path) -> Bundle:
    """The policy bundle in `path`. Raises: BundleError, also for a guidance bundle."""
    bundle = read_bundle(path)
    if bundle["kind"] != "policy":
        raise BundleError(f"{path}: is a {bundle['kind']} bundle; expected a policy bundle, written by `mdpt policy`")
    return bundle


def check_fit(first: Bundle, second: Bundle) -> list[str]:
    """Warnings about using two bundles together.

    Raises: BundleError listing each environment property in which they differ, by value.
    """
    ours, theirs = first["environment"], second["environment"]
    mismatches = [f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if mismatches:
        raise BundleError(
            f"the {first['kind']} and the {second['kind']} do not fit together: {'; '.join(mismatches)}; "
            "use bundles of one environment"
        )
    if first["dataset"]["hash"] != second["dataset"]["hash"]:
        names = [f"the {bundle['kind']} learned from {bundle['dataset']['name']}" for bundle in (first, second)]
        return [f"{' and '.join(names)}: swapping is known to hold only under one data distribution"]
    return []


def pair_members(policies: int, guidances: int) -> list[int]:
    """The guidance member that goes with each policy member: by position; one guidance member serves all.

    Raises: BundleError for any other difference in number, naming both.
    """
    if guidances not in (1, policies):
        raise BundleError(
            f"{policies} policy members cannot be paired with {guidances} guidance members; "
            "use the same number, or a guidance with one member"
        )
    return list(range(policies)) if guidances > 1 else [0] * policies


def build_guidance(bundle: Bundle, device: torch.device | str) -> Guidance:
    """The guidance of a bundle, frozen, without what only its training needed."""
    weights = {name: value for name, value in bundle["weights"].items() if not name.startswith("actor.")}
    guidance = _build(Guidance, bundle, device, companion=False)
    guidance.load_state_dict(weights)
    del guidance.online_q  # its targets speak for it
    return guidance.requires_grad_(False)


def build_policy(bundle: Bundle, device: torch.device | str) -> Policy:
    """The policy of a bundle, without its guidance."""
    policy = _build(Policy, bundle, device)
    policy.load_state_dict(bundle["weights"])
    return policy


def build_new(bundle: Bundle, device: torch.device | str, *, companion: bool) -> Guidance | Policy:
    """What a bundle describes, with initial weights. companion: a guidance brings the actor it may need to learn."""
    if bundle["kind"] == "guidance":
        return _build(Guidance, bundle, device, companion=companion)
    return _build(Policy, bundle, device)


def _build(kind: type[Module], bundle: Bundle, device: torch.device | str, **extra: Any) -> Module:
    normalizer = Normalizer(**bundle["normalizer"]).to(device)
    random = Randomness(bundle["seeds"], f"{bundle['kind']} init", device)
    return kind(random, normalizer, **bundle["architecture"], **extra)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Named weights as independent CPU tensors, online and target or averaged ones."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
