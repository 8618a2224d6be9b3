"""A process that has imported all that an island needs, and forks islands: a start without seconds of imports.

    python -m faults.zygote

Reads lines of JSON {"number", "arguments", "environment", "log"}; answers {"pid"}: a process that runs `archipel
ARGUMENTS` in a session of its own, with its words in LOG. A child that ended is told as {"ended": number, "code"} (as
subprocess counts): by its number, since a system gives the pids of the dead to others.
Nothing that holds threads or connections is opened before the fork.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
from typing import Any


def child(order: dict[str, Any]) -> None:
    """In the new process: become the command."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(order["environment"])
    from archipel import cli

    code: Any = 1
    try:
        cli.main(order["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main() -> None:
    import diffusers.models.transformers.transformer_flux
    import obstore.store
    import torch

    import archipel.islands.worker
    import archipel.routing.stage
    import archipel.training.stage
    from archipel import cli

    assert diffusers and obstore and archipel and cli
    torch.set_num_threads(1)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    living: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(reader, selectors.EVENT_READ)
    say(ready=True)
    rest = b""
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if reader in ready:
            os.read(reader, 4096)
            for pid in list(living):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    say(ended=living.pop(pid), code=os.waitstatus_to_exitcode(status))
        if 0 in ready:
            got = os.read(0, 1 << 16)
            if not got:
                break
            *lines, rest = (rest + got).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    child(order)
                living[pid] = order["number"]
                say(pid=pid)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
