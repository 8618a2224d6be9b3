"""The same noise through several strategies, side by side: archipelago and monolith, or what each expert makes of it.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

import secrets
from collections.abc import AsyncIterator
from typing import Any

from archipel.serving.errors import Refused
from archipel.studio import cards, form, widgets
from archipel.studio.context import StudioContext
from archipel.studio.desk import COMPARE, Desk
from archipel.studio.widgets import QUIET, buttons, markup, owner_of, plain

SIDE = 320  # pixels of a clip's frame on the page, at most
MOST = 8  # clips at a time
EMPTY = "Choose two or more ways, and see what each makes of the same noise."
_AS_BOXES = 8  # experts; more are a list to choose from


def build(context: StudioContext, desk: Desk, blocks: Any) -> form.Form:
    """Components inside an open tab; returns the form, and in it the ways."""
    import gradio as gr

    k, own = context.experts, context.config.sample.strategy
    choices = [(cards.title(name), name) for _, name in form.strategies(context)]
    names = [name for _, name in choices]
    first = [own if own in names else names[0], "monolith"]
    with gr.Column(elem_classes="asking wide"):
        prompt = form.prompt("What shall all of them show?")
        given: dict[str, Any] = {"label": "Who makes it", "value": list(dict.fromkeys(first))}
        if k <= _AS_BOXES:
            chosen: Any = gr.CheckboxGroup(choices, elem_classes="ways", **given)
        else:
            chosen = gr.Dropdown(choices, multiselect=True, max_choices=MOST, **given)
        with gr.Row(elem_classes="shortcuts"):
            both = gr.Button("Archipelago and monolith", size="sm", min_width=0)
            each = gr.Button("Each expert alone", size="sm", min_width=0)
        fields = {"prompt": prompt, **form.numbers(context)}
        with gr.Row(elem_classes="go-row"):
            go = gr.Button("Compare", variant="primary", elem_id="compare-go")
            stop = gr.Button("Cancel", visible=False, elem_id="compare-cancel")
    stage = markup(cards.empty(EMPTY), elem_id="comparison")
    group = gr.State(None)
    made = form.Form(fields)
    outputs = [group, stage, go, stop]

    async def make(request: gr.Request, ways: list[str], *values: Any) -> AsyncIterator[list[Any]]:
        try:
            asked = await desk.ask(owner_of(request), COMPARE, _several(made.asked(values), ways))
        except Refused as refused:
            yield [None, plain(cards.notice(refused.message) + cards.empty(EMPTY)), *buttons(False)]
            return
        async for update in _show(desk, owner_of(request), asked):
            yield update

    async def resume(request: gr.Request) -> AsyncIterator[list[Any]]:
        owner = owner_of(request)
        found = desk.latest(owner, COMPARE)
        shots = desk.shots(owner, found) if found else []
        if not found or not shots:
            yield [gr.skip() for _ in outputs]
            return
        async for update in _show(desk, owner, found):
            yield update

    async def cancel(request: gr.Request, name: str | None) -> None:
        if name:
            await desk.cancel(owner_of(request), name)

    loading = blocks.load(resume, None, outputs, **QUIET)
    # What is followed since the page was opened would go on drawing over it.
    gr.on(
        [go.click, prompt.submit, fields["seed"].submit],
        make,
        [chosen, *made.components],
        outputs,
        cancels=loading,
        **QUIET,
    )
    stop.click(cancel, group, None, **QUIET)
    both.click(lambda: first, None, chosen, **QUIET)
    each.click(lambda: [f"expert-{number}" for number in range(k)][:MOST], None, chosen, **QUIET)
    return form.Form({**fields, "ways": chosen})


def remembered(desk: Desk, owner: str, made: form.Form) -> dict[int, Any]:
    """The prompt and the ways that were compared last, by component; {} where there are none."""
    found = desk.latest(owner, COMPARE)
    shots = desk.shots(owner, found) if found else []
    if not shots:
        return {}
    ways = [shot.job.settings["strategy"] for shot in shots]
    return {made.fields["prompt"]._id: shots[0].job.prompt, made.fields["ways"]._id: ways}


def _several(fields: dict[str, Any], ways: list[str]) -> list[dict[str, Any]]:
    """One request per strategy, all of one seed. Raises Refused where there is nothing to compare."""
    ways = list(dict.fromkeys(ways or []))
    if len(ways) < 2:
        raise Refused(400, "choose two or more ways to compare", param="strategy")
    if len(ways) > MOST:
        raise Refused(400, f"{len(ways)} ways were chosen, at most {MOST} are compared at a time", param="strategy")
    fields.setdefault("seed", secrets.randbelow(2**31))
    return [{**fields, "strategy": way} for way in ways]


async def _show(desk: Desk, owner: str, group: str) -> AsyncIterator[list[Any]]:
    shots: list[Any] = []
    async for shots in desk.follow(owner, group):
        if not shots:
            said = cards.notice("This comparison was cancelled.", "plain")
            yield [None, plain(said + cards.empty(EMPTY)), *buttons(False)]
            return
        busy = not all(shot.ended for shot in shots)
        yield [group, plain(cards.side_by_side(shots, SIDE)), *buttons(busy)]
    if shots and not all(shot.ended for shot in shots):
        yield [
            group,
            plain(cards.notice(widgets.STOPPING, "plain") + cards.side_by_side(shots, SIDE)),
            *buttons(False),
        ]
