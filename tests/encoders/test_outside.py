"""Taking parts from outside: what is found, linked, joined and refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_parts import tiny_autoencoder, tiny_text

from archipel import store
from archipel.encoders import outside, resolving
from archipel.errors import ArchipelError, ConfigError, DamagedError


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_autoencoder(tmp_path_factory.mktemp("outside") / "pipe" / "vae", "wan")


def sharded(folder: Path, parts: int = 3) -> dict[str, torch.Tensor]:
    """A model folder with its weights in shards of mixed dtypes; returns all of its tensors."""
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    tensors = {
        f"layer.{n}.weight": torch.randn(3 + n, 5, generator=generator).mul(9).to(kinds[n % 3]) for n in range(7)
    } | {"flag": torch.tensor([True, False, True])}
    names, table = sorted(tensors), {}
    folder.mkdir(parents=True)
    for part in range(parts):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = {name: tensors[name] for name in names[part::parts]}
        save_file(own, str(folder / file), {"format": "pt"})
        table |= dict.fromkeys(own, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text('{"_class_name": "Anything"}')
    return tensors


def test_a_pipelines_folder_or_the_parts_own(wan: Path) -> None:
    from_pipeline = resolving.codec_values(str(wan.parent))
    from_part = resolving.codec_values(str(wan))
    assert {**from_pipeline, "path": ""} == {**from_part, "path": ""} and from_part["path"] == str(wan)


def test_a_single_file_is_linked_and_a_second_taking_changes_nothing(wan: Path, tmp_path: Path) -> None:
    names = outside.take(str(wan), ("vae",), tmp_path / "codec", "codec")
    weights = tmp_path / "codec" / "model.safetensors"
    assert names == ["config.json", "model.safetensors"]
    assert weights.samefile(wan / "diffusion_pytorch_model.safetensors")
    before = weights.stat()
    outside.take(str(wan), ("vae",), tmp_path / "codec", "codec")
    assert weights.stat() == before and not list(tmp_path.rglob("*.tmp*"))


def test_where_links_are_not_possible_files_are_copied(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    outside.take(str(wan), ("vae",), tmp_path, "codec")
    assert (tmp_path / "model.safetensors").read_bytes() == (wan / "diffusion_pytorch_model.safetensors").read_bytes()
    assert not (tmp_path / "model.safetensors").samefile(wan / "diffusion_pytorch_model.safetensors")


def test_shards_are_joined_to_one_file_of_the_hash_that_was_promised(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "model")
    place = outside.find(str(tmp_path / "model"), ("transformer",), "weights")[0]
    files = outside.weight_files(place, "weights")
    promised = outside.sha256_of(files)
    outside.take(str(tmp_path / "model"), ("transformer",), tmp_path / "base", "weights", sha256=promised)
    joined = tmp_path / "base" / "model.safetensors"
    assert store.sha256_file(joined) == promised
    again = load_file(str(joined))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in again)
    shapes = outside.tensor_shapes(files)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()} == outside.tensor_shapes([joined])


def test_other_weights_than_those_the_run_was_made_for(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match=r"sha256 .* run.toml says 000000"):
        outside.take(str(wan), ("vae",), tmp_path / "codec", "codec", sha256="0" * 64)
    assert not (tmp_path / "codec" / "model.safetensors").exists()


def test_a_tensor_that_is_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path / "model")
    first, second = sorted((tmp_path / "model").glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(DamagedError, match="both have a tensor"):
        outside.take(str(tmp_path / "model"), ("transformer",), tmp_path / "base", "weights")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "other.safetensors", "x.bin"])
def test_an_index_that_names_other_files_is_refused(tmp_path: Path, name: str) -> None:
    sharded(tmp_path / "model")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "secret.safetensors"))
    index = next((tmp_path / "model").glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(DamagedError, match="not beside it"):
        outside.take(str(tmp_path / "model"), ("transformer",), tmp_path / "base", "weights")


def test_links_out_of_the_folder_are_not_followed_and_links_inside_are(wan: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    shutil.copytree(wan, inside / "files")
    (inside / "vae").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (inside / "vae" / name).symlink_to(f"../files/{name}")
    outside.take(str(inside), ("vae",), tmp_path / "a", "codec")
    (tmp_path / "out").mkdir()
    shutil.copy(wan / "config.json", tmp_path / "out" / "config.json")
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors").symlink_to(wan / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ArchipelError, match="leads out"):
        outside.take(str(tmp_path / "out"), ("vae",), tmp_path / "b", "codec")


def test_the_hubs_own_cache_of_links_to_blobs_can_be_given_as_a_folder(wan: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, wan, "vae")
    outside.take(str(snapshot), ("vae",), tmp_path / "run", "codec")
    assert (tmp_path / "run" / "model.safetensors").is_file() and not (
        tmp_path / "run" / "model.safetensors"
    ).is_symlink()


def hub_cache(root: Path, part: Path, name: str) -> Path:
    """A repository in the form of the hub's cache (snapshots of links to blobs), holding ``part`` as ``name``."""
    repository = root / "hub" / "models--some--thing"
    snapshot = repository / "snapshots" / ("a" * 40)
    (snapshot / name).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(part.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / name / path.name).symlink_to(f"../../../blobs/{number}")
    (snapshot / "model_index.json").write_text("{}")
    return snapshot


def test_a_hub_id_comes_from_the_hubs_cache_when_there_is_no_network(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub_cache(tmp_path, wan, "vae")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    values = resolving.codec_values("some/thing")
    commit = "a" * 40  # what main is today: tomorrow's must not be taken
    assert values["path"] == f"some/thing@{commit}" and values["sha256"] == "" and values["channels"] == 16
    outside.take(values["path"], ("vae",), tmp_path / "run", "codec")
    part = resolving.codec_values("some/thing:vae")
    assert part["path"] == f"some/thing@{commit}:vae" and part["patch"] == values["patch"]
    assert resolving.codec_values(part["path"]) == part
    with pytest.raises(ArchipelError, match=r"no/thing.* copy it over by hand"):
        resolving.codec_values("no/thing")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda f: None, "there is no such folder, and it is no hub id"),
        (lambda f: f.write_text("x"), "is a file: give the folder"),
        (
            lambda f: f.mkdir(),
            "no checkpoint of diffusers or transformers: it holds neither config.json nor vae/config",
        ),
        (lambda f: _files(f, "model_index.json", "{}"), "is a pipeline of diffusers that has no vae"),
        (lambda f: _files(f / "vae", "x.safetensors", ""), "vae/config.json is missing: it is no checkpoint"),
        (lambda f: _files(f, "config.json", "{"), "not readable JSON"),
        (lambda f: _files(f, "config.json", "[]"), "is no JSON object"),
        (lambda f: _files(f, "config.json", '{"_class_name": "UNet2DModel"}'), "class 'UNet2DModel', not one of"),
        (lambda f: _files(f, "config.json", '{"_class_name": "AutoencoderKL"}'), "does not describe a AutoencoderKL"),
        (lambda f: _files(f, "config.json", '{"auto_map": {"AutoModel": "x.Y"}}'), "code of its own .*never runs"),
    ],
)
def test_what_is_no_checkpoint_says_so(tmp_path: Path, build: object, says: str) -> None:
    build(tmp_path / "given")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=says):
        resolving.codec_values(str(tmp_path / "given"))


def _files(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_pickles_are_named_and_not_opened(wan: Path, tmp_path: Path) -> None:
    shutil.copy(wan / "config.json", tmp_path / "config.json")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04never")
    with pytest.raises(ConfigError, match=r"pickle \(diffusion_pytorch_model.bin\).*save it again as safetensors"):
        resolving.codec_values(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no weights: .*found diffusion_pytorch_model.fp16.safetensors"):
        resolving.codec_values(str(tmp_path))


@pytest.mark.parametrize("cut", [4, 100, -64])
def test_a_torn_file_is_damaged(wan: Path, tmp_path: Path, cut: int) -> None:
    shutil.copytree(wan, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedError):
        outside.take(str(tmp_path), ("vae",), tmp_path / "run", "codec")
    with pytest.raises(DamagedError):  # `init` says so already
        resolving.codec_values(str(tmp_path))


def test_tokenizers_with_code_of_their_own_or_without_a_vocabulary(tmp_path: Path) -> None:
    tiny_text(tmp_path / "text", "t5")
    config = tmp_path / "text" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(ConfigError, match="code of its own"):
        resolving.text_values(str(tmp_path / "text"))
    (tmp_path / "text" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        resolving.text_values(str(tmp_path / "text"))
    shutil.rmtree(tmp_path / "text" / "tokenizer")
    with pytest.raises(ConfigError, match="tokenizer is missing"):
        resolving.text_values(str(tmp_path / "text"))


def test_nothing_here_imports_torch() -> None:
    import subprocess

    program = (
        "import sys; from archipel.encoders import outside, resolving; resolving.codec_values(sys.argv[1]);"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    folder = Path(__file__).parent / "missing"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert "there is no such folder" in done.stderr
    quiet = program.replace("resolving.codec_values(sys.argv[1]);", "")
    done = subprocess.run([sys.executable, "-c", quiet], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
