"""A small study from beginning to end in this process, stopped, continued, extended, and with its files damaged."""

from __future__ import annotations

import concurrent.futures.process
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import cli, config, pipeline, presets, store
from archipel.config import RunConfig
from archipel.errors import ArchipelError, Stopped
from archipel.evaluation.extractors import Judges, Measured
from archipel.islands.launch.local import Job
from archipel.partition.assignment import load_assignment
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.study import members, results, sampling, stage
from archipel.study.plan import PARTS, Plan, plan
from archipel.study.prompts import Prompts
from archipel.training import budget

pytestmark = pytest.mark.slow
NAMES = {"efficientnet-appearance": 6, "efficientnet-motion": 5, "transnet": 4}


def cheap(self: Judges, clips: np.ndarray, captions: Sequence[str] = ()) -> Measured:
    """Pooled pixels under the extractors' names: what networks would say is not looked at here."""
    floats = np.asarray(clips, np.float32).reshape(len(clips), -1)
    features = {
        name: np.stack([part.mean(1) for part in np.array_split(floats, width, axis=1)], 1)
        for name, width in NAMES.items()
    }
    return Measured(
        {name: values.astype(np.float32) for name, values in features.items()},
        {"flow": floats.mean(1).astype(np.float64)},
    )


def here(jobs: Sequence[Job], stop: StopFlag, **_: Any) -> None:
    """Jobs one after the other in this process: starting fifty processes is tested elsewhere."""
    for job in jobs:
        if stop:
            raise stop.error("training")
        if not job.run.done(job.run.expert(job.name)):
            pipeline.train(job.run, job.name, threads=1, stop=stop)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(members, "launch_jobs", here)
    monkeypatch.setattr(Judges, "measure", cheap)
    over = {
        "clips": {"count": 40},
        "expert": {"steps": 6, "batch": 4, "validate_every": 6, "checkpoint_every": 6},
        "router": {"steps": 4, "batch": 4, "validate_every": 4, "checkpoint_every": 4},
        "sample": {"steps": 2},
        "evaluate": {"count": 8},
    }
    values = presets.fit_rope(config.merge(presets.values("tiny"), over))
    return Run.create(tmp_path / "run", budget.resolve(config.build(values, "test")))


def few(config: RunConfig, seeds: int, parts: Sequence[str]) -> Plan:
    """A plan of what the headline needs and no more."""
    whole = plan(config, seeds, parts)
    arms = tuple(arm for arm in whole.arms if arm.name in ("top1", "monolith", "small-batch", "oracle"))
    return replace(whole, members=tuple(whole.member(name) for name in ("main", "small-batch")), arms=arms)


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.safetensors"))}


def test_a_study_from_nothing_to_its_page(prepared: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run, parts = prepared, ("table", "ablations")
    stopping = StopFlag()
    stopping.cancel("the test says so")
    with pytest.raises(Stopped):
        stage.study(run, seeds=1, parts=parts, stop=stopping, workers=1)
    assert not (run.root / "study" / "table.json").exists()

    done = stage.study(run, seeds=1, parts=parts, workers=1)
    rows = store.read_json(run.root / "study" / "table.json")
    about = store.read_json(run.root / "study" / "study.json")
    keys = {"arm", "metric", "value", "low", "high", "n", "groups", "seeds", "protocol"}
    assert all(keys <= set(row) for row in rows)
    arms = {row["arm"] for row in rows if row["set"] == "test"}
    wanted = {
        "real",
        "codec",
        "top1",
        "full",
        "threshold",
        "ancestral",
        "ancestral-top1",
        "full-t2",
        "full-uncalibrated",
    }
    wanted |= {
        "monolith",
        "small-batch",
        "short",
        "cluster",
        "wide-flops",
        "wide-samples",
        "monolith-kx",
        "random-shards",
    }
    wanted |= {"router-text", "router-latent", "oracle", "uniform", "expert-0", "random", "without-0", "alternate-0-1"}
    assert wanted <= arms
    assert {row["set"] for row in rows} == {"test", "train", "validation"}
    assert store.read_json(run.root / "study" / "baseline.json")["looks"] == [1]
    assert about["baseline"]["set"] == "validation" and about["baseline"]["chosen"] in ("monolith", "small-batch")
    primary = [one for one in about["comparisons"] if one["primary"] and one["set"] == "test"]
    assert primary[0]["arm"] == "top1" and "too few clips" in primary[0]["verdict"]
    costs = {arm["name"]: arm["costs"] for arm in about["arms"]}
    assert costs["top1"]["training_flops"] == pytest.approx(costs["monolith"]["training_flops"], rel=0.05)
    assert costs["top1"]["parameters"] > 2 * costs["monolith"]["parameters"] * 0.99
    assert costs["monolith-kx"]["evaluations"] == 2 * costs["monolith"]["evaluations"]
    assert {one["name"] for one in about["ablations"]} >= {
        "specialisation",
        "schedules",
        "missing",
        "mixed",
        "router",
        "agreement",
    }
    assert done.page.is_file() and "top-1" in done.page.read_text()

    # The run itself is the first seed of the main member, and knows nothing of the study's other runs.
    assert not (run.root / "study" / "runs" / "main-s0").exists()
    assert pipeline.verify(run)[1] == []

    before = contents(run.root)
    stage.study(run, seeds=1, parts=parts, workers=1)
    assert contents(run.root) == before  # nothing is made twice

    lost = sampling.sample_path(run, "test", 0, "oracle")
    whole = lost.read_bytes()
    lost.unlink()
    stage.study(run, seeds=1, parts=("table",), workers=1)
    after = contents(run.root)
    assert lost.read_bytes() == whole
    assert {path for path in before if after[path] != before[path]} == {str(lost)}

    toml = run.root / "study" / "runs" / "random-s0" / "run.toml"
    toml.write_text(toml.read_text().replace("lr = ", "lr = 9", 1))
    with pytest.raises(ArchipelError, match=r"random-s0 was made with other settings"):
        stage.study(run, seeds=1, parts=("table",), workers=1)


def test_a_second_seed_leaves_the_first_as_it_was(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared
    monkeypatch.setattr(stage, "plan", few)
    stage.study(run, seeds=1, parts=("table",), workers=1)
    before = contents(run.root)
    stage.study(run, seeds=2, parts=("table",), workers=1)
    after = contents(run.root)
    assert all(after[path] == moment for path, moment in before.items())
    assert store.read_json(run.root / "study" / "baseline.json")["looks"] == [1, 2]
    rows = store.read_json(run.root / "study" / "table.json")
    assert {row["seeds"] for row in rows if row["arm"] == "top1"} == {2}
    assert {row["seeds"] for row in rows if row["arm"] in ("real", "codec")} == {0}


@pytest.mark.system  # it starts processes and loads every network twice: half a minute that `make test` does not have
def test_processes_make_the_same_bytes(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in two processes and in this one: the judges are the real ones here, on very few clips."""
    monkeypatch.undo()
    monkeypatch.setattr(members, "launch_jobs", here)
    run = prepared
    opened = members.open_members(run, few(run.config, 1, ("table",)))
    with StopFlag() as stop:
        members.make(opened, stop)
        wanted = [
            task for task in sampling.tasks(opened, sampling.JudgeSpec()) if task.arm["name"] in ("top1", "cluster")
        ]
        sampling.deal(wanted, stop, "two processes", workers=2)
        found = {task.path: Path(task.path).read_bytes() for task in wanted}
        for task in wanted:
            Path(task.path).unlink()
        sampling.deal(wanted, stop, "here", workers=1)
    assert {task.path: Path(task.path).read_bytes() for task in wanted} == found


def test_mixed_captions_come_from_two_clusters(prepared: Run) -> None:
    pipeline.prepare(prepared)
    pipeline.partition(prepared)
    found = Prompts.of(prepared, "mixed")
    assert len(found.captions) >= 2 and len(found.parts) == len(found.captions)
    for caption, (subject, other) in zip(found.captions, found.parts, strict=True):
        assert caption.startswith(subject) and other.split()[-1] in caption and subject != other
    assert Prompts.of(prepared, "mixed").digest == found.digest


def without(run: Run, split: tuple[float, float, float]) -> Run:
    """The same run, with another split of its clips."""
    changed = run.config.model_copy(update={"clips": run.config.clips.model_copy(update={"split": split})})
    return Run.create(run.root.with_name("split"), changed)


@pytest.mark.parametrize(("split", "said"), [((0.8, 0.0, 0.2), "validation split"), ((0.8, 0.2, 0.0), "test split")])
def test_a_split_without_clips_is_told_before_anything_is_trained(
    prepared: Run, split: tuple[float, float, float], said: str
) -> None:
    run = without(prepared, split)
    with pytest.raises(ArchipelError, match=said):
        stage.study(run, seeds=1, parts=("table",), workers=1)
    assert not (run.root / "experts").exists() and not (run.root / "partition").exists()


def test_a_router_of_other_clusters_is_refused_before_anything_is_trained(
    prepared: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(run: Run) -> np.ndarray:
        found = load_assignment(run)
        return (found + 1) % 2 if run.root.name.startswith("router-text") else found

    monkeypatch.setattr(members, "load_assignment", elsewhere)
    with pytest.raises(ArchipelError, match=r"different clusters.*Remove .*router-text-s0"):
        stage.study(prepared, seeds=1, parts=("table",), workers=1)
    assert not (prepared.root / "experts").exists()


def test_what_is_killed_while_it_is_written_again_is_not_taken_for_made(
    prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, facts = tmp_path / "arm.safetensors", {"inputs": "one"}
    values = {"a": np.zeros((2, 3))}, {"b": np.zeros(2)}, np.zeros((2, 1, 4, 4, 3), np.uint8), None
    sampling.keep(path, *values, facts)
    assert store.read_json(path.with_suffix(".json")) == facts

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        sampling.keep(path, *values, {"inputs": "two"})
    assert not path.with_suffix(".json").exists()


def test_workers_that_end_with_a_stopped_study_are_no_lack_of_memory(prepared: Run) -> None:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_exception(concurrent.futures.process.BrokenProcessPool("gone"))
    task = sampling.Task("", {"name": "top1"}, 0, "test", "", "", sampling.JudgeSpec(), "", "")
    stopping = StopFlag()
    with pytest.raises(ArchipelError, match="memory runs out"):
        sampling._result(future, task, stopping)
    stopping.cancel("the test says so")
    with pytest.raises(Stopped):
        sampling._result(future, task, stopping)


def test_the_command_on_the_page_repeats_the_study(prepared: Run, tmp_path: Path) -> None:
    judges = sampling.JudgeSpec((f"i3d={tmp_path}/i3d.pt@sha256:{'a' * 64}",), True)
    assert stage.command(prepared, 3, PARTS, sampling.JudgeSpec()) == "archipel study run --seeds 3"
    said = stage.command(prepared, 3, ("table", "warm"), judges)
    assert said == "archipel study run --seeds 3 --only table,warm --judge i3d=i3d.pt --allow-torchscript"


def test_intervals_of_ablations_cover_seeds() -> None:
    draw, groups = np.random.default_rng(1), np.arange(40)
    values = draw.normal(size=(1, 40)) + np.array([[-1.0], [0.0], [1.0]])  # the same clips, seeds far apart
    found, alone = results.over_seeds(values, groups), results.over_seeds(values[:1], groups)
    assert found.high - found.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "seeds"),
        (["--only", "everything"], "everything"),
        (["--judge", "i3d=/nowhere/i3d.pt"], "i3d"),
        (["--judge", "fid=/nowhere"], "fid"),
    ],
)
def test_wrong_wishes_are_refused_before_any_work(
    prepared: Run, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", str(prepared.root), *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (prepared.root / "study").exists() and not prepared.clips.exists()
