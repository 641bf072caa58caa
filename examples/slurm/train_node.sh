# What one node of the training does; started by srun, once on each node.  See common.sh.
set -euo pipefail
read -ra NODES <<<"${TRAIN_NODE_LIST}"
for index in "${!NODES[@]}"; do
    if [[ "${NODES[index]}" == "${SLURMD_NODENAME}" ]]; then NODE_RANK="${index}"; fi
done
: "${NODE_RANK:?node ${SLURMD_NODENAME} is none of ${TRAIN_NODE_LIST}}"

if ((${#NODES[@]} == 1)); then
    RENDEZVOUS=(--standalone) # torchrun finds a free port
else
    # Static: rank 0, which starts or speaks to the engines and writes the run directory, is on the first node, always.
    RENDEZVOUS=(
        --nnodes "${#NODES[@]}" --node-rank "${NODE_RANK}"
        --master-addr "${NODES[0]}" --master-port "${MASTER_PORT}"
    )
fi
export TORCHELASTIC_ERROR_FILE="${LAUNCH_DIR}/error-${ATTEMPT}-${NODE_RANK}.json" # torchrun writes the failure here
exec "${PYTHON}" -m torch.distributed.run "${RENDEZVOUS[@]}" --nproc-per-node "${GPUS_PER_NODE}" \
    -m megatron_tropd.train --config "${CONFIG}" --run-dir "${RUN_DIR}" "$@"
