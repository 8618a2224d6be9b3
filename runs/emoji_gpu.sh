#!/usr/bin/env bash
# The same pipeline with larger experts on one CUDA GPU: minutes. Works in slices, so that a time limit loses nothing:
# each call trains for at most SLICE and continues where the last one stopped.
#
#     SLICE=10m runs/emoji_gpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-gpu}
slice=${SLICE:-24h}
python=${PYTHON:-.venv/bin/python}
[ "$python" != .venv/bin/python ] || make setup
archipel() { "$python" -m archipel.cli "$@"; }
[ -e "$run/run.toml" ] || archipel init "$run" --source fluent-emoji --preset gpu
archipel prepare "$run"
archipel partition "$run"
timeout --signal=TERM --kill-after=60 "$slice" "$python" -m archipel.cli run "$run" || [ $? -eq 124 ]
archipel status "$run"
