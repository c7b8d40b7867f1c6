"""What is learned: networks, diffusion, losses, policies, guidance, bundles, acting, the training loop.

Shapes: S members (one per seed), B batch, N candidates, O observation dimensions, A action dimensions, T diffusion
steps, E episodes, R episodes that still run, H hidden units, K members of an ensemble. Observations are raw, actions
are scaled to [-1, 1], rewards by the dataset's reward scale. Losses and metrics have one entry per member.

Where the data have a horizon, an action is a window of so many rows, one flat vector, and A counts its numbers. Only
batches, the mask of the noise error, the return in the TD error, the Transformer's tokens and `Agent` know more.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import math
import os
import platform
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NoReturn, Self, get_type_hints

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adamw import adamw

from mdpt import data
from mdpt.data import (
    Array,
    Dataset,
    EnvironmentSpec,
    Experiment,
    GuidanceSection,
    HeldOut,
    Interrupted,
    MdptError,
    MdptWarning,
    Played,
    PolicySection,
    RewardScale,
    TrainingSection,
    Watch,
    shown,
)

Kind = Literal["guidance", "policy"]
Products = Literal["oneDNN", "default"]

# --- matrix products ----------------------------------------------------------------------------------------------


def choose_products(wanted: Products | None = None) -> Products:
    """Select the library for the CPU's float32 matrix products in this process; returns the one selected.

    wanted: what an earlier process used, taken where this machine has it. By default oneDNN on AMD processors, for
    which MKL has only its AVX2 kernels. The choice depends on the processor, never on a timing, so that a run that goes
    on makes the same choice. CUDA is not affected.
    """
    exact = _onednn_is_exact()
    chosen: Products = (wanted or ("oneDNN" if _is_amd() else "default")) if exact else "default"
    if exact:
        _switch().fp32_precision = "bf16" if chosen == "oneDNN" else "none"
    return chosen


def _switch() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN can be selected and multiplies in float32.

    torch uses oneDNN only if it may round to bfloat16, which it does where the processor has units for that.
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

TWISTER_WORDS = 624  # of the state of the CPU's generator, which torch keeps in 8 bytes each, after 24 bytes of its own


class Randomness:
    """Named streams of random numbers, one per member (or per episode of one member, when acting).

    A draw depends on seed, purpose, name, shape and step alone. So member k of many draws what seed k alone draws, a
    resumed run draws what an uninterrupted one draws, and adding a draw changes no other. Values are generated for a
    block of steps at once, so that no training step loops over the members.

    A name can be drawn once per step and shape: a second draw would give the same numbers, so it raises RuntimeError.
    """

    def __init__(self, seeds: Sequence[int | str], purpose: str, device: torch.device | str = "cpu") -> None:
        self.seeds, self.purpose, self.device, self.step = tuple(seeds), purpose, torch.device(device), 0
        self._generator = torch.Generator(self.device)
        self._blocks: dict[str, tuple[int, Tensor]] = {}
        self._drawn: dict[str, int] = {}  # the step of the last draw

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
        if self._drawn.get(key) == self.step:
            raise RuntimeError(f"{name!r} is drawn twice in step {self.step}, with the same numbers; use another name")
        self._drawn[key] = self.step
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
        if self.device.type == "cpu":  # manual_seed uses 32 bits of a seed only: fill the whole state of the generator
            state = generator.get_state()
            words = np.random.SeedSequence(int.from_bytes(digest)).generate_state(TWISTER_WORDS, np.uint32)
            state[24 : 24 + 8 * TWISTER_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
            generator.set_state(state)
        return generator


@dataclass(frozen=True)
class Batch:
    """Windows of up to `horizon` rows of an episode, for each member: observations (S, B, O), the others (S, B).

    lengths: how many rows a window has. actions: (S, B, A), those of `horizon` rows one after the other, also of rows
    that follow in the data when the episode has ended, so that nothing marks an end. rewards: (S, B, horizon), 0 after
    the end. next_observations (S, B, O) and terminals: of the window's last row. rows: places of the first rows in
    `source`, from which methods find what follows in the same episode, where a loss asks.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    lengths: Tensor
    rows: Tensor
    source: Transitions

    def known(self) -> Tensor | None:
        """Which numbers of `actions` are of the window's own rows, (S, B, A) bool; None: all of them."""
        horizon = self.source.horizon
        if horizon == 1:
            return None
        steps = torch.arange(horizon, device=self.rows.device)
        return (steps < self.lengths[..., None]).repeat_interleave(self.actions.shape[-1] // horizon, dim=-1)

    def discounted(self, discount: float) -> tuple[Tensor, Tensor]:
        """Discounted rewards within the window, and the discount of what follows it: (S, B) each."""
        steps = torch.arange(self.source.horizon + 1, dtype=torch.float64, device=self.rows.device)
        powers: Tensor = (discount**steps).float()
        return (self.rewards * powers[:-1]).sum(-1), powers[self.lengths]

    def next_actions(self) -> tuple[Tensor, Tensor]:
        """The data's window at the next observations, (S, B, A), and whether there is one, (S, B) bool; else it is 0.

        There is none after a terminal, at a time limit that is a transition, and at the end of the data.
        """
        episodes, ends = self.source.episodes(self.rows)
        cut, following = self.source.cut_actions[episodes], self.rows + self.lengths  # of one row; (S, B)
        last = following == ends  # the episode's last row gives its place to the one that was cut
        actions, _ = self.source.windows(following - last.long())  # (S, B, A)
        first, rest = actions.tensor_split([cut.shape[-1]], dim=-1)
        actions = torch.cat([torch.where(last[..., None], cut, first), rest], dim=-1)
        return actions.nan_to_num(), ~actions.isnan().any(-1)

    def returns(self, discount: float) -> tuple[Tensor, Tensor, Batch]:
        """Discounted rewards up to the end of the episode and their number, (S, B) each, and its last transition."""
        _, ends = self.source.episodes(self.rows)
        return self.source.returns(discount)[self.rows], ends - self.rows, self.source.take(ends - 1)


class Transitions:
    """The rows of a dataset as one tensor, so that a batch is one gather.

    With storage "disk" the rows stay there, and only batches come to the training device.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str) -> None:
        self.device, self.sizes, self.horizon = torch.device(device), dataset.sizes, dataset.section.horizon
        rows = torch.from_numpy(dataset.rows)
        self.rows = rows if dataset.section.storage == "disk" else rows.to(device)
        self.ends = torch.from_numpy(dataset.ends).to(device)  # (E,)
        self.cut_actions = torch.from_numpy(dataset.cut_actions).to(device)  # (E, A)
        self._returns: dict[float, Tensor] = {}  # by discount

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Batch:
        """The windows that begin at `rows`, (S, B)."""
        if self.horizon == 1:  # one gather instead of three
            lengths = torch.ones_like(rows)
            observations, actions, rewards, next_observations, terminals = self._gather(rows, 0, 5)
        else:
            lengths = (self.episodes(rows)[1] - rows).clamp(max=self.horizon)
            (observations,) = self._gather(rows, 0, 1)
            actions, rewards = self.windows(rows)
            rewards = rewards * (torch.arange(self.horizon, device=self.device) < lengths[..., None])
            next_observations, terminals = self._gather(rows + lengths - 1, 3, 5)
        return Batch(observations, actions, rewards, next_observations, terminals.squeeze(-1), lengths, rows, self)

    def windows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (S, B, A) and rewards (S, B, horizon) of the rows from `rows` on; after the last row comes the first."""
        places = (rows[..., None] + torch.arange(self.horizon, device=rows.device)) % len(self)
        actions, rewards = self._gather(places, 1, 3)
        return actions.flatten(-2), rewards.squeeze(-1)

    def _gather(self, places: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """The columns of `ROW` from start to stop at these places, (*places, size) each."""
        before, sizes = sum(self.sizes[:start]), self.sizes[start:stop]
        columns = self.rows[:, before : before + sum(sizes)]
        taken = columns.index_select(0, places.flatten().to(self.rows.device)).to(self.device)
        return torch.split(taken.view(*places.shape, -1), sizes, dim=-1)

    def sample(self, random: Randomness, batch_size: int) -> Batch:
        """A batch for each member, drawn uniformly with replacement."""
        return self.take(random.integers("batch", len(self), batch_size))

    def episodes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The episode of each row, (S, B), and one past the last row of that episode, (S, B)."""
        episodes = torch.searchsorted(self.ends, rows, right=True)
        return episodes, self.ends[episodes]

    def returns(self, discount: float) -> Tensor:
        """Discounted rewards from each row to the end of its episode, (n,): one pass from the last row to the first."""
        if discount not in self._returns:
            returns, last = np.empty(len(self), np.float32), np.zeros(len(self), np.bool_)
            last[self.ends.cpu().numpy() - 1] = True
            total = 0.0
            for start in reversed(range(0, len(self), BLOCK)):
                block = slice(start, min(start + BLOCK, len(self)))
                rewards = torch.split(self.rows[block], self.sizes, dim=1)[2][:, 0].tolist()
                for row in range(len(rewards) - 1, -1, -1):
                    total = rewards[row] + (0.0 if last[start + row] else discount * total)
                    rewards[row] = total
                returns[block] = rewards
            self._returns[discount] = torch.from_numpy(returns).to(self.device)
        return self._returns[discount]


BLOCK = 65_536  # rows read at a time


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
    """p = sigmoid(x) and v = p - p^2 / 2, with which mish(x) = x v / (1 - v): one function instead of three.

    No digits cancel where x is negative, and nothing overflows where it is large.
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

    Initial weights and biases are uniform in +-1/sqrt(fan_in). With `copies` networks per member, those of a member are
    neighbours on the first axis (twin critics: rows 2 s and 2 s + 1 belong to member s). tokens: how many rows it gets
    for each row of a batch.
    """

    def __init__(
        self,
        random: Randomness,
        name: str,
        inputs: int,
        outputs: int,
        *,
        copies: int = 1,
        fan_in: int | None = None,
        tokens: int = 1,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        bound = 1.0 / math.sqrt(fan_in or inputs)
        weight = random.uniform(f"{name}.weight", copies, inputs, outputs)  # (S, copies, inputs, outputs)
        bias = random.uniform(f"{name}.bias", copies, 1, outputs)
        self.weight = nn.Parameter((weight.flatten(0, 1) * 2 - 1) * bound)
        self.bias = nn.Parameter((bias.flatten(0, 1) * 2 - 1) * bound)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """rows: which networks of the first axis to apply, by default all.

        With one input or output, or few multiplications, it is a sum of products: torch rounds a matrix product of one
        network in another way than those of several, and its kernels for one output are slow.
        """
        weight, bias = (self.weight, self.bias) if rows is None else (self.weight[rows], self.bias[rows])
        if weight.shape[1] == 1:
            return torch.addcmul(bias, x, weight)
        if weight.shape[2] == 1 or x.shape[1] * weight[0].numel() <= SMALL_PRODUCT:
            return (x[..., None] * weight[:, None]).sum(-2) + bias  # (S, B, inputs, outputs)
        return torch.baddbmm(bias, x, weight)


SMALL_PRODUCT = 16**3  # multiplications, up to which torch uses another kernel for matrix products


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
    size: int  # parameters of one network; the rest of its row is 0
    vector: Tensor

    def pack(self, vector: Tensor | None = None) -> None:
        """Move the parameters into one tensor, whose rows are padded to a multiple of the longest SIMD word.

        An optimizer then rounds a row the same way whatever the number of rows. vector: the tensor to move into, whose
        values the parameters take.
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
        """S."""
        return self.vector.shape[0] // self.copies

    def frozen_copy(self) -> Self:
        """A copy that does not learn: a target network or a moving average."""
        clone = copy.deepcopy(self).requires_grad_(False)
        clone.pack()
        return clone

    def shared_view(self) -> Self:
        """A view that shares these weights; gradients pass through it to the inputs only."""
        clone = copy.deepcopy(self).requires_grad_(False)
        clone.pack(self.vector)
        return clone

    @torch.no_grad()
    def follow(self, online: Stack, rate: float) -> None:
        """self <- (1 - rate) self + rate online."""
        self.vector.lerp_(online.vector, rate)


class ValueNetwork(Stack):
    """Multilayer perceptron to one value: (S copies, B, inputs) -> (S copies, B).

    layer_norm: normalize before each activation, so that values of unseen inputs stay near those of seen ones (RLPD,
    arXiv 2302.02948); "tanh": before the first activation only, which then is a tanh (arXiv 2506.03154's code).
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

    equal_widths, by_token, hidden = False, False, [256, 256, 256]
    reads: tuple[str, ...] = ()

    def __init__(self, random: Randomness, section: PolicySection, hidden: Sequence[int], horizon: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[section.activation]
        self.layers = nn.ModuleList(Linear(random, f"hidden{i}", a, b) for i, (a, b) in enumerate(pairwise(hidden)))

    def forward(self, action: Tensor, condition: Tensor, time: Tensor, random: Randomness | None) -> Tensor:
        x = self.activation(action + condition + time)
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


class ResidualNetwork(nn.Module):
    """Residual blocks of a denoiser, all of one width. Source: IDQL (arXiv 2304.10573), LN-ResNet."""

    equal_widths, by_token, hidden = True, False, [256, 256, 256]
    reads: tuple[str, ...] = ("dropout",)

    def __init__(self, random: Randomness, section: PolicySection, hidden: Sequence[int], horizon: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[section.activation]
        self.blocks = nn.ModuleList(
            ResidualBlock(random, f"block{i}", width, section.activation, section.dropout)
            for i, width in enumerate(hidden)
        )

    def forward(self, action: Tensor, condition: Tensor, time: Tensor, random: Randomness | None) -> Tensor:
        x = action + condition + time
        for block in self.blocks:
            x = block(x, random)
        return self.activation(x)


class AdaptiveNorm(nn.Module):
    """A layer norm whose scale and shift, and gates of what follows, are affine maps of a condition.

    All of them are 0 at first, so that a gated branch begins as nothing. Source: DiT (arXiv 2212.09748), adaLN-Zero.
    """

    def __init__(self, random: Randomness, name: str, width: int, gates: int) -> None:
        super().__init__()
        self.width, self.parts = width, 2 + gates
        self.maps = Linear(random, name, width, self.parts * width)
        nn.init.zeros_(self.maps.weight)
        nn.init.zeros_(self.maps.bias)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """x: (S, B, tokens, H), condition: (S, B, H) -> x normalized, scaled and shifted; the gates (S, B, 1, H)."""
        scale, shift, *gates = self.maps(condition)[:, :, None].chunk(self.parts, dim=-1)
        return functional.layer_norm(x, (self.width,)) * (1 + scale) + shift, *gates


class Attention(nn.Module):
    """Attention of each token to all tokens of its window: (S, B, tokens, H) -> the same. Source: arXiv 1706.03762."""

    def __init__(self, random: Randomness, name: str, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward = Linear(random, f"{name}.inward", width, 3 * width)
        self.outward = Linear(random, f"{name}.outward", width, width)

    def forward(self, x: Tensor) -> Tensor:
        _, _, tokens, width = x.shape
        parts = on_tokens(self.inward, x).view(-1, tokens, 3, self.heads, width // self.heads)
        pieces = torch.split(parts.permute(2, 0, 3, 1, 4), MOST_WINDOWS, dim=1)  # (3, S B, heads, tokens, H / heads)
        mixed = torch.cat([functional.scaled_dot_product_attention(*piece) for piece in pieces])
        return on_tokens(self.outward, mixed.transpose(1, 2).reshape(x.shape))


MOST_WINDOWS = 32_768  # that attend at a time: CUDA fails at 65,536


def on_tokens(layer: Linear, x: Tensor) -> Tensor:
    """A layer on each token: (S, B, tokens, inputs) -> (S, B, tokens, outputs)."""
    return layer(x.flatten(1, 2)).view(*x.shape[:3], -1)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and two layers, each after an adaptive norm and gated. Source: DiT (arXiv 2212.09748), figure 3."""

    def __init__(self, random: Randomness, name: str, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norms = nn.ModuleList(AdaptiveNorm(random, f"{name}.norm{i}", width, 1) for i in range(2))
        self.attention = Attention(random, f"{name}.attention", width, heads)
        self.widen = Linear(random, f"{name}.widen", width, 4 * width)
        self.narrow = Linear(random, f"{name}.narrow", 4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y, gate = self.norms[0](x, condition)
        x = x + gate * self.attention(y)
        y, gate = self.norms[1](x, condition)
        return x + gate * on_tokens(self.narrow, self.activation(on_tokens(self.widen, y)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Blocks of a denoiser over one token per action of a window; step, observation and label enter by the norms."""

    equal_widths, by_token, hidden = True, True, [64, 64]
    reads: tuple[str, ...] = ("heads",)

    def __init__(self, random: Randomness, section: PolicySection, hidden: Sequence[int], horizon: int) -> None:
        super().__init__()
        self.activation, self.horizon, width = ACTIVATIONS[section.activation], horizon, hidden[0]
        places = random.uniform("places", horizon, width)  # (S, tokens, H)
        self.places = nn.Parameter((places * 2 - 1) / math.sqrt(width))
        self.blocks = nn.ModuleList(
            TransformerBlock(random, f"block{i}", width, section.heads, section.activation) for i in range(len(hidden))
        )
        self.norm = AdaptiveNorm(random, "norm", width, 0)

    def forward(self, action: Tensor, condition: Tensor, time: Tensor, random: Randomness | None) -> Tensor:
        """action: (S, B tokens, H) -> the same."""
        condition = self.activation(condition + time)
        x = action.view(*condition.shape[:2], self.horizon, -1) + self.places[:, None]
        for block in self.blocks:
            x = block(x, condition)
        (x,) = self.norm(x, condition)
        return x.flatten(1, 2)  # type: ignore[no-any-return]


NETWORKS: dict[str, type[Perceptron | ResidualNetwork | Transformer]] = {
    "mlp": Perceptron,
    "resnet": ResidualNetwork,
    "transformer": Transformer,
}


class Denoiser(Stack):
    """Predicts the noise in a noisy action: (S, B, A) -> (S, B, A), given the observation and the diffusion step.

    The first layer acts on [action, step, observation, label]. It is kept as a sum of maps, so that the observation's
    part is computed once for a whole chain, and the step's part once for all rows. labels: add an embedding of
    {0: dropped, 1: worse, 2: better}. horizon: of how many actions, each A / horizon numbers, a network with tokens
    makes one token each.
    """

    features: Tensor

    def __init__(
        self,
        random: Randomness,
        section: PolicySection,
        observation_dim: int,
        action_dim: int,
        labels: bool,
        horizon: int = 1,
    ) -> None:
        super().__init__()
        network = NETWORKS[section.network or "mlp"]
        hidden, time_features = section.hidden or network.hidden, section.time_features
        tokens = horizon if network.by_token else 1
        first, self.action_dim = hidden[0], action_dim // tokens
        fan_in = self.action_dim + time_features + observation_dim
        self.observation = Linear(random, "observation", observation_dim, first, fan_in=fan_in)
        self.action = Linear(random, "action", self.action_dim, first, fan_in=fan_in, tokens=tokens)
        self.time_in = Linear(random, "time_in", time_features, 2 * time_features)
        self.time_out = Linear(random, "time_out", 2 * time_features, time_features)
        self.time = Linear(random, "time", time_features, first, fan_in=fan_in)
        self.label = Linear(random, "label", 3, first, fan_in=fan_in) if labels else None
        self.trunk = network(random, section, hidden, horizon)
        self.out = Linear(random, "out", hidden[-1], self.action_dim, tokens=tokens)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(time_features // 2) / max(1, time_features // 2 - 1))
        angles = torch.arange(max(section.diffusion_steps, FEWEST_TIMES))[:, None] * frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(random.device)
        self.register_buffer("features", features, persistent=False)  # (T or more, time_features)
        self.pack()

    def condition(self, observations: Tensor, labels: Tensor | None = None) -> Tensor:
        """The first layer's part of normalized observations (S, B, O) and labels (S, B), if any: (S, B, H)."""
        parts = self.observation(observations)
        if self.label is not None:
            if labels is None:
                labels = torch.zeros(observations.shape[:2], dtype=torch.int64, device=observations.device)
            parts = parts + self.label(functional.one_hot(labels, 3).float())
        return parts  # type: ignore[no-any-return]

    def times(self) -> Tensor:
        """The first layer's part of every diffusion step: (S, T or more, H)."""
        features = self.features.expand(self.members, -1, -1)
        return self.time(self.time_out(mish(self.time_in(features))))  # type: ignore[no-any-return]

    def forward(self, actions: Tensor, time: Tensor, condition: Tensor, random: Randomness | None = None) -> Tensor:
        """actions: (S, B, A); time: (S, B or 1, H); condition: (S, B, H); random: for dropout, None when acting."""
        parts = self.action(actions.reshape(len(actions), -1, self.action_dim))  # of the window, or of each token
        return self.out(self.trunk(parts, condition, time, random)).view_as(actions)  # type: ignore[no-any-return]


FEWEST_TIMES = 8  # rows: MKL splits products of fewer among threads where there is one network


class Normalizer(nn.Module):
    """Scales observations to zero mean and unit standard deviation. mean, deviation: (O,), of the training data."""

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

    "vp": variance-preserving, of Diffusion-QL (arXiv 2208.06193, eq. after 3; 2112.07804). "cosine": improved DDPM
    (arXiv 2102.09672, eq. 17). "cosine-levels": T levels of that curve, its begin and end included, as in CleanDiffuser
    (arXiv 2406.09509). "linear": DDPM's betas (arXiv 2006.11239), scaled for T steps. "linear-unscaled": not scaled.
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
    """What makes a noise schedule unfit for this number of steps, or ""."""
    signal = torch.cumprod(1 - make_schedule(section.noise_schedule, section.diffusion_steps), 0).sqrt()
    if signal[-1] > 0.2:
        return f"its last step keeps {signal[-1]:.0%} of the action, but sampling starts from pure noise"
    if (share := float((signal < 0.05).double().mean())) > 0.5:
        return f"{share:.0%} of its steps are nearly pure noise"
    return ""


class Diffusion:
    """Forward and reverse process of DDPM (arXiv 2006.11239) for actions in [-1, 1]; steps t run from 0 to T - 1."""

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

    def reverse(self, denoise: Denoise, noises: Tensor, steps: int | None = None) -> Tensor:
        """Ancestral sampling, Algorithm 2, always in all steps: noises (S, T, B, A) to clean actions (S, B, A)."""
        x = noises[:, 0]
        for i, t in enumerate(range(self.steps - 1, 0, -1), start=1):
            clean = self.clean(x, denoise(x, t), t)
            x = self.clean_share[t] * clean + self.noisy_share[t] * x + self.deviation[t] * noises[:, i]
        return self.clean(x, denoise(x, 0), 0)  # the last posterior is the clean action itself

    def solve(self, denoise: Denoise, noises: Tensor, steps: int) -> Tensor:
        """DPM-Solver++ 2M (arXiv 2211.01095, Algorithm 2) in at most `steps` network calls: noises (S, 1, B, A).

        Spaced evenly over the diffusion steps, or from EVEN_RATIOS steps on over the log signal-to-noise ratio.
        """
        log_snr = [math.log(signal / noise) for signal, noise in zip(self.signal, self.noise, strict=True)]
        grid = [round((self.steps - 1) * (1 - i / max(1, steps - 1))) for i in range(steps)]
        if self.steps >= EVEN_RATIOS:
            even = np.linspace(log_snr[-1], log_snr[0], steps)
            near = {int(np.abs(np.array(log_snr) - ratio).argmin()) for ratio in even}
            grid = sorted(near, reverse=True)
        x, before, h_before = noises[:, 0], None, 0.0
        for s, t in pairwise(grid):
            clean, h = self.clean(x, denoise(x, s), s), log_snr[t] - log_snr[s]
            mixed = clean if before is None else clean + (clean - before) * (h / (2 * h_before))
            x = (self.noise[t] / self.noise[s]) * x - self.signal[t] * math.expm1(-h) * mixed
            before, h_before = clean, h
        return self.clean(x, denoise(x, grid[-1]), grid[-1])  # to no noise: first order, the estimate itself


EVEN_RATIOS = 200  # diffusion steps


@dataclass(frozen=True)
class Sampler:
    """A line of the registry: how a denoiser turns noise into actions.

    ancestral: each step draws noise, else the first only. reads: as in `PolicyAlgorithm`.
    """

    run: Callable[[Diffusion, Denoise, Tensor, int], Tensor]
    ancestral: bool
    reads: tuple[str, ...]


SAMPLERS = {
    "ddpm": Sampler(Diffusion.reverse, ancestral=True, reads=("variance",)),
    "dpm-solver++": Sampler(Diffusion.solve, ancestral=False, reads=("sampling_steps",)),
}

# --- losses -------------------------------------------------------------------------------------------------------

Loss = tuple[Tensor, dict[str, Tensor]]  # the loss of each member, (S,), and metrics of the same shape


@dataclass(frozen=True)
class Rule:
    """A line of a registry: a function, and the fields of its table that are its last arguments."""

    apply: Callable[..., Any]
    reads: tuple[str, ...] = ()

    def __call__(self, section: TrainingSection, *tensors: Tensor) -> Any:
        return self.apply(*tensors, *(getattr(section, name) for name in self.reads))


def expectile_loss(target_q: Tensor, v: Tensor, expectile: float) -> Loss:
    """Expectile regression of V towards target Q.

    target_q, v: (S, B), in scaled-reward units; gradient flows through v only. expectile in (0, 1).
    Source: implicit Q-learning, arXiv 2110.06169, eq. 5.
    """
    difference = target_q.detach() - v
    weight = torch.where(difference < 0, 1.0 - expectile, expectile)
    return _value_loss((weight * difference.square()).mean(-1), v)


def quantile_loss(target_q: Tensor, v: Tensor, quantile: float) -> Loss:
    """Quantile regression of V towards target Q; shapes and units as for `expectile_loss`.

    Source: implicit diffusion Q-learning, arXiv 2304.10573, section 4.1.
    """
    difference = target_q.detach() - v
    return _value_loss(torch.maximum(quantile * difference, (quantile - 1.0) * difference).mean(-1), v)


def gumbel_loss(target_q: Tensor, v: Tensor, temperature: float) -> Loss:
    """Gumbel regression of V towards target Q; shapes and units as for `expectile_loss`, temperature in the unit of Q.

    z is at most 7: a target further above V than 7 temperatures has no gradient.
    Source: extreme Q-learning, arXiv 2301.02328, eq. 9.
    """
    z = ((target_q.detach() - v) / temperature).clamp(max=7.0)
    return _value_loss((z.exp() - z - 1.0).mean(-1), v)


def _value_loss(loss: Tensor, v: Tensor) -> Loss:
    return loss, {"v_loss": loss.detach(), "v": v.detach().mean(-1)}


VALUE_LOSSES = {
    "expectile": Rule(expectile_loss, ("expectile",)),
    "quantile": Rule(quantile_loss, ("expectile",)),
    "gumbel": Rule(gumbel_loss, ("gumbel_temperature",)),
}


def td_loss(q: Tensor, rewards: Tensor, terminals: Tensor, next_v: Tensor, discount: float | Tensor) -> Loss:
    """Squared error of both critics to rewards + discount (1 - terminals) next_v.

    q: (S, 2, B); the others (S, B), in scaled-reward units; discount may be one number. A time limit is no terminal.
    Source: implicit Q-learning, arXiv 2110.06169, eq. 6; Diffusion-QL, arXiv 2208.06193, eq. 4.
    """
    target = (rewards + discount * (1.0 - terminals) * next_v).detach()
    loss = (q - target[:, None]).square().mean(-1).sum(-1)
    return loss, {"q_loss": loss.detach(), "q": q.detach().mean((-2, -1))}


def conservative_loss(q: Tensor, others: Tensor) -> Loss:
    """How far the log-sum-exp of Q over the data's action and K others lies above Q of the data's action.

    Its gradient lowers Q at actions that the data do not contain, by more the higher it is there, for both critics.
    q: (S, 2, B), of the data's actions; others: (S, 2, B, K), of other actions in the same states.
    Source: conservative Q-learning, arXiv 2006.04779, eq. 4.
    """
    above = torch.logsumexp(torch.cat([q[..., None], others], dim=-1), dim=-1) - q
    loss = above.mean(-1).sum(-1)
    return loss, {"conservative_loss": loss.detach()}


def noise_loss(predicted: Tensor, noise: Tensor, weight: Tensor | None = None, known: Tensor | None = None) -> Loss:
    """Mean squared error of the predicted noise.

    predicted, noise: (S, B, A); weight of each transition: (S, B), by default equal; known: (S, B, A) bool, what counts,
    by default all; the rest has error 0.
    Source: DDPM, arXiv 2006.11239, eq. 14; weighted: IDQL, arXiv 2304.10573, eq. 9.
    """
    error = (predicted - noise).square()
    error = (error if known is None else known * error).mean(-1)
    loss = (error if weight is None else weight * error).mean(-1)
    return loss, {"noise_loss": loss.detach()}


def improvement_loss(q: Tensor) -> Loss:
    """Minus the mean Q of the policy's own actions, in units of their mean absolute Q.

    q: (S, B), with gradient to the actions.
    Source: Diffusion-QL, arXiv 2208.06193, eq. 3 and its normalization by the data's value scale. The authors' code
    divides by the other critic's mean. In batches of 256 on Hopper the two means differ by 1.3 % in most trained
    guidances, by 15 % in one, and by up to 76 % after 100 steps. Divided by its own mean, the loss lies in [-1, 1].
    """
    loss = -q.mean(-1) / q.detach().abs().mean(-1).clamp(min=1e-6)
    return loss, {"policy_q": q.detach().mean(-1)}


# weight of each transition in the noise error, (S, B), by its advantage
# Source: IDQL, arXiv 2304.10573, table 1; "exponential": implicit Q-learning, arXiv 2110.06169, eq. 7
ADVANTAGE_WEIGHTS = {
    "none": Rule(torch.ones_like),
    "expectile": Rule(
        lambda advantage, expectile: torch.where(advantage < 0, 1.0 - expectile, expectile), ("advantage_expectile",)
    ),
    "exponential": Rule(
        lambda advantage, inverse_temperature: (inverse_temperature * advantage).exp().clamp(max=100.0),
        ("advantage_inverse_temperature",),
    ),
    "hard": Rule(lambda advantage: (advantage >= 0).float()),
}


def add(first: Loss, second: Loss, weight: float = 1.0) -> Loss:
    """first + weight * second, with the metrics of both. Raises: RuntimeError for a metric that both have."""
    if both := first[1].keys() & second[1].keys():
        raise RuntimeError(f"two losses have a metric {min(both)!r}; give one of them another name")
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
        horizon: int = 1,
    ) -> None:
        super().__init__()
        self.section, self.normalizer, self.algorithm = section, normalizer, POLICIES[section.algorithm]
        self.action_dim, self.sampler = action_dim, SAMPLERS[section.sampler]
        betas = make_schedule(section.noise_schedule, section.diffusion_steps)
        self.diffusion = Diffusion(betas, random.device, section.variance or self.algorithm.variance)
        self.denoiser = Denoiser(random, section, observation_dim, action_dim, self.algorithm.labels, horizon)
        self.average = self.denoiser.frozen_copy()
        self.times: Tensor | None = None  # (S, T, H), once the weights are final

    @property
    def members(self) -> int:
        """S."""
        return self.average.members

    def networks(self) -> list[tuple[Stack, float]]:
        """The networks that learn, and their initial learning rates."""
        return [(self.denoiser, self.section.learning_rate)]

    def loss(self, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
        """The algorithm's loss under a guidance. It gets None where there is none, or where none enters it."""
        guided = guidance is not None and self.algorithm.guided(self.section)
        return self.algorithm.loss(self, batch, guidance if guided else None, random)

    def follow(self, step: int) -> None:
        """Move the average after gradient step `step`; early on it forgets faster than ema_decay."""
        if step < max(self.section.ema_from, self.section.ema_every - 1):
            self.average.follow(self.denoiser, 1.0)
        elif (step + 1) % self.section.ema_every == 0:
            self.average.follow(self.denoiser, 1.0 - min(self.section.ema_decay, (1 + step) / (10 + step)))

    def predict(self, batch: Batch, random: Randomness, labels: Tensor | None = None) -> Prediction:
        """Add noise to the batch's actions at random diffusion steps, and predict it.

        Raises: RuntimeError where it is called twice in a step, since both calls would draw the same steps and noise.
        """
        rows = batch.rewards.shape[1]
        t = random.integers("t", self.diffusion.steps, rows)
        noise = random.normal("noise", rows, self.action_dim)
        noisy = self.diffusion.diffuse(batch.actions, noise, t)
        condition = self.denoiser.condition(self.normalizer(batch.observations), labels)
        times = self.denoiser.times()
        chosen = functional.one_hot(t, times.shape[1]).float() @ times  # (S, B, H)
        predicted = self.denoiser(noisy, chosen, condition, random)
        return Prediction(predicted, noise, noisy, t, condition, times, batch.known())

    def sample(
        self,
        observations: Tensor,
        noises: Tensor,
        *,
        candidates: int = 1,
        w: float = 1.0,
        guidance: Judge | RowsApart | None = None,
        guidance_weight: float = 0.0,
        jacobian: bool = False,
    ) -> Tensor:
        """Actions of the averaged policy: raw observations (S, B, O) -> (S, B N, A), the N of a state side by side.

        noises: as from `noises`, for B N rows. w: weight of classifier-free guidance (0: unconditional; arXiv
        2207.12598), for policies with labels. guidance_weight: if positive, the predicted noise is shifted by the
        gradient of Q at the one-step estimate of the clean action. With jacobian, by -guidance_weight sqrt(1 -
        alpha_bar) dQ/dx, through the denoiser: this draws from the policy's density times exp(guidance_weight Q),
        exactly if the one is Gaussian and the other linear (arXiv 2105.05233, Algorithm 2). Without, by
        -guidance_weight sqrt(alpha_bar) dQ/da (Q-guided flow, arXiv 2606.11087); in a window, this moves later actions
        less, since Q depends less on them and the denoiser does not carry the gradient from one action to another.
        """
        predict = self._prediction(observations, candidates, w)
        repeated = observations.repeat_interleave(candidates, dim=1)

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

    def _prediction(self, observations: Tensor, candidates: int, w: float) -> Denoise:
        """The averaged denoiser in these states, conditional and unconditional noise combined by w."""
        network = self.average
        normalized = self.normalizer(observations)
        conditions = [network.condition(normalized)]
        if self.algorithm.labels:
            better = torch.full(observations.shape[:2], 2, dtype=torch.int64, device=observations.device)
            conditions.append(network.condition(normalized, better))
        conditions = [condition.repeat_interleave(candidates, dim=1) for condition in conditions]
        times = network.times() if self.times is None else self.times

        def predict(x: Tensor, t: int) -> Tensor:
            noise: Tensor = network(x, times[:, t : t + 1], conditions[0])
            for condition in conditions[1:]:
                noise = noise + w * (network(x, times[:, t : t + 1], condition) - noise)
            return noise

        return predict

    def act_alone(self, observations: Tensor, random: Randomness, w: float = 1.0) -> Tensor:
        """One action for each of B states, without a judge: (S, B, O) -> (S, B, A)."""
        return self.sample(observations, self.noises(random, "act", observations.shape[1]), w=w)

    def noises(self, random: Randomness, name: str, rows: int) -> Tensor:
        """The noise that a chain needs: (S, T, rows, A), or (S, 1, rows, A) for a deterministic sampler."""
        return random.normal(name, self.diffusion.steps if self.sampler.ancestral else 1, rows, self.action_dim)

    def denoise_all(self, denoise: Denoise, noises: Tensor) -> Tensor:
        """Run the sampler: noises, as from `noises`, to clean actions (S, rows, A)."""
        return self.sampler.run(self.diffusion, denoise, noises, self.section.sampling_steps)


@dataclass(frozen=True)
class Prediction:
    """A step of denoising training: predicted, noise, noisy (S, B, A), t (S, B), and the first layer's parts.

    known: which of the actions are of the window's own rows, as in `Batch`.
    """

    predicted: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    condition: Tensor
    times: Tensor
    known: Tensor | None

    def loss(self, weight: Tensor | None = None, target: Tensor | None = None) -> Loss:
        """`noise_loss` where actions are known; target: (S, B, A), by default the noise."""
        return noise_loss(self.predicted, self.noise if target is None else target, weight, self.known)


def cloning_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error (DDPM, arXiv 2006.11239), under a guidance weighted by the advantage of each transition."""
    step = policy.predict(batch, random)
    if guidance is None:
        return step.loss()
    with torch.no_grad():
        advantage = guidance.advantage(batch.observations, batch.actions)
    weights = ADVANTAGE_WEIGHTS[policy.section.advantage_weight](policy.section, advantage)
    return step.loss(weights)


def chain_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error minus eta times scaled Q of actions from the whole chain (Diffusion-QL, arXiv 2208.06193, eq. 3)."""
    step = policy.predict(batch, random)
    cloning = step.loss()
    if guidance is None:
        return cloning

    def denoise(x: Tensor, t: int) -> Tensor:
        return policy.denoiser(x, step.times[:, t : t + 1], step.condition)  # type: ignore[no-any-return]

    actions = policy.denoise_all(denoise, policy.noises(random, "chain", batch.rewards.shape[1]))
    q = guidance.one_q(batch.observations, actions, random.integers("twin", 2))
    return add(cloning, improvement_loss(q), policy.section.eta)


def one_step_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error minus eta times scaled Q of the one-step clean estimate (EDP, arXiv 2305.20081, eq. 9)."""
    step = policy.predict(batch, random)
    cloning = step.loss()
    if guidance is None:
        return cloning
    actions = policy.diffusion.clean(step.noisy, step.predicted, step.t)
    q = guidance.one_q(batch.observations, actions, random.integers("twin", 2))
    return add(cloning, improvement_loss(q), policy.section.eta)


def noise_regression_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Squared error to noise - eta sqrt(1 - alpha_bar) dQ/da / mean abs Q at the noisy action (DAC, arXiv 2405.20555).

    The mean is that of the batch's actions, for each member, so that eta is independent of the scale of Q. The authors'
    eta is the weight of the noise error against the term of Q: 1 / (2 eta) here, so that theirs of 1 is 0.5.
    """
    step = policy.predict(batch, random)
    if guidance is None:
        return step.loss()
    with torch.no_grad():
        size = guidance.q(batch.observations, batch.actions).abs().mean(-1).clamp(min=1e-6)  # (S,)
    noisy = step.noisy.detach().requires_grad_()
    q = guidance.one_q(batch.observations, noisy, random.integers("twin", 2))
    (gradient,) = torch.autograd.grad(q.sum(), noisy)
    scale = policy.section.eta * policy.diffusion.levels[step.t][..., 1:] / size[:, None, None]  # (S, B, 1)
    loss, metrics = step.loss(target=step.noise - scale * gradient)
    return loss, metrics | {"policy_q": q.detach().mean(-1)}


def label_loss(policy: Policy, batch: Batch, guidance: Judge | None, random: Randomness) -> Loss:
    """Noise error given the label "the advantage of this action is positive", which is dropped at random.

    With `label_share`, the label is "its advantage is among this share of the member's batch, the highest".
    Source: arXiv 2505.23458; classifier-free guidance, arXiv 2207.12598.
    """
    if guidance is None:
        return cloning_loss(policy, batch, None, random)
    share = policy.section.label_share
    with torch.no_grad():
        advantage = guidance.advantage(batch.observations, batch.actions)
        better = advantage > 0
        if share is not None:
            better = advantage >= torch.quantile(advantage, 1 - share, dim=-1, keepdim=True)
    kept = random.uniform("label", better.shape[1]) >= policy.section.label_dropout
    step = policy.predict(batch, random, labels=kept * (1 + better.long()))
    loss, metrics = step.loss()
    return loss, metrics | {"better": better.float().mean(-1)}


def weighed_by_eta(section: PolicySection) -> bool:
    """Whether a guidance enters a loss of which eta is the weight."""
    return section.eta > 0


@dataclass(frozen=True)
class PolicyAlgorithm:
    """A line of the registry: how a policy learns.

    reads: fields of [policy] that it reads, beside those that all read. guided: whether a guidance enters the loss,
    which gets None if not. network, variance: the denoiser, and the variance of its sampling steps, unless the
    experiment names them. labels: whether actions have labels.
    """

    loss: Callable[[Policy, Batch, Judge | None, Randomness], Loss]
    reads: tuple[str, ...] = ("eta",)
    guided: Callable[[PolicySection], bool] = weighed_by_eta
    network: str = "mlp"
    variance: Literal["posterior", "beta"] = "posterior"
    labels: bool = False


def _weighted(section: PolicySection) -> bool:
    return section.advantage_weight != "none"


POLICIES = {
    "bc": PolicyAlgorithm(cloning_loss, ("advantage_weight",), _weighted),
    "idql": PolicyAlgorithm(cloning_loss, ("advantage_weight",), _weighted, network="resnet", variance="beta"),
    "dql": PolicyAlgorithm(chain_loss),
    "edp": PolicyAlgorithm(one_step_loss),
    "dac": PolicyAlgorithm(noise_regression_loss),
    "cfg": PolicyAlgorithm(
        label_loss, ("label_dropout", "label_share"), lambda section: section.label_dropout < 1, labels=True
    ),
}


# --- guidance -----------------------------------------------------------------------------------------------------

Actor = Callable[[Tensor, Randomness], Tensor]  # raw observations (S, B, O) -> actions (S, B, A)


class Guidance(nn.Module):
    """Values learned from the dataset alone. Policies and acting use q, v and advantage, however they were learned.

    Twin critics and their Polyak targets, (2 S, ...), and V, (S, ...). companion: with the actor that some algorithms
    need when the guidance learns alone.
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
        # the online critics in a run that trains them; in a list, so that torch does not register them twice
        self.learning: list[Stack] = []
        self.actor: Policy | None = None
        if companion and self.algorithm.has_actor:
            table = {
                key: getattr(section, key) for key in ("activation", *COMPANION) if key in PolicySection.model_fields
            }
            actor = PolicySection(**table | {"algorithm": "dql", "hidden": section.actor_hidden})
            self.actor = Policy(random, normalizer, actor, observation_dim, action_dim)

    @property
    def members(self) -> int:
        """S."""
        return self.value.members

    def twins(self, network: Stack, observations: Tensor, actions: Tensor) -> Tensor:
        """Values of both critics: observations (S, B, O), actions (S, B, A) -> (S, 2, B)."""
        inputs = torch.cat([self.normalizer(observations), actions], dim=-1)
        values: Tensor = network(inputs.repeat_interleave(2, dim=0))  # (2 S, B)
        return values.view(self.members, 2, -1)

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Minimum of the twin target critics: raw (S, B, O), scaled (S, B, A) -> (S, B), in scaled-reward units."""
        return self.twins(self.target_q, observations, actions).amin(1)

    def one_q(self, observations: Tensor, actions: Tensor, twin: Tensor, members: Tensor | None = None) -> Tensor:
        """Values by which a policy learns: critic `twin` (S,) in {0, 1} of each member, or of `members` (S,): (S, B).

        Of the target critics, or in a joint run of the online ones, without gradient to their weights.
        """
        inputs = torch.cat([self.normalizer(observations), actions], dim=-1)
        rows = 2 * (torch.arange(self.members, device=twin.device) if members is None else members) + twin
        (network,) = self.learning or [self.target_q]
        return network(inputs, rows)  # type: ignore[no-any-return]

    def v(self, observations: Tensor) -> Tensor:
        """State value: raw (S, B, O) -> (S, B), in scaled-reward units."""
        return self.value(self.normalizer(observations))  # type: ignore[no-any-return]

    def advantage(self, observations: Tensor, actions: Tensor) -> Tensor:
        """q - v, (S, B)."""
        return self.q(observations, actions) - self.v(observations)

    def networks(self) -> list[tuple[Stack, float]]:
        """The networks that learn, and their initial learning rates."""
        rate = self.section.learning_rate
        actor = [] if self.actor is None else [(self.actor.denoiser, self.section.actor_learning_rate or rate)]
        return [(self.online_q, rate), (self.value, self.section.value_learning_rate or rate), *actor]

    def loss(self, batch: Batch, random: Randomness, actor: Actor | None = None) -> Loss:
        """The algorithm's loss and, by `conservatism`, that of other actions in a share of the batch's states.

        actor: the policy that acts in a joint run, in place of the companion.
        """
        section, observations, actions = self.section, batch.observations, batch.actions
        if section.conservatism == 0:
            q = self.twins(self.online_q, observations, actions)
            return self.algorithm.loss(self, q, batch, random, actor)
        rows, count = actions.shape[1], section.conservative_actions
        judged = math.ceil(section.conservative_share * rows)
        others = other_actions(actions[:, :judged], count, section.conservative_noise, random)  # (S, b, K, A)
        states = observations[:, :judged].repeat_interleave(count, dim=1)  # (S, b K, O)
        both = torch.cat([observations, states], 1), torch.cat([actions, others.flatten(1, 2)], 1)
        q, theirs = torch.split(self.twins(self.online_q, *both), [rows, judged * count], dim=-1)
        conservative = conservative_loss(q[..., :judged], theirs.view(*q.shape[:2], judged, count))
        return add(self.algorithm.loss(self, q, batch, random, actor), conservative, section.conservatism)

    def follow(self, step: int) -> None:
        """Move targets and averages after gradient step `step`: target <- (1 - tau) target + tau online."""
        if (step + 1) % self.section.target_every == 0:
            self.target_q.follow(self.online_q, self.section.tau)
        if self.actor is not None:
            self.actor.follow(step)


@dataclass(frozen=True)
class Ensemble:
    """Guidances that judge as one: all K members of all of them judge each row, and a rule combines their values.

    rule: of `ENSEMBLES`. candidates: how many consecutive rows belong to one state, for "rank". by_position: policy
    member i is judged by member i of each guidance alone.
    """

    guidances: Sequence[Guidance]
    rule: str
    candidates: int = 1
    by_position: bool = False

    @property
    def members(self) -> int:
        """K."""
        return sum(guidance.members for guidance in self.guidances)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of all members."""
        return chain.from_iterable(guidance.parameters() for guidance in self.guidances)

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """As `Guidance.q`: (S, B, O), (S, B, A) -> (S, B), for any number S of policy members."""
        return self._judge(Guidance.q, observations, actions)

    def v(self, observations: Tensor) -> Tensor:
        """As `Guidance.v`."""
        return self._judge(Guidance.v, observations)

    def advantage(self, observations: Tensor, actions: Tensor) -> Tensor:
        """All members' advantages combined, each against its own V."""
        return self._judge(Guidance.advantage, observations, actions)

    def one_q(self, observations: Tensor, actions: Tensor, twin: Tensor) -> Tensor:
        """As `Guidance.one_q`: all members use the critic that a policy member drew, (S,)."""
        values = [
            guidance.one_q(observations, actions, twin, torch.full_like(twin, member))
            for guidance in self.guidances
            for member in range(guidance.members)  # one after another, which fits the processor's cache
        ]
        return ENSEMBLES[self.rule](torch.stack(values), self.candidates)

    def _judge(self, ask: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.by_position:
            return ENSEMBLES[self.rule](torch.stack([ask(each, *inputs) for each in self.guidances]), self.candidates)
        values = [
            torch.cat(
                [ask(guidance, *(row.expand(guidance.members, -1, -1) for row in rows)) for guidance in self.guidances]
            )
            for rows in zip(*inputs, strict=True)  # of one policy member after another, to save memory
        ]
        return ENSEMBLES[self.rule](torch.stack(values, dim=1), self.candidates)  # of (K, S, B)


def median(values: Tensor) -> Tensor:
    """Median over the first axis; of an even number, the mean of the two in the middle."""
    ordered, count = values.sort(0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def mean_rank(values: Tensor, candidates: int) -> Tensor:
    """(K, S, B) -> (S, B): rank of each row among the N of its state, from 0, the lowest, to 1, averaged over K.

    Equal values share the mean of their ranks.
    """

    def places(each: Tensor) -> Tensor:  # of equal values the first is the lowest
        return each.argsort(dim=-1, stable=True).argsort(dim=-1).float()

    states = values.view(*values.shape[:2], -1, candidates)  # (K, S, B / N, N)
    ranks: Tensor = (places(states) + places(states.flip(-1)).flip(-1)) / 2
    return ranks.flatten(-2).mean(0) / max(1, candidates - 1)


ENSEMBLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda values, candidates: functools.reduce(torch.add, values.unbind()) / len(values),
    "median": lambda values, candidates: median(values),
    "min": lambda values, candidates: values.amin(0),
    "rank": mean_rank,
}

Judge = Guidance | Ensemble


def other_actions(actions: Tensor, count: int, noise: float, random: Randomness) -> Tensor:
    """K = `count` actions to compare each action with: (S, B, A) -> (S, B, K, A), in [-1, 1].

    Half of them, rounded down, are the action plus Gaussian noise of this deviation, the others uniform.
    """
    (_, rows, width), close = actions.shape, count // 2
    beside = actions[:, :, None] + noise * random.normal("actions beside", rows, close, width)
    anywhere = 2 * random.uniform("actions anywhere", rows, count - close, width) - 1
    return torch.cat([beside.clamp(-1, 1), anywhere], dim=2)


def step_loss(guidance: Guidance, q: Tensor, batch: Batch, next_v: Tensor) -> Loss:
    """`td_loss` over the rows of each window (n-step returns: Sutton and Barto, 2nd edition, section 7.1)."""
    rewards, discount = batch.discounted(guidance.section.discount)
    return td_loss(q, rewards, batch.terminals, next_v, discount)


def implicit_q_loss(guidance: Guidance, q: Tensor, batch: Batch, random: Randomness, actor: Actor | None) -> Loss:
    """Implicit Q-learning (arXiv 2110.06169, Algorithm 1; arXiv 2304.10573): uses no action outside the data."""
    with torch.no_grad():
        target_q = guidance.q(batch.observations, batch.actions)
        next_v = guidance.v(batch.next_observations)
    v = guidance.v(batch.observations)
    return add(
        VALUE_LOSSES[guidance.section.value_loss](guidance.section, target_q, v),
        step_loss(guidance, q, batch, next_v),
    )


def critic_loss(guidance: Guidance, batch: Batch, td: Loss) -> Loss:
    """The critics' loss `td`, plus regression of V to the mean of their target Q at the data's actions."""
    with torch.no_grad():
        target_q = guidance.q(batch.observations, batch.actions)
    value = expectile_loss(target_q, guidance.v(batch.observations), 0.5)
    return add(td, value)


def diffusion_q_loss(guidance: Guidance, q: Tensor, batch: Batch, random: Randomness, actor: Actor | None) -> Loss:
    """The critics of Diffusion-QL (arXiv 2208.06193, eq. 4), bootstrapped by the actor, else by the companion.

    Each critic takes the best of `bootstrap_candidates` next actions, and the lower of the two values counts. The
    companion learns by the loss of the policy algorithm "dql".
    """
    companion = guidance.actor if actor is None else None
    if companion is not None:
        actor = companion.act_alone
    if actor is None:
        raise RuntimeError("this guidance was built without a companion, and got no actor")
    repeated = batch.next_observations.repeat_interleave(guidance.section.bootstrap_candidates, dim=1)  # (S, B N, O)
    with torch.no_grad():
        both = guidance.twins(guidance.target_q, repeated, actor(repeated, random))  # (S, 2, B N)
        next_q = both.view(*both.shape[:2], batch.rewards.shape[1], -1).amax(-1).amin(1)
    td = step_loss(guidance, q, batch, next_q)
    loss = critic_loss(guidance, batch, td)
    return loss if companion is None else add(loss, companion.loss(batch, guidance, random))


def sarsa_loss(guidance: Guidance, q: Tensor, batch: Batch, random: Randomness, actor: Actor | None) -> Loss:
    """Evaluate the policy that made the data: bootstrap by Q of its next action, or by V(s') where there is none.

    Source: Sutton and Barto, Reinforcement Learning, 2nd edition, section 6.4; offline: arXiv 2106.08909.
    """
    next_actions, exists = batch.next_actions()
    with torch.no_grad():
        next_q = guidance.q(batch.next_observations, next_actions)
        next_v = torch.where(exists, next_q, guidance.v(batch.next_observations))
    td = step_loss(guidance, q, batch, next_v)
    return critic_loss(guidance, batch, td)


def monte_carlo_loss(guidance: Guidance, q: Tensor, batch: Batch, random: Randomness, actor: Actor | None) -> Loss:
    """Regress Q to the discounted return to the end of the episode; where it was cut off, V of its last state follows.

    Source: Sutton and Barto, Reinforcement Learning, 2nd edition, section 5.1.
    """
    discount = guidance.section.discount
    returns, steps, last = batch.returns(discount)
    with torch.no_grad():
        next_v = guidance.v(last.next_observations)
    return critic_loss(guidance, batch, td_loss(q, returns, last.terminals, next_v, discount**steps))


@dataclass(frozen=True)
class GuidanceAlgorithm:
    """A line of the registry: how a guidance learns.

    loss: gets Q of the online critics at the data's actions, (S, 2, B), with gradient to their weights. reads: fields
    of [guidance] that it reads, beside those that all read. has_actor: whether it needs an actor: the policy of a joint
    run, or else a companion, which reads the fields in COMPANION. bootstraps: whether values grow through target networks.
    """

    loss: Callable[[Guidance, Tensor, Batch, Randomness, Actor | None], Loss]
    reads: tuple[str, ...] = ()
    has_actor: bool = False
    bootstraps: bool = True


COMPANION = ("actor_learning_rate", "actor_hidden", "time_features", "eta", "diffusion_steps", "ema_decay")

GUIDANCES = {
    "idql": GuidanceAlgorithm(implicit_q_loss, ("value_loss",)),
    "dql": GuidanceAlgorithm(diffusion_q_loss, ("bootstrap_candidates", *COMPANION), has_actor=True),
    "sarsa": GuidanceAlgorithm(sarsa_loss),
    "mc": GuidanceAlgorithm(monte_carlo_loss, bootstraps=False),
}

# --- algorithms and their settings --------------------------------------------------------------------------------


WINDOW = ("guidance_from", "guidance_until")
CONSERVATIVE = ("conservative_actions", "conservative_noise", "conservative_share")
PACE = ("steps", "batch_size", "snapshots", "save_every")  # in a joint run those of [policy] count

SCHEMES = {"guidance-first": SimpleNamespace(reads=("ensemble", *WINDOW)), "joint": SimpleNamespace(reads=WINDOW)}
SCHEMES["unguided"] = SimpleNamespace(reads=())

# for each table, its fields that choose a line of a registry; lines name the fields that they read, also later choices
CHOICES: dict[Kind, dict[str, Mapping[str, Any]]] = {
    "guidance": {"algorithm": GUIDANCES, "value_loss": VALUE_LOSSES},
    "policy": {
        "scheme": SCHEMES,
        "algorithm": POLICIES,
        "network": NETWORKS,
        "sampler": SAMPLERS,
        "advantage_weight": ADVANTAGE_WEIGHTS,
    },
}


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment file, as `data.load_experiment` and `check_algorithms` do. Raises: MdptError."""
    run = data.load_experiment(path, overrides)
    try:
        return check_algorithms(run)
    except MdptError as error:
        raise MdptError(f"{path}: {error}") from error


def check_algorithms(run: Experiment) -> Experiment:
    """The experiment with the fields filled in that follow from its algorithms; bundles hold it in this form.

    Raises: MdptError for a name that is in no registry, or a field that the algorithm cannot use.
    """

    def line(where: str, name: str, registry: Mapping[str, Any]) -> Any:
        if name in registry:
            return registry[name]
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MdptError(f"{where} = {name!r}: should be one of {', '.join(registry)}{hint}")

    line("[guidance] algorithm", run.guidance.algorithm, GUIDANCES)
    section = run.policy
    algorithm = line("[policy] algorithm", section.algorithm, POLICIES)
    name = section.network or algorithm.network
    network = line("[policy] network", name, NETWORKS)
    hidden = section.hidden or network.hidden
    if network.equal_widths and len(set(hidden)) > 1:
        raise MdptError(f"[policy] hidden = {hidden}: all blocks of network {name!r} have the same width")
    if network.by_token and hidden[0] % section.heads:
        raise MdptError(f"[policy] heads = {section.heads}: should divide the width of hidden = {hidden}")
    filled = dict(section) | {"network": name, "hidden": hidden, "variance": section.variance or algorithm.variance}
    policy = data.PolicySection.model_construct(section.model_fields_set, **filled)  # filled in is not set
    return run.model_copy(update={"policy": policy})


def unread_fields(run: Experiment, kind: Kind) -> dict[str, list[str]]:
    """The fields that were set but have no effect on a training run, as "table.field", by the choice that ignores them.

    In a joint run the fields of [guidance] count, too.
    """
    joint = kind == "policy" and run.policy.scheme == "joint"
    unread: dict[str, list[str]] = {}
    for table in ("guidance", "policy") if joint else (kind,):
        section = run.guidance if table == "guidance" else run.policy
        owners: dict[str, str] = {}  # of fields that not all choices read: the choice made
        read: set[str] = set()
        for field, registry in CHOICES[table].items():
            choice = getattr(section, field)
            effective = field not in owners or field in read
            owner = owners[field] if not effective else choice if field == "algorithm" else f"{field} {choice}"
            for line in registry.values():
                owners = dict.fromkeys(line.reads, owner) | owners
            read |= set(registry[choice].reads if effective else ())
        if table == "guidance" and run.guidance.conservatism == 0:
            owners |= dict.fromkeys(CONSERVATIVE, "conservatism 0")
        if joint and table == "guidance":
            owners |= dict.fromkeys(ignored := (*PACE, *COMPANION), "scheme joint")
            read -= set(ignored)
        for name in type(section).model_fields:
            if name in section.model_fields_set and name in owners.keys() - read:
                unread.setdefault(owners[name], []).append(f"{table}.{name}")
    return unread


def guided_steps(section: PolicySection, step: int | None = None) -> range:
    """The steps, of the first `step` or of all, that lie between guidance_from and guidance_until."""
    first, end = (math.ceil(share * section.steps) for share in (section.guidance_from, section.guidance_until))
    return range(first, end if step is None else min(end, step))


def learns_under_guidance(section: PolicySection, step: int | None = None) -> bool:
    """Whether a guidance enters a policy's loss, within the first `step` steps or at all."""
    guided = section.scheme != "unguided" and len(guided_steps(section, step)) > 0
    return guided and POLICIES[section.algorithm].guided(section)


def learns_labels(section: PolicySection, step: int | None = None) -> bool:
    """Whether a policy learns labels, within the first `step` steps or at all."""
    return POLICIES[section.algorithm].labels and learns_under_guidance(section, step)


# --- bundles ------------------------------------------------------------------------------------------------------

BUNDLE_FORMAT, BUNDLE_VERSION = "mdpt bundle", 6  # a new field leaves the version as it is, a new meaning raises it

ACTING = ("average.", "target_q.", "value.")  # weights that act or give values; the others only learn

NOT_WRITTEN = "is not a bundle as mdpt writes it; write it anew"


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself. Raises: ValueError unless it is a contiguous float32 tensor of finite numbers."""
    laid_out = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    if not laid_out or not tensor.is_contiguous():
        raise ValueError("should be a plain tensor")
    if tensor.dtype != torch.float32:
        raise ValueError(f"should be float32, not {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError("has numbers that are not finite")
    return tensor


Plain = Annotated[Tensor, AfterValidator(plain)]
Tensors = dict[str, Plain]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A table of a bundle, strictly typed, every number finite.

    When a file is validated, the context is a list: unknown fields are left out, and their names are appended to it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unknown(cls, content: Any, info: ValidationInfo) -> Any:
        if not isinstance(content, dict) or info.context is None or cls is Entry:
            return content
        table = "" if cls is Bundle else f"{cls.model_config.get('title') or cls.__name__.lower()}."
        info.context.extend(f"{table}{shown(key)[1:-1]}" for key in content if key not in cls.model_fields)
        return {key: value for key, value in content.items() if key in cls.model_fields}


def stored(kind: type[Any], title: str) -> BeforeValidator:
    """Validate the table that a bundle stores of a dataclass, and build the dataclass from it."""
    hints = get_type_hints(kind)
    members: dict[str, Any] = {each.name: (hints[each.name], each) for each in fields(kind)}
    table = create_model(kind.__name__, __base__=Part, __cls_kwargs__={"title": title}, **members)

    def build(value: Any, info: ValidationInfo) -> Any:
        return value if isinstance(value, kind) else kind(**dict(table.model_validate(value, context=info.context)))

    return BeforeValidator(build)


def experiment_of(value: Any, info: ValidationInfo) -> Any:
    """The experiment that a bundle stores; fields that it lacks have the value that mdpt used before they existed."""
    if not isinstance(value, dict):
        return value
    experiment, unknown = data.experiment_as_stored(value)
    if info.context is not None:
        info.context.extend(f"experiment.{name}" for name in unknown)
    return check_algorithms(experiment)


class Data(Part, title="dataset"):
    """The data that a bundle learned from: their `Identity`, and raw undiscounted returns of whole episodes."""

    source: str
    name: str
    hash: str
    no_environment: str
    transitions: Count  # rows of the file
    training_transitions: Count
    episodes: Count
    mean_return: float
    best_return: float
    mismatched: list[int] = []  # observation columns in which episodes start otherwise than the environment's resets


class Account(Part, title="accounting"):
    """What training has cost so far; counts and bytes are totals over all members."""

    parameters_trained: Count = 0
    parameters_held: Count = 0
    optimizer_bytes: Count = 0
    peak_bytes: int = 0  # above the loaded dataset
    seconds: float = 0.0
    seconds_per_1000_steps: float = 0.0
    device: str
    products: Products


class Versions(Part):
    """The versions that wrote a bundle."""

    mdpt: str
    torch: str
    python: str


class Training(Part):
    """What an unfinished bundle needs to go on: optimizer states, one per network, and `History.pending`."""

    optimizers: list[Tensors]
    pending: list[tuple[Plain, Tensors]]


class Entry(Part):
    """An entry of the training history; step: gradient steps done.

    Its other fields are `metrics`: one number per member, averaged over the steps since the entry before.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[float]]
    step: Count

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The metrics by name, "loss" among them."""
        return self.__pydantic_extra__


class Quality(Part):
    """How far to trust a guidance, by `guidance_quality`: lists hold a number per member, None where none is defined.

    step: gradient steps done. rows: held-out rows of the correlations, which leave out `left_out` that the means cover;
    in older bundles the means leave them out, too. bootstrapped: the correlations are of returns that end in V.
    """

    step: Count
    rows: Count
    bootstrapped: bool
    correlation: list[float | None]
    advantage_correlation: list[float | None]
    mean_v: list[float | None]
    mean_return: list[float | None]
    q_spread_members: float | None
    q_spread_rows: float
    left_out: Count = 0


class Bundle(Part):
    """A guidance or a policy: all members' weights, and all that is needed to use them or to go on training them.

    guidances: of a policy, those that it learns under. snapshots: weights that act, by gradient step. training: only
    while it is not complete. digest: SHA-256 of the file that it was read from, not stored.
    """

    format: str = BUNDLE_FORMAT
    version: int = BUNDLE_VERSION
    kind: Kind
    experiment: Annotated[Experiment, BeforeValidator(experiment_of)]
    seeds: Annotated[list[int], Field(min_length=1, max_length=256)]
    environment: Annotated[EnvironmentSpec, stored(EnvironmentSpec, "environment")]
    reference: tuple[float, float] | None  # raw returns of scores 0 and 100
    dataset: Data
    normalizer: Tensors  # mean, deviation (O,)
    reward_scale: Annotated[RewardScale, stored(RewardScale, "reward_scale")]
    versions: Versions
    step: Count
    complete: bool
    history: list[Entry]
    snapshots: dict[int, Tensors]
    accounting: Account
    guidances: list[Bundle]
    weights: Tensors
    training: Training | None = None
    quality: list[Quality] = []
    digest: Annotated[str, Field(exclude=True)] = ""

    @property
    def section(self) -> TrainingSection:
        """The table of the experiment that this module learns by."""
        return self.experiment.guidance if self.kind == "guidance" else self.experiment.policy

    @property
    def joint(self) -> bool:
        """Whether this is a policy that learns together with its guidance."""
        return self.kind == "policy" and self.experiment.policy.scheme == "joint"

    @property
    def acting(self) -> dict[str, Tensor]:
        """The weights that act or give values."""
        return {name: tensor for name, tensor in self.weights.items() if name.startswith(ACTING)}


def new_bundle(kind: Kind, experiment: Experiment, dataset: Dataset, account: Account) -> Bundle:
    """A bundle at step 0, without weights."""
    returns, reference = dataset.episode_returns, dataset.section.reference
    return Bundle(
        kind=kind,
        experiment=experiment.model_copy(update={"data": dataset.section}),
        seeds=list(experiment.seeds),
        environment=dataset.environment,
        reference=None if reference is None else data.reference_returns(reference),
        dataset=Data(
            **asdict(dataset.identity),
            training_transitions=len(dataset),
            episodes=len(returns),
            mean_return=float(returns.mean()),
            best_return=float(returns.max()),
        ),
        normalizer={"mean": torch.from_numpy(dataset.mean), "deviation": torch.from_numpy(dataset.deviation)},
        reward_scale=dataset.reward_scale,
        versions=Versions(mdpt=data.version(), torch=str(torch.__version__), python=platform.python_version()),
        step=0,
        complete=False,
        history=[],
        snapshots={},
        accounting=account,
        guidances=[],
        weights={},
    )


def save_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle as plain containers and tensors, so that the file is there whole or not at all."""
    with data.written_whole(path, "choose another --out") as temporary, temporary.open("wb") as file:
        torch.save(bundle.model_dump(), file)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle of either kind onto the CPU.

    FILE@STEP gives the weights of the snapshot of that gradient step, of the policy and of a guidance that learned
    together with it; FILE@last gives the last weights.

    Raises: MdptError for a file that is missing, damaged, not a bundle, of another version, or without that snapshot.
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
    content, digest = _load(path)
    if not isinstance(content, dict) or str(content.get("format")) != BUNDLE_FORMAT:
        raise MdptError(f"{path}: is not an mdpt bundle; expected a file written by `mdpt guidance` or `mdpt policy`")
    if (number := shown(content.get("version"))) != str(BUNDLE_VERSION):
        raise MdptError(
            f"{path}: bundle version {number}, this mdpt reads version {BUNDLE_VERSION}; "
            "train it anew or use the mdpt that wrote it"
        )
    unknown: list[str] = []
    try:
        bundle = Bundle.model_validate(content, context=unknown)
    except ValidationError as error:
        where, problem = error.errors()[0]["loc"], error.errors()[0]["msg"].removeprefix("Value error, ")
        raise MdptError(f"{path}: {NOT_WRITTEN}: {'.'.join(map(str, where))}: {problem}") from error
    except MdptError as error:
        raise MdptError(f"{path}: {error}") from error
    if unknown:
        names = ", ".join(dict.fromkeys(unknown))
        text = f"{path}: written by mdpt {bundle.versions.mdpt}, this mdpt leaves out what it does not know: {names}"
        warnings.warn(text, MdptWarning, stacklevel=2)
    for each in (bundle, *bundle.guidances):
        each.digest = digest
    return bundle


def _load(path: Path) -> tuple[Any, str]:
    """What a file of `torch.save` holds, and its SHA-256: checked, hashed and loaded through one open file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if any(entry.compress_type for entry in entries) or archive.testzip():
                    raise ValueError("an entry is packed, or its checksum is wrong")
                if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
                    raise ValueError("the entries claim to hold more than the file")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True), digest
    except PermissionError as error:
        raise MdptError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise MdptError(
            f"{path}: cannot be read as a bundle, it is damaged or something else; write it anew"
        ) from error


def _at_step(bundle: Bundle, path: Path, step: str) -> Bundle:
    if step == "last":
        return bundle
    if not step.isdecimal() or int(step) not in bundle.snapshots:
        steps = ", ".join(f"@{each}" for each in bundle.snapshots)
        raise MdptError(f"{path}: no snapshot @{step}; there are {steps or 'none yet'} and @last")
    return _at(bundle, int(step))


def _at(bundle: Bundle, step: int) -> Bundle:
    guidances = [_at(inner, step) for inner in bundle.guidances] if bundle.joint else bundle.guidances
    weights = bundle.weights | bundle.snapshots[step]
    return bundle.model_copy(update={"step": step, "weights": weights, "guidances": guidances})


def read_guidances(path: Path) -> list[Bundle]:
    """The guidance bundle in `path`, or those inside the policy bundle there; FILE#SEED gives the member of that seed.

    Raises: MdptError, also for a policy bundle without guidance.
    """
    name, mark, seed = path.name.rpartition("#")
    if mark and name and not path.exists():
        bundles = read_guidances(path.with_name(name))
        seeds = [str(each) for bundle in bundles for each in bundle.seeds]
        if "@" in seed:
            raise MdptError(f"{path}: a member of a snapshot is named FILE@STEP#SEED")
        if seeds.count(seed) != 1:
            raise MdptError(f"{path}: expected one member of seed {seed}; the seeds are {', '.join(seeds)}")
        (bundle,) = (each for each in bundles if int(seed) in each.seeds)
        return [select_members(bundle, [bundle.seeds.index(int(seed))])]
    bundle = read_bundle(path)
    if bundle.kind != "policy":
        return [bundle]
    if not bundle.guidances:
        raise MdptError(f"{path}: this policy was trained unguided and holds no guidance; give a guidance bundle")
    return bundle.guidances


def read_named(names: Sequence[str]) -> list[Bundle]:
    """The guidances in files, a repeated name once; of "none" alone an empty list.

    Raises: MdptError, also for "none" beside other names.
    """
    if "none" in names and len(names) > 1:
        raise MdptError(f"{', '.join(names)}: none cannot be combined with other guidances; leave it out")
    return [bundle for name in dict.fromkeys(names) if name != "none" for bundle in read_guidances(Path(name))]


def read_policy(path: Path) -> Bundle:
    """The policy bundle in `path`. Raises: MdptError, also for a guidance bundle."""
    bundle = read_bundle(path)
    if bundle.kind != "policy":
        raise MdptError(f"{path}: is a {bundle.kind} bundle; expected a policy bundle, written by `mdpt policy`")
    return bundle


def check_fit(first: Bundle, second: Bundle) -> list[str]:
    """Check that two bundles are of one environment and horizon; returns warnings where they learned from other data.

    Raises: MdptError listing the values of each property in which they differ.
    """
    ours, theirs = (asdict(each.environment) | {"horizon": each.experiment.data.horizon} for each in (first, second))
    # without an environment, max_episode_steps is the length of the longest episode of the data
    own = {"repeatable"} | ({"max_episode_steps"} if first.environment.id is None else set())
    mismatches = [
        f"{key} {value} against {theirs[key]}" for key, value in ours.items() if key not in own and value != theirs[key]
    ]
    if mismatches:
        raise MdptError(
            f"the {first.kind} and the {second.kind} do not fit together: {'; '.join(mismatches)}; "
            "use bundles of one environment and one horizon"
        )
    both, known = (first, second), "swapping is known to hold only under one data distribution"
    if first.dataset.hash != second.dataset.hash:
        names = [f"the {bundle.kind} learned from {bundle.dataset.name}" for bundle in both]
        return [f"{' and '.join(names)}: {known}"]
    sections = [bundle.experiment.data for bundle in both]
    shares = [(section.fraction, section.held_out, section.seed) for section in sections]
    if shares[0] != shares[1]:
        names = [f"the {bundle.kind} {share}" for bundle, share in zip(both, shares, strict=True)]
        return [f"other episodes of one dataset, by fraction, held_out and seed: {' and '.join(names)}: {known}"]
    return []


def check_ensemble(guidances: Sequence[Bundle], rule: str) -> None:
    """Check that guidances can judge together by a rule of `ENSEMBLES`, or, where it is "none", that there is one.

    Raises: MdptError where they cannot.
    """
    if rule == "none" and len(guidances) > 1:
        raise MdptError(
            f"{len(guidances)} guidances act together only as an ensemble; set policy.ensemble, under which a policy "
            "learns, or evaluation.ensemble, by which it acts, to mean, median or min, the latter also to rank"
        )
    scales = list(dict.fromkeys(map(values_scale, guidances)))
    if rule != "rank" and len(scales) > 1:
        raise MdptError(
            f"values of {scales[0]} and of {scales[1]} have no {rule} together; leave one out "
            "(evaluation.ensemble=rank is independent of the scale of Q)"
        )


def check_positions(guidances: Sequence[Bundle], how: Inference, members: int) -> None:
    """Check that an ensemble over positions has a member of each guidance for each of a policy's members.

    Raises: MdptError naming both numbers where it has not.
    """
    for count in [len(each.seeds) for each in guidances] if how.by_position else []:
        if count != members:
            raise MdptError(
                f"{members} policy members cannot be judged by position by a guidance of {count} members; use the same "
                "number, or evaluation.ensemble_over = 'all'"
            )


def values_scale(guidance: Bundle) -> str:
    """The unit of a guidance's values, in words: only guidances of one unit have a mean."""
    scale, discount = guidance.reward_scale, guidance.experiment.guidance.discount
    return f"rewards x {scale.multiplier:.6g} + {scale.offset:.6g}, discounted by {discount:g}"


def pair_members(policies: int, guidances: int) -> list[int]:
    """The guidance member for each policy member: by position, or the only one.

    Raises: MdptError for any other difference in number, naming both.
    """
    if guidances not in (1, policies):
        raise MdptError(
            f"{policies} policy members cannot be paired with {guidances} guidance members; "
            "use the same number, or a guidance with one member"
        )
    return list(range(policies)) if guidances > 1 else [0] * policies


def select_members(bundle: Bundle, members: Sequence[int]) -> Bundle:
    """The bundle of the given members, in the given order, repetitions allowed, with only what acting needs."""

    def chosen(quality: Quality) -> Quality:
        lists = {name: [value[i] for i in members] for name, value in quality if isinstance(value, list)}
        return quality.model_copy(update=lists)

    update = {
        "seeds": [bundle.seeds[member] for member in members],
        "weights": _rows(bundle.acting, len(bundle.seeds), members),
        "quality": [chosen(each) for each in bundle.quality],
    }
    return bundle.model_copy(update={"history": [], "snapshots": {}, "training": None, "guidances": []} | update)


def _rows(tensors: Mapping[str, Tensor], count: int, members: Sequence[int]) -> dict[str, Tensor]:
    """The rows of these members out of `count` in tensors (S copies, ...); what all members share has no axis."""
    return {
        name: tensor.view(count, -1, *tensor.shape[1:])[list(members)].flatten(0, 1) if tensor.ndim else tensor.clone()
        for name, tensor in tensors.items()
    }


def split_members(bundle: Bundle, members: Sequence[int]) -> Bundle:
    """The unfinished bundle of some members, from which their training goes on; `merge_members` undoes it."""
    count, training = len(bundle.seeds), bundle.training
    if training is not None:
        places = list(members)
        pending = [
            (loss[places], {name: value[places] for name, value in metrics.items()})
            for loss, metrics in training.pending
        ]
        states = [_rows(state, count, members) for state in training.optimizers]
        training = Training.model_construct(optimizers=states, pending=pending)
    guidances = split_teachers(bundle.guidances, bundle.experiment.policy.ensemble, members)
    update = {
        "seeds": [bundle.seeds[member] for member in members],
        "weights": _rows(bundle.weights, count, members),
        "snapshots": {step: _rows(weights, count, members) for step, weights in bundle.snapshots.items()},
        "history": [
            Entry(step=each.step, **{name: [values[i] for i in members] for name, values in each.metrics.items()})
            for each in bundle.history
        ],
        "training": training,
        "guidances": [split_members(each, members) for each in bundle.guidances] if bundle.joint else guidances,
        "accounting": bundle.accounting.model_copy(update={"peak_bytes": 0}),  # of all members
    }
    return bundle.model_copy(update=update)


def split_teachers(guidances: Sequence[Bundle], rule: str, members: Sequence[int]) -> list[Bundle]:
    """The guidances under which some members of a policy learn: their own members, or an ensemble as a whole."""
    own = rule == "none"
    return [select_members(each, members) if own and len(each.seeds) > 1 else each for each in guidances]


def merge_members(whole: Bundle, parts: Sequence[Bundle]) -> Bundle:
    """The bundle that one process would have written: the members of all parts, in order, after the same step.

    whole: a bundle of that run, of which what all members share is taken. Bytes and parameters are added up; seconds are
    those of the part that took longest.
    """
    step, complete, learning = parts[0].step, parts[0].complete, [part.training for part in parts if part.training]
    longest = max((part.accounting for part in parts), key=lambda account: account.seconds)
    sums = {
        name: sum(getattr(part.accounting, name) for part in parts)
        for name in ("parameters_trained", "parameters_held", "optimizer_bytes", "peak_bytes")
    }
    sums["peak_bytes"] = max(sums["peak_bytes"], whole.accounting.peak_bytes)
    weights = _joined([part.weights for part in parts])
    merged = whole.model_copy(update={"step": step, "complete": complete, "weights": weights})
    merged.snapshots = {
        at: merged.acting if at == step else _joined([part.snapshots[at] for part in parts])
        for at in parts[0].snapshots
    }
    merged.history = [merge_entries(entries) for entries in zip(*(part.history for part in parts), strict=True)]
    merged.accounting = longest.model_copy(update=sums)
    if whole.joint:
        inner = zip(*(part.guidances for part in parts), strict=True)
        merged.guidances = [merge_members(*each) for each in zip(whole.guidances, inner, strict=True)]
    if learning:
        pending = [
            (torch.cat([loss for loss, _ in losses]), _joined([metrics for _, metrics in losses]))
            for losses in zip(*(each.pending for each in learning), strict=True)
        ]
        states = [_joined(states) for states in zip(*(each.optimizers for each in learning), strict=True)]
        merged.training = Training.model_construct(optimizers=states, pending=pending)
    return merged


def merge_entries(entries: Sequence[Entry]) -> Entry:
    """The entry of all members from those of the parts of a run, of one step."""
    metrics = {name: [value for each in entries for value in each.metrics[name]] for name in entries[0].metrics}
    return Entry(step=entries[0].step, **metrics)


def _joined(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several parts one after the other, along the members' axis; what all members share has none."""
    first = tensors[0]
    return {name: torch.cat([each[name] for each in tensors]) if first[name].ndim else first[name] for name in first}


def same_weights(first: Bundle, second: Bundle) -> bool:
    """Whether the weights that act are equal to the bit."""
    ours, theirs = first.acting, second.acting
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def build_guidance(bundle: Bundle, device: str, *, new: bool = False, companion: bool = True) -> Guidance:
    """The guidance of a bundle, frozen, without what only its training needs.

    new: one with initial weights, which is to learn; companion: with the actor that its algorithm may need.
    """
    random, normalizer, wide, actions = _shape(bundle, device)
    guidance = Guidance(random, normalizer, bundle.experiment.guidance, wide, actions, companion=new and companion)
    if new:
        guidance.learning = [guidance.online_q.shared_view()]
        return guidance
    del guidance.online_q  # its targets give all values
    load_weights(guidance, bundle.acting)
    return guidance.requires_grad_(False)


def build_judge(
    bundles: Sequence[Bundle], rule: str, members: int, device: str, candidates: int = 1, by_position: bool = False
) -> Judge:
    """The judge of the actions of policy members: one guidance member each, by position, or an `Ensemble`."""
    if rule == "none":
        (bundle,) = bundles
        return build_guidance(select_members(bundle, pair_members(members, len(bundle.seeds))), device)
    return Ensemble([build_guidance(bundle, device) for bundle in bundles], rule, candidates, by_position)


def build_policy(bundle: Bundle, device: str, *, new: bool = False) -> Policy:
    """The policy of a bundle, without its guidance, ready to act; new: one with initial weights, which is to learn."""
    random, normalizer, wide, actions = _shape(bundle, device)
    policy = Policy(random, normalizer, bundle.experiment.policy, wide, actions, bundle.experiment.data.horizon)
    if not new:
        del policy.denoiser  # its average acts
        load_weights(policy, bundle.acting)
        policy.requires_grad_(False).times = policy.average.times()
    return policy


def _shape(bundle: Bundle, device: str) -> tuple[Randomness, Normalizer, int, int]:
    random = Randomness(bundle.seeds, f"{bundle.kind} init", device)
    normalizer = Normalizer(bundle.normalizer["mean"], bundle.normalizer["deviation"]).to(device)
    actions = bundle.environment.action_dim * bundle.experiment.data.horizon
    return random, normalizer, bundle.environment.observation_dim, actions


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module these weights. Raises: MdptError where names or shapes are not all its own."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise MdptError(f"the weights of a bundle do not fit its experiment: {' '.join(str(error).split())}") from error


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All weights by name, online, target and averaged ones, as independent CPU tensors."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


# --- acting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """How an action is chosen from N candidates; the fields are those of [evaluation], in effect.

    ensemble: the rule by which several guidance members judge as one, or "none": one member judges. ensemble_over: "all"
    members of all guidances, or those at the policy member's "position". execute: how many actions of a window are taken
    before the next decision.
    """

    candidates: int = 1
    selection: str = "max"
    weight_temperature: float = 100.0
    support: float = 0.0
    temperature: float = 1.0
    w: float = 1.0
    guidance_weight: float = 0.0
    jacobian: bool = False
    temperature_on: str = "all"
    ensemble: str = "none"
    ensemble_over: str = "all"
    execute: int = 1

    @property
    def by_position(self) -> bool:
        """Whether policy members share no guidance member of an ensemble."""
        return self.ensemble != "none" and self.ensemble_over == "position"


def pick_inference(run: Experiment, guided: bool, step: int) -> tuple[Inference, dict[str, bool]]:
    """The settings for `act`, from [evaluation], and for each field there whether it has an effect.

    guided: whether there is a guidance, without which nothing is ranked. step: gradient steps of the policy's weights.

    Raises: MdptError for a w that this policy cannot use, or for the gradient of ranks.
    """
    section, labels = run.evaluation, learns_labels(run.policy, step)  # w weighs labels that the policy has learned
    unlabelled = run.policy.label_dropout > 0 or guided_steps(run.policy, step) != range(step)
    if labels and section.w != 1 and not unlabelled:
        raise MdptError(
            f"evaluation.w = {section.w:g}: this policy learned with label_dropout 0, so it cannot predict noise "
            "without a label; only 1 is possible"
        )
    ranked, steered = guided and section.guide != "gradient", guided and section.guide != "rank"
    ensemble = (section.ensemble or run.policy.ensemble) if guided else "none"
    if steered and ensemble == "rank":
        raise MdptError(
            f"evaluation.ensemble = 'rank' has no gradient for guide {section.guide!r}; choose another one, 'none' or "
            "guide 'rank'"
        )
    scaled = section.temperature_on != "steps" or SAMPLERS[run.policy.sampler].ancestral  # else the first noise is all
    supported = ranked and section.candidates > 2  # two candidates are equally far from their median
    effective = {
        "candidates": section.candidates if ranked else 1,
        "support": section.support if supported else 0.0,
        "w": section.w if labels else 0.0,
        "guidance_weight": section.guidance_weight if steered else 0.0,
        "ensemble": ensemble,
        "ensemble_over": section.ensemble_over if ensemble != "none" else "all",
        "execute": section.execute or run.data.horizon,
    }
    how = Inference(**{each.name: getattr(section, each.name) for each in fields(Inference)} | effective)
    return how, {
        "candidates": ranked or section.candidates == 1,
        "selection": ranked,
        "weight_temperature": ranked and section.selection == "softmax",
        "support": supported,
        "guide": guided,
        "guidance_weight": steered,
        "jacobian": steered,
        "ensemble": guided,
        "ensemble_over": ensemble != "none",
        "temperature": scaled,
        "temperature_on": scaled and section.temperature != 1,
        "w": labels,
        "execute": run.data.horizon > 1,
    }


@dataclass(frozen=True)
class RowsApart:
    """Judges of consecutive rows: the first judges the first `sizes[0]` rows, the second the next `sizes[1]`, ..."""

    judges: Sequence[Judge]
    sizes: Sequence[int]

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Raw observations (1, rows, O), scaled actions (1, rows, A) -> (1, rows)."""
        shares = (torch.split(tensor, list(self.sizes), dim=1) for tensor in (observations, actions))
        return torch.cat(
            [judge.q(states, chosen) for judge, states, chosen in zip(self.judges, *shares, strict=True)], 1
        )


def supported_scores(scores: Tensor, actions: Tensor, support: float) -> Tensor:
    """Scores of each state's candidates, (S, B, N), less where a candidate is far from the median of all: (S, B, N).

    What is subtracted is `support` times the standardized squared distance, in standard deviations of the scores, so
    that a softmax keeps their unit. It is 0 where distances do not differ. actions: (S, B, N, A).
    """

    def deviation(values: Tensor) -> Tensor:  # over the candidates; 1 where values differ by rounding at most
        found = values.std(-1, correction=0, keepdim=True)
        return torch.where(found > 1e-9 * values.abs().amax(-1, keepdim=True), found, 1.0)

    exact = actions.double()
    far = (exact - median(exact.movedim(2, 0))[:, :, None]).square().sum(-1)
    beyond = (far - far.mean(-1, keepdim=True)) / deviation(far)
    return (scores - support * deviation(scores.double()) * beyond).float()


@torch.no_grad()
def act(
    policy: Policy,
    guidance: Judge | RowsApart | None,
    observations: Tensor,
    noises: Tensor,
    uniform: Tensor | None,
    how: Inference,
) -> Tensor:
    """Choose actions: raw observations (S, B, O) -> scaled actions (S, B, A).

    Of N candidates per state, the one with the highest Q ("max"), or one drawn with probability proportional to
    exp(weight_temperature * Q) ("softmax"; V would cancel, since it does not depend on the action). With support, Q is
    lower the further a candidate is from the others, see `supported_scores`.

    noises: standard normal, as from `Policy.noises` for B N rows. uniform: (S, B, N) in [0, 1), for "softmax" alone.
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
    if how.support > 0:
        scores = supported_scores(scores, actions, how.support)
    if how.selection == "softmax" and uniform is not None:  # the Gumbel-max trick draws from the softmax
        scores = how.weight_temperature * scores - (-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
    best = scores.argmax(-1)[..., None, None].expand(-1, -1, 1, actions.shape[-1])
    return actions.gather(2, best).squeeze(2)


def fewest_rows(*parts: nn.Module) -> int:
    """Smallest batch at which torch uses one kernel, so that a row's result is independent of the batch size.

    Layers inside a Transformer are not the smallest, and its attention has a kernel that treats each window alone.
    """
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, Linear)]
    sizes = [layer.tokens * layer.weight[0].numel() for layer in layers if 1 not in layer.weight.shape[1:]]
    return 1 + SMALL_PRODUCT // min(sizes, default=SMALL_PRODUCT + 1)


class Agent:
    """One policy member in numbered episodes that run side by side, perhaps judged by one guidance member each.

    judges: for each episode the position of its guidance member, ascending; by default the first judges all, or an
    ensemble of all members of all guidances does. The random numbers of an episode depend on the policy member's seed,
    the episode's number, the number of the decision and `seed` alone. All episodes decide at the same steps.
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
            apart = [[select_members(each, [member])] for each in guidances for member in range(len(each.seeds))]
        self.judges = [build_judge(each, how.ensemble, 1, "cpu", how.candidates) for each in apart]
        self.judge_of = np.array(judges or [0] * len(episodes))  # by episode
        critics = chain.from_iterable(one.guidances if isinstance(one, Ensemble) else [one] for one in self.judges)
        network, self.fewest_judged = self.policy.average, math.ceil(fewest_rows(*critics) / how.candidates)
        for_candidates = math.ceil(fewest_rows(network.action, network.trunk, network.out) / how.candidates)
        self.fewest = max(fewest_rows(network.observation), for_candidates)
        (member,) = policy.seeds
        self.random = Randomness([f"{member} episode {episode}" for episode in episodes], f"evaluate {seed}")
        self.step, self.windows = 0, np.empty((len(episodes), how.execute, policy.environment.action_dim), np.float32)

    def __call__(self, observations: Array, running: Array) -> Array:
        """Actions of this step, (R, A) in [-1, 1], of the episodes at the places `running` (R,), as last decided."""
        if (turn := self.step % self.how.execute) == 0:
            self.windows[running] = self.decide(observations, running)
        self.step += 1
        actions: Array = self.windows[running, turn]
        return actions

    def decide(self, observations: Array, running: Array) -> Array:
        """The next actions (R, execute, A) in [-1, 1], from observations (R, O) of the episodes at these places (R,)."""
        judge_of, count = self.judge_of[running], self.how.candidates
        shares = [np.flatnonzero(judge_of == judge) for judge in np.unique(judge_of)]
        places = np.concatenate([np.resize(share, max(len(share), self.fewest_judged)) for share in shares])
        places = np.pad(places, (0, max(0, self.fewest - len(places))), "edge")  # few states are repeated
        rows = torch.from_numpy(running[places])
        noises = self.policy.noises(self.random, "act", count)[rows]  # (R, T, N, A)
        drawn = self.how.selection == "softmax" and count > 1
        uniform = self.random.uniform("selection", count)[rows][None] if drawn else None  # (1, R, N)
        self.random.step += 1
        states = torch.from_numpy(observations[places])[None]
        noises = noises.transpose(0, 1).flatten(1, 2)[None]  # (1, T, R N, A)
        sizes = count * np.bincount(judge_of[places], minlength=len(self.judges))
        ranker = RowsApart(self.judges, sizes.tolist()) if self.judges else None
        with torch.inference_mode(self.how.guidance_weight == 0):  # a gradient of Q needs another mode
            windows = act(self.policy, ranker, states, noises, uniform, self.how)[0].numpy()  # (R, horizon A)
        chosen = np.empty((len(running), *self.windows.shape[1:]), np.float32)
        chosen[places] = windows.reshape(len(places), -1, chosen.shape[-1])[:, : self.how.execute]
        return chosen


@dataclass(frozen=True)
class Play:
    """A task for a worker: rollouts of a policy of one member, with the arguments of `Agent`. name: the policy's file."""

    name: str
    policy: Bundle
    guidances: tuple[Bundle, ...]
    judges: tuple[int, ...]
    episodes: tuple[int, ...]
    how: Inference
    seed: int
    products: Products


def play(task: Play, watch: Watch, **film: Any) -> Played:
    """What a task's episodes gave, as from `data.rollout`.

    On one thread, so that results are equal to the bit whatever the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        choose_products(task.products)
        agent = Agent(task.policy, task.guidances, task.how, seed=task.seed, episodes=task.episodes, judges=task.judges)
        environment, name = task.policy.environment, f"{task.name}: the member of seed {task.policy.seeds[0]}"
        return data.rollout(agent, environment, task.episodes, seed=task.seed, name=name, watch=watch, **film)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Values:
    """A judge's opinion of a policy on held-out states, one number per member.

    policy: mean Q of the policy's actions. data: mean Q of the data's actions. higher: fraction of states where the
    policy's action has the higher Q.
    """

    policy: list[float]
    data: list[float]
    higher: list[float]


@dataclass(frozen=True)
class Offline:
    """What is known of a policy without playing, on a number of held-out states.

    distance: per member, root mean square difference between its actions and the data's, in [-1, 1]. distance_one: the
    same of one sample for each state, without ranking. chance: the same between the data's actions of two states. gain:
    per member, by how much the guidance that it acts by values its actions above the data's, in standard deviations of
    V over the states; None without such a guidance, or where it has no values ("rank"). values: by the name of the
    judge.
    """

    states: int
    distance: list[float]
    distance_one: list[float]
    chance: float
    gain: list[float] | None
    values: dict[str, Values]


OFFLINE_STATES = 2_000  # at most


@torch.no_grad()
def judge_offline(
    policy: Bundle,
    guidances: Sequence[Bundle],
    how: Inference,
    held_out: HeldOut,
    seed: int,
    judges: Mapping[str, tuple[Sequence[Bundle], str, bool]],
) -> Offline:
    """Compare a policy's actions with the data's on held-out states.

    guidances: by which the policy acts. judges: by name, guidances, the rule by which they judge as one, and whether
    they do so by position.
    """
    count = len(policy.seeds)
    rows = np.linspace(0, len(held_out.rewards) - 1, min(len(held_out.rewards), OFFLINE_STATES)).astype(np.int64)
    windows, known = map(torch.from_numpy, held_out.windows(rows, policy.experiment.data.horizon))
    observations, actions = torch.from_numpy(held_out.observations[rows]), windows.flatten(1)
    states, given = observations.expand(count, -1, -1), actions.expand(count, -1, -1)
    actor, random = build_policy(policy, "cpu"), Randomness(policy.seeds, f"evaluate {seed} offline")
    noises = actor.noises(random, "act", len(rows) * how.candidates)
    uniform = random.uniform("selection", len(rows), how.candidates)
    ranker = build_judge(guidances, how.ensemble, count, "cpu", how.candidates, how.by_position) if guidances else None
    chosen = act(actor, ranker, states, noises, uniform, how).clamp(-1, 1)
    first = noises.view(*noises.shape[:2], len(rows), how.candidates, -1)[..., 0, :]  # (S, T, B, A)
    one = act(actor, ranker, states, first, None, replace(how, candidates=1)).clamp(-1, 1)
    values, gain = {}, None
    if ranker is not None and how.ensemble != "rank":
        above = (ranker.q(states, chosen) - ranker.q(states, given)).mean(1)
        gain = (above / ranker.v(states).std(1).clamp(min=1e-6)).tolist()
    for name, (bundles, rule, by_position) in judges.items():
        judge = build_judge(bundles, rule, count, "cpu", by_position=by_position)
        own, other = judge.q(states, chosen), judge.q(states, given)
        values[name] = Values(own.mean(1).tolist(), other.mean(1).tolist(), (own > other).float().mean(1).tolist())

    def apart(first: Tensor, second: Tensor, counted: Tensor) -> Tensor:  # over the actions of the states' own episodes
        squares = (first - second).square().view(-1, *windows.shape).mean(-1)  # (S, B, horizon)
        return ((squares * counted).sum((1, 2)) / counted.sum()).sqrt()

    distance, distance_one = (apart(each, given, known).tolist() for each in (chosen, one))
    half = len(rows) // 2
    chance = float(apart(actions, actions.roll(half, 0), known & known.roll(half, 0)))
    return Offline(len(rows), distance, distance_one, chance, gain, values)


def load_agent(
    path: Path | str, guidance: Path | str | Sequence[Path | str] | None = None, *, member: int = 0, **evaluation: Any
) -> Callable[[Array], Array]:
    """A policy for other programs: observations (O,) or (E, O) -> actions (A,) or (E, A), in the environment's unit.

    A policy of windows, with [data] horizon above 1, gives the next `evaluation.execute` actions: (K, A) or (E, K, A).
    guidance: the guidance bundle, or several, to act under, or "none"; by default those inside the policy bundle.
    member: by position. evaluation: fields of [evaluation], such as candidates or seed, in place of the bundle's.

    Raises: MdptError, as `mdpt evaluate` does.
    """
    bundle = read_policy(Path(path))
    names = [guidance] if isinstance(guidance, str | Path) else guidance or ()
    guidances = read_named(list(map(str, names))) if names else bundle.guidances
    if member not in range(count := len(bundle.seeds)):
        raise MdptError(f"{path}: has no member {member}; there are 0 to {count - 1}")
    tables = bundle.experiment.model_dump()
    run = data.check_experiment(str(path), tables | {"evaluation": tables["evaluation"] | evaluation})
    how, _ = pick_inference(run, bool(guidances), bundle.step)
    for each in guidances:
        for warning in check_fit(bundle, each):
            warnings.warn(warning, MdptWarning, stacklevel=2)
    check_ensemble(guidances, how.ensemble)
    check_positions(guidances, how, count)
    if how.ensemble == "none" or how.by_position:
        guidances = [select_members(each, [pair_members(count, len(each.seeds))[member]]) for each in guidances]
    one, spec, agents = select_members(bundle, [member]), bundle.environment, {}
    windowed = run.data.horizon > 1
    choose_products()  # as `mdpt evaluate` does

    def choose(observations: Array) -> Array:
        expected = f"expected ({spec.observation_dim},) or (E, {spec.observation_dim}), finite"
        try:
            rows = np.atleast_2d(np.asarray(observations, dtype=np.float32))
        except (TypeError, ValueError) as error:
            name = type(observations).__name__
            raise MdptError(f"{path}: observations that are no array of numbers, but {name}; {expected}") from error
        if rows.ndim != 2 or rows.shape[1] != spec.observation_dim or not np.isfinite(rows).all():
            raise MdptError(f"{path}: observations of shape {np.shape(observations)}; {expected}")
        if not len(rows):
            return np.empty((0, how.execute, spec.action_dim) if windowed else (0, spec.action_dim), np.float32)
        if len(rows) not in agents:
            agents[len(rows)] = Agent(one, guidances, how, seed=run.evaluation.seed, episodes=range(len(rows)))
        actions = data.unscale_actions(agents[len(rows)].decide(rows, np.arange(len(rows))), spec)
        actions = actions if windowed else actions[:, 0]
        return actions if np.ndim(observations) == 2 else actions[0]

    return choose


# --- learning -----------------------------------------------------------------------------------------------------


@dataclass
class Parameters:
    """A network that learns by Adam, with its initial learning rate; section: how both change over the run.

    state: of the optimizer, as `torch.optim.AdamW` keeps it.
    """

    network: Stack
    learning_rate: float
    section: TrainingSection

    def __post_init__(self) -> None:
        vector = self.network.vector
        self.gradient = torch.zeros_like(vector)
        moments = {name: torch.zeros_like(vector) for name in ("exp_avg", "exp_avg_sq")}
        self.state = {"step": torch.zeros((), device=vector.device)} | moments

    def step(self, learning_rate: float) -> None:
        """Take a step of AdamW along `gradient`, by its function: the optimizer class takes 0.2 ms more."""
        state = self.state
        adamw(
            [self.network.vector],
            [self.gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            lr=learning_rate,
            weight_decay=self.section.weight_decay,
        )


class Learner:
    """Modules that learn together under one loss, by Adam, with a decaying learning rate and a gradient-norm limit.

    frozen: guidances that the loss uses and nothing here changes; they only count as parameters held.
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
        """Take one gradient step with every network, then move targets and averages. loss: (S,)."""
        gradients = iter(torch.autograd.grad(loss.sum(), self.parameters))
        for each in self.networks:
            pieces = [next(gradients).flatten(1) for _ in each.network.parameters()]
            torch.cat(pieces, dim=1, out=each.gradient[:, : each.network.size])
            by_member = each.gradient.view(len(loss), -1)  # (S, copies * P)
            if each.section.gradient_norm > 0:
                norm = torch.linalg.vector_norm(by_member, dim=1, keepdim=True)
                by_member.mul_((each.section.gradient_norm / (norm + 1e-6)).clamp(max=1.0))
            left = 0.5 * (1 + math.cos(math.pi * step / steps)) if each.section.decay == "cosine" else 1.0
            each.step(each.learning_rate * left)
        for module in self.modules:
            module.follow(step)

    def broken_member(self) -> int | None:
        """The first member with a weight that is not finite."""
        rows = [each.network.vector.view(each.network.members, -1) for each in self.networks]
        finite = torch.cat(rows, dim=1).isfinite().all(1)
        return None if finite.all() else int(finite.int().argmin())

    def state(self) -> list[dict[str, Tensor]]:
        """Optimizer states, one per network; learning rates and limits follow from the experiment."""
        return [dict(each.state) for each in self.networks]

    def restore(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Take optimizer states, as from `state`."""
        for each, state in zip(self.networks, states, strict=True):
            each.state = {name: state[name].to(own.device, copy=True) for name, own in each.state.items()}


@dataclass
class Run:
    """What a training run needs beside experiment and data.

    device: "cpu" or "cuda". begun: the unfinished bundle of the same run, to go on from. extend: the experiment may
    have more steps than that one's. save: store the bundle. show: report a new entry of the history. interrupted: the
    number of the signal to end after this step for, or 0. tell: report in one line what a user should know. workers:
    processes that train, on a CPU, each some of the members; they share the threads of this one. asked: whether to save
    after this step, given their number, also before `save_every`.
    """

    device: str = "cpu"
    begun: Bundle | None = None
    extend: bool = False
    save: Callable[[Bundle], None] = lambda bundle: None
    show: Callable[[Entry], None] = lambda entry: None
    interrupted: Callable[[], int] = lambda: 0
    tell: Callable[[str], None] = lambda text: None
    workers: int = 1
    asked: Callable[[int], bool] = lambda done: False

    def account(self) -> Account:
        """The account so far; its matrix products are those of the run that was begun, where this machine has them."""
        before = self.begun.accounting if self.begun else Account(device=self.device, products="default")
        products = choose_products(self.begun.accounting.products if self.begun else None)
        return before.model_copy(update={"device": self.device, "products": products})


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

    parts: the modules that learn, each with the bundle that takes its weights: `bundle` itself, or one inside it.
    """
    steps, start = section.steps, bundle.step
    random = Randomness(bundle.seeds, f"{bundle.kind} train", transitions.device)
    milestones = {round(steps * (i + 1) / section.snapshots) for i in range(section.snapshots)}
    history = History(bundle)
    due = time.monotonic() + section.save_every
    for step in range(start, steps):
        random.step = step
        batch = transitions.sample(random, section.batch_size)
        loss, metrics = learner.loss(batch, random, step / steps)
        learner.update(loss, step, steps)
        history.pending.append((loss.detach(), metrics))
        done, asked, stopped = step + 1, run.asked(step + 1), run.interrupted()
        if done % max(1, steps // HISTORY_ENTRIES) == 0 or done in milestones or done == steps:
            run.show(history.average())
        began = time.monotonic()
        if done in milestones or stopped or asked or began >= due:
            if (member := learner.broken_member()) is not None:
                history.give_up("weights", member, "not finite", done)
            for target, module in parts:
                keep_weights(target, module, done, done == steps, done in milestones)
                target.accounting = cost.read(learner, done)
            states, pending = learner.state(), list(history.pending)
            unfinished = Training.model_construct(optimizers=states, pending=pending)  # checked where it is read
            bundle.training = None if done == steps else unfinished
            run.save(bundle)
            history.saved = done
            due = next_save(section, began)
        if stopped and done < steps:
            raise interrupted(done, steps, stopped)


def next_save(section: TrainingSection, began: float) -> float:
    """When to save again, after a save that began at this time: at most a twentieth of the time goes to saving."""
    return time.monotonic() + max(section.save_every, 20 * (time.monotonic() - began))


def interrupted(done: int, steps: int, number: int) -> Interrupted:
    """What ends a run after a signal."""
    return Interrupted(f"interrupted after step {done} of {steps}; the same command goes on", number)


def keep_weights(bundle: Bundle, module: nn.Module, step: int, complete: bool, snapshot: bool) -> None:
    """Put a module's weights into its bundle, and where this is a snapshot, a copy of those that act."""
    weights = weights_of(module)
    if complete:  # the companion actor is needed no more
        weights = {name: value for name, value in weights.items() if not name.startswith("actor.")}
    bundle.step, bundle.complete, bundle.weights = step, complete, weights
    if snapshot:
        bundle.snapshots = bundle.snapshots | {step: bundle.acting}


HISTORY_ENTRIES = 200  # per run, about


class History:
    """Writes the history of a bundle: losses and metrics averaged over the steps from one entry to the next.

    pending: loss and metrics, (S,) each, of the steps since the last entry. saved: the last step that was saved.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.entries, self.saved, self.seeds = bundle.history, bundle.step, bundle.seeds
        self.pending = bundle.training.pending if bundle.training else []

    def average(self) -> Entry:
        """Add an entry. Raises: MdptError for a loss or metric that is not finite, which no bundle may hold."""
        done = (self.entries[-1].step if self.entries else 0) + len(self.pending)
        losses = torch.stack([loss for loss, _ in self.pending]).cpu()  # (steps, S)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step, member = done - len(self.pending) + int(bad[0, 0]), int(bad[0, 1])
            self.give_up("loss", member, losses[bad[0, 0], member].item(), step)
        names = sorted({name for _, metrics in self.pending for name in metrics})
        if taken := {"step", "loss"}.intersection(names):
            raise MdptError(f"a loss has a metric {min(taken)!r}, a name that the history of a bundle uses; rename it")
        found = {name: means([metrics[name] for _, metrics in self.pending if name in metrics]) for name in names}
        for name, member in ((name, member) for name in names for member in range(len(self.seeds))):
            if not math.isfinite(found[name][member]):
                self.give_up(name, member, found[name][member], done)
        self.entries.append(Entry(step=done, loss=means(list(losses)), **found))
        self.pending.clear()
        return self.entries[-1]

    def give_up(self, what: str, member: int, value: object, step: int) -> NoReturn:
        """Raises: Broken."""
        raise Broken(what, member, self.seeds[member], value, step, self.saved)


def means(values: Sequence[Tensor]) -> list[float]:
    """The mean of each member, of tensors (S,); each in a row of its own, so that rounding is independent of S."""
    return torch.stack(list(values), dim=1).mean(1).tolist()


class Broken(MdptError):
    """A member whose loss, metric or weights are not finite; saved: the last step whose weights are kept, or 0."""

    def __init__(self, what: str, member: int, seed: int, value: object, step: int, saved: int) -> None:
        last = f"the last good weights, of step {saved}, are kept" if saved else "no snapshot was reached"
        super().__init__(
            f"the {what} of member {member} (seed {seed}) became {value} at step {step}; {last}; "
            "lower learning_rate or look at the data"
        )
        self.facts = what, member, seed, value, step, saved

    def __reduce__(self) -> tuple[type[Broken], tuple[object, ...]]:  # how a process sends it
        return Broken, self.facts


class Cost:
    """Measures what a training run costs, from now on, and adds what it has cost before."""

    def __init__(self, before: Account, device: torch.device) -> None:
        self.before, self.device = before, device
        self.began, self.base = time.perf_counter(), memory_now(device, restart=True)

    def read(self, learner: Learner, step: int) -> Account:
        """The account after `step` gradient steps."""
        seconds = self.before.seconds + time.perf_counter() - self.began
        state = [value for each in learner.networks for value in each.state.values()]
        held = [p.numel() for module in (*learner.modules, *learner.frozen) for p in module.parameters()]
        return Account(
            parameters_trained=sum(parameter.numel() for parameter in learner.parameters),
            parameters_held=sum(held),
            optimizer_bytes=sum(value.nbytes for value in state),
            peak_bytes=max(self.before.peak_bytes, memory_now(self.device) - self.base),
            seconds=seconds,
            seconds_per_1000_steps=1000 * seconds / step,
            device=str(self.device),
            products=self.before.products,
        )


def memory_now(device: torch.device, *, restart: bool = False) -> int:
    """Peak memory in bytes since the last restart, allocated on CUDA, resident on a CPU; restart: begin a new peak."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux, or it hides this: there is only the peak of the whole process
        import resource  # Windows has no such module

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(name: str) -> str:
    """ "cpu" or "cuda" for a device of the experiment. Raises: MdptError where cuda is asked for and missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MdptError("device cuda: this machine or this torch has none; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def train_guidance(experiment: Experiment, dataset: Dataset, run: Run) -> Bundle:
    """Train a guidance from the data alone, and measure its quality on held-out episodes.

    experiment: as `load_experiment` gives it.
    """
    horizon = dataset.section.horizon

    def save(bundle: Bundle) -> None:
        if bundle.complete:  # a complete bundle always has its quality
            bundle.quality = [
                guidance_quality(
                    build_guidance(_at(bundle, step), run.device), dataset.held_out, discount, step, horizon
                )
                for step in bundle.snapshots
                if len(dataset.held_out.rewards)
            ]
        run.save(bundle)

    bundle, discount = begin("guidance", experiment, dataset, [], run), experiment.guidance.discount
    if shares := deal(bundle.seeds, run):
        return train_shares(bundle, dataset, [], replace(run, save=save), shares)
    transitions = Transitions(dataset, run.device)
    cost = Cost(bundle.accounting, transitions.device)
    guidance = build_guidance(bundle, run.device, new=True)
    learner = Learner([(guidance, experiment.guidance)], lambda batch, random, _: guidance.loss(batch, random))
    go_on(bundle, run, [(bundle, guidance)], learner)
    train(learner, transitions, experiment.guidance, bundle, [(bundle, guidance)], cost, replace(run, save=save))
    return bundle


def train_policy(experiment: Experiment, dataset: Dataset, teachers: Sequence[Bundle], run: Run) -> Bundle:
    """Train a policy under frozen guidance, together with its own ("joint"), or unguided.

    experiment: as `load_experiment` gives it. teachers: for "guidance-first", one guidance, or several that pass
    `check_ensemble`. Raises: MdptError where they do not fit the scheme or the data.
    """
    section = experiment.policy
    bundle = begin("policy", experiment, dataset, teachers, run)
    if shares := deal(bundle.seeds, run):
        return train_shares(bundle, dataset, teachers, run, shares)
    transitions = Transitions(dataset, run.device)
    cost = Cost(bundle.accounting, transitions.device)
    policy = build_policy(bundle, run.device, new=True)
    parts: list[tuple[Bundle, Guidance | Policy]] = [(bundle, policy)]
    frozen: list[Judge] = []
    joint: Guidance | None = None
    if bundle.joint:
        joint = build_guidance(bundle.guidances[0], run.device, new=True, companion=False)
        parts.insert(0, (bundle.guidances[0], joint))
    if teachers:
        frozen = [build_judge(teachers, section.ensemble, policy.members, run.device)]
    guidance = joint or next(iter(frozen), None)

    def loss(batch: Batch, random: Randomness, done: float) -> Loss:
        guided = section.guidance_from <= done < section.guidance_until
        own = policy.loss(batch, guidance if guided else None, random)
        if joint is None:
            return own
        labelled = learns_labels(section) and done >= section.guidance_from  # before, it knows no labels
        act_alone = functools.partial(policy.act_alone, w=float(labelled))
        return add(own, joint.loss(batch, random, act_alone))

    learner = Learner([(module, target.section) for target, module in parts], loss, frozen)
    go_on(bundle, run, parts, learner)
    train(learner, transitions, section, bundle, parts, cost, run)
    return bundle


def begin(kind: Kind, experiment: Experiment, dataset: Dataset, teachers: Sequence[Bundle], run: Run) -> Bundle:
    """A new bundle, with the guidances that a policy learns under.

    Raises: MdptError where these do not fit the scheme or the data, and where `run.begun` is of another run.
    """
    bundle = new_bundle(kind, experiment, dataset, run.account())
    scheme = experiment.policy.scheme
    if kind == "policy" and bool(teachers) != (scheme == "guidance-first"):
        raise MdptError(
            f"scheme {scheme}: got {len(teachers)} teachers; guidance-first needs one or more, the others none"
        )
    for warning in dict.fromkeys(warning for each in teachers for warning in check_fit(bundle, each)):
        warnings.warn(warning, MdptWarning, stacklevel=3)
    bundle.guidances = [
        each.model_copy(update={"snapshots": {}, "training": None, "weights": each.acting}) for each in teachers
    ]
    if bundle.joint:
        bundle.guidances = [new_bundle("guidance", experiment, dataset, bundle.accounting)]
    if run.begun is not None:
        check_same_run(bundle, run.begun, run.extend)
        if run.begun.training is None:
            raise MdptError("is complete; choose another --out, or --overwrite to replace it")
    return bundle


@dataclass(frozen=True)
class Share:
    """A task for a process: some members of a run, and what training them takes. place: of this share among all."""

    place: int
    experiment: Experiment
    kind: Kind
    teachers: list[Bundle]
    begun: Bundle | None
    extend: bool
    threads: int


def deal(seeds: Sequence[int], run: Run) -> list[range]:
    """The places of the members that each process trains; [] if this one trains all."""
    count = min(run.workers, len(seeds)) if run.device == "cpu" else 1
    ends = [len(seeds) * i // count for i in range(count + 1)]
    return [range(*pair) for pair in pairwise(ends)] if count > 1 else []


SHORT_RUN = 1_000  # steps, up to which starting processes takes longer than they save
ALONE = 0.15  # of a step's time on one thread, the part that a second thread does not shorten; fits what was measured


def fastest_workers(members: int, steps: int) -> int:
    """The number of processes in which this many members train fastest for some steps, on the threads of this one.

    On two cores 2, 4, 6 and 10 members are faster in two processes, 3 members in one (see experiments/README.md).
    """
    threads = torch.get_num_threads()

    def estimate(count: int) -> float:  # of the largest share's time
        return math.ceil(members / count) * (ALONE + (1 - ALONE) / (threads // count))

    return min(range(1, min(members, threads) + 1), key=estimate) if steps > SHORT_RUN else 1


# what the shares of a run tell each other, before a number for each: of steps done, and of the last request answered
BEGUN, REQUEST, GRANTED, TARGET, SIGNAL, TOLD = range(6)
LEAD = 20  # steps that a share may be ahead of the last one, which all wait for at a signal


def train_share(share: Share, dataset: Dataset, numbers: Array, send: Callable[[object], None]) -> None:
    """Train a share in its own process. It sends its history, and bundles where all shares save.

    At a request it waits after its step, until the parent knows where all shares are and says where to save.
    """
    torch.set_num_threads(share.threads)
    warnings.simplefilter("ignore", MdptWarning)  # the parent warns
    if dataset.section.storage == "memory":
        dataset.rows.sum()  # reads the file, so that what follows is memory above the loaded dataset
    done, answered = np.split(numbers[TOLD:], 2)
    while not numbers[BEGUN]:  # all have started, so that seconds count training alone
        time.sleep(0.01)

    def asked(step: int) -> bool:
        done[share.place] = step
        while True:
            answered[share.place] = request = numbers[REQUEST]
            if numbers[GRANTED] >= request and step - done.min() <= LEAD:
                return bool(step == numbers[TARGET])
            time.sleep(0.001)

    def stopped() -> int:
        return int(numbers[SIGNAL]) if done[share.place] == numbers[TARGET] else 0

    tell = send if share.place == 0 else lambda text: None
    run = Run("cpu", share.begun, share.extend, send, send, stopped, tell, asked=asked)
    if share.kind == "guidance":
        train_guidance(share.experiment, dataset, run)
    else:
        train_policy(share.experiment, dataset, share.teachers, run)


def share_tasks(whole: Bundle, teachers: Sequence[Bundle], run: Run, shares: Sequence[Sequence[int]]) -> list[Share]:
    """The task of each process; arguments as for `train_shares`."""
    rule, threads = whole.experiment.policy.ensemble, torch.get_num_threads()
    never = {whole.kind: whole.section.model_copy(update={"save_every": math.inf})}  # they save when they are asked to
    return [
        Share(
            place=place,
            experiment=whole.experiment.model_copy(update=never | {"seeds": [whole.seeds[i] for i in members]}),
            kind=whole.kind,
            teachers=split_teachers(teachers, rule, members),
            begun=run.begun and split_members(run.begun, members),
            extend=run.extend,
            threads=max(1, threads // len(shares)),
        )
        for place, members in enumerate(shares)
    ]


def train_shares(
    whole: Bundle, dataset: Dataset, teachers: Sequence[Bundle], run: Run, shares: Sequence[Sequence[int]]
) -> Bundle:
    """Train members in processes of their own; what they save after the same step is saved as one bundle.

    whole: from `begin`. Raises: MdptError as `train` does, and where a process dies.
    """
    section, tasks = whole.section, share_tasks(whole, teachers, run, shares)
    parts: list[dict[int, Bundle]] = [{} for _ in shares]  # by step
    entries: list[list[Entry]] = [[] for _ in shares]
    merged, kept, ended, failure = whole, run.begun.step if run.begun else 0, set[int](), list[BaseException]()
    empty = HeldOut(*(getattr(dataset.held_out, each.name)[:0] for each in fields(HeldOut)))  # the parent judges
    due = granted_at = time.monotonic() + section.save_every
    with data.SideBySide(train_share, tasks, replace(dataset, held_out=empty), TOLD + 2 * len(shares)) as team:
        numbers = team.numbers
        numbers[BEGUN] = 1
        done, answered = np.split(numbers[TOLD:], 2)
        while team.open and not failure:
            for place, message in team.received(0.05):
                if isinstance(message, Bundle):
                    parts[place][message.step] = message
                elif isinstance(message, Entry):
                    entries[place].append(message)
                elif isinstance(message, str):
                    run.tell(message)
                elif message is not None and not isinstance(message, Interrupted):
                    failure.append(message)
                elif message is None and place not in ended:
                    failure.append(_died(tasks[place], kept))
                if isinstance(message, Interrupted) or (isinstance(message, Bundle) and message.complete):
                    ended.add(place)
            while all(entries):
                run.show(merge_entries([each.pop(0) for each in entries]))
            for step in sorted(set.intersection(*map(set, parts))):
                merged, kept = merge_members(whole, [each.pop(step) for each in parts]), step
                run.save(merged)
                if step >= numbers[TARGET]:
                    due = next_save(section, granted_at)
            number = run.interrupted()
            if numbers[REQUEST] == numbers[GRANTED] and (time.monotonic() >= due or (number and not numbers[SIGNAL])):
                numbers[REQUEST] += 1
            waiting = (answered == numbers[REQUEST]) | ~np.isin(range(len(shares)), [*team.open.values()])
            if numbers[GRANTED] < numbers[REQUEST] and waiting.all():
                due, granted_at = math.inf, time.monotonic()
                numbers[TARGET], numbers[SIGNAL] = done.max(), number
                numbers[GRANTED] = numbers[REQUEST]
    for error in failure:
        if isinstance(error, Broken):
            what, _, seed, value, step, _ = error.facts
            raise Broken(what, whole.seeds.index(seed), seed, value, step, kept)
        raise error
    if not merged.complete:
        raise interrupted(merged.step, section.steps, int(numbers[SIGNAL]))
    return merged


def _died(share: Share, kept: int) -> MdptError:
    seeds = ", ".join(map(str, share.experiment.seeds))
    last = f"the weights of step {kept}, the last that all have stored, are kept" if kept else "nothing is stored yet"
    return MdptError(
        f"the process that trains the seeds {seeds} ended unexpectedly: it was killed, or memory ran out; {last}; the "
        "same command goes on, --workers 1 trains in one process"
    )


def go_on(bundle: Bundle, run: Run, parts: Sequence[tuple[Bundle, Guidance | Policy]], learner: Learner) -> None:
    """Bring a new bundle, its modules and their optimizers to the state of `run.begun`, if there is one."""
    begun = run.begun
    if begun is None or begun.training is None:
        return
    bundle.step, bundle.history = begun.step, list(begun.history)
    for target, module in parts:
        source = begun if target is bundle else begun.guidances[0]
        target.snapshots = source.snapshots
        load_weights(module, source.weights)
    learner.restore(begun.training.optimizers)
    pending = [
        (loss.to(run.device), {name: value.to(run.device) for name, value in metrics.items()})
        for loss, metrics in begun.training.pending
    ]
    bundle.training = begun.training.model_copy(update={"pending": pending})
    steps, planned = bundle.section.steps, begun.section.steps
    schedule = f"; the learning rate now falls over {steps} steps, not {planned}" if steps != planned else ""
    run.tell(f"going on from step {begun.step}{schedule}")
    if (before := begun.versions.mdpt) != data.version():
        run.tell(f"was begun by mdpt {before}, goes on by {data.version()}, whose losses may differ")
    device, products = begun.accounting.device.partition(":")[0], begun.accounting.products
    if device != run.device:
        run.tell(f"was begun on {device}, goes on on {run.device}: the random numbers differ from there on")
    elif products != bundle.accounting.products:
        run.tell(f"was begun with {products} matrix products, which this machine does not have: rounding differs")


FREE = ("snapshots", "save_every")  # what a run that goes on may change


def run_facts(bundle: Bundle, joint: bool) -> dict[str, Any]:
    """What decides the result of a training run, by the name that a message gives it: fields, seeds, data."""
    tables = {bundle.kind: bundle.section} | ({"guidance": bundle.experiment.guidance} if joint else {})
    facts = {
        f"[{name}] {key}": value
        for name, section in tables.items()
        for key, value in section
        if key not in (FREE if name == bundle.kind else PACE)
    }
    section = bundle.experiment.data
    shapers = ("seed", "fraction", "held_out", "reward_scale", "normalization", "keep_timeouts", "horizon")
    return (
        facts
        | {f"[data] {key}": getattr(section, key) for key in shapers}
        | {"seeds": bundle.seeds, "environment": bundle.environment, "data (by content)": bundle.dataset.hash[:8]}
    )


def check_same_run(ours: Bundle, theirs: Bundle, extend: bool) -> None:
    """Check that an unfinished bundle, `theirs`, is of the run that is to begin, `ours`.

    extend: ours may have more steps. Raises: MdptError naming what differs.
    """
    if ours.kind != theirs.kind:
        raise MdptError(
            f"is an unfinished {theirs.kind} bundle, expected a {ours.kind} bundle; choose another --out, or "
            "--overwrite to replace it"
        )
    now, was = (run_facts(bundle, ours.joint) for bundle in (ours, theirs))
    changed = [name for name in sorted(now) if now[name] != was[name]]
    steps, policy = f"[{ours.kind}] steps", ours.experiment.policy
    windowed = ours.kind == "policy" and (policy.guidance_from, policy.guidance_until) != (0, 1)  # fractions of steps
    extensible = steps in changed and now[steps] > was[steps] and not windowed
    if extend and extensible:
        changed.remove(steps)
    problems = [f"{name} was {was[name]}, is {now[name]}" for name in changed]
    if not ours.joint and not (
        len(ours.guidances) == len(theirs.guidances) and all(map(same_weights, ours.guidances, theirs.guidances))
    ):
        problems.append("the guidance has other weights")
    if problems:
        hint = "; --extend lets it have more steps" if extensible and changed == [steps] and len(problems) == 1 else ""
        raise MdptError(f"was begun as another run: {'; '.join(problems)}{hint}; --overwrite begins anew")


OTHER_ACTIONS = 4  # that an action is compared with
QUALITY_ROWS = 8192  # judged at a time


@torch.no_grad()
def guidance_quality(guidance: Guidance, held_out: HeldOut, discount: float, step: int, horizon: int = 1) -> Quality:
    """Compare a guidance with the returns of held-out episodes.

    Rows are correlated whose return is known: the episode ended, or what a time limit cut off weighs at most 5 %; where
    there is none, all (bootstrapped). Means cover all rows, since those whose return is known may be successes alone. V at
    a time limit stands for what came after it, so that such a last row itself has no return. correlation: Pearson's, of
    V and discounted returns. advantage_correlation: of return - V and the amount by which Q of the row's action
    exceeds the mean Q of OTHER_ACTIONS actions of other rows. (Not of Q - V: an error of V is in return - V, too, and
    would correlate where actions do not matter.) V is an upper expectile, so it lies above the returns once it has left
    its initial values. q_spread: standard deviation of Q, over members, and over rows, averaged over the other.
    """
    v, q, theirs = _held_out_values(guidance, held_out, horizon)
    gains = q - theirs
    rewards, terminals, timeouts = held_out.rewards, held_out.terminals, held_out.timeouts
    shared, known = data.discounted_returns(rewards, terminals, timeouts, discount)
    _, stops = data.episode_bounds(terminals, timeouts)
    cut = np.zeros(len(rewards), dtype=np.bool_)
    cut[stops - 1] = ~terminals[stops - 1]
    columns = np.where(cut, v, rewards)  # (S, rows): a last V is a last reward
    whole = np.stack([data.discounted_returns(column, terminals, timeouts, discount)[0] for column in columns])
    counts, returns = (known, np.broadcast_to(shared, v.shape)) if known.any() else (~cut, whole)
    mean_v: list[float | None] = v[:, ~cut].mean(1).tolist() if not cut.all() else [None] * len(v)
    mean_return: list[float | None] = whole[:, ~cut].mean(1).tolist() if not cut.all() else mean_v
    v, gains, returns = v[:, counts], gains[:, counts], returns[:, counts]

    def correlate(first: Array, second: Array) -> list[float | None]:
        return [
            float(np.corrcoef(one, other)[0, 1]) if counts.sum() > 1 and one.std() > 0 and other.std() > 0 else None
            for one, other in zip(first, second, strict=True)
        ]

    return Quality(
        step=step,
        rows=int(counts.sum()),
        left_out=int((~cut & ~counts).sum()),
        bootstrapped=not known.any(),
        correlation=correlate(v, returns),
        advantage_correlation=correlate(gains, returns - v),
        mean_v=mean_v,
        mean_return=mean_return,
        q_spread_members=float(q.std(0).mean()) if len(q) > 1 else None,
        q_spread_rows=float(q.std(1).mean()),
    )


def _held_out_values(guidance: Guidance, held_out: HeldOut, horizon: int) -> tuple[Array, Array, Array]:
    """V, Q of the rows' actions, and mean Q of OTHER_ACTIONS actions of other rows: (S, rows) float64 each."""
    found, device = [], guidance.value.vector.device
    count = len(held_out.actions)
    others = (max(1, count * k // (OTHER_ACTIONS + 1)) for k in range(1, OTHER_ACTIONS + 1))  # mostly other episodes
    apart = [0, *others]
    for start in range(0, count, QUALITY_ROWS):
        rows = np.arange(start, min(start + QUALITY_ROWS, count))
        arrays = [held_out.observations[rows], *(held_out.windows((rows - k) % count, horizon)[0] for k in apart)]
        observations, *actions = (
            torch.from_numpy(array).flatten(1).to(device).expand(guidance.members, -1, -1) for array in arrays
        )
        values = [guidance.v(observations), *(guidance.q(observations, each) for each in actions)]
        found.append(torch.stack(values).cpu())
    v, q, *theirs = torch.cat(found, dim=-1).double().numpy()
    return v, q, np.mean(theirs, axis=0)
