"""``archipel import``: weights from elsewhere, held to the run; what does not fit changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.numpy import load_file, save_file
from tests.tiny import tiny_transformer

from archipel import store
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError, LockedError
from archipel.exchange.bring import bring
from archipel.exchange.folder import export
from archipel.run import Run
from archipel.training import heldout
from archipel.training.budget import write_ledger


def state(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): store.sha256_file(path) for path in folder.rglob("*") if path.is_file()
    }


def test_an_exported_expert_becomes_another_runs(own: Run, exported: Path) -> None:
    before = Archipelago.load(own.root).generate("a ball", strategy="expert-1", steps=2).clips
    shutil.rmtree(own.expert("2"))
    done = bring(own.root, "2", exported / "expert_1", licence="MIT")
    assert np.array_equal(Archipelago.load(own.root).generate("a ball", strategy="expert-2", steps=2).clips, before)
    card = store.read_card(own.expert("2"), "expert")
    assert card is not None and own.done(own.expert("2")) and not store.check_card(own.expert("2"))
    assert card["imported"]["license"] == "MIT" and card["imported"]["source"]["expert"] == "1"
    assert card["sha256"] == done.sha256 == store.sha256_file(own.expert("2") / "model.safetensors")
    assert done.loss is None and "not measured" in done.notes[0]
    assert state(own.expert("2")).keys() == {"card.json", "config.json", "model.safetensors"}


def test_what_is_there_is_kept_unless_forced(own: Run, exported: Path) -> None:
    before = state(own.expert("0"))
    with pytest.raises(ArchipelError, match="--force"):
        bring(own.root, "0", exported / "expert_1")
    assert state(own.expert("0")) == before
    bring(own.root, "0", exported / "expert_1", force=True)
    new, old = (load_file(own.expert(name) / "model.safetensors")["proj_out.bias"] for name in ("0", "1"))
    assert np.array_equal(new, old)
    assert sorted(path.name for path in (own.root / "experts").iterdir()) == ["0", "1", "2", "monolith"]


def test_plain_folders_of_diffusers_and_half_precision(own: Run, exported: Path, tmp_path: Path) -> None:
    network = FluxTransformer2DModel.from_pretrained(exported / "expert_1", torch_dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    assert (tmp_path / "plain" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    done = bring(own.root, "0", tmp_path / "plain", force=True)
    assert any("nothing in" in note for note in done.notes)
    kept = load_file(own.expert("0") / "model.safetensors")
    exact = load_file(own.expert("1") / "model.safetensors")
    assert kept["proj_out.weight"].dtype == np.float32
    assert all(np.array_equal(kept[name], torch.tensor(exact[name]).bfloat16().float().numpy()) for name in exact)
    card = store.read_card(own.expert("0"))
    assert card is not None and card["imported"]["stated"] is False and card["flops"] is None


def spoil(folder: Path, change: Any) -> Path:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def with_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_out.weight"][0, 0] = np.nan


def with_huge(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_out.weight"][0, 0] = 1e9


def without_one(tensors: dict[str, np.ndarray]) -> None:
    del tensors["proj_out.bias"]


def with_another(tensors: dict[str, np.ndarray]) -> None:
    tensors["backdoor"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_nan, "finite: .*proj_out.weight holds 1 numbers"),
        (with_huge, "larger than magnitude"),
        (without_one, "shape: tensor 'proj_out.bias' .* is None"),
        (with_another, "shape: tensor 'backdoor'"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    own: Run, exported: Path, tmp_path: Path, change: Any, said: str
) -> None:
    folder = spoil(Path(shutil.copytree(exported / "expert_1", tmp_path / "bad")), change)
    before = state(own.root)
    with pytest.raises(ArchipelError, match=said):
        bring(own.root, "0", folder, force=True)
    after = {name: value for name, value in state(own.root).items() if not name.startswith(".locks")}
    assert after == before
    assert sorted(path.name for path in (own.root / "experts").iterdir()) == ["0", "1", "2", "monolith"]


def test_other_networks_are_refused_naming_both(own: Run, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArchipelError, match="'WanTransformer3DModel', expert 0 of this run is a FluxTransformer2DModel"
    ):
        bring(own.root, "0", tiny_transformer("wan", tmp_path / "wan"), force=True)
    folder = Path(shutil.copytree(exported / "expert_1", tmp_path / "wide"))
    config = store.read_json(folder / "config.json")
    store.write_json(folder / "config.json", config | {"num_single_layers": 7})
    with pytest.raises(ArchipelError, match=r"num_single_layers of .* is 7, of this run 1"):
        bring(own.root, "0", folder, force=True)
    with pytest.raises(ArchipelError, match=r"whole export: name one of its experts, .*expert_0"):
        bring(own.root, "0", exported, force=True)
    with pytest.raises(ArchipelError, match="not a folder"):
        bring(own.root, "0", tmp_path / "nothing", force=True)
    with pytest.raises(ArchipelError, match="has experts 0, 1, 2"):
        bring(own.root, "monolith", exported / "expert_1", force=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codec": "0" * 64}, "of another codec"),
        ({"text": {"encoder": "t5", "tokens": 5, "sha256": ""}}, "the text encoder of"),
        ({"network": {"prediction": "x0"}}, "prediction of .* is 'x0', of this run 'velocity'"),
        ({"network": {"latent_shape": [192, 2, 2, 2]}}, "latent_shape of"),
    ],
)
def test_what_an_export_says_must_be_the_runs(
    own: Run, exported: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "out"))
    facts = store.read_json(folder / "archipel.json")
    facts["cards"]["1"]["network"] |= change.pop("network", {})
    store.write_json(folder / "archipel.json", facts | change)
    with pytest.raises(ArchipelError, match=said):
        bring(own.root, "0", folder / "expert_1", force=True)


def test_its_loss_is_held_to_the_owners_bar(own: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = own.shard("0")
    shard.mkdir(parents=True)
    (shard / "validation.safetensors").write_bytes(b"")
    found = heldout.Measured(loss=1.5, ratio=0.99, overall=1.0, clips=4)
    monkeypatch.setattr(heldout, "measure", lambda *_, **__: found)
    with pytest.raises(ArchipelError, match=r"loss: held-out loss 1\.5000 on 4 clips: 0\.990 .* the bar is 0\.95"):
        bring(own.root, "0", exported / "expert_1", force=True)
    (own.root / "trust.toml").write_text("[loss]\nrequired = false\n")
    assert bring(own.root, "0", exported / "expert_1", force=True).loss == 1.5
    card = store.read_card(own.expert("0"))
    assert card is not None and card["imported"]["loss"] == 1.5


def test_an_expert_in_training_is_left_alone(own: Run, exported: Path) -> None:
    with store.lock(own.root / ".locks" / "train-0.lock", "expert 0"), pytest.raises(LockedError):
        bring(own.root, "0", exported / "expert_1", force=True)


def test_the_ledger_never_calls_an_imported_run_matched(own: Run, exported: Path, tmp_path: Path) -> None:
    for name in own.job_names:
        folder = own.expert(name)
        card = store.read_card(folder)
        assert card is not None
        numbers = {"flops": 10, "steps": 1, "samples": 2, "parameters": 3, "seconds": 1.0}
        store.write_card(folder, "expert", own.id, card["files"], network=card["network"], **numbers)
    assert write_ledger(own)["ratio"] is not None
    bring(own.root, "0", exported / "expert_1", force=True)
    ledger = write_ledger(own)
    assert ledger["imported"] == ["0"] and ledger["ratio"] is None and not ledger["matched"]
    assert set(ledger["experts"]) == {"1", "2"}


def test_an_import_is_named_in_the_next_export(own: Run, exported: Path, tmp_path: Path) -> None:
    bring(own.root, "0", exported / "expert_1", force=True, licence="CC0-1.0")
    export(own.root, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "expert 0 (imported)" in text and "imported; licence: CC0-1.0" in text


def test_the_report_says_so(own: Run, exported: Path) -> None:
    from archipel.report.reading import Reader
    from archipel.report.training import ledger
    from archipel.report.verdict import compute_text

    bring(own.root, "2", exported / "expert_1", force=True)
    store.write_json(own.ledger, {"format": 1, "run": own.id, "imported": ["2"], "ratio": None, "arms": {}})
    cost = ledger(Reader(own))
    assert "expert 2 (imported)" in [row["name"] for row in cost["rows"]] and not cost["missing"]
    assert "(2 came from elsewhere)" in compute_text(cost)
