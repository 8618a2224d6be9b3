"""Claim races by raw HTTP: who wins is asked of the server itself, with none of our code or obstore's in between."""

from __future__ import annotations

import argparse
import http.client
import json
import threading
from collections import Counter
from urllib.parse import urlsplit


def put_if_absent(endpoint: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
    """One conditional PUT; the HTTP status."""
    parts = urlsplit(endpoint)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request("PUT", path, body, {"If-None-Match": "*", **(headers or {})})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def race(endpoint: str, path: str, threads: int, size: int = 160) -> Counter[int]:
    """``threads`` connections, opened first, all put one key at a barrier: how often each status came back.

    A store with atomic creates answers 200 (or 201) exactly once.
    """
    barrier, statuses, lock = threading.Barrier(threads), Counter[int](), threading.Lock()
    parts = urlsplit(endpoint)

    def run(number: int) -> None:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.connect()
        try:
            barrier.wait(60)
            connection.request("PUT", path, f"racer {number}".encode().ljust(size), {"If-None-Match": "*"})
            answer = connection.getresponse()
            answer.read()
            with lock:
                statuses[answer.status] += 1
        except OSError:
            with lock:
                statuses[0] += 1
        finally:
            connection.close()

    runners = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    return statuses


def races(endpoint: str, bucket: str, count: int, threads: int, size: int = 160) -> dict[str, int]:
    """``count`` races over fresh keys: how many had one winner, several, or none."""
    found = {"one": 0, "several": 0, "none": 0, "most": 0}
    for number in range(count):
        statuses = race(endpoint, f"/{bucket}/race/{number}", threads, size)
        winners = sum(times for status, times in statuses.items() if 200 <= status < 300)
        found["one" if winners == 1 else "several" if winners else "none"] += 1
        found["most"] = max(found["most"], winners)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=160, help="of each body; a claim has about 160")
    options = parser.parse_args()
    from faults.servers import MotoServer

    for how in ("as it comes", "hurried", "atomic"):
        with MotoServer(how=how) as server:
            bucket = server.make_bucket("raw")
            print(
                json.dumps(
                    {"moto": how, **races(server.endpoint, bucket, options.races, options.threads, options.bytes)}
                )
            )


if __name__ == "__main__":
    main()
