"""The stage on a small made-up run: clips that show their caption, arms of known quality, a stand-in for the networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archipel import cache, store
from archipel.config import Evaluate, RunConfig, build
from archipel.errors import ConfigError, DamagedError, MissingStageError, Stopped
from archipel.evaluation import inputs as reading
from archipel.evaluation import stage, verdicts
from archipel.evaluation.intervals import Interval
from archipel.evaluation.measure import Score
from archipel.evaluation.protocol import Protocol
from archipel.evaluation.stage import evaluate
from archipel.manifest import Clip, read_manifest, write_manifest
from archipel.progress import StopFlag
from archipel.run import Run

ARMS = ("top1", "full", "monolith")
FACTORS = 6
WIDTHS = {"efficientnet-appearance": 24, "efficientnet-motion": 20, "transnet": 16}


def fixed(name: str, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([7, len(name), *shape])).normal(size=shape)


class Networks:
    """Stands in for the image and video networks: fixed random projections of pixels. Counts what it is given."""

    def __init__(self, stop: StopFlag | None = None, after: int = 10**9) -> None:
        self.clips, self.stop, self.after = 0, stop, after

    def __call__(self, names: Sequence[str], clips: np.ndarray, config: Evaluate) -> Mapping[str, Any]:
        self.clips += len(clips)
        if self.stop is not None and self.clips >= self.after:
            self.stop.signal = 2
        flat = clips.reshape(len(clips), -1) / 127.5 - 1
        return {name: np.float32(flat @ fixed(name, flat.shape[1], WIDTHS[name]) / 8) for name in names}


def films(factors: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Clips (N, 4, 6, 6, 3) whose pixels are linear in the factors, plus noise."""
    draw = np.random.Generator(np.random.PCG64(seed))
    pixels = factors @ fixed("film", FACTORS, 4 * 6 * 6 * 3) * 18 + noise * draw.normal(
        size=(len(factors), 4 * 6 * 6 * 3)
    )
    return np.uint8(np.clip(pixels + 128, 0, 255)).reshape(-1, 4, 6, 6, 3)


def make_run(
    root: Path, *, train: int = 60, test: int = 24, count: int = 24, informative: bool = True, **sections: Any
) -> Run:
    evaluate_ = {"arms": list(ARMS), "count": count, "pca": 6, "frames": 2, **sections.pop("evaluate", {})}
    values = {"partition": {"k": 2}, "clips": {"count": train + test}, "evaluate": evaluate_, **sections}
    config: RunConfig = build(values)
    run = Run.create(root, config)
    n = train + test
    draw = np.random.Generator(np.random.PCG64(5))
    factors = draw.normal(size=(n, FACTORS))
    clips = films(factors, 12, 1)
    text = factors @ fixed("text", FACTORS, 10) if informative else draw.normal(size=(n, 10))
    rows = [
        Clip(f"{i:016x}", f"{i:064x}", f"{i}.webp", f"clip {i}", f"group {i}", "train" if i < train else "test", 0.1)
        for i in range(n)
    ]
    write_manifest(run.manifest, rows)
    features = {name: np.asarray(table) for name, table in Networks()(list(WIDTHS), clips, config.evaluate).items()}
    for kind, tensors in (("features", features), ("text", {"pooled": np.float32(text)})):
        entry = cache.build(
            run.cache, kind, {}, n, lambda a, b, t=tensors: {k: v[a:b] for k, v in t.items()}, run_id=run.id, label=kind
        )
        cache.set_index(run.cache, {kind: entry.folder.name})
    make_partition(run, features["transnet"], rows)
    wanted = train + np.arange(count) % test
    make_samples(run, rows, clips, factors, wanted)
    return run


def make_partition(run: Run, features: np.ndarray, rows: list[Clip]) -> None:
    mean = features.mean(0)
    points = features - mean
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    coarse = np.float32([points[0], -points[0]])
    run.partition.mkdir()
    store.write_tensors(run.partition / "centroids.safetensors", {"mean": np.float32(mean), "coarse": coarse})
    cluster = (points @ coarse.T).argmax(1)
    pq.write_table(pa.table({"id": [c.id for c in rows], "cluster": cluster}), run.partition / "assignment.parquet")
    store.write_card(run.partition, "partition", run.id, ["centroids.safetensors", "assignment.parquet"])


def make_samples(run: Run, rows: list[Clip], clips: np.ndarray, factors: np.ndarray, wanted: np.ndarray) -> None:
    folder, n = run.samples("test"), len(wanted)
    videos = {
        "real": clips[wanted],
        "codec": films(factors[wanted], 13, 2),
        "top1": films(0.75 * factors[wanted], 30, 3),
        "full": clips[np.arange(n) % wanted.min()],  # copies of training clips
        "monolith": films(0.2 * factors[wanted], 60, 4),
    }
    for name, video in videos.items():
        store.write_tensors(folder / f"{name}.safetensors", {"clips": video, "seeds": np.arange(n)})
    prompts = [{"caption": rows[r].caption, "row": int(r), "id": rows[r].id, "group": rows[r].group} for r in wanted]
    store.write_json(folder / "prompts.json", prompts)
    store.write_card(folder, "samples", run.id, ["prompts.json", *(f"{name}.safetensors" for name in videos)])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[str, Any]], dict[str, Any]]:
    run = make_run(tmp_path_factory.mktemp("evaluate") / "run", test=40, count=40)
    evaluate(run, extract=Networks())
    return run, store.read_json(run.scores("test")), store.read_json(stage.extra_path(run))


def score_of(row: dict[str, Any]) -> Score:
    """A row as a score; its leave-out values have the row's bounds for two units, enough to be paired."""
    interval = Interval(*(row[key] if row[key] is not None else float("nan") for key in ("value", "low", "high")))
    left = interval.value + np.linspace(-1, 1, 21) * 1e-3
    left[10], left[0] = left[0], interval.value
    return Score(row["arm"], row["metric"], interval, row["n"], row["groups"], Protocol(**row["protocol"]), left)


def value(rows: list[dict[str, Any]], arm: str, metric: str) -> float:
    (found,) = (row for row in rows if (row["arm"], row["metric"]) == (arm, metric))
    return float(found["value"])


def test_rows_have_the_promised_form(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    run, rows, _ = scored
    keys = {"arm", "metric", "value", "low", "high", "n", "groups", "protocol"}
    for row in rows:
        assert set(row) == keys
        assert row["protocol"]["split"] == "test"
        assert "FVD" not in row["metric"]
        assert "clip" not in row["metric"].lower()
        if row["metric"].startswith("excess") or row["arm"] != "real":
            assert row["low"] <= row["value"] <= row["high"], row
    assert len({(row["arm"], row["metric"]) for row in rows}) == len(rows)
    assert rows[0]["arm"] == "codec"
    metrics = {row["metric"] for row in rows if row["arm"] == "top1"}
    for name in WIDTHS:
        assert {f"KID-{name}", f"FD-{name}", f"excess-FD-{name}"} <= metrics
    assert {"motion", "nearest-train", "share-nearer-train", "precision", "recall", "density", "coverage"} <= metrics
    assert {"cluster-share-0", "cluster-share-1", "text-video-probe", "retrieval@1"} <= metrics
    assert json.loads(run.scores("test").read_text(), parse_constant=pytest.fail) == rows


def test_better_arms_score_better(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    _, rows, extra = scored
    for name in WIDTHS:
        for kind in ("KID", "excess-FD"):
            found = [value(rows, arm, f"{kind}-{name}") for arm in ("codec", "top1", "monolith")]
            assert found == sorted(found), (kind, name)
        floor, raw = value(rows, "real", f"FD-{name}"), value(rows, "codec", f"FD-{name}")
        assert raw == pytest.approx(floor, rel=0.2)  # the codec is almost nothing over the floor
        assert abs(value(rows, "real", f"KID-{name}")) < 0.1 * value(rows, "monolith", f"KID-{name}")
        assert extra["floors"][f"FD-{name}"]["value"] == floor
    assert value(rows, "top1", "retrieval@1") > value(rows, "monolith", "retrieval@1")


def test_comparison_is_paired_and_said_in_words(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    _, rows, extra = scored
    first = extra["comparisons"][0]
    assert (first["metric"], first["primary"], first["arm"]) == ("KID-efficientnet-appearance", True, "top1")
    gap = value(rows, "top1", first["metric"]) - value(rows, "monolith", first["metric"])
    assert first["difference"]["value"] == pytest.approx(gap)
    assert first["difference"]["high"] < 0
    assert first["ratio"]["value"] < 1
    assert "nearer to the real clips than the monolith" in first["verdict"]
    assert "40 content groups: too few clips to conclude" in first["verdict"]
    assert sum(one["primary"] for one in extra["comparisons"]) == 1
    assert len(extra["comparisons"]) == 6


def test_copies_are_seen(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    _, rows, extra = scored
    assert value(rows, "full", "share-nearer-train") > 0.95
    assert value(rows, "full", "nearest-train") == pytest.approx(0, abs=1e-3)
    assert value(rows, "real", "share-nearer-train") == 0.5
    assert value(rows, "full", "train-over-test") > 0.95
    assert value(rows, "real", "train-over-test") == pytest.approx(0.5, abs=0.1)
    assert not extra["copying"]["grew"]  # top1 is nearer to all real clips than the monolith, and copies none
    assert "no copying can be told" in extra["copying"]["verdict"]
    assert "copying did not grow" in extra["copying"]["verdict"]
    by_arm = {(row["arm"], row["metric"]): row for row in rows}
    scores = {key: score_of(row) for key, row in by_arm.items()}
    copier = verdicts.copying(scores, "full", "efficientnet-appearance")
    assert copier["grew"]
    assert "so it copies" in copier["verdict"]
    gap = Interval(-1.0, -1.5, -0.5)
    assert "does not count as a gain" in verdicts.verdict("KID-x", "full", gap, None, 200, copier["grew"])


def test_probe_is_shown_beside_chance_and_controls(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    _, _, extra = scored
    shown = extra["probe"]
    assert not shown["withheld"]
    assert shown["features"] == ["efficientnet-appearance", "efficientnet-motion"]
    assert [row["clips"] for row in shown["table"]] == ["real", "codec", "static", "reversed"]
    assert shown["chance"] == {"retrieval@1": 1 / 40, "retrieval@5": 5 / 40}
    real, still = shown["table"][0], shown["table"][2]
    assert real["retrieval@1"]["value"] > 3 / 40
    assert real["similarity"]["value"] > still["similarity"]["value"]
    assert shown["controls"]["static"]["loses"]  # the stand-in networks read every pixel of every frame
    assert any(note.startswith("the text-video probe tells static clips from real ones") for note in extra["notes"])


def test_cluster_shares_sum_to_one_and_stand_beside_the_data(
    scored: tuple[Run, list[dict[str, Any]], dict[str, Any]],
) -> None:
    _, rows, extra = scored
    for arm in ("real", "top1", "monolith"):
        assert sum(value(rows, arm, f"cluster-share-{k}") for k in range(2)) == pytest.approx(1)
    shares = extra["clusters"]
    assert shares["arms"]["real"] == pytest.approx(shares["captions"])  # the stand-in assigns by the same centroids
    assert sum(shares["data_train"]) == pytest.approx(1)


def test_notes_say_what_cannot_be_concluded(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    _, _, extra = scored
    assert any(note.startswith("too few clips to conclude: 40 content groups") for note in extra["notes"])
    assert not extra["extractors"]["circle"]
    assert extra["extractors"]["independent"] == ["efficientnet-appearance", "efficientnet-motion"]


def test_table_is_small_and_printable(scored: tuple[Run, list[dict[str, Any]], dict[str, Any]]) -> None:
    from rich.console import Console

    run, _, _ = scored
    rows = stage.table(run)
    assert [row["arm"] for row in rows] == ["codec", "real", "top1 *", "monolith", "full"]
    assert len({tuple(row) for row in rows}) == 1
    assert "[" in rows[0]["KID-efficientnet-appearance"]
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(stage.rich_table(run, 200))
    text = console.export_text()
    assert "too few clips to conclude" in text
    assert rows[0]["motion"] in text


def test_table_drops_columns_rather_than_breaking_lines(
    scored: tuple[Run, list[dict[str, Any]], dict[str, Any]],
) -> None:
    from rich.console import Console

    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(stage.rich_table(scored[0], 80))
    lines = console.export_text().splitlines()
    body = [line for line in lines if line.split()[:1] in (["codec"], ["real"], ["top1"], ["monolith"], ["full"])]
    assert len(body) == 5 and all("[" in line and len(line) <= 80 for line in body)
    assert not any("…" in line for line in lines), "\n".join(lines)


def test_second_call_does_nothing_and_a_lost_score_is_made_again_alike(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    networks = Networks()
    evaluate(run, extract=networks)
    made, before = networks.clips, run.scores("test").read_bytes()
    assert made == 4 * 24 + 2 * 24  # codec and three arms, static and reversed; real clips come from the cache
    evaluate(run, extract=networks)
    run.scores("test").unlink()
    evaluate(run, extract=networks)
    assert networks.clips == made
    assert run.scores("test").read_bytes() == before


def test_changed_samples_are_scored_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    networks = Networks()
    evaluate(run, extract=networks)
    made, before = networks.clips, store.read_json(run.scores("test"))
    folder = run.samples("test")
    clips = store.map_tensors(folder / "top1.safetensors")["clips"][:] // 2
    store.write_tensors(folder / "top1.safetensors", {"clips": clips})
    card = store.read_card(folder)
    assert card is not None
    store.write_card(folder, "samples", run.id, card["files"])
    evaluate(run, extract=networks)
    assert networks.clips == made + 24
    assert value(store.read_json(run.scores("test")), "top1", "motion") < value(before, "top1", "motion")
    assert len(list((folder / "features").glob("top1-*"))) == 1


def test_interrupted_work_continues_where_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    stop = StopFlag()
    first = Networks(stop, after=60)
    with pytest.raises(Stopped):
        evaluate(run, stop, extract=first)
    assert not run.scores("test").exists()
    second = Networks()
    evaluate(run, extract=second)
    assert second.clips < 4 * 24 + 2 * 24 - 24
    assert run.scores("test").exists()


@pytest.mark.parametrize("test", [1, 3, 12])
def test_tiny_runs_are_scored_as_far_as_they_can_be(tmp_path: Path, test: int) -> None:
    run = make_run(tmp_path / "run", train=8, test=test, count=12)
    evaluate(run, extract=Networks())
    rows, extra = store.read_json(run.scores("test")), store.read_json(stage.extra_path(run))
    assert value(rows, "top1", "motion") > 0
    assert any("too few clips to conclude" in note for note in extra["notes"])
    json.loads(run.scores("test").read_text(), parse_constant=pytest.fail)
    if test == 12:
        assert extra["pca"]["transnet"] == {"dims": 4, "asked": 6, "explained": pytest.approx(0.9, abs=0.1)}
        assert any("4 PCA dimensions instead of 6" in note for note in extra["notes"])
    if test == 1:
        assert any("left out: FD-" in note for note in extra["notes"])
    assert stage.table(run)


def test_repeated_captions_stay_one_group_and_one_clip_per_frechet_estimate(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", test=16, count=40)
    evaluate(run, extract=Networks())
    rows = store.read_json(run.scores("test"))
    (found,) = (row for row in rows if (row["arm"], row["metric"]) == ("top1", "FD-transnet"))
    assert (found["n"], found["groups"], found["protocol"]["n"]) == (32, 16, 8)
    notes = store.read_json(stage.extra_path(run))["notes"]
    assert any("24 of 40 clips repeat a caption" in note for note in notes)


def test_uninformative_captions_withhold_the_probe(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", informative=False)
    evaluate(run, extract=Networks())
    rows, extra = store.read_json(run.scores("test")), store.read_json(stage.extra_path(run))
    assert not [row for row in rows if row["metric"] in ("text-video-probe", "retrieval@1")]
    assert extra["probe"]["withheld"]
    assert len(extra["probe"]["table"]) == 4
    assert any("times chance" in note for note in extra["notes"])


def test_a_circle_is_flagged() -> None:
    # `init` refuses one; a run.toml of an older version may still hold it.
    circle = verdicts.crossing(RunConfig.model_validate({"evaluate": {"primary": "KID-transnet"}}))
    assert circle["circle"]
    assert "this is a circle" in circle["sentence"]
    assert circle["independent"] == ["efficientnet-appearance", "efficientnet-motion"]
    random = {"partition": {"method": "random"}, "evaluate": {"primary": "KID-transnet"}}
    assert not verdicts.crossing(RunConfig.model_validate(random))["circle"]


@pytest.mark.parametrize("features", ["efficientnet", "motion", "appearance+motion"])
def test_a_partition_by_any_feature_of_a_network_is_judged_by_others(features: str) -> None:
    primary = {"primary": "KID-efficientnet-appearance"}
    with pytest.raises(ConfigError, match=r"network that made the clusters .* 'KID-transnet'"):
        build({"partition": {"features": features}, "evaluate": primary})
    old = RunConfig.model_validate({"partition": {"features": features}, "evaluate": primary})
    crossed = verdicts.crossing(old)
    assert crossed["circle"] and crossed["partition"] == features and crossed["independent"] == ["transnet"]
    build({"partition": {"features": features, "method": "random"}, "evaluate": primary})


def test_cluster_shares_and_the_probe_follow_the_features_of_the_partition(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", partition={"k": 2, "features": "appearance+motion"}, evaluate={"primary": "KID-transnet"}
    )
    table = cache.open_kind(run.cache, "features")
    both = np.concatenate([np.asarray(table[f"efficientnet-{one}"][:]) for one in ("appearance", "motion")], 1)
    shutil.rmtree(run.partition)
    make_partition(run, both, read_manifest(run.manifest))
    evaluate(run, extract=Networks())
    rows, extra = store.read_json(run.scores("test")), store.read_json(stage.extra_path(run))
    shares = [row for row in rows if row["metric"] == "cluster-share-0"]
    assert {row["protocol"]["extractor"] for row in shares} == {"efficientnet-appearance+efficientnet-motion"}
    assert sum(extra["clusters"]["arms"]["real"]) == pytest.approx(1)
    assert extra["probe"].get("features", ["transnet"]) == ["transnet"] and not extra["extractors"]["circle"]


def test_unknown_primary_names_the_nearest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluate={"primary": "KID-efficientnet"})
    with pytest.raises(ConfigError, match=r"evaluate.primary = 'KID-efficientnet' .* 'KID-efficientnet-motion'"):
        evaluate(run, extract=Networks())


def test_missing_stages_and_damage_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(MissingStageError, match="archipel evaluate"):
        stage.table(run)
    (run.samples("test") / "real.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"real\.safetensors is missing"):
        evaluate(run, extract=Networks())
    (run.samples("test") / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel generate"):
        evaluate(run, extract=Networks())


def test_an_arm_of_another_length_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    store.write_tensors(run.samples("test") / "top1.safetensors", {"clips": np.zeros((5, 4, 6, 6, 3), np.uint8)})
    with pytest.raises(DamagedError, match=r"top1\.safetensors holds uint8 \(5, 4, 6, 6, 3\), expected .*24"):
        evaluate(run, extract=Networks())


def test_an_arm_without_samples_is_noted_and_the_others_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.samples("test") / "monolith.safetensors").unlink()
    evaluate(run, extract=Networks())
    extra = store.read_json(stage.extra_path(run))
    assert extra["comparisons"] == []
    assert "arm monolith has no samples" in extra["notes"]


def test_reference_holds_used_clips_and_one_of_every_other_group() -> None:
    groups = [("a", "train"), ("b", "test"), ("b", "test"), ("c", "test"), ("c", "test"), ("c", "test"), ("d", "test")]
    clips = [Clip(str(i), "", "", "", group, split, 0.0) for i, (group, split) in enumerate(groups)]  # type: ignore[arg-type]
    found = reading.reference_rows(clips, "test", np.array([2, 6, 2]), seed=0)
    assert len(found) == 3
    assert {2, 6} < set(found.tolist())
    assert {clips[row].group for row in found} == {"b", "c", "d"}
    assert reading.reference_rows(clips, "test", np.array([1, 2, 3, 6]), 0).tolist() == [1, 2, 3, 6]


def test_widths_are_those_of_the_encoders() -> None:
    from archipel.encoders.features import NAMES

    assert set(reading.EXTRACTORS) == set(NAMES) == set(WIDTHS)
