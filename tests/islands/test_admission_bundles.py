"""Hostile bundles at the owner's door: each is refused by the rule that it breaks, and nothing else changes."""

from __future__ import annotations

import io
import json
import os
import pickle
import runpy
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel.islands import keys
from archipel.islands.admission import RULES, admit, admitted
from archipel.islands.bucket import Bucket
from archipel.islands.objects import Objects
from archipel.run import Run

_FORGE = runpy.run_path(str(Path(__file__).with_name("forge.py")))
Forge = _FORGE["Forge"]
claim, commit, write = _FORGE["claim"], _FORGE["commit"], _FORGE["write"]


@pytest.fixture
def make(honest: tuple[Path, Path], tmp_path: Path) -> Callable[..., Any]:
    def copy(place: str, name: str = "0") -> Any:
        source = honest[0 if place == "bucket" else 1]
        shutil.copytree(source, tmp_path / place, ignore=shutil.ignore_patterns("checkpoints"))
        return Forge(place, tmp_path / place, name)

    return copy


class Bomb:
    """What a pickle would run when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/archipel-was-here",)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return file.getvalue()


def _put(file: str, data: bytes, listed: bool = True) -> Callable[[Any], None]:
    return lambda f: f.put(file, data, listed=listed)


def _card(**values: Any) -> Callable[[Any], None]:
    return lambda f: f.card(lambda card: card.update(values))


def _config(**values: Any) -> Callable[[Any], None]:
    return lambda f: f.config(lambda config: config.update(values))


def _raw_card(old: str, new: str) -> Callable[[Any], None]:
    """Replace text in a card without its seal."""

    def change(f: Any) -> None:
        card = f.read()
        card.pop("check")
        text = json.dumps(card)
        assert old in text
        f.raw_card(text.replace(old, new, 1))

    return change


def _listed(name: str) -> Callable[[Any], None]:
    return lambda f: f.card(lambda card: card["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for key, value in header.items() if key != "__metadata__")
    return entry


def _poke(value: float) -> Callable[[Any], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["proj_out.weight"].reshape(-1)[7] = value

    return lambda f: f.weights(change)


def _shift(f: Any) -> None:
    """A gap of four bytes before the last tensor, made good for at the end."""
    data = (f.result / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    last = max((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])
    last["data_offsets"] = [n + 4 for n in last["data_offsets"]]
    f.raw_header(json.dumps(header).encode(), data[8 + length :] + b"\0\0\0\0")


def _overlap(header: dict[str, Any]) -> None:
    a, b = sorted((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])[:2]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + b["data_offsets"][1] - b["data_offsets"][0]]


def _duplicate_tensor(f: Any) -> None:
    data = (f.result / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    f.raw_header(text[:-1] + b"," + text[text.index(b'"proj_out.bias"') : -1] + b"}", data[8 + length :])


def _polyglot(f: Any) -> None:
    """Weights that are a zip archive when read from the end, in a tensor's own bytes."""
    data = bytearray((f.result / "model.safetensors").read_bytes())
    tail = b"PK\x05\x06" + b"\0" * 18
    data[-len(tail) :] = tail
    f.put("model.safetensors", bytes(data))


def _half(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].astype(np.float16)


def _link(f: Any) -> None:
    path = f.result / "model.safetensors"
    path.rename(f.root / "elsewhere.safetensors")
    path.symlink_to(f.root / "elsewhere.safetensors")


def _link_out(f: Any) -> None:
    (f.result / "metrics.jsonl").unlink()
    (f.result / "metrics.jsonl").symlink_to("/etc/passwd")


def _link_folder(f: Any) -> None:
    f.result.rename(f.result.with_name("moved"))
    f.result.symlink_to(f.result.with_name("moved"))


def _fifo(f: Any) -> None:
    (f.result / "metrics.jsonl").unlink()
    os.mkfifo(f.result / "metrics.jsonl")


def _sparse(f: Any) -> None:
    """A file of 10 GB that takes no room on the disk."""
    with open(f.result / "model.safetensors", "r+b") as file:
        file.truncate(10 << 30)


def _claiming(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """A forger who measures the loss of the forged weights and makes the card claim just that."""

    def both(f: Any) -> None:
        change(f)
        f.claimed(_FORGE["measured_loss"](f))

    return both


def _zero(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_out.weight"][:] = 0
    tensors["proj_out.bias"][:] = 0


def _random(tensors: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for name, value in tensors.items():
        if value.ndim > 1:
            tensors[name] = (0.3 * rng.standard_normal(value.shape)).astype(np.float32)


def _negated(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_out.weight"] *= -1
    tensors["proj_out.bias"] *= -1


def _louder(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_out.weight"] *= 4


def _constant(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_out.weight"][:] = 0
    tensors["proj_out.bias"][:] = 3


PICKLE = pickle.dumps(Bomb(), protocol=4)
DEEP = b"[" * 5000 + b"]" * 5000
MODEL, CONFIG, METRICS = "model.safetensors", "config.json", "metrics.jsonl"
ANYWHERE: dict[str, tuple[str, Callable[[Any], None]]] = {
    # format
    "a pickle beside": ("format", _put("extra.pkl", PICKLE, listed=False)),
    "a listed pickle": ("format", _listed("extra.pkl")),
    "a torch file beside": ("format", _put("model.bin", _zip(), listed=False)),
    "a python file beside": ("format", _put("modeling.py", b"import os", listed=False)),
    "a pickle named as weights": ("format", _put(MODEL, PICKLE)),
    "an old pickle named as weights": ("format", _put(MODEL, pickle.dumps([Bomb()] * 9, protocol=2))),
    "a zip named as weights": ("format", _put(MODEL, _zip())),
    "a zip at the end of weights": ("format", _polyglot),
    "a pickle named as configuration": ("format", _put(CONFIG, PICKLE)),
    "a zip named as metrics": ("format", _put(METRICS, _zip())),
    "metrics that are no JSON": ("format", _put(METRICS, b"step,loss\n1,2\n")),
    "an empty file for weights": ("format", _put(MODEL, b"")),
    "half precision": ("format", lambda f: f.weights(_half)),
    "an unknown dtype": ("format", lambda f: f.header(lambda h: _first(h).update(dtype="F8_E4M3"))),
    "overlapping tensors": ("format", lambda f: f.header(_overlap)),
    "a gap between tensors": ("format", _shift),
    "a tensor twice": ("format", _duplicate_tensor),
    "offsets beyond the file": ("format", lambda f: f.header(lambda h: _first(h).update(data_offsets=[0, 1 << 40]))),
    "negative shapes": ("format", lambda f: f.header(lambda h: _first(h).update(shape=[-1, -32]))),
    "shapes whose product overflows": ("format", lambda f: f.header(lambda h: _first(h).update(shape=[1 << 62, 1 << 62]))),
    "metadata with code": ("format", lambda f: f.header(lambda h: h.update(__metadata__={"format": "pt", "run": "x"}))),
    "bytes after the last tensor": ("format", lambda f: f.put(MODEL, (f.result / MODEL).read_bytes() + b"1234")),
    "a header that is a list": ("format", lambda f: f.raw_header(b"[]      ", b"")),
    "a key twice in the card": ("format", _raw_card('"steps": 24', '"steps": 24, "steps": 9')),
    "a key twice in the configuration": (
        "format", lambda f: f.put(CONFIG, (f.result / CONFIG).read_bytes().replace(b"{", b'{"num_layers": 9,', 1)),
    ),
    "90,000 keys, the last of them twice": (
        "format", lambda f: f.raw_card("{" + "".join(f'"k{n}":0,' for n in range(90_000)) + '"k89999":1}'),
    ),
    "a card that is no UTF-8": ("format", lambda f: f.raw_card("\ud800{}")),
    "a card cut short": ("format", lambda f: f.raw_card('{"format": 1, "files"')),
    # path
    "a card that lists ..": ("path", _listed("../../../run.toml")),
    "a card that lists an absolute path": ("path", _listed("/etc/passwd")),
    "a card that lists a Windows path": ("path", _listed("..\\..\\run.toml")),
    "a card that lists a name in Unicode": ("path", _listed("model\u2024safetensors.json")),
    "a card that lists another's weights": ("path", _listed("weights.safetensors")),
    "a card that lists a million files": (
        "path", lambda f: f.card(lambda c: c["files"].update({f"{n}.json": {"sha256": "0", "bytes": 0} for n in range(5000)})),
    ),
    "one safetensors file too many": ("path", _put("more.safetensors", b"", listed=False)),
    "one JSON file too many": ("path", _put("generation_config.json", b"{}", listed=False)),
    "a link to weights": ("path", _link),
    "a link out of the store": ("path", _link_out),
    "a linked folder": ("path", _link_folder),
    # size
    "a header of 10 GB": ("size", lambda f: f.raw_header(b"{}", b"", length=10 << 30)),
    "a header longer than its file": ("size", lambda f: f.raw_header(b"{}", b"", length=3)),
    "a header larger than its tensors need": (
        "size", lambda f: f.raw_header(b"{" + b" " * 60_000 + b"}", b"\0" * 10),
    ),
    "weights of 10 GB": ("size", _sparse),
    "a card that claims 10 GB": ("size", lambda f: f.card(lambda c: c["files"][MODEL].update(bytes=10 << 30))),
    "a card of 2 MB": ("size", lambda f: f.raw_card(json.dumps({"x": "y" * (2 << 20)}))),
    "a configuration of 1 MB": ("size", _put(CONFIG, b'{"x": "' + b"y" * (1 << 20) + b'"}')),
    "a deep card": ("size", lambda f: f.raw_card(DEEP.decode())),
    "a deep configuration": ("size", _put(CONFIG, DEEP)),
    "a deep header": ("size", lambda f: f.raw_header(b'{"a":' + DEEP[4000:6000] + b"}", b"\0" * 4096)),
    "thousands of tensors": (
        "size", lambda f: f.header(
            lambda h: h.update({f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(300)})
        ),
    ),
    "a card with a novel in it": ("size", _card(island={"fence": 1, "name": "x" * 10_000})),
    # shape
    "a tensor missing": ("shape", lambda f: f.weights(lambda t: t.pop("proj_out.bias"))),
    "a tensor more": ("shape", lambda f: f.weights(lambda t: t.update(backdoor=np.zeros(4, np.float32)))),
    "a tensor renamed": ("shape", lambda f: f.weights(lambda t: t.update({"proj_out.bias2": t.pop("proj_out.bias")}))),
    "a tensor turned": ("shape", lambda f: f.weights(lambda t: t.update({"proj_out.weight": t["proj_out.weight"].T.copy()}))),
    # config
    "another run": ("config", _card(run="a" * 64)),
    "another cluster": ("config", _card(cluster=1)),
    "no cluster": ("config", _card(cluster=None)),
    "another job's name": ("config", _card(name="1")),
    "a name in Unicode": ("config", _card(name="\uff10")),
    "other steps": ("config", _card(steps=23)),
    "true for a step": ("config", _card(resumed=True)),
    "steps as text": ("config", _card(steps="24")),
    "other parameters": ("config", _card(parameters=1)),
    "other FLOPs": ("config", _card(flops=1)),
    "negative seconds": ("config", _card(seconds=-1.0)),
    "NaN in the card": ("config", _raw_card('"resumed": 0', '"resumed": NaN')),
    "Infinity in the card": ("config", _raw_card('"resumed": 0', '"resumed": -Infinity')),
    "1e999 in the card": ("config", _raw_card('"resumed": 0', '"resumed": 1e999')),
    "an unknown key in the card": ("config", _card(trust_remote_code=True)),
    "a card of a later format": ("config", _card(format=2)),
    "a card of another kind": ("config", _card(kind="shard")),
    "another prediction": ("config", lambda f: f.card(lambda c: c["network"].update(prediction="x0"))),
    "more clips than the shard has": ("config", _card(train_clips=13, epochs=round(96 / 13, 4))),
    "auto_map in the configuration": ("config", _config(auto_map={"AutoModel": "evil--repo.Model"})),
    "another class": ("config", _config(_class_name="EvilModel")),
    "a class by path": ("config", _config(_class_name="../evil.Model")),
    "a quantizer in the configuration": ("config", _config(quantization_config={"quant_method": "evil"})),
    "a wider network": ("config", _config(attention_head_dim=1 << 20)),
    "more layers": ("config", _config(num_layers=10**9)),
    "true for one layer": ("config", _config(num_layers=True)),
    "a configuration key missing": ("config", lambda f: f.config(lambda c: c.pop("num_layers"))),
    "a configuration that is a list": ("config", _put(CONFIG, b"[]")),
    # finite
    "NaN in one tensor": ("finite", _poke(float("nan"))),
    "an infinity in one tensor": ("finite", _poke(float("-inf"))),
    "1e30 in one tensor": ("finite", _poke(1e30)),
    # checksum
    "a bit flipped in the weights": (
        "checksum", lambda f: write(f.result / MODEL, (f.result / MODEL).read_bytes()[:-1] + b"\x7f"),
    ),
    "weights cut short": ("checksum", lambda f: write(f.result / MODEL, (f.result / MODEL).read_bytes()[:-4])),
    "metrics changed": ("checksum", lambda f: write(f.result / METRICS, (f.result / METRICS).read_bytes() + b"{}\n")),
    "a card whose seal is broken": (
        "checksum", lambda f: f.raw_card((f.result / "card.json").read_text().replace('"resumed": 0', '"resumed": 1')),
    ),
    "a card with two hashes of the weights": ("checksum", _card(sha256="b" * 64)),
    # loss
    "the network of zeros": ("loss", _claiming(lambda f: f.weights(_zero))),
    "a random network": ("loss", _claiming(lambda f: f.weights(_random))),
    "an expert turned against its clips": ("loss", _claiming(lambda f: f.weights(_negated))),
    "an expert that shouts": ("loss", _claiming(lambda f: f.weights(_louder))),
    "a constant answer": ("loss", _claiming(lambda f: f.weights(_constant))),
    "zeros that claim a good loss": ("loss", lambda f: f.weights(_zero)),
    "a card that claims a better loss": ("loss", lambda f: f.claimed(0.01)),
    "a card that claims no loss": ("loss", lambda f: f.card(lambda c: c.update(validation={}))),
}  # fmt: skip


def _checks(forge: Any, before: dict[str, str], rule: str) -> None:
    """Refused by the rule named; nothing admitted; nothing changed but for a bucket's note why."""
    answer = forge.admit()
    assert (answer.admitted, answer.rule) == (False, rule), answer
    assert answer.detail and answer.detail.isprintable() and len(answer.detail) < 1000
    after = forge.snapshot()
    added = {key for key in after if key not in before}
    assert {key: after[key] for key in before} == before
    notes = {keys.refused(forge.name, fence) for fence in (0, 1, 2, 7)} if forge.place == "bucket" else set()
    assert added <= notes, "a refusal writes nothing but its note"
    for note in added:
        assert json.loads((forge.root / note).read_text())["rule"] == rule
    assert not Path("/tmp/archipel-was-here").exists()


@pytest.mark.parametrize("place", ["bucket", "folder"])
@pytest.mark.parametrize("case", ANYWHERE)
def test_hostile_bundles_are_refused(make: Callable[..., Any], place: str, case: str) -> None:
    rule, change = ANYWHERE[case]
    forge = make(place)
    change(forge)
    _checks(forge, forge.snapshot(), rule)


def test_there_are_hostile_bundles_enough_for_every_rule() -> None:
    assert len(ANYWHERE) >= 50
    assert set(RULES) - {rule for rule, _ in ANYWHERE.values()} == {"signature", "fence"}  # below, and with the keys


def test_a_fifo_is_not_waited_for(make: Callable[..., Any]) -> None:
    forge = make("folder")
    _fifo(forge)
    _checks(forge, forge.snapshot(), "path")


# --- fences, commits, other jobs -------------------------------------------------------------------------------------


def _commit(**values: Any) -> Callable[[Any], None]:
    return lambda f: f.recommit(**values)


def _moved(fence: int) -> Callable[[Any], None]:
    """The result lies under, and is committed with, a fence that nobody claimed."""

    def change(f: Any) -> None:
        f.result.parent.rename(f.root / keys.attempt("0", fence))
        commit(f.root, "0", fence)

    return change


def _beyond_a_gap(f: Any) -> None:
    f.result.parent.rename(f.root / keys.attempt("0", 7))
    claim(f.root, "0", 7)
    commit(f.root, "0", 7)


def _reopened(f: Any) -> None:
    write(f.root / keys.reopened("0", 1), json.dumps({"format": 1, "above": 1}).encode())
    commit(f.root, "0", 1, opening=1)


FENCES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "fence 10^9": ("fence", _commit(fence=10**9)),
    "fence 10^30": ("fence", _commit(fence=10**30)),
    "fence 0": ("fence", _commit(fence=0)),
    "fence -1": ("fence", _commit(fence=-1)),
    "fence as text": ("fence", _commit(fence="1")),
    "fence true": ("fence", _commit(fence=True)),
    "fence NaN": ("fence", _commit(fence=float("nan"))),
    "a fence that was never claimed": ("fence", _moved(2)),
    "a claim beyond a gap": ("fence", _beyond_a_gap),
    "another's nonce": ("fence", _commit(nonce="ab" * 16)),
    "no nonce": ("fence", _commit(nonce=None)),
    "from before a reopening": ("fence", _reopened),
    "a commit that points to another job": ("fence", _commit(key="jobs/1/00000001/result")),
    "a commit that points out of the store": ("fence", _commit(key="../../result")),
    "a commit of another name": ("fence", _commit(name="1")),
    "a commit with a key of its own": ("fence", _commit(trust="all")),
    "a commit that is a list": ("fence", lambda f: write(f.root / keys.committed("0"), b"[]")),
    "a commit that is no JSON": ("format", lambda f: write(f.root / keys.committed("0"), b"\x80\x04K\x01.")),
    "a commit of 1 MB": ("size", lambda f: write(f.root / keys.committed("0"), b" " * (1 << 20))),
    "a commit of another card": ("checksum", _commit(sha256="c" * 64)),
    "a card of another attempt": ("fence", _card(island={"fence": 3, "name": "x"})),
    "a folder in the result": ("path", lambda f: write(f.result / "more" / "card.json", b"{}")),
    "a result without weights": ("format", lambda f: (f.result / MODEL).unlink()),
    "a link among the claims": (
        "path", lambda f: (f.root / keys.claim("0", 2)).symlink_to(f.root / keys.claim("1", 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FENCES)
def test_commits_are_held_to_their_claims(make: Callable[..., Any], case: str) -> None:
    rule, change = FENCES[case]
    forge = make("bucket")
    change(forge)
    _checks(forge, forge.snapshot(), rule)


def test_status_says_refused(make: Callable[..., Any]) -> None:
    from archipel.islands.status import status

    forge = make("bucket")
    forge.recommit(nonce="ab" * 16)
    assert forge.admit().rule == "fence"
    rows = {row["name"]: row["state"] for row in status(Bucket.open(forge.root))["jobs"]}
    assert (rows["0"], rows["1"]) == ("refused", "done")


def test_a_job_without_a_result_is_refused_without_a_note(make: Callable[..., Any]) -> None:
    forge = make("bucket", "monolith")
    before = forge.snapshot()
    answer = forge.admit()
    assert (answer.admitted, answer.rule) == (False, "fence") and "no committed result" in answer.detail
    assert forge.snapshot() == before


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_another_jobs_weights_are_refused_once_they_are_admitted(make: Callable[..., Any], place: str) -> None:
    forge = make(place)
    other = Forge(place, forge.root, "1")
    assert other.admit().admitted
    forge.put(MODEL, (other.result / MODEL).read_bytes())
    forge.claimed(_FORGE["measured_loss"](forge))
    before = forge.snapshot()
    answer = forge.admit()
    assert answer.rule == "checksum" and "job 1" in answer.detail
    assert {key: value for key, value in forge.snapshot().items() if not key.startswith("refused/")} == before


def test_a_neighbours_expert_fails_on_this_cluster(make: Callable[..., Any]) -> None:
    """Not admitted there, so that its weights are unknown, and with a card that claims what it really does."""
    forge = make("bucket")
    forge.put(MODEL, (Forge("bucket", forge.root, "1").result / MODEL).read_bytes())
    forge.claimed(_FORGE["measured_loss"](forge))
    _checks(forge, forge.snapshot(), "loss")


# --- what is let in --------------------------------------------------------------------------------------------------


def test_honest_results_are_admitted_from_a_bucket(make: Callable[..., Any]) -> None:
    forge = make("bucket")
    before = forge.snapshot()
    answer = forge.admit()
    assert answer.admitted and answer.rule is None and "held-out loss" in answer.detail
    after = forge.snapshot()
    sha256 = before[f"{keys.result('0', 1)}/card.json"]
    added = set(after) - set(before)
    assert added == {keys.admitted("0"), *(keys.admitted(sha256, f) for f in ("card.json", CONFIG, MODEL))}
    assert all(after[key] == value for key, value in before.items())
    for file in ("card.json", CONFIG, MODEL):
        assert after[keys.admitted(sha256, file)] == before[f"{keys.result('0', 1)}/{file}"]
    found = admitted(Bucket.open(forge.root))["0"]
    assert (found.sha256, found.fence) == (sha256, 1)
    assert found.files[MODEL][0] == before[f"{keys.result('0', 1)}/{MODEL}"]
    assert forge.admit().admitted and forge.snapshot() == after  # asking again changes nothing


def test_admission_from_an_s3_server(honest: tuple[Path, Path], s3_url: str) -> None:
    store = Objects.open(s3_url)
    for path in sorted(honest[0].rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            store.put(path.relative_to(honest[0]).as_posix(), path)
    assert admit(s3_url, "0").admitted
    found = admitted(Bucket.open(s3_url))["0"]
    copied = store.get(keys.admitted(found.sha256, MODEL), 1 << 24)
    assert copied == (honest[0] / keys.result("0", 1) / MODEL).read_bytes()
    store.put(f"{keys.result('1', 1)}/extra.pkl", PICKLE)
    assert admit(s3_url, "1").rule == "format"
    assert set(admitted(Bucket.open(s3_url))) == {"0"} and store.get_json(keys.refused("1", 1))["rule"] == "format"


def test_a_run_named_by_a_link_is_the_owners_own_matter(make: Callable[..., Any], tmp_path: Path) -> None:
    forge = make("folder", "router")
    (tmp_path / "link").symlink_to(forge.root)
    assert admit(tmp_path / "link", "router").admitted
    forge.root.joinpath("experts").rename(tmp_path / "experts")
    forge.root.joinpath("experts").symlink_to(tmp_path / "experts")
    assert admit(tmp_path / "link", "0").rule == "path"


def test_a_router_is_admitted_with_a_calibration(make: Callable[..., Any]) -> None:
    forge = make("bucket", "router")
    assert forge.admit().admitted
    found = admitted(Bucket.open(forge.root))["router"]
    value = json.loads((forge.root / keys.admitted(found.sha256, "calibration.json")).read_text())
    assert value["model_sha256"] == found.files[MODEL][0] and len(value["prior"]) == 2


def test_an_untrained_router_is_refused(make: Callable[..., Any]) -> None:
    forge = make("bucket", "router")
    forge.weights(_zero)
    forge.card(lambda card: card["best"].update(loss=float(np.log(2))))
    _checks(forge, forge.snapshot(), "loss")


def test_a_run_folder_is_admitted_where_it_is(make: Callable[..., Any]) -> None:
    forge = make("folder")
    before = forge.snapshot()
    assert forge.admit().admitted
    assert set(forge.snapshot()) - set(before) == {"admitted/0.json"}
    found = admitted(Run.open(forge.root))["0"]
    assert found.files["card.json"][0] == found.sha256 == before["experts/0/card.json"]


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_what_is_refused_later_is_not_admitted_any_longer(make: Callable[..., Any], tmp_path: Path, place: str) -> None:
    forge = make(place)
    assert forge.admit().admitted
    forge.trust = tmp_path / "strict.toml"
    forge.trust.write_text("[loss]\nbar = 0.01\n")
    assert forge.admit().rule == "loss"
    assert admitted(Bucket.open(forge.root) if place == "bucket" else Run.open(forge.root)) == {}
    forge.trust = None
    assert forge.admit().admitted and not (forge.root / keys.refused("0", 1)).exists()


def test_a_refusal_and_a_reopening_let_islands_take_the_job_again(make: Callable[..., Any]) -> None:
    forge = make("bucket")
    claim(forge.root, "0", 2)  # somebody else waits behind the first
    forge.weights(_zero)
    answer = forge.admit(reopen=True)
    assert answer.rule == "loss" and "open again" in answer.detail
    assert json.loads((forge.root / keys.reopened("0", 1)).read_text())["above"] == 2
    state = Bucket.open(forge.root).state("0")
    assert not state.done and state.released and (state.opening, state.above) == (1, 2)
    assert forge.admit().detail.startswith("job 0 has no committed result")
    good = Forge("bucket", forge.root, "1").result
    assert good.is_dir() and (forge.root / keys.refused("0", 1)).is_file()


def test_a_shard_that_the_store_swapped_is_noticed(make: Callable[..., Any]) -> None:
    from archipel.errors import DamagedError

    forge = make("bucket")
    shutil.copyfile(forge.root / "shards/1/validation.safetensors", forge.root / "shards/0/validation.safetensors")
    with pytest.raises(DamagedError, match=r"shards/0/validation\.safetensors"):
        forge.admit()
    assert admitted(Bucket.open(forge.root)) == {}
