"""`archipel fvd` and `archipel evaluate RUN --against` as people and scripts call them, with the packaged networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from archipel import cli, store


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(ended.value.code or 0), captured.out, captured.err


def fill(folder: Path, count: int, seed: int, suffix: str = ".webp") -> Path:
    folder.mkdir(parents=True)
    draw = np.random.Generator(np.random.PCG64(seed))
    for i in range(count):
        frames = [Image.fromarray(np.uint8(draw.integers(0, 255, (24, 32, 3)))) for _ in range(4)]
        frames[0].save(folder / f"{i}{suffix}", save_all=True, append_images=frames[1:], duration=250, loop=0)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return fill(tmp_path / "real", 5, 1), fill(tmp_path / "made", 4, 2, ".gif")


@pytest.mark.slow
def test_fvd_prints_one_json_document(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "fvd", *two, "--extractor", "efficientnet", "--json", "--size", 32)
    assert code == 0, err
    found = json.loads(out)
    assert (found["a"]["clips"], found["b"]["clips"], found["divisor"]) == (5, 4, "n-1")
    assert {row["metric"] for row in found["scores"]} == {"FD-efficientnet-appearance", "KID-efficientnet-appearance"}
    row = found["scores"][0]
    assert row["low"] <= row["value"] <= row["high"] and len(row["protocol"]["weights"]) == 64
    assert any("too few clips to conclude: 5 and 4" in note for note in found["notes"])


@pytest.mark.slow
def test_fvd_prints_a_table_for_people(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "fvd", *two, "--extractor", "motion", "--extractor", "transnet", "--size", 32)
    assert code == 0, err
    assert "B against A" in out and "floor: 2 of A" in out and "transnet" in out and " motion " in out
    assert "too few clips to conclude" in err and "FVD" not in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--extractor", "effnet"], "'effnet' is not an extractor"),
        (["--extractor", "i3d"], "i3d=FILE@sha256:HEX"),
        (["--extractor", "clip"], "gives no features"),
        (["--weights", "i3d=x.pt"], "add --extractor i3d"),
        (["--weights", "x.pt"], "write NAME=WHERE"),
        (["--extractor", "i3d", "--weights", "i3d=x.pt"], "torchscript"),
        (["--crop", "round"], "crop"),
        (["--frames", "-1"], "frames"),
    ],
)
def test_wrong_options_of_fvd_are_told(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    code, out, err = call(capsys, "fvd", *two, *more)
    assert code == 2 and out == "" and words.lower() in err.lower()


def test_wrong_folders_are_told_before_a_network_is_loaded(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from archipel.evaluation.extractors import Judges

    monkeypatch.setattr(Judges, "open", lambda *_, **__: pytest.fail("was loaded"))
    real, _ = two
    (tmp_path / "empty").mkdir()
    for other, words in ((real, "same folder"), (tmp_path / "no", "no such folder"), (tmp_path / "empty", "no clips")):
        code, _, err = call(capsys, "fvd", real, other)
        assert code == 2 and words in err


@pytest.mark.slow
def test_evaluate_against_scores_a_folder_on_a_prepared_run(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", two[0]
    sets = ["--set", "clips.count=24", "--set", "partition.fine=4"]
    assert call(capsys, "init", run, "--source", "shapes", "--preset", "tiny", *sets)[0] == 0
    code, _, err = call(capsys, "evaluate", run, "--against", folder)
    assert code == 2 and "archipel prepare" in err
    assert call(capsys, "prepare", run)[0] == 0
    (folder / "captions.csv").write_text("file,caption\n" + "".join(f"{i}.webp,a blue box {i}\n" for i in range(5)))
    code, out, err = call(capsys, "evaluate", run, "--against", folder)
    assert code == 0, err
    assert "KID-transnet" in out and "folder real" in out
    path = next((run / "scores").glob("against-real-????????.json"))
    rows = store.read_json(path)
    assert {row["arm"] for row in rows} == {"folder real", "real"} and str(path) in err.replace("\n", "")
    code, _, err = call(capsys, "evaluate", run)
    assert code == 2 and "archipel generate" in err
