"""`archipel generate` from a shell and from Python: several clips, files of prompts, grids, notes, an export's folder."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.ensemble.test_ensemble_pipeline import Words
from tests.ensemble.test_ensemble_video import clip

import archipel
from archipel import cli
from archipel.edge import parse_bytes
from archipel.ensemble import parts, provenance, video
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError
from archipel.run import Run


@pytest.fixture
def run(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(parts.Parts, "text", Words())
    return small_run


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
    code = ended.value.code
    assert isinstance(code, int)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_top_package_hands_out_what_generates() -> None:
    assert archipel.Archipelago is Archipelago
    with pytest.raises(AttributeError, match="nothing"):
        _ = archipel.nothing  # type: ignore[attr-defined]


def test_python_takes_one_seed_and_a_count(run: Run, tmp_path: Path) -> None:
    model = archipel.Archipelago.load(run.root)  # type: ignore[attr-defined]
    made = model.generate("a red ball", seed=1, count=3)
    assert made.seeds == [1, 2, 3] and made.prompts == ["a red ball"] * 3
    assert np.array_equal(made.clips, model.generate(["a red ball"] * 3, seeds=1).clips)
    two = model.generate(["a red ball", "rain"], seed=4, count=2, batch=3)
    assert two.seeds == [4, 5, 6, 7] and two.prompts == ["a red ball", "a red ball", "rain", "rain"]
    assert two.weights is not None and two.weights.shape == (4, 3, 3) and two.expert_rows == 4 * 3 * 2
    for wrong, said in (({"seed": 1, "seeds": 2}, "not both"), ({"count": 0}, "count = 0")):
        with pytest.raises(ArchipelError, match=said):
            model.generate("a red ball", **wrong)
    paths = made.save(tmp_path / "c.webp")
    assert [provenance.read(path)["seed"] for path in paths] == [1, 2, 3]  # type: ignore[index]


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif", ""])
def test_every_file_says_what_made_it_and_no_more(run: Run, tmp_path: Path, suffix: str) -> None:
    made = Archipelago.load(run.root).generate("a secret prompt", seed=5, steps=2)
    (path,) = made.save(tmp_path / f"one{suffix}")
    note = provenance.read(path)
    assert note == {
        "generated_by": "a model, not a camera",
        "software": f"archipel {archipel.__version__}",
        "model": f"archipel-flux-3x-{run.id[:12]}",
        "run": run.id,
        "seed": 5,
        "settings": vars(made.settings),
    }
    (again,) = made.save(tmp_path / "elsewhere" / f"two{suffix}")
    files = [sorted(one.iterdir()) if one.is_dir() else [one] for one in (path, again)]
    for one, two in zip(*files, strict=True):
        data = one.read_bytes()
        assert data == two.read_bytes()
        assert b"secret" not in data and str(tmp_path).encode() not in data
    if suffix == ".webp":
        with Image.open(path) as image:
            assert provenance.SOURCE.encode() in image.info["xmp"]
    if suffix == "":
        assert all("Comment" in Image.open(one).info for one in path.iterdir())


def test_files_without_our_note_have_none(tmp_path: Path) -> None:
    assert provenance.read(video.write(tmp_path / "a.mp4", clip(), 8)) is None
    image = Image.new("RGB", (4, 4))
    buffer = io.BytesIO()
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><x>&a;</x>'
    for name, more in (
        ("a.gif", {"comment": b"not json {"}),
        ("a.webp", {"xmp": b"<broken"}),
        ("b.webp", {"xmp": bomb}),
    ):
        image.save(buffer, Path(name).suffix[1:], **more)
        (tmp_path / name).write_bytes(buffer.getvalue())
        assert provenance.read(tmp_path / name) is None
        buffer = io.BytesIO()
    with pytest.raises(ArchipelError, match="cannot be read"):
        provenance.read(tmp_path / "nothing.gif")


def test_a_grid_is_nearly_square_and_keeps_every_clip() -> None:
    clips = np.stack([np.full((2, 4, 6, 3), 10 * (i + 1), np.uint8) for i in range(5)])
    made = video.grid(clips)
    assert made.shape == (2, 2 * 4 + 1, 3 * 6 + 2, 3)
    assert (made[:, :4, 7:13] == 20).all() and (made[:, 5:, :6] == 40).all() and (made[:, 5:, 14:] == 0).all()
    assert (made[:, 4] == 0).all()
    assert np.array_equal(video.grid(clips[:1]), clips[0])
    with pytest.raises(ArchipelError, match="largest side"):
        video.grid(np.zeros((4, 1, 5000, 8, 3), np.uint8))


def test_several_clips_a_file_of_prompts_and_a_grid(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red ball\n\n  two green cats \n")
    root, out = str(run.root), tmp_path / "c.gif"
    more = ("--seed", "3", "--steps", "2", "--scale", "1", "--router-every", "2", "--router-until", "0.9")
    code, printed, err = say(capsys, "generate", root, "--prompts", str(file), "--count", "2", "-o", str(out), *more)
    assert code == 0, err
    names = [tmp_path / f"c-00{i}.gif" for i in range(4)]
    assert printed.split() == [str(name) for name in names] and "generate: 8/8" in err
    notes = [provenance.read(name) for name in names]
    assert [note["seed"] for note in notes if note] == [3, 4, 5, 6]
    assert notes[0] and notes[0]["settings"]["router_every"] == 2 and notes[0]["settings"]["router_until"] == 0.9
    code, printed, err = say(
        capsys, "generate", root, "a red ball", "--count", "3", "--grid", "--memory", "1GB", "-o", str(out), *more
    )
    assert code == 0 and printed.split() == [str(out)], err
    with Image.open(out) as image:
        assert image.size == (17, 17)
    assert provenance.read(out)["seed"] == [3, 4, 5]  # type: ignore[index]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"rain\n")))
    code, printed, err = say(capsys, "generate", root, "--prompts", "-", "-o", str(tmp_path / "rain.gif"), *more)
    assert code == 0 and (tmp_path / "rain.gif").is_file(), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "nowhere.txt"], "no such file"),
        (["a prompt", "--prompts", "p.txt"], "takes a run and no prompt"),
        (["--prompts", "empty.txt"], "no prompt"),
        (["--prompts", "binary.txt"], "not a text in UTF-8"),
        (["--prompts", "p.txt", "--count", "600"], "at most 1024"),
        (["rain", "--memory", "much"], "not a number of bytes"),
        (["rain", "--memory", "1kB"], "too little"),
        (["rain", "--host", "1GB"], "give both"),
        (["rain", "--router-every", "0"], "router_every = 0"),
        (["rain", "--router-until", "1.5"], "router_until = 1.5"),
        (["--arms", "--memory", "1GB"], "leave --memory out"),
    ],
)
def test_wrong_use_ends_with_2_and_a_sentence(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("rain\nsnow\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    code, printed, err = say(capsys, "generate", str(run.root), *words, "-o", "c.gif")
    assert code == 2 and said in err and not printed and not list(tmp_path.glob("c*.gif"))


def test_sizes() -> None:
    wanted = {"2GB": 2 * 10**9, "500mb": 5 * 10**8, "1.5GiB": 3 * 2**29, "7": 7, "3 k": 3000, "10B": 10}
    assert {text: parse_bytes(text) for text in wanted} == wanted
    for text in ("", "GB", "-1GB", "0", "nan", "1XB", "inf", "1e400"):
        with pytest.raises(ArchipelError, match="500MB"):
            parse_bytes(text)
