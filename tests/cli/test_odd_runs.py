"""Runs as they come in life: given as a file, with a byte order mark, behind links, with odd names, half made."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from archipel import cli, pipeline, store
from archipel.errors import ArchipelError, ConfigError
from archipel.run import Run


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "internal error" not in captured.err
    return int(ended.value.code or 0), captured.err + captured.out


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return pipeline.init(tmp_path / "run", source="shapes", preset="tiny").root


@pytest.mark.parametrize("change", ["bom", "crlf", "both"])
def test_what_windows_editors_do_to_run_toml_is_read(
    tiny: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    path = tiny / "run.toml"
    data, config = path.read_bytes(), Run.open(tiny).config
    if change != "bom":
        data = data.replace(b"\n", b"\r\n")
    if change != "crlf":
        data = b"\xef\xbb\xbf" + data
    path.write_bytes(data)
    assert Run.open(tiny).config == config
    assert say(capsys, "status", tiny)[0] == 0


def test_a_run_given_as_a_file_names_the_folder(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = say(capsys, "status", tiny / "run.toml")
    assert code == 2 and f"give the run's folder, {tiny}" in said
    (tiny / "other").write_text("x")
    assert say(capsys, "run", tiny / "other")[0] == 2


@pytest.mark.parametrize("name", ["mit Leerzeichen", "été ☂ 船", "[/red] [b]", "-dash", "a\nb", "q'uo\"te"])
def test_odd_names_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert say(capsys, "init", "--source", "shapes", "--preset", "tiny", "--", name)[0] == 0
    code, said = say(capsys, "status", "--json", "--", name)
    assert code == 0 and json.loads(said)["root"] == name
    assert say(capsys, "status", "--", name)[0] == 0
    (tmp_path / "link").symlink_to(name)
    assert say(capsys, "verify", "link")[0] == 0


def test_an_init_that_was_killed_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.x7_a2.tmp.toml").write_text("format = ")
    assert say(capsys, "init", tmp_path / "run", "--source", "shapes")[0] == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "format is missing"),
        ("format = 1\n[expert]\nsteps = true\n", "expert.steps = True: expected a number"),
        ('format = 1\n[expert]\nsteps = "12"\n', "expert.steps = '12': expected a number"),
        ("format = 1\n[clips]\nsplit = [0.7, true, 0.2]\n", "clips.split"),
        ("format = 1\n[partition]\nbalanced = 1\n", "partition.balanced = 1: expected true or false"),
        ("format = 1\nexpert = 3\n", "expert"),
        ("format = 1\n[experts]\n", "did you mean expert"),
        ("format = 99\n", "format 99"),
        ("\x00", "TOML"),
    ],
)
def test_run_tomls_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    code, said = say(capsys, "run", tmp_path)
    assert code == 2 and named in said, said


def test_whole_numbers_serve_as_numbers(tmp_path: Path) -> None:
    run = pipeline.init(tmp_path / "run", source="shapes", preset="tiny", sets=["sample.guidance=3", "clips.fps=8"])
    assert run.config.sample.guidance == 3.0 and run.config.clips.fps == 8.0


def test_a_set_that_cannot_be_is_another_value_too(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = say(capsys, "run", tiny, "--set", "expert.width=63")
    assert code == 2 and "expert.width is 64" in said and "asks for 63" in said
    pipeline.open_run(tiny, ["expert.width=64", "clips.source=shapes", "codec.patch=[2, 4, 4]"])


def test_data_without_a_source_that_reads_it_is_refused(tmp_path: Path) -> None:
    for source in (None, "shapes", "fluent-emoji"):
        with pytest.raises(ConfigError, match="--source folder"):
            pipeline.init(tmp_path / "run", source=source, data=str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_data_is_found_again_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "clips").mkdir(parents=True)
    (tmp_path / "here" / "none").mkdir()
    for name in "abc":
        (tmp_path / "here" / "clips" / f"{name}.gif").write_bytes(b"")
    with tarfile.open(tmp_path / "here" / "a-0.tar", "w"):
        pass
    monkeypatch.chdir(tmp_path / "here")
    for given, found, settings in (
        ("clips", "clips", {"source": "folder", "data": "clips"}),
        ("clips", "clips", {"source": "folder", "sets": ["clips.path=../here/clips"]}),
        ("tars", "a-{0..0}.tar", {"source": "webdataset", "data": "a-{0..0}.tar"}),
        ("hub", None, {"source": "huggingface", "data": "somebody/clips"}),
    ):
        path = pipeline.resolve(**settings).clips.path
        assert path == (str(tmp_path / "here" / found) if found else "somebody/clips"), given
    with pytest.raises(ConfigError, match="holds no clips"):
        pipeline.resolve(source="folder", data="none")


@pytest.mark.parametrize(
    "data", ["pipe:touch owned", "pipe:curl https://example.org/a.tar", "https://example.org/a.tar"]
)
@pytest.mark.parametrize("source", ["webdataset", "folder"])
def test_commands_and_addresses_are_not_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = say(capsys, "init", "run", "--source", source, "--data", data)
    assert code == 2 and "command or a remote address" in said
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_tar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("clip.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    made, said = say(capsys, "init", tmp_path / "run", "--source", "webdataset", "--data", tmp_path / "a.tar")
    if made == 0:
        made, said = say(capsys, "prepare", tmp_path / "run")
    assert made == 2 and "a.tar" in said


@pytest.mark.slow
def test_without_a_network_the_first_use_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real npm, which finds every way out closed."""
    closed = "http://127.0.0.1:9"
    for name in ("npm_config_registry", "npm_config_proxy", "npm_config_https_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, closed)
    monkeypatch.setenv("npm_config_noproxy", "")
    assert say(capsys, "init", tmp_path / "run", "--source", "fluent-emoji", "--preset", "demo")[0] == 0
    code, said = say(capsys, "run", tmp_path / "run")
    assert code == 2 and "no network" in said and "--source shapes" in said
    assert not list(Path(os.environ["ARCHIPEL_CACHE"]).rglob("*.tgz"))


def test_a_read_only_cache_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mkdir = Path(os.environ["ARCHIPEL_CACHE"]), Path.mkdir

    def read_only(self: Path, *arguments: object, **options: object) -> None:
        if folder in self.parents:
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]

    assert say(capsys, "init", tmp_path / "run", "--source", "fluent-emoji", "--preset", "demo")[0] == 0
    monkeypatch.setattr(Path, "mkdir", read_only)
    code, said = say(capsys, "prepare", tmp_path / "run")
    assert code == 2 and "ARCHIPEL_CACHE" in said and str(folder) in said


def test_demo_continues_what_is_there_and_nothing_else(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = say(capsys, "demo", tiny, "--source", "fluent-emoji")
    assert code == 2 and "clips.source is 'shapes'" in said


# --- files that are not what they were -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card", ['{"format": 1', "[]", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {"a": {}}}', "\udcff"]
)
def test_a_torn_card_is_named(tiny: Path, capsys: pytest.CaptureFixture[str], card: str) -> None:
    run = Run.open(tiny)
    for folder in (run.expert("0"), run.clips):
        folder.mkdir(parents=True)
        (folder / "card.json").write_bytes(card.encode(errors="surrogateescape"))
        for verb in (["verify", tiny], ["status", tiny], ["generate", tiny, "a ball"]):
            code, said = say(capsys, *verb)
            assert code == 2 and str(folder / "card.json") in said, (verb, said)


def test_what_a_killed_writer_left_aside_is_no_damage_and_goes_away(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tiny)
    torn = run.scores("test").with_name(".test.abc.tmp.json")
    store.write_text(torn, "[{")
    assert say(capsys, "verify", tiny)[0] == 0
    monkeypatch.setattr("archipel.evaluation.stage.evaluate", lambda *_: None)
    pipeline.evaluate(run)
    assert not torn.exists()


def test_a_full_disk_names_the_file_it_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, said = say(capsys, "init", tmp_path / "run", "--source", "shapes")
    assert code == 2 and "disk is full" in said and str(tmp_path / "run" / "run.toml") in said
    assert list((tmp_path / "run").iterdir()) == []
    assert say(capsys, "init", tmp_path / "run", "--source", "shapes")[0] == 0


# --- the edge --------------------------------------------------------------------------------------------------------


def fault(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raising(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "open_run", raising)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("oh"), 1, "internal error: ZeroDivisionError: oh"),
        (ArchipelError("expert.steps"), 2, "error: expert.steps"),
        (KeyboardInterrupt(), 130, "kept"),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), 2, "archipel[all]"),
        (FileNotFoundError(2, "No such file", "/x/y"), 2, "/x/y"),
        (OSError(5, "Input/output error"), 2, "disk"),
    ],
)
def test_tracebacks_are_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    fault(monkeypatch, error)
    for asked in (False, True):
        if asked:
            monkeypatch.setenv("ARCHIPEL_DEBUG", "1")
        with pytest.raises(SystemExit) as ended:
            cli.main(["status", "run"])
        heard = capsys.readouterr().err
        assert ended.value.code == code and said in heard
        if not isinstance(error, KeyboardInterrupt):
            assert ("Traceback" in heard) is asked


def test_log_levels_reach_the_screen(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("archipel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda _: (logger.info("a detail"), (0, []))[1])
        assert "a detail" not in say(capsys, "verify", tiny)[1]
        assert "INFO: a detail" in say(capsys, "--log-level", "info", "verify", tiny)[1]
        assert "a detail" not in say(capsys, "--log-level", "ERROR", "verify", tiny)[1]


def test_a_reader_that_goes_away_is_no_error(tiny: Path) -> None:
    program = "import sys; from archipel import cli; cli.main(['status', sys.argv[1], '--json'])"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program, tiny], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b"", done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_outputs_are_no_fault(tiny: Path, closed: str) -> None:
    program = "import sys; from archipel import cli; cli.main(['verify', sys.argv[1]])"
    done = subprocess.run(
        ["sh", "-c", f'"$1" -c "$2" "$3" {closed}', "sh", sys.executable, program, tiny],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "error" not in done.stderr + done.stdout, done.stderr


def test_nothing_phones_home(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from archipel.islands.launch import local

    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert say(capsys, "status", tiny)[0] == 0
    assert os.environ.pop("HF_HUB_DISABLE_TELEMETRY") == "1"
    child = local._environment(1, "")
    assert child["HF_HUB_DISABLE_TELEMETRY"] == "1" and child["HF_HUB_OFFLINE"] == "1"
