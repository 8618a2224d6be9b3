"""Run folders as small as the pages' facts need them: a run.toml, and what a test writes beside it."""

from __future__ import annotations

from pathlib import Path

from archipel import config as configuration
from archipel.run import Run


def make(root: Path, k: int = 2) -> Run:
    steps = {"expert": {"steps": 40}, "monolith": {"steps": 80}, "router": {"steps": 20}}
    return Run.create(root, configuration.build({"partition": {"k": k}, **steps}))
