"""Judges that read folders saved by transformers: tiny random networks in the real formats, held against the library."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from archipel import store
from archipel.config import Evaluate
from archipel.encoders.features import evenly
from archipel.errors import ArchipelError
from archipel.evaluation.extractors import Judges

JUDGE = Evaluate(frames=4)
CAPTIONS = ["a cat", "the dog runs", "cat"]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIDE = 32


def some_clips(n: int = 3, frames: int = 8, seed: int = 0) -> np.ndarray:
    """uint8 (n, frames, 24, 40, 3): neither square nor of the networks' size."""
    return np.random.default_rng(seed).integers(0, 256, (n, frames, 24, 40, 3), dtype=np.uint8)


def write_processor(folder: Path, kind: str, **more: Any) -> None:
    size = {"shortest_edge": SIDE}
    facts = {"image_processor_type": kind, "do_resize": True, "size": size, "do_center_crop": True}
    crop = {"crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**facts, **crop, "do_normalize": True, "resample": 3, **IMAGENET, **more})
    )


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-pair tokenizer of CLIP's kind with a few words: vocab.json, merges.txt, tokenizer_config.json."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    vocab = write_tokenizer(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    text = {
        **SMALL,
        **ends,
        "vocab_size": len(vocab),
        "max_position_embeddings": 12,
        "pad_token_id": ends["eos_token_id"],
    }
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    write_processor(folder, "CLIPImageProcessor")
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    small = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    Dinov2Model(Dinov2Config(**small, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    write_processor(folder, "BitImageProcessor")
    return folder


def save_videomae(folder: Path, kind: type, **more: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    decoder = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 2}
    config = VideoMAEConfig(**SMALL, **decoder, image_size=SIDE, patch_size=8, num_frames=16, num_labels=5, **more)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms that do nothing would hide whether they are applied
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_processor(folder, "VideoMAEImageProcessor", resample=2)
    return model


def theirs(folder: Path, images: np.ndarray) -> torch.Tensor:
    """What transformers' own processor makes of images (N, H, W, 3), one at a time."""
    from PIL import Image

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    made = [
        processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"].reshape(3, SIDE, SIDE)
        for image in images
    ]
    return torch.stack(made)


# --- CLIP and the aesthetic heads -------------------------------------------------------------------------------------


@torch.no_grad()
def test_clip_is_the_librarys_own_cosine(clip_folder: Path) -> None:
    clips = some_clips()
    judges = Judges.open([f"clip={clip_folder}"], JUDGE, device="cpu")
    assert judges.scalars == ["CLIP"] and judges.features == [] and judges.needs_captions
    found = judges.measure(clips, CAPTIONS).scalars["CLIP"]

    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(CAPTIONS, padding=True, return_tensors="pt")
    for row, clip in enumerate(clips):
        out = model(**tokens, pixel_values=theirs(clip_folder, clip[evenly(8, 4)]))
        cosine = out.logits_per_image[:, row] / model.logit_scale.exp()  # (4 frames,)
        assert found[row] == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert found.dtype == np.float64 and len(set(found)) == 3


def test_a_clips_score_depends_neither_on_its_neighbours_nor_on_global_state(clip_folder: Path) -> None:
    clips, captions = some_clips(20, frames=2), ["a cat", "the dog runs to the cat and runs to the dog"] * 10
    torch.manual_seed(5)
    before = torch.get_rng_state()
    judges = Judges.open([f"clip={clip_folder}"], JUDGE, device="cpu")
    whole = judges.measure(clips, captions).scalars["CLIP"]
    alone = [judges.measure(clips[[row]], [captions[row]]).scalars["CLIP"][0] for row in (0, 17, 19)]
    assert np.allclose(whole[[0, 17, 19]], alone, atol=1e-6)  # the longer caption is cut at 12 tokens: no error
    assert torch.equal(torch.get_rng_state(), before)


def test_captions_are_asked_for(clip_folder: Path) -> None:
    judges = Judges.open([f"clip={clip_folder}"], JUDGE, device="cpu")
    with pytest.raises(ArchipelError, match="3 clips need as many captions, not 0"):
        judges.measure(some_clips())


def write_head(path: Path, width: int, kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    if kind == "linear":
        state = torch.nn.Linear(width, 1).state_dict()
    else:
        shapes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
        layers = torch.nn.Sequential(
            *[torch.nn.Linear(*shapes[place]) if place in shapes else torch.nn.Dropout(0.2) for place in range(8)]
        )
        state = torch.nn.ModuleDict({"layers": layers}).state_dict()
    torch.save(state, path)
    return dict(state)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@torch.no_grad()
def test_both_formats_of_the_aesthetic_head(clip_folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "head.pth"
    state = write_head(path, 16, kind)
    digest = store.sha256_file(path)
    judges = Judges.open([f"aesthetic={path}@sha256:{digest}", f"clip={clip_folder}"], JUDGE, device="cpu")
    assert judges.scalars == ["aesthetic", "CLIP"]  # in the order asked for
    clips = some_clips(2)
    found = judges.measure(clips, CAPTIONS[:2])

    model = CLIPModel.from_pretrained(clip_folder).eval()
    for row, clip in enumerate(clips):
        out = model.vision_model(pixel_values=theirs(clip_folder, clip[evenly(8, 4)])).pooler_output
        values = F.normalize(model.visual_projection(out), dim=-1)
        for prefix in [""] if kind == "linear" else [f"layers.{place}." for place in (0, 2, 4, 6, 7)]:
            values = values @ state[f"{prefix}weight"].T + state[f"{prefix}bias"]
        assert found.scalars["aesthetic"][row] == pytest.approx(float(values.mean()), abs=1e-6)
    assert judges.identity["aesthetic"]["weights"] == f"{digest}+{judges.identity['CLIP']['weights']}"
    assert kind in judges.identity["aesthetic"]["layer"]


def test_heads_that_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    def opened(path: Path, more: str = "") -> Judges:
        return Judges.open([f"clip={clip_folder}", f"aesthetic={path}{more}"], JUDGE, device="cpu")

    wide = tmp_path / "wide.pth"
    write_head(wide, 768, "linear")
    with pytest.raises(ArchipelError, match=r"width 768, the CLIP given with clip=\.\.\. has 16"):
        opened(wide)
    with pytest.raises(ArchipelError, match="sha256 is"):
        opened(wide, "@sha256:" + "0" * 64)
    with pytest.raises(ArchipelError, match=r"there is no such file"):
        opened(tmp_path / "none.pth")
    with pytest.raises(ArchipelError, match=r"give clip=\.\.\. beside it"):
        Judges.open([f"aesthetic={wide}"], JUDGE)

    trap = tmp_path / "trap.pth"
    mark = tmp_path / "ran"
    torch.save({"weight": _Touch(mark), "bias": torch.zeros(1)}, trap)
    with pytest.raises(ArchipelError, match="could run code: refused"):
        opened(trap)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(_Touch(mark)))
    with pytest.raises(ArchipelError, match="could run code: refused"):
        opened(plain)
    assert not mark.exists()
    torch.save({"layers.0.weight": torch.zeros(1, 16)}, trap)
    with pytest.raises(ArchipelError, match="expected weight and bias, or"):
        opened(trap)
    torch.save({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, trap)
    with pytest.raises(ArchipelError, match="do not fit together"):
        opened(trap)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# --- DINOv2 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dinov2_is_the_mean_class_token(dino_folder: Path) -> None:
    clips = some_clips(2, frames=2)  # fewer frames than asked for: all of them
    judges = Judges.open([f"dinov2={dino_folder}"], JUDGE, device="cpu")
    found = judges.measure(clips).features["dinov2"]
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    wanted = torch.stack([model(theirs(dino_folder, clip)).last_hidden_state[:, 0].mean(0) for clip in clips])
    assert found.dtype == np.float32 and np.allclose(found, wanted, atol=1e-5)
    facts = judges.identity["dinov2"]
    assert facts["metric"] == "FD-dinov2" and facts["resize"] == SIDE and facts["frames"] == 4
    assert facts["weights"] == store.sha256_file(dino_folder / "model.safetensors")


def test_settings_and_weights_decide_the_identity(dino_folder: Path, tmp_path: Path) -> None:
    first = Judges.open([f"dinov2={dino_folder}"], JUDGE, device="cpu").identity
    folder = tmp_path / "other"
    shutil.copytree(dino_folder, folder)
    assert Judges.open([f"dinov2={folder}"], JUDGE, device="cpu").identity == first
    write_processor(folder, "BitImageProcessor", image_std=[0.5, 0.5, 0.5])
    second = Judges.open([f"dinov2={folder}"], JUDGE, device="cpu").identity
    assert second != first and second["dinov2"]["weights"] == first["dinov2"]["weights"]
    Dinov2Model.from_pretrained(dino_folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sharded = Judges.open([f"dinov2={folder}"], JUDGE, device="cpu").identity["dinov2"]["weights"]
    assert sharded != first["dinov2"]["weights"]
    Judges.open([f"dinov2={folder}@sha256:{sharded}"], JUDGE, device="cpu")
    with pytest.raises(ArchipelError, match=f"sha256 is {sharded}"):
        Judges.open([f"dinov2={folder}@sha256:{'1' * 64}"], JUDGE, device="cpu")


def test_folders_that_are_refused(dino_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="there is no such folder"):
        Judges.open([f"dinov2={tmp_path / 'none'}"], JUDGE)
    with pytest.raises(ArchipelError, match="'clip'; dinov2 needs dinov2 or dinov2_with_registers"):
        Judges.open([f"dinov2={clip_folder}"], JUDGE)
    with pytest.raises(ArchipelError, match="is a file: give the folder"):
        Judges.open([f"dinov2={dino_folder / 'config.json'}"], JUDGE)
    folder = tmp_path / "folder"
    shutil.copytree(dino_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ArchipelError, match=r"preprocessor_config\.json is missing"):
        Judges.open([f"dinov2={folder}"], JUDGE)
    write_processor(folder, "BitImageProcessor")
    weights = store.map_tensors(folder / "model.safetensors")
    part = {name: np.array(value) for name, value in weights.items() if name != "layernorm.weight"}
    store.write_tensors(folder / "model.safetensors", part, {"format": "pt"})
    with pytest.raises(ArchipelError, match=r"lacks 1 weights of Dinov2Model, layernorm\.weight"):
        Judges.open([f"dinov2={folder}"], JUDGE)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ArchipelError, match="cannot be loaded"):
        Judges.open([f"dinov2={folder}"], JUDGE)
    (folder / "model.safetensors").unlink()
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())
    with pytest.raises(ArchipelError, match=r"has no model\.safetensors.*pickle"):
        Judges.open([f"dinov2={folder}"], JUDGE)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../up.safetensors"}}))
    with pytest.raises(ArchipelError, match=r"names '\.\./up\.safetensors'"):
        Judges.open([f"dinov2={folder}"], JUDGE)


def test_code_in_a_folder_is_not_run(dino_folder: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "ran"
    shutil.copytree(dino_folder, folder)
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for name, automatic in {"config.json": "AutoModel", "preprocessor_config.json": "AutoImageProcessor"}.items():
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, "auto_map": {automatic: "code.Thing"}}))
    Judges.open([f"dinov2={folder}"], JUDGE, device="cpu")
    assert not mark.exists()


def test_a_hub_id_that_cannot_be_had_names_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ArchipelError, match=r"dinov2=some/model is no folder here, and the hub did not give it.*copy it"
    ):
        Judges.open(["dinov2=some/model"], JUDGE)
    spec = f"i3d=some/model/i3d.pt@sha256:{'0' * 64}"
    with pytest.raises(ArchipelError, match="is no file here, and the hub did not give it"):
        Judges.open([spec], JUDGE, allow_torchscript=True)


# --- VideoMAE ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("frames", [8, 16, 20])
def test_videomae_classifier_is_the_input_of_its_own_head(tmp_path: Path, frames: int) -> None:
    model = save_videomae(tmp_path / "mae", VideoMAEForVideoClassification, use_mean_pooling=True)
    judges = Judges.open([f"videomae={tmp_path / 'mae'}"], JUDGE, device="cpu")
    clips = some_clips(5, frames=frames)
    found = judges.measure(clips).features["videomae"]
    seen: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    shown = {8: np.repeat(np.arange(8), 2), 16: np.arange(16), 20: np.array(evenly(20, 16))}[frames]
    model(torch.stack([theirs(tmp_path / "mae", clip[shown]) for clip in clips]))
    assert np.allclose(found, seen[0], atol=1e-5) and found.shape == (5, 32)
    facts = judges.identity["videomae"]
    assert facts["metric"] == "FVD-VideoMAE" and facts["frames"] == 16 and "final norm" in facts["layer"]


@torch.no_grad()
def test_videomae_encoders_and_pretraining_folders(tmp_path: Path) -> None:
    clips = some_clips(2, frames=16)
    encoder = save_videomae(tmp_path / "encoder", VideoMAEModel, use_mean_pooling=False)
    save_videomae(tmp_path / "pre", VideoMAEForPreTraining, use_mean_pooling=False)
    found = Judges.open([f"videomae={tmp_path / 'encoder'}"], JUDGE, device="cpu").measure(clips).features["videomae"]
    pixels = torch.stack([theirs(tmp_path / "encoder", clip) for clip in clips])
    assert np.allclose(found, encoder(pixels).last_hidden_state.mean(1), atol=1e-5)
    other = Judges.open([f"videomae={tmp_path / 'pre'}"], JUDGE, device="cpu")
    pretrained = VideoMAEForPreTraining.from_pretrained(tmp_path / "pre").videomae.eval()
    assert np.allclose(
        other.measure(clips).features["videomae"], pretrained(pixels).last_hidden_state.mean(1), atol=1e-5
    )


def test_videomae_whose_two_files_disagree(tmp_path: Path) -> None:
    save_videomae(tmp_path / "mae", VideoMAEModel)
    write_processor(tmp_path / "mae", "VideoMAEImageProcessor", crop_size={"height": 16, "width": 16})
    with pytest.raises(ArchipelError, match=r"makes images of 16 pixels, config\.json expects 32"):
        Judges.open([f"videomae={tmp_path / 'mae'}"], JUDGE)
