"""`archipel doctor`, `archipel cache` and the generated pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from archipel import __version__, cli, docs, doctor, store
from archipel.errors import ArchipelError


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.err + captured.out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a download, and something that is not ours."""
    folder = tmp_path / "cache"
    (folder / "npm" / ".part-abc").mkdir(parents=True)
    (folder / "npm" / "some-package-1.0.0.tgz").write_bytes(bytes(2_500_000))
    (folder / "npm" / ".part-abc" / "half").write_bytes(bytes(500_000))
    (folder / "thesis.txt").write_text("years of work")
    monkeypatch.setenv("ARCHIPEL_CACHE", str(folder))
    return folder


def test_doctor_says_what_a_bug_report_needs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = say(capsys, "doctor")
    assert code == 0, said
    for word in (__version__, "torch: 2", "diffusers: ", "cpu: ", "gpu", "extra data: complete", "GB free", "3.0 MB"):
        assert word in said, word
    assert str(cache) in said


def test_doctor_fails_where_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_BASE", ("no-such-package",))
    monkeypatch.setattr(doctor, "_EXTRA", {"eval": ("no-such-extra",)})
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    code, said = say(capsys, "doctor")
    assert code == 2
    assert "FAIL no-such-package: missing" in said and "FAIL temporary files" in said
    assert "ok   extra eval: missing no-such-extra: pip install 'archipel[eval]'" in said


def test_the_cache_is_listed_and_cleaned_and_nothing_else_is_touched(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cache / "runs" / ("0" * 64)  # a bucket's run that somebody generated from
    (run / ".locks").mkdir(parents=True)
    (run / "run.toml").write_bytes(bytes(100_000))
    assert f"0.1 MB  {run}" in say(capsys, "cache", "list")[1]
    with store.lock(run / ".locks" / "codec.lock", "a fetch"):
        code, said = say(capsys, "cache", "clean", "--yes")
        assert code == 2 and "another process" in said and (run / "run.toml").is_file()
    doctor.clean_run(run)
    assert not run.exists()
    code, said = say(capsys, "cache", "list")
    assert code == 0 and "2.5 MB" in said and "3.0 MB  in all" in said and "thesis" not in said
    monkeypatch.setattr("typer.confirm", lambda _: False)
    assert say(capsys, "cache", "clean")[0] == 0
    assert len(doctor.cache_entries()) == 2
    with store.lock(cache / "npm" / ".lock", "a download"):
        code, said = say(capsys, "cache", "clean", "--yes")
        assert code == 2 and "another process" in said and len(doctor.cache_entries()) == 2
    code, said = say(capsys, "cache", "clean", "--yes")
    assert code == 0 and "removed 3.0 MB" in said
    assert [path.name for path in (cache / "npm").iterdir() if path.name != ".lock"] == []
    assert (cache / "thesis.txt").read_text() == "years of work"
    code, said = say(capsys, "cache", "clean", "--yes")
    assert code == 0 and "nothing to remove" in said


def test_a_cache_that_is_not_there_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path / "none"))
    assert say(capsys, "cache", "list")[0] == 0
    assert say(capsys, "cache", "clean")[0] == 0
    assert not (tmp_path / "none").exists()


def test_generated_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    docs.main(["--check"])


def test_an_outdated_page_is_noticed_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArchipelError, match="make docs"):
        docs.main(["--check"])
    docs.main([])
    docs.main(["--check"])
    page = Path("docs/configuration.md").read_text()
    for row in ("| `steps` | integer | `1000` | ≥ 1 |", "| 130 | interrupted", "- **demo**: ", "ARCHIPEL_DEBUG"):
        assert row in page
    store.write_text(Path("docs/configuration.md"), page + "\n")
    with pytest.raises(ArchipelError, match="out of date"):
        docs.main(["--check"])
