"""The settings of a clip as components, the same for each page that asks for one, and their values as the server checks them.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipel.serving.jobs import Job
from archipel.studio import cards
from archipel.studio.context import StudioContext

_MOST_GUIDANCE, _MOST_STEPS = 15.0, 100  # of the sliders; the run's own values are always in reach


@dataclass(frozen=True)
class Form:
    """Components by the name of the field that they stand for; ``names`` gives their order in events."""

    fields: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return list(self.fields)

    @property
    def components(self) -> list[Any]:
        return list(self.fields.values())

    def asked(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Fields as ``serving.asked`` takes them: what was left empty is left out."""
        found = dict(zip(self.fields, values, strict=True))
        return {name: _plain(value) for name, value in found.items() if value not in (None, "") or name == "prompt"}

    def of(self, job: Job) -> list[Any]:
        """Each component's value for a job's settings."""
        side = {"prompt": job.prompt, "seed": str(job.seed), **job.settings}
        return [side.get(name) for name in self.fields]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def strategies(context: StudioContext) -> list[tuple[str, str]]:
    """(label, name) of what can be asked for, the run's own first."""
    k = context.experts
    names = [*(f"top{n}" for n in range(1, min(k, 3))), "full", "threshold", "ancestral", "monolith"]
    names += [f"expert-{number}" for number in range(k)]
    own = context.config.sample.strategy
    if own in names:
        names.remove(own)
    if own != "oracle":
        names.insert(0, own)
    return [(cards.title(name, long=True), name) for name in names]


def prompt(label: str = "What shall the clip show?") -> Any:
    import gradio as gr

    return gr.Textbox(
        label=label,
        lines=1,
        max_lines=5,
        placeholder="a red ball bounces",
        elem_classes="prompt-box",
        html_attributes=gr.InputHTMLAttributes(enterkeyhint="send", spellcheck=True),
    )


def numbers(context: StudioContext) -> dict[str, Any]:
    """Guidance, steps and seed, with the run's own values."""
    import gradio as gr

    sample, limits = context.config.sample, context.service.limits
    with gr.Row(elem_classes="numbers-row"):
        guidance = gr.Slider(
            0.0,
            max(_MOST_GUIDANCE, float(sample.guidance)),
            float(sample.guidance),
            step=0.5,
            label="Guidance",
            info="1 is off",
            buttons=["reset"],
        )
        steps = gr.Slider(
            1,
            min(limits.steps, max(_MOST_STEPS, sample.steps)),
            min(sample.steps, limits.steps),
            step=1,
            label="Steps",
            info="more is slower",
            buttons=["reset"],
        )
    seed = gr.Textbox(
        label="Seed", placeholder="another one each time", max_lines=1, info="The same seed: the same noise"
    )
    return {"guidance": guidance, "steps": steps, "seed": seed}


def captions(context: StudioContext, count: int = 5) -> list[str]:
    """Captions of the run's training clips, from all over its clusters: what it knows how to make. [] where
    none are at hand or shown."""
    from archipel import box
    from archipel.errors import ArchipelError
    from archipel.manifest import read_manifest
    from archipel.partition.assignment import load_assignment

    if context.run is None:
        with contextlib.suppress(ArchipelError, OSError, KeyError, TypeError):
            return list(box.facts(Path(context.where))["examples"]["captions"])[:count]
        return []
    if not context.show_clips:
        return []
    try:
        clips = read_manifest(context.run.manifest)
        clusters = load_assignment(context.run)
    except (ArchipelError, ImportError, OSError):
        return []
    by_cluster: dict[int, list[str]] = {}
    for clip, cluster in zip(clips, clusters.tolist(), strict=False):
        if clip.split == "train" and 0 < len(clip.caption) <= 60:
            by_cluster.setdefault(cluster, []).append(clip.caption)
    return list(dict.fromkeys(_take_turns(by_cluster, count)))[:count]


def _take_turns(groups: Mapping[int, list[str]], count: int) -> list[str]:
    """Spread over each group, one group after the other."""
    found = []
    for turn in range(count):
        for key in sorted(groups):
            captions = sorted(set(groups[key]))
            found.append(captions[(turn * len(captions) // count + len(captions) // 7) % len(captions)])
    return found
