"""A small published run with one honest result, and the tools of a forger. Loaded by path (tests are no package)."""

from __future__ import annotations

import hashlib
import json
import math
import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.islands import keys
from archipel.islands.admission import Answer, admit
from archipel.islands.objects import encode
from archipel.islands.publish import publish
from archipel.progress import StopFlag
from archipel.run import MONOLITH, Run

_RUNS = runpy.run_path(str(Path(__file__).parents[1] / "training" / "runs.py"))
NONCE = "5e" * 16


def make_run(root: Path) -> Run:
    """A run with shards that are counted; expert 0, expert 1 and the router are trained, for seconds in all."""
    from archipel.routing.stage import train_router
    from archipel.training.stage import train

    run: Run = _RUNS["make_run"](root, router={"steps": 60, "lr": 0.01})
    for name in (*run.expert_names, MONOLITH):
        card = json.loads((run.shard(name) / "card.json").read_text())
        counts = {"train": 12, "validation": 4}
        prior = {"prior": [0.5, 0.5]} if name == MONOLITH else {}
        store.write_card(
            run.shard(name), "shard", run.id, list(card["files"]), cluster=card["cluster"], counts=counts, **prior
        )
    store.write_tensors(run.codec / "model.safetensors", {"mean": np.zeros(3, np.float32)})
    store.write_card(run.codec, "codec", run.id, ["model.safetensors"])
    for name in ("0", "1"):
        train(run, name, threads=1)
    train_router(run, threads=1)
    return run


def make_bucket(run: Run, root: Path) -> Path:
    """The run published into a folder, with the results of jobs 0, 1 and router committed by fence 1."""
    with StopFlag() as stop:
        publish(run, str(root), stop)
    for name in ("0", "1", "router"):
        target = root / keys.result(name, 1)
        target.mkdir(parents=True)
        for file in ("config.json", "metrics.jsonl", "model.safetensors", "card.json"):
            shutil.copyfile(run.expert(name) / file, target / file)
        claim(root, name, 1)
        commit(root, name, 1)
    return root


def claim(root: Path, name: str, fence: int, nonce: str = NONCE) -> None:
    value = {"format": 1, "name": name, "fence": fence, "nonce": nonce, "island": "a"}
    write(root / keys.claim(name, fence), encode(value))


def commit(root: Path, name: str, fence: int, *, opening: int = 0, more: Mapping[str, Any] | None = None) -> None:
    """Commit what lies in the attempt's result, whatever it is; ``more`` is put over what an honest commit says."""
    card = root / keys.result(name, fence) / "card.json"
    value = {
        "format": 1, "name": name, "fence": fence, "nonce": NONCE, "island": "a",
        "key": keys.result(name, fence), "sha256": store.sha256_file(card) if card.is_file() else "0" * 64, **(more or {}),
    }  # fmt: skip
    write(root / keys.committed(name, opening), encode(value))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class Forge:
    """A copy of an honest result that a hostile joiner of job ``name`` may change at will, and the owner's door.

    ``place`` is "bucket" or "folder"; after a change of files the card and the commit are made to agree with them, unless
    a forger's blunder is the point (``seal=False``).
    """

    def __init__(self, place: str, root: Path, name: str = "0") -> None:
        self.place, self.root, self.name = place, root, name
        self.result = root / keys.result(name, 1) if place == "bucket" else Run.open(root).expert(name)
        self.trust: Path | None = None
        self.fence = 1

    # --- tools --------------------------------------------------------------------------------------------------

    def read(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.result / "card.json").read_text())
        return value

    def card(self, change: Callable[[dict[str, Any]], Any] = lambda card: None) -> None:
        """Change the card, seal it again and commit it."""
        value = self.read()
        change(value)
        store.write_sealed(self.result / "card.json", value)
        self.recommit()

    def raw_card(self, text: str) -> None:
        write(self.result / "card.json", text.encode("utf-8", "surrogatepass"))
        self.recommit()

    def recommit(self, **more: Any) -> None:
        if self.place == "bucket":
            commit(self.root, self.name, self.fence, more=more)

    def put(self, file: str, data: bytes, *, listed: bool = True) -> None:
        """Write a file of the result; the card is made to agree with it."""
        write(self.result / file, data)

        def agree(card: dict[str, Any]) -> None:
            if not listed:
                return
            card["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            if file == "model.safetensors":
                card["sha256"] = card["files"][file]["sha256"]

        self.card(agree)

    def tensors(self) -> dict[str, np.ndarray]:
        found = store.map_tensors(self.result / "model.safetensors")
        return {name: np.array(value) for name, value in found.items()}

    def weights(self, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
        """Change tensors; everything else is made to agree."""
        from safetensors.numpy import save

        tensors = self.tensors()
        change(tensors)
        self.put("model.safetensors", save(tensors, metadata={"format": "pt"}))

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the header of the weights as JSON, the data stays."""
        data = (self.result / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        self.raw_header(json.dumps(header).encode(), data[8 + length :])

    def raw_header(self, text: bytes, data: bytes, length: int | None = None) -> None:
        size = len(text) if length is None else length
        self.put("model.safetensors", size.to_bytes(8, "little") + text + data)

    def config(self, change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads((self.result / "config.json").read_text())
        change(value)
        self.put("config.json", json.dumps(value).encode())

    def claimed(self, loss: float) -> None:
        def change(card: dict[str, Any]) -> None:
            card["validation"]["ema"]["loss"] = loss

        self.card(change)

    # --- the owner ----------------------------------------------------------------------------------------------

    def admit(self, **options: Any) -> Answer:
        where = str(self.root) if self.place == "folder" else self.root.as_uri()
        return admit(where, self.name, trust=self.trust, **options)

    def snapshot(self) -> dict[str, str]:
        """What lies in the store, by key; links and locks as they are."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if path.is_symlink():
                found[key] = "link"
            elif path.is_file() and not key.startswith(".") and path.stat().st_size < 1 << 24:
                found[key] = store.sha256_file(path)
        return found


def measured_loss(forge: Forge) -> float:
    """What a forger who is good at it makes the card claim: the loss of the weights as they are now."""
    from archipel.training import heldout

    run = Run.open(forge.root) if forge.place == "folder" else None
    shard = "shards/all" if forge.name in ("monolith", "router") else f"shards/{forge.name}"
    if run is None:
        from archipel import config as configuration

        config, _ = configuration.read(forge.root / "run.toml")
    else:
        config = run.config
    found = heldout.measure(config, forge.result, forge.root / shard / "validation.safetensors", "cpu")
    return found.loss if math.isfinite(found.loss) else 1.0
