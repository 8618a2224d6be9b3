"""The model that ships: whole, small enough, admitted; and made a clip with from a built wheel, outside the clone, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest

from archipel import box, store
from archipel.ensemble import provenance
from archipel.exchange import pack as packing
from archipel.run import Run

ROOT = Path(__file__).parents[2]
# Put before everything in a process: any address that Python code connects to or asks for ends it.
NO_NETWORK = """
import os, sys

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        sys.stderr.write(f"NETWORK {event} {args}\\n")
        os._exit(97)

sys.addaudithook(hook)
"""


def test_it_is_whole_small_admitted_and_names_its_originals() -> None:
    (name,) = box.names()
    folder = box.folder()
    assert folder.name == name and folder.is_relative_to(ROOT)
    facts, run = box.facts(folder), Run.open(folder)
    assert facts["run"] == run.id
    there = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(folder).as_posix() for path in there} == {*facts["files"], box.FACTS}
    for path in there:
        assert path.stat().st_size <= packing.MOST_FILE
        if path.name != box.FACTS:
            entry = facts["files"][path.relative_to(folder).as_posix()]
            assert (store.sha256_file(path), path.stat().st_size) == (entry["sha256"], entry["bytes"])
    assert sum(path.stat().st_size for path in there) <= packing.MOST_ALL
    assert set(facts["admitted"]) == {*run.expert_names, "router"} and len(run.expert_names) >= 2
    assert facts["bars"]["required"] and all("held-out loss" in said for said in facts["admitted"].values())
    assert set(facts["originals"]) == {*run.expert_names, "router", "codec"}
    assert len(facts["examples"]["captions"]) == 20
    card = (folder / box.CARD).read_text(encoding="utf-8")
    for part in (
        "## Scores",
        "**Monolith**",
        "## Compute",
        "## Licences",
        "## Limits",
        "](sheet.webp)",
        "](beside.webp)",
    ):
        assert part in card
    assert facts["command"] and facts["commit"] and facts["commit"] in card


@pytest.mark.slow
def test_a_built_wheel_generates_outside_the_clone_without_a_network(tmp_path: Path) -> None:
    wheels, place, home = tmp_path / "wheels", tmp_path / "site", tmp_path / "home"
    source = tmp_path / "source"  # a build writes beside what it builds
    listed = subprocess.run(
        ["git", "ls-files", "-z", "src", "pyproject.toml", "README.md", "LICENSE", "NOTICE"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(place), str(wheel)]
    subprocess.run(install, check=True, timeout=200)
    (place / "sitecustomize.py").write_text(NO_NETWORK)
    home.mkdir()
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ARCHIPEL_", "PYTHON"))
    }
    environment |= {"PYTHONPATH": str(place), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    given = {"cwd": home, "env": environment, "capture_output": True, "text": True, "timeout": 280, "check": False}
    command = [sys.executable, str(place / "bin" / "archipel"), "generate", "a party popper", "-o", "out.mp4"]
    done = subprocess.run(command, **given)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "out.mp4\n"
    run = Run.open(box.folder())
    note = provenance.read(home / "out.mp4")
    assert note is not None and note["run"] == run.id and note["seed"] == 0
    with av.open(str(home / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == run.config.clips.frames
    where = subprocess.run([sys.executable, "-c", "import archipel.box as b; print(b.folder())"], **given)  # type: ignore[call-overload]
    assert Path(where.stdout.strip()).is_relative_to(place), where
    probe = "import urllib.request as r; r.urlopen('http://127.0.0.1:9')"
    assert subprocess.run([sys.executable, "-c", probe], **given).returncode == 97  # type: ignore[call-overload]
