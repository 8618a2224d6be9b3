"""The HTTP interface on a stand-in for the models: what is refused, who sees what, what survives."""

from __future__ import annotations

import base64
import errno
import io
import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tests.serving.conftest import Generator, Served

from archipel.ensemble import video
from archipel.run import Run
from archipel.serving import worker
from archipel.serving.jobs import Jobs
from archipel.serving.worker import Worker

ONE, OTHER = "key-one", "key-other"


def until_done(client: TestClient, name: str, **given: Any) -> dict[str, Any]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        video = client.get(f"/v1/videos/{name}", **given).json()
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.01)
    raise AssertionError(video)


def ask(client: TestClient, prompt: str = "x", **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def png(width: int = 12, height: int = 12) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 0)).save(out, "PNG")
    return out.getvalue()


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "prompt is missing"),
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": 3}, "prompt", "must be a text"),
    ({"prompt": "y" * 2001}, "prompt", "at most 2000"),
    ({"prompt": "a\x00b"}, "prompt", "control characters"),
    ({"prompt": "\ud800"}, "prompt", "not text"),
    ({"model": "sora-2"}, "model", "model can be archipel-"),
    ({"seconds": "4"}, "seconds", "seconds can be 1 "),
    ({"seconds": "soon"}, "seconds", "must be a number"),
    ({"size": "720x1280"}, "size", "8x8, 16x16"),
    ({"size": ["8x8"]}, "size", "8x8, 16x16"),
    ({"strategy": "top9"}, "strategy", "this run has 3"),
    ({"strategy": "fulll"}, "strategy", "nearest is 'full'"),
    ({"strategy": "oracle"}, "strategy", "true cluster"),
    ({"strategy": "monolith"}, "strategy", "not there yet in RUN: monolith"),
    ({"steps": 0}, "steps", "1 to 200"),
    ({"steps": 201}, "steps", "1 to 200"),
    ({"steps": True}, "steps", "whole number"),
    ({"steps": 1.5}, "steps", "whole number"),
    ({"guidance": -1}, "guidance", "0 to 50"),
    ({"guidance": 1e300}, "guidance", "must be a number"),
    ({"seed": -1}, "seed", "from 0 to"),
    ({"seed": 10**400}, "seed", "whole number"),
    ({"stepz": 3}, "stepz", "did you mean 'steps'"),
    ({"input_reference": {"image_url": "http://127.0.0.1/"}}, "input_reference", "no other URL is opened"),
    ({"input_reference": {"file_id": "f"}}, "input_reference", "keeps no files"),
    ({"input_reference": {"image_url": "data:image/png;base64,AAAA"}}, "input_reference", "trained on text only"),
]


def test_what_cannot_be_done_is_400_in_openais_form(serve: Served, generator: Generator) -> None:
    with serve() as client:
        for fields, param, words in WRONG:
            body = json.dumps({"prompt": "x", **fields} if fields else {})
            answer = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (fields, answer.text)
            error = answer.json()["error"]
            assert (error["param"], error["type"]) == (param, "invalid_request_error") and error["code"], error
            assert words in error["message"], error
            assert str(generator.parts.source.where) not in error["message"]
        for body in (
            b"",
            b"{",
            b"[]",
            b"\xff",
            b'{"prompt": NaN}',
            b"[" * 100_000,
            b'{"prompt": "x", "steps": 1' + b"0" * 9000,
        ):
            answer = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["code"], body[:20]
        assert client.get("/v1/videos?limit=0").json()["error"]["param"] == "limit"
        assert client.get("/v1/videos?limit=0").status_code == 400
        assert client.post("/v1/videos", content=b"<x/>", headers={"content-type": "text/xml"}).status_code == 415
        assert client.get("/v1/videos").json()["data"] == [] and generator.calls == []


def test_forms_malformed_huge_and_doubled_are_refused(serve: Served) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'
    with serve(body=100_000) as client:
        for body in (
            b"",
            b"--b",
            b"--c\r\n\r\n",
            part + part + b"--b--\r\n",
            b"--b\r\n\r\nx\r\n--b--\r\n",
            part * 30 + b"--b--\r\n",
        ):
            assert client.post("/v1/videos", content=body, headers=kind).status_code == 400, body[:30]
        for odd in (
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=" + "b" * 300,
        ):
            assert client.post("/v1/videos", content=part, headers={"content-type": odd}).status_code == 400, odd
        answer = client.post("/v1/videos", data={"prompt": "x"}, files={"evil": ("../../x", b"y")})
        assert answer.status_code == 400
        assert client.post("/v1/videos", content=b"x" * 100_001, headers=kind).status_code == 413
        chunks = (b"x" * 10_000 for _ in range(11))  # says no length
        answer = client.post("/v1/videos", content=chunks, headers=kind)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"


def test_a_key_sees_its_own_clips_only(serve: Served) -> None:
    other = {"headers": {"Authorization": f"Bearer {OTHER}"}}
    with serve(keys=[ONE, OTHER]) as client:
        name = ask(client)["id"]
        until_done(client, name)
        for path in (
            f"/v1/videos/{name}",
            f"/v1/videos/{name}/content",
            f"/v1/videos/{name}/events",
            f"/v1/videos?after={name}",
        ):
            assert client.get(path, **other).status_code == 404, path
        assert client.delete(f"/v1/videos/{name}", **other).status_code == 404
        assert client.get("/v1/videos", **other).json()["data"] == []
        assert client.get(f"/v1/videos/{name}/content").status_code == 200
        for wrong in ("", "Bearer", "Bearer x", "Basic " + ONE, f"Bearer {ONE}x", "Bearer \xff"):
            for path in (
                "/v1/videos",
                "/v1/models",
                "/metrics",
                "/docs",
                "/openapi.json",
                "/nothing",
                f"/v1/videos/{name}/content",
            ):
                answer = client.get(path, headers={"Authorization": wrong.encode("latin-1")})
                assert answer.status_code == 401, (wrong, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/healthz", headers={"Authorization": ""}).json() == {"status": "ok"}


def test_a_browser_logs_in_with_a_cookie_and_only_its_own_pages_act(serve: Served) -> None:
    with serve(keys=[ONE]) as client:
        del client.headers["Authorization"]
        page = client.get("/docs", headers={"accept": "text/html"})
        assert page.url.path == "/login" and "<script" not in page.text
        assert page.headers["referrer-policy"] == "same-origin"  # with none, browsers send the form with "Origin: null"
        assert client.post("/login", data={"key": "wrong"}).status_code == 401
        answer = client.post("/login", data={"key": ONE}, follow_redirects=False)
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and ONE not in cookie
        docs = client.get("/docs").text
        assert (
            "/v1/videos/{video_id}/content" in docs and "<script" not in docs and "http" not in docs.split("<body>")[0]
        )
        own = {"origin": "http://127.0.0.1:8000"}
        assert client.post("/v1/videos", json={"prompt": "x"}).status_code == 403
        assert (
            client.post("/v1/videos", json={"prompt": "x"}, headers={"origin": "http://evil.example"}).status_code
            == 403
        )
        assert client.post("/v1/videos", json={"prompt": "x"}, headers=own).status_code == 200


def test_without_a_key_foreign_names_and_origins_are_refused(serve: Served) -> None:
    with serve() as client:
        assert client.get("/v1/videos", headers={"host": "evil.example"}).status_code == 403
        assert (
            client.post("/v1/videos", data={"prompt": "x"}, headers={"origin": "http://evil.example"}).status_code
            == 403
        )
        assert client.get("/v1/videos", headers={"host": "localhost:8000"}).status_code == 200


def test_ids_do_not_leave_the_folder(serve: Served, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "secret.mp4").write_bytes(b"secret")
    with serve() as client:
        for name in (
            "..%2Fsecret",
            "..%2f..%2fstate%2fsecret",
            "%2e%2e",
            "video_",
            "video_" + "g" * 32,
            "x" * 5000,
            "%00",
            "video_%0a",
        ):
            for path in (f"/v1/videos/{name}", f"/v1/videos/{name}/content", f"/v1/videos/{name}/events"):
                answer = client.get(path)
                assert answer.status_code == 404 and b"secret" not in answer.content, path
            assert client.delete(f"/v1/videos/{name}").status_code == 404
    assert (tmp_path / "state" / "secret.mp4").exists()


def test_a_full_queue_says_when_to_come_again(serve: Served, generator: Generator) -> None:
    generator.go.clear()
    with serve(queue=2, batch=1) as client:
        ask(client)
        assert generator.begun.wait(10)
        ask(client), ask(client)
        answer = client.post("/v1/videos", json={"prompt": "x"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 3600
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert len(client.get("/v1/videos").json()["data"]) == 3


def test_jobs_of_equal_settings_are_made_together(serve: Served, generator: Generator) -> None:
    generator.go.clear()
    with serve(batch=3) as client:
        ask(client, "first")
        assert generator.begun.wait(10)
        names = [ask(client, f"{i}", steps=9 if i == 1 else 5, seed=i)["id"] for i in range(5)]
        generator.go.set()
        assert all(until_done(client, name)["status"] == "completed" for name in names)
    assert [call["prompts"] for call in generator.calls] == [["first"], ["0", "2", "3"], ["1"], ["4"]]
    assert [call["seeds"] for call in generator.calls[1:]] == [[0, 2, 3], [1], [4]]


def test_what_waits_or_is_made_can_be_cancelled(serve: Served, generator: Generator, tmp_path: Path) -> None:
    generator.go.clear()
    with serve(batch=1) as client:
        made, waiting, last = ask(client)["id"], ask(client)["id"], ask(client)["id"]
        assert generator.begun.wait(10)
        assert client.get(f"/v1/videos/{made}/content").json()["error"]["code"] == "not_ready"
        for name in (made, waiting):
            assert client.delete(f"/v1/videos/{name}").json() == {
                "id": name,
                "object": "video.deleted",
                "deleted": True,
            }
        generator.go.set()
        assert until_done(client, last)["status"] == "completed"
        assert b'archipel_clips_total{outcome="cancelled"} 1.0' in client.get("/metrics").content
    assert len(generator.calls) == 2
    assert {path.stem for path in (tmp_path / "state" / "clips").iterdir()} == {last}


def test_one_bad_clip_does_not_spoil_its_batch_and_tells_no_secrets(
    serve: Served, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    generator.go.clear()
    with serve() as client, caplog.at_level(logging.DEBUG):
        ask(client, "first")
        assert generator.begun.wait(10)
        names = [ask(client, prompt)["id"] for prompt in ("fine", "spoil", "crash")]
        generator.go.set()
        done = [until_done(client, name) for name in names]
        assert [video["status"] for video in done] == ["completed", "failed", "failed"]
        assert done[1]["error"] == {"code": "cannot_generate", "message": "RUN/experts/0 is spoilt"}
        assert done[2]["error"]["code"] == "internal" and "secret" not in done[2]["error"]["message"]
    assert "spoil" not in caplog.text.replace("spoilt", "")


def test_jobs_survive_a_stop_in_the_middle(
    serve: Served, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Worker.stop

    def stopped_and_let_go(worker: Worker, seconds: float = 30.0) -> None:
        worker._stopping.set()  # first, or the clip could be finished before
        generator.go.set()
        stop(worker, seconds)

    monkeypatch.setattr(Worker, "stop", stopped_and_let_go)
    generator.let_go = False
    generator.go.clear()
    with serve(batch=1) as client:
        names = [ask(client, f"{i}", seed=i)["id"] for i in range(3)]
        assert generator.begun.wait(10)
    with serve(batch=1) as client:  # the first was put back at its old place
        assert all(until_done(client, name)["status"] == "completed" for name in names)
    assert [call["prompts"] for call in generator.calls] == [["0"], ["0"], ["1"], ["2"]]


def test_finished_clips_are_removed_by_size_and_age(serve: Served, tmp_path: Path) -> None:
    clips = tmp_path / "state" / "clips"
    with serve() as client:
        names = [ask(client)["id"] for _ in range(3)]
        for name in names:
            until_done(client, name)
        size = sum((clips / f"{name}.mp4").stat().st_size for name in names)
    (clips / "left.mp4").write_bytes(b"of a job that is gone")
    with serve(keep_bytes=size - 1) as client:
        end = time.monotonic() + 10
        while len(list(clips.iterdir())) > 4 and time.monotonic() < end:
            time.sleep(0.05)
        kept = {video["id"] for video in client.get("/v1/videos").json()["data"]}
        assert {path.name for path in clips.iterdir()} == {
            f"{name}.{kind}" for name in kept for kind in ("mp4", "json")
        }
        assert len(kept) == 2
    with serve(keep_seconds=0.0) as client:
        end = time.monotonic() + 10
        while list(clips.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        assert list(clips.iterdir()) == client.get("/v1/videos").json()["data"] == []


def test_the_same_request_again_is_the_same_job(serve: Served) -> None:
    with serve() as client:
        same = {"headers": {"Idempotency-Key": "mine"}}
        first = client.post("/v1/videos", json={"prompt": "x"}, **same).json()
        until_done(client, first["id"])
        assert client.post("/v1/videos", json={"prompt": "x"}, **same).json()["id"] == first["id"]
        answer = client.post("/v1/videos", json={"prompt": "y"}, **same)
        assert answer.status_code == 400 and "another request" in answer.json()["error"]["message"]


def test_lists_come_in_pages(serve: Served) -> None:
    with serve() as client:
        names = [ask(client)["id"] for _ in range(5)]
        page = client.get("/v1/videos?limit=2").json()
        assert [v["id"] for v in page["data"]] == names[:2:-1] and page["has_more"]
        page = client.get(f"/v1/videos?limit=3&after={page['last_id']}").json()
        assert [v["id"] for v in page["data"]] == names[2::-1] and not page["has_more"]
        assert [v["id"] for v in client.get("/v1/videos?order=asc").json()["data"]] == names


def test_a_first_frame_is_uploaded_bounded_and_used(image_root: Path, serve: Served) -> None:
    stand_in = Generator(Run.open(image_root))
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    bomb = png(6000, 6000)
    with serve(with_=stand_in) as client:
        assert client.get("/v1/models").json()["data"][0]["takes_image"]
        form = {"data": {"prompt": "x"}, "files": {"input_reference": ("../../../x.png", png(), "image/png")}}
        names = [
            client.post("/v1/videos", **form).json()["id"],
            ask(client, input_reference={"image_url": url})["id"],
            client.post("/v1/videos", data={"prompt": "x", "input_reference[image_url]": url}).json()["id"],
        ]
        assert all(until_done(client, name)["status"] == "completed" for name in names)
        for data, words in (
            (b"no picture", "no whole picture"),
            (png()[:40], "no whole picture"),
            (bomb, "6000x6000 pixels"),
        ):
            answer = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": data})
            assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    given = [image for call in stand_in.calls for image in call["image"]]
    assert len(given) == 3 and all(image.shape == (8, 8, 3) and (image[4, 4] == [255, 0, 0]).all() for image in given)


def test_the_description_has_no_422_and_the_metrics_count(serve: Served) -> None:
    with serve() as client:
        assert "422" not in client.get("/openapi.json").text
        until_done(client, ask(client)["id"])
        heard = client.get("/metrics").text
        assert "archipel_jobs_created_total 1.0" in heard and 'archipel_jobs{state="completed"} 1.0' in heard
        assert 'route="/v1/videos/{video_id}",status="200"' in heard.replace('method="GET",', "")


def test_fastapis_own_telemetry_stays_off(serve: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # with no exporter installed it would refuse to start
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with serve() as client:
        kept = client.app._telemetry  # type: ignore[attr-defined]
        assert not any(kept[name] for name in ("tracing", "metrics", "logs", "auto_configure"))
        assert client.get("/healthz").status_code == 200


def test_storage_that_fails_is_said(serve: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with serve() as client:
        monkeypatch.setattr("archipel.serving.jobs.Jobs.add", full)
        answer = client.post("/v1/videos", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage"


def test_on_a_full_disk_jobs_wait_and_none_is_lost(
    serve: Served, generator: Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker, "_LOOK", 0.05)
    real, calls = video.write, []

    def full(path: Path, *rest: Any, **given: Any) -> Path:
        calls.append(path)
        if len(calls) == 1:  # the first of a batch still has room
            return real(path, *rest, **given)
        raise OSError(errno.ENOSPC, "No space left on device")

    generator.go.clear()
    with serve() as client:
        with monkeypatch.context() as patched:
            patched.setattr("archipel.ensemble.video.write", full)
            patched.setattr(Worker, "_has_room", lambda _: False)
            names = [ask(client, f"{i}")["id"] for i in range(3)]
            generator.go.set()
            end = time.monotonic() + 20
            while (
                answer := client.post("/v1/videos", json={"prompt": "x"})
            ).status_code == 200 and time.monotonic() < end:
                names.append(answer.json()["id"])
                time.sleep(0.02)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.json()["error"]["code"] == "disk_full" and "disk is full" in answer.json()["error"]["message"]
            assert client.get("/healthz").status_code == 200
        assert all(until_done(client, name)["status"] == "completed" for name in names)
        assert ask(client)
    assert {path.stem for path in (tmp_path / "state" / "clips").glob("*.mp4")} >= set(names)


def test_a_full_disk_does_not_keep_a_clip_from_being_deleted(
    serve: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = Jobs.delete, []

    def full_at_first(jobs: Jobs, name: str) -> bool:
        tries.append(list(clips.glob("*.mp4")))
        if len(tries) == 1:
            raise sqlite3.OperationalError("database or disk is full")
        return real(jobs, name)

    with serve() as client:
        name = ask(client)["id"]
        until_done(client, name)
        clips = tmp_path / "state" / "clips"
        monkeypatch.setattr(Jobs, "delete", full_at_first)
        assert client.delete(f"/v1/videos/{name}").status_code == 200
    assert [len(there) for there in tries] == [1, 0]


def test_a_key_has_its_share_of_the_queue_and_its_turn(serve: Served, generator: Generator) -> None:
    other = {"headers": {"Authorization": f"Bearer {OTHER}"}}
    generator.go.clear()
    with serve(keys=[ONE, OTHER], queue=6, batch=2) as client:
        ask(client, "first")
        assert generator.begun.wait(10)
        for i in range(3):  # 0 of 6 free, 1 of 5, 2 of 4
            ask(client, f"one {i}", steps=5 + i)
        answer = client.post("/v1/videos", json={"prompt": "x"})
        assert answer.status_code == 429 and "of yours" in answer.json()["error"]["message"]
        last = client.post("/v1/videos", json={"prompt": "other 0", "steps": 9}, **other).json()["id"]
        generator.go.set()
        until_done(client, last, **other)
        for video in client.get("/v1/videos").json()["data"]:
            until_done(client, video["id"])
    made = [prompt for call in generator.calls for prompt in call["prompts"]]
    assert made[0] == "first" and made[1] == "other 0"  # its turn, before all that waited longer
    assert made.index("one 0") < made.index("one 1") < made.index("one 2")


def test_a_key_alone_may_fill_the_queue(serve: Served, generator: Generator) -> None:
    generator.go.clear()
    with serve(keys=[ONE], queue=3, batch=1) as client:
        ask(client)
        assert generator.begun.wait(10)
        assert [client.post("/v1/videos", json={"prompt": "x"}).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_clips_of_one_key_do_not_push_out_anothers(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    sizes = {"small": [10, 10], "large": [30, 30, 30], "old": [5]}
    names = {}
    for owner, all_of_it in sizes.items():
        for size in all_of_it:
            name = jobs.add(owner, "x", 0, {}).id
            jobs.claim(1)
            jobs.complete(name, size)
            names.setdefault(owner, []).append(name)
    assert jobs.expire(1e9, 115) == []
    assert jobs.expire(1e9, 60) == names["large"][:2]
    assert jobs.expire(1e9, 44) == names["large"][2:]
    assert jobs.expire(1e9, 20) == names["small"][:1]
    jobs.close()
