"""`archipel init` with parts from outside: the exact forms, what is said, and what is refused before anything is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.tiny_parts import tiny_pipeline

from archipel import cli
from archipel.run import Run


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.err + captured.out


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("wan") / "pipe", "wan")


def test_a_backbone_on_a_codec_and_a_text_encoder(
    pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipe.parent)  # a relative folder is written as an absolute one
    code, said = say(capsys, "init", tmp_path / "run", "--backbone", "wan", "--codec", "pipe", "--text", "pipe")
    assert code == 0, said
    assert f"codec: AutoencoderKLWan of {pipe}" in said and f"text: umt5 of {pipe}" in said
    run = Run.open(tmp_path / "run")
    assert run.config.clips.frames == 9 and run.config.codec.path == str(pipe)
    assert "weights:" not in said and "weights" not in (tmp_path / "run" / "run.toml").read_text()


def test_released_weights_bring_their_backbone(pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "router.width=8", "--set", "router.steps=1", "--set", "router.batch=1"]
    parts = ["--codec", pipe, "--text", pipe / "text_encoder", "--weights", pipe]
    code, said = say(capsys, "init", tmp_path / "run", "--preset", "tiny", *parts, *sets)
    assert code == 2 and "no tokenizer" in said and not (tmp_path / "run").exists()
    parts[3] = pipe
    code, said = say(capsys, "init", tmp_path / "run", "--preset", "tiny", *parts, *sets)
    assert code == 0 and f"weights: WanTransformer3DModel of {pipe}" in said, said
    assert Run.open(tmp_path / "run").config.expert.backbone == "wan"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backbone", "flux", "--weights", "PIPE"], "'flux' was asked for"),
        (["--backbone", "won"], "the nearest is 'wan'"),
        (["--codec", "PIPE/transformer"], "not one of the autoencoders"),
        (["--codec", "nowhere"], "there is no such folder"),
        (["--weights", "PIPE"], "makes 96 latent channels, but the WanTransformer3DModel"),
        (["--preset", "paris2"], "give it with --codec"),
    ],
)
def test_wrong_parts_end_with_two_and_one_sentence(
    arguments: list[str], says: str, pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("PIPE", str(pipe)) for word in arguments]
    code, said = say(capsys, "init", tmp_path / "run", *given)
    assert code == 2 and says in said and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "num_layers", "two"),
        ("transformer", "num_layers", -1),
        ("transformer", "num_layers", 10**8),
        ("transformer", "num_attention_heads", 10**9),
        ("transformer", "patch_size", [1, 0, 0]),
        ("text_encoder", "num_layers", 10**8),
        ("text_encoder", "vocab_size", 10**12),
    ],
)
def test_absurd_numbers_of_a_configuration(
    part: str, key: str, value: object, pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(pipe, tmp_path / "pipe")
    config = folder / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    parts = ["--codec", folder, "--text", folder, "--weights", folder]
    code, said = say(capsys, "init", tmp_path / "run", "--preset", "tiny", "--source", "shapes", *parts)
    assert code == 2 and key in said and "expected" in said, said
    assert not (tmp_path / "run" / "run.toml").exists()


def test_a_configuration_nested_without_end(pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(pipe, tmp_path / "pipe")
    (folder / "vae" / "config.json").write_text("[" * 200_000)
    code, said = say(capsys, "init", tmp_path / "run", "--preset", "tiny", "--backbone", "wan", "--codec", folder)
    assert code == 2 and "nested" in said, said
