"""One expert alone, as a pipeline of diffusers' own: for people who want that expert and nothing of Archipel.

``WanPipeline``, ``LTXPipeline`` and (for clips of one frame) ``FluxPipeline`` hold the same parts as such a run: their
transformer, autoencoder and text encoder of the right class, and Euler steps of a flow. Others have no such pipeline.
With equal noise, times and text the frames are those of ``archipel generate --strategy expert-K``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archipel import FORMAT, __version__, store
from archipel.config import RunConfig
from archipel.ensemble.parts import open_source
from archipel.errors import ArchipelError, MissingStageError
from archipel.exchange import adapted, model_card, sides
from archipel.exchange import folder as whole
from archipel.exchange.opened import INDEX
from archipel.run import MONOLITH

# pipeline -> text.encoder, codec.model, and components that may be absent
_PIPELINES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "wan": ("WanPipeline", "umt5", "AutoencoderKLWan", {"transformer_2": [None, None], "boundary_ratio": None}),
    "ltx": ("LTXPipeline", "t5", "AutoencoderKLLTXVideo", {}),
    "flux": (
        "FluxPipeline",
        "t5+clip",
        "AutoencoderKL",
        {"image_encoder": [None, None], "feature_extractor": [None, None]},
    ),
}
# What else of the null text a pipeline takes.
_BESIDE = {
    "WanPipeline": "",
    "LTXPipeline": " and negative_prompt_attention_mask",
    "FluxPipeline": " and negative_pooled_prompt_embeds",
}


@dataclass
class Single:
    """What was written: the pipeline's class, bytes in all, and how to get the frames of ``archipel generate``."""

    folder: Path
    pipeline: str
    bytes: int
    notes: list[str] = field(default_factory=list)


def export(
    where: Path | str, folder: Path, name: str, *, run_id: str | None = None, force: bool = False, licence: str = ""
) -> Single:
    """Write expert ``name`` (a number, or monolith) of the run at ``where`` as a pipeline of diffusers' own.

    Raises ArchipelError where diffusers has none for such a run, MissingStageError where it is not trained, and as
    ``folder.export`` does for what is there already.
    """
    source = open_source(where, run_id)
    run = source.run
    if name not in (*run.expert_names, MONOLITH):
        raise ArchipelError(f"{name!r} is no expert of this run: it has {', '.join(run.expert_names)} and {MONOLITH}")
    kind, absent = _pipeline(run.config, name)
    there = source.look()
    if name not in there:
        raise MissingStageError(f"not there yet in {source.where}: {name}: {source.how([name])}")
    import diffusers

    with whole.aside_folder(folder, whole.is_export, force) as made:
        write = whole.copy_network
        if run.config.expert.lora_rank:
            write = functools.partial(adapted.write_merged, source)
        card = write(source.folder(name, there[name]), made / "transformer")
        index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": diffusers.__version__, **absent}
        index["transformer"] = ["diffusers", store.read_json(made / "transformer" / whole.CONFIG)["_class_name"]]
        index["vae"] = sides.write_codec(source.codec(), made / "vae")
        index |= sides.write_text(source, made)
        index["scheduler"], notes = _scheduler(made / "scheduler", run.config, kind)
        store.write_json(made / INDEX, index)
        notes += _notes(run.config, kind)
        store.write_text(made / whole.CARD, model_card.write_single(run, name, card, kind, notes, licence))
        files = whole.listed(made)
        about = whole.about(source, {name: card}, licence) | {"expert": name, "pipeline": kind}
        store.write_json(
            made / whole.FACTS,
            {"format": FORMAT, "kind": "expert-export", "made_by": f"archipel {__version__}", **about, "files": files},
        )
        size = sum(int(entry["bytes"]) for entry in files.values())
    return Single(folder, kind, size, notes)


def _pipeline(config: RunConfig, name: str) -> tuple[str, dict[str, Any]]:
    """diffusers' class for such a run. Raises ArchipelError saying what stands against it."""
    advice = "`archipel export RUN FOLDER` writes all experts, each as a transformer that diffusers opens"
    backbone = config.expert.backbone
    if backbone not in _PIPELINES:
        raise ArchipelError(f"diffusers has no pipeline for {backbone} and the text encoders that runs have: {advice}")
    kind, text, codec, absent = _PIPELINES[backbone]
    against = []
    if config.text.encoder != text:
        against.append(f"text.encoder = {text!r}, and the run has {config.text.encoder!r}")
    if config.codec.model != codec:
        against.append(f"the autoencoder {codec}, and the run has {config.codec.model or config.codec.kind}")
    if config.expert.given_frames:
        against.append("text alone, and this run's networks also read given frames (expert.tasks)")
    if config.expert.prediction != "velocity":
        against.append(f"a velocity, and expert.prediction = {config.expert.prediction!r}")
    if backbone == "flux" and not (config.clips.frames == 1 and config.expert.patch == 2 and config.expert.weights):
        against.append("pictures: clips.frames = 1, expert.patch = 2, begun with expert.weights")
    if name == MONOLITH and config.monolith.condition == "cluster":
        against.append("a network that is told no cluster")
    if against:
        raise ArchipelError(f"diffusers' {kind} takes {'; '.join(against)}: {advice}")
    return kind, absent


def _scheduler(target: Path, config: RunConfig, kind: str) -> tuple[sides.Entry, list[str]]:
    """The scheduler whose times in that pipeline are ours, where there is one; else what to know about it.

    WanPipeline leaves the times to the scheduler, whose own grid runs from 1 to 0.001 before its shift; without a shift
    ``shift_terminal`` = 1 / steps stretches it to ours, for that number of steps.
    """
    entry = sides.write_scheduler(target, config)
    if kind != "WanPipeline":
        return entry, []
    steps = config.sample.steps
    if config.sample.shift != 1:
        return entry, ["WanPipeline samples at its scheduler's own times, which differ a little from Archipelago's"]
    path = target / "scheduler_config.json"
    store.write_json(path, {**store.read_json(path), "shift_terminal": 1 / steps})
    return entry, [f"with num_inference_steps={steps} it samples at the times of `archipel generate`"]


def _notes(config: RunConfig, kind: str) -> list[str]:
    """How to call the pipeline for what the run's own sampling does."""
    scale = config.sample.guidance
    asked: dict[str, Any] = {"height": config.clips.size, "width": config.clips.size}
    if kind != "FluxPipeline":
        asked["num_frames"] = config.clips.frames
    if kind == "LTXPipeline":
        asked["frame_rate"] = config.clips.fps
    asked["max_sequence_length"] = config.text.tokens
    told = ", ".join(f"{key}={json.dumps(value)}" for key, value in asked.items())
    guided = "true_cfg_scale" if kind == "FluxPipeline" else "guidance_scale"
    notes = [f"call it with {told}, {guided}={scale:g}"]
    if scale != 1:
        zeros = "negative_prompt_embeds" + _BESIDE[kind]
        notes.append(
            f"guidance was trained away from a text of zeros: {zeros} of zeros give the frames of `archipel generate`, a "
            "negative prompt of words gives other ones"
        )
    return notes
