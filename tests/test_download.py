"""Tests of D4RL by name: a local server that cuts, lies and forgets; D4RL's own tables judge what is known of each."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import os
import re
import resource
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from mdpt import data
from mdpt.data import MdptError, environment_spec

KEYS = ("observations", "actions", "rewards", "terminals")
INFOS = data.d4rl_infos("these tests need D4RL")
NAMES = list(INFOS["DATASET_URLS"])
D4RL = Path(str(importlib.util.find_spec("d4rl").submodule_search_locations[0]))  # type: ignore[union-attr, index]


def hdf5(*keys: str, rows: int = 5_000) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key in keys:
            file[key] = np.random.default_rng(0).normal(size=rows)
    return buffer.getvalue()


BODY, LONGER = hdf5(*KEYS), hdf5(*KEYS, rows=9_000)
HALF = len(BODY) // 2
LATER = f"bytes={HALF}-"


@dataclass(frozen=True)
class Answer:
    """What the server answers to one request, and how it fails at that."""

    body: bytes = BODY
    send: int | None = None  # so many bytes at most
    length: int | None = None  # what it says there are, if not the truth
    status: int = 200
    kind: str = "application/x-hdf5"
    etag: str = '"one"'
    ranges: bool = True
    shift: int = 0  # of the range that it says it sends
    chunked: bool = False
    wait: threading.Event | None = None  # after sending
    reset: bool = False  # the connection at the end

    def give(self, to: Handler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range", ""))
        same = to.headers.get("If-Range", self.etag) == self.etag
        start = int(asked[1]) if asked and self.ranges and same else 0
        rest, total = self.body[start:], len(self.body)
        if start and start == total:
            return to.send_error(416)
        to.send_response(206 if start else self.status)
        to.send_header("Content-Type", self.kind)
        if self.etag:
            to.send_header("ETag", self.etag)
        if start:
            to.send_header("Content-Range", f"bytes {start + self.shift}-{total - 1}/{total}")
        length = len(rest) if self.length is None else self.length - start
        to.send_header(*(("Transfer-Encoding", "chunked") if self.chunked else ("Content-Length", str(length))))
        to.end_headers()
        rest = rest[: self.send]
        if self.chunked:
            rest = b"%x\r\n%b\r\n" % (len(rest), rest) + (b"0\r\n\r\n" if self.send is None else b"")
        to.wfile.write(rest)
        if self.wait and not self.wait.wait(30):
            to.server.seen.append(("in vain", None, None))
        if self.reset:
            to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            to.connection.close()


class Server(ThreadingHTTPServer):
    """Gives the answers of each path in turn, and the last of them ever after; remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.seen: list[tuple[str, str | None, str | None]] = []  # path, Range, If-Range
        super().__init__(("127.0.0.1", 0), Handler)

    def address(self, name: str, *answers: Answer) -> str:
        self.answers[f"/{name}"] = list(answers)
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        answers = self.server.answers[self.path]
        (answers.pop(0) if len(answers) > 1 else answers[0]).give(self)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "PAUSE", 0.0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "data.hdf5"


def nothing(so_far: int, total: int) -> None:
    pass


def dead() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/nobody"


def unseen(what: str, so_far: int, total: int) -> None:
    pass


def failing(addresses: list[str], path: Path, show: Callable[[int, int], None] = nothing) -> str:
    """What a download that fails says, having left nothing behind."""
    with pytest.raises(MdptError) as caught:
        data.download(addresses, path, KEYS, show)
    assert not path.parent.is_dir() or os.listdir(path.parent) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        pytest.param([Answer()], [None], id="plain"),
        pytest.param([Answer(send=HALF), Answer()], [None, LATER], id="cut"),
        pytest.param([Answer(send=HALF), Answer(send=99), Answer()], [None, LATER, f"bytes={HALF + 99}-"], id="twice"),
        pytest.param([Answer(send=HALF, etag=""), Answer(etag="")], [None, LATER], id="no ETag"),
        pytest.param([Answer(send=HALF), Answer(ranges=False)], [None, LATER], id="no ranges"),
        pytest.param([Answer(send=HALF), Answer(LONGER, etag='"two"')], [None, LATER], id="longer by now"),
        pytest.param(
            [Answer(LONGER, send=len(LONGER) - 9), Answer(etag='"two"')],
            [None, f"bytes={len(LONGER) - 9}-"],
            id="shorter by now",
        ),
        pytest.param([Answer(chunked=True)], [None], id="chunked"),
        pytest.param([Answer(chunked=True, send=HALF), Answer(chunked=True)], [None, LATER], id="chunked, cut"),
    ],
)
def test_a_file_arrives_whole(server: Server, path: Path, answers: list[Answer], asked: list[str | None]) -> None:
    shown: list[tuple[int, int]] = []
    expected, known = answers[-1].body, 0 if answers[0].chunked else len(answers[-1].body)
    data.download([server.address("a", *answers)], path, KEYS, lambda *bytes_: shown.append(bytes_))
    assert path.read_bytes() == expected
    assert os.listdir(path.parent) == [path.name]
    assert [ranges for _, ranges, _ in server.seen] == asked
    assert [etag for _, _, etag in server.seen[1:]] == [answers[0].etag or None] * (len(asked) - 1)
    assert shown[-1] == (len(expected), known)


@pytest.mark.parametrize(("reset", "timeout"), [(True, 30.0), (False, 0.3)], ids=["reset", "silent"])
def test_a_broken_connection_is_made_again(server: Server, path: Path, reset: bool, timeout: float) -> None:
    event = threading.Event()

    def show(so_far: int, total: int) -> None:
        if so_far > HALF or (reset and so_far == HALF):
            event.set()

    address = server.address("a", Answer(send=HALF, wait=event, reset=reset), Answer())
    data.download([address], path, KEYS, show, timeout)
    assert path.read_bytes() == BODY
    assert [ranges for _, ranges, _ in server.seen] == [None, LATER]


FAILURES: dict[str, tuple[list[Answer], str]] = {
    "404": ([Answer(b"no", status=404)], "HTTP Error 404: Not Found"),
    "403": ([Answer(b"no", status=403)], "HTTP Error 403: Forbidden"),
    "HTML": (
        [Answer(b"<html>Log in</html>", kind="text/html")],
        "sent 19 bytes of 'text/html', which are no HDF5 file",
    ),
    "empty": ([Answer(b"")], "sent 0 bytes"),
    "wrong length": (
        [Answer(length=len(BODY) + 9)],
        f"416: Requested Range Not Satisfiable, after {len(BODY):,} of {len(BODY) + 9:,} bytes",
    ),
    "half a file": ([Answer(BODY[:HALF])], "sent a damaged HDF5 file"),
    "keys": ([Answer(hdf5("actions", "rewards"))], "sent an HDF5 file without observations, terminals"),
    "gone": ([Answer(send=HALF), Answer(b"", status=503, ranges=False)], f"503: Service Unavailable, after {HALF:,}"),
    "another range": ([Answer(send=HALF), Answer(shift=1)], f"sent 'bytes {HALF + 1}-"),
    "another file": ([Answer(send=HALF, etag=""), Answer(LONGER, etag="")], f"of {len(BODY):,} on"),
}


@pytest.mark.parametrize(("answers", "said"), FAILURES.values(), ids=FAILURES)
def test_what_is_no_dataset_is_said_and_the_next_address_tried(
    server: Server, path: Path, answers: list[Answer], said: str
) -> None:
    address = server.address("a", *answers)
    message = failing([address], path)
    title, problem, by_hand = message.split("\n")
    assert title == "data.hdf5: cannot be downloaded."
    assert address in problem and said in problem
    assert str(path.parent) in by_hand and path.name in by_hand
    data.download([server.address("a", *answers), server.address("b", Answer())], path, KEYS, nothing)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == [path.name]


def test_each_dead_address_is_named(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def unknown(host: str, *args: Any, **options: Any) -> Any:
        if host == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    unsafe = server.address("a", Answer()).replace("http:", "https:")  # nothing there speaks TLS
    addresses = ["http://nowhere.invalid/a", dead(), unsafe, server.address("b", Answer(status=404))]
    _, *problems, by_hand = failing(addresses, path).split("\n")
    said = ("Name or service not known", "Connection refused", "SSL", "404: Not Found")
    for problem, address, reason in zip(problems, addresses, said, strict=True):
        assert address in problem and reason in problem
    assert str(path.parent) in by_hand and path.name in by_hand
    data.download([*addresses, server.address("c", Answer())], path, KEYS, nothing)
    assert path.read_bytes() == BODY


def test_a_full_disk_is_not_the_address_s_fault(server: Server, path: Path) -> None:
    addresses = [server.address("a", Answer()), server.address("b", Answer())]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        message = failing(addresses, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"{path}: cannot be written (File too large); make room there, or set MDPT_CACHE")
    assert {name for name, _, _ in server.seen} == {"/a"}


def test_a_folder_that_cannot_be_is_named(server: Server, path: Path) -> None:
    path.parent.write_bytes(b"")
    assert failing([server.address("a", Answer())], path / path.name).startswith(
        f"{path / path.name}: cannot be written"
    )
    assert not server.seen


def test_ctrl_c_leaves_nothing(server: Server, path: Path) -> None:
    def interrupt(so_far: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.download([server.address("a", Answer())], path, KEYS, interrupt)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    "place", ["set/walker_mixed.hdf5", "home/.d4rl/datasets/walker_mixed.hdf5", "cache/d4rl/walker_mixed.hdf5"]
)
def test_a_file_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "set"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(urllib.request, "urlopen", None)
    there = tmp_path / place
    there.parent.mkdir(parents=True)
    there.write_bytes(b"anything")
    assert data.find_d4rl("walker2d-medium-replay-v0", tmp_path / "cache", unseen) == there


def test_a_file_that_is_not_there_comes_into_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(data, "MIRROR", server.address(""))
    server.address("hopper_mixed.hdf5", Answer())
    urls = {"hopper-medium-replay-v0": dead().replace("nobody", "hopper_mixed.hdf5")}
    monkeypatch.setattr(data, "d4rl_infos", lambda otherwise: {"DATASET_URLS": urls})
    found = data.find_d4rl("hopper-medium-replay-v0", tmp_path, unseen)
    assert found == tmp_path / "d4rl" / "hopper_mixed.hdf5"
    assert found.read_bytes() == BODY


def test_d4rl_s_server_comes_first_then_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setenv("D4RL_DATASET_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(data, "download", lambda addresses, *rest: tried.extend(addresses))
    data.find_d4rl("hopper-medium-v2", tmp_path, unseen)
    assert tried == [
        "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5",
        "https://huggingface.co/datasets/imone/D4RL/resolve/main/hopper_medium-v2.hdf5",
    ]


def test_what_d4rl_knows_of_a_dataset() -> None:
    facts, reason, warnings, _ = data.d4rl_facts("hopper-medium-v2")
    assert (facts, reason, warnings) == (
        {
            "environment": "Hopper-v4",
            "max_episode_steps": 1000,
            "reward_scale": "return-range",
            "reference": (-20.272305, 3234.3),
        },
        "",
        (),
    )
    assert data.d4rl_facts("ant-medium-v2")[0]["observation_columns"] == 27
    assert data.d4rl_facts("maze2d-umaze-v1")[0]["reference"] == (23.85, 161.86)
    assert data.d4rl_facts("maze2d-umaze-dense-v1")[0]["reference"] == (68.537689, 193.66285642381482)
    facts, reason, *_ = data.d4rl_facts("maze2d-eval-umaze-v1")
    assert facts == {"max_episode_steps": 300, "reward_scale": "none"} and "PointMaze" in reason
    assert data.d4rl_facts("antmaze-umaze-diverse-v2")[0]["reward_scale"] == "minus-one"


@pytest.mark.parametrize(("version", "told"), [("3.4.0", False), ("3.5.0", True), ("3.10.1", True), (None, False)])
def test_ant_moves_otherwise_in_a_newer_mujoco(
    monkeypatch: pytest.MonkeyPatch, version: str | None, told: bool
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    warnings = data.d4rl_facts("ant-medium-v2")[2]
    assert bool(warnings) == told
    assert all(f"MuJoCo {version}" in warning for warning in warnings)
    assert data.d4rl_facts("hopper-medium-v2")[2] == data.d4rl_facts("antmaze-umaze-v2")[2] == ()


@pytest.mark.parametrize("use", [data.d4rl_facts, lambda name: data.find_d4rl(name, Path("none"), unseen)])
def test_a_name_that_cannot_be_used(use: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in {
        "hopper-medium-v3": "unknown to D4RL. Nearest: hopper-medium-v",
        "Hopper_Medium_v2": "unknown to D4RL. Nearest: hopper-medium-v2",
        "antmaze-umaze-v1": "unknown to D4RL. Nearest: antmaze-umaze-v",
        "": "unknown to D4RL. Nearest: hopper-medium-v2.",
        "flow-ring-random-v0": "SUMO",
        "carla-town-full-v0": "CARLA",
        "minigrid-fourrooms-v0": "discrete",
    }.items():
        with pytest.raises(MdptError, match=re.escape(said)) as caught:
            use(name)
        assert str(caught.value).startswith(f"dataset {name!r}: ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MdptError, match=r"'hopper-medium-v2': D4RL's .* pip install d4rl"):
        use("hopper-medium-v2")


def test_each_name_of_d4rl_has_one_family_or_is_refused() -> None:
    assert len(NAMES) > 150
    for name in NAMES:
        families = [family for family in data.FAMILIES if re.fullmatch(family.pattern, name)]
        assert len(families) == (name.partition("-")[0] not in data.REFUSED), name
    for family in data.FAMILIES:
        assert any(re.fullmatch(family.pattern, name) for name in NAMES), family.pattern
        assert (family.environment is None) == bool(family.reason), family.pattern


def test_time_limits_are_those_d4rl_registers() -> None:
    known = 0
    for file in D4RL.glob("*/__init__.py"):
        for name, limit in re.findall(r"id='([\w-]+)',[^)]*?max_episode_steps=(\d+)", file.read_text(encoding="utf-8")):
            if name in NAMES and name.partition("-")[0] not in data.REFUSED:
                known += 1
                assert data.d4rl_facts(name)[0]["max_episode_steps"] == int(limit), name
    assert known > 50


spec_of = functools.lru_cache(environment_spec)


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
def test_the_environments_are_as_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into a file there
    played = 0
    for name in NAMES:
        for family in data.FAMILIES:
            if family.environment and re.fullmatch(family.pattern, name):
                played += 1
                spec = spec_of(family.environment)
                assert family.max_episode_steps == spec.max_episode_steps, name
                assert family.observation_columns in (None, spec.observation_dim), name
                low, high = data.d4rl_facts(name)[0].get("reference", (0.0, 0.0))
                assert low < high or name == "ant-random-expert-v0", name
    assert played > 80
