"""The first frame: an uploaded picture, bounded before it is decoded, shown as the run will see it, then forgotten on disk.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

import base64
from pathlib import Path
from typing import Any

from archipel.serving.errors import Refused
from archipel.serving.uploads import first_frame
from archipel.studio import cards
from archipel.studio.context import StudioContext
from archipel.studio.widgets import QUIET, markup, plain


def build(context: StudioContext) -> Any:
    """Components inside an open column; returns a ``gr.State`` with the frame (PNG of the run's size), or None."""
    import gradio as gr

    clips, limits = context.config.clips, context.service.limits
    frame = gr.State(None)
    with gr.Row(elem_classes="picture-row"):
        upload = gr.UploadButton(
            "Begin with a picture", file_types=[".png", ".jpg", ".jpeg", ".webp"], type="filepath", size="sm"
        )
        remove = gr.Button("Remove picture", size="sm", visible=False)
    shown = markup(visible=False, elem_classes="first-frame")

    def take(path: str) -> list[Any]:
        file = Path(path)
        try:
            with file.open("rb") as stream:
                data = stream.read(limits.body + 1)
            png = first_frame(data, clips, limits.image_pixels)
        except Refused as refused:
            return [None, gr.update(value=plain(cards.notice(refused.message)), visible=True), gr.update(visible=False)]
        except OSError:
            said = "The picture was gone before it was read: choose it again."
            return [None, gr.update(value=plain(cards.notice(said)), visible=True), gr.update(visible=False)]
        finally:
            file.unlink(missing_ok=True)
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        picture = f'<figure><img src="{source}" alt="The first frame, as this run sees it"><figcaption>First frame</figcaption></figure>'
        return [png, gr.update(value=plain(picture), visible=True), gr.update(visible=True)]

    def forget() -> list[Any]:
        return [None, gr.update(value="", visible=False), gr.update(visible=False)]

    upload.upload(take, upload, [frame, shown, remove], **QUIET)
    remove.click(forget, None, [frame, shown, remove], **QUIET)
    return frame
