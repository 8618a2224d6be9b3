"""Low-rank adapters in closed form (no torch): which layers get one, their tensors by name, and what they cost.

An adapter of rank r on a frozen linear layer W (out x in) adds s B A x to W x, with A (r x in) at random, B (out x r) at zero
and s = alpha / r (Hu et al., LoRA, arXiv 2106.09685, section 4.1). Files hold A and s B, so that they are right for a reader
that knows no alpha, under diffusers' own names. Tests hold the layers to diffusers' classes and the sums to
``FlopCounterMode``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archipel.config import RunConfig

PREFIX = "transformer."  # what diffusers' pipelines look for in a file of adapters
NAME = "default"  # the adapter's name inside of the network while it is trained: peft's own default
_ATTENTION = re.compile(r"\.attn\d?\.")


@dataclass(frozen=True)
class Adapter:
    """What every expert of a run adds to the frozen base. ``targets``: "attention" or "linear"."""

    rank: int
    alpha: float
    targets: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def facts(self, base: str) -> dict[str, Any]:
        """``network["lora"]`` of a card; ``base``: sha256 of the weights that it is an adapter of."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "base": base}


def adapter_of(config: RunConfig) -> Adapter | None:
    """The adapter that an expert (and the monolith) of a run is, or None where it is a whole network."""
    part = config.expert
    if not part.lora_rank:
        return None
    return Adapter(part.lora_rank, part.lora_alpha or float(part.lora_rank), part.lora_targets)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a repeated block. ``rows``: what it is applied to once: every token of the "video", of the "text",
    of "both" side by side, or the "clip"'s one vector."""

    name: str
    inputs: int
    outputs: int
    rows: str


# --- the layers of each class ----------------------------------------------------------------------------------------


def layers(network: Mapping[str, Any]) -> list[Layer]:
    """Every linear layer of the repeated blocks of a diffusers configuration (``_class_name`` and constructor keys)."""
    D = int(network["num_attention_heads"]) * int(network["attention_head_dim"])
    kinds = {
        "FluxTransformer2DModel": _two_streams,
        "HunyuanVideoTransformer3DModel": _two_streams,
        "WanTransformer3DModel": _cross,
        "LTXVideoTransformer3DModel": _cross,
        "CogVideoXTransformer3DModel": _cogvideox,
    }
    return list(kinds[network["_class_name"]](network, D))


def _square(block: str, names: str, D: int, rows: str) -> Iterator[Layer]:
    for name in names.split():
        yield Layer(f"{block}.{name}", D, D, rows)


def _mlp(block: str, D: int, M: int, rows: str) -> Iterator[Layer]:
    yield Layer(f"{block}.net.0.proj", D, M, rows)
    yield Layer(f"{block}.net.2", M, D, rows)


def _two_streams(network: Mapping[str, Any], D: int) -> Iterator[Layer]:
    """Flux, and HunyuanVideo, whose blocks are Flux's."""
    M = int(D * float(network.get("mlp_ratio", 4)))
    for number in range(int(network["num_layers"])):
        block = f"transformer_blocks.{number}"
        yield Layer(f"{block}.norm1.linear", D, 6 * D, "clip")
        yield Layer(f"{block}.norm1_context.linear", D, 6 * D, "clip")
        yield from _square(f"{block}.attn", "to_q to_k to_v to_out.0", D, "video")
        yield from _square(f"{block}.attn", "add_q_proj add_k_proj add_v_proj to_add_out", D, "text")
        yield from _mlp(f"{block}.ff", D, M, "video")
        yield from _mlp(f"{block}.ff_context", D, M, "text")
    for number in range(int(network["num_single_layers"])):
        block = f"single_transformer_blocks.{number}"
        yield Layer(f"{block}.norm.linear", D, 3 * D, "clip")
        yield Layer(f"{block}.proj_mlp", D, M, "both")
        yield Layer(f"{block}.proj_out", D + M, D, "both")
        yield from _square(f"{block}.attn", "to_q to_k to_v", D, "both")


def _cross(network: Mapping[str, Any], D: int) -> Iterator[Layer]:
    """Wan and LTX: attention over the video, then of the video to the text."""
    wan = network["_class_name"].startswith("Wan")
    top, mlp = ("blocks", "ffn") if wan else ("transformer_blocks", "ff")
    for number in range(int(network["num_layers"])):
        block = f"{top}.{number}"
        yield from _square(f"{block}.attn1", "to_q to_k to_v to_out.0", D, "video")
        yield from _square(f"{block}.attn2", "to_q to_out.0", D, "video")
        yield from _square(f"{block}.attn2", "to_k to_v", D, "text")
        yield from _mlp(f"{block}.{mlp}", D, int(network["ffn_dim"]) if wan else 4 * D, "video")


def _cogvideox(network: Mapping[str, Any], D: int) -> Iterator[Layer]:
    time = int(network.get("time_embed_dim", 512))
    for number in range(int(network["num_layers"])):
        block = f"transformer_blocks.{number}"
        yield Layer(f"{block}.norm1.linear", time, 6 * D, "clip")
        yield Layer(f"{block}.norm2.linear", time, 6 * D, "clip")
        yield from _square(f"{block}.attn1", "to_q to_k to_v to_out.0", D, "both")
        yield from _mlp(f"{block}.ff", D, 4 * D, "both")


def chosen(network: Mapping[str, Any], targets: str) -> list[Layer]:
    """The layers that get an adapter."""
    return [one for one in layers(network) if targets == "linear" or _ATTENTION.search(one.name)]


def shapes(network: Mapping[str, Any], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter's ``model.safetensors``."""
    found: dict[str, tuple[int, ...]] = {}
    for one in chosen(network, adapter.targets):
        found[f"{PREFIX}{one.name}.lora_A.weight"] = (adapter.rank, one.inputs)
        found[f"{PREFIX}{one.name}.lora_B.weight"] = (one.outputs, adapter.rank)
    return found


def inside(name: str) -> str:
    """How a tensor of the file is called in the network that is trained: "x.lora_A.weight" -> "x.lora_A.default.weight"."""
    return name.removeprefix(PREFIX).removesuffix("weight") + f"{NAME}.weight"


# --- what they cost --------------------------------------------------------------------------------------------------


def forward_flops(network: Mapping[str, Any], video: int, text: int, adapter: Adapter) -> int:
    """FLOPs per clip of ``video`` and ``text`` tokens that adapters add to a forward: 2 rows r (in + out) each."""
    rows = {"video": video, "text": text, "both": video + text, "clip": 1}
    return sum(
        2 * rows[one.rows] * adapter.rank * (one.inputs + one.outputs) for one in chosen(network, adapter.targets)
    )


def frozen_training_flops(once: int, twice: int, four: int) -> int:
    """Training FLOPs per clip of a frozen network under adapters (without theirs), from its forward FLOPs for a clip of the
    given, of twice and of four times as many tokens of video and text.

    Frozen layers take the gradient of their input and none of their weights: two products instead of three. Attention has no
    weights and costs three forwards as ever; what runs once per clip (the embedding of the time, modulations) lies before
    all adapters and has no backward. The three parts are the constant, linear and square ones in the number of tokens:
    F(1) = a + b + q, F(2) = a + 2 b + 4 q, F(4) = a + 4 b + 16 q. Not counted off: the first block's projections and the
    embedders, whose inputs need no gradient either; adapters on modulations would add the little that they cost.
    """
    square = (four - 3 * twice + 2 * once) // 6
    linear = twice - once - 3 * square
    return (once - linear - square) + 2 * linear + 3 * square
