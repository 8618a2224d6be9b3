"""The command itself, in a process of its own, used through the unmodified client of OpenAI and killed."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serving.conftest import KEY, Process

from archipel import cli
from archipel.ensemble import provenance

warnings.filterwarnings("ignore", category=DeprecationWarning)


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


def test_openais_client_makes_follows_and_downloads_a_clip(server: Process, tmp_path: Path) -> None:
    asked = client(server)
    video = asked.videos.create(prompt="a red ball bounces", seconds="1", size="32x32", extra_body={"seed": 7})
    assert (video.status, video.seconds, video.size, video.object) == ("queued", "1", "32x32", "video")
    video = until_done(asked, video.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    data = asked.videos.download_content(video.id).read()
    assert frames(data) == 4
    (tmp_path / "clip.mp4").write_bytes(data)
    note = provenance.read(tmp_path / "clip.mp4")
    assert note is not None and (note["seed"], note["model"]) == (7, video.model)
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
    modes = {path.name: path.stat().st_mode & 0o777 for path in (server.state, *server.state.glob("jobs.sqlite*"))}
    assert modes.pop(server.state.name) == 0o700 and modes and set(modes.values()) == {0o600}
    assert "red ball" not in "".join(server.said)


def test_no_job_is_lost_or_doubled_by_kill_9(started: Callable[..., Process], tmp_path: Path) -> None:
    server = started("--batch", "2")
    asked = client(server)
    names = [asked.videos.create(prompt=f"ball {i}", extra_body={"seed": i, "steps": 60}).id for i in range(5)]
    for _ in range(2):
        end = time.monotonic() + 30
        while not any(v.status == "in_progress" for v in asked.videos.list()) and time.monotonic() < end:
            time.sleep(0.005)
        server.kill()
        server = started("--batch", "2")
        asked = client(server)
    assert {until_done(asked, name).status for name in names} == {"completed"}
    assert {video.id for video in asked.videos.list()} == set(names)
    files = {path.stem for path in (tmp_path / "run" / "serving" / "clips").iterdir()}
    assert files == set(names)
    for name in files:
        assert frames(asked.videos.download_content(name).read()) == 4


def test_server_sent_events_end_with_the_clip(server: Process) -> None:
    video = client(server).videos.create(prompt="x", extra_body={"steps": 50})
    url = f"{server.url}/v1/videos/{video.id}/events"
    with httpx.stream("GET", url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        heard = "".join(stream.iter_text()).strip().split("\n\n")
    kinds = [event.split("\n")[0].removeprefix("event: ") for event in heard]
    assert kinds[-1] == "video.completed" and set(kinds[:-1]) <= {"video.progress"}
    shown = [json.loads(event.split("data: ")[1])["progress"] for event in heard]
    assert shown == sorted(shown) and shown[-1] == 100


def shell(root: Path, *options: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(root), "--port", "0", *options])
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.getvalue()


def test_a_second_server_of_the_same_state_is_refused(server: Process, root: Path) -> None:
    code, said = shell(root, "--state", str(server.state))
    assert code == 2 and "another process is working on the clips" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_need_a_key(host: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCHIPEL_API_KEY", raising=False)
    code, said = shell(root, "--host", host)
    assert code == 2 and "ARCHIPEL_API_KEY" in said
    monkeypatch.setenv("ARCHIPEL_API_KEY", "one,,two")
    assert shell(root)[0] == 2


def test_a_port_that_is_taken_is_named(server: Process, root: Path, tmp_path: Path) -> None:
    code, said = shell(root, "--state", str(tmp_path), "--port", server.url.rpartition(":")[2])
    assert code == 2 and "cannot listen on 127.0.0.1" in said


def test_slow_half_closed_and_broken_requests_do_not_stop_it(server: Process) -> None:
    port = int(server.url.rpartition(":")[2])
    head = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    starts = [
        b"", b"GET", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000, b"GET /%ff%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        f"{head}Content-Length: -1\r\n\r\n".encode(), f"{head}Content-Length: 99999999999999\r\n\r\n".encode(),
        f"{head}Content-Length: 100\r\n\r\n{{".encode(), f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    ]  # fmt: skip
    open_ones = []
    for start in starts * 5:
        one = socket.create_connection(("127.0.0.1", port), timeout=10)
        one.sendall(start)
        one.shutdown(socket.SHUT_WR)
        open_ones.append(one)
    asked = client(server)
    assert until_done(asked, asked.videos.create(prompt="x").id).status == "completed"
    answers = [one.recv(4096) for one in open_ones]
    assert all(not answer or answer.split()[1] in (b"400", b"401", b"413", b"431") for answer in answers), answers
    for one in open_ones:
        one.close()


def test_deleting_erases_the_prompt_from_the_disk(server: Process) -> None:
    asked = client(server)
    name = asked.videos.create(prompt="unforgettable-words").id
    until_done(asked, name)
    state = server.state
    assert any(b"unforgettable-words" in path.read_bytes() for path in state.glob("jobs.sqlite*"))
    asked.videos.delete(name)
    assert not any(b"unforgettable-words" in path.read_bytes() for path in state.glob("jobs.sqlite*"))
    assert not list((state / "clips").glob(f"{name}*"))


def test_a_stop_in_the_middle_ends_streams_and_keeps_the_job(started: Callable[..., Process]) -> None:
    server = started()
    video = client(server).videos.create(prompt="x", extra_body={"steps": 200})
    url, headers = f"{server.url}/v1/videos/{video.id}/events", {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("GET", url, headers=headers, timeout=30) as stream:
        assert next(stream.iter_text()).startswith("event: video.progress")
        begin = time.monotonic()
        server.process.terminate()
        assert server.process.wait(20) == -signal.SIGTERM and time.monotonic() - begin < 9
    server = started()
    assert until_done(client(server), video.id).status == "completed"
