"""More than one machine: a Dask scheduler and two workers, as processes of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import distributed  # type: ignore[import-untyped]
import pytest
from test_cli import EXECUTABLE, TOY, fail, run, write_toy_data

pytestmark = pytest.mark.slow


def dask(command: str) -> Any:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + command.split()[0], *command.split()[1:]], env=environment, **quiet
    )


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[Any]]]:
    """The address of a scheduler, and its workers."""
    started = [dask("dask_scheduler --host 127.0.0.1 --port 0 --no-dashboard --scheduler-file scheduler.json")]
    try:
        while not Path("scheduler.json").exists():
            time.sleep(0.1)
        address = json.loads(Path("scheduler.json").read_text())["address"]
        started += [dask(f"dask_worker {address} --nthreads 1 --no-nanny --no-dashboard") for _ in range(workers)]
        if workers:
            with distributed.Client(address, set_as_default=False) as client:
                client.wait_for_workers(workers, timeout=120)
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(TOY)
    write_toy_data(tmp_path / "toy.hdf5")
    run("guidance toy.toml")
    run("policy toy.toml --guidance toy-idql.guidance.pt")


@pytest.mark.usefixtures("folder")
def test_a_swap_on_a_cluster_is_the_swap_here_though_a_worker_is_lost() -> None:
    swap = "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --episodes 200"
    run(f"{swap} --json here.json --workers 1")
    with cluster(2) as (address, workers):
        command = [str(EXECUTABLE), *f"{swap} --json there.json --cluster {address} --import conftest".split()]
        playing = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        )
        while not Path("there.json").exists() and playing.poll() is None:  # the first cell is there
            time.sleep(0.02)
        workers[0].kill()
        assert playing.wait(timeout=300) == 0
    here, there = (json.loads(Path(name).read_text()) for name in ("here.json", "there.json"))
    assert here == there and len(here["cells"]) == 4


@pytest.mark.usefixtures("folder")
def test_what_a_cluster_lacks_is_said() -> None:
    assert "no Dask scheduler" in fail("evaluate toy-dql.policy.pt --cluster tcp://127.0.0.1:9")
    with cluster(0) as (address, _):
        assert "no workers" in fail(f"evaluate toy-dql.policy.pt --cluster {address}")
