"""Tests of members that train in several processes: one bundle, equal to the bit to what one process writes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import KINDS, frozen_guidance, guidance_bundle, make_experiment, same
from toy_data import noisy_columns, toy_dataset

from mdpt import data, models
from mdpt.models import Bundle, Run

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = (3, 4, 5, 6, 7)


def learn(kind: str, seeds: tuple[int, ...], run: Run, **settings: Any) -> Bundle:
    """`mdpt guidance` or `mdpt policy` on a tiny dataset; "joint NAME": a policy together with that guidance."""
    name, algorithm = kind.split()
    settings = {"steps": 12, "batch_size": 32, "snapshots": 3} | settings
    tables: dict[str, Any] = {name: settings | {"algorithm": algorithm}}
    if name == "joint":
        tables = {"guidance": {"algorithm": algorithm}, "policy": settings | {"scheme": "joint"}}
    experiment, dataset = make_experiment(seeds, **tables), toy_dataset(noisy_columns())
    if name == "guidance":
        return models.train_guidance(experiment, dataset, run)
    teachers = [guidance_bundle(frozen_guidance(seeds), seeds)] if name == "policy" else []
    return models.train_policy(experiment, dataset, teachers, run)


def check_equal(ours: Bundle, theirs: Bundle) -> None:
    """But for what training cost."""
    first, second = (bundle.model_dump(exclude={"accounting": True, "guidances": {"__all__": {"accounting"}}}) for bundle in (ours, theirs))
    for key in first:
        assert same(first[key], second[key]), key


@pytest.mark.parametrize("workers,count", [(2, 2), (2, 3), (2, 5), (3, 5)])
def test_it(workers: int, count: int) -> None:
    kept: dict[int, list[Bundle]] = {1: [], workers: []}
    for each in kept:
        learn("guidance idql", SEEDS[:count], Run(workers=each, save=lambda bundle, each=each: kept[each].append(copy.deepcopy(bundle))))
    one, many = kept.values()
    assert [bundle.step for bundle in one] == [bundle.step for bundle in many] == [4, 8, 12]
    for ours, theirs in zip(many, one, strict=True):
        check_equal(ours, theirs)
