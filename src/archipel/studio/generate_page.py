"""One clip: a prompt and its settings on one side, what becomes of it on the other.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from archipel.serving.errors import Refused
from archipel.studio import cards, form, pictures, widgets
from archipel.studio.context import StudioContext
from archipel.studio.desk import GENERATE, Desk, Shot
from archipel.studio.widgets import QUIET, buttons, markup, owner_of, plain

SIDE = 512  # pixels of a clip's frame on the page, at most
EMPTY = "Say what the clip shall show, and press Enter."
_GONE = "This clip was cancelled."


def build(context: StudioContext, desk: Desk, blocks: Any) -> form.Form:
    """Components inside an open tab; returns the form, so that others can fill it."""
    import gradio as gr

    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=5, elem_classes="asking", min_width=300):
            prompt = form.prompt()
            _examples(context, prompt)
            image = pictures.build(context) if context.service.offer.takes_image else None
            with gr.Row(elem_classes="go-row"):
                go = gr.Button("Generate", variant="primary", elem_id="generate-go")
                stop = gr.Button("Cancel", visible=False, elem_id="generate-cancel")
            strategy = gr.Dropdown(
                form.strategies(context), value=context.config.sample.strategy, label="Who makes it", filterable=False
            )
            fields = {"prompt": prompt, "strategy": strategy, **form.numbers(context)}
            fields["size"] = gr.Dropdown(
                list(context.service.offer.sizes), value=context.service.offer.size, label="Size", filterable=False
            )
        with gr.Column(scale=6, elem_classes="showing", min_width=300):
            stage = markup(cards.empty(EMPTY), elem_id="stage")
    group = gr.State(None)
    made = form.Form(fields)
    outputs = [group, stage, go, stop]

    async def make(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        *given, first = values if image else (*values, None)
        try:
            asked = await desk.ask(owner_of(request), GENERATE, [made.asked(tuple(given))], first)
        except Refused as refused:
            yield [None, plain(cards.notice(refused.message) + cards.empty("No clip was asked for.")), *buttons(False)]
            return
        async for update in _show(desk, owner_of(request), asked):
            yield update

    async def resume(request: gr.Request) -> AsyncIterator[list[Any]]:
        """After a reload: what was asked for last, followed where it is not finished (its settings: ``remembered``)."""
        owner = owner_of(request)
        found = desk.latest(owner, GENERATE)
        shots = desk.shots(owner, found) if found else []
        if not found or not shots:
            yield [gr.skip() for _ in outputs]
            return
        async for update in _show(desk, owner, found):
            yield update

    async def cancel(request: gr.Request, name: str | None) -> None:
        if name:
            await desk.cancel(owner_of(request), name)

    inputs = [*made.components, *([image] if image else [])]
    loading = blocks.load(resume, None, outputs, **QUIET)
    # What is followed since the page was opened would go on drawing over it.
    gr.on([go.click, prompt.submit, fields["seed"].submit], make, inputs, outputs, cancels=loading, **QUIET)
    stop.click(cancel, group, None, **QUIET)
    return made


def remembered(desk: Desk, owner: str, made: form.Form) -> dict[int, Any]:
    """The settings of the clip that was asked for last, by component; {} where there is none."""
    found = desk.latest(owner, GENERATE)
    shots = desk.shots(owner, found) if found else []
    if not shots:
        return {}
    values = dict(zip(made.names, made.of(shots[0].job), strict=True))
    values["size"] = desk.service.video(shots[0].job)["size"]
    del values["seed"]  # else the next clip would be this one again
    return {made.fields[name]._id: value for name, value in values.items() if value is not None}


async def _show(desk: Desk, owner: str, group: str) -> AsyncIterator[list[Any]]:
    """Updates of group, stage and buttons, for as long as there is something new."""
    shots: list[Shot] = []
    async for shots in desk.follow(owner, group):
        if not shots:
            yield [None, plain(cards.notice(_GONE, "plain") + cards.empty(EMPTY)), *buttons(False)]
            return
        busy = not shots[0].ended
        yield [group, plain(cards.clip(shots[0], SIDE)), *buttons(busy)]
    if shots and not shots[0].ended:
        yield [group, plain(cards.notice(widgets.STOPPING, "plain") + cards.clip(shots[0], SIDE)), *buttons(False)]


def _examples(context: StudioContext, prompt: Any) -> None:
    """The training world's captions, to begin with."""
    import gradio as gr

    found = form.captions(context)
    if not found:
        return
    with gr.Row(elem_classes="examples"):
        markup('<span class="quiet">From what it was trained on:</span>')
        for caption in found:
            gr.Button(caption, size="sm", min_width=0).click(partial(str, caption), None, prompt, **QUIET)
