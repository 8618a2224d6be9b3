"""What a job of a run must have made, from ``run.toml`` alone: configuration, facts, tensors and amount of work.

Closed forms of diffusers' ``FluxTransformer2DModel``, and for other backbones the shapes that diffusers gives without
memory, so that a stranger's files are held to the run's own network before any of theirs is allocated. A test compares
them with the networks that we build.
"""

from __future__ import annotations

import math
from typing import Any

from archipel.backbones import adapters, flops, networks, spending
from archipel.config import Backbone, RunConfig
from archipel.run import MONOLITH, ROUTER, TRUNK

Shapes = dict[str, tuple[int, ...]]


def wanted_config(config: RunConfig, name: str) -> dict[str, Any]:
    """``config.json`` of a job, but for the version of diffusers that wrote it."""
    if name == ROUTER:
        return networks.router_network(config)
    return networks.monolith_network(config) if name == MONOLITH else networks.expert_network(config)


def wanted_facts(config: RunConfig, name: str, base: str | None = None) -> dict[str, Any]:
    """``network`` of a job's card; ``base``: sha256 of the weights that experts are adapters of, where they are."""
    if name == ROUTER:
        return networks.router_facts(config)
    facts, adapter = (
        networks.expert_facts(config, flops.cluster_width(config) if name == MONOLITH else 0),
        spending.adapter_of(config, name),
    )
    return facts if adapter is None else facts | {"lora": adapter.facts(base or "")}


def wanted_work(config: RunConfig, name: str) -> dict[str, int | None]:
    """Numbers of a job's card that ``run.toml`` decides: cluster, steps, batch, samples, FLOPs, parameters."""
    part: Backbone = config.router if name == ROUTER else config.expert
    steps, batch = part.steps, part.batch
    if name == MONOLITH:
        steps, batch = config.monolith.steps, config.monolith.batch
    return {
        "cluster": int(name) if name.isdigit() else None,
        "steps": steps,
        "batch": batch,
        "samples": steps * batch,
        "forward_flops": spending.forward_flops(config, name),
        "flops": spending.training_flops(config, name, steps, batch),
        "parameters": sum(math.prod(shape) for shape in wanted_tensors(config, name).values()),
    }


def wanted_start(config: RunConfig, name: str) -> tuple[int, int] | None:
    """Steps and FLOPs of the shared start that a job's card names; None where it has none."""
    if config.expert.warm_start != TRUNK or name == ROUTER:
        return None
    steps = config.expert.trunk_steps
    return steps, spending.training_flops(config, TRUNK, steps, config.monolith.batch)


def wanted_state(config: RunConfig, name: str) -> Shapes:
    """Name and shape of what a job trains, as its network and so its checkpoints name it."""
    found = wanted_tensors(config, name)
    if spending.adapter_of(config, name) is None:
        return found
    return {adapters.inside(tensor): shape for tensor, shape in found.items()}


def wanted_tensors(config: RunConfig, name: str) -> Shapes:
    """Name and shape of every tensor of a job's ``model.safetensors``, as diffusers names them: an adapter's only, where
    experts are adapters."""
    about, adapter = wanted_config(config, name), spending.adapter_of(config, name)
    if adapter is not None:
        return adapters.shapes(about, adapter)
    if about["_class_name"] != "FluxTransformer2DModel":
        from archipel.backbones import registry  # diffusers itself, without memory

        return registry.meta_shapes(about)
    head: int = about["attention_head_dim"]
    D = head * int(about["num_attention_heads"])
    M, channels = flops.MLP_RATIO * D, int(about["in_channels"])
    shapes: Shapes = {}
    _linear(shapes, "time_text_embed.timestep_embedder.linear_1", flops.TIME_CHANNELS, D)
    _linear(shapes, "time_text_embed.timestep_embedder.linear_2", D, D)
    _linear(shapes, "time_text_embed.text_embedder.linear_1", about["pooled_projection_dim"], D)
    _linear(shapes, "time_text_embed.text_embedder.linear_2", D, D)
    _linear(shapes, "context_embedder", about["joint_attention_dim"], D)
    _linear(shapes, "x_embedder", channels, D)
    for number in range(about["num_layers"]):
        _double_block(shapes, f"transformer_blocks.{number}", D, M, head)
    for number in range(about["num_single_layers"]):
        _single_block(shapes, f"single_transformer_blocks.{number}", D, M, head)
    _linear(shapes, "norm_out.linear", D, 2 * D)
    _linear(shapes, "proj_out", D, about["out_channels"] or channels)
    return shapes


def _linear(shapes: Shapes, name: str, inputs: int, outputs: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)


def _double_block(shapes: Shapes, block: str, D: int, M: int, head: int) -> None:
    for norm in ("norm1", "norm1_context"):
        _linear(shapes, f"{block}.{norm}.linear", D, 6 * D)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        shapes[f"{block}.attn.{norm}.weight"] = (head,)
    for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        _linear(shapes, f"{block}.attn.{part}", D, D)
    for stream in ("ff", "ff_context"):
        _linear(shapes, f"{block}.{stream}.net.0.proj", D, M)
        _linear(shapes, f"{block}.{stream}.net.2", M, D)


def _single_block(shapes: Shapes, block: str, D: int, M: int, head: int) -> None:
    _linear(shapes, f"{block}.norm.linear", D, 3 * D)
    _linear(shapes, f"{block}.proj_mlp", D, M)
    _linear(shapes, f"{block}.proj_out", D + M, D)
    for norm in ("norm_q", "norm_k"):
        shapes[f"{block}.attn.{norm}.weight"] = (head,)
    for part in ("to_q", "to_k", "to_v"):
        _linear(shapes, f"{block}.attn.{part}", D, D)
