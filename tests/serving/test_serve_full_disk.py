"""`archipel serve` on a disk that is really full: a small file system in memory, which only root mounts."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from faults.disk import fill
from tests.serving.conftest import Process
from tests.serving.test_serve_process import client, frames, until_done

pytestmark = pytest.mark.system


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_jobs_wait_clients_are_told_and_none_is_lost(started: Callable[..., Process], disk: Path) -> None:
    asked = client(started("--state", str(disk / "state"), "--batch", "1"))
    first = asked.videos.create(prompt="x").id
    until_done(asked, first)
    names = [asked.videos.create(prompt=f"ball {i}", extra_body={"steps": 100, "seed": i}).id for i in range(4)]
    ballast, end = fill(disk, 0), time.monotonic() + 60
    refused: openai.APIStatusError | None = None
    while time.monotonic() < end:
        try:
            names.append(asked.videos.create(prompt="more").id)
        except openai.APIStatusError as error:
            refused = error
            if error.code == "disk_full":  # the worker has met it, too
                break
        time.sleep(0.2)
    assert refused is not None and refused.status_code == 503 and refused.code == "disk_full", refused
    assert "disk is full" in str(refused) and refused.response.headers["retry-after"]
    assert frames(asked.videos.download_content(first).read()) == 4  # what is there can be had
    waiting = {name: asked.videos.retrieve(name).status for name in names}
    assert set(waiting.values()) <= {"queued", "in_progress", "completed"} and "failed" not in waiting.values()
    with contextlib.suppress(openai.InternalServerError):  # a row needs room to go: it may have to wait as well
        asked.videos.delete(first)
    ballast.unlink()
    assert {until_done(asked, name, 120).status for name in names} == {"completed"}
    assert {video.id for video in asked.videos.list()} - {first} == set(names)
    again = asked.videos.create(prompt="again").id
    assert until_done(asked, again).status == "completed"
    assert {path.stem for path in (disk / "state" / "clips").glob("*.mp4")} >= {*names, again}
    assert not list((disk / "state" / "clips").glob(".*")) and not (disk / "state" / "clips" / "room").exists()
