"""Stage *generate*: every arm's clips for the same captions and the same noise, beside the real clips.

Files of ``samples/<split>/``: ``prompts.json`` (row i of everything else is its entry i), ``<arm>.safetensors`` with clips
uint8 (N, F, H, W, 3), seeds and rows int64 (N,), weights float32 (N, S, K) where experts are mixed; ``real`` and ``codec``
(the real clips, and the real clips through the codec) with clips and rows. Where there are fewer clips than
``evaluate.count``, captions come back with new noise and their real clips are repeated: ``rows`` tells which are one.

``samples/<split>-first-frame/``, where ``expert.tasks`` gives first frames, has the same captions and noise once more, for
the primary strategy and the monolith, each clip given the first frame of its real clip.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archipel import cache, store
from archipel.contracts import Conditioning
from archipel.encoders.codecs import from_uint8, to_uint8
from archipel.ensemble.pipeline import Archipelago, Parts, Settings, parse_strategy
from archipel.errors import ArchipelError, DamagedError
from archipel.flow import draws
from archipel.flow.given import TASKS, condition
from archipel.flow.samplers import OnStep
from archipel.manifest import Clip, read_manifest
from archipel.partition.assignment import load_assignment
from archipel.progress import Progress, StopFlag
from archipel.run import MONOLITH, ROUTER, Run
from archipel.spread import Arrays, Spread, pack_json, unpack_json
from archipel.training.machine import pick_device

logger = logging.getLogger("archipel")
BATCH = 16  # clips at a time; part of what decides the last bits, so not a setting
SHOWCASE = "train"  # the split whose captions are shown beside the scored ones
SEEDS_PER_RUN = 1_000_000  # clip i of a run with seed s has seed 1,000,000 s + i: `generate --seed` makes it again


def choose_rows(clips: Sequence[Clip], split: str, count: int, seed: int) -> list[int]:
    """``count`` manifest rows of a split: one per content group first, then second clips of groups, then again.

    The order of groups and of clips within a group is a function of ``seed`` and of the split's rows.
    Raises ArchipelError where the split is empty.
    """
    groups: dict[str, list[int]] = {}
    for row, clip in enumerate(clips):
        if clip.split == split:
            groups.setdefault(clip.group, []).append(row)
    if not groups:
        raise ArchipelError(
            f"evaluate.split = {split!r}, but no clip is in that split: use more clips, or a larger share in clips.split"
        )
    generator = draws.generator(seed, draws.CHOICE, item=2)
    shuffled = [list(generator.permutation(groups[name])) for name in generator.permutation(sorted(groups))]
    rounds = max(len(rows) for rows in shuffled)
    once = [int(rows[turn]) for turn in range(rounds) for rows in shuffled if turn < len(rows)]
    return [once[i % len(once)] for i in range(count)]


@dataclass(frozen=True)
class Plan:
    """What is to be generated for one split: manifest rows and seeds, one per clip, the same for all arms. ``begun``: each
    clip is given the first frame of its real clip."""

    run: Run
    split: str
    arms: list[str]
    clips: list[Clip]
    rows: np.ndarray
    seeds: list[int]
    clusters: np.ndarray
    begun: bool = False

    @classmethod
    def of(cls, run: Run, split: str, count: int, arms: Sequence[str], begun: bool = False) -> Plan:
        clips, seed = read_manifest(run.manifest), run.config.run.seed
        rows = choose_rows(clips, split, count, run.config.clips_seed)
        seeds = [seed * SEEDS_PER_RUN + i for i in range(len(rows))]
        clusters = load_assignment(run)[rows]
        return cls(run, split, list(arms), clips, np.array(rows, dtype=np.int64), seeds, clusters, begun)

    @property
    def folder(self) -> Path:
        return self.run.begun(self.split) if self.begun else self.run.samples(self.split)

    @property
    def references(self) -> tuple[str, ...]:
        """What stands beside the arms and is not generated."""
        return () if self.begun else ("real", "codec")

    def prompts(self) -> list[dict[str, Any]]:
        found = [self.clips[row] for row in self.rows]
        return [
            {"caption": c.caption, "row": int(r), "id": c.id, "group": c.group, "cluster": int(k), "seed": s}
            for c, r, k, s in zip(found, self.rows, self.clusters, self.seeds, strict=True)
        ]

    @cached_property
    def cond(self) -> Conditioning:
        """The captions as training saw them, and the given frames, from the cache."""
        text = cache.open_kind(self.run.cache, "text")
        parts = [torch.from_numpy(np.array(text[name][self.rows])) for name in ("tokens", "mask", "pooled")]
        return Conditioning(*parts).given(self._image() if self.begun else None)

    def _image(self) -> torch.Tensor:
        latents = cache.open_kind(self.run.cache, "latents")
        if "first" not in latents.names:
            raise DamagedError(f"{latents.folder} has no latents of first frames: run `archipel prepare` again")
        first = torch.from_numpy(np.array(latents["first"][self.rows]))
        head = torch.full((len(first),), TASKS.index("head"))
        return condition(first, first, head, latents["latents"].shape[2])

    def pixels(self) -> np.ndarray:
        return np.asarray(cache.open_kind(self.run.cache, "pixels")["clips"][self.rows])


def needed_parts(run: Run, arm: str) -> list[str]:
    """Jobs whose weights an arm reads."""
    if arm == MONOLITH:
        return [MONOLITH, ROUTER] if run.config.monolith.condition == "cluster" else [MONOLITH]
    return run.expert_names if arm == "oracle" else [*run.expert_names, ROUTER]


def _inputs(plan: Plan, arm: str, prompts: Sequence[dict[str, Any]], device: str) -> str:
    """Hash of all that decides an arm's clips, so that it is generated again after any of it was trained again."""
    run = plan.run
    parts: dict[str, Any] = {"codec": (store.read_card(run.codec) or {}).get("files")}
    if arm not in ("real", "codec"):
        parts |= {name: (store.read_card(run.expert(name)) or {}).get("files") for name in needed_parts(run, arm)}
    calibration = run.expert(ROUTER) / "calibration.json"
    if ROUTER in parts and calibration.is_file():
        parts["calibration"] = store.sha256_file(calibration)
    decides = {"arm": arm, "run": run.id, "prompts": list(prompts), "batch": BATCH, "device": device, "parts": parts}
    return store.sha256_json(decides | ({"given": "first frame"} if plan.begun else {}))


def _made(folder: Path, arm: str, inputs: str) -> bool:
    facts = folder / f"{arm}.json"
    return facts.is_file() and (folder / f"{arm}.safetensors").is_file() and store.read_json(facts)["inputs"] == inputs


def plans(run: Run) -> list[Plan]:
    """The split that is scored with all arms; a few training captions to look at, with the two that are compared; and these
    two once more on the split's captions and first frames, where the run was trained to be given them."""
    chosen = run.config.evaluate
    made = [Plan.of(run, chosen.split, chosen.count, chosen.arms)]
    compared = list(dict.fromkeys([run.config.sample.strategy, MONOLITH]))
    if chosen.showcase:
        made.append(Plan.of(run, SHOWCASE, chosen.showcase, compared))
    if run.config.expert.tasks[TASKS.index("head")] > 0:
        made.append(Plan.of(run, chosen.split, chosen.count, compared, begun=True))
    return made


def generate_arms(
    run: Run, stop: StopFlag | None = None, spread: Spread | None = None, device: str | None = None
) -> None:
    """Make what is missing of ``samples/<split>/`` for the split that is scored and for the showcase; commit with cards.

    With ``spread`` batches are sampled on other machines, on their ``device``: the same batches, so the same bytes where
    the same number of threads computes them.

    An interrupted arm continues after its last whole batch. An arm whose experts, router or codec were made anew is
    generated again, others are kept. Raises MissingStageError naming what has to run first, Stopped where asked to stop.
    """
    run.need(run.codec, "prepare")
    run.need(run.partition, "partition")
    device = pick_device(None) if device is None else device
    parts, wanted = Parts(run, device), plans(run)
    parts.check(sorted({name for plan in wanted for arm in plan.arms for name in needed_parts(run, arm)}))
    archipelago = Archipelago(parts)
    for plan in wanted:
        _generate_plan(plan, archipelago, stop, spread)


def _generate_plan(plan: Plan, archipelago: Archipelago, stop: StopFlag | None, spread: Spread | None) -> None:
    run, arms = plan.run, plan.arms
    prompts = plan.prompts()
    inputs = {arm: _inputs(plan, arm, prompts, archipelago.parts.device) for arm in (*plan.references, *arms)}
    missing = [arm for arm in inputs if not _made(plan.folder, arm, inputs[arm])]
    card = store.read_card(plan.folder)
    if not missing and card is not None and card.get("inputs") == inputs:
        return
    (plan.folder / "card.json").unlink(missing_ok=True)
    store.write_json(plan.folder / "prompts.json", prompts)
    for arm in plan.references:
        if arm in missing:
            _real(plan, archipelago, arm, inputs[arm])
    todo = [arm for arm in arms if arm in missing]
    done_arms = [arm for arm in arms if arm not in missing]
    if spread is not None:
        _sample_elsewhere(plan, {arm: inputs[arm] for arm in todo}, archipelago.parts.device, spread, stop)
    steps = run.config.sample.steps
    costs = {arm: _cost(run, arm) * len(prompts) * steps for arm in arms}
    label = f"generate: {plan.folder.name}, {len(arms)} arms"
    with Progress(label, sum(costs.values()), sum(costs[arm] for arm in done_arms)) as bar:
        for arm in todo:
            _generate_arm(plan, archipelago, arm, inputs[arm], bar, stop)
    _commit(plan, inputs)


def _cost(run: Run, arm: str) -> int:
    """Expert calls per clip and step, roughly: what the estimate of the time left counts in."""
    k = run.config.partition.k
    return {"full": k, "top2": min(2, k), "threshold": min(2, k)}.get(arm, 1)


def _real(plan: Plan, archipelago: Archipelago, arm: str, inputs: str) -> None:
    clips = plan.pixels()
    if arm == "codec":
        codec, out = archipelago.parts.codec, []
        with torch.no_grad():
            for begin in range(0, len(clips), BATCH):
                out.append(to_uint8(codec.decode(codec.encode(from_uint8(clips[begin : begin + BATCH])))))
        clips = np.concatenate(out)
    store.write_tensors(plan.folder / f"{arm}.safetensors", {"clips": clips, "rows": plan.rows})
    store.write_json(plan.folder / f"{arm}.json", {"inputs": inputs, "arm": arm})


def _generate_arm(
    plan: Plan, archipelago: Archipelago, arm: str, inputs: str, bar: Progress, stop: StopFlag | None
) -> None:
    """One arm in batches; each is kept in a folder of its own until the arm is whole."""
    settings = Settings.of(plan.run.config, strategy=arm)
    count, cost = len(plan.seeds), _cost(plan.run, arm)
    kept = _kept(plan, arm, inputs)
    at_start, began = bar.done, time.monotonic()
    pieces: list[dict[str, np.ndarray]] = []
    for begin in range(0, count, BATCH):
        if stop:
            raise stop.error("generate")
        part = slice(begin, min(begin + BATCH, count))
        size, path = part.stop - begin, kept / f"{begin:06d}.safetensors"
        before = at_start + begin * settings.steps * cost
        if not path.is_file():
            store.write_tensors(path, _batch(plan, archipelago, settings, part, (bar, before, size * cost), stop))
        pieces.append({name: np.array(array) for name, array in store.map_tensors(path).items()})
        bar.update(before + size * settings.steps * cost, arm)
    tensors = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if name != "expert_rows"}
    expert_rows = sum(int(piece["expert_rows"][0]) for piece in pieces)
    tensors |= {"seeds": np.array(plan.seeds, dtype=np.int64), "rows": plan.rows}
    store.write_tensors(plan.folder / f"{arm}.safetensors", tensors)
    facts = {"inputs": inputs, "arm": arm, "settings": vars(settings), "expert_rows_per_clip": expert_rows / count}
    store.write_json(plan.folder / f"{arm}.json", facts)
    shutil.rmtree(kept, ignore_errors=True)
    logger.info("generate %s: %d clips in %.1f s", arm, count, time.monotonic() - began)


def _batch(
    plan: Plan,
    archipelago: Archipelago,
    settings: Settings,
    part: slice,
    place: tuple[Progress, int, int],
    stop: StopFlag | None,
) -> dict[str, np.ndarray]:
    bar, before, units = place

    def on_step(i: int, n: int, x: torch.Tensor, t: float) -> None:
        if i < n and stop:
            raise stop.error("generate")
        bar.update(before + i * units, settings.strategy)

    clusters = _clusters(plan, settings.strategy, part)
    return _sampled(archipelago, settings, plan.cond[part], plan.seeds[part], clusters, on_step)


def _clusters(plan: Plan, arm: str, part: slice) -> list[int] | None:
    return plan.clusters[part].tolist() if parse_strategy(arm, plan.run.config.partition.k)[0] == "oracle" else None


def _sampled(
    archipelago: Archipelago,
    settings: Settings,
    cond: Conditioning,
    seeds: list[int],
    clusters: list[int] | None,
    on_step: OnStep | None,
) -> dict[str, np.ndarray]:
    """clips uint8 (B, F, H, W, 3), expert_rows (1,), and weights float32 (B, S, K) where experts are mixed."""
    latents, trace = archipelago.sample(settings, cond, seeds, clusters=clusters, on_step=on_step)
    out = {"clips": archipelago.decode(latents), "expert_rows": np.array([sum(trace.rows.values())], dtype=np.int64)}
    if settings.strategy != MONOLITH:
        out["weights"] = trace.per_step(settings.solver)
    return out


# --- the same on other machines --------------------------------------------------------------------------------------


def _kept(plan: Plan, arm: str, inputs: str) -> Path:
    """Where an arm's batches are kept until it is whole."""
    return plan.folder / ".parts" / f"{arm}-{inputs[:16]}"


def _sample_elsewhere(plan: Plan, inputs: dict[str, str], device: str, spread: Spread, stop: StopFlag | None) -> None:
    """Let other machines sample the batches that are missing, and keep them where ``_generate_arm`` finds them."""
    count = len(plan.seeds)
    missing = [
        (arm, begin, path)
        for arm in inputs
        for begin in range(0, count, BATCH)
        if not (path := _kept(plan, arm, inputs[arm]) / f"{begin:06d}.safetensors").is_file()
    ]
    if not missing:
        return

    def given() -> Iterator[Arrays]:
        for arm, begin, _ in missing:
            part = slice(begin, min(begin + BATCH, count))
            cond, clusters = plan.cond[part], _clusters(plan, arm, part)
            about = {"arm": arm, "inputs": inputs[arm], "device": device, "clusters": clusters}
            names = {"tokens": cond.tokens, "mask": cond.mask, "pooled": cond.pooled}
            names |= {} if cond.image is None else {"image": cond.image}
            tensors = {name: tensor.numpy() for name, tensor in names.items()}
            yield {**tensors, "seeds": np.array(plan.seeds[part], np.int64), "about": pack_json(about)}

    label, files = f"generate: {plan.folder.name}, batches elsewhere", _files(plan.run, list(inputs))
    made = contextlib.closing(spread(make_batch, given(), plan.run.root, files, device=device))
    with Progress(label, len(missing)) as bar, made as batches:
        for _, _, path in missing:
            if stop:
                raise stop.error("generate")
            store.write_tensors(path, next(batches))
            bar.advance()


def make_batch(root: Path, given: Arrays) -> Arrays:
    """What the batch's captions, seeds and arm give, as ``_sampled`` says."""
    about = unpack_json(given["about"])
    archipelago = _archipelago(root, about["device"], about["inputs"])
    names = ("tokens", "mask", "pooled", "image")
    cond = Conditioning(*(torch.from_numpy(np.array(given[name])) for name in names if name in given))
    settings = Settings.of(archipelago.config, strategy=about["arm"])
    return _sampled(archipelago, settings, cond, given["seeds"].tolist(), about["clusters"], None)


@functools.lru_cache(maxsize=1)
def _archipelago(root: Path, device: str, inputs: str) -> Archipelago:
    """Once per process for each arm: ``inputs`` stands for the weights."""
    return Archipelago.load(root, device=pick_device(device))


def _files(run: Run, arms: Sequence[str]) -> list[str]:
    """What sampling reads of a run: cards, configurations and weights, no checkpoints."""
    names = dict.fromkeys(name for arm in arms for name in needed_parts(run, arm))
    found = ["run.toml"]
    for folder in (run.codec, *(run.expert(name) for name in names)):
        listed = (store.read_card(folder) or {}).get("files", {})
        for name in ("card.json", *listed, "calibration.json"):
            if (folder / name).is_file():
                found.append((folder / name).relative_to(run.root).as_posix())
    return list(dict.fromkeys(found))


# --- commit ----------------------------------------------------------------------------------------------------------


def _commit(plan: Plan, inputs: dict[str, str]) -> None:
    config = plan.run.config
    shutil.rmtree(plan.folder / ".parts", ignore_errors=True)
    names = ["prompts.json", *(f"{arm}{suffix}" for arm in inputs for suffix in (".safetensors", ".json"))]
    protocol = {
        "split": plan.split,
        "clips": len(plan.rows),
        "unique": len(set(plan.rows.tolist())),
        "groups": len({plan.clips[row].group for row in plan.rows}),
        "prompts": store.sha256_json(plan.prompts()),
        **config.sample.model_dump(mode="json"),
        **({"given": "first frame"} if plan.begun else {}),
    }
    store.write_card(plan.folder, "samples", plan.run.id, names, arms=plan.arms, inputs=inputs, protocol=protocol)
