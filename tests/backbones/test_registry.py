"""Networks of every class: from the dials, from weights, in and out of files; and folders that are damaged or hostile."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.tiny import CHANNELS, CLASSES, POOLED, TEXT, tiny_cond, tiny_config, tiny_transformer

from archipel import config, store
from archipel.backbones import base, flops, networks, registry
from archipel.errors import ConfigError, DamagedError
from archipel.islands import network as admitted

NAMES = tuple(CLASSES)


def settings(name: str, **changes: Any) -> config.RunConfig:
    expert = {"width": 32, "heads": 2, "rope_axes": [4, 6, 6], "double_blocks": 1, "single_blocks": 1}
    return config.build(
        {
            "clips": {"size": 16, "frames": 6},
            "codec": {"patch": [2, 4, 4], "channels": CHANNELS},
            "text": {"tokens": 6},
            "expert": {"backbone": name, **expert, **changes},
        }
    )


def weighted(name: str, network: dict[str, Any] | None = None, **changes: Any) -> config.RunConfig:
    """A run whose experts begin with the weights of ``tiny_transformer``, as `init` resolves it."""
    about = {"_class_name": CLASSES[name], "_diffusers_version": "0.30.0", **tiny_config(name), **(network or {})}
    if name == "cogvideox":
        about["_schedule"] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    patch = {"patch": 2} if name == "flux" else {}
    return config.build(
        {
            "clips": {"size": 16, "frames": 6},
            "codec": {"patch": [2, 4, 4], "channels": CHANNELS},
            "text": {"encoder": "t5+clip", "path": "text", "width": TEXT, "pooled_width": POOLED, "tokens": 6},
            "expert": {"backbone": name, "weights": "somewhere", "network": about, **patch, **changes},
        }
    )


# --- dictionaries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_diffusers(name: str) -> None:
    signature = inspect.signature(getattr(diffusers, CLASSES[name]).__init__).parameters
    theirs = {key: one.default for key, one in signature.items() if key != "self"}
    assert networks.DEFAULTS[CLASSES[name]] == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tasks", [[1, 0, 0, 0], [1, 5, 1, 1]])
def test_what_admission_wants_is_what_we_build(name: str, tasks: list[float]) -> None:
    run = settings(name, tasks=tasks)
    model = registry.build_expert(run, seed=0)
    about = base.diffusers_config(model.network)
    about.pop("_diffusers_version")
    assert about == networks.expert_network(run) == admitted.wanted_config(run, "0")
    assert model.facts == admitted.wanted_facts(run, "0")
    built = {key: tuple(value.shape) for key, value in model.network.state_dict().items()}
    assert admitted.wanted_tensors(run, "0") == built
    assert admitted.wanted_work(run, "0")["parameters"] == model.parameters_total == flops.expert_parameters(run)


@pytest.mark.parametrize("name", NAMES)
def test_networks_and_their_cost_need_no_torch(name: str) -> None:
    code = (
        "import sys; from archipel import config; from archipel.backbones import flops, networks;"
        f"c = config.build({{'expert': {{'backbone': {name!r}, 'width': 96, 'heads': 2, 'rope_axes': [16, 16, 16]}}}});"
        "networks.expert_network(c), networks.expert_facts(c), flops.expert_forward_flops(c), networks.router_network(c);"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_network_of_weights_is_theirs_and_reads_given_frames_behind_the_latents(name: str) -> None:
    guided = {"guidance_embeds": True} if name in ("flux", "hunyuan") else {}
    plain = networks.expert_network(weighted(name, guided))
    assert plain == networks.complete({"_class_name": CLASSES[name], **tiny_config(name)})
    told = networks.expert_network(weighted(name, guided, tasks=[1, 1, 0, 0]))
    per = 4 if name == "flux" else 1
    assert told["in_channels"] == plain["in_channels"] + per * (CHANNELS + 1)
    assert told["out_channels"] == (plain["out_channels"] or plain["in_channels"])
    assert {key for key in told if told[key] != plain[key]} <= {"in_channels", "out_channels"}


def test_weights_that_cannot_be_used_are_named() -> None:
    with pytest.raises(ConfigError, match="image encoder of its own"):
        networks.expert_network(weighted("wan", {"image_dim": 16, "added_kv_proj_dim": 32}))
    with pytest.raises(ConfigError, match="no argument 'wonder'"):
        networks.complete({"_class_name": "WanTransformer3DModel", "wonder": 1})
    with pytest.raises(ConfigError, match="SD3Transformer2DModel"):
        networks.complete({"_class_name": "SD3Transformer2DModel"})


# --- weights in memory -------------------------------------------------------------------------------------------------


def call(name: str, network: Any) -> torch.Tensor:
    more = {"flux": {"patch": 2}, "ltx": {"rope_scale": [1, 8, 8]}}.get(name, {})
    model = registry.adapter(CLASSES[name])(network.eval(), {"prediction": "velocity", **more})
    x = torch.randn(2, CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.tensor([0.3, 0.9]), tiny_cond())


@pytest.mark.parametrize("name", NAMES)
def test_a_network_from_tensors_is_the_one_diffusers_opens(name: str, tmp_path: Path) -> None:
    """Also the tables that no file holds (RoPE of Wan, places of CogVideoX) are there, and no random number was drawn."""
    theirs = getattr(diffusers, CLASSES[name]).from_pretrained(tiny_transformer(name, tmp_path))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ours = registry.build_network({"_class_name": CLASSES[name], **tiny_config(name)}, theirs.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(one.is_meta for one in [*ours.parameters(), *ours.buffers()])
    assert not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(call(name, ours), call(name, theirs))


def test_absolute_places_of_cogvideox_are_made_again(tmp_path: Path) -> None:
    fixed = {"use_rotary_positional_embeddings": False, "sample_width": 4, "sample_height": 4}
    theirs = diffusers.CogVideoXTransformer3DModel(**{**tiny_config("cogvideox"), **fixed})
    about = {"_class_name": CLASSES["cogvideox"], **tiny_config("cogvideox"), **fixed}
    ours = registry.build_network(about, theirs.state_dict())
    assert torch.equal(call("cogvideox", ours), call("cogvideox", theirs))


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "os.system"},
        {"_class_name": None},
        {"_class_name": "AutoencoderKLWan"},
        {"num_layers": 10**6},
        {"num_layers": True},
        {"num_layers": "two"},
        {"num_attention_heads": 10**9},
        {"rope_max_seq_len": 10**9},
        {"patch_size": [1, 2]},
        {"patch_size": 0},
        {"ffn_dim": 10**13},
        {"in_channels": -1},
        {"unknown": 1},
    ],
)
def test_a_strangers_configuration_is_refused_before_anything_is_allocated(change: dict[str, Any]) -> None:
    about = {"_class_name": CLASSES["wan"], **tiny_config("wan")}
    with torch.random.fork_rng(devices=[]):
        tensors = registry.build_network(about).state_dict()
    with pytest.raises(DamagedError, match=r"theirs\.json"):
        registry.build_network({**about, **change}, tensors, "theirs.json")


def test_a_hidden_table_of_absurd_size_is_refused() -> None:
    """RoPE's length stands in no tensor: names and shapes fit whatever it is."""
    about = {"_class_name": CLASSES["wan"], **tiny_config("wan")}
    tensors = registry.build_network(about).state_dict()
    with pytest.raises(DamagedError, match="tables"):
        registry.build_network({**about, "rope_max_seq_len": 10**8}, tensors)


# --- files -------------------------------------------------------------------------------------------------------------


def saved(name: str, folder: Path, **facts: Any) -> base.Denoiser:
    model = registry.build_expert(settings(name, tasks=[1, 1, 0, 0]), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    store.write_card(folder, "expert", "run", base.save(model, folder), network={**model.facts, **facts})
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_expert_comes_back_from_its_files_and_diffusers_opens_them(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    back = registry.load_denoiser(tmp_path)
    assert type(back) is type(model) and back.facts == model.facts and back.image
    x, t = torch.randn(1, CHANNELS, 3, 4, 4), torch.tensor([0.5])
    cond = tiny_cond(1, text=384, pooled=384).given(torch.randn(1, CHANNELS + 1, 3, 4, 4))
    assert torch.equal(back(x, t, cond), model(x, t, cond))
    (tmp_path / base.WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.safetensors")
    theirs = getattr(diffusers, CLASSES[name]).from_pretrained(tmp_path, use_safetensors=True)
    again = type(model)(theirs, model.facts)
    torch.testing.assert_close(again(x, t, cond), model(x, t, cond), rtol=1e-5, atol=1e-5)  # mapped, aligned otherwise


@pytest.mark.parametrize(
    "facts",
    [
        {"role": "router"},
        {"prediction": "noise"},
        {"prediction": None},
        {"patch": "2"},
        {"patch": 0},
        {"image": 1},
        {"mask_text": "no"},
        {"clusters": 2},
        {"condition": "cluster"},
        {"condition": "cluster", "clusters": 3},
    ],
)
def test_facts_that_describe_no_such_expert_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    saved("wan", tmp_path, **facts)
    with pytest.raises(DamagedError, match=r"card\.json"):
        registry.load_denoiser(tmp_path)
