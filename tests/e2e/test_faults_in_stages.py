"""Killed, interrupted, out of disk, write-protected, at moments drawn at random: the run ends up with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# One process imports everything heavy, and forks a child for each attempt, which calls the command line.
DRIVER = """
import contextlib, errno, io, json, os, random, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import archipel.encoders.codecs, archipel.encoders.features, archipel.encoders.text, archipel.ensemble.stage
import archipel.evaluation.stage, archipel.partition.stage, archipel.prepare, archipel.routing.stage
import sklearn.cluster, transformers, pyarrow.parquet, diffusers.models.transformers.transformer_flux
from archipel import cli

whole, root, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))

def in_write(number, after, act):
    '''Do ``act`` at the ``number``-th rename of a finished file, before or after it.'''
    replace, count = Path.replace, 0
    def counted(self, target):
        nonlocal count
        count += 1
        if count == number and not after:
            act()
        made = replace(self, target)
        if count == number and after:
            act()
        return made
    Path.replace = counted

def failing(code):
    def act():
        raise OSError(code, os.strerror(code))
    return act

def fault(kind):
    number, after = chance.randint(1, 6), chance.random() < 0.5
    if kind == "kill at a write":
        in_write(number, after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif kind == "kill at a time":
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.01, 0.8))
    elif kind == "interrupt":
        in_write(number, after, lambda: os.kill(os.getpid(), signal.SIGINT))
    elif kind == "full disk":
        in_write(number, False, failing(errno.ENOSPC))
    elif kind == "read-only":
        in_write(number, False, failing(errno.EROFS))

def attempt(kind, *words):
    draw = chance.random()
    heard = root.parent / "heard"
    child = os.fork()
    if child == 0:
        chance.seed(draw)
        out = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        fault(kind)
        code = 99
        try:
            cli.main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"kind": kind, "stage": words[0], "code": code, "said": heard.read_text(errors="replace")}))
    return code

settings = ["--source", "shapes", "--preset", "tiny"] + ["--set=" + pair for pair in sys.argv[4:]]
attempt("kill at a write", "init", root, *settings)
if not (root / "run.toml").exists():
    attempt("", "init", root, *settings)
stages = {
    "prepare": ["full disk", "kill at a write", "read-only", "kill at a time", "interrupt", "kill at a write"],
    "partition": ["kill at a write", "full disk"],
    "train": [],
    "route": ["kill at a write"],
    "generate": ["interrupt", "full disk", "kill at a write", "kill at a time"],
    "evaluate": ["kill at a write", "read-only"],
}
for stage, faults in stages.items():
    if stage == "train":  # has a test of its own
        shutil.copytree(whole / "experts", root / "experts")
        shutil.copytree(whole / "router", root / "router", ignore=shutil.ignore_patterns("calibration.json", "quality.json"))
        continue
    words = [stage, root, *(["--arms"] if stage == "generate" else [])]
    for kind in faults:
        if attempt(kind, *words) == 0:
            break
    else:
        attempt("", *words)
"""
VOLATILE = {"logs", ".locks", "experts", "router", "report", "ledger.json"}
HARMLESS = {"partial.json", "partial.jsonl"}  # killed between the card and the removal of the lists that it replaces


def test_faults_in_every_stage_leave_the_same_run(
    finished: Path, settings: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(finished), str(tmp_path / "run"), "11", *settings],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = {"kill at a write", "kill at a time", "full disk", "interrupt", "read-only"}
    assert {one["kind"] for one in attempts if one["code"] != 0} == kinds
    for one in attempts:
        expected = {"kill at a write": -9, "kill at a time": -14, "full disk": 2, "interrupt": 130, "read-only": 2}
        assert one["code"] in (0, expected.get(one["kind"], 0)), one
        assert "Traceback" not in one["said"] and "internal error" not in one["said"], one
        if one["code"] == 2:
            said = one["said"].splitlines()[-1]
            assert ("disk is full" if one["kind"] == "full disk" else "read-only") in said, one
            assert str(tmp_path / "run") in said, one
        if one["code"] == 130:
            assert "is kept" in one["said"], one
    last = {one["stage"]: one["code"] for one in attempts}
    assert last == dict.fromkeys(["init", "prepare", "partition", "route", "generate", "evaluate"], 0)
    assert contents(tmp_path / "run") == contents(finished)


def contents(root: Path) -> dict[str, bytes]:
    """What decides results, by path: all but logs, locks and measured seconds."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and name.parts[0] not in VOLATILE and name.name not in HARMLESS and path.suffix != ".lock":
            data = path.read_bytes()
            if name.name.endswith(".extra.json"):
                data = json.dumps({k: v for k, v in json.loads(data).items() if k != "seconds"}).encode()
            found[str(name)] = data
    return found
