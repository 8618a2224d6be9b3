"""Every head-to-head runs at a toy size: contenders agree, and the record says what the page needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/ is not installed: it is a folder of the clone. What importing it says to the environment is undone."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


def check(record: dict[str, Any], name: str, against: set[str]) -> None:
    assert record == json.loads(json.dumps(record)), "a record is plain JSON"
    assert record["benchmark"] == name
    assert {"what", "date", "commit", "machine", "load", "busy", "facts", "tables"} <= set(record)
    assert record["machine"]["threads"] == 1 and record["machine"]["cpu"]
    assert {row["against"] for row in record["rows"]} == against
    for row in record["rows"]:
        assert row["seconds"] > 0 and row["seconds_against"] > 0
        for clock in ("wall", "cpu"):
            assert 0 < row[clock]["p10"] <= row[clock]["median"] <= row[clock]["p90"]
        assert row["judged_by"] == ("cpu" if record["busy"] else "wall")
        assert row["met"] is (None if row["aim"] is None else row[row["judged_by"]]["median"] <= row["aim"])


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("frechet", {"scipy.linalg.sqrtm", "torchmetrics", "cd-fvd"}),
        ("intervals", {"features", "features, sqrtm"}),
        ("cache_reading", {"webdataset", "litdata", "datasets (arrow, numpy format)"}),
        ("checkpoint_stall", {"a minute without", "torch.save"}),
        ("startup", {"the goal of 0.4 s", "the goal of 1 s"}),
        ("top1", {"monolith"}),
        ("lora_experts", {"3 merged networks", "one merged network", "adapters that take turns"}),
        ("backbone_loop", {"FluxPipeline", "WanPipeline", "LTXPipeline", "HunyuanVideoPipeline"}),
        ("training_step", {"a bare loop", "accelerate's loop"}),
        (
            "gpu",
            {
                "diffusers' example loop",
                "a tuned loop, blocks compiled",
                "monolith",
                *("FluxPipeline", "WanPipeline", "LTXPipeline", "HunyuanVideoPipeline"),
            },
        ),
    ],
)
def test_a_quick_benchmark_gives_a_whole_record(name: str, against: set[str]) -> None:
    check(importlib.import_module(f"bench.{name}").run(small=True), name, against)


def test_windows_are_what_loops_over_the_whole_file_give() -> None:
    libraries = {
        f"{one}, {what}" for one in ("PyAV", "Pillow") for what in ("every frame made a square", "the 16 made squares")
    }
    check(importlib.import_module("bench.clip_decoding").run(small=True), "clip_decoding", libraries)


@pytest.mark.slow
def test_sampling_is_timed_and_what_sparing_the_router_does_is_told() -> None:
    record = importlib.import_module("bench.sampling").run(small=True)
    check(record, "sampling", {"monolith", "single calls", "importing torch and diffusers"})
    for rows in record["tables"].values():
        assert all(0 <= row["questions to the router"] <= 1 for row in rows) and len(rows) >= 12


@pytest.mark.slow
def test_memory_of_moments_is_measured_in_processes_of_their_own() -> None:
    record = importlib.import_module("bench.moments_memory").run(small=True)
    check(record, "moments_memory", set())
    (rows,) = record["tables"].values()
    assert [row["against"].partition(",")[0] for row in rows] == ["cd-fvd", "cd-fvd"]
    assert all(row["ours, MiB"] > 0 and row["theirs, MiB"] > 0 for row in rows)
    assert rows[0]["theirs, MiB"] > rows[1]["theirs, MiB"], "a list of features takes more than none"


@pytest.mark.slow
def test_a_planned_steps_memory_is_measured_in_processes_of_their_own() -> None:
    record = importlib.import_module("bench.plan_memory").run(small=True)
    check(record, "plan_memory", set())
    ((row, *_),) = record["tables"].values()
    assert row["predicted / allocated"] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_representations_are_compared_at_equal_flops() -> None:
    module = importlib.import_module("bench.representation")
    arms = ["pca 4x8x8 C=64 gamma .5", "pixels 4x8x8 x0"]
    record = module.run(small=True, arms=arms)
    check(record, "representation", set())
    codecs, samples = record["tables"].values()
    assert [row["arm"] for row in samples] == ["real clips", *arms]
    assert samples[1]["seam_space"] > 0
    assert all(row["FD train"] > samples[0]["FD train"] for row in samples[1:])
    spent = [row["steps"] * row["GFLOP a clip"] * module.RECIPE["batch"] for row in samples[1:]]
    step = max(row["GFLOP a clip"] for row in samples[1:]) * module.RECIPE["batch"]
    assert all(abs(one - 1e3 * record["facts"]["TFLOP an arm"]) <= step for one in spent)
    by_name = {row["codec"]: row["psnr"] for row in codecs}
    assert by_name["pca 4x8x8 C=32"] < by_name["pca 4x8x8 C=64"] < by_name["pca 4x8x8 C=128"]


def test_the_page_says_what_was_missed_and_that_the_machine_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    common, page = importlib.import_module("bench.common"), importlib.import_module("bench.__main__").page
    wall, cpu, one = [2.0, 2.2, 2.4], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]
    records = {}
    for load in (0.0, 9.0):
        monkeypatch.setattr(common, "others_cores", lambda *_, load=load: load)
        with common.Benchmark("mine", "a thing", []) as benchmark:
            ours, theirs = common.Seconds(wall, cpu), common.Seconds(one, one)
            benchmark.rows += [
                common.versus("ours", "a peer", ours, theirs, 1.0),
                common.versus("no aim", "x", ours, theirs),
            ]
        records[str(load)] = benchmark.record
    quiet, busy = records.values()
    assert [(row["judged_by"], row["met"]) for row in quiet["rows"]] == [("wall", False), ("wall", None)]
    assert [(row["judged_by"], row["met"]) for row in busy["rows"]] == [("cpu", True), ("cpu", None)]
    first, second = (line for line in page("2026-01-02", records).splitlines() if line.startswith("| ours"))
    assert "2.200 (2.000 to 2.400)" in first and "at most 1" in first and first.endswith("| **no** |")
    assert "0.500 (0.500 to 0.500)" in second and second.endswith("| yes (CPU) |")
    assert [page("", {"": record}).count("**The machine was busy") for record in (quiet, busy)] == [0, 1]


def test_the_page_names_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    common, page = importlib.import_module("bench.common"), importlib.import_module("bench.__main__").page
    with common.Benchmark("mine", "a thing", ["no-such-peer"]) as benchmark:
        assert benchmark.has("numpy") and not benchmark.has("no-such-peer")
        benchmark.rows.append(common.within("slow", 0.5, common.Seconds([1.0, 1.5, 2.0], [1.0, 1.0, 1.0])))
    failed = {"benchmark": "other", "what": "not measured", "rows": [], "failed": "the two differ"}
    text = page("2026-01-02", {"mine": benchmark.record, "other": failed})
    assert "not installed, so not compared: no-such-peer" in text
    assert "**Nothing is reported: the two differ.**" in text
    assert "0 of 1 are met." in text and "the goal of 0.5 s" in text


def test_a_gpu_is_known_by_the_name_that_its_driver_gives() -> None:
    peak_of = importlib.import_module("bench.gpu").peak_of
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989.4e12
    assert peak_of("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_of("NVIDIA A100-SXM4-40GB") == peak_of("NVIDIA A100 80GB PCIe") == 312e12
    assert (peak_of("NVIDIA L4"), peak_of("NVIDIA L40S")) == (121e12, 362e12)
    for other in ("NVIDIA L40", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "Tesla V100-SXM2-16GB"):
        assert peak_of(other) is None, "a peak that nobody stated would make a wrong MFU"


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = importlib.import_module("bench.gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match="no GPU here: nothing is reported"):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    common = importlib.import_module("bench.common")
    calls: list[str] = []
    taken = common.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 2)
    assert calls == list("abcbcacab")
    assert {name: len(seconds.wall) for name, seconds in taken.items()} == {"a": 2, "b": 2, "c": 2}


def test_contenders_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    common, frechet = importlib.import_module("bench.common"), importlib.import_module("bench.frechet")
    monkeypatch.setitem(frechet.CONTENDERS, "torchmetrics", lambda *_: 0.0)
    monkeypatch.setattr(common, "interleave", lambda *_: pytest.fail("was timed"))
    with pytest.raises(common.DifferentError, match="torchmetrics"):
        frechet.run(small=True)
