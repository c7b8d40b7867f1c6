"""More than one machine: a Dask scheduler and two workers, as processes of this one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed  # type: ignore[import-untyped]
import pytest
from test_cli import EXECUTABLE, TOY, fail, run, write_toy_data

from mdpt import data
from mdpt.data import MdptError

pytestmark = pytest.mark.slow


ENVIRONMENT = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def dask(command: str) -> Any:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + command.split()[0], *command.split()[1:]], env=ENVIRONMENT, **quiet
    )


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[Any]]]:
    """The address of a scheduler, and its process followed by those of its workers."""
    started = [dask("dask_scheduler --host 127.0.0.1 --port 0 --no-dashboard --scheduler-file scheduler.json")]
    try:
        while not Path("scheduler.json").exists():
            time.sleep(0.1)
        address = json.loads(Path("scheduler.json").read_text())["address"]
        started += [dask(f"dask_worker {address} --nthreads 1 --no-nanny --no-dashboard") for _ in range(workers)]
        if workers:
            with distributed.Client(address, set_as_default=False) as client:
                client.wait_for_workers(workers, timeout=120)
        yield address, started
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
    with cluster(2) as (address, processes):
        command = [str(EXECUTABLE), *f"{swap} --json there.json --cluster {address} --import conftest".split()]
        playing = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        while not Path("there.json").exists() and playing.poll() is None:  # the first cell is there
            time.sleep(0.02)
        processes[1].kill()
        assert playing.wait(timeout=300) == 0
    here, there = (json.loads(Path(name).read_text()) for name in ("here.json", "there.json"))
    assert here == there and len(here["cells"]) == 4


@pytest.mark.usefixtures("folder")
def test_what_a_cluster_lacks_is_said() -> None:
    assert "no Dask scheduler" in fail("evaluate toy-dql.policy.pt --cluster tcp://127.0.0.1:9")
    assert "tls needs certificates" in fail("evaluate toy-dql.policy.pt --cluster tls://127.0.0.1:9")
    with cluster(0) as (address, _):
        assert "no workers" in fail(f"evaluate toy-dql.policy.pt --cluster {address}")


def slow(task: float, watch: Any) -> float:
    time.sleep(task)
    return task


def lacking(task: str, watch: Any) -> Any:
    return data.environment_spec(task)


def test_errors_of_workers_and_of_the_scheduler_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with cluster(1) as (address, processes):
        workers = data.Workers(cluster=address)
        with pytest.raises(
            MdptError, match="on the worker .*: absent_module:Toy-v0: the module absent_module cannot be"
        ):
            list(data.parallel(lacking, ["absent_module:Toy-v0"], workers, 1))
        results = data.parallel(slow, [0.1] * 100, workers, 100)
        assert next(results) == 0.1
        processes[0].kill()
        with pytest.raises(MdptError, match="its scheduler ended, or the connection to it"):
            list(results)


def test_workers_of_another_version_are_named() -> None:
    here = {name: importlib.metadata.version(name) for name in ("mdpt", "torch")}
    found: dict[str, Any] = {"torch": here["torch"].partition("+")[0] + "+other"}
    client = SimpleNamespace(run=lambda _, name, **__: {"tcp://a": here[name], "tcp://b": found.get(name, here[name])})
    data._check_versions(client, "--cluster tcp://c")
    for name, there, told in (
        ("torch", "1.0", "tcp://b has torch 1.0, expected"),
        ("mdpt", importlib.metadata.PackageNotFoundError("mdpt"), "tcp://b has mdpt none, expected"),
    ):
        found[name] = there
        with pytest.raises(MdptError, match=f"--cluster tcp://c: the worker {told}"):
            data._check_versions(client, "--cluster tcp://c")
        del found[name]
