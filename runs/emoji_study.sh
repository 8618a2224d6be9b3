#!/usr/bin/env bash
# The small study: archipelago, monoliths and controls on all four emoji packages (about 730 MB once), five seeds, on two CPU
# cores. docs/results holds what it gave. Interrupt it whenever you like; the same command continues.
#
#     runs/emoji_study.sh [FOLDER]
#
# The pilot comes first and writes what the page shows as trials; it looks at validation captions only. Seed 2: its test split
# was not looked at while the recipe was chosen.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-study}
make setup
[ -e "$run/run.toml" ] || .venv/bin/archipel init "$run" --preset study --set run.seed=2
[ -e "$run/study/pilot.json" ] || .venv/bin/archipel study "$run" --seeds 2 \
    --trial rate-half:expert.lr=0.003 --trial rate-double:expert.lr=0.012 \
    --trial head:expert.prediction=velocity --trial batch:expert.batch=32,expert.steps=300 \
    --trial codec:codec.channels=48 --trial width:expert.width=96,expert.heads=3 \
    --trial clusters:partition.features=transnet
.venv/bin/archipel study "$run" --seeds 5
