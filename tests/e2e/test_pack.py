"""`archipel pack`: a finished run as a small folder in half precision, and what a shipped one is used like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from archipel import box, doctor, manifest, store
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError
from archipel.exchange import pack as packing
from archipel.exchange import sheets
from archipel.islands import trust
from archipel.run import Run

pytestmark = pytest.mark.slow
Inside = Callable[..., tuple[int, str]]

# The run's router has seen twenty steps: whether it beats the clusters' shares is not what is tested here.
RULES = trust.Trust(loss=trust.Loss.model_construct(required=True, bar=1.0, overall=10.0, router=5.0, tolerance=0.02))


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "a run"
    shutil.copytree(finished, folder)
    return folder


@pytest.fixture(scope="module")
def packed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("box") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "find", lambda *_: trust.Source(RULES, None))
        done = packing.pack(run, folder, licence="CC0-1.0", command="make it", commit="0123abc")
    assert done.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return folder


@pytest.fixture
def shipped(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(box, "root", lambda: packed.parent)
    return packed


def test_weights_are_halves_that_name_their_originals(run: Path, packed: Path) -> None:
    facts = box.facts(packed)
    for name in ("experts/0", "experts/1", "router", "codec"):
        assert store.check_card(packed / name) == []
        card, was = store.read_card(packed / name), store.read_card(run / name)
        assert card is not None and was is not None and card["run"] == was["run"]
        assert card["packed"] == {"dtype": "float16", "original": was["files"]["model.safetensors"]}
        assert facts["originals"][Path(name).name] == was["files"]["model.safetensors"]["sha256"]
        half, whole = (store.map_tensors(place / name / "model.safetensors") for place in (packed, run))
        assert half.keys() == whole.keys()
        for key, value in half.items():
            assert value.dtype == np.float16 and np.array_equal(value, whole[key].astype(np.float16))
    assert (packed / "run.toml").read_bytes() == (run / "run.toml").read_bytes()
    assert not (packed / "experts" / "monolith").exists()
    for name, entry in facts["files"].items():
        assert store.sha256_file(packed / name) == entry["sha256"]
    assert {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()} == {
        *facts["files"],
        box.FACTS,
    }
    assert set(facts["admitted"]) == {"0", "1", "router"} and all(
        "held-out" in said for said in facts["admitted"].values()
    )


def test_nothing_in_it_names_this_machine(run: Path, packed: Path) -> None:
    for path in packed.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(run).encode() not in data and str(Path.home()).encode() + b"/" not in data, path


def test_what_it_makes_is_what_the_run_makes(run: Path, packed: Path) -> None:
    model = Archipelago.load(packed)
    ours = model.generate(["a red ball", "two"], seed=3).clips.astype(float)
    theirs = Archipelago.load(run).generate(["a red ball", "two"], seed=3).clips.astype(float)
    assert np.sqrt(np.square(ours - theirs).mean()) < 2  # of 255 levels
    expert = model.parts.denoiser("0")
    assert {str(one.dtype) for one in expert.parameters()} == {"torch.float32"}  # type: ignore[attr-defined]
    found = box.facts(packed)["agreement"]
    assert 0 < max(found["velocity"].values()) <= found["tolerance"] and found["clips"]["min"] > 30
    with pytest.raises(ArchipelError, match="it holds experts and router only"):
        model.generate("a red ball", strategy="monolith")


def test_the_card_says_what_the_runs_files_say(run: Path, packed: Path) -> None:
    card = (packed / box.CARD).read_text()
    scores = json.loads((run / "scores" / "test.json").read_text())
    primary = Run.open(run).config.evaluate.primary
    assert {"top1", "monolith"} <= {row["arm"] for row in scores if row["metric"] == primary}
    for part in (
        f"{primary} (primary)",
        "**Monolith**",
        "**Archipelago (top-1)**",
        "make it",
        "0123abc",
        "CC0-1.0",
        "no connections",
    ):
        assert part in card, part
    assert "](" + sheets_of(packed)[0].name in card and "](" + sheets_of(packed)[1].name in card
    with Image.open(sheets_of(packed)[1]) as moving:
        assert getattr(moving, "n_frames", 1) > 1


def sheets_of(packed: Path) -> list[Path]:
    return [packed / packing.SHEET, packed / packing.BESIDE]


def test_the_captions_of_the_samples_follow_the_stated_rule(run: Path, packed: Path) -> None:
    said = box.facts(packed)["examples"]
    clips = manifest.read_manifest(run / "clips" / "manifest.parquet")
    captions = {clip.caption for clip in clips if clip.split == "train"}
    wanted = sorted(captions, key=lambda caption: store.sha256_bytes(caption.encode()))[:20]
    assert said["captions"] == wanted and "sha256" in said["rule"] and said["seed"] == 1


def test_a_sheet_is_the_same_bytes_and_small_enough_or_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), dtype=np.uint8)
    captions = ["one", "a caption that is far too long for a single line of so narrow a cell and for two as well", ""]
    for name in ("a.webp", "b.webp"):
        sheets.still(noise, captions, tmp_path / name, 400_000)
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()
    sheets.still(noise, captions, tmp_path / "c.webp", 8_000)
    assert (tmp_path / "c.webp").stat().st_size <= 8_000
    with pytest.raises(ArchipelError, match="100 are allowed"):
        sheets.still(noise, captions, tmp_path / "d.webp", 100)
    assert not (tmp_path / "d.webp").exists()


@pytest.mark.parametrize("fault", ["size", "all", "loss", "monolith"])
def test_a_run_that_may_not_ship_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    said = {
        "size": "a file of a box",
        "all": "at most 0.01 ship",
        "loss": "not admitted, loss",
        "monolith": "not finished",
    }
    own = tmp_path / "run"
    own.symlink_to(run)
    if fault in ("size", "all"):
        monkeypatch.setattr(packing, "MOST_FILE" if fault == "size" else "MOST_ALL", 10_000)
    if fault == "loss":
        monkeypatch.setenv("ARCHIPEL_TRUST", str(tmp_path / "strict.toml"))
        (tmp_path / "strict.toml").write_text("[loss]\nbar = 0.001\n")
    if fault == "monolith":
        monkeypatch.setattr(Run, "done", lambda self, folder: folder.name != "monolith")
    with pytest.raises(ArchipelError, match=said[fault]):
        packing.pack(own, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "strict.toml") == ["run"]


def test_a_file_that_names_the_machine_is_refused(run: Path, tmp_path: Path) -> None:
    opened = Run.open(run)
    for text in (f"made in {run}", "see /home/somebody/clips", json.dumps({"a": "/tmp/x"})):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(ArchipelError, match="cannot be passed on"):
            packing._check_names(opened, tmp_path)
    (tmp_path / "card.json").write_text(
        '{"at": "shards/0/train.safetensors", "of": "@a/b, 1/2 and https://x.org/data/y"}'
    )
    packing._check_names(opened, tmp_path)


# --- as the model that ships -------------------------------------------------------------------------------------------


def test_generate_takes_the_shipped_model_where_no_run_is_given(
    shipped: Path, tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert inside("generate", "a red ball", "--steps", "1", "--seed", "2", "-o", "a.png.webp")[0] == 0
    assert inside("generate", "box:", "a red ball", "--steps", "1", "--seed", "2", "-o", "b.webp")[0] == 0
    assert inside("generate", str(shipped), "a red ball", "--steps", "1", "--seed", "2", "-o", "c.webp")[0] == 0
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    assert inside("generate", "--prompts", "prompts.txt", "--steps", "1", "--seed", "2", "-o", "d.webp")[0] == 0
    first, *others = sorted(tmp_path.glob("*.webp"))
    assert len(others) == 3 and all(first.read_bytes() == other.read_bytes() for other in others)
    assert Archipelago.load().parts.run_id == Run.open(shipped).id


def test_what_may_be_a_mistyped_run_is_never_drawn(
    shipped: Path, tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "run.toml").write_text("")
    for word, said in (
        ("runs/emoji", "looks like a path"),
        ("./emoij", "looks like a path"),
        ("emoji/the best", "looks like a path"),
        ("emojy", "nearly the name of the run emoji"),
        ("emoji", "is a folder"),
        ("s3://bucket/run", "is a URL"),
        ("box:", "is a model"),
    ):
        code, heard = inside("generate", word, "-o", "x.mp4")
        assert code == 2 and said in heard, (word, heard)
    assert inside("generate", "box:other", "a ball")[0] == 2
    assert not list(tmp_path.glob("x*"))


def test_the_shipped_model_is_named(shipped: Path, inside: Inside, capsys: pytest.CaptureFixture[str]) -> None:
    code, heard = inside("model")
    assert (
        code == 0
        and "shapes: 2 experts and a router" in heard
        and "admitted router" in heard
        and "captions to try" in heard
    )
    assert inside("model", "--card")[1].startswith("---\nlibrary_name")
    lines = {line.name: line for line in doctor.examine()}
    assert lines["box"].fine and "2 experts" in lines["box"].detail


def test_without_a_shipped_model_it_is_said(tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "root", lambda: tmp_path)
    code, heard = inside("generate", "a red ball")
    assert code == 2 and "no model of its own" in heard
    assert inside("model")[0] == 2
    with pytest.raises(ArchipelError, match="no model of its own"):
        Archipelago.load()
    assert next(line for line in doctor.examine() if line.name == "box").fine
