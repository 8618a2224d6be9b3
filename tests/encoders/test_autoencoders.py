"""Autoencoders of diffusers as codecs: parity with direct calls, temporal rules, statistics, tiling, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_parts import AUTOENCODERS, autoencoder_class, tiny_autoencoder

from archipel.encoders import autoencoders, codecs, outside, resolving
from archipel.errors import ArchipelError, ConfigError, DamagedError

VIDEO = ("hunyuan", "wan", "ltx", "cogvideox")
FRAMES = {"kl": 3, "tiny": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("autoencoders")
    return {name: tiny_autoencoder(root / name, name) for name in AUTOENCODERS}


@pytest.fixture(scope="module")
def opened(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, autoencoders.Autoencoder]:
    root = tmp_path_factory.mktemp("taken")
    for name, folder in made.items():
        outside.take(str(folder), resolving.VAE, root / name, "codec")
    return {name: autoencoders.load(root / name) for name in made}


def clips(name: str, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, FRAMES.get(name, 9), size, 2 * size, generator=generator) * 2 - 1


@torch.no_grad()
def direct(model: Any, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and clips as each class's own pipeline computes them, written out for each."""
    c = model.config
    if name in ("kl", "tiny"):
        images = x.movedim(1, 2).flatten(0, 1)
        found = model.encode(images)
        raw = found.latents if name == "tiny" else found.latent_dist.mode()
        z = (raw - (c.shift_factor or 0.0)) * c.scaling_factor
        y = model.decode(z / c.scaling_factor + (c.shift_factor or 0.0)).sample
        return (part.unflatten(0, (len(x), -1)).movedim(1, 2) for part in (z, y))  # type: ignore[return-value]
    raw = model.encode(x).latent_dist.mode()
    if name == "wan":  # WanPipeline
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (c.latents_mean, c.latents_std))
        z = (raw - mean) * (1.0 / std)
        return z, model.decode(z / (1.0 / std) + mean).sample
    if name == "ltx":  # LTXPipeline._normalize_latents, _denormalize_latents
        mean, std = (values.view(1, -1, 1, 1, 1) for values in (model.latents_mean, model.latents_std))
        z = (raw - mean) * c.scaling_factor / std
        return z, model.decode(z * std / c.scaling_factor + mean, None).sample
    z = raw * c.scaling_factor  # HunyuanVideoPipeline, CogVideoXPipeline
    return z, model.decode(z / c.scaling_factor).sample


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_parity_with_direct_calls(
    name: str, made: dict[str, Path], opened: dict[str, autoencoders.Autoencoder]
) -> None:
    model = autoencoder_class(name).from_pretrained(str(made[name]), use_safetensors=True).eval()
    x, codec = clips(name), opened[name]
    wanted, back = direct(model, name, x)
    z = codec.encode(x)
    assert z.shape[1:] == codec.latent_shape(*x.shape[2:]) and z.dtype == torch.float32
    assert torch.allclose(z, wanted, atol=1e-5)
    y = codec.decode(z)
    assert y.shape == x.shape and float(y.abs().max()) <= 1
    assert torch.allclose(y, back.clamp(-1, 1), atol=1e-5)
    assert torch.equal(codec.encode(x[1:]), z[1:]), "a clip's latents must not depend on its batch"


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_what_init_resolves_is_what_the_model_does(
    name: str, made: dict[str, Path], opened: dict[str, autoencoders.Autoencoder]
) -> None:
    found = resolving.codec_values(str(made[name]))
    codec = opened[name]
    assert (tuple(found["patch"]), found["channels"], found["causal"]) == (codec.patch, codec.channels, codec.causal)
    assert found["model"] == AUTOENCODERS[name][0] and codec.causal == (name in VIDEO)
    for frames in (1, 5, 13) if codec.causal else (1, 2):
        x = clips(name)[:1, :, :1].expand(-1, -1, frames, -1, -1)
        assert codec.encode(x).shape[1:] == codec.latent_shape(frames, 16, 32)


def test_cogvideox_gives_all_frames_back_only_of_an_odd_number_of_latent_frames(
    opened: dict[str, autoencoders.Autoencoder],
) -> None:
    """What the rule of 8n + 1 frames in config.fits stands on."""
    model = opened["cogvideox"].model
    got = {T: model.decode(torch.zeros(1, 4, T, 2, 2)).sample.shape[2] for T in (1, 2, 3, 4, 5)}
    assert got == {1: 1, 2: 8, 3: 9, 4: 16, 5: 17}
    with pytest.raises(ArchipelError, match=r"8 frames .* instead of 5"):
        opened["cogvideox"].decode(torch.zeros(1, 4, 2, 2, 2))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_first_frame_alone_has_its_own_latent(name: str, opened: dict[str, autoencoders.Autoencoder]) -> None:
    codec, x = opened[name], clips(name)
    frames = torch.from_numpy(codecs.to_uint8(x))
    still = codecs.still_latents(codec, frames[:, 0], x.shape[2])
    C, _, H, W = codec.latent_shape(*x.shape[2:])
    assert still.shape == (2, C, H, W)
    held = codecs.from_uint8(frames[:, :1])
    if codec.causal:
        assert torch.equal(still, codec.encode(held)[:, :, 0])
    else:  # as a clip that repeats the frame
        assert torch.allclose(still, codec.encode(held.expand(-1, -1, x.shape[2], -1, -1))[:, :, 0], atol=1e-6)
    if name in ("wan", "kl", "tiny"):  # those do not look ahead: a clip's first latent frame is that of its first frame
        assert torch.allclose(still, codec.encode(codecs.from_uint8(frames))[:, :, 0], atol=1e-5)


def test_still_latents_of_packaged_codecs_are_a_still_clips_first_latent_frame() -> None:
    pixels = codecs.Pixels((4, 8, 8), 0.1, 0.5)
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    whole = pixels.encode(codecs.from_uint8(np.repeat(frames[:, None], 8, 1)))
    assert torch.equal(codecs.still_latents(pixels, frames, 8), whole[:, :, 0])


@pytest.mark.parametrize("name", ["hunyuan", "wan", "ltx", "cogvideox", "kl", "tiny"])
def test_tiling_gives_nearly_the_same(name: str, made: dict[str, Path]) -> None:
    model = autoencoder_class(name).from_pretrained(str(made[name]), use_safetensors=True)
    whole = autoencoders.Autoencoder(model)
    x = clips(name, size=32)[:1, :, :, :, :32]
    x = torch.nn.functional.interpolate(x.flatten(0, 2)[:, None], scale_factor=3, mode="bilinear")[:, 0].reshape(
        1, 3, x.shape[2], 96, 96
    )
    before = whole.encode(x)
    tiled = autoencoders.Autoencoder(model, tiling=True)
    assert tiled.model.use_tiling and tiled.facts()["tiling"]
    for key in vars(tiled.model):  # released models begin at 256 or 512 pixels
        if key in ("tile_sample_min_height", "tile_sample_min_width", "tile_sample_min_size"):
            setattr(tiled.model, key, 64)
        elif key in ("tile_sample_stride_height", "tile_sample_stride_width"):
            setattr(tiled.model, key, 48)
        elif key in ("tile_latent_min_height", "tile_latent_min_width", "tile_latent_min_size"):
            setattr(tiled.model, key, 8)
        elif key.startswith("tile_overlap_factor") and name in (
            "tiny",
            "cogvideox",
        ):  # 64 pixels overlap by one latent position only
            setattr(tiled.model, key, 0.25)
    after = tiled.encode(x)
    assert after.shape == before.shape and not torch.equal(after, before)
    assert float((after - before).std() / before.std()) < 1  # random weights see far; trained ones do not
    assert tiled.decode(after).shape == x.shape


def test_round_trip_knows_where_a_causal_codecs_blocks_begin() -> None:
    """A codec that adds 0.1 to each block's frames in turn has all its jumps between 0|1, 4|5, ..."""

    class Steps:
        name, patch, causal = "steps", (4, 4, 4), True

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            block = (torch.arange(z.shape[2]) + 3) // 4
            return z + 0.1 * block[None, None, :, None, None]

        def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
            return 3, frames, height, width

    flat = torch.linspace(-0.5, 0.5, 9)[None, None, :, None, None].expand(1, 3, 9, 8, 8)
    report = codecs.round_trip(Steps(), flat)
    assert report["seam_time"] == pytest.approx((0.125 + 0.1) / 0.125, rel=1e-4)
    assert report["seam_time_original"] == pytest.approx(1.0, rel=1e-4)


def test_ltx_decoders_that_are_told_a_time_and_add_noise(tmp_path: Path) -> None:
    noisy = {
        "timestep_conditioning": True,
        "decoder_inject_noise": (True, True, True, True, True),
    }
    folder = tiny_autoencoder(tmp_path / "ltx", "ltx", **noisy)
    outside.take(str(folder), resolving.VAE, tmp_path / "taken", "codec")
    codec = autoencoders.load(tmp_path / "taken")
    z = codec.encode(clips("ltx"))
    before = torch.get_rng_state()
    assert torch.equal(codec.decode(z), codec.decode(z)), "decoding twice must give the same clip"
    assert torch.equal(before, torch.get_rng_state())


def test_weights_that_do_not_fit_their_configuration(made: dict[str, Path], tmp_path: Path) -> None:
    outside.take(str(made["wan"]), resolving.VAE, tmp_path, "codec")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8})
    )
    with pytest.raises(DamagedError, match="does not fit"):
        autoencoders.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_scales": "two", "base_dim": -4}))
    with pytest.raises(DamagedError, match=r"does not (describe|fit)"):
        autoencoders.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_res_blocks": 10**9}))
    with pytest.raises(ConfigError, match="at most 100 layers"):
        autoencoders.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim_mult": []}))
    with pytest.raises(ConfigError, match="not usable"):
        autoencoders.load(tmp_path)


def test_image_autoencoders_from_before_their_attention_was_renamed(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(str(made["kl"] / "diffusion_pytorch_model.safetensors"))
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    shutil.copy(made["kl"] / "config.json", tmp_path / "config.json")
    save_file(renamed, str(tmp_path / "model.safetensors"))
    x = clips("kl")
    outside.take(str(made["kl"]), resolving.VAE, tmp_path / "new", "codec")
    assert torch.equal(autoencoders.load(tmp_path).encode(x), autoencoders.load(tmp_path / "new").encode(x))


def test_clips_that_do_not_fit_are_refused(opened: dict[str, autoencoders.Autoencoder]) -> None:
    with pytest.raises(ArchipelError, match=r"4n \+ 1"):
        opened["wan"].encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ArchipelError, match="divisible by 8"):
        opened["tiny"].encode(torch.zeros(1, 3, 2, 12, 16))


def test_empty_batches(opened: dict[str, autoencoders.Autoencoder]) -> None:
    codec = opened["wan"]
    assert codec.encode(torch.zeros(0, 3, 9, 16, 16)).shape == (0, 16, 3, 2, 2)
    assert codec.decode(torch.zeros(0, 16, 3, 2, 2)).shape == (0, 3, 9, 16, 16)


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_statistics_that_are_no_numbers_are_refused(key: str) -> None:
    model = autoencoder_class("wan")(**{**AUTOENCODERS["wan"][1], key: [float("nan")] * 16})
    with pytest.raises(ArchipelError, match="no finite number"):
        autoencoders.Autoencoder(model)
