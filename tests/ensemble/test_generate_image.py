"""Clips that begin or end with a given picture: what the networks are told, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archipel import cache, cli, store
from archipel.config import Clips, build
from archipel.contracts import Conditioning
from archipel.encoders.codecs import from_uint8, still_latents
from archipel.ensemble import stage
from archipel.ensemble.images import check_given, read_frames
from archipel.ensemble.pipeline import Archipelago, Settings
from archipel.ensemble.stage import generate_arms
from archipel.errors import ArchipelError, DamagedError
from archipel.flow import draws
from archipel.run import Run

FIRST = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
LAST = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)


class Words:
    """A text encoder that makes up numbers from a caption."""

    name, tokens, width, pooled_width = "words", 5, 384, 384

    def encode(self, captions: Sequence[str]) -> Conditioning:
        tokens = torch.stack([torch.from_numpy(draws.normals(sum(map(ord, c)), [0], (5, 384))[0]) for c in captions])
        return Conditioning(tokens, torch.ones(len(captions), 5, dtype=torch.bool), tokens.mean(1))


@pytest.fixture
def model(given_root: Path) -> Archipelago:
    loaded = Archipelago.load(given_root)
    loaded.parts.text = Words()
    return loaded


# --- what the networks are told --------------------------------------------------------------------------------------


def test_the_condition_is_the_latents_of_the_still(model: Archipelago) -> None:
    codec = model.parts.codec
    one = model.given(3, FIRST[None], None)
    still = still_latents(codec, FIRST[None], 8)
    assert one is not None and one.shape == (3, 193, 2, 2, 2)
    assert torch.equal(one[:, :192, 0], still.expand(3, -1, -1, -1)) and (one[:, 192, 0] == 1).all()
    assert not one[:, :, 1].any()
    # of a codec in blocks: the block in which the frame stands still
    frozen = codec.encode(from_uint8(np.repeat(FIRST[None, None], 8, 1)))
    torch.testing.assert_close(still, frozen[:, :, 0])
    both = model.given(2, np.stack([FIRST, LAST]), LAST[None])
    assert both is not None and (both[:, 192] == 1).all()
    assert torch.equal(both[1, :192, 0], both[1, :192, 1]) and not torch.equal(both[0, :192, 0], both[0, :192, 1])
    assert torch.equal(both[:, :192, 1], still_latents(codec, LAST[None], 8).expand(2, -1, -1, -1))
    tail = model.given(1, None, LAST[None])
    assert tail is not None and not tail[:, :, 0].any() and (tail[:, 192, 1] == 1).all()
    assert model.given(1, None, None) is None


@pytest.mark.parametrize("strategy", ["top1", "full", "ancestral", "monolith"])
def test_pictures_reach_every_network_and_every_branch(model: Archipelago, strategy: str) -> None:
    seen: list[tuple[bool, torch.Tensor]] = []

    def listening(network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            assert cond.image is not None and len(cond.image) == len(x)
            seen.extend((bool(m.any()), i) for m, i in zip(cond.mask, cond.image, strict=True))
            return network(x, t, cond)

        return call

    lineup = model.lineup(Settings.of(model.config, strategy=strategy), None, 2)
    lineup.experts[:] = [listening(expert) for expert in lineup.experts]
    if lineup.router is not None:
        lineup.router.network = listening(lineup.router.network)
    cond, _ = model.encode(["a cat", "a dog"])
    image = model.given(2, np.stack([FIRST, LAST]), None)
    settings = Settings.of(model.config, strategy=strategy)
    model.sample(settings, cond.given(image), [1, 2], lineup=lineup)
    assert {told for told, _ in seen} == {True, False}, "both branches of guidance were asked"
    assert all(any(torch.equal(found, row) for row in image) for _, found in seen)
    for told in (True, False):
        assert any(torch.equal(found, image[1]) for text, found in seen if text is told)


def test_a_picture_changes_the_clip_and_nothing_else_does(model: Archipelago) -> None:
    words = {"strategy": "top1", "seeds": 3}
    plain = model.generate(["a cat", "a dog"], **words)
    begun = model.generate(["a cat", "a dog"], image=FIRST, **words)
    again = model.generate(["a cat", "a dog"], image=[FIRST, FIRST], batch=2, **words)
    other = model.generate(["a cat", "a dog"], image=[FIRST, LAST], **words)
    assert np.array_equal(begun.clips, again.clips)
    assert np.array_equal(other.clips[0], begun.clips[0]) and not np.array_equal(other.clips[1], begun.clips[1])
    assert not np.array_equal(plain.clips[0], begun.clips[0])
    ended = model.generate(["a cat", "a dog"], image=FIRST, last_image=LAST, **words)
    assert not np.array_equal(ended.clips[0], begun.clips[0])


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_become_frames_of_the_run(tmp_path: Path) -> None:
    clips = Clips(size=8)
    Image.fromarray(FIRST).save(tmp_path / "a.png")
    for picture in (FIRST, Image.fromarray(FIRST), tmp_path / "a.png", str(tmp_path / "a.png"), [FIRST], FIRST[None]):
        assert np.array_equal(read_frames(picture, 3, clips), FIRST[None])
    assert read_frames(None, 3, clips) is None
    several = read_frames([FIRST, LAST], 2, clips)
    assert np.array_equal(several, np.stack([FIRST, LAST]))
    # transparent pixels show the background, wide pictures are cut as clips are, and a camera's turn is heeded
    glass = np.zeros((8, 8, 4), np.uint8)
    assert (read_frames(glass, 1, Clips(size=8, background="#102030")) == (16, 32, 48)).all()
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    assert (read_frames(wide, 1, Clips(size=8, crop="center")) == 200).all()
    padded = read_frames(wide, 1, Clips(size=8, crop="pad", background="#0000ff"))
    assert (padded[0, 0] == (0, 0, 255)).all() and (padded[0, -1] == (0, 0, 255)).all()
    turned = Image.fromarray(FIRST)
    exif = turned.getexif()
    exif[0x0112] = 3  # taken upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_frames(tmp_path / "turned.png", 1, clips)[0], FIRST[::-1, ::-1])


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    clips = Clips(size=8)
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:900])
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    Image.new("1", (10_000, 8_000)).save(tmp_path / "huge.png")
    for picture, said in [
        (tmp_path / "none.png", "is not there"),
        (tmp_path, "is a folder"),
        (tmp_path / "text.png", "no picture that is read here"),
        (tmp_path / "torn.png", r"torn\.png cannot be read"),
        (tmp_path / "bomb.png", "more pixels than can be meant"),
        (tmp_path / "huge.png", "10000x8000 pixels"),
        (FIRST.astype(np.float32), "float32"),
        (FIRST[:, :, :1], r"\(8, 8, 1\)"),
        (FIRST[:0], "uint8"),
        (3, "int"),
        ([FIRST, FIRST, FIRST], "3 pictures were given as image for 2 prompts"),
        ([], "0 pictures"),
        ([FIRST, tmp_path / "none.png"], r"image 2: .* is not there"),
    ]:
        with pytest.raises(ArchipelError, match=said):
            read_frames(picture, 2, clips)  # type: ignore[arg-type]


def test_runs_that_were_not_trained_for_it_refuse_naming_the_key(
    small_run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = Archipelago.load(small_run.root)
    with pytest.raises(
        ArchipelError, match=r"cannot be given a first frame: it was trained on text only \(expert\.tasks"
    ):
        model.generate("a cat", image=FIRST)
    config = build({"expert": {"tasks": [1, 5, 0, 0]}, "clips": {"frames": 8}})
    assert check_given(config, True, False) == 1 and check_given(config, False, False) == 0
    for first, last, what in ((True, True, "a first and a last frame"), (False, True, "a last frame")):
        with pytest.raises(ArchipelError, match=rf"given {what}: it was trained with a first frame .*5\.0, .*1\.0"):
            check_given(config, first, last)
    Image.fromarray(FIRST).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "generate",
                str(small_run.root),
                "a cat",
                "--image",
                str(tmp_path / "a.png"),
                "-o",
                str(tmp_path / "o.gif"),
            ]
        )
    assert ended.value.code not in (0, None) and "expert.tasks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", str(small_run.root), "--arms", "--image", str(tmp_path / "a.png")])
    assert "leave --image" in capsys.readouterr().err


# --- the stage -------------------------------------------------------------------------------------------------------


def test_the_compared_arms_are_made_once_more_from_first_frames(given_root: Path, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(given_root, tmp_path / "run"))
    generate_arms(run)
    plain, begun = run.samples("test"), run.begun("test")
    assert begun.name == "test-first-frame"
    assert store.read_json(plain / "prompts.json") == store.read_json(begun / "prompts.json")
    assert sorted(path.stem for path in begun.glob("*.safetensors")) == ["monolith", "top1"]
    card = store.read_card(begun, "samples") or {}
    assert card["protocol"]["given"] == "first frame" and store.check_card(begun) == []
    assert "given" not in (store.read_card(plain, "samples") or {})["protocol"]
    model = Archipelago.load(run.root)
    plan = stage.plans(run)[-1]
    pixels = cache.open_kind(run.cache, "pixels")["clips"][plan.rows]
    image = model.given(6, pixels[:, 0], None)
    assert plan.begun and torch.equal(plan.cond.image, image), "the cached stills are those of generate --image"
    for arm in ("top1", "monolith"):
        told, alone = (store.map_tensors(folder / f"{arm}.safetensors")["clips"] for folder in (begun, plain))
        assert told.shape == (6, 8, 8, 8, 3) and not np.array_equal(told, alone)
        latents, _ = model.sample(Settings.of(run.config, strategy=arm), plan.cond, plan.seeds)
        assert np.array_equal(model.decode(latents), told)
    times = {path: path.stat().st_mtime_ns for path in begun.iterdir()}
    generate_arms(run)
    assert {path: path.stat().st_mtime_ns for path in begun.iterdir()} == times


def test_other_machines_are_sent_the_frames(given_root: Path, tmp_path: Path) -> None:
    def spread(make, items, root, needs, **more):  # type: ignore[no-untyped-def]
        for given in items:
            yield make(root, {name: np.array(value) for name, value in given.items()})

    roots = [Run.open(shutil.copytree(given_root, tmp_path / name)) for name in "ab"]
    generate_arms(roots[0])
    generate_arms(roots[1], spread=spread)
    one, other = (store.map_tensors(run.begun("test") / "top1.safetensors") for run in roots)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_cache_without_stills_is_named(build_run: Callable[..., Run]) -> None:
    run = build_run(evaluate={"count": 4, "arms": ["monolith"]}, sample={"strategy": "monolith"})
    plan = stage.Plan.of(run, "test", 4, ["monolith"], begun=True)
    entry = cache.open_kind(run.cache, "pixels")
    cache.set_index(run.cache, {"latents": entry.folder.name})
    with pytest.raises(DamagedError, match="archipel prepare"):
        _ = plan.cond
