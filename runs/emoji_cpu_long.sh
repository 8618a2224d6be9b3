#!/usr/bin/env bash
# The demo's pipeline at better quality: all four emoji packages (about 730 MB once), hours on two CPU cores.
# Interrupt it whenever you like; the same command continues.
#
#     runs/emoji_cpu_long.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-long}
make setup
[ -e "$run/run.toml" ] || .venv/bin/archipel init "$run" --source fluent-emoji --preset long
.venv/bin/archipel run "$run"
