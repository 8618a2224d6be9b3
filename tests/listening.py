"""A command that listens, in a process of its own on a port that was free."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path


class Listening:
    """``archipel serve`` or ``studio``, once it has said where. ``said``: its lines; ``state``: for whom starts it."""

    state: Path

    def __init__(self, verb: str, where: str | Path, *options: str, key: str = "") -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ARCHIPEL_API_KEY": key}
        command = [sys.executable, "-m", "archipel.cli", verb, str(where), "--port", "0", *options]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.key = key
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"listening on (http://[^\s/]+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.said))
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr or []), daemon=True)
        self._reader.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
