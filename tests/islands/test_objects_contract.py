"""One contract, asked of a folder, S3, Azure and Google's API: what islands build on holds in each."""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from pathlib import Path

import pytest

from archipel.errors import ArchipelError, DamagedError
from archipel.islands.objects import Objects, StoreError

BIG = 9 << 20  # more than one piece of a transfer


def opened(url: str, patience: float = 30.0) -> Objects:
    return Objects.open(url, patience=patience)


def fetch(objects: Objects, key: str, path: Path, data: bytes) -> None:
    objects.fetch(key, path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def big(seed: int = 0) -> bytes:
    return hashlib.shake_256(str(seed).encode()).digest(BIG)


def test_a_key_is_created_once(store_url: str) -> None:
    one, other = opened(store_url), opened(store_url)
    assert one.create("jobs/2/claims/00000001.json", b"mine")
    assert not other.create("jobs/2/claims/00000001.json", b"theirs")
    assert one.create("jobs/2/claims/00000001.json", b"mine"), "what is there is ours: no other answer is true"
    assert other.get("jobs/2/claims/00000001.json") == b"mine"
    assert one.writes == {"jobs/2/claims/00000001.json"}


def test_of_many_threads_one_wins(store_url: str) -> None:
    threads, rounds = 12, 4
    objects = [opened(store_url) for _ in range(threads)]
    for number in range(rounds):
        barrier, won = threading.Barrier(threads), list[int]()

        def run(who: int, barrier: threading.Barrier = barrier, won: list[int] = won, number: int = number) -> None:
            barrier.wait(60)
            if objects[who].create(f"race/{number}", b"nonce of %d" % who):
                won.append(who)

        runners = [threading.Thread(target=run, args=(who,)) for who in range(threads)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        assert len(won) == 1
        assert objects[0].get(f"race/{number}") == b"nonce of %d" % won[0]


def test_put_replaces_and_get_is_bounded(store_url: str, tmp_path: Path) -> None:
    objects = opened(store_url)
    assert objects.get("a/heartbeat.json") is None
    objects.put("a/heartbeat.json", b'{"counter": 1}')
    objects.put("a/heartbeat.json", b'{"counter": 2}')
    assert objects.get_json("a/heartbeat.json") == {"counter": 2}
    with pytest.raises(DamagedError, match="14 bytes, at most 13"):
        objects.get("a/heartbeat.json", limit=13)
    objects.put("empty", b"")
    assert objects.get("empty") == b""
    with pytest.raises(FileNotFoundError):
        objects.put("a/file", tmp_path / "no-such-file")


def test_a_large_file_goes_up_and_comes_down(store_url: str, tmp_path: Path) -> None:
    if store_url.startswith("gs://"):
        size = 1 << 20  # the server of ours does not know uploads in parts
    else:
        size = BIG
    data = big()[:size]
    (tmp_path / "up").write_bytes(data)
    objects = opened(store_url)
    objects.put("big", tmp_path / "up")
    pieces: list[int] = []
    objects.fetch(
        "big", tmp_path / "deep" / "down", sha256=hashlib.sha256(data).hexdigest(), size=size, on_bytes=pieces.append
    )
    assert (tmp_path / "deep" / "down").read_bytes() == data
    assert sum(pieces) == size and objects.traffic.received == size and objects.traffic.sent == size
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["down"]


def test_a_transfer_goes_on_where_it_broke(store_url: str, tmp_path: Path) -> None:
    data = big()[: 3 << 20]
    objects = opened(store_url)
    objects.put("big", data)
    (tmp_path / "down.part").write_bytes(data[: 2 << 20])
    fetch(objects, "big", tmp_path / "down", data)
    assert (tmp_path / "down").read_bytes() == data
    assert objects.traffic.received == 1 << 20, "what was there is not fetched again"


@pytest.mark.parametrize("left_over", [b"not the beginning of it", b"x" * 5000], ids=["other", "longer"])
def test_a_wrong_beginning_is_thrown_away(store_url: str, tmp_path: Path, left_over: bytes) -> None:
    data = big()[:3000]
    objects = opened(store_url)
    objects.put("big", data)
    (tmp_path / "down.part").write_bytes(left_over)
    fetch(objects, "big", tmp_path / "down", data)
    assert (tmp_path / "down").read_bytes() == data


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "missing", "empty"])
def test_damage_is_named_and_nothing_is_left(store_url: str, tmp_path: Path, damage: str) -> None:
    data = big()[:3000]
    objects = opened(store_url)
    held = {
        "flipped": data[:100] + bytes([data[100] ^ 4]) + data[101:],
        "truncated": data[:1000],
        "longer": data + b"!",
        "empty": b"",
    }
    if damage in held:
        objects.put("shards/0/train.safetensors", held[damage])
    began = time.monotonic()
    if damage == "longer":  # exactly the promised bytes are read, and they are right
        fetch(objects, "shards/0/train.safetensors", tmp_path / "down", data)
        assert (tmp_path / "down").read_bytes() == data
        return
    with pytest.raises(DamagedError, match=r"shards/0/train\.safetensors"):
        fetch(objects, "shards/0/train.safetensors", tmp_path / "down", data)
    assert time.monotonic() - began < 25, "no waiting for what cannot change"
    assert not (tmp_path / "down").exists()


def test_an_object_replaced_in_the_middle_is_fetched_again(store_url: str, tmp_path: Path) -> None:
    old, new = big(1)[:4000], big(2)[:4000]
    objects = opened(store_url)
    objects.put("model", new)
    (tmp_path / "down.part").write_bytes(old[:2000])
    fetch(objects, "model", tmp_path / "down", new)
    assert (tmp_path / "down").read_bytes() == new


def test_list_knows_where_a_name_ends(store_url: str) -> None:
    objects = opened(store_url)
    for key in ("jobs/20/claims/00000001.json", "jobs/2/claims/00000002.json", "jobs/2/claims/00000001.json", "jobs/2"):
        if key != "jobs/2" or not store_url.startswith("file"):  # on a disk a folder is no file
            objects.put(key, key.encode())
    entries = objects.list("jobs/2")
    assert [entry.key for entry in entries] == ["jobs/2/claims/00000001.json", "jobs/2/claims/00000002.json"]
    assert [entry.size for entry in entries] == [len(entry.key) for entry in entries]
    assert objects.list("jobs/3") == []


def test_list_shows_only_what_can_be_a_runs(store_url: str) -> None:
    import obstore

    objects = opened(store_url)
    objects.put("jobs/2/a.json", b"1")
    obstore.put(objects._store, "jobs/2/a name of a stranger; rm -rf", b"1")
    obstore.put(objects._store, "jobs/2/.hidden", b"1")
    assert [entry.key for entry in objects.list("jobs/2")] == ["jobs/2/a.json"]


def test_a_thousand_objects_and_more_are_listed(store_url: str) -> None:
    objects = opened(store_url)
    if objects.root is not None:
        (objects.root / "many").mkdir()
        for number in range(1001):
            (objects.root / "many" / f"{number:04d}").write_bytes(b"")
    else:
        import obstore

        for number in range(1001 if store_url.startswith("s3") else 20):
            obstore.put(objects._store, f"many/{number:04d}", b"")
    listed = [entry.key for entry in objects.list("many")]
    assert listed == [f"many/{number:04d}" for number in range(len(listed))] and len(listed) >= 20


def test_remove_and_what_is_not_there(store_url: str) -> None:
    objects = opened(store_url)
    objects.put("a/1", b"1")
    objects.put("a/2", b"2")
    objects.remove(["a/1", "a/none"])
    assert [entry.key for entry in objects.list("a")] == ["a/2"]


def test_the_stores_time_is_that_of_its_timestamps(store_url: str) -> None:
    objects = opened(store_url)
    objects.put("a", b"1")
    objects.put("folder/a", b"1")
    now = objects.now()
    assert now is not None
    assert abs(now - objects.list("folder")[0].modified) < 100


def test_a_store_that_honours_conditions_passes_the_probe_again_and_again(store_url: str) -> None:
    for _ in range(3):
        opened(store_url).probe()


@pytest.mark.parametrize(
    "key", ["../x", "a/../b", "/a", "a//b", ".hidden", "a b", "", "a/", "ä", "x" * 600, "a\\b", "a\nb"]
)
def test_no_key_leaves_the_prefix(store_url: str, key: str) -> None:
    objects = opened(store_url)
    for call in (objects.get, objects.list, lambda k: objects.put(k, b""), lambda k: objects.create(k, b"")):
        with pytest.raises(ArchipelError, match="is not a key"):
            call(key)


def test_a_missing_bucket_is_said_at_once(store_url: str, tmp_path: Path) -> None:
    if store_url.startswith("file"):
        with pytest.raises(ArchipelError, match="there is no folder"):
            Objects.open(f"file://{tmp_path}/none")
        made = Objects.open(f"file://{tmp_path}/none/deeper", make=True)
        made.probe()
        return
    objects = opened(f"{store_url.partition('://')[0]}://no-such-bucket/x", patience=600.0)
    for call in (
        lambda: objects.get("a"),
        lambda: objects.list("a"),
        lambda: objects.put("a", b""),
        lambda: objects.create("a", b""),
        objects.probe,
    ):
        with pytest.raises(StoreError, match="there is no such bucket"):
            call()


@pytest.mark.system
def test_a_wrong_key_is_refused_and_never_repeated(
    az_server: object, no_clouds: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in az_server.environment.items():  # type: ignore[attr-defined]
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0LXNlY3JldC1zZWNyZXQ=")
    objects = opened("az://runs/x", patience=600.0)
    for call in (lambda: objects.get("a"), lambda: objects.list("a"), objects.probe):
        with pytest.raises(StoreError, match="refuses") as caught:
            call()
        said = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
        assert "403" in said and "Check the credentials" in said
        for secret in ("c2VjcmV0", "SharedKey", "string to sign", "devstoreaccount1:"):
            assert secret not in said
