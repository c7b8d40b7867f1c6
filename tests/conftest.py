"""What tests share: a toy environment that no action breaks, and threads that do not wait for each other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from toy_environment import Toy


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses"):  # tests in several processes, whose threads would wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.fsync = lambda _: None  # tests do not outlive a power cut
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which `nohup` ignores, and commands would then, too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Gentle(Toy):
    """The toy for policies that know nothing: of the first action, which can break it, only half arrives.

    It shows itself as a plane whose brightness is the step.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.full((48, 320, 3), int(self.state[1]), dtype=np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return super().step(action * np.array([0.5, 1.0]))


gymnasium.register("Gentle-v0", entry_point=f"{__name__}:Gentle", max_episode_steps=6)
