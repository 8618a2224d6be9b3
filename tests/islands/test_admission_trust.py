"""Keys, signatures and the owner's trust.toml; the verbs admit and keygen; what is imported when."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archipel import cli, store
from archipel.errors import ArchipelError, ConfigError
from archipel.islands import keys, trust
from archipel.islands.bucket import Bucket
from archipel.islands.worker import Options, join, signed_bytes
from archipel.progress import StopFlag
from archipel.run import Run

_FORGE = runpy.run_path(str(Path(__file__).with_name("forge.py")))
Forge, claim, commit = _FORGE["Forge"], _FORGE["claim"], _FORGE["commit"]


@pytest.fixture
def forge(honest: tuple[Path, Path], tmp_path: Path) -> Any:
    shutil.copytree(honest[0], tmp_path / "bucket")
    return Forge("bucket", tmp_path / "bucket")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, str]:
    """(private key's file, public key)"""
    return tmp_path / "island.key", trust.keygen(tmp_path / "island.key")


def _message(forge: Any, **over: Any) -> bytes:
    card = store.sha256_file(forge.result / "card.json")
    about = {"run": store.sha256_file(forge.root / "run.toml"), "name": "0", "fence": 1, "sha256": card} | over
    return trust.payload(**about)


def _trusting(forge: Any, public: str, *, required: bool = True, jobs: str = "[]") -> None:
    forge.trust = forge.root.parent / "trust.toml"
    forge.trust.write_text(
        f'[signature]\nrequired = {str(required).lower()}\n[[signature.keys]]\nname = "ada"\nkey = "{public}"\njobs = {jobs}\n'
    )


def _refused(forge: Any, words: str) -> None:
    before = forge.snapshot()
    answer = forge.admit()
    assert (answer.admitted, answer.rule) == (False, "signature") and words in answer.detail, answer
    assert set(forge.snapshot()) - set(before) == {keys.refused("0", 1)}


# --- signatures ------------------------------------------------------------------------------------------------------


def test_the_worker_signs_what_admission_checks() -> None:
    assert signed_bytes("r" * 64, "2", 7, "c" * 64) == trust.payload("r" * 64, "2", 7, "c" * 64)


def test_a_signed_result_is_admitted(forge: Any, pair: tuple[Path, str]) -> None:
    _trusting(forge, pair[1], jobs='["0"]')
    forge.recommit(**trust.sign(pair[0], _message(forge)))
    assert forge.admit().admitted


def test_without_keys_a_signature_says_nothing(forge: Any, pair: tuple[Path, str]) -> None:
    forge.recommit(**trust.sign(pair[0], b"something else"))
    assert forge.admit().admitted


def test_unsigned_is_refused_only_where_signatures_are_required(forge: Any, pair: tuple[Path, str]) -> None:
    _trusting(forge, pair[1], required=False)
    assert forge.admit().admitted


def test_unsigned_is_refused_where_signatures_are_required(forge: Any, pair: tuple[Path, str]) -> None:
    _trusting(forge, pair[1])
    _refused(forge, "not signed")


@pytest.mark.parametrize(
    "over", [{"fence": 2}, {"name": "1"}, {"run": "0" * 64}, {"sha256": "0" * 64}], ids=["fence", "job", "run", "card"]
)
def test_a_signature_over_another_result_is_refused(forge: Any, pair: tuple[Path, str], over: dict[str, Any]) -> None:
    _trusting(forge, pair[1], required=False)
    forge.recommit(**trust.sign(pair[0], _message(forge, **over)))
    _refused(forge, "not ada's")


@pytest.mark.parametrize("signature", ["", "AAAA", "!" * 80, "A" * 88, "QUJD" * 22])
def test_a_forged_signature_is_refused(forge: Any, pair: tuple[Path, str], signature: str) -> None:
    _trusting(forge, pair[1])
    forge.recommit(signature=signature, signer=pair[1])
    _refused(forge, "not ada's")


def test_an_unknown_key_is_refused(forge: Any, pair: tuple[Path, str], tmp_path: Path) -> None:
    trust.keygen(tmp_path / "other.key")
    _trusting(forge, pair[1], required=False)
    forge.recommit(**trust.sign(tmp_path / "other.key", _message(forge)))
    _refused(forge, "does not list")


def test_a_key_signs_only_the_jobs_it_may(forge: Any, pair: tuple[Path, str]) -> None:
    _trusting(forge, pair[1], jobs='["1", "2"]')
    forge.recommit(**trust.sign(pair[0], _message(forge)))
    _refused(forge, "may sign 1, 2 only")


def test_a_signature_taken_from_a_good_result_does_not_cover_another(forge: Any, pair: tuple[Path, str]) -> None:
    """The card is changed after it was signed, the commit forged around it."""
    _trusting(forge, pair[1])
    signed = trust.sign(pair[0], _message(forge))
    forge.weights(lambda tensors: tensors["proj_out.bias"].__imul__(1.01))
    forge.recommit(**signed)
    _refused(forge, "not ada's")


def test_what_a_real_island_signs_is_admitted(forge: Any, pair: tuple[Path, str], tmp_path: Path) -> None:
    """`join --key` and `admit` agree on every byte and on every key of a card; nobody else's key will do."""
    shutil.rmtree(forge.root / "jobs")
    with StopFlag() as stop:
        options = Options(only=("0",), work=tmp_path / "work", sign=lambda message: trust.sign(pair[0], message))
        assert join(Bucket.open(forge.root), options, stop) == ["0"]
    _trusting(forge, pair[1], jobs='["0"]')
    assert forge.admit().admitted
    _trusting(forge, trust.keygen(tmp_path / "other.key"))
    assert forge.admit().rule == "signature"


def test_keys_are_files_of_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "mine.key"
    public = trust.keygen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and b"PRIVATE KEY" in path.read_bytes()
    before = path.read_bytes()
    with pytest.raises(ArchipelError, match="never overwritten"):
        trust.keygen(path)
    assert path.read_bytes() == before
    assert trust.sign(path, b"x")["signer"] == public
    path.chmod(0o644)
    with pytest.raises(ArchipelError, match="chmod 600"):
        trust.sign(path, b"x")


def test_raw_and_base64_keys_sign_alike(tmp_path: Path) -> None:
    import base64

    raw = bytes(range(32))
    signed = []
    for name, data in (("raw", raw), ("text", base64.b64encode(raw) + b"\n")):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
        signed.append(trust.sign(tmp_path / name, b"x"))
    assert signed[0] == signed[1]


@pytest.mark.parametrize("data", [b"", b"short", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "k").write_bytes(data)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(ArchipelError, match="no Ed25519 private key"):
        trust.sign(tmp_path / "k", b"x")


# --- trust.toml ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[loss]\nbar = 2.0\n", "loss.bar = 2.0"),
        ("[loss]\nbar = nan\n", "loss.bar = nan"),
        ("[loss]\nbar = true\n", "loss.bar = True"),
        ("[loss]\nbarr = 0.9\n", "loss.barr = 0.9: there is no such key"),
        ("[bounds]\nweights = -1\n", "bounds.weights = -1"),
        ('[bounds]\nweights = "1"\n', "bounds.weights = '1'"),
        ('[[signature.keys]]\nname = "a"\nkey = "AAAA"\n', "signature.keys.0.key = 'AAAA'"),
        ('run = "xyz"\n', "run = 'xyz'"),
        ("format = 2\n", "format = 2"),
        ("[loss\n", "not readable TOML"),
    ],
)
def test_a_wrong_trust_toml_is_named_by_key_and_value(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        trust.read(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_where_trust_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / "config" / name)
    run = tmp_path / "run"
    run.mkdir()
    assert trust.find(None, run).path is None  # defaults
    own = tmp_path / "config" / "archipel" / "trust.toml"
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert trust.find(None, run).path == own
    monkeypatch.setenv(trust.VARIABLE, str(tmp_path / "named.toml"))
    with pytest.raises(ArchipelError, match=r"named\.toml is not there"):
        trust.find(None, None)
    (tmp_path / "named.toml").write_text("[loss]\nbar = 0.5\n")
    assert trust.find(None, None).trust.loss.bar == 0.5
    (run / "trust.toml").write_text("[loss]\nbar = 0.25\n")
    assert trust.find(None, run).trust.loss.bar == 0.25
    assert trust.find(tmp_path / "named.toml", run).trust.loss.bar == 0.5
    with pytest.raises(ArchipelError, match="give --trust"):
        trust.find(tmp_path / "absent.toml", run)


def test_a_trust_toml_in_the_bucket_is_never_read(forge: Any) -> None:
    """A hostile store brings its own: no bar, no bounds, its own key."""
    (forge.root / "trust.toml").write_text("[loss]\nrequired = false\n")
    forge.weights(lambda tensors: tensors["proj_out.weight"].__imul__(0))
    assert forge.admit().rule == "loss"


def test_the_owner_may_pin_run_and_published_list(forge: Any, tmp_path: Path) -> None:
    forge.trust = tmp_path / "pins.toml"
    good = store.sha256_file(forge.root / keys.PUBLISHED)
    forge.trust.write_text(f'run = "{store.sha256_file(forge.root / "run.toml")}"\npublished = "{good}"\n')
    assert forge.admit().admitted
    published = json.loads((forge.root / keys.PUBLISHED).read_text())
    (forge.root / keys.PUBLISHED).write_text(json.dumps(published))
    with pytest.raises(ArchipelError, match="replaced the list"):
        forge.admit()
    forge.trust.write_text(f'run = "{"0" * 64}"\n')
    with pytest.raises(ArchipelError, match="not 000000000000"):
        forge.admit()
    forge.trust.write_text("")
    with pytest.raises(ArchipelError, match="not 111111111111"):
        forge.admit(run_id="1" * 64)


def test_bounds_are_the_owners(forge: Any, tmp_path: Path) -> None:
    forge.trust = tmp_path / "small.toml"
    for key, value in (("weights", 1000), ("card", 100), ("config", 10), ("metrics", 10)):
        forge.trust.write_text(f"[bounds]\n{key} = {value}\n")
        assert forge.admit().rule == "size", key
    forge.trust.write_text("[bounds]\nmagnitude = 0.5\n")
    assert forge.admit().rule == "finite"


def test_a_loss_that_is_not_required_is_not_measured(forge: Any, tmp_path: Path) -> None:
    forge.trust = tmp_path / "own.toml"
    forge.trust.write_text("[loss]\nrequired = false\n")
    forge.weights(lambda tensors: tensors["proj_out.weight"].__imul__(0))
    assert forge.admit().admitted


# --- the verbs -------------------------------------------------------------------------------------------------------


def _shell(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(part) for part in arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_admit_in_the_shell(forge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _shell(capsys, "admit", forge.root, "0", "--json")
    assert code == 0 and set(json.loads(out)) == {"admitted", "rule", "detail"}
    assert json.loads(out)["admitted"] is True and json.loads(out)["rule"] is None
    forge.config(lambda config: config.update(_class_name="Evil"))
    code, out, _ = _shell(capsys, "admit", forge.root.as_uri(), "0", "--json")
    assert code == 2 and json.loads(out)["rule"] == "config" and "Evil" in json.loads(out)["detail"]
    code, out, err = _shell(capsys, "admit", forge.root, "0")
    assert code == 2 and out == "" and "refused (config)" in err
    code, out, err = _shell(capsys, "admit", forge.root, "9", "--json")
    assert code == 2 and out == "" and "not a job of this run" in err
    code, _, err = _shell(capsys, "admit", forge.root.parent / "absent", "0")
    assert code == 2 and "there is no run" in err


def test_keygen_in_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _shell(capsys, "keygen", tmp_path / "ada.key")
    assert code == 0 and "[[signature.keys]]" in err and "PRIVATE" not in out + err
    (tmp_path / "trust.toml").write_text(f'[[signature.keys]]\nname = "ada"\nkey = "{out.strip()}"\n')
    assert trust.read(tmp_path / "trust.toml").signature.keys[0].name == "ada"


def test_a_refusal_by_a_cheap_rule_imports_no_torch(forge: Any) -> None:
    forge.put("model.safetensors", b"\x80\x04K\x01.")
    code = (
        "import sys\nfrom archipel.islands.admission import admit\n"
        f"answer = admit({str(forge.root)!r}, '0')\n"
        "assert answer.rule == 'format', answer\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'pickle5') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


# --- the closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [{}, {"router": {"reads": "text"}, "monolith": {"condition": "cluster"}}])
@pytest.mark.parametrize("preset", ["tiny", "demo", "gpu"])
def test_what_is_wanted_is_what_we_build(preset: str, over: dict[str, Any]) -> None:
    import torch

    from archipel import config as configuration
    from archipel import presets
    from archipel.backbones import base, flops
    from archipel.backbones.registry import build_expert
    from archipel.backbones.router import build_router
    from archipel.islands.network import wanted_config, wanted_facts, wanted_tensors

    config = configuration.build(configuration.merge(presets.fit_rope(presets.values(preset)), over))
    builders: list[tuple[str, Callable[..., Any]]] = [
        ("0", build_expert),
        ("monolith", build_expert),
        ("router", build_router),
    ]
    for name, build in builders:
        with torch.device("meta"):
            more = {"clusters": flops.cluster_width(config)} if name == "monolith" else {}
            network = build(config, seed=0, **more)
        shapes = {key: tuple(value.shape) for key, value in network.network.state_dict().items()}
        assert wanted_tensors(config, name) == shapes
        found = base.diffusers_config(network.network)
        found.pop("_diffusers_version")
        assert wanted_config(config, name) == found
        assert wanted_facts(config, name) == network.facts


def test_a_run_id_for_a_folder(honest: tuple[Path, Path], tmp_path: Path) -> None:
    from archipel.islands.admission import admit

    folder = Path(shutil.copytree(honest[1], tmp_path / "folder"))
    with pytest.raises(ArchipelError, match="holds run"):
        admit(folder, "0", run_id="0" * 64)
    with pytest.raises(ArchipelError, match="for buckets"):
        admit(folder, "0", reopen=True)
    assert admit(folder, "0", run_id=Run.open(folder).id).admitted


def test_the_page_shows_every_key_of_trust_toml_with_its_default() -> None:
    """And is itself a file that can be read, but for the places where keys and hashes stand."""
    import tomllib

    page = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()
    shown = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    assert set(shown) == set(trust.Trust.model_fields)
    defaults = trust.Trust()
    for section in ("bounds", "loss"):
        assert shown[section] == getattr(defaults, section).model_dump()
    assert set(shown["signature"]) == set(trust.Signature.model_fields)
    assert set(shown["signature"]["keys"][0]) == set(trust.Signer.model_fields)
