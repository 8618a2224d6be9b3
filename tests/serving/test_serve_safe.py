"""Public serving: prompts and pictures that are refused, clips that are withheld, parts that are missing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tests.serving.conftest import Generator, Served
from tests.serving.test_serve_http import ask, png, until_done
from tests.serving.test_serve_process import shell

from archipel.ensemble import safety
from archipel.ensemble.blocklist import Blocklist
from archipel.ensemble.safety import Safety
from archipel.run import Run
from archipel.serving.jobs import Jobs


def bright(frames: Sequence[np.ndarray]) -> list[float]:
    return [float(frame.max()) / 255 for frame in frames]


SAFE = Safety(Blocklist("forbidden", "rules"), bright)


def test_a_blocked_prompt_is_400_and_is_not_logged(
    serve: Served, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(safety=SAFE) as client, caplog.at_level(logging.DEBUG):
        for given in ({"json": {"prompt": "F0rbidden fruit"}}, {"data": {"prompt": "forbidden"}}):
            answer = client.post("/v1/videos", **given)  # type: ignore[arg-type]
            error = answer.json()["error"]
            assert answer.status_code == 400 and (error["code"], error["param"]) == ("moderation_blocked", "prompt")
            assert error["type"] == "invalid_request_error" and "orbidden" not in error["message"]
        assert client.get("/v1/videos").json()["data"] == []
        assert until_done(client, ask(client, "unforbidden", seed=1)["id"])["status"] == "completed"
        assert 'archipel_blocked_total{what="prompt"} 2.0' in client.get("/metrics").text
    assert "orbidden" not in caplog.text and [call["prompts"] for call in generator.calls] == [["unforbidden"]]


def test_a_blocked_clip_fails_in_words_and_leaves_no_bytes(serve: Served, generator: Generator, tmp_path: Path) -> None:
    generator.go.clear()
    with serve(safety=SAFE) as client:
        ask(client, seed=0)
        assert generator.begun.wait(10)
        names = [
            ask(client, seed=seed)["id"] for seed in (1, 250, 2)
        ]  # the stand-in's frames are as bright as the seed
        generator.go.set()
        done = [until_done(client, name) for name in names]
        assert [one["status"] for one in done] == ["completed", "failed", "completed"]
        assert done[1]["error"]["code"] == "moderation_blocked" and "withheld" in done[1]["error"]["message"]
        assert client.get(f"/v1/videos/{names[1]}/content").json()["error"]["code"] == "not_ready"
        heard = client.get("/metrics").text
        assert (
            'archipel_blocked_total{what="clip"} 1.0' in heard
            and 'archipel_clips_total{outcome="blocked"} 1.0' in heard
        )
        assert not list((tmp_path / "state" / "clips").glob(f"*{names[1]}*"))
    assert len(generator.calls) == 2  # its batch was not made again


def test_what_waited_when_the_switch_was_off_is_looked_at(serve: Served, generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    jobs = Jobs(tmp_path / "state")
    name = jobs.add("local", "forbidden", 0, {"strategy": "top1", "guidance": 1.0, "steps": 3, "scale": 1}).id
    jobs.close()
    with serve(safety=SAFE) as client:
        assert until_done(client, name)["error"]["code"] == "moderation_blocked"
    assert generator.calls == []


def test_uploaded_pictures_are_looked_at_whole(image_root: Path, serve: Served) -> None:
    def post(client: TestClient, data: bytes) -> int:
        answer = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": data})
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("moderation_blocked", "input_reference")
        return answer.status_code

    sizes: list[tuple[int, ...]] = []

    def wide(frames: Sequence[np.ndarray]) -> list[float]:
        sizes.extend(frame.shape[:2] for frame in frames)
        return [float(frame.shape[1] > 20 and frame.max() > 0) for frame in frames]

    with serve(with_=Generator(Run.open(image_root)), safety=Safety(SAFE.blocklist, wide)) as client:
        assert post(client, png(12, 12)) == 200 and post(client, png(40, 12)) == 400
        assert 'archipel_blocked_total{what="picture"} 1.0' in client.get("/metrics").text
    assert (12, 12) in sizes and (8, 8) in sizes and (12, 40) in sizes  # as it came, and as it is used


def test_it_does_not_start_where_a_part_is_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--safe", "--public"):
        code, said = shell(root, option, "--blocklist", str(tmp_path / "none.txt"))
        assert code == 2 and "none.txt cannot be read" in said
    monkeypatch.setattr(safety.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    code, said = shell(root, "--public")
    assert code == 2 and "archipel[safety]" in said
    code, said = shell(root, "--blocklist", str(tmp_path))
    assert code == 2 and "--safe" in said
