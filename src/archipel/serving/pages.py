"""The two pages of a server without the studio: the description of its interface, and the login. No script, no font."""

from __future__ import annotations

import html
import json
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; background: #fff }
h2 { font-size: 1.05rem; margin: 2rem 0 .3rem } code, pre { font: 14px/1.4 ui-monospace, monospace }
pre { background: #f4f4f2; padding: .8rem; overflow-x: auto; border-radius: 6px }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
.verb { display: inline-block; min-width: 4.5rem; font-weight: 600 } input, button { font: inherit; padding: .4rem .6rem }
p.wrong { color: #a40000 }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #eee } pre { background: #242424 } p.wrong { color: #ff8a80 } }
"""


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>"
    )


def docs(description: dict[str, Any]) -> str:
    """An OpenAPI description as a page to read."""
    parts = [
        f"<h1>{html.escape(description['info']['title'])}</h1><p>{html.escape(description['info']['description'])}</p>"
        '<p>For machines: <a href="openapi.json">openapi.json</a></p>'
    ]
    for path, verbs in description["paths"].items():
        for verb, operation in verbs.items():
            parts.append(_operation(path, verb, operation))
    return _page(description["info"]["title"], "".join(parts))


def _operation(path: str, verb: str, operation: dict[str, Any]) -> str:
    out = [f'<h2><span class="verb">{verb.upper()}</span> <code>{html.escape(path)}</code></h2>']
    out.append(f"<p>{html.escape(operation.get('description') or operation.get('summary', ''))}</p>")
    rows = [
        f"<tr><td><code>{html.escape(p['name'])}</code></td><td>{html.escape(json.dumps(p['schema']))}</td></tr>"
        for p in operation.get("parameters", [])
    ]
    if rows:
        out.append(f"<table>{''.join(rows)}</table>")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        shown = json.dumps(content["schema"].get("properties", {}), indent=2)
        out.append(f"<details><summary>{html.escape(kind)}</summary><pre>{html.escape(shown)}</pre></details>")
    answers = "".join(
        f"<tr><td><code>{html.escape(code)}</code></td><td>{html.escape(answer.get('description', ''))}</td></tr>"
        for code, answer in operation["responses"].items()
    )
    return f"{''.join(out)}<details><summary>answers</summary><table>{answers}</table></details>"


def login(wrong: bool = False) -> str:
    said = '<p class="wrong" role="alert">That is not a key of this server.</p>' if wrong else ""
    return _page(
        "Archipel: log in",
        f'<h1>Archipel</h1>{said}<form method="post" action="/login"><p><label for="key">API key</label></p>'
        '<p><input id="key" name="key" type="password" autocomplete="current-password" required autofocus> '
        "<button>Log in</button></p></form>",
    )
