"""K experts that are adapters over one base, mixed top-2, against networks with the adapters merged into their weights.

    python -m bench.lora_experts [--small] [--out FILE]

The base has the demo's sizes, adapters rank 8 on the attention's projections, all with random weights. Three comparisons,
each after equal outputs were shown: the same top-2 mixture of K merged networks, which costs K times the memory; one merged
network alone, where all adapters are equal and the mixture therefore is that network (top-2 asks two experts per clip, so two
passes are the least that it can cost); and the two ways to ask several experts against each other: in turns, and in peft's
mixed batches, in which every row names its adapter and the base is passed once. An ensemble mixes where there are few rows
(``together.MOST_ROWS``). Memory is what the distinct storages of the parameters take.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archipel import config, presets, store
from archipel.backbones import adapters, base, lora, registry
from archipel.contracts import Conditioning, Velocity
from archipel.ensemble import together
from archipel.ensemble.strategies import Fixed, Mixture
from bench import common
from bench.top1 import inputs, shake

AIM = 1.15  # over merged networks: the adapters' own products, and switching
TOLERANCE = 1e-4
SHA = "0" * 64


def experts(network: base.Denoiser, adapter: adapters.Adapter, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Folders of adapters that have learned something."""
    folders = []
    for number, seed in enumerate(seeds):
        one, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
        lora.attach(one, adapter, SHA, seed)
        with torch.no_grad():
            for name, p in one.network.named_parameters():
                if ".lora_B." in name:
                    p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        state = {name: value.detach().numpy() for name, value in lora.parameters(one).items()}
        base.save(one, folder / str(number), lora.to_file(one.facts, state))
        files = ["config.json", "model.safetensors"]
        store.write_card(folder / str(number), "expert", SHA, files, network=one.facts)
        folders.append(folder / str(number))
    return folders


def merged(network: base.Denoiser, folder: Path) -> base.Denoiser:
    """A network of its own with an adapter in its weights."""
    tensors = {name: torch.tensor(value) for name, value in store.map_tensors(folder / "model.safetensors").items()}
    state = lora.merged({name: value.clone() for name, value in network.network.state_dict().items()}, tensors)
    return type(network)(registry.build_network(base.diffusers_config(network.network), state), network.facts).eval()


def held(*networks: base.Denoiser) -> int:
    """Bytes of the parameters' distinct storages."""
    return sum(
        {s.data_ptr(): s.nbytes() for n in networks for p in n.parameters() for s in [p.untyped_storage()]}.values()
    )


class Bounded:
    """A mixture that passes the base once for calls of at most so many rows, whatever the ensemble's own bound is."""

    def __init__(self, mixture: Mixture, rows: int) -> None:
        self._mixture, self._rows = mixture, rows

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        before, together.MOST_ROWS = together.MOST_ROWS, self._rows
        try:
            return self._mixture(x, t, cond)
        finally:
            together.MOST_ROWS = before


def two_each(batch: int, k: int) -> Tensor:
    """Weights (B, K): clip i asks experts i and i + 1 mod K, with 0.7 and 0.3."""
    weights = torch.zeros(batch, k)
    for i in range(batch):
        weights[i, i % k], weights[i, (i + 1) % k] = 0.7, 0.3
    return weights


def equal(b: common.Benchmark, what: str, ours: Tensor, theirs: Tensor) -> None:
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    b.facts[f"{what}, apart"] = apart
    if not apart < TOLERANCE:
        raise common.DifferentError(f"{what}: apart by {apart:.1e}")


def run(small: bool = False) -> dict[str, Any]:
    smaller = {"expert": {"width": 64, "heads": 2}} if small else {}
    settings = config.build(config.merge(presets.values("demo"), smaller))
    batches, rounds = ((2,), 2) if small else ((1, 8), 30)
    k, scale, adapter = settings.partition.k, settings.sample.guidance, adapters.Adapter(8, 8.0, "attention")
    network = registry.build_expert(settings, seed=0)
    shake(network, 2)
    what = f"top-2 of K = {k} adapters of rank {adapter.rank}, guidance {scale:g}, one evaluation"
    with (
        common.Benchmark("lora_experts", what, ("torch", "diffusers", "peft")) as b,
        tempfile.TemporaryDirectory() as at,
    ):
        folders = experts(network, adapter, range(1, k + 1), Path(at) / "own")
        same = experts(network, adapter, [1] * k, Path(at) / "same")
        alone = held(network)
        bank, twins = lora.Bank(copy.deepcopy(network), SHA), lora.Bank(copy.deepcopy(network), SHA)
        ours, equals = [bank.load(folder) for folder in folders], [twins.load(folder) for folder in same]
        whole = [merged(network, folder) for folder in folders]
        one = merged(network, same[0])
        b.tables["memory"] = [
            {"what": what, "MiB": round(size / 2**20, 2), "of one network": round(size / alone, 3)}
            for what, size in (
                ("one merged network", held(one)),
                (f"{k} experts as adapters, and their base", held(bank.base)),
                (f"{k} merged networks", held(*whole)),
            )
        ]
        for batch in batches:
            weights, (noise, cond) = two_each(batch, k), inputs(settings, batch)
            t = torch.full((batch,), 0.5)
            own = Fixed(weights)
            arms: dict[str, Velocity] = {
                "adapters": Mixture(ours, own, scale),
                "merged": Mixture(whole, own, scale),
                "turns": Bounded(Mixture(ours, own, scale), 0),
                "mixed": Bounded(Mixture(ours, own, scale), 1 << 30),
                "equals": Mixture(equals, own, scale),
                "one": Mixture([one], Fixed(torch.ones(batch, 1)), scale),
            }
            with torch.no_grad():
                found = {name: arm(noise, t, cond) for name, arm in arms.items()}
                for name, against in (
                    ("adapters", "merged"),
                    ("turns", "merged"),
                    ("mixed", "merged"),
                    ("equals", "one"),
                ):
                    equal(b, f"batch {batch}: {name} and {against}", found[name], found[against])
                taken = common.interleave({name: partial(arm, noise, t, cond) for name, arm in arms.items()}, rounds)
            for case, name, against, label, aim in (
                ("adapters", "adapters", "merged", f"{k} merged networks", AIM),
                ("adapters", "equals", "one", "one merged network", None),
                ("adapters in one mixed batch", "mixed", "turns", "adapters that take turns", None),
            ):
                b.rows.append(common.versus(f"batch {batch}, {case}", label, taken[name], taken[against], aim))
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
