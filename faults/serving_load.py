"""Many clients at once on one `archipel serve` with a tiny model, killed now and then.

    python -m faults.serving_load [--clients 200] [--clips 5] [--kills 2] [--seconds 300]

Every client asks for its clips (again after 429, a lost connection or a lost answer, always under the same Idempotency-Key),
follows them and downloads them. Prints one JSON object: jobs lost, doubled and failed, seconds of status calls, memory.
Ends with 1 where a job was lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import re
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

KEY = secrets.token_hex(16)


class Server:
    """The command, on one port and one state, through all its lives."""

    def __init__(self, root: Path, state: Path, queue: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        options = ["--port", str(self.port), "--state", str(state), "--queue", str(queue)]
        self.command = [sys.executable, "-m", "archipel.cli", "serve", str(root), *options]
        self.lives = 0

    def start(self) -> None:
        self.lives += 1
        env = {**os.environ, "ARCHIPEL_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self.command, env=env, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "listening" in line:
                return
        raise SystemExit("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def memory(self) -> float:
        """Resident MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        return int(found[1]) / 1e3 if found else 0.0


def look(port: int, key: str, name: str, end: Any, heard: Any) -> None:
    """A process of its own that asks for one clip's status twenty times a second: what one more client would meet."""
    times = []
    while not end.is_set():
        begin = time.perf_counter()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", f"/v1/videos/{name}", headers={"Authorization": f"Bearer {key}"})
            if connection.getresponse().read():
                times.append(time.perf_counter() - begin)
            connection.close()
        except (OSError, http.client.HTTPException):
            pass  # between two lives of the server
        time.sleep(0.05)
    heard.send(times)


class Crowd:
    """What clients met."""

    def __init__(self, url: str, clients: int, clips: int) -> None:
        self.url, self.clients, self.clips = url, clients, clips
        self.answers: dict[str, int] = {}
        self.videos: dict[str, str] = {}  # id -> the last status
        self.downloads = 0

    async def _call(self, client: httpx.AsyncClient, method: str, path: str, **given: Any) -> httpx.Response:
        while True:
            try:
                answer = await client.request(method, self.url + path, **given)
            except httpx.HTTPError as error:
                name = type(error).__name__
                self.answers[name] = self.answers.get(name, 0) + 1
                await asyncio.sleep(0.5 + random.random())
                continue
            self.answers[str(answer.status_code)] = self.answers.get(str(answer.status_code), 0) + 1
            if answer.status_code in (429, 503):
                await asyncio.sleep(min(float(answer.headers.get("retry-after", 1)), 2.0) * (0.5 + random.random()))
                continue
            return answer

    async def all(self) -> None:
        limits = httpx.Limits(max_connections=self.clients, max_keepalive_connections=self.clients)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(headers=headers, timeout=60, limits=limits) as client:
            await asyncio.gather(*(self.one(client, number) for number in range(self.clients)))

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        names = []
        for clip in range(self.clips):
            given = {
                "json": {"prompt": f"client {number}", "seed": clip},
                "headers": {"Idempotency-Key": f"{number}.{clip}"},
            }
            answer = await self._call(client, "POST", "/v1/videos", **given)
            answer.raise_for_status()
            names.append(answer.json()["id"])
        for name in names:
            while True:
                answer = await self._call(client, "GET", f"/v1/videos/{name}")
                self.videos[name] = answer.json().get("status", str(answer.status_code))
                if self.videos[name] not in ("queued", "in_progress"):
                    break
                await asyncio.sleep(0.5 + random.random())
            if self.videos[name] == "completed":
                answer = await self._call(client, "GET", f"/v1/videos/{name}/content")
                self.downloads += answer.status_code == 200 and b"ftyp" in answer.content[:12]


async def load(server: Server, crowd: Crowd, kills: int, seconds: float) -> list[float]:
    """Resident MB once a second, until every client has its clips."""
    everyone = asyncio.create_task(crowd.all())
    memory, begin, done = [], time.monotonic(), 0
    while not everyone.done() and time.monotonic() - begin < seconds:
        await asyncio.wait([everyone], timeout=1)
        memory.append(server.memory())
        if (
            done < kills
            and len(crowd.videos)
            and crowd.downloads >= (done + 1) * crowd.clients * crowd.clips // (kills + 1)
        ):
            done += 1
            server.kill()
            await asyncio.to_thread(server.start)
            memory.clear()  # of a new process
    everyone.cancel() if not everyone.done() else everyone.result()
    return memory


def main() -> None:
    from bench.common import commit, load_beyond_ours, machine
    from tests.ensemble.conftest import build

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--clips", type=int, default=5)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--queue", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=300)
    asked = parser.parse_args()
    busy = load_beyond_ours()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        server = Server(build(Path(folder) / "run").root, state, asked.queue)
        server.start()
        crowd = Crowd(f"http://127.0.0.1:{server.port}", asked.clients, asked.clips)
        given = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 60}
        name = httpx.post(f"{crowd.url}/v1/videos", json={"prompt": "looked at"}, **given).json()["id"]
        spawn = multiprocessing.get_context("spawn")
        end, (told, heard) = spawn.Event(), spawn.Pipe(duplex=False)
        looker = spawn.Process(target=look, args=(server.port, KEY, name, end, heard))
        looker.start()
        begin = time.monotonic()
        try:
            memory = asyncio.run(load(server, crowd, asked.kills, asked.seconds))
            seconds = time.monotonic() - begin
            end.set()
            calls = sorted(told.recv())
            httpx.delete(f"{crowd.url}/v1/videos/{name}", **given)
            pages, after = 0, ""
            while True:
                page = httpx.get(f"{crowd.url}/v1/videos?limit=100{after}", **given).json()
                pages += len(page["data"])
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
        finally:
            end.set()
            server.kill()
        files = len(list((state / "clips").glob("*.mp4")))
    wanted = asked.clients * asked.clips
    found = {
        "clients": asked.clients,
        "clips asked for": wanted,
        "kills -9": server.lives - 1,
        "clips downloaded": crowd.downloads,
        "failed": sum(status == "failed" for status in crowd.videos.values()),
        "lost": wanted - len(crowd.videos),
        "doubled": max(0, pages - wanted) + max(0, files - wanted),
        "answers": dict(sorted(crowd.answers.items())),
        "seconds": round(seconds, 1),
        "status calls": len(calls),
        "status p50 ms": round(1e3 * statistics.median(calls), 1),
        "status largest ms": round(1e3 * calls[-1], 1),
        "status p99 ms": round(1e3 * calls[int(0.99 * (len(calls) - 1))], 1),
        "resident MB": {"first": memory[0], "largest": max(memory), "last": memory[-1]} if memory else {},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "load beyond ours before": round(busy, 2),
        "machine": machine(("torch", "fastapi", "uvicorn")),
    }
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["lost"] or found["doubled"] or crowd.downloads != wanted else 0)


if __name__ == "__main__":
    main()
