"""Released weights of CogVideoX and HunyuanVideo: what a run takes of them, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from tests.tiny import tiny_config, tiny_transformer

from archipel import config, store
from archipel.backbones import networks
from archipel.encoders import resolving
from archipel.errors import ConfigError

RELEASED = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def pipeline(folder: Path, scheduler: Any = None, **network: Any) -> Path:
    tiny_transformer("cogvideox", folder / "transformer", **network)
    (scheduler or CogVideoXDDIMScheduler(**RELEASED)).save_pretrained(folder / "scheduler")
    return folder


def run_of(weights: Path, tmp_path: Path, **text: Any) -> config.RunConfig:
    """The configuration as `init` would write it, read back from its file."""
    values = {
        "clips": {"size": 32, "frames": 6},
        "codec": {"patch": [2, 4, 4], "channels": 4},
        "text": {"tokens": 6, "encoder": "t5", "path": "t5", "width": 16, "pooled_width": 16, **text},
        "expert": resolving.weights_values(str(weights)),
    }
    made = config.build(values)
    (tmp_path / "run.toml").write_text(config.to_toml(made))
    again, _ = config.read(tmp_path / "run.toml")
    assert again == made
    return again


def test_the_schedule_beside_the_weights_is_taken_into_the_run(tmp_path: Path) -> None:
    facts = networks.expert_facts(run_of(pipeline(tmp_path / "cog"), tmp_path))
    assert facts["schedule"] == {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 3.0,
        "prediction_type": "v_prediction",
    }
    assert facts["mask_text"] is False


def test_weights_that_were_trained_on_a_flow_have_none(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "cog", FlowMatchEulerDiscreteScheduler())
    assert "schedule" not in networks.expert_facts(run_of(folder, tmp_path))


def test_weights_without_a_schedule_or_with_an_unknown_one_are_refused(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "cog", CogVideoXDDIMScheduler(prediction_type="epsilon"))
    with pytest.raises(ConfigError, match="prediction_type is 'epsilon'"):
        networks.expert_network(run_of(folder, tmp_path))
    with pytest.raises(ConfigError, match="the whole pipeline's folder"):
        networks.expert_network(run_of(folder / "transformer", tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_rotary_positional_embeddings": False, "max_text_seq_length": 8}, "places for 8 text tokens, .* is 6"),
        ({"patch_size_t": 3, "sample_height": 6}, "6x8 at most, but clips.size = 32 makes 8x8"),
        ({"use_learned_positional_embeddings": True, "sample_width": 10}, "of 8x10, but clips.size = 32 makes 8x8"),
        ({"ofs_embed_dim": 8}, "CogVideoX 1.5 image-to-video"),
    ],
)
def test_what_a_cogvideox_has_no_places_for_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        networks.expert_network(run_of(pipeline(tmp_path / "cog", **change), tmp_path))


def test_hunyuan_that_replaces_tokens_is_refused(tmp_path: Path) -> None:
    weights = tiny_transformer("hunyuan", tmp_path / "weights", image_condition_type="token_replace")
    with pytest.raises(ConfigError, match="token_replace"):
        networks.expert_network(run_of(weights, tmp_path, encoder="t5+clip", pooled_width=12))


@pytest.mark.parametrize("name", ["ltx", "hunyuan", "cogvideox"])
def test_the_network_of_weights_is_the_one_in_their_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    if name == "cogvideox":
        folder = pipeline(folder)
        about = store.read_json(folder / "transformer" / "config.json")
    else:
        about = store.read_json(tiny_transformer(name, folder) / "config.json")
    network = networks.expert_network(run_of(folder, tmp_path, encoder="t5+clip", pooled_width=12))
    assert network == networks.complete(about)
    assert network.items() >= tiny_config(name).items()
