"""The model card of a packed run: what it is, from which data, at what cost, how good beside its monolith, and its limits.

Every number comes from the run's own files; what is not there is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archipel import store
from archipel.errors import ArchipelError
from archipel.exchange import model_card
from archipel.report.reading import ARM_NOTES, arm_label, finite, mapping
from archipel.report.scores import cell, direction, in_order
from archipel.run import MONOLITH, ROUTER, Run

SHEET, BESIDE = "sheet.webp", "beside.webp"
_OTHERS = ("text-video-probe", "retrieval@5", "precision", "coverage", "share-nearer-train")
_PARAMETERS = ("estimator", "extractor", "weights", "frames", "resize", "n", "reference", "groups", "pca")


def write(run: Run, made: Path, facts: Mapping[str, Any]) -> str:
    """Markdown. ``made``: the packed folder, whose cards say what is in it; ``facts``: its box.json so far."""
    cards = {name: store.read_card(made / run.expert(name).relative_to(run.root)) or {} for name in _parts(run)}
    whole = model_card.sections(run, cards, [], str(facts["licence"]))
    parts = [
        whole["head"].replace("library_name: diffusers", "library_name: archipel"),
        _intro(run, facts, cards),
        _use(run, facts),
        _shown(run, facts),
        whole["data"] + _packages(run),
        whole["experts"] + _monolith(facts),
        whole["compute"] + _hours(run),
        _scores(run),
        _admission(facts),
        _half(facts, made),
        whole["isolation"],
        whole["licences"],
        whole["limits"] + _more_limits(run),
        _again(run, facts),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _parts(run: Run) -> list[str]:
    return [*run.expert_names, ROUTER]


def _intro(run: Run, facts: Mapping[str, Any], cards: Mapping[str, Mapping[str, Any]]) -> str:
    config, clips = run.config, run.config.clips
    each = max(int(cards[name].get("parameters") or 0) for name in run.expert_names)
    return (
        f"# {facts['name']}: {config.partition.k} experts and a router\n\n"
        f"A text-to-video model of {config.partition.k} diffusion transformers (`{config.expert.backbone}`, {each:,} parameters each) "
        "that were trained apart, each on its own cluster of the clips and without any exchange of gradients, parameters or "
        "activations; a router chooses among them at every step (decentralized diffusion models, arXiv 2501.05450; Paris 2.0, "
        "arXiv 2605.26064). A monolith was trained beside them at the same total compute; its scores and clips are below, its "
        "weights are not part of the model.\n\n"
        f"Clips: {clips.frames} frames of {clips.size}x{clips.size} at {clips.fps:g} frames per second. Run `{run.id}`."
    )


def _use(run: Run, facts: Mapping[str, Any]) -> str:
    prompt = (list(facts["examples"]["captions"]) or ["a prompt"])[0]
    sample = run.config.sample
    return (
        "## Use\n\n"
        f'```sh\narchipel generate "{prompt}" -o out.mp4\n```\n\n'
        f'```python\nfrom archipel import Archipelago\n\nArchipelago.load().generate("{prompt}", seed=1).save("out.mp4", scale=4)\n```\n\n'
        f"Without a network and without a GPU. By default: strategy {sample.strategy}, {sample.steps} steps, guidance "
        f"{sample.guidance:g}. A folder that `archipel pack` wrote elsewhere goes where a run goes: `archipel generate FOLDER ...`."
    )


def _shown(run: Run, facts: Mapping[str, Any]) -> str:
    examples = facts["examples"]
    return (
        "## Samples\n\n"
        f"Captions: {examples['rule']}. Every clip is from seed {examples['seed']}, strategy {examples['strategy']}; none was chosen "
        "by eye. The contents are of the training world, with new noise.\n\n"
        f"![Two frames of each clip above its caption]({SHEET})\n\n"
        f"The same captions and the same noise, the archipelago at the left and the monolith at the right:\n\n"
        f"![Moving clips of archipelago and monolith]({BESIDE})"
    )


def _packages(run: Run) -> str:
    card = mapping(store.read_card(run.clips) if (run.clips / "card.json").is_file() else None)
    packages = mapping(mapping(card.get("provenance")).get("packages"))
    lines = [f"- `{name}`, {checksum[:23]}..." for name, checksum in packages.items()]
    if not lines:
        return ""
    more = ""
    if run.config.clips.source == "fluent-emoji":
        more = (
            "\n\nThe drawings are Microsoft's Fluent emoji. The packages say MIT and hold no licence file, and do not state the terms "
            "of the animated set: whoever passes clips on has to judge that. Captions are the emoji's Unicode names (Unicode License)."
        )
    return "\n\nPackages, by name, version and checksum:\n\n" + "\n".join(lines) + more


def _monolith(facts: Mapping[str, Any]) -> str:
    about = mapping(facts.get("monolith"))
    if not about:
        return ""
    return (
        f"\n\nThe monolith, for comparison: {int(about['parameters']):,} parameters, {int(about['steps']):,} steps of batch "
        f"{about['batch']}, {float(about['flops']):.3g} training FLOPs, on all clips; sha256 of its weights `{about['sha256'][:16]}`."
    )


def _hours(run: Run) -> str:
    training = mapping(mapping(_json(run.ledger)).get("training"))
    told = []
    for side, what in (("archipelago", "experts and router"), (MONOLITH, "the monolith")):
        seconds = finite(mapping(training.get(side)).get("seconds_sum"))
        if seconds is not None:
            told.append(f"{what} {seconds / 3600:.2f} hours")
    build = mapping((store.read_card(run.expert("0")) or {}).get("build"))
    where = f" ({build.get('cpu') or build.get('device')}, torch {build.get('torch')}, {build.get('threads')} threads a process)"
    return (
        f"\n\nTraining took {', '.join(told)} on the clock, summed over processes{where if build else ''}."
        if told
        else ""
    )


def _scores(run: Run) -> str:
    split, primary = run.config.evaluate.split, run.config.evaluate.primary
    rows = _json(run.scores(split))
    if not isinstance(rows, list) or not rows:
        return "## Scores\n\nThe run was not evaluated."
    strategy = run.config.sample.strategy
    by = {(str(row.get("arm")), str(row.get("metric"))): row for row in map(mapping, rows)}
    metrics = _metrics([metric for _, metric in by], primary)
    signs = {"lower": " ↓", "higher": " ↑"}
    heads = [
        f"{metric}{' (primary)' if metric == primary else ''}{signs.get(direction(metric), '')}" for metric in metrics
    ]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(metrics) + 1) + "|"]
    for arm in in_order(dict.fromkeys(arm for arm, _ in by), strategy):
        cells = [cell(by.get((arm, metric))) for metric in metrics]
        shown = [
            "" if one is None else " ".join([one["value"], f"[{one['interval']}]" * bool(one["interval"])])
            for one in cells
        ]
        label = arm_label(arm, strategy)
        lines.append(f"| {f'**{label}**' if arm in (strategy, MONOLITH) else label} | {' | '.join(shown)} |")
    extra = mapping(_json(run.scores(split).with_name(f"{split}.extra.json")))
    told = [f"- {one['verdict']}" for one in map(mapping, extra.get("comparisons") or []) if one.get("primary")]
    about = (
        f"{extra.get('clips', '?')} clips an arm for captions of the {split} split, of {extra.get('groups', '?')} content groups that no "
        "part of the training saw. Brackets: 95 % intervals over content groups, of one training each; they say nothing about "
        "another seed. Scored before rounding to half precision."
    )
    arms = dict.fromkeys(arm for arm, _ in by)
    notes = [f"- {arm_label(arm, strategy)}: {ARM_NOTES[arm]}" for arm in arms if arm in ARM_NOTES]
    protocol = [_protocol(metric, by) for metric in metrics]
    return "\n\n".join(
        [
            "## Scores",
            about,
            "\n".join(lines),
            "\n".join([*told, *notes]),
            "Protocol:\n\n" + "\n".join(filter(None, protocol)),
        ]
    )


def _metrics(found: list[str], primary: str) -> list[str]:
    """The primary metric, the excess distance in the same features, then what does not look at these."""
    known = dict.fromkeys(found)
    wanted = [primary, f"excess-FD-{primary.partition('-')[2]}", *_OTHERS]
    return [metric for metric in dict.fromkeys(wanted) if metric in known]


def _protocol(metric: str, by: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    row = next((row for (_, name), row in by.items() if name == metric and row.get("protocol")), {})
    protocol = mapping(mapping(row).get("protocol"))
    said = {key: protocol[key] for key in _PARAMETERS if protocol.get(key) not in (None, "", 0)}
    said = {key: f"{value[:12]}..." if key == "weights" else value for key, value in said.items()}
    return f"- {metric}: " + ", ".join(f"{key} {value}" for key, value in said.items()) if said else ""


def _admission(facts: Mapping[str, Any]) -> str:
    bars = facts["bars"]
    lines = [f"- {'expert ' if name.isdigit() else ''}{name}: {said}" for name, said in facts["admitted"].items()]
    return (
        "## Admission\n\nEvery part was held to the rules for strangers' experts (format, shapes, finite numbers, configuration, "
        "claims of the card, held-out loss below the bar) with the numbers that are loaded here. Bars, as parts of the loss of what knows "
        f"nothing: experts {bars['bar']:g} at the noisier times and {bars['overall']:g} at all, router {bars['router']:g}"
        f"{'' if bars['required'] else '; the owner asked for no loss to be measured'}.\n\n" + "\n".join(lines)
    )


def _half(facts: Mapping[str, Any], made: Path) -> str:
    found = facts["agreement"]
    clips, worst = found["clips"], max(found["velocity"].values())
    size = sum(path.stat().st_size for path in made.rglob("*.safetensors")) / 1e6
    originals = "\n".join(
        f"- {'expert ' if name.isdigit() else ''}{name}: `{sha256}`" for name, sha256 in facts["originals"].items()
    )
    return (
        f"## Half precision\n\nWeights are stored in float16 ({size:.1f} MB) and computed with in float32. Velocities differ from the "
        f"original's by at most {worst:.3%} (root mean square, {found['tolerance']:.0%} allowed), the router's probabilities by at most "
        f"{found['router']:.2g}; the {clips['n']} clips above, from the same noise, by {clips['mean']:.1f} dB PSNR in the mean and "
        f"{clips['min']:.1f} dB at least (70 dB: alike in all that 8 bits show). sha256 of the float32 weights:\n\n{originals}"
    )


def _more_limits(run: Run) -> str:
    return (
        "\n- It is small, and was trained on few clips: it draws what its captions name and mixes little; contents that it never saw "
        "mostly come out as something that it did see."
    )


def _again(run: Run, facts: Mapping[str, Any]) -> str:
    command = facts["command"] or "archipel run RUN"
    at = f" at commit `{facts['commit']}`" if facts["commit"] else ""
    return (
        "## Made by\n\n"
        f"```sh\n{command}\n```\n\nwith `{facts['made_by']}`{at}. `run.toml` beside this card holds every setting, and its sha256 is the "
        "run's id: in an empty folder RUN, `archipel run RUN` makes the run again (on the same CPU type, torch build and thread count "
        "bit for bit), `archipel evaluate RUN` scores it, and `archipel pack RUN FOLDER` writes this folder."
    )


def _json(path: Path) -> Any:
    try:
        return store.read_json(path) if path.is_file() else None
    except ArchipelError:
        return None
