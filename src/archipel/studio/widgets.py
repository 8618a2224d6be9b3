"""What is the same on every page: markup of our own as a component, the look, who asks."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from archipel.report.svg import TONES

if TYPE_CHECKING:
    import gradio as gr

# How events are declared: not in gradio's list of endpoints, without its spinner over what is shown.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
STOPPING = "The server is stopping. What was asked for is kept, and is made when it is back."
_SYSTEM = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]


def markup(value: str = "", **given: Any) -> gr.Markdown:
    """A component that shows HTML of ours as it is (see ``plain``); ``given``: elem_id, elem_classes, visible, ...

    Not ``gr.HTML``: that one evaluates strings as JavaScript, which the page's Content-Security-Policy forbids.
    """
    import gradio as gr

    return gr.Markdown(plain(value), sanitize_html=False, latex_delimiters=[], container=False, **given)


def plain(html: str) -> str:
    """HTML that passes through a Markdown component unchanged: one block, no line breaks. What people typed must be
    escaped already (``html.escape``)."""
    return f"<div>{html}</div>".replace("\r", "").replace("\n", " ") if html else ""


def buttons(busy: bool) -> list[Any]:
    """Updates of the button that asks for clips and of the one that cancels: one of them is shown."""
    import gradio as gr

    return [gr.update(visible=not busy), gr.update(visible=busy)]


def owner_of(request: Any) -> str:
    """Whose clips a ``gr.Request`` is about: what the gate found out from the key or the login."""
    return str(request.request.state.owner)


def theme() -> gr.themes.Base:
    """System fonts, the report's colours, in light and dark."""
    import gradio as gr

    teal = gr.themes.Color(
        "#eef7f6", "#d7ecea", "#b2dad6", "#82c3bd", "#4ea8a1", "#0b7d77", "#0a6f6a", "#0a5f5b", "#0b4d4a", "#0c3f3d", "#082927"
    )  # fmt: skip
    gray = gr.themes.Color(
        "#f4f6f4", "#eef3f2", "#dce3e2", "#c2cccc", "#8c9aa2", "#66757d", "#516169", "#37474f", "#1a282d", "#142024", "#0d1518"
    )  # fmt: skip
    base = gr.themes.Base(
        primary_hue=teal,
        secondary_hue=teal,
        neutral_hue=gray,
        font=_SYSTEM,
        font_mono=["ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace"],
        radius_size=gr.themes.sizes.radius_lg,
    )
    return base.set(
        body_background_fill="#f4f6f4",
        body_background_fill_dark="#0d1518",
        body_text_color="#14242b",
        body_text_color_dark="#e4edef",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#142024",
        background_fill_secondary="#eef3f2",
        background_fill_secondary_dark="#1a282d",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0",
        block_label_background_fill="transparent",
        block_title_text_weight="550",
        block_title_text_color="#37474f",
        block_title_text_color_dark="#c2cccc",
        block_info_text_color="#516169",
        block_info_text_color_dark="#9db0b7",
        border_color_primary="#dce3e2",
        border_color_primary_dark="#2b3b41",
        input_background_fill="#ffffff",
        input_background_fill_dark="#101b1f",
        input_border_color="#c2cccc",
        input_border_color_dark="#37474f",
        input_border_color_focus="#0b7d77",
        input_border_color_focus_dark="#3fc7bb",
        input_border_width="1px",
        input_placeholder_color="#66757d",
        input_placeholder_color_dark="#8c9aa2",
        button_primary_background_fill="#0b7d77",
        button_primary_background_fill_hover="#0a6f6a",
        button_primary_background_fill_dark="#3fc7bb",
        button_primary_background_fill_hover_dark="#5fd0c6",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#082927",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#eef3f2",
        button_secondary_background_fill_dark="#1a282d",
        button_secondary_background_fill_hover_dark="#24343a",
        button_secondary_border_color="#c2cccc",
        button_secondary_border_color_dark="#37474f",
        button_border_width="1px",
        slider_color="#0b7d77",
        slider_color_dark="#3fc7bb",
    )


def script() -> str:
    """The studio's own script: what the page does while the server is away."""
    return resources.files("archipel.studio").joinpath("away.js").read_text(encoding="utf-8")


def sheet() -> str:
    """The studio's style sheet; experts' and arms' colours are the report's, in light and in dark."""
    report = resources.files("archipel.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root\{([^}]*)\}", report)[:2]
    marks = "\n".join(
        line for line in report.splitlines() if line.startswith((".tick", ".grid{", ".line{", ".legend", ".key"))
    )
    # More specific than gradio's colour of all that stands in prose.
    marks += "".join(f".gradio-container .prose .t{n}{{color:var(--t{n})}}" for n in range(TONES))
    here = resources.files("archipel.studio")
    own = "\n".join(here.joinpath(name).read_text(encoding="utf-8") for name in ("studio.css", "islands.css"))
    light = light.replace("color-scheme:light dark;", "")
    return f".gradio-container{{{light}}}\n@media (prefers-color-scheme:dark){{.gradio-container{{{dark}}}}}\n{marks}\n{own}"
