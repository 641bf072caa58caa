#!/usr/bin/env bash
# Qwen3-1.7B <- Qwen3-8B on two nodes with 8 H100 each.  NOT RUN ON GPUS YET; see qwen3_recipe.sh.
#
# On each node, with NODE_RANK 0 on the one that MASTER_ADDR names and 1 on the other:
#   NODE_RANK=0 MASTER_ADDR=node0 STUDENT=... TEACHER=... PROMPTS=... RUN_DIR=... bash examples/h100/two_nodes.sh
#
# RUN_DIR must be on a file system that both nodes share.  Tensor and pipeline parallelism of both models stay
# inside a node; only data parallelism (gradients, the optimizer's shards) and the weight export cross it.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/qwen3_recipe.sh"

: "${NODE_RANK:?0 on the first node, 1 on the second}"
: "${MASTER_ADDR:?host name of the first node}"

DISTRIBUTED_ARGS=(
    --nnodes 2
    --node-rank "${NODE_RANK}"
    --nproc-per-node 8
    --master-addr "${MASTER_ADDR}"
    --master-port "${MASTER_PORT:-29500}"
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 # student: TP 2 x DP 8
    --pipeline-model-parallel-size 1
    --sequence-parallel
    --use-distributed-optimizer
    --teacher-tensor-model-parallel-size 4 # teacher: TP 4 x DP 4, on the same ranks
    --teacher-pipeline-model-parallel-size 1
    --distributed-timeout-minutes 60
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
