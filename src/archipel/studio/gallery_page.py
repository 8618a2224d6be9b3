"""What this key has made, newest first: each clip with its settings, to be used again or removed.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

from typing import Any

from archipel.studio import cards, form
from archipel.studio.context import StudioContext
from archipel.studio.desk import Desk
from archipel.studio.widgets import QUIET, markup, owner_of, plain

PAGE = 12  # clips at a time
SIDE = 256
_EMPTY = "Clips that you make are kept here, with their settings."


def build(context: StudioContext, desk: Desk, tab: Any, tabs: Any, made: form.Form) -> None:
    """Components inside the open tab ``tab``; ``made``: the form that settings go back to."""
    import gradio as gr

    limits = context.service.limits
    nothing = markup(cards.empty(_EMPTY))
    names, begins = gr.State([]), gr.State([None])  # jobs on this page; where each page up to this one begins
    slots = []
    with gr.Row(elem_classes="gallery"):
        for number in range(PAGE):
            with gr.Column(visible=False, elem_classes="slot", min_width=200) as slot:
                shown = markup()
                with gr.Row(elem_classes="slot-row"):
                    again = gr.Button("Use settings", size="sm", min_width=0, elem_id=f"again-{number}")
                    remove = gr.Button("Delete", size="sm", min_width=0, elem_id=f"delete-{number}")
            slots.append((slot, shown, again, remove))
    with gr.Row(elem_classes="pages"):
        newer = gr.Button("Newer", size="sm", min_width=0, interactive=False)
        older = gr.Button("Older", size="sm", min_width=0, interactive=False)
    days = limits.keep_seconds / 86400
    markup(
        f'<p class="quiet">Clips are kept for {days:g} {"day" if days == 1 else "days"}, and seen with your key only.</p>'
    )
    page = [names, begins, nothing, newer, older, *(part for slot in slots for part in slot[:2])]

    def look(owner: str, starts: list[str | None]) -> list[Any]:
        shots, more = desk.page(owner, starts[-1], PAGE)
        if not shots and len(starts) > 1:
            return look(owner, starts[:-1])
        updates: list[Any] = [[shot.job.id for shot in shots], starts]
        updates += [gr.update(visible=not shots), gr.update(interactive=len(starts) > 1), gr.update(interactive=more)]
        for number in range(PAGE):
            there = number < len(shots)
            updates += [gr.update(visible=there), plain(cards.clip(shots[number], SIDE)) if there else ""]
        return updates

    def refresh(request: gr.Request) -> list[Any]:
        return look(owner_of(request), [None])

    def back(request: gr.Request, starts: list[str | None]) -> list[Any]:
        return look(owner_of(request), starts[:-1] or [None])

    def forth(request: gr.Request, shown: list[str], starts: list[str | None]) -> list[Any]:
        return look(owner_of(request), [*starts, shown[-1]] if shown else starts)

    async def delete(owner: str, number: int, shown: list[str], starts: list[str | None]) -> list[Any]:
        if number < len(shown):
            await desk.delete(owner, shown[number])
        return look(owner, starts)

    def reuse(owner: str, number: int, shown: list[str]) -> list[Any]:
        job = desk.service.jobs.find(shown[number], owner) if number < len(shown) else None
        if job is None:
            return [gr.skip() for _ in (tabs, *made.components)]
        values = made.of(job)
        values[made.names.index("size")] = desk.service.video(job)["size"]
        return [gr.Tabs(selected="generate"), *values]

    tab.select(refresh, None, page, **QUIET)
    newer.click(back, begins, page, **QUIET)
    older.click(forth, [names, begins], page, **QUIET)

    def connect(number: int, again: Any, remove: Any) -> None:  # gradio finds no gr.Request in a partial
        def use(request: gr.Request, shown: list[str]) -> list[Any]:
            return reuse(owner_of(request), number, shown)

        async def drop(request: gr.Request, shown: list[str], starts: list[str | None]) -> list[Any]:
            return await delete(owner_of(request), number, shown, starts)

        again.click(use, names, [tabs, *made.components], **QUIET)
        remove.click(drop, [names, begins], page, **QUIET)

    for number, (_, _, again, remove) in enumerate(slots):
        connect(number, again, remove)
