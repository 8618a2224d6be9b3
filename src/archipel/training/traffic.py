"""Bytes that islands moved, against what other ways to train on as many machines would have moved. No torch here.

Data-parallel training averages gradients at every step; by a ring, which is optimal in bytes, a worker of n sends
2 (n - 1) / n times the gradient's bytes and receives as many (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce
algorithms for clusters of workstations, JPDC 69(2), section 3). DiLoCo (arXiv 2311.08105, algorithm 1) averages the same
number of bytes, the outer gradients, once in H inner steps; H = 500 in its main experiments. Neither count has headers,
retries or checkpoints in it; ours has retries and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

DILOCO_H = 500  # inner steps between two synchronisations
GRADIENT_BYTES = 4  # per parameter: gradients are float32, as here


def all_reduce_bytes(workers: int, size: int) -> float:
    """Bytes that one of ``workers`` (>= 1) sends in a ring all-reduce of ``size`` bytes; it receives as many."""
    return 2 * (workers - 1) / workers * size


def data_parallel_bytes(workers: int, parameters: int, steps: int) -> int:
    """Bytes that one worker sends in ``steps`` steps of data-parallel training; it receives as many."""
    return round(steps * all_reduce_bytes(workers, GRADIENT_BYTES * parameters))


def diloco_bytes(workers: int, parameters: int, steps: int, every: int = DILOCO_H) -> int:
    """Bytes that one worker sends in ``steps`` inner steps with an outer one every ``every``; it receives as many."""
    return round(-(-steps // every) * all_reduce_bytes(workers, GRADIENT_BYTES * parameters))


def section(
    cards: Mapping[str, Mapping[str, Any]], experts: Iterable[str], others: Iterable[str] = ()
) -> dict[str, Any]:
    """The ledger's "traffic": what each job's island moved, and what K machines would have moved in other ways.

    cards: by job, those without an "island" were trained without a bucket and moved nothing between machines. experts:
    the names of all experts, K of them: the other ways are K workers that train one network of an expert's size for an
    expert's steps. others: jobs whose traffic counts, too (the router). Totals are null while an expert's is missing.
    "needed" is what came in (shards, a checkpoint to continue from) and the results: without checkpoints sent, which the
    other ways' counts do not have either.
    """
    experts = list(experts)
    moved = {}
    for name in (*experts, *others):
        island = _mapping(cards.get(name, {}).get("island"))
        counted = _mapping(island.get("traffic"))
        if counted:
            files = _mapping(cards[name].get("files"))
            result = sum(_whole(_mapping(entry).get("bytes")) for entry in files.values())  # sent after it was counted
            moved[name] = {
                "requests": sum(_whole(n) for n in _mapping(counted.get("requests")).values()),
                "sent": _whole(counted.get("bytes_sent")) + result,
                "received": _whole(counted.get("bytes_received")),
                "result": result,
            }
    out: dict[str, Any] = {
        "islands": moved,
        "workers": len(experts),
        "counted": "payload bytes of the attempt that was committed, retries and checkpoints included, headers not",
        "needed": sum(row["received"] + row["result"] for row in moved.values()),
    }
    known = [
        cards[name] for name in experts if name in moved and "parameters" in cards[name] and "steps" in cards[name]
    ]
    if len(known) < len(experts):
        return {**out, "total": None, "data_parallel": None, "diloco": None}
    total = sum(row["sent"] + row["received"] for row in moved.values())
    parameters, steps = (max(_whole(card.get(key)) for card in known) for key in ("parameters", "steps"))
    workers = len(experts)
    ways = {
        "data_parallel": (
            data_parallel_bytes(workers, parameters, steps),
            f"{steps} x 2 ({workers}-1)/{workers} x 4 x {parameters}",
        ),
        "diloco": (
            diloco_bytes(workers, parameters, steps),
            f"ceil({steps}/{DILOCO_H}) x 2 ({workers}-1)/{workers} x 4 x {parameters}",
        ),
    }
    for way, (sent, formula) in ways.items():
        all_workers = 2 * workers * sent
        out[way] = {
            "sent_per_worker": sent,
            "received_per_worker": sent,
            "total": all_workers,
            "formula": f"sent per worker = {formula}",
            "times_ours": round(all_workers / total, 4) if total else None,
            "times_needed": round(all_workers / out["needed"], 4) if out["needed"] else None,
        }
    return {**out, "total": total}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int:
    """A count of a card, which may be a stranger's; 0 for anything else."""
    return value if isinstance(value, int) and value >= 0 else 0
