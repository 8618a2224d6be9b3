"""``archipel export``: what is in the folder, and that nothing else is ever touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from safetensors.numpy import load_file

from archipel import store
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.exchange import folder as out
from archipel.exchange.folder import export
from archipel.run import ROUTER, Run


def test_the_folder_is_one_of_diffusers(whole: Run, exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    parts = {name for name, entry in index.items() if isinstance(entry, list)}
    assert parts == {
        "expert_0",
        "expert_1",
        "expert_2",
        "monolith",
        "router",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }
    for part, of in (("expert_1", "1"), ("monolith", "monolith"), ("router", ROUTER)):
        network = FluxTransformer2DModel.from_pretrained(exported / part)
        mine = load_file(whole.expert(of) / "model.safetensors")
        theirs = network.state_dict()
        assert set(mine) == set(theirs)
        assert all(np.array_equal(mine[name], theirs[name].numpy()) for name in mine)
    assert json.loads((exported / "router" / "calibration.json").read_text())["prior"] == [0.5, 0.3, 0.2]


def test_every_file_is_listed_with_its_hash(whole: Run, exported: Path) -> None:
    facts = store.read_json(exported / "archipel.json")
    here = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert set(facts["files"]) == here - {"archipel.json"}
    for name, entry in facts["files"].items():
        assert store.sha256_file(exported / name) == entry["sha256"]
    assert facts["run"] == whole.id and set(facts["cards"]) == {"0", "1", "2", "monolith", "router"}
    assert not [name for name in here if not name.endswith((".json", ".safetensors", ".md", ".txt"))]


def test_nothing_of_the_machine_goes_out(own: Run, tmp_path: Path) -> None:
    """Neither paths nor links into the run: whoever saves over the export must not write into it."""
    import tomli_w

    values: dict[str, Any] = own.config.model_dump(mode="json")
    values["clips"] |= {"source": "folder", "path": str(tmp_path / "private clips")}
    (own.root / "run.toml").write_text(tomli_w.dumps(values))
    moved = Run.open(own.root)
    for card in own.root.rglob("card.json"):
        found = store.read_json(card)
        store.write_sealed(card, {**found, "run": moved.id})
    shutil.rmtree(own.root / "cache")
    calibration = own.root / "router" / "calibration.json"
    store.write_json(calibration, {**store.read_json(calibration), "run": moved.id})
    from archipel.routing.router import seal

    fields = {key: value for key, value in store.read_json(calibration).items() if key != "sha256"}
    store.write_json(calibration, seal(fields))
    export(own.root, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert path.stat().st_nlink == 1 and not path.is_symlink()
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_only_exports_are_replaced(whole: Run, own: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    for force in (False, True):
        with pytest.raises(ArchipelError, match="no export of Archipel"):
            export(whole.root, mine, force=force)
    assert (mine / "thesis.txt").read_text() == "years"
    export(whole.root, tmp_path / "out")
    with pytest.raises(ArchipelError, match="--force"):
        export(whole.root, tmp_path / "out")
    (tmp_path / "out" / "extra.txt").write_text("old")
    export(whole.root, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "extra.txt").exists()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ArchipelError, match="a link"):
        export(whole.root, tmp_path / "link", force=True)


def test_a_failure_leaves_what_was_there(own: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(own.root, tmp_path / "out")
    before = store.sha256_file(tmp_path / "out" / "archipel.json")

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(out.model_card, "write", full)
        export(own.root, tmp_path / "out", force=True)
    assert store.sha256_file(tmp_path / "out" / "archipel.json") == before
    weights = own.expert("1") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DamagedError, match="archipel verify"):
        export(own.root, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]


def test_an_uncalibrated_router_is_refused(own: Run, tmp_path: Path) -> None:
    (own.expert(ROUTER) / "calibration.json").unlink()
    with pytest.raises(MissingStageError, match="archipel route"):
        export(own.root, tmp_path / "out")
    shutil.rmtree(own.expert("0"))
    with pytest.raises(MissingStageError, match="router"):
        export(own.root, tmp_path / "out", partial=True)


def test_the_model_card_says_what_the_run_says(own: Run, tmp_path: Path) -> None:
    card = store.read_card(own.clips)
    assert card is not None
    about = {"provenance": {"license": "CC-BY-4.0 (somebody)"}, "counts": {"used": 30, "groups": 12, "train": 9}}
    store.write_card(own.clips, "clips", own.id, card["files"], **about)
    rows = [
        {"arm": arm, "metric": "KID-efficientnet-appearance", "value": value, "low": value - 1, "high": value + 1}
        for arm, value in (("top1", 2.0), ("monolith", 4.0))
    ]
    store.write_json(own.scores("test"), rows)
    export(own.root, tmp_path / "out", licence="apache-2.0")
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "apache-2.0" and about["library_name"] == "diffusers"
    for said in ("CC-BY-4.0 (somebody)", "9 train", "2.0 (1.0 to 3.0)", "## Isolation", "no ledger here", "expert 2"):
        assert said in body, said
    assert store.read_json(tmp_path / "out" / "archipel.json")["source"]["license"] == "CC-BY-4.0 (somebody)"


def test_the_model_card_says_what_is_missing(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "other"
    assert "The run has no scores here." in text and "no ledger here" in text and "- 0: no record." in text


def test_a_packaged_codec_is_the_same_as_a_model(tmp_path: Path) -> None:
    from archipel.encoders.codecs import PatchPCA
    from archipel.exchange.parts import BlockCodec

    clips = np.random.default_rng(0).integers(0, 256, (4, 4, 16, 16, 3), dtype=np.uint8)
    codec = PatchPCA.fit(clips, np.arange(4), (2, 4, 4), 20, 0.5)
    BlockCodec.of(codec).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = BlockCodec.from_pretrained(tmp_path, torch_dtype=dtype).to(dtype).to("cpu", torch.float16)
        x = torch.rand(2, 3, 4, 16, 16) * 2 - 1
        assert torch.equal(again.encode(x), codec.encode(x))
        assert torch.equal(again.decode(codec.encode(x)), codec.decode(codec.encode(x)))
