#!/usr/bin/env bash
# The model that ships in src/archipel/box: all four emoji packages (about 730 MB once), 16 frames of 64x64, three experts
# partitioned by caption, and a monolith of the same total compute. Some hours on two CPU cores; nearly all clips are for
# training, since it is made to be used. Interrupt it whenever you like; the same command continues.
#
#     runs/emoji_box.sh [RUN] [FOLDER]     # FOLDER: src/archipel/box/emoji, to replace what ships
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-box-run}
folder=${2:-box-model}
make setup
[ -e "$run/run.toml" ] || .venv/bin/archipel init "$run" --source fluent-emoji --preset long \
  --set run.seed=7 --set clips.frames=16 --set clips.fps=8 --set clips.size=64 --set clips.phases=6 \
  --set 'clips.split=[0.85,0.05,0.1]' --set 'codec.patch=[8,16,16]' --set codec.channels=128 --set text.tokens=12 \
  --set partition.features=text --set expert.width=256 --set expert.heads=8 \
  --set expert.single_blocks=4 --set expert.batch=8 --set expert.lr=1.5e-3 --set expert.steps=9000 \
  --set monolith.batch=8 --set monolith.lr=1.5e-3 --set expert.validate_every=500 --set expert.checkpoint_every=500 \
  --set evaluate.count=69
.venv/bin/archipel run "$run" --threads 1
.venv/bin/archipel pack "$run" "$folder" --name emoji --license Apache-2.0 --command runs/emoji_box.sh \
  --commit "$(git rev-parse HEAD)"
