#!/usr/bin/env bash
# The same study on one CUDA GPU: 64x64 pixels, 16 frames, experts of 29 M parameters, two seeds. Works in slices, so that a
# time limit loses nothing: each call works for at most SLICE, writes a checkpoint about every minute, and ends cleanly;
# call it again until it says that it is done.
#
#     SLICE=9m runs/emoji_gpu.sh [FOLDER]
#
# Where clips cannot be decoded on the GPU machine (no PyAV there), make the folder elsewhere with
# `runs/emoji_gpu.sh FOLDER prepare` and carry it over.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-gpu}
what=${2:-study}
python=${PYTHON:-.venv/bin/python}
[ "$python" != .venv/bin/python ] || make setup
archipel() { "$python" -m archipel.cli "$@"; }
[ -e "$run/run.toml" ] || archipel init "$run" --preset gpu --set partition.features=text --set expert.checkpoint_every=200
archipel prepare "$run"
archipel partition "$run"
[ "$what" != prepare ] || exit 0
status=0
archipel study "$run" --seeds 2 --only table,ablations --for "${SLICE:-24h}" || status=$?
# The end of a slice is no failure; anything else is.
[ "$status" -eq 0 ] || [ "$status" -eq 130 ] || exit "$status"
archipel status "$run"
