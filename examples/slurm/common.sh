# Sourced by the job scripts of this directory: settings, the doctor, the training step, the exit code.
# NOT RUN UNDER SLURM OR ON GPUS YET.  tests/test_slurm_scripts.py runs the scripts with stand-ins for srun and scontrol.
#
# Environment variables that must be set, with the same paths on every node:
#   CONFIG         YAML of the run, docs/training.md
#   RUN_DIR        directory of the run, on a file system that all nodes share
# and, where needed:
#   REPO           this repository; default: where sbatch was called
#   PYTHON         the trainer's interpreter; default: REPO/.venv/bin/python
#   GPUS_PER_NODE  ranks on each node; default: the GPUs that Slurm gave to it
#   MASTER_PORT    port of the rendezvous on the first node; default: made of the job's number, so that jobs do not meet
#   REQUEUE        0: a job that has saved because its time is nearly up ends with 75 and is not started again; default: 1
#   SRUN_FLAGS     more flags of srun, separated by blanks, such as those of a container runtime
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the network interface between nodes, where the default is the wrong one

: "${CONFIG:?set it to the YAML file of the run}"
: "${RUN_DIR:?set it to a directory for everything the run writes, on a shared file system}"
PYTHON="${PYTHON:-${REPO}/.venv/bin/python}"
GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
read -ra MORE_OF_SRUN <<<"${SRUN_FLAGS:-}"
LAUNCH_DIR="${RUN_DIR}/launch" # what this job writes itself
ATTEMPT="${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}"
mkdir -p "${LAUNCH_DIR}"

export REPO PYTHON CONFIG RUN_DIR GPUS_PER_NODE MASTER_PORT LAUNCH_DIR ATTEMPT
export PYTHONPATH="${REPO}${PYTHONPATH:+:${PYTHONPATH}}"
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-8} / GPUS_PER_NODE > 0 ? ${SLURM_CPUS_PER_TASK:-8} / GPUS_PER_NODE : 1))}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron: order communication before computation under TP
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

mapfile -t ALL_NODES < <(scontrol show hostnames "${SLURM_JOB_NODELIST}")
TRAIN_NODES=("${ALL_NODES[@]}")

# Set STEP to srun's options for one task on each of the named nodes.  A task that fails ends the others.  A job step does
# not inherit --cpus-per-task, and would run all ranks of a node on one core.
step_on() {
    STEP=(
        --kill-on-bad-exit=1 --nodes="$#" --ntasks="$#" --ntasks-per-node=1
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --nodelist="$(IFS=, && echo "$*")" "${MORE_OF_SRUN[@]}"
    )
}

# What each node has, into LAUNCH_DIR; ends the job where a run could not work.
doctor() {
    step_on "${TRAIN_NODES[@]}"
    srun "${STEP[@]}" bash -c \
        '"${PYTHON}" -m megatron_tropd.doctor >"${LAUNCH_DIR}/doctor-${ATTEMPT}-${SLURMD_NODENAME}.txt" 2>&1' || {
        echo "the doctor found what a run cannot work with; see ${LAUNCH_DIR}/doctor-${ATTEMPT}-*.txt" >&2
        exit 2
    }
}

# Train on TRAIN_NODES; arguments are flags of the trainer.  Ends the job with the code of the rank that failed: torchrun's
# own is 1 whatever happened, and 2, 17 and 18 mean that the same job would fail again (docs/launch.md).
# USR1, which Slurm sends to this script before the time is up (#SBATCH --signal), has the run save and end with 75; the
# job is then queued again.
train() {
    local code=0 of_rank step
    TRAIN_NODE_LIST="${TRAIN_NODES[*]}"
    export TRAIN_NODE_LIST
    step_on "${TRAIN_NODES[@]}"
    trap 'touch "${RUN_DIR}/stop"' USR1
    srun "${STEP[@]}" bash "${REPO}/examples/slurm/train_node.sh" "$@" &
    step=$!
    while
        code=0
        wait "${step}" || code=$? # also ended by the trap
        kill -0 "${step}" 2>/dev/null
    do :; done
    if ((code)) && [[ -e "${RUN_DIR}/stopped" ]]; then
        code=75 # SIGTERM for torchrun itself, as of a preemption: it writes no code of a rank
    elif ((code)); then
        of_rank="$(cat "${LAUNCH_DIR}/error-${ATTEMPT}-"*.json 2>/dev/null | grep -o '"errorCode": *[0-9]*' |
            grep -o '[0-9]*$' | sort -n | tail -n 1)" || true
        code="${of_rank:-${code}}"
    fi
    if ((code)); then
        echo "job ${SLURM_JOB_ID} ends with exit code ${code}" >&2
    fi
    if ((code == 75 && ${REQUEUE:-1})); then
        scontrol requeue "${SLURM_JOB_ID}" || echo "job ${SLURM_JOB_ID} cannot be queued again: submit it again" >&2
    fi
    exit "${code}"
}
