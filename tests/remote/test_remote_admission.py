"""The door for experts elsewhere: signed card, its run and expert, and a held-out loss measured through the endpoint."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.remote.conftest import TOKEN, Counted, listening

from archipel import Archipelago, cli, store
from archipel.contracts import Conditioning
from archipel.errors import ArchipelError
from archipel.islands import trust
from archipel.remote import known, signing
from archipel.remote.admission import admit
from archipel.run import Run
from archipel.serving import island as islands
from archipel.serving.island import App, Bounds, Island
from archipel.training.stage import train

_RUNS = str(Path(__file__).parents[1] / "training" / "runs.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with shards of two experts, the first of which was trained, for seconds."""
    run: Run = runpy.run_path(_RUNS)["make_run"](tmp_path_factory.mktemp("trained") / "run")
    card = json.loads((run.shard("0") / "card.json").read_text())
    counts = {"train": 12, "validation": 4}
    store.write_card(run.shard("0"), "shard", run.id, list(card["files"]), cluster=card["cluster"], counts=counts)
    train(run, "0", threads=1)
    return run.root


class Door:
    """The run without expert 0, which ``island`` offers; the owner trusts ada's key."""

    def __init__(self, trained: Path, folder: Path) -> None:
        self.run = Run.open(shutil.copytree(trained, folder / "run"))
        shutil.rmtree(self.run.expert("0"))
        self.key, self.other = folder / "ada.key", folder / "eve.key"
        public = trust.keygen(self.key)
        trust.keygen(self.other)
        (self.run.root / "trust.toml").write_text(f'[[signature.keys]]\nname = "ada"\nkey = "{public}"\n')
        self.island = islands.opened(trained, "0", device="cpu", key=self.key)
        self.record = self.run.root / "remote" / "0.json"

    def ask(self, island: Island, url: str | None = None) -> Any:
        counted = Counted(App(island, [TOKEN], Bounds()))
        with listening(counted) as there:
            (self.run.root / "site.toml").write_text(
                f'[remote.0]\nurl = "{url or there}"\ntoken_env = "ISLAND_TOKEN"\n'
            )
            answer = admit(self.run.root, "0")
        self.asked = counted.asked
        return answer

    def refused(self, rule: str, words: str, **change: Any) -> None:
        self.record.parent.mkdir(exist_ok=True)
        self.record.write_text("an earlier admission")
        answer = self.ask(replace(self.island, **change))
        assert (answer.admitted, answer.rule) == (False, rule) and words in answer.detail, answer
        assert not self.record.exists()


@pytest.fixture
def door(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.setenv("ISLAND_TOKEN", TOKEN)
    return Door(trained, tmp_path)


def _main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def _signed(door: Door, card: bytes) -> dict[str, Any]:
    told = signing.sign(door.key, door.run.id, "0", card)
    return {"card": card, "version": store.sha256_bytes(card), **told}


def test_an_honest_expert_is_admitted(door: Door) -> None:
    answer = door.ask(door.island)
    assert answer.admitted and "signed by ada" in answer.detail and "held-out loss" in answer.detail
    assert door.asked[0] == "/v1/expert" and set(door.asked[1:]) == {"/v1/velocity"}
    admission = known.recorded(door.record.parent, "0")
    assert admission is not None and (admission.sha256, admission.signer) == (door.island.version, "ada")
    claimed = json.loads(door.island.card)["validation"]["ema"]["loss"]
    assert float(answer.detail.split("held-out loss ")[1].split()[0]) == pytest.approx(claimed, abs=2e-4)


def test_unsigned_and_foreign_cards(door: Door) -> None:
    door.refused("signature", "not signed", signature="", signer="")
    assert set(door.asked) == {"/v1/expert"}  # nothing is measured of an expert that nobody vouches for
    door.refused("signature", "does not list", **signing.sign(door.other, door.run.id, "0", door.island.card))
    door.refused("signature", "is not ada's", **signing.sign(door.key, door.run.id, "1", door.island.card))
    commit = trust.sign(door.key, trust.payload(door.run.id, "0", 1, door.island.version))
    door.refused("signature", "is not ada's", **commit)
    (door.run.root / "trust.toml").unlink()
    door.refused("signature", "names no key")


def test_cards_that_are_not_this_experts(door: Door) -> None:
    door.refused("config", "it is run", run="0" * 64)
    door.refused("config", "it is expert", name="1")
    card = json.loads(door.island.card)
    seal = card.pop("check")
    for change, rule in (
        ({"steps": 1}, "config"),
        ({"name": "1"}, "config"),
        ({"check": "0" * 64}, "checksum"),
        ({"check": seal, "seconds": 0.0}, "checksum"),
    ):
        door.refused(rule, "card.json", **_signed(door, json.dumps({**card, **change}).encode()))
    door.refused("format", "not JSON", **_signed(door, b"{"))


class Worse:
    """A network whose answers are not those of the card's weights."""

    def __init__(self, network: Any, change: Any) -> None:
        self.network, self.change = network, change

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.change(self.network(x, t, cond))  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", [torch.zeros_like, torch.neg, lambda v: 0.5 * v])
def test_a_loss_that_misses_the_bar_or_the_claim(change: Any, door: Door) -> None:
    door.refused("loss", "held-out loss", network=Worse(door.island.network, change))


def test_answers_that_cannot_be_are_no_admission(door: Door) -> None:
    with pytest.raises(ArchipelError, match=r"not finite|error"):
        door.ask(replace(door.island, network=Worse(door.island.network, lambda v: v * torch.nan)))
    with pytest.raises(ArchipelError, match="cannot be asked"):
        door.ask(door.island, "http://127.0.0.1:9")
    with pytest.raises(ArchipelError, match=r"no \[remote.1\]"):
        admit(door.run.root, "1")


def test_the_verb_and_a_clip_afterwards(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(App(door.island, [TOKEN], Bounds())) as url:
        (door.run.root / "site.toml").write_text(f'[remote.0]\nurl = "{url}"\ntoken_env = "ISLAND_TOKEN"\n')
        assert _main(["admit", str(door.run.root), "0", "--remote"]) == 0
        assert "admitted" in capsys.readouterr().out
        archipelago = Archipelago.load(door.run.root)
        assert archipelago.parts.available()["0"] == f"remote-{door.island.version}"
        assert _main(["admit", str(door.run.root), "1", "--remote"]) == 2
        assert _main(["admit", str(door.run.root), "0", "--remote", "--reopen"]) == 2


def test_an_island_needs_a_token_to_be_reached_and_an_expert(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ARCHIPEL_EXPERT_TOKEN", raising=False)
    assert _main(["serve", str(trained), "--expert", "0", "--host", "0.0.0.0"]) == 2
    assert "ARCHIPEL_EXPERT_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("ARCHIPEL_EXPERT_TOKEN", "short")
    assert _main(["serve", str(trained), "--expert", "0"]) == 2
    monkeypatch.setenv("ARCHIPEL_EXPERT_TOKEN", TOKEN)
    assert _main(["serve", str(trained), "--expert", "7"]) == 2
    assert "experts 0 to 1" in capsys.readouterr().err
    assert _main(["serve", str(trained), "--key", "k"]) == 2
