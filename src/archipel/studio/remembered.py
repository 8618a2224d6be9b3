"""What was asked for last, in the page before it is sent: the fields hold it from the first moment on.

An event after loading would come late on a slow line, and write over what somebody types meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CONFIG = "window.gradio_config = "  # in gradio's first page, with every component's first value


def filled(page: str, values: Mapping[int, Any]) -> str:
    """Gradio's first page with other first ``values``, by the id of the component; as it is where it is not understood."""
    at = page.find(_CONFIG)
    if at < 0 or not values:
        return page
    at += len(_CONFIG)
    try:
        config, end = json.JSONDecoder().raw_decode(page, at)
        for component in config["components"]:
            if component["id"] in values:
                component["props"]["value"] = values[component["id"]]
    except (ValueError, KeyError, TypeError):
        return page
    # Prompts are anybody's words: none may end the script that they stand in.
    written = json.dumps(config).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return page[:at] + written + page[end:]
