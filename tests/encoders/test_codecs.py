"""Codecs against closed forms: blocks, principal components of known processes, exact inverses, what is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from archipel import store
from archipel.config import Codec as CodecConfig
from archipel.encoders import codecs
from archipel.encoders.codecs import PatchPCA, Pixels, from_blocks, from_uint8, round_trip, to_blocks, to_uint8
from archipel.errors import ArchipelError, DamagedError, MissingStageError, Stopped
from archipel.progress import StopFlag

PATCH = (2, 4, 4)
D = 3 * 2 * 4 * 4


def smooth_clips(n: int, seed: int = 0, size: int = 16, frames: int = 4) -> np.ndarray:
    """uint8 (n, F, H, W, 3): moving coloured blobs, smooth enough for PCA to have something to keep."""
    random = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:size, 0:size] / size
    clips = np.empty((n, frames, size, size, 3))
    for clip in clips:
        centre, speed, colour = random.random(2), random.normal(0, 0.1, 2), random.random(3)
        for f, frame in enumerate(clip):
            cy, cx = centre + f * speed
            frame[:] = 1 - np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.05)[:, :, None] * (1 - colour)
    return (clips * 255).round().astype(np.uint8)


def low_rank_clips(n: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blocks mean + a @ directions with known standard deviations; returns clips (float) and the directions (rank, D)."""
    random = np.random.Generator(np.random.PCG64(seed))
    directions = np.linalg.qr(random.normal(size=(D, rank)))[0].T
    scales = 0.5 / 1.5 ** np.arange(rank)
    weights = random.normal(size=(n, 2, 4, 4, rank)) * scales
    blocks = 0.05 * random.normal(size=D) + weights @ directions
    return from_blocks(torch.from_numpy(blocks).float(), PATCH).numpy(), directions


class FloatRows:
    """Float clips in the place of cached bytes, so that a process is seen without rounding."""

    def __init__(self, clips: np.ndarray) -> None:
        self.clips = clips
        self.shape = (len(clips), *clips.shape[2:], 3)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, rows: object) -> np.ndarray:
        return self.clips[rows]


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "from_uint8", torch.from_numpy)


def rows(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


def test_bytes_survive_the_way_to_floats_and_back_and_floats_lie_in_their_range() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, -1)
    floats = from_uint8(levels)
    assert floats.shape == (1, 3, 1, 16, 16) and floats.dtype == torch.float32
    assert (float(floats.min()), float(floats.max())) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(floats), levels)
    assert to_uint8(torch.full((1, 3, 1, 1, 1), 7.0)).max() == 255
    assert to_uint8(torch.full((1, 3, 1, 1, 1), -7.0)).min() == 0


def test_blocks_hold_the_numbers_of_their_own_place_and_invert() -> None:
    clips = torch.arange(2 * 3 * 4 * 8 * 12, dtype=torch.float32).reshape(2, 3, 4, 8, 12)
    blocks = to_blocks(clips, PATCH)
    assert blocks.shape == (2, 2, 2, 3, D)
    assert torch.equal(blocks[1, 1, 0, 2], clips[1, :, 2:4, 0:4, 8:12].flatten())
    assert torch.equal(from_blocks(blocks, PATCH), clips)
    with pytest.raises(ArchipelError, match=r"cannot be cut into blocks of 2 x 4 x 4 \(codec.patch\)"):
        to_blocks(clips[:, :, :3], PATCH)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_pca_of_a_low_rank_process_is_exact_and_finds_its_subspace(gamma: float) -> None:
    clips, directions = low_rank_clips(24, 5)
    codec = PatchPCA.fit(FloatRows(clips), rows(24), PATCH, 5, gamma)
    floats = torch.from_numpy(clips)
    again = from_blocks(
        codec.encode(floats).movedim(1, -1) @ (codec.basis * codec._divisor()[:, None]) + codec.mean, PATCH
    )
    assert float((again - floats).abs().max()) < 1e-5
    assert torch.equal(codec.decode(codec.encode(floats)), again.clamp(-1, 1))
    assert codec.explained == pytest.approx(1, abs=1e-9)
    overlap = torch.linalg.svdvals(codec.basis @ torch.from_numpy(directions).float().T)
    assert torch.allclose(overlap, torch.ones(5), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_all_channels_are_an_exact_change_of_basis(gamma: float) -> None:
    clips = smooth_clips(24)
    codec = PatchPCA.fit(clips, rows(24), PATCH, D, gamma)
    assert torch.allclose(codec.basis @ codec.basis.T, torch.eye(D), atol=1e-5)
    new = from_uint8(smooth_clips(4, seed=9))
    assert torch.allclose(codec.decode(codec.encode(new)), new, atol=2e-5)
    assert np.array_equal(to_uint8(codec.decode(codec.encode(new))), to_uint8(new))


def test_latents_have_unit_variance_and_gamma_decides_how_it_is_shared() -> None:
    clips = smooth_clips(40)
    variances = {}
    for gamma in (0.0, 0.5, 1.0):
        codec = PatchPCA.fit(clips, rows(40), PATCH, 12, gamma)
        latents = codec.encode(from_uint8(clips))
        assert latents.shape == (40, *codec.latent_shape(4, 16, 16)) == (40, 12, 2, 4, 4)
        assert latents.dtype == torch.float32 and latents.is_contiguous()
        flat = latents.movedim(1, 0).flatten(1)
        assert torch.allclose(flat.mean(1), torch.zeros(12), atol=1e-3)
        variances[gamma] = flat.var(1, correction=0)
        assert float(variances[gamma].mean()) == pytest.approx(1, rel=1e-3)
    assert torch.allclose(variances[1.0], torch.ones(12), rtol=1e-3)  # whitened
    ratio = {gamma: float(variances[gamma][0] / variances[gamma][-1]) for gamma in variances}
    assert ratio[0.5] == pytest.approx(ratio[0.0] ** 0.5, rel=1e-2)  # sigma^(2 - 2 gamma)


def test_pca_agrees_with_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    clips = smooth_clips(30)
    codec = PatchPCA.fit(clips, rows(30), PATCH, 8, 0.0)
    flat = to_blocks(from_uint8(clips), PATCH).flatten(0, 3).double().numpy()
    theirs = PCA(8, svd_solver="full").fit(flat)
    assert np.allclose(np.abs((codec.basis.numpy() * theirs.components_).sum(1)), 1, atol=1e-4)
    assert np.allclose(codec.sigma.numpy() ** 2, theirs.explained_variance_ * (len(flat) - 1) / len(flat), rtol=1e-4)
    assert codec.explained == pytest.approx(theirs.explained_variance_ratio_.sum(), abs=1e-6)


def test_fit_sees_training_rows_only_is_reproducible_and_fixes_signs() -> None:
    clips = smooth_clips(30)
    codec = PatchPCA.fit(clips, rows(20), PATCH, 8, 0.5, seed=3)
    other = clips.copy()
    other[20:] = 0  # what is not a training row cannot matter
    again = PatchPCA.fit(other, rows(20), PATCH, 8, 0.5, seed=3)
    assert torch.equal(codec.basis, again.basis) and torch.equal(codec.mean, again.mean) and codec.scale == again.scale
    flipped = PatchPCA.fit(255 - clips, rows(20), PATCH, 8, 0.5, seed=3)  # mirrored data: the same signs
    assert torch.allclose(flipped.basis, codec.basis, atol=1e-3)
    assert bool((codec.basis.gather(1, codec.basis.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_bounded_sample_is_drawn_by_seed_and_comes_close_to_the_whole() -> None:
    clips = smooth_clips(60)
    whole = PatchPCA.fit(clips, rows(60), PATCH, 4, 0.0)
    few = PatchPCA.fit(clips, rows(60), PATCH, 4, 0.0, blocks=600, seed=1)
    assert not torch.equal(whole.basis, few.basis)
    assert torch.equal(few.basis, PatchPCA.fit(clips, rows(60), PATCH, 4, 0.0, blocks=600, seed=1).basis)
    assert not torch.equal(few.basis, PatchPCA.fit(clips, rows(60), PATCH, 4, 0.0, blocks=600, seed=2).basis)
    # Components of nearly equal variance may swap, so what counts is how well the subspace serves.
    floats = from_uint8(clips)
    assert round_trip(few, floats)["psnr"] > round_trip(whole, floats)["psnr"] - 0.5
    # A bound below the number of channels does not make the fit impossible.
    assert PatchPCA.fit(clips, rows(60), PATCH, 50, 0.0, blocks=10).channels == 50


def test_clips_of_one_colour_give_finite_latents_and_come_back() -> None:
    clips = np.full((8, 4, 16, 16, 3), 200, np.uint8)
    codec = PatchPCA.fit(clips, rows(8), PATCH, 6, 1.0)
    latents = codec.encode(from_uint8(clips))
    assert bool(latents.isfinite().all())
    assert np.array_equal(to_uint8(codec.decode(latents)), clips)


def test_too_few_blocks_are_refused_with_the_number_that_works() -> None:
    with pytest.raises(ArchipelError, match=r"codec.channels = 40 is more than the 32 blocks .* at most 32"):
        PatchPCA.fit(smooth_clips(4), rows(1), PATCH, 40, 0.5)
    with pytest.raises(ArchipelError, match="no training clips"):
        codecs.fit_codec(CodecConfig(patch=PATCH, channels=4), smooth_clips(2), rows(0))


def test_fitting_can_be_stopped() -> None:
    stop = StopFlag()
    stop.signal = 2
    for kind in ("patch-pca", "pixels"):
        with pytest.raises(Stopped):
            codecs.fit_codec(CodecConfig(kind=kind, patch=PATCH, channels=4), smooth_clips(2), rows(2), stop=stop)


def test_pixels_rearrange_and_scale_and_lose_nothing() -> None:
    clips = smooth_clips(12)
    codec = codecs.fit_codec(CodecConfig(kind="pixels", patch=PATCH), clips, rows(12))
    floats = from_uint8(clips)
    latents = codec.encode(floats)
    assert isinstance(codec, Pixels) and latents.shape == (12, *codec.latent_shape(4, 16, 16)) == (12, D, 2, 4, 4)
    assert float(latents.var()) == pytest.approx(1, rel=1e-3) and float(latents.mean()) == pytest.approx(0, abs=1e-3)
    assert np.array_equal(to_uint8(codec.decode(latents)), clips)
    numbers = round_trip(codec, floats)
    assert numbers["psnr"] > 100 and numbers["seam_space"] == pytest.approx(numbers["seam_space_original"], rel=1e-4)


@pytest.mark.parametrize("kind", ["patch-pca", "pixels"])
def test_a_saved_codec_does_the_same_and_damage_is_named(tmp_path: Path, kind: str) -> None:
    clips = smooth_clips(12)
    codec = codecs.fit_codec(CodecConfig(kind=kind, patch=PATCH, channels=10), clips, rows(12))
    with pytest.raises(MissingStageError, match="archipel prepare"):
        codecs.load_codec(tmp_path / "codec")
    card = codec.save(tmp_path / "codec", "run", round_trip={})
    assert card["kind"] == "codec" and card["codec"]["name"] == kind and card["codec"]["channels"] == codec.channels
    again = codecs.load_codec(tmp_path / "codec")
    floats = from_uint8(clips)
    assert type(again) is type(codec) and torch.equal(again.encode(floats), codec.encode(floats))
    assert torch.equal(again.decode(again.encode(floats)), codec.decode(codec.encode(floats)))
    assert codec.save(tmp_path / "twin", "run")["files"] == card["files"]  # same codec, same bytes
    model = tmp_path / "codec" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        codecs.load_codec(tmp_path / "codec")


def test_a_codec_whose_card_and_tensors_disagree_is_refused(tmp_path: Path) -> None:
    codec = PatchPCA.fit(smooth_clips(12), rows(12), PATCH, 10, 0.5)
    codec.save(tmp_path, "run")
    card = store.read_json(tmp_path / "card.json")
    for harm in ({"patch": [4, 4, 4]}, {"channels": 11}, {"patch": "x"}, {"gamma": None}):
        store.write_sealed(tmp_path / "card.json", {**card, "codec": {**card["codec"], **harm}})
        with pytest.raises(DamagedError, match=str(tmp_path)):
            codecs.load_codec(tmp_path)
    store.write_sealed(tmp_path / "card.json", {**card, "codec": {**card["codec"], "name": "vae"}})
    with pytest.raises(ArchipelError, match="does not know"):
        codecs.load_codec(tmp_path)


def test_psnr_is_the_known_one_of_a_known_error() -> None:
    class Worse(Pixels):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return super().decode(latents) + 0.02

    numbers = round_trip(Worse(PATCH, 0.0, 1.0), torch.zeros(2, 3, 4, 16, 16))
    assert numbers["psnr"] == pytest.approx(10 * np.log10(4 / 0.02**2), abs=1e-3)
    assert numbers["seam_space"] is None  # nothing changes anywhere


def test_seams_are_seen_where_blocks_meet_and_only_there() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(4, 3, 4, 16, 16, generator=generator) * 0.5

    class Blocky(Pixels):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            height = torch.arange(4).repeat_interleave(4).float() * 0.4  # one step up per block of rows
            return super().decode(latents) + height[:, None]

    clean, blocky = (round_trip(kind(PATCH, 0.0, 1.0), clips) for kind in (Pixels, Blocky))
    assert clean["seam_space"] == pytest.approx(1, abs=0.05) and clean["seam_time"] == pytest.approx(1, abs=0.05)
    assert blocky["seam_space"] > 1.4 and blocky["seam_space_original"] == pytest.approx(clean["seam_space"])
    assert blocky["seam_time"] == pytest.approx(clean["seam_time"], rel=1e-4)
    assert round_trip(Pixels((4, 4, 4), 0.0, 1.0), clips)["seam_time"] is None  # one block in time: no border
    with pytest.raises(ValueError, match="at least one clip"):
        round_trip(Pixels(PATCH, 0.0, 1.0), [])


def test_round_trip_does_not_depend_on_batching_and_more_channels_are_better() -> None:
    clips = smooth_clips(24)
    floats = from_uint8(clips)
    quality = []
    for channels in (2, 8, 32):
        codec = PatchPCA.fit(clips, rows(24), PATCH, channels, 0.5)
        whole, parts = round_trip(codec, floats), round_trip(codec, iter(floats.split(5)))
        assert whole == pytest.approx(parts, rel=1e-6)
        quality.append(whole["psnr"])
    assert quality[0] < quality[1] < quality[2]
