"""Faults from outside, against the installed mdpt: `python tests/faults.py`; with `--minutes 1`, as many as that allows.

Damaged and hostile bundles, data files and experiment files, kills, interruptions, races, full and forbidden folders.
Each try has a number, which with the seed decides all that is random in it but moments: `--only PART:NUMBER` repeats it
and keeps its folder. Most runs are forked from a process that has mdpt imported already, the others are fresh. For Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

os.environ |= {"OMP_NUM_THREADS": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}

import h5py  # type: ignore[import-untyped]
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_pdf
import matplotlib.backends.backend_svg  # noqa: F401 (all are imported before privileges are given up)
import numpy as np
import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table

import mdpt.mdpt
from mdpt import data, models

SECONDS, BYTES = 10.0, 2 << 30  # what a run may take
GOOD = ("refused", "harmless")
BAD = ("wrong", "unclear", "tracebacks", "hangs", "memory", "executed", "orphans", "litter")
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Before = Callable[[], object]
TOY = """
name = "toy"
seeds = [0, 1]
device = "cpu"
[data]
source = "hdf5"
path = "toy.hdf5"
environment = "Pendulum-v1"
max_episode_steps = 6
reference = [-50, 0]
held_out = 0.1
[guidance]
steps = 4
batch_size = 8
hidden = [8]
save_every = 0
snapshots = 2
[policy]
steps = 4
batch_size = 8
hidden = [8]
time_features = 4
save_every = 0
snapshots = 2
[evaluation]
episodes = 1
candidates = 2
"""


# --- a try and its runs -----------------------------------------------------------------------------------------


class Shared:
    """What all tries use and none changes."""

    folder: Path  # inputs, @ in commands
    fresh: list[str]  # how a fresh process begins
    results: ClassVar[dict[str, Any]] = {}  # of commands, where nothing is wrong
    seconds: ClassVar[dict[str, float]] = {}


class Try:
    """One try: a folder, random numbers, and what was found."""

    def __init__(self, part: str, number: int, seed: int) -> None:
        self.name, self.number, self.random = f"{part}:{number}", number, random.Random(f"{seed} {part} {number}")
        self.base = Path(tempfile.mkdtemp(prefix=f"{part}-", dir=Shared.folder.parent))
        self.base.chmod(0o755)
        self.folder, self.executed = self.base / "work", self.base / "executed"
        self.folder.mkdir()
        self.what: list[str] = []  # was done
        self.found: list[tuple[str, str]] = []  # a column of the table, and why
        self.outputs = {"x.pt", "new.pt"}  # files that may be there at the end
        self.code, self.out, self.err, self.runs = 0, "", "", 0

    def begin(self, command: str, fresh: bool = False, before: Before = lambda: None) -> int:
        """Start `mdpt COMMAND` in a session of its own, `before` in its process. The process's number."""
        self.runs += 1
        self.what.append(f"{'fresh' if fresh else 'forked'} {command}")
        if child := os.fork():
            return child
        code = 120
        try:
            os.setsid()
            os.chdir(self.folder)
            os.environ["EXECUTED"] = str(self.executed)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for stream, name in enumerate((os.devnull, *self.logs(self.runs))):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o666), stream)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            words = [str(Shared.folder / word[1:]) if word[:1] == "@" else word for word in shlex.split(command)]
            if fresh:
                os.execvp(Shared.fresh[0], [*Shared.fresh, *words])
            code = run_here(words)
        except BaseException:  # noqa: BLE001 (what nobody caught, as Python's own end shows it)
            traceback.print_exc()
        finally:
            os._exit(code)

    def logs(self, run: int) -> tuple[Path, Path]:
        return self.base / f"out{run}", self.base / f"err{run}"

    def wait(self, process: int, run: int = 0, seconds: float = SECONDS) -> int:
        """Wait for the end of a run, note what no run may do, and return its exit code."""
        began = time.monotonic()
        while not (ended := os.wait4(process, os.WNOHANG))[0]:
            late = time.monotonic() - began > seconds
            if late or anonymous(process) > BYTES:
                self.found.append(("hangs" if late else "memory", ""))
                os.killpg(process, signal.SIGKILL)
                ended = os.wait4(process, 0)
                break
            time.sleep(0.005)
        self.code = os.waitstatus_to_exitcode(ended[1])
        self.out, self.err = (path.read_text(errors="replace") for path in self.logs(run or self.runs))
        until = time.monotonic() + 5
        while alive(process) and time.monotonic() < until:
            time.sleep(0.02)
        if alive(process):
            self.found.append(("orphans", "a process of its session lives 5 s after it"))
            os.killpg(process, signal.SIGKILL)
        if "Traceback (most" in self.err or self.code == 120 or (self.code < 0 and -self.code not in ENDS):
            lines = [line for line in self.err.splitlines() if line.strip()]
            self.note("tracebacks", f"exit {self.code}: {lines[-1] if lines else ''}")
        if CONTROL.search(self.out + self.err):
            self.note("unclear", "control characters reach the terminal")
        return self.code

    def run(self, command: str, fresh: bool = False, before: Before = lambda: None) -> int:
        return self.wait(self.begin(command, fresh, before), seconds=SECONDS + 15 * fresh)

    def note(self, column: str, why: object = "") -> None:
        """Say what came of it; what was said first counts."""
        if not self.found:
            self.found.append((column, str(why)))

    def judge(self, must: str = "", result: Any = None) -> None:
        """Judge the last run. must: "refuse", or "same", where only the result of the untouched will do."""
        if self.code == 1:
            _, _, message = ("\n" + self.err).rpartition("\nmdpt: ")
            lines = message.strip().splitlines()
            mistakes = all(re.match(r"\S*\bx\.(toml|hdf5): ", line) for line in lines)  # of a file, a line each
            if not lines or (len(lines) > 2 and not mistakes) or len(message) > 2000:
                self.note("unclear", f"{len(lines)} lines, {len(message)} characters: {self.err[-200:]}")
            self.note("refused", message)
        elif self.code:
            self.note("tracebacks", f"exit {self.code}: {self.err[-200:]}")
        elif must == "refuse" or (must == "same" and self.result() != result):
            self.note("wrong", "accepted" + ", with another result" * (must == "same"))
        self.note("harmless")

    def result(self) -> Any:
        """What the last run printed, and the bundle that it wrote."""
        return self.out, [read(self.folder / name) for name in re.findall(r"--out (\S+)", self.what[-1])]

    def end(self) -> tuple[str, list[tuple[str, str]], str]:
        if self.executed.exists():
            self.found.insert(0, ("executed", "code that came with a file was run"))
        files = [*self.folder.iterdir()]
        left = [path.name for path in files if path.name not in self.outputs]
        left += [f"{path.name}, empty" for path in files if path.is_file() and not path.stat().st_size]
        if left:
            self.found.append(("litter", ", ".join(left)))
        bad = [found for found in self.found if found[0] in BAD]
        return self.name, bad[:2] or self.found[:1], " | ".join(text[:200] for text in self.what)


def run_here(words: list[str]) -> int:
    """`mdpt WORDS` in this process, or load_agent's way of acting; how a fresh interpreter would end with it."""
    try:
        try:
            if words[0] == "load_agent":
                act(words[1])
            else:
                mdpt.mdpt.app(args=words, prog_name="mdpt")
        except SystemExit as end:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return end.code if isinstance(end.code, int) else 0
        finally:
            sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        return 120
    return 0


def act(path: str) -> None:
    try:
        print(models.load_agent(path)(np.ones((2, 3), dtype=np.float32)))
    except data.MdptError as error:
        print(f"mdpt: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def anonymous(process: int) -> int:
    """Bytes of its own that a process holds in memory."""
    with suppress(OSError, IndexError):
        _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()
    return 0


def alive(group: int) -> bool:
    """Whether a process of this group lives; those that have ended are taken leave of."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def plain(node: Any) -> Any:
    """A bundle's content that == compares to the bit, without what a run cost."""
    if isinstance(node, torch.Tensor):
        return str(node.dtype), tuple(node.shape), node.numpy().tobytes()
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != "accounting"}
    return [plain(value) for value in node] if isinstance(node, list | tuple) else repr(node)


def read(path: Path) -> Any:
    """All of a bundle's content; None: there is none, or it is damaged."""
    with suppress(Exception), zipfile.ZipFile(path) as archive:
        return None if archive.testzip() else plain(torch.load(path, map_location="cpu", weights_only=True))
    return None


# --- bundles ----------------------------------------------------------------------------------------------------

CASES = [  # a command, and the bundle that is damaged before it as x.pt
    ("guidance @toy.toml --out x.pt", "begun-guidance.pt"),
    ("policy @toy.toml --set policy.scheme=joint --out x.pt", "begun-joint.pt"),
    ("policy @toy.toml --guidance x.pt --out new.pt", "guidance.pt"),
    ("policy @toy.toml --guidance x.pt --out new.pt", "policy.pt"),
    ("evaluate x.pt --workers 1", "policy.pt"),
    ("evaluate x.pt --curve --workers 1", "policy.pt"),
    ("evaluate x.pt --infer-guidance none --workers 1", "joint.pt"),
    ("evaluate @policy.pt --infer-guidance x.pt --workers 1", "guidance.pt"),
    ("evaluate x.pt --describe", "policy.pt"),
    ("evaluate x.pt --describe", "begun-joint.pt"),
    ("swap @policy.pt --guidance x.pt --workers 1", "guidance.pt"),
    ("swap x.pt --guidance @guidance.pt --workers 1", "policy.pt"),
    ("load_agent x.pt", "policy.pt"),
]
NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 7, 1.5, NAN, INF, -INF, 1e308, 2**31, 2**63, 10**30, -(2**70), "", "x", "[/x]", "[bold]",
    "a\x1b[31mb\x07\nc", "\x00", "\ud800", "é" * 300, "y" * 10**6, "../../x", "canary:X-v0", "canary", [], {}, [[]], (), [NAN],
    {"x": 1}, {1: 2}, [0] * 10**6, b"x", 1j, {1, 2}, torch.zeros(0), torch.zeros(()), torch.full((3,), NAN), torch.zeros(3, 3),
    torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.complex64), torch.zeros(1).expand(10**9),
    torch.zeros(1).expand(10**5, 10**5), torch.zeros(2, 2).to_sparse(), torch.zeros(5, device="meta"),
]  # fmt: skip
LONG = re.compile(r"max_episode_steps|episodes|transitions")  # where large numbers are long, and nobody's fault


class Call:
    """Pickled as a call that leaves a trace."""

    def __init__(self, random: random.Random, trace: Path) -> None:
        path, script = str(trace), f"open({str(trace)!r}, 'w')"
        self.call: tuple[Any, tuple[Any, ...]] = random.choice([
            (os.mkdir, (path,)), (open, (path, "w")), (exec, (script,)), (eval, (script,)), (os.system, (f"touch {path}",)),
            (subprocess.call, (["touch", path],)), (__import__, ("canary",)), (shutil.copy, (__file__, path)),
            (np.savetxt, (path, [0])), (Path(path).touch, ()), (torch.save, (0, path)), (pickle.loads, (b"ccanary\nX\n.",)),
        ])  # fmt: skip

    def __reduce__(self) -> Any:
        return self.call


def shown(value: Any) -> str:
    return f"tensor {value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def near(value: Any) -> list[Any]:
    """Values of the same kind that are wrong in its place, or may be."""
    if isinstance(value, torch.Tensor):
        value = torch.atleast_2d(value)
        return [
            value.double(), value.long(), value.half(), value.to(torch.complex64), value * NAN, value * 1e38, value.mT,
            value.flatten(), value[:0], value[..., :1], value[None], torch.cat([value, value]),
            value.flatten()[:1].expand(10**5, 10**5),
        ]  # fmt: skip
    if isinstance(value, str):
        return [value + " ", value.upper(), value[:-1], value + "\x1b[31m", f"[red]{value}", f"canary:{value}"]
    if isinstance(value, int):
        return [value + 1, value - 1, -value, 15_000, 10**5, 10**7, 2**31, 2**62]
    if isinstance(value, list | tuple):
        return [type(value)([*value, *value]), value[1:]]
    return [{**value, 3: 3}, {"x": value}] if isinstance(value, dict) else ODD


def change(random: random.Random, bundle: Any, call: Call) -> str:
    """Change anything, anywhere in a bundle; says what."""
    if random.random() < 0.05:
        for module in (bundle, *bundle["guidances"]):
            module["environment"]["id"] = "canary:X-v0"
        return "its environment is of a module"
    node, path = bundle, []
    while True:
        key = random.choice([*node] if isinstance(node, dict) else range(len(node)))
        path.append(str(key))
        if not isinstance(node[key], dict | list) or not node[key] or random.random() < 0.25:
            break
        node = node[key]
    way = random.choice(["delete", "add", "odd", "odd", "odd", "near", "near", "near", "call"])
    value = call if way == "call" else random.choice(near(node[key]) if way == "near" else ODD)
    if way == "delete":
        del node[key]
    elif way == "add" and isinstance(node, dict):
        node[random.choice(["x", 5, "id", "[/x]", None, ("a",), "\x1b[31m"])] = value
    else:
        node[key] = value
    return f"{way} {'.'.join(path)}, {call.call[0].__name__ if way == 'call' else shown(value)}"


def forbid(random: random.Random, bundle: Any) -> str:
    """One of the changes that no command may accept; says which."""
    module = random.choice([bundle, bundle, *bundle["guidances"]])
    weights, table, place = module["weights"], module["experiment"][module["kind"]], bundle["environment"]
    name = random.choice([*weights])
    value = weights[name]
    flaws: list[tuple[Any, Any, Any]] = [
        *((weights, name, wrong) for wrong in (value * NAN, value / 0, value[..., :-1].contiguous(), value.double())),
        (module["normalizer"], "mean", torch.full((3,), NAN)),
        (module["normalizer"], "deviation", torch.ones(4)),
        *((bundle, "reference", pair) for pair in ((0.0, 0.0), (NAN, 1.0), (1.0, 0.0), (0.0,))),
        *((place, "action_low", (number,)) for number in (3.0, NAN)),
        *((place, key, number) for key, number in (("max_episode_steps", -5), ("observation_dim", 10**7))),
        *((bundle, key, wrong) for key, wrong in (("step", -1), ("step", table["steps"] + 5), ("kind", "evaluate"))),
        (module, "seeds", [*module["seeds"], 9]),
        *((table, "hidden", widths) for widths in ([15_000, 15_000], [8] * 17, [])),
        *((table, key, 10**7) for key in ("time_features", "diffusion_steps")),
        *((snapshot, key, snapshot[key] * NAN) for snapshot in module["snapshots"].values() for key in [*snapshot][:1]),
    ]
    for optimizer in (bundle.get("training") or {}).get("optimizers", []):
        flaws += [(optimizer, "exp_avg", torch.zeros(2, 3)), (optimizer, "exp_avg_sq", optimizer["exp_avg_sq"] * NAN)]
        flaws += [(optimizer, "state", {}), (optimizer, "step", torch.zeros(2))]
    node, key, value = random.choice(flaws)
    node[key] = value
    bundle["complete"] &= key != "step"
    return f"forbidden: {key} = {shown(value)}"


def damage(random: random.Random, path: Path) -> str:
    """Damage the bytes of a file, its ends more often; says how."""
    content = path.read_bytes()
    size, junk = len(content), random.randbytes(64)
    at = random.choice(
        [random.randrange(size), size - 1 - random.randrange(min(size, 4000)), random.randrange(min(size, 4000))]
    )
    stop = at + random.randrange(1, 512)
    ways = {
        "flip": content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :],
        "truncate": content[: max(at, 1)],
        "append": content + junk,
        "blank": content[:at] + bytes(len(content[at:stop])) + content[stop:],
        "cut": content[:at] + content[stop:] or b"x",
        "insert": content[:at] + junk + content[at:],
    }
    (way,) = random.choices([*ways], [6, 1, 1, 1, 1, 1])
    path.write_bytes(ways[way])
    return f"bytes: {way} at {at} of {size}"


def repack(random: random.Random, path: Path, call: Call) -> str:
    """Write a bundle's archive as torch would not; says how."""
    way = random.choice(["pack", "double", "claim", "pickle", "lose", "legacy"])
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    chosen = random.choice([name for name in entries if way != "pickle" or name.endswith("data.pkl")])
    if way == "lose":
        del entries[chosen]
    elif way in ("pack", "pickle"):
        entries[chosen] = bytes(1 << 26) if way == "pack" else pickle.dumps(call, 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if way == "pack" else zipfile.ZIP_STORED) as archive:
        for name, content in [*entries.items(), *[(chosen, bytes(len(entries.get(chosen, b""))))] * (way == "double")]:
            archive.writestr(name, content)
        if way == "claim":
            archive.getinfo(chosen).file_size = random.choice([0, 2**31, 2**32 + 5, 2**40])
    if way == "legacy":
        path.write_bytes(pickle.dumps(call, 2))
    return f"archive: {way}, {chosen}"


def bundles(trial: Try) -> None:
    command, source = CASES[trial.number % len(CASES)]
    target, call, way = trial.folder / "x.pt", Call(trial.random, trial.executed), trial.random.random()
    shutil.copy(Shared.folder / source, target)
    if way < 0.35:  # what is accepted of it must be what it was
        how = damage(trial.random, target) if way < 0.25 else repack(trial.random, target, call)
    else:
        bundle = torch.load(target, weights_only=True)
        how = (forbid(trial.random, bundle) if way < 0.55 else change(trial.random, bundle, call)) or ""
        torch.save(bundle, target)
    trial.what.append(f"{source} {how}")
    trial.run(command, fresh=trial.number % 50 == 7 and not command.startswith("load_agent"))
    if LONG.search(how):
        trial.found = [found for found in trial.found if found[0] != "hangs"] or [("harmless", "long")]
    must = "same" if way < 0.35 else "refuse" if way < 0.55 else ""
    trial.judge(must, Shared.results[f"{command} {source}"])


# --- data and experiment files ----------------------------------------------------------------------------------


def write_data(path: Path, **options: Any) -> None:
    generator, rows = np.random.default_rng(0), 288
    columns = {
        "observations": generator.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "actions": generator.uniform(-2, 2, (rows, 1)).astype(np.float32),
        "rewards": generator.uniform(-9, 0, rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 6 == 5,
    }
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file.create_dataset(key, data=column, **options)


def spoil(random: random.Random, file: Any, other: str) -> tuple[str, bool]:
    """Make one column of an HDF5 file, or all, something else; says what, and whether that must be refused."""
    keys = {key: file[key].shape[1:] for key in file}
    key = random.choice([*keys])
    column, wide = file[key][()], keys[key]
    shape = random.choice([(), (0,), (288, 0), (288, 3, 2), (287,), (1,), (3, 288), (288, 40_000)])
    kind = random.choice(
        ["S5", "f2", "f8", "i1", "u8", "c8", "?", ">f4", h5py.string_dtype(), h5py.ref_dtype, [("a", "f4")]]
    )
    value = random.choice([NAN, INF, -INF, 1e38, -7, 2])
    layout = h5py.VirtualLayout(column.shape, "f4")
    layout[...] = h5py.VirtualSource(other, key, column.shape)

    def make(key: str = key, rows: int = 288, **options: Any) -> None:
        file.create_dataset(key, (rows, *keys[key]), "f4", **options)

    def put(item: Any) -> None:
        file[key] = item

    def make_all() -> None:
        for name in keys:
            file.pop(name, None)
            make(name, 10**9, chunks=True)

    harmless: dict[str, Before] = {
        f"shape {shape}": lambda: file.create_dataset(key, shape, "f4"),
        f"dtype {kind}": lambda: file.create_dataset(key, column.shape, kind),
        f"{value} in it": lambda: put(np.where(column == column.flat[5], value, column)),
        "deleted": lambda: None,
        "a group": lambda: file.create_group(key),
        "deep groups": lambda: file.create_group(f"{key}/" + "/".join("g" * 2000)),
        "a circle": lambda: file.create_group(key).__setitem__("self", file["/"]),
        "other keys": lambda: [file.create_group(f"[/x]\x1b[31m{i}") for i in range(9_000)],
        "empty": lambda: put(h5py.Empty("f4")),
        "a committed type": lambda: put(np.dtype("f4")),
        "a vast chunk": lambda: make(chunks=(10**8, *wide), maxshape=(None, *wide)),
    }
    forbidden: dict[str, Before] = {
        "10^9 rows": lambda: make(rows=10**9),
        "10^12 rows, packed": lambda: make(rows=10**12, compression="gzip"),
        "10^9 rows in all": make_all,
        "a link to another file": lambda: put(h5py.ExternalLink(other, key)),
        "a link to itself": lambda: put(h5py.SoftLink(f"/{key}")),
        "a link to nothing": lambda: put(h5py.SoftLink("/nothing")),
        "bytes of another file": lambda: make(external=[(other, 0, 4096)]),
        "columns of another file": lambda: file.create_virtual_dataset(key, layout),
    }
    way, act = random.choice([*(harmless | forbidden).items()])
    del file[key]
    with suppress(ValueError, TypeError, OSError):  # what h5py itself does not write stays deleted
        act()
    return f"{key}: {way}", way in forbidden and key in file


def hdf5(trial: Try) -> None:
    path, must, way = trial.folder / "x.hdf5", True, trial.random.random()
    trial.outputs = {path.name}
    if way < 0.01:
        os.mkfifo(path)
        trial.what.append("a pipe")
    else:
        shutil.copy(Shared.folder / trial.random.choice(["toy.hdf5", "packed.hdf5"]), path)
        if way < 0.45:
            how, must = damage(trial.random, path), False
        else:
            with h5py.File(path, "r+") as file:
                how, must = spoil(trial.random, file, str(Shared.folder / "toy.hdf5"))
        trial.what.append(how)
    disk = "" if must else trial.random.choice(["", " --set data.storage=disk"])
    trial.run(f"guidance @toy.toml --set data.path={path} --describe-data{disk}")
    trial.judge("refuse" * must)


DEEP = 5_000
TEXTS = [
    "0", "-1", "1e999", "nan", "inf", "9223372036854775808", str(2**70), "-" + "9" * DEEP, "1.5", "1e-320", "true", '""', "[]",
    "{}", "'x'", "1979-05-27", "0b1", '"\\u0000"', '"\\u001b[31m"', '"[/x]"', '"' + "y" * 100_000 + '"', "[0.2, 'a']", "[[1]]",
    "[" * DEEP, "[" * DEEP + "]" * DEEP, "{a=" * DEEP, "[1, 1]", "[nan, 1]", "[0, 0]", "[2, 1]", "'''a\nb'''", '"é😀"', "{x = 1}",
    f"[{2**64}]", '"../../x"', "[0, 1, 2, 3]", "'a/b'", '"' + "n" * 300 + '"',
]  # fmt: skip
OVERRIDES = [
    "", "=", ".=1", "a.b.c=1", "data=1", "policy.steps", "policy.step=1", "policy.steps=1\nname='x'",
    "policy.steps=1\n[evaluation]\nepisodes=3", "name\n=1", "\ufeffseeds=[1]", "policy.\udcff=1", "name=\udcff",
    "x." * DEEP + "=1", "[/x]=1", "policy.\x1b[31m=1", "name=\x1b[31m", "data.path=/",
]  # fmt: skip
BASES = [
    '"x.toml"', '""', '"."', '"nothing.toml"', "5", '["x.toml"]', '"/dev/zero"', '"\\u0000"', '"[/x]"', '"\\u001b[31m"',
]  # fmt: skip
LETTERS = "\x00\ufeff\u2028\r\x1b\"[]=é😀\n#\\.'\x85{"


def toml(trial: Try) -> None:
    random, option, must, tables = trial.random, None, "", ("data", "guidance", "policy", "evaluation")
    text = TOY.replace("toy.hdf5", str(Shared.folder / "toy.hdf5"))
    lines, at = text.splitlines(keepends=True), random.randrange(len(text))
    line = random.randrange(len(lines))
    fields = [f"{table}.{key}" for table in tables for key in type(getattr(data.Experiment(), table)).model_fields]
    fields = [field for field in [*fields, "name", "seeds", "device"] if field not in ("data.source", "data.path")]
    field, value, base = random.choice(fields), random.choice(TEXTS), random.choice(BASES)
    table, _, key = field.rpartition(".")
    head, _, rest = text.partition(f"[{table}]\n" if table else "\n")
    here, bracket, there = rest.partition("\n[")
    changed = f"{head}[{table}]\n" * bool(table) + f"{key} = {value}\n" + re.sub(rf"(?m)^{key} = .*", "", here)
    letters = text[:at] + random.choice(LETTERS) + text[at + random.choice([0, 1]) :]
    wholes: list[str | bytes] = [
        "\ufeff" + text, text.encode("utf-16"), text.encode() + b"\xff", bytes(1000), b"\x89HDF\r\n\x1a\n",
        text.replace("\n", "\r\n"), text.replace("\n", "\r"), "a." * DEEP + "a = 1\n", f"[{'a.' * DEEP}a]\n", "x = " + "[" * DEEP,
        f"[{'y' * 10**6}]", *(text.replace(lines[line], new) for new in ("", lines[line] * 2, lines[line] + "unknown = 1\n", "[x]\n")),
    ]  # fmt: skip
    way = random.choice(["set", "set", "file", "file", "override", "letters", "whole", "extends"])
    if way in ("set", "override"):
        option = f"{field}={value}" if way == "set" else random.choice(OVERRIDES)
        must = "refuse" * (way == "override" and "\ufeff" not in option)
    files: dict[str, str | bytes] = {
        "file": changed + bracket + there,
        "letters": letters,
        "whole": random.choice(wholes),
    }
    content = files.get(way, f"extends = {base}\n{text}" if way == "extends" else text)
    (trial.folder / "x.toml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    trial.outputs.add("x.toml")
    trial.what.append(
        {"file": f"{field} = {value}", "extends": base}.get(way, way if option else repr(content[at:][:80]))
    )
    work = "--out new.pt" if random.random() < 0.4 and key not in ("steps", "batch_size") else "--describe-data"
    trial.run(f"guidance x.toml {work}" + ("" if option is None else f" --set {shlex.quote(option)}"))
    trial.judge("refuse" if way == "extends" else must)


# --- kills, interruptions, races, disks -------------------------------------------------------------------------

TRAININGS = {
    "guidance-idql": "guidance @toy.toml --out x.pt",
    "guidance-dql": "guidance @toy.toml --out x.pt --set guidance.algorithm=dql",
    "policy-dql": "policy @toy.toml --out x.pt --guidance @guidance.pt",
    "policy-cfg": "policy @toy.toml --out x.pt --guidance @guidance.pt --set policy.algorithm=cfg",
    "policy-joint": "policy @toy.toml --out x.pt --set policy.scheme=joint",
}
LONGER = " --set guidance.steps=250 --set policy.steps=200"
PLAY = " --workers 1 --episodes 100"
RACES = [  # a command, what it writes, and whose result that is
    (TRAININGS["guidance-idql"] + LONGER, "x.pt", "guidance-idql"),
    (TRAININGS["policy-joint"] + LONGER, "x.pt", "policy-joint"),
    (f"swap @policy.pt --guidance @guidance.pt --json x.json{PLAY}", "x.json", "swap"),
    (f"evaluate @policy.pt --json x.json{PLAY}", "x.json", "evaluate"),
    (f"evaluate @policy.pt --plot x.png{PLAY}", "x.png", "plot"),
]


def written(path: Path) -> Any:
    """What there is of an output, as far as it is always the same; None: not the whole of it."""
    with suppress(OSError, ValueError, KeyError):
        if path.suffix == ".json":
            return json.loads(path.read_text())["cells"]
        return read(path) if path.suffix == ".pt" else path.read_bytes()[-8:-4] == b"IEND" or None
    return None


def stop(trial: Try, process: int, number: signal.Signals) -> None:
    """Send a signal, and judge how the run ends: by it, and saying so."""
    trial.what.append(number.name)
    os.kill(process, number)
    if trial.wait(process, seconds=60) not in (0, -number, 128 + number):
        trial.note("wrong", f"exit {trial.code} after {number.name}: {trial.err[-300:]}")
    if trial.code == 130 and "interrupted" not in trial.err:
        trial.note("unclear", f"does not say that it was interrupted: {trial.err[-300:]}")


def kills(trial: Try) -> None:
    """Killed while it saves often, half of the times as it writes; then ended by SIGTERM: the bundle alone is left.

    One in ten is killed while workers play for it: none outlives it.
    """
    if trial.number % 10 == 5:
        process = trial.begin("evaluate @policy.pt --episodes 3000 --workers 2", fresh=True)
        time.sleep(trial.random.uniform(2, 9))
        stop(trial, process, signal.SIGKILL)
        trial.note("harmless")
        return
    command = "guidance @toy.toml --out x.pt --set guidance.steps=100000 --set guidance.hidden=[256,256]"
    fresh, writing, path = trial.number % 20 == 0, trial.number % 2 == 0, trial.folder / "x.pt"
    for number in (signal.SIGKILL, signal.SIGTERM):
        was, saves = path.stat().st_mtime_ns if path.exists() else 0, trial.random.randrange(1, 4)
        process, until = trial.begin(command, fresh), time.monotonic() + 8 + 12 * fresh
        while saves and time.monotonic() < until:
            time.sleep(0.0005)
            with suppress(FileNotFoundError):
                if (now := path.stat().st_mtime_ns) != was:
                    saves, was = saves - 1, now
            if number == signal.SIGKILL and writing and [*trial.folder.glob(".*.tmp")]:
                break
        time.sleep(trial.random.uniform(0, 0.01 if writing else 0.2))
        stop(trial, process, number)
        if path.exists() and read(path) is None:
            trial.note("wrong", f"the bundle is damaged after {number.name}")
    trial.note("harmless")


def interruptions(trial: Try) -> None:
    """Ended at a random moment, then gone on with to the end: what an uninterrupted run gives, to the bit."""
    kind, number = [*TRAININGS][trial.number % 5], ENDS[trial.number // 5 % 3]
    command, fresh = TRAININGS[kind] + LONGER, trial.number % 16 == 0
    process = trial.begin(command, fresh)
    time.sleep(trial.random.uniform(0.05, Shared.seconds[kind]) + fresh * trial.random.uniform(0, 4))
    stop(trial, process, number)
    if trial.code and trial.wait(trial.begin(command), seconds=60):
        trial.note("wrong", f"does not go on: exit {trial.code}, {trial.err[-300:]}")
    if written(trial.folder / "x.pt") != Shared.results[kind]:
        trial.note("wrong", "differs from an uninterrupted run")
    trial.note("harmless")


def races(trial: Try) -> None:
    """Two runs that write one file: one is refused and says for whom, the other's is complete."""
    command, output, result = RACES[trial.number % len(RACES)]
    trial.outputs.add(output)
    first = trial.begin(command)
    time.sleep(trial.random.choice([0, 0, 0.05, 0.2]))
    second = trial.begin(command)
    ended = [(trial.wait(process, run, 60), trial.err) for process, run in ((first, 1), (second, 2))]
    refused = [err for code, err in ended if code == 1]
    if sorted(code for code, _ in ended) != [0, 1]:
        trial.note("wrong", f"exits {[code for code, _ in ended]}, {ended[1][1][-200:]}")
    elif not re.search(rf"\b({first}|{second})\b|exists already", refused[0]):
        trial.note("unclear", f"names no other: {refused[0][-200:]}")
    if written(trial.folder / output) != Shared.results[result]:
        trial.note("wrong", "what is left is not the whole of one")
    trial.note("refused")


WRITING = [
    *TRAININGS.values(),
    "evaluate @policy.pt --workers 1 --json x.json",
    "evaluate @policy.pt --workers 1 --curve --plot x.png",
    "evaluate @policy.pt --describe --plot x.svg",
    "swap @policy.pt --guidance @guidance.pt --workers 1 --json x.json --plot x.pdf",
]
SAYING = [
    *("--help", "--version", "guidance --help", "evaluate @policy.pt --describe", "guidance @toy.toml --describe-data"),
    *("evaluate @policy.pt --workers 1", "swap @policy.pt --workers 1", "guidance @toy.toml --out x.pt"),
]
READING = {
    "x.pt": ("policy.pt", "evaluate x.pt --describe"),
    "x.toml": ("toy.toml", "guidance x.toml --describe-data"),
    "x.hdf5": ("toy.hdf5", "guidance @toy.toml --describe-data --set data.path="),
}


def disk(trial: Try) -> None:
    """A full disk, an output that takes nothing, a folder or file without permission, names too long."""
    way = ["full", "limit", "full", "limit", "forbidden", "hidden", "sink", "name"][trial.number % 8]
    trial.what.append(way)
    trial.outputs |= {"x.json", "x.png", "x.svg", "x.pdf", "filler"}
    if way in ("full", "limit"):
        fill(trial, way == "full")
        return
    command, before, must = trial.random.choice(WRITING), lambda: as_nobody(trial), "refuse"
    if way == "hidden":
        name, (source, command) = trial.random.choice([*READING.items()])
        shutil.copy(Shared.folder / source, trial.folder / name)
        (trial.folder / name).chmod(0)
        trial.outputs.add(name)
        command += f"{trial.folder / name}" * command.endswith("=")
    elif way == "sink":
        command, sink = trial.random.choice(SAYING), trial.random.choice(["/dev/full", "closed", "pipe", "ascii"])
        before, must = lambda: stop_output(sink), "refuse" * (sink == "/dev/full")
        trial.what.append(sink)
    elif way == "name":
        long = "n" * trial.random.choice([240, 250, 255, 256, 300, 5000])
        command = f"guidance @toy.toml --set name={long}"
        if option := trial.random.choice(["json", "plot", "out", ""]):
            command = f"{'guidance @toy.toml' if option == 'out' else 'evaluate @policy.pt'} --{option} {long}.png"
        trial.outputs |= {f"{long}.png", f"{long}-idql.guidance.pt"}
        before, must = lambda: None, ""
    trial.run(command, way == "sink", before)
    if trial.what[1] == "pipe" and trial.code in (1, -signal.SIGPIPE, 128 + signal.SIGPIPE):
        trial.note("harmless", "nobody reads")
    trial.judge(must)


def fill(trial: Try, mount: bool) -> None:
    """A run in a small file system that is nearly full, or else under a limit to a file's size."""
    command, room = trial.random.choice(WRITING), trial.random.choice([0, 1, 4, 8, 12, 16, 24, 32, 64]) << 10
    call = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(trial.folder)]
    mounted = mount and subprocess.run(call, capture_output=True, check=False).returncode == 0
    path = trial.folder / "x.pt"
    try:
        if command == TRAININGS["guidance-idql"]:
            shutil.copy(Shared.folder / "begun-guidance.pt", path)
        old = read(path)
        if mounted:
            (trial.folder / "filler").write_bytes(bytes(max(1, shutil.disk_usage(trial.folder).free - room)))
        trial.what.append(f"room for {room >> 10} KiB")
        size = (max(room, 8192),) * 2  # what is printed goes to files, too
        trial.run(command, before=lambda: None if mounted else resource.setrlimit(resource.RLIMIT_FSIZE, size))
        trial.judge()
        now = read(path)
        if (trial.code and now != old) or (not trial.code and path.exists() and now is None):
            trial.note("wrong", "the bundle is not what it was" if trial.code else "the bundle is damaged")
        if mounted:
            trial.end()
    finally:
        if mounted:
            subprocess.run(["umount", str(trial.folder)], check=True)


def as_nobody(trial: Try) -> None:
    """Without privileges, where this process has them, in a folder that cannot be written."""
    trial.folder.chmod(0o555)
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def stop_output(sink: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    if sink == "ascii":
        os.environ["PYTHONIOENCODING"] = "ascii"
    elif sink == "closed":
        os.close(1)
    else:
        os.dup2(writing if sink == "pipe" else os.open(sink, os.O_WRONLY), 1)


# --- all of it --------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[int, Callable[[Try], None]]] = {
    "bundles": (10_000, bundles),
    "hdf5": (2_000, hdf5),
    "toml": (2_500, toml),
    "kills": (200, kills),
    "interruptions": (300, interruptions),
    "races": (20, races),
    "disk": (160, disk),
}


def prepare(seed: int) -> None:
    """Make all inputs, warm this process, and find out what comes of each command where nothing is wrong."""
    folder = Shared.folder
    folder.mkdir()
    (folder / "toy.toml").write_text(TOY)
    (folder / "canary.py").write_text("import os\nopen(os.environ['EXECUTED'], 'w')\n")
    write_data(folder / "toy.hdf5")
    write_data(folder / "packed.hdf5", compression="gzip", chunks=True)
    sys.path.append(str(folder))
    path = filter(None, [os.environ.get("PYTHONPATH"), str(folder)])
    os.environ |= {"PYTHONPATH": ":".join(path), "MPLCONFIGDIR": str(folder), "EXECUTED": str(folder / "x")}
    warnings.filterwarnings("ignore", "Duplicate name")  # in an archive, which is meant

    def run(command: str, source: str = "", before: Before = lambda: None) -> Try:
        trial, began = Try("prepare", 0, seed), time.monotonic()
        if source:
            shutil.copy(folder / source, trial.folder / "x.pt")
        trial.wait(trial.begin(command, before=before), seconds=60)
        if trial.code not in (0, -signal.SIGKILL):
            raise SystemExit(f"mdpt {command}: {trial.err}")
        Shared.seconds[command] = time.monotonic() - began
        return trial

    for name, kind in (("guidance", "guidance-idql"), ("policy", "policy-dql"), ("joint", "policy-joint")):
        shutil.copy(run(TRAININGS[kind]).folder / "x.pt", folder / f"{name}.pt")
    for name, kind in (("guidance", "guidance-idql"), ("joint", "policy-joint")):
        shutil.copy(run(TRAININGS[kind], before=die_at_second_save).folder / "x.pt", folder / f"begun-{name}.pt")
    with open(os.devnull, "w") as sink:
        streams = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
        run_here(["evaluate", str(folder / "policy.pt"), "--workers", "1"])
        for stream, kept in zip((1, 2), streams, strict=True):
            os.dup2(kept, stream)
    for kind, command in TRAININGS.items():
        Shared.results[kind] = written(run(command + LONGER).folder / "x.pt")
        Shared.seconds[kind] = Shared.seconds[command + LONGER]
    for command, output, name in RACES[2:]:
        Shared.results[name] = written(run(command).folder / output)
    for command, source in CASES:
        Shared.results[f"{command} {source}"] = run(command, source).result()


def die_at_second_save() -> None:
    """Be killed as a second save takes its place: what is left is the first, of step 1."""
    saves: list[Any] = []

    def hear(event: str, values: Any) -> None:
        if event == "os.rename":
            saves.append(values)
            if len(saves) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def attempt(part: str, number: int, seed: int, keep: bool = False) -> tuple[str, list[tuple[str, str]], str]:
    trial = Try(part, number, seed)
    PARTS[part][1](trial)
    found = trial.end()
    if keep:
        print(f"kept in {trial.base}")
    else:
        shutil.rmtree(trial.base)
    return found


def attempts(pool: ProcessPoolExecutor, part: str, seed: int, until: float) -> Iterator[Any]:
    """What comes of the tries of a part, as they end; no new one begins after `until`."""
    numbers, running = iter(range(PARTS[part][0])), set[Any]()
    while True:
        begun = islice(numbers, 4 - len(running) if time.monotonic() < until else 0)
        running |= {pool.submit(attempt, part, number, seed) for number in begun}
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (each.result() for each in done)


def adopt() -> None:
    """Let whatever a run leaves behind be this process's child."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=INF, help="for all parts together; by default their full counts"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", metavar="PART:NUMBER", help="repeat one, and keep its folder")
    parser.add_argument("--mdpt", default=str(Path(sys.executable).with_name("mdpt")), help="what a fresh process runs")
    given = parser.parse_args()
    only, _, number = (given.only or "").partition(":")
    if unknown := [name for name in [*given.parts, only] if name and name not in PARTS]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    Shared.folder, Shared.fresh = Path(tempfile.mkdtemp(prefix="faults-"), "inputs"), shlex.split(given.mdpt)
    Shared.folder.parent.chmod(0o755)
    names, failures, table = given.parts or [*PARTS], 0, Table("part", "of", "tried", *GOOD, *BAD)
    adopt()
    try:
        prepare(given.seed)
        if only:
            print(attempt(only, int(number), given.seed, keep=True))
            return
        end = time.monotonic() + 60 * given.minutes
        pool = ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork"), adopt)
        for i, part in enumerate(names):
            until, counts = time.monotonic() + (end - time.monotonic()) / (len(names) - i), Counter[str]()
            for name, found, what in attempts(pool, part, given.seed, until):
                counts.update({"tried", *(column for column, _ in found)})
                for column, why in found:
                    if column in BAD:
                        failures += 1
                        print(f"{name} (seed {given.seed}) {column}: {what!a}\n    {why!a}", flush=True)
            table.add_row(part, str(PARTS[part][0]), *(str(counts[column]) for column in ("tried", *GOOD, *BAD)))
        pool.shutdown()
    finally:
        if not only:
            shutil.rmtree(Shared.folder.parent)
    Console(width=140).print(table)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
