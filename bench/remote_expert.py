"""What a step costs with an expert elsewhere: seconds and bytes, in F32 and F16, on this machine's own loopback.

    python -m bench.remote_expert [--rounds N] [--out FILE]

One expert of the demo's size with random weights is served by a
process of its own and asked for both branches of guidance, in turn with the same network in this process. Answers are compared
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from archipel import config, presets
from archipel.backbones.registry import build_expert
from archipel.contracts import Conditioning
from archipel.ensemble.guidance import combine
from archipel.ensemble.settings import Settings
from archipel.remote import address
from archipel.remote.expert import Offer, RemoteExpert
from archipel.remote.link import Link
from archipel.remote.wire import Shapes
from archipel.serving.island import App, Bounds, Island

TOKEN = "a-token-of-the-bench"
WORDS = 8  # tokens of a short caption


def network(preset: str) -> Any:
    """The expert of a preset, with weights that say something."""
    made = build_expert(config.build(presets.PRESETS[preset]), seed=0).eval()
    g = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    return made.requires_grad_(False)


def island(preset: str) -> Island:
    made, about = network(preset), config.build(presets.PRESETS[preset])
    shapes = Shapes.of(made.facts)
    return Island("0" * 64, "0", b"{}", "0" * 64, shapes, made, lambda **given: Settings.of(about, **given))


def serve(preset: str) -> None:
    """The island's process: says its port and listens until it is killed."""
    import uvicorn

    from archipel.serving.limits import Limits
    from archipel.serving.protocol import protocol
    from archipel.serving.server import listen

    torch.set_num_threads(1)
    sock = listen("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    how: dict[str, Any] = {"http": protocol(Limits(head_seconds=600)), "ws": "none", "lifespan": "off"}
    app = App(island(preset), [TOKEN], Bounds())
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_config=None, **how)).run(sockets=[sock])


def measure(preset: str, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Medians (10th to 90th percentile) of milliseconds, and bytes, per step of ``rows`` clips."""
    made = network(preset)
    shapes = Shapes.of(made.facts)
    L, D, P = shapes.text
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(L).expand(rows, L) < WORDS
    cond = Conditioning(
        torch.randn(rows, L, D, generator=g) * mask[:, :, None], mask, torch.randn(rows, P, generator=g)
    )
    x, t = torch.randn(rows, *shapes.latent, generator=g), torch.full((rows,), 0.5)
    a, b = torch.full((rows,), 3.0), torch.full((rows,), -2.0)
    command = [sys.executable, "-m", "bench.remote_expert", "--island", preset]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        offer = Offer("0", "0" * 64, shapes, "velocity", 16, 200)
        asked = {
            name: RemoteExpert(Link(address.parse(url, "url"), TOKEN), offer, fp16=name == "F16", seconds=300)
            for name in ("F32", "F16")
        }
        with torch.no_grad():
            here = combine(made, x, t, cond, a, b)
            differ = {name: float((one.combined(x, t, cond, a, b) - here).abs().max()) for name, one in asked.items()}
            if differ["F32"] > 1e-5 * float(here.abs().max()):
                raise SystemExit(f"answers differ by {differ}")
            taken: dict[str, list[float]] = {"here": [], "F32": [], "F16": []}
            sent = {name: (one.link.sent, one.link.received) for name, one in asked.items()}
            for _ in range(rounds):
                for name in taken:
                    begin = time.perf_counter()
                    combine(made, x, t, cond, a, b) if name == "here" else asked[name].combined(x, t, cond, a, b)
                    taken[name].append(1000 * (time.perf_counter() - begin))
    finally:
        process.kill()
        process.wait()
    found = []
    for name, values in taken.items():
        values = sorted(values)
        low, high = values[len(values) // 10], values[-1 - len(values) // 10]
        row: dict[str, Any] = {
            "preset": preset,
            "clips": rows,
            "where": name,
            "ms": round(statistics.median(values), 2),
        }
        row |= {"p10": round(low, 2), "p90": round(high, 2), "least": round(values[0], 2)}
        if name in asked:
            link, before = asked[name].link, sent[name]
            row |= {"sent": (link.sent - before[0]) // rounds, "received": (link.received - before[1]) // rounds}
            row["differs"] = differ[name] / float(here.abs().max())
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--island", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", help="write the record here as well")
    given = parser.parse_args()
    if given.island:
        return serve(given.island)
    torch.set_num_threads(1)
    rows = [row for clips in (1, 4) for row in measure("demo", clips, given.rounds)]
    record = {"torch": torch.__version__, "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": rows}
    text = json.dumps(record, indent=1)
    print(text)
    if given.out:
        with open(given.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    return None


if __name__ == "__main__":
    main()
