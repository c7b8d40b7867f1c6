"""Small environments whose returns are known by hand; gymnasium imports this module for ids "toy_environment:...".

Toy-v0: an episode starts at observation [d, 0], where d in 3..8 is drawn by reset's seed, and ends after d steps
(a terminal, worth 100) or after 6 (the time limit). Every step pays the second action, which lies in [0, 4], and a
bonus that is 0 unless it is asked for. ToyParted-v0 shows the same two numbers apart, the second one first.
Signs-v0 pays 1 for every four actions in a row, from the first step on, that have one sign; it shows only the phase.
The first action of Toy, in [-1, 1], breaks the environment: above 0.9 with an exception, above 0.8 by hanging, above 0.7 by
interrupting and above 0.6 by exiting Python, below -0.9 by ending its process.
"""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Toy(gymnasium.Env[Any, Any]):
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, action_space: Any = None, bonus: float = 0.0) -> None:
        low, high = np.array([-1, 0], dtype=np.float32), np.array([1, 4], dtype=np.float32)
        self.action_space = action_space or Box(low, high)
        self.bonus = bonus
        self.state = np.zeros(2, dtype=np.float32)
        self.ended = True

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = np.array([self.np_random.integers(3, 9), 0], dtype=np.float32)
        self.ended = False
        return self.state.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.ended or self.state[1] == 6:
            raise RuntimeError("stepped after its end")
        if action[0] > 0.9:
            raise ValueError("broken by\nan action")
        if action[0] > 0.8:
            time.sleep(3600)
        if action[0] > 0.7:
            raise KeyboardInterrupt
        if action[0] > 0.6:
            raise SystemExit(3)
        if action[0] < -0.9:
            os._exit(7)
        self.state[1] += 1
        self.ended = bool(self.state[1] == self.state[0])
        reward = float(action[1]) + self.bonus + 100 * self.ended
        return self.state.copy(), reward, self.ended, False, {}


class Flawed(Toy):
    def __init__(self) -> None:
        raise OSError("no licence")


class Optional(Toy):
    def __init__(self, continuous: bool = False) -> None:
        super().__init__(None if continuous else Discrete(2))


class Parted(Toy):
    observation_space = Dict({"drawn": Box(3, 8, (1, 1)), "count": Box(0, 6, (1,))})
    shown: ClassVar[list[dict[str, Any]]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.show(super().reset(seed=seed)[0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        state, *rest = super().step(action)
        return self.show(state), *rest

    def show(self, state: Any) -> dict[str, Any]:
        self.shown.append({"drawn": state[:1, None], "count": state[1:]})
        return self.shown[-1]


class Signs(gymnasium.Env[Any, Any]):
    observation_space = Box(0, 1, (4,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.signs: list[float] = []
        return self.phase(), {}

    def phase(self) -> Any:
        return np.eye(4, dtype=np.float32)[len(self.signs) % 4]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.signs.append(np.sign(float(action[0])))
        won = len(self.signs) % 4 == 0 and len(set(self.signs[-4:])) == 1
        return self.phase(), float(won), len(self.signs) == 8, False, {}


gymnasium.register("Signs-v0", entry_point=f"{__name__}:Signs", max_episode_steps=8)

for name, toy, limit, settings in (
    ("Toy", "Toy", 6, {}),
    ("ToyParted", "Parted", 6, {}),
    ("ToyOptional", "Optional", 6, {}),
    ("ToyEndless", "Toy", None, {}),
    ("ToyFlawed", "Flawed", 6, {}),
    ("ToyDiscrete", "Toy", 6, {"action_space": Discrete(2)}),
    ("ToyImage", "Toy", 6, {"action_space": Box(0, 1, (2, 2))}),
    ("ToyWhole", "Toy", 6, {"action_space": Box(0, 9, (1,), np.int64)}),
    ("ToyPinned", "Toy", 6, {"action_space": Box(np.zeros(2, np.float32), np.array([1, 0], np.float32))}),
    ("ToyVast", "Toy", 6, {"action_space": Box(-3e38, 3e38, (1,))}),
):
    gymnasium.register(f"{name}-v0", entry_point=f"{__name__}:{toy}", max_episode_steps=limit, kwargs=settings)
