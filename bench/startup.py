"""How long until the command line answers: ``archipel --help`` and ``import archipel``, each in a fresh process.

    python -m bench.startup [--small] [--out FILE]

Every process is run from start to end, in turns; its CPU seconds are counted as well. Beside them, what no Python program with
such a command line can be faster than: an interpreter that does nothing, and one that imports typer and rich.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from bench import common

WHAT = "a fresh process until it has answered"
GOALS = {"archipel --help": 0.4, "import archipel": 1.0}
COMMANDS = {
    "archipel --help": ["-m", "archipel.cli", "--help"],
    "import archipel": ["-c", "import archipel"],
    "archipel --version": ["-m", "archipel.cli", "--version"],
    "from archipel import Archipelago": ["-c", "from archipel import Archipelago"],
    "an empty interpreter": ["-c", "pass"],
    "import typer and rich": ["-c", "import typer, rich.console, rich.progress"],
    "import torch": ["-c", "import torch"],
}
HEAVY = ("torch", "diffusers", "transformers", "numpy")


def loaded(words: list[str]) -> set[str]:
    """Heavy packages that such a process has imported. Raises DifferentError where --help does not help."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if "--help" in words and "generate" not in done.stdout:
        raise common.DifferentError("archipel --help does not name its commands")
    return {name for line in done.stderr.splitlines() if (name := line.rpartition("|")[2].strip()) in HEAVY}


def run(small: bool = False) -> dict[str, Any]:
    rounds = 1 if small else 9
    commands = {name: words for name, words in COMMANDS.items() if not small or name in GOALS}
    with common.Benchmark("startup", WHAT, ("typer", "rich")) as b:
        for name in GOALS:
            b.facts[f"heavy packages imported by {name}"] = ", ".join(sorted(loaded(COMMANDS[name]))) or "none"
        taken = {name: common.Seconds() for name in commands}
        for number in range(rounds + 1):
            for name, words in commands.items():
                common.spend([sys.executable, *words], taken[name] if number else None)
        b.rows += [common.within(name, limit, taken[name]) for name, limit in GOALS.items()]
        b.tables["least of the rounds"] = [
            {"process": name, "wall, s": round(min(one.wall), 3), "CPU, s": round(min(one.cpu), 3)}
            for name, one in taken.items()
        ]
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
