#!/usr/bin/env bash
# Train one row of the paper's tables, or a step on the way to one, on a machine with eight H100.  NOT RUN ON GPUS.
#
#   PROMPTS=data/math/responses/data bash examples/paper/train.sh --setting skywork-math --row tropd --out runs/tropd [more flags]
#   bash examples/paper/train.sh --setting skywork-math --row tropd --out runs/smoke --smoke
#
# common.sh says what the words and variables are.  The same command again resumes from the last checkpoint.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/common.sh"

export PYTHONPATH="${REPO}${PYTHONPATH:+:${PYTHONPATH}}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron: order communication before computation under TP
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
if [[ -n "${SMOKE}" ]]; then RANKS=2; else RANKS="${GPUS_PER_NODE:-8}"; fi

exec "${PYTHON}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS}" -m megatron_tropd.train \
    --config "${OUT}/recipe.yaml" --run-dir "${OUT}/run" "$@"
