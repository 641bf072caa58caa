#!/usr/bin/env bash
# Qwen3-1.7B <- Qwen3-8B on one node with 8 H100.  NOT RUN ON GPUS YET; see qwen3_recipe.sh.
#
#   STUDENT=... TEACHER=... PROMPTS=... RUN_DIR=... bash examples/h100/one_node.sh [more flags of the trainer]
#
# The same command again resumes from the last checkpoint in RUN_DIR/checkpoints.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/qwen3_recipe.sh"

DISTRIBUTED_ARGS=(
    --standalone
    --nproc-per-node 8
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 # student: TP 2 x DP 4
    --pipeline-model-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --teacher-tensor-model-parallel-size 4 # teacher: TP 4 x DP 2, on the same ranks
    --teacher-pipeline-model-parallel-size 1
    --distributed-timeout-minutes 60 # ranks that finish a generation early wait for the slowest one
)

torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_tropd.train \
    "${MODEL_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" \
    "${OBJECTIVE_ARGS[@]}" \
    "${OPTIMIZER_ARGS[@]}" \
    "${CHECKPOINT_ARGS[@]}" \
    "$@"
