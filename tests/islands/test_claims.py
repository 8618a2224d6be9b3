"""The protocol without any training: who wins, who may take over, who may commit."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from archipel.islands import keys
from archipel.islands.claims import Claim, Holder, LostError, State, Watcher, chain, claim, read_state
from archipel.islands.objects import Entry, Objects, encode


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects.open(tmp_path / "bucket", make=True, patience=5)


def take(objects: Objects, name: str = "2", island: str = "a") -> Claim:
    held = claim(objects, read_state(objects, name), island)
    assert held is not None
    return held


def holder(
    objects: Objects, held: Claim, clock: Clock | None = None, lease: float = 10.0, every: float = 60.0
) -> Holder:
    """Beats once on entering and then not again within a test, unless ``every`` says so."""
    return Holder(objects, held, every=every, lease=lease, now=clock or Clock())


def test_claims_import_neither_torch_nor_diffusers() -> None:
    program = "import sys, archipel.islands.claims, archipel.islands.objects; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_fences_count_up_without_gaps_and_an_entry_beyond_a_gap_is_ignored(objects: Objects) -> None:
    assert chain(set()) == 0 and chain({1, 2, 3}) == 3 and chain({2, 3}) == 0 and chain({1, 2, 9_000_000}) == 2
    objects.put(keys.claim("2", 99_999_999), encode({"nonce": "hostile"}))
    state = read_state(objects, "2")
    assert state.fence == 0 and state.released
    assert take(objects).fence == 1
    assert read_state(objects, "2").fence == 1


def test_of_many_threads_that_see_the_same_state_one_wins(objects: Objects) -> None:
    for _ in range(20):
        state, barrier, won = read_state(objects, "0"), threading.Barrier(8), []

        def race(number: int, state: State = state, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            barrier.wait()
            if claim(objects, state, f"island-{number}") is not None:
                won.append(number)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = read_state(objects, "0")
        assert len(won) == 1 and after.fence == state.fence + 1 and after.claim["island"] == f"island-{won[0]}"


def test_a_job_may_be_taken_when_its_holder_stood_still_for_a_lease_on_the_watchers_own_clock(objects: Objects) -> None:
    clock = Clock()
    watcher = Watcher(10.0, clock)
    held = take(objects)
    with holder(objects, held, clock) as h:
        assert not watcher.free(read_state(objects, "2"))
        clock.now += 9.9
        assert not watcher.free(read_state(objects, "2"))
        h._beat("working")  # seen moving: the lease begins anew
        assert not watcher.free(read_state(objects, "2"))
        clock.now += 9.9
        assert not watcher.free(read_state(objects, "2"))
        clock.now += 0.2
        assert watcher.free(read_state(objects, "2")) and watcher.still("2") == pytest.approx(10.1)


def test_a_claim_whose_holder_died_before_its_first_heartbeat_is_taken_after_a_lease(objects: Objects) -> None:
    clock = Clock()
    watcher = Watcher(10.0, clock)
    take(objects)
    assert not watcher.free(read_state(objects, "2"))
    clock.now += 10
    assert watcher.free(read_state(objects, "2"))


def test_a_heartbeat_written_by_another_keeps_nothing_alive(objects: Objects) -> None:
    held = take(objects)
    objects.put(
        keys.heartbeat("2", held.fence), encode({"counter": 7, "state": "released", "nonce": "somebody else's"})
    )
    state = read_state(objects, "2")
    assert not state.heartbeat and not state.released


def test_a_clean_release_frees_the_job_at_once(objects: Objects) -> None:
    with pytest.raises(KeyboardInterrupt), holder(objects, take(objects)):
        raise KeyboardInterrupt
    state = read_state(objects, "2")
    assert state.released and Watcher(1e9).free(state)


def test_a_holder_that_could_not_renew_within_its_lease_commits_nothing(objects: Objects) -> None:
    clock, reasons = Clock(), []
    held = take(objects)
    h = Holder(objects, held, every=60, lease=10, on_lost=reasons.append, now=clock)
    with h:
        clock.now += 10
        with pytest.raises(LostError, match=r"job 2, fence 1: its lease of 10 s ran out"):
            h.commit({"key": "x"})
    assert len(reasons) == 1 and not read_state(objects, "2").done
    assert not read_state(objects, "2").released, (
        "a holder that lost its job gives nothing back: it has nothing to give"
    )


def test_a_beat_that_arrives_after_the_lease_does_not_revive_it(objects: Objects) -> None:
    clock = Clock()
    h = holder(objects, take(objects), clock)
    with h:
        clock.now += 11  # stopped, and woken in the middle of a heartbeat
        h._beat("working")
        assert h.lost is not None


def test_a_holder_looks_for_a_higher_fence_before_it_commits(objects: Objects) -> None:
    held = take(objects)
    with holder(objects, held) as h:
        assert claim(objects, read_state(objects, "2"), "b") is not None
        with pytest.raises(LostError, match="claimed again"):
            h.commit({"key": "x"})


def test_the_first_commit_stays(objects: Objects) -> None:
    """Both passed every check before either created: the store decides, and says so to both."""
    first = take(objects, island="a")
    with holder(objects, first) as one:
        second = Claim("2", 2, "other", "b")
        two = holder(objects, second)
        assert one.commit({"sha256": "1" * 64}) is True
        assert two.commit({"sha256": "2" * 64}) is False
        assert one.commit({"sha256": "1" * 64}) is True, "asked again after a lost answer, it is still ours"
    state = read_state(objects, "2")
    assert state.done and state.committed["sha256"] == "1" * 64 and state.committed["nonce"] == first.nonce


def test_a_result_that_comes_between_the_listing_and_the_heartbeat_is_seen(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = objects.list

    def late(prefix: str) -> list[Entry]:
        monkeypatch.undo()
        seen = listing(prefix)
        h.commit({"sha256": "1" * 64})
        h.__exit__(None, None, None)  # the heartbeat now says that the job is done
        return seen

    with holder(objects, take(objects)) as h:
        monkeypatch.setattr(objects, "list", late)
        state = read_state(objects, "2")
    assert keys.committed("2") not in state.keys and state.done and not state.released


def test_an_unreadable_result_is_still_the_jobs_one_result(objects: Objects) -> None:
    objects.put(keys.committed("2"), b"not JSON")
    state = read_state(objects, "2")
    assert state.done and not state.released and state.committed["damaged"] == keys.committed("2")


def test_a_reopened_job_is_free_and_commits_to_a_key_of_its_own(objects: Objects) -> None:
    with holder(objects, take(objects)) as h:
        h.commit({"sha256": "1" * 64})
    objects.create(keys.reopened("2", 1), encode({"above": 1}))
    state = read_state(objects, "2")
    assert not state.done and state.released and state.above == 1 and state.opening == 1
    held = claim(objects, state, "b")
    assert held is not None and held.fence == 2 and held.opening == 1
    with holder(objects, held) as h:
        assert h.commit({"sha256": "2" * 64})
    assert read_state(objects, "2").committed["sha256"] == "2" * 64
    assert objects.get_json(keys.committed("2"))["sha256"] == "1" * 64, "nothing is ever replaced"


def test_heartbeats_move_and_carry_what_others_may_see(objects: Objects) -> None:
    held = take(objects)
    moved = threading.Event()
    count = 0

    def facts() -> dict[str, int]:
        nonlocal count
        count += 1
        if count > 3:
            moved.set()
        return {"step": count}

    with Holder(objects, held, every=0.05, lease=60, facts=facts):
        assert moved.wait(30)
    beat = read_state(objects, "2").heartbeat
    assert beat["counter"] >= 3 and beat["step"] >= 4 and beat["state"] == "done"


def test_what_strangers_write_in_place_of_claims_and_results_is_not_trusted_to_parse(objects: Objects) -> None:
    objects.put(keys.claim("2", 1), b"[" * 100_000)
    objects.put(keys.heartbeat("2", 1), b"\xff\xfe")
    objects.put(keys.committed("2"), b"not JSON")
    objects.put(keys.reopened("2", 1), b'{"above": "many"}')
    state = read_state(objects, "2")
    assert state.fence == 1 and not state.done and state.claim == {} and state.heartbeat == {}
