"""What do labels (`cfg`) and the noise regression (`dac`) learn, by `label_share`, `w` and `eta`?

    python experiments/labels.py FOLDER [TASK ...]    runs `mdpt` commands; goes on where it stopped
    python experiments/labels.py --table              prints the tables of experiments/README.md

One guidance `idql` of 5,000 steps for each task, ten members. Policies of 5,000 steps: `bc`, and `cfg` for each share, one
sample by each w; `dac` for each eta, one sample and the best of ten. Scores of each member: experiments/labels/TASK.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats
from support import ROOT, score, train

STORE = ROOT / "experiments" / "labels"
TASKS = {"hopper": ROOT / "hopper.toml", "halfcheetah": ROOT / "experiments" / "halfcheetah.toml"}
SHARES, WEIGHTS, ETAS = ("", "0.5", "0.2", "0.1"), (1, 1.5, 2, 4), (0.1, 1, 5, 20)
TRAINING = """
seeds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
device = "cpu"

[guidance]
steps = 5000
tau = 0.04
snapshots = 1

[policy]
steps = 5000
snapshots = 1
"""


def run(folder: Path, task: str) -> None:
    """All cells of a task; each is stored as soon as it is played."""
    (folder / f"{task}.toml").write_text(f'extends = "{TASKS[task]}"\nname = "{task}"\n{TRAINING}')
    guidance, cells = train(folder, "guidance", f"{task}.toml", f"{task}.pt"), {}

    def play(name: str, file: str, policy: str, *options: object) -> None:
        cells[name] = score(folder, f"{task}-{file}", policy, *options)
        STORE.mkdir(exist_ok=True)
        (STORE / f"{task}.json").write_text(json.dumps(cells, indent=1) + "\n")

    def policy(file: str, *settings: str) -> str:
        options = [part for setting in settings for part in ("--set", f"policy.{setting}")]
        return train(folder, "policy", f"{task}.toml", f"{task}-{file}.pt", "--guidance", guidance, *options)

    alone = ("--infer-guidance", "none")
    play("bc", "bc", policy("bc", "algorithm=bc"), *alone)
    for share in SHARES:
        learned = policy(f"cfg{share}", "algorithm=cfg", *([f"label_share={share}"] if share else []))
        for w in WEIGHTS:
            play(
                f"cfg, share {share or 'unset'}, w {w}",
                f"cfg{share}-{w}",
                learned,
                *alone,
                "--set",
                f"evaluation.w={w}",
            )
    for eta in ETAS if task == "hopper" else ():
        learned = policy(f"dac{eta}", "algorithm=dac", f"eta={eta}")
        play(f"dac, eta {eta}, one sample", f"dac{eta}-one", learned, *alone)
        play(f"dac, eta {eta}, best of 10", f"dac{eta}-best", learned)


def rows() -> Iterator[str]:
    """Median (range) of each cell, its mean difference to `bc`, and p of a paired test over members by Wilcoxon."""
    for path in sorted(STORE.glob("*.json")):
        cells = {name: np.array(scores) for name, scores in json.loads(path.read_text()).items()}
        yield from ("", f"| {path.stem} | median (range) | mean - `bc`'s | p |", "|---|---|---|---|")
        for name, scores in cells.items():
            difference = scores - cells["bc"]
            p = f"{stats.wilcoxon(difference).pvalue:.3f}" if difference.any() else ""
            middle = f"{np.median(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"
            yield f"| {name} | {middle} | {difference.mean():+.1f} | {p} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print("\n".join(rows()))
        sys.exit()
    given.folder.mkdir(parents=True, exist_ok=True)
    for each in given.tasks or TASKS:
        run(given.folder, each)
