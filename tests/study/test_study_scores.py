"""A study's table on made-up features of arms of known quality: numbers, protocols, comparisons, choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel.config import RunConfig, build
from archipel.errors import ArchipelError, Stopped
from archipel.evaluation import distances, measure
from archipel.evaluation.inputs import EXTRACTORS, Arm, Inputs
from archipel.evaluation.measure import Frame, Score
from archipel.evaluation.protocol import require_same
from archipel.evaluation.sides import WholeFrechetSide
from archipel.manifest import Clip
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.study import comparing
from archipel.study.scores import PromptSet, StudyData, Table, table

TRAIN, TEST, WIDTH = 80, 48, 10
PRIMARY = EXTRACTORS[0]
KID = f"KID-{PRIMARY}"
IDENTITY: dict[str, dict[str, Any]] = {
    name: {"weights": "ab" * 32, "layer": "pooled", "resize": 128, "frames": 4, "code": 1, "metric": f"FD-{name}"}
    for name in EXTRACTORS
} | {
    "flow": {
        "weights": "opencv",
        "layer": "",
        "resize": 0,
        "frames": 0,
        "code": 1,
        "metric": "flow",
        "unit": "px/frame",
    }
}


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


CLIPS = [
    Clip(f"{i:016x}", f"{i:064x}", f"{i}.webp", f"clip {i}", f"g{i // 2}", "train" if i < TRAIN else "test", 0.1)
    for i in range(TRAIN + TEST)
]
REAL = {name: generator(1, at).normal(size=(len(CLIPS), WIDTH)) for at, name in enumerate(EXTRACTORS)}
TEXT = REAL["transnet"] @ generator(2).normal(size=(WIDTH, 8))  # captions can be read from clips
GROUPS = np.array([clip.group for clip in CLIPS])


def prompt_set(name: str = "test", split: str = "test") -> PromptSet:
    rows = np.arange(TRAIN, TRAIN + TEST) if split != "train" else np.arange(TEST)
    return PromptSet.of(name, split, rows, CLIPS, f"prompts of {name}", seed=0)


def arm(rows: np.ndarray, shift: float, seeds: tuple[int, ...] = (0, 1, 2), *, wander: float = 0.02) -> dict[int, Any]:
    """Clips that keep half of the real clip of their caption, moved by ``shift``, and a little by every seed."""
    found = {}
    for seed in seeds:
        draw = generator(3, seed)
        found[seed] = {
            name: np.float32(
                0.7 * real[rows] + 0.714 * draw.normal(size=(len(rows), WIDTH)) + shift + wander * draw.normal()
            )
            for name, real in REAL.items()
        }
    return found


def study_data(prompts: PromptSet, **changes: Any) -> StudyData:
    rows = prompts.rows
    features: dict[str, Any] = {
        "top1": arm(rows, 0.45),
        "monolith": arm(rows, 0.9),
        "twin": arm(rows, 0.45),
        "few": arm(rows, 0.9, (2, 0)),
        "codec": {7: {name: np.float32(real[rows] + 0.05) for name, real in REAL.items()}},
    }
    scalars = {
        name: {seed: {"flow": generator(4, seed).random(len(rows)) + (name == "top1")} for seed in seeds}
        for name, seeds in features.items()
    }
    given: dict[str, Any] = {
        "features": features,
        "scalars": scalars,
        "real": REAL,
        "train": np.arange(TRAIN),
        "real_scalars": {"flow": generator(5).random(len(CLIPS))},
        "groups": GROUPS,
        "text": TEXT,
        "identity": "clips",
    }
    return StudyData(**(given | changes))


def scored(prompts: PromptSet | None = None, **changes: Any) -> Table:
    prompts = prompts or prompt_set()
    return table(prompts, study_data(prompts, **changes), IDENTITY, primary=PRIMARY, probed=["transnet"], pca=4)


@pytest.fixture(scope="module")
def whole() -> Table:
    return scored()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_rows_of_an_evaluation_to_the_last_bit(tmp_path: Path) -> None:
    prompts = prompt_set()
    config: RunConfig = build({"evaluate": {"pca": 4}, "run": {"seed": 0}})
    data = study_data(prompts)
    features = {name: data.features[name][0] for name in ("top1", "monolith")} | {"codec": data.features["codec"][7]}
    features["real"] = {name: real[prompts.rows] for name, real in REAL.items()}
    clips = np.zeros((TEST, 1, 2, 2, 3), np.uint8)
    inputs = Inputs(
        run=Run.create(tmp_path / "run", config),
        split="test",
        clips=CLIPS,
        arms={name: Arm(name, clips, dict(found)) for name, found in features.items()},
        rows=prompts.rows,
        captions=[CLIPS[row].caption for row in prompts.rows],
        prompts="",
        identity="",
        reference=prompts.reference,
        train=np.arange(TRAIN),
        features=REAL,
        text=TEXT,
        changed={kind: {name: real[prompts.rows] for name, real in REAL.items()} for kind in ("static", "reversed")},
        missing=[],
    )
    frame = Frame.of(inputs)
    facts: dict[str, Any] = {"left_out": [], "pca": {}, "uncorrected_excess": {}}
    today: list[Score] = []
    for name in EXTRACTORS:
        today += [*measure.kid_scores(frame, name, facts), *measure.frechet_scores(frame, name, facts)]
    today += [*measure.copying_scores(frame, PRIMARY), *measure.probe_scores(frame, ("transnet",), facts)]
    once = {name: {0: data.features[name][0]} for name in ("top1", "monolith")} | {"codec": data.features["codec"]}
    found = scored(prompts, features=once, scalars={}).scores
    assert len(today) > 60
    for one in today:
        ours = found[one.arm, one.metric]
        assert ours.interval == one.interval, (one.arm, one.metric)
        assert (ours.n, ours.groups) == (one.n, one.groups)
        theirs = one.protocol.as_dict()
        same = ("estimator", "n", "reference", "groups", "divisor", "split", "pca", "extractor")
        assert {key: ours.protocol[key] for key in same} == {key: theirs[key] for key in same}
    gap = measure.intervals.difference(
        *(next(one.left for one in today if (one.arm, one.metric) == (name, KID)) for name in ("top1", "monolith"))
    )
    assert comparing.difference(found, KID, "top1", "monolith") == gap


def test_every_arm_has_every_measure_and_rows_are_plain_json(whole: Table) -> None:
    rows = json.loads(json.dumps(whole.rows, allow_nan=False))
    by = {(row["arm"], row["metric"]): row for row in rows}
    expected = {f"{kind}-{name}" for kind in ("KID", "excess-FD", "FD") for name in EXTRACTORS} | {
        "nearest-train", "share-nearer-train", "train-over-test", "nearest-test", "precision", "recall", "density",
        "coverage", "flow", "text-video-probe", "retrieval@1", "retrieval@5",
    }  # fmt: skip
    for name in ("top1", "monolith", "few", "codec"):
        assert {metric for arm_, metric in by if arm_ == name} == expected
    assert {metric for arm_, metric in by if arm_ == "real"} == {m for m in expected if not m.startswith("excess")}
    row = by["top1", KID]
    assert set(row) == {"arm", "metric", "value", "low", "high", "n", "groups", "seeds", "protocol", "set", "unit"}
    assert (row["n"], row["groups"], row["seeds"], row["set"]) == (3 * TEST, TEST // 2, 3, "test")
    assert row["protocol"]["seeds"] == [0, 1, 2]
    assert by["few", KID]["protocol"]["seeds"] == [0, 2]
    assert by["codec", KID]["seeds"] == by["real", KID]["seeds"] == 0
    assert by["top1", "flow"]["unit"] == "px/frame"
    assert by["real", "flow"]["value"] < 1 < by["top1", "flow"]["value"]
    assert by["codec", KID]["value"] < by["top1", KID]["value"] < by["monolith", KID]["value"]
    assert [row["arm"] for row in rows[:1]] == ["codec"]
    for one in rows:
        if one["low"] is not None:
            assert one["low"] <= one["value"] <= one["high"], one
    assert any("too few clips to conclude" in note for note in whole.facts["notes"])
    assert any("2 seeds" in note and note.endswith("few") for note in whole.facts["notes"])


def test_seeds_that_wander_widen_intervals(whole: Table) -> None:
    prompts = prompt_set()
    wild = {"top1": arm(prompts.rows, 0.45, wander=0.4)}
    found = scored(prompts, features=wild, scalars={}).scores["top1", KID].interval
    calm = whole.scores["top1", KID].interval
    assert found.high - found.low > 1.5 * (calm.high - calm.low)


def test_fvd_is_the_usual_formula_in_all_dimensions() -> None:
    groups = np.arange(40)
    draw = generator(6)
    real, made = draw.normal(size=(2, 40, 60))
    side = WholeFrechetSide(groups % 10, 0, (real, groups), (real, groups))
    found = side.distances(made + 0.3, groups, [groups])
    first, second = side._plan.first[..., groups % 10], side._plan.second[..., groups % 10]
    plain = [
        np.mean(
            [
                distances.frechet(distances.Moments.of(made[a] + 0.3), distances.Moments.of(real[b]))
                for a, b in zip(*pair, strict=True)
            ]
        )
        for pair in zip(first, second, strict=True)
    ]
    assert np.allclose(found, plain, rtol=1e-6)  # the plain one takes roots of rounding errors
    assert found[0] > side.floor[0] > 0


def test_names_promise_what_was_measured() -> None:
    prompts = prompt_set()
    identity = IDENTITY | {"transnet": {**IDENTITY["transnet"], "metric": "FVD"}}
    one = {"top1": arm(prompts.rows, 0.4)}
    found = table(prompts, study_data(prompts, features=one, scalars={}), identity, primary=PRIMARY, pca=4).scores
    assert ("top1", "FVD") in found and ("top1", "excess-FVD") in found and ("real", "FVD") in found
    assert ("top1", "KID-transnet") in found and ("top1", "FD-transnet") not in found
    assert found["top1", "FVD"].protocol["pca"] == 0 < found["top1", "excess-FVD"].protocol["pca"]
    assert found["top1", "FVD"].interval.value > found["real", "FVD"].interval.value
    with pytest.raises(ArchipelError, match="cannot be compared"):
        require_same(found["top1", "FVD"].row(), found["top1", "excess-FVD"].row())


# --- prompt sets -----------------------------------------------------------------------------------------------------


def test_training_captions_are_held_against_their_own_clips_and_copying_is_left_out() -> None:
    prompts = prompt_set("train", "train")
    assert prompts.reference.tolist() == list(range(TEST)) and prompts.count == TEST // 2
    whole = scored(prompts)
    metrics = {metric for name, metric in whole.scores if name == "top1"}
    assert {"precision", "coverage", KID} <= metrics
    assert not metrics & {"nearest-train", "share-nearer-train", "train-over-test", "nearest-test", "text-video-probe"}
    assert comparing.copying(whole.scores, "top1", "monolith")["grew"] is None
    first = comparing.comparisons(whole.scores, "top1", "monolith", primary=KID)[0]
    assert first["difference"]["high"] < 0 and not first["gain"] and "not judged" in first["verdict"]
    again = comparing.comparisons(whole.scores, "top1", "monolith", primary=KID, copied=False)[0]
    assert again["gain"]


def test_scores_of_other_prompts_or_seeds_cannot_be_compared_by_mistake(whole: Table) -> None:
    other = scored(prompt_set("validation", "validation"), features={"top1": arm(np.arange(TRAIN, TRAIN + TEST), 0.4)})
    with pytest.raises(ArchipelError, match="split is"):
        require_same(whole.scores["top1", KID].row(), other.scores["top1", KID].row())
    with pytest.raises(ArchipelError, match="seeds is"):
        require_same(whole.scores["top1", KID].row(), whole.scores["few", KID].row())
    mixed = dict(whole.scores) | {("few", KID): other.scores["top1", KID]}
    with pytest.raises(ArchipelError, match="cannot be compared"):
        comparing.difference(mixed, KID, "top1", "few")


def test_prompt_sets_and_features_that_do_not_fit_are_refused() -> None:
    prompts = prompt_set()
    with pytest.raises(ArchipelError, match="numbered below"):
        PromptSet("x", "test", prompts.rows, prompts.group, prompts.reference, prompts.reference_group, 2, "")
    short = {"top1": {0: {name: rows[:-1] for name, rows in arm(prompts.rows, 0.0)[0].items()}}}
    with pytest.raises(ArchipelError, match=r"top1, seed 0.*sample the arm again"):
        scored(features=short, scalars={})
    without = {"top1": {0: {PRIMARY: arm(prompts.rows, 0.0)[0][PRIMARY]}}}
    with pytest.raises(ArchipelError, match="are none"):
        scored(features=without, scalars={})
    with pytest.raises(ArchipelError, match="flow must be"):
        scored(features={"top1": arm(prompts.rows, 0.0, (0,))}, scalars={"top1": {0: {"flow": np.full(TEST, np.nan)}}})
    stop = StopFlag()
    stop.signal = 2
    with pytest.raises(Stopped):
        table(prompts, study_data(prompts), IDENTITY, primary=PRIMARY, stop=stop)


def test_a_probe_that_cannot_read_captions_is_withheld(whole: Table) -> None:
    assert not whole.facts["probe"]["withheld"]
    assert whole.bench is not None
    features = arm(prompt_set().rows, 0.45)[0]
    per_clip = whole.bench.similarity(features)
    assert per_clip is not None and per_clip.shape == (TEST,)
    found = scored(text=generator(9).normal(size=TEXT.shape))
    assert found.facts["probe"]["withheld"] and ("top1", "text-video-probe") not in found.scores
    assert any("probe withheld: retrieval@1" in note for note in found.facts["notes"])


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_a_halved_distance_is_said_in_the_papers_direction(whole: Table) -> None:
    found = comparing.comparisons(whole.scores, "top1", "monolith", primary=KID, circles=["transnet"])
    by = {one["metric"]: one for one in found}
    assert found[0]["metric"] == KID and found[0]["primary"] and not found[1]["primary"]
    ratio = by[KID]["ratio"]
    own, other = (whole.scores[name, KID].interval.value for name in ("top1", "monolith"))
    assert ratio["value"] == pytest.approx(other / own) and ratio["value"] > 2
    assert ratio["low"] > 1.5 and by[KID]["gain"] and by[KID]["reached"]
    assert "the goal of 2 with a lower bound above 1.5 is reached" in by[KID]["verdict"]
    assert "top1 is nearer to the real clips than monolith" in by[KID]["verdict"]
    assert by["KID-transnet"]["circle"] and not by["KID-transnet"]["reached"]
    assert "a circle" in by["KID-transnet"]["verdict"]
    assert by["flow"]["ratio"] is None and "moves more" in by["flow"]["verdict"] and "px/frame" in by["flow"]["verdict"]
    assert "FD-transnet" not in by  # raw distances in a PCA hide ratios
    fitted = comparing.comparisons(whole.scores, "top1", "monolith", primary=KID, circles=[comparing.PROBE])
    probed = next(one for one in fitted if one["metric"] == comparing.PROBE)
    assert probed["circle"] and "The caption embeddings it is fitted to also made the partition" in probed["verdict"]
    back = comparing.comparisons(whole.scores, "monolith", "top1", primary=KID)[0]
    assert back["ratio"]["value"] == pytest.approx(1 / ratio["value"]) and not back["gain"]
    assert "is not reached" in back["verdict"] and "farther" in back["verdict"]


def test_equal_arms_differ_by_nothing_and_fewer_seeds_are_paired_over_the_common_ones(whole: Table) -> None:
    same = comparing.comparisons(whole.scores, "top1", "twin", primary=KID)[0]
    assert same["difference"]["value"] == 0 and same["ratio"]["value"] == pytest.approx(1)
    assert "no difference can be told" in same["verdict"] and not same["gain"]
    some = comparing.comparisons(whole.scores, "top1", "few", primary=KID)[0]
    assert some["seeds"] == 2 and "2 seeds" in some["verdict"]
    points = comparing.per_seed(whole.scores, KID, "top1", "few")
    assert [point["seed"] for point in points] == [0, 2]
    assert points[0]["arm"] < points[0]["baseline"]
    assert comparing.difference(whole.scores, KID, "top1", "codec").low > 0  # type: ignore[union-attr]
    assert comparing.difference(whole.scores, KID, "top1", "nobody") is None
    assert comparing.difference(whole.scores, KID, "top1", "real") is None  # KID's floor has nothing to pair


def test_a_gain_by_copying_is_no_gain() -> None:
    prompts = prompt_set()
    stolen = {
        seed: {name: np.float32(real[:TEST] + 0.01 * generator(8, seed).normal(size=(TEST, WIDTH))) for name, real in REAL.items()}
        for seed in (0, 1, 2)
    }  # fmt: skip
    found = scored(prompts, features={"top1": stolen, "monolith": arm(prompts.rows, 0.9)}, scalars={}).scores
    judged = comparing.copying(found, "top1", "monolith")
    assert judged["grew"] and "copying grew" in judged["verdict"]
    first = comparing.comparisons(found, "top1", "monolith", primary=KID)[0]
    assert first["difference"]["high"] < 0 and not first["gain"] and not first["reached"]
    assert "does not count as a gain" in first["verdict"]


def test_circles_are_told_by_network() -> None:
    assert comparing.same_as_partition(EXTRACTORS, "efficientnet") == list(EXTRACTORS[:2])
    assert comparing.same_as_partition([*EXTRACTORS, "i3d"], "transnet") == ["transnet"]
    assert comparing.same_as_partition(EXTRACTORS, None) == []


def test_the_better_baseline_is_chosen_on_validation_by_the_mean_over_common_seeds(whole: Table) -> None:
    rows = np.arange(TRAIN, TRAIN + TEST)
    arms = {"monolith": arm(rows, 0.9), "small-batch": arm(rows, 0.6, (0, 1))}
    found = scored(prompt_set("validation", "validation"), features=arms, scalars={}).scores
    chosen = comparing.better_baseline(found, ["monolith", "small-batch"], KID)
    assert chosen["chosen"] == "small-batch" and chosen["set"] == "validation" and chosen["seeds"] == [0, 1]
    assert [one["arm"] for one in chosen["candidates"]] == ["monolith", "small-batch"]
    over_common = found["monolith", KID].estimate
    assert over_common is not None
    assert chosen["candidates"][0]["value"] == pytest.approx(over_common.values[:2].mean())
    assert chosen["difference"]["high"] < 0
    with pytest.raises(ArchipelError, match="never chosen by scores of test captions"):
        comparing.better_baseline(whole.scores, ["monolith", "twin"], KID)
    with pytest.raises(ArchipelError, match="nobody has no KID"):
        comparing.better_baseline(found, ["monolith", "nobody"], KID)
