"""A warm run among islands: the start comes with the shard, and a result that began elsewhere is not admitted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archipel import store
from archipel.errors import MissingStageError
from archipel.islands import keys
from archipel.islands.admission import admit
from archipel.islands.bucket import Bucket
from archipel.islands.publish import publish
from archipel.islands.worker import Options, join
from archipel.partition.shards import INIT
from archipel.progress import StopFlag
from archipel.run import MONOLITH, TRUNK, Run
from archipel.training.local import Local
from archipel.training.stage import train

SHARD = ("card.json", INIT, "train.safetensors", "validation.safetensors")


def carry(run: Run) -> None:
    """What *partition* does when the trunk is trained, to shards that were made by hand."""
    start = {key: (store.read_card(run.expert(TRUNK)) or {})[key] for key in ("sha256", "flops", "steps")}
    for name in (*run.expert_names, MONOLITH):
        folder, card = run.shard(name), store.read_card(run.shard(name)) or {}
        shutil.copyfile(run.expert(TRUNK) / "model.safetensors", folder / INIT)
        files = ["train.safetensors", "validation.safetensors", INIT]
        counts = {"train": 12, "validation": 4}
        store.write_card(folder, "shard", run.id, files, cluster=card["cluster"], counts=counts, init=start)


def test_an_island_gets_the_start_in_its_shard_and_is_held_to_it(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", expert={"warm_start": "trunk", "trunk_steps": 6})
    url = (tmp_path / "bucket").as_uri()
    with StopFlag() as stop, pytest.raises(MissingStageError, match=r"archipel train .* trunk"):
        publish(run, url, stop)
    train(run, TRUNK, threads=1)
    carry(run)
    with StopFlag() as stop:
        publish(run, url, stop)
        bucket = Bucket.open(url)
        assert not [key for key in bucket.files if key.startswith("trunk/")]
        done = join(bucket, Options(work=tmp_path / "work", local=Local(threads=1), only=("1",)), stop)
    assert done == ["1"]
    folder = tmp_path / "bucket" / keys.result("1", 1)
    card: dict[str, Any] = store.read_json(folder / "card.json")
    assert card["island"]["store"]["read"] == ["published.json", "run.toml", *(f"shards/1/{file}" for file in SHARD)]
    assert {one for one in card["touched"]["read"] if one.startswith("shards/")} == {f"shards/1/{one}" for one in SHARD}
    train(run, "1", threads=1)
    assert card["sha256"] == (store.read_card(run.expert("1")) or {})["sha256"]  # as at home
    assert admit(run.root, "1").admitted
    own = run.expert("1") / "card.json"
    honest = store.read_json(own)
    for change in ({"sha256": "0" * 64}, {"steps": 7}, {"flops": 1}):
        store.write_sealed(own, honest | {"warm_start": honest["warm_start"] | change})
        answer = admit(run.root, "1")
        assert (answer.admitted, answer.rule) == (False, "config") and "warm_start" in answer.detail
    store.write_sealed(own, {key: value for key, value in honest.items() if key != "warm_start"})
    assert admit(run.root, "1").rule == "config"
