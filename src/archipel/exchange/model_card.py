"""README.md of an export: what the model is, from which data, at what cost, how good, under which licences, and its limits.

Only what the run's own files say: what is not there is said to be missing. Nothing of the machine goes in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from archipel import store
from archipel.errors import ArchipelError
from archipel.report.reading import arm_label, finite, mapping
from archipel.report.scores import cell
from archipel.run import MONOLITH, Run

Cards = Mapping[str, Mapping[str, Any]]
_METRICS = 12  # rows of the table of scores at most
_NOTHING = "not stated"


def write(run: Run, cards: Cards, missing: list[str], licence: str) -> str:
    """The whole card, Markdown with the YAML head that model hubs read."""
    parts = sections(run, cards, missing, licence)
    return "\n\n".join(part.strip() for part in parts.values() if part) + "\n"


def sections(run: Run, cards: Cards, missing: list[str], licence: str) -> dict[str, str]:
    """The parts of the card by name, in order."""
    return {
        "head": _head(run, licence),
        "intro": _intro(run, cards, missing),
        "use": _use(run),
        "data": _data(run),
        "experts": _experts(run, cards, missing),
        "compute": _compute(run),
        "scores": _scores(run),
        "isolation": _isolation(cards),
        "licences": _licences(run, cards, licence),
        "limits": _limits(run, missing),
    }


def write_single(run: Run, name: str, card: Mapping[str, Any], pipeline: str, notes: list[str], licence: str) -> str:
    """The card of one expert exported alone, as a pipeline of diffusers' own."""
    clips = run.config.clips
    what = f"expert {name} of {run.config.partition.k}" if name.isdigit() else f"the {name}"
    intro = (
        f"# {run.root.name or 'Archipel'}: {what}\n\n"
        f"A `{pipeline}` of diffusers with {what} of Archipel run `{run.id[:12]}`: one `{run.config.expert.backbone}` transformer, "
        + ("trained on the clips of one cluster and on nothing else" if name.isdigit() else "trained on all clips")
        + f". It knows no other. Clips: {clips.frames} frames of {clips.size}x{clips.size} at {clips.fps:g} frames per second."
    )
    use = "\n".join(["## Use", "", *(f"- {note[0].upper()}{note[1:]}." for note in notes)])
    cards = {name: card}
    parts = [
        _head(run, licence),
        intro,
        use,
        _data(run),
        _experts(run, cards, []),
        _isolation(cards),
        _licences(run, cards, licence),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _head(run: Run, licence: str) -> str:
    about = licence.strip().lower().replace(" ", "-")
    known = re.fullmatch(r"[a-z0-9.+-]{1,60}", about)  # as hubs write them: apache-2.0, mit, cc-by-4.0
    license_lines = [f"license: {about}"] if known else ["license: other", "license_name: see-the-model-card"]
    image = any(run.config.expert.tasks[1:])
    tags = [
        "archipel",
        "video",
        "decentralized-diffusion",
        "mixture-of-experts",
        *(["image-to-video"] if image else []),
    ]
    lines = [
        "library_name: diffusers",
        "pipeline_tag: text-to-video",
        *license_lines,
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _intro(run: Run, cards: Cards, missing: list[str]) -> str:
    config = run.config
    clips, k = config.clips, config.partition.k
    here = k - len(missing)
    each = max((int(card.get("parameters") or 0) for name, card in cards.items() if name.isdigit()), default=0)
    return (
        f"# {run.root.name or 'Archipel'}: {k} experts and a router\n\n"
        f"A text-to-video model of {here if missing else k} diffusion transformers (`{config.expert.backbone}`, "
        f"{each:,} parameters each) that were trained apart, each on its own cluster of the clips and without any exchange of "
        "gradients, parameters or activations; a router mixes their velocities at every step (decentralized diffusion models, "
        "arXiv 2501.05450; Paris 2.0, arXiv 2605.26064). Made with Archipel.\n\n"
        f"Clips: {clips.frames} frames of {clips.size}x{clips.size} at {clips.fps:g} frames per second. "
        f"Run `{run.id[:12]}`; every file's sha256 is in `archipel.json`."
    )


def _use(run: Run) -> str:
    steps = run.config.sample.steps
    return (
        "## Use\n\n```python\nimport torch\nfrom archipel import ArchipelPipeline\n\n"
        'pipe = ArchipelPipeline.from_pretrained("FOLDER")\n'
        f'frames = pipe("a prompt", num_inference_steps={steps}, generator=torch.manual_seed(0)).frames\n```\n\n'
        "`enable_model_cpu_offload()`, callbacks and other schedulers work as in any pipeline of diffusers. Each `expert_k/` is "
        "a plain diffusers transformer."
    )


def source_of(run: Run) -> dict[str, Any]:
    """{"source", "license", counts of clips}: what the run knows of its clips."""
    card = _card(run, "clips")
    provenance, counts = mapping(card.get("provenance")), mapping(card.get("counts"))
    licence = " ".join(str(provenance.get("license") or run.config.clips.license or _NOTHING).split())
    known = {key: counts[key] for key in ("used", "groups", "train", "validation", "test") if key in counts}
    return {"source": run.config.clips.source, "license": licence, **known}


def _card(run: Run, name: str) -> Mapping[str, Any]:
    try:
        return mapping(store.read_card(run.root / name))
    except ArchipelError:
        return {}


def _data(run: Run) -> str:
    about = source_of(run)
    counts = ", ".join(f"{about[key]} {key}" for key in ("train", "validation", "test") if key in about)
    sentence = f"{about['used']} clips in {about['groups']} content groups ({counts}); " if "used" in about else ""
    split = "splits are by content group, and nothing was fitted or chosen on the test split." if sentence else ""
    return f"## Data\n\nSource: `{about['source']}`. {sentence}{split}\nLicence of the source, as it states it: {about['license']}."


def _experts(run: Run, cards: Cards, missing: list[str]) -> str:
    rows = [
        "| part | cluster | training clips | steps | batch | training FLOPs | held-out loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, card in cards.items():
        label = f"expert {name}" if name.isdigit() else name
        if card.get("imported"):
            rows.append(f"| {label} (imported) | {_or(card.get('cluster'))} | | | | {_NOTHING} | {_loss(card)} |")
            continue
        cells = [
            card.get("cluster"),
            card.get("train_clips"),
            card.get("steps"),
            card.get("batch"),
            _flops(card.get("flops")),
        ]
        rows.append(f"| {label} | {' | '.join(_or(one) for one in cells)} | {_loss(card)} |")
    absent = (
        f"\n\nMissing from this export: experts {', '.join(missing)}; their share goes to the others."
        if missing
        else ""
    )
    partition = run.config.partition
    how = f"clusters by {partition.method} on {partition.features} features"
    return f"## Experts\n\nK = {partition.k}, {how}.\n\n" + "\n".join(rows) + absent


def _loss(card: Mapping[str, Any]) -> str:
    validation = mapping(card.get("validation"))
    found = finite(mapping(validation.get("ema") or validation.get("raw")).get("loss"))
    return "" if found is None else f"{found:.4f}"


def _flops(value: Any) -> str:
    found = finite(value)
    return _NOTHING if found is None else f"{found:.3g}"


def _or(value: Any) -> str:
    return "all" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _compute(run: Run) -> str:
    ledger = mapping(_json(run.ledger))
    if not ledger or ledger.get("run") != run.id:
        return "## Compute\n\nThe run has no ledger here: what each part spent is in the table above."
    training = mapping(ledger.get("training"))
    rows = ["| | training FLOPs | samples | parameters | seconds, summed | longest |", "|---|---|---|---|---|---|"]
    for side in ("archipelago", MONOLITH):
        about = mapping(training.get(side))
        cells = [_flops(about.get("flops")), *(_or(about.get(key, "")) for key in ("samples", "parameters"))]
        rows.append(
            f"| {side} | {' | '.join(cells)} | {about.get('seconds_sum', '')} | {about.get('seconds_longest', '')} |"
        )
    ratio = finite(ledger.get("ratio"))
    matched = "matched" if ledger.get("matched") else "not matched"
    told = f"\n\nTraining FLOPs of experts and router over the monolith's: {ratio:.4f} ({matched})." if ratio else ""
    return (
        "## Compute\n\nForward and backward passes of training; codec and text encoder not counted.\n\n"
        + "\n".join(rows)
        + told
    )


def _scores(run: Run) -> str:
    split = run.config.evaluate.split
    rows = _json(run.scores(split))
    if not isinstance(rows, list) or not rows:
        return "## Scores\n\nThe run has no scores here."
    primary, chosen = run.config.sample.strategy, run.config.evaluate.primary
    by = {(str(mapping(row).get("arm")), str(mapping(row).get("metric"))): row for row in rows}
    arms = [arm for arm in ("codec", "real", primary, MONOLITH) if any(one == arm for one, _ in by)]
    found = dict.fromkeys(metric for _, metric in by if not metric.startswith("cluster-share"))
    metrics = [chosen, *(metric for metric in found if metric != chosen)][:_METRICS]
    lines = [f"| metric | {' | '.join(arm_label(arm, primary) for arm in arms)} |", "|---" * (len(arms) + 1) + "|"]
    for metric in metrics:
        cells = [cell(by.get((arm, metric))) for arm in arms]
        shown = ["" if c is None else f"{c['value']} ({c['interval']})" if c["interval"] else c["value"] for c in cells]
        lines.append(f"| {metric}{' (primary)' if metric == chosen else ''} | {' | '.join(shown)} |")
    extra = mapping(_json(run.scores(split).with_name(f"{split}.extra.json")))
    told = [
        str(mapping(one).get("verdict", "")) for one in extra.get("comparisons") or [] if mapping(one).get("primary")
    ]
    about = f"{extra.get('clips', '?')} clips of the {split} split in {extra.get('groups', '?')} content groups; 95 % intervals."
    return f"## Scores\n\n{about}\n\n" + "\n".join(lines) + "".join(f"\n\n{one}" for one in told if one)


def _json(path: Any) -> Any:
    try:
        return store.read_json(path) if path.is_file() else None
    except ArchipelError:
        return None


def _isolation(cards: Cards) -> str:
    lines = ["## Isolation", "", "What each training process opened and where it connected, as its card says:", ""]
    for name, card in cards.items():
        touched = mapping(card.get("touched"))
        if not touched:
            lines.append(f"- {name}: no record.")
            continue
        shards = sorted(
            {str(path).split("/")[1] for path in touched.get("read") or [] if str(path).startswith("shards/")}
        )
        connected = touched.get("connected") or []
        where = f"{len(connected)} connections" if connected else "no connections"
        lines.append(f"- {name}: read shard {', '.join(shards) or '(none)'}; {where}.")
    evidence = {str(mapping(card.get("touched")).get("evidence", "")) for card in cards.values()} - {""}
    return "\n".join([*lines, *(f"\nEvidence: {one}." for one in sorted(evidence))])


def _licences(run: Run, cards: Cards, licence: str) -> str:
    config = run.config
    lines = [
        f"- these weights: {licence or 'not chosen by whoever exported them'}",
        f"- clips: {source_of(run)['license']}",
    ]
    if config.text.encoder == "minilm":
        lines.append("- text encoder: all-MiniLM-L6-v2, Apache-2.0 by its model card")
    else:
        lines.append(f"- text encoder ({config.text.encoder}): that of whoever released it")
    if config.codec.kind == "autoencoder":
        lines.append(f"- autoencoder ({config.codec.model}): that of whoever released it")
    if config.expert.weights:
        lines.append(
            "- the weights that training began with: that of whoever released them; it may bind these weights too"
        )
    for name, card in cards.items():
        imported = mapping(card.get("imported"))
        if imported:
            lines.append(f"- expert {name}: imported; licence: {imported.get('license') or _NOTHING}")
    return "## Licences\n\n" + "\n".join(lines)


def _limits(run: Run, missing: list[str]) -> str:
    clips = run.config.clips
    lines = [
        f"- It makes clips of {clips.frames} frames at {clips.size}x{clips.size}; other sizes were not trained.",
        f"- A caption is cut at {run.config.text.tokens} tokens.",
        "- It knows what its clips show and nothing else; what no cluster holds, no expert knows.",
        "- Scores are of the run's own held-out clips; they say nothing about other prompts.",
    ]
    if missing:
        lines.append("- Experts are missing: scores, where shown, are of the whole.")
    return "## Limits\n\n" + "\n".join(lines)
