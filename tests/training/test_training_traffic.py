"""The ledger's traffic against closed forms and a simulated ring."""

from __future__ import annotations

from typing import Any

import pytest

from archipel.training import traffic


def simulate_ring(workers: int, size: int) -> int:
    """Bytes that one worker sends in a ring all-reduce: a chunk of size / n per turn, n - 1 turns, twice."""
    chunk, sent = size / workers, 0.0
    for _ in ("reduce-scatter", "all-gather"):
        for _ in range(workers - 1):
            sent += chunk
    return round(sent)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_a_ring_sends_what_it_sends(workers: int) -> None:
    size = 840 * 4
    assert round(traffic.all_reduce_bytes(workers, size)) == simulate_ring(workers, size)
    assert traffic.data_parallel_bytes(workers, 840, 7) == 7 * simulate_ring(workers, size)


@pytest.mark.parametrize(("steps", "rounds"), [(1, 1), (500, 1), (501, 2), (88_000, 176)])
def test_diloco_talks_once_in_h_steps(steps: int, rounds: int) -> None:
    assert traffic.diloco_bytes(2, 1000, steps) == rounds * 4000
    assert traffic.diloco_bytes(2, 1000, steps, every=1) == traffic.data_parallel_bytes(2, 1000, steps)


def card(sent: int, received: int, result: int = 4000, **more: Any) -> dict[str, Any]:
    counted = {"requests": {"get": 3, "put": 4}, "bytes_sent": sent, "bytes_received": received}
    files = {"model.safetensors": {"bytes": result, "sha256": "0"}}
    return {"parameters": 1000, "steps": 1000, "files": files, "island": {"traffic": counted}} | more


def test_the_section_adds_up() -> None:
    cards = {"0": card(100, 200), "1": card(300, 400), "router": card(10, 20, result=30)}
    found = traffic.section(cards, ["0", "1"], ["router"])
    assert found["islands"]["0"] == {"requests": 7, "sent": 4100, "received": 200, "result": 4000}
    assert found["total"] == 4100 + 200 + 4300 + 400 + 40 + 20
    assert found["data_parallel"]["sent_per_worker"] == 1000 * 2 * 1 / 2 * 4 * 1000
    assert found["data_parallel"]["total"] == 2 * 2 * 4_000_000
    assert found["diloco"]["sent_per_worker"] == 2 * 4000
    assert found["data_parallel"]["times_ours"] == round(16_000_000 / found["total"], 4)
    assert found["needed"] == 200 + 400 + 20 + 4000 + 4000 + 30
    assert found["diloco"]["times_needed"] == round(32_000 / found["needed"], 4)
    assert found["data_parallel"]["total"] == 500 * found["diloco"]["total"]


def test_nothing_is_compared_while_an_expert_is_missing_or_was_trained_without_a_bucket() -> None:
    plain = {"parameters": 1000, "steps": 1000, "files": {}}
    for cards in ({}, {"0": card(1, 1)}, {"0": card(1, 1), "1": plain}):
        found = traffic.section(cards, ["0", "1"], ["router"])
        assert found["total"] is None and found["data_parallel"] is None and found["diloco"] is None
        assert set(found["islands"]) == set(cards) - {"1"}


def test_odd_cards_break_nothing() -> None:
    odd = card(1, 1, parameters="many", steps=None)
    odd["island"]["traffic"] |= {"bytes_sent": "ten", "bytes_received": -4, "requests": {"get": None}}
    odd["files"] = ["?"]
    found = traffic.section({"0": odd}, ["0"])
    assert found["islands"]["0"] == {"requests": 0, "sent": 0, "received": 0, "result": 0}
    assert found["total"] == 0 and found["data_parallel"]["times_ours"] is None
