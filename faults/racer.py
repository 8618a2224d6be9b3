"""A light process that claims when told: what an island is before it imports anything heavy.

    python -m faults.racer URL NAME

Reads lines ``JOB FENCE MOMENT``: at MOMENT (this machine's monotonic clock) claim FENCE of JOB. Answers one line of JSON:
whether it won, its nonce, and the nonce that the store holds afterwards. Says first whether torch was imported.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

from archipel.errors import ArchipelError
from archipel.islands import keys
from archipel.islands.claims import State, claim
from archipel.islands.objects import Objects


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def main(url: str, name: str) -> None:
    objects = Objects.open(url)
    with contextlib.suppress(ArchipelError):
        objects.get("published.json")  # connections and modules are there before the first race
    say(heavy=sorted({"torch", "diffusers", "numpy"} & set(sys.modules)))
    for line in sys.stdin:
        job, fence, moment = line.split()
        late = time.monotonic() - float(moment)
        if late < 0:
            time.sleep(-late)
        try:
            held = claim(objects, State(job, int(fence) - 1), name)
            found = objects.get_json(keys.claim(job, int(fence)))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")
            continue
        say(won=held is not None, nonce=held.nonce if held else "", holder=found.get("nonce"), late=max(0.0, late))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
