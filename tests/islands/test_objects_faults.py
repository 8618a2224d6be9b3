"""Every fault of the network and the store, made by a proxy in front of a real S3 server, met by what islands build on."""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.proxy import Proxy, Rule, rough
from faults.raw import races
from faults.servers import GcsEmulator, MotoServer, Server, free_port

from archipel.errors import DamagedError, Stopped
from archipel.islands.objects import AwayError, IgnoresConditionsError, Objects, StoreError

FAULTS = [
    Rule("status", status=500, first=2),
    Rule("status", status=503, first=2),
    Rule("status", status=429, first=2),
    Rule("status", status=409, first=2, methods=("PUT",)),
    Rule("status", status=408, first=2),
    Rule("status-after", status=500, first=2),
    Rule("status-after", status=409, first=2, methods=("PUT",)),
    Rule("drop", first=2),
    Rule("lose", first=2),
    Rule("cut", first=2),
    Rule("slow", first=2, seconds=0.3),
    Rule("trickle", first=2, seconds=0.3),
]


@pytest.fixture
def proxy(s3_server: Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(s3_server.endpoint, seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def opened(url: str, patience: float = 120.0, timeout: float = 60.0) -> Objects:
    return Objects.open(url, patience=patience, timeout=timeout)


def race(objects: list[Objects], key: str) -> list[int]:
    """All create one key at a barrier: who was told that it is theirs."""
    barrier, won = threading.Barrier(len(objects)), list[int]()

    def run(who: int) -> None:
        barrier.wait(60)
        if objects[who].create(key, b"nonce of %d" % who):
            won.append(who)

    runners = [threading.Thread(target=run, args=(who,)) for who in range(len(objects))]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    return won


@pytest.mark.parametrize("rule", FAULTS, ids=lambda rule: rule.label)
def test_exactly_one_wins_whatever_happens_to_the_answers(proxy: Proxy, s3_url: str, rule: Rule) -> None:
    objects = [opened(s3_url) for _ in range(6)]
    proxy.rules = [rule]
    won = race(objects, "jobs/2/claims/00000001.json")
    proxy.rules = []
    assert len(won) == 1
    assert objects[0].get("jobs/2/claims/00000001.json") == b"nonce of %d" % won[0]
    assert proxy.counts[rule.label] >= 2


@pytest.mark.parametrize("rule", [*FAULTS, Rule("corrupt", first=1, methods=("GET",))], ids=lambda rule: rule.label)
def test_transfers_are_right_in_the_end(proxy: Proxy, s3_url: str, tmp_path: Path, rule: Rule) -> None:
    data = hashlib.shake_256(b"model").digest(3 << 20)
    (tmp_path / "up").write_bytes(data)
    objects = opened(s3_url)
    proxy.rules = [rule]
    objects.put("model", tmp_path / "up")
    objects.fetch("model", tmp_path / "down", sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    assert (tmp_path / "down").read_bytes() == data
    assert [entry.key for entry in objects.list("jobs")] == []
    assert proxy.counts[rule.label] >= 1


def test_an_upload_in_parts_survives_lost_parts_and_a_lost_end(proxy: Proxy, s3_url: str, tmp_path: Path) -> None:
    data = hashlib.shake_256(b"parts").digest(26 << 20)  # four parts
    (tmp_path / "up").write_bytes(data)
    objects = opened(s3_url)
    proxy.rules = [
        Rule("status", first=1, methods=("PUT",), keys="partNumber=2", status=503),
        Rule("lose", first=1, methods=("PUT",), keys="partNumber=3"),
        Rule("lose", first=1, methods=("POST",), keys="uploadId="),
    ]
    objects.put("model", tmp_path / "up")
    assert proxy.counts["status 503"] == 1 and proxy.counts["lose"] >= 2
    objects.fetch("model", tmp_path / "down", sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def test_a_whole_job_in_bad_weather(proxy: Proxy, s3_url: str) -> None:
    """Each fault on 4 % of all requests: claims have one winner, and what was put is there."""
    proxy.rules = rough(0.04, seconds=0.05)
    objects = [opened(s3_url) for _ in range(3)]
    for fence in range(1, 9):
        key = f"jobs/2/claims/{fence:08d}.json"
        won = race(objects, key)
        assert len(won) == 1
        assert objects[0].get(key) == b"nonce of %d" % won[0]
        for step in range(3):
            objects[won[0]].put(f"jobs/2/{fence:08d}/checkpoints/{step:08d}", b"%d" % step)
    keys = [entry.key for entry in objects[1].list("jobs/2")]
    assert len(keys) == 8 + 24
    struck = sum(count for label, count in proxy.counts.items() if label != "requests")
    assert struck >= 12, proxy.counts


def test_a_store_that_goes_and_comes_back_is_waited_for(
    proxy: Proxy, s3_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    objects = opened(s3_url)
    objects.put("a", b"1")
    proxy.leave()
    timer = threading.Timer(3.0, proxy.come_back)
    timer.start()
    objects.put("a", b"2")
    assert objects.get("a") == b"2"
    timer.join()
    said = capfd.readouterr().err
    assert said.count("the store does not answer") == 1, "once, not at every try"


def test_patience_ends_in_a_sentence(proxy: Proxy, s3_url: str) -> None:
    objects = opened(s3_url, patience=0.5)
    proxy.leave()
    for call, name in (
        (lambda: objects.create("jobs/2/a", b""), "create jobs/2/a"),
        (lambda: objects.get("jobs/2/a"), "get jobs/2/a"),
        (lambda: objects.list("jobs/2"), "list jobs/2"),
        (lambda: objects.put("jobs/2/a", b""), "put jobs/2/a"),
        (lambda: objects.remove(["jobs/2/a"]), "delete jobs/2/a"),
    ):
        with pytest.raises(AwayError, match=f"cannot be reached \\({name}.*everything is kept"):
            call()
    assert objects.now() is None
    proxy.come_back()
    assert objects.get("jobs/2/a") is None


def test_what_the_store_said_is_passed_on(proxy: Proxy, s3_url: str) -> None:
    objects = opened(s3_url, patience=0.3)
    proxy.rules = [Rule("status", status=503)]
    with pytest.raises(AwayError, match="it answered 503 Service Unavailable, SlowDown"):
        objects.get("a")


@pytest.mark.parametrize(
    ("status", "says"), [(400, "400 Bad Request"), (301, "configured region"), (501, "501 Not Impl"), (403, "403")]
)
def test_answers_that_cannot_pass_are_not_waited_out(proxy: Proxy, s3_url: str, status: int, says: str) -> None:
    objects = opened(s3_url, patience=90.0)
    proxy.rules = [Rule("status", status=status)]
    began = time.monotonic()
    for call in (lambda: objects.get("a"), lambda: objects.put("a", b""), lambda: objects.list("a"), objects.probe):
        with pytest.raises(StoreError, match=says) as caught:
            call()
        assert not isinstance(caught.value, AwayError)
    assert time.monotonic() - began < 60


def test_a_wait_ends_when_asked_to_stop(proxy: Proxy, s3_url: str) -> None:
    objects = opened(s3_url, patience=600.0)
    proxy.leave()
    asked = time.monotonic() + 1.0
    objects.give_up = lambda: time.monotonic() > asked
    with pytest.raises(Stopped, match="everything is kept"):
        objects.get("a")
    assert time.monotonic() - asked < 30


def test_a_long_fetch_ends_when_asked_and_goes_on_there(proxy: Proxy, s3_url: str, tmp_path: Path) -> None:
    data = hashlib.shake_256(b"long").digest(17 << 20)  # three pieces
    objects = opened(s3_url)
    objects.put("model", data)
    pieces: list[int] = []
    objects.give_up = lambda: len(pieces) == 2
    whole = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    with pytest.raises(Stopped, match="goes on there"):
        objects.fetch("model", tmp_path / "model", on_bytes=pieces.append, **whole)  # type: ignore[arg-type]
    again = opened(s3_url)
    again.fetch("model", tmp_path / "model", **whole)  # type: ignore[arg-type]
    assert again.traffic.received == 1 << 20 and (tmp_path / "model").read_bytes() == data


def test_a_list_without_end_is_refused(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from archipel.islands import objects as module

    monkeypatch.setattr(module, "MOST", 3)
    objects = opened(s3_url)
    for number in range(4):
        objects.put(f"many/{number}", b"")
    with pytest.raises(DamagedError, match="holds more than 3 objects"):
        objects.list("many")


def test_by_plain_http_the_tests_own_store_has_one_winner(s3_server: Server) -> None:
    """What is blamed first where a race has two winners: `python -m faults.raw` asks moto as it comes, too."""
    bucket = s3_server.make_bucket("raw")
    assert races(s3_server.endpoint, bucket, 8, 16) == {"one": 8, "several": 0, "none": 0, "most": 1}


def test_a_request_that_hangs_is_tried_again(proxy: Proxy, s3_url: str) -> None:
    objects = opened(s3_url, timeout=1.0)
    proxy.rules = [Rule("slow", first=1, seconds=8.0)]
    began = time.monotonic()
    assert objects.create("a", b"1")
    assert time.monotonic() - began < 7.5
    assert objects.traffic.requests["create"] + objects.traffic.requests["get"] >= 2


@pytest.mark.parametrize(
    "more", [[], [Rule("lose", first=2, methods=("PUT",))], [Rule("status-after", first=2, status=409)]]
)
def test_a_store_that_ignores_conditions_is_refused(proxy: Proxy, s3_url: str, more: list[Rule]) -> None:
    proxy.strip = {"if-none-match"}
    proxy.rules = more
    with pytest.raises(IgnoresConditionsError, match="ignores create-if-absent"):
        opened(s3_url).probe()


def test_an_emulator_of_another_protocol_is_refused(no_clouds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcp-storage-emulator knows Google's JSON API only: said at once, not after ten minutes."""
    with GcsEmulator() as server:
        server.make_bucket("runs")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        with pytest.raises(StoreError, match="cannot be used"):
            opened("gs://runs/x", patience=600.0).probe()


def test_truncation_on_the_way_is_not_taken_for_the_whole(proxy: Proxy, s3_url: str, tmp_path: Path) -> None:
    objects = opened(s3_url, patience=1.0)
    objects.put("a", b"x" * 5000)
    proxy.rules = [Rule("cut", methods=("GET",))]
    with pytest.raises(AwayError):
        objects.get("a")
    with pytest.raises((AwayError, DamagedError)):
        objects.fetch("a", tmp_path / "a", sha256=hashlib.sha256(b"x" * 5000).hexdigest(), size=5000)
    assert not (tmp_path / "a").exists()


# --- nothing secret in what people and logs see -------------------------------------------------------------------------


def wrong_keys(server: str, monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRETSECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEBY")
    return opened("s3://runs/x", patience=0.3)


def test_wrong_s3_keys_are_refused_without_repeating_them(
    no_clouds: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with MotoServer(checks_keys_after=1) as server:
        server.make_bucket("runs")
        objects = wrong_keys(server.endpoint, monkeypatch)
        objects.patience = 600.0
        for call in (
            lambda: objects.get("a"),
            lambda: objects.list("a"),
            lambda: objects.create("a", b""),
            objects.probe,
        ):
            with pytest.raises(StoreError, match="Check the credentials in the environment") as caught:
                call()
            assert_secret_free(caught.value, capfd, caplog)


def assert_secret_free(
    error: BaseException, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    said = "".join(traceback.format_exception(error)) + "".join(capfd.readouterr()) + caplog.text
    for secret in ("AKIASECRET", "wJalr", "FwoGZX", "c2lnbmF0dXJl", "BEGIN PRIVATE", "Signature="):
        assert secret not in said


def away_s3(monkeypatch: pytest.MonkeyPatch) -> Objects:
    return wrong_keys(f"http://127.0.0.1:{free_port()}", monkeypatch)


def away_az(monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{free_port()}/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "a")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2022-11-02&sp=rwdl&sig=c2lnbmF0dXJlc2ln")
    return opened("az://runs/x", patience=0.3)


def odd_az(monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AKIASECRET not base64 wJalr")
    return opened("az://runs/x", patience=0.3)


def odd_gs(monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", '{"private_key": "-----BEGIN PRIVATE KEY-----wJalr')
    return opened("gs://runs/x", patience=0.3)


def torn_gs(monkeypatch: pytest.MonkeyPatch) -> Objects:
    key = (
        '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----wJalr", "private_key_id": "AKIASECRET",'
    )
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", key + ' "client_email": "x@y"}')
    return opened("gs://runs/x", patience=0.3)


@pytest.mark.parametrize("make", [away_s3, away_az, odd_az, odd_gs, torn_gs])
def test_no_error_repeats_a_credential(
    make: Callable[[pytest.MonkeyPatch], Objects],
    no_clouds: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(StoreError) as caught:
        make(monkeypatch).get("a")
    assert_secret_free(caught.value, capfd, caplog)
