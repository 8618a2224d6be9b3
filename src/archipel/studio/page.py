"""The studio's one page: a head, and a tab per thing that can be done."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from html import escape
from typing import Any

from archipel.studio import compare_page, gallery_page, generate_page, islands_page, partition_page, widgets
from archipel.studio.context import StudioContext
from archipel.studio.desk import Desk

TITLE = "Archipel studio"
_MARK = (
    '<svg viewBox="0 0 60 36" aria-hidden="true"><ellipse class="t0" cx="20" cy="23" rx="17" ry="10"/>'
    '<ellipse class="t1" cx="44" cy="13" rx="11" ry="7"/><ellipse class="t2" cx="49" cy="28" rx="6" ry="4"/></svg>'
)


def build(context: StudioContext, desk: Desk) -> tuple[Any, Callable[[str], dict[int, Any]]]:
    """The page's ``gr.Blocks``, not yet mounted; and what an owner asked for last, by the ids of its components."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 600), fill_width=True) as blocks:
        widgets.markup(_head(context), elem_id="head")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                form = generate_page.build(context, desk, blocks)
            with gr.Tab("Compare", id="compare"):
                ways = compare_page.build(context, desk, blocks)
            with gr.Tab("Gallery", id="gallery") as gallery:
                gallery_page.build(context, desk, gallery, tabs, form)
            with gr.Tab("Partition", id="partition"):
                partition_page.build(context)
            with gr.Tab("Islands", id="islands"):
                islands_page.build(context)
    # Followed clips hold no thread; the jobs' own queue bounds the work.
    blocks.queue(api_open=False, max_size=256, default_concurrency_limit=None)

    def remembered(owner: str) -> dict[int, Any]:
        try:
            return {**generate_page.remembered(desk, owner, form), **compare_page.remembered(desk, owner, ways)}
        except sqlite3.Error:  # the page is of use without it
            return {}

    return blocks, remembered


def _head(context: StudioContext) -> str:
    clips, k = context.config.clips, context.experts
    side = clips.size
    facts = f"{k} experts · {clips.frames} frames of {side}×{side} · {context.service.offer.seconds} s"
    return (
        f'<header class="top"><span class="mark">{_MARK}<h1>Archipel <b>studio</b></h1></span>'
        f'<span class="quiet facts"><span class="model">{escape(context.service.offer.model)}</span> {facts}</span></header>'
    )
