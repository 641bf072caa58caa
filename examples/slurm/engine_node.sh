# What one node with SGLang servers does; started by srun, once on each such node.  See engines_on_own_nodes.sbatch.
#
# The servers are started by the launcher that the trainer uses for its own: keys reach it by a pipe, so that they are in
# no argv, and it hides them in SGLang's log.  They load no weights; the first push of the run brings them.
set -euo pipefail
LOG_DIR="${RUN_DIR}/engines"
mkdir -p "${LOG_DIR}"
umask 077
TP=$((GPUS_PER_NODE / ENGINES_PER_NODE > 0 ? GPUS_PER_NODE / ENGINES_PER_NODE : 1))
read -ra MORE <<<"${ENGINE_FLAGS}"

keys() { # one line of JSON; then the pipe stays open, because the server ends when it closes
    "${PYTHON}" -c '
import json, sys
from pathlib import Path
from megatron_tropd.sglang.settings import load_keys
keys = load_keys({}, Path(sys.argv[1]))
print(json.dumps({"api_key": keys.api, "admin_api_key": keys.admin}), flush=True)
' "${KEY_FILE}" && exec sleep infinity
}

for ((i = 0; i < ENGINES_PER_NODE; i++)); do
    keys | env -u PYTHONPATH HF_HUB_OFFLINE=1 "${SGLANG_PYTHON}" -P "${REPO}/megatron_tropd/sglang/server/launch.py" \
        --model-path "${STUDENT}" --host 0.0.0.0 --port "$((ENGINE_PORT + i))" \
        --load-format dummy --skip-tokenizer-init --skip-server-warmup \
        --tp-size "${TP}" --base-gpu-id "$((i * TP))" "${MORE[@]}" \
        >"${LOG_DIR}/${ATTEMPT}-${SLURMD_NODENAME}-${i}.log" 2>&1 &
done
wait -n # the first that ends, ends this step; the run then waits for its servers, and says so
