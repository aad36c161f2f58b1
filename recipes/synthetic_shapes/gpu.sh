#!/bin/bash
# Render, train and export within MINUTES on one GPU machine: recipes/synthetic_shapes/gpu.sh OUT
#
# OUT gets the weights in parts of 15 MiB (`cat model.tar.* | tar x` joins them), the log, and state.pt every minute.
# Environment: MINUTES (9), DEVICE (cuda), SCENES (4000; 0 if OUT/run/scenes holds them), DRAWINGS (file of clipart.py),
# INIT (the bundled model), MIX (sizes and batches). Not run on a GPU yet; rehearsed at toy size on a CPU.
set -euo pipefail
out=$(realpath -m "${1:?folder for the weights}")
cd "$(dirname "$0")"
start=$SECONDS
minutes=${MINUTES:-9} device=${DEVICE:-cuda} scenes=${SCENES:-4000} cores=$(nproc)
mkdir -p "$out/run"
if [ "$scenes" -gt 0 ]; then
  python train.py --run "$out/run" --render "$scenes" --seed "${SEED:-40}" --threads "$cores" \
    --render-size "${RENDER_SIZE:-512}" ${DRAWINGS:+--drawings "$DRAWINGS"}
fi
# the last minute is for the export; bfloat16 and workers pay on a GPU only
hours=$(python -c "print(max(10, 60 * $minutes - 60 - ($SECONDS - $start)) / 3600)")
options=(--device "$device" --hours "$hours" --lr "${LR:-6e-4}" --warm 50 --fall 1 --ema 0.99 --save-every 60
  --prompts 8 --rounds 0 0 1 0 0 3 0 --init "${INIT:-../../fastsam_rwkv/weights/tiny}" --seed "${SEED:-40}")
if [ "$device" = cuda ]; then
  options+=(--bf16 --workers "$((cores - 1))" --mix ${MIX:-256:64 352x512:16 256:64 512x352:16 512:16})
else
  options+=(--workers 0 --log-every 1 --mix ${MIX:-64:2})
fi
[ ! -e "$out/run/state.pt" ] || options+=(--resume)
python train.py --run "$out/run" "${options[@]}"
python train.py --run "$out/run" --export "$out/run/model" --image-size 512
cp "$out/run/log.jsonl" "$out"
tar c -C "$out/run" model | split -b 15M - "$out/model.tar."
