"""What the tests of the command line share: a toy environment that no action breaks."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from toy_environment import Toy


class Gentle(Toy):
    """The toy for policies that know nothing: of the first action, which can break it, only half arrives."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return super().step(action * np.array([0.5, 1.0]))


gymnasium.register("Gentle-v0", entry_point=f"{__name__}:Gentle", max_episode_steps=6)
