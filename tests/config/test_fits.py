"""Parts that do not fit are refused, by init and by everything else that reads settings, naming both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_parts import FAMILIES, tiny_autoencoder, tiny_pipeline, tiny_text

from archipel import config, pipeline
from archipel.backbones import networks
from archipel.errors import ConfigError
from archipel.run import Run

MORE = ["text.tokens=6", "router.steps=1", "router.batch=1", "router.width=8"]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipes")
    return {name: tiny_pipeline(root / name, name) for name in FAMILIES}


def resolved(folder: Path, *, sets: list[str] | None = None, **over: Any) -> config.RunConfig:
    asked = {"codec": str(folder), "text": str(folder), "weights": str(folder), **over}
    return pipeline.resolve(preset="tiny", sets=[*MORE, *(sets or [])], **asked)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipelines_folder_resolves_to_a_run_of_its_backbone(
    name: str, pipes: dict[str, Path], tmp_path: Path
) -> None:
    made = resolved(pipes[name])
    assert made.expert.backbone == name and made.codec.kind == "autoencoder" and made.text.encoder == FAMILIES[name][1]
    assert made.codec.channels == FAMILIES[name][2] and made.codec.causal
    assert len(made.codec.sha256) == len(made.text.sha256) == len(made.expert.weights_sha256) == 64
    # The preset's 4 frames of 16x16 gave way to what the autoencoder and the backbone can take.
    assert (made.clips.frames, made.clips.size) == (9 if name == "cogvideox" else 5, 16)
    assert made.text.padding == ("kept" if name in ("flux", "ltx", "cogvideox") else "zero")
    assert made.expert.patch == (2 if name == "flux" else 1)
    assert networks.expert_network(made)["_class_name"] == made.expert.network["_class_name"]
    run = Run.create(tmp_path / "run", made)  # what was resolved is written, and read again without the folders
    assert run.config == made


@pytest.mark.parametrize("name", FAMILIES)
def test_every_backbone_from_scratch_on_its_familys_codec_and_text(name: str, pipes: dict[str, Path]) -> None:
    made = resolved(pipes[name], weights="", backbone=name)
    assert made.expert.network == {} and networks.expert_network(made)["_class_name"] == config.BACKBONE_CLASS[name]


@pytest.mark.parametrize(
    ("weights", "over", "says"),
    [
        ("wan", {"backbone": "flux"}, r"'flux' was asked for, but .*wan has 'wan'"),
        ("wan", {"codec": "ltx"}, r"AutoencoderKLLTXVideo' makes 8 latent channels.*WanTransformer3DModel .* takes 16"),
        ("flux", {"codec": "ltx"}, r"AutoencoderKLLTXVideo' makes 8 latent .*Flux.* takes 16"),
        ("ltx", {"codec": ""}, r"'patch-pca' makes 48 latent channels, but the LTXVideoTransformer3DModel .* takes 8"),
        ("wan", {"text": ""}, r"'minilm' is 384 wide \(text.width\), but the Wan.* reads 16 \(text_dim\)"),
        ("hunyuan", {"text": "wan"}, r"'umt5' is 16 wide \(text.pooled_width\), but the Hunyuan.*reads 12"),
        ("cogvideox", {"sets": ["text.tokens=7"]}, r"text.tokens = 7, but .* reads at most 6 \(max_text_seq_length\)"),
        ("wan", {"sets": ["clips.frames=8"]}, r"clips.frames = 8 is not 4n \+ 1, .*nearest that works is 5 or 9"),
        ("cogvideox", {"sets": ["clips.frames=5"]}, r"clips.frames = 5 is not 8n \+ 1, .*nearest that works is 1 or 9"),
        ("wan", {"sets": ["clips.frames=133"]}, r"make 34 latent frames.* has 32 positions .*at most 125"),
        (
            "wan",
            {"sets": ["clips.size=24"]},
            r"clips.size = 24 gives 3 latent positions.*nearest that works is 16 or 32",
        ),
        ("wan", {"sets": ["clips.size=20"]}, r"clips.size = 20 is not divisible by the patch's height 8"),
        ("wan", {"sets": ["codec.channels=8"]}, r"codec.channels = 8 was asked for, but .* has 16"),
        ("wan", {"sets": ["text.encoder=clip"]}, r"text.encoder = 'clip' was asked for, but .* has 'umt5'"),
    ],
)
def test_what_does_not_fit_names_both_sides(
    weights: str, over: dict[str, Any], says: str, pipes: dict[str, Path]
) -> None:
    over = {key: str(pipes[value]) if key in ("codec", "text") and value else value for key, value in over.items()}
    with pytest.raises(ConfigError, match=says):
        resolved(pipes[weights], **over)


def test_weights_of_no_transformer_or_of_the_wrong_part(pipes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class 'AutoencoderKLWan', not one of the transformers"):
        resolved(pipes["wan"], weights=str(pipes["wan"] / "vae"))
    with pytest.raises(ConfigError, match="class 'WanTransformer3DModel', not one of the autoencoders"):
        resolved(pipes["wan"], codec=str(pipes["wan"] / "transformer"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"weights .* is no checkpoint"):
        resolved(pipes["wan"], weights=str(tmp_path / "empty"))


def test_image_to_video_weights_take_more_channels_than_the_codec_makes(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "i2v", "wan", in_channels=36)
    with pytest.raises(ConfigError, match=r"makes 16 latent channels.* takes 36"):
        resolved(folder)


def test_clip_reads_77_tokens(tmp_path: Path) -> None:
    tiny_text(tmp_path / "text", "clip")
    made = pipeline.resolve(preset="tiny", text=str(tmp_path / "text"))
    assert (made.text.encoder, made.text.width, made.text.pooled_width) == ("clip", 32, 32)
    with pytest.raises(ConfigError, match=r"text.tokens = 78, but a CLIP text encoder reads 77"):
        pipeline.resolve(preset="tiny", text=str(tmp_path / "text"), sets=["text.tokens=78"])


def test_image_autoencoders_take_any_number_of_frames(tmp_path: Path) -> None:
    tiny_autoencoder(tmp_path / "vae", "kl")
    made = pipeline.resolve(
        preset="tiny", codec=str(tmp_path / "vae"), sets=["clips.frames=7", "router.batch=1", "router.steps=1"]
    )
    assert made.clips.frames == 7 and made.codec.patch == (1, 8, 8) and not made.codec.causal


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"codec": {"kind": "autoencoder"}}, "needs one: give it with --codec"),
        ({"codec": {"causal": True}}, "belong to codec.kind = 'autoencoder'"),
        ({"text": {"encoder": "t5"}}, "needs its weights: give them with --text"),
        ({"text": {"width": 64}}, "belong to another text.encoder"),
        ({"expert": {"weights": "x/y"}}, "is not resolved: give it with --weights"),
        ({"expert": {"lora_rank": 4}}, "needs frozen weights"),
    ],
)
def test_settings_that_were_not_resolved_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.build(values)


def test_old_settings_are_written_as_before() -> None:
    """Later keys at their defaults stand nowhere: neither in run.toml nor in what caches are addressed by."""
    assert set(config.written(config.Codec())) == {"kind", "patch", "channels", "gamma"}
    assert set(config.written(config.Text())) == {"encoder", "tokens"}


def test_a_preset_that_plans_with_parts_from_outside_cannot_be_made_a_run_without(tmp_path: Path) -> None:
    planned = pipeline.resolve(preset="paris2")
    assert networks.expert_network(planned)["in_channels"] == 64 and planned.codec.path == ""
    with pytest.raises(ConfigError, match=r"plans with AutoencoderKLHunyuanVideo: give it with --codec"):
        pipeline.init(tmp_path / "run", preset="paris2")
    vae = tiny_autoencoder(tmp_path / "vae", "hunyuan", latent_channels=16)
    with pytest.raises(ConfigError, match=r"plans with t5\+clip: give it with --text"):
        pipeline.init(tmp_path / "run", preset="paris2", codec=str(vae))
    assert not (tmp_path / "run").exists()


def test_a_network_of_another_version_is_named(pipes: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "wan", "wan")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 3}))
    with pytest.raises(ConfigError, match="has no argument 'from_the_future'"):
        resolved(folder)
