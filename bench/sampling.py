"""What a clip costs: strategies against the monolith, a batch against single calls, a router that is asked less often, the first
clip of a fresh process.

    python -m bench.sampling [--small] [--out FILE]

Times are of networks of the demo's sizes with random weights (experts are copies of the monolith in memory of their own, so that
every strategy must give the monolith's clips to rounding, which is shown first). The router is computed and then overruled, so
that the clips of a batch are dealt evenly among the experts: the worst case for grouping. What a router that is asked less often
does to clips is measured on a run that is trained here, of the tiny preset: how far its held-out captions' clips move, in parts
of how far another seed moves them; and what it does to quality on a mixture whose experts and router are exact.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel import config, presets
from archipel.backbones import base, flops
from archipel.backbones.registry import build_expert
from archipel.backbones.router import build_router
from archipel.contracts import Conditioning, Velocity
from archipel.ensemble import strategies
from archipel.ensemble.sparing import Spared
from archipel.ensemble.strategies import Mixture, Routed, one_each
from archipel.flow import samplers
from archipel.flow.exact import GaussianMixture
from bench import common
from bench.top1 import OVERHEAD, TOLERANCE, Dealt, inputs, networks, shake

TOP2 = 2.1
SPARING: tuple[dict[str, Any], ...] = (
    {"router_every": 2},
    {"router_every": 4},
    {"router_until": 0.6},
    {"router_until": 0.9},
    {"router_until": 0.99},
    {"router_every": 2, "router_until": 0.9},
)
EXACT = 4000  # samples of the mixture that is known


def arms(experts: list[Velocity], router: Any, batch: int, scale: float) -> dict[str, Callable[[], Mixture]]:
    """Mixtures by name, made anew for every clip: one that spares the router has a state."""

    def routed(select: strategies.Select) -> Routed:
        return Routed(Dealt(router), select)

    chosen = {"top1": strategies.top_k(1), "top2": strategies.top_k(2), "full": strategies.everyone}
    made: dict[str, Callable[[], Mixture]] = {
        name: partial(lambda select: Mixture(experts, routed(select), scale), select) for name, select in chosen.items()
    }
    made["monolith"] = lambda: Mixture(experts[:1], one_each([0] * batch, 1), scale)
    made["every 2nd"] = lambda: Mixture(experts, Spared(routed(chosen["top1"]), every=2), scale)
    return made


def strategy_rows(b: common.Benchmark, settings: config.RunConfig, batch: int, steps: int, rounds: int) -> None:
    monolith, router = networks(settings)
    k, scale = settings.partition.k, settings.sample.guidance
    experts: list[Velocity] = [copy.deepcopy(monolith) for _ in range(k)]
    noise, cond = inputs(settings, batch)
    made = arms(experts, router, batch, scale)

    def clip(name: str) -> Tensor:
        return samplers.sample(made[name](), noise, cond, steps=steps)

    def singly() -> Tensor:
        """What 16 calls of one prompt do."""
        alone = arms(experts, router, 1, scale)["top1"]
        rows = [slice(i, i + 1) for i in range(batch)]
        return torch.cat([samplers.sample(alone(), noise[row], cond[row], steps=steps) for row in rows])

    wanted = clip("monolith")
    for name, found in (*((name, clip(name)) for name in made), ("one by one", singly())):
        apart = float((found - wanted).abs().max() / wanted.abs().max())
        b.facts[f"{name} apart from the monolith, relative"] = apart
        if apart > TOLERANCE:
            raise common.DifferentError(f"{name} differs from the monolith by {apart:.1e}")

    def route() -> None:
        for _ in range(steps):
            router(noise, torch.full((batch,), 0.5), cond)

    with torch.no_grad():
        taken = common.interleave(
            {**{name: partial(clip, name) for name in made}, "router": route, "one by one": singly}, rounds
        )
    alone = common.versus("the router alone", "monolith", taken["router"], taken["monolith"])
    share = alone["cpu"]["median"]
    b.facts["router's share of the monolith's time"] = share
    aims = {"top1": round(OVERHEAD + share, 4), "top2": TOP2, "full": None, "every 2nd": None}
    for name, aim in aims.items():
        case = "top1, the router at every 2nd step" if name == "every 2nd" else name
        b.rows.append(common.versus(f"{case}, batch {batch}", "monolith", taken[name], taken["monolith"], aim))
    b.rows.append(alone)
    b.rows.append(
        common.versus(f"top1, {batch} prompts in a batch", "single calls", taken["top1"], taken["one by one"])
    )


# --- the first clip of a process ---------------------------------------------------------------------------------------


def cold_rows(b: common.Benchmark, settings: config.RunConfig, folder: Path, rounds: int) -> None:
    """A fresh process that writes one clip (3 experts of random weights on disk), against one that only imports torch and
    diffusers' transformer, which no process of ours can be faster than."""
    root = random_run(settings, folder)
    output = folder / "clip.webp"
    words = ["generate", str(root), "a red ball", "--steps", "2", "--strategy", "top1", "-o", str(output)]
    ours = [sys.executable, "-c", f"import sys; from archipel.cli import main; main({words!r})"]
    floor = [sys.executable, "-c", "import torch; from diffusers import FluxTransformer2DModel"]
    taken = {"ours": common.Seconds(), "floor": common.Seconds()}
    for number in range(rounds + 1):
        for name, command in (("ours", ours), ("floor", floor)):
            began = (time.perf_counter(), child_seconds())
            subprocess.run(command, check=True, capture_output=True)
            if number:
                taken[name].add(began, (time.perf_counter(), child_seconds()))
    b.rows.append(
        common.versus("cold start to the first clip", "importing torch and diffusers", taken["ours"], taken["floor"])
    )


def child_seconds() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def random_run(settings: config.RunConfig, folder: Path) -> Path:
    """A run's folder with a codec that needs no fitting, experts and router of random weights."""
    from archipel import store
    from archipel.encoders.codecs import Pixels
    from archipel.routing.calibration import identity
    from archipel.routing.router import model_hash, seal
    from archipel.run import ROUTER, Run

    own = config.merge(settings.model_dump(), {"codec": {"kind": "pixels"}})
    run = Run.create(folder / "run", config.build(own))
    Pixels((4, 8, 8), 0.1, 0.6).save(run.codec, run.id)
    for number, name in enumerate((*run.expert_names, ROUTER)):
        network: Any = build_router(run.config, seed=1) if name == ROUTER else build_expert(run.config, seed=number)
        shake(network, number)
        files = base.save(network, run.expert(name))
        store.write_card(run.expert(name), "expert", run.id, files, network=network.facts)
    fitted = identity(np.full(run.config.partition.k, 1 / run.config.partition.k))
    marks = {"format": 1, "run": run.id, "model_sha256": model_hash(run.expert(ROUTER))}
    store.write_json(run.expert(ROUTER) / "calibration.json", seal({**marks, **fitted.to_json()}))
    return run.root


# --- a router that is asked less often ---------------------------------------------------------------------------------


def sparing_table(root: Path, count: int, steps: int) -> list[dict[str, Any]]:
    """What sparing the router of a trained run does to clips of held-out captions, and how many questions it saves."""
    from archipel.ensemble.pipeline import Archipelago
    from archipel.manifest import read_manifest

    model = Archipelago.load(root)
    clips = [clip.caption for clip in read_manifest(model.parts.run.manifest) if clip.split != "train"]
    prompts = [clips[i % len(clips)] for i in range(count)]
    table = []
    for strategy in ("top1", "full"):

        def made(seed: int, strategy: str = strategy, **settings: Any) -> Any:
            return model.generate(prompts, strategy=strategy, steps=steps, seed=seed, **settings)

        whole, other = made(0), made(10_000)
        scale = np.abs(whole.clips.astype(float) - other.clips).mean()
        for settings in SPARING:
            found = made(0, **settings)
            moved = np.abs(found.clips.astype(float) - whole.clips).mean(axis=(1, 2, 3, 4)) / scale
            same = (found.weights.argmax(2) == whole.weights.argmax(2)).mean()
            table.append(
                {
                    "strategy": strategy,
                    "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
                    "questions to the router": round(found.router_rows / whole.router_rows, 3),
                    "steps with the same likeliest expert": round(float(same), 4),
                    "moved, of another seed's distance": round(float(moved.mean()), 4),
                    "the clip moved most": round(float(moved.max()), 4),
                }
            )
    return table


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance 2 E|A - B| - E|A - A'| - E|B - B'| of samples (N, D), unbiased: about 0 for one distribution."""
    a, b = a.double(), b.double()
    own = sum(torch.cdist(one, one).sum() / (len(one) * (len(one) - 1)) for one in (a, b))
    return float(2 * torch.cdist(a, b).mean() - own)


def exact_table(samples: int, steps: int) -> list[dict[str, Any]]:
    """Quality where everything is known: exact experts and router of a Gaussian mixture, the samples' energy distance to draws of
    it, in parts of the distance of one cluster's samples alone."""
    g = torch.Generator().manual_seed(5)
    means, spread = 1.5 * torch.randn(5, 4, generator=g), 0.05 + torch.rand(5, generator=g)
    mixture = GaussianMixture(means, spread, torch.tensor([1.0, 2, 3, 2, 1]), [0, 0, 1, 2, 2])
    cond = Conditioning(torch.zeros(samples, 1, 1), torch.ones(samples, 1, dtype=torch.bool), torch.zeros(samples, 1))
    drawn = [mixture.sample(samples, np.random.default_rng(seed))[0] for seed in range(2)]
    noise = torch.randn(samples, 4, generator=g)
    alone = energy(samplers.sample(mixture.expert(1), noise, cond, steps=steps), drawn[0])
    table = [{"strategy": "other draws of it", "settings": "", "questions to the router": 0.0}]
    table[0]["energy distance, of one expert's alone"] = round(energy(*drawn) / alone, 5)
    for strategy, select in (("top1", strategies.top_k(1)), ("full", strategies.everyone)):
        for settings in ({}, *SPARING):
            routed = Routed(mixture.posterior, select)
            spared = Spared(routed, settings.get("router_every", 1), settings.get("router_until"))
            found = samplers.sample(Mixture(mixture.experts(), spared), noise, cond, steps=steps)
            table.append(
                {
                    "strategy": strategy,
                    "settings": ", ".join(f"{key} {value}" for key, value in settings.items()) or "always asked",
                    "questions to the router": round(routed.asked / (samples * steps), 3),
                    "energy distance, of one expert's alone": round(energy(found, drawn[0]) / alone, 5),
                }
            )
    return table


def trained_run(folder: Path, small: bool) -> Path:
    """A run of the tiny preset with three experts, trained and routed here."""
    from archipel import pipeline

    steps = 40 if small else 600
    sets = ["partition.k=3", f"expert.steps={steps}", f"router.steps={steps}"]
    run = pipeline.init(folder / "trained", source="shapes", preset="tiny", sets=sets)
    pipeline.prepare(run)
    pipeline.partition(run)
    for name in run.expert_names:
        pipeline.train(run, name)
    pipeline.route(run)
    return run.root


def run(small: bool = False) -> dict[str, Any]:
    smaller = {"expert": {"width": 64, "heads": 2}} if small else {}
    settings = config.build(config.merge(presets.values("demo"), smaller))
    batch, steps, rounds = (4, 2, 2) if small else (16, 2, 12)
    what = f"{steps} Euler steps with guidance {settings.sample.guidance:g}, K = {settings.partition.k}"
    with (
        common.Benchmark("sampling", what, ("torch", "diffusers")) as b,
        tempfile.TemporaryDirectory() as at,
    ):
        b.facts["router's share of the monolith's FLOPs"] = round(
            flops.router_forward_flops(settings) / (2 * flops.expert_forward_flops(settings)), 4
        )
        strategy_rows(b, settings, batch, steps, rounds)
        cold_rows(b, settings, Path(at), 1 if small else 3)
        b.tables["a router that is asked less often: exact experts and router of a Gaussian mixture"] = exact_table(
            200 if small else EXACT, 20
        )
        trained = trained_run(Path(at), small)
        b.tables["the same: clips of held-out captions of a trained tiny run"] = sparing_table(
            trained, 4 if small else 48, 20
        )
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
