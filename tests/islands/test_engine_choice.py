"""--engine and --store: what is refused, what an engine is asked to do, and by which rules results come back."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from archipel import cli, pipeline, store
from archipel.errors import ArchipelError, Stopped
from archipel.islands.launch import engine
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that looks partitioned; two experts."""
    made = pipeline.init(tmp_path / "run", source="shapes", preset="tiny")
    store.write_card(made.shard(MONOLITH), "shard", made.id, [])
    return made


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_an_engine_that_is_not_known_is_refused_before_any_work(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there are local, ray, slurm, sky" in said(capsys, "run", run.root, "--engine", "kubernetes")
    assert not run.clips.exists()


def test_a_store_without_an_engine_that_uses_it_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--store is for the engines" in said(capsys, "run", run.root, "--store", "s3://bucket/run")


def test_ray_that_is_not_installed_is_named_before_any_work(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("ray"):
        monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'archipel[ray]'" in said(capsys, "run", run.root, "--engine", "ray")
    assert not run.clips.exists()


class Noting:
    """An engine that writes down what it is asked."""

    items = tasks = device = None

    def __init__(self, *given: Any) -> None:
        self.given, self.asked = given, []

    def train(self, names: list[str], stop: StopFlag) -> None:
        self.asked.append(names)
        raise Stopped("enough")

    def __enter__(self) -> Noting:
        self.asked.append("entered")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.asked.append("left")


def test_an_engine_is_asked_for_the_jobs_that_are_missing_and_always_left(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Noting()
    monkeypatch.setattr(engine, "open_engine", lambda *_, **__: made)
    for stage in ("prepare", "partition"):
        monkeypatch.setattr(pipeline, stage, lambda *_, **__: None)
    store.write_card(run.expert("0"), "expert", run.id, [])
    with pytest.raises(Stopped, match="enough"):
        pipeline.run_all(run, engine="ray")
    assert made.asked == ["entered", ["1", "monolith", "router"], "left"]


def test_results_of_ones_own_machines_come_back_by_ones_own_rules(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    rules: list[str] = []

    def call(what: str, *arguments: object) -> str:
        calls.append([str(argument) for argument in arguments])
        rules.append(Path(calls[-1][calls[-1].index("--trust") + 1]).read_text())
        return "expert 1 was refused (finite): layer 3 holds NaN\n"

    monkeypatch.setattr(engine, "_call", call)
    for name in (name for name in run.job_names if name != "1"):
        store.write_card(run.expert(name), "expert", run.id, [])
    with pytest.raises(ArchipelError, match=r"jobs 1 were not brought back .* \(finite\): layer 3 holds NaN"):
        engine.collect(run, "s3://bucket/run")
    assert calls[0][:5] == ["pull", "s3://bucket/run", str(run.root), "--run-id", run.id] and "--admit" in calls[0]
    from archipel.islands import trust

    (run.root / "mine.toml").write_text(rules[0])
    assert not trust.read(run.root / "mine.toml").loss.required and trust.Trust().loss.required
    store.write_card(run.expert("1"), "expert", run.id, [])
    (run.root / "trust.toml").write_text("[loss]\nbar = 0.5\n")
    engine.collect(run, "s3://bucket/run")
    assert rules[1] == "[loss]\nbar = 0.5\n"


def test_the_default_store_is_a_folder_of_the_run_whatever_its_name(tmp_path: Path) -> None:
    made = pipeline.init(tmp_path / "île d'été 100%", source="shapes", preset="tiny")
    from archipel.islands.objects import Objects

    objects = Objects.open(engine.default_store(made), make=True)
    assert objects.create("a", b"b") and (made.root / "store" / "a").read_bytes() == b"b"
