"""Tests of the command line, on a toy environment and tiny bundles: commands, going on, mistakes, pictures."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import conftest
import h5py  # type: ignore[import-untyped]
import matplotlib
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from scipy import stats
from typer.testing import CliRunner, Result

import mdpt.mdpt as cli
from mdpt import data, models
from mdpt.mdpt import app

ROOT = Path(__file__).parent.parent
ROWS = 290  # of the toy dataset
pytestmark = pytest.mark.usefixtures("one_thread")
EXECUTABLE = Path(sys.executable).with_name("mdpt")
COMMAND: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = COMMAND.commands
typer.testing._get_command = lambda _: COMMAND  # which is not made anew for each run

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
eta = 1.0

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


def trusting(command: str) -> list[str]:
    """The words of `mdpt COMMAND`, which trusts the module of the toy where it plays."""
    words = shlex.split(command)
    return [*words, "--import", "conftest"] if words[:1] in (["evaluate"], ["swap"]) else words


def run(command: str, code: int = 0) -> Result:
    """Run `mdpt COMMAND` in this process; whatever happens, no exception reaches the user."""
    result = CliRunner().invoke(app, trusting(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result


def fail(command: str, *fragments: str) -> str:
    """What `mdpt COMMAND` says as it ends, perhaps after warnings: a line for each mistake, which tell all this."""
    result = run(command, code=1)
    _, mdpt, line = result.stderr.partition("mdpt: ")
    assert result.stdout == "" and mdpt and "mdpt: " not in line, result.output
    assert [text for text in fragments if text not in line] == [], line
    return result.stderr


def play(command: str) -> tuple[dict[str, Any], str]:
    """The report that `mdpt COMMAND` writes as JSON, all of it played now, and what it prints."""
    Path("report.json").unlink(missing_ok=True)
    stdout = run(f"{command} --workers 1 --json report.json").stdout
    return json.loads(Path("report.json").read_text()), stdout


def evaluate(command: str) -> dict[str, Any]:
    """The cell that `mdpt evaluate COMMAND` reports, without the one sample beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "one_samples", lambda *_: [])
        (cell,) = play(f"evaluate {command}")[0]["cells"]
    return dict(cell)


def returns(cell: dict[str, Any]) -> list[list[float]]:
    return [pair["returns"] for pair in cell["pairs"]]


def pair_scores(cell: dict[str, Any]) -> list[float]:
    return [pair["score"] for pair in cell["pairs"]]


def read(path: str) -> models.Bundle:
    return models.read_bundle(Path(path))


def write(path: str, bundle: models.Bundle, **changed: Any) -> None:
    """Save a bundle of which some parts are changed."""
    models.save_bundle(Path(path), bundle.model_copy(update=changed))


def equal(first: Any, second: Any) -> bool:
    """Whether two bundles, or nests of containers and tensors, are equal to the bit."""
    if isinstance(first, models.Bundle):
        return equal(first.model_dump(), second.model_dump())
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@contextmanager
def started(command: str) -> Iterator[subprocess.Popen[str]]:
    """`mdpt COMMAND` as a shell starts it: Ctrl-C reaches it and its workers, even under nohup; none is left behind."""
    shell = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", shell, EXECUTABLE, *trusting(command)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@contextmanager
def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C during this gradient step."""
    update = models.Learner.update

    def interrupt(learner: models.Learner, loss: torch.Tensor, now: int, steps: int) -> None:
        update(learner, loss, now, steps)
        if now == step:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(models.Learner, "update", interrupt)
        yield


UNDER_IDQL = "policy toy.toml --guidance toy-idql.guidance.pt"
APART = "--set evaluation.ensemble=none"  # a swap without the columns of ensembles
UNDER = {name: "toy-dql.guidance.pt" if name == "edp" else "toy-idql.guidance.pt" for name in models.POLICIES}
POLICIES = {  # file: how `mdpt policy toy.toml` makes it
    f"toy-{name}.policy.pt": f"--set policy.algorithm={name} --guidance {guidance}" for name, guidance in UNDER.items()
} | {
    "toy-bc-unguided.policy.pt": "--set policy.algorithm=bc --set policy.scheme=unguided",
    "toy-dql-joint.policy.pt": "--set policy.scheme=joint --set guidance.algorithm=dql",
}


@pytest.fixture(scope="module")
def trained(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every kind of bundle has been trained through the command line, under its default name."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_toy_data(folder / "toy.hdf5")
        (folder / "toy.toml").write_text(TOY)
        for name in ("idql", "dql"):
            run(f"guidance toy.toml --set guidance.algorithm={name}" + (" --seeds 8,9" if name == "dql" else ""))
        for file, options in POLICIES.items():
            result = run(f"policy toy.toml {options}")
            judge = ("a", " --infer-guidance toy-idql.guidance.pt") if "unguided" in options else ("its", "")
            what = f"next, with candidates ranked by {judge[0]} guidance, beside one sample"
            command = f"mdpt evaluate {file} --import conftest{judge[1]}"
            assert result.stdout.endswith(f"\nwrote {file}\n{what}: {command}\n")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of what has been trained."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "1000")  # which breaks no line
    return tmp_path


# -------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["--help", "swap --help"])
def test_help_loads_nothing_heavy(command: str) -> None:
    show = "import sys\nfrom mdpt.mdpt import app\ntry: app()\nfinally: print('loaded', *sys.modules)"
    said = subprocess.run([sys.executable, "-c", show, *command.split()], capture_output=True, text=True, check=True)
    loaded = set(said.stdout.split("\nloaded ")[1].split())
    heavy = {"numpy", "h5py", "torch", "gymnasium", "scipy", "matplotlib", "joblib", "PIL", "mdpt.data", "mdpt.models"}
    assert not heavy & loaded and ("swap" in command or "pydantic" not in loaded)  # typer reads options by pydantic


def test_version_is_that_of_pyproject() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version").stdout == f"mdpt {version}\n"
    assert set(COMMANDS) == {"guidance", "policy", "evaluate", "swap"}
    assert all(re.search(rf"^ +{command} ", run("").stdout, re.MULTILINE) for command in COMMANDS)
    assert all("--timeout" in {name for option in each.params for name in option.opts} for each in COMMANDS.values())


def test_files_of_the_users_own_are_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "mdpt").mkdir()
    for name in ("data.py", "models.py", "mdpt/data.py"):
        (tmp_path / name).write_text("raise SystemExit('not mine')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [EXECUTABLE, "--version"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout
    assert said.startswith(b"mdpt ")


def test_guidance_tells_its_quality_and_what_comes_next(folder: Path) -> None:
    result = run("guidance toy.toml --out g.pt")
    assert result.stdout.endswith("wrote g.pt\nnext: mdpt policy toy.toml --guidance g.pt\n")
    varied = "--seeds 8 --set policy.hidden=[8] --set guidance.tau=0.1 --set data.seed=3 --set name=new"
    repeated = "--set 'policy.hidden=[8]' --set data.seed=3 --set name=new --seeds 8"  # what `policy` reads
    said = run(f"guidance toy.toml --out h.pt {varied}").stdout
    assert said.endswith(f"next: mdpt policy toy.toml --guidance h.pt {repeated}\n")
    options = "--set name=new --set guidance.tau=0.1 --seeds 3"
    said = run(f"policy toy.toml {options} --set policy.algorithm=bc --set policy.scheme=unguided").stdout
    first = f"mdpt guidance toy.toml {options} && mdpt evaluate new-bc-unguided.policy.pt"
    assert said.endswith(f": {first} --import conftest --infer-guidance new-idql.guidance.pt\n")
    *_, quality = read("g.pt").quality
    for row, seed in enumerate((0, 1)):
        assert re.search(rf"│ {seed} +│ +{quality.correlation[row]:.3f} │", result.stdout)
    assert quality.rows > 0 and f"{quality.rows} held-out transitions" in result.stdout


def test_progress_is_plain_lines_where_there_is_no_terminal(folder: Path) -> None:
    lines = [line for line in run("guidance toy.toml --out g.pt").stderr.splitlines() if "warning" not in line]
    assert lines.pop(0).startswith("V will have grown to at least 0 % of the returns")
    assert len(lines) == 10
    for i, line in enumerate(lines):
        assert re.fullmatch(rf"guidance idql: {2 * i + 2}/20  loss [\d.e+-]+, \d+ steps/s  \d+ s left", line)


def test_every_policy_is_evaluated(folder: Path) -> None:
    """The report's figures follow from its episodes, recomputed here from the definitions."""
    report, _ = play(f"evaluate {' '.join(POLICIES)}")
    guided = [policy for policy in POLICIES if "unguided" not in policy]
    acting = [(cell["policy"], cell["protocol"]["candidates"]) for cell in report["cells"]]
    assert acting == [(policy, 4 if policy in guided else 1) for policy in POLICIES] + [(name, 1) for name in guided]
    for cell, entry in zip(report["cells"], report["summary"], strict=True):
        assert [pair["policy_seed"] for pair in cell["pairs"]] == [0, 1]
        each = np.array(returns(cell))
        assert each.shape == (2, 3) and [len(pair["lengths"]) for pair in cell["pairs"]] == [3, 3]
        low, high = sorted(float(value) - 10 for value in each.mean(1))  # [10, 110] is [0, 100]
        for pair, row in zip(cell["pairs"], each, strict=True):
            assert pair["return"] == pytest.approx(row.mean()) and pair["score"] == pytest.approx(row.mean() - 10)
            assert pair["length"] == pytest.approx(np.mean(pair["lengths"])) and max(pair["lengths"]) <= 6
        middle, spread = (low + high) / 2, high - low
        expected = {"median": middle, "iqr": spread / 2, "mean": middle, "std": spread / np.sqrt(2)}
        assert {key: entry["summary"][key] for key in expected} == pytest.approx(expected)
        assert entry["summary"]["range"] == pytest.approx([low, high])
        assert entry["summary"]["iqm"] is entry["summary"]["iqm_interval"] is None  # of two members it is their mean
        assert (cell["protocol"]["guidance"] is None) == (cell["protocol"]["candidates"] == 1)
        bundle = read(cell["policy"])
        assert cell["accounting"] == bundle.accounting.model_dump()
        assert cell["dataset"]["hash"] == bundle.dataset.hash
        assert cell["versions"] == bundle.versions.model_dump() | {"played_with": data.version()}


def test_the_table_holds_the_figures_of_the_report(folder: Path) -> None:
    report, stdout = play("evaluate toy-dql.policy.pt")
    acts, one = report["cells"]
    assert returns(one) == returns(evaluate("toy-dql.policy.pt --infer-guidance none")) != returns(acts)
    for pair, other in zip(acts["pairs"], one["pairs"], strict=True):
        figures = rf"{pair['score']:.1f} │ +{other['score']:.1f} │ +{pair['return']:.1f} │ +{pair['length']:.0f}"
        assert re.search(rf"│ {pair['policy_seed']} +│ +{figures} │", stdout)
    for name in ("median", "IQR", "mean", "std"):
        both = " │ +".join(f"{entry['summary'][name.lower()]:.1f}" for entry in report["summary"])
        assert re.search(rf"│ {name} +│ +{both} │", stdout), name
    assert "IQM" not in stdout
    low, high = report["summary"][0]["summary"]["range"]
    assert re.search(rf"│ range +│ +{low:.1f} \.\. {high:.1f} │", stdout)
    with h5py.File("toy.hdf5") as file:
        ends = np.flatnonzero(file["terminals"][()] | file["timeouts"][()]) + 1
        episodes = np.add.reduceat(file["rewards"][()].astype(float), np.concatenate([[0], ends[:-1]]))
    for name, value in (("mean", episodes.mean()), ("best", episodes.max())):
        assert re.search(rf"│ data {name} +│ +{value - 10:.1f} │ +{value - 10:.1f} │", stdout), name
    line = "conftest:Gentle-v0, 2 members x 3 episodes, seed 0, max of 4 by its own idql guidance, temperature 1"
    assert f"\n{line}, last weights" in stdout and stdout.endswith("wrote report.json\n")


def test_several_policies_are_compared(folder: Path) -> None:
    (folder / "me@work").mkdir()
    shutil.copy("toy-cfg.policy.pt", "me@work/cfg.pt")
    files = ["toy-dql.policy.pt", "toy-dql.policy.pt@10", "me@work/cfg.pt", "toy-bc-unguided.policy.pt"]
    report, stdout = play(f"evaluate {' '.join(files)} --episodes 2")
    cells = {cell["policy"]: cell for cell in report["cells"][:4]}
    assert list(cells) == files and [cell["policy"] for cell in report["cells"][4:]] == files[:3]  # one sample
    for cell, entry in zip(report["cells"], report["summary"], strict=True):
        acting = "one sample" if cell["guidance"] == "none" else "best of 4"
        figures = rf"{entry['summary']['median']:.1f} │ +{entry['summary']['iqr']:.1f} │ +{entry['length']:.0f}"
        assert re.search(rf"│ {entry['policy']} +│ {acting} +│ +{figures} │", stdout)
        assert entry["length"] == pytest.approx(np.mean([pair["length"] for pair in cell["pairs"]]))
    for first, second in combinations(files, 2):
        ours, theirs = pair_scores(cells[first]), pair_scores(cells[second])
        wins = stats.mannwhitneyu(ours, theirs).statistic / (len(ours) * len(theirs))
        assert re.search(rf"│ {first} +│ {second} +│ +{wins:.2f} │", stdout)
    for file in files:  # none disturbs the other
        assert f"\n{file}: conftest:Gentle-v0, 2 members x 2 episodes" in stdout
    assert evaluate(f"{files[2]} --episodes 2")["pairs"] == cells[files[2]]["pairs"]


def test_scores_depend_on_the_seed_alone(folder: Path) -> None:
    first, again, more = (evaluate(f"toy-dql.policy.pt{options}") for options in ("", "", " --episodes 5"))
    assert again == first
    for row, longer in zip(returns(first), returns(more), strict=True):
        assert longer[:3] == pytest.approx(row, abs=1e-3)  # up to the rounding of wider products
    other = evaluate("toy-dql.policy.pt --seed 7")
    assert other["protocol"]["seed"] == 7 and returns(other) != returns(first)
    assert [pair["lengths"] for pair in other["pairs"]] != [pair["lengths"] for pair in first["pairs"]]  # other starts


@pytest.mark.slow
def test_scores_are_the_same_bits_for_any_number_of_workers(folder: Path) -> None:
    for workers in (1, 2, 3):
        run(f"evaluate {' '.join(POLICIES)} --episodes 11 --workers {workers} --json {workers}.json")
    assert len({Path(f"{workers}.json").read_bytes() for workers in (1, 2, 3)}) == 1


def test_settings_of_an_evaluation_act(folder: Path) -> None:
    plain = evaluate("toy-cfg.policy.pt")
    for settings, protocol in (
        ({"episodes": 2, "selection": "softmax", "weight_temperature": 3.0, "temperature": 0.5, "candidates": 6}, {}),
        ({"guide": "gradient", "guidance_weight": 2.0}, {"candidates": 1}),
        ({"guide": "both", "guidance_weight": 2.0, "w": 3.0}, {}),
    ):
        changed = evaluate("toy-cfg.policy.pt" + "".join(f" --set evaluation.{k}={v}" for k, v in settings.items()))
        assert changed["protocol"] == plain["protocol"] | {"guidance_weight": 0.0} | settings | protocol
        assert [row[: changed["protocol"]["episodes"]] for row in returns(plain)] != returns(changed)


def test_settings_that_cannot_act_are_told(folder: Path) -> None:
    for command, options, idle in (
        ("toy-dql.policy.pt --infer-guidance none", "--candidates 4", ["candidates"]),
        ("toy-cfg.policy.pt", "--set evaluation.guidance_weight=2", ["guidance_weight"]),
        ("toy-dql.policy.pt", "--set evaluation.w=2", ["w"]),
    ):
        report, stdout = play(f"evaluate {command} {options}")
        cell = report["cells"][0]
        assert cell["protocol"]["no_effect"] == idle and f"without effect here: {idle[0]}\n" in stdout
        assert cell["pairs"] == evaluate(command)["pairs"]


def test_another_guidance_or_none_acts(folder: Path) -> None:
    plain = returns(evaluate("toy-cfg.policy.pt"))
    for guidance, candidates in (("none", 1), ("toy-dql.guidance.pt", 4), ("toy-dql-joint.policy.pt@10", 4)):
        cell = evaluate(f"toy-cfg.policy.pt --infer-guidance {guidance}")
        assert cell["protocol"]["guidance"] == (None if guidance == "none" else guidance)
        assert cell["protocol"]["candidates"] == candidates and returns(cell) != plain


def test_snapshots_have_names(folder: Path) -> None:
    last, middle = evaluate("toy-dql.policy.pt@last"), evaluate("toy-dql.policy.pt@10")
    assert (middle["step"], last["step"]) == (10, 20)
    assert returns(last) == returns(evaluate("toy-dql.policy.pt")) != returns(middle)
    assert "weights of step 10 of 20 (online" in run("evaluate toy-dql.policy.pt@10 --workers 1").stdout
    assert returns(last) == returns(evaluate("toy-dql.policy.pt@20"))
    joint, middle = read("toy-dql-joint.policy.pt"), read("toy-dql-joint.policy.pt@10")
    for whole, part in ((joint, middle), (joint.guidances[0], middle.guidances[0])):  # its guidance of that step, too
        kept = whole.snapshots[10]
        assert part.step == 10 and equal({name: part.weights[name] for name in kept}, kept)
        assert not equal(part.weights, whole.weights)
        assert {name.split(".")[0] for name in kept} <= {"average", "target_q", "value"}  # those that act


def test_curve(folder: Path) -> None:
    report, stdout = play("evaluate toy-dql.policy.pt toy-cfg.policy.pt --curve")
    names = [(cell["policy"], cell["step"]) for cell in report["cells"]]
    assert names == [(f"toy-{name}.policy.pt@{step}", step) for name in ("dql", "cfg") for step in (10, 20)]
    assert returns(report["cells"][1]) == returns(evaluate("toy-dql.policy.pt"))
    even = [np.mean([row[::2] for row in returns(cell)]) - 10 for cell in report["cells"]]
    for first, choice in zip((0, 2), report["choices"], strict=True):  # one of two snapshots, by episodes 0 and 2
        entries, place = report["summary"][first : first + 2], first + int(np.argmax(even[first : first + 2]))
        chosen, odd = report["cells"][place], [row[1] - 10 for row in returns(report["cells"][place])]
        assert (choice["policy"], choice["snapshots"], choice["mean"]) == (
            chosen["policy"],
            2,
            pytest.approx(even[place]),
        )
        assert choice["summary"]["mean"] == pytest.approx(np.mean(odd)) and choice["summary"]["members"] == 2
        assert choice["summary"]["std"] == pytest.approx(np.std(odd, ddof=1))
        last = np.mean([row[1] for row in returns(report["cells"][first + 1])]) - 10
        assert f"{choice['policy']}, which has the best mean ({even[place]:.1f}) over" in stdout
        assert (
            f"on the odd ones mean {np.mean(odd):.1f}, " in stdout and f"(the last snapshot: mean {last:.1f})" in stdout
        )
        for entry in entries:
            notes = ["chosen"] * (entry["policy"] == choice["policy"]) + ["last"] * (entry["step"] == 20)
            figures = rf"{entry['summary']['median']:.1f} │ +{entry['summary']['iqr']:.1f} │ +{entry['length']:.0f}"
            assert re.search(rf"│ {entry['policy']} +│ {', '.join(notes)} +│ +{figures} │", stdout)
    mean = report["cells"][0]["dataset"]["mean_score"]
    assert re.search(rf"│ data mean +│ +│ +{mean:.1f} │", stdout)
    assert (
        "chosen" not in run("evaluate toy-dql.policy.pt --curve --episodes 1 --workers 1").stdout
    )  # none is left to score
    assert re.search(r"│ toy-dql.policy.pt@20 +│ toy-cfg.policy.pt@20 +│ +\d", stdout) and "…" not in stdout


def test_describe_tells_lineage_and_history_without_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "rollout", None)
    out = run("evaluate toy-edp.policy.pt --describe").stdout
    for text in (
        *("toy-edp.policy.pt: policy", "edp, guidance-first", "network=mlp", "eta=1.0", "20 of 20", "@10, @20"),
        *("toy-edp.policy.pt: guidance", "dql guidance, step 20, seeds 8, 9", "expectile=0.7", "conftest:Gentle-v0"),
        *(read("toy-edp.policy.pt").dataset.hash[:16], "noise_loss", "q_loss"),
    ):
        assert text in out, text
    assert "idql" in run("evaluate toy-idql.guidance.pt --describe").stdout
    joint = run("evaluate toy-dql-joint.policy.pt --describe").stdout
    assert joint.count("20 of 20") == 2 and "dql guidance, step 20" in joint  # its guidance took the policy's steps
    run(f"{UNDER_IDQL} --set policy.guidance_until=0.5 --out half.pt")
    assert "policy_q" in run("evaluate half.pt --describe").stdout  # though this metric ended early


def test_an_environment_that_hangs_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr("conftest.Gentle.step", lambda *_: hanging.wait(60))
    command = "evaluate toy-dql.policy.pt --workers 1 --timeout 0.2"
    fail(command, "conftest:Gentle-v0", "episode 0", "step 1", "0.2 s", "--timeout")
    hanging.set()


# -------------------------------------------------------------------------------------------------- swap


def test_a_module_is_imported_for_a_bundle_only_if_the_user_names_it(folder: Path) -> None:
    bundle = read("toy-dql.policy.pt")
    Path("stranger.py").write_text("open('ran', 'w')")
    for name, module in (("stranger:X-v0", "stranger"), ("GymV21Environment-v0", "shimmy")):
        elsewhere = {"environment": replace(bundle.environment, id=name)}
        inner = [each.model_copy(update=elsewhere) for each in bundle.guidances]
        write("p.pt", bundle, guidances=inner, **elsewhere)
        for command in ("evaluate p.pt", "swap p.pt", "evaluate p.pt --video a.gif"):
            fail(command, "p.pt", name, f"--import {module}")
    assert not Path("ran").exists() and not Path("a.gif").exists()


def test_swap_crosses_all_members(folder: Path) -> None:
    run("guidance toy.toml --seeds 1,2,3 --out three.pt")
    result = run("swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --guidance three.pt --workers 1 --json r.json")
    report, stdout = json.loads(Path("r.json").read_text()), result.stdout
    own, none, same, three, *ensembles = report["cells"]
    assert [cell["guidance"] for cell in report["cells"]] == [
        "its own",
        "none",
        "toy-idql.guidance.pt",
        "three.pt",
        *(f"{name} (mean of {count})" for name, count in (("toy-idql.guidance.pt", 2), ("three.pt", 3), ("all", 5))),
    ]
    assert [len(cell["pairs"]) for cell in report["cells"]] == [2, 2, 4, 6, 2, 2, 2]
    seeds = [(pair["policy_seed"], pair["guidance_seed"]) for pair in three["pairs"]]
    assert seeds == [(i, j) for i in (0, 1) for j in (1, 2, 3)]
    for pair in three["pairs"]:
        assert pair["score"] == pytest.approx(np.mean(pair["returns"]) - 10) and len(pair["lengths"]) == 3
    for options, cell in (("", own), (" --infer-guidance none", none)):  # the rollouts of `evaluate`
        assert evaluate(f"toy-dql.policy.pt{options}") == cell
    assert returns(own) == [returns(same)[0], returns(same)[3]]
    groups = [(entry["guidance"], entry["seeds"], entry["pairs"]) for entry in report["summary"]]
    assert groups == [
        ("its own", "same seed", 2),
        ("none", "all", 2),
        *[("toy-idql.guidance.pt", name, count) for name, count in (("same seed", 2), ("other seeds", 2), ("all", 4))],
        *[("three.pt", name, count) for name, count in (("same seed", 1), ("other seeds", 5), ("all", 6))],
        *[(cell["guidance"], "all", 2) for cell in ensembles],
    ]
    for entry in report["summary"]:
        name, summary = rf"│ {re.escape(entry['guidance'])} +│ +{entry['seeds']} +│ +", entry["summary"]
        first = " │ +".join(cli.number(summary[key]) for key in ("median", "iqr"))
        assert re.search(rf"{name}{first} │ +{entry['length']:.0f} │", stdout)
        second = " │ +".join([cli.interval_text(summary["range"]), cli.number(summary["mean"])])
        assert re.search(name + second, stdout)
    assert re.search(rf"│ data mean +│ +│ +{own['dataset']['mean_score']:.1f} │", stdout)
    scores = np.array(pair_scores(three)).reshape(2, 3)
    parts, best = report["components"][1], int(scores.mean(0).argmax())
    assert parts["best_guidance"] == {"seed": best + 1, "mean": pytest.approx(scores[:, best].mean())}
    assert f"guidance {best + 1} is best over all policies: mean {scores[:, best].mean():.1f} (online" in stdout
    assert f"{parts['std']['guidance']['std']:.1f} from the guidance" in stdout
    assert "an ensemble is shared by all members" in stdout
    shared = {each["guidance"]: each for each in report["spreads"] if each["over"] == cli.SHARED}
    assert list(shared) == ["toy-idql.guidance.pt", "three.pt"]  # the control: two policies under one guidance member
    assert shared["three.pt"]["iqr"] == pytest.approx(np.abs(scores[0] - scores[1]).mean() / 2)
    assert shared["three.pt"]["std_change"] == pytest.approx(
        np.abs(scores[0] - scores[1]).mean() / 2**0.5 - np.std(pair_scores(own), ddof=1)
    )
    assert "7 of 7 cells to play, members paired each with each: 60 rollouts\n" in result.stderr


def test_swap_compares_with_the_guidance_of_training(folder: Path) -> None:
    dql, bc, guidance = "toy-dql.policy.pt", "toy-bc-unguided.policy.pt", "toy-dql.guidance.pt"
    report, _ = play(f"swap {dql} {bc} --guidance {guidance} {APART}")
    cells = {(cell["policy"], cell["guidance"]): np.array(pair_scores(cell)) for cell in report["cells"]}
    assert list(cells) == [(dql, "its own"), (dql, "none"), (dql, guidance), (bc, "none"), (bc, guidance)]
    for entry in report["summary"]:
        baseline, values = (
            cells[entry["policy"], name]
            for name in ("its own" if entry["policy"] == dql else "none", entry["guidance"])
        )
        change = entry["change"]
        assert (change is None) == (values is baseline)
        if change is not None:
            assert change["median"] == pytest.approx(np.median(values) - np.median(baseline))
            wins = stats.mannwhitneyu(values, baseline).statistic / (len(values) * len(baseline))
            assert change["improvement"] == pytest.approx(wins)


def make_results(cells: dict[tuple[str, str], Any]) -> list[cli.Result]:
    """Results of cells (policy, guidance) with scores (S, E), as if they had been played."""
    cell = cli.read_cell(Path("toy-dql.policy.pt"), None, [])
    result = cli.make_result(cell, data.Played(np.zeros(6), np.ones(6), np.full(6, np.nan)), "default")
    results = []
    for (policy, guidance), scores in cells.items():
        pairs = [
            cli.Pair(i, i, i, row.mean(), row.mean(), 1.0, row.tolist(), [1] * len(row), None, None)
            for i, row in enumerate(scores)
        ]
        protocol = replace(result.protocol, reference=(0.0, 100.0), episodes=scores.shape[1])
        results.append(replace(result, policy=policy, guidance=guidance, pairs=pairs, protocol=protocol))
    return results


def test_spreads_over_members_episodes_and_snapshots(folder: Path) -> None:
    random, names = np.random.default_rng(1), ("its own", "none", "g.pt@10", "g.pt@20")
    scores = {("p.pt", name): random.normal(50, 4 + 3 * i, (6, 5)) for i, name in enumerate(names)}
    results = make_results(scores)
    spreads = cli.compare_spreads(results, cli.compare_results(results), together=False)
    found = {(each.guidance, each.over): each for each in spreads}
    assert list(found)[-1] == ("g.pt", "snapshots") and len(found) == 9
    own, tests = scores["p.pt", "its own"], []
    for name in names:
        each, (table, by_members) = found[name, "episodes"], (scores["p.pt", name], found[name, "members"])
        iqr, std = stats.iqr(table, axis=1), table.std(1, ddof=1)
        assert (each.iqr, each.std) == pytest.approx((np.median(iqr), np.median(std)))
        assert (by_members.iqr, by_members.std) == pytest.approx((stats.iqr(table.mean(1)), table.mean(1).std(ddof=1)))
        if name == "its own":
            assert each.p is each.std_change is by_members.p is None
            continue
        before = stats.iqr(own, axis=1), own.std(1, ddof=1)
        assert each.iqr_change == pytest.approx(np.median(iqr - before[0]), abs=1e-6)
        assert each.p == pytest.approx(stats.wilcoxon(std, before[1]).pvalue)
        tests.append((each.p, each.p_holm))
    least, middle, *_ = sorted(tests)
    assert [least[1], middle[1]] == pytest.approx([min(1, 3 * least[0]), min(1, max(3 * least[0], 2 * middle[0]))])
    means = [scores["p.pt", name].mean(1) for name in names[2:]]
    assert found["g.pt", "snapshots"].std == pytest.approx(np.median(np.abs(means[0] - means[1])) / 2**0.5)
    *_, table = cli.swap_tables(results, cli.compare_results(results), spreads)
    assert "corrected (Holm) for the tests here: 3 over members, 3 over episodes" in str(table.caption)
    one = cli.compare_spreads(results[:1], cli.compare_results(results[:1]), together=False)
    assert [each.over for each in one] == ["members", "episodes"]


def test_changes_over_snapshots_are_paired_by_member(folder: Path) -> None:
    random = np.random.default_rng(2)
    cells = product(("p.pt@10", "p.pt", "p.pt@30"), ("its own", "none"))
    scores = {(policy, name): random.normal(50, 9 if name == "none" else 3, (7, 2)) for policy, name in cells}
    results = make_results(scores)
    spreads = cli.compare_spreads(results, cli.compare_results(results), together=True)
    own, none = [each for each in spreads if each.over == "snapshots"]
    assert (own.policy, own.guidance, own.p) == ("p.pt", "its own", None) and none.guidance == "none"
    theirs, ours = (
        np.std([scores[policy, name].mean(1) for policy, each in scores if each == name], axis=0, ddof=1)
        for name in ("none", "its own")
    )
    assert none.std_change == pytest.approx(np.median(theirs - ours), abs=1e-6)
    assert none.p == none.p_holm == pytest.approx(stats.wilcoxon(theirs, ours).pvalue)
    episodes = [each for each in spreads if each.p is not None and each.over == "episodes"]
    assert [each.p_holm for each in episodes] == cli.holm([each.p or 0 for each in episodes])  # of all, in one table
    names = {"a@b/p.pt": "a@b/p.pt", "p.pt@3": "p.pt", "p.pt@last": "p.pt", "p.pt@3#7": "p.pt#7", "p.pt#7": "p.pt#7"}
    assert {name: cli.file_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("members", "said"), [(3, "no intervals below 5 members"), (5, "intervals are for new members and start states")]
)
def test_few_members_have_a_range_and_five_have_intervals(folder: Path, members: int, said: str) -> None:
    scores = np.random.default_rng(0).normal(50, 20, (2, 5, 1)) + [-5.0, 5.0]
    cells = zip(("its own", "g.pt"), scores[:, :members], strict=True)
    results = make_results({("p.pt", name): rows for name, rows in cells})
    comparisons = cli.compare_results(results)
    change = comparisons[1].change
    few = members < 5
    assert change is not None and (change.iqr_percent is None) == few
    assert (comparisons[1].summary.iqm_interval is None) == (change.intervals is None) == few
    *_, row = cli.swap_tables(results, comparisons, [])
    assert isinstance(row, str)
    if change.intervals:
        interval = "{:+.0f} .. {:+.0f}".format(*change.intervals["iqr_percent"])
        assert f"IQR {change.iqr:+.1f}, {change.iqr_percent:+.0f} % ({interval}), std" in row
    assert "{:+.1f} .. {:+.1f}".format(*change.range) in row and ("%" in row) == (not few)
    assert len(re.findall(r"\(\S+ \.\. \S+\)", row)) == (0 if few else 3)
    assert cli.swap_line(results).endswith(f", {said}; under none 1 candidate")


def test_swap_chooses_a_snapshot_of_a_guidance(folder: Path) -> None:
    """FILE@all is a column for each snapshot, also for the one that the policy learned under; one is chosen for all."""
    run("guidance toy.toml --set guidance.learning_rate=1.0 --set guidance.snapshots=4 --out g.pt")
    run("policy toy.toml --guidance g.pt --out p.pt")
    report, stdout = play("swap p.pt --guidance g.pt@all --pairs matched")
    names = ["its own", "none", *(f"g.pt@{step}" for step in (5, 10, 15, 20))]
    assert [cell["guidance"] for cell in report["cells"]] == names
    assert returns(report["cells"][0]) == returns(report["cells"][5])
    even = [np.mean([row[::2] for row in returns(cell)]) for cell in report["cells"][2:]]
    (choice,), best = report["choices"], 2 + int(np.argmax(even))
    assert len(set(even)) > 1 and (choice["policy"], choice["guidance"]) == ("p.pt", names[best])
    assert choice["summary"]["mean"] == pytest.approx(np.mean([row[1] for row in returns(report["cells"][best])]) - 10)
    assert f"chosen of 4 snapshots: p.pt under {names[best]}, which has" in stdout
    assert [each["guidance"] for each in report["spreads"] if each["over"] == "snapshots"] == ["g.pt"]
    crossed, _ = play("swap toy-dql.policy.pt --guidance toy-idql.guidance.pt@all --episodes 1")
    assert [len(cell["pairs"]) for cell in crossed["cells"]] == [2, 2, 4, 4] and crossed["choices"] == []
    joint, _ = play("swap toy-dql.policy.pt --guidance toy-dql-joint.policy.pt@all --episodes 1")
    assert [cell["guidance"] for cell in joint["cells"][2:]] == [f"toy-dql-joint.policy.pt@{step}" for step in (10, 20)]
    fail("swap toy-dql.policy.pt --guidance toy-dql.policy.pt@all", "toy-dql.policy.pt@all", "name a guidance bundle")


def test_swap_pairs_members_by_position(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = "toy-dql.policy.pt toy-dql.policy.pt"
    report, _ = play(f"swap {twice} --guidance toy-idql.guidance.pt@10 --pairs matched --episodes 1 {APART}")
    assert [cell["guidance"] for cell in report["cells"]] == ["its own", "none", "toy-idql.guidance.pt@10"]
    assert [(p["policy_seed"], p["guidance_seed"]) for p in report["cells"][2]["pairs"]] == [(0, 0), (1, 1)]
    for options in ("--pairs matched", "--guidance none"):
        cells = play(f"swap toy-dql.policy.pt {options} --episodes 1 {APART}")[0]["cells"]
        assert [cell["guidance"] for cell in cells] == ["its own", "none"]  # each result once
    (cell,) = play("swap toy-bc-unguided.policy.pt --guidance none --episodes 1")[0]["cells"]
    assert cell["pairs"] == evaluate("toy-bc-unguided.policy.pt --infer-guidance none --episodes 1")["pairs"]
    fail("swap toy-dql.policy.pt --guidance none --guidance toy-idql.guidance.pt", "none cannot be combined")
    monkeypatch.setattr(cli, "MANY_ROLLOUTS", 7)  # 2 + 2 + 4 pairs are more
    command = f"swap toy-dql.policy.pt --episodes 1 --workers 1 {APART} --guidance"
    assert "each with each: 8 rollouts" in run(f"{command} toy-idql.guidance.pt --pairs all").stderr
    run("guidance toy.toml --seeds 1,2,3 --out three.pt")  # these can only be crossed
    assert "each with each: 10 rollouts" in run(f"{command} three.pt").stderr
    fail(f"{command} three.pt --pairs matched", "toy-dql.policy.pt", "three.pt", "2 policy", "3 guidance", "one member")


def test_several_guidances_act_as_one(folder: Path) -> None:
    """At inference and as columns of a swap; one member of a file is named by its seed."""
    both = "toy-idql.guidance.pt --infer-guidance toy-dql.guidance.pt"
    fail(f"evaluate toy-dql.policy.pt --infer-guidance {both}", "2 guidances", "ensemble", "mean")
    for rule in ("median", "rank"):
        cell = evaluate(f"toy-dql.policy.pt --infer-guidance {both} --set evaluation.ensemble={rule}")
        named = f"the {rule} of all 4 members of toy-idql.guidance.pt, toy-dql.guidance.pt"
        assert cell["protocol"]["guidance"] == named and cell["guidance_algorithm"] == "dql + idql"
        assert [pair["guidance_seed"] for pair in cell["pairs"]] == [None, None]
    gradient = "--set evaluation.ensemble=rank --set evaluation.guide=both"
    fail(f"evaluate toy-dql.policy.pt {gradient}", "evaluation.ensemble = 'rank'", "gradient")
    fail(f"evaluate toy-dql.policy.pt --infer-guidance none --infer-guidance {both}", "none")

    swap = "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt#1 --guidance toy-dql.guidance.pt"
    report, _ = play(f"{swap} --set evaluation.ensemble=min")
    *_, one, two, part, whole = report["cells"]
    assert [pair["guidance_seed"] for pair in one["pairs"]] == [1, 1]  # one member serves all, and is no ensemble
    assert [cell["guidance"] for cell in (part, whole)] == ["toy-dql.guidance.pt (min of 2)", "all (min of 3)"]
    alone = evaluate("toy-dql.policy.pt --infer-guidance toy-dql.guidance.pt --set evaluation.ensemble=min")
    assert returns(alone) == returns(part) != returns(two)
    single = "--set evaluation.ensemble=none --pairs matched"  # no ensemble, no control
    names = [
        cell["guidance"] for cell in play(f"swap toy-dql.policy.pt --guidance toy-dql.guidance.pt {single}")[0]["cells"]
    ]
    assert names == ["its own", "none", "toy-dql.guidance.pt"]
    report, _ = play("swap toy-dql.policy.pt --guidance toy-dql.guidance.pt --pairs matched")
    *_, joined, control = report["cells"]
    assert (joined["guidance"], control["guidance"]) == ("toy-dql.guidance.pt (mean of 2)", "toy-dql.guidance.pt#8")
    assert [pair["guidance_seed"] for pair in control["pairs"]] == [8, 8]
    assert returns(control) == returns(evaluate("toy-dql.policy.pt --infer-guidance toy-dql.guidance.pt#8"))
    fail("policy toy.toml --guidance toy-idql.guidance.pt#7 --out p.pt", "#7", "the seeds are 0, 1")
    fail("evaluate toy-dql.policy.pt --infer-guidance toy-idql.guidance.pt#1@10", "#1@10", "FILE@STEP#SEED")


def test_an_ensemble_by_position_shares_nothing(folder: Path) -> None:
    """Member i is judged as by an ensemble of the members i alone: in play, offline, in other programs, in a swap."""
    rule, files = "--set evaluation.ensemble=min", ("toy-idql.guidance.pt", "toy-dql.guidance.pt")
    by_position = f"{rule} --set evaluation.ensemble_over=position"
    whole, *parts = (
        f"toy-dql.policy.pt --infer-guidance {files[0]}{one} --infer-guidance {files[1]}{other} {options}"
        for one, other, options in (("", "", by_position), ("#0", "#8", rule), ("#1", "#9", rule))
    )
    cell = evaluate(whole)
    assert cell["protocol"]["guidance"] == f"the min of each position's 2 members of {', '.join(files)}"
    assert returns(cell) == [returns(evaluate(part))[i] for i, part in enumerate(parts)]
    assert returns(cell) != returns(evaluate(whole.replace("position", "all")))
    assert "shared by all" not in run(f"evaluate {whole}").stdout
    offline, *others = (play(f"evaluate {each} --data toy.hdf5")[0]["cells"][0] for each in (whole, *parts))
    assert offline["distance"] == [other["distance"][i] for i, other in enumerate(others)]
    (values,), (theirs, _) = ([list(each["values"].values())[-1] for each in group] for group in ([offline], others))
    assert values["policy"][0] == pytest.approx(theirs["policy"][0])
    states = np.random.default_rng(0).normal(size=(5, 2))
    how = {"ensemble": "min", "ensemble_over": "position"}
    agent = models.load_agent("toy-dql.policy.pt", files, member=1, **how)
    names = [f"{file}#{seed}" for file, seed in zip(files, (1, 9), strict=True)]
    assert (agent(states) == models.load_agent("toy-dql.policy.pt", names, member=1, ensemble="min")(states)).all()

    swap = f"swap toy-dql.policy.pt --guidance {files[0]} --guidance {files[1]} {by_position}"
    *_, one, two, joined = play(swap)[0]["cells"]
    assert [each["guidance"] for each in (one, two)] == [*files] and joined["guidance"] == "all (min of 2 by position)"
    assert returns(joined) == returns(cell)
    run("guidance toy.toml --seeds 1,2,3 --out three.pt")
    wrong = f"evaluate toy-dql.policy.pt --infer-guidance three.pt {by_position}"
    fail(wrong, "2 policy members", "3 members", "evaluation.ensemble_over = 'all'")


def test_eighty_columns_hold_every_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copy("toy-dql.guidance.pt", f"{'antmaze-large-diverse-' * 2}dql.guidance.pt")
    for command in (
        f"swap toy-dql.policy.pt toy-cfg.policy.pt --guidance {'antmaze-large-diverse-' * 2}dql.guidance.pt",
        "evaluate toy-dql.policy.pt toy-bc-unguided.policy.pt",
        "evaluate toy-dql.policy.pt",
        "evaluate toy-dql.policy.pt --curve",
        "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt@all",
        "evaluate toy-dql.policy.pt --data toy.hdf5",
        "evaluate toy-dql.policy.pt --describe",
    ):
        options = " --episodes 1 --workers 1" if "data" not in command and "describe" not in command else ""
        lines = run(command + options).stdout.splitlines()
        assert max(map(len, lines)) <= 80 and "…" not in "".join(lines), command


def test_without_a_reference_scores_are_returns_and_success_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Success is told where an episode lasts six steps; what is never told is a failure."""
    step = conftest.Gentle.step

    def tell(environment: conftest.Gentle, action: Any) -> Any:
        *rest, info = step(environment, action)
        return *rest, info | ({"is_success": True} if environment.state[1] == 6 else {})

    monkeypatch.setattr(conftest.Gentle, "step", tell)
    Path("toy.toml").write_text(TOY.replace("reference = [10, 110]", "").replace('source = "hdf5"', ""))
    run("guidance toy.toml --overwrite")
    run("policy toy.toml --guidance toy-idql.guidance.pt --out p.pt")
    matplotlib.rcParams["svg.fonttype"] = "none"
    report, stdout = play("evaluate p.pt --episodes 4 --plot a.svg")
    for cell, entry in zip(report["cells"], report["summary"], strict=True):
        for pair in cell["pairs"]:
            assert pair["score"] == pair["return"] == pytest.approx(np.mean(pair["returns"]))
            assert pair["successes"] == [float(length == 6) for length in pair["lengths"]]
            assert pair["success"] == pytest.approx(np.mean(pair["successes"]))
        assert entry["success"] == pytest.approx(np.mean([pair["success"] for pair in cell["pairs"]]))
    acts, one = (cell["pairs"][0] for cell in report["cells"])
    figures = rf"{acts['score']:.1f} │ +{one['score']:.1f} │ +{acts['length']:.0f} │ +{acts['success']:.0%} │"
    assert stdout.startswith("return\n") and re.search(rf"│ 0 +│ +{figures}", stdout)
    assert ">return<" in Path("a.svg").read_text() and "score" not in Path("a.svg").read_text()
    told = run("evaluate p.pt --curve --episodes 1 --workers 1 --plot c.svg").stdout
    assert "success" in told and ">success<" in Path("c.svg").read_text()
    assert "scores" not in run("guidance toy.toml --describe-data").stdout


def test_values_of_two_scales_are_ranked(folder: Path) -> None:
    scale = replace(read("toy-idql.guidance.pt").reward_scale, multiplier=3.0)
    write("scaled.pt", read("toy-idql.guidance.pt"), reward_scale=scale)
    mixed = (
        "toy-dql.policy.pt --infer-guidance toy-idql.guidance.pt --infer-guidance scaled.pt --set evaluation.ensemble="
    )
    fail(f"evaluate {mixed}mean", "x 3 +", "no mean", "evaluation.ensemble=rank")
    assert "the rank of all 4" in evaluate(f"{mixed}rank")["protocol"]["guidance"]
    swap = "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --guidance scaled.pt --episodes 1"
    assert play(swap)[0]["cells"][-1]["guidance"] == "all (rank of 4)"
    read_all = {name: [read(name)] for name in ("toy-idql.guidance.pt", "scaled.pt")}
    section = read("toy-dql.policy.pt").experiment.evaluation.model_copy(update={"guide": "gradient"})
    names = [each.name for each in cli.ensembles(read_all, section, "none")]  # a rank has no gradient
    assert names == ["toy-idql.guidance.pt (mean of 2)", "scaled.pt (mean of 2)"]


def test_several_guidances_teach_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teach = "policy toy.toml --guidance toy-idql.guidance.pt --guidance toy-dql.guidance.pt"
    with monkeypatch.context() as patch:  # before hours of collecting
        patch.setattr(cli, "load_data", lambda *_: pytest.fail("loaded data"))
        if not torch.cuda.is_available():
            fail("guidance toy.toml --out g.pt --device cuda", "device cuda", "--device cpu")
        fail(f"{teach} --out p.pt", "2 guidances", "policy.ensemble", "to mean, median or min")
        three = "policy toy.toml --guidance toy-idql.guidance.pt --seeds 0,1,2 --out p.pt"
        fail(three, "3 policy members", "2 guidance")
    fail(f"{teach} --set policy.ensemble=rank --out p.pt", "[policy] ensemble", "'rank'")
    fail("policy toy.toml --set policy.scheme=joint --set policy.ensemble=mean", "ensemble 'mean'", "guidance-first")
    run(f"{teach} --set policy.ensemble=mean --out taught.pt")
    teachers = [read(f"toy-{name}.guidance.pt") for name in ("idql", "dql")]
    assert equal(read("taught.pt").guidances, [in_lineage(each) for each in teachers])
    cell = evaluate("taught.pt")
    assert cell["protocol"]["guidance"].startswith("the mean of all 4 members of its own dql + idql")
    report, _ = play("swap taught.pt --guidance taught.pt --episodes 1")  # which it acts by anyhow
    assert [cell["guidance"] for cell in report["cells"]] == ["its own", "none"]
    described = run("evaluate taught.pt --describe").stdout
    assert "idql guidance, step 20, seeds 0, 1" in described and "dql guidance, step 20" in described


def test_swap_takes_the_policies_own_guidance_by_default(folder: Path) -> None:
    # the first has none, the third the same as the second
    files = ["toy-bc-unguided.policy.pt", "toy-dql.policy.pt", "toy-cfg.policy.pt"]
    report, _ = play(f"swap {' '.join(files)} --episodes 1 --candidates 2 --seed 3 {APART}")
    names = [(cell["policy"], cell["guidance"]) for cell in report["cells"]]
    guidances = [("none", files[1]), *[("its own", "none", files[1])] * 2]
    assert names == [(policy, guidance) for policy, row in zip(files, guidances, strict=True) for guidance in row]
    for cell in report["cells"]:  # an unguided policy may draw candidates, too
        expected = {"episodes": 1, "candidates": 1 if cell["guidance"] == "none" else 2, "seed": 3}
        assert {key: cell["protocol"][key] for key in expected} == expected


def test_policies_that_are_evaluated_differently_are_not_compared(folder: Path) -> None:
    guidance, experiment = "--guidance toy-idql.guidance.pt", read("toy-cfg.policy.pt").experiment
    for name, table, changed in (
        ("seven.pt", "evaluation", {"candidates": 7, "w": 3.0}),
        ("other.pt", "data", {"reference": (0.0, 1.0)}),
    ):
        section = getattr(experiment, table).model_copy(update=changed)
        update = {"reference": (0.0, 1.0)} if table == "data" else {}
        write(name, read("toy-cfg.policy.pt"), experiment=experiment.model_copy(update={table: section}), **update)
    for command in (f"swap toy-cfg.policy.pt seven.pt {guidance}", "evaluate toy-cfg.policy.pt seven.pt"):
        fail(command, "toy-cfg.policy.pt", "seven.pt", "candidates 4 against 7", "settings")
    report, stdout = play(f"swap toy-cfg.policy.pt seven.pt {guidance} --candidates 2 --episodes 1")
    assert {cell["protocol"]["candidates"] for cell in report["cells"] if cell["guidance"] != "none"} == {2}
    assert "; under none 1 candidate; w of policies with labels 1 or 3\n" in stdout
    fail(f"swap toy-cfg.policy.pt other.pt {guidance}", "reference [10.0, 110.0] against [0.0, 1.0]")


def test_swap_judges_a_foreign_algorithm_by_the_stronger_of_the_two(folder: Path) -> None:
    run("policy toy.toml --guidance toy-dql.guidance.pt --set policy.algorithm=edp --out home.pt --seeds 8,9")
    report, stdout = play(f"swap toy-dql.policy.pt home.pt --guidance toy-dql.guidance.pt {APART}")
    middle = {(c["policy"], c["guidance"]): float(np.median(pair_scores(c))) for c in report["cells"]}
    value = middle["toy-dql.policy.pt", "toy-dql.guidance.pt"]
    home = {policy: middle[policy, "its own"] for policy in ("toy-dql.policy.pt", "home.pt")}
    stronger = max(home, key=lambda policy: home[policy])
    (line,) = report["verdicts"]  # home.pt grew under that algorithm itself: nothing to judge
    assert line in stdout.splitlines() and line.startswith("toy-dql.policy.pt under toy-dql.guidance.pt (dql): ")
    assert f"median {value:.1f}, " in line and f"{stronger} under its own" in line
    assert line.endswith(f": {home[stronger]:.1f} ({value - home[stronger]:+.1f})")


# ----------------------------------------------------------------------------- playing that was cut short


CUT = [
    "evaluate toy-dql.policy.pt toy-dql.policy.pt@10 toy-bc-unguided.policy.pt --candidates 2",
    f"swap toy-dql.policy.pt toy-bc.policy.pt --guidance toy-idql.guidance.pt {APART} --candidates 2",
]


INTERRUPTED = "\nmdpt: interrupted; the same command goes on\n"


def test_what_getting_data_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def collect(section: object, workers: object, show: data.Show, **_: Any) -> None:
        for _ in range(2):
            show("wait for process 7", 0, 0)
        show("collect", 1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load_dataset", collect)
    with pytest.raises(data.Interrupted, match="^interrupted; the same command goes on$"):
        cli.load_data(data.DataSection(), data.Workers())
    waits, collects = capsys.readouterr().err.splitlines()
    assert waits == "wait for process 7 ..." and collects.startswith("collect: 1/2")


def test_playing_goes_on_where_it_was_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, count = f"{CUT[0]} --episodes 1 --workers 1", 5
    run(f"{command} --json whole.json")
    make, played = cli.make_result, []

    def breaks(cell: cli.Cell, *rest: Any) -> cli.Result:
        if len(played) == 3:
            signal.raise_signal(signal.SIGTERM)
        played.append(cell.policy)
        return make(cell, *rest)

    monkeypatch.setattr(cli, "make_result", breaks)
    assert run(f"{command} --json part.json", code=143).stderr.endswith(INTERRUPTED)
    assert not list(folder.glob(".*"))
    assert len(json.loads(Path("part.json").read_text())["cells"]) == 3
    monkeypatch.setattr(cli, "make_result", make)
    assert f"{count - 3} of {count} cells to play" in run(f"{command} --json part.json").stderr
    assert Path("part.json").read_bytes() == Path("whole.json").read_bytes()
    Path("old.svg").touch()
    said = run(
        f"{command} --json part.json --plot old.svg --overwrite"
    ).stderr  # replaces the picture, plays nothing again
    assert f"0 of {count} cells to play" in said and Path("part.json").read_bytes() == Path("whole.json").read_bytes()
    fail(f"{command} --json part.json --seed 5", "part.json", "other evaluation", "--overwrite")
    write("toy-dql.policy.pt", read("toy-dql.policy.pt"), seeds=[5, 6])
    fail(f"{command} --json part.json", "part.json", "other bundles", "--overwrite")
    assert f"{count} of {count} cells" in run(f"{command} --json part.json --overwrite").stderr


def test_a_report_of_an_older_mdpt_is_read(folder: Path) -> None:
    """One that lacks what is new, and has what is gone: intervals of the median, of the IQR and of components."""
    report, _ = play("swap toy-dql.policy.pt --guidance toy-idql.guidance.pt")
    del report["spreads"], report["choices"]
    for section in report["settings"]["evaluation"]:
        del section["ensemble_over"]
    for cell in report["cells"]:
        del cell["protocol"]["ensemble_over"]
    for entry in report["summary"]:
        entry["summary"] |= {"iqm": 1.0, "iqm_interval": [0.0, 2.0]}
        if change := entry["change"]:
            del change["mean"], change["std_percent"]
            change |= {"intervals": {"median": [0.0, 1.0], "iqr": [0.0, 1.0]}, "iqr_percent": 5.0}
            change |= {"iqr_percent_by_chance": [-50.0, 90.0]}
    report["components"][0]["std"]["guidance"]["interval"] = [0.0, 1.0]
    found = cli.schema().validate_json(json.dumps(report))
    assert found.cells[0].protocol.ensemble_over == found.settings.evaluation[0].ensemble_over == "all"
    assert found.components[0].std["guidance"].interval == (0, 1) and found.spreads is found.choices is None
    Path("old.json").write_text(json.dumps(report))
    again = "swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --workers 1 --json old.json"
    assert "0 of 4 cells to play" in run(again).stderr  # goes on with it


def edits(report: dict[str, Any]) -> Iterator[str]:
    """Trim and edit a report in many ways, one at a time; says which is on."""
    cell, pair = report["cells"][0], report["cells"][0]["pairs"][0]
    parts = (report, report["settings"], cell, cell["protocol"], pair, cell["dataset"], cell["accounting"])
    values = (None, "x", float("nan"))
    wrong = [(part, key, value) for part in parts for key in part for value in values]
    wrong += [(pair, "policy_seed", 7), (pair, "guidance_seed", 1), (pair, "score", 99.0), (cell, "policy", "q.pt")]
    wrong += [(pair, "returns", [*pair["returns"], 1.0]), (cell, "pairs", cell["pairs"][:1]), (cell, "colour", "red")]
    wrong += [(cell, "pairs", [*cell["pairs"], pair]), (report, "cells", [cell] * 3)]
    for part, key, value in wrong:
        before = dict(part)
        late = key in ("summary", "spreads", "choices", "rivalry")  # not there while cells are played
        part[key] = value
        if part != before and not (part is report and (value == [] or (late and value is None))):
            yield f"{key} = {value}"
        part.pop(key)
        if key in before and not late and key not in ("ensemble_over", "execute", "horizon"):  # which older files lack
            yield f"no {key}"
        part.clear()
        part.update(before)


def test_a_trimmed_or_edited_report_is_answered_in_one_line(folder: Path) -> None:
    command = "evaluate toy-bc.policy.pt --candidates 2 --episodes 1 --workers 1 --json report.json"
    run(command)
    file = Path("report.json")
    whole, settings = file.read_text(), ["evaluation.candidates=2", "evaluation.episodes=1"]
    cells = [cli.read_cell(Path("toy-bc.policy.pt"), guidance, settings) for guidance in (None, cli.NONE)]

    def refused(text: str, edit: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(data.MdptError) as caught:
            cli.begin_report(cells, models.choose_products(), file, False)
        line = str(caught.value)
        assert line.startswith("report.json: ") and "--overwrite" in line and "\n" not in line and len(line) < 400, edit

    report = json.loads(whole)
    count = sum(refused(json.dumps(report), edit) is None for edit in edits(report))
    assert count > 200 and report == json.loads(whole)
    for text in ("", "[]", "null", "{", whole[: len(whole) // 2], whole + "}", "[" * 100_000, "\udcff", "9" * 10_000):
        refused(text, text[:9])
    file.write_text(json.dumps(report | {"cells": []}))
    assert "wrote report.json" in run(command).stdout and file.read_text() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "how", "workers"),
    [
        *((CUT[0], signal.SIGINT, 1), (CUT[1], signal.SIGINT, 2), (CUT[1], signal.SIGHUP, 2)),
        *((CUT[0], signal.SIGKILL, 2), (CUT[1], signal.SIGKILL, 1)),
    ],
)
def test_playing_that_is_ended_goes_on_to_the_same_file(
    folder: Path, command: str, how: signal.Signals, workers: int
) -> None:
    command, part, whole = f"{command} --episodes 40 --json", Path("part.json"), Path("whole.json")
    with started(f"{command} part.json --workers {workers}") as process:
        while not part.exists() and process.poll() is None:
            time.sleep(0.002)
        # a terminal's Ctrl-C and its end reach the workers, too
        (os.kill if how == signal.SIGKILL else os.killpg)(process.pid, how)
        _, said = process.communicate(timeout=60)  # until no worker holds stderr open
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert "Traceback" not in said and (how == signal.SIGKILL or said.endswith(INTERRUPTED))
    cells = len(json.loads(part.read_text())["cells"])
    for file in (part, whole):
        run(f"{command} {file} --workers 1")
    assert part.read_bytes() == whole.read_bytes()
    assert 1 <= cells < len(json.loads(whole.read_text())["cells"])


# --------------------------------------------------------------------------------------------- pictures


PICTURES = {
    "evaluate toy-dql.policy.pt": (
        "conftest:Gentle-v0, 2 members x 3 episodes",
        "score (0 to 100)",
        "data best",
        "one sample",
    ),
    "evaluate toy-bc.policy.pt --curve": ("2 members x 3 episodes", "gradient steps", "interquartile range"),
    "evaluate toy-dql.policy.pt toy-cfg.policy.pt --curve": (">toy-dql.policy.pt<", ">toy-cfg.policy.pt<"),
    "evaluate toy-idql.guidance.pt --describe": ("training of idql guidance", "q_loss"),
    f"swap toy-dql.policy.pt toy-bc-unguided.policy.pt --guidance toy-idql.guidance.pt {APART}": (
        *("2 members x 3 episodes", "toy-bc-unguided.policy.pt", "IQR", "pairs of members"),
    ),
}


@pytest.mark.parametrize("command", PICTURES)
def test_pictures_say_what_they_show(command: str, folder: Path) -> None:
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    workers = "" if "--describe" in command else " --workers 1"
    assert run(f"{command}{workers} --plot picture.svg").stdout.splitlines()[-1] == "wrote picture.svg"
    picture = Path("picture.svg").read_text()
    assert [text for text in PICTURES[command] if text not in picture] == []


def test_video_is_an_episode_with_its_figures(folder: Path) -> None:
    command = "toy-bc-unguided.policy.pt --set evaluation.temperature=0"
    pair, _ = evaluate(command)["pairs"]
    result = run(f"evaluate {command} --video film.gif")
    assert result.stdout == "wrote film.gif\n"
    with Image.open("film.gif") as film:
        assert film.n_frames == 1 + math.ceil(pair["lengths"][0] / 3) and film.size == (320, 48)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L"))
    assert last[40:].max() <= 12 and last[:38].max() > 200  # a dark plane, and bright figures on it
    episode = pair["returns"][0]
    assert f"return {episode:.1f}, score {episode - 10:.1f}" in result.stderr  # the episode that `evaluate` scored
    for options, *fragments in (
        ("--member 7 --video a.gif", "--member 7", "toy-dql.policy.pt", "0, 1"),
        ("--member 1", "--member 1", "--video"),
        ("--video a.mp4", "--video a.mp4", ".gif"),
        ("--video film.gif", "film.gif: exists already", "--overwrite"),
        ("--video a.gif --curve", "--video", "--curve"),
        ("--video a.gif --episodes 2", "--video", "--episodes"),
        ("toy-cfg.policy.pt --video a.gif", "--video", "all bundles but one"),
    ):
        fail(f"evaluate toy-dql.policy.pt {options}", *fragments)
    assert not Path("a.gif").exists()


def test_tensorboard_shows_the_history(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = "guidance toy.toml --out watched.pt --tensorboard boards"
    run(f"{command} --seeds 0,1 --set guidance.learning_rate=0.01")
    Path("watched.pt").unlink()
    fail(command, "boards/watched: exists already", "--overwrite")
    with interrupted_at(12, monkeypatch):
        run(f"{command} --overwrite", code=130)  # what came before is gone
    run(command)  # and this goes on
    history = read("watched.pt").history
    events = EventAccumulator("boards/watched")
    events.Reload()
    for name in history[-1].metrics:
        for member, seed in enumerate((0, 1)):
            shown = [(event.step, event.value) for event in events.Scalars(f"{name}/seed {seed}")]
            assert shown == [(entry.step, pytest.approx(entry.metrics[name][member])) for entry in history]
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr("torch.utils.tensorboard.SummaryWriter.flush", lambda _: (_ for _ in ()).throw(full))
        fail_last("guidance toy.toml --out c.pt --tensorboard full", "--tensorboard full/c: ", "No space left")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fail("guidance toy.toml --out b.pt --tensorboard boards", "tensorboard", "pip install 'mdpt[tensorboard]'")


def test_collecting_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDPT_CACHE", str(tmp_path / "cache"))
    tiny = ("data.transitions=400", "data.levels=[0.2,0.8]", "guidance.steps=4", "policy.steps=4", "seeds=[0]")
    options = f"{ROOT / 'hopper.toml'} --device cpu --workers 1" + "".join(f" --set {text}" for text in tiny)
    assert "collect: 400/400" in run(f"guidance {options}").stderr
    (cached,) = (tmp_path / "cache").iterdir()
    assert "collect" not in run(f"policy {options} --guidance hopper-idql.guidance.pt").stderr
    cell = evaluate("hopper-dql.policy.pt --episodes 1 --candidates 2")
    assert cell["dataset"]["transitions"] == 400 and cell["dataset"]["name"] == cached.name
    low, high = 20.058972, 1441.8059623430963  # D4RL's
    (pair,) = cell["pairs"]
    assert pair["score"] == pytest.approx(100 * (pair["return"] - low) / (high - low))


# ------------------------------------------------------------------------------------- modules that recombine


def in_lineage(guidance: models.Bundle) -> models.Bundle:
    """A guidance inside a policy that learned under it: what acts, not how it got there."""
    return guidance.model_copy(update={"snapshots": {}, "training": None, "weights": guidance.acting})


def test_a_policy_under_an_unfinished_guidance_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(12, monkeypatch):
        run("guidance toy.toml --set guidance.algorithm=dql --out half.pt", code=130)
    assert "unfinished" in run("policy toy.toml --guidance half.pt --out p.pt").stderr
    inside = read("p.pt").guidances[0]
    assert inside.step == 13 and not inside.complete and equal(inside, in_lineage(read("half.pt")))


def test_a_guidance_is_bit_identical_inside_the_policy(folder: Path) -> None:
    run("policy toy.toml --guidance toy-dql-joint.policy.pt --out under-joint.pt")
    joint = read("toy-dql-joint.policy.pt").guidances[0]
    for policy, outside in (
        ("under-joint.pt", joint),
        *((f"toy-{name}.policy.pt", read(UNDER[name])) for name in UNDER),
    ):
        (inside,) = read(policy).guidances
        assert equal(inside, in_lineage(outside))
    assert joint.complete and list(joint.snapshots) == [10, 20] and joint.experiment.guidance.algorithm == "dql"
    assert not any(name.startswith("actor.") for name in joint.weights)


def test_a_joint_critic_looks_at_labels_once_they_are_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, seen = models.Guidance.loss, []

    def record(guidance: Any, batch: Any, random: Any, actor: Any) -> Any:
        seen.append(actor.keywords["w"])
        return loss(guidance, batch, random, actor)

    monkeypatch.setattr(models.Guidance, "loss", record)
    joint = "policy toy.toml --set policy.scheme=joint --set guidance.algorithm=dql --overwrite --out joint.pt"
    run(f"{joint} --set policy.algorithm=cfg --set policy.guidance_from=0.5")
    run(f"{joint} --set policy.algorithm=cfg --set policy.label_dropout=1")
    assert seen == [0.0] * 10 + [1.0] * 10 + [0.0] * 20


def test_labels_that_were_not_trained_do_not_act(folder: Path) -> None:
    run("policy toy.toml --set policy.scheme=unguided --set policy.algorithm=cfg --out unlabelled.pt")
    cell = evaluate("unlabelled.pt --set evaluation.w=2")
    assert cell["protocol"]["w"] == 0 and cell["protocol"]["no_effect"] == ["w"]
    bundle = read("unlabelled.pt")
    bundle.weights["average.label.weight"][:, 1:] = 1e3
    write("tampered.pt", bundle)
    assert returns(evaluate("tampered.pt")) == returns(cell)
    options = "--set policy.algorithm=cfg --set policy.label_dropout=0 --out all.pt"
    said = run(f"{UNDER_IDQL} {options} --set evaluation.w=3")
    assert "warning: all.pt, its own: evaluation.w = 3" in said.stderr and "wrote all.pt" in said.stdout
    fail("evaluate all.pt --set evaluation.w=3", "all.pt", "w = 3", "label_dropout 0", "only 1")
    run(f"{UNDER_IDQL} --set policy.guidance_from=0.5 {options.replace('all', 'late')}")  # it cloned before
    said = run("evaluate late.pt --curve --set evaluation.w=3 --episodes 1 --workers 1").stdout
    assert "w 3" in said and "but w 0 until step 10" in said


def test_an_algorithm_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second policy with labels, and a second one with residual blocks, need nothing but their registration."""
    command = f"{UNDER_IDQL} --set policy.algorithm"
    with monkeypatch.context() as patch:
        patch.setitem(models.POLICIES, "toy", models.PolicyAlgorithm(models.label_loss, labels=True))
        patch.setitem(models.POLICIES, "blocks", models.PolicyAlgorithm(models.cloning_loss, network="resnet"))
        run(f"{command}=toy")
        assert equal(read("toy-toy.policy.pt").weights, read("toy-cfg.policy.pt").weights)
        cell, cfg = (evaluate(f"toy-{name}.policy.pt --set evaluation.w=3") for name in ("toy", "cfg"))
        assert cell["protocol"]["w"] == 3 and cell["protocol"]["no_effect"] == []
        assert cell["algorithm"] == "toy" and cell["pairs"] == cfg["pairs"]
        fail(f"{command}=blocks --set policy.hidden=[8,16]", "toy.toml: [policy] hidden = [8, 16]", "'resnet'", "width")
        run(f"{command}=blocks --set policy.network=mlp --set policy.hidden=[8,16]")
        assert read("toy-blocks.policy.pt").experiment.policy.network == "mlp"
    fail("evaluate toy-toy.policy.pt", "toy-toy.policy.pt", "[policy] algorithm = 'toy'")  # where there is no such line


def test_one_guidance_member_serves_all(folder: Path) -> None:
    run("guidance toy.toml --seeds 5 --out one.pt")
    run("policy toy.toml --guidance one.pt --out under-one.pt")
    cell = evaluate("under-one.pt")
    assert [(pair["policy_seed"], pair["guidance_seed"]) for pair in cell["pairs"]] == [(0, 5), (1, 5)]
    assert cell["protocol"]["guidance"] == "its own idql guidance"


def test_other_data_is_warned_of_and_recorded(folder: Path) -> None:
    write_toy_data(Path("other.hdf5"), seed=1, timeouts=None)
    said = run("guidance toy.toml --set data.path=other.hdf5 --out other.pt").stderr.splitlines()
    assert said[0].startswith(f"warning: {Path.cwd() / 'other.hdf5'}: no 'timeouts'")
    result = run("evaluate toy-dql.policy.pt --infer-guidance other.pt --workers 1 --json report.json")
    (text,) = json.loads(Path("report.json").read_text())["cells"][0]["warnings"]
    assert "toy.hdf5" in text and "other.hdf5" in text and "one data distribution" in text
    assert result.stderr.splitlines()[0] == f"warning: {text}"
    assert f"warning: {text}" in run("policy toy.toml --guidance other.pt --out p.pt").stderr.splitlines()
    out = run("swap toy-dql.policy.pt --guidance other.pt --episodes 1 --workers 1").stdout
    assert (
        "other.pt *" in out
        and "toy-idql" not in out
        and "\n* this guidance learned from other data than the policy" in out
    )


def test_seeds_device_and_set_override_the_file(folder: Path) -> None:
    settings = "--set guidance.tau=0.5 --set guidance.hidden=[8] --set data.reward_scale=none --set name=other"
    run(f"guidance toy.toml --seeds 4 --device cpu {settings}")
    bundle = read("other-idql.guidance.pt")
    section = bundle.experiment.guidance
    assert bundle.seeds == [4] and bundle.reward_scale.rule == "none"
    assert (section.tau, section.hidden, section.steps) == (0.5, [8], 20)  # the last is the file's own


# ------------------------------------------------------------------------------- training that was cut short


TRAININGS = [
    "guidance toy.toml",
    UNDER_IDQL,
    "policy toy.toml --set policy.scheme=joint --set guidance.algorithm=dql",
]


@pytest.mark.parametrize("command", TRAININGS)
def test_the_same_command_goes_on_to_the_same_bits(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"{command} --out whole.pt")
    with interrupted_at(12, monkeypatch):
        last = run(f"{command} --out cut.pt", code=130).stderr.splitlines()[-1]
    assert last.startswith("mdpt: cut.pt: interrupted after step 13 of 20; the same command goes on")
    cut = read("cut.pt")
    assert cut.step == 13 and not cut.complete and list(cut.snapshots) == [10]
    assert "cut.pt: going on from step 13\n" in run(f"{command} --out cut.pt").stderr
    whole, resumed = read("whole.pt"), read("cut.pt")
    assert resumed.complete and resumed.training is None
    for ours, theirs in zip((whole, *whole.guidances), (resumed, *resumed.guidances), strict=True):
        theirs.history, theirs.accounting = ours.history, ours.accounting  # the clock alone differs
    assert equal(whole, resumed)


def test_what_shapes_no_weight_may_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(12, monkeypatch):
        run(f"{UNDER_IDQL} --out cut.pt", code=130)
    changed = ("policy.snapshots=5", "guidance.steps=9", "guidance.hidden=[8]", "evaluation.episodes=7")
    options = "".join(f" --set {setting}" for setting in (*changed, f"data.path={folder / 'toy.hdf5'}"))
    assert "going on from step 13\n" in run(f"{UNDER_IDQL} --out cut.pt{options}").stderr
    bundle = read("cut.pt")
    assert equal(bundle.weights, read("toy-dql.policy.pt").weights) and bundle.experiment.evaluation.episodes == 7
    assert list(bundle.snapshots) == [10, 16, 20]


def test_another_run_is_told_by_what_differs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"{UNDER_IDQL} --out cut.pt"
    with interrupted_at(12, monkeypatch):
        run(command, code=130)
    before = Path("cut.pt").read_bytes()
    guidance = read("toy-idql.guidance.pt")
    write("other.pt", guidance, weights={name: 2 * value for name, value in guidance.weights.items()})
    write_toy_data(Path("other.hdf5"), seed=5)
    for options, *fragments in (
        ("--set policy.eta=2 --set policy.dropout=0.2", "[policy] eta was 1.0, is 2.0", "[policy] dropout"),
        ("--set policy.steps=30", "[policy] steps", "20", "30", "--extend"),
        ("--set policy.steps=15 --extend", "[policy] steps", "20", "15"),
        ("--seeds 0,2", "seeds", "[0, 1]", "[0, 2]"),
        ("--set data.held_out=0.2", "[data] held_out", "0.1", "0.2"),
        ("--set data.path=other.hdf5", "data (by content)"),
        ("--guidance toy-dql.guidance.pt --set policy.ensemble=mean", "[policy] ensemble", "other weights"),
    ):
        assert "going on" not in fail(f"{command} {options}", "cut.pt: ", *fragments, "--overwrite")
    for other in ("toy-dql.guidance.pt", "other.pt"):
        command = f"policy toy.toml --guidance {other} --out cut.pt"
        fail(command, "cut.pt: ", "guidance", "other weights", "--overwrite")
    fail("guidance toy.toml --out cut.pt", "cut.pt: ", "policy bundle", "guidance bundle", "--overwrite")
    assert Path("cut.pt").read_bytes() == before


def test_extend_gives_an_unfinished_run_more_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"{UNDER_IDQL} --out cut.pt"
    with interrupted_at(12, monkeypatch):
        run(command, code=130)
    said = run(f"{command} --set policy.steps=40 --extend").stderr
    assert re.search(r"cut\.pt: going on from step 13; .*learning rate.* 40 steps, not 20\n", said)
    bundle = read("cut.pt")
    assert bundle.complete and bundle.step == 40 and list(bundle.snapshots) == [10, 20, 40]
    assert [entry.step for entry in bundle.history] == list(range(1, 41))
    fail(f"{command} --set policy.steps=80 --extend", "cut.pt", "complete", "learning rate", "--overwrite")
    run(f"{command} --extend --overwrite")
    assert read("cut.pt").step == 20
    window = f"{UNDER_IDQL} --set policy.guidance_until=0.5 --out window.pt"
    with interrupted_at(12, monkeypatch):
        run(window, code=130)
    told = fail(
        f"{window} --set policy.steps=40 --extend", "window.pt: was begun as another run: [policy] steps was 20"
    )
    assert "--extend" not in told  # which would move the window over steps that are done


def test_how_far_values_will_have_grown_is_told_before_training() -> None:
    def text(**changed: Any) -> str:
        return cli.growth_text(data.GuidanceSection(**{"steps": 20_000, "tau": 0.005, "discount": 0.99} | changed))

    assert "at least 63 % of the returns" in text() and "at least 98 % of" in text(
        tau=0.02
    )  # 1 - 1 / e, 1 - 1 / e ** 4
    assert text(algorithm="mc") == ""  # which learns returns, without target networks


@pytest.mark.parametrize(
    ("expectile", "values", "returns", "told"),  # which seeds, their mean V
    [
        (0.7, [5.0, 9.0, 11.0, -1.0], 10.0, ("seeds 0, 1, 3", 4.3)),
        (0.5, [4.0, 9.0, 11.0, -1.0], 10.0, ("seeds 0, 3", 1.5)),
        (0.7, [-1.0, -6.0, -11.0, -9.0], -10.0, ("seed 0", -1.0)),
        (0.7, [11.0, 12.0, 11.0, 12.0], 10.0, None),
        (0.7, [0.1, 3.0, -6.0, -9.0], -10.0, None),  # above 0, which is no way from 0 to the returns
        (0.5, [-9.0, 6.0, 11.0, 12.0], 10.0, None),
    ],
)
def test_values_near_their_initial_value_are_told(
    folder: Path, expectile: float, values: list[float], returns: float, told: tuple[str, float] | None
) -> None:
    bundle = read("toy-idql.guidance.pt")
    section = bundle.experiment.guidance.model_copy(update={"expectile": expectile})
    quality = bundle.quality[-1].model_copy(update={"mean_v": values, "mean_return": [returns] * 4})
    experiment = bundle.experiment.model_copy(update={"guidance": section})
    bundle = bundle.model_copy(update={"seeds": [0, 1, 2, 3], "quality": [quality], "experiment": experiment})
    problem = cli.value_problem(bundle)
    if told is None:
        assert problem == ""
    else:
        assert problem.startswith(f"V of {told[0]} is") and f"(mean V {told[1]}, mean return {returns})" in problem


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_an_unfinished_bundle(folder: Path, how: int) -> None:
    command = f"{UNDER_IDQL} --set policy.steps=1000 --set policy.snapshots=1 --out cut.pt"
    with started(command) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("policy dql: ")
        os.killpg(process.pid, how)
        said = process.stderr.read()
        assert process.wait(60) == 128 + how
    step = read("cut.pt").step
    assert f"cut.pt: interrupted after step {step} of 1000" in said.splitlines()[-1] and 1 <= step < 1000
    assert [file.name for file in folder.glob(".*")] == []  # nothing temporary is left
    assert f"{step} of 1000 (unfinished)" in run("evaluate cut.pt --describe").stdout
    fail("evaluate cut.pt --curve", "cut.pt", "no snapshots yet")
    assert f"going on from step {step}\n" in run(command).stderr


def test_a_run_saves_by_time_and_a_kill_loses_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(learner: models.Learner, loss: torch.Tensor, now: int, steps: int) -> None:
        if now == 17:
            raise KeyboardInterrupt
        update(learner, loss, now, steps)

    update, command = models.Learner.update, f"{UNDER_IDQL} --set policy.save_every=0 --out cut.pt"
    with monkeypatch.context() as patch:
        patch.setattr(models.Learner, "update", killed)
        patch.setattr(models.time, "monotonic", lambda: 0.0)  # saving takes no time
        run(command, code=130)
    kept = read("cut.pt")
    assert kept.step == 17 and list(kept.snapshots) == [10]
    run(f"{UNDER_IDQL} --out cut.pt")  # how often it is saved shapes no weight
    assert equal(read("cut.pt").weights, read("toy-dql.policy.pt").weights)


def test_going_on_tells_another_device_or_other_products(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(12, monkeypatch):
        run("guidance toy.toml --out cut.pt", code=130)
    bundle = read("cut.pt")
    assert bundle.accounting.products == models.choose_products()
    monkeypatch.setattr(models, "_onednn_is_exact", lambda: False)
    for changed, text in (
        ({"device": "cuda:0"}, "begun on cuda, goes on on cpu"),
        ({"products": "oneDNN"}, "begun with oneDNN matrix products"),
    ):
        write("cut.pt", bundle, accounting=bundle.accounting.model_copy(update=changed))
        assert text in run("guidance toy.toml --out cut.pt").stderr


def test_unfinished_bundles_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(12, monkeypatch):
        run(f"{UNDER_IDQL} --out cut.pt", code=130)
        run("guidance toy.toml --out short.pt", code=130)
    for command, unfinished in (
        ("evaluate cut.pt --episodes 1 --workers 1", "cut.pt: this policy"),
        ("evaluate toy-dql.policy.pt --infer-guidance short.pt --workers 1", "short.pt: this guidance"),
        ("policy toy.toml --guidance short.pt --out under.pt", "short.pt: this guidance"),
    ):
        assert run(command).stderr.startswith(f"warning: {unfinished} is unfinished, at step 13\n")


def test_time_left_counts_from_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It is told as soon as a second has shown it, and at each tenth of the way."""
    clock = iter([0.0, 0.5, 2.0, 4.0, 1000.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with cli.progress("train", 1000, 600) as show:
        for done in (601, 602, 603, 700):
            show(done, "loss 1")
    said = "train: 602/1000  loss 1  7 min left\ntrain: 700/1000  loss 1  50 min left\n"
    assert capsys.readouterr().err == said  # 2 steps in 2 s, 100 in 1,000 s


BROKEN = f"{UNDER_IDQL} --set policy.learning_rate=1e30 --out nan.pt"


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_snapshot(folder: Path) -> None:
    last = run(f"{BROKEN} --set policy.snapshots=20", code=1).stderr.splitlines()[-1]
    bundle = read("nan.pt")
    kept = bundle.step
    what = rf"member \d \(seed \d\) became (nan|inf) at step (\d+); .* of step {kept}, .*learning_rate"
    found = re.match(f"mdpt: nan.pt: .* {what}", last)
    assert found and kept >= 1 and int(found[2]) in (kept, kept + 1)
    assert not bundle.complete and all(weight.isfinite().all() for weight in bundle.weights.values())
    assert f"{kept} of 20 (unfinished)" in run("evaluate nan.pt --describe").stdout


def test_what_is_not_finite_is_never_kept(folder: Path) -> None:
    """A step can leave no finite weight behind although its own loss was finite, even the last one."""
    write_toy_data(Path("huge.hdf5"), rewards=np.full(ROWS, 3e38, "f4"))
    for command in (
        f"{BROKEN} --set policy.learning_rate=1e60 --set policy.steps=1 --set policy.snapshots=1",
        "guidance toy.toml --set data.path=huge.hdf5 --set data.reward_scale=none --out nan.pt",
    ):
        last = run(command, code=1).stderr.splitlines()[-1]
        assert re.match(r"mdpt: nan.pt: .* became (nan|inf|not finite) at step \d+; no snapshot .*learning_rate", last)
        assert not Path("nan.pt").exists()


def test_an_action_that_is_not_finite_names_file_and_member(folder: Path) -> None:
    content = torch.load("toy-bc-unguided.policy.pt", weights_only=True)
    for weight in content["weights"].values():  # finite numbers whose products are not
        weight[1:] = torch.where(torch.arange(weight[1:].numel()).view_as(weight[1:]) % 2 == 0, 3e38, -3e38)
    torch.save(content, "diverged.pt")
    last = run("evaluate diverged.pt --episodes 1 --workers 1", code=1).stderr.splitlines()[-1]
    assert last.startswith("mdpt: diverged.pt: the member of seed 1 chose an action that is not finite")


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    Path("report.json").write_text("mine")
    Path("curve.png").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for command, file in (
        ("guidance toy.toml", "toy-idql.guidance.pt"),
        (UNDER_IDQL, "toy-dql.policy.pt"),
        (f"{UNDER_IDQL} --out toy-dql.guidance.pt", "toy-dql.guidance.pt"),
        ("evaluate toy-dql.policy.pt --json report.json", "report.json"),
        ("evaluate toy-dql.policy.pt --curve --plot curve.png", "curve.png"),
        ("swap toy-dql.policy.pt --json report.json", "report.json"),
    ):
        fail(command, f"{file}: exists already", "choose another", "--overwrite")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    for command, option in (  # what is read is never written, asked or unasked
        (f"{UNDER_IDQL} --out toy-idql.guidance.pt", "--out"),
        (f"{UNDER_IDQL}#1 --out ./toy-idql.guidance.pt", "--out"),
        ("guidance toy.toml --out toy.hdf5", "--out"),
        ("evaluate toy-dql.policy.pt@20 --json toy-dql.policy.pt", "--json"),
        ("swap toy-dql.policy.pt --guidance toy-idql.guidance.pt --json toy-idql.guidance.pt", "--json"),
    ):
        fail(f"{command} --overwrite", f"{option} ", "is read by this command; choose another")
    fail("evaluate toy-dql.policy.pt --json a.svg --plot a.svg", "--plot a.svg: is another output of this command")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    run("guidance toy.toml --seeds 8 --overwrite")
    assert read("toy-idql.guidance.pt").seeds == [8]


# -------------------------------------------------------------------------------------------------- mistakes


EXPERIMENT_MISTAKES = [  # what stands in the file, or in --set; what the user learns
    ("policy.step=5", "[policy] step = 5", "unknown", "'steps'"),
    ("evaluation.zzz=5", "[evaluation] zzz = 5", "unknown", "episodes", "weight_temperature", "seed"),
    ("source='d4rl'", "source = 'd4rl'", "unknown key; it belongs in [data]"),
    ("data.device='cpu'", "[data] device = 'cpu'", "at the top of the file"),
    ("guidance.algorithm='idq'", "[guidance] algorithm = 'idq'", *models.GUIDANCES, "mean 'idql'"),
    ("policy.algorithm='sac'", "[policy] algorithm = 'sac'", *models.POLICIES, "mean 'dac'"),
    ("policy.hidden=[16, 0]", "[policy] hidden[1] = 0", "equal to 1"),
    ("name='a/b'", "name = 'a/b'", "[A-Za-z0-9]"),
    ("evaluation.temperature=1e300", "[evaluation] temperature = 1e+300", "9.2e18"),
    (f"seeds=[{2**64}]", f"seeds[0] = {2**64}", "9.2e18"),
    (f"policy.hidden=0x{'f' * 5000}", "[policy] hidden = ...", "list"),
    ("name=a\x1b", "name = 'a\\x1b'", "[A-Za-z0-9]"),
    ("policy.algorithm='idql'\npolicy.hidden=[8, 16]", "[policy] hidden = [8, 16]", "'resnet'", "width"),
    ("policy.sampler='dpm-solver++'\npolicy.sampling_steps=9", "[policy]", "sampling_steps 9", "diffusion_steps 5"),
    ("policy.guidance_from=0.5\npolicy.guidance_until=0.2", "[policy]", "guidance_from 0.5", "guidance_until 0.2"),
]


@pytest.fixture(scope="module")
def mistaken(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what has been trained, and with files that are no good."""
    folder = tmp_path_factory.mktemp("mistaken")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    (folder / "broken.toml").write_text("a = 1 1")
    write_toy_data(folder / "bad.hdf5", rewards=np.full(ROWS, np.nan))
    (folder / "half.pt").write_bytes((folder / "toy-idql.guidance.pt").read_bytes()[:5000])
    for name, file in (("elsewhere", "toy-idql.guidance.pt"), ("elsewhere-policy", "toy-bc-unguided.policy.pt")):
        bundle = models.read_bundle(folder / file)
        environment = replace(bundle.environment, id="Ant-v9", max_episode_steps=7)
        write(str(folder / f"{name}.pt"), bundle, environment=environment)
    old = torch.load(folder / "toy-idql.guidance.pt", weights_only=True) | {"version": 3}
    torch.save(old, folder / "old.pt")
    os.mkfifo(folder / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with cli.claimed(False, {name: Path(name) for name in ("claimed", "claimed.png")}):
            yield folder


@pytest.mark.parametrize("mistake", EXPERIMENT_MISTAKES, ids=lambda mistake: mistake[0][:99])
def test_mistakes_in_the_experiment(mistaken: Path, monkeypatch: pytest.MonkeyPatch, mistake: tuple[str, ...]) -> None:
    monkeypatch.chdir(mistaken)
    settings, *fragments = mistake
    options = " ".join(f"--set {shlex.quote(setting)}" for setting in settings.splitlines())
    fail(f"guidance toy.toml --out g.pt {options}", "toy.toml: ", *fragments)


def test_several_mistakes_get_a_line_each(folder: Path) -> None:
    Path("toy.toml").write_text('nam = "a"\n[data]\nsource = "hdf5"\n[policy]\nsteps = 0\nalgoritm = "bc"\n')
    lines = run("guidance toy.toml", code=1).stderr.removeprefix("mdpt: ").splitlines()
    where = ("[data]", "[policy] steps = 0", "[policy] algoritm = 'bc'", "nam = 'a'")
    for line, start, what in zip(lines, where, ("path", "equal to 1", "'algorithm'", "'name'"), strict=True):
        assert line.startswith(f"toy.toml: {start}: ") and what in line


SCHEMES = ("joint", "unguided")
TRAIN = "guidance toy.toml --out p.pt --set"
MISTAKES = [  # command, what the user learns
    ("guidance none.toml", "none.toml", "no such", "hopper.toml"),
    ("guidance broken.toml", "broken.toml", "TOML", "line 1"),
    (f"{TRAIN} data.path=bad.hdf5", "bad.hdf5", "'rewards' row 0", "nan"),
    (f"{TRAIN} data.environment=HoperBulletEnv-v0", "HoperBulletEnv-v0", "'HopperBulletEnv-v0'"),
    (f"{TRAIN} data.environment=Pendulum-v1", "toy.hdf5", "'next_observations'", "(290, 2)", "(290, 3)"),
    (f"{TRAIN} data.reference=[5,5]", "reference", "[5.0, 5.0]", "min < max"),
    (f"{TRAIN} guidance.batch_size=1_000_000_000_000", "less than or equal to 1000000", "batch_size"),
    (f"{TRAIN} guidance.batch_size=1000000 --set guidance.hidden=[10000]", "not enough memory", "hidden"),
    (f"guidance {'a' * 300}.toml", "aaa.toml", "File name too long"),
    ("guidance toy.toml --set 'policy.steps=5\nx=1'", "--set policy.steps: ", "more than one value"),
    (f"guidance toy.toml --set policy.hidden={'[' * 5000}", "--set policy.hidden: ", "not TOML"),
    ("guidance toy.toml --out never.pt --timeout inf", "--timeout inf", "seconds", "a million"),
    ("guidance '\x1b[31mnone\udcff.toml'", "\\x1b[31mnone\\udcff.toml", "no such"),
    ("guidance toy.toml --set steps", "--set steps", "table.key=value"),
    ("guidance toy.toml --out . --overwrite", "--out .", "folder", "file"),
    ("guidance toy.toml --out pipe --overwrite", "--out pipe", "a device or pipe", "file"),
    (f"guidance toy.toml --out {'a' * 249}.pt", "--out aaa", "cannot be written", "File name too long"),
    ("guidance toy.toml --out claimed", "--out claimed: process", str(os.getpid()), "wait", "choose another"),
    *(
        (
            f"{command} toy-dql.policy.pt {option} claimed{ending}",
            f"{option} claimed{ending}: process",
            str(os.getpid()),
        )
        for command in ("evaluate", "swap")
        for option, ending in (("--json", ""), ("--plot", ".png"))
    ),
    ("guidance toy.toml --out toy.toml/g.pt", "--out toy.toml/g.pt", "cannot be written", "choose another"),
    (f"{UNDER_IDQL} --out bad.hdf5", "bad.hdf5", "cannot be read as a bundle"),
    ("evaluate toy-dql.policy.pt@20 --curve", "--curve scores every snapshot; leave out @20"),
    ("policy toy.toml", "guidance-first", "--guidance FILE", "mdpt guidance", "scheme=joint", "unguided"),
    *((f"{UNDER_IDQL} --set policy.scheme={name}", name, "--guidance", "guidance-first") for name in SCHEMES),
    ("policy toy.toml --guidance none.pt --out p.pt", "none.pt", "no such bundle", "mdpt guidance"),
    ("policy toy.toml --guidance half.pt --out p.pt", "half.pt", "cannot be read as a bundle"),
    ("policy toy.toml --guidance old.pt --out p.pt", "old.pt", "version 3", f"version {models.BUNDLE_VERSION}", "anew"),
    ("policy toy.toml --guidance toy-bc-unguided.policy.pt --out p.pt", "toy-bc-unguided", "no guidance", "guidance b"),
    ("policy toy.toml --guidance toy-idql.guidance.pt@7 --out p.pt", "idql.guidance.pt@7", "@10", "@20", "@last"),
    (f"{UNDER_IDQL} --seeds 0,1,2 --out p.pt", "3 policy", "2 guidance", "one member"),
    (
        "policy toy.toml --guidance elsewhere.pt --out p.pt",
        "conftest:Gentle-v0 against Ant-v9",
        "max_episode_steps 6",
        "7",
    ),
    ("evaluate toy-idql.guidance.pt", "toy-idql.guidance.pt", "guidance bundle", "mdpt policy"),
    ("evaluate toy-dql.policy.pt@soon", "toy-dql.policy.pt@soon", "@10", "@20", "@last"),
    ("evaluate toy-dql.policy.pt elsewhere-policy.pt", "elsewhere-policy.pt", "Gentle-v0 against Ant-v9"),
    ("evaluate toy-dql.policy.pt --set evaluation.guides=up", "guides = 'up'", "unknown", "'guide'"),
    ("evaluate toy-dql.policy.pt --set policy.eta=2", "--set policy.eta=2", "evaluation.KEY=VALUE"),
    ("evaluate toy-dql.policy.pt --describe --json a.json", "--describe", "--plot", "leave out --json"),
    ("evaluate toy-dql.policy.pt --plot a.jpg", "--plot a.jpg", ".png", ".svg", ".pdf"),
    ("swap toy-idql.guidance.pt", "toy-idql.guidance.pt", "guidance bundle", "mdpt policy"),
    ("swap toy-bc-unguided.policy.pt", "toy-bc-unguided.policy.pt", "no guidance", "--guidance FILE"),
    ("swap toy-dql.policy.pt --guidance elsewhere.pt", "toy-dql.policy.pt, elsewhere.pt", "Gentle-v0 against Ant-v9"),
    ("swap toy-dql.policy.pt --pairs some", "--pairs some", "matched", "all"),
    ("train toy.toml", "train"),  # what follows is the parser's
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0][:99])
def test_mistakes_on_the_command_line(
    mistaken: Path, monkeypatch: pytest.MonkeyPatch, mistake: tuple[str, ...]
) -> None:
    monkeypatch.chdir(mistaken)
    before = {file.name for file in mistaken.iterdir()}
    command, *fragments = mistake
    fail(command, *fragments)
    assert {file.name for file in mistaken.iterdir()} == before


def test_a_bundle_of_another_mdpt_plays_and_what_is_unknown_is_told_once(folder: Path) -> None:
    content = torch.load("toy-dql.policy.pt", weights_only=True)
    content["experiment"]["policy"]["nonsense"] = 4
    torch.save(content | {"versions": content["versions"] | {"mdpt": "9.1"}}, "new.pt")
    told = run("evaluate new.pt --curve --episodes 1 --workers 1").stderr
    assert told.count("mdpt 9.1") == told.count("policy.nonsense") == 1 and told.startswith("warning: new.pt")


def test_fields_that_nothing_reads_are_told(folder: Path) -> None:
    Path("toy.toml").write_text(TOY.replace("eta = 1.0", "eta = 1.0\nlabel_dropout = 0.2"))
    command = "policy toy.toml --guidance toy-idql.guidance.pt --set policy.algorithm=bc --out p.pt"
    lines = run(f"{command} --set policy.ensemble=none --set ' policy.advantage_expectile = 0.6'").stderr.splitlines()
    assert "warning: --set policy.advantage_expectile: not read by advantage_weight none" in lines
    assert "not read by bc: eta, label_dropout" in lines
    assert "not read" not in run("guidance toy.toml --out g.pt").stderr  # [policy] is another command's


# ---------------------------------------------------------------------------------------- around the commands


def test_waiting_threads_spin_little_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    show = "import os\nfrom mdpt.mdpt import app\ntry: app()\nfinally: print(os.environ.get('GOMP_SPINCOUNT'))"
    bare = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, expected in (({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7")):
        command = [sys.executable, "-c", show, "--version"]
        said = subprocess.run(command, cwd=tmp_path, env=bare | given, capture_output=True, text=True, check=True)
        assert said.stdout.split()[-1] == expected


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    tiny = ["--rounds", "1", "--calls", "1", "--rows", "300", "--episodes", "1", "--members", "1"]
    command = [sys.executable, str(ROOT / "tests/benchmark.py"), *tiny]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rows = {line.split(" | ")[0] for line in found.splitlines() if line.startswith("| ")}
    for kind, registry in (("guidance", models.GUIDANCES), ("policy", models.POLICIES)):
        assert {f"| {kind} `{name}`" for name in registry} <= rows


@pytest.mark.parametrize(
    ("settings", "guided"),
    [("algorithm=bc", False), ("algorithm=cfg --set policy.guidance_until=0.5", True), ("guidance_until=0", False)],
)
def test_a_policy_that_its_guidance_never_touches_says_so(folder: Path, settings: str, guided: bool) -> None:
    command = f"policy toy.toml --set policy.steps=2 --set policy.snapshots=1 --set policy.{settings}"
    told = run(f"{command} --guidance toy-idql.guidance.pt --out under.pt").stderr
    run(f"{command} --set policy.scheme=unguided --out alone.pt")
    assert equal(read("under.pt").weights, read("alone.pt").weights) is not guided
    assert ("never enters the loss" in told) is not guided
    assert ("grow stale" in told) is ("until=0.5" in settings)


def test_an_output_that_cannot_be_written_to_ends_in_a_line() -> None:
    command = [sys.executable, "-c", "import mdpt; mdpt.main()", "--version"]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (1, "mdpt: the output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")


@pytest.mark.slow
def test_streams_that_are_closed(folder: Path) -> None:
    """A closed stdout is an error, as nobody can see the results; without stdin and stderr nothing is lost."""
    options = ["evaluate", "toy-dql.policy.pt", "--episodes", "1", "--import", "conftest", "--workers", "2"]
    command = shlex.join([sys.executable, "-c", "import mdpt; mdpt.main()", *options])
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    for closed, code, said in ((">&-", 1, "mdpt: the output: Bad file descriptor"), ("2>&-", 0, "data best")):
        closing = ["sh", "-c", f"exec {command} <&- {closed}"]
        found = subprocess.run(closing, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == code and said in found.stdout + found.stderr, found


def test_what_lies_under_an_error_is_shown_on_request(tmp_path: Path) -> None:
    """A deleted working folder is named; MDPT_DEBUG=1 shows the traceback under the line."""
    gone = "import os, sys, mdpt\nos.mkdir('a'); os.chdir('a'); os.rmdir('../a')\nmdpt.main()"
    command = [sys.executable, "-c", gone, "guidance", "toy.toml"]
    for debug in ("", "1"):
        environment = os.environ | {"MDPT_DEBUG": debug}
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        line, *rest = said.stderr.splitlines()
        assert said.returncode == 1 and line.startswith("mdpt: the working folder was deleted")
        assert any("FileNotFoundError" in text for text in rest) if debug else rest == []


def test_ctrl_c_counts_from_the_first_import_on() -> None:
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import mdpt

class Finder:
    def find_spec(self, *_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("as numpy does")

sys.meta_path.insert(0, Finder())
mdpt.main()
"""
    found = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "mdpt: interrupted\n")


def test_a_signal_that_was_ignored_stays_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = cli.make_result

    def hang_up(*args: Any) -> cli.Result:
        signal.raise_signal(signal.SIGHUP)
        return make(*args)

    monkeypatch.setattr(cli, "make_result", hang_up)
    command = "evaluate toy-dql.policy.pt --workers 1"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(command)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run(command, code=129).stderr.endswith("\nmdpt: interrupted\n")  # without --json nothing goes on


def test_what_a_signal_makes_fail_is_no_mistake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError from None

    monkeypatch.setattr(models, "read_policy", fails)
    assert run("evaluate toy-dql.policy.pt", code=143).stderr == "mdpt: interrupted\n"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (f"{UNDER_IDQL} --out old.pt", "old.pt"),
        ("evaluate toy-dql.policy.pt --workers 1 --json old.json", "old.json"),
        ("evaluate toy-bc.policy.pt --workers 1 --plot old.png", "old.png"),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(folder: Path, command: str, file: str) -> None:
    Path(file).write_bytes(b"old")
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        fail_last(f"{command} --overwrite", f"{file}: cannot be written (", "choose another --")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before


def fail_last(command: str, *fragments: str) -> None:
    """`fail`, after progress."""
    line = run(command, code=1).stderr.splitlines()[-1]
    assert [text for text in ("mdpt: ", *fragments) if text not in line] == [], line


def test_what_dead_processes_have_left_goes(folder: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = platform.node()
    mine, other = Path(f".g.pt.{node}.{os.getppid()}.a.tmp"), Path(f".g.pt.{node}-2.{dead.pid}.a.tmp")
    for left in (f".g.pt.{node}.{dead.pid}.a.tmp", ".g.pt.lock", mine, other):
        Path(left).write_text("1")
    run("guidance toy.toml --out g.pt")
    assert set(folder.glob(".*")) == {folder / mine, folder / other}


def test_names_neither_steer_a_terminal_nor_are_formulas(folder: Path) -> None:
    shutil.copy("toy-dql.policy.pt", "\x1b[31m$\\oops$\udcff.pt")
    shutil.copy("toy.toml", "-toy.toml")
    Path("-toy.toml").write_bytes(b"\xef\xbb\xbf" + Path("toy.toml").read_bytes())
    result = run("evaluate '\x1b[31m$\\oops$\udcff.pt' toy-bc.policy.pt --workers 1 --json a.json --plot a.svg")
    assert "\x1b" not in result.output and "│ \\x1b[31m$\\oops$\\udcff.pt │" in result.stdout
    assert json.loads(Path("a.json").read_text())["cells"][0]["policy"] == "\\x1b[31m$\\oops$\\udcff.pt"
    *_, following = run("guidance --out -g.pt -- -toy.toml").stdout.splitlines()
    run(f"{following.removeprefix('next: mdpt ')} --out -p.pt")
    assert run("evaluate ./-p.pt --workers 1").stdout


def test_letters_that_an_output_lacks_are_written_out(folder: Path) -> None:
    result = CliRunner(charset="ascii").invoke(app, shlex.split("guidance toy.toml --describe-data"))
    assert result.exit_code == 0 and "\\u2588" in result.stdout


# ------------------------------------------------------------------------------------------- data of all kinds


def without_environment(text: str = TOY) -> None:
    lines = [line for line in text.splitlines() if not line.startswith(("environment", "reference"))]
    Path("alone.toml").write_text("\n".join(lines).replace('"toy"', '"alone"').replace("held_out", OFFLINE))


OFFLINE = "action_range = [-1, 4]\nmax_episode_steps = 6\nheld_out"


def test_without_an_environment_a_policy_is_judged_offline(folder: Path) -> None:
    without_environment()
    run("guidance alone.toml")
    run("policy alone.toml --guidance alone-idql.guidance.pt")
    bundle = read("alone-dql.policy.pt")
    assert bundle.environment.id is None and bundle.reference is None
    assert bundle.environment.action_low == (-1, -1) and bundle.environment.max_episode_steps == 6

    result = run("evaluate alone-dql.policy.pt --infer-guidance alone-idql.guidance.pt --json offline.json")
    assert result.stderr.startswith("warning: alone-dql.policy.pt: cannot be scored: [data] names no environment\n")
    (found,) = json.loads(Path("offline.json").read_text())["cells"]
    assert list(found["values"]) == ["its own", "alone-idql.guidance.pt"]
    assert found["guidance"] == "alone-idql.guidance.pt"
    own, named = found["values"].values()
    assert own == named and all(0 <= share <= 1 for share in own["higher"])
    for i, seed in enumerate((0, 1)):
        figures = [found[key][i] for key in ("distance", "distance_one", "gain")]
        for row in (figures, [own[key][i] for key in ("policy", "data", "higher")]):
            assert re.search(rf"│ {seed} +│ +" + " │ +".join(f"{figure:.3f}" for figure in row) + " │", result.stdout)
    by = {"mean": ["its own", "the mean of all 2 members of its own idql guidance"], "rank": ["its own"]}
    for rule, judges in by.items():  # which judged is said, and ranks are no values
        out = run(f"evaluate alone-dql.policy.pt --set evaluation.ensemble={rule} --json {rule}.json").stdout
        (found,) = json.loads(Path(f"{rule}.json").read_text())["cells"]
        assert list(found["values"]) == judges and found["values"]["its own"]["data"] == own["data"]
        assert f"Acts by: max of 4 by the {rule} of all 2 members" in " ".join(out.split())
    fail("evaluate alone-dql.policy.pt --json offline.json", "offline.json", "exists already", "--overwrite")
    fail("evaluate alone-dql.policy.pt --plot a.png", "--plot")
    fail("evaluate alone-dql.policy.pt --video a.gif", "--video")
    fail("swap alone-dql.policy.pt", "alone-dql.policy.pt", "cannot be scored", "names no environment", "evaluate")
    fail("evaluate alone-dql.policy.pt toy-dql.policy.pt", "environment None against conftest:Gentle-v0")

    Path("toy.hdf5").rename("moved.hdf5")
    fail("evaluate alone-dql.policy.pt", "toy.hdf5", "no such file")
    assert "warning: moved" not in run("evaluate alone-dql.policy.pt --data moved.hdf5").stderr
    write_toy_data(Path("toy.hdf5"), seed=1)
    fail("evaluate alone-dql.policy.pt", "toy.hdf5", "has changed", "--data")
    said = run("evaluate alone-dql.policy.pt --data toy.hdf5").stderr
    assert "warning: toy.hdf5: other data than alone-dql.policy.pt was trained on" in said


def test_a_policy_with_an_environment_is_judged_offline_on_request(folder: Path) -> None:
    out = run("evaluate toy-bc.policy.pt --data toy.hdf5 --infer-guidance none").stdout
    assert "offline" in out and "mean Q by its own" in out and "Acts by: ranked by none, 1 candidate" in out


def test_the_data_are_described_before_anything_is_trained(folder: Path) -> None:
    arrays = {"observations": [[0, 1], [1, 1], [2, 1], [3, 1], [3, 1]], "next_observations": np.ones((5, 2))}
    arrays |= {"actions": [[1, 0], [0, 2], [0.5, 4], [0, 1], [0, 1]], "rewards": [1, 2, 10, 4, 5]}
    write_toy_data(Path("five.hdf5"), **arrays, terminals=[0, 1, 0, 0, 0], timeouts=[0, 1, 0, 0, 1])
    options = "--set data.path=five.hdf5 --set data.held_out=0 --set data.reference=[3,13]"
    out = run(f"guidance toy.toml --describe-data {options} --out never.pt").stdout
    told = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line[0] == "│"}
    assert told["transitions"] == "5 to train on, 0 held out"
    assert told["episodes"].startswith("2 whole, of 2 / 2 / 3 steps")
    assert told["ends"] == "1 terminals, 2 time limits, 1 rows are both"
    assert told["returns"].startswith("worst 3.0,") and told["returns"].endswith(
        "median 11.0, three quarters 15.0, best 19.0"
    )
    assert told["scores"].startswith("worst 0.0,") and told["scores"].endswith("best 160.0")
    assert told["constant features"] == "1" and told["actions at a bound"] == "20%, 40%"
    assert told["duplicates"].startswith("20.0%") and told["histogram"].startswith("█")
    assert not Path("never.pt").exists()


def test_transitions_on_disk_give_the_same_weights(folder: Path) -> None:
    run(f"{UNDER_IDQL} --set data.storage=disk --out disk.pt")
    assert equal(read("disk.pt").weights, read("toy-dql.policy.pt").weights)


def test_an_environment_that_changed_since_training_is_named_before_play(folder: Path) -> None:
    bundle = read("toy-bc-unguided.policy.pt")
    write("b.pt", bundle, environment=replace(bundle.environment, action_high=(1.0, 5.0)))
    told = "another environment than when this was trained", "action_high was (1.0, 5.0), is (1.0, 4.0)"
    fail("evaluate b.pt --workers 1", "conftest:Gentle-v0", *told)


@pytest.mark.parametrize(
    ("scores", "mean", "changed", "told"),  # of best of N and of one sample, by member; of the data
    [
        (
            ([8.0, 9.0, 10.0], [30.0, 35.0, 41.0]),
            5.0,
            {},
            ("does harm (best of 4 9.0, one sample 35.3", "distance to the data", "conservatism"),
        ),
        (([8.0, 9.0, 10.0], [30.0, 35.0, 41.0]), 50.0, {}, ("does harm and it is below", "now 20 steps", "eta, now 1")),
        (([8.0, 9.0, 10.0], [7.0, 9.0, 10.5]), 50.0, {"mismatched": [1]}, ("is below the mean", "columns [1]")),
        (([8.0, 30.0, 60.0], [30.0, 35.0, 41.0]), 40.0, {}, ()),  # by no more than chance
        (([50.0, 55.0, 60.0], [30.0, 35.0, 41.0]), 50.0, {}, ()),
    ],
)
def test_harm_beyond_chance_is_told_with_what_helps(
    folder: Path, scores: tuple[list[float], ...], mean: float, changed: dict[str, Any], told: tuple[str, ...]
) -> None:
    bundle = read("toy-dql.policy.pt")
    old = [each.model_copy(update={"quality": []}) for each in bundle.guidances]  # a young one is told of first
    facts = bundle.dataset.model_copy(update={"mean_return": mean + 10} | changed)
    write("p.pt", bundle, dataset=facts, guidances=old, experiment=bundle.experiment)
    results = []
    for guidance, means in zip((None, cli.NONE), scores, strict=True):
        cell = cli.read_cell(Path("p.pt"), guidance, [])
        played = data.Played(np.array([10.0] * 6), np.ones(6), np.full(6, np.nan))
        result = cli.make_result(cell, played, "default")
        results.append(replace(result, pairs=[replace(result.pairs[0], returns=[m + 5, m + 15]) for m in means]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli.advise(cli.read_cell(Path("p.pt"), None, []), *results)
    assert len(caught) == bool(told) and all(text in str(caught[0].message) for text in told)
    assert not told or ("train" in str(caught[0].message)) == ("now 20 steps" in told)


def test_a_known_source_fills_in_what_the_file_leaves_out(folder: Path) -> None:
    Path("toy.toml").write_text('[data]\nsource = "d4rl"\ndataset = "hoper-medium-v2"\n')
    fail("guidance toy.toml --out g.pt", "hoper-medium-v2", "unknown to D4RL", "hopper-medium-v2")


def test_windows_go_through_all_commands(folder: Path) -> None:
    window, play_two = "--set data.horizon=3", "--set evaluation.execute=2"
    assert "in windows of 3 rows" in run(f"guidance toy.toml {window} --describe-data").stdout
    run(f"guidance toy.toml {window} --out g3.pt")
    run(f"policy toy.toml {window} --guidance g3.pt --set policy.network=transformer --out p3.pt")
    described = run("evaluate p3.pt --describe").stdout
    for text in ("in windows of 3 rows", "network=transformer", "hidden=[16, 16]", "heads=4"):
        assert text in described, text
    for settings, taken in (("", 3), (play_two, 2)):
        report, stdout = play(f"evaluate p3.pt {settings}")
        cell = report["cells"][0]
        assert (cell["protocol"]["execute"], cell["protocol"]["horizon"]) == (taken, 3)
        assert f"{taken} of the 3 actions of a window taken" in stdout
        assert {length for pair in cell["pairs"] for length in pair["lengths"]} <= {3, 4, 5, 6}  # environment steps
    report, _ = play(f"swap p3.pt --guidance g3.pt {play_two}")
    assert {cell["protocol"]["execute"] for cell in report["cells"]} == {2}
    report, stdout = play("evaluate toy-dql.policy.pt --set evaluation.execute=1")
    assert report["cells"][0]["protocol"]["horizon"] == 1 and "without effect here: execute" in stdout
    for cell in report["cells"]:  # as an older mdpt wrote it
        del cell["protocol"]["execute"], cell["protocol"]["horizon"]
    assert cli.schema().validate_json(json.dumps(report)).cells[0].protocol.execute == 1
    fail("evaluate p3.pt --infer-guidance toy-idql.guidance.pt", "do not fit together", "horizon 3 against 1")
    fail("evaluate p3.pt --set evaluation.execute=4", "p3.pt", "[evaluation] execute = 4", "[data] horizon = 3")
    fail(f"policy toy.toml {window} --guidance toy-idql.guidance.pt --out q.pt", "horizon 3 against 1")
    fail("guidance toy.toml --set data.horizon=0", "[data] horizon = 0", "greater than or equal to 1")
    fail(
        f"{UNDER_IDQL} --set policy.network=transformer --set policy.heads=5 --out q.pt", "[policy] heads = 5", "divide"
    )
    assert "policy.heads" in run(f"{UNDER_IDQL} --set policy.heads=2 --out q.pt").stderr  # of no use to an mlp
