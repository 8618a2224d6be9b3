"""Scale curves: time and memory against clips, experts, frames and resolution.

    python -m bench.scale [--work FOLDER] [--out FILE.json] [--page docs/benchmarks] [--only CASE ...] [--most N]

Every point is a process of its own on one thread; what is measured is kept in OUT after every point, and a second call goes on
where the first was interrupted. ``world`` makes runs of any size without decoding anything, ``clips`` and ``models`` hold the
cases, ``fitting`` the power laws, ``page`` the Markdown page and its curves.
"""
