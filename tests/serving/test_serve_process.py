"""The command itself, in a process of its own, used through the unmodified client of OpenAI and killed."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serving.conftest import Process

warnings.filterwarnings("ignore", category=DeprecationWarning)
KEY = "a-key-of-the-tests"


def client(server: Process, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


def until_done(asked: openai.OpenAI, name: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        video = asked.videos.retrieve(name)
        if video.status in ("completed", "failed"):
            return video
        time.sleep(0.05)
    raise AssertionError(video)


def frames(data: bytes) -> int:
    import av

    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_openais_client_makes_follows_and_downloads_a_clip(started: Callable[..., Process], tmp_path: Path) -> None:
    server = started()
    asked = client(server)
    video = asked.videos.create(prompt="a red ball bounces", seconds="1", size="32x32", extra_body={"seed": 7})
    assert (video.status, video.seconds, video.size, video.object) == ("queued", "1", "32x32", "video")
    video = until_done(asked, video.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    data = asked.videos.download_content(video.id).read()
    assert frames(data) == 4
    again = asked.videos.create(prompt="a red ball bounces", size="32x32", extra_body={"seed": "7"})
    assert asked.videos.download_content(until_done(asked, again.id).id).read() == data
    assert [one.id for one in asked.videos.list(limit=1)] == [again.id, video.id]  # by two pages
    assert [model.id for model in asked.models.list()] == [video.model]
    waited = asked.videos.create_and_poll(prompt="x", poll_interval_ms=50)
    assert waited.status == "completed" and asked.videos.delete(waited.id).deleted
    with pytest.raises(openai.NotFoundError):
        asked.videos.retrieve(waited.id)
    with pytest.raises(openai.BadRequestError, match="prompt is empty") as wrong:
        asked.videos.create(prompt="")
    assert wrong.value.param == "prompt" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        client(server, "another").videos.list()
    server.process.terminate()
    server.process.wait(20)
    kept = tmp_path / "run" / "serving"
    assert (kept / "jobs.sqlite").stat().st_mode & 0o777 == 0o600 and kept.stat().st_mode & 0o777 == 0o700
    assert "red ball" not in "".join(server.said)


def test_no_job_is_lost_or_doubled_by_kill_9(started: Callable[..., Process], tmp_path: Path) -> None:
    server = started("--batch", "2")
    asked = client(server)
    names = [asked.videos.create(prompt=f"ball {i}", extra_body={"seed": i, "steps": 60}).id for i in range(5)]
    for _ in range(3):
        end = time.monotonic() + 30
        while not any(v.status == "in_progress" for v in asked.videos.list()) and time.monotonic() < end:
            time.sleep(0.005)
        server.kill()
        server = started("--batch", "2")
        asked = client(server)
    assert {until_done(asked, name).status for name in names} <= {"completed", "failed"}
    assert {video.id for video in asked.videos.list()} == set(names)
    files = {path.stem for path in (tmp_path / "run" / "serving" / "clips").iterdir()}
    assert files == {name for name in names if asked.videos.retrieve(name).status == "completed"}
    for name in files:
        assert frames(asked.videos.download_content(name).read()) == 4


def test_server_sent_events_end_with_the_clip(started: Callable[..., Process]) -> None:
    server = started()
    video = client(server).videos.create(prompt="x", extra_body={"steps": 50})
    url = f"{server.url}/v1/videos/{video.id}/events"
    with httpx.stream("GET", url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        heard = "".join(stream.iter_text()).strip().split("\n\n")
    kinds = [event.split("\n")[0].removeprefix("event: ") for event in heard]
    assert kinds[-1] == "video.completed" and set(kinds[:-1]) <= {"video.progress"}
    shown = [json.loads(event.split("data: ")[1])["progress"] for event in heard]
    assert shown == sorted(shown) and shown[-1] == 100


def test_a_second_server_of_the_same_state_is_refused(started: Callable[..., Process], tmp_path: Path) -> None:
    started()
    code, said = shell(tmp_path / "run", "--port", "0")
    assert code == 2 and "another process is working on the clips" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_addresses_need_a_key(host: str, root: Path) -> None:
    code, said = shell(root, "--host", host, "--port", "0", key="")
    assert code == 2 and "ARCHIPEL_API_KEY" in said


def shell(root: Path, *options: str, key: str = KEY) -> tuple[int, str]:
    env = {**os.environ, "ARCHIPEL_API_KEY": key}
    command = [sys.executable, "-m", "archipel.cli", "serve", str(root), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_deleting_erases_the_prompt_from_the_disk(started: Callable[..., Process], tmp_path: Path) -> None:
    server = started()
    asked = client(server)
    name = asked.videos.create(prompt="unforgettable-words").id
    until_done(asked, name)
    state = tmp_path / "run" / "serving"
    assert any(b"unforgettable-words" in path.read_bytes() for path in state.glob("jobs.sqlite*"))
    asked.videos.delete(name)
    assert not any(b"unforgettable-words" in path.read_bytes() for path in state.glob("jobs.sqlite*"))
    assert not list((state / "clips").iterdir())
    with sqlite3.connect(state / "jobs.sqlite") as db:
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
