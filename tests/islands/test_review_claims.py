"""What strangers may write, or what may happen to a holder's own process: nobody else is stopped by it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from archipel.errors import DamagedError, Stopped
from archipel.islands import keys, objects
from archipel.islands.admission import admit
from archipel.islands.bucket import Bucket
from archipel.islands.claims import Holder, claim, read_state
from archipel.islands.objects import Objects, encode
from archipel.islands.status import status


@pytest.fixture
def store_(tmp_path: Path) -> Objects:
    return Objects.open(tmp_path / "bucket", make=True, patience=5)


def hold(store: Objects) -> Holder:
    held = claim(store, read_state(store, "2"), "a")
    assert held is not None
    return Holder(store, held, every=0.02, lease=60)


def test_words_of_megabytes_are_passed_over(store_: Objects) -> None:
    big = encode({"nonce": "x", "state": "working", "filler": "x" * (5 << 20)})
    store_.put(keys.claim("2", 1), big)
    store_.put(keys.heartbeat("2", 1), big)
    state = read_state(store_, "2")
    assert state.fence == 1 and state.claim == {} and state.heartbeat == {} and not state.done
    store_.put(keys.committed("2"), big)
    assert read_state(store_, "2").committed == {"damaged": keys.committed("2")}


def test_openings_beyond_a_gap_count_for_nobody(store_: Objects) -> None:
    for number in (1, 3):
        store_.put(f"jobs/2/notes/{number}", b"")
        store_.put(keys.reopened("2", number), encode({"above": number}))
    state = read_state(store_, "2")
    assert (state.opening, state.above) == (1, 1)


def test_a_heartbeat_that_cannot_speak_goes_on_and_one_that_ends_gives_the_job_up(
    store_: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    calls, enough = 0, threading.Event()

    def facts() -> dict[str, int]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("dictionary changed size during iteration")
        if calls > 3:
            enough.set()
        return {}

    holder = hold(store_)
    holder._facts = facts
    monkeypatch.setattr(sys, "stderr", Gone())
    with holder:
        assert enough.wait(20), "it beats on after a trouble that it could not print"
        assert holder.lost is None

    lost, holder = threading.Event(), hold(store_)
    with holder:
        holder._on_lost = lambda reason: lost.set()
        monkeypatch.setattr(holder, "_beat", lambda state: sys.exit(3))
        assert lost.wait(20) and "heartbeat ended" in str(holder.lost)


def test_a_stop_during_the_first_heartbeat_gives_the_claim_back(
    store_: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, real = hold(store_), store_.put

    def put(key: str, data: bytes | Path) -> None:
        monkeypatch.setattr(store_, "put", real)
        raise Stopped("stopped while waiting for the store")

    monkeypatch.setattr(store_, "put", put)
    with pytest.raises(Stopped), holder:
        pass
    assert read_state(store_, "2").released


def test_an_endless_listing_is_refused_in_a_sentence(store_: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        store_.put(f"jobs/2/spam/{number}", b"")
    monkeypatch.setattr(objects, "MOST", 10)
    with pytest.raises(DamagedError, match=r"jobs/2 in .* holds more than 10 objects"):
        store_.list("jobs/2")


def test_numbers_of_a_strangers_heartbeat_do_not_break_the_status(bucket: Bucket) -> None:
    for speed, step in (("5e-324", 3), ("-1", -7), ("1e300", 1e18)):
        bucket.objects.put(keys.claim("1", 1), b'{"nonce": "x"}')
        beat = f'{{"nonce": "x", "state": "working", "steps_per_s": {speed}, "step": {step}, "loss": NaN}}'
        bucket.objects.put(keys.heartbeat("1", 1), beat.encode())
        row = next(row for row in status(bucket)["jobs"] if row["name"] == "1")
        json.dumps(row, allow_nan=False)
        assert row["state"] == "claimed" and row["left_s"] is None and 0 <= row["step"] <= row["steps"]


def test_a_commit_of_megabytes_is_refused_and_the_job_can_be_reopened(bucket: Bucket) -> None:
    bucket.objects.put(keys.claim("1", 1), b'{"nonce": "x"}')
    bucket.objects.put(keys.committed("1"), b" " * (1 << 20))
    answer = admit(bucket.url, "1", reopen=True)
    assert (answer.admitted, answer.rule) == (False, "size") and "is open again" in answer.detail
    assert bucket.state("1").released
