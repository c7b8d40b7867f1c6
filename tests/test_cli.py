"""Tests of the command line, on a toy environment and tiny bundles: commands, mistakes, resuming, the README."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import matplotlib
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from scipy import stats
from typer.testing import CliRunner, Result

import data
import mdpt
import models
from mdpt import Experiment, Monitor, Section, app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = 290  # of the toy dataset
EXECUTABLE = Path(sys.executable).with_name("mdpt")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

TOY = """
name = "toy"
seeds = [0, 1]
device = "cpu"

[data]
source = "hdf5"
path = "toy.hdf5"
environment = "conftest:Gentle-v0"
reference = [10, 110]
held_out = 0.1

[guidance]
steps = 20
batch_size = 16
learning_rate = 0.03
hidden = [16, 16]
snapshots = 2

[policy]
steps = 20
batch_size = 16
learning_rate = 0.03
hidden = [16, 16]
snapshots = 2

[evaluation]
episodes = 3
candidates = 4
"""


def write_toy_data(path: Path, episodes: int = 60, seed: int = 0, **changed: Any) -> None:
    """What a random player of the toy would record, in D4RL's format."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(episodes):
        length = int(random.integers(3, 9))
        for step in range(min(length, 6)):
            action = random.uniform([-1, 0], [1, 4])
            end = step + 1 == length
            rows.append(([length, step], [length, step + 1], action, action[1] + 100 * end, end, step == 5 and not end))
    keys = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")
    types = ("f4", "f4", "f4", "f4", "?", "?")
    arrays = {key: np.array(column, t) for key, t, column in zip(keys, types, zip(*rows, strict=True), strict=True)}
    with h5py.File(path, "w") as file:
        for key, array in (arrays | changed).items():
            if array is not None:
                file[key] = array


def run(command: str, code: int = 0) -> Result:
    """Run `mdpt COMMAND` in this process; whatever happens, no exception reaches the user."""
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result


def fail(command: str) -> str:
    """What a command that fails says to stderr, without "mdpt: " and line end."""
    result = run(command, code=1)
    assert result.stdout == "" and result.stderr.startswith("mdpt: ") and result.stderr.endswith("\n")
    return result.stderr.removeprefix("mdpt: ").removesuffix("\n")


def scores(command: str) -> dict[str, Any]:
    """The report that `mdpt evaluate COMMAND` writes as JSON."""
    run(f"evaluate {command} --workers 1 --json report.json --overwrite")
    report: dict[str, Any] = json.loads(Path("report.json").read_text())
    return report


def returns(report: dict[str, Any]) -> list[list[float]]:
    return [member["returns"] for member in report["members"]]


def equal(first: Any, second: Any) -> bool:
    """Whether two nests of containers and tensors are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return bool(first == second)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


POLICIES = {  # file: how `mdpt policy toy.toml` makes it
    "toy-bc-unguided.policy.pt": "--set policy.algorithm=bc --set policy.scheme=unguided",
    "toy-idql.policy.pt": "--set policy.algorithm=idql --guidance toy-idql.guidance.pt",
    "toy-dql.policy.pt": "--guidance toy-idql.guidance.pt",
    "toy-edp.policy.pt": "--set policy.algorithm=edp --guidance toy-dql.guidance.pt",
    "toy-cfg.policy.pt": "--set policy.algorithm=cfg --guidance toy-idql.guidance.pt",
    "toy-dql-joint.policy.pt": "--set policy.scheme=joint --set guidance.algorithm=dql",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every kind of bundle has been trained through the command line, under its default name."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_toy_data(folder / "toy.hdf5")
        (folder / "toy.toml").write_text(TOY)
        run("guidance toy.toml")
        run("guidance toy.toml --set guidance.algorithm=dql --seeds 8,9")
        for file, options in POLICIES.items():
            result = run(f"policy toy.toml {options}")
            assert result.stdout == f"wrote {file}\nnext: mdpt evaluate {file}\n"
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of what has been trained."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


# -------------------------------------------------------------------------------------------------- commands


def test_help_is_quick() -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([EXECUTABLE, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5


def test_version_is_that_of_pyproject() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version").stdout == f"mdpt {version}\n"
    assert set(COMMANDS) == {"guidance", "policy", "evaluate", "swap"}
    assert all(re.search(rf"^ +{command} ", run("").stdout, re.MULTILINE) for command in COMMANDS)


def test_guidance_tells_its_quality_and_what_comes_next(folder: Path) -> None:
    result = run("guidance toy.toml --out g.pt")
    assert result.stdout.endswith("wrote g.pt\nnext: mdpt policy toy.toml --guidance g.pt\n")
    varied = run("guidance toy.toml --out h.pt --seeds 8 --set policy.hidden=[8]")
    assert varied.stdout.endswith("next: mdpt policy toy.toml --guidance h.pt --set 'policy.hidden=[8]' --seeds 8\n")
    quality = models.read_bundle(Path("g.pt"))["quality"]
    for row, seed in enumerate((0, 1)):
        assert re.search(rf"│ {seed} +│ +{quality['correlation'][row]:.3f} │", result.stdout)
    assert quality["rows"] > 0 and f"{quality['rows']} held-out transitions" in result.stdout


def test_progress_is_plain_lines_where_there_is_no_terminal(folder: Path) -> None:
    lines = run("guidance toy.toml --out g.pt").stderr.splitlines()
    assert len(lines) == 10
    assert all(
        re.fullmatch(rf"guidance idql: {2 * i + 2}/20  loss [\d.e+-]+, \d+ steps/s  \d+ s left", line)
        for i, line in enumerate(lines)
    )


@pytest.mark.parametrize("file", POLICIES)
def test_every_policy_is_evaluated(folder: Path, file: str) -> None:
    """The report's figures follow from its episodes, recomputed here from the definitions."""
    report = scores(file)
    assert [member["seed"] for member in report["members"]] == [0, 1]
    each = np.array(returns(report))
    assert each.shape == (2, 3) and [len(member["lengths"]) for member in report["members"]] == [3, 3]
    low, high = sorted(float(value) - 10 for value in each.mean(1))  # [10, 110] is [0, 100]
    for member, row in zip(report["members"], each, strict=True):
        assert member["return"] == pytest.approx(row.mean()) and member["score"] == pytest.approx(row.mean() - 10)
        assert member["length"] == pytest.approx(np.mean(member["lengths"])) and max(member["lengths"]) <= 6
    middle, spread = (low + high) / 2, high - low
    expected = {"median": middle, "iqr": spread / 2, "iqm": middle, "mean": middle, "std": spread / np.sqrt(2)}
    for name, value in expected.items():
        assert report["summary"][name] == pytest.approx(value), name
    assert report["summary"]["iqm_interval"] == pytest.approx([low, high])
    unguided = "unguided" in file
    assert report["protocol"]["candidates"] == (1 if unguided else 4)
    assert (report["protocol"]["guidance"] is None) == unguided


def test_interquartile_mean_of_five_members(folder: Path) -> None:
    run("policy toy.toml --seeds 3,1,4,5,9 --set policy.algorithm=bc --set policy.scheme=unguided --out five.pt")
    report = scores("five.pt --episodes 1")
    assert [member["seed"] for member in report["members"]] == [3, 1, 4, 5, 9]
    ordered = sorted(value - 10 for (value,) in returns(report))
    summary = report["summary"]
    assert summary["median"] == pytest.approx(ordered[2])
    assert summary["iqr"] == pytest.approx(ordered[3] - ordered[1])
    assert summary["iqm"] == pytest.approx(sum(ordered[1:4]) / 3)  # a quarter of five, rounded down, cut at each end
    assert summary["iqm_interval"][0] <= summary["iqm"] <= summary["iqm_interval"][1]


def test_the_table_holds_the_figures_of_the_report(folder: Path) -> None:
    result = run("evaluate toy-dql.policy.pt --workers 1 --json report.json")
    report = json.loads(Path("report.json").read_text())
    for member in report["members"]:
        figures = rf"{member['return']:.1f} │ +{member['score']:.1f} │ +{member['length']:.0f}"
        assert re.search(rf"│ {member['seed']} +│ +{figures} │", result.stdout)
    for name, key in (("median", "median"), ("IQR", "iqr"), ("IQM", "iqm"), ("mean", "mean"), ("std", "std")):
        assert re.search(rf"│ {name} +│ +│ +{report['summary'][key]:.1f} │", result.stdout), name
    with h5py.File("toy.hdf5") as file:
        ends = np.flatnonzero(file["terminals"][()] | file["timeouts"][()]) + 1
        episodes = np.add.reduceat(file["rewards"][()].astype(float), np.concatenate([[0], ends[:-1]]))
    for name, value in (("mean", episodes.mean()), ("best", episodes.max())):
        assert re.search(rf"│ data {name} +│ +{value:.1f} │ +{value - 10:.1f} │", result.stdout), name
    line = "conftest:Gentle-v0, 2 members x 3 episodes, seed 0, max of 4 by its own idql guidance, temperature 1"
    line += ", last weights"
    assert any(shown.startswith(line) for shown in result.stdout.splitlines())
    assert result.stdout.endswith("wrote report.json\n") and "…" not in result.stdout


def test_scores_depend_on_the_seed_alone(folder: Path) -> None:
    first = scores("toy-dql.policy.pt")
    again, more_workers = scores("toy-dql.policy.pt"), scores("toy-dql.policy.pt --workers 3")
    assert again == first == more_workers
    other = scores("toy-dql.policy.pt --seed 7")
    assert other["protocol"]["seed"] == 7 and returns(other) != returns(first)
    assert [m["lengths"] for m in other["members"]] != [m["lengths"] for m in first["members"]]  # other starts, too


def test_each_step_has_its_own_noise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    act = models.act

    def watch(policy: Any, guidance: Any, observations: Any, random: models.Randomness, how: Any) -> torch.Tensor:
        steps.append(random.step)
        return act(policy, guidance, observations, random, how)

    monkeypatch.setattr(models, "act", watch)
    report = scores("toy-dql.policy.pt")
    assert steps == list(range(max(length for member in report["members"] for length in member["lengths"])))


def test_evaluation_leaves_the_bundle_as_it_was(folder: Path) -> None:
    before = Path("toy-cfg.policy.pt").read_bytes()
    scores("toy-cfg.policy.pt --w 2 --guide both")
    assert Path("toy-cfg.policy.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "protocol"),
    [
        (
            "--episodes 2 --selection softmax --weight-temperature 3 --temperature 0.5 --candidates 6",
            {"episodes": 2, "selection": "softmax", "weight_temperature": 3.0, "temperature": 0.5, "candidates": 6},
        ),
        ("--selection softmax --weight-temperature 0", {"selection": "softmax", "weight_temperature": 0.0}),
        ("--guide gradient --guidance-weight 2", {"guide": "gradient", "guidance_weight": 2.0, "candidates": 1}),
        ("--guide both --guidance-weight 2 --w 3", {"guide": "both", "guidance_weight": 2.0, "candidates": 4, "w": 3}),
        ("--infer-guidance none --temperature 0", {"guidance": None, "candidates": 1, "temperature": 0.0}),
        ("--infer-guidance toy-dql.guidance.pt", {"guidance": "toy-dql.guidance.pt", "candidates": 4}),
        ("--infer-guidance toy-dql-joint.policy.pt@10", {"guidance": "toy-dql-joint.policy.pt@10"}),
    ],
)
def test_options_of_evaluate_act(folder: Path, options: str, protocol: dict[str, Any]) -> None:
    report, plain = scores(f"toy-cfg.policy.pt {options}"), scores("toy-cfg.policy.pt")
    assert report["protocol"] == plain["protocol"] | {"guidance_weight": 0.0} | protocol
    episodes = report["protocol"]["episodes"]
    assert [row[:episodes] for row in returns(plain)] != returns(report)


def test_snapshots_have_names(folder: Path) -> None:
    last, middle = scores("toy-dql.policy.pt@last"), scores("toy-dql.policy.pt@10")
    assert (middle["step"], last["step"]) == (10, 20)
    assert returns(last) == returns(scores("toy-dql.policy.pt")) != returns(middle)
    assert "temperature 1, weights of step 10 of 20 (online" in run("evaluate toy-dql.policy.pt@10").stdout
    assert returns(last) == returns(scores("toy-dql.policy.pt@20"))
    joint, middle = (models.read_policy(Path(f"toy-dql-joint.policy.pt{at}")) for at in ("", "@10"))
    for whole, part in ((joint, middle), (joint["guidance"], middle["guidance"])):  # its guidance of that step, too
        kept = whole["snapshots"][10]
        assert part["step"] == 10 and equal({name: part["weights"][name] for name in kept}, kept)
        assert not equal(part["weights"], whole["weights"])
        assert {name.split(".")[0] for name in kept} <= {"average", "target_q", "value"}  # those that act


def test_curve(folder: Path) -> None:
    result = run("evaluate toy-dql.policy.pt --workers 1 --curve --plot curve.png --json curve.json")
    report = json.loads(Path("curve.json").read_text())
    assert [point["step"] for point in report["curve"]] == [10, 20]
    assert returns(report["curve"][1]) == returns(scores("toy-dql.policy.pt"))
    best = max(report["curve"], key=lambda point: float(point["summary"]["iqm"]))
    assert report["best_step"] == best["step"]
    for point in report["curve"]:
        assert re.search(rf"│ {point['step']} +│ +{point['summary']['median']:.1f} │", result.stdout)
    (line,) = [line for line in result.stdout.splitlines() if "best (online selection)" in line]
    assert line.startswith(f"│ {best['step']} ")
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote curve.png" in result.stdout and "wrote curve.json" in result.stdout and "…" not in result.stdout


def test_describe_tells_lineage_and_history_without_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.rollout", None)
    out = run("evaluate toy-edp.policy.pt --describe").stdout
    for text in (
        "toy-edp.policy.pt: policy",
        "edp, guidance-first",
        "dql guidance, step 20, seeds 8, 9",
        "toy-edp.policy.pt: guidance",
        "20 of 20",
        "eta=1.0",
        "expectile=0.7",
        "@10, @20",
        "conftest:Gentle-v0",
        models.read_bundle(Path("toy.hdf5").with_name("toy-edp.policy.pt"))["dataset"]["hash"][:16],
        "noise_loss",
        "q_loss",
    ):
        assert text in out, text
    assert "idql" in run("evaluate toy-idql.guidance.pt --describe").stdout
    joint = run("evaluate toy-dql-joint.policy.pt --describe").stdout
    assert joint.count("20 of 20") == 2 and "dql guidance, step 20" in joint  # its guidance took the policy's steps
    assert fail("evaluate toy-dql.policy.pt --describe --json a.json") == (
        "--describe runs nothing and writes no scores; it goes with --plot alone"
    )


def test_describe_shows_metrics_that_ended_early(folder: Path) -> None:
    run("policy toy.toml --guidance toy-idql.guidance.pt --set policy.guidance_until=0.5 --out half.pt")
    assert "policy_q" in run("evaluate half.pt --describe").stdout


def test_labels_that_were_not_trained_do_not_act(folder: Path) -> None:
    run("policy toy.toml --set policy.scheme=unguided --set policy.algorithm=cfg --out unlabelled.pt")
    report = scores("unlabelled.pt")
    assert report["protocol"]["w"] == 0
    bundle = models.read_bundle(Path("unlabelled.pt"))
    bundle["weights"]["average.label.weight"][:, 1:] = 1e3
    models.save_bundle(Path("tampered.pt"), bundle)
    assert returns(scores("tampered.pt")) == returns(report)
    assert fail("evaluate unlabelled.pt --w 2") == (
        "--w 2.0: acts only with a cfg policy that learned from labels, not unguided cfg; leave the option out"
    )


def test_swap_of_an_unguided_policy_may_draw_candidates(folder: Path) -> None:
    report = swapped("toy-bc-unguided.policy.pt --guidance toy-idql.guidance.pt --candidates 3")
    assert [cell["protocol"]["candidates"] for cell in report["cells"]] == [1, 3]


def swapped(command: str) -> dict[str, Any]:
    """The report that `mdpt swap COMMAND` writes as JSON."""
    run(f"swap {command} --workers 1 --json swap.json")
    report: dict[str, Any] = json.loads(Path("swap.json").read_text())
    return report


def pair_scores(cell: dict[str, Any]) -> list[float]:
    return [pair["score"] for pair in cell["pairs"]]


def test_swap_crosses_all_members(folder: Path) -> None:
    run("guidance toy.toml --seeds 1,2,3 --out three.pt")
    command = "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --guidance three.pt --workers 1 --json swap.json"
    result = run(command)
    report = json.loads(Path("swap.json").read_text())
    own, none, same, three = report["cells"]
    assert [cell["guidance"] for cell in report["cells"]] == ["its own", "none", "toy-idql.guidance.pt", "three.pt"]
    assert [len(cell["pairs"]) for cell in report["cells"]] == [2, 2, 4, 6]
    assert "4 cells, each member with each: 42 rollouts, about " in result.stdout
    seeds = [(pair["policy_seed"], pair["guidance_seed"]) for pair in three["pairs"]]
    assert seeds == [(i, j) for i in (0, 1) for j in (1, 2, 3)]
    for pair in three["pairs"]:
        assert pair["score"] == pytest.approx(np.mean(pair["returns"]) - 10) and len(pair["lengths"]) == 3
    for evaluated, cell in (("", own), (" --infer-guidance none", none)):  # the rollouts of `evaluate`
        assert returns(scores(f"toy-dql.policy.pt{evaluated}")) == [pair["returns"] for pair in cell["pairs"]]
    assert pair_scores(own) == pytest.approx([pair_scores(same)[0], pair_scores(same)[3]], abs=1e-6)
    groups = [(entry["guidance"], entry["seeds"], entry["pairs"]) for entry in report["summary"]]
    assert groups == [
        ("its own", "same seed", 2),
        ("none", "all", 2),
        *[("toy-idql.guidance.pt", name, count) for name, count in (("same seed", 2), ("other seeds", 2), ("all", 4))],
        *[("three.pt", name, count) for name, count in (("same seed", 1), ("other seeds", 5), ("all", 6))],
    ]
    for entry in report["summary"]:
        (row,) = [
            line
            for line in result.stdout.splitlines()
            if re.search(rf"{entry['guidance']} │ +{entry['seeds']} │ +{entry['pairs']} │", line)
        ]
        assert all(f" {entry['summary'][key]:.1f} " in row for key in ("median", "iqr", "iqm", "mean")), row
    assert "…" not in result.stdout


def test_swap_compares_with_the_guidance_of_training(folder: Path) -> None:
    report = swapped("toy-dql.policy.pt toy-bc-unguided.policy.pt --guidance toy-dql.guidance.pt")
    cells = {(cell["policy"], cell["guidance"]): pair_scores(cell) for cell in report["cells"]}
    dql, bc = "toy-dql.policy.pt", "toy-bc-unguided.policy.pt"
    assert list(cells) == [*[(dql, g) for g in ("its own", "none", "toy-dql.guidance.pt")]] + [
        (bc, g) for g in ("none", "toy-dql.guidance.pt")
    ]
    for entry in report["summary"]:
        baseline = np.array(cells[entry["policy"], "its own" if entry["policy"] == dql else "none"])
        values = np.array(cells[entry["policy"], entry["guidance"]])
        if entry["guidance"] == "its own" or (entry["policy"], entry["guidance"]) == (bc, "none"):
            assert entry["change"] is None
            continue
        change = entry["change"]
        assert change["median"] == pytest.approx(np.median(values) - np.median(baseline))
        wins = stats.mannwhitneyu(values, baseline).statistic / (len(values) * len(baseline))
        assert change["improvement"] == pytest.approx(wins)


def test_swap_pairs_members_by_position(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = swapped("toy-dql.policy.pt toy-dql.policy.pt --guidance toy-idql.guidance.pt@10 --pairs matched")
    assert [cell["guidance"] for cell in report["cells"]] == ["its own", "none", "toy-idql.guidance.pt@10"]
    assert [(p["policy_seed"], p["guidance_seed"]) for p in report["cells"][2]["pairs"]] == [(0, 0), (1, 1)]
    monkeypatch.setattr(mdpt, "MANY_ROLLOUTS", 7)  # 2 + 2 + 4 pairs are more
    out = run("swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --episodes 1 --workers 1").stdout
    assert "3 cells, members paired by position (each with each: more than 7, for --pairs all): 6 rollouts" in out
    run("guidance toy.toml --seeds 1,2,3 --out three.pt")  # these can only be crossed
    out = run("swap toy-dql.policy.pt --guidance three.pt --episodes 1 --workers 1").stdout
    assert "3 cells, each with each: 10 rollouts" in out.replace("each member with each", "each with each")
    assert fail("swap toy-dql.policy.pt --guidance three.pt --pairs matched") == (
        "toy-dql.policy.pt, three.pt: 2 policy members cannot be paired with 3 guidance members; "
        "use the same number, or a guidance with one member"
    )


def test_swap_takes_the_policies_own_guidance_by_default(folder: Path) -> None:
    # the first has none, the third the same as the second
    files = ["toy-bc-unguided.policy.pt", "toy-dql.policy.pt", "toy-cfg.policy.pt", "toy-edp.policy.pt"]
    report = swapped(f"{' '.join(files)} --episodes 1 --candidates 2 --seed 3")
    names = [(cell["policy"], cell["guidance"]) for cell in report["cells"]]
    others = [("its own", "none", files[1], files[3])] * 3
    guidances = [("none", files[1], files[3]), *others]
    assert names == [(policy, guidance) for policy, row in zip(files, guidances, strict=True) for guidance in row]
    for cell in report["cells"]:
        expected = {"episodes": 1, "candidates": 1 if cell["guidance"] == "none" else 2, "seed": 3}
        assert {key: cell["protocol"][key] for key in expected} == expected


def test_swap_tells_the_protocol_of_its_guided_cells(folder: Path) -> None:
    out = run("swap toy-bc-unguided.policy.pt --guidance toy-idql.guidance.pt --workers 1").stdout
    line = "conftest:Gentle-v0, 2 members x 3 episodes, seed 0, max of 4 by each guidance, temperature 1"
    assert out.splitlines()[-1].startswith(line) and out.splitlines()[-1].endswith("; under none 1 candidate")
    out = run(
        "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --guide gradient --guidance-weight 2 --workers 1"
    ).stdout
    assert "seed 0, 2 x gradient of each guidance, temperature 1" in out.splitlines()[-1]


def test_swap_refuses_policies_tried_differently(folder: Path) -> None:
    guidance = "--guidance toy-idql.guidance.pt"
    run(f"policy toy.toml {guidance} --set evaluation.candidates=7 --set evaluation.w=3 --out seven.pt")
    text = "toy-dql.policy.pt and seven.pt are not tried alike: candidates 4 against 7; "
    assert fail(f"swap toy-dql.policy.pt seven.pt {guidance}") == (
        f"{text}evaluate them apart, or give the options that make them equal"
    )
    run(f"policy toy.toml {guidance} --set policy.algorithm=cfg --set evaluation.w=3 --out strong.pt")
    out = run(f"swap toy-cfg.policy.pt strong.pt {guidance} --episodes 1 --workers 1").stdout
    assert out.splitlines()[-1].endswith("; under none 1 candidate; w of cfg policies 1 or 3")
    report = swapped(f"toy-dql.policy.pt seven.pt {guidance} --candidates 2 --episodes 1")
    assert {cell["protocol"]["candidates"] for cell in report["cells"] if cell["guidance"] != "none"} == {2}
    run(f"policy toy.toml {guidance} --set data.reference=[0,1] --out other.pt")
    assert "reference [10.0, 110.0] against [0.0, 1.0]" in fail(f"swap toy-dql.policy.pt other.pt {guidance}")


def test_many_rollouts_are_played_in_slices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "toy-dql.policy.pt --guidance toy-idql.guidance.pt --episodes 2"
    whole = swapped(command)
    Path("swap.json").unlink()
    monkeypatch.setattr(mdpt, "AT_ONCE", 5)  # two pairs at a time
    parts = swapped(command)
    for one, other in zip(whole["cells"], parts["cells"], strict=True):
        assert pair_scores(one) == pytest.approx(pair_scores(other), abs=1e-4)
        assert [pair["guidance_seed"] for pair in one["pairs"]] == [pair["guidance_seed"] for pair in other["pairs"]]
    alone = "toy-bc-unguided.policy.pt --temperature 0 --episodes"
    monkeypatch.setattr(mdpt, "AT_ONCE", 9)
    whole = scores(f"{alone} 5")
    monkeypatch.setattr(mdpt, "AT_ONCE", 2)  # less than a member's episodes
    parts = scores(f"{alone} 5")
    for one, other in zip(whole["members"], parts["members"], strict=True):
        assert one["returns"] == pytest.approx(other["returns"], abs=1e-4) and one["lengths"] == other["lengths"]
    trial = mdpt.load_trial(Path("toy-bc-unguided.policy.pt"), None, {}, "cpu")
    states, pairs = np.zeros((2, 2, 2), dtype=np.float32), mdpt.pair_up(trial)
    first, again, later = (mdpt.actor(trial, pairs, start)(states) for start in (0, 0, 2))
    assert np.array_equal(first, again) and not np.isclose(first, later).all()  # each part has its own noise


def test_swap_judges_a_foreign_algorithm_by_the_stronger_of_the_two(folder: Path) -> None:
    run("policy toy.toml --guidance toy-dql.guidance.pt --set policy.algorithm=edp --out home.pt --seeds 8,9")
    result = run("swap toy-dql.policy.pt home.pt --guidance toy-dql.guidance.pt --workers 1 --json swap.json")
    cells = json.loads(Path("swap.json").read_text())["cells"]
    middle = {(cell["policy"], cell["guidance"]): float(np.median(pair_scores(cell))) for cell in cells}
    value = middle["toy-dql.policy.pt", "toy-dql.guidance.pt"]
    home = {policy: middle[policy, "its own"] for policy in ("toy-dql.policy.pt", "home.pt")}
    stronger = max(home, key=lambda policy: home[policy])
    lines = [line for line in result.stdout.splitlines() if "stronger of the two" in line]
    expected = (
        f"toy-dql.policy.pt under toy-dql.guidance.pt (dql): median {value:.1f}, compared with the stronger of the two"
        f", {stronger} under its own guidance: {home[stronger]:.1f} ({value - home[stronger]:+.1f})"
    )
    assert lines == [expected]  # home.pt grew under that algorithm itself: nothing to judge


def test_swap_marks_other_data(folder: Path) -> None:
    write_toy_data(Path("other.hdf5"), seed=1)
    run("guidance toy.toml --set data.path=other.hdf5 --out other.pt")
    result = run("swap toy-dql.policy.pt --guidance other.pt --episodes 1 --workers 1")
    assert "other.pt *" in result.stdout and "toy-idql" not in result.stdout
    assert "* this guidance saw other data than the policy: the paper's guarantee does not hold there" in result.stdout


def test_swap_goes_on_where_it_was_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "swap toy-dql.policy.pt toy-cfg.policy.pt --guidance toy-idql.guidance.pt --workers 1"
    run(f"{command} --json whole.json")
    play, played = mdpt.play_cell, []

    def breaks(*arguments: Any) -> Any:
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append(arguments[2])
        return play(*arguments)

    monkeypatch.setattr(mdpt, "play_cell", breaks)
    CliRunner().invoke(app, shlex.split(f"{command} --json part.json"))
    assert len(json.loads(Path("part.json").read_text())["cells"]) == 3
    monkeypatch.setattr(mdpt, "play_cell", lambda *arguments: (played.append(arguments[2]), play(*arguments))[1])
    assert run(f"{command} --json part.json").stdout.endswith("wrote part.json\n")
    assert played == [f"cell {i}/6" for i in range(1, 7)]  # none twice
    assert Path("part.json").read_bytes() == Path("whole.json").read_bytes()
    run(f"{command} --json part.json")  # finished: nothing is played again
    assert len(played) == 6
    Path("old.svg").write_text("")
    assert fail(f"{command} --json part.json --plot old.svg").startswith("old.svg: exists already; ")
    run(f"{command} --json part.json --plot old.svg --overwrite")  # replaces the picture, not the same cells
    assert len(played) == 6 and Path("part.json").read_bytes() == Path("whole.json").read_bytes()
    run(f"{command} --json other.json --episodes 1")
    run(f"{command} --json other.json --overwrite")  # other cells give way
    assert Path("other.json").read_bytes() == Path("whole.json").read_bytes()
    played.clear()
    assert fail(f"{command} --json part.json --episodes 2") == (
        "part.json: holds a swap with other evaluation; repeat its options to go on, choose another name, "
        "or --overwrite to begin anew"
    )
    run("guidance toy.toml --seeds 5,6 --out toy-idql.guidance.pt --overwrite")
    assert fail(f"{command} --json part.json").startswith("part.json: holds a swap with other bundles; ")
    Path("foreign.json").write_text("[]")
    assert fail(f"{command} --json foreign.json").startswith("foreign.json: exists already and is no swap; ")
    assert not played


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_swap_goes_on_to_the_same_file(folder: Path, how: signal.Signals) -> None:
    policies = "toy-dql.policy.pt toy-cfg.policy.pt toy-bc-unguided.policy.pt"
    command = f"swap {policies} --guidance toy-idql.guidance.pt --episodes 10 --workers 1 --json part.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([EXECUTABLE, *shlex.split(command)], env=environment, stdout=subprocess.DEVNULL)
    deadline, part = time.monotonic() + 120, Path("part.json")
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    assert process.wait(30) == (130 if how == signal.SIGINT else -how)
    assert 1 <= len(json.loads(part.read_text())["cells"]) < 8
    for rest in (command, command.replace("part", "whole")):
        subprocess.run([EXECUTABLE, *shlex.split(rest)], env=environment, stdout=subprocess.DEVNULL, check=True)
    assert part.read_bytes() == Path("whole.json").read_bytes()


def test_comparisons_agree_with_an_independent_computation() -> None:
    random = np.random.default_rng(1)
    own, table = random.normal(50, 20, 6), random.normal(60, 5, (6, 5))

    def spread(table: Any) -> dict[str, float]:  # of pairs that share no member, one shift after the other
        shifts = [[row[(i + k) % len(row)] for i, row in enumerate(table)] for k in range(len(table[0]))]
        shifts = [scores for scores in shifts if not np.isnan(scores).all()]
        return {
            "iqr": np.mean([stats.iqr(scores) for scores in shifts]),
            "std": np.mean([np.std(scores, ddof=1) for scores in shifts]),
        }

    def changes(mine: Any, other: Any) -> dict[str, float]:
        before, after, other = spread(mine[:, None]), spread(other), other[~np.isnan(other)]
        wins = stats.mannwhitneyu(other.ravel(), mine).statistic / (other.size * mine.size)
        middle = np.median(other) - np.median(mine)
        return {"median": middle, "improvement": wins} | {key: after[key] - before[key] for key in before}

    names = ("median", "improvement", "iqr", "std")
    found = mdpt.compare(own, table)
    assert {key: found[key] for key in names} == pytest.approx(changes(own, table))
    others = random.normal(60, 5, (6, 6))
    others[range(6), range(6)] = np.nan  # other seeds alone
    assert {key: mdpt.compare(own, others)[key] for key in names} == pytest.approx(changes(own, others))
    assert found["iqr_percent"] == pytest.approx(100 * (spread(table)["iqr"] / stats.iqr(own) - 1))
    assert [mdpt.summarize(table)[key] for key in ("iqr", "std")] == pytest.approx([*spread(table).values()])
    rows, columns = random.integers(0, 6, (2_000, 6)), random.integers(0, 5, (2_000, 5))
    draws = [(own[r], table[np.ix_(r, c)]) for r, c in zip(rows, columns, strict=True)]  # own and swapped together
    drawn = [changes(mine, other) for mine, other in draws]
    for name in found["intervals"]:
        low, high = np.quantile([change[name] for change in drawn], [0.025, 0.975])
        assert found["intervals"][name] == pytest.approx([low, high], abs=0.15 * (high - low)), name
    iqm = np.quantile([stats.trim_mean(other.ravel(), 0.25) for _, other in draws], [0.025, 0.975])
    assert mdpt.summarize(table)["iqm_interval"] == pytest.approx(iqm, abs=0.15 * (iqm[1] - iqm[0]))
    alone, copied = mdpt.summarize(own), mdpt.summarize(np.tile(own[:, None], 4))  # four times the same is no more news
    assert copied["members"] == 6 and np.ptp(copied["iqm_interval"]) > 0.8 * np.ptp(alone["iqm_interval"])
    assert mdpt.compare(np.full(3, 2.0), table[:3])["iqr_percent"] is None
    for width in (1, 6):  # a guidance that changes nothing, crossed or not
        same = mdpt.compare(own, np.tile(own[:, None], width))
        expected = {"median": 0, "improvement": 0.5, "iqr": 0, "std": 0}
        assert {key: same[key] for key in names} == pytest.approx(expected)
        assert np.ptp([*same["intervals"].values()], axis=1) == pytest.approx(0)
    one = mdpt.summarize(table[:1])  # a single policy: over those who guide it
    assert [one["iqr"], one["std"]] == pytest.approx([stats.iqr(table[0]), table[0].std(ddof=1)])
    assert mdpt.compare(own[:1], table[:1]) == {"median": float(np.median(table[0]) - own[0])}


@pytest.mark.parametrize("others", ["all", "other seeds"])
def test_crossing_changes_no_spread_by_itself(others: str) -> None:
    random = np.random.default_rng(2)
    noise = random.normal(0, 1, (4_000, 4, 4))  # every pair's score is its own
    if others == "other seeds":
        noise[:, range(4), range(4)] = np.nan
    crossed, alone = mdpt.spread(noise), mdpt.spread(random.normal(0, 1, (4_000, 4, 1)))
    for one, other in zip(crossed, alone, strict=True):
        assert one.mean() == pytest.approx(other.mean(), rel=0.04)


PICTURES = {
    "evaluate toy-dql.policy.pt": ("conftest:Gentle-v0, 2 members x 3 episodes", "normalized score", "dataset best"),
    "evaluate toy-dql.policy.pt --curve": ("2 members x 3 episodes", "gradient steps", "interquartile range"),
    "evaluate toy-dql.policy.pt --describe": ("training of dql policy", "noise_loss", "policy_q"),
    "evaluate toy-idql.guidance.pt --describe": ("training of idql guidance", "q_loss"),
    "swap toy-dql.policy.pt toy-bc-unguided.policy.pt --guidance toy-idql.guidance.pt": (
        "2 members x 3 episodes",
        "toy-bc-unguided.policy.pt",
        "IQR",
        "score of every pair of members",
    ),
}


@pytest.mark.parametrize("command", PICTURES)
def test_pictures_say_what_they_show(command: str, folder: Path) -> None:
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    workers = "" if "--describe" in command else " --workers 1"
    assert run(f"{command}{workers} --plot picture.svg").stdout.splitlines()[-1] == "wrote picture.svg"
    picture = Path("picture.svg").read_text()
    assert all(text in picture for text in PICTURES[command])
    exists = "picture.svg: exists already; choose another name, or --overwrite to replace it"
    assert fail(f"{command}{workers} --plot picture.svg") == exists


def test_video_is_an_episode_with_its_figures(folder: Path) -> None:
    (episode, *_) = next(m["returns"] for m in scores("toy-bc-unguided.policy.pt --temperature 0")["members"])
    (length, *_) = next(m["lengths"] for m in scores("toy-bc-unguided.policy.pt --temperature 0")["members"])
    result = run("evaluate toy-bc-unguided.policy.pt --temperature 0 --video film.gif")
    assert result.stdout == "wrote film.gif\n"
    with Image.open("film.gif") as film:
        assert film.n_frames == 1 + math.ceil(length / 3) and film.size == (320, 48)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L"))
    assert last[40:].max() <= 12 and last[:38].max() > 200  # a dark plane, and bright figures on it
    assert f"return {episode:.1f}, score {episode - 10:.1f}" in result.stderr  # the episode that `evaluate` scored
    alone = "--video films one episode and does nothing else; leave out --curve, --describe, --episodes, --json, --plot"
    for options, problem in {
        "--member 7 --video a.gif": "--member 7: the seeds in toy-dql.policy.pt are 0, 1",
        "--member 1": "--member 1: acts only with --video; leave the option out",
        "--video a.mp4": "--video a.mp4: expected a .gif file",
        "--video film.gif": "film.gif: exists already; choose another name, or --overwrite to replace it",
        "--video a.gif --curve": alone,
        "--video a.gif --episodes 2": alone,
    }.items():
        assert fail(f"evaluate toy-dql.policy.pt {options}") == problem


def test_an_environment_that_cannot_be_filmed_says_so() -> None:
    spec = data.environment_spec("toy_environment:Toy-v0")
    with pytest.raises(data.DataError, match=r"Toy-v0 cannot be filmed: it does not take render_mode rgb_array\."):
        next(data.film_episode(lambda observation: np.zeros(2), spec, seed=0, every=1))


def test_tensorboard_shows_the_history(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = "guidance toy.toml --out watched.pt --tensorboard boards"
    run(f"{command} --seeds 0,1 --set guidance.learning_rate=0.01")
    assert fail(f"{command} --overwrite --resume").startswith("--overwrite begins anew")
    Path("watched.pt").unlink()
    assert fail(command) == "boards/watched: exists already; choose another name, or --overwrite to replace it"
    with interrupted_at(12, monkeypatch):
        run(f"{command} --overwrite", code=1)  # what came before is gone
    run(f"{command} --resume")  # and this goes on
    history = models.read_bundle(Path("watched.pt"))["history"]
    events = EventAccumulator("boards/watched")
    events.Reload()
    for name in history[-1].keys() - {"step"}:
        for member, seed in enumerate((0, 1)):
            shown = [(event.step, event.value) for event in events.Scalars(f"{name}/seed {seed}")]
            assert shown == [(entry["step"], pytest.approx(entry[name][member])) for entry in history]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = "--tensorboard needs the package tensorboard: pip install 'mdpt[tensorboard]'"
    assert fail("guidance toy.toml --out b.pt --tensorboard boards") == message


def test_collecting_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path / "cache"))
    tiny = {"data.transitions": 400, "data.levels": [0.2, 0.8], "guidance.steps": 4, "policy.steps": 4}
    options = " ".join(f"--set '{key}={value}'" for key, value in tiny.items()) + " --seeds 0 --device cpu"
    first = run(f"guidance {ROOT / 'hopper.toml'} {options} --workers 1")
    assert "collect: 400/400" in first.stderr
    (cached,) = (tmp_path / "cache").iterdir()
    stamp = cached.stat().st_mtime_ns
    second = run(f"policy {ROOT / 'hopper.toml'} {options} --guidance hopper-idql.guidance.pt")
    assert "collect" not in second.stderr and cached.stat().st_mtime_ns == stamp
    report = scores("hopper-dql.policy.pt --episodes 1 --candidates 2")
    assert report["dataset"]["transitions"] == 400 and report["dataset"]["name"] == cached.name
    low, high = 20.058972, 1441.8059623430963  # D4RL's
    (member,) = report["members"]
    assert member["score"] == pytest.approx(100 * (member["return"] - low) / (high - low))
    assert report["summary"]["std"] is report["summary"]["iqm_interval"] is None


# ------------------------------------------------------------------------------------- modules that recombine


def test_frozen_guidance_is_bit_identical_inside_the_policy(trained: Path) -> None:
    for file, guidance in (("toy-dql", "toy-idql"), ("toy-cfg", "toy-idql"), ("toy-edp", "toy-dql")):
        inside = models.read_policy(trained / f"{file}.policy.pt")["guidance"]
        assert equal(inside, models.read_guidance(trained / f"{guidance}.guidance.pt") | {"snapshots": {}})
        assert not any(weight.requires_grad for weight in models.build_guidance(inside, "cpu").parameters())


def test_a_joint_policy_serves_as_guidance(folder: Path) -> None:
    run("policy toy.toml --guidance toy-dql-joint.policy.pt --out under-joint.pt")
    joint = models.read_policy(Path("toy-dql-joint.policy.pt"))
    inside = models.read_policy(Path("under-joint.pt"))["guidance"]
    assert equal(inside, joint["guidance"] | {"snapshots": {}, "training": None})  # what acts, not how it got there
    assert joint["guidance"]["complete"] and list(joint["guidance"]["snapshots"]) == [10, 20]
    assert joint["experiment"]["guidance"]["algorithm"] == "dql"
    assert not any(name.startswith("actor.") for name in joint["guidance"]["weights"])


def test_labels_come_once_from_the_frozen_guidance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled: list[Any] = []
    label = models.Transitions.label

    def count(transitions: models.Transitions, guidance: models.Guidance) -> None:
        label(transitions, guidance)
        labelled.append((transitions, guidance))
        monkeypatch.setattr(models.Guidance, "q", None)  # from here on nothing is valued

    monkeypatch.setattr(models.Transitions, "label", count)
    run("policy toy.toml --set policy.algorithm=cfg --guidance toy-idql.guidance.pt --out again.pt")
    ((transitions, _),) = labelled
    assert transitions.labels.shape == (2, len(transitions)) and 0 < transitions.labels.float().mean() < 1
    first, again = models.read_policy(Path("toy-cfg.policy.pt")), models.read_policy(Path("again.pt"))
    assert equal(first["weights"], again["weights"])  # and the same command gives the same bits


def test_one_guidance_member_serves_all(folder: Path) -> None:
    run("guidance toy.toml --seeds 5 --out one.pt")
    run("policy toy.toml --guidance one.pt --out under-one.pt")
    assert scores("under-one.pt")["protocol"]["guidance"] == "its own idql guidance"


def test_other_data_is_warned_of_and_recorded(folder: Path) -> None:
    write_toy_data(Path("other.hdf5"), seed=1)
    run("guidance toy.toml --set data.path=other.hdf5 --out other.pt")
    text = (
        "the policy learned from toy.hdf5 and the guidance learned from other.hdf5: "
        "swapping is known to hold only under one data distribution"
    )
    result = run("evaluate toy-dql.policy.pt --infer-guidance other.pt --workers 1 --json report.json")
    assert result.stderr.splitlines()[0] == f"warning: {text}"
    assert json.loads(Path("report.json").read_text())["protocol"]["warnings"] == [text]
    assert f"warning: {text}" in run("policy toy.toml --guidance other.pt --out p.pt").stderr.splitlines()


def test_seeds_device_and_set_override_the_file(folder: Path) -> None:
    run(
        "guidance toy.toml --seeds 4 --device cpu --set guidance.tau=0.5 --set guidance.hidden=[8] "
        "--set data.reward_scale=none --set name=other"
    )
    bundle = models.read_bundle(Path("other-idql.guidance.pt"))
    assert bundle["seeds"] == [4] and bundle["experiment"]["guidance"]["tau"] == 0.5
    assert bundle["experiment"]["guidance"]["hidden"] == [8] and bundle["reward_scale"]["rule"] == "none"
    assert bundle["experiment"]["guidance"]["steps"] == 20  # the file's own


# -------------------------------------------------------------------------------- interrupted, resumed, broken


TRAININGS = [
    "guidance toy.toml",
    "guidance toy.toml --set guidance.algorithm=dql",
    "policy toy.toml --guidance toy-idql.guidance.pt",
    "policy toy.toml --guidance toy-idql.guidance.pt --set policy.algorithm=idql",
    "policy toy.toml --guidance toy-idql.guidance.pt --set policy.algorithm=cfg",
    "policy toy.toml --set policy.scheme=joint --set policy.algorithm=edp",
    "policy toy.toml --set policy.scheme=joint --set guidance.algorithm=dql",
]


@contextmanager
def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C during this gradient step."""
    record = Monitor.record

    def interrupt(monitor: Monitor, now: int, *rest: Any) -> None:
        record(monitor, now, *rest)
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "record", interrupt)
        yield


@pytest.mark.parametrize("command", TRAININGS)
def test_a_resumed_run_ends_bit_identical(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"{command} --out whole.pt")
    with interrupted_at(12, monkeypatch):
        result = run(f"{command} --out cut.pt", code=1)
    last = result.stderr.splitlines()[-1]
    assert last == "mdpt: interrupted after step 13 of 20; the same command with --resume goes on"
    cut = models.read_bundle(Path("cut.pt"))
    assert cut["step"] == 13 and not cut["complete"] and list(cut["snapshots"]) == [10]
    run(f"{command} --out cut.pt --resume")
    whole, resumed = models.read_bundle(Path("whole.pt")), models.read_bundle(Path("cut.pt"))
    assert resumed["complete"] and resumed["training"] is None
    for part in (whole, resumed):  # what each holds of training beyond the weights differs in its clock alone
        part.pop("history"), part.pop("accounting")
        if part["guidance"] is not None:
            part["guidance"].pop("history"), part["guidance"].pop("accounting")
    assert equal(whole, resumed)


def test_ctrl_c_keeps_an_unfinished_bundle(folder: Path) -> None:
    command = (
        f"policy toy.toml --set policy.algorithm=bc --set policy.scheme=unguided "
        f"--set policy.steps={(steps := 1000)} --set policy.snapshots=1"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [EXECUTABLE, *shlex.split(command), "--out", "cut.pt"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("policy bc: 100/1000")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(30) == 1
    step = models.read_bundle(Path("cut.pt"))["step"]
    message = f"mdpt: interrupted after step {step} of {steps}; the same command with --resume goes on"
    assert said.splitlines()[-1] == message and 100 <= step < steps
    assert [file.name for file in folder.glob(".*")] == []  # nothing temporary is left
    text = f"cut.pt: is unfinished, at step {step}; --resume goes on, --overwrite begins anew"
    assert fail(f"{command} --out cut.pt") == text
    assert f"{step} of {steps} (unfinished)" in run("evaluate cut.pt --describe").stdout
    run(f"{command} --out cut.pt --resume")
    run(f"{command} --out whole.pt")
    resumed, whole = models.read_policy(Path("cut.pt")), models.read_policy(Path("whole.pt"))
    assert equal(resumed["weights"], whole["weights"]) and equal(resumed["snapshots"], whole["snapshots"])


UNFINISHED = "policy toy.toml --guidance toy-idql.guidance.pt --set policy.learning_rate=1e30 --out nan.pt"


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_snapshot(folder: Path) -> None:
    last = run(f"{UNFINISHED} --set policy.snapshots=20", code=1).stderr.splitlines()[-1]
    bundle = models.read_policy(Path("nan.pt"))
    kept = bundle["step"]
    pattern = (
        r"mdpt: the loss of member \d \(seed \d\) became (nan|inf) at step (\d+); the last good snapshot, of step "
        rf"{kept}, is kept in nan.pt; lower learning_rate or look at the data"
    )
    found = re.fullmatch(pattern, last)
    assert found and kept >= 1 and int(found[2]) in (kept, kept + 1)
    assert not bundle["complete"] and all(weight.isfinite().all() for weight in bundle["weights"].values())
    assert f"{kept} of 20 (unfinished)" in run("evaluate nan.pt --describe").stdout


def test_weights_that_are_not_finite_are_never_kept(folder: Path) -> None:
    """A step can leave no finite weight behind although its own loss was finite, even the last one."""
    for options in ("--set policy.snapshots=20", "--set policy.steps=1 --set policy.snapshots=1"):
        result = run(f"{UNFINISHED} --overwrite --set policy.learning_rate=1e60 {options}", code=1)
        assert result.stderr.splitlines()[-1].endswith(
            "; no snapshot was reached; lower learning_rate or look at the data"
        )
        assert not Path("nan.pt").exists()


def test_rewards_near_the_largest_float(folder: Path) -> None:
    write_toy_data(Path("huge.hdf5"), rewards=np.full(ROWS, 3e38, "f4"))
    last = run(
        "guidance toy.toml --set data.path=huge.hdf5 --set data.reward_scale=none --out g.pt", code=1
    ).stderr.splitlines()[-1]
    assert re.fullmatch(
        r"mdpt: the loss of member 0 \(seed 0\) became inf at step [01]; no snapshot was reached; "
        "lower learning_rate or look at the data",
        last,
    )
    assert not Path("g.pt").exists()


def test_the_member_that_broke_is_named() -> None:
    monitor = Monitor("guidance", 0, 1000, [5, 6, 7], {1000}, [], "no snapshot was reached")
    good, bad = torch.ones(3), torch.tensor([1.0, 1.0, torch.nan])
    for step, loss in enumerate([good, good, bad, good]):
        monitor.record(step, loss, {})
    with pytest.raises(Exception, match=r"the loss of member 2 \(seed 7\) became nan at step [23]; no snapshot"):
        monitor.record(4, good, {})


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    run("policy toy.toml --guidance toy-idql.guidance.pt --set policy.steps=20 --out cut.pt")
    Path("report.json").write_text("mine")
    Path("curve.png").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    complete = "exists already and is complete; choose another --out, or --overwrite to replace it"
    exists = "exists already; choose another name, or --overwrite to replace it"
    for command, message in (
        ("guidance toy.toml", f"toy-idql.guidance.pt: {complete}"),
        ("guidance toy.toml --resume", f"toy-idql.guidance.pt: {complete}"),
        ("policy toy.toml --guidance toy-idql.guidance.pt", f"toy-dql.policy.pt: {complete}"),
        ("evaluate toy-dql.policy.pt --json report.json", f"report.json: {exists}"),
        ("evaluate toy-dql.policy.pt --curve --plot curve.png", f"curve.png: {exists}"),
        (
            "swap toy-dql.policy.pt --json report.json",
            "report.json: exists already and is no swap; choose another name, or --overwrite to replace it",
        ),
    ):
        assert fail(command) == message
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    run("guidance toy.toml --seeds 8 --overwrite")
    assert models.read_bundle(Path("toy-idql.guidance.pt"))["seeds"] == [8]


# -------------------------------------------------------------------------------------------------- mistakes


EXPERIMENT_MISTAKES = [  # what stands in the file, or in --set; what is said after "toy.toml: "
    ("policy.step=5", "[policy] step = 5: unknown key; did you mean 'steps'?"),
    (
        "evaluation.zzz=5",
        (
            "[evaluation] zzz = 5: unknown key; known are episodes, candidates, selection, "
            "weight_temperature, temperature, w, guide, guidance_weight, seed"
        ),
    ),
    ("seed=[3]", "seed = [3]: unknown key; did you mean 'seeds'?"),
    ("polic.steps=5", "polic: unknown key; did you mean 'policy'?"),
    ("policy.steps=2.5", "[policy] steps = 2.5: should be a valid integer"),
    ("policy.steps='many'", "[policy] steps = 'many': should be a valid integer"),
    ("policy.steps=0", "[policy] steps = 0: should be greater than or equal to 1"),
    ("policy.eta=true", "[policy] eta = True: should be a valid number"),
    ("guidance.discount=1.0", "[guidance] discount = 1.0: should be less than 1"),
    ("guidance.tau=nan", "[guidance] tau = nan: should be a finite number"),
    ("guidance.algorithm='cql'", "[guidance] algorithm = 'cql': should be 'idql' or 'dql'"),
    ("policy.algorithm='sac'", "[policy] algorithm = 'sac': should be 'bc', 'idql', 'dql', 'edp' or 'cfg'"),
    ("policy.hidden=[16, 0]", "[policy] hidden[1] = 0: should be greater than or equal to 1"),
    ("policy.time_features=7", "[policy] time_features = 7: should be a multiple of 2"),
    ("guidance.hidden=[]", "[guidance] hidden = []: List should have at least 1 item after validation, not 0"),
    ("data.levels=[0.1, -1]", "[data] levels[1] = -1: should be greater than or equal to 0"),
    (
        "data.reward_scale='sum'",
        ("[data] reward_scale = 'sum': should be 'none', 'return-range' or 'minus-one', or should be a valid number"),
    ),
    ("device='gpu'", "device = 'gpu': should be 'auto', 'cpu' or 'cuda'"),
    ("seeds=[1, 2, 1]", "seeds [1, 2, 1] repeat; each member needs its own"),
    ("seeds=[1, -2]", "seeds[1] = -2: should be greater than or equal to 0"),
    ("name='a/b'", "name = 'a/b': String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'"),
    ("data=3", "[data] = 3: should be a table"),
    ("data.source='collect'", "[data]: path is only for source 'hdf5'"),
    ("data.action_noise=[0.1]", "[data]: action_noise has 1 entries for 4 levels"),
    ("data.transitions=1001", "[data]: transitions 1001 cannot be shared equally by 4 levels"),
    (
        "policy.algorithm='idql'\npolicy.hidden=[8, 16]",
        "[policy]: hidden [8, 16]: idql's residual blocks are all of one width",
    ),
    (
        "policy.sampler='dpm-solver++'\npolicy.sampling_steps=9",
        "[policy]: sampling_steps 9 is more than diffusion_steps 5",
    ),
    ("policy.guidance_from=0.5\npolicy.guidance_until=0.2", "[policy]: guidance_from 0.5 is after guidance_until 0.2"),
]


@pytest.mark.parametrize(("settings", "message"), EXPERIMENT_MISTAKES)
def test_mistakes_in_the_experiment(folder: Path, settings: str, message: str) -> None:
    options = " ".join(f"--set {shlex.quote(setting)}" for setting in settings.splitlines())
    assert fail(f"guidance toy.toml {options}") == f"toy.toml: {message}"


def test_several_mistakes_get_a_line_each(folder: Path) -> None:
    Path("toy.toml").write_text('nam = "a"\n[data]\nsource = "hdf5"\n[policy]\nsteps = 0\nalgoritm = "bc"\n')
    assert fail("guidance toy.toml").splitlines() == [
        "toy.toml: [data]: source 'hdf5' needs a path",
        "toy.toml: [policy] steps = 0: should be greater than or equal to 1",
        "toy.toml: [policy] algoritm = 'bc': unknown key; did you mean 'algorithm'?",
        "toy.toml: nam = 'a': unknown key; did you mean 'name'?",
    ]


WRITTEN = "written by `mdpt guidance`"
MISTAKES = [  # command, message
    ("guidance none.toml", "none.toml: no such experiment file; hopper.toml in the repository is one to start from"),
    ("guidance .", ".: no such experiment file; hopper.toml in the repository is one to start from"),
    (
        "guidance broken.toml",
        "broken.toml: is not TOML: Expected newline or end of document after a statement (at line 1, column 7)",
    ),
    ("guidance toy.toml --set steps", "--set steps: expected table.key=value, such as policy.steps=5000"),
    ("guidance toy.toml --set a.b.c=1", "--set a.b.c=1: expected table.key=value, such as policy.steps=5000"),
    ("guidance toy.toml --set =1", "--set =1: expected table.key=value, such as policy.steps=5000"),
    ("guidance toy.toml --set name.x=1", "--set name.x=1: name is a key, not a table"),
    ("guidance toy.toml --seeds 1,1", "toy.toml: seeds [1, 1] repeat; each member needs its own"),
    ("guidance toy.toml --seeds a", "toy.toml: seeds = '[a]': should be a valid list"),
    ("guidance toy.toml --device gpu", "toy.toml: device = 'gpu': should be 'auto', 'cpu' or 'cuda'"),
    ("guidance toy.toml --out new.pt --resume", "new.pt: there is nothing to resume; leave --resume out to begin"),
    ("guidance toy.toml --out . --overwrite", "--out .: is a folder; choose a file"),
    (
        "guidance toy.toml --out toy.toml/g.pt",
        "--out toy.toml/g.pt: cannot be written (File exists); choose another",
    ),
    ("guidance toy.toml --resume --overwrite", "--overwrite begins anew and --resume goes on; give one of them"),
    (
        "policy toy.toml",
        (
            f"scheme guidance-first needs --guidance FILE, {WRITTEN}; without one, "
            "--set policy.scheme=joint or =unguided"
        ),
    ),
    (
        "policy toy.toml --guidance toy-idql.guidance.pt --set policy.scheme=joint",
        "scheme joint takes no --guidance; leave it out, or --set policy.scheme=guidance-first",
    ),
    (
        "policy toy.toml --guidance toy-idql.guidance.pt --set policy.scheme=unguided",
        "scheme unguided takes no --guidance; leave it out, or --set policy.scheme=guidance-first",
    ),
    (
        "policy toy.toml --guidance none.pt --out p.pt",
        "none.pt: no such bundle; `mdpt guidance` and `mdpt policy` write them",
    ),
    (
        "policy toy.toml --guidance toy.hdf5 --out p.pt",
        "toy.hdf5: cannot be read as a bundle, it is damaged or something else; write it anew",
    ),
    (
        "policy toy.toml --guidance half.pt --out p.pt",
        "half.pt: cannot be read as a bundle, it is damaged or something else; write it anew",
    ),
    (
        "policy toy.toml --guidance foreign.pt --out p.pt",
        f"foreign.pt: is no mdpt bundle; expected a file {WRITTEN} or `mdpt policy`",
    ),
    (
        "policy toy.toml --guidance future.pt --out p.pt",
        (
            f"future.pt: bundle version 99, this mdpt reads version {models.BUNDLE_VERSION}; train it anew or use the mdpt that wrote it"
        ),
    ),
    (
        "policy toy.toml --guidance toy-bc-unguided.policy.pt --out p.pt",
        ("toy-bc-unguided.policy.pt: this policy was trained unguided and holds no guidance; give a guidance bundle"),
    ),
    (
        "policy toy.toml --guidance toy-idql.guidance.pt@7 --out p.pt",
        "toy-idql.guidance.pt@7: no snapshot @7; there are @10, @20 and @last",
    ),
    (
        "policy toy.toml --guidance toy-idql.guidance.pt --seeds 0,1,2 --out p.pt",
        (
            "3 policy members cannot be paired "
            "with 2 guidance members; use the same number, or a guidance with one member"
        ),
    ),
    (
        "policy toy.toml --guidance elsewhere.pt --out p.pt",
        (
            "the policy and the guidance do not fit together: "
            "id conftest:Gentle-v0 against Ant-v9; action_dim 2 against 8; use bundles of one environment"
        ),
    ),
    (
        "policy toy.toml --guidance toy-idql.guidance.pt --out toy.hdf5",
        "toy.hdf5: cannot be read as a bundle, it is damaged or something else; write it anew",
    ),
    (
        "evaluate toy-idql.guidance.pt",
        "toy-idql.guidance.pt: is a guidance bundle; expected a policy bundle, written by `mdpt policy`",
    ),
    ("evaluate none.pt", "none.pt: no such bundle; `mdpt guidance` and `mdpt policy` write them"),
    ("evaluate none.pt --describe", "none.pt: no such bundle; `mdpt guidance` and `mdpt policy` write them"),
    ("evaluate @10", "@10: no such bundle; `mdpt guidance` and `mdpt policy` write them"),
    ("evaluate toy-dql.policy.pt@soon", "toy-dql.policy.pt@soon: no snapshot @soon; there are @10, @20 and @last"),
    (
        "evaluate toy-dql.policy.pt --candidates 4 --infer-guidance none",
        ("--candidates 4: there is no guidance to choose by; name one with --infer-guidance, or leave the option out"),
    ),
    (
        "evaluate toy-cfg.policy.pt --guide gradient --candidates 4",
        "--candidates 4: acts only with --guide rank or both; leave the option out",
    ),
    (
        "evaluate toy-cfg.policy.pt --guidance-weight 2",
        "--guidance-weight 2.0: acts only with --guide gradient or both; leave the option out",
    ),
    (
        "evaluate toy-cfg.policy.pt --weight-temperature 2",
        "--weight-temperature 2.0: acts only with --selection softmax; leave the option out",
    ),
    (
        "evaluate toy-dql.policy.pt --w 2",
        "--w 2.0: acts only with a cfg policy that learned from labels, not guidance-first dql; leave the option out",
    ),
    (
        "evaluate toy-bc-unguided.policy.pt --guide both",
        ("--guide both: there is no guidance to choose by; name one with --infer-guidance, or leave the option out"),
    ),
    (
        "evaluate toy-dql.policy.pt --infer-guidance toy-bc-unguided.policy.pt",
        ("toy-bc-unguided.policy.pt: this policy was trained unguided and holds no guidance; give a guidance bundle"),
    ),
    (
        "evaluate toy-dql.policy.pt --infer-guidance elsewhere.pt",
        (
            "the policy and the guidance do not fit together: "
            "id conftest:Gentle-v0 against Ant-v9; action_dim 2 against 8; use bundles of one environment"
        ),
    ),
    ("evaluate toy-dql.policy.pt --episodes 0", "--episodes 0: should be greater than or equal to 1"),
    ("evaluate toy-dql.policy.pt --selection best", "--selection best: should be 'max' or 'softmax'"),
    ("evaluate toy-dql.policy.pt --temperature -1", "--temperature -1.0: should be greater than or equal to 0"),
    (
        "evaluate toy-dql.policy.pt --guidance-weight 1",
        "--guidance-weight 1.0: acts only with --guide gradient or both; leave the option out",
    ),
    ("evaluate toy-dql.policy.pt --guide up", "--guide up: should be 'rank', 'gradient' or 'both'"),
    ("evaluate toy-dql.policy.pt --device gpu", "device gpu: expected auto, cpu or cuda"),
    (
        "swap toy-idql.guidance.pt",
        "toy-idql.guidance.pt: is a guidance bundle; expected a policy bundle, written by `mdpt policy`",
    ),
    (
        "swap toy-bc-unguided.policy.pt",
        "toy-bc-unguided.policy.pt: no guidance inside; name one with --guidance FILE",
    ),
    (
        "swap toy-dql.policy.pt --guidance elsewhere.pt",
        (
            "toy-dql.policy.pt, elsewhere.pt: the policy and the guidance do not fit together: "
            "id conftest:Gentle-v0 against Ant-v9; action_dim 2 against 8; use bundles of one environment"
        ),
    ),
    ("swap toy-dql.policy.pt --pairs some", "--pairs some: expected matched or all"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_mistakes_on_the_command_line(folder: Path, command: str, message: str) -> None:
    Path("broken.toml").write_text("a = 1 1")
    Path("half.pt").write_bytes(Path("toy-idql.guidance.pt").read_bytes()[:5000])
    torch.save({"model": torch.zeros(2)}, "foreign.pt")
    bundle = models.read_bundle(Path("toy-idql.guidance.pt"))
    torch.save(bundle | {"version": 99}, "future.pt")
    torch.save(bundle | {"environment": bundle["environment"] | {"id": "Ant-v9", "action_dim": 8}}, "elsewhere.pt")
    assert fail(command) == message
    assert not Path("p.pt").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train toy.toml", "No such command 'train'"),
        ("guidance", "Missing argument 'experiment'"),
        ("swap", "Missing argument 'policies'"),
        ("guidance toy.toml --sets a=1", "No such option: --sets"),
        ("guidance toy.toml --set", "Option '--set' requires an argument"),
        ("guidance toy.toml --workers 0", "Invalid value for '--workers': "),
        ("evaluate toy-dql.policy.pt --episodes many", "Invalid value for '--episodes': "),
    ],
)
def test_mistakes_that_the_parser_sees(folder: Path, command: str, message: str) -> None:
    said = fail(command)
    assert said.startswith(message) and "\n" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("command", ["guidance toy.toml --out g.pt", "evaluate toy-dql.policy.pt"])
def test_a_missing_cuda_device_is_said(folder: Path, command: str) -> None:
    message = "device cuda: this machine or this torch has none; use --device cpu"
    assert fail(f"{command} --device cuda") == message


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({}, {"path": "none.hdf5"}, "none.hdf5: no such file."),
        (
            {},
            {"path": "toy.toml"},
            ("toy.toml: not an HDF5 file. Expected D4RL's format: observations, actions, rewards, terminals."),
        ),
        (
            {"rewards": None},
            {},
            (
                "bad.hdf5: the key 'rewards' is missing. It has: actions, next_observations, "
                "observations, terminals, timeouts."
            ),
        ),
        ({"rewards": np.full(ROWS, np.nan)}, {}, "bad.hdf5: 'rewards' row 0 is nan, expected finite numbers."),
        (
            {"actions": np.full((ROWS, 2), 4.5)},
            {},
            (
                "bad.hdf5: 'actions' row 0 is [4.5, 4.5], expected within "
                "[-1.0, 0.0] and [1.0, 4.0] of conftest:Gentle-v0."
            ),
        ),
        (
            {"rewards": np.zeros(ROWS)},
            {},
            ("reward_scale 'return-range': all returns are equal; choose 'none' or a number."),
        ),
        (
            {},
            {"environment": "HoperBulletEnv-v0"},
            ("HoperBulletEnv-v0: no such environment is registered with gymnasium. Did you mean 'HopperBulletEnv-v0'?"),
        ),
        (
            {},
            {"environment": "HopperBulletEnv-v0"},
            ("bad.hdf5: 'observations' has shape (290, 2), expected (290, 15) for HopperBulletEnv-v0."),
        ),
        ({}, {"reference": "[5, 5]"}, "reference: [5.0, 5.0] must be [min, max] with min < max."),
    ],
)
def test_mistakes_in_the_data(folder: Path, changed: Any, settings: dict[str, str], message: str) -> None:
    write_toy_data(Path("bad.hdf5"), **changed)
    options = " ".join(f"--set 'data.{key}={value}'" for key, value in ({"path": "bad.hdf5"} | settings).items())
    assert fail(f"guidance toy.toml --out g.pt {options}") == message


def test_warnings_about_data_reach_the_user(folder: Path) -> None:
    write_toy_data(Path("bad.hdf5"), timeouts=None)
    result = run("guidance toy.toml --out g.pt --set data.path=bad.hdf5")
    text = "warning: bad.hdf5: no 'timeouts'; episodes end at terminals and every 6 rows."
    assert result.stderr.splitlines()[0] == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "is unfinished, at step 1; --resume goes on, --overwrite begins anew"),
        (
            "--resume --set policy.eta=2",
            (
                "was begun with another [policy]: eta differ; "
                "--resume needs the same experiment, --overwrite begins anew"
            ),
        ),
        (
            "--resume --seeds 0,2",
            (
                "was begun with another [seeds]: seeds differ; "
                "--resume needs the same experiment, --overwrite begins anew"
            ),
        ),
        (
            "--resume --guidance toy-dql.guidance.pt",
            "was begun under another guidance; --resume needs the same, --overwrite begins anew",
        ),
        (
            "--resume --guidance other.pt",
            "was begun under another guidance; --resume needs the same, --overwrite begins anew",
        ),
        ("--resume --data", "was begun on other data; --resume needs the same, --overwrite begins anew"),
        ("--resume --kind", "is an unfinished policy bundle, expected a guidance bundle"),
    ],
)
def test_mistakes_in_resuming(folder: Path, options: str, message: str) -> None:
    command = f"{UNFINISHED} --set policy.snapshots=20"
    run(command, code=1)
    bundle = models.read_bundle(Path("nan.pt"))
    torch.save(bundle | {"step": 1}, "nan.pt")
    guidance = models.read_bundle(Path("toy-idql.guidance.pt"))
    torch.save(guidance | {"weights": guidance["weights"] | {"actor.denoiser.vector": torch.zeros(3)}}, "other.pt")
    if "--data" in options:
        write_toy_data(Path("toy.hdf5"), seed=5)
    if "--kind" in options:
        command = "guidance toy.toml --out nan.pt"
    assert fail(f"{command} {options.removesuffix(' --data').removesuffix(' --kind')}").splitlines()[-1].removeprefix(
        "warning: "
    ) == (f"nan.pt: {message}")


def test_a_resumed_run_tells_another_device_or_other_products(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(12, monkeypatch):
        run("guidance toy.toml --out cut.pt", code=1)
    bundle = models.read_bundle(Path("cut.pt"))
    assert bundle["accounting"]["products"] == models.choose_products()
    monkeypatch.setattr(models, "_onednn_serves", lambda: False)
    for changed, text in (
        ({"device": "cuda:0"}, "begun on cuda:0, goes on on cpu: other random numbers"),
        ({"products": "oneDNN"}, "begun with oneDNN matrix products, which this machine has not"),
    ):
        torch.save(bundle | {"accounting": bundle["accounting"] | changed}, "cut.pt")
        assert text in run("guidance toy.toml --out cut.pt --resume").stderr


def test_waiting_threads_spin_little_unless_the_user_says_otherwise(folder: Path) -> None:
    show = "import os, sys, mdpt\ntry: mdpt.app()\nfinally: print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, expected in (({}, mdpt.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        environment = {
            key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        found = subprocess.run(
            [sys.executable, "-c", show, "--version"],
            env=environment | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.split()[-1] == expected


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tests/benchmark.py"),
        *["--rounds", "1", "--calls", "1", "--rows", "300", "--episodes", "1", "--members", "1"],
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rows = [line.split(" | ")[0] for line in found.splitlines() if line.startswith("| ")]
    assert {f"| guidance `{name}`" for name in models.GUIDANCES} | {
        f"| policy `{name}`" for name in models.POLICIES
    } <= {*rows}


def test_unfinished_bundles_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(12, monkeypatch):
        run("policy toy.toml --guidance toy-idql.guidance.pt --out cut.pt", code=1)
        run("guidance toy.toml --out short.pt", code=1)
    policy, guidance = (
        f"warning: {name} is unfinished, at step 13" for name in ("cut.pt: this policy", "short.pt: this guidance")
    )
    assert run("swap cut.pt --episodes 1 --workers 1").stderr.startswith(policy)
    assert run("evaluate toy-dql.policy.pt --infer-guidance short.pt --workers 1").stderr.startswith(guidance)
    assert run("policy toy.toml --guidance short.pt --out under.pt").stderr.startswith(guidance)


def test_time_left_counts_from_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with mdpt.progress("train", 100, 60) as show:
        show(65, "")
        show(70, "loss 1")
    assert capsys.readouterr().err == "train: 70/100  loss 1  30 s left\n"  # 10 steps in 10 s


def test_a_bundle_of_another_mdpt_says_so(folder: Path) -> None:
    bundle = models.read_policy(Path("toy-dql.policy.pt"))
    bundle["experiment"]["policy"]["horizon"] = 4
    torch.save(bundle | {"versions": bundle["versions"] | {"mdpt": "9.1"}}, "new.pt")
    assert run("evaluate new.pt", code=1).stderr.startswith(
        "mdpt: new.pt: was written by mdpt 9.1, whose experiments this mdpt does not know; use that one\n"
        "new.pt: [policy] horizon = 4: unknown key; "
    )


def test_too_little_memory_is_told_in_a_line(folder: Path) -> None:
    message = "not enough memory; lower batch_size, hidden, candidates, or the number of seeds"
    assert fail("guidance toy.toml --out g.pt --set guidance.batch_size=1_000_000_000_000") == message


def test_a_joint_critic_looks_at_labels_once_they_are_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, seen = models.Guidance.loss, []

    def record(guidance: Any, batch: Any, random: Any, actor: Any, w: float) -> Any:
        seen.append(w)
        return loss(guidance, batch, random, actor, w)

    monkeypatch.setattr(models.Guidance, "loss", record)
    joint = "policy toy.toml --set policy.scheme=joint --set guidance.algorithm=dql --overwrite --out joint.pt"
    run(f"{joint} --set policy.algorithm=cfg --set policy.guidance_from=0.5")
    run(f"{joint} --set policy.algorithm=cfg --set policy.label_dropout=1")
    assert seen == [0.0] * 10 + [1.0] * 10 + [0.0] * 20


def test_unlabelled_noise_that_was_never_learned_is_not_weighed(folder: Path) -> None:
    options = "--set policy.algorithm=cfg --set policy.label_dropout=0 --out all.pt"
    run(f"policy toy.toml --guidance toy-idql.guidance.pt {options}")
    assert fail("evaluate all.pt --w 3") == (
        "w 3: this policy learned with label_dropout 0 and knows no noise without a label; only 1 is possible"
    )


# ------------------------------------------------------------------------------------------------ the README


def section(heading: str) -> str:
    """The README's text from a heading to the next one."""
    assert README.count(f"\n{heading}\n") == 1, heading
    return re.split(r"\n#+ ", README.split(f"\n{heading}\n")[1])[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_has_every_option(command: str) -> None:
    text = section(f"### `mdpt {command}`")
    options = [name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("--")]
    rows = set(re.findall(r"^\| `(--[a-z-]+)[` ]", text, re.MULTILINE))
    assert rows == set(options)


def allowed(schema: dict[str, Any]) -> str:
    """What a field accepts, for the README, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(allowed(branch) for branch in schema["anyOf"] if branch != {"type": "null"})
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(allowed(item) for item in schema['prefixItems'])}]"
    if schema["type"] == "array":
        return f"list of {allowed(schema['items'])}"
    if "pattern" in schema:
        return f"text of the form `{schema['pattern']}`"
    words = [{"integer": "integer", "number": "number", "string": "text", "boolean": "boolean"}[schema["type"]]]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words += [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    words += [f"multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return words[0] + (f" {', '.join(words[1:])}" if words[1:] else "")


def field_rows(table: type[Section]) -> Iterator[str]:
    """The README's row for every field of a table: name, default, what is allowed, meaning."""
    properties = table.model_json_schema()["properties"]
    for name, field in table.model_fields.items():
        if "$ref" not in properties[name]:
            default = "" if field.default is None else f"`{json.dumps(field.default)}`"
            yield f"| `{name}` | {default} | {allowed(properties[name])} | {field.description} |"


TABLES = {"top level": Experiment} | {
    f"`[{name}]`": type(field.default)
    for name, field in Experiment.model_fields.items()
    if isinstance(field.default, Section)
}


@pytest.mark.parametrize("heading", TABLES)
def test_the_readme_has_every_field(heading: str) -> None:
    rows = [line for line in section(f"### {heading}").splitlines() if line.startswith("| `")]
    assert rows == list(field_rows(TABLES[heading]))


def test_the_readme_has_both_command_lines() -> None:
    """Each one line that makes an environment, installs and runs; `.ci/run` runs the second as it stands there."""
    main, tests = re.findall(r"^python3\.11 -m venv .*$", README, re.MULTILINE)
    assert " && pip install . && mdpt guidance hopper.toml && mdpt policy hopper.toml --guidance " in main
    assert main.endswith(" && mdpt evaluate hopper-dql.policy.pt")
    assert tests.endswith(" && pip install -e '.[test]' && python -m pytest")
