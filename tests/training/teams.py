"""Run as a script: trains jobs by processes that share one import of torch, and says what came of them, as JSON lines.

Each line of standard input is a request: {"run", "name", "size", "local": {...}, "stop_at": {rank: step}, "kill_at": ...}.
``stop_at`` sends the rank SIGTERM once the first process has told that step, ``kill_at`` SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - as the next line: imported once here, and not by every process
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel  # noqa: F401

from archipel import store
from archipel.edge import message
from archipel.routing.stage import train_router
from archipel.run import Run
from archipel.training.local import Local
from archipel.training.ranks import launched
from archipel.training.stage import train


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def process(request: dict[str, Any], rank: int, port: int, words: Path) -> int:
    """One forked process of a team: its exit code is what the command line's would be."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        size = request["size"]
        if size > 1:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "MASTER_PORT": str(port),
            }
            os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        assert launched() == (rank, size)
        out = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 2)
        os.dup2(out, 1)
        run, name = Run.open(request["run"]), request["name"]
        local = Local(**{"device": "cpu", "threads": 1, **request.get("local", {})})
        (train_router(run, local=local) if name == "router" else train(run, name, local=local))
        code = 0
    except BaseException as error:
        text, code = message(error)
        if text:
            print(text, file=sys.stderr)
        if code == 1:
            import traceback

            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["run"]) / "experts" / request["name"]
    port, size = free_port(), request["size"]
    words = [Path(request["run"]) / f"words-{time.monotonic_ns()}-{rank}" for rank in range(size)]
    children = [process(request, rank, port, words[rank]) for rank in range(size)]
    for key, number in (("stop_at", signal.SIGTERM), ("kill_at", signal.SIGKILL)):
        for rank, step in request.get(key, {}).items():
            while max((line["step"] for line in store.read_jsonl(folder / "metrics.jsonl")), default=0) < step:
                time.sleep(0.005)
            os.kill(children[int(rank)], number)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [path.read_text() if path.exists() else "" for path in words]
    for path in words:
        path.unlink(missing_ok=True)
    return {"codes": codes, "said": said}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
