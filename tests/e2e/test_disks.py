"""A disk that is really full, and one that is really read-only: small file systems in memory, which only root mounts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own; ``mount`` changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=64m", new=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(folder: Path, options: str, new: bool = False) -> None:
    kind = ["-t", "tmpfs", "-o", options, "tmpfs"] if new else ["-o", f"remount,{options}"]
    subprocess.run(["mount", *kind, folder], check=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_keeps_what_was_finished_and_the_work_goes_on(disk: Path, archipel: Shell) -> None:
    run = disk / "run"
    made = archipel("init", run, "--source", "shapes", "--preset", "tiny", "--set", "clips.count=40")
    assert made.returncode == 0, made.stderr
    ballast = disk / "ballast"
    codes = []
    for free in (8, 40, 300, 500, 1000, 2500):  # KiB
        ballast.unlink(missing_ok=True)
        room = shutil.disk_usage(disk).free - (free << 10)
        with open(ballast, "wb") as file:
            for _ in range(room >> 16):
                file.write(bytes(1 << 16))
            file.write(bytes(room & 0xFFFF))
        before = files(run)
        stopped = archipel("prepare", run)
        codes.append(stopped.returncode)
        assert "Traceback" not in stopped.stderr and "internal error" not in stopped.stderr, stopped.stderr
        if stopped.returncode == 0:
            break
        assert stopped.returncode == 2 and "disk is full" in stopped.stderr, stopped.stderr
        after = files(run)
        assert [name for name in before if name.endswith(".safetensors") and after.get(name) != before[name]] == []
    assert codes.count(2) >= 3, codes
    ballast.unlink()
    for words in (["prepare", run], ["verify", run]):
        done = archipel(*words)
        assert done.returncode == 0, done.stderr


def test_a_read_only_run_can_be_looked_at_and_used_but_not_continued(
    finished: Path, disk: Path, tmp_path: Path, archipel: Shell
) -> None:
    run = disk / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "partition")
    mount(disk, "ro")
    for words in (["status", run], ["verify", run], ["doctor"]):
        done = archipel(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    made = archipel("generate", run, "a ball", "--steps", 1, "-o", tmp_path / "clip.mp4")
    assert made.returncode == 0, made.stderr
    for words in (
        ["run", run],
        ["partition", run],
        ["report", run],
        ["train", run, "0"],
        ["init", disk / "other", "--source", "shapes"],
        ["generate", run, "a ball", "--steps", 1, "-o", disk / "clip.mp4"],
    ):
        refused = archipel(*words)
        assert refused.returncode == 2, (words, refused.stderr)
        assert "ead-only" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr


def test_a_read_only_cache_is_refused_in_a_sentence(
    disk: Path, tmp_path: Path, archipel: Shell, environment: dict[str, str]
) -> None:
    made = archipel("init", tmp_path / "run", "--source", "fluent-emoji", "--preset", "demo")
    assert made.returncode == 0, made.stderr
    mount(disk, "ro")
    refused = archipel("prepare", tmp_path / "run", env=environment | {"ARCHIPEL_CACHE": str(disk)})
    assert refused.returncode == 2 and "ARCHIPEL_CACHE" in refused.stderr, refused.stderr
    listed = archipel("cache", "list", env=environment | {"ARCHIPEL_CACHE": str(disk)})
    assert listed.returncode == 0 and str(disk) in listed.stdout
