"""Runs that are no folder of this machine, served to the unmodified client of OpenAI: a bucket, and an export."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from typing import Any

import av
import openai
import pytest
from tests.ensemble.conftest import build
from tests.serving.conftest import KEY
from tests.serving.test_serve_process import shell
from tests.serving.test_serve_slow import served, until_done

from archipel import Archipelago
from archipel.ensemble import provenance
from archipel.exchange.folder import export
from archipel.run import ROUTER
from archipel.serving.limits import Limits

_HARBOURS = runpy.run_path(str(Path(__file__).parents[1] / "islands" / "harbours.py"))
harbours, harbour = (_HARBOURS[name] for name in ("harbours", "harbour"))


def ask_for_a_clip(model: Any, tmp_path: Path, run_id: str) -> Any:
    with served(model, tmp_path / "state", Limits()) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=30)
        assert [one.id for one in client.models.list()] == [model.model]
        video = until_done(client, client.videos.create(prompt="a red ball", extra_body={"seed": 3}).id)
        assert video.status == "completed", video.error
        data = client.videos.download_content(video.id).read()
        with pytest.raises(openai.BadRequestError) as wrong:
            client.videos.create(prompt="x", extra_body={"strategy": "monolith"})
        client.videos.delete(video.id)
    with av.open(io.BytesIO(data)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
    (tmp_path / "clip.mp4").write_bytes(data)
    note = provenance.read(tmp_path / "clip.mp4")
    assert note is not None and (note["seed"], note["run"]) == (3, run_id)
    return wrong.value


def test_a_bucket(harbour: Any, tmp_path: Path) -> None:
    harbour.commit("0", "1", "2", ROUTER)
    harbour.admit("0", "2", ROUTER)  # an expert that was not admitted takes no part
    assert harbour.url.startswith("file://")
    wrong = ask_for_a_clip(Archipelago.load(harbour.url), tmp_path, harbour.run.id)
    assert wrong.param == "strategy" and harbour.url not in str(wrong)
    code, said = shell(harbour.url)  # there is no folder of its own for jobs
    assert code == 2 and "--state" in said


def test_an_export(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    folder = tmp_path / "exported"
    export(run.root, folder, monolith=False)
    wrong = ask_for_a_clip(Archipelago.load(folder), tmp_path, run.id)
    assert wrong.param == "strategy" and str(tmp_path) not in str(wrong)
    code, said = shell(folder)
    assert code == 2 and "--state" in said
