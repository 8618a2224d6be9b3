"""What can be asked of a finished run, and what is refused at once, in a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from archipel import store

pytestmark = pytest.mark.slow

Inside = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["x" * 10_000], "10000 characters"),
        ([""], "empty"),
        (["   "], "empty"),
        (["a \ud800 ball"], "not text"),
        (["a ball", "--steps", "0"], "steps = 0"),
        (["a ball", "--steps", "-3"], "steps = -3"),
        (["a ball", "--steps", "100000"], "1000"),
        (["a ball", "--steps", "many"], "--steps"),
        (["a ball", "--guidance", "nan"], "guidance"),
        (["a ball", "--seed", "-1"], "seed"),
        (["a ball", "--count", "0"], "--count"),
        (["a ball", "--strategy", "top-1"], "top1"),
        (["a ball", "--strategy", "top9"], "top1 to top2"),
        (["a ball", "--strategy", "oracle"], "oracle"),
        (["a ball", "-o", "clip.xyz"], ".mp4"),
    ],
)
def test_impossible_wishes_are_refused(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inside: Inside,
    words: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = inside("generate", finished, *words)
    assert code == 2 and named in said, said
    assert list(tmp_path.iterdir()) == []


def test_a_long_prompt_is_cut_and_told(finished: Path, tmp_path: Path, inside: Inside) -> None:
    words = ["a red ball bounces " * 20, "--steps", 1, "--strategy", "monolith", "-o", tmp_path / "a.gif"]
    code, said = inside("generate", finished, *words)
    assert code == 0 and "only its first 12 tokens" in said, said
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF8")


def test_several_clips_as_webp(finished: Path, tmp_path: Path, inside: Inside) -> None:
    words = ["a blue star", "--strategy", "ancestral", "--steps", 1, "--count", 2, "-o", tmp_path / "new" / "c.webp"]
    code, said = inside("generate", "--run", finished, *words)
    assert code == 0, said
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["c-000.webp", "c-001.webp"]


def test_a_run_that_is_trained_in_part_generates_what_it_can(copy: Path, tmp_path: Path, inside: Inside) -> None:
    shutil.rmtree(copy / "experts" / "1")
    code, said = inside("generate", copy, "a ball", "--steps", 1, "-o", tmp_path / "a.gif")
    assert code == 0 and "1 of 2 experts missing" in said and "archipel train" in said and " 1`" in said, said
    code, said = inside("generate", copy, "a ball", "--strategy", "expert-1", "-o", tmp_path / "b.gif")
    assert code == 2 and "archipel train" in said and not (tmp_path / "b.gif").exists(), said
    words = ["a ball", "--strategy", "monolith", "--steps", 1, "-o", tmp_path / "frames"]
    assert inside("generate", copy, *words)[0] == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 4


def test_verify_names_damaged_files_and_they_are_not_used(copy: Path, tmp_path: Path, inside: Inside) -> None:
    for victim in ("experts/0/model.safetensors", "shards/1/train.safetensors"):
        data = bytearray((copy / victim).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / victim).write_bytes(data)
    (copy / "router" / "config.json").unlink()
    store.write_text(copy / "scores" / "test.json", "[{")
    code, said = inside("verify", copy)
    assert code == 2
    for name in ("experts/0/model.safetensors", "shards/1/train.safetensors", "router/config.json", "scores/test.json"):
        assert name in said
    for strategy in ("full", "oracle", "top1"):
        code, said = inside("generate", copy, "a ball", "--strategy", strategy, "-o", tmp_path / "x.mp4")
        assert code == 2, said
    assert not (tmp_path / "x.mp4").exists()


def test_cards_of_a_newer_format_are_refused_by_every_verb(copy: Path, tmp_path: Path, inside: Inside) -> None:
    path = copy / "experts" / "0" / "card.json"
    store.write_sealed(path, {**store.read_json(path), "format": 8})
    made = ["generate", copy, "a ball", "-o", tmp_path / "a.gif"]
    for verb in (["run", copy], ["status", copy], ["train", copy, "0"], ["verify", copy], ["report", copy], made):
        code, said = inside(*verb)
        assert code == 2 and "format 8" in said and "newer" in said, (verb, said)


def test_a_run_toml_changed_after_work_began_is_noticed(copy: Path, inside: Inside) -> None:
    path = copy / "run.toml"
    text = path.read_text()
    for changed in (text.replace("guidance = ", "guidance = 1"), text.replace("\n", "\r\n")):
        path.write_bytes(changed.encode())
        code, said = inside("run", copy)
        assert code == 2 and "changed" in said, said
    path.write_bytes(text.encode())
    assert inside("status", copy)[0] == 0
