"""pull: admitted results come home as they were committed; nothing else does; again and after a kill it only continues."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import cli, pipeline, store
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError, DamagedError, LockedError, Stopped
from archipel.islands import keys
from archipel.islands.pull import pull
from archipel.progress import StopFlag
from archipel.run import MONOLITH, ROUTER, Run

_HARBOURS = runpy.run_path(str(Path(__file__).parent / "harbours.py"))
harbours, harbour, letters, train_by_hand = (
    _HARBOURS[name] for name in ("harbours", "harbour", "letters", "train_by_hand")
)
ALL = ["0", "1", "2", MONOLITH, ROUTER]


def brought(harbour: Any, root: Path, **more: Any) -> Any:
    with StopFlag() as stop:
        return pull(harbour.url, root, stop, **more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def owner_without_experts(harbour: Any, to: Path) -> Run:
    """The owner's folder as it is while islands train: prepared, partitioned, published, nothing trained."""
    shutil.copytree(harbour.run.root, to)
    shutil.rmtree(to / "experts")
    shutil.rmtree(to / "router")
    return Run.open(to)


def test_admitted_results_come_into_the_owner_s_folder_as_they_were_committed(
    harbour: Any, letters: Any, tmp_path: Path
) -> None:
    harbour.commit(*ALL)
    harbour.admit("0", "2", MONOLITH, ROUTER)
    run = owner_without_experts(harbour, tmp_path / "own")
    done = brought(harbour, run.root, run_id=run.id[:12])
    assert (done.brought, done.kept, done.waiting, done.open) == (["0", "2", MONOLITH, ROUTER], [], ["1"], [])
    for name in done.brought:
        assert files_of(run.expert(name)) == files_of(harbour.run.expert(name))
    assert not run.expert("1").exists() and not (run.root / ".pull").exists()
    assert pipeline.verify(run)[1] == []
    model, whole = Archipelago.load(run.root), Archipelago.load(harbour.run.root)
    model.parts.text = whole.parts.text = letters
    made = model.generate(["rain"], strategy="expert-2", seeds=1)
    assert np.array_equal(made.clips, whole.generate(["rain"], strategy="expert-2", seeds=1).clips)
    states = {job["name"]: job["state"] for job in pipeline.status(run)["jobs"]}
    assert states == {"0": "done", "1": "free", "2": "done", MONOLITH: "done", ROUTER: "done"}


def test_a_new_folder_gets_configuration_codec_and_shards(harbour: Any, letters: Any, tmp_path: Path) -> None:
    harbour.commit("0", "1", "2", ROUTER)
    harbour.admit("0", "1", "2", ROUTER)
    run = brought(harbour, tmp_path / "new").run
    assert (run.root / "run.toml").read_bytes() == (harbour.run.root / "run.toml").read_bytes()
    for folder in ("codec", "shards/0", "shards/2", "shards/all"):
        assert files_of(run.root / folder) == files_of(harbour.run.root / folder)
    model = Archipelago.load(run.root)
    model.parts.text = letters
    made = model.generate(["rain"], strategy="full")
    assert made.warnings == [] and made.weights is not None


def test_again_it_brings_only_what_is_new(harbour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archipel.islands.objects import Objects

    harbour.commit("0", "1")
    harbour.admit("0")
    brought(harbour, tmp_path / "new")
    fetched: list[str] = []
    real = Objects.fetch
    monkeypatch.setattr(Objects, "fetch", lambda self, key, *a, **k: (fetched.append(key), real(self, key, *a, **k))[1])
    done = brought(harbour, tmp_path / "new")
    assert (done.brought, done.kept, done.waiting, done.open) == ([], ["0"], ["1"], ["2", MONOLITH, ROUTER])
    assert fetched == []
    harbour.admit("1")
    assert brought(harbour, tmp_path / "new").brought == ["1"]
    sha256 = store.sha256_file(harbour.run.expert("1") / "card.json")
    wanted = {keys.admitted(sha256, "config.json"), keys.admitted(sha256, "model.safetensors")}
    assert set(fetched) == wanted | {"jobs/1/00000001/result/metrics.jsonl"}


@pytest.mark.parametrize("at", range(1, 27, 3))
def test_killed_at_any_moment_it_continues(
    harbour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped dead before the n-th file is fetched or moved; what is there then never passes for finished."""
    harbour.commit("0", ROUTER)
    brought(harbour, tmp_path / "new")
    harbour.admit("0", ROUTER)
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*a: Any, **k: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            return real(*a, **k)

        return call

    with monkeypatch.context() as patch:
        from archipel.islands.objects import Objects

        patch.setattr(Objects, "fetch", counted(Objects.fetch))
        patch.setattr(Path, "replace", counted(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            brought(harbour, tmp_path / "new")
    run = Run.open(tmp_path / "new")
    for name in ("0", ROUTER):
        assert not run.done(run.expert(name)) or store.check_card(run.expert(name)) == []
    run = brought(harbour, tmp_path / "new").run
    for name in ("0", ROUTER):
        assert files_of(run.expert(name)) == files_of(harbour.run.expert(name))
    assert pipeline.verify(run)[1] == []


def test_a_folder_of_another_run_or_of_other_shards_is_refused(harbour: Any, tmp_path: Path) -> None:
    from archipel import config as configuration

    harbour.commit("0")
    harbour.admit("0")
    other = Run.create(tmp_path / "other", configuration.build({"partition": {"k": 2}}))
    with pytest.raises(ArchipelError, match="holds run"):
        brought(harbour, other.root)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ArchipelError, match="not empty"):
        brought(harbour, tmp_path / "full")
    with pytest.raises(ArchipelError, match="is a file"):
        brought(harbour, tmp_path / "full" / "thesis.txt")
    with pytest.raises(ArchipelError, match="holds run"):
        brought(harbour, tmp_path / "new", run_id="0" * 16)
    assert not (tmp_path / "new").exists()
    run = owner_without_experts(harbour, tmp_path / "own")
    store.write_tensors(run.shard("1") / "train.safetensors", {"row": np.arange(7)})
    store.write_card(run.shard("1"), "shard", run.id, ["train.safetensors", "validation.safetensors"])
    with pytest.raises(ArchipelError, match=r"shards/1 is not the one that was published"):
        brought(harbour, run.root)


def test_an_expert_of_one_s_own_is_kept_and_a_job_in_training_is_not_disturbed(
    harbour: Any, tmp_path: Path, train_by_hand: Callable[[Run, str, int], None]
) -> None:
    harbour.commit("0", "1")
    harbour.admit("0", "1")
    run = owner_without_experts(harbour, tmp_path / "own")
    train_by_hand(run, "0", 99)
    own = files_of(run.expert("0"))
    done = brought(harbour, run.root)
    assert done.kept == ["0"] and done.brought == ["1"] and files_of(run.expert("0")) == own
    assert any("expert 0" in note and "another one than the admitted" in note for note in done.notes)
    shutil.rmtree(run.expert("1"))
    with (
        store.lock(run.root / ".locks" / "train-1.lock", "expert 1"),
        pytest.raises(LockedError, match="expert 1"),
    ):
        brought(harbour, run.root)
    assert not run.expert("1").exists()
    assert brought(harbour, run.root).brought == ["1"]


def test_a_damaged_expert_is_brought_again(harbour: Any, tmp_path: Path) -> None:
    harbour.commit("0")
    harbour.admit("0")
    run = brought(harbour, tmp_path / "new").run
    for file in ("model.safetensors", "metrics.jsonl"):
        (run.expert("0") / file).write_bytes(b"torn")
        assert brought(harbour, run.root).brought == ["0"]
        assert files_of(run.expert("0")) == files_of(harbour.run.expert("0"))


@pytest.mark.parametrize("which", ["model", "metrics", "shard"])
def test_damage_in_the_bucket_is_named_and_nothing_is_half_there(harbour: Any, tmp_path: Path, which: str) -> None:
    harbour.commit("0")
    harbour.admit("0")
    sha256 = store.sha256_file(harbour.run.expert("0") / "card.json")
    key = {
        "model": keys.admitted(sha256, "model.safetensors"),
        "metrics": "jobs/0/00000001/result/metrics.jsonl",
        "shard": "shards/1/train.safetensors",
    }[which]
    path = harbour.root / key
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError, match=key):
        brought(harbour, tmp_path / "new")
    run = Run.open(tmp_path / "new")
    assert not (run.expert("0") / "card.json").exists()
    path.write_bytes(data)
    assert brought(harbour, run.root).brought == ["0"]


def test_with_admit_every_committed_job_is_asked_about_first(harbour: Any, tmp_path: Path) -> None:
    harbour.commit("0", "1", "2")
    harbour.admit("0")
    asked: list[str] = []

    def door(name: str) -> dict[str, Any]:
        asked.append(name)
        if name == "2":
            return {"admitted": False, "rule": "loss", "detail": "no better than silence"}
        harbour.admit(name)
        return {"admitted": True, "rule": None, "detail": ""}

    done = brought(harbour, tmp_path / "new", admit=door)
    assert asked == ["1", "2"] and done.brought == ["0", "1"] and done.waiting == ["2"]
    assert done.notes == ["expert 2 was refused (loss): no better than silence"]


def test_the_folders_own_trust_counts_when_pull_admits(
    harbour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    harbour.commit("0")
    own, given, asked = tmp_path / "new" / "trust.toml", tmp_path / "other.toml", []
    brought(harbour, own.parent)
    own.write_text("[loss]\nbar = 0.9\n")

    def admit(url: str, name: str, *, trust: Path | None, **_: Any) -> Any:
        asked.append(trust)
        return SimpleNamespace(as_dict=lambda: {"admitted": False, "rule": "loss", "detail": ""})

    monkeypatch.setattr("archipel.islands.admission.admit", admit)
    for more in ([], ["--trust", str(given)]):
        with pytest.raises(SystemExit):
            cli.main(["pull", harbour.url, str(own.parent), "--admit", *more])
    assert asked == [own, given]


def test_it_stops_where_it_is_asked_to(harbour: Any, tmp_path: Path) -> None:
    with StopFlag() as stop:
        stop.limit(1e-9)
        with pytest.raises(Stopped):
            pull(harbour.url, tmp_path / "new", stop)


def test_pull_in_the_shell(harbour: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        text = "".join(capsys.readouterr())
        assert "Traceback" not in text and "internal error" not in text, text
        return int(ended.value.code or 0), text

    harbour.commit("0", "1")
    harbour.admit("0")
    code, text = said("pull", harbour.url, tmp_path / "new", "--run-id", harbour.run.id[:12])
    assert code == 0 and "brought: 0" in text and "not done yet: 2, monolith, router" in text
    assert "committed but not admitted, and left: 1" in text and f"archipel admit {harbour.url} 1" in text
    assert json.loads((tmp_path / "new" / "experts" / "0" / "card.json").read_text())["run"] == harbour.run.id
    code, text = said("pull", harbour.url, tmp_path / "new")
    assert code == 0 and "there already: 0" in text
    code, text = said("pull", harbour.url, tmp_path / "new", "--admit")  # random weights: the bar is not reached
    assert code == 0 and "expert 1 was refused" in text and "left: 1" in text
    code, text = said("pull", tmp_path / "new", harbour.url)
    assert code == 2 and "the bucket comes first" in text
