"""Tests of members that train in several processes: one bundle, equal to the bit to what one process writes."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models import KINDS, but, guidance_bundle, make_experiment, make_guidance, same
from toy_data import noisy_columns, toy_dataset

from mdpt import data, models
from mdpt.data import Dataset, MdptError
from mdpt.models import Bundle, Run, merge_members, split_members, split_teachers

pytestmark = pytest.mark.usefixtures("one_thread", "products")
SEEDS = (3, 4, 5, 6, 7)


@pytest.fixture(scope="module")
def products() -> Iterator[None]:
    yield
    models.choose_products("default")


def settings(kind: str, **more: Any) -> dict[str, Any]:
    """Tables of a short run of "guidance NAME", "policy NAME", or "joint NAME": a policy together with that guidance."""
    name, algorithm = kind.split()
    table = {"steps": 4, "batch_size": 16, "snapshots": 2} | more
    if name == "joint":
        return {"guidance": {"algorithm": algorithm, "conservatism": 1.0}, "policy": table | {"scheme": "joint"}}
    return {name: table | {"algorithm": algorithm} | ({"conservatism": 1.0} if name == "guidance" else {})}


def learn(
    kind: str, members: range, run: Run, *, rule: str = "none", dataset: Dataset | None = None, **more: Any
) -> Bundle:
    """Train these members out of `SEEDS`, under their own guidances or an ensemble."""
    tables, dataset = settings(kind, **more), dataset or toy_dataset(noisy_columns())
    if "guidance" in tables and not kind.startswith("joint"):
        return models.train_guidance(make_experiment(SEEDS[slice(members.start, members.stop)], **tables), dataset, run)
    tables["policy"] |= {"ensemble": rule}
    experiment = make_experiment(SEEDS[slice(members.start, members.stop)], **tables)
    teachers = [] if kind.startswith("joint") else [guidance_bundle(make_guidance(SEEDS, 3, 2), SEEDS)]
    return models.train_policy(experiment, dataset, split_teachers(teachers, rule, members), run)


def saved(kind: str, members: range, run: Run | None = None, **more: Any) -> list[Bundle]:
    """All bundles that such a run saves."""
    kept: list[Bundle] = []
    run = replace(run or Run(), save=lambda bundle: kept.append(copy.deepcopy(bundle)))
    try:
        learn(kind, members, run, **more)
    except data.Interrupted:
        pass
    return kept


def check_equal(ours: Bundle, theirs: Bundle) -> None:
    """Equal to the bit, but for what training cost, and for the guidances' weights that only learn."""
    first, second = (each.model_dump(exclude={"accounting": True, "guidances": True}) for each in (ours, theirs))
    for key in first:
        assert same(first[key], second[key]), key
    for one, other in zip(ours.guidances, theirs.guidances, strict=True):
        assert same(one.acting, other.acting) and same(one.snapshots, other.snapshots) and one.step == other.step
    assert models.Bundle.model_validate(ours.model_dump()).step == ours.step


def cut(*ends: int) -> list[range]:
    return [range(*pair) for pair in pairwise((0, *ends))]


@pytest.mark.parametrize("kind", [*KINDS, "joint idql", "joint dql", "policy dql of an ensemble"])
def test_parts_together_are_what_one_process_writes(kind: str) -> None:
    kind, rule = kind.removesuffix(" of an ensemble"), "mean" if kind.endswith("ensemble") else "none"
    for ends in ((1, 2), (2, 3), (4, 5)):
        whole = saved(kind, range(ends[-1]), rule=rule)
        parts = [saved(kind, members, rule=rule) for members in cut(*ends)]
        assert [bundle.step for bundle in whole] == [2, 4]
        for expected, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            blank = but(expected, weights={}, snapshots={}, history=[], training=None, step=0)
            blank.quality = expected.quality  # judged over all members, where the parts are put together
            merged = merge_members(blank, pieces)
            check_equal(merged, expected)
            assert merged.accounting.optimizer_bytes == sum(part.accounting.optimizer_bytes for part in pieces)
            assert merged.accounting.seconds == max(part.accounting.seconds for part in pieces)
            for name, tensor in merged.acting.items():  # a file holds them once
                assert merged.snapshots[merged.step][name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("kind", ["guidance dql", "policy cfg", "joint idql"])
def test_parts_of_an_unfinished_bundle_go_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HISTORY_ENTRIES", 2)  # so that steps are pending
    countdown = iter(range(1, 99))
    half = saved(kind, range(3), Run(interrupted=lambda: next(countdown) == 5), steps=6)[-1]
    assert half.step == 5 and half.training is not None and len(half.training.pending) == 2
    pieces = [split_members(half, members) for members in cut(2, 3)]
    check_equal(merge_members(half, pieces), half)
    *_, whole = saved(kind, range(3), steps=6)
    ends = [
        saved(kind, members, Run(begun=piece), steps=6)[-1] for members, piece in zip(cut(2, 3), pieces, strict=True)
    ]
    check_equal(merge_members(but(whole, history=[]), ends), whole)


def teams(monkeypatch: pytest.MonkeyPatch) -> list[data.SideBySide]:
    """Where started processes will be found."""
    found: list[data.SideBySide] = []
    start = data.SideBySide.__enter__
    monkeypatch.setattr(data.SideBySide, "__enter__", lambda team: found.append(team) or start(team))
    return found


def test_processes_stop_together_as_one_does_and_data_on_disk_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    dataset = toy_dataset(noisy_columns())
    rows = data._allocate("disk", *dataset.rows.shape)
    rows[:] = dataset.rows
    section = dataset.section.model_copy(update={"storage": "disk"})
    more: dict[str, Any] = {"steps": 2_000, "snapshots": 1, "dataset": replace(dataset, rows=rows, section=section)}
    shown, kept = [], []
    run = Run(workers=2, interrupted=lambda: signal.SIGTERM * bool(shown))
    run.show, run.save = (lambda entry: shown.append(entry.step)), (lambda bundle: kept.append(copy.deepcopy(bundle)))
    with pytest.raises(data.Interrupted, match="of 2000; the same command goes on$") as stop:
        learn("guidance idql", range(3), run, **more)
    (half,) = kept
    assert str(stop.value).startswith(f"interrupted after step {half.step} of")
    assert stop.value.code == 128 + signal.SIGTERM and half.seeds == [3, 4, 5] and not half.complete
    assert not list(tmp_path.iterdir())
    countdown = iter(range(1, 2_000))
    *_, alone = saved("guidance idql", range(3), Run(interrupted=lambda: next(countdown) == half.step), **more)
    check_equal(half, alone)


def test_a_killed_process_names_its_seeds_and_leaves_what_all_have_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path))
    kept, found = [], teams(monkeypatch)

    def save(bundle: Bundle) -> None:
        kept.append(copy.deepcopy(bundle))
        os.kill(found[0].processes[1].pid, signal.SIGKILL)

    with pytest.raises(MdptError, match="^the process that trains the seeds 4, 5 ended unexpectedly") as died:
        learn("guidance idql", range(3), Run(workers=2, save=save), steps=100_000, snapshots=10_000)
    assert f"the weights of step {kept[-1].step}, the last that all have stored, are kept" in str(died.value)
    assert all(len(tensor) == 3 * (1 + ("_q." in name)) for name, tensor in kept[-1].weights.items())
    assert not any(process.is_alive() for process in found[0].processes)
    assert not list(tmp_path.iterdir())


class Told(data.SideBySide):
    """No processes: the second sends an error."""

    def __enter__(self) -> data.SideBySide:
        self.numbers, self.open = np.zeros(self.count, np.int64), {1: 0, 2: 1}
        return self

    def received(self, seconds: float) -> Iterator[tuple[int, Any]]:
        error = models.Broken("loss", 0, 4, float("nan"), 7, 6)  # as the share counts members and saved steps
        yield 1, pickle.loads(pickle.dumps(error))


def test_a_member_that_breaks_is_named_by_its_place_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SideBySide", Told)
    with pytest.raises(
        MdptError, match=r"^the loss of member 1 \(seed 4\) became nan at step 7; no snapshot was reached"
    ):
        learn("guidance idql", range(2), Run(workers=2))


def test_members_are_dealt_evenly_and_one_process_trains_on_a_gpu() -> None:
    assert models.deal(range(7), Run(workers=3)) == [range(2), range(2, 4), range(4, 7)]
    assert models.deal(range(3), Run(workers=8)) == [range(1), range(1, 2), range(2, 3)]
    assert models.deal(range(7), Run(workers=1)) == models.deal(range(7), Run("cuda", workers=3)) == []


@pytest.mark.parametrize(
    "threads,members,steps,workers",
    [(2, 2, 10_000, 2), (2, 3, 10_000, 1), (2, 4, 10_000, 2), (2, 10, 10_000, 2), (2, 2, 100, 1), (1, 5, 10_000, 1)],
)
def test_the_fastest_split_is_even_and_worth_its_start(
    threads: int, members: int, steps: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert models.fastest_workers(members, steps) == workers
