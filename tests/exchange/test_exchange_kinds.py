"""Exports of runs of every kind: adapters over a base, given frames, parts from outside; and one expert alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, LTXPipeline, WanPipeline
from PIL import Image
from tests.ensemble import conftest as small
from tests.exchange.makers import adapted_run, outside_run

from archipel import ArchipelPipeline, store
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError, DamagedError
from archipel.exchange import single
from archipel.exchange.bring import bring
from archipel.exchange.folder import export
from archipel.flow import draws
from archipel.run import Run

PROMPTS = ["a red ball moves", "two blue squares"]


def levels(frames: np.ndarray) -> np.ndarray:
    return np.round(frames * 255).astype(int)


def open_quietly(folder: Path, **more: Any) -> ArchipelPipeline:
    pipe = ArchipelPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_frames(run: Run, pipe: ArchipelPipeline, *strategies: str, **more: Any) -> None:
    for strategy in strategies:
        ours = Archipelago.load(run.root).generate(PROMPTS, strategy=strategy, steps=2, seeds=4, **more)
        theirs = pipe(PROMPTS, strategy=strategy, num_inference_steps=2, seeds=4, **more)
        assert np.abs(levels(theirs.frames) - ours.clips).max() <= 1  # times in float32 as the scheduler has them


# --- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    run = adapted_run(tmp_path_factory.mktemp("adapted") / "run")
    folder = run.root.with_name("out")
    export(run.root, folder, monolith=True)
    return run, folder


def test_adapters_go_out_beside_one_base(adapted: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = adapted
    pipe = open_quietly(folder)
    same_frames(run, pipe, "full", "expert-1", "monolith")
    assert sorted(pipe.experts) == ["0", "1", "2"] and not list(folder.glob("expert_*/diffusion_pytorch_model*"))
    small_file = (folder / "expert_0" / "pytorch_lora_weights.safetensors").stat().st_size
    assert small_file < (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size / 2
    pipe.save_pretrained(tmp_path / "again")
    again = open_quietly(tmp_path / "again")
    asked: dict[str, Any] = {"num_inference_steps": 2, "seeds": 4, "strategy": "full"}
    assert np.array_equal(again(PROMPTS, **asked).frames, pipe(PROMPTS, **asked).frames)
    assert store.sha256_file(tmp_path / "again" / "transformer" / "config.json")


def test_diffusers_itself_reads_base_and_adapter(adapted: tuple[Run, Path]) -> None:
    """Through ``load_lora_adapter``, the network answers as the merged weights of the run do."""
    run, folder = adapted
    theirs = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    name = "pytorch_lora_weights.safetensors"
    theirs.load_lora_adapter(folder / "expert_1", weight_name=name, prefix="transformer")
    ours = Archipelago.load(run.root).parts.denoiser("1")
    from archipel.backbones.flux import FluxDenoiser

    facts = {key: value for key, value in ours.facts.items() if key != "lora"}
    cond, _ = Archipelago.load(run.root).encode(PROMPTS)
    x, t = torch.randn(2, 192, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        found = FluxDenoiser(theirs, facts)(x, t, cond)
        torch.testing.assert_close(found, ours(x, t, cond), rtol=1e-5, atol=1e-5)
        plain = FluxDenoiser(FluxTransformer2DModel.from_pretrained(folder / "transformer"), facts)(x, t, cond)
    assert (found - plain).abs().max() > 1e-2


def test_adapters_that_do_not_fit_are_refused(adapted: tuple[Run, Path], tmp_path: Path) -> None:
    _, folder = adapted
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    other = bad / "expert_1" / "pytorch_lora_weights.safetensors"
    shutil.copy(folder / "transformer" / "diffusion_pytorch_model.safetensors", other)
    with pytest.raises(DamagedError, match=r"expert_1.*the adapter has"):
        ArchipelPipeline.from_pretrained(bad)
    other.unlink()
    with pytest.raises(DamagedError, match="expert_1"):
        ArchipelPipeline.from_pretrained(bad)


def test_adapters_come_in_over_the_same_base_only(adapted: tuple[Run, Path], exported: Path, tmp_path: Path) -> None:
    run, folder = adapted
    own = Run.open(shutil.copytree(run.root, tmp_path / "own"))
    before = Archipelago.load(own.root).generate("a ball", strategy="expert-1", steps=2).clips
    bring(own.root, "0", folder / "expert_1", force=True)
    assert np.array_equal(Archipelago.load(own.root).generate("a ball", strategy="expert-0", steps=2).clips, before)
    card = store.read_card(own.base, "base")
    assert card is not None
    store.write_card(own.base, "base", own.id, card["files"], sha256="0" * 64)
    with pytest.raises(ArchipelError, match=r"lora of .*expert_1 is"):
        bring(own.root, "0", folder / "expert_1", force=True)
    with pytest.raises(ArchipelError, match="not imported"):
        bring(own.root, "0", exported / "expert_1", force=True)


def test_whole_runs_take_no_adapter(adapted: tuple[Run, Path], own: Run) -> None:
    with pytest.raises(ArchipelError, match="not imported"):
        bring(own.root, "0", adapted[1] / "expert_1", force=True)


# --- given frames ------------------------------------------------------------------------------------------------------


def test_pictures_are_given_to_the_pipeline(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "clips": {"frames": 8},
        "expert": {"tasks": [1.0, 5.0, 1.0, 1.0]},
        "router": {"reads_image": True},
    }
    run = small.build(tmp_path / "run", **sections)
    export(run.root, tmp_path / "out")
    pipe = open_quietly(tmp_path / "out")
    noise = np.random.default_rng(0)
    first, last = (noise.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(2))
    same_frames(run, pipe, "full", image=Image.fromarray(first), last_image=last)
    same_frames(run, pipe, "top1", image=[first, last])
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "strategy": "full"}
    plain = pipe(PROMPTS, seeds=0, **asked).frames
    assert (pipe(PROMPTS, seeds=0, image=first, **asked).frames - plain).abs().max() > 1e-3
    twice = pipe(PROMPTS, seeds=[0, 1, 2, 3], image=[first, last], num_videos_per_prompt=2, **asked).frames
    once = pipe([PROMPTS[0], PROMPTS[1]], seeds=[1, 3], image=[first, last], **asked).frames
    torch.testing.assert_close(twice[[1, 3]], once, rtol=1e-4, atol=1e-4)


def test_a_picture_is_refused_where_none_was_trained_with(pipe: ArchipelPipeline) -> None:
    with pytest.raises(ArchipelError, match=r"expert\.tasks"):
        pipe("a ball", image=np.zeros((8, 8, 3), np.uint8))


# --- parts from outside ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Run:
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": 32, "num_layers": 6, "ffn_dim": 128}
    return outside_run(tmp_path_factory.mktemp("wan") / "run", "wan", "wan", "umt5", **sizes)


def test_a_run_of_parts_from_outside_goes_out_whole(wan: Run, tmp_path: Path) -> None:
    export(wan.root, tmp_path / "out")
    index = store.read_json(tmp_path / "out" / "model_index.json")
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"] and index["text_encoder"][1] == "UMT5EncoderModel"
    same_frames(wan, open_quietly(tmp_path / "out"), "full")
    parts = str(wan.root.parent).encode()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and parts in path.read_bytes()]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_one_expert_alone_opens_in_diffusers_own_pipeline(wan: Run, tmp_path: Path, guidance: float) -> None:
    done = single.export(wan.root, tmp_path / "alone", "1", licence="mit")
    assert done.pipeline == "WanPipeline" and "max_sequence_length=16" in " ".join(done.notes)
    pipe = WanPipeline.from_pretrained(tmp_path / "alone")
    pipe.set_progress_bar_config(disable=True)
    steps = wan.config.sample.steps
    ours = Archipelago.load(wan.root).generate(PROMPTS, strategy="expert-1", guidance=guidance, steps=steps, seeds=2)
    noise = torch.from_numpy(draws.clip_noise([2, 3], (16, 3, 4, 4)))
    away = {} if guidance == 1 else {"negative_prompt_embeds": torch.zeros(2, 16, 32)}
    theirs = pipe(
        PROMPTS, height=32, width=32, num_frames=9, num_inference_steps=steps, guidance_scale=guidance, latents=noise,
        max_sequence_length=16, **away,
    ).frames  # fmt: skip
    assert np.abs(levels(theirs) - ours.clips).max() <= 1 and ours.clips.std() > 5


def test_an_expert_alone_in_the_pipeline_of_ltx(tmp_path: Path) -> None:
    """With a time shift, which this pipeline leaves to the scheduler's own."""
    sizes = {"in_channels": 8, "out_channels": 8, "caption_channels": 32, "num_layers": 6}
    run = outside_run(tmp_path / "run", "ltx", "ltx", "t5", "sample.shift=2.0", **sizes)
    assert single.export(run.root, tmp_path / "alone", "1").pipeline == "LTXPipeline"
    pipe = LTXPipeline.from_pretrained(tmp_path / "alone")
    pipe.set_progress_bar_config(disable=True)
    ours = Archipelago.load(run.root).generate(PROMPTS, strategy="expert-1", guidance=2.5, seeds=2)
    noise = torch.from_numpy(draws.clip_noise([2, 3], (8, 3, 4, 4)))
    away = {
        "negative_prompt_embeds": torch.zeros(2, 16, 32),
        "negative_prompt_attention_mask": torch.zeros(2, 16).bool(),
    }
    theirs = pipe(
        PROMPTS, height=32, width=32, num_frames=9, frame_rate=4.0, num_inference_steps=3, guidance_scale=2.5,
        latents=LTXPipeline._pack_latents(noise, 1, 1), max_sequence_length=16, output_type="np", **away,
    ).frames  # fmt: skip
    assert np.abs(levels(theirs) - ours.clips).max() <= 1 and ours.clips.std() > 5


def test_an_expert_alone_in_the_pipeline_of_flux_makes_pictures(tmp_path: Path) -> None:
    sizes = {
        "in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24, "num_layers": 2, "num_single_layers": 4,
    }  # fmt: skip
    sets = ["expert.patch=2", "clips.frames=1", "evaluate.frames=1", "sample.shift=2.0"]
    run = outside_run(tmp_path / "run", "flux", "kl", "t5+clip", *sets, **sizes)
    assert single.export(run.root, tmp_path / "alone", "1").pipeline == "FluxPipeline"
    pipe = FluxPipeline.from_pretrained(tmp_path / "alone")
    pipe.set_progress_bar_config(disable=True)
    ours = Archipelago.load(run.root).generate(PROMPTS, strategy="expert-1", guidance=2.5, seeds=2)
    noise = torch.from_numpy(draws.clip_noise([2, 3], (4, 1, 4, 4)))[:, :, 0]
    away = {"negative_prompt_embeds": torch.zeros(2, 16, 32), "negative_pooled_prompt_embeds": torch.zeros(2, 24)}
    theirs = pipe(
        PROMPTS, height=32, width=32, num_inference_steps=3, true_cfg_scale=2.5, max_sequence_length=16, output_type="np",
        latents=FluxPipeline._pack_latents(noise, 2, 4, 4, 4), **away,
    ).images  # fmt: skip
    assert np.abs(levels(theirs) - ours.clips[:, 0]).max() <= 1 and ours.clips.std() > 5


def test_one_expert_alone_comes_back_in(wan: Run, tmp_path: Path) -> None:
    own = Run.open(shutil.copytree(wan.root, tmp_path / "own"))
    single.export(own.root, tmp_path / "alone", "1")
    bring(own.root, "0", tmp_path / "alone", force=True)
    weights = [store.sha256_file(own.expert(name) / "model.safetensors") for name in ("0", "1")]
    assert weights[0] == weights[1]
    card = store.read_card(own.expert("0"))
    assert card is not None and card["imported"]["stated"] and card["imported"]["source"]["expert"] == "1"


def test_two_text_encoders_go_out(tmp_path: Path) -> None:
    sizes = {
        "in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24, "num_layers": 2, "num_single_layers": 4,
    }  # fmt: skip
    run = outside_run(tmp_path / "run", "flux", "hunyuan", "t5+clip", "expert.patch=2", **sizes)
    export(run.root, tmp_path / "out")
    index = store.read_json(tmp_path / "out" / "model_index.json")
    assert [index[name][1] for name in ("text_encoder", "text_encoder_2")] == ["CLIPTextModel", "T5EncoderModel"]
    same_frames(run, open_quietly(tmp_path / "out"), "top2")


@pytest.mark.parametrize(
    ("kind", "text", "sizes"),
    [
        ("hunyuan", "t5+clip", {"text_embed_dim": 32, "pooled_projection_dim": 24, "num_layers": 4}),
        ("cogvideox", "t5", {"text_embed_dim": 32, "num_layers": 6, "max_text_seq_length": 16}),
    ],
)
def test_backbones_without_a_pipeline_of_their_own_go_out_whole(
    tmp_path: Path, kind: str, text: str, sizes: dict[str, Any]
) -> None:
    run = outside_run(tmp_path / "run", kind, kind, text, **sizes)
    export(run.root, tmp_path / "out")
    same_frames(run, open_quietly(tmp_path / "out"), "full")
    with pytest.raises(ArchipelError, match=f"diffusers has no pipeline for {kind}"):
        single.export(run.root, tmp_path / "alone", "0")


def test_what_diffusers_has_no_pipeline_for_is_said(whole: Run, wan: Run, tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match=r"FluxPipeline takes text\.encoder = 't5\+clip', and the run has 'minilm'"):
        single.export(whole.root, tmp_path / "alone", "0")
    with pytest.raises(ArchipelError, match="has 0, 1 and monolith"):
        single.export(wan.root, tmp_path / "alone", "7")
    assert not (tmp_path / "alone").exists()


def test_an_adapter_alone_is_merged_into_its_base(adapted: tuple[Run, Path], tmp_path: Path) -> None:
    from archipel.backbones.flux import FluxDenoiser
    from archipel.ensemble.parts import open_source
    from archipel.exchange.adapted import write_merged

    run, _ = adapted
    write_merged(open_source(run.root), run.expert("1"), tmp_path / "merged")
    model = Archipelago.load(run.root)
    ours = model.parts.denoiser("1")
    facts = {key: value for key, value in ours.facts.items() if key != "lora"}
    cond, _ = model.encode(PROMPTS)
    x, t = torch.randn(2, 192, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        found = FluxDenoiser(FluxTransformer2DModel.from_pretrained(tmp_path / "merged"), facts)(x, t, cond)
        torch.testing.assert_close(found, ours(x, t, cond), rtol=1e-4, atol=1e-5)
