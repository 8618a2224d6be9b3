"""One finished run, made through the shell as a newcomer would make it, for all tests that look at or continue one."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from archipel import cli

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ARCHIPEL_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="session")
def settings() -> list[str]:
    """Smaller than preset tiny: these tests are about the flow, not the clips."""
    return [
        "clips.count=48", "expert.steps=30", "expert.checkpoint_every=5", "expert.validate_every=15",
        "router.steps=20", "router.checkpoint_every=5", "sample.steps=3", "evaluate.count=8", "evaluate.showcase=2",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def archipel(environment: dict[str, str]) -> Shell:
    """``archipel(*arguments, **for subprocess.run)``: the command in a process of its own."""

    def call(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "archipel.cli", *map(str, arguments)]
        given: dict = {
            "capture_output": True,
            "text": True,
            "timeout": 280,
            "check": False,
            "env": environment,
        } | options
        return subprocess.run(command, **given)

    return call


@pytest.fixture(scope="session")
def inside() -> Callable[..., tuple[int, str]]:
    """``inside(*arguments) -> (exit code, what was said)``: the command in this process, where imports are paid once."""

    def call(*arguments: object) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert "Traceback" not in said.getvalue() and "internal error" not in said.getvalue(), said.getvalue()
        return int(ended.value.code or 0), said.getvalue()

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, archipel: Shell, settings: list[str]) -> Path:
    """A finished run in a folder with a name that trips careless code. Tests that change it work on a copy."""
    root = tmp_path_factory.mktemp("e2e") / "île d'été [/b] ☂" / "my run"
    made = archipel(
        "init", root, "--source", "shapes", "--preset", "tiny", *(f"--set={setting}" for setting in settings)
    )
    assert made.returncode == 0, made.stderr
    done = archipel("run", root, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "report" in done.stderr and "Traceback" not in done.stderr
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run in another place."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    return folder
