"""Islands in network namespaces of their own, under strace: what they opened and where they connected, against their cards.

Three witnesses who do not know of each other: the kernel (strace sees native code, too), the store's own log of requests
by address, and the cards. Needs root, strace and iproute2.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from faults.servers import MotoServer

from archipel import store
from archipel.islands.objects import Objects
from archipel.run import Run

pytestmark = [pytest.mark.system, pytest.mark.slow]

JOBS = ("0", "1", "router")
_RUNS = runpy.run_path(str(Path(__file__).parents[1] / "training" / "runs.py"))
_CALLS = "open,openat,openat2,creat,connect,sendto,sendmsg,sendmmsg,io_uring_setup,execve"
_OPEN = re.compile(r'(?:open|openat|openat2|creat)\((?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_INTERNET = re.compile(
    r'sin6?_port=htons\((\d+)\), .*?(?:inet_addr\("|inet_pton\(AF_INET6, "|sin6_addr=")([0-9a-fA-F.:]+)"'
)
_ASIDE = re.compile(r"^\.(.+)\.[^.]+\.tmp(\.[^.]+)?$")  # written aside, then renamed
_STEP = re.compile(r"(^|/)\d{8}(/|$)")
_REQUEST = re.compile(r'^(\S+) - - \[[^\]]*\] (?:\x1b\[[0-9;]*m)*"(?:\x1b\[[0-9;]*m)*([A-Z]+) (\S+) HTTP')


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Harbour:
    """Namespaces with one cable each to an address of this machine, where the store listens; and nothing else."""

    net: str
    spaces: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> str:
        return f"{self.net}.1"

    def address(self, name: str) -> str:
        return f"{self.net}.{10 + 4 * list(self.spaces).index(name) + 2}"

    def add(self, name: str) -> None:
        space, here, there = (f"a{os.getpid()}{kind}{len(self.spaces)}" for kind in ("n", "h", "i"))
        self.spaces[name] = space
        gate = f"{self.net}.{10 + 4 * (len(self.spaces) - 1) + 1}"
        ip("netns", "add", space)
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
        ip("addr", "add", gate, "peer", self.address(name), "dev", here)
        ip("link", "set", here, "up")
        for command in (
            ("addr", "add", self.address(name), "peer", gate, "dev", there),
            ("link", "set", there, "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", self.store, "via", gate),
        ):
            ip("-n", space, *command)

    def inside(self, name: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.spaces[name], *command]


@pytest.fixture(scope="module")
def harbour() -> Iterator[Harbour]:
    assert os.geteuid() == 0, "namespaces need root"
    made = Harbour(f"198.18.{os.getpid() % 250}")  # a range kept for measurements
    ip("addr", "add", f"{made.store}/32", "dev", "lo")
    try:
        for name in JOBS:
            made.add(name)
        yield made
    finally:
        for space in made.spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False)
        ip("addr", "del", f"{made.store}/32", "dev", "lo")


@dataclass
class Seen:
    """What one island did: files below its work folder and elsewhere, internet addresses, requests at the store."""

    work: Path
    read: set[str] = field(default_factory=set)
    wrote: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)
    wrote_outside: set[str] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    other: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    requested: dict[str, set[str]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    def trace(self, path: Path) -> None:
        for line in path.read_text(errors="replace").splitlines():
            call = line.split(" ", 1)[-1].lstrip()
            if call.startswith(("open", "creat")):
                self._opened(call)
            elif call.startswith(("connect", "send")):
                self.addresses |= {f"{host}:{port}" for port, host in _INTERNET.findall(call)}
            elif call.startswith("execve") and call.endswith("= 0"):
                self.ran.append(call[8:60])
            elif call.startswith("io_uring_setup"):
                self.other.append(call)
        folders = {parent.as_posix() for name in self.read | self.wrote for parent in Path(name).parents}
        self.read -= folders  # opened to be synced, and gone since

    def _opened(self, call: str) -> None:
        found = _OPEN.match(call)
        assert found, call
        name = found[2].encode("latin-1", "replace").decode("unicode_escape")
        assert found[1] or name.startswith("/"), f"relative to what? {call}"
        full = os.path.normpath(os.path.join(found[1] or "/", name))  # noqa: PTH118
        writing = any(flag in call for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "creat("))
        if "O_DIRECTORY" in call or Path(full).is_dir():
            return
        if full.startswith(f"{self.work}/"):
            folder, _, file = full[len(str(self.work)) + 1 :].rpartition("/")
            file = _ASIDE.sub(r"\1\2", file)
            short = _STEP.sub(r"\1*\2", f"{folder}/{file}" if folder else file)
            (self.wrote if writing else self.read).add(short)
        elif not re.search(r"= -1 E(NOENT|NOTDIR)", call):
            (self.wrote_outside if writing else self.outside).add(full)

    def requests(self, log: str, address: str, bucket: str, prefix: str) -> None:
        for line in log.splitlines():
            found = _REQUEST.match(line)
            if not found or found[1] != address:
                continue
            parts = urlsplit(found[3])
            key = unquote(parts.path).removeprefix(f"/{bucket}/")
            if key.strip("/") == bucket:
                key = parse_qs(parts.query).get("prefix", [""])[0]
                found = {2: "LIST"}
            key = key.removeprefix(f"{prefix}/")
            self.requested.setdefault(found[2], set()).add(key)


def traced(path: Path) -> list[str]:
    what = f"trace={_CALLS}"
    return [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-y",
        "-s",
        "4096",
        "-e",
        what,
        "-e",
        "signal=none",
        "-o",
        str(path),
    ]


@pytest.fixture(scope="module")
def islands(harbour: Harbour, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    root = tmp_path_factory.mktemp("islands")
    run: Run = _RUNS["make_run"](root / "owner", islands={"heartbeat": 2.0, "lease": 120.0})
    (run.codec / "model.safetensors").parent.mkdir(parents=True, exist_ok=True)
    import numpy as np

    store.write_tensors(run.codec / "model.safetensors", {"mean": np.zeros(3, np.float32)})
    store.write_card(run.codec, "codec", run.id, ["model.safetensors"])
    with MotoServer(harbour.store) as server:
        url = f"s3://{server.make_bucket('isolation')}/run"
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "VIRTUAL_ENV")}
        environment = keep | server.environment | {"OMP_NUM_THREADS": "1", "HOME": str(root)}
        archipel = [sys.executable, "-m", "archipel.cli"]
        subprocess.run([*archipel, "publish", str(run.root), url], check=True, env=environment, timeout=240)
        processes = {}
        for name in JOBS:
            join = [*archipel, "join", url, "--only", name, "--threads", "1", "--work", str(root / name)]
            command = harbour.inside(name, *traced(root / f"{name}.strace"), *join)
            log = open(root / f"{name}.log", "w")  # noqa: SIM115
            (root / f"{name}.tmp").mkdir()
            own = environment | {"TMPDIR": str(root / f"{name}.tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
            processes[name] = subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=root)
        codes = {name: process.wait(timeout=280) for name, process in processes.items()}
        said = {name: (root / f"{name}.log").read_text() for name in JOBS}
        assert set(codes.values()) == {0}, said
        found = {name: Seen(root / name) for name in JOBS}
        requests = server.log()
        for name, seen in found.items():
            with pytest.MonkeyPatch.context() as patch:
                for variable, value in server.environment.items():
                    patch.setenv(variable, value)
                seen.card = Objects.open(url).get_json(f"jobs/{name}/00000001/result/card.json")
            seen.trace(root / f"{name}.strace")
            seen.requests(requests, harbour.address(name), "isolation", "run")
    return found


_LISTEN = """
import socket, sys
s = socket.socket(); s.bind((sys.argv[1], 0)); s.listen(); print(s.getsockname()[1], flush=True); sys.stdin.read()
"""
_CALL = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); print('reached')"


def test_islands_cannot_reach_each_other(harbour: Harbour) -> None:
    listen = harbour.inside("1", sys.executable, "-c", _LISTEN, harbour.address("1"))
    listener = subprocess.Popen(listen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert listener.stdin is not None and listener.stdout is not None
    try:
        where = (harbour.address("1"), listener.stdout.readline().strip())
        own = subprocess.run(harbour.inside("1", sys.executable, "-c", _CALL, *where), capture_output=True, text=True)
        assert own.stdout == "reached\n", "somebody listens there"
        for other in ("0", "router"):
            call = harbour.inside(other, sys.executable, "-c", _CALL, *where)
            said = subprocess.run(call, capture_output=True, text=True)
            assert said.returncode != 0 and "Network is unreachable" in said.stderr
    finally:
        listener.stdin.close()
        listener.wait(30)


@pytest.mark.parametrize("name", JOBS)
def test_an_island_connects_to_the_store_and_to_nothing_else(
    harbour: Harbour, islands: dict[str, Seen], name: str
) -> None:
    seen = islands[name]
    hosts = {address.rpartition(":")[0] for address in seen.addresses}
    assert hosts == {harbour.store} and len(seen.addresses) == 1, seen.addresses
    assert seen.other == [], "nothing that strace would not see"
    assert set(seen.card["touched"]["connected"]) <= seen.addresses


_STRANGE = """
import os, socket, sys
os.close(os.open("experts/7/model.safetensors", os.O_RDONLY)); os.chdir("shards"); open("7/card.json").close()
open(sys.argv[1] + "/stolen", "w").close()
for call in (lambda: socket.create_connection(("192.0.2.1", 443), 1), lambda: socket.create_connection(("2001:db8::1", 443), 1),
             lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"?", ("192.0.2.53", 53))):
    try: call()
    except OSError: pass
from obstore.store import S3Store
try: S3Store("b", endpoint="http://192.0.2.9:9", allow_http=True, access_key_id="a", secret_access_key="b",
             retry_config={"max_retries": 0}).get("x")
except Exception: pass
"""


def test_the_witness_sees_what_should_not_happen(harbour: Harbour, tmp_path: Path) -> None:
    """A control: foreign files and addresses, by Python and by native code, by full and by relative names."""
    work = tmp_path / "0"
    for name in ("experts/7/model.safetensors", "shards/7/card.json"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    trace = tmp_path / "strace"
    command = harbour.inside("0", *traced(trace), sys.executable, "-c", _STRANGE, str(tmp_path))
    subprocess.run(command, check=True, cwd=work, timeout=200)
    seen = Seen(work)
    seen.trace(trace)
    assert {"experts/7/model.safetensors", "shards/7/card.json"} <= seen.read
    assert f"{tmp_path}/stolen" in seen.wrote_outside
    assert {"192.0.2.1:443", "2001:db8::1:443", "192.0.2.53:53", "192.0.2.9:9"} <= seen.addresses


def names(seen: Seen) -> set[str]:
    return seen.read | seen.wrote


@pytest.mark.parametrize("name", JOBS)
def test_the_card_says_which_files_were_opened(islands: dict[str, Seen], name: str) -> None:
    """Every file of the run that the card names was really opened; every one opened is named, or carried it here."""
    seen, touched = islands[name], islands[name].card["touched"]
    told = set(touched["read"]) | set(touched["wrote"])
    print(name, "told", sorted(told), "opened", sorted(names(seen)))
    assert told <= names(seen), told - names(seen)
    own = "router" if name == "router" else f"experts/{name}"
    shard = "all" if name == "router" else name
    carried = {
        *(f"shards/{shard}/{file}{end}" for file in ("card.json", "train.safetensors", "validation.safetensors") for end in ("", ".part")),
        *(f"{own}/{file}" for file in ("attempt.json", "card.json", "model.safetensors", "config.json", "metrics.jsonl")),
        "run.toml", ".locks/island.lock", "island.txt", "logs/join.log", "logs/join.jsonl",
    }  # fmt: skip
    left = names(seen) - told - carried
    assert [one for one in left if not re.fullmatch(r"outbox/[^.]*(/(state\.safetensors|manifest\.json))?", one)] == []


@pytest.mark.parametrize("name", JOBS)
def test_no_island_opened_what_is_another_jobs(islands: dict[str, Seen], name: str) -> None:
    seen = islands[name]
    own = {"router": ("router/", "shards/all/")}.get(name, (f"experts/{name}/", f"shards/{name}/"))
    foreign = [
        one for one in names(seen) if one.startswith(("experts/", "shards/", "router/")) and not one.startswith(own)
    ]
    assert foreign == []
    others = [str(islands[other].work) for other in JOBS if other != name]
    elsewhere = [
        one for one in seen.outside | seen.wrote_outside if one.startswith((*others, str(seen.work.parent / "owner")))
    ]
    assert elsewhere == []


@pytest.mark.parametrize("name", JOBS)
def test_the_store_was_asked_for_what_the_card_says(islands: dict[str, Seen], name: str) -> None:
    """The store's own log of this address: only the job's keys, and those that the card names."""
    seen, told = islands[name], islands[name].card["island"]["store"]
    shard = "all" if name == "router" else name
    allowed = ("run.toml", "published.json", "probe", f"jobs/{name}/", f"shards/{shard}/")
    asked = set().union(*seen.requested.values())
    strangers = [key for key in asked if not key.startswith(allowed)]
    assert strangers == [], "another island's result, shard or claim"
    put = {_STEP_OF_CHECKPOINT.sub(r"\1*", key) for key in seen.requested.get("PUT", set())} - {"probe"}
    read = seen.requested["GET"]
    after = {f"jobs/{name}/{file}" for file in ("committed.json", "00000001/heartbeat.json")}
    results = {
        f"jobs/{name}/00000001/result/{file}"
        for file in ("model.safetensors", "config.json", "metrics.jsonl", "card.json")
    }
    print(name, "put", sorted(put), "read", sorted(read), "told", told)
    last = {f"jobs/{name}/00000001/checkpoints/*/{file}" for file in ("state.safetensors", "manifest.json")}
    # What follows the card: the result itself, the commit, and what was on its way when the card was written.
    assert put - set(told["wrote"]) <= {*after, *results, *last, f"jobs/{name}/claims/00000001.json"}
    assert set(told["wrote"]) <= put
    assert set(told["read"]) <= read
    assert {key for key in read if key.startswith("shards/")} == {
        key for key in told["read"] if key.startswith("shards/")
    }
    assert "DELETE" not in seen.requested


_STEP_OF_CHECKPOINT = re.compile(r"(/checkpoints/)\d{8}")


@pytest.mark.parametrize("name", JOBS)
def test_what_is_written_lies_in_the_islands_folder(islands: dict[str, Seen], name: str) -> None:
    seen = islands[name]
    own = ("/dev/", "/proc/", f"{seen.work}.tmp/")
    left = [one for one in seen.wrote_outside if not one.startswith(own)]
    assert left == [], "written outside of --work"


def test_telemetry_is_off() -> None:
    """Set by our entry before any library is read; and the islands above, with no such variable set, called nobody."""
    code = (
        "import os, sys; sys.argv = ['archipel', '--help']\n"
        "from archipel import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY, 'hub'\n"
        "print('off')"
    )
    clean = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k and "OFFLINE" not in k and k != "DO_NOT_TRACK"}
    said = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=200)
    assert said.stdout.endswith("off\n"), said.stderr
