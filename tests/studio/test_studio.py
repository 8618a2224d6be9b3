"""The studio without a browser: what stands behind the key, what its page names, what is kept of a clip, what is said."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.ensemble.conftest import build
from tests.serving.conftest import Generator

from archipel.ensemble.blocklist import Blocklist
from archipel.ensemble.safety import Safety
from archipel.run import Run
from archipel.serving.errors import Refused
from archipel.serving.limits import Limits
from archipel.serving.server import opened
from archipel.studio import cards, doors, mount
from archipel.studio.compare_page import _several
from archipel.studio.context import StudioContext
from archipel.studio.desk import COMPARE, GENERATE, Desk, Shot
from archipel.studio.form import captions, strategies
from archipel.studio.remembered import filled
from archipel.studio.widgets import plain

ONE, OTHER = "key-one", "key-other"
API = "/studio/gradio_api"


class Open:
    """The application with the studio on a stand-in for the models, for two keys."""

    def __init__(self, client: TestClient, generator: Generator, state: Path, service: Any, temporary: str) -> None:
        self.client, self.generator, self.state, self.service, self.temporary = (
            client,
            generator,
            state,
            service,
            temporary,
        )
        self.desk = Desk(StudioContext(generator, service, "RUN"))  # type: ignore[arg-type]
        self.one, self.other = service.keys.owner(ONE), service.keys.owner(OTHER)

    def get(self, path: str, key: str = ONE, **headers: str) -> Any:
        return self.client.get(path, headers={"Authorization": f"Bearer {key}", **headers}, follow_redirects=False)

    def post(self, path: str, value: Any, key: str = ONE) -> Any:
        return self.client.post(path, json=value, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    root = build(tmp_path_factory.mktemp("studio") / "run").root
    generator, state, held = Generator(Run.open(root)), tmp_path_factory.mktemp("state"), []
    pages = mount.extend(generator, "RUN", None)  # type: ignore[arg-type]

    def extend(app: Any, service: Any) -> Any:
        held.append(service)
        return pages(app, service)

    with opened(generator, state, [ONE, OTHER], Limits(queue=3), extend) as app:  # type: ignore[arg-type]
        temporary = os.environ["GRADIO_TEMP_DIR"]
        with TestClient(app, raise_server_exceptions=False, base_url="http://127.0.0.1:8000") as client:
            yield Open(client, generator, state, held[0], temporary)
    assert not Path(temporary).exists() and "GRADIO_TEMP_DIR" not in os.environ


def until_done(studio: Open, group: str, owner: str) -> list[Shot]:
    async def follow() -> list[list[Shot]]:
        return [shots async for shots in studio.desk.follow(owner, group)]

    return asyncio.run(asyncio.wait_for(follow(), 30))[-1]


def ask(studio: Open, owner: str, kind: str = GENERATE, *several: dict[str, Any]) -> str:
    return asyncio.run(studio.desk.ask(owner, kind, several or [{"prompt": "a cube"}]))


LOOKS = ["/studio", "/studio/", "/studio/config", "/studio/theme.css", "/studio/assets/x.js", f"{API}/info",
         f"{API}/queue/data?session_hash=a", f"{API}/heartbeat/a", f"{API}/file=/etc/passwd"]  # fmt: skip
ACTS = ["queue/join", "cancel", "reset", "upload", "run/predict", "call/predict", "component_server"]


def test_everything_of_the_studio_stands_behind_the_key(studio: Open) -> None:
    client = studio.client
    assert [client.get(path).status_code for path in LOOKS] == [401] * len(LOOKS)
    assert [client.post(f"{API}/{name}", json={}).status_code for name in ACTS] == [401] * len(ACTS)
    shown = client.get("/studio/", headers={"accept": "text/html"}, follow_redirects=False)
    assert (shown.status_code, shown.headers["location"]) == (303, "/login")
    assert studio.get("/studio/", Origin="http://elsewhere.example").status_code == 403
    login = client.post(
        "/login", data={"key": ONE}, headers={"Origin": "http://127.0.0.1:8000"}, follow_redirects=False
    )
    cookie = login.headers["set-cookie"].lower()
    assert login.headers["location"] == "/studio/" and "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/studio/").status_code == 200  # with the cookie
    refused = client.post(f"{API}/queue/join", json={})  # with the cookie, but no page says that it asks
    client.cookies.clear()
    assert refused.status_code == 403


def test_the_page_names_no_other_host_and_evaluates_nothing(studio: Open) -> None:
    page = studio.get("/studio/", **{"Accept-Encoding": "br, gzip"})
    assert page.status_code == 200 and "<title>Archipel studio</title>" in page.text
    named = set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w.-]+", page.text))
    assert named <= {"http://127.0.0.1", "http://www.w3.org"}, named
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "http" not in policy and "*" not in policy
    assert "script-src" not in studio.get("/docs").headers["content-security-policy"]
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page.text, re.DOTALL)[1])  # type: ignore[index]
    assert config["analytics_enabled"] is False and not config.get("is_space")
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])
    assert not [one for one in config["components"] if one["type"] == "html"]  # gr.HTML evaluates strings


def test_gradios_other_routes_are_closed(studio: Open) -> None:
    closed = ["file=/etc/passwd", "proxy=http://x.example/", "stream/a/b/1/playlist.m3u8", "vibe-code", "openapi.json"]
    answers = [studio.get(f"{API}/{name}") for name in closed] + [studio.get("/studio/monitoring")]
    answers += [studio.post(f"{API}/{name}", {}) for name in ("run/predict", "call/x", "vibe-edit", "component_server")]
    answers.append(studio.post(f"{API}/upload", {}))  # this run takes no picture
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert answers[0].json()["error"]["message"] == "there is no such page"


@pytest.mark.parametrize("path", ["http://169.254.169.254/x", "/etc/passwd", "../../etc/passwd", 7, "a\0b"])
def test_only_uploaded_files_can_be_named(studio: Open, path: Any) -> None:
    """gradio would fetch a URL that is given as a file, and read what lies in folders that it trusts."""
    value = {"fn_index": 0, "session_hash": "files", "data": [[{"path": path, "meta": {"_type": "gradio.FileData"}}]]}
    answer = studio.post(f"{API}/queue/join", value)
    assert answer.status_code == 400 and "only an uploaded file" in answer.json()["error"]["message"]


def test_a_session_belongs_to_the_key_that_began_it(studio: Open) -> None:
    value = {"fn_index": 0, "session_hash": "mine", "event_id": "e"}
    assert studio.post(f"{API}/cancel", value).status_code == 200
    assert studio.post(f"{API}/cancel", value, OTHER).status_code == 404
    assert studio.get(f"{API}/queue/data?session_hash=mine", OTHER).status_code == 404
    assert studio.get(f"{API}/heartbeat/mine", OTHER).status_code == 404


def test_an_event_right_behind_the_end_of_its_pages_stream_is_answered_once_the_page_has_seen_that(
    studio: Open,
) -> None:
    """Gradio's page would take the stream for open, and wait for ever for what comes of the event."""
    said: list[tuple[str, float]] = []

    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'data: {"msg":"close_stream"}\n\n'})

    door = doors.Doors(gradio, studio.service, studio.state, "")

    async def ask(method: str, path: str, query: str, name: str, body: bytes = b"") -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 200
                said.append((name, time.monotonic()))

        scope = {"type": "http", "method": method, "path": f"/gradio_api/queue/{path}", "query_string": query.encode()}
        await door({**scope, "headers": [], "state": {"owner": studio.one}}, receive, send)

    async def page() -> None:
        await ask("GET", "data", "session_hash=mine", "end")
        of = {name: json.dumps({"session_hash": name, "data": []}).encode() for name in ("mine", "yours")}
        await asyncio.gather(*(ask("POST", "join", "", name, of[name]) for name in ("mine", "yours")))
        await ask("POST", "join", "", "mine again", of["mine"])

    asyncio.run(page())
    assert [name for name, _ in said] == ["end", "yours", "mine", "mine again"]
    assert said[2][1] - said[0][1] > 0.4


def test_bodies_are_bounded(studio: Open) -> None:
    answer = studio.post(f"{API}/queue/join", {"data": ["x" * (1 << 19)]})
    assert answer.status_code == 413
    bad = studio.client.post(f"{API}/queue/join", content=b"[" * 100_000, headers={"Authorization": f"Bearer {ONE}"})
    assert bad.status_code == 400


def test_uploads_lie_in_a_private_folder(studio: Open) -> None:
    assert Path(studio.temporary).stat().st_mode & 0o777 == 0o700
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_how_a_clip_came_about_is_kept_with_it_and_goes_with_it(studio: Open) -> None:
    shot = until_done(studio, ask(studio, studio.one), studio.one)[0]
    assert shot.trace is not None and shot.trace["weights"] == [[0.75, 0.25, 0.0]] * 4
    assert (shot.trace["expert_calls"], shot.trace["batch"]) == (8, 1)
    shown = cards.clip(shot, 512)
    assert shown.count("<rect") == 8 and "Expert 0 <b>75%</b>" in shown and "Expert 2 <b>" not in shown
    assert f'src="/v1/videos/{shot.job.id}/content"' in shown and "8 expert calls" in shown
    kept = studio.state / "clips" / f"{shot.job.id}.json"
    assert kept.is_file() and "a cube" not in kept.read_text()
    asyncio.run(studio.desk.delete(studio.other, shot.job.id))
    assert kept.is_file()
    asyncio.run(studio.desk.delete(studio.one, shot.job.id))
    assert not kept.exists() and not studio.desk.shots(studio.one, "")


def test_a_page_that_is_opened_again_finds_its_clip(studio: Open) -> None:
    studio.generator.go.clear()
    try:
        group = ask(studio, studio.one)
        assert studio.desk.latest(studio.one, GENERATE) == group
        assert studio.desk.latest(studio.one, COMPARE) is None and studio.desk.latest(studio.other, GENERATE) is None
        assert studio.generator.begun.wait(20)
        end = time.monotonic() + 20
        while not (shot := studio.desk.shots(studio.one, group)[0]).job.started and time.monotonic() < end:
            time.sleep(0.01)
        assert "%" in cards.progress(shot) or "Starting" in cards.progress(shot)
        asyncio.run(studio.desk.cancel(studio.other, group))
        assert studio.desk.shots(studio.one, group)
        asyncio.run(studio.desk.cancel(studio.one, group))
        assert until_done(studio, group, studio.one) == [] and studio.desk.latest(studio.one, GENERATE) is None
    finally:
        studio.generator.go.set()


def test_what_cannot_be_done_is_said_and_nothing_is_left(studio: Open) -> None:
    for fields, said in [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "steps": 0}, "steps must be a whole number from 1"),
        ({"prompt": "x", "seed": "soon"}, "seed must be a whole number"),
        ({"prompt": "x", "strategy": "monolith"}, "not there yet in RUN: monolith"),
    ]:
        with pytest.raises(Refused, match=said):
            ask(studio, studio.other, GENERATE, fields)
    with pytest.raises(Refused, match="not there yet"):  # the first of the two is taken back
        ask(studio, studio.other, COMPARE, {"prompt": "x"}, {"prompt": "x", "strategy": "monolith"})
    assert studio.desk.latest(studio.other, COMPARE) is None
    studio.generator.go.clear()
    asked: list[str] = []
    try:
        with pytest.raises(Refused, match="try again in about"):
            for _ in range(6):
                asked.append(ask(studio, studio.other))
    finally:
        studio.generator.go.set()
    for group in asked:  # they would take the room of the tests after this one
        until_done(studio, group, studio.other)
    for way in ([], ["top1"], ["top1", "top1"]):
        with pytest.raises(Refused, match="two or more"):
            _several({"prompt": "x"}, way)
    first, second = _several({"prompt": "x"}, ["top1", "monolith"])
    assert first["seed"] == second["seed"]


def test_a_prompt_that_the_safety_filter_refuses_is_refused_in_words(
    studio: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe = Safety(Blocklist("forbidden", "rules"), lambda frames: [0.0] * len(frames))
    monkeypatch.setattr(studio.service, "safety", safe)
    for kind in (GENERATE, COMPARE):
        with pytest.raises(Refused) as refused:
            ask(studio, studio.other, kind, {"prompt": "first of two"}, {"prompt": "F0rbidden fruit"})
        shown = cards.notice(refused.value.message)
        assert "his server does not make clips of what this prompt holds" in shown and "orbidden" not in shown
        kept = studio.service.jobs.page(studio.other, after=None, limit=100, newest=True)
        assert all(job.prompt != "first of two" for job in kept)
    monkeypatch.setattr(studio.service.worker, "safety", safe)  # on since a restart: what was queued is looked at, too
    monkeypatch.setattr(studio.service, "safety", None)
    shot = until_done(studio, ask(studio, studio.other, GENERATE, {"prompt": "forbidden"}), studio.other)[0]
    assert shot.job.status == "failed" and "withheld this clip" in cards.clip(shot, 512)
    asyncio.run(studio.desk.delete(studio.other, shot.job.id))


def test_the_page_holds_its_owners_last_settings_from_the_first_moment(studio: Open) -> None:
    prompt = "</script><b>one & only"
    until_done(studio, ask(studio, studio.one, GENERATE, {"prompt": prompt, "steps": 3, "seed": 77}), studio.one)

    def fields(key: str) -> dict[str, Any]:
        text = studio.get("/studio/", key).text
        assert prompt not in text
        config, _ = json.JSONDecoder().raw_decode(text, text.index("window.gradio_config = ") + 23)
        props = [one["props"] for one in config["components"]]
        found: dict[str, Any] = {}
        for one in props:
            found.setdefault(str(one.get("label")), one.get("value"))
        return found

    mine, others = fields(ONE), fields(OTHER)
    assert (mine["What shall the clip show?"], mine["Steps"], mine["Seed"]) == (prompt, 3, None)
    assert others["What shall the clip show?"] != prompt and not mine["What shall all of them show?"]
    assert filled("no page of gradio's", {1: "x"}) == "no page of gradio's"


def test_what_people_type_is_shown_and_not_obeyed(studio: Open) -> None:
    prompt = '<img src=x onerror=alert(1)>"\n\n# a head $$x$$'
    owner = studio.one
    shot = until_done(studio, ask(studio, owner, GENERATE, {"prompt": prompt}), owner)[0]
    shown = plain(cards.clip(shot, 512)) + plain(cards.side_by_side([shot], 320))
    assert "<img" not in shown and "\n" not in shown and "&lt;img src=x" in shown
    assert cards.notice("<b>") == '<div class="notice wrong" role="alert">&lt;b&gt;</div>'


def test_the_form_offers_what_the_run_can_do(studio: Open) -> None:
    names = [name for _, name in strategies(studio.desk.context)]
    assert names[0] == studio.generator.config.sample.strategy
    assert {"top1", "top2", "full", "monolith", "expert-0", "expert-2"} <= set(names) and "oracle" not in names
    assert captions(studio.desk.context) == []  # no folder of its own: nobody knows its captions
    assert [cards.duration(s) for s in (1.24, 12.3, 75, 4000)] == ["1.2 s", "12 s", "1 min 15 s", "1 h 6 min"]
