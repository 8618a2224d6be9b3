"""Training processes that are killed at random moments, and start again, end with the very same bytes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from archipel import store

# One process imports torch and diffusers, and forks a child for each attempt: real processes without ten seconds of
# imports each. A child is ended when its journal has passed a step drawn at random, give or take a moment.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from archipel import store
from archipel.errors import Stopped
from archipel.run import Run
from archipel.training.stage import train

def attempt(root):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(Run.open(root), "0", threads=1)
        status = 0
    except Stopped as error:
        status = 130 if error.interrupted else 3
    finally:
        os._exit(status)

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

whole, broken, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
signals = [getattr(signal, name) for name in sys.argv[4:]]
assert wait(attempt(whole)) == 0
chance = random.Random(5)
journal = Path(broken) / "experts" / "0" / "metrics.jsonl"
for number, step in zip(signals, sorted(chance.sample(range(1, steps * 3 // 4), len(signals)))):
    child = attempt(broken)
    while max((line["step"] for line in store.read_jsonl(journal)), default=0) < step:
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "it ended by itself"
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, number)
    status = wait(child)
    assert status == (-number if number == signal.SIGKILL else 130), (number, status)
assert wait(attempt(broken)) == 0
"""
STEPS = 60


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bits(tmp_path: Path) -> None:
    make_run = runpy.run_path(str(Path(__file__).parents[1] / "training" / "runs.py"))["make_run"]
    sections = {"expert": {"steps": STEPS, "checkpoint_every": 6, "validate_every": 30, "warmup": 5}}
    runs = [make_run(tmp_path / name, **sections) for name in ("whole", "broken")]
    assert runs[0].id == runs[1].id
    signals = ["SIGKILL", "SIGTERM", "SIGKILL", "SIGINT", "SIGKILL"]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, *(str(run.root) for run in runs), str(STEPS), *signals],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    whole, broken = (run.expert("0") for run in runs)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    last = f"checkpoints/{STEPS:08d}/state.safetensors"
    assert (whole / last).read_bytes() == (broken / last).read_bytes()
    cards = [store.read_card(folder) or {} for folder in (whole, broken)]
    # One that is ended before it takes up the training has resumed nothing.
    assert cards[0]["resumed"] == 0 and 2 <= cards[1]["resumed"] <= len(signals)
    assert cards[0]["validation"] == cards[1]["validation"]
    lines = [store.read_jsonl(folder / "metrics.jsonl") for folder in (whole, broken)]
    steps = [line["step"] for line in lines[1]]
    assert steps == sorted(set(steps)) and steps[-1] == lines[0][-1]["step"] == STEPS
