"""The plan for people: a page of small tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from archipel.backbones import flops, networks
from archipel.planning.fitting import Fit
from archipel.planning.hardware import Gpu
from archipel.planning.plan import Plan, assumptions

_SAMPLED = {
    "generate": "archipel generate",
    "bfloat16": "exported, in bfloat16",
    "offloaded": "exported, in bfloat16, with enable_model_cpu_offload()",
    "": "does not fit",
}


def page(plan: Plan) -> RenderableType:
    """Model and work, memory, disk, GPUs, and what the numbers stand on."""
    notes = Table(box=None, show_header=False, padding=(0, 1))
    for line in [*advice(plan), *assumptions(plan)]:
        notes.add_row("·", escape(line))
    tables = [_model(plan), _memory(plan), _sampling(plan), _disk(plan), _gpus(plan)]
    return Group(*(Padding(table, (0, 0, 1, 0)) for table in tables), notes)


def _rows(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.show_edge = False
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _model(plan: Plan) -> Table:
    config, params, work = plan.config, plan.params, plan.flops
    network, latent = networks.expert_network(config), flops.latent_shape(config)
    tokens = _tokens(plan)
    name = config.run.preset or "this run"
    table = _rows(f"{name}: {config.partition.k} experts, {network['_class_name']}", "", "parameters", "FLOPs")
    table.add_row("one expert, one step", "", f"{number(work.step)}  ({config.expert.batch} clips)")
    table.add_row("one expert", _params(params.expert, params.trained), number(work.expert))
    table.add_row(f"{config.partition.k} experts and the router", number(params.total), number(work.archipelago))
    table.add_row("the router", number(params.router), number(work.router))
    table.add_row("the monolith (control)", number(params.monolith), number(work.monolith))
    table.add_row(f"one clip by {config.sample.strategy}", "", number(work.clip))
    table.caption = (
        f"clips {config.clips.frames}x{config.clips.size}x{config.clips.size}, latents {'x'.join(map(str, latent))}, "
        f"{tokens} video and {config.text.tokens} text tokens, {config.expert.steps} steps"
    )
    table.caption_justify = "left"
    return table


def _tokens(plan: Plan) -> int:
    network, (_, T, H, W) = networks.expert_network(plan.config), flops.latent_shape(plan.config)
    pt, ph, pw = networks.patch(network, plan.config.expert.patch)
    return (T // pt) * (H // ph) * (W // pw)


def _params(whole: int, trained: int) -> str:
    return number(whole) if whole == trained else f"{number(whole)} ({number(trained)} trained)"


def _memory(plan: Plan) -> Table:
    kept, again = plan.kept, plan.checkpointed
    title = f"Training, each GPU ({plan.switches.but(checkpointing=False).told()}; clips at once: {kept.clips})"
    table = _rows(title, "", "plain", "--checkpointing")
    for label, key in (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer"),
        ("average", "average"),
        ("activations", "activations"),
        ("gathered blocks", "gathered"),
    ):
        one, two = getattr(kept, key), getattr(again, key)
        if one or two or key != "gathered":
            table.add_row(label, size(one), size(two))
    table.add_section()
    table.add_row("a step at its peak", size(kept.peak), size(again.peak))
    table.add_row("a validation at its peak", size(kept.validation), size(again.validation))
    table.add_row("[bold]needed", f"[bold]{size(kept.needed)}", f"[bold]{size(again.needed)}")
    if kept.host:
        table.add_row("in the host's memory", size(kept.host), size(again.host))
    return table


def _sampling(plan: Plan) -> Table:
    drawn = plan.sampling
    table = _rows("Sampling, one clip", "", "on the GPU", "in the host's memory")
    title = f"archipel generate ({drawn.experts} expert{'s' * (drawn.experts > 1)} in float32)"
    table.add_row(title, size(drawn.gpu), f"{size(drawn.host)} or more (codec, text)")
    table.add_row("exported pipeline in bfloat16, wholly on the GPU", size(drawn.bfloat16), "")
    table.add_row("the same with enable_model_cpu_offload()", size(drawn.offloaded), "the rest")
    return table


def _disk(plan: Plan) -> Table:
    table = _rows("Disk", "", f"{plan.clips} clips" if plan.clips is not None else "")
    disk = plan.disk
    if disk is None:
        table.add_row("unknown", "give --clips N")
        return table
    table.add_row("cache (pixels, latents, text, features)", size(disk.cache))
    table.add_row("bucket", size(disk.bucket))
    table.add_row("  shards, codec, base", size(disk.published))
    table.add_row("  finished jobs", size(disk.results))
    table.add_row("  checkpoints, two of each job", size(disk.checkpoints))
    return table


def _gpus(plan: Plan) -> Table:
    count = plan.switches.gpus
    each = f"{count} GPU{'s' * (count > 1)} each"
    table = _rows(f"GPUs, {each}", "", "a step", "an expert", "GPU hours in all", "a clip")
    for fit in plan.fits:
        found = plan.hours(fit.gpu)
        table.add_row(
            fit.gpu.title,
            "[green]fits" if fit.fits else "[red]does not fit",
            hours(found["expert"]),
            gpu_hours(found["gpu_hours"]),
            _way(fit),
        )
    return table


def _way(fit: Fit) -> str:
    return {"generate": "fits", "bfloat16": "bfloat16", "offloaded": "offloaded", "": "[red]does not fit"}[fit.sampling]


def advice(plan: Plan) -> Iterator[str]:
    """A sentence for GPUs that a step does not fit on, or a clip only in another way than by `archipel generate`."""
    said: dict[str, list[str]] = {}
    for fit in plan.fits:
        if not fit.fits:
            said.setdefault(_advice(fit), []).append(fit.gpu.title)
    for text, titles in said.items():
        yield f"{', '.join(titles)}: {text}"
    other = [fit for fit in plan.fits if fit.sampling != "generate"]
    for way in ("bfloat16", "offloaded", ""):
        names = ", ".join(fit.gpu.title for fit in other if fit.sampling == way)
        if names and way:
            yield f"sampling on {names}: {_SAMPLED[way]} (`archipel export`)"
        elif names:
            yield f"sampling on {names}: not even one expert in bfloat16 fits"


def _advice(fit: Fit) -> str:
    needs = f"a step needs {size(fit.needed)}, {_usable(fit.gpu)} can be used; "
    if fit.advice is None:
        return needs + "nothing that we have makes it fit: a smaller network, or expert.lora_rank"
    return needs + f"it fits with {fit.advice.told()} ({size(fit.advised)})"


def _usable(gpu: Gpu) -> str:
    return size(gpu.usable)


# --- numbers -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} Z"


def size(count: int) -> str:
    """Bytes in units of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def hours(value: float) -> str:
    """0.5 -> "30 min"."""
    if value >= 1:
        return f"{value:,.1f} h" if value < 100 else f"{value:,.0f} h"
    return f"{value * 60:.0f} min" if value >= 1 / 60 else "under 1 min"


def gpu_hours(value: float) -> str:
    if value < 0.01:
        return "under 0.01"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
