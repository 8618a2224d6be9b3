"""Wrong use and wrong input end with code 2 and one message that names the key or value, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from archipel import cli


def run_cli(*arguments: str) -> tuple[int, str]:
    """Exit code and what was said, in this process (imports are paid once)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0), ""


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code, _ = run_cli(*arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.err + captured.out


def init_tiny(folder: Path, *more: str) -> None:
    assert run_cli("init", str(folder), "--source", "shapes", "--preset", "tiny", *more)[0] == 0


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ("expert.widht=3", "expert.width"),
        ("expert.width=50", "48 or 54"),
        ("expert.steps=zero", "expert.steps"),
        ("expert.steps=0", "expert.steps"),
        ("clips.frames=5", "4 or 6"),
        ("clips.size=30", "28 or 32"),
        ("expert.rope_axes=[8,8,6]", "sum to the head width"),
        ("codec.kind=pixel", "pixels"),
        ("partition.k=500", "partition.k"),
        ("clips.split=[0.5,0.1,0.1]", "clips.split"),
        ("expert.steps", "section.key=value"),
        ("partition.features=efficientnet", "evaluate.primary"),
    ],
)
def test_impossible_settings_are_refused_at_init(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: str, named: str
) -> None:
    extra = ["--set", "expert.heads=6", "--set", "expert.rope_axes=[2,2,4]"] if pair == "expert.width=50" else []
    code, said = say(
        capsys, "init", str(tmp_path / "run"), "--source", "shapes", "--preset", "tiny", *extra, "--set", pair
    )
    assert code == 2
    assert named in said
    assert not (tmp_path / "run").exists()


def test_unknown_source_and_preset_name_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "shapes" in say(capsys, "init", str(tmp_path / "r"), "--source", "shape")[1]
    code, said = say(capsys, "init", str(tmp_path / "r"), "--preset", "tinny")
    assert code == 2 and "tiny" in said


def test_later_sets_exit_2_naming_both_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_tiny(tmp_path / "run", "--set", "expert.steps=77")
    code, said = say(capsys, "run", str(tmp_path / "run"), "--set", "expert.steps=99")
    assert code == 2
    assert "77" in said and "99" in said


def test_a_run_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_tiny(tmp_path / "run")
    before = (tmp_path / "run" / "run.toml").read_bytes()
    assert say(capsys, "init", str(tmp_path / "run"), "--source", "shapes")[0] == 2
    assert (tmp_path / "run" / "run.toml").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    assert say(capsys, "init", str(tmp_path / "full"), "--source", "shapes")[0] == 2
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_missing_and_half_written_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = say(capsys, "run", str(tmp_path / "nowhere"))
    assert code == 2 and "archipel init" in said
    (tmp_path / "half").mkdir()
    assert say(capsys, "status", str(tmp_path / "half"))[0] == 2
    (tmp_path / "half" / "run.toml").write_text("format = 1\n[expert\n")
    code, said = say(capsys, "status", str(tmp_path / "half"))
    assert code == 2 and "TOML" in said


def test_a_newer_format_is_refused_naming_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_tiny(tmp_path / "run")
    path = tmp_path / "run" / "run.toml"
    path.write_text(path.read_text().replace("format = 1", "format = 7") + "\n[from_the_future]\nx = 1\n")
    code, said = say(capsys, "status", str(tmp_path / "run"))
    assert code == 2 and "format 7" in said and "newer" in said


def test_stages_name_the_stage_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_tiny(tmp_path / "run")
    for command, needed in (("partition", "prepare"), ("evaluate", "archipel"), ("route", "archipel")):
        code, said = say(capsys, command, str(tmp_path / "run"))
        assert code == 2, (command, said)
        assert needed in said


def test_wrong_expert_names_list_the_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_tiny(tmp_path / "run")
    code, said = say(capsys, "train", str(tmp_path / "run"), "7")
    assert code == 2 and "0, 1, monolith, router" in said
    code, said = say(capsys, "train", str(tmp_path / "run"), "../../etc")
    assert code == 2
    code, said = say(capsys, "train", str(tmp_path / "run"), "0", "--for", "soon")
    assert code == 2 and "30m" in said


def test_generate_asks_which_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_tiny(tmp_path / "run")
    code, said = say(capsys, "generate", str(tmp_path / "run"))
    assert code == 2 and "prompt is missing" in said
    assert say(capsys, "generate")[0] == 2
    assert say(capsys, "generate", "--run", str(tmp_path / "run"), "a", "b")[0] == 2


def test_usage_errors_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, "frobnicate")[0] == 2
    assert say(capsys, "init", "--sourc", "x")[0] == 2
    assert say(capsys, "--log-level", "loud", "doctor")[0] == 2
    assert say(capsys, "--version")[0] == 0


def test_a_file_where_a_folder_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert say(capsys, "init", str(tmp_path / "file"), "--source", "shapes")[0] == 2
    assert say(capsys, "init", str(tmp_path / "file" / "run"), "--source", "shapes")[0] == 2
    assert (tmp_path / "file").read_text() == "x"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv=['archipel','--help']\nfrom archipel import cli\ntry:\n cli.main()\nexcept SystemExit: pass\n"
    code += "heavy={'torch','diffusers','transformers','numpy','scipy','pyarrow','pydantic'} & set(sys.modules); sys.exit(len(heavy))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
