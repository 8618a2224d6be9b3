"""`archipel export` and `archipel import` as they are typed."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from archipel import cli, store
from archipel.run import Run


def call(*words: object) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert "Traceback" not in said.getvalue() and "internal error" not in said.getvalue(), said.getvalue()
    return int(ended.value.code or 0), said.getvalue()


def test_out_and_in_again(own: Run, tmp_path: Path) -> None:
    code, said = call("export", own.root, tmp_path / "out", "--license", "mit")
    assert code == 0 and "exported 3 experts" in said and "ArchipelPipeline" in said
    code, said = call("export", own.root, tmp_path / "out")
    assert code == 2 and "--force" in said
    shutil.rmtree(own.expert("0"))
    code, said = call("export", own.root, tmp_path / "less")
    assert code == 2 and "archipel train" in said and "--partial" in said
    code, said = call("export", own.root, tmp_path / "less", "--partial")
    assert code == 0 and "2 experts of 3" in said
    code, said = call("import", own.root, "0", tmp_path / "out" / "expert_1", "--license", "MIT")
    assert code == 0 and "imported expert 0" in said and "not measured" in said
    card = store.read_card(own.expert("0"))
    assert card is not None and card["imported"]["license"] == "MIT"
    code, said = call("import", own.root, "0", tmp_path / "out" / "vae", "--force")
    assert code == 2 and "BlockCodec" in said
    code, said = call("export", own.root, tmp_path / "alone", "--expert", "0")
    assert code == 2 and "FluxPipeline" in said
    code, said = call("status", own.root)
    assert code == 0
